"""Text as a bag of tokens: a record is T token ids, of which 0 means no token, so that short texts are as long as long ones.

    p(x | zj, z0) = prod_t Categorical(x_t; softmax(f(zj, z0)))    over the vocabulary and no token

All positions share one distribution: the multinomial of a bag of T tokens without its coefficient, which no parameter moves.
The encoder reads the order of the tokens: embeddings, a convolution over neighbours, attention pooling.

Shape suffixes: B records, T tokens, C code columns, V vocabulary and no token, S draws, E members.
"""

import math

import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from mmimpute.model.config import ModalityConfig
from mmimpute.model.forms import CODE

EMBEDDED = 64
NEIGHBOURS = 5  # tokens that a convolution sees
TOLD = 10  # tokens of an imputed text: the most probable ones
BAG = "bag"  # the one kind of heads
Heads = dict[str, Tensor]


def counts(id_T: Tensor, size: int) -> Tensor:
    """How often each token is in a text: (..., T) ids -> (..., V)."""
    return id_T.new_zeros(*id_T.shape[:-1], size).scatter_add(-1, id_T.long(), torch.ones_like(id_T))


class TextCode(nn.Module):
    """A text as network inputs: 0 where there is none. Stands where vectors have `networks.Code`."""

    def __init__(self, config: ModalityConfig) -> None:
        super().__init__()
        self.width = CODE
        self.embedding = nn.Embedding(config.levels[0], EMBEDDED)
        self.layer = nn.Conv1d(EMBEDDED, CODE, NEIGHBOURS, padding=NEIGHBOURS // 2)
        self.attention = nn.Linear(CODE, 1)
        self.last = nn.Linear(CODE, CODE)

    def forward(self, z_BT: Tensor, x_BT: Tensor, observed_BT: Tensor, knots: Tensor) -> Tensor:
        """Token ids -> code (B, C). A token that is not shown is none."""
        id_BT = (x_BT * observed_BT).long().clamp(0, self.embedding.num_embeddings - 1)
        word_BT1 = (id_BT > 0)[..., None]
        whole_BTC = fn.silu(self.layer((self.embedding(id_BT) * word_BT1).mT).mT)
        weight_BT1 = self.attention(whole_BTC).float().exp() * word_BT1
        pooled_BC = (whole_BTC * weight_BT1).sum(1) / weight_BT1.sum(1).clamp_min(1e-6)
        return fn.silu(self.last(pooled_BC)) * observed_BT.any(-1, keepdim=True)


class Bag(nn.Module):
    """The likelihood of a text; stands where vectors have `likelihoods.Likelihoods`, of whose methods it has those that training and
    drawing call. Zero outputs say that every text is like all texts together."""

    def __init__(self, config: ModalityConfig) -> None:
        super().__init__()
        self.tokens, self.size = config.width, config.levels[0]
        chance_V = torch.tensor(config.chances)
        self.register_buffer("base_V", chance_V.log(), persistent=False)
        self.register_buffer("marginal_score", -(chance_V * chance_V.log()).sum(), persistent=False)

    def heads(self, raw: Tensor) -> Heads:
        return {BAG: (raw.float() + self.base_V).log_softmax(-1)}

    def log_prob(self, heads: Heads, target_BT: Tensor) -> Tensor:
        """Log-probability of every token, (..., T)."""
        log_V = heads[BAG]
        id_BT = target_BT.long().clamp(0, self.size - 1).expand(*log_V.shape[:-1], -1)
        return log_V.gather(-1, id_BT)

    def score(self, heads: Heads, target_BT: Tensor) -> Tensor:
        """Minus the log of each token's probability under the mixture over S draws; of the marginal it is 1 on average."""
        log_prob_SBT = self.log_prob(heads, target_BT)
        return (math.log(log_prob_SBT.shape[0]) - log_prob_SBT.logsumexp(0)) / self.marginal_score

    def sample(self, heads: Heads, standardise: nn.Module, generator: torch.Generator | None = None) -> Tensor:
        """A bag of token ids per entry of the heads, (..., T)."""
        log_V = heads[BAG]
        drawn = torch.multinomial(log_V.exp().flatten(0, -2), self.tokens, replacement=True, generator=generator)
        return drawn.view(*log_V.shape[:-1], self.tokens).float()

    def drawn_counts(self, heads: Heads, generator: torch.Generator | None) -> Tensor:
        """How often each token is in a sampled bag, (..., V), with the gradient of how often it is expected."""
        expected_V = self.tokens * heads[BAG].exp()
        return counts(self.sample(heads, self, generator), self.size) + expected_V - expected_V.detach()

    def moments(self, heads: Heads, standardise: nn.Module) -> tuple[Tensor, Tensor]:
        """The most probable tokens of the mixture over the leading S and E, TOLD at most, then 0; and sqrt(1 - sum p^2) over the
        vocabulary, the same for all positions; (B, T) each."""
        chance_BV = heads[BAG].flatten(0, 1).exp().mean(0)
        word_BV = chance_BV[:, 1:] / chance_BV[:, 1:].sum(1, keepdim=True)
        told = min(TOLD, self.tokens, self.size - 1)
        best_BT = fn.pad(word_BV.topk(told).indices + 1, (0, self.tokens - told)).float()
        std_B1 = (1 - word_BV.square().sum(1, keepdim=True)).clamp_min(0).sqrt()
        return best_BT, std_B1.expand_as(best_BT)
