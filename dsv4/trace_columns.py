# SPDX-License-Identifier: Apache-2.0
"""Arrays that grow by rows while a model runs, in memory or as `.npy` files that are mapped.

A file is a `.npy` file from the beginning: while it grows, its header tells the rows there is room
for; `Column.close` cuts it to what there is.  Space on disk is set aside before it is written, so
a full disk is an error and not a signal.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

HEADER = 128  # bytes before the data: a multiple of 64, room for the longest shape


class Row(NamedTuple):
    """What a row of a value is, as `_core.Model.value` tells."""

    integer: bool
    dims: tuple[int, ...]
    per_entry: bool  # one for each compressed entry, rather than each token
    widens: bool  # the last dimension grows by the visible entries


class Column:
    """Rows of one value of one layer.

    Parameters
    ----------
    row : Row
    ratio : int
        Tokens per entry of the layer; 0 where it has none.
    fill : float
        What stands where a row is older than an entry.
    path : Path or None
        A file to be made; None: memory.
    """

    def __init__(self, row: Row, ratio: int, fill: float, path: Path | None) -> None:
        self.row = row
        self.ratio = ratio
        self.fill = fill
        self.path = path
        self.n = self.width = 0  # rows, and entries they have grown by
        self.dtype = np.dtype(np.int32 if row.integer else np.float32)
        self._array: npt.NDArray[Any] = np.empty((0, *self._shape(0)), self.dtype)
        self._room = 0  # entries

    def _shape(self, width: int) -> tuple[int, ...]:
        return (*self.row.dims[:-1], self.row.dims[-1] + width)

    def needs(self, begin: int, end: int) -> tuple[int, int]:
        """Rows and entries for tokens [begin, end)."""
        width = end // self.ratio if self.row.widens else 0
        if self.row.per_entry:
            return end // self.ratio - begin // self.ratio, width
        return end - begin, width

    def nbytes(self, begin: int, end: int) -> int:
        """Bytes for tokens [begin, end)."""
        rows, width = self.needs(begin, end)
        return rows * int(np.prod(self._shape(width))) * self.dtype.itemsize

    @property
    def held(self) -> int:
        """Bytes set aside now."""
        return self._array.nbytes

    @property
    def values(self) -> npt.NDArray[Any]:
        """The rows: a view that stays as it is when there come more."""
        return self._array[: self.n, ..., : self._shape(self.width)[-1]]

    def reserve(self, rows: int, width: int) -> None:
        """Make room for so many rows and entries."""
        rows, width = max(rows, len(self._array), 1), max(width, self._room)
        if self.row.dims[-1] + width == 0:
            width = 1
        if rows > len(self._array) or width > self._room:
            self._array, self._room = self._new(rows, width), width

    def _new(self, rows: int, width: int) -> npt.NDArray[Any]:
        shape = (rows, *self._shape(width))
        if self.path is not None and width == self._room:
            return mapped(self.path, shape, self.dtype)
        path = None if self.path is None else self.path.with_suffix(".tmp")
        if path is None:
            array = np.empty(shape, self.dtype)
        else:
            array = mapped(path, shape, self.dtype)
        old = self._array[: self.n]
        array[: self.n, ..., : old.shape[-1]] = old
        array[: self.n, ..., old.shape[-1] :] = self.fill
        if path is not None and self.path is not None:
            os.replace(path, self.path)
        return array

    def part(self, first: int, n: int) -> npt.NDArray[Any]:
        """Rows to be written by a step: reserved, contiguous."""
        return self._array[first : first + n]

    def close(self) -> None:
        """Cut the file to what there is; the rows can still be read."""
        if self.path is None:
            return
        values = self.values
        if not values.size:
            self._array = values.copy()
            write_header(self.path, values.shape, self.dtype)
            os.truncate(self.path, HEADER)
        elif self.width == self._room:
            self._array = mapped(self.path, values.shape, self.dtype)
        else:
            path = self.path.with_suffix(".tmp")
            array = mapped(path, values.shape, self.dtype)
            array[:] = values
            os.replace(path, self.path)
            self._array, self._room = array, self.width


def write_header(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Write the first HEADER bytes of a `.npy` file, version 1.0."""
    text = repr({"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": shape})
    header = b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little")
    with open(path, "r+b" if path.exists() else "w+b") as file:
        file.write(header + text.encode().ljust(HEADER - 11) + b"\n")


def mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Map a `.npy` file of this shape for reading and writing; it is made, or cut or grown.

    Raises
    ------
    OSError
        No space left; the file is as long as it was.
    """
    size = HEADER + int(np.prod(shape)) * dtype.itemsize
    write_header(path, shape, dtype)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        file.truncate(size)
    return np.asarray(np.memmap(path, dtype, "r+", HEADER, shape))
