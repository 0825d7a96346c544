"""What the benchmarks of the engine work on: shards of random records, and a model of their schema that nobody had to train."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmimpute import registry
from mmimpute.data import profile, storage
from mmimpute.data.schema import draft_schema
from mmimpute.model.gaussian import kept_components
from mmimpute.model.imputer import Imputer
from mmimpute.model.standardise import FeatureStatistics
from mmimpute.model.vae import MultiModalVAE
from mmimpute.sizing import model_config
from mmimpute.spec import CohortSpec, FitSettings

FACTORS = 16  # behind the values that the Gaussian expert believes in


class Part(NamedTuple):
    """A modality. missing: share of records that lack it; gaps: share of single values missing in the others."""

    name: str
    kind: str
    width: int
    type: str
    missing: float
    gaps: float


COHORT = (
    Part("labs", "real", 64, "float32", 0.1, 0.3),
    Part("codes", "binary", 128, "uint8", 0.2, 0.0),
    Part("note", "real", 64, "float32", 0.4, 0.0),
)


def records(parts: Iterable[Part], rows: int, seed: int) -> pa.Table:
    draw = np.random.default_rng(seed)
    columns = {"subject_id": pa.array([f"{seed:06d}-{i:08d}" for i in range(rows)])}
    return pa.table(columns | {p.name: _lists(p, rows, draw) for p in parts})


def _lists(part: Part, rows: int, draw: np.random.Generator) -> pa.Array:
    size = rows * part.width
    if part.kind == "real":
        values = draw.standard_normal(size, np.float64 if part.type == "float64" else np.float32)
    else:
        values = (draw.random(size, np.float32) < 0.1).astype(part.type)
    gaps = draw.random(size, np.float32) < part.gaps if part.gaps else None
    return pa.FixedSizeListArray.from_arrays(pa.array(values, mask=gaps), part.width, mask=pa.array(draw.random(rows) < part.missing))


def write_shards(folder: Path, shards: int, rows: int) -> Path:
    """Writes the shards of a cohort of this size that are not there yet, and returns their folder."""
    place = folder / f"shards-{shards}x{rows}"
    place.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        path = place / f"part-{number:06d}.parquet"
        if not path.exists():
            pq.write_table(records(COHORT, rows, number), path.with_suffix(".new"), compression="zstd", write_page_checksum=True)
            path.with_suffix(".new").rename(path)
    return place


def make_model(home: Path, parts: Sequence[Part] = COHORT, members: int = 1) -> str:
    """A champion of the right schema, standardised to random records. Returns its place.

    Weights are as they were initialised, which costs a prediction as much as trained ones. Not so the Gaussian expert, whose
    solver stops when it has arrived: a first covariance, the identity, would be solved in one step, so it gets another.
    """
    sample = records(parts, 2_000, 0)
    spec = CohortSpec(modalities={p.name: {"column": p.name, "kinds": p.kind} for p in parts})
    drafted = draft_schema(spec, sample.schema, {p.name: p.width for p in parts})
    schema, seen = profile.settle(drafted, profile.observe(sample, drafted, "sample", 1.0))
    statistics = {name: FeatureStatistics(**arrays) for name, arrays in profile.feature_statistics(schema, seen).items()}
    rows = {1: 100_000, 5: 10_000}[members]  # of training data: what decides on the number of members
    torch.manual_seed(0)
    config = model_config(schema, rows, FitSettings())
    module = Imputer(MultiModalVAE(config, statistics), kept_components(config, rows, [True] * len(config.modalities)))
    _correlate(module)
    name = registry.save(str(home), module.eval(), schema, "untrained")
    registry.promote(str(home), name)
    return storage.join(str(home), name)


@torch.no_grad()
def _correlate(module: Imputer) -> None:
    """A Gaussian expert of common factors, and principal components in some directions."""
    size = module.gaussian.covariance_EPP.shape[-1]
    loading = torch.randn(size, FACTORS)
    covariance = loading @ loading.T + FACTORS * torch.diag(torch.rand(size) + 0.1)
    scale = covariance.diagonal().sqrt()
    module.gaussian.covariance_EPP.copy_(covariance / torch.outer(scale, scale))
    for component in module.gaussian.components:
        if component.wide:
            component.basis_EDQ.copy_(torch.linalg.qr(torch.randn(component.basis_EDQ.shape)).Q)
