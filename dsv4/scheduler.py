# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: many sequences in one step, each coming and going on its own.

Any thread may put work into the queue.  One thread at a time drives: it admits what has a place,
puts one token of every sequence that decodes and a bounded piece of prompt into one step of the
engine, and hands out what came of it.  Threads that wait for a result take turns driving, so there
is no thread of the scheduler's own: Ctrl-C acts inside a step, and nothing runs unasked.

- A step takes as many tokens as one pass of the engine: a long prompt holds the others up for one
  pass at most.
- Higher priority first, then first come, first served; every eighth place goes to who has waited
  longest, whatever the priority.
- At most `concurrency` sequences are live, and their states stay within `memory` bytes, counted
  with the tokens they may still produce (4,096 where that is not limited).
- Sequences whose prompts begin alike share that beginning: one computes it, the others wait and
  continue from a fork (`dsv4.prefixes`).
- A step that fails is tried again in halves: the sequence that is to blame ends with the error,
  the others do not notice.

None of this changes a bit of any answer.  Source: DESIGN 3, 6.
"""

import heapq
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeAlias

from dsv4.answer import Answer, Completion, Event, Segment
from dsv4.errors import NonFiniteLogitsError
from dsv4.memory import available_memory, state_bytes
from dsv4.model import Model
from dsv4.prefixes import LEAST, Prefixes, common

MOST_LIVE = 256
USUAL_LIVE = 64
# tokens of an answer that memory is set aside for where their number has no limit
USUAL_ANSWER = 4096
# of the memory for states, the share of kept beginnings
KEPT_SHARE = 4
# each so-manieth place goes to who has waited longest
FAIR_TURN = 8
MOST_CUTS = 4
# seconds after which a thread that waits looks again
TICK = 0.05
# what one sequence can be to blame for
ROW_ERRORS = (NonFiniteLogitsError, MemoryError, OSError, ValueError)


class Handle:
    """One sequence in the queue of a `Scheduler`.

    Attributes
    ----------
    answer : Answer
    priority : int
    done : bool
        It has ended, in whatever way.
    """

    def __init__(
        self, scheduler: "Scheduler", answer: Answer, priority: int, place: int,
        on_event: Callable[[Event], object] | None,
    ) -> None:
        self.answer = answer
        self.priority = priority
        self.on_event = on_event
        self.done = False
        self.cancelled = False
        self.place = place
        self.need = 0  # bytes its state may grow to
        self.seen = self.n_events = 0  # events made since it began, and handed out
        self.waits: tuple[Handle, int] | None = None  # until that one has so much of its prompt
        self._scheduler = scheduler

    def __lt__(self, other: "Handle") -> bool:
        return (-self.priority, self.place) < (-other.priority, other.place)

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the answer, driving the scheduler where nobody else does.

        Raises
        ------
        TimeoutError
            It is not there after `timeout` seconds; the work goes on at the next call.
        Exception
            What went wrong with this sequence.
        """
        self._scheduler.wait(self, timeout)
        if self.answer.error is not None:
            raise self.answer.error
        return self.answer.completion()

    def cancel(self) -> bool:
        """End it before the next step; False if it has ended already.

        The result is then what there is, with finish_reason "cancelled".
        """
        if self.done:
            return False
        self.cancelled = True
        return True


Result: TypeAlias = tuple[Handle, list[Event]]


class Scheduler:
    """A queue of sequences and the loop that steps them together.

    Parameters
    ----------
    model : Model
    concurrency : int, optional
        Most live sequences; by default what fits beside the weights, at most 64.
    memory : int, optional
        Most bytes for their states; by default what is free beside the weights.
    share_prefixes : bool
        Keep beginnings of prompts that others share.
    isolate : bool
        An error ends the sequence that caused it; else it is raised by the call that drives.

    Examples
    --------
    >>> import dsv4
    >>> with dsv4.load() as model, dsv4.Scheduler(model) as scheduler:
    ...     first = scheduler.submit("ROMEO:", max_new_tokens=4, seed=1)
    ...     second = scheduler.submit("JULIET:", max_new_tokens=4, priority=1)
    ...     first.result().tokens == model.generate("ROMEO:", max_new_tokens=4, seed=1).tokens
    True
    """

    def __init__(
        self, model: Model, *, concurrency: int | None = None, memory: int | None = None,
        share_prefixes: bool = True, isolate: bool = True,
    ) -> None:
        self.model = model
        self.memory = room_for_states(model) if memory is None else memory
        self.concurrency = check_concurrency(concurrency) or usual_concurrency(model, self.memory)
        self.isolate = isolate
        kept = self.memory // KEPT_SHARE if share_prefixes else 0
        self._prefixes = Prefixes(kept) if share_prefixes else None
        self._room = self.memory - kept
        # prompt tokens stepped and taken over from forks, tokens sampled, steps
        self.counts = dict(prompt=0, shared=0, sampled=0, steps=0)
        self._lock = threading.RLock()  # guards the next five
        self._changed = threading.Condition(self._lock)
        self._waiting: list[Handle] = []  # a heap
        self._n_put = self._n_admitted = 0
        self._driver: int | None = None
        self._closed = False
        self._live: list[Handle] = []  # who drives alone changes it

    # ---- the queue: any thread ----

    def submit(
        self, prompt: Any, *, priority: int = 0, on_event: Callable[[Event], object] | None = None,
        **arguments: Any,
    ) -> Handle:
        """Put a prompt into the queue.

        Parameters
        ----------
        prompt : str, messages or ids
        priority : int
            Higher goes first.
        on_event : callable, optional
            Called with each `Event`, in the thread that drives; an exception in it ends this
            sequence.  The one that Ctrl-C interrupts may come again.
        **arguments
            As for `dsv4.generate.generate`, with n = 1.

        Raises
        ------
        ValueError, TypeError
            Something in the arguments is out of range or unknown.
        """
        from dsv4.generate import form_of, prepared

        form, parameters = form_of(arguments)
        answers = prepared(self.model, prompt, parameters, form)
        if len(answers) > 1:
            raise ValueError(f"n: got {len(answers)}, wanted 1: submit each choice alone")
        return self.put(answers[0], priority, on_event)

    def put(
        self, answer: Answer, priority: int = 0,
        on_event: Callable[[Event], object] | None = None,
    ) -> Handle:
        """Put a prepared answer into the queue."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the scheduler is closed")
            self._n_put += 1
            handle = Handle(self, answer, priority, self._n_put, on_event)
            heapq.heappush(self._waiting, handle)
            self._changed.notify_all()
        return handle

    @property
    def waiting(self) -> int:
        """Sequences that have no place yet."""
        return len(self._waiting)

    @property
    def live(self) -> int:
        """Sequences that have one."""
        return len(self._live)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._live)

    def wait(self, handle: Handle, timeout: float | None = None) -> None:
        """Until a sequence has ended: drive, or wait for the thread that drives."""
        end = None if timeout is None else time.monotonic() + timeout
        while not handle.done:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"no answer after {timeout} seconds")
            self._drive(self._round, left, handle)

    def round(self) -> list[Result]:
        """Make one step; what it gave to each sequence that took part or ended."""
        results = None
        while results is None:
            results = self._drive(self._round)
        return results

    def close(self) -> None:
        """End all that is not done, and give the memory back; twice is no error."""
        while self._drive(self._end_all) is None:
            pass

    def __enter__(self) -> "Scheduler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _drive(
        self, work: Callable[[], list[Result]], timeout: float | None = None,
        handle: Handle | None = None,
    ) -> list[Result] | None:
        """Do it as the one who drives; None: waited for another thread, look again."""
        mine = False
        try:
            with self._lock:
                if self._driver == threading.get_ident():
                    raise RuntimeError("the scheduler is at work: on_event cannot wait for it")
                if self._driver is not None:
                    self._changed.wait(TICK if timeout is None else min(timeout, TICK))
                if self._driver is not None or (handle is not None and handle.done):
                    return None
                mine = True
                self._driver = threading.get_ident()
            return work()
        finally:
            if mine:
                self._driver = None  # at once: the rest may be interrupted
                with self._lock:
                    self._changed.notify_all()

    # ---- a round: who drives ----

    def _round(self) -> list[Result]:
        results = self._admit()
        chosen = list(self._compose(results))
        return results + self._step(chosen) if chosen else results

    def _admit(self) -> list[Result]:
        """Drop what was cancelled, and give free places away."""
        ended: list[Result] = []
        for handle in list(self._live):
            if handle.cancelled or handle.done or handle.answer.finish is not None:
                self._end(handle)
                ended.append((handle, []))
        while len(self._live) < self.concurrency:
            with self._lock:
                following = self._next()
            if following is None:
                break
            if following.cancelled:
                self._end(following)
                ended.append((following, []))
        return ended

    def _next(self) -> Handle | None:
        """Who gets the next place, if the memory is there."""
        if not self._waiting:
            return None
        handle = self._waiting[0]
        if self._n_admitted % FAIR_TURN == FAIR_TURN - 1:
            handle = min(self._waiting, key=lambda h: h.place)
        if handle not in self._live:  # an interrupt may have come before it left the queue
            answer = handle.answer
            tokens = len(answer.prompt) + min(answer.limit, USUAL_ANSWER)
            handle.need = sum(state_bytes(self.model.config, tokens).values())
            if self._live and not handle.cancelled:
                if sum(h.need for h in self._live) + handle.need > self._room:
                    return None
            self._live.append(handle)
            self._n_admitted += 1
        if handle is self._waiting[0]:
            heapq.heappop(self._waiting)
        else:
            self._waiting.remove(handle)
            heapq.heapify(self._waiting)
        return handle

    def _compose(self, failed: list[Result]) -> Iterator[tuple[Handle, Segment]]:
        """The segments of the next step: who decodes, then prompts while there is room."""
        room = self.model._core.chunk
        reading: list[Handle] = []
        for handle in self._live:
            if handle.answer.session is not None and handle.answer.decoding:
                room -= 1
                yield handle, handle.answer.segment(1)
            else:
                reading.append(handle)
        for handle in self._without_waiting(reading):
            answer = handle.answer
            if room < 1:
                return
            try:
                if answer.session is None:
                    self._begin(answer)
            except ROW_ERRORS as error:
                if not self.isolate or self.model.closed:
                    raise
                failed.append(self._fail(handle, error))
                continue
            segment = answer.segment(room)
            room -= answer.feeding
            yield handle, segment

    # ---- beginnings ----

    def _without_waiting(self, reading: list[Handle]) -> list[Handle]:
        """Those who do not wait for another one to compute what they begin with."""
        going: list[Handle] = []
        for handle in reading:
            if self._prefixes is None or not handle.answer.sharable:
                going.append(handle)
                continue
            if handle.answer.session is None:
                other, cut = handle.waits or (handle, 0)
                if other.done or other.answer.fed >= cut:
                    handle.waits = self._worth_waiting(handle.answer, self._prefixes, going)
                if handle.waits is not None:
                    continue
            going.append(handle)
        return going

    def _worth_waiting(
        self, answer: Answer, kept: Prefixes, going: list[Handle]
    ) -> tuple[Handle, int] | None:
        """Who will soon have read more of what `answer` begins with than is kept."""
        has = kept.length(answer.prompt)
        for other in going:
            if not other.answer.sharable:
                continue
            end = min(common(answer.prompt, other.answer.prompt), len(answer.prompt) - 1)
            _cut(other.answer, end, max(has, other.answer.fed))
            cuts = [c for c in other.answer.cuts if max(has, other.answer.fed) < c <= end]
            if cuts:
                return other, max(cuts)
        return None

    def _begin(self, answer: Answer) -> None:
        """Give a sequence its session: the longest beginning that is kept, or an empty one."""
        fork = None
        if self._prefixes is not None and answer.sharable:
            fork = self._prefixes.longest(answer.model, answer.prompt)
            has = 0 if fork is None else fork.position
            with self._lock:
                others = [h.answer.prompt for h in self._waiting if h.answer.sharable]
            ends = [common(answer.prompt, ids) for ids in others]
            for end in sorted(ends + self._prefixes.shared(answer.prompt)):
                _cut(answer, end, has)
            self.counts["shared"] += has
        answer.begin(fork)

    def _keep(self, answer: Answer) -> None:
        """Keep the state after a piece of a prompt that others may begin with."""
        if self._prefixes is None or not answer.sharable or answer.session is None:
            return
        if answer.fed == len(answer.prompt) or answer.fed in answer.cuts:
            self._prefixes.keep(answer.prompt[: answer.fed], answer.session)

    # ---- the step and what came of it ----

    def _step(self, chosen: list[tuple[Handle, Segment]]) -> list[Result]:
        try:
            results = self.model._core.step([segment for _, segment in chosen], None)
        except Exception as error:
            self._undo(chosen)
            # an edit's callback may raise anything
            of_a_row = isinstance(error, ROW_ERRORS) or any(h.answer.edit for h, _ in chosen)
            if not of_a_row or not self.isolate or self.model.closed:
                raise
            if len(chosen) == 1:
                return [self._fail(chosen[0][0], error)]
            told = []
            for half in (chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]):
                told += self._step([(h, h.answer.segment(h.answer.feeding)) for h, _ in half])
            return told
        except BaseException:
            self._undo(chosen)
            raise
        self.counts["steps"] += 1
        try:
            return [self._take(handle, *result)
                    for (handle, _), result in zip(chosen, results, strict=True)]
        except BaseException:
            self._undo(chosen)
            raise

    def _undo(self, chosen: list[tuple[Handle, Segment]]) -> None:
        """As before a step that did not come to its end; who has taken it keeps it."""
        for handle, _ in chosen:
            if not handle.done:
                handle.answer.undo()
                if handle.answer.session is None:
                    handle.seen = 0

    def _take(self, handle: Handle, logits: Any, sample: Any) -> Result:
        answer = handle.answer
        reading = not answer.decoding
        try:
            events = answer.take(logits, sample)
            if handle.on_event is not None:
                for event in self._new(handle, events):
                    handle.on_event(event)
        except Exception as error:
            if not self.isolate:
                raise
            return self._fail(handle, error)
        answer.fed += answer.feeding  # the step is taken
        self.counts["prompt"] += answer.feeding * reading
        self.counts["sampled"] += answer.decoding
        if reading:
            with suppress(MemoryError):
                self._keep(answer)
        if answer.finish is not None:
            self._end(handle)
        return handle, events

    def _new(self, handle: Handle, events: list[Event]) -> Iterator[Event]:
        """Events that were not handed out before the answer had to begin again."""
        for event in events:
            handle.seen += 1
            if handle.seen > handle.n_events:
                yield event
                handle.n_events += 1

    def _fail(self, handle: Handle, error: Exception) -> Result:
        handle.answer.error = error
        self._end(handle)
        return handle, []

    def _end(self, handle: Handle) -> None:
        handle.done = True
        if handle in self._live:
            self._live.remove(handle)
        handle.answer.end()

    def _end_all(self) -> list[Result]:
        with self._lock:
            self._closed = True
            handles = [*self._live, *self._waiting]
            self._waiting.clear()
        for handle in handles:
            self._end(handle)
        if self._prefixes is not None:
            self._prefixes.close()
        return []


def _cut(answer: Answer, end: int, has: int) -> None:
    """Let a step of a prompt end at `end`, if that is far enough from what is there and cut."""
    end = min(end, len(answer.prompt) - 1)
    near = any(abs(end - cut) < LEAST for cut in answer.cuts)
    if end >= has + LEAST and not near and len(answer.cuts) < MOST_CUTS:
        answer.cuts.append(end)


def check_concurrency(value: object) -> int | None:
    """How many sequences at once, or None; ValueError or TypeError if it is out of range."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"concurrency: got {type(value).__name__}, wanted an int or None")
    if not 1 <= value <= MOST_LIVE:
        raise ValueError(f"concurrency: got {value}, wanted 1 to {MOST_LIVE}")
    return value


def room_for_states(model: Model) -> int:
    """Bytes for the states of sequences: what was allowed or is free, beside the weights."""
    plan = model.plan
    if plan.memory is not None:
        return max(plan.state_bytes, plan.memory - plan.resident + plan.state_bytes)
    return max(plan.state_bytes, available_memory() - plan.weight_bytes - plan.workspace)


def usual_concurrency(model: Model, memory: int) -> int:
    """How many sequences of the usual length fit, at most 64."""
    return max(1, min(USUAL_LIVE, memory // (2 * sum(model.plan.state.values()))))
