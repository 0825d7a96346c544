"""New data drops: what the table does not hold, when it is whole, and what the store's notifications tell."""

import json
import time
from datetime import timedelta
from urllib.parse import quote_plus

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmimpute import drops
from mmimpute.data import storage, table
from mmimpute.data.shards import Shard, list_shards, publish_table
from mmimpute.errors import UserError
from mmimpute.spec import CohortSpec, RunConfig

ROWS = pa.table({"subject_id": ["a", "b"], "x": [1.0, None]})
NOW = timedelta(0)


def take_in(shards: str, output: str, model: str = "m", aside: str = "") -> None:
    """What an imputation of all shards leaves; aside: the one that it set aside."""
    counts = json.dumps({"rows": 2, "from_prior": 0, "imputed": {}})
    made = table.expected([s for s in list_shards(shards) if s.key != aside], model, "s")
    for key in made:
        publish_table(output, key, ROWS.replace_schema_metadata({table.COUNTS: counts}))
    wanted = [o for o in table.published(output) if o.key in made]
    table.commit(output, wanted, {"model_digest": model, "settings_digest": "s"})


@pytest.fixture
def cohort(place):
    shards, output = f"{place}/shards", f"{place}/enriched"
    for name in "ab":
        publish_table(shards, f"{name}.parquet", ROWS)
    return shards, output


def keys(drop: drops.Drop | None) -> list[str]:
    return [s.key for s in drop.shards] if drop else []


def test_a_drop_is_what_the_table_was_not_made_from(cohort):
    assert keys(drops.look(*cohort, NOW)) == ["a.parquet", "b.parquet"]
    take_in(*cohort)
    assert drops.look(*cohort, NOW) is None
    publish_table(cohort[0], "c.parquet", ROWS)
    publish_table(cohort[0], "a.parquet", ROWS.slice(0, 1))
    assert keys(drops.look(*cohort, NOW)) == ["a.parquet", "c.parquet"]
    take_in(*cohort)
    assert drops.look(*cohort, NOW) is None


def test_a_new_champion_makes_no_drop(cohort):
    """Neither while the table is of the old one, nor when a part of it is of the new one."""
    take_in(*cohort)
    publish_table(cohort[0], "c.parquet", ROWS)
    take_in(*cohort, model="n")
    assert drops.look(*cohort, NOW) is None


def test_a_drop_settles_when_nothing_of_it_is_new(cohort):
    take_in(*cohort)
    publish_table(cohort[0], "c.parquet", ROWS)
    growing = drops.look(*cohort, timedelta(minutes=5))
    assert keys(growing) == ["c.parquet"] and not growing.settled
    time.sleep(2.1)  # the store's clock shows seconds
    settled = drops.look(*cohort, timedelta(seconds=1))
    assert settled.settled and settled.name == growing.name
    publish_table(cohort[0], "d.parquet", ROWS)
    assert not drops.look(*cohort, timedelta(seconds=30)).settled


def test_a_drop_is_announced_once_and_a_larger_one_again(cohort):
    first = drops.look(*cohort, NOW)
    assert not drops.announced(cohort[1], first)
    drops.note_announced(cohort[1], first)
    assert drops.announced(cohort[1], drops.look(*cohort, NOW))
    publish_table(cohort[0], "c.parquet", ROWS)
    assert not drops.announced(cohort[1], drops.look(*cohort, NOW))
    assert drops.pending([Shard("a.parquet", "e", 1)], cohort[1])  # the note is no part of the table


def test_a_shard_that_is_set_aside_is_announced_again_only_when_it_changes(cohort):
    publish_table(cohort[0], "x-bad.parquet", ROWS)
    drops.note_announced(cohort[1], drops.look(*cohort, NOW))
    take_in(*cohort, aside="x-bad.parquet")
    left = drops.look(*cohort, NOW)
    assert keys(left) == ["x-bad.parquet"] and drops.announced(cohort[1], left)
    publish_table(cohort[0], "c.parquet", ROWS)
    larger = drops.look(*cohort, NOW)
    assert keys(larger) == ["c.parquet", "x-bad.parquet"] and not drops.announced(cohort[1], larger)
    drops.note_announced(cohort[1], larger)
    take_in(*cohort, aside="x-bad.parquet")
    assert drops.announced(cohort[1], drops.look(*cohort, NOW))
    publish_table(cohort[0], "x-bad.parquet", pa.concat_tables([ROWS, ROWS]))
    assert not drops.announced(cohort[1], drops.look(*cohort, NOW))


def test_the_watcher_tells_of_a_drop_once(tmp_path, monkeypatch):
    """The flow's own function, without a server."""
    from flows import drops as flow

    shards, told = f"{tmp_path}/shards", []
    monkeypatch.setattr(flow.events, "emit", lambda name, _, payload, event_id: told.append((name, payload["shards"], event_id.hex)))
    spec = CohortSpec(modalities={"labs": {"column": "labs"}})
    config = RunConfig(spec=spec, shards=shards, model=f"{tmp_path}/model", output=f"{tmp_path}/enriched")
    publish_table(shards, "a.parquet", ROWS)
    elsewhere = {"Records": [record("ward", "x.parquet")]}
    states = [flow.watch.fn(config, *how)["state"] for how in [(5,), (0, elsewhere), (0,), (0,)]]
    assert states == ["growing", "none", "announced", "announced before"]
    take_in(shards, config.output)
    assert flow.watch.fn(config, 0)["state"] == "none"
    assert [event[:2] for event in told] == [("mmimpute.drop.settled", 1)]


def test_a_drop_is_taken_in_by_the_champion(monkeypatch):
    from flows import drops as flow

    monkeypatch.setattr(flow.population_run, "fn", lambda config: config.retrain)
    spec = CohortSpec(modalities={"labs": {"column": "labs"}})
    assert flow.data_drop.fn(RunConfig(spec=spec, shards="s", model="m", output="o")) is False


def record(bucket: str, key: str) -> dict:
    # https://docs.aws.amazon.com/AmazonS3/latest/userguide/notification-content-structure.html
    s3 = {"s3SchemaVersion": "1.0", "bucket": {"name": bucket}, "object": {"key": quote_plus(key, safe="/"), "size": 1, "eTag": "e"}}
    return {"eventVersion": "2.1", "eventSource": "aws:s3", "eventName": "ObjectCreated:Put", "s3": s3}


@given(st.text(min_size=1).filter(lambda k: k.isprintable()))
def test_notifications_in_every_envelope(key):
    plain = {"Records": [record("ward", key)]}
    envelopes = [
        plain,
        {"Type": "Notification", "Message": json.dumps(plain)},  # SNS over HTTP
        {"Records": [{"messageId": "1", "body": json.dumps(plain)}]},  # SQS
        {"Records": [{"body": json.dumps({"Message": json.dumps(plain)})}]},  # SNS in SQS
        {"Records": [{"EventSource": "aws:sns", "Sns": {"Message": json.dumps(plain)}}]},
        {"detail-type": "Object Created", "detail": {"bucket": {"name": "ward"}, "object": {"key": key}}},  # EventBridge
    ]
    for message in envelopes:
        assert drops.notified(message) == [f"s3://ward/{key}"]


def test_the_test_event_tells_of_nothing():
    assert drops.notified({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "ward"}) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["Records", "s3", "detail", "body", "Message"]), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["Records", "detail", "Message", "body", "x"]), json_values))
def test_anything_else_is_one_clear_error(message):
    try:
        assert drops.notified(message) == []
    except UserError as error:
        assert "not an S3 event notification" in str(error)


@pytest.mark.parametrize(
    ("url", "expected"),
    [("s3://b/ward/x/1.parquet", True), ("s3://b/ward/1.csv", False), ("s3://b/ward2/1.parquet", False), ("s3://c/ward/1.parquet", False)],
)
def test_which_notifications_concern_a_cohort(url, expected):
    assert drops.concerns([url], "s3://b/ward/") is expected
    assert not storage.is_s3("/ward")
