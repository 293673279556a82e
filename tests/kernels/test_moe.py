# SPDX-License-Identifier: Apache-2.0
"""Router, gated activation and the sum over experts: every variant."""

import math

import numpy as np
import pytest
from calls import expert_sum, router, swiglu
from compare import bf16, to_bf16, ulp_report
from door import variants
from stored import tensor

F32 = np.float32


@pytest.fixture(scope="module")
def ops(vectors):
    return np.load(vectors / "ops.npz")


def each(op):
    return pytest.mark.parametrize("v", variants(op), ids=lambda v: v.name)


# ------------------------------------------------------------------------------------- router


@each("router")
def test_sqrtsoftplus(v, ops):
    z, want = ops["sqrtsoftplus/z"], ops["sqrtsoftplus/s"]
    np.testing.assert_allclose(router(v, z, 1, 1.0)[2], want, rtol=1e-6)


@each("router")
def test_biased_vectors(v, nano, ops):
    bias = tensor(nano("nano-flash"), "layers.2.ffn.gate.bias")
    for logits, ids, weights in zip(
        *(ops[f"router/biased_{k}"] for k in ("logits", "ids", "weights")), strict=True
    ):
        got, w, _ = router(v, logits, 3, 1.5, bias)
        assert (got == ids).all()
        np.testing.assert_allclose(w, weights, rtol=1e-5)


@each("router")
def test_hash_vectors(v, ops):
    """The ids come from the table; the logits still give the weights."""
    for logits, ids, weights in zip(
        *(ops[f"router/hash_{k}"] for k in ("logits", "ids", "weights")), strict=True
    ):
        got, w, _ = router(v, logits, 3, 1.5, forced=ids)
        assert (got == ids).all()
        np.testing.assert_allclose(w, weights, rtol=1e-5)


@each("router")
def test_bias_chooses_but_does_not_weigh(v):
    logits = np.array([3.0, 2.0, 1.0, 0.0], F32)
    bias = np.array([0, 0, 0, 100], F32)
    ids, weights, scores = router(v, logits, 2, 2.5, bias)
    assert ids.tolist() == [3, 0]
    s = np.sqrt(np.log1p(np.exp(np.array([0.0, 3.0]))))
    np.testing.assert_allclose(weights, s / s.sum() * 2.5, rtol=1e-6)
    np.testing.assert_allclose(scores[[3, 0]], s, rtol=1e-6)


@each("router")
@pytest.mark.parametrize("scale", [1.5, 2.5])
def test_weights_sum_to_the_scale(v, scale):
    g = np.random.default_rng(2)
    for n in (6, 8, 255, 256, 384):
        _, weights, _ = router(v, g.standard_normal(n).astype(F32), 6, scale)
        assert abs(weights.astype(np.float64).sum() - scale) < 1e-6


@each("router")
def test_ties_and_nan(v):
    """Equal keys: the lower id first.  NaN after everything else, minus infinity included."""
    ids, *_ = router(v, np.zeros(40, F32), 6, 1.0)
    assert ids.tolist() == [0, 1, 2, 3, 4, 5]
    logits = np.array([np.nan, 1, 2, np.nan, 2, 1], F32)
    assert router(v, logits, 6, 1.0)[0].tolist() == [2, 4, 1, 5, 0, 3]
    bias = np.array([5, 5, -np.inf, np.nan, 5, -np.inf], F32)
    assert router(v, np.ones(6, F32), 6, 1.0, bias)[0].tolist() == [0, 1, 4, 2, 5, 3]


@each("router")
def test_router_equals_ref(v):
    ref = variants("router")[0]
    g = np.random.default_rng(3)
    for n in [*range(1, 67), 255, 256, 384]:
        logits = (12 * g.standard_normal(n)).astype(F32)
        logits[g.integers(0, n, 1 + n // 8)] = g.choice([0.0, -0.0, 20.0, 21.0, -200.0, np.inf])
        bias = np.round(g.standard_normal(n), 1).astype(F32)
        k = min(n, 6)
        for options in ({}, {"bias": bias}, {"forced": g.integers(0, n, k)}):
            got, want = (router(u, logits, k, 1.5, **options) for u in (v, ref))
            for a, b in zip(got, want, strict=True):
                assert np.array_equal(a, b, equal_nan=a.dtype == F32), n


# ------------------------------------------------------------------------------------- swiglu


@each("swiglu")
def test_swiglu_vectors(v, ops):
    """Every pair of 17 gate and up values in, at and beyond +-10."""
    g, u, limit = ops["swiglu/gate"], ops["swiglu/up"], float(ops["swiglu/limit"])
    assert limit == 10 and np.abs(bf16(g)).max() > 10
    got = swiglu(v, g, u, limit, 0.7310586)
    assert ulp_report(got, ops["swiglu/h_times_weight"])["max_ulp"] <= 1
    plain = bf16(swiglu(v, g, u, limit)).astype(np.float64)
    np.testing.assert_allclose(plain, ops["swiglu/h"], rtol=2**-8, atol=1e-30)


@each("swiglu")
def test_clamp_is_one_sided_on_the_gate_and_before_the_product(v):
    def h(gate, up, limit=10.0):
        g, u = (to_bf16(np.array([x], F32)) for x in (gate, up))
        return float(bf16(swiglu(v, g, u, limit))[0])

    assert h(30, 30) == h(10, 10) and h(10, 10) == pytest.approx(100, rel=2**-8)
    assert h(10, -30) == h(10, -10) == -h(10, 10)
    assert h(-30, 1) == pytest.approx(-30 * math.exp(-30), rel=2**-7)  # not clamped at -10
    assert h(30, 30, math.inf) == 900
    assert h(-math.inf, 1) != h(-math.inf, 1)  # -inf / inf
    assert h(-200, 1) == 0 and math.copysign(1, h(-200, 1)) == -1


@each("swiglu")
def test_swiglu_passes_nan(v):
    one, nan = np.full(40, 0x3F80, np.uint16), np.full(40, 0x7FC0, np.uint16)
    assert np.isnan(bf16(swiglu(v, nan, one, 10.0))).all()
    assert np.isnan(bf16(swiglu(v, one, nan, 10.0))).all()


@each("swiglu")
def test_swiglu_equals_ref_for_every_gate(v):
    ref = variants("swiglu")[0]
    every = np.arange(65536, dtype=np.uint16)
    finite = every[(every & 0x7FFF) <= 0x7F80]
    ups = np.random.default_rng(1).permutation(finite)
    for limit, weight in ((10.0, 1.0), (math.inf, 0.3), (7.0, -1.7e-3)):
        got, want = (bf16(swiglu(u, finite, ups, limit, weight)) for u in (v, ref))
        assert np.array_equal(got, want, equal_nan=True)
        assert (np.signbit(got) == np.signbit(want))[~np.isnan(got)].all()
    for n in range(1, 67):
        args = (finite[:n], ups[:n], 10.0)
        assert (swiglu(v, *args) == swiglu(ref, *args)).all()


@each("swiglu")
def test_swiglu_equals_ref_on_many(v):
    """Enough that a product in another order shows through the rounding to bf16."""
    ref, g = variants("swiglu")[0], np.random.default_rng(5)
    gate, up = to_bf16((3 * g.standard_normal((2, 1 << 17))).astype(F32))
    for weight in g.uniform(0, 1, 50):
        assert (swiglu(v, gate, up, 10.0, weight) == swiglu(ref, gate, up, 10.0, weight)).all()


# ----------------------------------------------------------------------------- sum over experts


@each("expert_sum")
def test_expert_sum(v):
    """f32 adds in the order given, one rounding; a lone -0 becomes +0."""
    g = np.random.default_rng(4)
    for n in [*range(1, 67), 4096]:
        for n_row in (1, 2, 7, 9):
            rows = [
                to_bf16((g.standard_normal(n) * 2.0 ** g.integers(-9, 9)).astype(F32))
                for _ in range(n_row)
            ]
            rows[0][0] = 0x8000
            acc = np.zeros(n, F32)
            for row in rows:
                acc = acc + bf16(row)
            assert (expert_sum(v, rows) == to_bf16(acc)).all(), (n, n_row)
    big = [to_bf16(np.array([x], F32)) for x in (2.0**24, 1.0, -(2.0**24))]
    assert expert_sum(v, big)[0] == 0
