"""The Gaussian expert: one multivariate normal over all modalities, fitted to records with anything missing.

It conditions on any subset of values, and its conditional means are what the additive expert reads where inputs are
missing. Wide modalities take part with their principal components. Categorical features take no part.

Shape suffixes: E members, B or N records, D features, Q components, P parts of the vector (features or components), U unknown parts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmimpute.model.config import ModelConfig
from mmimpute.model.networks import CLIP

NARROW = 40  # modalities up to this width take part as they are
# The same of those with gaps: components of records whose missing values are taken as 0 say that these are 0. R2 of gaps, of the Gaussian
# alone, 60 and 100 features, a tenth (and 40%) missing: .00 (.00) and .38 (.23) by components, .69 (.69) and .72 (.72) by the values.
NARROW_WITH_GAPS = 160
COMPONENTS = 64  # of a wider modality
KEPT = 256  # components that the additive expert reads
ITERATIONS = 8  # of expectation-maximisation
MOST_WORK = 2e11  # patterns x P^3 up to which it runs; beyond, pairwise moments of that many records are as good
SOLVER_STEPS = 40
# Of a standardised part. What was constant where a member learnt, and is not elsewhere, would otherwise be all that the solver looks at.
LEAST_VARIANCE = 1e-2
TOLERANCE = 1e-3  # of the residual's norm; 1e-2 gives the same skill to .00001


class Components(nn.Module):
    """A wide modality's principal components, of every member's own records; a narrow one is left as it is."""

    def __init__(self, members: int, kinds: Sequence[str], kept: int, structured: bool = False) -> None:
        """structured: an image, a signal or a text, which takes no part: it has no components."""
        super().__init__()
        width = len(kinds)
        # A code has no absurd values, and a rare one lies far: clipped as well, eicu 0.5's diagnoses lose .007 of skill.
        limit_D = torch.tensor([torch.inf if kind == "binary" else CLIP for kind in kinds])
        self.register_buffer("limit_D", limit_D, persistent=False)
        self.wide = kept > 0 or structured
        self.parts = min(COMPONENTS, kept) if self.wide else width
        if self.wide:
            self.register_buffer("mean_E1D", torch.zeros(members, 1, width))
            self.register_buffer("basis_EDQ", torch.zeros(members, width, kept))

    @torch.no_grad()
    def fit(self, member: int, z_ND: Tensor) -> None:
        """Takes the leading components of complete standardised records; fewer records than components leave zeros."""
        if not len(z_ND):  # nothing is known of the modality: zeros
            return
        z_ND = z_ND.clamp(-self.limit_D, self.limit_D)
        mean_D = z_ND.mean(0)
        _, _, basis_QD = torch.linalg.svd(z_ND - mean_D, full_matrices=False)
        kept = min(self.basis_EDQ.shape[2], max(1, len(z_ND) // 2), len(basis_QD))
        self.mean_E1D[member, 0] = mean_D
        self.basis_EDQ[member] = 0
        self.basis_EDQ[member, :, :kept] = basis_QD[:kept].T

    def scores(self, z_BD: Tensor) -> Tensor:
        """(B, D) -> (E, B, Q)."""
        return (z_BD.clamp(-self.limit_D, self.limit_D) - self.mean_E1D) @ self.basis_EDQ

    def restore(self, parts_EBP: Tensor) -> Tensor:
        """(E, B, P) -> (E, B, D) standardised values."""
        return self.mean_E1D + parts_EBP @ self.basis_EDQ[..., : self.parts].mT if self.wide else parts_EBP


class Gaussian(nn.Module):
    """mean_EP and covariance_EPP per member, and the components of the wide modalities."""

    def __init__(self, config: ModelConfig, kept: Sequence[int]) -> None:
        """kept: components per modality; see `kept_components`."""
        super().__init__()
        self.components = nn.ModuleList(
            Components(config.members, m.kinds, k, m.structured) for m, k in zip(config.modalities, kept, strict=True)
        )
        self.sizes = [c.parts for c in self.components]
        self.register_buffer("mean_EP", torch.zeros(config.members, sum(self.sizes)))
        self.register_buffer("covariance_EPP", torch.eye(sum(self.sizes)).repeat(config.members, 1, 1))
        for j, m in enumerate(config.modalities):
            self.register_buffer(f"numeric_{j}", torch.tensor([k != "categorical" for k in m.kinds]), persistent=False)

    def parts(self, z: Sequence[Tensor], observed: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Standardised values (0 where unobserved) -> the vector (E, B, P), and which of its parts are known (B, P)."""
        values, known = [], []
        members = len(self.mean_EP)
        for j, (component, z_BD, seen_BD) in enumerate(zip(self.components, z, observed, strict=True)):
            if component.wide:
                values.append(component.scores(z_BD)[..., : component.parts])
                known.append(seen_BD.any(1, keepdim=True).expand(-1, component.parts))
            else:
                values.append(z_BD.clamp(-CLIP, CLIP).expand(members, -1, -1))
                known.append(seen_BD & getattr(self, f"numeric_{j}"))
        return torch.cat(values, -1), torch.cat(known, -1)

    def forward(self, y_EBP: Tensor, known_BP: Tensor) -> Tensor:
        """The vector with its unknown parts at their conditional means: mean + S_uk S_kk^-1 (y_k - mean_k).

        S_kk a = y_k - mean_k is solved for all records at once by conjugate gradients under the records' masks: a
        factorisation for each of thousands of patterns of missing values costs more.
        """
        known_EBP = known_BP.to(y_EBP.dtype).expand_as(y_EBP)
        mean_E1P = self.mean_EP[:, None]
        residual_EBP = (y_EBP - mean_E1P) * known_EBP
        solved_EBP = conjugate_gradients(self.covariance_EPP, residual_EBP, known_EBP)
        return torch.where(known_BP, y_EBP, mean_E1P + solved_EBP @ self.covariance_EPP)

    @torch.no_grad()
    def fit_member(self, member: int, z: Sequence[Tensor], observed: Sequence[Tensor], shrinkage: float) -> None:
        """Fits one member to records: z (N, D_j), 0 where unobserved. The components must have been fitted."""
        if not len(z[0]):  # it stays N(0, I)
            return
        y_ENP, known_NP = self.parts(z, observed)
        mean_P, covariance_PP = fit_normal(y_ENP[member].double(), known_NP, shrinkage)
        self.mean_EP[member] = mean_P
        self.covariance_EPP[member] = covariance_PP


def kept_components(config: ModelConfig, rows: int, gaps: Sequence[bool]) -> list[int]:
    """Components per modality: 0 for narrow ones, and for images, signals and texts. rows: of the training data; gaps: of which modalities
    some record holds a part."""
    return [
        0 if m.structured or m.width <= (NARROW_WITH_GAPS if partial else NARROW) else min(KEPT, m.width, max(1, rows // 2))
        for m, partial in zip(config.modalities, gaps, strict=True)
    ]


def conjugate_gradients(covariance_EPP: Tensor, right_EBP: Tensor, known_EBP: Tensor) -> Tensor:
    """a with (S a)_k = right_k and a_u = 0, k and u being each record's known and unknown parts.

    The preconditioner is the known block of S^-1, which is the inverse itself where everything is known: 10 steps to a
    thousandth where S's diagonal takes 34 (nhanes, a third unknown).
    """
    precision_EPP = torch.cholesky_inverse(torch.linalg.cholesky(covariance_EPP))
    solved_EBP = torch.zeros_like(right_EBP)
    residual_EBP = right_EBP * known_EBP
    step_EBP = (residual_EBP @ precision_EPP).mul_(known_EBP)
    energy_EB1 = _dot(residual_EBP, step_EBP)
    enough_EB1 = TOLERANCE**2 * energy_EB1
    for _ in range(SOLVER_STEPS):
        image_EBP = (step_EBP @ covariance_EPP).mul_(known_EBP)
        # A record that has arrived stands still, or it would go on as long as the records next to it need.
        length_EB1 = (energy_EB1 > enough_EB1) * energy_EB1 / _dot(step_EBP, image_EBP).clamp_min(1e-20)
        solved_EBP.addcmul_(length_EB1, step_EBP)
        residual_EBP.addcmul_(length_EB1, image_EBP, value=-1)
        nearer_EBP = (residual_EBP @ precision_EPP).mul_(known_EBP)
        energy_EB1, before_EB1 = _dot(residual_EBP, nearer_EBP), energy_EB1
        if bool((energy_EB1 <= enough_EB1).all()):
            break
        step_EBP = nearer_EBP.addcmul_(energy_EB1 / before_EB1.clamp_min(1e-20), step_EBP)
    return solved_EBP


def _dot(a_EBP: Tensor, b_EBP: Tensor) -> Tensor:
    return torch.linalg.vecdot(a_EBP, b_EBP)[..., None]


def fit_normal(y_NP: Tensor, known_NP: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance of records with unknown parts: expectation-maximisation (Little & Rubin 2019, sec. 11.2).

    After every step the correlations are shrunk: (1 - g) S + g diag(S). Starts from the variances; where the patterns
    of missing parts are too many for it, pairwise moments are returned.
    """
    patterns, index_N = torch.unique(known_NP, dim=0, return_inverse=True)
    groups = torch.argsort(index_N, stable=True).split(torch.bincount(index_N).tolist())
    parts = y_NP.shape[1]
    if len(patterns) * parts**3 > MOST_WORK:
        return _pairwise(y_NP, known_NP, shrinkage)
    mean_P, covariance_PP = _marginal(y_NP, known_NP)
    for _ in range(ITERATIONS):
        precision_PP = torch.cholesky_inverse(torch.linalg.cholesky(covariance_PP))
        filled_NP, spread_PP = torch.where(known_NP, y_NP, mean_P), torch.zeros_like(covariance_PP)
        for known_P, rows in zip(patterns, groups, strict=True):
            unknown = (~known_P).nonzero().squeeze(1)
            # Given the known parts: from the precision's block of the unknown parts, mostly the fewer (Bishop 2006, eq. 2.73 and 2.75).
            spread_UU = torch.cholesky_inverse(torch.linalg.cholesky(precision_PP[unknown][:, unknown]))
            filled_NP[rows[:, None], unknown] -= (filled_NP[rows] - mean_P) @ precision_PP[:, unknown] @ spread_UU
            spread_PP[unknown[:, None], unknown] += len(rows) * spread_UU
        second_PP = (filled_NP.T @ filled_NP + spread_PP) / len(y_NP)
        mean_P = filled_NP.mean(0)
        covariance_PP = _shrunk(second_PP - torch.outer(mean_P, mean_P), shrinkage)
    return mean_P, covariance_PP


def _marginal(y_NP: Tensor, known_NP: Tensor) -> tuple[Tensor, Tensor]:
    count_P = known_NP.sum(0).clamp_min(1)
    mean_P = (y_NP * known_NP).sum(0) / count_P
    return mean_P, torch.diag((((y_NP - mean_P) * known_NP).square().sum(0) / count_P).clamp_min(LEAST_VARIANCE))


def _shrunk(covariance_PP: Tensor, shrinkage: float) -> Tensor:
    """Correlations times 1 - shrinkage, and a ridge of a thousandth of the variances."""
    diagonal_P = covariance_PP.diagonal().clamp_min(LEAST_VARIANCE)
    return (1 - shrinkage) * covariance_PP + torch.diag(diagonal_P - (1 - shrinkage) * covariance_PP.diagonal() + 1e-3 * diagonal_P)


def _pairwise(y_NP: Tensor, known_NP: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Each covariance from the records that hold both parts, made positive definite."""
    mean_P, variance_PP = _marginal(y_NP, known_NP)
    known_NP = known_NP.to(y_NP.dtype)
    centred_NP = (y_NP - mean_P) * known_NP
    covariance_PP = centred_NP.T @ centred_NP / (known_NP.T @ known_NP).clamp_min(1)
    scale_P = variance_PP.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(covariance_PP / torch.outer(scale_P, scale_P))
    correlation_PP = (vectors * values.clamp_min(1e-3)) @ vectors.T
    return mean_P, _shrunk(correlation_PP * torch.outer(scale_P, scale_P), shrinkage)
