# SPDX-License-Identifier: Apache-2.0
"""Loading models in every way the engine can run, and reading a step's internals."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import dsv4
from dsv4 import _core, loading, nano
from dsv4.arrays import to_bf16

PARTS = (
    "streams", "attention_out", "ffn_out", "experts", "expert_weights", "index_selected",
)
WINDOW, COMPRESSED, INDEX = range(3)

# A checkpoint small enough to be run hundreds of times: every layer kind, a window and an index
# that overflow soon, 128 for the windows that published models compress.
TINY: dict[str, Any] = dict(
    mtp=0, num_nextn_predict_layers=0, compress_ratios=[4, 128, 0, 16], num_hidden_layers=4,
    num_hash_layers=1, hidden_size=128, head_dim=128, qk_rope_head_dim=64, num_attention_heads=2,
    o_groups=2, o_lora_rank=64, q_lora_rank=128, index_n_heads=3, index_head_dim=64, index_topk=8,
    moe_intermediate_size=128, n_routed_experts=6, num_experts_per_tok=2, hc_mult=2,
    hc_sinkhorn_iters=3, sliding_window=32, vocab_size=97, max_position_embeddings=4096,
)


def load(
    folder: str | os.PathLike[str], *, threads: int = 1, disable: str | None = None,
    chunk: int = 0, **options: Any,
) -> dsv4.Model:
    """`dsv4.load` without the instruction sets of `disable`, with passes of `chunk` tokens."""
    made = loading._options

    def chosen(*arguments: object) -> dict[str, Any]:
        return made(*arguments) | {"chunk_tok": chunk}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_options", chosen)
        if disable is not None:
            patch.setenv("DSV4_CPU_DISABLE", disable)
        return dsv4.load(folder, threads=threads, **options)


def traced(model: dsv4.Model, layer: int, n: int) -> dict[str, NDArray[Any]]:
    """Arrays for those of PARTS that the layer has, for n tokens."""
    found: dict[str, NDArray[Any]] = {}
    for name in PARTS:
        shape = model._core.value(layer, _core.VALUES.index(name))
        if shape is not None:
            found[name] = np.zeros((n, *shape[1]), np.int32 if shape[0] else np.float32)
    return found


def taps(layer: int, found: dict[str, NDArray[Any]]) -> list[tuple[int, int, NDArray[Any]]]:
    """What a step is given to fill them."""
    return [(layer, _core.VALUES.index(name), array) for name, array in found.items()]


def codes(found: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Values the model holds as bf16 as their codes."""
    held = ("streams", "attention_out", "ffn_out")
    return {name: to_bf16(array) if name in held else array for name, array in found.items()}


def step_with(
    model: dsv4.Model, segments: Sequence[tuple[dsv4.Session, Any]], layer: int,
) -> tuple[list[NDArray[np.float32]], dict[str, NDArray[Any]]]:
    """One step with all its logits, and internals of one layer, those of all segments in one."""
    found = [traced(model, layer, len(ids)) for _, ids in segments]
    out = model._core.step([
        (s._core, ids, 2, None, taps(layer, each))
        for (s, ids), each in zip(segments, found, strict=True)], None)
    every = {name: np.concatenate([each[name] for each in found]) for name in found[0]}
    return [rows for rows, _ in out], codes(every)


def layer_with(
    model: dsv4.Model, layer: int, streams: NDArray[np.uint16], ids: Any,
) -> tuple[NDArray[np.uint16], dict[str, NDArray[Any]]]:
    """One layer alone from position 0 on bf16 codes, and internals of it."""
    found = traced(model, layer, len(ids))
    out = model._core.layer(layer, np.ascontiguousarray(streams), ids, taps(layer, found))
    return out, codes(found)


def rows(session: dsv4.Session, layer: int, kind: int, at: Sequence[int]) -> NDArray[np.uint16]:
    """Rows of a session's KV state as bf16 codes: positions (WINDOW) or entries."""
    return np.concatenate([session._core.rows(layer, kind, int(i), 1) for i in at])


def state(session: dsv4.Session) -> list[NDArray[Any]]:
    """Everything of a session that can be read: tokens, and every row of every layer."""
    config = session.model.config
    position = session.position
    found: list[NDArray[Any]] = [session.tokens]
    for layer, ratio in enumerate(config.compress_ratios[: config.num_hidden_layers]):
        low = max(0, position - config.sliding_window)
        found.append(session._core.rows(layer, WINDOW, low, position - low))
        if ratio:
            found.append(session._core.rows(layer, COMPRESSED, 0, position // ratio))
        if ratio == 4:
            found.append(session._core.rows(layer, INDEX, 0, position // ratio))
    return found


def pieces(ids: Any, size: int) -> Iterator[Any]:
    """The ids cut into pieces of `size`."""
    return (ids[at : at + size] for at in range(0, len(ids), size))


def fed(model: dsv4.Model, cut: Any) -> NDArray[np.float32]:
    """All logits of a new session that is fed these pieces, one step each."""
    with model.session() as session:
        return np.concatenate([session.append(piece, logits="all") for piece in cut])


def prompt(model: dsv4.Model, n: int, seed: int = 1) -> NDArray[np.int32]:
    """n random ids."""
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, n, np.int32)


def same(got: NDArray[Any], want: NDArray[Any], what: str = "") -> None:
    """Equality of every bit, naming the rows that differ."""
    assert got.shape == want.shape and got.dtype == want.dtype, (what, got.shape, want.shape)
    width = int(np.prod(got.shape[1:])) * got.dtype.itemsize
    a, b = (np.ascontiguousarray(x).view(np.uint8).reshape(len(x), width) for x in (got, want))
    bad = np.nonzero((a != b).any(1))[0]
    assert not len(bad), f"{what}: {len(bad)} of {len(got)} rows differ, first {bad[:8].tolist()}"


Maker = Callable[..., Path]


def changed(folder: Path, to: Path, name: str, change: Callable[[NDArray[np.uint8]], None]) -> Path:
    """A copy of a checkpoint in which `change` has edited the bytes of one tensor in place."""
    import shutil

    from dsv4.checkpoint import Checkpoint

    shutil.copytree(folder, to)
    with Checkpoint.open(to) as checkpoint:
        info = checkpoint.tensors[name]
        path = checkpoint.shards[info.shard].path
    data = np.memmap(path, np.uint8, "r+", info.offset, info.nbytes)
    change(data)
    data.flush()
    return to


def make_tiny(folder: Path, **changes: Any) -> Path:
    """A TINY checkpoint with other config keys."""
    return nano.make("tiny", 5, folder, **(TINY | changes))
