"""Contrast: the loss by hand, who takes part, and that it changes nothing else."""

import math

import pytest
import torch
from cohorts import CONFIG, everything, linked, masks, mixed_values, statistics
from hypothesis import given, settings
from hypothesis import strategies as st

from mmimpute.model import MultiModalVAE
from mmimpute.model.contrastive import ContrastConfig, ContrastiveVAE, contrast, likeness
from mmimpute.training import OptimiserSettings, Training, fit_in_memory, schedule

NAN = math.nan


def unit(rows, seed=0, members=2):
    return torch.nn.functional.normalize(torch.randn(members, rows, 5, generator=torch.Generator().manual_seed(seed)), dim=-1)


def by_hand(u_NP, like, part, temperature):
    """Khosla et al. 2020, eq. 2, with weights of positives: sums and products as they are written."""
    losses = []
    for i in range(len(u_NP)):
        others = [a for a in range(len(u_NP)) if a != i and part[a]]
        total = sum(float(like[i, p]) for p in others)
        if not part[i] or total == 0:
            continue
        below = sum(math.exp(float(u_NP[i] @ u_NP[a]) / temperature) for a in others)
        losses.append(-sum(float(like[i, p]) * math.log(math.exp(float(u_NP[i] @ u_NP[p]) / temperature) / below) for p in others) / total)
    return sum(losses) / max(1, len(losses))


@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_is_that_of_the_paper(soft):
    u_ENP = unit(12)
    labels = torch.tensor([0.0, 1, 2, 0, 1, 2, 0, NAN, 1, 5, 0, 1])
    part_EN = torch.stack([~labels.isnan(), ~labels.isnan() & (torch.arange(12) != 3)])
    found_E = contrast(u_ENP, likeness(labels, soft), part_EN, 0.2)
    expected = [by_hand(u, likeness(labels, soft), part, 0.2) for u, part in zip(u_ENP, part_EN, strict=True)]
    assert found_E.tolist() == pytest.approx(expected, rel=1e-5)


def test_softly_alike_in_one_place_and_far_from_the_other_is_the_binary_case():
    labels = torch.tensor([0.0, 50, 0, 50, 50, 0])
    assert torch.equal(likeness(labels, soft=True), likeness(labels, soft=False))
    assert torch.equal(likeness(torch.zeros(4), soft=True), torch.ones(4, 4))


def test_nobody_alike_is_no_loss():
    apart = contrast(unit(4), likeness(torch.arange(4.0), False), torch.ones(2, 4, dtype=torch.bool), 0.1)
    assert apart.tolist() == [0, 0]


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(10)), st.lists(st.sampled_from([0.0, 1.0, 2.0, NAN]), min_size=10, max_size=10), st.booleans())
def test_the_order_of_a_batch_does_not_matter(order, labels, soft):
    u_ENP, labels, order = unit(10), torch.tensor(labels), torch.tensor(order)
    loss = [contrast(u_ENP[:, at], likeness(labels[at], soft), ~labels[at].isnan().expand(2, -1), 0.1) for at in (torch.arange(10), order)]
    assert torch.allclose(*loss, atol=1e-5)


def contrastive(members=2, **terms):
    torch.manual_seed(0)
    values = mixed_values(300)
    fitted = {m.name: statistics(v.numpy(), m.kinds) for m, v in zip(CONFIG.modalities, values, strict=True)}
    config = CONFIG.__class__(**{**vars(CONFIG), "members": members, "dropout": 0.0})
    return ContrastiveVAE(config, fitted, ContrastConfig(**({"weights": (1.0,), "soft": (False,), "alone": True} | terms)))


def step(model, x, observed, labels, weight_EB=None):
    return model(x, observed, weight_EB, 1.0, torch.Generator().manual_seed(3), labels)


def test_only_labelled_records_that_a_member_learns_from_have_a_gradient():
    x = [v.requires_grad_() for v in mixed_values(40)]
    labels = torch.tensor([0.0, 1.0] * 20)[:, None]
    labels[30:] = NAN
    weight_EB = torch.ones(2, 40)
    weight_EB[0, :10] = 0
    model = contrastive()
    terms = step(model, x, everything(x), labels, weight_EB)
    for member, blind in ((0, [*range(10), *range(30, 40)]), (1, range(30, 40))):
        gradients = torch.autograd.grad(terms.contrast_E[member], x, retain_graph=True)
        still = sum(g.abs().sum(1) for g in gradients) == 0
        assert still.nonzero().squeeze(1).tolist() == list(blind)


def test_alone_leaves_the_decoders_as_they_are_and_reaches_every_other_weight():
    x = mixed_values(40)
    for on in (("z0",), ("plain",), ("z0", "codes")):
        model = contrastive(on=on)
        step(model, x, everything(x), torch.tensor([0.0, 1.0] * 20)[:, None]).objective.backward()
        wanted = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all(p.grad is not None for n, p in model.named_parameters() if n in wanted)
        assert not any("decoder" in n or n.startswith("likelihoods") for n in wanted)
        assert any(n.startswith("private.1.expert") for n in wanted) == (on == ("plain",))


def test_beside_l_the_terms_of_l_are_those_of_the_plain_model():
    x, observed = mixed_values(40), masks(mixed_values(40))
    model = contrastive(alone=False, weight=0.5)
    with_it = step(model.eval(), x, observed, torch.tensor([0.0, 1.0] * 20)[:, None])
    without = model.plain()(x, observed, None, 1.0, torch.Generator().manual_seed(3))
    assert torch.equal(with_it.score_EBK, without.score_EBK)
    assert with_it.objective.item() == pytest.approx(without.objective.item() + with_it.contrast_E.sum().item(), rel=1e-6)
    assert type(model.plain()) is MultiModalVAE and not any("projections" in n for n in model.plain().state_dict())


def test_a_linear_combination_adds_up():
    x, labels = mixed_values(40), torch.stack([torch.arange(40.0) % 2, torch.arange(40.0) / 10], 1)
    both = step(contrastive(weights=(2.0, 3.0), soft=(False, True)), x, everything(x), labels).contrast_E
    first = step(contrastive(weights=(2.0,), soft=(False,)), x, everything(x), labels[:, :1]).contrast_E
    second = step(contrastive(weights=(3.0,), soft=(True,)), x, everything(x), labels[:, 1:]).contrast_E
    assert torch.allclose(both, first + second, rtol=1e-4)


def test_training_by_labels_sorts_z0_by_them_and_stops_on_people_not_seen():
    x = linked(mixed_values(240))
    labels = (x[1][:, :1] > x[1][:, :1].median()).float()
    plan = schedule(240, 60, 20)
    fitted = fit_in_memory(contrastive(), (x, everything(x)), torch.arange(240) % 2, OptimiserSettings(lr=6e-3), plan, labels)
    losses = [epoch["loss"] for epoch in fitted.history]
    assert min(losses) < losses[0] - 0.1
    assert [epoch["contrast"] + 1 for epoch in fitted.history] == pytest.approx(losses)  # no score is known
    z0_BL = fitted.model.predict(x, everything(x)).z0_BL
    z0_BL = torch.nn.functional.normalize(z0_BL - z0_BL.mean(0), dim=1)[::2]  # fold 0: members show the first, which has not seen it
    similar, same = z0_BL @ z0_BL.T, labels[::2] == labels[::2].T
    assert similar[same].mean() > similar[~same].mean() + 0.5


def test_ranks_and_epochs_add_up_with_labels():
    training = Training(contrastive(alone=False), OptimiserSettings(), total_steps=2)
    x, labels = mixed_values(64), torch.tensor([0.0, 1.0] * 32)[:, None]
    training.step(x, everything(x), torch.arange(64) % 2, labels)
    sums = training.tune([(x, everything(x), torch.arange(64) % 2, labels)])
    assert sums["contrast"] > 0 and sums["rows"] == 64
