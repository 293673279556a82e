# SPDX-License-Identifier: Apache-2.0
"""Traces of passes on the device, with the plugin's kernels executed on the CPU: the CPU's bits."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from steps import assert_same
from test_device_experts import load

import dsv4

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
IDS = np.random.default_rng(7).integers(0, 256, 600)
EVERYTHING = dict.fromkeys(
    ("router", "indexer", "streams", "streams_in", "streams_mid", "kv", "heads", "hyper",
     "sublayers"), True)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Whether a step since the last call ran on the device: its first kernel is made to fail."""
    def on_device(step: Callable[[], object]) -> bool:
        monkeypatch.setenv("HOST_FAIL", "embed:1:2")
        try:
            step()
        except MemoryError:
            return True
        finally:
            monkeypatch.delenv("HOST_FAIL")
        return False
    return on_device


def test_every_site(cpu: dsv4.Model, gpu: dsv4.Model, launched: Callable[..., bool]) -> None:
    """A prompt and single tokens: entries close, all of them are attended to."""
    traces = []
    for model in (cpu, gpu):
        t = dsv4.Trace(model, logits="all", nll=True, **EVERYTHING)
        session = model.session()
        for first, end in ((0, 5), (5, 6), (6, 8)):
            session.append(IDS[first:end], trace=t)
        traces.append(t)
    assert_same(*traces)
    assert launched(lambda: session.append(IDS[8:9], trace=traces[1]))


def test_entries_that_are_scored(cpu: dsv4.Model, gpu: dsv4.Model, tmp_path: Path) -> None:
    """Far on: some tokens score entries and some do not, in a step with others beside."""
    a = cpu.session()
    a.append(IDS[:254], logits="none")
    a.save(tmp_path / "s")
    traces = []
    for model, far in ((cpu, a), (gpu, gpu.load_session(tmp_path / "s"))):
        t = dsv4.Trace(model, **EVERYTHING)
        u = dsv4.Trace(model, router=True, kv=True, streams=[1])
        model.step([(model.session(), IDS[:2]), (far, IDS[254:258], t), (model.session(), [3], u)])
        traces.append((t, u))
    for one, other in zip(*traces, strict=True):
        assert_same(one, other)
    layer = min(traces[0][0].indexer)
    assert np.isfinite(traces[0][0].indexer[layer].scores).any()


def test_a_batch(cpu: dsv4.Model, gpu: dsv4.Model) -> None:
    """Neighbours that are traced alike, otherwise, and not at all."""
    found = []
    for model in (cpu, gpu):
        traces = [dsv4.Trace(model, **parts) for parts in (
            {"router": True, "kv": True}, {"router": True, "streams_mid": [2]}, {"router": [3]})]
        sessions = [model.session() for _ in range(4)]
        for ids in (IDS[:8].reshape(4, 2), IDS[8:12, None]):
            model.step([(session, part, *trace) for session, part, trace in zip(
                sessions, ids, [[traces[0]], [traces[1]], [], [traces[2]]], strict=True)])
        found.append(traces)
    for one, other in zip(*found, strict=True):
        assert_same(one, other)


@pytest.mark.long
def test_little_room_on_the_device(
    cpu: dsv4.Model, gpu: dsv4.Model, used: Callable[[], int], monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is copied waits in a small stage that the host empties more than once in a pass."""
    session, t = gpu.session(), dsv4.Trace(gpu, router=[0])
    session.append(IDS[:6])
    monkeypatch.setenv("HOST_BYTES", str(used()))
    with pytest.raises(MemoryError, match="memory for a trace"):
        session.append(IDS[:6], trace=t)
    assert (session.position, len(t)) == (6, 0)
    monkeypatch.delenv("HOST_BYTES")
    session.append(IDS[:6], trace=t)
    sessions = cpu.session(), gpu.session()
    traces = [dsv4.Trace(model, **EVERYTHING) for model in (cpu, gpu)]
    for session in sessions:
        session.append(IDS[:1])
    monkeypatch.setenv("HOST_BYTES", str(used() + 50_000))
    for session, t in zip(sessions, traces, strict=True):
        session.append(IDS[1:6], trace=t)
    assert_same(*traces)


def test_experts_beside(cpu: dsv4.Model, host_device: None, nano: Callable[[str], Path]) -> None:
    """Some experts are computed on the host: the same values, also in arrays on the device; their
    weights are not there."""
    with load(nano("nano-flash"), kept=12) as gpu:
        traces = []
        for model, device in ((cpu, False), (gpu, False), (gpu, True)):
            t = dsv4.Trace(model, router=True, sublayers=True, streams=True, device=device)
            session = model.session()
            session.append(IDS[:4], trace=t)
            session.append(IDS[4:5], trace=t)
            traces.append(t)
        assert_same(traces[0], traces[1])
        assert_same(traces[0], traces[2])
        there = 0
        for layer in range(4):
            for expert in range(8):
                weight = gpu.tensors[f"layers.{layer}.ffn.experts.{expert}.w2.weight"]
                try:
                    there += np.array_equal(weight.on_device().numpy(), weight.numpy())
                except ValueError as error:
                    assert "other experts and the draft heads on the host" in str(error)
        assert there == 12


def test_what_the_cpu_computes(gpu: dsv4.Model, launched: Callable[..., bool]) -> None:
    session = gpu.session()
    t = dsv4.Trace(gpu, attention=[1], router=[1])
    assert not launched(lambda: session.append(IDS[:3], trace=t))
    assert t.attention[1].sink.shape[0] == 3
    assert launched(lambda: session.append(IDS[3:4]))


def test_a_failing_trace(gpu: dsv4.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session and the trace are as they were, and go on."""
    session, t = gpu.session(), dsv4.Trace(gpu, streams=True)
    session.append(IDS[:3], trace=t)
    monkeypatch.setenv("HOST_FAIL", "tap:3:2")
    with pytest.raises(MemoryError, match="tap"):
        session.append(IDS[3:5], trace=t)
    assert (session.position, len(t)) == (3, 3)
    monkeypatch.delenv("HOST_FAIL")
    session.append(IDS[3:5], trace=t)
    with gpu.trace(IDS[:5], streams=True) as whole:
        assert all((t.streams[i] == whole.streams[i]).all() for i in t.streams)
