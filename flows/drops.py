"""New data drops: a watcher that tells of each once, and the run that takes it in."""

import sys
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect import flow

from flows import events
from flows.population import population_run
from flows.tasks import Record
from mmimpute import drops
from mmimpute.console import console, report_errors
from mmimpute.spec import RunConfig, read_config


@flow(name="watch")
def watch(config: RunConfig, quiet_minutes: float = 10, notification: dict[str, Any] | None = None) -> Record:
    """Looks whether a new drop lies among the shards, and emits one `mmimpute.drop.settled` event when it is whole.

    quiet_minutes: a drop is whole when nothing of it was written for so long. notification: what the store said of an object, where
    notifications start this flow and no schedule does; one of something else than a shard of the cohort is passed over.
    Returns {drop, shards, bytes, state}; state is "none", "growing", "announced" or "announced before".
    """
    nothing = {"drop": None, "shards": 0, "bytes": 0, "state": "none"}
    if notification is not None and not drops.concerns(drops.notified(notification), config.shards):
        return nothing
    drop = drops.look(config.shards, config.output, timedelta(minutes=quiet_minutes))
    if drop is None:
        return nothing
    if not drop.settled:
        return drop.told | {"state": "growing"}
    if drops.announced(config.output, drop):
        return drop.told | {"state": "announced before"}
    events.emit("mmimpute.drop.settled", config, drop.told, UUID(drop.name))  # a second event of this id is none to Prefect
    drops.note_announced(config.output, drop)
    return drop.told | {"state": "announced"}


@flow(name="data-drop")
def data_drop(config: RunConfig) -> Record:
    """Takes in what is new: a population run with the champion as it stands. Returns and raises as that does."""
    return population_run.fn(config.model_copy(update={"retrain": False}))


if __name__ == "__main__":
    with report_errors():
        console.print(watch(read_config(sys.argv[1])))
