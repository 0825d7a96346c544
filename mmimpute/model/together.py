"""The terms of several modalities' likelihoods, in operations that they share.

A training step is thousands of operations on few numbers, each of which costs microseconds however few they are. So the real features
of all modalities, which differ in records and features, are laid end to end for what is done to every number alike.

Shape suffixes: E members, S draws, B records (of each modality its own), D features, F real ones.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmimpute.model.likelihoods import (
    MARGINAL_CRPS,
    Heads,
    Likelihoods,
    freedom,
    gaussian_log_prob,
    moment_crps,
    student_log_prob_of,
    student_terms,
)
from mmimpute.model.text import Bag


class Told(NamedTuple):
    """What the decoder says of one modality of some records, and the truth."""

    likelihood: Likelihoods | Bag
    heads: Heads  # leading E, or S and E
    target_BD: Tensor
    seen_BD: Tensor


def together(function: Callable, columns: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """function, elementwise in the last dimension, of each of the arguments (..., B, F) in `columns`."""
    if not columns:
        return []
    shapes = [c[0].shape[-2:] for c in columns]
    flat = [torch.cat([t.flatten(-2) for t in arguments], -1) for arguments in zip(*columns, strict=True)]
    found = function(*flat).split([math.prod(shape) for shape in shapes], -1)
    return [t.unflatten(-1, shape) for t, shape in zip(found, shapes, strict=True)]


def log_probs(told: Sequence[Told]) -> list[Tensor]:
    """Log-likelihood of every value, (..., B, D)."""
    real = [i for i, t in enumerate(told) if "real" in t.heads]
    student = [i for i in real if told[i].likelihood.student]
    gaussian = [i for i in real if not told[i].likelihood.student]
    columns = [(*_real(told[i]), *terms) for i, terms in zip(student, _student_terms([told[i] for i in student]), strict=True)]
    found = together(student_log_prob_of, columns) + together(gaussian_log_prob, [_real(told[i]) for i in gaussian])
    known = dict(zip(student + gaussian, found, strict=True))
    return [t.likelihood.log_prob(t.heads, t.target_BD, *_given(known, i)) for i, t in enumerate(told)]


def _real(told: Told) -> tuple[Tensor, Tensor, Tensor]:
    """Truth, mean and log sd of the real features."""
    return told.likelihood.of_kind(told.target_BD, "real"), *told.heads["real"].unbind(-1)


def _student_terms(told: Sequence[Told]) -> list[tuple[Tensor, ...]]:
    """`likelihoods.student_terms` of every real value, (E, B, F) each."""
    if not told:
        return []
    tails = [t.likelihood.tail_E1F for t in told]
    each = [t.split([tail.shape[-1] for tail in tails], -1) for t in student_terms(freedom(torch.cat(tails, -1)))]
    return [tuple(t.expand(-1, len(one.target_BD), -1) for t in terms) for one, *terms in zip(told, *each, strict=True)]


def _given(known: dict[int, Tensor], i: int) -> tuple[Tensor, ...]:
    return (known[i],) if i in known else ()


def scores(told: Sequence[Told], pair_weight: float = 0.0, generator: torch.Generator | None = None) -> list[Tensor]:
    """Score of each record, mean over its values, (E, B): see `Likelihoods.score`. Plus pair_weight times the CRPS of sums or differences
    of random pairs of real features, but not of images, signals and texts, of which L_elbo tells that more cheaply.

    The score of single features says nothing of their dependence; a score of all their pairwise sums and differences is proper for the
    covariances as well (a sliced energy score, closed form given the draws).
    """
    singles = [i for i, t in enumerate(told) if "real" in t.heads]
    paired = [i for i in singles if pair_weight and told[i].likelihood.pairs]
    pairs = [_pairs(told[i], generator) for i in paired]
    columns = [_of_score(told[i]) for i in singles] + [p[:3] for p in pairs]
    crps = together(moment_crps, columns)
    known, of_pairs = dict(zip(singles, crps, strict=False)), crps[len(singles) :]
    found = []
    for i, t in enumerate(told):
        score_EBD = t.likelihood.score(t.heads, t.target_BD, *_given(known, i))
        found.append((score_EBD * t.seen_BD).sum(-1) / t.seen_BD.sum(-1).clamp_min(1))
    for i, crps_EBF, (*_, seen_BF) in zip(paired, of_pairs, pairs, strict=True):
        mean_EB = (crps_EBF * seen_BF).sum(-1) / seen_BF.sum(-1).clamp_min(1)
        found[i] = found[i] + pair_weight / (math.sqrt(2) * MARGINAL_CRPS) * mean_EB
    return found


def _of_score(told: Told) -> tuple[Tensor, Tensor, Tensor]:
    x, mean, log_sd = _real(told)
    return x, mean, log_sd.exp()


def _pairs(told: Told, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Truth, means and deviations of sums or differences of random pairs of real features, and whether both are seen."""
    of_kind, device = told.likelihood.of_kind, told.target_BD.device
    count = told.heads["real"].shape[-2]
    order = torch.randperm(count, generator=generator, device=device)
    sign_F = 2.0 * torch.randint(0, 2, (count,), generator=generator, device=device) - 1
    paired = lambda t: ((shuffled := t.index_select(-1, order)), shuffled.roll(1, -1))  # noqa: E731
    first, second = paired(of_kind(told.target_BD, "real"))
    mean, log_sd = told.heads["real"].unbind(-1)
    mean_first, mean_second = paired(mean)
    seen_BF = torch.logical_and(*paired(of_kind(told.seen_BD, "real")))
    return first + sign_F * second, mean_first + sign_F * mean_second, torch.hypot(*paired(log_sd.exp())), seen_BF
