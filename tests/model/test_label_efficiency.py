"""A simulated cohort whose cheap label tells of the dear one: few labels do more. Where it is random, it does no harm."""

import numpy as np
import pytest
import torch
from cohorts import everything, statistics
from sklearn.metrics import roc_auc_score

from mmimpute.model import ModalityConfig, ModelConfig, MultiModalVAE
from mmimpute.model.contrastive import ContrastConfig, ContrastiveVAE
from mmimpute.model.head import Head, Labels, fit_linear
from mmimpute.training import OptimiserSettings, fit_in_memory, schedule

ROWS, SCARCE, WIDTH = 1_500, 30, 12
SEEDS = 5


def cohort(seed: int):
    """Two modalities of strong nuisance factors; what matters is one weak direction in both of them."""
    rng = np.random.default_rng(seed)
    hidden, nuisance = rng.normal(size=(ROWS, 1)), rng.normal(size=(ROWS, 4))
    mix = rng.normal(size=(4, 2 * WIDTH))
    x = nuisance @ mix + 0.8 * hidden @ rng.normal(size=(1, 2 * WIDTH)) + 0.7 * rng.normal(size=(ROWS, 2 * WIDTH))
    x = torch.from_numpy(x).float()
    dear = (hidden[:, 0] + 0.3 * rng.normal(size=ROWS) > 0).astype(int)
    return [x[:, :WIDTH], x[:, WIDTH:]], hidden[:, 0], dear


def auroc(seed: int, cheap: str | None, alone: bool = True) -> float:
    """Of people never seen, by a linear head on z0 from SCARCE labels."""
    x, hidden, dear = cohort(seed)
    train = torch.arange(ROWS) < 1_000
    config = ModelConfig(tuple(ModalityConfig(n, ("real",) * WIDTH) for n in "ab"), shared=8, hidden=32, decoder=16, dropout=0.0)
    fitted = {n: statistics(v[train].numpy(), ("real",) * WIDTH) for n, v in zip("ab", x, strict=True)}
    torch.manual_seed(seed)
    rng = np.random.default_rng(100 + seed)
    labels = {"informative": hidden + 0.5 * rng.normal(size=ROWS), "random": rng.normal(size=ROWS)}.get(cheap, np.zeros(ROWS))
    terms = ContrastConfig((1.0,), (True,), temperature=0.2, weight=0.1, alone=alone)
    vae = ContrastiveVAE(config, fitted, terms) if cheap else MultiModalVAE(config, fitted)
    data, fold_N = ([v[train] for v in x], [torch.ones_like(v[train], dtype=torch.bool) for v in x]), torch.arange(1_000) % 10 - 9
    plan = schedule(900, 100, 8)
    cheap_N1 = torch.from_numpy(labels).float()[train, None] if cheap else None
    vae = fit_in_memory(vae, data, fold_N.clamp_min(-1), OptimiserSettings(lr=6e-3, seed=seed), plan, cheap_N1).model
    with torch.no_grad():
        inputs = vae.inputs(x, everything(x))
        z0_ENL = Head(1, 8, ()).latents(vae, inputs.codes, inputs.present_BK)
    classes_NT = torch.full((ROWS, 1), -1)
    classes_NT[:SCARCE, 0] = torch.from_numpy(dear[:SCARCE])
    head = fit_linear(z0_ENL, Labels.of(classes_NT, (2,), torch.full((ROWS,), -1), 1, False))
    said = head.logits(z0_ENL)[0][0].softmax(1)[:, 1].detach()
    return roc_auc_score(dear[1_000:], said[1_000:].numpy())


@pytest.fixture(scope="module")
def plain():
    return np.array([auroc(seed, None) for seed in range(SEEDS)])


def test_a_cheap_label_that_tells_of_the_dear_one_raises_auroc_beyond_noise(plain):
    gain = np.array([auroc(seed, "informative") for seed in range(SEEDS)]) - plain
    assert gain.mean() > 0.03 and gain.mean() > 2.78 * gain.std(ddof=1) / np.sqrt(SEEDS)  # t, 4 degrees of freedom


def test_a_random_one_beside_l_does_no_more_harm_than_noise(plain):
    loss = plain - np.array([auroc(seed, "random", alone=False) for seed in range(SEEDS)])
    assert loss.mean() < max(0.02, 2.78 * loss.std(ddof=1) / np.sqrt(SEEDS))
