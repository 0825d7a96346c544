"""The whole model's contract, on a mixed cohort: every kind, whole modalities missing, and gaps in others."""

import dataclasses
import json

import pytest
import torch
from cohorts import CONFIG, linked, masks, mixed_model, mixed_values

from mmimpute.model import FeatureStatistics, Imputer, ModalityConfig, ModelConfig, MultiModalVAE, imputer
from mmimpute.model import stack as stacks
from mmimpute.model.stack import EXPERTS, WHOLE, Beliefs
from mmimpute.stacking import FEW_JUDGES, PARTS, Assembly, _target, _unseen, assemble, early, fit_others

MEMBERS, ROWS, NEW, DRAWS = 3, 120, 40, 2000
LEVEL = 0.9
KINDS = [
    (j, i, kind, levels) for j, m in enumerate(CONFIG.modalities) for i, (kind, levels) in enumerate(zip(m.kinds, m.levels, strict=True))
]


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    x = linked(mixed_values(ROWS))
    return assemble(mixed_model(members=MEMBERS), x, masks(x), torch.arange(ROWS) % MEMBERS)


@pytest.fixture
def records():
    """New people, the first with nothing observed and the second with everything."""
    x = linked(mixed_values(NEW, seed=5), seed=5)
    observed = masks(x, seed=5)
    for o in observed:
        o[0], o[1] = False, True
    return x, observed


def filled(x, observed, value: float):
    return [torch.where(o, v, value) for v, o in zip(x, observed, strict=True)]


def everything_said(model: Imputer, x, observed) -> list[torch.Tensor]:
    p = model.predict(x, observed, LEVEL)
    return [*p.mean, *p.std, *p.lower, *p.upper, p.z0_BL]


def draw(model: Imputer, x, observed, draws: int | None) -> list[torch.Tensor]:
    return model.impute([(v, 1) for v in filled(x, observed, torch.nan)], draws, torch.Generator().manual_seed(0))


# -- predict ------------------------------------------------------------------------------------------------------------


def test_what_is_observed_is_left_alone(model, records):
    x, observed = records
    p = model.predict(x, observed, LEVEL)
    for j, o in enumerate(observed):
        for found in (p.mean[j], p.lower[j], p.upper[j]):
            assert torch.equal(found[o], x[j][o])
        assert not p.std[j][o].any() and (p.std[j][~o] > 0).all()


def test_what_is_missing_is_finite_and_inside_its_interval(model, records):
    x, observed = records
    p = model.predict(x, observed, LEVEL)
    for j, o in enumerate(observed):
        for found in (p.mean[j], p.std[j], p.lower[j], p.upper[j], p.z0_BL):
            assert torch.isfinite(found).all()
        assert (p.lower[j] < p.mean[j])[~o].all() and (p.mean[j] < p.upper[j])[~o].all()
    for j, i, kind, levels in KINDS:
        missing = p.mean[j][~observed[j][:, i], i]
        if kind != "real":
            assert missing.min() >= 0 and missing.max() <= (levels - 1 if levels else 1 if kind == "binary" else torch.inf)


def test_intervals_widen_with_their_level_and_are_only_made_when_asked_for(model, records):
    x, observed = records
    narrow, wide, none = (model.predict(x, observed, level) for level in (0.5, 0.95, None))
    assert none.lower is None and none.upper is None
    for j, o in enumerate(observed):
        assert torch.equal(none.mean[j], wide.mean[j])
        assert (wide.lower[j] < narrow.lower[j])[~o].all() and (narrow.upper[j] < wide.upper[j])[~o].all()


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e6])
def test_unobserved_entries_may_hold_anything(model, records, junk):
    x, observed = records
    for a, b in zip(*(everything_said(model, filled(x, observed, v), observed) for v in (0.0, junk)), strict=True):
        assert torch.equal(a, b)


def test_a_record_does_not_depend_on_its_neighbours(model, records, monkeypatch):
    x, observed = records
    together = everything_said(model, x, observed)
    monkeypatch.setattr(imputer, "PIECE", {"cpu": (1, (1, 1))})  # one record at a time
    for a, b in zip(everything_said(model, x, observed), together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_of_whom_nothing_is_observed_is_said_what_is_true_of_people(model, records):
    x, observed = records
    p = model.predict(x, observed, LEVEL)
    for j, i, kind, _ in KINDS:
        standardise, (mean, std) = model.vae.standardise[j], (p.mean[j][0, i], p.std[j][0, i])
        if kind == "binary":
            torch.testing.assert_close(mean, standardise.mean[i])
        elif kind == "real" and not standardise.log[i]:
            torch.testing.assert_close((mean, std), (standardise.mean[i], standardise.std[i]))


def test_evidence_moves_predictions_towards_the_truth(model):
    """The columns are linked: half of the variance of what is missing is told by the rest."""
    x = linked(mixed_values(400, seed=8), seed=8)
    for j, i in ((0, 0), (0, 2), (0, 3), (0, 5), (1, 0), (1, 3), (2, 1)):  # real features, counts and levels
        observed = [torch.ones_like(v, dtype=torch.bool) for v in x]
        observed[j] = ~observed[j]
        mean = model.predict(x, observed).mean[j][:, i]
        assert ((mean - x[j][:, i]).square().mean() / x[j][:, i].var()).item() < 0.5


def test_intervals_hold_counts_and_levels_as_they_hold_numbers(model):
    x = linked(mixed_values(1000, seed=9), seed=9)
    for j in (0, 2):
        observed = [torch.ones_like(v, dtype=torch.bool) for v in x]
        observed[j] = ~observed[j]
        p = model.predict(x, observed, LEVEL)
        numbers = [i for k, i, kind, _ in KINDS if k == j and kind in ("real", "count", "ordinal")]
        inside = ((x[j] >= p.lower[j]) & (x[j] <= p.upper[j]))[:, numbers]
        assert inside.float().mean() > LEVEL - 0.03


@pytest.mark.parametrize(("rows", "seen"), [(100, False), (FEW_JUDGES, True)])
def test_few_judges_of_a_single_member_are_judged_by_stacks_that_have_not_seen_them(rows, seen):
    """What is said of a fifth of them does not depend on their truth; many judges are judged by the stack that they fitted."""
    x = linked(mixed_values(rows))
    data = Assembly(mixed_model(), x, [torch.ones_like(v, dtype=torch.bool) for v in x], torch.zeros(rows, dtype=torch.long))
    part = torch.arange(rows) % PARTS == 0
    location_MEBD = data.inputs.z[1] + torch.randn(3, 1, rows, 5, generator=torch.Generator().manual_seed(0))
    beliefs, said = Beliefs(location_MEBD, torch.ones(1, rows, 5), torch.ones(rows)), []
    for shift in (0.0, 5.0):
        for values in (data.inputs.z[1], data.inputs.filled[1]):
            values[part] += shift
        target = _target(data, 1, torch.arange(rows), torch.ones(rows, 5, dtype=torch.bool))
        stacks.fit(data.imputer.stack.modalities[1], WHOLE, beliefs, target)
        said.append(torch.stack(_unseen(data, 1, WHOLE, False, beliefs, target)))
    moved = (said[0] != said[1]).any(0)
    assert moved[~part].all() and moved[part].any() == seen


# -- members ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("e", range(MEMBERS))
def test_a_member_believes_what_it_believes_in_the_ensemble(model, records, e):
    x, observed = records
    observed = [o & (torch.arange(NEW) != 1)[:, None] for o in observed]
    for j in range(len(x)):
        masks = [o if i != j else torch.zeros_like(o) for i, o in enumerate(observed)]
        together, alone = model.believe(x, masks, j), model.member(e).believe(x, masks, j)
        torch.testing.assert_close(alone.location_MEBD[:, 0], together.location_MEBD[:, e], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(alone.scale_EBD[0], together.scale_EBD[e], rtol=1e-4, atol=1e-4)
        others = [k for k in range(MEMBERS) if k != e]
        assert ((together.location_MEBD[:, others] - together.location_MEBD[:, [e]]).abs().amax((1, 2, 3)) > 0.01).all()


def test_a_member_has_its_own_stack_and_intervals(model):
    for e in range(MEMBERS):
        alone = model.member(e)
        assert torch.equal(alone.conformal.quantile_EKGL2[0], model.conformal.quantile_EKGL2[e])
        for own, shared in zip(alone.stack.buffers(), model.stack.buffers(), strict=True):
            assert torch.equal(own[0], shared[e])


def test_experts_say_what_they_believe(model, records):
    x, observed = records
    observed[1] = torch.zeros_like(observed[1])
    standardise = model.vae.standardise[1]
    location_MBD = model.believe(x, observed, 1).location_MEBD.mean(1)
    found = model.experts(x, observed, 1)
    assert tuple(found) == EXPERTS
    for (mean, std), location_BD in zip(found.values(), location_MBD, strict=True):
        torch.testing.assert_close(mean, location_BD * standardise.std + standardise.mean)
        assert (std > 0).all()


def test_the_stack_hears_the_vae_at_the_means_of_its_latents(model, records, monkeypatch):
    """However many nodes stand for what it draws, which is wider than what it says at any of them."""
    x, observed = records
    observed[1] = torch.zeros_like(observed[1])
    vae, inputs = model.vae, model.vae.inputs(x, observed)
    mean_EBL = vae.inference(inputs.codes, inputs.shown_BK).mean
    heads = vae._decode(1, inputs, mean_EBL[None], torch.zeros(1, 1, 1, 1))
    told_B = inputs.shown_BK.any(1)
    for nodes in (2, 64):
        monkeypatch.setattr(imputer, "NODES", nodes)
        believed = model.believe(x, observed, 1)
        for found_EBD, expected_EBD in zip(
            (believed.location_MEBD[0], believed.scale_EBD), vae.likelihoods[1].location_scale(heads, vae.standardise[1]), strict=True
        ):
            torch.testing.assert_close(found_EBD[:, told_B], expected_EBD[:, told_B])
    assert (model.drawn_from(x, observed, 1)[1] > believed.scale_EBD)[..., model.real_1].float().mean() > 0.9


# -- draws --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [None, 7])
def test_draws_copy_what_is_observed_and_respect_the_supports(model, records, draws):
    x, observed = records
    drawn = draw(model, x, observed, draws)
    for v, o, d in zip(x, observed, drawn, strict=True):
        assert d.shape == ((draws,) if draws else ()) + v.shape and torch.isfinite(d).all()
        assert (d[..., o] == v[o]).all()
    for j, i, kind, levels in KINDS:
        values = drawn[j][..., i]
        if kind != "real":
            assert (values == values.round()).all() and values.min() >= 0
        if levels or kind == "binary":
            assert values.max() <= (levels or 2) - 1


@pytest.fixture
def exact(model, monkeypatch):
    """So many nodes that the VAE's deviations are known, and no correlations but its own: draws then have exactly the
    margins of the stack."""
    monkeypatch.setattr(imputer, "NODES", 512)
    plain = Imputer.from_state(model.config, model.state_dict())
    for j, m in enumerate(CONFIG.modalities):
        getattr(plain, f"colour_{j}").copy_(torch.eye(m.width))
    return plain


def test_draws_have_the_means_and_deviations_that_predict_says(exact, records):
    """Within Monte Carlo error, record by record."""
    x, observed = records
    p, drawn = exact.predict(x, observed), draw(exact, x, observed, DRAWS)
    for j, i, kind, _ in KINDS:
        missing = ~observed[j][:, i]
        mean, std, values = p.mean[j][missing, i], p.std[j][missing, i], drawn[j][:, missing, i]
        error = (values.mean(0) - mean) * DRAWS**0.5
        if kind == "binary":
            assert (error.abs() < 4.5 * (mean * (1 - mean) + 1e-3).sqrt()).all()
        elif kind == "real" and not exact.vae.standardise[j].log[i]:
            assert (error.abs() < 4.5 * std).all()
            ratio = values.std(0) / std
            assert ratio.mean().item() == pytest.approx(1, abs=0.03) and (ratio - 1).abs().max() < 0.15
        elif kind == "real":  # the stack says how the logarithm is distributed; only there is the draws' shape of no matter
            assert (error.abs() / DRAWS**0.5 < 0.25 * std).all()


def test_colours_keep_the_variance_on_average(model, records):
    x, observed = records
    observed = [o & (torch.arange(NEW) % 3 != j)[:, None] for j, o in enumerate(observed)]
    p, drawn = model.predict(x, observed), draw(model, x, observed, DRAWS)
    for j, i, kind, _ in KINDS:
        whole = ~observed[j].any(1)
        if kind == "real" and not model.vae.standardise[j].log[i]:
            assert (drawn[j][:, whole, i].var(0) / p.std[j][whole, i] ** 2).mean().item() == pytest.approx(1, abs=0.25)


def test_draws_repeat_with_the_seed(model, records):
    first, second = (draw(model, *records, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = model.impute([(v, 1) for v in filled(*records, torch.nan)], 3, torch.Generator().manual_seed(1))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# -- state --------------------------------------------------------------------------------------------------------------


def test_the_state_is_the_whole_model(model, records):
    x, observed = records
    config = ModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(model.config))))
    again = Imputer.from_state(config, {name: t.clone() for name, t in model.state_dict().items()})
    for a, b in zip(everything_said(model, x, observed), everything_said(again, x, observed), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(draw(model, x, observed, 4), draw(again, x, observed, 4), strict=True):
        assert torch.equal(a, b)


# -- data that lacks things ---------------------------------------------------------------------------------------------

SCARCE = (
    ModalityConfig("mixed", ("real", "binary", "count", "categorical"), (0, 0, 0, 3)),
    ModalityConfig("wide", ("real",) * 42),
    ModalityConfig("single", ("real",)),
)


def scarce(rows: int):
    """Three modalities, one of them wide enough to be read by its components."""
    z = torch.randn(rows, 1)
    mixed = torch.cat([z, (z > 0).float(), torch.poisson(z.exp()), torch.randint(3, (rows, 1)).float()], 1)
    x = [mixed, z + torch.randn(rows, 42), z + torch.randn(rows, 1)]
    config = ModelConfig(SCARCE, members=2, shared=6, hidden=16, decoder=16)
    vae = MultiModalVAE(config, {m.name: FeatureStatistics.blank(m.width) for m in SCARCE}).eval()
    return vae, x, masks(x, share=0.8), torch.arange(rows) % 2


def check(vae, x, observed, fold) -> Imputer:
    """Fits without a warning, and what comes out is of use."""
    model = assemble(vae, x, observed, fold)
    assert all(torch.isfinite(t).all() for t in model.state_dict().values() if t.is_floating_point())
    p = model.predict(x, observed, LEVEL)
    for j, o in enumerate(observed):
        real = ~o & torch.tensor([kind == "real" for kind in SCARCE[j].kinds])
        assert torch.isfinite(p.mean[j]).all() and (p.std[j][real] > 0).all()
        assert (p.lower[j] < p.upper[j])[real].all()
    assert all(torch.isfinite(d).all() for d in draw(model, x, observed, 3))
    return model


@pytest.mark.parametrize("rows", [1, 5])
def test_few_records_are_enough_to_fit(rows):
    check(*scarce(rows))


@pytest.mark.parametrize("j", range(len(SCARCE)))
def test_a_modality_may_never_be_observed(j):
    vae, x, observed, fold = scarce(24)
    observed[j][:] = False
    model = check(vae, x, observed, fold)
    weight = getattr(model.additive, f"weight_{j}")
    assert not weight.any()


@pytest.mark.parametrize("features", [[(0, 0), (1, 7)], [(0, 1), (0, 2), (0, 3)]])
def test_features_may_never_be_observed(features):
    vae, x, observed, fold = scarce(24)
    for j, i in features:
        observed[j][:, i] = False
    check(vae, x, observed, fold)


@pytest.mark.parametrize("j", range(len(SCARCE)))
@pytest.mark.parametrize("only", [False, True])
def test_a_fold_may_hold_no_record_of_a_modality_or_all_of_them(j, only):
    """All of them: the member that does not learn from that fold has never seen the modality."""
    vae, x, observed, fold = scarce(24)
    observed[j] &= ((fold == 0) if only else (fold != 0))[:, None]
    check(vae, x, observed, fold)


def test_one_member_learns_from_records_without_a_fold():
    vae, x, observed, fold = scarce(24)
    check(vae.member(0), x, observed, torch.where(fold == 0, 0, -1))


def test_a_cohort_of_one_modality_fills_its_gaps():
    x = [torch.randn(100, 4, generator=torch.Generator().manual_seed(0)) @ torch.tensor([[1.0, 0.9, 0.8, 0.7]]).expand(4, 4)]
    config = ModelConfig((ModalityConfig("labs", ("real",) * 4),), members=2)
    vae = MultiModalVAE(config, {"labs": FeatureStatistics.blank(4)})
    model = assemble(vae, x, masks(x), torch.arange(100) % 2)
    observed = [torch.rand(100, 4, generator=torch.Generator().manual_seed(1)) > 0.3]
    found = model.predict([torch.where(observed[0], x[0], 0.0)], observed)
    assert torch.equal(found.mean[0][observed[0]], x[0][observed[0]])
    assert float((found.mean[0] - x[0])[~observed[0]].square().mean()) < 0.5 * float(x[0].var())


def test_other_experts_take_nothing_trained_from_the_vae():
    """So that they can be fitted while it is being trained."""
    x, fold = linked(mixed_values(ROWS)), torch.arange(ROWS) % MEMBERS
    trained, other = mixed_model(members=MEMBERS), mixed_model(members=MEMBERS)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert early(other.config)
    others = fit_others(Assembly(other.eval(), x, masks(x), fold))
    expected = assemble(trained, x, masks(x), fold).state_dict()
    found = assemble(trained, x, masks(x), fold, others=others).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)
