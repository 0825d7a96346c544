"""log p(x): the importance-weighted estimate beside the closed form of a linear-Gaussian model."""

import math

import pytest
import torch

from mmimpute.model import FeatureStatistics, ModalityConfig, ModelConfig, MultiModalVAE
from mmimpute.model.marginal import log_marginal

NOISE = 0.7  # standard deviation of x given the latents


def linear_model(members: int = 2) -> MultiModalVAE:
    """Decoders and private priors linear with constant variances, a prior with a mean and correlations: x is Gaussian."""
    torch.manual_seed(0)
    modalities = tuple(ModalityConfig(n, ("real",) * d, tails="gaussian") for n, d in (("a", 3), ("b", 2)))
    config = ModelConfig(modalities, members=members, shared=2, hidden=8, decoder=8)
    model = MultiModalVAE(config, {m.name: FeatureStatistics.blank(m.width) for m in modalities}).eval()
    with torch.no_grad():
        model.prior.centre_ECL[:, 0].normal_(0, 0.3)
        model.prior.root_ELL.copy_(torch.linalg.cholesky(torch.tensor([[0.9, 0.3], [0.3, 0.7]])).expand(members, -1, -1))
        model.shared.trunk[6].bias[..., 2:] = -3.0  # posteriors near N(0, I): wide enough to be good proposals
        for private in model.private:
            private.prior.weight[..., private.own :] = 0
            private.prior.bias[..., private.own :] = -0.5
            private.linear.weight.normal_(0, 0.4)
            private.linear.weight[..., 1::2] = 0
            private.curved.bias[..., 1::2] = math.log(NOISE)
            private.expert.bias[..., private.own :] = -3.0
    return model


def closed_form(model: MultiModalVAE, member: int, x: list[torch.Tensor], observed: list[torch.Tensor], row: int) -> float:
    """log N(x observed; mean, covariance) of one record: zj = P z0 + c + noise, x = A0 z0 + A1 zj + noise."""
    root = model.prior.root_ELL[member].double()
    loadings, means, spread = [], [], []
    for private in model.private:
        own, weight, bias = private.own, private.prior.weight[member].double(), private.prior.bias[member, 0].double()
        linear = private.linear.weight[member].double()[:, 0::2].T
        to_shared = linear[:, :2] + linear[:, 2:] @ weight[:, :own].T
        loadings.append(to_shared)
        means.append(to_shared @ model.prior.mean_EL[member].double() + linear[:, 2:] @ bias[:own])
        spread.append(linear[:, 2:] @ torch.diag((2 * bias[own:]).exp()) @ linear[:, 2:].T + NOISE**2 * torch.eye(len(linear)))
    loading = torch.cat(loadings) @ root
    covariance = loading @ loading.T + torch.block_diag(*spread)
    seen = torch.cat([o[row] for o in observed])
    normal = torch.distributions.MultivariateNormal(torch.cat(means)[seen], covariance[seen][:, seen])
    return normal.log_prob(torch.cat([t[row] for t in x]).double()[seen]).item()


@pytest.fixture(scope="module")
def records():
    """Complete, with a hole, and without one modality."""
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(4, d, generator=generator) for d in (3, 2)]
    observed = [torch.ones_like(t, dtype=torch.bool) for t in x]
    observed[0][1, 2] = False
    observed[1][2] = False
    observed[0][3] = False
    return x, observed


@torch.no_grad()
def test_the_estimate_is_the_closed_form_of_a_linear_gaussian_model(records):
    model = linear_model()
    told = log_marginal(model, *records, 20_000, torch.Generator().manual_seed(0))
    expected = torch.tensor([[closed_form(model, e, *records, row) for row in range(4)] for e in range(2)], dtype=torch.float64)
    torch.testing.assert_close(told.log_prob.double(), expected, atol=0.06, rtol=0)


def test_bounds_rise_with_the_samples_and_stay_below(records):
    model = linear_model(1)
    expected = sum(closed_form(model, 0, *records, row) for row in range(4))
    bounds = []
    for samples in (1, 4, 16):
        seeds = (log_marginal(model, *records, samples, torch.Generator().manual_seed(s)) for s in range(120))
        bounds.append(torch.stack([t.log_prob.sum() for t in seeds]).mean().item())
    assert bounds[0] + 0.2 < bounds[1] < bounds[2] - 0.1 < expected - 0.1


def test_the_first_bound_is_the_elbo(records):
    told = log_marginal(linear_model(), *records, 1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(told.log_prob, told.elbo)
    torch.testing.assert_close(told.effective, torch.ones_like(told.effective))


def test_chunks_change_nothing_but_the_noise(records, monkeypatch):
    model = linear_model()
    monkeypatch.setattr("mmimpute.model.marginal.CHUNK", 1000)
    told = log_marginal(model, *records, 5000, torch.Generator().manual_seed(0))
    expected = torch.tensor([[closed_form(model, e, *records, row) for row in range(4)] for e in range(2)], dtype=torch.float64)
    torch.testing.assert_close(told.log_prob.double(), expected, atol=0.15, rtol=0)
    assert (told.effective <= 5000.5).all()
    assert (told.elbo < told.log_prob).all()


def test_values_that_are_not_observed_change_nothing(records):
    x, observed = records
    other = [torch.where(o, t, 99.0) for t, o in zip(x, observed, strict=True)]
    model = linear_model()
    a, b = (log_marginal(model, t, observed, 50, torch.Generator().manual_seed(0)) for t in (x, other))
    assert torch.equal(a.log_prob, b.log_prob)
