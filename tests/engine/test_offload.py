# SPDX-License-Identifier: Apache-2.0
"""Less memory than the model: experts from disk give the same bits and keep to their budget."""

import ctypes
import dataclasses
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
from true_shape import make

import dsv4
from dsv4 import memory
from dsv4.checkpoint import Checkpoint

MIB = 1 << 20


def budget(plan: dsv4.Plan, experts: int) -> int:
    """The memory that leaves room for so many routed experts."""
    least = dataclasses.replace(plan, memory=1)
    return least.resident + (experts - least.experts_in_memory) * plan.expert_bytes


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of more than a page, so that slots hold what the plan says."""
    return harness.make_tiny(
        tmp_path_factory.mktemp("wide") / "w", hidden_size=512, moe_intermediate_size=512,
        num_hash_layers=2, max_position_embeddings=256)


@pytest.mark.parametrize("kept", [2, 3, 5, 11, 14])
@pytest.mark.parametrize("threads", [1, 2])
def test_any_budget_gives_the_same_bits(wide: Path, kept: int, threads: int) -> None:
    with harness.load(wide) as mapped:
        ids = harness.prompt(mapped, 70)
        wanted, kind = harness.fed(mapped, [ids]), mapped.plan
        traced = harness.step_with(mapped, [(mapped.session(), ids[:9])], 3)[1]
        assert mapped._core.experts["slots"] == 0 and kind.experts_in_memory == kind.experts == 24
    with harness.load(wide, memory=budget(kind, kept), threads=threads, chunk=16) as small:
        assert small.plan.experts_in_memory == kept
        slots = small._core.experts["slots"]
        assert kept <= slots <= kept + 1 + kept * memory.EXPERT_EDGES // kind.expert_bytes
        harness.same(harness.fed(small, harness.pieces(ids, 1)), wanted, "token by token")
        harness.same(harness.fed(small, [ids]), wanted, "one piece")
        harness.same(harness.fed(small, harness.pieces(ids, 7)), wanted, "pieces of 7")
        _, again = harness.step_with(small, [(small.session(), ids[:9])], 3)
        for part in traced:
            harness.same(again[part], traced[part], part)
        for layer in range(4):
            harness.layer_with(small, layer, np.ones((3, 2, 512), np.uint16), ids[:3])
        counts = small._core.experts
        assert counts["read"] > 0
        assert counts["bytes"] >= 0.9 * counts["read"] * counts["slot_bytes"]
        harness.same(harness.fed(small, [ids]), wanted, "after layers alone")


def test_all_that_fits_stays_mapped(tiny_folder: Path, tiny: dsv4.Model) -> None:
    with harness.load(tiny_folder, memory=tiny.plan.total) as model:
        assert model._core.experts["slots"] == 0 and model.plan.memory is None
    with harness.load(tiny_folder, memory=tiny.plan.total - 1) as model:
        assert model._core.experts["slots"] > 0 and model.plan.memory == tiny.plan.total - 1
        assert "routed experts; the others are read from disk" in repr(model)


def test_a_read_only_folder(tiny_folder: Path, tiny: dsv4.Model, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555)
    ids = harness.prompt(tiny, 20)
    with harness.load(folder, memory=budget(tiny.plan, 4)) as model:
        harness.same(harness.fed(model, harness.pieces(ids, 5)), harness.fed(tiny, [ids]))
    folder.chmod(0o755)


@pytest.mark.parametrize("value", [0, -1, 1 << 60])
def test_memory_out_of_range(value: int) -> None:
    with pytest.raises(ValueError, match=f"memory: got {value}, wanted a number of bytes"):
        dsv4.load(memory=value)
    with pytest.raises(ValueError, match="memory: got"):
        dsv4.plan(dsv4.loading.DEFAULT_MODEL, memory=value)


@pytest.mark.parametrize("value", [True, 1e9, "24G"])
def test_memory_of_another_type(value: Any) -> None:
    with pytest.raises(TypeError, match="memory: got .*, wanted a number of bytes or None"):
        dsv4.load(memory=value)


def test_too_little_for_one_token(tiny_folder: Path, tiny: dsv4.Model) -> None:
    least = budget(tiny.plan, 2)
    with pytest.raises(MemoryError, match=r"needed .* and 2 of 24 routed experts\), allowed"):
        dsv4.load(tiny_folder, memory=least - 1)
    with pytest.raises(MemoryError, match=r"needed .*, free"):
        dsv4.load(tiny_folder, memory=least, mmap=False)


CHILD = """
import json, sys
sys.path[:0] = sys.argv[3:]
import numpy as np
import dsv4, test_offload
with dsv4.load(sys.argv[1], memory=int(sys.argv[2])) as model:
    before = test_offload.anonymous()
    session = model.session()
    ids = np.random.default_rng(1).integers(0, 4096, 24)
    session.append(ids[:8])
    for i in ids[8:]:
        session.append([i])
    counts = model._core.experts
    pages = test_offload.pages_in_memory(model)
    print(json.dumps([before, test_offload.anonymous(), pages, counts]))
"""


def anonymous() -> int:
    """Bytes of this process that belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


def pages_in_memory(model: dsv4.Model) -> dict[str, list[int]]:
    """Bytes of the files in the page cache, and their size: routed experts, embedding, the rest."""
    libc = ctypes.CDLL(None)
    found = {"experts": [0, 0], "embedding": [0, 0], "rest": [0, 0]}
    with Checkpoint.open(model.path) as checkpoint:
        for info in checkpoint.tensors.values():
            view = model._core.tensor(info.name)
            start = -(-view.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
            n = (view.ctypes.data + info.nbytes - start) // mmap.PAGESIZE
            if n <= 0:
                continue
            there = (ctypes.c_ubyte * n)()
            libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(n * mmap.PAGESIZE), there)
            part = found["experts" if ".ffn.experts." in info.name
                         else "embedding" if info.name == "embed.weight" else "rest"]
            part[0] += int((np.frombuffer(there, np.uint8) & 1).sum(dtype=np.int64)) * mmap.PAGESIZE
            part[1] += n * mmap.PAGESIZE
    return found


def test_the_budget_is_kept(tmp_path: Path) -> None:
    """A layer of V4-Flash's size: experts stay out of the page cache, everything else is in it."""
    import json

    folder = make(tmp_path / "flash", (4,), experts=32)
    plan, kept = dsv4.plan(folder, context=4096), 10
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    roots = [str(Path(dsv4.__file__).parents[1]), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(budget(plan, kept)), *roots],
        check=True, text=True, stdout=subprocess.PIPE)
    before, after, pages, counts = json.loads(done.stdout)
    assert counts["slots"] >= kept and counts["read"] > counts["slots"]
    # buffers of the passes grow too, but by less than what ten more experts would take
    assert after - before <= (counts["slots"] + 10) * counts["slot_bytes"]
    assert after - before >= counts["slots"] * counts["slot_bytes"] * 0.9
    there, size = pages["experts"]
    assert there <= 0.15 * size, "routed experts are read past the page cache"
    there, size = pages["rest"]
    assert there >= 0.98 * size, "what each token reads is in memory"
