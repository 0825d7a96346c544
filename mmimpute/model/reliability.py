"""How far each modality of a record can be believed, learned from noise that training puts in.

A modality with a `noise` level is corrupted in half of its training records: numbers by Gaussian noise of sd s, everything
else by another record's values, as often as a value would be noise under it, s^2 / (1 + s^2). What a network reads off all the
modalities together is the share of signal, 1 / (1 + s^2): a Wiener filter's weight, by which q(z0 | x) discounts the modality.

NHANES, one member, one modality corrupted at a time, mean skill of the others (`tests/benchmarks/robustness.py`); left out: without the
modality that was corrupted; exchanged: its records permuted, for which nothing was trained and which is hardly noticed:

    sd of the noise                    0      0.5      1       2       4       8     exchanged   left out
    plain                            .265    .246    .219    .160    .058   -.036     .186        .228
    trained with noise, all believed .260    .242    .215    .155    .058   -.024     .182        .218
    with reliability                 .261    .244    .224    .222    .224    .224     .185        .222

Shape suffixes: E members, B records, K modalities, D features.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from mmimpute.model.config import ModelConfig
from mmimpute.model.networks import Linear, keep_scale
from mmimpute.model.standardise import Standardise

WIDTH = 128
SOUND = 1.5  # logit of the reliability at the start
CORRUPTED = 0.5  # share of a modality's training records


class Reliability(nn.Module):
    """r_EBK in (0, 1]: the share of signal in each modality; 1 where no noise is expected or nothing is seen."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.register_buffer("noise_K", torch.tensor([float(m.noise) for m in config.modalities]), persistent=False)
        inputs, outputs = width + len(config.modalities), len(config.modalities)
        first, second, last = (Linear(config.members, i, o) for i, o in ((inputs, WIDTH), (WIDTH, WIDTH), (WIDTH, outputs)))
        self.net = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
        keep_scale(first)
        keep_scale(second)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, SOUND)

    def logits(self, codes: Sequence[Tensor], present_BK: Tensor) -> Tensor:
        """codes: 0 where a modality is not present."""
        return self.net(torch.cat([*codes, present_BK.to(codes[0].dtype)], -1)).float()

    def forward(self, codes: Sequence[Tensor], present_BK: Tensor) -> Tensor:
        return torch.where((self.noise_K > 0) & present_BK, torch.sigmoid(self.logits(codes, present_BK)), 1.0)

    def loss(self, codes: Sequence[Tensor], present_BK: Tensor, signal_BK: Tensor, weight_EB: Tensor) -> Tensor:
        """Cross-entropy of the true share of signal, mean over the noisy modalities that are present; summed over members."""
        logits_EBK = self.logits(codes, present_BK)
        asked_EBK = weight_EB[..., None] * (present_BK & (self.noise_K > 0))
        entropy_EBK = fn.binary_cross_entropy_with_logits(logits_EBK, signal_BK.expand_as(logits_EBK), reduction="none")
        return ((entropy_EBK * asked_EBK).sum((1, 2)) / asked_EBK.sum((1, 2)).clamp_min(1)).sum()

    def share_of_signal(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """(B, K): 1 in half of the records, 1 / (1 + s^2) with s ~ U(0, noise) in the others."""
        chance_2BK = torch.rand((2, rows, len(self.noise_K)), generator=generator, device=self.noise_K.device)
        return 1 / (1 + (self.noise_K * chance_2BK[0] * (chance_2BK[1] < CORRUPTED)).square())


def corrupt(
    x_BD: Tensor,
    seen_BD: Tensor,
    real_D: Tensor,
    standardise: Standardise,
    signal_B: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One modality, filled, with noise in it, in original units. real_D: which features are numbers."""
    noise_B1 = 1 - signal_B[:, None]
    sd_B1 = (noise_B1 / (1 - noise_B1)).sqrt()
    z_BD = standardise(x_BD) + sd_B1 * torch.randn(x_BD.shape, generator=generator, device=x_BD.device)
    other_B = torch.randperm(len(x_BD), generator=generator, device=x_BD.device)
    swapped_BD = seen_BD[other_B] & (torch.rand(x_BD.shape, generator=generator, device=x_BD.device) < noise_B1)
    noisy_BD = torch.where(real_D, standardise.inverse(z_BD), torch.where(swapped_BD, x_BD[other_B], x_BD))
    return torch.where(noise_B1 > 0, noisy_BD, x_BD)
