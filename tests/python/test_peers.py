# SPDX-License-Identifier: Apache-2.0
"""What tests/bench/peers.py counts, converts and says; no peer is needed for that."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from peer import common, eager, ggml, kt, llamacpp, synthetic  # noqa: E402


def test_bytes_of_one_token() -> None:
    total: Counter[str] = Counter()
    for shape in ggml.token_shapes(many=False):
        total[shape.kind] += int(shape.count * shape.n_bytes)
    assert round(total["fp4"] / 1e9, 2) == 3.45
    assert round(total["fp8"] / 1e9, 2) == 5.86
    assert round((total["bf16"] + total["f32"]) / 1e9, 2) == 1.90


def test_many_tokens_are_the_same_products_without_the_head() -> None:
    few, many = (
        sum(s.count * s.rows * s.cols for s in ggml.token_shapes(many=m)) for m in (False, True)
    )
    assert few - many == 129280 * 4096


def test_samples_alternate_and_the_order_turns() -> None:
    order = []

    def run(name: str, i: int) -> float:
        order.append(name)
        return {"ours": 1.0, "a": 3.0, "b": 2.0}[name]

    names = ("ours", "a", "b")
    samples = common.alternate(
        {name: lambda i, name=name: run(name, i) for name in names}, rounds=1, warm=0)
    assert {name: len(s) for name, s in samples.items()} == dict.fromkeys(names, 7)
    assert "".join(order[:9]) == "oursababoursboursa"
    assert common.fastest(samples) == "b"
    assert common.times_faster(samples["ours"], samples["b"]) == 2


@pytest.mark.parametrize("module", [eager, ggml, kt, llamacpp])
def test_a_missing_peer_says_how_to_install_it(module, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = {
        eager: (1, 7, None, tmp_path), ggml: (1, 1, 7), kt: (1, 7, None),
        llamacpp: (1, 7, None, tmp_path),
    }
    with pytest.raises(common.Missing, match=r"is not installed: .*pip install"):
        module.measure(*arguments[module])


def test_mxfp4_keeps_every_value() -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, (3, 32), np.uint8)
    scales = rng.integers(120, 124, (3, 2), np.uint8)
    blocks = llamacpp.mxfp4(codes, scales).reshape(3, 2, 17)
    low, high = blocks[..., 1:] & 15, blocks[..., 1:] >> 4
    theirs = ggml.E2M1[np.concatenate([low, high], -1)] * np.exp2(blocks[..., :1] - 127.0)
    ours = ggml.E2M1[np.stack([codes & 15, codes >> 4], -1).reshape(3, 2, 32)]
    assert np.array_equal(theirs, ours * np.exp2(scales[..., None] - 127.0))


def test_every_tensor_has_a_gguf_name() -> None:
    config = synthetic.flash([0, 4, 128], experts=8, vocab=512)
    names = [
        llamacpp.gguf_name(name) for name in synthetic.shapes(config)
        if not name.endswith(".scale") and ".experts." not in name
    ]
    assert len(set(names)) == len(names)
    assert {"token_embd.weight", "blk.2.attn_compressor_kv.weight", "blk.1.exp_probs_b.bias",
            "blk.1.indexer_compressor_ape.weight", "output_hc_fn.weight"} <= set(names)


def test_made_up_weights_look_like_published_ones() -> None:
    codes = synthetic.tensor("layers.0.attn.wq_a.weight", "F8_E4M3", (256, 1024)) & 0x7F
    assert codes.max() in (0x7D, 0x7E)  # near 448, no NaN
    assert (codes < 8).mean() < 0.001  # subnormal
    again = synthetic.tensor("layers.0.attn.wq_a.weight", "F8_E4M3", (256, 1024))
    assert np.array_equal(codes, again & 0x7F)
