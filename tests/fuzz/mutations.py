"""Damaged copies of good documents: bytes flipped, cut and copied; trees with other values, keys and depths."""

import copy
from typing import Any

from hypothesis import strategies as st

BYTES = st.binary(max_size=8) | st.sampled_from([b"\x00", b"\xff" * 8, b"\x7f\xff\xff\xff", b"[" * 9, b"../", b"9" * 30])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**30, 1e308, -0.0, "", "..", "../../etc", "cos\nsystem\n", "x" * 1000])
    | st.floats()
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6
)


@st.composite
def damaged_bytes(draw, good: bytes) -> bytes:
    """`good` after one to four edits: a piece cut out, put in another's place, or written over."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 64)))
        new = draw(st.sampled_from(["cut", "end", "copy", "write"]))
        if new == "end":
            del content[start:]
        elif new == "copy":
            at = draw(st.integers(0, len(content)))
            content[at:at] = content[start:stop]
        else:
            content[start:stop] = b"" if new == "cut" else draw(BYTES)
    return bytes(content)


@st.composite
def damaged_tree(draw, good: Any) -> Any:
    """`good` after one to three edits: a value replaced, taken out, doubled, or a key renamed."""
    tree = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            return draw(VALUES)
        parent, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["replace", "replace", "remove", "rename", "exchange"])):
            case "replace":
                parent[key] = draw(VALUES)
            case "remove":
                del parent[key]
            case "rename" if isinstance(parent, dict):
                parent[draw(st.text(max_size=8))] = parent.pop(key)
            case _:
                other, place = draw(st.sampled_from(places))
                parent[key] = copy.deepcopy(other[place])
    return tree


def _places(tree: Any):
    """Every value of a tree, as its container and key. A long list's first two stand for all."""
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(min(2, len(tree))):
            yield tree, key
            yield from _places(tree[key])
