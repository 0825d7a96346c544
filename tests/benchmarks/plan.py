"""The plan of a run over a million shards: what is to be done, given what there is and what was done before.

    python tests/benchmarks/plan.py [--shards 1000000] [--done 0.9]

Two listings are made up, of input shards (`year=2024/part-000123.parquet`, with ETags) and of enriched ones, of which a share is
there already. Prints the seconds that it takes to find what is left, and the peak memory of this process, which holds what a driver
imports, the input's listing and the plan, beside the targets. Not in it: the requests that a real listing takes (a thousand keys
each), the shards' footers, and handing out the work.
"""

import argparse
import resource
import time
from collections.abc import Iterator
from unittest import mock

from mmimpute import jobs  # noqa: F401  what a driver has imported counts
from mmimpute.data import table
from mmimpute.data.shards import Shard
from mmimpute.data.table import digest, output_key
from mmimpute.imputing import settings_digest
from mmimpute.spec import ImputeSettings

MODEL, SETTINGS = digest("some model"), settings_digest(ImputeSettings())
TARGET_SECONDS, TARGET_MIB = 60, 1000


def left_to_do(shards: list[Shard], published: Iterator[Shard]) -> list[Shard]:
    """What `jobs.impute_table` computes, with this listing of the output."""
    with mock.patch.object(table, "published", lambda url: published):
        return table.outstanding("somewhere", table.expected(shards, MODEL, SETTINGS))


def listed(count: int) -> Iterator[Shard]:
    for number in range(count):
        yield Shard(f"year={2000 + number * 25 // count}/part-{number:06d}.parquet", f"{number:032x}", 4_000_000 + number)


def peak() -> float:
    """MiB of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--done", type=float, default=0.9, help="share of them that were imputed before")
    given = parser.parse_args()
    imported = peak()
    shards = list(listed(given.shards))
    done = int(given.done * given.shards)
    before, began = peak(), time.perf_counter()
    left = left_to_do(shards, (Shard(output_key(s, MODEL, SETTINGS), s.etag, 3 * s.size) for s in shards[:done]))
    seconds = time.perf_counter() - began
    print(f"{len(shards):,} shards, {done:,} done before, {len(left):,} left to do")
    print(f"  {seconds:.2f} s (target {TARGET_SECONDS} s)")
    print(f"  peak memory {peak():,.0f} MiB (target {TARGET_MIB:,}): imports {imported:,.0f}, the listing {before - imported:,.0f} more,")
    print(f"  the plan {peak() - before:,.0f} more")


if __name__ == "__main__":
    main()
