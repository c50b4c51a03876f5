"""What is kept between passes. Nothing is ever thrown out: what fits is never made twice."""
from __future__ import annotations

from collections.abc import Callable, Hashable

import psutil
from torch import Tensor

_SHARE = 0.25  # of the free memory of the machine, over all ranks


class Memory:
    """Tensors by their keys, as many as fit into `room` bytes."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._kept: dict[Hashable, Tensor] = {}

    @classmethod
    def of_machine(cls, ranks: int) -> Memory:
        """A rank's part of what is free."""
        return cls(int(psutil.virtual_memory().available * _SHARE / ranks))

    def get(self, key: Hashable) -> Tensor | None:
        return self._kept.get(key)

    def keep(self, key: Hashable, value: Tensor) -> Tensor:
        """-> the value, whether there was room for it or not."""
        size = value.numel() * value.element_size()
        if size <= self._room:
            self._room -= size
            self._kept[key] = value
        return value

    def get_or_make(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        kept = self._kept.get(key)
        return self.keep(key, make()) if kept is None else kept
