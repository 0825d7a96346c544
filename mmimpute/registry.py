"""Models in storage: one directory per model, named by the digest of its content, and the alias of the champion.

    <home>/<digest>/model.json           schema, model config, what it was fitted on
    <home>/<digest>/model.safetensors    weights and standardisation
    <home>/<digest>/{profile,marginals,history,set_aside,fitted,gate,card,evaluation}.json, card.md
    <home>/heads/<digest>/               classes from a model's z0 (see heads.py)
    <home>/champion.json                 which of them production uses, which it used before, which were taken back

Nothing is unpickled: JSON is validated and weights are safetensors, so a model file from outside cannot run code.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, StringConstraints, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_weights
from safetensors.torch import save as save_weights

import mmimpute
from mmimpute.data import storage
from mmimpute.data.schema import CohortSchema
from mmimpute.errors import UserError
from mmimpute.model.budget import Budget
from mmimpute.model.config import ModelConfig
from mmimpute.model.imputer import Imputer
from mmimpute.sizing import modality_configs

CHAMPION = "champion.json"
DIGEST = re.compile(r"[0-9a-f]{32}")
TYPES = TypeAdapter(ModelConfig)
# Building a model makes .96 to .99 times as many values as its state has. A config from outside that asks for far more is refused.
WASTE, SMALL = 4, 1 << 20
Digest = Annotated[str, StringConstraints(pattern=f"^{DIGEST.pattern}$")]


class ModelFile(BaseModel):
    """model.json. fitted_on: fingerprint of shards, spec and settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    version: str
    fitted_on: str
    cohort: CohortSchema
    config: dict[str, Any]


class Alias(BaseModel):
    """champion.json. former: earlier champions, to the last of which a rollback returns; withdrawn: what was rolled back."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    digest: Digest
    former: tuple[Digest, ...] = ()
    withdrawn: tuple[Digest, ...] = ()


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
    file = file_of(module, schema, fitted_on).model_dump_json(indent=1).encode()
    weights = save_weights({name: t.contiguous() for name, t in module.state_dict().items()})
    name = content_digest(file, weights)
    storage.write(home, f"{name}/model.safetensors", weights)
    storage.write(home, f"{name}/model.json", file)
    return name


def file_of(module: Imputer, schema: CohortSchema, fitted_on: str) -> ModelFile:
    return ModelFile(version=mmimpute.__version__, fitted_on=fitted_on, cohort=schema, config=dataclasses.asdict(module.config))


def content_digest(file: bytes, weights: bytes) -> str:
    """What a directory of these two files is named by."""
    return hashlib.blake2b(file + weights, digest_size=16).hexdigest()


def promote(home: str, name: str) -> None:
    """Makes a model the champion: one atomic write, that also keeps which was champion before."""
    now = alias(home)
    if now is None:
        _point(home, Alias(digest=name))
    elif now.digest != name:
        withdrawn = tuple(d for d in now.withdrawn if d != name)
        _point(home, Alias(digest=name, former=(*now.former, now.digest), withdrawn=withdrawn))


def rollback(home: str) -> str:
    """Makes the former champion the champion again, in one atomic write, and returns its digest.

    A second call goes back one further. What was rolled back is not promoted again by a gate. Raises UserError where there is none.
    """
    now = alias(home)
    if now is None or not now.former:
        raise UserError(f"{home}: no former champion to return to; `mmimpute models --model {home}` lists what is there")
    name = now.former[-1]
    if not storage.exists(storage.join(home, name), "model.json"):
        raise UserError(f"{storage.join(home, name)}: the former champion is no longer there")
    withdrawn = (*(d for d in now.withdrawn if d not in (name, now.digest)), now.digest)
    _point(home, Alias(digest=name, former=now.former[:-1], withdrawn=withdrawn))
    return name


def _point(home: str, alias: Alias) -> None:
    storage.write(home, CHAMPION, alias.model_dump_json().encode())


def alias(home: str) -> Alias | None:
    """Which model is the champion, and which were; None where there is none. Raises UserError for an alias that names no digest."""
    try:
        return Alias.model_validate_json(storage.read(home, CHAMPION))
    except FileNotFoundError:
        return None
    except ValidationError:
        place = storage.join(home, CHAMPION)
        raise UserError(f"{place}: not a champion alias; fit a model, or write {{'digest': ...}} anew") from None


def champion(home: str) -> str | None:
    """The digest of the champion, or None. Raises UserError as `alias`."""
    found = alias(home)
    return found and found.digest


def digests(home: str) -> list[str]:
    """Every model of a home."""
    if not storage.is_s3(home) and not storage.local_path(home).exists():  # a local home is made by its first model
        return []
    names = (o.key.removesuffix("/model.json") for o in storage.list_objects(home, "/model.json"))
    return [n for n in names if DIGEST.fullmatch(n)]


def fitted_on(home: str, fingerprint: str) -> str | None:
    """The model that was fitted on just this, and is whole: the record `fitted` is written last."""
    for name in digests(home):
        place = storage.join(home, name)
        if describe(place).fitted_on == fingerprint and storage.exists(place, "fitted.json"):
            return name
    return None


class Listed(NamedTuple):
    """A model of a home. role: champion, former champion, rolled back or challenger; reason: of the gate's decision."""

    digest: str
    fitted: str | None
    rows: int | None
    role: str
    reason: str | None


def listed(home: str) -> list[Listed]:
    """The models of a home, newest first. Raises UserError where there is none."""
    found, now = [], alias(home)
    for name in digests(home):
        place = storage.join(home, name)
        fitted, gate = _facts(place, "fitted"), _facts(place, "gate")
        found.append(Listed(name, fitted.get("at"), fitted.get("rows"), _role(name, now), gate.get("reason")))
    if not found:
        raise UserError(f"{home}: no model there; give the URL that `mmimpute fit --model` wrote to")
    return sorted(found, key=lambda m: m.fitted or "", reverse=True)


def _facts(place: str, name: str) -> dict[str, Any]:
    found = read_record(place, name) or {}
    if not isinstance(found, dict):
        raise UserError(f"{place}/{name}.json: not a record of mmimpute; fit the model again")
    return found


def _role(name: str, now: Alias | None) -> str:
    if now is None:
        return "challenger"
    roles = {"champion": (now.digest,), "rolled back": now.withdrawn, "former champion": now.former}
    return next((role for role, names in roles.items() if name in names), "challenger")


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
    return content_digest(_parse(place)[1], _weights(place))


def load(url: str) -> Model:
    """The model under a URL (see `locate`). Raises UserError where it is damaged or is no model."""
    place = locate(url)
    file, text = _parse(place)
    try:
        weights = _weights(place)
        config = ModelConfig.from_dict(file.config)
        TYPES.validate_python(dataclasses.asdict(config))
        state = load_weights(weights)
        with Budget(WASTE * sum(t.numel() for t in state.values()) + SMALL):
            module = Imputer.from_state(config, state)
        fits = module.config.modalities == modality_configs(file.cohort)
    except (ZeroDivisionError, LookupError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"{place}: a damaged model, or one of another version of mmimpute ({str(error)[:200]})") from None
    if not fits:
        raise UserError(f"{place}: a damaged model: config and schema differ")
    return Model(place, content_digest(text, weights), file, module)


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
    """What is beside the model under this name, or None. Raises UserError where it is no JSON."""
    try:
        return json.loads(storage.read(place, f"{name}.json"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise UserError(f"{place}/{name}.json: not JSON; fit the model again") from None


def marginals(place: str) -> dict[str, dict[str, list[float]]]:
    """What imputing the column mean says (see `profile.marginals`). Raises UserError of a model that was fitted in memory."""
    found = read_record(place, "marginals")
    if found is None:
        raise UserError(f"{place}: fitted in memory, where people have no ids: nothing tells whom it has not seen; use `mmimpute fit`")
    return found
