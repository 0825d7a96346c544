"""FHIR bulk exports (newline-delimited JSON, R4 and R5) as MEDS events: each coding of a resource is an event.

https://hl7.org/fhir/R4, https://hl7.org/fhir/uv/bulkdata. Codes stay what they are, `<code system>//<code>`; nothing is mapped to another
system. What has no coding is `UNCODED//<resource>` with its text; what has no subject or no time is left out, as is what was entered in
error, refuted, cancelled or not done. A partial date is the first day of its month or year.
"""

import re
import secrets
from pathlib import Path

import duckdb

from mmimpute.data import storage
from mmimpute.errors import UserError
from mmimpute.standards.events import SHARD_SUBJECTS, Connection, count, open_to, publish, workplace
from mmimpute.standards.meds import BIRTH, DEATH, check_empty

SUFFIXES = (".ndjson", ".ndjson.gz", ".jsonl", ".jsonl.gz")
SYSTEMS = {
    "http://loinc.org": "LOINC",
    "urn:oid:2.16.840.1.113883.6.1": "LOINC",
    "http://snomed.info/sct": "SNOMED",
    "urn:oid:2.16.840.1.113883.6.96": "SNOMED",
    "http://www.nlm.nih.gov/research/umls/rxnorm": "RxNorm",
    "urn:oid:2.16.840.1.113883.6.88": "RxNorm",
    "http://hl7.org/fhir/sid/icd-10-cm": "ICD10CM",
    "urn:oid:2.16.840.1.113883.6.90": "ICD10CM",
    "http://hl7.org/fhir/sid/icd-10": "ICD10",
    "http://hl7.org/fhir/sid/icd-9-cm": "ICD9CM",
    "http://www.cms.gov/Medicare/Coding/ICD10": "ICD10PCS",
    "http://www.ama-assn.org/go/cpt": "CPT4",
    "http://hl7.org/fhir/sid/ndc": "NDC",
    "http://hl7.org/fhir/sid/cvx": "CVX",
}
CONCEPT = 'STRUCT(coding STRUCT("system" VARCHAR, code VARCHAR, display VARCHAR)[], "text" VARCHAR)'
REFERENCE, PERIOD = "STRUCT(reference VARCHAR)", 'STRUCT("start" VARCHAR)'
VALUE = {
    "valueQuantity": 'STRUCT("value" DOUBLE)',
    "valueInteger": "DOUBLE",
    "valueBoolean": "BOOLEAN",
    "valueCodeableConcept": CONCEPT,
    "valueString": "VARCHAR",
}
_VALUE = "STRUCT(code " + CONCEPT + ", " + ", ".join(f"{name} {kind}" for name, kind in VALUE.items()) + ")"
# Of every resource: the fields that are read, and their types.
COLUMNS = {
    "Patient": {
        "id": "VARCHAR",
        "gender": "VARCHAR",
        "birthDate": "VARCHAR",
        "deceasedDateTime": "VARCHAR",
    },
    "Condition": {
        "subject": REFERENCE,
        "code": CONCEPT,
        "verificationStatus": CONCEPT,
        "onsetDateTime": "VARCHAR",
        "onsetPeriod": PERIOD,
        "recordedDate": "VARCHAR",
    },
    "Observation": {
        "subject": REFERENCE,
        "code": CONCEPT,
        "status": "VARCHAR",
        "effectiveDateTime": "VARCHAR",
        "effectiveInstant": "VARCHAR",
        "effectivePeriod": PERIOD,
        "issued": "VARCHAR",
        "component": _VALUE + "[]",
        **VALUE,
    },
    "Medication": {  # before the requests that refer to it
        "id": "VARCHAR",
        "code": CONCEPT,
    },
    "MedicationRequest": {
        "subject": REFERENCE,
        "status": "VARCHAR",
        "doNotPerform": "BOOLEAN",
        "medicationCodeableConcept": CONCEPT,
        "medicationReference": REFERENCE,
        "medication": f"STRUCT(concept {CONCEPT}, reference {REFERENCE})",
        "authoredOn": "VARCHAR",
    },
    "Procedure": {
        "subject": REFERENCE,
        "code": CONCEPT,
        "status": "VARCHAR",
        "performedDateTime": "VARCHAR",
        "performedPeriod": PERIOD,
        "occurrenceDateTime": "VARCHAR",
        "occurrencePeriod": PERIOD,
    },
}
_NUMBER = "coalesce({0}valueQuantity.value, {0}valueInteger, {0}valueBoolean::INT)"
_TEXT = "coalesce({0}valueString, coded({0}valueCodeableConcept.coding[1]), {0}valueCodeableConcept.text)"
# Of every resource that has a subject: its concept, time, number, text, and when it says nothing of the subject.
PARTS = {
    "Condition": (
        "code",
        "coalesce(onsetDateTime, onsetPeriod.start, recordedDate)",
        ("NULL", "NULL"),
        "list_has_any(list_transform(verificationStatus.coding, lambda c: c.code), ['refuted', 'entered-in-error'])",
    ),
    "Observation": (
        "code",
        "coalesce(effectiveDateTime, effectiveInstant, effectivePeriod.start, issued)",
        (_NUMBER.format(""), _TEXT.format("")),
        "status IN ('entered-in-error', 'cancelled')",
    ),
    "MedicationRequest": (
        "coalesce(medicationCodeableConcept, medication.concept, referred)",
        "authoredOn",
        ("NULL", "NULL"),
        "status IN ('entered-in-error', 'cancelled', 'draft') OR doNotPerform",
    ),
    "Procedure": (
        "code",
        "coalesce(performedDateTime, performedPeriod.start, occurrenceDateTime, occurrencePeriod.start)",
        ("NULL", "NULL"),
        "status IN ('entered-in-error', 'not-done', 'preparation')",
    ),
}


def to_meds(url: str, output: str, key: str, memory: str = "", per_shard: int = SHARD_SUBJECTS) -> dict:
    """Reads every NDJSON file whose name says its resource, and writes a MEDS dataset.

    key: the secret by which subject ids become numbers (see `subject_key`). Returns what `events.publish` does and
    {resources: {name: [resources, events of them]}, set_aside: {file: why}}.
    Raises UserError where there is nothing to read, or the output is not empty.
    """
    files = list_files(url)
    check_empty(output)
    aside, told = {}, {}
    with workplace(memory) as con:
        name = open_to(con, url)
        _define(con, key)
        for resource, keys in files.items():
            for file in keys:
                if error := _read(con, resource, name(file)):
                    aside[file] = f"file {file}: {error}"
            told[resource] = _append(con, resource)
        done = publish(con, output, Path(url.rstrip("/")).name, aside, per_shard)
    return done | {"resources": told}


def list_files(url: str) -> dict[str, list[str]]:
    """Resource -> its files. Raises UserError where there is none of any."""
    found: dict[str, list[str]] = {}
    for o in storage.list_objects(url, retry=storage.PROMPT):
        file = o.key.rsplit("/", 1)[-1]
        for resource in COLUMNS:
            if file.endswith(SUFFIXES) and re.search(rf"(?<![A-Za-z]){resource}(?![A-Za-z])", file):
                found.setdefault(resource, []).append(o.key)
    if not found:
        raise UserError(f"{url}: no file such as Patient.ndjson or Observation.000.ndjson.gz; read are {', '.join(COLUMNS)}")
    return {resource: found[resource] for resource in COLUMNS if resource in found}


def subject_key(path: Path) -> str:
    """The secret in a file, which is made where there is none; its owner alone can read it. Raises UserError for one too short.

    A subject's number is the first 60 bits of SHA-256 of key and id: the same in every export, and whoever lacks the key can neither
    tell who it is nor try ids. Two of ten million people share a number with a chance of 1 in 20,000.
    """
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32), encoding="ascii")
    key = path.read_text(encoding="utf-8").strip()
    if len(key) < 32:
        raise UserError(f"{path}: a key of {len(key)} characters; give 32 or more, or the name of a file that is not there yet")
    return key


def _define(con: Connection, key: str) -> None:
    con.execute(f"CREATE TABLE medications (id VARCHAR, concept {CONCEPT})")
    con.execute("SET VARIABLE key = $key", {"key": key})
    con.execute("SET VARIABLE systems = map($names, $short)", {"names": list(SYSTEMS), "short": list(SYSTEMS.values())})
    con.execute(
        "CREATE TEMP MACRO subject_number(id) AS ('0x' || substr(sha256(getvariable('key') || '/' || nullif(id, '')), 1, 15))::BIGINT;"
        "CREATE TEMP MACRO identified(ref, kind) AS regexp_extract(ref, '(?:(?:^|/)' || kind || '/|^urn:uuid:|^urn:oid:)([^/]+)', 1);"
        "CREATE TEMP MACRO referenced(ref) AS subject_number(identified(ref, 'Patient'));"
        "CREATE TEMP MACRO whole_date(t) AS CASE length(t) WHEN 4 THEN t || '-01-01' WHEN 7 THEN t || '-01' ELSE t END;"
        "CREATE TEMP MACRO moment(t) AS if(regexp_matches(t, '^[0-9]{4}(-|$)'), try_cast(whole_date(t) AS TIMESTAMPTZ), NULL)"
        " AT TIME ZONE 'UTC';"
        "CREATE TEMP MACRO coded(c) AS coalesce(getvariable('systems')[c.system], c.system, 'UNKNOWN') || '//' || c.code;"
    )


def _read(con: Connection, resource: str, file: str) -> str | None:
    """Appends a file's lines to the table `raw_<resource>`; what is wrong with the file, which may still have good lines."""
    columns = ", ".join(f"\"{name}\": '{kind}'" for name, kind in ({"resourceType": "VARCHAR"} | COLUMNS[resource]).items())
    lines = f"SELECT * FROM read_json($file, format = 'newline_delimited', columns = {{{columns}}}, ignore_errors = true)"
    con.execute(f"CREATE TABLE IF NOT EXISTS raw_{resource} AS {lines} LIMIT 0", {"file": file})
    before = count(con, f"raw_{resource}")
    try:
        con.execute(f"INSERT INTO raw_{resource} {lines}", {"file": file})
    except duckdb.Error:  # its message may hold a line
        return "found no readable file of JSON lines; expected a whole one; upload it again"
    read = count(con, f"raw_{resource}") - before
    bad = count(con, f"raw_{resource} WHERE resourceType IS DISTINCT FROM '{resource}'")
    con.execute(f"DELETE FROM raw_{resource} WHERE resourceType IS DISTINCT FROM '{resource}'")
    return f"found {bad:,} of {read:,} lines that are no {resource}; expected one resource a line; the others are read" if bad else None


def _append(con: Connection, resource: str) -> list[int]:
    """Makes events of what was read: [resources, events of them]."""
    source, before = f"raw_{resource}", count(con, "events WHERE usable")
    read = count(con, source)
    if resource == "Patient":
        for code, time, has in (
            (f"'{BIRTH}'", "moment(birthDate)", "birthDate"),
            (f"'{DEATH}'", "moment(deceasedDateTime)", "deceasedDateTime"),
            ("'GENDER//' || gender", "NULL", "gender"),
        ):
            usable = "s IS NOT NULL" if time == "NULL" else "s IS NOT NULL AND t IS NOT NULL"
            rows = f"SELECT subject_number(id) AS s, {time} AS t, {code} AS code FROM {source} WHERE {has} IS NOT NULL"
            con.execute(f"INSERT INTO events SELECT s, t, code, NULL, NULL, NULL, {usable} FROM ({rows})")
    elif resource == "Medication":
        con.execute(f"INSERT INTO medications SELECT id, any_value(code) FROM {source} GROUP BY id")
    elif resource == "MedicationRequest":
        to = "identified(coalesce(medicationReference.reference, medication.reference.reference), 'Medication')"
        _append_coded(con, resource, f"(SELECT r.*, m.concept AS referred FROM {source} r LEFT JOIN medications m ON m.id = {to})")
    else:
        _append_coded(con, resource, source)
    con.execute(f"DROP TABLE {source}")
    return [read, count(con, "events WHERE usable") - before]


def _append_coded(con: Connection, resource: str, source: str) -> None:
    concept, time, (number, text), void = PARTS[resource]
    common = f"referenced(subject.reference) AS s, moment({time}) AS t, NOT coalesce({void}, false) AS valid"
    rows = f"SELECT {common}, {concept} AS concept, {number} AS number, {text} AS said FROM {source}"
    if resource == "Observation":  # blood pressure, for one, has its values in components
        inner = f"SELECT {common}, unnest(component) AS c FROM {source}"
        rows += f" UNION ALL SELECT s, t, valid, c.code, {_NUMBER.format('c.')}, {_TEXT.format('c.')} FROM ({inner})"
    codings = "list_filter(concept.coding, lambda c: c.code IS NOT NULL)"
    each = f"SELECT *, unnest(if(len({codings}) > 0, {codings}, [NULL])) AS coding FROM ({rows})"
    con.execute(
        "INSERT INTO events SELECT s, t, coalesce(coded(coding), $uncoded), try_cast(number AS FLOAT), "
        "coalesce(said, if(coding IS NULL, concept.text, NULL)), coding.display, "
        f"valid AND s IS NOT NULL AND t IS NOT NULL FROM ({each})",
        {"uncoded": f"UNCODED//{resource}"},
    )
