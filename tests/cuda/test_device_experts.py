# SPDX-License-Identifier: Apache-2.0
"""Routed experts beside the device, in host memory: the CPU's bits wherever each of them lies."""

import ctypes
import gc
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from steps import same, same_state

import dsv4
from dsv4 import placement
from dsv4.checkpoint import Checkpoint

pytestmark = [pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed"),
              pytest.mark.usefixtures("host_device")]
IDS = np.random.default_rng(7).integers(0, 256, 400)
ALIGN = 256


@pytest.fixture
def host(host_plugin: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(host_plugin))


def each(folder: Path) -> int:
    """Bytes of a routed expert on the device."""
    with Checkpoint.open(folder) as checkpoint:
        return sum(-(-t.nbytes // ALIGN) * ALIGN for t in checkpoint.tensors.values()
                   if t.name.startswith("layers.0.ffn.experts.0."))


@cache
def least(folder: Path) -> int:
    """The gpu_memory with which a model loads, and less than half an expert more; no routed expert
    is on the device then."""
    with dsv4.load(folder, device="cuda", threads=1) as model:
        at = model._core.placement
    low = at["weight_bytes"] + at["pass_bytes"] - at["experts"] * each(folder)
    high = low + (1 << 22)
    while high - low > each(folder) // 2:
        middle = (low + high) // 2
        try:
            dsv4.load(folder, device="cuda", threads=1, gpu_memory=middle).close()
            high = middle
        except MemoryError:
            low = middle
    return high


def load(folder: Path, kept: int, threads: int = 2) -> dsv4.Model:
    """With so many routed experts on the device."""
    model = dsv4.load(folder, device="cuda", threads=threads,
                      gpu_memory=least(folder) + kept * each(folder))
    assert model._core.placement["experts_on_device"] == kept
    return model


def follow(cpu: dsv4.Model, gpu: dsv4.Model, lengths: tuple[int, ...]) -> None:
    """One session on each, by pieces of these lengths, then two sessions in one step."""
    a, b = cpu.session(), gpu.session()
    at = 0
    for n in lengths:
        ids = IDS[at : at + n]
        assert same(a.append(ids, logits="all"), b.append(ids, logits="all")), n
        at += n
    assert same_state(a, b)
    c, d = a.fork(), b.fork()
    for x, y in zip(cpu.step([(a, IDS[:2]), (c, IDS[3:4])], logits="all"),
                    gpu.step([(b, IDS[:2]), (d, IDS[3:4])], logits="all"), strict=True):
        assert x is not None and y is not None and same(x, y)


@pytest.mark.parametrize(("kept", "threads"), [
    pytest.param(0, 1, marks=pytest.mark.long), (13, 2),
    pytest.param(28, 3, marks=pytest.mark.long)])
def test_any_split(
    cpu: dsv4.Model, nano: Callable[[str], Path], live: Callable[[], int], kept: int, threads: int,
) -> None:
    """Single tokens (the second as graphs), few, and so many that experts are uploaded; hashed
    layers among them."""
    before = live()
    with load(nano("nano-flash"), kept, threads) as model:
        follow(cpu, model, (1, 1, 24, 1))
        uses = np.zeros((4, 8), np.uint64)
        model._core.uses(uses)
        assert (uses.sum(1) == 3 * (27 + 3)).all()
    assert live() == before


@pytest.mark.long
@pytest.mark.parametrize(("name", "kept", "numerics"), [
    ("nano-base", 5, "official"), pytest.param("nano-pro", 3, "weights", marks=pytest.mark.long)])
def test_other_formats(
    nano: Callable[[str], Path], name: str, kept: int, numerics: str
) -> None:
    """FP8 experts with f32 scales; another config, and inputs that are not rounded."""
    limit = least(nano(name)) + kept * each(nano(name))
    with (dsv4.load(nano(name), device="cpu", threads=1, numerics=numerics) as one,
          dsv4.load(nano(name), device="cuda", threads=2, numerics=numerics,
                    gpu_memory=limit) as other):
        assert other._core.placement["experts_on_device"] == kept
        follow(one, other, (1, 19))


@pytest.mark.long
def test_prompts_on_tensor_cores(nano: Callable[[str], Path], host: ctypes.CDLL) -> None:
    """Their bits are not the CPU's, which therefore computes no row of such a pass: all experts
    that are missing are uploaded."""
    folder = nano("nano-flash")
    limit = least(folder) + 13 * each(folder)
    host.host_mma_bits(12)  # sums so bad that it shows
    try:
        with (dsv4.load(folder, device="cuda", threads=1, exact=False) as one,
              dsv4.load(folder, device="cuda", threads=2, exact=False, gpu_memory=limit) as other):
            a, b = one.session(), other.session()
            for n in (9, 1):
                assert same(a.append(IDS[:n], logits="all"), b.append(IDS[:n], logits="all"))
    finally:
        host.host_mma_bits(0)


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where counts of experts are kept."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "dsv4" / "experts"


@pytest.mark.long
def test_those_used_most(
    nano: Callable[[str], Path], host: ctypes.CDLL, state_folder: Path
) -> None:
    """Counted, kept when the model is closed or forgotten, and on the GPU after the next load."""
    folder = nano("nano-flash")
    model = load(folder, 8)
    assert "8 of 32 routed experts; the others lie in host memory" in repr(model)
    assert model.plan.experts_on_gpu == 8 and model.plan.device == "cuda"
    before = host.host_calls(b"receive")
    model.session().append(IDS[:9], logits="none")
    assert host.host_calls(b"receive") == before + 3  # without counts the first layer is whole
    uses = np.zeros((4, 8), np.uint64)
    model._core.uses(uses)
    model.close()
    (file,) = state_folder.iterdir()
    kept = json.loads(file.read_text())
    assert kept["uses"] == uses.tolist()
    # half of two layers are made those used most, in a file that counts are added to
    asked = np.zeros((4, 8), np.int64)
    asked[2, 4:] = asked[3, :4] = 100
    kept |= dict(uses=asked.tolist(), crc32=placement._checksum(asked))
    file.write_text(json.dumps(kept))
    model = load(folder, 8)
    session = model.session()
    before = host.host_calls(b"receive")
    session.append(IDS[:1], logits="none")
    assert host.host_calls(b"receive") == before + 4
    session.append(IDS[1:9], logits="none")
    del model, session
    gc.collect()
    assert json.loads(file.read_text())["uses"] == (asked + uses.astype(np.int64)).tolist()


def damaged(text: str) -> Iterator[bytes]:
    whole = json.loads(text)
    yield b""
    yield text.encode()[:-9]
    yield b"[" * 100000
    for change in (dict(model="0" * 64), dict(uses=[[1]]), dict(uses=[[-1] * 8] * 4),
                   dict(crc32=whole["crc32"] ^ 1), dict(format="other"), dict(uses=None),
                   dict(uses=[[1 << 70] * 8] * 4)):
        yield json.dumps(whole | change).encode()


def test_damaged_counts(nano: Callable[[str], Path], state_folder: Path,
                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignored with a warning, and so are those that cannot be read or written."""
    folder = nano("nano-flash")
    with load(folder, 6) as model:
        model.session().append(IDS[:1], logits="none")
    (file,) = state_folder.iterdir()
    shape = (4, 8)
    key = json.loads(file.read_text())["model"]
    for content in damaged(file.read_text()):
        file.write_bytes(content)
        with pytest.warns(UserWarning, match="uses of experts are ignored: "):
            assert placement.read(key, shape) is None
    with pytest.warns(UserWarning, match="uses of experts are ignored: "):
        model = load(folder, 6)
    model.session().append(IDS[:1], logits="none")
    file.unlink()
    file.mkdir()
    with pytest.warns(UserWarning, match="ignored: (they could|.*Is a directory)"):
        model.close()
    assert [p.name for p in state_folder.iterdir()] == [file.name]


def test_old_counts_fade(nano: Callable[[str], Path], state_folder: Path) -> None:
    class Core:
        def uses(self, out: np.ndarray) -> None:
            out[0, 0] = 3 * placement.FADE

    for _ in range(3):
        placement.save(Core(), "k", (1, 2), 1, os.getpid())  # type: ignore[arg-type]
    counts = placement.read("k", (1, 2))
    assert counts is not None and placement.FADE // 2 < counts[0, 0] <= placement.FADE
    placement.save(Core(), "k2", (1, 2), 1, os.getpid() + 1)  # type: ignore[arg-type]
    assert placement.read("k2", (1, 2)) is None


def test_limits(nano: Callable[[str], Path], used: Callable[[], int],
                monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allowed or free is never passed, and what the engine says is what it took."""
    folder = nano("nano-flash")
    before = used()
    with pytest.raises(MemoryError, match=r"needed at least 0\.\d+ GiB .* sessions; .* allowed"):
        dsv4.load(folder, device="cuda", gpu_memory=least(folder) - each(folder))
    with load(folder, 9) as model:
        at = model._core.placement
        session = model.session()
        session.append(IDS[:3])
        taken = used() - before
        assert at["weight_bytes"] < taken
        assert taken <= least(folder) + 9 * each(folder)
        del session
    # without a limit: all that is free, but a sixteenth
    with load(folder, 5) as model:
        at = model._core.placement
    del model
    gc.collect()
    free = 16 * (at["weight_bytes"] + at["pass_bytes"]) // 15 + 16
    monkeypatch.setenv("HOST_BYTES", str(used() + free))
    with dsv4.load(folder, device="cuda", threads=1) as model:
        assert model._core.placement["experts_on_device"] == 5
        assert used() - before <= free - free // 16
    monkeypatch.setenv("HOST_BYTES", str(used() + (1 << 20)))
    with pytest.raises(MemoryError, match=r"needed at least .* free 0\.001 GiB"):
        dsv4.load(folder, device="cuda")


@pytest.mark.parametrize(("call", "nth", "code"), [
    ("host_allocate", 3, 2), ("allocate", 2, 2), ("stream_create", 2, 2), ("event_create", 1, 2),
    ("event_create", 4, 2), ("upload", 2, 700),
])
def test_a_failing_load_gives_everything_back(
    nano: Callable[[str], Path], live: Callable[[], int], monkeypatch: pytest.MonkeyPatch,
    call: str, nth: int, code: int,
) -> None:
    load(nano("nano-flash"), 9).close()  # what is done once in a process is done
    before = live()
    monkeypatch.setenv("HOST_FAIL", f"{call}:{nth}:{code}")
    with pytest.raises((MemoryError, dsv4.DeviceError), match=f"error {code}"):
        load(nano("nano-flash"), 9)
    assert live() == before


@pytest.mark.parametrize(("call", "nth", "code"), [
    ("send", 2, 1), ("event_wait", 4, 700), ("upload", 12, 700), ("skip_send", 2, 999),
    *(pytest.param(*case, marks=pytest.mark.long) for case in (
        ("receive", 3, 719), ("event_record", 3, 700), ("experts", 12, 700),
        ("event_done", 1, 700))),
])
def test_a_failing_step(
    cpu: dsv4.Model, nano: Callable[[str], Path], live: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch, call: str, nth: int, code: int,
) -> None:
    """All workers come back, the session is as it was, and the model says that it is lost; so
    does one whose device ends without a word (skip_send)."""
    before = live()
    with load(nano("nano-flash"), 0) as model:
        session = model.session()
        session.append(IDS[:2])
        kept = session._core.fixed().copy()
        monkeypatch.setenv("HOST_FAIL", f"{call}:{nth}:{code}")
        with pytest.raises(dsv4.DeviceError, match=f"error {code}"):
            session.append(IDS[2:26])
        monkeypatch.delenv("HOST_FAIL")
        with pytest.raises(dsv4.DeviceError, match=f"error {code}"):
            session.append(IDS[2:3])
        assert session.position == 2 and np.array_equal(kept, session._core.fixed())
        del session
    del model
    assert live() == before


def test_a_step_that_needs_more_memory(
    cpu: dsv4.Model, nano: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that ends half-way leaves the next one right."""
    with load(nano("nano-flash"), 9) as model:
        a, b = cpu.session(), model.session()
        assert same(a.append(IDS[:1]), b.append(IDS[:1]))
        monkeypatch.setenv("HOST_FAIL", "receive:2:2")
        with pytest.raises(MemoryError, match="error 2"):
            b.append(IDS[1:3])
        monkeypatch.delenv("HOST_FAIL")
        assert same(a.append(IDS[1:3]), b.append(IDS[1:3]))


@pytest.mark.long
def test_interrupts(cpu: dsv4.Model, nano: Callable[[str], Path]) -> None:
    """A step that is cancelled, at any moment, leaves the session as it was."""
    with load(nano("nano-flash"), 4, 3) as model:
        a, b = cpu.session(), model.session()
        assert same(a.append(IDS[:2]), b.append(IDS[:2]))
        for wait in (0.005, 0.2):
            interrupted(b, wait)
            assert b.position == 2
        assert same(a.append(IDS[2:26]), b.append(IDS[2:26]))


def interrupted(session: dsv4.Session, wait: float) -> None:
    """Appends, and gets Ctrl-C after so many seconds."""
    import signal

    timer = threading.Timer(wait, signal.pthread_kill,
                            (threading.main_thread().ident, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        session.append(IDS[2:26])
        timer.join()
