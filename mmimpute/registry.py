"""Models in storage: one directory per model, named by the digest of its content, and the alias of the champion.

    <home>/<digest>/model.json           schema, model config, what it was fitted on
    <home>/<digest>/model.safetensors    weights and standardisation
    <home>/<digest>/{profile,marginals,history,set_aside,evaluation}.json
    <home>/champion.json                 which of them production uses

Nothing is unpickled: JSON is validated and weights are safetensors, so a model file from outside cannot run code.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_weights
from safetensors.torch import save as save_weights

import mmimpute
from mmimpute.data import storage
from mmimpute.data.schema import CohortSchema
from mmimpute.errors import UserError
from mmimpute.model.config import ModelConfig
from mmimpute.model.imputer import Imputer

CHAMPION = "champion.json"
DIGEST = re.compile(r"[0-9a-f]{32}")


class ModelFile(BaseModel):
    """model.json. fitted_on: fingerprint of shards, spec and settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    version: str
    fitted_on: str
    cohort: CohortSchema
    config: dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A trained model at its place."""

    url: str
    digest: str
    file: ModelFile
    module: Imputer

    @property
    def schema(self) -> CohortSchema:
        return self.file.cohort

    @property
    def widths(self) -> list[int]:
        return [len(m.features) for m in self.schema.modalities]


def save(home: str, module: Imputer, schema: CohortSchema, fitted_on: str) -> str:
    """Writes a model under its digest and returns that. It is nobody's champion yet."""
    config = dataclasses.asdict(module.config)
    file = ModelFile(version=mmimpute.__version__, fitted_on=fitted_on, cohort=schema, config=config).model_dump_json(indent=1).encode()
    weights = save_weights({name: t.contiguous() for name, t in module.state_dict().items()})
    name = _digest(file, weights)
    storage.write(home, f"{name}/model.safetensors", weights)
    storage.write(home, f"{name}/model.json", file)
    return name


def _digest(file: bytes, weights: bytes) -> str:
    return hashlib.blake2b(file + weights, digest_size=16).hexdigest()


def promote(home: str, name: str) -> None:
    """Makes a model the champion: one atomic write."""
    storage.write(home, CHAMPION, json.dumps({"digest": name}).encode())


def champion(home: str) -> str | None:
    """The digest of the champion, or None. Raises UserError for an alias that names no digest."""
    try:
        found = json.loads(storage.read(home, CHAMPION))
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not DIGEST.fullmatch(str(found.get("digest"))):
        raise UserError(f"{storage.join(home, CHAMPION)}: not a champion alias; fit a model, or write {{'digest': ...}} anew")
    return found["digest"]


def locate(url: str) -> str:
    """The model directory that a URL means: itself, or its champion's. Raises UserError where there is neither."""
    if storage.exists(url, "model.json"):
        return storage.normalise(url)
    name = champion(url)
    if name is None:
        raise UserError(f"{url}: no model there; give the URL that `mmimpute fit --model` wrote to")
    return storage.join(url, name)


def describe(url: str) -> ModelFile:
    """What a model says of itself, without its weights."""
    return _parse(locate(url))[0]


def digest_of(url: str) -> str:
    """The digest of the model under a URL, from its bytes: what an actor that loads it will call it too."""
    place = locate(url)
    return _digest(_parse(place)[1], _weights(place))


def load(url: str) -> Model:
    """The model under a URL (see `locate`). Raises UserError where it is damaged or is no model."""
    place = locate(url)
    file, text = _parse(place)
    try:
        weights = _weights(place)
        module = Imputer.from_state(ModelConfig.from_dict(file.config), load_weights(weights))
    except (ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{place}: a damaged model, or one of another version of mmimpute ({str(error)[:200]})") from None
    if len(module.config.modalities) != len(file.cohort.modalities):
        raise UserError(f"{place}: a damaged model: config and schema differ")
    return Model(place, _digest(text, weights), file, module)


def _weights(place: str) -> bytes:
    try:
        return storage.read(place, "model.safetensors")
    except FileNotFoundError:
        raise UserError(f"{place}: model.safetensors is missing") from None


def _parse(place: str) -> tuple[ModelFile, bytes]:
    try:
        text = storage.read(place, "model.json")
        return ModelFile.model_validate_json(text), text
    except FileNotFoundError:
        raise UserError(f"{place}: model.json is missing") from None
    except ValidationError as error:
        raise UserError(f"{place}/model.json: not a model of this version of mmimpute ({error.error_count()} problems)") from None


def write_record(place: str, name: str, record: Any) -> None:
    """A JSON record beside the model: profile, history and so on."""
    storage.write(place, f"{name}.json", json.dumps(record).encode())


def read_record(place: str, name: str) -> Any | None:
    try:
        return json.loads(storage.read(place, f"{name}.json"))
    except FileNotFoundError:
        return None
