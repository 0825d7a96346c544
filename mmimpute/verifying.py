"""One enriched shard held against its input, as the output contract says. A plain function; the cluster only calls it.

What is missing is read off the Arrow columns here, not by the code that decoded and enriched them. Bounds, draws and z0
are not looked at. What is found wrong is told in columns and counts, never in values.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from mmimpute.data.arrow import enriched_schema
from mmimpute.data.schema import FROM_PRIOR, CohortSchema, Modality, check_columns, is_list, is_text
from mmimpute.data.shards import Shard, open_shard, unreadable
from mmimpute.data.table import source, source_of
from mmimpute.errors import DataError

BATCH = 8192  # records compared at a time
BITS = {16: pa.uint16(), 32: pa.uint32(), 64: pa.uint64()}


class Pair(NamedTuple):
    """An input shard and its output."""

    key: str
    etag: str
    size: int
    output: str
    output_etag: str
    output_size: int


class Cells(NamedTuple):
    """A column's values, N x D (float64, or text as objects), and which of them are null or NaN."""

    values: np.ndarray
    missing: np.ndarray


def pairs_of(listed: Iterable[Shard], committed: Iterable[str], stored: Iterable[Shard]) -> tuple[list[Pair], dict[str, list[str]]]:
    """Every input shard that has one output, with it; and, by shard or output, what is wrong with the others.

    committed: keys in the table. stored: the objects that there are.
    """
    objects, by_source = {o.key: o for o in stored}, {}
    for key in sorted(committed):
        by_source.setdefault(source_of(key), []).append(key)
    pairs, problems = [], {}
    for shard in listed:
        found = by_source.pop(source(shard.key), [])
        if len(found) != 1:
            problems[shard.key] = [f"{len(found)} outputs in the table; expected one"]
        elif found[0] not in objects:
            problems[shard.key] = ["its output is in the table, but not in storage"]
        else:
            pairs.append(Pair(*shard, *objects[found[0]]))
    gone = "its input is gone; `mmimpute impute --prune` takes it out of the table"
    return pairs, problems | {key: [gone] for keys in by_source.values() for key in keys}


def verify_shard(schema: CohortSchema, shards: str, pair: Pair, output: str) -> dict:
    """Returns {shard, rows, problems}; problems is empty where the output is as it has to be."""
    status = {"shard": pair.key, "rows": 0}
    try:
        given, made = open_shard(shards, Shard(*pair[:3])), open_shard(output, Shard(*pair[3:]))
        check_columns(schema, given.schema_arrow, pair.key)
        problems = _lineage_problems(made, pair)
        if layout := _layout_problems(schema, given, made):
            return status | {"problems": problems + layout}
        found: Counter[str] = Counter()
        for before, after in _together(_batches(given, pair.key), _batches(made, pair.output)):
            found.update(input_problems(before, after))
            found.update(imputed_problems(schema, before, after))
    except DataError as error:
        return status | {"problems": [str(error)]}
    except pa.ArrowNotImplementedError as error:  # a list of views, for one; it names types, no values
        return status | {"problems": [f"a column of a type that cannot be compared ({error})"]}
    return status | {"rows": given.metadata.num_rows, "problems": problems + [f"{n:,} {what}" for what, n in found.items() if n]}


def _lineage_problems(made: pq.ParquetFile, pair: Pair) -> list[str]:
    metadata = made.metadata.metadata or {}
    wanted = {b"mmimpute.input": (pair.key, "shard"), b"mmimpute.input_etag": (pair.etag, "version of its input")}
    return [f"made from another {what}" for name, (value, what) in wanted.items() if metadata.get(name) != value.encode()]


def _layout_problems(schema: CohortSchema, given: pq.ParquetFile, made: pq.ParquetFile) -> list[str]:
    found, wanted = made.schema_arrow, enriched_schema(schema, given.schema_arrow, interval=False, draws=0, latent=False)
    problems = [f"no column {f.name!r}" for f in wanted if f.name not in found.names]
    problems += [
        f"column {f.name!r} is {found.field(f.name).type}; expected {f.type}"
        for f in wanted
        if f.name in found.names and found.field(f.name).type != f.type
    ]
    if given.metadata.num_rows != made.metadata.num_rows:
        problems.append(f"{made.metadata.num_rows:,} rows; expected {given.metadata.num_rows:,}")
    return problems


def _batches(file: pq.ParquetFile, key: str) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(BATCH)
    except (pa.ArrowInvalid, OSError) as error:
        raise unreadable(key, error) from None


def _together(left: Iterator[pa.RecordBatch], right: Iterator[pa.RecordBatch]) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]:
    """Batches of both that hold the same rows, however the files cut theirs."""
    a, b = next(left, None), next(right, None)
    while a is not None and b is not None:
        rows = min(len(a), len(b))
        yield a.slice(0, rows), b.slice(0, rows)
        a = a.slice(rows) if rows < len(a) else next(left, None)
        b = b.slice(rows) if rows < len(b) else next(right, None)


def input_problems(before: pa.RecordBatch, after: pa.RecordBatch) -> dict[str, int]:
    """Rows of each input column that are not as they were."""
    names = before.schema.names
    return {f"rows of {c!r} differ from the input": int(differing(before.column(c), after.column(c)).sum()) for c in names}


def differing(a: pa.Array, b: pa.Array) -> np.ndarray:
    """Which rows of two arrays of one type differ: floats by their bits, but a NaN is like any other."""
    if isinstance(a.type, pa.BaseExtensionType):
        return differing(a.storage, b.storage)
    if pt.is_dictionary(a.type):
        return differing(a.dictionary_decode(), b.dictionary_decode())
    if pt.is_string_view(a.type) or pt.is_binary_view(a.type):
        return differing(a.cast(pa.large_binary()), b.cast(pa.large_binary()))  # what follows knows no views
    present = [x.is_valid().to_numpy(zero_copy_only=False) for x in (a, b)]
    both, differ = present[0] & present[1], present[0] != present[1]
    if both.any():
        differ[both] = _values_differ(a.filter(pa.array(both)), b.filter(pa.array(both)))
    return differ


def _values_differ(a: pa.Array, b: pa.Array) -> np.ndarray:
    """The same of arrays without nulls."""
    if pt.is_map(a.type):
        entries = pa.list_(pa.struct([("key", a.type.key_type), ("value", a.type.item_type)]))
        a, b = a.cast(entries), b.cast(entries)
    if is_list(a.type):
        return _lists_differ(a, b)
    if pt.is_struct(a.type):
        return np.logical_or.reduce([differing(a.field(i), b.field(i)) for i in range(a.type.num_fields)])
    if pt.is_floating(a.type):
        x, y = (v.view(BITS[v.type.bit_width]).to_numpy() for v in (a, b))
        return (x != y) & ~(np.isnan(a.to_numpy()) & np.isnan(b.to_numpy()))
    return pc.not_equal(a, b).to_numpy(zero_copy_only=False)


def _lists_differ(a: pa.Array, b: pa.Array) -> np.ndarray:
    lengths, others = (pc.list_value_length(x).to_numpy(zero_copy_only=False) for x in (a, b))
    differ = lengths != others
    a, b = (x.filter(pa.array(~differ)) for x in (a, b))
    rows = np.repeat(np.flatnonzero(~differ), lengths[~differ])
    differ[rows[differing(a.flatten(), b.flatten())]] = True
    return differ


def imputed_problems(schema: CohortSchema, before: pa.RecordBatch, after: pa.RecordBatch) -> dict[str, int]:
    """What the added columns say that the input columns do not allow, with how often."""
    records = {m.name: [cells(before.column(c), _width(m)) for c in m.columns] for m in schema.modalities}
    problems: dict[str, int] = {}
    for modality in schema.imputed:
        lacks = np.logical_or.reduce([x.missing.any(1) for x in records[modality.name]])
        for column, x in zip(modality.columns, records[modality.name], strict=True):
            problems |= _column_problems(column, x, lacks, after, _width(modality))
    nothing = np.logical_and.reduce([x.missing.all(1) for columns in records.values() for x in columns])
    marked = after.column(FROM_PRIOR).to_numpy(zero_copy_only=False)
    return problems | {f"rows have a wrong {FROM_PRIOR!r}": int((marked != nothing).sum())}


def _width(modality: Modality) -> int:
    return len(modality.features) if modality.layout == "list" else 1


def _column_problems(column: str, x: Cells, lacks: np.ndarray, after: pa.RecordBatch, width: int) -> dict[str, int]:
    """lacks: rows on which something of the modality is missing."""
    names = [column + suffix for suffix in ("__imputed", "__std")]
    imputed, std = (cells(after.column(name), width) for name in names)
    seen, wanted = lacks[:, None] & ~x.missing, lacks[:, None] & x.missing
    counts = {
        f"missing values are left in {names[0]!r}": lacks[:, None] & imputed.missing,
        f"observed values are altered in {names[0]!r}": seen & ~imputed.missing & (imputed.values != x.values),
        f"observed values have no 0 in {names[1]!r}": seen & (std.values != 0),
        f"imputed values have no deviation in {names[1]!r}": wanted & ~(std.values >= 0),
    }
    for name in names:
        counts[f"rows that miss nothing are not null in {name!r}"] = ~lacks & after.column(name).is_valid().to_numpy(zero_copy_only=False)
    return {what: int(at.sum()) for what, at in counts.items()}


def cells(array: pa.Array, width: int) -> Cells:
    """A list column's values, or a scalar column's as N x 1; a list of another length counts as missing."""
    if isinstance(array.type, pa.BaseExtensionType):
        return cells(array.storage, width)
    if pt.is_dictionary(array.type):
        return cells(array.dictionary_decode(), width)
    if is_text(array.type):
        text = array.cast(pa.large_string()).to_numpy(zero_copy_only=False)
        return Cells(text[:, None], array.is_null().to_numpy(zero_copy_only=False)[:, None])
    if not is_list(array.type):
        values = _numbers(array)[:, None]
        return Cells(values, np.isnan(values))
    right = pc.fill_null(pc.equal(pc.list_value_length(array), width), False)
    values = np.full((len(array), width), np.nan)
    values[right.to_numpy(zero_copy_only=False)] = _numbers(array.filter(right).flatten()).reshape(-1, width)
    return Cells(values, np.isnan(values))


def _numbers(array: pa.Array) -> np.ndarray:
    """As float64, NaN for null. Whole numbers beyond 2^53 are rounded, as in what is written of them."""
    array = array.cast(pa.uint8()) if pt.is_boolean(array.type) else array
    return array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
