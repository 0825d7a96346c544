"""A table over time, by the command line, in an object store: inputs come, change and go; it is verified, pruned and cleaned."""

import obstore
import pytest

from mmimpute import population, registry
from mmimpute.cluster import runtime
from mmimpute.data import storage
from mmimpute.data.shards import fetch_table, publish_table
from mmimpute.data.table import published, source_of, table_state
from mmimpute.spec import ClusterSettings, RunConfig, read_spec
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
        population.commit(config, population.plan(config)["plan"], registry.locate(model))
        assert sources(f"{bucket}/enriched") == left
