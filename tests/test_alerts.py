"""Alert rules: closed-form probabilities, planted people, and lists that are written once and tell nobody else who is on them."""

import json
import sys
from dataclasses import replace
from datetime import date

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mmimpute import alerts, cli, jobs, planning, population, registry
from mmimpute.data import storage
from mmimpute.data.schema import Feature, Modality, Place, places
from mmimpute.data.shards import fetch_table, list_shards, publish_table
from mmimpute.data.table import table_state
from mmimpute.errors import UserError
from mmimpute.imputing import impute_shard
from mmimpute.report import render
from mmimpute.spec import AlertRules, ImputeSettings, Rule, RunConfig, read_rules, read_spec, validated
from tests.conftest import SPEC, linear_cohort, untrained_model

RULES = """
[rules.high]
feature = "labs[f1]"
at_least = 0.5
probability = 0.3
where = { "dx__stage" = { at_least = 1 }, "dx__site" = { equals = "lung" } }
message = "have the lab done"
[rules.coded]
feature = "dx__code"
equals = 1
probability = 0.4
[rules.nobody]
feature = "labs[f0]"
at_least = 1000
probability = 0.5
"""
SETTINGS = ImputeSettings()


def aim(kind: str, unit: float | None = None, step: float = 0.0, **condition) -> alerts.Aim:
    rule = Rule(feature="x", probability=0.5, **condition)
    feature = Feature(name="x", kind=kind)
    modality = Modality(
        name="m", layout="scalars", columns=("x",), types=("float",), features=(feature,), impute=True, hide=0.5, tails="student"
    )
    return alerts.Aim("rule", rule, Place(modality, feature, "x", 0, 0), unit, step, ())


@given(st.floats(-5, 5), st.floats(0.1, 3), st.floats(-5, 5))
def test_the_probability_of_a_number_is_gaussian(mean, std, bound):
    found = [alerts.probability(aim("real", **{side: bound}), np.array([mean]), np.array([std]))[0] for side in ("at_least", "at_most")]
    assert found == pytest.approx([stats.norm.sf(bound, mean, std), stats.norm.cdf(bound, mean, std)])


@given(st.floats(-1, 4), st.floats(0.1, 1.2), st.floats(0.5, 20), st.sampled_from([1, -1]), st.floats(-1, 2))
def test_on_a_log_scale_it_is_that_of_the_log_normal(location, scale, unit, side, z):
    """x = side unit (e^y - 1), y ~ N(location, scale): from mean and deviation of x alone, the probability is y's."""
    shifted = stats.lognorm(scale, scale=unit * np.exp(location))
    mean, std = side * (shifted.mean() - unit), shifted.std()
    if side * mean <= 0:
        return  # on the other side of 0
    bound = side * unit * np.expm1(location + z * scale)
    found = alerts.probability(aim("real", unit=unit, at_least=bound), np.array([mean]), np.array([std]))[0]
    assert found == pytest.approx(stats.norm.sf(z) if side > 0 else stats.norm.cdf(z), abs=1e-6)


def test_whole_numbers_have_half_a_step_around_them():
    mean, std = np.array([1.2]), np.array([0.7])
    at_least = alerts.probability(aim("ordinal", step=2.0, at_least=2), mean, std)
    at_most = alerts.probability(aim("ordinal", step=2.0, at_most=0), mean, std)
    assert at_least == pytest.approx(stats.norm.sf(1, 1.2, 0.7))
    assert at_least + at_most == pytest.approx(1)
    exactly = alerts.probability(aim("ordinal", step=2.0, equals=2), mean, std)
    assert exactly == pytest.approx(at_least - stats.norm.sf(3, 1.2, 0.7))


def test_a_binary_feature_holds_its_probability():
    mean, std = np.array([0.3]), np.array([0.1])
    conditions = ({"equals": 1}, {"equals": 0}, {"at_least": 1}, {"at_least": 0}, {"at_most": 0.5}, {"equals": 2})
    found = [alerts.probability(aim("binary", **c), mean, std)[0] for c in conditions]
    assert found == pytest.approx([0.3, 0.7, 0.3, 1, 0.7, 0])


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6))
def test_of_a_category_it_is_never_more_than_the_level_has(weights):
    p = np.array(weights) / sum(weights)
    mean, std = np.array(["top"], object), np.array([np.sqrt(1 - (p**2).sum())])
    found = alerts.probability(aim("categorical", equals="top"), mean, std)[0]
    assert 0 < found <= p.max() + 1e-9
    assert alerts.probability(aim("categorical", equals="other"), mean, std)[0] == 0


@pytest.fixture(scope="module")
def model(small_cohort):
    return registry.load(small_cohort[2])


@pytest.fixture
def rules(tmp_path) -> AlertRules:
    (tmp_path / "rules.toml").write_text(RULES)
    return read_rules(tmp_path / "rules.toml")


@pytest.fixture
def enriched(small_cohort, model, tmp_path) -> str:
    """The enriched table of the small cohort."""
    url = str(tmp_path / "enriched")
    for shard in list_shards(small_cohort[0]):
        assert not impute_shard(model, small_cohort[0], shard, url, SETTINGS)["error"]
    jobs.commit_table(planning.listed_for(small_cohort[0], model.schema), model.url, url, SETTINGS)
    return url


def rows_of(url: str) -> pa.Table:
    """What the table's current version holds."""
    return pa.concat_tables(fetch_table(url, key).replace_schema_metadata(None) for key in sorted(table_state(url).keys))


def test_planted_people_are_found(model):
    """One person for each reason to be listed or not."""
    people = {  # labs[f1]: on record, imputed, std; stage and site on record
        "likely": (None, 2.0, 0.5, 1.0, "lung"),
        "unlikely": (None, 0.0, 0.5, 1.0, "lung"),
        "unsure": (None, 2.0, 9.0, 1.0, "lung"),
        "on-record": (2.0, None, None, 1.0, "lung"),
        "stage-too-low": (None, 2.0, 0.5, 0.0, "lung"),
        "stage-unknown": (None, 2.0, 0.5, None, "lung"),
        "elsewhere": (None, 2.0, 0.5, 1.0, "colon"),
    }
    four = pa.list_(pa.float32(), 4)
    seen = [[0.0, v[0], 0.0, 0.0] for v in people.values()]
    columns = {
        "subject_id": list(people),
        "labs": pa.array(seen, four),
        "labs__imputed": pa.array([[0.0, v[1], 0.0, 0.0] if v[0] is None else None for v in people.values()], four),
        "labs__std": pa.array([[0.0, v[2], 0.0, 0.0] if v[0] is None else None for v in people.values()], four),
        "dx__stage": [v[3] for v in people.values()],
        "dx__site": [v[4] for v in people.values()],
        "seen": [f"2026-01-0{i}" for i in range(1, 8)],
    }
    schema = model.schema.model_copy(update={"timestamp": "seen"})
    batch = pa.RecordBatch.from_pydict(columns)
    values = {"feature": "labs[f1]", "at_least": 1.0, "probability": 0.9}
    values["where"] = {"dx__stage": {"at_least": 1}, "dx__site": {"equals": "lung"}}
    for not_observed, wanted in ((True, ["likely"]), (False, ["likely", "on-record"])):
        asked = validated(AlertRules, {"rules": {"high": values | {"not_observed": not_observed}}}, "rules")
        (found,) = alerts.listed(batch, schema, alerts.aims_of(asked, model, batch.schema))
        assert found.column("subject_id").to_pylist() == wanted
        assert found.column("probability")[0].as_py() == pytest.approx(stats.norm.sf(1, 2, 0.5))
        assert found.column("seen").to_pylist() == [f"2026-01-0{1 + list(people).index(i)}" for i in wanted]
        assert found.select(["predicted", "std"]).slice(0, 1).to_pylist() == [{"predicted": 2.0, "std": 0.5}]


def test_the_lists_of_a_table(enriched, model, rules, tmp_path):
    to = str(tmp_path / "outreach")
    done = jobs.alert_table(model.url, enriched, rules, to)
    people, lists = rows_of(enriched), rows_of(to)
    missing = [v is None for v in people.column("dx__code").to_pylist()]
    chance = people.column("dx__code__imputed").to_pylist()
    wanted = {i: c for i, c, m in zip(people.column("subject_id").to_pylist(), chance, missing, strict=True) if m and c > 0.4}
    coded = [row for row in lists.to_pylist() if row["rule"] == "coded"]
    assert {row["subject_id"]: row["probability"] for row in coded} == pytest.approx(wanted)
    assert done["counts"]["coded"] == len(wanted) > 0 and done["counts"]["nobody"] == 0 and done["counts"]["high"] > 0
    assert done["rows"] == 600 and done["new"] == done["shards"] == 4


def test_a_second_call_writes_nothing_and_what_changed_is_replaced(enriched, small_cohort, model, rules, tmp_path):
    to = str(tmp_path / "outreach")
    first = jobs.alert_table(model.url, enriched, rules, to)
    before, objects = table_state(to), storage.list_objects(to, ".parquet")
    again = jobs.alert_table(model.url, enriched, rules, to)
    assert again["new"] == 0 and again["counts"] == first["counts"]
    assert table_state(to) == before and storage.list_objects(to, ".parquet") == objects
    stricter = rules.model_copy(update={"rules": {"coded": rules.rules["coded"].model_copy(update={"probability": 0.99})}})
    changed = jobs.alert_table(model.url, enriched, stricter, to)
    assert changed["new"] == 4 and table_state(to).version == before.version + 1
    assert len(table_state(to).keys) == 4 and not table_state(to).keys & before.keys
    # One shard imputed anew, with draws: only its list is made, and takes the place of the old one.
    shard = list_shards(small_cohort[0])[0]
    settings = ImputeSettings(draws=2)
    impute_shard(model, small_cohort[0], shard, enriched, settings)
    found = planning.listed_for(small_cohort[0], model.schema)
    jobs.commit_table(replace(found, shards=[shard]), model.url, enriched, settings)
    renewed = jobs.alert_table(model.url, enriched, stricter, to)
    assert renewed["new"] == 1 and renewed["counts"] == changed["counts"] and len(table_state(to).keys) == 4


def test_a_shard_without_the_timestamp_is_listed_without_it(small_cohort, tmp_path, rules):
    """The event time is no input of the model, so a shard that lacks it is imputed, and its people are in the lists."""
    url, home = str(tmp_path / "shards"), str(tmp_path / "model")
    dated = linear_cohort(300).append_column("seen", pa.array([date(2026, 1, 1)] * 300))
    publish_table(url, "a.parquet", dated)
    spec = tmp_path / "cohort.toml"
    spec.write_text('timestamp = "seen"\n' + SPEC)
    model = registry.load(untrained_model(url, home, spec))
    publish_table(url, "b.parquet", linear_cohort(300, first=300))
    enriched, to = str(tmp_path / "enriched"), str(tmp_path / "outreach")
    for shard in list_shards(url):
        assert not impute_shard(model, url, shard, enriched, SETTINGS)["error"]
    jobs.commit_table(planning.listed_for(url, model.schema), model.url, enriched, SETTINGS)
    done = jobs.alert_table(model.url, enriched, rules, to)
    assert done["new"] == 2 and len(table_state(to).keys) == 2
    lists = DeltaTable(to).to_pyarrow_table().to_pylist()
    assert {(row["subject_id"] < "s000300", row["seen"]) for row in lists} == {(True, date(2026, 1, 1)), (False, None)}


def test_nobody_is_named_outside_the_lists(enriched, small_cohort, model, rules, tmp_path, monkeypatch, capsys):
    to = str(tmp_path / "outreach")
    arguments = ["--rules", str(tmp_path / "rules.toml"), "--model", model.url, "--output", enriched, "--to", to]
    monkeypatch.setattr(sys, "argv", ["mmimpute", "alerts", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    text = "".join(capsys.readouterr())
    assert not left.value.code and "nobody: 0 people" in text and "coded: " in text
    spec = read_spec(small_cohort[1])
    config = RunConfig(spec=spec, shards=small_cohort[0], model=small_cohort[2], output=enriched, alerts=rules, alerts_to=to)
    stages = {
        "plan": population.plan(config),
        "fit": {"model": model.url, "digest": model.digest},
        "impute": {"done_before": 0, "seconds": {}},
        "commit": {"version": 0, "added": 4, "removed": 0, "counts": None},
        "alerts": population.alerts(config, model.url),
    }
    places_told = population.report(config, stages, {"impute": 1.0})
    record = population.last_record(enriched)
    page = storage.read(*places_told["report"].rsplit("/", 1)).decode()
    assert {a["rule"]: a["people"] for a in record["alerts"]} == stages["alerts"]["counts"]
    assert "have the lab done" in page and "Alerts" in page
    for told in (text, json.dumps(record), json.dumps(stages), page):
        assert not any(f"s{i:06d}" in told for i in range(600))
    # New rules on the same version: the report tells of them, and keeps what it said of the run.
    config = config.model_copy(update={"alerts": AlertRules(rules={"high": rules.rules["high"]})})
    stages |= {"commit": stages["commit"] | {"added": 0}, "alerts": population.alerts(config, model.url) | {"counts": {"high": "<10"}}}
    population.report(config, stages, {})
    renewed = population.last_record(enriched)
    assert renewed["alerts"][0]["people"] == "<10" and renewed["seconds"] == record["seconds"]


def test_small_groups_are_not_counted():
    assert [alerts.shown(n) for n in (0, 1, 9, 10, 4711)] == [0, "<10", "<10", 10, 4711]
    page = render({"title": "x", "alerts": [{"rule": "a", "message": "", "people": 7}, {"rule": "b", "message": "", "people": 4711}]})
    assert '<td class="n">&lt;10</td>' in page and "4,710" in page


MISTAKES = {
    "unknown feature": ({"feature": "labs[f9]"}, r"no feature 'labs\[f9\]'; the model's features are called 'labs\[f[0-9]\]'"),
    "unknown condition": ({"where": {"nothing": {"equals": 1}}}, "where: no feature 'nothing'"),
    "text for a number": ({"where": {"dx__stage": {"equals": "two"}}}, "'dx__stage' holds numbers"),
    "a number for text": ({"where": {"dx__site": {"at_least": 2}}}, "'dx__site' holds text"),
    "an exact number": ({"at_least": None, "equals": 2.0}, "is real; use at_least or at_most"),
    "unknown level": ({"feature": "dx__site", "at_least": None, "equals": "knee"}, "`equals` has to be one of colon, lung"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_rules_that_do_not_fit_are_told(case, model):
    changed, message = MISTAKES[case]
    rule = {"feature": "labs[f1]", "at_least": 1.0, "probability": 0.5} | changed
    arrow = pa.schema([("dx__stage", pa.float64()), ("dx__site", pa.string())])
    with pytest.raises(UserError, match=message):
        alerts.aims_of(validated(AlertRules, {"rules": {"r": rule}}, "rules"), model, arrow)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"feature": "x", "probability": 0.5}, "give one of at_least, at_most and equals"),
        ({"feature": "x", "probability": 1.0, "at_least": 1}, "rules.r.probability: Input should be less than 1"),
        ({"feature": "x", "probability": 0.5, "at_least": 1, "wherre": {}}, "unknown key 'rules.r.wherre'; valid keys here: .*feature"),
    ],
)
def test_rule_files_are_checked(rule, message):
    with pytest.raises(UserError, match=message):
        validated(AlertRules, {"rules": {"r": rule}}, "rules.toml")


def test_lists_have_a_place_of_their_own(enriched, model, rules):
    for to in (enriched, f"{enriched}/lists", enriched.rsplit("/", 1)[0]):
        with pytest.raises(UserError, match="a place of their own"):
            jobs.alert_table(model.url, enriched, rules, to)


def test_features_are_called_as_their_columns(model):
    found = places(model.schema)
    assert list(found)[:2] == ["labs[f0]", "labs[f1]"] and list(found)[-1] == "dx__site"
    assert [p.flat for p in found.values()] == list(range(model.schema.width))
