"""Whether new shards still look like the data that a model was fitted on, and whether it still predicts them as well.

Three looks, each at a drop of new records beside what fit kept of the training data (`reference.json`):

distributions    population stability index of every feature and of the patterns of present modalities over common bins,
                 PSI = sum_b (q_b - p_b) ln(q_b / p_b), half a record added to every bin (Siddiqi 2006, Credit Risk Scorecards, ch. 6).
                 Two samples of one population have PSI ~ (1/m + 1/n) chi2_(B-1) (Yurdakul & Naranjo 2020, J. Risk Model
                 Validation 14(4), sec. 2), so its mean (B-1)(1/m + 1/n) is taken off, and a bin has to expect SMALLEST_GROUP records.
missing, unseen  shares of records without a modality, of its records without a value, of values of no level or code seen.
score            log p(x_j | the other modalities) of every modality, hidden, by a member that has not seen the record:
                 it alone sees that modalities no longer go together as they did.

A shift alerts where it is beyond its threshold and beyond what chance makes of a drop of that size: the probability that
any of a drop's comparisons is beyond chance is FALSE_ALARMS at most, shared out evenly (Bonferroni).
"""

from collections.abc import Iterator

import numpy as np
from scipy.stats import chi2, norm

from mmimpute.data.profile import SMALLEST_GROUP, Statistics
from mmimpute.data.reference import binned, known, pool, share_missing, tally
from mmimpute.data.schema import CohortSchema, tabled
from mmimpute.scoring import LEAST, summarise
from mmimpute.spec import DriftSettings

FALSE_ALARMS = 0.01
MOST_LISTED = 100  # features in the record
MOST_REASONS = 10


def compare(schema: CohortSchema, reference: dict, drop: Statistics, scores: np.ndarray, settings: DriftSettings) -> dict:
    """A drop beside the training data. scores: N x K of some of its records (see `scoring.score`).

    Returns {drifted, judged, reasons, rows, features (the worst first), modalities, patterns, settings}, all plain values; no
    number in it stands for fewer than SMALLEST_GROUP people.
    """
    record = {"drifted": False, "judged": drop.rows >= LEAST, "rows": drop.rows, "settings": settings.model_dump()}
    if not record["judged"]:
        reasons = [f"fewer than {LEAST} records: too few to say anything"]
        return record | {"rows": 0, "reasons": reasons, "features": [], "features_judged": 0, "modalities": {}, "patterns": None}
    chance = FALSE_ALARMS / (2 * len(tabled(schema)) + 2 * len(schema.modalities) + 1)
    features = _features(schema, reference, drop, chance, settings)
    modalities = _modalities(schema, reference, drop, scores, chance, settings)
    patterns = _patterns(reference, drop, chance)
    reasons = list(_reasons(features, modalities, patterns, settings))
    return record | {
        "drifted": bool(reasons),
        "reasons": reasons[:MOST_REASONS] + ([f"and {len(reasons) - MOST_REASONS} more"] if len(reasons) > MOST_REASONS else []),
        "features": features[:MOST_LISTED],
        "features_judged": sum(f["psi"] is not None for f in features),
        "modalities": modalities,
        "patterns": patterns,
    }


def psi(training: np.ndarray, drop: np.ndarray) -> float:
    """Population stability index of two histograms over the same bins."""
    p, q = (((c + 0.5) / (c + 0.5).sum()) for c in (training, drop))
    return float(((q - p) * np.log(q / p)).sum())


def shift(training: np.ndarray, drop: np.ndarray, chance: float) -> dict | None:
    """{psi, noise}: the index without what it is on average of one population, and what it exceeds by `chance` alone.

    None where there are too few records for two bins.
    """
    m, n = training.sum(), drop.sum()
    if n < LEAST or not m:
        return None
    groups = pool(training * (n / m), SMALLEST_GROUP)
    bins = groups[-1] + 1
    if bins < 2:
        return None
    unit, mean = 1 / m + 1 / n, bins - 1
    found = psi(np.bincount(groups, training), np.bincount(groups, drop))
    return {"psi": max(0.0, found - mean * unit), "noise": float((chi2.isf(chance, mean) - mean) * unit)}


def _features(schema: CohortSchema, reference: dict, drop: Statistics, chance: float, settings: DriftSettings) -> list[dict]:
    """What is found of every feature, the worst first."""
    found, present = [], dict(zip((m.name for m in schema.modalities), drop.present, strict=True))
    for (at, modality, feature), kept in zip(tabled(schema), reference["features"], strict=True):
        holders = reference["rows"] * (1 - reference["missing"][modality.name])
        values, counts = tally(feature, drop, at)
        good = known(feature, values)
        moved = shift(np.array(kept["counts"]), binned(np.array(kept["edges"]), values[good], counts[good]), chance)
        unseen = int(counts[~good | np.isin(values, kept["rare"])].sum())
        entry = {"modality": modality.name, "name": feature.name, "kind": feature.kind} | (moved or {"psi": None, "noise": None})
        entry["missing"] = _missing(kept["missing"], holders, int(drop.count[at]), int(present[modality.name]), chance, settings)
        entry["unseen"] = unseen / counts.sum() if unseen >= SMALLEST_GROUP else 0.0
        # Levels of fewer than ten training records count as unseen: as many of the drop's may be of them.
        entry["allowed"] = SMALLEST_GROUP / sum(kept["counts"]) if kept["rare"] and sum(kept["counts"]) else 0.0
        found.append(entry)
    return sorted(found, key=lambda f: _severity(f, settings), reverse=True)


def _severity(entry: dict, settings: DriftSettings) -> float:
    """How many times a feature's worst threshold."""
    missing = abs(entry["missing"]["drop"] - entry["missing"]["training"]) if entry["missing"] else 0.0
    return max((entry["psi"] or 0.0) / settings.psi, missing / settings.missing, entry["unseen"] / settings.unseen)


def _missing(training: float, m: float, observed: int, n: int, chance: float, settings: DriftSettings) -> dict | None:
    """Shares of records without it, and whether they differ by more than the threshold and chance; None of too few records.

    The judgement is on the exact share of the drop; a share that stands for a small group is told as in `share_missing`.
    """
    if n < LEAST or m < LEAST:
        return None
    exact = 1 - observed / n
    pooled = (training * m + exact * n) / (m + n)
    noise = norm.isf(chance / 2) * np.sqrt(pooled * (1 - pooled) * (1 / m + 1 / n))
    blurred = SMALLEST_GROUP / m if training in (0, 1) else 0.0  # the training share is told in the same way
    moved = bool(abs(exact - training) > max(settings.missing, noise + blurred))
    return {"training": training, "drop": share_missing(observed, n), "moved": moved}


def _modalities(
    schema: CohortSchema, reference: dict, drop: Statistics, scores: np.ndarray, chance: float, settings: DriftSettings
) -> dict[str, dict]:
    """What is found of every modality as a whole."""
    summary = summarise([m.name for m in schema.modalities], scores)
    return {
        m.name: {
            "missing": _missing(reference["missing"][m.name], reference["rows"], int(drop.present[k]), drop.rows, chance, settings),
            "score": _score_shift(reference["score"][m.name], summary[m.name], chance),
        }
        for k, m in enumerate(schema.modalities)
    }


def _score_shift(training: dict | None, drop: dict | None, chance: float) -> dict | None:
    """{shift, noise} in standard deviations between training records; None where few records hold the modality and another."""
    if training is None or drop is None:
        return None
    error = np.sqrt(training["std"] ** 2 / training["n"] + drop["std"] ** 2 / drop["n"])
    scale = max(training["std"], 1e-6)
    return {"shift": (drop["mean"] - training["mean"]) / scale, "noise": float(norm.isf(chance / 2) * error / scale), "n": drop["n"]}


def _patterns(reference: dict, drop: Statistics, chance: float) -> dict | None:
    kept = [drop.patterns[tuple(flags)] for flags in reference["patterns"]]
    return shift(np.array(reference["counts"]), np.array([*kept, drop.rows - sum(kept)]), chance)


def _reasons(features: list[dict], modalities: dict, patterns: dict | None, settings: DriftSettings) -> Iterator[str]:
    """Why this is drift, in words."""
    for name, found in modalities.items():
        if (score := found["score"]) and abs(score["shift"]) > max(settings.score, score["noise"]):
            how = "worse" if score["shift"] < 0 else "better"
            yield f"{name} is predicted {how} than in training: by {abs(score['shift']):.2f} standard deviations of a record's log score"
        if found["missing"] and found["missing"]["moved"]:
            yield f"{name} is missing of {found['missing']['drop']:.0%} of the records, {found['missing']['training']:.0%} in training"
    if patterns and patterns["psi"] > max(settings.psi, patterns["noise"]):
        yield f"other modalities come together than in training (PSI {patterns['psi']:.2f})"
    yield from _reasons_of_features(features, settings)


def _reasons_of_features(features: list[dict], settings: DriftSettings) -> Iterator[str]:
    for f in features:
        label = f"{f['modality']}: {f['name']}"
        if f["psi"] is not None and f["psi"] > max(settings.psi, f["noise"]):
            yield f"{label} has another distribution (PSI {f['psi']:.2f})"
        if f["unseen"] > settings.unseen + f["allowed"]:
            yield f"{label}: {f['unseen']:.0%} of the values are of no level or code seen in training"
        if f["missing"] and f["missing"]["moved"]:
            yield f"{label} is missing of {f['missing']['drop']:.0%} of the modality's records, {f['missing']['training']:.0%} in training"
    judged = [f for f in features if f["psi"] is not None]
    moderate = sum(max(settings.psi_moderate, f["noise"]) < f["psi"] <= settings.psi for f in judged)
    if judged and moderate / len(judged) > settings.features:
        yield f"{moderate} of {len(judged)} features have shifted moderately (PSI above {settings.psi_moderate:g})"
