"""A limit on what may be built from settings that came from outside."""

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Budget(TorchDispatchMode):
    """Raises ValueError in the place of the parameter or buffer with which more than `most` values have been made inside the context.

    Memory is claimed when it is first written to, so what is empty may be made before it is refused.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes more than a second

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if op in (aten.zeros.default, aten.ones.default, aten.full.default):  # these write what they make
            self._spend(math.prod(args[0]))
        elif op is aten.eye.default:
            self._spend(args[0] ** 2)
        made = op(*args, **(kwargs or {}))
        if op is aten.empty.memory_format:
            self._spend(made.numel())
        return made

    def _spend(self, values: int) -> None:
        self.left -= values
        if self.left < 0:
            raise ValueError("the settings ask for far more values than there are weights")
