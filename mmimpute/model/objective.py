"""The loss terms and the random hiding of modalities.

The patent's two terms (US 2025/0259050 A1, eqs. 2 and 3), in nats per record, are computed as written and reported
as `elbo` and `impute`. What is minimised is

    score of the hidden values - elbo_weight * elbo per observed value

The score takes L_impute's place with the same z0 ~ q(z0 | x_not_I), zi ~ p(zi | z0), each of the mixture over several
latent draws and divided by the training marginal's: for real features the CRPS of the mixture's mean and standard
deviation, which is what `predict` returns, and minus the log-probability for the others. A single draw's
log-likelihood charges the decoder for the spread of z0. Measured: out-of-fold skill of the VAE alone, five members, each
asked about the fold that it had not seen (one seed; differences of .002 are noise):

    nhanes 0.0: 8 latent draws in the score   .2453     4   .2459
                z0's mean is a network of the code plus a linear map of it (`SharedEncoder.skip`), 20 epochs   .237 -> .245
                the same for 30 epochs   .246 -> .252     (eicu 0.0   .085 -> .096, tcga 0.0   .106 -> .119)
                lr 1e-3 -> 2e-3, 30 epochs   .2532     24 epochs   .2529     1.5e-3, 50 epochs   .2543
                elbo_weight 0.03 -> 0.01   .2533     no pair score, no dropped values   .2534
    Of earlier, single models, on other records: the CRPS of the mixture's moments for that of the mixture +.003, z0 certain
    at the start and weights that keep the scale +.008, drop_values 0.5 -> 0.15 +.003; small cohorts gain .01 by dropout 0.4
    and elbo_weight 0.3; wide modalities' codes scaled by sqrt(64 / width): tcga 0.0   .118 -> .139.
    4 latent draws in the score -> 2, a step of nhanes' five members 13% shorter; stack's skill on 20% of the people, complete: nhanes
    0.0 .2756 -> .2756, eicu 0.0 .1397 -> .1400, 0.5 .0791 -> .0792, pbcseq .1568 -> .1565; 200,000 simulated records, VAE alone after
    2,000 steps, R2 short by .0143 -> .0138; energy scores of joint draws as before. L_elbo on an eighth of a batch instead of a quarter,
    another 10%: pbcseq .1553, energy score of its clinical features .725 -> .731.

Not kept: to start from the additive expert's best map through z0 (its reduced-rank regression as `skip` and the decoders' linear parts).
The VAE alone is then better everywhere, test rows of nhanes, eicu, tcga 0.0 .2510 -> .2554, .1197 -> .1361, .1468 -> .1736, of 0.5
.2149 -> .2182, .0636 -> .0702, .0975 -> .1101, in half of the epochs where cohorts are small; but it says what the additive expert says
already, and the stack loses: .2575 -> .2565, .1491 -> .1476, .1821 -> .1827, .2286 -> .2256, .0861 -> .0826, .1298 -> .1275.

Nor: gated layers (SwiGLU) in the trunk: nhanes .2756 -> .2755, eicu .1397 -> .1403, tcga .1738 -> .1729; pbcseq .157 -> .164 where people
have earlier visits in the training data, .105 -> .105 (three seeds) where they do not: they only recognise people better. 16 or 32 ramps
instead of 8: nhanes .2750, pbcseq .156.

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
    adversarial_EBK: Tensor  # of the modalities with this decoder, see adversarial.py
    objective: Tensor | None = None  # scalar, minimised
    contrast_E: Tensor | None = None  # weighted contrastive loss, mean over anchors (see contrastive.py)

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
