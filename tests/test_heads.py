"""Heads: fitted with the model's folds, stored, refused where damaged, and what they write into a shard."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from mmimpute import finetuning, heads, registry
from mmimpute.data import storage
from mmimpute.data.arrow import decode, flat, texts
from mmimpute.data.shards import fetch_table, list_shards, publish_table
from mmimpute.data.split import fold, position
from mmimpute.errors import UserError
from mmimpute.imputing import ShardImputer
from mmimpute.spec import FinetuneSettings, ImputeSettings
from mmimpute.verifying import Pair, verify_shard
from tests.conftest import linear_cohort

DIED, STAGE = "outcome__died", "stage"


def labelled(rows: int = 500) -> pa.Table:
    """A linear cohort in which labs tell of death and of a stage of three, half of the records without a label."""
    given = linear_cohort(rows)
    first = np.array([(row or [0.0])[0] or 0.0 for row in given.column("labs").to_pylist()])
    none = np.arange(rows) % 2 == 0
    died = pa.array((first > 0).astype(float), mask=none)
    stage = pa.array(np.array(["I", "II", "III"])[np.digitize(first, [-0.7, 0.7])].astype(object), mask=none)
    return given.set_column(given.column_names.index(DIED), DIED, died).append_column(STAGE, stage)


@pytest.fixture(scope="module")
def model(small_cohort):
    return registry.load(small_cohort[2])


def fit(model, **settings):
    asked, given = FinetuneSettings(target=(DIED, STAGE), **settings), labelled()
    given = given.filter(given.column(STAGE).is_valid())
    x, place = flat(decode(given, model.schema, "s")), position(given.column("subject_id"))
    return *finetuning.fit(model, x, place, {c: texts(given, c) for c in asked.target}, asked), asked


@pytest.fixture(scope="module")
def head(model):
    return fit(model)


@pytest.fixture
def stored(model, head, small_cohort, tmp_path):
    """The URL of a head in a copy of the model's home."""
    home = shutil.copytree(small_cohort[2], tmp_path / "home")
    return heads.save(str(home), model.digest, *head)


def test_what_a_head_tells_of_itself(head):
    _, targets, _ = head
    assert [(t.levels, t.people, t.binary) for t in targets] == [(("0", "1"), 250, True), (("I", "II", "III"), 250, False)]
    assert all(t.auroc > 0.7 for t in targets)
    for t in targets:  # what fewer labels give: the last point is the head itself
        people, scores = zip(*t.curve, strict=True)
        assert list(people) == sorted(people) and (people[-1], scores[-1]) == (t.people, pytest.approx(t.auroc, abs=1e-6))
        assert scores[0] < scores[-1]


def test_its_auroc_is_that_of_members_that_have_not_seen_the_people(model, head):
    module, targets, _ = head
    given = labelled()
    given = given.filter(given.column(STAGE).is_valid())
    x = torch.from_numpy(flat(decode(given, model.schema, "s"))).split(model.widths, 1)
    folds = fold(position(given.column("subject_id")), 5)
    said = module.members(model.module.vae, x, [~v.isnan() for v in x])[0].numpy()
    own = said[folds, np.arange(len(folds)), 1]
    died = given.column(DIED).to_numpy()
    assert targets[0].auroc == pytest.approx(finetuning.auroc(died.astype(int), np.stack([1 - own, own], 1)))


@pytest.mark.parametrize("full", [False, True])
def test_round_trip(model, small_cohort, tmp_path, full):
    home = shutil.copytree(small_cohort[2], tmp_path / "home")
    module, targets, settings = fit(model, full=full, epochs=1, lr=1e-2)
    url = heads.save(str(home), model.digest, module, targets, settings)
    again = heads.load(url, model)
    assert again.file.targets == targets and (again.module.encoder is not None) == full
    assert all(torch.equal(a, b) for a, b in zip(again.module.state_dict().values(), module.state_dict().values(), strict=True))
    assert heads.model_of(url) == registry.locate(str(home))
    assert registry.champion(str(home)) == model.digest and registry.digests(str(home)) == [model.digest]


DAMAGES = {
    "no weights": lambda d: (d / "head.safetensors").unlink(),
    "cut off": lambda d: (d / "head.safetensors").write_bytes((d / "head.safetensors").read_bytes()[:-8]),
    "pickle": lambda d: (d / "head.safetensors").write_bytes(b"\x80\x04pickle" * 9),
    "no JSON": lambda d: (d / "head.json").write_text("{"),
    "another class": lambda d: (d / "head.json").write_text((d / "head.json").read_text().replace('"III"', '"IV"')),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_head_is_refused(stored, model, damage):
    DAMAGES[damage](Path(stored))
    with pytest.raises(UserError, match="head"):
        heads.load(stored, model)


def test_a_head_of_another_model_is_refused(stored, model, two_models):
    with pytest.raises(UserError, match="a head of model"):
        heads.load(stored, two_models[1])
    with pytest.raises(UserError, match="a head of model"):
        heads.check(stored, two_models[1].url)
    with pytest.raises(UserError, match="not the URL of a head"):
        heads.locate(model.url)


def test_a_target_that_is_an_input_is_refused(model):
    with pytest.raises(UserError, match="'dx__code' is an input"):
        finetuning.check_targets(model, FinetuneSettings(target=("dx__code",)))


def test_probabilities_stand_beside_what_is_imputed(stored, model, tmp_path):
    shards, output = str(tmp_path / "shards"), str(tmp_path / "out")
    given = linear_cohort(120, seed=4)
    publish_table(shards, "part.parquet", given)
    (shard,) = list_shards(shards)
    settings = ImputeSettings(head=stored, latent=True)
    loaded = heads.load(stored, model)
    (status,) = ShardImputer(model, shards, output, settings, loaded).impute([shard])
    made = fetch_table(output, status["output"])
    died, stage = (made.column(f"{c}__probability") for c in (DIED, STAGE))
    assert made.column_names[-2:] == [f"{DIED}__probability", f"{STAGE}__probability"]
    assert made.schema.field(f"{STAGE}__probability").metadata == {b"levels": b"I, II, III"}
    x = torch.from_numpy(flat(decode(given, model.schema, "s"))).split(model.widths, 1)
    expected = loaded.module.predict(model.module.vae, x, [~v.isnan() for v in x])
    assert np.allclose(died.to_numpy(), expected[0][:, 1].numpy(), atol=1e-6)
    assert np.allclose(np.array(stage.to_pylist()), expected[1].numpy(), atol=1e-6)
    objects = storage.objects(output, ".parquet")
    pair = Pair(*shard, *next((o.key, o.etag, o.size) for o in objects))
    assert verify_shard(model.schema, shards, pair, output)["problems"] == []
    (again,) = ShardImputer(model, output, output, ImputeSettings(head=stored), loaded).impute(list_shards(output))
    assert "a column that" in again["error"]
