"""What is in a cohort: one streaming pass of mergeable statistics, and what follows from them.

Counts and moments are exact over all records. Shapes (quantiles, skewness, distinct values) come from a sample of
whole records that a hash of the subject id picks, so that the profile does not depend on order or sharding.
Nothing here is reported for fewer than SMALLEST_GROUP people.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmimpute.data.arrow import decode, flat, tokens
from mmimpute.data.schema import CohortSchema, Feature, Modality, is_text, value_type
from mmimpute.data.split import position
from mmimpute.errors import UserError

SMALLEST_GROUP = 10
SAMPLE_CELLS = 16_000_000  # 64 MB of float32 on the driver
LONG_TAIL = 2.0  # skewness from which a feature is put on a log scale, if that halves it
MOST_COUNTED = 20_000  # distinct texts or tokens
MOST_LEVELS = 50  # distinct texts beyond this are free text, not a category
MOST_ORDINAL = 11  # levels; scales from 0 to 10 are common


@dataclass
class Statistics:
    """Mergeable statistics of some records. Per-feature arrays run over all modalities side by side (D = schema.width)."""

    rows: int
    present: np.ndarray  # K, records that hold the modality
    together: np.ndarray  # K x K
    patterns: Counter  # tuple of present flags -> records
    least: np.ndarray  # D
    most: np.ndarray
    whole: np.ndarray  # D bool: every value is an integer
    levels: list[Counter | None]  # D, of text columns: level -> records
    count: np.ndarray  # D, observed values
    mean: np.ndarray
    m2: np.ndarray  # D, sum of squared deviations
    sample: list[np.ndarray] = field(default_factory=list)
    place: list[np.ndarray] = field(default_factory=list)  # of the sample's records, see `split.position`


def sample_share(rows: int, width: int) -> float:
    """Which share of the records the sample may hold."""
    return min(1.0, max(2_000, min(SAMPLE_CELLS // width, 50_000)) / max(rows, 1))


def observe(table: pa.Table, schema: CohortSchema, shard: str, share: float, strict: bool = True) -> Statistics:
    """Statistics of one shard's records. Raises DataError as `decode` does."""
    records = decode(table, schema, shard, strict)
    ids = table.column(schema.subject_id)
    sampled = np.full(len(ids), True) if share >= 1 else position(ids, "sample") < share
    present = np.stack([~np.isnan(x).all(1) for x in records.values()], 1)
    x = flat(records)
    seen = ~np.isnan(x)
    count = seen.sum(0)
    filled = np.where(seen, x, 0).astype(np.float64)
    mean = filled.sum(0) / np.maximum(count, 1)
    with np.errstate(invalid="ignore"):
        m2 = (np.where(seen, x - mean, 0.0) ** 2).sum(0)
    return Statistics(
        rows=len(ids),
        present=present.sum(0),
        together=present.T.astype(int) @ present.astype(int),
        patterns=Counter({tuple(map(bool, p)): int(n) for p, n in zip(*np.unique(present, axis=0, return_counts=True), strict=True)}),
        count=count,
        mean=mean,
        m2=m2,
        least=np.where(seen, x, np.inf).min(0, initial=np.inf),
        most=np.where(seen, x, -np.inf).max(0, initial=-np.inf),
        whole=(~seen | (np.where(seen, x, 0) % 1 == 0)).all(0),
        levels=_text_levels(table, schema),
        sample=[x[sampled]],
        place=[position(ids.filter(pa.array(sampled)))],
    )


def _text_levels(table: pa.Table, schema: CohortSchema) -> list[Counter | None]:
    """Level -> records of each text feature, None for the others; lists hold numbers."""
    found: list[Counter | None] = []
    for modality in schema.modalities:
        if modality.layout == "text":  # tokens in the first place, records that hold them
            found.append(Counter(t for text in table.column(modality.columns[0]).drop_null().to_pylist() for t in set(tokens(text))))
            found += [None] * (len(modality.features) - 1)
            continue
        if modality.layout == "list":
            found += [None] * len(modality.features)
            continue
        for column in map(table.column, modality.columns):
            counts = pc.value_counts(column.drop_null()).to_pylist() if is_text(value_type(column.type)) else None
            found.append(None if counts is None else Counter({c["values"]: c["counts"] for c in counts}))
    return found


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of both (Chan et al. 1979, eq. 2.1 for the moments)."""
    count = a.count + b.count
    delta = b.mean - a.mean
    share = b.count / np.maximum(count, 1)
    return Statistics(
        rows=a.rows + b.rows,
        present=a.present + b.present,
        together=a.together + b.together,
        patterns=a.patterns + b.patterns,
        count=count,
        mean=a.mean + delta * share,
        m2=a.m2 + b.m2 + delta**2 * a.count * share,
        least=np.minimum(a.least, b.least),
        most=np.maximum(a.most, b.most),
        whole=a.whole & b.whole,
        levels=[None if m is None else _most_common(m + n) for m, n in zip(a.levels, b.levels, strict=True)],
        sample=a.sample + b.sample,
        place=a.place + b.place,
    )


def _most_common(levels: Counter) -> Counter:
    """Free text has no end of levels; keep enough to see that there are too many."""
    return Counter(dict(levels.most_common(MOST_COUNTED)))


def settle(schema: CohortSchema, seen: Statistics) -> tuple[CohortSchema, Statistics]:
    """The schema with every kind and level settled, and the statistics with levels replaced by their index.

    Raises UserError for a column with too many levels to be a category.
    """
    sample = np.concatenate(seen.sample)
    modalities, at = [], 0
    for modality in schema.modalities:
        if modality.structured:
            modalities.append(_with_vocabulary(modality, seen, at) if modality.form == "text" else modality)
            at += len(modality.features)
            continue
        features = []
        for feature in modality.features:
            settled = _settle_feature(modality, feature, seen, sample[:, at], at)
            if settled.levels and not feature.levels and seen.levels[at] is None:
                known = ~np.isnan(sample[:, at])
                sample[known, at] = np.searchsorted(settled.levels, sample[known, at])
            features.append(settled)
            at += 1
        modalities.append(modality.model_copy(update={"features": tuple(features)}))
    return schema.model_copy(update={"modalities": tuple(modalities)}), replace(seen, sample=[sample])


def _with_vocabulary(modality: Modality, seen: Statistics, at: int) -> Modality:
    """A text's most frequent tokens, and their shares. A token of fewer than SMALLEST_GROUP records may tell who a person is.

    Raises UserError where there is no token of so many records.
    """
    ordered = sorted(seen.levels[at].items(), key=lambda entry: (-entry[1], entry[0]))[: modality.most]
    kept = [(token, records) for token, records in ordered if records >= SMALLEST_GROUP]
    if not kept:
        raise UserError(f"modality {modality.name}: no token is in {SMALLEST_GROUP} records or more; leave it out")
    records = np.array([n for _, n in kept], float)
    places = max(seen.count[at] * modality.shape[0], records.sum() / 0.99)  # a token may come more than once, a long text is cut
    chances = np.r_[places - records.sum(), records] / places
    return modality.model_copy(update={"vocabulary": tuple(t for t, _ in kept), "chances": tuple(chances.tolist())})


def _settle_feature(modality: Modality, feature: Feature, seen: Statistics, sample: np.ndarray, at: int) -> Feature:
    texts = seen.levels[at]
    if feature.kind == "auto":
        kind = "ordinal" if feature.levels else guess_kind(seen, at, np.unique(sample[~np.isnan(sample)]))
        feature = feature.model_copy(update={"kind": kind})
    if feature.levels or feature.kind not in ("ordinal", "categorical"):
        return feature
    if texts is not None:
        levels = tuple(sorted(texts))
    else:
        whole = seen.whole[at] and seen.most[at] - seen.least[at] < MOST_LEVELS
        levels = tuple(np.arange(seen.least[at], seen.most[at] + 1).tolist()) if whole else ()
    if not 2 <= len(levels) <= MOST_LEVELS:
        raise UserError(
            f"modality {modality.name}, feature {feature.name!r}: {feature.kind}, but not of 2 to {MOST_LEVELS} texts or whole numbers; "
            "list its `levels` in the spec, give it another kind, or leave it out (free text: embed it first)"
        )
    return feature.model_copy(update={"levels": levels})


def guess_kind(seen: Statistics, at: int, distinct: np.ndarray) -> str:
    """`auto`: what the values look like. Text is categorical; 0/1 binary; a few whole levels ordinal; whole numbers
    from 0 with a long upper tail are counts; all else is real."""
    if seen.levels[at] is not None:
        return "categorical"
    least, most = seen.least[at], seen.most[at]
    if not seen.whole[at] or not seen.count[at] or least < 0:
        return "real"
    if most <= 1:
        return "binary"
    if 0 < most - least < MOST_ORDINAL and len(distinct) == most - least + 1:
        return "ordinal"
    deviation = np.sqrt(seen.m2[at] / seen.count[at])
    tail = most > seen.mean[at] + 4 * deviation  # a coded scale has none
    return "count" if least == 0 and seen.mean[at] < 20 and tail else "real"


def feature_statistics(schema: CohortSchema, seen: Statistics) -> dict[str, dict[str, np.ndarray]]:
    """What the model standardises with, per modality: mean, std, log, unit (D,) and knots (D, 9).

    transform(x) = sign(x) log1p(|x| / unit) where log, else x; then (. - mean) / std. Exact moments where the
    transform is the identity, those of the sample on the log scale. knots: octiles in standardised units.
    """
    sample = np.concatenate(seen.sample).astype(np.float64)
    found, start = {}, 0
    for modality in schema.modalities:
        stop = start + len(modality.features)
        if modality.structured:
            found[modality.name] = _whole(modality, seen, start)
            start = stop
            continue
        columns = [_feature(f, seen, sample[:, at], at) for f, at in zip(modality.features, range(start, stop), strict=True)]
        found[modality.name] = {name: np.array([c[name] for c in columns], bool if name == "log" else np.float32) for name in columns[0]}
        start = stop
    return found


def _pooled(modality: Modality, seen: Statistics, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each value of an image or a signal: its channel, and the mean and standard deviation of all values of that channel."""
    own, channel_D = slice(start, start + len(modality.features)), np.array(modality.channel_of)
    total = lambda t: np.bincount(channel_D, t)  # noqa: E731
    count_C = np.maximum(total(seen.count[own]), 1)
    mean_C = total(seen.count[own] * seen.mean[own]) / count_C
    square_C = total(seen.m2[own] + seen.count[own] * (seen.mean[own] - mean_C[channel_D]) ** 2) / count_C
    return channel_D, mean_C, np.sqrt(square_C)


def _whole(modality: Modality, seen: Statistics, start: int) -> dict[str, np.ndarray]:
    """`feature_statistics` of an image or a signal: those of its channel for every value, since that of a corner may be constant.

    A text's ids have no scale. Nothing reads the knots.
    """
    width = len(modality.features)
    mean, std = np.zeros(width), np.ones(width)
    if modality.form != "text":
        channel_D, mean_C, std_C = _pooled(modality, seen, start)
        mean, std = mean_C[channel_D], np.where(varies(mean_C, std_C), std_C, 1.0)[channel_D]
    found = {"mean": mean, "std": std, "unit": np.ones(width), "knots": np.tile(np.linspace(-2, 2, 9), (width, 1))}
    return {name: t.astype(np.float32) for name, t in found.items()} | {"log": np.zeros(width, bool)}


def marginals(schema: CohortSchema, seen: Statistics) -> dict[str, dict[str, list[float]]]:
    """Mean and std of each feature's training values, levels as their index: what imputing the column mean says."""
    sample = np.concatenate(seen.sample)
    mean, std = seen.mean.copy(), np.sqrt(seen.m2 / np.maximum(seen.count, 1))
    found, start = {}, 0
    for modality in schema.modalities:
        stop = start + len(modality.features)
        for at, feature in zip(range(start, stop), modality.features, strict=True):
            values = sample[~np.isnan(sample[:, at]), at] if feature.levels else ()
            if len(values):
                mean[at], std[at] = values.mean(), values.std()
        found[modality.name] = {"mean": mean[start:stop].tolist(), "std": std[start:stop].tolist()}
        start = stop
    return found


def varies(mean: Any, std: Any) -> Any:
    """Whether more than rounding is between a feature's values, in whatever unit it is."""
    return std > 1e-8 * np.maximum(np.abs(mean), 1e-30)


def _feature(feature: Feature, seen: Statistics, sample: np.ndarray, at: int) -> dict:
    values = sample[~np.isnan(sample)]
    if feature.kind == "categorical" or not seen.count[at]:
        return {"mean": 0.0, "std": 1.0, "log": False, "unit": 1.0, "knots": np.linspace(-2, 2, 9)}
    mean, std = seen.mean[at], np.sqrt(seen.m2[at] / seen.count[at])
    if feature.levels:  # the sample holds their index; of a rare feature perhaps none
        mean, std = (values.mean(), values.std()) if len(values) else ((len(feature.levels) - 1) / 2, 1.0)
    present = np.abs(values[values != 0])
    unit = 1.0 if feature.kind == "count" or not len(present) else float(np.median(present))
    log = len(values) > 0 and (feature.kind == "count" or (feature.kind == "real" and long_tailed(values, unit)))
    if log:
        values = signed_log(values, unit)
        mean, std = values.mean(), values.std()
    std = std if varies(mean, std) else 1.0
    knots = _octiles((values - mean) / std) if len(values) else np.linspace(-2, 2, 9)
    return {"mean": mean, "std": std, "log": log, "unit": unit, "knots": knots}


def _octiles(z: np.ndarray) -> np.ndarray:
    """Nine edges. SMALLEST_GROUP people lie at or beyond the outer ones: the model file keeps no extreme of one."""
    at = min(SMALLEST_GROUP - 1, (len(z) - 1) // 8)
    ordered = np.sort(z)
    return np.r_[ordered[at], np.quantile(z, np.arange(1, 8) / 8), ordered[-at - 1]]


def signed_log(x: np.ndarray, unit: float) -> np.ndarray:
    return np.sign(x) * np.log1p(np.abs(x) / unit)


def long_tailed(values: np.ndarray, unit: float) -> bool:
    """Whether a log scale is called for: strong skewness, and less than half of it after the transform."""
    skew = abs(_skewness(values))
    return skew > LONG_TAIL and abs(_skewness(signed_log(values, unit))) < skew / 2


def _skewness(x: np.ndarray) -> float:
    z = x - x.mean()
    variance = (z**2).mean()
    return float((z**3).mean() / variance**1.5) if variance > 0 else 0.0


def report(schema: CohortSchema, seen: Statistics) -> dict:
    """The profile as plain values for people: counts, kinds, and of the sample
    the moments and ranges that at least SMALLEST_GROUP people share."""
    sample = np.concatenate(seen.sample)
    at, modalities = 0, {}
    for k, modality in enumerate(schema.modalities):
        features = []
        if modality.form == "text":
            features, at = [_vocabulary(modality, int(seen.present[k]))], at + len(modality.features)
            modalities[modality.name] = {"present": int(seen.present[k]), "features": features}
            continue
        if modality.structured:
            features, at = _describe_channels(modality, seen, at, int(seen.present[k])), at + len(modality.features)
            modalities[modality.name] = {"present": int(seen.present[k]), "features": features, "shape": list(modality.shape)}
            continue
        for feature in modality.features:
            features.append({"name": feature.name, "kind": feature.kind, **_describe(feature, seen, sample[:, at], at)})
            at += 1
        modalities[modality.name] = {"present": int(seen.present[k]), "features": features}
    names = list(modalities)
    patterns = [{"present": [n for n, p in zip(names, flags, strict=True) if p], "rows": n} for flags, n in seen.patterns.most_common(20)]
    return {"rows": seen.rows, "modalities": modalities, "together": seen.together.tolist(), "patterns": patterns}


def _vocabulary(modality: Modality, present: int) -> dict:
    told = {"name": f"{len(modality.vocabulary)} tokens", "kind": "text", "observed": present}
    return told | dict.fromkeys(("mean", "std", "low", "high"))


def _describe_channels(modality: Modality, seen: Statistics, start: int, present: int) -> list[dict]:
    """What is told of an image or a signal: mean and standard deviation of its channels; no range, which one record may set."""
    _, mean_C, std_C = _pooled(modality, seen, start)
    told = {"kind": modality.form, "observed": present, "mean": None, "std": None, "low": None, "high": None}
    moments = [{"mean": float(m), "std": float(s)} if present >= 2 * SMALLEST_GROUP else {} for m, s in zip(mean_C, std_C, strict=True)]
    return [{"name": f"channel {c}"} | told | found for c, found in enumerate(moments)]


def _describe(feature: Feature, seen: Statistics, sample: np.ndarray, at: int) -> dict:
    count = int(seen.count[at])
    found = {"observed": count, "mean": None, "std": None, "low": None, "high": None}
    values = np.sort(sample[~np.isnan(sample)])
    if len(values) < 2 * SMALLEST_GROUP or feature.kind == "categorical":
        return found
    if feature.levels:
        values = np.asarray(feature.levels)[values.astype(int)]
    low, high = values[SMALLEST_GROUP - 1], values[-SMALLEST_GROUP]
    return found | {"mean": float(values.mean()), "std": float(values.std()), "low": float(low), "high": float(high)}
