"""Studies from shards and from the enriched table: whose values are read, what is hidden from the model, and clear mistakes."""

import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from mmimpute import cli, jobs, planning, registry, studying
from mmimpute.data.shards import fetch_table, list_shards, publish_table
from mmimpute.data.table import table_state
from mmimpute.errors import UserError
from mmimpute.imputing import impute_shard
from mmimpute.outcomes import Label, Survival
from mmimpute.spec import ImputeSettings
from mmimpute.studying import Question
from tests.conftest import linear_cohort

DIED = Question("outcome__died", features=("labs[f1]", "dx__code", "dx__stage"))
DRAWS = ImputeSettings(draws=3)


@pytest.fixture(scope="module")
def model(small_cohort):
    return registry.load(small_cohort[2])


@pytest.fixture(scope="module")
def enriched(small_cohort, model, tmp_path_factory) -> str:
    url = str(tmp_path_factory.mktemp("enriched"))
    for shard in list_shards(small_cohort[0]):
        impute_shard(model, small_cohort[0], shard, url, DRAWS)
    jobs.commit_table(planning.listed_for(small_cohort[0], model.schema), model.url, url, DRAWS)
    return url


def test_a_study_of_the_table_is_what_stands_in_it(enriched, model):
    found = studying.from_table(model.schema, enriched, DIED)
    rows = pa.concat_tables(fetch_table(enriched, k).replace_schema_metadata(None) for k in sorted(table_state(enriched).keys)).to_pylist()
    assert found.outcome.event.tolist() == [bool(r["outcome__died"]) for r in rows]
    for i, r in enumerate(rows):
        lab = None if r["labs"] is None else r["labs"][1]
        for at, seen, name, pick in ((0, lab, "labs", lambda v: v[1]), (1, r["dx__code"], "dx__code", float)):
            np.testing.assert_equal(found.observed_NP[i, at], np.nan if seen is None else np.float64(seen))
            imputed = seen if r[f"{name}__imputed"] is None else pick(r[f"{name}__imputed"])
            draws = [seen] * 3 if r[f"{name}__draws"] is None else [pick(d) for d in r[f"{name}__draws"]]
            assert found.imputed_NP[i, at] == pytest.approx(imputed, abs=1e-9)
            assert found.draws_MNP[:, i, at] == pytest.approx(draws, abs=1e-9)


def test_a_study_of_the_shards_is_the_models(small_cohort, enriched, model):
    here, there = studying.from_shards(model, small_cohort[0], DIED, 3), studying.from_table(model.schema, enriched, DIED)
    order = [np.argsort(s.imputed_NP[:, 0] + 10 * s.imputed_NP[:, 1], kind="stable") for s in (here, there)]  # objects have another order
    assert here.imputed_NP[order[0]] == pytest.approx(there.imputed_NP[order[1]], abs=1e-4)
    assert here.draws_MNP.shape == there.draws_MNP.shape == (3, 600, 3)
    seen = ~np.isnan(here.observed_NP)
    assert (here.draws_MNP[:, seen] == here.observed_NP[seen]).all()
    assert here.draws_MNP[:, ~seen].std(0).min() >= 0 and set(here.draws_MNP[..., 1].ravel()) == {0.0, 1.0}


def test_what_is_excluded_tells_nothing(model, tmp_path):
    """Whatever stands in an excluded modality, the completed covariates are the same to the bit; the model would read it."""
    table = linear_cohort(120, seed=3)
    other = [0.0 if c else 1.0 for c in table.column("dx__code").to_pylist()]
    changed = table.set_column(table.column_names.index("dx__code"), "dx__code", pa.array(other, pa.float64()))
    for name, rows in (("a", table), ("b", changed)):
        publish_table(str(tmp_path / name), "x.parquet", rows)
    asked = Question("outcome__died", features=("labs[f1]", "rna[f0]"))
    found = {}
    for exclude in ((), ("dx",)):
        found[exclude] = [studying.from_shards(model, str(tmp_path / n), asked._replace(exclude=exclude), 2) for n in ("a", "b")]
    blind, seeing = found[("dx",)], found[()]
    assert (blind[0].imputed_NP == blind[1].imputed_NP).all() and (blind[0].draws_MNP == blind[1].draws_MNP).all()
    assert not (seeing[0].imputed_NP == seeing[1].imputed_NP).all()


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int8(), pa.float64()])
def test_labels(kind):
    table = pa.table({"e": pa.array([1, 0, 1], pa.int8()).cast(kind)})
    assert studying.outcome_of(table, Question("e")).event.tolist() == [True, False, True]


def test_an_event_is_a_value_of_its_column():
    table = pa.table({"status": [0, 1, 2, 2], "said": ["no", "NO", "<30", ">30"], "days": [1, 2.5, 3, 0]})
    found = studying.outcome_of(table, Question("status", equals="2", time="days"))
    assert isinstance(found, Survival) and found.event.tolist() == [False, False, True, True] and found.time.tolist() == [1, 2.5, 3, 0]
    found = studying.outcome_of(table, Question("said", equals="<30"))
    assert isinstance(found, Label) and found.event.tolist() == [False, False, True, False]


def test_who_lacks_the_outcome_is_left_out(small_cohort, model, tmp_path, monkeypatch):
    table = linear_cohort(100, seed=4)
    died = pc.if_else(pa.array([i % 3 == 0 for i in range(100)]), None, table.column("outcome__died"))
    publish_table(str(tmp_path), "x.parquet", table.set_column(table.column_names.index("outcome__died"), "outcome__died", died))
    assert len(studying.from_shards(model, str(tmp_path), DIED, 2).complete) == 66
    monkeypatch.setattr(studying, "MOST_LABELLED", 50)
    assert len(studying.from_shards(model, str(tmp_path), DIED, 2).complete) == 50


MISTAKES = {
    "unknown feature": (DIED._replace(features=("labs[f9]",)), r"--features: no feature 'labs\[f9\]'"),
    "a category": (DIED._replace(features=("dx__site",)), "'dx__site' is categorical"),
    "both": (DIED._replace(exclude=("labs",)), r"'labs\[f1\]' is excluded"),
    "unknown modality": (DIED._replace(exclude=("lab",)), "--exclude: no feature 'lab'"),
    "an input as the outcome": (Question("dx__code"), "the model reads 'dx__code'"),
    "no such outcome": (Question("outcome__cured"), "has no column 'outcome__cured'"),
    "no number": (DIED._replace(equals="yes"), "--equals: column 'outcome__died' holds numbers"),
    "nobody": (Question("outcome__died", time="outcome__days"), "has no column 'outcome__days'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_questions_that_cannot_be_asked_are_told(case, small_cohort, model):
    asked, message = MISTAKES[case]
    with pytest.raises(UserError, match=message):
        studying.from_shards(model, small_cohort[0], asked, 2)


def test_covariates_are_not_endless(small_cohort, model, monkeypatch):
    monkeypatch.setattr(studying, "MOST_COVARIATES", 11)
    with pytest.raises(UserError, match="12 covariates, more than 11: name those to use with --features"):
        studying.from_shards(model, small_cohort[0], Question("outcome__died"), 2)
    assert len(studying.covariates(model.schema, Question("outcome__died", exclude=("dx__code",)))) == 11


def test_outcomes_that_need_a_word_more_are_told():
    table = pa.table({"said": ["no", "yes"], "stage": [1, 2], "early": [-1.0, 2.0], "died": [0, 1]})
    for asked, message in (
        (Question("said"), "is text; say with --equals"),
        (Question("stage"), "holds others than 0 and 1"),
        (Question("died", time="early"), "holds negative times"),
    ):
        with pytest.raises(UserError, match=message):
            studying.outcome_of(table, asked)


def test_a_table_cannot_forget(enriched, small_cohort, model, tmp_path):
    with pytest.raises(UserError, match="give --shards"):
        studying.from_table(model.schema, enriched, DIED._replace(exclude=("rna",)))
    url, settings = str(tmp_path / "bare"), ImputeSettings(draws=1)
    for shard in list_shards(small_cohort[0]):
        impute_shard(model, small_cohort[0], shard, url, settings)
    jobs.commit_table(planning.listed_for(small_cohort[0], model.schema), model.url, url, settings)
    with pytest.raises(UserError, match="impute with --draws 20"):
        studying.from_table(model.schema, url, DIED)


@pytest.mark.parametrize("source", ["--shards", "--output"])
def test_the_command(source, enriched, small_cohort, monkeypatch, capsys):
    place = small_cohort[0] if source == "--shards" else enriched
    arguments = ["--model", small_cohort[2], source, place, "--outcome", "outcome__died", "--features", "labs[f1],dx__code"]
    monkeypatch.setattr(sys, "argv", ["mmimpute", "evaluate", "downstream", *arguments, "--draws", "3"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    text = "".join(capsys.readouterr())
    assert not left.value.code, text
    assert "600 people" in text and "labs[f1]" in text and "mean-filled" in text and "AUROC" in text
    assert "everyone: imputed and mean-filled: no difference beyond noise" in text  # the outcome is a coin
    assert not any(f"s{i:06d}" in text for i in range(600))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "Missing option '--model'"),
        (["evaluate", "--model", "m"], "Missing option '--shards'"),
        (["evaluate", "downstream", "--model", "m", "--outcome", "o"], "give either --shards or --output"),
        (["evaluate", "downstream", "--model", "m", "--shards", "s"], "give either --outcome, or --time and --event"),
        (["evaluate", "downstream", "--model", "m", "--shards", "s", "--event", "e"], "give either --outcome, or --time and --event"),
    ],
)
def test_options_that_belong_together(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mmimpute", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2 and message in "".join(capsys.readouterr())
