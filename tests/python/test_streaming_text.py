# SPDX-License-Identifier: Apache-2.0
"""Text as it streams: no half characters, no part of a stop string, no part of a marker.

All three classes only ever append to what they have shown.  So if everything they show adds up to
the right text for every way of cutting the input, nothing wrong was shown on the way.
"""

import gzip
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4 import completion
from dsv4.completion import CompletionEvent, CompletionSplitter, join_events, parse_completion
from dsv4.encoding import encode_messages
from dsv4.tokenizer import StopMatcher, StreamDecoder, Tokenizer

FOLDER = Path(__file__).resolve().parents[1] / "vectors" / "encoding"


@pytest.fixture(scope="module")
def byte_ids(v4: Tokenizer) -> list[int]:
    """The id of the token that is one byte, for every byte."""
    ids = {v4.token_bytes(i): i for i in range(3, 300)}
    return [ids[bytes([byte])] for byte in range(256)]


def cut(text: str, cuts: Iterable[int]) -> list[str]:
    places = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return [text[a:b] for a, b in pairwise(places)]


CUTS = st.lists(st.integers(0, 1000), max_size=8)


# --- characters -----------------------------------------------------------------------------

# first, last and around each length of UTF-8; combining; surrogate neighbours; noncharacters
CHARACTERS = (
    "\x00\x7f\x80\u07ff\u0800\ud7ff\ue000\ufffd\ufffe\uffff\U00010000\U0010ffff"
    "aé中ひ🙂\u0301\u200d👨‍👩‍👧"
)


def test_every_character_class_at_every_split(v4: Tokenizer, byte_ids: list[int]) -> None:
    for c in CHARACTERS:
        ids = [byte_ids[b] for b in f"x{c}y".encode()]
        for size in range(1, len(ids) + 1):
            decoder = StreamDecoder(v4)
            shown = [decoder.feed(ids[i : i + size]) for i in range(0, len(ids), size)]
            assert "".join(shown) == f"x{c}y" and decoder.flush() == ""
            if c != "\ufffd":
                assert not any("\ufffd" in piece for piece in shown)


def test_every_code_point_byte_by_byte(v4: Tokenizer, byte_ids: list[int]) -> None:
    decoder = StreamDecoder(v4)
    points = [*range(0, 0xD800, 7), *range(0xE000, 0x110000, 97)]
    for point in points:
        pieces = [decoder.feed([byte_ids[b]]) for b in chr(point).encode()]
        assert pieces[-1] == chr(point) and not any(pieces[:-1])


@settings(max_examples=300, deadline=None)
@given(data=st.lists(st.binary(max_size=6) | st.sampled_from([c.encode() for c in CHARACTERS])),
       cuts=CUTS)
def test_invalid_bytes_as_a_whole_decode(
    v4: Tokenizer, byte_ids: list[int], data: list[bytes], cuts: list[int]
) -> None:
    joined = b"".join(data)
    ids = [byte_ids[b] for b in joined]
    assert v4.decode(ids) == joined.decode(errors="replace")
    decoder = StreamDecoder(v4)
    places = sorted({0, len(ids), *(c % (len(ids) + 1) for c in cuts)})
    shown = "".join(decoder.feed(ids[a:b]) for a, b in pairwise(places))
    assert shown + decoder.flush() == v4.decode(ids)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 129400)), skip=st.booleans())
def test_any_tokens_one_by_one(v4: Tokenizer, ids: list[int], skip: bool) -> None:
    decoder = StreamDecoder(v4, skip_special=skip)
    shown = "".join(decoder.feed([i]) for i in ids) + decoder.flush()
    assert shown == v4.decode(ids, skip_special=skip)


def test_an_unfinished_character_shows_at_the_end_only(
    v4: Tokenizer, byte_ids: list[int]
) -> None:
    decoder = StreamDecoder(v4)
    half = [byte_ids[b] for b in "🙂".encode()[:3]]
    assert decoder.feed(half) == ""
    assert decoder.flush() == "\ufffd" and decoder.flush() == ""
    assert decoder.feed(half) + decoder.feed([byte_ids[ord("a")]]) == "\ufffda"


# --- stop strings ---------------------------------------------------------------------------


def naive_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Before the first stop that is complete; of several ending there, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run_stop(pieces: Iterable[str], stops: Sequence[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        text, stopped = matcher.feed(piece)
        shown += text
        assert stopped == (matcher.matched is not None)
    return shown + matcher.flush(), matcher.matched


FEW_LETTERS = st.text("abc\n", max_size=24)


@settings(max_examples=300, deadline=None)
@given(text=FEW_LETTERS, cuts=CUTS,
       stops=st.lists(st.text("abc\n", min_size=1, max_size=5), max_size=4))
def test_stop_strings_at_any_cut(text: str, cuts: list[int], stops: list[str]) -> None:
    wanted = naive_stop(text, stops)
    assert run_stop(cut(text, cuts), stops) == wanted
    assert run_stop(list(text), stops) == wanted
    assert run_stop([text], stops) == wanted


@settings(max_examples=200, deadline=None)
@given(text=FEW_LETTERS, stops=st.lists(st.text("abc\n", min_size=1, max_size=5), min_size=1))
def test_held_text_is_exactly_what_may_begin_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for i, c in enumerate(text, start=1):
        piece, stopped = matcher.feed(c)
        shown += piece
        if stopped:
            break
        held = text[len(shown) : i]
        longest = max((n for n in range(i + 1) for stop in stops
                       if n < len(stop) and text[:i].endswith(stop[:n])), default=0)
        assert len(held) == longest


def test_after_the_stop_everything_is_dropped() -> None:
    matcher = StopMatcher("END")
    assert matcher.feed("a E") == ("a ", False)
    assert matcher.feed("ND b") == ("", True)
    assert matcher.feed("more") == ("", True) and matcher.flush() == ""
    assert matcher.matched == "END"


def test_no_stops_hold_nothing_and_bad_ones_are_refused() -> None:
    assert StopMatcher().feed("abc") == ("abc", False)
    with pytest.raises(ValueError, match="stop: got an empty string"):
        StopMatcher(["a", ""])
    with pytest.raises(TypeError, match="stop: got int"):
        StopMatcher([1])  # type: ignore[list-item]


# --- markers of a completion ----------------------------------------------------------------


def stream(pieces: Iterable[str], mode: Any) -> list[CompletionEvent]:
    splitter = CompletionSplitter(mode)
    events = [event for piece in pieces for event in splitter.feed(piece)]
    return events + splitter.flush()


def cases(name: str) -> list[dict[str, Any]]:
    with gzip.open(FOLDER / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["parse", "parse_edges"])
def test_completions_character_by_character(name: str) -> None:
    for case in cases(name):
        text, mode = case["completion"], case["thinking_mode"]
        whole = parse_completion(text, mode, strict=False)
        for size in (1, 3, 7):
            pieces = [text[i : i + size] for i in range(0, len(text), size)]
            assert join_events(stream(pieces, mode)) == whole, (size, text)


def test_a_completion_at_every_split_in_three() -> None:
    case = next(c for c in cases("parse")
                if c["thinking_mode"] == "thinking" and len(c["completion"]) < 400
                and c["error"] is None and len(c["message"]["tool_calls"]) == 1)
    text = case["completion"]
    for i in range(len(text) + 1):
        for j in range(i, len(text) + 1, 5):
            pieces = (text[:i], text[i:j], text[j:])
            assert join_events(stream(pieces, "thinking")) == case["message"]


def test_completions_token_by_token(v4: Tokenizer) -> None:
    seen = 0
    for case in cases("parse"):
        if case["error"] is None:
            decoder = StreamDecoder(v4)
            ids = v4.encode(case["completion"], special=True)
            pieces = [*(decoder.feed([i]) for i in ids), decoder.flush()]
            assert (join_events(stream(pieces, case["thinking_mode"]))
                    == parse_completion(case["completion"], case["thinking_mode"], strict=False))
            seen += 1
    assert seen > 150


MARKERS = [
    completion.EOS, completion.THINK_START, completion.THINK_END, completion.DSML,
    completion.CALLS_OPEN, completion.CALLS_CLOSE, completion.INVOKE_OPEN,
    completion.INVOKE_CLOSE, completion.PARAMETER_OPEN, completion.PARAMETER_CLOSE,
    "\n", "\n\n", "\n\n" + completion.CALLS_OPEN + "\n", ' name="f">\n',
    ' name="a" string="true">v', ' name="b" string="false">1', ">\n", "<", "</", "é🙂",
]
BROKEN = st.lists(
    st.sampled_from(MARKERS) | st.sampled_from([m[: len(m) // 2] for m in MARKERS]), max_size=14
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=BROKEN, cuts=CUTS, mode=st.sampled_from(["chat", "thinking"]))
def test_any_text_at_any_cut(text: str, cuts: list[int], mode: Any) -> None:
    whole = parse_completion(text, mode, strict=False)
    assert join_events(stream(cut(text, cuts), mode)) == whole
    assert join_events(stream(text, mode)) == whole


@pytest.mark.parametrize("mode", ["chat", "thinking"])
def test_the_beginning_of_a_marker_is_held(mode: Any) -> None:
    calls = completion.CALLS_OPEN
    markers = [completion.EOS, calls, "\n" + calls, "\n\n" + calls]
    if mode == "thinking":
        markers.append(completion.THINK_END)
    for marker in markers:
        for n in range(1, len(marker)):
            splitter = CompletionSplitter(mode)
            shown = "".join(e.text for c in "é\n." + marker[:n] for e in splitter.feed(c))
            assert shown == "é\n.", marker[:n]
            shown += "".join(e.text for c in "|x" for e in splitter.feed(c))
            assert shown == f"é\n.{marker[:n]}|x"


def test_text_is_shown_as_soon_as_it_is_certain() -> None:
    splitter = CompletionSplitter("thinking")

    def shown(piece: str) -> list[tuple[str, str]]:
        return [(e.kind, e.text) for e in splitter.feed(piece)]

    assert shown("a < b") == [("reasoning", "a < b")]
    assert shown("</thi") == []
    assert shown("s") == [("reasoning", "</this")]
    assert shown("</think>") == []
    assert shown("x\n") == [("text", "x")]
    assert shown("\n") == []
    assert shown("y") == [("text", "\n\ny")]
    assert shown("\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n") == []
    [call] = splitter.feed("</｜DSML｜invoke>")
    assert call.kind == "tool_call" and call.text == "" and call.tool_call is not None
    assert call.tool_call["function"] == {"name": "f", "arguments": "{}"}
    assert shown("\n</｜DSML｜tool_calls>") == []
    assert shown("<｜end▁of▁sentence｜>") == [] and splitter.flush() == []
    with pytest.raises(ValueError, match="feed after flush"):
        splitter.feed("a")


def test_stop_strings_and_markers_together(v4: Tokenizer) -> None:
    """A stop string in the content ends the text; the reasoning before it is whole."""
    messages = [{"role": "user", "content": "u"}]
    prompt = encode_messages(messages, "thinking")
    answer = {"role": "assistant", "reasoning_content": "Hm, 🙂.", "content": "one\nHuman: two"}
    text = encode_messages([*messages, answer], "thinking")[len(prompt) :]
    decoder, matcher = StreamDecoder(v4), StopMatcher("\nHuman:")
    splitter = CompletionSplitter("thinking")
    events = []
    for i in v4.encode(text, special=True):
        piece, stopped = matcher.feed(decoder.feed([i]))
        events += splitter.feed(piece)
        if stopped:
            break
    message = join_events(events + splitter.flush())
    assert stopped and (message["reasoning_content"], message["content"]) == ("Hm, 🙂.", "one")


# --- cost -----------------------------------------------------------------------------------


def seconds(pieces: list[str], consume: Callable[[list[str]], object]) -> float:
    best = math.inf
    for _ in range(2):
        start = time.process_time()
        consume(pieces)
        best = min(best, time.process_time() - start)
    return best


OPENING = f"{completion.CALLS_OPEN}\n{completion.INVOKE_OPEN}"
IN_PARAMETER = f'{OPENING} name="f">\n{completion.PARAMETER_OPEN} name="a" string="true">'


@pytest.mark.parametrize(
    ("head", "body", "length"),
    [("", "word <b> ", 20_000), ("", "\n\n", 20_000), ("", f"{OPENING} x", 20_000),
     (IN_PARAMETER, "word <b> ", 160_000)],
    ids=["text", "newlines", "broken blocks", "parameter"],
)
def test_the_cost_of_a_long_stream_is_linear(head: str, body: str, length: int) -> None:
    """Four times the length: about four times the time, where quadratic code takes sixteen."""

    def pieces(n: int) -> list[str]:
        text = head + body * (n // len(body))
        return [text[i : i + 4] for i in range(0, len(text), 4)]

    def split(some: list[str]) -> None:
        splitter = CompletionSplitter("chat")
        for piece in some:
            splitter.feed(piece)

    assert seconds(pieces(4 * length), split) < 8 * seconds(pieces(length), split) + 0.02


def test_the_cost_of_stop_strings_is_linear() -> None:
    def match(some: list[str]) -> None:
        matcher = StopMatcher(["a" * 1000 + "b", "a" * 999 + "c"])
        for piece in some:
            matcher.feed(piece)

    assert seconds(["a"] * 80_000, match) < 8 * seconds(["a"] * 20_000, match) + 0.02
