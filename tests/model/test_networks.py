"""What all networks share: products in few sizes, faster where the CPU can."""

import pytest
import torch
from cohorts import mixed_model, mixed_values

from mmimpute.model import networks
from mmimpute.model.networks import ROUND, Dropout, fast_products, rounded


@pytest.mark.parametrize("count", [0, 1, ROUND - 1, ROUND, ROUND + 1])
def test_rounded_rows_are_a_multiple_and_begin_with_all_of_them(count):
    rows = torch.arange(7, 7 + count)
    found = rounded(rows)
    assert len(found) % ROUND == 0 and len(found) < count + ROUND
    assert torch.equal(found[:count], rows) and (found[count:] == 7).all()


def test_a_repeated_record_counts_once(monkeypatch):
    x, observed = mixed_values(50), [torch.ones_like(v, dtype=torch.bool) for v in mixed_values(50)]
    found = []
    for size in (1, 64):
        monkeypatch.setattr(networks, "ROUND", size)
        torch.manual_seed(0)
        found.append(mixed_model().eval()(x, observed))
    few, many = (terms.score_EBK[0] for terms in found)
    assert torch.equal(found[0].hidden_BK, found[1].hidden_BK) and torch.equal(few != 0, many != 0)
    assert (many <= 4 * few).all()  # the draws differ; repeated, the first of each modality would count some forty times


def test_products_are_fast_in_their_block_only():
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    with pytest.raises(RuntimeError), fast_products():
        assert products.fp32_precision == "bf16"
        raise RuntimeError
    assert products.fp32_precision == before != "bf16"


@pytest.mark.parametrize("probability", [0.1, 0.4])
def test_dropout_drops_its_share_and_keeps_the_expectation(probability):
    torch.manual_seed(0)
    x = torch.ones(3, 333, 101, requires_grad=True)  # no multiple of the eight values that share a random number
    out = Dropout(probability)(x)
    assert (out == 0).float().mean().item() == pytest.approx(probability, abs=0.004)
    assert out.mean().item() == pytest.approx(1, abs=0.006)
    columns = (out == 0).flatten(1).float()
    assert columns.corrcoef().fill_diagonal_(0).abs().max() < 0.02
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach())
    torch.manual_seed(0)
    torch.testing.assert_close(Dropout(probability)(x), out)
    assert Dropout(probability).eval()(x) is x and Dropout(0.0)(x) is x
