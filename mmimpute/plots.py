"""Plots of a model and of what it says, as matplotlib figures: those of the report, for notebooks and scripts.

Each function returns a figure and shows nothing; pyplot is not used, so none has to be closed. As in the report, groups of fewer than
ten people are left out and counts are rounded to ten, so that a figure may be shown to whom the records may not. In a notebook
`%matplotlib inline` makes a figure visible that is a cell's last value.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mmimpute.card import levels
from mmimpute.data.profile import SMALLEST_GROUP
from mmimpute.errors import UserError
from mmimpute.estimator import MultiModalImputer
from mmimpute.report import disclosure, figures

MOST_PATTERNS = 20
TRAINING = {
    "loss": ("Error on hidden values", "share of the column mean's"),
    "impute": ("Imputation of hidden modalities", "nats per record"),
    "elbo": ("Evidence lower bound", "nats per record"),
}


def missingness(imputer: MultiModalImputer, X: Any) -> Figure:
    """Which modalities the rows of X have together, the most frequent patterns first. imputer: fitted; X: as for its `transform`."""
    records = imputer.records(X)
    names, present_NK = list(records), np.stack([~np.isnan(x).all(1) for x in records.values()], 1)
    counts = Counter(tuple(n for n, p in zip(names, row, strict=True) if p) for row in present_NK)
    found = {"rows": len(present_NK), "patterns": [{"present": list(p), "rows": n} for p, n in counts.items()]}
    shown = disclosure.view({"profile": found})["profile"]["patterns"]["shown"]
    return figures.patterns(shown[:MOST_PATTERNS], names)


def training(history: Sequence[Mapping[str, float]], term: str = "loss") -> Figure:
    """A curve of training by epoch. history: `history_` of an imputer, or `history.json` beside a model that `mmimpute fit` wrote.

    term: "loss" (error on hidden values of people whom the member judged does not learn from; 1 = the column mean; what training stops
    by), "impute" or "elbo" (the two terms of the objective; larger is better). Raises UserError for another.
    """
    if term not in TRAINING:
        raise UserError(f"no term {term!r} of training; valid: {', '.join(TRAINING)}")
    shown = disclosure.view({"history": [_epoch(epoch) for epoch in history]})["history"]
    return figures.training(shown, term, *TRAINING[term])


def _epoch(epoch: Mapping[str, float]) -> dict[str, float]:
    """As a cluster's fit writes it: epochs from 1, and tune_... of what was not learnt from, which is all that a fit in memory measures."""
    if "tune_loss" in epoch:
        return dict(epoch)
    return {"epoch": epoch["epoch"] + 1} | {f"tune_{term}": epoch[term] for term in TRAINING}


def skill(evaluation: Mapping[str, Any], modality: str | None = None) -> Figure:
    """Skill by modality, or by feature of one: 0 is the column mean, 1 perfect.

    evaluation: of an imputer's `evaluate`, or what `mmimpute evaluate --json` wrote. Raises UserError for an unknown modality.
    """
    if modality is None:
        return figures.skill(disclosure.view({"evaluation": evaluation})["evaluation"]["modalities"], "Skill by modality")
    return figures.skill(_evaluated(evaluation, modality)["features"], f"{modality}: skill by feature")


def calibration(evaluation: Mapping[str, Any], modality: str) -> Figure:
    """Whether a modality's stated uncertainty is right: coverage of intervals and quantiles of the truth (numbers), reliability
    (binary features). evaluation: as for `skill`. Raises UserError where there is none: unknown, or too few people.
    """
    found = _evaluated(evaluation, modality)
    if not any(found[panel] for panel in ("calibration", "pit", "reliability")):
        raise UserError(f"modality {modality!r}: no calibration; too few people hold it, or it has neither numbers nor binary features")
    return figures.calibration(found)


def imputed_and_observed(evaluation: Mapping[str, Any], modality: str, feature: str) -> Figure:
    """The distribution of a feature's observed values, and of one draw for the same people with the modality hidden.

    evaluation: as for `skill`. Raises UserError where it has no distribution of this feature; it has those of the first twelve.
    """
    found = {d["name"]: d for d in _evaluated(evaluation, modality)["distributions"]}
    if feature not in found:
        raise UserError(f"no distribution of {feature!r} in modality {modality!r}; there are {', '.join(found) or 'none'}")
    return figures.distribution(found[feature])


def latent(imputer: MultiModalImputer, X: Any, label: Sequence[Any] | None = None) -> Figure:
    """A map of the people of X: the first two principal components of z0, the shared latent.

    A dot stands for 10 to 19 near people of the same label (their mean place), never for one.
    label: N values, such as a column of X, by which dots are coloured; numbers with more than eight different values are cut at their
    quartiles. Who has no label, or one of a small group, is left out.
    """
    z0_NL = imputer.embed(X)
    found = {"people": np.full(len(z0_NL), True)} if label is None else levels(_texts(label))
    found = {name: rows for name, rows in found.items() if rows.sum() >= SMALLEST_GROUP}
    if not found:
        raise UserError(f"no group of {SMALLEST_GROUP} people or more to show")
    kept = np.logical_or.reduce(list(found.values()))
    places_N2, shares = _components(z0_NL, kept)
    dots = {f"{name} ({disclosure.people(rows.sum()):,})": _dots(places_N2[rows]) for name, rows in found.items()}
    return figures.latent(dots, shares, "Map of z0, each dot 10 to 19 people")


def _evaluated(evaluation: Mapping[str, Any], modality: str) -> dict[str, Any]:
    """What may be shown of one modality."""
    found: dict[str, dict[str, Any]] = {m["name"]: m for m in disclosure.view({"evaluation": evaluation})["evaluation"]["modalities"]}
    if modality not in found:
        raise UserError(f"no modality {modality!r} in this evaluation; it has {', '.join(found)}")
    return found[modality]


def _texts(label: Sequence[Any]) -> np.ndarray:
    """Labels as text, "" where there is none."""
    values = np.array(list(label), object)
    return np.where(pd.isna(values), "", values.astype(str))


def _components(z0_NL: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Scores of the first two principal components of the people kept, N x 2, and the shares of variance."""
    mean = z0_NL[kept].mean(0)
    _, scale, axes = np.linalg.svd(z0_NL[kept] - mean, full_matrices=False)
    shares = scale**2 / max(float((scale**2).sum()), 1e-12)
    return (z0_NL - mean) @ axes[:2].T, (float(shares[0]), float(shares[1]))


def _dots(places_M2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean place and number of the people of each part, halved at the median of its wider axis while both halves are large enough."""
    parts, done = [places_M2], []
    while parts:
        part = parts.pop()
        if len(part) < 2 * SMALLEST_GROUP:
            done.append(part)
            continue
        ordered = part[np.argsort(part[:, np.ptp(part, axis=0).argmax()])]
        parts += [ordered[: len(part) // 2], ordered[len(part) // 2 :]]
    return np.array([part.mean(0) for part in done]), np.array([len(part) for part in done])
