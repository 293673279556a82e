# SPDX-License-Identifier: Apache-2.0
"""Small passes on the device are captured and replayed: the CPU's bits, and what may fail."""

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from steps import same, same_state

import dsv4
from dsv4 import _core, nano

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
SAMPLING = {
    "temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "repetition_penalty": 1.0, "seed": 5, "logprobs": 2,
    "min_new_tokens": 0, "max_new_tokens": -1, "stop_ids": (), "logit_bias": (),
    "force_tokens": (), "choice": 0}
IDS = np.random.default_rng(8).integers(0, 256, 64)


@pytest.fixture
def host(host_plugin: Path) -> ctypes.CDLL:
    """What the device counts: host_graphs, host_captures, host_calls."""
    return ctypes.CDLL(str(host_plugin))


def filled(models: tuple[dsv4.Model, ...], position: int, seed: int = 1) -> list[dsv4.Session]:
    sessions = [model.session() for model in models]
    for session in sessions:
        session._core.fill(position, seed)
    return sessions


def test_a_growing_context(cpu: dsv4.Model, gpu: dsv4.Model, host: ctypes.CDLL) -> None:
    """Tokens before and behind a power of two: launched, captured and launched, replayed."""
    a, b = filled((cpu, gpu), 252)
    launched = host.host_calls(b"graph_launch")
    wanted = [(0, 0), (1, 1), (1, 2), (1, 3), (1, 3), (2, 4), (2, 5)]
    for i, (graphs, launches) in enumerate(wanted):
        ids = IDS[i:i + 1]
        assert same(a.append(ids), b.append(ids))
        assert host.host_graphs() == graphs
        assert host.host_calls(b"graph_launch") - launched == launches
    assert same_state(a, b)


def test_sessions_that_come_and_go(cpu: dsv4.Model, gpu: dsv4.Model) -> None:
    """One graph for different sessions, at different positions, with forks and rewinds between."""
    pairs = [filled((cpu, gpu), 62, 1), filled((cpu, gpu), 140, 2), filled((cpu, gpu), 9, 3)]
    plan = [(0, 1), (1, 2), (2, 0), (1, 0)]
    for i, chosen in enumerate(plan):
        steps = [[(pairs[j][k], IDS[4 * i + j:4 * i + j + 1]) for j in chosen] for k in (0, 1)]
        for x, y in zip(cpu.step(steps[0]), gpu.step(steps[1]), strict=True):
            assert x is not None and y is not None and same(x, y)
        if i == 1:
            pairs[2] = [session.fork() for session in pairs[1]]
        if i == 2:
            for session in pairs[1]:
                session.append(IDS[:2])
                session.rewind(session.position - 2)
    for a, b in pairs:
        assert same_state(a, b)


@pytest.mark.parametrize(("call", "code", "error", "lost"), [
    ("capture_begin", 901, dsv4.DeviceError, True), ("capture_end", 901, dsv4.DeviceError, True),
    ("graph_launch", 2, MemoryError, False),
    ("graph_launch", 700, dsv4.DeviceError, True), ("experts", 1, dsv4.DeviceError, True),
    ("gather", 1, dsv4.DeviceError, True), ("download", 719, dsv4.DeviceError, True),
])
def test_a_failing_capture(
    cpu: dsv4.Model, gpu: dsv4.Model, host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch,
    call: str, code: int, error: type[Exception], lost: bool,
) -> None:
    """The session is as it was, no capture stays open; the next step works, or says why not."""
    a, b = filled((cpu, gpu), 20)
    assert same(a.append(IDS[:1]), b.append(IDS[:1]))
    before = b._core.fixed().copy()
    monkeypatch.setenv("HOST_FAIL", f"{call}:1:{code}")
    with pytest.raises(error, match=f"CUDA: .* error {code}"):
        b.append(IDS[1:2])
    monkeypatch.delenv("HOST_FAIL")
    assert b.position == 21 and np.array_equal(before, b._core.fixed())
    assert not host.host_captures()
    if lost:
        with pytest.raises(error, match=f"error {code}"):
            b.append(IDS[1:2])
    else:
        assert same(a.append(IDS[1:2]), b.append(IDS[1:2])) and same_state(a, b)


def test_no_room_for_a_graph(
    cpu: dsv4.Model, gpu: dsv4.Model, host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is launched without one; later there may be room."""
    a, b = filled((cpu, gpu), 20)
    assert same(a.append(IDS[:1]), b.append(IDS[:1]))
    monkeypatch.setenv("HOST_FAIL", "capture_end:1:2")
    assert same(a.append(IDS[1:2]), b.append(IDS[1:2])) and not host.host_graphs()
    monkeypatch.delenv("HOST_FAIL")
    assert same(a.append(IDS[2:3]), b.append(IDS[2:3])) and host.host_graphs()
    assert same_state(a, b)


def test_no_room_for_scratch(
    cpu: dsv4.Model, gpu: dsv4.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger pass fails; those whose graphs went with the old scratch allocate before they are
    captured again."""
    a, b = filled((cpu, gpu), 20)
    for i in range(2):
        assert same(a.append(IDS[i:i + 1]), b.append(IDS[i:i + 1]))
    monkeypatch.setenv("HOST_FAIL", "allocate:1:2")
    with pytest.raises(MemoryError, match="CUDA: .* error 2"):
        b.append(IDS[:40])
    monkeypatch.delenv("HOST_FAIL")
    for i in range(3):
        assert same(a.append(IDS[i:i + 1]), b.append(IDS[i:i + 1]))
    assert same_state(a, b)


def test_graphs_that_are_not_needed_go(
    tmp_path: Path, host_device: None, live: Callable[[], int], host: ctypes.CDLL,
) -> None:
    """Those of the shape needed longest ago, and all with the model."""
    folder = nano.make("one-layer", 5, tmp_path, num_hidden_layers=1, num_hash_layers=0,
                       compress_ratios=[0, 0], hc_mult=2, num_attention_heads=2, vocab_size=128)
    before = live()
    with dsv4.load(folder, device="cuda", threads=1) as model:
        def step(n: int, position: int = 0) -> int:
            (session,) = filled((model,), position)
            session.append(np.zeros(n, np.int32), logits="none")
            return host.host_graphs()

        assert [step(n) for n in (1, 1, 2)] == [0, 1, 0]  # the scratch has moved
        assert [step(n) for n in (4, 2, 1, 2)] == [0, 1, 2, 2]
        others = [(n, 200 << i) for n in (1, 2, 3) for i in range(1, 11)][1:]
        assert [step(*other) for other in others] == [2] * 29
        assert step(*others[0]) == 3
        assert step(3) == 3  # in the place of 4
        assert step(4) == 2  # in the place of 1
        assert step(2) == 2
    assert live() == before and host.host_graphs() == 0


def test_calls_of_a_step(cpu: dsv4.Model, gpu: dsv4.Model, host: ctypes.CDLL) -> None:
    """What a step of a token asks of the runtime: a copy each way, one graph, one wait; logits
    and sampled tokens come with it."""
    calls = (b"upload", b"graph_launch", b"download", b"synchronize", b"allocate")
    a, b = filled((cpu, gpu), 20)
    samplers = [_core.Sampler(model.config.vocab_size, SAMPLING) for model in (cpu, gpu)]
    for logits, own in ((0, False), (1, False), (0, True)):
        for i in range(3):
            before = [host.host_calls(call) for call in calls]
            x, y = (model._core.step([(session._core, np.array([i], np.int32), logits,
                                       sampler if own else None)], None)[0]
                    for model, session, sampler in zip((cpu, gpu), (a, b), samplers, strict=True))
            assert x[1] == y[1] and (x[0] is y[0] is None or same(x[0], y[0]))
        assert [host.host_calls(call) - n for call, n in zip(calls, before, strict=True)] == [
            1, 1, 1, 1, 0]
    assert same_state(a, b)


def test_more_sessions_than_come_back_at_once(
    tmp_path: Path, host_device: None, host: ctypes.CDLL,
) -> None:
    """A pass of many pieces: their rows are copied in rounds, and each finds its session."""
    folder = nano.make("csa-layer", 6, tmp_path, num_hidden_layers=1, num_hash_layers=0,
                       compress_ratios=[4, 0], hc_mult=2, num_attention_heads=2, vocab_size=128,
                       index_n_heads=4)
    with (dsv4.load(folder, device="cpu", threads=1) as cpu,
          dsv4.load(folder, device="cuda", threads=1) as gpu):
        pairs = [filled((cpu, gpu), 3 + i % 4, i) for i in range(96)]
        before = host.host_calls(b"download")
        for k, model in enumerate((cpu, gpu)):
            model.step([(pair[k], IDS[i % 8:i % 8 + 1] % 128) for i, pair in enumerate(pairs)],
                       logits="none")
        assert host.host_calls(b"download") - before == 2
        assert all(same_state(a, b) for a, b in pairs)
