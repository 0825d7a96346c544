"""Are multiple imputations honest? Rubin's rules on simulated cohorts, each with a model of its own.

    python tests/benchmarks/rubin.py [--cohorts 200] [--rows 1000]

People of the linear-Gaussian cohort of the tests; 40% lack modality b. In every cohort the model is fitted to just these
people, their gaps are drawn 20 times, and b's first feature is regressed on all features of a and c. Prints the share of
95% intervals that hold the true coefficients: of Rubin's rules, of filling in predicted means as if they were data, of
filling in the column mean, and of complete cases.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from mmimpute.rubin import pool

sys.path.insert(0, str(Path(__file__).parent.parent / "model"))
from cohorts import LinearGaussian, fit_linear_gaussian

TARGET, INPUTS = 4, [0, 1, 2, 3, 10, 11, 12]


def one_cohort(truth: LinearGaussian, true: np.ndarray, rows: int, seed: int) -> dict[str, np.ndarray]:
    x = truth.values(rows, 1000 + seed)
    missing = torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed)) < 0.4
    given = [x[0], x[1].masked_fill(missing, torch.nan), x[2]]
    observed = [~v.isnan() for v in given]
    model = fit_linear_gaussian(given, observed)
    drawn = model.impute([(v, 1) for v in given], draws=20, generator=torch.Generator().manual_seed(seed))
    means = torch.cat(model.predict(given, observed).mean, 1).numpy()
    table = torch.cat(given, 1).numpy()
    column = np.where(np.isnan(table), np.nanmean(table, 0), table)
    return {
        "Rubin's rules, 20 draws": rubin([np.concatenate([d[s].numpy() for d in drawn], 1) for s in range(20)], true),
        "predicted means": rubin([means], true),
        "column means": rubin([column], true),
        "complete cases": rubin([table[~missing[:, 0].numpy()]], true),
    }


def rubin(completed: list[np.ndarray], true: np.ndarray) -> np.ndarray:
    """Whether the 95% interval of each coefficient holds the truth, and its width."""
    estimates, variances = zip(*(least_squares(x[:, INPUTS], x[:, TARGET]) for x in completed), strict=True)
    found = pool(estimates, variances, freedom=len(completed[0]) - len(INPUTS) - 1)
    return np.stack([(found.low <= true) & (true <= found.high), found.high - found.low])


def least_squares(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients without the intercept, and their variances."""
    design = np.c_[np.ones(len(x)), x]
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ y
    residual = y - design @ coefficients
    return coefficients[1:], (np.diag(inverse) * (residual @ residual) / (len(x) - design.shape[1]))[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=int, default=200)
    parser.add_argument("--rows", type=int, default=1000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    truth = LinearGaussian.make()
    loadings = np.concatenate(truth.loadings)
    covariance = loadings @ loadings.T + truth.noise**2 * np.eye(len(loadings))
    true = np.linalg.solve(covariance[np.ix_(INPUTS, INPUTS)], covariance[INPUTS, TARGET])
    began, found = time.perf_counter(), []
    for seed in range(given.cohorts):
        found.append(one_cohort(truth, true, given.rows, seed))
        if (seed + 1) % 20 == 0 or seed + 1 == given.cohorts:
            print(f"{seed + 1} cohorts, {time.perf_counter() - began:.0f} s")
            for name in found[0]:
                held, width = np.stack([f[name] for f in found]).mean((0, 2))
                print(f"  {name:25s} 95% intervals hold the truth in {held:.1%}, mean width {width:.3f}", flush=True)


if __name__ == "__main__":
    main()
