"""What can go wrong because of what a user gave us, as opposed to a defect of ours.

The command line prints these without a traceback and exits with `exit_code`.
"""

from typing import Any


class MmimputeError(Exception):
    """Base of every error that a user can mend."""

    exit_code = 1


class UserError(MmimputeError):
    """A wrong setting, specification, URL or credential."""

    exit_code = 2


class Unreachable(UserError):
    """A store that does not answer: a wrong endpoint, or an outage that another try may outlast."""


class DataError(MmimputeError):
    """A shard that breaks the input contract.

    The message says where (shard, column), what was found, what was expected and what to do;
    it never holds a subject id or a value of a record.
    """

    exit_code = 3

    def __init__(self, shard: str, column: str | None, found: str, expected: str, action: str) -> None:
        self.shard, self.column, self.found, self.expected, self.action = shard, column, found, expected, action
        where = f"shard {shard}" + (f", column {column!r}" if column else "")
        super().__init__(f"{where}: found {found}; expected {expected}; {action}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.shard, self.column, self.found, self.expected, self.action)


class SetAside(MmimputeError):
    """Shards were set aside, shard -> why. others: what became of those that were not."""

    exit_code = 3

    def __init__(self, aside: dict[str, str], others: str = "the others are published") -> None:
        self.aside, self.others = aside, others
        super().__init__(f"{len(aside)} shards set aside, {others}:\n" + "\n".join(aside.values()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.aside, self.others)
