"""The command itself: killed, asked to end, and run twice at once."""

import signal
from contextlib import ExitStack

import pytest

from mmimpute import jobs
from mmimpute.data import table
from mmimpute.data.shards import fetch_table
from tests.faults.conftest import ROWS, SETTINGS, SHARDS
from tests.faults.processes import FEW, MOMENTS, PATIENCE, Driver, driver, moments, still_there, title_of, wait_until

pytestmark = pytest.mark.services
GRACE = 10.0 if MOMENTS >= 20 else 60.0  # seconds from a notice to the end: 10 are promised, and seen where nothing runs beside it


def command(cohort, output: str, *options: str) -> list[str]:
    arguments = ["--model", cohort.model, "--shards", cohort.shards, "--output", output, "--draws", str(SETTINGS.draws)]
    return ["-m", "mmimpute.cli", "impute", *arguments, *options]


def interrupted(run: Driver, output: str, published: int, sign: signal.Signals) -> None:
    """Signals the command once so many shards, one of them its own, are published: its work ends, with none half-published."""
    published = max(published, count(output) + 1)  # the run before may have got further than it was to
    wait_until(lambda: count(output) >= published or run.process.poll() is not None, PATIENCE, run.log.read_text)
    assert run.process.poll() is None, run.log.read_text()
    had = run.signal(sign)
    assert len(had) > 5, "Ray's processes were not seen"
    workers = [p for p in had if sign == signal.SIGTERM or "Agent" not in title_of(p)]
    run.wait(GRACE)
    wait_until(lambda: not still_there(workers), GRACE, lambda: still_there(workers))
    assert table.table_state(output).version is None
    assert all(len(fetch_table(output, found.key)) == ROWS for found in table.published(output))


def count(output: str) -> int:
    return sum(1 for _ in table.published(output))


CHAINS = [(signal.SIGKILL, at) for at in moments("driver killed", SHARDS * 3 // 4)]
CHAINS += [(signal.SIGTERM, at) for at in moments("driver terminated", SHARDS * 3 // 4, FEW)]


@pytest.mark.parametrize(("sign", "at"), CHAINS, ids=str)
def test_the_driver_ends_early(sign, at, nodes, cohort, bucket, check, tmp_path):
    """Run after run is ended further on; the last one completes what is left and no more."""
    output, runs = f"{bucket}/out", []
    with ExitStack() as stack:
        for number, published in enumerate(at):
            runs.append(stack.enter_context(driver(tmp_path / f"{number}.log", *command(cohort, output))))
            interrupted(runs[-1], output, published, sign)
        done = count(output)
        with nodes.connected() as cluster:
            again = jobs.impute_cohort(cohort.model, cohort.shards, output, SETTINGS, cluster)
        # Ray's two agents of a killed driver look for its cluster for a minute.
        wait_until(lambda: not still_there(runs[0].had), PATIENCE, lambda: still_there(runs[0].had))
    assert again["done_before"] == done >= at[-1] and again["rows"] == (SHARDS - done) * ROWS
    check(f"driver {sign.name}", len(at), output)


def test_two_runs_at_once(nodes, cohort, bucket, check, tmp_path):
    for number in range(FEW):
        output = f"{bucket}/out-{number}"
        with ExitStack() as stack:
            arguments = command(cohort, output, "--address", nodes.cluster.address, "--actors", "1")
            runs = [stack.enter_context(driver(tmp_path / f"{number}-{n}.log", *arguments)) for n in range(2)]
            assert [run.wait(PATIENCE) for run in runs] == [0, 0], [run.log.read_text() for run in runs]
        check("two runs at once", 2, output)
