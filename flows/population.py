"""The population-scale run as a Prefect flow: `python -m flows.population run.toml`."""

import sys

from prefect import flow

from flows import events
from flows.tasks import Record, Stages, alerts, commit, drift, evaluate, fit, impute, plan, report
from mmimpute import population
from mmimpute.cluster import runtime
from mmimpute.console import report_errors
from mmimpute.spec import RunConfig, read_config


@flow(name="population-run")
def population_run(config: RunConfig) -> Record:
    """One population-scale run: plan, drift of what is new, fit, evaluate, impute, commit, alerts, report. Returns what each stage did.

    Drift is told by one `mmimpute.drift.found` event, and where the champion imputes as it is, reasons for retraining by one
    `mmimpute.retraining.wanted` event.
    Raises SetAside at the end where shards had to be set aside; the others are published by then.
    """
    with runtime.shared():  # no decorator: Prefect takes a flow's version from the file of its function
        return _run(config)


def _run(config: RunConfig) -> Record:
    stages = Stages(config)
    planned = stages.run(plan)["plan"]
    if champion := population.champion(config):
        found = stages.run(drift, planned, champion)
        if found["drifted"]:
            events.emit("mmimpute.drift.found", config, {"reasons": found["reasons"]})
    model = stages.run(fit, planned)["model"]
    stages.run(evaluate, planned, model)
    imputed = stages.run(impute, planned, model)
    stages.run(commit, planned, model, imputed)
    if config.alerts:
        stages.run(alerts, model)
    stages.run(report, stages.done, stages.seconds)
    if reasons := [] if config.retrain else population.asks_for_retraining(config, stages.done):
        events.emit("mmimpute.retraining.wanted", config, {"reasons": reasons})
    population.raise_if_set_aside(population.set_aside(stages.done))
    return stages.done


if __name__ == "__main__":
    with report_errors():
        population_run(read_config(sys.argv[1]))
