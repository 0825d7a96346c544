"""Shards of a cohort: found by listing, read whole, checked against the schema."""

import errno
import io
import tempfile
from collections.abc import Collection
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mmimpute.data import storage
from mmimpute.data.arrow import check_subjects
from mmimpute.data.schema import CohortSchema, check_columns, is_list, storage_type
from mmimpute.errors import DataError, UserError

FOOTER_GUESS = 64 * 1024
IN_MEMORY = 64 << 20  # bytes of a shard that is held in memory; a larger one goes through the temp folder
BUFFER = 1 << 20  # bytes of a column that are read at a time


class Shard(NamedTuple):
    """One Parquet object under the cohort's URL."""

    key: str
    etag: str
    size: int


def list_shards(url: str) -> list[Shard]:
    """Every shard below a URL, by name. Raises UserError where there is none."""
    found = [Shard(*o) for o in storage.list_objects(url, ".parquet", storage.PROMPT)]
    if not found:
        raise UserError(f"{url}: no shard (*.parquet) under this URL; give the folder or prefix that holds them")
    return found


def open_shard(url: str, shard: Shard) -> pq.ParquetFile:
    """The whole object, in memory or, a large one, in a nameless temporary file, of which readers hold a page at a time.

    Raises DataError where it is gone, not Parquet, cut off, or another than was listed.
    """
    try:
        source, etag = _fetch(url, shard)
        # Bits that flipped are found where the writer left page checksums; we always do.
        file = pq.ParquetFile(source, page_checksum_verification=True, buffer_size=BUFFER, pre_buffer=False)
    except FileNotFoundError:
        raise DataError(shard.key, None, "no such object", "the shard that was listed", "run again") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise unreadable(shard.key, error) from None
    if etag != shard.etag:
        raise DataError(shard.key, None, "another version of the object", "the shard that was listed", "run again")
    return file


def _fetch(url: str, shard: Shard) -> tuple[pa.NativeFile, str]:
    if shard.size <= IN_MEMORY:
        content, etag = storage.read_version(url, shard.key)
        return pa.BufferReader(content), etag
    with tempfile.TemporaryFile() as file:
        etag = storage.download(url, shard.key, file)
        file.flush()
        return pa.OSFile(f"/proc/self/fd/{file.fileno()}"), etag  # opened anew: it lives on when `file` is closed


def publish_table(url: str, key: str, table: pa.Table) -> None:
    """Publishes a small table as one Parquet object, with page checksums."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    storage.write(url, key, sink.getvalue())


def fetch_table(url: str, key: str) -> pa.Table:
    """A whole Parquet object of our own. Raises FileNotFoundError."""
    return pq.read_table(pa.BufferReader(storage.read(url, key)))


def unreadable(key: str, error: Exception) -> DataError:
    if getattr(error, "errno", None) == errno.ENOSPC:
        folder = tempfile.gettempdir()
        return DataError(
            key, None, f"no space left in {folder}", "room for the largest shards", "free space there, or set TMPDIR; run again"
        )
    # Arrow's messages name byte positions and encodings, not values.
    return DataError(key, None, f"no readable Parquet file ({str(error)[:120]})", "a whole Parquet file", "upload it again")


def read_footer(url: str, shard: Shard) -> pq.FileMetaData:
    """Schema and row count, from the object's tail alone. Raises DataError as `open_shard`."""
    try:
        tail = storage.read_tail(url, shard.key, min(FOOTER_GUESS, shard.size)) if shard.size else b""
        footer = int.from_bytes(tail[-8:-4], "little") + 8  # the format's last bytes: length of the footer, magic
        if len(tail) < footer <= shard.size:
            tail = storage.read_tail(url, shard.key, footer)
        return pq.read_metadata(pa.BufferReader(tail))
    except FileNotFoundError:
        raise DataError(shard.key, None, "no such object", "the shard that was listed", "run again") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise unreadable(shard.key, error) from None


def read_table(url: str, shard: Shard, schema: CohortSchema, beside: Collection[str] = ()) -> pa.Table:
    """The columns that the model needs, checked: footer, subject ids; and of those `beside` them what there is. Raises DataError."""
    file = open_shard(url, shard)
    check_columns(schema, file.schema_arrow, shard.key)
    try:
        table = file.read(list(dict.fromkeys([*schema.columns, *(c for c in beside if c in file.schema_arrow.names)])))
    except (pa.ArrowInvalid, OSError) as error:
        raise unreadable(shard.key, error) from None
    check_values(table, shard.key)
    check_subjects(table.column(schema.subject_id), schema.subject_id, shard.key)
    return table


def check_values(data: pa.Table | pa.RecordBatch, key: str) -> None:
    """Raises DataError where a value is none of its column's type; what Arrow says of it may hold the value."""
    for name, column in zip(data.schema.names, data.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            found = f"values that are no {column.type} (text that is not UTF-8, or numbers out of range)"
            raise DataError(key, name, found, f"valid {column.type}", "write the column anew") from None


def list_widths(url: str, shards: list[Shard], columns: list[str]) -> dict[str, int]:
    """Length of the lists in each column, from the first shard that holds one. Columns without lists are left out."""
    widths: dict[str, int] = {}
    for shard in shards:
        open_columns = [c for c in columns if c not in widths]
        if not open_columns:
            break
        try:
            file = open_shard(url, shard)
            present = [c for c in open_columns if c in file.schema_arrow.names]
            widths |= {c: w for c in present if (w := _width(file, c))}
        except (DataError, pa.ArrowInvalid, OSError):
            continue  # named and set aside when it is checked
    return widths


def _width(file: pq.ParquetFile, column: str) -> int | None:
    kind = storage_type(file.schema_arrow.field(column).type)
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size
    for batch in file.iter_batches(columns=[column]) if is_list(kind) else ():
        lengths = pa.compute.drop_null(pa.compute.list_value_length(batch.column(0)))
        if len(lengths):
            return lengths[0].as_py()
    return None
