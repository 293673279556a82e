# SPDX-License-Identifier: Apache-2.0
"""The kernels of the built plugin on a device: `python -m pytest -m cuda`, with the other tests of
this folder that ask for one.  What can be looked at without a device, is."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import build_cuda
import numpy as np
import pytest
from steps import require_device, same, same_state

import dsv4
from dsv4 import devices

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
DEAR = ("linear", "linear_mma", "moe", "sampler")  # families that take seconds on the host


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, check_objects: list[Path]) -> Path:
    return build_cuda.build(tmp_path_factory.mktemp("checks"), check_objects, None)


def run(command: list[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], env=os.environ | environment, capture_output=True,
                          text=True)


def named(output: str) -> set[str]:
    return {line.split()[0] for line in output.splitlines() if " ok: " in line}


# ---- without one ----

@pytest.mark.slow
def test_the_program_on_the_host(
    program: Path, host_plugin: Path, shared_library: Callable[..., Path]
) -> None:
    """No check gives a launch memory that a device could not see."""
    skipped = [word for name in DEAR for word in ("--skip", name)]
    done = run([program, *skipped], CHECK_PLUGIN=str(host_plugin),
               CHECK_DRIVER=str(shared_library("driver.c")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert named(done.stdout) == set(build_cuda.families()) - set(DEAR)


@pytest.mark.slow
def test_what_the_program_says_without_a_device(
    program: Path, host_plugin: Path, tmp_path: Path, shared_library: Callable[..., Path]
) -> None:
    for plugin, fail, text in [
        (tmp_path / "none.so", "", "no CUDA plugin: "),
        (host_plugin, "device_count:1:100", "no CUDA device: cudaErrorOfTheTest: "),
        (host_plugin, "prepare:1:209", "no CUDA device: cudaErrorOfTheTest: "),
        (shared_library("plugin.c", "STUB_ABI=999"), "", "a plugin of ABI 999, wanted "),
    ]:
        done = run([program], CHECK_PLUGIN=str(plugin), HOST_FAIL=fail)
        assert (done.returncode, done.stdout) == (3, "") and text in done.stderr, done
        assert done.stderr.count("\n") == 1
    done = run([program], CHECK_PLUGIN=str(host_plugin), CHECK_DRIVER=str(tmp_path / "none"))
    assert done.returncode == 3 and done.stderr.startswith("no CUDA device: ")


# ---- on a device ----

def on_device(*command: str | Path) -> str:
    require_device()
    done = run([*command], CHECK_PLUGIN=str(devices.PLUGIN))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.cuda
@pytest.mark.parametrize("family", build_cuda.families())
def test_kernels(program: Path, family: str) -> None:
    assert named(on_device(program, "--only", family)) == {family}


def sanitizer() -> str:
    """compute-sanitizer: on PATH or beside nvcc."""
    nvcc = build_cuda.setup_constants()["find_nvcc"]()
    beside = f"{os.environ.get('PATH', '')}{os.pathsep}{nvcc.parent if nvcc else ''}"
    found = shutil.which("compute-sanitizer", path=beside)
    if not found:
        pytest.fail("compute-sanitizer was found neither on PATH nor beside nvcc; it comes with "
                    "CUDA toolkits", pytrace=False)
    return found


@pytest.mark.cuda
@pytest.mark.parametrize("family", build_cuda.families())
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels_under_the_sanitizer(program: Path, family: str, tool: str) -> None:
    output = on_device(
        sanitizer(), "--tool", tool, "--error-exitcode", "9", program, "--only", family)
    assert named(output) == {family}


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[dsv4.Model, dsv4.Model]]:
    """The model inside the package, on the CPU and on the device."""
    require_device()
    with dsv4.load(device="cpu") as one, dsv4.load(device="cuda") as other:
        yield one, other


@pytest.mark.cuda
def test_a_long_prompt_and_many_tokens(pair: tuple[dsv4.Model, dsv4.Model]) -> None:
    """Several passes, then tokens one by one, and the whole state."""
    one, other = pair
    ids = np.random.default_rng(3).integers(0, one.config.vocab_size, 2300)
    a, b = one.session(), other.session()
    assert same(a.append(ids[:2200], logits="all"), b.append(ids[:2200], logits="all"))
    for i in range(2200, 2300):
        assert same(a.append(ids[i:i + 1]), b.append(ids[i:i + 1]))
    assert same_state(a, b)


@pytest.mark.cuda
def test_a_batch_and_its_answers(pair: tuple[dsv4.Model, dsv4.Model]) -> None:
    """Sixteen at a time, sampled, with log-probabilities."""
    options = {"max_new_tokens": 40, "temperature": 0.9, "top_p": 0.95, "seed": 4, "logprobs": 5}
    prompts = [f"{name}:" for name in ("ROMEO", "JULIET", "HAMLET", "OPHELIA")] * 4
    answers = [list(model.batch(prompts, concurrency=16, **options)) for model in pair]
    for a, b in zip(*answers, strict=True):
        assert a.tokens == b.tokens and a.logprobs == b.logprobs


@pytest.mark.cuda
def test_files_go_from_one_to_the_other(
    pair: tuple[dsv4.Model, dsv4.Model], tmp_path: Path
) -> None:
    one, other = pair
    ids = np.random.default_rng(4).integers(0, one.config.vocab_size, 700)
    b = other.session()
    b.append(ids[:600])
    b.save(tmp_path / "s")
    a = one.load_session(tmp_path / "s")
    fork = b.fork()
    assert same(a.append(ids[600:]), b.append(ids[600:])) and same_state(a, b)
    b.rewind(650)
    fork.append(ids[600:650])
    assert same(fork.append(ids[650:]), b.append(ids[650:])) and same_state(fork, b)
