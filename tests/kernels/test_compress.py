# SPDX-License-Identifier: Apache-2.0
"""Compressor pooling: every variant against the stored entries and a NumPy twin."""

import numpy as np
import pytest
from calls import (
    hadamard,
    index_load,
    index_store,
    kv_load,
    kv_store,
    pool,
    rmsnorm,
    rope,
    rope_table,
)
from compare import bf16, to_bf16, ulp_report
from door import variants
from stored import tensor

F32 = np.float32


@pytest.fixture(scope="module")
def ops(vectors):
    return np.load(vectors / "ops.npz")


each = pytest.mark.parametrize("v", variants("pool"), ids=lambda v: v.name)


def projections(nano, ops, prefix, tokens):
    """f32 key and gate projections of the stored inputs (rounded once from float64), ape."""
    u = bf16(ops["compressor/u"][:tokens]).astype(np.float64)
    folder = nano("nano-flash")
    k = (u @ tensor(folder, prefix + "wkv.weight").astype(np.float64).T).astype(F32)
    gate = (u @ tensor(folder, prefix + "wgate.weight").astype(np.float64).T).astype(F32)
    return k, gate, tensor(folder, prefix + "ape")


def overlapping(v, k, gate, ape, window):
    """Rows of a CSA entry: the window before with its first half, this one with its second."""
    n, d = k.shape[1] // 2, slice(0, k.shape[1] // 2)
    rows = [(4 * window - 4 + i, i, d) for i in range(4)]
    rows += [(4 * window + i, i, slice(n, 2 * n)) for i in range(4)]
    keys = [k[max(t, 0), half] for t, _, half in rows]
    gates = [gate[t, half] if t >= 0 else None for t, _, half in rows]
    return pool(v, keys, gates, [ape[i, half] for _, i, half in rows])


@each
@pytest.mark.parametrize("kind", ["csa", "csa_index"])
def test_overlapping_windows(v, nano, ops, kind):
    """Layer 1: 25 entries of 4 tokens; the first has no window before it."""
    prefix = "layers.1.attn.compressor."
    if kind == "csa_index":
        prefix = "layers.1.attn.indexer.compressor."
    k, gate, ape = projections(nano, ops, prefix, int(ops[f"compressor/{kind}_tokens"]))
    want = ops[f"compressor/{kind}_pooled"]
    got = np.stack([overlapping(v, k, gate, ape, w) for w in range(len(want))])
    assert ulp_report(got, want)["max_ulp"] <= 1
    swapped = overlapping(v, np.roll(k, k.shape[1] // 2, 1), gate, ape, 3)
    assert ulp_report(swapped, want[3])["max_ulp"] > 100


@each
def test_long_windows(v, nano, ops):
    """Layer 2: 128 tokens an entry, no overlap; ape by the place in the window."""
    tokens = int(ops["compressor/hca_tokens"])
    k, gate, ape = projections(nano, ops, "layers.2.attn.compressor.", tokens)
    for w, want in enumerate(ops["compressor/hca_pooled"]):
        at = slice(128 * w, 128 * w + 128)
        assert ulp_report(pool(v, list(k[at]), list(gate[at]), list(ape)), want)["max_ulp"] <= 1


@each
def test_equals_ref(v):
    ref = variants("pool")[0]
    g = np.random.default_rng(8)
    for n in [*range(1, 67), 128, 512]:
        for n_row in (1, 2, 8, 128):
            k = [g.standard_normal(n).astype(F32) for _ in range(n_row)]
            gate = [(8 * g.standard_normal(n)).astype(F32) for _ in range(n_row)]
            ape = [g.standard_normal(n).astype(F32) for _ in range(n_row)]
            absent = [a if i % 3 else None for i, a in enumerate(gate)] if n_row > 1 else gate
            for some in (gate, absent):
                assert (pool(v, k, some, ape) == pool(ref, k, some, ape)).all(), (n, n_row)


@each
def test_equals_ref_on_many(v):
    """Enough that a product rounded too early shows through the rounding to bf16."""
    g = np.random.default_rng(10)
    k, gate, ape = (list(x) for x in g.standard_normal((3, 2, 1 << 20)).astype(F32))
    assert (pool(v, k, gate, ape) == pool(variants("pool")[0], k, gate, ape)).all()


@each
def test_against_float64(v):
    """Gates far apart and large: the maximum is subtracted, nothing overflows."""
    g = np.random.default_rng(9)
    k = g.standard_normal((8, 64)).astype(F32)
    for size in (1.0, 50.0, 1e4, 1e30):
        gate = (size * g.standard_normal((8, 64))).astype(F32)
        ape = g.standard_normal((8, 64)).astype(F32)
        s = (gate + ape).astype(np.float64)
        p = np.exp(s - s.max(0))
        want = to_bf16(((p * k).sum(0) / p.sum(0)).astype(F32))
        got = bf16(pool(v, list(k), list(gate), list(ape)))
        np.testing.assert_allclose(got, bf16(want), rtol=2**-7, atol=1e-6)


@each
def test_one_row_is_itself(v):
    k = np.arange(64, dtype=F32)
    zero = np.zeros(64, F32)
    assert (bf16(pool(v, [k, k + 1], [zero - 3, None], [zero, zero])) == k).all()


def named(op, name):
    return next((u for u in variants(op) if u.name == name), variants(op)[0])


def entry(name, pooled, weight, freq, position, index=False):
    """Norm, rotation of the last 64, and the rounding an entry is stored with."""
    x = rmsnorm(named("rmsnorm", name), pooled, weight, 1e-6)
    cos, sin = rope_table(named("rope_table", name), freq, position)
    x[-64:] = rope(named("rope", name), x[-64:], cos, sin)
    if index:
        x = hadamard(named("hadamard", name), x)
        return index_load(
            variants("index_load")[0], index_store(named("index_store", name), x), 128
        )
    return kv_load(named("kv_load", name), kv_store(named("kv_store", name), x))


@each
@pytest.mark.parametrize(
    "kind, prefix, ratio",
    [
        ("csa", "layers.1.attn.compressor.", 4),
        ("csa_index", "layers.1.attn.indexer.compressor.", 4),
        ("hca", "layers.2.attn.compressor.", 128),
    ],
)
def test_entries(v, nano, ops, kind, prefix, ratio):
    """From the stored pooled rows to the stored entries; rotated at the window's first token.

    A norm that is one ulp off can flip an FP8 or FP4 step; nothing else may differ.
    """
    weight = tensor(nano("nano-flash"), prefix + "norm.weight")
    freq, index = ops["rope/compressed_freqs"], kind == "csa_index"
    pooled, want = ops[f"compressor/{kind}_pooled"], ops[f"compressor/{kind}_entries"]
    rows = range(len(want))
    got = [entry(v.name, pooled[w], weight, freq, ratio * w, index) for w in rows]
    assert (np.stack(got) == want).mean() > 0.999
    by_pool_index = np.stack([entry(v.name, pooled[w], weight, freq, w, index) for w in rows])
    assert ((by_pool_index == want).all(1) == (np.arange(len(want)) == 0)).all()
