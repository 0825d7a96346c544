"""CSV files as shards of records: one shard per file, every column of one type in all of them."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.types as pt

from mmimpute.data import storage
from mmimpute.data.shards import publish_table
from mmimpute.drafting import subject_of
from mmimpute.errors import DataError, UserError

SUFFIX = re.compile(r"\.csv(\.gz)?$")
COUNTS = re.compile(r"Expected (\d+) columns, got (\d+)")


def to_shards(url: str, output: str, on_progress: Callable[[dict[str, int]], None] = lambda record: None) -> dict[str, Any]:
    """Writes <name>.parquet for each <name>.csv or <name>.csv.gz under a URL. Returns {rows, shards, set_aside: file -> why}.

    Files are read whole, one at a time and twice: types are settled on all of them, since a column may be empty or whole in one. The
    subject id is text, so that 007 stays 007. Raises UserError where there is no file, or two would become one shard.
    """
    keys = [o.key for o in storage.list_objects(url) if SUFFIX.search(o.key)]
    if not keys:
        raise UserError(f"{url}: no file (*.csv, *.csv.gz) under this URL; give the folder or prefix that holds them")
    shards = {SUFFIX.sub(".parquet", key): key for key in keys}
    if len(shards) < len(keys):
        raise UserError(f"{url}: two files have the same name but for .gz; keep one of them")
    schemas, aside = {}, {}
    for key in keys:
        try:
            schemas[key] = _parsed(url, key, {}).schema
        except DataError as error:
            aside[key] = str(error)
    types, rows = common_types(schemas.values()), 0
    for done, (shard, key) in enumerate(((s, k) for s, k in shards.items() if k in schemas), 1):
        table = _parsed(url, key, types)
        publish_table(output, shard, table)
        rows += len(table)
        on_progress({"generated": done, "of": len(schemas), "rows": rows})
    return {"rows": rows, "shards": len(schemas), "set_aside": aside}


def common_types(schemas: Iterable[pa.Schema]) -> dict[str, pa.DataType]:
    """Column -> its type in all files: text if it is text in one, and of the subject id; numbers where there is nothing at all."""
    found: dict[str, list[pa.DataType]] = {}
    subjects = set()
    for schema in schemas:
        subjects.add(subject_of(schema))
        for field in schema:
            found.setdefault(field.name, []).append(field.type)
    return {name: pa.string() if name in subjects else _common(kinds) for name, kinds in found.items()}


def _common(kinds: list[pa.DataType]) -> pa.DataType:
    said = {kind for kind in kinds if not pt.is_null(kind)}
    if len(said) == 1:
        return said.pop()
    if all(pt.is_integer(kind) or pt.is_floating(kind) for kind in said):
        return pa.float64()
    return pa.string()


def _parsed(url: str, key: str, types: Mapping[str, pa.DataType]) -> pa.Table:
    """Raises DataError that quotes nothing of the file."""
    source = pa.input_stream(pa.BufferReader(storage.read(url, key)), compression="gzip" if key.endswith(".gz") else None)
    options = pv.ConvertOptions(column_types=dict(types), strings_can_be_null=True)
    try:
        table = pv.read_csv(source, convert_options=options)
    except (pa.ArrowInvalid, OSError) as error:  # its text holds lines of the file
        counts = COUNTS.search(str(error))
        found = f"a line of {counts[2]} columns under a header of {counts[1]}" if counts else "no readable CSV"
        raise DataError(key, None, found, "comma-separated UTF-8 with one header line", "mend the file") from None
    if odd := [f.name for f in table.schema if pt.is_binary(f.type)]:
        raise DataError(key, odd[0], "text that is not UTF-8", "UTF-8", "convert the file")
    if len(set(table.column_names)) < table.num_columns:
        raise DataError(key, None, "columns of the same name", "each name once in the header", "rename one of them")
    return table
