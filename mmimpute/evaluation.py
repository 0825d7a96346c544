"""How good the imputations are: every modality hidden in turn, against the column mean.

A record is imputed by the one member of the model that does not learn from its fold, and by that member's own stack: what
is measured is what new people would get, a little less than the members give together.

Skill = 1 - loss / loss of the training marginal; loss = CRPS of Gaussian(mean, std) for numbers, log-loss for binary
and categorical features. 0 = no better than ignoring the record, 1 = perfect.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtr
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from mmimpute.data.profile import SMALLEST_GROUP, varies
from mmimpute.data.schema import Modality
from mmimpute.data.tensors import to_model
from mmimpute.model.imputer import Imputer
from mmimpute.model.text import TOLD
from mmimpute.registry import Model

INTERVAL = 0.9
NOMINAL = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
MOST_CELLS = 20_000_000  # records x features in memory
MOST_RECORDS = 10_000
CLIP = 1e-4


def most_records(width: int) -> int:
    """How many records an evaluation holds in memory; beyond some thousands the error bars no longer shrink visibly."""
    return min(MOST_RECORDS, max(500, MOST_CELLS // width))


def crps(y: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of Gaussian(mean, std) at y, in y's units (Gneiting & Raftery 2007, eq. 21)."""
    z = (y - mean) / std
    return std * (z * (2 * ndtr(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))


def log_loss(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    p = np.clip(p, CLIP, 1 - CLIP)
    return -(y * np.log(p) + (1 - y) * np.log1p(-p))


@dataclass(frozen=True)
class Hidden:
    """What is said of one modality that was hidden, n x D each; experts: name -> (mean, std)."""

    mean: np.ndarray
    std: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    drawn: np.ndarray
    experts: dict[str, tuple[np.ndarray, np.ndarray]]


def evaluate(model: Model, x: np.ndarray, folds: np.ndarray, marginals: dict) -> dict:
    """Accuracy and calibration on records x, n x width, NaN where not observed; folds: the member to ask about each.

    Per modality: the records that hold it and something else, with the whole modality hidden. marginals: mean and std
    of the training data's columns (see `profile.marginals`). Modalities seen in fewer than SMALLEST_GROUP records are left out.
    """
    found = {}
    for turn in turns(model, x, folds):
        said = _joined([_ask(member, part, model.widths, turn.at) for member, part in turn.parts])
        m0, s0 = (np.array(marginals[turn.modality.name][name]) for name in ("mean", "std"))
        found[turn.modality.name] = _score(turn.modality, turn.truth, said, m0, s0)
    return {"rows": len(x), "modalities": found}


@dataclass(frozen=True)
class Turn:
    """One modality hidden. at: which; rows: the records that hold it and something else, by fold; truth: what was hidden, n x D.

    parts: each member with the records, of that order, that it is asked about.
    """

    modality: Modality
    at: int
    rows: np.ndarray
    truth: np.ndarray
    parts: list[tuple[Imputer, np.ndarray]]


def turns(model: Model, x: np.ndarray, folds: np.ndarray) -> Iterator[Turn]:
    """Every imputed modality in turn, but for those seen in fewer than SMALLEST_GROUP records. As in `evaluate`."""
    members = [model.module.member(e) for e in range(model.module.config.members)]
    starts = np.cumsum([0, *model.widths])
    for at, modality in enumerate(model.schema.modalities):
        own = slice(starts[at], starts[at + 1])
        others = np.delete(x, np.arange(own.start, own.stop), axis=1)
        rows = ~np.isnan(x[:, own]).all(1) & ~np.isnan(others).all(1)
        if modality.impute and rows.sum() >= SMALLEST_GROUP:
            order = [np.flatnonzero(rows & (folds == e)) for e in range(len(members))]
            hidden = x[np.concatenate(order)]
            truth = hidden[:, own].copy()
            hidden[:, own] = np.nan
            parts = np.split(hidden, np.cumsum([len(o) for o in order])[:-1])
            asked = [(member, part) for member, part in zip(members, parts, strict=True) if len(part)]
            yield Turn(modality, at, np.concatenate(order), truth, asked)


def _ask(member: Imputer, x: np.ndarray, widths: Sequence[int], at: int) -> Hidden:
    values, observed = to_model(x, widths)
    with torch.inference_mode():
        predicted = member.predict(values, observed, INTERVAL)
        drawn = member.impute([(v, 1) for v in values], generator=torch.Generator().manual_seed(0))[at]
        experts = {name: tuple(t.numpy() for t in pair) for name, pair in member.experts(values, observed, at).items()}
    found = (getattr(predicted, name)[at].numpy() for name in ("mean", "std", "lower", "upper"))
    return Hidden(*found, drawn.numpy(), experts)


def _joined(parts: list[Hidden]) -> Hidden:
    arrays = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("mean", "std", "lower", "upper", "drawn")}
    experts = {name: tuple(np.concatenate(a) for a in zip(*(p.experts[name] for p in parts), strict=True)) for name in parts[0].experts}
    return Hidden(**arrays, experts=experts)


def _features(modality: Modality, y, mean, std, m0, s0) -> list[dict]:
    found = [_feature(f.name, f.kind, y[:, d], mean[:, d], std[:, d], m0[d], s0[d]) for d, f in enumerate(modality.features)]
    return [f for f in found if f is not None]


def _score(modality: Modality, y, said: Hidden, m0, s0) -> dict:
    if modality.form == "text":
        skill = float(1 - missed(y, said.mean).mean() / max(missed(y, most_frequent(y)).mean(), 1e-8))
        return _score_whole(y, said, skill)
    if modality.structured:
        return _score_whole(y, said, *_whole(y, said.mean, said.std, m0, s0))
    kinds = np.array([f.kind for f in modality.features])
    mean, std, draws = said.mean, said.std, said.drawn
    scored = _features(modality, y, mean, std, m0, s0)
    numbers = np.flatnonzero(~np.isin(kinds, ("binary", "categorical")))
    binary, real = (np.flatnonzero(kinds == kind) for kind in ("binary", "real"))
    return {
        "rows": len(y),
        "skill": _average(scored, "skill"),
        "r2": _average(scored, "r2"),
        "auroc": _average(scored, "auroc"),
        "features": scored,
        "experts": _experts(modality, y, said, m0, s0),
        "interval90": _covered(y[:, real], said.lower[:, real], said.upper[:, real]),
        **_intervals(y[:, numbers], mean[:, numbers], std[:, numbers]),
        **reliability(y[:, binary], mean[:, binary]),
        "distributions": [_distribution(f.name, y[:, d], draws[:, d]) for d, f in enumerate(modality.features) if f.kind != "categorical"][
            :12
        ],
    }


def missed(y: np.ndarray, told: np.ndarray) -> np.ndarray:
    """Share of the tokens of each text that are not among those told, N; 0 of a text without any. y, told: N x T ids, 0 for none."""
    found = np.zeros(len(y))
    for row, (own, guess) in enumerate(zip(y, told, strict=True)):
        words = np.unique(own[own > 0])
        found[row] = np.mean(~np.isin(words, guess)) if len(words) else 0.0
    return found


def most_frequent(y: np.ndarray) -> np.ndarray:
    """What is told of a text of which nothing is known: the first tokens of the vocabulary. N x T ids as `y`."""
    return np.broadcast_to(np.where(np.arange(y.shape[1]) < TOLD, np.arange(1, y.shape[1] + 1), 0), y.shape)


def _score_whole(y, said: Hidden, skill: float | None, r2: float | None = None) -> dict:
    """An image or a signal: all values together, since some may hardly vary; features and conformal intervals there are none.

    A text: skill in naming its tokens, beside the most frequent ones.
    """
    found = {"rows": len(y), "skill": skill, "r2": r2, "auroc": None, "features": [], "experts": {"vae": skill}, "interval90": None}
    spread = {"cover90": None, "calibration": None, "pit": None} if r2 is None else _intervals(y, said.mean, said.std)
    return found | spread | {"ece": None, "reliability": [], "distributions": []}


def _whole(y, mean, std, m0, s0) -> tuple[float | None, float | None]:
    """Skill and R2 of all values."""
    seen, typical = ~np.isnan(y), np.sqrt(np.mean(s0**2))
    if not varies(np.abs(m0).mean(), typical):
        return None, None
    floor = 1e-6 * typical
    loss, base = crps(y, mean, np.maximum(std, floor)), crps(y, m0, np.maximum(s0, floor))
    error, spread = ((y - mean) ** 2)[seen].sum(), ((y - m0) ** 2)[seen].sum()
    return float(1 - loss[seen].sum() / base[seen].sum()), float(1 - error / spread)


def _experts(modality: Modality, y, said: Hidden, m0, s0) -> dict[str, float | None]:
    """Each expert's own skill on the features that it predicts."""
    kept = [d for d, f in enumerate(modality.features) if f.kind != "categorical"]
    part = modality.model_copy(update={"features": tuple(modality.features[d] for d in kept)})
    return {
        name: _average(_features(part, y[:, kept], mean[:, kept], std[:, kept], m0[kept], s0[kept]), "skill")
        for name, (mean, std) in said.experts.items()
    }


def _covered(y, lower, upper) -> float | None:
    """Share of the values of real features inside the conformal 90% intervals."""
    seen = ~np.isnan(y)
    return float(((y >= lower) & (y <= upper))[seen].mean()) if seen.sum() >= SMALLEST_GROUP else None


def _average(features: list[dict], name: str) -> float | None:
    values = [f[name] for f in features if f[name] is not None]
    return float(np.mean(values)) if values else None


def _feature(name: str, kind: str, y, mean, std, m0: float, s0: float) -> dict | None:
    seen = ~np.isnan(y)
    y, mean, std = (a[seen].astype(np.float64) for a in (y, mean, std))
    if len(y) < SMALLEST_GROUP or (kind != "categorical" and not varies(m0, s0)):
        return None
    found = {"name": name, "kind": kind, "n": len(y), "skill": None, "r2": None, "auroc": None}
    if kind == "categorical":  # the mean is the most probable level, its probability is not kept: accuracy over the commonest
        commonest = np.bincount(y.astype(int)).argmax()
        base = np.mean(y != commonest)
        return found | {"skill": float(1 - np.mean(y != mean) / base) if base else None}
    if kind == "binary":
        base = log_loss(y, np.full_like(y, m0)).mean()
        both = 0 < y.mean() < 1
        return found | {"skill": float(1 - log_loss(y, mean).mean() / base), "auroc": float(roc_auc_score(y, mean)) if both else None}
    loss, base = crps(y, mean, np.maximum(std, 1e-6 * s0)).mean(), crps(y, m0, s0).mean()
    spread = ((y - m0) ** 2).sum()
    return found | {"skill": float(1 - loss / base), "r2": float(1 - ((y - mean) ** 2).sum() / spread) if spread > 0 else None}


def _intervals(y, mean, std) -> dict:
    """Share of values inside the central intervals, and the probability integral transform."""
    seen = ~np.isnan(y)
    if seen.sum() < SMALLEST_GROUP:
        return {"cover90": None, "calibration": None, "pit": None}
    z = ((y - mean) / np.maximum(std, 1e-30))[seen]
    covered = [float((np.abs(z) <= norm.ppf(0.5 + level / 2)).mean()) for level in NOMINAL]
    pit = np.histogram(ndtr(z), 20, (0, 1))[0].tolist()
    return {"cover90": covered[NOMINAL.index(0.9)], "calibration": {"nominal": list(NOMINAL), "observed": covered}, "pit": pit}


def reliability(y, p) -> dict:
    """Expected calibration error over ten equal bins, pooled over features."""
    seen = ~np.isnan(y)
    if seen.sum() < SMALLEST_GROUP:
        return {"ece": None, "reliability": []}
    y, p = y[seen], p[seen]
    bins = np.minimum((p * 10).astype(int), 9)
    cells = [(p[bins == b].mean(), y[bins == b].mean(), int((bins == b).sum())) for b in np.unique(bins)]
    error = sum(abs(predicted - seen_share) * n for predicted, seen_share, n in cells) / len(y)
    return {"ece": float(error), "reliability": [{"predicted": float(a), "observed": float(b), "n": n} for a, b, n in cells]}


def _distribution(name: str, y: np.ndarray, draws: np.ndarray) -> dict:
    """Histograms of what was observed and of one draw for the same records, over the range that 10 people share on either side."""
    seen = ~np.isnan(y)
    values = np.sort(y[seen])
    if len(values) < 2 * SMALLEST_GROUP:
        return {"name": name, "edges": [], "observed": [], "imputed": []}
    low, high = values[SMALLEST_GROUP - 1], values[-SMALLEST_GROUP]
    edges = np.linspace(low, high if high > low else low + 1, 21)
    counts = [np.histogram(np.clip(v[seen], edges[0], edges[-1]), edges)[0].tolist() for v in (y, draws)]
    return {"name": name, "edges": edges.tolist(), "observed": counts[0], "imputed": counts[1]}
