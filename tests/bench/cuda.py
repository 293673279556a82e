# SPDX-License-Identifier: Apache-2.0
"""V4-Flash's figures on a GPU, each beside what the same device can do in the same run.

    python tests/bench/cuda.py [--json] [--experts N] [--layers N] [--only NAME ...]

Limits: reading (a kernel that only reads, 4 GiB) and FP8 products (cuBLASLt, 8192 cubed, bf16 out),
measured before and after every figure, the better of the two; a row is the median of five.  Kernels
are timed as graphs of 64 launches over different weights, steps as Python sees them.  The model is
dsv4/bench/synthetic.py's, with as many experts per layer as host and GPU hold; its bytes per token
are those of all 256.  Needs nvcc for the kernel that reads; cuBLASLt comes with a toolkit or
NVIDIA's package nvidia-cublas, and without it the rows that need it say so.
"""

import argparse
import ctypes
import json
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "c"))
if "dsv4" not in sys.modules:  # a test has chosen which one
    sys.path.insert(0, str(ROOT))

import dsv4  # noqa: E402
from build import setup_constants  # noqa: E402
from dsv4 import devices, memory  # noqa: E402
from dsv4.bench import count, synthetic  # noqa: E402
from dsv4.bench.measure import Pair, Row, row  # noqa: E402
from dsv4.bench.report import number  # noqa: E402
from dsv4.checkpoint import Checkpoint  # noqa: E402
from dsv4.loading import _options, engine  # noqa: E402
from dsv4.model import Model  # noqa: E402

READ_BYTES, CUBE, LAUNCHES, REPEATS = 4 << 30, 8192, 64, 5
CONTEXT, PROMPT = 4096, 8192
LEFT_ON_GPU = 6 << 30  # for a pass, states and what the driver takes
# what is wanted of value / limit, or (decode) in the row's unit
WANTED = {"linear_fp8_1tok_wide": 0.75, "linear_fp8_1tok_long": 0.75, "experts_fp4_1tok": 0.60,
          "layer_4k": 0.5, "prefill_8k_inexact": 0.35}
WANTED_VALUE = {"decode_4k": 100.0}
NAMES = ("linear_fp8_1tok_wide", "linear_fp8_1tok_long", "experts_fp4_1tok", "layer_4k",
         "decode_4k", "prefill_8k", "prefill_8k_inexact")


# ---- the device ----

def build_library(folder: Path, architecture: str) -> Path:
    """cuda_kernels.cu by nvcc for one architecture, as in "9.0"."""
    constants = setup_constants()
    nvcc = constants["find_nvcc"]()
    if not nvcc:
        raise SystemExit("found no nvcc on PATH, in CUDA_HOME, in /usr/local/cuda or in Python's "
                         "packages: it compiles the kernel that reads")
    target = folder / "cuda_kernels.so"
    subprocess.run(
        [nvcc, *constants["CUDA_FLAGS"], f"-arch=sm_{architecture.replace('.', '')}",
         *(f"-I{ROOT / p}" for p in (".", "kernels", "kernels/cuda")), "-shared", "--cudart",
         "static", "-L", nvcc.resolve().parents[1] / "lib",
         ROOT / "tests" / "bench" / "cuda_kernels.cu", "-o", target], check=True)
    return target


class Device:
    """cuda_kernels.cu on the first device."""

    def __init__(self, library: Path) -> None:
        self.c = ctypes.CDLL(str(library))
        self.c.bench_error.restype = self.c.bench_device.restype = ctypes.c_char_p
        self.c.bench_memory.restype = self.c.bench_stream.restype = ctypes.c_void_p
        self.c.bench_read.restype = self.c.bench_run.restype = ctypes.c_double
        self.checked(self.c.bench_open(
            str(devices.PLUGIN).encode(), ctypes.c_uint64(READ_BYTES)) == 0)
        self.name = self.c.bench_device().decode()

    def checked(self, good: Any) -> Any:
        if not good:
            raise SystemExit(f"the device: {self.c.bench_error().decode()}")
        return good

    @contextmanager
    def work(self, name: str, *arguments: int) -> Iterator[Callable[[], float]]:
        """Seconds of an item of `bench_name(...)`, whose memory goes at the end."""
        try:
            self.checked(getattr(self.c, f"bench_{name}")(*map(ctypes.c_int32, arguments)) == 0)
            yield lambda: float(self.checked(self.c.bench_run()))
        finally:
            self.c.bench_done()

    def read(self) -> float:
        """Bytes a second."""
        return float(self.checked(self.c.bench_read()))

    def memory(self, nbytes: int) -> int:
        """That stays; to be asked for before any work."""
        return int(self.checked(self.c.bench_memory(ctypes.c_uint64(nbytes))))


# ---- cuBLASLt ----

def find_cublaslt() -> Path | str:
    """Where libcublasLt.so lies: in NVIDIA's Python package, or as the system finds it."""
    for folder in [*sys.path, sysconfig.get_path("platlib")]:
        for path in sorted(Path(folder or ".", "nvidia").glob("*/lib/libcublasLt.so.*")):
            return path
    return "libcublasLt.so.13"


class CublasLt:
    """FP8 (e4m3) products with bf16 results, A transposed, the best plan of its heuristic."""

    R_32F, R_16BF, R_8F_E4M3, COMPUTE_32F = 0, 14, 28, 68
    OP_T, DESC_TRANSA, MOST_WORKSPACE = 1, 3, 1
    WORKSPACE, RESULT_BYTES, AT_WORKSPACE_SIZE = 64 << 20, 96, 64

    def __init__(self, device: Device) -> None:
        self.device = device
        self.lib = ctypes.CDLL(str(find_cublaslt()))
        self.handle, self.desc, self.choice = (ctypes.c_void_p() for _ in range(3))
        self.call("Create", ctypes.byref(self.handle))
        self.call("MatmulDescCreate", ctypes.byref(self.desc), self.COMPUTE_32F, self.R_32F)
        transposed = ctypes.c_int32(self.OP_T)
        self.call("MatmulDescSetAttribute", self.desc, self.DESC_TRANSA, ctypes.byref(transposed),
                  ctypes.c_size_t(4))
        self.call("MatmulPreferenceCreate", ctypes.byref(self.choice))
        room = ctypes.c_uint64(self.WORKSPACE)
        self.call("MatmulPreferenceSetAttribute", self.choice, self.MOST_WORKSPACE,
                  ctypes.byref(room), ctypes.c_size_t(8))
        self.of_8 = self.layout(self.R_8F_E4M3)
        self.of_16 = self.layout(self.R_16BF)
        self.plan = (ctypes.c_char * self.RESULT_BYTES)()
        found = ctypes.c_int(0)
        self.call("MatmulAlgoGetHeuristic", self.handle, self.desc, self.of_8, self.of_8,
                  self.of_16, self.of_16, self.choice, 1, self.plan, ctypes.byref(found))
        if not found.value:
            raise OSError("no FP8 product for this device")
        self.memory = [ctypes.c_void_p(device.memory(n)) for n in (
            CUBE**2, CUBE**2, 2 * CUBE**2, self.WORKSPACE)]

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.lib, f"cublasLt{name}")(*arguments)
        if status:
            raise OSError(f"cublasLt{name} failed with status {status}")

    def layout(self, kind: int) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self.call("MatrixLayoutCreate", ctypes.byref(made), kind, ctypes.c_uint64(CUBE),
                  ctypes.c_uint64(CUBE), ctypes.c_int64(CUBE))
        return made

    def rate(self) -> float:
        """Operations a second."""
        one, zero, times = ctypes.c_float(1), ctypes.c_float(0), 10
        a, b, d, room = self.memory
        size = self.plan.raw[self.AT_WORKSPACE_SIZE:self.AT_WORKSPACE_SIZE + 8]
        used = ctypes.c_size_t(int.from_bytes(size, "little"))
        stream = ctypes.c_void_p(self.device.c.bench_stream())
        for n in (1, times):  # the first loads the kernel
            began = time.perf_counter()
            for _ in range(n):
                self.call("Matmul", self.handle, self.desc, ctypes.byref(one), a, self.of_8, b,
                          self.of_8, ctypes.byref(zero), d, self.of_16, d, self.of_16, self.plan,
                          room, used, stream)
            self.device.checked(self.device.c.bench_wait() == 0)
            seconds = time.perf_counter() - began
        return 2.0 * CUBE**3 * times / seconds


# ---- measuring ----

class Bench:
    """The device, its limits, and why one is missing."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.seen: dict[str, list[float]] = {"read": [], "fp8": []}
        self.details: dict[str, dict[str, Any]] = {}
        try:
            self.lt: CublasLt | None = CublasLt(device)
            self.no_lt = ""
        except (OSError, AttributeError) as error:
            self.lt, self.no_lt = None, f"cuBLASLt: {error}"

    def limit(self, kind: str) -> float | None:
        if kind == "fp8" and self.lt is None:
            return None
        found = self.device.read() if kind == "read" else self.lt.rate() if self.lt else 0.0
        self.seen[kind].append(found)
        return found

    def row(self, name: str, unit: str, amount: float, kind: str, cost: float,
            run: Callable[[], float]) -> Row:
        """amount in unit x seconds; cost in what the limit counts."""
        run()
        pairs = []
        for _ in range(REPEATS):
            before = self.limit(kind)
            seconds = run()
            after = self.limit(kind)
            pairs.append(Pair(seconds, None if before is None or after is None else
                              cost / max(before, after)))
        self.note(name, amount=amount, pairs=len(pairs))
        if kind == "fp8" and self.lt is None:
            self.note(name, no_limit=self.no_lt)
        return row(name, amount, unit, pairs)

    def note(self, name: str, **facts: Any) -> None:
        self.details.setdefault(name, {}).update(facts)


def kernels(bench: Bench, config: Mapping[str, Any], names: Sequence[str]) -> Iterator[Row]:
    """Single launches at the model's sizes: the queries' and the output's projection, experts."""
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    shapes = {"linear_fp8_1tok_wide": (heads, config["q_lora_rank"]),
              "linear_fp8_1tok_long": (hidden, config["o_groups"] * config["o_lora_rank"])}
    for name, (rows, cols) in shapes.items():
        if name in names:
            nbytes = rows * cols + -(-rows // 128) * -(-cols // 128)
            with bench.device.work("linear", rows, cols, LAUNCHES) as run:
                yield bench.row(name, "GB/s", nbytes / 1e9, "read", nbytes, run)
            bench.note(name, shape=[rows, cols])
    if "experts_fp4_1tok" in names:
        used = config["num_experts_per_tok"]
        nbytes = used * 3 * hidden * width // 2 * 17 // 16
        with bench.device.work("experts", hidden, width, used, LAUNCHES) as run:
            yield bench.row("experts_fp4_1tok", "GB/s", nbytes / 1e9, "read", nbytes, run)


@contextmanager
def loaded(checkpoint: Checkpoint, exact: bool = True) -> Iterator[Model]:
    options = _options("cuda", None, "official", True, False, False, exact)
    needs = memory.plan(checkpoint.config, context=1)
    with Model(engine(checkpoint, options, None), checkpoint, None, {}, needs, options) as model:
        yield model


def ids(config: Any, n: int) -> Any:
    return np.random.default_rng(n).integers(
        0, min(config.vocab_size, synthetic.USED_IDS), n).astype(np.int32)


def step(model: Model, session: Any, n: int) -> float:
    """Seconds of one step that appends n ids and wants the last logits."""
    began = time.perf_counter()
    model._core.step([(session._core, ids(model.config, n), 1, None)], None)
    return time.perf_counter() - began


@contextmanager
def decoding(checkpoint: Checkpoint) -> Iterator[tuple[Callable[[], float], int]]:
    """(seconds of one token near the context, bytes it has to read)."""
    c = checkpoint.config
    position = min(CONTEXT, c.max_position_embeddings) - 4 * REPEATS - 8
    with loaded(checkpoint) as model, model.session() as session:
        session._fill(position, 1)
        for _ in range(3):  # the state goes to the device, the shape is captured
            step(model, session, 1)
        found = count.weight_bytes(checkpoint.tensors.values(), c, position)
        found.update(count.state_bytes(c, position))
        yield lambda: step(model, session, 1), sum(found.values())


def steps(bench: Bench, checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[Row]:
    """Whole tokens, one further layer, prompts."""
    c = checkpoint.config
    few = synthetic.QUICK_LAYERS
    if {"decode_4k", "layer_4k"} & set(names):
        with decoding(checkpoint) as (run, nbytes):
            found = bench.row("decode_4k", "tokens/s", 1.0, "read", nbytes, run)
            bench.note("decode_4k", bytes=nbytes)
        if "layer_4k" in names and c.num_hidden_layers > few:
            with decoding(synthetic.part(checkpoint, few)) as (run, part_bytes):
                part = bench.row("decode_part", "tokens/s", 1.0, "read", part_bytes, run)
            layers, cost = c.num_hidden_layers - few, nbytes - part_bytes
            seconds = 1 / found.value - 1 / part.value
            read = max(bench.seen["read"])
            if seconds > 0:
                yield Row("layer_4k", cost / seconds / 1e9, "GB/s", read / 1e9,
                          cost / read / seconds)
            bench.note("layer_4k", bytes=cost / layers, seconds=seconds / layers)
        if "decode_4k" in names:
            yield found
    for name, exact in (("prefill_8k", True), ("prefill_8k_inexact", False)):
        if name not in names:
            continue
        n = min(PROMPT, c.max_position_embeddings)
        work = sum(count.prompt_work(checkpoint.tensors.values(), c, n))
        with loaded(checkpoint, exact) as model:
            def prompt(model: Model = model, n: int = n) -> float:
                with model.session() as session:
                    return step(model, session, n)
            yield bench.row(name, "GFLOP/s", work / 1e9, "fp8", work, prompt)


# ---- the report ----

def experts_that_fit(config: Mapping[str, Any], free: int) -> int:
    """By the GPU's free bytes and the host's."""
    c, tensors = synthetic.table(dict(config, n_routed_experts=config["num_experts_per_tok"]))
    expert = count.expert_bytes(tensors, c)
    rest = sum(t.nbytes for t in tensors) - expert * c.n_routed_experts
    on_gpu = (free - LEFT_ON_GPU - rest) // expert
    return int(max(config["num_experts_per_tok"], min(
        on_gpu, synthetic.fitting(config), config["n_routed_experts"])))


def table(rows: Sequence[Row], details: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{'':24}{'measured':>10}  {'limit':>10}  ratio  wanted"]
    for r in rows:
        limit = "-" if r.limit is None else number(r.limit)
        ratio = "    -" if r.ratio is None else f"{r.ratio:5.2f}"
        wanted = WANTED.get(r.name, WANTED_VALUE.get(r.name))
        why = details.get(r.name, {}).get("no_limit", "")
        lines.append(f"{r.name:24}{number(r.value):>10}  {limit:>10}  {ratio}  "
                     f"{'-' if wanted is None else f'{wanted:g}':>6}  {r.unit}  {why}".rstrip())
    return "\n".join(lines)


def measure(config: Mapping[str, Any], experts: int | None, names: Sequence[str],
            library: Path) -> dict[str, Any]:
    """Everything as `dsv4 bench --json` has it: machine, rows, details."""
    bench = Bench(Device(library))
    here = devices.find()
    rows = list(kernels(bench, config, names))
    engine_rows = [name for name in names if name.startswith(("layer", "decode", "prefill"))]
    fit = experts or experts_that_fit(config, here.devices[0].free_bytes)
    small = synthetic.configure(config, layers=config["num_hidden_layers"], experts=fit)
    if engine_rows:
        with synthetic.build(small) as checkpoint:
            rows += steps(bench, checkpoint, engine_rows)
    bench.limit("read")
    rates = {
        f"{kind}_g_s": float(np.median(seen)) / 1e9 for kind, seen in bench.seen.items() if seen}
    machine = {
        "device": str(here.devices[0]), "plugin": here.built, "system": platform.platform(),
        "dsv4": dsv4.__version__, "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "limits": rates, "cublaslt": bench.no_lt or str(find_cublaslt()),
        "model": {"layers": small["num_hidden_layers"], "experts": small["n_routed_experts"],
                  "full_experts": config["n_routed_experts"]},
    }
    return {"machine": machine, "rows": [r.as_dict() for r in rows], "details": bench.details}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--experts", type=int, help="per layer; as many as fit by default")
    parser.add_argument("--layers", type=int, help="all by default")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    options = parser.parse_args(arguments)
    found = devices.find()
    if found.state != "ready":
        raise SystemExit(f"no CUDA device can be used: {found.state}")
    config = synthetic.configure(synthetic.published("flash"), layers=options.layers)
    with tempfile.TemporaryDirectory() as folder:
        library = build_library(Path(folder), found.devices[0].architecture)
        report = measure(config, options.experts, options.only, library)
    if options.json:
        print(json.dumps(report, indent=1))
        return
    rows = [Row(**r) for r in report["rows"]]
    for key, value in report["machine"].items():
        print(f"{key:12}{value}")
    print(table(rows, report["details"]))


if __name__ == "__main__":
    main()
