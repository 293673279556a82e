# SPDX-License-Identifier: Apache-2.0
"""Models for the engine's tests, loaded once per run."""

from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import pytest

import dsv4


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `harness.TINY`.  Do not write into it."""
    return harness.make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Iterator[dsv4.Model]:
    """It, loaded with one thread: so small a model gains nothing from a team."""
    with harness.load(tiny_folder) as model:
        yield model


@pytest.fixture(scope="session")
def models(nano: Callable[[str], Path]) -> Iterator[Callable[..., dsv4.Model]]:
    """models("nano-flash", "official") -> that checkpoint, loaded with one thread."""
    loaded: dict[tuple[str, str], dsv4.Model] = {}

    def model(name: str, numerics: str = "official") -> dsv4.Model:
        if (name, numerics) not in loaded:
            loaded[name, numerics] = harness.load(nano(name), numerics=numerics)
        return loaded[name, numerics]

    yield model
    for each in loaded.values():
        each.close()
