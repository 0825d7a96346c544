"""Runs a command and says how long it took, its CPU seconds, and the peak memory of it and all that it started.

python tests/benchmarks/watched.py mmimpute demo --rows 1000000
"""

import subprocess
import sys
import time

import psutil


def main() -> None:
    began, peak = time.perf_counter(), 0
    # The object store outlives the command, so it is not among its children here.
    process = psutil.Process(subprocess.Popen(sys.argv[1:]).pid)
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        peak = max(peak, sum(map(memory, [process, *children(process)])))
        time.sleep(0.5)
    code = process.wait()
    print(f"{time.perf_counter() - began:.0f} s, peak memory {peak / 2**20:,.0f} MiB (sum of proportional shares), exit code {code}")
    sys.exit(code)


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def memory(process: psutil.Process) -> int:
    """Proportional set size: pages that processes share are counted once."""
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


if __name__ == "__main__":
    main()
