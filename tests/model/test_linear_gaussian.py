"""Where every conditional distribution is known: x_j = A_j z + noise.

Tolerances are what a fit of some seconds reaches. Of single features the variances are still up to 20% off.
"""

import numpy as np
import pytest
import torch
from cohorts import LinearGaussian, statistics

from mmimpute.model import ModalityConfig, ModelConfig, MultiModalVAE
from mmimpute.training import OptimiserSettings, fit_in_memory, schedule

TARGETS = [(0, [1, 2]), (1, [0, 2]), (2, [0, 1])]


def everything(x):
    return [torch.ones_like(t, dtype=torch.bool) for t in x]


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    truth = LinearGaussian.make()
    train, tune, test = (truth.values(rows, seed) for rows, seed in ((4000, 1), (800, 2), (400, 4)))
    modalities = tuple(ModalityConfig(n, ("real",) * t.shape[1]) for n, t in zip("abc", train, strict=True))
    config = ModelConfig(modalities, shared=8, hidden=64, decoder=32, dropout=0.0, drop_values=0.0, elbo_weight=0.5)
    model = MultiModalVAE(config, {m.name: statistics(t.numpy(), m.kinds) for m, t in zip(modalities, train, strict=True)})
    result = fit_in_memory(
        model, (train, everything(train)), (tune, everything(tune)), OptimiserSettings(lr=6e-3), schedule(4000, batch=64, epochs=20)
    )
    return truth, result.model, test


@pytest.mark.parametrize("target, given", TARGETS)
def test_predictions_approach_the_conditional_mean_and_variance(fitted, target, given):
    truth, model, x = fitted
    observed = [o if j in given else ~o for j, o in enumerate(everything(x))]
    mean, covariance = truth.conditional(target, given, x)
    predicted = model.predict(x, observed, draws=256)
    error = ((predicted.mean[target].numpy() - mean) ** 2).sum() / ((mean - mean.mean(0)) ** 2).sum()
    assert 1 - error > 0.97
    ratio = (predicted.std[target].numpy() ** 2).mean(0) / np.diag(covariance)
    assert 0.9 < ratio.mean() < 1.12 and ratio.min() > 0.7 and ratio.max() < 1.3


@pytest.mark.parametrize("target, given", TARGETS)
def test_draws_approach_the_conditional_covariance(fitted, target, given):
    truth, model, x = fitted
    record = [(t, int(j in given)) for j, t in enumerate(x)]
    drawn = model.impute(record, draws=200, generator=torch.Generator().manual_seed(0))[target].numpy()
    found = np.mean([np.cov(drawn[:, i].T) for i in range(drawn.shape[1])], 0)
    expected = truth.conditional(target, given, x)[1]
    scale, apart = np.sqrt(np.outer(np.diag(expected), np.diag(expected))), ~np.eye(len(found), dtype=bool)
    assert np.abs((found - expected) / scale)[apart].max() < 0.2
    observed = [o if j in given else ~o for j, o in enumerate(everything(x))]
    predicted = (model.predict(x, observed, draws=256).std[target].numpy() ** 2).mean(0)
    assert np.allclose(np.diag(found), predicted, rtol=0.15)


def test_generated_records_have_the_population_covariance(fitted):
    truth, model, _ = fitted
    sample = torch.cat(model.generate(20_000, torch.Generator().manual_seed(0)), 1).numpy()
    loadings = np.concatenate(truth.loadings)
    expected = loadings @ loadings.T + truth.noise**2 * np.eye(len(loadings))
    scale = np.sqrt(np.diag(expected))
    assert np.abs(np.corrcoef(sample.T) - expected / np.outer(scale, scale)).max() < 0.25
    assert np.allclose(sample.std(0), scale, rtol=0.25)
