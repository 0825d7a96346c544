"""Handwritten digits as a cohort of two images, a signal, a vector and a text, which share the class."""

import numpy as np
import pyarrow as pa
from sklearn.datasets import load_digits

from mmimpute.spec import CohortSpec, ModalitySpec

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FILLERS = ("A", "the", "was", "written", "here", "by")
SPEC = CohortSpec(
    outcomes=("outcome__*",),
    modalities={
        "scan": ModalitySpec(column="scan", form="image"),
        "copy": ModalitySpec(column="copy", form="image", shape=(1, 8, 8)),
        "tone": ModalitySpec(column="tone", form="signal"),
        "labs": ModalitySpec(prefix="labs__", kinds="real"),
        "note": ModalitySpec(column="note", form="text", shape=(8,)),
    },
)


def cohort(rows: int, seed: int = 0, missing: float = 0.25) -> pa.Table:
    """scan: a digit; copy: another of its class, black on white; tone: a sine of as many periods; labs: the class's bits and noise;
    note: its name among other words, one of which nobody else has."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    pixels = (digits.images * 15).astype(np.uint8)
    chosen = rng.permutation(len(pixels))[:rows]
    label = digits.target[chosen]
    others = np.array([rng.choice(np.flatnonzero(digits.target == c)) for c in label])
    tone = np.sin(2 * np.pi * (label[:, None] + 1) * np.arange(32) / 64) + 0.1 * rng.normal(size=(rows, 32))
    labs = (label[:, None] >> np.arange(4) & 1) + 0.2 * rng.normal(size=(rows, 4))
    seen = rng.random((rows, 5)) >= missing
    fill = lambda: " ".join(rng.choice(FILLERS, rng.integers(1, 4)))  # noqa: E731
    notes = [f"{fill()} {NAMES[c]}, {fill()} Case-{i}x." for i, c in enumerate(label)]
    images = [pixels[chosen], 255 - pixels[others]]
    flat = [pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 64, mask=pa.array(~s)) for x, s in zip(images, seen.T[:2], strict=True)]
    wave = pa.FixedSizeListArray.from_arrays(pa.array(tone.ravel().astype(np.float32)), 32, mask=pa.array(~seen[:, 2]))
    columns = {
        "subject_id": pa.array([f"d{i:05d}" for i in range(rows)]),
        "scan": pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.uint8(), (1, 8, 8)), flat[0]),
        "copy": flat[1],
        "tone": pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), (32, 1)), wave),
    }
    columns |= {f"labs__b{i}": pa.array(labs[:, i], mask=~seen[:, 3]) for i in range(4)}
    columns["note"] = pa.array(notes, mask=~seen[:, 4])
    return pa.table(columns | {"outcome__odd": pa.array(label % 2)})
