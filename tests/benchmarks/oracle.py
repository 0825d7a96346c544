"""What there is to gain on a simulated cohort: the oracle's R2 and that of ridge, each real modality hidden in turn.

    python tests/benchmarks/oracle.py [WIDTH [SEED]]

complete: nothing else is missing, in training and in test. as sampled: modalities and values are missing in both. Ridge
gets mean-filled, standardised values and a flag for every modality, and is trained on 20,000 records; its penalty is the
best of three on the test records themselves, so that it is not undersold.
"""

import sys

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from mmimpute.simulation import Population

TRAIN, TEST = 20_000, 5_000


def ridge(x: dict, observed: dict, name: str) -> np.ndarray:
    """R2 of every feature of a modality."""
    parts, train, test = [], slice(TRAIN), slice(TRAIN, None)
    for other in (k for k in x if k != name):
        seen = np.where(observed[other], x[other], np.nan)
        z = (seen - np.nanmean(seen[train], axis=0)) / np.nanstd(seen[train], axis=0)
        parts += [np.nan_to_num(z), observed[other].any(1, keepdims=True)]
    inputs, target = np.concatenate(parts, axis=1), np.where(observed[name], x[name], np.nan)[train]
    present = observed[name][train].any(1)
    target = np.where(np.isnan(target), np.nanmean(target, axis=0), target)[present]
    fits = [Ridge(alpha).fit(inputs[train][present], target) for alpha in (1, 10, 100)]
    return max((r2_score(x[name][test], f.predict(inputs[test]), multioutput="raw_values") for f in fits), key=np.mean)


def oracle(population: Population, x: dict, observed: dict, name: str) -> np.ndarray:
    test = {k: v[TRAIN:] for k, v in x.items()}
    seen = {k: v[TRAIN:] & (k != name) for k, v in observed.items()}
    return r2_score(test[name], population.oracle(test, seen)[0][name], multioutput="raw_values")


def main(width: int = Population.width, seed: int = 0) -> None:
    population = Population(seed=seed, width=width)
    x, sampled = population.sample(TRAIN + TEST, seed)
    complete = {k: np.ones_like(v) for k, v in sampled.items()}
    for title, observed in {"complete": complete, "as sampled": sampled}.items():
        real = [m.name for m in population.modalities if m.kind == "real"]
        scores = [(ridge(x, observed, name), oracle(population, x, observed, name)) for name in real]
        for name, (r, o) in zip(real, scores, strict=True):
            print(f"{title:12}{name:8} ridge {r.mean():.3f}  oracle {o.mean():.3f}")
        r, o = (np.concatenate(s).mean() for s in zip(*scores, strict=True))
        print(f"{title:12}{'all':8} ridge {r:.3f}  oracle {o:.3f}  difference {o - r:.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
