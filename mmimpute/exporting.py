"""A version of the enriched table as features: complete values of every record, under a prefix of their own.

Why a copy. A file source of Feast is one path, and everything under it that is Parquet is read: in the table's folder that is also
earlier versions and what runs left that died. A list of files is no source. Its Delta source needs DuckDB extensions that are
downloaded at run time; and to any of them `X__imputed` is null where nothing of a modality was missing, while features must be complete.
So the objects of a version are copied once, each to the key that it has in the table,

    <table>/_features/v000012-<digest of the columns>/

which readers of the table do not see. What is there is not written again; what stopped half-way is completed by the next call.
"""

import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmimpute.data import storage
from mmimpute.data.schema import LATENT, CohortSchema, is_list, is_time
from mmimpute.data.shards import IN_MEMORY, Shard, open_shard, unreadable
from mmimpute.data.table import Snapshot, digest, published, snapshot
from mmimpute.errors import DataError, UserError

FOLDER = "_features"
EVENT_TIME, CREATED = "event_timestamp", "created_timestamp"
TIME = pa.timestamp("us", "UTC")
BATCH = 8192  # records at a time
THREADS = 4  # objects at a time
INTEGERS = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"}


class View(NamedTuple):
    """A group of features, as Feast has them: what is imputed of a modality, its uncertainty, or the latent."""

    name: str
    fields: tuple[pa.Field, ...]


class Features(NamedTuple):
    """What one version of a table has for a feature store. url: where its export is."""

    url: str
    version: int
    subject: pa.Field
    timestamp: str | None
    views: tuple[View, ...]

    @property
    def arrow(self) -> pa.Schema:
        """Columns of the export."""
        return _arrow(self.subject, self.views)


def features_of(schema: CohortSchema, output: str, table: Snapshot) -> Features:
    """Raises UserError where the table lacks what a model of this schema imputes."""
    views = tuple(
        View(f"{m.name}_{suffix}", tuple(_field(table.columns, f"{c}__{suffix}", output) for c in m.columns))
        for m in schema.imputed
        if not m.structured  # no features: z0 tells of images and signals
        for suffix in ("imputed", "std")
    )
    if LATENT in table.columns.names:
        views += (View(LATENT, (_field(table.columns, LATENT, output),)),)
    subject = pa.field(schema.subject_id, pa.int64() if schema.subject_type in INTEGERS else pa.string())
    columns = digest(str(_arrow(subject, views)), schema.timestamp or "")[:8]
    url = storage.join(output, f"{FOLDER}/v{table.version:06d}-{columns}")
    return Features(url, table.version, subject, schema.timestamp, views)


def _field(columns: pa.Schema, name: str, output: str) -> pa.Field:
    if name not in columns.names:
        raise UserError(f"{output}: the table has no column {name!r}; give the model that imputed it")
    kind = columns.field(name).type
    return pa.field(name, pa.list_(kind.value_type) if is_list(kind) else kind)


def _arrow(subject: pa.Field, views: tuple[View, ...]) -> pa.Schema:
    times = [pa.field(name, TIME) for name in (EVENT_TIME, CREATED)]
    return pa.schema([subject, *times, *(f for view in views for f in view.fields)])


def export(schema: CohortSchema, output: str) -> tuple[Features, dict]:
    """Exports the table's newest version, unless that is done.

    Returns what it has and {objects, written, rows, undated}: of `rows` records in the objects written now, `undated` have no event
    time and are left out. Raises UserError where there is no table or it was made by another model, DataError for a damaged object.
    """
    table = snapshot(output)
    features = features_of(schema, output, table)
    objects = [o for o in published(output) if o.key in table.committed_at]
    if lost := len(table.committed_at) - len(objects):
        raise UserError(f"{output}: {lost} objects of the table are not in storage; `mmimpute verify` names them")
    done = {o.key for o in published(features.url)}
    todo = [o for o in objects if o.key not in done]
    with ThreadPoolExecutor(THREADS) as pool:
        counts = list(pool.map(partial(_export_object, output, features, table.committed_at), todo))
    rows, undated = map(sum, zip(*counts, strict=True)) if counts else (0, 0)
    return features, {"objects": len(objects), "written": len(todo), "rows": rows, "undated": undated}


def _export_object(output: str, features: Features, committed_at: Mapping[str, datetime], shard: Shard) -> tuple[int, int]:
    """Publishes one object of the export. Returns its records, and how many of them have no event time."""
    file, out = open_shard(output, shard), features.arrow
    columns = _columns(file.schema_arrow, features, shard.key)
    kept = 0
    with tempfile.SpooledTemporaryFile(IN_MEMORY) as sink:
        with pq.ParquetWriter(sink, out, compression="zstd", write_page_checksum=True) as writer:
            try:
                for batch in file.iter_batches(BATCH, columns=columns):
                    made = complete(batch, features, committed_at[shard.key])
                    kept += len(made)
                    writer.write_batch(made)
            except OSError as error:
                raise unreadable(shard.key, error) from None
        sink.seek(0)
        storage.write(features.url, shard.key, sink)
    return file.metadata.num_rows, file.metadata.num_rows - kept


def _columns(arrow: pa.Schema, features: Features, key: str) -> list[str]:
    """What must be read of an enriched shard. Raises DataError where that is not there, or its event times are none."""
    names = [f.name for view in features.views for f in view.fields if f.name != LATENT]
    wanted = [features.subject.name, *dict.fromkeys(n.rpartition("__")[0] for n in names), *names]
    if features.timestamp:
        wanted.append(features.timestamp)
        if features.timestamp in arrow.names and not is_time(kind := arrow.field(features.timestamp).type):
            raise DataError(
                key, features.timestamp, f"type {kind}", "dates or timestamps", "convert the column in its input and impute again"
            )
    if absent := [n for n in wanted if n not in arrow.names]:
        raise DataError(key, absent[0], "no such column", "what the spec and the model name", "impute its input shard anew with this model")
    return wanted + [LATENT] * (LATENT in arrow.names)


def complete(batch: pa.RecordBatch, features: Features, committed_at: datetime) -> pa.RecordBatch:
    """Records of an enriched shard as features: null nowhere but in a `z0` that was not written.

    The event time is the record's own, in UTC; in a cohort without one it is when the record came into the table. Records whose
    event time is null are left out.
    """
    created = pa.repeat(pa.scalar(committed_at, TIME), len(batch))
    times = _times(batch.column(features.timestamp)) if features.timestamp else created
    columns = [_cast(batch.column(features.subject.name), features.subject.type), times, created]
    columns += [_feature(batch, f) for view in features.views for f in view.fields]
    return pa.RecordBatch.from_arrays(columns, schema=features.arrow).filter(times.is_valid())


def _times(array: pa.Array) -> pa.Array:
    return array.cast(pa.timestamp("us"), safe=False).cast(TIME)  # from a zone of its own: the same moment


def _feature(batch: pa.RecordBatch, field: pa.Field) -> pa.Array:
    """A completed column. Where the enriched shard has null nothing was missing: the observed value, and a deviation of 0."""
    if field.name == LATENT:
        return _cast(batch.column(LATENT), field.type) if LATENT in batch.schema.names else pa.nulls(len(batch), field.type)
    column, _, suffix = field.name.rpartition("__")
    observed = _storage(batch.column(column))
    return pc.coalesce(
        _cast(batch.column(field.name), field.type), _cast(observed, field.type) if suffix == "imputed" else _zero(observed, field.type)
    )


def _zero(observed: pa.Array, kind: pa.DataType) -> pa.Scalar:
    if not is_list(kind):
        return pa.scalar(0, kind)
    return pa.scalar([0] * (pc.max(pc.list_value_length(observed)).as_py() or 0), kind)


def _storage(array: pa.Array) -> pa.Array:
    """A column without its extension type (a tensor) and its dictionary."""
    array = array.storage if isinstance(array, pa.ExtensionArray) else array
    return array.dictionary_decode() if isinstance(array, pa.DictionaryArray) else array


def _cast(array: pa.Array, kind: pa.DataType) -> pa.Array:
    return _storage(array).cast(kind, safe=False)  # whole numbers beyond 2^53 are rounded, as in the enriched shard
