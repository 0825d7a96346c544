"""How long, on what, and for how much: a table computed from measured figures per record.

    python tests/benchmarks/sizing.py [--price 0.05] [--impute 112] [--fit 174] [--features 256]

--impute: CPU seconds per million records of --features features, start-up apart: `engine.py FOLDER` prints it (steady state, Ray path).
--fit: CPU seconds per million records and epoch of `mmimpute fit`, whole command: 1,000,000 records took 696 s on two CPUs for eight
epochs. A fit of as many makes 8,000 steps, or one epoch where that is more.
--price: of one CPU for one hour, in whatever money; a CPU is a hardware thread, as clouds sell them.

What the table assumes and nobody has measured: that time is proportional to records and to features, and that CPUs share the work as two
do (two processes reached 95% of a hand-written pool; never more than two threads were there). Spot nodes, storage and requests are not
in the price, beyond one PUT and two GETs a shard being counted. No GPU was ever measured, so none is in the table.
"""

import argparse
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from mmimpute.training import schedule

START = 11.1  # s to the first published shard (engine.py)
ACTOR, DRIVER, PLANNED = (
    0.95,
    0.55,
    0.4e-6,
)  # GiB: an imputing actor's peak with a 1.6 GB shard (large_shard.py), the driver, and per shard (plan.py)
COHORTS = ((1_000_000, 256, 100, 4), (10_000_000, 256, 1_000, 16), (10_000_000, 2_000, 10_000, 64), (100_000_000, 256, 10_000, 64))


class Figures(NamedTuple):
    """CPU seconds per million records of `features` features (fit: and epoch); money per CPU and hour."""

    impute: float
    fit: float
    features: int
    price: float


class Estimate(NamedTuple):
    """Hours of imputing on all CPUs and of fitting on two; GiB of all processes while imputing; money for both; requests to the store."""

    impute: float
    fit: float
    memory: float
    cost: float
    requests: int


def estimate(rows: int, features: int, shards: int, cpus: int, figures: Figures) -> Estimate:
    """cpus: one imputing actor each."""
    work = rows / 1e6 * features / figures.features
    impute = (START + work * figures.impute / min(cpus, shards)) / 3600
    fit = work * schedule(rows).epochs * figures.fit / 2 / 3600
    memory = cpus * ACTOR + DRIVER + shards * PLANNED
    return Estimate(impute, fit, memory, (cpus * impute + 2 * fit) * figures.price, 3 * shards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("impute", 112.0), ("fit", 174.0), ("features", 256), ("price", 0.05)):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    figures = Figures(**vars(parser.parse_args()))
    table = Table("records", "features", "shards", "CPUs", "impute, h", "fit on two CPUs, h", "memory, GiB", "cost", "requests")
    for cohort in COHORTS:
        found = estimate(*cohort, figures)
        shown = (f"{found.impute:.2f}", f"{found.fit:.1f}", f"{found.memory:.0f}", f"{found.cost:.2f}", f"{found.requests:,}")
        table.add_row(*(f"{value:,}" for value in cohort), *shown)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
