# SPDX-License-Identifier: Apache-2.0
"""kt-kernel's MXFP4 experts beside ours: the routed experts of one V4-Flash layer, one token.

kt-kernel's extension is loaded straight from the installed package, without torch.  Its worker
threads and the thread of its queue spin for as long as they live, so it has a process of its own,
which is stopped (SIGSTOP) while dsv4 is measured, and one CPU is left to the queue: on two CPUs
both sides run with one thread (with two, kt-kernel is several times slower).  Both sides: top 6 of
a pool of experts that no cache holds, SwiGLU clamped at 10, bf16 in and out, no router, no shared
expert; the same bytes.  Ours is rounded to FP8 between the products, as the official code does.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np

from dsv4 import kernel_calls
from peer import common
from peer.common import Array, Native, Row
from peer.ggml import E2M1

INSTALL = "pip install --no-deps kt-kernel"
HIDDEN, INTER, TOP, EXPERTS = 4096, 2048, 6, 48  # 640 MB of experts
LIMIT = 10.0
EXPERT_BYTES = 3 * HIDDEN * INTER * 17 // 32
PER_SAMPLE = 8  # tokens in one sample: a whole round of the pool
KINDS = ("AMXFP4_KGroup_MOE", "AVX2MXFP4_MOE")  # classes of kt_kernel_ext.moe, the better counts
SETTLE = 0.05  # seconds after the other process stopped or went on
PARTS = {"w1": (INTER, HIDDEN), "w3": (INTER, HIDDEN), "w2": (HIDDEN, INTER)}


def weights() -> tuple[dict[str, Array], dict[str, Array]]:
    """Codes and scales [experts][...] of each part; the same in both processes."""
    rng = np.random.default_rng(3)
    codes = {
        name: rng.integers(0, 256, (EXPERTS, o * i // 2), np.uint8)
        for name, (o, i) in PARTS.items()
    }
    scales = {
        name: rng.integers(117, 121, (EXPERTS, o * i // 32), np.uint8)
        for name, (o, i) in PARTS.items()
    }
    return codes, scales


def token() -> Array:
    """One token, bf16 bits."""
    return common.bf16(np.random.default_rng(4).standard_normal((1, HIDDEN), np.float32))


def chosen(i: int) -> Array:
    """The experts of token i, ascending: going round the pool."""
    return np.arange(i * TOP, i * TOP + TOP) % EXPERTS


def expected(x: Array) -> Array:
    """float64 result for token 0, nothing rounded between."""
    codes, scales = weights()

    def matrix(name: str, e: int) -> Array:
        rows, cols = PARTS[name]
        q = codes[name][e]
        v = E2M1[np.stack([q & 15, q >> 4], -1)].astype(np.float64).reshape(rows, -1, 32)
        return (v * np.exp2(scales[name][e].reshape(rows, -1, 1) - 127.0)).reshape(rows, cols)

    v = common.from_bf16(x[0]).astype(np.float64)
    out = np.zeros(HIDDEN)
    for e in chosen(0):
        gate = np.minimum(matrix("w1", e) @ v, LIMIT)
        up = np.clip(matrix("w3", e) @ v, -LIMIT, LIMIT)
        out += matrix("w2", e) @ (gate / (1 + np.exp(-gate)) * up) / TOP
    return out


# ---- ours ----

class Ours:
    """The experts through dsv4's kernels."""

    def __init__(self, native: Native, threads: int) -> None:
        self.native = native
        codes, scales = weights()
        # each expert's six runs lie together, as in the published shards
        order = ("w1", "w2", "w3")
        expert = np.concatenate(
            [codes[n] for n in order] + [scales[n] for n in order], axis=1)
        self.pool = common.pool_of(expert.nbytes, expert)
        self.weights: dict[str, Any] = {}
        at, sat = 0, sum(codes[n].shape[1] for n in order)
        for n in order:
            rows, cols = PARTS[n]
            self.weights[n] = [
                common.weight(
                    kernel_calls.W_FP4, self.pool.ctypes.data + e * expert.shape[1] + at,
                    self.pool[e * expert.shape[1] + sat :], rows, cols)
                for e in range(EXPERTS)
            ]
            at, sat = at + codes[n].shape[1], sat + scales[n].shape[1]
        self.x, self.y = token(), np.zeros(HIDDEN, np.uint16)
        self.route = np.full(TOP, 1 / TOP, np.float32)
        self.work = [np.zeros(n, np.uint16) for n in (
            HIDDEN, TOP * INTER, TOP * INTER, TOP * HIDDEN)]
        each = kernel_calls.linear_scratch(HIDDEN).nbytes
        self.scratch = kernel_calls.aligned(each * threads)
        self.reading = common.Reading(self.pool, PER_SAMPLE * TOP * EXPERT_BYTES, threads)
        self.args = common.Moe(
            native.address("linear_few_fp4"), native.address("act_quant"),
            native.address("swiglu"), native.address("expert_sum"), None, None, None,
            self.route.ctypes.data, self.x.ctypes.data, self.y.ctypes.data,
            *(w.ctypes.data for w in self.work), self.scratch.ctypes.data, LIMIT, TOP, HIDDEN,
            INTER, threads,
        )
        self.one(0)
        # the official rounding of activations to FP8 moves the result by some percent
        common.check("dsv4 experts", common.from_bf16(self.y), expected(self.x), 0.1)

    def one(self, i: int) -> float:
        """Seconds of one token."""
        ids = sorted(chosen(i))
        for name in PARTS:
            setattr(self.args, name, (kernel_calls.Weight * TOP)(
                *(self.weights[name][e] for e in ids)))
        return float(self.native.lib.moe_seconds(self.args))

    def run(self, i: int) -> float:
        """Seconds per token over one round of the pool."""
        return sum(self.one(i * PER_SAMPLE + k) for k in range(PER_SAMPLE)) / PER_SAMPLE

    def read(self, i: int) -> float:
        """Seconds to read the bytes of a token and do nothing with them."""
        return TOP * EXPERT_BYTES / self.reading.rate()


# ---- kt-kernel, in a process of its own ----

def extension() -> Path:
    """The file of the extension for this processor."""
    spec = importlib.util.find_spec("kt_kernel")
    if spec is None or not spec.origin:
        raise common.Missing(f"kt-kernel is not installed: {INSTALL}")
    flags = next(
        line for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("flags")).split()
    order = (
        ("amx", "amx_tile"), ("avx512_bf16", "avx512_bf16"), ("avx512_vnni", "avx512_vnni"),
        ("avx512_base", "avx512f"), ("avx2", "avx2"))
    for name, flag in order:
        found = list(Path(spec.origin).parent.glob(f"_kt_kernel_ext_{name}.*.so"))
        if flag in flags and found:
            return found[0]
    raise common.Missing("kt-kernel has no extension for this processor")


class Theirs:
    """kt-kernel's experts."""

    def __init__(self, kt: ModuleType, kind: str, threads: int) -> None:
        pool = kt.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map = 1, [0]
        pool.subpool_thread_count = [threads]
        self.cpu = kt.CPUInfer(pool)
        self.codes, scales = weights()
        # its loader wants the E8M0 scales widened to bf16: the exponent moves to bits 7..14
        self.scales = {name: s.astype(np.uint16) << 7 for name, s in scales.items()}
        mask, order = np.zeros(EXPERTS, np.uint8), np.arange(EXPERTS, dtype=np.int64)
        self.keep = mask, order
        c = kt.moe.MOEConfig(EXPERTS, TOP, HIDDEN, INTER, mask.ctypes.data)
        c.layer_idx, c.pool, c.max_len, c.swiglu_limit = 0, self.cpu.backend_, 16, LIMIT
        for ours, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            for what, arrays in (("projs", self.codes), ("scales", self.scales)):
                setattr(c, f"{name}_{what}", [[a.ctypes.data for a in arrays[ours]]])
        c.quant_config.bits, c.quant_config.group_size = 4, 32
        c.quant_config.zero_point = False
        self.moe = getattr(kt.moe, kind)(c)
        self.cpu.submit(self.moe.load_weights_task(order.ctypes.data))
        self.cpu.sync()
        self.x, self.y = token(), np.zeros((1, HIDDEN), np.uint16)
        self.route = np.full((1, TOP), 1 / TOP, np.float32)
        self.one(0)
        common.check(f"kt-kernel {kind}", common.from_bf16(self.y[0]), expected(self.x))

    def one(self, i: int) -> float:
        """Seconds of one token."""
        n, ids = np.array([1], np.int32), chosen(i)[None].astype(np.int64)
        start = time.perf_counter()
        self.cpu.submit(self.moe.forward_task(
            n.ctypes.data, TOP, ids.ctypes.data, self.route.ctypes.data, self.x.ctypes.data,
            self.y.ctypes.data, False))
        self.cpu.sync()
        return time.perf_counter() - start


def serve(address: str, kind: str, threads: int) -> None:
    """The child: answers with the seconds per token of one sample."""
    with Client(address, "AF_UNIX") as parent:
        try:
            spec = importlib.util.spec_from_file_location("kt_kernel_ext", extension())
            assert spec and spec.loader
            kt = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(kt)
            experts = Theirs(kt, kind, threads)
        except Exception as error:
            parent.send(repr(error))
            return
        parent.send("ready")
        while (i := parent.recv()) is not None:
            first = i * PER_SAMPLE
            parent.send(sum(experts.one(first + k) for k in range(PER_SAMPLE)) / PER_SAMPLE)
    os._exit(0)  # its threads do not end


class Child:
    """One class of kt-kernel in a stopped process."""

    def __init__(self, folder: Path, kind: str, threads: int) -> None:
        address = str(folder / f"{kind}.sock")
        command = [sys.executable, "-c", (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r});"
            f"from peer import kt; kt.serve({address!r}, {kind!r}, {threads})")]
        with Listener(address, "AF_UNIX") as listener:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            self.pipe: Connection = listener.accept()
        if (answer := self.pipe.recv()) != "ready":
            self.process.wait()
            raise RuntimeError(f"kt-kernel {kind}: {answer}")
        self.stop()

    def stop(self) -> None:
        """Takes its threads off the CPUs."""
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(SETTLE)

    def run(self, i: int) -> float:
        """Seconds per token."""
        self.process.send_signal(signal.SIGCONT)
        time.sleep(SETTLE)
        self.pipe.send(i)
        seconds = float(self.pipe.recv())
        self.stop()
        return seconds

    def end(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def measure(threads: int, rounds: int) -> list[Row]:
    """One row: our experts against the better of kt-kernel's classes."""
    extension()
    native = Native()
    threads = max(1, min(threads, len(os.sched_getaffinity(0)) - 1))
    children: dict[str, Child] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for kind in KINDS:
                try:
                    children[kind] = Child(Path(folder), kind, threads)
                except RuntimeError as error:
                    print(f"  left out: {error}", file=sys.stderr)
            if not children:
                raise common.Missing("none of kt-kernel's classes runs on this processor")
            ours = Ours(native, threads)
            samples = common.alternate(
                {"ours": ours.run, **{k: c.run for k, c in children.items()}, "read": ours.read},
                rounds)
        finally:
            for child in children.values():
                child.end()
    n_bytes = TOP * EXPERT_BYTES
    for name, times in samples.items():
        rate = n_bytes / median(times) / 1e9
        print(f"  {name:18} {median(times) * 1e3:7.2f} ms {rate:6.1f} GB/s", file=sys.stderr)
    best = common.fastest(samples)
    value, limit, peer = (n_bytes / median(samples[n]) / 1e9 for n in ("ours", "read", best))
    times = median(samples["ours"]) * 1e3, median(samples[best]) * 1e3
    return [Row(
        "moe_vs_kt", value, "GB/s", limit, value / limit, peer,
        common.times_faster(samples["ours"], samples[best]),
        f"kt-kernel {common.version('kt-kernel')} {best}", threads,
        f"{times[0]:.2f} ms against {times[1]:.2f} ms a layer")]
