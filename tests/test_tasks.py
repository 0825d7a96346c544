"""What a model is asked besides imputation: closed forms first, then a small model."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import binom

from mmimpute import jobs, population
from mmimpute.commands.tasks import task_tables
from mmimpute.data.profile import SMALLEST_GROUP
from mmimpute.data.schema import Modality
from mmimpute.errors import UserError
from mmimpute.report import render
from mmimpute.spec import EvaluateSettings, RunConfig, validated
from mmimpute.tasks.asking import ask, check_label, people_of
from mmimpute.tasks.classifier import Classifier, auroc, classifiers
from mmimpute.tasks.coherence import agreement, synthetic
from mmimpute.tasks.likelihood import likelihood
from mmimpute.tasks.people import NONE, coded, with_holes
from mmimpute.tasks.quality import compared, density_coverage, frechet, quality
from mmimpute.tasks.retrieval import DEPTHS, Link, ranks, recall
from mmimpute.tasks.search import nearest, retrieve
from tests import fitting

TASKS = ("coherence", "quality", "likelihood", "probe", "retrieval")


def test_a_classifier_reads_how_often_a_text_has_each_token():
    words = {"vocabulary": ("fever", "no", "pain"), "shape": (4,)}
    note = Modality(
        name="n", layout="text", columns=("n",), types=("string",), features=(), impute=True, hide=0.5, tails="student", **words
    )
    ids = np.array([[2, 1, 2, 3], [3, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    bags = coded(ids, ids, np.array([[True], [True], [False]]).repeat(4, 1), note)
    assert bags.tolist() == [[1, 2, 1], [0, 0, 1], [0, 0, 0]]


def with_moments(mean, covariance, rows: int = 500) -> np.ndarray:
    """Records whose sample mean and covariance are just these."""
    x = np.random.default_rng(0).normal(size=(rows, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(np.array(covariance)).T + mean


# -- quality ----------------------------------------------------------------------------------------------------------


def test_frechet_of_axis_parallel_gaussians_is_the_closed_form():
    a, b = with_moments([0, 0, 0], np.diag([1, 4, 9])), with_moments([1, 2, 0], np.diag([4, 4, 1]))
    assert frechet(a, b) == pytest.approx(1 + 4 + (1 - 2) ** 2 + (2 - 2) ** 2 + (3 - 1) ** 2)


def test_frechet_of_turned_gaussians_does_not_depend_on_the_axes():
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    a, b = with_moments([0, 0, 0], [[2, 1, 0], [1, 2, 0], [0, 0, 1]]), with_moments([1, 0, 0], [[1, 0, 0.5], [0, 3, 0], [0.5, 0, 1]])
    assert frechet(a @ turn, b @ turn) == pytest.approx(frechet(a, b)) == pytest.approx(frechet(b, a))
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_density_and_coverage_of_the_same_and_of_far_apart_sets():
    rng = np.random.default_rng(0)
    real, again = rng.normal(size=(2, 2000, 4))
    assert density_coverage(real, real)[1] == 1
    assert density_coverage(real, real + 100) == (0, 0)
    # Two samples of M of one distribution: E density = 1, E coverage = 1 - prod (M - i) / (2 M - i), i to k (Naeem et al. 2020, lemma 2).
    k, m = 5, 2000
    expected = 1 - np.prod([(m - i) / (2 * m - i) for i in range(1, k + 1)])
    density, coverage = density_coverage(real, again, k)
    assert density == pytest.approx(1, abs=0.05)
    assert coverage == pytest.approx(expected, abs=0.02)


def test_samples_that_miss_a_mode_lose_coverage_and_no_density():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(1000, 3)) + 20 * (np.arange(1000) % 2)[:, None]
    density, coverage = density_coverage(real, rng.normal(size=(1000, 3)))
    assert coverage == pytest.approx(0.5, abs=0.05)
    assert density > 0.9
    assert set(compared(real, real)) == {"frechet", "density", "coverage"}


# -- classifiers and coherence ----------------------------------------------------------------------------------------


def test_a_classifiers_feature_is_its_penultimate_layer():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 6)), rng.integers(0, 3, 300)
    x[:, 0] += 3 * y
    found = Classifier(x, y, 4)
    features = found.features(x)
    last = features @ found.network.coefs_[-1] + found.network.intercepts_[-1]
    chance = np.exp(last) / np.exp(last).sum(1, keepdims=True)
    np.testing.assert_allclose(found.chances(x)[:, :3], chance, atol=1e-6)
    assert (found.chances(x)[:, 3] == 0).all()  # a level that it has not seen
    assert auroc(y, found.chances(x)) > 0.9


def test_auroc_of_several_levels_is_the_mean_of_each_against_the_others():
    label = np.array([0, 0, 1, 1, 2, 2])
    assert auroc(label, np.eye(3)[label]) == 1
    assert auroc(label, np.ones((6, 3)) / 3) == 0.5
    assert auroc(np.zeros(6, int), np.ones((6, 2))) is None
    assert auroc(np.array([0, 1, 1]), np.array([[0.1, 0.9], [0.2, 0.8], [0.9, 0.1]])) == 0  # of level 1


def test_agreement_is_the_share_on_which_all_say_the_same():
    assert agreement(np.array([[0, 1, 2, 1], [0, 1, 1, 1], [0, 2, 2, 1]])) == 0.5


# -- retrieval --------------------------------------------------------------------------------------------------------


def test_a_permuted_identity_is_found_at_once():
    keys = np.eye(200)
    order = np.random.default_rng(0).permutation(200)
    found = ranks(keys, keys[order], np.argsort(order))
    assert (found == 1).all()
    told = recall(found, np.full(200, 200))
    assert told["recall"] == {"1": 1, "5": 1, "10": 1}
    assert told["chance"] == pytest.approx({"1": 1 / 200, "5": 5 / 200, "10": 10 / 200})
    assert told["median_rank"] == 1


def test_noise_is_found_as_often_as_by_chance():
    rng, n = np.random.default_rng(0), 2000
    told = recall(ranks(rng.normal(size=(n, 8)), rng.normal(size=(n, 8)), np.arange(n)), np.full(n, n))
    for depth in map(str, DEPTHS):
        low, high = binom.ppf((0.001, 0.999), n, told["chance"][depth]) / n
        assert low <= told["recall"][depth] <= high
    assert told["median_rank"] == pytest.approx(n / 2, rel=0.1)


def test_ties_share_the_middle_rank():
    assert (ranks(np.ones((5, 2)), np.ones((5, 2)), np.arange(5)) == 3).all()


def pairs(rows: int, correlation: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of latents with these canonical correlations, in axes of their own."""
    rng, width = np.random.default_rng(seed), len(correlation)
    u = rng.normal(size=(rows, width))
    v = correlation * u + np.sqrt(1 - correlation**2) * rng.normal(size=(rows, width))
    turns = np.random.default_rng(9).normal(size=(2, width, width))
    return u @ turns[0] + 3, v @ turns[1] - 7


def test_a_links_scores_are_the_gaussian_log_likelihood_ratio():
    correlation = np.array([0.9, 0.5, 0.0])
    a, b = pairs(20_000, correlation)
    link = Link.fit(a, b)
    np.testing.assert_allclose(link.correlation, correlation, atol=0.03)
    joint = np.cov(np.c_[a, b], rowvar=False)
    x, y = a[:40], b[:40]
    both = torch.distributions.MultivariateNormal(torch.tensor(np.r_[a.mean(0), b.mean(0)]), torch.tensor(joint))
    alone = [
        torch.distributions.MultivariateNormal(torch.tensor(m.mean(0)), torch.tensor(np.cov(m, rowvar=False))).log_prob(torch.tensor(z))
        for m, z in ((a, x), (b, y))
    ]
    expected = both.log_prob(torch.tensor(np.c_[x, y])) - alone[0] - alone[1]
    scores = (link.queries(x) * link.keys(y)).sum(1)
    np.testing.assert_allclose(scores, expected, atol=0.05)


def test_a_link_finds_what_cosines_do_not():
    correlation = np.linspace(0.95, 0.1, 12)
    link, (a, b) = Link.fit(*pairs(2000, correlation)), pairs(500, correlation, 1)
    own, size = np.arange(500), np.full(500, 500)
    cosine = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a - a.mean(0), b - b.mean(0))]
    linked = recall(ranks(link.queries(a), link.keys(b), own), size)["recall"]["10"]
    assert linked > 0.6
    assert linked > 5 * recall(ranks(*cosine, own), size)["recall"]["10"]


@pytest.fixture
def held() -> pa.Table:
    """What embedding leaves of 900 people: 300 hold both modalities, two members each with axes of its own."""
    correlation = np.full(6, 0.99)
    parts = [pairs(900, correlation, seed) for seed in (1, 1)]
    a, b = (np.concatenate([p[i] for p in parts], 1).astype(np.float32) for i in (0, 1))
    lists = {n: pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 12) for n, x in (("a", a), ("b", b))}
    number = np.arange(900)
    place = pa.array(np.random.default_rng(0).random(900))
    columns = {
        "subject": pa.array([f"s{i}" for i in number]),
        "place": place,
        "has_a": pa.array(number < 600),
        "has_b": pa.array(number >= 300),
    }
    return pa.table(columns | lists)


def test_the_table_of_what_was_found(held):
    found, counts = retrieve(held, 2, 7)
    assert (counts["queries"], counts["among"], counts["pairs"]) == (600, 600, 300)
    assert counts["recall"]["recall"]["10"] > 0.8
    table = found.to_pydict()
    assert table["rank"] == list(range(1, 8)) * 600
    assert set(table["query"]) == {f"s{i}" for i in range(600)}
    assert set(table["found"]) <= {f"s{i}" for i in range(300, 900)}
    scores = np.reshape(table["score"], (600, 7))
    assert (np.diff(scores) <= 0).all()
    own = np.array([q in table["found"][7 * i : 7 * i + 7] for i, q in enumerate(table["query"][::7])])
    assert own[300:].mean() > 0.6
    assert not own[:300].any()  # they hold no b


def test_too_few_people_with_both_are_told(held):
    with pytest.raises(UserError, match="fewer than 100 people hold both"):
        retrieve(held.slice(0, 350), 2, 5)


def test_the_index_finds_what_exact_search_does(monkeypatch):
    pytest.importorskip("faiss")
    a, b = pairs(3000, np.linspace(0.95, 0, 10))
    link = Link.fit(a, b)
    queries, keys = link.queries(a[:200]).astype(np.float32), link.keys(b).astype(np.float32)
    exact, score = nearest(queries, keys, 10)
    np.testing.assert_allclose(score[:, 0], (queries @ keys.T).max(1), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr("mmimpute.tasks.search.MOST_EXACT", 100)
    indexed, _ = nearest(queries, keys, 10)
    assert np.mean([len(set(x) & set(y)) for x, y in zip(exact, indexed, strict=True)]) > 9.5


# -- labels -----------------------------------------------------------------------------------------------------------


def test_tasks_that_need_a_label_ask_for_it():
    with pytest.raises(UserError, match="quality, probe: give label"):
        validated(EvaluateSettings, {"tasks": ["likelihood", "quality", "probe"]}, "--tasks")
    assert EvaluateSettings(tasks=("likelihood", "retrieval")).label is None


def test_a_run_asks_again_only_when_other_tasks_are_wanted(monkeypatch, tmp_path):
    asked = []

    def evaluate_model(_found, _place, _cluster, settings):
        asked.append(settings.tasks)
        return {"rows": 9, "modalities": {}} | ({"settings": settings.model_dump(mode="json"), "tasks": {}} if settings.tasks else {})

    monkeypatch.setattr(jobs, "evaluate_model", evaluate_model)
    monkeypatch.setattr(population, "read_plan", lambda *_: None)
    fields = {"spec": {"modalities": {"rna": {"column": "rna"}}}, "shards": "s", "model": "m", "output": "o"}
    plain = validated(RunConfig, fields, "run.toml")
    more = validated(RunConfig, fields | {"evaluate": {"tasks": ["probe"], "label": "outcome__died"}}, "run.toml")
    for config in (plain, plain, more, more, plain):
        assert population.evaluate(config, "plan", str(tmp_path)) == {"rows": 9, "skill": {}}
    assert asked == [(), ("probe",)]


# -- a small model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(two_models):
    """A model, and people with a label that labs and rna tell of."""
    cohort, _, model = two_models
    x, place = fitting.records(cohort, model.schema)
    site = [v or "" for v in cohort.column("dx__site").to_pylist()]
    return model, people_of(model, x, place, np.array(site, object), "site")


@pytest.fixture(scope="module")
def found(small):
    _, people = small
    told = ask(people, [t for t in TASKS if t != "likelihood"])
    return told | {"likelihood": likelihood(people.take(np.arange(0, len(people.x), 10)), samples=100)}


def test_every_part_is_asked_of_a_member_that_has_not_seen_it(small):
    _, people = small
    seen = np.zeros(len(people.x), int)
    for _, learners, own in people.parts():
        assert not set(learners) & set(own)
        assert len(np.unique(people.fold[own])) == 1
        seen[own] += 1
    assert (seen == 1).all()


def test_people_of_one_fold_are_parted_all_the_same(small):
    model, people = small
    rows = people.fold == 0
    one = people_of(model, people.x[rows], np.linspace(0, 0.19, rows.sum()))
    assert len(np.unique(one.part)) == 5
    assert (one.fold == 0).all()
    assert (one.label == NONE).all()


def test_synthetic_records_lack_what_real_ones_lack(small):
    _, people = small
    made = synthetic(people)
    assert made.shape == people.x.shape
    for at in range(people.x.shape[1]):
        j = np.searchsorted(np.cumsum(people.model.widths), at, "right")
        holes = np.isnan(people.x[people.present[:, j], at]).mean()
        assert np.isnan(made[:, at]).mean() == pytest.approx(holes, abs=0.05)
    np.testing.assert_array_equal(with_holes(np.ones((1, 3)), np.array([[1, np.nan, 2]])), [[1, np.nan, 1]])


def test_a_label_that_the_values_tell_of_is_found_in_draws_z0_and_raw_values(found):
    labs = found["coherence"]["conditional"]["labs"]
    assert labs["auroc"] > 0.85
    assert labs["auroc"] + 0.05 > labs["auroc_drawn"] > 0.6
    everything = found["probe"][0]
    assert everything["hidden"] == []
    assert everything["raw"]["auroc"][0] > 0.9
    low, high = everything["z0"]["auroc"][1:]
    assert 0.7 < low < everything["z0"]["auroc"][0] < high
    alone = next(e for e in found["probe"] if e["kept"] == ["rna"])
    assert alone["hidden"] == ["labs", "dx"]
    assert alone["z0"]["auroc"][0] < everything["z0"]["auroc"][0] + 0.02


def test_samples_that_are_no_such_people_are_worse_than_real_ones_in_their_place(small):
    _, people = small
    worse = quality(people, classifiers(people), {}, people.x[np.random.default_rng(0).permutation(len(people.x))] * 3)
    for name in ("labs", "rna"):
        assert worse[name]["halves"]["density"] == pytest.approx(1, abs=0.3)
        assert worse[name]["generated"]["frechet"] > 5 * worse[name]["halves"]["frechet"]
        assert worse[name]["generated"]["coverage"] < worse[name]["halves"]["coverage"] - 0.2
        assert worse[name]["imputed"] is None


def test_samples_of_a_model_are_about_as_good_as_real_people(found):
    for entry in found["quality"].values():
        for samples in ("generated", "imputed"):
            assert entry[samples]["coverage"] > entry["halves"]["coverage"] - 0.35


def test_a_likelihood_rises_with_its_samples_and_values_share_it(found):
    told = found["likelihood"]
    assert told["nats"]["mean"] > told["elbo"]["mean"]
    assert set(told["conditional"]) == {"labs", "rna", "dx"}
    assert 1 <= told["effective"] <= told["samples"]


def test_linked_modalities_are_found_above_chance(found):
    best = max(found["retrieval"], key=lambda e: e["recall"]["10"] / e["chance"]["10"])
    assert {best["query"], best["among"]} == {"labs", "rna"}
    assert best["recall"]["10"] > 2 * best["chance"]["10"]
    assert len(found["retrieval"]) == 6


def test_a_report_shows_every_task_and_no_small_group(found):
    evaluation = {"rows": 600, "modalities": {}, "tasks": json.loads(json.dumps(found))}
    page = render({"title": "t", "evaluation": evaluation})
    for name in TASKS:
        assert f'<section id="{name}">' in page
    evaluation["tasks"]["coherence"]["conditional"]["labs"]["rows"] = SMALLEST_GROUP - 1
    evaluation["tasks"]["retrieval"] = [e | {"rows": 3} for e in found["retrieval"]]
    evaluation["tasks"]["quality"] = {}
    page = render({"title": "t", "evaluation": evaluation})
    section = page[page.index('<section id="coherence">') : page.index('<section id="likelihood">')]
    assert '<th scope="row">labs</th>' not in section
    assert '<th scope="row">rna</th>' in section
    assert '<section id="quality">' not in page
    assert "labs → rna" not in page


def test_every_task_has_a_table(found):
    tables = task_tables(found)
    assert [t.row_count for t in tables[:1]] == [len(found["coherence"]["conditional"])]
    assert [t.row_count for t in tables[1:]] == [sum(bool(v) for e in found["quality"].values() for v in list(e.values())[1:]), 7, 6, 4]


def test_a_label_that_the_model_reads_is_refused(small):
    model, _ = small
    check_label(model.schema, "outcome__died")
    with pytest.raises(UserError, match="the model reads 'dx__site'"):
        check_label(model.schema, "dx__site")


def test_too_few_people_are_told(small):
    _, people = small
    with pytest.raises(UserError, match="fewer than 10 people"):
        ask(people.take(np.arange(9)), ("likelihood",))
