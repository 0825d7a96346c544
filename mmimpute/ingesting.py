"""MEDS into a cohort: a pass that settles the vocabulary, and one that writes the records."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from pydantic import ValidationError

from mmimpute.cluster import runtime
from mmimpute.cluster.standards import count_shards, publish_shards
from mmimpute.data import storage
from mmimpute.data.shards import Shard, list_shards
from mmimpute.data.table import FOOTER_THREADS, published
from mmimpute.data.table import source as source_of
from mmimpute.errors import UserError
from mmimpute.spec import ClusterSettings
from mmimpute.standards.features import FeatureSpec
from mmimpute.standards.meds import DATA
from mmimpute.standards.records import MADE_FROM, PARTS, Source
from mmimpute.standards.vocabulary import Vocabulary, add, cohort_toml, settle

Progress = Callable[[dict], None]
VOCABULARY, SPEC, SHARDS = "vocabulary.json", "cohort.toml", "shards"


class Written(NamedTuple):
    """A record shard that there is. metadata: what made it; ids: of its subjects."""

    metadata: dict[str, str]
    ids: np.ndarray


def ingest_meds(url: str, spec: FeatureSpec, output: str, cluster: ClusterSettings, on_shard: Progress = lambda _: None) -> dict:
    """Writes `shards/`, `cohort.toml` and `vocabulary.json`. The vocabulary is settled once: new shards get the same features.

    Returns {shards, done_before, events, rows, undated, features, spec (its text), set_aside}. Raises UserError where there is no
    shard, none is good, or the output holds records of another spec.
    """
    shards, source = list_shards(storage.join(url, DATA)), Source.of(url, spec)
    vocabulary, aside = _known(output, source.about), {}
    with runtime.cluster(cluster):
        if vocabulary is None:
            vocabulary, aside = _settle(source, shards, on_shard)
            storage.write(output, VOCABULARY, vocabulary.model_dump_json(indent=1).encode())
        text = cohort_toml(vocabulary, source.outcomes)
        storage.write(output, SPEC, text.encode())
        to = storage.join(output, SHARDS)
        there = _written(to)
        done = {s.key for s in shards if _done(there.get(source_of(s.key), {}), source.made_from(s, vocabulary))}
        todo = [s for s in shards if s.key not in aside and s.key not in done]
        made, bad = _publish(source, vocabulary, todo, to, there, on_shard)
    aside |= bad | _remove_twice(to, done, there, made)
    known = {source_of(s.key) for s in shards}
    gone = {key: f"shard {key}: made of an input that is gone; remove it" for s, keys in there.items() if s not in known for key in keys}
    totals = {name: sum(status[name] for key, (status, _) in made.items() if key not in aside) for name in ("events", "rows", "undated")}
    told = {"shards": len(shards), "done_before": len(done - aside.keys()), **totals, "spec": text}
    features = {name: len(found) for name, found in vocabulary.modalities.items()}
    return told | {"features": features, "set_aside": dict(sorted((aside | gone).items()))}


def _publish(
    source: Source, vocabulary: Vocabulary, todo: list[Shard], to: str, there: dict[str, dict[str, Written]], on_shard: Progress
) -> tuple[dict[str, tuple[dict, np.ndarray]], dict[str, str]]:
    """The second pass: of each shard its status and the ids of its records; and the shards set aside."""
    made, aside, rows = {}, {}, 0
    for number, (status, ids) in enumerate(publish_shards(source, vocabulary, todo, to) if todo else (), 1):
        if "error" in status:
            aside[status["shard"]] = status["error"]
            continue
        made[status["shard"]], rows = (status, ids), rows + status["rows"]
        if left := set(there.get(source_of(status["shard"]), {})) - set(status["outputs"]):
            storage.delete(to, left)  # of an earlier version of the same input
        on_shard({"generated": number, "of": len(todo), "rows": rows})
    return made, aside


def _remove_twice(
    to: str, done: set[str], there: dict[str, dict[str, Written]], made: dict[str, tuple[dict, np.ndarray]]
) -> dict[str, str]:
    """Takes away the records of shards with a subject of an earlier one, and says which: a cohort has one record per subject."""
    before = {key: there[source_of(key)] for key in done}
    ids = {key: np.concatenate([w.ids for w in found.values()]) for key, found in before.items()} | {
        key: ids for key, (_, ids) in made.items()
    }
    aside = twice(ids)
    if outputs := [o for key in aside for o in (made[key][0]["outputs"] if key in made else before[key])]:
        storage.delete(to, outputs)
    return aside


def _known(output: str, about: str) -> Vocabulary | None:
    """The vocabulary of an earlier call. Raises UserError where it is another spec's."""
    try:
        known = Vocabulary.model_validate_json(storage.read(output, VOCABULARY))
    except FileNotFoundError:
        return None
    except ValidationError:
        known = None
    if known is None or known.spec != about:
        raise UserError(f"{output}: {VOCABULARY} there is of another feature spec; give an empty place, or the spec that it was made by")
    return known


def _settle(source: Source, shards: list[Shard], on_shard: Progress) -> tuple[Vocabulary, dict[str, str]]:
    """The first pass: the vocabulary, and the shards set aside. Raises UserError where none is good."""
    total, subjects, aside = {}, 0, {}
    for number, status in enumerate(count_shards(source, shards), 1):
        if "error" in status:
            aside[status["shard"]] = status["error"]
        else:
            add(total, status["counts"])
            subjects += status["subjects"]
        on_shard({"profiled": number, "of": len(shards)})
    if len(aside) == len(shards):
        raise UserError(f"{source.url}: no shard is as MEDS has it; the first of {len(shards)}: {aside[min(aside)]}")
    return settle(source.spec, source.about, total, subjects), aside


def twice(ids: dict[str, np.ndarray]) -> dict[str, str]:
    """The shards with a subject of which an earlier one, by name, has events too: 8 bytes a subject are held for it."""
    names = sorted(ids)
    if not names:
        return {}
    each = np.repeat(np.arange(len(names)), [len(ids[n]) for n in names])
    every = np.concatenate([ids[n] for n in names])
    order = np.argsort(every, kind="stable")  # of one subject's shards the earliest comes first
    again = each[order[1:][every[order[1:]] == every[order[:-1]]]]
    told = "found {:,} subjects of an earlier shard; expected all events of a subject in one; shard the dataset by subject"
    return {names[at]: f"shard {names[at]}, column 'subject_id': " + told.format(n) for at, n in enumerate(np.bincount(again)) if n}


def _written(url: str) -> dict[str, dict[str, Written]]:
    """The record shards that there are: source -> key -> what it is. Of each the footer and one column are fetched."""
    filesystem, root = storage.arrow_filesystem(url)

    def read(o: Shard) -> Written:
        with pq.ParquetFile(f"{root}/{o.key}", filesystem=filesystem) as file:
            metadata = {k.decode(): v.decode() for k, v in (file.metadata.metadata or {}).items() if k.startswith(b"mmimpute.")}
            return Written(metadata, file.read(["subject_id"]).column(0).to_numpy())

    there, by_source = list(published(url)), {}
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        for o, found in zip(there, pool.map(read, there), strict=True):
            by_source.setdefault(o.key.rpartition("/")[2].removesuffix(".parquet"), {})[o.key] = found
    return by_source


def _done(written: dict[str, Written], made_from: str) -> bool:
    """Whether every record shard of an input is there, made of just this."""
    right = {key: w.metadata[PARTS] for key, w in written.items() if w.metadata.get(MADE_FROM) == made_from}
    return bool(right) and set(written) == set(right) == set(min(right.values()).split("\n"))
