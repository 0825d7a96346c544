"""Fixed quasi-random standard normal nodes: the same for every record, so predictions repeat to the bit."""

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=32)
def normal_nodes(draws: int, size: int) -> Tensor:
    """(draws, size) antithetic Sobol nodes: mean exactly 0 and variance exactly 1 in every dimension.

    Antithetic pairs make the mean of anything linear in the latents exact, whatever the number of draws.
    """
    if draws < 2 or draws % 2:
        raise ValueError(f"draws is {draws}, expected an even number")
    uniform = torch.quasirandom.SobolEngine(size, scramble=True, seed=1).draw(draws // 2, dtype=torch.float64)
    half = torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4))
    half = half / half.square().mean(0).sqrt()
    return torch.cat([half, -half]).float()
