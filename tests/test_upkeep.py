"""A table over time, by the command line, in an object store: inputs come, change and go; it is verified, pruned and cleaned."""

import pickle

import obstore
import pytest

from mmimpute import jobs, planning, population, registry
from mmimpute.cluster import runtime
from mmimpute.data import storage
from mmimpute.data.shards import fetch_table, list_shards, publish_table
from mmimpute.data.table import published, source_of, table_state
from mmimpute.errors import SetAside, UserError
from mmimpute.imputing import impute_shard
from mmimpute.spec import ClusterSettings, ImputeSettings, RunConfig, read_spec
from tests.conftest import linear_cohort
from tests.test_cli import run

pytestmark = pytest.mark.services


@pytest.fixture(scope="module", autouse=True)
def ray(endpoint):
    """One local Ray for all tests of this file, started after the store's variables are set, so that workers inherit them."""
    with runtime.cluster(ClusterSettings(cpus=2)):
        yield


@pytest.fixture
def mmimpute(bucket, small_cohort, monkeypatch, capsys):
    """Runs a command on the bucket's table."""
    places = ["--model", small_cohort[2], "--shards", f"{bucket}/shards", "--output", f"{bucket}/enriched"]
    return lambda command, *more: run(monkeypatch, capsys, command, *places, *more)


def sources(url: str) -> set[str]:
    return {source_of(key).rsplit("-", 1)[0] for key in table_state(url).keys}


def stored(url: str) -> set[str]:
    return {o.key for o in published(url)}


def test_a_table_over_time(mmimpute, bucket, small_cohort, monkeypatch, capsys):
    shards, output = f"{bucket}/shards", f"{bucket}/enriched"
    for number, name in enumerate("abc"):
        publish_table(shards, f"{name}.parquet", linear_cohort(50, seed=number, first=50 * number))
    code, text = mmimpute("verify")
    assert code == 2 and "no table there" in text
    code, text = mmimpute("impute")
    assert code == 0 and "3 objects added and 0 removed" in text
    code, text = mmimpute("verify")
    assert code == 0 and "3 of 3 shards verified" in text and "3 shards, 150 records compared, all is well" in text

    obstore.delete(storage.connect(shards), "a.parquet")
    publish_table(shards, "b.parquet", linear_cohort(50, seed=9, first=50))
    publish_table(shards, "d.parquet", linear_cohort(50, seed=4, first=500))
    code, text = mmimpute("verify")
    assert code == 3 and "3 with something wrong" in text and "Traceback" not in text
    for problem in ("its input is gone", "made from another version of its input", "0 outputs in the table"):
        assert problem in text
    assert not any(f"s{i:06d}" in text for i in range(600))

    storage.write(shards, "c.parquet", b"PAR1 and no more")  # set aside, so its old version stays
    code, text = mmimpute("impute", "--prune")
    assert code == 3 and "2 objects added and 2 removed" in text and sources(output) == {"b", "c", "d"}
    publish_table(shards, "c.parquet", linear_cohort(50, seed=2, first=100))
    assert mmimpute("impute")[0] == 0
    assert mmimpute("verify")[0] == 0

    lost = stored(output) - table_state(output).keys
    assert len(lost) == 2  # of b's and a's first versions: earlier versions of the table hold them; c's is the same as it was
    dead = f"x-{'0' * 8}-{'0' * 32}.parquet"
    publish_table(output, dead, fetch_table(shards, "d.parquet"))
    assert "0 objects" in run(monkeypatch, capsys, "vacuum", output, "--older-than", "1")[1]
    for arguments, what in ((["--dry-run"], "would be removed"), ([], "removed")):
        code, text = run(monkeypatch, capsys, "vacuum", output, "--older-than", "0", *arguments)
        assert code == 0 and text.startswith("1 objects, 0.0 MB, " + what)
    assert dead not in stored(output) and lost <= stored(output)
    assert mmimpute("verify")[0] == 0


def test_a_run_prunes_where_its_configuration_says_so(mmimpute, bucket, small_cohort):
    _, spec, model = small_cohort
    for number, name in enumerate("ab"):
        publish_table(f"{bucket}/shards", f"{name}.parquet", linear_cohort(60, seed=number, first=60 * number))
    assert mmimpute("impute")[0] == 0
    obstore.delete(storage.connect(f"{bucket}/shards"), "a.parquet")
    for prune, left in ((False, {"a", "b"}), (True, {"b"})):
        config = RunConfig(spec=read_spec(spec), shards=f"{bucket}/shards", model=model, output=f"{bucket}/enriched", prune=prune)
        population.commit(config, population.plan(config)["plan"], registry.locate(model), jobs.ALL_IMPUTED)
        assert sources(f"{bucket}/enriched") == left


def test_a_commit_misses_what_is_neither_there_nor_set_aside(small_cohort, place):
    shards, _, home = small_cohort
    model, settings = registry.load(home), ImputeSettings()
    statuses = [impute_shard(model, shards, s, place, settings) for s in list_shards(shards)]
    found = planning.listed_for(shards, model.schema)
    storage.delete(place, [statuses[1]["output"]])  # a vacuum beside a run that was resumed
    with pytest.raises(UserError, match=r"1 enriched shards are gone.*run again"):
        jobs.commit_table(found, model.url, place, settings)
    assert table_state(place).version is None
    aside = {"set_aside": {statuses[1]["shard"]: "shard part-001.parquet: bad"}, "metrics": None}
    assert jobs.commit_table(found, model.url, place, settings, imputed=aside)["added"] == 3


def test_where_every_shard_is_set_aside_the_reasons_are_told(mmimpute, bucket):
    """Neither shard fits: one by its footer, one inside."""
    bad = linear_cohort(60)
    publish_table(f"{bucket}/shards", "a.parquet", bad.set_column(0, "subject_id", [["planted-id-4711"] * 60]))
    publish_table(f"{bucket}/shards", "b.parquet", bad.drop_columns(["labs"]))
    code, text = mmimpute("impute")
    assert code == 3 and "2 shards set aside, none is left to impute" in text and "published" not in text
    assert "59 repeated subject ids" in text and "no such column" in text and "4711" not in text
    assert not stored(f"{bucket}/enriched")


def test_what_does_not_fit_the_table_is_told_and_the_rest_is_committed(mmimpute, bucket):
    cohort = linear_cohort(90)
    for number, note in enumerate((["text"], [17], ["text"])):
        publish_table(f"{bucket}/shards", f"{number}.parquet", cohort.slice(30 * number, 30).append_column("note", [note * 30]))
    code, text = mmimpute("impute")
    assert code == 3 and "2 objects added" in text and sources(f"{bucket}/enriched") == {"0", "2"}
    assert "1.parquet" in text and "'note': found type int64; expected string" in " ".join(text.split())


def test_errors_travel_whole():
    error = SetAside({"a": "shard a: bad"}, "none is left to impute")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.aside == error.aside
