"""decoder = "diffusion": the sampler in closed form, what it is conditioned on, and cohorts whose truth is known."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from cohorts import LinearGaussian, fit_forms, fit_linear_gaussian, linked, masks, mixed_model, mixed_values, read_stamp, stamped

from mmimpute import denoising
from mmimpute.model import Imputer, ModelConfig
from mmimpute.model.diffusion import Diffusion
from mmimpute.stacking import assemble

MEMBERS, ROWS = 2, 80


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def untrained(members: int = MEMBERS) -> Diffusion:
    vae = mixed_model(members=members, decoder="diffusion")
    diffusion = Diffusion(vae.config, vae.private, vae.likelihoods).eval()
    for scale in diffusion.scales:
        width = scale.mean_EL.shape[1]
        root = torch.tril(0.2 * torch.randn(members, width, width)) + torch.eye(width)
        scale.mean_EL.normal_()
        scale.root_ELL.copy_(root)
    return diffusion


# -- closed forms -------------------------------------------------------------------------------------------------------


def test_whitening_is_undone_by_colouring():
    diffusion = untrained()
    latents = [torch.randn(MEMBERS, 7, size) for size in diffusion.sizes]
    for a, b in zip(diffusion.colour(diffusion.whiten(latents)), latents, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_denoiser_that_knows_nothing_draws_the_gaussian_of_the_moments():
    """Its network says 0, which for N(0, 1) is the exact answer at every noise level: so the sampler must end at the moments."""
    diffusion = untrained(members=1)
    evidence = torch.zeros(1, 4000, diffusion.denoiser.first.weight.shape[1] - sum(diffusion.sizes))
    for scale, drawn_SEBL in zip(diffusion.scales, diffusion.sample(evidence, 2, seeded()), strict=True):
        drawn, root = drawn_SEBL.flatten(0, 2), scale.root_ELL[0]
        assert drawn_SEBL.shape[:3] == (2, 1, 4000)
        torch.testing.assert_close(drawn.mean(0), scale.mean_EL[0], atol=0.1, rtol=0)
        torch.testing.assert_close(drawn.T.cov(), root @ root.T, atol=0.12, rtol=0.05)


def test_the_loss_of_a_denoiser_that_knows_nothing_is_1():
    diffusion = untrained(members=1)
    clean = torch.randn(1, 20_000, sum(diffusion.sizes))
    evidence = clean.new_zeros(1, 20_000, diffusion.denoiser.first.weight.shape[1] - clean.shape[2])
    loss = diffusion.loss(clean, evidence, torch.rand(20_000, len(diffusion.chosen)) < 0.5)
    assert loss.mean().item() == pytest.approx(1, abs=0.02)


def test_only_latents_that_a_record_has_are_learnt():
    """A denoiser whose output is a constant: what it says of a zj that is not there costs nothing."""
    diffusion = untrained()
    known = torch.tensor([[True, False, True]]).expand(ROWS, 3)
    clean = torch.randn(MEMBERS, ROWS, sum(diffusion.sizes))
    evidence = torch.randn(MEMBERS, ROWS, diffusion.denoiser.first.weight.shape[1] - clean.shape[2])
    losses = []
    for at in (None, 2, 1):  # none; the modality that is missing; one that is there
        with torch.no_grad():
            for part, bias in enumerate(diffusion.denoiser.last.bias.split(diffusion.sizes, -1)):
                bias.fill_(5.0 if part == at else 0.0)
        torch.manual_seed(0)
        losses.append(diffusion.loss(clean, evidence, known))
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


# -- the whole model's contract -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """Every kind; few steps."""
    torch.set_num_threads(1)
    x = linked(mixed_values(ROWS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoising, "MOST_STEPS", 20)
        return assemble(mixed_model(members=MEMBERS, decoder="diffusion"), x, masks(x), torch.arange(ROWS) % MEMBERS)


@pytest.fixture
def record():
    x = mixed_values(30, seed=5)
    for v, o in zip(x, masks(x, seed=5), strict=True):
        v[~o] = torch.nan
    return [(v, 1) for v in x]


def test_draws_copy_what_is_observed_and_respect_the_supports(model, record):
    drawn = model.impute(record, 5, seeded())
    for (v, _), d, m in zip(record, drawn, model.config.modalities, strict=True):
        known = ~torch.isnan(v)
        assert d.shape == (5, *v.shape) and torch.isfinite(d).all() and (d[:, known] == v[known]).all()
        for i, (kind, levels) in enumerate(zip(m.kinds, m.levels, strict=True)):
            if kind != "real":
                assert (d[..., i] == d[..., i].round()).all() and d[..., i].min() >= 0
            if levels or kind == "binary":
                assert d[..., i].max() <= (levels or 2) - 1


def test_draws_repeat_with_the_seed(model, record):
    first, second, other = (model.impute(record, 3, seeded(s)) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_predictions_do_not_know_of_it(model, record):
    x, observed = model.vae.read(record)
    with_it = model.predict(x, observed, 0.9)
    plain = Imputer.from_state(model.config, model.state_dict())
    plain.diffusion = None
    without = plain.predict(x, observed, 0.9)
    for name in ("mean", "std", "lower", "upper"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(with_it, name), getattr(without, name), strict=True))


def test_the_state_is_the_whole_model_and_a_member_draws_as_it_does_in_the_ensemble(model, record):
    config = ModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(model.config))))
    again = Imputer.from_state(config, {name: t.clone() for name, t in model.state_dict().items()})
    for a, b in zip(model.impute(record, 4, seeded()), again.impute(record, 4, seeded()), strict=True):
        assert torch.equal(a, b)
    first = model.vae.impute(record, 1, seeded(), model.diffusion)  # one draw is the first member's
    alone = model.member(0)
    for a, b in zip(first, alone.vae.impute(record, 1, seeded(), alone.diffusion), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


# -- cohorts whose truth is known ---------------------------------------------------------------------------------------


def test_draws_have_the_conditional_mean_and_covariance(linear):
    """Without the stack's help; not as near as draws that it moves."""
    truth, model, x = linear
    drawn = model.impute([(x[0], 1), (x[1], 1), (None, 0)], draws=100, generator=seeded())[2].numpy()
    found = np.mean([np.cov(drawn[:, i].T) for i in range(drawn.shape[1])], 0)
    mean, expected = truth.conditional(2, [0, 1], x)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.abs((found - expected) / scale).max() < 0.2
    assert np.abs(drawn.mean(0) - mean).mean() / np.sqrt(np.diag(expected)).mean() < 0.3


@pytest.fixture(scope="module")
def linear():
    torch.set_num_threads(1)
    truth = LinearGaussian.make()
    return truth, fit_linear_gaussian(truth.values(2000, 1), decoder="diffusion", members=1), truth.values(200, 4)


def test_generated_records_are_imputations_of_empty_ones(linear):
    _, model, _ = linear
    generated = torch.cat(model.generate(3000, seeded()), 1)
    imputed = torch.cat(model.impute([(torch.empty(3000, 0), 0)] * 3, generator=seeded(1)), 1)
    same = torch.cat(model.generate(3000, seeded(2)), 1)
    assert energy(generated, imputed) < 3 * max(energy(generated, same), 1e-3)
    torch.testing.assert_close(generated.mean(0), imputed.mean(0), atol=0.12, rtol=0)
    torch.testing.assert_close(generated.T.cov(), imputed.T.cov(), atol=0.2, rtol=0.1)


CENTRES, SPREAD = torch.tensor([[1.5, 1.0], [-1.5, -1.0]]), 0.25


def clusters(rows: int, seed: int) -> list[torch.Tensor]:
    """a: one of two clusters; b and c tell which, not surely."""
    generator = seeded(seed)
    side = torch.randint(0, 2, (rows,), generator=generator)
    noise = [torch.randn(rows, width, generator=generator) for width in (2, 3, 2)]
    sign = 1 - 2 * side[:, None]
    return [CENTRES[side] + SPREAD * noise[0], 0.5 * sign + noise[1], 0.4 * sign + noise[2]]


def energy(a: torch.Tensor, b: torch.Tensor) -> float:
    """Energy distance of two samples."""
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def between(a: torch.Tensor) -> float:
    """Share that belongs to no cluster: a thousandth of the truth is so far out."""
    return float((torch.cdist(a, CENTRES).amin(-1) > 3.72 * SPREAD).float().mean())


@pytest.fixture(scope="module")
def clustered():
    """A model of clusters, and the same without its denoiser."""
    torch.set_num_threads(1)
    model = fit_linear_gaussian(clusters(1500, 1), decoder="diffusion", members=1)
    plain = Imputer.from_state(model.config, model.state_dict())
    plain.diffusion = None
    return model, plain


@pytest.mark.parametrize("flags, less", [((0, 1, 1), 1.0), ((0, 0, 0), 0.7)])
def test_draws_of_clusters_are_in_clusters(clustered, flags, less):
    """The Gaussians of the plain VAE put people between them; over four seeds, each with its own true sample."""
    found = []
    for m in clustered:
        drawn = []
        for seed in range(4):
            x = clusters(1000, 10 + seed)
            drawn.append(m.impute([(v if f else torch.empty(1000, 0), f) for v, f in zip(x, flags, strict=True)], generator=seeded(seed)))
        apart = [energy(torch.cat(d, 1), torch.cat(clusters(1000, 20 + seed), 1)) for seed, d in enumerate(drawn)]
        found.append(([between(d[0]) for d in drawn], apart))
    ours, theirs = found
    assert max(ours[0]) < less * min(theirs[0])
    assert max(ours[1]) < min(theirs[1])


def test_clusters_are_as_probable_as_the_rest_of_the_record_says(clustered):
    """In closed form."""
    x = clusters(500, 2)
    drawn = clustered[0].impute([(None, 0), (x[1], 1), (x[2], 1)], 20, seeded())[0]
    share = (drawn @ CENTRES[0] > 0).float().mean(0)
    expected = torch.sigmoid(2 * (0.5 * x[1].sum(1) + 0.4 * x[2].sum(1)))
    assert (share - expected).mean().abs() < 0.05 and (share - expected).abs().mean() < 0.15


def test_synthetic_people_are_not_only_those_who_have_everything():
    """Two groups of equal size, one of which is never asked for b."""
    group = torch.arange(800) % 2
    x = list(torch.randn(800, 6, generator=seeded()).split(2, 1))
    x[0] += 3 * group[:, None]
    observed = [torch.ones(800, 2, dtype=torch.bool) for _ in x]
    observed[1] &= (group == 1)[:, None]
    made = fit_linear_gaussian(x, observed, decoder="diffusion", members=1).generate(2000, seeded())
    assert 0.37 < (made[0].mean(1) > 1.5).float().mean() < 0.63  # .85 where the denoiser is told who lacks what


@pytest.fixture(scope="module")
def stamps():
    """A model of two images of one stamp, a signal and a vector; fewer steps."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoising, "MOST_STEPS", 600)
        return fit_forms(decoder="diffusion")


@pytest.mark.parametrize(("j", "bright"), [(0, True), (1, False)])
def test_an_image_is_drawn_from_the_other_and_with_less_error(stamps, j, bright):
    """The VAE's own decoder blurs, so its draws have more noise of pixels."""
    x, kind, place = stamped(300, 1)
    drawn = []
    for diffusion in (None, stamps.diffusion):
        drawn.append(stamps.vae.impute([(v, k != j) for k, v in enumerate(x)], None, seeded(), diffusion)[j])
    plain, sharp = ((d - x[j]).square().mean() for d in drawn)
    assert sharp < 0.6 * plain
    found, where = read_stamp(drawn[1], bright)
    assert ((found == kind) & (where == place).all(1)).mean() > 0.9
    assert torch.equal(drawn[1], drawn[1].byte().float())


def test_synthetic_images_show_one_stamp(stamps):
    made = stamps.generate(300, seeded())
    (one, here), (other, there) = (read_stamp(made[j], bright) for j, bright in ((0, True), (1, False)))
    assert ((one == other) & (here == there).all(1)).mean() > 0.85  # by chance 1 in 12
    counts = np.bincount(one, minlength=3)
    assert counts.min() > 50
