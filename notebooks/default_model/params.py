# SPDX-License-Identifier: Apache-2.0
"""The small model's config, the names, shapes and first values of its tensors, and their rounding.

Tensors carry the checkpoint's names (SPEC 6.2), except that experts are stacked: `experts.w13`
[E, 2, I, d] and `experts.w2` [E, d, I], `shared_experts.w13` [2, I, d] and `.w2` [1, d, I].
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import quant
import torch
from torch import Tensor

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Numerics:
    """What is rounded; see the head of this file."""

    quantised: bool
    rounded: bool


FLOAT = Numerics(False, False)
QAT = Numerics(True, False)
OFFICIAL = Numerics(True, True)

CONFIG: dict[str, Any] = dict(
    architectures=["DeepseekV4ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    bos_token_id=0, eos_token_id=1, expert_dtype="fp4", hc_eps=1e-6, hc_mult=4,
    hc_sinkhorn_iters=20, head_dim=128, hidden_act="silu", hidden_size=256, index_head_dim=128,
    index_n_heads=4, index_topk=64, initializer_range=0.02, max_position_embeddings=2048,
    model_type="deepseek_v4", moe_intermediate_size=128, n_routed_experts=8, n_shared_experts=1,
    norm_topk_prob=True, num_attention_heads=4, num_experts_per_tok=2, num_hidden_layers=6,
    num_hash_layers=2, num_key_value_heads=1, num_nextn_predict_layers=1, o_groups=2,
    o_lora_rank=128, q_lora_rank=128, qk_rope_head_dim=64,
    quantization_config=dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8",
                             scale_fmt="ue8m0", weight_block_size=[128, 128]),
    rms_norm_eps=1e-6,
    rope_scaling=dict(beta_fast=32, beta_slow=1, factor=16,
                      original_max_position_embeddings=65536, type="yarn"),
    rope_theta=10000, routed_scaling_factor=1.5, scoring_func="sqrtsoftplus", sliding_window=128,
    swiglu_limit=10.0, tie_word_embeddings=False, topk_method="noaux_tc", torch_dtype="bfloat16",
    transformers_version="4.57.1", use_cache=True, vocab_size=1024, compress_rope_theta=160000,
    compress_ratios=[0, 0, 4, 128, 4, 128, 0])


def shapes(cfg: dict[str, Any], mtp: bool = True) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every trained tensor and of the gate biases."""
    d, v, hm = cfg["hidden_size"], cfg["vocab_size"], cfg["hc_mult"]
    out: dict[str, tuple[int, ...]] = {"embed.weight": (v, d), "head.weight": (v, d)}

    def head(p: str) -> None:
        out[p + "norm.weight"] = (d,)
        out[p + "hc_head_fn"], out[p + "hc_head_base"] = (hm, hm * d), (hm,)
        out[p + "hc_head_scale"] = (1,)

    head("")
    for i in range(cfg["num_hidden_layers"]):
        out.update(_block_shapes(cfg, f"layers.{i}.", i))
    if mtp:
        out.update(_block_shapes(cfg, "mtp.0.", cfg["num_hidden_layers"]))
        head("mtp.0.")
        for x in ("e_proj", "h_proj"):
            out[f"mtp.0.{x}.weight"] = (d, d)
        for x in ("enorm", "hnorm"):
            out[f"mtp.0.{x}.weight"] = (d,)
    return out


def _block_shapes(cfg: dict[str, Any], p: str, layer: int) -> dict[str, tuple[int, ...]]:
    d, hd, h = cfg["hidden_size"], cfg["head_dim"], cfg["num_attention_heads"]
    ql, g, r, hm = cfg["q_lora_rank"], cfg["o_groups"], cfg["o_lora_rank"], cfg["hc_mult"]
    ratio = cfg["compress_ratios"][layer]
    e, w = cfg["n_routed_experts"], cfg["moe_intermediate_size"]
    out: dict[str, tuple[int, ...]] = {}
    for s in ("attn", "ffn"):
        out[f"{p}hc_{s}_fn"] = ((2 + hm) * hm, hm * d)
        out[f"{p}hc_{s}_base"], out[f"{p}hc_{s}_scale"] = ((2 + hm) * hm,), (3,)
        out[f"{p}{s}_norm.weight"] = (d,)
    a = p + "attn."
    out |= {a + "attn_sink": (h,), a + "q_norm.weight": (ql,), a + "kv_norm.weight": (hd,),
            a + "wq_a.weight": (ql, d), a + "wq_b.weight": (h * hd, ql), a + "wkv.weight": (hd, d),
            a + "wo_a.weight": (g * r, h * hd // g), a + "wo_b.weight": (d, g * r)}

    def compressor(c: str, width: int) -> None:
        coff = 2 if ratio == 4 else 1
        out.update({c + "ape": (ratio, coff * width), c + "norm.weight": (width,),
                    c + "wkv.weight": (coff * width, d), c + "wgate.weight": (coff * width, d)})

    if ratio:
        compressor(a + "compressor.", hd)
    if ratio == 4:
        ih, n = cfg["index_head_dim"], cfg["index_n_heads"]
        out[a + "indexer.wq_b.weight"] = (n * ih, ql)
        out[a + "indexer.weights_proj.weight"] = (n, d)
        compressor(a + "indexer.compressor.", ih)
    f = p + "ffn."
    out[f + "gate.weight"] = (e, d)
    if layer >= cfg["num_hash_layers"]:
        out[f + "gate.bias"] = (e,)
    out |= {f + "experts.w13": (e, 2, w, d), f + "experts.w2": (e, d, w),
            f + "shared_experts.w13": (2, w, d), f + "shared_experts.w2": (1, d, w)}
    return out


def initial(cfg: dict[str, Any], seed: int, mtp: bool = True) -> Params:
    """Fresh parameters: unit-variance projections, small outputs, near-identity mHC."""
    g = torch.Generator().manual_seed(seed)
    hm, out = cfg["hc_mult"], {}
    for name, shape in shapes(cfg, mtp).items():
        leaf = name.rsplit(".", 1)[-1]
        if name.endswith("norm.weight"):
            t = torch.ones(shape)
        elif name in ("embed.weight", "head.weight"):
            t = torch.randn(shape, generator=g) * (0.5 if name[0] == "e" else 0.02)
        elif leaf.endswith("_base"):
            t = torch.randn(shape, generator=g) * 0.3
            t[:hm] -= 1.1                                       # collapse: about the mean
            if len(t) > hm:
                t[2 * hm:] = 4 * torch.eye(hm).flatten()        # mixing: about the identity
        elif leaf.endswith("_scale"):
            t = torch.full(shape, 0.3)
        elif leaf in ("attn_sink", "bias", "ape"):
            t = torch.zeros(shape)
        else:
            gain = 0.3 if "wo_b" in name or name.endswith("experts.w2") else 1.0
            gain = 0.3 if leaf.endswith("_fn") or "gate" in name else gain
            t = torch.randn(shape, generator=g) * (gain * shape[-1] ** -0.5)
        out[name] = t
    return out


def hash_table(counts: Tensor, experts: int, k: int) -> Tensor:
    """tid2eid int64 [vocab, k]: frequent tokens first, each to the k least loaded experts."""
    load = torch.zeros(experts, dtype=torch.float64)
    table = torch.zeros(len(counts), k, dtype=torch.int64)
    for t in torch.argsort(counts, descending=True, stable=True).tolist():
        pick = torch.argsort(load, stable=True)[:k]
        table[t] = pick
        load[pick] += float(counts[t]) + 1e-3
    return table


FP8_LEAVES = ("wq_a.weight", "wq_b.weight", "attn.wkv.weight", "wo_a.weight", "wo_b.weight",
              "e_proj.weight", "h_proj.weight")


def kind(name: str) -> str:
    """Storage of a tensor: fp8, fp4, f32 or bf16 (SPEC 6.2)."""
    leaf = name.rsplit(".", 1)[-1]
    if "shared_experts" in name or name.endswith(FP8_LEAVES):
        return "fp8"
    if ".experts." in name:
        return "fp4"
    if leaf in ("attn_sink", "bias", "ape") or leaf.endswith(("_fn", "_base", "_scale")):
        return "f32"
    return "bf16"


def _fp8_stack(w: Tensor) -> Tensor:
    if w.dim() == 2:
        return quant.fp8_weight_values(w)
    return torch.stack([quant.fp8_weight_values(x) for x in w])


_ROUND = {"fp8": _fp8_stack, "fp4": quant.fused(quant.fp4_values), "bf16": quant.bf16}


def stored(params: Params, num: Numerics) -> Params:
    """The weights as the checkpoint's formats hold them, gradients straight through."""
    if not num.quantised:
        return params
    out = {}
    for name, w in params.items():
        k = kind(name)
        keep = k == "f32" or (k == "bf16" and not num.rounded)
        out[name] = w if keep else quant.through(_ROUND[k], w)
    return out
