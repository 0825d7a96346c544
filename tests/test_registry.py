"""Models in storage: what is loaded is what was saved, and nothing else is loaded."""

import json
import shutil

import pytest
import torch

from mmimpute import jobs, registry
from mmimpute.data import storage
from mmimpute.errors import UserError
from mmimpute.spec import ClusterSettings, ImputeSettings


@pytest.fixture
def home(small_cohort, tmp_path):
    """A copy of the model's home, to damage."""
    return shutil.copytree(small_cohort[2], tmp_path / "home")


def test_round_trip(home, place):
    model = registry.load(str(home))
    name = registry.save(place, model.module, model.schema, model.file.fitted_on)
    registry.promote(place, name)
    again = registry.load(place)
    assert name == model.digest == again.digest == registry.digest_of(place)
    assert again.schema == model.schema
    assert again.module.config == model.module.config
    for key, tensor in model.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[key], tensor)


def test_a_home_and_a_directory_both_name_the_model(home):
    by_home = registry.load(str(home))
    assert registry.load(by_home.url).digest == by_home.digest == by_home.url.rsplit("/", 1)[-1]


def test_records_stand_beside_the_model(home):
    place = registry.locate(str(home))
    assert registry.read_record(place, "evaluation") is None
    registry.write_record(place, "evaluation", {"rows": 1})
    assert registry.read_record(place, "evaluation") == {"rows": 1}


def test_no_model(tmp_path):
    with pytest.raises(UserError, match="no model there"):
        registry.load(str(tmp_path))


DAMAGES = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
    "cut off": (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-50]), "a damaged model"),
    "no safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"\x80\x04pickle" * 9), "a damaged model"),
    "no JSON": (lambda d: (d / "model.json").write_text("{"), "not a model of this version"),
    "unknown key": (lambda d: edit(d, lambda j: j.update(more=1)), "not a model of this version"),
    "another width": (lambda d: edit(d, lambda j: j["config"].update(hidden=32)), "a damaged model"),
    "unknown setting": (lambda d: edit(d, lambda j: j["config"].update(evil="rm")), "a damaged model"),
}


def edit(directory, change) -> None:
    content = json.loads((directory / "model.json").read_text())
    change(content)
    (directory / "model.json").write_text(json.dumps(content))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models_are_refused(damage, home):
    change, message = DAMAGES[damage]
    (directory,) = [d for d in home.iterdir() if d.is_dir()]
    change(directory)
    with pytest.raises(UserError, match=message):
        registry.load(str(home))


JOBS = {
    "impute": lambda home, shards, out: jobs.impute_cohort(home, shards, out, ImputeSettings(), ClusterSettings()),
    "generate": lambda home, shards, out: jobs.generate_cohort(home, out, 10, 0, ClusterSettings()),
    "retrieve": lambda home, shards, out: jobs.retrieve_table(home, shards, "labs", "dx", 5, out, ClusterSettings()),
}


@pytest.mark.parametrize("job", JOBS)
def test_no_cluster_starts_for_a_damaged_model(job, home, small_cohort, tmp_path, monkeypatch):
    """Ray would start a worker that cannot load it again and again."""
    monkeypatch.setattr(jobs.runtime, "cluster", lambda settings: pytest.fail("a cluster was started"))
    (directory,) = [d for d in home.iterdir() if d.is_dir()]
    edit(directory, lambda j: j["config"].update(hidden=32))
    with pytest.raises(UserError, match="a damaged model"):
        JOBS[job](str(home), small_cohort[0], str(tmp_path / "out"))


@pytest.mark.parametrize("alias", ['{"digest": "../../etc"}', "[]", "{", '{"digest": 7}'])
def test_an_alias_names_a_digest(alias, home):
    storage.write(str(home), registry.CHAMPION, alias.encode())
    with pytest.raises(UserError, match="not a champion alias"):
        registry.load(str(home))


A, B, C = ("a" * 32, "b" * 32, "c" * 32)


@pytest.fixture
def three(place):
    """A home of three models that are no more than their file."""
    for name in (A, B, C):
        storage.write(place, f"{name}/model.json", b"{}")
        registry.promote(place, name)
    return place


def test_a_rollback_goes_back_one_champion_at_a_time(three):
    assert registry.champion(three) == C and registry.alias(three).former == (A, B)
    assert (registry.rollback(three), registry.champion(three)) == (B, B)
    assert (registry.rollback(three), registry.champion(three)) == (A, A)
    assert registry.alias(three).withdrawn == (C, B)
    with pytest.raises(UserError, match="no former champion to return to"):
        registry.rollback(three)
    assert registry.champion(three) == A
    registry.promote(three, C)
    assert registry.alias(three) == registry.Alias(digest=C, former=(A,), withdrawn=(B,))
    registry.promote(three, C)
    assert registry.alias(three).former == (A,)
    assert {m.digest: m.role for m in registry.listed(three)} == {A: "former champion", B: "rolled back", C: "champion"}


def test_a_former_champion_that_is_gone_is_not_returned_to(three):
    storage.delete(three, [f"{B}/model.json"])
    with pytest.raises(UserError, match="no longer there"):
        registry.rollback(three)
    assert registry.champion(three) == C and registry.digests(three) == [A, C]


def test_every_change_of_the_alias_is_one_write(three, monkeypatch):
    """A process that dies before it, or readers beside it, find the alias as it was."""
    written = []
    monkeypatch.setattr(storage, "write", lambda url, key, content: written.append((key, content)))
    before = registry.alias(three)
    registry.promote(three, A)
    registry.rollback(three)
    assert [key for key, _ in written] == [registry.CHAMPION] * 2 and registry.alias(three) == before
    for _, content in written:
        registry.Alias.model_validate_json(content)


def test_an_alias_of_before_there_was_a_history(three):
    storage.write(three, registry.CHAMPION, b'{"digest": "%s"}' % A.encode())
    registry.promote(three, B)
    assert registry.rollback(three) == A


def test_a_model_is_found_by_what_it_was_fitted_on_once_it_is_whole(home):
    model = registry.load(str(home))
    assert registry.fitted_on(str(home), "untrained") is None
    registry.write_record(model.url, "fitted", {"at": "2026-11-21T02:00:00+00:00", "rows": 600})
    assert registry.fitted_on(str(home), "untrained") == model.digest and registry.fitted_on(str(home), "other") is None
    (found,) = registry.listed(str(home))
    assert (found.role, found.rows, found.reason) == ("champion", 600, None)


def test_no_models(tmp_path):
    assert registry.digests(str(tmp_path / "none")) == []
    with pytest.raises(UserError, match="no model there"):
        registry.listed(str(tmp_path / "none"))
