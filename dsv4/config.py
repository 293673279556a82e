# SPDX-License-Identifier: Apache-2.0
"""config.json: every number the model needs, typed, range-checked, and none of them guessed.

No model value has a default here: a config that lacks a needed key is refused by name.  Field names
are the keys of the official file.  The newer spelling that transformers writes (layer_types,
compress_rates, rope_parameters, mlp_layer_types, partial_rotary_factor) is translated into the
official one.  Source: SPEC 1.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.errors import FormatError
from dsv4.files import Folder

MODEL_TYPE = "deepseek_v4"
MAX_BYTES = 4 << 20
CSA_RATIO = 4
INT_MAX = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """The YaRN numbers of the layers with compressed keys."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The numbers of one model, under the names of its config.json.

    `compress_ratios` has one entry per main layer and, after them, one per draft block: 0 is a
    sliding-window layer, 4 compressed sparse attention (overlapping windows, indexer), any other
    number heavily compressed attention.  The first `num_hash_layers` layers route by token id.
    `expert_dtype` is None where the file does not say; `quantized` tells whether it has a
    quantization_config; the `dspark_*` fields are None for a model without DSpark.

    Examples
    --------
    >>> from dsv4 import nano
    >>> config = Config.from_json(nano.CONFIG)
    >>> config.hidden_size, config.layer_kind(1)
    (256, 'CSA')
    """

    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    sliding_window: int
    compress_ratios: tuple[int, ...]
    compress_rope_theta: float
    rope_theta: float
    rope_scaling: RopeScaling
    max_position_embeddings: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    bos_token_id: int
    eos_token_id: int
    expert_dtype: str | None
    quantized: bool
    dspark_block_size: int | None
    dspark_markov_rank: int | None
    dspark_noise_token_id: int | None
    dspark_target_layer_ids: tuple[int, ...] | None

    @classmethod
    def from_json(cls, source: Mapping[str, Any] | str | os.PathLike[str]) -> "Config":
        """Read and check a config.

        Parameters
        ----------
        source : mapping or path
            The object in config.json, the folder that holds config.json, or the file itself.

        Raises
        ------
        FormatError
            With `file` and, as `rule`, the key that is missing or wrong.
        """
        if isinstance(source, Mapping):
            return _build(source, "config.json")
        path = Path(source)
        name = "config.json" if path.is_dir() else path.name
        with Folder(path if path.is_dir() else path.parent) as folder:
            return read_config(folder, name)

    def layer_kind(self, layer: int) -> str:
        """"SWA", "CSA" or "HCA": the attention of a main layer, or of a draft block after them."""
        ratio = self.compress_ratios[layer]
        return "SWA" if ratio == 0 else "CSA" if ratio == CSA_RATIO else "HCA"

    @property
    def nope_head_dim(self) -> int:
        """Dimensions of a head that are not rotated."""
        return self.head_dim - self.qk_rope_head_dim


def read_config(folder: Folder, name: str = "config.json") -> Config:
    """The config of an open folder."""
    value = folder.read_json(name, MAX_BYTES)
    if not isinstance(value, dict):
        raise FormatError(file=name, rule="JSON", got=type(value).__name__, wanted="an object")
    return _build(value, name)


class _Keys:
    """Typed access to the keys of one JSON object."""

    def __init__(self, value: Mapping[str, Any], file: str, prefix: str = "") -> None:
        self.value = value
        self.file = file
        self.prefix = prefix

    def fail(self, key: str, got: object, wanted: str) -> FormatError:
        return FormatError(file=self.file, rule=self.prefix + key, got=got, wanted=wanted)

    def has(self, key: str) -> bool:
        return self.value.get(key) is not None

    def get(self, key: str) -> Any:
        if not self.has(key):
            raise self.fail(key, "null" if key in self.value else "no such key", "a value")
        return self.value[key]

    def integer(self, key: str, low: int = 1, high: int = INT_MAX) -> int:
        got = self.get(key)
        if type(got) is not int or not low <= got <= high:
            raise self.fail(key, got, f"an integer from {low} to {high}")
        return got

    def number(self, key: str, low: float, high: float = 1e30) -> float:
        """A finite number, low < x <= high."""
        got = self.get(key)
        if type(got) not in (int, float) or not low < got <= high:
            raise self.fail(key, got, f"a number above {low:g} and at most {high:g}")
        return float(got)

    def integers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        got = self.get(key)
        if not isinstance(got, (list, tuple)):
            raise self.fail(key, got, "a list of integers")
        for i, item in enumerate(got):
            if type(item) is not int or not low <= item <= high:
                raise self.fail(f"{key}[{i}]", item, f"an integer from {low} to {high}")
        return tuple(got)

    def sub(self, key: str) -> "_Keys":
        got = self.get(key)
        if not isinstance(got, Mapping):
            raise self.fail(key, got, "an object")
        return _Keys(got, self.file, f"{self.prefix}{key}.")

    def must_be(self, key: str, wanted: object) -> None:
        """A key that may be absent, and has one value the model can be computed with."""
        got = self.value.get(key)
        if got is not None and (type(got) is not type(wanted) or got != wanted):
            raise self.fail(key, got, repr(wanted))


def _build(value: Mapping[str, Any], file: str) -> Config:
    k = _Keys(value, file)
    _check_model_type(k)
    layers = k.integer("num_hidden_layers", high=10_000)
    head_dim = k.integer("head_dim", high=1 << 16)
    theta, compress_theta, scaling = _rope(k)
    dspark = _dspark(k, layers)
    config = Config(
        vocab_size=k.integer("vocab_size"),
        hidden_size=k.integer("hidden_size", high=1 << 20),
        moe_intermediate_size=k.integer("moe_intermediate_size", high=1 << 20),
        num_hidden_layers=layers,
        num_attention_heads=k.integer("num_attention_heads", high=1 << 14),
        head_dim=head_dim,
        qk_rope_head_dim=_rotary_dims(k, head_dim),
        q_lora_rank=k.integer("q_lora_rank", high=1 << 20),
        o_groups=k.integer("o_groups", high=1 << 14),
        o_lora_rank=k.integer("o_lora_rank", high=1 << 20),
        n_routed_experts=k.integer("n_routed_experts", high=1 << 16),
        n_shared_experts=k.integer("n_shared_experts", high=1),
        num_experts_per_tok=k.integer("num_experts_per_tok", high=1 << 10),
        num_hash_layers=_hash_layers(k, layers),
        routed_scaling_factor=k.number("routed_scaling_factor", 0),
        swiglu_limit=k.number("swiglu_limit", 0),
        sliding_window=k.integer("sliding_window", high=1 << 20),
        compress_ratios=_ratios(k, layers),
        compress_rope_theta=compress_theta,
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=k.integer("max_position_embeddings"),
        index_n_heads=k.integer("index_n_heads", high=1 << 14),
        index_head_dim=k.integer("index_head_dim", high=1 << 12),
        index_topk=k.integer("index_topk"),
        hc_mult=k.integer("hc_mult", high=64),
        hc_sinkhorn_iters=k.integer("hc_sinkhorn_iters", high=10_000),
        hc_eps=k.number("hc_eps", 0, 1),
        rms_norm_eps=k.number("rms_norm_eps", 0, 1),
        bos_token_id=k.integer("bos_token_id", 0),
        eos_token_id=k.integer("eos_token_id", 0),
        expert_dtype=_expert_dtype(k),
        quantized=_quantized(k),
        **dspark,
    )
    _check_relations(k, config)
    return config


def _check_model_type(k: _Keys) -> None:
    if "n_layers" in k.value and "num_hidden_layers" not in k.value:
        raise k.fail(
            "model_type", "the file of the reference code (inference/config.json)",
            "the config.json beside the shards",
        )
    got = k.get("model_type")
    if got == MODEL_TYPE:
        return
    name = str(got)
    family = ""
    if name.startswith("deepseek_v4"):
        family = ": DeepSeek V4.1 has another architecture"
    elif name.startswith("deepseek"):
        family = ": another DeepSeek generation has another architecture"
    raise k.fail("model_type", got, f"{MODEL_TYPE!r}{family}")


def _ratios(k: _Keys, layers: int) -> tuple[int, ...]:
    """compress_ratios, or the same from layer_types and compress_rates."""
    derived = _layer_types(k, layers) if k.has("layer_types") else None
    if derived is not None and not k.has("compress_ratios"):
        return derived
    ratios = k.integers("compress_ratios", 0, 1 << 16)
    if len(ratios) < layers:
        wanted = f"at least {layers}: one per layer, then one per draft block"
        raise k.fail("compress_ratios", f"{len(ratios)} entries", wanted)
    if 1 in ratios:
        raise k.fail(f"compress_ratios[{ratios.index(1)}]", 1, "0, 4 or another number from 2")
    if derived is not None and ratios[:layers] != derived:
        raise k.fail("layer_types", list(derived), f"compress_ratios {list(ratios[:layers])}")
    return ratios


def _layer_types(k: _Keys, layers: int) -> tuple[int, ...]:
    rates = {"sliding_attention": 0}
    for name, legacy in (
        ("compressed_sparse_attention", "compress_rate_csa"),
        ("heavily_compressed_attention", "compress_rate_hca"),
    ):
        if k.has(legacy):
            rates[name] = k.integer(legacy, 2, 1 << 16)
        elif k.has("compress_rates") and k.sub("compress_rates").has(name):
            rates[name] = k.sub("compress_rates").integer(name, 2, 1 << 16)
    if rates.get("compressed_sparse_attention", CSA_RATIO) != CSA_RATIO:
        got = rates["compressed_sparse_attention"]
        raise k.fail("compress_rates.compressed_sparse_attention", got, str(CSA_RATIO))
    if rates.get("heavily_compressed_attention") == CSA_RATIO:
        wanted = f"a rate other than {CSA_RATIO}"
        raise k.fail("compress_rates.heavily_compressed_attention", CSA_RATIO, wanted)
    types = k.get("layer_types")
    if not isinstance(types, (list, tuple)) or len(types) != layers:
        raise k.fail("layer_types", types, f"a list of {layers} layer types")
    for i, name in enumerate(types):
        if not isinstance(name, str) or name not in rates:
            wanted = f"one of {', '.join(rates)}, with its entry in compress_rates"
            raise k.fail(f"layer_types[{i}]", name, wanted)
    return tuple(rates[name] for name in types)


def _hash_layers(k: _Keys, layers: int) -> int:
    """num_hash_layers, or the leading hash_moe entries of mlp_layer_types."""
    if not k.has("mlp_layer_types"):
        return k.integer("num_hash_layers", 0, layers)
    types = k.get("mlp_layer_types")
    count = types.count("hash_moe") if isinstance(types, (list, tuple)) else 0
    wanted = ["hash_moe"] * count + ["moe"] * (layers - count)
    if not isinstance(types, (list, tuple)) or list(types) != wanted:
        raise k.fail("mlp_layer_types", types, f"{layers} entries: hash_moe first, then moe")
    if k.has("num_hash_layers") and k.integer("num_hash_layers", 0, layers) != count:
        needed = f"num_hash_layers = {k.get('num_hash_layers')}"
        raise k.fail("mlp_layer_types", f"{count} times hash_moe", needed)
    return count


def _rotary_dims(k: _Keys, head_dim: int) -> int:
    holder = k
    if not k.has("partial_rotary_factor") and k.has("rope_parameters"):
        holder = k.sub("rope_parameters").sub("main")
    if k.has("qk_rope_head_dim") or not holder.has("partial_rotary_factor"):
        return k.integer("qk_rope_head_dim", 2, head_dim)
    dims = holder.number("partial_rotary_factor", 0, 1) * head_dim
    if dims != math.floor(dims) or dims < 2:
        wanted = f"a share of head_dim {head_dim} that is a whole number of dimensions"
        raise holder.fail("partial_rotary_factor", dims / head_dim, wanted)
    return int(dims)


def _rope(k: _Keys) -> tuple[float, float, RopeScaling]:
    """rope_theta, compress_rope_theta and the YaRN numbers, from either spelling."""
    if k.has("rope_parameters"):
        both = k.sub("rope_parameters")
        main, compress = both.sub("main"), both.sub("compress")
        main.must_be("rope_type", "default")
        theta, compress_theta = main, compress
        theta_key = compress_key = "rope_theta"
    else:
        theta, compress_theta, compress = k, k, k.sub("rope_scaling")
        theta_key, compress_key = "rope_theta", "compress_rope_theta"
    kind = "rope_type" if compress.has("rope_type") else "type"
    if compress.get(kind) != "yarn":
        raise compress.fail(kind, compress.get(kind), "'yarn'")
    if compress.has("attention_factor") and compress.number("attention_factor", 0) != 1:
        raise compress.fail("attention_factor", compress.get("attention_factor"), "1.0")
    scaling = RopeScaling(
        factor=compress.number("factor", 0),
        original_max_position_embeddings=compress.integer("original_max_position_embeddings"),
        beta_fast=compress.number("beta_fast", 0),
        beta_slow=compress.number("beta_slow", 0),
    )
    if scaling.factor < 1:
        raise compress.fail("factor", scaling.factor, "at least 1")
    if scaling.beta_slow >= scaling.beta_fast:
        wanted = f"below beta_fast {scaling.beta_fast:g}"
        raise compress.fail("beta_slow", scaling.beta_slow, wanted)
    return theta.number(theta_key, 1), compress_theta.number(compress_key, 1), scaling


def _expert_dtype(k: _Keys) -> str | None:
    if not k.has("expert_dtype"):
        return None
    got = k.get("expert_dtype")
    if got not in ("fp4", "fp8"):
        raise k.fail("expert_dtype", got, "'fp4' or 'fp8'")
    return str(got)


def _quantized(k: _Keys) -> bool:
    if not k.has("quantization_config"):
        return False
    q = k.sub("quantization_config")
    q.get("quant_method")
    q.must_be("quant_method", "fp8")
    q.must_be("fmt", "e4m3")
    q.must_be("activation_scheme", "dynamic")
    block = q.integers("weight_block_size", 1, INT_MAX)
    if block != (128, 128):
        raise q.fail("weight_block_size", list(block), "[128, 128]")
    return True


def _dspark(k: _Keys, layers: int) -> dict[str, Any]:
    """The dspark_* keys: all of them or none."""
    names = (
        "dspark_block_size", "dspark_markov_rank", "dspark_noise_token_id",
        "dspark_target_layer_ids",
    )
    if not any(k.has(name) for name in names):
        return dict.fromkeys(names)
    targets = k.integers("dspark_target_layer_ids", 0, layers - 1)
    if not targets or len(set(targets)) != len(targets):
        raise k.fail("dspark_target_layer_ids", list(targets), "different layers, at least one")
    return dict(
        dspark_block_size=k.integer("dspark_block_size", high=1024),
        dspark_markov_rank=k.integer("dspark_markov_rank", high=1 << 20),
        dspark_noise_token_id=k.integer("dspark_noise_token_id", 0),
        dspark_target_layer_ids=targets,
    )


def _check_relations(k: _Keys, c: Config) -> None:
    """What must hold between the numbers for the layers to be computable."""
    for key, value in (
        ("num_key_value_heads", 1), ("hidden_act", "silu"), ("scoring_func", "sqrtsoftplus"),
        ("topk_method", "noaux_tc"), ("attention_bias", False), ("tie_word_embeddings", False),
    ):
        k.must_be(key, value)
    if c.qk_rope_head_dim % 2 or c.nope_head_dim <= 0 or c.nope_head_dim % 64:
        wanted = f"even, and head_dim {c.head_dim} less it a multiple of 64 above 0"
        raise k.fail("qk_rope_head_dim", c.qk_rope_head_dim, wanted)
    if c.index_head_dim % 32 or c.index_head_dim & (c.index_head_dim - 1):
        raise k.fail("index_head_dim", c.index_head_dim, "a power of two from 32")
    if c.index_head_dim < c.qk_rope_head_dim:
        wanted = f"at least qk_rope_head_dim {c.qk_rope_head_dim}"
        raise k.fail("index_head_dim", c.index_head_dim, wanted)
    if c.num_attention_heads % c.o_groups:
        wanted = f"a divisor of num_attention_heads {c.num_attention_heads}"
        raise k.fail("o_groups", c.o_groups, wanted)
    if c.num_experts_per_tok > c.n_routed_experts:
        wanted = f"at most n_routed_experts {c.n_routed_experts}"
        raise k.fail("num_experts_per_tok", c.num_experts_per_tok, wanted)
    for key in ("bos_token_id", "eos_token_id", "dspark_noise_token_id"):
        token = getattr(c, key)
        if token is not None and token >= c.vocab_size:
            raise k.fail(key, token, f"below vocab_size {c.vocab_size}")
    if c.quantized:
        widths = dict(
            hidden_size=c.hidden_size, q_lora_rank=c.q_lora_rank,
            moe_intermediate_size=c.moe_intermediate_size, o_lora_rank=c.o_lora_rank * c.o_groups,
        )
        for key, width in widths.items():
            if width % 128:
                raise k.fail(key, width, "a multiple of 128: activations are quantised by 128")
