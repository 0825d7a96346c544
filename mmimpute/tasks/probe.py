"""How much of a label z0 tells: a linear probe, beside the same one on mean-filled raw values, with modalities missing.

A probe learns from people as they are and is asked about others of whom modalities are hidden: what a service meets. Of several
members, z0 of the people it learns from was seen by the member in training, without the label; those asked about were not.
"""

from collections.abc import Iterator

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mmimpute.data.profile import SMALLEST_GROUP
from mmimpute.model.imputer import Imputer
from mmimpute.tasks.classifier import auroc
from mmimpute.tasks.people import NONE, People, columns, latent_means

INPUTS = ("z0", "raw")
RESAMPLES = 200


def probe(people: People, seed: int = 0) -> list[dict]:
    """One entry per set of hidden modalities: {hidden: names, kept: names, rows, z0, raw, difference}, of {auroc, accuracy} each with

    its 95% bootstrap interval over people [estimate, low, high]; difference: z0 - raw of the same people.
    """
    people = people.take(np.flatnonzero(people.label != NONE))
    hidden = list(_conditions(len(people.names)))
    chances = {(name, at): np.zeros((len(people.x), len(people.levels))) for name in INPUTS for at in range(len(hidden))}
    for member, learners, own in people.parts():
        probes = {name: _learnt(x, people.label[learners]) for name, x in _inputs(people, member, people.x[learners]).items()}
        for at, without in enumerate(hidden):
            for name, x in _inputs(people, member, _hide(people, people.x[own], without)).items():
                chances[name, at][np.ix_(own, probes[name].classes_)] = probes[name].predict_proba(x)
    found = []
    for at, without in enumerate(hidden):
        rows = _asked(people, without)
        if len(rows) >= SMALLEST_GROUP:
            told = {name: chances[name, at][rows] for name in INPUTS}
            names = {"hidden": [people.names[j] for j in without], "kept": [n for j, n in enumerate(people.names) if j not in without]}
            found.append(names | {"rows": len(rows)} | _scores(people.label[rows], told, np.random.default_rng(seed)))
    return found


def _conditions(modalities: int) -> Iterator[tuple[int, ...]]:
    """Nothing hidden, each one, all but each one."""
    yield ()
    for j in range(modalities) if modalities > 1 else ():
        yield (j,)
    for j in range(modalities) if modalities > 2 else ():
        yield tuple(k for k in range(modalities) if k != j)


def _asked(people: People, without: tuple[int, ...]) -> np.ndarray:
    """People of whom something is hidden and something is left; everyone where nothing is hidden."""
    if not without:
        return np.arange(len(people.x))
    kept = [j for j in range(len(people.names)) if j not in without]
    return np.flatnonzero(people.present[:, list(without)].any(1) & people.present[:, kept].any(1))


def _hide(people: People, x: np.ndarray, without: tuple[int, ...]) -> np.ndarray:
    x, starts = x.copy(), np.cumsum([0, *people.model.widths])
    for j in without:
        x[:, starts[j] : starts[j + 1]] = np.nan
    return x


def _inputs(people: People, member: Imputer, x: np.ndarray) -> dict[str, np.ndarray]:
    return {"z0": latent_means(member, x, people.model.widths), "raw": np.concatenate(columns(people.model, x), 1)}


def _learnt(x: np.ndarray, label: np.ndarray) -> Pipeline:
    """A penalty of the number of columns: a prior under which the linear predictor of standardised columns has variance 1."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=1 / x.shape[1], max_iter=2000)).fit(x, label)


def _scores(label: np.ndarray, chances: dict[str, np.ndarray], rng: np.random.Generator) -> dict:
    score = lambda y, p: {"auroc": auroc(y, p), "accuracy": float((p.argmax(1) == y).mean())}  # noqa: E731
    again: dict[str, list[dict]] = {name: [] for name in chances}
    for _ in range(RESAMPLES):
        rows = rng.integers(0, len(label), len(label))
        for name, p in chances.items():
            again[name].append(score(label[rows], p[rows]))
    own = {name: score(label, p) for name, p in chances.items()}
    own["difference"] = {m: own["z0"][m] - own["raw"][m] if own["z0"][m] is not None else None for m in own["z0"]}
    again["difference"] = [_minus(a, b) for a, b in zip(again["z0"], again["raw"], strict=True)]
    return {name: {m: _interval(own[name][m], [a[m] for a in again[name]]) for m in own[name]} for name in own}


def _minus(a: dict, b: dict) -> dict:
    return {m: None if a[m] is None else a[m] - b[m] for m in a}


def _interval(estimate: float | None, again: list[float | None]) -> list[float] | None:
    drawn = [v for v in again if v is not None]
    return None if estimate is None else [estimate, *np.quantile(drawn, (0.025, 0.975)).tolist()]
