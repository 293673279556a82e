# SPDX-License-Identifier: Apache-2.0
"""Linear kernels alone, over the weights of a model where they lie, on N threads at once.

The calls are those of a step: each thread has a contiguous part of every weight's rows and goes
through it in tiles.  No barrier stands between the weights.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsv4 import _core
from dsv4 import kernel_calls as calls
from dsv4.checkpoint import TensorInfo

FEW_TILE_ROWS, TILE_ROWS = 2048, 256  # of csrc/model/linear.c
FEW_TOKENS = 8  # DSV4_FEW_TOKENS
FORMATS = {"fp8": calls.W_FP8, "fp4": calls.W_FP4, "bf16": calls.W_BF16}
DTYPES = {"F8_E4M3": "fp8", "I8": "fp4", "BF16": "bf16"}
MOST_POOL = 2 << 30


class Matrix(NamedTuple):
    """A weight where it lies."""

    format: int  # enum dsv4_weight_format
    data: int
    scale: int
    rows: int
    cols: int
    nbytes: int  # with its scales


def matrices(
    tensors: Sequence[TensorInfo], address: Callable[[str], int]
) -> list[Matrix]:
    """The weights of linear layers among tensors, in the order in which a step uses them."""
    found = []
    sizes = {info.name: info.nbytes for info in tensors}
    for info in tensors:
        fmt = DTYPES.get(info.dtype)
        if fmt is None or len(info.shape) != 2 or not info.name.endswith(".weight"):
            continue
        scaled = info.name.removesuffix("weight") + "scale"
        scale = address(scaled) if fmt != "bf16" else 0
        rows, cols = info.shape[0], info.shape[1] * (2 if fmt == "fp4" else 1)
        nbytes = info.nbytes + sizes.get(scaled, 0)
        found.append(Matrix(FORMATS[fmt], address(info.name), scale, rows, cols, nbytes))
    return found


def pool(found: Sequence[Matrix], least: int) -> list[Matrix]:
    """The first matrices that are together at least so many bytes (or 2 GiB)."""
    taken: list[Matrix] = []
    total = 0
    for matrix in found:
        if total >= min(least, MOST_POOL):
            break
        taken.append(matrix)
        total += matrix.nbytes
    return taken


class Kernel(NamedTuple):
    """A variant of a linear operation."""

    op: str
    name: str
    address: int


def kernel(fmt: str, n_tok: int, disable: str | None) -> Kernel:
    """The variant that a step without these instruction sets runs for so many tokens."""
    op = f"linear_{'few' if n_tok <= FEW_TOKENS else 'many'}_{fmt}"
    (found,) = [
        Kernel(o, name, address)
        for o, name, address, chosen in _core.kernel_variants(disable or None)
        if o == op and chosen]
    return found


class Sweep:
    """Multiplies n_tok tokens with every matrix of a pool; `seconds` is one time through.

    Examples
    --------
    >>> w = np.full((64, 256), 0x3F80, np.uint16)
    >>> one = Matrix(FORMATS["bf16"], w.ctypes.data, 0, 64, 256, w.nbytes)
    >>> Sweep([one], 1).seconds(kernel("bf16", 1, None), 2) > 0
    True
    """

    def __init__(self, found: Sequence[Matrix], n_tok: int) -> None:
        self.found, self.n_tok = list(found), n_tok
        self.nbytes = sum(m.nbytes for m in found)
        self.operations = 2.0 * n_tok * sum(m.rows * m.cols for m in found)
        rows, cols = max(m.rows for m in found), max(m.cols for m in found)
        rng = np.random.default_rng(3)
        x = rng.standard_normal(n_tok * cols, np.float32)
        self.x = calls.aligned(2 * n_tok * cols).view(np.uint16)  # as in the engine
        self.x[:] = x.view(np.uint32) >> 16
        self.out = np.zeros(n_tok * rows, np.uint16)
        self.scratch = calls.linear_scratch(cols).nbytes
        self.weights = [
            calls.Weight(
                m.data, m.scale or None, m.rows, m.cols, m.format, 0,
                calls.SCALE_FOLD if m.scale else calls.SCALE_NONE)
            for m in found]
        self.calls = (calls.LinearArgs * len(found))(*(
            calls.LinearArgs(
                self.out.ctypes.data, self.x.ctypes.data, None, ctypes.pointer(weight), None,
                weight.rows, weight.cols, n_tok, 0, weight.rows, 0)
            for weight in self.weights))

    def seconds(self, which: Kernel, threads: int) -> float:
        """Wall time of all threads together."""
        tile = FEW_TILE_ROWS if self.n_tok <= FEW_TOKENS else TILE_ROWS
        room: Any = calls.aligned(threads * (self.scratch + 63) // 64 * 64 + 64 * threads)
        (taken,) = _core.time_linear(
            threads, which.address, memoryview(self.calls).cast("B"), room, tile, 1)
        return taken


