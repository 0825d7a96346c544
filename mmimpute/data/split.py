"""Which members of a model learn from a subject: a hash of the subject id, so that it never changes.

Member e does not learn from fold e, so every record of a fold judges one member: it stops its training, fits the stack and
the intervals, and gives the accuracy table. New data leaves every earlier subject where it was, and a subject's records are
never in two folds.
"""

import hashlib

import numpy as np
import pyarrow as pa

MEMBERS = 5  # of a small cohort's model
MANY_ROWS = 50_000  # from which one member, that leaves out a tenth, learns as much as five do together
SHARE_OF_ONE = 0.1


def members_for(rows: int) -> int:
    return 1 if rows >= MANY_ROWS else MEMBERS


def position(ids: pa.Array | pa.ChunkedArray, salt: str = "split") -> np.ndarray:
    """Each id's place in [0, 1): uniform, the same on every machine, and for 17 and "17" alike."""
    key = salt.encode()[:16]
    digests = b"".join(hashlib.blake2b(str(i).encode(), digest_size=8, key=key).digest() for i in ids.to_pylist())
    return (np.frombuffer(digests, "<u8") >> np.uint64(11)) * 2.0**-53


def fold(place: np.ndarray, members: int) -> np.ndarray:
    """The member that does not learn from the subjects of these places; -1 where every member does."""
    share = SHARE_OF_ONE if members == 1 else 1 / members
    found = (place / share).astype(np.int64)
    return np.where(found < members, found, -1)


def held_out(place: np.ndarray, *members: int) -> np.ndarray:
    """Which subjects have, in each of several models of so many members, one that did not learn from them."""
    return np.logical_and.reduce([fold(place, m) >= 0 for m in members])
