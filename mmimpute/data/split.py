"""Which subjects train, which tune, which are held out: a hash of the subject id, so that it never changes.

New data leaves every earlier subject where it was, and a subject's records are never in two splits.
"""

import hashlib
from typing import Literal

import numpy as np
import pyarrow as pa

Split = Literal["train", "tune", "held_out"]
BOUNDS: dict[Split, tuple[float, float]] = {"train": (0.0, 0.8), "tune": (0.8, 0.9), "held_out": (0.9, 1.0)}


def position(ids: pa.Array | pa.ChunkedArray, salt: str = "split") -> np.ndarray:
    """Each id's place in [0, 1): uniform, the same on every machine, and for 17 and "17" alike."""
    key = salt.encode()[:16]
    digests = b"".join(hashlib.blake2b(str(i).encode(), digest_size=8, key=key).digest() for i in ids.to_pylist())
    return (np.frombuffer(digests, "<u8") >> np.uint64(11)) * 2.0**-53


def member(place: np.ndarray, split: Split) -> np.ndarray:
    """Which places belong to a split."""
    low, high = BOUNDS[split]
    return (place >= low) & (place < high)
