"""The loss terms and the random hiding of modalities.

The patent's two terms (US 2025/0259050 A1, eqs. 2 and 3), in nats per record, are computed as written and reported
as `elbo` and `impute`. What is minimised is

    score of the hidden values - elbo_weight * elbo per observed value

The score takes L_impute's place with the same z0 ~ q(z0 | x_not_I), zi ~ p(zi | z0), each of the mixture over several
latent draws and divided by the training marginal's: for real features the CRPS of the mixture's mean and standard
deviation, which is what `predict` returns, and minus the log-probability for the others. A single draw's
log-likelihood charges the decoder for the spread of z0. Measured, skill on tune rows that neither training nor early
stopping saw (one seed, a difference under 0.004 is noise; a masked 256-256 net: .239 on nhanes 0.0, .124 on tcga 0.0):

    nhanes 0.0: torch's initial weights, dropout in the decoders, CRPS of the mixture itself   .221 (cover90 .94)
                no dropout in the decoders   .223     elbo_weight 0.1 -> 0.03   .225     0.01   .226
                CRPS of the mean and standard deviation                                        .228 (.93)
                z0 certain at the start, weights that keep the scale                           .236 (.92)
                drop_values 0.5 -> 0.15 and pair_weight 0.25 -> 0.1                            .239
                torch's initial weights in the first layer alone                               .244
                lr 2e-3 -> 1e-3, for a tune loss that falls to the end                         .242
                then dropout 0.25   .239     0.3 (40 epochs)   .239     0.25 and elbo_weight 0.05 (40 epochs)   .234
                before the last two: decoders of 256 instead of 128   .236, of 128   .236
    tcga 0.0:   wide modalities' codes as they are   .118     scaled by sqrt(64 / width)   .139     (lr 2e-3)
                                                     .143                                  .135     (lr 1e-3, 60 epochs)
    small cohorts (16 nodes), skill and mean cover90:   eicu 0.0      eicu 0.5      tcga 0.0      tcga 0.5
                dropout 0.2, elbo_weight 0.03           -             .015 (.87)    -             .042 (.85)
                dropout 0.3, elbo_weight 0.1            .089 (.88)    .018 (.89)    .133 (.89)    .054 (.85)
                dropout 0.4, elbo_weight 0.3            .089 (.90)    .029 (.89)    .132 (.89)    .066 (.88)
    latent draws in the score (an earlier recipe, nhanes 0.5): 2   .132     6   .144     12   .145

A larger elbo_weight makes joint draws and `generate` truer: on the linear-Gaussian cohort the largest error of a
generated correlation is 0.30 at 0.1 and 0.19 at 0.5, at which imputed variances are within 7% on average.

Shape suffixes: E members, B records, R those of them on which L_elbo is estimated, K modalities, D features.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LossTerms(NamedTuple):
    """Per member (E), record (B, of which L_elbo is known for the first R) and modality (K).

    Terms of modalities that were not observed or not hidden are 0.
    """

    reconstruction_ERK: Tensor  # E_q log p(xj | zj, z0)
    private_kl_ERK: Tensor  # E_q KL(q(zj | z0, xj) || p(zj | z0))
    shared_kl_ER: Tensor  # KL(q(z0 | x) || p(z0))
    impute_EBK: Tensor  # E_{q(z0 | x_not_I) p(zi | z0)} log p(xi | zi, z0), i in I
    score_EBK: Tensor  # proper score of the hidden values, mean over observed features, marginal = 1
    observed_BK: Tensor  # bool
    hidden_BK: Tensor  # bool
    weight_EB: Tensor  # 1 where a member learns from a record, or is judged by it
    objective: Tensor | None = None  # scalar, minimised

    @property
    def elbo_ER(self) -> Tensor:
        """Eq. 2: reconstruction - private KL, summed over observed modalities, - shared KL."""
        return (self.reconstruction_ERK - self.private_kl_ERK).sum(2) - self.shared_kl_ER

    @property
    def imputation_EB(self) -> Tensor:
        """Eq. 3."""
        return self.impute_EBK.sum(2)

    @property
    def total_ER(self) -> Tensor:
        """Eq. 1: L = L_elbo + L_impute, in nats per record."""
        return self.elbo_ER + self.imputation_EB[:, : self.shared_kl_ER.shape[1]]


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
    kept_BK = torch.zeros_like(present_BK).scatter(1, uniform[2].masked_fill(~present_BK, -1.0).argmax(1, keepdim=True), True)
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
