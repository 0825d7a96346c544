"""The loss terms and the random hiding of modalities.

The patent's two terms (US 2025/0259050 A1, eqs. 2 and 3), in nats per record, are computed as written and reported
as `elbo` and `impute`. What is minimised is

    score of the hidden values - elbo_weight * elbo per observed value

The score takes L_impute's place with the same z0 ~ q(z0 | x_not_I), zi ~ p(zi | z0): the CRPS of real features and
minus the log-probability of the others, each of the mixture over several latent draws and divided by the training
marginal's. A single draw's log-likelihood charges the decoder for the spread of z0. Measured, skill on tune rows
(nhanes 0.0 | nhanes 0.5 | eicu 0.5; a difference under 0.004 is noise):

    latent draws in the score      2: - | .132 | .014    6: - | .144 | .017    6 in antithetic pairs: - | .145 | .019
                                  12 in antithetic pairs: - | .145 | .022     z0 at its mean: - | .146 | .022
    elbo_weight, 8 draws, unweighted ELBO, tune skill (and mean cover90):
                                  nhanes 0.0    nhanes 0.5    eicu 0.0      eicu 0.5      tcga 0.5
                        0.03      .239 (.93)    .150 (.92)    .096 (.87)    .018 (.90)    .055 (.84)
                        0.1       .235 (.94)    .147 (.93)    .093 (.90)    .021 (.91)    .055 (.86)
                        0.1 is kept for its coverage and its generated records; 0.03 ran 50 epochs, 0.1 ran 40
                        (with 2 draws, nhanes 0.0: 0.03 .230, 0.1 .228, 0.3 .224, 1.0 .217)
    ELBO parts weighted 1/D_j      .145 on nhanes 0.5, unweighted .147: the equation as it stands

A larger elbo_weight makes joint draws and `generate` truer: on the linear-Gaussian cohort the largest error of a
generated correlation is 0.30 at 0.1 and 0.19 at 0.5, at which imputed variances are within 7% on average.

Shape suffixes: B records, K modalities, D features.
"""
from typing import NamedTuple

import torch
from torch import Tensor


class LossTerms(NamedTuple):
    """Per record (B) and modality (K); terms of modalities that were not observed or not hidden are 0."""

    objective: Tensor           # scalar, minimised
    reconstruction_BK: Tensor   # E_q log p(xj | zj, z0)
    private_kl_BK: Tensor       # E_q KL(q(zj | z0, xj) || p(zj | z0))
    shared_kl_B: Tensor         # KL(q(z0 | x) || p(z0))
    impute_BK: Tensor           # E_{q(z0 | x_not_I) p(zi | z0)} log p(xi | zi, z0), i in I
    score_BK: Tensor            # proper score of the hidden values, mean over observed features, marginal = 1
    observed_BK: Tensor         # bool
    hidden_BK: Tensor           # bool

    @property
    def elbo_B(self) -> Tensor:
        """Eq. 2: reconstruction - private KL, summed over observed modalities, - shared KL."""
        return (self.reconstruction_BK - self.private_kl_BK).sum(1) - self.shared_kl_B

    @property
    def imputation_B(self) -> Tensor:
        """Eq. 3."""
        return self.impute_BK.sum(1)


def hide(present_BK: Tensor, weight_K: Tensor, one: float, generator: torch.Generator | None = None) -> Tensor:
    """A random subset I of each record's observed modalities, never all of them; (B, K) bool.

    With probability `one`: exactly one, picked in proportion to its weight. Else each with its own chance
    r * weight / 0.5, r ~ U(0.1, 0.8) per record; a random one is kept if that would hide all. Where a single
    modality is observed nothing can be hidden.
    """
    device, (rows, modalities) = present_BK.device, present_BK.shape
    uniform = torch.rand((3, rows, modalities), generator=generator, device=device)
    # argmax of log(weight) + Gumbel noise picks in proportion to the weights.
    gumbel_BK = -torch.log(-torch.log(uniform[0].clamp(1e-7, 1 - 1e-7)))
    ticket_BK = (weight_K.log() + gumbel_BK).masked_fill(~present_BK, -torch.inf)
    single_BK = torch.zeros_like(present_BK).scatter(1, ticket_BK.argmax(1, keepdim=True), True)
    row = torch.rand((2, rows, 1), generator=generator, device=device)
    several_BK = uniform[1] < (0.1 + 0.7 * row[0]) * weight_K / 0.5
    kept_BK = torch.zeros_like(present_BK).scatter(
        1, uniform[2].masked_fill(~present_BK, -1.0).argmax(1, keepdim=True), True)
    all_hidden_B1 = (several_BK | ~present_BK).all(1, keepdim=True)
    several_BK = several_BK & ~(all_hidden_B1 & kept_BK)
    hidden_BK = torch.where(row[1] < one, single_BK, several_BK) & present_BK
    return hidden_BK & (present_BK.sum(1, keepdim=True) > 1)


def keep_values(observed: list[Tensor], share: float, generator: torch.Generator | None = None) -> list[Tensor]:
    """The observed values that the encoders see in training: all of most records, a random part of `share` of them.

    Any part makes a valid q(z | .), so L_elbo, which still scores every observed value, stays a lower bound, and
    the private latents learn to fill gaps inside a modality.
    """
    rows, device = observed[0].shape[0], observed[0].device
    chance_2B1 = torch.rand((2, rows, 1), generator=generator, device=device)
    rate_B1 = 0.5 * chance_2B1[0] * (chance_2B1[1] < share)
    return [o & (torch.rand(o.shape, generator=generator, device=device) >= rate_B1) for o in observed]
