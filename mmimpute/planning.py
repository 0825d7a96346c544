"""What a job works on: the shards whose footers fit the cohort, and those that are set aside."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pyarrow as pa
import pyarrow.parquet as pq

from mmimpute.data.schema import CohortSchema, check_columns, draft_schema, is_list, storage_type
from mmimpute.data.shards import Shard, list_shards, list_widths, read_footer
from mmimpute.data.table import FOOTER_THREADS, digest
from mmimpute.errors import DataError, UserError
from mmimpute.spec import CohortSpec

FIRST = 50  # shards whose footers show whether a cohort is the model's


@dataclass(frozen=True)
class Survey:
    """Shards of a cohort. rows: records in the good ones, 0 where footers were not read; set_aside: bad shard -> why."""

    url: str
    schema: CohortSchema
    shards: list[Shard]
    rows: int
    set_aside: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """Stands for which shards there are and what is in them."""
        return digest(self.schema.model_dump_json(), *(f"{s.key} {s.etag}" for s in self.shards))


def survey(url: str, spec: CohortSpec) -> Survey:
    """Lists the shards and checks every footer against the spec; kinds and levels are still as in the spec.

    Raises UserError where there is no shard, none is good, or the spec names columns that most shards do not have.
    """
    shards, footers, errors = _footers(url)
    arrow = common_schema([f.schema.to_arrow_schema() for f in footers.values()], errors)
    if unknown := [c for c in spec.subgroups if c not in arrow.names or is_list(storage_type(arrow.field(c).type))]:
        raise UserError(f"spec: subgroups names {unknown[0]!r}, which is no column of single values in the shards")
    named = [m.column for m in spec.modalities.values() if m.column in arrow.names]
    lists = [c for c in named if is_list(storage_type(arrow.field(c).type))]
    widths = list_widths(url, [s for s in shards if s.key in footers], lists)
    if unknown := set(lists) - set(widths):
        raise UserError(f"spec: column {sorted(unknown)[0]!r} holds no list in any shard; leave its modality out")
    return _checked(url, draft_schema(spec, arrow, widths), shards, footers, errors)


def outcome_columns(found: Survey, spec: CohortSpec) -> list[str]:
    """The columns of single values among a cohort's outcomes, by its first few shards."""
    _, footers, errors = _read_footers(found.url, found.shards[:FIRST])
    arrow = common_schema([f.schema.to_arrow_schema() for f in footers.values()], errors)
    return [f.name for f in arrow if any(fnmatchcase(f.name, p) for p in spec.outcomes) and not is_list(storage_type(f.type))]


def columns_of(url: str) -> pa.Schema:
    """The columns that most shards under a URL have. Raises UserError where no shard is readable."""
    _, footers, errors = _footers(url)
    return common_schema([f.schema.to_arrow_schema() for f in footers.values()], errors)


def survey_for(url: str, schema: CohortSchema) -> Survey:
    """The same against a model's schema. Raises UserError where no shard fits the model."""
    return _checked(url, schema, *_footers(url))


def survey_of(url: str, shards: list[Shard], schema: CohortSchema) -> Survey:
    """The same of some shards only."""
    return _checked(url, schema, *_read_footers(url, shards))


def survey_new(url: str, shards: list[Shard], new: list[Shard], rows: int, schema: CohortSchema) -> Survey:
    """All shards of a cohort, of which only the new ones' footers are read; the others hold `rows` records.

    Raises UserError where all are new and none fits.
    """
    if len(new) == len(shards):
        return survey_of(url, shards, schema)
    _, footers, errors = _read_footers(url, new)
    good = _fitting(schema, new, footers, errors)
    rows += sum(footers[s.key].num_rows for s in good)
    return Survey(url, schema, [s for s in shards if s.key not in errors], rows, dict(sorted(errors.items())))


def listed_for(url: str, schema: CohortSchema) -> Survey:
    """The shards as they are listed: footers are checked where each is read, so that a plan costs a listing and no more.

    Raises UserError where none of the first few shards fits the model: that is another cohort.
    """
    shards = list_shards(url)
    _checked(url, schema, *_read_footers(url, shards[:FIRST]))
    return Survey(url, schema, shards, 0, {})


def _footers(url: str) -> tuple[list[Shard], dict[str, pq.FileMetaData], dict[str, str]]:
    return _read_footers(url, list_shards(url))


def _read_footers(url: str, shards: list[Shard]) -> tuple[list[Shard], dict[str, pq.FileMetaData], dict[str, str]]:
    footers, errors = {}, {}

    def read(shard: Shard) -> None:
        try:
            footers[shard.key] = read_footer(url, shard)
        except DataError as error:
            errors[shard.key] = str(error)

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        list(pool.map(read, shards))
    return shards, footers, errors


def common_schema(schemas: list[pa.Schema], errors: dict[str, str]) -> pa.Schema:
    """The columns that most shards have, each in the type that most of them give it."""
    if not schemas:
        raise UserError(f"no readable shard: {next(iter(errors.values()))}")
    types: dict[str, Counter] = {}
    for schema in schemas:
        for field in schema:
            types.setdefault(field.name, Counter())[field.type] += 1
    return pa.schema([(name, seen.most_common(1)[0][0]) for name, seen in types.items() if seen.total() > len(schemas) / 2])


def _checked(url: str, schema: CohortSchema, shards: list[Shard], footers: dict, errors: dict[str, str]) -> Survey:
    good = _fitting(schema, shards, footers, errors)
    if not good:
        raise UserError(f"{url}: no shard fits the cohort; the first of {len(shards)}: {errors[shards[0].key]}")
    rows = sum(footers[s.key].num_rows for s in good)
    return Survey(url, schema, good, rows, dict(sorted(errors.items())))


def _fitting(schema: CohortSchema, shards: list[Shard], footers: dict, errors: dict[str, str]) -> list[Shard]:
    """The shards whose footer fits the schema; the others are told in `errors`."""
    good = []
    for shard in shards:
        if shard.key not in footers:
            continue
        try:
            check_columns(schema, footers[shard.key].schema.to_arrow_schema(), shard.key)
            if not footers[shard.key].num_rows:
                raise DataError(shard.key, None, "no records", "at least one", "remove the shard")
            good.append(shard)
        except DataError as error:
            errors[shard.key] = str(error)
    return good


def by_layout(url: str, shards: list[Shard], columns: list[str]) -> list[list[Shard]]:
    """The shards in groups that have the same of these columns, in the same types: what one `read_parquet` can read."""

    def layout(shard: Shard) -> str:
        arrow = read_footer(url, shard).schema.to_arrow_schema()
        return str([arrow.field(c).type if c in arrow.names else None for c in columns])

    groups: dict[str, list[Shard]] = {}
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        for shard, types in zip(shards, pool.map(layout, shards), strict=True):
            groups.setdefault(types, []).append(shard)
    return list(groups.values())


def to_table(found: Survey) -> pa.Table:
    """A survey as a table, so that stages may pass on its URL."""
    columns = dict(zip(Shard._fields, map(list, zip(*found.shards, strict=True)), strict=True))
    rest = {"url": found.url, "rows": found.rows, "set_aside": found.set_aside, "schema": found.schema.model_dump()}
    return pa.table(columns).replace_schema_metadata({"survey": json.dumps(rest)})


def from_table(table: pa.Table) -> Survey:
    rest = json.loads(table.schema.metadata[b"survey"])
    schema = CohortSchema.model_validate(rest["schema"])
    return Survey(rest["url"], schema, [Shard(**row) for row in table.to_pylist()], rest["rows"], rest["set_aside"])
