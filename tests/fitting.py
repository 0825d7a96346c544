"""Small models of linear cohorts, fitted in this process."""

import numpy as np
import pyarrow as pa
import torch

from mmimpute import registry
from mmimpute.data import profile, storage
from mmimpute.data.arrow import decode, flat
from mmimpute.data.schema import draft_schema, storage_type
from mmimpute.data.split import fold, position
from mmimpute.data.tensors import to_model
from mmimpute.model import FeatureStatistics, MultiModalVAE
from mmimpute.sizing import model_config
from mmimpute.spec import CohortSpec, FitSettings, ModalitySpec
from mmimpute.stacking import assemble
from mmimpute.training import OptimiserSettings, fit_in_memory, schedule
from tests.conftest import linear_cohort

MODALITIES = {"labs": ModalitySpec(column="labs"), "rna": ModalitySpec(column="rna"), "dx": ModalitySpec(prefix="dx__")}
SPEC = CohortSpec(timestamp="at", outcomes=("outcome__*",), subgroups=("sex", "age"), modalities=MODALITIES)
FEW = 65  # people that the lesser of two models saw


def cohort(rows: int = 600) -> pa.Table:
    """A linear cohort with sex, age (some of it missing) and a date."""
    rng, table = np.random.default_rng(7), linear_cohort(rows)
    table = table.append_column("sex", pa.array(rng.choice(["f", "m"], rows)))
    table = table.append_column("age", pa.array(np.where(np.arange(rows) % 50, rng.uniform(18, 90, rows), np.nan), from_pandas=True))
    return table.append_column("at", pa.array(np.datetime64("2020-03-05") + rng.integers(0, 1500, rows)))


def records(table: pa.Table, schema) -> tuple[np.ndarray, np.ndarray]:
    """x, n x width, and the places of the subjects."""
    return flat(decode(table, schema, "a shard")), position(table.column("subject_id"))


def fit(home: str, table: pa.Table, spec: CohortSpec, epochs: int = 3, fitted_on: str = "a table") -> registry.Model:
    """A model of few epochs with all that a fit leaves beside it; nobody's champion."""
    widths = {
        m.column: storage_type(table.schema.field(m.column).type).list_size
        for m in spec.modalities.values()
        if m.column and m.form != "text"
    }
    draft = draft_schema(spec, table.schema, widths)
    schema, seen = profile.settle(draft, profile.observe(table, draft, "a shard", 1.0))
    x, place = records(table, schema)
    config = model_config(schema, len(x), FitSettings(z0=8))
    statistics = {name: FeatureStatistics(**arrays) for name, arrays in profile.feature_statistics(schema, seen).items()}
    data = to_model(x, [len(m.features) for m in schema.modalities])
    folds = torch.from_numpy(fold(place, config.members))
    torch.manual_seed(0)
    plan = schedule(len(x), batch=64, epochs=epochs)
    vae = fit_in_memory(MultiModalVAE(config, statistics), data, folds, OptimiserSettings(lr=6e-3), plan).model
    name = registry.save(home, assemble(vae, *data, folds), schema, fitted_on)
    place = storage.join(home, name)
    beside = {"profile": profile.report(schema, seen), "marginals": profile.marginals(schema, seen), "set_aside": {}, "history": []}
    for record, value in (beside | {"fitted": {"at": "2026-11-21T02:00:00+00:00", "rows": len(x), "shards": 1, "start": None}}).items():
        registry.write_record(place, record, value)
    return registry.load(place)
