"""Events in a window become values: vectorised over all subjects of a shard.

Shapes: E events, R records, F features of one modality.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mmimpute.standards.meds import STATIC, Events

DAY = 86_400_000_000  # microseconds


class Window(NamedTuple):
    """Events before the index times of their subjects, and in them. S: of every subject, STATIC where it has no record.

    age: E, days, NaN of a static event, which is in every window; negative or infinite where an event is in none.
    """

    index: np.ndarray
    age: np.ndarray

    def holds(self, days: float) -> np.ndarray:
        """Which events are in a window of this length."""
        return np.isnan(self.age) | ((self.age >= 0) & (self.age <= days) & np.isfinite(self.age))


def last_times(events: Events) -> np.ndarray:
    """Of each subject the time of the last event; STATIC where none has a time."""
    return np.maximum.reduceat(events.time, events.first)


def window(events: Events, index: np.ndarray) -> Window:
    """index: of each subject, STATIC where it has no record."""
    at, static = index[events.subject], events.time == STATIC
    age = (at - np.where(static, at, events.time)) / DAY
    age[static] = np.nan
    age[at == STATIC] = np.inf
    return Window(index, age)


class Groups(NamedTuple):
    """Events of one record and one column together, in the order of time. row, column, first, size: of each group; order: the events."""

    row: np.ndarray
    column: np.ndarray
    first: np.ndarray
    size: np.ndarray
    order: np.ndarray


def groups(row: np.ndarray, column: np.ndarray, width: int) -> Groups:
    """column: < width."""
    key = row * width + column
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])) if len(key) else np.empty(0, np.int64)
    size = np.diff(np.append(first, len(key)))
    return Groups(key[first] // width, key[first] % width, first, size, order)


def aggregates(
    row: np.ndarray, column: np.ndarray, age: np.ndarray, value: np.ndarray, width: int
) -> Iterator[tuple[str, Groups, np.ndarray]]:
    """Every kind of value, of every group that has it: (its name, groups, values). Events are sorted by time within a row."""
    found = groups(row, column, width)
    last = found.order[found.first + found.size - 1]
    yield "presence", found, np.ones(len(last))
    yield "count", found, found.size.astype(float)
    yield "since", found, age[last]
    has = ~np.isnan(value)
    found = groups(row[has], column[has], width)
    if len(found.order):  # reduceat knows no empty arrays
        value = value[has][found.order]
        yield "last", found, value[found.first + found.size - 1]
        yield "mean", found, np.add.reduceat(value, found.first) / found.size
        yield "min", found, np.minimum.reduceat(value, found.first)
        yield "max", found, np.maximum.reduceat(value, found.first)
