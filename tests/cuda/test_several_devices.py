# SPDX-License-Identifier: Apache-2.0
"""Layers split over devices, with kernels and NCCL executed on the CPU: the CPU's bits for every
split, or a refusal that leaves everything as it was."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from steps import assert_same, context_kept, same, same_state
from test_device_experts import each, follow
from test_device_trace import EVERYTHING

import dsv4
from dsv4 import devices, loading
from dsv4.cli import main
from dsv4.config import Config
from dsv4.memory import GPU_SCRATCH

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
IDS = np.random.default_rng(8).integers(0, 256, 400)
Load = Callable[..., dsv4.Model]


@pytest.fixture(autouse=True)
def machine(host_plugin: Path, shared_library: Callable[..., Path],
            monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three devices that were found right before."""
    monkeypatch.setattr(devices, "PLUGIN", host_plugin)
    monkeypatch.setattr(devices, "DRIVER", str(shared_library("driver.c")))
    monkeypatch.setattr(devices, "nccl", lambda: str(host_plugin))
    groups = ("0", "1", "2", "01", "10", "20", "012", "210")
    monkeypatch.setattr(loading, "_checked", {(str(host_plugin), *group) for group in groups})
    monkeypatch.setenv("HOST_DEVICES", "3")
    with context_kept(host_plugin):
        yield


def rooms(sizes: list[int], work: int, ends: tuple[int, ...]) -> str:
    """HOST_BYTES of devices that make the layers end there: twice what each needs."""
    needs = [sum(sizes[a:b]) + work for a, b in zip((0, *ends), ends, strict=False)]
    return ",".join(str(2 * need) for need in needs)


def cuts(layers: int, n: int) -> list[tuple[int, ...]]:
    return [(*cut, layers) for cut in itertools.combinations(range(1, layers), n - 1)]


@pytest.mark.parametrize("ends", [
    pytest.param(ends, marks=[pytest.mark.long] if i not in (1, 4) else [])
    for i, ends in enumerate([*cuts(4, 2), *cuts(4, 3)])])
def test_every_split(
    cpu: dsv4.Model, nano: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch,
    live: Callable[[], int], tmp_path: Path, ends: tuple[int, ...],
) -> None:
    """A prompt, tokens, a batch, a fork, a rewind and a saved session: logits and states."""
    before = live()
    with dsv4.load(nano("nano-flash"), device="cuda", threads=1) as whole:
        (all_of_it,) = whole.stages
    names = "cuda:0,1" if len(ends) == 2 else "cuda:2,1,0"
    sizes = list(dsv4.plan(nano("nano-flash")).layers)
    room = rooms(sizes, all_of_it.work_bytes, ends).split(",")
    monkeypatch.setenv("HOST_BYTES", ",".join(room if len(ends) == 2 else room[::-1]))
    model = dsv4.load(nano("nano-flash"), device=names, threads=2)
    assert tuple(stage.end for stage in model.stages) == ends
    assert [stage.device for stage in model.stages] == ([0, 1] if len(ends) == 2 else [2, 1, 0])
    monkeypatch.setenv("HOST_BYTES", str(1 << 30))  # sessions
    a, b = cpu.session(checkpoints=2), model.session(checkpoints=2)
    for n in (6, 1):
        ids = IDS[a.position:a.position + n]
        assert same(a.append(ids, logits="all"), b.append(ids, logits="all"))
    c, d = a.fork(), b.fork()
    both = cpu.step([(a, [5]), (c, [6, 7])]), model.step([(b, [5]), (d, [6, 7])])
    assert all(same(x, y) for x, y in zip(*both, strict=True))
    assert same_state(a, b) and same_state(c, d)
    a.rewind(6)
    b.rewind(6)
    b.save(tmp_path / "saved")
    e = model.load_session(tmp_path / "saved")
    expected = a.append([9])
    assert same(expected, b.append([9])) and same(expected, e.append([9]))
    assert same_state(a, b) and same_state(a, e)
    del b, d, e, both
    model.close()
    del model
    assert live() <= before


def test_scored_entries_on_the_second_device(
    cpu: dsv4.Model, nano: Callable[[str], Path], tmp_path: Path,
) -> None:
    """Positions where entries are scored and windows of 128 close; nano-pro has two layers."""
    for name in ("nano-flash", "nano-pro"):
        with (dsv4.load(nano(name), device="cpu", threads=1) as one,
              dsv4.load(nano(name), device="cuda:1,0", threads=1) as other):
            a = one.session()
            a.append(IDS[:255], logits="none")
            a.save(tmp_path / name)
            b = other.load_session(tmp_path / name)
            assert same(a.append(IDS[255:257], logits="all"), b.append(IDS[255:257], logits="all"))
            assert same_state(a, b)


@pytest.mark.long
def test_experts_beside_both(
    cpu: dsv4.Model, nano: Callable[[str], Path], live: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each device has some of the experts of its layers.  The others are the host's for few tokens,
    and go to their device for many."""
    before, folder = live(), nano("nano-flash")
    sizes, one = list(dsv4.plan(folder).layers), each(folder)
    with dsv4.load(folder, device="cuda:0,1", threads=1) as whole:
        first, last = (stage.work_bytes for stage in whole.stages)
    last += sum(sizes[1:]) + 50 * one
    for more in range(38, -40, -2):  # the first device shrinks until experts are missing there
        monkeypatch.setenv("HOST_BYTES", f"{first + sizes[0] + more * one},{1 << 30}")
        model = dsv4.load(folder, device="cuda:0,1", threads=2, gpu_memory=last)
        if model.stages[0].weight_bytes < sizes[0] - one:
            break
        model.close()
    monkeypatch.setenv("HOST_BYTES", str(1 << 30))  # sessions
    with model:
        assert [stage.end for stage in model.stages] == [1, 4]
        for stage, size, n in zip(model.stages, (sizes[0], sum(sizes[1:])), (8, 24), strict=True):
            assert 0 < (size - stage.weight_bytes) // one < n
        follow(cpu, model, (1, 1, 24, 1))
    del model, whole
    assert live() == before


@pytest.mark.parametrize("on_device", [pytest.param(False, marks=pytest.mark.long), True])
def test_traces_of_all_stages(
    cpu: dsv4.Model, nano: Callable[[str], Path], on_device: bool
) -> None:
    """On the host, and left where each stage has its part."""
    with dsv4.load(nano("nano-flash"), device="cuda:2,0", threads=1) as model:
        traces = []
        for m in (cpu, model):
            t = dsv4.Trace(m, **EVERYTHING, logits="all", nll=True,
                           device=on_device and m is model)
            session = m.session()
            for first, end in ((0, 5), (5, 6)):
                session.append(IDS[first:end], trace=t)
            traces.append(t)
        assert_same(*traces)
        if on_device:
            assert {array.device for array in traces[1].streams.values()} == {"cuda:2", "cuda:0"}


def test_generated_tokens(cpu: dsv4.Model, nano: Callable[[str], Path]) -> None:
    with dsv4.load(nano("nano-flash"), device="cuda:0,1", threads=1) as model:
        ids = [int(i) for i in IDS[:4]]
        same_tokens = cpu.generate(ids, max_new_tokens=3, temperature=0).tokens
        assert model.generate(ids, max_new_tokens=3, temperature=0).tokens == same_tokens


def test_names(nano: Callable[[str], Path]) -> None:
    with dsv4.load(nano("nano-flash"), device="cuda:1", threads=1) as model:
        assert model.device == "cuda:1" and "cuda:1, 1 thread" in repr(model)
        assert [(s.device, s.first, s.end) for s in model.stages] == [(1, 0, 4)]
    with dsv4.load(nano("nano-flash"), device="cuda:2,0", threads=1) as model:
        assert model.device == "cuda:2,0"
        assert all(f"GPU {s.device}  " in repr(model) and str(s) in repr(model)
                   for s in model.stages)
        assert str(model.stages[0]).startswith("layers 0 to ")


@pytest.mark.parametrize("name", [
    "cuda:", "cuda:-1", "cuda:a", "cuda:0,", "cuda:,1", "cuda: 0", "cuda:0;1", "CUDA:0", "cuda:0-1",
    "gpu:0", "cuda:12345", "cuda:٣", 0, None, ("cuda", 0), "cuda:0\n",
])
def test_names_of_none(name: object) -> None:
    for call in (lambda: dsv4.load(device=name), lambda: dsv4.plan(Config.from_json(
            dsv4.nano.CONFIG), context=64, device=name)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="^device: got .*, wanted .*'cuda:0,1'$") as caught:
            call()
        assert repr(name) in str(caught.value)


def test_numbers_that_are_not_there(nano: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="device: got GPU 1 twice in 'cuda:1,0,1', wanted each"):
        dsv4.load(device="cuda:1,0,1")
    for name, number in (("cuda:3", 3), ("cuda:0,1,77", 77)):
        with pytest.raises(dsv4.BackendUnavailable, match=f"CUDA: device {number}: there is no such"
                           " one among 3 GPUs, 0 to 2; .*CUDA_VISIBLE_DEVICES"):
            dsv4.load(device=name)
    with pytest.raises(ValueError, match="got 3 GPUs, wanted 1 to 2: each has at least one of the"):
        dsv4.load(nano("nano-pro"), device="cuda:0,1,2")


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "a", "--device", "cuda:x"])
    assert "got 'cuda:x', wanted 'auto', 'cpu', 'cuda'" in capsys.readouterr().err
    assert main(["generate", "a", "--device", "cuda:9", "--max-new-tokens", "1"]) == 1
    assert "CUDA: device 9" in capsys.readouterr().err
    assert main(["info", "--device", "cuda:0,1"]) == 0
    assert "weights of GPU 1: layers " in capsys.readouterr().out


# ---- NCCL ----

def refused(says: str, error: type[Exception] = dsv4.BackendUnavailable) -> str:
    with pytest.raises(error, match=says) as caught:
        dsv4.load(device="cuda:0,1", threads=1)
    message = str(caught.value)
    assert message.startswith("NCCL: ") and "; " in message and "\n" not in message
    return message


def test_without_nccl(monkeypatch: pytest.MonkeyPatch, shared_library: Callable[..., Path],
                      live: Callable[[], int], nano: Callable[[str], Path], tmp_path: Path) -> None:
    """One device never asks for it."""
    before = live()
    monkeypatch.setattr(devices, "nccl", lambda: "libnccl-of-no-machine.so.2")
    assert "nvidia-nccl-cu13" in refused("cannot be loaded: libnccl-of-no-machine.so.2: .*; instal")
    dsv4.load(nano("nano-flash"), device="cuda:1", threads=1).close()
    (tmp_path / "libnccl.so.2").write_text("not a library")
    monkeypatch.setattr(devices, "nccl", lambda: str(tmp_path / "libnccl.so.2"))
    refused("cannot be loaded: .*; install it")
    monkeypatch.setattr(devices, "nccl", lambda: str(shared_library("driver.c")))
    refused("has no ncclGetVersion, so it is no NCCL that dsv4 can use; install")
    assert live() == before


@pytest.mark.parametrize(("version", "right"), [
    (0, False), (2708, False), (21399, False), (21400, True), (23203, True), (30000, False)])
def test_versions(monkeypatch: pytest.MonkeyPatch, nano: Callable[[str], Path], version: int,
                  right: bool) -> None:
    monkeypatch.setenv("HOST_NCCL_VERSION", str(version))
    if right:
        dsv4.load(nano("nano-flash"), device="cuda:0,1", threads=1).close()
    else:
        refused(f"got version code {version}, wanted one from 21400 .*; install")


@pytest.mark.parametrize("call", [
    "ncclGetVersion", "ncclCommInitAll", "ncclGroupStart", "ncclSend", "ncclRecv", "ncclGroupEnd",
    "ncclCommGetAsyncError", "ncclAsyncError"])
@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 7, 8, 99])
def test_every_error_of_nccl(
    monkeypatch: pytest.MonkeyPatch, live: Callable[[], int], call: str, code: int
) -> None:
    """While a model is loaded."""
    before = live()
    monkeypatch.setenv("HOST_FAIL", f"{call}:1:{code}")
    refused(f"got error {code}, as the test of NCCL wants it; ",
            dsv4.BackendUnavailable if code == 2 else dsv4.DeviceError)
    assert live() == before


@pytest.mark.long
def test_bytes_that_arrive_changed(monkeypatch: pytest.MonkeyPatch,
                                   live: Callable[[], int]) -> None:
    """In the first copy; and in a step of the model inside the package, before any is loaded."""
    before = live()
    monkeypatch.setenv("HOST_FAIL", "ncclFlip:1:1")
    refused("bytes arrive changed .*; set NCCL_P2P_DISABLE=1", dsv4.DeviceError)
    known = {group for group in loading._checked if len(group) == 2}
    monkeypatch.setattr(loading, "_checked", known)
    monkeypatch.setenv("HOST_FAIL", "ncclFlip:3:1")
    with pytest.raises(dsv4.DeviceError, match="devices 0, 1 together give other numbers than the"):
        dsv4.load(device="cuda:0,1", threads=1)
    assert live() == before


# ---- failures ----

@pytest.mark.parametrize(("call", "nth", "code"), [
    ("stream_create", 2, 2), ("free_bytes", 5, 999), ("allocate", 1, 2), ("allocate", 2, 2),
    ("allocate", 3, 2), ("allocate", 4, 2), ("allocate", 5, 2), ("allocate", 6, 2),
    ("upload", 2, 700), ("upload", 3, 700), ("upload", 200, 700), ("download", 1, 719),
    ("stream_done", 1, 719), ("stream_done", 4, 719), ("synchronize", 2, 214), ("prepare", 6, 999),
    ("prepare", 12, 999),
])
def test_a_failing_load_gives_everything_back(
    nano: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, live: Callable[[], int],
    call: str, nth: int, code: int,
) -> None:
    before = live()
    monkeypatch.setenv("HOST_FAIL", f"{call}:{nth}:{code}")
    with pytest.raises((dsv4.DeviceError, MemoryError), match=f"error {code}"):
        dsv4.load(nano("nano-flash"), device="cuda:0,1", threads=1)
    assert live() == before


@pytest.mark.parametrize(("call", "nth", "code"), [
    ("upload", 1, 700), ("upload", 2, 700), ("download", 1, 719), ("download", 2, 719),
    ("stream_done", 1, 214), ("stream_done", 3, 214), ("attention", 1, 1), ("attention", 3, 719),
    ("ncclGroupStart", 1, 1), ("ncclSend", 1, 1), ("ncclRecv", 1, 2), ("ncclGroupEnd", 1, 3),
    ("ncclAsyncError", 2, 6), ("ncclCommGetAsyncError", 1, 4),
])
def test_a_failing_step(
    nano: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, live: Callable[[], int],
    call: str, nth: int, code: int,
) -> None:
    """The session is as it was, the model says at once that it is lost, and gives all back."""
    before = live()
    model = dsv4.load(nano("nano-flash"), device="cuda:0,1", threads=1)
    session = model.session()
    session.append(IDS[:2])
    fixed = session._core.fixed().copy()
    monkeypatch.setenv("HOST_FAIL", f"{call}:{nth}:{code}")
    for _ in range(2):
        with pytest.raises((dsv4.DeviceError, dsv4.BackendUnavailable), match=f"error {code}"):
            session.append(IDS[2:4])
        monkeypatch.delenv("HOST_FAIL", raising=False)
    assert session.position == 2 and np.array_equal(fixed, session._core.fixed())
    del session
    model.close()
    del model
    assert live() == before


def test_too_little_memory_for_a_session(
    cpu: dsv4.Model, nano: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On each device: the step fails, the next one goes on from there."""
    with dsv4.load(nano("nano-flash"), device="cuda:0,1", threads=1) as model:
        a, b = cpu.session(), model.session()
        for nth in range(1, 20):
            monkeypatch.setenv("HOST_FAIL", f"allocate:{nth}:2")
            try:
                logits = b.append(IDS[:3])
                break
            except MemoryError as error:
                assert "error 2" in str(error) and b.position == 0
        assert nth > 4
        assert same(a.append(IDS[:3]), logits) and same_state(a, b)


# ---- plans ----

def test_plans_of_several_devices(nano: Callable[[str], Path], capsys: pytest.CaptureFixture[str],
                                  ) -> None:
    """What a plan says is what a load does where devices are equally large."""
    needs = dsv4.plan(nano("nano-flash"), context=64, device="cuda:2,0")
    with dsv4.load(nano("nano-flash"), device="cuda:2,0", threads=1) as model:
        assert [(s.device, s.first, s.end) for s in model.stages] == [
            (s.device, s.first, s.end) for s in needs.stages]
        for real, planned in zip(model.stages, needs.stages, strict=True):
            assert 0 <= real.weight_bytes - planned.weight_bytes < planned.weight_bytes // 8
    assert sum(needs.layers) == needs.weight_bytes - needs.weights["draft"]
    assert "weights of GPU 2: layers 0 to " in str(needs)
    assert json.loads(json.dumps(needs.as_dict()))["stages"][1]["device"] == 0
    assert needs.places["gpu"]["workspace"] == 2 * (needs.workspace + GPU_SCRATCH)
    with pytest.raises(ValueError, match="device: got 5 GPUs, wanted at most 4"):
        dsv4.plan(nano("nano-flash"), context=64, device="cuda:0,1,2,3,4")
    assert dsv4.plan(nano("nano-flash"), context=64).stages == ()


def test_splits_are_as_even_as_can_be() -> None:
    """Against all splits there are."""
    random = np.random.default_rng(3)
    for _ in range(60):
        sizes = [int(x) for x in random.integers(1, 1000, random.integers(2, 8))]
        n = int(random.integers(1, min(4, len(sizes)) + 1))
        free, each = [int(x) for x in random.integers(0, 5000, n)], int(random.integers(0, 500))

        def fullest(ends: tuple[int, ...], sizes: list[int] = sizes, free: list[int] = free,
                    each: int = each) -> float:
            return max((sum(sizes[a:b]) + each) / (room + 1)
                       for a, b, room in zip((0, *ends), ends, free, strict=False))

        got = tuple(dsv4._core.split(sizes, each, free))
        assert got in cuts(len(sizes), n)
        assert fullest(got) <= min(map(fullest, cuts(len(sizes), n))) * (1 + 1e-9)
