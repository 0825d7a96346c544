"""One MEDS shard becomes record shards. Plain functions; the cluster only calls them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import mmimpute
from mmimpute.data import storage
from mmimpute.data.shards import Shard, publish_table
from mmimpute.data.table import digest, source
from mmimpute.drafting import OUTCOMES
from mmimpute.standards.features import KINDS, Cohort, FeatureSpec, Mapping, read_cohort, read_mapping, resolve
from mmimpute.standards.meds import DATA, STATIC, TRAIN, Events, Splits, read_events, read_splits
from mmimpute.standards.vocabulary import Counts, Vocabulary
from mmimpute.standards.windows import Window, aggregates, last_times, window

MADE_FROM, PARTS = "mmimpute.made_from", "mmimpute.parts"  # metadata of a record shard: its input, and all shards that came of it


@dataclass(frozen=True)
class Source:
    """A MEDS dataset and what is wanted of it."""

    url: str
    spec: FeatureSpec
    mapping: Mapping | None
    cohort: Cohort | None
    splits: Splits | None

    @classmethod
    def of(cls, url: str, spec: FeatureSpec) -> "Source":
        """Raises UserError where a file that the spec names, or the splits, cannot be read."""
        mapping = read_mapping(spec.mapping, spec) if spec.mapping else None
        return cls(url, spec, mapping, read_cohort(spec.cohort) if spec.cohort else None, read_splits(url))

    @property
    def about(self) -> str:
        """Stands for what the spec and its mapping say of features; whom the cohort names is no part of it."""
        mapped = [pa.array(a).to_pylist() for a in self.mapping] if self.mapping else None
        return digest(self.spec.model_dump_json(exclude={"cohort", "mapping"}), json.dumps(mapped))

    @property
    def outcomes(self) -> list[str]:
        return [OUTCOMES + name for name in self.cohort.outcomes.column_names] if self.cohort else []

    def made_from(self, shard: Shard, vocabulary: Vocabulary) -> str:
        """Stands for all that a shard's records depend on."""
        beside = [found.etag if found else "" for found in (self.cohort, self.splits)]
        return digest(shard.key, shard.etag, vocabulary.digest, *beside, mmimpute.__version__)

    def read(self, shard: Shard) -> tuple[Events, Window]:
        """Raises DataError where the shard is bad."""
        events = read_events(storage.join(self.url, DATA), shard)
        if self.cohort is None:
            return events, window(events, last_times(events))
        row = self.cohort.subjects.rows(events.ids)
        return events, window(events, np.where(row >= 0, self.cohort.times[row], STATIC))

    def modalities(self, events: Events, seen: Window) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(name, of each event whether it is the modality's and in its window, of each code the feature that it counts as)."""
        modality, feature = resolve(self.spec, self.mapping, events.codes)
        for at, name in enumerate(self.spec.modalities):
            yield name, (modality == at)[events.code] & seen.holds(self.spec.window(name)), feature


def count(source: Source, shard: Shard) -> tuple[Counts, int]:
    """Training subjects that have a value of each feature, and how many training subjects there are. Raises DataError for a bad shard."""
    events, seen = source.read(shard)
    training = seen.index != STATIC
    if source.splits:
        training &= np.array([name == TRAIN for name in source.splits.names])[source.splits.of(events.ids)]
    found: Counts = {}
    for name, held, feature in source.modalities(events, seen):
        held &= training[events.subject]
        features, column = np.unique(feature.astype(str), return_inverse=True)
        wanted, sums = source.spec.modalities[name].values, found.setdefault(name, {})
        for value, groups, values in _aggregates(events, seen, held, column, len(features)):
            if value in wanted:
                subjects = np.bincount(groups.column[~np.isnan(values)], minlength=len(features))
                for at in np.flatnonzero(subjects):
                    sums.setdefault(str(features[at]), {})[value] = int(subjects[at])
    return found, int(training.sum())


def _aggregates(events: Events, seen: Window, held: np.ndarray, column: np.ndarray, width: int):
    """column: of each code."""
    return aggregates(events.subject[held], column[events.code[held]], seen.age[held], events.value[held], width)


def publish_records(source: Source, vocabulary: Vocabulary, shard: Shard, output: str) -> tuple[dict, np.ndarray]:
    """Publishes the records of a shard, those of each split in a folder of its own.

    Returns {shard, events, rows, undated (subjects without an index time), outputs}, and the ids. Raises DataError for a bad shard.
    """
    events, seen = source.read(shard)
    table = records(source, vocabulary, events, seen)
    parts = outputs_of(source, shard, table)
    lineage = {MADE_FROM: source.made_from(shard, vocabulary), PARTS: "\n".join(parts), "mmimpute.input": shard.key}
    for key, part in parts.items():
        publish_table(output, key, part.replace_schema_metadata(lineage))
    undated = len(events.ids) - len(table)
    status = {"shard": shard.key, "events": len(events.code), "rows": len(table), "undated": undated, "outputs": list(parts)}
    return status, table["subject_id"].to_numpy()


def outputs_of(found: Source, shard: Shard, table: pa.Table) -> dict[str, pa.Table]:
    """Key of the record shard -> its records: `<source>.parquet`, in a dataset with splits under the split's folder."""
    name = f"{source(shard.key)}.parquet"
    if found.splits is None:
        return {name: table} if len(table) else {}
    return {f"{split}/{name}": table.filter(pc.equal(table["split"], split)) for split in sorted(pc.unique(table["split"]).to_pylist())}


def records(source: Source, vocabulary: Vocabulary, events: Events, seen: Window) -> pa.Table:
    """One record per subject that has an index time; see the input contract. A modality without an event in its window is null."""
    kept = seen.index != STATIC
    columns = {"subject_id": pa.array(events.ids[kept]), "index_time": pa.array(seen.index[kept]).cast(pa.timestamp("us"))}
    if source.splits:
        columns["split"] = pa.array(source.splits.names).take(pa.array(source.splits.of(events.ids[kept])))
    if source.cohort:
        row = pa.array(source.cohort.subjects.rows(events.ids[kept]))
        columns |= {OUTCOMES + n: source.cohort.outcomes[n].take(row) for n in source.cohort.outcomes.column_names}
    for name, held, feature in source.modalities(events, seen):
        x = _values(events, seen, held, feature, vocabulary.modalities[name])
        columns[name] = _lists(x[kept])
    return pa.table(columns)


def _values(events: Events, seen: Window, held: np.ndarray, feature: np.ndarray, wanted: tuple[tuple[str, str], ...]) -> np.ndarray:
    """S x D: NaN where not observed. A code that did not come in a window with other events of the modality is 0 of presence and count."""
    features = sorted({f for f, _ in wanted})
    place = {pair: at for at, pair in enumerate(wanted)}
    x = np.full((len(events.ids), len(wanted)), np.nan, np.float32)
    zero = [value in KINDS for _, value in wanted]
    x[np.ix_(np.unique(events.subject[held]), np.flatnonzero(zero))] = 0
    column = pc.fill_null(pc.index_in(pa.array(feature, pa.string()), pa.array(features, pa.string())), -1).to_numpy()
    held = held & (column[events.code] >= 0)
    for value, groups, values in _aggregates(events, seen, held, column, len(features)):
        to = np.array([place.get((f, value), -1) for f in features])[groups.column]
        x[groups.row[to >= 0], to[to >= 0]] = values[to >= 0]
    return x


def _lists(x: np.ndarray) -> pa.Array:
    missing = np.isnan(x)
    values = pa.array(x.reshape(-1), mask=missing.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, x.shape[1], mask=pa.array(missing.all(1)))
