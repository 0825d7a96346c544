"""The split is a function of the subject id alone."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from mmimpute.data.split import BOUNDS, member, position


@given(st.lists(st.text(min_size=1), unique=True, min_size=1, max_size=20), st.randoms())
def test_a_subject_keeps_its_place_whatever_is_beside_it(ids, random):
    before = dict(zip(ids, position(pa.array(ids)), strict=True))
    random.shuffle(ids)
    assert dict(zip(ids, position(pa.chunked_array([ids[:3], ids[3:]], pa.string())), strict=True)) == before


def test_golden_places():
    # Changing these would move subjects between splits of every cohort in use.
    np.testing.assert_allclose(position(pa.array(["a", "17"])), [0.45334837198346756, 0.8153138999011077], rtol=1e-12)
    np.testing.assert_array_equal(position(pa.array([17])), position(pa.array(["17"])))


def test_splits_part_the_subjects_as_they_say():
    places = position(pa.array(range(20_000)))
    parts = {split: member(places, split) for split in BOUNDS}
    assert (sum(p.astype(int) for p in parts.values()) == 1).all()
    for split, (low, high) in BOUNDS.items():
        assert abs(parts[split].mean() - (high - low)) < 4 * np.sqrt(0.2 / 20_000)
    other = position(pa.array(range(20_000)), "sample")
    assert abs(np.corrcoef(places, other)[0, 1]) < 0.03
