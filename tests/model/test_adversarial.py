"""decoder = "adversarial": what the discriminator sees, and who learns what from it."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from cohorts import LinearGaussian, everything, fit_linear_gaussian, forms_model, masks, mixed_model, mixed_values, stamped
from torch.nn.parallel import DistributedDataParallel as DDP

from mmimpute.model import ModalityConfig, ModelConfig, MultiModalVAE
from mmimpute.model.adversarial import Discriminator
from mmimpute.model.text import Bag
from mmimpute.training import OptimiserSettings, Training

ROWS = 64
X, OBSERVED = mixed_values(ROWS), masks(mixed_values(ROWS), share=0.8)


def adversarial_model(seed: int = 0, members: int = 2) -> MultiModalVAE:
    return mixed_model(seed, members, "adversarial").train()


def gradients(model: MultiModalVAE, x, observed, scale: float = 1.0, unused: bool = False) -> dict[str, torch.Tensor]:
    """Raises where a parameter is not in the graph, unless some may be unused."""
    torch.manual_seed(0)
    objective = model(x, observed, elbo_scale=scale).objective
    found = torch.autograd.grad(objective, list(model.parameters()), allow_unused=unused, materialize_grads=unused)
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def test_every_parameter_is_in_the_graph_though_nothing_can_be_hidden():
    observed = [torch.zeros_like(o) if j else torch.ones_like(o) for j, o in enumerate(OBSERVED)]
    found = gradients(adversarial_model(), X, observed)
    judges = [g for name, g in found.items() if name.startswith("judges")]
    assert len(judges) == 18 and not any(g.any() for g in judges)


def test_so_is_every_parameter_that_judges_images_and_signals():
    x, _, _ = stamped(12, 0)
    model = forms_model(x, "adversarial").train()
    for observed in (everything(x), [torch.full_like(v, j == 0, dtype=torch.bool) for j, v in enumerate(x)]):
        found = gradients(model, x, observed)
        readers = [g for name, g in found.items() if name.startswith("judges") and ".reader." in name]
        assert len(readers) == 14 and all(bool(g.any()) == bool(observed[1].any()) for g in readers)


@pytest.mark.parametrize("junk", [float("nan"), 1e6])
def test_what_is_not_observed_changes_no_gradient(junk):
    model = adversarial_model()
    zeroed, spoiled = ([torch.where(o, v, fill) for v, o in zip(X, OBSERVED, strict=True)] for fill in (0.0, junk))
    first, second = (gradients(model, x, OBSERVED) for x in (zeroed, spoiled))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(first[name].any() for name in first if name.startswith("judges"))


def test_the_discriminator_learns_to_tell_and_the_decoder_not_to_be_told(monkeypatch):
    """The decoder's loss moves no discriminator, the discriminator's no decoder."""
    monkeypatch.setattr("mmimpute.model.vae.MultiModalVAE._objective", lambda self, terms, inputs, scale: terms.adversarial_EBK.sum())
    model = adversarial_model()
    cold, warm = (gradients(model, X, OBSERVED, scale, unused=True) for scale in (0.0, 1.0))
    judges = [name for name in cold if name.startswith("judges")]
    assert all(torch.equal(cold[name], warm[name]) for name in judges)
    decoders = [name for name in cold if ".decoder." in name]
    assert not any(cold[name].any() for name in decoders) and all(warm[name].any() for name in decoders)


def test_a_decoder_that_is_certain_looks_like_what_is_real():
    """Column by column: samples of heads that leave no doubt are judged on the same numbers as the values themselves."""
    model = adversarial_model(members=1)
    for j, judge in model.judges.items():
        at = int(j)
        x_BD, seen_BD, likelihood = X[at], OBSERVED[at], model.likelihoods[at]
        inputs = model.inputs(X, everything(X))
        certain = {}
        for kind in likelihood.kinds:
            value = x_BD[:, getattr(likelihood, f"{kind}_F")]
            if kind == "real":
                z = inputs.z[at][:, likelihood.real_F]
                certain[kind] = torch.stack([z, torch.full_like(z, -30.0)], -1)
            elif kind == "binary":
                certain[kind] = 60 * (value[..., None] - 0.5)
            elif kind == "count":
                certain[kind] = torch.stack([(value + 1e-6).log(), torch.full_like(value, 12.0)], -1)
            else:
                levels = model.likelihoods[at].levels[kind]
                certain[kind] = torch.log_softmax(60 * torch.nn.functional.one_hot(value.long(), levels).float(), -1)
        heads = {kind: head[None] for kind, head in certain.items()}
        drawn = judge.drawn(likelihood, heads, model.standardise[at], seen_BD, torch.Generator().manual_seed(0))[0]
        real = judge.real(inputs.z[at], inputs.filled[at], seen_BD)
        assert drawn.shape == real.shape
        count = torch.tensor([k == "count" for k in model.config.modalities[at].kinds])[judge.numbers_F]
        exact = torch.cat([~count, torch.ones(real.shape[1] - len(count), dtype=torch.bool)])
        torch.testing.assert_close(drawn[:, exact], real[:, exact], atol=1e-4, rtol=0)
        assert torch.corrcoef(torch.stack([drawn[:, ~exact].flatten(), real[:, ~exact].flatten()]))[0, 1] > 0.6 if count.any() else True


def test_so_does_a_certain_text():
    chances = (0.4, 0.3, 0.2, 0.1)
    text = ModalityConfig("note", ("categorical",) * 6, (4,) * 6, form="text", shape=(6,), chances=chances, decoder="adversarial")
    judge, bag = Discriminator(ModelConfig((text,)), text), Bag(text)
    ids_HT = torch.arange(4.0)[:, None].expand(4, 6)  # one word over and over
    logits = (60 * torch.eye(4))[None].requires_grad_()
    drawn = judge.drawn(bag, bag.heads(logits), None, None, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn[0], judge.real(ids_HT, ids_HT, None))
    (slope,) = torch.autograd.grad(judge.drawn(bag, bag.heads(logits / 60), None, None, None)[..., 0].sum(), logits)
    assert slope[0, :, 0].min() > 0 and slope[0, :, 1:].max() < 0  # more of a word where it is made more probable


def test_resume_continues_exactly():
    straight, first = (Training(adversarial_model(), OptimiserSettings(), total_steps=6) for _ in range(2))
    for _ in range(6):
        straight.step(X, OBSERVED)
    for _ in range(3):
        first.step(X, OBSERVED)
    resumed = Training(adversarial_model(seed=9), OptimiserSettings(), total_steps=6)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(3):
        resumed.step(X, OBSERVED)
    for which in ("model", "average"):
        expected, found = straight.state_dict()[which], resumed.state_dict()[which]
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_it_trains_in_ddp_without_a_special_flag(tmp_path):
    """DDP raises in the next step where a parameter had no part in the last; in the first nothing can be hidden."""
    alone = [torch.zeros_like(o) if j else torch.ones_like(o) for j, o in enumerate(OBSERVED)]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        plain, wrapped = Training(adversarial_model(), OptimiserSettings(), 2), Training(adversarial_model(), OptimiserSettings(), 2, DDP)
        for training in (plain, wrapped):
            training.step(X, alone)
            training.step(X, OBSERVED)
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), wrapped.model.parameters(), strict=True))


def test_the_state_is_the_whole_model():
    model = adversarial_model().eval()
    config = ModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(model.config))))
    again = MultiModalVAE.from_state(config, model.state_dict())
    first, second = (m.generate(20, torch.Generator().manual_seed(0)) for m in (model, again))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_draws_have_the_conditional_mean_and_covariance():
    """One member: the five of `test_linear_gaussian` are nearer."""
    truth = LinearGaussian.make()
    x = truth.values(400, 4)
    model = fit_linear_gaussian(truth.values(3000, 1), decoder="adversarial", members=1)
    for target, given in ((0, [1, 2]), (2, [0, 1])):
        record = [(t, int(j in given)) for j, t in enumerate(x)]
        drawn = model.impute(record, draws=200, generator=torch.Generator().manual_seed(0))[target].numpy()
        found = np.mean([np.cov(drawn[:, i].T) for i in range(drawn.shape[1])], 0)
        mean, expected = truth.conditional(target, given, x)
        scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
        assert np.abs((found - expected) / scale).max() < 0.15
        assert np.abs(drawn.mean(0) - mean).mean() / np.sqrt(np.diag(expected)).mean() < 0.15
