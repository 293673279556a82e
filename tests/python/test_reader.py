# SPDX-License-Identifier: Apache-2.0
"""Opening checkpoints: the tensor table, how shards are cut, draft heads, transformers exports."""

import doctest
import importlib
import json
import os
from functools import lru_cache

import numpy as np
import pytest
import reference_reader
from sparse import write_arrays, write_index

from dsv4 import nano as nano_module
from dsv4.checkpoint import Checkpoint, TensorInfo
from dsv4.errors import FormatError
from dsv4.names import official

NAMES = sorted(nano_module.CHECKPOINTS)


def stored(checkpoint, name):
    """The bytes of a tensor as the table describes it."""
    info = checkpoint.tensors[name]
    return os.pread(checkpoint.shards[info.shard].fd, info.nbytes, info.offset)


def drawn(name):
    """Config and arrays of one of the five checkpoints, straight from the generator."""
    config, tensors = all_drawn(name)
    return dict(config), dict(tensors)


@lru_cache
def all_drawn(name):
    seed, changes = nano_module.CHECKPOINTS[name]
    options = {k: changes[k] for k in ("mtp", "fp8_experts", "f32_scales") if k in changes}
    config = {**nano_module.CONFIG, **{k: v for k, v in changes.items() if k not in options}}
    if options.get("fp8_experts"):
        del config["expert_dtype"]
    options = {"mtp": 1, "fp8_experts": False, "f32_scales": False, **options}
    tensors = {}
    for shard in nano_module.Maker(seed, config, **options).shards():
        tensors.update(shard)
    return config, tensors


def save(folder, config, tensors, shards=1):
    """A checkpoint in `shards` files; a single one has no index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_arrays(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    where = {name: f"part-{i * shards // len(names)}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        write_arrays(folder / file, {n: tensors[n] for n in names if where[n] == file})
    write_index(folder, where)
    return folder


def refused(folder, *words, **attributes):
    with pytest.raises(FormatError) as caught:
        Checkpoint.open(folder)
    error = caught.value
    for word in words:
        assert word in str(error)
    for key, value in attributes.items():
        assert getattr(error, key) == value, error
    return error


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_where_the_second_reader_finds_it(nano, name):
    with Checkpoint.open(nano(name)) as checkpoint:
        assert checkpoint.warnings == ()
        found = {}
        for i, shard in enumerate(checkpoint.shards):
            data = shard.path.read_bytes()
            start = 8 + int.from_bytes(data[:8], "little")
            for begin, end, key, dtype, shape in reference_reader.read(data):
                found[key] = TensorInfo(key, dtype, shape, i, start + begin, end - begin)
        assert checkpoint.tensors == found


@pytest.mark.parametrize(
    ("name", "kind", "draft", "experts"),
    [
        ("nano-flash", "4 layers (1 SWA, 2 CSA, 1 HCA)", "mtp", "fp4"),
        ("nano-pro", "2 layers (1 CSA, 1 HCA)", "mtp", "fp4"),
        ("nano-base", "3 layers (1 SWA, 1 CSA, 1 HCA)", None, "fp8"),
        ("nano-0731", "3 DSpark stages", "dspark", "fp4"),
        ("nano-odd", "1 MTP block", "mtp", "fp4"),
    ],
)
def test_what_it_is(nano, name, kind, draft, experts):
    with Checkpoint.open(nano(name)) as checkpoint:
        assert kind in checkpoint.kind
        assert (checkpoint.draft, checkpoint.expert_format) == (draft, experts)
        assert checkpoint.nbytes == sum(
            shard.size - shard.data_offset for shard in checkpoint.shards)


@pytest.mark.parametrize("shards", [1, 2, 7])
@pytest.mark.parametrize("name", ["nano-odd", "nano-base"])
def test_any_number_of_shards(tmp_path, name, shards):
    config, tensors = drawn(name)
    with Checkpoint.open(save(tmp_path / "model", config, tensors, shards)) as checkpoint:
        assert len(checkpoint.shards) == shards
        assert checkpoint.tensors.keys() == tensors.keys()
        for key, (_, array) in tensors.items():
            assert stored(checkpoint, key) == np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize(("weight", "scale"), [("U8", "U8"), ("F4", "F8_E8M0"), ("I8", "U8")])
def test_other_containers_of_the_same_bytes(tmp_path, weight, scale):
    config, tensors = drawn("nano-odd")
    changed = {}
    for name, (dtype, array) in tensors.items():
        if dtype == "I8":
            rows, columns = array.shape
            columns *= 2 if weight == "F4" else 1
            changed[name] = (weight, array, (rows, columns))
        else:
            changed[name] = (scale if dtype == "F8_E8M0" else dtype, array)
    with Checkpoint.open(save(tmp_path / "model", config, changed)) as checkpoint:
        assert checkpoint.expert_format == "fp4"
        for key, (_, array) in tensors.items():
            assert stored(checkpoint, key) == np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize(
    "module", ["checkpoint", "checksums", "config", "errors", "hub", "layout", "memory", "names",
               "nano"]
)
def test_examples_in_the_docstrings(module):
    failed, tried = doctest.testmod(importlib.import_module(f"dsv4.{module}"))
    assert failed == 0 and tried > 0


def test_descriptors_are_closed(nano):
    def count():
        return len(os.listdir("/proc/self/fd"))

    before = count()
    checkpoint = Checkpoint.open(nano("nano-odd"))
    assert count() == before + len(checkpoint.shards)
    checkpoint.close()
    checkpoint.close()
    assert count() == before
    checkpoint = Checkpoint.open(nano("nano-odd"))
    del checkpoint
    assert count() == before


def test_it_cannot_be_changed(nano):
    with Checkpoint.open(nano("nano-odd")) as checkpoint:
        with pytest.raises(AttributeError):
            checkpoint.config = None
        with pytest.raises(TypeError):
            checkpoint.tensors["x"] = None


def test_descriptors_are_closed_after_a_refusal(tmp_path):
    config, tensors = drawn("nano-odd")
    del tensors["norm.weight"]
    folder = save(tmp_path / "model", config, tensors, 7)
    before = len(os.listdir("/proc/self/fd"))
    error = refused(folder, "norm.weight", tensor="norm.weight", rule="name")
    del error
    assert len(os.listdir("/proc/self/fd")) == before


# ---- what the headers say against what the config says ----

def test_a_bf16_checkpoint_whose_config_says_fp8(tmp_path):
    config, tensors = drawn("nano-odd")
    plain = {}
    for name, (dtype, array) in tensors.items():
        if dtype in ("F8_E4M3", "I8"):
            columns = array.shape[1] * (2 if dtype == "I8" else 1)
            plain[name] = ("BF16", np.zeros((array.shape[0], columns), np.uint16))
        elif not name.endswith(".scale"):
            plain[name] = (dtype, array)
    folder = save(tmp_path / "model", config, plain)
    refused(folder, "BF16", "quant_method fp8", rule="dtype", got="BF16")
    del config["quantization_config"]
    with Checkpoint.open(save(folder, config, plain)) as checkpoint:
        assert checkpoint.expert_format == "plain" and not checkpoint.formats.linear_scale


@pytest.mark.parametrize(("name", "says"), [("nano-odd", "fp8"), ("nano-base", "fp4")])
def test_expert_dtype_contradicts_the_experts(tmp_path, name, says):
    config, tensors = drawn(name)
    folder = save(tmp_path / "model", {**config, "expert_dtype": says}, tensors)
    refused(folder, "experts.0.w1.weight", says, rule="dtype")
    del config["quantization_config"]  # then the headers alone decide
    Checkpoint.open(save(folder, config, tensors)).close()


def test_missing_scales(tmp_path):
    config, tensors = drawn("nano-odd")
    kept = {name: value for name, value in tensors.items() if not name.endswith(".scale")}
    error = refused(save(tmp_path / "model", config, kept), ".scale", "no such tensor", "more")
    assert str(error).count("no such tensor") == 20


# ---- draft heads ----

def test_dspark_tensors_are_not_taken_for_mtp(tmp_path):
    config, tensors = drawn("nano-0731")
    kept = {k: v for k, v in config.items() if not k.startswith("dspark_")}
    folder = save(tmp_path / "model", kept, tensors)
    error = refused(folder, "dspark", file="config.json", rule="draft kind")
    assert error.tensor == "mtp.0.main_proj.weight"


def test_mtp_tensors_are_not_taken_for_dspark(tmp_path):
    config, tensors = drawn("nano-flash")
    extra = {k: v for k, v in drawn("nano-0731")[0].items() if k.startswith("dspark_")}
    folder = save(tmp_path / "model", {**config, **extra}, tensors)
    refused(folder, "mtp", file="config.json", rule="draft kind", tensor="mtp.0.e_proj.weight")


def test_draft_blocks_of_no_or_two_kinds(tmp_path):
    config, tensors = drawn("nano-odd")
    marks = ("mtp.0.e_proj", "mtp.0.h_proj", "mtp.0.enorm", "mtp.0.hnorm")
    kept = {name: value for name, value in tensors.items() if not name.startswith(marks)}
    refused(save(tmp_path / "none", config, kept), "neither", rule="draft kind")
    both = {**tensors, "mtp.0.main_norm.weight": tensors["mtp.0.enorm.weight"]}
    refused(save(tmp_path / "both", config, both), "main_norm", "e_proj", rule="draft kind")


def test_draft_blocks_need_their_ratios_and_numbers(tmp_path):
    config, tensors = drawn("nano-odd")
    short = {**config, "compress_ratios": config["compress_ratios"][:-1]}
    refused(save(tmp_path / "short", short, tensors), rule="compress_ratios", file="config.json")
    ratios = {**config, "compress_ratios": [*config["compress_ratios"][:-1], 4]}
    refused(save(tmp_path / "ratio", ratios, tensors), rule="compress_ratios", file="config.json")
    gap = {name.replace("mtp.0.", "mtp.1."): value for name, value in tensors.items()}
    refused(save(tmp_path / "gap", config, gap), "mtp.1", rule="draft blocks")
    none = {name: value for name, value in tensors.items() if not name.startswith("mtp.")}
    with Checkpoint.open(save(tmp_path / "without", config, none)) as checkpoint:
        assert (checkpoint.draft, checkpoint.draft_blocks) == (None, 0)


# ---- exports of transformers ----

RESPELLED = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
    "attn.attn_sink": "self_attn.sinks",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight":
        "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
}
OTHER_SPELLINGS = {
    "attn.indexer.weights_proj.weight": ["self_attn.compressor.indexer.weights_proj.weight"],
    "attn.indexer.compressor.wkv.weight": ["attn.indexer.wkv.weight"],
    "attn.indexer.compressor.wgate.weight": ["attn.indexer.wgate.weight"],
    "attn.indexer.compressor.norm.weight":
        ["attn.indexer.kv_norm.weight", "attn.indexer.norm.weight"],
    "attn.indexer.compressor.ape": ["attn.indexer.position_bias", "attn.indexer.ape"],
    "attn.wq_a.scale": ["self_attn.q_a_proj.weight_scale_inv", "attn.wq_a.weight_scale_inv"],
    "ffn.shared_experts.w1.scale": ["mlp.shared_experts.gate_proj.weight_scale_inv"],
    "ffn.experts.7.w2.weight": ["mlp.experts.7.down_proj.weight"],
    "ffn.experts.gate_up_proj": ["mlp.experts.gate_up_proj"],
}


def test_names_of_transformers():
    for name, other in RESPELLED.items():
        if other.startswith(("model.", "lm_head")):
            assert official(other) == official(name) == name
            assert official(other.removeprefix("model.")) == name
            continue
        for spelling in (other, name, *OTHER_SPELLINGS.get(name, ())):
            for prefix in ("", "model."):
                assert official(f"{prefix}layers.12.{spelling}") == f"layers.12.{name}"
                assert official(f"{prefix}mtp.0.{spelling}") == f"mtp.0.{name}"
    for name, others in OTHER_SPELLINGS.items():
        assert [official(f"model.layers.3.{other}") for other in others] == [
            f"layers.3.{name}"] * len(others)


@pytest.mark.parametrize("name", NAMES)
def test_official_names_stay(nano, name):
    with Checkpoint.open(nano(name)) as checkpoint:
        for tensor in checkpoint.tensors:
            assert official(tensor) == tensor


def exported(config, tensors, dtype="BF16"):
    """The checkpoint as transformers would save it, experts fused, weights of random bytes."""
    rng = np.random.default_rng(5)
    kind = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}[dtype]

    def some(*shape):
        return dtype, rng.integers(0, 1 << 15, shape).astype(kind)

    d, width, n = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    out = {}
    for name, (stored_dtype, array) in tensors.items():
        layer, _, leaf = name.partition("layers.")[2].partition(".")
        if name.startswith("mtp.") or name.endswith(".scale") or ".experts." in name:
            continue
        key = RESPELLED[name] if not layer else f"model.layers.{layer}.{RESPELLED[leaf]}"
        if stored_dtype in ("F8_E4M3", "BF16"):
            out[key] = some(*array.shape)
        elif stored_dtype == "I64":
            out[key] = ("I32", array.astype(np.int32))
        else:
            out[key] = (stored_dtype, array)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts."
        out[prefix + "gate_up_proj"] = some(n, 2 * width, d)
        out[prefix + "down_proj"] = some(n, d, width)
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "expert_dtype")}
    return plain, out


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_an_export_of_transformers(tmp_path, dtype):
    original, tensors = drawn("nano-odd")
    config, renamed = exported(original, tensors, dtype)
    wanted = {name for name in tensors if not name.startswith("mtp.")}
    wanted = {name for name in wanted if not name.endswith(".scale")}
    with Checkpoint.open(save(tmp_path / "model", config, renamed, 2)) as checkpoint:
        assert checkpoint.tensors.keys() == wanted
        assert checkpoint.expert_format == "plain" and checkpoint.draft is None
        width = config["moe_intermediate_size"]
        for layer in range(3):
            fused = renamed[f"model.layers.{layer}.mlp.experts.gate_up_proj"][1]
            down = renamed[f"model.layers.{layer}.mlp.experts.down_proj"][1]
            for e in range(config["n_routed_experts"]):
                prefix = f"layers.{layer}.ffn.experts.{e}."
                for part, want in (("w1", fused[e, :width]), ("w3", fused[e, width:]),
                                   ("w2", down[e])):
                    assert stored(checkpoint, f"{prefix}{part}.weight") == want.tobytes()
                    assert checkpoint.tensors[f"{prefix}{part}.weight"].shape == want.shape


def test_fused_experts_of_another_shape(tmp_path):
    config, tensors = exported(*drawn("nano-odd"))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    dtype, array = tensors[name]
    for wrong in ((dtype, array[:, :-2]), (dtype, array[:-1]), ("I16", array)):
        folder = save(tmp_path / "model", config, {**tensors, name: wrong})
        refused(folder, rule="fused experts", tensor="layers.1.ffn.experts.gate_up_proj")


def test_two_spellings_of_one_tensor(tmp_path):
    config, tensors = exported(*drawn("nano-odd"))
    tensors["embed.weight"] = tensors["model.embed_tokens.weight"]
    refused(save(tmp_path / "model", config, tensors), "embed.weight", rule="name")
