"""The enriched table: which objects belong to it, committed to a Delta log in one atomic step.

The key of an output is a pure function of what it was made from, so a retry or a twin writes the same object, and
what is done is found by listing.
"""

import hashlib
import json
import re
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Field, PostCommitHookProperties, Schema
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction, create_table_with_add_actions

from mmimpute.data import storage
from mmimpute.data.shards import Shard, read_footer
from mmimpute.errors import UserError

FOOTER_THREADS = 16
UNSIGNED = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64(), pa.uint64(): pa.decimal128(20)}
COUNTS = "mmimpute.counts"  # key of an enriched shard's metadata: what was imputed in it
OUTPUT_KEY = re.compile(r".*-[0-9a-f]{8}-[0-9a-f]{32}\.parquet")  # what `output_key` makes


class Commit(NamedTuple):
    """What a commit did. version: of the table afterwards; counts: rows and imputed values of what was added."""

    version: int
    added: int
    removed: int
    counts: dict


class TableState(NamedTuple):
    """A table at one version; version None: nothing was ever committed."""

    version: int | None
    keys: frozenset[str]
    rows: int


class Snapshot(NamedTuple):
    """One version of a table: its columns in Delta's types, and when each of its objects was committed."""

    version: int
    columns: pa.Schema
    committed_at: dict[str, datetime]


def digest(*parts: str) -> str:
    """32 hex digits that stand for the parts."""
    return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=16).hexdigest()


def output_key(shard: Shard, model_digest: str, settings_digest: str) -> str:
    """`<readable name>-<digest of the input's key>-<digest of all that the content depends on>.parquet`."""
    return f"{source(shard.key)}-{digest(shard.key, shard.etag, model_digest, settings_digest)}.parquet"


def source(shard: str) -> str:
    """The part of an output's key that is the same for every version of its input shard, from the shard's key."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", shard.removesuffix(".parquet"))[-80:].lstrip("._")
    return f"{stem}-{digest(shard)[:8]}"


def source_of(key: str) -> str:
    """The same, from an output's key."""
    return key.rsplit("-", 1)[0]


def published(url: str) -> Iterator[Shard]:
    """Every enriched object under the table's URL, committed or not."""
    if storage.is_s3(url) or storage.local_path(url).exists():  # a local folder is made by the first shard
        yield from (Shard(*o) for o in storage.objects(url, ".parquet"))


def expected(shards: Iterable[Shard], model_digest: str, settings_digest: str) -> dict[str, Shard]:
    """Key of the enriched version -> input shard."""
    return {output_key(shard, model_digest, settings_digest): shard for shard in shards}


def outstanding(url: str, wanted: dict[str, Shard]) -> list[Shard]:
    """The input shards of `wanted` whose enriched version is not published."""
    todo = dict(wanted)
    for done in published(url):
        todo.pop(done.key, None)
    return list(todo.values())


def published_counts(url: str, key: str) -> dict | None:
    """Rows and imputed values of an enriched shard, as it says itself; None where it is not published."""
    size = storage.size(url, key)
    return None if size is None else json.loads(read_footer(url, Shard(key, "", size)).metadata[COUNTS.encode()])


def table_state(url: str) -> TableState:
    return _state(_open(url))


def table_at(url: str, version: int | None) -> TableState:
    """The state of a table at a version, None being the newest. Raises UserError where there is no such table or version."""
    table = _open(url)
    if table is None:
        raise _no_table(url)
    if version is not None:
        if not 0 <= version <= table.version():
            raise UserError(f"{url}: no version {version}; the versions are 0 to {table.version()}")
        table.load_as_version(version)
    return _state(table)


def committed(url: str) -> TableState:
    """The state of a table that has to be there. Raises UserError where it is not."""
    return table_at(url, None)


def snapshot(url: str) -> Snapshot:
    """The newest version. Raises UserError where there is no table."""
    table = _open(url)
    if table is None:
        raise _no_table(url)
    actions = pa.table(table.get_add_actions())
    times = actions["modification_time"].cast(pa.timestamp("ms", "UTC"))
    committed_at = dict(zip(actions["path"].to_pylist(), times.to_pylist(), strict=True))
    return Snapshot(table.version(), pa.schema(table.schema().to_arrow()), committed_at)


def _no_table(url: str) -> UserError:
    return UserError(f"{url}: no table there; give the URL that `mmimpute impute --output` wrote to")


def _state(table: DeltaTable | None) -> TableState:
    if table is None:
        return TableState(None, frozenset(), 0)
    objects = pa.table(table.get_add_actions())
    return TableState(table.version(), frozenset(objects["path"].to_pylist()), pc.sum(objects["num_records"]).as_py() or 0)


def history(url: str) -> list[dict]:
    """What every commit with a lineage was, newest first: {version, time, lineage}; nothing where there is no table."""
    found = _open(url)
    commits = found.history() if found else []
    return [
        {"version": c["version"], "time": datetime.fromtimestamp(c["timestamp"] / 1000, UTC), "lineage": json.loads(c["mmimpute"])}
        for c in commits
        if "mmimpute" in c
    ]


def commit(url: str, wanted: Iterable[Shard], lineage: dict, gone: Collection[str] = ()) -> Commit:
    """Makes exactly these objects the enriched versions of their input shards, in one commit.

    wanted: published objects of this run. gone: sources (see `source`) whose objects leave the table. Objects of other
    input shards stay. Nothing is committed where the table holds all of them already. Where another run commits at the
    same moment one of the two wins, and the other looks again at what is left to do.
    Raises DeltaError where a commit fails for another reason.
    """
    objects = {o.key: o for o in wanted}
    while True:
        table = _open(url)
        state = _state(table)
        try:
            return _commit_onto(table, state, url, objects, lineage, gone)
        except DeltaError:
            if table_state(url).version == state.version:
                raise  # nobody was faster: another try would fail as well


def _commit_onto(
    table: DeltaTable | None, state: TableState, url: str, wanted: dict[str, Shard], lineage: dict, gone: Collection[str]
) -> Commit:
    """A commit that is the next one after `state`, or fails."""
    added = [o for key, o in wanted.items() if key not in state.keys]
    replaced = {source_of(key) for key in wanted}.union(gone)
    removed = [key for key in state.keys if key not in wanted and source_of(key) in replaced]
    if not added and not removed:
        return Commit(state.version, 0, 0, {})
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda o: read_footer(url, o), added))
    now = int(time.time() * 1000)
    actions = [AddAction(o.key, o.size, {}, now, True, json.dumps({"numRecords": f.num_rows})) for o, f in zip(added, footers, strict=True)]
    actions += [RemoveAction(key, True, now) for key in removed]
    version = _write(table, url, actions, footers, _properties(mmimpute=json.dumps(lineage)))
    return Commit(version, len(added), len(removed), add_counts(footers))


def _properties(**metadata: str) -> dict:
    """Of every commit: deltalake neither rebases it onto a later version, which would add a path twice, nor forgets old versions."""
    return {
        "commit_properties": CommitProperties(custom_metadata=metadata, max_commit_retries=0),
        "post_commithook_properties": PostCommitHookProperties(cleanup_expired_logs=False),
    }


def _write(table: DeltaTable | None, url: str, actions: list, footers: list[pq.FileMetaData], properties: dict) -> int:
    """Returns the version that it made. Raises DeltaError where that is there already."""
    if table is None:
        place, options = storage.normalise(url), storage.delta_options(url)
        create_table_with_add_actions(place, delta_schema(_union(footers)), actions, mode="error", storage_options=options, **properties)
        return 0
    if new := _new_fields(table, footers):
        table.alter.add_columns(new, **_properties())
    version = table.version()
    table.create_write_transaction(actions, mode="append", schema=table.schema(), **properties)
    return version + 1


def vacuum(url: str, older_than: timedelta, dry_run: bool = False) -> list[Shard]:
    """Removes the leftovers and returns them. Raises UserError as `leftovers`."""
    found = leftovers(url, older_than)
    if not dry_run:
        storage.delete(url, [o.key for o in found])
    return found


def leftovers(url: str, older_than: timedelta) -> list[Shard]:
    """Enriched objects under the table's URL, older than that, which no version of the table refers to.

    They come from runs that died before their commit, and from inputs that changed before it.
    Raises UserError where there is no table.
    """
    # Listed before the log is read: what is committed meanwhile is seen to be in use.
    old = [Shard(*o) for o in storage.objects(url, ".parquet", before=datetime.now(UTC) - older_than)]
    used = committed(url).keys | _logged(url)
    return [o for o in old if OUTPUT_KEY.fullmatch(o.key) and o.key not in used]


def _logged(url: str) -> set[str]:
    """Every path that a commit in the log adds or removes: what a version holds is there still, or was removed since."""
    log = storage.join(url, "_delta_log")

    def paths(entry: storage.StoredObject) -> set[str]:
        actions = map(json.loads, storage.read(log, entry.key).splitlines())
        return {action[kind]["path"] for action in actions for kind in ("add", "remove") if kind in action}

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return set().union(*pool.map(paths, storage.list_objects(log, ".json")))


def _union(footers: list[pq.FileMetaData]) -> pa.Schema:
    """All columns, each in a type that holds what every file has; lists of one kind before they are compared."""
    return pa.unify_schemas([_plain(f.schema.to_arrow_schema()) for f in footers], promote_options="permissive")


def add_counts(footers: Iterable[pq.FileMetaData]) -> dict:
    """Rows, rows imputed from the prior, and rows and values imputed per modality, over enriched shards."""
    total = {"rows": 0, "from_prior": 0, "imputed": {}}
    for footer in footers:
        counts = json.loads(footer.metadata[COUNTS.encode()])
        total["rows"] += counts["rows"]
        total["from_prior"] += counts["from_prior"]
        for name, entry in counts["imputed"].items():
            sums = total["imputed"].setdefault(name, {"rows": 0, "values": 0})
            for key, value in entry.items():
                sums[key] += value
    return total


def _open(url: str) -> DeltaTable | None:
    try:
        return DeltaTable(storage.normalise(url), storage_options=storage.delta_options(url))
    except TableNotFoundError:
        return None


def delta_schema(arrow: pa.Schema) -> Schema:
    """The table's schema: what the files hold, in the types that Delta knows (no unsigned integers, no nanoseconds)."""
    return Schema.from_arrow(_plain(arrow))


def _plain(arrow: pa.Schema) -> pa.Schema:
    return pa.schema([pa.field(f.name, _delta_type(f.type)) for f in arrow])


def _delta_type(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return _delta_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _delta_type(kind.value_type)
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_delta_type(kind.value_type))
    return UNSIGNED.get(kind, kind)


def _new_fields(table: DeltaTable, footers: list[pq.FileMetaData]) -> list[Field]:
    known = {f.name for f in table.schema().fields}
    return [f for f in delta_schema(_union(footers)).fields if f.name not in known] if footers else []
