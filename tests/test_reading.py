"""Enriched tables read back: completed, as stored, at any version, as M data sets, in every kind."""

import subprocess
import sys

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmimpute
from mmimpute import registry
from mmimpute.data.completing import complete, draws_of
from mmimpute.data.shards import list_shards
from mmimpute.data.table import commit, expected, published
from mmimpute.errors import UserError
from mmimpute.imputing import ShardImputer, settings_digest
from mmimpute.spec import ImputeSettings

DRAWS = 3


@pytest.fixture(scope="module")
def table(small_cohort, tmp_path_factory):
    """URL of a table of two versions, of the first two shards and of all four, with draws."""
    shards, _, home = small_cohort
    url, settings, model = str(tmp_path_factory.mktemp("table")), ImputeSettings(draws=DRAWS, latent=True), registry.load(home)
    for count in (2, 4):
        some = list_shards(shards)[:count]
        list(ShardImputer(model, shards, url, settings).impute(some))
        wanted = expected(some, model.digest, settings_digest(settings))
        commit(url, [o for o in published(url) if o.key in wanted], {})
    return url


def test_completed_records_have_no_gaps_and_keep_what_was_observed(table, small_cohort):
    found = mmimpute.read(table, kind="polars")
    raw = pl.concat([pl.read_parquet(f"{small_cohort[0]}/{s.key}") for s in list_shards(small_cohort[0])])
    both = found.join(raw, on="subject_id", suffix="_raw")
    assert len(both) == len(raw) == 600
    for name in ("labs", "rna", "dx__code", "dx__site"):
        assert both[name].null_count() == 0 and raw[name].null_count() > 0
        seen = both.filter(pl.col(f"{name}_raw").is_not_null())
        if name.startswith("dx"):
            assert (seen[name] == seen[f"{name}_raw"]).all()
    assert not [c for c in found.columns if c.endswith(("__imputed", "__std", "__draws")) or c == "from_prior"]
    assert "z0" in found.columns


def test_as_stored(table):
    stored = mmimpute.read(table, completed=False, kind="arrow")
    assert {"labs", "labs__imputed", "labs__std", "labs__draws", "from_prior"} <= set(stored.column_names)


def test_versions(table):
    assert len(mmimpute.read(table, version=0)) == 300 and len(mmimpute.read(table, version=1)) == 600
    with pytest.raises(UserError, match="versions are 0 to 1"):
        mmimpute.read(table, version=2)
    with pytest.raises(UserError, match="no table"):
        mmimpute.read(table + "/nothing")


def test_draws_are_data_sets(table):
    sets = mmimpute.read(table, draws=True, kind="pandas")
    assert len(sets) == DRAWS and all(isinstance(s, pd.DataFrame) for s in sets)
    stored = mmimpute.read(table, completed=False, kind="pandas")
    missing = stored["dx__code"].isna().to_numpy()
    for m, one in enumerate(sets):
        np.testing.assert_array_equal(one["dx__code"][missing], [d[m] for d in stored["dx__code__draws"][missing]])
        np.testing.assert_array_equal(one["dx__code"][~missing], stored["dx__code"][~missing])


def test_a_table_without_draws_says_so(small_cohort, tmp_path):
    shards, _, home = small_cohort
    model, settings = registry.load(home), ImputeSettings()
    some = list_shards(shards)[:1]
    list(ShardImputer(model, shards, str(tmp_path), settings).impute(some))
    commit(str(tmp_path), published(str(tmp_path)), {})
    with pytest.raises(UserError, match="--draws"):
        mmimpute.read(str(tmp_path), draws=True)


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=20), st.integers(1, 4))
def test_completion_takes_the_observed_value_and_else_the_imputed_one(values, draws):
    imputed = [None if v is not None else 7.0 for v in values]
    drawn = [None if v is not None else [float(m) for m in range(draws)] for v in values]
    columns = {"a": pa.array(values, pa.float64()), "a__imputed": pa.array(imputed, pa.float64())}
    columns |= {
        "a__std": pa.array(imputed, pa.float64()),
        "a__draws": pa.array(drawn, pa.list_(pa.float64())),
        "b__std": pa.array(values, pa.float64()),
    }
    table = pa.table(columns)
    assert complete(table)["a"].to_pylist() == [7.0 if v is None else v for v in values]
    assert complete(table, draws - 1)["a"].to_pylist() == [draws - 1.0 if v is None else v for v in values]
    assert complete(table).column_names == ["a", "b__std"]  # of a column b that is not there, b__std is the user's own
    assert draws_of(table) == (draws if None in values else 0)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, mmimpute; print(sorted({'torch', 'ray', 'prefect', 'pyarrow', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="nothing"):
        mmimpute.nothing  # noqa: B018


@pytest.mark.services
def test_a_ray_dataset(table):
    import ray

    from mmimpute.cluster import runtime
    from mmimpute.spec import ClusterSettings

    with runtime.cluster(ClusterSettings(cpus=2)):
        found = mmimpute.read(table, kind="ray")
        assert isinstance(found, ray.data.Dataset) and found.count() == 600
        assert sum(b["labs"].null_count for b in found.iter_batches(batch_format="pyarrow")) == 0
