# SPDX-License-Identifier: Apache-2.0
"""Linear layers against the limits of this machine, in one process and one thread.

    python tests/bench/kernels.py [--json] [--all] [--only fp8] [--threads 2] [--seconds 2]

Prints each layer of V4-Flash: one token in GB/s of weights, 4 and 512 tokens in GFLOP/s, with the
ratio to the stream-read limit or to the best exact instruction (both measured before and after the
line, the better counts), then the limits and the two gates.  Times are wall times of a whole pass
over the pool, the median.  `--all` shows every variant, not only the chosen one.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]

import door  # noqa: E402

from dsv4 import _core  # type: ignore[attr-defined]  # noqa: E402
from dsv4.bench import linears  # noqa: E402
from dsv4.bench.limits import EXACT, Limits, last_level_cache  # noqa: E402

SHAPES = [  # format, name, rows, cols: V4-Flash, SPEC 6.2
    ("fp8", "wq_a", 1024, 4096),
    ("fp8", "wq_b", 32768, 1024),
    ("fp8", "wo_b", 4096, 8192),
    ("fp8", "shared w1", 2048, 4096),
    ("fp8", "shared w2", 4096, 2048),
    ("fp4", "expert w1", 2048, 4096),
    ("fp4", "expert w2", 4096, 2048),
    ("bf16", "wo_a group", 1024, 4096),
    ("bf16", "head (1/8)", 16160, 4096),
    ("f32", "hc fn", 24, 16384),
]
BITS = {"fp8": 8, "fp4": 4, "bf16": 16, "f32": 32}
FORMATS = {"fp8": door.W_FP8, "fp4": door.W_FP4, "bf16": door.W_BF16, "f32": door.W_F32}
MANY_TOKENS = 512
MANY_BYTES = 24 << 20  # of the pool multiplied with 512 tokens in one pass
PIECE = 64 << 20
GATE_FEW, GATE_MANY = 0.6, 0.5


@dataclass
class Result:
    """One line of the table."""

    layer: str
    format: str
    rows: int
    cols: int
    tokens: int
    variant: str
    chosen: bool
    value: float
    unit: str
    ratio: float


def make_pool(n_bytes: int) -> np.ndarray:
    """Bytes that are ordinary numbers in each format (no NaN codes; e4m3 subnormals are rare)."""
    rng = np.random.default_rng(1)
    block = rng.integers(0, 256, 1 << 20, np.uint8) & 0x9F | 0x20
    rare = rng.integers(0, len(block), len(block) // 8192)
    block[rare] = rng.integers(0, 8, len(rare), np.uint8)
    pool = np.empty(n_bytes, np.uint8)
    pool.reshape(-1, len(block))[:] = block
    return pool


class Bench:
    """The pool of weights, the limits measured around everything, and the timing of one kernel."""

    def __init__(self, seconds: float, threads: int) -> None:
        self.seconds, self.threads = seconds, threads
        size = max(4 * last_level_cache(), 256 << 20)
        self.pool = make_pool(-(-size // PIECE) * PIECE)
        rng = np.random.default_rng(2)
        # a scale for each 32 codes of FP4, at its place: they are read from memory like the codes
        self.scales = rng.integers(112, 124, len(self.pool) // 16, np.uint8)
        start = self.pool.ctypes.data
        self.machine = Limits([(start + at, PIECE) for at in range(0, len(self.pool), PIECE)])
        self.reads: list[float] = []
        self.peaks: dict[str, list[float]] = {kind: [] for kind in EXACT}

    def limits(self) -> tuple[float, float]:
        """Read limit in GB/s (the better walk) and the better instruction's GFLOP/s."""
        self.reads.append(self.machine.read(self.threads) / 1e9)
        for kind in EXACT:
            self.peaks[kind].append(self.machine.peak([kind], self.threads) / 1e9)
        return self.reads[-1], max(peaks[-1] for peaks in self.peaks.values())

    def run(self, variant: door.Variant, fmt: str, rows: int, cols: int, n_tok: int) -> float:
        """Seconds of one layer, the median of passes over the pool."""
        nbytes = rows * cols * BITS[fmt] // 8
        room = len(self.pool) if n_tok <= linears.FEW_TOKENS else max(MANY_BYTES, nbytes)
        scaled = fmt in ("fp8", "fp4")
        found = [
            linears.Matrix(
                FORMATS[fmt], self.pool.ctypes.data + at,
                self.scales.ctypes.data + at // 16 if scaled else 0, rows, cols, nbytes)
            for at in range(0, room - nbytes + 1, nbytes)]
        sweep = linears.Sweep(found, n_tok)
        kernel = linears.Kernel(variant.op, variant.name, variant.address)
        times: list[float] = []
        while not times or sum(times) < self.seconds and len(times) < 4096:
            times.append(sweep.seconds(kernel, self.threads))
        return float(np.median(times)) / len(found)


def cases(only: str | None, counts: Sequence[int]) -> list[tuple[str, str, int, int, int]]:
    """format, name, rows, cols, tokens"""
    found = []
    for fmt, name, rows, cols in SHAPES:
        for tokens in counts:
            if (only is None or only in (fmt, name)) and not (fmt == "f32" and tokens == 4):
                found.append((fmt, name, rows if tokens < 9 else min(rows, 2048), cols, tokens))
    return found


def measure(bench: Bench, only: str | None, every: bool, tokens_only: int | None) -> list[Result]:
    """All results, printed as they come."""
    results = []
    chosen = {op: name for op, name, _, picked in _core.kernel_variants(None) if picked}
    counts = (1, 4, MANY_TOKENS) if tokens_only is None else (tokens_only,)
    for fmt, name, rows, cols, tokens in cases(only, counts):
        op = f"linear_{'few' if tokens <= 8 else 'many'}_{fmt}"
        for variant in door.variants(op):
            picked = chosen[op] == variant.name
            if variant.name == "ref" or not (picked or every):
                continue
            before = bench.limits()
            seconds = bench.run(variant, fmt, rows, cols, tokens)
            read, peak = np.maximum(before, bench.limits())
            if tokens == 1:
                value, unit = rows * cols * BITS[fmt] / 8 / seconds / 1e9, "GB/s"
                ratio = value / read
            else:
                value, unit = 2 * rows * cols * tokens / seconds / 1e9, "GFLOP/s"
                ratio = value / peak
            results.append(
                Result(name, fmt, rows, cols, tokens, variant.name, picked, value, unit, ratio)
            )
            mark = "*" if picked else " "
            print(
                f"{name:11} {fmt:5} {rows:6} x {cols:5} {tokens:4} tokens {variant.name:18}{mark}"
                f" {value:8.1f} {unit:8} {ratio:5.2f}",
                file=sys.stderr,
            )
    return results


def gates(results: list[Result]) -> list[dict[str, Any]]:
    """The two gates, over the chosen variants."""
    found = []
    for title, limit, tokens, formats in (
        ("one-token FP8 and FP4 linears against the read limit", GATE_FEW, 1, ("fp8", "fp4")),
        ("512-token linears against the peak", GATE_MANY, MANY_TOKENS, ("fp8", "fp4", "bf16")),
    ):
        ratios = [
            r.ratio for r in results if r.chosen and r.tokens == tokens and r.format in formats
        ]
        if ratios:
            lowest = float(min(ratios))
            found.append({"gate": title, "wanted": limit, "lowest": lowest, "ok": lowest >= limit})
    return found


def span(values: list[float]) -> str:
    """Median and range."""
    return f"{median(values):.1f} ({min(values):.1f} ... {max(values):.1f})"


def main() -> int:
    parser = argparse.ArgumentParser(description="linear layers against the machine's limits")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--all", action="store_true", help="every variant, not only the chosen")
    parser.add_argument("--only", help="a format or a layer")
    parser.add_argument("--tokens", type=int, help="so many tokens only (default 1, 4 and 512)")
    parser.add_argument("--seconds", type=float, default=1.0, help="per line (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="at once (default 1)")
    options = parser.parse_args()
    bench = Bench(options.seconds, options.threads)
    results = measure(bench, options.only, options.all, options.tokens)
    found = gates(results)
    report = {
        "read_limit_gb_s": median(bench.reads),
        "peaks_gflop_s": {name: median(peaks) for name, peaks in bench.peaks.items()},
        "results": [asdict(r) for r in results],
        "gates": found,
    }
    if options.json:
        print(json.dumps(report, indent=1))
        return 0
    pool = len(bench.pool) >> 20
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    print(f"stream read {span(bench.reads)} GB/s; pool {pool} MiB, {threads}")
    for name, peaks in bench.peaks.items():
        print(f"{name} peak {span(peaks)} GFLOP/s")
    for gate in found:
        verdict = "gate ok" if gate["ok"] else "gate missed"
        print(f"{verdict}: {gate['gate']}: lowest {gate['lowest']:.2f}, wanted {gate['wanted']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
