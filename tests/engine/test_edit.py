# SPDX-License-Identifier: Apache-2.0
"""Edits: each against a result found in another way, and the same bits however tokens are cut.

The other ways: NumPy on values traced from the unedited model, a checkpoint whose weights say the
same, or the values of another run.
"""

import gc
import threading
import weakref

import harness
import numpy as np
import pytest
from harness import fed, pieces, prompt, same, state
from test_offload import budget

import dsv4
from dsv4 import _core
from dsv4.arrays import from_bf16, to_bf16
from dsv4.edit import (
    AblateHeads,
    AblateSinks,
    Callback,
    Clamp,
    DisableExperts,
    Edit,
    ForceEntries,
    ForceExperts,
    MaskEntries,
    Patch,
    ReweightExperts,
    Steer,
)

# harness.TINY: layer 0 is CSA and routes by hash, 1 HCA of 128 tokens, 2 SWA, 3 HCA of 16
LENGTH, D, STREAMS = 150, 128, 2
RNG = np.random.default_rng(8)
VECTOR = RNG.normal(size=D).astype(np.float32)


@pytest.fixture(scope="module")
def ids(tiny):
    return prompt(tiny, LENGTH)


def values(session, ids, layer, *names):
    """Traced values of one layer, for one step, by name."""
    core, end = session.model._core, session.position + len(ids)
    found = {}
    for name in names:
        integer, dims, _, widens = core.value(layer, _core.VALUES.index(name))
        ratio = session.model.config.compress_ratios[layer]
        dims = (*dims[:-1], dims[-1] + (end // ratio if widens else 0))
        found[name] = np.zeros((len(ids), *dims), np.int32 if integer else np.float32)
    taps = [(layer, _core.VALUES.index(name), array) for name, array in found.items()]
    core.step([(session._core, ids, 0, None, taps)], None)
    return [found[name] for name in names]


def seen(model, edit, ids, layer, *names):
    with model.session(edit=edit) as session:
        got = values(session, ids, layer, *names)
    return got if len(got) > 1 else got[0]


def logits(model, edit, ids):
    with model.session(edit=edit) as session:
        return session.append(ids, logits="all")


def rounded(values):
    return from_bf16(to_bf16(np.asarray(values, np.float32)))


def everything(some=(slice(20, 90), [3, 4, 40, 149], range(10, 60))):
    """An edit of every kind, each at positions of its own."""
    a, b, c = some
    rows = RNG.normal(size=(4, STREAMS, D))
    return Edit(
        Steer("embed", VECTOR, scale=0.1, positions=b), Steer(0, VECTOR, positions=a, streams=1),
        Patch(1, rows, positions=b), Clamp([2, 3], -0.5, 0.75, dims=range(0, D, 3), positions=c),
        Steer(1, VECTOR, site="attention_in", positions=c),
        Clamp(2, 0, 0, site="attention_out", positions=b),
        Patch(3, rows[:, 0], site="ffn_in", positions=b),
        Steer(0, VECTOR, site="ffn_out", scale=-0.5, positions=slice(60, None)),
        DisableExperts([0, 1, 3], [1, 4], positions=a), ReweightExperts(2, [0, 5], [0.25, 3]),
        ForceExperts(3, [[0, 1], [5, 2], [3, 4], [4, 0]], positions=b),
        AblateHeads(1, 0, positions=c), AblateSinks(2, positions=a), AblateSinks(0, 1),
        MaskEntries(0, [1, 5, 6, 20], positions=a), MaskEntries(3, range(2, 4), positions=c),
        ForceEntries(0, [2, 7], positions=slice(70, None)),
        Callback(2, lambda x, at: x * 0.5, positions=[7, 8, 100]))


# ---- nothing, and the same bits ----

def test_an_empty_edit_is_none(tiny, ids) -> None:
    plain = fed(tiny, [ids])
    for edit in (None, Edit(), tiny.edit(), tiny.edit(Edit(), Edit())):
        with tiny.session(edit=edit) as session:
            assert session.edit == Edit() and session._edit is None
            same(session.append(ids, logits="all"), plain)


@pytest.mark.parametrize("edit", [
    AblateHeads(1, 0, positions=slice(LENGTH, None)), Clamp(2, -1e30, 1e30),
    Steer(1, np.zeros(D)), ReweightExperts(3, 2, 1), ForceEntries(0, 0, positions=range(20)),
    Callback([0, 3], lambda x, at: None), MaskEntries(3, slice(40, None)),
], ids=repr)
def test_edits_that_change_nothing(tiny, ids, edit) -> None:
    same(logits(tiny, edit, ids), fed(tiny, [ids]))


@pytest.fixture(scope="module")
def edited(tiny, ids):
    """An edit of every kind and its logits in one piece, one thread."""
    edit = everything()
    return edit, logits(tiny, edit, ids)


@pytest.mark.parametrize("size", [1, 7, 16, 64])
def test_any_cut(tiny, ids, edited, size) -> None:
    edit, want = edited
    with tiny.session(edit=edit) as session:
        same(np.concatenate([session.append(p, logits="all") for p in pieces(ids, size)]), want)


@pytest.mark.parametrize("threads, chunk, disable", [
    (2, 16, None), (3, 0, "avx512bf16"), (1, 1, "avx512"), (3, 5, "avx2,avx512"),
])
def test_threads_passes_and_instruction_sets(
        tiny_folder, ids, edited, threads, chunk, disable) -> None:
    edit, want = edited
    with harness.load(tiny_folder, threads=threads, chunk=chunk, disable=disable) as model:
        same(logits(model, edit, ids), want)
        with model.session(edit=edit) as session:
            same(np.concatenate([session.append(p, logits="all") for p in pieces(ids, 11)]), want)


@pytest.mark.parametrize("place", [0, 3, 7])
def test_one_row_of_eight(tiny, ids, edited, place) -> None:
    """Its neighbours in prompt and decode are those of a batch without it."""
    edit, want = edited
    sessions = [tiny.session(edit=edit if i == place else None) for i in range(8)]
    plain = fed(tiny, [ids])
    for first, end in ((0, 40), (40, 41), (41, 42), (42, LENGTH)):
        got = tiny.step([(s, ids[first:end]) for s in sessions], logits="all")
        for i, rows in enumerate(got):
            same(rows, (want if i == place else plain)[first:end], f"row {i} at {first}")
    assert (want != plain).any(1).all()


def test_experts_from_disk(tmp_path) -> None:
    folder = harness.make_tiny(tmp_path / "w", hidden_size=512, moe_intermediate_size=512)
    edit = ForceExperts(0, [4, 1]) + DisableExperts([1, 2], [0, 3])
    with harness.load(folder) as mapped:
        ids = prompt(mapped, 40)
        want, plan = logits(mapped, edit, ids), mapped.plan
    with harness.load(folder, memory=budget(plan, 5), threads=2, chunk=16) as small:
        assert small.plan.experts_in_memory == 5
        same(logits(small, edit, ids), want)


# ---- experts ----

def route(scores, chosen, scale):
    """The router's weights of chosen experts, as it sums them."""
    total = np.float32(0)
    for e in chosen:
        total += scores[e]
    return np.array([scores[e] / total * np.float32(scale) for e in chosen], np.float32)


def test_disabled_experts_are_those_of_a_low_bias(tiny, tiny_folder, tmp_path, ids) -> None:
    def low(data):
        data.view(np.float32)[[0, 4]] = -1e30

    folder = harness.changed(tiny_folder, tmp_path / "bias", "layers.2.ffn.gate.bias", low)
    with harness.load(folder) as other:
        same(logits(tiny, DisableExperts(2, [4, 0]), ids), fed(other, [ids]))
    experts = seen(tiny, DisableExperts(2, [4]) + DisableExperts(2, [0], positions=[5, 9]), ids, 2,
                   "experts")
    plain = seen(tiny, None, ids, 2, "experts")
    assert (plain == 4).any() and not (experts == 4).any() and not (experts[[5, 9]] == 0).any()
    assert (plain == 0).any()


def test_disabled_experts_of_a_hash_layer(tiny, ids) -> None:
    """The best by score take the places of those the table names."""
    off = (1, 3, 4)
    scale = tiny.config.routed_scaling_factor
    plain, scores = seen(tiny, None, ids, 0, "experts", "router_scores")
    got, weights = seen(tiny, DisableExperts(0, off, positions=slice(10, None)), ids, 0, "experts",
                        "expert_weights")
    for t in range(LENGTH):
        want = list(plain[t])
        for j, e in enumerate(want):
            if t >= 10 and e in off:
                left = [x for x in range(6) if x not in off and x not in want]
                want[j] = max(left, key=lambda x: (scores[t, x], -x))
        assert got[t].tolist() == want
        assert weights[t].tolist() == route(scores[t], want, scale).tolist()


@pytest.mark.parametrize("layer", [0, 2])
def test_forced_experts(tiny, ids, layer) -> None:
    rows = np.array([[0, 5], [4, 1], [2, 3]])
    scores = seen(tiny, None, ids, layer, "router_scores")
    plain = seen(tiny, None, ids, layer, "experts")
    edit = (ForceExperts(layer, rows, positions=[2, 70, 71]) + DisableExperts(layer, [0, 1])
            + ForceExperts(layer, [5, 4], positions=[71]))
    got, weights = seen(tiny, edit, ids, layer, "experts", "expert_weights")
    wanted = {2: [0, 5], 70: [4, 1], 71: [5, 4]}
    for t, chosen in wanted.items():
        assert got[t].tolist() == chosen
        want = route(scores[t], chosen, tiny.config.routed_scaling_factor)
        assert weights[t].tolist() == want.tolist()
    again = seen(tiny, ForceExperts(layer, plain, positions=range(LENGTH)), ids, layer, "ffn_out")
    same(again, seen(tiny, None, ids, layer, "ffn_out"))


def test_reweighted_experts(tiny, ids) -> None:
    experts, weights = seen(tiny, None, ids, 3, "experts", "expert_weights")
    edit = ReweightExperts(3, [1, 2], [0.5, 3]) + ReweightExperts(3, 2, 0.3, range(50, 60))
    got, changed = seen(tiny, edit, ids, 3, "experts", "expert_weights")
    factor = np.select([experts == 1, experts == 2], [np.float32(0.5), np.float32(3)],
                       np.float32(1))
    want = weights * factor
    late = np.zeros(LENGTH, bool)
    late[50:60] = True
    want = np.where((experts == 2) & late[:, None], want * np.float32(0.3), want)
    same(got, experts)
    same(changed, want)


def test_weight_zero_is_an_expert_that_gives_nothing(tiny, tiny_folder, tmp_path, ids) -> None:
    """As if its down projection were 0."""
    def nothing(data):
        data[:] = 0

    folder = harness.changed(
        tiny_folder, tmp_path / "w2", "layers.3.ffn.experts.2.w2.weight", nothing)
    with harness.load(folder) as other:
        same(logits(tiny, ReweightExperts(3, 2, 0), ids), fed(other, [ids]))


# ---- attention ----

def test_ablated_heads_are_those_without_output_weights(tiny, tiny_folder, tmp_path, ids) -> None:
    def second(data):  # two heads in two groups: each has rows of its own
        data.reshape(2, -1)[1] = 0

    folder = harness.changed(tiny_folder, tmp_path / "wo", "layers.2.attn.wo_a.weight", second)
    with harness.load(folder) as other:
        same(logits(tiny, AblateHeads(2, 1), ids), fed(other, [ids]))
    plain = seen(tiny, None, ids, 2, "heads")
    heads = seen(tiny, AblateHeads(2, 1, positions=[4, 8]), ids, 2, "heads")
    assert not heads[[4, 8], 1].any() and plain[[4, 8], 1].any()
    heads[[4, 8], 1] = plain[[4, 8], 1]
    same(heads, plain)


def test_heads_of_several_workers(tmp_path) -> None:
    """More heads than one worker takes of a lone token."""
    folder = harness.make_tiny(tmp_path, num_attention_heads=40)
    edit = AblateHeads([0, 3], [3, 17, 39]) + AblateSinks([1, 2], [0, 16, 38])
    with harness.load(folder) as one, harness.load(folder, threads=3) as three:
        ids = prompt(one, 20)
        want = logits(one, edit, ids)
        with three.session(edit=edit) as session:
            got = np.concatenate([session.append(ids[t : t + 1]) for t in range(20)])
        same(got, want)
        with three.session(edit=edit) as session:
            session.append(ids[:-1], logits="none")
            (heads,) = values(session, ids[-1:], 3, "heads")
    assert np.nonzero(~heads[0].any(1))[0].tolist() == [3, 17, 39]


def test_ablated_sinks_are_those_of_minus_infinity(tiny, tiny_folder, tmp_path, ids) -> None:
    def low(data):
        data.view(np.float32)[0] = -1e30

    folder = harness.changed(tiny_folder, tmp_path / "sink", "layers.1.attn.attn_sink", low)
    with harness.load(folder) as other:
        same(logits(tiny, AblateSinks(1, 0), ids), fed(other, [ids]))
    weights = seen(tiny, AblateSinks(1, positions=range(5, 9)), ids, 1, "attention_weights")
    without = np.isin(np.arange(LENGTH), range(5, 9))
    assert not weights[without, :, 0].any() and weights[~without, :, 0].all()
    assert np.abs(weights.sum(-1) - 1).max() < 1e-5


def selection(scores, topk, masked, forced):
    """What NumPy selects: higher score, then lower id."""
    n = int((~np.isnan(scores)).sum())
    key = [(e in masked, e not in forced, -scores[e], e) for e in range(n)]
    return sorted(e for *_, e in sorted(key)[:topk] if e not in masked)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n", [LENGTH, 1])
def test_selected_entries(tiny_folder, ids, threads, n) -> None:
    """CSA: of the visible entries, those not masked, the forced ones first."""
    masked, forced = {0, 3, 4, 5, 11, 12}, {1, 4, 9, 30}
    edit = (MaskEntries(0, [0, 3, 4, 5, 11, 12]) + ForceEntries(0, sorted(forced))
            + MaskEntries(0, None, positions=[100]))
    with harness.load(tiny_folder, threads=threads) as model:
        topk = model.config.index_topk
        scores = seen(model, None, ids, 0, "index_scores")
        with model.session(edit=edit) as session:
            if n < LENGTH:
                session.append(ids[:-n], logits="none")
            (got,) = values(session, ids[-n:], 0, "index_selected")
    for t, row in zip(range(LENGTH - n, LENGTH), got, strict=True):
        visible = (t + 1) // 4
        want = (selection(scores[t], topk, masked, forced) if visible > topk
                else [e for e in range(visible) if e not in masked])
        assert [e for e in row.tolist() if e >= 0] == ([] if t == 100 else want), t


def test_selection_among_the_best_of_each_worker(tiny_folder) -> None:
    """Long enough that a lone token's entries are cut among the workers."""
    masked = [(20, 40), (111, 113), (300, 420)]
    edit = Edit(*(MaskEntries(0, range(a, b)) for a, b in masked), ForceEntries(0, [7, 350, 440]))
    n = 1801
    with harness.load(tiny_folder, threads=2) as model:
        ids = prompt(model, n)
        with model.session(edit=edit) as whole, model.session(edit=edit) as cut:
            want = whole.append(ids, logits="all")[-1:]
            cut.append(ids[:-1], logits="none")
            fork = cut.fork()
            (got,) = values(fork, ids[-1:], 0, "index_selected")
            same(cut.append(ids[-1:]), want)
        off = {e for a, b in masked for e in range(a, b)}
        scores = seen(model, None, ids, 0, "index_scores")[-1]
        assert got[0].tolist() == selection(scores, 8, off, {7, 350, 440})


def test_masked_entries_of_hca(tiny, ids) -> None:
    """Their weight goes to the others in proportion."""
    at = slice(80, None)
    plain = seen(tiny, None, ids, 3, "attention_weights").astype(float)
    got = seen(tiny, MaskEntries(3, [0, 2, 3], positions=at), ids, 3, "attention_weights")
    first = 1 + tiny.config.sliding_window
    want = plain.copy()
    want[at, :, [first, first + 2, first + 3]] = 0
    want[at] /= want[at].sum(-1, keepdims=True)
    same(got[:80], plain[:80].astype(np.float32))
    assert np.abs(got - want).max() < 2e-5
    assert plain[at, :, first].max() > 0.01 and not got[at, :, [first, first + 2, first + 3]].any()
    all_off = seen(tiny, MaskEntries([0, 1, 3]), ids, 3, "attention_weights")
    assert not all_off[..., first:].any()


# ---- rows ----

def test_steered_streams(tiny, ids) -> None:
    plain = seen(tiny, None, ids, 1, "streams")
    want = plain.copy()
    want[30:60, 1] = rounded(plain[30:60, 1] + np.float32(0.3) * VECTOR)
    rows = RNG.normal(size=(2, D)).astype(np.float32)
    want[[2, 140]] = rounded(want[[2, 140]] + rows[:, None])
    edit = (Steer(1, VECTOR, scale=0.3, streams=1, positions=range(30, 60))
            + Steer(1, rows, positions=[2, 140]))
    got = seen(tiny, edit, ids, 1, "streams")
    same(got, want)
    same(tiny.layers[2](got, ids), seen(tiny, edit, ids, 2, "streams"))  # and it goes on from there


def test_operations_are_applied_in_order(tiny, ids) -> None:
    plain = seen(tiny, None, ids, 0, "streams")
    steer, clamp = Steer(0, VECTOR), Clamp(0, -0.25, 0.125, dims=[3, 100])
    steered = rounded(plain + VECTOR)
    limited = steered.copy()
    limited[..., [3, 100]] = limited[..., [3, 100]].clip(-0.25, 0.125)
    same(seen(tiny, steer + clamp, ids, 0, "streams"), limited)
    first = plain.copy()
    first[..., [3, 100]] = first[..., [3, 100]].clip(-0.25, 0.125)
    same(seen(tiny, clamp + steer, ids, 0, "streams"), rounded(first + VECTOR))
    assert (limited != rounded(first + VECTOR)).any()


def test_the_embedding(tiny, ids) -> None:
    plain = seen(tiny, None, ids, 0, "streams_in")
    got = seen(tiny, Steer("embed", VECTOR, positions=[5]), ids, 0, "streams_in")
    want = plain.copy()
    want[5] = rounded(plain[5] + VECTOR)
    same(got, want)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_streams_of_another_run(tiny, ids, layer) -> None:
    """All streams after a layer from another run: from there on it is that run."""
    other = prompt(tiny, LENGTH, seed=2)
    streams = seen(tiny, None, other, layer, "streams")
    with tiny.session(edit=Patch(layer, streams, positions=range(LENGTH))) as session:
        same(session.append(ids, logits="all"), fed(tiny, [other]))
    one = streams[:, 1:]
    got = seen(tiny, Patch(layer, one[7], streams=1, positions=7), ids, layer, "streams")
    want = seen(tiny, None, ids, layer, "streams")
    want[7, 1] = streams[7, 1]
    same(got, want)
    swapped = Patch(layer, streams[7], streams=[1, 0], positions=7)
    same(seen(tiny, swapped, ids, layer, "streams")[7], streams[7, ::-1])


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_sublayers_of_another_run(tiny, ids, part, layer) -> None:
    """The input of a sublayer makes its output; the output is what the streams get."""
    other = prompt(tiny, LENGTH, seed=2)
    read, given = seen(tiny, None, other, layer, f"{part}_in", f"{part}_out")
    reads = Patch(layer, read, site=f"{part}_in", positions=range(LENGTH))
    gives = Patch(layer, given, site=f"{part}_out", positions=range(LENGTH))
    same(seen(tiny, reads, ids, layer, f"{part}_out"), given)
    same(seen(tiny, reads, ids, layer, "streams"), seen(tiny, gives, ids, layer, "streams"))
    for site in (f"{part}_in", f"{part}_out"):
        want = seen(tiny, None, ids, layer, site)
        want[9:] = rounded(want[9:] + VECTOR)
        same(seen(tiny, Steer(layer, VECTOR, site=site, positions=slice(9, None)), ids, layer,
                  site), want)


def test_an_output_clamped_to_zero(tiny, tiny_folder, tmp_path, ids) -> None:
    def nothing(data):
        data[:] = 0

    folder = harness.changed(tiny_folder, tmp_path / "wo_b", "layers.1.attn.wo_b.weight", nothing)
    with harness.load(folder) as other:
        same(logits(tiny, Clamp(1, 0, 0, site="attention_out"), ids), fed(other, [ids]))


# ---- callbacks ----

def test_callbacks_see_and_change_the_streams(tiny_folder, ids) -> None:
    found = {}

    def look(streams, positions):
        assert streams.dtype == np.float32 and positions.dtype == np.int32
        assert streams.shape == (len(positions), STREAMS, D)
        found.update(zip(positions.tolist(), streams.copy(), strict=True))
        streams *= np.float32(1.5)

    edit = Clamp(1, -1, 1) + Callback(1, look, positions=slice(5, 140)) + Callback(
        1, lambda x, at: (x + 1).astype(np.float64), positions=[7])
    for threads in (1, 2):
        found.clear()
        with harness.load(tiny_folder, threads=threads, chunk=32) as model:
            plain = seen(model, Clamp(1, -1, 1), ids, 1, "streams")
            got = seen(model, edit, ids, 1, "streams")
        assert sorted(found) == list(range(5, 140))
        same(np.stack([found[t] for t in range(5, 140)]), plain[5:140])
        want = plain.copy()
        want[5:140] = rounded(plain[5:140] * np.float32(1.5))
        want[7] = rounded(want[7] + 1)
        same(got, want)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_exception_ends_the_step(tiny_folder, ids, threads) -> None:
    class Own(Exception):
        pass

    calls = []

    def fail(streams, positions):
        calls.append(len(positions))
        if not failing:
            return
        streams[:] = 7
        raise Own("no")

    failing = False
    with harness.load(tiny_folder, threads=threads, chunk=32) as model:
        plain = fed(model, [ids])
        a, b = model.session(edit=Callback(2, fail, positions=slice(60, None))), model.session()
        a.append(ids[:40], logits="none")
        b.append(ids[:50], logits="none")
        before = [state(a), state(b)]
        failing = True
        with pytest.raises(Own, match="no"):
            model.step([(a, ids[40:120]), (b, ids[50:60])])
        assert len(calls) == 1 and (a.position, b.position) == (40, 50)
        for s, old in zip((a, b), before, strict=True):
            for x, y in zip(state(s), old, strict=True):
                same(x, y)
        failing = False
        same(model.step([(b, ids[50:])], logits="all")[0], plain[50:])
        same(a.append(ids[40:], logits="all"), plain[40:])


@pytest.mark.parametrize("result, message", [
    (lambda x: x[:1], r"returned float32 \[1, 2, 128\], wanted floats of shape \[3, 2, 128\]"),
    (lambda x: x.astype(int), "returned int64"), (lambda x: x * np.nan, "NaN or infinite"),
    (lambda x: "no", "wanted floats of shape"),
])
def test_what_a_callback_may_return(tiny, result, message) -> None:
    with tiny.session(edit=Callback(0, lambda x, at: result(x))) as session:
        with pytest.raises(ValueError, match=f"Callback at layer 0: .*{message}"):
            session.append([1, 2, 3])
        assert session.position == 0


def test_a_callback_cannot_step(tiny) -> None:
    with tiny.session(edit=Callback("embed", lambda x, at: session.append([1]))) as session:
        with pytest.raises(RuntimeError, match="a step of this model is running in this thread"):
            session.append([1, 2])
        assert session.position == 0


def test_ctrl_c_in_a_callback(tiny) -> None:
    def interrupt(streams, positions):
        raise KeyboardInterrupt

    with tiny.session(edit=Callback(1, interrupt)) as session:
        with pytest.raises(KeyboardInterrupt):
            session.append([1, 2])
        assert session.position == 0


def test_callbacks_of_several_threads(tiny_folder, ids) -> None:
    edit = Callback(1, lambda x, at: x * 0.5)
    with harness.load(tiny_folder, threads=2) as model:
        want = logits(model, edit, ids[:40])
        got = [None] * 4

        def work(i):
            got[i] = logits(model, edit, ids[:40])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(got))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for rows in got:
            same(rows, want)


def test_the_layer_that_is_not_finite(tiny) -> None:
    """Found too where a callback forbids to run the step again."""
    huge = Steer(2, np.full(D, 3e38)) + Steer(2, np.full(D, 3e38))
    for edit in (huge, huge + Callback(0, lambda x, at: None)):
        with tiny.session(edit=edit) as session:
            with pytest.raises(dsv4.NonFiniteLogitsError, match="begins in the output of layer 2"):
                session.append([1, 2, 3])
            assert session.position == 0


def test_a_session_inside_its_own_callback_is_collected(tiny) -> None:
    class Holder:
        session = None

    holder = Holder()
    holder.session = tiny.session(edit=Callback(0, lambda x, at, own=holder: None))
    holder.session.append([1])
    gone = weakref.ref(holder)
    del holder
    gc.collect()
    assert gone() is None


# ---- part of a session ----

def test_forks_and_rewinds_keep_it(tiny, ids, edited) -> None:
    edit, want = edited
    with tiny.session(edit=edit) as session:
        session.append(ids[:100], logits="none")
        fork = session.fork()
        same(fork.append(ids[100:], logits="all"), want[100:])
        assert fork.edit == session.edit == edit
        fork.rewind(70)  # computes 70 tokens again
        same(fork.append(ids[70:], logits="all"), want[70:])
        session.rewind(0)
        same(session.append(ids, logits="all"), want)


def test_a_fork_with_more(tiny, ids) -> None:
    """From its position on, as an edit that begins there would do from the beginning."""
    old, more = AblateHeads(0, 1), Steer(2, VECTOR) + AblateSinks(1, positions=[20, 90, 91])
    with tiny.session(edit=old) as session:
        session.append(ids[:80], logits="none")
        fork = session.fork(edit=more)
        later = AblateSinks(1, positions=[90, 91])
        assert fork.edit == old + Steer(2, VECTOR, positions=slice(80, None)) + later
        want = logits(tiny, fork.edit, ids)
        same(fork.append(ids[80:], logits="all"), want[80:])
        fork.rewind(40)
        same(fork.append(ids[40:], logits="all"), want[40:])
        same(session.append(ids[80:], logits="all"), logits(tiny, old, ids)[80:])
        with pytest.raises(ValueError, match="layers: got 4"):
            session.fork(edit=AblateHeads(4, 0))


def test_saved_and_loaded(tiny, tmp_path, ids, edited) -> None:
    edit = Edit(*edited[0].operations[:-1])
    want = logits(tiny, edit, ids)
    with tiny.session(edit=edit) as session:
        session.append(ids[:90], logits="none")
        session.save(tmp_path / "s")
    for options in ({}, {"mmap": False}, {"verify": True}):
        with tiny.load_session(tmp_path / "s", **options) as session:
            assert session.edit == edit
            same(session.append(ids[90:], logits="all"), want[90:])
            session.rewind(50)
            same(session.append(ids[50:], logits="all"), want[50:])


def test_damaged_edits_are_refused(tiny, tmp_path) -> None:
    with tiny.session(edit=Steer(1, VECTOR)) as session:
        session.append([1, 2, 3])
        session.save(tmp_path / "s")
    raw = (tmp_path / "s").read_bytes()
    at = raw.index(b'"operation": "Steer"')
    (tmp_path / "s").write_bytes(raw[:at] + b"x" + raw[at + 1 :])
    with pytest.raises(dsv4.FormatError, match="edit, from byte 0: got another checksum"):
        tiny.load_session(tmp_path / "s")


def test_a_callback_is_not_saved(tiny, tmp_path) -> None:
    with tiny.session(edit=Callback(1, lambda x, at: None)) as session:
        session.append([1])
        with pytest.raises(ValueError, match="cannot be written: a function is not data"):
            session.save(tmp_path / "s")
    assert not list(tmp_path.iterdir())


# ---- what the engine checks itself ----

def op(kind=0, site=0, layer=1, rows=1, positions=(), ids=(3,), values=VECTOR):
    return (kind, site, layer, rows, np.array(positions, np.int32), np.array(ids, np.int32),
            np.array(values, np.float32))


@pytest.mark.parametrize("bad, message", [
    (op(kind=11), "kind: got 11"), (op(kind=-1), "kind: got -1"), (op(site=5), "site: got 5"),
    (op(layer=4), "layer: got 4"), (op(layer=-2), "layer: got -2"),
    (op(layer=-1, site=3), "layer of a sublayer: got -1"), (op(kind=4, layer=-1), "layer: got -1"),
    (op(ids=()), "streams: got 0"), (op(ids=(4,)), "streams: got 4"),
    (op(site=1, ids=(3,)), "streams: got 3"), (op(values=VECTOR[1:]), "values: got 127"),
    (op(kind=2), "values: got 128"), (op(rows=2, values=np.zeros(2 * D)), "rows: got 2"),
    (op(rows=0), "rows: got 0"), (op(positions=[[5, 5]]), "wanted ascending ranges"),
    (op(positions=[[5, 9], [8, 10]]), "wanted ascending ranges"),
    (op(positions=[[-1, 3]]), "wanted ascending ranges"),
    (op(kind=4, ids=(6,)), "expert: got 6"), (op(kind=5, ids=(1,), values=()), "values: got 0"),
    (op(kind=4, ids=(1,), rows=2, positions=[[0, 2]]), "rows: got 2"),
    (op(kind=6, ids=(1,)), "experts: got 1"), (op(kind=6, ids=(1, 1)), "expert 1 twice"),
    (op(kind=7, ids=(2,)), "head: got 2"), (op(kind=8, ids=(-1,)), "head: got -1"),
    (op(kind=9, layer=2, ids=(0, 1)), "no choice of compressed entries"),
    (op(kind=10, layer=3, ids=(0, 1)), "no choice of compressed entries"),
    (op(kind=9, ids=(3,)), "entries: got 1"), (op(kind=9, ids=(3, 2)), "wanted ascending ranges"),
], ids=str)
def test_wrong_numbers(tiny, bad, message) -> None:
    with pytest.raises(ValueError, match=message):
        _core.Edit(tiny._core, (op(), bad), ())


def test_edits_of_another_model(tiny, tiny_folder) -> None:
    with harness.load(tiny_folder) as other, pytest.raises(ValueError, match="of the same model"):
        tiny.session()._core.edit(_core.Edit(other._core, (op(),), ()))
    with pytest.raises(ValueError, match="wanted one for each callback"):
        _core.Edit(tiny._core, (op(kind=3, ids=(), values=()),), ())
    with pytest.raises(ValueError, match="no operations"):
        _core.Edit(tiny._core, (), ())
