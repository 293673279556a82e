# SPDX-License-Identifier: Apache-2.0
"""`dsv4.evaluate`: against probabilities computed here, window by window; what it refuses."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dsv4

TEXT = """MENENIUS:
What work's, my countrymen, in hand? where go you
With bats and clubs? The matter? speak, I pray you.
"""


@pytest.fixture(scope="module")
def model() -> Iterator[dsv4.Model]:
    with dsv4.load() as loaded:
        yield loaded


def direct(model: dsv4.Model, ids: list[int], length: int, stride: int) -> tuple[Any, Any]:
    """-log p and the best token of each of `ids`, one session for each token, in float64."""
    nll, best = [], []
    for i in range(len(ids)):
        window = 0 if i < length else -(-(i + 1 - length) // stride)  # the first that reaches i
        context = [model.config.bos_token_id, *ids[window * stride : i]]
        logits = model.session().append(context)
        assert logits is not None
        row = logits[0].astype(np.float64)
        nll.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[ids[i]])
        best.append(int(row.argmax()))
    return np.array(nll), np.array(best)


@pytest.mark.parametrize(("length", "stride"), [(2048, 1024), (24, 8), (16, 16), (9, 1), (2, 1)])
def test_each_token_is_scored_once_with_the_window_before_it(
    model: dsv4.Model, length: int, stride: int
) -> None:
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(TEXT)
    found = dsv4.evaluate(model, TEXT, max_length=length, stride=stride)
    nll, best = direct(model, ids, length, stride)
    assert found.ids.tolist() == ids and found.tokens == len(ids)
    np.testing.assert_allclose(found.token_nll, nll, rtol=1e-6, atol=1e-6)  # it is float32
    assert np.array_equal(found.correct, best == ids)
    assert found.accuracy == pytest.approx((best == ids).mean())
    assert found.loss == pytest.approx(nll.mean())
    assert found.perplexity == pytest.approx(math.exp(nll.mean()))
    assert found.bits_per_byte == pytest.approx(nll.sum() / math.log(2) / len(TEXT.encode()))
    assert (found.max_length, found.stride) == (length, stride)


def test_neither_batch_nor_pieces_change_a_bit(
    model: dsv4.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = dsv4.evaluate(model, TEXT, max_length=16, stride=8, batch_size=1)
    monkeypatch.setattr("dsv4.evaluation.LOGIT_BYTES", 5 * 4 * model.config.vocab_size)
    for batch_size in (1, 3, 256):
        other = dsv4.evaluate(model, TEXT, max_length=16, stride=8, batch_size=batch_size)
        assert np.array_equal(one.token_nll, other.token_nll)
        assert np.array_equal(one.correct, other.correct)


def test_files_ids_and_limits(model: dsv4.Model, tmp_path: Path) -> None:
    whole = dsv4.evaluate(model, TEXT)
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    assert np.array_equal(dsv4.evaluate(model, path).token_nll, whole.token_nll)
    for ids in (whole.ids, [model.config.bos_token_id, *whole.ids.tolist()]):
        assert np.array_equal(dsv4.evaluate(model, ids).token_nll, whole.token_nll)
    part = dsv4.evaluate(model, path, limit=10)
    assert np.array_equal(part.token_nll, whole.token_nll[:10])
    assert part.texts is not None and part.bytes == len("".join(part.texts))
    assert dsv4.evaluate(model, path, limit=10**9).tokens == whole.tokens


def test_an_edit_changes_every_window(model: dsv4.Model) -> None:
    plain = dsv4.evaluate(model, TEXT, max_length=16, stride=8)
    same = dsv4.evaluate(model, TEXT, max_length=16, stride=8, edit=dsv4.Edit())
    assert np.array_equal(same.token_nll, plain.token_nll)
    quiet = dsv4.edit.Clamp(2, 0, 0, positions=slice(12, None))
    other = dsv4.evaluate(model, TEXT, max_length=16, stride=8, edit=quiet)
    # row r of a window predicts target r: those from 12 on change, in each window
    changed = [i for i in range(12, plain.tokens) if i % 8 >= 4]
    moved = np.flatnonzero(other.token_nll != plain.token_nll)
    assert set(moved) <= set(changed) and len(moved) > 0.9 * len(changed)


def test_half_characters_count_their_bytes(model: dsv4.Model) -> None:
    found = dsv4.evaluate(model, "é¡")  # four bytes, a token each
    assert (found.tokens, found.bytes, found.texts) == (4, 4, ["�"] * 4)


def test_without_a_tokenizer(nano: Callable[[str], Path]) -> None:
    with dsv4.load(nano("nano-flash")) as model:
        found = dsv4.evaluate(model, [5, 6, 7])
        assert (found.bytes, found.bits_per_byte, found.texts) == (None, None, None)
        assert found.tokens == 3 and "bits" not in repr(found)
        with pytest.raises(ValueError, match="^text: got text, but"):
            dsv4.evaluate(model, "text")


def test_the_result(model: dsv4.Model) -> None:
    found = dsv4.evaluate(model, TEXT)
    told = json.loads(json.dumps(found.to_dict()))
    assert told["perplexity"] == found.perplexity and told["tokens"] == found.tokens
    assert f"{found.bits_per_byte:.4f} bits per byte" in repr(found)


def test_as_a_table(model: dsv4.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=dict))
    found = dsv4.evaluate(model, TEXT)
    table = found.to_pandas()
    assert list(table) == ["id", "text", "nll", "correct"]
    assert "".join(table["text"]) == TEXT and {len(v) for v in table.values()} == {found.tokens}


def test_without_pandas(model: dsv4.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        dsv4.evaluate(model, "a").to_pandas()


@pytest.mark.parametrize(("text", "arguments", "error", "message"), [
    ("", {}, ValueError, "text: got an empty string"),
    ([], {}, ValueError, "text: got no tokens"),
    ([0], {}, ValueError, "text: got BOS alone"),
    ("a", {"max_length": 1}, ValueError, "max_length: got 1, wanted 2 to 2048"),
    ("a", {"max_length": 4096}, ValueError, "max_length: got 4096, wanted 2 to 2048"),
    ("a", {"max_length": 8, "stride": 9}, ValueError, "stride: got 9, wanted 1 to 8"),
    ("a", {"stride": 0}, ValueError, "stride: got 0"),
    ("a", {"stride": 1.5}, TypeError, "stride: got float"),
    ("a", {"batch_size": 257}, ValueError, "batch_size: got 257, wanted 1 to 256"),
    ("a", {"limit": 0}, ValueError, "limit: got 0, wanted at least 1"),
    ("a", {"limit": True}, TypeError, "limit: got bool"),
    ("a", {"edit": dsv4.edit.DisableExperts(9, 0)}, ValueError, "DisableExperts: layers: got"),
    ("a", {"edit": "off"}, TypeError, "edit: got str"),
])
def test_refusals(
    model: dsv4.Model, text: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        dsv4.evaluate(model, text, **arguments)


def test_files_that_are_none(model: dsv4.Model, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        dsv4.evaluate(model, tmp_path / "missing.txt")
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="latin.txt is not UTF-8 at byte 3"):
        dsv4.evaluate(model, path)
    with pytest.raises(ValueError, match="which names a file; wanted the text itself, or pathlib"):
        dsv4.evaluate(model, str(path))
