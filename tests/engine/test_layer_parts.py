# SPDX-License-Identifier: Apache-2.0
"""Parts of a layer: put together they are the layer, bit for bit, however they are called."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
from test_offload import budget

import dsv4
from dsv4.arrays import from_bf16, to_bf16
from dsv4.attention import AttentionState
from dsv4.moe import MoE

F32 = np.float32
NAMES = ("nano-flash", "nano-odd", "the one inside")
LENGTHS = (1, 2, 300)  # the last: more entries than an indexer selects, more rows than a window


@pytest.fixture(scope="module")
def made(models: Callable[..., dsv4.Model]) -> Iterator[Callable[[str], dsv4.Model]]:
    """made("nano-odd"), made("the one inside"): those models."""
    with dsv4.load(threads=1) as default:
        yield lambda name: default if name == "the one inside" else models(name)


def values(*shape: int, seed: int = 1) -> Any:
    """float32 holding bf16 values."""
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return from_bf16(to_bf16(numbers.astype(F32)))


def by_parts(layer: dsv4.Layer, streams: Any, ids: Any) -> Any:
    """What the layer does, part by part."""
    site = layer.hyper.attention
    mix = site(streams)
    streams = site.spread(layer.attention(mix.x), streams, mix.post, mix.comb)
    site = layer.hyper.ffn
    mix = site(streams)
    return site.spread(layer.moe(mix.x, ids), streams, mix.post, mix.comb)


def experts_one_by_one(moe: MoE, x: Any, ids: Any) -> Any:
    """The sum over experts in float32, ascending, the shared one last."""
    route = moe.route(x, ids)
    total = np.zeros(x.shape, F32)
    for e, expert in enumerate(moe.experts):
        tok, at = np.nonzero(route.experts == e)
        if len(tok):
            total[tok] += expert(x[tok], route.weights[tok, at])
    return from_bf16(to_bf16(total + moe.shared(x)))


def snapshot(state: AttentionState) -> list[Any]:
    return [state.position, state.window, state.compressed, state.index_keys]


def equal(a: list[Any], b: list[Any]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_the_layer(made: Callable[[str], dsv4.Model], name: str) -> None:
    model = made(name)
    c, kinds = model.config, set()
    for layer in model.layers:
        kinds.add((layer.kind, layer.moe.hashed))
        for n in LENGTHS:
            streams = values(n, c.hc_mult, c.hidden_size, seed=n)
            ids = harness.prompt(model, n)
            harness.same(by_parts(layer, streams, ids), layer(streams, ids), f"{layer} {n}")
    assert {kind for kind, _ in kinds} == {"SWA", "CSA", "HCA"}
    assert {hashed for _, hashed in kinds} == {True, False}


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_parts(made: Callable[[str], dsv4.Model], name: str) -> None:
    model = made(name)
    for layer in model.layers:
        attention, moe = layer.attention, layer.moe
        for n in LENGTHS:
            x, ids = values(n, model.config.hidden_size, seed=n), harness.prompt(model, n)
            harness.same(moe(x, ids), experts_one_by_one(moe, x, ids), f"{layer} {n}")
            heads = attention.attend(x)
            harness.same(attention(x), attention.output(heads), f"{layer} {n}")
            if layer.kind == "CSA":
                selected = attention.index(x).selected
                harness.same(attention.attend(x, selected=selected), heads, f"{layer} {n}")


@pytest.mark.parametrize("name", NAMES)
def test_parts_give_what_a_step_had(made: Callable[[str], dsv4.Model], name: str) -> None:
    """Every input and output of every part, as traced in one step over all layers."""
    model = made(name)
    ids = harness.prompt(model, 200)
    with model.trace(ids, router=True, indexer=True, streams_in=True, streams_mid=True,
                     streams=True, hyper=True, sublayers=True, heads=True, kv=True) as t:
        for i, layer in enumerate(model.layers):
            found = t.sublayers[i]
            for site, streams, mix, x in (
                (layer.hyper.attention, t.streams_in[i], t.hyper[i].attention, found.attention_in),
                (layer.hyper.ffn, t.streams_mid[i], t.hyper[i].ffn, found.ffn_in),
            ):
                got = site(streams)
                for part in ("pre", "post", "comb"):
                    harness.same(getattr(got, part), getattr(mix, part), f"{site} {part}")
                harness.same(got.x, x, repr(site))
            y, mix = layer.moe(found.ffn_in, ids), t.hyper[i].ffn
            harness.same(y, found.ffn_out)
            harness.same(
                layer.hyper.ffn.spread(y, t.streams_mid[i], mix.post, mix.comb), t.streams[i])
            route = layer.moe.route(found.ffn_in, ids)
            harness.same(route.experts, t.router[i].experts)
            harness.same(route.weights, t.router[i].weights)
            attention, x = layer.attention, found.attention_in
            harness.same(attention(x), found.attention_out)
            small = np.abs(t.heads[i]) < 2.0**-55  # no operand: parts give them as 0
            harness.same(attention.attend(x), np.where(small, F32(0), t.heads[i]))
            if layer.kind != "SWA":
                harness.same(attention.compress(x).compressed, t.kv[i].compressed)
            if layer.kind == "CSA":
                harness.same(attention.index(x).selected, t.indexer[i].selected)


def test_a_mix_is_what_its_sums_say(made: Callable[[str], dsv4.Model]) -> None:
    model = made("nano-flash")
    streams = values(5, 4, 256)
    for site in (model.layers[1].hyper.attention, model.layers[3].hyper.ffn):
        mix = site(streams)
        sums = np.einsum("nj,njd->nd", mix.pre.astype(np.float64), streams)
        np.testing.assert_allclose(mix.collapsed, sums, rtol=2**-8)
        np.testing.assert_allclose(mix.comb.sum(1), 1, atol=1e-5)
        assert (mix.post > 0).all() and (mix.post < 2).all() and (mix.pre > 0).all()
        y = values(5, 256, seed=2)
        spread = np.einsum("nk,nd->nkd", mix.post, y) + np.einsum("njk,njd->nkd", mix.comb, streams)
        got = site.spread(y, streams, mix.post, mix.comb)
        np.testing.assert_allclose(got, spread, rtol=2**-8, atol=1e-5)


def test_a_route_is_what_its_scores_say(made: Callable[[str], dsv4.Model]) -> None:
    model = made("nano-flash")
    x, ids = values(40, 256), harness.prompt(model, 40)
    for layer in model.layers:
        route = layer.moe.route(x, ids)
        name = f"layers.{layer.index}.ffn.gate"
        logits = x.astype(np.float64) @ model.tensors[f"{name}.weight"].dequantize(np.float64).T
        scores = np.sqrt(np.log1p(np.exp(logits)))
        np.testing.assert_allclose(route.scores, scores, rtol=1e-5)
        chosen = np.take_along_axis(scores, route.experts.astype(np.int64), 1)
        np.testing.assert_allclose(
            route.weights, 1.5 * chosen / chosen.sum(1, keepdims=True), rtol=1e-5)
        if layer.moe.hashed:
            table = model.tensors[f"{name}.tid2eid"].numpy()
            assert (route.experts == table[ids]).all()
        else:
            keys = route.scores + model.tensors[f"{name}.bias"].numpy()
            assert (route.experts == np.argsort(-keys, 1, kind="stable")[:, :3]).all()


@pytest.mark.parametrize("name", ["nano-flash", "nano-odd"])
def test_a_state_grows(made: Callable[[str], dsv4.Model], name: str) -> None:
    """Any cut of the rows gives the same bits, whatever was asked in between."""
    model = made(name)
    x = values(290, model.config.hidden_size)
    for layer in model.layers:
        attention = layer.attention
        whole, state = attention.state(), attention.state()
        want, at = attention(x, whole), 0
        for n in (1, 3, 130, 1, 100, 55):
            piece, before, other = x[at : at + n], snapshot(state), state.fork()
            entries = []
            if layer.kind != "SWA":
                entries = [e for e in attention.compress(piece, state) if e is not None]
            if layer.kind == "CSA":
                chosen = attention.index(piece, state)
                heads = attention.attend(piece, state, chosen.selected)
                harness.same(heads, attention.attend(piece, state))
                visible = (np.arange(at + 1, at + n + 1) // 4)[:, None]
                seen = np.arange((at + n) // 4) < visible
                assert (np.isfinite(chosen.scores) == seen).all()
            assert equal(snapshot(state), before)
            got = attention(piece, state)
            harness.same(got, want[at : at + n], f"{layer} from {at}")
            assert equal(snapshot(other), before)
            for entry, rows in zip(entries, (state.compressed, state.index_keys), strict=False):
                harness.same(entry, rows[len(rows) - len(entry) :])
            at += n
        assert equal(snapshot(state), snapshot(whole)) and state.position == len(x)


def test_selection_is_by_score(made: Callable[[str], dsv4.Model]) -> None:
    model = made("nano-flash")
    attention = model.layers[1].attention
    chosen = attention.index(values(200, 256))
    for t in (20, 100, 199):
        seen = chosen.scores[t, : (t + 1) // 4]
        best = np.sort(np.argsort(-seen, kind="stable")[:16])
        assert chosen.selected[t, : len(best)].tolist() == best.tolist()
        assert (chosen.selected[t, len(best) :] == -1).all()


def test_entries_can_be_masked(made: Callable[[str], dsv4.Model]) -> None:
    """What is selected decides: without an entry its contribution is gone, others stay."""
    attention = made("nano-flash").layers[1].attention
    x = values(80, 256)
    selected = attention.index(x).selected
    changed = selected.copy()
    changed[60, :15], changed[60, 15] = selected[60, 1:], -1
    a, b = attention.attend(x, selected=selected), attention.attend(x, selected=changed)
    assert np.nonzero((a != b).any((1, 2)))[0].tolist() == [60]


def test_threads_and_passes(nano: Callable[[str], Path], made: Callable[[str], dsv4.Model]) -> None:
    """Three threads and passes of 37 rows give the bits of one thread and one pass."""
    want = made("nano-flash")
    x, ids = values(150, 256), harness.prompt(want, 150)
    streams = values(150, 4, 256)

    def everything(layer: dsv4.Layer) -> list[Any]:
        attention, moe, state = layer.attention, layer.moe, layer.attention.state()
        attention(x[:70], state)
        mix = layer.hyper.ffn(streams)
        found = [*mix, layer.hyper.ffn.spread(x, streams, mix.post, mix.comb), moe(x, ids),
                 *moe.route(x, ids), moe.experts[3](x), moe.shared(x), attention.attend(x, state)]
        if layer.kind != "SWA":
            found += [e for e in attention.compress(x, state) if e is not None]
        if layer.kind == "CSA":
            found += [np.nan_to_num(a, nan=-1) for a in attention.index(x, state)]
        return [*found, attention(x, state), *snapshot(state)[1:]]

    with harness.load(nano("nano-flash"), threads=3, chunk=37) as model:
        for a, b in zip(model.layers, want.layers, strict=True):
            for i, (got, wanted) in enumerate(zip(everything(a), everything(b), strict=True)):
                harness.same(got, wanted, f"{a}, value {i}")


def test_experts_from_disk(nano: Callable[[str], Path], made: Callable[[str], dsv4.Model]) -> None:
    want = made("nano-flash")
    x, ids = values(30, 256), harness.prompt(want, 30)
    for kept in (4, 12):
        with harness.load(nano("nano-flash"), memory=budget(want.plan, kept)) as model:
            assert model._core.experts["slots"] >= kept
            for a, b in zip(model.layers, want.layers, strict=True):
                harness.same(a.moe(x, ids), b.moe(x, ids))
                for e in (0, 7):
                    harness.same(a.moe.experts[e](x), b.moe.experts[e](x))


def test_one_state_two_threads(made: Callable[[str], dsv4.Model]) -> None:
    attention = made("nano-flash").layers[1].attention
    state, x = attention.state(), values(3, 256)
    threads = [threading.Thread(target=lambda: [attention(x, state) for _ in range(20)])
               for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state.position == 120


def test_refusals(made: Callable[[str], dsv4.Model]) -> None:
    model = made("nano-flash")
    swa, csa, hca = (model.layers[i] for i in range(3))
    x, streams = np.zeros((2, 256), F32), np.zeros((2, 4, 256), F32)
    mix = csa.hyper.ffn(streams)
    good = np.full((2, 16), -1)
    late = np.full((40, 16), -1)
    late[39, :2] = (3, 10)
    for call, error, says in (
        (lambda: csa.moe(x[:, 1:], [0, 1]), ValueError,
         r"x: got shape \(2, 255\), wanted \(n, hidden_size\) = \(n, 256\), n > 0"),
        (lambda: csa.moe(x[0], [0]), ValueError, "x: got shape"),
        (lambda: csa.moe(x[:0], []), ValueError, "n > 0"),
        (lambda: csa.moe(x.astype(np.int32)), TypeError, "x: got an array of int32, wanted floats"),
        (lambda: csa.moe("text"), TypeError, "wanted floats"),
        (lambda: csa.moe(x), ValueError, "token_ids: got none"),
        (lambda: csa.moe(x, [1]), ValueError, "token_ids: got 1, wanted one for each of the 2"),
        (lambda: csa.moe(x, [1, 512]), ValueError, r"token_ids\[1\]: got 512"),
        (lambda: hca.moe.route(x, [1, -1]), ValueError, r"token_ids\[1\]: got -1"),
        (lambda: csa.moe.experts[8], IndexError, "experts: got 8, wanted an index from 0 to 7"),
        (lambda: csa.moe.experts[-9], IndexError, "got -9"),
        (lambda: csa.moe.experts[0](x, [1.0]), ValueError, "weights: got 1, wanted one for each"),
        (lambda: csa.moe.experts[0](x, [1, 2]), TypeError, "weights"),
        (lambda: model.layers[4], IndexError, "layers: got 4, wanted an index from 0 to 3"),
        (lambda: csa.hyper.ffn(x), ValueError,
         r"streams: got shape \(2, 256\), wanted \(n, hc_mult, hidden_size\) = \(n, 4, 256\)"),
        (lambda: csa.hyper.ffn.spread(x[:1], streams, mix.post, mix.comb), ValueError, "y: got 1"),
        (lambda: csa.hyper.ffn.spread(x, streams, mix.comb, mix.comb), ValueError, "post: got sh"),
        (lambda: csa.hyper.ffn.spread(x, streams, mix.post, mix.comb[:1]), ValueError, "comb: got"),
        (lambda: swa.attention.compress(x), ValueError, "no compressor"),
        (lambda: swa.attention.index(x), ValueError, "no indexer"),
        (lambda: hca.attention.index(x), ValueError, "no indexer"),
        (lambda: hca.attention.attend(x, selected=good), ValueError, "selected: an HCA layer"),
        (lambda: csa.attention.attend(x, selected=good[:1]), ValueError, r"= \(2, 16\)"),
        (lambda: csa.attention.attend(x, selected=good * 1.0), TypeError, "wanted integers"),
        (lambda: csa.attention.attend(x, selected=good + 1), ValueError, "selected: row 0: got 0"),
        (lambda: csa.attention.attend(x, selected=good - 1), ValueError, "selected: row 0: got -2"),
        (lambda: csa.attention.attend(np.zeros((40, 256)), selected=late), ValueError,
         "selected: row 39: got 10 at 1, wanted ascending ids of the 10 entries"),
        (lambda: csa.attention(x, hca.attention.state()), ValueError,
         "state: got that of layer 2, wanted that of layer 1"),
        (lambda: csa.attention(x, model.session()), TypeError, "state: got Session"),
        (lambda: csa.attention.output(x), ValueError, r"\(n, heads, head_dim\) = \(n, 4, 512\)"),
    ):
        with pytest.raises(error, match=says):
            call()  # type: ignore[no-untyped-call]


def test_private_doors_refuse(made: Callable[[str], dsv4.Model], tiny: dsv4.Model) -> None:
    from dsv4 import _core

    model, other = made("nano-flash"), tiny
    x = np.zeros((2, 256), np.uint16)
    state = _core.layer_state(model._core, 1)
    for call, says in (
        (lambda: _core.layer_state(model._core, 4), r"layer: got 4, wanted one in \[0, 4\)"),
        (lambda: _core.part(model._core, 10, 1, 0, None, None, (x,)), "part: got kind 10"),
        (lambda: _core.part(model._core, 3, -1, 0, None, None, (x,)), "of layer -1"),
        (lambda: _core.part(model._core, 4, 1, 9, None, None, (x, np.ones(2, F32))), "got 9"),
        (lambda: _core.part(model._core, 4, 1, 0, None, None, (x, None)), "wanted its inputs"),
        (lambda: _core.part(model._core, 0, 1, 2, None, None, (np.zeros((1, 4, 256), "u2"),)),
         "wanted its inputs"),
        (lambda: _core.part(model._core, 9, 1, 0, None, None, (x,)), "and a state"),
        (lambda: _core.part(model._core, 3, 1, 0, state, None, (x,)), "and a state"),
        (lambda: _core.part(model._core, 5, 0, 0, state, None, (x,)), "no compressor"),
        (lambda: _core.part(model._core, 9, 1, 0, other.session()._core, None, (x,)), "this model"),
        (lambda: _core.part(model._core, 9, 1, 0, model.session()._core, None, (x,)), "of layer 0"),
        (lambda: _core.part(model._core, 3, 1, 0, None, None, (x, x)), "got 2 inputs, wanted 1"),
        (lambda: model._core.step([(state, [1], 0, None)], None), "the state of one layer"),
        (lambda: state.rows(0, 0, 0, 0), r"layer: got 0, wanted one in \[1, 2\)"),
        (lambda: state.blocks(2, 1, 0, 0), r"layer: got 2, wanted one in \[1, 2\)"),
    ):
        with pytest.raises(ValueError, match=says):
            call()  # type: ignore[no-untyped-call]
    state.fill(300, 1)
    assert state.position == 300 and len(state.rows(1, 1, 0, 75)) == 75


def test_nan_scores_end_the_call(made: Callable[[str], dsv4.Model]) -> None:
    attention = made("nano-flash").layers[1].attention
    state, x = attention.state(), values(100, 256)
    attention(x, state)
    before, bad = snapshot(state), x.copy()
    bad[3] = np.nan
    for call in (attention, attention.index):
        with pytest.raises(dsv4.NonFiniteLogitsError, match="layer 1: a score of its indexer"):
            call(bad, state)
        assert equal(snapshot(state), before)


def test_a_full_context(tmp_path: Path) -> None:
    with harness.load(harness.make_tiny(tmp_path / "m", max_position_embeddings=50)) as model:
        attention = model.layers[0].attention
        state, x = attention.state(), values(40, 128)
        attention(x, state)
        with pytest.raises(ValueError, match="got 40 .* after 40, wanted at most 50 in all"):
            attention(x, state)
        assert state.position == 40


def test_closed(nano: Callable[[str], Path]) -> None:
    with harness.load(nano("nano-odd")) as model:
        layer = model.layers[1]
        state, x = layer.attention.state(), values(7, 128)
        want = layer.attention(x, state)
    streams = np.zeros((1, 2, 128), F32)
    for call in (lambda: layer.moe(x), lambda: layer.attention(x, state), layer.attention.state,
                 lambda: layer.moe.shared(x), lambda: layer.hyper.ffn(streams)):
        with pytest.raises(ValueError, match="the model is closed"):
            call()
    assert state.position == 7 and state.compressed.shape == (1, 192) and len(want) == 7
