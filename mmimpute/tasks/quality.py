"""Do samples of a modality look like real ones? In the features of a classifier that did not learn from the real ones compared.

Frechet distance of two Gaussians (Heusel et al. 2017): 0 = the same mean and covariance. Density and coverage (Naeem et al. 2020):
1 and nearly 1 = the same distribution; density falls where samples lie off the data, coverage where the samples miss some of it; where
many records are alike, as of a few binary features, balls have no size and density is far above 1. All depend on how many there are,
so beside each stands its value for real people in the place of the samples, as many.
"""

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from mmimpute.tasks.classifier import By
from mmimpute.tasks.people import People, columns

NEIGHBOURS = 5
LEAST = 30  # records of a half: what the distances of fewer say is noise
METRICS = ("frechet", "density", "coverage")


def frechet(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2) of the Gaussians with their moments (Dowson & Landau 1982)."""
    first, second = (np.atleast_2d(np.cov(x.astype(np.float64), rowvar=False)) for x in (a_ND, b_MD))
    root = _root(first)
    # tr (A B)^1/2 = tr (A^1/2 B A^1/2)^1/2, whose matrix is symmetric and has no negative eigenvalue.
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    shift = a_ND.mean(0, np.float64) - b_MD.mean(0, np.float64)
    return float(max(0.0, shift @ shift + np.trace(first) + np.trace(second) - 2 * cross))


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def density_coverage(real_ND: np.ndarray, made_MD: np.ndarray, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Eqs. 3 and 4 of Naeem et al. 2020: a real point's ball reaches to its k-th nearest real neighbour."""
    radius_N = NearestNeighbors(n_neighbors=k + 1).fit(real_ND).kneighbors(real_ND)[0][:, -1]  # the nearest is the point itself
    inside_NM = cdist(real_ND, made_MD) <= radius_N[:, None]
    return float(inside_NM.sum() / (k * len(made_MD))), float(inside_NM.any(1).mean())


def quality(people: People, by: By, draws: dict[int, tuple[np.ndarray, np.ndarray]], generated: np.ndarray, seed: int = 0) -> dict:
    """Modality -> {rows, halves, generated, imputed}, of METRICS each: means over parts of the distance to one half of the people of

    the other half itself, synthetic records (see `coherence.synthetic`), and draws of the other half given their other modalities
    (see `coherence.drawn`; None where it is not imputed). Synthetic records are of everybody, and a modality may be held by some
    kind of people only; draws are of the very people. Modalities of which a part holds too few are left out.
    """
    rng, real, made = np.random.default_rng(seed), columns(people.model, people.x), columns(people.model, generated)
    found = {}
    for j, own in by.items():
        told = _told(people, j, draws[j]) if j in draws else None
        parts = [_halves(np.flatnonzero(people.present[:, j] & (people.part == p)), rng) for p in own]
        if any(len(b) < LEAST for _, b in parts):
            continue
        sets = []
        for (a, b), classifier in zip(parts, own.values(), strict=True):
            samples = {"halves": real[j][b], "generated": made[j][rng.choice(len(made[j]), len(b), len(b) > len(made[j]))]}
            samples |= {"imputed": told[b]} if told is not None else {}
            features = classifier.features(real[j][a])
            sets.append({name: compared(features, classifier.features(x)) for name, x in samples.items()})
        means = {name: {m: float(np.mean([s[name][m] for s in sets])) for m in METRICS} for name in sets[0]}
        found[people.names[j]] = {"rows": sum(len(b) for _, b in parts), "imputed": None} | means
    return found


def compared(real_ND: np.ndarray, made_MD: np.ndarray) -> dict[str, float]:
    return dict(zip(METRICS, (frechet(real_ND, made_MD), *density_coverage(real_ND, made_MD)), strict=True))


def _halves(rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    rows = rng.permutation(rows)
    return rows[: len(rows) // 2], rows[len(rows) // 2 : len(rows) // 2 * 2]


def _told(people: People, j: int, draws: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Columns of modality j of all people, drawn where it could be."""
    (rows, values), start, x = draws, sum(people.model.widths[:j]), people.x.copy()
    x[rows, start : start + values.shape[1]] = values
    return columns(people.model, x)[j]
