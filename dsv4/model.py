# SPDX-License-Identifier: Apache-2.0
"""Models, their sessions and layers: the objects a user holds.

Arguments are checked here, before any work; the engine is `dsv4._core`, loading is
`dsv4.loading`, generation `dsv4.generate`.  Source: DESIGN 3, 7.
"""

import os
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from html import escape
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from dsv4 import _core
from dsv4.checkpoint import Checkpoint
from dsv4.memory import Plan, size
from dsv4.tensors import Tensors
from dsv4.tokenizer import TOKENIZER_FILE, Tokenizer

if TYPE_CHECKING:
    from dsv4.answer import Completion
    from dsv4.generate import Stream

Logits = Literal["last", "all", "none"]
Prompt: TypeAlias = str | Sequence[int] | npt.NDArray[np.integer[Any]]
Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

NOW = -1  # DSV4_NOW: the state a session is in when it is forked
WANT = {"none": 0, "last": 1, "all": 2}
# earlier states a session keeps: by default enough for the last two turns of a conversation
CHECKPOINTS, MOST_CHECKPOINTS = 4, 1024


class Model:
    """A loaded model: immutable, shared freely between threads and sessions.  Made by
    `dsv4.load`.

    Steps of different threads queue on the model's one team of threads: to use the machine, put
    sessions into one step.

    Attributes
    ----------
    config : Config
        Every number of config.json.
    tokenizer : Tokenizer or None
        None for a checkpoint without tokenizer.json: then prompts are token ids.
    path : Path
        The folder it was loaded from.
    kind : str
        What it is, in one line.
    numerics : str
        "official" or "weights".
    plan : Plan
        Bytes by part.
    generation_config : dict
        The checkpoint's own sampling defaults.
    layers : tuple of Layer
        Each callable on its own.
    tensors : Tensors
        Every tensor of the checkpoint by name, as it lies there.
    """

    def __init__(
        self, core: _core.Model, checkpoint: Checkpoint, tokenizer: Tokenizer | None,
        defaults: Mapping[str, Any], needs: Plan, options: Mapping[str, Any],
    ) -> None:
        self._core = core
        self.config = checkpoint.config
        self.tokenizer = tokenizer
        self.path = checkpoint.folder
        self.kind = checkpoint.kind
        self.numerics = "weights" if options["numerics"] else "official"
        self.plan = needs
        self.generation_config = dict(defaults)
        self.version: Literal["v4", "0731"] = "0731" if checkpoint.draft == "dspark" else "v4"
        self._april = {name: bool(options[name]) for name in ("april_kv", "april_shared")}
        self._mapped = bool(options["use_mmap"])
        self._shards = len(checkpoint.shards)
        self.threads = self._core.threads
        self.tensors = Tensors(core, checkpoint.tensors)
        self.layers = tuple(Layer(self, i) for i in range(self.config.num_hidden_layers))

    @property
    def kernel_info(self) -> dict[str, str]:
        """Operation to the variant this model runs, as `dsv4.kernel_info`."""
        return dict(self._core.kernels())

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._core.closed

    def session(self, *, checkpoints: int = CHECKPOINTS) -> "Session":
        """Start a session at position 0.

        Parameters
        ----------
        checkpoints : int
            How many earlier states it keeps for `Session.rewind`, 0 to 1024; each takes as much
            memory as a session of a few tokens.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     session = model.session()
        ...     logits = session.append([0, 5])
        ...     session.position, logits.shape == (1, model.config.vocab_size)
        (2, True)
        """
        return Session(self, _core.Session(self._core, _check_checkpoints(checkpoints)))

    def load_session(
        self, path: str | os.PathLike[str], *, checkpoints: int = CHECKPOINTS,
        verify: bool = False, mmap: bool = True,
    ) -> "Session":
        """Continue a session that `Session.save` has written.

        It goes on with the same bits as the session that was saved, in any process and on any CPU;
        no token is computed again.  The rows stay where the file is mapped, so a context of a
        million tokens is there in a fraction of a second.

        Parameters
        ----------
        path : path
            Later saves to the same path do not disturb this session: they write another file.
        checkpoints : int
            As for `session`.  Kept states are not in the file: `Session.rewind` to before the
            position it was saved at computes again from the beginning.
        verify : bool
            Compare all bytes with their checksums now.  Else blocks of rows are compared when a
            step first reads them; one that differs fails that step, which leaves its sessions as
            they were.
        mmap : bool
            False reads the file into memory (and compares all): for file systems on which files
            may shrink while they are used.

        Raises
        ------
        FormatError
            The file is damaged, is not a saved session, or belongs to another model, other numerics
            or another version: names what differs.
        OSError
            It cannot be read.

        Examples
        --------
        >>> import tempfile
        >>> import dsv4
        >>> with dsv4.load() as model, tempfile.TemporaryDirectory() as folder:
        ...     session = model.session()
        ...     _ = session.append("To be, or not to be")
        ...     session.save(f"{folder}/hamlet.dsv4")
        ...     other = model.load_session(f"{folder}/hamlet.dsv4")
        ...     (session.append([7]) == other.append([7])).all()
        np.True_
        """
        from dsv4 import state_file

        kept = _check_checkpoints(checkpoints)
        for name, value in (("verify", verify), ("mmap", mmap)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: got {value!r}, wanted True or False")
        return Session(self, state_file.load(self, path, kept, verify, mmap))

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        """What a saved state must agree with."""
        from dsv4 import state_file

        return state_file.fingerprint(self)

    def step(
        self, segments: Iterable[tuple["Session", Prompt]], logits: Logits = "last"
    ) -> list[Float32 | None]:
        """Run one forward pass over several sessions at once.

        Parameters
        ----------
        segments : iterable of (Session, ids or text)
            What to append to each session, any mix of long and short; a session occurs once.
        logits : "last", "all" or "none"
            Rows to return per segment.

        Returns
        -------
        list of float32 [1, vocab] ("last"), [n, vocab] ("all") or None ("none")
            What each session computes does not depend on the others.

        Raises
        ------
        ValueError, TypeError
            Ids out of range, empty segments, more tokens than the context holds.
        NonFiniteLogitsError
            The weights gave NaN or infinite logits.

        Notes
        -----
        Atomic: a step that fails, or is interrupted by Ctrl-C, leaves all its sessions as they
        were.  Thread-safe.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     a, b = model.session(), model.session()
        ...     [x.shape[0] for x in model.step([(a, [0, 5, 6]), (b, "Hello")])]
        [1, 1]
        """
        want = _want(logits)
        native = []
        for i, (session, prompt) in enumerate(segments):
            name = f"segments[{i}]"
            if not isinstance(session, Session):
                raise TypeError(f"{name}: got {type(session).__name__}, wanted a Session")
            ids = self.ids(prompt, name, bos=session.position == 0)
            check_room(session.position, len(ids), self.config.max_position_embeddings, name)
            native.append((session._core, ids, want, None))
        return [rows for rows, _ in self._core.step(native, None)]

    def ids(
        self, prompt: Prompt, name: str = "prompt", *, bos: bool = True, special: bool = False
    ) -> Int32:
        """The token ids of a prompt: text is tokenised, ids are checked.

        Parameters
        ----------
        prompt : str or sequence of int
        name : str
            The argument's name in error messages.
        bos : bool
            Put the begin-of-sentence id before text (never before ids).
        special : bool
            Markers in the text become their ids; else they are text like any other.

        Returns
        -------
        int32 [n]
            n is at least 1.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     len(model.ids("Once upon a time")) > 1
        True
        """
        ids: Any = prompt
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError(f"{name}: got an empty string, wanted at least one character")
            ids = self.text_tokenizer(name).encode(prompt, special=special)
            if bos:
                ids.insert(0, self.config.bos_token_id)
        array = _core.token_ids(ids, name, self.config.vocab_size)
        if not len(array):
            raise ValueError(f"{name}: got no tokens, wanted at least one")
        return array

    def text_tokenizer(self, name: str) -> Tokenizer:
        """The tokenizer; ValueError for a checkpoint that has none, naming the argument."""
        if self.tokenizer is None:
            raise ValueError(
                f"{name}: got text, but {self.path} has no {TOKENIZER_FILE}; wanted token ids")
        return self.tokenizer

    def generate(self, prompt: Any, **arguments: Any) -> "Completion | list[Completion]":
        """Generate the whole answer to a prompt; see `dsv4.generate.generate`.

        Parameters
        ----------
        prompt : str, messages, ids, or a list of prompts
        **arguments
            Sampling parameters (`dsv4.Sampling`) and the arguments of `dsv4.generate.generate`.

        Returns
        -------
        Completion, or a list of them
            A list for a list of prompts, and for n > 1.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     out = model.generate("ROMEO:", max_new_tokens=5, seed=1)
        ...     len(out.tokens), out.finish_reason
        (5, 'length')
        """
        from dsv4.generate import generate

        return generate(self, prompt, **arguments)

    def stream(self, prompt: Any, **arguments: Any) -> "Stream":
        """Generate an answer piece by piece; see `dsv4.generate.stream`.

        Returns
        -------
        Stream
            An iterator of `Event`; closing it (or leaving the loop) ends the work.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     text = "".join(e.text for e in model.stream("ROMEO:", max_new_tokens=5, seed=1))
        ...     text == str(model.generate("ROMEO:", max_new_tokens=5, seed=1))
        True
        """
        from dsv4.generate import stream

        return stream(self, prompt, **arguments)

    def batch(self, prompts: Iterable[Any], **arguments: Any) -> Iterator[Any]:
        """Answer many prompts, a few at a time; see `dsv4.batch.batch`.

        Parameters
        ----------
        prompts : iterable
            Each as for `generate`, or a pair of that and a dict of arguments of its own.
        **arguments
            concurrency, ordered, share_prefixes, progress, memory, and those of `generate`.

        Returns
        -------
        iterator of Completion
            In the order of the prompts; with ordered=False (index, Completion) as they are ready.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     rows = ["ROMEO:", ("JULIET:", {"max_new_tokens": 2})]
        ...     [len(a.tokens) for a in model.batch(rows, max_new_tokens=4, concurrency=2)]
        [4, 2]
        """
        from dsv4.batch import batch

        return batch(self, prompts, **arguments)

    def abatch(
        self, prompts: Iterable[Any] | AsyncIterable[Any], **arguments: Any
    ) -> AsyncIterator[Any]:
        """Like `batch`, for ``async for``; see `dsv4.batch.abatch`.

        Examples
        --------
        >>> import asyncio
        >>> import dsv4
        >>> async def answers(model):
        ...     return [len(a.tokens) async for a in model.abatch(["ROMEO:"], max_new_tokens=3)]
        >>> with dsv4.load() as model:
        ...     asyncio.run(answers(model))
        [3]
        """
        from dsv4.batch import abatch

        return abatch(self, prompts, **arguments)

    def close(self) -> None:
        """Give up the weights.  Sessions of the model can no longer step; twice is no error."""
        self._core.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _facts(self) -> list[tuple[str, str]]:
        how = "closed" if self.closed else "mapped" if self._mapped else "in memory"
        files = f"{self._shards} shard{'s' * (self._shards > 1)}"
        parts = sorted(self.plan.weights.items(), key=lambda item: -item[1])
        return [
            ("from", f"{self.path} ({files}, {how})"),
            ("weights", size(self.plan.weight_bytes)),
            *((f"  {part}", size(n)) for part, n in parts if n),
            *self._kept(),
            ("runs on", f"cpu, {self.threads} thread{'s' * (self.threads > 1)}, "
                        f"{self.numerics} numerics"),
        ]

    def _kept(self) -> list[tuple[str, str]]:
        kept, n = self.plan.experts_in_memory, self.plan.experts
        if kept == n:
            return []
        return [("in memory", f"{size(self.plan.resident)}, {kept:,} of {n:,} routed experts; "
                              "the others are read from disk when they are chosen")]

    def __repr__(self) -> str:
        facts = self._facts()
        width = max(len(name) for name, _ in facts)
        lines = [f"dsv4.Model: {self.kind}", *(f"  {name:<{width}}  {v}" for name, v in facts)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:left'>{escape(name).replace(' ', '&nbsp;')}</td>"
            f"<td style='text-align:left'>{escape(value)}</td></tr>"
            for name, value in self._facts()
        )
        return f"<b>dsv4.Model</b>: {escape(self.kind)}<table>{rows}</table>"


class Session:
    """One timeline: the tokens so far and the state that belongs to them.  Made by
    `Model.session`.

    Safe to use from several threads: the steps of one session are done one after the other.

    Attributes
    ----------
    model : Model
    """

    def __init__(self, model: Model, core: _core.Session) -> None:
        self.model = model
        self._core = core

    @property
    def position(self) -> int:
        """Tokens so far."""
        return self._core.position

    @property
    def tokens(self) -> Int32:
        """The tokens so far: int32 [position], a copy."""
        return self._core.tokens(0, self._core.position)

    @property
    def nbytes(self) -> int:
        """Bytes of its state now; it grows with the position."""
        return sum(self._core.bytes)

    @overload
    def append(
        self, prompt: Prompt, logits: Literal["last", "all"] = "last", *, special: bool = False
    ) -> Float32: ...
    @overload
    def append(self, prompt: Prompt, logits: Literal["none"], *, special: bool = False) -> None: ...
    def append(
        self, prompt: Prompt, logits: Logits = "last", *, special: bool = False
    ) -> Float32 | None:
        """Append tokens and compute what follows them.

        Parameters
        ----------
        prompt : str or sequence of int
            Text is tokenised, with begin-of-sentence put first at position 0; ids are used as
            they are.
        logits : "last", "all" or "none"
            Rows to return.
        special : bool
            Markers in the text become their ids; else they are text like any other.

        Returns
        -------
        float32 [1, vocab] ("last"), [n, vocab] ("all") or None ("none")
            Row i is what follows token i of those appended.

        Raises
        ------
        ValueError, TypeError
            Ids out of range, nothing to append, more tokens than the context holds.
        NonFiniteLogitsError
            The weights gave NaN or infinite logits.

        Notes
        -----
        A call that fails, or is interrupted by Ctrl-C, leaves the session as it was.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     session = model.session()
        ...     session.append([0, 7, 8], logits="all").shape[0], session.tokens.tolist()
        (3, [0, 7, 8])
        """
        want = _want(logits)
        position = self.position
        ids = self.model.ids(prompt, bos=position == 0, special=special)
        check_room(position, len(ids), self.model.config.max_position_embeddings, "prompt")
        ((rows, _),) = self.model._core.step([(self._core, ids, want, None)], None)
        return rows

    def fork(self) -> "Session":
        """Make a second session with the same past and a future of its own.

        Nothing is copied until one of the two moves on, and then only what it writes: a fork
        takes microseconds and, at first, no memory, however long the context is.

        Returns
        -------
        Session
            At the same position; it continues with the same bits as this one.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     session = model.session()
        ...     _ = session.append("To be, or not to be")
        ...     other = session.fork()
        ...     (session.append([7]) == other.append([7])).all()
        np.True_
        """
        return Session(self.model, self._core.fork(NOW))

    def rewind(self, position: int) -> None:
        """Go back to an earlier position; what follows is as if the later tokens had never been.

        Parameters
        ----------
        position : int
            0 to the present position.

        Notes
        -----
        Exact: continuing gives the same bits as a session that was never further.  A session
        keeps its state from before and after each of the last appends of several tokens
        (`Model.session` says how many): going back to one of those costs nothing.  Anywhere else
        the tokens from the nearest earlier kept state (or from the beginning) to `position` are
        computed again.  Interrupted or failing, the session stays where it was.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     session = model.session()
        ...     _ = session.append([0, 5, 6])
        ...     first = session.append([9])
        ...     session.rewind(3)
        ...     session.position, (session.append([9]) == first).all()
        (3, np.True_)
        """
        now = self.position
        if isinstance(position, bool) or not isinstance(position, int | np.integer):
            raise TypeError(f"position: got {type(position).__name__}, wanted an int")
        if not 0 <= position <= now:
            raise ValueError(f"position: got {position}, wanted 0 to {now}, where the session is")
        past = self._core.fork(int(position))
        again = self._core.tokens(past.position, int(position) - past.position)
        if len(again):
            self.model._core.step([(past, again, WANT["none"], None)], None)
        self._core.swap(past)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session to a file, for `Model.load_session`.

        Parameters
        ----------
        path : path
            A new file, or one to replace; a symbolic link is followed.

        Raises
        ------
        OSError
            It could not be written; says how many bytes are needed and free.
        FormatError
            There is something else than a file, or this session was loaded from a file that turns
            out to be damaged.

        Notes
        -----
        The file appears whole and synced or not at all: whatever happens meanwhile, the path holds
        the old file or the new one.  It has about as many bytes as `nbytes` and says which model
        it belongs to (a digest of its config, tensors and vocabulary, and samples of its weights).
        The session may go on while it is written.  The states kept for `rewind` are not saved.

        Examples
        --------
        See `Model.load_session`.
        """
        from dsv4 import state_file

        with Session(self.model, self._core.fork(NOW)) as frozen:
            state_file.save(frozen._core, self.model, path)

    def __reduce__(self) -> str:
        raise TypeError("a Session cannot be pickled: it lives in its model; save() writes it to a "
                        "file that Model.load_session reads")

    def _fill(self, position: int, seed: int = 0) -> None:
        """Move on to `position` without computing anything; for measuring long contexts.

        The state becomes pseudo-random numbers of ordinary size, the same for the same seed, as
        many bytes as `position` real tokens would leave; 3.5 KB a token for V4-Flash.  The tokens
        become id 0.  What the model says after that means nothing, how long it takes does.

        Parameters
        ----------
        position : int
            Between the present position and the longest context of the model.
        seed : int

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     session = model.session()
        ...     session._fill(1000)
        ...     session.append([7]).shape[0], session.position
        (1, 1001)
        """
        self._core.fill(position, seed)

    def close(self) -> None:
        """Free its state now rather than with the object; twice is no error.

        Raises
        ------
        RuntimeError
            Another thread runs a step with it.
        """
        self._core.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        try:
            return f"<dsv4.Session at position {self.position}, {size(self.nbytes)}>"
        except (ValueError, RuntimeError):
            return "<dsv4.Session, closed>"


class Layer:
    """One layer of a model, callable on its own.

    Attributes
    ----------
    index : int
    kind : "SWA", "CSA" or "HCA"
        Sliding window alone, or with compressed sparse or heavily compressed attention.
    compress_ratio : int
        Tokens per compressed entry; 0 for SWA.
    """

    def __init__(self, model: Model, index: int) -> None:
        self._model = model
        self.index = index
        self.kind = model.config.layer_kind(index)
        self.compress_ratio = model.config.compress_ratios[index]

    def __call__(self, streams: npt.ArrayLike, token_ids: Prompt) -> Float32:
        """Run the whole layer from position 0, with the code that runs inside a step.

        Parameters
        ----------
        streams : float [n, hc_mult, hidden_size]
            The residual streams; values are rounded to bf16, to nearest, ties to even.
        token_ids : sequence of int [n]
            Layers that route by token id use them.

        Returns
        -------
        float32 [n, hc_mult, hidden_size]
            Holds bf16 values.

        Examples
        --------
        >>> import numpy as np
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     c = model.config
        ...     x = np.ones((3, c.hc_mult, c.hidden_size), np.float32)
        ...     model.layers[0](x, [0, 5, 6]).shape == x.shape
        True
        """
        c = self._model.config
        values = np.asarray(streams)
        if values.dtype.kind != "f":
            raise TypeError(f"streams: got an array of {values.dtype}, wanted floats")
        wanted = (c.hc_mult, c.hidden_size)
        if values.ndim != 3 or values.shape[1:] != wanted or not len(values):
            raise ValueError(
                f"streams: got shape {values.shape}, wanted (n, {wanted[0]}, {wanted[1]}), n > 0")
        ids = _core.token_ids(token_ids, "token_ids", c.vocab_size)
        if len(ids) != len(values):
            raise ValueError(
                f"token_ids: got {len(ids)}, wanted one for each of the {len(values)} rows")
        out = self._model._core.layer(self.index, to_bf16(values), ids, None)
        return from_bf16(out)

    def __repr__(self) -> str:
        return f"<dsv4.Layer {self.index}, {self.kind}, compress ratio {self.compress_ratio}>"


def to_bf16(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint16]:
    """Float values as bf16 codes, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bf16(codes: npt.NDArray[np.uint16]) -> Float32:
    """The float32 values of bf16 codes."""
    return (codes.astype(np.uint32) << 16).view(np.float32)


def check_room(position: int, n: int, context: int, name: str) -> None:
    """ValueError unless n more tokens fit into the context."""
    if n > context - position:
        raise ValueError(
            f"{name}: got {n} tokens at position {position}, wanted at most {context - position}: "
            f"the context of this model is {context}")


def _check_checkpoints(checkpoints: object) -> int:
    if isinstance(checkpoints, bool) or not isinstance(checkpoints, int | np.integer):
        raise TypeError(f"checkpoints: got {type(checkpoints).__name__}, wanted an int")
    if not 0 <= checkpoints <= MOST_CHECKPOINTS:
        raise ValueError(f"checkpoints: got {checkpoints}, wanted 0 to {MOST_CHECKPOINTS}")
    return int(checkpoints)


def _want(logits: object) -> int:
    if not isinstance(logits, str) or logits not in WANT:
        raise ValueError(f"logits: got {logits!r}, wanted 'last', 'all' or 'none'")
    return WANT[logits]
