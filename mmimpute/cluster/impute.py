"""Batch imputation: actors hold the model, some shards are one task."""

import json
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mmimpute import heads, registry
from mmimpute.cluster import runtime
from mmimpute.cluster.ingest import shard_dataset, shards_of, statuses
from mmimpute.data.shards import Shard
from mmimpute.errors import Unreachable, UserError
from mmimpute.imputing import ShardImputer
from mmimpute.spec import ClusterSettings, ImputeSettings

MOST_TOGETHER = 8  # shards of one task: enough to fetch and publish beside the model, few enough for progress to be seen


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Begun:
    """Counts how often each shard was begun. It outlives the workers, which a shard may kill."""

    def __init__(self):
        self.count = Counter()

    def begin(self, key: str) -> int:
        self.count[key] += 1
        return self.count[key] - 1


class ImputingActor:
    """Loads the model once, then imputes and publishes the shards of one block per call."""

    def __init__(self, model: str, shards: str, output: str, settings: ImputeSettings, begun: ray.actor.ActorHandle):
        loaded = registry.load(model)
        loaded.module.to("cuda" if torch.cuda.is_available() else "cpu")
        head = heads.load(settings.head, loaded) if settings.head else None
        self.imputer, self.begun = ShardImputer(loaded, shards, output, settings, head), begun

    def __call__(self, block: pa.Table) -> Iterator[dict[str, np.ndarray]]:
        try:
            for status in self.imputer.impute(list(shards_of(block)), lambda key: ray.get(self.begun.begin.remote(key))):
                yield _row(status)
        except Unreachable as error:  # raised here, it would reach the user inside Ray's traceback
            yield _row({"unreachable": str(error)})


def _row(status: dict) -> dict[str, np.ndarray]:
    return {"status": np.array([json.dumps(status)])}


def _slots(gpus: float) -> int:
    """How many actors of so many GPUs each there is room for."""
    if not gpus:
        return runtime.cpus()
    if gpus > runtime.gpus():
        raise UserError(f"gpus_per_actor = {gpus:g}: the cluster has {runtime.gpus()} GPUs; give no more than that, or 0 to impute on CPUs")
    return int(runtime.gpus() / gpus)


def impute_shards(
    model: str, shards_url: str, shards: list[Shard], output: str, settings: ImputeSettings, cluster: ClusterSettings
) -> Iterator[dict]:
    """Imputes the shards and yields one status per shard (see `ShardImputer.impute`), in the order in which they finish.

    Raises Unreachable where the store was away for longer than its clients try, UserError where no actor has the GPUs that it is to have.
    """
    actors = min(cluster.actors or _slots(cluster.gpus_per_actor), len(shards))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    begun = Begun.options(scheduling_strategy=here).remote()
    arguments = {"model": model, "shards": shards_url, "output": output, "settings": settings, "begun": begun}
    for row in statuses(shard_dataset(shards, MOST_TOGETHER, actors), ImputingActor, arguments, actors, cluster.gpus_per_actor):
        status = json.loads(row)
        if "unreachable" in status:
            raise Unreachable(status["unreachable"])
        yield status
