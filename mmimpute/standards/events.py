"""Events gathered in DuckDB, out of core, and published as a MEDS dataset whose shards hold whole subjects.

Whatever comes in, in whatever order, is appended to one table on this machine's disk, sorted once (DuckDB spills what does not fit into
`memory`), and leaves as a stream that is cut where a shard ends. So memory holds what DuckDB may take, and one shard.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from mmimpute.data import storage
from mmimpute.errors import UserError
from mmimpute.standards.meds import EVENTS, publish_events, publish_metadata

Connection = duckdb.DuckDBPyConnection
SHARD_SUBJECTS = 10_000
BATCH = 100_000  # events of the stream at a time
STAGED = "subject_id BIGINT, time TIMESTAMP, code VARCHAR, numeric_value FLOAT, text_value VARCHAR, description VARCHAR, usable BOOLEAN"


@contextmanager
def workplace(memory: str) -> Iterator[Connection]:
    """A DuckDB connection with an empty table `events`, in a temporary folder. memory: as DuckDB has it, '4GB'; TMPDIR says where."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
        try:
            con = duckdb.connect(str(Path(folder) / "events.duckdb"), config=settings | ({"memory_limit": memory} if memory else {}))
        except duckdb.Error as error:
            raise UserError(f"--memory {memory}: {str(error).splitlines()[0]}") from None
        con.execute("SET preserve_insertion_order = false; SET TimeZone = 'UTC'")
        con.execute(f"CREATE TABLE events ({STAGED})")
        try:
            yield con
        except duckdb.OutOfMemoryException:
            raise UserError(
                "DuckDB has too little memory, or TMPDIR too little room; give --memory more, or TMPDIR a larger disk"
            ) from None
        finally:
            con.close()


def open_to(con: Connection, url: str) -> Callable[[str], str]:
    """How DuckDB names an object under a URL; s3 goes through s3fs, since its own client is an extension that it downloads."""
    if storage.is_s3(url):
        con.register_filesystem(storage.s3_filesystem())
    return lambda key: storage.join(url, key)


def count(con: Connection, what: str) -> int:
    """Rows of a table, with conditions where `what` has them."""
    return con.execute(f"SELECT count(*) FROM {what}").fetchall()[0][0]  # fetchone would leave the result unfinished


def publish(con: Connection, url: str, name: str, aside: dict[str, str], per_shard: int = SHARD_SUBJECTS) -> dict:
    """The usable events as a MEDS dataset; aside: what was not read, and why.

    Returns {subjects, events, shards, codes, set_aside}. Raises UserError where there is no event.
    """
    subjects = count(con, "(SELECT DISTINCT subject_id FROM events WHERE usable)")
    if not subjects:
        raise UserError("\n".join([f"{name}: no event with a subject, a time and a code", *aside.values()]))
    shards = -(-subjects // per_shard)
    rows = con.sql(
        "SELECT subject_id, time, code, if(isfinite(numeric_value), numeric_value, NULL) AS numeric_value, text_value, "
        "abs(subject_id % $shards) AS shard FROM events WHERE usable "
        "ORDER BY shard, subject_id, time NULLS FIRST, code, numeric_value, text_value",
        params={"shards": shards},
    ).to_arrow_reader(BATCH)
    events = written = 0
    for number, table in _by_shard(rows):
        publish_events(url, f"{number:05d}.parquet", table)
        events, written = events + len(table), written + 1
    codes = con.execute("SELECT code, min(description) FROM events WHERE usable GROUP BY code").fetchall()
    publish_metadata(url, name, [(code, description, None) for code, description in codes])
    return {"subjects": subjects, "events": events, "shards": written, "codes": len(codes), "set_aside": aside}


def _by_shard(batches: pa.RecordBatchReader) -> Iterator[tuple[int, pa.Table]]:
    """Rows that are sorted by their column `shard`, cut where it changes."""
    held, current = [], None
    for batch in batches:
        numbers = batch.column("shard").to_numpy()
        start = 0
        while start < len(batch):
            if numbers[start] != current and held:
                yield current, pa.Table.from_batches(held)
                held = []
            current = int(numbers[start])
            stop = int(numbers.searchsorted(current, side="right"))
            held.append(batch.slice(start, stop - start).select(EVENTS.names))
            start = stop
    if held:
        yield current, pa.Table.from_batches(held)
