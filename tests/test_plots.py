"""Plots for notebooks: the numbers that they are drawn from, and nobody in them who may not be."""

import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from mmimpute import jobs, plots
from mmimpute.data.split import fold, position
from mmimpute.errors import UserError
from mmimpute.estimator import MultiModalImputer
from mmimpute.evaluation import evaluate
from mmimpute.report import figures, render
from mmimpute.spec import ClusterSettings
from tests.test_report import a_run

ROWS = 300
FEW = 7  # people of the smallest site, and of the rarest pattern


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """Three labs and two codes that follow one latent; a site of 7 people, and 7 others who have neither labs nor codes."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=ROWS)
    found = pd.DataFrame(z[:, None] + 0.4 * rng.normal(size=(ROWS, 3)), columns=["a", "b", "c"])
    found["code"], found["smoker"] = (z + 0.5 * rng.normal(size=(2, ROWS)) > 0).astype(float)
    found.loc[:99, ["a", "b", "c"]] = np.nan
    found.loc[100 : 100 + FEW - 1, ["a", "b", "c", "code", "smoker"]] = np.nan
    found["site"] = np.where(np.arange(ROWS) < ROWS - FEW, np.where(z > 0, "north", "south"), "tiny")
    return found


@pytest.fixture(scope="module")
def imputer(frame) -> MultiModalImputer:
    return MultiModalImputer({"labs": ["a", "b", "c"], "dx": ["code", "smoker"]}, epochs=2).fit(frame)


@pytest.fixture(scope="module")
def evaluation(imputer, frame) -> dict:
    return imputer.evaluate(frame)


def test_patterns_are_counted_and_rare_ones_left_out(imputer, frame):
    held, people = plots.missingness(imputer, frame).axes
    assert [bar.get_width() for bar in people.patches] == [190, 100]
    assert [t.get_text() for t in held.get_xticklabels()] == ["labs", "dx"]
    missing, present = held.lines
    assert missing.get_xydata().tolist() == [[0, 1]]
    assert sorted(present.get_xydata().tolist()) == [[0, 0], [1, 0], [1, 1]]


def test_fitted_rows_are_judged_by_the_member_that_did_not_see_them(imputer, frame, evaluation):
    x = np.concatenate(list(imputer.records(frame).values()), 1).astype(np.float32)
    folds = fold(position(pa.array(range(ROWS))), 5)
    assert evaluation == evaluate(imputer.model_, x, folds, imputer.marginals_)
    assert evaluation["modalities"]["labs"]["skill"] > 0


def test_training_curves_of_both_kinds_of_history(imputer):
    axes = plots.training(imputer.history_).axes[0]
    assert axes.lines[0].get_ydata().tolist() == [epoch["loss"] for epoch in imputer.history_]
    assert axes.lines[0].get_xdata().tolist() == [1, 2]
    first = {"epoch": 1, "elbo": -3.0, "tune_elbo": -4.0, "tune_loss": 0.9}
    learnt, others = plots.training([first, {"epoch": 2, "elbo": -2.0, "tune_elbo": -3.5, "tune_loss": 0.8}], "elbo").axes[0].lines[:2]
    assert (learnt.get_ydata().tolist(), others.get_ydata().tolist()) == ([-3.0, -2.0], [-4.0, -3.5])


def test_calibration_and_skill_are_the_evaluations(evaluation):
    through_json = json.loads(json.dumps(evaluation))
    coverage, _ = plots.calibration(through_json, "labs").axes
    assert coverage.lines[1].get_ydata().tolist() == evaluation["modalities"]["labs"]["calibration"]["observed"]
    (reliability,) = plots.calibration(evaluation, "dx").axes
    assert reliability.get_xlabel() == "predicted probability"
    skills = [m["skill"] for m in evaluation["modalities"].values()]
    assert [bar.get_width() for bar in plots.skill(evaluation).axes[0].patches] == sorted(skills, reverse=True)
    assert len(plots.skill(evaluation, "labs").axes[0].patches) == 3


def test_the_report_draws_what_the_plots_draw():
    """The very SVG of a plot of the run's evaluation is in the report's page, but for the numbers of its ids and what it reads out."""
    evaluation = a_run()["evaluation"]
    drawn = figures.svg(plots.imputed_and_observed(evaluation, "labs", "LBXSAL"), "f1", "")
    body = drawn[drawn.index(">") + 1 :]
    assert body in re.sub(r'(["#])f\d+-', r"\1f1-", render({"evaluation": evaluation}))


def test_imputed_and_observed(evaluation):
    assert plots.imputed_and_observed(evaluation, "labs", "a").axes[0].get_title("left") == "a"


def test_a_small_group_moves_nothing(imputer, frame):
    """The map without the people of a small site is the map."""
    whole, without = (plots.latent(imputer, f, f["site"]) for f in (frame, frame[frame["site"] != "tiny"]))
    assert [c.get_label() for c in whole.axes[0].collections] == [c.get_label() for c in without.axes[0].collections]
    for a, b in zip(whole.axes[0].collections, without.axes[0].collections, strict=True):
        np.testing.assert_allclose(a.get_offsets(), b.get_offsets(), atol=1e-5)


def test_the_axes_are_principal_components(imputer, frame):
    z0 = imputer.embed(frame)
    reference = PCA(2).fit(z0)
    places, shares = plots._components(z0, np.full(ROWS, True))
    np.testing.assert_allclose(shares, reference.explained_variance_ratio_, rtol=1e-4)
    np.testing.assert_allclose(np.abs(places), np.abs(reference.transform(z0)), atol=1e-3)


@given(st.integers(10, 200), st.integers(0, 5))
def test_every_dot_is_ten_to_nineteen_people(rows, seed):
    places = np.random.default_rng(seed).normal(size=(rows, 2))
    mean, people = plots._dots(places)
    assert people.sum() == rows and (people >= 10).all() and (people < 20).all()
    np.testing.assert_allclose(people @ mean, places.sum(0))


def test_labels_of_numbers_are_cut_and_none_is_left_out(imputer, frame):
    label = pd.Series(np.arange(ROWS, dtype=float)).mask(frame.index < 40)
    shown = plots.latent(imputer, frame, label).axes[0].collections
    assert len(shown) == 4
    assert sum(int(c.get_sizes().sum()) for c in shown) == 2 * (ROWS - 40)


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda i, f, e: plots.training(i.history_, "kl"), "no term 'kl' of training; valid: loss, impute, elbo"),
        (lambda i, f, e: plots.calibration(e, "rna"), "no modality 'rna' in this evaluation; it has labs, dx"),
        (lambda i, f, e: plots.imputed_and_observed(e, "labs", "x"), "no distribution of 'x' in modality 'labs'; there are "),
        (lambda i, f, e: plots.latent(i, f, range(ROWS // 10)[:0]), "no group of 10 people or more to show"),
    ],
)
def test_what_is_not_there_is_named(imputer, frame, evaluation, draw, said):
    with pytest.raises(UserError, match=said.replace("'", ".")):
        draw(imputer, frame, evaluation)


def test_no_pyplot_and_nothing_before_it_is_used():
    code = """import sys, mmimpute
early = "matplotlib" in sys.modules
mmimpute.plots
print(early, "matplotlib.pyplot" in sys.modules, "ray" in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False"] * 3
    assert isinstance(plots.training([{"epoch": 1, "tune_loss": 1.0}]), Figure)


def test_a_model_of_memory_cannot_be_evaluated_on_shards(imputer, tmp_path):
    """Its folds are by row number: people whom it knows would count as unseen."""
    with pytest.raises(UserError, match="fitted in memory"):
        jobs.evaluate_model(None, imputer.save(str(tmp_path)), ClusterSettings())
