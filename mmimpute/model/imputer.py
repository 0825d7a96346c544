"""The model of the product: experts over one contract, stacked.

Every expert conditions on any subset of the values. The VAE is the generative one: it alone draws, generates and gives
z0; the additive and the Gaussian expert sharpen what is said about each missing value.

Shape suffixes: E members, B records, K modalities, D features, S draws, R rows that lack something.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmimpute.model.additive import Additive
from mmimpute.model.config import NUMBERS, ModalityConfig, ModelConfig
from mmimpute.model.diffusion import Diffusion, diffused
from mmimpute.model.gaussian import Gaussian
from mmimpute.model.networks import fast_products, rounded
from mmimpute.model.stack import EXPERTS, GAP, WHOLE, WIDE, Beliefs, Conformal, Stack, drawn_around, original, pooled
from mmimpute.model.standardise import FeatureStatistics
from mmimpute.model.vae import Inputs, Latents, MultiModalVAE

# Records of a prediction taken together at most, and its values held at once, nodes x members x records x features, without and with
# images, signals or texts, whose networks hold many times that. A CPU's caches like a thousand or two records, however wide: a second by
# pieces of 200, 400, 800, 1,200, 2,400: tcga 867 952 915 - -, eicu - 2,517 2,877 2,900 2,850, nhanes - 6,220 7,790 8,470 8,990 (with
# smaller caches 2,400 were a fifth slower); of 2^18 values: 340, 1,850, 8,300. A GPU likes large batches.
PIECE = {"cpu": (1_536, (1 << 23, 1 << 18)), "cuda": (65_536, (1 << 24, 1 << 24))}
# Latent nodes per member that stand for the mixture that the VAE draws from; four were as good. To the stack the VAE says what it does at
# the means of its latents: two nodes add noise, and how wide the mixture is the stack learns. Skill of 20% of the people by two nodes and
# by the means: nhanes .2776 .2785, 0.5 .2419 .2434, eicu .1468 .1471, 0.5 .0856 .0855, tcga .1846 .1847, 0.5 .1312 .1313, one member of
# 60,000 simulated records .2397 .2411; nhanes 0.5 with one other modality left .1151 .1160; values missing inside a modality, nhanes 0.5
# .3654 .3662, eicu 0.5 .1283 .1292.
NODES = 2
# With images, signals or texts, which bend more. Handwritten digits (8 x 8, from a tone, a text, a vector and another digit): a classifier
# reads 92% of the means of 2 nodes and 99.5% of 16; 2 cost a quarter of 16 (five views of 28 x 28 x 3, one missing).
WHOLE_NODES = 8


@dataclass(frozen=True)
class Prediction:
    """What is believed about every entry, in original units: observed values are themselves, with std 0. K of (B, D_j)."""

    mean: list[Tensor]
    std: list[Tensor]
    lower: list[Tensor] | None
    upper: list[Tensor] | None
    z0_BL: Tensor  # mean of q(z0 | x) of the first member


@dataclass(frozen=True)
class Conditioned:
    """What does not depend on the modality that is asked for: all experts conditioned on what some records hold."""

    inputs: Inputs
    latents: Latents
    filled_EBP: Tensor | None  # the Gaussian's completed vector
    columns_EBC: Tensor | None  # of the additive expert
    values_EBV: Tensor | None  # of its wide modalities; all three None where nothing else is asked for than the VAE knows alone


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
        self.diffusion = Diffusion(vae.config, vae.private, vae.likelihoods) if diffused(vae.config) else None
        for j, m in enumerate(vae.config.modalities):
            if m.width <= WIDE and not m.structured:
                self.register_buffer(f"colour_{j}", torch.eye(m.width))
            self._kinds(j, m)

    def _kinds(self, j: int, modality: ModalityConfig) -> None:
        """What is to be known of modality j's features by their kinds."""
        kinds = modality.kinds
        self.register_buffer(f"real_{j}", torch.tensor([k == "real" for k in kinds]), persistent=False)
        self.register_buffer(f"number_{j}", torch.tensor([k in NUMBERS for k in kinds]), persistent=False)
        mixed_D = torch.tensor([k != "categorical" and not modality.structured for k in kinds])  # what several experts know
        self.register_buffer(f"mixed_{j}", mixed_D, persistent=False)
        least_D = torch.tensor([0.0 if k in ("count", "ordinal") else -torch.inf for k in kinds])
        most_D = torch.tensor([n - 1.0 if k == "ordinal" else torch.inf for k, n in zip(kinds, modality.levels, strict=True)])
        self.register_buffer(f"least_{j}", least_D, persistent=False)
        self.register_buffer(f"most_{j}", most_D, persistent=False)

    @classmethod
    def from_state(cls, config: ModelConfig, state: Mapping[str, Tensor]) -> "Imputer":
        """A fitted model from its config and state dict alone.

        Raises ValueError, TypeError or RuntimeError where they do not fit each other.
        """
        blank = {m.name: FeatureStatistics.blank(m.width) for m in config.modalities}
        bases = [state.get(f"gaussian.components.{j}.basis_EDQ") for j in range(len(config.modalities))]
        kept = [0 if b is None else b.shape[2] for b in bases]
        model = cls(MultiModalVAE(config, blank), kept)
        model.load_state_dict(dict(state))
        return model.eval()

    @property
    def config(self) -> ModelConfig:
        return self.vae.config

    @property
    def nodes(self) -> int:
        """Latent nodes per member in a prediction."""
        return WHOLE_NODES if self.config.structured else NODES

    @property
    def device(self) -> torch.device:
        return self.vae.hide_K.device

    def member(self, index: int) -> "Imputer":
        """One member as a model of its own: what has not seen the records of fold `index`."""
        if self.config.members == 1:
            return self
        shared = {f"vae.{name}" for name in self.vae.shared_names()} | {"conformal.many_K"}
        shared |= {name for name in self.state_dict() if name.startswith("colour_")}
        shared |= {f"diffusion.{name}" for name in self.diffusion.shared_names()} if self.diffusion is not None else set()
        state = {name: t if name in shared else t[index : index + 1] for name, t in self.state_dict().items()}
        return Imputer.from_state(dataclasses.replace(self.config, members=1), state).to(self.device)

    # -- beliefs --------------------------------------------------------------------------------------------------

    def linear(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The Gaussian's completed vector, the additive expert's columns and its single values, for all records."""
        believed = self.vae.believed(inputs)
        filled = self.gaussian(*self.gaussian.parts(inputs.z, believed))
        knots = [s.knots for s in self.vae.standardise]
        return filled, *self.additive.columns(filled, inputs.z, inputs.filled, believed, self.vae.code, self.gaussian, knots)

    def _conditioned(self, x: Sequence[Tensor], observed: Sequence[Tensor], products: Callable = nullcontext) -> "Conditioned":
        """products: of the networks; the Gaussian's, which solve equations, stay exact."""
        inputs = self.vae.inputs(x, observed)
        linear = self.linear(inputs) if any(not m.structured for m in self.config.modalities) else (None, None, None)
        with products():
            return Conditioned(inputs, self.vae.latents(inputs, self.nodes), *linear)

    def _own(self, j: int, inputs: Inputs, latents: Latents, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the VAE says of modality j of some records, by its member: see `Likelihoods.location_scale`."""
        return self.vae.likelihoods[j].location_scale(self.vae.heads(j, inputs, latents, rows), self.vae.standardise[j])

    def _beliefs(self, j: int, given: "Conditioned", rows: Tensor) -> Beliefs:
        """What all experts say of modality j of some records, the VAE at the means of its latents."""
        location_EBD, scale_EBD = self._own(j, given.inputs, given.latents.centre, rows)
        gaussian = self.gaussian.components[j].restore(given.filled_EBP.split(self.gaussian.sizes, -1)[j].index_select(1, rows))
        standardise = self.vae.standardise[j]
        chance = (gaussian * standardise.std + standardise.mean).clamp(0.005, 0.995)
        gaussian = torch.where(getattr(self, f"number_{j}"), gaussian, torch.logit(chance))
        additive = self.additive(j, given.columns_EBC.index_select(1, rows), given.values_EBV.index_select(1, rows))
        present_BK = given.inputs.present_BK[rows].float()
        others_B = (present_BK.sum(1) - present_BK[:, j]) / max(1, present_BK.shape[1] - 1)
        return Beliefs(torch.stack([location_EBD, additive, gaussian]), scale_EBD, others_B)

    def _margins(self, j: int, mode: int, given: "Conditioned", rows: Tensor) -> tuple[Tensor, Tensor]:
        """Every member's location and scale of modality j of some records, (E, R, D): the stack's. Of a record of which nothing is observed
        it was never asked; what is true of it is what is true of people."""
        location, scale = self.stack.modalities[j](self._beliefs(j, given, rows), mode)
        unknown_R1 = ~given.inputs.present_BK[rows].any(1, keepdim=True)
        number_D, mean_D = getattr(self, f"number_{j}"), self.vae.standardise[j].mean
        marginal_D = torch.where(number_D, 0.0, torch.logit(mean_D, 1e-3))
        return torch.where(unknown_R1, marginal_D, location), torch.where(unknown_R1, 1.0, scale)

    def _incomplete(self, given: "Conditioned") -> Iterator[tuple[int, int, Tensor]]:
        """Per modality, the records with gaps in it and those that lack it whole: mode and rows, the first perhaps more than once."""
        for j, seen_BD in enumerate(given.inputs.observed):
            whole_B = ~seen_BD.any(1)
            for mode, rows_B in ((WHOLE, whole_B), (GAP, ~whole_B & ~seen_BD.all(1))):
                rows = rounded(rows_B.nonzero().squeeze(1))
                if len(rows):
                    yield j, mode, rows

    @torch.no_grad()
    def believe(self, x: Sequence[Tensor], observed: Sequence[Tensor], j: int) -> Beliefs:
        """What each expert says of modality j of every record, none of which may hold all of it."""
        return self._beliefs(j, self._conditioned(x, observed), torch.arange(len(x[j]), device=self.device))

    @torch.no_grad()
    def drawn_from(self, x: Sequence[Tensor], observed: Sequence[Tensor], j: int) -> tuple[Tensor, Tensor]:
        """Mean and deviation of what each member of the VAE draws of modality j of every record, none of which may hold all of it."""
        inputs = self.vae.inputs(x, observed)
        return self._own(j, inputs, self.vae.latents(inputs, self.nodes), torch.arange(len(x[j]), device=self.device))

    # -- use ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, x: Sequence[Tensor], observed: Sequence[Tensor], level: float | None = None) -> Prediction:
        """Completes records: K of (B, D_j) values in original units and masks of what is observed.

        level: coverage of the intervals (one of `stack.LEVELS`); None leaves them out. A record's result depends neither
        on a seed nor on the records next to it.
        """
        most, values = PIECE[self.device.type]
        per_record = self.nodes * self.config.members * max(m.width for m in self.config.modalities)
        size = max(1, min(most, values[self.config.structured] // per_record))
        count = max(1, -(-len(x[0]) // size))
        split_x, split_observed = (zip(*(t.tensor_split(count) for t in tensors), strict=True) for tensors in (x, observed))
        pieces = [self._predict(*piece, level) for piece in zip(split_x, split_observed, strict=True)]
        joined = {
            name: [torch.cat(parts) for parts in zip(*(getattr(p, name) for p in pieces), strict=True)]
            if getattr(pieces[0], name) is not None
            else None
            for name in ("mean", "std", "lower", "upper")
        }
        return Prediction(**joined, z0_BL=torch.cat([p.z0_BL for p in pieces]))

    def _predict(self, x: Sequence[Tensor], observed: Sequence[Tensor], level: float | None) -> Prediction:
        given = self._conditioned(x, observed, fast_products)
        mean = [filled_BD.clone() for filled_BD in given.inputs.filled]
        std = [torch.zeros_like(m) for m in mean]
        lower, upper = ([m.clone() for m in mean] if level else None for _ in range(2))
        with fast_products():
            for j, mode, rows in self._incomplete(given):
                seen_RD = observed[j][rows]
                own, spread = self._original(j, mode, given, rows)
                found = [(mean[j], own), (std[j], spread)]
                if level:
                    group_R = self.conformal.group(j, [o[rows] for o in observed])
                    alone = self.config.modalities[j].structured
                    bounds = [torch.full_like(own, torch.nan)] * 2 if alone else self.conformal.bounds(j, level, own, spread, group_R)
                    found += zip((lower[j], upper[j]), bounds, strict=True)
                for whole_BD, part_RD in found:
                    whole_BD[rows] = torch.where(seen_RD, whole_BD[rows], part_RD)
        return Prediction(mean, std, lower, upper, given.latents.mean_EBL[0])

    def _original(self, j: int, mode: int, given: "Conditioned", rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (R, D) in original units; what only the VAE knows comes from its mixture."""
        mixed_D = getattr(self, f"mixed_{j}")
        if not mixed_D.all():
            alone = self.vae.likelihoods[j].moments(self.vae.heads(j, given.inputs, given.latents, rows), self.vae.standardise[j])
            if not mixed_D.any():
                return alone
        mixed = self.original(j, *pooled(*self._margins(j, mode, given, rows)))
        return mixed if mixed_D.all() else tuple(torch.where(mixed_D, a, b) for a, b in zip(mixed, alone, strict=True))

    def original(self, j: int, location: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation in original units, the means of counts and levels within their range."""
        mean, std = original(location, scale, getattr(self, f"number_{j}"), self.vae.standardise[j])
        return mean.clamp(getattr(self, f"least_{j}"), getattr(self, f"most_{j}")), std

    @torch.no_grad()
    def experts(self, x: Sequence[Tensor], observed: Sequence[Tensor], j: int) -> dict[str, tuple[Tensor, Tensor]]:
        """What each expert alone would say of modality j, which no record may hold: name -> mean and std, (B, D_j)."""
        if self.config.modalities[j].structured:
            found = self.predict(x, observed)
            return {"vae": (found.mean[j], found.std[j])}
        beliefs, stack = self.believe(x, observed, j), self.stack.modalities[j]
        found = {}
        for m, name in enumerate(EXPERTS):
            location = beliefs.location_MEBD[m].mean(0)
            scale = (self.drawn_from(x, observed, j)[1] if name == "vae" else stack.alone_EGMD[:, WHOLE, m]).mean(0)
            found[name] = self.original(j, location, scale.expand_as(location))
        return found

    @torch.no_grad()
    def impute(
        self, record: Sequence[tuple[Tensor | None, int]], draws: int | None = None, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Complete records. `record` holds K pairs: (N x D_j tensor, 1) or (anything, 0).

        Returns K tensors, N x D_j (draws=None: one draw) or draws x N x D_j. Observed values are copied to the bit; what
        is missing is drawn jointly by the VAE, and each draw put where the stack's mean and deviation say, around them as members differ
        (see `stack.drawn_around`). The dependence is the VAE's, recoloured where a whole modality is missing: on average it has the
        correlations of out-of-fold errors.
        Whole modalities that diffusion draws stay as they are drawn: the VAE's moments are not theirs.
        """
        x, observed = self.vae.read(record)
        completed = self.vae.impute(record, 1 if draws is None else draws, generator, self.diffusion)
        given = self._conditioned(x, observed)
        for j, mode, rows in self._incomplete(given):
            if self.config.modalities[j].structured or (mode == WHOLE and j in diffused(self.config)):
                continue
            moved_SRD = self._moved(j, mode, completed[j][:, rows], given, rows, generator).to(x[j].dtype)
            kept_SRD = torch.where(observed[j][rows], completed[j][:, rows], moved_SRD)
            completed[j] = completed[j].index_copy(1, rows, kept_SRD)
        return [c[0] for c in completed] if draws is None else completed

    def deviations(self, j: int, drawn_SRD: Tensor, own: tuple[Tensor, Tensor]) -> Tensor:
        """Draws of the VAE in units of their member's, of `drawn_from`: mean 0 and variance 1 for every real feature of every record."""
        mean_SRD, deviation_SRD = (t[self._drawing(len(drawn_SRD))] for t in own)
        return (self.vae.standardise[j](drawn_SRD.float()) - mean_SRD) / deviation_SRD

    def _drawing(self, draws: int) -> Tensor:
        """The member that makes each draw, (S,)."""
        return torch.arange(self.config.members).repeat_interleave(torch.tensor(self.vae.shares(draws)))

    def _moved(self, j: int, mode: int, drawn_SRD: Tensor, given: "Conditioned", rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draws of the VAE with the margins of the stack; those of counts and levels, which are whole, as they are."""
        real_D, own = getattr(self, f"real_{j}"), self._own(j, given.inputs, given.latents, rows)
        location_ERD, scale_ERD = self._margins(j, mode, given, rows)
        location, scale = pooled(location_ERD, scale_ERD)
        around_ERD, within_RD = drawn_around(location_ERD, scale)
        member_S = self._drawing(len(drawn_SRD))
        deviation_SRD = self.deviations(j, drawn_SRD, own)
        if mode == WHOLE and hasattr(self, f"colour_{j}"):
            deviation_SRD = torch.where(real_D, deviation_SRD, 0.0) @ getattr(self, f"colour_{j}").T
        numbers_SRD = self.vae.standardise[j].inverse(location + around_ERD[member_S] + within_RD * deviation_SRD)
        before_RD, after_RD = torch.sigmoid(own[0]).mean(0), torch.sigmoid(location)
        # The least that has to be flipped for the probability to be `after`.
        keep_RD, raise_RD = (after_RD / before_RD).clamp(max=1), ((after_RD - before_RD) / (1 - before_RD)).clamp(min=0)
        chance_SRD = torch.rand(drawn_SRD.shape, generator=generator, device=self.device)
        codes_SRD = torch.where(drawn_SRD > 0.5, chance_SRD < keep_RD, chance_SRD < raise_RD).to(drawn_SRD.dtype)
        moved = torch.where(real_D, numbers_SRD, codes_SRD)
        return torch.where(getattr(self, f"least_{j}").isinf() & getattr(self, f"mixed_{j}"), moved, drawn_SRD)

    def generate(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """n synthetic records from p(z0) p(zj | z0) p(xj | zj, z0): K tensors n x D_j in original units."""
        return self.vae.generate(n, generator, self.diffusion)
