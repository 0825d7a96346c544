"""Encodings and networks of the hierarchical model.

A model has E members, which differ in their first weights and in the records that they learn from. They run side by
side as batched products: every parameter has a leading E, and so has everything that a network puts out.

Shape suffixes: E members, B records (N: records times draws), K modalities, D features, C code columns, L latent,
F some features.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from mmimpute.model.config import ModalityConfig, ModelConfig
from mmimpute.model.forms import ConvDecoder

WIDE = 64  # the code of a modality of more features is scaled down
CERTAIN = 3.0  # z0's precision at the start, before softplus: noisier, the encoder would hardly get a gradient
CLIP = 5.0  # standardised inputs beyond this say nothing more to the encoders
ROUND = 8  # rows of which a product has a multiple
USUAL = torch.backends.mkldnn.matmul.fp32_precision


@contextmanager
def fast_products() -> Iterator[None]:
    """Lets a CPU compute float32 products by way of bfloat16, as GPUs train, where it has instructions for that (AMX).

    Where it has AVX-512 only they stay float32, but come from oneDNN instead of MKL, which on AMD goes no further than AVX2: 2.2 times as
    fast, and a training step of nhanes 1.2 times, its prediction 1.3 times. oneDNN makes a kernel for every size, so the number of rows
    should not be just any (`rounded`). By way of bfloat16 (autocast; no CPU with AMX was at hand) predictions of nhanes move by .001 of
    their standard deviation, .05 at most.

    The switch is the process's, so it is for callers beside whom no other thread computes: training and prediction, not what `assemble`
    does several at a time. It goes back to what it was at first, in whatever order threads leave.
    """
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = USUAL


def rounded(rows: Tensor) -> Tensor:
    """Row numbers, the first of them repeated until they are a multiple of ROUND."""
    return torch.cat([rows, rows[:1].expand(-len(rows) % ROUND)])


class Normal(NamedTuple):
    """A diagonal Gaussian."""

    mean: Tensor
    var: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.var.sqrt() * noise


def kl(q: Normal, p: Normal) -> Tensor:
    """KL(q || p) summed over the last dimension."""
    return kl_each(*q, *p).sum(-1)


def kl_each(q_mean: Tensor, q_var: Tensor, p_mean: Tensor, p_var: Tensor) -> Tensor:
    """KL(q || p) of every dimension."""
    ratio = q_var / p_var
    return 0.5 * (ratio + (q_mean - p_mean).square() / p_var - 1 - ratio.log())


def product(prior: Normal, mean: Tensor, precision: Tensor) -> Normal:
    """Prior expert times a data expert; a precision of 0 leaves the prior exactly as it is."""
    sharper = precision * prior.var
    total = 1 + sharper
    return Normal(torch.lerp(prior.mean, mean, sharper / total), prior.var / total)


class Linear(nn.Module):
    """E linear layers side by side: (N, I) or (E, N, I) -> (E, N, O); torch's default first weights."""

    def __init__(self, members: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """onto: what the product is added to where there is no bias."""
        x, added = x.expand(len(self.weight), *x.shape[-2:]), self.bias if onto is None else onto
        return torch.bmm(x, self.weight) if added is None else torch.baddbmm(added, x, self.weight)


def keep_scale(layer: Linear) -> None:
    """Weights that keep the scale of what comes out of a SiLU; torch's default shrinks it at every layer."""
    nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.weight.shape[1]))
    nn.init.zeros_(layer.bias)


class Dropout(nn.Module):
    """Sets values to 0 with a probability, to the nearest 1/256, and scales the others so that the expectation stays.

    Eight decisions come from one random number of 64 bits: on a CPU torch's own dropout took a ninth of a training step.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.dropped = round(256 * probability)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.dropped:
            return x
        size = math.prod(x.shape)
        words = torch.empty(-(-size // 8), dtype=torch.int64, device=x.device).random_(-(1 << 63), None)
        kept = words.view(torch.uint8)[:size].view(x.shape) >= self.dropped
        return x * kept.to(x.dtype).mul_(256 / (256 - self.dropped))


class Code(nn.Module):
    """A modality's values as network inputs: 0 wherever nothing is observed."""

    def __init__(self, config: ModalityConfig, piecewise_limit: int, pattern: bool) -> None:
        """pattern: false encodes what is missing as an observed standardised 0; of a category, as one of no level."""
        super().__init__()
        self.pattern = pattern
        numeric = [i for i, k in enumerate(config.kinds) if k != "categorical"]
        curved = [i for i in numeric if config.kinds[i] != "binary"] if config.width <= piecewise_limit else []
        categorical = [i for i, k in enumerate(config.kinds) if k == "categorical"]
        self.levels = max((config.levels[i] for i in categorical), default=0)
        for name, index in (("numeric_F", numeric), ("curved_F", curved), ("categorical_F", categorical)):
            self.register_buffer(name, torch.tensor(index, dtype=torch.long), persistent=False)
        self.layout = (len(numeric), 8 * len(curved), self.levels * len(categorical), config.width)  # numbers, ramps, levels, holes
        self.width = sum(self.layout)
        # Adam moves each weight alike, so a wide modality's sum would move too far at every step.
        self.scale = min(1.0, math.sqrt(WIDE / config.width))

    def forward(self, z_BD: Tensor, x_BD: Tensor, observed_BD: Tensor, knots_DO: Tensor) -> Tensor:
        """Standardised and original values, both 0 where unobserved -> code (B, C)."""
        seen_BD = observed_BD.to(z_BD.dtype)
        parts = [z_BD.index_select(-1, self.numeric_F).clamp(-CLIP, CLIP)]
        if self.curved_F.numel():
            parts.append(self._curves(z_BD, seen_BD, knots_DO).flatten(1))
        return self.scale * torch.cat([*parts, *self.told(x_BD, observed_BD)], -1)

    def told(self, x_BD: Tensor, observed_BD: Tensor) -> list[Tensor]:
        """What are no numbers: the levels of categories, and holes, the values missing inside a modality that is there. A modality that is
        absent as a whole is told by a flag."""
        seen_BD, levels = observed_BD.to(x_BD.dtype), []
        if self.categorical_F.numel():
            level = x_BD[:, self.categorical_F].clamp(0, self.levels - 1).long()
            levels = [(fn.one_hot(level, self.levels) * seen_BD[:, self.categorical_F, None]).flatten(1)]
        return [*levels, observed_BD.any(-1, keepdim=True) * (1 - seen_BD) * self.pattern]

    def _curves(self, z_BD: Tensor, seen_BD: Tensor, knots_DO: Tensor) -> Tensor:
        """The ramps with 0 where nothing is observed; without the pattern, with 0 at the mean, which is then the same."""
        ramps_BFO = self.ramps(z_BD, knots_DO)
        if self.pattern:
            return ramps_BFO * seen_BD[:, self.curved_F, None]
        return ramps_BFO - self.ramps(torch.zeros_like(z_BD[:1]), knots_DO)

    def ramps(self, z_BD: Tensor, knots_DO: Tensor) -> Tensor:
        """Piecewise-linear encoding of the curved features, (..., B, F, 8): how far z is through each octile, - 1/2."""
        edges_FO = knots_DO[self.curved_F]
        width_FO = edges_FO.diff(dim=1).clamp_min(1e-6)
        return (z_BD[..., self.curved_F, None] - edges_FO[:, :-1]).mul_(1 / width_FO).clamp_(0, 1).sub_(0.5)


class SharedEncoder(nn.Module):
    """q(z0 | x): prior expert N(0, I) times one data expert over everything that is observed."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        members, inputs = config.members, width + len(config.modalities)
        self.pattern = config.pattern
        sizes = [inputs, *[config.hidden] * config.layers]
        hidden = [layer for i, o in pairwise(sizes) for layer in (Linear(members, i, o), nn.SiLU(), Dropout(config.dropout))]
        self.trunk = nn.Sequential(*hidden, Linear(members, config.hidden, 2 * config.shared))
        self.skip = Linear(members, inputs, config.shared, bias=False)
        self._start(config.shared)

    def _start(self, shared: int) -> None:
        """z0's means spread widely over records, and are certain: a bottleneck that lets pass from the first step."""
        _, *later, last = (layer for layer in self.trunk if isinstance(layer, Linear))
        for layer in [*later, last]:
            keep_scale(layer)
        nn.init.normal_(last.weight[..., shared:], std=0.01)
        nn.init.constant_(last.bias[..., shared:], CERTAIN)
        nn.init.zeros_(self.skip.weight)

    def forward(self, codes: Sequence[Tensor], present_BK: Tensor, weight_EBK: Tensor | float = 1.0) -> Normal:
        """codes: (B, C_j) or (E, B, C_j); weight_EBK: how far each modality counts as being there."""
        flags = present_BK.to(codes[0].dtype) * self.pattern * weight_EBK
        code = torch.cat([*codes, flags], -1)
        # Each product with an expanded tensor would copy it, forwards and backwards.
        code = code.expand(len(self.skip.weight), *code.shape[-2:]).contiguous()
        curved_EBL, raw_EBL = self.trunk(code).float().chunk(2, -1)
        mean_EBL = curved_EBL + self.skip(code).float()
        precision_EBL = fn.softplus(raw_EBL) * present_BK.any(-1, keepdim=True)
        prior = Normal(torch.zeros_like(mean_EBL), torch.ones_like(mean_EBL))
        return product(prior, mean_EBL, precision_EBL)


class Private(nn.Module):
    """One modality's private latent and decoder: p(zj | z0), q(zj | z0, xj) and the outputs of p(xj | zj, z0)."""

    def __init__(self, config: ModelConfig, modality: ModalityConfig, code: int, outputs: int) -> None:
        super().__init__()
        own, width, members = modality.private, config.decoder, config.members
        self.own = own
        self.prior = Linear(members, config.shared, 2 * own)
        self.from_code, self.from_shared = Linear(members, code, width), Linear(members, config.shared, width, bias=False)
        self.expert = Linear(members, width, 2 * own)
        latent = config.shared + own
        self.convolved = modality.convolved
        if self.convolved:
            self.decoder = ConvDecoder(modality, latent)
            return
        self.decoder = nn.Sequential(Linear(members, latent, width), nn.SiLU(), Linear(members, width, width), nn.SiLU())
        keep_scale(self.decoder[0])
        keep_scale(self.decoder[2])
        self.curved = Linear(members, width, outputs)
        self.linear = Linear(members, latent, outputs, bias=False)
        nn.init.zeros_(self.curved.weight)
        nn.init.zeros_(self.curved.bias)

    def p(self, z0_ENL: Tensor) -> Normal:
        """p(zj | z0)."""
        mean, raw = self.prior(z0_ENL).float().chunk(2, -1)
        return Normal(mean, torch.exp(2 * raw.clamp(-4, 2)))

    def q(self, z0_ENL: Tensor, prior: Normal, code_BC: Tensor, present_B: Tensor) -> Normal:
        """q(zj | z0, xj); exactly p(zj | z0) on rows in which nothing of the modality is observed.

        N = draws x B: the draws of z0 are the slower part of N.
        """
        draws = z0_ENL.shape[1] // max(1, len(code_BC))
        hidden = fn.silu(self.from_shared(z0_ENL, self.from_code(code_BC).repeat(1, draws, 1)))
        mean, raw = self.expert(hidden).float().chunk(2, -1)
        return product(prior, mean, fn.softplus(raw) * present_B.repeat(draws).unsqueeze(-1))

    def decode(self, z0_ENL: Tensor, zj_ENL: Tensor) -> Tensor:
        """Outputs from which `Likelihoods.heads` makes p(xj | zj, z0)."""
        latent = torch.cat([z0_ENL, zj_ENL], -1)
        if self.convolved:
            return self.decoder(latent)
        return self.linear(latent, self.curved(self.decoder(latent)))
