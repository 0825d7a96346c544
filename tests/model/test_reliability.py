"""A corrupted modality is discounted: the network reads off the share of signal, and what is predicted does not follow noise."""

import dataclasses

import pytest
import torch
from cohorts import mixed_model, mixed_values

from mmimpute.model import FeatureStatistics, ModalityConfig, ModelConfig, MultiModalVAE
from mmimpute.model.reliability import corrupt
from mmimpute.stacking import assemble
from mmimpute.training import OptimiserSettings, Schedule, fit_in_memory

NAMES, WIDTH, ROWS = ("a", "b", "c"), 6, 3000
LEVEL = 4.0  # of noise in a


def cohort(rows: int, seed: int) -> list[torch.Tensor]:
    """Three modalities, each six noisy readings of one two-dimensional state; all have mean 0 and sd 1."""
    generator = torch.Generator().manual_seed(seed)
    loading = torch.randn(2, len(NAMES) * WIDTH, generator=torch.Generator().manual_seed(99))
    loading = 0.8 * loading / loading.norm(dim=0)
    state = torch.randn(rows, 2, generator=generator)
    return list((state @ loading + 0.6 * torch.randn(rows, len(NAMES) * WIDTH, generator=generator)).split(WIDTH, 1))


def fitted(noise: float):
    torch.manual_seed(0)
    config = ModelConfig(
        tuple(ModalityConfig(n, ("real",) * WIDTH, tails="gaussian", noise=noise if n == "a" else 0) for n in NAMES),
        shared=8,
        hidden=64,
        decoder=32,
        dropout=0.0,
        impute_draws=4,
    )
    x = cohort(ROWS, 1)
    seen = [torch.ones_like(v, dtype=torch.bool) for v in x]
    fold_N = torch.where(torch.arange(ROWS) % 10 == 0, 0, -1)
    vae = MultiModalVAE(config, {n: FeatureStatistics.blank(WIDTH) for n in NAMES})
    trained = fit_in_memory(vae, (x, seen), fold_N, OptimiserSettings(), Schedule(128, 12, ROWS // 128)).model
    return assemble(trained, x, seen, fold_N)


@pytest.fixture(scope="module")
def models():
    torch.set_num_threads(1)
    return {"plain": fitted(0.0), "robust": fitted(LEVEL)}


def corrupted(sd: float):
    x = cohort(1000, 2)
    noisy = [x[0] + sd * torch.randn(x[0].shape, generator=torch.Generator().manual_seed(3)), *x[1:]]
    return x, noisy, [torch.ones_like(v, dtype=torch.bool) for v in x]


def error(model, sd: float, without_a: bool = False) -> float:
    """Squared error of c from a with noise and b, c having variance 1."""
    x, noisy, seen = corrupted(sd)
    masks = [seen[0] & (not without_a), seen[1], ~seen[2]]
    return float((model.predict(noisy, masks).mean[2] - x[2]).square().mean())


@pytest.mark.parametrize("sd", [0.0, 1.0, 2.0, 4.0])
def test_reliability_is_the_share_of_signal(models, sd):
    _, noisy, seen = corrupted(sd)
    vae = models["robust"].vae
    inputs = vae.inputs(noisy, seen)
    weight_EBK = vae.reliability(inputs.codes, inputs.shown_BK)
    assert float(weight_EBK[..., 0].mean()) == pytest.approx(1 / (1 + sd**2), abs=0.15)
    assert (weight_EBK[..., 1:] == 1).all()


def test_what_is_predicted_follows_noise_only_without_it(models):
    alone = error(models["robust"], 0.0, without_a=True)
    assert error(models["robust"], 4.0) < alone + 0.01  # about what b alone is worth
    assert error(models["plain"], 4.0) > alone + 0.5
    assert error(models["robust"], 0.0) < error(models["plain"], 0.0) + 0.01  # what it costs where nothing is corrupted


def test_noise_leaves_the_share_of_signal_that_it_names():
    values = mixed_values(20_000)[0]
    model = mixed_model()
    real_D, standardise = model.real_0, model.standardise[0]
    signal_B = torch.full((len(values),), 0.25)
    noisy = corrupt(values, torch.ones_like(values, dtype=torch.bool), real_D, standardise, signal_B, torch.Generator().manual_seed(0))
    before, after = standardise(values)[:, 0], standardise(noisy)[:, 0]
    assert float(torch.corrcoef(torch.stack([before, after]))[0, 1] ** 2) == pytest.approx(0.25, abs=0.02)
    # A code that is another record's in 3 of 4 records differs in 3/4 x 2 p (1 - p) of them.
    share = values[:, 1].mean()
    assert float((noisy[:, 1] != values[:, 1]).float().mean()) == pytest.approx(float(0.75 * 2 * share * (1 - share)), abs=0.02)
    assert set(noisy[:, 3].unique().tolist()) <= set(values[:, 3].unique().tolist())


def test_no_noise_leaves_every_bit():
    values, model = mixed_values(200)[0], mixed_model()
    seen = torch.ones_like(values, dtype=torch.bool)
    assert torch.equal(corrupt(values, seen, model.real_0, model.standardise[0], torch.ones(len(values))), values)


def test_a_model_without_noise_has_no_reliability():
    plain = mixed_model()
    noisy = dataclasses.replace(plain.config, modalities=tuple(dataclasses.replace(m, noise=1.0) for m in plain.config.modalities))
    fresh = MultiModalVAE(noisy, {m.name: FeatureStatistics.blank(m.width) for m in noisy.modalities})
    assert {k for k in fresh.state_dict() if k.startswith("reliability")}
    assert not {k for k in plain.state_dict() if k.startswith("reliability")}
    assert {k for k in fresh.state_dict() if not k.startswith("reliability")} == set(plain.state_dict())
