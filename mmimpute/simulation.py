"""A simulated population whose truth is known: what any imputation of its records can reach at best, in closed form.

A mixture of factor analysers. A record's shared latent z0 is a discrete state c and a vector s; each real modality
has a private latent zj. Within a state everything real is linear and Gaussian, but the loadings differ from state to
state, so that no linear method does well:

    c ~ Categorical(weight)    s, zj ~ N(0, I)    real: x_j = mean_c + S_c s + P_j zj + noise    binary: P(x = 1) = chance_c

Stacking h = (s, z1, z2, ...) and W_c = (S_c, P), each state is one factor analyser x = mean_c + W_c h + noise. What
is unobserved drops out of its sums, so the posterior is exact for any pattern of missing modalities and values:

    Cov(h | x, c) = (I + W' V W)^-1    E(h | x, c) = Cov(h | x, c) W' V (x - mean_c)    V: 1 / noise^2 where observed, else 0
    p(c | x) ~ weight_c N(x; mean_c, W W' + noise^2) prod_b Bernoulli(x_b; chance_cb)

(Ghahramani and Hinton, The EM algorithm for mixtures of factor analyzers, 1996; determinant and quadratic form by
Woodbury.) The predictive distribution of what is missing is then a mixture over c.

Shapes: N records, C states, R real features, B binary features, K modalities, H length of h, D features of a modality.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

SHARD_ROWS = 50_000
CHUNK = 2048  # records whose posterior is held at once
# Of a real feature's variance within the population: by state, by s as it is, by s as the state turns it, by zj, noise.
MEAN, COMMON, TURNED, PRIVATE, NOISE = 0.15, 0.2, 0.35, 0.15, 0.15

Values = dict[str, np.ndarray]


class SimulatedModality(NamedTuple):
    name: str
    kind: Literal["real", "binary"]
    width: int


class Parameters(NamedTuple):
    """The truth that a population's seed and sizes stand for. missing: probability that a modality is, by state."""

    weight_C: np.ndarray
    mean_CR: np.ndarray
    loading_CRH: np.ndarray
    noise_R: np.ndarray
    chance_CB: np.ndarray
    missing_CK: np.ndarray


class Posterior(NamedTuple):
    """Of the latents given what is observed: p(c | x), E(h | x, c), Cov(h | x, c); and log p(x observed), in nats."""

    state_NC: np.ndarray
    latent_NCH: np.ndarray
    covariance_NCHH: np.ndarray
    log_likelihood_N: np.ndarray


@dataclass(frozen=True)
class Population:
    """The same settings are the same population, so its repr is all that has to be kept of it.

    width: features of a record, 16 or more. states, shared, private: sizes of c, s and every zj. missing: mean probability that a
    modality is missing; the modalities' own run from half of it to one and a half. gaps: probability that one value is
    missing inside an observed modality. not_at_random: how much the odds that a modality is missing depend on the
    state, as the standard deviation of their logarithm; 0 is missing completely at random.
    """

    seed: int = 0
    width: int = 128
    states: int = 8
    shared: int = 4
    private: int = 2
    missing: float = 0.3
    gaps: float = 0.02
    not_at_random: float = 0.0

    @cached_property
    def modalities(self) -> tuple[SimulatedModality, ...]:
        vitals, labs, codes = self.width // 16, self.width * 3 // 16, self.width // 4
        rna = self.width - vitals - labs - codes
        return (
            SimulatedModality("vitals", "real", vitals),
            SimulatedModality("labs", "real", labs),
            SimulatedModality("codes", "binary", codes),
            SimulatedModality("rna", "real", rna),
        )

    @cached_property
    def truth(self) -> Parameters:
        draw = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(0,)))
        widths = {kind: sum(m.width for m in self.modalities if m.kind == kind) for kind in ("real", "binary")}
        real, binary, states = widths["real"], widths["binary"], self.states
        unit_R = np.exp(draw.normal(size=real))
        mean_CR = np.sqrt(MEAN) * draw.normal(size=(states, real)) + 3 * draw.normal(size=real)
        logit_CB = draw.normal(-1.5, 1, binary) + 1.2 * draw.normal(size=(states, binary))
        weight_C = np.exp(0.5 * draw.normal(size=states))
        rate_K = self.missing * np.linspace(0.5, 1.5, len(self.modalities))
        odds_CK = rate_K / (1 - rate_K) * np.exp(self.not_at_random * draw.normal(size=(states, len(rate_K))))
        return Parameters(
            weight_C=weight_C / weight_C.sum(),
            mean_CR=mean_CR * unit_R,
            loading_CRH=self._loadings(draw) * unit_R[:, None],
            noise_R=np.sqrt(NOISE) * unit_R,
            chance_CB=1 / (1 + np.exp(-logit_CB)),
            missing_CK=odds_CK / (1 + odds_CK),
        )

    def _loadings(self, draw: np.random.Generator) -> np.ndarray:
        """W_c of every state, C x R x H: the columns of s, then those of each real modality's zj.

        A state turns s before a modality reads it. Loadings drawn anew for every state would be easier to undo: where
        there are many features, they span enough for a linear method to find the state's own s.
        """
        real = [m for m in self.modalities if m.kind == "real"]
        loading_CRH = np.zeros((self.states, sum(m.width for m in real), self.shared + len(real) * self.private))
        end_R, end_H = 0, self.shared
        for m in real:
            rows, columns = slice(end_R, end_R := end_R + m.width), slice(end_H, end_H := end_H + self.private)
            turn_CSS = np.linalg.qr(draw.normal(size=(self.states, self.shared, self.shared))).Q
            common, turned = draw.normal(size=(2, m.width, self.shared)) / np.sqrt(self.shared)
            loading_CRH[:, rows, : self.shared] = np.sqrt(COMMON) * common + np.sqrt(TURNED) * turned @ turn_CSS
            loading_CRH[:, rows, columns] = np.sqrt(PRIVATE / self.private) * draw.normal(size=(m.width, self.private))
        return loading_CRH

    @cached_property
    def _squares_CRHH(self) -> np.ndarray:
        """w w' of every feature's loadings, each flattened: precisions and variances become matrix products."""
        w = self.truth.loading_CRH
        return (w[..., :, None] * w[..., None, :]).reshape(*w.shape[:2], -1)

    def sample(self, rows: int, seed: int | np.random.SeedSequence) -> tuple[Values, Values]:
        """Complete values (float32; binary: 0 and 1) and which of them are observed (bool), by modality, N x D.

        A modality that is missing is observed nowhere; one modality or more of every record is present.
        """
        truth, draw = self.truth, np.random.default_rng(seed)
        state_N, latent_NH = self._latents(rows, draw)
        x_NR = truth.noise_R.astype(np.float32) * draw.standard_normal((rows, len(truth.noise_R)), np.float32)
        for c in range(self.states):
            own = state_N == c
            x_NR[own] += truth.mean_CR[c].astype(np.float32) + latent_NH[own] @ truth.loading_CRH[c].astype(np.float32).T
        x_NB = draw.random((rows, truth.chance_CB.shape[1]), np.float32) < truth.chance_CB[state_N]
        return self._by_modality(x_NR, x_NB.astype(np.float32)), self._observed(state_N, draw)

    def latents(self, rows: int, seed: int | np.random.SeedSequence) -> tuple[np.ndarray, np.ndarray]:
        """The state (N) and h = (s, z1, z2, ...) (N x H) behind the records of `sample` with the same arguments."""
        return self._latents(rows, np.random.default_rng(seed))

    def _latents(self, rows: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        state_N = draw.choice(self.states, rows, p=self.truth.weight_C)
        return state_N, draw.standard_normal((rows, self.truth.loading_CRH.shape[2]), np.float32)

    def _observed(self, state_N: np.ndarray, draw: np.random.Generator) -> Values:
        missing_NK = self.truth.missing_CK[state_N]
        present = draw.random(missing_NK.shape) >= missing_NK
        empty = np.flatnonzero(~present.any(1))
        present[empty, draw.integers(len(self.modalities), size=len(empty))] = True
        return {
            m.name: present[:, [at]] & (draw.random((len(state_N), m.width), np.float32) >= self.gaps)
            for at, m in enumerate(self.modalities)
        }

    def _by_modality(self, x_NR: np.ndarray, x_NB: np.ndarray) -> Values:
        rest, out = {"real": x_NR, "binary": x_NB}, {}
        for m in self.modalities:
            out[m.name], rest[m.kind] = np.split(rest[m.kind], [m.width], axis=1)
        return out

    def _side_by_side(self, values: Values, kind: str) -> np.ndarray:
        return np.concatenate([values[m.name] for m in self.modalities if m.kind == kind], axis=1)

    def oracle(self, x: Values, observed: Values) -> tuple[Values, Values]:
        """Mean and standard deviation of every value given all that is observed of its record, by modality, N x D.

        x: values; what stands where `observed` is false is not looked at. Observed values are copied, with
        deviation 0; the mean of a missing binary one is its probability. That a value is missing is taken to say
        nothing about it: exact where values are missing at random, and the best that ignores the reason otherwise.
        """
        parts = []
        for start in range(0, len(next(iter(x.values()))), CHUNK):
            rows = slice(start, start + CHUNK)
            parts.append(self._predict({k: v[rows] for k, v in x.items()}, {k: v[rows] for k, v in observed.items()}))
        mean, std = ({name: np.concatenate([p[i][name] for p in parts]) for name in x} for i in (0, 1))
        return {k: np.where(observed[k], x[k], mean[k]) for k in x}, {k: np.where(observed[k], 0, std[k]) for k in x}

    def _predict(self, x: Values, observed: Values) -> tuple[Values, Values]:
        """Moments of the mixture over states, also of what is observed."""
        truth, found = self.truth, self.posterior(x, observed)
        each_NCR = truth.mean_CR + np.einsum("nch,crh->ncr", found.latent_NCH, truth.loading_CRH, optimize=True)
        spread = found.covariance_NCHH.reshape(*found.latent_NCH.shape[:2], -1)
        variance_NCR = truth.noise_R**2 + np.einsum("nck,crk->ncr", spread, self._squares_CRHH, optimize=True)
        mean_NR = np.einsum("nc,ncr->nr", found.state_NC, each_NCR)
        variance_NCR += (each_NCR - mean_NR[:, None]) ** 2
        std_NR = np.sqrt(np.einsum("nc,ncr->nr", found.state_NC, variance_NCR))
        mean_NB = found.state_NC @ truth.chance_CB
        return self._by_modality(mean_NR, mean_NB), self._by_modality(std_NR, np.sqrt(mean_NB * (1 - mean_NB)))

    def posterior(self, x: Values, observed: Values) -> Posterior:
        """The latents of records of which x is observed where `observed` says so (by modality, N x D)."""
        seen_NR, seen_NB = self._side_by_side(observed, "real"), self._side_by_side(observed, "binary")
        x_NR, ones_NB = self._side_by_side(x, "real"), seen_NB & (self._side_by_side(x, "binary") == 1)
        chance_CB = self.truth.chance_CB
        by_state = [self._condition(c, x_NR, seen_NR) for c in range(self.states)]
        latent_NCH, covariance_NCHH, log_density_NC = (np.stack(part, axis=1) for part in zip(*by_state, strict=True))
        log_joint_NC = np.log(self.truth.weight_C) + log_density_NC
        log_joint_NC += ones_NB @ np.log(chance_CB).T + (seen_NB & ~ones_NB) @ np.log1p(-chance_CB).T
        evidence_N = np.logaddexp.reduce(log_joint_NC, axis=1)
        return Posterior(np.exp(log_joint_NC - evidence_N[:, None]), latent_NCH, covariance_NCHH, evidence_N)

    def _condition(self, c: int, x_NR: np.ndarray, seen_NR: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """E(h | x, c), Cov(h | x, c) and log p(x real | c) in one state."""
        truth = self.truth
        w_RH, variance_R = truth.loading_CRH[c], truth.noise_R**2
        size = w_RH.shape[1]
        residual_NR = np.where(seen_NR, x_NR - truth.mean_CR[c], 0)
        precision_NHH = np.eye(size) + ((seen_NR / variance_R) @ self._squares_CRHH[c]).reshape(-1, size, size)
        covariance_NHH = np.linalg.inv(precision_NHH)
        pull_NH = (residual_NR / variance_R) @ w_RH
        latent_NH = np.einsum("nhk,nk->nh", covariance_NHH, pull_NH)
        quadratic_N = (residual_NR**2) @ (1 / variance_R) - (pull_NH * latent_NH).sum(1)
        log_determinant_N = seen_NR @ np.log(2 * np.pi * variance_R) + np.linalg.slogdet(precision_NHH)[1]
        return latent_NH, covariance_NHH, -0.5 * (quadratic_N + log_determinant_N)

    def shards(self, rows: int, shard_rows: int = SHARD_ROWS, start: int = 0) -> Iterator[tuple[Values, Values]]:
        """Any number of records as shards from number `start` on, one in memory at a time: see `sample`.

        A shard follows from its number alone, so a run that is taken up again goes on with the same cohort, and a
        shorter cohort is the beginning of a longer one.
        """
        for number in range(start, -(-rows // shard_rows)):
            complete, observed = self.sample(shard_rows, self.shard_seed(number))
            own = slice(min(shard_rows, rows - number * shard_rows))
            yield {k: v[own] for k, v in complete.items()}, {k: v[own] for k, v in observed.items()}

    def shard_seed(self, number: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(self.seed, spawn_key=(1, number))
