"""The enriched table: keys that follow from the input, commits that are atomic and repeatable."""

import json

import duckdb
import polars
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from mmimpute.data import storage, table
from mmimpute.data.shards import Shard, publish_table


def put(url: str, name: str, etag: str, rows: pa.Table, model: str = "m") -> str:
    key = table.output_key(Shard(name, etag, 1), model, "s")
    counts = json.dumps({"rows": len(rows), "from_prior": 1, "imputed": {"labs": {"rows": 1, "values": 2}}})
    publish_table(url, key, rows.replace_schema_metadata({table.COUNTS: counts}))
    return key


def commit(url: str, *keys: str) -> table.Commit:
    published = {o.key: o for o in table.published(url)}
    return table.commit(url, [published[k] for k in keys], {"model": "m"})


ROWS = pa.table({"subject_id": [1, 2], "x": pa.array([[1.0, 2.0], None], pa.list_(pa.float32())), "u": pa.array([1, 200], pa.uint8())})


def test_golden_key():
    # Changing it would impute every cohort anew.
    key = table.output_key(Shard("ward 7/part-1.parquet", "e1", 10), "model", "settings")
    assert key == "ward_7_part-1-3e1d8424-61595e5c5b48cb0aa02711b27af8afc2.parquet"


def test_a_key_follows_from_input_model_and_settings_alone():
    base = ("a.parquet", "e1", "m", "s")
    keys = {table.output_key(Shard(n, e, size), m, s) for n, e, m, s in [base] for size in (1, 2)}
    assert len(keys) == 1
    for at in range(4):
        changed = [*base]
        changed[at] += "x"
        n, e, m, s = changed
        keys.add(table.output_key(Shard(n, e, 1), m, s))
    assert len(keys) == 5
    assert len({table.source_of(k) for k in keys}) == 2  # only another name is another source


def test_names_that_look_alike_stay_apart():
    assert len({table.source_of(table.output_key(Shard(n, "e", 1), "m", "s")) for n in ("a b.parquet", "a_b.parquet", "a/b.parquet")}) == 3


def test_commit_is_repeatable_and_replaces(place):
    keys = [put(place, "a.parquet", "1", ROWS), put(place, "b.parquet", "1", ROWS)]
    first = commit(place, *keys)
    assert (first.added, first.removed) == (2, 0)
    assert first.counts == {"rows": 4, "from_prior": 2, "imputed": {"labs": {"rows": 2, "values": 4}}}
    again = commit(place, *keys)
    assert (again.version, again.added, again.removed) == (first.version, 0, 0)
    newer = put(place, "b.parquet", "2", ROWS.append_column("more", pa.array([1.5, None])))
    second = commit(place, newer)
    assert (second.added, second.removed) == (1, 1)
    assert table.table_state(place).keys == {keys[0], newer}
    earlier = DeltaTable(storage.normalise(place), version=first.version, storage_options=storage.delta_options(place))
    assert {u.rsplit("/", 1)[-1] for u in earlier.file_uris()} == set(keys)


def test_readers_of_the_field_read_it(tmp_path):
    place = str(tmp_path / "table")
    commit(place, put(place, "a.parquet", "1", ROWS), put(place, "b.parquet", "1", ROWS.append_column("more", pa.array([1.5, None]))))
    assert polars.read_delta(place).shape == (4, 4)
    assert DeltaTable(place).to_pandas()["u"].sum() == 402
    files = DeltaTable(place).file_uris()
    assert duckdb.sql(f"select count(*), sum(u) from read_parquet({files!r}, union_by_name=true)").fetchall() == [(4, 402)]


def test_unsigned_and_dictionary_columns_have_a_delta_type():
    arrow = pa.schema(
        [("u", pa.uint64()), ("d", pa.dictionary(pa.int8(), pa.string())), ("t", pa.timestamp("ns")), ("f", pa.list_(pa.uint8(), 2))]
    )
    found = {f.name: str(f.type) for f in table.delta_schema(arrow).fields}
    assert "decimal" in found["u"] and "string" in found["d"] and "timestamp" in found["t"] and "short" in found["f"]


def test_shards_may_differ_in_width_and_layout(tmp_path):
    place = str(tmp_path / "table")
    wide = pa.table(
        {"subject_id": pa.array(["c"], pa.large_string()), "x": pa.array([[1.0, 2.0]], pa.list_(pa.float64(), 2)), "n": pa.array([1.5])}
    )
    narrow = pa.table(
        {"subject_id": ["a", "b"], "x": pa.array([[1.0, 2.0], None], pa.list_(pa.float32())), "n": pa.array([1, 2], pa.int16())}
    )
    commit(place, put(place, "a.parquet", "1", narrow), put(place, "b.parquet", "1", wide))
    read = DeltaTable(place).to_pyarrow_dataset().to_table().sort_by("subject_id")
    assert read["x"].to_pylist() == [[1.0, 2.0], None, [1.0, 2.0]] and read["n"].to_pylist() == [1.0, 2.0, 1.5]


def test_nothing_is_published_in_a_place_that_is_not_there(tmp_path):
    assert list(table.published(str(tmp_path / "none"))) == []
    with pytest.raises(FileNotFoundError):
        storage.read(str(tmp_path / "none"), "a")
