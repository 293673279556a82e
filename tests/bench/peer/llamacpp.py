# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's deepseek4 beside dsv4, end to end: layers of V4-Flash's shape, the same weights.

One layer of each kind (window only, compressed by 4 with its indexer, compressed by 128), written
as official safetensors and, as llama.cpp's own converter does it, as GGUF: experts moved to MXFP4
bit by bit, FP8 layers as Q8_0, the rest as it is.  Tokens of both: a prompt, then single tokens
behind it.  Before anything is timed the logits of both are compared.
"""

import ctypes
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsv4 import nano
from peer import common, synthetic, whole
from peer.common import Array, Row
from peer.ggml import INSTALL

RATIOS, EXPERTS, VOCAB = [0, 4, 128], 16, 16384
CONTEXT = 2048

NAMES = {  # official name inside layers.N. -> GGUF name inside blk.N., both without .weight
    "attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "attn.attn_sink": "attn_sinks",
    "attn.wq_a": "attn_q_a", "attn.q_norm": "attn_q_a_norm", "attn.wq_b": "attn_q_b",
    "attn.wkv": "attn_kv", "attn.kv_norm": "attn_kv_a_norm", "attn.wo_a": "attn_output_a",
    "attn.wo_b": "attn_output_b", "attn.indexer.wq_b": "indexer.attn_q_b",
    "attn.indexer.weights_proj": "indexer.proj", "ffn.gate": "ffn_gate_inp",
    "ffn.shared_experts.w1": "ffn_gate_shexp", "ffn.shared_experts.w2": "ffn_down_shexp",
    "ffn.shared_experts.w3": "ffn_up_shexp",
}
for _site in ("attn", "ffn"):
    for _part in ("fn", "base", "scale"):
        NAMES[f"hc_{_site}_{_part}"] = f"hc_{_site}_{_part}"
for _ours, _theirs in (("attn.", "attn"), ("attn.indexer.", "indexer")):
    for _part, _other in (("wkv", "kv"), ("wgate", "gate"), ("ape", "ape"), ("norm", "norm")):
        NAMES[f"{_ours}compressor.{_part}"] = f"{_theirs}_compressor_{_other}"
TRUNK = {
    "embed": "token_embd", "norm": "output_norm", "head": "output", "hc_head_fn": "output_hc_fn",
    "hc_head_base": "output_hc_base", "hc_head_scale": "output_hc_scale",
}
EXPERT = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


# ---- the GGUF file ----

def keys(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every number llama.cpp's loader asks for, without the "deepseek4." in front."""
    c, n = config, config["num_hidden_layers"]
    yarn = c["rope_scaling"]
    yield from {
        "block_count": n, "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"], "vocab_size": c["vocab_size"],
        "embedding_length_out": c["hidden_size"] * c["hc_mult"],
        "attention.head_count": c["num_attention_heads"], "attention.head_count_kv": 1,
        "attention.key_length": c["head_dim"], "attention.value_length": c["head_dim"],
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        "attention.q_lora_rank": c["q_lora_rank"],
        "attention.sliding_window": c["sliding_window"],
        "attention.indexer.head_count": c["index_n_heads"],
        "attention.indexer.key_length": c["index_head_dim"],
        "attention.indexer.top_k": c["index_topk"],
        "attention.output_group_count": c["o_groups"],
        "attention.output_lora_rank": c["o_lora_rank"],
        "attention.compress_rope_freq_base": float(c["compress_rope_theta"]),
        "attention.compress_ratios": c["compress_ratios"],
        "rope.dimension_count": c["qk_rope_head_dim"], "rope.freq_base": float(c["rope_theta"]),
        "rope.scaling.type": "yarn", "rope.scaling.factor": float(yarn["factor"]),
        "rope.scaling.original_context_length": yarn["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": float(yarn["beta_fast"]),
        "rope.scaling.yarn_beta_slow": float(yarn["beta_slow"]),
        "expert_count": c["n_routed_experts"], "expert_used_count": c["num_experts_per_tok"],
        "expert_shared_count": c["n_shared_experts"],
        "expert_feed_forward_length": c["moe_intermediate_size"],
        "expert_weights_scale": float(c["routed_scaling_factor"]),
        "expert_weights_norm": bool(c["norm_topk_prob"]), "expert_gating_func": 4,  # sqrtsoftplus
        "swiglu_clamp_exp": [float(c["swiglu_limit"])] * n,
        "swiglu_clamp_shexp": [float(c["swiglu_limit"])] * n,
        "hyper_connection.count": c["hc_mult"],
        "hyper_connection.sinkhorn_iterations": c["hc_sinkhorn_iters"],
        "hyper_connection.epsilon": c["hc_eps"], "hash_layer_count": 0,
    }.items()


def gguf_name(name: str) -> str:
    """GGUF's name of an official tensor (not of an expert's)."""
    if name.endswith("ffn.gate.bias"):
        return f"blk.{name.split('.')[1]}.exp_probs_b.bias"
    name = name.removesuffix(".weight")
    if name in TRUNK:
        return f"{TRUNK[name]}.weight"
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def mxfp4(codes: Array, scales: Array) -> Array:
    """Official FP4 as ggml's blocks of 17 bytes: the scale, then j and j + 16 in byte j."""
    rows = len(codes)
    q = np.stack([codes & 15, codes >> 4], -1).reshape(rows, -1, 32)
    packed = q[..., :16] | q[..., 16:] << 4
    return np.concatenate([scales[..., None], packed], -1).reshape(rows, -1)


def q8_0(codes: Array, scales: Array) -> Array:
    """Official FP8 as ggml's Q8_0."""
    import gguf

    sign = np.where(codes & 0x80, np.float32(-1), np.float32(1))
    values = sign * nano.E4M3.astype(np.float32)[codes & 0x7F]
    factor = np.exp2(scales.astype(np.float32) - 127)
    factor = np.repeat(np.repeat(factor, 128, 0)[: len(codes)], 128, 1)[:, : codes.shape[1]]
    return gguf.quantize(values * factor, gguf.GGMLQuantizationType.Q8_0)


def write_gguf(path: Path, config: dict[str, Any]) -> Path:
    """The same weights as synthetic.write, unless they are there already."""
    import gguf

    if path.exists():
        return path
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "deepseek4")
    writer.add_tokenizer_model("no_vocab")
    for key, value in keys(config):
        add = {
            bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
            str: writer.add_string, list: writer.add_array,
        }[type(value)]
        add(f"deepseek4.{key}", value)
    types = gguf.GGMLQuantizationType
    scales = {
        name: array for name, dtype, array in synthetic.tensors(config) if dtype == "F8_E8M0"
    }
    stacks: dict[str, list[Array]] = {}
    for name, dtype, array in synthetic.tensors(config):
        scale = scales.get(name.removesuffix("weight") + "scale")
        if dtype == "F8_E8M0":
            continue
        if dtype == "I8":
            _, layer, _, _, _, which, _ = name.split(".")
            assert scale is not None
            stacks.setdefault(f"blk.{layer}.{EXPERT[which]}.weight", []).append(
                mxfp4(array, scale))
        elif dtype == "F8_E4M3":
            assert scale is not None
            writer.add_tensor(gguf_name(name), q8_0(array, scale), raw_dtype=types.Q8_0)
        elif dtype == "BF16" and array.ndim > 1:
            writer.add_tensor(gguf_name(name), array.view(np.uint8), raw_dtype=types.BF16)
        else:
            f32 = common.from_bf16(array) if dtype == "BF16" else array
            writer.add_tensor(gguf_name(name), f32)
    for name, stack in stacks.items():
        writer.add_tensor(name, np.stack(stack), raw_dtype=types.MXFP4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)
    return path


# ---- the engine ----

class Theirs:
    """A prompt and single tokens through llama.cpp's C API, as its own bindings declare it."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp as api

        self.api = api
        self.quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self.quiet, ctypes.c_void_p())
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(
            str(path).encode(), api.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        params = api.llama_context_default_params()
        params.n_ctx = CONTEXT
        params.n_batch = params.n_ubatch = whole.PROMPT
        params.n_seq_max, params.n_threads, params.n_threads_batch = 1, threads, threads
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context for this model")
        self.position = 0

    def step(self, ids: Array) -> Array:
        """Logits of the last token."""
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = int(token), self.position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == len(ids) - 1
        status = self.api.llama_decode(self.context, batch)
        self.api.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode: status {status}, 0 was expected")
        self.position += len(ids)
        out = self.api.llama_get_logits_ith(self.context, -1)
        return np.array(np.ctypeslib.as_array(out, (VOCAB,)))

    def prefill(self, ids: Array) -> Array:
        """Logits of the last token."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.position = 0
        return self.step(ids)

    def decode(self, token: int) -> Array:
        """Logits of the token."""
        return self.step(np.array([token]))


def measure(threads: int, rounds: int, only: str | None, folder: Path) -> list[Row]:
    """Decode and prefill, or one of them; the files are kept in `folder`."""
    for package in ("llama_cpp", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise common.Missing(f"{package} is not installed: {INSTALL}; pip install gguf")
    spec = importlib.util.find_spec("llama_cpp")
    assert spec and spec.origin
    if b"deepseek4" not in (Path(spec.origin).parent / "lib" / "libllama.so").read_bytes():
        raise common.Missing("this llama.cpp does not know deepseek4: llama-cpp-python >= 0.3.36")
    config = synthetic.flash(RATIOS, EXPERTS, VOCAB)
    return whole.compare(
        whole.Ours(synthetic.write(folder / "flash", config), threads),
        {"": Theirs(write_gguf(folder / "flash.gguf", config), threads)},
        VOCAB, rounds, threads, only,
        {f"e2e_{what}_vs_llamacpp": whole.PROMPT for what in ("decode", "prefill")},
        f"llama.cpp (llama-cpp-python {common.version('llama-cpp-python')})",
        f"{len(RATIOS)} layers of V4-Flash")
