"""Classes from z0: a linear map per target on the shared latent, by itself or with an encoder of its own.

A head has E members, as its model has: member e learns nothing from the records of fold e, so of the people who made the
head itself there are predictions by a part of it that has not seen them. Elsewhere probabilities are the mean over members.

Shape suffixes: E members, N records, B records of a batch, K modalities, L latent, T targets, C classes of one target.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from mmimpute.model.networks import Linear, SharedEncoder
from mmimpute.model.objective import hide
from mmimpute.model.vae import Inputs, MultiModalVAE

NOTHING = 0.05  # of the records of a step nothing is shown, so that the classes' shares are learnt
BATCH = 128


@dataclass(frozen=True)
class Labels:
    """classes: the class of each record in each target, -1 where it has none; sizes: classes of each target.

    learn, judge: how much each record weighs for each member, T of (E, N): where it learns, and where it has not seen the record.
    """

    classes_NT: Tensor
    sizes: tuple[int, ...]
    learn: list[Tensor]
    judge: list[Tensor]

    @classmethod
    def of(cls, classes_NT: Tensor, sizes: Sequence[int], fold_N: Tensor, members: int, balanced: bool) -> "Labels":
        """fold: the member that does not learn from a record; -1: every member does."""
        judges_EN = (fold_N == torch.arange(members)[:, None]).float()
        learn, judge = (weights(classes_NT, sizes, w, balanced) for w in (1 - judges_EN, judges_EN))
        return cls(classes_NT, tuple(sizes), learn, judge)


class Head(nn.Module):
    """sizes: classes of each target; encoder: of a full head, in the place of the model's."""

    def __init__(self, members: int, shared: int, sizes: Sequence[int], encoder: SharedEncoder | None = None) -> None:
        super().__init__()
        self.linear = nn.ModuleList(Linear(members, shared, classes) for classes in sizes)
        self.encoder = encoder

    @classmethod
    def from_state(cls, vae: MultiModalVAE, state: Mapping[str, Tensor]) -> "Head":
        """A head of this model from its state dict alone."""
        full = any(name.startswith("encoder.") for name in state)
        count = sum(name.startswith("linear.") for name in state) // 2
        sizes = [state[f"linear.{t}.weight"].shape[2] for t in range(count)]
        head = cls(vae.config.members, vae.config.shared, sizes, copy.deepcopy(vae.shared) if full else None)
        head.load_state_dict(dict(state))
        return head.eval()

    def logits(self, z0_EBL: Tensor) -> list[Tensor]:
        """T of (E, B, C)."""
        return [linear(z0_EBL) for linear in self.linear]

    def latents(self, vae: MultiModalVAE, codes: Sequence[Tensor], shown_BK: Tensor) -> Tensor:
        """Mean of q(z0 | what is shown), (E, B, L); where nothing is, of p(z0)."""
        mean_EBL = vae.inference(codes, shown_BK, self.encoder).mean
        return torch.where(shown_BK.any(1)[:, None], mean_EBL, vae.prior.mean_EL[:, None])

    @torch.no_grad()
    def members(self, vae: MultiModalVAE, x: Sequence[Tensor], observed: Sequence[Tensor]) -> list[Tensor]:
        """Each member's probabilities, T of (E, B, C), given what is observed of each record."""
        inputs = vae.inputs(x, observed)
        return [logits.softmax(2) for logits in self.logits(self.latents(vae, inputs.codes, inputs.present_BK))]

    def predict(self, vae: MultiModalVAE, x: Sequence[Tensor], observed: Sequence[Tensor]) -> list[Tensor]:
        """The mean over members, T of (B, C)."""
        return [p.mean(0) for p in self.members(vae, x, observed)]


def weights(classes_NT: Tensor, sizes: Sequence[int], learns_EN: Tensor, balanced: bool) -> list[Tensor]:
    """How much each record weighs for each member, T of (E, N); classes: -1 where a record has no label.

    balanced: every class has the same sum, and all of them that of the records (n / (C n_c), as scikit-learn has it).
    """
    found = []
    for class_N, size in zip(classes_NT.T, sizes, strict=True):
        weight_EN = learns_EN * (class_N >= 0)
        if balanced:
            one_NC = fn.one_hot(class_N.clamp_min(0), size).to(weight_EN.dtype)
            count_EC = weight_EN @ one_NC
            factor_EC = weight_EN.sum(1, keepdim=True) / (size * count_EC.clamp_min(1))
            weight_EN = weight_EN * (factor_EC @ one_NC.T)
        found.append(weight_EN)
    return found


def cross_entropy(logits: Sequence[Tensor], classes_NT: Tensor, weight: Sequence[Tensor]) -> Tensor:
    """Weighted sum over records and targets, (E,)."""
    pairs = zip(logits, classes_NT.T, weight, strict=True)
    return sum(-(w_EN * log_softmax(f, class_N)).sum(1) for f, class_N, w_EN in pairs)


def log_softmax(logits_ENC: Tensor, class_N: Tensor) -> Tensor:
    """log p of each record's class, (E, N); of the first class where a record has none."""
    own = class_N.clamp_min(0)[None, :, None].expand(len(logits_ENC), -1, 1)
    return logits_ENC.log_softmax(2).gather(2, own)[..., 0]


def fit_linear(z0_ENL: Tensor, labels: Labels) -> Head:
    """The maximum of the penalised likelihood, to which L-BFGS converges whatever the start.

    The penalty, L / 2 |w|^2 on standardised latents, is a prior under which logits have variance 1 (as in `outcomes`).
    """
    mean_E1L, std_E1L = _moments(z0_ENL.double(), torch.stack(labels.learn).amax(0) > 0)
    z, weight = (z0_ENL.double() - mean_E1L) / std_E1L, [w.double() for w in labels.learn]
    head = Head(len(z), z.shape[2], labels.sizes).double()
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    solver = torch.optim.LBFGS(head.parameters(), max_iter=500, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        penalty = sum(linear.weight.square().sum() for linear in head.linear)
        total = cross_entropy(head.logits(z), labels.classes_NT, weight).sum() + 0.5 * z.shape[2] * penalty
        total.backward()
        return total

    solver.step(loss)
    with torch.no_grad():  # the standardisation goes into the weights
        for linear in head.linear:
            linear.weight.div_(std_E1L.mT)
            linear.bias.sub_(mean_E1L @ linear.weight)
    return head.float().eval()


def _moments(z_ENL: Tensor, seen_EN: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the records that a member sees, (E, 1, L)."""
    seen_EN1 = seen_EN.double()[..., None]
    count_E11 = seen_EN1.sum(1, keepdim=True).clamp_min(1)
    mean_E1L = (z_ENL * seen_EN1).sum(1, keepdim=True) / count_E11
    variance_E1L = ((z_ENL - mean_E1L).square() * seen_EN1).sum(1, keepdim=True) / count_E11
    return mean_E1L, variance_E1L.sqrt().clamp_min(1e-6)


def fit_full(vae: MultiModalVAE, start: Head, inputs: Inputs, labels: Labels, epochs: int, lr: float, seed: int = 0) -> Head:
    """Linear head and encoder trained on with cross-entropy, from the linear one (Kumar et al. 2022: probe, then tune).

    What is returned is the head that judges best, after each epoch and before the first.
    """
    head = copy.deepcopy(start)
    head.encoder = copy.deepcopy(vae.shared).requires_grad_(True)
    rows = torch.stack(labels.learn).amax((0, 1)).nonzero().squeeze(1)
    optimiser = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.02)
    steps = epochs * math.ceil(len(rows) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    best, least = copy.deepcopy(head), _judged(head, vae, inputs, labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            head.train()
            for batch in rows[torch.randperm(len(rows))].split(BATCH):
                optimiser.zero_grad()
                _loss(head, vae, inputs, labels, batch).backward()
                nn.utils.clip_grad_norm_(head.parameters(), math.sqrt(vae.config.members))
                optimiser.step()
                schedule.step()
            if (found := _judged(head, vae, inputs, labels)) < least:
                best, least = copy.deepcopy(head), found
    return best.eval()


def _loss(head: Head, vae: MultiModalVAE, inputs: Inputs, labels: Labels, batch: Tensor) -> Tensor:
    """Mean cross-entropy, summed over members, of some records with modalities hidden at random, so that any may be missing later."""
    present_BK = inputs.present_BK[batch]
    shown_BK = present_BK & ~hide(present_BK, vae.hide_K, vae.config.hide_one) & (torch.rand(len(batch), 1) >= NOTHING)
    logits = head.logits(head.latents(vae, [c[batch] for c in inputs.codes], shown_BK))
    weight = [w[:, batch] for w in labels.learn]
    count_E = sum(w.sum(1) for w in weight).clamp_min(1)
    return (cross_entropy(logits, labels.classes_NT[batch], weight) / count_E).sum()


@torch.no_grad()
def _judged(head: Head, vae: MultiModalVAE, inputs: Inputs, labels: Labels) -> float:
    """Cross-entropy of whole records by the members that have not seen them."""
    logits = head.eval().logits(head.latents(vae, inputs.codes, inputs.present_BK))
    return float(cross_entropy(logits, labels.classes_NT, labels.judge).sum())
