"""The scikit-learn transformer: its contract, every kind of table, and the same model file as on a cluster."""

import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from mmimpute import registry
from mmimpute.data.arrow import decode
from mmimpute.errors import UserError
from mmimpute.estimator import MultiModalImputer
from mmimpute.imputing import predict
from mmimpute.spec import CohortSpec, ImputeSettings, ModalitySpec

GROUPS = {"labs": ["a", "b", "c"], "dx": ["code", "site"]}


def people(rows: int = 400, seed: int = 0) -> pd.DataFrame:
    """Three labs and two codes that follow one latent, a fifth of each modality missing; and a column of no modality."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=rows)
    labs = z[:, None] + 0.3 * rng.normal(size=(rows, 3))
    labs[rng.random(rows) < 0.2] = np.nan
    labs[rng.random((rows, 3)) < 0.05] = np.nan
    frame = pd.DataFrame(labs, columns=["a", "b", "c"], index=np.arange(rows) + 1000)
    seen = rng.random(rows) > 0.2
    frame["code"] = np.where(seen, (z + 0.5 * rng.normal(size=rows) > 0).astype(float), np.nan)
    frame["site"] = pd.Series(np.where(z > 0, "colon", "lung"), index=frame.index).where(seen)
    frame["kept"] = [f"note {i}" for i in range(rows)]
    return frame


@pytest.fixture(scope="module")
def frame():
    return people()


@pytest.fixture(scope="module")
def fitted(frame):
    return MultiModalImputer(GROUPS, epochs=4).fit(frame)


def test_observed_values_stay_and_missing_ones_follow_the_others(frame, fitted):
    out = fitted.transform(frame)
    assert list(out.columns) == list(frame.columns) and out.index.equals(frame.index)
    assert not out.isna().any().any()
    for name in frame.columns:
        seen = frame[name].notna()
        assert (out.loc[seen, name] == frame.loc[seen, name]).all()
    lacking = frame["a"].isna() & frame["b"].notna()
    assert np.corrcoef(out.loc[lacking, "a"], frame.loc[lacking, "b"])[0, 1] > 0.8
    unknown = frame["site"].isna() & frame["a"].notna()
    assert ((out.loc[unknown, "site"] == "colon") == (frame.loc[unknown, "a"] > 0)).mean() > 0.7


@pytest.mark.parametrize("unit", [2.0**-40, 2.0**40])
def test_units_change_nothing(unit):
    """Moles per litre instead of micromoles: the same people, the same answers."""
    X = np.random.default_rng(0).normal(size=(120, 6)) @ np.tril(np.ones((6, 6)))
    scale = np.r_[np.full(3, unit), np.ones(3)]
    X[:40, :3] = np.nan
    groups = {"a": [0, 1, 2], "b": [3, 4, 5]}
    scaled, usual = (MultiModalImputer(groups, epochs=1).fit(x) for x in (X * scale, X))
    for a, b in zip(scaled.transform(X * scale, return_std=True), usual.transform(X, return_std=True), strict=True):
        np.testing.assert_allclose(a / scale, b, rtol=1e-3, atol=1e-3)
    skill = scaled.evaluate(X * scale)["modalities"]["a"]["skill"]
    assert skill == pytest.approx(usual.evaluate(X)["modalities"]["a"]["skill"], abs=1e-3)


def test_deviations_are_of_what_was_missing(frame, fitted):
    _, std = fitted.transform(frame, return_std=True)
    missing = frame.isna().to_numpy()
    assert std.shape == frame.shape and np.isnan(std[:, 5]).all()
    assert (std[:, :5][missing[:, :5]] > 0).all() and (std[:, :5][~missing[:, :5]] == 0).all()


def test_samples_vary_where_something_was_missing(frame, fitted):
    first, second = fitted.sample(frame, 2)
    missing = frame["a"].isna()
    assert (first.loc[missing, "a"] != second.loc[missing, "a"]).all()
    assert first.loc[~missing, "a"].equals(second.loc[~missing, "a"])
    assert set(first["code"].unique()) == {0.0, 1.0}
    pd.testing.assert_frame_equal(fitted.sample(frame, 2)[0], first)


def test_every_kind_of_table_gives_the_same_values(frame, fitted):
    expected = fitted.transform(frame)
    arrow = pa.Table.from_pandas(frame, preserve_index=False)
    as_polars = fitted.transform(pl.from_arrow(arrow))
    assert isinstance(as_polars, pl.DataFrame) and isinstance(fitted.transform(arrow), pa.Table)
    np.testing.assert_array_equal(as_polars["a"].to_numpy(), expected["a"].to_numpy())
    assert fitted.transform(arrow)["site"].to_pylist() == expected["site"].tolist()


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_set_output(kind):
    x = people()[["a", "b", "c"]].to_numpy(float)
    made = MultiModalImputer({"first": [0, 1], "second": [2]}, epochs=1).set_output(transform=kind).fit_transform(x)
    assert isinstance(made, {"pandas": pd.DataFrame, "polars": pl.DataFrame}[kind])
    assert list(made.columns) == ["x0", "x1", "x2"]


def test_pipeline_and_clone(frame):
    x = frame[["a", "b", "c"]]
    pipe = make_pipeline(MultiModalImputer(epochs=1), LinearRegression())
    target = x.mean(axis=1).fillna(0)
    assert clone(pipe).fit(x, target).score(x, target) > 0.5


def test_the_model_file_is_the_clusters(frame, fitted, tmp_path):
    """Saved, loaded from its URL, and applied to the same records: the same values."""
    place = fitted.save(str(tmp_path / "model"))
    model = registry.load(str(tmp_path / "model"))
    assert model.url == place and [m.name for m in model.schema.modalities] == ["labs", "dx"]
    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.rename_columns([{"kept": "kept"}.get(c, f"{'labs' if c in 'abc' else 'dx'}__{c}") for c in table.column_names])
    records = decode(table, model.schema, "a shard")
    imputed, _ = predict(model, records, ImputeSettings(), torch.Generator())
    missing = frame["a"].isna().to_numpy()
    np.testing.assert_allclose(imputed["labs"].mean[missing, 0], fitted.transform(frame)["a"].to_numpy()[missing], rtol=1e-6)
    restored = pickle.loads(pickle.dumps(fitted))
    pd.testing.assert_frame_equal(restored.transform(frame), fitted.transform(frame))


def test_a_spec_with_a_list_column(tmp_path):
    rng = np.random.default_rng(0)
    z = rng.normal(size=300)
    rna = [None if rng.random() < 0.2 else (v + 0.1 * rng.normal(size=4)).tolist() for v in z]
    table = pa.table({"id": np.arange(300), "rna": pa.array(rna, pa.list_(pa.float32())), "labs__x": z})
    spec = CohortSpec(subject_id="id", modalities={"rna": ModalitySpec(column="rna"), "labs": ModalitySpec(prefix="labs__")})
    out = MultiModalImputer(spec, epochs=2).fit(table).transform(table)
    assert out["rna"].null_count == 0 and out["rna"].type == pa.list_(pa.float32())
    seen = table["rna"].is_valid()
    assert out["rna"].filter(seen).equals(table["rna"].filter(seen))


def test_unknown_columns_are_named():
    with pytest.raises(UserError, match="labs"):
        MultiModalImputer({"labs": ["nothing"]}).fit(people())


def test_no_ray_is_imported():
    code = "import sys, mmimpute.estimator; print([m for m in ('ray', 'prefect') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@parametrize_with_checks([MultiModalImputer(epochs=1)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_columns_that_would_be_one_modality_are_told():
    """Two columns under one name: the first would be left as it is, without a word."""
    x = np.random.default_rng(0).normal(size=(60, 3))
    frame = pd.DataFrame(np.where(x > 1, np.nan, x), columns=["a__b", "other", "a_b"])
    with pytest.raises(UserError, match=r"columns 'a__b' and 'a_b' have one name once .* give `modalities`"):
        MultiModalImputer(epochs=1).fit(frame)
    named = frame.rename(columns={"a_b": "c___d"})  # three are no valid name either
    assert not MultiModalImputer(epochs=1).fit(named).transform(named).isna().any().any()
