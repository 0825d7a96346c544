"""Models in storage: what is loaded is what was saved, and nothing else is loaded."""

import json
import shutil

import pytest
import torch

from mmimpute import registry
from mmimpute.data import storage
from mmimpute.errors import UserError


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


@pytest.mark.parametrize("alias", ['{"digest": "../../etc"}', "[]", "{", '{"digest": 7}'])
def test_an_alias_names_a_digest(alias, home):
    storage.write(str(home), registry.CHAMPION, alias.encode())
    with pytest.raises(UserError, match="not a champion alias"):
        registry.load(str(home))
