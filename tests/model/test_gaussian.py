"""The Gaussian expert against numpy: maximum likelihood with missing values, conditional means, components."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from mmimpute.model import ModalityConfig, ModelConfig, gaussian
from mmimpute.model.gaussian import Components, Gaussian, fit_normal, kept_components

PARTS = 8
RIDGE = 1e-3  # of the variances, at every step of the fit


def known_normal(parts: int = PARTS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A mean and a covariance with strong correlations and different scales."""
    draw = np.random.default_rng(seed)
    loadings = draw.normal(size=(parts, 2))
    scale = np.exp(draw.normal(size=parts) / 2)
    return draw.normal(size=parts), (loadings @ loadings.T + 0.3 * np.eye(parts)) * np.outer(scale, scale)


def records(rows: int, seed: int = 1, missing: float = 0.4) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws of the known normal, and which of their parts are known."""
    draw = np.random.default_rng(seed)
    y = torch.tensor(draw.multivariate_normal(*known_normal(), size=rows))
    return y, torch.tensor(draw.random(y.shape) >= missing)


def log_likelihood(y, known, mean, covariance) -> float:
    """Of the known parts."""
    total = 0.0
    for pattern in torch.unique(known, dim=0).numpy():
        rows = (known.numpy() == pattern).all(1)
        if pattern.any():
            total += multivariate_normal(mean[pattern], covariance[np.ix_(pattern, pattern)]).logpdf(y.numpy()[rows][:, pattern]).sum()
    return total


def error(found: torch.Tensor, expected: np.ndarray, scale: np.ndarray) -> float:
    return float(np.abs((found.numpy() - expected) / scale).max())


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_complete_records_give_the_sample_moments(shrinkage):
    y, known = records(200, missing=0)
    mean, covariance = fit_normal(y, known, shrinkage)
    expected = y.T.cov(correction=0) * (1 - shrinkage)
    torch.testing.assert_close(mean, y.mean(0))
    torch.testing.assert_close(covariance, expected + torch.diag(y.var(0, correction=0) * (1 + RIDGE) - expected.diagonal()))


@pytest.mark.parametrize("depends", [False, True])
def test_records_with_missing_values_give_the_normal(depends):
    """Also where what is missing depends on what is known, which biases every statistic of the known values alone."""
    mean, covariance = known_normal()
    y, known = records(6000)
    if depends:
        known &= (y[:, -1:] < mean[-1]) | (torch.rand(len(y), 1) < 0.5)
        known[:, -1] = True
        alone = (torch.where(known, y, 0.0).sum(0) / known.sum(0)).numpy()
        assert np.abs((alone - mean) / np.sqrt(np.diag(covariance))).max() > 0.2
    found, found_covariance = fit_normal(torch.where(known, y, 1e3), known, 0.0)
    scale = np.sqrt(np.diag(covariance))
    assert error(found, mean, scale) < 0.08
    assert error(found_covariance, covariance, np.outer(scale, scale)) < 0.12


def test_every_step_raises_the_likelihood(monkeypatch):
    """The property that defines expectation-maximisation; it holds without the ridge and the shrinkage."""
    y, known = records(120)
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(gaussian, "_shrunk", lambda covariance, shrinkage: covariance)
        for steps in range(gaussian.ITERATIONS + 1):
            patch.setattr(gaussian, "ITERATIONS", steps)
            found.append(log_likelihood(y, known, *(t.numpy() for t in fit_normal(y, known, 0.0))))
    assert (np.diff(found) > 0).all()
    shipped = log_likelihood(y, known, *(t.numpy() for t in fit_normal(y, known, 0.0)))
    assert shipped > log_likelihood(y, known, *known_normal())  # the truth is not the most likely
    assert shipped == pytest.approx(found[-1], abs=3e-3 * len(y))


@pytest.mark.parametrize("rows", [12, 6000])
def test_pairwise_moments_are_positive_definite_and_close(rows, monkeypatch):
    monkeypatch.setattr(gaussian, "MOST_WORK", 0)
    mean, covariance = known_normal()
    y, known = records(rows)
    found, found_covariance = fit_normal(torch.where(known, y, 1e3), known, 0.0)
    assert np.linalg.eigvalsh(found_covariance).min() > 0
    torch.testing.assert_close(found_covariance, found_covariance.T)
    if rows == 12:  # few enough for the raw moments to be those of no normal
        seen = known.double()
        centred = (y - (y * seen).sum(0) / seen.sum(0)) * seen
        assert np.linalg.eigvalsh(centred.T @ centred / (seen.T @ seen).clamp_min(1)).min() < 0
    else:
        scale = np.sqrt(np.diag(covariance))
        assert error(found, mean, scale) < 0.06
        assert error(found_covariance, covariance, np.outer(scale, scale)) < 0.1


# -- conditional means --------------------------------------------------------------------------------------------------


def narrow(members: int = 2) -> Gaussian:
    """Two modalities, which split a normal of its own for every member."""
    config = ModelConfig((ModalityConfig("a", ("real",) * 3), ModalityConfig("b", ("real",) * (PARTS - 3))), members=members)
    model = Gaussian(config, [0, 0])
    for e in range(members):
        mean, covariance = known_normal(seed=e)
        model.mean_EP[e], model.covariance_EPP[e] = torch.tensor(mean), torch.tensor(covariance)
    return model


def conditional_mean(y: np.ndarray, known: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    out = np.where(known, y, mean)
    if known.any() and not known.all():
        gain = np.linalg.solve(covariance[np.ix_(known, known)], covariance[np.ix_(known, ~known)])
        out[~known] += (y[known] - mean[known]) @ gain
    return out


def some_patterns(rows: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Records of every density of known parts: the first knows nothing, the second everything."""
    y, _ = records(rows)
    known = torch.rand(rows, PARTS) < torch.linspace(0, 1, rows)[:, None]
    known[0], known[1] = False, True
    return y.float(), known


@pytest.mark.parametrize("tolerance", [gaussian.TOLERANCE, 1e-4])
def test_conditional_means_are_exact_to_the_solvers_tolerance(tolerance, monkeypatch):
    monkeypatch.setattr(gaussian, "TOLERANCE", tolerance)
    y, known = some_patterns()
    found = narrow()(y.expand(2, -1, -1), known)
    for e in range(2):
        mean, covariance = known_normal(seed=e)
        expected = [conditional_mean(*pair, mean, covariance) for pair in zip(y.double().numpy(), known.numpy(), strict=True)]
        assert error(found[e], np.array(expected), np.sqrt(np.diag(covariance))) < 2 * tolerance
        assert torch.equal(found[e][known], y[known])
        torch.testing.assert_close(found[e, 0], torch.tensor(mean).float())


def test_what_stands_in_unknown_parts_changes_nothing():
    y, known = some_patterns()
    model = narrow()
    first, second = (model(torch.where(known, y, fill).expand(2, -1, -1), known) for fill in (0.0, 1e6))
    assert torch.equal(first, second)


def test_a_record_does_not_depend_on_its_neighbours():
    """Beyond rounding, which conjugate gradients amplify up to their tolerance."""
    y, known = some_patterns()
    model = narrow()
    together = model(y.expand(2, -1, -1), known)
    alone = torch.cat([model(y[i : i + 1].expand(2, -1, -1), known[i : i + 1]) for i in range(len(y))], 1)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


def test_categorical_features_take_no_part():
    config = ModelConfig((ModalityConfig("a", ("real", "categorical", "real"), (0, 5, 0)),))
    model = Gaussian(config, [0])
    model.covariance_EPP[0] = 0.5 + 0.5 * torch.eye(3)
    z = torch.tensor([[1.0, -2.0, 0.0], [1.0, 2.0, 0.0]])
    parts, known = model.parts([z], [torch.tensor([[True, True, False]]).expand(2, 3)])
    assert known.tolist() == [[True, False, False]] * 2
    torch.testing.assert_close(model(parts, known)[0], torch.tensor([[1.0, 0.5, 0.5]]).expand(2, 3))


# -- wide modalities ----------------------------------------------------------------------------------------------------

WIDTH = gaussian.NARROW + 5
KINDS = ("real",) * WIDTH


def test_components_restore_what_lies_in_their_span():
    z = 0.2 * (torch.randn(60, 3) @ torch.randn(3, WIDTH) + torch.randn(WIDTH))  # as standardised values, less than CLIP
    component = Components(2, KINDS, kept=20)
    component.fit(1, z)
    torch.testing.assert_close(component.restore(component.scores(z)[..., : component.parts])[1], z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(component.basis_EDQ[1].T @ component.basis_EDQ[1], torch.eye(20), rtol=1e-4, atol=1e-4)
    assert not component.basis_EDQ[0].any() and not component.mean_E1D[0].any()


def test_one_absurd_value_of_a_wide_modality_counts_as_far_as_the_clip():
    z = torch.randn(60, WIDTH)
    component = Components(1, KINDS, kept=20)
    component.fit(0, z)
    wrong, clipped = z.clone(), z.clone()
    wrong[0, 0], clipped[0, 0] = 1e6, gaussian.CLIP
    torch.testing.assert_close(component.scores(wrong), component.scores(clipped))
    again = Components(1, KINDS, kept=20)
    again.fit(0, wrong)
    component.fit(0, clipped)
    assert torch.equal(again.basis_EDQ, component.basis_EDQ)


def test_a_rare_code_of_a_wide_modality_lies_as_far_as_it_does():
    z = torch.randn(60, WIDTH)
    z[0, :2] = 10.0  # a code of 1 in 100, and a number
    component = Components(1, ("binary", *KINDS[1:]), kept=20)
    component.fit(0, z)
    torch.testing.assert_close(component.mean_E1D[0, 0, :2] * 60 - z[1:, :2].sum(0), torch.tensor([10.0, gaussian.CLIP]))
    code, number = (component.scores(z * (torch.arange(WIDTH) == d))[0, 0] + component.mean_E1D[0] @ component.basis_EDQ[0] for d in (0, 1))
    torch.testing.assert_close(code, 10 * component.basis_EDQ[:1, 0])
    torch.testing.assert_close(number, gaussian.CLIP * component.basis_EDQ[:1, 1])


def test_a_wide_modality_with_gaps_is_known_value_by_value():
    config = ModelConfig(tuple(ModalityConfig(name, ("real",) * WIDTH) for name in "ab"))
    assert kept_components(config, 100, [True, False]) == [0, WIDTH]


def test_what_was_constant_where_it_was_learnt_does_not_hide_the_rest():
    """A value 5 from a constant: conjugate gradients still tell of the other parts what the exact solution does."""
    parts = 20
    covariance = 0.5 + 0.5 * torch.eye(parts)
    y = torch.distributions.MultivariateNormal(torch.zeros(parts), covariance).sample((2_000,))
    y = torch.cat([torch.zeros(2_000, 1), y], 1)
    known = torch.ones_like(y, dtype=torch.bool)
    model = Gaussian(ModelConfig((ModalityConfig("a", ("real",) * (parts + 1)),)), [0])
    model.mean_EP[0], model.covariance_EPP[0] = fit_normal(y, known, 0.0)
    asked = torch.rand(known.shape) < 0.6
    asked[:, 0] = True
    y[:, 0] = 5.0
    error = torch.where(asked, 0.0, model(torch.where(asked, y, 0.0)[None], asked)[0] - y).square().sum() / (~asked).sum()
    y[:, 0] = 0.0
    least = torch.where(asked, 0.0, model(torch.where(asked, y, 0.0)[None], asked)[0] - y).square().sum() / (~asked).sum()
    assert error < 1.05 * least


def test_components_are_the_leading_ones():
    z = torch.randn(300, WIDTH) * torch.linspace(1, 0.03, WIDTH)
    component = Components(1, KINDS, kept=10)
    component.fit(0, z)
    expected = torch.linalg.eigvalsh(z.T.cov(correction=0)).flip(0)[:10]
    torch.testing.assert_close(component.scores(z)[0].var(0, correction=0), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows, kept", [(0, 0), (1, 1), (10, 5)])
def test_few_records_leave_components_of_zero(rows, kept):
    component = Components(1, KINDS, kept=20)
    component.fit(0, torch.randn(rows, WIDTH))
    assert torch.isfinite(component.mean_E1D).all()
    assert component.basis_EDQ[0].any(0).tolist() == [True] * kept + [False] * (20 - kept)


def test_a_wide_modality_tells_of_a_narrow_one_and_back():
    """x = A z + noise: both conditional means are those of the linear-Gaussian model."""
    draw, rows, noise = np.random.default_rng(0), 1500, 0.3
    loadings = [draw.normal(size=(d, 2)) for d in (3, WIDTH)]
    z = draw.normal(size=(rows, 2))
    x = [torch.tensor(z @ a.T + noise * draw.normal(size=(rows, len(a))), dtype=torch.float32) for a in loadings]
    model = Gaussian(ModelConfig((ModalityConfig("n", ("real",) * 3), ModalityConfig("w", ("real",) * WIDTH))), [0, 20])
    model.components[1].fit(0, x[1])
    seen = [torch.ones_like(t, dtype=torch.bool) for t in x]
    model.fit_member(0, x, seen, 0.0)
    for target, given in ((0, 1), (1, 0)):
        masks = [m if j == given else ~m for j, m in enumerate(seen)]
        values = [t * m for t, m in zip(x, masks, strict=True)]
        parts = model(*model.parts(values, masks)).split(model.sizes, -1)[target]
        a, b = loadings[target], loadings[given]
        gain = np.linalg.solve(b @ b.T + noise**2 * np.eye(len(b)), b @ a.T)
        expected = x[given].numpy() @ gain
        assert np.abs(model.components[target].restore(parts)[0].numpy() - expected).std() < 0.06 * expected.std()


def test_a_fit_to_no_records_leaves_the_standard_normal():
    model = Gaussian(ModelConfig((ModalityConfig("a", ("real",) * 3),)), [0])
    model.fit_member(0, [torch.zeros(0, 3)], [torch.zeros(0, 3, dtype=torch.bool)], 0.1)
    assert not model.mean_EP.any() and torch.equal(model.covariance_EPP[0], torch.eye(3))
