# SPDX-License-Identifier: Apache-2.0
"""Lines of a batch file in OpenAI's form, checked one by one before any work.

A line is ``{"custom_id": ..., "method": "POST", "url": "/v1/completions", "body": {...}}`` with
method and url optional, or short, without body: its fields beside ``custom_id`` (or ``id``).  A
field that is unknown, or that this program could not honour, is refused.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dsv4.encoding import encode_messages
from dsv4.errors import printable, shown
from dsv4.sampling import PARAMETERS, Sampling

# a prompt of a million tokens is about 5 MB of text
MOST_LINE_BYTES = 32 << 20
MOST_ID = 512
BOM = b"\xef\xbb\xbf"
URLS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
KEYS = ("custom_id", "method", "url", "body")
# what changes nothing here
IGNORED = ("model", "user", "metadata", "store", "service_tier")
NAMES = ("max_tokens", "max_completion_tokens", "min_tokens")
FORM = ("thinking_mode", "reasoning_effort")
NOT_FROM_FILES = ("logits_processor", "prompt_logprobs", "logprobs")


@dataclass(frozen=True, slots=True)
class Request:
    """What a line asks for.

    Attributes
    ----------
    prompt : str, messages or ids
    own : dict
        Sampling parameters and how the prompt is read, as arguments of `generate`.
    """

    custom_id: str
    chat: bool
    prompt: Any
    own: dict[str, Any] = field(default_factory=dict)
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """Where a line is, and whose; or what is wrong with it."""

    number: int
    offset: int
    nbytes: int
    custom_id: str | None = None
    fault: str | None = None


def read_lines(path: str | os.PathLike[str]) -> tuple[list[Line], str]:
    """Check every line of a file; also its SHA-256.

    Ids must be unique; of two lines with one id the second is at fault.
    """
    first: dict[str, int] = {}
    digest = hashlib.sha256()
    lines = [_checked(first, *line) for line in _split(path, digest)]
    return lines, digest.hexdigest()


def _checked(first: dict[str, int], number: int, offset: int, raw: bytes, nbytes: int) -> Line:
    """A line, with its fault if it has one; `first` has the ids of those before it."""
    custom_id = fault = None
    try:
        if nbytes > MOST_LINE_BYTES:
            raise ValueError(f"got {nbytes:,} bytes, wanted at most {MOST_LINE_BYTES:,}")
        if number == 1 and raw.startswith(BOM):
            raise ValueError("begins with a byte order mark, wanted UTF-8 without one")
        custom_id = parse(raw).custom_id
        if custom_id in first:
            raise ValueError(
                f"custom_id: got {custom_id!r} again, it is that of line {first[custom_id]}")
        first[custom_id] = number
    except (ValueError, TypeError, NotImplementedError) as error:
        fault = str(error)
    return Line(number, offset, nbytes, custom_id, fault)


class Growing:
    """The lines of a file that grows, up to the line ``{"end": true}``.

    A line counts when its newline is there.  What was read once must stay: the caller keeps
    `nbytes` and `digest`, and `check` compares them with the file before it is read again.

    Attributes
    ----------
    nbytes : int
        Of the lines read so far.
    ended : bool
        The last line was read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self.nbytes = self.number = 0
        self.ended = False
        self._file = open(path, "rb")
        self._digest = hashlib.sha256()
        self._first: dict[str, int] = {}
        self._seen = -1  # size of the file when there was no whole line

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def check(self, bytes: int, sha256: str) -> None:
        """ValueError unless the file still begins with so many bytes of this SHA-256."""
        found = hashlib.sha256()
        left = bytes
        self._file.seek(0)
        while left and (piece := self._file.read(min(left, 1 << 20))):
            found.update(piece)
            left -= len(piece)
        if left or found.hexdigest() != sha256:
            raise ValueError(f"{self.path}: its first {bytes:,} bytes are not those that this job "
                             "has read; begin again with --force-new, or choose another output")

    def read(self, most: int) -> list[Line]:
        """Up to `most` lines that are there and were not read yet, checked."""
        size = os.fstat(self._file.fileno()).st_size
        if size < self.nbytes:
            raise ValueError(f"{self.path}: got {size:,} bytes, fewer than the {self.nbytes:,} "
                             "that were read before: it may only grow")
        lines: list[Line] = []
        while not self.ended and len(lines) < most and size != self._seen:
            self._file.seek(self.nbytes)
            raw = piece = self._file.readline(MOST_LINE_BYTES + 1)
            digest, nbytes = self._digest.copy(), len(raw)
            digest.update(raw)
            while not piece.endswith(b"\n") and (piece := self._file.readline(1 << 20)):
                digest.update(piece)
                nbytes += len(piece)
            if not piece.endswith(b"\n"):
                self._seen = size
                break
            self.ended = _is_end(raw)
            if not self.ended:
                self.number += 1
                lines.append(_checked(self._first, self.number, self.nbytes, raw, nbytes))
            self._digest = digest
            self.nbytes += nbytes
        return lines

    def __enter__(self) -> "Growing":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def _is_end(raw: bytes) -> bool:
    return len(raw) < 64 and b"".join(raw.split()) == b'{"end":true}'


def _split(
    path: str | os.PathLike[str], digest: Any
) -> Iterator[tuple[int, int, bytes, int]]:
    """Number, offset, bytes and length of each line; of a very long one not all bytes."""
    with open(path, "rb") as file:
        number, offset = 0, 0
        while piece := file.readline(MOST_LINE_BYTES + 1):
            number += 1
            raw, nbytes = piece, len(piece)
            digest.update(piece)
            while not piece.endswith(b"\n") and (piece := file.readline(1 << 20)):
                digest.update(piece)
                nbytes += len(piece)
            yield number, offset, raw, nbytes
            offset += nbytes


def read_request(file: Any, line: Line) -> Request:
    """A line again, as it was when it was checked."""
    file.seek(line.offset)
    request = parse(file.read(line.nbytes))
    if request.custom_id != line.custom_id:
        raise ValueError(f"line {line.number} of the input is not what it was: it has changed")
    return request


def parse(raw: bytes) -> Request:
    """What a line asks for; ValueError or TypeError says what is wrong with it."""
    top = _object(raw)
    custom_id, body = _outer(top)
    chat = "messages" in body
    if chat == ("prompt" in body):
        raise ValueError(
            f"body: got {'both' if chat else 'neither'} of messages and prompt, wanted one")
    if body.get("stream") not in (None, False):
        raise ValueError("body.stream: got true, but a batch file has no streams")
    _check_url(top, chat)
    given = {name: value for name, value in body.items() if value is not None
             and name not in ("messages", "prompt", "stream", "tools", *IGNORED)}
    own = {name: given.pop(name) for name in FORM if name in given}
    own |= _logprobs(given, chat)
    _response_format(given)
    _check_names(given)
    if isinstance(given.get("logit_bias"), Mapping):
        given["logit_bias"] = {_token(name): v for name, v in given["logit_bias"].items()}
    own |= given
    Sampling.build({}, **{name: v for name, v in own.items() if name not in FORM})
    prompt = _messages(body) if chat else _prompt(body)
    if chat:
        encode_messages(prompt, own.get("thinking_mode", "chat"))
    model = body.get("model")
    return Request(custom_id, chat, prompt, own, model if isinstance(model, str) else None)


def _object(raw: bytes) -> dict[str, Any]:
    if not raw.strip():
        raise ValueError("got an empty line, wanted a JSON object")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8") from None
    try:
        top = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at character {error.pos + 1}") from None
    if not isinstance(top, dict):
        raise ValueError(f"got {type(top).__name__}, wanted a JSON object")
    return top


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{printable(twice)}: occurs twice in one object")
    return values


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"got {name}, wanted a number")


def _outer(top: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The id and the body of a line in the long or the short form."""
    if "body" in top:
        body = top["body"]
        for name in top:
            if name not in KEYS:
                raise ValueError(f"{printable(name)}: unknown, wanted {', '.join(KEYS)}")
        if not isinstance(body, dict):
            raise TypeError(f"body: got {type(body).__name__}, wanted an object")
        custom_id = top.get("custom_id")
    else:
        body = {k: v for k, v in top.items() if k not in ("custom_id", "id", "method", "url")}
        custom_id = top.get("custom_id", top.get("id"))
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MOST_ID:
        raise ValueError(f"custom_id: got {shown(custom_id)}, wanted a string of 1 to {MOST_ID} "
                         "characters")
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        raise ValueError("custom_id: got half a character (a lone surrogate)") from None
    return custom_id, body


def _check_url(top: dict[str, Any], chat: bool) -> None:
    method, url = top.get("method"), top.get("url")
    if method not in (None, "POST"):
        raise ValueError(f"method: got {shown(method)}, wanted 'POST'")
    wanted = "messages" if chat else "prompt"
    if url is not None and (not isinstance(url, str) or URLS.get(url) != wanted):
        fit = next(name for name, key in URLS.items() if key == wanted)
        raise ValueError(f"url: got {shown(url)}, wanted {fit!r} for a body with {wanted}")


def _check_names(given: dict[str, Any]) -> None:
    for name in NOT_FROM_FILES:
        if name in given:
            raise ValueError(f"body.{name}: not available in batch files")
    known = {*PARAMETERS, *NAMES}
    for name in given:
        if name not in known:
            raise ValueError(f"body.{printable(name)}: unknown or not available")


def _logprobs(given: dict[str, Any], chat: bool) -> dict[str, Any]:
    """The number of alternatives: a switch and a number in chats, one number elsewhere."""
    wanted, top = given.pop("logprobs", None), given.pop("top_logprobs", None)
    if not chat:
        if top is not None:
            raise ValueError("body.top_logprobs: wanted only with messages")
        return {} if wanted is None else {"logprobs": wanted}
    if wanted is not None and not isinstance(wanted, bool):
        raise TypeError(f"body.logprobs: got {shown(wanted)}, wanted true or false with messages")
    if top is not None and not wanted:
        raise ValueError("body.top_logprobs: wanted only with logprobs true")
    return {"logprobs": top or 0} if wanted else {}


def _response_format(given: dict[str, Any]) -> None:
    wanted = given.pop("response_format", None)
    if wanted not in (None, {"type": "text"}):
        raise ValueError('body.response_format: only {"type": "text"} is available')


def _token(name: str) -> int:
    if not name.isdecimal() or len(name) > 10:
        raise ValueError(f"body.logit_bias: got {shown(name)}, wanted token ids")
    return int(name)


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    messages, tools = body["messages"], body.get("tools")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise TypeError("body.messages: wanted a list of objects")
    if tools is None:
        return messages
    if messages and messages[0].get("role") in ("system", "developer"):
        return [messages[0] | {"tools": tools}, *messages[1:]]
    return [{"role": "system", "content": "", "tools": tools}, *messages]


def _prompt(body: dict[str, Any]) -> Any:
    prompt = body["prompt"]
    ids = isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt)
    if not ids and (not isinstance(prompt, str) or not prompt):
        raise TypeError(
            f"body.prompt: got {shown(prompt)[:60]}, wanted a text or a list of token ids")
    return prompt
