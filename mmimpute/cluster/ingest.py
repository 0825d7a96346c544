"""Shards into Ray Data: one row per shard where a shard is the unit of work, one row per record where records are."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset

from mmimpute.data import labels, storage
from mmimpute.data.arrow import decode, flat, texts
from mmimpute.data.profile import Statistics, merge, observe, sample_share
from mmimpute.data.schema import CohortSchema
from mmimpute.data.shards import Shard, read_table
from mmimpute.data.split import position
from mmimpute.errors import DataError

Chosen = Callable[[np.ndarray], np.ndarray]
MOST_BLOCKS = 2_000  # of a dataset of shards: enough to balance the work, few enough for the driver


def shard_dataset(shards: Sequence[NamedTuple], together: int = 1, workers: int = 1) -> Dataset:
    """One shard, or one pair of shards, = one row; `together`: most rows of a block, which is one task's."""
    groups = [shards[part] for part in blocks(len(shards), together, workers)]
    return ray.data.from_arrow([pa.table(dict(zip(shards[0]._fields, map(list, zip(*g, strict=True)), strict=True))) for g in groups])


def blocks(count: int, together: int, workers: int) -> Iterator[slice]:
    """Parts of `count` rows, smaller towards the end, so that no worker has a large one left when the others have none."""
    most, start = max(together, -(-count // MOST_BLOCKS)), 0
    while start < count:
        stop = start + min(most, max(1, (count - start) // (2 * workers)))
        yield slice(start, stop)
        start = stop


def shards_of(batch: pa.Table) -> Iterable[Shard]:
    return (Shard(**row) for row in batch.to_pylist())


def profile(
    url: str,
    shards: list[Shard],
    schema: CohortSchema,
    rows: int,
    on_progress: Callable[[int], None] = lambda done: None,
    strict: bool = True,
) -> tuple[Statistics, dict[str, str]]:
    """One streaming pass over the shards: their merged statistics, and the shards set aside with the reason.

    strict: a value that its kind or levels do not allow sets its shard aside.
    Raises DataError where no shard is good.
    """
    share = sample_share(rows, schema.width)

    def observe_batch(batch: pa.Table) -> dict[str, np.ndarray]:
        (shard,) = shards_of(batch)
        try:
            found, error = observe(read_table(url, shard, schema), schema, shard.key, share, strict), None
        except DataError as problem:
            found, error = None, problem
        return {"found": _objects(found), "error": _objects(error)}

    total, errors = None, {}
    results = shard_dataset(shards).map_batches(observe_batch, batch_size=1, batch_format="pyarrow")
    for done, row in enumerate(results.iter_rows(), 1):
        if row["error"] is not None:
            errors[row["error"].shard] = row["error"]
        else:
            total = row["found"] if total is None else merge(total, row["found"])
        on_progress(done)
    if total is None:
        raise next(iter(errors.values()))
    return total, {shard: str(error) for shard, error in errors.items()}


def _objects(value) -> np.ndarray:
    column = np.empty(1, object)
    column[0] = value
    return column


def records(url: str, layouts: list[list[Shard]], schema: CohortSchema) -> Dataset:
    """Records, streamed: `x`, width float32 values, NaN where not observed, and `place`, the hash of the id.

    Behind the values of `x` stand the labels of a contrastive cohort (see `labels.encode`), so that they travel with the record.
    layouts: the shards, in groups of one layout (see `planning.by_layout`).
    """
    filesystem, root = storage.arrow_filesystem(url)

    def to_records(batch: pa.Table) -> dict[str, np.ndarray]:
        x = flat(decode(batch, schema, "being read"))
        if schema.contrastive:
            x = np.concatenate([x, labels.encode(batch, schema.contrastive, "being read")], axis=1)
        return {"x": x, "place": position(batch.column(schema.subject_id))}

    def read(shards: list[Shard]) -> Dataset:
        paths = [f"{root}/{s.key}" for s in shards]
        raw = ray.data.read_parquet(paths, filesystem=filesystem, partitioning=None)
        there = [c for c in schema.contrastive.columns if c in raw.columns()] if schema.contrastive else []
        return raw.select_columns(schema.columns + there).map_batches(to_records, batch_format="pyarrow")

    first, *others = map(read, layouts)
    return first.union(*others) if others else first


def enriched(url: str, keys: list[str], change: Callable[[pa.Table], pa.Table]) -> Dataset:
    """Records of enriched objects, streamed, each block changed."""
    filesystem, root = storage.arrow_filesystem(url)
    stored = ray.data.read_parquet([f"{root}/{key}" for key in keys], filesystem=filesystem, partitioning=None)
    return stored.map_batches(change, batch_format="pyarrow", batch_size=None)


@dataclass(frozen=True)
class Judges:
    """Records in memory: x n x width, NaN where not observed; place, the hash of the id; beside: other columns, as text."""

    x: np.ndarray
    place: np.ndarray
    beside: dict[str, np.ndarray]

    def first(self, most: int) -> "Judges":
        """At most `most`, in the order of their hash, however they came."""
        rows = np.argsort(self.place, kind="stable")[:most]
        return Judges(self.x[rows], self.place[rows], {c: values[rows] for c, values in self.beside.items()})

    def and_also(self, other: "Judges") -> "Judges":
        beside = {c: np.concatenate([values, other.beside[c]]) for c, values in self.beside.items()}
        return Judges(np.concatenate([self.x, other.x]), np.concatenate([self.place, other.place]), beside)


def labelled(url: str, shards: list[Shard], schema: CohortSchema, columns: list[str], most: int) -> Judges:
    """The first `most` of the records of the good shards that have a value in one of these columns, with the columns beside them."""
    has = lambda table: labels.labelled(table, columns)  # noqa: E731
    return judges(url, shards, schema, lambda place: np.ones(len(place), bool), most, columns, has)


def judges(
    url: str,
    shards: list[Shard],
    schema: CohortSchema,
    chosen: Chosen,
    most: int,
    beside: Collection[str] = (),
    among: Callable[[pa.Table], np.ndarray] | None = None,
) -> Judges:
    """The first `most` of the chosen records of the good shards, with what is beside them. chosen: which places; among: which rows."""

    def choose(batch: pa.Table) -> dict[str, np.ndarray]:
        (shard,) = shards_of(batch)
        try:
            table = read_table(url, shard, schema, beside)
            x, place = flat(decode(table, schema, shard.key)), position(table.column(schema.subject_id))
        except DataError:  # told by whoever works on all shards
            return {"found": _objects(none)}
        kept = chosen(place) & (among(table) if among else True)
        return {"found": _objects(Judges(x[kept], place[kept], {c: texts(table, c)[kept] for c in beside}).first(most))}

    none = Judges(np.empty((0, schema.width), np.float32), np.empty(0), {c: np.empty(0, object) for c in beside})
    total = none
    for row in shard_dataset(shards).map_batches(choose, batch_size=1, batch_format="pyarrow").iter_rows():
        total = total.and_also(row["found"]).first(most)
    return total


def statuses(dataset: Dataset, worker: type, arguments: dict, actors: int, gpus: float) -> Iterator[dict]:
    """Runs a worker over the blocks of a dataset and yields the statuses that it makes of them, as they finish."""
    for row in mapped(dataset, worker, arguments, actors, gpus).iter_rows():
        yield row["status"]


def mapped(dataset: Dataset, worker: type, arguments: dict, actors: int, gpus: float) -> Dataset:
    """What a worker makes of the blocks of a dataset; arguments: of its constructor."""
    return dataset.map_batches(
        worker,
        fn_constructor_kwargs=arguments,
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=actors),
        num_cpus=0 if gpus else 1,
        num_gpus=gpus or None,
    )
