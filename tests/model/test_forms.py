"""Images and signals in the model: shapes, masks, and a cohort whose images are known from one another."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from mmimpute.model import Imputer, ModalityConfig, ModelConfig
from mmimpute.model.forms import ConvCode, ConvDecoder, fold, sides, unfold
from tests.model.cohorts import FORMS, everything, fit_forms, forms_model, masks, read_stamp, stamped

BRIGHT, DARK, WAVE, CLINIC = range(4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 28, 28), (2, 1, 17), (4, 9, 30), (1000, 12), (1, 1), (7, 3)])
def test_networks_fit_any_shape(shape):
    form = "image" if len(shape) == 3 else "signal"
    config = ModalityConfig("x", ("real",) * int(np.prod(shape)), form=form, shape=shape)
    assert max(sides(config)[-1]) <= 8 and sides(config)[0] == (shape[1:] if form == "image" else shape[:1])
    x = torch.randn(5, config.width)
    assert torch.equal(fold(config, unfold(config, x)), x)
    seen = torch.ones_like(x, dtype=torch.bool)
    code = ConvCode(config, True)
    assert code(x, x, seen, torch.zeros(config.width, 9)).shape == (5, code.width)
    raw = ConvDecoder(config, 6)(torch.randn(1, 5, 6))
    assert raw.shape == (1, 5, 2 * config.width) and not raw.any()  # the training marginal


def test_values_lie_row_by_row():
    image = ModalityConfig("x", ("real",) * 12, form="image", shape=(2, 2, 3))
    assert unfold(image, torch.arange(12.0)[None])[0, 1].tolist() == [[6, 7, 8], [9, 10, 11]]
    signal = ModalityConfig("x", ("real",) * 6, form="signal", shape=(3, 2))
    assert unfold(signal, torch.arange(6.0)[None])[0].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_mistakes_are_told():
    for form, shape in (("image", (2, 2)), ("signal", (3, 2, 2)), ("vector", (4,)), ("image", (1, 2, 3))):
        with pytest.raises(ValueError, match="is not that of a"):
            ModalityConfig("x", ("real",) * 4, form=form, shape=shape)
    with pytest.raises(ValueError, match="unknown form 'film'"):
        ModalityConfig("x", ("real",), form="film")
    with pytest.raises(ValueError, match="expected 1 with images, signals or texts"):
        ModelConfig(FORMS, members=5)


def restless(decoder: str = "likelihood"):
    """Records and a model whose decoders say something."""
    x, _, _ = stamped(12, 0)
    model = forms_model(x, decoder)
    with torch.no_grad():
        for private in model.private[:CLINIC]:
            private.decoder.layers[-1].weight.normal_(0, 0.3)
        model.private[CLINIC].curved.weight.normal_(0, 0.3)
    return x, model


@pytest.mark.parametrize("decoder", ["likelihood", "adversarial"])
def test_what_is_not_observed_changes_neither_loss_nor_gradient(decoder):
    x, model = restless(decoder)
    observed = masks(x)
    found = []
    for unseen in (0.0, 1e3, torch.nan):
        model.zero_grad()
        filled = [torch.where(o, v, torch.tensor(unseen)) for v, o in zip(x, observed, strict=True)]
        model.train()
        torch.manual_seed(3)
        model(filled, observed).objective.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(g.isfinite().all() for g in found[0]) and sum(g.abs().sum() for g in found[0]) > 0
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_pixel_that_is_seen_is_read():
    """The other way round: what is observed moves the belief about the other image."""
    x, model = restless()
    observed = everything(x)
    observed[DARK] = torch.zeros_like(observed[DARK])
    before = model.predict(x, observed).mean[DARK]
    x[BRIGHT][:, 0] += 100
    assert not torch.allclose(before, model.predict(x, observed).mean[DARK])


def test_observed_images_are_kept_and_drawn_ones_are_images():
    x, model = restless()
    imputer = Imputer(model, [0] * 4).eval()
    observed = masks(x)
    record = [(torch.where(o, v, torch.nan), 1) for v, o in zip(x, observed, strict=True)]
    drawn = imputer.impute(record, 3, torch.Generator().manual_seed(0))
    for j, (d, v, o) in enumerate(zip(drawn, x, observed, strict=True)):
        assert all(torch.equal(one[o], v[o]) for one in d)
        if j in (BRIGHT, DARK):
            assert torch.equal(d, d.byte().float()) and len(d[:, ~o].unique()) > 20
    made = imputer.generate(4, torch.Generator().manual_seed(0))
    assert torch.equal(made[BRIGHT], made[BRIGHT].byte().float())
    said = imputer.predict(x, observed, 0.9)
    assert all(said.lower[j][~observed[j]].isnan().all() and (said.std[j] > 0).equal(~observed[j]) for j in (BRIGHT, DARK, WAVE))
    assert not said.lower[CLINIC].isnan().any()
    assert said.mean[BRIGHT].min() >= 0 and said.mean[BRIGHT].max() <= 255


def test_a_record_does_not_depend_on_its_neighbours():
    x, model = restless()
    imputer, observed = Imputer(model, [0] * 4).eval(), masks(x)
    whole = imputer.predict(x, observed)
    alone = imputer.predict([v[3:4] for v in x], [o[3:4] for o in observed])
    for a, b in zip(whole.mean + whole.std, alone.mean + alone.std, strict=True):
        torch.testing.assert_close(a[3:4], b, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def fitted():
    torch.set_num_threads(1)
    return fit_forms()


def without(x, j):
    return [torch.full_like(v, k != j, dtype=torch.bool) for k, v in enumerate(x)]


@pytest.mark.parametrize(("j", "bright"), [(BRIGHT, True), (DARK, False)])
def test_an_image_is_imputed_from_the_other(fitted, j, bright):
    x, kind, place = stamped(300, 1)
    said = fitted.predict(x, without(x, j))
    squares = lambda guess: (guess - x[j]).square().mean().item()  # noqa: E731
    assert squares(said.mean[j]) < 0.35 * squares(x[j].mean(0))
    drawn = fitted.impute([(v, k != j) for k, v in enumerate(x)], generator=torch.Generator().manual_seed(0))[j]
    found, where = read_stamp(drawn, bright)
    assert (found == kind).mean() > 0.85 and (where == place).all(1).mean() > 0.8
    inside = ((said.mean[j] - x[j]).abs() < 1.645 * said.std[j]).float().mean()
    assert 0.8 < inside < 0.99


def test_a_signal_and_a_vector_are_imputed_from_each_other(fitted):
    x, _, _ = stamped(300, 1)
    for j in (WAVE, CLINIC):
        guess = fitted.predict(x, without(x, j)).mean[j]
        assert (guess - x[j]).square().sum() < 0.25 * (x[j] - x[j].mean(0)).square().sum()


def test_the_file_gives_the_same_model(fitted):
    config = ModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(fitted.config))))
    assert config == fitted.config
    again = Imputer.from_state(config, fitted.state_dict())
    x, _, _ = stamped(20, 2)
    for a, b in zip(fitted.predict(x, masks(x)).mean, again.predict(x, masks(x)).mean, strict=True):
        assert torch.equal(a, b)
