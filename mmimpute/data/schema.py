"""What a cohort's columns are, settled: the spec meets the shards' Arrow schema and the profile of their values.

The schema is part of the model, so everything in it is a plain, validated value.
"""

from collections import Counter
from collections.abc import Collection
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod
from typing import Literal, NamedTuple, Self

import pyarrow as pa
import pyarrow.types as pt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmimpute.errors import DataError, UserError
from mmimpute.spec import SHAPES, CohortSpec, Decoder, Form, ModalitySpec, SpecKind, Tails

OUTPUT_SUFFIXES = ("__imputed", "__std", "__lower", "__upper", "__draws")
PROBABILITY = "__probability"  # of a head's classes
FROM_PRIOR = "from_prior"
LATENT = "z0"
CARRIED = {"impute", "hide", "tails", "noise", "decoder", "form"}  # of a modality's spec, as they are
PICKLED = "ray.data.arrow_pickled_object"  # Arrow extension type, part of Ray: who reads a value of it unpickles it
TOKENS = 64  # of a text that are read


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Feature(_Frozen):
    """One feature. `levels`: the values of an ordinal or categorical one, in order; the model sees their index."""

    name: str
    kind: SpecKind
    levels: tuple[str, ...] | tuple[float, ...] = ()


class Modality(_Frozen):
    """A modality and its columns: one list column, one column of text, or one scalar column per feature.

    Every value of an image (shape C x H x W) or a signal (T x C) is a feature, row-major, and so is the place of every token of a
    text (shape T), whose values are the tokens' number in the vocabulary from 1 on, and 0 where there are no more.
    """

    name: str
    layout: Literal["list", "scalars", "text"]
    columns: tuple[str, ...]
    types: tuple[str, ...] = Field(description="Arrow type of each column's values in the training shards")
    features: tuple[Feature, ...]
    impute: bool
    hide: float
    tails: Tails
    noise: float = 0
    decoder: Decoder = "likelihood"
    form: Form = "vector"
    shape: tuple[int, ...] = ()
    vocabulary: tuple[str, ...] = Field((), description="of a text, the most frequent token first")
    chances: tuple[float, ...] = Field((), description="share of no token, then of each of the vocabulary, among the places of a text")
    most: int = Field(0, description="tokens of the vocabulary at most")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        wanted = len(self.features) if self.layout == "scalars" else 1
        if len(self.columns) != wanted or len(self.types) != wanted:
            raise ValueError(f"{len(self.columns)} columns and {len(self.types)} types where {wanted} are wanted")
        return self

    @property
    def structured(self) -> bool:
        """Whether its values stand side by side, so that one of them alone says nothing: it is told of as a whole."""
        return self.form != "vector"

    @property
    def channel_of(self) -> tuple[int, ...]:
        """The channel of each value of an image or a signal."""
        if self.form == "image":
            return tuple(c for c in range(self.shape[0]) for _ in range(self.shape[1] * self.shape[2]))
        return tuple(range(self.shape[1])) * self.shape[0]


class Label(_Frozen):
    """A column by which contrastive training tells records alike, settled as data.labels says.

    levels: its values, where like is equal; edges: between bins; mean and std: of a soft one. The others are empty.
    """

    column: str
    text: bool
    weight: float
    bins: int
    soft: bool
    levels: tuple[str, ...] | tuple[float, ...] = ()
    edges: tuple[float, ...] = ()
    mean: float = 0.0
    std: float = 1.0


class Contrastive(_Frozen):
    """See `spec.ContrastiveSpec`."""

    labels: tuple[Label, ...]
    temperature: float
    weight: float
    alone: bool
    on: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        return [label.column for label in self.labels]


class CohortSchema(_Frozen):
    """timestamp: the column of the event time, which the model never reads; contrastive: labels that only training reads."""

    subject_id: str
    subject_type: str
    timestamp: str | None = None
    modalities: tuple[Modality, ...]
    contrastive: Contrastive | None = None

    @property
    def width(self) -> int:
        """Features of a record, over all modalities."""
        return sum(len(m.features) for m in self.modalities)

    @property
    def columns(self) -> list[str]:
        """What must be read of a shard to feed the model."""
        return [self.subject_id, *(c for m in self.modalities for c in m.columns)]

    @property
    def imputed(self) -> list[Modality]:
        return [m for m in self.modalities if m.impute]


class Place(NamedTuple):
    """Where a feature is. at: its place in the column's lists, 0 in a scalar column; flat: among all features side by side."""

    modality: Modality
    feature: Feature
    column: str
    at: int
    flat: int


def places(schema: CohortSchema) -> dict[str, Place]:
    """Every feature by the name that people give it: `labs__sodium`, or `rna[ESR1]` in a list column."""
    found: dict[str, Place] = {}
    flat = 0
    for m in schema.modalities:
        for at, feature in enumerate(() if m.form == "text" else m.features):
            in_list = m.layout == "list"
            column = m.columns[0] if in_list else m.columns[at]
            label = f"{column}[{feature.name}]" if in_list else column
            found[label] = Place(m, feature, column, at if in_list else 0, flat + at)
        flat += len(m.features)
    return found


def place_of(found: dict[str, Place], name: str, where: str) -> Place:
    """One of them. Raises UserError that names those that are like it, or the first."""
    if name not in found:
        near = get_close_matches(name, found, 8, 0.4) or list(found)
        raise UserError(f"{where}: no feature {name!r}; the model's features are called {_some(near)}")
    return found[name]


def tabled(schema: CohortSchema) -> list[tuple[int, Modality, Feature]]:
    """The features that are told of one by one, and where each is among all features side by side."""
    every = enumerate((m, f) for m in schema.modalities for f in m.features)
    return [(at, m, f) for at, (m, f) in every if not m.structured]


def is_list(kind: pa.DataType) -> bool:
    return pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)


def storage_type(kind: pa.DataType) -> pa.DataType:
    """Below an extension type (a tensor column) is a list."""
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values: the list's elements, the dictionary's values, or the column's own."""
    kind = storage_type(kind)
    return kind.value_type if is_list(kind) or pt.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Not of views: Arrow can neither count nor filter them."""
    return pt.is_string(kind) or pt.is_large_string(kind)


def is_number(kind: pa.DataType) -> bool:
    return pt.is_integer(kind) or pt.is_floating(kind) or pt.is_boolean(kind) or pt.is_decimal(kind)


def is_time(kind: pa.DataType) -> bool:
    return pt.is_date(kind) or pt.is_timestamp(kind)


def draft_schema(spec: CohortSpec, arrow: pa.Schema, widths: dict[str, int]) -> CohortSchema:
    """The spec's modalities on a shard's columns; kinds may still be `auto` and levels unknown.

    widths: length of each list column (from `list_width`).
    Raises UserError where the spec names what the shards do not have.
    """
    if spec.subject_id not in arrow.names:
        raise UserError(f"spec: subject_id column {spec.subject_id!r} is not in the shards; they have {_some(arrow.names)}")
    _check_time(spec.timestamp, arrow)
    hidden = {c for c in arrow.names if any(fnmatchcase(c, pattern) for pattern in spec.outcomes)}
    contrastive = _draft_contrastive(spec, arrow)
    labels = contrastive.columns if contrastive else []
    reserved = {spec.subject_id, spec.timestamp, *hidden, *labels}
    modalities = tuple(_draft(name, m, arrow, widths, reserved) for name, m in spec.modalities.items())
    used = [c for m in modalities for c in m.columns]
    if twice := {c for c in used if used.count(c) > 1}:
        raise UserError(f"spec: columns {_some(sorted(twice))} belong to two modalities")
    subject_type = str(value_type(arrow.field(spec.subject_id).type))
    named = {"subject_id": spec.subject_id, "subject_type": subject_type, "timestamp": spec.timestamp}
    return CohortSchema(**named, modalities=modalities, contrastive=contrastive)


def _draft_contrastive(spec: CohortSpec, arrow: pa.Schema) -> Contrastive | None:
    """Labels whose values are not settled yet. Raises UserError where one is no column of numbers or text."""
    if spec.contrastive is None:
        return None
    labels = []
    for column, label in spec.contrastive.labels.items():
        if column not in arrow.names:
            raise UserError(f"spec: contrastive.labels names {column!r}, which is not in the shards; they have {_some(arrow.names)}")
        kind = arrow.field(column).type
        inner = value_type(kind)
        if is_list(storage_type(kind)) or not (is_text(inner) or is_number(inner)):
            raise UserError(f"spec: contrastive.labels: column {column!r} is {kind}; expected numbers or text")
        if label.soft and is_text(inner):
            raise UserError(f"spec: contrastive.labels: column {column!r} is text, which has no near values; leave `soft` out")
        labels.append(Label(column=column, text=is_text(inner), **label.model_dump()))
    return Contrastive(labels=tuple(labels), **spec.contrastive.model_dump(exclude={"labels"}))


def _check_time(column: str | None, arrow: pa.Schema) -> None:
    if column and column not in arrow.names:
        raise UserError(f"spec: timestamp column {column!r} is not in the shards; they have {_some(arrow.names)}")
    if column and not is_time(arrow.field(column).type):
        raise UserError(f"spec: timestamp column {column!r} is {arrow.field(column).type}; expected dates or timestamps")


def _draft(name: str, spec: ModalitySpec, arrow: pa.Schema, widths: dict[str, int], reserved: set[str]) -> Modality:
    columns = modality_columns(name, spec, arrow, reserved)
    if spec.form == "text":
        shape = spec.shape or (TOKENS,)
        features = tuple(Feature(name=f"t{i}", kind="categorical") for i in range(shape[0]))
        types = (str(value_type(arrow.field(spec.column).type)),)
        given = spec.model_dump(include=CARRIED)
        return Modality(
            name=name, layout="text", columns=columns, types=types, features=features, shape=shape, most=spec.vocabulary, **given
        )
    if spec.form != "vector":
        return _draft_structured(name, spec, arrow.field(spec.column).type, widths[spec.column])
    if spec.column:
        found = widths[spec.column]
        names = spec.features or tuple(f"f{i}" for i in range(found))
        if len(names) != found:
            raise UserError(f"spec: modalities.{name} names {len(names)} features, column {spec.column!r} has lists of {found}")
    else:
        names = tuple(c.removeprefix(spec.prefix) for c in columns)
    kinds = spec.kinds if isinstance(spec.kinds, tuple) else (spec.kinds,) * len(names)
    if len(kinds) != len(names):
        raise UserError(f"spec: modalities.{name} has {len(kinds)} kinds for {len(names)} features")
    if unknown := set(spec.levels) - set(names):
        raise UserError(f"spec: modalities.{name}.levels names unknown features {_some(sorted(unknown))}")
    types = [str(value_type(arrow.field(c).type)) for c in columns]
    text = [is_text(value_type(arrow.field(c).type)) for c in columns] * (len(names) if spec.column else 1)
    kinds = tuple("categorical" if t and k == "auto" else k for t, k in zip(text, kinds, strict=True))
    if bad := [n for n, t, k in zip(names, text, kinds, strict=True) if t and k != "categorical"]:
        raise UserError(f"spec: modalities.{name}: features {_some(bad)} are text, so their kind must be categorical")
    features = tuple(Feature(name=n, kind=k, levels=spec.levels.get(n, ())) for n, k in zip(names, kinds, strict=True))
    layout = "list" if spec.column else "scalars"
    rest = spec.model_dump(include=CARRIED)
    return Modality(name=name, layout=layout, columns=columns, types=tuple(types), features=features, **rest)


def _draft_structured(name: str, spec: ModalitySpec, kind: pa.DataType, width: int) -> Modality:
    """An image or a signal. Raises UserError where its shape is not known, or is not that of the column's values."""
    own = tensor_shape(kind)
    shape = spec.shape or own
    if len(shape) != (3 if spec.form == "image" else 2) or prod(shape) != width or (own and own != shape):
        found = f"tensors of shape {list(own)}" if own else f"lists of {width}"
        raise UserError(f"spec: modalities.{name} needs `shape` = {SHAPES[spec.form]} of column {spec.column!r}, which holds {found}")
    inner = value_type(kind)
    if spec.form == "image" and not pt.is_uint8(inner):
        raise UserError(f'spec: modalities.{name}: images are uint8, column {spec.column!r} is {kind}; convert it, or use form = "signal"')
    features = tuple(Feature(name=f"f{i}", kind="real") for i in range(width))
    rest = spec.model_dump(include=CARRIED)
    return Modality(name=name, layout="list", columns=(spec.column,), types=(str(inner),), features=features, shape=shape, **rest)


def tensor_shape(kind: pa.DataType) -> tuple[int, ...]:
    """The shape that a tensor column states, row-major; () for other columns."""
    permuted = isinstance(kind, pa.FixedShapeTensorType) and kind.permutation not in (None, list(range(len(kind.shape))))
    return tuple(kind.shape) if isinstance(kind, pa.FixedShapeTensorType) and not permuted else ()


def modality_columns(name: str, spec: ModalitySpec, arrow: pa.Schema, reserved: set[str]) -> tuple[str, ...]:
    """The columns of one modality in a shard's schema. Raises UserError where there are none, or the wrong ones."""
    if spec.column:
        columns = (spec.column,)
    elif spec.features:
        columns = tuple(spec.prefix + f for f in spec.features)
    else:
        names = set(arrow.names)
        columns = tuple(c for c in arrow.names if c.startswith(spec.prefix) and c not in reserved and not is_output(c, names))
    absent = [c for c in columns if c not in arrow.names]
    if absent or not columns:
        what = f"column {absent[0]!r}" if absent else f"a column that starts with {spec.prefix!r}"
        raise UserError(f"spec: modalities.{name} needs {what}; the shards have {_some(arrow.names)}")
    if taken := [c for c in columns if c in reserved]:
        raise UserError(f"spec: modalities.{name} may not use {taken[0]!r}: it is the subject id, the timestamp, an outcome or a label")
    for column in columns:
        kind = arrow.field(column).type
        if spec.form == "text":
            if not is_text(value_type(kind)) or is_list(storage_type(kind)):
                raise UserError(f"spec: modalities.{name}: column {column!r} is {kind}; expected text")
            continue
        if is_list(storage_type(kind)) != bool(spec.column):
            raise UserError(f"spec: modalities.{name}: column {column!r} is {kind}; use `column` for lists and `prefix` for scalars")
        inner = value_type(kind)
        if not is_number(inner) and (spec.column or not is_text(inner)):
            raise UserError(f"spec: modalities.{name}: column {column!r} is {kind}; expected numbers" + ("" if spec.column else " or text"))
    return columns


def _some(names) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def check_columns(schema: CohortSchema, arrow: pa.Schema, shard: str) -> None:
    """A shard's footer against the schema. Raises DataError: column missing, there twice, of the wrong type or width, or pickled."""
    if twice := [name for name, count in Counter(arrow.names).items() if count > 1]:
        raise DataError(shard, twice[0], "two columns of this name", "each name once", "rename or drop one of them")
    if schema.subject_id not in arrow.names:
        raise DataError(shard, schema.subject_id, "no such column", "the subject id", "add the column or mend subject_id in the spec")
    if PICKLED in arrow.to_string(truncate_metadata=False, show_schema_metadata=False):
        raise DataError(shard, _pickled(arrow), "pickled Python objects, which can run code", "plain values", "convert the column")
    if not _is_id(kind := arrow.field(schema.subject_id).type):
        raise DataError(shard, schema.subject_id, f"type {kind}", "ids of text or numbers", "convert the column")
    for modality in schema.modalities:
        for column, trained in zip(modality.columns, modality.types, strict=True):
            if column not in arrow.names:
                raise DataError(shard, column, "no such column", f"modality {modality.name}", "add the column, null where not known")
            _check_type(modality, column, trained, arrow.field(column).type, shard)
    if taken := [c for c in output_columns(schema) if c in arrow.names]:
        raise DataError(shard, taken[0], "a column that imputation writes", "raw records", "drop it, or leave enriched shards out")


def _is_id(kind: pa.DataType) -> bool:
    """Ids are counted and become Python values, which times beyond the year 9999 cannot."""
    inner = value_type(kind)
    odd = pt.is_temporal(inner) or pt.is_string_view(inner) or pt.is_binary_view(inner)
    return not (odd or pt.is_nested(storage_type(kind)) or isinstance(kind, pa.ExtensionType))


def _pickled(arrow: pa.Schema) -> str:
    """The first column that holds Ray's pickled objects, at any depth, whether Ray is there to read them or not."""
    return next(f.name for f in arrow if PICKLED in pa.schema([f]).to_string(truncate_metadata=False))


def _check_type(modality: Modality, column: str, trained: str, kind: pa.DataType, shard: str) -> None:
    wanted = "text" if trained in ("string", "large_string") else "numbers"
    if modality.layout == "list":
        wanted = f"lists of {len(modality.features)} numbers"
    if modality.form == "image":
        wanted = f"{len(modality.features)} uint8 values of shape {list(modality.shape)}"
    inner, storage = value_type(kind), storage_type(kind)
    right = is_list(storage) == (modality.layout == "list") and (is_text(inner) if wanted == "text" else is_number(inner))
    right = right and (modality.form != "image" or pt.is_uint8(inner)) and tensor_shape(kind) in ((), modality.shape or tensor_shape(kind))
    width = storage.list_size if pt.is_fixed_size_list(storage) else len(modality.features)
    if not right or (modality.layout == "list" and width != len(modality.features)):
        raise DataError(shard, column, f"type {kind}", wanted, "convert the column")


def is_output(column: str, names: Collection[str]) -> bool:
    """Whether imputation wrote a column: X is beside its X__upper. `limbs__upper` with no `limbs` is a feature."""
    return any(column.endswith(s) and column.removesuffix(s) in names for s in (*OUTPUT_SUFFIXES, PROBABILITY))


def output_columns(schema: CohortSchema) -> list[str]:
    """Every column that imputation may add."""
    return [c + s for m in schema.imputed for c in m.columns for s in OUTPUT_SUFFIXES] + [FROM_PRIOR, LATENT]
