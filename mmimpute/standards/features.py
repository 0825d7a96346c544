"""The feature spec: which events of a subject, in what window, become which values of which modality."""

import io
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pyarrow.types as pt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from mmimpute.data import storage
from mmimpute.errors import UserError
from mmimpute.spec import Kind, modality_name, read_toml

Value = Literal["presence", "count", "last", "mean", "min", "max", "since"]
VALUES: tuple[Value, ...] = get_args(Value)
KINDS: dict[str, Kind] = {"presence": "binary", "count": "count"}  # the others are real
INDEX_TIMES = ("index_time", "prediction_time", "time")  # names of a cohort file's index time; the second is that of MEDS labels


class ModalityFeatures(BaseModel):
    """The codes of a modality, and what becomes of the events of each."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    codes: tuple[str, ...] = Field((), description="prefixes of its codes; of several that fit a code the longest counts")
    values: tuple[Value, ...] = Field(min_length=1, description="one feature of each code")
    days: float | None = Field(None, gt=0, description="length of its window; default: the file's; inf: no start")
    min_subjects: int | None = Field(None, ge=10, description="default: the file's")


class FeatureSpec(BaseModel):
    """`features.toml`: one record per subject, as of an index time."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    cohort: str | None = Field(None, description="Parquet or CSV of subject_id and index time; default: everyone at their last event")
    mapping: str | None = Field(None, description="Parquet or CSV of code and modality, and optionally the feature it is counted as")
    days: float = Field(float("inf"), gt=0, description="length of the window that ends with the index time, which is in it")
    min_subjects: int = Field(50, ge=10, description="training subjects with a value, from which on a feature is in the vocabulary")
    modalities: dict[Annotated[str, AfterValidator(modality_name)], ModalityFeatures] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self):
        if taken := {"subject_id", "index_time", "split"} & set(self.modalities):
            raise ValueError(f"modality {min(taken)!r}: that is a column of every record; give it another name")
        prefixes = [p for m in self.modalities.values() for p in m.codes]
        if twice := [p for p in prefixes if prefixes.count(p) > 1]:
            raise ValueError(f"codes {twice[0]!r} is given twice; a code belongs to one modality")
        if bare := [n for n, m in self.modalities.items() if not m.codes and not self.mapping]:
            raise ValueError(f"modalities.{bare[0]} has no codes; give prefixes, or a mapping file")
        return self

    def window(self, name: str) -> float:
        """Days."""
        own = self.modalities[name].days
        return self.days if own is None else own

    def least(self, name: str) -> int:
        return self.modalities[name].min_subjects or self.min_subjects


def read_features(path: str | Path) -> FeatureSpec:
    """The feature spec in a TOML file; paths in it are relative to the file. Raises UserError that says where and what is allowed."""
    spec = read_toml(FeatureSpec, path)
    beside = {k: _beside(path, found) for k in ("cohort", "mapping") if (found := getattr(spec, k))}
    return spec.model_copy(update=beside)


def _beside(path: str | Path, found: str) -> str:
    return found if storage.is_s3(found) or found.startswith("file://") else str(Path(path).parent / found)


def read_beside(url: str) -> tuple[pa.Table, str]:
    """A small table that a spec names, Parquet or CSV, and its ETag. Raises UserError."""
    folder, name = storage.normalise(url).rsplit("/", 1)
    try:
        content, etag = storage.read_version(folder or "/", name)
        table = _parsed(content, PurePosixPath(name).suffix)
    except FileNotFoundError:
        raise UserError(f"{url}: no such file") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError):  # its message may hold a value
        raise UserError(f"{url}: no readable Parquet or CSV file") from None
    if len(set(table.column_names)) < table.num_columns:
        raise UserError(f"{url}: two columns have the same name")
    return table, etag


def _parsed(content: bytes, suffix: str) -> pa.Table:
    if suffix != ".csv":
        table = pq.read_table(pa.BufferReader(content))
    else:
        empty_is_null = csv.ConvertOptions(null_values=[""], strings_can_be_null=True)
        table = csv.read_csv(io.BytesIO(content), convert_options=empty_is_null)
    table.validate(full=True)
    table.schema.names  # noqa: B018  names that are no UTF-8 are found here
    return table


class Lookup(NamedTuple):
    """Something of subjects. ids: sorted; place: of each id, the row of what is looked up."""

    ids: np.ndarray
    place: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray) -> "Lookup":
        place = np.argsort(ids, kind="stable")
        return cls(ids[place], place)

    def rows(self, subjects: np.ndarray) -> np.ndarray:
        """The row of each subject; -1 where there is none."""
        if not len(self.ids):
            return np.full(len(subjects), -1)
        at = np.searchsorted(self.ids, subjects).clip(max=len(self.ids) - 1)
        return np.where(self.ids[at] == subjects, self.place[at], -1)


class Cohort(NamedTuple):
    """Index times (microseconds) of a cohort file, and what else is in it: outcomes."""

    subjects: Lookup
    times: np.ndarray
    outcomes: pa.Table
    etag: str


def read_cohort(url: str) -> Cohort:
    """Raises UserError where a column is missing or of another type, or a subject is there twice."""
    table, etag = read_beside(url)
    name = next((n for n in INDEX_TIMES if n in table.column_names), None)
    if "subject_id" not in table.column_names or name is None:
        raise UserError(f"{url}: needs a column subject_id and one of {', '.join(INDEX_TIMES)}; it has {', '.join(table.column_names)}")
    ids, times = table.column("subject_id"), table.column(name)
    if not pt.is_integer(ids.type) or not (pt.is_timestamp(times.type) or pt.is_date(times.type)):
        raise UserError(f"{url}: subject_id is {ids.type} and {name} is {times.type}; expected whole numbers and times")
    if ids.null_count or times.null_count:
        raise UserError(f"{url}: {ids.null_count + times.null_count} null values in subject_id or {name}; expected none")
    if twice := len(ids) - pc.count_distinct(ids).as_py():
        raise UserError(f"{url}: {twice} subjects have more than one index time; a cohort has one record per subject")
    micros = times.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
    outcomes = table.drop_columns(["subject_id", name])
    return Cohort(Lookup.of(ids.cast(pa.int64()).to_numpy()), micros.to_numpy(), outcomes, etag)


class Mapping(NamedTuple):
    """What a mapping file says of codes: the modality's number in the spec, and the feature."""

    codes: pa.Array
    modality: np.ndarray
    feature: np.ndarray


def read_mapping(url: str, spec: FeatureSpec) -> Mapping:
    """Raises UserError where a column is missing, a code is there twice, or a modality is not in the spec."""
    table, _ = read_beside(url)
    if absent := [n for n in ("code", "modality") if n not in table.column_names]:
        raise UserError(f"{url}: no column {absent[0]!r}; it has {', '.join(table.column_names)}")
    names = list(spec.modalities)
    codes, modality = (table.column(n).cast(pa.string()).combine_chunks() for n in ("code", "modality"))
    if unknown := set(modality.unique().to_pylist()) - set(names):
        raise UserError(f"{url}: unknown modality {min(map(str, unknown))!r}; the spec has {', '.join(names)}")
    if pc.count_distinct(codes).as_py() != len(codes):
        raise UserError(f"{url}: a code is there twice; a code belongs to one modality")
    feature = table.column("feature").cast(pa.string()).combine_chunks() if "feature" in table.column_names else codes
    place = pc.index_in(modality, pa.array(names)).to_numpy()
    return Mapping(codes, place, pc.coalesce(feature, codes).to_numpy(zero_copy_only=False))


def resolve(spec: FeatureSpec, mapping: Mapping | None, codes: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Of each code the number of its modality in the spec, -1 for none, and the feature that it counts as. A mapping goes first."""
    modality, feature = np.full(len(codes), -1), codes.to_numpy(zero_copy_only=False).astype(object)
    prefixes = [(prefix, at) for at, m in enumerate(spec.modalities.values()) for prefix in m.codes]
    for prefix, at in sorted(prefixes, key=lambda p: len(p[0])):
        modality[pc.starts_with(codes, prefix).to_numpy(zero_copy_only=False)] = at
    if mapping:
        row = pc.fill_null(pc.index_in(codes, mapping.codes), -1).to_numpy()
        modality[row >= 0], feature[row >= 0] = mapping.modality[row[row >= 0]], mapping.feature[row[row >= 0]]
    return modality, feature
