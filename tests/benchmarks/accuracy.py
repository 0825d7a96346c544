"""Accuracy on real cohorts, as a user would get it: `mmimpute fit` and `mmimpute impute`, then the benchmark's own scorer.

    python tests/benchmarks/accuracy.py BENCH [--cohorts nhanes2017 eicu_demo tcga_brca] [--dropped 0.0 0.5] [--out FOLDER]

BENCH holds cohorts.py, score.py and results/<cohort>_<dropped>.json; the source files are in BENCH/../data.
Prints, per setting, the skill per modality beside the best single peer's, the share inside the 90% interval, and seconds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
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
    best = {m: max((p["modalities"][m]["skill"], name) for name, p in peers.items() if m in p["modalities"]) for m in result["modalities"]}
    table = Table("modality", "ours", "best single peer", "covered by 90%", "ECE", title=f"{cohort} {dropped}")
    for name, m in result["modalities"].items():
        covered, error = m.get("real", {}).get("cover90"), m.get("binary", {}).get("ece")
        peer = f"{best[name][0]:.3f} {best[name][1]}"
        table.add_row(
            name, f"{m['skill']:.3f}", peer, "-" if covered is None else f"{covered:.3f}", "-" if error is None else f"{error:.3f}"
        )
    overall = max((p["overall"], name) for name, p in peers.items() if len(p["modalities"]) == len(result["modalities"]))
    table.add_row("overall", f"{result['overall']:.3f}", f"{overall[0]:.3f} {overall[1]}", "", "")
    console.print(table, f"fit {result['seconds']['fit']:.0f} s, impute {result['seconds']['impute']:.0f} s (whole commands)")


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
                peers = json.loads((given.bench / "results" / f"{cohort}_{dropped}.json").read_text())
                show(console, cohort, dropped, result, {n: p for n, p in peers.items() if n != "blend"})


if __name__ == "__main__":
    main()
