# SPDX-License-Identifier: Apache-2.0
"""Attention, every variant: the official vectors, a float64 oracle, equal bits, sinks, masks.

Against the oracle an output may differ by the two bf16 roundings of the contract, that of P (2^-9
of each term) and that of the result (2^-9), and by f32 sums, which are far below: 2^-8 of
sum P |k| / l bounds them.
"""

import numpy as np
import pytest
from calls import kv_load, kv_store, table
from compare import bf16, to_bf16, ulp_report
from door import KV_BF16, KV_FP8, AttentionArgs, aligned, pointer, variants


@pytest.fixture(scope="module")
def ops(vectors):
    return {k: v for k, v in np.load(vectors / "ops.npz").items() if k.startswith("attention/")}


def each(test):
    return pytest.mark.parametrize("v", variants("attention"), ids=lambda v: v.name)(test)


def ref(op):
    return variants(op)[0]


def attend(v, q, rows, sink, scale, fmt=KV_FP8, d_rope=64):
    """q uint16 [heads, d_head], rows of bytes or None, sink [heads] -> uint16 [heads, d_head]."""
    q = np.ascontiguousarray(q)
    heads, d_head = q.shape
    keys, out = table(rows), np.full_like(q, 0xA5A5)
    sink = np.ascontiguousarray(sink, np.float32)
    padded = -(-heads // 16) * 16
    scratch = aligned(4 * padded * (2 * d_head + 256) + 64 * 8 * d_head + 8192)
    scratch[:] = 0xFF  # NaN: what is not written must not be used
    v(
        AttentionArgs(
            pointer(out), pointer(q), pointer(keys), pointer(sink), pointer(scratch),
            len(rows), heads, d_head, d_rope, float(scale), fmt,
        )
    )
    return out


def oracle(q, k, sink, scale):
    """Softmax attention in float64 with the sink in the denominator; result and error bound.

    k [n, d_head] has one row per unmasked key.
    """
    q, k = bf16(q).astype(np.float64), k.astype(np.float64)
    s = scale * q @ k.T
    m = s.max(1, keepdims=True)
    p = np.exp(s - m)
    total = p.sum(1, keepdims=True) + np.exp(np.asarray(sink, np.float64)[:, None] - m)
    return p @ k / total, p @ np.abs(k) / total * 2.0**-8 + 1e-30


def random_case(seed, heads, d_head, n, fmt=KV_FP8, d_rope=64):
    """q, rows, their values [n, d_head] and sinks."""
    g = np.random.default_rng(seed)
    q = to_bf16(g.standard_normal((heads, d_head)).astype(np.float32))
    x = to_bf16(g.standard_normal((n, d_head)).astype(np.float32))
    rows = [kv_store(ref("kv_store"), r, fmt, d_rope) for r in x]
    k = np.stack([bf16(kv_load(ref("kv_load"), r, fmt, d_head, d_rope)) for r in rows])
    return q, rows, k, g.standard_normal(heads).astype(np.float32)


@each
def test_official_vectors(v, ops):
    q, kv, idx, sink, o = (ops[f"attention/{k}"] for k in ("q", "kv", "idx", "sink", "o"))
    rows = [r.view(np.uint8) for r in kv]
    assert (idx[0] >= 0).sum() == 1 and sink.max() == 60
    assert any((idx[1][i : i + 64] < 0).all() for i in (0, 64))
    got = np.stack([
        attend(v, q[t], [None if i < 0 else rows[i] for i in idx[t]], sink,
               ops["attention/scale"], KV_BF16)
        for t in range(len(q))
    ])
    report = ulp_report(got, o)
    assert report["max_ulp"] <= 1 and report["equal"] > 0.99


@each
@pytest.mark.parametrize("fmt", [KV_FP8, KV_BF16], ids=["fp8", "bf16"])
@pytest.mark.parametrize("heads, d_head, d_rope, n", [
    (1, 512, 64, 1), (3, 192, 64, 63), (5, 192, 64, 130), (64, 512, 64, 200), (17, 96, 32, 65),
])
def test_oracle_and_ref(v, fmt, heads, d_head, d_rope, n):
    q, rows, k, sink = random_case(heads + n, heads, d_head, n, fmt, d_rope)
    scale = d_head**-0.5
    got = attend(v, q, rows, sink, scale, fmt, d_rope)
    want, bound = oracle(q, k, sink, scale)
    assert (np.abs(bf16(got) - want) <= bound).all()
    assert np.array_equal(got, attend(ref("attention"), q, rows, sink, scale, fmt, d_rope))


@each
def test_sink_is_part_of_the_denominator(v):
    """TRAPS 14: with a dominant sink the output all but vanishes; -infinity takes the sink away."""
    q, rows, k, _ = random_case(1, 4, 192, 40)
    for sink in (-np.inf, 0.0, 5.0, 60.0):
        sinks = np.full(4, sink, np.float32)
        got = bf16(attend(v, q, rows, sinks, 0.07))
        want, bound = oracle(q, k, sinks, 0.07)
        assert (np.abs(got - want) <= bound).all()
    assert 0 < np.abs(got).max() < 1e-22


@each
def test_one_key(v):
    """P is 1: the value over 1 + exp(sink - score)."""
    q, rows, k, sink = random_case(2, 3, 128, 1)
    s = (bf16(q).astype(np.float64) @ k[0].astype(np.float64))[:, None] * 0.1
    want = k / (1 + np.exp(sink[:, None] - s))
    got = bf16(attend(v, q, rows, sink, 0.1))
    np.testing.assert_allclose(got, want, rtol=2.0**-8)


@each
@pytest.mark.parametrize("n", [0, 1, 64, 127, 128, 200])
def test_no_key_gives_zero(v, n):
    """TRAPS 32: an empty or fully masked list is +0, not NaN."""
    q, _, _, sink = random_case(3, 5, 128, 1)
    assert (attend(v, q, [None] * n, sink, 0.1) == 0).all()


@each
def test_masks(v):
    q, rows, k, sink = random_case(4, 3, 128, 100)
    gap = [None] * 64
    plain = attend(v, q, rows[:64] + rows[64:], sink, 0.1)
    for same in (gap + rows, rows[:64] + gap + rows[64:], rows + gap, [*rows, None]):
        assert np.array_equal(attend(v, q, same, sink, 0.1), plain)
    keep = np.random.default_rng(5).random(100) < 0.5
    some = [r if kept else None for r, kept in zip(rows, keep, strict=True)]
    want, bound = oracle(q, k[keep], sink, 0.1)
    assert (np.abs(bf16(attend(v, q, some, sink, 0.1)) - want) <= bound).all()


@each
def test_heads_in_any_number_of_calls(v):
    q, rows, _, sink = random_case(6, 64, 192, 70)
    whole = attend(v, q, rows, sink, 0.1)
    for cut in (1, 5, 16, 33):
        parts = [attend(v, q[i : i + cut], rows, sink[i : i + cut], 0.1) for i in range(0, 64, cut)]
        assert np.array_equal(np.concatenate(parts), whole)


@each
def test_not_finite(v):
    """A key with a NaN makes every head that sees it NaN, as 0x7fc0; masked it does nothing."""
    q, rows, _, sink = random_case(7, 2, 128, 10)
    bad = rows[3].copy()
    bad[-8] = 255  # the scale of the only group
    assert (attend(v, q, [*rows[:3], bad, *rows[4:]], sink, 0.1) == 0x7FC0).all()
    clean = attend(v, q, [*rows[:3], None, *rows[4:]], sink, 0.1)
    assert np.isfinite(bf16(clean)).all()
