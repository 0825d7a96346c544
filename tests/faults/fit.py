"""A driver that fits the model of the training tests: python -m tests.faults.fit SHARDS MODEL SPEC [ADDRESS]."""

import sys

from mmimpute import jobs, planning
from mmimpute.spec import ClusterSettings, FitSettings, read_spec

SETTINGS = FitSettings(epochs=8, batch_size=32, workers=1, checkpoint_seconds=0)


def fit(shards: str, home: str, spec: str, address: str | None = None, on_progress=jobs.ignore) -> dict:
    found = planning.survey(shards, read_spec(spec))
    return jobs.fit_model(found, home, SETTINGS, ClusterSettings(address=address), on_progress)


def tell(record: dict) -> None:
    if "epoch" in record:
        print("epoch", record["epoch"], flush=True)


if __name__ == "__main__":
    fit(*sys.argv[1:], on_progress=tell)
