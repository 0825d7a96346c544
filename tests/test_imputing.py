"""One shard through the model: the output contract, and every way in which a shard can be bad."""

import errno
import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmimpute import imputing, registry
from mmimpute.cluster import impute as impute_on_ray
from mmimpute.data import shards as shard_files
from mmimpute.data import storage
from mmimpute.data.arrow import decode
from mmimpute.data.shards import Shard, fetch_table, list_shards, publish_table, read_table
from mmimpute.data.split import position
from mmimpute.data.table import COUNTS
from mmimpute.errors import DataError, UserError
from mmimpute.imputing import TRIES, ShardImputer, impute_shard
from mmimpute.spec import ClusterSettings, ImputeSettings
from tests.conftest import linear_cohort

DEFAULTS = ImputeSettings()


@pytest.fixture(scope="module")
def model(small_cohort):
    return registry.load(small_cohort[2])


def impute(model, tmp_path, table, settings=DEFAULTS) -> tuple[dict, pa.Table | None]:
    shards, output = str(tmp_path / "shards"), str(tmp_path / "out")
    publish_table(shards, "part.parquet", table)
    (shard,) = list_shards(shards)
    status = impute_shard(model, shards, shard, output, settings)
    return status, None if status["error"] else fetch_table(output, status["output"])


def test_the_output_contract(model, tmp_path, monkeypatch):
    monkeypatch.setattr(imputing, "BATCH", 64)  # several batches
    table = linear_cohort(300, seed=3)
    _, out = impute(model, tmp_path, table, ImputeSettings(draws=3, latent=True))
    assert out.select(table.column_names).equals(table)
    for name, width in {"labs": 4, "rna": 6}.items():
        for value, filled, std, draws in zip(*(out[name + s].to_pylist() for s in ("", "__imputed", "__std", "__draws")), strict=True):
            missing = [v is None for v in value or [None] * width]
            if not any(missing):
                assert filled is std is draws is None
                continue
            assert all(np.isfinite(filled)) and all((s > 0) == m for s, m in zip(std, missing, strict=True))
            assert [f for f, m in zip(filled, missing, strict=True) if not m] == [v for v in value or [] if v is not None]
            assert len(draws) == 3 and all(len(d) == width for d in draws)
    sites = zip(out["dx__site"].to_pylist(), out["dx__site__imputed"].to_pylist(), strict=True)
    assert {f for v, f in sites if v is None} <= {"colon", "lung"}
    assert all(0 <= p <= 1 for p in out["dx__code__imputed"].drop_null().to_pylist())
    assert "outcome__died__imputed" not in out.column_names
    assert set(map(len, out["z0"].to_pylist())) == {model.module.config.shared}


def test_an_interval_goes_round_what_was_missing(model, tmp_path):
    _, out = impute(model, tmp_path, linear_cohort(300, seed=3), ImputeSettings(interval=0.9))
    for row in out.to_pylist():
        values, *cells = (row["labs" + s] for s in ("", "__imputed", "__lower", "__upper"))
        for value, filled, lower, upper in zip(values or [None] * 4, *(c or values for c in cells), strict=True):
            assert lower < filled < upper if value is None else lower == filled == upper == value
    assert out["dx__code__lower"].null_count == len(out) and out["dx__stage__upper"].null_count == out["dx__stage__imputed"].null_count
    assert "dx__site__lower" not in out.column_names


def test_nothing_observed_is_imputed_from_the_prior_and_marked(model, tmp_path):
    table = linear_cohort(50)
    empty = pa.table({"subject_id": ["nobody"], **{c: pa.nulls(1, table[c].type) for c in table.column_names[1:]}})
    status, out = impute(model, tmp_path, pa.concat_tables([table, empty]))
    nothing = [r["labs"] is None and r["rna"] is None and r["dx__code"] is None for r in out.to_pylist()]
    assert out["from_prior"].to_pylist() == nothing and nothing[-1]
    assert status["from_prior"] == sum(nothing)
    assert None not in out["labs__imputed"][50].as_py()


def test_counts_travel_with_the_shard(model, tmp_path):
    table = linear_cohort(200)
    status, _ = impute(model, tmp_path, table)
    metadata = pq.read_metadata(io.BytesIO(storage.read(str(tmp_path / "out"), status["output"]))).metadata
    assert json.loads(metadata[COUNTS.encode()]) == {k: status[k] for k in ("rows", "from_prior", "imputed")}
    assert metadata[b"mmimpute.model"].decode() == model.digest and metadata[b"mmimpute.input"] == b"part.parquet"
    missing = sum(v is None for labs in table["labs"].to_pylist() for v in labs or [None] * 4)
    assert status["imputed"]["labs"]["values"] == missing


def test_the_same_input_gives_the_same_bytes(model, tmp_path):
    results = []
    for run in ("a", "b"):
        status, _ = impute(model, tmp_path / run, linear_cohort(100), ImputeSettings(draws=2))
        results.append(storage.read(str(tmp_path / run / "out"), status["output"]))
    # The local etag holds the time of writing, so the keys differ and with them the seed: compare what does not hang on it.
    tables = [pq.read_table(io.BytesIO(r)) for r in results]
    assert (
        tables[0]
        .drop_columns([c for c in tables[0].column_names if c.endswith("__draws")])
        .equals(tables[1].drop_columns([c for c in tables[1].column_names if c.endswith("__draws")]))
    )


def test_a_row_does_not_depend_on_its_neighbours(model, tmp_path):
    table = linear_cohort(64)
    _, together = impute(model, tmp_path / "all", table)
    _, alone = impute(model, tmp_path / "one", table.slice(20, 1))
    for column in ("labs__imputed", "rna__std"):
        a, b = together[column][20].as_py(), alone[column][0].as_py()
        np.testing.assert_allclose(a or [], b or [], rtol=1e-4, atol=1e-5)


def without(column: str):
    return lambda t: t.drop_columns([column])


def replaced(column: str, values):
    return lambda t: t.set_column(t.column_names.index(column), column, values(t))


def not_utf8(rows: int) -> pa.Array:
    return pa.array([b"\xff secret-17 %d" % i for i in range(rows)]).view(pa.string())


def out_of_range(rows: int) -> pa.Array:
    """Seventeen in digits that the type does not have."""
    return pa.Array.from_buffers(pa.decimal128(1), rows, [None, *pa.array([17] * rows, pa.decimal128(2)).buffers()[1:]])


BAD = {
    "missing column": (without("labs"), "no such column"),
    "wrong type": (replaced("labs", lambda t: pa.array(["x"] * len(t))), "lists of 4 numbers"),
    "wrong length": (replaced("labs", lambda t: pa.array([[1.0, 2.0]] * len(t))), "lists of another length"),
    "infinity": (replaced("dx__stage", lambda t: pa.array([np.inf] + [1.0] * (len(t) - 1))), "1 infinite values"),
    "unknown category": (replaced("dx__site", lambda t: pa.array(["moon"] * len(t))), "no known level"),
    "repeated subject": (replaced("subject_id", lambda t: pa.array(["secret-17"] * len(t))), "49 repeated subject ids"),
    "null subject": (replaced("subject_id", lambda t: pa.nulls(len(t), pa.string())), "50 null subject ids"),
    "id that is not UTF-8": (replaced("subject_id", lambda t: not_utf8(len(t))), "column 'subject_id': found values that are no string"),
    "category that is not UTF-8": (replaced("dx__site", lambda t: not_utf8(len(t))), "column 'dx__site': found values that are no string"),
    "note that is not UTF-8": (lambda t: t.append_column("note", not_utf8(len(t))), "column 'note': found values that are no string"),
    "price out of range": (lambda t: t.append_column("note", out_of_range(len(t))), "column 'note': found values that are no decimal"),
    "ids in views": (replaced("subject_id", lambda t: t["subject_id"].cast(pa.string_view())), "ids of text or numbers"),
    "categories in views": (replaced("dx__site", lambda t: t["dx__site"].cast(pa.string_view())), "type string_view"),
    "ids beyond the year 9999": (
        replaced("subject_id", lambda t: pa.array(range(2**60, 2**60 + len(t)), pa.timestamp("us"))),
        "ids of text",
    ),
    "no records": (lambda t: t.slice(0, 0), "no records"),
    "enriched already": (lambda t: t.append_column("labs__imputed", t["labs"]), "raw records"),
}


def read_whole(model, tmp_path) -> None:
    """As every other job does."""
    (shard,) = list_shards(str(tmp_path / "shards"))
    table = read_table(str(tmp_path / "shards"), shard, model.schema, ["note"])
    decode(table, model.schema, shard.key)
    position(table.column("subject_id"))


@pytest.mark.parametrize("case", BAD)
def test_bad_shards_are_set_aside(case, model, tmp_path):
    spoil, message = BAD[case]
    status, _ = impute(model, tmp_path, spoil(linear_cohort(50)))
    assert "part.parquet" in status["error"] and message in status["error"]
    assert not any(value in status["error"] for value in ("moon", "secret", "17"))
    with pytest.raises(DataError, match=re.escape(message)):
        read_whole(model, tmp_path)
    assert not (tmp_path / "out").exists()


def cut_off(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 3
    return content[:middle] + bytes(b ^ 0xFF for b in content[middle : middle + 64]) + content[middle + 64 :]


@pytest.mark.parametrize(
    "spoil", [cut_off, flipped, lambda _: b"", lambda _: b"subject_id,labs\n1,2\n"], ids=["cut off", "bits flipped", "empty", "CSV"]
)
def test_unreadable_shards_are_set_aside(spoil, model, tmp_path):
    shards, output = str(tmp_path / "shards"), str(tmp_path / "out")
    publish_table(shards, "part.parquet", linear_cohort(2000))
    storage.write(shards, "part.parquet", spoil(storage.read(shards, "part.parquet")))
    (shard,) = list_shards(shards)
    status = impute_shard(model, shards, shard, output, ImputeSettings())
    assert "no readable Parquet file" in status["error"]
    assert not (tmp_path / "out").exists()


def several(model, tmp_path, begin=lambda key: 0, **settings) -> list[dict]:
    shards, output = str(tmp_path / "shards"), str(tmp_path / "out")
    for number in range(3):
        if not (tmp_path / "shards" / f"{number}.parquet").exists():
            publish_table(shards, f"{number}.parquet", linear_cohort(40, seed=number))
    return list(ShardImputer(model, shards, output, ImputeSettings(**settings)).impute(list_shards(shards), begin))


def test_shards_in_a_row_are_what_they_are_alone(model, tmp_path):
    together = several(model, tmp_path, draws=2)
    assert [s["shard"] for s in together] == ["0.parquet", "1.parquet", "2.parquet"]
    published = [storage.read(str(tmp_path / "out"), s["output"]) for s in together]
    for shard, content in zip(list_shards(str(tmp_path / "shards")), published, strict=True):
        status = impute_shard(model, str(tmp_path / "shards"), shard, str(tmp_path / "alone"), ImputeSettings(draws=2))
        assert storage.read(str(tmp_path / "alone"), status["output"]) == content


def test_a_large_shard_goes_through_the_temp_folder_and_comes_out_the_same(model, tmp_path, monkeypatch):
    small = several(model, tmp_path)
    before = [storage.read(str(tmp_path / "out"), s["output"]) for s in small]
    monkeypatch.setattr(shard_files, "IN_MEMORY", 0)
    monkeypatch.setattr(imputing, "IN_MEMORY", 1)
    assert [{**s, "seconds": 0} for s in several(model, tmp_path)] == [{**s, "seconds": 0} for s in small]
    assert [storage.read(str(tmp_path / "out"), s["output"]) for s in small] == before


def test_a_full_temp_folder_is_told_and_does_not_stop_the_others(model, tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def __init__(self, limit):
            super().__init__()

        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(imputing.tempfile, "SpooledTemporaryFile", Full)
    full = several(model, tmp_path)
    assert all("no space left in" in s["error"] and "TMPDIR" in s["error"] for s in full)
    monkeypatch.undo()
    assert not any(s["error"] for s in several(model, tmp_path))


def test_a_shard_that_was_replaced_since_it_was_listed_is_set_aside(model, tmp_path):
    publish_table(str(tmp_path / "shards"), "part.parquet", linear_cohort(40))
    (listed,) = list_shards(str(tmp_path / "shards"))
    publish_table(str(tmp_path / "shards"), "part.parquet", linear_cohort(50))
    status = impute_shard(model, str(tmp_path / "shards"), listed, str(tmp_path / "out"), DEFAULTS)
    assert "another version of the object" in status["error"] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("deaths", [1, TRIES])
def test_what_an_earlier_try_published_is_not_done_again(deaths, model, tmp_path):
    first = several(model, tmp_path)
    again = several(model, tmp_path, begin=lambda key: deaths)
    for before, after in zip(first, again, strict=True):
        assert after["tries"] == 1 + deaths and after["seconds"]["model"] == 0
        assert {**before, "tries": 0, "seconds": 0} == {**after, "tries": 0, "seconds": 0}


def test_a_shard_over_which_workers_died_is_given_up_and_the_others_get_through(model, tmp_path):
    for deaths in range(1, TRIES + 1):
        folder = tmp_path / str(deaths)
        poisoned, *others = several(model, folder, begin=lambda key, deaths=deaths: deaths * key.startswith("0-"))
        assert not any(s["error"] for s in others)
        assert (poisoned["error"] is None) == (deaths < TRIES)
    assert "its worker died 3 times" in poisoned["error"]


def test_the_last_shard_is_published_before_one_that_may_kill_the_worker(model, tmp_path):
    seen = []

    def begin(key: str) -> int:
        seen.append(key)
        return int(key.startswith("1-"))

    compute = ShardImputer._compute

    def dies(self, work, deaths):
        if work.shard.key == "1.parquet":
            assert (tmp_path / "out" / seen[0]).exists()
            raise KeyboardInterrupt
        compute(self, work, deaths)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardImputer, "_compute", dies)
        several(model, tmp_path, begin)


@pytest.mark.parametrize(("gpus", "there", "actors"), [(0, 0, 6), (1, 2, 2), (0.25, 2, 8), (2, 3, 1)])
def test_actors_for_which_there_is_room(gpus, there, actors, monkeypatch):
    monkeypatch.setattr(impute_on_ray.runtime, "gpus", lambda: there)
    monkeypatch.setattr(impute_on_ray.runtime, "cpus", lambda: 6)
    assert impute_on_ray._slots(gpus) == actors


@pytest.mark.parametrize(("gpus", "there"), [(1, 0), (2, 1), (0.5, 0)])
def test_more_gpus_than_there_are(gpus, there, monkeypatch):
    monkeypatch.setattr(impute_on_ray.runtime, "gpus", lambda: there)
    settings = ClusterSettings(gpus_per_actor=gpus)
    with pytest.raises(UserError, match=f"gpus_per_actor = {gpus}: the cluster has {there} GPUs"):
        next(impute_on_ray.impute_shards("model", "shards", [Shard("a.parquet", "e", 1)], "output", DEFAULTS, settings))
