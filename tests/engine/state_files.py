# SPDX-License-Identifier: Apache-2.0
"""Saved sessions for tests: a model whose files are small, and files that are wrong on purpose but
whose checksums are right."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness

import dsv4
from dsv4 import _core, state_file

# every kind of layer and of state in some 60 KB
SMALL = dict(compress_ratios=[4, 8, 0], num_hidden_layers=3, sliding_window=8, index_topk=4,
             max_position_embeddings=2048)


def make_small(folder: Path, **changes: Any) -> Path:
    """A checkpoint of SMALL."""
    return harness.make_tiny(folder, **(SMALL | changes))


def parts(model: dsv4.Model, path: Path) -> tuple[dict[str, Any], dict[tuple[str, int], bytearray]]:
    """The header of a saved session, and its sections by name and layer."""
    data = path.read_bytes()
    _, _, length, head, _ = state_file.PRELUDE.unpack_from(data)
    header = json.loads(data[state_file.HEAD : state_file.HEAD + length])
    plan = state_file.layout(model._core, header["position"])
    return header, {
        (s.name, s.layer): bytearray(data[head + s.offset : head + s.end]) for s in plan.sections}


def write(
    model: dsv4.Model, path: Path, header: dict[str, Any],
    sections: dict[tuple[str, int], bytearray], position: int | None = None,
) -> None:
    """A file of these parts with checksums that fit."""
    plan = state_file.layout(
        model._core, header["position"] if position is None else position)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    table = b"".join(
        _core.crc32c(sections[s.name, s.layer][i * s.piece : (i + 1) * s.piece], 0)
        .to_bytes(4, "little") for s in plan.sections for i in range(s.pieces))
    head = state_file._aligned(state_file.HEAD + len(text) + len(table))
    size = head + plan.sections[-1].end
    out = bytearray(size)
    out[:head] = state_file._head(text, table, head, size)
    for s in plan.sections:
        out[head + s.offset : head + s.end] = sections[s.name, s.layer]
    path.write_bytes(out)


def rewritten(
    model: dsv4.Model, path: Path, to: Path,
    change: Callable[[dict[str, Any], dict[tuple[str, int], bytearray]], None],
) -> Path:
    """A copy of a saved session that `change` has edited."""
    header, sections = parts(model, path)
    change(header, sections)
    write(model, to, header, sections)
    return to


def redigested(data: bytearray) -> bytes:
    """The bytes of a file whose head was edited, with the digest that fits."""
    head = state_file.PRELUDE.unpack_from(data)[3]
    n = state_file.PRELUDE.size
    data[n : state_file.HEAD] = hashlib.sha256(
        data[:n] + data[state_file.HEAD : head]).digest()
    return bytes(data)
