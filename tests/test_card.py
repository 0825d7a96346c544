"""The model card: numbers by hand, small groups left out, names escaped, and nobody's value in it."""

import itertools
import re

import numpy as np
import pytest

from mmimpute import card
from mmimpute.gate import Measured

PEOPLE = 200


def measured(**changes) -> Measured:
    rng = np.random.default_rng(0)
    loss = np.where(rng.random(PEOPLE) < 0.25, np.nan, rng.gamma(2, 0.3, PEOPLE))
    held = np.where(np.isnan(loss), np.nan, 1.0)
    return Measured(**{"loss": loss, "marginal": held * 1.25, "nats": held * -0.5, "covered": held * 0.9, "ece": None} | changes)


def test_scores_are_those_of_the_people_asked_about():
    m, rows = measured(), np.arange(PEOPLE) < 80
    found = card.scores(m, rows)
    kept = m.loss[:80][~np.isnan(m.loss[:80])]
    assert found["people"] == len(kept)
    assert found["skill"] == pytest.approx(1 - kept.mean() / 1.25)
    assert found["nats"] == pytest.approx(-0.5) and found["cover90"] == pytest.approx(0.9)


def test_groups_under_ten_people_are_left_out():
    levels = np.array(["f"] * 100 + ["m"] * 81 + ["x"] * 9 + [""] * 10, object)
    found = card.numbers({"labs": measured()}, {"demo__sex": levels}, {})["subgroups"]["demo__sex"]
    assert {level: g["people"] for level, g in found.items()} == {"f": 100, "m": 81}
    few = measured(loss=np.where(np.arange(PEOPLE) < 9, 0.5, np.nan))
    assert card.numbers({"labs": few}, {"demo__sex": levels}, {})["subgroups"]["demo__sex"]["f"]["modalities"] == {}


def test_a_small_group_cannot_be_had_from_the_others_and_the_total():
    assert card.told({"f": 100, "m": 91, "x": 9}, 200) == ["f"]
    assert card.told({"f": 100, "m": 91, "x": 9}, 210) == ["f", "m"]  # 10 of no known group beside the 9
    assert card.told({"f": 195}, 200) == [] and card.told({"m": 50, "f": 150}, 200) == ["m", "f"]
    levels = np.array(["f"] * 100 + ["m"] * 100, object)
    few = measured(loss=np.where((np.arange(PEOPLE) < 50) | (np.arange(PEOPLE) >= 195), 0.5, np.nan))
    found = card.numbers({"labs": few, "rna": measured()}, {"sex": levels}, {})["subgroups"]["sex"]
    assert [list(g["modalities"]) for g in found.values()] == [["rna"], ["rna"]]


def test_numbers_are_cut_into_bands_of_a_quarter_each():
    ages = np.random.default_rng(1).uniform(18.1, 90, PEOPLE)
    found = card.groups(np.array([f"{a:.3f}" for a in ages], object))
    assert len(found) == 4 and np.sum(list(found.values()), 0).tolist() == [1] * PEOPLE
    assert all(abs(rows.sum() - 50) <= 10 for rows in found.values())
    assert [re.sub(r"[\d.]+", "N", name) for name in found] == ["under N", "N to under N", "N to under N", "N and over"]
    (edge,) = re.findall(r"[\d.]+", next(iter(found)))
    assert float(edge) == float(f"{np.quantile(ages, 0.25):.2g}") and next(iter(found.values())).sum() == (ages < float(edge)).sum()
    codes = np.array(["0", "1.0", ""] * 30, object)
    assert {level: rows.sum() for level, rows in card.groups(codes).items()} == {"0": 30, "1.0": 30}


def test_the_window_is_told_by_the_month_and_without_the_extremes():
    dates = np.array([f"20{y}-{m:02d}-07 08:00:00" for y in range(18, 22) for m in range(1, 13)] + ["1900-01-01"] * 9 + [""], object)
    assert card.window(dates) == ["2018-01", "2021-03"]
    assert card.window(dates[:15]) is None
    assert card.window(np.array([str(i) for i in range(100)], object)) is None


def facts(**changes) -> dict:
    levels = np.array(["f|<b>"] * 100 + ["m"] * 91 + ["planted-4711"] * 9, object)
    numbers = card.numbers({"labs": measured(), "dx": measured(ece=0.03)}, {"demo__sex": levels}, {"died": np.full(PEOPLE, 0.8)})
    compared = {"gain": 0.01, "low": 0.005, "high": 0.015}
    decision = {"promoted": True, "reason": "promoted: better", "champion": "c" * 32, "subjects": 200, "overall": compared}
    decision |= {"modalities": {"labs": compared | {"nats": [-0.6, -0.5], "calibration": {"intervals": [0.02, 0.01]}}}, "outcomes": {}}
    found = {"digest": "d" * 32, "version": "0.1.0", "fitted": "2026-11-21", "rows": 9254, "shards": 16, "set_aside": 1, "people": PEOPLE}
    profile = {"labs": {"features": 24, "present": 5905}, "dx": {"features": 2, "present": 9000}, "rare": {"features": 1, "present": 9}}
    return found | {"window": ["2018-01", "2021-03"], "profile": profile, "measured": numbers, "decision": decision} | changes


def test_the_page_tells_all_of_it():
    page = card.render(facts())
    for text in ("# Model dddddddddddd\n", "**Promoted: better.**", "| records | 9,254 |", "2018-01 to 2021-03", "16 (1 set aside)"):
        assert text in page
    for heading in ("## Modalities", "## Downstream", "## By demo\\_\\_sex", "## Intended use", "## Limits", "## Gate"):
        assert heading in page
    assert "| rare | 1 | \\<10 | – |" in page and "| died | 200 | 0.200 |" in page
    assert "| labs | +0.0100 | +0.0050 to +0.0150 | -0.600 → -0.500 | intervals 0.020 → 0.010 |" in page
    assert "f\\|\\<b\\>" in page and "<b>" not in page and "planted" not in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    for before, after in itertools.pairwise(rows):
        if "---" in after:
            assert before.count("|") - before.count("\\|") == after.count("|")


def test_the_first_model_has_no_comparison():
    page = card.render(facts(window=None, decision={"promoted": True, "reason": "promoted: the first model", "champion": None}))
    assert "## Gate" not in page and "| data window | not known |" in page


def test_both_files_are_written(tmp_path):
    card.write(str(tmp_path), facts())
    assert (tmp_path / "card.md").read_text() == card.render(facts())
    assert card.registry.read_record(str(tmp_path), "card")["measured"]["outcomes"]["died"] == {"people": 200, "skill": pytest.approx(0.2)}
