"""Objects under a URL: a plain path, file:// or s3://, always through the same few calls.

One client for our own reads and writes (obstore: whole-object GET and PUT, conditional PUT, listings in Arrow), and
the same credentials for the two libraries that bring a client of their own (deltalake; s3fs, for Ray). Credentials,
region and endpoint are found by botocore: the usual AWS variables, a profile, or the machine's role.
An object is published whole by one PUT, never streamed to its final key.
"""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, S3Store

from mmimpute.errors import Unreachable, UserError

# Long enough to sit out a store's restart, short enough that nobody thinks the run hangs. The timeout rules: waits are drawn
# at random and grow slowly, so that ten tries can be over in 1.6 s.
PATIENT = {"max_retries": 1000, "retry_timeout": timedelta(seconds=60), "backoff": {"base": 3, "max_backoff": timedelta(seconds=5)}}
# For the first contact of a run: a mistyped endpoint is to be told in seconds.
PROMPT = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
ALWAYS = datetime.max.replace(tzinfo=UTC)
PIECE = 8 << 20  # bytes of a download at a time
CREDENTIALS_SECONDS = 300  # for which they are kept: those of a role are handed out with more left than that
# How the store is to encrypt what is written, as obstore and deltalake read it by themselves, and s3fs' names for it.
ENCRYPTION = {
    "AWS_SERVER_SIDE_ENCRYPTION": "ServerSideEncryption",
    "AWS_SSE_KMS_KEY_ID": "SSEKMSKeyId",
    "AWS_SSE_BUCKET_KEY_ENABLED": "BucketKeyEnabled",
}
CLIENT = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(minutes=5), "allow_http": True}


class StoredObject(NamedTuple):
    """One entry of a listing. `key` is relative to the URL that was listed."""

    key: str
    etag: str
    size: int


def is_s3(url: str) -> bool:
    return url.startswith("s3://")


def local_path(url: str) -> Path:
    """The absolute path of a plain path or file:// URL."""
    parts = urlsplit(url)
    if parts.scheme not in ("", "file"):
        raise UserError(f"{url}: expected s3://bucket/prefix, file:///path or a plain path")
    return Path(unquote(parts.path) if parts.scheme else url).expanduser().resolve()


def normalise(url: str) -> str:
    """One spelling per place: no trailing slash, absolute paths, no file://."""
    if not is_s3(url):
        return str(local_path(url))
    if not urlsplit(url).netloc:
        raise UserError(f"{url}: expected s3://bucket/prefix")
    return url.rstrip("/")


def join(url: str, key: str) -> str:
    return f"{normalise(url)}/{key}"


def aws_options() -> dict[str, str]:
    """Endpoint, region and credentials as S3 clients in Rust name them. Raises UserError where there are none."""
    from botocore.configprovider import ConfiguredEndpointProvider
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    session = Session()
    try:
        credentials = session.get_credentials()
        endpoint = ConfiguredEndpointProvider(session.full_config, session.get_scoped_config(), "s3").provide()
    except BotoCoreError as error:
        raise UserError(f"AWS settings: {error}") from None
    if credentials is None:
        raise UserError("no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    frozen = credentials.get_frozen_credentials()
    found = {
        "aws_access_key_id": frozen.access_key,
        "aws_secret_access_key": frozen.secret_key,
        "aws_session_token": frozen.token,
        "aws_region": session.get_config_variable("region") or "us-east-1",
        "aws_endpoint": endpoint,
        "aws_virtual_hosted_style_request": "false" if endpoint else "true",
    }
    return {name: value for name, value in found.items() if value}


def delta_options(url: str) -> dict[str, str]:
    """Storage options for deltalake: the same store, with commits by conditional PUT, and as patient."""
    if not is_s3(url):
        return {}
    waits = {"max_retries": "1000", "retry_timeout": "60s", "backoff_config.base": "3", "backoff_config.max_backoff": "5s"}
    return {**aws_options(), **waits, "allow_http": "true", "conditional_put": "etag"}


def arrow_filesystem(url: str):
    """(pyarrow filesystem, path) of a URL, for the libraries that take those."""
    from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem

    if not is_s3(url):
        return LocalFileSystem(), str(local_path(url))
    return PyFileSystem(FSSpecHandler(s3_filesystem())), normalise(url).removeprefix("s3://")


def s3_filesystem():
    """S3 for the libraries that take fsspec, by today's environment."""
    from s3fs import S3FileSystem

    aws_options()  # s3fs without credentials answers late and obscurely
    encryption = {name: os.environ[variable] for variable, name in ENCRYPTION.items() if variable in os.environ}
    if "BucketKeyEnabled" in encryption:
        encryption["BucketKeyEnabled"] = encryption["BucketKeyEnabled"] == "true"
    return S3FileSystem(use_listings_cache=False, skip_instance_cache=True, s3_additional_kwargs=encryption)


def connect(url: str, retry: dict = PATIENT, create: bool = False) -> S3Store | LocalStore:
    """A store whose root is the URL. A local folder that is not there is made, or is a FileNotFoundError.

    Raises UserError for a file, and for a folder that cannot be made.
    """
    if is_s3(url):
        settings = tuple(item for item in os.environ.items() if item[0].startswith("AWS_"))
        return _connected(normalise(url), retry is PATIENT, settings, int(time.monotonic() // CREDENTIALS_SECONDS))
    path = local_path(url)
    if not create and not path.exists():
        raise FileNotFoundError(path)
    if path.is_file():
        raise UserError(f"{url}: a file; give a folder")
    try:
        return LocalStore(path, mkdir=create)
    except OSError as error:
        raise UserError(f"{url}: no folder can be made there ({error})") from None


@lru_cache(maxsize=32)
def _connected(url: str, patient: bool, settings: tuple, period: int) -> S3Store:
    """One client, and its open connections, for as long as settings and credentials hold: a new one costs 9 ms."""
    return S3Store.from_url(url, config=aws_options(), client_options=CLIENT, retry_config=PATIENT if patient else PROMPT)


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns what a store answers into one clear error. A missing object stays what it is, for callers that expect it."""
    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError):
        raise denied(url) from None
    except (BaseError, FileNotFoundError) as error:
        if isinstance(error, NotFoundError | FileNotFoundError) and "NoSuchBucket" not in str(error):
            raise
        raise refused(url, str(error)) from None


def denied(url: str) -> UserError:
    return UserError(f"{url}: access denied; check the credentials and what they may read and write")


def refused(url: str, answer: str) -> UserError:
    """The error for what a store answered, by its text: not every client, and not in every call, has a type for it."""
    if "NoSuchBucket" in answer:
        return UserError(f"{url}: there is no such bucket")
    if any(code in answer for code in ("403 Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch")):
        return denied(url)
    reason = answer.split("\n")[0][:300]
    return Unreachable(f"{url}: the store does not answer as it should; check endpoint and network ({reason})")


def objects(url: str, suffix: str = "", retry: dict = PATIENT, before: datetime = ALWAYS) -> Iterator[StoredObject]:
    """Every object below a URL whose key ends with `suffix`. Hidden ones (a part starting with _ or .) are left out.

    before: only objects last written before it, by the store's clock.
    Raises UserError for a bucket that is not there, refused credentials and a store that does not answer.
    """
    with explained(url):
        try:
            for batch in obstore.list(connect(url, retry), chunk_size=10_000, return_arrow=True):
                columns = [batch[name].to_pylist() for name in ("path", "e_tag", "size", "last_modified")]
                for key, etag, size, written in zip(*columns, strict=True):
                    if key.endswith(suffix) and written < before and not any(part[0] in "_." for part in key.split("/") if part):
                        yield StoredObject(key, (etag or "").strip('"'), size)
        except (NotFoundError, FileNotFoundError):
            raise UserError(f"{url}: there is no such {'bucket' if is_s3(url) else 'folder'}") from None


def list_objects(url: str, suffix: str = "", retry: dict = PATIENT) -> list[StoredObject]:
    """The same, by key."""
    return sorted(objects(url, suffix, retry))


def read(url: str, key: str) -> bytes:
    """One object, whole. Raises FileNotFoundError."""
    return read_version(url, key)[0]


def read_version(url: str, key: str) -> tuple[bytes, str]:
    """One object, whole, and its ETag. Raises FileNotFoundError."""
    with explained(url):
        try:
            found = obstore.get(connect(url), key)
            return bytes(found.bytes()), (found.meta["e_tag"] or "").strip('"')
        except NotFoundError:
            raise FileNotFoundError(join(url, key)) from None


def download(url: str, key: str, file: IO[bytes]) -> str:
    """One object into a file, piece by piece; its ETag. Raises FileNotFoundError; OSError where the disk is full."""
    with explained(url):
        try:
            found = obstore.get(connect(url), key)
            for piece in found.stream(min_chunk_size=PIECE):
                file.write(piece)
            return (found.meta["e_tag"] or "").strip('"')
        except NotFoundError:
            raise FileNotFoundError(join(url, key)) from None


def write(url: str, key: str, content: bytes | IO[bytes]) -> None:
    """Publishes one object, whole: readers see the old one or the new one. A file is sent in parts, from where it stands."""
    with explained(url):
        obstore.put(connect(url, create=True), key, content)


def delete(url: str, keys: Iterable[str]) -> None:
    with explained(url):
        obstore.delete(connect(url), list(keys))


def size(url: str, key: str) -> int | None:
    """Bytes of an object; None where there is none."""
    with explained(url):
        try:
            return obstore.head(connect(url), key)["size"]
        except (NotFoundError, FileNotFoundError):
            return None


def exists(url: str, key: str) -> bool:
    return size(url, key) is not None


def read_tail(url: str, key: str, size: int) -> bytes:
    """The last `size` bytes of an object, or all of a smaller one. Raises FileNotFoundError."""
    with explained(url):
        try:
            return bytes(obstore.get(connect(url), key, options={"range": {"suffix": size}}).bytes())
        except NotFoundError:
            raise FileNotFoundError(join(url, key)) from None
