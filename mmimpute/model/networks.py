"""Encodings and networks of the hierarchical model.

Shape suffixes: B records (any leading shape), K modalities, D features, C code columns, L latent, F some features.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from mmimpute.model.config import ModalityConfig, ModelConfig

WIDE = 64  # the code of a modality of more features is scaled down
CERTAIN = 3.0  # z0's precision at the start, before softplus: noisier, the encoder would hardly get a gradient
CLIP = 5.0  # standardised inputs beyond this say nothing more to the encoders


class Normal(NamedTuple):
    """A diagonal Gaussian."""

    mean: Tensor
    var: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.var.sqrt() * noise


def kl(q: Normal, p: Normal) -> Tensor:
    """KL(q || p) summed over the last dimension."""
    ratio = q.var / p.var
    return 0.5 * (ratio + (q.mean - p.mean).square() / p.var - 1 - ratio.log()).sum(-1)


def product(prior: Normal, mean: Tensor, precision: Tensor) -> Normal:
    """Prior expert times a data expert; a precision of 0 leaves the prior exactly as it is."""
    total = 1 / prior.var + precision
    weight = precision / total
    # Where the weight is 0 the sums below are prior + 0, to the bit.
    return Normal(prior.mean + weight * (mean - prior.mean), prior.var * (1 - weight))


def keep_scale(layer: nn.Linear) -> None:
    """Weights that keep the scale of what comes out of a SiLU; torch's default shrinks it at every layer."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)


class Code(nn.Module):
    """A modality's values as network inputs: 0 wherever nothing is observed."""

    def __init__(self, config: ModalityConfig, piecewise_limit: int) -> None:
        super().__init__()
        numeric = [i for i, k in enumerate(config.kinds) if k != "categorical"]
        curved = [i for i in numeric if config.kinds[i] != "binary"] if config.width <= piecewise_limit else []
        categorical = [i for i, k in enumerate(config.kinds) if k == "categorical"]
        self.levels = max((config.levels[i] for i in categorical), default=0)
        for name, index in (("numeric_F", numeric), ("curved_F", curved), ("categorical_F", categorical)):
            self.register_buffer(name, torch.tensor(index, dtype=torch.long), persistent=False)
        self.width = len(numeric) + 8 * len(curved) + self.levels * len(categorical) + config.width
        # Adam moves each weight alike, so a wide modality's sum would move too far at every step.
        self.scale = min(1.0, math.sqrt(WIDE / config.width))

    def forward(self, z_BD: Tensor, x_BD: Tensor, observed_BD: Tensor, knots_DO: Tensor) -> Tensor:
        """Standardised and original values, both 0 where unobserved -> code (B, C)."""
        seen_BD = observed_BD.to(z_BD.dtype)
        parts = [z_BD.index_select(-1, self.numeric_F).clamp(-CLIP, CLIP)]
        if self.curved_F.numel():
            edges_FO, z_BF1 = knots_DO[self.curved_F], z_BD[:, self.curved_F, None]
            width_FO = edges_FO.diff(dim=1).clamp_min(1e-6)
            ramp = ((z_BF1 - edges_FO[:, :-1]) / width_FO).clamp(0, 1) - 0.5
            parts.append((ramp * seen_BD[:, self.curved_F, None]).flatten(1))
        if self.categorical_F.numel():
            level = x_BD[:, self.categorical_F].clamp(0, self.levels - 1).long()
            parts.append((fn.one_hot(level, self.levels) * seen_BD[:, self.categorical_F, None]).flatten(1))
        # Holes: values missing inside a modality that is there. A modality that is absent as a whole is told by a flag.
        parts.append(observed_BD.any(-1, keepdim=True) * (1 - seen_BD))
        return self.scale * torch.cat(parts, -1)


class SharedEncoder(nn.Module):
    """q(z0 | x): prior expert N(0, I) times one data expert over everything that is observed."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(width + len(config.modalities), config.hidden),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.hidden),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, 2 * config.shared),
        )
        self._start(config.shared)

    def _start(self, shared: int) -> None:
        """z0's means spread widely over records, and are certain: a bottleneck that lets pass from the first step."""
        hidden, last = self.trunk[3], self.trunk[6]
        keep_scale(hidden)
        keep_scale(last)
        nn.init.normal_(last.weight[shared:], std=0.01)
        nn.init.constant_(last.bias[shared:], CERTAIN)

    def forward(self, codes: Sequence[Tensor], present_BK: Tensor) -> Normal:
        flags_BK = present_BK.to(codes[0].dtype)
        mean_BL, raw_BL = self.trunk(torch.cat([*codes, flags_BK], -1)).float().chunk(2, -1)
        precision_BL = fn.softplus(raw_BL) * present_BK.any(-1, keepdim=True)
        prior = Normal(torch.zeros_like(mean_BL), torch.ones_like(mean_BL))
        return product(prior, mean_BL, precision_BL)


class Private(nn.Module):
    """One modality's private latent and decoder: p(zj | z0), q(zj | z0, xj) and the outputs of p(xj | zj, z0)."""

    def __init__(self, config: ModelConfig, modality: ModalityConfig, code: int, outputs: int) -> None:
        super().__init__()
        own, width = modality.private, config.decoder
        self.own = own
        self.prior = nn.Linear(config.shared, 2 * own)
        self.from_code, self.from_shared = nn.Linear(code, width), nn.Linear(config.shared, width, bias=False)
        self.expert = nn.Linear(width, 2 * own)
        latent = config.shared + own
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        keep_scale(self.decoder[0])
        keep_scale(self.decoder[2])
        self.curved = nn.Linear(width, outputs)
        self.linear = nn.Linear(latent, outputs, bias=False)
        nn.init.zeros_(self.curved.weight)
        nn.init.zeros_(self.curved.bias)

    def p(self, z0_BL: Tensor) -> Normal:
        """p(zj | z0)."""
        mean, raw = self.prior(z0_BL).float().chunk(2, -1)
        return Normal(mean, torch.exp(2 * raw.clamp(-4, 2)))

    def q(self, z0_BL: Tensor, prior: Normal, code_BC: Tensor, present_B: Tensor) -> Normal:
        """q(zj | z0, xj); exactly p(zj | z0) on rows in which nothing of the modality is observed."""
        hidden = fn.silu(self.from_code(code_BC) + self.from_shared(z0_BL))
        mean, raw = self.expert(hidden).float().chunk(2, -1)
        return product(prior, mean, fn.softplus(raw) * present_B.unsqueeze(-1))

    def decode(self, z0_BL: Tensor, zj_BL: Tensor) -> Tensor:
        """Outputs from which `Likelihoods.heads` makes p(xj | zj, z0)."""
        latent = torch.cat([z0_BL, zj_BL], -1)
        return self.curved(self.decoder(latent)) + self.linear(latent)
