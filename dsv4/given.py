# SPDX-License-Identifier: Apache-2.0
"""Weights that come as arrays, and the model of one layer in memory that is made of them.

They are copied once, into an anonymous file laid out like a shard, which the engine maps; so a
layer made here runs the same code as one of a checkpoint.  What its part does not use (embedding,
head, the other sublayer) is there as zeros of the smallest sizes, which take no memory.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dsv4 import _core, memory
from dsv4.memory import size
from dsv4.tensors import FP4_BLOCK, FP8_BLOCK, Tensor

Bytes = npt.NDArray[np.uint8]
ALIGN = 64
PIECE_BYTES = 64 << 20
HALF_BYTES = {"F32": 8, "F16": 4, "BF16": 4, "F8_E4M3": 2, "F8_E8M0": 2, "F4": 1, "I32": 8,
              "I64": 16}


class Weight(NamedTuple):
    """A tensor as the engine takes it: safetensors dtype, logical shape, bytes, maybe scales."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[Any]
    scale: "Weight | None" = None

    def wanted(self, **dims: int) -> "Weight":
        """Itself; ValueError unless it has these dimensions."""
        if self.shape != tuple(dims.values()):
            comma = "," if len(dims) == 1 else ""
            names = ", ".join(dims)
            raise ValueError(f"{self.name}: got shape {self.shape}, wanted ({names}{comma}) = "
                             f"{tuple(dims.values())}")
        return self

    def ranked(self, **dims: None) -> "Weight":
        """Itself; ValueError unless it has so many dimensions, none of them empty."""
        if len(self.shape) != len(dims) or 0 in self.shape:
            comma = "," if len(dims) == 1 else ""
            raise ValueError(f"{self.name}: got shape {self.shape}, wanted ({', '.join(dims)}"
                             f"{comma}), none of them 0")
        return self


def floats(name: str, value: Any) -> Weight:
    """float32, float16, bfloat16 (also as uint16 codes) or a Tensor of one of these."""
    if isinstance(value, Tensor):
        if value.dtype not in ("F32", "F16", "BF16"):
            raise TypeError(f"{name}: got a tensor of {value.dtype}, wanted F32, F16 or BF16")
        return Weight(name, value.dtype, value.shape, value.numpy())
    array = np.asarray(value)
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint16": "BF16"}
    dtype = kinds.get(array.dtype.name)
    if dtype is None:
        raise TypeError(f"{name}: got an array of {array.dtype}, wanted float32, float16, bfloat16 "
                        "or its codes as uint16")
    return Weight(name, dtype, array.shape, np.asarray(array, array.dtype.newbyteorder("=")))


def linear(name: str, value: Any) -> Weight:
    """The weight of a linear layer: `floats`, a pair (codes, scales), or a Tensor with scales."""
    if isinstance(value, Tensor) and value.dtype in ("F8_E4M3", "F4"):
        if value.scale is None or value._first:
            raise ValueError(f"{name}: got {value!r} without its scales, or rows of one; wanted a "
                             "whole tensor with scales")
        own = value.scale
        return _quantised(name, value.dtype, value.shape, value.numpy(),
                          Weight(f"{name} scales", own.dtype, own.shape, own.numpy()))
    if not isinstance(value, tuple):
        if not isinstance(value, Tensor) and np.asarray(value).dtype.itemsize == 1:
            raise TypeError(f"{name}: got codes without scales, wanted a pair (codes, scales)")
        return floats(name, value)
    if len(value) != 2:
        raise ValueError(f"{name}: got a tuple of {len(value)}, wanted a pair (codes, scales)")
    codes, scales = np.asarray(value[0]), np.asarray(value[1])
    if codes.dtype not in (np.dtype(np.uint8), np.dtype(np.int8)) or codes.ndim != 2:
        raise TypeError(f"{name}: got codes of {codes.dtype} with {codes.ndim} dimensions, wanted "
                        "two dimensions of uint8")
    kinds = {"uint8": "F8_E8M0", "float32": "F32", "bfloat16": "BF16", "uint16": "BF16"}
    if scales.dtype.name not in kinds:
        raise TypeError(f"{name} scales: got an array of {scales.dtype}, wanted uint8 (E8M0), "
                        "float32, bfloat16 or its codes as uint16")
    scale = Weight(f"{name} scales", kinds[scales.dtype.name], scales.shape, scales)
    n, k = codes.shape
    if scales.dtype == np.uint8 and scales.shape == (n, 2 * k // FP4_BLOCK) and (
            scales.shape != _blocks(n, k)):
        return _quantised(name, "F4", (n, 2 * k), codes, scale)
    return _quantised(name, "F8_E4M3", (n, k), codes, scale)


def stacked(name: str, value: Any, **dims: None) -> list[Weight]:
    """One weight for each expert: an array or pair with a first dimension more, or a list."""
    if isinstance(value, list):
        found = value
    elif isinstance(value, tuple) and len(value) == 2:
        codes, scales = np.asarray(value[0]), np.asarray(value[1])
        if codes.ndim != 3 or scales.ndim != 3 or len(codes) != len(scales):
            raise ValueError(
                f"{name}: got codes {codes.shape} and scales {scales.shape}, wanted three "
                "dimensions of each, (experts, ...)")
        found = list(zip(codes, scales, strict=True))
    else:
        array = floats(name, value)
        found = list(array.ranked(experts=None, **dims).data)
    if not found:
        raise ValueError(f"{name}: got none, wanted one for each expert")
    return [linear(f"{name}[{i}]", each).ranked(**dims) for i, each in enumerate(found)]


def _blocks(n: int, k: int) -> tuple[int, int]:
    return -(-n // FP8_BLOCK), -(-k // FP8_BLOCK)


def _quantised(
    name: str, dtype: str, shape: tuple[int, ...], codes: npt.NDArray[Any], scale: Weight
) -> Weight:
    if len(shape) != 2:
        raise ValueError(f"{name}: got shape {shape}, wanted two dimensions")
    wanted = _blocks(*shape)
    if dtype == "F4":
        if shape[1] % FP4_BLOCK:
            raise ValueError(f"{name}: got {shape[1]} columns of FP4, wanted a multiple of 32")
        wanted = shape[0], shape[1] // FP4_BLOCK
    if scale.shape != wanted:
        raise ValueError(
            f"{name} scales: got shape {scale.shape}, wanted {wanted} for FP8 codes of shape "
            f"{shape}, one for 128 x 128 (FP4: one for 32 of a row)")
    return Weight(name, dtype, shape, codes, scale)


def whole_number(name: str, value: object, low: int, high: int) -> int:
    """An int within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted an int")
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, wanted {low} to {high}")
    return int(value)


def number(name: str, value: object, low: float, high: float) -> float:
    """A number within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a number")
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, wanted {low:g} to {high:g}")
    return float(value)


# ---- the model of one layer ----

# the smallest sizes that the engine takes, for what a part does not use
SMALLEST: dict[str, Any] = dict(
    vocab_size=1, hidden_size=1, num_hidden_layers=1, num_attention_heads=1, head_dim=2,
    qk_rope_head_dim=2, q_lora_rank=1, o_groups=1, o_lora_rank=1, moe_intermediate_size=1,
    n_routed_experts=1, num_experts_per_tok=1, num_hash_layers=0, sliding_window=1, index_n_heads=1,
    index_head_dim=32, index_topk=1, hc_mult=1, hc_sinkhorn_iters=1, max_position_embeddings=1,
    rope_theta=10000.0, compress_rope_theta=160000.0, rms_norm_eps=1e-6, hc_eps=1e-6,
    routed_scaling_factor=1.0, swiglu_limit=10.0, compress_ratios=[0], yarn_factor=1.0,
    yarn_beta_fast=32.0, yarn_beta_slow=1.0, yarn_original_positions=65536,
)


def model(
    config: Mapping[str, Any], weights: Mapping[str, Weight], numerics: object, threads: object
) -> _core.Model:
    """The engine's model of one layer.

    Parameters
    ----------
    config : mapping
        Fields of struct dsv4_config that differ from `SMALLEST`.
    weights : mapping of str to Weight
        By the official name without "layers.0."; the others are zeros.
    """
    from dsv4.loading import DTYPES, _options

    options = _options("cpu", threads, numerics, True, False, False)
    fields = SMALLEST | dict(config)
    given = dict(weights)
    given |= {name.removesuffix("weight") + "scale": w.scale for name, w in weights.items()
              if w.scale is not None}
    zeros = {name: shape for name, shape in _all(fields).items() if name not in given}
    total = sum(_padded(_nbytes(w.dtype, w.shape)) for w in given.values())
    free = memory.available_memory()
    if total > free:
        raise MemoryError(f"weights: the copy takes {size(total)}, free are {size(free)}")
    empty = max((_nbytes("BF16", shape) for shape in zeros.values()), default=0)
    fd = os.memfd_create("dsv4 weights", os.MFD_CLOEXEC)
    try:
        table = [(_full(name), DTYPES["BF16"], shape, 0, 0, _nbytes("BF16", shape))
                 for name, shape in zeros.items()]
        at = _padded(empty)
        for name, w in given.items():
            table.append((_full(name), DTYPES[w.dtype], w.shape, 0, at, _nbytes(w.dtype, w.shape)))
            _write(fd, w.data, at)
            at += _padded(_nbytes(w.dtype, w.shape))
        os.ftruncate(fd, at)
        return _core.Model(fields, [("weights in memory", fd, at)], table, options, None)
    finally:
        os.close(fd)


def _full(name: str) -> str:
    whole = name.startswith(("embed.", "head.", "norm.", "hc_head"))
    return name if whole else f"layers.0.{name}"


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count * HALF_BYTES[dtype] // 2


def _padded(n: int) -> int:
    return -(-n // ALIGN) * ALIGN


def _write(fd: int, data: npt.NDArray[Any], at: int) -> None:
    """The array's bytes into the file, a piece of rows at a time where it must be copied first."""
    whole = data.reshape(len(data), -1)
    step = max(1, PIECE_BYTES // whole[0].nbytes)
    for first in range(0, len(whole), step):
        left = memoryview(np.ascontiguousarray(whole[first : first + step]).view(np.uint8).data)
        left = left.cast("B")
        while left:
            n = os.pwrite(fd, left, at)
            left, at = left[n:], at + n


def _all(c: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of such a model but those of compressors, indexers, hash tables: its shape."""
    d, hc, heads = c["hidden_size"], c["hc_mult"], c["num_attention_heads"] * c["head_dim"]
    low, width = c["o_groups"] * c["o_lora_rank"], c["moe_intermediate_size"]
    mixes, n = (2 + hc) * hc, c["n_routed_experts"]
    found: dict[str, tuple[int, ...]] = {
        "embed.weight": (c["vocab_size"], d), "head.weight": (c["vocab_size"], d),
        "norm.weight": (d,), "hc_head_fn": (hc, hc * d), "hc_head_base": (hc,),
        "hc_head_scale": (1,), "attn_norm.weight": (d,), "ffn_norm.weight": (d,),
        "attn.attn_sink": (c["num_attention_heads"],), "attn.q_norm.weight": (c["q_lora_rank"],),
        "attn.kv_norm.weight": (c["head_dim"],), "attn.wq_a.weight": (c["q_lora_rank"], d),
        "attn.wq_b.weight": (heads, c["q_lora_rank"]), "attn.wkv.weight": (c["head_dim"], d),
        "attn.wo_a.weight": (low, heads // c["o_groups"]), "attn.wo_b.weight": (d, low),
        "ffn.gate.weight": (n, d), "ffn.gate.bias": (n,),
    }
    for site in ("hc_attn", "hc_ffn"):
        found |= {f"{site}_fn": (mixes, hc * d), f"{site}_base": (mixes,), f"{site}_scale": (3,)}
    for expert in (*(f"experts.{e}" for e in range(n)), "shared_experts"):
        found |= {f"ffn.{expert}.w1.weight": (width, d), f"ffn.{expert}.w3.weight": (width, d),
                  f"ffn.{expert}.w2.weight": (d, width)}
    return found
