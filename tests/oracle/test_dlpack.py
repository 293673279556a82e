# SPDX-License-Identifier: Apache-2.0
"""Tensors through DLPack: torch sees the same numbers in the same memory."""

import numpy as np
import pytest

import dsv4

pytestmark = pytest.mark.oracle


def test_torch_reads_the_weights_where_they_lie(nano) -> None:
    import torch

    wanted = {
        "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
        "F32": torch.float32, "F4": torch.uint8, "I64": torch.int64, "I32": torch.int32,
    }
    with dsv4.load(nano("nano-flash"), threads=1) as model:
        seen = set()
        for tensor in model.tensors.values():
            if tensor.dtype in seen:
                continue
            seen.add(tensor.dtype)
            got = torch.from_dlpack(tensor)
            assert got.dtype == wanted[tensor.dtype], tensor
            assert tuple(got.shape) == tensor.numpy().shape
            assert got.data_ptr() == tensor.numpy().ctypes.data
            if tensor.dtype in ("BF16", "F32", "F8_E8M0"):
                assert np.array_equal(got.float().numpy(), tensor.dequantize())
            elif tensor.dtype == "F8_E4M3":
                codes = dsv4.Tensor("codes", "F8_E4M3", tensor.shape, tensor._data)
                assert np.array_equal(got.float().numpy(), codes.dequantize())
        assert seen >= {"BF16", "F8_E4M3", "F8_E8M0", "F32", "F4"}
        kept = torch.from_dlpack(model.tensors["norm.weight"])
        want = model.tensors["norm.weight"].dequantize().copy()
    assert np.array_equal(kept.float().numpy(), want)  # it keeps the mapping
