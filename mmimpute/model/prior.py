"""p(z0).

While training it is N(0, I). A small weight of L_elbo leaves the posteriors of the population, taken together, far from
that: on nhanes their covariance had eigenvalues from 0.24 to 5.8, and generated body measures correlated by 0.37 less
or more than real ones. So after training p(z0) becomes the Gaussian that maximises L_elbo with all else fixed: the one
with the mean and covariance of the aggregate posterior (Hoffman & Johnson 2016; Tomczak & Welling 2018, sec. 2).

Shape suffixes: E members, B records, L latent, S draws, M = L + 1.
"""

import math

import torch
from torch import Tensor, nn

from mmimpute.model.networks import Normal


class SharedPrior(nn.Module):
    """A Gaussian with full covariance per member, held as buffers; N(0, I) until it is fitted."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_EL", torch.zeros(members, width))
        self.register_buffer("root_ELL", torch.eye(width).repeat(members, 1, 1))

    def sample(self, noise: Tensor) -> Tensor:
        """From standard normal noise (..., E or 1, B or 1, L)."""
        return self.mean_EL[:, None] + noise @ self.root_ELL.mT

    def log_prob(self, z0_SEBL: Tensor) -> Tensor:
        """Log-density, (S, E, B)."""
        white_SELB = torch.linalg.solve_triangular(self.root_ELL, (z0_SEBL - self.mean_EL[:, None]).mT, upper=False)
        volume_E1 = self.root_ELL.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
        return -0.5 * white_SELB.square().sum(-2) - volume_E1 - 0.5 * z0_SEBL.shape[-1] * math.log(2 * math.pi)

    @torch.no_grad()
    def fit(self, moments_EMM: Tensor) -> None:
        """Takes the moments of the aggregate posteriors, as `moments` adds them up."""
        second_EMM = moments_EMM.double() / moments_EMM[:, :1, :1].double()
        mean_EL = second_EMM[:, 0, 1:]
        covariance_ELL = second_EMM[:, 1:, 1:] - mean_EL[:, :, None] * mean_EL[:, None]
        jitter_LL = 1e-6 * torch.eye(mean_EL.shape[1], dtype=torch.float64, device=mean_EL.device)
        self.mean_EL.copy_(mean_EL)
        self.root_ELL.copy_(torch.linalg.cholesky(covariance_ELL + jitter_LL))


def moments(q: Normal) -> Tensor:
    """Sum over records of E_q [1, z0] [1, z0]^T, E x M x M: adds up over batches and ranks."""
    one_EBM = torch.cat([torch.ones_like(q.mean[..., :1]), q.mean], -1).double()
    spread_EM = torch.cat([q.var.new_zeros(len(q.var), 1), q.var.sum(1)], 1).double()
    return one_EBM.mT @ one_EBM + torch.diag_embed(spread_EM)
