# SPDX-License-Identifier: Apache-2.0
"""The test door: single kernels by address through ctypes, on NumPy arrays.

Structures mirror kernels/kernels.h field by field.  DSV4_CPU_DISABLE has no effect here: every
variant of this CPU is offered.
"""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, c_float, c_int32, c_ssize_t, c_uint8, c_void_p
from typing import Any

import numpy as np

from dsv4 import _core  # type: ignore[attr-defined]

W_FP8, W_FP4, W_BF16, W_F32 = range(4)
SCALE_E8M0, SCALE_F32, SCALE_BF16 = range(3)
SCALE_NONE, SCALE_FOLD, SCALE_BLOCK, SCALE_ROUND = range(4)
KV_FP8, KV_BF16 = range(2)


class Weight(Structure):
    _fields_ = [
        ("data", c_void_p), ("scale", c_void_p), ("rows", c_int32), ("cols", c_int32),
        ("format", c_uint8), ("scale_type", c_uint8), ("scale_rule", c_uint8),
    ]


class LinearArgs(Structure):
    _fields_ = [
        ("out", c_void_p), ("x", c_void_p), ("tok", c_void_p), ("w", POINTER(Weight)),
        ("scratch", c_void_p), ("ld_out", c_ssize_t), ("ld_x", c_ssize_t), ("n_tok", c_int32),
        ("row0", c_int32), ("row1", c_int32), ("out_f32", c_int32),
    ]


class HcPreArgs(Structure):
    _fields_ = [
        ("x", c_void_p), ("post", c_void_p), ("comb", c_void_p), ("streams", c_void_p),
        ("dots", c_void_p), ("scale", c_void_p), ("base", c_void_p), ("hc", c_int32),
        ("d_model", c_int32), ("sinkhorn_iters", c_int32), ("norm_eps", c_float),
        ("hc_eps", c_float),
    ]


class HcPostArgs(Structure):
    _fields_ = [
        ("out", c_void_p), ("y", c_void_p), ("streams", c_void_p), ("post", c_void_p),
        ("comb", c_void_p), ("hc", c_int32), ("d_model", c_int32), ("c0", c_int32), ("c1", c_int32),
    ]


class AttentionArgs(Structure):
    _fields_ = [
        ("out", c_void_p), ("q", c_void_p), ("keys", c_void_p), ("sink", c_void_p),
        ("scratch", c_void_p), ("n_key", c_int32), ("n_head", c_int32), ("d_head", c_int32),
        ("d_rope", c_int32), ("scale", c_float), ("format", c_int32),
    ]


class PoolArgs(Structure):
    _fields_ = [
        ("out", c_void_p), ("k", c_void_p), ("gate", c_void_p), ("ape", c_void_p),
        ("n_row", c_int32), ("n", c_int32),
    ]


class IndexScoresArgs(Structure):
    _fields_ = [
        ("scores", c_void_p), ("q", c_void_p), ("keys", c_void_p), ("head_w", c_void_p),
        ("scratch", c_void_p), ("w_scale", c_float), ("n_key", c_int32), ("n_head", c_int32),
        ("d_index", c_int32),
    ]


class RouterArgs(Structure):
    _fields_ = [
        ("ids", c_void_p), ("weights", c_void_p), ("scores", c_void_p), ("logits", c_void_p),
        ("bias", c_void_p), ("forced", c_void_p), ("n_exp", c_int32), ("top_k", c_int32),
        ("route_scale", c_float),
    ]


class Variant:
    """One implementation of one operation: `variant(*arguments)` calls it.

    Arguments: NumPy arrays pass their address, structures a pointer to them, None a null pointer,
    ints and floats int32 and float.  `restype` is None unless given to `variants`.
    """

    def __init__(self, op: str, name: str, address: int, restype: Any = None) -> None:
        self.op, self.name, self.address, self.restype = op, name, address, restype

    def __call__(self, *arguments: Any) -> Any:
        converted = [to_c(a) for a in arguments]
        prototype = ctypes.CFUNCTYPE(self.restype, *(kind for kind, _ in converted))
        return prototype(self.address)(*(value for _, value in converted))

    def __repr__(self) -> str:
        return f"{self.op}:{self.name}"


def to_c(value: Any) -> tuple[Any, Any]:
    """The ctypes type and value of one argument."""
    if isinstance(value, np.ndarray):
        return c_void_p, pointer(value)
    if isinstance(value, Structure):
        return c_void_p, ctypes.addressof(value)
    if value is None:
        return c_void_p, None
    if isinstance(value, float | np.floating):
        return c_float, float(value)
    return c_int32, int(value)


def pointer(array: np.ndarray | None) -> int | None:
    """The address of an array whose rows are contiguous (the caller keeps it alive)."""
    return None if array is None else array.ctypes.data


def variants(op: str, restype: Any = None) -> list[Variant]:
    """Every variant of an operation on this CPU, `ref` first."""
    found = [
        Variant(o, name, address, restype)
        for o, name, address, _ in _core.kernel_variants(None) if o == op
    ]
    assert found and found[0].name == "ref", f"{op}: no ref among {found}"
    return found


def each_variant(*ops: str, restype: Any = None) -> list[Any]:
    """`variants` of several operations as pytest parameters with readable ids."""
    import pytest

    return [pytest.param(v, id=repr(v)) for op in ops for v in variants(op, restype)]


def aligned(n_bytes: int, align: int = 64) -> np.ndarray:
    """Zeroed bytes starting at a multiple of `align`."""
    raw = np.zeros(n_bytes + align, np.uint8)
    start = -raw.ctypes.data % align
    return raw[start : start + n_bytes]


def linear_scratch(cols: int) -> np.ndarray:
    """DSV4_LINEAR_SCRATCH(cols) bytes."""
    return aligned(128 * 4 * ((cols + 255) // 128 * 128) + 4096)


def linear(
    kernel: Callable[..., Any], x: np.ndarray, weight: Weight, *,
    out_f32: bool = True, tok: np.ndarray | None = None, rows: tuple[int, int] | None = None,
) -> np.ndarray:
    """Runs one linear layer: x uint16 [n, cols] bf16 bits -> float32 or uint16 [n, rows]."""
    x = np.ascontiguousarray(x, np.uint16)
    n_tok = len(x) if tok is None else len(tok)
    out = np.zeros((n_tok, weight.rows), np.float32 if out_f32 else np.uint16)
    scratch = linear_scratch(weight.cols)
    row0, row1 = rows or (0, weight.rows)
    args = LinearArgs(
        pointer(out), pointer(x), pointer(tok), ctypes.pointer(weight), pointer(scratch),
        weight.rows, x.shape[1], n_tok, row0, row1, int(out_f32),
    )
    kernel(args)
    return out


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> nearest bf16 as uint16 (finite values)."""
    u = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """uint16 bf16 bits -> float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)
