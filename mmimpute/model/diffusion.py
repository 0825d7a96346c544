"""decoder = "diffusion": what the record says of the latents (z0, zj) is drawn by a denoiser, not from Gaussians.

A latent diffusion over the joint latent space in the manner of Bounoua, Franzese & Michiardi 2023 (Multi-modal Latent
Diffusion), with the VAE's encoders in the place of their deterministic ones. u = [z0, zj of the modalities with this
decoder], whitened; the denoiser sees what the encoders say of the observed modalities. So u ~ p(u | x_observed) takes the
place of q(z0 | x_observed) and p(zj | z0) when draws or synthetic records are made, whatever its shape. What is observed
is copied, and gaps inside an observed modality are still drawn from q(zj | z0, xj). Every member has its own, as it has
its own axes; so records can still be judged by the member that has not seen them.

The VAE's own decoders blur: zj ~ p(zj | z0) must do for all shapes, so noise has to. Sharper copies of them, with little
weight on their latents' divergence, are trained first; their latents are what the denoiser learns (`mmimpute.denoising`). What
it draws is left as it is: moved to the stack's mean and deviation by the VAE's moments it loses what it gained.

It is for images and signals, and for vectors of shapes that Gaussians cannot make. Five views of digits, 5,000 records, 10 epochs
(`tests/benchmarks/images.py`, whose words these are):

                      one view   four   joint   Frechet, four   joint
    likelihood          .49      .77     .50        351          314
    adversarial         .52      .76     .50        275          244
    likelihood, 30 ep.  .60      .76     .38        283          258    in as much time as the next
    diffusion           .69      .90     .56        157          117
    half of the views missing in training
    likelihood          .54      .76     .43        385          377
    adversarial         .57      .76     .45        346          318
    diffusion           .66      .85     .43        202          173
      told who lacks what .67    .87     .48        185          172

    by steps, complete: decoders as they are .56 .85 .47, 400, 368; sharper ones, 200 steps .60 .87 .51, 251, 185; 500 steps .64 .89 .54,
    184, 132; divergence weighted .3 instead of .1 (200 steps) .58 .87 .49, 259, 190

"Told who lacks what" is how it was (and in the complete rows, where that says nothing): the denoiser knew which zj a record has. Where
half is missing at random that helps; elsewhere it draws synthetic people as if they lacked nothing, and such people are others (below).
A denoiser of z0, told nothing, and one of zj given z0, told that, would have both.

Vectors, 1,500 records, one member, one seed (`tests/benchmarks/decoders.py`, which says what the columns are). On NHANES it is worse than
the likelihood at draws given the rest, which are too narrow: the sharper the decoders, the narrower. Weights of the latents' divergence of
.1, .5 and 1, before the last change: moons c2st .638, .651, .739; NHANES score .538, .523, .516, cover90 .67, .74, .82.

                                     c2st   energy   score   cover90   CPU s of the fit   draws a second
    moons    likelihood              .759    .031    .491     .81             9            295,000
             adversarial             .744    .030    .490     .81            10            322,000
             diffusion               .628    .011    .504     .77            37              4,600
    NHANES   likelihood              .954    .064    .498     .82            18             87,700
             adversarial             .948    .065    .498     .82            23             82,000
             diffusion               .944    .103    .523     .74            67              3,900
               told who lacks what   .959    .240    .523     .74: synthetic people are those who lack nothing, in NHANES mostly adults

Preconditioning, noise levels and Heun's sampler: Karras et al. 2022, table 1 and algorithm 1, with sigma_data = 1.

Shape suffixes: E members, B records, N = draws x B, S draws, U latents of u, C columns of evidence, H hidden.
"""

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from mmimpute.model.config import ModelConfig
from mmimpute.model.likelihoods import Likelihoods
from mmimpute.model.networks import Linear, Private, kl
from mmimpute.model.prior import FullGaussian
from mmimpute.model.standardise import Standardise

DECODER = "diffusion"
STEPS = 16  # of the sampler, two evaluations each
NOISE = (0.01, 40.0)  # least and most; whitened latents have deviation 1
RHO = 7.0
AT_ONCE = 1 << 14  # draws of the latents
LOG_NOISE = (-0.5, 1.4)  # mean and deviation in training
LEVELS = 5  # frequencies that encode a noise level, the highest a period in two units of its logarithm
BLOCKS = 2
DROPOUT = 0.1


class Plan(NamedTuple):
    """Sizes, and how long to train: epochs, and the fewest steps (at least `denoising.CHECKS`)."""

    width: int  # of the denoiser
    kl_weight: float  # of the decoders' latents: their distribution is the denoiser's business
    sharpening: tuple[int, int]  # of the decoders
    denoising: tuple[int, int]


VECTORS = Plan(128, 0.5, (150, 10), (150, 10))
CONVOLVED = Plan(256, 0.1, (25, 300), (150, 1500))  # with images or signals, whose decoders' steps are dear


def diffused(config: ModelConfig) -> list[int]:
    """The modalities with this decoder."""
    return [j for j, m in enumerate(config.modalities) if m.decoder == DECODER]


class Denoiser(nn.Module):
    """F of Karras et al.: a residual network of the noisy latents, the evidence and the noise level, plus a linear map."""

    def __init__(self, members: int, latents: int, evidence: int, width: int) -> None:
        super().__init__()
        inputs = latents + evidence
        self.register_buffer("frequency_O", torch.pi * 2.0 ** torch.arange(LEVELS) / 4, persistent=False)
        self.first = Linear(members, inputs, width)
        self.level = Linear(members, 2 * LEVELS, width)
        self.inner = nn.ModuleList(Linear(members, width, width) for _ in range(BLOCKS))
        self.outer = nn.ModuleList(Linear(members, width, width) for _ in range(BLOCKS))
        self.shift = nn.ModuleList(Linear(members, width, 2 * width) for _ in range(BLOCKS))
        self.last = Linear(members, width, latents)
        self.linear = Linear(members, inputs, latents, bias=False)
        self.share = Linear(members, width, latents)
        for layer in (*self.outer, *self.shift, self.last, self.share):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.linear.weight)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, noisy_ENU: Tensor, evidence_ENC: Tensor, log_EN1: Tensor) -> Tensor:
        angle = log_EN1 / 4 * self.frequency_O
        level = fn.silu(self.level(torch.cat([angle.sin(), angle.cos()], -1)))
        given = torch.cat([noisy_ENU, evidence_ENC], -1)
        hidden = self.first(given) + level
        for inner, outer, shift in zip(self.inner, self.outer, self.shift, strict=True):
            scale, offset = shift(level).chunk(2, -1)
            hidden = hidden + outer(self.dropout(fn.silu(inner(fn.silu(hidden)) * (1 + scale) + offset)))
        return self.last(fn.silu(hidden)) + (1 + self.share(level)) * self.linear(given)


class Diffusion(nn.Module):
    """p(z0, zj | x_observed) of every member: moments that whiten, a denoiser, and decoders that are sharper than the VAE's."""

    def __init__(self, config: ModelConfig, private: Sequence[Private], likelihoods: Sequence[Likelihoods]) -> None:
        """private, likelihoods: of the VAE, from copies of which the decoders start."""
        super().__init__()
        self.config = config
        self.chosen = diffused(config)
        self.private = nn.ModuleList(copy.deepcopy(private[j]) for j in self.chosen)
        self.likelihoods = nn.ModuleList(copy.deepcopy(likelihoods[j]) for j in self.chosen)
        self.sizes = [config.shared, *(p.own for p in self.private)]
        self.scales = nn.ModuleList(FullGaussian(config.members, size) for size in self.sizes)
        evidence = config.shared + sum(p.own for p in private) + len(private)
        self.plan = CONVOLVED if any(p.convolved for p in self.private) else VECTORS
        self.denoiser = Denoiser(config.members, sum(self.sizes), evidence, self.plan.width)

    def shared_names(self) -> set[str]:
        """The tensors of the state that all members share; the others have them as their first dimension."""
        per_member = {name for name, _ in self.named_parameters()} | {f"scales.{name}" for name, _ in self.scales.named_buffers()}
        return self.state_dict().keys() - per_member

    def member(self, index: int, private: Sequence[Private], likelihoods: Sequence[Likelihoods]) -> "Diffusion":
        """One member as a model of its own, beside the member of the VAE that has these."""
        if self.config.members == 1:
            return self
        alone, shared = Diffusion(dataclasses.replace(self.config, members=1), private, likelihoods), self.shared_names()
        alone.load_state_dict({name: t if name in shared else t[index : index + 1] for name, t in self.state_dict().items()})
        return alone.to(self.scales[0].mean_EL.device).eval()

    def whiten(self, latents: Sequence[Tensor]) -> Tensor:
        """z0 and each zj, (E, B, L), side by side with mean 0 and covariance 1 over the training records."""
        parts = [
            torch.linalg.solve_triangular(s.root_ELL, (t - s.mean_EL[:, None]).mT, upper=False).mT
            for s, t in zip(self.scales, latents, strict=True)
        ]
        return torch.cat(parts, -1)

    def colour(self, whitened: Tensor) -> list[Tensor]:
        """The inverse of `whiten`."""
        return [s.sample(part) for s, part in zip(self.scales, whitened.split(self.sizes, -1), strict=True)]

    def denoise(self, noisy_ENU: Tensor, evidence_ENC: Tensor, noise_EN1: Tensor) -> Tensor:
        """The expected latents given noisy ones."""
        scale = (1 + noise_EN1.square()).rsqrt()
        found = self.denoiser(scale * noisy_ENU, evidence_ENC, noise_EN1.log())
        return scale.square() * noisy_ENU + noise_EN1 * scale * found

    def loss(self, clean_EBU: Tensor, evidence_EBC: Tensor, known_BH: Tensor) -> Tensor:
        """Squared error of the denoiser at random noise levels, (E, B): mean over the latents that are known, 1 where it knows nothing.

        known: which modalities a record holds. The zj of the others are of p(zj | z0), and the denoiser is not told which: it would
        learn what kind of people lack something, and draw synthetic ones as if nobody did.
        """
        mean, sd = LOG_NOISE
        noise_EB1 = torch.exp(mean + sd * torch.randn_like(clean_EBU[..., :1]))
        error = self.denoise(clean_EBU + noise_EB1 * torch.randn_like(clean_EBU), evidence_EBC, noise_EB1) - clean_EBU
        weight = (1 + noise_EB1.square()) / noise_EB1.square()
        mask_EBU = self.spread(known_BH.to(clean_EBU.dtype).expand(len(clean_EBU), -1, -1))
        return (weight * mask_EBU * error.square()).sum(-1) / mask_EBU.sum(-1)

    def spread(self, known_EBH: Tensor) -> Tensor:
        """1 for each latent that is known; z0 always is."""
        parts = [known_EBH[..., :1] * 0 + 1, *known_EBH.split(1, -1)]
        return torch.cat([p.expand(*p.shape[:-1], size) for p, size in zip(parts, self.sizes, strict=True)], -1)

    def reconstruction(self, at: int, z0_EBL: Tensor, code_BC: Tensor, target_BD: Tensor, seen_BD: Tensor) -> Tensor:
        """What trains decoder `at`, per observed value, (E, B): -log p(xj | zj, z0) + kl_weight KL(q(zj | z0, xj) || p(zj | z0))."""
        private, likelihood, present_B = self.private[at], self.likelihoods[at], seen_BD.any(1)
        prior = private.p(z0_EBL)
        q = private.q(z0_EBL, prior, code_BC, present_B)
        heads = likelihood.heads(private.decode(z0_EBL, q.sample(torch.randn_like(q.mean))))
        nats_EB = (likelihood.log_prob(heads, target_BD) * seen_BD).sum(-1) - self.plan.kl_weight * kl(q, prior) * present_B
        return -nats_EB / seen_BD.sum(1).clamp_min(1)

    def decoded(self, at: int, z0_SEBL: Tensor, zj_SEBL: Tensor, standardise: Standardise, generator: torch.Generator | None) -> Tensor:
        """A draw of p(xj | zj, z0) per draw of the latents, S x E x B x D in original units."""
        flat = [t.transpose(0, 1).flatten(1, 2) for t in (z0_SEBL, zj_SEBL)]
        raw = self.private[at].decode(*flat).unflatten(1, (z0_SEBL.shape[0], z0_SEBL.shape[2])).transpose(0, 1)
        return self.likelihoods[at].sample(self.likelihoods[at].heads(raw), standardise, generator)

    def sample(self, evidence_EBC: Tensor, draws: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """z0 and the zj of `chosen`, S x E x B x L each: draws given the evidence."""
        parts = evidence_EBC.repeat(1, draws, 1).split(AT_ONCE, 1)
        u_ENU = torch.cat([self._solved(part, generator) for part in parts], 1)
        return [t.unflatten(1, (draws, -1)).transpose(0, 1) for t in self.colour(u_ENU)]

    def _solved(self, evidence_ENC: Tensor, generator: torch.Generator | None) -> Tensor:
        """Whitened latents, E x N x U: from noise along the probability flow."""
        shape, device = evidence_ENC.shape[:2], evidence_ENC.device
        u_ENU = NOISE[1] * torch.randn((*shape, sum(self.sizes)), generator=generator, device=device)
        slope = lambda u, noise: (u - self.denoise(u, evidence_ENC, noise.expand(*shape, 1))) / noise  # noqa: E731
        for now, following in itertools.pairwise(noise_levels(device)):
            first = slope(u_ENU, now)
            ahead = u_ENU + (following - now) * first
            u_ENU = ahead if following == 0 else u_ENU + (following - now) * (first + slope(ahead, following)) / 2
        return u_ENU


def noise_levels(device: torch.device) -> Tensor:
    """From the most noise to none, STEPS + 1 of them (Karras et al. 2022, eq. 5)."""
    least, most = (n ** (1 / RHO) for n in NOISE)
    step = torch.arange(STEPS, device=device) / (STEPS - 1)
    return torch.cat([(most + step * (least - most)) ** RHO, step.new_zeros(1)])
