"""The main job on real data, with nothing but this machine: a store, a cohort, a run, and a look at the result."""

import io
import os
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from mmimpute import store
from mmimpute.console import console
from mmimpute.data import storage
from mmimpute.data.shards import fetch_table, publish_table
from mmimpute.data.table import table_state
from mmimpute.launch import run_flow, show_run
from mmimpute.population import last_record
from mmimpute.spec import read_config, read_spec

BUCKET = "mmimpute-demo"
SHARDS = 16
RESOURCES = files("mmimpute") / "resources"


def run_demo(home: Path, rows: int) -> int:
    """Returns the exit code of the run."""
    config = prepare(home, rows)
    output = read_config(config).output
    version = table_state(output).version
    code = run_flow(config)
    if code:
        return code
    show_run(output)
    if table_state(output).version == version:
        console.print("everything was done already; nothing was fitted or imputed again")
    show_record(output)
    local = config.with_suffix(".html")
    report = last_record(output)["report_url"]
    local.write_bytes(storage.read(*report.rsplit("/", 1)))
    console.print(f"open the report {local}")
    if rows:
        console.print("note: resampled records are copies, so that no fold is of new people; the accuracy above is not that for new people")
    return 0


def prepare(home: Path, rows: int) -> Path:
    """A running store with the cohort in it, in this process's environment too. Returns the run's configuration."""
    endpoint = store.start(home / "store")
    os.environ.update(endpoint.environment())
    store.create_bucket(endpoint, BUCKET)
    console.print(f"object store    {endpoint.url}  (S3; `mmimpute store stop` ends it)")
    name = f"nhanes2017-{rows}" if rows else "nhanes2017"
    url = f"s3://{BUCKET}/{name}"
    count = put_cohort(f"{url}/shards", rows)
    console.print(f"cohort          {url}/shards  ({count:,} records, {SHARDS} shards: NHANES 2017-2018{', resampled' if rows else ''})")
    return write_config(home, name, url)


def put_cohort(url: str, rows: int) -> int:
    """Puts the cohort into the bucket once, as shards. Returns the number of records."""
    cohort = pq.read_table(io.BytesIO((RESOURCES / "nhanes2017.parquet").read_bytes()))
    cohort = cohort.rename_columns(["subject_id" if c == "patient_id" else c for c in cohort.column_names])
    total = rows or len(cohort)
    if storage.exists(url, f"part-{SHARDS - 1:05d}.parquet"):
        return total
    chosen = np.random.default_rng(0).integers(0, len(cohort), total) if rows else np.arange(total)
    for number, part in enumerate(np.array_split(np.arange(total), SHARDS)):
        table = cohort.take(pa.array(chosen[part]))
        if rows:
            ids = pa.array([f"resampled-{i:09d}" for i in part])
            table = table.set_column(table.column_names.index("subject_id"), "subject_id", ids)
        publish_table(url, f"part-{number:05d}.parquet", table)
    return total


def write_config(home: Path, name: str, url: str) -> Path:
    """The run's configuration and the cohort's spec, for people to read and change."""
    spec = home / "cohort.toml"
    spec.write_bytes((RESOURCES / "nhanes2017.toml").read_bytes())
    config = home / f"{name}.toml"
    lines = [f'{key} = "{value}"' for key, value in {"title": "NHANES 2017-2018", "spec": spec.name}.items()]
    lines += [f'{key} = "{url}/{folder}"' for key, folder in {"shards": "shards", "model": "model", "output": "enriched"}.items()]
    config.write_text("\n".join(lines) + "\n")
    return config


def show_record(url: str) -> None:
    """One public record with its gaps, and what was put there."""
    spec = read_spec(RESOURCES / "nhanes2017.toml")
    key = min(table_state(url).keys)
    row = _with_gaps(fetch_table(url, key), list(spec.modalities))
    table = Table("feature", "observed", "imputed", title="One enriched record (of those features that were missing, and two beside them)")
    for name in spec.modalities:
        features = [c for c in row if c.startswith(f"{name}__") and not c.endswith(("__imputed", "__std"))]
        missing = [c for c in features if row[c] is None]
        for column in [c for c in features if row[c] is not None][:2] + missing[:4]:
            filled = "" if row[column] is not None else f"{row[column + '__imputed']:.2f} ± {row[column + '__std']:.2f}"
            table.add_row(column, "" if row[column] is None else f"{row[column]:.2f}", filled)
    console.print(table)


def _with_gaps(table: pa.Table, modalities: list[str]) -> dict:
    """The first record that lacks two modalities."""
    for row in table.to_pylist():
        absent = [
            m
            for m in modalities
            if all(v is None for c, v in row.items() if c.startswith(f"{m}__") and "__imputed" not in c and "__std" not in c)
        ]
        if len(absent) == 2:
            return row
    return table.slice(0, 1).to_pylist()[0]
