"""Cross-modal retrieval: actors embed the shards, one task searches and writes. Subject ids never come to the driver."""

import pyarrow as pa
import ray
import torch

from mmimpute import registry
from mmimpute.cluster import runtime
from mmimpute.cluster.ingest import mapped, shard_dataset, shards_of
from mmimpute.data.shards import Shard, publish_table, read_table
from mmimpute.errors import DataError, UserError
from mmimpute.spec import ClusterSettings
from mmimpute.tasks.search import embedded, retrieve


class Embedder:
    """Loads the model once, then embeds one shard per call: its people (see `search.embedded`), or one row: why it is set aside."""

    def __init__(self, model: str, shards: str, query: int, among: int):
        self.shards, self.query, self.among = shards, query, among
        self.model = registry.load(model)
        self.model.module.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, batch: pa.Table) -> pa.Table:
        (shard,) = shards_of(batch)
        try:
            table = read_table(self.shards, shard, self.model.schema)
            return embedded(self.model, table, shard.key, self.query, self.among)
        except DataError as problem:
            return pa.table({"shard": [shard.key], "error": [str(problem)]})


@ray.remote
def search(members: int, k: int, output: str, name: str, *embeddings: pa.Table) -> dict:
    """Searches and publishes. Returns `search.retrieve`'s counts and set_aside, or {mend: what the user has to}."""
    aside = {row["shard"]: row["error"] for part in embeddings if "error" in part.column_names for row in part.to_pylist()}
    people = [part for part in embeddings if "error" not in part.column_names]
    if not people:
        return {"mend": f"no shard could be read: {next(iter(aside.values()))}"}
    try:
        found, counts = retrieve(pa.concat_tables(people, promote_options="permissive"), members, k)
    except UserError as error:  # raised here, it would reach the user inside Ray's traceback
        return {"mend": str(error)}
    publish_table(output, name, found)
    return counts | {"set_aside": aside}


def retrieve_among(
    model: str, shards_url: str, shards: list[Shard], modalities: tuple[int, int], k: int, output: str, name: str, cluster: ClusterSettings
) -> dict:
    """Publishes who was found for whom under `name`. modalities: of the queries, and of those who are searched. Returns as `search`."""
    actors = min(cluster.actors or runtime.cpus(), len(shards))
    arguments = {"model": model, "shards": shards_url, "query": modalities[0], "among": modalities[1]}
    people = mapped(shard_dataset(shards), Embedder, arguments, actors, cluster.gpus_per_actor)
    members = registry.describe(model).config["members"]
    return ray.get(search.remote(members, k, output, name, *people.materialize().to_arrow_refs()))
