"""Training workers and drivers killed: the resumed run is the undisturbed one, to the bit."""

import random
import threading
import time

import pytest

from mmimpute import registry
from tests.conftest import SPEC, write_cohort
from tests.faults.fit import SETTINGS, fit
from tests.faults.processes import FEW, PATIENCE, driver, moments, wait_until

pytestmark = pytest.mark.services
LAST = SETTINGS.epochs - 2
TIMES = ("seconds", "rows_per_second")


@pytest.fixture(scope="module")
def training(endpoint, tmp_path_factory):
    """(shards, spec file, URL for models)."""
    from mmimpute import store

    store.create_bucket(endpoint, "training")
    spec = tmp_path_factory.mktemp("training") / "cohort.toml"
    spec.write_text(SPEC)
    write_cohort("s3://training/shards", 600, 2)
    return "s3://training/shards", str(spec), "s3://training"


@pytest.fixture(scope="module", autouse=True)
def connected(training, nodes):
    """One driver for all fits of this file but those that are to be killed."""
    with nodes.connected():
        yield


@pytest.fixture(scope="module")
def undisturbed(training, connected):
    return fitted(training, "undisturbed")


def fitted(training, name: str, on_progress=lambda record: None) -> tuple[str, list[dict]]:
    """Digest of the weights, and what was measured at each epoch, but for its duration."""
    shards, spec, place = training
    made = fit(shards, f"{place}/{name}", spec, on_progress=on_progress)
    history = registry.read_record(made["model"], "history")
    return made["digest"], [{k: v for k, v in record.items() if k not in TIMES} for record in history]


def test_the_same_seed_gives_the_same_bits(training, undisturbed):
    assert fitted(training, "again") == undisturbed


@pytest.mark.parametrize("at", moments("training worker killed", LAST), ids=str)
def test_a_training_worker_is_killed(at, training, own_name, nodes, undisturbed, note):
    rng, left, kills = random.Random(str(at)), list(at), []

    def strike() -> None:
        for worker in nodes.workers("RayTrainWorker"):
            worker.kill()
            kills.append(worker.pid)

    def on_progress(record: dict) -> None:
        if left and record.get("epoch", 0) >= left[0]:
            left.pop(0)
            threading.Timer(rng.uniform(0, 0.5), strike).start()  # at some step of the next epoch

    assert fitted(training, own_name, on_progress) == undisturbed
    assert len(kills) == len(at)
    note("training worker killed", len(at), 0, 0)


@pytest.mark.parametrize("at", moments("training driver killed", LAST, FEW), ids=str)
def test_the_driver_of_a_training_is_killed(at, training, own_name, nodes, undisturbed, tmp_path, note):
    shards, spec, place = training
    for number, epoch in enumerate(at):
        log = tmp_path / f"{number}.log"
        with driver(log, "-m", "tests.faults.fit", shards, f"{place}/{own_name}", spec, nodes.cluster.address) as run:
            wait_until(lambda: f"epoch {epoch}\n" in log.read_text() or run.process.poll() is not None, PATIENCE, log.read_text)  # noqa: B023
            time.sleep(random.Random(epoch).uniform(0, 0.5))
            run.process.kill()
            run.wait(10)
    seen = []
    assert fitted(training, own_name, seen.append) == undisturbed
    assert seen[-1]["epoch"] == SETTINGS.epochs and next(r["epoch"] for r in seen if "epoch" in r) > 1, "it began anew"
    note("training driver killed", len(at), 0, 0)
