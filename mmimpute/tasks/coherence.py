"""Do generated modalities agree with the others? Judged by classifiers of a label, trained on real people (Shi et al. 2019, sec. 4).

Conditional: modality j, one draw given the other modalities, is classified as the person's true label; beside it the classifier's
accuracy on the real values of the same people, which is what perfect draws would get. Joint: on how many synthetic records the
classifiers of all modalities agree, beside real complete records.
"""

import numpy as np
import torch
from sklearn.utils import check_random_state

from mmimpute.data.profile import SMALLEST_GROUP
from mmimpute.data.tensors import to_model
from mmimpute.evaluation import turns
from mmimpute.tasks.classifier import By, auroc, judged
from mmimpute.tasks.people import NONE, People, columns, with_holes

MOST_SYNTHETIC = 5_000


def drawn(people: People, seed: int = 0) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Modality -> the people that hold it and something else, and one draw of it given what else they hold, with their own holes."""
    found = {}
    for turn in turns(people.model, people.x, people.fold):
        generator = torch.Generator().manual_seed(seed)
        parts = [
            member.impute([(v, 1) for v in to_model(part, people.model.widths)[0]], generator=generator) for member, part in turn.parts
        ]
        values = np.concatenate([part[turn.at].numpy() for part in parts])
        found[turn.at] = turn.rows, with_holes(values, turn.truth)
    return found


def synthetic(people: People, seed: int = 0) -> np.ndarray:
    """Synthetic records with the holes of real ones that are drawn at random, as many as there are people, M x width."""
    rows = min(len(people.x), MOST_SYNTHETIC)
    with torch.inference_mode():
        values = people.model.module.generate(rows, torch.Generator().manual_seed(seed))
    x = torch.cat(values, 1).numpy()
    return _spread(x, people, check_random_state(seed))


def _spread(x: np.ndarray, people: People, random: np.random.RandomState) -> np.ndarray:
    """In random order, as `generate` sorts by member; per modality with the holes of people who hold it."""
    x, start = x[random.permutation(len(x))], 0
    for j, width in enumerate(people.model.widths):
        holders = np.flatnonzero(people.present[:, j])
        if len(holders):
            like = people.of(j)[random.choice(holders, len(x))]
            x[:, start : start + width] = with_holes(x[:, start : start + width], like)
        start += width
    return x


def coherence(people: People, by: By, draws: dict[int, tuple[np.ndarray, np.ndarray]], generated: np.ndarray) -> dict:
    """{conditional: {modality: {rows, commonest, accuracy, coherence, auroc, auroc_drawn}}, joint: {rows, real, synthetic, chance}}.

    draws: see `drawn`; generated: see `synthetic`.
    """
    coded, conditional = columns(people.model, people.x), {}
    for j, (rows, values) in draws.items():
        known = people.label[rows] != NONE
        if j in by and known.sum() >= SMALLEST_GROUP:
            rows, x = rows[known], people.x[rows[known]]
            start = sum(people.model.widths[:j])
            x[:, start : start + values.shape[1]] = values[known]
            told = (judged(by[j], c, people.part[rows]) for c in (coded[j][rows], columns(people.model, x)[j]))
            conditional[people.names[j]] = _conditional(people.label[rows], *told)
    return {"conditional": conditional, "joint": _joint(people, by, coded, generated) if len(by) > 1 else None}


def _conditional(label_N: np.ndarray, real_NM: np.ndarray, drawn_NM: np.ndarray) -> dict:
    return {
        "rows": len(label_N),
        "commonest": float(np.bincount(label_N).max() / len(label_N)),
        "accuracy": float((real_NM.argmax(1) == label_N).mean()),
        "coherence": float((drawn_NM.argmax(1) == label_N).mean()),
        "auroc": auroc(label_N, real_NM),
        "auroc_drawn": auroc(label_N, drawn_NM),
    }


def _joint(people: People, by: By, coded: list[np.ndarray], generated: np.ndarray) -> dict | None:
    """None where fewer than SMALLEST_GROUP people hold all modalities that are judged."""
    rows = np.flatnonzero(people.present[:, list(by)].all(1))
    if len(rows) < SMALLEST_GROUP:
        return None
    parts = np.unique(people.part)
    told, made = columns(people.model, generated), parts[np.arange(len(generated)) % len(parts)]
    real_KN = np.stack([judged(by[j], coded[j][rows], people.part[rows]).argmax(1) for j in by])
    synthetic_KM = np.stack([judged(by[j], told[j], made).argmax(1) for j in by])
    return {
        "rows": len(rows),
        "real": agreement(real_KN),
        "synthetic": agreement(synthetic_KM),
        "chance": float(np.prod([np.bincount(p, minlength=len(people.levels)) / len(p) for p in synthetic_KM], 0).sum()),
    }


def agreement(levels_KN: np.ndarray) -> float:
    """Share of records of which all K classifiers say the same."""
    return float((levels_KN == levels_KN[0]).all(0).mean())
