"""Enriched records as complete ones: what was observed, and where that is missing what was imputed."""

import pyarrow as pa
import pyarrow.compute as pc

from mmimpute.data.schema import FROM_PRIOR, is_output

IMPUTED, DRAWS = "__imputed", "__draws"


def complete(table: pa.Table, draw: int | None = None) -> pa.Table:
    """Every column X with no null where X__imputed or X__draws says what is missing; of what imputation wrote only z0 stays.

    draw: which of the M draws completes the records; None: the predictive mean.
    """
    names, arrays = set(table.column_names), {}
    for name in table.column_names:
        if name == FROM_PRIOR or is_output(name, names):
            continue
        column = table[name]
        if name + IMPUTED in names:
            found = table[name + IMPUTED] if draw is None else pc.list_element(table[name + DRAWS], draw)
            column = pc.if_else(found.is_null(), column.cast(found.type), found)
        arrays[name] = column
    return pa.table(arrays)


def draws_of(table: pa.Table) -> int:
    """How many draws were stored, 0 where none were; from the first record in which something was missing."""
    for name in table.column_names:
        if name.endswith(DRAWS):
            lengths = pc.drop_null(pc.list_value_length(table[name]))
            if len(lengths):
                return lengths[0].as_py()
    return 0
