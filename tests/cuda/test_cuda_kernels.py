# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the CPU against `ref`; nvcc compiles them in a step of .ci/run."""

import shutil
import subprocess
from pathlib import Path

import build_cuda
import pytest


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_kernels_on_the_cpu(
    tmp_path: Path, check_objects: list[Path], host_kernels: list[Path]
) -> None:
    program = build_cuda.build(tmp_path, check_objects, host_kernels)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == set(build_cuda.families())


@pytest.mark.long
@pytest.mark.skipif(not build_cuda.setup_constants()["find_nvcc"](), reason="nvcc is not installed")
def test_kernels_keep_to_their_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    build_cuda.compile_all(["sm_80"], verbose=False)  # ends the program otherwise
    assert len(capsys.readouterr().out.splitlines()) == len(build_cuda.BUDGETS)


def test_every_kernel_has_a_budget() -> None:
    sources = {path.stem for path in (build_cuda.ROOT / "kernels" / "cuda").glob("*.cu")}
    assert sources - build_cuda.OTHER == set(build_cuda.BUDGETS)


def test_usage_is_read() -> None:
    report = """ptxas info    : Compiling entry function '_Z1k1a' for 'sm_80'
ptxas info    : Function properties for _Z1k1a
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 37 registers, used 1 barriers, 8208 bytes smem
"""
    assert build_cuda.usage(report) == [("_Z1k1a", 37, 8208, 12)]
