"""OMOP CDM (5.3, 5.4) as MEDS events: a row is one by its standard concept and, where that is another, one by its source concept.

https://ohdsi.github.io/CommonDataModel/cdm54.html. Codes are `<vocabulary>//<code>` of the table `concept`; without that table, or a row
there, `OMOP//<concept id>`; where a row has no concept (0) `OMOP_SOURCE//<source value>`. Nothing is mapped to another vocabulary.
"""

from pathlib import PurePosixPath
from typing import NamedTuple

import duckdb

from mmimpute.data import storage
from mmimpute.errors import UserError
from mmimpute.standards import database
from mmimpute.standards.events import SHARD_SUBJECTS, Connection, count, open_to, publish, workplace
from mmimpute.standards.meds import BIRTH, DEATH, check_empty


class EventTable(NamedTuple):
    """Columns of an event table: <name>_concept_id, <name>_source_concept_id, <name>_source_value, and when it was."""

    name: str
    date: str
    datetime: str


TABLES = {
    "visit_occurrence": EventTable("visit", "visit_start_date", "visit_start_datetime"),
    "condition_occurrence": EventTable("condition", "condition_start_date", "condition_start_datetime"),
    "drug_exposure": EventTable("drug", "drug_exposure_start_date", "drug_exposure_start_datetime"),
    "procedure_occurrence": EventTable("procedure", "procedure_date", "procedure_datetime"),
    "measurement": EventTable("measurement", "measurement_date", "measurement_datetime"),
    "observation": EventTable("observation", "observation_date", "observation_datetime"),
}
OTHERS = ("person", "death", "concept")


class Source(NamedTuple):
    """A table as SQL names it, and its columns."""

    sql: str
    columns: frozenset[str]

    def column(self, name: str, kind: str) -> str:
        """Null where it is not there: optional columns are left out by many."""
        return f"try_cast(x.{name} AS {kind})" if name in self.columns else f"NULL::{kind}"


def to_meds(url: str, output: str, memory: str = "", per_shard: int = SHARD_SUBJECTS) -> dict:
    """Writes a MEDS dataset. url: a folder of Parquet, <table>.parquet or <table>/*.parquet, or a database (see `database`).

    Returns what `events.publish` does and {tables: {name: [rows, events of them]}, set_aside: {table: why}}.
    Raises UserError where there is no table person or no event, or the output is not empty.
    """
    check_empty(output)
    told, aside = {}, {}
    with workplace(memory) as con:
        found = _sources(con, url)
        if "person" not in found:
            raise UserError(f"{url}: no table person; expected <table>.parquet, <table>/*.parquet, or a database that has the tables")
        con.execute("CREATE TABLE concepts (id BIGINT, code VARCHAR, name VARCHAR)")
        for name in [n for n in ("concept", "person", "death", *TABLES) if n in found]:
            try:
                source = _described(con, found[name])
                if absent := _needed(name) - source.columns:
                    aside[name] = f"table {name}, column {min(absent)!r}: found no such column; expected that of OMOP CDM 5; add it"
                else:
                    told[name] = _append(con, name, source)
            except duckdb.Error as error:  # its message may hold a value
                aside[name] = f"table {name}: found what DuckDB cannot read ({type(error).__name__}); expected whole files of it"
        done = publish(con, output, PurePosixPath(url.rstrip("/").partition("?")[0]).stem, aside, per_shard)
    return done | {"tables": told}


def _append(con: Connection, name: str, source: Source) -> list[int]:
    """Makes events of a table: [rows, events of them]; codes of the table concept."""
    before = count(con, "events WHERE usable")
    for select in _selects(name, source):
        con.execute(f"INSERT INTO {'concepts' if name == 'concept' else 'events'} {select}")
    return [count(con, source.sql), count(con, "events WHERE usable") - before]


def _sources(con: Connection, url: str) -> dict[str, str]:
    """The tables that there are, as SQL names them."""
    if database.is_database(url):
        return database.tables(con, url, {*TABLES, *OTHERS})
    name, files = open_to(con, url), {}
    for o in storage.list_objects(url, ".parquet", storage.PROMPT):
        parts = PurePosixPath(o.key.lower()).with_suffix("").parts
        for table in {*TABLES, *OTHERS} & set(parts):
            files.setdefault(table, []).append(name(o.key))
    quoted = {table: ", ".join("'" + f.replace("'", "''") + "'" for f in found) for table, found in files.items()}
    return {table: f"read_parquet([{found}], union_by_name = true)" for table, found in quoted.items()}


def _described(con: Connection, sql: str) -> Source:
    return Source(sql, frozenset(row[0].lower() for row in con.execute(f"DESCRIBE SELECT * FROM {sql}").fetchall()))


def _needed(name: str) -> set[str]:
    if name in TABLES:
        return {"person_id", f"{TABLES[name].name}_concept_id", TABLES[name].date}
    others = {"concept": ("concept_id", "vocabulary_id", "concept_code"), "person": ("person_id",), "death": ("person_id", "death_date")}
    return set(others[name])


def _selects(name: str, source: Source) -> list[str]:
    """Queries whose rows are those of `events`, or of `concepts`."""
    if name == "concept":
        code, known = "x.vocabulary_id || '//' || x.concept_code", "x.concept_id <> 0 AND x.concept_code IS NOT NULL"
        return [f"SELECT x.concept_id, {code}, {source.column('concept_name', 'VARCHAR')} FROM {source.sql} x WHERE {known}"]
    if name == "person":
        kinds = ("gender", "race", "ethnicity")
        return [_birth(source), *(_coded(source, k, "NULL::TIMESTAMP", "true") for k in kinds if f"{k}_concept_id" in source.columns)]
    if name == "death":
        return [_plain(source, DEATH, _first(source, "death_datetime", "death_date"))]
    table = TABLES[name]
    return [_coded(source, table.name, _first(source, table.datetime, table.date), "t IS NOT NULL")]


def _first(source: Source, *names: str) -> str:
    return f"coalesce({', '.join(source.column(n, 'TIMESTAMP') for n in names)})"


def _birth(source: Source) -> str:
    year, month, day = (source.column(f"{part}_of_birth", "BIGINT") for part in ("year", "month", "day"))
    day_of_birth = f"try(make_timestamp({year}, coalesce({month}, 1), coalesce({day}, 1), 0, 0, 0))"
    return _plain(source, BIRTH, f"coalesce({source.column('birth_datetime', 'TIMESTAMP')}, {day_of_birth})")


def _plain(source: Source, code: str, time: str) -> str:
    usable = "x.person_id IS NOT NULL AND t IS NOT NULL"
    return f"SELECT x.person_id, {time} AS t, '{code}', NULL, NULL, NULL, {usable} FROM {source.sql} x"


def _coded(source: Source, name: str, time: str, dated: str) -> str:
    """One row for each distinct concept of a row; else its source value."""
    ids = [source.column(c, "BIGINT") for c in (f"{name}_concept_id", f"{name}_source_concept_id", "value_as_concept_id")]
    number, value = source.column("value_as_number", "FLOAT"), source.column("value_source_value", "VARCHAR")
    kept = source.column(f"{name}_source_value", "VARCHAR")
    rows = (
        f"SELECT x.person_id AS s, {time} AS t, {number} AS number, {kept} AS kept, {value} AS said, nullif({ids[2]}, 0) AS answer, "
        f"unnest(if(coalesce({ids[0]}, 0) = 0 AND coalesce({ids[1]}, 0) = 0, [0], "
        f"list_distinct(list_filter([{ids[0]}, {ids[1]}], lambda i: i <> 0)))) AS id FROM {source.sql} x"
    )
    code = "if(r.id = 0, 'OMOP_SOURCE//' || kept, coalesce(c.code, 'OMOP//' || r.id))"
    answer = "if(answer IS NULL, if(number IS NULL, said, NULL), coalesce(a.code, 'OMOP//' || answer))"
    return (
        f"SELECT s, t, {code} AS code, number, {answer}, c.name, s IS NOT NULL AND {dated} AND {code} IS NOT NULL FROM ({rows}) r "
        "LEFT JOIN concepts c ON c.id = r.id LEFT JOIN concepts a ON a.id = r.answer"
    )
