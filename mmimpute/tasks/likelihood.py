"""How probable the model finds people that it has not seen: log p(x observed) and log p(one modality | the others), in nats.

Importance-weighted bounds of 1,000 samples (see `model.marginal`): what the model says of a record is at least this. Conditionals are
differences of two bounds. Real values count per training standard deviation, so that models of the same cohort can be compared.
"""

import numpy as np
import torch

from mmimpute.data.profile import SMALLEST_GROUP
from mmimpute.data.tensors import to_model
from mmimpute.model.marginal import log_marginal
from mmimpute.tasks.people import People

SAMPLES = 1000
MOST = 200  # people: a record costs 1,000 passes through every decoder
TOGETHER = 50


def likelihood(people: People, samples: int = SAMPLES, seed: int = 0) -> dict:
    """{samples, rows, nats, per_value, elbo, effective (samples, median), conditional: {modality: {rows, nats, per_value}}}.

    nats, per_value, elbo: {mean, std_error} over people; elbo: the bound of a single sample. Conditionals of modalities that are imputed.
    """
    some = people.take(np.linspace(0, len(people.x) - 1, min(MOST, len(people.x))).astype(int))
    some = some.take(np.flatnonzero(some.present.any(1)))
    values_N, whole = (~np.isnan(some.x)).sum(1), weighed(some, some.x, samples, seed)
    found = {"samples": samples, "rows": len(some.x), "effective": float(np.median(whole[:, 2]))}
    found |= {"nats": mean(whole[:, 0]), "per_value": mean(whole[:, 0] / values_N), "elbo": mean(whole[:, 1])}
    conditional, start = {}, 0
    for j, modality in enumerate(people.model.schema.modalities):
        rows = np.flatnonzero(some.present[:, j] & (some.present.sum(1) > 1))
        if modality.impute and len(rows) >= SMALLEST_GROUP:
            others = some.x[rows]
            others[:, start : start + people.model.widths[j]] = np.nan
            nats = whole[rows, 0] - weighed(some.take(rows), others, samples, seed)[:, 0]
            own = values_N[rows] - (~np.isnan(others)).sum(1)
            conditional[modality.name] = {"rows": len(rows), "nats": mean(nats), "per_value": mean(nats / own)}
        start += people.model.widths[j]
    return found | {"conditional": conditional}


def weighed(people: People, x: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """log p, ELBO and effective samples of records x by the member of each one's fold, N x 3."""
    found = np.empty((len(x), 3))
    for e in np.unique(people.fold):
        vae, rows = people.model.module.vae.member(int(e)), np.flatnonzero(people.fold == e)
        generator = torch.Generator().manual_seed(seed)
        for part in np.split(rows, range(TOGETHER, len(rows), TOGETHER)):
            told = log_marginal(vae, *to_model(x[part], people.model.widths), samples, generator)
            found[part] = torch.stack([t[0] for t in told], 1).numpy()
    return found


def mean(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "std_error": float(values.std(ddof=1) / np.sqrt(len(values)))}
