"""Rules held against enriched shards: who probably has what is not on record. Plain functions; `jobs.alert_table` calls them.

Of an imputed value the table has a mean and a standard deviation. The probability is that of a Gaussian with these; of a
feature that the model reads on a log scale (see `standardise`) that of the log-normal with these, shifted by its unit; of
whole numbers that of the interval half a step beyond. Binary features hold the probability itself; of a categorical one
1 - std^2 = sum p^2 is the least that the most probable level can have. Subject ids stand in the lists and nowhere else.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import ndtr

import mmimpute
from mmimpute.data import storage
from mmimpute.data.profile import SMALLEST_GROUP
from mmimpute.data.schema import CohortSchema, Place, is_list, is_text, place_of, places, storage_type, value_type
from mmimpute.data.shards import Shard, open_shard, publish_table, read_footer
from mmimpute.data.table import COUNTS, digest
from mmimpute.errors import UserError
from mmimpute.registry import Model
from mmimpute.spec import AlertRules, Condition, Rule
from mmimpute.verifying import cells

BATCH = 65_536  # records of which the rules' columns are read at a time
ALERTS = "mmimpute.alerts"  # key of a list's metadata: people per rule


class Where(NamedTuple):
    """A condition on a column of the table. at, width: the place in its lists; 0 and 1 in a scalar column."""

    column: str
    at: int
    width: int
    condition: Condition


class Aim(NamedTuple):
    """A rule and where its feature is. unit: of the feature's log scale, None where it has none; step: between whole numbers, else 0."""

    name: str
    rule: Rule
    place: Place
    unit: float | None
    step: float
    where: tuple[Where, ...]

    @property
    def width(self) -> int:
        return len(self.place.modality.features) if self.place.modality.layout == "list" else 1


def rules_digest(rules: AlertRules) -> str:
    return digest(rules.model_dump_json(), mmimpute.__version__)


def aims_of(rules: AlertRules, model: Model, arrow: pa.Schema) -> list[Aim]:
    """Rules on a model's features and a table's columns. Raises UserError for those that it does not have, or that cannot be asked."""
    known = places(model.schema)
    return [_aim(name, rule, known, model, arrow) for name, rule in rules.rules.items()]


def _aim(name: str, rule: Rule, known: Mapping[str, Place], model: Model, arrow: pa.Schema) -> Aim:
    place = place_of(known, rule.feature, f"alerts: rules.{name}.feature")
    kind, levels = place.feature.kind, place.feature.levels
    if not place.modality.impute:
        raise UserError(f"alerts: rules.{name}: modality {place.modality.name} is not imputed, so nothing is believed about it")
    if kind == "categorical" and rule.equals not in levels:
        raise UserError(f"alerts: rules.{name}: {rule.feature!r} is categorical; `equals` has to be one of {', '.join(map(str, levels))}")
    if (kind != "categorical" and isinstance(rule.equals, str)) or (kind == "real" and rule.equals is not None):
        raise UserError(f"alerts: rules.{name}: {rule.feature!r} is {kind}; use at_least or at_most" + " or a number" * (kind != "real"))
    standardise = model.module.vae.standardise[[m.name for m in model.schema.modalities].index(place.modality.name)]
    own = place.modality.features.index(place.feature)
    unit = float(standardise.unit[own]) if standardise.log[own] else None
    step = 1.0 if kind == "count" else (levels[-1] - levels[0]) / (len(levels) - 1) if kind == "ordinal" else 0.0
    where = tuple(_where(name, column, condition, known, arrow) for column, condition in rule.where.items())
    return Aim(name, rule, place, unit, step, where)


def _where(name: str, column: str, condition: Condition, known: Mapping[str, Place], arrow: pa.Schema) -> Where:
    if column not in known and column in arrow.names and not is_list(storage_type(arrow.field(column).type)):
        place = Where(column, 0, 1, condition)
    else:
        found = place_of(known, column, f"alerts: rules.{name}.where")
        place = Where(found.column, found.at, len(found.modality.features) if found.modality.layout == "list" else 1, condition)
    text = is_text(value_type(arrow.field(place.column).type))
    if text != isinstance(condition.equals, str):
        raise UserError(f"alerts: rules.{name}.where: {column!r} holds {'text: give equals = a text' if text else 'numbers, not text'}")
    return place


def probability(aim: Aim, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """That the rule's condition holds of imputed values, by what the table says of each."""
    rule, kind = aim.rule, aim.place.feature.kind
    if kind == "categorical":
        return np.where(mean == rule.equals, 1 - std**2, 0.0)
    if kind == "binary":
        zero, one = (holds(rule, np.array(v)) for v in (0.0, 1.0))
        return one * mean + zero * (1 - mean)
    low, high = rule.at_least, rule.at_most
    if rule.equals is not None:
        low = high = rule.equals
    below = 0.0 if low is None else _below(low - aim.step / 2, mean, std, aim.unit)
    return (1.0 if high is None else _below(high + aim.step / 2, mean, std, aim.unit)) - below


def _below(bound: float, mean: np.ndarray, std: np.ndarray, unit: float | None) -> np.ndarray:
    """Distribution function at a bound: Gaussian, or of what has a Gaussian sign(x) log(1 + |x| / unit), on one side of 0."""
    std = np.maximum(std, 1e-12)
    if unit is None:
        return ndtr((bound - mean) / std)
    side = np.where(mean < 0, -1.0, 1.0)
    centre = np.abs(mean) + unit
    variance = np.log1p((std / centre) ** 2)
    location = np.log(centre) - variance / 2
    z = (np.log(np.maximum(side * bound + unit, 1e-300)) - location) / np.sqrt(variance)
    return ndtr(side * z)


def holds(condition: Condition, values: np.ndarray) -> np.ndarray:
    """Of which values on record it is true."""
    if condition.at_least is not None:
        return values >= condition.at_least
    return values <= condition.at_most if condition.at_most is not None else values == condition.equals


def listed(batch: pa.RecordBatch, schema: CohortSchema, aims: list[Aim]) -> list[pa.Table]:
    """Per rule the people whom it is about: subject_id, rule, message, probability, predicted, std, and the event time where it is told."""
    found = []
    for aim in aims:
        chance, mean, std = _believed(aim, batch)
        chosen = chance > aim.rule.probability
        for where in aim.where:
            on_record = cells(batch.column(where.column), where.width)
            chosen &= ~on_record.missing[:, where.at] & holds(where.condition, on_record.values[:, where.at])
        found.append(_list(aim, batch.filter(pa.array(chosen)), schema, chance[chosen], mean[chosen], std[chosen]))
    return found


def _believed(aim: Aim, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probability, predicted value and deviation of everyone. On record: 1 or 0, itself and 0; NaN where that is not asked for."""
    at = aim.place.at
    seen, mean, std = (cells(batch.column(aim.place.column + suffix), aim.width) for suffix in ("", "__imputed", "__std"))
    missing = seen.missing[:, at]
    mean_N = np.where(missing, mean.values[:, at], seen.values[:, at])
    std_N = np.where(missing, std.values[:, at], 0.0)
    found = np.full(len(batch), np.nan)
    found[missing] = probability(aim, mean_N[missing], std_N[missing])
    if not aim.rule.not_observed:
        found[~missing] = holds(aim.rule, mean_N[~missing])
    return found, mean_N, std_N


def _list(aim: Aim, batch: pa.RecordBatch, schema: CohortSchema, chance, mean, std) -> pa.Table:
    text = mean.dtype == object
    columns = {
        schema.subject_id: batch.column(schema.subject_id),
        "rule": pa.array([aim.name] * len(batch), pa.string()),
        "message": pa.array([aim.rule.message] * len(batch), pa.string()),
        "probability": pa.array(chance, pa.float64()),
        "predicted": pa.nulls(len(batch), pa.float64()) if text else pa.array(mean.astype(float), pa.float64()),
        "std": pa.array(std.astype(float), pa.float64()),
    }
    return pa.table(columns | {name: batch.column(name) for name in _times(schema, batch.schema)})


def _times(schema: CohortSchema, arrow: pa.Schema) -> list[str]:
    """The column of the event time. It is no input of the model, so a shard without it is imputed; its lists are without it too."""
    return [schema.timestamp] if schema.timestamp in arrow.names else []


def list_shard(model: Model, rules: AlertRules, output: str, shard: Shard, to: str, key: str) -> dict:
    """Publishes the list of one enriched shard under `key`. Returns {rows, alerts: {rule: people}}. Raises DataError, UserError."""
    file = open_shard(output, shard)
    aims = aims_of(rules, model, file.schema_arrow)
    columns = [
        model.schema.subject_id,
        *(w.column for a in aims for w in a.where),
        *_times(model.schema, file.schema_arrow),
    ]
    columns += [a.place.column + suffix for a in aims for suffix in ("", "__imputed", "__std")]
    if absent := [c for c in columns if c not in file.schema_arrow.names]:
        raise UserError(f"alerts: the enriched shard {shard.key} has no column {absent[0]!r}")
    batches = file.iter_batches(BATCH, columns=list(dict.fromkeys(columns)))
    parts = [part for batch in batches for part in listed(batch, model.schema, aims)]
    found = pa.concat_tables(parts)
    counts = {aim.name: pc.sum(pc.equal(found.column("rule"), aim.name)).as_py() or 0 for aim in aims}
    rows = {"rows": len(found), "from_prior": 0, "imputed": {}}
    lineage = {"mmimpute.version": mmimpute.__version__, "mmimpute.model": model.digest, "mmimpute.enriched": shard.key}
    metadata = {COUNTS: json.dumps(rows), ALERTS: json.dumps(counts), "mmimpute.rules": rules_digest(rules), **lineage}
    publish_table(to, key, found.replace_schema_metadata(metadata))
    return {"rows": file.metadata.num_rows, "alerts": counts}


def people_listed(to: str, shard: Shard) -> dict[str, int]:
    """People per rule in one list, as it says itself."""
    return json.loads(read_footer(to, shard).metadata[ALERTS.encode()])


def shown(people: int) -> int | str:
    """A count as people may see it."""
    return people if people == 0 or people >= SMALLEST_GROUP else f"<{SMALLEST_GROUP}"


def check_apart(output: str, to: str) -> None:
    """Raises UserError where one table would lie in the other: each holds all objects below its URL for its own."""
    a, b = (storage.normalise(url) + "/" for url in (output, to))
    if a.startswith(b) or b.startswith(a):
        raise UserError(f"{to}: the outreach lists need a place of their own, neither in the enriched table nor around it")
