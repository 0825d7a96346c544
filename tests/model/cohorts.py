"""Small synthetic cohorts with known truth."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmimpute.model import FeatureStatistics, Imputer, ModalityConfig, ModelConfig, MultiModalVAE
from mmimpute.stacking import assemble
from mmimpute.training import OptimiserSettings, fit_in_memory, schedule

MIXED = ModalityConfig("labs.mixed", ("real", "binary", "count", "ordinal", "categorical", "ordinal", "real"), (0, 0, 0, 4, 3, 6, 0))
CONFIG = ModelConfig(
    (MIXED, ModalityConfig("plain", ("real",) * 5, tails="gaussian"), ModalityConfig("codes", ("binary", "count"))),
    shared=8,
    hidden=32,
    decoder=16,
)


def statistics(x: np.ndarray, kinds: tuple[str, ...], log: tuple[int, ...] = ()) -> FeatureStatistics:
    """What the data layer fits: of complete columns, in float64."""
    logged = np.array([k == "count" or i in log for i, k in enumerate(kinds)])
    y = np.where(logged, np.sign(x) * np.log1p(np.abs(x)), x.astype(float))
    mean, std = y.mean(0), y.std(0)
    knots = np.quantile((y - mean) / std, np.linspace(0, 1, 9), axis=0).T
    return FeatureStatistics(mean, std, logged, np.ones(len(kinds)), knots)


def mixed_values(rows: int, seed: int = 0) -> list[Tensor]:
    """Independent values of every kind, in the layout of CONFIG."""
    draw = np.random.default_rng(seed)
    mixed = np.stack(
        [
            draw.normal(10, 3, rows),
            draw.random(rows) < 0.3,
            draw.poisson(3, rows),
            draw.integers(0, 4, rows),
            draw.integers(0, 3, rows),
            draw.integers(0, 6, rows),
            draw.lognormal(1, 1, rows),
        ],
        1,
    )
    codes = np.stack([draw.random(rows) < 0.5, draw.poisson(2, rows)], 1)
    return [torch.tensor(v, dtype=torch.float32) for v in (mixed, draw.normal(size=(rows, 5)), codes)]


def linked(x: list[Tensor], seed: int = 0, noise: float = 0.5) -> list[Tensor]:
    """The same values, every column rearranged to follow one common latent: dependent, with the same margins."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(len(x[0]), 1, generator=generator)
    ranks = [(common + noise * torch.randn(v.shape, generator=generator)).argsort(0).argsort(0) for v in x]
    return [v.sort(0).values.gather(0, rank) for v, rank in zip(x, ranks, strict=True)]


def mixed_model(seed: int = 0, members: int = 1) -> MultiModalVAE:
    """An untrained model of every kind, with weights that are not at their symmetric start."""
    torch.manual_seed(seed)
    values = mixed_values(500)
    fitted = {
        m.name: statistics(v.numpy(), m.kinds, log=(6,) if m is MIXED else ()) for m, v in zip(CONFIG.modalities, values, strict=True)
    }
    model = MultiModalVAE(dataclasses.replace(CONFIG, members=members), fitted).eval()
    with torch.no_grad():
        for private in model.private:
            private.curved.weight.normal_(0, 0.1)
    return model


def masks(values: list[Tensor], seed: int = 0, share: float = 0.7) -> list[Tensor]:
    """Random patterns: whole modalities absent, and values missing inside the others."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for v in values:
        present = torch.rand(len(v), 1, generator=generator) < share
        out.append((torch.rand(v.shape, generator=generator) < share) & present)
    return out


@dataclass(frozen=True)
class LinearGaussian:
    """x_j = A_j z + noise: every conditional mean and covariance is known."""

    loadings: list[np.ndarray]  # K of (D_j, L)
    noise: float

    @classmethod
    def make(cls, widths: tuple[int, ...] = (4, 6, 3), latent: int = 3, noise: float = 0.6) -> "LinearGaussian":
        draw = np.random.default_rng(3)
        return cls([draw.normal(size=(d, latent)) / np.sqrt(latent) * 1.2 for d in widths], noise)

    def values(self, rows: int, seed: int) -> list[Tensor]:
        draw = np.random.default_rng(seed)
        z = draw.normal(size=(rows, self.loadings[0].shape[1]))
        return [torch.tensor(z @ a.T + self.noise * draw.normal(size=(rows, len(a))), dtype=torch.float32) for a in self.loadings]

    def conditional(self, target: int, given: list[int], x: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Mean (rows, D) and covariance (D, D) of modality `target` given others."""
        a, b = self.loadings[target], np.concatenate([self.loadings[g] for g in given])
        seen = b @ b.T + self.noise**2 * np.eye(len(b))
        gain = np.linalg.solve(seen, b @ a.T).T
        mean = np.concatenate([x[g].numpy() for g in given], 1) @ gain.T
        return mean, a @ a.T + self.noise**2 * np.eye(len(a)) - gain @ b @ a.T


def everything(x: list[Tensor]) -> list[Tensor]:
    """Masks of complete records."""
    return [torch.ones_like(t, dtype=torch.bool) for t in x]


def fit_linear_gaussian(x: list[Tensor], observed: list[Tensor] | None = None, epochs: int = 10) -> Imputer:
    """The whole model, small: some ten seconds for 4,800 records."""
    observed = everything(x) if observed is None else observed
    return assemble(fit_linear_vae(x, observed, epochs), x, observed, torch.arange(len(x[0])) % 5)


def fit_linear_vae(x: list[Tensor], observed: list[Tensor], epochs: int) -> MultiModalVAE:
    """Its VAE alone: record i is in fold i % 5."""
    torch.manual_seed(0)
    rows = len(x[0])
    modalities = tuple(ModalityConfig(n, ("real",) * t.shape[1]) for n, t in zip("abc", x, strict=True))
    sizes = {"shared": 8, "hidden": 64, "decoder": 32, "dropout": 0.0, "drop_values": 0.0, "elbo_weight": 0.5, "elbo_share": 1.0}
    config = ModelConfig(modalities, members=5, impute_draws=8, **sizes)
    vae = MultiModalVAE(config, {m.name: statistics(t[~t.isnan().any(1)].numpy(), m.kinds) for m, t in zip(modalities, x, strict=True)})
    fold = torch.arange(rows) % 5
    plan = schedule(rows, batch=64, epochs=epochs)
    return fit_in_memory(vae, (x, observed), fold, OptimiserSettings(lr=6e-3), plan).model
