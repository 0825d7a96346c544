"""How well a model predicts each modality of single records, for comparison with other records: log scores."""

from collections.abc import Sequence

import numpy as np
import torch

from mmimpute.data.profile import Statistics
from mmimpute.data.reference import known
from mmimpute.data.schema import CohortSchema, tabled
from mmimpute.data.split import fold
from mmimpute.data.tensors import to_model
from mmimpute.model.imputer import Imputer

LEAST = 50  # records below which nothing is said of them
MOST_SCORED = 2_000
SCORED_VALUES = 1 << 20  # of a batch


def score(imputer: Imputer, x: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """`MultiModalVAE.log_score` of every modality of records x (N x width, NaN where not observed), N x K, by the member of
    each one's fold; NaN where a record lacks the modality or holds nothing else."""
    widths = [m.width for m in imputer.config.modalities]
    found = np.full((len(x), len(widths)), np.nan, np.float32)
    size = max(1, SCORED_VALUES // x.shape[1])
    for e in range(imputer.config.members):
        vae, rows = imputer.vae.member(e), np.flatnonzero(folds == e)
        for part in np.split(rows, range(size, len(rows), size)):
            found[part] = _score_batch(vae, *to_model(x[part], widths, imputer.device))
    return found


def _score_batch(vae, x: Sequence[torch.Tensor], observed: Sequence[torch.Tensor]) -> np.ndarray:
    with torch.inference_mode():
        scores_BK = torch.cat([vae.log_score(x, observed, j).T for j in range(len(x))], 1)
    present_BK = torch.stack([o.any(1) for o in observed], 1)
    judged_BK = present_BK & (present_BK.sum(1, keepdim=True) > 1)
    return torch.where(judged_BK, scores_BK, torch.nan).cpu().numpy()


def summarise(names: Sequence[str], scores: np.ndarray) -> dict[str, dict | None]:
    """Per modality {mean, std, n} of the records' scores; None of fewer than LEAST."""
    found = {}
    for name, column in zip(names, scores.T.astype(np.float64), strict=True):
        own = column[~np.isnan(column)]
        found[name] = {"mean": float(own.mean()), "std": float(own.std()), "n": len(own)} if len(own) >= LEAST else None
    return found


def some(folds: np.ndarray, order: np.ndarray) -> np.ndarray:
    """At most MOST_SCORED of the records that a member judges, evenly over `order`, which neither sharding nor time changes."""
    rows = np.argsort(order, kind="stable")
    rows = rows[folds[rows] >= 0]
    return rows[np.linspace(0, len(rows) - 1, min(MOST_SCORED, len(rows))).astype(int)]


def score_drop(imputer: Imputer, schema: CohortSchema, drop: Statistics) -> np.ndarray:
    """Scores of some of a drop's records: by the member that did not learn from them, should they have been in training.

    Values that the model does not know are taken as missing.
    """
    x, place = np.concatenate(drop.sample), np.concatenate(drop.place)
    folds = np.maximum(fold(place, imputer.config.members), 0)  # of a single member most people have no fold; new ones it has not seen
    rows = some(folds, place)
    x = x[rows]
    for at, _, feature in tabled(schema):
        x[~known(feature, x[:, at]), at] = np.nan
    return score(imputer, x, folds[rows])
