"""Retraining as a Prefect flow: `python -m flows.retraining run.toml`."""

import sys

from prefect import flow

from flows import events
from flows.tasks import Record, Stages, challenge, judge, plan, settle
from mmimpute import population
from mmimpute.cluster import runtime
from mmimpute.console import report_errors
from mmimpute.spec import RunConfig, read_config


@flow(name="retrain")
def retrain(config: RunConfig) -> Record:
    """A challenger for the shards as they are now: plan, challenge, judge, settle. Returns what each stage did; imputes nothing.

    A new champion is told by one `mmimpute.champion.promoted` event. Raises SetAside at the end where shards had to be set aside.
    """
    with runtime.shared():  # no decorator: Prefect takes a flow's version from the file of its function
        return _retrain(config)


def _retrain(config: RunConfig) -> Record:
    stages = Stages(config)
    planned = stages.run(plan)["plan"]
    fitted = stages.run(challenge, planned)
    decision = stages.run(judge, planned, fitted)
    settled = stages.run(settle, fitted, decision)
    if settled["promoted"]:
        events.emit("mmimpute.champion.promoted", config, {"model": settled["digest"], "reason": settled["reason"]})
    population.raise_if_set_aside(population.set_aside(stages.done))
    return stages.done


if __name__ == "__main__":
    with report_errors():
        retrain(read_config(sys.argv[1]))
