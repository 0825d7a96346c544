"""Shards that are damaged, and one that kills whoever decodes it."""

import pytest

from mmimpute import jobs
from mmimpute.data import storage
from mmimpute.data.shards import publish_table
from mmimpute.imputing import TRIES
from tests.conftest import linear_cohort
from tests.faults.conftest import ROWS, SETTINGS, SHARDS
from tests.faults.processes import FEW, PATIENCE, with_hook

pytestmark = pytest.mark.services
POISON = "part-013-poison"


def cut_off(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 3
    return content[:middle] + bytes(b ^ 0xFF for b in content[middle : middle + 64]) + content[middle + 64 :]


def test_damaged_shards_are_set_aside_until_they_are_mended(nodes, cohort, bucket, check):
    own = cohort.copy(bucket)
    spoilt = {"part-007.parquet": cut_off, "part-021.parquet": flipped}
    for name, spoil in spoilt.items():
        storage.write(own.shards, name, spoil(storage.read(cohort.shards, name)))
    with nodes.connected() as cluster:
        done = jobs.impute_cohort(own.model, own.shards, f"{bucket}/out", SETTINGS, cluster)
        assert set(done["set_aside"]) == set(spoilt) and done["rows"] == (SHARDS - len(spoilt)) * ROWS
        for name, reason in done["set_aside"].items():
            assert f"shard {name}: found no readable Parquet file" in reason and "upload it again" in reason
        for name in spoilt:
            storage.write(own.shards, name, storage.read(cohort.shards, name))
        again = jobs.impute_cohort(own.model, own.shards, f"{bucket}/out", SETTINGS, cluster)
    assert again["done_before"] == SHARDS - len(spoilt) and again["committed"]["added"] == len(spoilt)
    check("Parquet cut off, bits flipped", len(spoilt), f"{bucket}/out")


@pytest.mark.timeout(PATIENCE)  # Ray restarts actors for ever
@pytest.mark.parametrize("actors", [1, 3][:FEW])  # 5 shards a task, 1 shard a task
def test_a_poisoned_shard_is_set_aside(actors, nodes, cohort, bucket, check):
    own = cohort.copy(bucket)
    publish_table(own.shards, f"{POISON}.parquet", linear_cohort(ROWS, seed=7, first=900_000))
    with nodes.connected(**with_hook("poison")) as cluster:
        cluster = cluster.model_copy(update={"actors": actors})
        done = jobs.impute_cohort(own.model, own.shards, f"{bucket}/out", SETTINGS, cluster)
    assert list(done["set_aside"]) == [f"{POISON}.parquet"], "an innocent shard was set aside"
    assert "its worker died 3 times" in done["set_aside"][f"{POISON}.parquet"]
    assert done["rows"] == SHARDS * ROWS
    check(f"shard that kills its worker, actors: {actors}", TRIES, f"{bucket}/out")
