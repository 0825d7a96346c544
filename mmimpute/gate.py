"""Whether a challenger takes the champion's place: both are asked about the same people, whom neither has seen.

Each modality is hidden in turn, as in `evaluation`. A subject's loss is the mean, over the values of a modality that it holds, of
the CRPS (numbers), log-loss (binary) or error (categorical), in units of what the column mean loses: the champion's training
marginal, the same for both. Beside it stand the log-likelihood of the hidden values, in nats a value, and the calibration: the
share of real values inside the 90% intervals, and the ECE of codes. For every binary outcome a logistic regression, cross-fitted on
the values that each model completed, says whether what is downstream gets worse; its loss is in units of the outcome's entropy.

The challenger has to be better overall (the mean over modalities) beyond noise: the lower bound of a paired bootstrap over subjects
lies above 0. And no modality, and no outcome, may get worse beyond a tolerance (`spec.GateSettings`). That second half is judged on
the estimates themselves, so that in a small cohort chance may keep a challenger, but chance alone hardly promotes one.

A model of another spec is another thing: where modalities, features, kinds or levels differ, only what both impute is compared, and
no gain is asked for, since the champion cannot do what the spec now says. What is worse beyond the tolerance still keeps the challenger.

What the comparison does not see: a member's stack and intervals are fitted out of fold, but where there is one member only they were
fitted on the very people who judge, of whom the challenger has seen those that came since the champion. These are few parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmimpute import registry
from mmimpute.data.profile import SMALLEST_GROUP, varies
from mmimpute.data.schema import CohortSchema, Modality, tabled
from mmimpute.data.split import fold
from mmimpute.data.tensors import to_model
from mmimpute.evaluation import INTERVAL, Turn, crps, log_loss, missed, most_frequent, reliability, turns
from mmimpute.registry import Model
from mmimpute.spec import GateSettings

MOST_DEVIATIONS = 5.0  # that count in a log-likelihood: one wild value must not decide
FOLDS = 5  # of the logistic regressions
PENALTY = 0.1  # their C: the inverse of the L2 penalty, on standardised columns
TOGETHER = 100  # resamples in memory


@dataclass(frozen=True)
class Measured:
    """What was measured of one modality on N subjects, NaN where one does not hold it.

    loss, marginal: of the model and of the column mean, in units of the latter's mean; nats: log-likelihood a value, numbers per
    training standard deviation; covered: share of its real values inside the 90% intervals; ece: of codes, None where there are none.
    """

    loss: np.ndarray
    marginal: np.ndarray
    nats: np.ndarray
    covered: np.ndarray
    ece: float | None

    @property
    def calibration(self) -> dict[str, float]:
        """The errors that there are: |share inside 90% intervals - 0.9|, and the ECE."""
        inside = {} if np.isnan(self.covered).all() else {"intervals": abs(float(np.nanmean(self.covered)) - INTERVAL)}
        return inside | ({} if self.ece is None else {"codes": self.ece})


def comparable(champion: CohortSchema, challenger: CohortSchema) -> list[str]:
    """The modalities that both impute, of the same features, kinds and levels."""
    theirs = {m.name: (m.features, m.shape, m.vocabulary) for m in champion.imputed}
    return [m.name for m in challenger.imputed if theirs.get(m.name) == (m.features, m.shape, m.vocabulary)]


def same_task(champion: CohortSchema, challenger: CohortSchema) -> bool:
    return [(m.name, m.features, m.impute) for m in champion.modalities] == [(m.name, m.features, m.impute) for m in challenger.modalities]


def translated(x: np.ndarray, given: CohortSchema, wanted: CohortSchema) -> np.ndarray:
    """Records of one schema as another has them: what only one of them knows, or spells in other levels, is not observed."""
    columns = {key: at for at, key in enumerate(_cells_of(given))}
    found = np.full((len(x), wanted.width), np.nan, x.dtype)
    for at, key in enumerate(_cells_of(wanted)):
        if key in columns:
            found[:, at] = x[:, columns[key]]
    return found


def _cells_of(schema: CohortSchema) -> list[tuple]:
    """What each value of a record is, in their order."""
    return [(m.name, m.shape, m.vocabulary, f) for m in schema.modalities for f in m.features]


def measure(model: Model, x: np.ndarray, place: np.ndarray, marginals: Mapping[str, dict]) -> dict[str, Measured]:
    """Modality -> what was measured on records x, n x width; place: the hash of each subject. marginals: see `profile.marginals`."""
    found = {}
    for turn in turns(model, x, fold(place, model.module.config.members)):
        said = [_predict(member, part, model.widths) for member, part in turn.parts]
        mean, std, lower, upper = (np.concatenate([values[turn.at] for values in column]) for column in zip(*said, strict=True))
        m0, s0 = (np.array(marginals[turn.modality.name][name]) for name in ("mean", "std"))
        found[turn.modality.name] = _measured(len(x), turn, (mean, std), (lower, upper), (m0, s0))
    return {name: m for name, m in found.items() if not np.isnan(m.loss).all()}


def _predict(member, x: np.ndarray, widths: list[int]) -> tuple[list[np.ndarray], ...]:
    with torch.inference_mode():
        said = member.predict(*to_model(x, widths), INTERVAL)
    return tuple([t.numpy() for t in getattr(said, name)] for name in ("mean", "std", "lower", "upper"))


def _measured(subjects: int, turn: Turn, said, bounds, marginal) -> Measured:
    """Scores of single values -> means per subject. said: mean and std; bounds; marginal: mean and std of the training values."""
    kinds = np.array([f.kind for f in turn.modality.features])
    cells = cell_scores(turn.modality, turn.truth, *said, *marginal)
    real, binary = kinds == "real", kinds == "binary"
    asked = ~np.isnan(turn.truth) & ~np.isnan(bounds[0])  # images and signals have no bounds
    inside = np.where(~asked, np.nan, (turn.truth >= bounds[0]) & (turn.truth <= bounds[1]))[:, real]
    per_subject = []
    for values in (*cells, inside):
        whole = np.full(subjects, np.nan)
        whole[turn.rows] = _row_means(values)
        per_subject.append(whole)
    return Measured(*per_subject, reliability(turn.truth[:, binary], said[0][:, binary])["ece"])


def _row_means(values: np.ndarray) -> np.ndarray:
    """Of what is not NaN; NaN where nothing is."""
    seen = ~np.isnan(values)
    return np.where(seen.any(1), np.where(seen, values, 0).sum(1) / np.maximum(seen.sum(1), 1), np.nan)


def cell_scores(modality: Modality, y, mean, std, m0, s0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, loss of the marginal, log-likelihood of every value, n x D; NaN where it is not observed.

    A feature without spread, or seen in fewer than SMALLEST_GROUP, counts nowhere. The probability of a level is not among what a
    prediction tells, so a categorical feature has no log-likelihood.
    """
    if modality.form == "text":
        loss, base = (np.broadcast_to(missed(y, told)[:, None], y.shape) for told in (mean, most_frequent(y)))
        typical = max(base.mean(), 1e-8)
        return loss / typical, base / typical, np.full(y.shape, np.nan)
    if modality.structured:
        return _whole_scores(y, mean, std, m0, s0)
    loss, marginal, nats = (np.full(y.shape, np.nan) for _ in range(3))
    for d, feature in enumerate(modality.features):
        seen = ~np.isnan(y[:, d])
        if seen.sum() < SMALLEST_GROUP or (feature.kind != "categorical" and not varies(m0[d], s0[d])):
            continue
        own, base, log_density = _feature_scores(feature.kind, *(a[seen, d].astype(np.float64) for a in (y, mean, std)), m0[d], s0[d])
        if base.mean() > 0:
            loss[seen, d], marginal[seen, d], nats[seen, d] = own / base.mean(), base / base.mean(), log_density
    return loss, marginal, nats


def _whole_scores(y, mean, std, m0, s0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of an image or a signal, whose values have one scale: some of them may hardly vary."""
    scale = float(np.sqrt(np.mean(s0**2))) or 1.0
    base = crps(y, m0, np.maximum(s0, 1e-6 * scale))
    loss, _, nats = _feature_scores("real", y, mean, std, m0, scale)
    typical = np.nanmean(base)
    return loss / typical, base / typical, nats


def _feature_scores(kind: str, y, mean, std, m0: float, s0: float) -> tuple[np.ndarray, np.ndarray, np.ndarray | float]:
    if kind == "categorical":
        return (y != mean).astype(float), (y != np.bincount(y.astype(int)).argmax()).astype(float), np.nan
    if kind == "binary":
        own = log_loss(y, mean)
        return own, log_loss(y, np.full_like(y, m0)), -own
    std = np.maximum(std, 1e-6 * s0)
    deviations = np.clip((y - mean) / std, -MOST_DEVIATIONS, MOST_DEVIATIONS)
    return crps(y, mean, std), crps(y, m0, s0), norm.logpdf(deviations) - np.log(std / s0)


# -- downstream -------------------------------------------------------------------------------------------------------


def completed(model: Model, x: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Records completed by the member that has not seen the subject, n x columns; categorical features as one column a level.

    Without images and signals.
    """
    folds = fold(place, model.module.config.members)
    whole = np.empty_like(x)
    for e in np.unique(folds):
        mean, *_ = _predict(model.module.member(e), x[folds == e], model.widths)
        whole[folds == e] = np.concatenate(mean, 1)
    levels = [(d, len(f.levels) if f.kind == "categorical" else 0) for d, _, f in tabled(model.schema)]
    coded = [whole[:, d, None] == np.arange(n) if n else whole[:, d, None] for d, n in levels]
    return np.concatenate([np.empty((len(x), 0)), *coded], 1).astype(np.float64)


def outcome_losses(columns: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """Log-loss of a cross-fitted logistic regression of a binary outcome, N, in units of the outcome's entropy; NaN where y is."""
    known = ~np.isnan(y)
    regression = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY, max_iter=1000))
    parts = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    said = cross_val_predict(regression, columns[known], y[known], cv=parts, method="predict_proba")[:, 1]
    share = y[known].mean()
    found = np.full(len(y), np.nan)
    found[known] = log_loss(y[known], said) / log_loss(y[known], np.full(known.sum(), share)).mean()
    return found


def binary_outcomes(beside: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those columns of text that hold 0 and 1, or false and true, as floats with NaN; each with SMALLEST_GROUP people or more."""
    numbers = {"": np.nan, "0": 0.0, "0.0": 0.0, "false": 0.0, "1": 1.0, "1.0": 1.0, "true": 1.0}
    found = {}
    for column, values in beside.items():
        y = np.array([numbers.get(v, 2.0) for v in values])
        if not (y == 2).any() and min((y == 0).sum(), (y == 1).sum()) >= SMALLEST_GROUP:
            found[column] = y
    return found


@dataclass(frozen=True)
class Told:
    """What one model shows on the people asked about: its modalities and the losses of the regressions, by outcome."""

    modalities: dict[str, Measured]
    outcomes: dict[str, np.ndarray]


def tell(model: Model, x: np.ndarray, place: np.ndarray, outcomes: Mapping[str, np.ndarray], marginals: Mapping, seed: int) -> Told:
    """outcomes: 0, 1 and NaN, N each (see `binary_outcomes`); the other arguments as those of `measure`."""
    outcomes = outcomes if tabled(model.schema) else {}  # regressions read single values
    columns = completed(model, x, place) if outcomes else x
    return Told(measure(model, x, place, marginals), {name: outcome_losses(columns, y, seed) for name, y in outcomes.items()})


def compare(
    champion: Model, challenger: Model, x: np.ndarray, place: np.ndarray, outcomes: Mapping[str, np.ndarray], settings: GateSettings
) -> tuple[dict, Told]:
    """The decision, and what the challenger shows. x: records by the challenger's schema, of people `split.held_out` of both."""
    names = comparable(champion.schema, challenger.schema)
    theirs, own = (registry.marginals(m.url) for m in (champion, challenger))
    new = tell(challenger, x, place, outcomes, own | {n: theirs[n] for n in names}, settings.seed)
    old = tell(champion, translated(x, challenger.schema, champion.schema), place, outcomes, theirs, settings.seed)
    pairs = {name: (old.outcomes[name], new.outcomes[name]) for name in old.outcomes if name in new.outcomes}
    before = {n: m for n, m in old.modalities.items() if n in names}
    return decide(before, new.modalities, pairs, settings, same_task(champion.schema, challenger.schema)), new


# -- decision ---------------------------------------------------------------------------------------------------------


def bootstrap(gain: np.ndarray, settings: GateSettings) -> np.ndarray:
    """Means of the columns of gain, N x M with NaN, over resampled subjects: resamples x M (Efron & Tibshirani 1993, ch. 6)."""
    seen, rng = ~np.isnan(gain), np.random.default_rng(settings.seed)
    filled, subjects, means = np.where(seen, gain, 0.0), len(gain), []
    for start in range(0, settings.resamples, TOGETHER):
        size = min(TOGETHER, settings.resamples - start)
        times = rng.multinomial(subjects, np.full(subjects, 1 / subjects), size).astype(float)
        means.append((times @ filled) / np.maximum(times @ seen, 1))
    return np.concatenate(means)


def decide(
    champion: Mapping[str, Measured],
    challenger: Mapping[str, Measured],
    outcomes: Mapping[str, tuple[np.ndarray, np.ndarray]],
    settings: GateSettings,
    same: bool = True,
) -> dict:
    """The decision on modalities and outcomes that both know: {promoted, reason, subjects, overall, modalities, outcomes}.

    outcomes: losses of champion and challenger, N each. same: whether both have the same schema; else no gain is asked for.
    """
    names = [n for n in challenger if n in champion]
    if not names:
        return _undecided(same)
    pairs = {n: (champion[n].loss, challenger[n].loss) for n in names}
    gain = np.stack([before - after for before, after in (*pairs.values(), *outcomes.values())], 1)
    means = bootstrap(gain, settings)
    tail = (1 - settings.confidence) / 2
    told = lambda at, draws: {"gain": float(at)} | dict(zip(("low", "high"), np.quantile(draws, (tail, 1 - tail)).tolist(), strict=True))  # noqa: E731
    each = [told(np.nanmean(gain[:, at]), means[:, at]) for at in range(gain.shape[1])]
    overall = told(np.mean([e["gain"] for e in each[: len(names)]]), means[:, : len(names)].mean(1))
    modalities = {n: e | _beside(champion[n], challenger[n]) for n, e in zip(names, each, strict=False)}
    found = {
        "subjects": int((~np.isnan(gain[:, : len(names)])).any(1).sum()),
        "overall": overall,
        "modalities": modalities,
        "outcomes": dict(zip(outcomes, each[len(names) :], strict=True)),
    }
    return _verdict(found, settings, same) | found


def _undecided(same: bool) -> dict:
    """Nothing can be compared: a challenger of the same kind has shown nothing, one of another spec is what was asked for."""
    if same:
        return {"promoted": False, "reason": f"kept: fewer than {SMALLEST_GROUP} people that neither model has seen hold any modality"}
    return {"promoted": True, "reason": "promoted without a comparison: the spec is another, and no modality is the same in both models"}


def _beside(champion: Measured, challenger: Measured) -> dict:
    """Log-likelihood and calibration errors of both."""
    both = ~np.isnan(champion.nats) & ~np.isnan(challenger.nats)
    nats = [float(m.nats[both].mean()) if both.any() else None for m in (champion, challenger)]
    before, after = champion.calibration, challenger.calibration
    return {"nats": nats, "calibration": {what: [before[what], after[what]] for what in before if what in after}}


def _verdict(found: dict, settings: GateSettings, same: bool) -> dict:
    worse, overall = list(_worse(found, settings)), found["overall"]
    interval = f"{settings.confidence:.0%} interval {overall['low']:.4f} to {overall['high']:.4f}"
    if worse:
        return {"promoted": False, "reason": "kept: " + "; ".join(worse)}
    if not same:
        return {"promoted": True, "reason": "promoted: the spec is another, and of what both impute nothing is worse beyond tolerance"}
    if overall["low"] <= 0:
        return {"promoted": False, "reason": f"kept: not better beyond noise: overall gain {overall['gain']:.4f}, {interval}"}
    reason = f"promoted: better by {overall['gain']:.4f} ({interval}), and nothing is worse beyond tolerance"
    return {"promoted": True, "reason": reason}


def _worse(found: dict, settings: GateSettings):
    """In words, what regresses beyond its tolerance."""
    for name, entry in (*found["modalities"].items(), *found["outcomes"].items()):
        if -entry["gain"] > settings.tolerance:
            yield f"{name} is worse by {-entry['gain']:.3f} (tolerance {settings.tolerance:.3f})"
    for name, entry in found["modalities"].items():
        before, after = entry["nats"]
        if before is not None and before - after > settings.likelihood_tolerance:
            lost = f"{before - after:.3f} nats a value (tolerance {settings.likelihood_tolerance:.3f})"
            yield f"the log-likelihood of {name} falls by {lost}"
        for what, (error, now) in entry["calibration"].items():
            if now - error > settings.calibration_tolerance:
                yield (
                    f"the calibration error of {name} ({what}) grows from {error:.3f} to {now:.3f} "
                    f"(tolerance {settings.calibration_tolerance:.3f})"
                )
