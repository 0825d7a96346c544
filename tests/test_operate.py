"""What runs without anyone watching: deployments on a real Prefect server with a real worker, object store and Ray.

The server's database is Debian's PostgreSQL where that is installed, else SQLite, Prefect's own choice.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

from flows.serving import served
from mmimpute import registry, store
from mmimpute.data.shards import list_shards, publish_table
from mmimpute.data.table import expected, table_state
from mmimpute.imputing import settings_digest
from mmimpute.spec import ImputeSettings
from tests.conftest import SPEC, free_port, linear_cohort

BEGAN = time.time()
pytestmark = pytest.mark.services
DEPLOYED = {"population-run", "data-drop", "retrain", "watch"}
OVER = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
# One population. Nine times as many follow those of the first shards: with so much more to learn from the challenger is better.
PEOPLE, FIRST = linear_cohort(1_200), 120


@contextmanager
def postgres(binaries: Path) -> Iterator[str]:
    """A PostgreSQL server on a socket in a folder of its own. Yields its URL as Prefect wants it."""
    user = {"user": "postgres"} if os.getuid() == 0 else {}  # it refuses to run as root
    with tempfile.TemporaryDirectory(prefix="postgres") as folder:
        if user:
            shutil.chown(folder, "postgres")

        def run(program: str, *arguments: str) -> None:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
            subprocess.run([binaries / program, "-D", f"{folder}/data", *arguments], check=True, **quiet, **user)

        run("initdb", "-A", "trust", "-U", "postgres", "--no-sync")
        run("pg_ctl", "-w", "-o", f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off", "start")
        try:
            yield f"postgresql+asyncpg://postgres@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-m", "immediate", "stop")


class Server:
    """Prefect's API, asked without Prefect's client."""

    def __init__(self, url: str):
        self.url = url

    def ask(self, path: str, body: dict | None = None) -> dict | list:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def start(self, deployment: str, **parameters) -> str:
        found = self.ask(f"deployments/name/{deployment}")
        return self.ask(f"deployments/{found['id']}/create_flow_run", {"parameters": found["parameters"] | parameters})["id"]

    def runs(self) -> list[dict]:
        """Of all flows, those that are not waiting for their time."""
        return self.ask("flow_runs/filter", {"flow_runs": {"state": {"type": {"not_any_": ["SCHEDULED"]}}}})

    def wait(self, run: str, seconds: float = 600) -> dict:
        began = time.monotonic()
        while (found := self.ask(f"flow_runs/{run}"))["state_type"] not in OVER:
            assert time.monotonic() - began < seconds, found["state"]
            time.sleep(0.5)
        return found


@pytest.fixture(scope="module")
def ward(endpoint, tmp_path_factory):
    """(run.toml, URL) of a cohort of four shards."""
    folder, url = tmp_path_factory.mktemp("ward"), "s3://ward"
    store.create_bucket(endpoint, "ward")
    upload(url, "part", PEOPLE.slice(0, FIRST))
    (folder / "cohort.toml").write_text(SPEC)
    places = "".join(f'{name} = "{url}/{name}"\n' for name in ("shards", "model", "output"))
    settings = "[fit]\nepochs = 6\nbatch_size = 64\n[cluster]\ncpus = 2\n"
    (folder / "run.toml").write_text('title = "Ward 7"\nspec = "cohort.toml"\n' + places + settings)
    return folder / "run.toml", url


@pytest.fixture(scope="module")
def server(ward, endpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("operate")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("PREFECT_HOME", str(folder / "client"))
        patch.setenv("PREFECT_WORKER_QUERY_SECONDS", "2")  # instead of 10
        binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        if binaries:
            patch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", stack.enter_context(postgres(binaries[-1])))
        api = stack.enter_context(served(folder, free_port(), "mmimpute"))
        patch.setenv("PREFECT_API_URL", api)
        done = subprocess.run([sys.executable, "-m", "mmimpute.cli", "deploy", str(ward[0])], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        yield Server(api)


def test_what_is_deployed(server, ward):
    deployed = {d["entrypoint"].rsplit(".", 1)[1].replace("_", "-"): d for d in server.ask("deployments/filter", {})}
    assert deployed.keys() == DEPLOYED and {d["name"] for d in deployed.values()} == {"ward-7"}
    for deployment in deployed.values():
        form = deployment["parameter_openapi_schema"]
        assert form["definitions"]["RunConfig"]["properties"]["fit"] and "z0" in form["definitions"]["FitSettings"]["properties"]
        assert deployment["parameters"]["config"]["output"] == f"{ward[1]}/output"
    queues = server.ask("work_queues/filter", {})
    assert {q["name"]: q["concurrency_limit"] for q in queues if q["name"].startswith("ward-7")} == {"ward-7": 1, "ward-7-watch": None}
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    assert secret not in json.dumps([deployed, queues, server.ask("work_pools/filter", {})])
    assert secret not in command_lines()


def test_schedules_are_kept(server):
    began = time.monotonic()
    while not (found := server.ask("flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}})):
        assert time.monotonic() - began < 300, "the scheduler inserted no run"
        time.sleep(1)
    assert all(run["auto_scheduled"] for run in found)


@pytest.fixture(scope="module")
def first(server, ward):
    """Two population runs that were started at once, in the order in which they ran."""
    started = [server.start("population-run/ward-7") for _ in range(2)]
    return sorted((server.wait(run) for run in started), key=lambda run: run["start_time"])


def test_runs_of_a_cohort_never_overlap_and_the_second_finds_all_done(first, server, ward):
    assert [run["state_type"] for run in first] == ["COMPLETED", "COMPLETED"]
    assert datetime.fromisoformat(first[0]["end_time"]) <= datetime.fromisoformat(first[1]["start_time"])
    assert table_state(f"{ward[1]}/output").version == 0  # the second committed nothing
    left = {artifact["key"] for artifact in server.ask("artifacts/latest/filter", {})}
    assert {"plan", "model", "accuracy", "commit", "report", "drift"} <= left


def test_a_drop_is_taken_in_and_leads_to_a_new_champion_that_imputes_everything(first, server, ward):
    """From the upload on nobody does anything: watch -> data-drop -> retrain, as the cohort has grown -> population-run."""
    url = ward[1]
    before = registry.champion(f"{url}/model")
    upload(url, "new", PEOPLE.slice(FIRST))
    bad = linear_cohort(30, seed=5, first=9000)
    publish_table(f"{url}/shards", "x-bad.parquet", bad.set_column(0, "subject_id", pa.array(["planted-id-4711"] * 30)))
    time.sleep(3)
    look(server)
    began = time.monotonic()
    while not all_of(url, registry.champion(f"{url}/model")) or registry.champion(f"{url}/model") == before:
        told = [(run["name"], run["state_name"], run["state"]["message"]) for run in server.ask("flow_runs/filter", {})]
        assert time.monotonic() - began < 600, told
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in command_lines()
        time.sleep(1)
    look(server)
    told = server.ask("events/filter", {"filter": {"event": {"prefix": ["mmimpute."]}}})["events"]
    assert Counter(event["event"] for event in told)["mmimpute.drop.settled"] == 1  # the second look found the drop announced
    told = json.dumps([told, *(server.ask(f"{what}/filter", {}) for what in ("artifacts", "flow_runs", "task_runs", "logs"))])
    assert "x-bad.parquet" in told
    for secret in ("planted-id-4711", "s001000", os.environ["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in told and secret not in ray_logs()


def upload(url: str, name: str, people: pa.Table) -> None:
    """Four shards."""
    for number, rows in enumerate(np.array_split(np.arange(len(people)), 4)):
        publish_table(f"{url}/shards", f"{name}-{number}.parquet", people.take(pa.array(rows)))


def look(server: Server) -> None:
    """Watches once. A look that meets the scheduled one, every five minutes, is cancelled by `collision_strategy`: another follows."""
    began = time.monotonic()
    while (state := server.wait(server.start("watch/ward-7", quiet_minutes=0.02))["state_type"]) == "CANCELLED":
        assert time.monotonic() - began < 600, "every look is cancelled"
        time.sleep(1)
    assert state == "COMPLETED"


def command_lines() -> str:
    """Of every process of this machine, as anybody on it can read them."""
    return "\n".join(" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))


def ray_logs() -> str:
    """What Ray wrote to its logs, the drivers' and the workers' output among it."""
    files = [f for f in Path("/tmp/ray").glob("session_2*/logs/**/*") if f.is_file() and f.stat().st_mtime > BEGAN]
    assert files
    return "\n".join(f.read_text(errors="replace") for f in files)


def all_of(url: str, champion: str) -> bool:
    """Whether the table holds every good shard, as this model imputes it."""
    good = [s for s in list_shards(f"{url}/shards") if s.key != "x-bad.parquet"]
    return table_state(f"{url}/output").keys == expected(good, champion, settings_digest(ImputeSettings())).keys()
