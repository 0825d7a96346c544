"""Imputing actors and nodes killed in the middle of a run."""

import random

import pytest

from mmimpute import jobs
from tests.faults.conftest import SETTINGS, SHARDS
from tests.faults.processes import moments

pytestmark = pytest.mark.services
ACTOR = "ImputingActor"
LAST = SHARDS * 3 // 4  # shards done when a fault strikes: later, all the others are on their way


def strike(at: list[int], blow):
    """A progress callback that strikes when these numbers of shards are done."""
    left = list(at)

    def on_shard(progress: dict) -> None:
        if left and progress["imputed"] >= left[0]:
            left.pop(0)
            blow()

    return on_shard


@pytest.mark.parametrize("at", moments("actor killed", LAST), ids=str)
def test_an_actor_is_killed(at, nodes, cohort, bucket, check):
    rng = random.Random(str(at))

    with nodes.connected() as cluster:

        def kill() -> None:
            rng.choice(nodes.workers(ACTOR)).kill()

        done = jobs.impute_cohort(cohort.model, cohort.shards, f"{bucket}/out", SETTINGS, cluster, strike(at, kill))
        assert not done["set_aside"], "three deaths at random are no poisoned shard"
        again = jobs.impute_cohort(cohort.model, cohort.shards, f"{bucket}/out", SETTINGS, cluster)
    assert again["done_before"] == SHARDS and again["committed"]["added"] == 0
    check("imputing actor killed", len(at), f"{bucket}/out")


@pytest.mark.parametrize("at", moments("node killed", LAST), ids=str)
def test_a_node_is_killed(at, nodes, cohort, bucket, check):
    with nodes.connected() as cluster:
        done = jobs.impute_cohort(cohort.model, cohort.shards, f"{bucket}/out", SETTINGS, cluster, strike(at, nodes.kill))
        assert not done["set_aside"]
        again = jobs.impute_cohort(cohort.model, cohort.shards, f"{bucket}/out", SETTINGS, cluster)
    assert again["done_before"] == SHARDS and again["committed"]["added"] == 0
    check("node killed", len(at), f"{bucket}/out")
