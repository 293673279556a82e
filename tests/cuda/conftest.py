# SPDX-License-Identifier: Apache-2.0
"""Shared libraries compiled for the tests."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def shared_library(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(file of stubs/, macros) -> the library it makes, compiled once."""
    made: dict[tuple[str, ...], Path] = {}

    def compiled(source: str, *macros: str) -> Path:
        if (source, *macros) not in made:
            target = tmp_path_factory.mktemp("stub") / f"{Path(source).stem}.so"
            subprocess.run(
                ["gcc", "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Werror", "-shared", "-fPIC",
                 f"-I{ROOT / 'kernels'}", *(f"-D{macro}" for macro in macros),
                 str(ROOT / "tests" / "cuda" / "stubs" / source), "-o", str(target)], check=True)
            made[source, *macros] = target
        return made[source, *macros]

    return compiled
