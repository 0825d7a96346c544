"""The enriched table: keys that follow from the input, commits that are atomic and repeatable."""

import json
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import datetime, timedelta
from decimal import Decimal
from multiprocessing import get_context

import duckdb
import polars
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from hypothesis import example, given
from hypothesis import strategies as st

from mmimpute.data import storage, table
from mmimpute.data.shards import Shard, publish_table
from mmimpute.errors import UserError


def put(url: str, name: str, etag: str, rows: pa.Table, model: str = "m") -> str:
    key = table.output_key(Shard(name, etag, 1), model, "s")
    counts = json.dumps({"rows": len(rows), "from_prior": 1, "imputed": {"labs": {"rows": 1, "values": 2}}})
    publish_table(url, key, rows.replace_schema_metadata({table.COUNTS: counts}))
    return key


def commit(url: str, *keys: str, gone: tuple[str, ...] = ()) -> table.Commit:
    published = {o.key: o for o in table.published(url)}
    return table.commit(url, [published[k] for k in keys], {"model": "m"}, gone)


def at_version(url: str, version: int) -> DeltaTable:
    return DeltaTable(storage.normalise(url), version=version, storage_options=storage.delta_options(url))


def log_of(url: str) -> list[list[dict]]:
    """The actions of every commit, in order."""
    log = storage.join(url, "_delta_log")
    return [[json.loads(line) for line in storage.read(log, o.key).splitlines()] for o in storage.list_objects(log, ".json")]


def paths(log: list[list[dict]], kind: str) -> list[str]:
    return [action[kind]["path"] for actions in log for action in actions if kind in action]


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


@given(st.text(min_size=1), st.text("._-/ab", min_size=70, max_size=100))
@example("a", "_" + "b" * 79)
def test_no_name_hides_its_output(start, end):
    """Listings leave out what begins with _ or a dot: rows of such an output would never be in the table."""
    for name in (start, start + end, table.output_key(Shard(start + end, "e", 1), "m", "s")):
        key = table.output_key(Shard(f"{name}.parquet", "e", 1), "m", "s")
        assert key[0] not in "._" and table.OUTPUT_KEY.fullmatch(key) and table.source_of(key) == table.source(f"{name}.parquet")


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
    assert {u.rsplit("/", 1)[-1] for u in at_version(place, first.version).file_uris()} == set(keys)
    assert at_version(place, first.version).to_pyarrow_dataset().to_table().sort_by("subject_id")["u"].to_pylist() == [1, 1, 200, 200]
    assert at_version(place, second.version).to_pyarrow_dataset().to_table()["more"].null_count == 3


def test_pruning_takes_only_the_sources_that_are_gone(place):
    a, b, c = (put(place, f"{n}.parquet", "1", ROWS) for n in "abc")
    commit(place, a, b, c)
    newer = put(place, "a.parquet", "2", ROWS)
    done = commit(place, newer, gone=(table.source("b.parquet"), table.source("never.parquet")))
    assert (done.added, done.removed) == (1, 2) and table.table_state(place).keys == {newer, c}
    done = commit(place, newer, gone=(table.source("c.parquet"),))
    assert (done.added, done.removed) == (0, 1) and table.table_state(place).keys == {newer}
    assert commit(place, newer, gone=(table.source("c.parquet"),)) == (done.version, 0, 0, {}, {})


def check_history(url: str, done: list[table.Commit], wanted: set[str], replaced: set[str]) -> None:
    """Every path was added once, and removed once where it was replaced; one of the twins says that it did it."""
    log = log_of(url)
    assert Counter(paths(log, "add")) == Counter(wanted | replaced)
    assert Counter(paths(log, "remove")) == Counter(replaced)
    assert table.table_state(url).keys == wanted
    assert sum(d.added for d in done) == len(wanted) and sum(d.removed for d in done) == len(replaced)


@pytest.mark.parametrize("round", range(5))
def test_twins_that_commit_at_once_do_no_harm(round, place):
    twins, names = 6, ("a.parquet", "b.parquet")
    wider = ROWS.append_column("more", pa.array([1.5, None]))  # the second commit widens the table
    with ThreadPoolExecutor(twins) as pool:
        first = {put(place, n, "1", ROWS) for n in names}
        check_history(place, list(pool.map(lambda _: commit(place, *first), range(twins))), first, set())
        second = {put(place, n, "2", wider) for n in names}
        done = list(pool.map(lambda _: commit(place, *second), range(twins)))
    assert [d.added for d in done].count(2) == 1
    assert sum(d.counts.get("rows", 0) for d in done) == 4
    log = log_of(place)
    assert Counter(paths(log, "add")) == Counter(first | second) and Counter(paths(log, "remove")) == Counter(first)
    assert sum("metaData" in action for actions in log for action in actions) == 2


def test_runs_over_different_shards_that_commit_at_once_are_all_in_the_table(place):
    keys = [put(place, f"{n}.parquet", "1", ROWS) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda k: commit(place, k), keys))
    check_history(place, done, set(keys), set())
    assert sorted(d.version for d in done) == list(range(8))


def test_processes_that_commit_at_once_do_no_harm(place):
    with ProcessPoolExecutor(3, get_context("spawn")) as pool:
        keys: set[str] = set()
        for etag in "123":
            replaced, keys = keys, {put(place, n, etag, ROWS) for n in ("a.parquet", "b.parquet")}
            done = list(pool.map(commit, [place] * 3, *([key] * 3 for key in keys)))
            assert sorted(d.added for d in done) == [0, 0, 2] and sum(d.removed for d in done) == len(replaced)
    assert all(n == 1 for n in Counter(paths(log_of(place), "add")).values()) and table.table_state(place).keys == keys


def test_a_commit_that_fails_for_another_reason_is_no_endless_loop(tmp_path, monkeypatch):
    place = str(tmp_path / "table")
    commit(place, put(place, "a.parquet", "1", ROWS))
    monkeypatch.setattr(table, "_write", fails)
    with pytest.raises(DeltaError, match="no space left"):
        commit(place, put(place, "b.parquet", "1", ROWS))


def fails(*_):
    raise DeltaError("no space left")


def test_checkpoints_forget_no_version(tmp_path):
    place = str(tmp_path / "table")
    for etag in map(str, range(102)):
        commit(place, put(place, "a.parquet", etag, ROWS))
        for entry in (tmp_path / "table" / "_delta_log").iterdir():
            os.utime(entry, (1e9, 1e9))  # long past the log's retention
    assert list((tmp_path / "table" / "_delta_log").glob("*.checkpoint.parquet"))
    assert at_version(place, 3).to_pyarrow_dataset().to_table()["u"].to_pylist() == [1, 200]


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
    found = table.columns_of(arrow)
    assert found == {"u": pa.decimal128(20), "d": pa.string(), "t": pa.timestamp("us"), "f": pa.list_(pa.field("element", pa.int16()))}


WITH_TYPE = {
    "zone": pa.array([0, 2**40], pa.timestamp("us", "America/New_York")),
    "offset": pa.array([0, 2**40], pa.timestamp("ms", "+02:00")),
    "zones": pa.array([[0], [2**40]], pa.list_(pa.timestamp("us", "Asia/Tokyo"))),
    "half": pa.array([1.0, 2.5], pa.float16()),
    "halves": pa.array([[1.0], [2.5]], pa.list_(pa.float16())),
}
WITHOUT_TYPE = {
    "time32": pa.array([1, 2], pa.time32("s")),
    "time64": pa.array([1, 2], pa.time64("us")),
    "duration": pa.array([1, 2], pa.duration("s")),
    "decimal": pa.array([Decimal("1.5"), None], pa.decimal256(50, 1)),
    "small": pa.array([Decimal("1.5"), None], pa.decimal32(5, 1)),
    "inside": pa.array([{"at": 1}, None], pa.struct([("at", pa.time32("s"))])),
    "nothing": pa.nulls(2),
}


@pytest.mark.parametrize("case", WITH_TYPE | WITHOUT_TYPE)
def test_columns_of_types_that_delta_does_not_know(case, tmp_path):
    """They are read right, or passed over: never do they stop a commit."""
    place, odd = str(tmp_path), (WITH_TYPE | WITHOUT_TYPE)[case]
    commit(place, put(place, "a.parquet", "1", ROWS), put(place, "b.parquet", "1", pa.table({"subject_id": [3, 4], "odd": odd})))
    commit(place, put(place, "c.parquet", "1", pa.table({"subject_id": [5, 6], "odd": odd})))
    read = DeltaTable(place).to_pyarrow_dataset().to_table().sort_by("subject_id")
    polar = polars.read_delta(place).drop("u").sort("subject_id")  # Polars has no unsigned column of a Delta table
    assert read["subject_id"].to_pylist() == polar["subject_id"].to_list() == [1, 2, 3, 4, 5, 6]
    if case in WITHOUT_TYPE:
        assert "odd" not in read.column_names + polar.columns
    else:
        assert read["odd"].to_pylist() == polar["odd"].to_list() == [None, None, *odd.to_pylist(), *odd.to_pylist()]


def test_a_column_of_nulls_may_be_of_any_type_later(tmp_path):
    place = str(tmp_path)
    commit(place, put(place, "a.parquet", "1", pa.table({"subject_id": [1], "note": pa.nulls(1)})))
    assert not commit(place, put(place, "b.parquet", "1", pa.table({"subject_id": [2], "note": ["text"]}))).set_aside
    assert DeltaTable(place).to_pyarrow_dataset().to_table().sort_by("subject_id")["note"].to_pylist() == [None, "text"]
    assert polars.read_delta(place).sort("subject_id")["note"].to_list() == [None, "text"]


def noted(*notes, kind: pa.DataType) -> pa.Table:
    return pa.table({"subject_id": range(len(notes)), "note": pa.array(notes, kind)})


@pytest.mark.parametrize("order", ["abc", "cab", "bca"])
def test_shards_that_disagree_on_a_column_are_set_aside_and_the_others_committed(order, tmp_path):
    place, kinds = str(tmp_path), {"a": pa.int64(), "b": pa.string(), "c": pa.int64()}
    values = {"a": (17,), "b": ("secret",), "c": (18,)}
    keys = {n: put(place, f"{n}.parquet", "1", noted(*values[n], kind=kinds[n])) for n in order}
    done = commit(place, *keys.values())
    assert done.added == 2 and table.table_state(place).keys == {keys["a"], keys["c"]}
    (reason,) = done.set_aside.values()
    assert "'note': found type string; expected int64" in reason and "b-" in reason and "secret" not in reason
    assert commit(place, *keys.values()) == (done.version, 0, 0, {}, done.set_aside)


@pytest.mark.parametrize(("first", "later"), [((17,), ("0123",)), ((17,), (1.5,)), ((True,), (3,)), ((2**40,), (2.0**70,))])
def test_what_a_table_cannot_hold_stays_out_of_it_and_what_it_would_replace_stays_in(first, later, tmp_path):
    place = str(tmp_path)
    old = put(place, "a.parquet", "1", noted(*first, kind=None))
    commit(place, old)
    done = commit(place, put(place, "a.parquet", "2", noted(*later, kind=None)), put(place, "b.parquet", "1", noted(*first, kind=None)))
    assert (done.added, done.removed, len(done.set_aside)) == (1, 0, 1) and old in table.table_state(place).keys
    assert DeltaTable(place).to_pyarrow_dataset().to_table()["note"].to_pylist() == [*first, *first]


@pytest.mark.parametrize("most", [pa.time32("s"), pa.int32()])
def test_a_type_that_delta_does_not_know_differs_from_one_that_it_knows(most, tmp_path):
    place, kinds = str(tmp_path), {"a": most, "b": pa.time32("s"), "c": pa.int32(), "d": most}
    done = commit(place, *[put(place, f"{n}.parquet", "1", noted(5, kind=kind)) for n, kind in kinds.items()])
    assert done.added == 3 and len(done.set_aside) == 1
    assert len(DeltaTable(place).to_pyarrow_dataset().to_table()) == 3


def test_narrower_numbers_fit_a_table(tmp_path):
    place = str(tmp_path)
    commit(place, put(place, "a.parquet", "1", noted(1.5, kind=pa.float64())))
    assert not commit(place, put(place, "b.parquet", "1", noted(2, kind=pa.int16()))).set_aside
    assert sorted(DeltaTable(place).to_pyarrow_dataset().to_table()["note"].to_pylist()) == [1.5, 2.0]


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


def age(hours: float, monkeypatch) -> None:
    """Lets the clock of the code under test run ahead, as the store sets the times of its objects."""

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(hours=hours)

    monkeypatch.setattr(table, "datetime", Later)


def test_leftovers_are_what_no_version_refers_to(place, monkeypatch):
    replaced = put(place, "a.parquet", "1", ROWS)
    commit(place, replaced)
    current = put(place, "a.parquet", "2", ROWS)
    commit(place, current)
    left = {put(place, "a.parquet", "3", ROWS), put(place, "b.parquet", "1", ROWS)}
    for other in ("notes.parquet", "_runs/plan-1.parquet", "report.html", "record.json", f"_runs/{next(iter(left))}"):
        storage.write(place, other, b"not ours")
    assert table.leftovers(place, timedelta(hours=1)) == []  # younger: a run may be about to commit them
    age(2, monkeypatch)
    assert {o.key for o in table.vacuum(place, timedelta(hours=1), dry_run=True)} == left
    assert table.vacuum(place, timedelta(hours=3)) == []
    assert {o.key for o in table.vacuum(place, timedelta(hours=1))} == left
    assert table.vacuum(place, timedelta(hours=1)) == [] and not left & {o.key for o in table.published(place)}
    for version in (0, 1):
        assert len(at_version(place, version).to_pyarrow_dataset().to_table()) == 2
    assert storage.exists(place, "notes.parquet") and storage.exists(storage.join(place, "_runs"), "plan-1.parquet")


def test_leftovers_are_told_after_old_logs_are_gone(tmp_path, monkeypatch):
    """Another tool may have cleaned the log: what readable versions hold is then in a checkpoint, or removed later."""
    place = str(tmp_path / "table")
    kept = put(place, "kept.parquet", "1", ROWS)
    early = put(place, "a.parquet", "1", ROWS)
    commit(place, kept, early)
    DeltaTable(place).create_checkpoint()
    late = put(place, "a.parquet", "2", ROWS)
    commit(place, late)
    (tmp_path / "table" / "_delta_log" / f"{0:020d}.json").unlink()
    assert len(at_version(place, 0).to_pyarrow_dataset().to_table()) == 4
    lost = put(place, "a.parquet", "3", ROWS)
    age(2, monkeypatch)
    assert [o.key for o in table.leftovers(place, timedelta(hours=1))] == [lost]


def test_no_leftovers_where_there_is_no_table(place):
    put(place, "a.parquet", "1", ROWS)
    with pytest.raises(UserError, match="no table there"):
        table.leftovers(place, timedelta(0))
