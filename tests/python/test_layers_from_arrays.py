# SPDX-License-Identifier: Apache-2.0
"""MoE and attention built from arrays: the bits of a model's layer, the values of plain NumPy."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsv4
from dsv4.arrays import from_bf16, to_bf16
from dsv4.tensors import E4M3

F32 = np.float32


@pytest.fixture(scope="module")
def load(nano: Callable[[str], Path]) -> Callable[..., dsv4.Model]:
    """load("nano-odd"), loaded once."""
    loaded: dict[str, dsv4.Model] = {}

    def model(name: str) -> dsv4.Model:
        if name not in loaded:
            loaded[name] = dsv4.load(nano(name), threads=1)
        return loaded[name]

    return model


def bf16(x: Any) -> Any:
    return from_bf16(to_bf16(np.asarray(x, F32))).astype(np.float64)


def draw(seed: int) -> Callable[..., Any]:
    g = np.random.default_rng(seed)
    return lambda *shape: g.standard_normal(shape, F32) / F32(shape[-1]) ** F32(0.5)


def raw(tensor: dsv4.Tensor) -> Any:
    """A tensor as arrays alone: numbers, codes of bfloat16, or (codes, scales)."""
    if tensor.scale is None:
        return tensor.numpy()
    return tensor.numpy(), tensor.scale.numpy()


# ---- the bits of a model's layer ----

def moe_of(model: dsv4.Model, index: int, form: Callable[[dsv4.Tensor], Any]) -> dsv4.MoE:
    c, t, base = model.config, model.tensors, f"layers.{index}.ffn"
    hashed = index < c.num_hash_layers
    stacks = [[form(t[f"{base}.experts.{e}.{w}.weight"]) for e in range(c.n_routed_experts)]
              for w in ("w1", "w2", "w3")]
    return dsv4.MoE(
        form(t[f"{base}.gate.weight"]), *stacks, top_k=c.num_experts_per_tok,
        shared=tuple(form(t[f"{base}.shared_experts.{w}.weight"]) for w in ("w1", "w2", "w3")),
        bias=None if hashed else t[f"{base}.gate.bias"],
        table=t[f"{base}.gate.tid2eid"] if hashed else None, scale=c.routed_scaling_factor,
        limit=c.swiglu_limit, threads=1)


def attention_of(
    model: dsv4.Model, index: int, form: Callable[[dsv4.Tensor], Any]
) -> dsv4.Attention:
    c, t, base = model.config, model.tensors, f"layers.{index}.attn"
    kind = model.layers[index].kind
    names = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "q_norm", "kv_norm")
    given: dict[str, Any] = {name: form(t[f"{base}.{name}.weight"]) for name in names}

    def compressor(at: str) -> dict[str, Any]:
        return dict(ape=t[f"{at}.ape"]) | {
            name: form(t[f"{at}.{name}.weight"]) for name in ("wkv", "wgate", "norm")}

    if kind != "SWA":
        given["compressor"] = compressor(f"{base}.compressor")
    if kind == "CSA":
        given["indexer"] = {
            name: form(t[f"{base}.indexer.{name}.weight"]) for name in ("wq_b", "weights_proj")
        } | dict(compressor=compressor(f"{base}.indexer.compressor"))
    y = c.rope_scaling
    return dsv4.Attention(
        kind, **given, sink=form(t[f"{base}.attn_sink"]), rope_dim=c.qk_rope_head_dim,
        window=c.sliding_window, top_k=c.index_topk, eps=c.rms_norm_eps, threads=1,
        rope_theta=c.rope_theta if kind == "SWA" else c.compress_rope_theta,
        yarn=(y.factor, y.original_max_position_embeddings, y.beta_fast, y.beta_slow))


@pytest.mark.parametrize("form", [lambda t: t, raw], ids=["tensors", "arrays"])
@pytest.mark.parametrize("name", ["nano-flash", "nano-odd", "nano-base"])
def test_the_bits_of_a_layer(
    load: Callable[..., dsv4.Model], name: str, form: Callable[[dsv4.Tensor], Any]
) -> None:
    model = load(name)
    x = np.random.default_rng(3).standard_normal((140, model.config.hidden_size))
    ids = np.arange(140)
    for layer in model.layers:
        moe, attention = moe_of(model, layer.index, form), attention_of(model, layer.index, form)
        assert repr(moe) == repr(layer.moe) and repr(attention) == repr(layer.attention)
        assert np.array_equal(moe(x, ids), layer.moe(x, ids))
        for a, b in zip(moe.route(x, ids), layer.moe.route(x, ids), strict=True):
            assert np.array_equal(a, b)
        mine, theirs = attention.state(), layer.attention.state()
        for rows in (x[:100], x[100:]):
            if layer.kind == "CSA":
                chosen = attention.index(rows, mine)
                wanted = layer.attention.index(rows, theirs)
                assert np.array_equal(chosen.selected, wanted.selected)
                assert np.array_equal(chosen.scores, wanted.scores, equal_nan=True)
            assert np.array_equal(attention(rows, mine), layer.attention(rows, theirs))
        assert np.array_equal(mine.compressed, theirs.compressed)


def test_stacked_arrays_are_lists(load: Callable[..., dsv4.Model]) -> None:
    model = load("nano-flash")
    t, base = model.tensors, "layers.3.ffn"
    stacks = []
    for w in ("w1", "w2", "w3"):
        codes, scales = zip(*(raw(t[f"{base}.experts.{e}.{w}.weight"]) for e in range(8)),
                            strict=True)
        stacks.append((np.stack(codes), np.stack(scales)))
    gate, bias = (t[f"{base}.gate.{name}"] for name in ("weight", "bias"))
    moe = dsv4.MoE(gate, *stacks, top_k=3, bias=bias, scale=1.5, threads=1)
    x = np.random.default_rng(3).standard_normal((5, 256))
    for e in (0, 7):
        assert np.array_equal(moe.experts[e](x), model.layers[3].moe.experts[e](x))
    assert not moe.shared(x).any()


# ---- the values of NumPy ----

def silu(z: Any) -> Any:
    return z / (1 + np.exp(-z))


def expert(x: Any, w: Any, weight: Any, limit: float) -> Any:
    g, u = bf16(x @ w[0].T), bf16(x @ w[2].T)
    h = weight[:, None] * silu(np.minimum(g, limit)) * np.clip(u, -limit, limit)
    return bf16(bf16(h) @ w[1].T)


def near(got: Any, want: Any, limit: float = 2**-7) -> None:
    """The error of every row against its length; bf16 has 2^-9, and sums flip some roundings."""
    scale = np.linalg.norm(want.reshape(len(want), -1), axis=1) + 1e-30
    error = np.linalg.norm((got - want).reshape(len(want), -1), axis=1) / scale
    assert error.max() < limit, error.max()


@pytest.mark.parametrize("dims", [(5, 37, 13, 2), (1, 1, 1, 1), (16, 200, 65, 6)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bf16"])
def test_moe_values(dims: tuple[int, int, int, int], dtype: str) -> None:
    n, hidden, width, top_k = dims
    make = draw(1)
    shapes = ((n, hidden), *2 * ((n, width, hidden), (n, hidden, width), (n, width, hidden)))
    kept: list[Any] = []
    for shape in (*shapes[:4], *(s[1:] for s in shapes[4:])):
        kept.append(to_bf16(4 * make(*shape)) if dtype == "bf16" else
                    (4 * make(*shape)).astype(dtype))
    bias = draw(2)(n)
    moe = dsv4.MoE(*kept[:4], top_k=top_k, shared=tuple(kept[4:]), bias=bias, scale=2.5, limit=3.0)
    gate, *w = (from_bf16(k).astype(np.float64) if dtype == "bf16" else k.astype(np.float64)
                for k in kept)
    x = bf16(draw(3)(9, hidden) * F32(hidden) ** F32(0.5))
    scores = np.sqrt(np.log1p(np.exp(x @ gate.T)))
    route = moe.route(x)
    near(route.scores, scores, 1e-5)
    ids = np.argsort(-(scores + bias), 1)[:, :top_k]
    chosen = np.take_along_axis(scores, ids, 1)
    assert (route.experts == ids).all()
    near(route.weights, 2.5 * chosen / chosen.sum(1, keepdims=True), 1e-5)
    want = expert(x, w[3:], np.ones(9), 3.0)
    near(moe.shared(x), want)
    for e in range(n):
        weight = np.where(route.experts == e, route.weights, 0).sum(1)
        part = expert(x, [m[e] for m in w[:3]], weight, 3.0)
        near(moe.experts[e](x, weight), part)
        want = want + part
    near(moe(x), want)


def test_moe_by_token_id() -> None:
    make, table = draw(4), np.array([[0, 2], [1, 0], [2, 1]], np.int32)
    w1, w2, w3 = make(3, 8, 16), make(3, 16, 8), make(3, 8, 16)
    for ids in (table, table.astype(np.int64)):
        moe = dsv4.MoE(make(3, 16), w1, w2, w3, top_k=2, table=ids)
        assert moe.hashed
        assert (moe.route(make(4, 16), [2, 0, 0, 1]).experts == table[[2, 0, 0, 1]]).all()
        with pytest.raises(ValueError, match=r"token_ids\[0\]: got 3, wanted 0 <= id < 3"):
            moe(make(1, 16), [3])


def test_quantised_experts() -> None:
    """FP8 and FP4 codes by hand; only their inputs are rounded too, so numerics="weights"."""
    g = np.random.default_rng(5)
    fp4 = g.integers(0, 256, (2, 64, 32), np.uint8), g.integers(122, 126, (2, 64, 2), np.uint8)
    fp8 = (g.integers(0, 0x38, (2, 64, 64), np.uint8), g.random((2, 1, 1), F32) + F32(0.5))
    gate = np.ones((2, 64), F32)
    moe = dsv4.MoE(gate, fp8, fp4, fp8, top_k=1, numerics="weights", limit=float("inf"))
    from dsv4.tensors import E2M1, E8M0

    w2 = np.empty((2, 64, 64))
    w2[..., 0::2], w2[..., 1::2] = E2M1[fp4[0] & 15], E2M1[fp4[0] >> 4]
    w2 *= np.repeat(E8M0[fp4[1]], 32, 2)
    w1 = E4M3[fp8[0]].astype(np.float64) * fp8[1]
    x = bf16(g.standard_normal((6, 64)))
    for e in range(2):
        near(moe.experts[e](x), expert(x, (w1[e], w2[e], w1[e]), np.ones(6), np.inf))


def rms(x: Any, w: Any) -> Any:
    return bf16(x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w)


def turn(x: Any, at: Any, theta: float, rope: int, sign: int = 1) -> Any:
    """The rotation of the last dimensions, without YaRN; at broadcasts to x but for those."""
    angle = at[..., None] / theta ** (np.arange(0, rope, 2) / rope)
    cos, sin = np.cos(angle), sign * np.sin(angle)
    a, b, out = x[..., -rope::2], x[..., -rope + 1 :: 2], x.copy()
    out[..., -rope::2], out[..., -rope + 1 :: 2] = a * cos - b * sin, a * sin + b * cos
    return bf16(out)


def fp8_by_64(x: Any, rope: int) -> Any:
    """Groups of 64 of all but the rotated dimensions, rounded to FP8 with a power of two."""
    grid, out = E4M3[:127].astype(np.float64), x.copy()
    for at in range(0, x.shape[-1] - rope, 64):
        part = x[..., at : at + 64]
        top = np.maximum(np.abs(part).max(-1, keepdims=True), 1e-4)
        scale = 2.0 ** np.ceil(np.log2(top / 448))
        size = np.abs(part) / scale
        i = np.clip(np.searchsorted(grid, size), 1, len(grid) - 1)
        low, high = size - grid[i - 1], grid[i] - size
        nearest = np.where((low < high) | ((low == high) & (i % 2 == 1)), grid[i - 1], grid[i])
        out[..., at : at + 64] = np.sign(part) * nearest * scale
    return out


def pooled(c: Any, u: Any, ratio: int, dim: int, theta: float, rope: int) -> Any:
    """The entries of all rows; with two halves the first is of the window before."""
    k, gate = u @ c["wkv"].T, u @ c["wgate"].T
    gate = gate + np.resize(c["ape"], gate.shape)
    found = []
    for e in range(len(u) // ratio):
        now = slice(e * ratio, (e + 1) * ratio)
        ks, gates = k[now, -dim:], gate[now, -dim:]
        if c["wkv"].shape[0] > dim and e:
            before = slice((e - 1) * ratio, e * ratio)
            ks = np.concatenate([k[before, :dim], ks])
            gates = np.concatenate([gate[before, :dim], gates])
        share = np.exp(gates - gates.max(0))
        found.append((share * ks).sum(0) / share.sum(0))
    entries = rms(bf16(np.array(found).reshape(-1, dim)), c["norm"])
    return fp8_by_64(turn(entries, np.arange(len(entries)) * ratio, theta, rope), rope)


def same_rows(got: Any, want: Any) -> None:
    """Rows as kept: equal but for a few roundings that flip, FP8's by up to an eighth."""
    assert got.shape == want.shape
    assert (np.abs(got - want) <= np.abs(want) / 8 + 2**-8).all()
    assert not got.size or (got != want).mean() < 0.002


def attention_values(
    w: Any, u: Any, kv: Any, entries: Any, ratio: int, window: int, groups: int, rope: int
) -> Any:
    """The sublayer from position 0 with all entries, in float64, rounded where the model rounds."""
    theta = 160000.0 if ratio else 10000.0
    n, heads, dim = len(u), len(w["sink"]), len(w["kv_norm"])
    at = np.arange(n)
    q = bf16(rms(bf16(u @ w["wq_a"].T), w["q_norm"]) @ w["wq_b"].T).reshape(n, heads, dim)
    square = bf16(bf16(bf16(q * q).mean(-1, keepdims=True)) + 1e-6)
    q = bf16(q * bf16(1 / np.sqrt(square)))  # this norm in steps of bf16 (SPEC 3.1)
    q = turn(q, at[:, None], theta, rope)
    out = np.empty((n, heads, dim))
    for t in range(n):
        seen = (t + 1) // ratio if ratio else 0
        keys = np.concatenate([kv[max(0, t - window + 1) : t + 1], entries[:seen]])
        s = np.exp(q[t] @ keys.T / np.sqrt(dim))
        out[t] = s @ keys / (s.sum(1) + np.exp(w["sink"]))[:, None]
    out = turn(bf16(out), at[:, None], theta, rope, -1).reshape(n, groups, -1)
    low = w["wo_a"].reshape(groups, -1, out.shape[2])
    return bf16(bf16(np.einsum("tgi,goi->tgo", out, low)).reshape(n, -1) @ w["wo_b"].T)


@pytest.mark.parametrize("kind", ["SWA", "CSA", "HCA"])
@pytest.mark.parametrize("dims", [(31, 3, 70, 6, 3, 9), (96, 4, 192, 64, 2, 40)])
def test_attention_values(kind: str, dims: tuple[int, ...]) -> None:
    hidden, heads, dim, rope, groups, window = dims
    make, ratio = draw(7), {"SWA": 0, "CSA": 4, "HCA": 5}[kind]
    w: dict[str, Any] = dict(
        wq_a=make(24, hidden), wq_b=make(heads * dim, 24), wkv=make(dim, hidden),
        wo_a=make(groups * 7, heads * dim // groups), wo_b=make(hidden, groups * 7),
        q_norm=1 + make(24), kv_norm=1 + make(dim), sink=make(heads))

    def compressor(of: int) -> dict[str, Any]:
        width = of * (2 if kind == "CSA" else 1)
        return dict(wkv=make(width, hidden), wgate=make(width, hidden), ape=make(ratio, width),
                    norm=1 + make(of))

    if ratio:
        w["compressor"] = compressor(dim)
    given = dict(w)
    if kind == "CSA":
        given["indexer"] = dict(
            wq_b=make(2 * 64, 24), weights_proj=make(2, hidden), compressor=compressor(64))
    attention = dsv4.Attention(kind, **given, rope_dim=rope, window=window, yarn=None, context=99)
    x = bf16(draw(8)(60, hidden) * F32(hidden) ** F32(0.5))
    state, got, kept = attention.state(), [], []
    for row in x[:, None]:
        got.append(attention(row, state)[0])
        kept.append(state.window[-1])
        assert len(state.window) == min(len(got), window)
    assert np.array_equal(got, attention(x))
    theta = 160000.0 if ratio else 10000.0
    kv = turn(rms(bf16(x @ w["wkv"].T), w["kv_norm"]), np.arange(60), theta, rope)
    same_rows(np.array(kept), fp8_by_64(kv, rope))
    entries = pooled(w["compressor"], x, ratio, dim, theta, rope) if ratio else kv[:0]
    same_rows(state.compressed, entries)
    near(np.array(got), attention_values(
        w, x, np.array(kept, np.float64), state.compressed.astype(np.float64), ratio, window,
        groups, rope))


# ---- refusals ----

def small_moe(**changes: Any) -> dsv4.MoE:
    make = draw(1)
    given: dict[str, Any] = dict(
        gate=make(4, 64), w1=make(4, 16, 64), w2=make(4, 64, 16), w3=make(4, 16, 64), top_k=2)
    return dsv4.MoE(**given | changes)


def codes(*shape: int) -> Any:
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize(("changes", "error", "says"), [
    (dict(gate=codes(4, 64)), TypeError, "gate: got an array of uint8, wanted float32"),
    (dict(gate=np.ones((4, 64))), TypeError, "gate: got an array of float64"),
    (dict(gate=np.ones(4, F32)), ValueError, r"gate: got shape \(4,\), wanted \(experts, hidden\)"),
    (dict(gate=np.ones((0, 64), F32)), ValueError, "none of them 0"),
    (dict(w1=draw(1)(3, 16, 64)), ValueError, "w1: got 3 experts, wanted 4"),
    (dict(w1=draw(1)(4, 16, 63)), ValueError,
     r"w1\[0\]: got shape \(16, 63\), wanted \(width, hidden\) = \(16, 64\)"),
    (dict(w2=draw(1)(4, 16, 64)), ValueError, r"w2\[0\].*\(hidden, width\) = \(64, 16\)"),
    (dict(w3=draw(1)(16, 64)), ValueError, r"w3: got shape \(16, 64\), wanted \(experts, width, h"),
    (dict(w3=[]), ValueError, "w3: got none"),
    (dict(w1=codes(4, 16, 64)), TypeError, "w1: got an array of uint8"),
    (dict(w1=(codes(4, 16, 64), codes(4, 1, 2))), ValueError,
     r"w1\[0\] scales: got shape \(1, 2\), wanted \(1, 1\) for FP8 codes"),
    (dict(w1=(codes(4, 16, 64), np.zeros((4, 1, 1)))), TypeError, "scales: got .* of float64"),
    (dict(w1=(codes(4, 16, 64), codes(4, 1, 1) + 255)), ValueError, "scale that is NaN"),
    (dict(w1=(codes(4, 16), codes(4, 1))), ValueError, "w1: got codes"),
    (dict(w1=[(codes(16, 64),)] * 4), ValueError, "got a tuple of 1, wanted a pair"),
    (dict(w1=[codes(16, 64)] * 4), TypeError, "codes without scales"),
    (dict(shared=(1, 2)), TypeError, "shared: wanted three weights"),
    (dict(shared=(draw(1)(16, 64),) * 3), ValueError, "shared w2: got shape"),
    (dict(top_k=0), ValueError, "top_k: got 0, wanted 1 to 4"),
    (dict(top_k=5), ValueError, "top_k: got 5, wanted 1 to 4"),
    (dict(top_k=True), TypeError, "top_k: got bool"),
    (dict(scale=0), ValueError, "scale: got 0"), (dict(limit=float("nan")), ValueError, "limit"),
    (dict(limit="x"), TypeError, "limit: got str"),
    (dict(bias=np.ones(3, F32)), ValueError, r"bias: got shape \(3,\), wanted \(experts,\) = \(4,"),
    (dict(bias=np.full(4, np.nan, F32)), ValueError, "NaN or infinite"),
    (dict(bias=np.ones(4, F32), table=np.zeros((5, 2), int)), ValueError, "bias: got one beside"),
    (dict(table=np.zeros((5, 3), int)), ValueError, r"table: got shape \(5, 3\)"),
    (dict(table=np.zeros((5, 2))), TypeError, "table: got an array of float64"),
    (dict(table=np.full((5, 2), 4)), ValueError, "table: got expert 4, wanted ids from 0 to 3"),
    (dict(table=np.full((5, 2), -1)), ValueError, "table: got expert -1"),
    (dict(numerics="exact"), ValueError, "numerics: got 'exact'"),
    (dict(threads=0), ValueError, "threads: got 0"),
])
def test_moe_refuses(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        small_moe(**changes)


def small_attention(kind: str = "CSA", **changes: Any) -> dsv4.Attention:
    make = draw(1)
    given: dict[str, Any] = dict(
        wq_a=make(24, 32), wq_b=make(2 * 72, 24), wkv=make(72, 32), wo_a=make(10, 72),
        wo_b=make(32, 10), q_norm=make(24), kv_norm=make(72), sink=make(2), rope_dim=8)
    pool = dict(wkv=make(144, 32), wgate=make(144, 32), ape=make(4, 144), norm=make(72))
    own = dict(wkv=make(64, 32), wgate=make(64, 32), ape=make(4, 64), norm=make(32))
    if kind == "CSA":
        given |= dict(compressor=pool, indexer=dict(
            wq_b=make(96, 24), weights_proj=make(3, 32), compressor=own))
    elif "compressor" in changes:
        changes = changes | dict(compressor=pool | changes["compressor"])
    return dsv4.Attention(kind, **given | changes)


@pytest.mark.parametrize(("changes", "error", "says"), [
    (dict(kind="MLA"), ValueError, "kind: got 'MLA', wanted 'SWA', 'CSA' or 'HCA'"),
    (dict(kind="HCA"), ValueError, "compressor: got none, wanted one for CSA and HCA alone"),
    (dict(kind="SWA", compressor={}), ValueError, "compressor: got one"),
    (dict(kind="HCA", compressor={}, indexer={}), ValueError, "indexer: got one"),
    (dict(kind="HCA", compressor={}), ValueError, "ape: got 4 rows.*at least 2, not 4 for HCA"),
    (dict(kind="HCA", compressor=dict(ape=draw(1)(1, 72))), ValueError, "ape: got 1 rows"),
    (dict(kind="HCA", compressor=dict(ape=draw(1)(5, 72))), ValueError, "compressor: wkv: got"),
    (dict(compressor=dict(wkv=1)), ValueError, "compressor: got wkv, wanted wkv, wgate, ape, norm"),
    (dict(compressor=[1]), TypeError, "compressor: got list, wanted a dict"),
    (dict(indexer=dict(wq_b=1)), ValueError, "indexer: got wq_b, wanted wq_b, weights_proj"),
    (dict(wkv=draw(1)(72, 31)), ValueError,
     r"wkv: got shape \(72, 31\), wanted \(head_dim, hidden\) = \(72, 32\)"),
    (dict(wq_b=draw(1)(143, 24)), ValueError, r"wq_b: .*\(heads_head_dim, q_rank\) = \(144, 24\)"),
    (dict(wo_a=draw(1)(10, 71)), ValueError, "wo_a: got shape .* groups a divisor of the heads"),
    (dict(wo_a=draw(1)(10, 145)), ValueError, "wo_a: got shape"),
    (dict(wo_a=draw(1)(9, 72)), ValueError, "wo_a: got shape"),
    (dict(wo_b=draw(1)(32, 9)), ValueError, "wo_b: got shape"),
    (dict(sink=np.float32(1)), ValueError, r"sink: got shape \(\), wanted \(heads,\)"),
    (dict(q_norm=np.ones(24, int)), TypeError, "q_norm: got an array of int64"),
    (dict(kv_norm=np.full(72, np.inf, F32)), ValueError, "NaN or infinite"),
    (dict(rope_dim=7), ValueError, "rope_dim: got 7, wanted an even number"),
    (dict(rope_dim=10), ValueError, "rope_dim: got 10"), (dict(rope_dim=0), ValueError, "rope_dim"),
    (dict(rope_dim=74), ValueError, "rope_dim: got 74, wanted 2 to 72"),
    (dict(window=0), ValueError, "window"), (dict(top_k=0), ValueError, "top_k"),
    (dict(rope_theta=1.0), ValueError, "rope_theta: got 1.0"), (dict(eps=-1), ValueError, "eps"),
    (dict(yarn=(1, 2)), TypeError, "yarn: wanted"),
    (dict(yarn=(0, 1, 1, 1)), ValueError, "yarn factor"), (dict(context=0), ValueError, "context"),
])
def test_attention_refuses(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        small_attention(**changes)


def test_an_indexer_of_odd_rows() -> None:
    make = draw(1)
    own = dict(wkv=make(64, 32), wgate=make(64, 32), ape=make(4, 64), norm=make(32))
    for rows in (95, 48 * 3):
        with pytest.raises(ValueError, match=f"indexer: wq_b: got {rows} rows for 3 heads"):
            small_attention(indexer=dict(
                wq_b=make(rows, 24), weights_proj=make(3, 32), compressor=own))


def test_states_belong_to_their_attention() -> None:
    a, b, x = small_attention(), small_attention(), np.ones((3, 32))
    with pytest.raises(ValueError, match="state: wanted a state of this model's layer"):
        a(x, b.state())
    full = small_attention(context=4)
    state = full.state()
    full(x, state)
    with pytest.raises(ValueError, match="got 3 rows after 3, wanted at most 4 in all"):
        full(x, state)


def test_arrays_of_any_layout() -> None:
    """Strided, big-endian, read-only and later changed arrays: what counts is what they held."""
    x = draw(2)(3, 64)
    want = small_moe()(x)
    make = draw(1)
    gate, w1, w2, w3 = make(4, 64), make(4, 16, 64), make(4, 64, 16), make(4, 16, 64)
    fortran = np.asfortranarray(gate)
    fortran.setflags(write=False)
    wide = np.repeat(w1, 2, axis=2)
    moe = small_moe(gate=fortran, w1=wide[:, :, ::2], w2=w2.astype(">f4"), w3=list(w3))
    wide[:], w2[:] = 0, 0
    assert np.array_equal(moe(x), want)


def test_nothing_is_left_behind() -> None:
    small_moe()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        small_moe(threads=2)
        with pytest.raises(ValueError, match="NaN"):
            small_moe(bias=np.full(4, np.nan, F32))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert Path("/proc/self/maps").read_text().count("dsv4 weights") <= 1


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsv4.memory, "available_memory", lambda: 1000)
    with pytest.raises(MemoryError, match=r"weights: the copy takes .*, free are 1,000 B|1000"):
        small_moe()
