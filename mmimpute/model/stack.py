"""The stack: what the experts say about a missing value, mixed and calibrated by weights that cross-fitting found.

Per modality, with a_e what expert e says (standardised numbers, logits of binary features) and s the VAE's deviation:

    location  = sum_e (w_e + delta_ed) a_ed + offset_d
    log scale = level_d + (kappa + tilt_d) (log s - level_d) + shift_d + gamma log(1 + disagreement / s) + eta (others - usual)

others: share of the other modalities that a record holds, usual: its mean over the records that the stack was fitted to.

Stack e belongs to member e: it was fitted to predictions that the other members made for records they had not seen.
There is one set of parameters for modalities that are missing as a whole and one for gaps inside observed ones.

Shape suffixes: E members, M experts, B or N records, D features, G 2: gap, whole.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from mmimpute.model.config import ModelConfig
from mmimpute.model.likelihoods import MARGINAL_CRPS, mean_absolute
from mmimpute.model.standardise import Standardise

EXPERTS = ("vae", "additive", "gaussian")
GAP, WHOLE = 0, 1
LOG_SCALE = (-6.0, 3.0)
PENALTY = 30.0  # of deviations from the modality's common weights, in records
COMMON_PENALTY = 1e-3
VAE_PENALTY = 5.0  # of weights other than the VAE alone, in records
ETA_PENALTY = 3.0  # in records
STEPS = 40  # of L-BFGS
OWN_STEPS = 12  # where the common weights are known; 6 lose .0002 of tcga's skill, 40 gain nothing
ENOUGH = 3e-6  # gain of a step in the score, relative to the marginal's, below which it stops: to 1e-9 takes a third more of them
COMMON = ("weight", "kappa", "gamma", "eta")
OWN = ("delta", "offset", "shift", "tilt")  # of each feature
WIDE = 160  # features from which the common weights come from a sample of them
SAMPLE = 64
MOST_BETWEEN = 0.75
TINY = 1e-30  # nearly the least that single precision tells from 0


@dataclass(frozen=True)
class Beliefs:
    """What the experts of each member say about one modality of some records."""

    location_MEBD: Tensor
    scale_EBD: Tensor  # the VAE's standard deviation
    others_B: Tensor  # share of the other modalities that are observed

    @cached_property
    def log_scale_EBD(self) -> Tensor:
        return self.scale_EBD.log()

    @cached_property
    def disagreement_EBD(self) -> Tensor:
        """How far the experts are apart: log(1 + their deviation / the VAE's)."""
        return torch.log1p(variance(self.location_MEBD).clamp_min(1e-12).sqrt() / self.scale_EBD)

    def rows(self, rows: Tensor) -> "Beliefs":
        return Beliefs(self.location_MEBD[:, :, rows], self.scale_EBD[:, rows], self.others_B[rows])

    def part(self, features: Tensor) -> "Beliefs":
        return Beliefs(self.location_MEBD[..., features], self.scale_EBD[..., features], self.others_B)


class ModalityStack(nn.Module):
    """One modality's parameters, for E members and both kinds of missingness."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        experts = len(EXPERTS)
        self.register_buffer("weight_EGM", torch.full((members, 2, experts), 1 / experts))
        self.register_buffer("delta_EGMD", torch.zeros(members, 2, experts, width))
        for name in ("offset", "shift", "tilt", "level"):
            self.register_buffer(f"{name}_EGD", torch.zeros(members, 2, width))
        self.register_buffer("kappa_EG", torch.ones(members, 2))
        for name in ("gamma", "eta", "usual"):
            self.register_buffer(f"{name}_EG", torch.zeros(members, 2))
        self.register_buffer("alone_EGMD", torch.ones(members, 2, experts, width))  # each expert's own error, standardised

    def of(self, mode: int) -> dict[str, Tensor]:
        """The parameters for gaps or for whole modalities, by name."""
        return {name.rsplit("_", 1)[0]: t[:, mode] for name, t in self.named_buffers()}

    def forward(self, beliefs: Beliefs, mode: int) -> tuple[Tensor, Tensor]:
        """Each member's location and scale of gaps or of whole modalities, (E, B, D)."""
        return mix(self.of(mode), beliefs)


def mix(parameters: dict[str, Tensor], beliefs: Beliefs) -> tuple[Tensor, Tensor]:
    """The formulas above: parameters by name -> location and scale, (E, B, D)."""
    p = parameters
    weight_EM1D = p["weight"][:, :, None, None] + p["delta"][:, :, None]
    location_EBD = (weight_EM1D.transpose(0, 1) * beliefs.location_MEBD).sum(0) + p["offset"][:, None]
    level_E1D = p["level"][:, None]
    log_scale_EBD = (
        level_E1D
        + (p["kappa"][:, None, None] + p["tilt"][:, None]) * (beliefs.log_scale_EBD - level_E1D)
        + p["shift"][:, None]
        + p["gamma"][:, None, None] * beliefs.disagreement_EBD
        + (p["eta"][:, None] * (beliefs.others_B - p["usual"][:, None]))[..., None]
    )
    return location_EBD, log_scale_EBD.clamp(*LOG_SCALE).exp()


def variance(t: Tensor) -> Tensor:
    """About the mean over the first dimension; torch's own warns of empty batches."""
    return (t - t.mean(0)).square().mean(0)


def pooled(location_EBD: Tensor, scale_EBD: Tensor) -> tuple[Tensor, Tensor]:
    """The ensemble's location and scale, (B, D).

    The scales were fitted to the errors of single members. The mean of members errs less by exactly their variance about
    it (Krogh & Vedelsby 1995, eq. 5).
    """
    spread_BD = variance(location_EBD)
    variance_BD = scale_EBD.square().mean(0)
    return location_EBD.mean(0), torch.maximum(variance_BD - spread_BD, 0.25 * variance_BD).sqrt()


def drawn_around(location_EBD: Tensor, scale_BD: Tensor) -> tuple[Tensor, Tensor]:
    """How far from the ensemble's location each member's draws lie, (E, B, D), and their deviation there, (B, D).

    Draws are to differ as they would between models of other samples of people (Rubin 1987, sec. 4.2: proper imputation). Members that
    leave out one group of E each differ by 1 / sqrt(E - 1) of that (delete-a-group jackknife: Kott 2001). Both parts together have the
    ensemble's variance; of it, MOST_BETWEEN is the most that lies between members.
    """
    around_EBD = location_EBD - location_EBD.mean(0)
    between_BD = variance(location_EBD).clamp_min(1e-12)
    share_BD = ((len(location_EBD) - 1) * between_BD / scale_BD.square()).clamp(max=MOST_BETWEEN)
    return around_EBD * scale_BD * (share_BD / between_BD).sqrt(), scale_BD * (1 - share_BD).sqrt()


def original(location: Tensor, scale: Tensor, number_D: Tensor, standardise: Standardise) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation in original units: of the transformed Gaussian, or of a Bernoulli."""
    mean, std = standardise.moments(location[None], scale[None])
    chance = torch.sigmoid(location)
    return torch.where(number_D, mean, chance), torch.where(number_D, std, (chance * (1 - chance)).sqrt())


def crps(y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Of a Gaussian (Gneiting & Raftery 2007, eq. 21)."""
    return mean_absolute(y - mean, std) - MARGINAL_CRPS * std


@dataclass(frozen=True)
class Target:
    """The truth about one modality of some records, and what is scored of it."""

    x_ND: Tensor  # original units
    z_ND: Tensor  # standardised
    scored_ND: Tensor  # bool
    fold_N: Tensor
    number_D: Tensor
    standardise: Standardise

    @cached_property
    def marginal_D(self) -> Tensor:
        """The score of the records' own marginal; of those that do not live, 1."""
        mean_D, std_D = self._moments_D
        numbers_ND = crps(self.x_ND.double(), mean_D, std_D.clamp_min(TINY)) * self.scored_ND
        chance_D = mean_D.clamp(1e-4, 1 - 1e-4)
        codes_D = fn.binary_cross_entropy(chance_D, chance_D, reduction="none")
        found_D = torch.where(self.number_D, numbers_ND.sum(0) / self.scored_ND.sum(0).clamp_min(1), codes_D)
        return torch.where(self.live_D, found_D, 1.0).float()

    @cached_property
    def _moments_D(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of what is scored, in double precision: squares of large values are beyond single."""
        count_D, x_ND = self.scored_ND.sum(0).clamp_min(1), self.x_ND.double()
        mean_D = (x_ND * self.scored_ND).sum(0) / count_D
        return mean_D, (((x_ND - mean_D) * self.scored_ND).square().sum(0) / count_D).sqrt()

    @cached_property
    def live_D(self) -> Tensor:
        """Features that vary, in whatever unit, and are scored often enough to be judged."""
        mean_D, std_D = self._moments_D
        return (std_D > 1e-6 * mean_D.abs().clamp_min(TINY)) & (self.scored_ND.sum(0) >= 10)

    @cached_property
    def least_std_D(self) -> Tensor:
        """A deviation too small to be meant, in the features' units."""
        return (1e-6 * self._moments_D[1]).clamp_min(TINY).float()

    def rows(self, rows: Tensor) -> "Target":
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in ("x_ND", "z_ND", "scored_ND", "fold_N")})

    def part(self, features: Tensor) -> "Target":
        columns = (t[..., features] for t in (self.x_ND, self.z_ND, self.scored_ND))
        return Target(*columns, self.fold_N, self.number_D[features], self.standardise.part(features))

    def score(self, location_END: Tensor, scale_END: Tensor) -> Tensor:
        """The scoring rule per value, relative to that of the marginal, (E, N, D)."""
        mean, std = original(location_END, scale_END, self.number_D, self.standardise)
        numbers = crps(self.x_ND, mean, torch.maximum(std, self.least_std_D))
        codes = fn.binary_cross_entropy_with_logits(location_END, self.x_ND.clamp(0, 1).expand_as(location_END), reduction="none")
        return torch.where(self.number_D, numbers, codes)


def fit(stack: ModalityStack, mode: int, beliefs: Beliefs, target: Target, generative: bool = False) -> None:
    """Fits the stacks of all members for one kind of missingness to out-of-fold beliefs (M, 1, N, D).

    Minimises the scoring rule, mean over features, plus penalties that fade with the number of records: L-BFGS from equal
    weights. Member e's stack sees no record of fold e, unless there is one member only. The common weights of a wide
    modality come from SAMPLE of its features; what the others have of their own is found beside these, SAMPLE at a time.

    generative: weights are drawn to the VAE alone, not to equal ones. Out of fold there is one member's, and its own errors, which are the
    mean of five in use, cost it weight.
    """
    members = len(stack.kappa_EG)
    for e in range(members):
        rows = (target.fold_N != e if members > 1 else target.fold_N >= 0).nonzero().squeeze(1)
        first = {name: t[e : e + 1].clone() for name, t in stack.of(mode).items()}
        last = _fit_member(first, _prior(generative, len(rows)), beliefs.rows(rows), target.rows(rows))
        for name, t in stack.named_buffers():
            t[e : e + 1, mode] = last[name.rsplit("_", 1)[0]]


def _fit_member(parameters: dict[str, Tensor], prior: tuple[Tensor, float], beliefs: Beliefs, target: Target) -> dict[str, Tensor]:
    """One member's parameters (E = 1) from the records that it may see."""
    width = len(target.live_D)
    scored_END = (target.scored_ND & target.live_D)[None]
    count_ED = scored_END.sum(1).clamp_min(1)
    live = target.live_D.nonzero().squeeze(1)
    if not len(live):
        return parameters
    parameters["alone"] = _alone(beliefs, target, scored_END, count_ED)
    parameters["usual"] = beliefs.others_B.mean()[None]
    parameters["level"] = (beliefs.log_scale_EBD * scored_END).sum(1) / count_ED
    first = live[torch.linspace(0, len(live) - 1, min(SAMPLE, len(live))).long()] if width > WIDE else live

    def minimise(names: Sequence[str], features: Tensor, typical_E1: Tensor | None = None) -> None:
        some = {name: t if name in (*COMMON, "usual") else t[..., features] for name, t in parameters.items()}
        judged = beliefs.part(features), target.part(features), scored_END[..., features]
        for name, t in _least(some, names, prior, *judged, typical_E1).items():
            if name in COMMON:
                parameters[name] = t
            else:
                parameters[name][..., features] = t

    minimise((*COMMON, *OWN), first)
    typical_E1 = parameters["shift"][..., first].mean(-1, keepdim=True)
    for part in live[~torch.isin(live, first)].split(SAMPLE):
        if len(part):
            parameters["shift"][..., part] = typical_E1
            minimise(OWN, part, typical_E1)
    return parameters


def _prior(generative: bool, records: int) -> tuple[Tensor, float]:
    """Weights to which the fitted ones are drawn, (M,), and how strongly."""
    if not generative:
        return torch.full((len(EXPERTS),), 1 / len(EXPERTS)), COMMON_PENALTY
    return torch.tensor([float(name == "vae") for name in EXPERTS]), VAE_PENALTY / max(1, records)


def _least(
    parameters: dict[str, Tensor],
    names: Sequence[str],
    prior: tuple[Tensor, float],
    beliefs: Beliefs,
    target: Target,
    scored_END: Tensor,
    typical_E1: Tensor | None,
) -> dict[str, Tensor]:
    """The named parameters of the least penalised score. prior: of the weights; typical: shift to which those of features are drawn, None:
    their mean, and the common parameters are found, too."""
    least, best = math.inf, {name: parameters[name] for name in names}
    free = {name: t.clone().requires_grad_() for name, t in best.items()}
    p = parameters | free
    steps = STEPS if typical_E1 is None else OWN_STEPS
    optimiser = torch.optim.LBFGS(list(free.values()), max_iter=steps, tolerance_change=ENOUGH, line_search_fn="strong_wolfe")
    count_ED, features = scored_END.sum(1).clamp_min(1), scored_END.shape[2]
    share_ED = 1 / count_ED / target.marginal_D / features

    def loss() -> Tensor:
        nonlocal least, best
        optimiser.zero_grad()
        score_END = target.score(*mix(p, beliefs))
        value = ((score_END * scored_END).sum(1) * share_ED).sum()
        apart_ED = p["shift"] - (p["shift"].mean(1, keepdim=True) if typical_E1 is None else typical_E1)
        own_ED = p["delta"].square().sum(1) + 0.25 * (p["offset"].square() + p["tilt"].square() + apart_ED.square())
        value = value + (PENALTY / count_ED / features * own_ED).sum()
        common = (p["kappa"] - 1).square().sum() + p["gamma"].square().sum()
        value = value + COMMON_PENALTY * common + ETA_PENALTY / len(beliefs.others_B) * p["eta"].square().sum()
        value = value + prior[1] * (p["weight"] - prior[0]).square().sum()
        value.backward()
        if value.item() < least:  # at the optimum, in float32, the line search may step to NaN
            least, best = value.item(), {name: t.detach().clone() for name, t in free.items()}
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return best


def _alone(beliefs: Beliefs, target: Target, scored_END: Tensor, count_ED: Tensor) -> Tensor:
    """Each expert's own error, (1, M, D)."""
    error_MND = (target.z_ND - beliefs.location_MEBD[:, 0]).square() * scored_END
    return (error_MND.sum(1) / count_ED).sqrt().clamp_min(1e-3)[None]


class Stack(nn.Module):
    """One `ModalityStack` per modality; an image, a signal or a text, which only the VAE knows, has an empty one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.modalities = nn.ModuleList(ModalityStack(config.members, 0 if m.structured else m.width) for m in config.modalities)


LEVELS = (0.5, 0.8, 0.9, 0.95)  # coverage of the intervals that are kept
LEAST_VALUES = 200  # of a group of its own
GROUPS = ("gap", "few others observed", "most others observed")


class Conformal(nn.Module):
    """Quantiles of (value - mean) / std on out-of-fold records, per modality and group of missingness patterns.

    Split conformal prediction with the normalised residual as the score (Lei et al. 2018, sec. 5.2), cross-fitted
    (Vovk 2015): the rank is ceil((n + 1) (1 - alpha / 2)), so that n exchangeable values give finite-sample coverage.
    Residuals are those of numbers: real features, counts and levels.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = (config.members, len(config.modalities), len(GROUPS), len(LEVELS), 2)
        gaussian_L = torch.special.ndtri(0.5 + torch.tensor(LEVELS) / 2)  # until there are residuals
        self.register_buffer("quantile_EKGL2", torch.stack([-gaussian_L, gaussian_L], -1).expand(size).clone())
        self.register_buffer("many_K", torch.zeros(len(config.modalities)))  # other modalities observed from which it is "most"

    def group(self, j: int, observed: Sequence[Tensor]) -> Tensor:
        """Which group each record belongs to as far as modality j is concerned, (B,)."""
        present_BK = torch.stack([o.any(1) for o in observed], 1)
        others_B = present_BK.sum(1) - present_BK[:, j].long()
        return torch.where(present_BK[:, j], 0, 1 + (others_B >= self.many_K[j]).long())

    def bounds(self, j: int, level: float, mean_BD: Tensor, std_BD: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
        quantile_G2 = self.quantile_EKGL2[:, j, :, LEVELS.index(level)].mean(0)
        low_B1, high_B1 = quantile_G2[group_B].split(1, -1)
        return mean_BD + low_B1 * std_BD, mean_BD + high_B1 * std_BD

    @torch.no_grad()
    def fit(self, j: int, residual: Tensor, group: Tensor, fold: Tensor) -> None:
        """residual, group and fold of each out-of-fold value, flat. A group of few values takes the quantiles of all."""
        members = len(self.quantile_EKGL2)
        for e in range(members):
            kept = (fold != e) if members > 1 else torch.ones_like(fold, dtype=torch.bool)
            for g in range(len(GROUPS)):
                own = residual[kept & (group == g)]
                chosen = own if len(own) >= LEAST_VALUES else residual[kept]
                if len(chosen):
                    self.quantile_EKGL2[e, j, g] = torch.stack([conformal_quantiles(chosen, level) for level in LEVELS])


def conformal_quantiles(residual: Tensor, level: float) -> Tensor:
    """The lower and the upper quantile of finite-sample validity, (2,).

    Where the values are too few to have that rank: the outermost of them, and at least the Gaussian's.
    """
    n, ordered = len(residual), residual.sort().values
    rank = math.ceil((n + 1) * (0.5 + level / 2))
    if rank > n:
        far = torch.special.ndtri(residual.new_tensor(0.5 + level / 2))
        return torch.stack([torch.minimum(ordered[0], -far), torch.maximum(ordered[-1], far)])
    return torch.stack([ordered[n - rank], ordered[rank - 1]])
