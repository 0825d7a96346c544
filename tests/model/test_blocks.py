"""Variance components of blocks of columns, against the multivariate normal and against a known truth."""

import pytest
import torch
from cohorts import mixed_model
from scipy.stats import multivariate_normal

from mmimpute.model.blocks import block_scales, negative_log_likelihood
from mmimpute.model.gaussian import kept_components
from mmimpute.model.imputer import Imputer
from mmimpute.model.regression import Regression

WIDTHS, SPREAD = (20, 60, 15), (1.0, 0.0, 0.3)  # columns of each block, and the deviation of their weights


def problem(rows: int, features: int = 6, missing: float = 0.0):
    """Targets that follow the first block much, the second not at all, the third a little, and noise of variance 1."""
    generator = torch.Generator().manual_seed(rows)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    block_C = torch.repeat_interleave(torch.arange(3), torch.tensor(WIDTHS))
    columns = draw(rows, len(block_C)) + 2.0
    weight = draw(len(block_C), features) * torch.tensor(SPREAD)[block_C, None]
    target = columns @ weight + draw(rows, features) + 5.0
    return columns, block_C, target, torch.rand(target.shape, generator=generator) >= missing


def test_the_likelihood_is_that_of_a_normal_whose_variance_is_profiled_out():
    columns, block_C, target, _ = problem(40)
    kernels = torch.stack([columns[:, block_C == b] @ columns[:, block_C == b].T for b in range(3)]).double()
    y, log_theta = (target - target.mean(0)).double(), torch.tensor([0.3, -2.0, -1.0], dtype=torch.double)
    covariance = torch.eye(40).double() + (log_theta.exp()[:, None, None] * kernels).sum(0)
    expected = []
    for y_N in y.T:
        variance = float(y_N @ torch.linalg.solve(covariance, y_N)) / 40
        expected.append(-multivariate_normal(cov=(variance * covariance).numpy()).logpdf(y_N.numpy()) / 40)
    constant = 0.5 * (1 + torch.log(torch.tensor(2 * torch.pi)))
    found = negative_log_likelihood(log_theta, kernels, y) + constant
    torch.testing.assert_close(found, torch.tensor(expected).mean(), rtol=1e-8, atol=0, check_dtype=False)


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_scales_are_the_deviations_of_the_weights(missing):
    """Noise has variance 1; values that are missing count as noise."""
    columns, block_C, target, seen = problem(600, missing=missing)
    found = block_scales(columns, block_C, target, seen)
    per_block = torch.stack([found[block_C == b][0] for b in range(3)])
    assert torch.equal(per_block[block_C], found)
    if not missing:
        torch.testing.assert_close(per_block[[0, 2]], torch.tensor([1.0, 0.3]), rtol=0.25, atol=0)
    assert per_block[1] < 0.1 * per_block[2] < 0.1 * per_block[0]


def test_scales_make_up_for_units():
    columns, block_C, target, seen = problem(300)
    units = torch.tensor([10.0, 1.0, 0.01])[block_C]
    first, second = block_scales(columns, block_C, target, seen), block_scales(columns * units, block_C, target, seen)
    torch.testing.assert_close(second * units, first, rtol=0.02, atol=1e-4)


def test_scaled_columns_predict_new_records_better():
    columns, block_C, target, seen = problem(250)
    train, test = slice(0, 130), slice(130, 250)
    errors = {}
    for name, scale_C in (("scaled", block_scales(columns[train], block_C, target[train], seen[train])), ("plain", torch.ones(95))):
        kinds = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
        regression = Regression(columns[train] * scale_C, target[train], target[train], seen[train], *kinds)
        fits = [regression.solve(p, p) for p in ((1.0,) if name == "scaled" else (0.1, 1.0, 3.0, 10.0, 30.0, 100.0))]
        errors[name] = min(float(((columns[test] * scale_C) @ w + b - target[test]).square().mean()) for w, b in fits)
    assert errors["scaled"] < 0.8 * errors["plain"]  # whose penalty is the best of six on the test records themselves


def test_targets_that_do_not_vary_leave_every_block_alike():
    columns, block_C, target, seen = problem(50)
    found = block_scales(columns, block_C, torch.ones_like(target), seen)
    kernels = torch.stack([(columns - columns.mean(0))[:, block_C == b].square().sum(1).mean() for b in range(3)])
    torch.testing.assert_close(found.square() * kernels[block_C], torch.full_like(found, found[0] ** 2 * kernels[0]))


def test_columns_are_in_blocks_by_modality_and_encoding():
    """A modality's values and levels are one block, their ramps another; what is missing is one block for all."""
    vae = mixed_model()
    additive = Imputer(vae, kept_components(vae.config, 100, [False] * len(vae.config.modalities))).additive
    block_C = additive.blocks(vae.code)
    assert len(block_C) == sum(additive.widths)
    for j, (modality, code) in enumerate(zip(vae.config.modalities, vae.code, strict=True)):
        own = block_C[additive.own(j)]
        assert int((own == 2 + 2 * j).sum()) == 8 * code.curved_F.numel()
        assert int((own == 0).sum()) == modality.width + 1
        assert set(own.tolist()) <= {0, 1 + 2 * j, 2 + 2 * j}
