# SPDX-License-Identifier: Apache-2.0
"""How well a model predicts a text: perplexity, bits per byte, accuracy of the next token.

The text is cut into windows of `max_length` tokens, one every `stride` tokens.  Each begins with
BOS, each token is scored once: in the first window that reaches it, so with at least
`max_length - stride` tokens before it, except at the beginning of the text.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dsv4 import _core
from dsv4.arrays import Float32, Int32
from dsv4.memory import chunk_tokens
from dsv4.model import Model
from dsv4.progress import bar

if TYPE_CHECKING:
    from dsv4.edit import Edit

LONGEST_WINDOW = 4096  # unless asked for: each token is computed max_length / stride times
LOGIT_BYTES = 256 << 20  # of logits that come out of one step
MOST_WINDOWS = 256  # in one step


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluation:
    """How well a model predicts a text; from `evaluate`.

    Attributes
    ----------
    tokens : int
        Tokens scored.
    bytes : int or None
        Bytes of UTF-8 they stand for; None without a tokenizer.
    nll : float
        The sum of -log p over all tokens, in nats.
    accuracy : float
        Share of the tokens that had the highest probability.
    ids : int32 [tokens]
        The tokens.
    token_nll : float32 [tokens]
        -log p of each, in nats.
    correct : bool [tokens]
        Whether it had the highest probability (of equal ones, the lowest id).
    texts : list of str or None
        Each token as text; bytes that are not whole characters are U+FFFD.
    max_length, stride : int
        The windows.
    seconds : float
        What it took.
    """

    tokens: int
    bytes: int | None
    nll: float
    accuracy: float
    ids: Int32
    token_nll: Float32
    correct: npt.NDArray[np.bool_]
    texts: list[str] | None
    max_length: int
    stride: int
    seconds: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss): per token of this model's vocabulary; compare models by bits per byte."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text; None without a tokenizer."""
        return self.nll / math.log(2) / self.bytes if self.bytes else None

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for json, without the arrays.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     sorted(dsv4.evaluate(model, "To be, or not to be").to_dict())
        ... # doctest: +NORMALIZE_WHITESPACE
        ['accuracy', 'bits_per_byte', 'bytes', 'loss', 'max_length', 'nll', 'perplexity',
         'seconds', 'stride', 'tokens']
        """
        names = ("tokens", "bytes", "nll", "loss", "perplexity", "bits_per_byte", "accuracy",
                 "max_length", "stride", "seconds")
        return {name: getattr(self, name) for name in names}

    def to_pandas(self) -> Any:
        """A pandas DataFrame with a row for each token: id, text, nll, correct.

        Raises
        ------
        ImportError
            pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError(
                "to_pandas needs pandas, which is not installed: pip install pandas") from None
        columns: dict[str, Any] = {"id": self.ids}
        if self.texts is not None:
            columns["text"] = self.texts
        return pandas.DataFrame({**columns, "nll": self.token_nll, "correct": self.correct})

    def __repr__(self) -> str:
        bits = self.bits_per_byte
        shown = "" if bits is None else f"{bits:.4f} bits per byte, "
        return (f"<dsv4.Evaluation of {self.tokens:,} tokens: {shown}perplexity "
                f"{self.perplexity:.3f}, accuracy {self.accuracy:.3f}>")


class _Window(NamedTuple):
    """Inputs of one window, and where the rows that are scored begin."""

    inputs: Int32
    first: int
    at: int  # the token that row `first` predicts


def evaluate(
    model: Model, text: str | os.PathLike[str] | Sequence[int] | npt.NDArray[np.integer[Any]], *,
    max_length: int | None = None, stride: int | None = None, batch_size: int | None = None,
    limit: int | None = None, edit: "Edit | None" = None, progress: bool | None = None,
) -> Evaluation:
    """Measure how well a model predicts a text or a file.

    Parameters
    ----------
    model : Model
    text : str, path or sequence of int
        A str is the text itself, markers in it are plain text; a `pathlib.Path` is a file in UTF-8.
        Of ids a leading BOS is left out, since every window begins with one.
    max_length : int, optional
        Tokens of a window, BOS included; by default the model's context, at most 4,096.
    stride : int, optional
        Tokens from one window to the next, at most max_length; half of it by default.  Smaller
        ones give each token more context and take longer.
    batch_size : int, optional
        Windows in one step, 1 to 256; by default as many as one pass of the engine holds.  Changes
        the time, never the result.
    limit : int, optional
        Score only the first so many tokens.
    edit : Edit, optional
        What the model does otherwise (`dsv4.edit`); positions count from the BOS of each window.
    progress : bool, optional
        A bar on standard error; by default on a terminal.

    Returns
    -------
    Evaluation

    Raises
    ------
    ValueError, TypeError
        Nothing to score, an argument out of range, an edit that does not fit the model, a str that
        is the name of a file, a file that is not UTF-8; before any work.
    OSError
        The file cannot be read.

    Examples
    --------
    >>> import dsv4
    >>> with dsv4.load() as model:
    ...     found = dsv4.evaluate(model, "To be, or not to be, that is the question.")
    ...     found.tokens == len(found.token_nll), found.bytes, found.perplexity > 1
    (True, 42, True)
    """
    began = time.perf_counter()
    model.session(edit=edit, checkpoints=0).close()  # refuses an edit that does not fit
    length = min(model.config.max_position_embeddings, LONGEST_WINDOW)
    length = _within(max_length, "max_length", 2, model.config.max_position_embeddings, length)
    step = _within(stride, "stride", 1, length, max(1, length // 2))
    fitting = max(1, chunk_tokens(model.config) // length)
    at_once = _within(batch_size, "batch_size", 1, MOST_WINDOWS, min(fitting, MOST_WINDOWS))
    ids = _targets(model, text)
    ids = ids[: _within(limit, "limit", 1, len(ids), len(ids), cut=True)]
    nll = np.empty(len(ids), np.float32)
    correct = np.empty(len(ids), np.bool_)
    shown = None if progress is False else bar(total=len(ids), unit=" tokens", desc="evaluate")
    try:
        windows = list(_windows(ids, model.config.bos_token_id, length, step))
        for group in range(0, len(windows), at_once):
            for at, logits in _rows(model, windows[group : group + at_once], edit):
                targets = ids[at : at + len(logits)]
                nll[at : at + len(logits)] = [-p for p, _ in _core.logprobs(logits, targets, 0)]
                correct[at : at + len(logits)] = logits.argmax(-1) == targets
                if shown is not None:
                    shown.update(len(logits))
    finally:
        if shown is not None:
            shown.close()
    texts, size = None, None
    if model.tokenizer is not None:
        pieces = [model.tokenizer.token_bytes(int(i)) for i in ids]
        texts, size = [p.decode(errors="replace") for p in pieces], sum(map(len, pieces))
    return Evaluation(
        tokens=len(ids), bytes=size, nll=math.fsum(nll), accuracy=float(correct.mean()), ids=ids,
        token_nll=nll, correct=correct, texts=texts, max_length=length, stride=step,
        seconds=time.perf_counter() - began)


def _targets(model: Model, text: Any) -> Int32:
    """The tokens to score, without BOS."""
    if isinstance(text, os.PathLike):
        try:
            text = Path(text).read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"text: {os.fspath(text)} is not UTF-8 at byte {error.start}") from None
    elif isinstance(text, str) and "\n" not in text and len(text) < 256 and Path(text).is_file():
        raise ValueError(
            f"text: got {text!r}, which names a file; wanted the text itself, or "
            f"pathlib.Path({text!r}) to read the file")
    ids = model.ids(text, "text", bos=False)
    if not isinstance(text, str) and ids[0] == model.config.bos_token_id:
        ids = ids[1:]
        if not len(ids):
            raise ValueError("text: got BOS alone, wanted at least one token to score")
    return ids


def _windows(ids: Int32, bos: int, length: int, stride: int) -> Iterator[_Window]:
    for at in range(0, len(ids), stride):
        first = length - stride if at else 0
        targets = ids[at : at + length]
        if len(targets) <= first:
            return
        yield _Window(np.concatenate([[bos], targets[:-1]]).astype(np.int32), first, at + first)


def _rows(
    model: Model, windows: Sequence[_Window], edit: "Edit | None"
) -> Iterator[tuple[int, Float32]]:
    """(the first token predicted, logits [n, vocab]), piece by piece, of windows side by side."""
    piece = max(1, LOGIT_BYTES // (4 * model.config.vocab_size * len(windows)))
    sessions = [model.session(edit=edit, checkpoints=0) for _ in windows]
    try:
        before = [(s, w.inputs[: w.first])
                  for s, w in zip(sessions, windows, strict=True) if w.first]
        if before:
            model.step(before, logits="none")
        for done in range(0, max(len(w.inputs) - w.first for w in windows), piece):
            left = [(s, w, w.inputs[w.first + done :][:piece])
                    for s, w in zip(sessions, windows, strict=True)]
            left = [part for part in left if len(part[2])]
            found = model.step([(s, inputs) for s, _, inputs in left], logits="all")
            for (_, window, _), logits in zip(left, found, strict=True):
                assert logits is not None
                yield window.at + done, logits
    finally:
        for session in sessions:
            session.close()


def _within(
    value: object, name: str, low: int, high: int, default: int, cut: bool = False
) -> int:
    """An int from low to high; `default` for None; with `cut` more than `high` is `high`."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted an int or None")
    if value < low or (value > high and not cut):
        wanted = f"at least {low}" if cut else f"{low} to {high}"
        raise ValueError(f"{name}: got {value}, wanted {wanted}")
    return min(int(value), high)
