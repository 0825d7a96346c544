"""Mixing weights, error bars and intervals: closed forms, quadrature and exact finite-sample bounds."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from cohorts import statistics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from mmimpute import evaluation
from mmimpute.model import ModalityConfig, ModelConfig
from mmimpute.model.stack import (
    GAP,
    LEAST_VALUES,
    LEVELS,
    MOST_BETWEEN,
    WHOLE,
    WIDE,
    Beliefs,
    Conformal,
    ModalityStack,
    Target,
    conformal_quantiles,
    crps,
    drawn_around,
    fit,
    mix,
    original,
    pooled,
)
from mmimpute.model.standardise import FeatureStatistics, Standardise

QUICK = settings(max_examples=60, deadline=None)


def truth(z: torch.Tensor, folds: int = 3, binary: bool = False) -> Target:
    """Every value of some records, in standardised units; logits give binary ones."""
    width = z.shape[1]
    x = (torch.rand(z.shape) < torch.sigmoid(z)).float() if binary else z
    seen, real = torch.ones_like(z, dtype=torch.bool), torch.full((width,), not binary)
    return Target(x, z, seen, torch.arange(len(z)) % folds, real, Standardise(FeatureStatistics.blank(width)))


def beliefs(*locations: torch.Tensor, scale: float | torch.Tensor = 1.0, others: torch.Tensor | None = None) -> Beliefs:
    others = torch.ones(len(locations[0])) if others is None else others
    return Beliefs(torch.stack(locations)[:, None], torch.as_tensor(scale).expand(1, *locations[0].shape), others)


# -- mixing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("perfect", range(3))
def test_the_weight_goes_to_the_perfect_expert(perfect, binary):
    rows = 1500 if binary else 400
    z = 2 * torch.randn(rows, 3)
    said = [torch.randn(rows, 3) for _ in range(3)]
    said[perfect] = z if binary else z + 0.01 * torch.randn(rows, 3)
    stack = ModalityStack(3, 3)
    fit(stack, WHOLE, beliefs(*said), truth(z, binary=binary))
    weight_EMD = stack.weight_EGM[:, WHOLE, :, None] + stack.delta_EGMD[:, WHOLE]
    expected = (torch.arange(3) == perfect).float()[None, :, None].expand_as(weight_EMD)
    torch.testing.assert_close(weight_EMD, expected, rtol=0, atol=0.2 if binary else 0.01)


@pytest.mark.parametrize("unit", [2.0**-60, 1.0])
def test_units_and_a_fill_value_leave_the_weights_of_other_features(unit):
    """One of them holds netCDF's 1e37 for a missing value, which is 20 of its standard deviations."""
    z = 2 * torch.randn(400, 3)
    z[:, 2] = torch.where(torch.arange(400) == 0, 20.0, 0.0)
    known = torch.where(torch.arange(3) < 2, z + 0.01 * torch.randn(400, 3), 0.0)
    standardise = Standardise(dataclasses.replace(FeatureStatistics.blank(3), std=np.array([unit, unit, 5e35])))
    target = dataclasses.replace(truth(z), x_ND=z * standardise.std, standardise=standardise)
    stack = ModalityStack(3, 3)
    fit(stack, WHOLE, beliefs(torch.randn(400, 3), known, torch.randn(400, 3)), target)
    weight_ED = (stack.weight_EGM[:, WHOLE, 1, None] + stack.delta_EGMD[:, WHOLE, 1])[:, :2]
    torch.testing.assert_close(weight_ED, torch.ones_like(weight_ED), rtol=0, atol=0.1)


@pytest.mark.parametrize("generative", [True, False])
def test_where_experts_say_the_same_the_prior_gives_the_weights(generative):
    known = torch.randn(400, 4)
    stack = ModalityStack(2, 4)
    fit(stack, WHOLE, beliefs(known, known, known), truth(known + 0.3 * torch.randn(400, 4), folds=2), generative)
    found = stack.weight_EGM[:, WHOLE].mean(0)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.0] if generative else [1 / 3] * 3), rtol=0, atol=0.05)


@pytest.mark.parametrize("width", [4, WIDE + 10])
def test_scales_are_calibrated_on_new_records(width):
    """The VAE's deviation tells which records are hard, and is half of what it should be."""
    error_D = torch.linspace(0.5, 1.0, width)

    def cohort(rows: int) -> tuple[Beliefs, torch.Tensor, torch.Tensor]:
        hard = torch.where(torch.rand(rows, 1) < 0.5, 1.0, 3.0).expand(rows, width)
        known = torch.randn(rows, width)
        z = known + error_D * hard * torch.randn(rows, width)
        return beliefs(known, 2 * known + 3, torch.randn(rows, width), scale=0.5 * hard * error_D), z, hard

    stack = ModalityStack(2, width)
    said, z, _ = cohort(2500 if width < WIDE else 500)
    fit(stack, GAP, said, truth(z, folds=2))
    said, z, hard = cohort(4000)
    location_EBD, scale_EBD = mix(stack.of(GAP), said)
    ratio_EBD = ((z - location_EBD) / scale_EBD).square()
    for kind in (1.0, 3.0):
        assert ratio_EBD[:, hard == kind].mean().item() == pytest.approx(1, abs=0.12)
    assert (ratio_EBD.mean((0, 1)) - 1).abs().max() < 0.25
    # Nothing can know more than `known`; with it alone the score is that of the noise.
    best = crps(z, z - error_D * hard * torch.randn_like(z), error_D * hard).mean()
    assert crps(z, location_EBD, scale_EBD).mean() < 1.03 * best


def test_error_bars_follow_how_much_else_is_observed():
    """The VAE's deviation is the same for all records; errors halve from one other modality of four to four of four."""

    def cohort(rows: int) -> tuple[Beliefs, torch.Tensor, torch.Tensor]:
        others = torch.randint(1, 5, (rows,)) / 4
        known = torch.randn(rows, 3)
        z = known + torch.exp2(-(others - 0.25) / 0.75)[:, None] * torch.randn(rows, 3)
        return beliefs(known, known, known, scale=0.7, others=others), z, others

    stack = ModalityStack(2, 3)
    said, z, others = cohort(3000)
    fit(stack, WHOLE, said, truth(z, folds=2))
    assert stack.eta_EG[:, WHOLE].tolist() == pytest.approx([-math.log(2) / 0.75] * 2, rel=0.15)
    said, z, others = cohort(4000)
    location_EBD, scale_EBD = mix(stack.of(WHOLE), said)
    ratio_B = ((z - location_EBD) / scale_EBD).square().mean((0, 2))
    for share in (0.25, 0.5, 0.75, 1.0):
        assert ratio_B[others == share].mean().item() == pytest.approx(1, abs=0.12)


def test_a_member_does_not_see_its_own_fold():
    z = torch.randn(90, 2)
    said = beliefs(*(0.6 * z + spread * torch.randn(90, 2) for spread in (0.3, 0.5, 0.8)), scale=0.7)
    changed = torch.where((torch.arange(90) % 3 == 1)[:, None], 3 * z.flip(0) + 1, z)
    stacks = [ModalityStack(3, 2) for _ in range(2)]
    for stack, values in zip(stacks, (z, changed), strict=True):
        fit(stack, WHOLE, said, truth(values))
    for first, second in zip(*(s.buffers() for s in stacks), strict=True):
        assert torch.equal(first[1], second[1])
    for e in (0, 2):
        assert not torch.allclose(stacks[0].weight_EGM[e, WHOLE], stacks[1].weight_EGM[e, WHOLE], atol=0.01)


def test_one_member_learns_from_its_only_fold():
    z = torch.randn(60, 1)
    said = beliefs(z, torch.randn(60, 1), torch.randn(60, 1))
    stack = ModalityStack(1, 1)
    fit(stack, WHOLE, said, truth(z, folds=1))
    assert stack.weight_EGM[0, WHOLE, 0] > 0.8
    assert torch.equal(stack.weight_EGM[0, GAP], ModalityStack(1, 1).weight_EGM[0, GAP])


def test_features_too_rare_to_be_judged_keep_their_first_parameters():
    z = torch.randn(60, 2)
    target = truth(z)
    target.scored_ND[9:, 1] = False
    stack, first = ModalityStack(3, 2), ModalityStack(3, 2)
    fit(stack, WHOLE, beliefs(z, z, z, scale=0.5), target)
    for name in ("delta_EGMD", "offset_EGD", "shift_EGD"):
        assert torch.equal(getattr(stack, name)[..., 1], getattr(first, name)[..., 1])
    assert not torch.equal(stack.shift_EGD[..., 0], first.shift_EGD[..., 0])


@pytest.mark.parametrize("seed", range(12))
def test_a_fit_never_ends_in_nan(seed):
    """At its optimum, in float32, the line search of L-BFGS may: one fit in six to binary features did."""
    torch.manual_seed(seed)
    z = 2 * torch.randn((20, 60, 200)[seed % 3], 1)
    stack = ModalityStack(3, 1)
    fit(stack, WHOLE, beliefs(*(0.7 * z + 0.5 * torch.randn_like(z) for _ in range(3))), truth(z, binary=True))
    assert all(torch.isfinite(t).all() for t in stack.buffers())


def test_each_feature_believes_the_vaes_deviations_as_far_as_they_are_true():
    """Of three features one errs as the VAE says, one more evenly, one alike everywhere."""
    torch.manual_seed(0)
    true_D, said_N1 = torch.tensor([1.0, 0.5, 0.0]), torch.randn(4000, 1).exp()
    z = said_N1**true_D * torch.randn(4000, 3)
    zeros = torch.zeros_like(z)
    stack = ModalityStack(2, 3)
    fit(stack, WHOLE, beliefs(zeros, zeros, zeros, scale=said_N1), truth(z, folds=2))
    found_ED = stack.kappa_EG[:, WHOLE, None] + stack.tilt_EGD[:, WHOLE]
    torch.testing.assert_close(found_ED, true_D.expand(2, 3), rtol=0, atol=0.1)


def test_the_features_of_a_wide_modality_trust_their_own_experts():
    """Those in the sample from which the common weights come, and the others."""
    torch.manual_seed(0)
    rows, width = 600, WIDE + 40
    z, even_D = torch.randn(rows, width), torch.arange(width) % 2 == 0
    known, noise = z + 0.1 * torch.randn(rows, width), torch.randn(2, rows, width)
    said = beliefs(torch.zeros_like(z), torch.where(even_D, known, noise[0]), torch.where(even_D, noise[1], known), scale=0.5)
    stack = ModalityStack(2, width)
    fit(stack, WHOLE, said, truth(z, folds=2))
    location_EBD, scale_EBD = stack(said, WHOLE)
    error_ED = (location_EBD - z).square().mean(1)
    assert error_ED.max() < 0.1, "of common weights alone .5"
    torch.testing.assert_close(scale_EBD.mean(1), error_ED.sqrt(), rtol=0.25, atol=0)


def test_each_kind_of_missingness_has_its_own_parameters():
    stack = ModalityStack(2, 3)
    stack.offset_EGD[:, GAP], stack.offset_EGD[:, WHOLE] = 1.0, 2.0
    zeros = torch.zeros(4, 3)
    for mode, offset in ((GAP, 1.0), (WHOLE, 2.0)):
        location_EBD, _ = stack(beliefs(zeros, zeros, zeros), mode)
        assert torch.equal(location_EBD, torch.full((2, 4, 3), offset))


def test_experts_that_agree_leave_the_vaes_scale():
    """First parameters: the mean of the experts, and the VAE's deviation."""
    a, scale = torch.randn(3, 5, 2), torch.rand(5, 2) + 0.1
    location_EBD, scale_EBD = mix(ModalityStack(2, 2).of(GAP), beliefs(*a, scale=scale))
    torch.testing.assert_close(location_EBD, a.mean(0).expand(2, -1, -1))
    torch.testing.assert_close(scale_EBD, scale.expand(2, -1, -1))


@QUICK
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(-5, 5))
def test_pooling_obeys_the_ambiguity_identity(locations, value):
    """(value - mean)^2 = mean of (value - location)^2 - variance of the locations (Krogh & Vedelsby 1995, eq. 5)."""
    location_EBD = torch.tensor(locations, dtype=torch.float64)[:, None, None]
    scale_EBD = (value - location_EBD).abs()
    mean, scale = (t.item() for t in pooled(location_EBD, scale_EBD))
    assert mean == pytest.approx(np.mean(locations))
    floor = 0.5 * float(scale_EBD.square().mean().sqrt())  # however much the members differ
    assert scale == pytest.approx(max(abs(value - mean), floor), rel=1e-6, abs=1e-6)


@QUICK
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.floats(20, 30))
def test_draws_lie_around_the_ensemble_as_other_samples_of_people_would(groups, scale):
    """Members that are means over all groups but their own: the draws vary as the mean of all groups does, var(groups) / E."""
    group_E = torch.tensor(groups, dtype=torch.float64)
    member_E = (group_E.sum() - group_E) / (len(groups) - 1)
    around_EBD, within_BD = drawn_around(member_E[:, None, None], torch.full((1, 1), scale, dtype=torch.float64))
    assert around_EBD.mean().item() == pytest.approx(0, abs=1e-6)
    assert around_EBD.square().mean().item() == pytest.approx(group_E.var().item() / len(groups), abs=1e-6)
    assert (around_EBD.square().mean() + within_BD.square()).item() == pytest.approx(scale**2)


def test_members_that_differ_by_more_than_the_error_leave_a_quarter_to_each_draw():
    around_EBD, within_BD = drawn_around(torch.tensor([-9.0, 9.0])[:, None, None], torch.ones(1, 1))
    torch.testing.assert_close(around_EBD.flatten(), torch.tensor([-1.0, 1.0]) * MOST_BETWEEN**0.5)
    torch.testing.assert_close(within_BD.item(), (1 - MOST_BETWEEN) ** 0.5)


def test_a_single_member_draws_around_its_own_location():
    around_EBD, within_BD = drawn_around(torch.randn(1, 4, 3), torch.full((4, 3), 0.5))
    assert not around_EBD.any() and torch.equal(within_BD, torch.full((4, 3), 0.5))


# -- original units -----------------------------------------------------------------------------------------------------


def test_moments_in_original_units_agree_with_quadrature():
    """Two logged features, one that is not, a binary one; a location and scale of its own for every record."""
    draw = np.random.default_rng(0)
    x = np.stack([draw.lognormal(1, 1, 900), draw.normal(size=900) ** 3, draw.normal(2, 3, 900), draw.random(900) < 0.5], 1)
    standardise = Standardise(statistics(x, ("real", "real", "real", "binary"), log=(0, 1)))
    location, scale = torch.randn(20, 4), torch.rand(20, 4) * 0.4 + 0.2
    mean, std = original(location, scale, torch.tensor([True, True, True, False]), standardise)
    for d in (0, 1):
        at = location[:, d] + scale[:, d] * torch.linspace(-8, 8, 4001)[:, None]
        density = stats.norm.pdf(at, location[:, d], scale[:, d])
        value = standardise.inverse(at[..., None].expand(*at.shape, 4))[..., d].double().numpy()
        first, second = (integrate.trapezoid(value**k * density, at, axis=0) for k in (1, 2))
        np.testing.assert_allclose(mean[:, d], first, rtol=0.01, atol=0.005)
        np.testing.assert_allclose(std[:, d], np.sqrt(second - first**2), rtol=0.03)
    torch.testing.assert_close(mean[:, 2], location[:, 2] * standardise.std[2] + standardise.mean[2])
    torch.testing.assert_close(std[:, 2], scale[:, 2] * standardise.std[2])
    chance = torch.sigmoid(location[:, 3])
    torch.testing.assert_close(torch.stack([mean[:, 3], std[:, 3] ** 2]), torch.stack([chance, chance * (1 - chance)]))


def test_the_score_is_that_of_the_evaluation():
    y, mean, std = torch.randn(3, 50, dtype=torch.float64)
    std = std.exp()
    np.testing.assert_allclose(crps(y, mean, std), evaluation.crps(y.numpy(), mean.numpy(), std.numpy()), rtol=1e-6)


def test_the_marginal_score_is_that_of_the_mean_and_standard_deviation():
    z = torch.randn(40, 1)
    target, codes = truth(z), truth(z, binary=True)
    target.scored_ND[30:] = codes.scored_ND[30:] = False
    expected = crps(z[:30], z[:30].mean(), z[:30].std(correction=0)).mean()
    torch.testing.assert_close(target.marginal_D, expected[None])
    expected = evaluation.log_loss(codes.x_ND[:30].numpy(), codes.x_ND[:30].mean().item()).mean()
    assert codes.marginal_D.item() == pytest.approx(expected, rel=1e-5)


# -- intervals ----------------------------------------------------------------------------------------------------------


@QUICK
@given(st.lists(st.integers(-30, 30), min_size=4, max_size=60), st.sampled_from(LEVELS), st.booleans())
def test_of_exchangeable_values_the_level_falls_inside(values, level, distinct):
    """Each of n + 1 values in turn is the new one, which is what exchangeable means: the bound is exact, ties included."""
    value = torch.tensor(sorted(set(values)) if distinct else values, dtype=torch.float32)
    total = len(value)
    bounds = [conformal_quantiles(torch.cat([value[:i], value[i + 1 :]]), level) for i in range(total) if total > 1]
    inside = sum(bool(low <= v <= high) for v, (low, high) in zip(value, bounds, strict=total > 1))
    if total * (1 - level) > 2 - 1e-6:
        assert inside >= total * level - 1e-6
        assert not distinct or inside < total * level + 2  # nor more than that many ranks can tell
    else:  # too few for the rank: nothing but the two ends may be outside
        assert inside >= total - 2


@pytest.mark.parametrize("level", LEVELS)
def test_too_few_values_for_a_level_give_at_least_the_gaussians_interval(level):
    gaussian = stats.norm.ppf(0.5 + level / 2)
    for residual in (torch.tensor([0.1]), torch.tensor([0.1, 0.2])):
        low, high = conformal_quantiles(residual, level)
        assert (low.item(), high.item()) == pytest.approx((-gaussian, gaussian))
    low, high = conformal_quantiles(torch.tensor([-7.0, 9.0]), level)
    assert (low, high) == (-7, 9)


def conformal(members: int) -> Conformal:
    return Conformal(ModelConfig((ModalityConfig("a", ("real",)), ModalityConfig("b", ("real",))), members=members))


def test_a_group_has_its_own_quantiles_and_a_small_one_those_of_all():
    counts = (LEAST_VALUES, 1000, LEAST_VALUES - 1)
    group = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    residual = torch.randn(len(group)) * torch.tensor([1.0, 3.0, 20.0])[group]
    found = conformal(1)
    first = found.quantile_EKGL2.clone()
    found.fit(1, residual, group, torch.zeros_like(group))
    for g, chosen in enumerate((residual[group == 0], residual[group == 1], residual)):
        for at, level in enumerate(LEVELS):
            assert torch.equal(found.quantile_EKGL2[0, 1, g, at], conformal_quantiles(chosen, level))
    assert torch.equal(found.quantile_EKGL2[:, 0], first[:, 0])


def test_a_members_quantiles_do_not_see_its_own_fold():
    residual, fold = torch.randn(900), torch.arange(900) % 3
    found = [conformal(3) for _ in range(2)]
    for model, values in zip(found, (residual, torch.where(fold == 1, 10 * residual, residual)), strict=True):
        model.fit(0, values, torch.ones(900, dtype=torch.long), fold)
    same = [torch.equal(a, b) for a, b in zip(*(m.quantile_EKGL2[:, 0, 1] for m in found), strict=True)]
    assert same == [False, True, False]


def test_skewed_errors_get_skewed_intervals_of_the_level():
    draw = torch.distributions.Exponential(1.0)
    found = conformal(1)
    found.fit(0, draw.sample((20_000,)) - 1, torch.full((20_000,), 2), torch.zeros(20_000))
    for level in LEVELS:
        mean, std = torch.full((1, 1), 5.0), torch.full((1, 1), 2.0)
        low, high = (b.item() for b in found.bounds(0, level, mean, std, torch.tensor([2])))
        expected = 5 + 2 * (stats.expon.ppf([0.5 - level / 2, 0.5 + level / 2]) - 1)
        assert (low, high) == pytest.approx(tuple(expected), abs=0.2)


def test_records_are_grouped_by_what_else_is_observed():
    config = ModelConfig(tuple(ModalityConfig(n, ("real",) * 2) for n in "abcd"))
    model = Conformal(config)
    model.many_K[0] = 2
    present = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    half = torch.tensor([True, False])
    assert model.group(0, [p[:, None] & half for p in present.T]).tolist() == [0, 1, 1, 2, 2, 0]
