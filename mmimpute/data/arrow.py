"""The one way from Arrow to arrays, and the one way back.

Records are one array per modality, N x D, NaN where a value is not observed. Values of ordinal and categorical
features are the index of their level. float64 where the column holds more than float32 can, so that what was
observed is copied exactly.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmimpute.data.schema import FROM_PRIOR, LATENT, CohortSchema, Feature, Modality, is_list, is_text, storage_type, value_type
from mmimpute.errors import DataError

TOKEN = re.compile(r"[^\W_]+")
MOST = 3.4028235e38  # what rounds to a float of 32 bits
UNSEEN = -1  # index of a value of no known level


class Imputation(NamedTuple):
    """What the model says of one modality, in the units of the records: N x D each, draws S x N x D; None: not wanted.

    lower, upper: bounds of an interval; those of binary and categorical features are never read.
    """

    mean: np.ndarray
    std: np.ndarray
    lower: np.ndarray | None
    upper: np.ndarray | None
    draws: np.ndarray | None


def decode(table: pa.Table | pa.RecordBatch, schema: CohortSchema, shard: str, strict: bool = True) -> dict[str, np.ndarray]:
    """Records of a shard. Raises DataError: a list of the wrong length, infinity, a value that its kind or levels do not allow.

    strict=False: such a value is let through, one of no known level as UNSEEN.
    """
    return {m.name: _decode_modality(table, m, shard, strict) for m in schema.modalities}


def flat(records: Mapping[str, np.ndarray]) -> np.ndarray:
    """All modalities side by side, N x width, float32."""
    return np.concatenate([x.astype(np.float32, copy=False) for x in records.values()], axis=1)


def check_subjects(ids: pa.ChunkedArray, column: str, shard: str) -> None:
    """Raises DataError where a shard has no records, or a subject id is null or there twice."""
    if len(ids) == 0:
        raise DataError(shard, None, "no records", "at least one", "remove the shard")
    if ids.null_count:
        raise DataError(shard, column, f"{ids.null_count} null subject ids", "an id in every record", "fill or drop those records")
    distinct = pc.count_distinct(_one(ids)).as_py()
    if distinct != len(ids):
        raise DataError(shard, column, f"{len(ids) - distinct} repeated subject ids", "each once", "merge or drop the repeated records")


def _decode_modality(table, modality: Modality, shard: str, strict: bool) -> np.ndarray:
    arrays = [_one(table.column(c)) for c in modality.columns]
    if modality.layout == "text":
        return token_ids(arrays[0], modality)
    if modality.layout == "list":
        x = _decode_list(arrays[0], len(modality.features), modality.columns[0], shard)
    else:
        x = _stack(
            [_decode_scalar(a, f, c, shard, strict) for a, f, c in zip(arrays, modality.features, modality.columns, strict=True)],
            len(table),
        )
    beyond = np.abs(x) > MOST
    if beyond.any():
        at = int(beyond.any(0).argmax())
        found = f"{beyond[:, at].sum()} infinite values, or beyond 3.4e38"
        raise DataError(shard, _label(modality, at), found, "finite numbers or null", "write null where not known")
    if not x.flags.writeable and any(f.levels for f in modality.features):
        x = x.copy()  # a view of the Arrow buffer, and levels are replaced by their index
    for at, feature in enumerate(modality.features):
        if strict:
            _check_kind(x[:, at], feature, _label(modality, at), shard)
        if feature.levels and not isinstance(feature.levels[0], str):
            _index_levels(x[:, at], feature, _label(modality, at), shard, strict)
    return x


def _one(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as one array, without its extension type (a tensor) and its dictionary."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # what combine_chunks leaves of a column with no chunk
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    array = array.storage if isinstance(array.type, pa.BaseExtensionType) else array
    return array.dictionary_decode() if pt.is_dictionary(array.type) else array


def _decode_list(array: pa.Array, width: int, column: str, shard: str) -> np.ndarray:
    present = array.is_valid().to_numpy(zero_copy_only=False)
    lengths = pc.drop_null(pc.list_value_length(array))
    if len(lengths) and not pc.all(pc.equal(lengths, width)).as_py():
        wrong = pc.sum(pc.not_equal(lengths, width)).as_py()
        raise DataError(
            shard, column, f"{wrong} lists of another length", f"lists of {width}", "pad with null, or mend `features` in the spec"
        )
    values = _numbers(array.flatten()).reshape(-1, width)  # flatten skips null lists
    if present.all():
        return values
    x = np.full((len(array), width), np.nan, values.dtype)
    x[present] = values
    return x


def tokens(text: str) -> list[str]:
    """Words and numbers in lower case, in their order."""
    return TOKEN.findall(text.lower())


def token_ids(array: pa.Array, modality: Modality) -> np.ndarray:
    """N x T: each text's first tokens of the vocabulary as their number, from 1 on, then 0; NaN where there is no text."""
    known = {token: float(at) for at, token in enumerate(modality.vocabulary, 1)}
    x = np.zeros((len(array), modality.shape[0]), np.float32)
    for row, text in enumerate(array.to_pylist()):
        if text is None:
            x[row] = np.nan
            continue
        ids = [known[t] for t in tokens(text) if t in known][: x.shape[1]]
        x[row, : len(ids)] = ids
    return x


def texts_of(x: np.ndarray, modality: Modality) -> list[str]:
    """Rows of token ids as texts: their tokens with spaces between them."""
    words = ("", *modality.vocabulary)
    return [" ".join(words[int(i)] for i in row if i > 0) for row in x]


def texts(table: pa.Table, column: str) -> np.ndarray:
    """A column of scalars as text, empty where there is no value or no such column: of what is beside the model's own columns."""
    if column not in table.column_names:
        return np.full(len(table), "", object)
    return pc.fill_null(pc.cast(scalars(table, column), pa.string()), "").to_numpy(zero_copy_only=False)


def scalars(table: pa.Table | pa.RecordBatch, column: str) -> pa.Array:
    """A column of single values as one array."""
    return _one(table.column(column))


def _decode_scalar(array: pa.Array, feature: Feature, column: str, shard: str, strict: bool) -> np.ndarray:
    if not is_text(array.type):
        return _numbers(array)
    if not feature.levels:  # profiling: only whether there is a value
        return np.where(array.is_valid().to_numpy(zero_copy_only=False), np.float32(0), np.float32(np.nan))
    index = pc.index_in(array, pa.array(feature.levels, array.type))
    if unknown := index.null_count - array.null_count:
        if strict:
            raise _unknown_level(shard, column, unknown)
        index = pc.if_else(array.is_valid(), pc.fill_null(index, UNSEEN), None)
    return _numbers(index)


def _numbers(array: pa.Array) -> np.ndarray:
    """Floats with NaN for null; float32 where that loses nothing."""
    if pt.is_boolean(array.type):
        array = array.cast(pa.uint8())
    array = array.cast(float_type(array.type), safe=False)  # whole numbers beyond 2^53 are rounded
    return array.to_numpy(zero_copy_only=False)


def float_type(kind: pa.DataType) -> pa.DataType:
    """The float type that completed values of a column of numbers are held in."""
    small = pt.is_float16(kind) or pt.is_float32(kind) or pt.is_boolean(kind) or (pt.is_integer(kind) and kind.bit_width <= 16)
    return pa.float32() if small else pa.float64()


def _stack(columns: list[np.ndarray], rows: int) -> np.ndarray:
    x = np.empty((rows, len(columns)), np.result_type(*columns))
    for at, values in enumerate(columns):
        x[:, at] = values
    return x


def _check_kind(values: np.ndarray, feature: Feature, label: str, shard: str) -> None:
    if feature.kind == "binary" and (wrong := int(((values != 0) & (values != 1) & ~np.isnan(values)).sum())):
        raise DataError(shard, label, f"{wrong} values other than 0 and 1", "a binary feature", "mend the values or its kind in the spec")
    if feature.kind == "count" and (wrong := int(((values < 0) | (values % 1 > 0)).sum())):
        raise DataError(shard, label, f"{wrong} values that are no counts", "0, 1, 2, ...", "mend the values or its kind in the spec")


def _index_levels(values: np.ndarray, feature: Feature, label: str, shard: str, strict: bool) -> None:
    """Numeric levels become their index, in place."""
    index = np.searchsorted(feature.levels, values).clip(max=len(feature.levels) - 1)
    known, seen = np.asarray(feature.levels)[index] == values, ~np.isnan(values)
    if strict and (unknown := int((~known & seen).sum())):
        raise _unknown_level(shard, label, unknown)
    values[seen] = np.where(known, index, UNSEEN)[seen]


def _unknown_level(shard: str, label: str, count: int) -> DataError:
    action = "mend the values, or list every level under `levels` in the spec and fit again"
    return DataError(shard, label, f"{count} values of no known level", "the levels of the training data", action)


def _label(modality: Modality, at: int) -> str:
    column = modality.columns[0] if modality.layout == "list" else modality.columns[at]
    return f"{column}[{modality.features[at].name}]" if modality.layout == "list" else column


def enriched_schema(schema: CohortSchema, arrow: pa.Schema, interval: bool, draws: int, latent: bool) -> pa.Schema:
    """Input columns as they are, then the imputed ones."""
    fields = list(arrow)
    for modality in schema.imputed:
        for column in modality.columns:
            types = _output_types(arrow.field(column).type, interval and not modality.structured, draws, modality.form == "image")
            fields += [pa.field(column + suffix, kind) for suffix, kind in types.items()]
    fields.append(pa.field(FROM_PRIOR, pa.bool_(), nullable=False))
    if latent:
        fields.append(pa.field(LATENT, pa.list_(pa.float32())))
    return pa.schema(fields, arrow.metadata)


def _output_types(kind: pa.DataType, interval: bool, draws: int, image: bool = False) -> dict[str, pa.DataType]:
    """By suffix. Lists stay lists and tensors tensors of their shape. Draws of an image are of its own type, whole numbers from 0 to
    255; its `X__imputed` is no image but the mean of all that it may be, in floats.
    """
    storage, inner = storage_type(kind), value_type(kind)
    value = inner if is_text(inner) else float_type(inner)
    spread = pa.float32() if is_text(inner) else value
    drawn = inner if image else value
    if is_list(storage):
        value, spread, drawn = (_list_like(kind, t) for t in (value, spread, drawn))
    bounds = {"__lower": value, "__upper": value} if interval and not is_text(inner) else {}
    return {"__imputed": value, "__std": spread} | bounds | ({"__draws": pa.list_(drawn)} if draws else {})


def _list_like(kind: pa.DataType, inner: pa.DataType) -> pa.DataType:
    """The type of a list or tensor column with other values in it."""
    if isinstance(kind, pa.FixedShapeTensorType):
        return pa.fixed_shape_tensor(inner, kind.shape, kind.dim_names, kind.permutation)
    storage = storage_type(kind)
    return pa.list_(inner, storage.list_size if pt.is_fixed_size_list(storage) else -1)


def enrich(
    batch: pa.RecordBatch,
    out: pa.Schema,
    schema: CohortSchema,
    records: Mapping[str, np.ndarray],
    imputed: Mapping[str, Imputation],
    latent: np.ndarray | None,
    further: Sequence[pa.Array] = (),
) -> pa.RecordBatch:
    """Input columns unchanged, then per column X of an imputed modality: completed values, their std, bounds, draws.

    All are null on rows where nothing of the modality was missing. records, imputed: by modality, N x D; further: columns for the end.
    """
    columns = list(batch.columns)
    for modality in schema.imputed:
        columns += _modality_columns(modality, records[modality.name], imputed[modality.name], out)
    columns.append(pa.array(np.logical_and.reduce([np.isnan(x).all(1) for x in records.values()])))
    if latent is not None:
        columns.append(column_of(latent.astype(np.float32), out.field(LATENT).type))
    return pa.RecordBatch.from_arrays([*columns, *further], schema=out)


def column_of(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """N numbers, or N x D as lists."""
    return _lists(values, np.ones(len(values), bool), kind) if is_list(kind) else pa.array(values, kind)


def _modality_columns(modality: Modality, x: np.ndarray, imputed: Imputation, out: pa.Schema) -> list[pa.Array]:
    """`X__imputed`, `X__std` and, where they are wanted, `X__lower`, `X__upper`, `X__draws` of each of a modality's columns."""
    rows = np.isnan(x).any(1)
    if modality.layout == "text":
        return _text_columns(modality, rows, imputed, out)
    completed = _completed(modality, x, imputed)
    arrays = []
    for at, column in enumerate(modality.columns):
        for suffix, values in completed.items():
            if out.get_field_index(column + suffix) < 0:  # bounds of text, images and signals
                continue
            features = modality.features if modality.layout == "list" else modality.features[at : at + 1]
            part = values if modality.layout == "list" else values[..., at : at + 1]
            part = _in_units(part, features, spread=suffix == "__std")
            arrays.append(_column(part, features, rows, out.field(column + suffix).type))
    return arrays


def _text_columns(modality: Modality, rows: np.ndarray, imputed: Imputation, out: pa.Schema) -> list[pa.Array]:
    """Of a text that is missing: its most probable tokens, the most probable first; one deviation; draws are bags of tokens, most
    frequent first. N x T ids, of which those of the other rows are not read."""
    (column,), n = modality.columns, len(rows)
    told = lambda x: np.array([*texts_of(x, modality), None], object)[:-1]  # noqa: E731
    arrays = [
        pa.array(told(imputed.mean), out.field(f"{column}__imputed").type, mask=~rows),
        pa.array(imputed.std[:, 0].astype(np.float32), mask=~rows),
    ]
    if imputed.draws is not None:
        draws, kind = len(imputed.draws), out.field(f"{column}__draws").type
        ordered = np.sort(np.where(imputed.draws > 0, imputed.draws, np.inf), -1)
        bags = told(np.where(np.isinf(ordered), 0, ordered).swapaxes(0, 1).reshape(n * draws, -1))
        offsets = pa.array(np.arange(n + 1, dtype=np.int32) * draws)
        arrays.append(pa.ListArray.from_arrays(offsets, pa.array(bags, kind.value_type), type=kind, mask=pa.array(~rows)))
    return arrays


def _completed(modality: Modality, x: np.ndarray, imputed: Imputation) -> dict[str, np.ndarray]:
    """By suffix: what was observed as it is, what was missing as the model says. Bounds that a feature cannot have are NaN."""
    missing = np.isnan(x)
    completed = {"__imputed": np.where(missing, imputed.mean, x), "__std": np.where(missing, imputed.std, 0)}
    if imputed.lower is not None:
        bounded = [f.kind not in ("binary", "categorical") for f in modality.features]
        for suffix, bound in (("__lower", imputed.lower), ("__upper", imputed.upper)):
            completed[suffix] = np.where(bounded, np.where(missing, bound, x), np.nan)
    if imputed.draws is not None:
        completed["__draws"] = np.where(missing, imputed.draws, x)
    return completed


def _in_units(values: np.ndarray, features, spread: bool) -> np.ndarray:
    """Level indices back to numeric levels; an expected index lies between two of them.

    spread: values are standard deviations, which only an ordinal feature's spacing scales.
    """
    for at, feature in enumerate(features):
        if feature.levels and not isinstance(feature.levels[0], str) and not (spread and feature.kind == "categorical"):
            levels = np.asarray(feature.levels)
            values = values if values.flags.owndata else values.copy()
            if spread:
                values[..., at] *= (levels[-1] - levels[0]) / max(len(levels) - 1, 1)
            else:
                values[..., at] = np.interp(values[..., at], np.arange(len(levels)), levels)
    return values


def _column(values: np.ndarray, features, rows: np.ndarray, kind: pa.DataType) -> pa.Array:
    """(S x) N x D completed values as one Arrow column, null where `rows` is false and where a number is NaN."""
    if values.ndim == 3:
        draws, n, width = values.shape
        inner = _column(values.swapaxes(0, 1).reshape(n * draws, width), features, np.ones(n * draws, bool), kind.value_type)
        offsets = pa.array(np.arange(n + 1, dtype=np.int32) * draws)
        return pa.ListArray.from_arrays(offsets, inner, type=kind, mask=pa.array(~rows))
    if is_list(storage_type(kind)):
        return _lists(values, rows, kind)
    if is_text(kind):
        index = pa.array(np.nan_to_num(values[:, 0]).astype(np.int32), mask=~rows)
        return pa.array(features[0].levels, kind).take(index)
    return pa.array(values[:, 0].astype(kind.to_pandas_dtype(), copy=False), mask=~rows | np.isnan(values[:, 0]))


def _lists(values: np.ndarray, rows: np.ndarray, kind: pa.DataType) -> pa.Array:
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, _lists(values, rows, kind.storage_type))
    n, width = values.shape
    flat_values = pa.array(np.ascontiguousarray(values).reshape(-1), from_pandas=True).cast(kind.value_type)
    if pt.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(flat_values, type=kind, mask=pa.array(~rows))
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * width)
    return pa.ListArray.from_arrays(offsets, flat_values, type=kind, mask=pa.array(~rows))


def in_columns(modality: Modality, x: np.ndarray) -> dict[str, pa.Array]:
    """Complete records of a modality, N x D, as columns of the types that the cohort has; images and signals as tensors."""
    if modality.layout == "text":
        return {modality.columns[0]: pa.array(texts_of(np.where(x > 0, x, 0), modality), pa.type_for_alias(modality.types[0]))}
    if modality.layout == "list":
        values, inner = _in_units(x, modality.features, spread=False), pa.type_for_alias(modality.types[0])
        kind = pa.fixed_shape_tensor(inner, modality.shape) if modality.structured else pa.list_(inner)
        return {modality.columns[0]: _lists(values, np.ones(len(x), bool), kind)}
    return {
        column: _scalars(x[:, at : at + 1], feature, kind)
        for at, (column, feature, kind) in enumerate(zip(modality.columns, modality.features, modality.types, strict=True))
    }


def _scalars(x: np.ndarray, feature: Feature, kind: str) -> pa.Array:
    target = pa.decimal128(38, 9) if kind.startswith("decimal") else pa.type_for_alias(kind)
    if is_text(target):
        return _column(x, (feature,), np.ones(len(x), bool), target)
    values = _in_units(x, (feature,), spread=False)[:, 0].astype(np.float64)
    if pt.is_integer(target):
        bounds = np.iinfo(target.to_pandas_dtype())
        values = values.round().clip(bounds.min, bounds.max)
    return pa.array(values).cast(target, safe=False)
