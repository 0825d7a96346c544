"""A study read from storage: people with their outcome, and covariates completed here or as the enriched table has them.

Shape suffixes: N people, D features, P covariates, M draws.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from mmimpute.data.arrow import decode, flat
from mmimpute.data.schema import CohortSchema, Place, is_text, place_of, places, value_type
from mmimpute.data.shards import Shard, list_shards, open_shard
from mmimpute.data.table import committed, published
from mmimpute.data.tensors import to_model
from mmimpute.downstream import Study
from mmimpute.errors import UserError
from mmimpute.outcomes import Label, Outcome, Survival
from mmimpute.registry import Model
from mmimpute.verifying import cells

MOST_LABELLED, MOST_FOLLOWED = 20_000, 5_000  # people of a study: logistic regressions, Cox regressions
MOST_COVARIATES = 300  # 20 draws of them for 20,000 people are 1 GB
BATCH_VALUES = 4 << 20  # values drawn at a time


class Question(NamedTuple):
    """What is studied. event: its column, 0/1, or the value `equals` in it; time: until when people were followed, None for a label.

    features: covariates by name, none: every number; exclude: modalities or features that must not tell of the outcome.
    """

    event: str
    equals: str | None = None
    time: str | None = None
    features: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        return [self.event] + ([self.time] if self.time else [])

    @property
    def most(self) -> int:
        return MOST_FOLLOWED if self.time else MOST_LABELLED


def covariates(schema: CohortSchema, asked: Question) -> dict[str, Place]:
    """The covariates' places. Raises UserError: unknown or categorical, excluded as well, too many, or an outcome that the model reads."""
    known = places(schema)
    if read := [c for c in asked.columns if c in schema.columns]:
        raise UserError(
            f"outcome: the model reads {read[0]!r}, so its imputations know it; name it under `outcomes` in the spec and fit again"
        )
    hidden = _excluded(known, asked.exclude)
    for name in asked.features:
        place = place_of(known, name, "--features")
        if place.feature.kind == "categorical" or name in hidden:
            why = "excluded" if name in hidden else "categorical; covariates are numbers"
            raise UserError(f"--features: {name!r} is {why}")
    chosen = asked.features or [
        n for n, p in known.items() if n not in hidden and p.feature.kind != "categorical" and not p.modality.structured
    ]
    if len(chosen) > MOST_COVARIATES:
        raise UserError(
            f"{len(chosen):,} covariates, more than {MOST_COVARIATES}: name those to use with --features, or --exclude modalities"
        )
    return {name: known[name] for name in chosen}


def _excluded(known: dict[str, Place], names: Iterable[str]) -> set[str]:
    """Features that are excluded, by modality or by name. Raises UserError for what is neither."""
    modalities = {p.modality.name for p in known.values()}
    alone = {name for name in names if name not in modalities and place_of(known, name, "--exclude")}
    return alone | {name for name, p in known.items() if p.modality.name in names}


def outcome_of(table: pa.Table, asked: Question) -> Outcome:
    """The outcome of people who all have one (see `_people`). Raises UserError as `_event`, and for negative times."""
    event = _event(table.column(asked.event), asked) == 1
    if asked.time is None:
        return Label(event)
    time = _numbers(table.column(asked.time))
    if (time < 0).any():
        raise UserError(f"outcome: column {asked.time!r} holds negative times")
    return Survival(time, event)


def _event(column: pa.ChunkedArray, asked: Question) -> np.ndarray:
    """1, 0 or NaN. Raises UserError for text, and for numbers other than 0 and 1, where `equals` is not given."""
    if is_text(value_type(column.type)):
        if asked.equals is None:
            raise UserError(f"outcome: column {asked.event!r} is text; say with --equals which one is the event")
        return _numbers(pc.equal(pc.cast(column, pa.large_string()), asked.equals))
    values = _numbers(column)
    if asked.equals is not None:
        return np.where(np.isnan(values), np.nan, values == _number(asked.equals, asked.event))
    if np.setdiff1d(values[~np.isnan(values)], (0, 1)).size:
        raise UserError(f"outcome: column {asked.event!r} holds others than 0 and 1; say with --equals which one is the event")
    return values


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return pc.cast(column, pa.float64(), safe=False).to_numpy()


def _number(text: str, column: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--equals: column {column!r} holds numbers, {text!r} is none") from None


def _people(url: str, shards: Sequence[Shard], asked: Question, columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    """Shard by shard the people who have the outcome, until there are enough."""
    left = asked.most
    for shard in shards:
        if left <= 0:
            return
        file = open_shard(url, shard)
        if absent := [c for c in [*asked.columns, *columns] if c not in file.schema_arrow.names]:
            raise UserError(f"shard {shard.key} has no column {absent[0]!r}")
        table = file.read(list(dict.fromkeys([*asked.columns, *columns])))
        known = ~np.isnan(_event(table.column(asked.event), asked))
        if asked.time:
            known &= ~np.isnan(_numbers(table.column(asked.time)))
        table = table.filter(pa.array(known)).slice(0, left)
        left -= len(table)
        if len(table):
            yield shard.key, table


def from_shards(model: Model, url: str, asked: Question, draws: int, seed: int = 0) -> Study:
    """People of the shards, in their order until there are enough; the model completes them without what is excluded.

    Raises UserError as `covariates` and `outcome_of`, and where a shard lacks a column; DataError as `decode`.
    """
    schema, known = model.schema, places(model.schema)
    chosen = covariates(schema, asked)
    x, outcomes = [], []
    for key, table in _people(url, list_shards(url), asked, schema.columns):
        x.append(flat(decode(table, schema, key)))
        outcomes.append(table.select(asked.columns))
    if not x:
        raise UserError(f"{url}: nobody has a value of {asked.columns}")
    x_ND, at = np.concatenate(x), [p.flat for p in chosen.values()]
    x_ND[:, [known[n].flat for n in _excluded(known, asked.exclude)]] = np.nan
    completed_by = completed(model, x_ND, at, draws, seed)
    return _study(chosen, x_ND[:, at].astype(float), *completed_by, outcomes, asked)


def completed(model: Model, x_ND: np.ndarray, at: Sequence[int], draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictive means, N x P, and draws, M x N x P, of some of the features. Features of modalities not imputed stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    size = max(1, BATCH_VALUES // (draws * x_ND.shape[1]))
    fixed = np.array([not p.modality.impute for p in places(model.schema).values()])[at]
    means, drawn = [], []
    with torch.inference_mode():
        for start in range(0, len(x_ND), size):
            part = x_ND[start : start + size]
            x, observed = to_model(part, model.widths)
            means.append(torch.cat(model.module.predict(x, observed).mean, 1).numpy()[:, at])
            found = torch.cat(model.module.impute([(v, 1) for v in x], draws, generator), 2).numpy()[..., at]
            drawn.append(np.where(fixed, part[:, at], found))
            means[-1] = np.where(fixed, part[:, at], means[-1])
    return np.concatenate(means).astype(float), np.concatenate(drawn, 1).astype(float)


def from_table(schema: CohortSchema, url: str, asked: Question) -> Study:
    """People of the enriched table's current version, in the order of its objects until there are enough.

    Raises UserError as `from_shards`, where the table has no draws, and where something is excluded: what is written knows it.
    """
    if asked.exclude:
        raise UserError("--exclude: what stands in the table was imputed from that too; give --shards, and it is imputed anew")
    chosen = covariates(schema, asked)
    keys = committed(url).keys
    suffixes = {True: ("", "__imputed", "__draws"), False: ("",)}
    columns = list(dict.fromkeys(p.column + s for p in chosen.values() for s in suffixes[p.modality.impute]))
    found, outcomes = [], []
    for _, table in _people(url, sorted(o for o in published(url) if o.key in keys), asked, columns):
        parts = zip(*(_written(table, p) for p in chosen.values()), strict=True)
        found.append([np.stack(part, -1) for part in parts])
        outcomes.append(table.select(asked.columns))
    if not found:
        raise UserError(f"{url}: nobody has a value of {asked.columns}")
    draws = max(len(drawn) for _, _, drawn in found)
    if any(len(drawn) not in (1, draws) for _, _, drawn in found) or draws < 2:
        raise UserError(f"{url}: not every shard was imputed with the same number of draws, two or more; impute with --draws 20")
    observed, imputed = (np.concatenate([part[i] for part in found]) for i in (0, 1))
    drawn = np.concatenate([np.broadcast_to(d, (draws, *d.shape[1:])) for _, _, d in found], 1)
    return _study(chosen, observed, imputed, drawn, outcomes, asked)


def _written(table: pa.Table, place: Place) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One covariate as observed and as imputed, (N,), and its draws, M x N; M = 1 where nothing of it was missing."""
    column = table.column(place.column).combine_chunks()
    width = len(place.modality.features) if place.modality.layout == "list" else 1
    observed = cells(column, width).values[:, place.at]
    if not place.modality.impute:
        return observed, observed, observed[None]
    imputed, draws = (table.column(place.column + s).combine_chunks() for s in ("__imputed", "__draws"))
    mean = np.where(imputed.is_valid(), cells(imputed, width).values[:, place.at], observed)
    lacking = draws.is_valid().to_numpy(zero_copy_only=False)
    if not lacking.any():
        return observed, mean, observed[None]
    drawn = cells(draws.flatten(), width).values[:, place.at].reshape(lacking.sum(), -1)
    every = np.repeat(observed[None], drawn.shape[1], 0)
    every[:, lacking] = drawn.T
    return observed, mean, every


def _study(
    chosen: Iterable[str], observed: np.ndarray, imputed: np.ndarray, draws: np.ndarray, outcomes: list[pa.Table], asked: Question
) -> Study:
    """People who lack a covariate that is not imputed are left out."""
    whole = ~np.isnan(imputed).any(1)
    outcome = outcome_of(pa.concat_tables(outcomes, promote_options="permissive"), asked)
    return Study(tuple(chosen), observed[whole], imputed[whole], draws[:, whole], outcome.take(np.flatnonzero(whole)))
