"""Networks of images and signals: strided convolutions to a code, and their mirror from the latents, where vectors have
`networks.Code` and a perceptron.

Sides are halved until none is longer than SIDE, at least once; channels double up to MOST_CHANNELS. A model with such
modalities has one member, so weights have no leading E, and what comes out has a leading 1.

The likelihood is Gaussian with one scale per channel. `elbo_weight`, one seed each. Views: five textured pictures of a digit, 28 x 28 x 3,
5,000 records, 10 epochs (`tests/benchmarks/images.py`): share of views drawn from one other and from all others that a classifier reads
right, and of generated records whose views agree (with one Gaussian as p(z0); .50 at 0.1 with the mixture). Digits, 8 x 8, 1,397 records of
two other digits of a class, a tone, a text and a vector (`tests/digits.py`), 20 epochs: share of 400 people's hidden digits whose draws are
right, from all else and from the other digit alone.
Stamps, 1,000 records (two images of the same stamp at the same of 25 places), 20 epochs: error of a hidden one (the mean image's is 64.6),
class and place right in its mean; not measured at 0.1.

    0.03, with 2 latent nodes views .43 .74 .19                        stamps 60.7, 5%
    0.1, the default          views .49 .78 .19   digits 97.5%, 61%
    0.3                       views .41 .63 .11   digits 95.8%, 62%    stamps 53.5, 33%, without the decoder's hidden layer 54.7, 24%
    1.0, Laplace likelihood                       digits 95.0%, 56%    its 90% intervals hold 81% of values, the Gaussian's 84%
    1.0                                           digits 94.5%, 52%    stamps 51.7, 50%

Shape suffixes: B records (N: records times draws), D values of a record, C code columns, L latent, P outputs.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from mmimpute.model.config import ModalityConfig

SIDE = 8
CHANNELS, MOST_CHANNELS = 32, 128
CODE = 128  # columns
HIDDEN = 256  # units between the latents and the first convolution
SCALE_PACE = 10.0  # Adam moves all parameters alike, and the scales go a long way


def sides(config: ModalityConfig) -> list[tuple[int, ...]]:
    """Length of each side, from the record's own to the smallest."""
    found = [config.shape[1:] if config.form == "image" else config.shape[:1]]
    while len(found) == 1 or max(found[-1]) > SIDE:
        found.append(tuple(-(-n // 2) for n in found[-1]))
    return found


def channels(config: ModalityConfig) -> list[int]:
    """Channels at each of `sides`, the record's own first."""
    own = config.shape[0] if config.form == "image" else config.shape[1]
    return [own] + [min(MOST_CHANNELS, CHANNELS << level) for level in range(len(sides(config)) - 1)]


def unfold(config: ModalityConfig, x_BD: Tensor) -> Tensor:
    """Flat records -> channels first: (B, C, H, W) of images, (B, C, T) of signals."""
    whole = x_BD.unflatten(-1, config.shape)
    return whole if config.form == "image" else whole.mT


def fold(config: ModalityConfig, x: Tensor) -> Tensor:
    """The inverse of `unfold`."""
    return (x if config.form == "image" else x.mT).flatten(1)


def keep_scales(module: nn.Module) -> None:
    """Weights that keep the scale of what comes out of a SiLU, as `networks.keep_scale`."""
    for layer in module.modules():
        if hasattr(layer, "weight"):
            # Of a transposed convolution of stride 2 and kernel 4, half of the kernel's every side meets a value.
            upwards = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d)
            inputs = layer.weight[:, 0].numel() / 2 ** (layer.weight.dim() - 2) if upwards else layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=math.sqrt(2 / inputs))
            nn.init.zeros_(layer.bias)


class ConvCode(nn.Module):
    """An image or a signal as network inputs: 0 where nothing of it is observed. Stands where vectors have `networks.Code`."""

    def __init__(self, config: ModalityConfig, pattern: bool) -> None:
        """pattern: false encodes what is missing as an observed standardised 0."""
        super().__init__()
        self.config, self.pattern, self.width = config, pattern, CODE
        layer = nn.Conv2d if config.form == "image" else nn.Conv1d
        sizes, layers = channels(config), []
        for before, after in zip([2 * sizes[0], *sizes[1:-1]], sizes[1:], strict=True):
            layers += [layer(before, after, 3, stride=2, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(sizes[-1] * math.prod(sides(config)[-1]), CODE)
        keep_scales(self)

    def forward(self, z_BD: Tensor, x_BD: Tensor, observed_BD: Tensor, knots_DO: Tensor) -> Tensor:
        """Standardised values, 0 where unobserved -> code (B, C). Values missing here and there are told as more channels."""
        present_B1 = observed_BD.any(-1, keepdim=True)
        holes_BD = (present_B1 & ~observed_BD).to(z_BD.dtype) * self.pattern
        whole = torch.cat([unfold(self.config, z_BD), unfold(self.config, holes_BD)], 1)
        return fn.silu(self.last(self.layers(whole).flatten(1))) * present_B1


class ConvDecoder(nn.Module):
    """Latents -> mean and log scale of every value, standardised; at first those of the training marginal."""

    def __init__(self, config: ModalityConfig, latent: int) -> None:
        super().__init__()
        self.config, self.sides, sizes = config, sides(config)[::-1], channels(config)[::-1]
        layer = nn.ConvTranspose2d if config.form == "image" else nn.ConvTranspose1d
        self.first = nn.Sequential(nn.Linear(latent, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, sizes[0] * math.prod(self.sides[0])))
        self.layers = nn.ModuleList(layer(a, b, 4, stride=2, padding=1) for a, b in pairwise(sizes))
        keep_scales(self)
        self.log_scale = nn.Parameter(torch.zeros(sizes[-1]))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, latent_ENL: Tensor) -> Tensor:
        """(1, N, L) -> (1, N, P) as `Likelihoods.heads` takes it: mean and log scale of value after value."""
        whole = self.first(latent_ENL[0]).unflatten(-1, (-1, *self.sides[0]))
        for layer, size in zip(self.layers, self.sides[1:], strict=True):
            whole = layer(fn.silu(whole))[(..., *(slice(n) for n in size))]  # twice the side is one too long where it is odd
        mean_ND = fold(self.config, whole)
        scale_C = SCALE_PACE * self.log_scale
        scale_D = fold(self.config, scale_C.view(1, -1, *[1] * len(self.sides[-1])).expand(1, *whole.shape[1:]))
        return torch.stack([mean_ND, scale_D.expand_as(mean_ND)], -1).flatten(1)[None]
