"""Flows started from the command line, and what people see of a run afterwards.

Flows stand above the command line, so they are executed, not imported.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from rich.markup import escape

from mmimpute.console import accuracy_table, console, set_aside_table
from mmimpute.population import last_record


def run_flow(config: Path, flow: str = "population") -> int:
    """Returns the flow's exit code."""
    console.print("starting Prefect ...")
    return execute(flow, str(config))


def execute(module: str, *arguments: str) -> int:
    """Runs a module of `flows/` in a process of its own and returns its exit code."""
    quiet = {"PREFECT_LOGGING_LEVEL": "CRITICAL"}  # Prefect would print a user's mistake as a traceback
    return subprocess.run([sys.executable, "-m", f"flows.{module}", *arguments], env=quiet | os.environ, check=False).returncode


def show_run(output: str) -> None:
    """What the run that made the table's newest version did, and where everything is."""
    record = last_record(output)
    if record is None:
        return
    console.print(accuracy_table(record["evaluation"]))
    if record["shards"]["set_aside"]:
        console.print(set_aside_table(record["shards"]["set_aside"]))
    console.print(f"enriched table  {escape(record['table_url'])}  (Delta Lake, version {record['table_version']})")
    console.print(f"model           {escape(record['model_url'])}")
    console.print(f"report          {escape(record['report_url'])}")


def slug(title: str) -> str:
    """A title as Prefect and shells like a name."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "cohort"
