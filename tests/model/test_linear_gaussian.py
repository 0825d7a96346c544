"""Where every conditional distribution is known: x_j = A_j z + noise. The whole model, at settings that train in seconds."""

import numpy as np
import pytest
import torch
from cohorts import LinearGaussian, everything, fit_linear_gaussian

TARGETS = [(0, [1, 2]), (1, [0, 2]), (2, [0, 1])]


@pytest.fixture(scope="module")
def fitted():
    torch.set_num_threads(1)
    truth = LinearGaussian.make()
    return truth, fit_linear_gaussian(truth.values(4800, 1)), truth.values(400, 4)


@pytest.mark.parametrize("target, given", TARGETS)
def test_predictions_are_the_conditional_mean_and_variance(fitted, target, given):
    truth, model, x = fitted
    observed = [o if j in given else ~o for j, o in enumerate(everything(x))]
    mean, covariance = truth.conditional(target, given, x)
    predicted = model.predict(x, observed)
    error = ((predicted.mean[target].numpy() - mean) ** 2).sum() / ((mean - mean.mean(0)) ** 2).sum()
    assert 1 - error > 0.995
    ratio = (predicted.std[target].numpy() ** 2).mean(0) / np.diag(covariance)
    assert ratio.min() > 0.93 and ratio.max() < 1.08


@pytest.mark.parametrize("target, given", TARGETS)
def test_draws_have_the_conditional_covariance(fitted, target, given):
    truth, model, x = fitted
    record = [(t, int(j in given)) for j, t in enumerate(x)]
    drawn = model.impute(record, draws=200, generator=torch.Generator().manual_seed(0))[target].numpy()
    found = np.mean([np.cov(drawn[:, i].T) for i in range(drawn.shape[1])], 0)
    mean, expected = truth.conditional(target, given, x)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.abs((found - expected) / scale).max() < 0.1
    assert np.abs(drawn.mean(0) - mean).mean() / np.sqrt(np.diag(expected)).mean() < 0.1


def test_intervals_cover_what_they_say(fitted):
    truth, model, _ = fitted
    x = truth.values(4000, 9)
    for target, given in TARGETS:
        observed = [o if j in given else ~o for j, o in enumerate(everything(x))]
        for level in (0.5, 0.9):
            predicted = model.predict(x, observed, level)
            inside = (x[target] >= predicted.lower[target]) & (x[target] <= predicted.upper[target])
            assert abs(inside.float().mean() - level) < 0.015


def test_generated_records_have_the_population_covariance(fitted):
    truth, model, _ = fitted
    sample = torch.cat(model.generate(20_000, torch.Generator().manual_seed(0)), 1).numpy()
    loadings = np.concatenate(truth.loadings)
    expected = loadings @ loadings.T + truth.noise**2 * np.eye(len(loadings))
    scale = np.sqrt(np.diag(expected))
    assert np.abs(np.corrcoef(sample.T) - expected / np.outer(scale, scale)).max() < 0.25
    assert np.allclose(sample.std(0), scale, rtol=0.25)
