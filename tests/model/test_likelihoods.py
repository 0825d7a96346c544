"""Likelihoods and scores against scipy, torch.distributions and quadrature."""

import numpy as np
import pytest
import torch
from cohorts import MIXED, mixed_values, statistics
from scipy import integrate, stats

from mmimpute.model.config import ModalityConfig
from mmimpute.model.likelihoods import (
    Likelihoods,
    bernoulli_log_prob,
    gaussian_log_prob,
    mean_absolute,
    moment_crps,
    negative_binomial_log_prob,
    ordinal_log_probs,
    student_log_prob,
)
from mmimpute.model.networks import Normal, kl, product
from mmimpute.model.standardise import Standardise
from mmimpute.model.together import Told, scores


def test_log_probabilities_agree_with_scipy():
    x = torch.tensor([-1.0, 0.3, 2.0])
    expected = stats.norm.logpdf(x.numpy(), 0.5, np.exp(-0.7))
    np.testing.assert_allclose(gaussian_log_prob(x, torch.tensor(0.5), torch.tensor(-0.7)), expected, rtol=1e-5)
    for freedom in (2.1, 4.0, 30.0, 200.0):
        scale = np.exp(-0.7) * np.sqrt((freedom - 2) / freedom)
        found = student_log_prob(x, torch.tensor(0.5), torch.tensor(-0.7), torch.tensor(freedom))
        np.testing.assert_allclose(found, stats.t.logpdf(x.numpy(), freedom, 0.5, scale), rtol=1e-4, atol=1e-4)
    for value in (0.0, 1.0):
        expected = stats.bernoulli.logpmf(value, 1 / (1 + np.exp(-1.3)))
        found = bernoulli_log_prob(torch.tensor(value), torch.tensor(1.3)).item()
        assert found == pytest.approx(expected, rel=1e-5)
    counts, mean, size = torch.arange(8.0), 2.5, 1.7
    expected = stats.nbinom.logpmf(counts.numpy(), size, size / (size + mean))
    found = negative_binomial_log_prob(counts, torch.tensor(mean).log(), torch.tensor(size).log())
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_ordinal_levels_are_differences_of_the_logistic():
    cuts, eta = torch.tensor([-1.0, 0.2, 2.0]), torch.tensor([0.4, -3.0])
    edges = np.concatenate([[-np.inf], cuts.numpy(), [np.inf]])
    expected = np.diff(stats.logistic.cdf(edges[None] - eta.numpy()[:, None]), axis=1)
    np.testing.assert_allclose(ordinal_log_probs(eta, cuts).exp(), expected, atol=1e-6)


def test_expected_absolute_value_of_a_gaussian():
    for centre, sd in ((0.0, 1.0), (1.3, 0.4), (-2.0, 3.0)):
        expected = integrate.quad(lambda t, c, s: abs(t) * stats.norm.pdf(t, c, s), -30, 30, args=(centre, sd))[0]
        assert mean_absolute(torch.tensor(centre), torch.tensor(sd)).item() == pytest.approx(expected, rel=1e-4)


def test_the_gradient_of_the_expected_absolute_value_is_true():
    centre, sd = torch.tensor([[-2.0, 0.0, 1.3], [0.4, 1.0, 3.0]], dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(mean_absolute, (centre, sd))
    mean_S, sd_S = torch.randn(2, 4, 3, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda m, s: moment_crps(centre.detach(), m, s.exp()), (mean_S.requires_grad_(), sd_S.requires_grad_()))


def test_moment_crps_is_that_of_the_whole_mixture():
    """Components N(0.8 e, 0.5^2), e ~ N(0, 1): the mixture is Gaussian and its CRPS is known."""
    x, repeats = torch.tensor(0.7), 10_000
    half = torch.randn(100, repeats, generator=torch.Generator().manual_seed(1))
    mean = 0.8 * torch.cat([half, -half])
    found = moment_crps(x.expand(repeats), mean, torch.full_like(mean, 0.5)).mean().item()
    sd = np.hypot(0.8, 0.5)
    z = 0.7 / sd
    expected = sd * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))
    assert found == pytest.approx(expected, abs=0.002)


def test_kl_agrees_with_torch_distributions():
    q, p = (Normal(torch.randn(4, 3), torch.rand(4, 3) + 0.2) for _ in range(2))
    normals = [torch.distributions.Normal(n.mean, n.var.sqrt()) for n in (q, p)]
    torch.testing.assert_close(kl(q, p), torch.distributions.kl_divergence(*normals).sum(-1))


def test_product_of_experts_multiplies_densities_and_keeps_the_prior():
    prior = Normal(torch.tensor(0.5), torch.tensor(2.0))
    both = product(prior, torch.tensor(3.0), torch.tensor(1.5))
    total = 1 / 2.0 + 1.5
    torch.testing.assert_close(both.var, torch.tensor(1 / total))
    torch.testing.assert_close(both.mean, torch.tensor((0.5 / 2 + 3 * 1.5) / total))
    assert product(prior, torch.tensor(3.0), torch.tensor(0.0)) == prior


@pytest.fixture
def mixed():
    values = mixed_values(4000)[0].numpy()
    standardise = Standardise(statistics(values, MIXED.kinds, log=(6,)))
    return Likelihoods(MIXED, standardise, 1), standardise, values


def test_zero_outputs_are_the_training_marginal(mixed):
    likelihood, standardise, values = mixed
    mean, std = likelihood.moments(likelihood.heads(torch.zeros(1, 1, 1, likelihood.size)), standardise)
    real, binary, ordinal = [0], [1], [3, 5]
    # Uniform levels are flatter than any logistic, hence the room for the ordinal ones.
    for columns, tolerance in ((real, 1e-3), (binary, 1e-3), (ordinal, 0.3)):
        np.testing.assert_allclose(mean[0, columns].detach(), values[:, columns].mean(0), atol=tolerance)
        np.testing.assert_allclose(std[0, columns].detach(), values[:, columns].std(0), atol=max(tolerance, 0.02))


def test_samples_have_the_moments_of_the_likelihood(mixed):
    """Every kind, a log-transformed real feature included."""
    likelihood, standardise, _ = mixed
    raw = 0.3 * torch.randn(1, likelihood.size, generator=torch.Generator().manual_seed(2))
    heads = likelihood.heads(raw.expand(1, 40_000, -1))
    drawn = likelihood.sample(heads, standardise, torch.Generator().manual_seed(3))[0].detach().numpy()
    mean, std = (t[0].detach().numpy() for t in likelihood.moments(likelihood.heads(raw[None, None]), standardise))
    moments = [i for i, kind in enumerate(MIXED.kinds) if kind != "categorical"]
    np.testing.assert_allclose(drawn.mean(0)[moments], mean[moments], rtol=0.04, atol=0.02)
    np.testing.assert_allclose(drawn.std(0)[moments], std[moments], rtol=0.06)
    categorical = MIXED.kinds.index("categorical")
    share = np.bincount(drawn[:, categorical].astype(int), minlength=3) / len(drawn)
    assert share.argmax() == mean[categorical]
    assert np.sqrt(1 - (share**2).sum()) == pytest.approx(std[categorical], abs=0.01)


def test_numbers_are_told_on_the_scale_of_the_experts(mixed):
    """Location and scale of real features, counts and levels stand for the moments in original units, and the logit for the chance."""
    likelihood, standardise, _ = mixed
    raw = 0.3 * torch.randn(3, 1, 20, likelihood.size, generator=torch.Generator().manual_seed(2))
    raw[..., 6] += 4  # counts whose tail is in the range that was seen
    heads = likelihood.heads(raw)
    location, scale = (t[0] for t in likelihood.location_scale(heads, standardise))
    mean, std = likelihood.moments(heads, standardise)
    counts, levels = [2], [3, 5]
    for columns, rtol in (([0], 1e-4), (counts, 0.05), (levels, 1e-4)):
        for found, expected in zip(standardise.moments(location[None], scale[None]), (mean, std), strict=True):
            torch.testing.assert_close(found[:, columns], expected[:, columns], rtol=rtol, atol=1e-4)
    torch.testing.assert_close(location[:, 1].sigmoid(), mean[:, 1])
    assert not location[:, 4].any() and (scale[:, 4] == 1).all()


def test_moments_and_the_gaussian_that_has_them_are_inverse(mixed):
    """Counts and logged features, as log-normal, where their range is far."""
    _, standardise, _ = mixed
    location, scale = 0.3 * torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0))
    location, scale = location + 0.5, 0.1 + scale.abs() / 4
    found = standardise.of_moments(*standardise.moments(location[None], scale[None]))
    torch.testing.assert_close(found, (location, scale), rtol=1e-3, atol=1e-3)


def test_a_certain_level_has_a_deviation(mixed):
    likelihood, standardise, _ = mixed
    for far in (-1e4, 1e4):
        location, scale = likelihood.location_scale(likelihood.heads(torch.full((1, 1, 1, likelihood.size), far)), standardise)
        assert torch.isfinite(location).all() and torch.isfinite(scale.log()).all()


def test_samples_stay_inside_the_support(mixed):
    likelihood, standardise, _values = mixed
    raw = 3 * torch.randn(1, 500, likelihood.size, generator=torch.Generator().manual_seed(4))
    drawn = likelihood.sample(likelihood.heads(raw), standardise)[0].detach().numpy()
    assert np.isfinite(drawn).all()
    for i, (kind, levels) in enumerate(zip(MIXED.kinds, MIXED.levels, strict=True)):
        if kind != "real":
            assert (drawn[:, i] == drawn[:, i].round()).all() and (drawn[:, i] >= 0).all()
        if levels:
            assert drawn[:, i].max() < levels


def test_discrete_probabilities_sum_to_one(mixed):
    likelihood, _, _ = mixed
    raw = torch.randn(1, 3, likelihood.size)
    for i, kind in enumerate(MIXED.kinds):
        top = {"binary": 2, "count": 4000}.get(kind, MIXED.levels[i])
        if kind == "real":
            continue
        target = torch.zeros(top, 1, len(MIXED.kinds))
        target[:, 0, i] = torch.arange(top)
        total = likelihood.log_prob(likelihood.heads(raw), target)[..., i].exp().sum(0)
        torch.testing.assert_close(total[0] if total.dim() > 1 else total, torch.ones(3), atol=2e-3, rtol=0)


def test_pair_score_prefers_the_right_dependence():
    """Two features that move together: the score of single features cannot tell, the score of pairs can."""
    config = ModalityConfig("m", ("real", "real"))
    standardise = Standardise(statistics(np.random.default_rng(0).normal(size=(500, 2)), config.kinds))
    likelihood, generator = Likelihoods(config, standardise, 1), torch.Generator().manual_seed(0)
    rows = 20_000
    x = torch.randn(rows, 1, generator=generator).expand(-1, 2)
    half = 0.9 * torch.randn(2, rows, 2, generator=generator)
    seen = torch.ones(rows, 2, dtype=torch.bool)
    found = []
    # The truth moves together: draws that do so score better than independent ones of the same margins.
    for mean in (half[..., :1].expand(-1, -1, 2), half):
        draws = torch.cat([mean, -mean])
        heads = {"real": torch.stack([draws, torch.full_like(draws, -1.0)], -1)}
        told = [Told(likelihood, heads, x, seen)]
        single = scores(told)[0].mean().item()
        signs = torch.Generator().manual_seed(1)  # the same sums and differences for both
        both = np.mean([scores(told, 1.0, signs)[0].mean().item() for _ in range(8)])
        found.append((single, both - single))
    assert found[0][0] == pytest.approx(found[1][0], abs=0.01)
    assert found[0][1] < found[1][1] - 0.02


def real_likelihoods(tails, members=1):
    """Of two real features, with the standardisation of unit Gaussians."""
    standardise = Standardise(statistics(np.random.default_rng(0).normal(size=(500, 2)), ("real", "real")))
    return Likelihoods(ModalityConfig("m", ("real", "real"), tails=tails), standardise, members), standardise


def test_tails_leave_standard_deviations_and_scores_alone():
    gaussian, student = (real_likelihoods(tails, members=3) for tails in ("gaussian", "student"))
    generator = torch.Generator().manual_seed(0)
    raw, target = torch.randn(4, 3, 5, 4, generator=generator), torch.randn(5, 2, generator=generator)
    found = []
    for likelihood, standardise in (gaussian, student):
        heads = likelihood.heads(raw)
        score = likelihood.score(heads, target)
        found.append([*likelihood.moments(heads, standardise), *likelihood.location_scale(heads, standardise), score])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_student_samples_have_the_variance_and_the_tails_of_their_member():
    likelihood, standardise = real_likelihoods("student", members=2)
    with torch.no_grad():
        likelihood.tail_E1F[1] = -0.125  # -1.81 is 30 degrees of freedom, -4.31 is 4.7
    heads = likelihood.heads(torch.tensor([0.5, -0.7] * 2).expand(2, 400_000, 4))
    drawn = likelihood.sample(heads, standardise, torch.Generator().manual_seed(0))
    z_EN = (standardise(drawn)[..., 0].detach() - 0.5) / np.exp(-0.7)
    np.testing.assert_allclose(z_EN.var(1), 1, rtol=0.03)
    for e, freedom in enumerate(likelihood.freedom_E1F[:, 0, 0].tolist()):
        unit = z_EN[e, ::40].numpy() / np.sqrt((freedom - 2) / freedom)
        assert stats.kstest(unit, stats.t(freedom).cdf).pvalue > 0.01
    assert (z_EN.abs() > 5).sum(1)[1] > 10 * (z_EN.abs() > 5).sum(1)[0]
