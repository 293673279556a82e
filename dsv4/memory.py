# SPDX-License-Identifier: Apache-2.0
"""How many bytes a model needs, by part, before anything is read; and whether they are there.

Weights are counted from the shard headers, or from the config alone.  The state of a sequence is
counted from the storage formats of the engine: KV rows (unrotated part in FP8, one scale byte per
64, rotated part in bf16, padded to 8 bytes: 584 for the published models), index rows (FP4 and one
scale byte per 32: 68), and the f32 rows of the open compressor windows.  Source: SPEC 3.10-3.11.

What does not fit stays on disk: rows of the embedding are read when their token occurs, draft
blocks never, and routed experts are kept in the memory that the rest leaves, and read when they are
chosen and not there (csrc/model/experts.h).
"""

import math
import os
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsv4 import _core, hub
from dsv4.checkpoint import Checkpoint
from dsv4.config import CSA_RATIO, Config
from dsv4.device_names import named, numbers
from dsv4.layout import FP8, OFFICIAL, expected
from dsv4.shard import DTYPE_BITS

# tokens per pass, as the engine picks them: enough for an expert to see so many, within limits
TOKENS_PER_EXPERT, MIN_CHUNK, MAX_CHUNK = 48, 512, 4096
BF16, F32 = 2, 4
LOGIT_ROWS = 32
# parts that a step does not read as a whole
NOT_ALWAYS_READ = ("routed experts", "embedding", "draft")
# an expert in memory: six tensors, each read from and to a multiple of 4096 bytes
EXPERT_EDGES = 6 * 2 * 4096
# what attention grows to on a GPU; an entry of its tables of experts (struct dsv4_weight)
GPU_SCRATCH, EXPERT_ENTRY = 256 << 20, 32
# page tables, buffers, the interpreter: what no part counts; less for small models
MARGIN = 256 << 20

PARTS = (
    "routed experts", "shared experts", "attention", "compressors and indexer",
    "hyper-connections", "router", "norms", "embedding", "head", "draft",
)


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers that are computed on one GPU.

    Attributes
    ----------
    device : int
        CUDA's number of it.
    first, end : int
        Layers first to end - 1; the first stage has the embedding too, the last one the head.
    weight_bytes, work_bytes : int
        Their weights, and a step's intermediate values, which each GPU has.
    """

    device: int
    first: int
    end: int
    weight_bytes: int
    work_bytes: int

    def __str__(self) -> str:
        layers = f"layers {self.first} to {self.end - 1}"
        if self.end == self.first + 1:
            layers = f"layer {self.first}"
        return f"{layers}, {size(self.weight_bytes)}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes by part.  `str(plan)` is a table, `as_dict()` the same for machines.

    Attributes
    ----------
    weights : dict of str to int
        Bytes of the tensors, by part of the model.
    state : dict of str to int
        Bytes of one sequence of `context` tokens.
    workspace : int
        Bytes of one step's intermediate values.
    context, batch : int
        Tokens per sequence, and sequences.
    device : str
    memory : int or None
        Bytes it may use; None: as many as it needs.
    gpu_memory : int or None
        Bytes of each GPU it may use, for device "cuda"; None: as many as it needs.
    on_gpu : int or None
        Of a model that is loaded: how many routed experts are on GPUs.
    layers : tuple of int
        Bytes of the tensors of each layer, with those of the embedding for the first and those of
        the head for the last.
    """

    config: Config
    weights: dict[str, int]
    state: dict[str, int]
    workspace: int
    context: int
    batch: int
    device: str
    memory: int | None = None
    gpu_memory: int | None = None
    on_gpu: int | None = None
    layers: tuple[int, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.weights.values())

    @property
    def state_bytes(self) -> int:
        """Bytes of all `batch` sequences."""
        return self.batch * sum(self.state.values())

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.weight_bytes + self.state_bytes + self.workspace

    @property
    def always_read(self) -> int:
        """Bytes of the weights that each step reads: without routed experts, embedding, draft."""
        return sum(n for part, n in self.weights.items() if part not in NOT_ALWAYS_READ)

    @property
    def experts(self) -> int:
        """Routed experts of all layers."""
        return self.config.num_hidden_layers * self.config.n_routed_experts

    @property
    def expert_bytes(self) -> int:
        """Bytes of one routed expert in memory, when it is not used where it is mapped."""
        return -(-self.weights["routed experts"] // self.experts) + EXPERT_EDGES

    @property
    def experts_in_memory(self) -> int:
        """Routed experts that `memory` has room for, beside all else; those of one token in one
        layer at least."""
        if self.memory is None or self.total <= self.memory:
            return self.experts
        room = (self.memory - self._all_but_experts) // self.expert_bytes
        least = min(self.config.num_experts_per_tok, self.experts)
        return max(least, min(self.experts - 1, room))

    @property
    def resident(self) -> int:
        """Bytes that stay in memory: `total`, or what `memory` leaves room for."""
        if self.experts_in_memory == self.experts:
            return self.total
        return self._all_but_experts + self.experts_in_memory * self.expert_bytes

    @property
    def _all_but_experts(self) -> int:
        """Bytes in memory beside routed experts, when those come from disk."""
        rest = self.always_read + self.state_bytes + self.workspace
        return rest + min(MARGIN, rest // 16)

    @property
    def gpus(self) -> tuple[int, ...]:
        """Numbers of the GPUs, in the order of their layers; none for device "cpu"."""
        return numbers(self.device)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """How the layers are split over the GPUs: the largest share of its memory that one of them
        needs for weights and workspace is as small as it can be.  They count as equally large here;
        `load` goes by what is free on each."""
        if not self.gpus:
            return ()
        room = self.gpu_memory or 1 << 40
        ends = _core.split(list(self.layers), self.workspace, [room] * len(self.gpus))
        return tuple(
            Stage(gpu, first, end, sum(self.layers[first:end]), self.workspace)
            for gpu, first, end in zip(self.gpus, [0, *ends], ends, strict=False))

    @property
    def places(self) -> dict[str, dict[str, int]]:
        """Bytes by place and part, for device "cuda": the GPU has all but the routed experts that
        `gpu_memory` leaves no room for and the draft blocks, which are not run."""
        if not self.gpus:
            return {}
        weights = self.weights
        kept = weights["routed experts"] * self.experts_on_gpu // self.experts
        way = self.gpu_on_the_way if self.experts_on_gpu < self.experts else 0
        gpu = {
            "weights each token reads": self.always_read, "embedding": weights["embedding"],
            "routed experts": kept, "experts on their way": way, "state": self.state_bytes,
            "workspace": len(self.gpus) * (self.workspace + GPU_SCRATCH),
        }
        return {"gpu": gpu, "host": {"routed experts": weights["routed experts"] - kept}}

    @property
    def experts_on_gpu(self) -> int:
        """Routed experts that `gpu_memory` has room for beside all else; those that are there, of a
        model that is loaded."""
        if not self.gpus:
            return 0
        if self.on_gpu is not None:
            return self.on_gpu
        room = None if self.gpu_memory is None else (
            len(self.gpus) * self.gpu_memory - self.gpu_always)
        if room is None or room >= self.weights["routed experts"]:
            return self.experts
        each = -(-self.weights["routed experts"] // self.experts)
        return max(0, min(self.experts - 1, (room - self.gpu_on_the_way) // each))

    @property
    def gpu_on_the_way(self) -> int:
        """Bytes on the GPUs for experts that are not there: two slots, their tables, counters."""
        if not self.gpus or self.on_gpu == self.experts:
            return 0
        c, each = self.config, -(-self.weights["routed experts"] // self.experts)
        tables = 2 * 3 * (c.n_routed_experts + 1) * c.num_hidden_layers * EXPERT_ENTRY
        return len(self.gpus) * (2 * each + tables + 8 * self.experts)

    @property
    def gpu_always(self) -> int:
        """Bytes that are on the GPUs whatever `gpu_memory` is."""
        rest = self.state_bytes + len(self.gpus) * (self.workspace + GPU_SCRATCH)
        return self.always_read + self.weights["embedding"] + rest

    @property
    def disk_per_token(self) -> tuple[int, int]:
        """Bytes read from disk for one token: on average if all experts are chosen equally often,
        and at most."""
        each = self.weights["routed experts"] / self.experts
        chosen = self.config.num_experts_per_tok * self.config.num_hidden_layers
        missing = self.experts - self.experts_in_memory
        return round(each * chosen * missing / self.experts), round(each * min(chosen, missing))

    @property
    def bytes_per_token(self) -> float:
        """Growth of one sequence per token, averaged over whole windows."""
        kv, index = kv_row_bytes(self.config), index_row_bytes(self.config)
        ratios = _main_ratios(self.config)
        return sum(kv / r for r in ratios if r) + index / CSA_RATIO * ratios.count(CSA_RATIO)

    def longest_context(self, free: int) -> int:
        """Tokens per sequence that fit into `free` bytes; 0 if not even one does."""
        left = (free - self.weight_bytes - self.workspace) // self.batch
        low, high = 0, self.config.max_position_embeddings
        while low < high:
            middle = (low + high + 1) // 2
            if sum(state_bytes(self.config, middle).values()) <= left:
                low = middle
            else:
                high = middle - 1
        return low

    def as_dict(self) -> dict[str, Any]:
        """All numbers, ready for json."""
        return dict(
            device=self.device, context=self.context, batch=self.batch,
            weights=dict(self.weights), weight_bytes=self.weight_bytes, state=dict(self.state),
            state_bytes=self.state_bytes, bytes_per_token=self.bytes_per_token,
            workspace=self.workspace, total=self.total, memory=self.memory, resident=self.resident,
            always_read=self.always_read, experts=self.experts,
            experts_in_memory=self.experts_in_memory, disk_per_token=list(self.disk_per_token),
            **(dict(gpu_memory=self.gpu_memory, experts_on_gpu=self.experts_on_gpu,
                    places=self.places, stages=[asdict(stage) for stage in self.stages])
               if self.gpus else {}),
        )

    def _disk_rows(self) -> list[tuple[str, int]]:
        kept, n = self.experts_in_memory, self.experts
        if kept == n:
            return [("  all of it stays in memory", self.resident)]
        mean, most = self.disk_per_token
        return [
            ("  stays in memory", self.resident),
            (f"  with {kept:,} of {n:,} routed experts", kept * self.expert_bytes),
            ("  from disk for a token, even routes", mean),
            ("  from disk for a token, at most", most),
        ]

    def __str__(self) -> str:
        each = f" x {self.batch}" if self.batch > 1 else ""
        rows = [("weights", self.weight_bytes), *_indented(self.weights)]
        rows += [(f"state of {self.context:,} tokens{each}", self.state_bytes)]
        rows += _indented({k: v * self.batch for k, v in self.state.items()})
        rows += [("workspace", self.workspace), (f"total ({self.device})", self.total)]
        if self.memory is not None:
            rows += [("memory to use", self.memory), *self._disk_rows()]
        for place, parts in self.places.items():
            rows += [(f"on the {place}", sum(parts.values())), *_indented(parts)]
        if len(self.gpus) > 1:
            rows += [(f"weights of GPU {s.device}: layers {s.first} to {s.end - 1}", s.weight_bytes)
                     for s in self.stages]
        if self.gpus and self.experts_on_gpu < self.experts:
            rows += [("GPU memory to use", len(self.gpus) * (self.gpu_memory or 0))]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {size(n):>10}" for name, n in rows)


def plan(
    path: str | os.PathLike[str] | Config, context: int | None = None, batch: int = 1,
    device: str = "cpu", *, memory: int | None = None, gpu_memory: int | None = None,
    workspace: Callable[[Config, int], int] | None = None,
) -> Plan:
    """Count the bytes a model needs, without reading a weight.

    Parameters
    ----------
    path : path, hub id or Config
        A folder is counted from its shard headers.  A Config or a hub id is counted from the
        config alone: official dtypes and all its draft blocks.
    context : int, optional
        Tokens per sequence; the model's longest by default.
    batch : int
        Sequences at the same time.
    device : str
        Where they are to be: "cpu", "cuda", "cuda:1", or "cuda:0,1" as for `load`.
    memory : int, optional
        Bytes it may use.  If it needs more, the plan says how many routed experts stay in memory
        and how much is read from disk; without it, all is counted as in memory.
    gpu_memory : int, optional
        Bytes of each GPU it may use, with device "cuda".  `Plan.places` says what lies where,
        `Plan.stages` which layers are on which GPU.
    workspace : function of (Config, batch), optional
        Bytes of a step's intermediate values; `step_workspace` by default.

    Raises
    ------
    ValueError
        For a context, batch, device, memory or gpu_memory out of range.
    FormatError
        If the folder is not a valid checkpoint.

    Examples
    --------
    >>> from dsv4 import nano
    >>> plan(Config.from_json(nano.CONFIG), context=4096).state["index rows"]
    139264
    >>> small = plan(Config.from_json(nano.CONFIG), context=4096, memory=1 << 28)
    >>> small.experts_in_memory < small.experts
    False
    """
    config, weights, layers = _weights(path)
    limit = config.max_position_embeddings
    context = limit if context is None else context
    for name, got, high in (("context", context, limit), ("batch", batch, 1 << 20)):
        if type(got) is not int or not 1 <= got <= high:
            raise ValueError(f"{name}: got {got!r}, wanted an integer from 1 to {high}")
    if memory is not None:
        memory = check_bytes(memory, "memory")
    if device == "auto":
        raise ValueError("device: got 'auto', wanted 'cpu', 'cuda' or GPUs by number")
    gpus = numbers(device)
    if len(gpus) > config.num_hidden_layers:
        raise ValueError(f"device: got {len(gpus)} GPUs, wanted at most "
                         f"{config.num_hidden_layers}: each has at least one layer")
    if gpu_memory is not None:
        gpu_memory = check_bytes(gpu_memory, "gpu_memory")
        if not gpus:
            raise ValueError(f"gpu_memory: got {gpu_memory} with device={device!r}, wanted 'cuda'")
    return Plan(
        config=config, weights=weights, state=state_bytes(config, context),
        workspace=(workspace or step_workspace)(config, batch), context=context, batch=batch,
        device=named(gpus) if gpus else "cpu", memory=memory, gpu_memory=gpu_memory,
        layers=layers,
    )


def kv_row_bytes(config: Config) -> int:
    """One KV row: FP8 codes, bf16 rotated part, a scale per 64, padded to 8 bytes."""
    nope = config.nope_head_dim
    return -(-(nope + 2 * config.qk_rope_head_dim + -(-nope // 64)) // 8) * 8


def index_row_bytes(config: Config) -> int:
    """One index row: FP4 codes and a scale per 32."""
    return config.index_head_dim // 2 + config.index_head_dim // 32


def state_bytes(config: Config, context: int) -> dict[str, int]:
    """Bytes of the state of one sequence of `context` tokens, by part."""
    kv, index = kv_row_bytes(config), index_row_bytes(config)
    ratios = _main_ratios(config)
    csa = ratios.count(CSA_RATIO)
    open_windows = sum(
        _state_rows(r, config.head_dim) + (r == CSA_RATIO) * _state_rows(r, config.index_head_dim)
        for r in ratios if r
    )
    return {
        "window rings": len(ratios) * config.sliding_window * kv,
        "compressed rows": sum(context // r * kv for r in ratios if r),
        "index rows": csa * (context // CSA_RATIO) * index,
        "compressor states": open_windows,
    }


def _state_rows(ratio: int, head_dim: int) -> int:
    """Bytes of the k and gate rows of one compressor: twice as many and as wide if overlapping."""
    rows, width = (2 * ratio, 2 * head_dim) if ratio == CSA_RATIO else (ratio, head_dim)
    return rows * width * 2 * F32


def _main_ratios(config: Config) -> tuple[int, ...]:
    return config.compress_ratios[: config.num_hidden_layers]


def step_workspace(config: Config, batch: int) -> int:
    """Upper estimate of the buffers of a pass, whatever the batch: it may take several passes."""
    c, tokens = config, chunk_tokens(config)
    streams = (c.hc_mult + 5) * c.hidden_size
    heads = 2 * c.num_attention_heads * c.head_dim + 2 * c.index_n_heads * c.index_head_dim
    narrow = 4 * c.q_lora_rank + 2 * c.o_groups * c.o_lora_rank + 12 * c.head_dim
    experts = (c.num_experts_per_tok + 1) * (2 * c.moe_intermediate_size + c.hidden_size)
    router = 4 * c.n_routed_experts + 2 * c.index_topk
    return (BF16 * tokens * (streams + heads + narrow + experts + router)
            + F32 * LOGIT_ROWS * (c.vocab_size + c.hidden_size))


def chunk_tokens(config: Config) -> int:
    """Tokens of one pass."""
    wanted = TOKENS_PER_EXPERT * config.n_routed_experts // config.num_experts_per_tok
    return max(MIN_CHUNK, min(MAX_CHUNK, wanted))


def part_of(name: str) -> str:
    """The part of the model an official tensor name belongs to.

    Examples
    --------
    >>> part_of("layers.2.ffn.gate.bias")
    'router'
    """
    for start, part in (("mtp.", "draft"), ("embed.", "embedding"), ("head.", "head"),
                        ("norm.", "norms"), ("hc_head_", "hyper-connections")):
        if name.startswith(start):
            return part
    inside = name.split(".", 2)[2]
    for start, part in (("ffn.experts.", "routed experts"), ("ffn.shared", "shared experts"),
                        ("ffn.gate.", "router"), ("attn.compressor.", "compressors and indexer"),
                        ("attn.indexer.", "compressors and indexer"), ("attn.", "attention"),
                        ("hc_", "hyper-connections")):
        if inside.startswith(start):
            return part
    return "norms"


def _weights(path: str | os.PathLike[str] | Config) -> tuple[
        Config, dict[str, int], tuple[int, ...]]:
    """The config; bytes by part, and by layer."""
    if not isinstance(path, Config):
        folder = hub.resolve(path, weights=False)
        if not hub.is_repo_id(path) and folder.is_dir():
            with Checkpoint.open(folder) as checkpoint:
                sizes = {info.name: info.nbytes for info in checkpoint.tensors.values()}
                return checkpoint.config, *_by_part_and_layer(sizes, checkpoint.config)
        path = Config.from_json(folder)
    blocks = len(path.compress_ratios) - path.num_hidden_layers
    formats = OFFICIAL._replace(expert=FP8) if path.expert_dtype == "fp8" else OFFICIAL
    draft = "dspark" if path.dspark_block_size else "mtp"
    sizes = {}
    for name, (dtypes, shape) in expected(path, draft, blocks, formats).items():
        (dtype,) = dtypes
        sizes[name] = math.prod(shape) * DTYPE_BITS[dtype] // 8
    return path, *_by_part_and_layer(sizes, path)


def _by_part_and_layer(
    sizes: dict[str, int], config: Config
) -> tuple[dict[str, int], tuple[int, ...]]:
    parts, layers = dict.fromkeys(PARTS, 0), [0] * config.num_hidden_layers
    for name, nbytes in sizes.items():
        parts[part_of(name)] += nbytes
        if name.startswith("layers."):
            layers[int(name.split(".", 2)[1])] += nbytes
        elif not name.startswith("mtp."):
            layers[0 if name.startswith("embed.") else -1] += nbytes
    return parts, tuple(layers)


def check_bytes(value: object, name: str) -> int:
    """A number of bytes, at least 1; ValueError or TypeError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a number of bytes or None")
    if not 1 <= value < 1 << 52:
        raise ValueError(f"{name}: got {value}, wanted a number of bytes from 1 to 2^52")
    return int(value)


def _indented(parts: dict[str, int]) -> list[tuple[str, int]]:
    return [(f"  {name}", n) for name, n in parts.items() if n]


def size(n: float) -> str:
    """Bytes for a reader.

    Examples
    --------
    >>> size(159609485896)
    '148.65 GiB'
    """
    if n < 1024:
        return f"{n:.0f} B"
    power = min(4, math.floor(math.log2(n) / 10))
    return f"{n / 1024**power:.2f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


# ---- what is there ----

def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process can still get: the least of MemAvailable, cgroup limits, RLIMIT_AS."""
    physical = _field(proc / "meminfo", "MemAvailable:") * 1024
    return min(physical, *_cgroup_limits(proc, cgroup), address_space(proc))


def address_space(proc: Path = Path("/proc")) -> int:
    """Bytes this process can still map: what RLIMIT_AS leaves."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return 1 << 52
    return max(0, soft - _field(proc / "self" / "status", "VmSize:") * 1024)


def check_memory(needed: int | Plan, *, free: int | None = None) -> None:
    """Refuse a load that does not fit.

    Parameters
    ----------
    needed : int or Plan
        Bytes; a Plan lets the message say what would fit.
    free : int, optional
        Bytes that are there; `available_memory()` by default.

    Raises
    ------
    MemoryError
        With what is needed, what is free and what would fit.
    """
    free = available_memory() if free is None else free
    total = needed if isinstance(needed, int) else needed.total
    if total <= free:
        return
    fits = ""
    if isinstance(needed, Plan):
        longest = needed.longest_context(free)
        sequences = f" for {needed.batch} sequences" if needed.batch > 1 else ""
        fits = f"; a context of {longest:,} tokens{sequences} would fit"
        if longest == 0:
            rest = needed.weight_bytes + needed.workspace
            fits = f"; nothing would fit: weights and workspace alone need {size(rest)}"
    raise MemoryError(f"memory: needed {size(total)}, free {size(free)}{fits}")


def fitting(needs: Plan, mmap: bool, memory: int | None) -> Plan:
    """The plan to load by, or a refusal.

    Parameters
    ----------
    needs : Plan
    mmap : bool
        The weights stay in their files, so routed experts may stay on disk.
    memory : int or None
        Most bytes to use; what is free by default.

    Returns
    -------
    Plan
        `needs` where all of it fits, else the same with its `memory` set.

    Raises
    ------
    MemoryError
        With what is needed, and what is free or was allowed.
    """
    free = available_memory()
    allowed = free if memory is None else min(free, memory)
    if not mmap or needs.total <= allowed:
        check_memory(needs, free=min(allowed, address_space()))
        return needs
    needs = replace(needs, memory=allowed)
    if needs.resident > allowed:
        raise MemoryError(
            f"memory: needed {size(needs.resident)} (the weights that each token reads, its state, "
            f"workspace and {needs.experts_in_memory} of {needs.experts} routed experts), "
            f"{'free' if allowed == free else 'allowed'} {size(allowed)}")
    check_memory(needs.weight_bytes + needs.resident, free=address_space())
    return needs


def _field(path: Path, key: str) -> int:
    """The number after `key` in a file of lines; a very large one if there is none."""
    try:
        for line in path.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return 1 << 52


def _cgroup_limits(proc: Path, root: Path) -> list[int]:
    """What each memory limit around this process leaves, page cache counted as free."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage, cache = root, "memory.max", "memory.current", "inactive_file "
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file "
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            highest = _number(folder / limit)
            if highest is None:
                continue
            used = (_number(folder / usage) or 0) - _cache(folder / "memory.stat", cache)
            left.append(max(0, highest - max(0, used)))
    return left


def _number(path: Path) -> int | None:
    """The number in a file; None for "max" and for no such file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _cache(path: Path, key: str) -> int:
    found = _field(path, key)
    return 0 if found == 1 << 52 else found
