"""Training through Ray beside a bare loop over tensors in memory: what the engine takes of a training epoch.

    python tests/benchmarks/ingest.py FOLDER [--rows 100000] [--width 128] [--epochs 4] [--rounds 1]

FOLDER keeps a simulated cohort, as `mmimpute generate-cohort` makes it. Three processes, one after the other, with the same model, batches,
threads and judging records: `jobs.fit_model` with the records in memory ("cached"), the same with FitSettings.cache_share=0
("streamed"), and a loop of `Training.step` over tensors shuffled by index ("bare"). Prints the records a second of the epochs from
the second on, their median, and its ratio to the bare loop's; also the first epoch's, and the seconds of the whole fit, which
profiles the records before and fits the other experts and the stack after those epochs.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHARD_ROWS = 10_000


def cached(folder: Path, epochs: int) -> dict:
    return fitted(folder, epochs, "cached", {})


def streamed(folder: Path, epochs: int) -> dict:
    return fitted(folder, epochs, "streamed", {"cache_share": 0.0})


def fitted(folder: Path, epochs: int, name: str, settings: dict) -> dict:
    from mmimpute import jobs, planning, registry
    from mmimpute.spec import ClusterSettings, FitSettings, read_spec

    home = folder / f"model-{name}"
    shutil.rmtree(home, ignore_errors=True)
    found = planning.survey(str(folder / "cohort" / "shards"), read_spec(folder / "cohort" / "cohort.toml"))
    # Patience as long as the run: no epoch is to be left out.
    done = jobs.fit_model(found, str(home), FitSettings(epochs=epochs, patience=epochs, **settings), ClusterSettings())
    registry.promote(str(home), done["digest"])
    history = registry.read_record(done["model"], "history")
    return {"rates": [e["rows_per_second"] for e in history], "seconds": done["seconds"]}


def bare(folder: Path, epochs: int) -> dict:
    """The same network, from the model that was fitted last; what a step costs does not depend on its weights."""
    import torch

    from mmimpute import registry
    from mmimpute.cluster.fit import TUNE_BATCH
    from mmimpute.data.tensors import split
    from mmimpute.training import OptimiserSettings, Training, judges, schedule, shuffled, slices, take

    torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))  # as the worker of a fit has
    model = registry.load(str(folder / "model-cached"))
    x_ND, fold_N = tensors(folder, model)
    plan = schedule(len(x_ND), None, epochs)
    values, masks = split(x_ND, model.widths)
    data = [v.contiguous() for v in values], masks
    learners = ((fold_N < 0) | (model.module.config.members > 1)).nonzero().squeeze(1)
    rows = judges(fold_N, model.module.config.members)
    training = Training(model.module.vae, OptimiserSettings(), plan.total_steps)
    shuffle, began, rates = torch.Generator().manual_seed(0), time.perf_counter(), []
    for _ in range(epochs):
        start = time.perf_counter()
        order = learners[shuffled(len(learners), plan.steps_per_epoch * plan.batch, shuffle)]
        for index in order.split(plan.batch):
            training.step(*take(data, index), fold_N[index])
        training.tune((*take(data, rows[i]), fold_N[rows[i]]) for i in slices(len(rows), TUNE_BATCH))
        rates.append(len(order) / (time.perf_counter() - start))
    return {"rates": rates, "seconds": time.perf_counter() - began}


def tensors(folder: Path, model) -> tuple:
    """All records, N x D, and the member that does not learn from each."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    from mmimpute.data.arrow import decode, flat
    from mmimpute.data.split import fold, position

    table = pq.read_table(folder / "cohort" / "shards", columns=model.schema.columns).combine_chunks()
    place = position(table.column(model.schema.subject_id))
    folds = fold(place, model.module.config.members)
    return torch.from_numpy(np.ascontiguousarray(flat(decode(table, model.schema, "all")))), torch.from_numpy(folds)


WAYS = {"cached": cached, "streamed": streamed, "bare": bare}


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(WAYS[sys.argv[2]](Path(sys.argv[3]), int(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=4, help="of each; the first does not count")
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    folder = given.folder.resolve() / f"{given.rows}x{given.width}"
    generate(folder / "cohort", given.rows, given.width)
    found: dict[str, list[dict]] = {name: [] for name in WAYS}
    for _ in range(given.rounds):
        for name in WAYS:
            found[name].append(measure(name, folder, given.epochs))
            rates, seconds = found[name][-1]["rates"], found[name][-1]["seconds"]
            print(f"{name:8} records a second by epoch: {', '.join(f'{r:,.0f}' for r in rates)}; {seconds:.0f} s in all", flush=True)
    medians = {name: statistics.median(r for run in runs for r in run["rates"][1:]) for name, runs in found.items()}
    for name, rate in medians.items():
        print(f"{name:8} {rate:9,.0f} records a second from the second epoch on, {rate / medians['bare']:.2f} of the bare loop's")


def generate(folder: Path, rows: int, width: int) -> None:
    from mmimpute.simulating import write_cohort
    from mmimpute.simulation import Population

    write_cohort(Population(width=width), str(folder), rows, SHARD_ROWS, truth=False)


def measure(name: str, folder: Path, epochs: int) -> dict:
    command = [sys.executable, __file__, "--measure", name, str(folder), str(epochs)]
    # As mmimpute sets it for itself: threads that wait do not spin.
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
