"""Synthetic shards: actors hold the model, one shard is one task."""

import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import ray
import torch

from mmimpute import registry
from mmimpute.cluster import runtime
from mmimpute.cluster.ingest import statuses
from mmimpute.generating import generate_shard
from mmimpute.spec import ClusterSettings


class ShardGenerator:
    """Loads the model once, then draws and publishes one shard per call."""

    def __init__(self, model: str, output: str, seed: int):
        self.output, self.seed = output, seed
        self.model = registry.load(model)
        self.model.module.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, batch: pa.Table) -> dict[str, np.ndarray]:
        (task,) = batch.to_pylist()
        return {"status": np.array([json.dumps(generate_shard(self.model, self.output, seed=self.seed, **task))])}


def generate_shards(model: str, output: str, sizes: list[int], seed: int, cluster: ClusterSettings) -> Iterator[dict]:
    """Writes shards of these sizes and yields the status of each."""
    tasks = ray.data.from_arrow([pa.table({"number": [i], "rows": [rows]}) for i, rows in enumerate(sizes)])
    arguments = {"model": model, "output": output, "seed": seed}
    actors = min(cluster.actors or runtime.cpus(), len(sizes))
    for status in statuses(tasks, ShardGenerator, arguments, actors, cluster.gpus_per_actor):
        yield json.loads(status)
