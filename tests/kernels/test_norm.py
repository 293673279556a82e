# SPDX-License-Identifier: Apache-2.0
"""Mean square, weighted norm, query head norm: every variant against vectors and the contract."""

import numpy as np
import pytest
from calls import headnorm, mean_square, rmsnorm
from compare import bf16, to_bf16, ulp_report
from contract import dot, operand
from contract import mean_square as contract_mean_square
from door import variants

F32 = np.float32


@pytest.fixture(scope="module")
def ops(vectors):
    return np.load(vectors / "ops.npz")


def each(op):
    return pytest.mark.parametrize("v", variants(op), ids=lambda v: v.name)


def random_bf16(seed, n, octaves=4.0):
    g = np.random.default_rng(seed)
    x = g.standard_normal(n) * 2.0 ** g.uniform(-octaves, octaves, n)
    return to_bf16(x.astype(F32))


SIZES = [*range(1, 67), 96, 127, 128, 255, 256, 1000, 1536, 4096, 7168]


@each("mean_square")
def test_mean_square_contract(v, vectors):
    """Bit equality with contract.npz, and with the NumPy twin at every size around the lanes."""
    stored = np.load(vectors / "contract.npz")
    for x, want in zip(stored["bf16/x"], stored["mean_square/f32"], strict=True):
        assert mean_square(v, x).tobytes() == want.tobytes()
    for n in SIZES:
        for octaves in (8.0, 40.0):  # every add rounds; operands below 2^-55, which count as zero
            x = random_bf16(n, n, octaves)
            want = contract_mean_square(bf16(x)[None])[0]
            assert mean_square(v, x).tobytes() == want.tobytes(), n


def test_mean_square_flushes_operands():
    for v in variants("mean_square"):
        assert mean_square(v, np.full(64, 0x23FF, np.uint16)) == 0.0
        assert mean_square(v, np.full(64, 0xA400, np.uint16)) == F32(2.0**-110)


@each("rmsnorm")
def test_rmsnorm_vectors(v, ops):
    w = bf16(ops["rmsnorm/w"])
    for x, y in zip(ops["rmsnorm/x"], ops["rmsnorm/y"], strict=True):
        got = rmsnorm(v, x, w, ops["rmsnorm/eps"])
        assert ulp_report(got, y)["max_ulp"] <= 1


def factor(x):
    """1 / sqrt(mean square + eps), rounded once."""
    mean = contract_mean_square(bf16(x)[None])[0] + F32(1e-6)
    return F32(1 / np.sqrt(np.float64(mean)))


@each("rmsnorm")
def test_rmsnorm_step_by_step(v):
    """r is rounded once, the product with the weight is one f32 product, rounded once.

    The second weight puts every product on the edge between two bf16 values: an ulp of r shows.
    """
    for n in SIZES:
        x = random_bf16(n, n)
        r = factor(x)
        random = np.random.default_rng(n).standard_normal(n).astype(F32)
        for w in (random, F32(1 + 2**-8) / (bf16(x) * r)):
            assert (rmsnorm(v, x, w, 1e-6) == to_bf16(w * (bf16(x) * r))).all(), n


@each("rmsnorm")
def test_rmsnorm_multiplies_by_the_weight_last(v):
    """Weights for which w * (x * r) and (w * x) * r round to different bf16 values."""
    x = random_bf16(3, 2048)
    r = factor(x)
    w = np.random.default_rng(3).standard_normal((1000, 2048)).astype(F32)
    ours, other = to_bf16(w * (bf16(x) * r)), to_bf16((w * bf16(x)) * r)
    rows = np.flatnonzero((ours != other).any(1))
    assert rows.size >= 5
    for i in rows:
        assert (rmsnorm(v, x, w[i], 1e-6) == ours[i]).all()


@each("headnorm")
def test_headnorm_vectors(v, ops):
    """The vectors took the mean in f64: where it sits on a bf16 edge a head may differ."""
    heads = ops["headnorm/x"].reshape(-1, 512)
    want = ops["headnorm/y"].reshape(-1, 512)
    equal = [
        (headnorm(v, x, ops["headnorm/eps"]) == y).all() for x, y in zip(heads, want, strict=True)
    ]
    assert sum(equal) >= len(equal) - 1


@each("headnorm")
def test_headnorm_step_by_step(v):
    """SPEC 3.1 in NumPy: square, mean, + eps, 1/sqrt, product, each rounded to bf16."""

    def bf(x):
        return bf16(to_bf16(np.asarray(x, F32)))

    eps = F32(1e-6)
    for n in SIZES[:70]:
        for octaves, size in ((2.0, 1.0), (35.0, 1.0), (1.0, 2.0**-10)):  # the last: eps counts
            x = bf16(random_bf16(n, n, octaves)) * F32(size)
            square = operand(bf(x * x))
            m = bf(dot(square[None], np.ones((1, n), F32))[0, 0] / F32(n))
            r = bf(F32(1) / np.sqrt(bf(m + bf(eps))))
            assert (headnorm(v, to_bf16(x), 1e-6) == to_bf16(x * r)).all(), n


@each("headnorm")
def test_headnorm_takes_odd_before_even(v):
    """A lane holds 2^-24, 1, 2^-24: adding the 1 last would carry and tip the mean's rounding."""
    x = np.zeros(64, F32)
    x[[1, 33, 32]] = 2.0**-12, 1.0, 2.0**-12
    x[3] = 2.0**-4  # another lane: the sum of squares is 1 + 2^-8, half way between bf16 values
    assert bf16(headnorm(v, to_bf16(x), 0.0))[33] == 8.0
    x[[1, 0]] = x[[0, 1]]
    x[[33, 32]] = x[[32, 33]]
    assert bf16(headnorm(v, to_bf16(x), 0.0))[32] < 8.0


@each("headnorm")
def test_headnorm_has_sixteen_lanes(v):
    """Lane 0 holds 1, lane 8 twice 2^-24: they meet in the tree only, where both together count."""
    x = np.zeros(64, F32)
    x[[1, 17, 49, 3]] = 1.0, 2.0**-12, 2.0**-12, 2.0**-4
    assert bf16(headnorm(v, to_bf16(x), 0.0))[1] < 8.0
    x[49] = 0.0
    assert bf16(headnorm(v, to_bf16(x), 0.0))[1] == 8.0
