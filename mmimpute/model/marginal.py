"""log p(x observed): importance-weighted bounds (Burda, Grosse & Salakhutdinov 2016, eq. 8).

    log p(x) >= E log 1/S sum_s  p(x | z0, z) p(z | z0) p(z0) / (q(z0 | x) q(z | z0, x))

with equality as S grows. p(z0) is the fitted prior, from which `generate` draws. Values that are not observed, and the zj of
modalities that are missing, integrate to 1 and are left out. Real values are on the model's scale: per training standard deviation
(of the logarithm, for logged features).

Shape suffixes: S samples, E members, B records, K modalities, D features, L latent.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmimpute.model.networks import Normal
from mmimpute.model.vae import Inputs, MultiModalVAE

CHUNK = 1 << 22  # values of a modality held at once: samples x members x records x features


class Marginal(NamedTuple):
    """log p(x observed) in nats, the bound of a single sample (the ELBO), and how many samples the weights are worth; (E, B) each."""

    log_prob: Tensor
    elbo: Tensor
    effective: Tensor


@torch.no_grad()
def log_marginal(
    vae: MultiModalVAE, x: Sequence[Tensor], observed: Sequence[Tensor], samples: int = 1000, generator: torch.Generator | None = None
) -> Marginal:
    """Per member and record, K of (B, D_j) in original units and what of them is observed; memory does not grow with `samples`."""
    inputs = vae.inputs(x, observed)
    widest = max(m.width for m in vae.config.modalities)
    together = max(1, CHUNK // (vae.config.members * len(x[0]) * widest))
    # log of the sums of the weights, of their squares, and the sum of their logs.
    first, second, plain = None, None, 0.0
    for start in range(0, samples, together):
        log_w_SEB = _log_weights(vae, inputs, min(together, samples - start), generator)
        sums = log_w_SEB.logsumexp(0), (2 * log_w_SEB).logsumexp(0)
        first, second = sums if first is None else (torch.logaddexp(first, sums[0]), torch.logaddexp(second, sums[1]))
        plain = plain + log_w_SEB.sum(0)
    return Marginal(first - math.log(samples), plain / samples, (2 * first - second).exp())


def _log_weights(vae: MultiModalVAE, inputs: Inputs, samples: int, generator: torch.Generator | None) -> Tensor:
    """Of S samples from the posteriors, (S, E, B)."""
    q0 = vae.inference(inputs.codes, inputs.present_BK)
    z0_SEBL = q0.sample(vae._noise((samples, *q0.mean.shape), generator))
    z0 = z0_SEBL.transpose(0, 1).flatten(1, 2)  # as the networks take it: E, S x B, L
    log_w_SEB = vae.prior.log_prob(z0_SEBL) - normal_log_prob(z0_SEBL, q0)
    for j, (private, likelihood) in enumerate(zip(vae.private, vae.likelihoods, strict=True)):
        present_B = inputs.present_BK[:, j]
        prior = private.p(z0)
        posterior = private.q(z0, prior, inputs.codes[j], present_B)
        zj = posterior.sample(vae._noise(prior.mean.shape, generator))
        raw = private.decode(z0, zj).unflatten(1, (samples, -1)).transpose(0, 1)
        log_prob_SEBD = likelihood.log_prob(likelihood.heads(raw), inputs.target[j])
        ratio_SEB = (normal_log_prob(zj, prior) - normal_log_prob(zj, posterior)).unflatten(1, (samples, -1)).transpose(0, 1)
        log_w_SEB = log_w_SEB + (log_prob_SEBD * inputs.observed[j]).sum(-1) + ratio_SEB * present_B
    return log_w_SEB


def normal_log_prob(z: Tensor, normal: Normal) -> Tensor:
    """Of a diagonal Gaussian, summed over the last dimension."""
    square = (z - normal.mean).square() / normal.var
    return -0.5 * (square + normal.var.log() + math.log(2 * math.pi)).sum(-1)
