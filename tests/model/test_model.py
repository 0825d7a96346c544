"""The model's contract: masks, shapes, subsets, determinism, terms."""

import dataclasses
import json

import pytest
import torch
from cohorts import CONFIG, masks, mixed_model, mixed_values

from mmimpute.model import ModalityConfig, ModelConfig, MultiModalVAE

ROWS = 60


def loss_and_gradients(model, x, observed):
    torch.manual_seed(5)
    model.train().zero_grad()
    terms = model(x, observed)
    terms.objective.backward()
    model.eval()
    return terms, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("junk", [1e6, float("nan"), float("inf"), -float("inf")])
def test_unobserved_values_change_nothing(junk):
    model, x = mixed_model(), mixed_values(ROWS)
    observed = masks(x)
    zeroed, spoiled = ([torch.where(o, v, fill) for v, o in zip(x, observed, strict=True)] for fill in (0.0, junk))
    for first, second in zip(*(loss_and_gradients(model, v, observed) for v in (zeroed, spoiled)), strict=True):
        for a, b in zip(first, second, strict=True):
            assert a is b is None or (torch.isfinite(a).all() and torch.equal(a, b))
    first, second = (model.predict(v, observed) for v in (zeroed, spoiled))
    for a, b in zip(first.mean + first.std + [first.z0_BL], second.mean + second.std + [second.z0_BL], strict=True):
        assert torch.isfinite(a).all() and torch.equal(a, b)


def test_an_absent_modality_may_hold_anything():
    model, (mixed, plain, codes) = mixed_model(), mixed_values(ROWS)
    anything = (None, torch.full_like(plain, torch.nan), torch.full_like(plain, 1e6))
    found = [model.impute([(mixed, 1), (a, 0), (codes, 1)], generator=torch.Generator().manual_seed(1)) for a in anything]
    assert torch.equal(found[0][1], found[1][1]) and torch.equal(found[0][1], found[2][1])


@pytest.mark.parametrize("subset", range(8))
def test_impute_any_subset(subset):
    model, x = mixed_model(), mixed_values(ROWS)
    flags = [subset >> j & 1 for j in range(3)]
    x[1][::3, 2] = torch.nan
    record = [(v if f else torch.empty(ROWS, 0), f) for v, f in zip(x, flags, strict=True)]
    for draws, shape in ((None, (ROWS,)), (3, (3, ROWS))):
        completed = model.impute(record, draws=draws)
        for c, v, f in zip(completed, x, flags, strict=True):
            assert c.shape == (*shape, v.shape[1]) and torch.isfinite(c).all()
            if f:
                known = ~torch.isnan(v)
                assert (c[..., known] == v[known]).all()


def test_missing_values_inside_an_observed_modality_are_drawn():
    model, x = mixed_model(), mixed_values(ROWS)
    x[1][0, 0] = torch.nan
    drawn = model.impute([(v, 1) for v in x], draws=5)[1]
    assert len(drawn[:, 0, 0].unique()) == 5
    assert len(drawn[:, 0, 1].unique()) == 1


def test_nothing_observed_is_the_prior():
    model = mixed_model()
    x = mixed_values(4)
    nothing = [torch.zeros_like(v, dtype=torch.bool) for v in x]
    inputs = model.inputs(x, nothing)
    q0 = model.inference(inputs.codes, inputs.shown_BK)
    assert (q0.mean == 0).all() and (q0.var == 1).all()
    z0 = torch.randn(1, 4, CONFIG.shared)
    for j, private in enumerate(model.private):
        prior = private.p(z0)
        posterior = private.q(z0, prior, inputs.codes[j], inputs.shown_BK[:, j])
        assert torch.equal(prior.mean, posterior.mean) and torch.equal(prior.var, posterior.var)
    assert [t.shape[0] for t in model.impute([(None, 0)] * 3)] == [1, 1, 1]


def test_a_row_does_not_depend_on_its_neighbours():
    model, x = mixed_model(), mixed_values(ROWS)
    observed = masks(x)
    together = model.predict(x, observed)
    for row in (0, 17):
        alone = model.predict([v[row : row + 1] for v in x], [o[row : row + 1] for o in observed])
        for a, b in zip(alone.mean + alone.std, together.mean + together.std, strict=True):
            torch.testing.assert_close(a[0], b[row], rtol=1e-5, atol=1e-5)


def test_predict_agrees_with_the_moments_of_draws():
    """The fixed nodes and the random draws describe one distribution."""
    model, x = mixed_model(), mixed_values(4)
    plain = torch.ones(5, dtype=torch.bool)
    observed = [torch.zeros_like(x[0], dtype=torch.bool), plain.expand(4, 5), torch.zeros_like(x[2], dtype=torch.bool)]
    predicted = model.predict(x, observed, draws=512)
    drawn = model.impute([(None, 0), (x[1], 1), (None, 0)], draws=20_000, generator=torch.Generator().manual_seed(0))
    for k, columns in ((0, [0, 1, 3, 5]), (2, [0])):
        torch.testing.assert_close(drawn[k].mean(0)[:, columns], predicted.mean[k][:, columns], rtol=0.03, atol=0.03)
        torch.testing.assert_close(drawn[k].std(0)[:, columns], predicted.std[k][:, columns], rtol=0.05, atol=0.02)


def test_generate_shapes_and_supports():
    mixed, plain, codes = mixed_model().generate(200, torch.Generator().manual_seed(0))
    assert mixed.shape == (200, 7) and plain.shape == (200, 5) and codes.shape == (200, 2)
    assert set(mixed[:, 1].tolist()) <= {0.0, 1.0}
    for t in (mixed[:, 2:6], codes):
        assert (t == t.round()).all() and (t >= 0).all()


def test_terms_add_up_and_respect_the_masks():
    model, x = mixed_model(), mixed_values(ROWS)
    observed = masks(x)
    terms = model(x, observed)
    expected = terms.reconstruction_ERK.sum(2) - terms.private_kl_ERK.sum(2) - terms.shared_kl_ER
    torch.testing.assert_close(terms.elbo_ER, expected)
    torch.testing.assert_close(terms.imputation_EB, terms.impute_EBK.sum(2))
    torch.testing.assert_close(terms.total_ER, expected + terms.impute_EBK.sum(2))
    assert (terms.private_kl_ERK >= -1e-5).all() and (terms.shared_kl_ER >= -1e-5).all()
    for term in (terms.reconstruction_ERK[0], terms.private_kl_ERK[0]):
        assert (term[~terms.observed_BK] == 0).all() and (term[terms.observed_BK] != 0).all()
    for term in (terms.impute_EBK[0], terms.score_EBK[0]):
        assert (term[~terms.hidden_BK] == 0).all() and (term[terms.hidden_BK] != 0).all()


def test_members_side_by_side_are_each_what_they_are_alone():
    model, x = mixed_model(members=3), mixed_values(ROWS)
    observed = masks(x)
    together = model.predict(x, observed)
    alone = [model.member(e).predict(x, observed) for e in range(3)]
    for j in range(3):
        numbers = [i for i, kind in enumerate(CONFIG.modalities[j].kinds) if kind != "categorical"]
        mean = torch.stack([p.mean[j] for p in alone]).mean(0)
        torch.testing.assert_close(together.mean[j][:, numbers], mean[:, numbers], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.z0_BL, alone[0].z0_BL)
    assert not torch.allclose(alone[0].mean[1], alone[1].mean[1])


def test_a_member_learns_nothing_from_its_own_fold():
    """Whatever the records of fold 1 hold, member 1 gets the same gradient, and member 0 another one."""
    model, x = mixed_model(members=2), mixed_values(ROWS)
    fold_B = torch.arange(ROWS) % 2
    weight_EB = (fold_B != torch.arange(2)[:, None]).float()
    observed = [torch.ones_like(v, dtype=torch.bool) for v in x]
    other = [torch.where((fold_B == 1)[:, None], v.flip(0), v) for v in x]
    found = []
    for values in (x, other):
        model.zero_grad()
        model(values, observed, weight_EB, generator=torch.Generator().manual_seed(0)).objective.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a[1], b[1], rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(a[0], b[0], rtol=1e-2) for a, b in zip(*found, strict=True))


def test_elbo_is_a_lower_bound_that_many_samples_approach():
    """One Gaussian feature per modality and latents switched off: L_elbo is the likelihood itself."""
    model, x = mixed_model(), mixed_values(ROWS)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for part in [model.shared.trunk[-1], *(q.expert for q in model.private)]:
            part.bias[..., part.bias.shape[-1] // 2 :] = -50.0  # precision 0: every posterior is its prior
    observed = [torch.zeros_like(x[0], dtype=torch.bool), torch.ones_like(x[1], dtype=torch.bool), torch.zeros_like(x[2], dtype=torch.bool)]
    terms = model(x, observed)
    z = model.standardise[1](x[1])
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(terms.elbo_ER[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("absent", [None, 0, 1, 2])
def test_gradients_reach_every_parameter(absent):
    model, x = mixed_model(), mixed_values(ROWS)
    observed = masks(x)
    if absent is not None:
        observed[absent] = torch.zeros_like(observed[absent])
    _, gradients = loss_and_gradients(model, x, observed)
    for (name, _), g in zip(model.named_parameters(), gradients, strict=True):
        assert g is not None and torch.isfinite(g).all(), name
        if absent is None:
            assert (g != 0).any(), name


def test_config_and_state_round_trip():
    model, x = mixed_model(), mixed_values(ROWS)
    config = ModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(CONFIG))))
    assert config == CONFIG
    again = MultiModalVAE.from_state(config, model.state_dict())
    first, second = (m.predict(x, masks(x)) for m in (model, again))
    for a, b in zip(first.mean + first.std, second.mean + second.std, strict=True):
        assert torch.equal(a, b)


def test_a_config_written_before_there_were_decoders_has_the_likelihood():
    found = dataclasses.asdict(CONFIG)
    for modality in found["modalities"]:
        assert modality.pop("decoder") == "likelihood"
    assert ModelConfig.from_dict(found) == CONFIG


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ModalityConfig("m", ("real", "rael")), "unknown kinds"),
        (lambda: ModalityConfig("m", ()), "no features"),
        (lambda: ModalityConfig("m", ("ordinal",)), "at least 2 levels"),
        (lambda: ModalityConfig("m", ("real",), hide=0.0), "expected a value in"),
        (lambda: ModalityConfig("m", ("real",), tails="cauchy"), "unknown tails 'cauchy'; valid ones are"),
        (lambda: ModalityConfig("m", ("real",), decoder="gan"), "unknown decoder 'gan'; valid ones are"),
        (lambda: ModelConfig(()), "at least one modality"),
        (lambda: ModelConfig.from_dict({"modalities": [], "hiden": 3}), "valid keys are"),
        (lambda: mixed_model().impute([(None, 0)]), "3 modalities, found 1"),
        (lambda: mixed_model().impute([(None, 0), (torch.zeros(2, 4), 1), (None, 0)]), "'plain' has shape"),
    ],
)
def test_mistakes_are_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_what_has_nothing_observed_comes_from_the_fitted_prior():
    model, x = mixed_model(), mixed_values(ROWS)
    observed = masks(x)
    observed = [o & (torch.arange(ROWS) > 0)[:, None] for o in observed]
    some_B = torch.stack([o.any(1) for o in observed]).any(0)
    before = model.predict(x, observed)
    model.prior.root_ELL.mul_(0.1)
    after = model.predict(x, observed)
    for a, b in zip(before.mean + before.std, after.mean + after.std, strict=True):
        assert torch.equal(a[some_B], b[some_B])
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(before.std, after.std, strict=True))
