"""Small synthetic cohorts with known truth."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from mmimpute import stacking
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


def decoded(config: ModelConfig, decoder: str) -> ModelConfig:
    """The same with this decoder for every modality."""
    return dataclasses.replace(config, modalities=tuple(dataclasses.replace(m, decoder=decoder) for m in config.modalities))


def mixed_model(seed: int = 0, members: int = 1, decoder: str = "likelihood") -> MultiModalVAE:
    """An untrained model of every kind, with weights that are not at their symmetric start."""
    torch.manual_seed(seed)
    values = mixed_values(500)
    fitted = {
        m.name: statistics(v.numpy(), m.kinds, log=(6,) if m is MIXED else ()) for m, v in zip(CONFIG.modalities, values, strict=True)
    }
    model = MultiModalVAE(dataclasses.replace(decoded(CONFIG, decoder), members=members), fitted).eval()
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


def assembled_additive(x: list[Tensor], kinds: list[str], fold: Tensor | None = None) -> stacking.Assembly:
    """The linear experts of two members, fitted to complete records of modalities of one kind each; fold: in turn."""
    modalities = (ModalityConfig(f"m{j}", (kind,) * v.shape[1]) for j, (v, kind) in enumerate(zip(x, kinds, strict=True)))
    config = ModelConfig(tuple(modalities), 2, 8, 16, 1, 16)
    vae = MultiModalVAE(config, {m.name: FeatureStatistics.blank(m.width) for m in config.modalities})
    data = stacking.Assembly(vae, x, everything(x), torch.arange(len(x[0])) % 2 if fold is None else fold)
    stacking.fit_gaussian(data)
    stacking.fit_additive(data)
    return data


def judged(monkeypatch: pytest.MonkeyPatch, what: str, x: list[Tensor], kinds: list[str], fold: Tensor | None = None) -> list[tuple]:
    """What member 0's judges say of each modality: `_best_penalties` or `_best_settings` of stacking."""
    chosen, best = [], getattr(stacking, what)
    monkeypatch.setattr(stacking, what, lambda *given: chosen.append(best(*given)) or chosen[-1])
    assembled_additive(x, kinds, fold)
    return chosen


def everything(x: list[Tensor]) -> list[Tensor]:
    """Masks of complete records."""
    return [torch.ones_like(t, dtype=torch.bool) for t in x]


def fit_linear_gaussian(
    x: list[Tensor], observed: list[Tensor] | None = None, epochs: int = 10, decoder: str = "likelihood", members: int = 5
) -> Imputer:
    """The whole model, small: some ten seconds for 4,800 records."""
    observed = everything(x) if observed is None else observed
    return assemble(fit_linear_vae(x, observed, epochs, decoder, members), x, observed, folds(len(x[0]), members))


def folds(rows: int, members: int) -> Tensor:
    """Record i is in fold i % 5, if there is a member for it."""
    fold_N = torch.arange(rows) % 5
    return torch.where(fold_N < members, fold_N, -1)


def fit_linear_vae(x: list[Tensor], observed: list[Tensor], epochs: int, decoder: str = "likelihood", members: int = 5) -> MultiModalVAE:
    """Its VAE alone."""
    torch.manual_seed(0)
    rows = len(x[0])
    modalities = tuple(ModalityConfig(n, ("real",) * t.shape[1]) for n, t in zip("abc", x, strict=True))
    sizes = {"shared": 8, "hidden": 64, "decoder": 32, "dropout": 0.0, "drop_values": 0.0, "elbo_weight": 0.5, "elbo_share": 1.0}
    config = decoded(ModelConfig(modalities, members=members, impute_draws=8, **sizes), decoder)
    vae = MultiModalVAE(config, {m.name: statistics(t[~t.isnan().any(1)].numpy(), m.kinds) for m, t in zip(modalities, x, strict=True)})
    fold = folds(rows, members)
    plan = schedule(rows, batch=64, epochs=epochs)
    return fit_in_memory(vae, (x, observed), fold, OptimiserSettings(lr=6e-3), plan).model


STAMPS = np.array(
    [
        [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]],
        [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]],
        [[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]],
    ]
)
FORMS = (
    ModalityConfig("bright", ("real",) * 64, form="image", shape=(1, 8, 8)),
    ModalityConfig("dark", ("real",) * 72, form="image", shape=(1, 9, 8)),
    ModalityConfig("wave", ("real",) * 40, form="signal", shape=(20, 2)),
    ModalityConfig("clinic", ("real",) * 3),
)


SIZES = {"shared": 16, "hidden": 64, "decoder": 32, "dropout": 0.0, "elbo_weight": 1.0, "elbo_share": 0.5}


def stamped(rows: int, seed: int) -> tuple[list[Tensor], np.ndarray, np.ndarray]:
    """Records of FORMS, with the class and the place (N, 2) of what the images show.

    Both images show the same stamp at the same place, white on black and, a row higher, black on white; the wave's two channels are a
    sine and its half, of the phase whose sine and cosine the clinic measures, and of a frequency that it tells as well.
    """
    draw = np.random.default_rng(seed)
    kind_N, place_N2 = draw.integers(0, 3, rows), 4 * draw.integers(0, 2, (rows, 2))
    pictures = np.zeros((rows, 9, 8))
    for picture, kind, (down, right) in zip(pictures, kind_N, place_N2, strict=True):
        picture[down : down + 4, right : right + 4] = STAMPS[kind]
    phase_N1, pace_N1 = draw.uniform(-np.pi, np.pi, (rows, 1)), draw.uniform(0.5, 1.5, (rows, 1))
    sine_NT = np.sin(2 * np.pi * pace_N1 * np.arange(20) / 20 + phase_N1)
    noisy = lambda x, spread: x + spread * draw.normal(size=x.shape)  # noqa: E731
    images = [noisy(30 + 180 * pictures[:, :8], 10), noisy(220 - 180 * pictures, 10)]
    values = [np.clip(np.round(i), 0, 255).reshape(rows, -1) for i in images]
    values += [noisy(np.stack([sine_NT, 0.5 * sine_NT], 2).reshape(rows, -1), 0.05)]
    values += [noisy(np.concatenate([np.sin(phase_N1), np.cos(phase_N1), pace_N1], 1), 0.02)]
    return [torch.tensor(v, dtype=torch.float32) for v in values], kind_N, place_N2


def read_stamp(image: torch.Tensor, bright: bool) -> tuple[np.ndarray, np.ndarray]:
    """Class and place of the stamp that is nearest to each image."""
    height = 8 if bright else 9
    templates = np.zeros((3, 5, 5, 9, 8))
    for kind, down, right in np.ndindex(3, 5, 5):
        templates[kind, down, right, down : down + 4, right : right + 4] = STAMPS[kind]
    flat = templates[..., :height, :].reshape(75, -1)
    flat = 30 + 180 * flat if bright else 220 - 180 * flat
    nearest = ((image.numpy()[:, None] - flat) ** 2).sum(2).argmin(1)
    kind, down, right = np.unravel_index(nearest, (3, 5, 5))
    return kind, np.stack([down, right], 1)


def pooled_statistics(config: ModalityConfig, x: np.ndarray) -> FeatureStatistics:
    """What the data layer fits: of a channel for every value of an image or a signal."""
    if not config.structured:
        return statistics(x, config.kinds)
    axis = 1 if config.form == "image" else 2
    whole = x.reshape(-1, *config.shape)
    others = tuple(a for a in range(whole.ndim) if a != axis)
    spread = lambda t: np.broadcast_to(t, (1, *config.shape)).ravel()  # noqa: E731
    mean, std = (spread(f(whole, axis=others, keepdims=True)) for f in (np.mean, np.std))
    return FeatureStatistics(mean, std, np.zeros(x.shape[1], bool), np.ones(x.shape[1]), np.tile(np.linspace(-2, 2, 9), (x.shape[1], 1)))


def forms_model(x: list[Tensor], decoder: str = "likelihood", **sizes) -> MultiModalVAE:
    """An untrained model of FORMS."""
    torch.manual_seed(0)
    fitted = {m.name: pooled_statistics(m, v.numpy()) for m, v in zip(FORMS, x, strict=True)}
    return MultiModalVAE(decoded(ModelConfig(FORMS, **(SIZES | sizes)), decoder), fitted)


def fit_forms(rows: int = 800, epochs: int = 24, lr: float = 3e-3, **sizes) -> Imputer:
    """The whole model of FORMS, fitted to complete records of which a tenth judges."""
    x, _, _ = stamped(rows, 0)
    fold = torch.where(torch.arange(rows) % 10 == 0, 0, -1)
    vae = fit_in_memory(forms_model(x, **sizes), (x, everything(x)), fold, OptimiserSettings(lr=lr), schedule(rows, 64, epochs)).model
    return assemble(vae, x, everything(x), fold)
