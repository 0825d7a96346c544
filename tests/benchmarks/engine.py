"""The engine beside a hand-written reference: what `mmimpute impute` costs more than a pool of processes over the same files.

    python tests/benchmarks/engine.py FOLDER [--shards 200] [--rows 10000] [--members 1] [--workers 2] [--threads 1] [--repeats 5]
    python tests/benchmarks/engine.py FOLDER --flat 20 200 2000 --rows 1000

FOLDER keeps the shards between calls: 64 labs with 30% gaps, 128 codes and a 64-d embedding per record, each missing as a whole
in some records. The model's weights are untrained, and as fast as trained ones (see `workload.make_model`). "ray" is
`jobs.impute_cohort` in a process of its own, so planning, checks, lineage and the commit are in it; "reference" reads, predicts and
writes the same columns in a spawned pool, and does none of that. Both call the same `predict` in as many processes with as many
threads, take turns, and are watched from outside.

Prints one table: per path the median of the runs, and the median of ray's ratios to the reference of the same round; a line per
run; whether both wrote the same values. "steady" is from the moment when a tenth of the shards, and one per worker, were published to
the last one. CPU seconds are of all processes (user and system; of Ray: driver, raylet, GCS, agents and workers), memory is the
largest sum of proportional shares. --flat instead runs the Ray path alone over several numbers of shards, and prints the seconds per
million records in steady state and the driver's resident memory.

--daft and --spark add these two, one shard per row as in the Ray path, where `daft` or `pyspark` is importable (run with 0.7 and 4.3).
"""

import argparse
import functools
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from processes import Watched, watch
from rich.console import Console
from rich.table import Table


class Job(NamedTuple):
    shards: str
    model: str
    output: str
    workers: int
    threads: int
    rows: int  # of a shard


class Measured(NamedTuple):
    """One run; METRICS says what the fields are."""

    steady_rows: float
    steady_cpu: float
    seconds: float
    cpu: float
    cpu_per_million: float
    first: float
    memory: float
    driver: float
    watching: float


METRICS = {
    "steady_rows": "records a second, steady",
    "steady_cpu": "CPU seconds per million records, steady",
    "seconds": "whole run, seconds",
    "cpu": "whole run, CPU seconds",
    "cpu_per_million": "whole run, CPU seconds per million records",
    "first": "seconds to the first published shard",
    "memory": "peak memory, MiB (proportional shares)",
    "driver": "peak resident memory of the first process, MiB",
    "watching": "CPU seconds that watching took beside it",
}

# -- the paths, each run in a process of its own ------------------------------------------------------------------
# What they import is imported inside: a parent that only hands out file names should not pay for torch.


def ray_path(job: Job) -> None:
    from mmimpute import jobs
    from mmimpute.spec import ClusterSettings, ImputeSettings

    jobs.impute_cohort(job.model, job.shards, job.output, ImputeSettings(), ClusterSettings(cpus=job.workers, actors=job.workers))


def reference(job: Job) -> None:
    Path(job.output).mkdir()
    with multiprocessing.get_context("spawn").Pool(job.workers) as pool:
        for _ in pool.imap_unordered(functools.partial(impute_file, job), sorted(p.name for p in Path(job.shards).iterdir())):
            pass


def daft_path(job: Job) -> None:
    import daft

    importable_by_workers()

    @daft.cls(max_concurrency=job.workers, use_process=True)
    class Imputer:
        def __call__(self, name: str) -> int:
            from engine import impute_file

            return impute_file(job, name)

    Path(job.output).mkdir()
    names = sorted(p.name for p in Path(job.shards).iterdir())
    shards = daft.from_pydict({"name": names}).into_batches(1)
    shards.select(Imputer()(shards["name"])).collect()


def spark_path(job: Job) -> None:
    from pyspark.sql import SparkSession

    importable_by_workers()
    os.environ["PYSPARK_PYTHON"] = sys.executable

    def impute(batches):
        from engine import impute_file

        for batch in batches:
            yield pa.record_batch({"rows": [impute_file(job, name) for name in batch.column("name").to_pylist()]})

    Path(job.output).mkdir()
    names = sorted(p.name for p in Path(job.shards).iterdir())
    spark = SparkSession.builder.master(f"local[{job.workers}]").config("spark.ui.enabled", "false").getOrCreate()
    spark.createDataFrame([(n,) for n in names], "name string").repartition(len(names)).mapInArrow(impute, "rows long").collect()
    spark.stop()


def importable_by_workers() -> None:
    """This file as a module: what is pickled of a script by value cannot hold its caches."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])


PATHS = {"reference": reference, "ray": ray_path, "daft": daft_path, "spark": spark_path}


# -- one shard by hand --------------------------------------------------------------------------------------------


@functools.cache
def loaded(place: str):
    from mmimpute import registry

    return registry.load(place)


def impute_file(job: Job, name: str) -> int:
    """Reads, predicts and writes one shard in as few steps as there are, checking nothing. Returns its rows."""
    import torch

    from mmimpute.imputing import predict
    from mmimpute.spec import ImputeSettings

    model = loaded(job.model)
    shard = pq.read_table(Path(job.shards) / name, use_threads=job.threads > 1, page_checksum_verification=True).combine_chunks()
    records = {m.name: numbers(shard.column(m.columns[0]).chunk(0)) for m in model.schema.modalities}
    imputed, _ = predict(model, records, ImputeSettings(), torch.Generator())
    for column, x in records.items():
        lacking = pa.array(~np.isnan(x).any(1))
        # Where a value was observed, the prediction is that value, and its deviation 0.
        for suffix, values in (("__imputed", imputed[column].mean), ("__std", imputed[column].std)):
            lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), x.shape[1], mask=lacking)
            shard = shard.append_column(column + suffix, lists)
    shard = shard.append_column("from_prior", pa.array(np.logical_and.reduce([np.isnan(x).all(1) for x in records.values()])))
    pq.write_table(shard, Path(job.output) / name, compression="zstd", write_page_checksum=True)
    return len(shard)


def numbers(lists: pa.FixedSizeListArray) -> np.ndarray:
    """N x D, NaN for null."""
    present, width = lists.is_valid().to_numpy(zero_copy_only=False), lists.type.list_size
    x = np.full((len(lists), width), np.nan, np.float32)
    x[present] = lists.flatten().cast(pa.float32()).to_numpy(zero_copy_only=False).reshape(-1, width)
    return x


# -- measuring ----------------------------------------------------------------------------------------------------


def measure(name: str, job: Job) -> Measured:
    """One run into an empty folder, watched. When a shard was published is the time of its file."""
    shutil.rmtree(job.output, ignore_errors=True)
    os.sync()  # or this run would share the disk with what the last one left to be written
    env = os.environ | {"OMP_NUM_THREADS": str(job.threads)}  # what torch and Arrow take their number of threads from
    watched = watch([sys.executable, __file__, "--measure", name, json.dumps(job)], env)
    published = sorted(p.stat().st_mtime for p in outputs(job))
    return measured(watched, published, job)


def outputs(job: Job) -> list[Path]:
    return sorted(Path(job.output).glob("*.parquet"))


def measured(watched: Watched, published: list[float], job: Job) -> Measured:
    before = min(max(job.workers, len(published) // 10), len(published) - 1)
    start, end = published[before - 1], published[-1]
    rows, steady_rows = len(published) * job.rows, (len(published) - before) * job.rows
    cpu, steady_cpu = watched.cpu_seconds(), watched.cpu_seconds(end) - watched.cpu_seconds(start)
    return Measured(
        steady_rows=steady_rows / (end - start),
        steady_cpu=steady_cpu / steady_rows * 1e6,
        seconds=watched.seconds,
        cpu=cpu,
        cpu_per_million=cpu / rows * 1e6,
        first=published[0] - watched.began,
        memory=watched.peak_memory / 2**20,
        driver=watched.peak_root / 2**20,
        watching=watched.watching,
    )


def told(console: Console, label: str, found: Measured) -> None:
    console.print(f"{label}: " + "; ".join(f"{METRICS[name]} {value:,.1f}" for name, value in found._asdict().items()), soft_wrap=True)


def compare(console: Console, names: list[str], job: Job, repeats: int) -> None:
    found: dict[str, list[Measured]] = {name: [] for name in names}
    for number in range(repeats):
        # Forth and back, so that a machine that grows slower favours none of them.
        for name in names if number % 2 == 0 else names[::-1]:
            found[name].append(measure(name, own(job, name)))
            told(console, f"{number + 1} of {repeats}, {name}", found[name][-1])
    show(console, found, f"{len(outputs(own(job, 'ray')))} shards of {job.rows:,} records, {job.workers} workers, medians of {repeats}")
    console.print(agreement(own(job, "reference"), own(job, "ray")))
    for name in names:
        shutil.rmtree(own(job, name).output)


def own(job: Job, name: str) -> Job:
    return job._replace(output=f"{job.output}-{name}")


def show(console: Console, found: dict[str, list[Measured]], title: str) -> None:
    others = [name for name in found if name != "reference"]
    table = Table("", *found, *(f"{name} / reference" for name in others), title=title)
    for metric, label in METRICS.items():
        values = {name: [getattr(m, metric) for m in runs] for name, runs in found.items()}
        ratios = {name: [a / b for a, b in zip(values[name], values["reference"], strict=True)] for name in others}
        medians = [f"{statistics.median(v):,.1f}" for v in values.values()]
        table.add_row(label, *medians, *(f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios.values()))
    console.print(table)


def agreement(by_hand: Job, by_ray: Job) -> str:
    """Whether both wrote the same, looking at one shard."""
    a, b = pq.read_table(outputs(by_hand)[0]), pq.read_table(outputs(by_ray)[0])
    if a.column_names != b.column_names:
        return f"THE COLUMNS DIFFER: {a.column_names} and {b.column_names}"
    worst, nulls = 0.0, True
    for name in a.column_names[1:-1]:
        x, y = (numbers(t.column(name).combine_chunks()) for t in (a, b))
        nulls &= bool((np.isnan(x) == np.isnan(y)).all())
        worst = max(worst, float(np.nanmax(np.abs(x - y), initial=0)))
    return f"the first shard's values differ by {worst:.1e} at most, and its nulls are {'the same' if nulls else 'NOT THE SAME'}"


def flat(console: Console, folder: Path, sizes: list[int], job: Job) -> None:
    """The Ray path over ever more shards."""
    from workload import write_shards

    table = Table("shards", "seconds per million records, steady", "first shard after, s", "driver, MiB", "all processes, MiB")
    table.title = f"The Ray path over shards of {job.rows:,} records"
    for shards in sizes:
        found = measure("ray", job._replace(shards=str(write_shards(folder, shards, job.rows))))
        numbers = (1e6 / found.steady_rows, found.first, found.driver, found.memory)
        table.add_row(str(shards), *(f"{n:,.1f}" for n in numbers))
        told(console, f"{shards} shards", found)
    console.print(table)
    shutil.rmtree(job.output)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps the shards and the model")
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--rows", type=int, default=10_000, help="records of a shard")
    parser.add_argument("--members", type=int, default=1, choices=(1, 5))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--flat", type=int, nargs="+", metavar="SHARDS")
    parser.add_argument("--daft", action="store_true")
    parser.add_argument("--spark", action="store_true")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        PATHS[sys.argv[2]](Job(*json.loads(sys.argv[3])))
        return
    given, console = parsed(), Console(width=140, highlight=False)
    from workload import make_model, write_shards

    folder = given.folder.resolve()
    model = make_model(folder / f"model-{given.members}", members=given.members)
    job = Job("", model, str(folder / "enriched"), given.workers, given.threads, given.rows)
    if given.flat:
        flat(console, folder, given.flat, job)
        return
    wanted = {"reference": True, "ray": True, "daft": given.daft, "spark": given.spark}
    packages = {"daft": "daft", "spark": "pyspark"}
    names = [n for n, w in wanted.items() if w and (n not in packages or importlib.util.find_spec(packages[n]))]
    if absent := [n for n, w in wanted.items() if w and n not in names]:
        console.print(f"left out, not installed: {', '.join(absent)}")
    compare(console, names, job._replace(shards=str(write_shards(folder, given.shards, given.rows))), given.repeats)


if __name__ == "__main__":
    main()
