# SPDX-License-Identifier: Apache-2.0
"""Generation: prompts in, answers out, whole or as a stream.

One round of the loop is one step of the engine for all sequences of the call: forward pass,
sampling and the check of stop ids run there; this module turns tokens into text between two
rounds, so a closed stream ends the work there, and Ctrl-C inside a step too.  More sequences than
`MAX_LIVE` wait for a place; what an answer is does not depend on its neighbours.
Source: DESIGN 6, 7; SPEC 7.
"""

import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np

from dsv4 import _core
from dsv4.completion import CompletionSplitter, ThinkingMode, check_thinking_mode
from dsv4.encoding import encode_messages
from dsv4.model import Float32, Int32, Model, Session
from dsv4.sampling import Sampling
from dsv4.tokenizer import StopMatcher, StreamDecoder

MAX_LIVE = 16
# tokens of a prompt whose logits come out at once: 66 MB with the published vocabulary
LOGPROBS_PIECE = 128
FINISH: dict[int, Literal["stop", "length"]] = {1: "stop", 2: "length"}
WANT_NONE, WANT_LAST, WANT_ALL = 0, 1, 2


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
    finish_reason : "stop", "length" or "cancelled"
        Ended by the model or a stop string; by max_new_tokens or the context; by the caller.
    usage : dict
        prompt_tokens, completion_tokens, total_tokens.
    timings : dict
        Seconds: prompt_s until the first token, decode_s from there; and tokens_per_s of decode.
    seed : int
        Gives the same tokens again.
    index : int
        Which answer of the call.
    """

    text: str
    reasoning: str
    tool_calls: list[dict[str, Any]]
    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    prompt_logprobs: list[TokenLogprob | None] | None
    finish_reason: Literal["stop", "length", "cancelled"]
    usage: dict[str, int]
    timings: dict[str, float]
    seed: int
    index: int = 0

    def __str__(self) -> str:
        return self.text

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for json."""
        def plain(rows: Sequence[TokenLogprob | None] | None) -> list[Any] | None:
            return None if rows is None else [row and row._asdict() for row in rows]

        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {
            "logprobs": plain(self.logprobs), "prompt_logprobs": plain(self.prompt_logprobs)}


class Stream(Generator[Event, None, None]):
    """The events of one call, as they come; made by `stream`.

    Closing it (``close()``, leaving a ``with`` block, or dropping it) ends the work and frees its
    sessions.  Ctrl-C inside a step does too.

    Examples
    --------
    >>> import dsv4
    >>> with dsv4.load() as model, model.stream("ROMEO:", max_new_tokens=8) as events:
    ...     for event in events:
    ...         break
    ...     events.close()
    ...     events.completions[0].finish_reason
    'cancelled'
    """

    def __init__(self, answers: "list[_Answer]", events: Generator[Event, None, None]) -> None:
        self._answers = answers
        self._events = events

    @property
    def completions(self) -> list[Completion]:
        """What there is of every answer so far; "cancelled" is one that did not end."""
        return [answer.completion() for answer in self._answers]

    def send(self, value: None, /) -> Event:
        """The next event."""
        return self._events.send(value)

    def throw(self, *args: Any) -> Event:
        """Raise an exception where the stream waits."""
        return self._events.throw(*args)

    def close(self) -> None:
        """End the work; twice is no error."""
        self._events.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def generate(
    model: Model, prompt: Any, *, sampling: Sampling | None = None, special: bool = False,
    thinking_mode: ThinkingMode = "chat", reasoning_effort: str | None = None,
    drop_thinking: bool = True, version: Literal["v4", "0731"] | None = None,
    session: Session | None = None, **parameters: Any,
) -> Completion | list[Completion]:
    """Generate whole answers.

    Parameters
    ----------
    model : Model
    prompt : str, messages, ids, or a list of prompts
        A str is raw text: begin-of-sentence is put first at position 0, there is no template.  A
        list of dicts is a conversation for `encode_messages`.  A sequence of ints is used as it
        is.  A list of any of these gives a list of answers, in order, computed together.
    sampling : Sampling, optional
        The sampling parameters; or give them by name (`dsv4.Sampling` lists them).  What is not
        given comes from the checkpoint's generation_config.json.
    special : bool
        Markers in a str prompt become their ids; else they are text like any other.
    thinking_mode, reasoning_effort, drop_thinking, version
        For messages, see `encode_messages`; version is that of the checkpoint by default.
    session : Session, optional
        Continue this session: the prompt is appended to it, then every token of the answer but
        the last.  One prompt, one answer.
    **parameters
        Sampling parameters by name or alias.

    Returns
    -------
    Completion, or a list of them
        A list for a list of prompts and for n > 1: all answers to the first prompt, then those
        to the second.

    Raises
    ------
    ValueError, TypeError
        Something in the arguments is out of range or unknown; before any work.
    EncodingError
        A message is not what the format allows.
    NonFiniteLogitsError
        The weights gave NaN or infinite logits.
    KeyboardInterrupt
        Ctrl-C; a session given stays at its last committed token.

    Notes
    -----
    ``logits_processor(logits, tokens)`` is called for every token of every answer with float32
    [vocab] and all tokens before, int32 [n]; it changes the logits in place or returns others.
    Log-probabilities are then those of the changed logits.  Stop strings end the answer's text,
    not its reasoning.  Without max_new_tokens an answer ends with its sentence, or the context.

    Examples
    --------
    >>> import dsv4
    >>> with dsv4.load() as model:
    ...     one = model.generate("ROMEO:", max_new_tokens=4, temperature=0)
    ...     two = model.generate(["ROMEO:", "JULIET:"], max_new_tokens=4, temperature=0)
    ...     two[0].tokens == one.tokens
    True
    """
    work = _Work(model, prompt, sampling, session, parameters, special, thinking_mode,
                 reasoning_effort, drop_thinking, version)
    with Stream(work.answers, work.run()) as events:
        for _ in events:
            pass
        completions = events.completions
    return completions if work.several else completions[0]


def stream(
    model: Model, prompt: Any, *, sampling: Sampling | None = None, special: bool = False,
    thinking_mode: ThinkingMode = "chat", reasoning_effort: str | None = None,
    drop_thinking: bool = True, version: Literal["v4", "0731"] | None = None,
    session: Session | None = None, **parameters: Any,
) -> Stream:
    """Like `generate`, but piece by piece.

    The arguments are checked in this call; the work is done while the stream is read.

    Returns
    -------
    Stream
        An iterator of `Event`.  Its `completions` are what there is of the answers.

    Examples
    --------
    >>> import dsv4
    >>> with dsv4.load() as model:
    ...     sum(len(e.tokens) for e in model.stream("ROMEO:", max_new_tokens=6, seed=2))
    6
    """
    work = _Work(model, prompt, sampling, session, parameters, special, thinking_mode,
                 reasoning_effort, drop_thinking, version)
    return Stream(work.answers, work.run())


class _Work:
    """The answers of one call: arguments checked, nothing computed yet."""

    def __init__(
        self, model: Model, prompt: Any, sampling: Sampling | None, session: Session | None,
        parameters: dict[str, Any], special: bool, thinking_mode: ThinkingMode,
        reasoning_effort: str | None, drop_thinking: bool, version: Literal["v4", "0731"] | None,
    ) -> None:
        self.model = model
        if sampling is None:
            sampling = Sampling.build(model.generation_config, **parameters)
        elif parameters or not isinstance(sampling, Sampling):
            raise TypeError(
                "sampling: wanted a Sampling and no parameters beside it; "
                f"got {type(sampling).__name__} and {', '.join(parameters) or 'none'}")
        sampling.check_vocab(model.config.vocab_size)
        if sampling.stop:
            model.text_tokenizer("stop")
        check_thinking_mode(thinking_mode)
        several = _is_list_of_prompts(prompt)
        prompts = list(prompt) if several else [prompt]
        self.several = several or sampling.n > 1
        self.session = session
        if session is not None:
            if not isinstance(session, Session):
                raise TypeError(f"session: got {type(session).__name__}, wanted a Session or None")
            if session.model is not model:
                raise ValueError("session: got one of another model, wanted one of this model")
            if self.several:
                raise ValueError("session: got one session for several answers, wanted one answer")
        start = 0 if session is None else session.position
        before = [] if session is None else session.tokens.tolist()
        self.answers: list[_Answer] = []
        for i, one in enumerate(prompts):
            name = f"prompt[{i}]" if several else "prompt"
            chat: ThinkingMode | None = None
            if _is_messages(one):
                chat = thinking_mode
                text = encode_messages(
                    one, thinking_mode, drop_thinking, start == 0, reasoning_effort,
                    version or model.version)
                ids = model.ids(text, name, bos=False, special=True)
            else:
                ids = model.ids(one, name, bos=start == 0, special=special)
            room = _room(model, start, len(ids), name)
            for choice in range(sampling.n):
                self.answers.append(_Answer(
                    model, sampling, len(self.answers), choice, ids, before, room, chat))

    def run(self) -> Generator[Event, None, None]:
        """Step until every answer has ended."""
        waiting = deque(self.answers)
        live: list[_Answer] = []
        try:
            while waiting or live:
                while waiting and len(live) < MAX_LIVE:
                    answer = waiting.popleft()
                    answer.begin(self.session)
                    live.append(answer)
                yield from _round(self.model, live)
                for answer in [a for a in live if a.finish is not None]:
                    live.remove(answer)
                    answer.end()
        finally:
            for answer in live:
                answer.end()


def _round(model: Model, live: "list[_Answer]") -> Iterator[Event]:
    """One step for all live sequences, and what it makes visible."""
    results = model._core.step([answer.segment() for answer in live], None)
    events: list[Event] = []
    for answer, (logits, sample) in zip(live, results, strict=True):
        events += answer.take(logits, sample)
    yield from events


def _room(model: Model, start: int, n: int, name: str) -> int:
    """How many tokens can follow the prompt; ValueError if none."""
    context = model.config.max_position_embeddings
    room = context - start - n
    if room < 1:
        raise ValueError(
            f"{name}: got {n} tokens at position {start}, wanted at most {context - start - 1}: "
            f"the context of this model is {context}, and an answer needs one")
    return room


def _is_messages(prompt: Any) -> bool:
    return (
        isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes | bytearray)
        and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    )


def _is_list_of_prompts(prompt: Any) -> bool:
    if not isinstance(prompt, list | tuple) or not prompt:
        return False
    return isinstance(prompt[0], str | list | tuple | np.ndarray)


@dataclass(slots=True)
class _Visible:
    """What an answer shows."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


class _Answer:
    """One sequence: its session and sampler, its tokens, and the text they have become."""

    def __init__(
        self, model: Model, sampling: Sampling, index: int, choice: int, ids: Int32,
        before: list[int], room: int, chat: ThinkingMode | None,
    ) -> None:
        self.model = model
        self.sampling = sampling
        self.index = index
        self.choice = choice
        self.prompt = ids
        self.before = before
        self.limit = min(room, sampling.max_new_tokens or room)
        self.chat = chat
        self.finish: Literal["stop", "length"] | None = None
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if sampling.logprobs is None else []
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.visible = _Visible()
        self.shown = 0  # tokens that events have told of
        self.fed = 0  # tokens of prompt and answer that the session has
        self.started = self.first = self.last = 0.0

    # ---- running ----

    def begin(self, session: Session | None) -> None:
        """Take a session and a sampler; the first step comes next."""
        sampling, tokenizer = self.sampling, self.model.tokenizer
        self.started = time.perf_counter()
        self.owned = session is None
        self.session = self.model.session(checkpoints=0) if session is None else session
        vocab = self.model.config.vocab_size
        self.sampler = _core.Sampler(
            vocab, sampling.native() | {
                "max_new_tokens": self.limit, "choice": self.choice,
                "min_new_tokens": min(sampling.min_new_tokens, self.limit)})
        self.sampler.seen(self.before, True)
        self.sampler.seen(self.prompt, True)
        if sampling.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self.decoder = None if tokenizer is None else StreamDecoder(tokenizer, skip_special=True)
        self.splitter = None if self.chat is None else CompletionSplitter(self.chat)
        self.matcher = StopMatcher(sampling.stop)

    def end(self) -> None:
        """Give the session back."""
        if self.owned:
            self.session.close()

    def segment(self) -> "tuple[_core.Session, Any, int, _core.Sampler | None]":
        """What the next step does for this sequence."""
        edited = self.sampling.logits_processor is not None
        if self.fed >= len(self.prompt):
            ids: Any = self.tokens[self.fed - len(self.prompt) :]
        elif self.prompt_logprobs is None:
            ids = self.prompt
        else:  # logits of all rows come out: in pieces, to bound their memory
            ids = self.prompt[self.fed : self.fed + LOGPROBS_PIECE]
        self.fed += len(ids)
        done = self.fed >= len(self.prompt)
        wants_all = self.prompt_logprobs is not None and self.fed <= len(self.prompt)
        want = WANT_ALL if wants_all else WANT_LAST if edited and done else WANT_NONE
        return self.session._core, ids, want, self.sampler if done and not edited else None

    def take(self, logits: Float32 | None, sample: "_core._Sample | None") -> list[Event]:
        """What a step gave: log-probabilities of the prompt, a token."""
        if self.prompt_logprobs is not None and not self.tokens and logits is not None:
            self._take_prompt(logits)
        if self.fed < len(self.prompt):
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
        assert self.sampling.logits_processor is not None
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
            finish_reason=self.finish or "cancelled",
            usage=dict(prompt_tokens=n, completion_tokens=m, total_tokens=n + m),
            timings=dict(
                prompt_s=max(0.0, self.first - self.started), decode_s=decode,
                tokens_per_s=(m - 1) / decode if decode > 0 else 0.0),
            seed=self.sampling.seed, index=self.index,
        )
