"""The jobs on a real Ray and a real object store: fit with two workers, resume, impute, evaluate, generate, describe."""

import numpy as np
import obstore
import pyarrow as pa
import pytest
import torch
from deltalake import DeltaTable

from mmimpute import jobs, planning, population, registry, retraining
from mmimpute.cluster import ingest, runtime
from mmimpute.data import storage
from mmimpute.data.shards import fetch_table, publish_table
from mmimpute.data.table import table_state
from mmimpute.drafting import guess_spec
from mmimpute.errors import DataError, UserError
from mmimpute.spec import ClusterSettings, DriftSettings, EvaluateSettings, FitSettings, GateSettings, ImputeSettings, RunConfig, read_spec
from tests.conftest import SPEC, linear_cohort, write_cohort

pytestmark = pytest.mark.services
CLUSTER = ClusterSettings(cpus=4, actors=2)
FIT = FitSettings(epochs=8, batch_size=64, workers=2)


@pytest.fixture(scope="module", autouse=True)
def ray():
    """One local Ray for all tests of this file, started after the store's variables are set, so that workers inherit them."""
    with runtime.cluster(CLUSTER):
        yield


@pytest.fixture(scope="module")
def bucket_url(endpoint):
    from mmimpute import store

    store.create_bucket(endpoint, "jobs")
    return "s3://jobs"


@pytest.fixture(scope="module")
def cohort(endpoint, bucket_url, tmp_path_factory):
    """(shards, spec, model home, what fit returned, epochs seen): a fitted cohort, one of whose shards is bad inside."""
    shards, home = f"{bucket_url}/shards", f"{bucket_url}/model"
    write_cohort(shards, rows=1500, shards=5)
    bad = linear_cohort(40, seed=5, first=9000)
    bad = bad.set_column(bad.column_names.index("dx__stage"), "dx__stage", pa.array([np.inf] * 40))
    publish_table(shards, "x-infinite.parquet", bad)
    spec = tmp_path_factory.mktemp("spec") / "cohort.toml"
    spec.write_text(SPEC)
    epochs = []
    found = planning.survey(shards, read_spec(spec))
    # A driver that dies between training and saving resumes without training again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            jobs.fit_model(found, home, FIT, CLUSTER, epochs.append)
    trained = [e["epoch"] for e in epochs if "epoch" in e]
    assert trained == list(range(1, len(trained) + 1))
    fitted = retraining.renew(found, read_spec(spec), home, FIT, GateSettings(), CLUSTER, epochs.append)
    assert [e["epoch"] for e in epochs if "epoch" in e] == trained, "a finished training run was done again"
    return shards, spec, home, fitted, len(trained)


def dies(*_):
    raise KeyboardInterrupt


def test_fit_leaves_a_champion_and_its_records(cohort):
    _, _, home, fitted, epochs = cohort
    assert fitted["trained"] and registry.champion(home) == fitted["digest"]
    assert list(fitted["set_aside"]) == ["x-infinite.parquet"]
    history = registry.read_record(fitted["model"], "history")
    assert len(history) == epochs
    assert history[-1]["tune_loss"] < history[0]["tune_loss"]
    assert not storage.list_objects(storage.join(home, "_training"))
    assert registry.read_record(fitted["model"], "profile")["rows"] == 1500


def test_a_standing_champion_is_not_fitted_again(cohort):
    shards, spec, home, fitted, _ = cohort
    again = jobs.fit_model(planning.survey(shards, read_spec(spec)), home, FIT.model_copy(update={"workers": 1}), CLUSTER)
    assert not again["trained"] and again["digest"] == fitted["digest"]
    assert list(again["set_aside"]) == ["x-infinite.parquet"]


def test_impute_publishes_good_shards_once_and_commits(cohort, bucket_url):
    shards, _, home, _, _ = cohort
    output = f"{bucket_url}/enriched"
    done = jobs.impute_cohort(home, shards, output, ImputeSettings(), CLUSTER)
    assert done["rows"] == 1500 and list(done["set_aside"]) == ["x-infinite.parquet"]
    assert done["committed"]["added"] == 5 and done["committed"]["counts"]["rows"] == 1500
    enriched = pa.concat_tables(fetch_table(output, k) for k in sorted(table_state(output).keys))
    given = pa.concat_tables(fetch_table(shards, f"part-00{i}.parquet") for i in range(5))
    assert enriched.select(given.column_names).sort_by("subject_id").equals(given.sort_by("subject_id"))
    again = jobs.impute_cohort(home, shards, output, ImputeSettings(), CLUSTER)
    assert again["done_before"] == 5 and again["committed"]["version"] == done["committed"]["version"]
    more = linear_cohort(60, seed=6, first=5000)
    publish_table(shards, "part-005.parquet", more)
    third = jobs.impute_cohort(home, shards, output, ImputeSettings(), CLUSTER)
    assert (third["done_before"], third["rows"], third["committed"]["added"]) == (5, 60, 1)
    seen = DeltaTable(output, storage_options=storage.delta_options(output)).to_pyarrow_dataset().to_table(columns=["subject_id"])
    assert len(seen["subject_id"].unique()) == 1560
    obstore.delete(storage.connect(shards), "part-005.parquet")


def test_evaluation_beats_the_column_mean(cohort):
    shards, spec, _, fitted, _ = cohort
    found = jobs.evaluate_model(planning.survey(shards, read_spec(spec)), fitted["model"], CLUSTER)
    assert found["rows"] == 1500
    for name, modality in found["modalities"].items():
        assert modality["skill"] > 0.1, name
        assert modality["rows"] <= found["rows"] and set(modality["experts"]) == {"vae", "additive", "gaussian"}
    assert found["modalities"]["labs"]["r2"] > 0.3


def test_tasks_are_asked_of_people_with_their_label(cohort):
    shards, spec, _, fitted, _ = cohort
    asked = EvaluateSettings(tasks=("probe", "retrieval"), label="outcome__died")
    found = jobs.evaluate_model(planning.survey(shards, read_spec(spec)), fitted["model"], CLUSTER, asked)
    assert found["settings"] == {"tasks": ["probe", "retrieval"], "label": "outcome__died"}
    low, high = found["tasks"]["probe"][0]["z0"]["auroc"][1:]
    assert low < 0.55 and high > 0.45  # the label is a coin
    assert found["tasks"]["probe"][0]["rows"] == 1500
    assert {e["query"] for e in found["tasks"]["retrieval"]} == {"labs", "rna", "dx"}


def test_retrieval_writes_a_table_and_tells_no_id(cohort, bucket_url, capfd):
    shards, _, home, _, _ = cohort
    done = jobs.retrieve_table(home, shards, "labs", "rna", 5, f"{bucket_url}/found", CLUSTER)
    assert list(done["set_aside"]) == ["x-infinite.parquet"]
    table = fetch_table(*done["table"].rsplit("/", 1))
    assert table.column_names == ["query", "rank", "found", "score"]
    given = pa.concat_tables(fetch_table(shards, f"part-00{i}.parquet") for i in range(5))
    held = {n: set(given.filter(given.column(n).is_valid()).column("subject_id").to_pylist()) for n in ("labs", "rna")}
    assert set(table.column("query").to_pylist()) == held["labs"]
    assert set(table.column("found").to_pylist()) <= held["rna"]
    assert len(table) == 5 * done["queries"] == 5 * len(held["labs"])
    assert done["recall"]["recall"]["10"] > 2 * done["recall"]["chance"]["10"]
    assert "s000" not in "".join(capfd.readouterr())
    for query, among, message in (("labs", "labs", "another modality"), ("labz", "rna", "no modality 'labz'; the model has labs, rna, dx")):
        with pytest.raises(UserError, match=message):
            jobs.retrieve_table(home, shards, query, among, 5, f"{bucket_url}/found", CLUSTER)


def test_drift_of_new_shards(cohort, bucket_url, monkeypatch):
    """Records of the training data are no drift; with another level, and rna that belongs to other people, they are."""
    shards, spec, home, fitted, _ = cohort
    listed = [s for s in planning.survey(shards, read_spec(spec)).shards if s.key == "part-001.parquet"]
    same = jobs.check_drift(shards, listed, fitted["model"], DriftSettings(), CLUSTER)
    assert same["judged"] and not same["drifted"] and same["rows"] == 300, same["reasons"]
    assert all(m["score"]["n"] > 150 for m in same["modalities"].values())
    table, draw = fetch_table(shards, "part-001.parquet"), np.random.default_rng(0)
    table = table.set_column(table.column_names.index("rna"), "rna", table["rna"].take(pa.array(draw.permutation(300))))
    site = ["skin" if s and draw.random() < 0.2 else s for s in table["dx__site"].to_pylist()]
    publish_table(shards, "y-new.parquet", table.set_column(table.column_names.index("dx__site"), "dx__site", pa.array(site)))
    places = {"shards": shards, "model": home, "output": f"{bucket_url}/enriched"}
    config = RunConfig(spec=read_spec(spec), cluster=CLUSTER, **places)
    planned = population.plan(config)["plan"]
    found = population.drift(config, planned, fitted["model"])
    obstore.delete(storage.connect(shards), "y-new.parquet")
    assert found["drifted"] and found["shards"] == 2 and list(found["set_aside"]) == ["x-infinite.parquet"]
    assert any("rna is predicted worse" in r for r in found["reasons"])
    assert any(r.startswith("dx: site: ") and "no level or code seen" in r for r in found["reasons"])
    monkeypatch.setattr(jobs, "check_drift", dies)
    assert population.drift(config, planned, fitted["model"]) == found, "a stage that is done was done again"
    nothing = config.model_copy(update={"output": f"{bucket_url}/elsewhere"})
    with pytest.raises(KeyboardInterrupt):  # nothing is committed there: every shard is new
        publish_table(f"{nothing.output}/_runs", planned, fetch_table(f"{config.output}/_runs", planned))
        population.drift(nothing, planned, fitted["model"])


def test_generate_writes_marked_records_of_the_cohorts_types(cohort, bucket_url):
    shards, _, home, _, _ = cohort
    done = jobs.generate_cohort(home, f"{bucket_url}/synthetic", 700, 3, CLUSTER)
    assert done == {"shards": 1, "rows": 700}
    made = fetch_table(f"{bucket_url}/synthetic", "synthetic-3-00000.parquet")
    given = fetch_table(shards, "part-000.parquet")
    assert all(s.startswith("synthetic-3-") for s in made["subject_id"].to_pylist())
    assert made.schema.metadata[b"mmimpute.synthetic"] == b"true"
    for column in ("dx__code", "dx__stage", "dx__site"):
        assert made[column].type == given[column].type and made[column].null_count == 0
        assert set(made[column].unique().to_pylist()) <= set(given[column].drop_null().unique().to_pylist())
    assert set(map(len, made["rna"].to_pylist())) == {6}
    jobs.generate_cohort(home, f"{bucket_url}/again", 700, 3, CLUSTER)
    assert fetch_table(f"{bucket_url}/again", "synthetic-3-00000.parquet").equals(made)


def test_records_that_do_not_fit_into_memory_are_streamed_to_any_decoder(tmp_path, spec_file):
    text = SPEC.replace('column = "labs"', 'column = "labs"\ndecoder = "diffusion"')
    spec_file.write_text(text.replace('column = "rna"', 'column = "rna"\ndecoder = "adversarial"'))
    write_cohort(str(tmp_path / "shards"), rows=300, shards=2, seed=4)
    found = planning.survey(str(tmp_path / "shards"), read_spec(spec_file))
    settings = FitSettings(epochs=2, batch_size=32, workers=1, cache_share=0.0)
    fitted = jobs.fit_model(found, str(tmp_path / "model"), settings, CLUSTER)
    assert len(registry.read_record(fitted["model"], "history")) == 2
    model = registry.load(fitted["model"])
    assert [m.decoder for m in model.file.cohort.modalities] == ["diffusion", "adversarial", "likelihood"]
    assert all(torch.isfinite(t).all() for t in model.module.generate(50, torch.Generator().manual_seed(0)))


def test_shards_that_spell_their_types_differently_are_read_together(tmp_path, spec_file, small_cohort):
    plain, other = linear_cohort(200), linear_cohort(200, seed=2, first=5000)
    spelt = {
        "subject_id": other["subject_id"].cast(pa.large_string()),
        "labs": other["labs"].combine_chunks().cast(pa.list_(pa.float64())),
        "dx__stage": other["dx__stage"].cast(pa.int32()),
        "dx__site": other["dx__site"].dictionary_encode(),
    }
    for column, values in spelt.items():
        other = other.set_column(other.column_names.index(column), column, values)
    publish_table(str(tmp_path), "a.parquet", plain)
    publish_table(str(tmp_path), "b.parquet", other)
    found = planning.survey(str(tmp_path), read_spec(spec_file))
    layouts = planning.by_layout(found.url, found.shards, found.schema.columns)
    assert [len(group) for group in layouts] == [1, 1]
    schema = registry.describe(small_cohort[2]).cohort
    batches = list(ingest.records(found.url, layouts, schema).iter_batches(batch_format="numpy", batch_size=None))
    x, place = (np.concatenate([b[name] for b in batches]) for name in ("x", "place"))
    assert x.shape == (400, 13) and len(np.unique(place)) == 400
    few = ingest.judges(found.url, found.shards, schema, lambda p: p < np.median(place), 150, ["dx__site", "dx__none"])
    order = np.argsort(place)[:150]
    assert np.array_equal(few.place, place[order]) and np.array_equal(few.x, x[order], equal_nan=True)
    assert set(few.beside["dx__site"]) == {"", "colon", "lung"} and set(few.beside["dx__none"]) == {""}


def test_describe_drafts_a_spec_that_works(cohort, tmp_path):
    shards, *_ = cohort
    found = jobs.describe_cohort(shards, CLUSTER)
    (tmp_path / "cohort.toml").write_text(found["spec"])
    spec = read_spec(tmp_path / "cohort.toml")
    assert list(spec.modalities) == ["labs", "rna", "dx"] and spec.outcomes == ("outcome__*",)
    assert spec.modalities["dx"].kinds == ("binary", "ordinal", "categorical")
    assert list(found["set_aside"]) == ["x-infinite.parquet"]
    assert found["profile"]["rows"] == 1500


def test_describe_suggests_subgroups():
    names = ("subject_id", "demo__sex", "demo__Age", "demo__race_3.0", "meds__age_spots", "ethnicity", "demo__stage")
    arrow = pa.schema([(n, pa.float32()) for n in names] + [("age__race", pa.list_(pa.float32()))])
    assert guess_spec(arrow).subgroups == ("demo__sex", "demo__Age", "demo__race_3.0", "ethnicity")


def test_describe_leaves_free_text_out(tmp_path):
    texts = pa.array([f"seen by doctor {i}" for i in range(80)])
    publish_table(str(tmp_path), "a.parquet", linear_cohort(80).append_column("dx__note", texts))
    found = jobs.describe_cohort(str(tmp_path), CLUSTER)
    assert "# Columns left out" in found["spec"] and "'dx__note'" in found["spec"]
    assert "seen by" not in str(found)


def test_no_good_shard(tmp_path, spec_file):
    bad = linear_cohort(40)
    publish_table(str(tmp_path), "a.parquet", bad.set_column(0, "subject_id", pa.array(["same"] * 40)))
    found = planning.survey(str(tmp_path), read_spec(spec_file))
    with pytest.raises(DataError, match="39 repeated subject ids"):
        jobs.fit_model(found, str(tmp_path / "model"), FIT, CLUSTER)


def test_too_few_records(tmp_path, spec_file):
    write_cohort(str(tmp_path), rows=30, shards=1)
    with pytest.raises(UserError, match="a model needs 60"):
        jobs.fit_model(planning.survey(str(tmp_path), read_spec(spec_file)), str(tmp_path / "model"), FIT, CLUSTER)
