# SPDX-License-Identifier: Apache-2.0
"""Generation: prompts in, answers out, whole or as a stream.

The arguments become answers (`dsv4.answer`), and the scheduler (`dsv4.scheduler`) steps them
together: between two steps a closed stream ends the work, and Ctrl-C inside a step too.  More
sequences than `MAX_LIVE` wait for a place.  Source: DESIGN 6, 7; SPEC 7.
"""

from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dsv4.answer import Answer, Completion, Event
from dsv4.completion import ThinkingMode, check_thinking_mode
from dsv4.edit_base import Edit, checked
from dsv4.encoding import encode_messages
from dsv4.model import Model
from dsv4.sampling import Sampling
from dsv4.scheduler import Scheduler
from dsv4.session import Session

if TYPE_CHECKING:
    from dsv4.trace import Trace

MAX_LIVE = 16
# arguments of a prompt, beside those of the sampling
FORM = (
    "special", "thinking_mode", "reasoning_effort", "drop_thinking", "version", "edit", "trace",
)


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

    def __init__(self, answers: "list[Answer]", events: Generator[Event, None, None]) -> None:
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
    session: Session | None = None, edit: Edit | None = None, trace: Any = None, **parameters: Any,
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
    edit : Edit, optional
        What is changed inside the model for these answers (`dsv4.edit`); a session given has its
        own.
    trace : Trace or dict, optional
        Copy internals meanwhile: a `Trace`, or its arguments, which make one for each answer; it is
        the completion's `trace`.
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
                 reasoning_effort, drop_thinking, version, edit, trace)
    with Stream(work.answers, events_of(model, work.answers)) as events:
        for _ in events:
            pass
        completions = events.completions
    return completions if work.several else completions[0]


def stream(
    model: Model, prompt: Any, *, sampling: Sampling | None = None, special: bool = False,
    thinking_mode: ThinkingMode = "chat", reasoning_effort: str | None = None,
    drop_thinking: bool = True, version: Literal["v4", "0731"] | None = None,
    session: Session | None = None, edit: Edit | None = None, trace: Any = None, **parameters: Any,
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
                 reasoning_effort, drop_thinking, version, edit, trace)
    return Stream(work.answers, events_of(model, work.answers))


class _Work:
    """The answers of one call: arguments checked, nothing computed yet."""

    def __init__(
        self, model: Model, prompt: Any, sampling: Sampling | None, session: Session | None,
        parameters: dict[str, Any], *form: Any,
    ) -> None:
        self.model = model
        sampling = checked_sampling(model, sampling, parameters)
        several = _is_list_of_prompts(prompt)
        self.several = several or sampling.n > 1
        if session is not None:
            if not isinstance(session, Session):
                raise TypeError(f"session: got {type(session).__name__}, wanted a Session or None")
            if session.model is not model:
                raise ValueError("session: got one of another model, wanted one of this model")
            if self.several:
                raise ValueError("session: got one session for several answers, wanted one answer")
            if form[FORM.index("edit")] is not None:
                raise ValueError("edit: got one beside a session, which has its own; wanted None, "
                                 "or session.fork(edit=...)")
        prompts = list(prompt) if several else [prompt]
        self.answers: list[Answer] = []
        for i, one in enumerate(prompts):
            name = f"prompt[{i}]" if several else "prompt"
            self.answers += answers(model, one, sampling, session, *form, name=name,
                                    index=len(self.answers))
        traces = [answer.trace for answer in self.answers if answer.trace is not None]
        if len({id(trace) for trace in traces}) < len(traces):
            raise ValueError("trace: got one for several prompts, wanted a dict of its arguments: "
                             "each answer has a trace of its own")



def events_of(model: Model, answers: "list[Answer]") -> Generator[Event, None, None]:
    """Step until every answer has ended."""
    with Scheduler(model, concurrency=MAX_LIVE, share_prefixes=False, isolate=False) as scheduler:
        for answer in answers:
            scheduler.put(answer)
        while scheduler.busy:
            for _, events in scheduler.round():
                yield from events


def checked_sampling(
    model: Model, sampling: Sampling | None, parameters: Mapping[str, Any]
) -> Sampling:
    """The parameters of a call: an object, or names; fit for this model."""
    if sampling is None:
        sampling = Sampling.build(model.generation_config, **parameters)
    elif parameters or not isinstance(sampling, Sampling):
        raise TypeError(
            "sampling: wanted a Sampling and no parameters beside it; "
            f"got {type(sampling).__name__} and {', '.join(parameters) or 'none'}")
    sampling.check_vocab(model.config.vocab_size)
    if sampling.stop:
        model.text_tokenizer("stop")
    return sampling


def form_of(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments by name in two: how the prompt is read, and how tokens are chosen."""
    form = {name: arguments[name] for name in FORM if name in arguments}
    return form, {name: value for name, value in arguments.items() if name not in FORM}


def prepared(
    model: Model, prompt: Any, parameters: Mapping[str, Any], form: Mapping[str, Any],
    index: int = 0, name: str = "prompt",
) -> list[Answer]:
    """The answers to one prompt, from arguments by name; all of them with the same index."""
    rest = dict(parameters)
    sampling = checked_sampling(model, rest.pop("sampling", None), rest)
    return answers(model, prompt, sampling, **form, name=name, index=index, same_index=True)


def answers(
    model: Model, prompt: Any, sampling: Sampling, session: Session | None = None,
    special: bool = False, thinking_mode: ThinkingMode = "chat",
    reasoning_effort: str | None = None, drop_thinking: bool = True,
    version: Literal["v4", "0731"] | None = None, edit: Edit | None = None, trace: Any = None, *,
    name: str = "prompt", index: int = 0, same_index: bool = False,
) -> list[Answer]:
    """The `n` answers to one prompt, with nothing computed yet."""
    checked(edit).check(model.config)
    check_thinking_mode(thinking_mode)
    start = 0 if session is None else session.position
    chat: ThinkingMode | None = None
    if _is_messages(prompt):
        chat = thinking_mode
        text = encode_messages(
            prompt, thinking_mode, drop_thinking, start == 0, reasoning_effort,
            version or model.version)
        ids = model.ids(text, name, bos=False, special=True)
    else:
        ids = model.ids(prompt, name, bos=start == 0, special=special)
    room = _room(model, start, len(ids), name)
    traces = _traces(model, trace, sampling, start, len(ids))
    return [
        Answer(model, sampling, index if same_index else index + choice, choice, ids, room, chat,
                session, edit, traces[choice])
        for choice in range(sampling.n)
    ]


def _traces(
    model: Model, trace: Any, sampling: Sampling, start: int, n: int
) -> "Sequence[Trace | None]":
    """A trace for each of the answers to a prompt of n tokens, with room for it and for as many
    tokens as were asked for."""
    if trace is None:
        return [None] * sampling.n
    from dsv4.trace import Trace, requested

    if sampling.n > 1 and (isinstance(trace, Trace) or (
            isinstance(trace, Mapping) and "out" in trace)):
        raise ValueError(f"trace: got one for {sampling.n} answers, wanted a dict of its arguments "
                         "without out: each answer has a trace of its own")
    traces = [requested(trace, model) for _ in range(sampling.n)]
    for each in traces:
        each.check_room(start, n + (sampling.max_new_tokens or 0))
    return traces


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
