"""Drift: the index against its closed form, silence on new records of the same population, and an alert on every planted shift."""

import json
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from mmimpute import drift
from mmimpute.console import console, drift_tables
from mmimpute.data.profile import SMALLEST_GROUP, Statistics, merge, observe, settle
from mmimpute.data.reference import pool, reference
from mmimpute.data.schema import CohortSchema, Feature, Modality, draft_schema
from mmimpute.data.split import fold, position
from mmimpute.model import Imputer
from mmimpute.scoring import score, score_drop, summarise
from mmimpute.spec import CohortSpec, DriftSettings, ModalitySpec
from tests.model.cohorts import LinearGaussian, everything, fit_linear_vae

SITES = ["colon", "lung", "skin"]


def population(rows: int, seed: int, shift: float = 0.0, absent: float = 0.25, gap: float = 0.1) -> pa.Table:
    """Six numbers, of which the first is shifted, in a modality that is `absent`; a code, a count, a scale and a site in another."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, 6)) + shift * np.eye(6)[0]
    flat = pa.array(x.astype(np.float32).ravel(), mask=(draw.random(x.shape) < gap).ravel())
    labs = pa.FixedSizeListArray.from_arrays(flat, 6, mask=pa.array(draw.random(rows) < absent))
    return pa.table(
        {
            "subject_id": [f"planted-id-{seed}-{i}" for i in range(rows)],
            "labs": labs,
            "dx__code": (draw.random(rows) < 0.2).astype(float),
            "dx__visits": draw.negative_binomial(1, 0.2, rows),
            "dx__stage": draw.integers(0, 4, rows),
            "dx__site": draw.choice(SITES, rows, p=[0.6, 0.3, 0.1]),
            "rx__never": np.where(draw.random(rows) < 0.3, np.nan, 0.0),
        }
    )


SPEC = CohortSpec(
    modalities={
        "labs": ModalitySpec(column="labs"),
        "dx": ModalitySpec(prefix="dx__", kinds=("binary", "count", "ordinal", "categorical")),
        "rx": ModalitySpec(prefix="rx__", kinds="binary"),
    }
)
ROWS = 6000


@pytest.fixture(scope="module")
def trained() -> tuple[CohortSchema, dict]:
    """The settled schema and the reference of 6,000 training records."""
    table = population(ROWS, 0)
    drafted = draft_schema(SPEC, table.schema, {"labs": 6})
    schema, seen = settle(drafted, observe(table, drafted, "s", 1.0))
    return schema, reference(schema, seen) | {"score": summarise(["labs", "dx", "rx"], np.random.default_rng(9).normal(size=(2000, 3)))}


def observed(schema: CohortSchema, table: pa.Table) -> Statistics:
    return observe(table, schema, "s", 1.0, strict=False)


def compared(trained, table: pa.Table, scores: np.ndarray | None = None) -> dict:
    schema, kept = trained
    scores = np.random.default_rng(len(table)).normal(size=(min(len(table), 2000), 3)) if scores is None else scores
    return drift.compare(schema, kept, observed(schema, table), scores, DriftSettings())


# --- the index -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0.1, 0.3, 0.5, 1.0])
def test_the_index_of_two_gaussians_is_their_symmetric_divergence(delta):
    """KL both ways between N(0, 1) and N(delta, 1) is delta^2 / 2 each."""
    edges = np.r_[-np.inf, np.linspace(-6, 7, 2000), np.inf]
    p, q = (np.diff(norm.cdf(edges - mean)) * 1e9 for mean in (0.0, delta))
    assert drift.psi(p, q) == pytest.approx(delta**2, rel=2e-3)
    assert drift.psi(p, q) == pytest.approx(drift.psi(q, p)) and drift.psi(p, p) == 0


def test_the_index_of_one_population_is_zero_on_average_and_within_its_noise():
    draw, shares = np.random.default_rng(0), np.full(10, 0.1)
    pairs = [(draw.multinomial(5000, shares), draw.multinomial(500, shares)) for _ in range(4000)]
    unit = 1 / 5000 + 1 / 500
    assert np.mean([drift.psi(p, q) for p, q in pairs]) == pytest.approx(9 * unit, rel=0.03)
    beyond = [found["psi"] > found["noise"] for p, q in pairs if (found := drift.shift(p, q, 0.01))]
    assert 0.003 < np.mean(beyond) < 0.02


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 40))
def test_pooled_neighbours_hold_enough(counts, least):
    groups = pool(np.array(counts), least)
    assert groups[0] == 0 and set(np.diff(groups)) <= {0, 1}
    held = np.bincount(groups, counts)
    assert len(held) == 1 or held.min() >= least


# --- no alarm, and one where it is due -------------------------------------------------------------------------------------------------


def test_fresh_records_of_the_same_population_do_not_alert(trained):
    """200 drops of 50 to 5,000 records. FALSE_ALARMS bounds the rate at 1%; more than 6 of 200 would have probability 0.005."""
    draw = np.random.default_rng(1)
    sizes = np.exp(draw.uniform(np.log(50), np.log(5000), 200)).astype(int)
    alarms = [found["reasons"] for i, n in enumerate(sizes) if (found := compared(trained, population(int(n), 1000 + i)))["drifted"]]
    assert len(alarms) <= 6, alarms


def with_column(table: pa.Table, name: str, values) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


def planted(kind: str, rows: int = 1000) -> pa.Table:
    draw, table = np.random.default_rng(3), population(rows, 7)
    match kind:
        case "mean":
            return population(rows, 7, shift=0.8)
        case "missing modality":
            return population(rows, 7, absent=0.5)
        case "missing values":
            return population(rows, 7, gap=0.25)
        case "level":
            return with_column(table, "dx__site", np.where(draw.random(rows) < 0.05, "brain", table["dx__site"].to_pylist()))
        case "number":
            return with_column(table, "dx__stage", np.where(draw.random(rows) < 0.05, 17, table["dx__stage"].to_numpy()))
        case "code":
            never = table["rx__never"].to_numpy()
            return with_column(table, "rx__never", np.where((draw.random(rows) < 0.05) & (never == 0), 1.0, never))
        case "no code":
            return with_column(table, "dx__code", np.where(draw.random(rows) < 0.05, 2.0, table["dx__code"].to_numpy()))
        case "counts":
            return with_column(table, "dx__visits", draw.negative_binomial(1, 0.1, rows))
        case "pattern":  # each as often as before, never both
            labs = pa.FixedSizeListArray.from_arrays(pa.array(draw.normal(size=6 * rows)), 6, mask=pa.array(np.arange(rows) % 4 == 0))
            never = np.where(np.arange(rows) % 4 == 0, 0.0, np.where(draw.random(rows) < 0.4, np.nan, 0.0))
            return with_column(with_column(table, "labs", labs), "rx__never", never)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mean", r"labs: f0 has another distribution \(PSI 0\.[4-8]"),
        ("missing modality", r"labs is missing of \d+% of the records, 25% in training"),
        ("missing values", r"labs: f\d is missing of 2\d% of the modality's records, 10% in training"),
        ("level", "dx: site: [4-6]% of the values are of no level or code seen in training"),
        ("number", "dx: stage: [4-6]% of the values are of no level"),
        ("code", "rx: never: [3-7]% of the values are of no level or code"),
        ("no code", "dx: code: [4-6]% of the values are of no level"),
        ("counts", "dx: visits has another distribution"),
        ("pattern", "other modalities come together than in training"),
    ],
)
def test_a_planted_shift_is_named_first(trained, kind, words):
    found = compared(trained, planted(kind))
    assert found["drifted"]
    assert any(re.search(words, reason) for reason in found["reasons"]), found["reasons"]
    about = {r.split(":")[0] for r in found["reasons"]}
    if kind in ("mean", "level", "number", "code", "no code", "counts"):
        assert len(found["reasons"]) == 1 and f"{found['features'][0]['modality']}" in about


def test_the_terminal_shows_the_worst_features_and_all_modalities(trained, capsys):
    for table in drift_tables(compared(trained, planted("missing modality"))):
        console.print(table)
    text = " ".join(capsys.readouterr().out.split())
    assert "1,000 records beside the training data" in text and "dx: site" in text
    assert re.search(r"labs │ [+-]0.\d\d sd │ ±0.1\d │ \d\d.\d% │ 25", text)
    assert drift_tables(compared(trained, population(9, 1))) == []


def test_many_moderate_shifts_are_drift(trained):
    draw = np.random.default_rng(4)
    x = draw.normal(0.42, 1, (3000, 6))  # PSI 0.18 each
    found = compared(trained, with_column(population(3000, 8), "labs", pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 6)))
    assert any(r == "6 of 10 features have shifted moderately (PSI above 0.1)" for r in found["reasons"]), found["reasons"]
    assert not any("another distribution" in r for r in found["reasons"])


@pytest.mark.parametrize(("delta", "alerts"), [(-0.8, True), (0.8, True), (0.1, False)])
def test_a_shift_of_the_score(trained, delta, alerts):
    scores = np.random.default_rng(5).normal([0, delta, 0], 1, (1000, 3))
    found = compared(trained, population(1000, 9), scores)
    assert found["drifted"] == alerts
    assert found["modalities"]["dx"]["score"]["shift"] == pytest.approx(delta, abs=0.15)
    assert [("worse" if delta < 0 else "better") in r for r in found["reasons"]] == [True] * alerts


# --- honesty ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 9, 49])
def test_a_small_drop_is_not_judged(trained, rows):
    found = compared(trained, population(rows, 3, shift=5.0))
    assert not found["drifted"] and not found["judged"] and found["rows"] == 0 and not found["features"]
    assert found["reasons"] == ["fewer than 50 records: too few to say anything"]


def test_a_shift_that_chance_may_explain_does_not_alert(trained):
    """Beyond the threshold, in 90 records: not beyond chance."""
    found = compared(trained, population(90, 7, shift=0.55))
    (first,) = (f for f in found["features"] if f["name"] == "f0")
    assert 0.25 < first["psi"] < first["noise"] and not found["drifted"]
    assert compared(trained, population(2000, 7, shift=0.65))["drifted"]


def test_neither_order_nor_sharding_changes_the_record(trained):
    schema, kept = trained
    table = population(900, 11)
    parts = [observed(schema, table.slice(a, b - a)) for a, b in ((0, 100), (100, 650), (650, 900))]
    scores = np.full((0, 3), np.nan)
    records = [
        drift.compare(schema, kept, merge(merge(a, b), c), scores, DriftSettings())
        for a, b, c in (parts, parts[::-1], (parts[1], parts[2], parts[0]))
    ]
    shuffled = observed(schema, table.take(pa.array(np.random.default_rng(0).permutation(900))))
    records.append(drift.compare(schema, kept, shuffled, scores, DriftSettings()))
    assert all(r == records[0] for r in records)


def test_the_record_holds_no_value_of_a_person(trained):
    table = with_column(population(1000, 12), "dx__site", ["planted level"] * 500 + ["colon"] * 500)
    table = with_column(table, "dx__visits", [987654] * 9 + [1] * 991)
    found = compared(trained, table)
    text = json.dumps(found)
    assert "planted" not in text and "987654" not in text
    assert found["features"][0]["unseen"] == 0.5
    few = compared(trained, with_column(table, "dx__site", ["planted level"] * 9 + ["colon"] * 991))
    (site,) = (f for f in few["features"] if f["name"] == "site")
    assert site["unseen"] == 0.0, "nine people are a small group"


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(60, 400))
def test_the_reference_keeps_no_small_group(seed, few, rows):
    """Non-interference: what fewer than ten people have beyond all others, in a level or in a pattern of their own, changes nothing."""

    def kept(extreme: float) -> dict:
        table = population(rows, seed)
        visits = table["dx__visits"].to_numpy().copy()
        visits[:few] = 1e4 + extreme
        table = with_column(table, "dx__visits", visits)
        drafted = draft_schema(SPEC, table.schema, {"labs": 6})
        return reference(*settle(drafted, observe(table, drafted, "s", 1.0)))

    one = kept(0.0)
    assert one == kept(5e3)
    for feature in one["features"]:
        assert all(n == 0 or n >= SMALLEST_GROUP for n in feature["counts"])
    assert all(n == 0 or n >= SMALLEST_GROUP for n in one["counts"]) and sum(one["counts"]) == rows


# --- the score -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linear():
    """(truth, fitted model, its schema, scores of its training records out of fold): three modalities of one linear Gaussian latent."""
    torch.manual_seed(0)
    truth = LinearGaussian.make()
    ids = pa.array([f"s{i}" for i in range(1000)])
    x = truth.values(1000, 0)
    model = Imputer(fit_linear_vae(x, everything(x), epochs=4), [0, 0, 0]).eval()  # the score is the VAE's
    features = [tuple(Feature(name=f"f{i}", kind="real") for i in range(t.shape[1])) for t in x]
    rest = {"layout": "list", "types": ("double",), "impute": True, "hide": 0.5, "tails": "student"}
    modalities = tuple(Modality(name=n, columns=(n,), features=f, **rest) for n, f in zip("abc", features, strict=True))
    schema = CohortSchema(subject_id="subject_id", subject_type="string", modalities=modalities)
    table = as_table(ids, [t.numpy() for t in x])
    kept = reference(schema, observe(table, schema, "s", 1.0))
    scores = score(model, torch.cat(x, 1).numpy(), np.arange(1000) % 5)
    return truth, model, schema, kept | {"score": summarise("abc", scores)}


def as_table(ids: pa.Array, x: list[np.ndarray]) -> pa.Table:
    lists = {n: pa.FixedSizeListArray.from_arrays(pa.array(t.ravel()), t.shape[1]) for n, t in zip("abc", x, strict=True)}
    return pa.table({"subject_id": ids} | lists)


def drop_of(linear, x: list[np.ndarray]) -> dict:
    _, model, schema, kept = linear
    drop = observe(as_table(pa.array([f"new{i}" for i in range(len(x[0]))]), x), schema, "s", 1.0, strict=False)
    return drift.compare(schema, kept, drop, score_drop(model, schema, drop), DriftSettings())


def test_only_the_score_sees_that_modalities_no_longer_go_together(linear):
    x = [t.numpy() for t in linear[0].values(1000, 5)]
    same = drop_of(linear, x)
    assert not same["drifted"], same["reasons"]
    x[1] = x[1][np.random.default_rng(0).permutation(1000)]
    found = drop_of(linear, x)
    assert found["drifted"] and all("is predicted worse than in training" in r for r in found["reasons"])
    assert found["features"] == same["features"]


def test_a_record_is_scored_by_the_member_that_has_not_seen_it(linear):
    """Of linear Gaussian records the score is the conditional log-density of single values, which the truth knows."""
    truth, model, schema, _ = linear
    x = truth.values(400, 6)
    ids = pa.array([f"new{i}" for i in range(400)])
    drop = observe(as_table(ids, [t.numpy() for t in x]), schema, "s", 1.0)
    folds = fold(position(ids), 5)
    found = score(model, torch.cat(x, 1).numpy(), folds)
    for e in range(5):
        alone = model.vae.member(e).log_score([t[folds == e] for t in x], [torch.ones_like(t[folds == e], dtype=torch.bool) for t in x], 1)
        np.testing.assert_allclose(found[folds == e, 1], alone[0], atol=1e-5)
    assert sorted(found[:, 0]) == pytest.approx(sorted(score_drop(model, schema, drop)[:, 0]), abs=1e-5)
    mean, covariance = truth.conditional(1, [0, 2], x)
    scale = model.vae.standardise[1].std.numpy()
    best = norm.logpdf(x[1].numpy(), mean, np.sqrt(np.diag(covariance))) + np.log(scale)
    assert -0.15 < found[:, 1].mean() - best.mean() < 0.02


def test_a_record_with_nothing_else_is_not_scored(linear):
    _, model, *_ = linear
    x = np.random.default_rng(0).normal(size=(3, 13)).astype(np.float32)
    x[0, 4:], x[1, :4] = np.nan, np.nan
    found = score(model, x, np.array([0, 1, 2]))
    np.testing.assert_array_equal(np.isnan(found), [[True] * 3, [True, False, False], [False] * 3])


def test_values_of_no_known_level_are_scored_as_missing(trained):
    """What the model cannot take neither fails nor counts."""
    schema, _ = trained
    drop = observed(schema, planted("level"))
    seen = []

    class Spy:
        config = type("C", (), {"members": 1, "modalities": ()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmimpute.scoring.score", lambda imputer, x, folds: seen.append((x, folds)))
        score_drop(Spy, schema, drop)
    ((x, folds),) = seen
    assert (drop.sample[0][:, 9] == -1).sum() > 20 and not (x[:, 9] == -1).any() and not folds.any()
