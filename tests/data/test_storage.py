"""Objects in a folder and in a real object store, through the same calls."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from mmimpute.data import storage, table
from mmimpute.errors import Unreachable, UserError


def test_write_read_list(place):
    for key in ("b.parquet", "sub dir/a.parquet", "_runs/hidden.parquet", "sub dir/.hidden.parquet", "note.txt"):
        storage.write(place, key, key.encode())
    assert [(o.key, o.size) for o in storage.list_objects(place, ".parquet")] == [("b.parquet", 9), ("sub dir/a.parquet", 17)]
    assert storage.read(place, "sub dir/a.parquet") == b"sub dir/a.parquet"
    assert storage.read_tail(place, "sub dir/a.parquet", 7) == b"parquet"
    assert storage.exists(place, "note.txt") and not storage.exists(place, "other.txt")
    with pytest.raises(FileNotFoundError):
        storage.read(place, "other.txt")


def test_the_etag_follows_the_content(place):
    storage.write(place, "a", b"one")
    (first,) = storage.list_objects(place)
    storage.write(place, "a", b"other")
    (second,) = storage.list_objects(place)
    assert first.etag and first.etag != second.etag


def test_spellings_of_a_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.normalise("x/") == storage.normalise((tmp_path / "x").as_uri()) == str(tmp_path / "x")
    assert storage.normalise("s3://bucket/a/") == "s3://bucket/a"
    for wrong in ("s3:///a", "http://host/a"):
        with pytest.raises(UserError, match="expected s3://bucket/prefix"):
            storage.normalise(wrong)


def test_no_such_place(endpoint, tmp_path):
    with pytest.raises(UserError, match="no such bucket"):
        storage.list_objects("s3://never-made/x")
    with pytest.raises(UserError, match="no such folder"):
        storage.list_objects(str(tmp_path / "x"))


def test_wrong_credentials(bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mistyped")
    with pytest.raises(UserError, match=r"access denied; check the credentials") as caught:
        storage.list_objects(bucket)
    assert "mistyped" not in str(caught.value)


def test_no_credentials(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no S3 credentials"):
        storage.list_objects("s3://bucket/x")


def test_a_profile_gives_credentials_and_endpoint(bucket, endpoint, monkeypatch, tmp_path):
    storage.write(bucket, "a", b"content")
    config = tmp_path / "config"
    config.write_text(
        f"[profile ward]\nregion = {endpoint.region}\nendpoint_url = {endpoint.url}\n"
        f"aws_access_key_id = {endpoint.access_key}\naws_secret_access_key = {endpoint.secret_key}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "ward")
    assert storage.read(bucket, "a") == b"content"
    filesystem, root = storage.arrow_filesystem(bucket)
    with filesystem.open_input_file(f"{root}/a") as file:
        assert file.read() == b"content"


def test_an_endpoint_that_is_not_there(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="does not answer as it should; check endpoint and network"):
        storage.list_objects(bucket, retry=storage.PROMPT)


class Refusing(BaseHTTPRequestHandler):
    """A store that answers every call alike: by the bucket's name, access denied or no such bucket."""

    def do_GET(self):
        status, code = (403, "AccessDenied") if "secret" in self.path else (404, "NoSuchBucket")
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    do_PUT = do_POST = do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def refusing(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        names = {
            "ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "ACCESS_KEY_ID": "a",
            "SECRET_ACCESS_KEY": "b",
            "REGION": "us-east-1",
        }
        for name, value in names.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield
        server.shutdown()


CALLS = {
    "list": storage.list_objects,
    "read": lambda url: storage.read(url, "a"),
    "write": lambda url: storage.write(url, "a", b"content"),
    "table": table.table_state,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("bucket", "message"), [("secret", "access denied; check the credentials"), ("never", "there is no such bucket")])
def test_every_call_tells_what_the_store_refuses(call, bucket, message, refusing):
    with pytest.raises(UserError, match=message) as caught:
        CALLS[call](f"s3://{bucket}/x")
    assert not isinstance(caught.value, Unreachable) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("call", CALLS)
def test_a_file_is_no_place(call, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"a file; give a folder|no table that can be read"):
        CALLS[call](str(tmp_path / "file"))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="no folder can be made there"):
        storage.write(str(tmp_path / "file" / "below"), "a", b"content")


def test_a_table_whose_store_is_away_is_tried_again(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(storage, "delta_options", lambda url: {**storage.aws_options(), "allow_http": "true", "max_retries": "0"})
    with pytest.raises(Unreachable, match="check endpoint and network") as caught:
        table.table_state(bucket)
    assert "\x1b" not in str(caught.value)
