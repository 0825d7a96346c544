"""decoder = "adversarial": a discriminator tells real values of a hidden modality from decoded ones (VAE-GAN, Larsen et al. 2016).

It judges (xj, z0): what was hidden, or one sample of p(xj | zj, z0) with zj ~ p(zj | z0), beside the z0 ~ q(z0 | x_not_I)
that the rest of the record gave. The likelihood terms are kept. A draw still is a sample of p(xj | zj, z0) with its
noise, so that is what is judged, reparameterised: real features with their noise, the others straight through
(Bengio et al. 2013; Gumbel-softmax of Jang et al. 2017). The z0 beside them is taken as it is: what
the adversary moves, it moves through the decoder.

Images and signals are read by convolutions and have no noise here, as in VAE-GAN: noise that is independent from pixel to pixel is seen at
a glance, and a draw is what the decoder says. So draws differ by their latents alone. Of a text its bag is judged.

What it gains for vectors is little: see the table in diffusion.py; for real features a likelihood with learned noise is hard to tell from
them. Five views of digits, 2,000 records, 8 epochs (columns as in that table; weight: of the decoder's part):

                                       one view   four   joint   Frechet, four   joint
    likelihood                            .23      .59    .46        549          489
    likelihood, without noise of pixels   .34      .67    .51        546          488
    adversarial, weight .0015, R1 1       .34      .65    .50        471          421
    .005, R1 1                            .31      .60    .47        460          420
    .005, R1 10                           .34      .61    .49        428          407
    .015 and more, R1 1                   .10      .09     -       1,250        1,250    collapsed

Both losses are softplus (non-saturating, Goodfellow et al. 2014) with R1 on real values (Mescheder et al. 2018). The
decoder is judged by a copy of the discriminator whose weights are held, so one backward pass and one optimiser
serve both, in whatever wraps the model.

Shape suffixes: E members, H rows in which the modality is hidden, D features, V columns that are judged.
"""

import torch
import torch.nn.functional as fn
from torch import Tensor, nn
from torch.func import functional_call

from mmimpute.model.config import ModalityConfig, ModelConfig
from mmimpute.model.forms import ConvCode
from mmimpute.model.likelihoods import Heads, Likelihoods
from mmimpute.model.networks import Linear, keep_scale
from mmimpute.model.standardise import Standardise
from mmimpute.model.text import counts

DECODER = "adversarial"
GENERATOR_WEIGHT = 0.05  # beside a score of about 1
CONVOLVED_WEIGHT = 0.0015  # of images and signals, whose score is a mean over far more values; see the table above
JUDGE_WEIGHT = 0.1  # Adam takes no notice of it, the common norm to which gradients are clipped does
R1 = 1.0
CLIP = 6.0  # standardised values beyond it are judged alike


def judged_modalities(config: ModelConfig) -> list[int]:
    """The modalities with this decoder."""
    return [j for j, m in enumerate(config.modalities) if m.decoder == DECODER]


class Discriminator(nn.Module):
    """Logit of "real" of one modality's values beside z0, of every member."""

    def __init__(self, config: ModelConfig, modality: ModalityConfig) -> None:
        super().__init__()
        members, width = config.members, config.decoder
        numbers = [i for i, k in enumerate(modality.kinds) if k != "categorical"]
        codes = [i for i, k in enumerate(modality.kinds) if k == "categorical"]
        self.levels = max((modality.levels[i] for i in codes), default=0)
        for name, index in (("numbers_F", numbers), ("codes_F", codes)):
            self.register_buffer(name, torch.tensor(index, dtype=torch.long), persistent=False)
        self.register_buffer("real_D", torch.tensor([k == "real" for k in modality.kinds]), persistent=False)
        self.text = modality.form == "text"
        self.weight = CONVOLVED_WEIGHT if modality.convolved else GENERATOR_WEIGHT
        self.reader = ConvCode(modality, pattern=True) if modality.convolved else None
        columns = self.levels if self.text else len(numbers) + self.levels * len(codes)
        seen = self.reader.width if self.reader else columns + modality.width
        self.trunk = nn.Sequential(
            Linear(members, seen + config.shared, width),
            nn.LeakyReLU(0.2),
            Linear(members, width, width),
            nn.LeakyReLU(0.2),
            Linear(members, width, 1),
        )
        keep_scale(self.trunk[0])
        keep_scale(self.trunk[2])

    def forward(self, judged_EHV: Tensor, seen_HD: Tensor, z0_EHL: Tensor) -> Tensor:
        if self.reader:
            told_EHC = self.reader(judged_EHV[0], judged_EHV[0], seen_HD, seen_HD)[None]
        else:
            told_EHC = torch.cat([judged_EHV, seen_HD.to(judged_EHV.dtype).expand(len(judged_EHV), -1, -1)], -1)
        return self.trunk(torch.cat([told_EHC, z0_EHL], -1)).squeeze(-1).float()

    def loss(self, real_HV: Tensor, drawn_EHV: Tensor, seen_HD: Tensor, z0_EHL: Tensor, scale: float) -> Tensor:
        """Of discriminator and decoder together, (E, H). scale: of the decoder's part."""
        z0_EHL = z0_EHL.detach()
        real_EHV = real_HV.expand(drawn_EHV.shape).detach().requires_grad_()
        real_EH = self(real_EHV, seen_HD, z0_EHL)
        judge_EH = fn.softplus(-real_EH) + fn.softplus(self(drawn_EHV.detach(), seen_HD, z0_EHL))
        (slope_EHV,) = torch.autograd.grad(real_EH.sum(), real_EHV, create_graph=True)
        judge_EH = judge_EH + 0.5 * R1 * slope_EHV.square().sum(-1)
        held = {name: p.detach() for name, p in self.named_parameters()}
        fooled_EH = fn.softplus(-functional_call(self, held, (drawn_EHV, seen_HD, z0_EHL)))
        return JUDGE_WEIGHT * judge_EH + self.weight * scale * fooled_EH

    def real(self, z_HD: Tensor, x_HD: Tensor, seen_HD: Tensor) -> Tensor:
        """What was hidden, (H, V): standardised and original values in. Of a text, log(1 + how often each token is in it)."""
        if self.text:
            return torch.log1p(counts(x_HD, self.levels))
        level_HF = x_HD[:, self.codes_F].clamp(0, max(0, self.levels - 1)).long()
        return self._side_by_side(z_HD, fn.one_hot(level_HF, max(1, self.levels)), seen_HD)

    def drawn(
        self, likelihood: Likelihoods, heads: Heads, standardise: Standardise, seen_HD: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """One sample of p(xj | zj, z0) with a gradient, (E, H, V): heads of (E, H)."""
        if self.text:
            return torch.log1p(likelihood.drawn_counts(heads, generator))
        parts, indicators = [], None
        for kind in likelihood.kinds:
            head = heads[kind]
            if kind == "real":
                parts.append(head[..., 0] + head[..., 1].exp() * likelihood.noise(head[..., 0], generator))
            elif kind == "binary":
                parts.append(straight(torch.cat([torch.zeros_like(head), head], -1), generator)[..., 1])
            elif kind == "count":
                mean, drawn = head[..., 0].exp(), likelihood.counts_of(head.detach(), generator)
                parts.append(drawn + mean - mean.detach())
            elif kind == "ordinal":
                parts.append((straight(head, generator) * torch.arange(head.shape[-1], device=head.device)).sum(-1))
            else:
                indicators = straight(head, generator)
                parts.append(torch.zeros_like(head[..., 0]))
        values = likelihood.join(parts)
        return self._side_by_side(torch.where(self.real_D, values, standardise(values)), indicators, seen_HD)

    def _side_by_side(self, z: Tensor, indicators: Tensor | None, seen_HD: Tensor) -> Tensor:
        """Standardised values and indicators of levels; 0 where nothing is observed, in what is drawn too."""
        columns = [(z * seen_HD).clamp(-CLIP, CLIP).index_select(-1, self.numbers_F)]
        if self.codes_F.numel():
            columns.append((indicators * seen_HD[:, self.codes_F, None]).flatten(-2))
        return torch.cat(columns, -1)


def straight(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Indicators of one sampled level, with the gradient of the softmax of logits plus Gumbel noise."""
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(1e-7, 1 - 1e-7)
    soft = (logits - torch.log(-torch.log(uniform))).softmax(-1)
    return fn.one_hot(soft.argmax(-1), soft.shape[-1]) + soft - soft.detach()
