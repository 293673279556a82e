# SPDX-License-Identifier: Apache-2.0
"""Loaded models for the tests of the Python face, one thread each: the machine may be busy."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dsv4

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def model() -> Iterator[dsv4.Model]:
    """The model inside the package."""
    with dsv4.load(threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def flash(nano: Callable[[str], Path]) -> Iterator[dsv4.Model]:
    """nano-flash: random weights, no tokenizer, a context of a million tokens."""
    with dsv4.load(nano("nano-flash"), threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """script(code, *arguments) runs Python code in a process of its own and returns the result."""

    def run(code: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True,
            timeout=timeout, cwd=ROOT)

    return run
