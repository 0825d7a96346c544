"""The regressions against scikit-learn, and the penalties of components against their definition."""

import pytest
import torch
from cohorts import judged
from sklearn.linear_model import LogisticRegression, Ridge

from mmimpute.model import regression
from mmimpute.model.regression import Regression, component_penalties
from mmimpute.model.sparse import THRESHOLD

SHAPES = [(240, 30), (40, 90)]  # more records than columns, and fewer
FEATURES = 4


def problem(rows: int, columns: int, kind: str, missing: float = 0.0):
    """Columns with a mean and different scales, targets that follow them, and which targets are there."""
    generator = torch.Generator().manual_seed(rows)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    c = draw(rows, columns) * torch.linspace(0.2, 2, columns) + draw(columns)
    y = (c - c.mean(0)) @ draw(columns, FEATURES) / columns**0.5 + draw(rows, FEATURES) + torch.linspace(-0.5, 1, FEATURES)
    y = y if kind == "real" else (y > 0).float()
    return c, y, torch.rand(y.shape, generator=generator) >= missing


def solved(c, y, seen, kind: str, penalty: float, apart: bool = False):
    which = [torch.full((y.shape[1],), kind == k) for k in ("real", "binary")]
    weight, bias = Regression(c, torch.where(seen, y, 0.0), torch.where(seen, y, 0.0), seen, *which).solve(penalty, penalty, apart=apart)
    return weight, bias, c @ weight + bias


def reference(c, y, seen, kind: str, penalty: float) -> torch.Tensor:
    """scikit-learn's linear predictors, each feature fitted to the records that hold it."""
    out = []
    for y_N, seen_N in zip(y.T.double(), seen.T, strict=True):
        chance = y_N[seen_N].mean()
        logistic = LogisticRegression(C=float(1 / (penalty * chance * (1 - chance))), tol=1e-8, max_iter=2000)
        model = (Ridge(penalty) if kind == "real" else logistic).fit(c.double().numpy()[seen_N], y_N[seen_N].numpy())
        out.append(torch.tensor(c.double().numpy() @ model.coef_.ravel() + model.intercept_).float())
    return torch.stack(out, 1)


@pytest.mark.parametrize("penalty", [30.0, 1000.0])
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_complete_real_targets_give_the_ridge_regression(rows, columns, penalty):
    c, y, seen = problem(rows, columns, "real")
    torch.testing.assert_close(solved(c, y, seen, "real", penalty)[2], reference(c, y, seen, "real", penalty), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("penalty", [100.0, 1000.0])
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_binary_targets_give_the_logistic_regression(rows, columns, penalty, missing):
    """The penalty is in units of the feature's variance, that of a ridge regression with the same pull."""
    c, y, seen = problem(rows, columns, "binary", missing)
    found, expected = solved(c, y, seen, "binary", penalty)[2], reference(c, y, seen, "binary", penalty)
    assert (expected - expected.mean(0)).std() > 0.02
    torch.testing.assert_close(found, expected, rtol=0, atol=0.005)


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_missing_real_targets_approach_the_ridge_regression_of_the_others(rows, columns, monkeypatch):
    c, y, seen = problem(rows, columns, "real", 0.4)
    expected = reference(c, y, seen, "real", 100.0)
    errors = []
    for steps in (1, 2, regression.MASKED_STEPS, 300):
        monkeypatch.setattr(regression, "MASKED_STEPS", steps)
        errors.append(float((solved(c, y, seen, "real", 100.0)[2] - expected).std() / expected.std()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.05 and errors[3] < 1e-3


@pytest.mark.parametrize("kind", ["real", "binary"])
def test_fewer_records_than_columns_solve_the_same_problem(kind):
    """Columns of zeros change nothing but the way of solving."""
    c, y, seen = problem(60, 20, kind, 0.2)
    weight, bias, _ = solved(c, y, seen, kind, 300.0)
    padded, padded_bias, _ = solved(torch.cat([c, torch.zeros(60, 60)], 1), y, seen, kind, 300.0)
    torch.testing.assert_close(padded[:20], weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(padded_bias, bias, rtol=1e-3, atol=1e-3)
    assert padded[20:].abs().max() < 1e-6


def test_both_kinds_are_solved_side_by_side():
    """Other kinds keep weights of zero."""
    c, real, seen = problem(*SHAPES[0], "real")
    y = torch.cat([real[:, :2], (real > 0).float(), real[:, 2:]], 1)
    kinds = torch.tensor([1, 1, 2, 2, 2, 2, 0, 0])
    weight, bias = Regression(c, y, y, torch.ones_like(y, dtype=torch.bool), kinds == 1, kinds == 2).solve(100.0, 100.0)
    torch.testing.assert_close(weight[:, :2], solved(c, real, seen, "real", 100.0)[0][:, :2])
    torch.testing.assert_close(weight[:, 2:6], solved(c, y[:, 2:6], seen, "binary", 100.0)[0])
    assert not weight[:, 6:].any() and not bias[6:].any()


@pytest.mark.parametrize("apart", [False, True])
def test_targets_that_say_nothing_get_their_mean(apart):
    """Never observed, constant, or one record only."""
    c, y, seen = problem(30, 5, "real")
    y[:, 1], seen[:, 0], seen[1:, 2] = 2.0, False, False
    found = solved(c, y, seen, "real", 30.0, apart)[2]
    torch.testing.assert_close(found[:, :2], torch.tensor([0.0, 2.0]).expand(30, 2), rtol=1e-5, atol=1e-5)
    assert (found[:, 2] - y[0, 2]).abs().max() < 0.05
    single = solved(c[:1], y[:1], torch.ones_like(seen[:1]), "real", 30.0, apart)
    assert not single[0].any() and torch.equal(single[1], y[0])


# -- principal components of targets ------------------------------------------------------------------------------------


def test_a_components_penalty_is_its_posterior_mean():
    """By the definition: on a grid of penalties, the density of N(0, sigma^2 (I + X X' / penalty)), sigma at its best, times the prior."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(50, 12, generator=generator, dtype=torch.double)
    y = torch.stack([x @ torch.randn(12, generator=generator, dtype=torch.double) * much for much in (0.0, 0.3, 3.0)], 1)
    y += torch.randn(50, 3, generator=generator, dtype=torch.double)
    values, axes = torch.linalg.eigh(x.T @ x)
    found = component_penalties((x @ axes).T @ y, y.square().sum(0), values[:, None], 50, 8.0)
    expected = []
    for y_N in y.T:
        log_factor, log_chance = torch.linspace(*regression.PENALTY_RANGE).double(), []
        for f in log_factor:
            covariance = torch.eye(50).double() + x @ x.T / (8.0 * f.exp())
            scale = (y_N @ torch.linalg.solve(covariance, y_N) / 50).sqrt()
            likelihood = torch.distributions.MultivariateNormal(torch.zeros(50).double(), scale**2 * covariance).log_prob(y_N)
            log_chance.append(likelihood + torch.distributions.Normal(0.0, 1.0).log_prob(f))
        expected.append(8.0 * (torch.stack(log_chance).softmax(0) * log_factor).sum().exp())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=0)
    assert found[0] > 2 * found[1] > 4 * found[2]


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_components_of_one_penalty_are_the_ridge_regression(rows, columns, monkeypatch):
    """What single values explain is taken off before."""
    c, y, seen = problem(rows, columns, "real")
    explained = c[:, :FEATURES] * 0.3
    monkeypatch.setattr(regression, "PENALTY_RANGE", (0.0, 0.0, 1))
    which = [torch.full((FEATURES,), kind) for kind in (True, False)]
    weight, bias = Regression(c, y, y, seen, *which).solve(100.0, 100.0, explained, apart=True)
    torch.testing.assert_close(c @ weight + bias, reference(c, y - explained, seen, "real", 100.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared, bound", [(1.0, 0.6), (0.0, 1.05)])
def test_what_features_share_is_foretold_better_than_with_one_penalty(shared, bound):
    """New records' errors. 60 features: a sum of columns that all follow, a little of other columns each, and noise; or nothing shared."""
    generator = torch.Generator().manual_seed(6)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    c, features = draw(2000, 50), 60
    truth = shared * (c @ draw(50, 1) / 50**0.5) @ draw(1, features) + c @ draw(50, features) * 0.03
    y = truth + draw(2000, features)
    kinds = torch.ones(features, dtype=torch.bool), torch.zeros(features, dtype=torch.bool)
    model = Regression(c[:150], y[:150], y[:150], torch.ones(150, features, dtype=torch.bool), *kinds)

    def error(penalty: float, apart: bool) -> float:
        weight, bias = model.solve(penalty, penalty, apart=apart)
        return float((c[150:] @ weight + bias - truth[150:]).square().mean())

    one = {penalty: error(penalty, False) for penalty in (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)}
    best = min(one, key=one.get)
    assert error(best, True) < bound * one[best]


def test_where_features_share_what_can_be_foretold_judges_take_components(monkeypatch):
    """In the model: two modalities, one number of the first in all 40 of the second."""
    generator = torch.Generator().manual_seed(9)
    causes = torch.randn(300, 10, generator=generator)
    features = causes @ torch.randn(10, 1, generator=generator) * 0.3 + torch.randn(300, 40, generator=generator)
    chosen = judged(monkeypatch, "_best_settings", [causes, features], ["real", "real"])
    assert len(chosen) == 2 and chosen[1][1]


@pytest.mark.parametrize("what, expected", [("_best_penalties", (1.0, 1.0)), ("_best_settings", (THRESHOLD, False))])
def test_where_nobody_judges_regressions_are_careful(what, expected, monkeypatch):
    """No record of member 0's fold: that the weakest penalty and the lowest threshold err as little as any must not choose them."""
    generator = torch.Generator().manual_seed(10)
    numbers = torch.randn(60, 5, generator=generator)
    x = [numbers, (numbers + torch.randn(60, 5, generator=generator) > 0).float()]
    assert judged(monkeypatch, what, x, ["real", "binary"], torch.ones(60, dtype=torch.long)) == [expected, expected]
