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
            found = table[name + IMPUTED] if draw is None else _element(table[name + DRAWS], draw)
            column = filled_in(column, found)
        arrays[name] = column
    return pa.table(arrays)


def storage_of(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of tensors as lists, any other as it is."""
    if not isinstance(column.type, pa.BaseExtensionType):
        return column
    return pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)


def filled_in(column: pa.ChunkedArray, found: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column where nothing was found, in the type of what was."""
    if not isinstance(found.type, pa.BaseExtensionType):
        return pc.if_else(found.is_null(), storage_of(column).cast(found.type), found)
    whole = filled_in(column, storage_of(found))
    return pa.chunked_array([pa.ExtensionArray.from_storage(found.type, chunk) for chunk in whole.chunks], found.type)


def _element(draws: pa.ChunkedArray, at: int) -> pa.ChunkedArray:
    """One of the draws of every record, which may be tensors."""
    kind = draws.type.value_type
    if not isinstance(kind, pa.BaseExtensionType):
        return pc.list_element(draws, at)
    found = pc.list_element(draws.cast(pa.list_(kind.storage_type)), at)
    return pa.chunked_array([pa.ExtensionArray.from_storage(kind, chunk) for chunk in found.chunks], kind)


def draws_of(table: pa.Table) -> int:
    """How many draws were stored, 0 where none were; from the first record in which something was missing."""
    for name in table.column_names:
        if name.endswith(DRAWS):
            lengths = pc.drop_null(pc.list_value_length(table[name]))
            if len(lengths):
                return lengths[0].as_py()
    return 0
