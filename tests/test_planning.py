"""What a job works on: good shards, bad ones with their reason, and clear words where there is nothing to do."""

import pyarrow as pa
import pytest

from mmimpute import planning, registry
from mmimpute.cluster import ingest
from mmimpute.data import storage
from mmimpute.data.shards import list_shards, publish_table
from mmimpute.drafting import guess_spec
from mmimpute.errors import UserError
from mmimpute.sizing import model_config
from mmimpute.spec import CohortSpec, FitSettings, ModalitySpec, read_spec
from tests.conftest import linear_cohort, write_cohort


def test_bad_footers_are_set_aside_and_good_shards_stay(place, spec_file):
    write_cohort(place, rows=80, shards=4)
    publish_table(place, "x-missing.parquet", linear_cohort(5).drop_columns(["rna"]))
    publish_table(place, "x-empty.parquet", linear_cohort(5).slice(0, 0))
    storage.write(place, "x-broken.parquet", b"no parquet at all")
    found = planning.survey(place, read_spec(spec_file))
    assert [s.key for s in found.shards] == [f"part-00{i}.parquet" for i in range(4)]
    assert found.rows == 80
    assert list(found.set_aside) == ["x-broken.parquet", "x-empty.parquet", "x-missing.parquet"]
    assert "no such column" in found.set_aside["x-missing.parquet"] and "'rna'" in found.set_aside["x-missing.parquet"]
    assert "no records" in found.set_aside["x-empty.parquet"]
    assert "no readable Parquet file" in found.set_aside["x-broken.parquet"]
    assert planning.from_table(planning.to_table(found)) == found


def test_of_a_known_cohort_only_new_footers_are_read(tmp_path, spec_file, monkeypatch):
    url, read, footer = str(tmp_path), [], planning.read_footer
    write_cohort(url, rows=80, shards=4)
    schema = planning.survey(url, read_spec(spec_file)).schema
    publish_table(url, "x-missing.parquet", linear_cohort(5).drop_columns(["rna"]))
    publish_table(url, "y-new.parquet", linear_cohort(7))
    monkeypatch.setattr(planning, "read_footer", lambda url, shard: read.append(shard.key) or footer(url, shard))
    shards = list_shards(url)
    found = planning.survey_new(url, shards, shards[4:], 80, schema)
    assert sorted(read) == ["x-missing.parquet", "y-new.parquet"]
    assert found.rows == 87 and list(found.set_aside) == ["x-missing.parquet"]
    assert [s.key for s in found.shards] == [*(f"part-00{i}.parquet" for i in range(4)), "y-new.parquet"]
    assert planning.survey_new(url, shards, [], 80, schema).shards == shards and len(read) == 2
    with pytest.raises(UserError, match="no shard fits the cohort"):
        planning.survey_new(url, shards[4:5], shards[4:5], 0, schema)


def test_a_column_belongs_to_a_prefix_if_most_shards_have_it(tmp_path):
    url, spec = str(tmp_path), CohortSpec(modalities={"s": ModalitySpec(prefix="s__")})
    for number in range(3):
        publish_table(url, f"{number}.parquet", pa.table({"subject_id": [number], "s__a": [1.0], "s__b": [2.0]}))
    publish_table(url, "3.parquet", pa.table({"subject_id": [3], "s__a": [1.0]}))
    publish_table(url, "4.parquet", pa.table({"subject_id": [4], "s__a": [1.0], "s__b": [2.0], "s__c": [2.0]}))
    found = planning.survey(url, spec)
    assert found.schema.modalities[0].columns == ("s__a", "s__b")
    assert list(found.set_aside) == ["3.parquet"]


def test_what_the_spec_says_of_a_modality_reaches_the_model(tmp_path):
    publish_table(str(tmp_path), "0.parquet", pa.table({"subject_id": [1], "a__x": [1.0], "b__x": [2.0]}))
    chosen = ModalitySpec(prefix="a__", kinds="real", hide=0.3, tails="gaussian", decoder="diffusion")
    spec = CohortSpec(modalities={"a": chosen, "b": ModalitySpec(prefix="b__", kinds="real")})
    config = model_config(planning.survey(str(tmp_path), spec).schema, 600, FitSettings())
    found = [(m.hide, m.tails, m.decoder) for m in config.modalities]
    assert found == [(0.3, "gaussian", "diffusion"), (0.5, "student", "likelihood")]


def test_the_event_time_is_a_date_in_the_shards(tmp_path):
    when = {"seen_at": pa.array([0], pa.time32("s")), "seen_on": pa.array([0], pa.date32()), "note": ["2024-01-01"]}
    publish_table(str(tmp_path), "0.parquet", pa.table({"subject_id": [1], **when, "a__x": [1.0]}))
    drafted = guess_spec(planning.columns_of(str(tmp_path)))
    assert drafted.timestamp == "seen_on"  # a time of day is no event time
    assert planning.survey(str(tmp_path), drafted).schema.timestamp == "seen_on"
    for column, message in (("born", "'born' is not in the shards"), ("note", "'note' is string; expected dates or timestamps")):
        with pytest.raises(UserError, match=message):
            planning.survey(str(tmp_path), drafted.model_copy(update={"timestamp": column}))


def test_the_fingerprint_follows_data_and_schema(tmp_path, spec_file):
    url = str(tmp_path / "shards")
    write_cohort(url, rows=40, shards=2)
    spec = read_spec(spec_file)
    before = planning.survey(url, spec).fingerprint
    assert planning.survey(url, spec).fingerprint == before
    without = spec.model_copy(update={"modalities": {k: v for k, v in spec.modalities.items() if k != "dx"}})
    assert planning.survey(url, without).fingerprint != before
    publish_table(url, "part-001.parquet", linear_cohort(20, seed=9))
    assert planning.survey(url, spec).fingerprint != before


def test_nothing_to_work_on(tmp_path, spec_file):
    url, spec = str(tmp_path / "shards"), read_spec(spec_file)
    storage.write(url, "note.txt", b"hello")
    with pytest.raises(UserError, match="no shard"):
        planning.survey(url, spec)
    storage.write(url, "a.parquet", b"broken")
    with pytest.raises(UserError, match=r"no readable shard: shard a\.parquet"):
        planning.survey(url, spec)
    publish_table(url, "a.parquet", pa.table({"subject_id": [1], "labs": [[1.0]]}))
    with pytest.raises(UserError, match=r"modalities\.rna needs column 'rna'; the shards have 'subject_id', 'labs'"):
        planning.survey(url, spec)


def test_a_model_that_does_not_fit_the_cohort(small_cohort, tmp_path):
    publish_table(str(tmp_path), "a.parquet", pa.table({"subject_id": ["a"], "labs": [[1.0, 2.0]]}))
    with pytest.raises(UserError, match=r"no shard fits the cohort; the first of 1: shard a\.parquet"):
        planning.survey_for(str(tmp_path), registry.describe(small_cohort[2]).cohort)


WRONG_SPECS = {
    "subject id": (CohortSpec(subject_id="mrn", modalities={"labs": ModalitySpec(column="labs")}), "subject_id column 'mrn'"),
    "list as scalars": (CohortSpec(modalities={"labs": ModalitySpec(prefix="labs")}), "use `column` for lists"),
    "scalar as list": (CohortSpec(modalities={"dx": ModalitySpec(column="dx__code")}), "use `column` for lists"),
    "outcome as input": (
        CohortSpec(outcomes=("outcome__*",), modalities={"o": ModalitySpec(prefix="outcome__", features=("died",))}),
        "may not use 'outcome__died'",
    ),
    "number of features": (CohortSpec(modalities={"labs": ModalitySpec(column="labs", features=("a",))}), "names 1 features"),
    "text as numbers": (CohortSpec(modalities={"dx": ModalitySpec(prefix="dx__", kinds="real")}), "their kind must be categorical"),
    "one column twice": (
        CohortSpec(modalities={"a": ModalitySpec(column="labs"), "b": ModalitySpec(column="labs")}),
        "belong to two modalities",
    ),
    "no such feature": (CohortSpec(modalities={"dx": ModalitySpec(prefix="dx__", levels={"x": (1.0, 2.0)})}), "names unknown features 'x'"),
}


@pytest.mark.parametrize("case", WRONG_SPECS)
def test_specs_that_do_not_fit_the_shards(case, small_cohort):
    spec, message = WRONG_SPECS[case]
    with pytest.raises(UserError, match=message):
        planning.survey(small_cohort[0], spec)


def test_outcomes_are_never_inputs(small_cohort):
    spec = CohortSpec(outcomes=("dx__s*",), modalities={"dx": ModalitySpec(prefix="dx__")})
    assert planning.survey(small_cohort[0], spec).schema.modalities[0].columns == ("dx__code",)


@pytest.mark.parametrize(("count", "together", "workers"), [(1, 8, 4), (40, 8, 2), (200, 8, 2), (7, 1, 3), (100_000, 8, 16)])
def test_blocks_hold_every_shard_once_and_end_small(count, together, workers):
    parts = list(ingest.blocks(count, together, workers))
    assert [at for part in parts for at in range(part.start, part.stop)] == list(range(count))
    sizes = [part.stop - part.start for part in parts]
    assert (
        sizes == sorted(sizes, reverse=True) and sizes[-1] == 1 and len(parts) <= max(count / together, ingest.MOST_BLOCKS) + 50 * workers
    )
