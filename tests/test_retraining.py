"""Retraining: what is fitted, judged, promoted, kept and rolled back; on a real Ray, with models that were fitted before."""

import json

import numpy as np
import pytest
import torch

from mmimpute import jobs, planning, population, registry, retraining
from mmimpute.cluster import fit as training
from mmimpute.cluster import runtime
from mmimpute.data import storage
from mmimpute.data.shards import publish_table
from mmimpute.data.split import fold
from mmimpute.data.tensors import to_model
from mmimpute.errors import UserError
from mmimpute.model import ModelConfig
from mmimpute.spec import ClusterSettings, FitSettings, GateSettings, RunConfig
from mmimpute.training import OptimiserSettings, Training, summarise
from tests import fitting
from tests.fitting import FEW, SPEC

CLUSTER = ClusterSettings(cpus=2)
FIT, GATE = FitSettings(epochs=1), GateSettings(resamples=200, calibration_tolerance=0.1)


@pytest.fixture(scope="module")
def cohort(two_models):
    return two_models[0]


@pytest.fixture(scope="module")
def new(two_models):
    return two_models[2]


@pytest.fixture
def places(two_models, tmp_path):
    """(found before, found now, home): the survey of one shard and that of both, and a home with a model for each."""
    cohort, *models = two_models
    publish_table(str(tmp_path / "shards"), "a.parquet", cohort.slice(0, FEW))
    before = planning.survey(str(tmp_path / "shards"), SPEC)
    publish_table(str(tmp_path / "shards"), "b.parquet", cohort.slice(FEW))
    now, home = planning.survey(str(tmp_path / "shards"), SPEC), str(tmp_path / "home")
    for model, found in zip(models, (before, now), strict=True):
        name = registry.save(home, model.module, model.schema, jobs.fingerprint(found, FIT))
        for record in ("profile", "marginals", "history", "set_aside", "fitted"):
            registry.write_record(storage.join(home, name), record, registry.read_record(model.url, record))
    return before, now, home


@pytest.mark.services
def test_the_life_of_a_champion(places, cohort, monkeypatch):
    before, now, home = places
    with runtime.cluster(CLUSTER):
        first = retraining.renew(before, SPEC, home, FIT, GATE, CLUSTER)
        assert not first["trained"] and first["reason"] == "promoted: the first model"
        assert retraining.renew(before, SPEC, home, FIT, GATE, CLUSTER)["reason"] == retraining.STANDS

        strict = GATE.model_copy(update={"tolerance": 0.0, "calibration_tolerance": 0.0, "likelihood_tolerance": 0.0, "confidence": 0.999})
        better = retraining.renew(now, SPEC, home, FIT, GATE, CLUSTER)
        assert better["reason"].startswith("promoted: better by"), better["reason"]
        assert registry.champion(home) == better["digest"] != first["digest"]
        decision = registry.read_record(better["model"], "gate")
        assert decision["champion"] == first["digest"] and set(decision["outcomes"]) == {"outcome__died"}
        assert retraining.renew(now, SPEC, home, FIT, GATE, CLUSTER)["reason"] == retraining.STANDS

        assert registry.rollback(home) == first["digest"]
        for gate in (GATE, strict):
            kept = retraining.renew(now, SPEC, home, FIT, gate, CLUSTER)
            assert kept["digest"] == first["digest"] and kept["reason"].startswith("kept: it was rolled back")
        with monkeypatch.context() as patch:  # neither fitted nor judged again
            patch.setattr(retraining, "fit_model", None)
            assert retraining.renew(now, SPEC, home, FIT, strict, CLUSTER)["reason"] == retraining.STANDS
        back = retraining.renew(before, SPEC, home, FIT, GATE, CLUSTER)
        assert back["reason"] == retraining.STANDS and back["digest"] == first["digest"]

        by_hand = retraining.renew(now, SPEC, home, FIT, None, CLUSTER)
        assert by_hand["digest"] == better["digest"] == registry.champion(home) and "without a comparison" in by_hand["reason"]

        # The older data again: what was fitted to them is judged, and kept.
        worse = retraining.renew(before, SPEC, home, FIT, GATE, CLUSTER)
        assert worse["digest"] == better["digest"] and worse["reason"].startswith("kept: ") and "is worse by" in worse["reason"]
        assert {m.role for m in registry.listed(home)} == {"champion", "former champion"}
    page = population.model_card(better["model"])
    assert "## By sex" in page and "## By age" in page and "| data window | 2020-0" in page and "## Downstream" in page
    record = json.dumps(registry.read_record(better["model"], "card"))
    assert not any(s in page + record for s in cohort["subject_id"].to_pylist())


def test_a_run_that_does_not_retrain_imputes_with_the_champion_as_it_is(places, tmp_path):
    before, now, home = places
    old = registry.fitted_on(home, jobs.fingerprint(before, FIT))
    registry.promote(home, old)
    config = RunConfig(spec=SPEC, shards=now.url, model=home, output=str(tmp_path / "out"), fit=FIT, retrain=False)
    planned = population.plan(config)
    fitted = population.fit(config, planned["plan"])
    assert (fitted["digest"], fitted["trained"], fitted["reason"]) == (old, False, retraining.STANDS)


def test_a_champion_that_came_in_between_is_not_overwritten(places):
    before, now, home = places
    old, new = (registry.fitted_on(home, jobs.fingerprint(found, FIT)) for found in (before, now))
    registry.promote(home, old)
    with pytest.raises(UserError, match="the champion changed"):
        retraining.settle(home, {"digest": new}, {"promoted": True, "reason": "promoted", "champion": "f" * 32})
    assert registry.champion(home) == old
    settled = retraining.settle(home, {"digest": new}, {"promoted": False, "reason": "kept: so", "champion": "f" * 32})
    assert settled["digest"] == registry.champion(home) == old and settled["reason"] == "kept: so" and not settled["promoted"]
    decision = {"promoted": True, "reason": "promoted: so", "champion": old}
    tries = [retraining.settle(home, {"digest": new}, decision) for _ in range(2)]
    assert [t["promoted"] for t in tries] == [True, False] and tries[1]["reason"] == retraining.STANDS
    assert registry.alias(home).former == (old,)


def prepared(model: registry.Model, start: str | None, monkeypatch) -> Training:
    """A training rank as `train_loop` makes it, without a cluster; on standardisation statistics of its own."""
    monkeypatch.setattr(training, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(training, "prepare_model", lambda m, move_to_device: m)
    statistics = {
        m.name: {n: getattr(s, n).numpy() + (0.01 if n == "mean" else 0) for n in ("mean", "std", "log", "unit", "knots")}
        for m, s in zip(model.schema.modalities, model.module.vae.standardise, strict=True)
    }
    plan = {"batch": 64, "epochs": 1, "steps_per_epoch": 2}
    loop = {"settings": {"seed": 3}, "statistics": statistics, "config": model.file.config, "plan": plan, "start": start}
    loop["contrast"] = None
    return training._prepare(loop, 0)[0]


def test_a_warm_start_is_the_champions_weights_and_the_new_datas_statistics(new, cohort, monkeypatch):
    warm, cold = prepared(new, new.url, monkeypatch), prepared(new, None, monkeypatch)
    for (name, found), (_, given) in zip(warm.model.named_parameters(), new.module.vae.named_parameters(), strict=True):
        assert torch.equal(found, given), name  # member for member, so member e has not seen fold e
    assert torch.equal(warm.model.standardise[0].mean, cold.model.standardise[0].mean)
    assert not torch.equal(warm.model.standardise[0].mean, new.module.vae.standardise[0].mean)
    x, place = fitting.records(cohort, new.schema)
    batch = (*to_model(x, new.widths), torch.from_numpy(fold(place, 5)))
    first, scratch = (summarise(t.tune([batch]))["loss"] for t in (warm, cold))
    assert first < scratch - 0.1


def test_a_warm_start_needs_the_same_sizes_and_kinds(places, new):
    _, now, home = places
    name = registry.fitted_on(home, jobs.fingerprint(now, FIT))
    assert jobs._start(home, new.module.config) is None  # no champion
    registry.promote(home, name)
    assert jobs._start(home, ModelConfig.from_dict(new.file.config)) == storage.join(home, name)
    assert jobs._start(home, ModelConfig(new.module.config.modalities, members=1)) is None


def test_what_is_fitted_with_a_warm_start_is_another_thing(places):
    _, now, _ = places
    assert jobs.fingerprint(now, FIT) != jobs.fingerprint(now, FIT.model_copy(update={"warm_start": True}))


def test_no_member_learns_of_its_fold_after_a_warm_start(new, cohort, monkeypatch):
    """Two trainings from the champion, with other values in fold 0: member 0 moves alike in both, the others do not."""
    x, place = fitting.records(cohort, new.schema)
    folds = torch.from_numpy(fold(place, 5))
    other = np.where(np.isnan(x) | (folds.numpy() != 0)[:, None], x, 1 - x)
    steps = []
    for values in (x, other):
        warm = prepared(new, new.url, monkeypatch)
        warm.settings = OptimiserSettings(clip=1e9)  # the norm that is clipped is that of all members
        warm.step(*to_model(values, new.widths), folds)
        steps.append({name: p.detach().clone() for name, p in warm.model.named_parameters()})
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*(s.values() for s in steps), strict=True))
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(*(s.values() for s in steps), strict=True))
