"""How close a fitted model comes to the best possible one: a simulated cohort, the commands that a user runs, the oracle.

    python tests/benchmarks/recovery.py [--rows 100000] [--width 128] [--folder FOLDER]

Writes a cohort with `mmimpute generate-cohort`, fits a model with `mmimpute fit`, then hides each modality in turn from 5,000
people drawn afresh: R2 of real features and AUROC of codes, beside those of the oracle, which knows how the cohort was made.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import r2_score, roc_auc_score

from mmimpute import registry
from mmimpute.data.tensors import to_model
from mmimpute.simulation import Population

TEST = 5_000
MMIMPUTE = [sys.executable, "-m", "mmimpute.cli"]


def command(*arguments) -> float:
    began = time.perf_counter()
    subprocess.run([*MMIMPUTE, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def score(kind: str, truth: np.ndarray, said: np.ndarray) -> float:
    if kind == "real":
        return r2_score(truth, said, multioutput="raw_values").mean()
    return float(np.mean([roc_auc_score(t, s) for t, s in zip(truth.T, said.T, strict=True) if 0 < t.mean() < 1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=Population.width)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        command("generate-cohort", folder, "--rows", given.rows, "--width", given.width)
        seconds = command("fit", "--spec", folder / "cohort.toml", "--shards", folder / "shards", "--model", folder / "model")
        model = registry.load(str(folder / "model"))
        population = Population(width=given.width)
        x, observed = population.sample(TEST, 12345)
        names = [m.name for m in model.schema.modalities]
        print(f"{given.rows:,} records of {given.width} features, fitted in {seconds:.0f} s (whole command)")
        for m in population.modalities:
            seen = {k: v & (k != m.name) for k, v in observed.items()}
            best = population.oracle(x, seen)[0][m.name]
            wide = np.concatenate([np.where(seen[k], x[k], np.nan) for k in names], 1)
            with torch.inference_mode():
                said = model.module.predict(*to_model(wide, model.widths)).mean[names.index(m.name)].numpy()
            ours, oracle = score(m.kind, x[m.name], said), score(m.kind, x[m.name], best)
            label = "R2" if m.kind == "real" else "AUROC"
            print(f"  {m.name:8} {label:5}  ours {ours:.3f}  oracle {oracle:.3f}  short by {oracle - ours:.3f}")


if __name__ == "__main__":
    main()
