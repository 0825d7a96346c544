"""Optimisation: resume is exact, sums add up, sizes follow the data."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from cohorts import CONFIG, everything, masks, mixed_model, mixed_values, statistics

from mmimpute.model import FeatureStatistics, ModalityConfig, ModelConfig, MultiModalVAE
from mmimpute.model.config import MOST_LAYERS
from mmimpute.training import (
    OptimiserSettings,
    Schedule,
    Training,
    fit_in_memory,
    judges,
    optimiser,
    schedule,
    shuffled,
    slices,
    summarise,
    take,
)

DATA = (mixed_values(96), masks(mixed_values(96), share=0.8))


def in_batches(data, size):
    return [take(data, i) for i in slices(len(data[0][0]), size)]


def batches(steps):
    parts = in_batches(DATA, 32)
    return [parts[i % len(parts)] for i in range(steps)]


def test_resume_continues_exactly():
    straight = Training(mixed_model(), OptimiserSettings(), total_steps=8)
    for batch in batches(8):
        straight.step(*batch)
    first = Training(mixed_model(), OptimiserSettings(), total_steps=8)
    for batch in batches(8)[:5]:
        first.step(*batch)
    saved = copy.deepcopy(first.state_dict())
    resumed = Training(mixed_model(seed=9), OptimiserSettings(), total_steps=8)
    resumed.load_state_dict(saved)
    torch.manual_seed(123)  # whatever happened in between
    for batch in batches(8)[5:]:
        resumed.step(*batch)
    for which in ("model", "average"):
        expected, found = straight.state_dict()[which], resumed.state_dict()[which]
        assert all(torch.equal(expected[k], found[k]) for k in expected)


def test_steps_leave_torchs_generator_alone():
    training = Training(mixed_model(), OptimiserSettings(), total_steps=2)
    before = torch.get_rng_state()
    training.step(*DATA)
    training.tune([DATA])
    assert torch.equal(before, torch.get_rng_state())


def test_ranks_draw_different_noise():
    losses = {Training(mixed_model(), OptimiserSettings(), 2, rank=r).step(*DATA)["loss"] for r in range(3)}
    assert len(losses) == 3


def test_tune_repeats_and_its_sums_add_up():
    training = Training(mixed_model(), OptimiserSettings(), total_steps=2)
    first, second = (training.tune(in_batches(DATA, 32)) for _ in range(2))
    assert first == second and first["rows"] == 96
    doubled = summarise({k: 2 * v for k, v in first.items()})  # two ranks with the same rows
    assert doubled == pytest.approx(summarise(first))
    found = summarise(first)
    nats = sum(found[f"{n}.impute"] * first[f"{n}.hidden"] for n in ("labs.mixed", "plain", "codes"))
    assert found["impute"] == pytest.approx(nats / 96)
    parts = sum(
        (found[f"{n}.reconstruction"] - found[f"{n}.private_kl"]) * first[f"{n}.observed"] for n in ("labs.mixed", "plain", "codes")
    )
    assert found["elbo"] == pytest.approx(parts / 96 - found["shared_kl"], rel=1e-4)


def test_a_record_judges_only_the_member_that_has_not_seen_it():
    training = Training(mixed_model(members=3), OptimiserSettings(), total_steps=2)
    fold = torch.arange(96) % 3
    before = torch.get_rng_state()
    assert training.tune([(*DATA, fold)])["rows"] == 96 and torch.equal(before, torch.get_rng_state())
    whole = {name: p.clone() for name, p in training.average.named_parameters()}
    for e in range(3):
        for name, p in training.average.named_parameters():
            p.fill_(torch.nan).narrow(0, e, 1).copy_(whole[name][e : e + 1])
        sums = training.tune([(*take(DATA, fold == e), fold[fold == e])])
        assert sums["rows"] == 32 and np.isfinite(list(sums.values())).all()


@pytest.mark.parametrize("members, most", [(1, 2_000), (5, 500)])
@pytest.mark.parametrize("rows", [30, 3_000, 9_999])
def test_epochs_are_judged_by_some_records_of_every_fold(rows, members, most):
    fold_N = torch.arange(rows) % (members + 1) - 1
    chosen = judges(fold_N, members)
    assert len(chosen) == min(most, int((fold_N >= 0).sum())) and len(set(chosen.tolist())) == len(chosen)
    share = fold_N[chosen].bincount(minlength=members) / len(chosen)
    assert (fold_N[chosen] >= 0).all() and (share - 1 / members).abs().max() < 0.05
    assert len(judges(fold_N, members, 7)) == 7


def test_the_rate_rises_then_falls_to_zero():
    training = Training(mixed_model(), OptimiserSettings(lr=1.0), total_steps=100)
    rates = [training._rate(s) for s in range(101)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == 1.0 and rates[100] == pytest.approx(0)
    assert all(a >= b for a, b in itertools.pairwise(rates[5:]))


def test_sizes_follow_the_number_of_rows():
    sizes = [schedule(n) for n in (1, 700, 6_500, 100_000, 1_000_000, 100_000_000)]
    assert [s.batch for s in sizes[:4]] == [128, 128, 512, 1024]
    assert all(s.total_steps >= 1 for s in sizes)
    assert all(s.steps_per_epoch == n // s.batch for s, n in zip(sizes[1:5], (700, 6_500, 100_000, 1_000_000), strict=True))
    assert sizes[0].total_steps == sizes[1].total_steps > schedule(700, epochs=1).total_steps > schedule(1, epochs=1).total_steps == 1


@pytest.mark.parametrize(("rows", "size"), [(1, 4), (7, 7), (7, 3), (7, 24)])
def test_every_record_is_taken_before_one_is_taken_again(rows, size):
    order = shuffled(rows, size, torch.Generator().manual_seed(0))
    assert len(order) == size
    for passed in order.split(rows):
        assert len(set(passed.tolist())) == len(passed)
    assert torch.equal(order[:rows], torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:size])


def test_image_networks_are_trained_for_fewer_epochs():
    assert schedule(6_500, structured=True).epochs < schedule(6_500).epochs
    assert schedule(1_000, structured=True).epochs < schedule(1_000).epochs
    assert schedule(40_000, structured=True).batch < schedule(40_000).batch
    assert schedule(6_500, epochs=3).epochs == 3


def test_small_cohorts_lean_on_the_generative_model():
    small, large = (ModelConfig.for_rows(CONFIG.modalities, rows, shared=8) for rows in (700, 6_500))
    assert small.elbo_weight > large.elbo_weight and small.dropout > large.dropout and small.shared == 8
    assert large == ModelConfig(CONFIG.modalities, shared=8)


def test_the_trunk_is_as_deep_as_is_said():
    modalities = CONFIG.modalities
    blank = {m.name: FeatureStatistics.blank(m.width) for m in modalities}
    deep, usual = (MultiModalVAE(ModelConfig(modalities, layers=n, members=2), blank) for n in (3, 2))
    added = sum(p.numel() for p in deep.parameters()) - sum(p.numel() for p in usual.parameters())
    assert added == 2 * (256 * 256 + 256)
    for layers in (0, MOST_LAYERS + 1):
        with pytest.raises(ValueError, match="layers"):
            ModelConfig(modalities, layers=layers)


def test_many_records_bear_a_wider_trunk_and_most_a_deeper_one():
    usual, many, most = (ModelConfig.for_rows(CONFIG.modalities, rows) for rows in (49_999, 50_000, 500_000))
    assert many.hidden > usual.hidden and many.dropout < usual.dropout and many.layers == usual.layers
    assert most.hidden == many.hidden and most.layers > many.layers and most.dropout == 0
    image = (ModalityConfig("scan", ("real",) * 4, form="image", shape=(1, 2, 2)),)
    for rows in (50_000, 500_000):
        assert ModelConfig.for_rows(image, rows) == ModelConfig.for_rows(image, 49_999)


def test_fit_keeps_the_best_average():
    train, tune = (mixed_values(200), masks(mixed_values(200))), DATA
    both = [[torch.cat(pair) for pair in zip(a, b, strict=True)] for a, b in zip(train, tune, strict=True)]
    fold = torch.cat([torch.full((200,), -1), torch.zeros(96, dtype=torch.long)])
    fitted = fit_in_memory(mixed_model(), both, fold, plan=schedule(200, batch=50, epochs=3))
    losses = [h["loss"] for h in fitted.history]
    again = Training(fitted.model, OptimiserSettings(), 1).tune(in_batches(tune, 1024))
    assert summarise(again)["loss"] == pytest.approx(min(losses))


def test_a_single_member_is_judged_by_its_elbo_where_nothing_can_be_hidden():
    config = ModelConfig((ModalityConfig("scan", ("real",) * 4, form="image", shape=(1, 2, 2)),), shared=4, hidden=16, decoder=16)
    x = [torch.randn(120, 4)]
    vae = MultiModalVAE(config, {"scan": FeatureStatistics.blank(4)})
    fitted = fit_in_memory(vae, (x, everything(x)), torch.arange(120) % 10 - 9, plan=schedule(120, batch=40, epochs=4, structured=True))
    assert [h["loss"] for h in fitted.history] == [pytest.approx(-h["elbo"]) for h in fitted.history]


def test_where_nobody_judges_a_single_member_is_trained_to_the_end():
    x = mixed_values(60)
    fitted = fit_in_memory(mixed_model(), (x, masks(x)), torch.full((60,), -1), plan=schedule(60, batch=30, epochs=3))
    assert [h["kept"] for h in fitted.history] == [True] * 3


def test_several_members_are_trained_to_the_end(monkeypatch):
    """Also where members by themselves get worse in every epoch, at which a single one stops."""
    names = ("elbo", "shared_kl", "a.impute", "a.observed", "a.reconstruction", "a.private_kl")
    sums = {"rows": 1, "elbo_rows": 1, "a.hidden": 1} | dict.fromkeys(names, 0)
    losses = itertools.count(1)
    monkeypatch.setattr(Training, "tune", lambda self, batches: sums | {"a.score": next(losses)})
    monkeypatch.setattr(Schedule, "patience", 1)
    plan = Schedule(batch=48, epochs=3, steps_per_epoch=2)
    for members, kept in ((2, [True, True, True]), (1, [True, False])):
        fold = torch.arange(96) % 2 - int(members == 1)
        assert [h["kept"] for h in fit_in_memory(mixed_model(members=members), DATA, fold, plan=plan).history] == kept


def test_heavy_tails_are_learned():
    """Errors of three features have 4 degrees of freedom, those of three others are Gaussian; all have variance 1."""
    generator, rows = torch.Generator().manual_seed(0), 2000
    errors = torch.randn(rows, 6, generator=generator)
    errors[:, :3] /= torch._standard_gamma(torch.full((rows, 3), 2.0), generator=generator).sqrt()
    common = torch.randn(rows, 1, generator=generator)
    x = [common + 0.5 * torch.randn(rows, 2, generator=generator), 0.8 * common + 0.7 * errors]
    modalities = (ModalityConfig("a", ("real",) * 2), ModalityConfig("b", ("real",) * 6))
    config = ModelConfig(modalities, members=2, shared=4, hidden=32, decoder=16, elbo_weight=0.3)
    model = MultiModalVAE(config, {m.name: statistics(v.numpy(), m.kinds) for m, v in zip(modalities, x, strict=True)})
    fitted = fit_in_memory(model, (x, everything(x)), torch.arange(rows) % 2, plan=schedule(rows, epochs=30))
    freedom_EF = fitted.model.likelihoods[1].freedom_E1F[:, 0].detach()
    assert (freedom_EF[:, :3].amax(1) < freedom_EF[:, 3:].amin(1)).all()
    assert freedom_EF[:, :3].mean() < 10 < freedom_EF[:, 3:].mean()


def rate(config, steps, batch=128):
    return optimiser(config, Schedule(batch, epochs=1, steps_per_epoch=steps), 1e6, seed=0).lr


@pytest.mark.parametrize("steps, expected", [(10_000, 2e-3), (600, 2e-3), (300, 2e-3 * 2**0.5), (150, 4e-3), (10, 4e-3)])
def test_few_steps_are_longer_ones(steps, expected):
    assert rate(CONFIG, steps) == pytest.approx(expected)


@pytest.mark.parametrize("batch, expected", [(256, 2e-3), (512, 2e-3 * 2**0.5), (1024, 4e-3), (4096, 4e-3)])
def test_steps_grow_with_the_root_of_the_batch(batch, expected):
    assert rate(CONFIG, 10_000, batch) == pytest.approx(expected)


def test_several_members_take_longer_steps_also_where_there_are_many():
    config = replace(CONFIG, members=5)
    assert rate(config, 10_000) == rate(config, 10) == 4e-3


def test_weights_decay_as_a_prior_of_them_makes_them():
    """Its pull on each record's share of the loss is inverse to the number of records."""
    plan = Schedule(128, epochs=1, steps_per_epoch=10)
    decays = [optimiser(CONFIG, plan, holders, seed=0).weight_decay for holders in (20, 1_000, 2_000, 10_000, 100_000, 100_000_000)]
    assert decays[1] == 2 * decays[2] == 10 * decays[3]
    assert decays[0] < 1 / 4e-3 / 20, "a step may not take most of a weight"
    assert decays[4] == decays[5] == OptimiserSettings.weight_decay
    assert optimiser(CONFIG, plan, 1_000, seed=3).seed == 3


def test_image_networks_are_trained_as_they_were_tried():
    config = ModelConfig((ModalityConfig("scan", ("real",) * 4, form="image", shape=(1, 2, 2)),))
    assert optimiser(config, Schedule(128, epochs=1, steps_per_epoch=10), 500, seed=0) == OptimiserSettings()


def test_an_epoch_is_judged_by_the_weights_as_they_are():
    """The members that judge share the averaged weights, also after a state was loaded."""
    training, other = (Training(mixed_model(members=3, seed=seed), OptimiserSettings(), total_steps=4) for seed in (0, 1))
    training.step(*DATA)
    other.load_state_dict(training.state_dict())
    for t in (training, other):
        for e, member in enumerate(t.members):
            for name, value in t.average.member(e).state_dict().items():
                assert torch.equal(member.state_dict()[name], value), name
