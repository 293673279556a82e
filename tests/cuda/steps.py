# SPDX-License-Identifier: Apache-2.0
"""What tests of steps on the device need and compare."""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsv4
from dsv4 import devices


def require_device() -> None:
    """Tests that need one fail without it: they were asked for."""
    state = devices.find().state
    if state != "ready":
        pytest.fail(f"no CUDA device can be used: {state}", pytrace=False)


SOMEBODYS = 0x1234560  # a context that is current before we come: of torch, of CuPy


def set_context(plugin: Path, context: int | None) -> None:
    """What the thread has current, with the host's plugin."""
    ctypes.CDLL(str(plugin)).host_set_context(ctypes.c_void_p(context))


@contextlib.contextmanager
def context_kept(plugin: Path) -> Iterator[None]:
    """The thread has somebody's context current, and has it still at the end."""
    current = ctypes.CDLL(str(plugin)).host_context
    current.restype = ctypes.c_void_p
    set_context(plugin, SOMEBODYS)
    yield
    left = current()
    set_context(plugin, None)
    assert left == SOMEBODYS, "the thread's current context was not restored"


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def same_state(a: dsv4.Session, b: dsv4.Session) -> bool:
    """Rings, and the compressed and index rows of every layer."""
    if a.position != b.position or not np.array_equal(a._core.fixed(), b._core.fixed()):
        return False
    config = a.model.config
    for layer in range(config.num_hidden_layers):
        ratio = config.compress_ratios[layer]
        for kind in (1, 2)[:0 if ratio == 0 else 2 if ratio == 4 else 1]:
            wanted = (layer, kind, 0, a.position // ratio)
            if not np.array_equal(a._core.rows(*wanted), b._core.rows(*wanted)):
                return False
    return True


def flat(value: Any, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a trace by name, on the host."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from flat(part, f"{name}.{key}")
    else:
        yield name, np.asarray(value)


def assert_same(a: dsv4.Trace, b: dsv4.Trace) -> None:
    one, other = dict(flat(a.to_dict())), dict(flat(b.to_dict()))
    assert one.keys() == other.keys() and len(one) > 3
    for name, array in one.items():
        assert array.dtype == other[name].dtype and array.shape == other[name].shape, name
        assert array.tobytes() == other[name].tobytes(), name
