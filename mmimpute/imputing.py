"""One shard imputed: read, decode, predict, enrich, publish. A plain function; the cluster only calls it."""

import io
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import mmimpute
from mmimpute.data import storage
from mmimpute.data.arrow import Imputation, check_subjects, decode, enrich, enriched_schema, flat
from mmimpute.data.schema import check_columns
from mmimpute.data.shards import Shard, open_shard, unreadable
from mmimpute.data.table import COUNTS, digest, output_key
from mmimpute.data.tensors import to_model
from mmimpute.errors import DataError
from mmimpute.registry import Model
from mmimpute.spec import ImputeSettings

BATCH = 8192  # records decoded, predicted and encoded at a time


@dataclass
class Clock:
    """Seconds spent in each phase."""

    read: float = 0.0
    model: float = 0.0
    write: float = 0.0


def settings_digest(settings: ImputeSettings) -> str:
    return digest(settings.model_dump_json(), mmimpute.__version__)


def impute_shard(model: Model, shards: str, shard: Shard, output: str, settings: ImputeSettings) -> dict:
    """Publishes the enriched shard and returns its status: rows, imputed values per modality, seconds.

    A shard that breaks the input contract is not published; its status holds the error.
    """
    start = time.perf_counter()
    key = output_key(shard, model.digest, settings_digest(settings))
    status = {"shard": shard.key, "output": key, "rows": 0, "from_prior": 0, "imputed": {}, "error": None}
    clock = Clock()
    try:
        content = _enriched_bytes(model, shards, shard, key, settings, status, clock)
    except DataError as error:
        return status | {"error": str(error), "rows": 0, "seconds": _seconds(clock, start)}
    began = time.perf_counter()
    storage.write(output, key, content)
    clock.write += time.perf_counter() - began
    return status | {"seconds": _seconds(clock, start)}


def _seconds(clock: Clock, start: float) -> dict[str, float]:
    return {"read": clock.read, "model": clock.model, "write": clock.write, "all": time.perf_counter() - start}


def _enriched_bytes(model: Model, shards: str, shard: Shard, key: str, settings: ImputeSettings, status: dict, clock: Clock) -> bytes:
    schema, began = model.schema, time.perf_counter()
    file = open_shard(shards, shard)
    check_columns(schema, file.schema_arrow, shard.key)
    out = enriched_schema(schema, file.schema_arrow, settings.interval > 0, settings.draws, settings.latent)
    metadata = {
        "mmimpute.version": mmimpute.__version__,
        "mmimpute.model": model.digest,
        "mmimpute.settings": settings_digest(settings),
        "mmimpute.input": shard.key,
        "mmimpute.input_etag": shard.etag,
    }
    out = out.with_metadata({**(out.metadata or {}), **metadata})
    _check_ids(file, schema.subject_id, shard.key)
    clock.read += time.perf_counter() - began
    generator = torch.Generator(model.module.device).manual_seed(int(key[-40:-25], 16) + settings.seed)
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, out, compression="zstd", write_page_checksum=True) as writer:
        for batch in _batches(file, shard.key, clock):
            began = time.perf_counter()
            records = decode(batch, schema, shard.key)
            clock.read += time.perf_counter() - began
            began = time.perf_counter()
            imputed, latent = predict(model, records, settings, generator)
            clock.model += time.perf_counter() - began
            began = time.perf_counter()
            writer.write_batch(enrich(batch, out, schema, records, imputed, latent))
            clock.write += time.perf_counter() - began
            _count(records, status)
        # The counts travel with the shard: whoever commits it later need not have seen it made.
        counts = {name: status[name] for name in ("rows", "from_prior", "imputed")}
        writer.add_key_value_metadata({COUNTS: json.dumps(counts)})
    return sink.getvalue()


def _check_ids(file: pq.ParquetFile, column: str, key: str) -> None:
    try:
        check_subjects(file.read([column]).column(0), column, key)
    except (pa.ArrowInvalid, OSError) as error:
        raise unreadable(key, error) from None


def _batches(file: pq.ParquetFile, key: str, clock: Clock) -> Iterator[pa.RecordBatch]:
    batches = file.iter_batches(BATCH)
    while True:
        began = time.perf_counter()
        try:
            batch = next(batches, None)
        except (pa.ArrowInvalid, OSError) as error:
            raise unreadable(key, error) from None
        clock.read += time.perf_counter() - began
        if batch is None:
            return
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


def _count(records: Mapping[str, np.ndarray], status: dict) -> None:
    missing = {name: np.isnan(x) for name, x in records.items()}
    status["rows"] += len(next(iter(missing.values())))
    status["from_prior"] += int(np.logical_and.reduce([m.all(1) for m in missing.values()]).sum())
    for name, m in missing.items():
        entry = status["imputed"].setdefault(name, {"rows": 0, "values": 0})
        entry["rows"] += int(m.any(1).sum())
        entry["values"] += int(m.sum())
