# SPDX-License-Identifier: Apache-2.0
"""Traces hold what the model computed: the stored values, whatever the cut, beside any neighbour,
and nothing of the model changes by a bit."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from compare import bf16, set_agreement, to_bf16, topk_valid, ulp_report
from harness import COMPRESSED, INDEX, load, pieces, prompt, rows, same
from numpy.typing import NDArray
from test_vectors import CSA, LAYERS

import dsv4
from dsv4 import nano
from dsv4.edit import DisableExperts
from dsv4.trace import PARTS

EVERYTHING: dict[str, Any] = dict.fromkeys(PARTS, True) | {"logits": "all", "nll": True}


def flat(tree: Any, name: str = "") -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays of `Trace.to_dict` by a path."""
    for key, value in tree.items():
        path = f"{name}/{key}"
        if isinstance(value, dict):
            yield from flat(value, path)
        elif isinstance(value, np.ndarray):
            yield path, value


def alike(got: dsv4.Trace, want: dsv4.Trace) -> None:
    """Two traces of the same tokens are equal in every bit."""
    a, b = dict(flat(got.to_dict())), dict(flat(want.to_dict()))
    assert a.keys() == b.keys() and got.position == want.position
    for path, values in b.items():
        same(a[path], values, path)


# ---- the stored values ----

@pytest.fixture(scope="module")
def stored(models, expected):
    """stored(name) -> a trace of everything for its prompt of 130, and the expected values."""

    @cache
    def run(name: str) -> tuple[dsv4.Trace, Any]:
        e = expected(name)
        return models(name).trace(e["prompt130/ids"], **EVERYTHING), e

    return run


@pytest.mark.parametrize("name", nano.CHECKPOINTS)
def test_the_first_layer_has_the_stored_values(stored, models, name: str) -> None:
    """It has seen no rounding but its own: the limits of a layer alone."""
    t, e = stored(name)
    at = e["prompt130/positions"][-16:]
    table = models(name)._core.tensor("embed.weight").view(np.uint16)
    embedding = table.reshape(models(name).config.vocab_size, -1)[t.tokens]
    assert (to_bf16(t.streams_in[0]) == embedding[:, None]).all()
    equal = (to_bf16(t.streams[0]) == e["prompt130/L0/stream"]).all((1, 2)).mean()
    assert equal >= e.layer_limits(0)[0]
    for ours, theirs in (("attention_out", "attn"), ("ffn_out", "ffn")):
        r = ulp_report(to_bf16(getattr(t.sublayers[0], ours)[at]), e[f"prompt130/L0/{theirs}"])
        assert r["equal"] >= 0.85 and r["rel"] <= 0.025, (ours, r)
    assert (t.router[0].experts == e["prompt130/L0/experts"]).all()
    want = e["prompt130/L0/expert_weights"]
    rel = np.abs(t.router[0].weights - want) / want
    assert np.quantile(rel, 0.9) <= 1e-6 and rel.max() <= 0.02
    same(to_bf16(t.kv[0].window[-4:]), e["prompt130/L0/window_kv"])


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_every_layer_is_near_the_stored_values(stored, name: str, layer: int) -> None:
    """Whole runs drift: the limits of test_vectors.py for whole runs."""
    t, e = stored(name)
    got = t.router[layer].experts
    agreement, _ = set_agreement(got, e[f"prompt130/L{layer}/experts"].astype(np.int32))
    lowest = min(e.noise["routes"][f"official/prompt130/L{layer}"].values())
    assert 1 - agreement <= 1.5 * (1 - lowest) + 2 / 130
    for key, ours in (("window_kv", t.kv[layer].window[-4:]), ("ckv", t.kv[layer].compressed),
                      ("index_keys", t.kv[layer].index)):
        if f"prompt130/L{layer}/{key}" not in e:
            continue
        want = bf16(e[f"prompt130/L{layer}/{key}"])
        mine = ours if key == "window_kv" else ours[e[f"prompt130/L{layer}/ckv_entries"]]
        rel = np.linalg.norm(mine - want, axis=1) / np.linalg.norm(want, axis=1)
        assert rel.max() <= (0.3 if layer else 0.002), (key, rel)


@pytest.mark.parametrize(("name", "layer"), CSA)
def test_index_scores_and_selections(stored, models, name: str, layer: int) -> None:
    """Where something was chosen there are scores of every entry, and the choice follows them."""
    t, e = stored(name)
    topk = models(name).config.index_topk
    view = t.indexer[layer]
    assert view.scores.shape == (130, 32)
    for i, (selected, scores) in enumerate(zip(view.selected, view.scores, strict=True)):
        n = (i + 1) // 4
        assert (~np.isnan(scores)).sum() == (n if n > topk else 0)
        if n > topk:
            assert topk_valid(selected, np.where(np.isnan(scores), -np.inf, scores), topk)
        else:
            assert selected.tolist() == [*range(n), *[-1] * (topk - n)]
    at = e[f"prompt130/L{layer}/index_positions"]
    want = bf16(e[f"prompt130/L{layer}/index_scores"])
    scored = np.isfinite(want) & ((at + 1) // 4 > topk)[:, None]
    assert np.corrcoef(view.scores[at][scored], want[scored])[0, 1] > 0.98


# ---- what the model itself computes ----

@pytest.fixture(scope="module")
def traced(tiny):
    """A trace of everything, of 200 tokens at once; with one thread."""
    return tiny.trace(prompt(tiny, 200), **EVERYTHING)


def test_a_traced_run_gives_the_same_bits(tiny, traced) -> None:
    session = tiny.session()
    want = session.append(traced.tokens, logits="all")
    same(traced.logits, want)
    same(tiny.session().append(traced.tokens[:150], "last", trace=dsv4.Trace(tiny, kv=True)),
         want[149:150])
    same(traced.session.fork().append([5]), session.append([5]))


def test_rows_of_a_trace_are_those_of_the_session(traced) -> None:
    for layer, view in traced.kv.items():
        assert len(view.compressed) == (200 // view.ratio if view.ratio else 0)
        for kind, values in ((COMPRESSED, view.compressed), (INDEX, view.index)):
            if len(values):
                same(to_bf16(values), rows(traced.session, layer, kind, range(len(values))))
        same(to_bf16(view.window[-32:]), rows(traced.session, layer, 0, range(168, 200)))


def test_layers_follow_each_other(traced) -> None:
    """Streams after a layer are those before the next; the mixing matrices say how they come."""
    hc = traced.model.config.hc_mult
    for i in range(3):
        same(traced.streams[i], traced.streams_in[i + 1])
    for i in range(4):
        for mix, before, y, after in (
            (traced.hyper[i].attention, traced.streams_in[i], traced.sublayers[i].attention_out,
             traced.streams_mid[i]),
            (traced.hyper[i].ffn, traced.streams_mid[i], traced.sublayers[i].ffn_out,
             traced.streams[i]),
        ):
            assert np.abs(mix.comb.sum(1) - 1).max() < 1e-5 and mix.comb.shape == (200, hc, hc)
            mine = mix.post[:, :, None] * y[:, None] + np.einsum("njk,njd->nkd", mix.comb, before)
            assert np.abs(mine - after).max() <= 2.0**-7 * np.abs(after).max()
        collapsed = np.einsum("nj,njd->nd", traced.hyper[i].attention.pre, traced.streams_in[i])
        cosine = (collapsed * traced.sublayers[i].attention_in).sum(1) / (
            np.linalg.norm(collapsed, axis=1)
            * np.linalg.norm(traced.sublayers[i].attention_in, axis=1))
        assert np.median(cosine) > 0.9  # but for the norm's own weights


def test_attention_weights_make_the_heads(traced) -> None:
    """Weights times rows are what the heads compute, to within the rounding of weights to bf16."""
    c = traced.model.config
    plain = c.head_dim - c.qk_rope_head_dim  # the rotary part is turned back in between
    for layer, view in traced.attention.items():
        whole = view.window.sum(2) + view.compressed.sum(2) + view.sink
        assert np.abs(whole - 1).max() < 1e-5
        kv = traced.kv[layer]
        for t in (0, 5, 31, 40, 150, 199):
            seen = view.positions[t] >= 0
            assert (view.window[t][:, ~seen] == 0).all() and seen.sum() == min(t + 1, 32)
            made = view.window[t][:, seen] @ kv.window[view.positions[t][seen]]
            chosen = view.entries[t] >= 0
            assert (view.compressed[t][:, ~chosen] == 0).all()
            made = made + view.compressed[t][:, chosen] @ kv.compressed[view.entries[t][chosen]]
            want = traced.heads[layer][t]
            error = np.abs(made - want)[:, :plain].max() / np.abs(want).max()
            assert error < 2.0**-7, (layer, t, error)


def test_entries_are_made_of_their_ranges(tiny, traced) -> None:
    """Another token changes just the entries whose range it lies in, in the first layer."""
    ids = traced.tokens.copy()
    ids[41] = (ids[41] + 1) % 97
    with tiny.trace(ids, kv=[0]) as other:
        differ = (other.kv[0].compressed != traced.kv[0].compressed).any(1)
    ranges = traced.kv[0].ranges()
    assert np.nonzero(differ)[0].tolist() == [10, 11]
    assert ((ranges[:, 0] <= 41) & (41 < ranges[:, 1]) == differ).all()


def test_the_lens_after_the_last_layer_is_the_head(tiny, traced) -> None:
    same(traced.lens(3), traced.logits)
    same(traced.lens(3, slice(5, 9)), traced.logits[5:9])
    same(traced.lens(1, 7), traced.lens(1)[7:8])
    assert (traced.lens(0) != traced.logits).any()


def test_nll(traced) -> None:
    logits = traced.logits.astype(np.float64)
    logp = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)
                           ) - logits.max(1, keepdims=True)
    want = -logp[np.arange(199), traced.tokens[1:]]
    np.testing.assert_allclose(traced.nll, want, atol=1e-5)


# ---- cuts, threads, neighbours ----

@pytest.mark.parametrize(("threads", "chunk", "cuts"), [
    (1, 0, 1), (2, 0, 200), (2, 0, 1), (2, 16, 200), (3, 16, 61), (3, 0, 2)])
def test_any_cut_and_any_team_give_the_same_trace(
    tiny_folder, traced, threads: int, chunk: int, cuts: int,
) -> None:
    with load(tiny_folder, threads=threads, chunk=chunk) as model:
        got = dsv4.Trace(model, **EVERYTHING)
        session = model.session()
        for piece in pieces(traced.tokens, cuts):
            session.append(piece, logits="none", trace=got)
        alike(got, traced)


def test_a_trace_may_begin_anywhere(tiny, traced) -> None:
    session = tiny.session()
    session.append(traced.tokens[:77], logits="none")
    got = dsv4.Trace(tiny, **EVERYTHING)
    session.append(traced.tokens[77:], logits="none", trace=got)
    assert got.position == 77 and len(got) == 123
    for path, values in flat(got.to_dict()):
        want = dict(flat(traced.to_dict()))[path]
        if path.endswith(("/compressed", "/index")) and path.startswith("/kv"):
            want = want[len(want) - len(values) :]
        else:
            want = want[-len(values) :]
        same(values, want, path)
    assert got.kv[0].first == 19 and got.kv[0].ranges()[0].tolist() == [72, 80]
    same(got.attention[0].positions, traced.attention[0].positions[77:])


def test_beside_neighbours(tiny, traced) -> None:
    """Some traced, some not, some other parts; nobody notices."""
    ids = traced.tokens
    others = [prompt(tiny, n, seed) for n, seed in ((40, 2), (1, 3), (90, 4))]
    want = [tiny.session().append(each, logits="all") for each in others]
    sessions = [tiny.session() for _ in range(4)]
    mine, its = dsv4.Trace(tiny, **EVERYTHING), dsv4.Trace(tiny, router=[2])
    cut = 101
    got = tiny.step([
        (sessions[0], others[0]), (sessions[1], ids[:cut], mine), (sessions[2], others[1], its),
        (sessions[3], others[2], None)], logits="all")
    tiny.step([(sessions[0], [5]), (sessions[1], ids[cut:], mine)], logits="none")
    alike(mine, traced)
    for rows_got, rows_want in zip([got[0], got[2], got[3]], want, strict=True):
        same(rows_got, rows_want)
    with tiny.trace(others[1], router=[2]) as alone:
        alike(its, alone)


def test_nothing_is_there_that_was_not_asked_for(tiny) -> None:
    with tiny.trace([1, 2, 3], router=[1], streams=[2]) as t:
        assert t.layers == [1, 2] and list(t.router) == [1] and list(t.streams) == [2]
        assert t.logits is None and t.nll is None and not t.kv and not t.hyper
        assert set(t.to_dict()) == {"position", "tokens", "router", "streams"}
        c = tiny.config
        assert t.nbytes == 3 * 4 * (
            1 + 2 * c.num_experts_per_tok + c.n_routed_experts + c.hc_mult * c.hidden_size)


# ---- steps that fail ----

def test_a_step_that_fails_adds_nothing(tiny, traced) -> None:
    t = dsv4.Trace(tiny, **EVERYTHING)
    session = tiny.session()
    session.append(traced.tokens[:50], trace=t)
    other = tiny.session()
    with pytest.raises(ValueError, match="another model|closed"):
        other.close()
        tiny.step([(session, [1, 2, 3], t), (other, [1])])
    session.append(traced.tokens[50:], trace=t)
    alike(t, traced)


def test_taps_are_checked_by_the_engine(tiny) -> None:
    """What Python gives it has room, whatever position the session has."""
    value = dsv4._core.VALUES.index
    session = tiny.session()
    short = np.empty((2, 2), np.int32)
    step = tiny._core.step
    cases: list[tuple[Any, type[Exception], str]] = [
        ((0, value("experts"), short), ValueError, "room for 2 rows"),
        ((0, value("experts"), np.empty((3, 2), np.float32)), TypeError, "int32"),
        ((0, value("experts"), np.empty((3, 3), np.int32)), ValueError, "dimension 1"),
        ((0, value("experts"), np.empty((3, 4), np.int32)[:, ::2]), TypeError, "contiguous"),
        ((1, value("index_scores"), np.empty((3, 1), np.float32)), ValueError, "no value"),
        ((9, value("experts"), short), ValueError, "no value"),
        ((0, 99, short), ValueError, "no value"),
        ((0, value("index_scores"), np.empty((3, 0), np.float32)), ValueError,
         "wanted 3 of 2"),
    ]
    session.append([1] * 5, logits="none")
    for tap, error, text in cases:
        with pytest.raises(error, match=text):
            step([(session._core, [1, 2, 3], 0, None, [tap])], None)
        assert session.position == 5


def test_edits_stay_with_a_session_that_is_traced(tiny) -> None:
    """What is copied is what the session goes on with; a prompt in pieces keeps the edit."""
    edit = DisableExperts(1, [0, 1])
    with tiny.session(edit=edit) as a, tiny.session(edit=edit) as b:
        t = dsv4.Trace(tiny, router=[1], nll=True)
        ids = prompt(tiny, 200)
        same(a.append(ids, trace=t), b.append(ids))
        same(a.append([5]), b.append([5]))
        assert not np.isin([0, 1], t.router[1].experts).any()
