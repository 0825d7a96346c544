"""The gate: who is promoted, on losses with known differences and on small models."""

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from mmimpute import gate, registry
from mmimpute.data.schema import Feature, Modality
from mmimpute.evaluation import crps, evaluate, log_loss
from mmimpute.spec import GateSettings
from tests import fitting

SETTINGS = GateSettings(resamples=400)
LOOSE = GateSettings(resamples=200, tolerance=9, likelihood_tolerance=9, calibration_tolerance=9)


def measured(loss: np.ndarray, nats: float = -1.0, covered: float = 0.9, ece: float | None = None) -> gate.Measured:
    held = np.where(np.isnan(loss), np.nan, 1.0)
    return gate.Measured(loss, held, nats * held, covered * held, ece)


def losses(seed: int, people: int = 500, missing: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(people) < missing, np.nan, rng.gamma(2, 0.4, people))


def test_an_equal_challenger_is_kept():
    same = {"labs": measured(losses(0)), "rna": measured(losses(1))}
    found = gate.decide(same, same, {}, SETTINGS)
    assert not found["promoted"] and found["reason"].startswith("kept: not better beyond noise: overall gain 0.0000")


def test_a_better_one_is_promoted_and_the_gain_is_the_mean_over_modalities():
    before = {"labs": losses(0), "rna": losses(1)}
    gains = {"labs": 0.08, "rna": 0.02}
    challenger = {n: measured(v - gains[n]) for n, v in before.items()}
    found = gate.decide({n: measured(v) for n, v in before.items()}, challenger, {}, SETTINGS)
    assert found["promoted"] and found["overall"]["gain"] == pytest.approx(0.05)
    assert found["overall"]["low"] == pytest.approx(0.05)  # the same for everybody: pairs leave no noise
    assert found["modalities"]["labs"]["gain"] == pytest.approx(0.08)
    assert found["subjects"] == (~np.isnan(np.stack(list(before.values())))).any(0).sum()


WORSE = {
    "loss": ({"rna": measured(losses(1) + 0.021)}, {}, "kept: rna is worse by 0.021 (tolerance 0.010)"),
    "log-likelihood": ({"rna": measured(losses(1), nats=-1.08)}, {}, "the log-likelihood of rna falls by 0.080 nats a value"),
    "intervals": ({"rna": measured(losses(1), covered=0.85)}, {}, "the calibration error of rna (intervals) grows from 0.000 to 0.050"),
    "too wide intervals": ({"rna": measured(losses(1), covered=0.97)}, {}, "(intervals) grows from 0.000 to 0.070"),
    "codes": ({"rna": measured(losses(1), ece=0.05)}, {}, "the calibration error of rna (codes) grows from 0.010 to 0.050"),
    "outcome": ({}, {"died": (losses(2), losses(2) + 0.02)}, "kept: died is worse by 0.020 (tolerance 0.010)"),
}


@pytest.mark.parametrize("case", WORSE)
def test_one_that_is_better_overall_but_worse_somewhere_is_kept(case):
    worse, outcomes, reason = WORSE[case]
    champion = {"labs": measured(losses(0)), "rna": measured(losses(1), ece=0.01)}
    better = {"labs": measured(losses(0) - 0.3), "rna": measured(losses(1) - 0.01, ece=0.01)}
    assert gate.decide(champion, better, {"died": (losses(2), losses(2) + 0.009)}, SETTINGS)["promoted"]
    found = gate.decide(champion, better | worse, outcomes, SETTINGS)
    assert not found["promoted"] and reason in found["reason"]
    assert found["overall"]["low"] > 0


def test_chance_alone_promotes_in_a_fortieth_of_cases():
    """Paired differences of mean 0 over 300 people: the lower bound of a 95% interval lies above 0 in 2.5% of cases."""
    cases, rng = 600, np.random.default_rng(0)
    promoted = 0
    for case in range(cases):
        before = rng.gamma(2, 0.4, (300, 2))
        after = before + rng.normal(0, 0.3, (300, 2))
        before[rng.random((300, 2)) < 0.2] = np.nan
        pair = ({n: measured(v[:, at]) for at, n in enumerate(("labs", "rna"))} for v in (before, after))
        promoted += gate.decide(*pair, {}, LOOSE.model_copy(update={"seed": case}))["promoted"]
    low, high = binom.ppf((0.001, 0.999), cases, 0.025)
    assert low <= promoted <= high


def test_the_bootstrap_has_the_standard_error_of_the_mean():
    gain = np.random.default_rng(3).normal(0.1, 1, (1000, 1))
    found = gate.bootstrap(gain, GateSettings(resamples=4000))
    assert found.std() == pytest.approx(gain.std() / np.sqrt(1000), rel=0.05)
    assert np.array_equal(found, gate.bootstrap(gain, GateSettings(resamples=4000)))


def test_scores_of_single_values():
    rng = np.random.default_rng(0)
    y = np.stack([rng.normal(3, 2, 50), rng.integers(0, 2, 50), rng.integers(0, 3, 50), np.full(50, 7.0)], 1)
    y[:20, 0] = np.nan
    kinds = ("real", "binary", "categorical", "real")
    features = tuple(Feature(name=k, kind=k, levels=("a", "b", "c") if k == "categorical" else ()) for k in kinds)
    modality = Modality(
        name="m", layout="list", columns=("m",), types=("float",), features=features, impute=True, hide=0.5, tails="student"
    )
    mean, std = np.stack([y[:, 0] * 0 + 2.5, y[:, 1] * 0 + 0.3, y[:, 2] * 0 + 1, y[:, 3]], 1), np.ones_like(y)
    loss, marginal, nats = gate.cell_scores(modality, y, mean, std, np.array([3, 0.5, 0, 7]), np.array([2.0, 1, 1, 0]))
    seen = y[20:, 0]
    assert loss[20:, 0] == pytest.approx(crps(seen, 2.5, 1.0) / crps(seen, 3.0, 2.0).mean())
    assert nats[20:, 0] == pytest.approx(np.maximum(norm.logpdf(seen, 2.5, 1.0), norm.logpdf(5)) + np.log(2))
    assert loss[:, 1] == pytest.approx(log_loss(y[:, 1], np.full(50, 0.3)) / np.log(2))
    assert np.nanmean(marginal[:, :3], 0) == pytest.approx([1, 1, 1])
    assert loss[:, 2].max() == pytest.approx(1 / np.mean(y[:, 2] != np.bincount(y[:, 2].astype(int)).argmax()))
    assert np.isnan(loss[:, 3]).all() and np.isnan(loss[:20, 0]).all() and np.isnan(nats[:, 2]).all()


def test_outcomes_are_cross_fitted():
    """As the regressions fitted one by one say; and what is random tells nothing of new people, however many columns there are."""
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(300, 40))
    y = (rng.random(300) < 0.3).astype(float)
    y[:30] = np.nan
    found = gate.outcome_losses(columns, y, seed=0)
    assert np.isnan(found[:30]).all() and np.nanmean(found) > 1
    known, share = ~np.isnan(y), np.nanmean(y)
    learns, judges = next(StratifiedKFold(5, shuffle=True, random_state=0).split(columns[known], y[known]))
    x, target = columns[known], y[known]
    z = (x - x[learns].mean(0)) / x[learns].std(0)
    said = LogisticRegression(C=gate.PENALTY, max_iter=1000).fit(z[learns], target[learns]).predict_proba(z[judges])[:, 1]
    entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    assert found[known][judges] == pytest.approx(log_loss(target[judges], said) / entropy, rel=1e-4)


def test_outcomes_are_binary_and_of_enough_people():
    text = lambda *values: np.array(values * 10, object)  # noqa: E731
    beside = {"a": text("0", "1", ""), "b": text("false", "true", "true"), "c": text("0", "2", "1"), "d": text("yes", "no", "")}
    beside["e"] = np.where(np.arange(30) < 9, "1", "0").astype(object)
    found = gate.binary_outcomes(beside)
    assert list(found) == ["a", "b"] and np.nansum(found["a"]) == 10 and np.isnan(found["a"]).sum() == 10


@pytest.fixture(scope="module")
def cohort(two_models):
    return two_models[0]


@pytest.fixture(scope="module")
def few(two_models):
    return two_models[1]


@pytest.fixture(scope="module")
def many(two_models):
    return two_models[2]


def outcomes(x: np.ndarray) -> dict[str, np.ndarray]:
    """Something that the labs tell of."""
    labs = gate._row_means(x[:, :4])
    return {"high": np.where(np.isnan(labs), np.nan, labs > np.nanmedian(labs))}


def test_nine_times_the_data_promote(cohort, few, many):
    x, place = fitting.records(cohort, many.schema)
    found, told = gate.compare(few, many, x, place, outcomes(x), SETTINGS)
    assert found["promoted"], found["reason"]
    assert set(found["modalities"]) == {"labs", "rna", "dx"} and found["outcomes"]["high"]["gain"] > 0
    back, _ = gate.compare(many, few, x, place, {}, SETTINGS)
    assert not back["promoted"] and back["reason"].startswith("kept: labs is worse by")
    for name, m in told.modalities.items():  # in units of what the champion's marginal loses, for both
        assert np.nanmean(m.marginal) == pytest.approx(1, abs=0.03), name
    own = gate.tell(many, x, place, {}, registry.read_record(many.url, "marginals"), 0)
    assert not np.allclose(own.modalities["rna"].loss, told.modalities["rna"].loss, equal_nan=True)


def test_the_same_model_is_kept(cohort, many):
    x, place = fitting.records(cohort, many.schema)
    found, told = gate.compare(many, many, x, place, {}, SETTINGS)
    assert not found["promoted"] and found["overall"] == {"gain": 0, "low": 0, "high": 0}
    whole = evaluate(many, x, gate.fold(place, 5), registry.read_record(many.url, "marginals"))
    for name, m in told.modalities.items():
        assert 1 - np.nanmean(m.loss) == pytest.approx(whole["modalities"][name]["skill"], abs=0.02)
        if name != "dx":
            assert np.nanmean(m.covered) == pytest.approx(whole["modalities"][name]["interval90"], abs=0.01)


def test_a_broken_modality_keeps_a_challenger(cohort, few, many):
    """Better in two modalities by far; what it says of the third is two deviations off."""
    broken = registry.load(many.url)
    with torch.no_grad():
        broken.module.stack.modalities[1].offset_EGD += 2
    x, place = fitting.records(cohort, many.schema)
    found, _ = gate.compare(few, broken, x, place, {}, SETTINGS)
    assert not found["promoted"] and "rna is worse by" in found["reason"] and found["modalities"]["labs"]["low"] > 0


def test_of_another_spec_only_what_is_the_same_is_compared(cohort, many, tmp_path):
    site = fitting.SPEC.modalities["dx"].model_copy(update={"levels": {"site": ("colon", "liver", "lung")}})
    spec = fitting.SPEC.model_copy(update={"modalities": {"rna": fitting.SPEC.modalities["rna"], "dx": site}})
    other = fitting.fit(str(tmp_path), cohort.slice(0, 400), spec, epochs=1)
    x, place = fitting.records(cohort, other.schema)
    as_before = gate.translated(x, other.schema, many.schema)
    given, _ = fitting.records(cohort, many.schema)
    assert np.isnan(as_before[:, :4]).all() and np.isnan(as_before[:, 12]).all()
    assert np.array_equal(as_before[:, 4:12], given[:, 4:12], equal_nan=True)
    found, told = gate.compare(many, other, x, place, {}, LOOSE)
    assert list(found["modalities"]) == ["rna"] and set(told.modalities) == {"rna", "dx"}
    assert found["promoted"] and found["reason"].startswith("promoted: the spec is another")


def test_of_another_spec_no_gain_is_asked_for():
    champion = {"labs": measured(losses(0)), "rna": measured(losses(1))}
    for worse, promoted in ((0.009, True), (0.021, False)):
        found = gate.decide(champion, {"rna": measured(losses(1) + worse), "new": measured(losses(2))}, {}, SETTINGS, same=False)
        assert found["promoted"] is promoted and list(found["modalities"]) == ["rna"]
    assert not gate.decide(champion, {"rna": measured(losses(1) + 0.009)}, {}, SETTINGS)["promoted"]


def test_nothing_to_compare():
    assert gate.decide({}, {"a": measured(losses(0))}, {}, SETTINGS, same=False)["promoted"]
    assert not gate.decide({}, {}, {}, SETTINGS)["promoted"]
