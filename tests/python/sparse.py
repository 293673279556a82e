# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of any size whose tensors are holes in sparse files: headers without weights."""

import json
import math
import struct
from pathlib import Path
from typing import Any

from dsv4.config import Config
from dsv4.layout import OFFICIAL, Formats, Table, expected
from dsv4.shard import DTYPE_BITS


def header(tensors: Table) -> tuple[bytes, int]:
    """The header of a shard with these tensors, one dtype each, and its tensor bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtypes, shape) in tensors.items():
        dtype = min(dtypes)
        end = offset + math.prod(shape) * DTYPE_BITS[dtype] // 8
        table[name] = dict(dtype=dtype, shape=list(shape), data_offsets=[offset, end])
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offset


def write_shard(path: Path, tensors: Table) -> int:
    head, size = header(tensors)
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    return size


def write_checkpoint(
    folder: Path, config: dict[str, Any], draft: str | None = None, draft_blocks: int = 0,
    formats: Formats = OFFICIAL,
) -> int:
    """A checkpoint cut like the official ones (embedding, layers, head, draft blocks).

    Returns the number of its tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = expected(Config.from_json(config), draft, draft_blocks, formats)
    layers = config["num_hidden_layers"]
    shards: list[Table] = [{} for _ in range(layers + 2 + draft_blocks)]
    for name, value in table.items():
        parts = name.split(".")
        place = 0 if name == "embed.weight" else layers + 1
        if parts[0] == "layers":
            place = 1 + int(parts[1])
        elif parts[0] == "mtp":
            place = layers + 2 + int(parts[1])
        shards[place][name] = value
    where, total = {}, 0
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        total += write_shard(folder / file, tensors)
        where.update(dict.fromkeys(tensors, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config))
    return len(table)


def write_arrays(path: Path, tensors: dict[str, tuple[str, Any]]) -> None:
    """A shard of (dtype, array) by name; an array of 4-bit codes is given packed, as (dtype, array,
    shape)."""
    table: dict[str, Any] = {}
    offset, body = 0, []
    for name, (dtype, array, *shape) in tensors.items():
        raw = array.tobytes()
        table[name] = dict(
            dtype=dtype, shape=list(shape[0] if shape else array.shape),
            data_offsets=[offset, offset + len(raw)])
        offset += len(raw)
        body.append(raw)
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(body))


def write_index(folder: Path, where: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
