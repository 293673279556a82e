# SPDX-License-Identifier: Apache-2.0
"""Text out: an assistant completion taken apart into reasoning, content and tool calls.

Two readers of the same format.  The strict one takes a whole completion and refuses what the
official parser refuses, and two things it lets pass: a tool block cut off right after its opening,
and a tag inside the name of a tool.  `CompletionSplitter` takes the pieces of a stream, never
raises, and never shows part of a marker.  On well-formed completions both give the same message,
at every split.

Source: SPEC §7.4.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from dsv4.errors import EncodingError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
CALLS_OPEN = f"<{DSML}tool_calls>"
CALLS_CLOSE = f"</{DSML}tool_calls>"
INVOKE_OPEN = f"<{DSML}invoke"
INVOKE_CLOSE = f"</{DSML}invoke>"
PARAMETER_OPEN = f"<{DSML}parameter"
PARAMETER_CLOSE = f"</{DSML}parameter>"

THINKING_MODES = ("chat", "thinking")
ThinkingMode = Literal["chat", "thinking"]
EventKind = Literal["reasoning", "text", "tool_call"]
_ANY_TAG = (f"<{DSML}", f"</{DSML}")

# The name of a tool or parameter may hold quotes: a header is read up to the next tag, and only
# then matched as a whole.
_HEADER = re.compile(r'\s*name="(.*)">\n{1,2}', re.DOTALL)
_LENIENT_HEADER = re.compile(r'\s*name="(.*)"\s*>\s*', re.DOTALL)
_PARAMETER = re.compile(r' name="(.*?)" string="(true|false)">(.*)', re.DOTALL)
_LENIENT_PARAMETER = re.compile(r'\s+name="(.*?)"\s+string="(true|false)"\s*>(.*)', re.DOTALL)


class CompletionEvent(NamedTuple):
    """One piece of a completion: `text` of a kind, or one whole `tool_call`.

    Attributes
    ----------
    kind : "reasoning", "text" or "tool_call"
    text : str
        Empty for a tool call.
    tool_call : dict or None
        ``{"type": "function", "function": {"name": str, "arguments": JSON text}}``.
    """

    kind: EventKind
    text: str
    tool_call: dict[str, Any] | None = None


def check_thinking_mode(thinking_mode: object) -> None:
    """Raise ValueError unless the mode is one of `THINKING_MODES`."""
    if thinking_mode not in THINKING_MODES:
        raise ValueError(f"thinking_mode: got {thinking_mode!r}, expected 'chat' or 'thinking'")


def parse_completion(
    text: str, thinking_mode: ThinkingMode = "chat", strict: bool = True
) -> dict[str, Any]:
    """Take a whole assistant completion apart.

    Parameters
    ----------
    text : str
        What the model wrote after the prompt, markers and end-of-sentence included.
    thinking_mode : "chat" or "thinking"
        The mode the prompt was encoded with.
    strict : bool
        False for servers: never raises.  A tool call without a closed ``</think>`` is taken, an
        end-of-sentence may be missing, and what cannot be parsed stays in the content (or the
        reasoning) as it was written.

    Returns
    -------
    dict
        A message: ``role``, ``content``, ``reasoning_content`` and ``tool_calls``, the last as
        dicts whose ``arguments`` are JSON text.

    Raises
    ------
    dsv4.EncodingError
        Strict, and the text is malformed.  The message says where.
    ValueError
        Unknown `thinking_mode`.

    Examples
    --------
    >>> message = parse_completion("2 + 2</think>4<｜end▁of▁sentence｜>", thinking_mode="thinking")
    >>> message["reasoning_content"], message["content"], message["tool_calls"]
    ('2 + 2', '4', [])
    """
    check_thinking_mode(thinking_mode)
    if not isinstance(text, str):
        raise TypeError(f"text: got {type(text).__name__}, expected str")
    if strict:
        return _StrictReader(text).message(thinking_mode)
    splitter = CompletionSplitter(thinking_mode)
    return join_events([*splitter.feed(text), *splitter.flush()])


def join_events(events: Iterable[CompletionEvent]) -> dict[str, Any]:
    """The message that a stream of events adds up to.

    Examples
    --------
    >>> join_events([CompletionEvent("text", "a"), CompletionEvent("text", "b")])["content"]
    'ab'
    """
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for event in events:
        if event.tool_call is not None:
            calls.append(event.tool_call)
        else:
            (reasoning if event.kind == "reasoning" else content).append(event.text)
    return _message("".join(content), "".join(reasoning), calls)


def _message(content: str, reasoning: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "role": "assistant", "content": content, "reasoning_content": reasoning,
        "tool_calls": calls,
    }


def _tool_call(name: str, parameters: dict[str, str]) -> dict[str, Any]:
    """A call from its parameters, whose values are JSON text already."""
    fields = [f"{json.dumps(k, ensure_ascii=False)}: {v}" for k, v in parameters.items()]
    arguments = "{" + ", ".join(fields) + "}"
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


class _StrictReader:
    """Reads one completion from left to right and refuses the first thing that is wrong."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def fail(self, why: str) -> EncodingError:
        return EncodingError(f"completion, character {self.at}: {why}")

    def until(self, *markers: str) -> tuple[str, str]:
        """The text before the next of the markers, and that marker ("" at the end of the text)."""
        found = [(i, m) for m in markers if (i := self.text.find(m, self.at)) >= 0]
        end, marker = min(found, default=(len(self.text), ""))
        before = self.text[self.at : end]
        self.at = end + len(marker)
        return before, marker

    def message(self, thinking_mode: ThinkingMode) -> dict[str, Any]:
        opening = "\n\n" + CALLS_OPEN[:-1]
        reasoning = ""
        if thinking_mode == "thinking":
            reasoning, marker = self.until(THINK_END, opening)
            if marker != THINK_END:
                raise self.fail(f"the reasoning does not end with {THINK_END}")
        content, marker = self.until(EOS, opening)
        calls: list[dict[str, Any]] = []
        if marker == opening:
            calls = self.calls()
            rest, marker = self.until(EOS)
            if rest:
                raise self.fail(f"got {rest[:40]!r} after the tool calls, expected {EOS}")
        elif not marker:
            raise self.fail(f"the content does not end with {EOS}")
        if self.at != len(self.text):
            raise self.fail(f"got {self.text[self.at:][:40]!r} after {EOS}, expected nothing")
        for part, body in (("reasoning", reasoning), ("content", content)):
            for special in (BOS, EOS, THINK_START, THINK_END, DSML):
                if special in body:
                    raise EncodingError(f"completion: the {part} holds the marker {special}")
        return _message(content, reasoning, calls)

    def calls(self) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []
        while True:
            self.end_of_tag("tool_calls" if not calls else "invoke", INVOKE_OPEN, CALLS_CLOSE)
            if self.text.startswith(CALLS_CLOSE, self.at):
                self.at += len(CALLS_CLOSE)
                return calls
            self.at += len(INVOKE_OPEN)
            calls.append(self.invoke())

    def end_of_tag(self, tag: str, *following: str) -> None:
        """Consume the ">\\n" that ends a tag; one of the following tags must be next."""
        if not self.text.startswith(">\n", self.at):
            got = self.text[self.at : self.at + 20]
            raise self.fail(f"got {got!r} after the tag {DSML}{tag}, expected '>\\n'")
        self.at += 2
        if not self.text.startswith(following, self.at):
            got = self.text[self.at : self.at + 40]
            raise self.fail(f"got {got!r}, expected {' or '.join(following)}")

    def invoke(self) -> dict[str, Any]:
        start = self.at
        header, marker = self.until(PARAMETER_OPEN, INVOKE_CLOSE[:-1])
        named = _HEADER.fullmatch(header)
        if not marker or not named or any(tag in header for tag in _ANY_TAG):
            self.at = start
            raise self.fail(f"got {header[:60]!r} in the tag {DSML}invoke, expected ' name=\"…\">'")
        parameters: dict[str, str] = {}
        while marker == PARAMETER_OPEN:
            key, value = self.parameter()
            if key in parameters:
                raise self.fail(f"the parameter {key!r} of {named[1]!r} is given twice")
            parameters[key] = value
            self.end_of_tag("parameter", PARAMETER_OPEN, INVOKE_CLOSE[:-1])
            _, marker = self.until(PARAMETER_OPEN, INVOKE_CLOSE[:-1])
        return _tool_call(named[1], parameters)

    def parameter(self) -> tuple[str, str]:
        start = self.at
        body, marker = self.until(PARAMETER_CLOSE[1:-1])
        parts = _PARAMETER.fullmatch(body[:-1])
        if not marker or not body.endswith("<") or not parts:
            self.at = start
            raise self.fail(
                f"got {body[:60]!r} in the tag {DSML}parameter, "
                "expected ' name=\"…\" string=\"true|false\">…' and its closing tag"
            )
        key, is_string, value = parts.groups()
        return key, json.dumps(value, ensure_ascii=False) if is_string == "true" else value


# A tool block loses the newlines before it, as it was written with two of them.
_OPENINGS = tuple("\n" * n + CALLS_OPEN for n in (2, 1, 0))


class CompletionSplitter:
    """Split a streamed completion into reasoning, text and tool calls, as it arrives.

    Never shows part of a marker: text that may be the beginning of one is held until it is
    certain.  A tool call comes as one event when it is complete.  What the events add up to does
    not depend on how the text was cut into pieces.

    The lenient grammar: a tool block may come with any white space around its tags; what is
    malformed or cut off in it is text again, as it was written, from the end of the last complete
    call on.  In the reasoning, a whole tool block at the very end of the completion counts as
    calls (models forget ``</think>``); any other stays reasoning.  The end-of-sentence that ends
    the completion is dropped.

    Raw completions (no chat format) are plain text and do not need this class.

    Parameters
    ----------
    thinking_mode : "chat" or "thinking"
        The mode the prompt was encoded with.

    Examples
    --------
    >>> splitter = CompletionSplitter("thinking")
    >>> [(e.kind, e.text) for piece in ("Hm.</th", "ink>Yes") for e in splitter.feed(piece)]
    [('reasoning', 'Hm.'), ('text', 'Yes')]
    >>> splitter.flush()
    []
    """

    def __init__(self, thinking_mode: ThinkingMode = "chat") -> None:
        check_thinking_mode(thinking_mode)
        self._kind: EventKind = "reasoning" if thinking_mode == "thinking" else "text"
        self._buf = ""  # text whose meaning is not settled yet, from _at on
        self._at = 0
        self._step = self._plain  # the state: reads from _buf, False when it needs more text
        self._waiting: tuple[str, ...] = ()  # nothing happens before one of these is complete
        self._unread: list[str] = []  # pieces that came in while waiting
        self._tail = ""  # the end of all text that came in, to see a marker across pieces
        self._raw: list[str] = []  # the current block as written, since the last call shown
        self._calls: list[dict[str, Any]] = []  # calls held back: the block is in the reasoning
        self._name = ""
        self._parameters: dict[str, str] = {}
        self._events: list[CompletionEvent] = []
        self._closed = False

    def feed(self, text: str) -> list[CompletionEvent]:
        """Take the next piece of the completion; return what is certain by now."""
        if self._closed:
            raise ValueError("feed after flush: one splitter reads one completion")
        if self._waiting:
            probe = self._tail + text
            self._tail = probe[-max(map(len, self._waiting)) :]
            self._unread.append(text)
            if not any(marker in probe for marker in self._waiting):
                return []
        self._resume(text)
        while self._step():
            pass
        self._buf, self._at = self._buf[self._at :], 0
        return self._take_events()

    def flush(self) -> list[CompletionEvent]:
        """Return what is left; call it once, when the completion has ended."""
        if not self._closed:
            self._closed = True
            self._resume("")
            rest = self._buf[self._at :]
            calls_in_reasoning = self._step == self._after_block and rest.strip() in ("", EOS)
            if calls_in_reasoning:
                self._show_calls()
            else:
                self._show("".join(self._raw) + rest.removesuffix(EOS))
        return self._take_events()

    def _resume(self, text: str) -> None:
        if self._waiting:
            text = "".join(self._unread)
            self._unread.clear()
            self._waiting = ()
        self._buf += text

    def _take_events(self) -> list[CompletionEvent]:
        events, self._events = self._events, []
        return events

    def _show(self, text: str) -> None:
        if not text:
            return
        if self._events and self._events[-1].kind == self._kind:
            text = self._events.pop().text + text
        self._events.append(CompletionEvent(self._kind, text))

    def _show_calls(self) -> None:
        self._events += [CompletionEvent("tool_call", "", call) for call in self._calls]
        self._calls.clear()
        self._raw.clear()

    def _consume(self, end: int) -> None:
        """Read on to `end`, inside a block."""
        self._raw.append(self._buf[self._at : end])
        self._at = end

    def _find(self, *markers: str) -> tuple[int, str] | None:
        """Where the next of the markers is; if none is there yet, wait for one."""
        found = [(i, m) for m in markers if (i := self._buf.find(m, self._at)) >= 0]
        if found:
            return min(found)
        self._waiting = markers
        self._unread = [self._buf[self._at :]]
        self._tail = self._buf[self._at :][-max(map(len, markers)) :]
        self._buf, self._at = "", 0
        return None

    # --- the states ------------------------------------------------------------------------

    def _plain(self) -> bool:
        """Reasoning or content, up to the next marker."""
        markers = (THINK_END, CALLS_OPEN) if self._kind == "reasoning" else (CALLS_OPEN,)
        found = [(i, m) for m in markers if (i := self._buf.find(m, self._at)) >= 0]
        if not found:
            held = self._held_length(markers)
            self._show(self._buf[self._at : len(self._buf) - held])
            self._at = len(self._buf) - held
            return False
        start, marker = min(found)
        if marker == THINK_END:
            self._show(self._buf[self._at : start])
            self._kind = "text"
            self._at = start + len(marker)
            return True
        end = start + len(marker)
        for _ in range(2):
            if start > self._at and self._buf[start - 1] == "\n":
                start -= 1
        self._show(self._buf[self._at : start])
        self._at = start
        self._consume(end)
        self._step = self._between_calls
        return True

    def _held_length(self, markers: tuple[str, ...]) -> int:
        """How much of the end may belong to a marker (the whole of it, for an end-of-sentence)."""
        candidates = (*markers, *_OPENINGS, EOS)
        longest = min(max(map(len, candidates)), len(self._buf) - self._at)
        for n in range(longest, 0, -1):
            end = self._buf[len(self._buf) - n :]
            if any(marker.startswith(end) for marker in candidates):
                return n
        return 0

    def _tag(self, *tags: str) -> str | None:
        """Skip white space and consume one of the tags; "" if it is something else, None if it is
        not known yet."""
        end = self._at
        while end < len(self._buf) and self._buf[end].isspace():
            end += 1
        self._consume(end)
        for tag in tags:
            if self._buf.startswith(tag, self._at):
                self._consume(self._at + len(tag))
                return tag
        rest = self._buf[self._at : self._at + max(map(len, tags))]
        return None if any(tag.startswith(rest) for tag in tags) else ""

    def _malformed(self) -> bool:
        """What was read of this block since the last call is text after all."""
        self._show("".join(self._raw))
        self._raw.clear()
        self._calls.clear()
        self._step = self._plain
        return True

    def _between_calls(self) -> bool:
        tag = self._tag(INVOKE_OPEN, CALLS_CLOSE)
        if tag is None:
            return False
        if tag == INVOKE_OPEN:
            self._step = self._header
        elif tag == CALLS_CLOSE and self._kind == "reasoning":
            self._step = self._after_block
        elif tag == CALLS_CLOSE:
            self._raw.clear()
            self._step = self._plain
        else:
            return self._malformed()
        return True

    def _after_block(self) -> bool:
        """A whole block in the reasoning: calls if the completion ends here."""
        tag = self._tag(EOS)
        if tag == EOS:  # more text after it, or the end: tell by the next character
            self._at -= len(EOS)
            self._raw.pop()
            tag = None if self._at + len(EOS) == len(self._buf) else ""
        return False if tag is None else self._malformed()

    def _header(self) -> bool:
        found = self._find(*_ANY_TAG, *self._reasoning_end())
        if found is None:
            return False
        end, _ = found
        named = _LENIENT_HEADER.fullmatch(self._buf[self._at : end])
        self._consume(end)
        if not named:
            return self._malformed()
        self._name = named[1]
        self._parameters = {}
        self._step = self._in_call
        return True

    def _reasoning_end(self) -> tuple[str, ...]:
        return (THINK_END,) if self._kind == "reasoning" else ()

    def _in_call(self) -> bool:
        tag = self._tag(PARAMETER_OPEN, INVOKE_CLOSE)
        if tag is None:
            return False
        if not tag:
            return self._malformed()
        if tag == PARAMETER_OPEN:
            self._step = self._parameter
            return True
        self._calls.append(_tool_call(self._name, self._parameters))
        if self._kind == "text":
            self._show_calls()
        self._step = self._between_calls
        return True

    def _parameter(self) -> bool:
        found = self._find(PARAMETER_CLOSE, *self._reasoning_end())
        if found is None:
            return False
        end, marker = found
        body = self._buf[self._at : end]
        parts = _PARAMETER.fullmatch(body) or _LENIENT_PARAMETER.fullmatch(body)
        if marker == THINK_END:
            self._consume(end)
            return self._malformed()
        self._consume(end + len(marker))
        if not parts or parts[1] in self._parameters:
            return self._malformed()
        key, is_string, value = parts.groups()
        if is_string == "true" or not _is_json(value):
            value = json.dumps(value, ensure_ascii=False)
        self._parameters[key] = value
        self._step = self._in_call
        return True


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
