"""Tables of a database for DuckDB: its own files are attached, others are read through ADBC as streams of Arrow.

DuckDB's own readers of PostgreSQL and SQLite are extensions that it downloads when they are first used, which closed networks forbid.
"""

import importlib
from collections.abc import Collection
from urllib.parse import urlsplit

import duckdb

from mmimpute.data import storage
from mmimpute.errors import UserError
from mmimpute.standards.events import Connection

FILES = (".duckdb", ".db")
DRIVERS = {"postgresql": "adbc_driver_postgresql", "postgres": "adbc_driver_postgresql", "sqlite": "adbc_driver_sqlite"}


def is_database(url: str) -> bool:
    return urlsplit(url).scheme in DRIVERS or (not storage.is_s3(url) and url.endswith(FILES))


def tables(con: Connection, url: str, wanted: Collection[str]) -> dict[str, str]:
    """Name -> how SQL names it, of the wanted tables that there are, in whatever schema.

    url: a DuckDB file, postgresql://user@host/database or sqlite:///path. Raises UserError where it is none of them.
    """
    return _copied(con, url, wanted) if urlsplit(url).scheme in DRIVERS else _attached(con, url, wanted)


def _attached(con: Connection, url: str, wanted: Collection[str]) -> dict[str, str]:
    path = storage.local_path(url)
    if not path.is_file():
        raise UserError(f"{url}: no such file")
    try:
        con.execute(f"ATTACH {_text(str(path))} AS source (READ_ONLY)")
    except duckdb.Error:
        raise UserError(f"{url}: no DuckDB database, or one that another process writes to") from None
    found = "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = 'source' UNION ALL "
    found += "SELECT schema_name, view_name FROM duckdb_views() WHERE database_name = 'source' AND NOT internal"
    return {t.lower(): f"source.{_name(s)}.{_name(t)}" for s, t in con.execute(found).fetchall() if t.lower() in wanted}


def _copied(con: Connection, url: str, wanted: Collection[str]) -> dict[str, str]:
    """The tables are copied into DuckDB's file: they are looked at more than once."""
    parts = urlsplit(url)
    if parts.password:
        raise UserError("the URL holds a password, which others on this machine can see; give it by PGPASSWORD or ~/.pgpass")
    try:
        dbapi = importlib.import_module(f"{DRIVERS[parts.scheme]}.dbapi")
    except ModuleNotFoundError:
        raise UserError(f"{parts.scheme} needs its ADBC driver: pip install 'mmimpute[standards]'") from None
    place, found = f"file:{parts.path}?mode=ro" if parts.scheme == "sqlite" else url, {}
    try:
        with dbapi.connect(place) as source, source.cursor() as cursor:
            for schema, table in _listed(source, wanted):
                cursor.execute(f"SELECT * FROM {'.'.join(_name(n) for n in (schema, table) if n)}")
                con.register("incoming", cursor.fetch_record_batch())
                con.execute(f"CREATE TABLE source_{table.lower()} AS SELECT * FROM incoming")
                con.unregister("incoming")
                found[table.lower()] = f"source_{table.lower()}"
    except dbapi.Error as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{parts.scheme} database: cannot be read ({reason}); check address, user and what it may read") from None
    return found


def _listed(source, wanted: Collection[str]) -> list[tuple[str, str]]:
    """(schema, table) of an ADBC connection."""
    catalogs = source.adbc_get_objects(depth="tables").read_all().to_pylist()
    schemas = [s for c in catalogs for s in c["catalog_db_schemas"] or ()]
    every = [(s["db_schema_name"], t["table_name"]) for s in schemas for t in s["db_schema_tables"] or ()]
    return [(schema, table) for schema, table in every if table.lower() in wanted]


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
