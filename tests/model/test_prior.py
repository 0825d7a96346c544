"""p(z0) after training: recovered from posteriors, sampled, and its density, beside closed forms."""

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from mmimpute.model.networks import Normal
from mmimpute.model.prior import FullGaussian, SharedPrior, moments

WEIGHT = torch.tensor([0.5, 0.3, 0.2])
CENTRE = torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 1.0], [0.0, -5.0, 0.0]])
WITHIN = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.8, 0.0], [0.0, 0.0, 0.3]])
OWN = 0.2  # variance of each posterior, part of WITHIN
RECORDS = 6000


def truth(sign: int = 1) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(WEIGHT), MultivariateNormal(sign * CENTRE, WITHIN.expand(3, 3, 3)))


def posteriors(centre: torch.Tensor) -> Normal:
    """Of two members, of which the second has every sign turned: together they have the density `truth`."""
    generator = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(WITHIN - OWN * torch.eye(3))
    mean_BL = centre + torch.randn(len(centre), 3, generator=generator) @ root.T
    return Normal(torch.stack([mean_BL, -mean_BL]), torch.full((2, len(centre), 3), OWN))


@pytest.fixture(scope="module")
def clusters() -> SharedPrior:
    prior = SharedPrior(2, 3)
    chosen = torch.multinomial(WEIGHT, RECORDS, replacement=True, generator=torch.Generator().manual_seed(1))
    prior.fit(posteriors(CENTRE[chosen]))
    return prior


def test_before_it_is_fitted_it_is_standard_normal():
    prior, noise = SharedPrior(2, 3), torch.randn(5, 2, 7, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(prior.sample(noise, torch.full((5, 2, 7), 0.5)), noise)
    torch.testing.assert_close(prior.normal(noise), noise)
    expected = torch.distributions.Normal(0, 1).log_prob(noise).sum(-1)
    torch.testing.assert_close(prior.log_prob(noise), expected)


def test_its_density_is_that_of_the_aggregate_posterior(clusters):
    """Held-out nats per draw, of which the closed form is the most that any density gives."""
    z0 = torch.stack([truth(s).sample((20_000,)) for s in (1, -1)])
    found, best = clusters.log_prob(z0[None])[0], torch.stack([truth(s).log_prob(z) for s, z in zip((1, -1), z0, strict=True)])
    assert (best.mean(1) - found.mean(1)).abs().max() < 0.01
    single = FullGaussian(2, 3)
    q = posteriors(CENTRE[torch.multinomial(WEIGHT, RECORDS, replacement=True)])
    single.fit(moments(q))
    one = MultivariateNormal(single.mean_EL[0], scale_tril=single.root_ELL[0]).log_prob(z0[0]).mean()
    assert found[0].mean() - one > 0.5  # what one Gaussian would lose


def test_the_density_of_a_mixture_is_its_closed_form():
    prior = SharedPrior(1, 3)
    prior.weight_EC[0, :3], prior.centre_ECL[0, :3], prior.root_ELL[0] = WEIGHT, CENTRE, torch.linalg.cholesky(WITHIN)
    z0 = 3 * torch.randn(7, 1, 5, 3, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(prior.log_prob(z0), truth().log_prob(z0))


def test_its_components_are_the_clusters(clusters):
    assert (clusters.weight_EC > 0).sum(1).tolist() == [3, 3]
    for weight_C, centre_CL, sign in zip(clusters.weight_EC, clusters.centre_ECL, (1, -1), strict=True):
        near = torch.cdist(sign * CENTRE, centre_CL[:3]).argmin(1)
        torch.testing.assert_close(weight_C[near], WEIGHT, atol=0.03, rtol=0)
        torch.testing.assert_close(centre_CL[near], sign * CENTRE, atol=0.1, rtol=0)


def test_one_cloud_is_one_gaussian():
    prior, q = SharedPrior(2, 3), posteriors(CENTRE[:1].expand(RECORDS, 3))
    prior.fit(q)
    assert (prior.weight_EC > 0).sum() == 2  # one of each member
    gaussian = FullGaussian(2, 3)
    gaussian.fit(moments(q))
    torch.testing.assert_close(prior.mean_EL, gaussian.mean_EL, atol=0.03, rtol=0)
    torch.testing.assert_close(prior.root_ELL, gaussian.root_ELL, atol=0.03, rtol=0)


def test_draws_have_its_weights_and_moments(clusters):
    generator = torch.Generator().manual_seed(2)
    noise, chance = torch.randn(1, 2, 40_000, 3, generator=generator), torch.rand(1, 2, 40_000, generator=generator)
    mixture, normal = clusters.sample(noise, chance)[0], clusters.normal(noise)[0]
    for member, sign in enumerate((1, -1)):
        nearest = torch.cdist(mixture[member], sign * CENTRE).argmin(1).bincount() / 40_000
        torch.testing.assert_close(nearest, WEIGHT, atol=0.03, rtol=0)
        torch.testing.assert_close(mixture[member].mean(0), normal[member].mean(0), atol=0.06, rtol=0)
        torch.testing.assert_close(mixture[member].T.cov(), normal[member].T.cov(), atol=0.1, rtol=0)


@pytest.mark.parametrize("chance", [0.0, 1 - 2**-24])
def test_every_chance_chooses_a_component_that_has_weight(clusters, chance):
    z0 = clusters.sample(torch.zeros(1, 1, 1, 3), torch.full((1, 1, 1), chance))[0, :, 0]
    for member in range(2):
        at = (clusters.centre_ECL[member] == z0[member]).all(1).nonzero()[0]
        assert clusters.weight_EC[member, at] > 0


def test_one_record_and_the_same_bits_twice():
    q = Normal(torch.ones(2, 1, 3), torch.full((2, 1, 3), 0.5))
    first, again = SharedPrior(2, 3), SharedPrior(2, 3)
    first.fit(q)
    again.fit(q)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), again.buffers(), strict=True))
    torch.testing.assert_close(first.mean_EL, torch.ones(2, 3), atol=0.05, rtol=0)
    torch.testing.assert_close(first.root_ELL[0], 0.5**0.5 * torch.eye(3), atol=0.05, rtol=0)


def test_no_component_stands_for_fewer_than_ten_people():
    far = torch.tensor([[40.0, 40.0, 40.0]])
    for people, found in ((9, 0), (30, 1)):
        prior = SharedPrior(2, 3)
        prior.fit(posteriors(torch.cat([CENTRE[:1].expand(1000, 3), far.expand(people, 3)])))
        near = torch.cdist(far, prior.centre_ECL[0, prior.weight_EC[0] > 0]).min() < 5
        assert near == bool(found)
        assert (prior.centre_ECL[prior.weight_EC == 0] == 0).all()
        torch.testing.assert_close(prior.weight_EC.sum(1), torch.ones(2))


def test_moments_add_up_over_batches():
    q = posteriors(CENTRE[torch.arange(600) % 3])
    gaussian = FullGaussian(2, 3)
    gaussian.fit(moments(Normal(q.mean[:, :100], q.var[:, :100])) + moments(Normal(q.mean[:, 100:], q.var[:, 100:])))
    expected_LL = q.mean[0].T.cov(correction=0) + OWN * torch.eye(3)
    for mean_L, root_LL, sign in zip(gaussian.mean_EL, gaussian.root_ELL, (1, -1), strict=True):
        torch.testing.assert_close(mean_L, sign * q.mean[0].mean(0))
        torch.testing.assert_close(root_LL @ root_LL.T, expected_LL, rtol=1e-4, atol=1e-4)
