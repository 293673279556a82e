# SPDX-License-Identifier: Apache-2.0
"""Traces that stay on the device, weights there, and what DLPack hands out, with the plugin's
kernels executed on the CPU: the device's memory is the host's, so that a consumer can be played."""

import ctypes
import gc
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steps import assert_same

import dsv4

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
HOST_ALONE = True  # the consumer reads the device's memory
IDS = np.random.default_rng(7).integers(0, 256, 600)
EVERYTHING = dict.fromkeys(
    ("router", "indexer", "streams", "streams_in", "streams_mid", "kv", "heads", "hyper",
     "sublayers"), True)


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)), ("flags", ctypes.c_uint64),
        ("tensor", DLTensor))


class Managed(ctypes.Structure):
    _fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p),
                ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)))


api = ctypes.pythonapi
api.PyCapsule_GetPointer.restype = ctypes.c_void_p
api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
api.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
api.PyCapsule_IsValid.argtypes = [ctypes.py_object, ctypes.c_char_p]
USED = b"used_dltensor"  # capsules keep the pointer


class Consumer:
    """A library on the other side: takes a capsule over, looks at it, gives it back once."""

    def __init__(self, array: Any, **asked: Any) -> None:
        asked = {"max_version": (1, 1)} | asked
        capsule = array.__dlpack__(**asked)
        versioned = bool(api.PyCapsule_IsValid(capsule, b"dltensor_versioned"))
        name, form = ((b"dltensor_versioned", Versioned) if versioned else (b"dltensor", Managed))
        self.address = api.PyCapsule_GetPointer(capsule, name)
        self.managed = form.from_address(self.address)
        api.PyCapsule_SetName(capsule, USED)
        del capsule  # nothing goes with it
        gc.collect()
        t = self.tensor = self.managed.tensor
        self.shape, self.strides = t.shape[: t.ndim], t.strides[: t.ndim]
        self.dtype = t.code, t.bits, t.lanes

    def numpy(self, dtype: Any) -> np.ndarray:
        size = np.dtype(dtype).itemsize
        count = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        held = (ctypes.c_uint8 * (count * size)).from_address(self.tensor.data)
        flat = np.frombuffer(held, np.uint8).view(dtype)
        return np.lib.stride_tricks.as_strided(flat, self.shape, [s * size for s in self.strides])

    def done(self) -> None:
        self.managed.deleter(self.address)


def test_every_site_stays(cpu: dsv4.Model, gpu: dsv4.Model) -> None:
    """The arrays of a trace on the host; they grow, and views stay as they are."""
    traces = []
    for model in (cpu, gpu):
        t = dsv4.Trace(model, **EVERYTHING, logits="all", nll=True, device=model is gpu)
        session = model.session()
        session.append(IDS[:3], trace=t)
        early = t.streams[2]
        session.append(IDS[3:4], trace=t)
        session.append(IDS[4:9], trace=t)
        traces.append((t, early))
    (host, early_host), (device, early) = traces
    assert_same(host, device)
    assert isinstance(early, dsv4.DeviceArray) and early.shape == early_host.shape
    assert np.array_equal(early, early_host)
    assert np.array_equal(device.lens(3, slice(0, 2)), host.lens(3, slice(0, 2)))
    assert "on the GPU" in repr(device) and device.nbytes == host.nbytes
    assert repr(early).endswith("float32 [3, 4, 256] on cuda:0>")


def test_scores_widen(cpu: dsv4.Model, gpu: dsv4.Model, tmp_path: Path) -> None:
    """Rows get longer with the entries there are; other sessions beside are traced otherwise."""
    a = cpu.session()
    a.append(IDS[:254], logits="none")
    a.save(tmp_path / "s")
    traces = []
    for model, far in ((cpu, a), (gpu, gpu.load_session(tmp_path / "s"))):
        t = dsv4.Trace(model, indexer=True, kv=True, device=model is gpu)
        u = dsv4.Trace(model, indexer=True, router=True)
        beside = model.session()
        for first, end in ((254, 255), (255, 257)):
            model.step([(beside, IDS[first:end], u), (far, IDS[first:end], t)])
        traces.append((t, u))
    for one, other in zip(*traces, strict=True):
        assert_same(one, other)
    scores = traces[1][0].indexer[min(traces[1][0].indexer)].scores
    assert scores.strides[0] >= scores.shape[1] == 64


def test_what_dlpack_says_of_a_trace(gpu: dsv4.Model, live: Callable[[], int]) -> None:
    with gpu.trace(IDS[:4], streams=[1], router=[2], device=True) as t:
        streams, experts = t.streams[1], t.router[2].experts
    assert streams.__dlpack_device__() == (2, 0) and not streams.read_only
    taken = Consumer(streams)
    assert (taken.managed.major, taken.managed.minor, taken.managed.flags) == (1, 1, 0)
    assert (taken.tensor.device_type, taken.tensor.device, taken.tensor.byte_offset) == (2, 0, 0)
    assert taken.dtype == (2, 32, 1) and taken.tensor.data % 256 == 0
    assert (taken.shape, taken.strides) == ([4, 4, 256], [1024, 256, 1])
    assert np.array_equal(taken.numpy(np.float32), streams)
    row = Consumer(streams[3])
    assert (row.shape, row.tensor.data) == ([4, 256], taken.tensor.data + 4 * 3 * 1024)
    old = Consumer(experts[1:3], max_version=None)
    assert isinstance(old.managed, Managed) and old.dtype == (0, 32, 1)
    assert np.array_equal(old.numpy(np.int32), experts.numpy()[1:3])
    del t, streams, experts
    held = live()
    taken.done()
    assert live() == held  # another one of the same memory
    row.done()
    assert live() < held
    held = live()
    old.done()
    assert live() < held


def test_a_capsule_that_nobody_takes(gpu: dsv4.Model, live: Callable[[], int]) -> None:
    with gpu.trace(IDS[:2], streams=[1], device=True) as t:
        array = t.streams[1]
    del t
    capsules = [array.__dlpack__(max_version=v) for v in (None, (0, 8), (1, 0))]
    assert "dltensor_versioned" in repr(capsules[2]) and '"dltensor"' in repr(capsules[1])
    held = live()
    del array
    assert live() == held
    del capsules
    assert live() == held - 2 * 4 * 4 * 256


@pytest.mark.parametrize(("name", "dtype", "code"), [
    ("layers.0.ffn.experts.1.w1.weight", "uint8", (1, 8, 1)),
    ("layers.0.ffn.experts.1.w1.scale", "float8_e8m0fnu", (14, 8, 1)),
    ("layers.1.attn.wq_b.weight", "float8_e4m3fn", (10, 8, 1)),
    ("layers.1.ffn.gate.weight", "bfloat16", (4, 16, 1)),
    ("head.weight", "bfloat16", (4, 16, 1)),
    ("layers.0.hc_attn_fn", "float32", (2, 32, 1)),
])
def test_weights(gpu: dsv4.Model, name: str, dtype: str, code: tuple[int, ...]) -> None:
    """The codes of the host, read-only, also of some rows."""
    tensor = gpu.tensors[name]
    array = tensor.on_device()
    assert array.dtype == dtype and array.read_only
    assert array.numpy().dtype == tensor.numpy().dtype
    assert np.array_equal(array.numpy(), tensor.numpy())
    taken, rows = Consumer(array), Consumer(tensor[3:7].on_device())
    assert taken.dtype == code and taken.managed.flags == 1
    assert np.array_equal(rows.numpy(tensor.numpy().dtype), tensor.numpy()[3:7])
    assert rows.tensor.data == taken.tensor.data + 3 * array.strides[0] * array.itemsize
    with pytest.raises(BufferError, match="read-only"):
        array.__dlpack__()
    copy = Consumer(array, copy=True, stream=2, max_version=(1, 0))
    assert copy.managed.flags == 2 and copy.tensor.data != taken.tensor.data
    assert np.array_equal(copy.numpy(tensor.numpy().dtype), tensor.numpy())
    for consumer in (taken, rows, copy, Consumer(array, copy=True, max_version=None)):
        consumer.done()


def test_weights_that_are_not_there(cpu: dsv4.Model, gpu: dsv4.Model) -> None:
    with pytest.raises(ValueError, match=r"norm.weight: is not in the memory .* float32"):
        gpu.tensors["norm.weight"].on_device()
    with pytest.raises(ValueError, match="draft heads on the host"):
        gpu.tensors["mtp.0.e_proj.weight"].on_device()
    with pytest.raises(ValueError, match="this model runs on the CPU"):
        cpu.tensors["head.weight"].on_device()


def test_to_the_host(gpu: dsv4.Model) -> None:
    with gpu.trace(IDS[:3], streams=[1], device=True) as t:
        array = t.streams[1]
    there = Consumer(array, dl_device=(1, 0))
    assert (there.tensor.device_type, there.tensor.device) == (1, 0)
    assert np.array_equal(there.numpy(np.float32), array.numpy())
    there.done()
    assert np.array_equal(np.from_dlpack(array, device="cpu"), array.numpy())
    assert np.asarray(array, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="only by copying"):
        np.asarray(array, copy=False)
    with pytest.raises(TypeError, match="NumPy has no bfloat16"):
        np.asarray(gpu.tensors["head.weight"].on_device())


@pytest.mark.parametrize(("asked", "error", "text"), [
    ({"stream": 0}, ValueError, "stream: got 0, wanted 1"),
    ({"stream": -2}, ValueError, "stream: got -2"),
    ({"stream": "1"}, TypeError, "stream: got '1', wanted an int or None"),
    ({"stream": True}, TypeError, "stream: got True"),
    ({"dl_device": (2, 1)}, BufferError, r"got device \(2, 1\), wanted \(2, 0\)"),
    ({"dl_device": (10, 0)}, BufferError, "got device"),
    ({"dl_device": (1, 0), "copy": False}, BufferError, "only by copying"),
])
def test_refused_exports(
    gpu: dsv4.Model, live: Callable[[], int], asked: dict[str, Any], error: type[Exception],
    text: str,
) -> None:
    with gpu.trace(IDS[:1], streams=[1], device=True) as t:
        array, held = t.streams[1], live()
        with pytest.raises(error, match=text):
            array.__dlpack__(max_version=(1, 0), **asked)
        assert live() == held
    for stream in (None, -1, 1, 2, 1 << 40):
        Consumer(array, stream=stream).done()
    for wrong, kind in ((slice(0, 1, 2), ValueError), (1, IndexError), (-2, IndexError)):
        with pytest.raises(kind, match="got row"):
            array[wrong]


def test_a_stream_waits_for_a_copy(
    gpu: dsv4.Model, host_plugin: Path, live: Callable[[], int], monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An event stands between the copy and the consumer's stream; without a stream the call waits;
    what fails is given back."""
    waits = ctypes.CDLL(str(host_plugin)).host_waits
    waits.argtypes = [ctypes.c_void_p]
    with gpu.trace(IDS[:1], streams=[1], device=True) as t:
        array = t.streams[1]
    held, before = live(), [waits(stream) for stream in (1, 2, 1 << 40)]
    for stream in (None, 2, 1 << 40, -1):
        Consumer(array, copy=True, stream=stream).done()
        Consumer(array, stream=stream).done()  # complete: nobody has to wait
    assert [waits(stream) for stream in (1, 2, 1 << 40)] == [n + 1 for n in before]
    assert live() == held
    for call in ("event_record", "event_wait", "copy", "stream_create", "event_create"):
        monkeypatch.setenv("HOST_FAIL", f"{call}:1:700")
        with pytest.raises(dsv4.DeviceError, match="error 700"):
            array.__dlpack__(copy=True, stream=1 << 40)
        assert live() == held
    monkeypatch.setenv("HOST_FAIL", "event_record:1:700")
    Consumer(array, copy=True, stream=-1).done()
    monkeypatch.setenv("HOST_FAIL", "synchronize:1:700")
    with pytest.raises(dsv4.DeviceError, match="error 700"):
        array.__dlpack__(copy=True, stream=-1)
    assert live() == held
    monkeypatch.delenv("HOST_FAIL")
    gpu.session().append([1])  # the model goes on: it was the call's fault


def test_after_close(nano: Callable[[str], Path], host_device: None,
                     live: Callable[[], int]) -> None:
    """Weights and traces stay as long as somebody holds them, and go with the last one."""
    before = live()
    model = dsv4.load(nano("nano-flash"), device="cuda", threads=1)
    with model.trace(IDS[:3], streams=[1], device=True) as t:
        streams, wanted = t.streams[1], t.streams[1].numpy()
    weight = model.tensors["layers.1.ffn.gate.weight"]
    array, codes = weight.on_device(), weight.numpy().copy()
    taken = [Consumer(streams), Consumer(array)]
    model.close()
    with pytest.raises(ValueError, match="closed"):
        weight.on_device()
    assert np.array_equal(streams.numpy(), wanted) and np.array_equal(array.numpy(), codes)
    del model, t, weight, streams, array
    gc.collect()
    assert np.array_equal(taken[0].numpy(np.float32), wanted)
    assert np.array_equal(taken[1].numpy(np.uint16), codes)
    assert live() > before
    taken[0].done()
    taken[1].done()
    assert live() == before


def test_beside_a_running_step(gpu: dsv4.Model) -> None:
    """Exports, copies and downloads while another thread steps: nobody waits for the other, and
    what is read is complete."""
    with gpu.trace(IDS[:2], streams=[1], device=True) as t:
        array, wanted = t.streams[1], t.streams[1].numpy()
    session, more = gpu.session(), dsv4.Trace(gpu, streams=[1], device=True)
    steps = threading.Thread(target=lambda: [
        session.append(IDS[i:i + 2], trace=more) for i in (0, 2)])
    steps.start()
    rounds = 0
    while steps.is_alive():
        taken = Consumer(array, copy=bool(rounds % 2), stream=2)
        assert np.array_equal(taken.numpy(np.float32), wanted)
        taken.done()
        assert np.array_equal(array.numpy(), wanted)
        rounds += 1
    steps.join()
    assert rounds > 1 and len(more) == 4
    assert np.array_equal(more.streams[1].numpy()[:2], wanted)


def test_refused_traces(cpu: dsv4.Model, gpu: dsv4.Model, tmp_path: Path,
                        monkeypatch: pytest.MonkeyPatch, used: Callable[[], int]) -> None:
    with pytest.raises(ValueError, match="this model runs on the CPU"):
        dsv4.Trace(cpu, streams=[1], device=True)
    with pytest.raises(TypeError, match="device: got 1"):
        dsv4.Trace(gpu, streams=[1], device=1)
    with pytest.raises(ValueError, match="attention: its weights are computed on the CPU"):
        dsv4.Trace(gpu, attention=[1], device=True)
    with pytest.raises(ValueError, match="out: got a folder with device=True"):
        dsv4.Trace(gpu, streams=[1], device=True, out=tmp_path / "t")
    t, session = dsv4.Trace(gpu, streams=[1], device=True), gpu.session()
    with pytest.raises(ValueError, match="in a step with an edited session"):
        edit = gpu.edit(dsv4.edit.AblateHeads(1, [0]))
        gpu.step([(session, [1], t), (gpu.session(edit=edit), [2])])
    with pytest.raises(ValueError, match="in a step that traces weights of attention"):
        gpu.step([(session, [1], t), (gpu.session(), [2], dsv4.Trace(gpu, attention=[1]))])
    assert (session.position, len(t)) == (0, 0) and t.streams[1].shape == (0, 4, 256)
    monkeypatch.setenv("HOST_BYTES", str(used() + 1000))
    with pytest.raises(MemoryError, match="2 tokens need 8,192 bytes .* free on cuda:0"):
        session.append([1, 2], trace=t)
    monkeypatch.delenv("HOST_BYTES")
    assert (session.position, len(t)) == (0, 0)
    session.append([1], trace=t)
    assert t.streams[1].shape == (1, 4, 256)


def test_a_failing_step(gpu: dsv4.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was traced stays, what failed adds nothing."""
    session, t = gpu.session(), dsv4.Trace(gpu, streams=[1], device=True)
    session.append(IDS[:2], trace=t)
    before = t.streams[1].numpy()
    monkeypatch.setenv("HOST_FAIL", "attention:3:2")
    with pytest.raises(MemoryError):
        session.append(IDS[2:4], trace=t)
    monkeypatch.delenv("HOST_FAIL")
    assert np.array_equal(t.streams[1], before)
    session.append(IDS[2:4], trace=t)
    with gpu.trace(IDS[:4], streams=[1]) as whole:
        assert np.array_equal(t.streams[1], whole.streams[1])


def test_references(gpu: dsv4.Model) -> None:
    array = gpu.tensors["head.weight"].on_device()
    memory, counts = array._memory, []
    for _ in range(3):
        Consumer(array).done()
        counts.append(sys.getrefcount(memory))
    assert len(set(counts)) == 1
