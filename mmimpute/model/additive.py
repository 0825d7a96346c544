"""The additive expert: ridge and logistic regression of every feature on the other modalities' encoded values.

An encoded number is itself and its piecewise-linear ramps, so the regression is a sum of curves (a generalised additive
model with linear splines). Each modality's values, and its ramps, count as far as they have to say (blocks.py), and single values
more than that where they stand out (sparse.py). Inputs that are missing are at the Gaussian expert's conditional means, with a flag
(always 0 where `pattern` is false).

Shape suffixes: E members, B or N records, K modalities, D features, F features of one kind, C input columns, R rank, V values of wide
modalities, S of them that a feature follows, Z all pairs of a feature and such a value.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from mmimpute.model.config import NUMBERS, ModelConfig
from mmimpute.model.gaussian import Components, Gaussian
from mmimpute.model.networks import CLIP, Code
from mmimpute.model.sparse import SOURCES

WIDEST = 160  # modalities up to this width are read feature by feature, wider ones by their components


class Additive(nn.Module):
    """weight_j (E, C, D_j) and bias_j (E, 1, D_j) per modality j; zero for the columns of j itself. source_j, slope_j (E, D_j, S): which
    values of the wide modalities its features follow, and how far."""

    def __init__(self, config: ModelConfig, codes: Sequence[Code], components: Sequence[Components]) -> None:
        super().__init__()
        self.pattern = config.pattern
        # Of an image, a signal or a text: whether it is there.
        self.read = [m.width <= WIDEST and not m.structured for m in config.modalities]
        self.widths = [
            1 + (code.width if read else c.basis_EDQ.shape[2]) for read, code, c in zip(self.read, codes, components, strict=True)
        ]
        self.wide = [not read and not m.structured for read, m in zip(self.read, config.modalities, strict=True)]
        for j, m in enumerate(config.modalities):
            targets = 0 if m.structured else m.width
            self.register_buffer(f"source_{j}", torch.zeros(config.members, targets, SOURCES * any(self.wide), dtype=torch.long))
            self.register_buffer(f"slope_{j}", torch.zeros(config.members, targets, SOURCES * any(self.wide)))
            self.register_buffer(f"weight_{j}", torch.zeros(config.members, sum(self.widths), targets))
            self.register_buffer(f"bias_{j}", torch.zeros(config.members, 1, targets))
            self.register_buffer(f"number_{j}", torch.tensor([k in NUMBERS for k in m.kinds]), persistent=False)
            self.register_buffer(f"binary_{j}", torch.tensor([k == "binary" for k in m.kinds]), persistent=False)

    def columns(self, completed_EBP: Tensor, z, x, observed, codes: Sequence[Code], gaussian: Gaussian, knots) -> tuple[Tensor, Tensor]:
        """Every modality's encoded values (ramps, levels and holes), or components, and a flag, (E, B, C); wide ones' values, (E, B, V).

        completed_EBP: by the Gaussian.
        """
        out, values = [], [completed_EBP[..., :0]]
        parts = completed_EBP.split(gaussian.sizes, -1)
        for j, (code, component, part) in enumerate(zip(codes, gaussian.components, parts, strict=True)):
            present_B1 = observed[j].any(1, keepdim=True)
            if self.read[j]:
                out += self._encoded(self._filled(z[j], observed[j], component, part), x[j], observed[j], code, knots[j])
            else:
                padded = fn.pad(part, (0, component.basis_EDQ.shape[2] - component.parts))
                out.append(torch.where(present_B1, component.scores(z[j]), padded))
            if self.wide[j]:
                values.append(self._filled(z[j], observed[j], component, part))
            out.append((self.pattern * (present_B1.to(part.dtype) - 0.5)).expand(*part.shape[:-1], 1))
        return torch.cat(out, -1), torch.cat(values, -1)

    @staticmethod
    def _filled(z_BD: Tensor, observed_BD: Tensor, component: Components, part_EBQ: Tensor) -> Tensor:
        return torch.where(observed_BD, z_BD.clamp(-CLIP, CLIP), component.restore(part_EBQ))

    @staticmethod
    def _encoded(z_EBD: Tensor, x_BD: Tensor, seen_BD: Tensor, code: Code, knots_DO: Tensor) -> list[Tensor]:
        numbers = [z_EBD.index_select(-1, code.numeric_F), code.ramps(z_EBD, knots_DO).flatten(2)]
        return numbers + [t.expand(len(z_EBD), -1, -1) for t in code.told(x_BD, seen_BD)]

    def forward(self, j: int, columns_EBC: Tensor, values_EBV: Tensor) -> Tensor:
        """Linear predictors of modality j, (E, B, D_j): standardised numbers, logits of binary features."""
        found_EBD = torch.baddbmm(getattr(self, f"bias_{j}"), columns_EBC, getattr(self, f"weight_{j}"))
        if not values_EBV.shape[2]:
            return found_EBD
        return found_EBD + picked(values_EBV, getattr(self, f"source_{j}"), getattr(self, f"slope_{j}"))

    def own(self, j: int) -> slice:
        start = sum(self.widths[:j])
        return slice(start, start + self.widths[j])

    def blocks(self, codes: Sequence[Code]) -> Tensor:
        """Which columns are alike, (C,): per modality its values and their ramps; what is missing, of all modalities."""
        out = []
        for j, (read, code, width) in enumerate(zip(self.read, codes, self.widths, strict=True)):
            numbers, ramps, levels, holes = code.layout if read else (width - 1, 0, 0, 0)
            out += [1 + 2 * j] * numbers + [2 + 2 * j] * ramps + [1 + 2 * j] * levels + [0] * (holes + 1)  # and the flag
        return torch.tensor(out)

    def singles(self, codes: Sequence[Code]) -> Tensor:
        """Which columns are a single value, (C,)."""
        out = []
        for read, code, width in zip(self.read, codes, self.widths, strict=True):
            numbers, ramps, levels, holes = code.layout if read else (0, 0, 0, width - 1)
            out += [True] * numbers + [False] * (ramps + levels + holes + 1)
        return torch.tensor(out)

    def own_values(self, j: int) -> slice:
        """Of the wide modalities' values."""
        widths = [getattr(self, f"number_{k}").numel() * wide for k, wide in enumerate(self.wide[: j + 1])]
        return slice(sum(widths[:j]), sum(widths))

    @torch.no_grad()
    def set_member(self, member: int, j: int, weight_CD: Tensor, bias_D: Tensor, slope_VD: Tensor) -> None:
        """One member's solution; slope: of the wide modalities' values."""
        getattr(self, f"weight_{j}")[member], getattr(self, f"bias_{j}")[member, 0] = weight_CD, bias_D
        source_SD = slope_VD.abs().topk(min(SOURCES, len(slope_VD)), 0).indices
        getattr(self, f"source_{j}")[member, :, : len(source_SD)] = source_SD.T
        getattr(self, f"slope_{j}")[member, :, : len(source_SD)] = slope_VD.gather(0, source_SD).T


def picked(values_EBV: Tensor, source_EDS: Tensor, slope_EDS: Tensor) -> Tensor:
    """Slopes times their values, summed over sources, (E, B, D)."""
    member_Z, feature_Z, place_Z = slope_EDS.nonzero(as_tuple=True)
    chosen = (member_Z, feature_Z, place_Z)
    terms_ZB = values_EBV[member_Z, :, source_EDS[chosen]] * slope_EDS[chosen][:, None]
    members, features = slope_EDS.shape[:2]
    found = values_EBV.new_zeros(members * features, values_EBV.shape[1]).index_add_(0, member_Z * features + feature_Z, terms_ZB)
    return found.unflatten(0, (members, features)).mT
