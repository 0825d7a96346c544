"""Profiles: exact, mergeable in any order, and silent about small groups."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from mmimpute.data import profile
from mmimpute.data.arrow import decode, flat
from mmimpute.data.profile import feature_statistics, long_tailed, marginals, merge, observe, settle
from mmimpute.data.schema import Feature, draft_schema
from mmimpute.errors import UserError
from mmimpute.spec import CohortSpec, ModalitySpec
from tests.conftest import linear_cohort


def schema_of(table: pa.Table):
    modalities = {"labs": ModalitySpec(column="labs"), "rna": ModalitySpec(column="rna"), "dx": ModalitySpec(prefix="dx__")}
    return draft_schema(CohortSpec(modalities=modalities), table.schema, {"labs": 4, "rna": 6})


@pytest.mark.parametrize("cuts", [[], [200], [17, 30, 512]])
def test_merged_statistics_are_those_of_the_whole(cuts):
    table = linear_cohort(600)
    schema = schema_of(table)
    bounds = [0, *cuts, 600]
    parts = [observe(table.slice(a, b - a), schema, "s", 1.0) for a, b in pairwise(bounds)]
    found = parts[-1]
    for part in parts[:-1]:
        found = merge(found, part)
    x = flat(decode(table, schema, "s")).astype(np.float64)
    np.testing.assert_allclose(found.mean, np.nanmean(x, 0), atol=1e-6)
    np.testing.assert_allclose(np.sqrt(found.m2 / found.count), np.nanstd(x, 0), atol=1e-6)
    assert found.rows == 600 and found.patterns.total() == 600
    assert found.levels[-1].total() == 600 - table["dx__site"].null_count
    np.testing.assert_array_equal(np.diag(found.together), found.present)


def test_kinds_are_settled():
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "subject_id": range(400),
            "m__real": rng.normal(size=400),
            "m__binary": rng.integers(0, 2, 400).astype(float),
            "m__bool": rng.integers(0, 2, 400).astype(bool),
            "m__scale": rng.integers(0, 11, 400),
            "m__count": rng.negative_binomial(1, 0.2, 400),
            "m__age": rng.integers(18, 90, 400),
            "m__text": pa.array(rng.choice(["x", "y"], 400)).dictionary_encode(),
        }
    )
    schema = draft_schema(CohortSpec(modalities={"m": ModalitySpec(prefix="m__")}), table.schema, {})
    settled, _ = settle(schema, observe(table, schema, "s", 1.0))
    kinds = {f.name: f.kind for f in settled.modalities[0].features}
    assert kinds == {
        "real": "real",
        "binary": "binary",
        "bool": "binary",
        "scale": "ordinal",
        "count": "count",
        "age": "real",
        "text": "categorical",
    }
    levels = {f.name: f.levels for f in settled.modalities[0].features if f.levels}
    assert levels == {"scale": tuple(map(float, range(11))), "text": ("x", "y")}


def test_free_text_is_no_category():
    table = pa.table({"subject_id": range(60), "m__note": [f"note {i}" for i in range(60)]})
    schema = draft_schema(CohortSpec(modalities={"m": ModalitySpec(prefix="m__")}), table.schema, {})
    with pytest.raises(UserError, match="'note': categorical, but not of 2 to 50 texts") as caught:
        settle(schema, observe(table, schema, "s", 1.0))
    assert "note 1" not in str(caught.value)


def test_standardisation_follows_the_values():
    table = linear_cohort(3000)
    skewed = np.exp(1.5 * np.random.default_rng(0).normal(size=3000))
    table = table.append_column("dx__skewed", pa.array(skewed))
    schema = schema_of(table)
    settled, seen = settle(schema, observe(table, schema, "s", 1.0))
    found = feature_statistics(settled, seen)
    assert found["dx"]["log"].tolist() == [False, False, False, True]
    unit = np.median(skewed)
    np.testing.assert_allclose(found["dx"]["mean"][3], np.log1p(skewed / unit).mean(), rtol=1e-5)
    x = decode(table, schema, "s")["labs"]
    np.testing.assert_allclose(found["labs"]["mean"], np.nanmean(x, 0), atol=1e-5)
    assert (np.diff(found["labs"]["knots"], axis=1) > 0).all()
    np.testing.assert_allclose(marginals(settled, seen)["labs"]["std"], np.nanstd(x, 0), rtol=1e-4)


def test_a_long_tail_is_one_that_a_log_shortens():
    rng = np.random.default_rng(0)
    assert long_tailed(np.exp(1.5 * rng.normal(size=2000)), 1.0)
    assert not long_tailed(rng.normal(size=2000), 1.0)
    assert not long_tailed(rng.uniform(size=2000), 1.0)


def test_whoever_holds_no_value_stretches_no_unit():
    """Zeros say nothing about the unit of a feature that most people lack: in any unit it is transformed alike."""
    values = np.r_[np.zeros(600), np.exp(1.5 * np.random.default_rng(0).normal(size=400))]
    for unit in (1e-6, 1.0, 1e6):
        assert feature(values * unit)["unit"] == pytest.approx(unit * np.median(values[600:]))


@pytest.mark.parametrize("count", [*range(1, 18), 24, 72, 500])
def test_octiles_grow(count):
    edges = profile._octiles(np.random.default_rng(count).permutation(count).astype(float))
    assert (np.diff(edges) >= 0).all() and edges[0] >= 0 and edges[-1] <= count - 1


def test_an_ordinal_feature_of_which_the_sample_holds_nothing_is_finite():
    levels = Feature(name="v", kind="ordinal", levels=(0.0, 1.0, 2.0, 3.0))
    table, schema = of_one(np.arange(100) % 4.0)
    _, seen = settle(schema, observe(table, schema, "s", 1.0))
    found = profile._feature(levels, seen, np.full(3, np.nan), 0)
    assert (found["mean"], found["std"]) == (1.5, 1.0)


def of_one(values: np.ndarray):
    """A table of one feature, and its schema."""
    table = pa.table({"subject_id": range(len(values)), "m__v": values})
    return table, draft_schema(CohortSpec(modalities={"m": ModalitySpec(prefix="m__")}), table.schema, {})


def feature(values: np.ndarray) -> dict:
    """What a feature is standardised with."""
    table, schema = of_one(values)
    return {name: found[0] for name, found in feature_statistics(*settle(schema, observe(table, schema, "s", 1.0)))["m"].items()}


def test_the_sample_depends_on_subjects_alone():
    table = linear_cohort(2000)
    schema = schema_of(table)
    order = np.random.default_rng(0).permutation(2000)
    straight = observe(table, schema, "s", 0.2).sample[0]
    shuffled = observe(table.take(pa.array(order)), schema, "s", 0.2).sample[0]
    assert 300 < len(straight) < 500
    np.testing.assert_array_equal(np.sort(straight, 0), np.sort(shuffled, 0))


def test_ranges_leave_out_small_groups():
    values = np.r_[np.zeros(50), np.linspace(0, 1, 41), np.full(9, 777.0)]
    table = pa.table({"subject_id": range(100), "m__v": values + 0.5})
    schema = draft_schema(CohortSpec(modalities={"m": ModalitySpec(prefix="m__")}), table.schema, {})
    settled, seen = settle(schema, observe(table, schema, "s", 1.0))
    (feature,) = profile.report(settled, seen)["modalities"]["m"]["features"]
    assert feature["high"] <= 1.5
    found = feature_statistics(settled, seen)["m"]
    assert found["knots"].max() * found["std"][0] + found["mean"][0] < 700  # nor does the model file keep an extreme
