"""Images and signals through the whole product: fitted, measured, imputed, verified, generated."""

import numpy as np
import pyarrow as pa
import pytest

from mmimpute import denoising, evaluation, gate, jobs, planning, registry
from mmimpute.cluster import runtime
from mmimpute.data.completing import complete
from mmimpute.data.profile import observe
from mmimpute.data.reference import reference
from mmimpute.data.shards import fetch_table, list_shards, publish_table
from mmimpute.data.split import fold
from mmimpute.data.table import table_state
from mmimpute.drift import compare
from mmimpute.generating import generate_shard
from mmimpute.imputing import impute_shard
from mmimpute.scoring import score_drop, summarise
from mmimpute.spec import ClusterSettings, DriftSettings, FitSettings, GateSettings, ImputeSettings
from tests import digits, fitting

IMAGE, WAVE = pa.fixed_shape_tensor(pa.uint8(), (1, 8, 8)), pa.fixed_shape_tensor(pa.float32(), (32, 1))
STRUCTURED = ("scan", "copy", "tone")
ALL = {*STRUCTURED, "labs", "note"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fitting.fit(str(tmp_path_factory.mktemp("home")), digits.cohort(400), digits.SPEC, epochs=2)


def check(out: pa.Table, table: pa.Table, draws: int) -> None:
    """The output contract of the digits' cohort."""
    assert out.select(table.column_names).equals(table)
    assert out["scan__draws"].type == pa.list_(IMAGE) and out["copy__draws"].type.value_type == pa.list_(pa.uint8(), 64)
    assert out["tone__draws"].type == pa.list_(WAVE) and out["tone__imputed"].type == out["tone__std"].type == WAVE
    assert out["scan__imputed"].type == out["scan__std"].type == pa.fixed_shape_tensor(pa.float32(), (1, 8, 8))
    for name in STRUCTURED:
        missing = np.array([v is None for v in out[name].to_pylist()])
        for suffix in ("__imputed", "__std", "__draws"):
            assert np.array_equal(missing, [v is not None for v in out[name + suffix].to_pylist()])
        mean, std = (np.array(out[name + s].drop_null().to_pylist()) for s in ("__imputed", "__std"))
        assert np.isfinite(mean).all() and (std > 0).all() and (name == "tone" or (mean.min() >= 0 and mean.max() <= 255))
        drawn = np.array(out[name + "__draws"].drop_null().to_pylist())
        assert drawn.shape == (missing.sum(), draws, 32 if name == "tone" else 64) and (drawn[:, 0] != drawn[:, 1]).any(1).all()
    assert out["note__imputed"].type == pa.string() and out["note__draws"].type == pa.list_(pa.string())
    for text, told, std, bags in zip(*(out["note" + s].to_pylist() for s in ("", "__imputed", "__std", "__draws")), strict=True):
        if text is not None:
            assert told is std is bags is None
            continue
        words = [told, *bags]
        assert (
            0 < std < 1
            and len(bags) == draws
            and all({*w.split()} <= {*digits.NAMES, *map(str.lower, digits.FILLERS), "case"} for w in words)
        )
        assert len(told.split()) == len({*told.split()}) == 8


def test_the_output_contract(model, tmp_path):
    table = digits.cohort(80, seed=2)
    publish_table(str(tmp_path / "shards"), "part.parquet", table)
    (shard,) = list_shards(str(tmp_path / "shards"))
    done = impute_shard(model, str(tmp_path / "shards"), shard, str(tmp_path / "out"), ImputeSettings(draws=2, interval=0.9, latent=True))
    out = fetch_table(str(tmp_path / "out"), done["output"])
    check(out, table, 2)
    assert not [c for c in out.column_names if c.endswith(("__lower", "__upper")) and not c.startswith("labs__")]
    assert out["labs__b0__lower"].null_count == out["labs__b0__imputed"].null_count

    for draw in (None, 1):
        whole = complete(out, draw)
        assert not any(whole[name].null_count for name in (*STRUCTURED, "note"))
        assert whole["scan"].type == (IMAGE if draw else out["scan__imputed"].type) and whole["tone"].type == WAVE
        kept, own = (
            whole["scan"].to_pylist(),
            zip(table["scan"].to_pylist(), out["scan__imputed" if draw is None else "scan__draws"].to_pylist(), strict=True),
        )
        assert kept == [told if v is None and draw is None else told[draw] if v is None else v for v, told in own]


def test_the_output_contract_of_other_decoders(tmp_path, monkeypatch):
    """Few steps: diffusion of an image, a signal and a text, discriminators of the other image and the vector."""
    monkeypatch.setattr(denoising, "MOST_STEPS", 20)
    decoders = {"scan": "diffusion", "copy": "adversarial", "tone": "diffusion", "labs": "adversarial", "note": "diffusion"}
    modalities = {name: m.model_copy(update={"decoder": decoders[name]}) for name, m in digits.SPEC.modalities.items()}
    other = fitting.fit(str(tmp_path / "home"), digits.cohort(200), digits.SPEC.model_copy(update={"modalities": modalities}), epochs=1)
    table = digits.cohort(40, seed=2)
    publish_table(str(tmp_path / "shards"), "part.parquet", table)
    (shard,) = list_shards(str(tmp_path / "shards"))
    done = impute_shard(other, str(tmp_path / "shards"), shard, str(tmp_path / "out"), ImputeSettings(draws=2))
    check(fetch_table(str(tmp_path / "out"), done["output"]), table, 2)


def test_generated_images_are_tensors(model, tmp_path):
    made = fetch_table(str(tmp_path), generate_shard(model, str(tmp_path), 0, 30, seed=1)["output"])
    assert made["scan"].type == made["copy"].type == IMAGE and made["tone"].type == WAVE
    assert not made["note"].null_count and 0 < len(made["note"][0].as_py().split()) <= 8
    assert made["scan"].combine_chunks().to_numpy_ndarray().shape == (30, 1, 8, 8) and not made["scan"].null_count


def asked(model, seed: int):
    table = digits.cohort(300, seed)
    x, place = fitting.records(table, model.schema)
    return table, x, np.zeros(len(place))  # everybody of the fold that judges


def test_a_modality_of_pixels_is_measured_as_a_whole(model):
    _, x, place = asked(model, 3)
    marginals = registry.read_record(model.url, "marginals")
    found = evaluation.evaluate(model, x, fold(place, 1), marginals)["modalities"]
    assert all(not found[n]["features"] and found[n]["interval90"] is None and found[n]["skill"] < 1 for n in STRUCTURED)
    assert found["labs"]["features"] and found["labs"]["interval90"] is not None
    assert found["note"]["skill"] < 1 and found["note"]["r2"] is found["note"]["cover90"] is None
    measured = gate.measure(model, x, place, marginals)
    for name in (*STRUCTURED, "note"):
        lost = np.nanmean(measured[name].loss)
        assert 1 - lost == pytest.approx(found[name]["skill"], abs=0.02) and not measured[name].calibration
    outcome = {"odd": (np.arange(len(x)) % 2).astype(float)}
    decision, _ = gate.compare(model, model, x, place, outcome, GateSettings(resamples=100))
    assert not decision["promoted"] and set(decision["modalities"]) == ALL


def test_drift_looks_at_images_as_a_whole(model):
    table = asked(model, 4)[0]
    scores = score_drop(model.module, model.schema, observe(table, model.schema, "s", 1.0))
    seen = observe(table, model.schema, "s", 1.0)
    kept = reference(model.schema, seen) | {"score": summarise([m.name for m in model.schema.modalities], scores)}
    same = compare(model.schema, kept, seen, scores, DriftSettings())
    assert not same["drifted"] and same["features_judged"] == 4 and set(same["modalities"]) == ALL
    upside_down = table.set_column(2, "copy", table["scan"].combine_chunks().storage)  # white on black, as never before
    moved = observe(upside_down, model.schema, "s", 1.0)
    found = compare(model.schema, kept, moved, score_drop(model.module, model.schema, moved), DriftSettings())
    assert found["drifted"] and any("is predicted worse" in reason for reason in found["reasons"])


@pytest.mark.services
def test_images_and_signals_end_to_end(tmp_path):
    shards, home, output, made = (str(tmp_path / n) for n in ("shards", "model", "out", "made"))
    table = digits.cohort(400)
    for at in (0, 1):
        publish_table(shards, f"part-{at}.parquet", table.slice(at * 200, 200))
    cluster = ClusterSettings(cpus=2, actors=1)
    with runtime.cluster(cluster):
        assert 'form = "signal"\nshape = [32, 1]' in jobs.describe_cohort(shards, cluster)["spec"]
        fitted = jobs.fit_model(planning.survey(shards, digits.SPEC), home, FitSettings(epochs=2, workers=1), cluster)
        registry.promote(home, fitted["digest"])
        assert set(jobs.evaluate_model(planning.survey(shards, digits.SPEC), home, cluster)["modalities"]) == ALL
        done = jobs.impute_cohort(home, shards, output, ImputeSettings(draws=2), cluster)
        assert jobs.verify_table(home, shards, output, cluster)["problems"] == {}
        assert jobs.generate_cohort(home, made, 20, 0, cluster)["rows"] == 20
    assert done["rows"] == 400 and table_state(output).rows == 400
    enriched = pa.concat_tables([fetch_table(output, o) for o in sorted(table_state(output).keys)])
    check(enriched.sort_by("subject_id"), table, 2)
    (shard,) = list_shards(made)
    assert fetch_table(made, shard.key)["scan"].type == IMAGE
