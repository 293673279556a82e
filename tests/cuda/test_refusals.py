# SPDX-License-Identifier: Apache-2.0
"""Machines without a usable GPU: every cause is named, with what to do, and the CPU goes on."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import dsv4
from dsv4 import devices
from dsv4.cli import main
from dsv4.devices import find

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "c"))

import build  # noqa: E402

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
PACKAGES = Path(dsv4.__file__).parents[1]
# of enum cudaError, what a driver or a device can answer
CODES = (1, 2, 3, 4, 34, 35, 36, 46, 98, 100, 101, 102, 200, 201, 209, 214, 218, 222, 223, 304,
         700, 701, 702, 714, 715, 716, 719, 800, 801, 802, 803, 804, 805, 806, 807, 808, 809, 999,
         12345)


@pytest.fixture
def stubs(shared_library: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One device, until the environment says otherwise."""
    monkeypatch.setattr(devices, "PLUGIN", shared_library("plugin.c"))
    monkeypatch.setattr(devices, "DRIVER", str(shared_library("driver.c")))


def refused(says: str) -> str:
    """What "cuda" raises; "auto" must give the same reason and choose the CPU."""
    with pytest.raises(dsv4.BackendUnavailable, match=says) as caught:
        dsv4.load(device="cuda")
    message = str(caught.value)
    # one sentence, the cause before the remedy
    assert message.startswith("CUDA: ") and "; " in message and "\n" not in message
    assert devices.choose("auto") == ("cpu", message)
    assert find().state == message
    return message


def test_no_plugin(stubs: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                   capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(devices, "PLUGIN", tmp_path / "libdsv4_cuda.so")
    assert "DSV4_CUDA=1" in refused("built without its CUDA plugin")
    assert find().plugin is None
    with dsv4.load(device="auto", threads=1) as model:
        assert "cpu, 1 thread" in repr(model) and str(find().state) in repr(model)
        assert len(model.generate("a", max_new_tokens=2).tokens) == 2
    with dsv4.load(device="cpu", threads=1) as model:
        assert "CUDA" not in repr(model)
    assert main(["generate", "a", "--device", "cuda"]) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("dsv4: error: CUDA: ")
    assert told.err.count("\n") == 1


def test_a_plugin_that_is_none(
    stubs: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    shared_library: Callable[..., Path],
) -> None:
    monkeypatch.setattr(devices, "PLUGIN", tmp_path / "text.so")
    (tmp_path / "text.so").write_text("not a library")
    refused("the plugin cannot be loaded: .*text.so: .*; install dsv4 again")
    monkeypatch.setattr(devices, "PLUGIN", shared_library("driver.c"))
    refused("no symbol dsv4_cuda_plugin")


@pytest.mark.parametrize("macro", ["STUB_ABI=999", "STUB_BYTES=24"])
def test_plugin_of_another_version(
    stubs: None, monkeypatch: pytest.MonkeyPatch, shared_library: Callable[..., Path], macro: str,
) -> None:
    monkeypatch.setattr(devices, "PLUGIN", shared_library("plugin.c", macro))
    assert macro.partition("=")[2] in refused("got a plugin of version .*install dsv4 again")


def test_no_driver(stubs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "DRIVER", "libcuda-of-no-machine.so.1")
    refused("no NVIDIA driver: libcuda-of-no-machine.so.1: .*; install one")


def test_a_driver_that_is_none(
    stubs: None, monkeypatch: pytest.MonkeyPatch, shared_library: Callable[..., Path],
) -> None:
    monkeypatch.setattr(devices, "DRIVER", str(shared_library("driver.c", "WITHOUT_INIT")))
    refused("has no cuInit")


@pytest.mark.parametrize(("version", "ok"), [(12080, False), (0, False), (13000, True),
                                             (13020, True), (14000, True)])
def test_versions_of_drivers(
    stubs: None, monkeypatch: pytest.MonkeyPatch, version: int, ok: bool
) -> None:
    monkeypatch.setenv("STUB_VERSION", str(version))
    if ok:
        assert find().state == "ready"
    else:
        assert "install a driver for CUDA 13" in refused(f"supports CUDA {version // 1000}[.]")


def test_no_device(stubs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_COUNT", "0")
    assert "CUDA_VISIBLE_DEVICES" in refused("cuDeviceGetCount: got error 100, no device; ")
    monkeypatch.delenv("STUB_COUNT")
    monkeypatch.setenv("STUB_DEVICES", "0")
    assert "CUDA_VISIBLE_DEVICES" in refused("counting devices: got error 100")


@pytest.mark.parametrize("call", ["cuInit", "cuDriverGetVersion", "cuDeviceGetCount"])
@pytest.mark.parametrize("code", CODES)
def test_every_error_of_a_driver(
    stubs: None, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    monkeypatch.setenv(f"STUB_{call.upper()}", str(code))
    message = refused(f"the NVIDIA driver's {call}: got error {code}, ")
    assert ("another error" in message) == (code == 12345)


@pytest.mark.parametrize("call", ["DEVICE_COUNT", "PROPERTIES", "PREPARE", "FREE_BYTES"])
@pytest.mark.parametrize("code", CODES)
def test_every_error_of_a_device(
    stubs: None, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    monkeypatch.setenv(f"STUB_{call}", str(code))
    message = refused(f"got error {code}, cudaErrorStub [(]as the test wants it[)]; ")
    if call == "PREPARE":
        assert "device 0 (Stub GPU, architecture 9.0; the plugin has code for sm_90a)" in message


def test_info_lists_devices(stubs: None, capsys: pytest.CaptureFixture[str],
                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_DEVICES", "2")
    assert main(["info", "--json"]) == 0
    cuda = json.loads(capsys.readouterr().out)["machine"]["cuda"]
    assert cuda["state"] == "ready" and cuda["built"] == "CUDA 13.0, sm_90a"
    assert [d["architecture"] for d in cuda["devices"]] == ["9.0", "9.1"]
    assert cuda["devices"][0] == dict(
        name="Stub GPU", architecture="9.0", multiprocessors=132, total_bytes=140 << 30,
        free_bytes=139 << 30, why=None,
        text="Stub GPU, architecture 9.0, 132 multiprocessors, 139.00 GiB of 140.00 GiB free")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "device 1 " in text and "Stub GPU, architecture 9.1" in text
    monkeypatch.setenv("STUB_PREPARE", "209")
    assert main(["info"]) == 0
    assert "no code for this device" in capsys.readouterr().out


def test_nothing_is_loaded_before_a_device_is_asked_for() -> None:
    """Neither by the import nor by a model on the CPU."""
    code = """
import dsv4
import dsv4.devices
with dsv4.load(device="cpu") as model:
    model.generate("a", max_new_tokens=2)
maps = open("/proc/self/maps").read()
assert "_core" in maps
print("dsv4_cuda" in maps, "libcuda" in maps)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/",
                          env={"PYTHONPATH": str(PACKAGES)})
    assert done.stdout.split() == ["False", "False"], done.stderr


# ---- the build ----

def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = build.setup_constants()
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    package = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    for nvcc in (package, tmp_path / "home" / "bin" / "nvcc"):
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text("#!/bin/sh\necho sm_75 sm_80 sm_90 sm_121\n")
        nvcc.chmod(0o755)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setenv("PATH", "/nowhere")
    assert setup["find_nvcc"]() in (package, Path("/usr/local/cuda/bin/nvcc"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup["find_nvcc"]() == nvcc
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert setup["cuda_archs"](nvcc) == ["80", "90a"]
    monkeypatch.setenv("DSV4_CUDA_ARCH", "90a, 120")
    assert setup["cuda_archs"](nvcc) == ["90a", "120"]
    monkeypatch.setenv("DSV4_CUDA_ARCH", "hopper")
    with pytest.raises(SystemExit, match="DSV4_CUDA_ARCH: got 'hopper'"):
        setup["cuda_archs"](nvcc)


def test_targets_of_nvcc() -> None:
    targets = build.setup_constants()["cuda_targets"]
    assert targets(["80", "90"]) == ([
        "-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=sm_90",
        "-gencode", "arch=compute_90,code=compute_90"], "sm_80 sm_90 and later")
    # 11.x has no code of its own: PTX of the one before
    flags, words = targets(["80", "90a", "100", "120"])
    assert words == "sm_80 sm_90a sm_100 sm_120 and later"
    assert [flag.split("code=")[1] for flag in flags[1::2]] == [
        "sm_80", "sm_90a", "sm_100", "compute_100", "sm_120", "compute_120"]
    # an older nvcc, whose last has code for itself alone
    assert [flag.split("code=")[1] for flag in targets(["80", "90a"])[0][1::2]] == [
        "sm_80", "compute_80", "sm_90a"]
    assert targets(["90a", "120"])[0][1::2] == [
        "arch=compute_90a,code=sm_90a", "arch=compute_120,code=sm_120",
        "arch=compute_120,code=compute_120"]
    assert targets(["90a"]) == (["-gencode", "arch=compute_90a,code=sm_90a"], "sm_90a")
