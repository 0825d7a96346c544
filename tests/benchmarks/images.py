"""Images generated beside the MultiVae library's models, on five views of digits, with the same convolutions, records, epochs.

    python -m venv OTHER && OTHER/bin/pip install multivae    # an environment of its own: it brings its own torch
    python tests/benchmarks/images.py FOLDER OTHER/bin/python [--models MVTCAE ours] [--missing 0 0.5] [--records 5000] [--epochs 10]

Keeps cohorts, classifiers and models in FOLDER, and adds to --out after each model: what stands there is not measured again. "real
records" are others of the same digits: how well a perfect generator would score. Seconds per epoch are medians, of one thread
each; compare them only where the machine did nothing else. Ours has encoders of z0 and of zj, and so twice the parameters, and the
batch size that `mmimpute fit` chooses; its images are draws, and its decoder learns the scale of its pixels, which the library's
examples fix. Diffusion trains its own decoders and its denoiser after the epochs: `fit_seconds` holds that too, with the start of Ray.
results/images.json is of the default budget, one run each.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from coherence import Judge, Made, score, train_judge
from deltalake import DeltaTable
from polymnist import CACHE, Digits, balanced, lists, mnist, presence, views, write_cohort
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from mmimpute import registry
from mmimpute.data.tensors import to_model
from mmimpute.model.marginal import log_marginal

PEERS = ("MVTCAE", "MoPoE", "MMVAE+", "CMVAE")
OURS = {"ours": "likelihood", "ours, adversarial": "adversarial", "ours, diffusion": "diffusion"}  # and their decoders
MMIMPUTE = [sys.executable, "-m", "mmimpute.cli"]
SHAPE = (3, 28, 28)
SAMPLES, LIKELIHOOD = 1_000, 16  # importance samples, test records
JUDGED, JUDGES_SEED, OTHER_SEED = 8_000, 1_000, 2_000
COLUMNS = ("conditional_one", "conditional_others", "joint", "frechet_others", "frechet_joint", "log_likelihood", "seconds_per_epoch")


def judges(folder: Path, digits: Digits) -> list[Judge]:
    """A classifier of each view, trained on records of their own; kept in the folder."""
    labels = balanced(JUDGED, JUDGES_SEED)
    real, found = views(digits, labels, JUDGES_SEED), []
    for name, images in real.values.items():
        path = folder / f"judge-{name}.safetensors"
        if not path.exists():
            save_file(train_judge(images, labels).state_dict(), path)
        found.append(Judge(SHAPE[0]))
        found[-1].load_state_dict(load_file(path))
    return [judge.eval() for judge in found]


def perfect(digits: Digits, labels: np.ndarray) -> Made:
    """What a generator would make that knows the digit and how views of it look."""
    x = np.stack(list(views(digits, labels, OTHER_SEED + 1).values.values()))
    return Made(np.broadcast_to(x, (len(x), *x.shape)), x, x)


def peer(name: str, folder: Path, data: tuple[np.ndarray, ...], epochs: int, other: str) -> dict[str, tuple[Made, dict]]:
    """data: as image_peers.py takes it. Returns what it made, and what it says of itself."""
    np.savez(folder / "data.npz", **dict(zip(("train", "present", "test"), data, strict=True)))
    script = Path(__file__).with_name("image_peers.py")
    command = [other, script, name, folder / "data.npz", folder / "made.npz", "--epochs", str(epochs)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True)
    with np.load(folder / "made.npz") as made:
        return {name: (Made(**made), json.loads(done.stdout.splitlines()[-1]))}


def ours(name: str, cohort: Path, test: np.ndarray, epochs: int) -> dict[str, tuple[Made, dict]]:
    """By the commands that a user runs. Draws, and of the likelihood predictive means, which are no images but averages of them."""
    decoder = OURS[name]
    home, spec = cohort / decoder, cohort / f"{decoder}.toml"
    spec.write_text((cohort / "cohort.toml").read_text().replace('form = "image"', f'form = "image"\ndecoder = "{decoder}"'))
    began = time.monotonic()
    command("fit", "--spec", spec, "--shards", cohort / "train", "--model", home / "model", "--epochs", epochs)
    facts = {"fit_seconds": time.monotonic() - began} | facts_of(home / "model", test)
    questions(cohort / "questions", test)
    command("impute", "--model", home / "model", "--shards", cohort / "questions", "--output", home / "enriched", "--draws", 1)
    command("generate", "--model", home / "model", "--n", len(test), "--output", home / "synthetic")
    joint = pq.read_table(home / "synthetic")
    joint = np.stack([images(joint.column(f"m{j}"), len(test)) for j in range(5)])
    told = {name: "draws"} | ({"ours, means": "imputed"} if decoder == "likelihood" else {})
    return {name: (Made(*answers(home / "enriched", suffix, test.shape), joint), facts) for name, suffix in told.items()}


def facts_of(home: Path, test: np.ndarray) -> dict[str, float]:
    model = registry.load(str(home))
    history = registry.read_record(str(home / model.digest), "history")
    parameters = sum(p.numel() for p in model.module.parameters())
    facts = {"seconds_per_epoch": float(np.median([epoch["seconds"] for epoch in history])), "parameters": parameters}
    if model.module.diffusion:  # whose draws are not from the density that `log_marginal` integrates
        return facts
    return facts | {"log_likelihood": log_likelihood(model, test[:LIKELIHOOD])}


def log_likelihood(model: registry.Model, test: np.ndarray) -> float:
    """Mean over records, nats of pixels in [0, 1], of as many importance samples as image_peers.py takes.

    With noise of one grey level (Theis et al. 2016, sec. 3.1): a density of what has 256 values could be as high as one likes.
    """
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (len(test), sum(model.widths)))
    vae = model.module.vae
    told = log_marginal(vae, *to_model(test.reshape(len(test), -1) + noise, model.widths), SAMPLES, torch.Generator().manual_seed(0))
    to_pixels = sum(float((255 / part.std).log().sum()) for part in vae.standardise)
    return float(told.log_prob.mean()) + to_pixels


def questions(folder: Path, test: np.ndarray) -> None:
    """Ten shards: the test records with one view observed, and with one view missing."""
    folder.mkdir(exist_ok=True)
    for number in range(10):
        observed = np.arange(5) == number % 5
        there = np.broadcast_to(observed if number < 5 else ~observed, (len(test), 5))
        columns = {"subject_id": pa.array([f"{number}-{i:07d}" for i in range(len(test))])}
        columns |= {f"m{j}": lists(np.ascontiguousarray(test[:, j]), there[:, j]) for j in range(5)}
        pq.write_table(pa.table(columns), folder / f"part-{number:06d}.parquet")


def answers(enriched: Path, suffix: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """`one` and `others` of Made, from the enriched questions."""
    records, size = shape[0], shape[2:]
    one, others = np.zeros((5, 5, records, *size), np.uint8), np.zeros((5, records, *size), np.uint8)
    columns = [f"m{j}__{suffix}" for j in range(5)]
    table = DeltaTable(str(enriched)).to_pyarrow_table(columns=["subject_id", *columns]).sort_by("subject_id")
    for number in range(10):
        part = table.slice(number * records, records)
        for j, column in enumerate(columns):
            if number < 5 and number != j:
                one[number, j] = images(part.column(column), records)
            elif number == 5 + j:
                others[j] = images(part.column(column), records)
    return one, others


def images(column: pa.ChunkedArray, records: int) -> np.ndarray:
    """N x 3 x 28 x 28 uint8 of lists, tensors, or lists of one draw each."""
    values = column.combine_chunks()
    while not pa.types.is_primitive(values.type):
        values = values.storage if isinstance(values, pa.ExtensionArray) else values.flatten()
    return np.rint(values.to_numpy().clip(0, 255)).astype(np.uint8).reshape(records, *SHAPE)


def command(*arguments) -> None:
    done = subprocess.run([*MMIMPUTE, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])


def show(results: dict) -> None:
    for missing, found in results["models"].items():
        table = Table("model", *(c.replace("_", " ") for c in COLUMNS), title=f"share of training modalities missing: {missing}")
        for name, scores in found.items():
            table.add_row(name, *(f"{scores[c]:.3g}" if c in scores else "-" for c in COLUMNS))
        Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("other", help="the python of the environment that has multivae")
    parser.add_argument("--models", nargs="+", choices=(*PEERS, *OURS), default=(*PEERS, *OURS))
    parser.add_argument("--missing", nargs="+", type=float, default=[0.0, 0.5])
    parser.add_argument("--records", type=int, default=5_000)
    parser.add_argument("--test", type=int, default=1_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--mnist", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=Path("images.json"))
    given = parser.parse_args()
    budget = {"records": given.records, "test": given.test, "epochs": given.epochs}
    results = json.loads(given.out.read_text()) if given.out.exists() else {"budget": budget, "models": {}}
    if results["budget"] != budget:
        sys.exit(f"{given.out} is of another budget, {results['budget']}: name another file with --out")
    given.folder.mkdir(parents=True, exist_ok=True)
    digits = mnist(given.mnist)
    jury = judges(given.folder, digits[0])
    sizes = given.records, given.test
    train, test = (views(pool, balanced(n, own), own) for own, (pool, n) in enumerate(zip(digits, sizes, strict=True)))
    real = list(views(digits[1], test.labels, OTHER_SEED).values.values())

    def keep(missing: float, made: dict[str, tuple[Made, dict]]) -> None:
        for name, (images, facts) in made.items():
            results["models"].setdefault(str(missing), {})[name] = score(jury, images, test.labels, real) | facts
        given.out.write_text(json.dumps(results, indent=1) + "\n")

    x, asked = (np.stack(list(part.values.values()), 1) for part in (train, test))
    for missing in given.missing:
        keep(missing, {"real records": (perfect(digits[1], test.labels), {})})
        for name in (m for m in given.models if m not in results["models"][str(missing)]):
            if name in OURS:
                cohort = given.folder / f"missing-{missing}"
                write_cohort(cohort, "views", digits, sizes, missing, 0)
                keep(missing, ours(name, cohort, asked, given.epochs))
            else:
                data = (x, presence(given.records, 5, missing, 0), asked)
                keep(missing, peer(name, given.folder, data, given.epochs, given.other))
    show(results)


if __name__ == "__main__":
    main()
