"""The additive expert in the model: what its columns say."""

import pytest
import torch
from cohorts import CONFIG, linked, masks, mixed_model, mixed_values

from mmimpute.model import ModalityConfig, ModelConfig, MultiModalVAE
from mmimpute.model.additive import WIDEST
from mmimpute.model.gaussian import kept_components
from mmimpute.model.imputer import Imputer
from mmimpute.model.networks import CLIP
from mmimpute.model.standardise import FeatureStatistics
from mmimpute.stacking import Assembly, fit_additive, fit_gaussian


@pytest.fixture(scope="module")
def fitted():
    torch.set_num_threads(1)
    x = linked(mixed_values(200))
    data = Assembly(mixed_model(members=2), x, masks(x, share=0.9), torch.arange(200) % 2)
    fit_gaussian(data)
    fit_additive(data)
    return data.imputer, linked(mixed_values(30, seed=7), seed=7)


def said(model: Imputer, x, observed, j: int) -> torch.Tensor:
    with torch.no_grad():
        return model.additive(j, *model.linear(model.vae.inputs(x, observed))[1:])


@pytest.mark.parametrize("j", range(3))
def test_a_modality_is_not_read_to_predict_itself(fitted, j):
    """Whatever its own values are, and whether they are there or not; the other modalities' count."""
    model, x = fitted
    complete = [torch.ones_like(v, dtype=torch.bool) for v in x]
    hidden = [o if i != j else ~o for i, o in enumerate(complete)]
    gaps = [o if i != j else torch.rand(o.shape) < 0.5 for i, o in enumerate(complete)]
    other = [v if i != j else v.flip(0) for i, v in enumerate(x)]
    expected = said(model, x, complete, j)
    for values, observed in ((other, complete), (x, hidden), (x, gaps)):
        assert torch.equal(said(model, values, observed, j), expected)
    rest = [v if i == j else v.flip(0) for i, v in enumerate(x)]
    mixed = getattr(model, f"mixed_{j}")
    assert ((said(model, rest, complete, j) - expected).abs().amax((0, 1)) > 1e-3)[mixed].all()
    assert not expected[..., ~mixed].any()


def test_missing_inputs_are_the_gaussians_conditional_means(fitted):
    """A modality's columns are those of the values that the Gaussian expert put in, with a flag that tells so."""
    model, x = fitted
    observed = [torch.ones_like(v, dtype=torch.bool) for v in x]
    observed[1] = ~observed[1]
    filled, columns, _ = model.linear(model.vae.inputs(x, observed))
    block = columns[..., model.additive.own(1)]
    part = filled.split(model.gaussian.sizes, -1)[1]
    assert (block[..., -1] == -0.5).all()
    for e in range(2):
        values = [v if j != 1 else model.vae.standardise[1].inverse(part[e]) for j, v in enumerate(x)]
        complete = [torch.ones_like(v, dtype=torch.bool) for v in x]
        expected = model.linear(model.vae.inputs(values, complete))[1][e][..., model.additive.own(1)]
        torch.testing.assert_close(block[e][..., :-1], expected[..., :-1], rtol=1e-3, atol=1e-3)
        assert (expected[..., -1] == 0.5).all()


def test_a_wide_modality_is_read_by_its_components():
    config = ModelConfig(
        (ModalityConfig("n", ("real",) * 2), ModalityConfig("w", ("real",) * (WIDEST + 1))), shared=8, hidden=16, decoder=16
    )
    vae = MultiModalVAE(config, {m.name: FeatureStatistics.blank(m.width) for m in config.modalities})
    kept = kept_components(config, 400, [False, False])
    model = Imputer(vae, kept).eval()
    w = 0.1 * torch.randn(50, 20) @ torch.randn(20, WIDEST + 1)
    component = model.gaussian.components[1]
    component.fit(0, w)
    observed = [torch.ones(50, 2, dtype=torch.bool), torch.ones(50, WIDEST + 1, dtype=torch.bool)]
    _, columns, values = model.linear(vae.inputs([torch.randn(50, 2), w], observed))
    block = columns[0][:, model.additive.own(1)]
    assert block.shape == (50, kept[1] + 1)
    torch.testing.assert_close(block[:, :-1] @ component.basis_EDQ[0].T + component.mean_E1D[0], w, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(values[0], w.clamp(-CLIP, CLIP))


def test_a_clipped_input_says_no_more():
    """Values beyond CLIP standard deviations are read as if they were there, as the encoders do."""
    model, x = mixed_model(), mixed_values(20)
    imputer = Imputer(model, [0] * len(CONFIG.modalities)).eval()
    observed = [torch.ones_like(v, dtype=torch.bool) for v in x]
    columns = []
    for far in (1e3, 1e5):
        x[1][:, 2] = far
        columns.append(imputer.linear(model.inputs(x, observed))[1])
    assert torch.equal(*columns)
