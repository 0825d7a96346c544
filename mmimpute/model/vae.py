"""The hierarchical multi-modal VAE of US 2025/0259050 A1: shared latent z0, private latents zj.

Inference -> generative -> loss, as in scvi-tools. Inputs are original units plus masks of observed values.
Fill before the encoders, mask after: a value that is not observed can change neither loss, gradient nor output.

Shape suffixes: E members, B records, N records of a caller, K modalities, D features, C code columns, L latent,
S draws, H rows of a batch in which a modality is hidden, R rows of a batch on which L_elbo is estimated.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmimpute.model.adversarial import Discriminator, judged_modalities
from mmimpute.model.config import ModalityConfig, ModelConfig
from mmimpute.model.diffusion import Diffusion
from mmimpute.model.forms import ConvCode
from mmimpute.model.likelihoods import Heads, Likelihoods
from mmimpute.model.networks import Code, Normal, Private, SharedEncoder, kl, kl_each, rounded
from mmimpute.model.nodes import normal_nodes
from mmimpute.model.objective import LossTerms, hide, keep_values
from mmimpute.model.prior import SharedPrior
from mmimpute.model.reliability import Reliability, corrupt
from mmimpute.model.standardise import FeatureStatistics, Standardise
from mmimpute.model.text import Bag, TextCode
from mmimpute.model.together import Told, log_probs, scores, together


@dataclass(frozen=True)
class Predictive:
    """What the model believes about every entry, in original units, in the order of the modalities."""

    mean: list[Tensor]  # K of (B, D_j)
    std: list[Tensor]  # K of (B, D_j)
    z0_BL: Tensor  # mean of q(z0 | x) of the first member: members do not share axes


@dataclass(frozen=True)
class Inputs:
    """Standardised values, likelihood targets, masks and codes of one batch, per modality."""

    filled: list[Tensor]  # original units, 0 where unobserved
    z: list[Tensor]  # standardised, 0 where unobserved
    target: list[Tensor]
    observed: list[Tensor]
    codes: list[Tensor]
    present_BK: Tensor  # something is observed
    shown_BK: Tensor  # something is seen by the encoders


@dataclass(frozen=True)
class Latents:
    """z0 at S nodes of every member's posterior, its mean, and the private latents' nodes."""

    z0_SEBL: Tensor
    mean_EBL: Tensor
    noise_S11L: Tensor

    @property
    def centre(self) -> "Latents":
        """The means as the only node."""
        return Latents(self.mean_EBL[None], self.mean_EBL, torch.zeros_like(self.noise_S11L[:1]))


@dataclass(frozen=True)
class Decoded:
    """One modality in training: what its decoder says of R rows that are shown and, at S draws, of H rows in which it is hidden."""

    shown: Told
    hidden: Told
    posterior: Normal  # q(zj | z0, xj) of the R rows
    prior: Normal  # p(zj | z0)
    z0_EHL: Tensor  # the first draw
    rows_H: Tensor
    count: int  # of the hidden rows, after which some are repeated


def _placed(terms: Sequence[Tensor], rows: Sequence[Tensor], batch: int) -> Tensor:
    """K terms (E, H) of some records each, the last of which may be repeated ones, among all records: (E, B, K), the others' being 0."""
    known = torch.cat([t[:, : len(r)] for t, r in zip(terms, rows, strict=True)], 1)
    places = torch.cat([r + k * batch for k, r in enumerate(rows)])
    placed = known.new_zeros(len(known), len(rows) * batch).index_copy(1, places, known)
    return placed.unflatten(1, (len(rows), batch)).transpose(1, 2)


def _code(modality: ModalityConfig, config: ModelConfig) -> nn.Module:
    """What turns a modality's values into network inputs."""
    if modality.form == "text":
        return TextCode(modality)
    return ConvCode(modality, config.pattern) if modality.structured else Code(modality, config.piecewise_limit, config.pattern)


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
        self.likelihoods = nn.ModuleList(
            Bag(m) if m.form == "text" else Likelihoods(m, s, config.members)
            for m, s in zip(config.modalities, self.standardise, strict=True)
        )
        self.code = nn.ModuleList(_code(m, config) for m in config.modalities)
        width = sum(c.width for c in self.code)
        self.shared = SharedEncoder(config, width)
        self.reliability = Reliability(config, width) if any(m.noise for m in config.modalities) else None
        self.prior = SharedPrior(config.members, config.shared)
        self.private = nn.ModuleList(
            Private(config, m, c.width, p.size) for m, c, p in zip(config.modalities, self.code, self.likelihoods, strict=True)
        )
        self.judges = nn.ModuleDict({str(j): Discriminator(config, config.modalities[j]) for j in judged_modalities(config)})
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

    def start_from(self, other: "MultiModalVAE") -> None:
        """Takes the weights of a model of the same config, member for member. Statistics, and what follows from them, stay its own:
        weights act on standardised values, so a scale that moved a little moves what they say as little."""
        self.load_state_dict(dict(other.named_parameters()), strict=False)

    # -- inputs ---------------------------------------------------------------------------------------------------

    def inputs(self, x: Sequence[Tensor], observed: Sequence[Tensor], shown: Sequence[Tensor] | None = None) -> Inputs:
        """Fill what is unobserved, standardise, encode. `shown`: the observed values that the encoders may see."""
        filled, z, target, codes, shown = [], [], [], [], observed if shown is None else shown
        for j, (x_BD, seen_BD, shown_BD) in enumerate(zip(x, observed, shown, strict=True)):
            filled_BD = torch.where(seen_BD, x_BD, 0.0)
            z_BD = torch.where(seen_BD, self.standardise[j](filled_BD), 0.0)
            filled.append(filled_BD)
            z.append(z_BD)
            target.append(torch.where(getattr(self, f"real_{j}"), z_BD, filled_BD))
            codes.append(self.code[j](z_BD * shown_BD, filled_BD, shown_BD, self.standardise[j].knots))
        present_BK, shown_BK = (torch.stack([o.any(1) for o in masks], 1) for masks in (observed, shown))
        return Inputs(filled, z, target, list(observed), codes, present_BK, shown_BK)

    def inference(self, codes: Sequence[Tensor], present_BK: Tensor, shared: SharedEncoder | None = None) -> Normal:
        """q(z0 | the modalities of `present_BK`), of every member; each counts as far as it can be believed.

        shared: another encoder in the place of the model's own.
        """
        shared = shared or self.shared
        kept = [c * present_BK[:, j, None] for j, c in enumerate(codes)]
        if self.reliability is None:
            return shared(kept, present_BK)
        weight_EBK = self.reliability(kept, present_BK)
        return shared([c * weight_EBK[..., j, None] for j, c in enumerate(kept)], present_BK, weight_EBK)

    def believed(self, inputs: Inputs) -> list[Tensor]:
        """Masks of the observed values without those of modalities that are more noise than signal, K of (B, D_j)."""
        if self.reliability is None:
            return inputs.observed
        sound_BK = self.reliability(inputs.codes, inputs.shown_BK).mean(0) > 0.5
        return [o & sound_BK[:, j, None] for j, o in enumerate(inputs.observed)]

    # -- training -------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Sequence[Tensor],
        observed: Sequence[Tensor],
        weight_EB: Tensor | None = None,
        elbo_scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> LossTerms:
        """Both terms on one batch. `weight_EB`: 1 where a member learns from a record, 0 where it does not.

        `elbo_scale` is for warm-up, of the adversaries too; noise comes from `generator` or torch's default. In training L_elbo, which is
        most of the work and little of the objective, is estimated on the first `elbo_share` of the batch.
        """
        shown = keep_values(observed, self.config.drop_values, generator) if self.training and self.config.drop_values else observed
        inputs, noise_loss = self.inputs(x, observed, shown), 0.0
        batch = inputs.present_BK.shape[0]
        some = max(1, round(batch * self.config.elbo_share)) if self.training else batch
        weight_EB = inputs.present_BK.new_ones(self.config.members, batch, dtype=torch.float32) if weight_EB is None else weight_EB
        hidden_BK = hide(inputs.present_BK, self.hide_K, self.config.hide_one, generator)
        if self.training and self.reliability is not None:
            inputs, noise_loss = self._with_noise(inputs, shown, hidden_BK, weight_EB, generator)
        both = [torch.cat([c[:some], c]) for c in inputs.codes]
        q0 = self.inference(both, torch.cat([inputs.shown_BK[:some], inputs.shown_BK & ~hidden_BK]))
        q_all, q_kept = (Normal(m, v) for m, v in zip(q0.mean.split([some, batch], 1), q0.var.split([some, batch], 1), strict=True))
        z0_ERL = q_all.sample(self._noise(q_all.mean.shape, generator))
        noise_SEBL = self._antithetic(self.config.impute_draws, q_kept.mean.shape, generator)
        decoded = [self._decoded(j, inputs, z0_ERL, q_kept, noise_SEBL, hidden_BK[:, j], generator) for j in range(len(self.private))]
        shown, hidden = [d.shown for d in decoded], [d.hidden for d in decoded]
        score_EH = scores(hidden, self.config.pair_weight if self.training else 0.0, generator)
        with torch.no_grad():  # reported only: its gradient would have no use
            impute_EH = [(log_prob.mean(0) * t.seen_BD).sum(-1) for log_prob, t in zip(log_probs(hidden), hidden, strict=True)]
        rows = [d.rows_H[: d.count] for d in decoded]
        impute_EBK, score_EBK = (_placed(t, rows, batch) for t in (impute_EH, score_EH))
        adversarial_EBK = torch.zeros_like(score_EBK)
        if self.training and self.judges:
            adversarial_EH = [self._adversary(j, d, inputs, elbo_scale, generator) for j, d in enumerate(decoded)]
            adversarial_EBK = _placed(adversarial_EH, rows, batch)
        reconstruction_ERK = torch.stack([(p * t.seen_BD).sum(-1) for p, t in zip(log_probs(shown), shown, strict=True)], 2)
        private_kl = together(kl_each, [(*d.posterior, *d.prior) for d in decoded])
        private_kl_ERK = torch.stack([t.sum(-1) for t in private_kl], 2) * inputs.present_BK[:some]
        prior = Normal(torch.zeros_like(q_all.mean), torch.ones_like(q_all.var))
        terms = LossTerms(
            reconstruction_ERK,
            private_kl_ERK,
            kl(q_all, prior),
            impute_EBK,
            score_EBK,
            inputs.present_BK,
            hidden_BK,
            weight_EB,
            adversarial_EBK,
        )
        return terms._replace(objective=self._objective(terms, inputs, elbo_scale) + noise_loss)

    def _with_noise(
        self, inputs: Inputs, shown: Sequence[Tensor], hidden_BK: Tensor, weight_EB: Tensor, generator: torch.Generator | None
    ) -> tuple[Inputs, Tensor]:
        """The same targets, encoded with noise, and the loss of telling how much; what is hidden tells nothing."""
        signal_BK = self.reliability.share_of_signal(len(hidden_BK), generator)
        noisy = [
            corrupt(x_BD, shown_BD, getattr(self, f"real_{j}"), self.standardise[j], signal_BK[:, j], generator)
            for j, (x_BD, shown_BD) in enumerate(zip(inputs.filled, shown, strict=True))
        ]
        codes = self.inputs(noisy, shown).codes
        present_BK = inputs.shown_BK & ~hidden_BK
        kept = [c * present_BK[:, j, None] for j, c in enumerate(codes)]
        return dataclasses.replace(inputs, codes=codes), self.reliability.loss(kept, present_BK, signal_BK, weight_EB)

    def _decoded(
        self,
        j: int,
        inputs: Inputs,
        z0_ERL: Tensor,
        q_kept: Normal,
        noise_SEBL: Tensor,
        hidden_B: Tensor,
        generator: torch.Generator | None,
    ) -> Decoded:
        """Modality j of R rows to reconstruct and S x H rows to impute, in one pass through the decoder."""
        private, likelihood = self.private[j], self.likelihoods[j]
        hidden_H = hidden_B.nonzero().squeeze(1)
        rows_H = rounded(hidden_H)
        # Rows before draws: the gradient of an index fills a tensor of the size that is indexed.
        z0_SEHL = Normal(*(t.index_select(1, rows_H) for t in q_kept)).sample(noise_SEBL.index_select(2, rows_H))
        draws, members, rows = z0_SEHL.shape[:3]
        some = z0_ERL.shape[1]
        z0 = torch.cat([z0_ERL, z0_SEHL.transpose(0, 1).flatten(1, 2)], 1)
        both = [some, draws * rows]
        # The gradient of a split is one concatenation, that of two slices two padded sums.
        prior_R, prior_H = (Normal(m, v) for m, v in zip(*(t.split(both, 1) for t in private.p(z0)), strict=True))
        posterior_R = private.q(z0_ERL, prior_R, inputs.codes[j][:some], inputs.shown_BK[:some, j])
        noise_SEHL = self._antithetic(draws, (members, rows, private.own), generator)
        zj_R = posterior_R.sample(self._noise((members, some, private.own), generator))
        zj_H = prior_H.sample(noise_SEHL.transpose(0, 1).flatten(1, 2))
        raw_R, raw_H = private.decode(z0, torch.cat([zj_R, zj_H], 1)).split(both, 1)
        target_BD, seen_BD = inputs.target[j], inputs.observed[j]
        shown = Told(likelihood, likelihood.heads(raw_R), target_BD[:some], seen_BD[:some])
        heads = likelihood.heads(raw_H.unflatten(1, (draws, rows)).transpose(0, 1))
        hidden = Told(likelihood, heads, target_BD.index_select(0, rows_H), seen_BD.index_select(0, rows_H))
        return Decoded(shown, hidden, posterior_R, prior_R, z0_SEHL[0], rows_H, len(hidden_H))

    def _adversary(self, j: int, decoded: Decoded, inputs: Inputs, warmth: float, generator: torch.Generator | None) -> Tensor:
        """Losses of discriminator and decoder over hidden rows, (E, H): of the first draw; 0 with other decoders."""
        z0_EHL, rows_H, seen_HD = decoded.z0_EHL, decoded.rows_H, decoded.hidden.seen_BD
        if str(j) not in self.judges:
            return z0_EHL.new_zeros(z0_EHL.shape[:2])
        judge = self.judges[str(j)]
        first = {kind: head[0] for kind, head in decoded.hidden.heads.items()}
        drawn_EHV = judge.drawn(self.likelihoods[j], first, self.standardise[j], seen_HD, generator)
        real_HV = judge.real(inputs.z[j][rows_H], inputs.filled[j][rows_H], seen_HD)
        return judge.loss(real_HV, drawn_EHV, seen_HD, z0_EHL, warmth)

    def _objective(self, terms: LossTerms, inputs: Inputs, elbo_scale: float) -> Tensor:
        """Score of what was hidden, mean over hidden modalities, minus the ELBO per observed value; summed over members.

        The ELBO's parts keep their weights to each other: 1/D_j on some of them widens or narrows the posteriors.
        """
        weight_ER = terms.weight_EB[:, : terms.shared_kl_ER.shape[1]]
        observed_R = torch.stack([o[: weight_ER.shape[1]].sum(1) for o in inputs.observed]).sum(0)
        values_E = (weight_ER * observed_R).sum(1).clamp_min(1)
        hidden_E = (terms.weight_EB * terms.hidden_BK.sum(1)).sum(1).clamp_min(1)
        imputation_E = (terms.weight_EB * (terms.score_EBK + terms.adversarial_EBK).sum(2)).sum(1) / hidden_E
        elbo_E = (weight_ER * terms.elbo_ER).sum(1) / values_E
        return (imputation_E - self.config.elbo_weight * elbo_scale * elbo_E).sum()

    def _noise(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, device=self.hide_K.device)

    def _branch(self, generator: torch.Generator | None) -> torch.Generator:
        """For one modality: what is missing of it does not move the draws of the next."""
        device = self.hide_K.device
        return torch.Generator(device).manual_seed(int(torch.randint(1 << 62, (), generator=generator, device=device)))

    def _antithetic(self, draws: int, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """Noise whose second half mirrors the first: what is linear in it cancels from the mean over draws."""
        half = self._noise((draws // 2, *shape), generator)
        return torch.cat([half, -half])

    def evidence(self, inputs: Inputs) -> Tensor:
        """What every member's encoders say of the values that are shown, E x B x C: the means of q(z0 | x) and of
        q(zj | z0, xj) there, and which modalities they are of."""
        q0 = self.inference(inputs.codes, inputs.shown_BK)
        shown_BK = inputs.shown_BK.to(q0.mean.dtype)
        own = [
            private.q(q0.mean, private.p(q0.mean), code, shown_BK[:, j]).mean * shown_BK[:, j, None]
            for j, (private, code) in enumerate(zip(self.private, inputs.codes, strict=True))
        ]
        return torch.cat([q0.mean, *own, shown_BK.expand(len(q0.mean), -1, -1)], -1)

    # -- use ------------------------------------------------------------------------------------------------------

    def shared_names(self) -> set[str]:
        """The tensors of the state that all members share; the others have them as their first dimension."""
        per_member = {name for name, _ in self.named_parameters()} | {f"prior.{name}" for name, _ in self.prior.named_buffers()}
        return self.state_dict().keys() - per_member

    def member(self, index: int) -> "MultiModalVAE":
        """One member as a model of its own, which shares its weights with this one."""
        if self.config.members == 1:
            return self
        shared = self.shared_names()
        model = self._untrained(dataclasses.replace(self.config, members=1))
        own = {name: t if name in shared else t[index : index + 1] for name, t in self.state_dict().items()}
        model.load_state_dict(own, assign=True)
        return model.eval().to(self.hide_K.device)

    def _untrained(self, config: ModelConfig) -> "MultiModalVAE":
        return MultiModalVAE(config, {m.name: FeatureStatistics.blank(m.width) for m in config.modalities})

    def _shared(self, inputs: Inputs, noise: Tensor, chance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z0 from noise (S, E or 1, B or 1, L), and its mean (E, B, L): of q(z0 | x), or of p(z0) where nothing is observed.

        chance: as `SharedPrior.sample` takes it; None: the Gaussian with p(z0)'s moments, for nodes.
        """
        q0 = self.inference(inputs.codes, inputs.shown_BK)
        empty_B1 = ~inputs.shown_BK.any(1, keepdim=True)
        if not empty_B1.any():
            return q0.sample(noise), q0.mean
        prior = self.prior.normal(noise) if chance is None else self.prior.sample(noise, chance)
        return torch.where(empty_B1, prior, q0.sample(noise)), torch.where(empty_B1, self.prior.mean_EL[:, None], q0.mean)

    def _decode(self, j: int, inputs: Inputs, z0_SEBL: Tensor, noise: Tensor, rows: Tensor | slice = slice(None)) -> Heads:
        """p(xj | zj, z0) with zj ~ q(zj | z0, xj), which is p(zj | z0) where nothing of xj is observed."""
        private, (draws, _, batch) = self.private[j], z0_SEBL.shape[:3]
        z0 = z0_SEBL.transpose(0, 1).flatten(1, 2)
        own, shown_R = private.p(z0), inputs.shown_BK[rows, j]
        if bool(shown_R.any()):
            own = private.q(z0, own, inputs.codes[j][rows], shown_R)
        noise = noise.expand(*z0_SEBL.shape[:3], private.own).transpose(0, 1).flatten(1, 2)
        raw = private.decode(z0, own.sample(noise))
        return self.likelihoods[j].heads(raw.unflatten(1, (draws, batch)).transpose(0, 1))

    def latents(self, inputs: Inputs, draws: int) -> Latents:
        """Fixed quasi-random antithetic latent nodes, the same for every record and member, around each posterior.

        So a record's result depends neither on a seed nor on the records next to it.
        """
        shared = self.config.shared
        nodes_SL = normal_nodes(draws, shared + max(p.own for p in self.private)).to(self.hide_K.device)
        z0_SEBL, mean_EBL = self._shared(inputs, nodes_SL[:, None, None, :shared])
        return Latents(z0_SEBL, mean_EBL, nodes_SL[:, None, None, shared:])

    def heads(self, j: int, inputs: Inputs, latents: Latents, rows: Tensor) -> Heads:
        """p(xj | zj, z0) of some rows at every node and member: what `Likelihoods` takes, leading S and E."""
        return self._decode(j, inputs, latents.z0_SEBL.index_select(2, rows), latents.noise_S11L[..., : self.private[j].own], rows)

    @torch.no_grad()
    def predict(self, x: Sequence[Tensor], observed: Sequence[Tensor], draws: int = 4) -> Predictive:
        """Mean and standard deviation of every entry given what is observed: the mixture over members and nodes."""
        inputs = self.inputs(x, observed)
        latents = self.latents(inputs, draws)
        rows = torch.arange(len(x[0]), device=self.hide_K.device)
        heads = [self.heads(j, inputs, latents, rows) for j in range(len(self.private))]
        found = [lik.moments(h, s) for lik, h, s in zip(self.likelihoods, heads, self.standardise, strict=True)]
        mean, std = map(list, zip(*found, strict=True))
        return Predictive(mean, std, latents.mean_EBL[0])

    @torch.no_grad()
    def log_score(self, x: Sequence[Tensor], observed: Sequence[Tensor], j: int, draws: int = 4) -> Tensor:
        """log p(x_jd | all other modalities) of the observed values of modality j, hidden: mean over d, (E, B), in nats.

        Of standardised values where they are real; 0 for records without modality j.
        """
        shown = [torch.zeros_like(o) if k == j else o for k, o in enumerate(observed)]
        inputs = self.inputs(x, observed, shown)
        rows = torch.arange(len(x[0]), device=self.hide_K.device)
        log_prob_SEBD = self.likelihoods[j].log_prob(self.heads(j, inputs, self.latents(inputs, draws), rows), inputs.target[j])
        log_prob_EBD = log_prob_SEBD.logsumexp(0) - math.log(draws)
        return (log_prob_EBD * observed[j]).sum(-1) / observed[j].sum(-1).clamp_min(1)

    @torch.no_grad()
    def impute(
        self,
        record: Sequence[tuple[Tensor | None, int]],
        draws: int | None = None,
        generator: torch.Generator | None = None,
        diffusion: Diffusion | None = None,
    ) -> list[Tensor]:
        """Complete records. `record` holds K pairs: (N x D_j tensor, 1) or (anything, 0).

        Returns K tensors, N x D_j (draws=None: one draw) or draws x N x D_j. Observed values are copied to the bit;
        what is missing, NaN inside an observed modality included, is drawn jointly: one member, z0 and zj per draw,
        by `diffusion` if given.
        """
        x, observed = self.read(record)
        shares = self.shares(1 if draws is None else draws)
        drawn = [self._draw(e, x, observed, share, generator, diffusion) for e, share in enumerate(shares) if share]
        completed = [
            torch.where(seen_BD, x_BD, torch.cat(d)) for x_BD, seen_BD, d in zip(x, observed, zip(*drawn, strict=True), strict=True)
        ]
        return [c[0] for c in completed] if draws is None else completed

    def shares(self, draws: int) -> list[int]:
        """How many of so many draws each member makes, the first member the first of them."""
        return [len(s) for s in torch.arange(draws).tensor_split(self.config.members)]

    def _draw(
        self,
        index: int,
        x: Sequence[Tensor],
        observed: Sequence[Tensor],
        draws: int,
        generator: torch.Generator | None,
        diffusion: Diffusion | None,
    ) -> list[Tensor]:
        """draws x N x D_j of one member."""
        model = self.member(index)
        inputs = model.inputs(x, observed)
        if diffusion is None:
            noise = self._noise((draws, 1, x[0].shape[0], self.config.shared), generator)
            z0_SEBL, _ = model._shared(inputs, noise, torch.rand(noise.shape[:3], generator=generator, device=noise.device))
        else:
            diffusion = diffusion.member(index, model.private, model.likelihoods)
            z0_SEBL, *own = diffusion.sample(model.evidence(inputs), draws, generator)
        drawn = []
        for j, private in enumerate(model.private):
            branch = self._branch(generator)
            at = diffusion.chosen.index(j) if diffusion is not None and j in diffusion.chosen else None
            gaps_B, whole_B = (~observed[j]).any(1), ~inputs.present_BK[:, j]  # what nothing is missing of need not be decoded
            rows = (gaps_B & ~whole_B if at is not None else gaps_B).nonzero().squeeze(1)
            drawn.append(x[j].new_zeros(draws, *x[j].shape))
            if len(rows):
                noise_SERL = self._noise((*z0_SEBL.shape[:2], len(rows), private.own), branch)
                heads = model._decode(j, inputs, z0_SEBL[:, :, rows], noise_SERL, rows)
                drawn[-1][:, rows] = model.likelihoods[j].sample(heads, model.standardise[j], branch)[:, 0].to(x[j].dtype)
            if at is not None and bool(whole_B.any()):
                latents = z0_SEBL[:, :, whole_B], own[at][:, :, whole_B]
                drawn[-1][:, whole_B] = diffusion.decoded(at, *latents, model.standardise[j], branch)[:, 0].to(x[j].dtype)
        return drawn

    def read(self, record: Sequence[tuple[Tensor | None, int]]) -> tuple[list[Tensor], list[Tensor]]:
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
    def generate(self, n: int, generator: torch.Generator | None = None, diffusion: Diffusion | None = None) -> list[Tensor]:
        """n synthetic records from p(z0) p(zj | z0) p(xj | zj, z0), or latents of `diffusion`: K tensors n x D_j in original units."""
        nothing = [self.read([(torch.empty(share, 0), 0)] * len(self.private)) for share in self.shares(n)]
        parts = [self._draw(e, *record, 1, generator, diffusion) for e, record in enumerate(nothing)]
        return [torch.cat(p, 1)[0] for p in zip(*parts, strict=True)]
