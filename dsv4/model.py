# SPDX-License-Identifier: Apache-2.0
"""Models: what `dsv4.load` gives, and everything else comes from.

Arguments are checked here, before any work; the engine is `dsv4._core`, loading is
`dsv4.loading`, generation `dsv4.generate`.  Source: DESIGN 3, 7.
"""

import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from functools import cached_property
from html import escape
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from dsv4 import _core
from dsv4.arrays import (
    Float32,
    Int32,
    Logits,
    Prompt,
    check_logits,
    check_room,
    wanted_rows,
)
from dsv4.checkpoint import Checkpoint
from dsv4.device_names import named
from dsv4.layers import Layer, Layers
from dsv4.memory import Plan, Stage, size
from dsv4.prefixes import SharedPrefixes
from dsv4.session import CHECKPOINTS, Session, check_checkpoints, edited, forked
from dsv4.tensors import Tensors
from dsv4.tokenizer import TOKENIZER_FILE, Tokenizer

if TYPE_CHECKING:
    from dsv4.answer import Completion
    from dsv4.edit import Edit
    from dsv4.generate import Stream
    from dsv4.trace import Trace


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
    device : str
        Where steps run: "cpu", or the GPUs as they were asked for ("cuda", "cuda:1", "cuda:0,1").
    stages : tuple of Stage
        Which layers are on which GPU; empty on the CPU.
    numerics : str
        "official" or "weights".
    exact : bool
        False where prompts are computed on a GPU's tensor cores: not with the CPU's bits.
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
        self.device = "cpu"
        if options["use_cuda"]:
            self.device = named(options["cuda_devices"])
        self.stages = tuple(Stage(*stage) for stage in core.stages)
        self.exact = not (options["use_cuda"] and options["tensor_cores"])
        self._why_cpu: str | None = options["why_cpu"]
        self.plan = needs
        self.generation_config = dict(defaults)
        self.version: Literal["v4", "0731"] = "0731" if checkpoint.draft == "dspark" else "v4"
        self._april = {name: bool(options[name]) for name in ("april_kv", "april_shared")}
        self._mapped = bool(options["use_mmap"])
        self._shards = len(checkpoint.shards)
        self.threads = self._core.threads
        self._prefixes = SharedPrefixes()
        self._keep_uses: Callable[[], object] | None = None  # of routed experts, at the end
        self.tensors = Tensors(core, checkpoint.tensors)
        self.layers = Layers(Layer(self, i) for i in range(self.config.num_hidden_layers))

    @property
    def kernel_info(self) -> dict[str, str]:
        """Operation to the variant this model runs, as `dsv4.kernel_info`."""
        return dict(self._core.kernels())

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._core.closed

    def session(
        self, prefix: Prompt | Session | None = None, *, edit: "Edit | None" = None,
        checkpoints: int = CHECKPOINTS, special: bool = False,
    ) -> Session:
        """Start a session, at position 0 or after a prefix that others share.

        Parameters
        ----------
        prefix : str, sequence of int or Session, optional
            What the session begins with: text (begin-of-sentence is put first), ids, or the tokens
            of another session, which is forked.  Sessions share the state of equal beginnings,
            and it is computed once: the model keeps the states after prefixes of 32 tokens and
            more, and where two of them part, in at most a quarter of the memory that is free for
            states; those not used for longest go first.
        edit : Edit, optional
            What it changes in its own passes (`dsv4.edit`), the prefix included, which is then not
            shared; of a session that is forked, from its position on.  It stays with the session,
            its forks and its saved files.
        checkpoints : int
            How many earlier states it keeps for `Session.rewind`, 0 to 1024; each takes as much
            memory as a session of a few tokens.
        special : bool
            Markers in a prefix that is text become their ids; else they are text like any other.

        Raises
        ------
        ValueError, TypeError
            The prefix is empty, out of range, longer than the context, or of another model.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     session = model.session()
        ...     logits = session.append([0, 5])
        ...     session.position, logits.shape == (1, model.config.vocab_size)
        (2, True)
        >>> with dsv4.load() as model:
        ...     scene = "ROMEO: But soft, what light through yonder window breaks? " * 4
        ...     one, two = model.session(scene), model.session(scene)
        ...     bool((one.append(" It") == two.append(" It")).all())
        True
        """
        kept = check_checkpoints(checkpoints)
        if isinstance(prefix, Session):
            if prefix.model is not self:
                raise ValueError("prefix: got a session of another model, wanted one of this model")
            return forked(prefix, kept, edit)
        if prefix is None:
            core = _core.Session(self._core, kept)
            return Session(self, core) if edit is None else edited(self, core, edit)
        ids = self.ids(prefix, "prefix", special=special)
        check_room(0, len(ids), self.config.max_position_embeddings, "prefix")
        if not edit:
            return self._prefixes.session(self, ids, kept)
        session = edited(self, _core.Session(self._core, kept), edit)
        session.append(ids, logits="none")
        return session

    def edit(self, *edits: "Edit") -> "Edit":
        """Join edits, and check that they fit this model.

        Parameters
        ----------
        *edits : Edit
            The operations of `dsv4.edit`, in the order in which they are applied.

        Returns
        -------
        Edit
            Immutable, for `session`, `generate`, `stream`, `batch` and `Session.fork`; without
            arguments the one that changes nothing.

        Raises
        ------
        ValueError, TypeError
            A layer, expert, head, site or shape that this model does not have.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     quiet = model.edit(dsv4.edit.AblateHeads(1, 0), dsv4.edit.DisableExperts(2, 3))
        ...     session = model.session(edit=quiet)
        ...     len(session.edit.operations), session.append("ROMEO:").shape[0]
        (2, 1)
        """
        from dsv4.edit import Edit

        joined = Edit(*edits)
        joined.check(self.config)
        return joined

    def load_session(
        self, path: str | os.PathLike[str], *, checkpoints: int = CHECKPOINTS,
        verify: bool = False, mmap: bool = True,
    ) -> Session:
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

        kept = check_checkpoints(checkpoints)
        for name, value in (("verify", verify), ("mmap", mmap)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: got {value!r}, wanted True or False")
        core, edit = state_file.load(self, path, kept, verify, mmap)
        file = os.path.realpath(os.fsdecode(path))
        return Session(self, core, file=file) if edit is None else edited(self, core, edit, file)

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        """What a saved state must agree with."""
        from dsv4 import state_file

        return state_file.fingerprint(self)

    def trace(
        self, prompt: Prompt, *, special: bool = False, router: Any = None, indexer: Any = None,
        streams: Any = None, streams_in: Any = None, streams_mid: Any = None, kv: Any = None,
        attention: Any = None, heads: Any = None, hyper: Any = None, sublayers: Any = None,
        logits: Logits = "none", nll: bool = False, out: str | os.PathLike[str] | None = None,
        device: bool = False, edit: "Edit | None" = None, **unknown: Any,
    ) -> "Trace":
        """Run a prompt in a new session, and copy internals out meanwhile.

        Parameters
        ----------
        prompt : str or sequence of int
            As for `Session.append`; `special` too.
        router : True or list of int
            Experts, weights and scores.
        indexer : True or list of int
            Of CSA layers: scores, and the entries selected.
        streams, streams_in, streams_mid : True or list of int
            The residual streams after, before, and between the sublayers of a layer.
        kv : True or list of int
            The rows it keeps: of every token, of compressed entries, of the indexer.
        attention : True or list of int
            The weight of every key, computed again for the trace alone.
        heads : True or list of int
            What each head gives.
        hyper : True or list of int
            The hyper-connections: pre, post, comb.
        sublayers : True or list of int
            What attention and experts read and give.
        logits : "all", "last" or "none"
            Rows to keep.
        nll : bool
            Keep -log p of each token.
        out : path, optional
            An empty or new folder: everything goes to `.npy` files there instead of memory.
        device : bool
            Layers are traced on the GPU, as `dsv4.DeviceArray` in place of arrays (`dsv4.Trace`).
        edit : Edit, optional
            What the session changes (`dsv4.edit`); values are traced after they are changed.

        Returns
        -------
        Trace
            With the session as `session`; a ``with`` block closes both.

        Raises
        ------
        ValueError, TypeError
            Something in the arguments is unknown or out of range; names the nearest.
        MemoryError, OSError
            There is less memory, or space in `out`, than it needs; with the bytes.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     with model.trace("To be, or not to be", router=True, streams=[1], nll=True) as t:
        ...         n = len(t.tokens)
        ...         same = t.router[1].experts.shape == (n, model.config.num_experts_per_tok)
        ...         same, t.streams[1].shape[0] == n, len(t.nll) == n - 1
        (True, True, True)
        """
        from dsv4.edit_base import checked
        from dsv4.trace import Trace

        ids = self.ids(prompt, bos=True, special=special)
        check_room(0, len(ids), self.config.max_position_embeddings, "prompt")
        checked(edit).check(self.config)
        traced = Trace(
            self, router=router, indexer=indexer, streams=streams, streams_in=streams_in,
            streams_mid=streams_mid, kv=kv, attention=attention, heads=heads, hyper=hyper,
            sublayers=sublayers, logits=logits, nll=nll, out=out, device=device,
            **unknown)
        traced.session = self.session(edit=edit)
        try:
            traced.append(traced.session, ids, 0)
        except BaseException:
            traced.close()
            raise
        return traced

    def step(
        self, segments: Iterable[tuple[Session, Prompt] | tuple[Session, Prompt, "Trace | None"]],
        logits: Logits = "last",
    ) -> list[Float32 | None]:
        """Run one forward pass over several sessions at once.

        Parameters
        ----------
        segments : iterable of (Session, ids or text) or (Session, ids or text, Trace)
            What to append to each session, any mix of long and short; a session occurs once.  A
            trace copies internals of its session alone.
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
        want = check_logits(logits)
        native: list[Any] = []
        traces: list[Trace | None] = []
        for i, (session, prompt, *rest) in enumerate(segments):
            name = f"segments[{i}]"
            if not isinstance(session, Session):
                raise TypeError(f"{name}: got {type(session).__name__}, wanted a Session")
            ids = self.ids(prompt, name, bos=session.position == 0)
            check_room(session.position, len(ids), self.config.max_position_embeddings, name)
            trace = _trace_of(rest, self, f"{name}: trace")
            if trace is not None and any(trace is other for other in traces):
                raise ValueError(f"{name}: got one trace twice, wanted one for each session")
            traces.append(trace)
            segment: tuple[Any, ...] = (session._core, ids, want, None)
            if trace is not None:
                taps = trace.begin(session.position, len(ids))
                segment = (session._core, ids, trace.want(want), None, taps)
            native.append(segment)
        found = [rows for rows, _ in self._core.step(native, None)]
        for i, trace in enumerate(traces):
            if trace is not None:
                trace.take(native[i][1], found[i])
                found[i] = wanted_rows(found[i], want)
        return found

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
        self._prefixes.close()
        if self._keep_uses is not None:
            self._keep_uses()
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
            ("runs on", f"{self.device}, {self.threads} thread{'s' * (self.threads > 1)}, "
                        f"{self.numerics} numerics"
                        + ("" if self.exact else ", prompts on tensor cores")),
            *((f"  GPU {s.device}", str(s)) for s in self.stages),
            *([("not on a GPU", self._why_cpu)] if self._why_cpu else []),
        ]

    def _kept(self) -> list[tuple[str, str]]:
        kept, n = self.plan.experts_in_memory, self.plan.experts
        if self.device != "cpu" and self.plan.experts_on_gpu < n:
            return [("on the GPU", f"{self.plan.experts_on_gpu:,} of {n:,} routed experts; the "
                                   "others lie in host memory, where the CPU computes them")]
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


def _trace_of(rest: "list[Trace | None]", model: Model, name: str) -> "Trace | None":
    """The trace of a segment, if it has one."""
    if not rest or rest[0] is None:
        return None
    from dsv4.trace import checked

    return checked(rest[0], model, name)
