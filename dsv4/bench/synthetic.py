# SPDX-License-Identifier: Apache-2.0
"""Models of the published dimensions with random weights, in memory: for time, not for text.

Every tensor the config asks for is there, in the official formats and in files laid out as
safetensors writers do (in memory: memfd_create), with codes and scales of ordinary size, so that
values stay finite through all layers and every token chooses experts of its own.  What such a model
says means nothing; how long it takes is what a real one takes.

With `expert_sets` all layers and experts are there in less memory: the experts of that many layers
serve all, in turn, and the other weights of a layer are those of the first of its kind.  Between
two reads of the same byte a step still reads the layers in between, gigabytes of other ones, so
each read comes from memory as if every layer had bytes of its own.
"""

import json
import math
import os
import struct
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dsv4 import layout, memory
from dsv4.checkpoint import Checkpoint, Shard, TensorInfo, _Files
from dsv4.config import Config
from dsv4.loading import _options, engine
from dsv4.memory import size
from dsv4.model import Model
from dsv4.shard import DTYPE_BITS

MODELS = ("flash", "pro")
QUICK_LAYERS, QUICK_EXPERTS = 4, 8
USED_IDS = 8192  # embedding rows beyond these ids are left out: the memory is never touched
POOL_BYTES = 64 << 20  # of random bytes, from which tensors are copied at changing offsets
SMALL_POOL_BYTES = 4 << 20  # of scales and of f32
PIECE_BYTES = 16 << 20
LEFT_FREE = 1 << 30
CONTEXT = 1 << 20  # of the one long session there must be room for
BATCH = 64
MODELS_AT_ONCE = 3  # the whole, with one thread, and some layers: weights are shared, buffers not
FP8_SIGMA, FP4_SIGMA = 60.0, 2.0  # of codes, as scaling a block's largest value to the top gives
MIDDLE = 127  # the E8M0 byte of 1

Bytes = npt.NDArray[np.uint8]


def published(model: str) -> dict[str, Any]:
    """The published config of "flash" or "pro", as in config.json.

    Examples
    --------
    >>> published("flash")["hidden_size"]
    4096
    """
    if model not in MODELS:
        raise ValueError(f"model: got {model!r}, wanted one of {', '.join(MODELS)}")
    text = Path(__file__).with_name(f"{model}.json").read_text()
    config: dict[str, Any] = json.loads(text)
    return config


def kinds(config: Mapping[str, Any]) -> list[tuple[int, bool]]:
    """(compress ratio, whether hashed) of every layer."""
    n, hashed = config["num_hidden_layers"], config["num_hash_layers"]
    return [(config["compress_ratios"][i], i < hashed) for i in range(n)]


def choose(config: Mapping[str, Any], layers: int) -> list[int]:
    """So many layers, ascending: the first of each kind, then further ones in their order."""
    found = kinds(config)
    first = sorted({found.index(kind) for kind in found})
    if not len(first) <= layers <= len(found):
        raise ValueError(
            f"layers: got {layers}, wanted {len(first)} (one of each kind) to {len(found)}")
    others = [i for i in range(len(found)) if i not in first]
    return sorted(first + others[: layers - len(first)])


def configure(
    config: Mapping[str, Any], *, experts: int | None = None, layers: int | None = None
) -> dict[str, Any]:
    """A config with fewer layers, at least one of each kind, or fewer experts, and no draft.

    Parameters
    ----------
    config : mapping
        As in config.json.
    experts : int, optional
        Routed experts of each layer.
    layers : int, optional
        How many; which, see `choose`.

    Examples
    --------
    >>> small = configure(published("flash"), layers=4, experts=8)
    >>> small["compress_ratios"], small["num_hash_layers"]
    ([0, 4, 128, 4], 2)
    """
    chosen = choose(config, config["num_hidden_layers"] if layers is None else layers)
    kept = [kinds(config)[i] for i in chosen]
    count = config["n_routed_experts"]
    least = config["num_experts_per_tok"]
    if experts is not None and not least <= experts <= count:
        raise ValueError(f"experts: got {experts}, wanted {least} to {count}")
    return dict(
        config, num_hidden_layers=len(kept), compress_ratios=[ratio for ratio, _ in kept],
        num_hash_layers=sum(hashed for _, hashed in kept),
        n_routed_experts=count if experts is None else experts, num_nextn_predict_layers=0,
    )


# ---- layers that share bytes ----

def _lent(config: Mapping[str, Any], expert_sets: int | None) -> list[tuple[int, int]]:
    """Of every layer: whose routed experts it has, and whose other tensors."""
    found = kinds(config)
    if expert_sets is None:
        return [(i, i) for i in range(len(found))]
    if not 1 <= expert_sets <= len(found):
        raise ValueError(f"expert_sets: got {expert_sets}, wanted 1 to {len(found)}")
    return [(i % expert_sets, found.index(kind)) for i, kind in enumerate(found)]


def _source(name: str, lent: list[tuple[int, int]]) -> str:
    """The tensor whose bytes this one has: itself, or that of another layer."""
    words = name.split(".")
    if words[0] == "layers":
        experts, rest = lent[int(words[1])]
        words[1] = str(experts if ".ffn.experts." in name else rest)
    return ".".join(words)


# ---- what fits ----

class Need(NamedTuple):
    """Bytes: of one expert in every layer, of everything else that is filled, and at run time."""

    expert: int
    rest: int
    run: int

    def total(self, experts: int) -> int:
        return self.expert * experts + self.rest + self.run


def need(config: Mapping[str, Any], expert_sets: int | None = None) -> Need:
    """What a model of this config takes, weights that are never touched left out."""
    c = Config.from_json(dict(config, n_routed_experts=config["num_experts_per_tok"]))
    lent = _lent(config, expert_sets)
    expert = rest = 0
    for name, (dtypes, shape) in layout.expected(c).items():
        if _source(name, lent) != name:
            continue
        n = _nbytes(next(iter(dtypes)), shape)
        if ".experts." in name:
            expert += n
        else:
            rest += _filled(name, n, c)
    long = sum(memory.state_bytes(c, min(CONTEXT, c.max_position_embeddings)).values())
    many = BATCH * sum(memory.state_bytes(c, min(4096, c.max_position_embeddings)).values())
    run = max(long, many) + MODELS_AT_ONCE * memory.step_workspace(c, BATCH)
    return Need(expert // c.num_experts_per_tok, rest, run)


def fitting(
    config: Mapping[str, Any], free: int | None = None, expert_sets: int | None = None
) -> int:
    """Experts per layer that fit into the free memory with a rest left over, maybe none."""
    free = memory.available_memory() if free is None else free
    needs = need(config, expert_sets)
    left = free - LEFT_FREE - free // 20 - needs.rest - needs.run
    return int(max(0, min(left // needs.expert, config["n_routed_experts"])))


def check_fits(
    config: Mapping[str, Any], free: int | None = None, expert_sets: int | None = None
) -> None:
    """MemoryError with what is needed, what is free and what would fit."""
    free = memory.available_memory() if free is None else free
    needs, experts = need(config, expert_sets), config["n_routed_experts"]
    if needs.total(experts) <= free:
        return
    fits = fitting(config, free, expert_sets)
    layers = config["num_hidden_layers"]
    what = f"--experts {fits} would fit" if fits >= config["num_experts_per_tok"] else (
        "--quick needs less" if layers > QUICK_LAYERS else "nothing would fit")
    raise MemoryError(
        f"memory: {layers} layers of {experts} experts need {size(needs.total(experts))}, free "
        f"{size(free)}; {what}")


# ---- contents ----

class _Pools:
    """Random bytes of each kind, made when first asked for."""

    def __init__(self, seed: int, most: int) -> None:
        self.seed, self.most = seed, most
        self.made: dict[tuple[str, int], Bytes] = {}
        self.lock = threading.Lock()

    def get(self, kind: str, parameter: int) -> Bytes:
        """The pool of a kind; the parameter is the middle of scales, the width of numbers."""
        with self.lock:
            key = kind, parameter
            if key not in self.made:
                rng = np.random.default_rng([self.seed, len(kind), parameter])
                table = getattr(self, f"_{kind}")(rng, parameter)
                largest = SMALL_POOL_BYTES if kind in ("scale", "f32") else POOL_BYTES
                count = min(max(2 * self.most, 1 << 20), largest) // table.itemsize
                picks = np.frombuffer(rng.bytes(2 * count), np.uint16)
                self.made[key] = table[picks].view(np.uint8)
            return self.made[key]

    @staticmethod
    def _fp8(rng: np.random.Generator, _: int) -> npt.NDArray[Any]:
        """65,536 e4m3 codes of a normal distribution."""
        codes = np.arange(127)
        exponent, mantissa = codes >> 3, codes & 7
        values = np.where(
            exponent == 0, mantissa / 512, (8 + mantissa) * 2.0 ** (exponent - 10.0))
        return _nearest(rng, values, FP8_SIGMA, 65536, 0x80)

    @staticmethod
    def _fp4(rng: np.random.Generator, _: int) -> npt.NDArray[Any]:
        """65,536 pairs of e2m1 codes."""
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        codes = _nearest(rng, values, FP4_SIGMA, 2 * 65536, 8)
        return codes[::2] | codes[1::2] << 4

    @staticmethod
    def _scale(rng: np.random.Generator, middle: int) -> npt.NDArray[Any]:
        return (middle + rng.choice([-1, 0, 0, 1], 65536)).astype(np.uint8)

    @staticmethod
    def _f32(rng: np.random.Generator, width: int) -> npt.NDArray[Any]:
        return rng.standard_normal(65536, np.float32) / np.float32(math.sqrt(width))

    @classmethod
    def _bf16(cls, rng: np.random.Generator, width: int) -> npt.NDArray[Any]:
        return (cls._f32(rng, width).view(np.uint32) >> 16).astype(np.uint16)


def _nearest(
    rng: np.random.Generator, values: npt.NDArray[Any], sigma: float, n: int, sign: int
) -> Bytes:
    """n codes of normal numbers: the index of the nearest value, with a sign bit."""
    numbers = rng.standard_normal(n) * sigma
    codes = np.searchsorted((values[1:] + values[:-1]) / 2, np.abs(numbers))
    return (codes | np.where(numbers < 0, sign, 0)).astype(np.uint8)


def _middle(sigma: float, width: int) -> int:
    """The E8M0 byte that makes weights of codes of this sigma 1/sqrt(width)."""
    return MIDDLE + round(math.log2(1 / (sigma * math.sqrt(width))))


def _kind(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[str, int] | None:
    """The pool of a tensor and its parameter; None for those of `_small`."""
    if dtype == "F8_E4M3":
        return "fp8", 0
    if dtype == "I8":
        return "fp4", 0
    if dtype == "F8_E8M0":
        if ".ffn.experts." in name:
            return "scale", _middle(FP4_SIGMA, 32 * shape[1])
        return "scale", _middle(FP8_SIGMA, 128 * shape[1])
    if len(shape) < 2 or dtype == "I64":
        return None
    return ("bf16" if dtype == "BF16" else "f32"), 1 if name == "embed.weight" else shape[1]


def _small(name: str, shape: tuple[int, ...], config: Config) -> bytes:
    """Vectors and tables: norms of ones, mixes near their middle, no preferred expert."""
    if name.endswith("tid2eid"):
        n, k = shape
        first = np.random.default_rng(n).integers(0, config.n_routed_experts, (n, 1))
        return ((first + np.arange(k)) % config.n_routed_experts).astype("<i8").tobytes()
    if name.endswith("norm.weight"):
        return np.full(shape, 0x3F80, np.uint16).tobytes()
    values = np.full(shape, 0.1 if name.endswith("_scale") else 0.0, np.float32)
    return values.tobytes()


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def _filled(name: str, nbytes: int, config: Config) -> int:
    """How many bytes of a tensor are written."""
    if name == "embed.weight":
        return min(nbytes, nbytes // config.vocab_size * USED_IDS)
    return nbytes


# ---- files ----

def _parts(
    config: Mapping[str, Any]
) -> tuple[Config, list[dict[str, tuple[str, tuple[int, ...]]]]]:
    """Names, dtypes and shapes of each file: the trunk, then the layers."""
    c = Config.from_json(config)
    parts: list[dict[str, tuple[str, tuple[int, ...]]]] = [
        {} for _ in range(c.num_hidden_layers + 1)]
    for name, (dtypes, shape) in layout.expected(c).items():
        words = name.split(".")
        part = 1 + int(words[1]) if words[0] == "layers" else 0
        parts[part][name] = next(iter(dtypes)), shape
    return c, parts


def table(config: Mapping[str, Any]) -> tuple[Config, list[TensorInfo]]:
    """The tensors a model of this config has, nothing built."""
    c, parts = _parts(config)
    return c, [
        TensorInfo(name, dtype, shape, i, 0, _nbytes(dtype, shape))
        for i, tensors in enumerate(parts) for name, (dtype, shape) in tensors.items()]


def build(
    config: Mapping[str, Any], *, seed: int = 0,
    progress: Callable[[int, int], object] | None = None, expert_sets: int | None = None,
) -> Checkpoint:
    """A checkpoint of this config in memory.

    Parameters
    ----------
    config : mapping
        As in config.json; official formats, no draft blocks.
    seed : int
        The same seed gives the same bytes.
    progress : function of (bytes done, bytes in all), optional
    expert_sets : int, optional
        Only the experts of so many layers are there, for all layers in turn, and the other tensors
        of the first layer of each kind; by default every tensor has bytes of its own.

    Returns
    -------
    Checkpoint
        Its shards are files in memory: one for each layer that has bytes of its own and one for the
        rest.

    Raises
    ------
    MemoryError
        It does not fit; says what is needed, what is free and what would fit.
    ValueError
        More sets than layers, or none.

    Examples
    --------
    >>> from dsv4 import nano
    >>> with build(configure(nano.CONFIG, experts=nano.CONFIG["num_experts_per_tok"])) as tiny:
    ...     len(tiny.shards) == tiny.config.num_hidden_layers + 1
    True
    """
    check_fits(config, expert_sets=expert_sets)
    c, parts = _parts(config)
    lent = _lent(config, expert_sets)
    sources = {name: _source(name, lent) for part_tensors in parts for name in part_tensors}
    own = [{name: what for name, what in part_tensors.items() if sources[name] == name}
           for part_tensors in parts]
    own = [part_tensors for part_tensors in own if part_tensors]
    files = _Files()
    shards: list[Shard] = []
    tensors: dict[str, TensorInfo] = {}
    try:
        for i, part_tensors in enumerate(own):
            shard, infos = _create(i, len(own), part_tensors, files)
            shards.append(shard)
            tensors.update({info.name: info for info in infos})
        _fill(c, shards, tensors, seed, progress)
    except BaseException:
        files.close()
        raise
    return Checkpoint(
        folder=Path("synthetic"), config=c, shards=tuple(shards),
        tensors=MappingProxyType({name: tensors[source]._replace(name=name)
                                  for name, source in sources.items()}),
        draft=None, draft_blocks=0, formats=layout.OFFICIAL, warnings=(), _files=files,
    )


def _create(
    index: int, count: int, tensors: Mapping[str, tuple[str, tuple[int, ...]]], files: _Files
) -> tuple[Shard, list[TensorInfo]]:
    """One file with its header; wide types first, then by name, as the writers of files do."""
    header: dict[str, Any] = {}
    infos = []
    at = 0
    for name in sorted(tensors, key=lambda n: (-DTYPE_BITS[tensors[n][0]], n)):
        dtype, shape = tensors[name]
        n = _nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + n]}
        infos.append(TensorInfo(name, dtype, shape, index, at, n))
        at += n
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    name = f"model-{index + 1:05}-of-{count:05}.safetensors"
    fd = os.memfd_create(name)
    files.fds.append(fd)
    os.ftruncate(fd, start + at)
    os.pwrite(fd, struct.pack("<Q", len(text)) + text, 0)
    infos = [info._replace(offset=info.offset + start) for info in infos]
    return Shard(name, Path("synthetic") / name, start + at, fd, start), infos


def _fill(
    config: Config, shards: list[Shard], tensors: Mapping[str, TensorInfo], seed: int,
    progress: Callable[[int, int], object] | None,
) -> None:
    """Writes every tensor: shards side by side, each with its own random numbers."""
    sizes = {name: _filled(name, info.nbytes, config) for name, info in tensors.items()}
    total = sum(sizes.values())
    pools = _Pools(seed, max(sizes.values()))
    stop = threading.Event()
    done = 0

    def fill_shard(shard: Shard, infos: list[TensorInfo]) -> int:
        rng = np.random.default_rng([seed, infos[0].shard])
        for info in infos:
            if stop.is_set():
                break
            _write(shard.fd, info, sizes[info.name], config, pools, rng, stop)
        return sum(sizes[info.name] for info in infos)

    workers = min(16, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers) as executor:
        try:
            jobs = [
                executor.submit(fill_shard, shard, [t for t in tensors.values() if t.shard == i])
                for i, shard in enumerate(shards)]
            for job in jobs:
                done += job.result()
                if progress is not None:
                    progress(done, total)
        except BaseException:
            stop.set()
            executor.shutdown(cancel_futures=True)
            raise


def _write(
    fd: int, info: TensorInfo, n: int, config: Config, pools: _Pools, rng: np.random.Generator,
    stop: threading.Event,
) -> None:
    kind = _kind(info.name, info.dtype, info.shape)
    if kind is None:
        _write_all(fd, memoryview(_small(info.name, info.shape, config)), info.offset)
        return
    pool = memoryview(pools.get(*kind))  # type: ignore[arg-type]
    at = 0
    while at < n and not stop.is_set():
        piece = min(PIECE_BYTES, n - at, len(pool))
        first = int(rng.integers(0, (len(pool) - piece) // 4 + 1)) * 4
        _write_all(fd, pool[first : first + piece], info.offset + at)
        at += piece


def _write_all(fd: int, data: memoryview, at: int) -> None:
    while data:
        n = os.pwrite(fd, data, at)
        data, at = data[n:], at + n


def part(checkpoint: Checkpoint, layers: int) -> Checkpoint:
    """Some layers of a checkpoint made by `build`, as `configure` chooses them: the same memory.

    The checkpoint must stay open as long as the part is loaded from.

    Examples
    --------
    >>> from dsv4 import nano
    >>> with build(configure(nano.CONFIG, experts=nano.CONFIG["num_experts_per_tok"])) as tiny:
    ...     part(tiny, 4).config.num_hidden_layers
    4
    """
    c = checkpoint.config
    raw = {name: getattr(c, name) for name in (
        "num_hidden_layers", "num_hash_layers", "compress_ratios", "n_routed_experts",
        "num_experts_per_tok")}
    chosen = choose(raw, layers)
    ratios = tuple(c.compress_ratios[i] for i in chosen)
    config = replace(
        c, num_hidden_layers=len(chosen), compress_ratios=ratios,
        num_hash_layers=sum(i < c.num_hash_layers for i in chosen))
    new = {old: i for i, old in enumerate(chosen)}
    tensors = {}
    for name, info in checkpoint.tensors.items():
        words = name.split(".")
        if words[0] == "layers":
            if int(words[1]) not in new:
                continue
            words[1] = str(new[int(words[1])])
        tensors[".".join(words)] = info._replace(name=".".join(words))
    return replace(
        checkpoint, config=config, tensors=MappingProxyType(tensors), _files=_Files())


# ---- models ----

def load(
    checkpoint: Checkpoint, threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Model:
    """A model of a checkpoint made by `build`, whose files must stay open meanwhile only.

    Examples
    --------
    >>> from dsv4 import nano
    >>> config = configure(nano.CONFIG, experts=nano.CONFIG["num_experts_per_tok"])
    >>> with build(config) as tiny, load(tiny, threads=1) as model:
    ...     model.session().append([1, 2, 3]).shape[0]
    1
    """
    options = _options("cpu", threads, "official", True, False, False)
    needs = memory.plan(checkpoint.config, context=1)
    return Model(engine(checkpoint, options, progress), checkpoint, None, {}, needs, options)
