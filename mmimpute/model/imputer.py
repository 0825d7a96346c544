"""The model of the product: experts over one contract, stacked.

Every expert conditions on any subset of the values. The VAE is the generative one: it alone draws, generates and gives
z0; the additive and the Gaussian expert sharpen what is said about each missing value.

Shape suffixes: E members, B records, K modalities, D features, S draws, R rows that lack something.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmimpute.model.additive import Additive
from mmimpute.model.config import ModelConfig
from mmimpute.model.gaussian import Gaussian, kept_components
from mmimpute.model.stack import EXPERTS, WHOLE, WIDE, Beliefs, Conformal, Stack, original, pooled, variance
from mmimpute.model.standardise import FeatureStatistics
from mmimpute.model.vae import Inputs, MultiModalVAE

# Values of a prediction held at once, nodes x members x rows x features: a CPU's caches like 2^16 to 2^19 (5.2-5.7 thousand
# rows a second of nhanes; 2^21: 4.4, 2^23: 3.9), a GPU large batches.
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}
NODES = 2  # latent nodes per member over which a prediction is the mixture: 4 gain .0001 skill on nhanes 0.0 and cost 30% of the time


@dataclass(frozen=True)
class Prediction:
    """What is believed about every entry, in original units: observed values are themselves, with std 0. K of (B, D_j)."""

    mean: list[Tensor]
    std: list[Tensor]
    lower: list[Tensor] | None
    upper: list[Tensor] | None
    z0_BL: Tensor  # mean of q(z0 | x) of the first member


class Imputer(nn.Module):
    """VAE, additive and Gaussian experts, their stack and the conformal intervals."""

    def __init__(self, vae: MultiModalVAE, kept: Sequence[int]) -> None:
        """kept: principal components per modality, 0 for narrow ones."""
        super().__init__()
        self.vae = vae
        self.gaussian = Gaussian(vae.config, kept)
        self.additive = Additive(vae.config, vae.code, self.gaussian.components)
        self.stack = Stack(vae.config)
        self.conformal = Conformal(vae.config)
        for j, m in enumerate(vae.config.modalities):
            self.register_buffer(f"real_{j}", torch.tensor([k == "real" for k in m.kinds]), persistent=False)
            if m.width <= WIDE:
                self.register_buffer(f"colour_{j}", torch.eye(m.width))
            self.register_buffer(f"mixed_{j}", torch.tensor([k in ("real", "binary") for k in m.kinds]), persistent=False)

    @classmethod
    def untrained(cls, config: ModelConfig, statistics: Mapping[str, FeatureStatistics], rows: int) -> "Imputer":
        """First weights: where fitting starts. rows: of the training data."""
        return cls(MultiModalVAE(config, statistics), kept_components(config, rows))

    @classmethod
    def from_state(cls, config: ModelConfig, state: Mapping[str, Tensor]) -> "Imputer":
        """A fitted model from its config and state dict alone."""
        blank = {m.name: FeatureStatistics.blank(m.width) for m in config.modalities}
        bases = [state.get(f"gaussian.components.{j}.basis_EDQ") for j in range(len(config.modalities))]
        model = cls(MultiModalVAE(config, blank), [0 if b is None else b.shape[2] for b in bases])
        model.load_state_dict(dict(state))
        return model.eval()

    @property
    def config(self) -> ModelConfig:
        return self.vae.config

    @property
    def device(self) -> torch.device:
        return self.vae.hide_K.device

    def member(self, index: int) -> "Imputer":
        """One member as a model of its own: what has not seen the records of fold `index`."""
        shared = {f"vae.{name}" for name in self.vae.shared_names()} | {"conformal.many_K"}
        shared |= {name for name in self.state_dict() if name.startswith("colour_")}
        state = {name: t if name in shared else t[index : index + 1] for name, t in self.state_dict().items()}
        return Imputer.from_state(dataclasses.replace(self.config, members=1), state).to(self.device)

    # -- beliefs --------------------------------------------------------------------------------------------------

    def linear(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The Gaussian's completed vector and the additive expert's columns, for all records."""
        filled = self.gaussian(*self.gaussian.parts(inputs.z, inputs.observed))
        knots = [s.knots for s in self.vae.standardise]
        return filled, self.additive.columns(filled, inputs.z, inputs.filled, inputs.observed, self.vae.code, self.gaussian, knots)

    def _beliefs(self, j: int, filled: Tensor, columns: Tensor, rows: Tensor, heads) -> Beliefs:
        location_EBD, scale_EBD = self.vae.likelihoods[j].location_scale(heads)
        part = filled.split(self.gaussian.sizes, -1)[j]
        gaussian = self.gaussian.components[j].restore(part[:, rows])
        standardise = self.vae.standardise[j]
        chance = (gaussian * standardise.std + standardise.mean).clamp(0.005, 0.995)
        gaussian = torch.where(getattr(self, f"real_{j}"), gaussian, torch.logit(chance))
        return Beliefs(torch.stack([location_EBD, self.additive(j, columns[:, rows]), gaussian]), scale_EBD)

    def _each(self, x: Sequence[Tensor], observed: Sequence[Tensor]):
        """Per modality: rows that lack something, the VAE's heads and the experts' beliefs there."""
        inputs = self.vae.inputs(x, observed)
        latents = self.vae.latents(inputs, NODES)
        filled, columns = self.linear(inputs)
        for j in range(len(self.vae.private)):
            rows = (~observed[j].all(1)).nonzero().squeeze(1)
            heads = self.vae.heads(j, inputs, latents, rows)
            yield j, rows, heads, self._beliefs(j, filled, columns, rows, heads), latents.mean_EBL

    def believe(self, x: Sequence[Tensor], observed: Sequence[Tensor], j: int) -> Beliefs:
        """What each expert says of modality j of every record, none of which may hold all of it."""
        return next(beliefs for i, _, _, beliefs, _ in self._each(x, observed) if i == j)

    # -- use ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, x: Sequence[Tensor], observed: Sequence[Tensor], level: float | None = None) -> Prediction:
        """Completes records: K of (B, D_j) values in original units and masks of what is observed.

        level: coverage of the intervals (one of `stack.LEVELS`); None leaves them out. A record's result depends neither
        on a seed nor on the records next to it.
        """
        size = max(1, CHUNK[self.device.type] // (NODES * self.config.members * max(m.width for m in self.config.modalities)))
        pieces = [
            self._predict([t[i : i + size] for t in x], [o[i : i + size] for o in observed], level)
            for i in range(0, max(1, x[0].shape[0]), size)
        ]
        joined = {
            name: [torch.cat(parts) for parts in zip(*(getattr(p, name) for p in pieces), strict=True)]
            if getattr(pieces[0], name) is not None
            else None
            for name in ("mean", "std", "lower", "upper")
        }
        return Prediction(**joined, z0_BL=torch.cat([p.z0_BL for p in pieces]))

    def _predict(self, x: Sequence[Tensor], observed: Sequence[Tensor], level: float | None) -> Prediction:
        mean, std, lower, upper, mean_EBL = [], [], [], [], None
        for j, rows, heads, beliefs, mean_EBL in self._each(x, observed):  # noqa: B007
            whole_R = ~observed[j][rows].any(1)
            own, spread = self._original(j, beliefs, whole_R, heads)
            put = lambda t, values, rows=rows: t.index_copy(0, rows, values.to(t.dtype))  # noqa: E731
            value_BD = torch.where(observed[j], x[j], 0.0).float()
            seen_RD = observed[j][rows]
            mean.append(put(value_BD, torch.where(seen_RD, value_BD[rows], own)))
            std.append(put(torch.zeros_like(value_BD), torch.where(seen_RD, 0.0, spread)))
            if level is not None:
                group_R = self.conformal.group(j, [o[rows] for o in observed])
                bounds = self.conformal.bounds(j, level, own, spread, group_R)
                for found, bound in zip((lower, upper), bounds, strict=True):
                    found.append(put(value_BD, torch.where(seen_RD, value_BD[rows], bound)))
        return Prediction(mean, std, lower if level else None, upper if level else None, mean_EBL[0])

    def _original(self, j: int, beliefs: Beliefs, whole_R: Tensor, heads) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (R, D) in original units; kinds that only the VAE knows come from its mixture."""
        location, scale = pooled(*self.stack.modalities[j](beliefs, whole_R))
        mixed = original(location, scale, getattr(self, f"real_{j}"), self.vae.standardise[j])
        mixed_D = getattr(self, f"mixed_{j}")
        if bool(mixed_D.all()):
            return mixed
        alone = self.vae.likelihoods[j].moments(heads, self.vae.standardise[j])
        return tuple(torch.where(mixed_D, a, b) for a, b in zip(mixed, alone, strict=True))

    @torch.no_grad()
    def experts(self, x: Sequence[Tensor], observed: Sequence[Tensor], j: int) -> dict[str, tuple[Tensor, Tensor]]:
        """What each expert alone would say of modality j, which no record may hold: name -> mean and std, (B, D_j)."""
        beliefs, stack = self.believe(x, observed, j), self.stack.modalities[j]
        found = {}
        for m, name in enumerate(EXPERTS):
            location = beliefs.location_MEBD[m].mean(0)
            scale = beliefs.scale_EBD.mean(0) if name == "vae" else stack.alone_EGMD[:, WHOLE, m].mean(0).expand_as(location)
            found[name] = original(location, scale, getattr(self, f"real_{j}"), self.vae.standardise[j])
        return found

    @torch.no_grad()
    def impute(
        self, record: Sequence[tuple[Tensor | None, int]], draws: int | None = None, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Complete records. `record` holds K pairs: (N x D_j tensor, 1) or (anything, 0).

        Returns K tensors, N x D_j (draws=None: one draw) or draws x N x D_j. Observed values are copied to the bit; what
        is missing is drawn jointly by the VAE, and each draw put where the stack's mean and deviation say. The dependence
        is the VAE's, recoloured where a whole modality is missing: on average it has the correlations of out-of-fold errors.
        """
        x, observed = self.vae.read(record)
        completed = self.vae.impute(record, 1 if draws is None else draws, generator)
        for j, rows, _, beliefs, _ in self._each(x, observed):
            whole_R = ~observed[j][rows].any(1)
            moved_SRD = self._moved(j, completed[j][:, rows], beliefs, whole_R, generator).to(x[j].dtype)
            kept_SRD = torch.where(observed[j][rows], completed[j][:, rows], moved_SRD)
            completed[j] = completed[j].index_copy(1, rows, kept_SRD)
        return [c[0] for c in completed] if draws is None else completed

    def deviations(self, j: int, drawn_SRD: Tensor, beliefs: Beliefs) -> Tensor:
        """Draws of the VAE in units of what it believes: mean 0 and variance 1 for every real feature of every record."""
        own_ERD = beliefs.location_MEBD[EXPERTS.index("vae")]
        scale_RD = (beliefs.scale_EBD.square().mean(0) + variance(own_ERD)).sqrt()
        return (self.vae.standardise[j](drawn_SRD.float()) - own_ERD.mean(0)) / scale_RD

    def _moved(self, j: int, drawn_SRD: Tensor, beliefs: Beliefs, whole_R: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draws of the VAE with the margins of the stack."""
        real_D = getattr(self, f"real_{j}")
        location, scale = pooled(*self.stack.modalities[j](beliefs, whole_R))
        deviation_SRD = self.deviations(j, drawn_SRD, beliefs)
        if hasattr(self, f"colour_{j}"):
            coloured_SRD = torch.where(real_D, deviation_SRD, 0.0) @ getattr(self, f"colour_{j}").T
            deviation_SRD = torch.where(whole_R[:, None], coloured_SRD, deviation_SRD)
        numbers_SRD = self.vae.standardise[j].inverse(location + scale * deviation_SRD)
        before_RD, after_RD = torch.sigmoid(beliefs.location_MEBD[EXPERTS.index("vae")]).mean(0), torch.sigmoid(location)
        # The least that has to be flipped for the probability to be `after`.
        keep_RD, raise_RD = (after_RD / before_RD).clamp(max=1), ((after_RD - before_RD) / (1 - before_RD)).clamp(min=0)
        chance_SRD = torch.rand(drawn_SRD.shape, generator=generator, device=self.device)
        codes_SRD = torch.where(drawn_SRD > 0.5, chance_SRD < keep_RD, chance_SRD < raise_RD).to(drawn_SRD.dtype)
        moved = torch.where(real_D, numbers_SRD, codes_SRD)
        return torch.where(getattr(self, f"mixed_{j}"), moved, drawn_SRD)

    def generate(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """n synthetic records from p(z0) p(zj | z0) p(xj | zj, z0): K tensors n x D_j in original units."""
        return self.vae.generate(n, generator)
