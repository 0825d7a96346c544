"""Registers a cohort's deployments with the Prefect server of PREFECT_API_URL: `python -m flows.deploying run.toml NAME [POOL [FILE]]`."""

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import yaml
from prefect.automations import Automation
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from flows.events import resource
from mmimpute.console import report_errors
from mmimpute.errors import UserError
from mmimpute.spec import RunConfig, read_config

DEPLOYMENTS = Path(__file__).parent / "prefect.yaml"
LOST = "mmimpute: runs without a sign of life are crashed"
SIGN_OF_LIFE = timedelta(seconds=120)  # four heartbeats of prefect.yaml


def deploy(config: RunConfig, cohort: str, pool: str = "mmimpute", file: Path = DEPLOYMENTS) -> None:
    """Registers or renews the pool, the cohort's queue, its deployments with their triggers, and the automation for lost runs.

    Raises UserError where Prefect refuses.
    """
    with get_client(sync_client=True) as client:
        _ensure_pool(client, pool)
        _ensure_queue(client, pool, cohort)
    filled = yaml.safe_load(file.read_text(encoding="utf-8"))
    for deployment in filled["deployments"]:
        own = deployment["parameters"]
        deployment["parameters"] = own | {"config": config.model_dump(mode="json") | own["config"]}
    names = {"MMIMPUTE_COHORT": cohort, "MMIMPUTE_POOL": pool, "MMIMPUTE_RESOURCE": resource(config)}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as place:
        yaml.safe_dump(filled, place)
        place.flush()
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", place.name]
        done = subprocess.run(command, env=os.environ | names, capture_output=True, text=True, check=False)
    if done.returncode:
        told = done.stdout + done.stderr
        raise UserError(f"{file}: Prefect refuses it: {told[told.find('Response: ') :][:1000].strip()}")
    _ensure_crash_detection()


def _ensure_pool(client: SyncPrefectClient, pool: str) -> None:
    try:
        client.read_work_pool(pool)
    except ObjectNotFound:
        with suppress(ObjectAlreadyExists):  # a worker that starts at this moment makes its pool itself
            client.create_work_pool(WorkPoolCreate(name=pool, type="process"))


def _ensure_queue(client: SyncPrefectClient, pool: str, cohort: str) -> None:
    """One run of a cohort at a time, whichever deployment it is of."""
    try:
        queue = client.read_work_queue_by_name(cohort, work_pool_name=pool)
    except ObjectNotFound:
        client.create_work_queue(cohort, work_pool_name=pool, concurrency_limit=1)
    else:
        client.update_work_queue(queue.id, concurrency_limit=1)


def _ensure_crash_detection() -> None:
    """A run whose machine is gone stays "running" to Prefect, and would keep its cohort's queue for ever."""
    over = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    trigger = EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*"},
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat"} | over,
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        within=SIGN_OF_LIFE,
    )
    action = ChangeFlowRunState(state=StateType.CRASHED, message="no sign of life")
    try:
        Automation.read(name=LOST)
    except ValueError:
        Automation(name=LOST, trigger=trigger, actions=[action]).create()


if __name__ == "__main__":
    with report_errors():
        deploy(read_config(sys.argv[1]), *sys.argv[2:4], *map(Path, sys.argv[4:]))
