"""A command watched from outside: CPU seconds and memory of it and of everything that it started. Linux only.

Missed: the last tenth of a second of a process that nobody waited for, and one whose parent had gone within its first.
"""

import os
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

TICKS, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
EVERY, MEMORY_EVERY = 0.1, 1.0  # seconds between looks; the kernel has to add up page by page what a process shares


class Key(NamedTuple):
    """A process for good: numbers are used again."""

    pid: int
    start: int


@dataclass
class Seen:
    """A process as it was last seen. reaped: CPU seconds of children that it waited for, theirs included."""

    parent: int
    own: float
    reaped: float
    alive: bool = True


@dataclass
class Watched:
    """What a run of a command took. cpu: (time, CPU seconds until then) of the whole tree; memory in bytes."""

    began: float
    ended: float = 0.0
    cpu: list[tuple[float, float]] = field(default_factory=list)
    peak_memory: int = 0  # sum of proportional shares
    peak_root: int = 0  # resident memory of the command's own process
    watching: float = 0.0  # CPU seconds that watching took, from the same cores

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def cpu_seconds(self, at: float | None = None) -> float:
        """Until a moment, by default the end."""
        times, seconds = zip(*self.cpu, strict=True)
        return float(np.interp(self.ended if at is None else at, times, seconds))


class Tree:
    """A process and what came of it; one whose parent died still counts."""

    def __init__(self, root: int):
        self.root, self.seen = root, {}

    def look(self) -> None:
        """One pass over all processes of the machine."""
        found = {key: seen for pid in os.listdir("/proc") if pid.isdigit() for key, seen in _stat(int(pid))}
        for key, old in self.seen.items():
            old.alive = key in found
            if old.alive:
                old.own, old.reaped = found[key].own, found[key].reaped
        known = {key.pid for key, seen in self.seen.items() if seen.alive}
        while new := {k: s for k, s in found.items() if k not in self.seen and (s.parent in known or k.pid == self.root)}:
            self.seen |= new
            known |= {key.pid for key in new}

    def cpu_seconds(self) -> float:
        children = defaultdict(list)
        for key, seen in self.seen.items():
            children[seen.parent].append(key)

        def total(key: Key) -> float:
            seen, parts = self.seen[key], {True: 0.0, False: 0.0}
            for child in children[key.pid]:
                parts[self.seen[child].alive] += total(child)
            # A parent that waits knows to the end what its children took; raylet may not wait for its workers.
            return seen.own + max(seen.reaped, parts[False]) + parts[True]

        return sum(total(key) for key in self.seen if key.pid == self.root)

    def memory(self) -> int:
        return sum(_proportional(key.pid) for key, seen in self.seen.items() if seen.alive)


def _stat(pid: int) -> list[tuple[Key, Seen]]:
    """Nothing of a process that has gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    user, system, reaped_user, reaped_system = (int(f) / TICKS for f in fields[11:15])
    return [(Key(pid, int(fields[19])), Seen(int(fields[1]), user + system, reaped_user + reaped_system))]


def _proportional(pid: int) -> int:
    """Proportional set size: pages that processes share are counted once."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0


def _resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * PAGE


def watch(command: Sequence[str], env: Mapping[str, str]) -> Watched:
    """Runs a command to its end. Raises CalledProcessError where it fails."""
    busy, watched, remembered = time.process_time(), Watched(time.time()), 0.0
    process = subprocess.Popen(command, env=env)
    tree = Tree(process.pid)
    # Not process.poll(): what its descendants took in the end is told once, to whoever waits.
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        tree.look()
        watched.cpu.append((time.time(), tree.cpu_seconds()))
        watched.peak_root = max(watched.peak_root, _resident(process.pid))
        if time.time() - remembered > MEMORY_EVERY:
            watched.peak_memory, remembered = max(watched.peak_memory, tree.memory()), time.time()
        time.sleep(EVERY)
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    watched.ended = time.time()
    watched.cpu.append((watched.ended, max(watched.cpu[-1][1], ended[2].ru_utime + ended[2].ru_stime)))
    watched.watching = time.process_time() - busy
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return watched
