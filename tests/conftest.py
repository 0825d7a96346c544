"""Real parts, started once: an object store, a Ray cluster, a Prefect server; and cohorts with known answers."""

import os
import socket
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # they share the cores: two threads each took two to four times as long
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pytest
from xdist.scheduler import LoadScopeScheduling

# Before ray or prefect is imported by any test.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}

from mmimpute import store
from mmimpute.data import storage
from mmimpute.data.shards import publish_table

# Those that take longest, which begin first: one that began last would go on alone. Faults in training disturb a cluster of their own.
TRAINING = "tests/faults/test_training.py"
LONGEST = (
    "tests/faults/",
    "tests/test_operate.py",
    "tests/test_jobs.py",
    "tests/test_docs.py",
    "tests/test_flow.py",
    "tests/model/test_diffusion.py",
    "tests/test_classifying.py",
    "tests/test_forms.py",
    "tests/test_estimator.py",
    "tests/test_upkeep.py",
    "tests/test_features.py",
)


class ByModule(LoadScopeScheduling):
    """Side by side with others goes a module as a whole, and so do all other tests of faults, which share a cluster. (xdist's own groups
    do nothing with pytest 9.2, which no longer reads the node id that they change.)"""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::")[0]
        return "tests/faults" if path.startswith("tests/faults/") and path != TRAINING else path


def pytest_collection_modifyitems(items) -> None:
    items.sort(key=lambda item: next((n for n, path in enumerate(LONGEST) if item.nodeid.startswith(path)), len(LONGEST)))


def pytest_xdist_make_scheduler(config, log) -> ByModule:
    return ByModule(config, log)


def pytest_terminal_summary(terminalreporter) -> None:
    """The faults that were injected, and what they cost; side by side only this file is read where the summary is written."""
    reports = [r for found in terminalreporter.stats.values() for r in found if getattr(r, "when", None) == "call"]
    if faults := [fault for r in reports for name, fault in r.user_properties if name == "fault"]:
        terminalreporter.section("faults")
        terminalreporter.write_line(f"{'fault':44}{'injected':>10}{'rows lost':>12}{'rows duplicated':>18}")
        for fault, injected, lost, twice in faults:
            terminalreporter.write_line(f"{fault:44}{injected:>10}{lost:>12}{twice:>18}")


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory):
    """A running object store; the environment's AWS variables point to it."""
    folder = tmp_path_factory.mktemp("store")
    found = store.start(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment().items():
            patch.setenv(name, value)
        yield found
    store.stop(folder)


@pytest.fixture
def bucket(endpoint, request):
    """The URL of an empty bucket of the test's own."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name.lower())[:50].strip("-") + "-b"
    store.create_bucket(endpoint, name)
    return f"s3://{name}"


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path):
    """The URL of an empty place: once on this machine's disk, once in the object store."""
    return str(tmp_path / "place") if request.param == "folder" else request.getfixturevalue("bucket")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def linear_cohort(rows: int, seed: int = 0, first: int = 0) -> pa.Table:
    """Two list modalities and one of scalars, all driven by two latents; a quarter of each missing."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(rows, 2))
    columns = {"subject_id": pa.array([f"s{first + i:06d}" for i in range(rows)])}
    for name, width in {"labs": 4, "rna": 6}.items():
        x = (z @ rng.normal(size=(2, width)) + 0.3 * rng.normal(size=(rows, width))).astype(np.float32)
        missing = rng.random(rows) < 0.25
        flat = pa.array(x.ravel(), mask=(rng.random(x.shape) < 0.05).ravel())
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(missing))
    seen = rng.random(rows) > 0.25
    code = (z[:, 0] + 0.5 * rng.normal(size=rows) > 0).astype(float)
    stage = np.digitize(z[:, 1], [-0.7, 0.7]).astype(float)
    columns["dx__code"] = pa.array(np.where(seen, code, np.nan), from_pandas=True)
    columns["dx__stage"] = pa.array(np.where(seen, stage, np.nan), from_pandas=True)
    columns["dx__site"] = pa.array([str(np.array(["colon", "lung"])[int(c)]) if s else None for c, s in zip(code, seen, strict=True)])
    columns["outcome__died"] = pa.array(rng.integers(0, 2, rows))
    return pa.table(columns)


SPEC = """
subject_id = "subject_id"
outcomes = ["outcome__*"]
[modalities.labs]
column = "labs"
[modalities.rna]
column = "rna"
[modalities.dx]
prefix = "dx__"
"""


def write_cohort(url: str, rows: int = 600, shards: int = 4, seed: int = 0) -> pa.Table:
    """A linear cohort as shards under a URL; returns all of it."""
    table = linear_cohort(rows, seed)
    for number, part in enumerate(np.array_split(np.arange(rows), shards)):
        publish_table(url, f"part-{number:03d}.parquet", table.take(pa.array(part)))
    return table


@pytest.fixture
def spec_file(tmp_path) -> Path:
    path = tmp_path / "cohort.toml"
    path.write_text(SPEC)
    return path


def untrained_model(url: str, home: str, spec_path: Path) -> str:
    """A champion with the right schema and standardisation and weights as they were initialised. Returns its place."""
    import torch

    from mmimpute import planning, registry
    from mmimpute.data import profile
    from mmimpute.data import shards as shard_files
    from mmimpute.model.imputer import Imputer
    from mmimpute.model.standardise import FeatureStatistics
    from mmimpute.model.vae import MultiModalVAE
    from mmimpute.sizing import model_config
    from mmimpute.spec import FitSettings, read_spec

    found = planning.survey(url, read_spec(spec_path))
    tables = [shard_files.read_table(url, s, found.schema) for s in found.shards]
    seen = [profile.observe(t, found.schema, "s", 1.0) for t in tables]
    total = seen[0]
    for part in seen[1:]:
        total = profile.merge(total, part)
    schema, total = profile.settle(found.schema, total)
    torch.manual_seed(0)
    statistics = {name: FeatureStatistics(**arrays) for name, arrays in profile.feature_statistics(schema, total).items()}
    module = Imputer(MultiModalVAE(model_config(schema, 600, FitSettings()), statistics), [0] * len(statistics))
    name = registry.save(home, module.eval(), schema, "untrained")
    registry.promote(home, name)
    return storage.join(home, name)


@pytest.fixture(scope="session")
def small_cohort(tmp_path_factory):
    """(shards URL, spec file, model home) of 600 records in 4 shards, with an untrained model; read only."""
    folder = tmp_path_factory.mktemp("cohort")
    spec = folder / "cohort.toml"
    spec.write_text(SPEC)
    write_cohort(str(folder / "shards"))
    untrained_model(str(folder / "shards"), str(folder / "model"), spec)
    return str(folder / "shards"), spec, str(folder / "model")


@pytest.fixture(scope="session")
def two_models(tmp_path_factory):
    """(cohort, a model of its first few people, a model of all of it), see `fitting`; of one home, nobody's champion; read only."""
    from tests import fitting

    home, cohort = str(tmp_path_factory.mktemp("two")), fitting.cohort()
    return cohort, fitting.fit(home, cohort.slice(0, fitting.FEW), fitting.SPEC, 1), fitting.fit(home, cohort, fitting.SPEC, 3)
