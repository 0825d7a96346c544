"""How much each block of columns has to say: variance components of a regression on all of them.

Columns that are alike (a modality's values, its curves, the flags) form a block. With weights ~ N(0, theta_b) within block b and noise 1,
a target's covariance over records is  C = I + sum_b theta_b X_b X_b', and theta maximises the marginal likelihood (Rasmussen & Williams
2006, eq. 5.8; ridge regressions with a penalty per block: van de Wiel, van Nee & Rauschenberger 2021). Columns times sqrt(theta_b) then
want one penalty.

Shape suffixes: N records, C columns, D features, Q blocks.
"""

import torch
from torch import Tensor

MOST_RECORDS = 500  # 800 and 1,300 gain nothing
MOST_VALUES = 1 << 26  # of the blocks' kernels together
MOST_FEATURES = 200
STEPS = 40  # of L-BFGS
RANGE = (-9.0, 4.0)  # of log theta, for kernels with a mean diagonal of 1
START, PULL = -3.0, 1e-4  # where log theta starts, and how strongly it is drawn there
SEED = 13


def block_scales(columns_NC: Tensor, block_C: Tensor, target_ND: Tensor, seen_ND: Tensor) -> Tensor:
    """sqrt(theta) of every column's block, (C,). block_C: 0..Q-1. Targets are real values, or codes taken for such.

    The same theta serves all features: each is scaled by a deviation of its own, which is profiled out.
    """
    blocks = int(block_C.max()) + 1
    most = min(MOST_RECORDS, int((MOST_VALUES / blocks) ** 0.5))
    rows = torch.randperm(len(columns_NC), generator=torch.Generator().manual_seed(SEED))[:most]
    columns = columns_NC[rows].double()
    columns = columns - columns.mean(0)
    parts = [columns[:, block_C == b] for b in range(blocks)]
    kernel_QNN = torch.stack([p @ p.T for p in parts])
    level_Q = kernel_QNN.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-9)
    kernel_QNN /= level_Q[:, None, None]
    y_ND = _standardised(target_ND[rows].double(), seen_ND[rows])
    log_theta_Q = _fitted(kernel_QNN, y_ND) if y_ND.shape[1] else torch.full_like(level_Q, START)
    return (log_theta_Q.exp() / level_Q).sqrt().float()[block_C]


def _standardised(target_ND: Tensor, seen_ND: Tensor) -> Tensor:
    """Features that vary and that most records hold; what is missing is at their mean."""
    mean_D = (target_ND * seen_ND).sum(0) / seen_ND.sum(0).clamp_min(1)
    y_ND = torch.where(seen_ND, target_ND - mean_D, 0.0)
    kept = ((seen_ND.double().mean(0) > 0.5) & (y_ND.square().mean(0) > 1e-8)).nonzero().squeeze(1)
    kept = kept[torch.linspace(0, len(kept) - 1, min(MOST_FEATURES, len(kept))).long()]
    return y_ND[:, kept] / y_ND[:, kept].square().mean(0).sqrt()


def negative_log_likelihood(log_theta_Q: Tensor, kernel_QNN: Tensor, y_ND: Tensor) -> Tensor:
    """Per value, mean over features, each feature's own variance at its best; up to a constant."""
    rows = len(y_ND)
    covariance_NN = (log_theta_Q.exp()[:, None, None] * kernel_QNN).sum(0) + torch.eye(rows, dtype=y_ND.dtype)
    root_NN = torch.linalg.cholesky(covariance_NN)
    white_ND = torch.linalg.solve_triangular(root_NN, y_ND, upper=False)
    return 0.5 * white_ND.square().mean(0).log().mean() + root_NN.diagonal().log().mean()


def _fitted(kernel_QNN: Tensor, y_ND: Tensor) -> Tensor:
    """log theta."""
    free_Q = torch.full((len(kernel_QNN),), START, dtype=y_ND.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([free_Q], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = negative_log_likelihood(free_Q.clamp(*RANGE), kernel_QNN, y_ND) + PULL * (free_Q - START).square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return free_Q.detach().clamp(*RANGE)
