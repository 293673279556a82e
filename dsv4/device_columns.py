# SPDX-License-Identifier: Apache-2.0
"""Rows of a trace that grow in the memory of a GPU."""

from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4 import _core
from dsv4.device_array import DeviceArray
from dsv4.memory import size
from dsv4.trace_columns import Column, Row

if TYPE_CHECKING:
    from dsv4.model import Model


class DeviceColumn(Column):
    """Like `Column`, on the GPU that computes the layer; `values` is a `DeviceArray`."""

    def __init__(self, row: Row, ratio: int, fill: float, model: "Model", layer: int) -> None:
        super().__init__(row, ratio, fill, None)
        self._core, self.layer = model._core, layer
        self._rows: DeviceArray | None = None

    @property
    def held(self) -> int:
        """Bytes set aside now."""
        return 0 if self._rows is None else self._rows.nbytes

    @property
    def values(self) -> Any:
        """The rows: a view that stays as it is when there come more."""
        if self._rows is None:
            self.reserve(1, 0)
        assert self._rows is not None
        shape = (self.n, *self._shape(self.width))
        return DeviceArray(self._rows._memory, 0, shape, self.dtype.name, self._rows.strides)

    def reserve(self, rows: int, width: int) -> None:
        """Make room for so many rows and entries; MemoryError where the GPU has none."""
        old = self._rows
        rows, width = max(rows, len(old) if old else 1), max(width, self._room)
        if self.row.dims[-1] + width == 0:
            width = 1
        if old is not None and rows <= len(old) and width <= self._room:
            return
        shape = (rows, *self._shape(width))
        nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        memory = _core.Memory(self._core, self.layer, nbytes)
        if old is not None and self.n:
            fill = int(np.array(self.fill, self.dtype).view(np.uint32))
            inner = self.n * int(np.prod(shape[1:-1], dtype=np.int64))
            memory.widen(old._memory, inner, shape[-1], old.shape[-1], fill)
        self._rows, self._room = DeviceArray(memory, 0, shape, self.dtype.name), width

    def part(self, first: int, n: int) -> Any:
        """Rows to be written by a step: reserved, contiguous."""
        rows = self._rows
        assert rows is not None
        return rows._memory, first * rows.strides[0] * rows.itemsize, n, self._room

    def close(self) -> None:
        """Nothing: the rows stay where they are."""


def check_room(columns: list[DeviceColumn], begin: int, end: int) -> None:
    """MemoryError unless tokens [begin, end) have room on every GPU.

    A column that grows has its old rows until the new ones are there.
    """
    need: dict[int, int] = {}
    free: dict[int, int] = {}
    rooms: dict[int, tuple[int, int] | None] = {}
    for column in columns:
        wanted = column.nbytes(begin, end)
        if wanted <= column.held:
            continue
        if column.layer not in rooms:
            rooms[column.layer] = _core.memory_room(column._core, column.layer)
        room = rooms[column.layer]
        assert room is not None
        need[room[0]], free[room[0]] = need.get(room[0], 0) + wanted, room[1]
    for device, total in need.items():
        if total > free[device]:
            raise MemoryError(
                f"trace: {end - begin} tokens need {total:,} bytes ({size(total)}), "
                f"{free[device]:,} ({size(free[device])}) are free on cuda:{device}; wanted fewer "
                "layers, parts or tokens, or device=False")
