"""Verification: one shard and its output are one task."""

import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from mmimpute.cluster.ingest import shard_dataset
from mmimpute.data.schema import CohortSchema
from mmimpute.verifying import Pair, verify_shard


def verify_shards(schema: CohortSchema, shards: str, pairs: list[Pair], output: str) -> Iterator[dict]:
    """Verifies the shards and yields one status per shard (see `verify_shard`), in the order in which they finish."""

    def verify_batch(batch: pa.Table) -> dict[str, np.ndarray]:
        (row,) = batch.to_pylist()
        return {"status": np.array([json.dumps(verify_shard(schema, shards, Pair(**row), output))])}

    for row in shard_dataset(pairs).map_batches(verify_batch, batch_size=1, batch_format="pyarrow").iter_rows():
        yield json.loads(row["status"])
