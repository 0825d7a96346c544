"""Accuracy on real cohorts, as a user would get it: `mmimpute fit` and `mmimpute impute`, then the benchmark's own scorer.

    python tests/benchmarks/accuracy.py BENCH [--cohorts nhanes2017 eicu_demo tcga_brca] [--dropped 0.0 0.5] [--out FOLDER]

BENCH holds cohorts.py, score.py and, where peers were scored, results/<cohort>_<dropped>.json; the source files are in BENCH/../data.
Prints, per setting, the skill per modality beside the best single peer's, the shares of real values inside mean +- 1.645 std and inside the
conformal 90% interval, ECE and what it would be by chance alone if all predicted probabilities were true, seconds, and how many records a
second one thread predicts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

import mmimpute
from mmimpute import registry
from mmimpute.data.arrow import decode, flat
from mmimpute.data.tensors import to_model
from mmimpute.evaluation import reliability

MMIMPUTE = [sys.executable, "-m", "mmimpute.cli"]


def measure(bench: Path, cohort: str, dropped: str, folder: Path) -> dict:
    """Prepares one setting, fits, imputes and scores it. Returns the scorer's result and the seconds that each took."""
    source = bench.parent / "data" / f"{cohort}.parquet"
    command(sys.executable, bench / "cohorts.py", "prepare", source, folder, "--train-missing", dropped)
    seconds = {
        "fit": command(*MMIMPUTE, "fit", "--spec", folder / "cohort.toml", "--shards", folder / "train", "--model", folder / "model"),
        "impute": command(
            *MMIMPUTE,
            *("impute", "--interval", "0.9", "--model", folder / "model", "--shards", folder / "test", "--output", folder / "enriched"),
        ),
    }
    command(sys.executable, bench / "score.py", folder, folder / "enriched", "--json", folder / "result.json")
    own = {"seconds": seconds, "per_second": per_second(folder)} | beside(folder)
    return json.loads((folder / "result.json").read_text()) | own


def beside(folder: Path) -> dict[str, dict[str, float | None]]:
    """What the scorer does not tell of each modality: the share of hidden real values `inside` their conformal interval, and the ECE that
    `chance` alone makes of the codes that it counts, those of 2% or more."""
    modalities = json.loads((folder / "cohort.json").read_text())["modalities"]
    enriched, truth = mmimpute.read(str(folder / "enriched"), completed=False, kind="arrow"), pq.read_table(folder / "truth.parquet")
    enriched = enriched.take(pc.index_in(truth["subject_id"], enriched["subject_id"]))
    found = {"inside": {}, "chance": {}}
    for m, spec in modalities.items():
        hidden, real_D = pc.equal(truth["target"], m), np.array(spec["kinds"]) == "real"
        columns = (truth["value"], *(enriched[f"{m}__{name}"] for name in ("imputed", "lower", "upper")))
        value, said, low, high = (np.array(c.filter(hidden).to_pylist(), float).reshape(-1, len(real_D)) for c in columns)
        known = ~np.isnan(value)
        inside = ((low <= value) & (value <= high))[known & real_D]
        frequent_D = np.array([0.02 <= column[k].mean() < 1 if k.any() else False for column, k in zip(value.T, known.T, strict=True)])
        found["inside"][m] = float(inside.mean()) if inside.size else None
        found["chance"][m] = chance_ece(said[known & frequent_D & ~real_D])
    return found


def chance_ece(said: np.ndarray) -> float | None:
    """The mean ECE of outcomes drawn with just these probabilities."""
    if not said.size:
        return None
    draw = np.random.default_rng(0)
    return float(np.mean([reliability((draw.random(said.shape) < said).astype(float), said)["ece"] for _ in range(100)]))


def per_second(folder: Path) -> float:
    """Test records that one thread predicts in a second, median of nine passes, each in another order."""
    model = registry.load(str(folder / "model"))
    table = pa.concat_tables(pq.read_table(path) for path in sorted((folder / "test").glob("*.parquet")))
    data = to_model(flat(decode(table, model.schema, "test")), [len(m.features) for m in model.schema.modalities])
    torch.set_num_threads(1)
    seconds = []
    for _ in range(10):  # the first warms up
        order = torch.randperm(len(table))
        shuffled = [[t[order] for t in part] for part in data]
        began = time.perf_counter()
        model.module.predict(*shuffled)
        seconds.append(time.perf_counter() - began)
    return len(table) / statistics.median(seconds[1:])


def command(*arguments) -> float:
    began = time.perf_counter()
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    return time.perf_counter() - began


def show(console: Console, cohort: str, dropped: str, result: dict, peers: dict) -> None:
    """A table; peers: name -> the scorer's result, none where nobody scored them."""
    at = lambda m: ((p["modalities"][m]["skill"], name) for name, p in peers.items() if m in p["modalities"])  # noqa: E731
    table = Table("modality", "ours", "best single peer", "inside 1.645 std", "conformal", "ECE", "by chance", title=f"{cohort} {dropped}")
    for name, m in result["modalities"].items():
        covered, error = m.get("real", {}).get("cover90"), m.get("binary", {}).get("ece")
        figures = (covered, result["inside"][name], error, error and result["chance"][name])
        told = ("-" if figure is None else f"{figure:.3f}" for figure in figures)
        table.add_row(name, f"{m['skill']:.3f}", _best(at(name)), *told)
    overall = _best((p["overall"], name) for name, p in peers.items() if len(p["modalities"]) == len(result["modalities"]))
    table.add_row("overall", f"{result['overall']:.4f}", overall, "", "", "", "")
    seconds = result["seconds"]
    told = f"fit {seconds['fit']:.0f} s, impute {seconds['impute']:.0f} s (whole commands); {result['per_second']:,.0f} records a second"
    console.print(table, told)


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
