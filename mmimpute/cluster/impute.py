"""Batch imputation: actors hold the model, one shard is one task."""

import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from mmimpute import registry
from mmimpute.cluster import runtime
from mmimpute.cluster.ingest import shard_dataset, shards_of, statuses
from mmimpute.data.shards import Shard
from mmimpute.imputing import impute_shard
from mmimpute.spec import ClusterSettings, ImputeSettings


class ShardImputer:
    """Loads the model once, then imputes and publishes one shard per call."""

    def __init__(self, model: str, shards: str, output: str, settings: ImputeSettings):
        self.shards, self.output, self.settings = shards, output, settings
        self.model = registry.load(model)
        self.model.module.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, batch: pa.Table) -> dict[str, np.ndarray]:
        (shard,) = shards_of(batch)
        return {"status": np.array([json.dumps(impute_shard(self.model, self.shards, shard, self.output, self.settings))])}


def impute_shards(
    model: str, shards_url: str, shards: list[Shard], output: str, settings: ImputeSettings, cluster: ClusterSettings
) -> Iterator[dict]:
    """Imputes the shards and yields one status per shard (see `impute_shard`), in the order in which they finish."""
    slots = int(runtime.gpus() / cluster.gpus_per_actor) if cluster.gpus_per_actor else runtime.cpus()
    arguments = {"model": model, "shards": shards_url, "output": output, "settings": settings}
    actors = min(cluster.actors or slots, len(shards))
    for status in statuses(shard_dataset(shards), ShardImputer, arguments, actors, cluster.gpus_per_actor):
        yield json.loads(status)
