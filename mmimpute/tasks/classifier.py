"""A classifier of the label per part of the people and modality: what judges whether generated values agree with the label."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from mmimpute.data.profile import SMALLEST_GROUP
from mmimpute.tasks.people import NONE, People, columns

HIDDEN = (64, 16)  # the last one is the feature of a record
DECAY = 3.0  # L2 penalty
EPOCHS = 60
MOST_LEARNERS = 5_000


class Classifier:
    """A small network of one modality's columns. Learners: N x C, and their levels, of which `levels` there are."""

    def __init__(self, columns_NC: np.ndarray, label_N: np.ndarray, levels: int, seed: int = 0):
        self.scale = StandardScaler().fit(columns_NC)
        self.levels = levels
        self.network = MLPClassifier(HIDDEN, alpha=DECAY, max_iter=EPOCHS, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed number of epochs is meant
            self.network.fit(self.scale.transform(columns_NC), label_N)

    def chances(self, columns_NC: np.ndarray) -> np.ndarray:
        """Probability of each level, N x levels."""
        found = np.zeros((len(columns_NC), self.levels))
        found[:, self.network.classes_] = self.network.predict_proba(self.scale.transform(columns_NC))
        return found

    def features(self, columns_NC: np.ndarray) -> np.ndarray:
        """What the last hidden layer says, N x 16."""
        x = self.scale.transform(columns_NC)
        for weight, bias in zip(self.network.coefs_[:-1], self.network.intercepts_[:-1], strict=True):
            x = np.maximum(x @ weight + bias, 0)
        return x


By = dict[int, dict[int, Classifier]]


def classifiers(people: People) -> By:
    """Modality -> part -> classifier that did not learn from the part. Modalities with too few labelled people are left out."""
    coded, present, found = columns(people.model, people.x), people.present, {}
    for j in range(len(people.names)):
        learners = present[:, j] & (people.label != NONE)
        if all(_enough(people.label[learners & (people.part != p)]) for p in np.unique(people.part)):
            found[j] = {int(p): _learnt(coded[j], people, np.flatnonzero(learners & (people.part != p))) for p in np.unique(people.part)}
    return found


def _enough(label_N: np.ndarray) -> bool:
    return (np.bincount(label_N, minlength=2) >= SMALLEST_GROUP).sum() >= 2


def _learnt(columns_NC: np.ndarray, people: People, rows: np.ndarray) -> Classifier:
    rows = rows[:MOST_LEARNERS]
    return Classifier(columns_NC[rows], people.label[rows], len(people.levels))


def judged(by: dict[int, Classifier], columns_NC: np.ndarray, part_N: np.ndarray) -> np.ndarray:
    """Probability of each level by the classifier of each one's part, N x levels."""
    levels = next(iter(by.values())).levels
    found = np.zeros((len(columns_NC), levels))
    for part, classifier in by.items():
        if (part_N == part).any():
            found[part_N == part] = classifier.chances(columns_NC[part_N == part])
    return found


def auroc(label_N: np.ndarray, chance_NM: np.ndarray) -> float | None:
    """Mean over levels of the area under the ROC curve against the others (of two: of the second); None where one level is all."""
    levels = [m for m in range(chance_NM.shape[1]) if 0 < (label_N == m).sum() < len(label_N)]
    levels = levels[-1:] if chance_NM.shape[1] == 2 else levels
    return float(np.mean([roc_auc_score(label_N == m, chance_NM[:, m]) for m in levels])) if levels else None
