# SPDX-License-Identifier: Apache-2.0
"""config.json: the published values, both spellings, and everything that is refused by name."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.config import Config, RopeScaling
from dsv4.errors import FormatError
from dsv4.layout import expected
from dsv4.nano import CONFIG

NEEDED = (
    "bos_token_id compress_ratios compress_rope_theta eos_token_id hc_eps hc_mult "
    "hc_sinkhorn_iters head_dim hidden_size index_head_dim index_n_heads index_topk "
    "max_position_embeddings model_type moe_intermediate_size n_routed_experts n_shared_experts "
    "num_attention_heads num_experts_per_tok num_hash_layers num_hidden_layers o_groups "
    "o_lora_rank q_lora_rank qk_rope_head_dim rms_norm_eps rope_scaling rope_theta "
    "routed_scaling_factor sliding_window swiglu_limit vocab_size"
).split()


@pytest.fixture
def published(vectors):
    def read(name):
        return json.loads((vectors / "configs" / f"{name}.json").read_text())

    return read


def refused(value, rule, *words):
    with pytest.raises(FormatError) as caught:
        Config.from_json(value)
    error = caught.value
    assert error.file == "config.json" and error.rule == rule, error
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize(
    ("name", "numbers", "kinds"),
    [
        ("flash", (4096, 43, 64, 1024, 8, 256, 2048, 1.5, 512), (2, 21, 20)),
        ("flash-0731", (4096, 43, 64, 1024, 8, 256, 2048, 1.5, 512), (2, 21, 20)),
        ("pro", (7168, 61, 128, 1536, 16, 384, 3072, 2.5, 1024), (0, 30, 31)),
    ],
)
def test_published_configs(published, name, numbers, kinds):
    c = Config.from_json(published(name))
    assert numbers == (
        c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.q_lora_rank, c.o_groups,
        c.n_routed_experts, c.moe_intermediate_size, c.routed_scaling_factor, c.index_topk)
    layers = [c.layer_kind(i) for i in range(c.num_hidden_layers)]
    assert kinds == tuple(layers.count(kind) for kind in ("SWA", "CSA", "HCA"))
    # the values whose defaults in the reference code are not the model's
    assert (c.rope_theta, c.compress_rope_theta) == (10000, 160000)
    assert c.rope_scaling == RopeScaling(16, 65536, 32, 1)
    assert (c.swiglu_limit, c.max_position_embeddings, c.hc_sinkhorn_iters) == (10, 1 << 20, 20)
    assert (c.head_dim, c.qk_rope_head_dim, c.nope_head_dim) == (512, 64, 448)
    assert c.num_hash_layers == 3 and c.quantized and c.expert_dtype in ("fp4", None)
    draft = c.compress_ratios[c.num_hidden_layers :]
    assert draft == ((0, 0, 0) if name == "flash-0731" else (0,))
    dspark = (c.dspark_block_size, c.dspark_markov_rank, c.dspark_noise_token_id)
    assert dspark == ((5, 256, 128799) if name == "flash-0731" else (None, None, None))


def test_layer_42_of_flash_is_csa(published):
    c = Config.from_json(published("flash"))
    assert c.layer_kind(42) == "CSA" and c.layer_kind(43) == "SWA"


@pytest.mark.parametrize(("name", "shape"), [("flash", (8192, 4096)), ("pro", (16384, 4096))])
def test_shape_of_the_grouped_output(published, name, shape):
    c = Config.from_json(published(name))
    assert expected(c)["layers.0.attn.wo_a.weight"][1] == shape


@pytest.mark.parametrize("key", NEEDED)
def test_a_missing_key_is_refused_by_name(key):
    refused({k: v for k, v in CONFIG.items() if k != key}, key, "no such key")
    refused({**CONFIG, key: None}, key, "null")


@pytest.mark.parametrize(
    "key", ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "type"]
)
def test_a_missing_yarn_key_is_refused_by_name(key):
    scaling = {k: v for k, v in CONFIG["rope_scaling"].items() if k != key}
    refused({**CONFIG, "rope_scaling": scaling}, f"rope_scaling.{key}", "no such key")


INTEGERS = [k for k in NEEDED if type(CONFIG[k]) is int and "theta" not in k]
NUMBERS = [k for k in NEEDED if type(CONFIG[k]) is float] + ["rope_theta"]


@pytest.mark.parametrize("key", INTEGERS)
def test_integers(key):
    for wrong in (True, 1.0, "1", [1], -1, 1 << 31, float("nan")):
        refused({**CONFIG, key: wrong}, key, "an integer from")


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers(key):
    for wrong in (True, "1", -1, 0, float("nan"), float("inf"), [1.0]):
        refused({**CONFIG, key: wrong}, key, "a number above")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (dict(head_dim=510), "qk_rope_head_dim"),
        (dict(head_dim=64), "qk_rope_head_dim"),
        (dict(qk_rope_head_dim=63), "qk_rope_head_dim"),
        (dict(qk_rope_head_dim=1024), "qk_rope_head_dim"),
        (dict(index_head_dim=96), "index_head_dim"),
        (dict(index_head_dim=16), "index_head_dim"),
        (dict(index_head_dim=32), "index_head_dim"),
        (dict(o_groups=3), "o_groups"),
        (dict(num_experts_per_tok=9), "num_experts_per_tok"),
        (dict(n_shared_experts=2), "n_shared_experts"),
        (dict(num_hash_layers=5), "num_hash_layers"),
        (dict(num_key_value_heads=2), "num_key_value_heads"),
        (dict(num_key_value_heads=True), "num_key_value_heads"),
        (dict(scoring_func="sigmoid"), "scoring_func"),
        (dict(topk_method="greedy"), "topk_method"),
        (dict(hidden_act="gelu"), "hidden_act"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings"),
        (dict(compress_ratios=[0, 4, 128]), "compress_ratios"),
        (dict(compress_ratios=[0, 4, 1, 4, 0]), "compress_ratios[2]"),
        (dict(compress_ratios=[0, 4, -4, 4, 0]), "compress_ratios[2]"),
        (dict(compress_ratios=[0, 4, "4", 4, 0]), "compress_ratios[2]"),
        (dict(compress_ratios="04"), "compress_ratios"),
        (dict(bos_token_id=512), "bos_token_id"),
        (dict(eos_token_id=[1]), "eos_token_id"),
        (dict(expert_dtype="int4"), "expert_dtype"),
        (dict(quantization_config="fp8"), "quantization_config"),
        (dict(quantization_config={}), "quantization_config.quant_method"),
        (dict(quantization_config=dict(quant_method="awq")), "quantization_config.quant_method"),
        (dict(quantization_config=dict(quant_method="fp8", weight_block_size=[32, 32])),
         "quantization_config.weight_block_size"),
        (dict(hidden_size=192), "hidden_size"),
        (dict(q_lora_rank=64), "q_lora_rank"),
        (dict(moe_intermediate_size=64), "moe_intermediate_size"),
        (dict(o_lora_rank=96), "o_lora_rank"),
        (dict(dspark_block_size=5), "dspark_target_layer_ids"),
        (dict(dspark_block_size=5, dspark_target_layer_ids=[0, 4]), "dspark_target_layer_ids[1]"),
        (dict(dspark_block_size=5, dspark_target_layer_ids=[]), "dspark_target_layer_ids"),
        (dict(dspark_target_layer_ids=[0], dspark_block_size=5, dspark_markov_rank=8,
              dspark_noise_token_id=512), "dspark_noise_token_id"),
        (dict(rope_scaling=dict(CONFIG["rope_scaling"], type="linear")), "rope_scaling.type"),
        (dict(rope_scaling=dict(CONFIG["rope_scaling"], factor=0.5)), "rope_scaling.factor"),
        (dict(rope_scaling=dict(CONFIG["rope_scaling"], beta_slow=32)),
         "rope_scaling.beta_slow"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes, rule):
    refused({**CONFIG, **changes}, rule)


@pytest.mark.parametrize(
    ("model_type", "word"),
    [("deepseek_v3", "generation"), ("deepseek_v32", "generation"), ("deepseek_v41", "V4.1"),
     ("deepseek_v4_1", "V4.1"), ("llama", "deepseek_v4"), (4, "deepseek_v4")],
)
def test_other_models_are_refused_by_name(model_type, word):
    refused({**CONFIG, "model_type": model_type}, "model_type", str(model_type), word)


def test_the_config_of_the_reference_code_is_refused():
    refused({"dim": 4096, "n_layers": 43}, "model_type", "inference/config.json")


def test_norm_topk_prob_is_never_read():
    assert Config.from_json({**CONFIG, "norm_topk_prob": False}) == Config.from_json(
        CONFIG)


# ---- the spelling of transformers ----

KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention"}


def respelled(official, **changes):
    """The same config as transformers writes it."""
    c = dict(official)
    layers = c["num_hidden_layers"]
    ratios = c.pop("compress_ratios")[:layers]
    scaling = c.pop("rope_scaling")
    share = c.pop("qk_rope_head_dim") / c["head_dim"]
    high = next(r for r in ratios if r not in KINDS)
    c.update(
        layer_types=[KINDS.get(r, "heavily_compressed_attention") for r in ratios],
        compress_rates=dict(compressed_sparse_attention=4, heavily_compressed_attention=high),
        mlp_layer_types=["hash_moe"] * c["num_hash_layers"]
        + ["moe"] * (layers - c.pop("num_hash_layers")),
        partial_rotary_factor=share,
        rope_parameters=dict(
            main=dict(rope_type="default", rope_theta=c.pop("rope_theta"),
                      partial_rotary_factor=share),
            compress=dict(
                rope_type="yarn", rope_theta=c.pop("compress_rope_theta"), attention_factor=1.0,
                partial_rotary_factor=share, **{k: scaling[k] for k in scaling if k != "type"}),
        ),
    )
    return {**c, **changes}


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_both_spellings_mean_the_same(published, name):
    official = published(name)
    want = Config.from_json(official)
    got = Config.from_json(respelled(official))
    assert got.compress_ratios == want.compress_ratios[: want.num_hidden_layers]
    for field in Config.__dataclass_fields__:
        if field != "compress_ratios":
            assert getattr(got, field) == getattr(want, field)
    assert Config.from_json({**official, **respelled(official)}) == want


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (dict(layer_types=["sliding_attention"] * 3), "layer_types"),
        (dict(layer_types=["full_attention"] * 4), "layer_types[0]"),
        (dict(compress_rates={}), "layer_types[1]"),
        (dict(compress_rate_csa=8), "compress_rates.compressed_sparse_attention"),
        (dict(compress_rate_hca=4), "compress_rates.heavily_compressed_attention"),
        (dict(compress_ratios=[0, 0, 0, 0]), "layer_types"),
        (dict(mlp_layer_types=["moe", "hash_moe", "moe", "moe"]), "mlp_layer_types"),
        (dict(num_hash_layers=3), "mlp_layer_types"),
        (dict(partial_rotary_factor=0.3), "partial_rotary_factor"),
        (dict(rope_parameters={}), "rope_parameters.main"),
        (dict(rope_parameters=dict(main=dict(rope_theta=10000), compress=dict(rope_theta=1e5))),
         "rope_parameters.compress.type"),
    ],
)
def test_respelled_nonsense_is_refused(changes, rule):
    refused(respelled(CONFIG, **changes), rule)


# ---- the file ----

def test_folder_file_and_object(nano, tmp_path):
    folder = nano("nano-odd")
    config = Config.from_json(folder)
    assert config == Config.from_json(folder / "config.json")
    assert config == Config.from_json(json.loads((folder / "config.json").read_text()))
    with pytest.raises(FormatError, match="no such file|No such file"):
        Config.from_json(tmp_path)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "JSON"),
        (b"[1]", "an object"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "twice"),
        (b'{"a": {"b": 1, "b": 1}}', "twice"),
        (b'{"hidden_size": NaN}', "NaN"),
        (b'{"hidden_size": 1e999}', "not finite"),
        (b'{"hidden_size": -0}', "64 bits"),
        (b'{"hidden_size": ' + b"1" * 1_000_000 + b"}", "64 bits"),
        (b'{"model_type": "\\ud800"}', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b'{"model_type": "\xff"}', "UTF-8"),
        (b"[" * 17 + b"]" * 17, "deeper than 16"),
        (b"[" * 100_000, "items"),
        (b"[" * 10_000, "deeper than 16"),
        (b'{"a": [' + b"0," * 2_000_000 + b"0]}", "items"),
        (b" " * (5 << 20), "at most"),
        (b"{} {}", "JSON"),
        (b"{'a': 1}", "JSON"),
    ],
)
def test_bad_json(tmp_path, text, word):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(FormatError, match=word) as caught:
        Config.from_json(tmp_path)
    assert caught.value.file == "config.json" and len(str(caught.value)) < 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 33) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from([*NEEDED, "quantization_config", "expert_dtype", "layer_types",
                            "rope_parameters", "mlp_layer_types", "dspark_block_size"]),
       value=JSON)
def test_any_value_gives_a_config_or_a_format_error(key, value):
    try:
        Config.from_json({**CONFIG, key: value})
    except FormatError as error:
        assert error.rule
