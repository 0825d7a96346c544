"""The population run as a Prefect flow: real Prefect (ephemeral and a server), real object store, Ray with two workers."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from mmimpute import population, registry, store
from mmimpute.cluster import runtime
from mmimpute.data import storage
from mmimpute.data.shards import fetch_table, publish_table
from mmimpute.data.table import table_state
from mmimpute.spec import AlertRules, ClusterSettings, FitSettings, RunConfig, read_spec
from tests.conftest import SPEC, linear_cohort, write_cohort

pytestmark = pytest.mark.services
SETTINGS = "[fit]\nworkers = 2\nepochs = 3\nbatch_size = 64\n[cluster]\ncpus = 4\nactors = 2\n"


@pytest.fixture(scope="module")
def run(endpoint, tmp_path_factory):
    """(config file, URL of the bucket's folder): a cohort of four good shards, and one bad inside."""
    store.create_bucket(endpoint, "flow")
    url, folder = "s3://flow/cohort", tmp_path_factory.mktemp("run")
    write_cohort(f"{url}/shards", rows=800, shards=4)
    bad = linear_cohort(30, seed=5, first=9000)
    publish_table(f"{url}/shards", "x-bad.parquet", bad.set_column(0, "subject_id", pa.array(["planted-id-4711"] * 30)))
    (folder / "cohort.toml").write_text(SPEC)
    config = folder / "run.toml"
    places = "".join(f'{name} = "{url}/{name}"\n' for name in ("shards", "model", "output"))
    config.write_text('title = "A cohort"\nspec = "cohort.toml"\n' + places + SETTINGS)
    return config, url


def run_cli(config: Path, home: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PREFECT_HOME": str(home)}
    environment.pop("PREFECT_LOGGING_LEVEL", None)  # `flows` sets it where a test imports it
    command = [sys.executable, "-m", "mmimpute.cli", "run", str(config)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)


@pytest.fixture(scope="module")
def first(run, tmp_path_factory):
    """The first run, on an ephemeral Prefect with nothing else started."""
    return run_cli(run[0], tmp_path_factory.mktemp("ephemeral"))


def test_the_flow_end_to_end(first, run):
    _, url = run
    assert first.returncode == 3, first.stderr[-3000:]
    assert "Traceback" not in first.stdout + first.stderr
    state = table_state(f"{url}/output")
    enriched = pa.concat_tables(fetch_table(f"{url}/output", k) for k in sorted(state.keys))
    given = pa.concat_tables(fetch_table(f"{url}/shards", f"part-00{i}.parquet") for i in range(4))
    assert enriched.select(given.column_names).sort_by("subject_id").equals(given.sort_by("subject_id"))
    record = population.last_record(f"{url}/output")
    assert record["rows"] == 800 and [a["shard"] for a in record["shards"]["set_aside"]] == ["x-bad.parquet"]
    assert list(record["evaluation"]["modalities"]) == ["labs", "rna", "dx"]
    page = storage.read(*record["report_url"].rsplit("/", 1)).decode()
    assert "<svg" in page and "x-bad.parquet" in page


def test_no_identifier_leaves_the_data(first, run):
    _, url = run
    record = json.dumps(population.last_record(f"{url}/output"))
    page = storage.read(*json.loads(record)["report_url"].rsplit("/", 1)).decode()
    for text in (first.stdout, first.stderr, record, page):
        assert "planted-id-4711" not in text
        assert not any(f"s{i:06d}" in text for i in range(800))


def test_what_is_tried_again():
    from prefect.states import exception_to_failed_state

    from flows.tasks import mendable
    from mmimpute.errors import DataError, Unreachable, UserError

    again = {UserError("x"): False, DataError("s", None, "f", "e", "a"): False, Unreachable("x"): True, OSError("x"): True}
    for error, expected in again.items():
        state = asyncio.run(exception_to_failed_state(error))
        assert mendable(None, None, state) is expected


def test_the_version_of_a_flow_is_that_of_its_own_file():
    """As Prefect makes it, where a deployment or a run shows whether the code has changed."""
    from prefect.utilities.hashing import file_hash

    import flows
    from flows.drops import data_drop
    from flows.population import population_run
    from flows.retraining import retrain

    folder = Path(flows.__file__).parent
    for flow, name in ((population_run, "population"), (retrain, "retraining"), (data_drop, "drops")):
        assert flow.version == file_hash(str(folder / f"{name}.py"))


def test_the_example_of_an_alert_is_an_automation():
    from prefect.events.schemas.automations import AutomationCore

    import flows

    example = Path(flows.__file__).with_name("alert.example.yaml").read_text()
    (automation,) = map(AutomationCore.model_validate, yaml.safe_load(example)["automations"])
    assert automation.trigger.expect == {"mmimpute.drift.found"}


@pytest.mark.slow
def test_without_its_decorators_the_flow_is_plain_python(run, monkeypatch, tmp_path):
    """The flow's own function, on a folder, with its tasks' functions in place of the tasks."""
    from flows import population as flow
    from flows import tasks

    url = str(tmp_path)
    write_cohort(f"{url}/shards", rows=200, shards=2, seed=8)
    (tmp_path / "cohort.toml").write_text(SPEC)
    fit, cluster = FitSettings(epochs=1, batch_size=64), ClusterSettings(cpus=2)
    spec = read_spec(tmp_path / "cohort.toml")
    coded = {"feature": "dx__code", "equals": 1, "probability": 0.1}
    rules = {"alerts": AlertRules.model_validate({"rules": {"coded": coded}}), "alerts_to": f"{url}/outreach"}
    config = RunConfig(spec=spec, shards=f"{url}/shards", model=f"{url}/model", output=f"{url}/output", fit=fit, cluster=cluster, **rules)
    for name in ("plan", "drift", "fit", "evaluate", "impute", "commit", "alerts", "report"):
        monkeypatch.setattr(flow, name, getattr(flow, name).fn)
    steps = []
    monkeypatch.setattr(tasks, "update_progress_artifact", lambda _, progress: steps.append(progress))
    for name in ("create_table_artifact", "create_link_artifact"):
        monkeypatch.setattr(tasks, name, lambda *_, **__: None)
    monkeypatch.setattr(tasks, "create_progress_artifact", lambda *_, **__: None)
    with runtime.cluster(cluster):  # one Ray for all stages; the flow above starts its own
        live_through(config, steps, monkeypatch)


def live_through(config: RunConfig, steps: list[float], monkeypatch) -> None:
    """A first run, a second that finds all done, and a retraining."""
    from flows import population as flow

    url = config.output.removesuffix("/output")
    stages = flow.population_run.fn(config)
    assert stages["plan"]["new"] == 2 and stages["impute"]["rows"] == 200 and stages["fit"]["trained"]
    # fit: one epoch, then done; impute, and alerts: two shards, then done
    assert steps == [100.0, 100.0, 50.0, 100.0, 100.0, 50.0, 100.0, 100.0]
    coded = fetch_table(f"{url}/outreach", sorted(table_state(f"{url}/outreach").keys)[0])
    assert stages["alerts"]["counts"]["coded"] > 10 and coded.column("rule").to_pylist()[0] == "coded"
    assert np.isfinite(list(stages["evaluate"]["skill"].values())).all()
    again = flow.population_run.fn(config)
    assert again["plan"]["new"] == again["alerts"]["new"] == 0
    retrained(config, monkeypatch)


def retrained(config: RunConfig, monkeypatch) -> None:
    """A third shard, and a challenger that starts from the champion and is held against it."""
    from flows import events, tasks
    from flows import retraining as flow
    from flows.population import population_run

    publish_table(config.shards, "part-002.parquet", linear_cohort(100, seed=9, first=5000))
    config = config.model_copy(update={"fit": config.fit.model_copy(update={"warm_start": True})})
    for name in ("plan", "challenge", "judge", "settle"):
        monkeypatch.setattr(flow, name, getattr(flow, name).fn)
    shown = {}
    monkeypatch.setattr(tasks, "create_table_artifact", lambda table, key, **_: shown.update({key: table}))
    monkeypatch.setattr(tasks, "create_markdown_artifact", lambda markdown, key: shown.update({key: markdown}))
    told = []
    monkeypatch.setattr(events, "emit", lambda name, _, payload: told.append((name, payload)))
    champion = registry.champion(config.model)
    standing = population_run.fn(config.model_copy(update={"retrain": False}))
    assert standing["fit"]["digest"] == champion and standing["drift"]["shards"] == 1
    assert [name for name, _ in told] == ["mmimpute.drift.found", "mmimpute.retraining.wanted"]  # its labs and rna belong to other latents
    assert "50% more records" in told[1][1]["reasons"][-1] and told[1][1]["reasons"][:-1] == told[0][1]["reasons"]
    told.clear()
    stages = flow.retrain.fn(config)
    challenger, decision = stages["challenge"], stages["judge"]
    assert challenger["trained"] and registry.read_record(challenger["model"], "fitted")["start"].endswith(champion)
    assert decision["champion"] == champion and set(decision["modalities"]) == {"labs", "rna", "dx"}
    expected = challenger["digest"] if decision["promoted"] else champion
    assert stages["settle"]["digest"] == registry.champion(config.model) == expected
    assert [name for name, _ in told] == ["mmimpute.champion.promoted"] * decision["promoted"]
    assert [row["compared"] for row in shown["gate"]] == ["overall", "labs", "rna", "dx", "outcome__died"]
    assert "## Gate" in shown["card"]
    assert not flow.retrain.fn(config)["challenge"]["trained"]
