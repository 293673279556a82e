# SPDX-License-Identifier: Apache-2.0
"""Index scores and top-k, every variant: the official vectors, the contract in NumPy, ties, NaN."""

import ctypes

import numpy as np
import pytest
from calls import index_store
from compare import bf16, to_bf16, ulp_report
from contract import E2M1
from door import IndexScoresArgs, aligned, pointer, variants

NAN = np.float32(np.nan)


@pytest.fixture(scope="module")
def ops(vectors):
    return {k: v for k, v in np.load(vectors / "ops.npz").items() if k.startswith("indexer/")}


def each(op, restype=None):
    return pytest.mark.parametrize("v", variants(op, restype), ids=lambda v: v.name)


def index_rows(x):
    """uint16 [..., n] bf16 -> index rows uint8."""
    store = variants("index_store")[0]
    rows = [index_store(store, r) for r in x.reshape(-1, x.shape[-1])]
    return np.stack(rows).reshape(*x.shape[:-1], -1)


def score(v, q, keys, head_w, w_scale=1.0, block=7):
    """Index rows q [heads, bytes], keys [n, bytes], bf16 head_w [heads] -> float32 [n]."""
    q, keys, head_w = (np.ascontiguousarray(a) for a in (q, keys, head_w))
    runs = [keys[i : i + block].copy() for i in range(0, len(keys), block)]
    table = np.array([r.ctypes.data for r in runs], np.uint64)
    d_index = q.shape[1] // 17 * 32
    out = np.full(len(keys) + 1, 7, np.float32)
    scratch = aligned(64 * (len(q) + 64) * (d_index // 32 * 9 + 8))
    v(
        IndexScoresArgs(
            pointer(out), pointer(q), pointer(table), pointer(head_w), pointer(scratch),
            float(w_scale), len(keys), block, len(q), d_index,
        )
    )
    assert out[-1] == 7
    return out[:-1]


def top_k(v, scores, k):
    """Ids of the k best, int32, ascending."""
    scores = np.ascontiguousarray(scores, np.float32)
    ids = np.full(k + 1, -7, np.int32)
    count = v(ids, scores, len(scores), k, aligned(4 * len(scores) + 16384))
    assert count == min(k, len(scores)) and ids[count] == -7
    return ids[:count]


def stable_best(scores, k):
    """The contract of top_k: higher first, then lower id; NaN as -infinity."""
    keys = np.where(np.isnan(scores), -np.inf, scores)
    return np.sort(np.argsort(-keys, kind="stable")[:k])


def round_bf16(x):
    return bf16(to_bf16(np.asarray(x, np.float32)))


def contract_scores(q, keys, head_w, w_scale):
    """Rule 5 in NumPy; finite scales near 1, so that float64 holds every fused step exactly."""
    def parts(rows):
        codes = rows[:, : rows.shape[1] // 17 * 16]
        v = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], -1).reshape(len(rows), -1, 32)
        return v.astype(np.float64), rows[:, codes.shape[1] :].astype(int) - 127
    (qv, qe), (kv, ke) = parts(q), parts(keys)
    total = np.zeros(len(keys), np.float32)
    for h in range(len(q)):
        acc = np.zeros(len(keys), np.float32)
        for b in range(qv.shape[1]):
            product = (kv[:, b] @ qv[h, b]) * 2.0 ** (qe[h, b] + ke[:, b])
            acc = (acc + product).astype(np.float32)
        weight = round_bf16(bf16(head_w[h : h + 1]) * np.float32(w_scale))
        total = total + round_bf16(weight * np.maximum(round_bf16(acc), 0))
    return round_bf16(total)


def random_rows(seed, n, d_index):
    g = np.random.default_rng(seed)
    return index_rows(to_bf16(g.standard_normal((n, d_index)).astype(np.float32)))


# ------------------------------------------------------------------------------------------ scores


@each("index_scores")
def test_official_scores(v, ops):
    q, keys = index_rows(ops["indexer/q"]), index_rows(ops["indexer/keys"])
    for t, want in enumerate(ops["indexer/scores"]):
        visible = bf16(want) > -np.inf
        got = to_bf16(score(v, q[t], keys, ops["indexer/head_weights"][t]))
        report = ulp_report(got[visible], want[visible])
        assert visible.any() and report["max_ulp"] <= 1


@each("index_scores")
@pytest.mark.parametrize(
    "heads, d_index, n", [(64, 128, 100), (5, 64, 33), (1, 32, 3), (8, 160, 7)]
)
def test_contract(v, heads, d_index, n):
    g = np.random.default_rng(heads)
    q, keys = random_rows(1, heads, d_index), random_rows(2, n, d_index)
    w = to_bf16(g.standard_normal(heads).astype(np.float32))
    got = score(v, q, keys, w, 0.011048543)
    assert np.array_equal(got, contract_scores(q, keys, w, 0.011048543))


@each("index_scores")
def test_relu_is_per_head(v):
    """TRAPS 13: one head for, one against: the second counts nothing, it does not cancel."""
    key = np.ones(64, np.float32)
    rows = index_rows(to_bf16(np.stack([key, -key])))
    one = np.full(2, 0x3F80, np.uint16)
    assert score(v, rows, rows[:1], one)[0] == score(v, rows[:1], rows[:1], one[:1])[0] == 64


@each("index_scores")
def test_nan_scales(v):
    q, keys = random_rows(3, 5, 64), random_rows(4, 20, 64)
    w = np.full(5, 0x3F80, np.uint16)
    plain = score(v, q, keys, w)
    keys[7, -1] = 255
    got = score(v, q, keys, w)
    assert np.isnan(got[7]) and np.array_equal(np.delete(got, 7), np.delete(plain, 7))
    q[4, -2] = 255
    assert np.isnan(score(v, q, keys, w)).all()


# ------------------------------------------------------------------------------------------- top-k


@each("top_k", ctypes.c_int32)
def test_official_selection(v, ops):
    """The same scores are picked; which of equal ones is ours to define (lower id)."""
    for scores, selected in zip(ops["indexer/scores"], ops["indexer/selected"], strict=True):
        values = bf16(scores)
        visible = int((values > -np.inf).sum())
        want = selected[selected >= 0]
        got = top_k(v, values[:visible], len(selected))
        assert np.array_equal(np.sort(values[got]), np.sort(values[want]))


@each("top_k", ctypes.c_int32)
@pytest.mark.parametrize("n, k", [
    (0, 4), (1, 1), (5, 0), (5, 9), (17, 16), (100, 3), (4096, 512), (4097, 512), (8193, 512),
    (40000, 512), (300000, 512), (300000, 1024),
])
def test_stable_order(v, n, k):
    """TRAPS 24 and 35: any number of scores; ties, NaN, both zeros and -infinity among them."""
    g = np.random.default_rng(n + k)
    for scores in (
        round_bf16(g.standard_normal(n)),
        g.standard_normal(n).astype(np.float32),
        g.choice(np.array([-1, 0, -0.0, 1, NAN, -np.inf], np.float32), n),
        np.arange(n, dtype=np.float32),
        -np.abs(round_bf16(g.standard_normal(n))),
    ):
        assert np.array_equal(top_k(v, scores, k), stable_best(scores, k))


@each("top_k", ctypes.c_int32)
def test_ties_and_nan(v):
    """TRAPS 35."""
    assert top_k(v, [1, 2, 2, 2, 0], 2).tolist() == [1, 2]
    assert top_k(v, [-0.0, 0.0, -0.0], 2).tolist() == [0, 1]
    assert top_k(v, [NAN, -np.inf, -1, NAN], 2).tolist() == [0, 2]
    assert top_k(v, [NAN, NAN, NAN], 2).tolist() == [0, 1]
