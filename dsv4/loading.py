# SPDX-License-Identifier: Apache-2.0
"""From a folder or a hub id to a model.

The folder is read and checked (`dsv4.checkpoint`), what it needs is compared with what is free,
and the tensors are handed to the engine, which uses them where they lie.  Source: DESIGN 5, 7.
"""

import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dsv4 import _core, devices, hub, placement
from dsv4.checkpoint import Checkpoint, TensorInfo
from dsv4.config import Config
from dsv4.device_names import named, numbers
from dsv4.errors import BackendUnavailable, DeviceError, FormatError
from dsv4.files import Folder
from dsv4.memory import check_bytes, fitting, plan
from dsv4.model import Model
from dsv4.progress import bar
from dsv4.sampling import GENERATION_CONFIG_FILE
from dsv4.tokenizer import TOKENIZER_FILE, Tokenizer

DEFAULT_MODEL = Path(__file__).parent / "default_model"
MAX_THREADS = 4096
CHECK_PROMPT = tuple(range(5, 18))  # of a device: windows of 4 close in it
_checked: set[tuple[str, ...]] = set()  # plugins and the devices that gave the CPU's bits together
NUMERICS = {"official": 0, "weights": 1}
# safetensors dtype -> enum dsv4_dtype of csrc/dsv4.h
DTYPES = {"I64": 0, "I32": 1, "F32": 2, "F16": 3, "BF16": 4, "F8_E4M3": 5, "F8_E8M0": 6, "F4": 7}
MAX_GENERATION_CONFIG_BYTES = 1 << 20
# the memory a load asks for includes one sequence of so many tokens (or the model's longest)
USUAL_CONTEXT = 4096


def load(
    path: str | os.PathLike[str] | None = None, *, device: str = "auto",
    threads: int | None = None, numerics: str = "official", mmap: bool = True,
    memory: int | None = None, gpu_memory: int | None = None, verify: str | None = None,
    revision: str | None = None, local_files_only: bool = False, april_kv: bool = False,
    april_shared: bool = False, exact: bool = True,
) -> Model:
    """Load a model.

    Parameters
    ----------
    path : path or str, optional
        A checkpoint folder, or a hub id such as "deepseek-ai/DeepSeek-V4-Flash".  Without it, the
        small model inside the package.
    device : str
        Where it runs: "auto", "cpu", "cuda" (GPU 0), "cuda:1" (that GPU) or "cuda:0,1" (the layers
        are split over these GPUs, in this order, so that the fullest is as empty as can be; this
        needs NCCL).  "auto" is GPU 0, or the CPU where that cannot be used, and `repr` of the model
        says why.  GPUs give the CPU's bits; traces, edits and layers called alone are computed on
        the CPU beside them.
    threads : int, optional
        Threads of its team; by default DSV4_NUM_THREADS, then OMP_NUM_THREADS, then one per
        physical core this process may use.  It changes the speed, never a bit of the results.
    numerics : "official" or "weights"
        "official" computes what the published code does, rounding points included; "weights" does
        not round the inputs of linear layers to FP8.
    mmap : bool
        Use the weights where the files are mapped (on machines with several memory nodes: copies of
        them, each row on the node that computes it, if there is memory for all).  False reads all
        into memory of this process: for file systems on which files may shrink while they are used.
    memory : int, optional
        Most bytes to use for weights, state and work; what is free by default.  If it needs more,
        routed experts come from disk: those used most are kept, the others are read when they are
        chosen.  It changes the speed, never a bit of the results; `Model.plan` says what is kept.
    gpu_memory : int, optional
        Most bytes of each GPU for weights, a step and one session of usual length; without it all
        that is free, but for a sixteenth (at most 4 GiB) that is left to sessions.  Routed experts
        that do not fit there stay in host memory: the CPU computes their rows, or they are uploaded
        where a prompt has many.  Those that earlier runs used most are on a GPU
        (`dsv4.placement`).  It changes the speed, never a bit of the results.
    verify : "crc" or "sha256", optional
        Compare all weights with their checksums first (`dsv4.checksums`).
    revision : str, optional
        Branch, tag or commit of a hub id.
    local_files_only : bool
        Never use the network.
    april_kv, april_shared : bool
        Repeat two deviations of the code published in April: KV rows not rounded to FP8, the
        shared expert not clamped.
    exact : bool
        False lets a GPU compute prompts (and appends of several tokens) on its tensor cores, which
        add in another order than the CPU: the numbers differ within the noise of any other order
        of the same sums.  They do not depend on what else is in a step, nor on how a prompt is cut,
        but on the GPU's architecture.  Generated tokens and appends of one have the CPU's sums
        still; what a rewind computes again counts as a prompt, and what runs on the CPU (steps
        with edits, layers called alone) is exact.  A saved session says which it is; one of the
        other kind is refused.  On the CPU nothing changes.

    Returns
    -------
    Model

    Raises
    ------
    FormatError
        A file is not what it says: names the file, tensor and rule.
    FileNotFoundError
        There is no such folder, or no such repository.
    MemoryError
        It does not fit; says what is needed, what is free and what would fit.
    DeviceError
        The device failed.
    BackendUnavailable
        The device is not available: says why, and what to do.
    ValueError, TypeError
        An argument out of range.

    Notes
    -----
    DSV4_CPU_DISABLE=avx512,... leaves instruction sets unused.  On a terminal a progress bar is
    shown, unless DSV4_DISABLE_PROGRESS is set; nothing else is printed.

    Examples
    --------
    >>> import dsv4
    >>> with dsv4.load() as model:
    ...     model.config.num_hidden_layers > 5
    True
    """
    options = _options(device, threads, numerics, mmap, april_kv, april_shared, exact)
    if memory is not None:
        memory = check_bytes(memory, "memory")
    if gpu_memory is not None:
        options["gpu_bytes"] = check_bytes(gpu_memory, "gpu_memory")
    if verify not in (None, "crc", "sha256"):
        raise ValueError(f"verify: got {verify!r}, wanted 'crc', 'sha256' or None")
    if path is None:
        folder = DEFAULT_MODEL
    else:
        folder = hub.resolve(path, revision, local_files_only)
    with Checkpoint.open(folder) as checkpoint:
        if verify is not None:
            from dsv4 import checksums

            checksums.verify(folder, verify)
        context = min(USUAL_CONTEXT, checkpoint.config.max_position_embeddings)
        needs = fitting(plan(folder, context=context), mmap, memory)
        if needs.experts_in_memory < needs.experts:
            options["expert_bytes"] = needs.experts_in_memory * needs.expert_bytes
        else:
            options["copy_to_nodes"] = int(mmap)
        tokenizer, defaults = _text_files(folder, checkpoint.config)
        uses = _Uses(checkpoint, options)
        with _Progress(str(folder)) as progress:
            core = _on_device(checkpoint, options, progress, device)
        if options["use_cuda"]:
            needs = replace(needs, device=named(options["cuda_devices"]), gpu_memory=gpu_memory,
                            on_gpu=core.placement["experts_on_device"])
        model = Model(core, checkpoint, tokenizer, defaults, needs, options)
        uses.keep(model)
        return model


def kernel_info() -> dict[str, str]:
    """Which variant of each operation this machine runs.

    Returns
    -------
    dict of str to str
        Operation to variant: "ref" is portable C, the others are named after the instruction set
        they need.  All give the same bits.  DSV4_CPU_DISABLE is honoured.

    Raises
    ------
    ValueError
        DSV4_CPU_DISABLE names an unknown instruction set.

    Examples
    --------
    >>> import dsv4
    >>> set(dsv4.kernel_info().values()) != set()
    True
    """
    variants = _core.kernel_variants(os.environ.get("DSV4_CPU_DISABLE") or None)
    return {op: variant for op, variant, _, chosen in variants if chosen}


def _options(
    device: object, threads: object, numerics: object, mmap: object, april_kv: object,
    april_shared: object, exact: object = True,
) -> dict[str, Any]:
    if not isinstance(numerics, str) or numerics not in NUMERICS:
        raise ValueError(f"numerics: got {numerics!r}, wanted 'official' or 'weights'")
    flags = {"mmap": mmap, "april_kv": april_kv, "april_shared": april_shared, "exact": exact}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: got {value!r}, wanted True or False")
    n_thread = _thread_count(threads)
    chosen, why_cpu = devices.choose(device)
    return dict(
        numerics=NUMERICS[numerics], april_kv=int(april_kv is True),
        april_shared=int(april_shared is True), n_thread=n_thread, chunk_tok=0,
        use_mmap=int(mmap is True), expert_bytes=0,
        copy_to_nodes=0, why_cpu=why_cpu, use_cuda=int(chosen == "cuda"), gpu_bytes=0,
        tensor_cores=int(exact is False),
        cuda_devices=numbers(device) or (0,), cuda_plugin=str(devices.PLUGIN),
        cuda_driver=devices.DRIVER, nccl=devices.nccl(),
        disable=os.environ.get("DSV4_CPU_DISABLE") or None,
    )


def _thread_count(threads: object) -> int:
    """The number asked for, by argument or environment; 0 for the engine's own choice."""
    if threads is not None:
        if isinstance(threads, bool) or not isinstance(threads, int | np.integer):
            raise TypeError(f"threads: got {type(threads).__name__}, wanted an int or None")
        if not 1 <= threads <= MAX_THREADS:
            raise ValueError(f"threads: got {threads}, wanted 1 to {MAX_THREADS}")
        return int(threads)
    value = os.environ.get("DSV4_NUM_THREADS")
    if value:
        if not value.isdecimal() or not 1 <= int(value[:9]) <= MAX_THREADS:
            raise ValueError(f"DSV4_NUM_THREADS: got {value!r}, wanted 1 to {MAX_THREADS}")
        return int(value)
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    usable = first.isdecimal() and 1 <= int(first[:9]) <= MAX_THREADS
    return int(first) if usable else 0


def _text_files(folder: Path, config: Config) -> tuple[Tokenizer | None, dict[str, Any]]:
    """The tokenizer and the sampling defaults of a folder, as far as it has them."""
    tokenizer = None
    defaults: dict[str, Any] = {"eos_token_id": config.eos_token_id}
    with Folder(folder) as files:
        if files.has(GENERATION_CONFIG_FILE):
            found = files.read_json(GENERATION_CONFIG_FILE, MAX_GENERATION_CONFIG_BYTES)
            if not isinstance(found, dict):
                raise FormatError(file=GENERATION_CONFIG_FILE, rule="JSON",
                                  got=type(found).__name__, wanted="an object")
            defaults |= {k: v for k, v in found.items() if v is not None}
        if files.has(TOKENIZER_FILE):
            tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise FormatError(file=TOKENIZER_FILE, rule="ids", got=f"{tokenizer.vocab_size} ids",
                          wanted=f"at most vocab_size = {config.vocab_size}")
    return tokenizer, defaults


def _on_device(
    checkpoint: Checkpoint, options: dict[str, Any],
    progress: Callable[[int, int], object] | None, device: str,
) -> _core.Model:
    """The engine on the device chosen; where that was left open, on the CPU if the GPU refuses."""
    try:
        if options["use_cuda"]:
            if options["expert_bytes"]:
                raise MemoryError("CUDA: routed experts from disk run on the CPU alone; use "
                                  "device='cpu', or more memory")
            _check_devices(options)
        return engine(checkpoint, options, progress)
    except (BackendUnavailable, DeviceError, MemoryError) as error:
        if device != "auto" or not options["use_cuda"]:
            raise
        options |= {"use_cuda": 0, "why_cpu": str(error)}
        return engine(checkpoint, options, progress)


class _Uses:
    """The counts of routed experts of a model that is to run on a GPU (`dsv4.placement`)."""

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any]) -> None:
        c = checkpoint.config
        self.shape, self.chosen = (c.num_hidden_layers, c.n_routed_experts), c.num_experts_per_tok
        if options["use_cuda"]:
            self.key = placement.fingerprint(checkpoint)
            counted = placement.read(self.key, self.shape)
            options["hot"] = None if counted is None else placement.order(counted)

    def keep(self, model: Model) -> None:
        """Have them saved when the model is closed, if some of its experts are not on the GPU."""
        if model.plan.experts_on_gpu < model.plan.experts and model.device != "cpu":
            model._keep_uses = weakref.finalize(
                model, placement.save, model._core, self.key, self.shape, self.chosen, os.getpid())


def _check_devices(options: dict[str, Any]) -> None:
    """DeviceError unless each device, and all of them together, give the CPU's bits for the model
    inside the package.

    A prompt and a token behind it, which go through kernels of every kind; once in a process.
    """
    plugin, gpus = options["cuda_plugin"], options["cuda_devices"]
    with Checkpoint.open(DEFAULT_MODEL) as small:
        most = small.config.num_hidden_layers
        groups = [(gpu,) for gpu in gpus]
        groups += [gpus[i:i + most] for i in range(0, len(gpus) - 1, most - 1)]
        groups = [group for group in groups if (plugin, *map(str, group)) not in _checked]
        right = _check_logits(small, options | {"use_cuda": 0}) if groups else b""
        for group in groups:
            if _check_logits(small, options | {"cuda_devices": group}) != right:
                which = f"device {group[0]} gives" if len(group) == 1 else (
                    f"devices {', '.join(map(str, group))} together give")
                raise DeviceError(
                    f"CUDA: {which} other numbers than the CPU for the model inside the package, "
                    "where every bit should be the same; use device='cpu', and please report it")
            _checked.add((plugin, *map(str, group)))


def _check_logits(checkpoint: Checkpoint, options: dict[str, Any]) -> bytes:
    """The bits of CHECK_PROMPT's last logits and those of a token behind it."""
    given = b""
    core = engine(checkpoint, options | {
        "expert_bytes": 0, "tensor_cores": 0, "gpu_bytes": 0, "hot": None})
    try:
        session = _core.Session(core, 0)
        for ids in CHECK_PROMPT, CHECK_PROMPT[:1]:
            ((logits, _),) = core.step([(session, np.array(ids, np.int32), 1, None)], None)
            assert logits is not None
            given += logits.tobytes()
        session.close()
    finally:
        core.close()
    return given


def engine(
    checkpoint: Checkpoint, options: dict[str, Any],
    progress: Callable[[int, int], object] | None = None,
) -> _core.Model:
    """Hand a checkpoint to the engine, which maps it, binds every tensor and reads every scale."""
    return _core.Model(
        engine_config(checkpoint.config),
        [(shard.name, shard.fd, shard.size) for shard in checkpoint.shards],
        [engine_tensor(info) for info in checkpoint.tensors.values()], options, progress,
    )


def engine_config(config: Config) -> dict[str, Any]:
    """The fields of struct dsv4_config."""
    scaling = config.rope_scaling
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
        "qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "moe_intermediate_size",
        "n_routed_experts", "num_experts_per_tok", "num_hash_layers", "sliding_window",
        "index_n_heads", "index_head_dim", "index_topk", "hc_mult", "hc_sinkhorn_iters",
        "max_position_embeddings", "rope_theta", "compress_rope_theta", "rms_norm_eps", "hc_eps",
        "routed_scaling_factor", "swiglu_limit", "compress_ratios",
    )
    return {name: getattr(config, name) for name in same} | {
        "yarn_factor": scaling.factor, "yarn_beta_fast": scaling.beta_fast,
        "yarn_beta_slow": scaling.beta_slow,
        "yarn_original_positions": scaling.original_max_position_embeddings,
    }


def engine_tensor(info: TensorInfo) -> tuple[str, int, tuple[int, ...], int, int, int]:
    """One row of the table for the engine: bytes are E8M0 scales or pairs of FP4 codes."""
    dtype, shape = info.dtype, info.shape
    if dtype in ("I8", "U8"):
        dtype = "F8_E8M0" if info.name.endswith(".scale") else "F4"
        if dtype == "F4":
            shape = (*shape[:-1], 2 * shape[-1])
    return info.name, DTYPES[dtype], shape, info.shard, info.offset, info.nbytes


class _Progress:
    """A bar on a terminal for loads that take longer than half a second; else nothing.

    The engine calls it with bytes done and bytes in all.
    """

    def __init__(self, name: str, doing: str = "loading") -> None:
        self.name = f"{doing} {name}"
        self.bar: Any = None

    def __enter__(self) -> Callable[[int, int], None] | None:
        self.bar = bar(desc=self.name, unit="B", unit_scale=True, delay=0.5, leave=False)
        return None if self.bar is None else self._show

    def _show(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.close()
