# SPDX-License-Identifier: Apache-2.0
"""What the parts of a layer have in common: a layer of an engine's model, arrays in and out.

Values go in as floats, rounded to bf16 to nearest, ties to even, and come out as float32 that
holds bf16 values: what the layer computes with (SPEC A.2).
"""

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4 import _core
from dsv4.arrays import Float32, to_bf16

BF16 = npt.NDArray[np.uint16]


class Kind(IntEnum):
    """enum dsv4_part_kind of csrc/dsv4.h."""

    COLLAPSE = 0
    SPREAD = 1
    ROUTE = 2
    MOE = 3
    EXPERT = 4
    COMPRESS = 5
    INDEX = 6
    ATTEND = 7
    OUTPUT = 8
    ATTENTION = 9


class Part:
    """A part of layer `index` of an engine's model."""

    def __init__(self, core: _core.Model, index: int, name: str) -> None:
        self._core, self._index, self._name = core, index, name

    def _run(
        self, kind: Kind, *inputs: Any, number: int = 0, state: "_core.Session | None" = None,
        ids: Any = None,
    ) -> tuple[Any, ...]:
        return _core.part(self._core, kind, self._index, number, state, ids, inputs)


def numbers(values: npt.ArrayLike, name: str, **dims: int) -> Float32:
    """float32 [n, *dims]; TypeError and ValueError say what was got and wanted."""
    array = np.asarray(values)
    if array.dtype.kind != "f":
        raise TypeError(f"{name}: got an array of {array.dtype}, wanted floats")
    if array.ndim != 1 + len(dims) or array.shape[1:] != tuple(dims.values()) or not len(array):
        named = ", ".join(("n", *dims))
        sizes = ", ".join(("n", *map(str, dims.values())))
        comma = "" if dims else ","
        raise ValueError(f"{name}: got shape {array.shape}, wanted ({named}{comma}) = "
                         f"({sizes}{comma}), n > 0")
    return np.ascontiguousarray(array, np.float32)


def rows(values: npt.ArrayLike, name: str, **dims: int) -> BF16:
    """The same as bf16 codes."""
    return to_bf16(numbers(values, name, **dims))


def same_rows(array: npt.NDArray[Any], name: str, n: int, of: str) -> None:
    """ValueError unless there is one row for each of the n rows of `of`."""
    if len(array) != n:
        raise ValueError(f"{name}: got {len(array)}, wanted one for each of the {n} rows of {of}")
