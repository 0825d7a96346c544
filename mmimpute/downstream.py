"""What imputation does for those who use it: outcome models on complete cases, mean-filled and imputed covariates.

Outcomes are never an input of the model, so what it imputes cannot leak them, whoever it learnt from. For estimates that
is a fault: draws that do not know the outcome are as if it had nothing to do with what is missing, and weaken every
coefficient of it. So the draws are also weighed by the outcome (substantive-model-compatible imputation, Bartlett et al.
2015, by sampling-importance-resampling among each person's draws). For predictions it is right: the outcome is not known.
Shape suffixes: N people, P covariates, M draws, A analyses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmimpute.data.profile import SMALLEST_GROUP
from mmimpute.errors import UserError
from mmimpute.outcomes import NotEstimable, Outcome
from mmimpute.rubin import Pooled, pool

COMPLETE, FILLED, IMPUTED, DRAWN, WEIGHED = (
    "complete cases",
    "mean-filled",
    "imputed",
    "multiple imputation, blind to the outcome",
    "multiple imputation",
)
EVENTS_PER_COVARIATE = 10  # fewer give biased estimates (Peduzzi et al. 1996)
ROUNDS = 5  # of weighing: a person's draws are a handful, so that it settles at once
FOLDS = 5
RESAMPLES = 500
SMALLER_IS_BETTER = {"Brier score"}


@dataclass(frozen=True)
class Study:
    """People with their outcome and covariates: as observed (NaN: not), as imputed, and M times with draws for what is missing."""

    names: tuple[str, ...]
    observed_NP: np.ndarray
    imputed_NP: np.ndarray
    draws_MNP: np.ndarray
    outcome: Outcome

    @property
    def complete(self) -> np.ndarray:
        return ~np.isnan(self.observed_NP).any(1)


def standardised(study: Study) -> Study:
    """Covariates in standard deviations of the observed values, the same in every analysis; those that do not vary are left out.

    Raises UserError where none is left, or fewer than SMALLEST_GROUP people have, or have not, the outcome.
    """
    if study.outcome.informative < SMALLEST_GROUP:
        raise UserError(f"fewer than {SMALLEST_GROUP} people with the event (or without it) have these covariates: no outcome model")
    seen = np.isfinite(study.observed_NP).sum(0) >= SMALLEST_GROUP
    with np.errstate(invalid="ignore"):
        mean, std = (f(np.where(seen, study.observed_NP, 0.0), 0) for f in (np.nanmean, np.nanstd))
    kept = std > 1e-8 * np.maximum(np.abs(mean), 1)
    if not kept.any():
        raise UserError("no covariate varies among these people; choose others with --features")
    names = tuple(name for name, k in zip(study.names, kept, strict=True) if k)
    scaled = [((x - mean) / np.where(kept, std, 1))[..., kept] for x in (study.observed_NP, study.imputed_NP, study.draws_MNP)]
    return Study(names, *scaled, study.outcome)


def compare(study: Study, seed: int = 0) -> dict:
    """Estimates, predictions and what they say: plain values, no group under SMALLEST_GROUP people.

    {people, complete, informative, covariates, estimates: {analysis: [coefficient]} (None: too few events for it, or not
    estimable), scores: {analysis: {group: {metric: value}}}, differences, verdicts}
    """
    study = standardised(study)
    estimates = _estimates(study, np.random.default_rng(seed))
    predicted = _predictions(study, np.random.default_rng(seed))
    scores, differences = _compared(study, predicted, np.random.default_rng(seed))
    complete = int(study.complete.sum())
    return {
        "people": len(study.complete),
        "complete": complete if complete >= SMALLEST_GROUP or not complete else f"<{SMALLEST_GROUP}",
        "informative": study.outcome.informative,
        "covariates": len(study.names),
        "estimates": {name: found and _rows(study.names, found) for name, found in estimates.items()},
        "scores": scores,
        "differences": differences,
        "verdicts": _narrower(estimates) + [_verdict(d) for d in differences],
    }


# -- estimates -------------------------------------------------------------------------------------------------------


def _estimates(study: Study, rng: np.random.Generator) -> dict[str, Pooled | None]:
    whole, outcome = study.complete, study.outcome
    sets = {
        COMPLETE: lambda: [study.observed_NP[whole]],
        FILLED: lambda: [_filled(study)],
        IMPUTED: lambda: [study.imputed_NP],
        DRAWN: lambda: study.draws_MNP,
        WEIGHED: lambda: weighed(study.draws_MNP, outcome, lambda x: outcome.draw(x, rng), rng),
    }
    few = EVENTS_PER_COVARIATE * len(study.names)
    people = {name: outcome.take(np.flatnonzero(whole)) if name == COMPLETE else outcome for name in sets}
    return {name: _estimate(people[name], found) if people[name].informative >= few else None for name, found in sets.items()}


def _filled(study: Study) -> np.ndarray:
    return np.nan_to_num(study.observed_NP)  # standardised: the mean is 0


def _estimate(outcome: Outcome, completed: Callable[[], Sequence[np.ndarray]]) -> Pooled | None:
    """Pooled over the completed data sets; None where they allow no estimate."""
    try:
        fits = [outcome.fit(x) for x in completed()]
    except NotEstimable:
        return None
    skip = fits[0].skip
    return pool([f.estimate[skip:] for f in fits], [np.diag(f.covariance)[skip:] for f in fits], fits[0].freedom)


def weighed(
    draws_MNP: np.ndarray, outcome: Outcome, coefficients: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator
) -> list[np.ndarray]:
    """M completed data sets whose draws go with the outcome, in turns: coefficients given the covariates, then for everyone
    one of the person's draws, with probability proportional to the likelihood of the person's outcome under it.
    """
    people, found = np.arange(draws_MNP.shape[1]), []
    for x_NP in draws_MNP:
        for _ in range(ROUNDS):
            likelihood_MN = outcome.log_likelihood(draws_MNP, x_NP, coefficients(x_NP))
            picked_N = (likelihood_MN + rng.gumbel(size=likelihood_MN.shape)).argmax(0)
            x_NP = draws_MNP[picked_N, people]
        found.append(x_NP)
    return found


def _rows(names: tuple[str, ...], found: Pooled) -> list[dict]:
    columns = (found.estimate, found.std_error, found.low, found.high, found.freedom, found.missing)
    keys = ("estimate", "std_error", "low", "high", "freedom", "missing_information")
    return [{"name": n} | {k: float(v) for k, v in zip(keys, row, strict=True)} for n, *row in zip(names, *columns, strict=True)]


def _narrower(estimates: dict[str, Pooled | None]) -> list[str]:
    """How sure multiple imputation is beside complete cases, where both have estimates."""
    own, other = estimates[WEIGHED], estimates[COMPLETE]
    if own is None or other is None:
        return []
    ratio = float(np.median(own.std_error / other.std_error))
    what = "smaller than" if ratio < 0.99 else "larger than" if ratio > 1.01 else "the same as"
    return [f"{WEIGHED}: standard errors are {what} those of complete cases (median ratio {ratio:.2f})"]


# -- predictions -----------------------------------------------------------------------------------------------------


def _predictions(study: Study, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Each analysis' risk of everyone, by a model that did not learn from their fold; NaN where it says nothing.

    With draws: the mean over M models, each learnt from draws that go with the learners' outcomes, of a draw that does not.
    """
    fold_N = _folds(study.outcome, rng)
    found = {name: np.full(len(fold_N), np.nan) for name in (COMPLETE, FILLED, IMPUTED, WEIGHED)}
    for fold in range(FOLDS):
        train, test = np.flatnonzero(fold_N != fold), np.flatnonzero(fold_N == fold)
        known, asked = train[study.complete[train]], test[study.complete[test]]
        if study.outcome.take(known).informative >= SMALLEST_GROUP:
            found[COMPLETE][asked] = _risk(study.outcome.take(known), study.observed_NP[known], study.observed_NP[asked])
        outcome = study.outcome.take(train)
        for name, x_NP in ((FILLED, _filled(study)), (IMPUTED, study.imputed_NP)):
            found[name][test] = _risk(outcome, x_NP[train], x_NP[test])
        learnt = weighed(study.draws_MNP[:, train], outcome, outcome.ridge, rng)
        risks = [_risk(outcome, x_NP, drawn_NP[test]) for x_NP, drawn_NP in zip(learnt, study.draws_MNP, strict=True)]
        found[WEIGHED][test] = np.mean(risks, 0)
    return found


def _risk(outcome: Outcome, learnt_NP: np.ndarray, asked_NP: np.ndarray) -> np.ndarray:
    return outcome.risk(asked_NP, outcome.ridge(learnt_NP))


def _folds(outcome: Outcome, rng: np.random.Generator) -> np.ndarray:
    """Random folds, each with its share of those with the event."""
    fold = np.empty(len(outcome.event), int)
    for rows in (np.flatnonzero(outcome.event), np.flatnonzero(~outcome.event)):
        fold[rng.permutation(rows)] = np.arange(len(rows)) % FOLDS
    return fold


def _compared(study: Study, predicted: dict[str, np.ndarray], rng: np.random.Generator) -> tuple[dict, list[dict]]:
    """Scores of each analysis, on everyone and on those who hold all covariates, and paired differences with bootstrap intervals.

    Complete cases say nothing of people who lack something, so they are compared on the others.
    """
    groups = {"everyone": np.arange(len(study.complete)), "complete people": np.flatnonzero(study.complete)}
    scores, differences = {name: {} for name in predicted}, []
    for group, rows in groups.items():
        outcome = study.outcome.take(rows)
        risks = {name: risk[rows] for name, risk in predicted.items() if not np.isnan(risk[rows]).any()}
        if outcome.informative < SMALLEST_GROUP:
            continue
        own = {name: outcome.scores(risk) for name, risk in risks.items()}
        again = _resampled(outcome, risks, rng)
        for name in own:
            scores[name][group] = own[name]
        base = COMPLETE if group == "complete people" else FILLED
        differences += [_difference(group, name, base, own, again) for name in (IMPUTED, WEIGHED) if base in own]
    return scores, [d for found in differences for d in found]


def _resampled(outcome: Outcome, risks: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, list[dict]]:
    """The scores on samples of people drawn with replacement, the same people for every analysis."""
    people = len(outcome.event)
    found: dict[str, list[dict]] = {name: [] for name in risks}
    for _ in range(RESAMPLES):
        rows = rng.integers(0, people, people)
        for name, risk in risks.items():
            found[name].append(outcome.take(rows).scores(risk[rows]))
    return found


def _difference(group: str, name: str, base: str, own: dict, again: dict) -> list[dict]:
    found = []
    for metric in own[name]:
        spread = [a[metric] - b[metric] for a, b in zip(again[name], again[base], strict=True)]
        low, high = np.nanpercentile(spread, (2.5, 97.5))
        entry = {"group": group, "analysis": name, "than": base, "metric": metric, "difference": own[name][metric] - own[base][metric]}
        found.append(entry | {"low": float(low), "high": float(high)})
    return found


def _verdict(d: dict) -> str:
    numbers = f"{d['metric']} {d['difference']:+.4f} (95% interval {d['low']:+.4f} to {d['high']:+.4f})"
    if d["low"] <= 0 <= d["high"]:
        return f"{d['group']}: {d['analysis']} and {d['than']}: no difference beyond noise, {numbers}"
    better = (d["difference"] > 0) != (d["metric"] in SMALLER_IS_BETTER)
    return f"{d['group']}: {d['analysis']} predicts {'better' if better else 'worse'} than {d['than']}, {numbers}"
