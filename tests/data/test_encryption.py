"""Each of the three clients asks for encryption with every object that it writes, and checks the store's certificate."""

import io
import json
import os
import ssl
import subprocess
import threading
import time
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import deltalake
import pyarrow as pa
import pytest
from deltalake.exceptions import TableNotFoundError

from mmimpute import store
from mmimpute.data import storage
from mmimpute.errors import Unreachable

KEY = "arn:aws:kms:eu-central-1:111122223333:key/0000"
ASKED = {"": "aws:kms", "-aws-kms-key-id": KEY, "-bucket-key-enabled": "true"}


class Listener(BaseHTTPRequestHandler):
    """An empty bucket that takes everything and notes how objects were to be encrypted."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self):
        self._take()

    do_GET = do_HEAD = do_POST = do_PUT

    def _take(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        starts = self.command == "POST" and self.path.split("?")[1] in ("uploads", "uploads=")
        if starts or (self.command == "PUT" and "partNumber" not in self.path):
            self.server.made.append({name: self.headers.get(f"x-amz-server-side-encryption{name}") for name in ASKED})
        root = {"GET": "ListBucketResult", "POST": "InitiateMultipartUploadResult" if starts else "CompleteMultipartUploadResult"}
        inner = "<Bucket>b</Bucket><Key>k</Key><UploadId>u</UploadId><ETag>e</ETag>" if self.command == "POST" else ""
        body = f"<{root[self.command]}>{inner}</{root[self.command]}>".encode() if self.command in root else b""
        self.send_response(404 if self.command == "HEAD" or (self.command == "GET" and "list-type" not in self.path) else 200)
        self.send_header("ETag", '"e"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def made(monkeypatch):
    """How each object was to be encrypted that a client makes at AWS_ENDPOINT_URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        server.made = []
        threading.Thread(target=server.serve_forever).start()
        for name, value in store.Endpoint(f"http://127.0.0.1:{server.server_port}", "a", "b").environment().items():
            monkeypatch.setenv(name, value)
        yield server.made
        server.shutdown()


def write_arrow(url: str) -> None:
    """As Ray writes a training's checkpoints."""
    filesystem, place = storage.arrow_filesystem(url)
    with filesystem.open_output_stream(f"{place}/file") as file:
        file.write(b"x")


def write_delta(url: str) -> None:
    with suppress(TableNotFoundError):  # the listener keeps nothing, and deltalake looks at what it wrote
        deltalake.write_deltalake(url, pa.table({"a": [1]}), storage_options=storage.delta_options(url))


WRITERS = {
    "obstore": lambda url: storage.write(url, "file", b"x"),
    "obstore in parts": lambda url: storage.write(url, "file", io.BytesIO(bytes(12 << 20))),
    "deltalake": write_delta,
    "s3fs": write_arrow,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_object_is_encrypted_as_asked(made, monkeypatch, writer):
    for name, value in zip(storage.ENCRYPTION, ASKED.values(), strict=True):
        monkeypatch.setenv(name, value)
    WRITERS[writer]("s3://bucket/place")
    assert made and all(asked == ASKED for asked in made)
    assert len(made) == (2 if writer == "deltalake" else 1)  # a file and the log


@pytest.mark.parametrize("writer", WRITERS)
def test_the_buckets_default_is_left_alone(made, writer):
    WRITERS[writer]("s3://bucket/place")
    assert made and all(set(asked.values()) == {None} for asked in made)


@pytest.fixture
def certificates(tmp_path):
    """A certificate authority's certificate, and the store's with its key, made for this test."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True)

    def request(name: str) -> tuple[str, ...]:
        return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key", "-subj", f"/CN={name}")

    openssl("req", "-x509", *request("authority"), "-out", "authority.pem", "-days", "2")
    openssl("req", *request("store"), "-out", "store.csr")
    (tmp_path / "extensions").write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
    signed = ("-CA", "authority.pem", "-CAkey", "authority.key", "-CAcreateserial", "-extfile", "extensions", "-days", "2")
    openssl("x509", "-req", "-in", "store.csr", "-out", "store.pem", *signed)
    return tmp_path


@pytest.fixture
def over_tls(certificates, monkeypatch):
    """An object store that speaks TLS alone; the environment points to it and trusts nobody yet."""
    store._generate_credentials(certificates)
    (certificates / "data").mkdir()
    settings = store.SETTINGS | store._choose_ports(None) | {"s3.cert.file": "store.pem", "s3.key.file": "store.key"}
    command = [store._weed(), "-logtostderr", "server", *(f"-{name}={value}" for name, value in settings.items())]
    with open(certificates / "log", "w") as log, subprocess.Popen(command, cwd=certificates, stdout=log, stderr=log) as server:
        url, began = f"https://127.0.0.1:{settings['s3.port']}", time.monotonic()
        trusting = ssl.create_default_context(cafile=certificates / "authority.pem")
        while True:
            try:
                urllib.request.urlopen(f"{url}/healthz", timeout=2, context=trusting).close()
                break
            except OSError:
                assert time.monotonic() - began < 300, (certificates / "log").read_text()[-1000:]
                time.sleep(0.2)
        who = json.loads((certificates / "identities.json").read_text())["identities"][0]["credentials"][0]
        for name, value in store.Endpoint(url, who["accessKey"], who["secretKey"]).environment().items():
            monkeypatch.setenv(name, value)
        yield certificates
        server.kill()


@pytest.mark.services
def test_only_a_store_with_a_trusted_certificate_is_spoken_to(over_tls, monkeypatch):
    with pytest.raises(Unreachable):
        storage.list_objects("s3://bucket", retry=storage.PROMPT)
    for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, str(over_tls / "authority.pem"))
    endpoint = store.Endpoint(*(os.environ[name] for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")))
    assert store.create_bucket(endpoint, "bucket")
    for writer, write in WRITERS.items():
        write(f"s3://bucket/{writer.split()[-1]}")
    assert {o.key.split("/")[0] for o in storage.list_objects("s3://bucket")} == {"obstore", "parts", "deltalake", "s3fs"}
