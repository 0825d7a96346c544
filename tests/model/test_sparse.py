"""Dense and sparse regressions together: against the definition with matrices, and against known truths."""

import math

import pytest
import torch
from cohorts import assembled_additive, everything, judged

from mmimpute.model import regression
from mmimpute.model.additive import WIDEST, picked
from mmimpute.model.regression import Regression
from mmimpute.model.sparse import PACE, THRESHOLD, Dense, single_out
from mmimpute.stacking import CODE_THRESHOLDS

ROWS, COLUMNS, VALUES, FEATURES = 300, 40, 60, 8
PENALTY = COLUMNS / 0.5  # dense weights explain half as much as the noise, whose variance is 1


def problem(seed: int, slope: float, rows: int = ROWS):
    """Targets that follow all columns a little, and one value of their own by `slope`; noise of variance 1."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    columns, values = draw(rows, COLUMNS) + 1.0, draw(rows, VALUES) + 2.0
    weight = torch.randn(COLUMNS, FEATURES, generator=torch.Generator().manual_seed(5)) * PENALTY**-0.5
    predictor = columns @ weight + slope * values[:, :FEATURES]
    return columns, values, predictor, predictor + draw(rows, FEATURES)


def fitted(columns, y, kind: str = "real", seen=None) -> Regression:
    which = [torch.full((y.shape[1],), kind == k) for k in ("real", "binary")]
    seen = torch.ones_like(y, dtype=torch.bool) if seen is None else seen
    return Regression(columns, torch.where(seen, y, 0.0), torch.where(seen, y, 0.0), seen, *which)


def singled_out(model: Regression, values, penalty: float = PENALTY) -> torch.Tensor:
    return model.single_out(values, penalty, model.solve(penalty, penalty), 0.75)


def test_no_value_stands_out_of_what_is_left():
    """By the definition: with K^1/2 as a matrix, the lasso's conditions hold to the size of a step."""
    columns, values, _, y = problem(1, 0.4)
    slope = singled_out(fitted(columns, y), values).double()
    x, v, t = (m.double() - m.double().mean(0) for m in (columns, values, y))
    keep = torch.eye(ROWS).double() - x @ torch.linalg.solve(x.T @ x + PENALTY * torch.eye(COLUMNS), x.T)
    eigenvalues, vectors = torch.linalg.eigh(keep)
    root = (vectors * eigenvalues.clamp_min(0).sqrt()) @ vectors.T
    left = root @ (t - v @ slope)
    score = (root @ v).T @ left / (root @ v).norm(dim=0)[:, None] / left.square().mean(0).sqrt()
    limit = THRESHOLD * math.sqrt(2 * math.log(VALUES))
    assert (slope != 0).any(0).all()
    assert score.abs().max() <= limit * (1 + 1e-4)
    chosen = slope.abs() > 0.02
    assert (score * slope.sign())[chosen].min() > limit * (1 - PACE) - 0.1


@pytest.mark.parametrize("threshold", [0.8, 1.0, 1.2])
def test_of_noise_the_largest_score_is_as_expected(threshold, monkeypatch):
    """Nothing to single out: V scores of variance 1."""
    columns, values, _, _ = problem(2, 0.0, rows=400)
    generator = torch.Generator().manual_seed(3)
    y = columns @ torch.randn(COLUMNS, 300, generator=generator) * PENALTY**-0.5 + torch.randn(400, 300, generator=generator)
    monkeypatch.setattr(regression, "THRESHOLD", threshold)
    share = float((singled_out(fitted(columns, y), values) != 0).any(0).float().mean())
    expected = 1 - math.erf(threshold * math.sqrt(math.log(VALUES))) ** VALUES
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 300))


def error(guess: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean square, but for a constant."""
    return float((guess - truth - (guess - truth).mean(0)).square().mean())


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("kind, much, bound", [("real", 0.8, 0.5), ("binary", 1.5, 0.7)])
def test_values_that_stand_out_are_found_and_predict_new_records(kind, much, bound, missing):
    found = {}
    for slope in (0.0, much):
        columns, values, predictor, y = problem(6, slope, 600)
        if kind == "binary":
            y = (torch.rand(y.shape, generator=torch.Generator().manual_seed(8)) < torch.sigmoid(predictor - predictor.mean(0))).float()
        model = fitted(columns, y, kind, torch.rand(y.shape, generator=torch.Generator().manual_seed(9)) >= missing)
        slope_VD = singled_out(model, values)
        dense, both = model.solve(PENALTY, PENALTY), model.solve(PENALTY, PENALTY, values @ slope_VD)
        new_columns, new_values, truth, _ = problem(7, slope)
        found[slope] = error(new_columns @ dense[0], truth), error(new_columns @ both[0] + new_values @ slope_VD, truth)
    assert slope_VD.abs().argmax(0).tolist() == list(range(FEATURES))
    assert found[much][1] < bound * found[much][0]
    assert found[0.0][1] < found[0.0][0] + 0.03


def test_what_the_dense_part_knows_already_is_left_to_it():
    """A value that is a sum of columns: a slope could grow for ever against weights that take it back."""
    columns, values, _, y = problem(1, 0.4)
    values[:, 0] = columns[:, :20].sum(1)
    slope_VD = singled_out(fitted(columns, y), values, 0.01)
    assert slope_VD[0].abs().max() < 0.05 < slope_VD[1:].abs().max()


def test_one_record_is_no_link_between_two_rare_codes():
    """A code of 4 of 1,000 records and a value of 4: one record with both, 60 times what chance gives, and all four."""
    code, values = torch.zeros(1000, 1), torch.zeros(1000, 400)
    code[:4], values[3:7, 0], values[:4, 1] = 1.0, 1.0, 1.0
    dense = Dense(torch.full((1000, 1), math.log(4 / 996)), code, torch.ones(1000, 1), None)
    once, always = single_out(values, dense, 0.3)[:2, 0].tolist()
    assert once == 0 and always > 2
    assert single_out(values[:, :1] * 0, dense, 0.3).tolist() == [[0.0]]


def test_values_are_picked_as_a_matrix_would():
    generator = torch.Generator().manual_seed(0)
    values, slope = torch.randn(2, 5, 7, generator=generator), torch.randn(2, 3, 4, generator=generator)
    source = torch.randint(7, (2, 3, 4), generator=generator)
    slope[:, :, 2] = 0.0
    expected = torch.einsum("ebv,evd->ebd", values, torch.zeros(2, 7, 3).scatter_add(1, source.mT, slope.mT))
    torch.testing.assert_close(picked(values, source, slope), expected)
    assert not picked(values, source, torch.zeros_like(slope)).any()


def test_a_wide_modalitys_single_values_reach_the_expert():
    """Each of two numbers is one of 200 features plus noise, which components do not show; and a wide feature follows one of them."""
    generator = torch.Generator().manual_seed(1)
    width = WIDEST + 40
    wide = torch.randn(260, width, generator=generator)
    narrow = 0.9 * wide[:, [7, 150]] + 0.44 * torch.randn(260, 2, generator=generator)
    x = [narrow, wide]
    model, new = assembled_additive([v[:200] for v in x], ["real", "real"]).imputer, [v[200:] for v in x]
    with torch.no_grad():
        read = model.linear(model.vae.inputs(new, everything(new)))[1:]
        numbers, genes = (model.additive(j, *read).mean(0) for j in (0, 1))
    assert (numbers - new[0]).square().mean() < 0.4
    assert (genes - new[1])[:, [7, 150]].square().mean() < 0.4
    followed = model.additive.source_0[0, :, 0].tolist(), model.additive.slope_0[0, :, 0]
    assert followed[0] == [7, 150] and (followed[1] > 0.5).all()
    assert not model.additive.slope_1.any()  # all that it follows is narrow, and so among the dense weights


@pytest.mark.parametrize("slope, expected", [(0.0, max(CODE_THRESHOLDS)), (3.0, min(CODE_THRESHOLDS))])
def test_the_judges_say_how_far_codes_have_to_stand_out(slope, expected, monkeypatch):
    """Codes that follow nothing, or one code each."""
    generator = torch.Generator().manual_seed(2)
    causes = (torch.rand(600, 60, generator=generator) < 0.3).float()
    codes = (torch.rand(600, 6, generator=generator) < torch.sigmoid(slope * causes[:, :6] - 1.5)).float()
    assert judged(monkeypatch, "_best_settings", [causes, codes], ["binary", "binary"])[1] == (expected, False)
