# SPDX-License-Identifier: Apache-2.0
"""Loaded models for the tests of the Python face, one thread each: the machine may be busy."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import dsv4
from dsv4 import loading
from dsv4.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
SMALL_PASS = 40
NAN_ID = 77


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


def load_small(folder: Path) -> dsv4.Model:
    """With passes of 40 tokens."""
    options = loading._options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_options", lambda *a: options(*a) | {"chunk_tok": SMALL_PASS})
        return dsv4.load(folder, threads=1)


@pytest.fixture(scope="session")
def small(nano: Callable[[str], Path]) -> Iterator[dsv4.Model]:
    """nano-flash with passes of 40 tokens."""
    with load_small(nano("nano-flash")) as model:
        yield model


@pytest.fixture(scope="session")
def poisoned(
    nano: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dsv4.Model]:
    """The same with NaN in the embedding of id 77."""
    folder = tmp_path_factory.mktemp("poisoned") / "m"
    shutil.copytree(nano("nano-flash"), folder)
    with Checkpoint.open(folder) as checkpoint:
        info = checkpoint.tensors["embed.weight"]
        path = checkpoint.shards[info.shard].path
    data = np.memmap(path, np.uint8, "r+", info.offset, info.nbytes)
    data.view(np.uint16).reshape(info.shape)[NAN_ID, 5] = 0x7FC0
    data.flush()
    with load_small(folder) as model:
        yield model


@pytest.fixture(scope="session")
def script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """script(code, *arguments) runs Python code in a process of its own and returns the result."""

    def run(code: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True,
            timeout=timeout, cwd=ROOT)

    return run
