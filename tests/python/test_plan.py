# SPDX-License-Identifier: Apache-2.0
"""The memory plan: published sizes, parts that add up, what is free, what would fit."""

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from sparse import write_checkpoint

from dsv4 import memory
from dsv4.checkpoint import Checkpoint
from dsv4.config import Config
from dsv4.memory import (
    available_memory,
    check_memory,
    index_row_bytes,
    kv_row_bytes,
    plan,
    state_bytes,
)

GIB = 1 << 30


@pytest.fixture
def config(vectors):
    return lambda name: Config.from_json(vectors / "configs" / f"{name}.json")


@pytest.mark.parametrize(
    ("name", "per_token", "rings", "states", "total", "experts", "head"),
    [
        ("flash", 3514.25, 3214336, 12206080, 159609485896, 147169738752, 129280 * 4096 * 2),
        ("flash-0731", 3514.25, 3214336, 12206080, 166878536440, 147169738752,
         129280 * 4096 * 2),
        ("pro", 5031.4375, 4559872, 18710528, 864704792696, 822054223872, 129280 * 7168 * 2),
    ],
)
def test_published_sizes(config, name, per_token, rings, states, total, experts, head):
    p = plan(config(name))
    assert p.bytes_per_token == per_token
    assert (p.state["window rings"], p.state["compressor states"]) == (rings, states)
    assert p.state["compressed rows"] + p.state["index rows"] == per_token * (1 << 20)
    assert p.weight_bytes == total and p.weights["routed experts"] == experts
    assert p.weights["embedding"] == p.weights["head"] == head
    assert p.context == 1 << 20 and p.total == p.weight_bytes + p.state_bytes + p.workspace


@pytest.mark.parametrize(
    ("name", "gib"), [("flash", (0.443, 1.301, 3.446)), ("pro", (0.636, 1.864, 4.935))]
)
def test_state_at_long_contexts(config, name, gib):
    got = [sum(state_bytes(config(name), n << 10).values()) / GIB for n in (128, 384, 1024)]
    assert got == pytest.approx(gib, abs=0.0006)


def test_rows(config):
    assert (kv_row_bytes(config("flash")), index_row_bytes(config("flash"))) == (584, 68)
    odd = dataclasses.replace(config("flash"), head_dim=192, index_head_dim=64)
    assert (kv_row_bytes(odd), index_row_bytes(odd)) == (128 + 128 + 2 + 6, 34)


def test_state_grows_by_whole_windows(config):
    c = config("flash")
    assert state_bytes(c, 3)["index rows"] == 0
    assert state_bytes(c, 4)["index rows"] == 21 * 68
    assert state_bytes(c, 127)["compressed rows"] == 21 * 31 * 584
    assert state_bytes(c, 128)["compressed rows"] == (21 * 32 + 20) * 584
    assert plan(c, context=128, batch=3).state_bytes == 3 * sum(state_bytes(c, 128).values())


def test_a_folder_is_counted_from_its_headers(nano, tmp_path):
    folder = nano("nano-base")
    p = plan(folder, context=1000)
    with Checkpoint.open(folder) as checkpoint:
        assert p.weight_bytes == checkpoint.nbytes
    assert p.weights["draft"] == 0 and p.weights["routed experts"] > p.weights["shared experts"]
    config = json.loads((folder / "config.json").read_text())
    assert plan(folder / "config.json", context=1000).weight_bytes != p.weight_bytes  # FP4 assumed
    fp8 = Config.from_json({**config, "expert_dtype": "fp8"})
    scales = plan(fp8, context=1000)
    assert scales.weights["routed experts"] < p.weights["routed experts"]  # E8M0, not F32
    sparse = dict(config, expert_dtype="fp4")
    write_checkpoint(tmp_path / "sparse", sparse)
    assert plan(tmp_path / "sparse").weights == plan(Config.from_json(sparse)).weights


def test_table_and_dict(config):
    p = plan(config("flash"), context=4096, batch=2, workspace=lambda c, batch: 12345)
    text = str(p)
    for line in ("weights", "routed experts", "137.06 GiB", "state of 4,096 tokens x 2",
                 "index rows", "workspace", "12.06 KiB", "total (cpu)"):
        assert line in text
    d = json.loads(json.dumps(p.as_dict()))
    assert d["total"] == d["weight_bytes"] + d["state_bytes"] + 12345 == p.total
    assert sum(d["weights"].values()) == d["weight_bytes"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(context=0), "context: got 0"), (dict(context=(1 << 20) + 1), "context"),
        (dict(context=True), "context"), (dict(context=1.5), "context"),
        (dict(batch=0), "batch"), (dict(batch=-1), "batch"), (dict(device="tpu"), "device"),
        (dict(gpu_memory=1 << 30), "wanted 'cuda'"),
        (dict(device="cuda", gpu_memory=0), "gpu_memory: got 0"),
    ],
)
def test_bad_arguments(config, arguments, words):
    with pytest.raises(ValueError, match=words):
        plan(config("flash"), **arguments)


def test_places_of_a_gpu(config):
    """V4-Flash on one card: all but routed experts, of which as many as there is room for."""
    c = config("flash")
    whole = plan(c, context=4096, device="cuda")
    assert whole.experts_on_gpu == whole.experts == 43 * 256
    assert sum(whole.places["host"].values()) == 0
    everything = whole.total - whole.weights["draft"] + memory.GPU_SCRATCH
    assert sum(whole.places["gpu"].values()) == everything
    assert plan(c, context=4096, device="cuda", gpu_memory=everything).experts_on_gpu == 43 * 256
    each = whole.weights["routed experts"] // whole.experts
    beside = whole.gpu_always + whole.gpu_on_the_way
    card = plan(c, context=4096, device="cuda", gpu_memory=beside + 1000 * each + 5)
    assert card.experts_on_gpu == 1000
    assert sum(card.places["gpu"].values()) == card.gpu_memory - 5
    assert card.places["host"]["routed experts"] == (card.experts - 1000) * each
    assert plan(c, context=4096, device="cuda", gpu_memory=1 << 20).experts_on_gpu == 0
    told = json.loads(json.dumps(card.as_dict()))
    assert told["experts_on_gpu"] == 1000 and told["places"] == card.places
    assert "on the gpu" in str(card) and "on the host" in str(card)
    assert plan(c, context=4096).places == {} and "places" not in plan(c, context=4096).as_dict()


def test_too_little_memory_names_the_three_numbers(config):
    p = plan(config("flash"), context=1 << 20)
    check_memory(p, free=p.total)
    with pytest.raises(MemoryError) as caught:
        check_memory(p, free=p.total - GIB)
    text = str(caught.value)
    longest = p.longest_context(p.total - GIB)
    assert "needed 152.89 GiB, free 151.89 GiB" in text and f"{longest:,} tokens" in text
    fits = plan(config("flash"), context=longest)
    assert fits.total <= p.total - GIB < plan(config("flash"), context=longest + 128).total
    with pytest.raises(MemoryError, match="nothing would fit.*alone need"):
        check_memory(p, free=GIB)
    with pytest.raises(MemoryError, match="needed 2.00 GiB, free 1.00 GiB"):
        check_memory(2 * GIB, free=GIB)
    check_memory(0)


def machine(tmp_path, meminfo=8 << 20, cgroup="", files=None):
    """A /proc and a /sys/fs/cgroup; returns what is available."""
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:    {meminfo} kB\n")
    (proc / "self" / "status").write_text("VmSize:     1024 kB\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    for path, text in (files or {}).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return available_memory(proc, root)


def test_memory_of_the_machine(tmp_path):
    assert machine(tmp_path) == 8 * GIB


def test_memory_of_a_cgroup_v2(tmp_path):
    files = {
        "job/memory.max": "max\n", "memory.max": f"{4 * GIB}\n", "memory.current": f"{3 * GIB}\n",
        "memory.stat": f"anon 1\ninactive_file {GIB}\n",
    }
    assert machine(tmp_path, cgroup="0::/job/step\n", files=files) == 2 * GIB


def test_memory_of_a_cgroup_v1(tmp_path):
    files = {
        "memory/docker/1/memory.limit_in_bytes": f"{2 * GIB}\n",
        "memory/docker/1/memory.usage_in_bytes": f"{3 * GIB}\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    cgroup = "5:cpu,cpuacct:/\n4:memory:/docker/1\n"
    assert machine(tmp_path, cgroup=cgroup, files=files) == 0


def test_memory_of_an_address_space_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (GIB, GIB))
    assert machine(tmp_path) == GIB - (1 << 20)


def test_memory_of_this_machine():
    assert 0 < available_memory() < 1 << 50


def test_a_limit_set_from_outside():
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))\n"
        "from dsv4.memory import check_memory\n"
        "try: check_memory(1 << 31)\n"
        "except MemoryError as error: print(error)"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )
    assert out.stdout.startswith("memory: needed 2.00 GiB, free ")


def test_size_words():
    sizes = {0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 1 << 20: "1.00 MiB", 1 << 41: "2.00 TiB"}
    assert {n: memory.size(n) for n in sizes} == sizes


def test_less_memory_than_the_model(config):
    c = config("flash")
    whole = plan(c, context=4096)
    assert whole.memory is None and whole.resident == whole.total
    assert whole.experts == whole.experts_in_memory == 43 * 256
    assert whole.disk_per_token == (0, 0)
    assert whole.always_read == whole.weight_bytes - 147169738752 - whole.weights["draft"] - (
        129280 * 4096 * 2)
    assert plan(c, context=4096, memory=whole.total).experts_in_memory == 43 * 256
    for gib in (24, 64, 128):
        p = plan(c, context=4096, memory=gib * GIB)
        assert p.memory == gib * GIB and p.total == whole.total
        assert p.resident <= gib * GIB < p.resident + p.expert_bytes
        assert p.expert_bytes == 13369344 + memory.EXPERT_EDGES
        mean, most = p.disk_per_token
        assert most == 43 * 6 * 13369344
        assert mean == round(most * (1 - p.experts_in_memory / p.experts))
        assert f"with {p.experts_in_memory:,} of 11,008 routed experts" in str(p)
        assert p.as_dict()["disk_per_token"] == [mean, most]
    assert "all of it stays in memory" in str(plan(c, context=4096, memory=whole.total))
    nearly = plan(c, context=4096, memory=whole.total - 1)
    assert nearly.experts_in_memory == 11007 and nearly.disk_per_token[1] == 13369344
    least = plan(c, context=4096, memory=1)
    assert least.experts_in_memory == 6 and least.resident > 1


@pytest.mark.parametrize(("value", "kind"), [(0, ValueError), (-5, ValueError), (True, TypeError),
                                             ("24G", TypeError), (2.5, TypeError)])
def test_bad_memory(config, value, kind):
    with pytest.raises(kind, match="memory: got"):
        plan(config("flash"), memory=value)


def test_what_a_load_may_use(config, monkeypatch):
    needs = plan(config("flash"), context=4096)
    monkeypatch.setattr(memory, "address_space", lambda: 1 << 50)
    monkeypatch.setattr(memory, "available_memory", lambda: 32 * GIB)
    free = memory.fitting(needs, True, None)
    assert free.memory == 32 * GIB and free.experts_in_memory > 1000
    assert memory.fitting(needs, True, 24 * GIB).memory == 24 * GIB
    assert memory.fitting(needs, True, 64 * GIB).memory == 32 * GIB  # no more than is free
    with pytest.raises(MemoryError, match=r"of 11008 routed experts\), allowed 4.00 GiB"):
        memory.fitting(needs, True, 4 * GIB)
    with pytest.raises(MemoryError, match="needed 14.*, free 32.00 GiB"):
        memory.fitting(needs, False, None)
    monkeypatch.setattr(memory, "available_memory", lambda: 256 * GIB)
    assert memory.fitting(needs, True, None) is needs
    assert memory.fitting(needs, False, 200 * GIB) is needs
    monkeypatch.setattr(memory, "address_space", lambda: 100 * GIB)
    for allowed in (None, 24 * GIB):
        with pytest.raises(MemoryError, match="free 100.00 GiB"):
            memory.fitting(needs, True, allowed)
