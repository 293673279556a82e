# SPDX-License-Identifier: Apache-2.0
"""Tensors as objects: codes without copying, numbers equal to what the kernels compute with."""

import ctypes
import gc

import numpy as np
import pytest

import dsv4
from dsv4 import _core
from dsv4 import kernel_calls as calls

MODELS = ("nano-flash", "nano-base", "nano-odd")


@pytest.fixture(scope="module")
def loaded(nano):
    models = {name: dsv4.load(nano(name), threads=1) for name in MODELS}
    yield models
    for model in models.values():
        model.close()


def by_reference(tensor, rows):
    """Some rows of a weight, as the reference kernel multiplies them with single ones."""
    fmt = {"F8_E4M3": "fp8", "F4": "fp4", "BF16": "bf16", "F32": "f32"}[tensor.dtype]
    (address,) = [a for op, name, a, _ in _core.kernel_variants(None)
                  if op == f"linear_few_{fmt}" and name == "ref"]
    scale_type, rule = 0, calls.SCALE_NONE
    if tensor.scale is not None:
        e8m0 = tensor.scale.dtype == "F8_E8M0"
        scale_type = 0 if e8m0 else {"F32": 1, "BF16": 2}[tensor.scale.dtype]
        rule = calls.SCALE_FOLD if e8m0 else calls.SCALE_BLOCK
    n, cols = tensor.shape
    codes = {"fp8": calls.W_FP8, "fp4": calls.W_FP4, "bf16": calls.W_BF16, "f32": calls.W_F32}
    scale = tensor.scale.numpy().ctypes.data if tensor.scale is not None else None
    weight = calls.Weight(
        tensor.numpy().ctypes.data, scale, n, cols, codes[fmt], scale_type, rule)
    scratch = calls.linear_scratch(cols)
    out = np.zeros((cols, len(rows)), np.float32)
    for k in range(cols):
        x = np.zeros(cols, np.uint16)
        x[k] = 0x3F80
        for i, row in enumerate(rows):
            one = np.zeros(n, np.float32)
            args = calls.LinearArgs(
                one.ctypes.data, x.ctypes.data, None, ctypes.pointer(weight),
                scratch.ctypes.data, n, cols, 1, row, row + 1, 1)
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(ctypes.addressof(args))
            out[k, i] = one[row]
    return out.T


@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_of_the_kernels(loaded, name: str) -> None:
    seen = set()
    for tensor in loaded[name].tensors.values():
        if len(tensor.shape) != 2 or not tensor.name.endswith(".weight"):
            continue
        kind = tensor.dtype, tensor.scale.dtype if tensor.scale else None
        if kind in seen or not tensor.name.startswith("layers."):
            continue
        seen.add(kind)
        rows = sorted({0, 1, len(tensor) // 2, len(tensor) - 1})
        want = by_reference(tensor, rows)
        got = tensor.dequantize()
        assert got.shape == tensor.shape and got.dtype == np.float32
        flushed = np.where(np.abs(got[rows]) < 2.0**-55, 0, got[rows])
        assert np.array_equal(flushed, want), tensor
    assert len(seen) > 1


@pytest.mark.parametrize("name", MODELS)
def test_rows(loaded, name: str) -> None:
    """Rows have the numbers they have in the whole tensor, wherever its scales begin."""
    draw = np.random.default_rng(0)
    for tensor in loaded[name].tensors.values():
        whole = tensor.dequantize()
        n = len(tensor)
        for _ in range(3):
            a, b = np.sort(draw.integers(0, n + 1, 2))
            part = tensor[a:b]
            assert part.shape == whole[a:b].shape and len(part) == b - a
            assert np.array_equal(part.dequantize(), whole[a:b], equal_nan=True)
            if b > a + 2:
                assert np.array_equal(part[1:][1:2].dequantize(), whole[a + 2 : a + 3])
        i = int(draw.integers(0, n))
        assert np.array_equal(tensor[i].dequantize(), whole[i])
        assert np.array_equal(tensor[i - n].dequantize(), whole[i])
        assert tensor[0:n].numpy().base is not None  # a view
        assert np.shares_memory(tensor[0:n].numpy(), tensor.numpy())


def test_codes_are_not_copied(loaded) -> None:
    model = loaded["nano-flash"]
    wanted = {"BF16": np.uint16, "F32": np.float32, "F8_E4M3": np.uint8, "F8_E8M0": np.uint8,
              "F4": np.uint8, "I64": np.int64, "I32": np.int32}
    for name, tensor in model.tensors.items():
        codes, raw = tensor.numpy(), model._core.tensor(name)
        assert codes.dtype == wanted[tensor.dtype] and codes.nbytes == tensor.nbytes
        assert np.shares_memory(codes, raw) and not codes.flags.writeable
        assert np.array_equal(codes.reshape(-1).view(np.uint8), raw)
        assert tensor.device == "cpu" and tensor.ndim == len(tensor.shape)
        assert name in repr(tensor)


def test_as_an_array(loaded) -> None:
    tensors = loaded["nano-flash"].tensors
    quantised = tensors["layers.0.attn.wq_a.weight"]
    assert np.array_equal(np.asarray(quantised), quantised.dequantize())
    assert np.asarray(quantised, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="only by copying"):
        np.array(quantised, copy=False)
    exact = tensors["layers.0.hc_attn_base"]
    assert np.shares_memory(np.array(exact, copy=False), exact.numpy())
    assert not np.shares_memory(np.array(exact, copy=True), exact.numpy())
    assert np.array(exact, copy=True).flags.writeable
    (table,) = tensors.match("layers.0.ffn.gate.tid2eid").values()
    assert np.asarray(table).dtype.kind == "i" and np.asarray(table, np.float32).dtype == "f4"


def test_names(loaded) -> None:
    model = loaded["nano-flash"]
    assert len(model.tensors) == len(list(model.tensors)) > 50
    found = model.tensors.match("layers.*.attn.wkv.weight")
    assert len(found) == model.config.num_hidden_layers
    assert not model.tensors.match("nothing*")
    with pytest.raises(KeyError, match=r"layers\.0\.attn\.wq_a\.weight"):
        model.tensors["layers.0.attn.wq_a.weights"]
    for wrong in (7, None, "", "zzz"):
        with pytest.raises(KeyError, match="wanted the name of a tensor"):
            model.tensors[wrong]
    assert "norm.weight" in model.tensors and "norm" not in model.tensors


def test_wrong_rows_and_types(loaded) -> None:
    tensor = loaded["nano-flash"].tensors["layers.0.attn.wq_a.weight"]
    n = len(tensor)
    for row in (n, -n - 1):
        with pytest.raises(IndexError, match=f"got row {row}"):
            tensor[row]
    with pytest.raises(ValueError, match="in steps of 2"):
        tensor[::2]
    with pytest.raises(TypeError):
        tensor["a"]
    with pytest.raises(TypeError, match="wanted float32"):
        tensor.dequantize(np.int8)
    assert tensor[5:5].dequantize().shape == (0, tensor.shape[1])
    assert tensor[9:2].shape == (0, tensor.shape[1])
    with pytest.raises(TypeError, match="no length"):
        len(loaded["nano-flash"].tensors["norm.weight"][0])


def test_outlives_the_model(nano) -> None:
    model = dsv4.load(nano("nano-flash"), threads=1)
    tensor = model.tensors["norm.weight"]
    codes = tensor.numpy()
    want = codes.copy()
    exported = np.from_dlpack(model.tensors["layers.0.hc_attn_base"])
    numbers = exported.copy()
    model.close()
    with pytest.raises(ValueError, match="closed"):
        model.tensors["norm.weight"]
    del model
    gc.collect()
    assert np.array_equal(codes, want) and np.array_equal(tensor.numpy(), want)
    assert np.array_equal(exported, numbers)


def test_dlpack(loaded) -> None:
    tensors = loaded["nano-flash"].tensors
    exact = tensors["layers.0.hc_attn_base"]
    array = np.from_dlpack(exact)
    assert np.shares_memory(array, exact.numpy()) and not array.flags.writeable
    assert exact.__dlpack_device__() == (1, 0)
    packed = tensors["layers.0.ffn.experts.0.w1.weight"]
    assert np.array_equal(np.from_dlpack(packed), packed.numpy())
    for version in (None, (0, 8), (1, 0), (2, 0)):
        assert "dltensor" in repr(exact.__dlpack__(max_version=version))
    for wrong in ({"stream": 1}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError, match="main memory"):
            exact.__dlpack__(**wrong)
    with pytest.raises(ValueError, match="elements of 16 bits"):
        _core.dlpack(b"abc", (1,), 4, 16, True)
    for shape in ((-1, -2), (1 << 62, 1 << 62), (1,) * 9, ("a",)):
        with pytest.raises((ValueError, TypeError)):
            _core.dlpack(b"ab", shape, 4, 16, False)
