"""A cohort of small shards, the table of a run that nothing disturbed, and a cluster of three nodes to disturb."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import pyarrow as pa
import pytest
import ray
from ray.cluster_utils import Cluster

from mmimpute import jobs, store
from mmimpute.cluster import runtime
from mmimpute.data import storage
from mmimpute.data.shards import fetch_table
from mmimpute.data.table import table_state
from mmimpute.spec import ClusterSettings, ImputeSettings
from tests.conftest import SPEC, untrained_model, write_cohort
from tests.faults.processes import workers

SHARDS, ROWS = 40, 300
SETTINGS = ImputeSettings(draws=2)


@dataclass(frozen=True)
class Cohort:
    """Where shards and model are. Equal bytes have equal ETags, so every place gives the same keys and draws."""

    shards: str
    model: str

    def copy(self, url: str) -> "Cohort":
        for place, name in ((self.shards, "shards"), (self.model, "model")):
            for found in storage.list_objects(place):
                storage.write(f"{url}/{name}", found.key, storage.read(place, found.key))
        return Cohort(f"{url}/shards", f"{url}/model")


@pytest.fixture(scope="session")
def local_cohort(tmp_path_factory) -> Cohort:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "cohort.toml").write_text(SPEC)
    found = Cohort(str(folder / "shards"), str(folder / "model"))
    write_cohort(found.shards, SHARDS * ROWS, SHARDS)
    untrained_model(found.shards, found.model, folder / "cohort.toml")
    return found


@pytest.fixture(scope="session")
def cohort(endpoint, local_cohort) -> Cohort:
    """The cohort in the object store of all tests; read only."""
    store.create_bucket(endpoint, "faults")
    return local_cohort.copy("s3://faults")


@dataclass
class Nodes:
    """A Ray of three nodes on this machine, one CPU each; the head holds the driver and is left alone."""

    cluster: Cluster
    others: list = field(default_factory=list)

    def add(self) -> None:
        self.others.append(self.cluster.add_node(**NODE))

    def kill(self) -> None:
        """Kills the older of the two nodes at once and lets a new one join."""
        self.cluster.remove_node(self.others.pop(0), allow_graceful=False)
        self.add()

    def workers(self, title: str) -> list[psutil.Process]:
        raylets = [psutil.Process(n.all_processes["raylet"][0].process.pid) for n in self.cluster.list_all_nodes()]
        return workers(raylets, title)

    @contextmanager
    def connected(self, **environment: str) -> Iterator[ClusterSettings]:
        """This process as a driver whose workers have these variables too."""
        variables = {"runtime_env": {"env_vars": environment}} if environment else {}
        ray.init(self.cluster.address, log_to_driver=False, logging_level="ERROR", **variables)
        runtime._quieten()
        try:
            yield ClusterSettings()
        finally:
            ray.shutdown()


NODE = {"num_cpus": 1, "include_dashboard": False, "include_log_monitor": False, "no_monitor": True, "object_store_memory": 100 << 20}


@pytest.fixture(scope="package")
def nodes(endpoint) -> Iterator[Nodes]:
    """Started once the store's variables are set, which its workers inherit."""
    found = Nodes(Cluster(initialize_head=True, head_node_args=NODE))
    found.add()
    found.add()
    yield found
    found.cluster.shutdown()


def committed(output: str) -> tuple[frozenset[str], pa.Table]:
    """The keys of the newest version, and its rows by subject id."""
    keys = table_state(output).keys
    return keys, pa.concat_tables(fetch_table(output, key) for key in sorted(keys)).sort_by("subject_id")


@pytest.fixture(scope="package")
def reference(cohort, nodes) -> tuple[frozenset[str], pa.Table]:
    """What a run that nothing disturbs commits."""
    with nodes.connected() as cluster:
        done = jobs.impute_cohort(cohort.model, cohort.shards, "s3://faults/reference", SETTINGS, cluster)
    assert done["rows"] == SHARDS * ROWS and not done["set_aside"]
    return committed("s3://faults/reference")


@pytest.fixture
def own_name(request) -> str:
    """A name that no other test has: moments may be drawn twice, and what is done is found and not done again."""
    return re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")


@pytest.fixture
def note(record_property):
    """Notes a fault for the summary: its name, how often it was injected, rows lost, rows duplicated."""
    return lambda *fault: record_property("fault", fault)


@pytest.fixture
def check(reference, note):
    """Compares a table with the reference and notes what it found for the summary."""

    def same(fault: str, injected: int, output: str) -> None:
        keys, rows = committed(output)
        ids, wanted = rows["subject_id"], reference[1]["subject_id"]
        lost, twice = len(set(wanted.to_pylist()) - set(ids.to_pylist())), len(ids) - len(ids.unique())
        note(fault, injected, lost, twice)
        assert (lost, twice) == (0, 0)
        assert keys == reference[0]
        assert rows.equals(reference[1])

    return same
