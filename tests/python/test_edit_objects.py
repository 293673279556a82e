# SPDX-License-Identifier: Apache-2.0
"""Edits as objects: composed, compared, shown, as JSON; what they refuse; in generation."""

import base64
import copy
import json

import numpy as np
import pytest

import dsv4
from dsv4 import edit as module
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
    Operation,
    Patch,
    ReweightExperts,
    Steer,
)

ROW = np.arange(256, dtype=np.float32) / 7  # hidden_size of the model inside
EVERY = [
    DisableExperts([2, 3], [5, 1], positions=range(3, 9)),
    ReweightExperts(2, [5, 6], [0.1, 2], positions=[1, 2, 3, 9]),
    ForceExperts(2, [0, 5]), ForceExperts([1, 2], [[0, 1], [3, 2]], positions=[4, 9]),
    AblateHeads(1, [0, 3], positions=12), AblateSinks([0, 1]), AblateSinks(0, 2, slice(4, None)),
    MaskEntries(2, range(4), positions=slice(40, None)), MaskEntries(3), MaskEntries(3, [1, 5]),
    MaskEntries(3, slice(6, None)), ForceEntries(2, [0, 7]),
    Steer("embed", ROW, scale=0.1, streams=[3, 0]), Steer(1, ROW, site="ffn_in", positions=[7]),
    Steer(1, np.stack([ROW, -ROW]), positions=range(5, 7)),
    Patch(3, np.stack([ROW] * 4)[None], positions=2), Patch(3, ROW[None], streams=2),
    Patch(3, ROW, site="attention_out", positions=slice(1, None)),
    Clamp(2, -1, 1.1, dims=7, streams=0), Clamp([0, 1], 0, 0, site="ffn_out"),
]


@pytest.fixture(scope="module")
def model():
    with dsv4.load(threads=1) as model:
        yield model


# ---- objects ----

@pytest.mark.parametrize("edit", EVERY, ids=repr)
def test_json_both_ways(model, edit) -> None:
    edit.check(model.config)
    text = edit.to_json()
    again = Edit.from_json(text)
    assert again == edit and hash(again) == hash(edit) and Edit.from_json(text.encode()) == edit
    assert again.to_json() == text
    assert [type(o) for o in again.operations] == [type(edit)]
    assert copy.deepcopy(edit) == edit != AblateHeads(4, 3)
    native = [o._compiled(o.layers[0], model.config) for o in (edit, *again.operations)]
    assert [repr(part) for part in native[0]] == [repr(part) for part in native[1]]


def test_all_operations_are_among_them() -> None:
    kinds = {getattr(module, name) for name in module.__all__} - {Edit, Operation, Callback}
    assert {type(edit) for edit in EVERY} == kinds
    assert set(Operation._by_name) == {kind.__name__ for kind in kinds}


def test_json_form() -> None:
    value = json.loads((Steer(1, ROW, positions=slice(3, None)) + MaskEntries(2, [1, 2])).to_json())
    steer, mask = value["operations"]
    assert value["version"] == 1 and mask == {
        "operation": "MaskEntries", "layers": [2], "entries": [[1, 3]], "positions": None}
    assert steer["vector"] == {"shape": [256],
                               "float32": base64.b64encode(ROW.astype("<f4")).decode()}
    assert steer["positions"] == [[3, None]] and steer["site"] == "streams"


def test_joining() -> None:
    a, b, c = EVERY[:3]
    assert (a + b) + c == a + (b + c) == Edit(a, b, c) == Edit(Edit(a), Edit(), b + c)
    assert (a + b).operations == (a, b) and a + b != b + a and Edit(a) == a
    assert not Edit() and a and len({a, Edit(a), copy.copy(a)}) == 1
    with pytest.raises(TypeError):
        a + 1


def test_immutable() -> None:
    given = ROW.copy()
    edit = Steer(1, given)
    given[:] = 0
    assert (edit.vector == ROW).all()
    for change in (lambda: setattr(edit, "vector", 0), lambda: delattr(edit, "vector"),
                   lambda: setattr(Edit(), "operations", ())):
        with pytest.raises(AttributeError, match="an edit is immutable"):
            change()
    with pytest.raises(ValueError, match="read-only"):
        edit.vector[0] = 1


@pytest.mark.parametrize("edit, text", [
    (Edit(), "Edit()"),
    (AblateHeads(1, 0) + AblateSinks([0, 2], positions=[3, 9]),
     "Edit(AblateHeads([1], [0]), AblateSinks([0, 2], positions=[3, 9]))"),
    (Steer("embed", ROW, scale=0.1), "Steer('embed', <float32 [256]>, scale=0.1)"),
    (MaskEntries(2, list(range(0, 40, 2)), positions=range(3, 90)),
     "MaskEntries([2], entries=['0:1', '2:3', '4:5', '6:7', '8:9', '10:11', '12:13', '14:15', "
     "'16:17', '18:19', '20:21', '22:23', ... 20 in all], positions=range(3, 90))"),
    (ForceExperts(2, [0, 5]), "ForceExperts([2], [0, 5])"),
    (Callback(1, np.median), "Callback([1], median)"),
])
def test_repr(edit, text) -> None:
    assert repr(edit) == text


def test_positions() -> None:
    for form, want in (
        (None, None), (3, ((3, 4),)), (range(2, 5), ((2, 5),)), (slice(7), ((0, 7),)),
        (slice(2, None), ((2, None),)), ([1, 2, 3, 7], ((1, 4), (7, 8))),
        (slice(None), ((0, None),)),
    ):
        assert AblateHeads(0, 0, positions=form).positions == want
    assert AblateHeads(0, 0, positions=np.array([4, 5])).positions == ((4, 6),)


def test_since() -> None:
    rows = np.arange(5 * 256, dtype=np.float32).reshape(5, 256)
    steer = Steer(1, rows, positions=[2, 3, 7, 8, 20])
    assert steer.since(8) == Steer(1, rows[3:], positions=[8, 20])
    assert steer.since(0) == steer and steer.since(21) == Edit()
    assert ForceExperts(1, [[0, 1], [2, 3]], positions=[4, 5]).since(5) == ForceExperts(
        1, [[2, 3]], positions=[5])
    assert (Clamp(1, 0, 1) + AblateHeads(0, 0, range(3))).since(9) == Clamp(
        1, 0, 1, positions=slice(9, None))


# ---- what is refused ----

@pytest.mark.parametrize("make, message", [
    (lambda: DisableExperts(True, 1), "layers: got bool, wanted an int"),
    (lambda: DisableExperts("embed", 1), "layers: got 'embed', wanted layers by number"),
    (lambda: Steer("embedding", ROW), "got 'embedding', wanted 'embed' or layers by number"),
    (lambda: DisableExperts([], 1), "layers: got none"),
    (lambda: DisableExperts([1, 1], 1), "layers: got 1 twice"),
    (lambda: DisableExperts(-1, 1), "layers: got -1, wanted 0 or more"),
    (lambda: DisableExperts(1, 1.5), "experts: got float"),
    (lambda: DisableExperts(1, [2, "3"]), "experts: got '3', wanted ints"),
    (lambda: DisableExperts(1, 1, positions=[5, 4]), "positions: got 4 after 5, wanted ascending"),
    (lambda: DisableExperts(1, 1, positions=[5, 5]), "positions: got 5 after 5"),
    (lambda: DisableExperts(1, 1, positions=range(0, 9, 2)), "positions: got a step of 2"),
    (lambda: DisableExperts(1, 1, positions=range(5, 5)), "positions: got 5 to 5"),
    (lambda: DisableExperts(1, 1, positions=slice(-5, None)), "positions: got -5"),
    (lambda: DisableExperts(1, 1, positions=slice(0.5, None)), "positions: got 0.5, wanted ints"),
    (lambda: DisableExperts(1, 1, positions="all"), "positions: got str"),
    (lambda: DisableExperts(1, 1, positions=2**31), "positions: got 2147483648"),
    (lambda: ReweightExperts(1, [1, 2], [1]), "factors: got 1, wanted one or 2"),
    (lambda: ReweightExperts(1, 1, float("nan")), "factors: got nan, wanted a finite float32"),
    (lambda: ReweightExperts(1, 1, 1e39), "factors: got 1e.39"),
    (lambda: ReweightExperts(1, 1, "2"), "factors: got '2', wanted a number"),
    (lambda: ForceExperts(1, [1, 1]), "experts: got 1 twice"),
    (lambda: ForceExperts(1, [[0, 1], [1, 2]]), "got 2 rows for positions without end"),
    (lambda: ForceExperts(1, [[0, 1], [1, 2]], positions=[4]), "got 2 rows for 1 positions"),
    (lambda: ForceEntries(1, None), "entries: got no end"),
    (lambda: ForceEntries(1, slice(3, None)), "entries: got no end"),
    (lambda: Steer(1, ROW, site="stream"), "site: got 'stream', wanted 'streams'"),
    (lambda: Steer(1, ROW, site="mlp_out"), "site: got 'mlp_out', wanted"),
    (lambda: Steer(1, ROW, site="ffn_in", streams=1), "streams: got .1. at ffn_in"),
    (lambda: Steer("embed", ROW, site="ffn_in"), "got 'embed' at ffn_in"),
    (lambda: Steer(1, np.full(4, np.inf)), "vector: got NaN or infinite"),
    (lambda: Steer(1, np.full(4, 1e30), scale=1e30), "scale . vector: got NaN or infinite"),
    (lambda: Steer(1, ["a"]), "vector: got <U1, wanted numbers"),
    (lambda: Steer(1, 3.0), r"vector: got shape \[\], wanted 1 or 2 dimensions"),
    (lambda: Steer(1, np.ones((2, 4)), positions=range(3)), "got 2 rows for 3 positions"),
    (lambda: Patch(1, np.ones((2, 4, 8))), "got 2 rows for positions without end"),
    (lambda: Patch(1, np.ones(8)), "wanted 2 or 3 dimensions"),
    (lambda: Clamp(1, 1, 0), "low: got 1.0, wanted at most high = 0.0"),
    (lambda: Clamp(1, -np.inf, 0), "low: got -inf"),
    (lambda: Callback(1, 3), "function: got int, wanted a callable"),
    (lambda: Edit("no"), r"edits\[0\]: got str, wanted an Edit"),
])
def test_wrong_arguments(make, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("edit, message", [
    (DisableExperts(6, 1), "DisableExperts: layers: got 6, wanted 0 to 5"),
    (DisableExperts(2, 8), "experts: got 8, wanted 0 to 7"),
    (DisableExperts(2, range(8)), r"got 8 of layer 2 at position 0, wanted at most \d: so that"),
    (DisableExperts(2, range(4), range(9)) + DisableExperts([1, 2], [4, 5, 6, 7], [8]),
     "got 8 of layer 2 at position 8"),
    (ForceExperts(2, [1]), "experts: got 1, wanted "), (AblateHeads(0, 99), "heads: got 99"),
    (AblateSinks(0, 99), "heads: got 99"),
    (MaskEntries(0, 1), r"layers: got 0, which is SWA; wanted CSA or HCA: \[2, 3, 4, 5\]"),
    (ForceEntries(3, 1), r"layers: got 3, which is HCA; wanted CSA: \[2, 4\]"),
    (ForceEntries(2, range(500)) + ForceEntries(2, range(500, 10**6)), "wanted at most .*selects"),
    (Steer(1, ROW[1:]), r"got shape \[255\], wanted \[hidden_size\] = \[256\] or \[positions, 256"),
    (Steer(1, ROW, streams=4), "streams: got 4, wanted 0 to 3"),
    (Patch(1, ROW[None]), r"got shape \[1, 256\], wanted \[streams, hidden_size\] = \[4, 256\]"),
    (Patch(1, np.ones((2, 4, 9)), positions=range(2)), r"or \[positions, 4, 256\]"),
    (Clamp(1, 0, 1, dims=256), "dims: got 256"),
])
def test_what_a_model_does_not_have(model, edit, message) -> None:
    for call in (lambda: edit.check(model.config), lambda: model.edit(edit),
                 lambda: model.session(edit=edit), lambda: model.generate("a", edit=edit),
                 lambda: model.session().fork(edit=edit)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("change, message", [
    (lambda v: v.update(version=2), "wanted an object with version 1"),
    (lambda v: v.update(more=1), "wanted version and a list of operations"),
    (lambda v: v["operations"].append(7), r"operations\[1\]: got 7"),
    (lambda v: v["operations"][0].update(operation="Stear"), "got 'Stear', wanted 'Steer'"),
    (lambda v: v["operations"][0].update(operation="Callback"), "got 'Callback', wanted"),
    (lambda v: v["operations"][0].update(layer=3), "got 'layer', wanted 'layers'"),
    (lambda v: v["operations"][0].pop("scale"), "Steer: scale: missing"),
    (lambda v: v["operations"][0].update(layers="x"), "layers: got 'x'"),
    (lambda v: v["operations"][0].update(positions=[3]), r"got \[3\], wanted \[\[first, end\]"),
    (lambda v: v["operations"][0].update(positions=[[3]]), "wanted ints .first, end."),
    (lambda v: v["operations"][0].update(positions=[[3, 4], [1, 2]]), "got 1 after 3"),
    (lambda v: v["operations"][0]["vector"].update(shape=[255]), "got 1024 bytes, wanted 1020"),
    (lambda v: v["operations"][0]["vector"].update(float32="%%"), "float32: "),
    (lambda v: v["operations"][0].update(vector={"a": 1}), "wanted shape and float32"),
])
def test_wrong_json(change, message) -> None:
    value = json.loads(Steer(1, ROW).to_json())
    change(value)
    with pytest.raises(ValueError, match=message):
        Edit.from_json(json.dumps(value))


@pytest.mark.parametrize("text", ["", "{", "[]", "NaN", '{"version": 1, "version": 1}', b"\xff"])
def test_what_is_not_json(text) -> None:
    with pytest.raises(ValueError, match="edit: "):
        Edit.from_json(text)


def test_callbacks_are_not_data() -> None:
    with pytest.raises(ValueError, match=r"Callback\(\[1\], .*a function is not data"):
        (AblateHeads(1, 0) + Callback(1, lambda x, at: None)).to_json()


# ---- generation ----

@pytest.fixture(scope="module")
def steer(model):
    draw = np.random.default_rng(3)
    return Steer([1, 3], draw.normal(size=256), positions=slice(2, None)) + DisableExperts(2, 3)


def test_generated_with_an_edit(model, steer) -> None:
    """generate, stream and batch give what a session with this edit gives."""
    with model.session(edit=steer) as session:
        want = model.generate("ROMEO:", max_new_tokens=12, temperature=0, session=session).tokens
    plain = model.generate("ROMEO:", max_new_tokens=12, temperature=0).tokens
    assert want != plain
    one = model.generate("ROMEO:", max_new_tokens=12, temperature=0, edit=steer)
    assert one.tokens == want
    with model.stream("ROMEO:", max_new_tokens=12, temperature=0, edit=steer) as events:
        assert [t for event in events for t in event.tokens] == want
    rows = ["ROMEO:", ("ROMEO:", {"edit": steer}), ("ROMEO:", {"edit": Edit()})] * 2
    got = [a.tokens for a in model.batch(rows, max_new_tokens=12, temperature=0, concurrency=4)]
    assert got == [plain, want, plain] * 2
    got = [a.tokens for a in model.batch(["ROMEO:"] * 3, max_new_tokens=12, temperature=0,
                                         edit=steer)]
    assert got == [want] * 3


def test_prefixes_are_not_shared_with_edits(model, steer) -> None:
    """Beginnings long enough to be kept."""
    text = "To be, or not to be, that is the question. " * 8
    rows = [(text + end, {"edit": edit}) for end in "ab" for edit in (None, steer)]
    alone = [model.generate(p, max_new_tokens=6, temperature=0, **own).tokens for p, own in rows]
    both = [a.tokens for a in model.batch(rows, max_new_tokens=6, temperature=0, concurrency=1)]
    assert both == alone and alone[0] != alone[1]


def test_sessions_that_begin_with_a_prefix(model, steer) -> None:
    text = "To be, or not to be, that is the question. " * 4
    more = AblateHeads(2, 0)
    with model.session(edit=steer) as session:
        session.append(text, logits="none")
        want = session.append([7])
    for _ in range(2):
        with model.session(text) as plain, model.session(text, edit=steer) as session:
            assert session.edit == steer and not plain.edit
            with model.session(session, edit=more) as fork, model.session(session) as same:
                assert fork.edit == steer + more.since(session.position)
                assert same.edit == steer and (same.append([7]) == want).all()
                assert (fork.append([7]) != want).any()
            assert (session.append([7]) == want).all()
            assert (plain.append([7]) != want).any()


def test_a_failing_callback_ends_its_row(model) -> None:
    class Own(Exception):
        pass

    def fail(streams, positions):
        if (positions > 3).any():
            raise Own("at four")

    rows = ["ROMEO:", ("ROMEO:", {"edit": Callback(1, fail)}), "JULIET:"]
    got = list(model.batch(rows, max_new_tokens=6, temperature=0))
    assert [a.finish_reason for a in got] == ["length", "error", "length"]
    assert isinstance(got[1].error, Own)
    assert got[0].tokens == model.generate("ROMEO:", max_new_tokens=6, temperature=0).tokens
    with pytest.raises(Own):
        model.generate("ROMEO:", max_new_tokens=6, edit=Callback(1, fail))


def test_traced_with_an_edit(model, steer) -> None:
    with model.trace("ROMEO: But soft", streams=[1, 3], logits="all") as plain, model.trace(
            "ROMEO: But soft", streams=[1, 3], logits="all", edit=steer) as t:
        assert t.session.edit == steer
        assert (t.streams[1][:2] == plain.streams[1][:2]).all()
        assert (t.streams[1][2:] != plain.streams[1][2:]).any((1, 2)).all()
        with model.session(edit=steer) as session:
            assert (session.append("ROMEO: But soft", logits="all") == t.logits).all()
        back = Patch(3, plain.streams[3], positions=range(len(plain.tokens)))
    with model.trace("ROMEO: But soft", streams=[3], edit=steer + back) as t:
        assert (t.streams[3] == plain.streams[3]).all()
    with pytest.raises(ValueError, match="layers: got 6"):
        model.trace("ROMEO:", edit=AblateHeads(6, 0))


def test_edit_beside_a_session(model, steer) -> None:
    with model.session() as session, pytest.raises(ValueError, match="session, which has its own"):
        model.generate("ROMEO:", session=session, edit=steer)
    with pytest.raises(TypeError, match="edit: got str, wanted an Edit or None"):
        model.generate("ROMEO:", edit="steer")
    with pytest.raises(TypeError, match="edit: got str, wanted an Edit or None"):
        model.session(edit="steer")
