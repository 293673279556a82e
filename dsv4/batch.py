# SPDX-License-Identifier: Apache-2.0
"""Many prompts, a few at a time: `Model.batch` and `Model.abatch`.

Prompts are read as places become free, answers come in the order of the prompts or as they are
ready.  The scheduler (`dsv4.scheduler`) does the work, in the thread that reads the answers.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sized
from typing import Any, TypeAlias

from dsv4.answer import Completion, failure
from dsv4.generate import checked_sampling, form_of, prepared
from dsv4.model import Model
from dsv4.progress import bar
from dsv4.sampling import Sampling, by_our_names
from dsv4.scheduler import Handle, Scheduler

# rows read ahead of the oldest that has no answer yet; in places
MOST_AHEAD = 64
# what an iterator of prompts gives when the next one is not there yet
NOT_YET = object()
POLL_SECONDS = 0.1
Answered: TypeAlias = Completion | list[Completion]


def batch(
    model: Model, prompts: Iterable[Any], *, concurrency: int | None = None, ordered: bool = True,
    share_prefixes: bool = True, progress: bool | None = None, memory: int | None = None,
    **arguments: Any,
) -> "Iterator[Any]":
    """Answer many prompts, `concurrency` of them at a time.

    Parameters
    ----------
    model : Model
    prompts : iterable
        Each a str, messages or ids as in `dsv4.generate.generate`, or a pair of that and a dict of
        arguments for this row alone (or a `dsv4.Sampling`).  Read as it is needed; it may be
        endless.
    concurrency : int, optional
        Sequences in one step, 1 to 256; by default what fits beside the weights, at most 64.
    ordered : bool
        Answers come in the order of the prompts; else as they are ready, with their index.
    share_prefixes : bool
        Prompts that begin alike share that work: see `dsv4.scheduler`.
    progress : bool, optional
        A bar on standard error; by default on a terminal.
    memory : int, optional
        Most bytes for the states of the sequences; what is free beside the weights by default.
    **arguments
        Sampling parameters and how prompts are read, as for `generate`; a row's own come first.

    Returns
    -------
    iterator of Completion, or of (index, Completion)
        A list of completions for a row with n > 1.  A row that fails is a completion with
        finish_reason "error" and the exception in `error`.

    Raises
    ------
    ValueError, TypeError
        Something in the arguments is out of range or unknown; in this call, before any work.

    Notes
    -----
    A row's tokens and log-probabilities are the same bits as those of `generate` with the same
    prompt and seed, whatever `concurrency`, order and neighbours are.  Without a seed one is drawn
    for the whole batch.  Closing the iterator ends the work.

    Examples
    --------
    >>> import dsv4
    >>> with dsv4.load() as model:
    ...     answers = model.batch(["ROMEO:", "JULIET:"], max_new_tokens=4, seed=1)
    ...     [len(answer.tokens) for answer in answers]
    [4, 4]
    """
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts: got {type(prompts).__name__}, wanted an iterable of prompts")
    total = len(prompts) if isinstance(prompts, Sized) else None
    work = _Batch(model, concurrency, ordered, share_prefixes, progress, memory, arguments, total)
    return _answers(work, iter(prompts))


def _answers(work: "_Batch", prompts: Iterator[Any]) -> Iterator[Any]:
    with work:
        while True:
            while work.hungry:
                try:
                    prompt = next(prompts)
                except StopIteration:
                    work.ended = True
                    break
                if prompt is NOT_YET:
                    break
                work.feed(prompt)
            yield from work.ready()
            if work.idle:
                return
            if work.scheduler.busy:
                work.scheduler.round()
            elif not work.rows:
                time.sleep(POLL_SECONDS)


def abatch(
    model: Model, prompts: Iterable[Any] | AsyncIterable[Any], *, concurrency: int | None = None,
    ordered: bool = True, share_prefixes: bool = True, progress: bool | None = None,
    memory: int | None = None, **arguments: Any,
) -> "AsyncIterator[Any]":
    """Like `batch`, for ``async for``: steps run in a thread, and prompts may come from an
    asynchronous iterator, which is read while steps go on.

    Examples
    --------
    >>> import asyncio
    >>> import dsv4
    >>> async def texts(model):
    ...     return [a.usage["completion_tokens"]
    ...             async for a in model.abatch(["ROMEO:", "JULIET:"], max_new_tokens=4)]
    >>> with dsv4.load() as model:
    ...     asyncio.run(texts(model))
    [4, 4]
    """
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(
            prompts, Iterable | AsyncIterable):
        raise TypeError(f"prompts: got {type(prompts).__name__}, wanted an iterable of prompts")
    total = len(prompts) if isinstance(prompts, Sized) else None
    work = _Batch(model, concurrency, ordered, share_prefixes, progress, memory, arguments, total)
    return _async_answers(work, aiter(prompts) if isinstance(prompts, AsyncIterable)
                          else _as_async(prompts))


async def _as_async(prompts: Iterable[Any]) -> AsyncIterator[Any]:
    for prompt in prompts:
        yield prompt


async def _async_answers(work: "_Batch", prompts: AsyncIterator[Any]) -> AsyncIterator[Any]:
    pull: asyncio.Future[Any] | None = None
    step: asyncio.Future[Any] | None = None
    try:
        while True:
            while work.hungry:
                pull = pull or asyncio.ensure_future(anext(prompts))
                await asyncio.wait({pull}, timeout=0 if work.scheduler.busy else None)
                if not pull.done():
                    break
                try:
                    work.feed(pull.result())
                except StopAsyncIteration:
                    work.ended = True
                pull = None
            for answer in work.ready():
                yield answer
            if work.idle:
                return
            step = asyncio.ensure_future(asyncio.to_thread(work.scheduler.round))
            await asyncio.shield(step)
    finally:
        if pull is not None:
            pull.cancel()
        if step is not None:  # a cancelled task leaves its step running; it ends soon
            await asyncio.wait({step})
        work.close()


class _Row:
    """One prompt: its answers in the making, or what was wrong with it."""

    def __init__(self, index: int, handles: list[Handle], error: Completion | None) -> None:
        self.index = index
        self.handles = handles
        self.error = error

    @property
    def done(self) -> bool:
        return all(handle.done for handle in self.handles)

    def answer(self) -> Answered:
        if self.error is not None:
            return self.error
        completions = [handle.answer.completion() for handle in self.handles]
        return completions if len(completions) > 1 else completions[0]


class _Batch:
    """The rows of one call on their way through the scheduler."""

    def __init__(
        self, model: Model, concurrency: int | None, ordered: bool, share_prefixes: bool,
        progress: bool | None, memory: int | None, arguments: dict[str, Any], total: int | None,
    ) -> None:
        self.model = model
        self.ordered = ordered
        self.form, parameters = form_of(arguments)
        if "session" in parameters:
            raise TypeError("session: a batch has sessions of its own")
        if not isinstance(self.form.get("trace", {}), Mapping | None):
            raise TypeError("trace: got one for all prompts, wanted a dict of its arguments, or a "
                            "Trace in the arguments of a prompt")
        sampling = parameters.pop("sampling", None)
        self.sampling = checked_sampling(model, sampling, parameters)
        # None: rows may not add to an object, only replace it
        self.parameters = None if sampling is not None else by_our_names(parameters) | {
            "seed": self.sampling.seed}
        self.scheduler = Scheduler(
            model, concurrency=concurrency, memory=memory, share_prefixes=share_prefixes)
        self.ended = False
        self.n_read = 0
        self.rows: deque[_Row] = deque()
        self.bar = _Bar(total, progress)

    def __enter__(self) -> "_Batch":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.scheduler.close()
        self.bar.close()

    @property
    def hungry(self) -> bool:
        """Whether the next prompt should be read."""
        places = self.scheduler.concurrency
        return (not self.ended and self.scheduler.waiting < places
                and len(self.rows) < MOST_AHEAD * places)

    @property
    def idle(self) -> bool:
        return self.ended and not self.rows

    def feed(self, item: Any) -> None:
        """Put a row into the queue; what is wrong with it becomes its answer."""
        index = self.n_read
        self.n_read += 1
        try:
            prompt, sampling, form = self._row(item)
            answers = prepared(self.model, prompt, sampling, form, index)
        except Exception as error:
            self.rows.append(_Row(index, [], failure(error, index=index)))
            return
        self.rows.append(_Row(index, [self.scheduler.put(a) for a in answers], None))

    def _row(self, item: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """The prompt of a row, its sampling and how it is read."""
        own: Any = {}
        if (isinstance(item, tuple) and len(item) == 2 and not isinstance(item[0], Mapping)
                and isinstance(item[1], Mapping | Sampling)):
            item, own = item
        if isinstance(own, Sampling):
            return item, {"sampling": own}, self.form
        form, parameters = form_of(own)
        if self.parameters is not None:
            parameters = self.parameters | by_our_names(parameters)
        elif not parameters:
            parameters = {"sampling": self.sampling}
        return item, parameters, self.form | form

    def ready(self) -> list[Any]:
        """The rows that may be handed out now."""
        rows: list[_Row] = []
        if self.ordered:
            while self.rows and self.rows[0].done:
                rows.append(self.rows.popleft())
        else:
            rows = [row for row in self.rows if row.done]
            if rows:
                self.rows = deque(row for row in self.rows if not row.done)
        self.bar.show(self.n_read - sum(not row.done for row in self.rows),
                      self.scheduler.counts["sampled"])
        return [row.answer() if self.ordered else (row.index, row.answer()) for row in rows]


class _Bar:
    """Rows done, tokens a second, and the time left where the number of rows is known."""

    def __init__(self, total: int | None, wanted: bool | None) -> None:
        self.bar = None if wanted is False else bar(
            desc="batch", unit="row", total=total, delay=0.5)
        self.started = time.monotonic()

    def show(self, rows: int, tokens: int) -> None:
        if self.bar is not None:
            seconds = max(time.monotonic() - self.started, 1e-3)
            self.bar.set_postfix_str(f"{tokens / seconds:.1f} tokens/s", refresh=False)
            self.bar.update(rows - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
