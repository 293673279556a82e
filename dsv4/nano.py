# SPDX-License-Identifier: Apache-2.0
"""Tiny random DeepSeek-V4 checkpoints in the official on-disk format, from NumPy alone.

`make(name, seed, folder, **changes)` writes one; `CHECKPOINTS` holds the seeds and config changes
of the five that the stored expected values belong to.  Every byte is a function of the seed: raw
Philox words, integer sums, and IEEE operations that round one way only (no exp, no log, no
reductions of floats), so the files are the same with every NumPy on every machine.
Source: SPEC 1, 6.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Tensors = dict[str, tuple[str, Array]]

F32 = np.float32
DTYPE_ORDER = ("I64", "F32", "BF16", "F8_E8M0", "F8_E4M3", "I8")

CONFIG: dict[str, Any] = dict(
    architectures=["DeepseekV4ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    bos_token_id=0, eos_token_id=1, expert_dtype="fp4", hc_eps=1e-6, hc_mult=4,
    hc_sinkhorn_iters=20, head_dim=512, hidden_act="silu", hidden_size=256, index_head_dim=128,
    index_n_heads=8, index_topk=16, initializer_range=0.02, max_position_embeddings=1048576,
    model_type="deepseek_v4", moe_intermediate_size=128, n_routed_experts=8, n_shared_experts=1,
    norm_topk_prob=True, num_attention_heads=4, num_experts_per_tok=3, num_hidden_layers=4,
    num_hash_layers=2, num_key_value_heads=1, num_nextn_predict_layers=1, o_groups=2,
    o_lora_rank=128, q_lora_rank=128, qk_rope_head_dim=64,
    quantization_config=dict(
        activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", scale_fmt="ue8m0",
        weight_block_size=[128, 128]),
    rms_norm_eps=1e-6,
    rope_scaling=dict(
        beta_fast=32, beta_slow=1, factor=16, original_max_position_embeddings=65536, type="yarn"),
    rope_theta=10000, routed_scaling_factor=1.5, scoring_func="sqrtsoftplus", sliding_window=128,
    swiglu_limit=10.0, tie_word_embeddings=False, topk_method="noaux_tc", torch_dtype="bfloat16",
    transformers_version="4.57.1", use_cache=True, vocab_size=512, compress_rope_theta=160000,
    compress_ratios=[0, 4, 128, 4, 0])

GENERATION_CONFIG: dict[str, Any] = dict(
    _from_model_config=True, bos_token_id=0, eos_token_id=1, do_sample=True, temperature=1.0,
    top_p=1.0, transformers_version="4.46.3")

# name: (seed, changes).  Not config keys: mtp (draft blocks), fp8_experts, f32_scales.
CHECKPOINTS: dict[str, tuple[int, dict[str, Any]]] = {
    "nano-flash": (11, {}),
    "nano-pro": (12, dict(
        compress_ratios=[128, 4, 0], num_hidden_layers=2, num_hash_layers=1, hidden_size=384,
        num_attention_heads=2, n_routed_experts=10, num_experts_per_tok=6, vocab_size=384,
        routed_scaling_factor=2.5, index_n_heads=6, index_topk=24)),
    "nano-base": (13, dict(
        mtp=0, fp8_experts=True, f32_scales=True, compress_ratios=[0, 128, 4], num_hidden_layers=3,
        num_hash_layers=1, num_nextn_predict_layers=0, hidden_size=128, num_attention_heads=2,
        o_groups=1, q_lora_rank=256, moe_intermediate_size=256, n_routed_experts=4,
        num_experts_per_tok=2, index_n_heads=4, index_topk=20, vocab_size=384)),
    "nano-0731": (14, dict(
        mtp=3, compress_ratios=[0, 4, 0, 0, 0, 0], num_hidden_layers=3, num_hash_layers=1,
        num_attention_heads=2, o_groups=1, hidden_size=128, n_routed_experts=4,
        num_experts_per_tok=2, dspark_block_size=5, dspark_markov_rank=128,
        dspark_noise_token_id=383, vocab_size=384, dspark_target_layer_ids=[0, 1, 2])),
    "nano-odd": (15, dict(
        compress_ratios=[32, 4, 0, 0], num_hidden_layers=3, num_hash_layers=1, hidden_size=128,
        head_dim=192, index_head_dim=64, index_n_heads=5, index_topk=9, sliding_window=32,
        hc_mult=2, hc_sinkhorn_iters=7, hc_eps=1e-4, rms_norm_eps=1e-5, n_routed_experts=5,
        num_experts_per_tok=2, swiglu_limit=7.0, routed_scaling_factor=1.75, vocab_size=331,
        rope_theta=5000, compress_rope_theta=70000,
        rope_scaling=dict(
            beta_fast=16, beta_slow=2, factor=8, original_max_position_embeddings=4096,
            type="yarn"))),
}


# ---- formats ----

E4M3 = np.array(
    [c * 2.0**-9 if c < 8 else (8 + c % 8) * 2.0 ** (c // 8 - 10) for c in range(127)])
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def bf16_bits(x: Array) -> Array:
    """Bits (uint16) of the nearest bfloat16, ties to even."""
    u = np.ascontiguousarray(x, F32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def nearest_code(x: Array, table: Array, sign_bit: int) -> Array:
    """Code (uint8) of the nearest table magnitude, ties to the even code, sign kept, saturating."""
    a = np.minimum(np.abs(x).astype(np.float64), table[-1])
    i = np.clip(np.searchsorted(table, a), 1, len(table) - 1)
    low, high = a - table[i - 1], table[i] - a
    code = np.where((low < high) | ((low == high) & ((i - 1) % 2 == 0)), i - 1, i)
    return np.asarray(code | np.where(np.signbit(x), sign_bit, 0), np.uint8)


def ceil_pow2(x: Array) -> Array:
    """Exponent e of the smallest power of two 2^e >= x > 0."""
    m, e = np.frexp(x)
    result: Array = np.where(m == 0.5, e - 1, e)
    return result


def each_block(scales: Array, n: int, k: int) -> Array:
    """The value of every element's 128 x 128 block, [n, k]."""
    return np.repeat(np.repeat(scales, 128, 0)[:n], 128, 1)[:, :k]


def root(n: int) -> Any:
    return np.sqrt(F32(n))


class Draw:
    """Random numbers that are the same everywhere."""

    def __init__(self, seed: int) -> None:
        self.bits = np.random.Philox(seed)

    def words(self, *shape: int) -> Array:
        return self.bits.random_raw(int(np.prod(shape))).reshape(shape)

    def bell(self, *shape: int) -> Array:
        """About N(0, 1): the sum of four 16-bit integers, within 3.5 sigma, float32."""
        w = self.words(*shape)
        mask = np.uint64(0xFFFF)
        s = sum(((w >> np.uint64(k)) & mask).astype(np.int64) for k in (0, 16, 32, 48)) - 131070
        return np.asarray(s, F32) * F32(2.0**-15) * F32(0.8660254)

    def flat(self, lo: float, hi: float, *shape: int) -> Array:
        """Uniform in [lo, hi), 24 bits, float32."""
        u = (self.words(*shape) >> np.uint64(40)).astype(F32) * F32(2.0**-24)
        return F32(lo) + F32(hi - lo) * u

    def spread(self, octaves: float, *shape: int) -> Array:
        """Positive magnitudes between 2^-octaves and 2^octaves, about log-uniform, float32."""
        e = self.flat(-octaves, octaves, *shape)
        whole = np.floor(e)
        return (np.ldexp(F32(1), whole.astype(np.int32)) * (F32(1) + (e - whole))).astype(F32)

    def choice(self, rows: int, n: int, k: int) -> Array:
        """rows of k different numbers below n."""
        return np.argsort(self.words(rows, n), axis=1, kind="stable")[:, :k].astype(np.int64)


# ---- the checkpoint ----

class Maker:
    """Draws the tensors of one checkpoint, in a fixed order: the order is part of the bytes."""

    def __init__(
        self, seed: int, config: dict[str, Any], mtp: int, fp8_experts: bool, f32_scales: bool
    ) -> None:
        self.draw = Draw(seed)
        self.config = config
        self.mtp = mtp
        self.fp8_experts = fp8_experts
        self.f32_scales = f32_scales
        self.dspark = "dspark_block_size" in config
        self.tensors: Tensors = {}

    def shards(self) -> Iterator[Tensors]:
        """One dict of tensors per shard: embedding, each layer, head, each draft block."""
        c = self.config
        d, vocab, layers = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
        self.bf16("embed.weight", self.draw.bell(vocab, d))
        yield self.take()
        for i in range(layers):
            self.block(f"layers.{i}.", i)
            yield self.take()
        self.bf16("head.weight", self.draw.bell(vocab, d) * (F32(2.6) / root(d)))
        self.norm("norm.weight", d, 0.6, 1.5, blocky=False)
        self.hyper("", "hc_head", c["hc_mult"])
        yield self.take()
        for j in range(self.mtp):
            self.draft(f"mtp.{j}.", layers + j, j)
            yield self.take()

    def take(self) -> Tensors:
        tensors, self.tensors = self.tensors, {}
        return tensors

    def put(self, name: str, dtype: str, array: Array) -> None:
        self.tensors[name] = (dtype, array)

    def bf16(self, name: str, w: Array) -> None:
        self.put(name, "BF16", bf16_bits(w))

    def f32(self, name: str, w: Array) -> None:
        self.put(name, "F32", np.ascontiguousarray(w, F32))

    def blocky(self, n: int, k: int, gain: float) -> Array:
        """About N(0, gain^2 / k), with another magnitude in every 128 x 128 block and every row."""
        f = self.draw.spread(1.0, -(-n // 128), -(-k // 128)) * F32(0.85)
        row = self.draw.spread(0.5, n, 1)
        w = self.draw.bell(n, k) * (F32(gain) / root(k))
        return np.asarray(w * each_block(f, n, k) * row)

    def fp8(self, name: str, n: int, k: int, gain: float) -> None:
        w = self.blocky(n, k, gain)
        bn, bk = -(-n // 128), -(-k // 128)
        pad = np.zeros((bn * 128, bk * 128), F32)
        pad[:n, :k] = np.abs(w)
        s = np.maximum(pad.reshape(bn, 128, bk, 128).max((1, 3)), F32(1e-6)) / F32(448)
        e = ceil_pow2(s)
        if not self.f32_scales:
            s = np.ldexp(F32(1), e).astype(F32)
        codes = nearest_code(w / each_block(s, n, k), E4M3, 0x80)
        self.put(name + ".weight", "F8_E4M3", codes)
        if self.f32_scales:
            self.put(name + ".scale", "F32", s)
        else:
            self.put(name + ".scale", "F8_E8M0", (e + 127).astype(np.uint8))

    def fp4(self, name: str, n: int, k: int, gain: float) -> None:
        w = self.blocky(n, k, gain) * np.repeat(self.draw.spread(0.7, n, k // 32), 32, 1)
        peak = np.abs(w).reshape(n, k // 32, 32).max(-1)
        e = ceil_pow2(np.maximum(peak, F32(1e-6)) / F32(6))
        c = nearest_code(w / np.repeat(np.ldexp(F32(1), e).astype(F32), 32, 1), E2M1, 8)
        self.put(name + ".weight", "I8", c[:, 0::2] | (c[:, 1::2] << 4))
        self.put(name + ".scale", "F8_E8M0", (e + 127).astype(np.uint8))

    def norm(
        self, name: str, n: int, lo: float = 0.6, hi: float = 1.5, *, blocky: bool = True
    ) -> None:
        w = self.draw.flat(lo, hi, n)
        if blocky:  # a magnitude per 128: activation scales differ between blocks
            w = w * np.repeat(self.draw.spread(1.2, -(-n // 128)) * F32(0.8), 128)[:n]
        self.bf16(name, w)

    def hyper(self, prefix: str, name: str, rows: int) -> None:
        h, d = self.config["hc_mult"], self.config["hidden_size"]
        self.f32(f"{prefix}{name}_fn", self.draw.bell(rows, h * d) / root(h * d))
        base = self.draw.bell(rows)
        if rows > h:  # far from symmetric and from doubly stochastic
            base[2 * h :] *= F32(1.6)
        self.f32(f"{prefix}{name}_base", base)
        self.f32(f"{prefix}{name}_scale", self.draw.flat(0.3, 0.8, 3 if rows > h else 1))

    def compressor(self, p: str, ratio: int, head_dim: int, *, main: bool) -> None:
        d = self.config["hidden_size"]
        width = head_dim * (2 if ratio == 4 else 1)
        self.f32(p + "ape", self.draw.bell(ratio, width) * F32(0.6))
        self.norm(p + "norm.weight", head_dim, *((1.6, 3.0) if main else (0.7, 1.4)), blocky=False)
        self.bf16(p + "wkv.weight", self.blocky(width, d, 1.0))
        self.bf16(p + "wgate.weight", self.blocky(width, d, 1.3))

    def block(self, p: str, layer: int) -> None:
        hc, d = self.config["hc_mult"], self.config["hidden_size"]
        self.hyper(p, "hc_attn", (2 + hc) * hc)
        self.hyper(p, "hc_ffn", (2 + hc) * hc)
        self.norm(p + "attn_norm.weight", d)
        self.norm(p + "ffn_norm.weight", d)
        self.attention(p + "attn.", self.config["compress_ratios"][layer])
        self.experts(p + "ffn.", layer)

    def attention(self, a: str, ratio: int) -> None:
        c = self.config
        d, heads, head_dim = c["hidden_size"], c["num_attention_heads"], c["head_dim"]
        q_rank, groups, rank = c["q_lora_rank"], c["o_groups"], c["o_lora_rank"]
        self.f32(a + "attn_sink", self.draw.bell(heads) * F32(1.5) + F32(1))
        self.norm(a + "q_norm.weight", q_rank)
        self.norm(a + "kv_norm.weight", head_dim, 1.0, 1.8, blocky=False)
        self.fp8(a + "wq_a", q_rank, d, 1.0)
        self.fp8(a + "wq_b", heads * head_dim, q_rank, 1.0)
        self.fp8(a + "wkv", head_dim, d, 1.0)
        self.fp8(a + "wo_a", groups * rank, heads * head_dim // groups, 1.0)
        self.fp8(a + "wo_b", d, groups * rank, 0.5)
        if ratio:
            self.compressor(a + "compressor.", ratio, head_dim, main=True)
        if ratio == 4:
            index_heads, index_dim = c["index_n_heads"], c["index_head_dim"]
            self.fp8(a + "indexer.wq_b", index_heads * index_dim, q_rank, 1.0)
            self.bf16(a + "indexer.weights_proj.weight", self.draw.bell(index_heads, d) / root(d))
            self.compressor(a + "indexer.compressor.", 4, index_dim, main=False)

    def experts(self, f: str, layer: int) -> None:
        c = self.config
        d, n, width = c["hidden_size"], c["n_routed_experts"], c["moe_intermediate_size"]
        self.bf16(f + "gate.weight", self.draw.bell(n, d) * (F32(1.6) / root(d)))
        if layer < c["num_hash_layers"]:
            table = self.draw.choice(c["vocab_size"], n, c["num_experts_per_tok"])
            self.put(f + "gate.tid2eid", "I64", table)
        else:
            self.f32(f + "gate.bias", self.draw.bell(n) * F32(0.35))
        linear = self.fp8 if self.fp8_experts else self.fp4
        for name in [*(f"experts.{i}" for i in range(n)), "shared_experts"]:
            if name == "shared_experts":
                linear = self.fp8
            linear(f"{f}{name}.w1", width, d, 3.0)
            linear(f"{f}{name}.w2", d, width, 0.035)
            linear(f"{f}{name}.w3", width, d, 3.0)

    def draft(self, p: str, layer: int, j: int) -> None:
        """A draft block: an MTP block, or stage j of DSpark."""
        d, vocab = self.config["hidden_size"], self.config["vocab_size"]
        self.block(p, layer)
        if not self.dspark:
            self.fp8(p + "e_proj", d, d, 0.7)
            self.fp8(p + "h_proj", d, d, 0.7)
            self.norm(p + "enorm.weight", d)
            self.norm(p + "hnorm.weight", d)
        elif j == 0:
            self.fp8(p + "main_proj", d, d * len(self.config["dspark_target_layer_ids"]), 1.0)
            self.norm(p + "main_norm.weight", d)
        if not self.dspark or j == self.mtp - 1:
            self.norm(p + "norm.weight", d, 0.6, 1.5, blocky=False)
            self.hyper(p, "hc_head", self.config["hc_mult"])
        if self.dspark and j == self.mtp - 1:
            rank = self.config["dspark_markov_rank"]
            markov = p + "markov_head.markov_"
            self.bf16(markov + "w1.weight", self.draw.bell(vocab, rank))
            self.bf16(markov + "w2.weight", self.draw.bell(vocab, rank) * (F32(1.2) / root(rank)))
            confidence = self.draw.bell(1, d + rank) * (F32(1.5) / root(d + rank))
            self.bf16(p + "confidence_head.proj.weight", confidence)


def write_shard(path: str | Path, tensors: Tensors) -> int:
    """Write one safetensors file and return its tensor bytes.

    Grouped by dtype, then by name, packed without alignment, like the published shards.
    """
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = []
    offset = 0
    for name in sorted(tensors, key=lambda name: (DTYPE_ORDER.index(tensors[name][0]), name)):
        dtype, array = tensors[name]
        raw = np.ascontiguousarray(array).tobytes()
        end = offset + len(raw)
        head[name] = dict(dtype=dtype, shape=list(array.shape), data_offsets=[offset, end])
        offset = end
        body.append(raw)
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(body))
    return offset


def make(
    name: str, seed: int, folder: str | Path, *, mtp: int = 1, fp8_experts: bool = False,
    f32_scales: bool = False, **changes: Any,
) -> Path:
    """Write a random checkpoint.

    Parameters
    ----------
    name : str
        Name of the folder made inside `folder`; shards already there are replaced.
    seed : int
        All weights follow from it.
    folder : path
        Where the checkpoint folder is made.
    mtp : int
        Draft blocks: MTP blocks, or DSpark stages if the config has `dspark_block_size`.
    fp8_experts : bool
        Routed experts in FP8 blocks of 128 x 128 instead of FP4, as in the Base models.
    f32_scales : bool
        Block scales as F32 that are not powers of two, instead of E8M0.
    **changes
        Keys of config.json that differ from `CONFIG` (nano-flash).

    Returns
    -------
    Path
        folder / name.

    Examples
    --------
    >>> import tempfile
    >>> seed, changes = CHECKPOINTS["nano-odd"]
    >>> with tempfile.TemporaryDirectory() as there:
    ...     sorted(p.suffix for p in make("nano-odd", seed, there, **changes).iterdir())[:3]
    ['.json', '.json', '.json']
    """
    config = dict(CONFIG, **changes)
    if fp8_experts:
        config.pop("expert_dtype")
    out = Path(folder) / name
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.safetensors"):
        old.unlink()
    shards = list(Maker(seed, config, mtp, fp8_experts, f32_scales).shards())
    total, where = 0, {}
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        total += write_shard(out / file, tensors)
        where.update(dict.fromkeys(tensors, file))
    index = dict(metadata=dict(total_size=total), weight_map=dict(sorted(where.items())))
    for file, value in (
        ("config.json", config),
        ("model.safetensors.index.json", index),
        ("generation_config.json", GENERATION_CONFIG),
    ):
        (out / file).write_text(json.dumps(value, indent=2) + "\n")
    return out


def make_stored(name: str, folder: str | Path) -> Path:
    """Write one of the checkpoints of `CHECKPOINTS` into folder / name and return that path."""
    seed, changes = CHECKPOINTS[name]
    return make(name, seed, folder, **changes)
