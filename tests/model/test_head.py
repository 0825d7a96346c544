"""Heads: the linear one is the penalised maximum likelihood, the full one does not lose to it, members keep to their folds."""

import numpy as np
import pytest
import torch
from cohorts import everything, masks, mixed_model, mixed_values
from sklearn.linear_model import LogisticRegression

from mmimpute.model.head import Head, Labels, fit_full, fit_linear, weights


def classed(rows=300, seed=0):
    """Latents (2, N, 6) and a class of three that they tell of, and one of two."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(2, rows, 6))
    three = np.argmax(z[0] @ rng.normal(size=(6, 3)) + 0.5 * rng.gumbel(size=(rows, 3)), 1)
    two = (z[1, :, 0] + rng.normal(size=rows) > 1).astype(int)
    return torch.from_numpy(z).float(), torch.from_numpy(np.stack([three, two], 1))


@pytest.mark.parametrize("balanced", [False, True])
def test_the_linear_head_is_scikit_learns_logistic_regression(balanced):
    z_ENL, classes_NT = classed()
    classes_NT[:40, 0] = -1
    fold_N = torch.arange(300) % 2
    head = fit_linear(z_ENL, Labels.of(classes_NT, (3, 2), fold_N, 2, balanced))
    for member in range(2):
        rows = (fold_N != member).numpy()
        seen = rows & (classes_NT >= 0).any(1).numpy()
        z = z_ENL[member].numpy()
        z = (z - z[seen].mean(0)) / z[seen].std(0)
        kept = rows & (classes_NT[:, 0] >= 0).numpy()
        other = LogisticRegression(C=1 / 6, class_weight="balanced" if balanced else None, tol=1e-8, max_iter=2000)
        expected = other.fit(z[kept], classes_NT[kept, 0]).predict_proba(z)
        found = head.logits(z_ENL)[0][member].softmax(1)
        assert np.allclose(found.detach().numpy(), expected, atol=2e-4)


def test_balanced_classes_weigh_the_same():
    _, classes_NT = classed()
    (three_EN, two_EN) = weights(classes_NT, (3, 2), torch.ones(2, 300), True)
    sums = [float(two_EN[0][classes_NT[:, 1] == c].sum()) for c in range(2)]
    assert sums == pytest.approx([150, 150]) and float(three_EN[0].sum()) == pytest.approx(300)


def test_a_class_that_a_member_never_saw_does_not_break_it():
    z_ENL, classes_NT = classed()
    fold_N = torch.where(classes_NT[:, 0] == 2, 0, 1)  # member 0 learns nothing of class 2
    head = fit_linear(z_ENL, Labels.of(classes_NT[:, :1], (3,), fold_N, 2, False))
    assert head.logits(z_ENL)[0][0].softmax(1)[:, 2].max() < 0.1


def told(seed=0):
    """A model, complete records and a class that one modality tells of."""
    x = mixed_values(240, seed)
    return mixed_model(members=2), x, (x[1][:, 0] * x[1][:, 1] > 0).long()[:, None]


def test_the_full_head_does_not_judge_worse_than_the_linear_one_and_learns_what_it_cannot():
    vae, x, classes_NT = told()
    labels = Labels.of(classes_NT, (2,), torch.arange(240) % 4, 2, False)
    inputs = vae.inputs(x, everything(x))
    with torch.no_grad():
        z0 = Head(2, 8, ()).latents(vae, inputs.codes, inputs.present_BK)
    linear = fit_linear(z0, labels)
    before = [p.clone() for p in vae.parameters()]
    full = fit_full(vae, linear, inputs, labels, epochs=30, lr=5e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True)), "the model itself was changed"

    def loss(head):
        return sum(
            float(-(w * head.members(vae, x, everything(x))[0][:, torch.arange(240), classes_NT[:, 0]].log()).sum()) for w in labels.judge
        )

    assert loss(full) < loss(linear)


def test_any_modality_may_be_missing_and_a_record_does_not_depend_on_others():
    vae, x, classes_NT = told()
    inputs = vae.inputs(x, everything(x))
    with torch.no_grad():
        z0 = Head(2, 8, ()).latents(vae, inputs.codes, inputs.present_BK)
    head = fit_linear(z0, Labels.of(classes_NT, (2,), torch.full((240,), -1), 2, False))
    observed = masks(x, share=0.5)
    observed = [o & (torch.arange(240)[:, None] > 0) for o in observed]  # of the first record nothing
    (p_BC,) = head.predict(vae, x, observed)
    assert torch.allclose(p_BC.sum(1), torch.ones(240)) and p_BC.isfinite().all()
    (alone,) = head.predict(vae, [v[7:8] for v in x], [o[7:8] for o in observed])
    assert torch.allclose(alone, p_BC[7:8], atol=1e-6)
    changed = [torch.where(o, v, 1e3) for v, o in zip(x, observed, strict=True)]
    assert torch.equal(head.predict(vae, changed, observed)[0], p_BC), "what is not observed was read"


def test_a_member_does_not_learn_from_its_fold():
    vae, x, classes_NT = told()
    inputs = vae.inputs(x, everything(x))
    fold_N = torch.arange(240) % 2
    other = torch.where(fold_N[:, None] == 0, 1 - classes_NT, classes_NT)  # only labels of fold 0 differ
    heads = []
    for classes in (classes_NT, other):
        labels = Labels.of(classes, (2,), fold_N, 2, False)
        with torch.no_grad():
            z0 = Head(2, 8, ()).latents(vae, inputs.codes, inputs.present_BK)
        heads.append(fit_linear(z0, labels))
    first, second = (h.linear[0].weight for h in heads)
    assert torch.allclose(first[0], second[0], atol=1e-3) and not torch.allclose(first[1], second[1], atol=0.1)
