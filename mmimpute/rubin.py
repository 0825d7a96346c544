"""Rubin's rules: one answer from an analysis that was made of several completed data sets."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Pooled(NamedTuple):
    """Per coefficient: estimate, standard error, degrees of freedom, 95% interval, fraction of missing information; (P,) each."""

    estimate: np.ndarray
    std_error: np.ndarray
    freedom: np.ndarray
    low: np.ndarray
    high: np.ndarray
    missing: np.ndarray


def pool(estimates_MP: Sequence[np.ndarray], variances_MP: Sequence[np.ndarray], freedom: float = np.inf, level: float = 0.95) -> Pooled:
    """Estimates and their squared standard errors of M completed data sets, P coefficients each; M = 1 is one plain analysis.

    freedom: degrees of freedom that the analysis would have if nothing were missing.
    Rubin 1987, eqs. 3.1.2-3.1.6 (estimate, within W, between B, total T), 3.1.7 (r) and 3.1.10 (fraction of missing
    information); the degrees of freedom of Barnard & Rubin 1999, eq. 3, which never exceed the complete data's.
    """
    m = len(estimates_MP)
    estimate, within = np.mean(estimates_MP, 0), np.mean(variances_MP, 0)
    between = np.var(estimates_MP, 0, ddof=1) if m > 1 else np.zeros_like(within)
    total = within + (1 + 1 / m) * between
    share = (1 + 1 / m) * between / total
    with np.errstate(divide="ignore"):
        of_draws = np.float64(m - 1) / share**2 if m > 1 else np.full_like(share, np.inf)
    of_data = freedom if m == 1 or np.isinf(freedom) else (freedom + 1) / (freedom + 3) * freedom * (1 - share)
    used = 1 / (1 / of_draws + 1 / of_data)
    ratio = share / (1 - share)
    std_error = np.sqrt(total)
    half = stats.t.ppf(0.5 + level / 2, used) * std_error
    return Pooled(estimate, std_error, used, estimate - half, estimate + half, (ratio + 2 / (of_draws + 3)) / (ratio + 1))
