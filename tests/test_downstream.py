"""Outcome models on incomplete covariates: known coefficients, and what no analysis may change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from statsmodels.duration.hazard_regression import PHReg

from mmimpute import downstream
from mmimpute.downstream import COMPLETE, DRAWN, FILLED, IMPUTED, WEIGHED, Study, compare
from mmimpute.errors import UserError
from mmimpute.outcomes import Label, NotEstimable, Survival

TRUE = np.array([1.0, 0.5])


def people(rows: int, seed: int = 0) -> tuple[np.ndarray, np.random.Generator]:
    """Two covariates, both of variance 1, that correlate with 0.7."""
    rng = np.random.default_rng(seed)
    second = rng.normal(size=rows)
    return np.c_[0.7 * second + np.sqrt(0.51) * rng.normal(size=rows), second], rng


def labels(x: np.ndarray, rng: np.random.Generator) -> Label:
    return Label(rng.random(len(x)) < expit(-0.5 + x @ TRUE))


def followed(x: np.ndarray, rng: np.random.Generator) -> Survival:
    """Exponential times to the event, and to the end of follow-up."""
    until, end = rng.exponential(size=len(x)) * np.exp(-x @ TRUE), 2 * rng.exponential(size=len(x))
    return Survival(np.minimum(until, end), until <= end)


def study(x: np.ndarray, outcome, rng: np.random.Generator, missing: float, draws: int = 20) -> Study:
    """The first covariate is missing of some; imputed from the second as well as can be, without the outcome."""
    observed = x.copy()
    observed[rng.random(len(x)) < missing, 0] = np.nan
    gap = np.isnan(observed)
    mean = np.where(gap, np.c_[0.7 * x[:, 1], x[:, 1]], observed)
    drawn = np.where(gap, mean + np.sqrt(0.51) * rng.normal(size=(draws, *x.shape)), observed)
    return Study(("first", "second"), observed, mean, drawn, outcome)


def first(found: dict, analysis: str) -> dict:
    return found["estimates"][analysis][0]


def away(row: dict) -> float:
    """From the truth, in standard errors; covariates have variance 1, so that their scale is the true one."""
    return (row["estimate"] - TRUE[0]) / row["std_error"]


def test_mean_filling_weakens_a_coefficient_and_multiple_imputation_does_not():
    x, rng = people(4000, seed=1)
    found = compare(study(x, labels(x, rng), rng, missing=0.5))
    assert first(found, FILLED)["estimate"] < 0.8 and away(first(found, FILLED)) < -3
    assert first(found, DRAWN)["estimate"] < 0.65 and away(first(found, DRAWN)) < -4  # these draws do not know the outcome
    assert abs(away(first(found, WEIGHED))) < 2 and abs(away(first(found, COMPLETE))) < 2
    assert 0.2 < first(found, WEIGHED)["missing_information"] < 0.6
    second = {name: rows[1]["std_error"] for name, rows in found["estimates"].items()}
    assert second[WEIGHED] < 0.9 * second[COMPLETE]  # of what was always observed, complete cases throw half away
    better = {(d["analysis"], d["metric"]) for d in found["differences"] if d["than"] == FILLED and d["low"] * d["high"] > 0}
    assert better == {(IMPUTED, "AUROC"), (IMPUTED, "Brier score"), (WEIGHED, "AUROC"), (WEIGHED, "Brier score")}
    assert any("imputed predicts better than mean-filled, AUROC +" in v for v in found["verdicts"])


def test_cox_recovers_hazard_ratios():
    x, rng = people(3000, seed=1)
    outcome = followed(x, rng)
    found = outcome.fit(x)
    assert np.abs((found.estimate - TRUE) / np.sqrt(np.diag(found.covariance))).max() < 2
    assert outcome.ridge(x, 0) == pytest.approx(found.estimate, abs=1e-3)  # no ties: Breslow and Efron agree
    assert np.linalg.inv(outcome.information(x, found.estimate)) == pytest.approx(found.covariance, rel=1e-3)
    penalised, reference = outcome.ridge(x, 50), PHReg(outcome.time, x, status=outcome.event.astype(int))
    assert reference.score(penalised) == pytest.approx(50 * penalised, abs=0.1)
    assert np.abs(outcome.ridge(x)) == pytest.approx(np.abs(found.estimate), rel=0.02)
    assert np.abs(outcome.ridge(x, 1e5)).max() < 0.1


def test_cox_given_gaps():
    x, rng = people(700, seed=2)
    found = compare(study(x, followed(x, rng), rng, missing=0.4, draws=6))
    assert first(found, FILLED)["estimate"] < 0.85 and first(found, DRAWN)["estimate"] < 0.75
    assert abs(away(first(found, WEIGHED))) < 2.5
    assert {d["metric"] for d in found["differences"]} == {"concordance"}


@pytest.mark.parametrize("kind", [labels, followed])
def test_where_nothing_is_missing_all_analyses_are_one(kind, monkeypatch):
    monkeypatch.setattr(downstream, "RESAMPLES", 20)
    x, rng = people(300, seed=3)
    found = compare(study(x, kind(x, rng), rng, missing=0, draws=3))
    assert found["complete"] == found["people"] == 300
    for rows in found["estimates"].values():
        for row, wanted in zip(rows, found["estimates"][COMPLETE], strict=True):
            # Barnard and Rubin give draws that agree a little fewer degrees of freedom than one plain analysis.
            assert all(row[k] == pytest.approx(wanted[k], rel=1e-5, abs=1e-9) for k in ("estimate", "std_error", "missing_information"))
            assert all(row[k] == pytest.approx(wanted[k], rel=0.02) for k in ("low", "high", "freedom"))
    assert all(d["difference"] == pytest.approx(0, abs=0.02) for d in found["differences"])
    assert [d for d in found["differences"] if d["analysis"] == IMPUTED and abs(d["difference"]) > 1e-12] == []


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_scores_against_their_references(seed):
    rng = np.random.default_rng(seed)
    risk, event, time = rng.integers(0, 5, 40) / 5, rng.random(40) < 0.5, rng.integers(1, 8, 40).astype(float)
    event[:2] = True, False
    assert Label(event).scores(risk)["AUROC"] == pytest.approx(roc_auc_score(event, risk))
    pairs = [(i, j) for i in range(40) for j in range(40) if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j]))]
    right = np.mean([1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0 for i, j in pairs])
    assert Survival(time, event).scores(risk)["concordance"] == pytest.approx(right)


def test_the_breslow_hazard_of_people_without_covariates_is_nelson_aalens():
    time, event = np.array([2.0, 1.0, 3.0, 3.0]), np.array([True, True, True, False])
    at_risk, baseline = Survival(time, event)._at_risk(np.zeros(4))
    assert np.exp(at_risk) == pytest.approx([3, 4, 2, 2])
    assert baseline == pytest.approx([1 / 4 + 1 / 3, 1 / 4, 1 / 4 + 1 / 3 + 1 / 2, 1 / 4 + 1 / 3 + 1 / 2])


def test_weighing_gives_the_posterior_of_what_is_missing():
    """Draws from N(0, 1) and a probit-like outcome: the share of positive draws among the picked is Bayes' rule."""
    rng = np.random.default_rng(0)
    draws, outcome = rng.normal(size=(60, 2000, 1)), Label(rng.random(2000) < 0.5)
    picked = downstream.weighed(draws[:6], outcome, lambda x: np.array([0.0, 2.0]), rng)
    found = np.stack(picked)[..., 0]
    z = np.linspace(-6, 6, 2001)
    weight = norm.pdf(z) * expit(2 * z)
    wanted = (z * weight).sum() / weight.sum()
    assert found[:, outcome.event].mean() == pytest.approx(wanted, abs=0.1)
    assert found[:, ~outcome.event].mean() == pytest.approx(-wanted, abs=0.1)


def test_what_cannot_be_estimated_is_left_out(monkeypatch):
    monkeypatch.setattr(downstream, "RESAMPLES", 10)
    x, rng = people(200, seed=4)
    with pytest.raises(NotEstimable):
        Label(x[:, 0] > 0).fit(x)  # separated
    with pytest.raises(NotEstimable):
        labels(x, rng).fit(np.c_[x, x[:, 0]])  # dependent
    wide = study(np.c_[x], labels(x, rng), rng, missing=0.95, draws=2)
    found = compare(wide)
    assert found["estimates"][COMPLETE] is None and found["estimates"][IMPUTED] is not None
    assert found["scores"][COMPLETE] == {} and not any("complete cases" in v for v in found["verdicts"])
    with pytest.raises(UserError, match="fewer than 10 people"):
        compare(study(x, Label(np.arange(200) < 9), rng, missing=0, draws=2))


@pytest.mark.slow
def test_intervals_hold_the_truth():
    """Of 150 cohorts of 600 people: 95% intervals of multiple imputation cover as often as those of complete cases."""
    inside = {name: [] for name in (COMPLETE, FILLED, DRAWN, WEIGHED)}
    for seed in range(150):
        x, rng = people(600, seed)
        found = downstream._estimates(study(x, labels(x, rng), rng, missing=0.4), rng)
        for name, held in inside.items():
            held.append((found[name].low <= TRUE) & (found[name].high >= TRUE))
    share = {name: np.mean(held, 0) for name, held in inside.items()}
    assert (share[WEIGHED] > 0.9).all() and (share[COMPLETE] > 0.9).all(), share
    assert share[DRAWN][0] < 0.5 and share[FILLED][1] < 0.8, share
