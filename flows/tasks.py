"""The tasks that flows are made of. A retry resumes: every stage finds in storage what an earlier try has done."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefect import task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from mmimpute import card, population
from mmimpute.console import console, watch
from mmimpute.errors import MmimputeError, Unreachable
from mmimpute.spec import RunConfig

Record = dict[str, Any]


def mendable(task, run, state) -> bool:
    """Whether another try may help: not where the user has to mend something first."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, Unreachable) or not isinstance(error, MmimputeError)


RETRIES = {"retries": 2, "retry_delay_seconds": 10, "retry_condition_fn": mendable}


@contextmanager
def progress(key: str, part: str, whole: str) -> Iterator[Callable[[dict], None]]:
    """A callback that shows progress on the console and, per percent, in a Prefect artifact."""
    artifact = create_progress_artifact(0.0, key=key)
    show, shown = watch(key), 0

    def update(record: dict) -> None:
        nonlocal shown
        show(record)
        percent = 100 * record.get(part, 0) // record[whole] if whole in record else 0
        if percent > shown:
            shown = percent
            update_progress_artifact(artifact, progress=float(percent))

    yield update
    update_progress_artifact(artifact, progress=100.0)


@task(**RETRIES)
def plan(config: RunConfig) -> Record:
    planned = population.plan(config)
    rows = [{"shard": shard, "set aside because": error} for shard, error in planned["set_aside"].items()]
    create_table_artifact(rows or [{k: planned[k] for k in ("shards", "rows", "new")}], key="plan")
    return planned


@task(**RETRIES)
def fit(config: RunConfig, plan_name: str) -> Record:
    with progress("fit", "epoch", "epochs") as update:
        fitted = population.fit(config, plan_name, update)
    create_link_artifact(fitted["model"], key="model", description=fitted["reason"])
    return fitted


@task(**RETRIES)
def challenge(config: RunConfig, plan_name: str) -> Record:
    with progress("challenge", "epoch", "epochs") as update:
        fitted = population.challenge(config, plan_name, update)
    create_link_artifact(fitted["model"], key="challenger", description="trained" if fitted["trained"] else "fitted before")
    return fitted


@task(**RETRIES)
def judge(config: RunConfig, plan_name: str, fitted: Record) -> Record:
    decision = population.judge(config, plan_name, fitted["digest"])
    rows = [dict(zip(("compared", *card.GATE[1:]), row, strict=True)) for row in card.gate_rows(decision)]
    create_table_artifact(rows or [{"decision": decision["reason"]}], key="gate", description=decision["reason"])
    create_markdown_artifact(population.model_card(fitted["model"]), key="card")
    return decision


@task(**RETRIES)
def settle(config: RunConfig, fitted: Record, decision: Record) -> Record:
    settled = population.settle(config, fitted, decision)
    create_link_artifact(settled["model"], key="model", description=settled["reason"])
    return settled


@task(**RETRIES)
def evaluate(config: RunConfig, plan_name: str, model: str) -> Record:
    found = population.evaluate(config, plan_name, model)
    create_table_artifact([{"modality": m, "skill": s} for m, s in found["skill"].items()], key="accuracy")
    return found


@task(**RETRIES)
def drift(config: RunConfig, plan_name: str, model: str) -> Record:
    found = population.drift(config, plan_name, model)
    told = {name: found[name] for name in ("shards", "drifted", "not_compared") if name in found}
    create_table_artifact([{"drifted because": reason} for reason in found["reasons"]] or [told], key="drift")
    return found


@task(**RETRIES)
def impute(config: RunConfig, plan_name: str, model: str) -> Record:
    with progress("impute", "imputed", "of") as update:
        return population.impute(config, plan_name, model, update)


@task(**RETRIES)
def commit(config: RunConfig, plan_name: str, model: str, imputed: Record) -> Record:
    done = population.commit(config, plan_name, model, imputed)
    create_table_artifact([{k: done[k] for k in ("table", "version", "added", "removed")}], key="commit")
    return done


@task(**RETRIES)
def alerts(config: RunConfig, model: str) -> Record:
    with progress("alerts", "listed", "of") as update:
        done = population.alerts(config, model, update)
    create_table_artifact([{"rule": rule, "people": people} for rule, people in done["counts"].items()], key="alerts")
    return done


@task(**RETRIES)
def report(config: RunConfig, stages: dict[str, Record], seconds: dict[str, float]) -> Record:
    written = population.report(config, stages, seconds)
    create_link_artifact(written["report"], key="report")
    return written


class Stages:
    """What each stage of a flow did, and the seconds that it took."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.done: dict[str, Record] = {}
        self.seconds: dict[str, float] = {}

    def run(self, stage: Callable[..., Record], *arguments: Any) -> Record:
        """Runs one task with the configuration as its first argument, and keeps what it returns under its name."""
        name = stage.__name__
        console.print(f"{name} ...")
        began = time.perf_counter()
        self.done[name] = stage(self.config, *arguments)
        self.seconds[name] = time.perf_counter() - began
        return self.done[name]
