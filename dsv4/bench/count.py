# SPDX-License-Identifier: Apache-2.0
"""Bytes and operations of a step, counted from the tensor table and the config.

Bytes are those that have to be read once: all dense weights, the experts chosen, and per token the
rows of its sequence's state.  What only index scores need counts from where there are more entries
than a token attends to.  Operations count a product and its sum as two.  Source: SPEC 3, 6.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from dsv4 import memory
from dsv4.checkpoint import TensorInfo
from dsv4.config import CSA_RATIO, Config

DENSE_FP8, EXPERTS, TRUNK = "FP8 dense", "FP4 experts", "BF16 and F32"
KV, INDEX = "KV rows", "index rows"
CLASSES = (DENSE_FP8, EXPERTS, TRUNK, KV, INDEX)


class Work(NamedTuple):
    """Operations: of linear layers and attention, and of index scores."""

    dot: float = 0.0
    byte: float = 0.0


def class_of(info: TensorInfo) -> str | None:
    """The class a tensor is counted in; None for those of which a step reads a few rows."""
    if info.name == "embed.weight" or info.name.endswith("tid2eid"):
        return None
    if ".ffn.experts." in info.name:
        return EXPERTS
    return DENSE_FP8 if info.dtype in ("F8_E4M3", "F8_E8M0") else TRUNK


def scored(config: Config, position: int) -> bool:
    """Whether the token at a position has more compressed entries than it attends to."""
    return (position + 1) // CSA_RATIO > config.index_topk


def makes_scores(info: TensorInfo) -> bool:
    """Whether a weight is used for scored tokens only: index queries and their weights."""
    return ".indexer.wq_b." in info.name or ".indexer.weights_proj." in info.name


def weight_bytes(
    tensors: Iterable[TensorInfo], config: Config, position: int, experts: float | None = None
) -> dict[str, int]:
    """Bytes of the weights that a step of tokens at a position reads, by class.

    Parameters
    ----------
    tensors : iterable of TensorInfo
        All of a model, or those of one layer.
    config : Config
    position : int
    experts : float, optional
        Distinct routed experts a layer reads; those of one token by default.
    """
    found = dict.fromkeys((DENSE_FP8, EXPERTS, TRUNK), 0.0)
    share = (config.num_experts_per_tok if experts is None else experts) / config.n_routed_experts
    for info in tensors:
        kind = class_of(info)
        if kind is not None and (scored(config, position) or not makes_scores(info)):
            found[kind] += info.nbytes * (share if kind == EXPERTS else 1)
    return {kind: round(n) for kind, n in found.items()}


def expert_bytes(tensors: Iterable[TensorInfo], config: Config) -> int:
    """Bytes of one routed expert in every layer that is given."""
    total = sum(info.nbytes for info in tensors if class_of(info) == EXPERTS)
    return total // config.n_routed_experts


def layer_tensors(tensors: Mapping[str, TensorInfo], layer: int) -> list[TensorInfo]:
    start = f"layers.{layer}."
    return [info for name, info in tensors.items() if name.startswith(start)]


def keys(config: Config, ratio: int, position: int) -> int:
    """Rows that the token at a position attends to, itself among them."""
    window = min(position + 1, config.sliding_window)
    if not ratio:
        return window
    entries = (position + 1) // ratio
    return window + (min(entries, config.index_topk) if ratio == CSA_RATIO else entries)


def state_bytes(config: Config, position: int) -> dict[str, int]:
    """Bytes of a sequence's state that the token at a position reads."""
    kv = index = 0
    for ratio in config.compress_ratios[: config.num_hidden_layers]:
        kv += keys(config, ratio, position) * memory.kv_row_bytes(config)
        if ratio == CSA_RATIO and scored(config, position):
            index += (position + 1) // ratio * memory.index_row_bytes(config)
    return {KV: kv, INDEX: index}


class Weights(NamedTuple):
    """Numbers of weights a token is multiplied with.

    `layers` are those of every token, `scores` those of scored tokens alone, `head` those of tokens
    with logits.
    """

    layers: int
    scores: int
    head: int


def _multiplied(
    tensors: Iterable[TensorInfo], config: Config
) -> Iterator[tuple[TensorInfo, str, float]]:
    """Matrices, their class, and the weights of each that a token is multiplied with."""
    for info in tensors:
        kind = class_of(info)
        if kind is None or len(info.shape) < 2 or info.name.endswith((".scale", ".ape")):
            continue
        n = float(info.shape[0] * info.shape[1])
        if kind == EXPERTS:  # two codes a byte
            n *= 2 * config.num_experts_per_tok / config.n_routed_experts
        yield info, kind, n


def weights_per_token(tensors: Iterable[TensorInfo], config: Config) -> Weights:
    layers = scores = head = 0.0
    for info, _, n in _multiplied(tensors, config):
        if info.name.startswith(("head.", "hc_head")):
            head += n
        elif makes_scores(info):
            scores += n
        else:
            layers += n
    return Weights(round(layers), round(scores), round(head))


def class_weights(
    tensors: Iterable[TensorInfo], config: Config, position: int
) -> dict[str, int]:
    """Weights that a token at a position, with logits, is multiplied with, by class."""
    found = dict.fromkeys((DENSE_FP8, EXPERTS, TRUNK), 0.0)
    for info, kind, n in _multiplied(tensors, config):
        if scored(config, position) or not makes_scores(info):
            found[kind] += n
    return {kind: round(n) for kind, n in found.items()}


def attention_work(config: Config, first: int, n: int) -> Work:
    """Attention and index scores of n tokens from position `first` on."""
    dot = byte = 0
    for position in range(first, first + n):
        for ratio in set(config.compress_ratios[: config.num_hidden_layers]):
            layers = config.compress_ratios[: config.num_hidden_layers].count(ratio)
            rows = keys(config, ratio, position)
            dot += layers * 4 * config.num_attention_heads * config.head_dim * rows
            if ratio == CSA_RATIO and scored(config, position):
                entries = (position + 1) // ratio
                byte += layers * 2 * config.index_n_heads * config.index_head_dim * entries
    return Work(dot, byte)


def prompt_work(
    tensors: Iterable[TensorInfo], config: Config, n: int, logits: int = 1
) -> Work:
    """A prompt of n tokens from position 0."""
    weights = weights_per_token(tensors, config)
    late = sum(scored(config, position) for position in range(n))
    linear = weights.layers * n + weights.scores * late + weights.head * logits
    attention = attention_work(config, 0, n)
    return Work(2.0 * linear + attention.dot, attention.byte)
