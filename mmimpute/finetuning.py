"""A head fitted to a model: classes of labelled records from z0, with the folds of the model's own members."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from mmimpute.data.labels import classes
from mmimpute.data.profile import SMALLEST_GROUP
from mmimpute.data.split import fold
from mmimpute.data.tensors import to_model
from mmimpute.errors import UserError
from mmimpute.heads import Target
from mmimpute.model.head import Head, Labels, fit_full, fit_linear
from mmimpute.registry import Model
from mmimpute.spec import FinetuneSettings

SHARES = (0.05, 0.1, 0.25, 0.5)  # of the labelled people, from which heads are fitted for the curve; its end is the head of all


def check_targets(model: Model, settings: FinetuneSettings) -> None:
    """Raises UserError where a target is an input of the model."""
    for column in settings.target:
        if column in model.schema.columns:
            raise UserError(f"finetune: target {column!r} is an input of the model; leave it out of the spec's modalities, and fit again")


def fit(
    model: Model, x: np.ndarray, place: np.ndarray, beside: Mapping[str, np.ndarray], settings: FinetuneSettings
) -> tuple[Head, tuple[Target, ...]]:
    """x: labelled records, n x width; place: the hash of each subject; beside: the target columns as text.

    Raises UserError as `labels.classes`.
    """
    vae, members = model.module.vae, model.module.config.members
    found = [classes(beside[column], f"finetune: column {column!r}") for column in settings.target]
    classes_NT = torch.from_numpy(np.stack([index for _, index in found], 1))
    fold_N = torch.from_numpy(fold(place, members))
    sizes, balanced = [len(levels) for levels, _ in found], settings.class_weight == "balanced"
    labels = Labels.of(classes_NT, sizes, fold_N, members, balanced)
    data = to_model(x, model.widths)
    with torch.no_grad():
        inputs = vae.inputs(*data)
        z0_ENL = Head(members, vae.config.shared, ()).latents(vae, inputs.codes, inputs.present_BK)
    linear = fit_linear(z0_ENL, labels)
    head = fit_full(vae, linear, inputs, labels, settings.epochs, settings.lr, settings.seed) if settings.full else linear
    said = out_of_fold(head.members(vae, *data), fold_N)
    fewer = [_of_fewer(share, z0_ENL, classes_NT, sizes, fold_N, balanced, settings.seed) for share in SHARES]
    fewer.append(_of_linear(linear, z0_ENL, classes_NT, fold_N))
    columns = zip(settings.target, found, said, zip(*fewer, strict=True), strict=True)
    return head, tuple(_target(*known, fold_N.numpy() >= 0) for known in columns)


def _of_fewer(
    share: float, z0_ENL: Tensor, classes_NT: Tensor, sizes: list[int], fold_N: Tensor, balanced: bool, seed: int
) -> list[tuple[int, np.ndarray]]:
    """Per target how many labels this share of the people has, and what a linear head that learnt from them says of everybody."""
    taken_N = torch.from_numpy(np.random.default_rng(seed).random(len(fold_N)) < share)
    few_NT = torch.where(taken_N[:, None], classes_NT, -1)
    return _of_linear(fit_linear(z0_ENL, Labels.of(few_NT, sizes, fold_N, len(z0_ENL), balanced)), z0_ENL, few_NT, fold_N)


def _of_linear(head: Head, z0_ENL: Tensor, known_NT: Tensor, fold_N: Tensor) -> list[tuple[int, np.ndarray]]:
    said = out_of_fold([f_ENC.detach().softmax(2) for f_ENC in head.logits(z0_ENL)], fold_N)
    return list(zip((known_NT >= 0).sum(0).tolist(), said, strict=True))


def out_of_fold(members: list[Tensor], fold_N: Tensor) -> list[np.ndarray]:
    """Probabilities by the member that has not seen a record, T of N x C; of records in no fold by the first."""
    rows = torch.arange(len(fold_N))
    return [p_ENC[fold_N.clamp_min(0), rows].numpy() for p_ENC in members]


def _target(
    column: str, known: tuple[tuple[str, ...], np.ndarray], said: np.ndarray, fewer: Sequence[tuple[int, np.ndarray]], judged: np.ndarray
) -> Target:
    levels, index = known
    kept = judged & (index >= 0)
    curve = [(people, auroc(index[kept], p[kept])) for people, p in fewer]
    told = tuple((people, score) for people, score in curve if score is not None and people >= SMALLEST_GROUP)
    return Target(column=column, levels=levels, people=int((index >= 0).sum()), auroc=auroc(index[kept], said[kept]), curve=told)


def auroc(index: np.ndarray, p: np.ndarray) -> float | None:
    """Mean over the classes that are there of each against the others; of two classes that of the second. None: there is one only."""
    there = np.unique(index)
    if len(there) < 2:
        return None
    each = [1] if p.shape[1] == 2 else there
    return float(np.mean([roc_auc_score(index == c, p[:, c]) for c in each]))
