"""How good generated images of digits are: do they show the right digit, do they look real? Judged by classifiers of real images.

Shapes: V views, N records. An image is C x H x W uint8.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

FEATURES, EPOCHS, BATCH = 64, 6, 128


class Made(NamedTuple):
    """What a model generates for N test records.

    one: V x V x N x C x H x W, [i, j] is view j from view i alone. others: V x N x C x H x W, each view from all the others.
    joint: V x N x C x H x W, the views of synthetic records.
    """

    one: np.ndarray
    others: np.ndarray
    joint: np.ndarray


class Judge(nn.Module):
    """A classifier of the digits of one view."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.AdaptiveMaxPool2d(4), nn.Flatten()),
            *(nn.Linear(16 * 64, FEATURES), nn.ReLU()),
        )
        self.last = nn.Linear(FEATURES, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x))

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """N x FEATURES, before the last layer."""
        return np.concatenate([self.body(pixels(part)).numpy() for part in np.split(images, range(BATCH, len(images), BATCH))])

    @torch.inference_mode()
    def labels(self, images: np.ndarray) -> np.ndarray:
        return self.last(torch.from_numpy(self.features(images))).argmax(1).numpy()


def pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images.astype(np.float32)) / 255 - 0.5


def train_judge(images: np.ndarray, labels: np.ndarray, epochs: int = EPOCHS) -> Judge:
    """Deterministic: seeded, one epoch after the other over all records."""
    torch.manual_seed(0)
    judge, y = Judge(images.shape[1]).train(), torch.from_numpy(labels)
    steps = epochs * -(-len(y) // BATCH)
    optimiser = torch.optim.Adam(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps)
    for _ in range(epochs):
        for index in torch.randperm(len(y)).split(BATCH):
            optimiser.zero_grad()
            nn.functional.cross_entropy(judge(pixels(images[index])), y[index]).backward()
            optimiser.step()
            schedule.step()
    return judge.eval()


def score(judges: Sequence[Judge], made: Made, labels: np.ndarray, real: Sequence[np.ndarray]) -> dict[str, float]:
    """Scores of a model. labels: the digits of the N records that `one` and `others` were made from; real: the views of other real records.

    conditional_one, conditional_others: share of generated views that show the record's digit, mean over (pairs of) views;
    joint: share of synthetic records all of whose views show one digit; frechet_others, frechet_joint: mean over views.
    """
    views = range(len(judges))
    right = [np.mean(judges[j].labels(made.one[i, j]) == labels) for i in views for j in views if i != j]
    synthetic = np.stack([judge.labels(x) for judge, x in zip(judges, made.joint, strict=True)])
    known = [judge.features(x) for judge, x in zip(judges, real, strict=True)]
    found = {
        "conditional_one": np.mean(right),
        "conditional_others": np.mean([np.mean(judge.labels(x) == labels) for judge, x in zip(judges, made.others, strict=True)]),
        "joint": np.mean((synthetic == synthetic[0]).all(0)),
        "frechet_others": np.mean([frechet(judges[j].features(made.others[j]), known[j]) for j in views]),
        "frechet_joint": np.mean([frechet(judges[j].features(made.joint[j]), known[j]) for j in views]),
    }
    return {name: float(value) for name, value in found.items()}


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """Squared Frechet distance of the two Gaussians of these means and covariances (Dowson & Landau 1982); N x F features each.

    tr sqrt(AB) is the sum of the square roots of AB's eigenvalues, which are real and not negative.
    """
    a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    return float(((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root)
