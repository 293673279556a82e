# SPDX-License-Identifier: Apache-2.0
"""Shared libraries compiled for the tests."""

import contextlib
import ctypes
import fcntl
import gc
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import build_cuda
import pytest
from steps import context_kept, require_device

import dsv4
from dsv4 import devices

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


@pytest.fixture(scope="session")
def of_all_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of one run of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda"
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compiled_once(folder: Path, name: str, make: Callable[[Path], list[Path]]) -> list[Path]:
    made = folder / f"{name}.txt"
    with alone(folder):
        if not made.exists():
            made.write_text("\n".join(map(str, make(folder))))
        return [Path(line) for line in made.read_text().splitlines()]


@pytest.fixture(scope="session")
def host_kernels(of_all_processes: Path) -> list[Path]:
    """Objects of all kernels, for the CPU."""
    return compiled_once(of_all_processes, "kernels", build_cuda.host_kernels)


@pytest.fixture(scope="session")
def check_objects(of_all_processes: Path) -> list[Path]:
    """Objects of the checks of the kernels."""
    return compiled_once(of_all_processes, "checks", build_cuda.check_objects)


@pytest.fixture(scope="session")
def host_plugin(of_all_processes: Path, host_kernels: list[Path]) -> Path:
    """The plugin with its real kernels, executed on the CPU: host_plugin.cpp."""
    made = of_all_processes / "host_plugin.so"
    with alone(of_all_processes):
        return made if made.exists() else build_cuda.build_plugin(of_all_processes, host_kernels)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What asks the host's plugin nothing is also run on a device, with `-m cuda`."""
    if "place" in metafunc.fixturenames:
        host_alone = {"host_plugin", "monkeypatch"} & set(metafunc.fixturenames) or getattr(
            metafunc.module, "HOST_ALONE", False)
        device = [] if host_alone else [pytest.param("device", marks=pytest.mark.cuda)]
        metafunc.parametrize("place", ["host", *device])


@pytest.fixture
def host_device(place: str, request: pytest.FixtureRequest, tmp_path: Path,
                monkeypatch: pytest.MonkeyPatch,
                shared_library: Callable[..., Path]) -> Iterator[None]:
    """The host's plugin in place of the one that was built; or that one, and a device.  Counts of
    experts stay out of the user's folder; what the thread has current is what it was."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    if place == "device":
        require_device()
        yield
        return
    plugin = request.getfixturevalue("host_plugin")
    with pytest.MonkeyPatch.context() as patch, context_kept(plugin):
        patch.setattr(devices, "PLUGIN", plugin)
        patch.setattr(devices, "DRIVER", str(shared_library("driver.c")))
        yield


def counted(function: Callable[[], int]) -> Callable[[], int]:
    """Calls it when nothing waits to be collected."""
    function.restype = ctypes.c_uint64  # type: ignore[attr-defined]

    def count() -> int:
        gc.collect()
        return function()

    return count


@pytest.fixture
def live(host_plugin: Path) -> Callable[[], int]:
    """What the devices still hold."""
    return counted(ctypes.CDLL(str(host_plugin)).host_live)


@pytest.fixture
def used(host_plugin: Path) -> Callable[[], int]:
    """Bytes of the devices in use."""
    return counted(ctypes.CDLL(str(host_plugin)).host_used)


@pytest.fixture
def cpu(nano: Callable[[str], Path]) -> Iterator[dsv4.Model]:
    with dsv4.load(nano("nano-flash"), device="cpu", threads=1) as model:
        yield model


@pytest.fixture
def gpu(host_device: None, nano: Callable[[str], Path]) -> Iterator[dsv4.Model]:
    with dsv4.load(nano("nano-flash"), device="cuda", threads=2) as model:
        yield model
