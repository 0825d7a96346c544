"""Real processes of a run: found, killed, and looked for afterwards."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
MOMENTS = int(os.environ.get("MMIMPUTE_FAULTS", "2"))  # at which each fault strikes; `make test-nightly` takes 20
FEW = max(1, MOMENTS // 3)  # for faults that are slow or strike often by themselves
AT_ONCE = 3  # in one run
PATIENCE = 600.0  # seconds until what is waited for counts as hanging: tests run beside each other, on machines of any speed


def moments(fault: str, last: int, count: int = MOMENTS) -> list[list[int]]:
    """`count` moments at which to strike, drawn from 1 to `last`, some of them in one run; the same in every session."""
    rng = random.Random(fault)
    return [sorted(rng.sample(range(1, last + 1), min(AT_ONCE, count - n))) for n in range(0, count, AT_ONCE)]


def with_hook(name: str) -> dict[str, str]:
    """The variable that makes workers run a test hook of `hooks/`."""
    return {"PYTHONPATH": os.pathsep.join((str(Path(__file__).parent / "hooks" / name), str(ROOT)))}


def workers(of: list[psutil.Process], title: str) -> list[psutil.Process]:
    """Ray's worker processes below these whose title, which names the actor's class, holds `title`."""
    return [p for parent in of for p in descendants(parent) if title in title_of(p)]


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return ""


def descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def still_there(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if alive(p)]


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], seconds: float, what: Callable[[], object]) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds:.0f} s: {what()}"
        time.sleep(0.02)


class Driver:
    """A command in a process of its own, and all processes that it started."""

    def __init__(self, log: Path, *command: str, **environment: str):
        self.log, self.had = log, []
        with open(log, "w") as sink:
            self.process = psutil.Popen(
                [sys.executable, *command], stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | environment
            )

    def wait(self, seconds: float) -> int:
        return self.process.wait(seconds)

    def signal(self, sign: signal.Signals) -> list[psutil.Process]:
        """Sends a signal; returns the processes that the command had."""
        self.had = descendants(self.process)
        self.process.send_signal(sign)
        return self.had

    def end(self) -> None:
        """Nothing outlives a test, whatever its outcome."""
        for process in still_there([*descendants(self.process), *self.had, self.process]):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(10)


@contextmanager
def driver(log: Path, *command: str, **environment: str) -> Iterator[Driver]:
    started = Driver(log, *command, **environment)
    try:
        yield started
    finally:
        started.end()
