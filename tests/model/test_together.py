"""What all modalities' likelihoods are computed from at once is what each alone says."""

import pytest
import torch
from cohorts import CONFIG, mixed_values, statistics

from mmimpute.model.config import ModalityConfig
from mmimpute.model.likelihoods import Likelihoods
from mmimpute.model.standardise import Standardise
from mmimpute.model.text import Bag
from mmimpute.model.together import Told, log_probs, scores, together

MEMBERS, DRAWS = 2, 4


def told(config, target, seed):
    """Random heads of records, of which `target` is the truth, and the outputs that the heads were made of."""
    generator = torch.Generator().manual_seed(seed)
    if config.form == "text":
        likelihood = Bag(config)
    else:
        likelihood = Likelihoods(config, Standardise(statistics(target.numpy(), config.kinds)), MEMBERS)
        if likelihood.student:
            torch.nn.init.normal_(likelihood.tail_E1F, std=0.1, generator=generator)
    half = torch.randn(DRAWS // 2, MEMBERS, len(target), likelihood.size, generator=generator)
    raw = torch.cat([half, -half]).requires_grad_()
    seen = torch.rand(target.shape, generator=generator) < 0.7
    return Told(likelihood, likelihood.heads(raw), target, seen), raw


def cohort():
    """Modalities of different widths, kinds, tails and forms, with different numbers of records."""
    text = ModalityConfig("text", ("categorical",) * 5, (4,) * 5, form="text", shape=(5,), chances=(0.4, 0.3, 0.2, 0.1))
    ids = torch.randint(0, 4, (3, 5), generator=torch.Generator().manual_seed(0)).float()
    rows = (7, 5, 4)
    vectors = [(m, values[:n]) for m, values, n in zip(CONFIG.modalities, mixed_values(9), rows, strict=True)]
    return [told(*one, seed) for seed, one in enumerate([*vectors, (text, ids)])]


def test_all_modalities_at_once_say_what_each_says_alone():
    every, _ = zip(*cohort(), strict=True)
    for t, log_prob, score in zip(every, log_probs(every), scores(every), strict=True):
        torch.testing.assert_close(log_prob, t.likelihood.log_prob(t.heads, t.target_BD))
        each = t.likelihood.score(t.heads, t.target_BD)
        torch.testing.assert_close(score, (each * t.seen_BD).sum(-1) / t.seen_BD.sum(-1).clamp_min(1))


@pytest.mark.parametrize("pair_weight", (0.0, 0.5))
def test_their_gradients_are_those_of_each_alone(pair_weight):
    every, raws = zip(*cohort(), strict=True)
    torch.manual_seed(0)
    sum(t.sum() for t in [*scores(every, pair_weight), *log_probs(every)]).backward()
    torch.manual_seed(0)
    for (one, raw), all_raw in zip(cohort(), raws, strict=True):
        sum(t.sum() for t in [*scores([one], pair_weight), *log_probs([one])]).backward()
        torch.testing.assert_close(all_raw.grad, raw.grad)


def test_pairs_are_of_real_features_of_vectors():
    every, _ = zip(*cohort(), strict=True)
    image = told(ModalityConfig("image", ("real",) * 4, form="image", shape=(1, 2, 2)), torch.arange(24.0).view(6, 4), 9)[0]
    assert [not torch.equal(scores([t], 1.0)[0], scores([t])[0]) for t in (*every, image)] == [True, True, False, False, False]


def test_nothing_is_asked_of_nobody():
    assert together(torch.add, []) == log_probs([]) == scores([]) == []
