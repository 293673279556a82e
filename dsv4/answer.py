# SPDX-License-Identifier: Apache-2.0
"""One answer: its session and sampler, its tokens, and the text they become.

The scheduler decides when an answer takes part in a step of the engine; what it gives to the step
and what it makes of the result is here.  What an answer is does not depend on its neighbours, nor
on how its prompt is cut.  Source: DESIGN 7; SPEC 7.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from dsv4 import _core
from dsv4.arrays import Float32, Int32
from dsv4.completion import CompletionSplitter, ThinkingMode
from dsv4.edit_base import Edit
from dsv4.model import Model
from dsv4.sampling import Sampling
from dsv4.session import Session
from dsv4.tokenizer import StopMatcher, StreamDecoder

if TYPE_CHECKING:
    from dsv4.trace import Trace

# tokens of a prompt whose logits come out at once: 66 MB with the published vocabulary
LOGPROBS_PIECE = 128
FINISH: dict[int, Literal["stop", "length"]] = {1: "stop", 2: "length"}
WANT_NONE, WANT_LAST, WANT_ALL = 0, 1, 2

Segment = tuple[_core.Session, Any, int, _core.Sampler | None, Any, int]


class TokenLogprob(NamedTuple):
    """A token, the log-probability the model gave it, and the best alternatives.

    Attributes
    ----------
    token : int
    logprob : float
    top : tuple of (int, float)
        Id and log-probability, best first; as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Event:
    """A piece of an answer.

    Attributes
    ----------
    kind : "text", "reasoning" or "tool_call"
    text : str
        Whole characters; never part of a marker or of a stop string.  Empty for a tool call.
    tokens : tuple of int
        The tokens since the event before.  All events of an answer have all its tokens.
    logprobs : tuple of TokenLogprob or None
        One for each token, if they were asked for.
    index : int
        Which answer of the call: 0, 1, ... for several prompts or n > 1.
    tool_call : dict or None
        ``{"type": "function", "function": {"name": str, "arguments": JSON text}}``.
    """

    kind: Literal["text", "reasoning", "tool_call"]
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    index: int = 0
    tool_call: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """An answer; ``str()`` is its text.

    Attributes
    ----------
    text : str
        The answer, without reasoning, markers and stop string.
    reasoning : str
        What the model thought before, in thinking mode.
    tool_calls : list of dict
        ``{"type": "function", "function": {"name": str, "arguments": JSON text}}``.
    tokens : list of int
        Every token the model produced, an end-of-sentence included.
    logprobs : list of TokenLogprob or None
        One for each token, if they were asked for.
    prompt_logprobs : list of (TokenLogprob or None) or None
        One for each token of the prompt, if they were asked for; None for the first, which
        nothing predicts.
    finish_reason : "stop", "length", "cancelled" or "error"
        Ended by the model or a stop string; by max_new_tokens or the context; by the caller; by
        what `error` says.
    usage : dict
        prompt_tokens, completion_tokens, total_tokens.
    timings : dict
        Seconds: prompt_s until the first token, decode_s from there; and tokens_per_s of decode.
    seed : int
        Gives the same tokens again.
    index : int
        Which answer of the call; of a batch, which row.
    error : Exception or None
        What went wrong with this row of a batch; the other rows know nothing of it.
    trace : Trace or None
        What was copied while it was made, if that was asked for: of the prompt, and of every token
        of the answer but the last, which the model has not read.
    """

    text: str
    reasoning: str
    tool_calls: list[dict[str, Any]]
    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    prompt_logprobs: list[TokenLogprob | None] | None
    finish_reason: Literal["stop", "length", "cancelled", "error"]
    usage: dict[str, int]
    timings: dict[str, float]
    seed: int
    index: int = 0
    error: Exception | None = None
    trace: "Trace | None" = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.text

    def as_dict(self) -> dict[str, Any]:
        """All fields but the trace, ready for json."""
        def plain(rows: Sequence[TokenLogprob | None] | None) -> list[Any] | None:
            return None if rows is None else [row and row._asdict() for row in rows]

        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trace"}
        return values | {
            "logprobs": plain(self.logprobs), "prompt_logprobs": plain(self.prompt_logprobs),
            "error": None if self.error is None else told(self.error)}


def failure(error: Exception, seed: int = 0, index: int = 0) -> Completion:
    """The result of a row that came to nothing."""
    return Completion(
        text="", reasoning="", tool_calls=[], tokens=[], logprobs=None, prompt_logprobs=None,
        finish_reason="error", usage=dict(prompt_tokens=0, completion_tokens=0, total_tokens=0),
        timings=dict(prompt_s=0.0, decode_s=0.0, tokens_per_s=0.0), seed=seed, index=index,
        error=error)


def told(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@dataclass(slots=True)
class _Visible:
    """What an answer shows."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


class Answer:
    """One sequence: its session and sampler, its tokens, and the text they have become.

    Parameters
    ----------
    index, choice : int
        Which answer of the call, and which of the `n` to its prompt.
    ids : int32 [n]
        The prompt.
    room : int
        Tokens the context has left after it.
    chat : ThinkingMode or None
        How to read the answer to messages; None: it is plain text.
    session : Session or None
        The session to continue; None: one of its own.
    edit : Edit or None
        Of a session of its own.
    trace : Trace or None
        Copies internals of its steps.
    """

    def __init__(
        self, model: Model, sampling: Sampling, index: int, choice: int, ids: Int32, room: int,
        chat: ThinkingMode | None, session: Session | None = None, edit: Edit | None = None,
        trace: "Trace | None" = None,
    ) -> None:
        self.model = model
        self.sampling = sampling
        self.index = index
        self.choice = choice
        self.prompt = ids
        self.given = session
        self.edit = edit
        self.trace = trace
        self.limit = min(room, sampling.max_new_tokens or room)
        self.chat = chat
        self.error: Exception | None = None
        self.session: Session | None = None
        self._reset()

    def _reset(self) -> None:
        self.finish: Literal["stop", "length"] | None = None
        self.tokens: list[int] = []
        wanted = self.sampling.logprobs is not None
        self.logprobs: list[TokenLogprob] | None = [] if wanted else None
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.visible = _Visible()
        self.shown = 0  # tokens that events have told of
        self.traced: Any = ()  # ids of the step, for the trace
        self.fed = self.feeding = 0  # tokens of prompt and answer: the session has, the step adds
        self.cuts: list[int] = []  # positions of the prompt at which a step must end
        self.stale = False  # its sampler may know of a token that was not taken
        self.started = self.first = self.last = 0.0

    # ---- running ----

    def begin(self, fork: Session | None = None) -> None:
        """Take a session and a sampler; the first step comes next.

        `fork` has the first tokens of the prompt already.
        """
        sampling, tokenizer = self.sampling, self.model.tokenizer
        self.started = time.perf_counter()
        self.before = [] if self.given is None else self.given.tokens.tolist()
        self.fed = 0 if fork is None else fork.position
        self.take_sampler()
        if sampling.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self.decoder = None if tokenizer is None else StreamDecoder(tokenizer, skip_special=True)
        self.splitter = None if self.chat is None else CompletionSplitter(self.chat)
        self.matcher = StopMatcher(sampling.stop)
        self.session = self.given or fork or self.model.session(edit=self.edit, checkpoints=0)

    def take_sampler(self) -> None:
        """A sampler that has seen what there is so far; again after a step that failed."""
        sampling, self.stale = self.sampling, False
        self.sampler = _core.Sampler(
            self.model.config.vocab_size, sampling.native() | {
                "max_new_tokens": self.limit, "choice": self.choice,
                "min_new_tokens": min(sampling.min_new_tokens, self.limit)})
        self.sampler.seen(self.before, True)
        self.sampler.seen(self.prompt, True)
        if self.tokens:
            self.sampler.seen(self.tokens, False)

    def end(self) -> None:
        """Give the session back; a trace made for this answer is complete."""
        self._give_back()
        if self.trace is not None and self.trace.one_answer:
            self.trace.close()

    def _give_back(self) -> None:
        if self.session is not None and self.given is None:
            self.session.close()

    def undo(self) -> None:
        """Forget a step that was interrupted, wherever it was: what comes is the same again."""
        if self.session is None or self.given is not None:
            return
        if self.session.position == self.fed:
            self.stale = True
        else:  # the session moved on, and what came of it was not taken
            self._give_back()
            self.session = None
            self._reset()
            if self.trace is not None:
                self.trace.forget()

    @property
    def decoding(self) -> bool:
        """The prompt is done: each step adds one token."""
        return self.fed >= len(self.prompt)

    @property
    def sharable(self) -> bool:
        """Its prompt may begin with a fork: it has a session of its own without an edit, and nobody
        asked for the log-probabilities of the prompt, nor for a trace of it."""
        return (self.given is None and not self.edit and self.sampling.prompt_logprobs is None
                and self.trace is None)

    def segment(self, most: int) -> Segment:
        """What the next step does for this sequence: at most `most` tokens of a prompt.

        A session given by the caller takes its prompt whole: it ends before or after it.
        """
        assert self.session is not None
        if self.stale:
            self.take_sampler()
        n = len(self.prompt)
        if self.decoding:
            ids: Any = self.tokens[self.fed - n :]
        else:
            end = n if self.given is not None else min(n, self.fed + most)
            if self.prompt_logprobs is not None or (self.trace and self.trace.rows_wanted):
                end = min(end, self.fed + LOGPROBS_PIECE)  # logits of all rows: bound their memory
            end = min([end, *(cut for cut in self.cuts if cut > self.fed)])
            ids = self.prompt[self.fed : end]
        self.feeding = len(ids)
        fed = self.fed + self.feeding
        edited = self.sampling.logits_processor is not None
        wants_all = self.prompt_logprobs is not None and fed <= n
        want = WANT_ALL if wants_all else WANT_LAST if edited and fed >= n else WANT_NONE
        sampler = self.sampler if fed >= n and not edited else None
        taps, prompt = None, int(not self.decoding)
        if self.trace is not None:
            self.traced = ids
            taps = self.trace.begin(self.session.position, len(ids))
            want = self.trace.want(want)
        return self.session._core, ids, want, sampler, taps, prompt

    def take(self, logits: Float32 | None, sample: "_core._Sample | None") -> list[Event]:
        """What a step gave: log-probabilities of the prompt, a token.  `fed` stays behind until
        the events are handed out: then the step is taken."""
        if self.trace is not None:
            self.trace.take(self.traced, logits)
        if self.prompt_logprobs is not None and not self.tokens and logits is not None:
            self._take_prompt(logits)
        if self.fed + self.feeding < len(self.prompt):
            return []
        if sample is None:
            assert logits is not None
            sample = self._sample_edited(logits[-1])
        token, logprob, finish, top = sample
        now = time.perf_counter()
        self.first = self.first or now
        self.last = now
        self.tokens.append(token)
        if self.logprobs is not None:
            self.logprobs.append(TokenLogprob(token, logprob, tuple(top)))
        self.finish = FINISH.get(finish)
        return self._show(token)

    def _take_prompt(self, logits: Float32) -> None:
        assert self.prompt_logprobs is not None and self.sampling.prompt_logprobs is not None
        first = len(self.prompt_logprobs)
        following = self.prompt[first : first + len(logits)]
        rows = _core.logprobs(logits[: len(following)], following, self.sampling.prompt_logprobs)
        for token, (logprob, top) in zip(following.tolist(), rows, strict=True):
            self.prompt_logprobs.append(TokenLogprob(token, logprob, tuple(top)))

    def _sample_edited(self, logits: Float32) -> "_core._Sample":
        assert self.sampling.logits_processor is not None and self.session is not None
        position = self.session.position
        edited = self.sampling.logits_processor(logits, self.session.tokens)
        if edited is None:
            edited = logits
        edited = np.asarray(edited)
        if edited.dtype.kind != "f" or edited.shape != logits.shape:
            raise ValueError(
                f"logits_processor: returned {edited.dtype} {edited.shape}, wanted floats of "
                f"shape {logits.shape}, or None for changes in place")
        return self.sampler.sample(np.ascontiguousarray(edited, np.float32), position)

    # ---- text ----

    def _show(self, token: int) -> list[Event]:
        events: list[Event] = []
        if self.decoder is None:
            self._event(events, "text", "")
            return events
        if self.finish != "stop":
            self._feed(events, self.decoder.feed([token]))
        if self.finish is not None:
            self._flush(events)
        return events

    def _feed(self, events: list[Event], text: str) -> None:
        """Text as it was decoded: split, then cut at stop strings."""
        if self.splitter is None:
            self._match(events, text)
            return
        for part in self.splitter.feed(text) if text else ():
            self._part(events, part.kind, part.text, part.tool_call)

    def _part(
        self, events: list[Event], kind: Literal["text", "reasoning", "tool_call"], text: str,
        tool_call: dict[str, Any] | None,
    ) -> None:
        if self.matcher.matched is not None:
            return
        if kind == "text":
            self._match(events, text)
            return
        if kind == "tool_call":
            self._event(events, "text", self.matcher.flush())
        self._event(events, kind, text, tool_call)

    def _match(self, events: list[Event], text: str) -> None:
        if len(self.tokens) > self.sampling.min_new_tokens:
            text, stopped = self.matcher.feed(text)
            if stopped:
                self.finish = "stop"
        self._event(events, "text", text)

    def _flush(self, events: list[Event]) -> None:
        """The end: show what was held back, and tell of the last tokens."""
        if self.matcher.matched is None:
            assert self.decoder is not None
            self._feed(events, self.decoder.flush())
        if self.splitter is not None:
            for part in self.splitter.flush():
                self._part(events, part.kind, part.text, part.tool_call)
        if self.matcher.matched is None:
            self._event(events, "text", self.matcher.flush())
        if self.shown < len(self.tokens):
            self._event(events, "text", "", rest=True)

    def _event(
        self, events: list[Event], kind: Literal["text", "reasoning", "tool_call"], text: str,
        tool_call: dict[str, Any] | None = None, rest: bool = False,
    ) -> None:
        if not text and tool_call is None and not rest and self.decoder is not None:
            return
        if tool_call is not None:
            self.visible.tool_calls.append(tool_call)
        else:
            (self.visible.reasoning if kind == "reasoning" else self.visible.text).append(text)
        new = slice(self.shown, None)
        logprobs = None if self.logprobs is None else tuple(self.logprobs[new])
        events.append(
            Event(kind, text, tuple(self.tokens[new]), logprobs, self.index, tool_call))
        self.shown = len(self.tokens)

    def completion(self) -> Completion:
        """What there is of the answer."""
        assert self.sampling.seed is not None
        n, m = len(self.prompt), len(self.tokens)
        decode = self.last - self.first
        return Completion(
            text="".join(self.visible.text), reasoning="".join(self.visible.reasoning),
            tool_calls=list(self.visible.tool_calls), tokens=list(self.tokens),
            logprobs=None if self.logprobs is None else list(self.logprobs),
            prompt_logprobs=None if self.prompt_logprobs is None else list(self.prompt_logprobs),
            finish_reason="error" if self.error is not None else self.finish or "cancelled",
            usage=dict(prompt_tokens=n, completion_tokens=m, total_tokens=n + m),
            timings=dict(
                prompt_s=max(0.0, self.first - self.started), decode_s=decode,
                tokens_per_s=(m - 1) / decode if decode > 0 else 0.0),
            seed=self.sampling.seed, index=self.index, error=self.error, trace=self.trace,
        )
