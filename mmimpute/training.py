"""The training loop's parts: plain classes and functions on torch, the same under Ray Train and in memory.

Every step draws its randomness from (seed, step, rank) alone, so a resumed run continues exactly.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmimpute.model.objective import LossTerms
from mmimpute.model.vae import MultiModalVAE

Batch = tuple[Sequence[Tensor], Sequence[Tensor]]  # values in original units, masks of what is observed
TUNE_SEED = 7


@dataclass(frozen=True)
class OptimiserSettings:
    """AdamW with a cosine schedule and an exponential average of the weights."""

    lr: float = 1e-3
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.99  # decay of the weight average per step
    warmup: float = 0.05  # share of the steps in which the rate rises
    elbo_warmup: float = 0.3  # share of the steps in which the weight of L_elbo rises
    seed: int = 0


@dataclass(frozen=True)
class Schedule:
    """How long to train."""

    batch: int
    epochs: int
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def patience(self) -> int:
        """Epochs without a better tune loss before training stops."""
        return max(3, self.epochs // 2)


def schedule(rows: int, batch: int | None = None, epochs: int | None = None, most_steps: int = 2000) -> Schedule:
    """Sizes from the number of training rows: small batches for small cohorts, a bounded number of steps for large."""
    batch = batch or (128 if rows < 2_500 else 256 if rows < 50_000 else 1024)
    steps_per_epoch = max(1, rows // batch)
    epochs = epochs or min(40 if rows < 2_500 else 30, max(1, most_steps // steps_per_epoch))
    return Schedule(batch, epochs, steps_per_epoch)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run with torch's generators at `seed`, then put them back as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Training:
    """One rank's model, optimiser, schedule and weight average."""

    def __init__(
        self,
        model: MultiModalVAE,
        settings: OptimiserSettings,
        total_steps: int,
        wrap: Callable[[nn.Module], nn.Module] = lambda m: m,
        rank: int = 0,
    ) -> None:
        self.module = wrap(model)  # what steps run through: DDP in a cluster
        self.model = getattr(self.module, "module", self.module)
        self.settings, self.total_steps, self.rank, self.done = settings, max(1, total_steps), rank, 0
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimiser = torch.optim.AdamW(self._groups(), lr=settings.lr, betas=settings.betas)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, self._rate)

    def _groups(self) -> list[dict[str, Any]]:
        """Weight decay is for matrices; biases and cut points are free."""
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        free = [p for p in self.model.parameters() if p.dim() <= 1]
        return [{"params": decayed, "weight_decay": self.settings.weight_decay}, {"params": free, "weight_decay": 0.0}]

    def _rate(self, step: int) -> float:
        rise = max(1, round(self.settings.warmup * self.total_steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, self.total_steps - rise))))

    @property
    def device(self) -> torch.device:
        return self.model.hide_K.device

    def step(self, x: Sequence[Tensor], observed: Sequence[Tensor]) -> dict[str, float]:
        """One update; returns the batch's named terms (see `summarise`) and the objective as `loss`."""
        self.module.train()
        rise = self.settings.elbo_warmup * self.total_steps
        scale = min(1.0, (self.done + 1) / rise) if rise else 1.0
        seed = (self.settings.seed * 1_000_003 + self.done) * 4_096 + self.rank
        with seeded(seed, self.device), torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            terms = self.module(x, observed, scale)
        self.optimiser.zero_grad()
        terms.objective.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimiser.step()
        self.schedule.step()
        self.done += 1
        self._update_average()
        return summarise(self._sums(terms)) | {"loss": terms.objective.item()}

    @torch.no_grad()
    def _update_average(self) -> None:
        # Early on the average follows closely, or it would hold the initial weights for long.
        decay = min(self.settings.ema, self.done / (self.done + 9))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    @torch.no_grad()
    def tune(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Sums over the batches with the averaged weights, hiding the same values in every epoch.

        Everything returned adds up over batches and ranks; `summarise` makes means of it.
        """
        total: dict[str, float] = defaultdict(float)
        with seeded(TUNE_SEED, self.device):
            for x, observed in batches:
                for name, value in self._sums(self.average(x, observed)).items():
                    total[name] += value
        return dict(total)

    def _sums(self, terms: LossTerms) -> dict[str, float]:
        """Named sums and counts; one transfer from the device."""
        columns = {
            "reconstruction": terms.reconstruction_BK,
            "private_kl": terms.private_kl_BK,
            "impute": terms.impute_BK,
            "score": terms.score_BK,
            "observed": terms.observed_BK,
            "hidden": terms.hidden_BK,
        }
        flat = torch.cat([terms.elbo_B.sum()[None], terms.shared_kl_B.sum()[None], *(c.sum(0) for c in columns.values())]).tolist()
        names = [m.name for m in self.model.config.modalities]
        keys = ["elbo", "shared_kl"] + [f"{n}.{c}" for c in columns for n in names]
        return dict(zip(keys, flat, strict=True)) | {"rows": float(len(terms.shared_kl_B))}

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "done": self.done,
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.done = state["done"]


def summarise(sums: Mapping[str, float]) -> dict[str, float]:
    """Means from sums, possibly added up over batches and ranks.

    `loss` is the quantity for early stopping: the score of hidden values, mean over modalities (1 = the training
    marginal). `elbo`, `impute`, `shared_kl` are nats per record; `<modality>.reconstruction` and `.private_kl` nats
    per record that has it; `<modality>.impute` nats and `.score` the score per record in which it was hidden.
    """
    rows = max(1.0, sums["rows"])
    names = [k.removesuffix(".hidden") for k in sums if k.endswith(".hidden")]
    out = {"elbo": sums["elbo"] / rows, "impute": sum(sums[f"{n}.impute"] for n in names) / rows, "shared_kl": sums["shared_kl"] / rows}
    for n in names:
        for term, count in (("reconstruction", "observed"), ("private_kl", "observed"), ("impute", "hidden"), ("score", "hidden")):
            if sums[f"{n}.{count}"]:
                out[f"{n}.{term}"] = sums[f"{n}.{term}"] / sums[f"{n}.{count}"]
    scores = [out[f"{n}.score"] for n in names if f"{n}.score" in out]
    return {"loss": sum(scores) / len(scores) if scores else 1.0} | out


@dataclass(frozen=True)
class Fitted:
    """The best averaged weights, and one record per epoch."""

    model: MultiModalVAE
    history: list[dict[str, float]]


def fit_in_memory(
    model: MultiModalVAE, train: Batch, tune: Batch, settings: OptimiserSettings = OptimiserSettings(), plan: Schedule | None = None
) -> Fitted:
    """The loop without a cluster, over tensors that fit in memory."""
    rows = train[0][0].shape[0]
    plan = plan or schedule(rows)
    training = Training(model, settings, plan.total_steps)
    shuffle = torch.Generator().manual_seed(settings.seed)
    best, best_loss, best_epoch, history = copy.deepcopy(training.average), math.inf, 0, []
    for epoch in range(plan.epochs):
        order = torch.randperm(rows, generator=shuffle)
        steps = [training.step(*take(train, order[i * plan.batch : (i + 1) * plan.batch])) for i in range(plan.steps_per_epoch)]
        result = summarise(training.tune(in_batches(tune, 1024)))
        history.append({"epoch": epoch, "train_loss": sum(s["loss"] for s in steps) / len(steps)} | result)
        if result["loss"] < best_loss:
            best, best_loss, best_epoch = copy.deepcopy(training.average), result["loss"], epoch
        if epoch - best_epoch >= plan.patience:
            break
    best.prior.fit(sum(best.posterior_moments(*batch) for batch in in_batches(train, 1024)))
    return Fitted(best, history)


def take(batch: Batch, index: Tensor | slice) -> Batch:
    """Some rows of a batch."""
    return [t[index] for t in batch[0]], [t[index] for t in batch[1]]


def in_batches(data: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, data[0][0].shape[0], size):
        yield take(data, slice(start, start + size))
