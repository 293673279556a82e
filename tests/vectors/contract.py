# SPDX-License-Identifier: Apache-2.0
"""The one order of every dot product, in NumPy, and the bits it gives (contract.npz).

    python contract.py check        recompute contract.npz from ops.npz and compare, bit for bit
    python contract.py make         write contract.npz

Rules 1-3 of the same-bits contract in kernels/kernels.h.  A linear layer here: x [n, K] and w
[o, K] as float32 arrays that hold bfloat16 values.  Slow and plain on purpose.
"""

import sys
from pathlib import Path

import numpy as np

F32 = np.float32
LANES, STEP = 16, 32
TINY = F32(2.0) ** -55


def bf16_round(x):
    """float32 -> float32 holding the nearest bfloat16 (ties to even)."""
    u = np.ascontiguousarray(x, F32).view(np.uint32)
    return (((u + 0x7FFF + ((u >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(F32)


def bf16_bits(x):
    return (np.ascontiguousarray(x, F32).view(np.uint32) >> 16).astype(np.uint16)


def operand(x):
    """Rule 2: what is smaller than 2^-55 in magnitude counts as zero."""
    x = np.ascontiguousarray(x, F32)
    return np.where(np.abs(x) < TINY, F32(0), x)


def pad(x):
    k = -x.shape[-1] % STEP
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, k)])


def fma(a, b, c):
    """fused a*b + c in float32 through extended precision, exact while a*b has <= 64 bits."""
    return (np.longdouble(a) * np.longdouble(b) + np.longdouble(c)).astype(F32)


def tree(lanes):
    """[..., 16] -> [...]: l[i] += l[i+8], then +4, +2, +1."""
    for h in (8, 4, 2, 1):
        lanes = lanes[..., :h] + lanes[..., h : 2 * h]
    return lanes[..., 0]


def lane_sums(x, w, exact_product=True):
    """[n, K], [o, K] -> [n, o, 16] after all of K: lane i takes 2i+1, then 2i, of each 32."""
    x, w = pad(operand(x)), pad(operand(w))
    acc = np.zeros((x.shape[0], w.shape[0], LANES), F32)
    for k in range(0, x.shape[1], STEP):
        for start in (1, 0):  # odd, then even
            a, b = x[:, None, k + start : k + STEP : 2], w[None, :, k + start : k + STEP : 2]
            acc = (
                acc + a * b if exact_product else fma(a, b, acc)
            )  # bf16 x bf16 is exact in float32
    return acc


def dot(x, w, exact_product=True):
    return tree(lane_sums(x, w, exact_product))


def dot_block_scaled(x, w_codes, w_scale, block=128):
    """Rule 3.  w_scale float32 [o, K / block].

    The lanes of each block start at +0, then acc = fma(block, scale, acc).
    """
    acc = np.zeros((x.shape[0], w_codes.shape[0], LANES), F32)
    for j, k in enumerate(range(0, x.shape[1], block)):
        part = lane_sums(x[:, k : k + block], w_codes[:, k : k + block])
        acc = fma(part, w_scale[None, :, j, None], acc)
    return tree(acc)


def mean_square(x):
    """rows of x against themselves: dot(x, x) / n, float32."""
    return np.array([dot(r[None], r[None])[0, 0] for r in x], F32) / F32(x.shape[-1])


def act_quant(x, group=128):
    """bf16 rows -> the values of their FP8 codes and power-of-two scales (float32 holding bf16)."""
    x = np.ascontiguousarray(x, F32)
    g = x.reshape(x.shape[0], -1, group)
    a = np.maximum(np.abs(g).max(-1, keepdims=True), F32(1e-4)) * (F32(1.0) / F32(448.0))
    u = a.view(np.uint32)
    e = ((u >> 23) & 0xFF).astype(np.int32) - 127 + ((u & 0x7FFFFF) != 0)
    s = np.ldexp(F32(1.0), e).astype(F32)
    return (e4m3_round(np.clip(g / s, -448, 448)) * s).reshape(x.shape).astype(F32)


def e4m3_round(v):
    """float32 within +-448 -> nearest e4m3 value, ties to even."""
    m, e = np.frexp(np.abs(v).astype(np.float64))
    ulp = np.ldexp(1.0, np.maximum(e - 4, -9))
    return (np.sign(v) * np.rint(np.abs(v).astype(np.float64) / ulp) * ulp).astype(F32)


def e4m3_values():
    c = np.arange(256)
    s, e, m = np.where(c & 0x80, -1.0, 1.0), (c >> 3) & 15, c & 7
    v = np.where(e == 0, m * 2.0**-9, (8 + m) * 2.0 ** (e - 10.0))
    v[(c & 0x7F) == 0x7F] = np.nan
    return (s * v).astype(F32)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], F32)


def e8m0(b):
    return np.ldexp(F32(1.0), b.astype(np.int32) - 127).astype(F32)


def fp8_weight(codes, scale):
    """e4m3 codes [o, K] and E8M0 bytes [o/128, K/128] -> bf16 values, exact."""
    s = np.repeat(np.repeat(e8m0(scale), 128, 0)[: codes.shape[0]], 128, 1)[:, : codes.shape[1]]
    return e4m3_values()[codes] * s


def fp4_weight(packed, scale):
    """two codes a byte (low nibble first), E8M0 per 32 -> bf16 values, exact."""
    v = np.stack([E2M1[packed & 15], E2M1[packed >> 4]], -1).reshape(packed.shape[0], -1)
    return v * np.repeat(e8m0(scale), 32, 1)


def compute(ops):
    """The bits of the contract for the linear cases of ops.npz, and for cases drawn here."""

    def val(u):
        u = np.asarray(u)
        return (u.astype(np.uint32) << 16).view(F32) if u.dtype == np.uint16 else u.astype(F32)

    out = {}
    x = val(ops["fp8_linear/x"])
    w = fp8_weight(ops["fp8_linear/w"], ops["fp8_linear/w_scale"])
    out["fp8_linear/y_official"] = bf16_bits(bf16_round(dot(act_quant(x), w)))
    out["fp8_linear/y_weights"] = bf16_bits(bf16_round(dot(x, w)))
    out["fp8_linear/f32_official"] = dot(act_quant(x), w)
    x4 = val(ops["fp4_linear/x"])
    w4 = fp4_weight(ops["fp4_linear/w"].view(np.uint8), ops["fp4_linear/w_scale"])
    out["fp4_linear/y_official"] = bf16_bits(bf16_round(dot(act_quant(x4), w4)))
    out["fp4_linear/f32_official"] = dot(act_quant(x4), w4)
    g = np.random.default_rng(20)
    a, b = (
        bf16_round(g.standard_normal((7, 1000))),
        bf16_round(g.standard_normal((5, 1000)) * 2.0 ** g.integers(-20, 20, (5, 1))),
    )
    f = (g.standard_normal((5, 1000))).astype(F32)
    out["bf16/x"], out["bf16/w"], out["bf16/f32"] = bf16_bits(a), bf16_bits(b), dot(a, b)
    out["f32w/w"], out["f32w/f32"] = f, dot(a, f, exact_product=False)
    out["mean_square/f32"] = mean_square(a)
    s = (2.0 ** g.uniform(-6, 2, (5, 8))).astype(F32)
    codes = e4m3_values()[g.integers(0, 0x7E, (5, 1000))]
    out["f32scale/codes"], out["f32scale/scale"] = codes, s
    out["f32scale/f32"] = dot_block_scaled(a, codes, s)
    return out


if __name__ == "__main__":
    here = Path(__file__).parent
    got = compute(np.load(here / "ops.npz"))
    if sys.argv[1:] == ["make"]:
        np.savez_compressed(here / "contract.npz", **got)
    want = np.load(here / "contract.npz")
    bad = [k for k in got if got[k].tobytes() != want[k].tobytes()]
    print(f"{len(got) - len(bad)} of {len(got)} arrays equal", *bad)
    sys.exit(bool(bad))
