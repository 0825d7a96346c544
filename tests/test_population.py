"""What the stages of a run find and say, without the services that carry them."""

import json
import shutil

import pytest

from mmimpute import jobs, population, registry
from mmimpute.data import storage, table
from mmimpute.data.shards import fetch_table, list_shards, publish_table
from mmimpute.errors import Unreachable, UserError
from mmimpute.spec import RunConfig, read_spec
from tests.conftest import SPEC, linear_cohort


@pytest.fixture
def config(small_cohort, tmp_path) -> RunConfig:
    """A run over one shard of the small cohort's people, with a copy of its champion."""
    _, spec, model = small_cohort
    shutil.copytree(model, tmp_path / "model")
    publish_table(str(tmp_path / "shards"), "a.parquet", linear_cohort(100))
    places = {name: str(tmp_path / name) for name in ("shards", "model", "output")}
    return RunConfig(spec=read_spec(spec), **places)


def with_renamed_column(config: RunConfig, tmp_path) -> RunConfig:
    """The champion has what drift is compared with, and reads `rna`; shards and spec say `expression`."""
    registry.write_record(registry.locate(config.model), "reference", {})
    people = linear_cohort(100)
    publish_table(config.shards, "a.parquet", people.rename_columns([{"rna": "expression"}.get(c, c) for c in people.column_names]))
    (tmp_path / "renamed.toml").write_text(SPEC.replace('column = "rna"', 'column = "expression"'))
    return config.model_copy(update={"spec": read_spec(tmp_path / "renamed.toml")})


@pytest.mark.parametrize(("renamed", "why"), [(True, "no shard fits the cohort"), (False, "no reference.json to compare with")])
def test_a_champion_that_nothing_can_be_compared_with_blocks_no_retraining(renamed, why, config, tmp_path):
    config = with_renamed_column(config, tmp_path) if renamed else config
    planned, place = population.plan(config)["plan"], registry.locate(config.model)
    found = population.drift(config, planned, place)
    assert why in found.pop("not_compared")
    assert found == {"drifted": False, "reasons": [], "shards": 1, "set_aside": {}}
    with pytest.raises(UserError, match=why):  # nothing is about to be fitted that would mend it
        population.drift(config.model_copy(update={"retrain": False}), planned, place)


def test_a_store_that_is_away_while_drift_is_looked_for_is_told(config, monkeypatch):
    def away(*_):
        raise Unreachable("the store does not answer")

    planned = population.plan(config)["plan"]
    monkeypatch.setattr(jobs, "check_drift", away)
    with pytest.raises(Unreachable):
        population.drift(config, planned, registry.locate(config.model))


def take_in(config: RunConfig) -> None:
    """What an imputation of all shards leaves, as far as the table's log tells it."""
    model, counts = registry.digest_of(config.model), json.dumps({"rows": 0, "from_prior": 0, "imputed": {}})
    made = table.expected(list_shards(config.shards), model, "s")
    for key, shard in made.items():
        publish_table(config.output, key, fetch_table(config.shards, shard.key).replace_schema_metadata({table.COUNTS: counts}))
    wanted = [o for o in table.published(config.output) if o.key in made]
    table.commit(config.output, wanted, {"model_digest": model, "settings_digest": "s"})


def test_a_shard_that_was_uploaded_anew_is_counted_once(config):
    """Ten shards of 100: nine come again with other values, the input of an eleventh is gone, its output not pruned."""
    for number in range(11):
        publish_table(config.shards, f"{number:02d}.parquet", linear_cohort(100, first=100 * number))
    storage.delete(config.shards, ["a.parquet"])
    standing = config.model_copy(update={"retrain": False})
    take_in(standing)
    assert population.plan(standing)["rows"] == 1100
    storage.delete(config.shards, ["10.parquet"])
    for number in range(1, 10):
        publish_table(config.shards, f"{number:02d}.parquet", linear_cohort(100, seed=1, first=100 * number))
    planned = population.plan(standing)
    assert planned["rows"] == 1000
    registry.write_record(registry.locate(config.model), "fitted", {"rows": 1000})
    stages = {"plan": planned, "fit": {"model": registry.locate(config.model)}}
    assert population.asks_for_retraining(standing, stages) == []
    publish_table(config.shards, "x.parquet", linear_cohort(300, first=5000))
    assert population.asks_for_retraining(standing, stages | {"plan": population.plan(standing)}) == [
        "30% more records than the champion was trained on"
    ]
