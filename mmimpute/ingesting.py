"""MEDS into a cohort: a pass that settles the vocabulary, and one that writes the records."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from pydantic import ValidationError

from mmimpute.cluster import runtime
from mmimpute.cluster.standards import count_shards, publish_shards
from mmimpute.data import storage
from mmimpute.data.shards import Shard, list_shards, read_footer
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
        todo = [s for s in shards if s.key not in aside and not _done(there, s, source.made_from(s, vocabulary))]
        totals = {"events": 0, "rows": 0, "undated": 0}
        for number, status in enumerate(publish_shards(source, vocabulary, todo, to) if todo else (), 1):
            if "error" in status:
                aside[status["shard"]] = status["error"]
                continue
            totals = {name: n + status[name] for name, n in totals.items()}
            _remove(to, there.get(source_of(status["shard"]), {}), status["outputs"])
            on_shard({"generated": number, "of": len(todo), "rows": totals["rows"]})
    known = {source_of(s.key) for s in shards}
    gone = {key: f"shard {key}: made of an input that is gone; remove it" for s, keys in there.items() if s not in known for key in keys}
    features = {name: len(found) for name, found in vocabulary.modalities.items()}
    done = {"shards": len(shards), "done_before": len(shards) - len(todo) - len(aside.keys() - {s.key for s in todo})}
    return done | totals | {"features": features, "spec": text, "set_aside": dict(sorted((aside | gone).items()))}


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
    total, subjects, aside, ids = {}, 0, {}, {}
    for number, (status, found) in enumerate(count_shards(source, shards), 1):
        if "error" in status:
            aside[status["shard"]] = status["error"]
        else:
            add(total, status["counts"])
            subjects, ids[status["shard"]] = subjects + status["subjects"], found
        on_shard({"profiled": number, "of": len(shards)})
    if len(aside) == len(shards):
        raise UserError(f"{source.url}: no shard is as MEDS has it; the first of {len(shards)}: {aside[min(aside)]}")
    return settle(source.spec, source.about, total, subjects), aside | twice(ids)


def twice(ids: dict[str, np.ndarray]) -> dict[str, str]:
    """The shards with a subject of which an earlier one, by name, has events too: 8 bytes a subject are held for it."""
    names = sorted(ids)
    each = np.repeat(np.arange(len(names)), [len(ids[n]) for n in names])
    every = np.concatenate([ids[n] for n in names])
    order = np.argsort(every, kind="stable")  # of one subject's shards the earliest comes first
    again = each[order[1:][every[order[1:]] == every[order[:-1]]]]
    told = "found {:,} subjects of an earlier shard; expected all events of a subject in one; shard the dataset by subject"
    return {names[at]: f"shard {names[at]}, column 'subject_id': " + told.format(n) for at, n in enumerate(np.bincount(again)) if n}


def _written(url: str) -> dict[str, dict[str, dict[str, str]]]:
    """The record shards that there are: source -> key -> metadata."""
    there = list(published(url))
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        found = list(pool.map(lambda o: read_footer(url, o).metadata or {}, there))
    by_source: dict[str, dict[str, dict[str, str]]] = {}
    for o, metadata in zip(there, found, strict=True):
        stem = o.key.rpartition("/")[2].removesuffix(".parquet")
        by_source.setdefault(stem, {})[o.key] = {k.decode(): v.decode() for k, v in metadata.items() if k.startswith(b"mmimpute.")}
    return by_source


def _done(there: dict, shard: Shard, made_from: str) -> bool:
    """Whether every record shard of an input is there, made of just this."""
    keys = there.get(source_of(shard.key), {})
    right = {key for key, metadata in keys.items() if metadata.get(MADE_FROM) == made_from}
    return bool(right) and right == set(keys) == set(keys[min(right)][PARTS].split("\n"))


def _remove(url: str, before: Iterable[str], outputs: list[str]) -> None:
    """What an earlier version of the same input left where this one has nothing."""
    if left := set(before) - set(outputs):
        storage.delete(url, left)
