"""Enriched records back into memory: any version of the table, as it is stored or completed, or as data sets for multiple imputation."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pyarrow as pa

from mmimpute.data.completing import complete, draws_of
from mmimpute.data.shards import fetch_table
from mmimpute.data.table import table_at
from mmimpute.errors import UserError

Kind = Literal["polars", "pandas", "arrow", "ray"]


def read(url: str, version: int | None = None, *, completed: bool = True, draws: bool = False, kind: Kind = "pandas") -> Any:
    """The records of an enriched table, also on s3://.

    version: as `mmimpute runs` lists them; None is the newest. completed: every column X holds what was observed and, where that is
    missing, what was imputed, and no X__... is beside it; false leaves the table as it is stored. draws: a list of M tables in its
    place, each completed by one of the M draws that were stored; fit the analysis to each and pool by Rubin's rules (`mmimpute.rubin`).
    kind: a pandas or Polars data frame, an Arrow table, or a Ray dataset, which streams from storage.
    Raises UserError where there is no such table or version, or it has no draws.
    """
    keys = sorted(table_at(url, version).keys)
    if draws:
        return [_read(url, keys, partial(complete, draw=m), kind) for m in range(_stored_draws(url, keys))]
    return _read(url, keys, complete if completed else lambda t: t, kind)


def _stored_draws(url: str, keys: list[str]) -> int:
    for key in keys:
        if count := draws_of(fetch_table(url, key)):
            return count
    raise UserError(f"{url}: the table holds no draws; `mmimpute impute --draws 20` writes them")


def _read(url: str, keys: list[str], change: Callable[[pa.Table], pa.Table], kind: Kind) -> Any:
    if kind == "ray":
        from mmimpute.cluster.ingest import enriched  # a second of imports, and of no use to the others

        return enriched(url, keys, change)
    table = pa.concat_tables([change(fetch_table(url, key)) for key in keys], promote_options="permissive")
    if kind == "polars":
        import polars

        return polars.from_arrow(table)
    return table.to_pandas() if kind == "pandas" else table
