# SPDX-License-Identifier: Apache-2.0
"""Single kernels by address through ctypes, on NumPy arrays: for `dsv4.verify` and the tests.

Structures mirror kernels/kernels.h field by field.  Every variant of this CPU is offered:
DSV4_CPU_DISABLE has no effect here.  bf16 arrays are uint16 bit patterns.  The functions take a
variant first and return new arrays: kernels that work in place get a copy.  Nothing is checked:
what a kernel is given must be what the header asks for.
"""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_ssize_t, c_uint8, c_void_p
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4 import _core

Array = npt.NDArray[Any]

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
        ("hc_eps", c_float), ("pre", c_void_p),
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
        ("scratch", c_void_p), ("w_scale", c_float), ("n_key", c_int32), ("block_keys", c_int32),
        ("n_head", c_int32), ("d_index", c_int32),
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


def pointer(array: Array | None) -> int | None:
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


def masks() -> list[str]:
    """Values of DSV4_CPU_DISABLE that give different kernels here: all sets, then fewer."""
    tables: dict[tuple[Any, ...], str] = {}
    for disable in ["", *(name for name, here in reversed(_core.cpu_sets()) if here)]:
        chosen = tuple(v[:2] for v in _core.kernel_variants(disable or None) if v[3])
        tables.setdefault(chosen, disable)
    return list(tables.values())


def aligned(n_bytes: int, align: int = 64) -> Array:
    """Zeroed bytes starting at a multiple of `align`."""
    raw = np.zeros(n_bytes + align, np.uint8)
    start = -raw.ctypes.data % align
    return raw[start : start + n_bytes]


def linear_scratch(cols: int) -> Array:
    """DSV4_LINEAR_SCRATCH(cols) bytes."""
    return aligned(128 * 4 * ((cols + 255) // 128 * 128) + 4096)


def linear(
    kernel: Callable[..., Any], x: Array, weight: Weight, *,
    out_f32: bool = True, tok: Array | None = None, rows: tuple[int, int] | None = None,
) -> Array:
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


def table(arrays: Iterable[Array | None]) -> Array:
    """The addresses of arrays (0 for None) as a C array of pointers."""
    return np.array([pointer(a) or 0 for a in arrays], np.uint64)


def f32(a: Any) -> Array:
    return np.ascontiguousarray(a, np.float32)


def u16(a: Any) -> Array:
    array: Array = np.ascontiguousarray(a)
    assert array.dtype == np.uint16
    return array


def act_quant(v: Any, x: Array) -> tuple[Array, Array, Array]:
    """uint16 [n] -> values uint16 [n], codes uint8 [n], scales uint8 [ceil(n / 128)]."""
    x = u16(x)
    out, codes = np.empty_like(x), np.empty(x.size, np.uint8)
    scales = np.empty(-(-x.size // 128), np.uint8)
    v(out, codes, scales, x, x.size)
    return out, codes, scales


def act_flush(v: Any, x: Array) -> Array:
    out = np.empty_like(u16(x))
    v(out, x, x.size)
    return out


def kv_bytes(fmt: int, d_head: int, d_rope: int) -> int:
    nope = d_head - d_rope
    return 2 * d_head if fmt else (nope + 2 * d_rope + nope // 64 + 7) & ~7


def kv_store(v: Any, x: Array, fmt: int = 0, d_rope: int = 64) -> Array:
    """uint16 [d_head] -> uint8 row, filled with 0xa5 before the call."""
    x = u16(x)
    row = np.full(kv_bytes(fmt, x.size, d_rope), 0xA5, np.uint8)
    v(row, x, fmt, x.size, d_rope)
    return row


def kv_load(v: Any, row: Array, fmt: int = 0, d_head: int = 512, d_rope: int = 64) -> Array:
    x = np.full(d_head, 0xA5A5, np.uint16)
    v(x, row, fmt, d_head, d_rope)
    return x


def hadamard(v: Any, x: Array) -> Array:
    y = u16(x).copy()
    v(y, y.size)
    return y


def index_store(v: Any, x: Array) -> Array:
    row = np.full(x.size // 2 + x.size // 32, 0xA5, np.uint8)
    v(row, u16(x), x.size)
    return row


def index_load(v: Any, row: Array, n: int) -> Array:
    x = np.full(n, 0xA5A5, np.uint16)
    v(x, row, n)
    return x


def mean_square(v: Any, x: Array) -> np.float32:
    returning = Variant(v.op, v.name, v.address, c_float)
    return np.float32(returning(u16(x), x.size))


def rmsnorm(v: Any, x: Array, w: Array, eps: float) -> Array:
    out = np.empty_like(u16(x))
    v(out, x, f32(w), x.size, float(eps))
    return out


def headnorm(v: Any, x: Array, eps: float) -> Array:
    y = u16(x).copy()
    v(y, y.size, float(eps))
    return y


def rope_table(v: Any, freq: Array, position: int) -> tuple[Array, Array]:
    """f32 frequencies [n] -> cos, sin [n]."""
    cos, sin = np.empty(freq.size, np.float32), np.empty(freq.size, np.float32)
    v(cos, sin, f32(freq), freq.size, position)
    return cos, sin


def rope(v: Any, x: Array, cos: Array, sin: Array, inverse: bool = False) -> Array:
    y = u16(x).copy()
    v(y, f32(cos), f32(sin), y.size // 2, int(inverse))
    return y


def hc_pre(
    v: Any,
    streams: Array,
    dots: Array,
    scale: Array,
    base: Array,
    *,
    iters: int = 20,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    head: bool = False,
    pre: Array | None = None,
) -> tuple[Array, Array, Array]:
    """uint16 [hc, d] -> x uint16 [d], post f32 [hc], comb f32 [hc, hc]; fills pre f32 [hc]."""
    hc, d = streams.shape
    x = np.empty(d, np.uint16)
    post, comb = np.full(hc, np.nan, np.float32), np.full((hc, hc), np.nan, np.float32)
    kept = [u16(streams), f32(dots), f32(scale), f32(base)]
    assert kept[1].size == kept[3].size == (hc if head else (2 + hc) * hc)
    out = (pointer(x), None if head else pointer(post), None if head else pointer(comb))
    a = HcPreArgs(*out, *map(pointer, kept), hc, d, iters, norm_eps, hc_eps, pointer(pre))
    v(a)
    return x, post, comb


def hc_post(
    v: Any,
    y: Array,
    streams: Array,
    post: Array,
    comb: Array,
    columns: Sequence[tuple[int, int]] | None = None,
    in_place: bool = False,
) -> Array:
    """uint16 [d], uint16 [hc, d] -> uint16 [hc, d]; one call for each range of columns."""
    hc, d = streams.shape
    source = u16(streams).copy()
    out = source if in_place else np.full_like(source, 0xA5A5)
    kept = [u16(y), source, f32(post), f32(comb)]
    for c0, c1 in columns or [(0, d)]:
        v(HcPostArgs(pointer(out), *map(pointer, kept), hc, d, c0, c1))
    return out


def pool(v: Any, k: Sequence[Array], gate: Sequence[Array | None], ape: Sequence[Array]) -> Array:
    """Lists of f32 [n] rows, gate None where absent -> uint16 [n]."""
    rows = [[f32(a) if a is not None else None for a in side] for side in (k, gate, ape)]
    n = next(a for a in rows[0] if a is not None).size
    tables = [table(side) for side in rows]
    out = np.empty(n, np.uint16)
    v(PoolArgs(pointer(out), *map(pointer, tables), len(k), n))
    return out


def router(
    v: Any,
    logits: Array,
    top_k: int,
    route_scale: float,
    bias: Array | None = None,
    forced: Array | None = None,
) -> tuple[Array, Array, Array]:
    """f32 [n_exp] -> ids int32 [top_k], weights f32 [top_k], scores f32 [n_exp]."""
    ids, weights = np.full(top_k, -7, np.int32), np.empty(top_k, np.float32)
    scores = np.empty(logits.size, np.float32)
    kept = [
        f32(logits),
        None if bias is None else f32(bias),
        None if forced is None else np.ascontiguousarray(forced, np.int32),
    ]
    outputs = (pointer(ids), pointer(weights), pointer(scores))
    a = RouterArgs(*outputs, *map(pointer, kept), logits.size, top_k, route_scale)
    v(a)
    return ids, weights, scores


def swiglu(v: Any, g: Array, u: Array, limit: float, weight: float = 1.0) -> Array:
    out = np.empty_like(u16(g))
    v(out, g, u16(u), g.size, float(limit), float(weight))
    return out


def expert_sum(v: Any, rows: Sequence[Array]) -> Array:
    kept = [u16(r) for r in rows]
    out = np.empty_like(kept[0])
    v(out, table(kept), len(kept), out.size)
    return out


def attention(
    v: Any, q: Array, keys: Sequence[Array | None], sink: Array, scale: float, fmt: int = 0,
    d_rope: int = 64,
) -> Array:
    """uint16 [heads, d], KV rows (uint8, None = masked), f32 [heads] -> uint16 [heads, d]."""
    heads, d = q.shape
    out, rows = np.empty_like(u16(q)), table(keys)
    scratch = aligned(4 * (-(-heads // 16) * 16) * (2 * d + 256) + 512 * d + 8192)
    kept = [q, rows, f32(sink), scratch]
    v(AttentionArgs(
        pointer(out), *map(pointer, kept), len(keys), heads, d, d_rope, float(scale), fmt))
    return out


def index_scores(v: Any, q: Array, keys: Array, head_w: Array, w_scale: float, d: int) -> Array:
    """uint8 index rows [heads, row] and [n, row], uint16 [heads] -> f32 [n]."""
    out = np.empty(len(keys), np.float32)
    scratch = aligned(64 * (len(q) + 64) * (d // 32 * 9 + 8))
    keys = np.ascontiguousarray(keys)
    run = np.array([keys.ctypes.data], np.uint64)
    kept = [np.ascontiguousarray(q), run, u16(head_w), scratch]
    v(IndexScoresArgs(
        pointer(out), *map(pointer, kept), float(w_scale), len(keys), max(1, len(keys)), len(q), d))
    return out


def top_k(v: Any, scores: Array, k: int) -> Array:
    """f32 [n] -> the ids of the k best, ascending: int32 [min(k, n)]."""
    ids = np.full(k, -7, np.int32)
    returning = Variant(v.op, v.name, v.address, c_int32)
    n = returning(ids, f32(scores), len(scores), k, aligned(4 * len(scores) + 16384))
    return ids[:n]
