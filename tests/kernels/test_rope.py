# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding: tables of f32 angles to a million positions, interleaved pairs, inverse."""

import numpy as np
import pytest
from calls import rope, rope_table
from compare import bf16, to_bf16, ulp_report
from door import variants

F32 = np.float32
KINDS = ["main", "compressed"]


@pytest.fixture(scope="module")
def ops(vectors):
    return np.load(vectors / "ops.npz")


def each(op):
    return pytest.mark.parametrize("v", variants(op), ids=lambda v: v.name)


@each("rope_table")
@pytest.mark.parametrize("kind", KINDS)
def test_table_vectors(v, ops, kind):
    freq = ops[f"rope/{kind}_freqs"]
    cos, sin = ops[f"rope/{kind}_cos"], ops[f"rope/{kind}_sin"]
    rows = [*zip(ops["rope/positions"], cos, sin, strict=True)]
    rows.append((1, ops[f"rope/{kind}_cos1"], ops[f"rope/{kind}_sin1"]))
    for position, c, s in rows:
        got_c, got_s = rope_table(v, freq, int(position))
        np.testing.assert_allclose(got_c, c, rtol=0, atol=1e-6)
        np.testing.assert_allclose(got_s, s, rtol=0, atol=1e-6)


@each("rope_table")
@pytest.mark.parametrize("kind", KINDS)
def test_table_is_the_f32_angle(v, ops, kind):
    """The angle is rounded to f32, then evaluated exactly: within half an ulp of float64."""
    freq = ops[f"rope/{kind}_freqs"]
    for position in [0, 1, 2, 127, 128, 4095, 65535, 65536, 999983, 1000000, 1048575]:
        theta = (F32(position) * freq).astype(np.float64)
        got_c, got_s = rope_table(v, freq, position)
        for got, want in ((got_c, np.cos(theta)), (got_s, np.sin(theta))):
            ulp = np.spacing(np.maximum(np.abs(want), 1e-30).astype(F32)).astype(np.float64)
            assert (np.abs(got - want) <= 0.51 * ulp).all(), position


@each("rope_table")
def test_spot_checks(v, ops):
    """SPEC 3.2, compressed table: position, pair, cos, sin."""
    freq = ops["rope/compressed_freqs"]
    for position, i, c, s in [
        (1000000, 1, 0.644628584, -0.764495909),
        (65536, 16, -0.678453386, -0.734643459),
        (1048575, 31, 0.827786207, 0.56104368),
    ]:
        cos, sin = rope_table(v, freq, position)
        assert cos[i] == F32(c) and sin[i] == F32(s)


@each("rope")
@pytest.mark.parametrize("kind", KINDS)
def test_rotation_vectors(v, ops, kind):
    rows = zip(
        ops["rope/x"],
        ops[f"rope/{kind}_cos"],
        ops[f"rope/{kind}_sin"],
        ops[f"rope/{kind}_forward"],
        ops[f"rope/{kind}_inverse"],
        strict=True,
    )
    for x, cos, sin, forward, inverse in rows:
        assert ulp_report(rope(v, x, cos, sin), forward)["max_ulp"] <= 1
        assert ulp_report(rope(v, x, cos, sin, inverse=True), inverse)["max_ulp"] <= 1


@each("rope")
def test_rotation_step_by_step(v):
    """Pairs are neighbours (2i, 2i+1), two products and one add in f32; any number of pairs."""
    g = np.random.default_rng(4)
    for n_pair in [*range(1, 40), 64]:
        x = to_bf16(g.standard_normal(2 * n_pair).astype(F32))
        theta = g.uniform(0, 6.28, n_pair)
        cos, sin = np.cos(theta).astype(F32), np.sin(theta).astype(F32)
        a, b = bf16(x[0::2]), bf16(x[1::2])
        for inverse in (False, True):
            s = -sin if inverse else sin
            want = np.stack([a * cos - b * s, a * s + b * cos], -1).reshape(-1)
            assert (rope(v, x, cos, sin, inverse) == to_bf16(want)).all(), n_pair


@each("rope")
def test_products_are_rounded_before_they_meet(v):
    """Equal products cancel to zero; a fused multiply-add would leave the rounding error of one."""
    g = np.random.default_rng(6)
    for n_pair in (3, 8, 16, 32):
        a = to_bf16(g.standard_normal(n_pair).astype(F32))
        c = g.standard_normal(n_pair).astype(F32)
        same = np.stack([a, a], -1).reshape(-1)
        assert (rope(v, same, c, c)[0::2] == 0).all()
        assert (rope(v, np.stack([a, a ^ 0x8000], -1).reshape(-1), c, c)[1::2] == 0).all()
        assert (rope(v, same, c, c, inverse=True)[1::2] == 0).all()


@each("rope")
def test_inverse_undoes(v, ops):
    freq = ops["rope/compressed_freqs"]
    x = to_bf16(np.random.default_rng(5).standard_normal(64).astype(F32))
    table = next(t for t in variants("rope_table") if t.name == "ref")
    cos, sin = rope_table(table, freq, 54321)
    back = rope(v, rope(v, x, cos, sin), cos, sin, inverse=True)
    assert np.abs(bf16(back) - bf16(x)).max() < 0.04
    assert np.abs(bf16(rope(v, x, cos, sin)) - bf16(x)).max() > 0.5
