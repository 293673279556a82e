# SPDX-License-Identifier: Apache-2.0
"""tests/bench/cuda.py from end to end with kernels executed on the CPU: what it says, not how
fast."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from steps import SOMEBODYS, set_context

from dsv4 import devices, nano
from dsv4.bench import synthetic

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "bench"))

import cuda  # noqa: E402

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
TINY = dict(
    nano.CONFIG, num_hidden_layers=5, compress_ratios=[0, 4, 128, 4, 128], n_routed_experts=12,
    num_experts_per_tok=2, max_position_embeddings=4096, num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cuda_kernels.cu for the CPU."""
    target = tmp_path_factory.mktemp("bench") / "cuda_kernels.so"
    include = [f"-I{ROOT / p}" for p in (".", "kernels", "kernels/cuda", "tests/cuda")]
    sources = [ROOT / "tests" / "bench" / "cuda_kernels.cu", ROOT / "tests" / "cuda" / "host.cpp"]
    subprocess.run(
        ["g++", "-std=c++17", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC",
         "-fvisibility=hidden", "-Wno-unknown-pragmas", *include, "-shared", "-x", "c++",
         *map(str, sources), "-o", str(target)], check=True)
    return target


@pytest.fixture
def small(host_device: None, library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small enough for kernels on the CPU, and no cuBLASLt."""
    sizes = {"READ_BYTES": 1 << 16, "LAUNCHES": 2, "REPEATS": 1, "CONTEXT": 40, "PROMPT": 3}
    for name, value in sizes.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(cuda, "find_cublaslt", lambda: "no-such-cublasLt.so")
    monkeypatch.setattr(cuda, "build_library", lambda folder, architecture: library)
    monkeypatch.setattr(synthetic, "published", lambda model: TINY)
    yield
    set_context(devices.PLUGIN, SOMEBODYS)  # a program of its own leaves its device current


def test_every_row(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    cuda.main(["--json", "--experts", "2"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in report["rows"]]
    # the time of a further layer is a difference of short times, which may come out as nothing
    assert [name for name in cuda.NAMES if name != "layer_4k" or name in names] == names
    for row in report["rows"]:
        assert list(row) == ["name", "value", "unit", "limit", "ratio", "peer", "peer_ratio"]
        assert row["value"] > 0 and math.isfinite(row["value"])
        assert (row["limit"] is None) == row["name"].startswith("prefill")
    assert "no-such-cublasLt.so" in report["details"]["prefill_8k"]["no_limit"]
    machine = report["machine"]
    assert machine["model"] == {"layers": 5, "experts": 2, "full_experts": 12}
    assert machine["limits"]["read_g_s"] > 0 and "fp8_g_s" not in machine["limits"]


def test_the_table(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    cuda.main(["--only", "linear_fp8_1tok_wide"])
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[0] == "linear_fp8_1tok_wide" and line[4:] == ["0.75", "GB/s"]


def test_without_a_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "PLUGIN", tmp_path / "none.so")
    with pytest.raises(SystemExit, match="no CUDA device can be used: .*plugin"):
        cuda.main([])


def test_experts_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly all of V4-Flash's on 141 GB."""
    config = synthetic.published("flash")
    monkeypatch.setattr(synthetic, "fitting", lambda config: 256)
    assert 200 < cuda.experts_that_fit(config, 141 * 10**9) < 256
    assert cuda.experts_that_fit(config, 10**9) == config["num_experts_per_tok"]
