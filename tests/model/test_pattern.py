"""`pattern = False`: the model cannot tell a missing value from an observed one that looks like it.

What a missing value looks like is the standardised 0 to the VAE, and its conditional mean to the linear experts. With a Gaussian
expert of uncorrelated features that is 0 as well. So one record lacks values, its twin holds the training mean in their places, and
every weight is random.
"""

import numpy as np
import pytest
import torch
from cohorts import statistics

from mmimpute.model import Imputer, ModalityConfig, ModelConfig, MultiModalVAE
from mmimpute.model.standardise import FeatureStatistics

ROWS, TARGET = 20, 2
MODALITIES = (ModalityConfig("a", ("real",) * 3), ModalityConfig("b", ("real",) * 4), ModalityConfig("c", ("real", "binary")))
LACKING = {"a value": (0, slice(1, 2)), "a modality": (1, slice(None))}


def fitted_statistics() -> dict[str, FeatureStatistics]:
    draw = np.random.default_rng(0)
    columns = {m.name: draw.normal(5, 3, (500, m.width)) for m in MODALITIES}
    columns["c"][:, 1] = columns["c"][:, 1] > 5
    return {m.name: statistics(columns[m.name], m.kinds) for m in MODALITIES}


@pytest.fixture(params=[True, False], ids=["pattern", "no pattern"])
def model(request):
    config = ModelConfig(MODALITIES, members=2, shared=8, hidden=32, decoder=16, pattern=request.param)
    model = Imputer(MultiModalVAE(config, fitted_statistics()), [0] * len(config.modalities)).eval()
    for j, private in enumerate(model.vae.private):
        torch.nn.init.normal_(private.curved.weight, std=0.2)
        getattr(model.additive, f"weight_{j}").normal_(0, 0.1)
    return model


def twins(model, lacking):
    """Values, and the masks of a record that lacks some and of its twin that holds their means; both lack the target."""
    at, features = LACKING[lacking]
    x = [s.mean + s.std * torch.randn(ROWS, m.width) for m, s in zip(MODALITIES, model.vae.standardise, strict=True)]
    x[at][:, features] = model.vae.standardise[at].mean[features]
    twin = [torch.full_like(v, j != TARGET, dtype=torch.bool) for j, v in enumerate(x)]
    record = [o.clone() for o in twin]
    record[at][:, features] = False
    return x, record, twin


@pytest.mark.parametrize("lacking", LACKING)
def test_predictions_tell_a_missing_value_from_the_mean_only_with_the_pattern(model, lacking):
    x, record, twin = twins(model, lacking)
    first, second = (model.predict(x, observed) for observed in (record, twin))
    for a, b in ((first.z0_BL, second.z0_BL), (first.mean[TARGET], second.mean[TARGET]), (first.std[TARGET], second.std[TARGET])):
        if model.config.pattern:
            assert ((a - b).abs().amax(1) > 1e-4).all()
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lacking", LACKING)
def test_each_expert_tells_them_apart_only_with_the_pattern(model, lacking):
    """But for the Gaussian expert, which conditions on values and knows no pattern."""
    x, record, twin = twins(model, lacking)
    first, second = (model.experts(x, observed, TARGET) for observed in (record, twin))
    for name in ("vae", "additive"):
        assert torch.allclose(first[name][0], second[name][0], rtol=1e-5, atol=1e-6) != model.config.pattern
    torch.testing.assert_close(first["gaussian"][0], second["gaussian"][0])


@pytest.mark.parametrize("lacking", LACKING)
def test_draws_with_one_seed_are_the_same_without_the_pattern(model, lacking):
    """Of the VAE: the stack draws more random numbers for a record that lacks more."""
    x, record, twin = twins(model, lacking)
    drawn = [
        model.vae.impute([(v.masked_fill(~o, torch.nan), 1) for v, o in zip(x, observed, strict=True)], 4, torch.Generator().manual_seed(0))
        for observed in (record, twin)
    ]
    assert torch.allclose(drawn[0][TARGET], drawn[1][TARGET], rtol=1e-4, atol=1e-5) != model.config.pattern


def test_nothing_observed_is_still_the_prior(model):
    x, _, twin = twins(model, "a value")
    q0 = model.vae.inference(model.vae.inputs(x, [o & False for o in twin]).codes, torch.zeros(ROWS, 3, dtype=torch.bool))
    assert (q0.mean == 0).all() and (q0.var == 1).all()
