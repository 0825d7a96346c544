"""OMOP and FHIR become MEDS: the same made-up people told in both, and what each has that the other has not."""

import gzip
import hashlib
import json
import sqlite3
import stat
from contextlib import closing
from datetime import date, datetime, timedelta

import duckdb
import meds
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from mmimpute.data import storage
from mmimpute.data.shards import Shard, fetch_table, publish_table
from mmimpute.errors import UserError
from mmimpute.standards import fhir, omop
from mmimpute.standards.features import FeatureSpec
from mmimpute.standards.records import Source, count
from mmimpute.standards.vocabulary import add
from tests.test_cli import run

KEY = "a secret of at least thirty-two characters"
# (name, OMOP concept id, OMOP table, FHIR resource)
CODES = [
    ("SNOMED//44054006", 201826, "condition_occurrence", "Condition"),
    ("ICD10CM//I10", 35207668, "condition_occurrence", "Condition"),
    ("LOINC//2160-0", 3016723, "measurement", "Observation"),
    ("LOINC//718-7", 3000963, "measurement", "Observation"),
    ("RxNorm//860975", 40163924, "drug_exposure", "MedicationRequest"),
    ("SNOMED//80146002", 4198190, "procedure_occurrence", "Procedure"),
]
URIS = {short: uri for uri, short in reversed(fhir.SYSTEMS.items())}
WHEN = {
    "Condition": "onsetDateTime",
    "Observation": "effectiveDateTime",
    "MedicationRequest": "authoredOn",
    "Procedure": "performedDateTime",
}


def facts(people: int = 40, seed: int = 0) -> list[tuple]:
    """(person, time, index into CODES, number), in no order."""
    rng, found = np.random.default_rng(seed), []
    for person in range(1, people + 1):
        for at in rng.integers(0, len(CODES), rng.integers(2, 12)):
            when = datetime(2021, int(rng.integers(1, 13)), int(rng.integers(1, 29)), int(rng.integers(24)))
            number = round(float(rng.normal(5)), 2) if CODES[at][0].startswith("LOINC") else None
            found.append((person, when, int(at), number))
    return [found[i] for i in rng.permutation(len(found))]


def number_of(person: str) -> int:
    return int(hashlib.sha256(f"{KEY}/{person}".encode()).hexdigest()[:15], 16)


def concept(name: str) -> dict:
    system, code = name.split("//")
    return {"coding": [{"system": URIS[system], "code": code, "display": f"about {code}"}]}


def write_lines(url, name: str, resources: list[dict]) -> None:
    text = "".join(json.dumps(r) + "\n" for r in resources).encode()
    storage.write(str(url), name, gzip.compress(text) if name.endswith(".gz") else text)


def write_fhir(url: str, found: list[tuple]) -> None:
    """As servers export it: several files of a resource, in no order, one compressed."""
    people = sorted({f[0] for f in found})
    patients = [{"resourceType": "Patient", "id": f"p-{p}", "gender": "female", "birthDate": f"{1940 + p}-07-02"} for p in people]
    write_lines(url, "Patient.ndjson", patients)
    for resource, when in WHEN.items():
        rows = []
        for person, time, at, number in found:
            if CODES[at][3] == resource:
                row = {"resourceType": resource, "id": f"x{len(rows)}", "subject": {"reference": f"Patient/p-{person}"}}
                row |= {"medicationCodeableConcept" if resource == "MedicationRequest" else "code": concept(CODES[at][0])}
                row |= {when: time.isoformat() + "+02:00", "meta": {"tag": [1]}}
                row |= {"valueQuantity": {"value": number, "unit": "mg/dL"}} if number is not None else {}
                rows.append(row)
        write_lines(url, f"{resource}.000.ndjson", rows[::2])
        write_lines(url, f"{resource}.001.ndjson.gz", rows[1::2])


def omop_tables(found: list[tuple]) -> dict[str, pa.Table]:
    people = sorted({f[0] for f in found})
    names = {
        "condition_occurrence": "condition",
        "measurement": "measurement",
        "drug_exposure": "drug",
        "procedure_occurrence": "procedure",
    }
    births = {"year_of_birth": [1940 + p for p in people], "month_of_birth": [7] * len(people), "day_of_birth": [2] * len(people)}
    tables = {"person": pa.table({"person_id": people, "gender_concept_id": [8532] * len(people), **births})}
    codes = [name.split("//") for name, *_ in CODES] + [["Gender", "F"]]
    ids = [c[1] for c in CODES] + [8532]
    columns = {"concept_id": ids, "vocabulary_id": [v for v, _ in codes], "concept_code": [c for _, c in codes]}
    tables["concept"] = pa.table(columns | {"concept_name": [f"about {c}" for _, c in codes]})
    for table, name in names.items():
        mine = [f for f in found if CODES[f[2]][2] == table]
        start = {"condition": "condition_start_", "drug": "drug_exposure_start_"}.get(name, f"{name}_")
        tables[table] = pa.table(
            {
                "person_id": [f[0] for f in mine],
                f"{name}_concept_id": [CODES[f[2]][1] for f in mine],
                f"{start}date": [f[1].date() for f in mine],
                f"{start}datetime": [f[1] for f in mine],
                "value_as_number": pa.array([f[3] for f in mine], pa.float64()),
            }
        )
    return tables


def dataset(url: str) -> pa.Table:
    """All events of a MEDS dataset, which is checked by MEDS's own schemas and its two rules."""
    keys = [o.key for o in storage.list_objects(f"{url}/data")]
    shards = [fetch_table(f"{url}/data", key) for key in keys]
    for shard in shards:
        meds.DataSchema.validate(shard)
        rows = [(r["subject_id"], r["time"] or datetime.min) for r in shard.select(["subject_id", "time"]).to_pylist()]
        assert rows == sorted(rows)
    subjects = [set(s["subject_id"].to_pylist()) for s in shards]
    assert sum(map(len, subjects)) == len(set().union(*subjects))
    found = pa.concat_tables(shards)
    codes = fetch_table(f"{url}/metadata", "codes.parquet")
    meds.CodeMetadataSchema.validate(codes)
    meds.DatasetMetadataSchema.validate(json.loads(storage.read(f"{url}/metadata", "dataset.json")))
    assert codes["code"].to_pylist() == sorted(set(found["code"].to_pylist()))
    return found


def plain(table: pa.Table) -> list[tuple]:
    rows = table.select(["subject_id", "time", "code", "numeric_value"]).to_pylist()
    return sorted((r["subject_id"], str(r["time"]), r["code"], r["numeric_value"] and round(r["numeric_value"], 4)) for r in rows)


def test_the_same_people_in_both_standards(bucket):
    found = facts()
    write_fhir(f"{bucket}/fhir", found)
    for name, table in omop_tables(found).items():
        half = len(table) // 2
        publish_table(f"{bucket}/omop", f"{name}/0.parquet", table.slice(half))
        publish_table(f"{bucket}/omop", f"{name}/1.parquet", table.slice(0, half))
    told = fhir.to_meds(f"{bucket}/fhir", f"{bucket}/a", KEY, per_shard=10)
    other = omop.to_meds(f"{bucket}/omop", f"{bucket}/b", "200MB", per_shard=10)
    counts = {"subjects": 40, "events": len(found) + 80, "shards": 4, "codes": 8, "set_aside": {}}
    assert {k: told[k] for k in counts} == {k: other[k] for k in counts} == counts
    static = [(p, "None", "GENDER//female", None) for p in range(1, 41)]
    births = [(p, f"{1940 + p}-07-02 00:00:00", "MEDS_BIRTH", None) for p in range(1, 41)]
    wanted = sorted([*static, *births, *((p, str(t), CODES[at][0], n) for p, t, at, n in found)])
    assert plain(dataset(f"{bucket}/b")) == sorted((p, t, "Gender//F" if c == "GENDER//female" else c, n) for p, t, c, n in wanted)
    back = {number_of(f"p-{p}"): p for p in range(1, 41)}
    events = dataset(f"{bucket}/a")
    here = pc.match_substring_regex(
        events["code"], "^(LOINC|SNOMED|ICD10CM|RxNorm)"
    )  # their time was two hours east of UTC, which is written
    local = pc.if_else(here, pa.scalar(timedelta(hours=2)), pa.scalar(timedelta()))
    events = events.set_column(1, "time", pc.add(events["time"], local))
    assert sorted((back[s], *rest) for s, *rest in plain(events)) == wanted

    values = {"labs": {"codes": ["LOINC//"], "values": ["last"]}, "dx": {"codes": ["ICD10CM//", "SNOMED//"], "values": ["presence"]}}
    spec = FeatureSpec.model_validate({"min_subjects": 10, "modalities": values})
    totals = [{}, {}]
    for total, name in zip(totals, "ab", strict=True):
        source = Source.of(f"{bucket}/{name}", spec)
        for o in storage.list_objects(f"{bucket}/{name}/data"):
            add(total, count(source, Shard(*o))[0])
    assert totals[0] == totals[1] and {name: len(found) for name, found in totals[0].items()} == {"labs": 2, "dx": 3}


@pytest.fixture
def exported(tmp_path):
    """A converter of FHIR resources given by their files: (dataset, what was told)."""

    def convert(**files: list[dict]) -> tuple[list[dict], dict]:
        for name, rows in files.items():
            write_lines(tmp_path / "fhir", f"{name}.ndjson", [{"resourceType": name} | r for r in rows])
        told = fhir.to_meds(str(tmp_path / "fhir"), str(tmp_path / "meds"), KEY)
        return dataset(str(tmp_path / "meds")).to_pylist(), told

    return convert


A = {"subject": {"reference": "Patient/a"}}


def test_a_blood_pressure_is_its_components(exported):
    parts = [{"code": concept(f"LOINC//{code}"), "valueQuantity": {"value": value}} for code, value in (("8480-6", 120), ("8462-4", 80))]
    events, _ = exported(
        Observation=[A | {"code": concept("LOINC//85354-9"), "effectiveInstant": "2020-01-01T00:00:00Z", "component": parts}]
    )
    assert {e["code"]: e["numeric_value"] for e in events} == {"LOINC//85354-9": None, "LOINC//8480-6": 120, "LOINC//8462-4": 80}


def test_numbers_and_times_beyond_medss_are_none(exported):
    values = [(1e39, "2020-01-01"), (-2, "2020-01-01"), (1, "-798"), (1, "20200101"), (1, "next week")]
    code = {"code": concept("LOINC//1-1")}
    events, told = exported(Observation=[A | code | {"effectiveDateTime": t, "valueQuantity": {"value": v}} for v, t in values])
    assert [e["numeric_value"] for e in events] == [-2, None] and told["resources"] == {"Observation": [5, 2]}


def test_every_coding_is_an_event_and_what_has_none_keeps_its_text(exported):
    both = {
        "coding": concept("SNOMED//1")["coding"]
        + concept("ICD10CM//E11.9")["coding"]
        + [{"system": "http://x.org", "code": "z"}, {"display": "?"}]
    }
    when = {"recordedDate": "2020-03"}
    events, told = exported(Condition=[A | when | {"code": both}, A | when | {"code": {"text": "odd"}}, A | when])
    codes = [(e["code"], e["text_value"]) for e in events]
    assert codes == [
        ("ICD10CM//E11.9", None),
        ("SNOMED//1", None),
        *[("UNCODED//Condition", t) for t in ("odd", None)],
        ("http://x.org//z", None),
    ]
    assert {e["time"] for e in events} == {datetime(2020, 3, 1)} and told["resources"] == {"Condition": [3, 5]}


def test_a_medication_may_be_a_resource_of_its_own(exported):
    to = [
        {"medicationReference": {"reference": "Medication/m"}},
        {"medication": {"reference": {"reference": "http://x.org/fhir/Medication/m"}}},
    ]
    asked = [A | {"authoredOn": "2020-01-01"} | t for t in (*to, {"medicationReference": {"reference": "Medication/unknown"}})]
    events, _ = exported(Medication=[{"id": "m", "code": concept("RxNorm//860975")}], MedicationRequest=asked)
    assert sorted(e["code"] for e in events) == ["RxNorm//860975", "RxNorm//860975", "UNCODED//MedicationRequest"]
    assert {e["subject_id"] for e in events} == {number_of("a")}


def test_what_was_not_so_is_left_out(exported):
    code, when = {"code": concept("LOINC//1-1")}, {"effectiveDateTime": "2020-01-01"}
    refuted = {"verificationStatus": {"coding": [{"code": "refuted"}]}, "recordedDate": "2020-01-01"}
    drug = {"medication": {"concept": concept("RxNorm//2")}, "authoredOn": "2020-01-01"}
    events, told = exported(
        Patient=[{"id": "a", "birthDate": "1950", "deceasedDateTime": "2021-05-05T10:00:00-05:00"}, {"id": "b", "deceasedBoolean": True}],
        Condition=[A | code | refuted],
        Observation=[A | code | when | {"status": "entered-in-error"}, A | code, code | when, A | code | when | {"valueBoolean": True}],
        MedicationRequest=[A | drug | {"status": "active"}, A | drug | {"doNotPerform": True}],
        Procedure=[A | code | {"status": "not-done", "occurrenceDateTime": "2020-01-01"}],
    )
    found = [(e["code"], e["time"], e["numeric_value"]) for e in events]
    death = ("MEDS_DEATH", datetime(2021, 5, 5, 15), None)
    day = datetime(2020, 1, 1)
    assert found == [("MEDS_BIRTH", datetime(1950, 1, 1), None), ("LOINC//1-1", day, 1), ("RxNorm//2", day, None), death]
    assert told["resources"] == {
        "Patient": [2, 2],
        "Condition": [1, 0],
        "Observation": [4, 1],
        "MedicationRequest": [2, 1],
        "Procedure": [1, 0],
    }


def test_bad_lines_and_files_are_named_and_the_others_read(tmp_path):
    write_lines(tmp_path / "in", "Patient.ndjson", [{"resourceType": "Patient", "id": "a", "gender": "male"}, {"resourceType": "Group"}])
    with open(tmp_path / "in" / "Patient.ndjson", "a") as file:
        file.write('{"resourceType": "Patient", "id": \n')
    (tmp_path / "in" / "Condition.ndjson.gz").write_bytes(b"\x1f\x8b no gzip")
    told = fhir.to_meds(str(tmp_path / "in"), str(tmp_path / "out"), KEY)
    assert told["events"] == 1 and "found 2 of 3 lines that are no Patient" in told["set_aside"]["Patient.ndjson"]
    assert told["set_aside"]["Condition.ndjson.gz"].startswith("file Condition.ndjson.gz: found no readable file")
    with pytest.raises(UserError, match="holds something already"):
        fhir.to_meds(str(tmp_path / "in"), str(tmp_path / "out"), KEY)
    with pytest.raises(UserError, match=r"no file such as Patient\.ndjson"):
        fhir.to_meds(str(tmp_path / "out"), str(tmp_path / "other"), KEY)


def test_ids_are_neither_printed_nor_in_the_dataset(monkeypatch, capsys, tmp_path):
    patient = {
        "resourceType": "Patient",
        "id": "planted-77",
        "gender": "male",
        "identifier": [{"value": "planted-78"}],
        "birthDate": "1950",
    }
    write_lines(tmp_path / "in", "Patient.ndjson", [patient, {"resourceType": "Person", "id": "planted-79"}])
    options = ("--output", str(tmp_path / "out"), "--key", str(tmp_path / "key"))
    code, text = run(monkeypatch, capsys, "ingest", "fhir", str(tmp_path / "in"), *options)
    assert code == 3 and "2 events of 1 subjects" in text and "planted" not in text
    (key, written) = (tmp_path / "key").read_text(), b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert b"planted" not in written and key.encode() not in written and key not in text
    other = dataset(str(tmp_path / "out"))
    assert "planted" not in str(other.to_pylist())
    assert set(other["subject_id"].to_pylist()) == {int(hashlib.sha256(f"{key}/planted-77".encode()).hexdigest()[:15], 16)}


def test_the_key_is_made_once_and_private(tmp_path):
    key = fhir.subject_key(tmp_path / "k")
    assert len(key) == 64 and fhir.subject_key(tmp_path / "k") == key and stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    (tmp_path / "short").write_text("abc")
    with pytest.raises(UserError, match="a key of 3 characters"):
        fhir.subject_key(tmp_path / "short")


def test_omop_keeps_source_concepts_and_source_values(tmp_path):
    """From a database file, with optional columns left out, in a schema of its own."""
    with duckdb.connect(str(tmp_path / "hospital.duckdb")) as con:
        con.execute("CREATE SCHEMA cdm; USE cdm")
        con.execute("CREATE TABLE person AS SELECT 1 AS person_id, NULL AS year_of_birth, 0 AS gender_concept_id")
        con.execute("CREATE TABLE concept AS SELECT 5 AS concept_id, 'SNOMED' AS vocabulary_id, '9' AS concept_code")
        columns = "person_id, condition_concept_id, condition_source_concept_id, condition_source_value"
        rows = "(1, 5, 6, 'E11'), (1, 5, 5, 'E12'), (1, 0, 0, 'E13'), (1, 0, NULL, NULL)"
        day = "DATE '2020-02-01' AS condition_start_date"
        con.execute(f"CREATE TABLE condition_occurrence AS SELECT *, {day} FROM (VALUES {rows}) t({columns})")
        columns = "person_id, measurement_concept_id, value_as_concept_id, value_as_number, value_source_value"
        rows = "(1, 7, 5, NULL, 'yes'), (1, 8, 0, NULL, 'trace'), (1, 9, 0, 3, '3 mg')"
        con.execute(f"CREATE TABLE measurement AS SELECT *, '2020-03-01' AS measurement_date FROM (VALUES {rows}) t({columns})")
        con.execute("CREATE TABLE death AS SELECT 1 AS person_id, DATE '2021-01-01' AS death_date")
        con.execute("CREATE TABLE drug_exposure AS SELECT 1 AS person_id")
    told = omop.to_meds(str(tmp_path / "hospital.duckdb"), str(tmp_path / "meds"))
    events = dataset(str(tmp_path / "meds")).to_pylist()
    found = [(e["code"], e["time"].date(), e["text_value"]) for e in events]
    day = date(2020, 2, 1)
    assert found == [
        *((code, day, None) for code in ("OMOP//6", "OMOP_SOURCE//E13", "SNOMED//9", "SNOMED//9")),
        *((code, date(2020, 3, 1), said) for code, said in (("OMOP//7", "SNOMED//9"), ("OMOP//8", "trace"), ("OMOP//9", None))),
        ("MEDS_DEATH", date(2021, 1, 1), None),
    ]
    assert told["tables"] == {"concept": [1, 0], "person": [1, 0], "death": [1, 1], "condition_occurrence": [4, 4], "measurement": [3, 3]}
    assert "table drug_exposure, column 'drug_concept_id'" in told["set_aside"]["drug_exposure"]
    (tmp_path / "bad").mkdir()
    for name in ("person", "death"):
        (tmp_path / "bad" / f"{name}.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(UserError, match=r"(?s)no event with a subject.*table death: found what DuckDB cannot read"):
        omop.to_meds(str(tmp_path / "bad"), str(tmp_path / "none"))
    with pytest.raises(UserError, match="no table person"):
        omop.to_meds(str(tmp_path / "meds"), str(tmp_path / "none"))


def test_omop_in_a_database_is_as_in_parquet(tmp_path):
    tables = omop_tables(facts(12))
    for name, table in tables.items():
        publish_table(f"{tmp_path}/omop", f"{name}.parquet", table)
    with closing(sqlite3.connect(tmp_path / "cdm.sqlite")) as con:
        for name, table in tables.items():
            con.execute(f"CREATE TABLE {name.upper()} ({', '.join(table.column_names)})")
            rows = [[str(v) if isinstance(v, date) else v for v in row.values()] for row in table.to_pylist()]
            con.executemany(f"INSERT INTO {name} VALUES ({', '.join('?' * table.num_columns)})", rows)
        con.commit()
    told = omop.to_meds(f"sqlite://{tmp_path}/cdm.sqlite", f"{tmp_path}/a")
    other = omop.to_meds(f"{tmp_path}/omop", f"{tmp_path}/b")
    assert told == other and dataset(f"{tmp_path}/a").equals(dataset(f"{tmp_path}/b"))
    with pytest.raises(UserError, match="sqlite database: cannot be read"):
        omop.to_meds(f"sqlite://{tmp_path}/none.sqlite", f"{tmp_path}/c")
    with pytest.raises(UserError, match="the URL holds a password") as error:
        omop.to_meds("postgresql://me:verysecret@localhost/cdm", f"{tmp_path}/c")
    assert "verysecret" not in str(error.value)
