"""The additive expert against scikit-learn, and what its columns say."""

import pytest
import torch
from cohorts import CONFIG, linked, masks, mixed_model, mixed_values
from sklearn.linear_model import LogisticRegression, Ridge

from mmimpute.model import ModalityConfig, ModelConfig, MultiModalVAE, additive
from mmimpute.model.additive import WIDEST, Regression
from mmimpute.model.gaussian import kept_components
from mmimpute.model.imputer import Imputer
from mmimpute.model.networks import CLIP
from mmimpute.model.standardise import FeatureStatistics
from mmimpute.stacking import Assembly, fit_additive, fit_gaussian

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


def solved(c, y, seen, kind: str, penalty: float):
    which = [torch.full((y.shape[1],), kind == k) for k in ("real", "binary")]
    weight, bias = Regression(c, torch.where(seen, y, 0.0), torch.where(seen, y, 0.0), seen, *which).solve(penalty, penalty)
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
    for steps in (1, 2, additive.MASKED_STEPS, 300):
        monkeypatch.setattr(additive, "MASKED_STEPS", steps)
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


def test_targets_that_say_nothing_get_their_mean():
    """Never observed, constant, or one record only."""
    c, y, seen = problem(30, 5, "real")
    y[:, 1], seen[:, 0], seen[1:, 2] = 2.0, False, False
    found = solved(c, y, seen, "real", 30.0)[2]
    torch.testing.assert_close(found[:, :2], torch.tensor([0.0, 2.0]).expand(30, 2), rtol=1e-5, atol=1e-5)
    assert (found[:, 2] - y[0, 2]).abs().max() < 0.05
    single = solved(c[:1], y[:1], torch.ones_like(seen[:1]), "real", 30.0)
    assert not single[0].any() and torch.equal(single[1], y[0])


# -- the expert in the model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    torch.set_num_threads(1)
    x = linked(mixed_values(200))
    data = Assembly(mixed_model(members=2), x, masks(x, share=0.9), torch.arange(200) % 2)
    fit_gaussian(data)
    fit_additive(data)
    return data.imputer, linked(mixed_values(30, seed=7), seed=7)


def said(model: Imputer, x, observed, j: int) -> torch.Tensor:
    with torch.no_grad():
        return model.additive(j, *model.linear(model.vae.inputs(x, observed))[1:])


@pytest.mark.parametrize("j", range(3))
def test_a_modality_is_not_read_to_predict_itself(fitted, j):
    """Whatever its own values are, and whether they are there or not; the other modalities' count."""
    model, x = fitted
    complete = [torch.ones_like(v, dtype=torch.bool) for v in x]
    hidden = [o if i != j else ~o for i, o in enumerate(complete)]
    gaps = [o if i != j else torch.rand(o.shape) < 0.5 for i, o in enumerate(complete)]
    other = [v if i != j else v.flip(0) for i, v in enumerate(x)]
    expected = said(model, x, complete, j)
    for values, observed in ((other, complete), (x, hidden), (x, gaps)):
        assert torch.equal(said(model, values, observed, j), expected)
    rest = [v if i == j else v.flip(0) for i, v in enumerate(x)]
    mixed = getattr(model, f"mixed_{j}")
    assert ((said(model, rest, complete, j) - expected).abs().amax((0, 1)) > 1e-3)[mixed].all()
    assert not expected[..., ~mixed].any()


def test_missing_inputs_are_the_gaussians_conditional_means(fitted):
    """A modality's columns are those of the values that the Gaussian expert put in, with a flag that tells so."""
    model, x = fitted
    observed = [torch.ones_like(v, dtype=torch.bool) for v in x]
    observed[1] = ~observed[1]
    filled, columns, _ = model.linear(model.vae.inputs(x, observed))
    block = columns[..., model.additive.own(1)]
    part = filled.split(model.gaussian.sizes, -1)[1]
    assert (block[..., -1] == -0.5).all()
    for e in range(2):
        values = [v if j != 1 else model.vae.standardise[1].inverse(part[e]) for j, v in enumerate(x)]
        complete = [torch.ones_like(v, dtype=torch.bool) for v in x]
        expected = model.linear(model.vae.inputs(values, complete))[1][e][..., model.additive.own(1)]
        torch.testing.assert_close(block[e][..., :-1], expected[..., :-1], rtol=1e-3, atol=1e-3)
        assert (expected[..., -1] == 0.5).all()


def test_a_wide_modality_is_read_by_its_components():
    config = ModelConfig(
        (ModalityConfig("n", ("real",) * 2), ModalityConfig("w", ("real",) * (WIDEST + 1))), shared=8, hidden=16, decoder=16
    )
    vae = MultiModalVAE(config, {m.name: FeatureStatistics.blank(m.width) for m in config.modalities})
    kept = kept_components(config, 400)
    model = Imputer(vae, kept).eval()
    w = torch.randn(50, 20) @ torch.randn(20, WIDEST + 1)
    component = model.gaussian.components[1]
    component.fit(0, w)
    observed = [torch.ones(50, 2, dtype=torch.bool), torch.ones(50, WIDEST + 1, dtype=torch.bool)]
    _, columns, values = model.linear(vae.inputs([torch.randn(50, 2), w], observed))
    block = columns[0][:, model.additive.own(1)]
    assert block.shape == (50, kept[1] + 1)
    torch.testing.assert_close(block[:, :-1] @ component.basis_EDQ[0].T + component.mean_E1D[0], w, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(values[0], w.clamp(-CLIP, CLIP))


def test_a_clipped_input_says_no_more():
    """Values beyond CLIP standard deviations are read as if they were there, as the encoders do."""
    model, x = mixed_model(), mixed_values(20)
    imputer = Imputer(model, [0] * len(CONFIG.modalities)).eval()
    observed = [torch.ones_like(v, dtype=torch.bool) for v in x]
    columns = []
    for far in (1e3, 1e5):
        x[1][:, 2] = far
        columns.append(imputer.linear(model.inputs(x, observed))[1])
    assert torch.equal(*columns)
