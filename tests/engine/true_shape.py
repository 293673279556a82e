# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with the published layer dimensions and random bytes: for time, not text."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv4 import layout
from dsv4.config import Config

CONFIGS = Path(__file__).parents[1] / "vectors" / "configs"


def make(
    folder: Path, ratios: Sequence[int], *, model: str = "flash", experts: int = 8,
    vocab: int = 4096,
) -> Path:
    """Write one checkpoint; about 0.13 GB and 13 MB an expert for each layer of V4-Flash."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{model}.json").read_text())
    config.update(
        num_hidden_layers=len(ratios), compress_ratios=list(ratios), n_routed_experts=experts,
        vocab_size=vocab, num_hash_layers=0, num_nextn_predict_layers=0,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    table: dict[str, dict[str, object]] = {}
    at = 0
    path = folder / "model.safetensors"
    arrays = []
    for name, (dtypes, shape) in layout.expected(Config.from_json(config)).items():
        (dtype,) = dtypes
        array = random_tensor(rng, name, dtype, shape)
        end = at + array.nbytes
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
        arrays.append(array)
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for array in arrays:
            file.write(array.tobytes())
    return folder


def random_tensor(
    rng: np.random.Generator, name: str, dtype: str, shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """Bytes that keep activations in a sane range: codes of every kind, matching scales."""
    count = int(np.prod(shape))
    if dtype == "F8_E8M0":
        return np.full(shape, 119 if ".experts." in name else 112, np.uint8)
    if dtype in ("F8_E4M3", "I8"):
        codes = np.frombuffer(rng.bytes(count), np.uint8)
        return codes & np.uint8(0xF7) if dtype == "F8_E4M3" else codes  # no NaN code
    width = shape[-1] if len(shape) > 1 else 1
    values = rng.standard_normal(count, np.float32) / np.sqrt(width, dtype=np.float32)
    if name.endswith("norm.weight"):
        values = np.ones(count, np.float32)
    if dtype == "F32":
        return values
    return (values.view(np.uint32) >> 16).astype(np.uint16)
