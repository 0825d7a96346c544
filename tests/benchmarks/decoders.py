"""What each decoder's synthetic records and draws are worth: one member, equal VAE sizes.

    python tests/benchmarks/decoders.py [--cohort nhanes | moons] [--rows 1500] [--decoders likelihood adversarial diffusion]

nhanes: the packaged cohort. moons: a point on one of two half circles, which two other modalities tell with noise as wide as the moons.

Columns: c2st, accuracy of gradient boosting that tells real records of people not trained on from synthetic ones (0.5 = cannot; the
synthetic ones lack what the real ones lack); energy distance of standardised records; correlations, mean absolute error of pairs of
numeric features; score, the energy score of draws of each modality hidden in turn (smaller is better, in standard deviations);
cover90, share of real values between the 5% and 95% quantiles of 20 draws; seconds of the fit; records a second of draws.
"""

import argparse
import dataclasses
import time
from importlib.resources import files

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.datasets import make_moons
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import cross_val_score

from mmimpute.data import profile
from mmimpute.data.arrow import decode, flat
from mmimpute.data.schema import draft_schema
from mmimpute.data.tensors import to_model
from mmimpute.model import FeatureStatistics, Imputer, MultiModalVAE
from mmimpute.model.config import DECODERS
from mmimpute.sizing import model_config
from mmimpute.spec import CohortSpec, FitSettings, ModalitySpec, read_spec
from mmimpute.stacking import assemble
from mmimpute.training import OptimiserSettings, fit_in_memory, schedule

DRAWS = 20


def nhanes() -> tuple[pa.Table, CohortSpec]:
    folder = files("mmimpute") / "resources"
    table = pq.read_table(str(folder / "nhanes2017.parquet"))
    table = table.rename_columns(["subject_id" if c == "patient_id" else c for c in table.column_names])
    return table, read_spec(str(folder / "nhanes2017.toml"))


def moons() -> tuple[pa.Table, CohortSpec]:
    point, _ = make_moons(6_000, noise=0.08, random_state=0)
    rng = np.random.default_rng(0)
    parts = {"moon": point, "here": point + rng.normal(size=point.shape), "there": point + rng.normal(size=point.shape)}
    columns = {f"{name}__{axis}": x[:, i] for name, x in parts.items() for i, axis in enumerate("xy")}
    ids = [f"m{i:05d}" for i in range(len(point))]
    return pa.table({"subject_id": ids} | columns), CohortSpec(modalities={name: ModalitySpec(prefix=f"{name}__") for name in parts})


COHORTS = {"nhanes": nhanes, "moons": moons}


def cohort(name: str, rows: int, tests: int):
    """Schema, statistics, and values (NaN where missing) of training and test people."""
    table, spec = COHORTS[name]()
    order = np.random.default_rng(0).permutation(len(table))
    draft = draft_schema(spec, table.schema, {})
    schema, seen = profile.settle(draft, profile.observe(table, draft, name, 1.0))
    statistics = {name: FeatureStatistics(**arrays) for name, arrays in profile.feature_statistics(schema, seen).items()}
    x = flat(decode(table, schema, name))
    return schema, statistics, x[order[:rows]], x[order[rows : rows + tests]]


def fit(decoder: str, schema, statistics, x: np.ndarray, epochs: int | None) -> tuple[Imputer, float]:
    began = time.process_time()
    config = dataclasses.replace(model_config(schema, len(x), FitSettings()), members=1)
    config = dataclasses.replace(config, modalities=tuple(dataclasses.replace(m, decoder=decoder) for m in config.modalities))
    data = to_model(x, [m.width for m in config.modalities])
    fold = torch.where(torch.arange(len(x)) % 5 == 0, 0, -1)
    torch.manual_seed(0)
    plan = schedule(len(x), epochs=epochs)
    vae = fit_in_memory(MultiModalVAE(config, statistics), data, fold, OptimiserSettings(), plan).model
    return assemble(vae, *data, fold), time.process_time() - began


def energy(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def told_apart(real: np.ndarray, made: np.ndarray) -> float:
    both, label = np.concatenate([real, made]), np.repeat([0, 1], [len(real), len(made)])
    return cross_val_score(HistGradientBoostingClassifier(max_iter=60, random_state=0), both, label, cv=4).mean()


def correlations(x: np.ndarray) -> np.ndarray:
    masked = np.ma.corrcoef(np.ma.masked_invalid(x), rowvar=False)
    return masked[np.triu_indices(x.shape[1], 1)].filled(np.nan)


class Yardstick:
    """Test people, and what is compared of them."""

    def __init__(self, schema, statistics, x: np.ndarray) -> None:
        self.x, self.widths = x, [len(m.features) for m in schema.modalities]
        self.kinds = np.array([f.kind for m in schema.modalities for f in m.features])
        self.mean, self.std = np.nanmean(x, 0), np.nanstd(x, 0) + 1e-6
        self.starts = np.cumsum([0, *self.widths])

    def synthetic(self, made: np.ndarray) -> dict[str, float]:
        made = np.where(np.isnan(self.x), np.nan, made)
        scaled = [torch.from_numpy(np.nan_to_num((t - self.mean) / self.std).clip(-8, 8)).float() for t in (self.x, made)]
        live = (np.nanstd(self.x, 0) > 1e-6) & (np.nanstd(made, 0) > 1e-6)
        numbers = np.flatnonzero((self.kinds != "categorical") & live)
        error = np.abs(correlations(self.x[:, numbers]) - correlations(made[:, numbers]))
        return {"c2st": told_apart(self.x, made), "energy": energy(*scaled), "correlations": float(np.nanmean(error))}

    def draws(self, model: Imputer) -> dict[str, float]:
        scores, covered, seconds, count = [], [], 0.0, 0
        for j in range(len(self.widths)):
            own = slice(self.starts[j], self.starts[j + 1])
            whole = ~np.isnan(self.x[:, own]).any(1) & ~np.isnan(np.delete(self.x, np.r_[own], 1)).all(1)
            hidden = self.x[whole].copy()
            truth = hidden[:, own].copy()
            hidden[:, own] = np.nan
            values, _ = to_model(hidden, self.widths)
            began = time.process_time()
            drawn = model.impute([(v, 1) for v in values], DRAWS, torch.Generator().manual_seed(0))[j].numpy()
            seconds, count = seconds + time.process_time() - began, count + DRAWS * len(truth)
            scale = lambda t: torch.from_numpy((t - self.mean[own]) / self.std[own]).clip(-8, 8)  # noqa: B023, E731
            a, y = scale(drawn), scale(truth)
            within = torch.stack([(a - a.roll(k, 0)).norm(dim=-1).mean(0) for k in range(1, DRAWS)]).mean(0)
            scores.append(float(((a - y).norm(dim=-1).mean(0) - within / 2).mean()) / self.widths[j] ** 0.5)
            low, high = np.quantile(drawn, [0.05, 0.95], 0)
            real = self.kinds[own] == "real"
            if real.any():
                covered.append(((truth >= low) & (truth <= high))[:, real].mean())
        return {"score": float(np.mean(scores)), "cover90": float(np.mean(covered)), "draws_per_second": count / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", choices=COHORTS, default="nhanes")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--tests", type=int, default=800)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--decoders", nargs="*", default=DECODERS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    schema, statistics, x, tests = cohort(arguments.cohort, arguments.rows, arguments.tests)
    yardstick = Yardstick(schema, statistics, tests)
    show = lambda name, found: print(name, {k: round(v, 4) for k, v in found.items()}, flush=True)  # noqa: E731
    for decoder in arguments.decoders:
        model, seconds = fit(decoder, schema, statistics, x, arguments.epochs)
        made = torch.cat(model.generate(len(tests), torch.Generator().manual_seed(0)), 1).numpy()
        show(decoder, {"fit_seconds": seconds, **yardstick.synthetic(made)})
        show(decoder, yardstick.draws(model))


if __name__ == "__main__":
    main()
