"""Original units <-> standardised units, held as buffers so that the same code runs on any device.

Shape suffixes: B records, D features, S draws, Q quadrature nodes, O octile edges.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LIMIT = 1.0  # standard deviations beyond the sampled range at which an inverse log transform stops growing


@dataclass(frozen=True)
class FeatureStatistics:
    """Statistics of one modality's training values, after the transform; arrays or tensors of D rows."""

    mean: Any  # (D,)
    std: Any  # (D,)
    log: Any  # (D,) bool: transform is sign(x) log1p(|x| / unit)
    unit: Any  # (D,)
    knots: Any  # (D, 9) octile edges in standardised units, first the minimum, last the maximum

    @classmethod
    def blank(cls, width: int) -> "FeatureStatistics":
        """Placeholders, to be overwritten by a state dict."""
        return cls(np.zeros(width), np.ones(width), np.zeros(width, bool), np.ones(width), np.tile(np.linspace(-1, 1, 9), (width, 1)))


class Standardise(nn.Module):
    """One modality's transform and scale."""

    def __init__(self, statistics: FeatureStatistics) -> None:
        super().__init__()
        for name in ("mean", "std", "unit", "knots"):
            value = torch.as_tensor(np.asarray(getattr(statistics, name)), dtype=torch.float32).clone()
            self.register_buffer(name, value)
        self.register_buffer("log", torch.as_tensor(np.asarray(statistics.log), dtype=torch.bool).clone())
        d = self.mean.shape[0]
        if self.knots.shape != (d, 9):
            raise ValueError(f"knots have shape {tuple(self.knots.shape)}, expected {(d, 9)}")
        # A constant feature has no scale of its own.
        self.std.copy_(torch.where(self.std > 0, self.std, torch.ones_like(self.std)))
        nodes, weights = np.polynomial.hermite_e.hermegauss(9)
        self.register_buffer("nodes_Q", torch.as_tensor(nodes, dtype=torch.float32), persistent=False)
        self.register_buffer("weights_Q", torch.as_tensor(weights / weights.sum(), dtype=torch.float32), persistent=False)

    def part(self, features: Tensor) -> "Standardise":
        """That of some of the features."""
        return Standardise(FeatureStatistics(*(getattr(self, name)[features].cpu() for name in ("mean", "std", "log", "unit", "knots"))))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Original -> standardised units; the caller fills unobserved values before and after."""
        logged_BD = x_BD.sign() * torch.log1p(x_BD.abs() / self.unit)
        return (torch.where(self.log, logged_BD, x_BD) - self.mean) / self.std

    def inverse(self, z_BD: Tensor) -> Tensor:
        """Standardised -> original units; logged features stop a little beyond the range that was seen."""
        low_D, high_D = self.knots[:, 0] - LIMIT, self.knots[:, -1] + LIMIT
        bounded_BD = torch.minimum(torch.maximum(z_BD, low_D), high_D)
        y_BD = torch.where(self.log, bounded_BD, z_BD) * self.std + self.mean
        exponent_BD = torch.where(self.log, y_BD.abs(), torch.zeros_like(y_BD))
        return torch.where(self.log, y_BD.sign() * self.unit * torch.expm1(exponent_BD), y_BD)

    def of_moments(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation in standardised units of the Gaussian that has these in original units; (any shape) x D. Inverse of `moments`.

        Logged features, not below 0, as shifted log-normal.
        """
        beyond = mean / self.unit + 1
        variance = torch.log1p((std / self.unit / beyond).square())
        location, scale = (torch.where(self.log, a, b) for a, b in ((beyond.log() - variance / 2, mean), (variance.sqrt(), std)))
        return (location - self.mean) / self.std, scale / self.std

    def moments(self, mu_SBD: Tensor, sd_SBD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, in original units, of an equal mixture of S Gaussians; S x (any shape) x D.

        Exact where the transform is the identity, 9-node Gauss-Hermite on logged features.
        """
        mean_BD = mu_SBD.mean(0)
        std_BD = (sd_SBD.square() + (mu_SBD - mean_BD).square()).mean(0).sqrt()
        mean, std = mean_BD * self.std + self.mean, std_BD * self.std
        logged = self.log.nonzero().squeeze(1)
        if not len(logged):
            return mean, std
        part, mu, sd = self.part(logged).to(mean.device), mu_SBD[..., logged], sd_SBD[..., logged]
        first, second = torch.zeros_like(mu[0]), torch.zeros_like(mu[0])
        # Moments about the centre: squares of large original values would cancel in float32.
        centre = part.inverse(mu.mean(0))
        for node, weight in zip(self.nodes_Q, self.weights_Q, strict=True):
            x = part.inverse(mu + node * sd) - centre
            first = first + weight * x.mean(0)
            second = second + weight * x.square().mean(0)
        return mean.index_copy(-1, logged, centre + first), std.index_copy(-1, logged, (second - first.square()).clamp_min(0).sqrt())
