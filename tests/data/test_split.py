"""The split is a function of the subject id alone."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from mmimpute.data.split import MANY_ROWS, fold, held_out, members_for, position


@given(st.lists(st.text(min_size=1), unique=True, min_size=1, max_size=20), st.randoms())
def test_a_subject_keeps_its_place_whatever_is_beside_it(ids, random):
    before = dict(zip(ids, position(pa.array(ids)), strict=True))
    random.shuffle(ids)
    assert dict(zip(ids, position(pa.chunked_array([ids[:3], ids[3:]], pa.string())), strict=True)) == before


def test_golden_places():
    # Changing these would move subjects between splits of every cohort in use.
    np.testing.assert_allclose(position(pa.array(["a", "17"])), [0.45334837198346756, 0.8153138999011077], rtol=1e-12)
    np.testing.assert_array_equal(position(pa.array([17])), position(pa.array(["17"])))


def test_folds_part_the_subjects_evenly():
    places = position(pa.array(range(20_000)))
    for members, expected in ((5, [0.0, 0.2, 0.2, 0.2, 0.2, 0.2]), (1, [0.9, 0.1])):
        shares = np.bincount(fold(places, members) + 1, minlength=members + 1) / 20_000
        np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.2 / 20_000))
    other = position(pa.array(range(20_000)), "sample")
    assert abs(np.corrcoef(places, other)[0, 1]) < 0.03


def test_the_number_of_members_follows_the_rows():
    assert [members_for(n) for n in (60, MANY_ROWS - 1, MANY_ROWS)] == [5, 5, 1]


def test_models_of_one_member_and_of_five_judge_whom_neither_saw():
    place = np.linspace(0, 1, 1000, endpoint=False)
    assert held_out(place, 5).all() and held_out(place, 5, 1).sum() == 100
    assert place[held_out(place, 5, 1)].max() < 0.1
