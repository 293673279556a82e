# SPDX-License-Identifier: Apache-2.0
"""Every variant of a kernel as a test parameter; the calls themselves are `dsv4.kernel_calls`."""

from typing import Any

import numpy as np

from dsv4.kernel_calls import *  # noqa: F403
from dsv4.kernel_calls import variants


def each_variant(*ops: str, restype: Any = None) -> list[Any]:
    """`variants` of several operations as pytest parameters with readable ids."""
    import pytest

    return [pytest.param(v, id=repr(v)) for op in ops for v in variants(op, restype)]


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> nearest bf16 as uint16 (finite values)."""
    u = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """uint16 bf16 bits -> float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)
