"""Accuracy on tables that nothing in mmimpute was chosen by: those that scikit-learn and statsmodels carry with them.

    python tests/benchmarks/embedded.py [--cohorts wine breast ...]

Of each table 70% of the rows train, with all that they hold and with half of the modalities dropped (means of three splits); of the
others each modality is hidden in turn. Skill = 1 - loss / loss of the training marginal (CRPS, of binary features log-loss), mean over
features, then modalities, of `MultiModalImputer` with its defaults, of ridge and logistic regression (means filled in, flags of what is
missing, the penalty cross-validated), and of gradient boosting, either with the deviation of its cross-validated residuals. cover90:
share of real values within 1.645 standard deviations that mmimpute predicts.
"""

import argparse
import importlib
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
from sklearn import datasets
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmimpute import MultiModalImputer
from mmimpute.evaluation import crps, log_loss
from mmimpute.spec import CohortSpec, ModalitySpec

TRAINED, DROPPED, SPLITS = 0.7, 0.5, 3
TREES = {"learning_rate": 0.05, "max_iter": 100}
Modalities = dict[str, list[str]]
Said = tuple[np.ndarray, np.ndarray]


def statsmodels(name: str) -> pd.DataFrame:
    return importlib.import_module(f"statsmodels.datasets.{name}").load_pandas().data


def slices(table: pd.DataFrame, **ends: int) -> pd.DataFrame:
    """Modalities of neighbouring columns; ends: behind the last of each."""
    modality = np.searchsorted([*ends.values()], range(table.shape[1]), side="right")
    return table.astype(float).set_axis([f"{list(ends)[m]}__{c}" for m, c in zip(modality, table, strict=True)], axis=1)


def digits() -> pd.DataFrame:
    """Quarters of 8 x 8 pixels."""
    table = datasets.load_digits(as_frame=True).data
    at = np.arange(64).reshape(2, 4, 2, 4).transpose(0, 2, 1, 3).ravel()
    return slices(table.iloc[:, at], northwest=16, northeast=32, southwest=48, southeast=64)


COHORTS: dict[str, Callable[[], pd.DataFrame]] = {
    "wine": lambda: slices(datasets.load_wine(as_frame=True).data, acids=5, phenols=9, colour=13),
    "star98": lambda: slices(statsmodels("star98"), scores=2, pupils=8, schools=22),
    "diabetes": lambda: slices(datasets.load_diabetes(as_frame=True, scaled=False).frame, person=4, serum=10, progress=11),
    "breast": lambda: slices(datasets.load_breast_cancer(as_frame=True).data, mean=10, error=20, worst=30),
    "anes96": lambda: slices(statsmodels("anes96").drop(columns="logpopul"), place=1, media=2, views=6, person=9, vote=10),
    "digits": digits,
    "fair": lambda: slices(statsmodels("fair"), marriage=1, person=6, work=8, affairs=9),
}


def kind(column: pd.Series) -> str:
    return "binary" if set(column.dropna()) == {0, 1} else "real"


def ours(train: pd.DataFrame, tests: list[pd.DataFrame], modalities: Modalities) -> list[Said]:
    specs = {
        name: ModalitySpec(
            prefix=f"{name}__", features=tuple(c.removeprefix(f"{name}__") for c in columns), kinds=tuple(kind(train[c]) for c in columns)
        )
        for name, columns in modalities.items()
    }
    model = MultiModalImputer(CohortSpec(modalities=specs)).fit(train)
    said = (model.transform(test, return_std=True) for test in tests)
    return [(completed.to_numpy(float), std) for completed, std in said]


def peer(regressor, classifier) -> Callable[[pd.DataFrame, list[pd.DataFrame], Modalities], list[Said]]:
    """One estimator for every feature, from what the other modalities hold."""

    def predict(train: pd.DataFrame, tests: list[pd.DataFrame], modalities: Modalities) -> list[Said]:
        found = []
        for test, names in zip(tests, modalities.values(), strict=True):
            mean, std = np.full(test.shape, np.nan), np.full(test.shape, np.nan)
            others = [c for c in train if c not in names]
            for name in names:
                rows, at = train[name].notna(), train.columns.get_loc(name)
                X, y = train.loc[rows, others].to_numpy(), train.loc[rows, name].to_numpy()
                if kind(train[name]) == "binary":
                    mean[:, at] = classifier.fit(X, y).predict_proba(test[others].to_numpy())[:, 1]
                    continue
                std[:, at] = np.sqrt(np.mean((y - cross_val_predict(regressor, X, y, cv=5)) ** 2))
                mean[:, at] = regressor.fit(X, y).predict(test[others].to_numpy())
            found.append((mean, std))
        return found

    return predict


def linear(estimator):
    return make_pipeline(SimpleImputer(add_indicator=True, keep_empty_features=True), StandardScaler(), estimator)


METHODS = {
    "mmimpute": ours,
    "ridge": peer(linear(RidgeCV(np.logspace(-2, 4, 13))), linear(LogisticRegressionCV(cv=3, scoring="neg_log_loss", max_iter=500))),
    "boosting": peer(*(trees(**TREES) for trees in (HistGradientBoostingRegressor, HistGradientBoostingClassifier))),
}


def skill(train: pd.DataFrame, truth: pd.DataFrame, said: list[Said], modalities: Modalities) -> tuple[float, float]:
    """Mean over modalities of their features' mean; and the cover of real values."""
    found, covered = [], []
    for (mean, std), names in zip(said, modalities.values(), strict=True):
        ratios = []
        for name in names:
            at, seen, y = train.columns.get_loc(name), train[name].dropna().to_numpy(), truth[name].to_numpy()
            m0, s0 = seen.mean(), seen.std()
            if s0 < 1e-8:
                continue
            if kind(train[name]) == "binary":
                ratios.append(log_loss(y, mean[:, at]).mean() / log_loss(y, np.full(len(y), m0)).mean())
                continue
            ratios.append(crps(y, mean[:, at], np.maximum(std[:, at], 1e-6 * s0)).mean() / crps(y, m0, s0).mean())
            covered.append(np.mean(np.abs(y - mean[:, at]) <= 1.645 * std[:, at]))
        found.append(1 - np.mean(ratios))
    return float(np.mean(found)), float(np.mean(covered))


def dropped(table: pd.DataFrame, modalities: Modalities, share: float, rng: np.random.Generator) -> pd.DataFrame:
    """Each record loses modalities at random, but not all."""
    gone = rng.random((len(table), len(modalities))) < share
    gone[np.arange(len(table)), rng.integers(len(modalities), size=len(table))] = False
    table = table.copy()
    for names, rows in zip(modalities.values(), gone.T, strict=True):
        table.loc[rows, names] = np.nan
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", nargs="+", choices=COHORTS, default=list(COHORTS))
    warnings.filterwarnings("ignore", module="sklearn")
    print("cohort    rows  dropped  " + "  ".join(f"{name:>8}" for name in METHODS) + "  cover90")
    for name in parser.parse_args().cohorts:
        table = COHORTS[name]()
        modalities = {m: list(columns) for m, columns in table.T.groupby(lambda c: c.split("__")[0], sort=False).groups.items()}
        for share in (0.0, DROPPED):
            scored = np.mean([compare(table, modalities, share, seed) for seed in range(SPLITS)], 0)
            rows = round(TRAINED * len(table))
            print(f"{name:8}{rows:6}{share:9.1f}  " + "  ".join(f"{s:8.3f}" for s in scored[:, 0]) + f"{scored[0, 1]:9.3f}", flush=True)


def compare(table: pd.DataFrame, modalities: Modalities, share: float, seed: int) -> list[tuple[float, float]]:
    """Of each method, skill and cover on one split."""
    rng = np.random.default_rng(seed)
    parts = np.split(rng.permutation(len(table)), [round(TRAINED * len(table))])
    train, test = (table.iloc[part].reset_index(drop=True) for part in parts)
    train = dropped(train, modalities, share, rng)
    tests = [test.assign(**dict.fromkeys(names, np.nan)) for names in modalities.values()]
    return [skill(train, test, method(train, tests, modalities), modalities) for method in METHODS.values()]


if __name__ == "__main__":
    main()
