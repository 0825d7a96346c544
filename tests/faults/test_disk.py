"""A temp folder without room."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from mmimpute import jobs
from tests.faults.conftest import ROWS, SETTINGS, SHARDS
from tests.faults.processes import FEW, moments, with_hook
from tests.faults.test_workers import strike

pytestmark = pytest.mark.services


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]).returncode:
        pytest.skip("a file system of its own can be mounted by root only")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    with suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@pytest.mark.parametrize("at", [[at] for group in moments("disk full", SHARDS // 2, FEW) for at in group], ids=str)
def test_the_disk_is_full(at, small_disk, nodes, cohort, bucket, check):
    """What finds no room is set aside with the reason and done by the next run; what is published is whole."""
    with nodes.connected(TMPDIR=str(small_disk), **with_hook("tight")) as cluster:
        on_shard = strike(at, lambda: fill(small_disk))
        done = jobs.impute_cohort(cohort.model, cohort.shards, f"{bucket}/out", SETTINGS, cluster, on_shard)
        assert done["set_aside"] and all(f"no space left in {small_disk}" in reason for reason in done["set_aside"].values())
        assert done["rows"] == (SHARDS - len(done["set_aside"])) * ROWS and done["committed"]["counts"]["rows"] == done["rows"]
        (small_disk / "filler").unlink()
        again = jobs.impute_cohort(cohort.model, cohort.shards, f"{bucket}/out", SETTINGS, cluster)
    assert not again["set_aside"] and not list(small_disk.iterdir())
    check("temp folder full", len(done["set_aside"]), f"{bucket}/out")
