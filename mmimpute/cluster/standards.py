"""MEDS shards into records: one shard is one task."""

import json
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import ray

from mmimpute.cluster.ingest import shard_dataset, shards_of
from mmimpute.data.shards import Shard
from mmimpute.errors import DataError, Unreachable
from mmimpute.standards.records import Source, count, publish_records
from mmimpute.standards.vocabulary import Vocabulary


def _each(source: Source, shards: list[Shard], work: Callable[[Source, Shard], tuple[dict, bytes]]) -> Iterator[tuple[dict, bytes]]:
    """What `work` says of each shard, or {shard, error}, in the order in which they finish. Raises Unreachable."""
    shared = ray.put(source)  # the tasks of a host share what it holds

    def call(batch: pa.Table) -> dict[str, np.ndarray]:
        (shard,) = shards_of(batch)
        ids = b""
        try:
            status, ids = work(ray.get(shared), shard)
        except DataError as error:
            status = {"shard": shard.key, "error": str(error)}
        except Unreachable as error:  # raised here, it would reach the user inside Ray's traceback
            status = {"unreachable": str(error)}
        return {"status": np.array([json.dumps(status)]), "ids": np.array([ids], object)}

    for row in shard_dataset(shards).map_batches(call, batch_size=1, batch_format="pyarrow").iter_rows():
        status = json.loads(row["status"])
        if "unreachable" in status:
            raise Unreachable(status["unreachable"])
        yield status, row["ids"]


def count_shards(source: Source, shards: list[Shard]) -> Iterator[tuple[dict, np.ndarray]]:
    """Of each shard {shard, counts, subjects}, and the ids of its subjects (see `count`)."""

    def work(source: Source, shard: Shard) -> tuple[dict, bytes]:
        counts, subjects, ids = count(source, shard)
        return {"shard": shard.key, "counts": counts, "subjects": subjects}, ids.tobytes()

    for status, ids in _each(source, shards, work):
        yield status, np.frombuffer(ids, np.int64)


def publish_shards(source: Source, vocabulary: Vocabulary, shards: list[Shard], output: str) -> Iterator[dict]:
    """Publishes the records of each shard and yields its status (see `publish_records`)."""

    def work(source: Source, shard: Shard) -> tuple[dict, bytes]:
        return publish_records(source, vocabulary, shard, output), b""

    for status, _ in _each(source, shards, work):
        yield status
