"""What the pattern of missing modalities is worth as an input, on the simulated population: missing at random, and not.

    python tests/benchmarks/pattern.py [--members 1] [--rows 6000] [--seeds 1] [--width 128] [--strength 0 1]

Fits with and without it and imputes the modalities that fresh records lack; the simulation knows what they are. Prints the mean R2 of
real features and the mean AUROC of codes beside two oracles: one takes it that a missing modality says nothing, the other knows how
often each state of the population lacks each modality, which is all that there is to learn from a pattern.
"""

import argparse
import time

import numpy as np
import torch
from sklearn.metrics import r2_score, roc_auc_score
from torch import Tensor

from mmimpute.model import FeatureStatistics, Imputer, ModalityConfig, ModelConfig, MultiModalVAE
from mmimpute.simulation import Population, Posterior, Values
from mmimpute.stacking import assemble
from mmimpute.training import fit_in_memory

FRESH = 4000


class Informed(Population):
    """The same population; its oracle also reads which modalities are missing."""

    def posterior(self, x: Values, observed: Values) -> Posterior:
        found = super().posterior(x, observed)
        missing_NK = np.stack([~observed[m.name].any(1) for m in self.modalities], 1)
        chance_CK = self.truth.missing_CK
        log_pattern_NC = missing_NK @ np.log(chance_CK).T + ~missing_NK @ np.log1p(-chance_CK).T
        state_NC = found.state_NC * np.exp(log_pattern_NC - log_pattern_NC.max(1, keepdims=True))
        return found._replace(state_NC=state_NC / state_NC.sum(1, keepdims=True))


def statistics(x: np.ndarray, seen: np.ndarray, kind: str) -> FeatureStatistics:
    """Of the observed values."""
    given = np.where(seen, x, np.nan)
    mean, std = np.nanmean(given, 0), np.nanstd(given, 0)
    knots = np.nanquantile((given - mean) / std, np.linspace(0, 1, 9), axis=0).T
    return FeatureStatistics(mean, std, np.zeros(x.shape[1], bool), np.ones(x.shape[1]), knots)


def fit(population: Population, x: Values, observed: Values, members: int, pattern: bool) -> Imputer:
    """The whole model; every fold judges the member that has not seen it, a single member is judged by a tenth."""
    torch.manual_seed(population.seed)
    rows = len(next(iter(x.values())))
    modalities = tuple(ModalityConfig(m.name, (m.kind,) * m.width) for m in population.modalities)
    config = ModelConfig.for_rows(modalities, rows, members=members, pattern=pattern)
    vae = MultiModalVAE(config, {m.name: statistics(x[m.name], observed[m.name], m.kind) for m in population.modalities})
    values, masks = tensors(x), tensors(observed)
    fold_N = torch.arange(rows) % members if members > 1 else torch.where(torch.arange(rows) % 10 == 0, 0, -1)
    return assemble(fit_in_memory(vae, (values, masks), fold_N).model, values, masks, fold_N)


def tensors(values: Values) -> list[Tensor]:
    return [torch.from_numpy(v) for v in values.values()]


def score(population: Population, truth: Values, mean: Values, observed: Values) -> tuple[float, float]:
    """Mean R2 and mean AUROC over the features of modalities that records lack, the records being those."""
    found = {"real": [], "binary": []}
    for m in population.modalities:
        lacking = ~observed[m.name].any(1)
        y, p = truth[m.name][lacking], mean[m.name][lacking]
        if m.kind == "real":
            found["real"].extend(r2_score(y, p, multioutput="raw_values"))
        else:
            found["binary"].extend(roc_auc_score(y[:, d], p[:, d]) for d in range(m.width) if 0 < y[:, d].sum() < len(y))
    return float(np.mean(found["real"])), float(np.mean(found["binary"]))


def measure(settings: dict, members: int, rows: int) -> dict[str, tuple[float, float]]:
    """R2 and AUROC by name."""
    population, informed = (kind(**settings) for kind in (Population, Informed))
    (x, observed), (truth, shown) = population.sample(rows, 1), population.sample(FRESH, 2)
    guesses = {
        "oracle without the pattern": population.oracle(truth, shown)[0],
        "oracle with the pattern": informed.oracle(truth, shown)[0],
    }
    for name, pattern in (("model without the pattern", False), ("model with the pattern", True)):
        model = fit(population, x, observed, members, pattern)
        mean = model.predict(tensors(truth), tensors(shown)).mean
        guesses[name] = {m.name: t.numpy() for m, t in zip(population.modalities, mean, strict=True)}
    return {name: score(population, truth, guess, shown) for name, guess in guesses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=1)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--width", type=int, default=Population.width)
    parser.add_argument("--strength", type=float, nargs="+", default=[0.0, 1.0])
    given = parser.parse_args()
    torch.set_num_threads(1)
    for strength in given.strength:
        began = time.perf_counter()
        settings = {"width": given.width, "not_at_random": strength}
        found = [measure(settings | {"seed": seed}, given.members, given.rows) for seed in range(given.seeds)]
        print(f"width {given.width}, not_at_random {strength}, {given.seeds} populations, {time.perf_counter() - began:.0f} s")
        for name in found[0]:
            r2, auroc = zip(*(f[name] for f in found), strict=True)
            each = "" if given.seeds == 1 else "   each " + " ".join(f"{a:.3f}/{b:.3f}" for a, b in zip(r2, auroc, strict=True))
            print(f"  {name:27} R2 {np.mean(r2):.3f}  AUROC {np.mean(auroc):.3f}{each}", flush=True)


if __name__ == "__main__":
    main()
