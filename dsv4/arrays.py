# SPDX-License-Identifier: Apache-2.0
"""What arguments of models, sessions and layers have in common: their types, their checks, bf16."""

import operator
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Logits = Literal["last", "all", "none"]
Prompt: TypeAlias = str | Sequence[int] | npt.NDArray[np.integer[Any]]
Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

WANT = {"none": 0, "last": 1, "all": 2}


def to_bf16(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint16]:
    """Float values as bf16 codes, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bf16(codes: npt.NDArray[np.uint16]) -> Float32:
    """The float32 values of bf16 codes."""
    return (codes.astype(np.uint32) << 16).view(np.float32)


def wanted_rows(rows: Float32 | None, want: int) -> Float32 | None:
    """The logits a caller wants, of those a step gave; it may have given more for a trace."""
    if rows is None or want == WANT["none"]:
        return None
    return rows if want == WANT["all"] else rows[-1:]


def some_rows(rows: int | slice, n: int, name: str = "") -> tuple[int, int | None]:
    """The first row and how many, of n; None for an int: one row without its dimension."""
    if isinstance(rows, slice):
        first, end, step = rows.indices(n)
        if step != 1:
            raise ValueError(f"{name}got rows in steps of {step}, wanted step 1")
        return first, max(0, end - first)
    first = operator.index(rows)
    if not -n <= first < n:
        raise IndexError(f"{name}got row {first}, wanted one of {n}")
    return first % n, None


def check_room(position: int, n: int, context: int, name: str) -> None:
    """ValueError unless n more tokens fit into the context."""
    if n > context - position:
        raise ValueError(
            f"{name}: got {n} tokens at position {position}, wanted at most {context - position}: "
            f"the context of this model is {context}")


def check_logits(logits: object) -> int:
    """The engine's number for the rows that are wanted."""
    if not isinstance(logits, str) or logits not in WANT:
        raise ValueError(f"logits: got {logits!r}, wanted 'last', 'all' or 'none'")
    return WANT[logits]
