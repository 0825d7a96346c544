"""Rubin's rules: a worked example, closed forms, and what they reduce to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mmimpute.rubin import pool


def test_a_worked_example():
    """Three data sets, by hand: mean 2, W 0.5, B 1, T 0.5 + 4/3, r 8/3, v (2)(1 + 3/8)^2 = 3.78125."""
    found = pool([[1.0], [2.0], [3.0]], [[0.4], [0.5], [0.6]])
    assert found.estimate == 2 and found.std_error**2 == pytest.approx(0.5 + 4 / 3)
    assert found.freedom == pytest.approx(3.78125)
    assert found.missing == pytest.approx((8 / 3 + 2 / 6.78125) / (1 + 8 / 3))
    assert found.high - 2 == pytest.approx(stats.t.ppf(0.975, 3.78125) * np.sqrt(11 / 6))


def test_few_people_leave_few_degrees_of_freedom():
    """Barnard & Rubin 1999, eq. 3: 1 / (1 / v_m + 1 / v_obs) with v_obs = (v + 1) / (v + 3) v (1 - lambda)."""
    share = (4 / 3) / (0.5 + 4 / 3)
    expected = 1 / (1 / 3.78125 + 1 / (11 / 13 * 10 * (1 - share)))
    assert pool([[1.0], [2.0], [3.0]], [[0.4], [0.5], [0.6]], freedom=10).freedom == pytest.approx(expected)


@given(st.floats(-5, 5), st.floats(0.01, 10), st.integers(1, 20), st.integers(2, 500))
def test_where_draws_agree_it_is_one_plain_analysis(estimate, variance, sets, freedom):
    found = pool([[estimate]] * sets, [[variance]] * sets, freedom)
    assert found.missing == pytest.approx(0, abs=1e-12)
    assert found.freedom == pytest.approx(freedom if sets == 1 else (freedom + 1) / (freedom + 3) * freedom)
    assert found.high - found.low == pytest.approx(2 * stats.t.ppf(0.975, found.freedom) * np.sqrt(variance))


def test_the_fraction_missing_of_a_mean():
    """The mean of n values of which a share was never seen, drawn from their known distribution: that share is the fraction missing."""
    rng = np.random.default_rng(0)
    n, share, sets = 4000, 0.3, 4000
    kept = rng.normal(size=int(n * (1 - share)))
    # Proper draws: the mean that they are drawn around is itself a draw.
    sums = rng.normal(kept.mean(), 1 / np.sqrt(len(kept)), sets) * (n - len(kept)) + np.sqrt(n - len(kept)) * rng.normal(size=sets)
    found = pool((kept.sum() + sums)[:, None] / n, np.full((sets, 1), 1 / n))
    assert found.missing[0] == pytest.approx(share, abs=0.02)
    assert found.std_error[0] == pytest.approx(1 / np.sqrt(len(kept)), rel=0.03)
