"""Training with Ray Train: Ray Data streams the shards to the ranks, DDP averages their gradients.

A rank keeps its share of the records when that fits into memory, and streams them again in every epoch when it does
not: an epoch over a Ray Data iterator costs seconds even for a small cohort.
"""

import math
import os
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

from mmimpute import registry, scoring
from mmimpute.cluster import runtime
from mmimpute.cluster.ingest import records
from mmimpute.data import storage
from mmimpute.data.schema import CohortSchema
from mmimpute.data.shards import Shard
from mmimpute.data.split import fold
from mmimpute.data.tensors import split
from mmimpute.model.config import ModelConfig
from mmimpute.model.contrastive import ContrastConfig, ContrastiveVAE
from mmimpute.model.imputer import Imputer
from mmimpute.model.standardise import FeatureStatistics
from mmimpute.model.vae import MultiModalVAE
from mmimpute.spec import FitSettings
from mmimpute.stacking import Assembly, assemble, early, fit_others
from mmimpute.training import OptimiserSettings, Schedule, Training, judges, keeps, optimiser, schedule, shuffled, summarise

STATE = "state.pt"
TUNE_BATCH = 1024
TUNE_BYTES = 64 << 20  # of the records that judge an epoch, at most
MOST_LEARNERS, MOST_JUDGES = 20_000, 10_000  # records to which the other experts and the stack are fitted
SAMPLE_BYTES = 512 << 20  # of those records at most: images are large
MOST_THREADS = 4  # that fit other experts and the stack: each holds the encoded records of a modality's regression
SHUFFLED_BATCHES = 16  # held for shuffling while streaming
RESTARTS = 3  # of the workers, after a crash
Progress = Callable[[dict], None]


@dataclass(frozen=True)
class Job:
    """All that a training run depends on. `name` makes a second run resume the first; start: URL of the model to start from."""

    name: str
    shards_url: str
    layouts: list[list[Shard]]
    schema: CohortSchema
    config: ModelConfig
    statistics: dict[str, dict[str, np.ndarray]]
    rows: int
    holders: float  # records that hold a modality, mean over modalities
    settings: FitSettings
    start: str | None = None


@dataclass(frozen=True)
class Fitted:
    module: Imputer
    history: list[dict[str, float]]
    scores: dict[str, dict | None]  # out of fold, see `scoring.summarise`


def fit(job: Job, home: str, on_epoch: Progress = lambda epoch: None) -> Fitted:
    """Trains, or resumes training, and returns the averaged weights that are kept and one record per epoch.

    Checkpoints stand under `<home>/_training/<name>` until they are cleared.
    """
    workers = job.settings.workers or max(1, runtime.gpus())
    filesystem, place = storage.arrow_filesystem(storage.join(home, "_training"))
    filesystem.create_dir(place)
    queue = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=_loop_config(job, workers) | {"queue": queue},
        datasets={"train": records(job.shards_url, job.layouts, job.schema)},
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
    return Fitted(Imputer.from_state(job.config, state["best"]["weights"]), state["best"]["history"], state["best"]["scores"])


def clear(home: str, name: str) -> None:
    """Removes a finished run's checkpoints."""
    filesystem, place = storage.arrow_filesystem(storage.join(home, "_training"))
    if filesystem.get_file_info(f"{place}/{name}").type == FileType.Directory:
        filesystem.delete_dir(f"{place}/{name}")


def _loop_config(job: Job, workers: int) -> dict[str, Any]:
    plan = schedule(job.rows // workers, job.settings.batch_size, job.settings.epochs, job.config.structured)
    return {
        "config": asdict(job.config),
        "statistics": job.statistics,
        "plan": asdict(plan),
        "settings": asdict(optimiser(job.config, plan, job.holders, job.settings.seed)),
        "patience": job.settings.patience or plan.patience,
        "cache_share": job.settings.cache_share,
        "checkpoint_seconds": job.settings.checkpoint_seconds,
        "widths": [len(m.features) for m in job.schema.modalities],
        "start": job.start,
        "contrast": _contrast(job.schema),
    }


def _contrast(schema: CohortSchema) -> dict[str, Any] | None:
    """Of a contrastive cohort, a `ContrastConfig` as a dict."""
    found = schema.contrastive
    if found is None:
        return None
    terms = {"weights": tuple(label.weight for label in found.labels), "soft": tuple(label.soft for label in found.labels)}
    return terms | {"temperature": found.temperature, "weight": found.weight, "alone": found.alone, "on": found.on}


def _gpus(job: Job) -> float:
    return job.settings.gpus_per_worker or (1 if runtime.gpus() else 0)


def _resources(job: Job, workers: int) -> dict[str, float]:
    """Workers that held every CPU would wait for ever for the tasks that read their data, which are idle later on."""
    return {"CPU": 0.5 / workers} | ({"GPU": _gpus(job)} if _gpus(job) else {})


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


def load(shard: ray.data.DataIterator, limit: float, members: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """This rank's records up to `limit` bytes, their folds, and whether those are all.

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
    place = np.concatenate(places)
    order = np.argsort(place, kind="stable")
    return torch.from_numpy(np.concatenate(pieces)[order]), torch.from_numpy(fold(place[order], members)), whole


class RankRecords:
    """This rank's records: in memory where they fit into `limit` bytes, else streamed anew every epoch.

    A single member learns nothing from the fold that judges it; of several, every record teaches all but one.
    """

    def __init__(self, shard: ray.data.DataIterator, device: torch.device, limit: float, members: int):
        self.shard, self.device, self.members = shard, device, members
        self.x_ND, self.fold_N, self.whole = load(shard, limit, members)
        self.learners = ((self.fold_N < 0) | (members > 1)).nonzero().squeeze(1)

    def judges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Records that judge epochs, and their folds."""
        rows = judges(self.fold_N, self.members, max(1, int(TUNE_BYTES / (4 * self.x_ND.shape[1]))))
        return self.x_ND[rows].to(self.device), self.fold_N[rows].to(self.device)

    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Records for the other experts and the stack, and their folds."""
        share = min(1.0, SAMPLE_BYTES / (4 * self.x_ND.shape[1] * (MOST_LEARNERS + MOST_JUDGES)))
        learners, judges = int(share * MOST_LEARNERS), int(share * MOST_JUDGES)
        if len(self.fold_N) <= learners + judges:
            return self.x_ND, self.fold_N
        if self.members > 1:
            rows = torch.linspace(0, len(self.fold_N) - 1, learners + judges).long()  # they stand in the order of their folds
            return self.x_ND[rows], self.fold_N[rows]
        rows = torch.cat([(self.fold_N < 0).nonzero().squeeze(1)[:learners], (self.fold_N >= 0).nonzero().squeeze(1)[:judges]])
        return self.x_ND[rows], self.fold_N[rows]

    def epoch(self, seed: int, size: int, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """`steps` shuffled batches of `size` records and their folds."""
        if not self.whole:
            yield from self._stream(seed, size, steps)
            return
        order = self.learners[shuffled(len(self.learners), steps * size, torch.Generator().manual_seed(seed))]
        for step in range(steps):
            rows = order[step * size : (step + 1) * size]
            yield self.x_ND[rows].to(self.device), self.fold_N[rows].to(self.device)

    def _stream(self, seed: int, size: int, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        left = steps
        options = {"batch_size": size, "local_shuffle_buffer_size": SHUFFLED_BATCHES * size, "local_shuffle_seed": seed}
        while left:
            for batch in self.shard.iter_torch_batches(**options):
                folds = torch.from_numpy(fold(batch["place"].numpy(), self.members))
                yield batch["x"].to(self.device), folds.to(self.device)
                left -= 1
                if not left:
                    return


def train_loop(loop: dict[str, Any]) -> None:
    """One rank: load or resume, then per epoch train, tune, report, until the last or until a single member's tune loss stops falling."""
    context = train.get_context()
    training, plan, best = _prepare(loop, context.get_world_rank())
    if checkpoint := train.get_checkpoint():
        state = _read_state(checkpoint)
        best = state["best"]
        if not best["stopped"]:
            training.load_state_dict(state["training"])
    device = training.device
    share = loop["cache_share"] * psutil.virtual_memory().total / context.get_local_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size() - 1))  # one is for all others
    data = RankRecords(train.get_dataset_shard("train"), device, share, training.model.config.members)
    tune = data.judges()
    reporter = Reporter(training, best, loop["queue"] if context.get_world_rank() == 0 else None, loop["checkpoint_seconds"])
    others = None
    if best["stopped"]:
        reporter.report({}, last=True)
    elif reporter.queue is not None and early(training.model.config):
        others = _fit_others.remote(loop, *data.sample(), context.get_local_world_size())
    while not best["stopped"]:
        epoch, began = len(best["history"]), time.perf_counter()
        seed = loop["settings"]["seed"] * 100_003 + epoch
        steps = [training.step(*_batch(x, folds, loop["widths"])) for x, folds in data.epoch(seed, plan.batch, plan.steps_per_epoch)]
        judged = zip(*(t.split(TUNE_BATCH) for t in tune), strict=True)
        tuned = summarise(_all_reduce(training.tune(_batch(x, folds, loop["widths"]) for x, folds in judged), device))
        seconds = time.perf_counter() - began
        rows = plan.steps_per_epoch * plan.batch * context.get_world_size()
        record = {"epoch": epoch + 1, "epochs": plan.epochs, "seconds": seconds, "rows_per_second": rows / seconds}
        record |= {name: sum(s[name] for s in steps) / len(steps) for name in ("elbo", "impute")}
        record |= {f"tune_{name}": value for name, value in tuned.items()}
        _judge(best, record, training, loop["patience"], plan)
        if best["stopped"] and reporter.queue is not None:
            _assemble(best, training, data.sample(), loop["widths"], others)
        reporter.report(record, last=best["stopped"])


@ray.remote(num_cpus=0)
def _fit_others(loop: dict[str, Any], x_ND: torch.Tensor, fold_N: torch.Tensor, ranks: int) -> dict[str, torch.Tensor]:
    """The experts beside the VAE, on cores that training leaves free; see `stacking.fit_others`."""
    torch.set_num_threads(1)
    values, masks, folds, *_ = _batch(x_ND, fold_N, loop["widths"])
    return fit_others(Assembly(MultiModalVAE(*_sizes(loop)).eval(), values, masks, folds, _threads(ranks)))


def _threads(busy: int = 0) -> int:
    """That fit other experts and the stack on a host of which so many cores are busy."""
    return min(MOST_THREADS, max(1, (os.cpu_count() or 1) - busy))


def _batch(x: torch.Tensor, folds: torch.Tensor, widths: list[int]) -> tuple:
    """Values, masks, folds and, where they stand behind the values, labels."""
    values, masks = split(x[:, : sum(widths)], widths)
    labels = x[:, sum(widths) :]
    return (values, masks, folds, labels) if labels.shape[1] else (values, masks, folds)


def _prepare(loop: dict[str, Any], rank: int) -> tuple[Training, Schedule, dict[str, Any]]:
    torch.manual_seed(loop["settings"]["seed"])  # equal weights on every rank before DDP broadcasts them
    (config, statistics), terms = _sizes(loop), loop["contrast"]
    model = ContrastiveVAE(config, statistics, ContrastConfig(**terms)) if terms else MultiModalVAE(config, statistics)
    model = model.to(get_device())
    if loop["start"]:
        model.start_from(registry.load(loop["start"]).module.vae)
    plan = Schedule(**loop["plan"])
    settings = OptimiserSettings(**loop["settings"])
    training = Training(model, settings, plan.total_steps, lambda m: prepare_model(m, move_to_device=False), rank)
    return training, plan, {"loss": math.inf, "epoch": 0, "weights": {}, "history": [], "scores": {}, "stopped": False}


def _sizes(loop: dict[str, Any]) -> tuple[ModelConfig, dict[str, FeatureStatistics]]:
    return ModelConfig.from_dict(loop["config"]), {name: FeatureStatistics(**arrays) for name, arrays in loop["statistics"].items()}


def _all_reduce(sums: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sums over all ranks."""
    if not torch.distributed.is_initialized():
        return sums
    total = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return dict(zip(sums, total.tolist(), strict=True))


def _judge(best: dict[str, Any], record: dict, training: Training, patience: int, plan: Schedule) -> None:
    """Keeps averaged weights, see `training.keeps`; equal on every rank, as the tune loss is."""
    record["kept"] = keeps(training.model.config, record["tune_loss"], best["loss"])
    best["history"].append(record)
    if record["kept"]:
        best |= {"loss": record["tune_loss"], "epoch": record["epoch"], "weights": _weights(training)}
    best["stopped"] = record["epoch"] >= plan.epochs or record["epoch"] - best["epoch"] >= patience


def _weights(training: Training) -> dict[str, torch.Tensor]:
    return {name: t.detach().cpu().clone() for name, t in training.average.state_dict().items()}


def _assemble(
    best: dict[str, Any],
    training: Training,
    sample: tuple[torch.Tensor, torch.Tensor],
    widths: list[int],
    others: ray.ObjectRef | None,
) -> None:
    """The whole model around the trained VAE, from rank 0's records: its weights take the place of the VAE's. others: of `_fit_others`."""
    x, folds = sample[0][:, : sum(widths)], sample[1]
    training.average.load_state_dict(best["weights"])
    average = training.average.cpu()
    vae = average.plain() if isinstance(average, ContrastiveVAE) else average
    imputer = assemble(vae, *split(x, widths), folds, _threads(), None if others is None else ray.get(others))
    best["weights"] = {name: t.detach().contiguous() for name, t in imputer.state_dict().items()}
    judged = scoring.some(folds.numpy(), np.arange(len(x)))
    names = [m.name for m in imputer.config.modalities]
    best["scores"] = scoring.summarise(names, scoring.score(imputer, x[judged].numpy(), folds[judged].numpy()))


class Reporter:
    """Metrics at every epoch; from rank 0 now and then a checkpoint of model, optimiser, schedule and best weights, at last of those."""

    def __init__(self, training: Training, best: dict[str, Any], queue: Queue | None, seconds: float):
        self.training, self.best, self.queue = training, best, queue
        self.seconds, self.saved = seconds, time.monotonic()

    def report(self, record: dict[str, float], last: bool) -> None:
        """Every rank must call this equally often: it is a barrier."""
        if self.queue is None:
            train.report(record)
            return
        if record:
            self.queue.put(record)
        if not last and time.monotonic() - self.saved < self.seconds:
            train.report(record)
            return
        with tempfile.TemporaryDirectory() as folder:
            state = {"best": self.best} | ({} if last else {"training": self.training.state_dict()})
            torch.save(state, Path(folder) / STATE)
            train.report(record, checkpoint=train.Checkpoint.from_directory(folder))
        self.saved = time.monotonic()


def _read_state(checkpoint: train.Checkpoint) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)
