# SPDX-License-Identifier: Apache-2.0
"""kt-kernel's experts beside ours, FP4 and FP8: those of one V4-Flash layer, one token.

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
from typing import Any, NamedTuple

import numpy as np

from dsv4 import kernel_calls, nano
from peer import common, synthetic
from peer.common import Array, Native, Row
from peer.ggml import E2M1

INSTALL = "pip install --no-deps kt-kernel"
HIDDEN, INTER, TOP = 4096, 2048, 6
EXPERTS = 24  # 320 MB (FP4), 600 MB (FP8)
PER_SAMPLE = EXPERTS // TOP  # tokens in one sample: a whole round of the pool
LIMIT = 10.0
SETTLE = 0.05  # seconds after the other process stopped or went on
PARTS = {"w1": (INTER, HIDDEN), "w3": (INTER, HIDDEN), "w2": (HIDDEN, INTER)}


class Format(NamedTuple):
    """A format of experts: its row, its kernel, kt-kernel's classes (the better counts)."""

    row: str
    kernel: str
    code: int
    classes: tuple[str, ...]
    bits: int
    group: int

    def codes(self, i: int) -> Array:
        """Codes of part i of all experts, [experts][bytes]."""
        roll = np.roll(synthetic.FP4 if self.bits == 4 else synthetic.FP8, 1000 * i)
        return np.resize(roll, EXPERTS * HIDDEN * INTER * self.bits // 8).reshape(EXPERTS, -1)

    def scales(self, i: int) -> Array:
        """E8M0 bytes of part i of all experts, likewise."""
        n = HIDDEN * INTER // (self.group if self.bits == 4 else self.group**2)
        low = 117 if self.bits == 4 else 111
        return np.random.default_rng(i).integers(low, low + 4, (EXPERTS, n), np.uint8)

    def weights(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """Codes and scales of each part: the same in every process."""
        return (
            {name: self.codes(i) for i, name in enumerate(PARTS)},
            {name: self.scales(i) for i, name in enumerate(PARTS)},
        )

    def matrix(self, codes: Array, scales: Array, rows: int, cols: int) -> Array:
        """Values as float64."""
        factor = np.exp2(scales.astype(np.float64) - 127)
        if self.bits == 4:
            v = E2M1[np.stack([codes & 15, codes >> 4], -1)].reshape(rows, -1, 32)
            return (v * factor.reshape(rows, -1, 1)).reshape(rows, cols)
        v = (np.where(codes & 0x80, -1, 1) * nano.E4M3[codes & 0x7F]).reshape(rows, cols)
        return v * nano.each_block(factor.reshape(rows // 128, -1), rows, cols)


FORMATS = {
    "fp4": Format(
        "moe_vs_kt", "linear_few_fp4", kernel_calls.W_FP4,
        ("AMXFP4_KGroup_MOE", "AVX2MXFP4_MOE"), 4, 32),
    "fp8": Format(
        "moe_fp8_vs_kt", "linear_few_fp8", kernel_calls.W_FP8, ("AMXFP8_MOE", "AVX2FP8_MOE"), 8,
        128),
}


def token() -> Array:
    """One token, bf16 bits."""
    return common.bf16(np.random.default_rng(4).standard_normal((1, HIDDEN), np.float32))


def chosen(i: int) -> Array:
    """The experts of token i, ascending: going round the pool."""
    return np.arange(i * TOP, i * TOP + TOP) % EXPERTS


def expected(f: Format, x: Array) -> Array:
    """float64 result for token 0, nothing rounded between."""
    codes, scales = f.weights()
    v = common.from_bf16(x[0]).astype(np.float64)
    out = np.zeros(HIDDEN)
    for e in chosen(0):
        w = {n: f.matrix(codes[n][e], scales[n][e], *shape) for n, shape in PARTS.items()}
        gate, up = np.minimum(w["w1"] @ v, LIMIT), np.clip(w["w3"] @ v, -LIMIT, LIMIT)
        out += w["w2"] @ (gate / (1 + np.exp(-gate)) * up) / TOP
    return out


# ---- ours ----

class Ours:
    """The experts through dsv4's kernels."""

    def __init__(self, native: Native, f: Format, threads: int) -> None:
        self.native = native
        codes, scales = f.weights()
        # each expert's six runs lie together, as in the published shards
        order = ("w1", "w2", "w3")
        expert = np.concatenate(
            [codes[n] for n in order] + [scales[n] for n in order], axis=1)
        self.expert_bytes = expert.shape[1]
        self.pool = common.pool_of(expert.nbytes, expert)
        self.weights: dict[str, Any] = {}
        at, sat = 0, sum(codes[n].shape[1] for n in order)
        for n in order:
            rows, cols = PARTS[n]
            self.weights[n] = [
                common.weight(
                    f.code, self.pool.ctypes.data + e * self.expert_bytes + at,
                    self.pool[e * self.expert_bytes + sat :], rows, cols)
                for e in range(EXPERTS)
            ]
            at, sat = at + codes[n].shape[1], sat + scales[n].shape[1]
        self.x, self.y = token(), np.zeros(HIDDEN, np.uint16)
        self.route = np.full(TOP, 1 / TOP, np.float32)
        self.work = [np.zeros(n, np.uint16) for n in (
            HIDDEN, TOP * INTER, TOP * INTER, TOP * HIDDEN)]
        each = kernel_calls.linear_scratch(HIDDEN).nbytes
        self.scratch = kernel_calls.aligned(each * threads)
        self.reading = common.Reading(self.pool, len(self.pool), threads)
        self.args = common.Moe(
            native.address(f.kernel), native.address("act_quant"),
            native.address("swiglu"), native.address("expert_sum"), None, None, None,
            self.route.ctypes.data, self.x.ctypes.data, self.y.ctypes.data,
            *(w.ctypes.data for w in self.work), self.scratch.ctypes.data, LIMIT, TOP, HIDDEN,
            INTER, threads,
        )
        self.one(0)
        # the official rounding of activations to FP8 moves the result by some percent
        common.check("dsv4 experts", common.from_bf16(self.y), expected(f, self.x), 0.1)

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
        return TOP * self.expert_bytes / self.reading.rate()


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

    def __init__(self, kt: ModuleType, f: Format, kind: str, threads: int) -> None:
        pool = kt.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map = 1, [0]
        pool.subpool_thread_count = [threads]
        self.cpu = kt.CPUInfer(pool)
        self.codes, scales = f.weights()
        # its loader widens the E8M0 scales: to bf16 for FP4, to float32 for FP8
        shift, wide = (7, np.uint16) if f.bits == 4 else (23, np.uint32)
        self.scales = {name: s.astype(wide) << shift for name, s in scales.items()}
        mask, order = np.zeros(EXPERTS, np.uint8), np.arange(EXPERTS, dtype=np.int64)
        self.keep = mask, order
        c = kt.moe.MOEConfig(EXPERTS, TOP, HIDDEN, INTER, mask.ctypes.data)
        c.layer_idx, c.pool, c.max_len, c.swiglu_limit = 0, self.cpu.backend_, 16, LIMIT
        for ours, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            for what, arrays in (("projs", self.codes), ("scales", self.scales)):
                setattr(c, f"{name}_{what}", [[a.ctypes.data for a in arrays[ours]]])
        c.quant_config.bits, c.quant_config.group_size = f.bits, f.group
        c.quant_config.zero_point = False
        self.moe = getattr(kt.moe, kind)(c)
        self.cpu.submit(self.moe.load_weights_task(order.ctypes.data))
        self.cpu.sync()
        self.x, self.y = token(), np.zeros((1, HIDDEN), np.uint16)
        self.route = np.full((1, TOP), 1 / TOP, np.float32)
        self.one(0)
        common.check(f"kt-kernel {kind}", common.from_bf16(self.y[0]), expected(f, self.x))

    def one(self, i: int) -> float:
        """Seconds of one token."""
        n, ids = np.array([1], np.int32), chosen(i)[None].astype(np.int64)
        start = time.perf_counter()
        self.cpu.submit(self.moe.forward_task(
            n.ctypes.data, TOP, ids.ctypes.data, self.route.ctypes.data, self.x.ctypes.data,
            self.y.ctypes.data, False))
        self.cpu.sync()
        return time.perf_counter() - start


def serve(address: str, name: str, kind: str, threads: int) -> None:
    """The child: answers with the seconds per token of one sample."""
    with Client(address, "AF_UNIX") as parent:
        try:
            spec = importlib.util.spec_from_file_location("kt_kernel_ext", extension())
            assert spec and spec.loader
            kt = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(kt)
            experts = Theirs(kt, FORMATS[name], kind, threads)
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

    def __init__(self, folder: Path, name: str, kind: str, threads: int) -> None:
        address = str(folder / f"{kind}.sock")
        command = [sys.executable, "-c", (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r});"
            f"from peer import kt; kt.serve({address!r}, {name!r}, {kind!r}, {threads})")]
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


def one_format(name: str, threads: int, rounds: int) -> Row:
    """Our experts against the better of kt-kernel's classes for one format."""
    f, native = FORMATS[name], Native()
    children: dict[str, Child] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for kind in f.classes:
                try:
                    children[kind] = Child(Path(folder), name, kind, threads)
                except RuntimeError as error:
                    print(f"  left out: {error}", file=sys.stderr)
            if not children:
                raise common.Missing(f"none of kt-kernel's classes for {name} runs here")
            ours = Ours(native, f, threads)
            samples = common.alternate(
                {"ours": ours.run, **{k: c.run for k, c in children.items()}, "read": ours.read},
                rounds)
        finally:
            for child in children.values():
                child.end()
    n_bytes = TOP * ours.expert_bytes
    for key, times in samples.items():
        rate = n_bytes / median(times) / 1e9
        print(f"  {key:18} {median(times) * 1e3:7.2f} ms {rate:6.1f} GB/s", file=sys.stderr)
    best = common.fastest(samples)
    value, limit, peer = (n_bytes / median(samples[n]) / 1e9 for n in ("ours", "read", best))
    times = [median(samples[n]) * 1e3 for n in ("ours", best)]
    return Row(
        f.row, value, "GB/s", limit, value / limit, peer,
        common.times_faster(samples["ours"], samples[best]),
        f"kt-kernel {common.version('kt-kernel')} {best}", threads,
        f"{times[0]:.2f} ms against {times[1]:.2f} ms a layer")


def measure(threads: int, rounds: int, only: str | None) -> list[Row]:
    """One row for each format."""
    extension()
    threads = max(1, min(threads, len(os.sched_getaffinity(0)) - 1))
    return [one_format(name, threads, rounds) for name in FORMATS if only in (None, name)]
