"""MEDS shards: the events of whole subjects, read and checked; and the folder of a MEDS dataset written.

https://github.com/Medical-Event-Data-Standard/meds (0.4): `data/**/*.parquet`, `metadata/codes.parquet`, `dataset.json`,
`subject_splits.parquet`. A subject is in one file, contiguous there and sorted by time; a null time means at any time.
"""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

import mmimpute
from mmimpute.data import storage
from mmimpute.data.schema import is_text
from mmimpute.data.shards import Shard, check_values, open_shard, publish_table, unreadable
from mmimpute.errors import DataError, UserError
from mmimpute.standards.features import Lookup, read_beside

VERSION = "0.4.1"  # of the format
DATA, SPLITS, TRAIN = "data", "metadata/subject_splits.parquet", "train"
BIRTH, DEATH = "MEDS_BIRTH", "MEDS_DEATH"
STATIC = np.iinfo(np.int64).min  # the time of an event without one
EVENTS = pa.schema(
    [
        pa.field("subject_id", pa.int64(), nullable=False),
        pa.field("time", pa.timestamp("us")),
        pa.field("code", pa.string(), nullable=False),
        pa.field("numeric_value", pa.float32()),
        pa.field("text_value", pa.large_string()),
    ]
)
CODES = pa.schema(
    [pa.field("code", pa.string(), nullable=False), ("description", pa.string()), pa.field("parent_codes", pa.list_(pa.string()))]
)
_TYPES = {
    "subject_id": (pt.is_integer, "whole numbers"),
    "time": (pt.is_timestamp, "timestamps"),
    "code": (is_text, "text"),
    "numeric_value": (lambda kind: pt.is_floating(kind) or pt.is_integer(kind), "numbers"),
}


class Events(NamedTuple):
    """The events of one shard. S subjects, E events, C codes; subjects are contiguous.

    ids: S; subject: E, which of them; time: E, microseconds or STATIC; code: E, which of `codes`; value: E, NaN where there is none.
    """

    ids: np.ndarray
    subject: np.ndarray
    time: np.ndarray
    code: np.ndarray
    codes: pa.Array
    value: np.ndarray

    @property
    def first(self) -> np.ndarray:
        """S: each subject's first event."""
        return np.searchsorted(self.subject, np.arange(len(self.ids)))


def read_events(url: str, shard: Shard) -> Events:
    """Raises DataError, which names shard and column, where it is no MEDS shard."""
    file = open_shard(url, shard)
    columns = _check_columns(file.schema_arrow, shard.key)
    try:
        table = file.read(columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise unreadable(shard.key, error) from None
    check_values(table, shard.key)
    if not len(table):
        raise DataError(shard.key, None, "no events", "at least one", "remove the shard")
    for name in ("subject_id", "code"):
        if nulls := table.column(name).null_count:
            raise DataError(shard.key, name, f"{nulls:,} null values", "none", "drop those events")
    code = table.column("code").cast(pa.large_string()).combine_chunks().dictionary_encode()
    value = _values(table)
    if infinite := int(np.isinf(value).sum()):
        raise DataError(shard.key, "numeric_value", f"{infinite:,} infinite values", "finite numbers or null", "write null where not known")
    ids, subject = _subjects(table.column("subject_id").cast(pa.int64()).to_numpy(), shard.key)
    time = pc.fill_null(table.column("time").cast(pa.timestamp("us"), safe=False).cast(pa.int64()), STATIC).to_numpy()
    if unsorted := int(((time[1:] < time[:-1]) & (subject[1:] == subject[:-1])).sum()):
        raise DataError(
            shard.key, "time", f"{unsorted:,} events before the one above them", "each subject's sorted, null times first", "sort the shard"
        )
    return Events(ids, subject, time, code.indices.to_numpy(), code.dictionary.cast(pa.string()), value)


def _values(table: pa.Table) -> np.ndarray:
    """As the float32 that MEDS has, for which a float64 may be too large."""
    if "numeric_value" not in table.column_names:
        return np.full(len(table), np.nan)
    return table.column("numeric_value").cast(pa.float32(), safe=False).to_numpy().astype(float)


def _check_columns(arrow: pa.Schema, key: str) -> list[str]:
    for name, (right, wanted) in _TYPES.items():
        if name not in arrow.names:
            if name == "numeric_value":
                continue
            raise DataError(key, name, "no such column", f"a MEDS shard's, {wanted}", "write it, or leave the file out")
        kind = arrow.field(name).type
        if not right(kind.value_type if pt.is_dictionary(kind) else kind):
            raise DataError(key, name, f"type {kind}", wanted, "convert the column")
    return [name for name in _TYPES if name in arrow.names]


def _subjects(column: np.ndarray, key: str) -> tuple[np.ndarray, np.ndarray]:
    """The subjects in the order in which they come, and which of them each event is of."""
    begins = np.concatenate([[True], column[1:] != column[:-1]])
    ids = column[begins]
    if twice := len(ids) - len(np.unique(ids)):
        raise DataError(key, "subject_id", f"{twice:,} subjects in several places", "all events of one together", "sort the shard")
    return ids, np.cumsum(begins) - 1


class Splits(NamedTuple):
    """Which split a subject is in. place: of each row, the number of its name."""

    subjects: Lookup
    place: np.ndarray
    names: list[str]
    etag: str

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The number of each subject's split; subjects in none have the last one."""
        row = self.subjects.rows(ids)
        return np.where(row >= 0, self.place[row], len(self.names) - 1)


UNASSIGNED = "unassigned"


def read_splits(url: str) -> Splits | None:
    """The dataset's splits, None where it has none. Raises UserError where the file is not as MEDS has it."""
    if not storage.exists(url, SPLITS):
        return None
    table, etag = read_beside(storage.join(url, SPLITS))
    if {"subject_id", "split"} - set(table.column_names) or any(table.column(n).null_count for n in ("subject_id", "split")):
        raise UserError(f"{url}/{SPLITS}: needs columns subject_id and split without nulls")
    split = table.column("split").cast(pa.string()).combine_chunks().dictionary_encode()
    names = split.dictionary.to_pylist()
    if bad := [n for n in names if not n or "/" in n or n[0] in "._"]:
        raise UserError(f"{url}/{SPLITS}: a split named {bad[0]!r} can be no folder; rename it")
    ids = table.column("subject_id").cast(pa.int64()).to_numpy()
    if len(np.unique(ids)) != len(ids):
        raise UserError(f"{url}/{SPLITS}: a subject is there twice; each is in one split")
    return Splits(Lookup.of(ids), split.indices.to_numpy(), [*names, UNASSIGNED], etag)


def publish_events(url: str, key: str, events: pa.Table) -> None:
    """One shard of `data/`, its events sorted already."""
    publish_table(storage.join(url, DATA), key, events.select(EVENTS.names).cast(EVENTS))


def publish_metadata(
    url: str, name: str, codes: Iterable[tuple[str, str | None, list[str] | None]], beside: list[str] | None = None
) -> None:
    """codes: (code, description, parent codes) of every code in the data; beside: columns of the data that MEDS does not know."""
    columns = [list(c) for c in zip(*sorted(codes, key=lambda c: c[0]), strict=True)] or [[], [], []]
    publish_table(storage.join(url, "metadata"), "codes.parquet", pa.table(columns, schema=CODES))
    told = {"dataset_name": name, "etl_name": "mmimpute", "etl_version": mmimpute.__version__, "meds_version": VERSION}
    told |= {"other_extension_columns": beside} if beside else {}
    told["created_at"] = datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="seconds")
    storage.write(storage.join(url, "metadata"), "dataset.json", json.dumps(told, indent=1).encode())


def check_empty(url: str) -> None:
    """Raises UserError where a place holds a dataset already, of which shards could be left over."""
    if (storage.is_s3(url) or storage.local_path(url).exists()) and next(storage.objects(url, retry=storage.PROMPT), None):
        raise UserError(f"{url}: holds something already; give an empty place")
