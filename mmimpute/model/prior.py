"""p(z0), and Gaussians of latents.

While training p(z0) is N(0, I). A small weight of L_elbo leaves the posteriors of the population, taken together, far from
that: on nhanes their covariance had eigenvalues from 0.24 to 5.8, and generated body measures correlated by 0.37 less
or more than real ones. So after training p(z0) becomes what maximises L_elbo with all else fixed: the density of the
aggregate posterior (Hoffman & Johnson 2016; Tomczak & Welling 2018, sec. 2), here a mixture of Gaussians with one covariance,
fitted to draws of the posteriors as Ghosh et al. 2020 do, of as many components as Schwarz' criterion (1978) wants.

What it gained over one Gaussian, nats per draw held out: nhanes .6 (8 components), tcga .4 (2 or 5), eicu none (1 is chosen), five
views of digits 5 (20). There all views of a generated record show one digit in 50% instead of 19%, and with half of the views
missing in training in 43% instead of 21% (tests/benchmarks/images.py); decoded from posteriors of training records, which is the
most that any p(z0) gives, in 47-48%. Synthetic records of nhanes are no better and no worse by it: their correlations are off by .07
either way.
A covariance for each component overfits: 0.5 nats worse than one covariance with 5 components of digits, 2 with 10.

Shape suffixes: E members, B records, N draws, L latent, S draws, C components, M = L + 1.
"""

import math
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from mmimpute.model.networks import Normal

COMPONENTS = (1, 2, 3, 5, 8, 13, 20)
DRAWS = 4_000  # of the posteriors at least, together
SMALLEST = 10  # people that a component stands for: neither draws nor the model file are to be of fewer
SEED = 17


class FullGaussian(nn.Module):
    """A Gaussian with full covariance per member, held as buffers; N(0, I) until it is fitted."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_EL", torch.zeros(members, width))
        self.register_buffer("root_ELL", torch.eye(width).repeat(members, 1, 1))

    def sample(self, noise: Tensor) -> Tensor:
        """From standard normal noise (..., E or 1, B or 1, L)."""
        return self.mean_EL[:, None] + noise @ self.root_ELL.mT

    @torch.no_grad()
    def fit(self, moments_EMM: Tensor) -> None:
        """Takes the moments of posteriors, as `moments` adds them up."""
        second_EMM = moments_EMM.double() / moments_EMM[:, :1, :1].double()
        mean_EL = second_EMM[:, 0, 1:]
        covariance_ELL = second_EMM[:, 1:, 1:] - mean_EL[:, :, None] * mean_EL[:, None]
        jitter_LL = 1e-6 * torch.eye(mean_EL.shape[1], dtype=torch.float64, device=mean_EL.device)
        self.mean_EL.copy_(mean_EL)
        self.root_ELL.copy_(torch.linalg.cholesky(covariance_ELL + jitter_LL))


def moments(q: Normal) -> Tensor:
    """Sum over records of E_q [1, z0] [1, z0]^T, E x M x M."""
    one_EBM = torch.cat([torch.ones_like(q.mean[..., :1]), q.mean], -1).double()
    spread_EM = torch.cat([q.var.new_zeros(len(q.var), 1), q.var.sum(1)], 1).double()
    return one_EBM.mT @ one_EBM + torch.diag_embed(spread_EM)


class SharedPrior(nn.Module):
    """A mixture of Gaussians with one covariance per member, held as buffers; N(0, I) until it is fitted.

    Components that are not needed have weight 0.
    """

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight_EC", torch.eye(COMPONENTS[-1])[:1].repeat(members, 1))
        self.register_buffer("centre_ECL", torch.zeros(members, COMPONENTS[-1], width))
        self.register_buffer("root_ELL", torch.eye(width).repeat(members, 1, 1))

    @property
    def mean_EL(self) -> Tensor:
        return (self.weight_EC[..., None] * self.centre_ECL).sum(1)

    def sample(self, noise: Tensor, chance: Tensor) -> Tensor:
        """From standard normal noise (S, E or 1, B, L), and numbers from [0, 1) (S, E or 1, B) that choose the component."""
        summed_EC = self.weight_EC.cumsum(1)
        index_SEB = (chance[..., None] >= (summed_EC / summed_EC[:, -1:])[:, None]).sum(-1)
        members_E1 = torch.arange(len(summed_EC), device=noise.device)[:, None]
        return self.centre_ECL[members_E1, index_SEB] + noise @ self.root_ELL.mT

    def normal(self, noise: Tensor) -> Tensor:
        """The Gaussian with the mixture's mean and covariance, from noise (..., E or 1, B or 1, L): few nodes can stand for it."""
        mean_EL = self.mean_EL
        apart_ECL = self.weight_EC.sqrt()[..., None] * (self.centre_ECL - mean_EL[:, None])
        root_ELL = torch.linalg.cholesky(self.root_ELL @ self.root_ELL.mT + apart_ECL.mT @ apart_ECL)
        return mean_EL[:, None] + noise @ root_ELL.mT

    def log_prob(self, z0_SEBL: Tensor) -> Tensor:
        """Log-density, (S, E, B)."""
        white_SEBL, white_ECL = (torch.linalg.solve_triangular(self.root_ELL, t.mT, upper=False).mT for t in (z0_SEBL, self.centre_ECL))
        apart_SEBC = torch.cdist(white_SEBL, white_ECL, compute_mode="donot_use_mm_for_euclid_dist")
        volume_E1 = self.root_ELL.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
        density_SEB = (self.weight_EC.log()[:, None] - 0.5 * apart_SEBC.square()).logsumexp(-1)
        return density_SEB - volume_E1 - 0.5 * z0_SEBL.shape[-1] * math.log(2 * math.pi)

    @torch.no_grad()
    def fit(self, q: Normal) -> None:
        """q: posteriors of records, (E, B, L). How many components there are is chosen by the first member."""
        from threadpoolctl import threadpool_limits

        mean_EBL, records = q.mean.cpu(), q.mean.shape[1]
        draws = -(-DRAWS // records)
        noise = torch.randn(draws, *mean_EBL.shape, generator=torch.Generator().manual_seed(SEED))
        z0_ENL = (mean_EBL + q.var.cpu().sqrt() * noise).transpose(0, 1).flatten(1, 2).double().numpy()
        with threadpool_limits(1):  # sums in the same order every time
            tried = [_mixture(z0_ENL[0], count) for count in COMPONENTS if count <= records]
            best = min(tried, key=lambda mixture: _criterion(mixture, z0_ENL[0], records))
            found = [best, *(_mixture(z0_NL, len(best.weights_)) for z0_NL in z0_ENL[1:])]
        self.weight_EC.zero_()
        self.centre_ECL.zero_()
        for weight_C, centre_CL, root_LL, mixture in zip(self.weight_EC, self.centre_ECL, self.root_ELL, found, strict=True):
            kept_C = mixture.weights_ * (mixture.weights_ >= min(SMALLEST / records, mixture.weights_.max()))
            weight_C[: len(best.weights_)] = torch.from_numpy(kept_C / kept_C.sum())
            centre_CL[: len(best.weights_)] = torch.from_numpy(mixture.means_ * (kept_C > 0)[:, None])
            root_LL.copy_(torch.linalg.cholesky(torch.from_numpy(mixture.covariances_)))


def _mixture(z0_NL: np.ndarray, count: int):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a step more would not be seen
        return GaussianMixture(count, covariance_type="tied", tol=1e-2, random_state=SEED).fit(z0_NL)


def _criterion(mixture, z0_NL: np.ndarray, records: int) -> float:
    """Schwarz' criterion of the weights and means, over records instead of draws."""
    return len(mixture.weights_) * (z0_NL.shape[1] + 1) * math.log(records) - 2 * records * mixture.score(z0_NL)
