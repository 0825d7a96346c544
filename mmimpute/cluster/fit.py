"""Training with Ray Train: Ray Data streams the shards to the ranks, DDP averages their gradients.

A rank keeps its share of the records when that fits into memory, and streams them again in every epoch when it does
not: an epoch over a Ray Data iterator costs seconds even for a small cohort.
"""

import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from pyarrow.fs import FileType
from ray import train
from ray.train.torch import TorchTrainer, get_device, prepare_model
from ray.util.queue import Empty, Queue

from mmimpute.cluster import runtime
from mmimpute.cluster.ingest import records
from mmimpute.data import storage
from mmimpute.data.schema import CohortSchema
from mmimpute.data.shards import Shard
from mmimpute.data.tensors import split
from mmimpute.model.config import ModelConfig
from mmimpute.model.standardise import FeatureStatistics
from mmimpute.model.vae import MultiModalVAE
from mmimpute.spec import FitSettings
from mmimpute.training import OptimiserSettings, Schedule, Training, schedule, summarise

STATE = "state.pt"
SECONDS_BETWEEN_CHECKPOINTS = 20.0
TUNE_BATCH = 1024
TUNE_BYTES = 64 << 20  # a larger tune split is judged on its first part
SHUFFLED_BATCHES = 16  # held for shuffling while streaming
MOST_THREADS = 4  # of a CPU worker
RESTARTS = 3  # of the workers, after a crash
Progress = Callable[[dict], None]


@dataclass(frozen=True)
class Job:
    """All that a training run depends on. `name` makes a second run resume the first."""

    name: str
    shards_url: str
    layouts: list[list[Shard]]
    schema: CohortSchema
    config: ModelConfig
    statistics: dict[str, dict[str, np.ndarray]]
    rows: int
    settings: FitSettings


@dataclass(frozen=True)
class Fitted:
    module: MultiModalVAE
    history: list[dict[str, float]]


def fit(job: Job, home: str, on_epoch: Progress = lambda epoch: None) -> Fitted:
    """Trains, or resumes training, and returns the best averaged weights and one record per epoch.

    Checkpoints stand under `<home>/_training/<name>` until they are cleared.
    """
    workers = job.settings.workers or max(1, runtime.gpus())
    filesystem, place = storage.arrow_filesystem(storage.join(home, "_training"))
    filesystem.create_dir(place)
    queue = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=_loop_config(job, workers) | {"queue": queue},
        datasets={name: records(job.shards_url, job.layouts, job.schema, name) for name in ("train", "tune")},
        dataset_config=train.DataConfig(execution_options=_ordered()),
        scaling_config=train.ScalingConfig(num_workers=workers, use_gpu=_gpus(job) > 0, resources_per_worker=_resources(job, workers)),
        run_config=train.RunConfig(
            name=job.name,
            storage_path=place,
            storage_filesystem=filesystem,
            checkpoint_config=train.CheckpointConfig(num_to_keep=1),
            failure_config=train.FailureConfig(max_failures=RESTARTS),
        ),
    )
    with _forwarded(queue, on_epoch):
        result = trainer.fit()
    state = _read_state(result.checkpoint)
    module = MultiModalVAE.from_state(job.config, state["best"]["weights"])
    return Fitted(module, state["best"]["history"])


def clear(home: str, name: str) -> None:
    """Removes a finished run's checkpoints."""
    filesystem, place = storage.arrow_filesystem(storage.join(home, "_training"))
    if filesystem.get_file_info(f"{place}/{name}").type == FileType.Directory:
        filesystem.delete_dir(f"{place}/{name}")


def _loop_config(job: Job, workers: int) -> dict[str, Any]:
    plan = schedule(job.rows // workers, job.settings.batch_size, job.settings.epochs)
    return {
        "config": asdict(job.config),
        "statistics": job.statistics,
        "plan": asdict(plan),
        "settings": asdict(OptimiserSettings(seed=job.settings.seed)),
        "patience": job.settings.patience or plan.patience,
        "cache_share": job.settings.cache_share,
        "widths": [len(m.features) for m in job.schema.modalities],
    }


def _gpus(job: Job) -> float:
    return job.settings.gpus_per_worker or (1 if runtime.gpus() else 0)


def _resources(job: Job, workers: int) -> dict[str, float]:
    """Workers that held every CPU would wait for ever for the tasks that read their data.

    Ray gives torch as many threads as a worker has CPUs. More threads than free cores wait for each other at every
    small product: two on a busy 2-core machine took 296 s for the epochs that one did in 54.
    """
    share = (runtime.cpus() - 1) / workers
    cpus = float(min(MOST_THREADS, runtime.cpus_per_node(), int(share))) if share >= 1 else max(share, 0.5 / workers)
    return {"CPU": cpus} | ({"GPU": _gpus(job)} if _gpus(job) else {})


def _ordered() -> ray.data.ExecutionOptions:
    return ray.data.ExecutionOptions(preserve_order=True)


@contextmanager
def _forwarded(queue: Queue, on_epoch: Progress) -> Iterator[None]:
    """Passes what the workers put into the queue on to a callback, in a thread, while the driver waits."""
    done = threading.Event()

    def forward() -> None:
        while not done.is_set() or not queue.empty():
            try:
                on_epoch(queue.get(timeout=0.5))
            except Empty:
                continue

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)
        queue.shutdown()


def load(shard: ray.data.DataIterator, limit: float) -> tuple[torch.Tensor, bool]:
    """This rank's records up to `limit` bytes, and whether those are all.

    In the order of their hash, so that nothing depends on the order in which they came.
    """
    pieces, places, size, whole = [], [], 0, True
    for batch in shard.iter_batches(batch_format="numpy", batch_size=None):
        if pieces and size + batch["x"].nbytes > limit:
            whole = False
            break
        pieces.append(batch["x"])
        places.append(batch["place"])
        size += batch["x"].nbytes
    order = np.argsort(np.concatenate(places), kind="stable")
    return torch.from_numpy(np.concatenate(pieces)[order]), whole


class RankRecords:
    """This rank's training records: in memory where they fit into `limit` bytes, else streamed anew every epoch."""

    def __init__(self, shard: ray.data.DataIterator, device: torch.device, limit: float):
        self.shard, self.device = shard, device
        x_ND, whole = load(shard, limit)
        self.x_ND = x_ND if whole else None

    def epoch(self, seed: int, size: int, steps: int) -> Iterator[torch.Tensor]:
        """`steps` shuffled batches of `size` records."""
        if self.x_ND is None:
            yield from self._stream(seed, size, steps)
            return
        order = torch.randperm(len(self.x_ND), generator=torch.Generator().manual_seed(seed))
        while len(order) < steps * size:  # a rank may hold a few records fewer than planned
            order = torch.cat([order, order])
        for step in range(steps):
            yield self.x_ND[order[step * size : (step + 1) * size]].to(self.device)

    def _stream(self, seed: int, size: int, steps: int) -> Iterator[torch.Tensor]:
        left = steps
        options = {"batch_size": size, "local_shuffle_buffer_size": SHUFFLED_BATCHES * size, "local_shuffle_seed": seed}
        while left:
            for batch in self.shard.iter_torch_batches(**options):
                yield batch["x"].to(self.device)
                left -= 1
                if not left:
                    return


def train_loop(loop: dict[str, Any]) -> None:
    """One rank: load or resume, then per epoch train, tune, report, until the tune loss stops falling."""
    context = train.get_context()
    training, plan, best = _prepare(loop, context.get_world_rank())
    if checkpoint := train.get_checkpoint():
        state = _read_state(checkpoint)
        training.load_state_dict(state["training"])
        best = state["best"]
    device = training.device
    share = loop["cache_share"] * psutil.virtual_memory().total / context.get_local_world_size()
    data = RankRecords(train.get_dataset_shard("train"), device, share)
    tune = load(train.get_dataset_shard("tune"), TUNE_BYTES)[0].to(device)
    reporter = Reporter(training, best, loop["queue"] if context.get_world_rank() == 0 else None)
    if best["stopped"]:
        reporter.report({}, last=True)
    while not best["stopped"]:
        epoch, began = len(best["history"]), time.perf_counter()
        seed = loop["settings"]["seed"] * 100_003 + epoch
        steps = [training.step(*split(x, loop["widths"])) for x in data.epoch(seed, plan.batch, plan.steps_per_epoch)]
        tuned = summarise(_all_reduce(training.tune(split(x, loop["widths"]) for x in tune.split(TUNE_BATCH)), device))
        seconds = time.perf_counter() - began
        rows = plan.steps_per_epoch * plan.batch * context.get_world_size()
        record = {"epoch": epoch + 1, "epochs": plan.epochs, "seconds": seconds, "rows_per_second": rows / seconds}
        record |= {name: sum(s[name] for s in steps) / len(steps) for name in ("elbo", "impute")}
        record |= {f"tune_{name}": value for name, value in tuned.items()}
        _judge(best, record, training, loop["patience"], plan)
        if best["stopped"]:
            _fit_prior(best, training, data.epoch(0, plan.batch, plan.steps_per_epoch), loop["widths"])
        reporter.report(record, last=best["stopped"])


def _prepare(loop: dict[str, Any], rank: int) -> tuple[Training, Schedule, dict[str, Any]]:
    torch.manual_seed(loop["settings"]["seed"])  # equal weights on every rank before DDP broadcasts them
    statistics = {name: FeatureStatistics(**arrays) for name, arrays in loop["statistics"].items()}
    model = MultiModalVAE(ModelConfig.from_dict(loop["config"]), statistics).to(get_device())
    plan = Schedule(**loop["plan"])
    settings = OptimiserSettings(**loop["settings"])
    training = Training(model, settings, plan.total_steps, lambda m: prepare_model(m, move_to_device=False), rank)
    return training, plan, {"loss": math.inf, "epoch": 0, "weights": {}, "history": [], "stopped": False}


def _all_reduce(sums: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sums over all ranks."""
    if not torch.distributed.is_initialized():
        return sums
    total = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return dict(zip(sums, total.tolist(), strict=True))


def _judge(best: dict[str, Any], record: dict, training: Training, patience: int, plan: Schedule) -> None:
    """Keeps the best averaged weights; equal on every rank, as the tune loss is."""
    best["history"].append(record)
    if record["tune_loss"] < best["loss"]:
        best |= {"loss": record["tune_loss"], "epoch": record["epoch"], "weights": _weights(training)}
    best["stopped"] = record["epoch"] >= plan.epochs or record["epoch"] - best["epoch"] >= patience


def _weights(training: Training) -> dict[str, torch.Tensor]:
    return {name: t.detach().cpu().clone() for name, t in training.average.state_dict().items()}


def _fit_prior(best: dict[str, Any], training: Training, batches: Iterator[torch.Tensor], widths: list[int]) -> None:
    """p(z0) of the best weights takes the moments of the posteriors of all ranks' records (see `model.prior`)."""
    training.average.load_state_dict(best["weights"])
    total_MM = sum(training.average.posterior_moments(*split(x, widths)) for x in batches)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total_MM)
    training.average.prior.fit(total_MM)
    best["weights"] = _weights(training)


class Reporter:
    """Metrics at every epoch; from rank 0 now and then a checkpoint of model, optimiser, schedule and best weights."""

    def __init__(self, training: Training, best: dict[str, Any], queue: Queue | None):
        self.training, self.best, self.queue, self.saved = training, best, queue, time.monotonic()

    def report(self, record: dict[str, float], last: bool) -> None:
        """Every rank must call this equally often: it is a barrier."""
        if self.queue is None:
            train.report(record)
            return
        if record:
            self.queue.put(record)
        if not last and time.monotonic() - self.saved < SECONDS_BETWEEN_CHECKPOINTS:
            train.report(record)
            return
        with tempfile.TemporaryDirectory() as folder:
            torch.save({"training": self.training.state_dict(), "best": self.best}, Path(folder) / STATE)
            train.report(record, checkpoint=train.Checkpoint.from_directory(folder))
        self.saved = time.monotonic()


def _read_state(checkpoint: train.Checkpoint) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)
