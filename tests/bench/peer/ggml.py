# SPDX-License-Identifier: Apache-2.0
"""ggml's CPU matrix products, as llama-cpp-python ships them, on the matrices of one V4 token.

Only ggml's shared libraries are used, through ctypes and its public C API.  ggml has no FP8: the
converters store those layers as Q8_0 (or BF16), the experts as MXFP4, the rest as it is.  Where it
offers a repacked layout, that is timed too, and for each shape the faster one counts.  Both sides
round their input as part of the product (ggml from float32 to its 8-bit blocks, dsv4 from bf16 to
FP8), read weights that no cache holds, from small pages, and meet at a barrier after each product.

Time of a token = sum over the shapes of the checkpoint's layout, count x time; rounds alternate.
"""

import ctypes as C
import importlib.util
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dsv4 import kernel_calls, layout, nano
from dsv4.bench.limits import last_level_cache
from dsv4.config import Config
from peer import common
from peer.common import Array, Native, Row

INSTALL = "CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python"
CODE = {
    "fp8": kernel_calls.W_FP8, "fp4": kernel_calls.W_FP4, "bf16": kernel_calls.W_BF16,
    "f32": kernel_calls.W_F32,
}
DTYPE = {"F8_E4M3": "fp8", "I8": "fp4", "BF16": "bf16", "F32": "f32"}
# what ggml can hold each kind of weight as: type, layout
AS_GGML = {
    "fp4": (("MXFP4", "plain"), ("MXFP4", "repack")),
    "fp8": (("Q8_0", "plain"), ("BF16", "plain")),
    "bf16": (("BF16", "plain"),),
    "f32": (("F32", "plain"),),
}
TYPE_ID = {"F32": 0, "Q8_0": 8, "BF16": 30, "MXFP4": 39}
E2M1 = np.concatenate([nano.E2M1, -nano.E2M1]).astype(np.float32)
CLASSES = {"fp4": ("fp4",), "fp8": ("fp8",), "bf16": ("bf16", "f32")}
CHECKED_ROWS = 4  # of each weight, against NumPy
MAX_ROWS = 4096  # of a weight, for many tokens
FEW = 8  # DSV4_FEW_TOKENS
HEAD_PART = 8  # the head is timed as this many equal parts

# ---- the matrices of one token ----


@dataclass(frozen=True)
class Shape:
    """One kind of matrix and how many of it one token meets."""

    kind: str
    rows: int
    cols: int
    count: float

    @property
    def n_bytes(self) -> int:
        """Bytes as released, scales included."""
        n = self.rows * self.cols
        return {"fp8": n + n // 16384, "fp4": n * 17 // 32, "bf16": 2 * n, "f32": 4 * n}[self.kind]


def token_shapes(many: bool) -> list[Shape]:
    """Every matrix that one token of V4-Flash meets, from the layout of the published config.

    For many tokens tall ones are cut to MAX_ROWS, and the head is left out: only the last token's
    logits are asked for.
    """
    path = common.ROOT / "tests" / "vectors" / "configs" / "flash.json"
    config = json.loads(path.read_text())
    found: Counter[tuple[str, int, int]] = Counter()
    part = config["num_experts_per_tok"] / config["n_routed_experts"]
    for name, (dtypes, shape) in layout.expected(Config.from_json(config)).items():
        if len(shape) != 2 or name.endswith((".scale", ".ape", ".tid2eid")) or "embed." in name:
            continue
        (dtype,) = dtypes
        kind, (rows, cols), times = DTYPE[dtype], shape, 1.0
        if kind == "fp4":
            times, cols = part, cols * 2
        if name == "head.weight":
            if many:
                continue
            times, rows = HEAD_PART, rows // HEAD_PART
        if ".wo_a." in name:
            times, rows = config["o_groups"], rows // config["o_groups"]
        if many and rows > MAX_ROWS:
            times, rows = times * rows / MAX_ROWS, MAX_ROWS
        found[kind, rows, cols] += times  # type: ignore[assignment]
    return sorted(
        (Shape(*key, count) for key, count in found.items()),
        key=lambda s: (list(CODE).index(s.kind), -s.count * s.n_bytes))


# ---- our side ----

def block_of(kind: str, rows: int, cols: int, rng: np.random.Generator) -> Array:
    """The bytes of one weight, its scales behind them."""
    if kind == "bf16":
        return common.bf16(rng.standard_normal(rows * cols, np.float32) * 0.02).view(np.uint8)
    if kind == "f32":
        return (rng.standard_normal(rows * cols, np.float32) * np.float32(0.02)).view(np.uint8)
    if kind == "fp8":
        # a block's largest weight is near 448, as in the published files: subnormal codes are rare
        bell = rng.standard_normal(1 << 20, np.float32) * np.float32(100)
        codes = np.resize(nano.nearest_code(bell, nano.E4M3, 0x80), rows * cols)
        return np.append(codes, np.full(-(-rows // 128) * (cols // 128), 112, np.uint8))
    codes = rng.integers(0, 256, rows * cols // 2, np.uint8)
    return np.append(codes, rng.integers(117, 121, rows * cols // 32, np.uint8))


def values_of(block: Array, kind: str, rows: int, cols: int) -> Array:
    """The first rows of a block as float32."""
    n = CHECKED_ROWS
    if kind == "bf16":
        return common.from_bf16(block[: n * cols * 2].view(np.uint16)).reshape(n, cols)
    if kind == "f32":
        return block[: n * cols * 4].view(np.float32).reshape(n, cols)
    if kind == "fp8":
        c = block[: n * cols]
        sign = np.where(c & 0x80, -1.0, 1.0)
        return (sign * nano.E4M3[c & 0x7F] * 2.0**-15).reshape(n, cols)
    c, s = block[: n * cols // 2], block[rows * cols // 2 :][: n * cols // 32]
    codes = np.stack([c & 15, c >> 4], -1).reshape(n, -1, 32)
    return (E2M1[codes] * np.exp2(s.astype(np.float32) - 127).reshape(n, -1, 1)).reshape(n, cols)


class Ours:
    """A pool of equal weights, and dsv4's kernels over a chunk of them at a time."""

    def __init__(
        self, native: Native, shape: Shape, n_tok: int, threads: int, pool: int, chunk: int
    ) -> None:
        rng = np.random.default_rng(1)
        kind, rows, cols = shape.kind, shape.rows, shape.cols
        self.native, self.threads, self.chunk = native, threads, chunk
        block = block_of(kind, rows, cols, rng)
        pad = np.zeros(-block.nbytes % 64, np.uint8)
        self.stride = block.nbytes + pad.nbytes
        self.pool = common.pool_of(max(pool, chunk * self.stride), np.append(block, pad))
        self.count = len(self.pool) // self.stride
        at, scale = self.pool.ctypes.data, rows * cols * (8 if kind == "fp8" else 4) // 8
        self.weights = (kernel_calls.Weight * self.count)(*(
            common.weight(
                CODE[kind], at + i * self.stride,
                self.pool[i * self.stride + scale :] if kind in ("fp8", "fp4") else None,
                rows, cols)
            for i in range(self.count)
        ))
        self.reading = common.Reading(self.pool, chunk * self.stride, threads)
        few = n_tok <= FEW
        self.x = common.bf16(rng.standard_normal((n_tok, cols), np.float32))
        self.operands = np.zeros_like(self.x)
        self.out = np.zeros((n_tok, rows), np.float32)
        each = kernel_calls.linear_scratch(cols).nbytes
        self.scratch = kernel_calls.aligned(each * threads)
        # FP8 and FP4 layers round their input, except the grouped output: the same kernels
        rounds = kind in ("fp8", "fp4")
        self.args = common.Products(
            linear=native.address(f"linear_{'few' if few else 'many'}_{kind}"),
            quant=native.address("act_quant") if rounds else None,
            flush=native.address("act_flush"), x=self.x.ctypes.data,
            operands=self.operands.ctypes.data, out=self.out.ctypes.data,
            scratch=self.scratch.ctypes.data, n_weight=chunk, n_tok=n_tok, n_thread=threads,
        )
        self.run(0)
        common.check(
            f"dsv4 {shape}", self.out[:, :CHECKED_ROWS],
            common.from_bf16(self.operands) @ values_of(block, kind, rows, cols).T, 1e-3)

    def first(self, i: int) -> int:
        """The first weight of chunk i, going round the pool."""
        return i % max(1, self.count // self.chunk) * self.chunk

    def run(self, i: int) -> float:
        """Seconds per product."""
        self.args.weights = C.cast(
            C.byref(self.weights, self.first(i) * C.sizeof(kernel_calls.Weight)),
            C.POINTER(kernel_calls.Weight))
        return float(self.native.lib.products_seconds(C.byref(self.args))) / self.chunk

    def read(self, i: int) -> float:
        """Seconds to read the bytes of a product and do nothing with them."""
        return self.stride / self.reading.rate()


# ---- ggml ----

class InitParams(C.Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", C.c_size_t), ("mem_buffer", C.c_void_p), ("no_alloc", C.c_bool)]


POINTER, SIZE, INT = C.c_void_p, C.c_size_t, C.c_int
PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "init": (POINTER, [InitParams]),
    "free": (None, [POINTER]),
    "new_tensor_2d": (POINTER, [POINTER, INT, C.c_int64, C.c_int64]),
    "mul_mat": (POINTER, [POINTER] * 3),
    "new_graph_custom": (POINTER, [POINTER, SIZE, C.c_bool]),
    "build_forward_expand": (None, [POINTER, POINTER]),
    "nbytes": (SIZE, [POINTER]),
    "tensor_overhead": (SIZE, []),
    "graph_overhead_custom": (SIZE, [SIZE, C.c_bool]),
    "backend_cpu_init": (POINTER, []),
    "backend_cpu_set_n_threads": (None, [POINTER, INT]),
    "backend_cpu_buffer_type": (POINTER, []),
    "backend_buft_name": (C.c_char_p, [POINTER]),
    "backend_alloc_ctx_tensors_from_buft": (POINTER, [POINTER, POINTER]),
    "backend_buffer_free": (None, [POINTER]),
    "backend_tensor_set": (None, [POINTER, POINTER, SIZE, SIZE]),
    "backend_tensor_get": (None, [POINTER, POINTER, SIZE, SIZE]),
    "backend_graph_compute": (INT, [POINTER, POINTER]),
    "version": (C.c_char_p, []),
    "log_set": (None, [POINTER, POINTER]),
    "backend_cpu_reg": (POINTER, []),
    "backend_reg_dev_get": (POINTER, [POINTER, SIZE]),
    "backend_reg_get_proc_address": (POINTER, [POINTER, C.c_char_p]),
}


class Ggml:
    """The few functions of ggml's C API that one product needs, as attributes."""

    def __init__(self, folder: Path) -> None:
        files = [folder / f"libggml{part}.so" for part in ("-base", "-cpu", "")]
        libraries = [C.CDLL(str(f), mode=C.RTLD_GLOBAL) for f in files if f.exists()]
        for name, (result, arguments) in PROTOTYPES.items():
            full = f"ggml_{name}"
            found = next((getattr(lib, full) for lib in libraries if hasattr(lib, full)), None)
            if found is None:
                raise common.Missing(f"{folder} has no {full}: {INSTALL}")
            found.restype, found.argtypes = result, arguments
            setattr(self, name, found)
        self.quiet = C.CFUNCTYPE(None, INT, C.c_char_p, POINTER)(lambda level, text, data: None)
        self.log_set(C.cast(self.quiet, POINTER), None)
        self.backend = self.backend_cpu_init()
        self.layouts = {"plain": self.backend_cpu_buffer_type()}
        reg = self.backend_cpu_reg()
        get = C.CFUNCTYPE(C.POINTER(C.c_void_p), C.c_void_p)(
            self.backend_reg_get_proc_address(reg, b"ggml_backend_dev_get_extra_bufts"))
        extra, i = get(self.backend_reg_dev_get(reg, 0)), 0
        while extra and extra[i]:
            if b"REPACK" in self.backend_buft_name(extra[i]).upper():
                self.layouts["repack"] = extra[i]
            i += 1

    def __getattr__(self, name: str) -> Any:  # for type checkers: set in __init__
        raise AttributeError(name)

    def context(self, tensors: int, graph: int = 0) -> int:
        """A context without data."""
        size = self.tensor_overhead() * (tensors + 8)
        size += self.graph_overhead_custom(graph, False) if graph else 0
        return int(self.init(InitParams(size, None, True)))


def ggml_weight(kind: str, rows: int, cols: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """A weight as ggml stores it, and its first rows as float32."""
    n = CHECKED_ROWS
    if kind == "F32":
        f = rng.standard_normal((rows, cols), np.float32) * np.float32(0.02)
        return f, f[:n]
    if kind == "BF16":
        bits = common.bf16(rng.standard_normal((rows, cols), np.float32) * np.float32(0.02))
        return bits, common.from_bf16(bits[:n])
    if kind == "MXFP4":  # 17 bytes per 32: e8m0, then j in the low nibble of byte j, j + 16 high
        raw = rng.integers(0, 256, (rows, cols // 32, 17), np.uint8)
        raw[:, :, 0] = rng.integers(118, 124, (rows, cols // 32))
        q, e = raw[:n, :, 1:], raw[:n, :, :1].astype(np.float32) - 127
        return raw, (np.concatenate([E2M1[q & 15], E2M1[q >> 4]], 2) * np.exp2(e)).reshape(n, cols)
    raw = rng.integers(0, 256, (rows, cols // 32, 34), np.uint8)  # Q8_0: f16 scale, 32 int8
    scale = np.float16(0.0003)
    raw[:, :, :2] = scale.reshape(1).view(np.uint8)
    raw[:, :, 2:][raw[:, :, 2:] == 128] = 127
    values = raw[:n, :, 2:].view(np.int8).astype(np.float32) * np.float32(scale)
    return raw, values.reshape(n, cols)


class Theirs:
    """The same for ggml: one graph per chunk, one node per product."""

    def __init__(
        self, g: Ggml, shape: Shape, kind: str, layout: str, n_tok: int, threads: int, pool: int,
        chunk: int,
    ) -> None:
        rng = np.random.default_rng(1)
        self.g, self.chunk = g, chunk
        data, first = ggml_weight(kind, shape.rows, shape.cols, rng)
        chunks = max(1, -(-pool // data.nbytes) // chunk)
        count = chunks * chunk
        self.contexts = [g.context(count)]
        tensors = [
            g.new_tensor_2d(self.contexts[0], TYPE_ID[kind], shape.cols, shape.rows)
            for _ in range(count)
        ]
        assert g.nbytes(tensors[0]) == data.nbytes
        self.buffers = [g.backend_alloc_ctx_tensors_from_buft(self.contexts[0], g.layouts[layout])]
        for t in tensors:
            g.backend_tensor_set(t, data.ctypes.data, 0, data.nbytes)
        x = rng.standard_normal((n_tok, shape.cols), np.float32)
        work = g.context(1 + count)
        self.contexts.append(work)
        inp = g.new_tensor_2d(work, 0, shape.cols, n_tok)
        products = [g.mul_mat(work, t, inp) for t in tensors]
        plain = g.layouts["plain"]
        self.buffers.append(g.backend_alloc_ctx_tensors_from_buft(work, plain))
        g.backend_tensor_set(inp, x.ctypes.data, 0, x.nbytes)
        self.graphs = []
        for c in range(chunks):
            size = max(64, 4 * chunk + 16)
            context = g.context(4, size)
            graph = g.new_graph_custom(context, size, False)
            for y in products[c * chunk : (c + 1) * chunk]:
                g.build_forward_expand(graph, y)
            self.contexts.append(context)
            self.graphs.append(graph)
        g.backend_cpu_set_n_threads(g.backend, threads)
        self.run(0)
        y = np.zeros((n_tok, shape.rows), np.float32)
        g.backend_tensor_get(products[0], y.ctypes.data, 0, y.nbytes)
        common.check(f"ggml {kind} {layout} {shape}", y[:, :CHECKED_ROWS], x @ first.T)

    def run(self, i: int) -> float:
        """Seconds per product."""
        graph = self.graphs[i % len(self.graphs)]
        start = common.time.perf_counter()
        status = self.g.backend_graph_compute(self.g.backend, graph)
        seconds = common.time.perf_counter() - start
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute: status {status}, 0 was expected")
        return seconds / self.chunk

    def free(self) -> None:
        """Gives the memory back."""
        for buffer in self.buffers:
            self.g.backend_buffer_free(buffer)
        for context in self.contexts:
            self.g.free(context)


# ---- the comparison ----

@dataclass
class Sum:
    """Seconds of one class for one token, round by round."""

    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    bytes: float = 0.0
    flops: float = 0.0

    def add(self, other: "Sum") -> None:
        """Adds another class."""
        pairs = (self.ours, other.ours), (self.peer, other.peer), (self.read, other.read)
        for mine, more in pairs:
            mine[:] = [a + b for a, b in zip(mine or [0.0] * len(more), more, strict=True)]
        self.bytes += other.bytes
        self.flops += other.flops


def load() -> tuple[Ggml, str]:
    """The library and its name."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.origin:
        raise common.Missing(f"llama-cpp-python is not installed: {INSTALL}")
    folder = Path(os.environ.get("GGML_LIB", Path(spec.origin).parent / "lib"))
    g = Ggml(folder)
    return g, f"ggml {g.version().decode()} (llama-cpp-python {common.version('llama-cpp-python')})"


def one_shape(
    native: Native, g: Ggml, shape: Shape, n_tok: int, threads: int, rounds: int, pool: int
) -> Sum:
    """Alternated samples of one shape, times its count."""
    flops = 2.0 * shape.rows * shape.cols * n_tok
    chunk = max(1, int(96e6 / shape.n_bytes)) if n_tok <= FEW else max(1, int(4e9 / flops))
    chunk = min(chunk, max(1, pool // shape.n_bytes))
    ours = Ours(native, shape, n_tok, threads, pool, chunk)
    theirs = {
        f"{kind} {layout}": Theirs(g, shape, kind, layout, n_tok, threads, pool, chunk)
        for kind, layout in AS_GGML[shape.kind]
        if layout in g.layouts and not (n_tok <= FEW and (shape.kind, kind) == ("fp8", "BF16"))
    }
    runs = {"ours": ours.run, **{name: t.run for name, t in theirs.items()}}
    if n_tok <= FEW:
        runs["read"] = ours.read
    samples = common.alternate(runs, rounds)
    for t in theirs.values():
        t.free()
    best = common.fastest(samples)
    n = shape.count
    times = {name: median(s) for name, s in samples.items()}
    per = (lambda t: f"{shape.n_bytes / t / 1e9:7.1f} GB/s") if n_tok <= FEW else (
        lambda t: f"{flops / t / 1e9:7.0f} GFLOP/s")
    print(
        f"  {shape.kind:4} {shape.rows:6} x {shape.cols:5} {n_tok:4} tok {n:6.0f} times"
        + "".join(f"  {name} {per(t)}" for name, t in times.items())
        + f"  {common.times_faster(samples['ours'], samples[best]):.2f} x", file=sys.stderr)
    read = samples.get("read", [0.0] * len(samples["ours"]))
    return Sum(
        [n * t for t in samples["ours"]], [n * t for t in samples[best]], [n * t for t in read],
        n * shape.n_bytes, n * flops)


def rows_of(name: str, total: Sum, n_tok: int, threads: int, peer: str, peak: float) -> Row:
    """One row of the table."""
    ours, peers = median(total.ours), median(total.peer)
    amount, unit = (total.bytes, "GB/s") if n_tok <= FEW else (total.flops, "GFLOP/s")
    limit = amount / median(total.read) / 1e9 if n_tok <= FEW else peak
    value = amount / ours / 1e9
    note = f"{ours * 1e3:.1f} ms against {peers * 1e3:.1f} ms, {total.bytes / 1e9:.2f} GB"
    if n_tok <= FEW:
        note += f"; at the limit {common.times_faster(total.read, total.peer):.2f} x"
    return Row(
        name, value, unit, limit, value / limit, amount / peers / 1e9,
        common.times_faster(total.ours, total.peer), peer, threads, note)


def measure(n_tok: int, threads: int, rounds: int, only: str | None = None) -> list[Row]:
    """All classes and their sum: one token is decode, more are prefill (without the head)."""
    g, peer = load()
    native = Native()
    pool = 4 * last_level_cache()
    if n_tok <= FEW:
        pool = max(pool, 512 << 20)
    sums: dict[str, Sum] = {}
    peaks = [common.peak(threads)]
    for shape in token_shapes(n_tok > FEW):
        name = next(c for c, kinds in CLASSES.items() if shape.kind in kinds)
        if only and name != only:
            continue
        found = one_shape(native, g, shape, n_tok, threads, rounds, pool)
        sums.setdefault(name, Sum()).add(found)
    peaks.append(common.peak(threads))
    few = "few" if n_tok <= FEW else "many"
    print("  kernels: " + ", ".join(
        f"{kind} {native.name(f'linear_{few}_{kind}')}" for kind in CODE), file=sys.stderr)
    what = "decode" if n_tok <= FEW else "prefill"
    rows = [
        rows_of(f"{what}_{name}_vs_ggml", s, n_tok, threads, peer, max(peaks))
        for name, s in sums.items()
    ]
    if not only:
        total = Sum()
        for s in sums.values():
            total.add(s)
        rows.append(rows_of(f"{what}_vs_ggml", total, n_tok, threads, peer, max(peaks)))
    return rows
