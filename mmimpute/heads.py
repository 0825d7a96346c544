"""Heads in storage: classes from a model's z0, one directory per head, named by the digest of its content.

    <home>/heads/<digest>/head.json           the model's digest, targets and their classes, how it was fitted and how good it is
    <home>/heads/<digest>/head.safetensors    the linear maps and, of a full head, its encoder

Nothing is unpickled, and what does not have the digest that it is named by is refused.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_weights
from safetensors.torch import save as save_weights

import mmimpute
from mmimpute.data import storage
from mmimpute.data.schema import PROBABILITY
from mmimpute.errors import UserError
from mmimpute.model.head import Head
from mmimpute.registry import Digest, Model, content_digest, digest_of
from mmimpute.spec import FinetuneSettings

FOLDER = "heads"
PLACE = re.compile(rf"(.+)/{FOLDER}/([0-9a-f]{{32}})")


class Target(BaseModel):
    """A column and its classes; people: with a label; auroc: out of fold, mean over classes against the others.

    curve: labelled people and AUROC of linear heads that learnt from fewer of them, to tell whether more labels would help.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    column: str
    levels: tuple[str, ...]
    people: int
    auroc: float | None
    curve: tuple[tuple[int, float], ...] = ()

    @property
    def binary(self) -> bool:
        return self.levels == ("0", "1")

    @property
    def field(self) -> pa.Field:
        """The column of probabilities: of 1, or of a list of classes, whose names its metadata hold."""
        kind = pa.float32() if self.binary else pa.list_(pa.float32())
        return pa.field(self.column + PROBABILITY, kind, metadata={"levels": ", ".join(self.levels)})


class HeadFile(BaseModel):
    """head.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    version: str
    model: Digest
    targets: tuple[Target, ...]
    settings: FinetuneSettings


class Place(NamedTuple):
    """Where a head is: the home of its model, and its digest."""

    home: str
    digest: str

    @property
    def url(self) -> str:
        return storage.join(self.home, f"{FOLDER}/{self.digest}")


@dataclass(frozen=True)
class LoadedHead:
    file: HeadFile
    module: Head


def save(home: str, model: str, head: Head, targets: tuple[Target, ...], settings: FinetuneSettings) -> str:
    """Writes a head of the model of this digest and returns the head's URL."""
    file = HeadFile(version=mmimpute.__version__, model=model, targets=targets, settings=settings).model_dump_json(indent=1).encode()
    weights = save_weights({name: t.contiguous() for name, t in head.state_dict().items()})
    place = Place(storage.normalise(home), content_digest(file, weights))
    storage.write(place.url, "head.safetensors", weights)
    storage.write(place.url, "head.json", file)
    return place.url


def locate(url: str) -> Place:
    """Raises UserError where a URL is none of a head."""
    found = PLACE.fullmatch(storage.normalise(url).rstrip("/"))
    if found is None:
        raise UserError(f"{url}: not the URL of a head; `mmimpute finetune` prints it: <model>/{FOLDER}/<digest>")
    return Place(*found.groups())


def describe(url: str) -> HeadFile:
    """What a head says of itself. Raises UserError where it is damaged, or where there is none."""
    return _read(locate(url))[0]


def model_of(url: str) -> str:
    """The place of the model that a head belongs to."""
    return storage.join(locate(url).home, describe(url).model)


def check(url: str, model: str) -> None:
    """Raises UserError where the head is of another model than the one under this URL."""
    _check_model(url, describe(url), digest_of(model))


def _check_model(url: str, file: HeadFile, digest: str) -> None:
    if file.model != digest:
        raise UserError(f"{url}: a head of model {file.model[:12]}, not of {digest[:12]}; run `mmimpute finetune` again for this model")


def load(url: str, model: Model) -> LoadedHead:
    """The head, on its model's device. Raises UserError where it is damaged or of another model."""
    place = locate(url)
    file, weights = _read(place)
    _check_model(place.url, file, model.digest)
    try:
        head = Head.from_state(model.module.vae, load_weights(weights))
    except (ValueError, KeyError, IndexError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{place.url}: a damaged head, or one of another version of mmimpute ({str(error)[:200]})") from None
    return LoadedHead(file, head.to(model.module.device))


def _read(place: Place) -> tuple[HeadFile, bytes]:
    try:
        text, weights = (storage.read(place.url, name) for name in ("head.json", "head.safetensors"))
        file = HeadFile.model_validate_json(text)
    except FileNotFoundError:
        raise UserError(f"{place.url}: no head there; `mmimpute finetune` makes one") from None
    except ValidationError as error:
        raise UserError(f"{place.url}/head.json: not a head of this version of mmimpute ({error.error_count()} problems)") from None
    if content_digest(text, weights) != place.digest:
        raise UserError(f"{place.url}: a damaged head: its content does not have the digest that it is named by")
    return file, weights
