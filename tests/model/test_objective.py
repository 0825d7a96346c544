"""Hiding: never all, and as often as asked."""

import torch
from cohorts import mixed_values

from mmimpute.model.objective import hide, keep_values

ROWS = 40_000


def test_never_all_and_only_what_is_observed():
    present = torch.rand(ROWS, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    for one in (0.0, 0.8, 1.0):
        hidden = hide(present, torch.tensor([0.1, 0.5, 0.5, 1.0]), one)
        assert not (hidden & ~present).any()
        kept = (present & ~hidden).sum(1)
        assert (kept[present.any(1)] > 0).all()
    only_one = present.sum(1) == 1
    assert not hidden[only_one].any()


def test_exactly_one_in_proportion_to_its_weight():
    weight = torch.tensor([0.1, 0.5, 0.4])
    hidden = hide(torch.ones(ROWS, 3, dtype=torch.bool), weight, one=1.0)
    assert (hidden.sum(1) == 1).all()
    torch.testing.assert_close(hidden.float().mean(0), weight / weight.sum(), atol=0.01, rtol=0)


def test_several_follow_their_own_probabilities():
    """Ten modalities: keeping one hardly matters, and the mean rate is 0.45 weight / 0.5."""
    weight = torch.tensor([0.1, 0.3] * 5)
    hidden = hide(torch.ones(ROWS, 10, dtype=torch.bool), weight, one=0.0)
    torch.testing.assert_close(hidden.float().mean(0), 0.45 * weight / 0.5, atol=0.01, rtol=0)


def test_subsets_are_new_at_every_step_and_repeat_with_the_seed():
    present, weight = torch.ones(50, 5, dtype=torch.bool), torch.full((5,), 0.5)
    first, second = hide(present, weight, 0.8), hide(present, weight, 0.8)
    assert not torch.equal(first, second)
    repeated = [hide(present, weight, 0.8, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*repeated)


def test_dropped_values_are_a_part_of_the_observed_ones_of_some_records():
    observed = [torch.rand(v.shape) < 0.8 for v in mixed_values(4000)]
    shown = keep_values(observed, 0.5)
    whole = torch.ones(4000, dtype=torch.bool)
    for o, s in zip(observed, shown, strict=True):
        assert not (s & ~o).any()
        whole &= (o == s).all(1)
    assert 0.5 < whole.float().mean() < 0.62
