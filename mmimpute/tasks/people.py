"""The people that tasks are asked about, in memory, and what is learnt of their label.

Shape suffixes: N people, D features, C columns, P parts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmimpute.data.labels import classes
from mmimpute.data.schema import CohortSchema, Modality
from mmimpute.data.split import fold
from mmimpute.data.tensors import to_model
from mmimpute.errors import UserError
from mmimpute.model.imputer import Imputer
from mmimpute.model.vae import Inputs
from mmimpute.registry import Model

PARTS = 5  # of cross-fitting, where one member is asked only
NONE = -1  # of people whose label is not known, see `labels.classes`


@dataclass(frozen=True)
class People:
    """Held-out people. x: N x width, NaN where not observed; fold: the member to ask about each; part: of P, what learns of the label
    learns from the other parts, and where several members are asked a part is a fold; label: index of a level, or NONE.
    """

    model: Model
    x: np.ndarray
    fold: np.ndarray
    part: np.ndarray
    label: np.ndarray
    levels: tuple[str, ...]

    def take(self, rows: np.ndarray) -> "People":
        return People(self.model, self.x[rows], self.fold[rows], self.part[rows], self.label[rows], self.levels)

    @property
    def names(self) -> list[str]:
        return [m.name for m in self.model.schema.modalities]

    def of(self, j: int) -> np.ndarray:
        """Values of modality j, N x D."""
        starts = np.cumsum([0, *self.model.widths])
        return self.x[:, starts[j] : starts[j + 1]]

    @property
    def present(self) -> np.ndarray:
        """N x K: something of the modality is observed."""
        return np.stack([~np.isnan(self.of(j)).all(1) for j in range(len(self.names))], 1)

    def parts(self) -> Iterator[tuple[Imputer, np.ndarray, np.ndarray]]:
        """Per part the member that has not seen it, the rows of the other parts, and its own rows."""
        for part in np.unique(self.part):
            own = np.flatnonzero(self.part == part)
            yield self.model.module.member(int(self.fold[own[0]])), np.flatnonzero(self.part != part), own


def people_of(model: Model, x: np.ndarray, place: np.ndarray, label: np.ndarray | None = None, column: str | None = None) -> People:
    """Records that the model's members have not seen. place: hashes of the subjects; label: a column as text, empty where not known.

    Raises UserError as `labels.classes`.
    """
    folds = fold(place, model.module.config.members)
    part = folds if len(np.unique(folds)) > 1 else np.argsort(np.argsort(place, kind="stable")) % PARTS
    if label is None:
        return People(model, x, folds, part, np.full(len(x), NONE), ())
    levels, index = classes(label, f"--label: column {column!r}")
    return People(model, x, folds, part, index, levels)


def check_label(schema: CohortSchema, column: str | None) -> None:
    """Raises UserError for a column that the model reads: it would tell of itself."""
    if column in schema.columns:
        raise UserError(f"--label: the model reads {column!r}; give an outcome, which it has never seen")


def columns(model: Model, x: np.ndarray) -> list[np.ndarray]:
    """Per modality what a classifier reads, N x C: values on the model's scale, 0 (the mean) where not observed; levels one-hot; how
    often each token of a text's vocabulary is in it."""
    inputs: Inputs = model.module.vae.inputs(*to_model(x, model.widths))
    return [
        coded(z.numpy(), filled.numpy(), seen.numpy(), modality)
        for z, filled, seen, modality in zip(inputs.z, inputs.filled, inputs.observed, model.schema.modalities, strict=True)
    ]


def coded(z_ND: np.ndarray, filled_ND: np.ndarray, seen_ND: np.ndarray, modality: Modality) -> np.ndarray:
    if modality.layout == "text":
        rows, places = filled_ND.nonzero()
        bag_NV = np.zeros((len(filled_ND), len(modality.vocabulary)), np.float32)
        np.add.at(bag_NV, (rows, filled_ND[rows, places].astype(int) - 1), 1)
        return bag_NV
    levels = [len(f.levels) if f.kind == "categorical" else 0 for f in modality.features]
    if not any(levels):
        return z_ND
    each = [(filled_ND[:, d, None] == np.arange(n)) & seen_ND[:, d, None] if n else z_ND[:, d, None] for d, n in enumerate(levels)]
    return np.concatenate(each, 1).astype(np.float32)


def with_holes(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Complete generated values that lack what real records lack: only then are the two the same but for the values."""
    return np.where(np.isnan(like), np.nan, values)


def latent_means(member: Imputer, x: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Mean of q(z0 | x) of a model of one member, N x L; of p(z0) where nothing is observed."""
    values, observed = to_model(x, widths)
    with torch.inference_mode():
        inputs = member.vae.inputs(values, observed)
        return member.vae.latents(inputs, 2).mean_EBL[0].numpy()
