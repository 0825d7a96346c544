"""The runs that made a table: what each did, from what it left under `<output>/_runs` and in the table's log."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmimpute.data import storage, table
from mmimpute.data.shards import Shard, read_footer
from mmimpute.errors import UserError

READERS = 16


class Run(NamedTuple):
    """One run. name: of its record, or of its commit where it imputed nothing; version: of the table, None if never committed.

    did: rows, retries, seconds and lineage, as its record says; empty where it imputed nothing.
    """

    name: str
    started: str
    version: int | None
    did: dict[str, Any]
    lineage: dict[str, Any]


def list_runs(output: str) -> list[Run]:
    """Newest first. Raises UserError where there is neither a table nor a record of a run."""
    commits = {c["lineage"].get("run") or f"version-{c['version']}": c for c in table.history(output)}
    places = _records(output)
    with ThreadPoolExecutor(READERS) as pool:
        records = dict(zip((p.key for p in places), pool.map(lambda p: _did(output, p), places), strict=True))
    if not commits and not records:
        raise UserError(f"{output}: no run left anything there; give the URL that `mmimpute impute --output` wrote to")
    found = [_run(name, records.get(name, {}), commits.get(name)) for name in commits.keys() | records.keys()]
    return sorted(found, key=lambda run: run.started, reverse=True)


def _records(output: str) -> list[Shard]:
    place = storage.join(output, "_runs")
    if not storage.is_s3(place) and not storage.local_path(place).exists():
        return []
    return [Shard(*o) for o in storage.list_objects(place, ".parquet") if o.key.startswith("impute-")]


def _did(output: str, place: Shard) -> dict:
    return json.loads(read_footer(storage.join(output, "_runs"), place).metadata[b"mmimpute.run"])


def _run(name: str, did: dict, commit: dict | None) -> Run:
    started = did.get("started") or commit["time"].isoformat()
    return Run(name.removesuffix(".parquet"), started[:19], commit and commit["version"], did, commit["lineage"] if commit else did)


def show_run(output: str, name: str) -> tuple[Run, pa.Table | None]:
    """A run and what it did to each shard (see `metrics.SCHEMA`), slowest first; None where it imputed nothing.

    Raises UserError where there is no such run.
    """
    runs = {run.name: run for run in list_runs(output)}
    if name not in runs:
        raise UserError(f"{output}: no run {name!r}; `mmimpute runs --output {output}` lists them")
    if not runs[name].did:
        return runs[name], None
    shards = pq.read_table(io.BytesIO(storage.read(storage.join(output, "_runs"), f"{name}.parquet")))
    seconds = [shards[c] for c in shards.column_names if c.startswith("seconds_")]
    total = seconds[0]
    for part in seconds[1:]:
        total = pc.add(total, part)
    return runs[name], shards.append_column("seconds", total).sort_by([("seconds", "descending")])
