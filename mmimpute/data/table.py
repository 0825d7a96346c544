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
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction, create_table_with_add_actions

from mmimpute.data import storage
from mmimpute.data.shards import Shard, read_footer
from mmimpute.errors import DataError, UserError

FOOTER_THREADS = 16
UNSIGNED = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64(), pa.uint64(): pa.decimal128(20)}
COUNTS = "mmimpute.counts"  # key of an enriched shard's metadata: what was imputed in it
OUTPUT_KEY = re.compile(r".*-[0-9a-f]{8}-[0-9a-f]{32}\.parquet")  # what `output_key` makes


class Commit(NamedTuple):
    """What a commit did.

    version: of the table afterwards; counts: rows and imputed values of what was added; set_aside: input shard -> why its object,
    whose columns are not the table's, was left out.
    """

    version: int
    added: int
    removed: int
    counts: dict
    set_aside: dict[str, str]


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


def rows_of(url: str, shards: Iterable[Shard]) -> int:
    """Records of the newest version that were made from these input shards, in whatever version of them."""
    found, sources = _open(url), {source(s.key) for s in shards}
    objects = pa.table(found.get_add_actions()).select(["path", "num_records"]).to_pylist() if found else []
    return sum(o["num_records"] for o in objects if source_of(o["path"]) in sources)


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
    input shards stay. Objects whose columns do not fit the table's are left out, and what they were to replace stays.
    Nothing is committed where the table holds all of them already. Where another run commits at the
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
    new = [key for key in wanted if key not in state.keys]
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = dict(zip(new, pool.map(lambda key: read_footer(url, wanted[key]), new), strict=True))
    columns, misfits = settled_columns(_columns(table) if table else {}, footers)
    added = {key: footer for key, footer in footers.items() if key not in misfits}
    replaced = {source_of(key) for key in wanted if key not in misfits}.union(gone)
    removed = [key for key in state.keys if key not in wanted and source_of(key) in replaced]
    aside = {error.shard: str(error) for error in misfits.values()}
    if not added and not removed:
        return Commit(state.version, 0, 0, {}, aside)
    now = int(time.time() * 1000)
    actions = [AddAction(k, wanted[k].size, {}, now, True, json.dumps({"numRecords": f.num_rows})) for k, f in added.items()]
    actions += [RemoveAction(key, True, now) for key in removed]
    version = _write(table, url, actions, columns, _properties(mmimpute=json.dumps(lineage)))
    return Commit(version, len(added), len(removed), add_counts(added.values()), aside)


def _properties(**metadata: str) -> dict:
    """Of every commit: deltalake neither rebases it onto a later version, which would add a path twice, nor forgets old versions."""
    return {
        "commit_properties": CommitProperties(custom_metadata=metadata, max_commit_retries=0),
        "post_commithook_properties": PostCommitHookProperties(cleanup_expired_logs=False),
    }


def _write(table: DeltaTable | None, url: str, actions: list, columns: dict[str, pa.DataType], properties: dict) -> int:
    """columns: of the table from now on. Returns the version that it made. Raises DeltaError where that is there already."""
    if table is None:
        place, options = storage.normalise(url), storage.delta_options(url)
        create_table_with_add_actions(place, _delta(columns), actions, mode="error", storage_options=options, **properties)
        return 0
    known = _columns(table)
    if new := _delta({name: kind for name, kind in columns.items() if name not in known}).fields:
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


def settled_columns(
    known: dict[str, pa.DataType], footers: dict[str, pq.FileMetaData]
) -> tuple[dict[str, pa.DataType], dict[str, DataError]]:
    """The table's columns with those of the objects, by key, that fit it; and why the others do not. known: the columns that it has.

    Types of known columns stay, for no file is written anew. A new column has the type that most objects give it, or one that also
    holds what others do.
    """
    alike: dict[pa.Schema, list[str]] = {}
    for key in sorted(footers):
        alike.setdefault(footers[key].schema.to_arrow_schema().remove_metadata(), []).append(key)
    columns, misfits = dict(known), {}
    for arrow, keys in sorted(alike.items(), key=lambda found: -len(found[1])):
        found = columns_of(arrow)
        wider = {name: _wider(columns.get(name, kind), kind) for name, kind in found.items()}
        odd = next((name for name, kind in wider.items() if kind is None or kind != known.get(name, kind)), None)
        if odd is None:
            columns |= wider
        else:
            misfits |= {key: _misfit(key, footers[key], odd, found[odd], columns[odd]) for key in keys}
    return columns, misfits


def _wider(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """A type that holds the values of both."""
    if a == b:
        return a
    try:
        return pa.unify_schemas([pa.schema([("", a)]), pa.schema([("", b)])], promote_options="permissive").field(0).type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return None


def _misfit(key: str, footer: pq.FileMetaData, column: str, found: pa.DataType, expected: pa.DataType) -> DataError:
    shard = footer.metadata.get(b"mmimpute.input", key.encode()).decode()
    return DataError(shard, column, f"type {found}", f"{expected}, as the table has it", "convert the column and impute again")


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
    except (OSError, DeltaError) as error:
        answer = " ".join(re.sub(r"\x1b\[\d+m", "", str(error)).split())  # it is coloured, and of many lines
        if storage.is_s3(url) and isinstance(error, OSError):
            raise storage.refused(url, answer) from None
        raise UserError(
            f"{url}: no table that can be read; give the URL that `mmimpute impute --output` wrote to ({answer[:300]})"
        ) from None


def columns_of(arrow: pa.Schema) -> dict[str, pa.DataType]:
    """A file's columns, each in a type that Delta knows and in which readers find its values, or else in its own.

    A column of nulls is left out: it goes with any type.
    """
    kinds = {f.name: _delta_type(f.type) for f in arrow if not pa.types.is_null(f.type)}
    return kinds | _arrow(_delta(kinds))


def _columns(table: DeltaTable) -> dict[str, pa.DataType]:
    return _arrow(table.schema())


def _arrow(schema: Schema) -> dict[str, pa.DataType]:
    return {f.name: f.type for f in pa.schema(schema.to_arrow())}


def _delta(columns: dict[str, pa.DataType]) -> Schema:
    """The columns that a table can declare. Times of day, durations and such stay in the files, where its readers pass them over."""
    return Schema.from_arrow(pa.schema([column for column in columns.items() if _in_delta(column)]))


def _in_delta(column: tuple[str, pa.DataType]) -> bool:
    try:
        Schema.from_arrow(pa.schema([column]))
    except Exception:  # deltalake has no error of its own for it
        return False
    return True


def _delta_type(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return _delta_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _delta_type(kind.value_type)
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz and "UTC")  # Parquet has the moment and no zone
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_delta_type(kind.value_type))
    return pa.float32() if pa.types.is_float16(kind) else UNSIGNED.get(kind, kind)
