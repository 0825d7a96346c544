"""One shard of gigabytes: what it costs in memory to impute it.

    python tests/benchmarks/large_shard.py FOLDER [--gigabytes 2] [--members 1]

A shard of random float64 lists (96 and 32 values a record; a fifth of the records lack the first, a fiftieth of the other values is
missing, so nearly every record is written out completed), once in row groups of pyarrow's default of 2^20 records, once as one row
group. FOLDER keeps them. Each is imputed by `imputing.impute_shard` in a fresh process. Prints that process's seconds and peak
resident memory, what of it was there before the shard was opened, and the sizes of both files. The model's weights are untrained.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

DEFAULT_GROUP = 1 << 20  # pyarrow's
CHUNK = 65_536  # records made at a time


def parts() -> tuple:
    from workload import Part

    return Part("wide", "real", 96, "float64", 0.2, 0.02), Part("narrow", "real", 32, "float64", 0.0, 0.02)


def write(path: Path, rows: int, group: int) -> None:
    """A shard in row groups of `group` records."""
    from workload import records

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with pq.ParquetWriter(new, records(parts(), 1, 0).schema, compression="zstd", write_page_checksum=True) as writer:
        for start in range(0, rows, group):
            stop = min(rows, start + group)
            pieces = [records(parts(), min(CHUNK, stop - at), at) for at in range(start, stop, CHUNK)]
            writer.write_table(pa.concat_tables(pieces), row_group_size=group)
    new.rename(path)


def impute(model: str, shards: str, output: str) -> dict:
    from mmimpute import imputing, registry
    from mmimpute.data.shards import list_shards
    from mmimpute.spec import ImputeSettings

    loaded, (shard,) = registry.load(model), list_shards(shards)
    before, began = peak(), time.perf_counter()
    status = imputing.impute_shard(loaded, shards, shard, output, ImputeSettings())
    return {"seconds": time.perf_counter() - began, "before": before, "peak": peak(), "status": status}


def peak() -> float:
    """MiB of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def apart(*arguments: str) -> str:
    """The last line that this script prints, called in a fresh process."""
    command, env = [sys.executable, __file__, *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]


def prepare(folder: Path, gigabytes: float, members: int) -> None:
    """In a process of its own, or the memory that it takes would be the first of the next one's too."""
    from workload import make_model

    rows = int(gigabytes * 1e9 / (8 * sum(p.width for p in parts())))
    for name, group in {"default": DEFAULT_GROUP, "one": rows}.items():
        write(folder / f"{name}-{rows}" / "shard.parquet", rows, group)
    print(json.dumps({"rows": rows, "model": make_model(folder / f"model-{members}", parts(), members)}))


def main() -> None:
    if sys.argv[1:2] == ["--impute"]:
        print(json.dumps(impute(*sys.argv[2:])))
        return
    if sys.argv[1:2] == ["--prepare"]:
        prepare(Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--members", type=int, default=1, choices=(1, 5))
    given = parser.parse_args()
    folder = given.folder.resolve()
    made = json.loads(apart("--prepare", str(folder), str(given.gigabytes), str(given.members)))
    for name, label in {"default": "row groups of 2^20 records", "one": "one row group"}.items():
        shards, output = folder / f"{name}-{made['rows']}", folder / "enriched"
        found = json.loads(apart("--impute", made["model"], str(shards), str(output)))
        status, written = found["status"], output / found["status"]["output"]
        if status["error"]:
            sys.exit(status["error"])
        sizes = " -> ".join(f"{p.stat().st_size / 1e9:.2f} GB" for p in (shards / "shard.parquet", written))
        print(f"{label} ({pq.ParquetFile(shards / 'shard.parquet').num_row_groups}): {made['rows']:,} records, {sizes}")
        print(
            f"  {found['seconds']:.1f} s, peak memory {found['peak']:,.0f} MiB, of which {found['before']:,.0f} before the shard was opened"
        )
        print(f"  phases: {status['seconds']}", flush=True)
        written.unlink()


if __name__ == "__main__":
    main()
