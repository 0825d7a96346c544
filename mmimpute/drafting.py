"""A cohort spec drafted from the shards themselves, for people to read and mend."""

import json

import pyarrow as pa
import pyarrow.types as pt

from mmimpute.data.profile import MOST_LEVELS, Statistics
from mmimpute.data.schema import CohortSchema, is_list, is_number, is_output, is_text, is_time, storage_type, tensor_shape, value_type
from mmimpute.errors import UserError
from mmimpute.spec import CohortSpec, ModalitySpec

SUBJECT_NAMES = ("subject_id", "patient_id", "person_id", "id")
OUTCOMES = "outcome__"
PLAIN = "columns"  # name of the modality of a table whose columns' names tell of none
GROUPS = ("sex", "gender", "female", "male", "age", "race", "ethnicity")  # names of columns by which a model card tells the accuracy


def guess_spec(arrow: pa.Schema) -> CohortSpec:
    """List columns are modalities; so are scalar columns that share the part before `__`; `outcome__*` are outcomes.

    Where there is neither, all columns of numbers or text are one modality. Raises UserError where there are none.
    """
    subject = subject_of(arrow)
    times = [f.name for f in arrow if pt.is_temporal(f.type) and f.name != subject]
    modalities, plain, names = {}, [], set(arrow.names)
    for field in arrow:
        prefix, divided, _ = field.name.partition("__")
        inner = value_type(field.type)
        if field.name in (subject, *times) or field.name.startswith(OUTCOMES) or is_output(field.name, names):
            continue
        if is_list(storage_type(field.type)):
            if is_number(inner):
                modalities[field.name.replace("__", "_")] = ModalitySpec(column=field.name, form=_form(field.type))
        elif is_number(inner) or is_text(inner):
            if divided and prefix:
                modalities[prefix] = ModalitySpec(prefix=f"{prefix}__")
            else:
                plain.append(field.name)
    if not modalities and plain:
        modalities[PLAIN] = ModalitySpec(prefix="", features=tuple(plain))
    if not modalities:
        raise UserError("no modality found: expected list columns or columns of numbers or text; write the spec by hand")
    outcomes = (f"{OUTCOMES}*",) if any(n.startswith(OUTCOMES) for n in arrow.names) else ()
    groups = tuple(f.name for f in arrow if _is_group(f.name) and not is_list(storage_type(f.type)))
    timestamp = next((n for n in times if is_time(arrow.field(n).type)), None)
    return CohortSpec(subject_id=subject, timestamp=timestamp, outcomes=outcomes, subgroups=groups, modalities=modalities)


def subject_of(arrow: pa.Schema) -> str:
    """The column that is the subject's id by its name, else the first."""
    return next((n for n in SUBJECT_NAMES if n in arrow.names), arrow.names[0])


def _form(kind: pa.DataType) -> str:
    """Tensors of three dimensions and bytes are images, of two signals."""
    dimensions = len(tensor_shape(kind))
    return "image" if dimensions == 3 and pt.is_uint8(value_type(kind)) else "signal" if dimensions == 2 else "vector"


def _is_group(column: str) -> bool:
    """demo__sex, age and demo__race_3.0 are; medications__age_spots is not."""
    name = column.rpartition("__")[2].lower()
    return name in GROUPS or name.startswith(("race_", "ethnicity_"))


def without_free_text(spec: CohortSpec, schema: CohortSchema, seen: Statistics) -> CohortSpec:
    """The spec without text columns that have too many levels to be a category; the same spec where there are none."""
    modalities, at = dict(spec.modalities), 0
    for modality in schema.modalities:
        levels = seen.levels[at : at + len(modality.features)]
        at += len(modality.features)
        kept = tuple(f.name for f, n in zip(modality.features, levels, strict=True) if n is None or len(n) <= MOST_LEVELS)
        if not kept:
            del modalities[modality.name]
        elif len(kept) < len(modality.features):
            modalities[modality.name] = modalities[modality.name].model_copy(update={"features": kept})
    return spec.model_copy(update={"modalities": modalities})


def left_out(spec: CohortSpec, schema: CohortSchema, arrow: pa.Schema) -> list[str]:
    """Columns that the spec makes no use of."""
    used = {*schema.columns, spec.timestamp}
    return [n for n in arrow.names if n not in used and not n.startswith(OUTCOMES)]


def to_toml(spec: CohortSpec, schema: CohortSchema, unused: list[str]) -> str:
    """The settled spec as TOML. JSON writes strings, numbers and lists of them as TOML does."""
    lines = ["# Drafted by `mmimpute describe` from the shards. Check the kinds, and which columns are outcomes."]
    if unused:
        lines.append("# Columns left out (free text, dates, or no modality in their name): " + ", ".join(map(repr, unused)))
    lines.append(f"subject_id = {json.dumps(spec.subject_id)}")
    if spec.timestamp:
        lines.append(f"timestamp = {json.dumps(spec.timestamp)}")
    if spec.outcomes:
        lines.append(f"outcomes = {json.dumps(list(spec.outcomes))}")
    if spec.subgroups:
        lines.append(f"subgroups = {json.dumps(list(spec.subgroups))}")
    for modality in schema.modalities:
        lines += ["", *_modality(spec.modalities[modality.name], modality)]
    return "\n".join(lines) + "\n"


def _modality(spec: ModalitySpec, modality) -> list[str]:
    head = [f"[modalities.{json.dumps(modality.name)}]"]
    head.append(f"column = {json.dumps(spec.column)}" if spec.column else f"prefix = {json.dumps(spec.prefix)}")
    if modality.structured:
        return [*head, f"form = {json.dumps(modality.form)}", f"shape = {json.dumps(list(modality.shape))}"]
    lines = head + features_toml([f.name for f in modality.features], [f.kind for f in modality.features])
    if levels := {f.name: f.levels for f in modality.features if f.levels}:
        lines.append(f"[modalities.{json.dumps(modality.name)}.levels]")
        lines += [f"{json.dumps(feature)} = {json.dumps(list(values))}" for feature, values in levels.items()]
    return lines


def features_toml(names: list[str], kinds: list[str]) -> list[str]:
    """The lines of a modality's features, and their kinds: one where all have it."""
    return [f"features = {json.dumps(names)}", f"kinds = {json.dumps(kinds[0] if len(set(kinds)) == 1 else kinds)}"]
