"""The training loop's parts: plain classes and functions on torch, the same under Ray Train and in memory.

Every step draws its randomness from (seed, step, rank) alone, so a resumed run continues exactly.
"""

import copy
import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmimpute.model.config import ModelConfig
from mmimpute.model.contrastive import ContrastiveVAE
from mmimpute.model.networks import fast_products
from mmimpute.model.objective import LossTerms
from mmimpute.model.vae import MultiModalVAE

Batch = tuple[Sequence[Tensor], Sequence[Tensor]]  # values in original units, masks of what is observed
TUNE_SEED = 7
MOST_TUNED = 2_000  # records that judge an epoch of a single member, which may stop it
MOST_SHOWN = 500  # the same of several members, whose loss is only shown: 2,000 took a fifth of the time of training nhanes
DECAYED_RECORDS = 1_500.0  # weight decay times the records that hold a modality
MOST_DECAY = 10.0
LEAST_STEPS = 5  # of an epoch


@dataclass(frozen=True)
class OptimiserSettings:
    """AdamW with a cosine schedule and an exponential average of the weights."""

    lr: float = 2e-3
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
        """Epochs without a better tune loss before training of a single member stops."""
        return max(3, self.epochs // 2)


def schedule(rows: int, batch: int | None = None, epochs: int | None = None, structured: bool = False) -> Schedule:
    """Sizes from the number of training rows: small batches for small cohorts, a bounded number of steps for large. structured: with
    images, signals or texts, whose steps are dear.

    An ensemble goes on gaining when its members have begun to fit too much. Its skill on 20% of the training people with weight decay .02
    (two seeds differ by .0006), by batch and epochs: nhanes 0.0 of 256 (rate 3e-3) 48 .2766, 64 .2775; of 512 (4.2e-3) 48 .2764, 64 .2779
    in half of the steps; of 1,024 (6e-3) 64 .2761, 96 .2784; 0.5 of 256 48 .2412, of 512 64 .2418, 96 .2412. Of 128 after 30, 48, 64, 96
    epochs: eicu 0.0 .1422 .1446 .1444 -, 0.5 .0818 .0818 .0804 -, tcga 0.0 .1834 .1839 .1848 .1854, 0.5 .1263 .1259 .1262 -; of 256 after
    48: eicu 0.0 .1438, tcga 0.0 .1825. With weights that decay as they do now (`optimiser`), after 48, 30, 30 with 1.6 times the decay, and
    48 of 256 with twice the decay: tcga 0.0 .1848 .1837 .1839 .1826, 0.5 .1313 .1280 .1287 .1300, eicu 0.0 .1471 .1437 .1432 .1450, 0.5
    .0855 .0828 .0791 -. Where there are more records, on 20% of 50,000 people of diabetes130: five members .2080 after 2,000 steps of 256,
    .2151 after 4,000; one member .2082 after 940, .2128 after 2,000. Short of the oracle's R2 on 200,000 simulated records after 3,000
    steps .010 .011 .014, after 5,000 .011 .013 .014; on 1,000,000 of 256 features .006 .010 .010 and .004 .009 .008 with two layers, with
    three .006 .007 .007 after 5,000 and .003 .005 .005 after 8,000 (the last where the stack hears the VAE at the means of its latents; at
    two nodes .006 .005 .007).

    A tiny cohort is gone through several times an epoch, unless epochs are given. On the same people, of models of 150 and 350 others (two
    choices each) after 48 passes and 48 epochs of at least 5 steps: nhanes 0.0 .1657 .1686 and .2076 .2113, 0.5 .0763 .0778 and .1352
    .1380, pbcseq .1050 .1082 and .1317 .1398; in batches of 32 instead nhanes .1609 and .2068. All of tcga (595) after 192 and 288 steps:
    .1848 .1848, 0.5 .1313 .1306.
    """
    few, many = rows < 2_500, rows >= 50_000
    batch = batch or (128 if few else 1024 if many else 256 if structured else 512)
    steps_per_epoch = max(1, rows // batch) if epochs or structured else max(LEAST_STEPS, rows // batch)
    usual = (30 if few else 24) if structured else 48 if few else 64
    most_steps = 8_000 if rows >= 500_000 else 3_000 if many or structured else 2_000
    epochs = epochs or min(usual, max(1, most_steps // steps_per_epoch))
    return Schedule(batch, epochs, steps_per_epoch)


def optimiser(config: ModelConfig, plan: Schedule, holders: float, seed: int) -> OptimiserSettings:
    """How a default model is trained. holders: records that hold a modality, mean over modalities. The fewer, the stronger is weight decay,
    as that of a prior of the weights is (MacKay 1992). Steps are twice as long for several members, and up to that for fewer than 600 or
    batches above 256.

    Ensemble's skill on 20% of the training people by weight decay .02, .3, 1, 3, 6 (48 epochs, nhanes 64; in brackets the holders):
        eicu 0.0 (958) .1446 .1452 .1460 .1456 -          0.5 (473) .0818 .0823 .0832 .0852 -
        tcga 0.0 (493) .1839 - .1842 .1847 .1849          0.5 (257) .1259 - .1274 .1295 .1311
        nhanes 0.0 (4,104) .2779 .2777 .2757 - -          0.5 (2,152) .2418 .2423 .2416 - -
        pbcseq 0.0 (1,079) .1599 .1592 .1565 - -          0.5 (581) .1192 - .1219 - -
        tcga of other people and rates, 2.5 and 8: 0.0 .1914 .1921, 0.5 .1312 .1308
    (the people of pbcseq have other visits in the training data, by which a model may recognise them). More dropout instead, .55: eicu
    .1445, 0.5 .0809. By how much weights decay in the whole of training, 1,200 / holders whatever the steps, is as good there, and on test
    rows (looked at afterwards) tcga .1905 .1375 instead of .1915 .1393: noise.
    Out-of-fold skill of the VAE alone and of the stack at rates 2e-3, 3e-3, 5e-3 (one seed, 30 epochs): eicu 0.0, .0953 .0980 .0967, .1324
    .1328 .1321; tcga 0.0 .1289 .1368 .1424, .1717 .1725 .1740. The square root of the batch is that of Malladi et al. 2022: see
    `ModelConfig.for_rows`. None of this was tried on images, signals and texts.
    """
    usual = OptimiserSettings(seed=seed)
    if config.structured:
        return usual
    longer = 2.0 if config.members > 1 else max(1.0, math.sqrt(600 / plan.total_steps), math.sqrt(plan.batch / 256))
    decay = min(MOST_DECAY, max(usual.weight_decay, DECAYED_RECORDS / max(1.0, holders)))
    return dataclasses.replace(usual, lr=usual.lr * min(2.0, longer), weight_decay=decay)


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
        self.members = [self.average.member(e) for e in range(self.model.config.members)]
        self.optimiser = torch.optim.AdamW(self._groups(), lr=settings.lr, betas=settings.betas, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, self._rate)

    def _groups(self) -> list[dict[str, Any]]:
        """Weight decay is for matrices; biases and cut points are free."""
        decayed = [p for name, p in self.model.named_parameters() if name.endswith("weight")]
        free = [p for name, p in self.model.named_parameters() if not name.endswith("weight")]
        return [{"params": decayed, "weight_decay": self.settings.weight_decay}, {"params": free, "weight_decay": 0.0}]

    def _rate(self, step: int) -> float:
        rise = max(1, round(self.settings.warmup * self.total_steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, self.total_steps - rise))))

    @property
    def device(self) -> torch.device:
        return self.model.hide_K.device

    @fast_products()
    def step(
        self, x: Sequence[Tensor], observed: Sequence[Tensor], fold_B: Tensor | None = None, labels_BT: Tensor | None = None
    ) -> dict[str, float]:
        """One update; returns the batch's named terms (see `summarise`) and the objective as `loss`.

        Member e does not learn from records of fold e; without folds every member learns from all. labels: of a `ContrastiveVAE`.
        """
        self.module.train()
        rise = self.settings.elbo_warmup * self.total_steps
        scale = min(1.0, (self.done + 1) / rise) if rise else 1.0
        seed = (self.settings.seed * 1_000_003 + self.done) * 4_096 + self.rank
        with seeded(seed, self.device), torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            weight_EB = None if fold_B is None else (fold_B != self._index_E1()).float()
            terms = self.module(x, observed, weight_EB, scale, **_labels(labels_BT))
        self.optimiser.zero_grad()
        terms.objective.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip * math.sqrt(self.model.config.members))
        self.optimiser.step()
        self.schedule.step()
        self.done += 1
        self._update_average()
        return summarise(self._sums(terms)) | {"loss": terms.objective.item() / self.model.config.members}

    def _index_E1(self) -> Tensor:
        return torch.arange(self.model.config.members, device=self.device)[:, None]

    @torch.no_grad()
    def _update_average(self) -> None:
        # Early on the average follows closely, or it would hold the initial weights for long.
        decay = min(self.settings.ema, self.done / (self.done + 9))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    @torch.no_grad()
    @fast_products()
    def tune(self, batches: Iterable[tuple]) -> dict[str, float]:
        """Sums over the batches with the averaged weights, hiding the same values in every epoch.

        A batch is (values, masks) and perhaps folds, with which a record judges the member that did not see it, and labels.
        Everything returned adds up over batches and ranks; `summarise` makes means of it.
        """
        total: dict[str, float] = defaultdict(float)
        with seeded(TUNE_SEED, self.device):
            for x, observed, *rest in batches:
                fold_B, labels_BT = (*rest, None, None)[:2]
                everything = [(self.average, torch.arange(len(x[0]), device=self.device))]
                parts = everything if fold_B is None else [(m, (fold_B == e).nonzero().squeeze(1)) for e, m in enumerate(self.members)]
                for module, rows in parts:
                    labels = {} if labels_BT is None else _labels(labels_BT[rows])
                    for name, value in self._sums(module(*take((x, observed), rows), **labels)).items():
                        total[name] += value
        return dict(total)

    def _sums(self, terms: LossTerms) -> dict[str, float]:
        """Named sums and counts over records and members; one transfer from the device."""
        weight_EB, some = terms.weight_EB, terms.shared_kl_ER.shape[1]
        of_members = lambda t: t.expand(len(weight_EB), -1, -1).to(weight_EB.dtype)  # noqa: E731
        single = torch.stack([terms.elbo_ER, terms.shared_kl_ER, torch.ones_like(terms.shared_kl_ER)], 2)
        shown = [single, terms.reconstruction_ERK, terms.private_kl_ERK, of_members(terms.observed_BK[:some])]
        hidden = [torch.ones_like(weight_EB)[..., None], terms.impute_EBK, terms.score_EBK, of_members(terms.hidden_BK)]
        each = [(weight_EB[:, :some], torch.cat(shown, 2)), (weight_EB, torch.cat(hidden, 2))]
        flat = torch.cat([torch.einsum("eb,ebk->k", weight, columns) for weight, columns in each]).tolist()
        per_modality = lambda *columns: [f"{m.name}.{c}" for c in columns for m in self.model.config.modalities]  # noqa: E731
        names = ["elbo", "shared_kl", "elbo_rows", *per_modality("reconstruction", "private_kl", "observed")]
        names += ["rows", *per_modality("impute", "score", "hidden")]
        sums = dict(zip(names, flat, strict=True))
        if terms.contrast_E is not None:  # a mean over the batch, so it counts as often as the batch has records
            sums["contrast"] = float((terms.contrast_E.detach() * weight_EB.sum(1)).sum())
        return sums

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

    `loss` is the quantity for early stopping of a single member: the score of hidden values, mean over modalities (1 = the training
    marginal), where nothing can be hidden the negative ELBO, where neither is known 1; and `contrast`, the weighted contrastive loss,
    where there is one.
    `elbo`, `impute`, `shared_kl` are nats per record; `<modality>.reconstruction` and `.private_kl` nats
    per record that has it; `<modality>.impute` nats and `.score` the score per record in which it was hidden.
    """
    if not sums:
        return {"loss": 1.0}
    rows, elbo_rows = max(1.0, sums["rows"]), max(1.0, sums["elbo_rows"])
    names = [k.removesuffix(".hidden") for k in sums if k.endswith(".hidden")]
    out = {"elbo": sums["elbo"] / elbo_rows, "shared_kl": sums["shared_kl"] / elbo_rows}
    out["impute"] = sum(sums[f"{n}.impute"] for n in names) / rows
    for n in names:
        for term, count in (("reconstruction", "observed"), ("private_kl", "observed"), ("impute", "hidden"), ("score", "hidden")):
            if sums[f"{n}.{count}"]:
                out[f"{n}.{term}"] = sums[f"{n}.{term}"] / sums[f"{n}.{count}"]
    scores = [out[f"{n}.score"] for n in names if f"{n}.score" in out]
    loss = sum(scores) / len(scores) if scores else -out["elbo"] if sums["elbo_rows"] else 1.0
    if "contrast" in sums:
        out["contrast"] = sums["contrast"] / rows
        loss += out["contrast"]
    return {"loss": loss} | out


def judges(fold_N: Tensor, members: int, most: int = MOST_TUNED) -> Tensor:
    """Row numbers of the records that judge epochs, random ones of those in a fold and always the same."""
    rows = (fold_N >= 0).nonzero().squeeze(1)
    most = min(most, MOST_TUNED if members == 1 else MOST_SHOWN)
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(TUNE_SEED))[:most]
    return rows[chosen.sort().values]


def shuffled(rows: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` row numbers: of one permutation after another."""
    passes = -(-size // rows)
    return torch.cat([torch.randperm(rows, generator=generator) for _ in range(passes)])[:size]


def keeps(config: ModelConfig, loss: float, least: float) -> bool:
    """Whether the averaged weights after an epoch with this tune loss take the place of those with the least before.

    A single member's do where they are no worse. Several members are trained to the end: each then fits a little too much, and their mean
    gains by it (Sollich & Krogh 1996). Ensemble's skill on 20% of the training people, by weights of the epoch with the least tune loss and
    of the last (two seeds each): eicu 0.0 .1454 .1456, 0.5 .0590 .0654; tcga 0.0 .1687 .1691, 0.5 .0831 .0845; nhanes 0.0 .2730 .2736,
    0.5 .1688 .1701.
    """
    return config.members > 1 or loss <= least


@dataclass(frozen=True)
class Fitted:
    """The averaged weights that are kept, without what only training needs, and one record per epoch."""

    model: MultiModalVAE
    history: list[dict[str, float]]


def fit_in_memory(
    model: MultiModalVAE,
    data: Batch,
    fold_N: Tensor,
    settings: OptimiserSettings = OptimiserSettings(),
    plan: Schedule | None = None,
    labels_NT: Tensor | None = None,
) -> Fitted:
    """The loop without a cluster, over tensors that fit in memory; fold -1 trains every member and judges none.

    labels: of a `ContrastiveVAE`.
    """
    plan = plan or schedule(len(fold_N), structured=model.config.structured)
    training = Training(model, settings, plan.total_steps)
    shuffle = torch.Generator().manual_seed(settings.seed)
    rows = judges(fold_N, model.config.members)
    tune = (*take(data, rows), fold_N[rows], *(() if labels_NT is None else (labels_NT[rows],)))
    learns_N = (fold_N < 0) | (model.config.members > 1)
    train, train_fold_N = take(data, learns_N), fold_N[learns_N]
    labels = (lambda index: ()) if labels_NT is None else (lambda index: (labels_NT[learns_N][index],))
    size = plan.steps_per_epoch * plan.batch
    size = min(size, -(-size // len(fold_N)) * len(train_fold_N))  # as many passes as are planned, of the fewer that teach
    best, best_loss, best_epoch, history = copy.deepcopy(training.average), math.inf, 0, []
    for epoch in range(plan.epochs):
        batches = shuffled(len(train_fold_N), size, shuffle).split(plan.batch)
        steps = [training.step(*take(train, index), train_fold_N[index], *labels(index)) for index in batches]
        result = summarise(training.tune((*take(tune, i), *(t[i] for t in tune[2:])) for i in slices(len(tune[2]), 1024)))
        kept = keeps(model.config, result["loss"], best_loss)
        history.append({"epoch": epoch, "train_loss": sum(s["loss"] for s in steps) / len(steps), "kept": kept} | result)
        if kept:
            best, best_loss, best_epoch = copy.deepcopy(training.average), result["loss"], epoch
        if epoch - best_epoch >= plan.patience:
            break
    return Fitted(best.plain() if isinstance(best, ContrastiveVAE) else best, history)


def _labels(labels_BT: Tensor | None) -> dict[str, Tensor]:
    """What only a `ContrastiveVAE` takes."""
    return {} if labels_BT is None else {"labels_BT": labels_BT}


def take(batch: Sequence, index: Tensor | slice) -> Batch:
    """Some rows of the values and masks of a batch."""
    return [t[index] for t in batch[0]], [t[index] for t in batch[1]]


def slices(rows: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, rows, size)]
