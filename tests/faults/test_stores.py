"""An object store killed in the middle of a run."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from mmimpute import jobs, store
from tests.faults.conftest import SETTINGS, SHARDS
from tests.faults.processes import moments
from tests.faults.test_workers import strike

pytestmark = pytest.mark.services
OUTAGE = 10.0  # seconds


@pytest.fixture(scope="module")
def own_store(reference, local_cohort, tmp_path_factory):
    """(folder, endpoint, cohort) of a store of the module's own; the variables point to it as long as the module runs."""
    folder = tmp_path_factory.mktemp("own-store")
    found = store.start(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment().items():
            patch.setenv(name, value)
        store.create_bucket(found, "own")
        yield folder, found, local_cohort.copy("s3://own")
    store.stop(folder)


def restart_later(folder: Path) -> threading.Thread:
    """Kills the store now; a thread starts it again after the outage."""
    os.kill(json.loads((folder / "server.json").read_text())["pid"], signal.SIGKILL)

    def restart() -> None:
        time.sleep(OUTAGE)
        store.start(folder)

    thread = threading.Thread(target=restart)
    thread.start()
    return thread


@pytest.mark.parametrize("at", [[at] for group in moments("store killed", SHARDS * 3 // 4) for at in group], ids=str)
def test_the_store_is_killed_and_comes_back(at, own_store, own_name, nodes, check):
    folder, endpoint, cohort = own_store
    output, outages = f"s3://own/{own_name}", []
    with nodes.connected(**endpoint.environment()) as cluster:
        on_shard = strike(at, lambda: outages.append(restart_later(folder)))
        jobs.impute_cohort(cohort.model, cohort.shards, output, SETTINGS, cluster, on_shard)
        assert len(outages) == len(at)
        for outage in outages:
            outage.join()
        assert store.status(folder) == endpoint, "it came back at another port"
        again = jobs.impute_cohort(cohort.model, cohort.shards, output, SETTINGS, cluster)
    assert again["done_before"] == SHARDS and again["committed"]["added"] == 0
    check("object store killed, back 10 s later", len(outages), output)
