"""What is imputed of an enriched table, as a MEDS dataset of its own: nothing that was observed is in it.

A value is an event `MMIMPUTE//<modality>//<feature>` at the index time of its record, with its standard deviation in the column `std`
beside MEDS's own. So whoever reads the events together with the measured ones can tell them apart by their code.
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmimpute.data import storage
from mmimpute.data.schema import CohortSchema, Modality, is_time
from mmimpute.data.shards import IN_MEMORY, Shard, open_shard, unreadable
from mmimpute.data.table import published, snapshot
from mmimpute.errors import UserError
from mmimpute.exporting import INTEGERS, TIME
from mmimpute.standards.features import VALUES
from mmimpute.standards.meds import DATA, EVENTS, check_empty, publish_metadata
from mmimpute.verifying import cells

PREFIX = "MMIMPUTE//"
IMPUTED = EVENTS.append(pa.field("std", pa.float32()))
BATCH = 2048  # records at a time
THREADS = 4  # objects at a time
MEANING = {"binary": "probability", "categorical": "most probable level"}  # of what is imputed; else the predictive mean


def export(schema: CohortSchema, output: str, to: str) -> dict:
    """Exports the table's newest version to an empty place.

    Returns {version, objects, rows, undated (records without an index time, left out), events, codes}.
    Raises UserError where there is no table, it was made by another model, or its records are none of MEDS; DataError for a bad object.
    """
    table = snapshot(output)
    modalities = [m for m in schema.imputed if not m.structured]
    _check(schema, modalities, table.columns, output)
    check_empty(to)
    objects = [o for o in published(output) if o.key in table.committed_at]
    with ThreadPoolExecutor(THREADS) as pool:
        told = list(pool.map(partial(_export_object, schema, modalities, output, to), objects))
    seen = set().union(*(codes for _, codes in told))
    known = [entry for m in modalities for entry in _codes(m) if entry[0] in seen]
    publish_metadata(to, "imputed values", known, ["std"])
    counts = {name: sum(found[name] for found, _ in told) for name in ("rows", "undated", "events")}
    return {"version": table.version, "objects": len(objects), **counts, "codes": len(known)}


def _check(schema: CohortSchema, modalities: list[Modality], columns: pa.Schema, output: str) -> None:
    if schema.subject_type not in INTEGERS:
        raise UserError(f"{output}: subject ids are {schema.subject_type}; those of MEDS are whole numbers")
    if schema.timestamp is None:
        raise UserError(f"{output}: the cohort has no timestamp; imputed values without a time would count as known at any time")
    if absent := [c for c in _columns(schema, modalities) if c not in columns.names]:
        raise UserError(f"{output}: the table has no column {absent[0]!r}; give the model that imputed it")
    if not is_time(kind := columns.field(schema.timestamp).type):
        raise UserError(f"{output}: column {schema.timestamp!r} is {kind}; expected dates or timestamps")


def _columns(schema: CohortSchema, modalities: list[Modality]) -> list[str]:
    return [schema.subject_id, schema.timestamp, *(c + s for m in modalities for c in m.columns for s in ("", "__imputed", "__std"))]


def code_of(modality: Modality, feature: str) -> str:
    return f"{PREFIX}{modality.name}//{feature}"


def _codes(modality: Modality) -> list[tuple[str, str, list[str] | None]]:
    """Code, description and parent codes of every feature: of one that `mmimpute ingest meds` made, the code that it is about."""
    entries = []
    for feature in modality.features:
        told = f"{feature.name} of {modality.name}, imputed: {MEANING.get(feature.kind, 'predictive mean')}; not measured"
        parent, _, value = feature.name.rpartition("//")
        entries.append((code_of(modality, feature.name), told, [parent] if parent and value in VALUES else None))
    return entries


def _export_object(schema: CohortSchema, modalities: list[Modality], output: str, to: str, shard: Shard) -> tuple[dict, set[str]]:
    """Publishes the events of one object of the table, if it has any. Returns counts, and the codes that came."""
    file = open_shard(output, shard)
    counts, codes = {"rows": file.metadata.num_rows, "undated": 0, "events": 0}, set()
    with tempfile.SpooledTemporaryFile(IN_MEMORY) as sink:
        with pq.ParquetWriter(sink, IMPUTED, compression="zstd", write_page_checksum=True) as writer:
            try:
                for batch in file.iter_batches(BATCH, columns=_columns(schema, modalities)):
                    dated = batch.filter(batch.column(schema.timestamp).is_valid())
                    events = imputed_events(dated, schema, modalities)
                    counts["undated"] += len(batch) - len(dated)
                    counts["events"] += len(events)
                    codes.update(pc.unique(events["code"]).to_pylist())
                    writer.write_table(events)
            except (pa.ArrowInvalid, OSError) as error:
                raise unreadable(shard.key, error) from None
        sink.seek(0)
        if counts["events"]:
            storage.write(storage.join(to, DATA), shard.key, sink)
    return counts, codes


def imputed_events(batch: pa.RecordBatch, schema: CohortSchema, modalities: list[Modality]) -> pa.Table:
    """One event per value that is missing in the record and was imputed, sorted by subject and code."""
    ids = batch.column(schema.subject_id).cast(pa.int64())
    times = batch.column(schema.timestamp).cast(pa.timestamp("us"), safe=False).cast(TIME).cast(pa.timestamp("us"))
    parts = [IMPUTED.empty_table()]
    for modality in modalities:
        width = len(modality.features) if modality.layout == "list" else 1
        for number, column in enumerate(modality.columns):
            before, after, std = (cells(batch.column(column + s), width) for s in ("", "__imputed", "__std"))
            row, at = np.nonzero(before.missing & ~after.missing)
            values, names = after.values[row, at], [code_of(modality, f.name) for f in modality.features[number : number + width]]
            text = values.dtype == object
            found = {
                "subject_id": ids.take(pa.array(row)),
                "time": times.take(pa.array(row)),
                "code": pa.array(names, pa.string()).take(pa.array(at)),
                "numeric_value": pa.nulls(len(row), pa.float32()) if text else pa.array(values.astype(np.float32)),
                "text_value": pa.array(values, pa.large_string()) if text else pa.nulls(len(row), pa.large_string()),
                "std": pa.array(std.values[row, at].astype(np.float32)),
            }
            parts.append(pa.table(found, schema=IMPUTED))
    return pa.concat_tables(parts).sort_by([("subject_id", "ascending"), ("code", "ascending")])
