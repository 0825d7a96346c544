"""Labels of records: columns beside the model's inputs that say which records are alike, or of which class they are.

A label is settled on a sample of the records and then read, shard by shard, as one number per record; NaN: it says nothing.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmimpute.data.arrow import scalars, texts
from mmimpute.data.profile import SMALLEST_GROUP
from mmimpute.data.schema import Contrastive, Label, is_text
from mmimpute.errors import DataError, UserError

MOST_CLASSES = 50
WORDS = {"true": 1.0, "false": 0.0}


def settle(contrastive: Contrastive, sample: Mapping[str, np.ndarray]) -> Contrastive:
    """Levels, edges of bins, or mean and standard deviation of every label; sample: its column as text (see `arrow.texts`).

    Levels are those that SMALLEST_GROUP people have; records of other values say nothing. Raises UserError where a label
    does not tell two groups of that size apart.
    """
    return contrastive.model_copy(update={"labels": tuple(_settled(label, sample[label.column]) for label in contrastive.labels)})


def _settled(label: Label, found: np.ndarray) -> Label:
    values = found[found != ""] if label.text else finite(numbers(found))
    levels, counts = np.unique(values, return_counts=True)
    if label.soft or (not label.text and len(levels) > label.bins):
        return _continuous(label, values)
    kept = levels[counts >= SMALLEST_GROUP].tolist()
    if len(kept) < 2:
        raise UserError(f"contrastive.labels: column {label.column!r} has fewer than two values that {SMALLEST_GROUP} people share")
    return label.model_copy(update={"levels": tuple(kept)})


def _continuous(label: Label, values: np.ndarray) -> Label:
    if len(values) < label.bins * SMALLEST_GROUP or values.std() == 0:
        raise UserError(f"contrastive.labels: column {label.column!r} has too few values for {label.bins} bins")
    if label.soft:
        return label.model_copy(update={"mean": float(values.mean()), "std": float(values.std())})
    edges = np.unique(np.quantile(values, np.arange(1, label.bins) / label.bins))
    return label.model_copy(update={"edges": tuple(edges.tolist())})


def numbers(found: np.ndarray) -> np.ndarray:
    """Text of numbers or of true and false -> floats, NaN where it is empty."""
    return np.array([np.nan if v == "" else WORDS[v] if v in WORDS else float(v) for v in found], float)


def finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def encode(table: pa.Table | pa.RecordBatch, contrastive: Contrastive, shard: str) -> np.ndarray:
    """N x labels, float32: the index of the level or bin, or the standardised value; NaN where null or of no level.

    A shard without the column has no labels. Raises DataError where it holds text in place of numbers, or the reverse.
    """
    return np.stack([_encoded(table, label, shard) for label in contrastive.labels], 1).astype(np.float32)


def _encoded(table: pa.Table | pa.RecordBatch, label: Label, shard: str) -> np.ndarray:
    if label.column not in table.schema.names:
        return np.full(len(table), np.nan)
    array = scalars(table, label.column)
    if is_text(array.type) != label.text:
        wanted = "text" if label.text else "numbers"
        raise DataError(shard, label.column, f"type {array.type}", f"{wanted}, as in the other shards", "convert the column")
    if label.text:
        return pc.index_in(array, pa.array(label.levels, array.type)).to_numpy(zero_copy_only=False).astype(float)
    values = array.cast(pa.uint8()) if pa.types.is_boolean(array.type) else array
    values = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    if label.soft:
        return np.where(np.isfinite(values), (values - label.mean) / label.std, np.nan)
    if label.edges:
        return np.where(np.isfinite(values), np.searchsorted(label.edges, values, "right"), np.nan)
    at = np.searchsorted(label.levels, values).clip(max=len(label.levels) - 1)
    return np.where(np.asarray(label.levels)[at] == values, at, np.nan)


def classes(found: np.ndarray, where: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The levels of a column of classes, given as text, and each record's: an index, -1 where it has none.

    Whole numbers are written without a point, so 1, 1.0 and true are one class; the levels of 0 and 1 are ("0", "1").
    Classes of fewer than SMALLEST_GROUP people are left out. where: what messages begin with.
    Raises UserError where two are not left, or the column is no class.
    """
    named = np.array([_class(v) for v in found], object)
    levels, counts = np.unique(named[named != ""].astype(str), return_counts=True)
    if len(levels) > MOST_CLASSES:
        raise UserError(f"{where} has {len(levels)} values; expected {MOST_CLASSES} classes or fewer")
    kept = tuple(levels[counts >= SMALLEST_GROUP].tolist())
    if len(kept) < 2:
        raise UserError(f"{where}: fewer than two classes with {SMALLEST_GROUP} people each")
    index = {name: at for at, name in enumerate(kept)}
    return kept, np.array([index.get(v, -1) for v in named])


def _class(value: str) -> str:
    if value in WORDS:
        return str(int(WORDS[value]))
    whole, point, rest = value.partition(".")
    if point and whole.lstrip("-").isdigit() and not rest.strip("0"):
        return whole
    return "" if value == "nan" else value


def labelled(table: pa.Table | pa.RecordBatch, columns: list[str]) -> np.ndarray:
    """Which records have a value in any of these columns."""
    return np.logical_or.reduce([~np.isin(texts(table, c), ("", "nan")) for c in columns])
