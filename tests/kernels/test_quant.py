# SPDX-License-Identifier: Apache-2.0
"""Formats, activation quantisation, KV rows, index rows, Hadamard: every variant, exact."""

import numpy as np
import pytest
from calls import (
    act_flush,
    act_quant,
    hadamard,
    index_load,
    index_store,
    kv_load,
    kv_store,
)
from compare import bf16, to_bf16, ulp_report
from contract import E2M1, e4m3_values
from door import variants


@pytest.fixture(scope="module")
def ops(vectors):
    return np.load(vectors / "ops.npz")


def each(op):
    return pytest.mark.parametrize("v", variants(op), ids=lambda v: v.name)


def ref(op):
    return next(v for v in variants(op) if v.name == "ref")


def random_bf16(seed, *shape, octaves=6.0):
    g = np.random.default_rng(seed)
    x = g.standard_normal(shape) * 2.0 ** g.uniform(-octaves, octaves, shape)
    return to_bf16(x.astype(np.float32))


def kv_row(codes, scales, rotated):
    """The drawing in types.h, from its parts."""
    body = np.concatenate([codes, rotated.view(np.uint8), scales])
    return np.pad(body, (0, -body.size % 8))


# ------------------------------------------------------------------------------ the formats


@each("kv_load")
def test_all_e4m3_codes_under_all_e8m0_scales(v, ops):
    """256 x 256: a KV row of one group per scale; 255 is NaN, byte 0 is 2^-127."""
    assert (ops["formats/e8m0_exponent"][:255] == np.arange(255) - 127).all()
    values = ops["formats/e4m3_values"].astype(np.float64)
    assert np.array_equal(values, e4m3_values(), equal_nan=True)
    rotated = np.arange(64, dtype=np.uint16)
    for scale in range(256):
        for part in range(4):
            codes = np.arange(64, dtype=np.uint8) + np.uint8(64 * part)
            row = kv_row(codes, np.array([scale], np.uint8), rotated)
            got = kv_load(v, row, d_head=128)
            assert (got[64:] == rotated).all()
            if scale == 255:
                assert (got[:64] == 0x7FC0).all()
                continue
            with np.errstate(over="ignore"):
                want = np.ldexp(values[codes], scale - 127).astype(np.float32)
            nan = np.isnan(want)
            assert (got[:64][~nan] == to_bf16(want[~nan])).all(), scale
            assert np.isnan(bf16(got[:64][nan])).all() and nan.sum() == (part % 2)


@each("index_load")
def test_all_e2m1_codes_under_all_e8m0_scales(v, ops):
    """Low nibble first: element 2j is the low half of byte j."""
    values = ops["formats/e2m1_values"]
    assert (values == E2M1).all()
    codes = np.arange(32, dtype=np.uint8) % 16
    packed = codes[0::2] | codes[1::2] << 4
    for scale in range(256):
        got = index_load(v, np.append(packed, np.uint8(scale)), 32)
        if scale == 255:
            assert (got == 0x7FC0).all()
            continue
        with np.errstate(over="ignore"):
            want = np.ldexp(values[codes].astype(np.float64), scale - 127)
            assert (got == to_bf16(want.astype(np.float32))).all(), scale


@each("act_quant")
def test_e4m3_encode(v, ops):
    """f32 -> code through a group whose scale is 1, for what bf16 can hold; then every bf16."""
    given, want = ops["formats/e4m3_encode_in"], ops["formats/e4m3_encode_out"]
    exact = (bf16(to_bf16(given)) == given) & (np.abs(given) <= 448)
    assert exact.sum() >= 20
    for value, code in zip(given[exact], want[exact], strict=True):
        x = to_bf16(np.array([value, 448.0], np.float32))
        assert act_quant(v, x)[1][0] == code, value
    table = e4m3_values()[:0x7F].astype(np.float64)
    every = np.arange(0x43E1, dtype=np.uint16)  # 0 .. 448
    x = np.zeros((-(-every.size // 127), 128), np.uint16)
    flat = np.zeros(x.shape[0] * 127, np.uint16)
    flat[: every.size] = every
    x[:, 1:] = flat.reshape(-1, 127)
    x[:, 0] = 0x43E0
    codes = act_quant(v, x.reshape(-1))[1].reshape(x.shape)[:, 1:].reshape(-1)[: every.size]
    value = bf16(every).astype(np.float64)
    middle = (table[1:] + table[:-1]) / 2
    up = np.searchsorted(middle, value, side="right")  # a tie goes to the upper code ...
    tie = np.isin(value, middle)
    want_codes = np.where(tie & (up % 2 == 1), up - 1, up)  # ... unless that is odd
    assert (codes == want_codes).all()
    minus = act_quant(v, x.reshape(-1) | 0x8000)[1].reshape(x.shape)[:, 1:].reshape(-1)
    assert (minus[: every.size] == want_codes | 0x80).all()


@each("index_store")
def test_e2m1_encode(v, ops):
    given, want = ops["formats/e2m1_encode_in"], ops["formats/e2m1_encode_out"]
    exact = (bf16(to_bf16(given)) == given) & (np.abs(given) <= 6)
    assert exact.sum() >= 15
    for value, code in zip(given[exact], want[exact], strict=True):
        x = np.zeros(32, np.float32)
        x[[0, 1, 2]] = 6.0, value, value
        row = index_store(v, to_bf16(x))
        assert row[16] == 127
        assert (row[0] >> 4, row[1] & 15) == (code, code), value
    every = np.arange(0x40C1, dtype=np.uint16)  # 0 .. 6
    grid = np.abs(E2M1[:8]).astype(np.float64)
    middle = (grid[1:] + grid[:-1]) / 2
    value = bf16(every).astype(np.float64)
    up = np.searchsorted(middle, value, side="right")
    want_codes = np.where(np.isin(value, middle) & (up % 2 == 1), up - 1, up)
    for at in range(0, every.size, 31):
        part = every[at : at + 31]
        x = np.zeros(32, np.uint16)
        x[0] = 0x40C0
        x[1 : 1 + part.size] = part
        x[2::2] |= 0x8000
        row = index_store(v, x)[:16]
        codes = np.stack([row & 15, row >> 4], -1).reshape(-1)
        signs = (x >> 12 & 8)[1 : 1 + part.size]
        assert (codes[1 : 1 + part.size] == (want_codes[at : at + 31] | signs)).all()


# ------------------------------------------------------------------------ activations to FP8


@each("act_quant")
def test_act_quant_vectors(v, ops):
    for x, codes, scales in zip(
        *(ops[f"act_quant_fp8_128/{k}"] for k in ("x", "codes", "scales")), strict=True
    ):
        out, c, s = act_quant(v, x)
        assert (c == codes).all() and (s == scales).all()
        step = np.ldexp(np.float32(1), s.astype(np.int32) - 127)
        with np.errstate(over="ignore"):
            want = e4m3_values()[c] * np.repeat(step, 128)
        assert (out == to_bf16(want.astype(np.float32))).all()


# SPEC 3.4: amax -> exponent of the scale
SCALES = [(448, 0), (449, 1), (1, -8), (3.5, -7), (100, -2), (1e-4, -22), (1e-5, -22), (0, -22)]


@each("act_quant")
def test_act_quant_scales(v):
    for amax, exponent in SCALES:
        up = to_bf16(np.array([amax], np.float32))
        if amax == 449:  # between two bf16 values: the upper one
            up = np.array([0x43E1], np.uint16)
        assert act_quant(v, up)[2][0] == exponent + 127, amax
    rounded = {0.3: 0.3125, -1.7: -1.75, 5.1: 5, 17: 16, 19: 20, -447: -448}
    for value, want in rounded.items():
        x = to_bf16(np.array([value, 448], np.float32))
        assert bf16(act_quant(v, x)[0])[0] == want
    small = to_bf16(np.array([0.001, 2.0**-10, 448], np.float32))
    assert bf16(act_quant(v, small)[0]).tolist() == [2.0**-9, 0.0, 448.0]


@each("act_quant")
def test_act_quant_sizes_and_null_outputs(v):
    """Any length; groups are independent; NaN and infinity stay in their group."""
    for n in [*range(1, 67), 127, 128, 129, 255, 256, 300, 4096, 7168]:
        x = random_bf16(n, n)
        if n > 200:
            x[n // 2] = [0x7F80, 0xFF80, 0x7FC1, 0xFFFF][n % 4]
        got, want = act_quant(v, x), act_quant(ref("act_quant"), x)
        for g, w in zip(got, want, strict=True):
            assert (g == w).all(), n
        out = np.empty_like(x)
        v(out, None, None, x, n)
        assert (out == want[0]).all()
        if n > 200:
            group = n // 2 // 128
            inside = slice(128 * group, min(128 * group + 128, n))
            assert got[2][group] == 255
            assert (got[1][inside] == 0x7F).all() and (got[0][inside] == 0x7FC0).all()
            assert (np.delete(got[2], group) != 255).all()


@each("act_quant")
def test_act_quant_against_float64(v, ops):
    """Outlier-heavy rows (a few elements 2^12 above the rest): the error is the format's."""
    g = np.random.default_rng(3)
    x = g.standard_normal((64, 4096)) * np.where(g.random((64, 4096)) < 0.002, 4096.0, 1.0)
    bits = to_bf16(x.astype(np.float32))
    exact = bf16(bits).astype(np.float64)
    got = np.stack([bf16(act_quant(v, row)[0]) for row in bits]).astype(np.float64)
    amax = np.abs(exact.reshape(64, -1, 128)).max(-1, keepdims=True)
    bound = np.maximum(np.abs(exact.reshape(amax.shape[0], -1, 128)) / 16, amax / 448 / 256)
    assert (np.abs(got - exact).reshape(bound.shape) <= bound).all()


@each("act_flush")
def test_act_flush(v):
    every = np.arange(65536, dtype=np.uint16)
    want = np.where((every & 0x7FFF) < 0x2400, every & 0x8000, every)
    assert (act_flush(v, every) == want).all()
    for n in range(1, 67):
        x = every[0x23F0 : 0x23F0 + n]
        assert (act_flush(v, x) == want[0x23F0 : 0x23F0 + n]).all()


# ------------------------------------------------------------------------------------ KV rows


@each("kv_store")
def test_kv_vectors(v, ops):
    load = variants("kv_load")
    for x, y in zip(ops["fp8_sim_64/x"], ops["fp8_sim_64/y"], strict=True):
        rotated = random_bf16(5, 64)
        row = kv_store(v, np.concatenate([x, rotated]))
        assert row.size == 584 and (row[448:576] == rotated.view(np.uint8)).all()
        assert row[583] == 0
        for u in load:
            assert (kv_load(u, row) == np.concatenate([y, rotated])).all()


@each("kv_store")
@pytest.mark.parametrize("d_head, d_rope", [(512, 64), (192, 64), (128, 64), (416, 32)])
def test_kv_rows_equal_ref(v, d_head, d_rope):
    g = np.random.default_rng(d_head)
    for case in range(20):
        x = random_bf16(case, d_head, octaves=[1, 10, 60, 120][case % 4])
        if case >= 16:
            x[g.integers(0, d_head)] = [0x7F80, 0xFF80, 0x7FC0, 0xFFC1][case % 4]
        for fmt in (0, 1):
            row = kv_store(v, x, fmt, d_rope)
            assert (row == kv_store(ref("kv_store"), x, fmt, d_rope)).all()
            want = kv_load(ref("kv_load"), row, fmt, d_head, d_rope)
            if fmt:
                assert (want == x).all()
            for u in variants("kv_load"):
                assert (kv_load(u, row, fmt, d_head, d_rope) == want).all()


@each("kv_store")
def test_kv_store_twice_changes_nothing(v):
    """What was rounded once is kept: storing a loaded row gives the same row values."""
    for seed in range(10):
        once = kv_load(ref("kv_load"), kv_store(v, random_bf16(seed, 512)))
        again = kv_load(ref("kv_load"), kv_store(v, once))
        assert (once == again).all()


# ------------------------------------------------------------------- Hadamard and index rows


@each("hadamard")
def test_hadamard_vectors(v, ops):
    for n in (64, 128):
        for x, y in zip(ops[f"hadamard{n}/x"], ops[f"hadamard{n}/y"], strict=True):
            assert ulp_report(hadamard(v, x), y)["max_ulp"] <= 1


@each("hadamard")
def test_hadamard_is_sylvester(v):
    """Column j of the matrix, from a unit vector: (-1)^popcount(i & j) / sqrt(n)."""
    for n in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        for j in range(n):
            x = np.zeros(n, np.float32)
            x[j] = 1.0
            sign = np.array([(-1.0) ** (i & j).bit_count() for i in range(n)])
            want = to_bf16((sign / np.sqrt(n)).astype(np.float32))
            assert (hadamard(v, to_bf16(x)) == want).all(), (n, j)
        for seed in range(4):
            x = random_bf16(seed, n, octaves=20)
            assert (hadamard(v, x) == hadamard(ref("hadamard"), x)).all(), n


@each("index_store")
def test_index_vectors(v, ops):
    for x, y in zip(ops["fp4_sim_32/x"], ops["fp4_sim_32/y"], strict=True):
        row = index_store(v, x)
        assert row.size == 68
        for u in variants("index_load"):
            assert (index_load(u, row, 128) == y).all()


@each("index_store")
def test_index_scales(v):
    """The smallest scale is 2^-126, for zeros and subnormals; 6 fits under 1, more needs 2."""
    for amax, exponent in [(0.0, -126), (1e-39, -126), (6 * 2.0**-126, -126), (6, 0), (6.03125, 1)]:
        x = np.zeros(32, np.uint16)
        x[7] = to_bf16(np.array([amax], np.float32))[0]
        assert index_store(v, x)[16] == exponent + 127, amax


@each("index_store")
def test_index_rows_equal_ref(v):
    for n in (32, 64, 96, 128, 256):
        for case in range(24):
            x = random_bf16(case, n, octaves=[1, 10, 60, 126][case % 4])
            if case == 0:
                x[:] = 0
            if case >= 20:
                x[case % n] = [0x7F80, 0xFF80, 0x7FC0, 0xFFC1][case % 4]
            row = index_store(v, x)
            assert (row == index_store(ref("index_store"), x)).all()
            want = index_load(ref("index_load"), row, n)
            for u in variants("index_load"):
                assert (index_load(u, row, n) == want).all()
            if case >= 20:
                group = case % n // 32
                assert row[n // 2 + group] == 255
                assert (row[16 * group : 16 * group + 16] == 0).all()
                assert (want[32 * group : 32 * group + 32] == 0x7FC0).all()
