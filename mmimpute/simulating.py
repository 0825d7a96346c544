"""A simulated cohort in storage: its spec, its shards, and beside them what is true. Plain functions."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

import mmimpute
from mmimpute.data import storage
from mmimpute.data.shards import publish_table
from mmimpute.errors import UserError
from mmimpute.simulation import Population

SPEC, SHARDS, TRUTH = "cohort.toml", "shards", "truth"


def write_cohort(
    population: Population, output: str, rows: int, shard_rows: int, truth: bool, on_shard: Callable[[dict], None] = lambda _: None
) -> dict:
    """Writes the spec and those shards that are not there yet; truth: also the complete values and z0 of every record.

    Returns {shards, done_before, rows}. Raises UserError where the place holds anything but a part of this cohort.
    """
    names = [f"part-{number:05d}.parquet" for number in range(-(-rows // shard_rows))]
    folders = [SHARDS, TRUTH] if truth else [SHARDS]
    done = _claim(output, spec_toml(population, rows, shard_rows))
    todo = [number for number, name in enumerate(names) if not {f"{folder}/{name}" for folder in folders} <= done]
    written = 0
    for count, number in enumerate(todo, 1):
        tables = _tables(population, number, rows, shard_rows)
        for folder in folders:
            publish_table(storage.join(output, folder), names[number], tables[folder])
        written += len(tables[SHARDS])
        on_shard({"generated": count, "of": len(todo), "rows": written})
    return {"shards": len(names), "done_before": len(names) - len(todo), "rows": rows}


def _claim(output: str, spec: str) -> set[str]:
    """Publishes the spec, by which a later run knows the cohort; the keys of what an earlier run of just this one left."""
    there = storage.is_s3(output) or storage.local_path(output).exists()
    keys = {o.key for o in storage.list_objects(output, retry=storage.PROMPT)} if there else set()
    if keys and (SPEC not in keys or storage.read(output, SPEC).decode() != spec):
        raise UserError(f"{output}: holds something else than this cohort; give an empty place, or the settings that {SPEC} there names")
    storage.write(output, SPEC, spec.encode())
    return keys


def spec_toml(population: Population, rows: int, shard_rows: int) -> str:
    """The cohort's spec; a comment holds all that the cohort follows from."""
    lines = [
        f"# {rows} simulated records in shards of {shard_rows}. Their truth, with mmimpute {mmimpute.__version__}:",
        f"# mmimpute.simulation.{population}",
        'subject_id = "subject_id"',
    ]
    for m in population.modalities:
        lines += ["", f"[modalities.{m.name}]", f'column = "{m.name}"', f'kinds = "{m.kind}"']
    return "\n".join(lines) + "\n"


def _tables(population: Population, number: int, rows: int, shard_rows: int) -> dict[str, pa.Table]:
    """One shard as it is observed and as it is."""
    complete, observed = next(population.shards(rows, shard_rows, start=number))
    size, first = len(complete["vitals"]), number * shard_rows + 1
    state_N, latent_NH = population.latents(shard_rows, population.shard_seed(number))
    ids = {"subject_id": pa.array([f"simulated-{population.seed}-{n:09d}" for n in range(first, first + size)])}
    latent = {"z0__state": pa.array(state_N[:size]), "z0__s": _lists(latent_NH[:size, : population.shared])}
    values = {m.name: complete[m.name] if m.kind == "real" else complete[m.name].astype(np.uint8) for m in population.modalities}
    metadata = {"mmimpute.version": mmimpute.__version__, "mmimpute.synthetic": "true", "mmimpute.population": repr(population)}
    tables = {
        SHARDS: pa.table(ids | {name: _lists(x, observed[name]) for name, x in values.items()}),
        TRUTH: pa.table(ids | latent | {name: _lists(x) for name, x in values.items()}),
    }
    return {folder: table.replace_schema_metadata(metadata) for folder, table in tables.items()}


def _lists(x: np.ndarray, observed: np.ndarray | None = None) -> pa.Array:
    """N x D values as lists; null where nothing of a record is observed, and null elements for what is missing in the others."""
    if observed is None:
        return pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])
    values = pa.array(x.reshape(-1), mask=~observed.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, x.shape[1], mask=pa.array(~observed.any(1)))
