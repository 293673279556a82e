# SPDX-License-Identifier: Apache-2.0
"""Attention, index scores and top-k of V4-Flash against the limits of this machine, one thread.

    python tests/bench/attention.py [--json] [--all] [--only attention|indexer] [--heads 16]

One token: attention of 64 heads (or --heads of them, as a thread of several gets) over FP8 rows in
GFLOP/s, with the ratio to the better of the f32 multiply-add and the bf16 dot; index scores of 64
heads in GOP/s, with the ratio to the byte dot; top-512 in microseconds, with its share of the
scoring.  The shortest of many calls, caches warm.  `--all` shows every variant, not only the chosen
one.
"""

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]

import door  # noqa: E402

from dsv4 import _core  # type: ignore[attr-defined]  # noqa: E402
from dsv4.bench.limits import EXACT, Limits  # noqa: E402

KEYS_ATTENDED = (128, 640, 2176, 8320)  # SWA, CSA, HCA at 256K and 1M
KEYS_SCORED = (4096, 32768, 262144)
HEADS, D_HEAD, D_ROPE, D_INDEX, BEST = 64, 512, 64, 128, 512
ROW, INDEX_ROW, BLOCK = 584, 68, 64  # rows lie in blocks of a session's


@dataclass
class Result:
    """One line."""

    what: str
    keys: int
    heads: int
    variant: str
    chosen: bool
    value: float
    unit: str
    ratio: float


def shortest(call: Callable[..., object], arguments: tuple[object, ...], repeats: int) -> float:
    """Seconds of the shortest of some calls."""
    best = 1e9
    for _ in range(repeats):
        start = time.perf_counter()
        call(*arguments)
        best = min(best, time.perf_counter() - start)
    return best


def kv_rows(n: int) -> np.ndarray:
    """uint8 [n, 584]: random codes (no NaN), scales around 2^-5, bf16 of ordinary size."""
    g = np.random.default_rng(1)
    rows = g.integers(0, 256, (n, ROW), np.uint8)
    rows[:, : D_HEAD - D_ROPE] &= 0xF7
    rotated = door.bf16_bits(g.standard_normal((n, D_ROPE), np.float32))
    rows[:, D_HEAD - D_ROPE : -8] = rotated.view(np.uint8)
    rows[:, -8:] = 122
    return rows


def index_rows(n: int) -> np.ndarray:
    """uint8 [n, 68]: random codes, scales of 1/2 or 1, as alike as a rotation leaves them."""
    rows = np.random.default_rng(2).integers(0, 256, (n, INDEX_ROW), np.uint8)
    rows[:, D_INDEX // 2 :] = 126 + rows[:, D_INDEX // 2 :] % 2
    return rows


def shown(op: str, every: bool) -> Iterator[tuple[door.Variant, bool]]:
    """The chosen variant of an operation, or all but ref."""
    chosen = {o: name for o, name, _, picked in _core.kernel_variants(None) if picked}
    for variant in door.variants(op):
        if every and variant.name != "ref" or variant.name == chosen[op]:
            yield variant, variant.name == chosen[op]


def attention(machine: Limits, heads: int, every: bool) -> Iterator[Result]:
    g = np.random.default_rng(3)
    q = door.bf16_bits(g.standard_normal((heads, D_HEAD), np.float32))
    out, sink = np.empty_like(q), np.zeros(heads, np.float32)
    padded = -(-heads // 16) * 16
    scratch = door.aligned(4 * padded * (2 * D_HEAD + 256) + 64 * 8 * D_HEAD + 8192)
    for n in KEYS_ATTENDED:
        rows = kv_rows(n)
        keys = rows.ctypes.data + ROW * np.arange(n, dtype=np.uint64)
        args = door.AttentionArgs(
            out.ctypes.data, q.ctypes.data, keys.ctypes.data, sink.ctypes.data,
            scratch.ctypes.data, n, heads, D_HEAD, D_ROPE, D_HEAD**-0.5, door.KV_FP8,
        )
        for variant, chosen in shown("attention", every):
            call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(variant.address)
            seconds = shortest(call, (ctypes.addressof(args),), 200)
            peak = machine.peak(EXACT, 1) / 1e9
            value = 4 * heads * D_HEAD * n / seconds / 1e9
            yield Result(
                "attention", n, heads, variant.name, chosen, value, "GFLOP/s", value / peak
            )


def indexer(machine: Limits, heads: int, every: bool) -> Iterator[Result]:
    q = index_rows(heads)
    weights = door.bf16_bits(np.random.default_rng(4).standard_normal(heads, np.float32))
    scratch = door.aligned(64 * (heads + 64) * (D_INDEX // 32 * 9 + 8))
    for n in KEYS_SCORED:
        keys, scores = index_rows(n), np.empty(n, np.float32)
        blocks = keys.ctypes.data + INDEX_ROW * np.arange(0, n, BLOCK, dtype=np.uint64)
        args = door.IndexScoresArgs(
            scores.ctypes.data, q.ctypes.data, blocks.ctypes.data, weights.ctypes.data,
            scratch.ctypes.data, 0.011048543, n, BLOCK, heads, D_INDEX,
        )
        scoring = 0.0
        for variant, chosen in shown("index_scores", every):
            repeats = max(5, (1 << 21) // n)
            call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(variant.address)
            seconds = shortest(call, (ctypes.addressof(args),), repeats)
            value = 2 * n * heads * D_INDEX / seconds / 1e9
            ratio = value / (machine.peak(["byte dot"], 1) / 1e9)
            scoring = seconds if chosen else scoring
            yield Result("index scores", n, heads, variant.name, chosen, value, "GOP/s", ratio)
        ids, room = np.empty(BEST, np.int32), door.aligned(4 * n + 16384)
        for variant, chosen in shown("top_k", every):
            pointer, int32 = ctypes.c_void_p, ctypes.c_int32
            kind = ctypes.CFUNCTYPE(int32, pointer, pointer, int32, int32, pointer)
            arguments = ids.ctypes.data, scores.ctypes.data, n, BEST, room.ctypes.data
            seconds = shortest(kind(variant.address), arguments, 200)
            yield Result(
                "top-512", n, heads, variant.name, chosen, seconds * 1e6, "us", seconds / scoring
            )


def main() -> int:
    parser = argparse.ArgumentParser(description="attention and indexer against the limits")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--all", action="store_true", help="every variant, not only the chosen")
    parser.add_argument("--only", choices=("attention", "indexer"))
    parser.add_argument("--heads", type=int, default=HEADS, help="in one call (default 64)")
    options = parser.parse_args()
    results = []
    machine = Limits([])
    for name, bench in (("attention", attention), ("indexer", indexer)):
        if options.only not in (None, name):
            continue
        for r in bench(machine, options.heads, options.all):
            results.append(r)
            print(
                f"{r.what:12} {r.keys:6} keys {r.heads:3} heads {r.variant:11}"
                f"{'*' if r.chosen else ' '} {r.value:8.1f} {r.unit:8} {r.ratio:6.3f}",
                file=sys.stderr if options.json else sys.stdout,
            )
    peaks = {
        f"{kind.replace(' ', '_')}_g_s": machine.peak([kind], 1) / 1e9
        for kind in (*EXACT, "byte dot")
    }
    if options.json:
        print(json.dumps({"peaks": peaks, "results": [asdict(r) for r in results]}, indent=1))
    else:
        print(", ".join(f"{name} {value:.0f}" for name, value in peaks.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
