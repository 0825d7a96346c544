"""What runs leave behind, listed and shown."""

import io
from contextlib import closing

import pyarrow as pa
import pytest
from rich.console import Console

from mmimpute import jobs, registry, runs
from mmimpute.console import run_tables, runs_table
from mmimpute.data import table
from mmimpute.data.shards import publish_table
from mmimpute.errors import UserError
from mmimpute.metrics import Record
from mmimpute.planning import survey_for
from mmimpute.spec import ImputeSettings
from tests.test_metrics import status


@pytest.fixture
def output(tmp_path, small_cohort):
    """Three runs: one committed, one that died before its commit, one commit without any imputation."""
    url, place = str(tmp_path / "enriched"), registry.locate(small_cohort[2])
    lineage = jobs.lineage(survey_for(small_cohort[0], registry.describe(place).cohort), place, ImputeSettings())
    counts = '{"rows": 1, "from_prior": 0, "imputed": {}}'
    for number, committed in enumerate([True, False]):
        with closing(Record()) as record:
            for shard in range(3):
                record.add(status(shard, "shard 2: bad" if shard == 2 else None) | {"seconds": {"read": 1.0, "model": shard, "write": 0.5}})
            did = {"rows": 20, "shards": 3, "done_before": 0, "retries": 3, "seconds": {"all": 1.5}, "set_aside": 1}
            name = record.publish(f"{url}/_runs", did | lineage).rsplit("/", 1)[1]
        publish_table(url, f"a-{number:08x}-{number:032x}.parquet", _enriched(counts))
        if committed:
            table.commit(url, table.published(url), lineage | {"run": name})
    table.commit(url, table.published(url), lineage | {"run": None})
    return url


def _enriched(counts: str):
    return pa.table({"subject_id": ["a"]}).replace_schema_metadata({table.COUNTS: counts})


def shown(*parts) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    for part in parts:
        console.print(part)
    return console.export_text()


def test_every_run_is_listed_with_its_version(output):
    found = runs.list_runs(output)
    assert sorted((run.version is None, bool(run.did)) for run in found) == [(False, False), (False, True), (True, True)]
    assert [run.started for run in found] == sorted((run.started for run in found), reverse=True)
    assert {run.lineage["version"] for run in found} == {"0.1.0"} and all(run.lineage["inputs"]["number"] == 4 for run in found)
    text = shown(runs_table(found))
    assert "version-1" in text and all(run.name in text for run in found)


def test_a_run_is_shown_with_its_slowest_shards_first(output):
    name = next(run.name for run in runs.list_runs(output) if run.version == 0)
    run, shards = runs.show_run(output, name)
    assert shards["seconds"].to_pylist() == [3.5, 2.5, 1.5]
    text = shown(*run_tables(run, shards))
    assert "shard 2: bad" in text and run.lineage["model_digest"] in text and run.lineage["inputs"]["digest"] in text
    run, shards = runs.show_run(output, "version-1")
    assert shards is None and "inputs: digest" in shown(*run_tables(run, shards))


def test_no_such_run_and_no_table(output, tmp_path):
    with pytest.raises(UserError, match="no run 'x'; `mmimpute runs --output"):
        runs.show_run(output, "x")
    with pytest.raises(UserError, match="no run left anything there"):
        runs.list_runs(str(tmp_path / "nothing"))
