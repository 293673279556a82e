# SPDX-License-Identifier: Apache-2.0
"""The tiny checkpoints are the same bytes everywhere, and their expected values can be read."""

import hashlib
import json

import numpy as np
import pytest
from compare import folder_of, topk_valid
from contract import compute

from dsv4 import nano as nano_module

NAMES = sorted(nano_module.CHECKPOINTS)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_expected_values(nano, vectors, name):
    stored = json.loads((vectors / "model" / "SHA256SUMS.json").read_text())[name]
    made = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in nano(name).iterdir()
    }
    assert made == stored


def test_another_seed_and_other_sizes_make_another_checkpoint(tmp_path):
    a = nano_module.make("a", 1, tmp_path, num_hidden_layers=1, compress_ratios=[4, 0])
    b = nano_module.make("b", 2, tmp_path, num_hidden_layers=1, compress_ratios=[4, 0])
    shard = "model-00002-of-00004.safetensors"
    assert (a / shard).stat().st_size == (b / shard).stat().st_size
    assert (a / shard).read_bytes() != (b / shard).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_expected_values_are_complete(expected, name):
    e = expected(name)
    assert e.prompts() == ["prompt1", "prompt5", "prompt130", "prompt517"]
    for numerics in ("official", "weights"):
        for prompt in e.prompts():
            want = e[f"{numerics}/{prompt}/logits"]
            passed, report, _ = e.check_logits(prompt, want, numerics)
            assert passed and report["max_abs"] == 0
            assert e.check_logits(prompt, want + 10 * np.sign(want), numerics)[0] is False
    assert (folder_of(name) / "noise.json").exists()


def test_topk_valid_accepts_ties_only():
    scores = np.array([1, 3, 2, 2, -np.inf], np.float32)
    assert topk_valid([1, 2, -1], scores, 2) and topk_valid([1, 3, -1], scores, 2)
    assert not topk_valid([1, 0, -1], scores, 2) and not topk_valid([1], scores, 2)


def test_contract_bits(vectors):
    want = np.load(vectors / "contract.npz")
    got = compute(np.load(vectors / "ops.npz"))
    assert sorted(got) == sorted(want.files)
    assert [key for key in got if got[key].tobytes() != want[key].tobytes()] == []
