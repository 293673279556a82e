# SPDX-License-Identifier: Apache-2.0
"""The model inside the package: every part of the architecture works in it, and it has learned."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import dsv4

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "bench"))

import quality  # noqa: E402
from harness import step_with  # noqa: E402

TOKENS = 1024


@pytest.fixture(scope="module")
def model() -> Iterator[dsv4.Model]:
    with dsv4.load() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def passage(model: dsv4.Model) -> list[int]:
    assert model.tokenizer is not None
    return [model.config.bos_token_id, *model.tokenizer.encode(quality.held_out()[:4000])][:TOKENS]


def test_it_has_every_part(model: dsv4.Model) -> None:
    c = model.config
    ratios = c.compress_ratios[: c.num_hidden_layers]
    assert c.num_hidden_layers >= 6 and ratios.count(4) >= 2 and 0 in ratios
    assert any(r > 4 for r in ratios)
    assert 0 < c.num_hash_layers < c.num_hidden_layers
    assert (c.n_routed_experts, c.num_experts_per_tok, c.hc_mult) == (8, 2, 4)
    assert c.max_position_embeddings >= TOKENS and c.index_topk <= TOKENS // 16
    files = sum(f.stat().st_size for f in (ROOT / "dsv4/default_model").iterdir())
    assert files <= 12 << 20


def test_the_indexer_rejects_entries_and_every_expert_is_used(
    model: dsv4.Model, passage: list[int]
) -> None:
    c = model.config
    assert len(passage) == TOKENS
    for layer in range(c.num_hidden_layers):
        _, seen = step_with(model, [(model.session(), passage)], layer)
        assert set(np.unique(seen["experts"])) == set(range(c.n_routed_experts))
        if c.compress_ratios[layer] != 4:
            continue
        visible = (np.arange(TOKENS) + 1) // 4
        picked = (seen["index_selected"] >= 0).sum(1)
        assert np.array_equal(picked, np.minimum(visible, c.index_topk))
        late = seen["index_selected"][visible > 2 * c.index_topk]
        newest = visible[visible > 2 * c.index_topk, None] - 1 - np.arange(c.index_topk)
        assert not np.array_equal(late, np.sort(newest, 1))  # not just the newest ones
        assert len({tuple(row) for row in late}) > len(late) // 2  # and they change with the query


def test_bits_per_byte(model: dsv4.Model) -> None:
    """All of the held-out text, official numerics."""
    found = quality.measure(model)
    assert found.tokens > 40_000 and found.bits_per_byte <= quality.LIMIT


def test_it_writes_in_the_style_of_its_corpus(model: dsv4.Model) -> None:
    text = model.generate("ROMEO:", max_new_tokens=800, seed=1).text
    words = re.findall(r"[A-Za-z']+", text)
    known = set(re.findall(r"[A-Za-z']+", quality.CORPUS.read_text()))
    assert len(words) > 150 and sum(w in known for w in words) > 0.8 * len(words)
    assert re.search(r"\n[A-Z][A-Z ]+:\n", text)  # somebody speaks


def test_it_agrees_with_the_torch_model_it_was_exported_from(
    model: dsv4.Model, vectors: Path
) -> None:
    """An implementation of its own, in torch, with every rounding point of the reference.

    Seen: every router choice and every best token equal, at least 98 % of every index selection,
    mean absolute difference 0.02 of logits that span 31.
    """
    with np.load(vectors / "default_model.npz") as stored:
        ids, at = stored["ids"], stored["positions"]
        logits = model.session().append(ids, logits="all")[at]
        assert np.abs(logits - stored["official/logits"]).mean() < 0.06
        assert (logits.argmax(-1) == stored["official/logits"].argmax(-1)).mean() >= 14 / 16
        for layer in range(model.config.num_hidden_layers):
            _, seen = step_with(model, [(model.session(), ids)], layer)
            same = np.sort(seen["experts"][at], 1) == np.sort(stored[f"layers.{layer}/experts"], 1)
            assert same.all(1).mean() >= 14 / 16
            if f"layers.{layer}/selected" in stored:
                for row, want in zip(
                    seen["index_selected"][at], stored[f"layers.{layer}/selected"], strict=True
                ):
                    assert want[row[row >= 0]].sum() >= 0.9 * want.sum()
        assert stored["official/bits_per_byte"] <= 1.02 * stored["float/bits_per_byte"]
