# SPDX-License-Identifier: Apache-2.0
"""Single kernel variants as functions of NumPy arrays; bf16 arrays are uint16 bit patterns.

Each function takes a variant of `door.variants(op)` first and returns new arrays: kernels that
work in place get a copy.
"""

from collections.abc import Iterable, Sequence
from ctypes import c_float
from typing import Any

import numpy as np
from door import HcPostArgs, HcPreArgs, PoolArgs, RouterArgs, Variant
from door import pointer as address
from numpy.typing import NDArray

Array = NDArray[Any]


def table(arrays: Iterable[Array | None]) -> Array:
    """The addresses of arrays (0 for None) as a C array of pointers."""
    return np.array([address(a) or 0 for a in arrays], np.uint64)


def f32(a: Any) -> Array:
    return np.ascontiguousarray(a, np.float32)


def u16(a: Any) -> Array:
    a = np.ascontiguousarray(a)
    assert a.dtype == np.uint16
    return a


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
) -> tuple[Array, Array, Array]:
    """uint16 [hc, d] -> x uint16 [d], post f32 [hc], comb f32 [hc, hc]."""
    hc, d = streams.shape
    x = np.empty(d, np.uint16)
    post, comb = np.full(hc, np.nan, np.float32), np.full((hc, hc), np.nan, np.float32)
    kept = [u16(streams), f32(dots), f32(scale), f32(base)]
    assert kept[1].size == kept[3].size == (hc if head else (2 + hc) * hc)
    out = (address(x), None if head else address(post), None if head else address(comb))
    a = HcPreArgs(*out, *map(address, kept), hc, d, iters, norm_eps, hc_eps)
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
        v(HcPostArgs(address(out), *map(address, kept), hc, d, c0, c1))
    return out


def pool(v: Any, k: Sequence[Array], gate: Sequence[Array | None], ape: Sequence[Array]) -> Array:
    """Lists of f32 [n] rows, gate None where absent -> uint16 [n]."""
    rows = [[f32(a) if a is not None else None for a in side] for side in (k, gate, ape)]
    n = next(a for a in rows[0] if a is not None).size
    tables = [table(side) for side in rows]
    out = np.empty(n, np.uint16)
    v(PoolArgs(address(out), *map(address, tables), len(k), n))
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
    outputs = (address(ids), address(weights), address(scores))
    a = RouterArgs(*outputs, *map(address, kept), logits.size, top_k, route_scale)
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
