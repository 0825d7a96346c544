"""What the tests of infra/ share: its files, and the programs that look at them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

INFRA = Path(__file__).parents[2] / "infra"
PLACES = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def program(name: str) -> str | None:
    """A program of this environment, or of the machine."""
    return shutil.which(name, path=PLACES)


def answer(*command: str | Path) -> str:
    """What a program prints; fails with what it says where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def documents(text: str) -> list[dict]:
    return list(yaml.safe_load_all(text))
