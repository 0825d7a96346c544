"""Synthetic records: one shard of draws from the model, in the schema of the cohort. A plain function."""

import pyarrow as pa
import torch

import mmimpute
from mmimpute.data.arrow import in_columns
from mmimpute.data.shards import publish_table
from mmimpute.registry import Model

SHARD_ROWS = 50_000


def shard_name(seed: int, number: int) -> str:
    return f"synthetic-{seed}-{number:05d}.parquet"


def generate_shard(model: Model, output: str, number: int, rows: int, seed: int) -> dict:
    """Publishes shard `number` of a synthetic cohort; the same arguments write the same values.

    Subject ids say what they are: `synthetic-<seed>-<n>`, or negative where the cohort's ids are integers.
    """
    first = number * SHARD_ROWS
    generator = torch.Generator(model.module.device).manual_seed((seed << 32) + number)
    with torch.inference_mode():
        drawn = model.module.generate(rows, generator)
    subjects = _subjects(model.schema.subject_type, first, rows, seed)
    columns = {model.schema.subject_id: subjects}
    for modality, values in zip(model.schema.modalities, drawn, strict=True):
        columns |= in_columns(modality, values.cpu().numpy())
    metadata = {"mmimpute.version": mmimpute.__version__, "mmimpute.model": model.digest, "mmimpute.synthetic": "true"}
    publish_table(output, shard_name(seed, number), pa.table(columns).replace_schema_metadata(metadata))
    return {"output": shard_name(seed, number), "rows": rows}


def _subjects(kind: str, first: int, rows: int, seed: int) -> pa.Array:
    numbers = range(first + 1, first + rows + 1)
    if kind.startswith("int"):
        return pa.array([-n for n in numbers], pa.type_for_alias(kind))
    text = pa.array([f"synthetic-{seed}-{n:09d}" for n in numbers])
    return text.cast(pa.large_string()) if kind == "large_string" else text
