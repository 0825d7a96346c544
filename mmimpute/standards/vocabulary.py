"""Which features a cohort has: those that enough training subjects have a value of; and the cohort's spec."""

import json
from collections.abc import Iterable
from functools import cached_property

from pydantic import BaseModel, ConfigDict

from mmimpute.data.table import digest
from mmimpute.drafting import OUTCOMES, features_toml
from mmimpute.errors import UserError
from mmimpute.spec import Kind
from mmimpute.standards.features import KINDS, FeatureSpec, Value

Counts = dict[str, dict[str, dict[Value, int]]]  # modality -> feature -> value -> subjects


class Vocabulary(BaseModel):
    """The features of every modality, settled: (feature, value), sorted. spec: stands for that by which they were chosen."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    spec: str
    subjects: int
    modalities: dict[str, tuple[tuple[str, Value], ...]]

    @cached_property
    def digest(self) -> str:
        return digest(self.model_dump_json())


def add(total: Counts, found: Counts) -> None:
    for name, features in found.items():
        mine = total.setdefault(name, {})
        for feature, values in features.items():
            sums = mine.setdefault(feature, {})
            for value, subjects in values.items():
                sums[value] = sums.get(value, 0) + subjects


def settle(spec: FeatureSpec, about: str, counts: Counts, subjects: int) -> Vocabulary:
    """about: stands for the spec. Raises UserError where a modality has no feature."""
    kept = {}
    for name in spec.modalities:
        least, found = spec.least(name), counts.get(name, {})
        kept[name] = tuple(sorted((f, v) for f, values in found.items() for v, n in values.items() if n >= least))
        if not kept[name]:
            raise UserError(
                f"features: modalities.{name}: none of its {len(found):,} codes has values of {least} of {subjects:,} training subjects "
                "in the window; mend codes or window, lower min_subjects, or leave it out"
            )
    return Vocabulary(spec=about, subjects=subjects, modalities=kept)


def cohort_toml(vocabulary: Vocabulary, outcomes: Iterable[str]) -> str:
    """The cohort spec of the records."""
    lines = [
        "# Written by `mmimpute ingest meds`. A feature is <code>//<value>; times are days before the index time.",
        'subject_id = "subject_id"',
        'timestamp = "index_time"',
    ]
    if list(outcomes):
        lines.append(f"outcomes = {json.dumps([OUTCOMES + '*'])}")
    for name, features in vocabulary.modalities.items():
        lines += ["", f"[modalities.{json.dumps(name)}]", f"column = {json.dumps(name)}"]
        lines += features_toml([f"{feature}//{value}" for feature, value in features], [kind_of(value) for _, value in features])
    return "\n".join(lines) + "\n"


def kind_of(value: Value) -> Kind:
    return KINDS.get(value, "real")
