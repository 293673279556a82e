# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of any shape with made-up weights: for time, and for two engines to agree on.

Unlike random bytes they look like published weights: codes of a bell curve whose largest is near
the format's largest (subnormal FP8 codes are rare), rows of about unit gain, a router that spreads
its tokens.  A tensor follows from its name, so nothing has to be kept to write it twice.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from dsv4 import layout, nano
from dsv4.config import Config
from peer import common
from peer.common import Array

BLOCK = 1 << 20


def exponent(sigma: float, cols: int) -> int:
    """E8M0 byte that gives codes of deviation sigma a gain of about one over `cols` inputs."""
    return 127 - round(float(np.log2(sigma * np.sqrt(cols))))


def tensor(name: str, dtype: str, shape: tuple[int, ...]) -> Array:
    """The bytes of one tensor."""
    rng = np.random.default_rng(crc32(name.encode()))
    n = int(np.prod(shape))
    cols = shape[-1]
    if dtype == "F8_E8M0":
        fp4 = ".experts." in name and "shared" not in name
        full = cols * (32 if fp4 else 128)
        return np.full(shape, exponent(2.0 if fp4 else 100.0, full), np.uint8)
    bell = np.resize(np.roll(BELL, int(rng.integers(BLOCK))), n)
    if dtype == "F8_E4M3":
        return np.resize(np.roll(FP8, int(rng.integers(BLOCK))), n).reshape(shape)
    if dtype == "I8":
        return np.resize(np.roll(FP4, int(rng.integers(BLOCK))), n).reshape(shape)
    if name.endswith("norm.weight"):
        values = np.ones(n, np.float32)
    elif name.endswith("gate.bias"):
        values = bell * np.float32(0.01)
    else:
        values = bell / np.float32(np.sqrt(cols) if len(shape) > 1 else 1)
    if dtype == "F32":
        return values.astype(np.float32).reshape(shape)
    if dtype == "BF16":
        return common.bf16(values).reshape(shape)
    raise ValueError(f"{name}: dtype {dtype} was not expected")


BELL = np.random.default_rng(0).standard_normal(BLOCK, np.float32)
FP8 = nano.nearest_code(BELL * np.float32(100), nano.E4M3, 0x80)
CODES = nano.nearest_code(BELL * 2, nano.E2M1, 8)
FP4 = CODES | CODES[::-1] << 4


def shapes(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor (without hash layers: num_hash_layers is 0)."""
    return {
        name: (dtype, shape)
        for name, ((dtype,), shape) in layout.expected(Config.from_json(config)).items()
    }


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, str, Array]]:
    """Name, dtype and bytes of every tensor."""
    for name, (dtype, shape) in shapes(config).items():
        yield name, dtype, tensor(name, dtype, shape)


def write(folder: Path, config: dict[str, Any]) -> Path:
    """Write the checkpoint, unless it is there already."""
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    nano.write_shard(folder / "part", {n: (dtype, array) for n, dtype, array in tensors(config)})
    (folder / "part").rename(folder / "model.safetensors")
    return folder


def flash(ratios: list[int], experts: int, vocab: int) -> dict[str, Any]:
    """The published config of V4-Flash with fewer layers, experts and words."""
    path = common.ROOT / "tests" / "vectors" / "configs" / "flash.json"
    config: dict[str, Any] = json.loads(path.read_text())
    config.update(
        num_hidden_layers=len(ratios), compress_ratios=ratios, n_routed_experts=experts,
        vocab_size=vocab, num_hash_layers=0, num_nextn_predict_layers=0)
    return config
