"""What is kept of a population to compare another with: how often each bin, level and pattern of missing modalities occurs.

A bin ends at a decile of the training data or at a level. It holds SMALLEST_GROUP people at least, and what counts of fewer
would tell is left out: nothing here follows from a smaller group, and no bin has an outer end.
"""

from collections import Counter

import numpy as np

from mmimpute.data.arrow import UNSEEN
from mmimpute.data.profile import SMALLEST_GROUP, Statistics
from mmimpute.data.schema import CohortSchema, Feature, tabled

BINS = 10


def reference(schema: CohortSchema, seen: Statistics) -> dict:
    """{rows, missing: modality -> share of records, features, patterns, counts}, plain values, features as `tabled`.

    A feature has `edges` (a bin ends with its edge), `counts` of its bins, `missing`, the share of its modality's records
    that lack it, and `rare`, the levels or codes that fewer than SMALLEST_GROUP people have.
    """
    present = {m.name: int(n) for m, n in zip(schema.modalities, seen.present, strict=True)}
    features = [
        _bins(feature, *tally(feature, seen, at)) | {"missing": share_missing(int(seen.count[at]), present[modality.name])}
        for at, modality, feature in tabled(schema)
    ]
    missing = {m.name: share_missing(int(n), seen.rows) for m, n in zip(schema.modalities, seen.present, strict=True)}
    return {"rows": seen.rows, "missing": missing, "features": features, **_patterns(seen)}


def tally(feature: Feature, seen: Statistics, at: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of feature number `at`, levels as their index, ascending, and how many records have each.

    Of all records for text, else of the sample.
    """
    if seen.levels[at] is None:
        sample = np.concatenate([part[:, at] for part in seen.sample])
        return np.unique(sample[~np.isnan(sample)], return_counts=True)
    found, index = Counter(), {level: number for number, level in enumerate(feature.levels)}
    for level, records in seen.levels[at].items():
        found[index.get(level, UNSEEN)] += records
    values = np.array(sorted(found), int)
    return values, np.array([found[v] for v in values], int)


def known(feature: Feature, values: np.ndarray) -> np.ndarray:
    """Which values are such as the feature may have."""
    if feature.levels:
        return values >= 0
    if feature.kind == "binary":
        return np.isin(values, (0, 1))
    return (values >= 0) & (values % 1 == 0) if feature.kind == "count" else np.full(len(values), True)


def share_missing(observed: int, of: int) -> float:
    """The share of records without a value; fewer than SMALLEST_GROUP of either kind count as none."""
    missing = of - observed
    if missing < SMALLEST_GROUP:
        return 0.0
    return 1.0 if observed < SMALLEST_GROUP else missing / of


def _bins(feature: Feature, values: np.ndarray, counts: np.ndarray) -> dict:
    levels = np.arange(len(feature.levels)) if feature.levels else np.arange(2) if feature.kind == "binary" else None
    edges = _deciles(values, counts) if levels is None else levels[:-1]
    groups = pool(binned(edges, values, counts), SMALLEST_GROUP)
    edges = edges[np.diff(groups) > 0]
    held = binned(edges, values, counts)
    rare = [] if levels is None else np.setdiff1d(levels, values[counts >= SMALLEST_GROUP]).tolist()
    return {"edges": edges.tolist(), "counts": np.where(held < SMALLEST_GROUP, 0, held).tolist(), "rare": rare}


def _deciles(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    if not len(values):
        return values
    rank = counts.cumsum()
    return np.unique(values[np.searchsorted(rank, rank[-1] * np.arange(1, BINS) / BINS)])


def binned(edges: np.ndarray, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How many records each bin holds; a value that is an edge belongs to the bin below."""
    return np.bincount(np.searchsorted(edges, values), counts, len(edges) + 1).astype(int)


def pool(counts: np.ndarray, least: float) -> np.ndarray:
    """Neighbours in groups: the number of each one's group. A group ends when it holds `least`; a rest joins the last one."""
    groups, number, held = np.zeros(len(counts), int), 0, 0
    for at, count in enumerate(counts):
        groups[at], held = number, held + count
        if held >= least:
            number, held = number + 1, 0
    return np.minimum(groups, max(number - 1, 0))


def _patterns(seen: Statistics) -> dict:
    """The patterns of present modalities, as flags, and how many records have each; the last count is of all other patterns."""
    kept = sorted(((n, flags) for flags, n in seen.patterns.items() if n >= SMALLEST_GROUP), reverse=True)
    others = seen.rows - sum(n for n, _ in kept)
    while 0 < others < SMALLEST_GROUP and kept:
        others += kept.pop()[0]
    return {"patterns": [list(flags) for _, flags in kept], "counts": [n for n, _ in kept] + [others]}
