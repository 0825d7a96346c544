"""Synthetic records: one shard of draws from the model, in the schema of the cohort. A plain function."""

import pyarrow as pa
import torch

import mmimpute
from mmimpute.data.arrow import in_columns
from mmimpute.data.shards import publish_table
from mmimpute.registry import Model

SHARD_ROWS = 50_000
BATCH_VALUES = 1 << 25  # drawn at a time


def shard_name(seed: int, number: int) -> str:
    return f"synthetic-{seed}-{number:05d}.parquet"


def generate_shard(model: Model, output: str, number: int, rows: int, seed: int) -> dict:
    """Publishes shard `number` of a synthetic cohort; the same arguments write the same values.

    Subject ids say what they are: `synthetic-<seed>-<n>`, or negative where the cohort's ids are integers.
    """
    first = number * SHARD_ROWS
    generator = torch.Generator(model.module.device).manual_seed((seed << 32) + number)
    size = max(1, BATCH_VALUES // model.schema.width)
    parts = [_columns(model, min(size, rows - start), generator) for start in range(0, rows, size)]
    subjects = _subjects(model.schema.subject_type, first, rows, seed)
    table = pa.concat_tables(parts).add_column(0, model.schema.subject_id, subjects)
    metadata = {"mmimpute.version": mmimpute.__version__, "mmimpute.model": model.digest, "mmimpute.synthetic": "true"}
    publish_table(output, shard_name(seed, number), table.replace_schema_metadata(metadata))
    return {"output": shard_name(seed, number), "rows": rows}


def _columns(model: Model, rows: int, generator: torch.Generator) -> pa.Table:
    with torch.inference_mode():
        drawn = model.module.generate(rows, generator)
    columns = {}
    for modality, values in zip(model.schema.modalities, drawn, strict=True):
        columns |= in_columns(modality, values.cpu().numpy())
    return pa.table(columns)


def _subjects(kind: str, first: int, rows: int, seed: int) -> pa.Array:
    numbers = range(first + 1, first + rows + 1)
    if kind.startswith("int"):
        return pa.array([-n for n in numbers], pa.type_for_alias(kind))
    text = pa.array([f"synthetic-{seed}-{n:09d}" for n in numbers])
    return text.cast(pa.large_string()) if kind == "large_string" else text
