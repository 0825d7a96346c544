"""A table's version as features: complete values of the committed records, written once."""

import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import numpy as np
import obstore
import pyarrow as pa
import pytest

from mmimpute import registry
from mmimpute.data import storage, table
from mmimpute.data.shards import fetch_table, list_shards, publish_table
from mmimpute.errors import DataError, UserError
from mmimpute.exporting import CREATED, EVENT_TIME, Features, View, complete, export, features_of
from mmimpute.imputing import impute_shard
from mmimpute.spec import ImputeSettings
from tests.conftest import linear_cohort

NOW = datetime(2026, 11, 21, 14, 30, tzinfo=UTC)


@pytest.fixture(scope="module")
def model(small_cohort):
    return registry.load(small_cohort[2])


def dated(rows: pa.Table, seed: int = 0) -> pa.Table:
    """Records with an event time of their own, in this century."""
    seconds = np.random.default_rng(seed).integers(946_684_800, 1_700_000_000, len(rows))
    return rows.append_column("index_date", pa.array(seconds).cast(pa.timestamp("s")))


def enriched(model, place: str, name: str, rows: pa.Table, latent: bool = True) -> str:
    """Key of the published enriched version of a shard."""
    publish_table(f"{place}/shards", f"{name}.parquet", rows)
    (shard,) = [s for s in list_shards(f"{place}/shards") if s.key == f"{name}.parquet"]
    return impute_shard(model, f"{place}/shards", shard, f"{place}/table", ImputeSettings(latent=latent))["output"]


def commit(place: str, *keys: str) -> table.Commit:
    return table.commit(f"{place}/table", [o for o in table.published(f"{place}/table") if o.key in keys], {})


def exported(features: Features) -> pa.Table:
    return pa.concat_tables(fetch_table(features.url, o.key) for o in storage.list_objects(features.url))


def test_features_are_complete(model, tmp_path):
    key = enriched(model, str(tmp_path), "a", linear_cohort(300))
    commit(str(tmp_path), key)
    features, counts = export(model.schema, str(tmp_path / "table"))
    assert counts == {"objects": 1, "written": 1, "rows": 300, "undated": 0}
    made = exported(features)
    views = {"labs": ["labs"], "rna": ["rna"], "dx": ["dx__code", "dx__stage", "dx__site"]}
    pairs = [(f"{name}_{s}", [f"{c}__{s}" for c in columns]) for name, columns in views.items() for s in ("imputed", "std")]
    assert [(v.name, [f.name for f in v.fields]) for v in features.views] == [*pairs, ("z0", ["z0"])]
    assert made.schema.equals(features.arrow) and not any(c.null_count for c in made.columns)
    rows = zip(made.to_pylist(), fetch_table(str(tmp_path / "table"), key).to_pylist(), strict=True)
    for found, row in rows:
        assert (found["subject_id"], found["z0"]) == (row["subject_id"], row["z0"])
        for column in ("labs", "rna", "dx__code", "dx__stage", "dx__site"):
            for suffix, observed in (("__imputed", row[column]), ("__std", [0] * len(row[column] or []) if column in views else 0)):
                written = row[column + suffix]
                assert found[column + suffix] == (observed if written is None else written)


TYPES = {
    "lists of whole numbers": (pa.array([[1, 2], None], pa.list_(pa.int64())), pa.list_(pa.float64(), 2), [1, 2]),
    "fixed-size lists": (pa.array([[1, 2], None], pa.list_(pa.uint8(), 2)), pa.list_(pa.float32()), [1, 2]),
    "whole numbers beyond 2^53": (pa.array([2**53 + 1, None]), pa.float64(), 2.0**53),
    "decimals": (pa.array([Decimal("1.5"), None]), pa.float64(), 1.5),
    "true or false": (pa.array([True, None]), pa.float32(), 1),
    "half floats": (pa.array(np.array([1.5, 0], np.float16), mask=np.array([False, True])), pa.float32(), 1.5),
    "text in a dictionary": (pa.array(["a", None]).dictionary_encode(), pa.string(), "a"),
    "numbers in a dictionary": (pa.array([3, None]).dictionary_encode(), pa.float64(), 3),
    "tensors": (
        pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [2]), pa.array([[1, 2], None], pa.list_(pa.float32(), 2))),
        pa.list_(pa.float32()),
        [1, 2],
    ),
}


@pytest.mark.parametrize("name", TYPES)
def test_observed_values_of_every_type(name):
    """Row 0 was observed and has nothing imputed, row 1 was missing."""
    observed, kind, value = TYPES[name]
    several = isinstance(value, list)
    spread = pa.float32() if pa.types.is_string(kind) else kind
    guess, doubt, none = ("b", 8, 0) if value == "a" else ([7, 9], [8, 6], [0, 0]) if several else (7, 8, 0)
    written = {"x__imputed": pa.array([None, guess], kind), "x__std": pa.array([None, doubt], spread)}
    batch = pa.record_batch({"id": pa.array([1, 2], pa.int32()), "x": observed, **written})
    fields = tuple(pa.field(n, pa.list_(a.type.value_type) if several else a.type) for n, a in written.items())
    features = Features("", 0, pa.field("id", pa.int64()), None, (View("x", fields),))
    made = complete(batch, features, NOW).to_pylist()
    assert made == [
        {"id": 1, EVENT_TIME: NOW, CREATED: NOW, "x__imputed": value, "x__std": none},
        {"id": 2, EVENT_TIME: NOW, CREATED: NOW, "x__imputed": guess, "x__std": doubt},
    ]


MOMENT = datetime(2024, 3, 1, 12, 30, tzinfo=UTC)
TIMES = {
    "a date is its midnight in UTC": (pa.array([date(2024, 3, 1), None]), MOMENT.replace(hour=0, minute=0)),
    "no zone means UTC": (pa.array([MOMENT.replace(tzinfo=None), None], pa.timestamp("ns")), MOMENT),
    "another zone": (pa.array([MOMENT, None], pa.timestamp("s", "America/New_York")), MOMENT),
    "parts of a microsecond are cut off": (
        pa.array([int(MOMENT.timestamp()) * 10**9 + 1999, None]).cast(pa.timestamp("ns", "UTC")),
        MOMENT + timedelta(microseconds=1),
    ),
}


@pytest.mark.parametrize("name", TIMES)
def test_event_times(name):
    times, expected = TIMES[name]
    batch = pa.record_batch({"id": ["a", "b"], "t": times})
    made = complete(batch, Features("", 0, pa.field("id", pa.string()), "t", ()), NOW).to_pylist()
    assert made == [{"id": "a", EVENT_TIME: expected, CREATED: NOW}]


def test_only_what_is_committed_and_only_once(model, place):
    schema = model.schema.model_copy(update={"timestamp": "index_date"})
    first = [enriched(model, place, name, dated(linear_cohort(40, seed, 40 * seed), seed)) for seed, name in enumerate("ab")]
    commit(place, *first)
    before, counts = export(schema, f"{place}/table")
    assert counts["written"] == 2
    listed = storage.list_objects(before.url)
    newer = enriched(model, place, "b", dated(linear_cohort(30, 7, 40), 7), latent=False)
    dead = enriched(model, place, "dead", dated(linear_cohort(20, 8, 900), 8))  # published, never committed
    commit(place, newer)
    features, counts = export(schema, f"{place}/table")
    assert features.url != before.url and f"v{features.version:06d}" in features.url
    assert counts == {"objects": 2, "written": 2, "rows": 70, "undated": 0}
    made = exported(features)
    assert {r["subject_id"] for r in made.to_pylist()} == {f"s{i:06d}" for i in range(70)} and len(made) == 70
    truth = {r["subject_id"]: r["index_date"] for k in (first[0], newer) for r in fetch_table(f"{place}/table", k).to_pylist()}
    assert {r["subject_id"]: r[EVENT_TIME].replace(tzinfo=None) for r in made.to_pylist()} == truth
    assert made["z0"].null_count == 30  # of the object without
    committed = {json.loads(a)["add"]["path"]: json.loads(a)["add"]["modificationTime"] for a in adds(f"{place}/table")}
    assert set(made[CREATED].cast(pa.timestamp("ms", "UTC")).cast(pa.int64()).to_pylist()) == {committed[first[0]], committed[newer]}

    assert storage.list_objects(before.url) == listed  # an earlier export stays as it was
    obstore.delete(storage.connect(features.url), newer)  # a call that stopped half-way
    listed = [o for o in storage.list_objects(features.url) if o.key != newer]
    assert export(schema, f"{place}/table")[1]["written"] == 1
    assert [o for o in storage.list_objects(features.url) if o.key != newer] == listed
    assert exported(features).equals(made)
    assert export(schema, f"{place}/table")[1]["written"] == 0
    # Readers of the table see nothing of it.
    assert {o.key for o in table.published(f"{place}/table")} == {*first, newer, dead}


def adds(url: str) -> list[bytes]:
    log = storage.join(url, "_delta_log")
    return [line for o in storage.list_objects(log, ".json") for line in storage.read(log, o.key).splitlines() if b'"add"' in line[:8]]


def test_without_a_timestamp_a_record_counts_from_its_commit(model, tmp_path):
    place = str(tmp_path)
    for name in "ab":
        commit(place, enriched(model, place, name, linear_cohort(20, first=ord(name))))
    made = exported(export(model.schema, f"{place}/table")[0])
    assert made[EVENT_TIME].equals(made[CREATED]) and len(set(made[CREATED].to_pylist())) == 2
    assert abs(datetime.now(UTC) - max(made[CREATED].to_pylist())) < timedelta(minutes=5)


def test_records_without_an_event_time_are_counted_and_left_out(model, tmp_path):
    rows = dated(linear_cohort(50))
    gaps = pa.array([i % 5 == 0 for i in range(50)])
    times = pa.compute.if_else(gaps, pa.scalar(None, pa.timestamp("s")), rows["index_date"])
    commit(str(tmp_path), enriched(model, str(tmp_path), "a", rows.set_column(rows.num_columns - 1, "index_date", times)))
    features, counts = export(model.schema.model_copy(update={"timestamp": "index_date"}), str(tmp_path / "table"))
    assert counts["undated"] == 10 and {r["subject_id"] for r in exported(features).to_pylist()} == {
        f"s{i:06d}" for i in range(50) if i % 5
    }


def test_another_schema_is_another_export(model):
    snapshot = table.Snapshot(3, pa.schema([(f"{c}__{s}", pa.float32()) for c in ("a", "b") for s in ("imputed", "std")]), {})
    modality = model.schema.modalities[0]
    schemas = [model.schema.model_copy(update={"modalities": (modality.model_copy(update={"columns": (c,)}),)}) for c in "ab"]
    urls = {features_of(s.model_copy(update={"timestamp": t}), "s3://b/t", snapshot).url for s in schemas for t in (None, "when")}
    assert len(urls) == 4 and all(u.startswith("s3://b/t/_features/v000003-") for u in urls)


def test_mistakes_are_told(model, tmp_path):
    place, output = str(tmp_path), str(tmp_path / "table")
    with pytest.raises(UserError, match="no table there"):
        export(model.schema, output)
    key = enriched(model, place, "a", linear_cohort(20))
    commit(place, key)
    other = model.schema.modalities[0].model_copy(update={"columns": ("urine",)})
    with pytest.raises(UserError, match=r"no column 'urine__imputed'; give the model that imputed it"):
        export(model.schema.model_copy(update={"modalities": (other,)}), output)
    with pytest.raises(DataError, match="column 'index_date': found no such column"):
        export(model.schema.model_copy(update={"timestamp": "index_date"}), output)
    with pytest.raises(DataError, match="column 'dx__site': found type string; expected dates or timestamps"):
        export(model.schema.model_copy(update={"timestamp": "dx__site"}), output)
    (tmp_path / "table" / key).unlink()
    with pytest.raises(UserError, match="1 objects of the table are not in storage"):
        export(model.schema, output)
