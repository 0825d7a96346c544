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


def count_shards(source: Source, shards: list[Shard]) -> Iterator[dict]:
    """Of each shard {shard, counts, subjects} (see `count`)."""

    def work(source: Source, shard: Shard) -> tuple[dict, bytes]:
        counts, subjects = count(source, shard)
        return {"shard": shard.key, "counts": counts, "subjects": subjects}, b""

    for status, _ in _each(source, shards, work):
        yield status


def publish_shards(source: Source, vocabulary: Vocabulary, shards: list[Shard], output: str) -> Iterator[tuple[dict, np.ndarray]]:
    """Publishes the records of each shard and yields its status and the ids of its records (see `publish_records`)."""

    def work(source: Source, shard: Shard) -> tuple[dict, bytes]:
        status, ids = publish_records(source, vocabulary, shard, output)
        return status, ids.tobytes()

    for status, ids in _each(source, shards, work):
        yield status, np.frombuffer(ids, np.int64)
