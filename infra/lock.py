"""Writes the archives that the images are built from, each with its hash: `python infra/lock.py`, from the top folder.

pip resolves for Linux on x86-64 with Python 3.11 what pyproject.toml asks for, held to constraints.txt, and downloads nothing. What only
CUDA needs stands in a file of its own. PyTorch's CPU build is no package of PyPI: its line in requirements-cpu.lock is kept by hand.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

INFRA = Path(__file__).parent
TARGET = ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "abi3", "--abi", "none"]
TARGET += [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(28, 11, -1)] + ["--platform=manylinux2014_x86_64"]
WANTED = [".[cluster,downstream,retrieval,standards]", "hatchling"]  # hatchling builds our own wheel in the image
CUDA = re.compile("torch|triton|nvidia-.*|cuda-.*")
INDEX = "https://pypi.org/simple"


def resolve() -> list[tuple[str, str, str]]:
    """(name, version, SHA-256) of every archive."""
    command = [sys.executable, "-m", "pip", "--isolated", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    command += ["--target", "unused", "--only-binary", ":all:", "-i", INDEX, "-c", "constraints.txt", *TARGET, *WANTED]
    nothing = {"PIP_CONFIG_FILE": os.devnull}  # of this machine may change what is found
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=INFRA.parent, env=os.environ | nothing)
    found = [item for item in json.loads(done.stdout)["install"] if "archive_info" in item["download_info"]]
    rows = ((i["metadata"]["name"].lower().replace("_", "-"), i["metadata"]["version"], i) for i in found)
    return sorted((name, version, i["download_info"]["archive_info"]["hashes"]["sha256"]) for name, version, i in rows)


def write(name: str, rows: list[tuple[str, str, str]]) -> None:
    lines = [f"{package}=={version} --hash=sha256:{digest}" for package, version, digest in rows]
    (INFRA / name).write_text("\n".join(["# Made by infra/lock.py", *lines]) + "\n")


if __name__ == "__main__":
    rows = resolve()
    write("requirements.lock", [row for row in rows if not CUDA.fullmatch(row[0])])
    write("requirements-cuda.lock", [row for row in rows if CUDA.fullmatch(row[0])])
