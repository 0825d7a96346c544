"""p(xj | zj, z0): one likelihood per feature, by kind, vectorised per kind.

Real features are Student-t with learned degrees of freedom per member and feature, or Gaussian (`tails = "gaussian"`). The
decoder's deviation stays the standard deviation, so `moments`, `score` and `location_scale` are the same for both: the
tails are in `log_prob` and `sample`. Student-t is the default because lab values have outliers that a draw should have
too, and it costs no accuracy. Gaussian -> Student-t on nhanes 0.0 (seed 0): skill .2574 -> .2573; log score of hidden real
values -1.052 -> -1.037 nats, of glyco -0.774 -> -0.719; more than 5 robust deviations from the middle of their draws
lie 0.3% of chem's and 0.8 to 1.0% of glyco's values, and of the draws 0.02% -> 0.09% and 0.05% -> 0.22%.

Targets are what a likelihood is asked about: standardised values of real features, and the values themselves
(0/1, counts, level indices) of the other kinds.

Shape suffixes: E members, B records, D features, S draws, F features of one kind, M levels, P decoder outputs.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from mmimpute.model.config import KINDS, ModalityConfig
from mmimpute.model.standardise import Standardise

LOG_SD = (-4.0, 2.0)
FREEDOM = (2.1, 200.0)  # degrees of freedom: more than 2 for a variance to exist, at the upper end as good as Gaussian
FIRST_FREEDOM = 30.0
TAIL_PACE = 20.0  # Adam moves all parameters alike, and tails go a long way; at 10 they had not arrived after 450 steps, 40 gave the same
FAR = 30.0  # a logit that is as good as infinite, with finite gradients
WHITE = 255  # of a pixel
MARGINAL_CRPS = 1 / math.sqrt(math.pi)  # expected CRPS of N(0, 1) about itself
Heads = dict[str, Tensor]  # kind -> (..., F, outputs per feature)


def gaussian_log_prob(x: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
    return -0.5 * ((x - mean) * torch.exp(-log_sd)).square() - log_sd - 0.5 * math.log(2 * math.pi)


def student_log_prob(x: Tensor, mean: Tensor, log_sd: Tensor, freedom: Tensor) -> Tensor:
    """Student-t with standard deviation exp(log_sd), so scale^2 = sd^2 (freedom - 2) / freedom; freedom > 2."""
    return student_log_prob_of(x, mean, log_sd, *student_terms(freedom))


def student_terms(freedom: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What in the density depends on the degrees of freedom alone: constant, spread and power of `student_log_prob_of`."""
    constant = torch.lgamma((freedom + 1) / 2) - torch.lgamma(freedom / 2) - 0.5 * torch.log(math.pi * (freedom - 2))
    return constant, freedom - 2, 0.5 * (freedom + 1)


def student_log_prob_of(x: Tensor, mean: Tensor, log_sd: Tensor, constant: Tensor, spread: Tensor, power: Tensor) -> Tensor:
    """`student_log_prob` by its `student_terms`, which are few numbers where x are many."""
    square = ((x - mean) * torch.exp(-log_sd)).square() / spread
    return constant - log_sd - power * torch.log1p(square)


def bernoulli_log_prob(x: Tensor, logit: Tensor) -> Tensor:
    return x * logit - fn.softplus(logit)


def negative_binomial_log_prob(x: Tensor, log_mean: Tensor, log_size: Tensor) -> Tensor:
    """Variance = mean + mean^2 / size."""
    size, log_sum = log_size.exp(), torch.logaddexp(log_mean, log_size)
    return torch.lgamma(x + size) - torch.lgamma(size) - torch.lgamma(x + 1) + size * (log_size - log_sum) + x * (log_mean - log_sum)


def ordinal_log_probs(eta: Tensor, cuts: Tensor) -> Tensor:
    """Log-probability of each level; P(x <= m) = sigmoid(cut_m - eta), cuts increasing."""
    edges = cuts - eta.unsqueeze(-1)
    far = torch.full_like(edges[..., :1], FAR)
    upper, lower = torch.cat([edges, far], -1), torch.cat([-far, edges], -1)
    gap = (upper - lower).clamp_min(1e-6)
    return fn.logsigmoid(upper) + fn.logsigmoid(-lower) + torch.log(-torch.expm1(-gap))


def mean_absolute(centre: Tensor, sd: Tensor) -> Tensor:
    """E|N(centre, sd^2)|: by Euler's theorem, since it is homogeneous of degree one, each argument times the derivative by it. So to
    autograd these derivatives are constants."""
    with torch.no_grad():
        ratio = centre / sd
        by_centre = torch.erf(ratio / math.sqrt(2))
        by_sd = math.sqrt(2 / math.pi) * torch.exp(-0.5 * ratio.square())
    return centre * by_centre + sd * by_sd


def moment_crps(x: Tensor, mean_S: Tensor, sd_S: Tensor) -> Tensor:
    """CRPS of the Gaussian with the mixture's mean and variance, which is what `moments` reports.

    The components come from antithetic latents: the second half of the draws mirrors the first. What is odd in the
    latents then cancels from the mean, and its share of the variance is the mean of its squares. Of a single pair
    nothing is known of the rest of the variance.
    """
    first, second = mean_S.chunk(2)
    even, odd = 0.5 * (first + second), 0.5 * (first - second)
    mean = even.mean(0)
    around = (even - mean).square().sum(0) / max(1, even.shape[0] - 1)
    variance = sd_S.square().mean(0) + odd.square().mean(0) + around
    sd = variance.clamp_min(1e-8).sqrt()
    return mean_absolute(x - mean, sd) - MARGINAL_CRPS * sd


def freedom(tail: Tensor) -> Tensor:
    """Degrees of freedom of a Student-t by its parameter."""
    least, most = FREEDOM
    first = math.log((FIRST_FREEDOM - least) / (most - FIRST_FREEDOM))
    return least + (most - least) * torch.sigmoid(first + TAIL_PACE * tail)


class Likelihoods(nn.Module):
    """The likelihoods of one modality's features; `size` decoder outputs, all zero = the training marginal."""

    def __init__(self, config: ModalityConfig, standardise: Standardise, members: int) -> None:
        super().__init__()
        index = {k: [i for i, kind in enumerate(config.kinds) if kind == k] for k in KINDS}
        self.kinds = [k for k in KINDS if index[k]]
        self.levels_F = {k: [config.levels[i] for i in index[k]] for k in ("ordinal", "categorical")}
        self.levels = {k: max(levels, default=0) for k, levels in self.levels_F.items()}
        self.outputs = {"real": 2, "binary": 1, "count": 2, "ordinal": 1, "categorical": self.levels["categorical"]}
        self.counts = {k: len(index[k]) for k in self.kinds}
        self.size = sum(self.counts[k] * self.outputs[k] for k in self.kinds)
        for k in KINDS:
            self.register_buffer(f"{k}_F", torch.tensor(index[k], dtype=torch.long), persistent=False)
        self.register_buffer("whole_D", torch.tensor([k in ("count", "ordinal") for k in config.kinds]), persistent=False)
        order = [i for k in self.kinds for i in index[k]]
        self.register_buffer("inverse_D", torch.argsort(torch.tensor(order)), persistent=False)
        self.student = config.tails == "student" and "real" in self.kinds and not config.structured
        self.pairs = self.counts.get("real", 0) > 1 and not config.structured
        self.image = config.form == "image"
        self.silent = config.convolved and config.decoder == "adversarial"  # see adversarial.py
        if self.student:
            self.tail_E1F = nn.Parameter(torch.zeros(members, 1, self.counts["real"]))
        self._marginals(standardise, members)

    @property
    def freedom_E1F(self) -> Tensor:
        """Degrees of freedom of each member's Student-t, per real feature."""
        return freedom(self.tail_E1F)

    def _marginals(self, standardise: Standardise, members: int) -> None:
        """Offsets that make zero outputs the marginal, and the marginal's score by which each score is divided."""
        mean_D, std_D, unit_D = standardise.mean, standardise.std, standardise.unit
        prevalence_F = mean_D[self.binary_F].clamp(1e-3, 1 - 1e-3)
        self.register_buffer("base_logit_F", torch.logit(prevalence_F))
        level_F = (mean_D[self.count_F] + 0.5 * std_D[self.count_F].square()).clamp(1e-3, 20)
        self.register_buffer("base_log_mean_F", torch.log(torch.expm1(level_F) * unit_D[self.count_F]))
        if "ordinal" in self.kinds:  # parameters without elements would never get a gradient
            self._cut_points(mean_D[self.ordinal_F, None], std_D[self.ordinal_F, None], members)
        levels_F = torch.tensor(self.levels_F["categorical"], dtype=torch.long)
        self.register_buffer("unused_levels_FM", torch.arange(self.levels["categorical"]) >= levels_F[:, None], persistent=False)
        entropy = fn.binary_cross_entropy(prevalence_F, prevalence_F, reduction="none").clamp_min(0.05)
        scale_D = torch.ones_like(mean_D)
        scale_D[self.real_F], scale_D[self.binary_F] = MARGINAL_CRPS, entropy
        scale_D[self.categorical_F] = torch.log(levels_F.float())
        scale_D[self.ordinal_F] = torch.log(torch.tensor(self.levels_F["ordinal"], dtype=torch.float))
        self.register_buffer("marginal_score_D", scale_D)

    def _cut_points(self, mean_F1: Tensor, std_F1: Tensor, members: int) -> None:
        """Trainable cuts, at first those of a logistic of the level's mean and spread."""
        levels_F = torch.tensor(self.levels_F["ordinal"])
        step_M = torch.arange(self.levels["ordinal"] - 1)
        cuts_FM = ((step_M + 0.5 - mean_F1) / (0.55 * std_F1)).clamp(-FAR / 2, FAR / 2)
        # Beyond a feature's last level the cut is out of reach.
        self.register_buffer("unused_cuts_FM", step_M >= levels_F[:, None] - 1, persistent=False)
        self.first_cut_E1F1 = nn.Parameter(cuts_FM[:, :1].repeat(members, 1, 1, 1))
        if cuts_FM.shape[1] > 1:
            gaps_FM = torch.log(torch.expm1(cuts_FM.diff(dim=1).clamp_min(1e-2)))
            self.gaps_E1FM = nn.Parameter(gaps_FM.repeat(members, 1, 1, 1))

    def heads(self, raw: Tensor) -> Heads:
        """Split decoder outputs (..., E, B, P) by kind and turn them into distribution parameters."""
        parts = raw.float().split([self.counts[k] * self.outputs[k] for k in self.kinds], -1)
        heads = {k: p.unflatten(-1, (self.counts[k], self.outputs[k])) for k, p in zip(self.kinds, parts, strict=True)}
        if "real" in heads:
            mean, log_sd = heads["real"].unbind(-1)
            heads["real"] = torch.stack([mean, log_sd.clamp(*LOG_SD)], -1)
        if "binary" in heads:
            heads["binary"] = heads["binary"] + self.base_logit_F[:, None]
        if "count" in heads:
            log_mean, log_size = heads["count"].unbind(-1)
            heads["count"] = torch.stack([(log_mean + self.base_log_mean_F).clamp(-12, 16), log_size.clamp(-6, 8)], -1)
        if "ordinal" in heads:
            heads["ordinal"] = ordinal_log_probs(heads["ordinal"].squeeze(-1), self._cuts())
        if "categorical" in heads:
            heads["categorical"] = heads["categorical"].masked_fill(self.unused_levels_FM, -FAR).log_softmax(-1)
        return heads

    def _cuts(self) -> Tensor:
        cuts_E1FM = self.first_cut_E1F1
        if hasattr(self, "gaps_E1FM"):
            cuts_E1FM = torch.cat([cuts_E1FM, cuts_E1FM + fn.softplus(self.gaps_E1FM).cumsum(-1)], -1)
        return torch.where(self.unused_cuts_FM, cuts_E1FM.detach().clamp_min(2 * FAR), cuts_E1FM)

    def join(self, parts: list[Tensor]) -> Tensor:
        """Values by kind, (..., F) each, in the order of the features."""
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1).index_select(-1, self.inverse_D)

    def of_kind(self, x: Tensor, kind: str) -> Tensor:
        return x if len(self.kinds) == 1 else x.index_select(-1, getattr(self, f"{kind}_F"))

    def log_prob(self, heads: Heads, target_D: Tensor, real: Tensor | None = None) -> Tensor:
        """Log-likelihood per feature, (..., D), of targets that broadcast against the heads. real: of the real ones, if it is known."""
        return self._of_each(self._log_prob, heads, target_D, real)

    def _of_each(self, function: Callable, heads: Heads, target_D: Tensor, real: Tensor | None) -> Tensor:
        """A function of every kind's head and target; real: what it says of the real features, if it is known."""
        known = {} if real is None else {"real": real}
        return self.join([known[k] if k in known else function(k, heads[k], self.of_kind(target_D, k)) for k in self.kinds])

    def _log_prob(self, kind: str, head: Tensor, x: Tensor) -> Tensor:
        if kind == "real":
            return self._real_log_prob(x, head)
        if kind == "binary":
            return bernoulli_log_prob(x, head[..., 0])
        if kind == "count":
            return negative_binomial_log_prob(x, head[..., 0], head[..., 1])
        level = x.long().clamp(0, head.shape[-1] - 1)
        shape = torch.broadcast_shapes(level.shape, head.shape[:-1])
        return head.expand(*shape, head.shape[-1]).gather(-1, level.expand(shape).unsqueeze(-1)).squeeze(-1)

    def _real_log_prob(self, x: Tensor, head: Tensor) -> Tensor:
        if self.student:
            return student_log_prob(x, *head.unbind(-1), self.freedom_E1F)
        return gaussian_log_prob(x, *head.unbind(-1))

    def score(self, heads: Heads, target_BD: Tensor, real: Tensor | None = None) -> Tensor:
        """Score of the mixture over S draws, smaller is better, 1 = as good as the marginal: CRPS of its mean and
        standard deviation for real features, minus the log of its probability for the others. real: that CRPS, if it is known."""
        return self._of_each(self._score, heads, target_BD, real) / self.marginal_score_D

    def _score(self, kind: str, head: Tensor, x: Tensor) -> Tensor:
        if kind == "real":
            return moment_crps(x, head[..., 0], head[..., 1].exp())
        return math.log(len(head)) - self._log_prob(kind, head, x).logsumexp(0)

    def sample(self, heads: Heads, standardise: Standardise, generator: torch.Generator | None = None) -> Tensor:
        """One draw per entry of the heads, in original units."""
        parts = []
        for kind in self.kinds:
            head = heads[kind]
            if kind == "real":
                parts.append(head[..., 0] + head[..., 1].exp() * self.noise(head[..., 0], generator))
            elif kind == "binary":
                chance = torch.rand(head.shape[:-1], generator=generator, device=head.device)
                parts.append((chance < torch.sigmoid(head[..., 0])).float())
            elif kind == "count":
                parts.append(self.counts_of(head, generator))
            else:
                level = torch.multinomial(head.exp().flatten(0, -2), 1, generator=generator)
                parts.append(level.view(head.shape[:-1]).float())
        return self._original(self.join(parts), standardise)

    def counts_of(self, head: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draws of the count features."""
        rate = torch._standard_gamma(head[..., 1].exp(), generator=generator)
        return torch.poisson(rate * torch.exp(head[..., 0] - head[..., 1]), generator=generator)

    def noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Of variance 1, with the tails of the real features; none of images and signals that a discriminator judges."""
        if self.silent:
            return torch.zeros_like(like)
        noise = torch.randn(like.shape, generator=generator, device=like.device)
        if not self.student:
            return noise
        own = self.freedom_E1F.expand_as(like)
        return noise * ((own - 2) / (2 * torch._standard_gamma(own / 2, generator=generator))).sqrt()

    def _original(self, target: Tensor, standardise: Standardise) -> Tensor:
        if "real" not in self.kinds:
            return target
        if self.image:
            return standardise.inverse(target).round().clamp(0, WHITE)
        restored = standardise.inverse(target)
        if len(self.kinds) == 1:
            return restored
        return target.index_copy(-1, self.real_F, restored.index_select(-1, self.real_F))

    def moments(self, heads: Heads, standardise: Standardise) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the mixture over the leading S and E, (B, D) in original units. A categorical
        feature has its mode as `mean` and sqrt(1 - sum p^2) as `std`."""
        found = [self._moments(kind, heads[kind].flatten(0, 1), standardise) for kind in self.kinds]
        mean, std = (self.join(list(parts)) for parts in zip(*found, strict=True))
        return mean.clamp(0, WHITE) if self.image else mean, std

    def _moments(self, kind: str, head: Tensor, standardise: Standardise) -> tuple[Tensor, Tensor]:
        if kind == "real":
            return self._real_moments(head, standardise)
        if kind == "binary":
            mean = torch.sigmoid(head[..., 0]).mean(0)
            return mean, (mean * (1 - mean)).sqrt()
        if kind == "count":
            rate = head[..., 0].exp()
            mean = rate.mean(0)
            return mean, (rate + rate.square() * (-head[..., 1]).exp() + (rate - mean).square()).mean(0).sqrt()
        chance = head.exp().mean(0)
        if kind == "categorical":
            return chance.argmax(-1).float(), (1 - chance.square().sum(-1)).clamp_min(0).sqrt()
        level = torch.arange(chance.shape[-1], device=chance.device, dtype=chance.dtype)
        mean = (chance * level).sum(-1)
        return mean, (chance * (level - mean.unsqueeze(-1)).square()).sum(-1).sqrt()

    def location_scale(self, heads: Heads, standardise: Standardise) -> tuple[Tensor, Tensor]:
        """Each member's mixture over S on the scale on which experts are mixed, (E, B, D): mean and standard deviation of
        standardised numbers, logit of binary features (scale 1). Categorical ones, which no other expert predicts: 0, 1."""
        found = [self._location_scale(kind, heads[kind], standardise) for kind in self.kinds]
        location, scale = (self.join(list(parts)) for parts in zip(*found, strict=True))
        if not self.whole_D.any():
            return location, scale
        whole = standardise.of_moments(location, scale)
        least = math.exp(LOG_SD[0])  # real features' least, too
        return torch.where(self.whole_D, whole[0], location), torch.where(self.whole_D, whole[1].clamp_min(least), scale)

    def _location_scale(self, kind: str, head: Tensor, standardise: Standardise) -> tuple[Tensor, Tensor]:
        """Of counts and ordinal levels in original units."""
        if kind in ("count", "ordinal"):
            return self._moments(kind, head, standardise)
        location, scale = torch.zeros_like(head[0, ..., 0]), torch.ones_like(head[0, ..., 0])
        if kind == "real":
            location = head[..., 0].mean(0)
            scale = (head[..., 1].exp().square() + (head[..., 0] - location).square()).mean(0).sqrt()
        elif kind == "binary":
            location = torch.logit(torch.sigmoid(head[..., 0]).mean(0), 1e-6)
        return location, scale

    def _real_moments(self, head: Tensor, standardise: Standardise) -> tuple[Tensor, Tensor]:
        mean_SBF, sd_SBF = head[..., 0], head[..., 1].exp()
        if len(self.kinds) == 1:
            return standardise.moments(mean_SBF, sd_SBF)
        shape = (*mean_SBF.shape[:-1], standardise.mean.shape[0])
        full = [mean_SBF.new_zeros(shape).index_copy(-1, self.real_F, t) for t in (mean_SBF, sd_SBF)]
        return tuple(m.index_select(-1, self.real_F) for m in standardise.moments(*full))
