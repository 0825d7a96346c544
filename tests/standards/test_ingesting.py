"""`mmimpute ingest meds`: good shards get through, new ones get the same features, and what comes out can be fitted."""

import numpy as np
import pyarrow as pa
import pytest

from mmimpute import planning
from mmimpute.cluster import runtime
from mmimpute.data import storage
from mmimpute.data.shards import fetch_table, publish_table
from mmimpute.errors import UserError
from mmimpute.ingesting import ingest_meds, twice
from mmimpute.spec import ClusterSettings, read_spec
from mmimpute.standards.features import FeatureSpec
from tests.standards.datasets import events, to_table, write_dataset

CLUSTER = ClusterSettings(cpus=2)
MODALITIES = {
    "labs": {"codes": ["LOINC//"], "values": ["last", "count"]},
    "dx": {"codes": ["ICD10CM//", "RxNorm//"], "values": ["presence"]},
}
SPEC = FeatureSpec.model_validate({"min_subjects": 10, "modalities": MODALITIES})


def test_a_subject_of_two_shards_is_found():
    ids = {"b": np.array([4, 1, 9]), "a": np.array([1, 2]), "c": np.array([9, 1, 7])}
    found = twice(ids)
    assert {key: error.split("found ")[1].split(" subjects")[0] for key, error in found.items()} == {"b": "1", "c": "2"}
    assert twice({"a": np.array([1]), "b": np.array([2])}) == twice({}) == {}


def keys(url: str) -> list[str]:
    return [o.key for o in storage.list_objects(f"{url}/shards")]


def records(url: str) -> dict[int, dict]:
    return {row["subject_id"]: row for key in keys(url) for row in fetch_table(f"{url}/shards", key).to_pylist()}


@pytest.mark.services
def test_datasets_become_cohorts(bucket, tmp_path):
    meds, out = f"{bucket}/meds", f"{bucket}/cohort"
    splits = {s: "train" if s < 60 else "held_out" for s in range(90)}
    write_dataset(meds, {"train/0.parquet": range(30), "train/1.parquet": range(30, 60), "held_out/0.parquet": range(60, 90)}, splits)
    publish_table(f"{meds}/data", "train/2.parquet", to_table(events(range(3))))  # subjects of train/0
    publish_table(f"{meds}/data", "train/3.parquet", pa.table({"subject_id": [1]}))
    with runtime.cluster(CLUSTER):
        first = ingest_meds(meds, SPEC, out, CLUSTER)
        assert (first["shards"], first["done_before"], first["rows"]) == (5, 0, 90)
        assert list(first["set_aside"]) == ["train/2.parquet", "train/3.parquet"]
        assert "column 'subject_id': found 3 subjects of an earlier shard" in first["set_aside"]["train/2.parquet"]
        assert "column 'time': found no such column" in first["set_aside"]["train/3.parquet"]
        (tmp_path / "cohort.toml").write_text(first["spec"])
        found = planning.survey(f"{out}/shards", read_spec(tmp_path / "cohort.toml"))
        assert found.rows == 90 and found.set_aside == {} and [k.split("/")[0] for k in keys(out)] == ["held_out", "train", "train"]
        assert {m.name: len(m.features) for m in found.schema.modalities} == first["features"] == {"labs": 4, "dx": 3}
        before = records(out)

        storage.delete(f"{meds}/data", ["train/0.parquet", "train/2.parquet", "train/3.parquet"])
        publish_table(f"{meds}/data", "train/4.parquet", to_table(events(range(100, 110))))
        publish_table(f"{meds}/data", "held_out/0.parquet", to_table(events(range(60, 70), seed=7)))  # another version of the shard
        publish_table(f"{meds}/data", "train/5.parquet", to_table(events(range(30, 32))))  # subjects of train/1, ingested before
        second = ingest_meds(meds, SPEC, out, CLUSTER)
    assert (second["done_before"], second["rows"], second["spec"]) == (1, 20, first["spec"])
    again, gone = second["set_aside"].items()
    assert gone[0] in keys(out) and gone[0].startswith("train/train_0-") and "made of an input that is gone" in gone[1]
    assert again[0] == "train/5.parquet" and "found 2 subjects of an earlier shard" in again[1]
    after = records(out)
    assert sum(len(fetch_table(f"{out}/shards", key)) for key in keys(out)) == len(after)  # each subject once
    assert sorted(after) == [*range(70), *range(100, 110)] and after[100]["split"] == "unassigned"
    assert [s for s in range(60) if after[s] != before[s]] == [] and all(after[s] != before[s] for s in range(60, 70))
    with pytest.raises(UserError, match=r"vocabulary\.json there is of another feature spec"):
        ingest_meds(meds, SPEC.model_copy(update={"days": 5.0}), out, CLUSTER)
