"""Outcome models: logistic for what people have or have not, Cox for the time until it happens.

Estimates come with standard errors and without a penalty (statsmodels); predictions are ridge-penalised with the number
of covariates as the penalty: a prior under which the linear predictor of standardised covariates has variance 1.
Shape suffixes: N people, P covariates, M draws, E events.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from scipy.stats import rankdata

MOST = 15.0  # log odds per standard deviation: beyond it lies separation


class NotEstimable(Exception):
    """There is no estimate: a covariate is constant or follows from others, or it separates those with and without the outcome."""


class Fit(NamedTuple):
    """Estimates of the covariates, after `skip` others (the intercept), and their covariance; freedom: degrees of freedom."""

    estimate: np.ndarray
    covariance: np.ndarray
    freedom: float
    skip: int


@dataclass(frozen=True)
class Label:
    """Who has the outcome; event_N: bool."""

    event: np.ndarray

    def take(self, rows: np.ndarray) -> "Label":
        return Label(self.event[rows])

    @property
    def informative(self) -> int:
        """People of the rarer kind: what bounds the number of covariates (Peduzzi et al. 1996)."""
        return int(min(self.event.sum(), (~self.event).sum()))

    def fit(self, x_NP: np.ndarray) -> Fit:
        """Logistic regression. Raises NotEstimable."""
        from statsmodels.discrete.discrete_model import Logit

        design = np.c_[np.ones(len(x_NP)), x_NP]
        found = _estimated(lambda: Logit(self.event.astype(float), design).fit(disp=0, method="newton"))
        return Fit(*found, freedom=len(x_NP) - design.shape[1], skip=1)

    def log_likelihood(self, x_MNP: np.ndarray, x_NP: np.ndarray, beta: np.ndarray) -> np.ndarray:
        """Of each person's outcome under each draw of the covariates, M x N."""
        return log_expit(np.where(self.event, 1, -1) * (beta[0] + x_MNP @ beta[1:]))

    def draw(self, x_NP: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Coefficients as likely as the data make them: a draw from the estimates' normal approximation. Raises NotEstimable."""
        found = self.fit(x_NP)
        return rng.multivariate_normal(found.estimate, found.covariance)

    def ridge(self, x_NP: np.ndarray) -> np.ndarray:
        """Penalised coefficients, the intercept first and free."""
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=1 / x_NP.shape[1], max_iter=1000).fit(x_NP, self.event)
        return np.r_[model.intercept_, model.coef_[0]]

    def risk(self, x_NP: np.ndarray, beta: np.ndarray) -> np.ndarray:
        """Probability of the outcome."""
        return expit(beta[0] + x_NP @ beta[1:])

    def scores(self, risk_N: np.ndarray) -> dict[str, float]:
        """AUROC (its Mann-Whitney form; larger is better) and Brier score (smaller is better)."""
        ones = int(self.event.sum())
        ranks = rankdata(risk_N)[self.event].sum() - ones * (ones + 1) / 2
        both = ones * (len(risk_N) - ones)
        return {"AUROC": ranks / both if both else np.nan, "Brier score": float(((risk_N - self.event) ** 2).mean())}


@dataclass(frozen=True)
class Survival:
    """Until when people were followed, and whether the event ended it; time_N, event_N: bool."""

    time: np.ndarray
    event: np.ndarray

    def take(self, rows: np.ndarray) -> "Survival":
        return Survival(self.time[rows], self.event[rows])

    @property
    def informative(self) -> int:
        """Events: what bounds the number of covariates."""
        return int(self.event.sum())

    def fit(self, x_NP: np.ndarray) -> Fit:
        """Cox regression, ties after Efron. Raises NotEstimable."""
        from statsmodels.duration.hazard_regression import PHReg

        found = _estimated(lambda: PHReg(self.time, x_NP, status=self.event.astype(int), ties="efron").fit(disp=0))
        return Fit(*found, freedom=self.informative - x_NP.shape[1], skip=0)

    def log_likelihood(self, x_MNP: np.ndarray, x_NP: np.ndarray, beta: np.ndarray) -> np.ndarray:
        """Of each person's follow-up under each draw, M x N, up to a constant; x_NP: what the baseline hazard is of."""
        _, baseline_N = self._at_risk(x_NP @ beta)
        linear_MN = x_MNP @ beta
        return self.event * linear_MN - baseline_N * np.exp(linear_MN)

    def _at_risk(self, linear_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per person: log of the summed hazards of all who were still followed, and the cumulative baseline hazard (Breslow 1972)."""
        order = np.argsort(self.time)
        back, time, hazard = np.argsort(order), self.time[order], np.exp(linear_N[order])
        at_risk = np.cumsum(hazard[::-1])[::-1][np.searchsorted(time, time)]
        baseline = np.cumsum(self.event[order] / at_risk)[np.searchsorted(time, time, "right") - 1]
        return np.log(at_risk)[back], baseline[back]

    def draw(self, x_NP: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """As that of Label, in a thirtieth of the time that statsmodels takes: ties after Breslow. Raises NotEstimable."""
        beta = self.ridge(x_NP, 0)
        try:
            return rng.multivariate_normal(beta, np.linalg.inv(self.information(x_NP, beta)))
        except np.linalg.LinAlgError:
            raise NotEstimable("no finite estimate") from None

    def information(self, x_NP: np.ndarray, beta: np.ndarray) -> np.ndarray:
        """P x P, negative second derivatives of Breslow's partial likelihood."""
        order = np.argsort(-self.time)
        x, time, event = x_NP[order], -self.time[order], self.event[order]
        linear = x_NP @ beta
        hazard = np.exp(linear[order])
        last = np.searchsorted(time, time, "right") - 1  # of those who were followed as long
        mean_EP = (np.cumsum(hazard[:, None] * x, 0) / np.cumsum(hazard)[:, None])[last][event]
        expected_N = self._at_risk(linear)[1] * np.exp(linear)
        return (x_NP * expected_N[:, None]).T @ x_NP - mean_EP.T @ mean_EP

    def ridge(self, x_NP: np.ndarray, penalty: float | None = None) -> np.ndarray:
        """Penalised coefficients, ties after Breslow; statsmodels' own take a hundred times as long."""
        penalty = x_NP.shape[1] if penalty is None else penalty

        def loss(beta: np.ndarray) -> tuple[float, np.ndarray]:
            linear = x_NP @ beta
            at_risk, baseline = self._at_risk(linear)
            residual = self.event - baseline * np.exp(linear)  # martingale residuals: the score per person
            value = (at_risk - linear)[self.event].sum() + penalty / 2 * beta @ beta
            return value, penalty * beta - x_NP.T @ residual

        return minimize(loss, np.zeros(x_NP.shape[1]), jac=True, method="L-BFGS-B").x

    def risk(self, x_NP: np.ndarray, beta: np.ndarray) -> np.ndarray:
        """Linear predictor: the log hazard ratio to a person with mean covariates."""
        return x_NP @ beta

    def scores(self, risk_N: np.ndarray) -> dict[str, float]:
        """Harrell's concordance: of pairs of whom one is known to have had the event first, the share with the higher risk."""
        time_E, risk_E = (a[self.event][:, None] for a in (self.time, risk_N))
        comparable = (time_E < self.time) | ((time_E == self.time) & ~self.event)
        right = (risk_E > risk_N) + 0.5 * (risk_E == risk_N)
        pairs = comparable.sum()
        return {"concordance": float((right * comparable).sum() / pairs) if pairs else np.nan}


Outcome = Label | Survival


def _estimated(fit: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Estimates and covariance of a statsmodels fit that converged."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = fit()
            estimate, covariance = np.asarray(found.params), np.asarray(found.cov_params())
        except (np.linalg.LinAlgError, Warning, ValueError) as error:
            raise NotEstimable(type(error).__name__) from None
    if not np.isfinite(covariance).all() or (np.diag(covariance) <= 0).any() or (np.abs(estimate) > MOST).any():
        raise NotEstimable("no finite estimate")
    return estimate, covariance
