# SPDX-License-Identifier: Apache-2.0
"""What every peer needs: rows of results, alternated samples, the machine's limits."""

import ctypes
import mmap
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4 import _core, kernel_calls
from dsv4.bench.limits import EXACT, Limits

ROOT = Path(__file__).resolve().parents[3]

Array = npt.NDArray[Any]
MIN_ROUNDS = 7
SETTLE = 0.01  # seconds until threads of OpenMP stop spinning for work


@dataclass
class Row:
    """One figure: ours, the limit it runs against, the peer's, and how many times faster we are."""

    name: str
    value: float
    unit: str
    limit: float | None
    ratio: float | None
    peer: float
    peer_ratio: float
    engine: str
    threads: int
    note: str = ""

    def line(self) -> str:
        """The row as text."""
        of = f"{self.ratio:4.2f} of {self.limit:6.1f}" if self.limit and self.ratio else " " * 14
        return (
            f"{self.name:32}{self.threads:2} T {self.value:8.2f} {self.unit:8} {of}"
            f"  {self.peer_ratio:5.2f} x {self.peer:7.2f} of {self.engine}  {self.note}"
        )


class Missing(Exception):
    """The peer is not installed: says what to run."""


def version(package: str) -> str:
    """Installed version of a package, or "?"."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "?"


def machine() -> str:
    """The processor's name and how many of them this process may use."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else '?'}, {len(os.sched_getaffinity(0))} CPUs"


def commit() -> str:
    """The commit of this checkout."""
    run = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return run.stdout.strip() or "?"


def others_busy(seconds: float = 0.3) -> float:
    """CPUs' worth of time that other processes take now (this one sleeps meanwhile)."""

    def read() -> tuple[int, int]:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
        fields = [int(x) for x in first.split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    all_a, idle_a = read()
    time.sleep(seconds)
    all_b, idle_b = read()
    return (1 - (idle_b - idle_a) / max(1, all_b - all_a)) * (os.cpu_count() or 1)


# ---- alternated samples ----

def alternate(
    runs: Mapping[str, Callable[[int], float]], rounds: int, warm: int = 1
) -> dict[str, list[float]]:
    """Samples of each run in turns, A B C A B C ..., at least MIN_ROUNDS of them.

    A run takes the number of the round and returns its seconds.  The order turns by one each
    round, so that none always follows the same one.
    """
    names = list(runs)
    for i in range(warm):
        for name in names:
            runs[name](i)
    found: dict[str, list[float]] = {name: [] for name in names}
    for i in range(max(rounds, MIN_ROUNDS)):
        for k in range(len(names)):
            name = names[(i + k) % len(names)]
            found[name].append(runs[name](i + warm))
    return found


def times_faster(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Median over the rounds of peer's time / our time."""
    return median(p / o for o, p in zip(ours, peer, strict=False))


def fastest(samples: Mapping[str, Sequence[float]], but: Sequence[str] = ("ours", "read")) -> str:
    """The peer's candidate with the lowest median."""
    return min((n for n in samples if n not in but), key=lambda n: median(samples[n]))


# ---- native.c ----

class Products(Structure):
    """struct products of native.c."""

    _fields_ = [
        ("linear", c_void_p), ("quant", c_void_p), ("flush", c_void_p),
        ("weights", POINTER(kernel_calls.Weight)), ("x", c_void_p), ("operands", c_void_p),
        ("out", c_void_p), ("scratch", c_void_p), ("n_weight", c_int32), ("n_tok", c_int32),
        ("n_thread", c_int32),
    ]


class Moe(Structure):
    """struct moe of native.c."""

    _fields_ = [
        ("linear", c_void_p), ("quant", c_void_p), ("swiglu", c_void_p), ("sum", c_void_p),
        ("w1", POINTER(kernel_calls.Weight)), ("w3", POINTER(kernel_calls.Weight)),
        ("w2", POINTER(kernel_calls.Weight)), ("route", c_void_p), ("x", c_void_p),
        ("y", c_void_p), ("operands", c_void_p), ("gate", c_void_p), ("up", c_void_p),
        ("down", c_void_p), ("scratch", c_void_p), ("limit", c_float), ("n_expert", c_int32),
        ("d", c_int32), ("width", c_int32), ("n_thread", c_int32),
    ]


class Native:
    """native.c, compiled now; the kernels that dsv4 chose on this machine."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "native.so"
            command = ["gcc", "-O2", "-march=native", "-fopenmp", "-shared", "-fPIC", "-w"]
            command += ["-std=c11", f"-I{ROOT / 'kernels'}", "-o", str(target)]
            subprocess.run([*command, str(Path(__file__).with_name("native.c"))], check=True)
            self.lib = ctypes.CDLL(str(target))
        for name, arguments in (
            ("products_seconds", [POINTER(Products)]), ("moe_seconds", [POINTER(Moe)]),
        ):
            function = getattr(self.lib, name)
            function.restype, function.argtypes = c_double, arguments
        self.chosen = {
            op: (name, address) for op, name, address, picked in _core.kernel_variants(None)
            if picked
        }

    def address(self, op: str) -> int:
        """The chosen kernel of an operation."""
        return self.chosen[op][1]

    def name(self, op: str) -> str:
        """The name of the chosen kernel."""
        return self.chosen[op][0]


class Reading:
    """The stream-read limit on chunks of a pool, `dsv4 bench`'s, as a run to alternate."""

    def __init__(self, pool: Array, chunk: int, threads: int) -> None:
        count = max(1, len(pool) // chunk)
        self.limits = Limits([(pool.ctypes.data + i * chunk, chunk) for i in range(count)])
        self.threads = threads

    def rate(self) -> float:
        """Bytes a second."""
        time.sleep(SETTLE)
        return self.limits.read(self.threads)


def peak(threads: int) -> float:
    """GFLOP/s of the best instruction with exact sums, all threads at once."""
    time.sleep(SETTLE)
    return Limits([]).peak(EXACT, threads) / 1e9


def pool_of(n_bytes: int, block: Array) -> Array:
    """A pool of whole copies of a block, on small pages, as files and ggml's buffers have them."""
    count = max(1, n_bytes // block.nbytes)
    memory = mmap.mmap(-1, count * block.nbytes)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    pool = np.frombuffer(memory, np.uint8)
    pool.reshape(count, block.nbytes)[:] = block.reshape(-1).view(np.uint8)
    return pool


def weight(code: int, data: int, scale: Array | None, rows: int, cols: int) -> Any:
    """A weight for a kernel; `data` is an address, the scales are E8M0 bytes."""
    rule = kernel_calls.SCALE_NONE if scale is None else kernel_calls.SCALE_FOLD
    return kernel_calls.Weight(data, kernel_calls.pointer(scale), rows, cols, code, 0, rule)


def bf16(values: Array) -> Array:
    """float32 -> the bits of the nearest bf16."""
    u = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    """bf16 bits -> float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def rms_error(got: Array, want: Array) -> float:
    """Relative root mean square error."""
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(np.square(want))))


def check(what: str, got: Array, want: Array, limit: float = 0.05) -> None:
    """Stops where a product is wrong: its time would mean nothing."""
    error = rms_error(got, want)
    if not error < limit:
        raise RuntimeError(f"{what}: relative error {error:.3g}, at most {limit:g} was expected")

