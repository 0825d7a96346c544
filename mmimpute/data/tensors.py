"""Arrays of records as the model takes them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_model(x: np.ndarray, widths: Sequence[int], device: torch.device | str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """N x width float32, NaN where not observed -> per modality (values, what is observed), N x D_j each."""
    x_ND = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(device, non_blocking=True)
    return split(x_ND, widths)


def split(x_ND: Tensor, widths: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The same for a tensor that is on its device already."""
    values = list(x_ND.split(list(widths), dim=1))
    return values, [~v.isnan() for v in values]
