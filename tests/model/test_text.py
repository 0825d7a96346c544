"""Text in the model: the likelihood in closed form, the encoder's order, and words that are known from a vector."""

import numpy as np
import pytest
import torch
from scipy.stats import multinomial

from mmimpute.model import FeatureStatistics, ModalityConfig, ModelConfig, MultiModalVAE
from mmimpute.model.text import BAG, Bag, TextCode
from mmimpute.stacking import assemble
from mmimpute.training import OptimiserSettings, fit_in_memory, schedule
from tests.model.cohorts import everything, statistics

CHANCES = (0.4, 0.3, 0.2, 0.1)
TEXT = ModalityConfig("note", ("categorical",) * 6, (4,) * 6, form="text", shape=(6,), chances=CHANCES)


def test_the_likelihood_is_that_of_a_multinomial_bag():
    bag, ids = Bag(TEXT), torch.tensor([[3.0, 1, 1, 0, 0, 0], [2, 2, 2, 2, 2, 2]])
    raw = torch.randn(1, 2, bag.size)
    heads = bag.heads(raw)
    found = bag.log_prob(heads, ids).sum(-1)[0]
    for row in range(2):
        count = np.bincount(ids[row].long(), minlength=4)
        chance = heads[BAG][0, row].exp().double().numpy()
        coefficient = multinomial.logpmf(count, 6, np.full(4, 0.25)) - 6 * np.log(0.25)
        assert found[row].item() == pytest.approx(multinomial.logpmf(count, 6, chance / chance.sum()) - coefficient, rel=1e-5)


def test_zero_outputs_are_the_marginal_whose_score_is_one():
    bag = Bag(TEXT)
    heads = bag.heads(torch.zeros(2, 1, 1, 4))
    assert heads[BAG][0, 0, 0].exp().tolist() == pytest.approx(CHANCES)
    each = torch.tensor([[0.0, 1, 2, 3, 0, 0]])
    score = bag.score(heads, each)[0, 0, :4]
    assert (score * torch.tensor(CHANCES)).sum().item() == pytest.approx(1)


def test_draws_have_the_heads_frequencies_and_means_their_order():
    bag = Bag(TEXT)
    heads = bag.heads(torch.tensor([0.0, -1, 0, 2]).expand(1, 1, 4000, 4))
    chance = heads[BAG][0, 0, 0].exp()
    drawn = bag.sample(heads, None, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn.long().flatten(), minlength=4) / drawn.numel()
    assert torch.allclose(share, chance, atol=0.02)
    told, std = bag.moments(heads, None)
    words = chance[1:] / chance[1:].sum()
    assert told[0].tolist() == [*(words.argsort(descending=True) + 1).tolist(), 0, 0, 0]
    assert std.unique().item() == pytest.approx((1 - words.square().sum()).sqrt().item())


def test_the_encoder_reads_the_order_and_nothing_where_nothing_is():
    code = TextCode(TEXT)
    ids = torch.tensor([[1.0, 2, 3, 0, 0, 0], [3, 2, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 2, 3, 1, 1, 1]])
    seen = torch.ones_like(ids, dtype=torch.bool)
    seen[3, 3:] = False
    found = code(ids, ids, seen, None)
    assert not torch.allclose(found[0], found[1]) and torch.allclose(found[0], found[3])
    assert found[2].any() and not code(ids, ids, torch.zeros_like(seen), None).any()


@pytest.mark.parametrize(("levels", "chances"), [((4,) * 6, ()), ((4, 4, 4, 4, 4, 5), CHANCES), ((4,) * 6, (0.5, 0.3, 0.2, 0.0))])
def test_a_text_has_one_vocabulary(levels, chances):
    with pytest.raises(ValueError, match="one vocabulary"):
        ModalityConfig("note", ("categorical",) * 6, levels, form="text", shape=(6,), chances=chances)


def test_words_and_numbers_are_known_from_each_other():
    """The sign of a number decides between words 1 and 2; word 3 says nothing."""
    draw = np.random.default_rng(0)
    number = draw.normal(size=(600, 2)).astype(np.float32)
    ids = np.zeros((600, 6), np.float32)
    ids[:, 0], ids[:, 1] = np.where(number[:, 0] > 0, 1, 2), 3
    x = [torch.tensor(ids), torch.tensor(number)]
    vector = ModalityConfig("labs", ("real", "real"))
    config = ModelConfig((TEXT, vector), shared=8, hidden=32, decoder=16, dropout=0.0)
    vae = MultiModalVAE(config, {"note": FeatureStatistics.blank(6), "labs": statistics(number, vector.kinds)})
    fold = torch.where(torch.arange(600) % 10 == 0, 0, -1)
    fitted = fit_in_memory(vae, (x, everything(x)), fold, OptimiserSettings(lr=6e-3), schedule(600, 64, 12)).model
    model = assemble(fitted, x, everything(x), fold)
    hidden = [torch.zeros_like(x[0], dtype=torch.bool), torch.ones_like(x[1], dtype=torch.bool)]
    told = model.predict(x, hidden).mean[0]
    at = [[row.tolist().index(word) for row in told] for word in (1, 2)]
    right = np.where(number[:, 0] > 0, np.array(at[0]) < at[1], np.array(at[1]) < at[0])
    assert right.mean() > 0.9
    guess = model.predict(x, [~h for h in hidden]).mean[1][:, 0]
    assert np.corrcoef(guess, np.sign(number[:, 0]))[0, 1] > 0.9
