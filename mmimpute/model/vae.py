"""The hierarchical multi-modal VAE of US 2025/0259050 A1: shared latent z0, private latents zj.

Inference -> generative -> loss, as in scvi-tools. Inputs are original units plus masks of observed values.
Fill before the encoders, mask after: a value that is not observed can change neither loss, gradient nor output.

Shape suffixes: B records, N records of a caller, K modalities, D features, C code columns, L latent, S draws,
H rows of a batch in which a modality is hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmimpute.model.config import ModelConfig
from mmimpute.model.likelihoods import Likelihoods
from mmimpute.model.networks import Code, Normal, Private, SharedEncoder, kl
from mmimpute.model.nodes import normal_nodes
from mmimpute.model.objective import LossTerms, hide, keep_values
from mmimpute.model.prior import SharedPrior, moments
from mmimpute.model.standardise import FeatureStatistics, Standardise

CHUNK = 1 << 23  # values of a prediction held at once: draws x rows x features


@dataclass(frozen=True)
class Predictive:
    """What the model believes about every entry, in original units, in the order of the modalities."""

    mean: list[Tensor]  # K of (B, D_j)
    std: list[Tensor]  # K of (B, D_j)
    z0_BL: Tensor  # mean of q(z0 | x)


@dataclass(frozen=True)
class Inputs:
    """Standardised values, likelihood targets, masks and codes of one batch, per modality."""

    target: list[Tensor]
    observed: list[Tensor]
    codes: list[Tensor]
    present_BK: Tensor  # something is observed
    shown_BK: Tensor  # something is seen by the encoders


class MultiModalVAE(nn.Module):
    """q(z0 | any subset), p(zj | z0), q(zj | z0, xj), p(xj | zj, z0); trained on L_elbo + L_impute."""

    def __init__(self, config: ModelConfig, statistics: Mapping[str, FeatureStatistics]) -> None:
        super().__init__()
        self.config = config
        names = [m.name for m in config.modalities]
        if set(names) != set(statistics):
            raise ValueError(f"statistics are of {sorted(statistics)}, the modalities are {sorted(names)}")
        # Lists, not dicts: a modality's name may hold a dot, which module names may not.
        self.standardise = nn.ModuleList(Standardise(statistics[n]) for n in names)
        self.likelihoods = nn.ModuleList(map(Likelihoods, config.modalities, self.standardise))
        self.code = nn.ModuleList(Code(m, config.piecewise_limit) for m in config.modalities)
        self.shared = SharedEncoder(config, sum(c.width for c in self.code))
        self.prior = SharedPrior(config.shared)
        self.private = nn.ModuleList(
            Private(config, m, c.width, p.size) for m, c, p in zip(config.modalities, self.code, self.likelihoods, strict=True)
        )
        self.register_buffer("hide_K", torch.tensor([m.hide for m in config.modalities]), persistent=False)
        for j, m in enumerate(config.modalities):
            real_D = torch.tensor([k == "real" for k in m.kinds])
            self.register_buffer(f"real_{j}", real_D, persistent=False)

    @classmethod
    def from_state(cls, config: ModelConfig, state: Mapping[str, Tensor]) -> "MultiModalVAE":
        """A trained model from its config and state dict alone; the statistics are part of the state."""
        model = cls(config, {m.name: FeatureStatistics.blank(m.width) for m in config.modalities})
        model.load_state_dict(dict(state))
        return model.eval()

    # -- inputs ---------------------------------------------------------------------------------------------------

    def inputs(self, x: Sequence[Tensor], observed: Sequence[Tensor], shown: Sequence[Tensor] | None = None) -> Inputs:
        """Fill what is unobserved, standardise, encode. `shown`: the observed values that the encoders may see."""
        target, codes, shown = [], [], observed if shown is None else shown
        for j, (x_BD, seen_BD, shown_BD) in enumerate(zip(x, observed, shown, strict=True)):
            filled_BD = torch.where(seen_BD, x_BD, 0.0)
            z_BD = torch.where(seen_BD, self.standardise[j](filled_BD), 0.0)
            target.append(torch.where(getattr(self, f"real_{j}"), z_BD, filled_BD))
            codes.append(self.code[j](z_BD * shown_BD, filled_BD, shown_BD, self.standardise[j].knots))
        return Inputs(
            target, list(observed), codes, torch.stack([o.any(1) for o in observed], 1), torch.stack([o.any(1) for o in shown], 1)
        )

    def inference(self, codes: Sequence[Tensor], present_BK: Tensor) -> Normal:
        """q(z0 | the modalities of `present_BK`)."""
        kept = [c * present_BK[:, j, None] for j, c in enumerate(codes)]
        return self.shared(kept, present_BK)

    # -- training -------------------------------------------------------------------------------------------------

    def forward(
        self, x: Sequence[Tensor], observed: Sequence[Tensor], elbo_scale: float = 1.0, generator: torch.Generator | None = None
    ) -> LossTerms:
        """Both terms on one batch. `elbo_scale` is for warm-up; noise comes from `generator` or torch's default."""
        share = self.config.drop_values if self.training else 0.0
        inputs = self.inputs(x, observed, keep_values(observed, share, generator) if share else None)
        hidden_BK = hide(inputs.present_BK, self.hide_K, self.config.hide_one, generator)
        both = [torch.cat([c, c]) for c in inputs.codes]
        q0 = self.inference(both, torch.cat([inputs.shown_BK, inputs.shown_BK & ~hidden_BK]))
        q_all, q_kept = (Normal(m, v) for m, v in zip(q0.mean.chunk(2), q0.var.chunk(2), strict=True))
        z0_BL = q_all.sample(self._noise(q_all.mean.shape, generator))
        z0_SBL = q_kept.sample(self._antithetic(self.config.impute_draws, q_kept.mean.shape, generator))
        columns = []
        for j in range(len(self.private)):
            rows_H = hidden_BK[:, j].nonzero().squeeze(1)
            columns.append(self._terms(j, inputs, z0_BL, z0_SBL[:, rows_H], rows_H, generator))
        reconstruction_BK, private_kl_BK, impute_BK, score_BK = (torch.stack(c, 1) for c in zip(*columns, strict=True))
        prior = Normal(torch.zeros_like(q_all.mean), torch.ones_like(q_all.var))
        shared_kl_B = kl(q_all, prior)
        elbo_B = (reconstruction_BK - private_kl_BK).sum(1) - shared_kl_B
        objective = self._objective(inputs, elbo_B, score_BK, hidden_BK, elbo_scale)
        return LossTerms(
            objective,
            reconstruction_BK.detach(),
            private_kl_BK.detach(),
            shared_kl_B.detach(),
            impute_BK.detach(),
            score_BK.detach(),
            inputs.present_BK,
            hidden_BK,
        )

    def _terms(
        self, j: int, inputs: Inputs, z0_BL: Tensor, z0_SHL: Tensor, rows_H: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Modality j: reconstruction, private KL, imputation and its score, each (B,).

        One pass through the decoder serves both terms: B rows to reconstruct, S x H rows to impute.
        """
        private, likelihood = self.private[j], self.likelihoods[j]
        seen_BD, target_BD = inputs.observed[j], inputs.target[j]
        draws, rows, batch = z0_SHL.shape[0], rows_H.shape[0], z0_BL.shape[0]
        z0 = torch.cat([z0_BL, z0_SHL.flatten(0, 1)])
        prior = private.p(z0)
        prior_B = Normal(prior.mean[:batch], prior.var[:batch])
        posterior_B = private.q(z0_BL, prior_B, inputs.codes[j], inputs.shown_BK[:, j])
        q = Normal(torch.cat([posterior_B.mean, prior.mean[batch:]]), torch.cat([posterior_B.var, prior.var[batch:]]))
        noise = torch.cat(
            [self._noise((batch, private.own), generator), self._antithetic(draws, (rows, private.own), generator).flatten(0, 1)]
        )
        raw = private.decode(z0, q.sample(noise))
        seen_HD = seen_BD[rows_H]
        log_prob_BD = likelihood.log_prob(likelihood.heads(raw[:batch]), target_BD)
        heads_SHD = likelihood.heads(raw[batch:].unflatten(0, (draws, rows)))
        log_prob_SHD = likelihood.log_prob(heads_SHD, target_BD[rows_H])
        score_HD = likelihood.score(heads_SHD, target_BD[rows_H], log_prob_SHD)
        zero_B = z0_BL.new_zeros(batch)
        score_H = (score_HD * seen_HD).sum(1) / seen_HD.sum(1).clamp_min(1)
        if self.training and self.config.pair_weight:
            pairs_H = likelihood.pair_score(heads_SHD, target_BD[rows_H], seen_HD, generator)
            score_H = score_H + self.config.pair_weight * pairs_H
        return (
            (log_prob_BD * seen_BD).sum(1),
            kl(posterior_B, prior_B) * inputs.present_BK[:, j],
            zero_B.index_add(0, rows_H, (log_prob_SHD.mean(0) * seen_HD).sum(1)),
            zero_B.index_add(0, rows_H, score_H),
        )

    def _objective(self, inputs: Inputs, elbo_B: Tensor, score_BK: Tensor, hidden_BK: Tensor, elbo_scale: float) -> Tensor:
        """Score of what was hidden, mean over hidden modalities, minus the ELBO per observed value.

        The ELBO's parts keep their weights to each other: 1/D_j on some of them widens or narrows the posteriors.
        """
        values = torch.stack([o.sum() for o in inputs.observed]).sum().clamp_min(1)
        imputation = score_BK.sum() / hidden_BK.sum().clamp_min(1)
        return imputation - self.config.elbo_weight * elbo_scale * elbo_B.sum() / values

    def _noise(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, device=self.hide_K.device)

    def _antithetic(self, draws: int, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """Noise whose second half mirrors the first: what is linear in it cancels from the mean over draws."""
        half = self._noise((draws // 2, *shape), generator)
        return torch.cat([half, -half])

    @torch.no_grad()
    def posterior_moments(self, x: Sequence[Tensor], observed: Sequence[Tensor]) -> Tensor:
        """What `prior.fit` needs of a batch; sums over batches and ranks. Records with nothing observed say nothing."""
        inputs = self.inputs(x, observed)
        some_B = inputs.present_BK.any(1)
        q0 = self.inference(inputs.codes, inputs.present_BK)
        return moments(Normal(q0.mean[some_B], q0.var[some_B]))

    # -- use ------------------------------------------------------------------------------------------------------

    def _shared(self, inputs: Inputs, noise: Tensor) -> tuple[Tensor, Tensor]:
        """z0 from noise (S, B or 1, L), and its mean (B, L): of q(z0 | x), or of p(z0) where nothing is observed."""
        q0 = self.inference(inputs.codes, inputs.shown_BK)
        empty_B1 = ~inputs.shown_BK.any(1, keepdim=True)
        if not empty_B1.any():
            return q0.sample(noise), q0.mean
        return torch.where(empty_B1, self.prior.sample(noise), q0.sample(noise)), torch.where(empty_B1, self.prior.mean_L, q0.mean)

    def _decode(self, j: int, inputs: Inputs, z0_SBL: Tensor, noise: Tensor, rows: Tensor | slice = slice(None)) -> dict[str, Tensor]:
        """p(xj | zj, z0) with zj ~ q(zj | z0, xj), which is p(zj | z0) where nothing of xj is observed."""
        private = self.private[j]
        posterior = private.q(z0_SBL, private.p(z0_SBL), inputs.codes[j][rows], inputs.shown_BK[rows, j])
        return self.likelihoods[j].heads(private.decode(z0_SBL, posterior.sample(noise)))

    @torch.no_grad()
    def predict(self, x: Sequence[Tensor], observed: Sequence[Tensor], draws: int = 16, only_missing: bool = False) -> Predictive:
        """Mean and standard deviation of every entry given what is observed.

        The predictive is the mixture over `draws` fixed quasi-random antithetic latent nodes, the same for every
        record: a record's result depends neither on a seed nor on the records next to it. `only_missing` saves the
        work on modalities of which a record lacks nothing: their mean is the value itself, their std 0.
        """
        widest = sum(m.width for m in self.config.modalities)
        size = max(1, CHUNK // (draws * widest))
        pieces = [
            self._predict([t[i : i + size] for t in x], [o[i : i + size] for o in observed], draws, only_missing)
            for i in range(0, max(1, x[0].shape[0]), size)
        ]
        mean, std = ([torch.cat(parts) for parts in zip(*(getattr(p, name) for p in pieces), strict=True)] for name in ("mean", "std"))
        return Predictive(mean, std, torch.cat([p.z0_BL for p in pieces]))

    def _predict(self, x: Sequence[Tensor], observed: Sequence[Tensor], draws: int, only_missing: bool) -> Predictive:
        inputs = self.inputs(x, observed)
        shared = self.config.shared
        nodes_SL = normal_nodes(draws, shared + max(p.own for p in self.private)).to(self.hide_K.device)
        z0_SBL, mean_BL = self._shared(inputs, nodes_SL[:, None, :shared])
        mean, std = [], []
        for j, private in enumerate(self.private):
            noise = nodes_SL[:, None, shared : shared + private.own]
            lacking_B = ~observed[j].all(1)
            rows = lacking_B.nonzero().squeeze(1) if only_missing else slice(None)
            heads = self._decode(j, inputs, z0_SBL[:, rows], noise, rows)
            mean_RD, std_RD = self.likelihoods[j].moments(heads, self.standardise[j])
            mean.append(mean_RD if not only_missing else x[j].float().index_copy(0, rows, mean_RD))
            std.append(std_RD if not only_missing else torch.zeros_like(x[j]).float().index_copy(0, rows, std_RD))
        return Predictive(mean, std, mean_BL)

    @torch.no_grad()
    def impute(
        self, record: Sequence[tuple[Tensor | None, int]], draws: int | None = None, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Complete records. `record` holds K pairs: (N x D_j tensor, 1) or (anything, 0).

        Returns K tensors, N x D_j (draws=None: one draw) or draws x N x D_j. Observed values are copied to the bit;
        what is missing, NaN inside an observed modality included, is drawn jointly: one z0 and zj per draw.
        """
        x, observed = self._read(record)
        inputs = self.inputs(x, observed)
        shape = (1 if draws is None else draws, x[0].shape[0], self.config.shared)
        z0_SBL, _ = self._shared(inputs, self._noise(shape, generator))
        completed = []
        for j, (x_BD, seen_BD) in enumerate(zip(x, observed, strict=True)):
            noise = self._noise((*z0_SBL.shape[:2], self.private[j].own), generator)
            heads = self._decode(j, inputs, z0_SBL, noise)
            drawn_SBD = self.likelihoods[j].sample(heads, self.standardise[j], generator).to(x_BD.dtype)
            completed.append(torch.where(seen_BD, x_BD, drawn_SBD))
        return [c[0] for c in completed] if draws is None else completed

    def _read(self, record: Sequence[tuple[Tensor | None, int]]) -> tuple[list[Tensor], list[Tensor]]:
        """Pairs -> values and masks. N comes from the observed tensors, else from any tensor, else it is 1."""
        modalities = self.config.modalities
        if len(record) != len(modalities):
            raise ValueError(f"a record has {len(modalities)} modalities, found {len(record)} pairs")
        tensors = [v for v, flag in record if flag] or [v for v, _ in record if isinstance(v, Tensor) and v.dim() == 2]
        rows = tensors[0].shape[0] if tensors else 1
        x, observed = [], []
        for (value, flag), m in zip(record, modalities, strict=True):
            if flag and tuple(value.shape) != (rows, m.width):
                raise ValueError(f"modality {m.name!r} has shape {tuple(value.shape)}, expected {(rows, m.width)}")
            x.append(value if flag else torch.zeros(rows, m.width, device=self.hide_K.device))
            observed.append(~torch.isnan(x[-1]) if flag else torch.zeros_like(x[-1], dtype=torch.bool))
        return x, observed

    @torch.no_grad()
    def generate(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """n synthetic records from p(z0) p(zj | z0) p(xj | zj, z0): K tensors n x D_j in original units."""
        nothing = [(torch.empty(n, 0), 0)] * len(self.private)
        return self.impute(nothing, generator=generator)
