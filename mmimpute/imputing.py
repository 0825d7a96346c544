"""Shards imputed: fetch, decode, predict, enrich, publish. Plain functions; the cluster only calls them.

While one shard is computed the next is fetched and the last is published, so that a GPU does not wait for the network.
Of what is computed only a batch of rows is in memory; a large shard and a large result stand in the temp folder.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import mmimpute
from mmimpute.data import storage
from mmimpute.data.arrow import Imputation, check_subjects, column_of, decode, enrich, enriched_schema, flat
from mmimpute.data.schema import check_columns, is_list, storage_type
from mmimpute.data.shards import IN_MEMORY, Shard, check_values, open_shard, unreadable
from mmimpute.data.table import COUNTS, digest, output_key, published_counts
from mmimpute.data.tensors import to_model
from mmimpute.errors import DataError
from mmimpute.heads import LoadedHead
from mmimpute.registry import Model
from mmimpute.spec import ImputeSettings

BATCH = 8192  # records decoded, predicted and encoded at a time,
BATCH_VALUES = 4 << 20  # or fewer of wide ones
TRIES = 3  # of a shard whose worker died over it: out of memory, or a crash in a library
PHASES = ("read", "model", "write")


def settings_digest(settings: ImputeSettings) -> str:
    return digest(settings.model_dump_json(exclude_none=True), mmimpute.__version__)


@dataclass
class Work:
    """One shard on its way. file: the input, then the enriched shard."""

    shard: Shard
    key: str
    file: pq.ParquetFile | IO[bytes] | None = None
    status: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.status = {"shard": self.shard.key, "output": self.key, "error": None, "tries": 1, "seconds": dict.fromkeys(PHASES, 0.0)}
        self.status |= {"rows": 0, "from_prior": 0, "imputed": {}}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.status["seconds"][name] += time.perf_counter() - began

    def fail(self, error: object) -> None:
        self.file = None
        self.status |= {"error": str(error), "rows": 0, "from_prior": 0, "imputed": {}}


@dataclass(frozen=True)
class ShardImputer:
    """What all shards of a run have in common. head: the one that the settings name."""

    model: Model
    shards: str
    output: str
    settings: ImputeSettings
    head: LoadedHead | None = None

    def impute(self, todo: Sequence[Shard], begin: Callable[[str], int] = lambda key: 0) -> Iterator[dict]:
        """Publishes the enriched shards and yields a status of each: rows, imputed values per modality, seconds.

        A shard that breaks the input contract is not published; its status holds the error. begin is called before a
        shard is computed and says in how many earlier tries the worker died; a shard that went so far is not tried again.
        """
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            last: Future[dict] | None = None
            ahead = reader.submit(self._fetch, todo[0])
            for following in [*todo[1:], None]:
                work = ahead.result()
                ahead = following and reader.submit(self._fetch, following)
                deaths = begin(work.key)
                if last and deaths:  # what is being published must not die with this one
                    yield last.result()
                    last = None
                self._compute(work, deaths)
                if last:
                    yield last.result()
                last = writer.submit(self._publish, work)
            yield last.result()

    def _fetch(self, shard: Shard) -> Work:
        work = Work(shard, output_key(shard, self.model.digest, settings_digest(self.settings)))
        with work.phase("read"):
            try:
                work.file = open_shard(self.shards, shard)
            except DataError as error:
                work.fail(error)
        return work

    def _compute(self, work: Work, deaths: int) -> None:
        """Turns the input into the enriched shard, unless an earlier try has published that or too many have failed."""
        work.status["tries"] += deaths
        if deaths and (counts := published_counts(self.output, work.key)):
            work.file = None
            work.status |= counts
        elif deaths >= TRIES:
            work.fail(DataError(work.shard.key, None, f"its worker died {deaths} times", "a shard that fits into memory", _AFTER_DEATH))
        elif work.file:
            try:
                work.file = self._enriched(work)
            except DataError as error:
                work.fail(error)
            except OSError as error:  # of the temp folder
                work.fail(unreadable(work.shard.key, error))

    def _publish(self, work: Work) -> dict:
        if work.file:
            with work.phase("write"), work.file:
                storage.write(self.output, work.key, work.file)
        return work.status

    def _enriched(self, work: Work) -> IO[bytes]:
        """The enriched shard, from its beginning; the caller closes it."""
        schema, settings, file = self.model.schema, self.settings, work.file
        with work.phase("read"):
            check_columns(schema, file.schema_arrow, work.shard.key)
            _check_ids(file, schema.subject_id, work.shard.key)
            _check_targets(self.head, file.schema_arrow, work.shard.key)
        out = enriched_schema(schema, file.schema_arrow, settings.interval > 0, settings.draws, settings.latent)
        for target in self.head.file.targets if self.head else ():
            out = out.append(target.field)
        with ExitStack() as stack:
            sink = stack.enter_context(tempfile.SpooledTemporaryFile(IN_MEMORY))
            self._write(work, sink, out.with_metadata({**(out.metadata or {}), **self._lineage(work.shard)}))
            stack.pop_all()
        sink.seek(0)
        return sink

    def _write(self, work: Work, sink: IO[bytes], out: pa.Schema) -> None:
        schema, settings, key = self.model.schema, self.settings, work.shard.key
        generator = torch.Generator(self.model.module.device).manual_seed(int(work.key[-40:-25], 16) + settings.seed)
        # A dictionary of floats is built only to be thrown away: 1.6 s for 300 MB of them, 0.9 s without.
        worded = [f.name for f in out if not is_list(storage_type(f.type)) and not pa.types.is_floating(f.type)]
        with pq.ParquetWriter(sink, out, compression="zstd", use_dictionary=worded, write_page_checksum=True) as writer:
            for batch in _batches(work, min(BATCH, max(1, BATCH_VALUES // schema.width))):
                with work.phase("read"):
                    records = decode(batch, schema, key)
                with work.phase("model"):
                    imputed, latent = predict(self.model, records, settings, generator)
                    chances = classify(self.model, self.head, records) if self.head else []
                with work.phase("write"):
                    writer.write_batch(enrich(batch, out, schema, records, imputed, latent, chances))
                _count(records, work.status)
            # The counts travel with the shard: whoever commits it later need not have seen it made.
            counts = {name: work.status[name] for name in ("rows", "from_prior", "imputed")}
            writer.add_key_value_metadata({COUNTS: json.dumps(counts)})

    def _lineage(self, shard: Shard) -> dict[str, str]:
        return {
            "mmimpute.version": mmimpute.__version__,
            "mmimpute.model": self.model.digest,
            "mmimpute.settings": settings_digest(self.settings),
            "mmimpute.input": shard.key,
            "mmimpute.input_etag": shard.etag,
        }


_AFTER_DEATH = "split the shard or give the workers more memory; if it is small, it crashes a library: report it"


def impute_shard(model: Model, shards: str, shard: Shard, output: str, settings: ImputeSettings) -> dict:
    """One shard alone; see `ShardImputer.impute`."""
    (status,) = ShardImputer(model, shards, output, settings).impute([shard])
    return status


def _check_targets(head: LoadedHead | None, arrow: pa.Schema, key: str) -> None:
    """Raises DataError where a shard has a column that a head writes."""
    taken = [t.field.name for t in head.file.targets if t.field.name in arrow.names] if head else []
    if taken:
        raise DataError(key, taken[0], "a column that classification writes", "raw records", "drop it, or leave enriched shards out")


def _check_ids(file: pq.ParquetFile, column: str, key: str) -> None:
    try:
        check_subjects(file.read([column]).column(0), column, key)
    except (pa.ArrowInvalid, OSError) as error:
        raise unreadable(key, error) from None


def _batches(work: Work, rows: int) -> Iterator[pa.RecordBatch]:
    batches = work.file.iter_batches(rows)
    while True:
        with work.phase("read"):
            try:
                batch = next(batches, None)
            except (pa.ArrowInvalid, OSError) as error:
                raise unreadable(work.shard.key, error) from None
            if batch is None:
                return
            check_values(batch, work.shard.key)
        yield batch


def predict(
    model: Model, records: Mapping[str, np.ndarray], settings: ImputeSettings, generator: torch.Generator
) -> tuple[dict[str, Imputation], np.ndarray | None]:
    """What the model says of every value of the imputed modalities, and the shared latent where it is wanted."""
    x, observed = to_model(flat(records), model.widths, generator.device)
    with torch.inference_mode():
        predicted = model.module.predict(x, observed, settings.interval or None)
        draws = model.module.impute([(v, 1) for v in x], settings.draws, generator) if settings.draws else [None] * len(x)
    names = [m.name for m in model.schema.modalities]
    lower, upper = (bounds or [None] * len(x) for bounds in (predicted.lower, predicted.upper))
    imputed = {
        name: Imputation(*(None if t is None else t.cpu().numpy() for t in parts))
        for name, *parts in zip(names, predicted.mean, predicted.std, lower, upper, draws, strict=True)
    }
    return imputed, predicted.z0_BL.cpu().numpy() if settings.latent else None


def classify(model: Model, head: LoadedHead, records: Mapping[str, np.ndarray]) -> list[pa.Array]:
    """Probabilities of every target: of 1, or a list of those of all classes."""
    x, observed = to_model(flat(records), model.widths, model.module.device)
    said = [p.cpu().numpy() for p in head.module.predict(model.module.vae, x, observed)]
    return [column_of(p[:, 1] if t.binary else p, t.field.type) for t, p in zip(head.file.targets, said, strict=True)]


def _count(records: Mapping[str, np.ndarray], status: dict) -> None:
    missing = {name: np.isnan(x) for name, x in records.items()}
    status["rows"] += len(next(iter(missing.values())))
    status["from_prior"] += int(np.logical_and.reduce([m.all(1) for m in missing.values()]).sum())
    for name, m in missing.items():
        entry = status["imputed"].setdefault(name, {"rows": 0, "values": 0})
        entry["rows"] += int(m.any(1).sum())
        entry["values"] += int(m.sum())
