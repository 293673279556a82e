# SPDX-License-Identifier: Apache-2.0
"""Forks and rewinds: a session's future depends on its tokens alone, not on how it came there.

Breaking the copy on write on purpose (a page or block that is not copied before it is written, a
fixed state that two sessions share, a fork that forgets a row store) makes these tests fail; that
was tried for each.
"""

import pickle
import threading

import numpy as np
import pytest
from harness import fed, pieces, prompt, same, state

import dsv4

LENGTH = 300


@pytest.fixture(scope="module")
def straight(tiny):
    """LENGTH ids, and all their logits in one piece."""
    ids = prompt(tiny, LENGTH)
    return ids, fed(tiny, [ids])


def rest_of(session: dsv4.Session, ids, at: int):
    return session.append(ids[at:], logits="all")


def test_forks_at_every_split(tiny, straight) -> None:
    """Both halves of a fork go on like a session that was never forked; others do not move."""
    ids, want = straight
    other = prompt(tiny, LENGTH, seed=2)
    with tiny.session() as trunk:
        for at in range(1, LENGTH):
            trunk.append(ids[at - 1 : at], logits="none")
            left, right = trunk.fork(), trunk.fork()
            right.append(other[:7], logits="none")
            same(rest_of(left, ids, at), want[at:], f"fork at {at}")
            assert (trunk.position, left.position, right.position) == (at, LENGTH, at + 7)
        same(trunk.append(ids[-1:]), want[-1:])


def test_a_tree_of_forks(tiny) -> None:
    """Forks of forks, stepped together and apart, in any order of their ends."""
    draw = np.random.default_rng(4)
    leaves = [(tiny.session(), [])]
    for turn in range(40):
        session, past = leaves[draw.integers(len(leaves))]
        leaves.append((session.fork(), list(past)))
        if len(leaves) > 8:
            gone, _ = leaves.pop(draw.integers(len(leaves)))
            gone.close()
        moving = draw.permutation(len(leaves))[: draw.integers(1, 6)]
        new = [prompt(tiny, int(draw.integers(1, 40)), seed=100 * turn + int(i)) for i in moving]
        tiny.step([(leaves[i][0], ids) for i, ids in zip(moving, new, strict=True)], logits="none")
        for i, ids in zip(moving, new, strict=True):
            leaves[i][1].extend(ids.tolist())
    for session, past in leaves:
        assert session.tokens.tolist() == past
        if past:
            with tiny.session() as cold:
                cold.append(past, logits="none")
                for a, b in zip(state(session), state(cold), strict=True):
                    same(a, b)
                same(session.append([3]), cold.append([3]))


def test_rewinds_to_every_position(tiny, straight) -> None:
    ids, want = straight
    with tiny.session() as session:
        for piece in pieces(ids, 70):
            session.append(piece, logits="none")
        for at in range(LENGTH, 0, -1):
            session.rewind(at)
            assert session.position == at and np.array_equal(session.tokens, ids[:at])
            if at < LENGTH:
                same(session.fork().append(ids[at : at + 1]), want[at : at + 1], f"at {at}")
        session.rewind(0)
        same(session.append(ids, logits="all"), want)


def test_rewound_sessions_keep_growing(tiny) -> None:
    draw = np.random.default_rng(5)
    with tiny.session() as session:
        past: list[int] = []
        for turn in range(60):
            ids = prompt(tiny, int(draw.integers(1, 60)), seed=turn)
            session.append(ids, logits="none")
            past += ids.tolist()
            if turn % 2:
                at = int(draw.integers(0, len(past)))
                session.rewind(at)
                past = past[:at]
        with tiny.session() as cold:
            cold.append(past, logits="none")
            same(session.append([5]), cold.append([5]))


def test_what_a_rewind_computes_again(tiny, monkeypatch) -> None:
    """Nothing for kept states: before and after the last appends of several tokens."""
    computed = []
    core = tiny._core

    class Counting:
        def __getattr__(self, name):
            return getattr(core, name)

        def step(self, segments, seconds):
            computed.append(sum(len(ids) for _, ids, _, _ in segments))
            return core.step(segments, seconds)

    session = tiny.session()
    for n in (50, 1, 1, 1, 40, 1, 1):
        session.append(prompt(tiny, n), logits="none")
    monkeypatch.setattr(tiny, "_core", Counting())
    for at, cost in ((94, 1), (93, 0), (60, 7), (53, 0), (52, 2), (50, 0), (10, 10)):
        session.rewind(at)
        assert sum(computed) == cost, at
        computed.clear()
    with dsv4.Session(tiny, dsv4._core.Session(core, 0)) as forgetful:
        forgetful.append(prompt(tiny, 30), logits="none")
        forgetful.rewind(20)
        assert computed == [30, 20]


class Counting:
    """An engine's model that notes how many tokens each step computes."""

    def __init__(self, core, computed) -> None:
        self.core = core
        self.computed = computed

    def __getattr__(self, name):
        return getattr(self.core, name)

    def step(self, segments, *rest):
        self.computed.append(sum(len(segment[1]) for segment in segments))
        return self.core.step(segments, *rest)


def counted(model, monkeypatch, work) -> int:
    """Tokens that it computes."""
    computed = []
    with monkeypatch.context() as patch:
        patch.setattr(model, "_core", Counting(model._core, computed))
        # sessions are made of the engine's own model
        patch.setattr(dsv4._core, "Session", lambda core, kept, made=dsv4._core.Session: made(
            getattr(core, "core", core), kept))
        work()
    return sum(computed)


def test_sessions_after_a_prefix(tiny, straight) -> None:
    """The bits of a session that computed all itself, wherever the prefix ends."""
    ids, want = straight
    for at in range(1, LENGTH):
        with tiny.session(ids[:at].tolist()) as one, tiny.session(one) as two:
            assert one.position == two.position == at
            assert np.array_equal(two.tokens, ids[:at])
            same(one.append(ids[at:], logits="all"), want[at:], f"after {at}")
            same(two.append(ids[at : at + 1]), want[at : at + 1], f"fork after {at}")
    with tiny.session(ids) as session:
        session.rewind(200)
        same(session.append(ids[200:], logits="all"), want[200:])
    ids = prompt(tiny, 3000, seed=3)
    want = fed(tiny, [ids])
    for at in np.random.default_rng(6).integers(LENGTH, 3000, 8):
        with tiny.session(ids[:at]) as session:
            same(session.append(ids[at:], logits="all"), want[at:], f"after {at} of 3,000")


def test_equal_beginnings_are_computed_once(tiny_folder, monkeypatch) -> None:
    with dsv4.load(tiny_folder, threads=2) as model:
        same_ids, one, two, three = (prompt(model, n, seed=20 + n) for n in (100, 50, 60, 70))

        def cost(*parts):
            ids = np.concatenate(parts)
            return counted(model, monkeypatch, lambda: sessions.append(model.session(ids)))

        sessions = []
        assert [cost(same_ids, one), cost(same_ids, one)] == [150, 0]
        # the first that parts from it cannot leave where nothing was kept; the next one can
        assert [cost(same_ids, two), cost(same_ids, three)] == [160, 70]
        assert cost(same_ids[:40]) == 40 and cost(same_ids[:31], three) == 101
        assert cost(same_ids, one, two) == 60
        branches = [s.append([5]) for s in sessions[:2]]
        same(branches[0], branches[1])
        kept = model._prefixes._prefixes
        assert kept.nbytes <= kept.most_bytes and len(kept) >= 6
        kept.most_bytes = 3 * sessions[0].nbytes  # a budget: those not used for longest go
        assert cost(one, two) == 110 and kept.nbytes <= kept.most_bytes and len(kept) < 4
        assert cost(one, two) == 0 and cost(same_ids, three) == 170
        model.close()
        assert kept.nbytes == len(kept) == 0
        with pytest.raises(ValueError, match="closed"):
            model.session(same_ids)


def test_prefixes_from_many_threads(tiny, straight) -> None:
    ids, want = straight
    wrong = []

    def work(seed: int) -> None:
        for at in np.random.default_rng(seed).integers(1, LENGTH, 12):
            with tiny.session(ids[:at]) as session:
                if not np.array_equal(session.append(ids[at:], logits="all"), want[at:]):
                    wrong.append(at)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_interrupted_prefix(tiny, straight, monkeypatch) -> None:
    ids, want = straight
    ids = ids[::-1].copy()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dsv4.Session, "append", interrupted)
        tiny.session(ids)
    with tiny.session(ids) as session, tiny.session() as cold:
        cold.append(ids, logits="none")
        same(session.append([4]), cold.append([4]))


def test_failing_steps_touch_no_other_branch(tiny, straight) -> None:
    ids, want = straight
    trunk = tiny.session()
    trunk.append(ids[:200], logits="none")
    branch = trunk.fork()
    with pytest.raises(ValueError, match="context"):
        branch.append(np.zeros(tiny.config.max_position_embeddings, np.int32))
    assert branch.position == 200
    same(rest_of(branch, ids, 200), want[200:])
    same(rest_of(trunk, ids, 200), want[200:])


def test_branches_in_many_threads(tiny, straight) -> None:
    ids, want = straight
    trunk = tiny.session()
    trunk.append(ids[:150], logits="none")
    wrong = []

    def work(seed: int) -> None:
        draw = np.random.default_rng(seed)
        for _ in range(6):
            branch = trunk.fork()
            out = [branch.append(p, logits="all")
                   for p in np.split(ids[150:], np.sort(draw.integers(1, 149, 3))) if len(p)]
            if not np.array_equal(np.concatenate(out), want[150:]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and trunk.position == 150


def test_bad_arguments(tiny) -> None:
    session = tiny.session()
    session.append([1, 2, 3], logits="none")
    for at, error in ((4, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="position: got"):
            session.rewind(at)
    for keep, error in ((-1, ValueError), (1025, ValueError), ("4", TypeError), (True, TypeError)):
        with pytest.raises(error, match="checkpoints: got"):
            tiny.session(checkpoints=keep)
    context = tiny.config.max_position_embeddings
    for prefix, error, says in (
        ([], ValueError, "prefix"), ([-1], ValueError, "prefix"), (7, TypeError, "prefix"),
        ("text", ValueError, "prefix: got text"), ([1] * (context + 1), ValueError, "prefix"),
    ):
        with pytest.raises(error, match=says):
            tiny.session(prefix)
    with dsv4.load() as other, pytest.raises(ValueError, match="prefix: got a session of another"):
        other.session(session)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(session)
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.fork()
    with pytest.raises(ValueError, match="closed"):
        session.rewind(0)
