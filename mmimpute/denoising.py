"""Fits the latent diffusion (`model.diffusion`) on what a trained VAE says of the training records.

Every step encodes a batch twice: all that is observed, which gives the posterior that the latents are drawn from, and a
random subset of it, which is the evidence. Some records show nothing: they teach what synthetic records are drawn from.

Shape suffixes: E members, B records of a batch, K modalities, H modalities with this decoder, U latents.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from mmimpute.model.diffusion import Diffusion
from mmimpute.model.networks import Normal
from mmimpute.model.objective import hide
from mmimpute.model.prior import moments
from mmimpute.model.vae import Inputs, MultiModalVAE
from mmimpute.training import seeded

BATCH = 256
MOST_STEPS = 3000
LEVELS = 2  # noise levels per record and step
LR, DECAY, WARMUP, CLIP = 2e-3, 0.02, 0.05, 1.0
EMA = 0.995
EMPTY, FULL = 0.2, 0.1  # shares of the records that show nothing, and all
CHECKS = 10  # looks at the records that a member has not seen; the best weights are kept
MOST_JUDGES = 1000
SEED = 13


def fit_diffusion(diffusion: Diffusion, vae: MultiModalVAE, inputs: Inputs, fold_N: Tensor) -> None:
    """Trains in place on records of which something is observed; fold_N says which member has not seen a record."""
    rows = inputs.present_BK.any(1).nonzero().squeeze(1)
    if not len(rows):
        return
    diffusion.requires_grad_()
    steps = _steps(len(rows), *diffusion.plan.sharpening)
    _descend(diffusion, rows, fold_N, steps, lambda module, chosen: _reconstruction(module, vae, _part(inputs, chosen, values=True)))
    _fit_scales(diffusion, vae, inputs, rows)
    for decoder in (diffusion.private, diffusion.likelihoods):
        decoder.requires_grad_(False)
    steps = _steps(len(rows), *diffusion.plan.denoising)
    _descend(diffusion, rows, fold_N, steps, lambda module, chosen: _denoising(module, vae, _part(inputs, chosen)))


def _steps(records: int, epochs: int, least: int) -> int:
    return min(MOST_STEPS, max(least, records * epochs // BATCH))


def _descend(diffusion: Diffusion, rows: Tensor, fold_N: Tensor, steps: int, loss_of: Callable[[Diffusion, Tensor], Tensor]) -> None:
    """Minimises `loss_of` some records, (E, B), and keeps the averaged weights that are best on records not seen."""
    judges, members = rows[fold_N[rows] >= 0][:MOST_JUDGES], diffusion.config.members
    index_E1 = torch.arange(members, device=fold_N.device)[:, None]
    average, best, least = copy.deepcopy(diffusion).eval(), diffusion.state_dict(), math.inf
    free = [p for p in diffusion.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(free, lr=LR, betas=(0.9, 0.99), weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    with seeded(SEED, fold_N.device):
        for step, chosen in zip(range(1, steps + 1), _batches(rows), strict=False):
            optimiser.zero_grad()
            _mean(loss_of(diffusion.train(), chosen), fold_N[chosen] != index_E1).backward()
            nn.utils.clip_grad_norm_(free, CLIP * math.sqrt(members))
            optimiser.step()
            schedule.step()
            _follow(average, diffusion, min(EMA, step / (step + 9)))
            if step % (steps // CHECKS) == 0 and (judged := _judged(average, judges, fold_N, index_E1, loss_of)) <= least:
                best, least = copy.deepcopy(average.state_dict()), judged
    diffusion.load_state_dict(best)
    diffusion.eval()


def _rate(step: int, steps: int) -> float:
    return min((step + 1) / max(1, WARMUP * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))


@torch.no_grad()
def _follow(average: Diffusion, diffusion: Diffusion, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(diffusion.parameters()), 1 - decay)


def _batches(rows: Tensor) -> Iterator[Tensor]:
    while True:
        yield from rows[torch.randperm(len(rows))].split(BATCH)


@torch.no_grad()
def _judged(diffusion: Diffusion, judges: Tensor, fold_N: Tensor, index_E1: Tensor, loss_of: Callable) -> float:
    """The loss on records that a member has not seen, of the same noise every time; 0 without any."""
    with seeded(SEED, fold_N.device):
        return float(_mean(loss_of(diffusion, judges), fold_N[judges] == index_E1)) if len(judges) else 0.0


def _mean(loss_EB: Tensor, counts_EB: Tensor) -> Tensor:
    """Each member's mean over the records that count for it, summed over members."""
    return ((counts_EB * loss_EB).sum(1) / counts_EB.sum(1).clamp_min(1)).sum()


def _reconstruction(diffusion: Diffusion, vae: MultiModalVAE, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        q0 = vae.inference(inputs.codes, inputs.present_BK)
        z0_EBL = q0.sample(torch.randn_like(q0.mean))
    values = zip(*([t[j] for j in diffusion.chosen] for t in (inputs.codes, inputs.target, inputs.observed)), strict=True)
    return sum(diffusion.reconstruction(at, z0_EBL, *of) for at, of in enumerate(values))


def _denoising(diffusion: Diffusion, vae: MultiModalVAE, inputs: Inputs) -> Tensor:
    """The denoiser's loss at LEVELS noise levels a record."""
    with torch.no_grad():
        clean_EBU = diffusion.whiten([q.sample(torch.randn_like(q.mean)) for q in _posteriors(diffusion, vae, inputs)])
        evidence_EBC = vae.evidence(dataclasses.replace(inputs, shown_BK=_shown(vae, inputs.present_BK)))
    known_BH = inputs.present_BK[:, diffusion.chosen]
    return sum(diffusion.loss(clean_EBU, evidence_EBC, known_BH) for _ in range(LEVELS)) / LEVELS


def _part(inputs: Inputs, rows: Tensor, values: bool = False) -> Inputs:
    """Some records: their codes, and their values where they are asked for, as images are large."""
    pick = lambda lists: [t[rows] for t in lists]  # noqa: E731
    target, observed = (pick(inputs.target), pick(inputs.observed)) if values else ([], [])
    present_BK = inputs.present_BK[rows]
    return Inputs([], [], target, observed, pick(inputs.codes), present_BK, present_BK)


def _posteriors(diffusion: Diffusion, vae: MultiModalVAE, inputs: Inputs) -> list[Normal]:
    """q(zj | z0, xj) of the modalities with this decoder, given one draw of q(z0 | x), which comes first."""
    q0 = vae.inference(inputs.codes, inputs.present_BK)
    z0_EBL = q0.sample(torch.randn_like(q0.mean))
    own = [
        private.q(z0_EBL, private.p(z0_EBL), inputs.codes[j], inputs.present_BK[:, j])
        for private, j in zip(diffusion.private, diffusion.chosen, strict=True)
    ]
    return [Normal(z0_EBL, torch.zeros_like(z0_EBL)), *own]


def _shown(vae: MultiModalVAE, present_BK: Tensor) -> Tensor:
    """Which modalities are evidence: mostly all but some, as in the training of the VAE; now and then none, or all."""
    some_BK = present_BK & ~hide(present_BK, vae.hide_K, vae.config.hide_one)
    chance_B1 = torch.rand(len(present_BK), 1, device=present_BK.device)
    return torch.where(chance_B1 > 1 - FULL, present_BK, some_BK) & (chance_B1 > EMPTY)


@torch.no_grad()
def _fit_scales(diffusion: Diffusion, vae: MultiModalVAE, inputs: Inputs, rows: Tensor) -> None:
    """Moments of the latents over the records that have them."""
    with seeded(SEED, vae.hide_K.device):
        for at, scale in enumerate(diffusion.scales):
            held = rows if at == 0 else rows[inputs.present_BK[rows, diffusion.chosen[at - 1]]]
            if len(held):
                scale.fit(sum(moments(_posteriors(diffusion, vae, _part(inputs, b))[at]) for b in held.split(BATCH)))
