# SPDX-License-Identifier: Apache-2.0
"""`dsv4 verify`: all is well here, and every planted error is reported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4 import _core, checksums, kernel_calls, nano, verify
from dsv4.checkpoint import Checkpoint
from dsv4.cli import main


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_NUM_THREADS", "1")


@pytest.fixture
def folder(nano: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of nano-0731 that may be damaged."""
    return Path(shutil.copytree(nano("nano-0731"), tmp_path / "model"))


def damage(folder: Path, name: str, at: int, value: int) -> None:
    """Overwrite one byte of a tensor."""
    with Checkpoint.open(folder) as checkpoint:
        info = checkpoint.tensors[name]
        path = checkpoint.shards[info.shard].path
    with open(path, "r+b") as file:
        file.seek(info.offset + at)
        file.write(bytes([value]))


def failed(report: verify.Report) -> list[str]:
    return [check.name for check in report.checks if check.result == verify.FAILED]


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert err == "" and told["ok"] and told["subject"] == "this machine"
    parts: dict[str, list[Any]] = {}
    for check in told["checks"]:
        parts.setdefault(check["part"], []).append(check)
    variants = {(op, name) for op, name, *_ in _core.kernel_variants(None) if name != "ref"}
    assert variants == {(c["name"], v) for c in parts["operation"] for v in c["facts"]["variants"]}
    assert [c["name"] for c in parts["layer"]] == ["0 HCA", "1 CSA", "2 SWA"]
    assert len(parts["run"]) == 10
    assert {c["result"] for c in parts["operation"]} == {"equal"}
    assert {c["result"] for c in told["checks"]} == {"equal", "within limit"}
    for check in parts["layer"] + parts["run"]:
        assert len(check["facts"]["kernel_sets"]) == len(kernel_calls.masks()) - 1


def test_every_operation_has_operands() -> None:
    named = {op for op, *_ in _core.kernel_variants(None) if not op.startswith("linear_")}
    assert named == set(verify._OPERANDS)


def test_a_kernel_with_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong bit in the last element of one variant of each operation in turn."""
    given = kernel_calls.variants

    class Wrong(kernel_calls.Variant):
        def __call__(self, *arguments: Any) -> Any:
            result = super().__call__(*arguments)
            out = arguments[0]
            if isinstance(out, np.ndarray):
                out.view(np.uint8)[-1] ^= 1
            return result

    def with_a_wrong_one(op: str, restype: Any = None) -> list[Any]:
        ref = given(op)[0]
        wrong = [Wrong(op, "wrong", ref.address)] if op in ("swiglu", "act_flush", "rope") else []
        return [ref, *wrong]

    monkeypatch.setattr(kernel_calls, "variants", with_a_wrong_one)
    checks = {check.name: check for check in verify._operations()}
    assert [n for n, c in checks.items() if c.result != "equal"] == ["act_flush", "rope", "swiglu"]
    assert "wrong" in checks["swiglu"].detail


@pytest.mark.parametrize(
    ("tensor", "first"),
    [("layers.1.attn.kv_norm.weight", "1 CSA"), ("layers.0.attn.compressor.ape", "0 HCA"),
     ("layers.2.ffn.shared_experts.w2.weight", "2 SWA"), ("head.weight", "prompt1, official")],
)
def test_a_model_that_is_not_the_stored_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tensor: str, first: str
) -> None:
    """A weight of one layer read wrong: that layer fails alone, then the runs through it."""
    made = nano.make_stored

    def planted(name: str, home: str | Path) -> Path:
        out = made(name, home)
        with Checkpoint.open(out) as checkpoint:
            info = checkpoint.tensors[tensor]
            path = checkpoint.shards[info.shard].path
        data = np.memmap(path, np.uint8, "r+", info.offset, info.nbytes)
        data[:] = data[::-1].copy() if info.dtype == "F8_E4M3" else np.roll(data, 4)
        data.flush()
        return out

    monkeypatch.setattr(nano, "make_stored", planted)
    monkeypatch.setattr(kernel_calls, "masks", lambda: [""])
    monkeypatch.setattr(verify, "_operations", lambda: iter(()))
    report = verify.verify()
    assert failed(report)[0] == first and "prompt130, official" in failed(report)
    assert not any(name[0].isdigit() for name in failed(report)[1:])
    assert main(["verify"]) == 1
    out, _ = capsys.readouterr()
    assert f"{first} " in out and "checks FAILED" in out.splitlines()[-1]


def test_kernel_sets_that_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values within the limits, but not the same with every set."""
    real = verify._everything

    def one_bit_off(folder: Path, e: Any, disable: str) -> Any:
        found = real(folder, e, "avx2" if "avx2" in kernel_calls.masks() else "")
        if disable == "other":
            found["layer", "1"].view(np.uint8)[-1, -1, -1] ^= 1
        return found

    monkeypatch.setattr(verify, "_everything", one_bit_off)
    monkeypatch.setattr(kernel_calls, "masks", lambda: ["other", ""])
    checks = {check.name: check for check in verify._tiny_model()}
    assert [name for name, check in checks.items() if check.result == verify.FAILED] == ["1 CSA"]
    assert "without other" in checks["1 CSA"].detail


def test_a_sound_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "structure" in out and "not checked" in out and "all is well" in out
    checksums.manifest(folder, save=folder)
    report = verify.verify(folder)
    assert [c.result for c in report.checks] == ["ok", "ok", "ok"]
    assert "crc of" in report.checks[2].detail
    checksums.manifest(folder, "sha256", save=folder)
    assert "sha256 of" in verify.verify(folder).checks[2].detail


def test_a_flipped_bit(folder: Path) -> None:
    checksums.manifest(folder, save=folder)
    name = "layers.1.ffn.experts.2.w1.weight"
    damage(folder, name, 17, 0x35)
    report = verify.verify(folder)
    assert failed(report) == ["checksums"] and name in report.checks[2].detail


def test_a_nan_scale(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "layers.1.ffn.experts.2.w1.scale"
    damage(folder, name, 3, 255)
    assert main(["verify", str(folder), "--json"]) == 1
    told = json.loads(capsys.readouterr()[0])
    assert [c["result"] for c in told["checks"]] == ["ok", "FAILED", "not checked"]
    assert name in told["checks"][1]["detail"]


def test_a_broken_structure(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-3])
    report = verify.verify(folder)
    assert failed(report) == ["structure"] and len(report.checks) == 1
    assert shard.name in report.checks[0].detail


def test_a_bad_manifest(folder: Path) -> None:
    (folder / checksums.MANIFEST).write_text('{"version": 1, "mode": "md5", "digests": {}}')
    assert failed(verify.verify(folder)) == ["checksums"]


def test_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "nowhere")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "nowhere" in err and err.count("\n") == 1
