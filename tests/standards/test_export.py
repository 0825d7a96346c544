"""Imputed values as MEDS events: all that was missing and nothing that was observed, against the enriched table in plain Python."""

import json
from datetime import datetime

import meds
import pyarrow as pa
import pytest

from mmimpute import registry
from mmimpute.data import storage, table
from mmimpute.data.shards import fetch_table, list_shards, publish_table
from mmimpute.errors import UserError
from mmimpute.imputing import impute_shard
from mmimpute.spec import ImputeSettings
from mmimpute.standards.export import _codes, export
from tests.conftest import linear_cohort


@pytest.fixture(scope="module")
def model(small_cohort):
    return registry.load(small_cohort[2])


@pytest.fixture
def schema(model):
    return model.schema.model_copy(update={"timestamp": "index_time", "subject_type": "int64"})


def rows(count: int, seed: int, first: int) -> pa.Table:
    """Records with numbers for ids and an index time, every tenth without."""
    times = [None if i % 10 == 0 else datetime(2024, 1, 1 + i % 28, 6) for i in range(count)]
    found = linear_cohort(count, seed).set_column(0, "subject_id", pa.array(range(first, first + count)))
    return found.append_column("index_time", pa.array(times, pa.timestamp("ns")))


def enrich(model, place: str) -> pa.Table:
    """Commits two objects; all of the table."""
    for number in (0, 1):
        publish_table(f"{place}/shards", f"part/{number}.parquet", rows(60, number, 60 * number))
    for shard in list_shards(f"{place}/shards"):
        impute_shard(model, f"{place}/shards", shard, f"{place}/table", ImputeSettings())
    table.commit(f"{place}/table", table.published(f"{place}/table"), {})
    return pa.concat_tables(fetch_table(f"{place}/table", o.key) for o in table.published(f"{place}/table"))


def expected(model, enriched: pa.Table) -> dict[tuple, tuple]:
    """(subject, code) -> (time, number, text, deviation)."""
    found = {}
    for row in enriched.to_pylist():
        if row["index_time"] is None:
            continue
        for m in model.schema.modalities:
            for number, column in enumerate(m.columns):
                size = len(m.features) if m.layout == "list" else 1
                parts = [row[column + suffix] for suffix in ("", "__imputed", "__std")]
                before, after, std = [(p if m.layout == "list" and p else [p] * size) for p in parts]
                for at, name in enumerate(f.name for f in m.features[number : number + size]):
                    if (before[at] is None or before[at] != before[at]) and after[at] is not None:
                        text = isinstance(after[at], str)
                        value = (None, after[at]) if text else (pytest.approx(after[at], rel=1e-6), None)
                        found[row["subject_id"], f"MMIMPUTE//{m.name}//{name}"] = (
                            row["index_time"],
                            *value,
                            pytest.approx(std[at], rel=1e-6),
                        )
    return found


def test_only_what_was_missing_is_exported(model, schema, bucket):
    enriched = enrich(model, bucket)
    told = export(schema, f"{bucket}/table", f"{bucket}/out")
    shards = [fetch_table(f"{bucket}/out/data", o.key) for o in storage.list_objects(f"{bucket}/out/data")]
    for shard in shards:
        meds.DataSchema.validate(shard)
    events = pa.concat_tables(shards).to_pylist()
    found = {(e["subject_id"], e["code"]): (e["time"], e["numeric_value"], e["text_value"], e["std"]) for e in events}
    wanted = expected(model, enriched)
    assert len(found) == len(events) == told["events"] and found == wanted
    assert (told["version"], told["objects"], told["rows"], told["undated"]) == (0, 2, 120, 12)
    assert {code for _, code in wanted} == {f"MMIMPUTE//{m.name}//{f.name}" for m in model.schema.modalities for f in m.features}

    codes = fetch_table(f"{bucket}/out/metadata", "codes.parquet")
    meds.CodeMetadataSchema.validate(codes)
    assert set(codes["code"].to_pylist()) == {e["code"] for e in events} and codes["parent_codes"].null_count == len(codes)
    metadata = json.loads(storage.read(f"{bucket}/out/metadata", "dataset.json"))
    meds.DatasetMetadataSchema.validate(metadata)
    assert metadata["other_extension_columns"] == ["std"]
    with pytest.raises(UserError, match="holds something already"):
        export(schema, f"{bucket}/table", f"{bucket}/out")


def test_codes_of_ingested_features_name_their_parents(model):
    modality = model.schema.modalities[0]
    names = ("LOINC//2160-0//last", "ICD10CM//E11.9//presence", "plain", "a//b")
    features = tuple(
        modality.features[0].model_copy(update={"name": n, "kind": k})
        for n, k in zip(names, ("real", "binary", "real", "real"), strict=True)
    )
    found = _codes(modality.model_copy(update={"name": "labs", "features": features}))
    assert [parents for *_, parents in found] == [["LOINC//2160-0"], ["ICD10CM//E11.9"], None, None]
    assert found[1][:2] == (
        "MMIMPUTE//labs//ICD10CM//E11.9//presence",
        "ICD10CM//E11.9//presence of labs, imputed: probability; not measured",
    )


MISTAKES = {
    "text ids": ({"subject_type": "string"}, "those of MEDS are whole numbers"),
    "no timestamp": ({"timestamp": None}, "the cohort has no timestamp"),
    "another model": ({"timestamp": "when"}, "no column 'when'; give the model that imputed it"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_meds_is_told(model, schema, tmp_path, name):
    changes, message = MISTAKES[name]
    enrich(model, str(tmp_path))
    with pytest.raises(UserError, match=message):
        export(schema.model_copy(update=changes), f"{tmp_path}/table", f"{tmp_path}/out")
    assert not (tmp_path / "out").exists()
