# SPDX-License-Identifier: Apache-2.0
"""Steps on the device, with the plugin's kernels executed on the CPU: the CPU's bits, or a refusal
that leaves everything as it was."""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from steps import same, same_state

import dsv4
from dsv4 import loading

pytestmark = [pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed"),
              pytest.mark.usefixtures("host_device")]
IDS = np.random.default_rng(7).integers(0, 256, 400)


def test_prompt_and_tokens(cpu: dsv4.Model, gpu: dsv4.Model) -> None:
    """A prompt, then single tokens; logits and the whole state."""
    assert gpu.device == "cuda" and "cuda, 2 threads" in repr(gpu)
    a, b = cpu.session(), gpu.session()
    at = 0
    for n in (5, 1, 2):
        ids = IDS[at:at + n]
        assert same(a.append(ids, logits="all"), b.append(ids, logits="all"))
        at += n
    assert same_state(a, b)


def test_a_saved_session_goes_on(cpu: dsv4.Model, gpu: dsv4.Model, tmp_path: Path) -> None:
    """Positions where entries are scored and windows of 128 close; one step for two sessions."""
    a = cpu.session()
    a.append(IDS[:255], logits="none")
    a.save(tmp_path / "s")
    b = gpu.load_session(tmp_path / "s")
    c, d = cpu.session(), gpu.session()
    for x, y in zip(cpu.step([(a, IDS[255:257]), (c, IDS[:2])], logits="all"),
                    gpu.step([(b, IDS[255:257]), (d, IDS[:2])], logits="all"), strict=True):
        assert x is not None and y is not None and same(x, y)
    assert same_state(a, b) and same_state(c, d)
    e, f = a.fork(), b.fork()
    assert same(a.append([3]), b.append([3])) and same(e.append([4]), f.append([4]))


@pytest.mark.parametrize("name", ["nano-base", "nano-0731", "nano-pro"])
def test_other_formats(name: str, nano: Callable[[str], Path]) -> None:
    """FP8 experts and f32 scales; another config."""
    with (dsv4.load(nano(name), device="cpu", threads=1) as one,
          dsv4.load(nano(name), device="cuda", threads=1) as other):
        a, b = one.session(), other.session()
        assert same(a.append(IDS[:4], logits="all"), b.append(IDS[:4], logits="all"))
        assert same(a.append(IDS[4:5]), b.append(IDS[4:5])) and same_state(a, b)


@pytest.mark.long
def test_a_device_with_other_bits(
    live: Callable[[], int], monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One wrong bit in a weight: refused before any model is loaded, or the CPU instead."""
    held = live()
    monkeypatch.setattr(loading, "_checked", set())
    monkeypatch.setenv("HOST_FAIL", "flip:20:1")
    with pytest.raises(dsv4.DeviceError, match="other numbers than the CPU"):
        dsv4.load(device="cuda")
    monkeypatch.setenv("HOST_FAIL", "flip:25:1")
    with dsv4.load(device="auto") as model:
        assert model.device == "cpu" and "other numbers than the CPU" in repr(model)
    assert live() == held


@pytest.mark.parametrize(("call", "code", "error"), [
    ("upload", 700, dsv4.DeviceError), ("download", 719, dsv4.DeviceError),
    ("synchronize", 214, dsv4.DeviceError), ("attention", 1, dsv4.DeviceError),
    ("allocate", 2, MemoryError), ("prepare", 46, dsv4.BackendUnavailable),
])
def test_a_failing_step(
    gpu: dsv4.Model, monkeypatch: pytest.MonkeyPatch, call: str, code: int,
    error: type[Exception],
) -> None:
    """The session is as it was; after a fault of the device the model says so at once."""
    session = gpu.session()
    session.append(IDS[:2])
    before = session._core.fixed().copy()
    if call == "allocate":
        session = gpu.session()
    monkeypatch.setenv("HOST_FAIL", f"{call}:1:{code}")
    with pytest.raises(error, match=f"error {code}"):
        session.append(IDS[2:4])
    monkeypatch.delenv("HOST_FAIL")
    if error is dsv4.DeviceError:
        with pytest.raises(dsv4.DeviceError, match=f"error {code}"):
            session.append(IDS[2:3])
        assert session.position == 2
        assert np.array_equal(before, session._core.fixed())
    else:
        session.append(IDS[2:3])


@pytest.mark.parametrize(("call", "nth", "code"), [
    ("prepare", 2, 999), ("free_bytes", 2, 999), ("stream_create", 1, 2), ("allocate", 1, 2),
    ("allocate", 2, 2), ("host_allocate", 1, 2), ("host_allocate", 2, 2), ("upload", 1, 700),
    ("upload", 50, 700), ("synchronize", 1, 719),
])
def test_a_failing_load_gives_everything_back(
    nano: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, live: Callable[[], int],
    call: str, nth: int, code: int,
) -> None:
    before = live()
    monkeypatch.setenv("HOST_FAIL", f"{call}:{nth}:{code}")
    with pytest.raises((dsv4.DeviceError, MemoryError), match=f"error {code}"):
        dsv4.load(nano("nano-flash"), device="cuda", threads=1)
    assert live() == before
    monkeypatch.setenv("HOST_FAIL", f"{call}:{nth}:{code} ")  # counts from the start again
    with dsv4.load(nano("nano-flash"), device="auto", threads=1) as model:
        assert model.device == "cpu" and f"error {code}" in repr(model)


def test_an_interrupted_load(
    nano: Callable[[str], Path], live: Callable[[], int], used: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bar also counts what is copied to the device; an interrupt there ends the load."""
    before, told = live(), []

    class Bar:
        n, total = 0, 0

        def update(self, more: int) -> None:
            self.n += more
            if used():
                told.append((self.n, self.total))
                raise KeyboardInterrupt

        def close(self) -> None:
            pass

    dsv4.load(device="cuda", threads=1).close()  # the check before the first load has no bar
    gc.collect()
    monkeypatch.setattr(loading, "bar", lambda **_: Bar())
    with pytest.raises(KeyboardInterrupt):
        dsv4.load(nano("nano-flash"), device="cuda", threads=1)
    assert len(told) == 1 and told[0][0] == told[0][1] > 0
    assert live() <= before


def test_memory_of_the_device(
    nano: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, live: Callable[[], int]
) -> None:
    before = live()
    with pytest.raises(MemoryError, match="GPU memory: needed .* allowed"):
        dsv4.load(nano("nano-flash"), device="cuda", gpu_memory=1 << 20)
    monkeypatch.setenv("HOST_BYTES", str(before + (1 << 20)))
    with pytest.raises(MemoryError, match="GPU memory: needed .* free"):
        dsv4.load(nano("nano-flash"), device="cuda")
    monkeypatch.delenv("HOST_BYTES")
    with dsv4.load(nano("nano-flash"), device="cuda", threads=1) as model:
        session = model.session()
        session.append(IDS[:1])
        assert live() > before
        del session
    del model
    assert live() <= before
