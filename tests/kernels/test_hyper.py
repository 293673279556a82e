# SPDX-License-Identifier: Apache-2.0
"""Hyper-connections: the collapse with its Sinkhorn iterations, the head's collapse, the spread."""

import numpy as np
import pytest
from calls import hc_post, hc_pre
from compare import bf16, to_bf16, ulp_report
from door import variants
from stored import tensor

F32 = np.float32


@pytest.fixture(scope="module")
def ops(vectors):
    return np.load(vectors / "ops.npz")


def each(op):
    return pytest.mark.parametrize("v", variants(op), ids=lambda v: v.name)


def weights(nano, name):
    return [tensor(nano("nano-flash"), f"{name}_{part}") for part in ("fn", "scale", "base")]


def dots(fn, streams):
    """fn times the flattened streams, rounded once from float64."""
    return (fn.astype(np.float64) @ bf16(streams).reshape(-1).astype(np.float64)).astype(F32)


def unit_streams(hc, d=64):
    """Streams whose mean square is one, so that with norm_eps = 0 the projections are the mixes."""
    return np.full((hc, d), 0x3F80, np.uint16)


@each("hc_pre")
def test_collapse_vectors(v, nano, ops):
    fn, scale, base = weights(nano, "layers.0.hc_attn")
    for i, streams in enumerate(ops["hc/X"]):
        x, post, comb = hc_pre(v, streams, dots(fn, streams), scale, base)
        assert ulp_report(x, ops["hc/x"][i])["max_ulp"] <= 1
        np.testing.assert_allclose(post, ops["hc/post"][i], rtol=1e-5)
        np.testing.assert_allclose(comb, ops["hc/comb"][i], rtol=1e-5)


@each("hc_pre")
def test_head_vectors(v, nano, ops):
    """Four gates, no post, no comb."""
    fn, scale, base = weights(nano, "hc_head")
    for streams, want in zip(ops["hc/X"], ops["hc/head_x"], strict=True):
        x, post, comb = hc_pre(v, streams, dots(fn, streams), scale, base, head=True)
        assert ulp_report(x, want)["max_ulp"] <= 1
        assert np.isnan(post).all() and np.isnan(comb).all()


@each("hc_pre")
def test_check_vector(v):
    """SPEC 2.6.  What the gates pre do is read off streams of which one is 2 and the rest 0."""
    i = np.arange(24)
    m = (0.125 * i - 1).astype(F32)
    base = (0.25 * ((7 * i) % 5 - 2)).astype(F32)
    scale = np.array([0.5, 0.75, 2.0], F32)
    want_pre = [0.26894245, 0.39233786, 0.53121042, 0.36297020]
    want_post = [0.93758124, 0.62810111, 0.90652370, 1.20037663]
    want_comb = [
        [0.22182731, 0.30962229, 0.15892707, 0.30962235],
        [0.39741701, 0.15892719, 0.28472769, 0.15892713],
        [0.22182731, 0.30962229, 0.15892707, 0.30962235],
        [0.15892737, 0.22182722, 0.39741722, 0.22182724],
    ]
    for j in range(4):
        streams = np.zeros((4, 64), np.uint16)
        streams[j] = 0x4000  # 2, mean square 1
        pre = np.full(4, np.nan, F32)
        x, post, comb = hc_pre(v, streams, m, scale, base, norm_eps=0.0, pre=pre)
        np.testing.assert_allclose(pre, want_pre, rtol=0, atol=2e-7)
        assert (x == to_bf16(np.array([2 * want_pre[j]], F32))).all()
        np.testing.assert_allclose(post, want_post, rtol=0, atol=2e-7)
        np.testing.assert_allclose(comb, want_comb, rtol=0, atol=2e-7)


@each("hc_pre")
@pytest.mark.parametrize("hc", [2, 3])
def test_other_stream_counts(v, ops, hc):
    part = {k: ops[f"hc_split{hc}/{k}"] for k in ("mixes", "scale", "base", "pre", "post", "comb")}
    streams = unit_streams(hc)
    for i, mixes in enumerate(part["mixes"]):
        x, post, comb = hc_pre(v, streams, mixes, part["scale"], part["base"], norm_eps=0.0)
        np.testing.assert_allclose(post, part["post"][i], rtol=1e-5)
        np.testing.assert_allclose(comb, part["comb"][i], rtol=1e-5)
        total = to_bf16(np.array([part["pre"][i].astype(np.float64).sum()], F32))
        assert ulp_report(x, np.broadcast_to(total, x.shape))["max_ulp"] <= 1


@each("hc_pre")
def test_comb_is_doubly_stochastic(v):
    """The last step is a column step: columns sum to 1 within rounding, rows nearly."""
    g = np.random.default_rng(6)
    streams = unit_streams(4)
    for _ in range(50):
        mixes, base = g.standard_normal((2, 24)).astype(F32)
        _, post, comb = hc_pre(v, streams, mixes, np.ones(3, F32), base, norm_eps=0.0)
        assert (comb > 0).all() and (np.abs(comb.sum(0) - 1) < 3e-6).all()
        assert (np.abs(comb.sum(1) - 1) < 0.02).all()
        assert ((post > 0) & (post < 2)).all()


@each("hc_pre")
def test_post_is_twice_the_sigmoid_and_pre_has_the_eps(v):
    big = np.full(24, -60, F32)
    streams = unit_streams(4)
    x, post, _ = hc_pre(v, streams, big, np.ones(3, F32), np.zeros(24, F32), norm_eps=0.0)
    assert (post < 1e-20).all() and (x == to_bf16(np.array([4e-6], F32))).all()
    _, post, _ = hc_pre(v, streams, -big, np.ones(3, F32), np.zeros(24, F32), norm_eps=0.0)
    assert (post == 2).all()


@each("hc_pre")
def test_collapse_equals_ref(v):
    ref = variants("hc_pre")[0]
    g = np.random.default_rng(7)
    for hc in range(1, 9):
        for d in [*range(1, 67), 256, 1000]:
            streams = to_bf16(g.standard_normal((hc, d)).astype(F32))
            n = (2 + hc) * hc
            mixes, base = (10 * g.standard_normal((2, n))).astype(F32)
            scale = g.standard_normal(3).astype(F32)
            for head in (False, True):
                cut = slice(0, hc if head else n)
                args = (streams, mixes[cut], scale, base[cut])
                got, want = (hc_pre(u, *args, iters=1 + d % 20, head=head) for u in (v, ref))
                for a, b in zip(got, want, strict=True):
                    assert a.tobytes() == b.tobytes(), (hc, d)


@each("hc_post")
def test_spread_vectors(v, ops):
    for i, streams in enumerate(ops["hc/X"]):
        out = hc_post(v, ops["hc/y"][i], streams, ops["hc/post"][i], ops["hc/comb"][i])
        assert ulp_report(out, ops["hc/out"][i])["max_ulp"] <= 1


@each("hc_post")
def test_spread_uses_the_transpose(v):
    """Stream 0 alone is not zero; row 0 of comb says where it goes."""
    streams = np.zeros((4, 32), np.uint16)
    streams[0] = 0x3F80
    comb = np.arange(16, dtype=F32).reshape(4, 4)
    out = hc_post(v, np.zeros(32, np.uint16), streams, np.ones(4, F32), comb)
    assert (bf16(out) == comb[0][:, None]).all()


@each("hc_post")
def test_spread_equals_ref(v):
    """In place or not, in one piece or by ranges of columns: the same bits."""
    ref = variants("hc_post")[0]
    g = np.random.default_rng(8)
    for hc in range(1, 9):
        for d in [*range(1, 67), 256, 1000]:
            streams = to_bf16(g.standard_normal((hc, d)).astype(F32))
            y = to_bf16(g.standard_normal(d).astype(F32))
            post = g.standard_normal(hc).astype(F32)
            comb = g.standard_normal((hc, hc)).astype(F32)
            want = hc_post(ref, y, streams, post, comb)
            assert (hc_post(v, y, streams, post, comb) == want).all()
            assert (hc_post(v, y, streams, post, comb, in_place=True) == want).all()
            cut = int(g.integers(0, d + 1))
            pieces = [(0, cut), (cut, d)]
            assert (hc_post(v, y, streams, post, comb, pieces, in_place=True) == want).all()
