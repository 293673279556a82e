# SPDX-License-Identifier: Apache-2.0
"""Tensor names: the spelling of transformers, translated into that of the official checkpoints.

Official names pass unchanged.  Applied to every name: one leading `model.` is dropped, the trunk
has a table, and inside `layers.N.` and `mtp.N.` the rules below run in their order.
Source: SPEC 6.7.
"""

import re
from functools import lru_cache

TRUNK = {
    "embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
}

_COMPRESSOR = {
    "kv_proj": "wkv", "gate_proj": "wgate", "kv_norm": "norm", "position_bias": "ape",
    "wkv": "wkv", "wgate": "wgate", "norm": "norm", "ape": "ape",
}
_EXPERT = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_ATTENTION = {
    "sinks": "attn_sink", "q_a_proj": "wq_a", "q_b_proj": "wq_b", "kv_proj": "wkv",
    "o_a_proj": "wo_a", "o_b_proj": "wo_b", "q_a_norm": "q_norm",
}

RULES: tuple[tuple[re.Pattern[str], str, dict[str, str]], ...] = tuple(
    (re.compile(pattern.format(r"([a-z_0-9]+)")), target, table)
    for pattern, target, table in (
        (r"^input_layernorm\.", "attn_norm.", {}),
        (r"^post_attention_layernorm\.", "ffn_norm.", {}),
        (r"^attn_hc\.(fn|base|scale)$", r"hc_attn_\1", {}),
        (r"^ffn_hc\.(fn|base|scale)$", r"hc_ffn_\1", {}),
        (r"^self_attn\.", "attn.", {}),
        (r"^mlp\.", "ffn.", {}),
        (r"^attn\.compressor\.indexer\.(?:scorer\.)?", "attn.indexer.", {}),
        (r"^attn\.indexer\.q_b_proj(?=\.)", "attn.indexer.wq_b", {}),
        (r"^attn\.indexer\.(?:compressor\.)?{}(?=\.|$)", "attn.indexer.compressor.", _COMPRESSOR),
        (r"^attn\.compressor\.{}(?=\.|$)", "attn.compressor.", _COMPRESSOR),
        (r"^attn\.{}(?=\.|$)", "attn.", _ATTENTION),
        (r"^ffn\.gate\.e_score_correction_bias$", "ffn.gate.bias", {}),
        (r"^ffn\.shared_experts\.{}(?=\.)", "ffn.shared_experts.", _EXPERT),
        (r"^(ffn\.experts\.[0-9]+\.){}(?=\.)", r"\1", _EXPERT),
        (r"\.weight_scale_inv$", ".scale", {}),
    )
)


def official(name: str) -> str:
    """The official name of a tensor.

    Examples
    --------
    >>> official("model.layers.3.self_attn.compressor.indexer.kv_proj.weight")
    'layers.3.attn.indexer.compressor.wkv.weight'
    """
    name = name.removeprefix("model.")
    parts = name.split(".", 2)
    if len(parts) == 3 and parts[0] in ("layers", "mtp"):
        return f"{parts[0]}.{parts[1]}.{_inside(parts[2])}"
    return TRUNK.get(name, name)


@lru_cache(maxsize=1 << 14)
def _inside(name: str) -> str:
    """The official spelling of what follows `layers.N.`."""
    for pattern, target, table in RULES:
        match = pattern.search(name)
        if match is None:
            continue
        leaf = table.get(match[match.lastindex or 0]) if table else ""
        if leaf is not None:
            name = name[: match.start()] + match.expand(target) + leaf + name[match.end() :]
    return name
