"""Accuracy on real cohorts, as a user would get it: `mmimpute fit` and `mmimpute impute`, then the benchmark's own scorer.

    python tests/benchmarks/accuracy.py BENCH [--cohorts nhanes2017 eicu_demo tcga_brca] [--dropped 0.0 0.5] [--out FOLDER]

BENCH holds cohorts.py, score.py and, where peers were scored, results/<cohort>_<dropped>.json; the source files are in BENCH/../data.
Prints, per setting, the skill per modality beside the best single peer's, the share inside the 90% interval, and seconds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

MMIMPUTE = [sys.executable, "-m", "mmimpute.cli"]


def measure(bench: Path, cohort: str, dropped: str, folder: Path) -> dict:
    """Prepares one setting, fits, imputes and scores it. Returns the scorer's result and the seconds that each took."""
    source = bench.parent / "data" / f"{cohort}.parquet"
    command(sys.executable, bench / "cohorts.py", "prepare", source, folder, "--train-missing", dropped)
    seconds = {
        "fit": command(*MMIMPUTE, "fit", "--spec", folder / "cohort.toml", "--shards", folder / "train", "--model", folder / "model"),
        "impute": command(*MMIMPUTE, "impute", "--model", folder / "model", "--shards", folder / "test", "--output", folder / "enriched"),
    }
    command(sys.executable, bench / "score.py", folder, folder / "enriched", "--json", folder / "result.json")
    return json.loads((folder / "result.json").read_text()) | {"seconds": seconds}


def command(*arguments) -> float:
    began = time.perf_counter()
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    return time.perf_counter() - began


def show(console: Console, cohort: str, dropped: str, result: dict, peers: dict) -> None:
    """A table; peers: name -> the scorer's result, none where nobody scored them."""
    at = lambda m: ((p["modalities"][m]["skill"], name) for name, p in peers.items() if m in p["modalities"])  # noqa: E731
    table = Table("modality", "ours", "best single peer", "covered by 90%", "ECE", title=f"{cohort} {dropped}")
    for name, m in result["modalities"].items():
        covered, error = m.get("real", {}).get("cover90"), m.get("binary", {}).get("ece")
        told = ("-" if figure is None else f"{figure:.3f}" for figure in (covered, error))
        table.add_row(name, f"{m['skill']:.3f}", _best(at(name)), *told)
    overall = _best((p["overall"], name) for name, p in peers.items() if len(p["modalities"]) == len(result["modalities"]))
    table.add_row("overall", f"{result['overall']:.4f}", overall, "", "")
    console.print(table, f"fit {result['seconds']['fit']:.0f} s, impute {result['seconds']['impute']:.0f} s (whole commands)")


def _best(found: Iterable[tuple[float, str]]) -> str:
    skill, name = max(found, default=(None, None))
    return "-" if name is None else f"{skill:.3f} {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--cohorts", nargs="+", default=["nhanes2017", "eicu_demo", "tcga_brca"])
    parser.add_argument("--dropped", nargs="+", default=["0.0", "0.5"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    console = Console(width=100)
    with tempfile.TemporaryDirectory() as scratch:
        for cohort in given.cohorts:
            for dropped in given.dropped:
                folder = (given.out or Path(scratch)) / f"{cohort}_{dropped}"
                result = measure(given.bench.resolve(), cohort, dropped, folder)
                scored = given.bench / "results" / f"{cohort}_{dropped}.json"
                peers = json.loads(scored.read_text()) if scored.exists() else {}
                show(console, cohort, dropped, result, {n: p for n, p in peers.items() if n != "blend"})


if __name__ == "__main__":
    main()
