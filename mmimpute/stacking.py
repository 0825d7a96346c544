"""From a trained VAE to the whole model: the other experts, then the stack and the intervals, all out of fold.

Member e's experts never see a record of fold e, so what they say of those records is what they would say of new people.
On that the mixing weights, the error bars and the intervals are fitted. A sample of the training records is enough: what
is fitted here has few parameters beside the VAE.

What each choice gained, out-of-fold skill (one seed; the experts alone have their own error as deviation):

    nhanes 0.0:  VAE .252, additive .251, Gaussian .194, stack .268      nhanes 0.5:  .127, .130, .092, stack .145
    eicu 0.0:    VAE .096, additive .107, Gaussian .084, stack .126      tcga 0.0:    .119, .155, .115, stack .166
    additive:    without ramps .233, with .244 (nhanes 0.0, both linear for codes); codes logistic .246; inputs that are
                 missing at the Gaussian's conditional means .2485 (nhanes 0.5 .116 -> .131, tcga 0.5 .050 -> .063)
    blocks:      one penalty for all columns -> scales of blocks.py, additive alone (its deviation from the stack) and stack:
                 nhanes 0.0 .2594 -> .2623, .2690 -> .2711     eicu 0.0 .1188 -> .1218, .1278 -> .1327     tcga 0.0 .1627 -> .1689,
                 .1657 -> .1716; a penalty per feature as well: .2712, .1304, .1725; 128 random cosines of each modality as more
                 blocks: .2719, .1335, .1709
    stack:       VAE and additive without the Gaussian .2628 -> .2636 with it (nhanes 0.0), .1403 -> .1428 (nhanes 0.5),
                 .1549 -> .1584 (tcga 0.0): an earlier VAE and inputs filled with 0
    not kept:    weights and deviations that depend on how many modalities are observed: .0368 -> .0367, test rows .0865 -> .0845
                 (eicu 0.5), .1630 -> .1634 (nhanes 0.5); boosted trees as a fourth expert: .2711 -> .2754 with 60-120 for
                 every feature, .2690 -> .2729 with 600 shared by a modality's features (nhanes 0.0; out of proportion to their time)
    eta:         skill of complete records of 20% of the people, half of the others' modalities dropped: nhanes .2390 -> .2398, tcga
                 .1200 -> .1203, eicu .0765 -> .0764, pbcseq .1146 -> .1147; 90% intervals hold .943 .912 .949 -> .938 .902 .933 of
                 nhanes' body, chem, glyco. A factor of the location that depends on it as well: eicu .0755 -> .0740, tcga .1194 -> .1185
    tilt:        complete records of 20% of the people, without and with: eicu .1469 -> .1470, 0.5 .0835 -> .0840; nhanes .2785 -> .2786,
                 0.5 .2434 -> .2433; pbcseq .1562 -> .1563; tcga .1841 as before. Whole numbers as levels and counts: eicu .1467 -> .1474
                 (its vitals .1703 -> .1754), nhanes .2781 -> .2783, pbcseq 0.5 .1229 -> .1230
    prior:       weights drawn to equal ones -> to the VAE by 5 records (complete records of 20% of the people): nhanes .2756 -> .2757, 0.5
                 .2398 -> .2400; eicu .1393 -> .1398, 0.5 .0764 -> .0789; pbcseq .1562 -> .1566, 0.5 .1147 -> .1177; tcga's narrow
                 modalities only .1730 -> .1736, 0.5 .1203 -> .1194. 10 records: eicu 0.5 .0794, tcga 0.5 .1178. Mean weights of VAE and
                 additive expert: nhanes .45 .47 -> .56 .38, 0.5 .34 .45 -> .47 .34; eicu .27 .56 -> .44 .40, 0.5 .12 .67 -> .35 .33. Not
                 where it loses: in gaps (nhanes .3783 -> .3778, eicu .1856 -> .1840) and with omics (all of tcga's modalities by 16e-3:
                 .1730 -> .1716, 0.5 .1203 -> .1169). What it costs where the Gaussian is true: of the first 40 cohorts of rubin.py 94.6% of
                 intervals hold the truth without it, 93.6% with 5 records, 92.9% with 7 (before `drawn_around`). Instead of a prior, the
                 score less what averaging the members will take from it, by the members' covariance on generated records: eicu 0.5
                 .0757, pbcseq 0.5 .1159
    drawn_around: of the first 80 cohorts of rubin.py 92.9% -> 94.5% of intervals hold the truth; energy score of joint draws of
                 nhanes' body, chem, glyco .898 2.953 .691 -> .892 2.946 .688, of pbcseq's labs 1.526 -> 1.524
    typical:     shifts drawn to their mean instead of to 0, the same people: eicu .1470 -> .1471, 0.5 .0840 -> .0843, tcga 0.5's narrow
                 modality .0615 -> .0627, nhanes and pbcseq as before
    wide:        weights of their own for the features outside the sample, which had the common ones and a scale in closed form: tcga .1841
                 -> .1859, 0.5 .1328 -> .1337 (rna .2255 -> .2270, meth .2031 -> .2046, mirna .1495 -> .1525, cnv .1149 -> .1132); with a
                 PENALTY of 12 records .1859 .1337, of 100, without `typical`, .1851 .1321 where 30 gave .1856 .1330
    not kept:    a gamma of every feature: nhanes .2786 -> .2787, 0.5 .2433 -> .2434, eicu 0.5 .0843 -> .0844, tcga .1859 -> .1858
    PARTS:       90% intervals of a single member, untrained, of 300 records, means of 30 cohorts by 20, 30, 80 judges: .877 .903 .892 of
                 new values without, .907 .893 .905 with
    PENALTY:     30 records .0686, 120 .0668, 400 .0666 (tcga 0.5); COMMON_PENALTY 1e-3 -> 1e-2 loses .001; records of a
                 code counted by its rarer value (4 n p (1 - p)): eicu .1393 -> .1388, half-missing .0765 -> .0755, tcga .1200 -> .1194
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import torch
from torch import Tensor

from mmimpute.denoising import fit_diffusion
from mmimpute.model import sparse
from mmimpute.model import stack as stacks
from mmimpute.model.blocks import block_scales
from mmimpute.model.config import ModelConfig
from mmimpute.model.diffusion import diffused
from mmimpute.model.gaussian import kept_components
from mmimpute.model.imputer import Imputer
from mmimpute.model.networks import CLIP
from mmimpute.model.regression import Regression
from mmimpute.model.stack import GAP, WHOLE, Beliefs, Target
from mmimpute.model.vae import MultiModalVAE

# Of these, and of the penalties, the first where nobody judges.
SHRINKAGES = (0.1, 0.02, 0.3, 0.5)
# A penalty of 1: every feature follows the others as far as the typical one does.
PENALTIES = (1.0, 0.1, 0.3, 3.0, 10.0, 30.0)
CODE_THRESHOLDS = (0.75, 0.5, 0.3)  # as sparse.THRESHOLD
GAP_SHARE = 0.25  # of the observed values hidden to learn about gaps
SEED = 11
NOBODY = -2  # no member's fold
MOST_COLOURED = 2_000  # records from which the correlations of draws are taken
DRAWS = 10  # of each
MOST_ENCODED = 5_000  # records whose posteriors p(z0) is fitted to
PARTS = 5
FEW_JUDGES = 2_000  # a stack has some ten parameters a feature
PRIOR_RECORDS = 20.0  # weight of the VAE's correlations beside those of the errors


class Assembly:
    """The records of a fit: values, masks and folds (-1: learnt from by every member, judged by none)."""

    def __init__(self, vae: MultiModalVAE, x: Sequence[Tensor], observed: Sequence[Tensor], fold_N: Tensor, threads: int = 1) -> None:
        self.x, self.observed, self.fold_N, self.threads = list(x), list(observed), fold_N, threads
        gaps = [bool((seen_ND.any(1) & ~seen_ND.all(1)).any()) for seen_ND in observed]
        self.imputer = Imputer(vae, kept_components(vae.config, len(fold_N), gaps)).eval()
        with torch.no_grad():
            self.inputs = vae.inputs(x, observed)
        self.members = vae.config.members
        self.modalities = [j for j, m in enumerate(vae.config.modalities) if not m.structured]  # those that have other experts

    def learners(self, member: int, j: int | None = None) -> Tensor:
        """Records that a member learns from (of no member: all), that hold modality j."""
        rows_N = self.fold_N != member
        return (rows_N & self.inputs.present_BK[:, j] if j is not None else rows_N).nonzero().squeeze(1)

    def judges(self, member: int, j: int | None = None) -> Tensor:
        """Records that a member has not seen, that hold modality j and something else."""
        rows_N = self.fold_N == member
        if j is not None:
            rows_N = rows_N & self.inputs.present_BK[:, j] & (self.inputs.present_BK.sum(1) > 1)
        return rows_N.nonzero().squeeze(1)

    def each(self, fit: Callable[[int], None]) -> None:
        """Calls fit with every modality: several at a time, which scales better than torch's threads inside the operations."""
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(fit, self.modalities))

    def hidden(self, rows: Tensor | slice, j: int) -> list[Tensor]:
        """Masks of some records with modality j hidden."""
        masks = [o[rows] for o in self.observed]
        masks[j] = torch.zeros_like(masks[j])
        return masks


def assemble(
    vae: MultiModalVAE,
    x: Sequence[Tensor],
    observed: Sequence[Tensor],
    fold_N: Tensor,
    threads: int = 1,
    others: Mapping[str, Tensor] | None = None,
) -> Imputer:
    """The whole model: x and observed are K of (N, D_j), fold_N says which member has not seen a record. Images, signals and
    texts are the VAE's alone. threads: modalities fitted at a time. others: what `fit_others` made of the same records, if it has.
    """
    data = Assembly(vae.eval(), x, observed, fold_N, threads)
    fit_prior(data)
    if data.imputer.diffusion is not None:
        fit_diffusion(data.imputer.diffusion, vae, data.inputs, fold_N)
    if data.modalities:
        if others is None:
            fit_others(data)
        else:
            data.imputer.load_state_dict(others, strict=False)
        fit_stack(data)
    return data.imputer


def early(config: ModelConfig) -> bool:
    """Whether `fit_others` needs no trained VAE: it takes how far to believe noisy modalities from it."""
    return not any(m.noise for m in config.modalities) and not all(m.structured for m in config.modalities)


def fit_others(data: Assembly) -> dict[str, Tensor]:
    """The state of the experts beside the VAE, of which nothing trained is used if `early`."""
    fit_gaussian(data)
    fit_additive(data)
    return {name: t for name, t in data.imputer.state_dict().items() if name.startswith(("gaussian.", "additive."))}


@torch.no_grad()
def fit_prior(data: Assembly) -> None:
    """p(z0) becomes the density of the posteriors of records of which something is observed."""
    rows = data.inputs.present_BK.any(1).nonzero().squeeze(1)
    rows = rows[:: max(1, len(rows) // MOST_ENCODED)][:MOST_ENCODED]  # they may stand in the order of their folds
    if len(rows):
        vae = data.imputer.vae
        vae.prior.fit(vae.inference([c[rows] for c in data.inputs.codes], data.inputs.present_BK[rows]))


def fit_gaussian(data: Assembly) -> None:
    """Components, mean and covariance per member; the shrinkage that judges member 0 best serves all."""
    gaussian = data.imputer.gaussian
    for member in range(data.members):
        for j, component in enumerate(gaussian.components):
            if component.wide and component.parts:
                component.fit(member, data.inputs.z[j][data.learners(member, j)])
    errors = {g: _gaussian_error(data, g) for g in SHRINKAGES}
    best = min(errors, key=errors.get)
    for member in range(data.members):
        rows = data.learners(member)
        gaussian.fit_member(member, [z[rows] for z in data.inputs.z], [o[rows] for o in data.observed], best)
    data.singles = [data.imputer.member(e) for e in range(data.members)]


def _gaussian_error(data: Assembly, shrinkage: float) -> float:
    """Member 0's squared error of hidden modalities relative to their variance, mean over modalities."""
    gaussian, rows = data.imputer.gaussian, data.learners(0)
    gaussian.fit_member(0, [z[rows] for z in data.inputs.z], [o[rows] for o in data.observed], shrinkage)
    found = []
    for j in data.modalities:
        rows = data.judges(0, j)
        if not len(rows):
            continue
        parts, known = gaussian.parts([z[rows] for z in data.inputs.z], [o[rows] for o in data.observed])
        truth, seen = parts[:1].split(gaussian.sizes, -1)[j], known.split(gaussian.sizes, -1)[j]
        parts, known = gaussian.parts([z[rows] for z in data.inputs.z], data.hidden(rows, j))
        guess = gaussian(parts, known)[:1].split(gaussian.sizes, -1)[j]
        mean = gaussian.mean_EP[:1, None].split(gaussian.sizes, -1)[j]
        found.append(float(((guess - truth) * seen).square().sum() / ((mean - truth) * seen).square().sum().clamp_min(1e-9)))
    return sum(found) / max(1, len(found))


def fit_additive(data: Assembly) -> None:
    """Each modality's regressions per member. The columns' scales come from member 0's records; the penalties of numbers and of codes, and
    `_best_settings`, are those that judge it best."""

    def fit(j: int) -> None:
        scale_C = penalties = settings = None
        for member in range(data.members):
            rows = data.learners(member, j)
            if not len(rows):
                continue
            columns_NC, single_NV = _columns(data, j, member, rows)
            if scale_C is None:
                scale_C = _scales(data, j, columns_NC, rows)
            regression = _regression(data, j, columns_NC * scale_C, rows)
            penalties = penalties or _best_penalties(data, j, regression, scale_C)
            slopes = partial(regression.single_out, single_NV, penalties[0], regression.solve(*penalties))
            solved = cache(partial(_solved, regression, scale_C, single_NV, penalties, cache(slopes)))
            settings = settings or _best_settings(data, j, solved)
            weight_CD, bias_D, slope_VD = solved(*settings)
            narrow_U = _narrow(data, j).nonzero().squeeze(1)
            weight_CD = weight_CD.index_add(0, narrow_U, slope_VD[: len(narrow_U)])  # a copy: `solved` keeps what it returned
            data.imputer.additive.set_member(member, j, _with_own(data, j, weight_CD), bias_D, slope_VD[len(narrow_U) :])

    data.each(fit)


def _columns(data: Assembly, j: int, member: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A member's columns of other modalities for some records, with modality j hidden, (N, C), and all single values of them, those of
    narrow modalities, which are columns, before those of wide ones, (N, V)."""
    inputs = data.imputer.vae.inputs([x[rows] for x in data.x], data.hidden(rows, j))
    with torch.no_grad():
        _, columns_ENC, wide_ENV = data.singles[member].linear(inputs)
    wide_ENV[..., data.imputer.additive.own_values(j)] = 0
    columns_NC = _without_own(data, j, columns_ENC[0])
    return columns_NC, torch.cat([columns_NC[:, _narrow(data, j)], wide_ENV[0]], 1)


def _narrow(data: Assembly, j: int) -> Tensor:
    """Which columns are single values, (C,)."""
    return _without_own(data, j, data.imputer.additive.singles(data.imputer.vae.code))


def _solved(
    regression: Regression,
    scale_C: Tensor,
    single_NV: Tensor,
    penalties: tuple[float, float],
    slopes: Callable[[float], Tensor],
    code_threshold: float,
    apart: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of columns (C, D), bias (D,) and slopes of single values (V, D). slopes: by the threshold of codes."""
    slope_VD = slopes(code_threshold)
    weight_CD, bias_D = regression.solve(*penalties, single_NV @ slope_VD, apart)
    return scale_C[:, None] * weight_CD, bias_D, slope_VD


def _without_own(data: Assembly, j: int, columns: Tensor) -> Tensor:
    """Without modality j's own columns: the last dimension loses them."""
    own = data.imputer.additive.own(j)
    return torch.cat([columns[..., : own.start], columns[..., own.stop :]], -1)


def _with_own(data: Assembly, j: int, weight_CD: Tensor) -> Tensor:
    """Weights for all columns: zero for modality j's own."""
    own = data.imputer.additive.own(j)
    zeros = weight_CD.new_zeros(own.stop - own.start, weight_CD.shape[1])
    return torch.cat([weight_CD[: own.start], zeros, weight_CD[own.start :]])


def _scales(data: Assembly, j: int, columns_NC: Tensor, rows: Tensor) -> Tensor:
    """How far each column counts, (C,); see blocks.py."""
    if not columns_NC.shape[1]:  # a cohort of one modality
        return columns_NC.new_ones(0)
    _, block_C = _without_own(data, j, data.imputer.additive.blocks(data.imputer.vae.code)).unique(return_inverse=True)
    z_ND, x_ND = data.inputs.z[j][rows].clamp(-2 * CLIP, 2 * CLIP), data.inputs.filled[j][rows]
    target_ND = torch.where(getattr(data.imputer, f"number_{j}"), z_ND, x_ND)
    return block_scales(columns_NC, block_C, target_ND, data.observed[j][rows] & getattr(data.imputer, f"mixed_{j}"))


def _regression(data: Assembly, j: int, columns_NC: Tensor, rows: Tensor) -> Regression:
    additive = data.imputer.additive
    kinds = (getattr(additive, f"number_{j}"), getattr(additive, f"binary_{j}"))
    return Regression(columns_NC, data.inputs.z[j][rows], data.inputs.filled[j][rows], data.observed[j][rows], *kinds)


def _best_penalties(data: Assembly, j: int, regression: Regression, scale_C: Tensor) -> tuple[float, float]:
    """For numbers and for binary features."""
    rows = data.judges(0, j)
    columns_NC, losses = _columns(data, j, 0, rows)[0] * scale_C, {}
    for penalty in PENALTIES:
        weight_CD, bias_D = regression.solve(penalty, penalty)
        losses[penalty] = _losses(data, j, rows, columns_NC @ weight_CD + bias_D)
    return tuple(min(losses, key=lambda p, kind=kind: losses[p][kind]) for kind in (0, 1))


def _best_settings(data: Assembly, j: int, solved: Callable[[float, bool], tuple[Tensor, Tensor, Tensor]]) -> tuple[float, bool]:
    """How far single values of codes have to stand out, and whether numbers' principal components are regressed apart; solved: member
    0's `_solved` by these."""
    rows = data.judges(0, j)
    columns_RC, single_RV = _columns(data, j, 0, rows)

    def losses(code_threshold: float, apart: bool) -> tuple[float, float]:
        weight_CD, bias_D, slope_VD = solved(code_threshold, apart)
        return _losses(data, j, rows, columns_RC @ weight_CD + bias_D + single_RV @ slope_VD)

    number, binary = (bool(getattr(data.imputer.additive, f"{kind}_{j}").any()) for kind in ("number", "binary"))
    code_threshold = min(CODE_THRESHOLDS, key=lambda t: losses(t, False)[1]) if binary else sparse.THRESHOLD
    return code_threshold, number and losses(code_threshold, True)[0] < losses(code_threshold, False)[0]


def _losses(data: Assembly, j: int, rows: Tensor, guess_ND: Tensor) -> tuple[float, float]:
    """Squared error of the numbers, and nats of the binary features."""
    additive, seen_ND = data.imputer.additive, data.observed[j][rows]
    squares_ND = (guess_ND - data.inputs.z[j][rows]).square() * seen_ND
    codes_ND = data.inputs.filled[j][rows].clamp(0, 1)
    nats_ND = torch.nn.functional.binary_cross_entropy_with_logits(guess_ND, codes_ND, reduction="none") * seen_ND
    return float(squares_ND[:, getattr(additive, f"number_{j}")].sum()), float(nats_ND[:, getattr(additive, f"binary_{j}")].sum())


def fit_stack(data: Assembly) -> None:
    """Weights, error bars and intervals, from what every member says of the records it has not seen."""
    singles = [data.imputer.member(e) for e in range(data.members)]
    generator = torch.Generator().manual_seed(SEED)
    shown = [o & (torch.rand(o.shape, generator=generator) >= GAP_SHARE) for o in data.observed]
    omics = any(data.imputer.config.modalities[j].width > stacks.WIDE for j in data.modalities)  # which the linear experts know best

    def fit(j: int) -> None:
        data.imputer.conformal.many_K[j] = _many(data, j)
        residuals = []
        whole = [data.judges(e, j) for e in range(data.members)]
        for mode, rows_of, kept in ((GAP, _with_gaps(data, shown, j), shown), (WHOLE, whole, data.hidden(slice(None), j))):
            pieces = _pieces(data, singles, j, rows_of, kept)
            if pieces is None:
                continue
            beliefs, target, masks = pieces
            generative = mode == WHOLE and not omics
            stacks.fit(data.imputer.stack.modalities[j], mode, beliefs, target, generative)
            said = _unseen(data, j, mode, generative, beliefs, target)
            residuals.append(_residuals(data, j, said, target, masks))
            if mode == WHOLE and hasattr(data.imputer, f"colour_{j}") and j not in diffused(data.imputer.config):
                _fit_colour(data, j, said, target)
        if residuals:
            data.imputer.conformal.fit(j, *(torch.cat(parts) for parts in zip(*residuals, strict=True)))

    data.each(fit)


def _target(data: Assembly, j: int, rows: Tensor, scored: Tensor) -> Target:
    vae, imputer = data.imputer.vae, data.imputer
    mixed_D = getattr(imputer, f"mixed_{j}")
    values = (data.inputs.filled[j][rows], data.inputs.z[j][rows])
    return Target(*values, scored & mixed_D, data.fold_N[rows], getattr(imputer, f"number_{j}"), vae.standardise[j])


def _pieces(
    data: Assembly, singles: Sequence[Imputer], j: int, rows_of: Sequence[Tensor], shown: Sequence[Tensor]
) -> tuple[Beliefs, Target, list[Tensor]] | None:
    """Beliefs about what is not shown of modality j, of some records by the member that has not seen them, and the truth.

    rows_of: each member's; shown: masks of all records. None where there is no such record.
    """
    found = []
    for single, rows in zip(singles, rows_of, strict=True):
        if len(rows):
            with torch.no_grad():
                found.append(single.believe([x[rows] for x in data.x], [o[rows] for o in shown], j))
    if not found:
        return None
    rows = torch.cat(list(rows_of))
    return _joined(found), _target(data, j, rows, data.observed[j][rows] & ~shown[j][rows]), [o[rows] for o in shown]


def _joined(found: Sequence[Beliefs]) -> Beliefs:
    location, scale = torch.cat([b.location_MEBD for b in found], 2), torch.cat([b.scale_EBD for b in found], 1)
    return Beliefs(location, scale, torch.cat([b.others_B for b in found]))


def _with_gaps(data: Assembly, shown: Sequence[Tensor], j: int) -> list[Tensor]:
    """Each member's records that keep some of modality j, and not all."""
    gaps_N = (shown[j] != data.observed[j]).any(1) & shown[j].any(1)
    return [rows[gaps_N[rows]] for rows in map(data.judges, range(data.members))]


def _many(data: Assembly, j: int) -> float:
    """The median number of other modalities that a record with modality j holds."""
    holders_NK = data.inputs.present_BK[data.inputs.present_BK[:, j]]
    return float((holders_NK.sum(1) - 1).float().median()) if len(holders_NK) else 0.0


def _unseen(data: Assembly, j: int, mode: int, generative: bool, beliefs: Beliefs, target: Target) -> tuple[Tensor, Tensor]:
    """Location and scale of every record by a stack that has not seen it, (N, D): its member's. All judges of a single member fitted its
    stack; where they are few, parts of them are judged by stacks of the other parts."""
    stack, fold_N = data.imputer.stack.modalities[j], target.fold_N
    if data.members == 1:
        fold_N = torch.arange(len(fold_N)) % (PARTS if len(fold_N) < FEW_JUDGES else 1)
        if fold_N.any():
            stack = stacks.ModalityStack(PARTS, target.x_ND.shape[1])
            stacks.fit(stack, mode, beliefs, dataclasses.replace(target, fold_N=fold_N), generative)
    location_END, scale_END = stacks.mix(stack.of(mode), beliefs)
    own = fold_N[None, :, None].expand(1, *location_END.shape[1:])
    return location_END.gather(0, own)[0], scale_END.gather(0, own)[0]


def _fit_colour(data: Assembly, j: int, said: tuple[Tensor, Tensor], target: Target) -> None:
    """The matrix L_e L_v^-1, of roots of both covariances, that gives deviations drawn by the VAE variance 1 and the
    correlations of out-of-fold errors.

    Few records leave the VAE's correlations nearly as they are.
    """
    location_ND, scale_ND = said
    real_D = getattr(data.imputer, f"real_{j}")
    scored_ND = (target.scored_ND & real_D & target.live_D).float()
    error_ND = ((target.z_ND - location_ND) / scale_ND).clamp(-5, 5) * scored_ND
    rows = data.learners(NOBODY, j)[:MOST_COLOURED]
    masks = data.hidden(rows, j)
    record = [(torch.where(m, x[rows], torch.nan), 1) for x, m in zip(data.x, masks, strict=True)]
    with torch.no_grad():
        drawn_SRD = data.imputer.vae.impute(record, DRAWS, torch.Generator().manual_seed(SEED), data.imputer.diffusion)[j]
        deviation_SRD = data.imputer.deviations(j, drawn_SRD, data.imputer.drawn_from([x[rows] for x in data.x], masks, j))
    deviation = (deviation_SRD.clamp(-5, 5) * real_D).flatten(0, 1)
    vae_DD = deviation.T @ deviation / len(deviation) + torch.diag((~real_D).float())
    count_DD = scored_ND.T @ scored_ND
    error_DD = _correlation((error_ND.T @ error_ND + PRIOR_RECORDS * _correlation(vae_DD)) / (count_DD + PRIOR_RECORDS))
    roots = [torch.linalg.cholesky(c) for c in (_positive(error_DD), vae_DD + 1e-4 * torch.eye(len(vae_DD)))]
    getattr(data.imputer, f"colour_{j}").copy_(torch.linalg.solve_triangular(roots[1].T, roots[0].T, upper=True).T)


def _correlation(covariance_DD: Tensor) -> Tensor:
    """Features without variance are uncorrelated to all."""
    scale_D = covariance_DD.diagonal().clamp_min(1e-6).sqrt()
    found_DD = covariance_DD / torch.outer(scale_D, scale_D)
    return found_DD - torch.diag(found_DD.diagonal()) + torch.eye(len(scale_D))


def _positive(correlation_DD: Tensor) -> Tensor:
    """The nearest by eigenvalues that is safely positive definite; pairs seen in different records need not be."""
    values, vectors = torch.linalg.eigh(correlation_DD)
    return _correlation((vectors * values.clamp_min(0.01)) @ vectors.T)


def _residuals(data: Assembly, j: int, said: tuple[Tensor, Tensor], target: Target, masks: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(value - mean) / std of numbers, with the group and the fold of each."""
    mean, std = data.imputer.original(j, *said)
    kept = target.scored_ND & target.number_D
    group_N = data.imputer.conformal.group(j, masks)
    spread = lambda t: t[:, None].expand(kept.shape)[kept]  # noqa: E731
    return ((target.x_ND - mean) / std.clamp_min(1e-30))[kept], spread(group_N), spread(target.fold_N)
