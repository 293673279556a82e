# SPDX-License-Identifier: Apache-2.0
"""Batches and the scheduler: the same bits in any company, shares, limits, order, faults."""

import asyncio
import itertools
import math
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsv4
from dsv4 import batch as batch_module
from dsv4.batch import _Batch
from dsv4.prefixes import Prefixes, common

CHUNK = 40
NAN_ID = 77


def told(answer: dsv4.Completion) -> tuple[Any, ...]:
    """What must not depend on anything but the row."""
    return (answer.text, answer.tokens, answer.logprobs, answer.prompt_logprobs,
            answer.finish_reason, answer.usage, answer.seed)


def ids_of(n: int, seed: int) -> list[int]:
    ids = np.random.default_rng(seed).integers(2, 500, n)
    ids[ids == NAN_ID] = 1
    return [int(i) for i in ids]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of each segment of every step."""
    sizes: list[list[int]] = []
    step = dsv4.Scheduler._step

    def watched(self: dsv4.Scheduler, chosen: Any) -> Any:
        sizes.append([len(segment[1]) for _, segment in chosen])
        return step(self, chosen)

    monkeypatch.setattr(dsv4.Scheduler, "_step", watched)
    return sizes


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    """Prompts of many lengths, some alike at the beginning, with sampling of their own."""
    start = ids_of(70, 1)
    prompts = [[*start[: 10 * (i % 8)], *ids_of(3 + 5 * (i % 7), 10 + i)] for i in range(24)]
    own: list[dict[str, Any]] = [
        {}, {"seed": 9, "frequency_penalty": 1.5}, {"temperature": 0, "logprobs": 2},
        {"prompt_logprobs": 1, "max_new_tokens": 3}, {"top_k": 5, "stop_token_ids": [3, 4, 5]}]
    ban = {"logit_bias": {NAN_ID: -math.inf}}
    return [(prompt, ban | own[i % len(own)]) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def alone(small: dsv4.Model, rows: list[Any]) -> list[Any]:
    answers = [small.generate(prompt, **{"max_new_tokens": 9, "seed": 5, **own})
               for prompt, own in rows]
    return [told(answer) for answer in answers if isinstance(answer, dsv4.Completion)]


# ---- the same bits ----

@pytest.mark.parametrize(("concurrency", "share"), [(1, True), (3, True), (16, False), (16, True)])
def test_rows_are_what_they_are_alone(
    small: dsv4.Model, rows: list[Any], alone: list[Any], concurrency: int, share: bool
) -> None:
    order = list(range(len(rows)))
    random.Random(concurrency).shuffle(order)
    answers = small.batch((rows[i] for i in order), concurrency=concurrency,
                          share_prefixes=share, max_new_tokens=9, seed=5)
    for i, place, answer in zip(order, itertools.count(), answers, strict=False):
        assert told(answer) == alone[i] and answer.index == place and answer.error is None
    assert place == len(rows) - 1


def test_one_prompt_many_times_on_any_threads(model: dsv4.Model) -> None:
    """A thousand times."""
    options: dict[str, Any] = dict(max_new_tokens=3, seed=11, logprobs=1)
    wanted = told(one(model.generate("ROMEO:", **options)))
    for threads, concurrency in ((1, 64), (2, 5), (4, 64), (8, 64)):
        with dsv4.load(threads=threads) as loaded:
            answers = loaded.batch(["ROMEO:"] * 250, concurrency=concurrency, **options)
            assert [told(a) == wanted for a in answers] == [True] * 250


def one(answer: Any) -> dsv4.Completion:
    assert isinstance(answer, dsv4.Completion)
    return answer


def test_as_they_are_ready(small: dsv4.Model) -> None:
    rows = [([0, i], {"max_new_tokens": n}) for i, n in enumerate((30, 2, 9, 1, 4))]
    found = list(small.batch(rows, ordered=False, seed=1, ignore_eos=True))
    assert [i for i, _ in found] == [3, 1, 4, 2, 0]
    assert all(answer.index == i for i, answer in found)
    assert [a.index for a in small.batch(rows, seed=1, ignore_eos=True)] == [0, 1, 2, 3, 4]


def test_messages_and_several_answers(model: dsv4.Model) -> None:
    messages = [{"role": "user", "content": "Is it so?"}]
    options: dict[str, Any] = dict(max_new_tokens=5, seed=2)
    rows = [messages, ("ROMEO:", {"n": 3}), (messages, {"thinking_mode": "thinking"}),
            ("a", dsv4.Sampling(max_new_tokens=2, seed=8))]
    got = list(model.batch(rows, **options))
    assert told(got[0]) == told(one(model.generate(messages, **options)))
    three = model.generate("ROMEO:", n=3, **options)
    assert isinstance(three, list) and [told(a) for a in got[1]] == [told(a) for a in three]
    assert told(got[2]) == told(one(model.generate(messages, thinking_mode="thinking", **options)))
    assert len(got[3].tokens) == 2 and got[3].seed == 8
    (only,) = model.batch(["a"], sampling=dsv4.Sampling(max_new_tokens=3, seed=4))
    assert len(only.tokens) == 3 and only.seed == 4


def test_endless_prompts_are_read_as_needed(small: dsv4.Model) -> None:
    read = itertools.count()
    answers = small.batch(([0, next(read) % 50] for _ in itertools.count()), concurrency=4,
                          max_new_tokens=2)
    for _ in range(10):
        next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert next(read) < 10 + 3 * 4


# ---- steps ----

def test_a_long_prompt_stalls_nobody(small: dsv4.Model, steps: list[list[int]]) -> None:
    with dsv4.Scheduler(small) as scheduler:
        running = [scheduler.submit([0, i], max_new_tokens=150, ignore_eos=True) for i in range(5)]
        for _ in range(3):
            scheduler.round()
        steps.clear()
        late = scheduler.submit(ids_of(4096, 3), max_new_tokens=3, ignore_eos=True)
        late.result()
        assert not any(handle.done for handle in running)
        assert all(sum(sizes) <= CHUNK for sizes in steps)
        # everyone decodes in every step, and the prompt takes all the room they leave
        assert all(sizes[:5] == [1] * 5 for sizes in steps)
        assert [sizes[5] for sizes in steps] == [CHUNK - 5] * 117 + [4096 - 117 * 35, 1, 1]
        assert [len(h.result().tokens) for h in running] == [150] * 5


def test_places_are_filled_at_once(small: dsv4.Model, steps: list[list[int]]) -> None:
    lengths = [random.Random(i).randint(1, 12) for i in range(40)]
    rows = [([0, i], {"max_new_tokens": n}) for i, n in enumerate(lengths)]
    assert len(list(small.batch(rows, concurrency=8, ignore_eos=True))) == 40
    waiting = sum(lengths) - sum(map(len, steps)) // 1
    assert waiting == 0  # one token a segment: no segment was for nothing
    full = [sizes for sizes in steps if len(sizes) == 8]
    assert len(full) >= (sum(lengths) - 8 * 12) // 8


def test_concurrency_and_memory_bound_what_is_live(small: dsv4.Model) -> None:
    assert dsv4.Scheduler(small).concurrency == 64
    for limits, most in ((dict(concurrency=3), 3), (dict(memory=1), 1)):
        seen = []
        with dsv4.Scheduler(small, **limits) as scheduler:
            handles = [scheduler.submit([0, i], max_new_tokens=3) for i in range(9)]
            while scheduler.busy:
                scheduler.round()
                seen.append(scheduler.live)
            assert max(seen) <= most and all(h.done and h.answer.tokens for h in handles)


# ---- beginnings that rows share ----

def test_shared_beginnings_are_computed_once(small: dsv4.Model, steps: list[list[int]]) -> None:
    start = ids_of(150, 4)
    rows = [[*start, *ids_of(5, 100 + i)] for i in range(20)]
    answers = list(small.batch(rows, concurrency=8, max_new_tokens=1, seed=1))
    assert sum(map(sum, steps)) == 150 + 20 * 5
    steps.clear()
    again = list(small.batch(rows, concurrency=8, max_new_tokens=1, seed=1, share_prefixes=False))
    assert sum(map(sum, steps)) == 20 * 155
    assert [told(a) for a in answers] == [told(a) for a in again]
    steps.clear()
    small.generate(rows, max_new_tokens=1, seed=1)
    assert sum(map(sum, steps)) == 20 * 155


def test_choices_and_conversations_share(small: dsv4.Model, steps: list[list[int]]) -> None:
    prompt = ids_of(90, 5)
    list(small.batch([(prompt, {"n": 4})], max_new_tokens=1))
    assert sum(map(sum, steps)) == 89 + 4
    steps.clear()
    turns = [prompt, [*prompt, *ids_of(40, 6)], [*prompt, *ids_of(40, 6), *ids_of(33, 7)]]
    list(small.batch(turns, concurrency=1, max_new_tokens=1))
    assert sum(map(sum, steps)) == 90 + 40 + 33


def test_kept_states_stay_within_their_budget(small: dsv4.Model) -> None:
    session = small.session()
    session.append(ids_of(60, 1))
    each = session.nbytes + 4 * 60
    kept = Prefixes(3 * each)
    for i in range(5):
        kept.keep(np.array(ids_of(60, 20 + i), np.int32), session)
        assert kept.nbytes <= 3 * each
    assert len(kept) == 3
    query = np.array([*ids_of(60, 22), 7], np.int32)
    fork = kept.longest(small, query)  # the oldest: now it is the newest
    assert fork is not None and fork.position == 60
    kept.keep(np.array(ids_of(60, 30), np.int32), session)
    assert kept.longest(small, query) is not None
    assert kept.longest(small, np.array([*ids_of(60, 23), 7], np.int32)) is None
    assert kept.longest(small, query[:60]) is None  # nothing would be left to compute
    other = [*ids_of(79, 31), 7]  # longer, and ends as the query does
    kept.keep(np.array(other, np.int32), session)
    longer = np.array([*query, *ids_of(18, 32), 7, 8], np.int32)
    assert longer[79] == 7 and kept.length(longer) == 60
    kept.close()
    assert len(kept) == kept.nbytes == 0
    small_budget = Prefixes(each - 1)
    small_budget.keep(query[:60], session)
    assert len(small_budget) == 0


def test_common() -> None:
    def ids(*values: int) -> Any:
        return np.array(values, np.int32)

    assert common(ids(1, 2, 3), ids(1, 2, 4)) == 2
    assert common(ids(1, 2), ids(1, 2, 4)) == common(ids(1, 2, 4), ids(1, 2)) == 2
    assert common(ids(5), ids(1)) == common(ids(), ids(1)) == 0


# ---- the queue ----

def admitted(scheduler: dsv4.Scheduler, handles: list[dsv4.Handle]) -> list[int]:
    """In which order they are done, one place after the other."""
    order = []
    while scheduler.busy:
        order += [handles.index(handle) for handle, _ in scheduler.round() if handle.done]
    return order


def test_priorities_and_first_come_first_served(small: dsv4.Model) -> None:
    with dsv4.Scheduler(small, concurrency=1) as scheduler:
        handles = [scheduler.submit([0, i], priority=p, max_new_tokens=1)
                   for i, p in enumerate((0, 0, 5, -1, 5))]
        assert admitted(scheduler, handles) == [2, 4, 0, 1, 3]


def test_low_priority_does_not_starve(small: dsv4.Model) -> None:
    with dsv4.Scheduler(small, concurrency=1) as scheduler:
        low = scheduler.submit([0, 1], max_new_tokens=1, priority=-9)
        handles = [scheduler.submit([0, i], max_new_tokens=1, priority=3) for i in range(20)]
        order = admitted(scheduler, [low, *handles])
        assert order.index(0) == 7 and len(order) == 21


def test_cancelling(small: dsv4.Model) -> None:
    with dsv4.Scheduler(small, concurrency=2) as scheduler:
        handles = [scheduler.submit([0, i], max_new_tokens=8, seed=1, ignore_eos=True)
                   for i in range(4)]
        scheduler.round()
        scheduler.round()
        assert handles[0].cancel() and handles[2].cancel()
        last = handles[3].result()
        assert handles[0].result().finish_reason == "cancelled"
        assert len(handles[0].result().tokens) == 2 and handles[2].result().tokens == []
        assert told(last) == told(one(small.generate(
            [0, 3], max_new_tokens=8, seed=1, ignore_eos=True)))
        assert not handles[3].cancel()
    assert handles[1].done


def test_events_and_their_errors(model: dsv4.Model) -> None:
    with dsv4.Scheduler(model) as scheduler:
        text: list[str] = []
        good = scheduler.submit("ROMEO:", max_new_tokens=9, seed=1,
                                on_event=lambda event: text.append(event.text))
        bad = scheduler.submit("ROMEO:", max_new_tokens=9, seed=1,
                               on_event=lambda event: good.result())
        assert good.result().text == "".join(text)
        with pytest.raises(RuntimeError, match="on_event cannot wait"):
            bad.result()


def test_waiting_has_a_limit(small: dsv4.Model) -> None:
    with dsv4.Scheduler(small) as scheduler:
        handle = scheduler.submit([0], max_new_tokens=100000, ignore_eos=True)
        with pytest.raises(TimeoutError, match="no answer after 0.05 seconds"):
            handle.result(timeout=0.05)
        assert not handle.done
    assert handle.done and handle.result().finish_reason == "cancelled"
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.submit([0])


def test_eight_threads_submit(small: dsv4.Model) -> None:
    wanted = {i: told(one(small.generate([0, i], max_new_tokens=6, seed=i))) for i in range(48)}
    errors: list[str] = []
    with dsv4.Scheduler(small, concurrency=5) as scheduler:

        def work(start: int) -> None:
            mine = range(start, 48, 8)
            handles = [scheduler.submit([0, i], max_new_tokens=6, seed=i) for i in mine]
            for i, handle in zip(mine, handles, strict=True):
                if told(handle.result(timeout=60)) != wanted[i]:
                    errors.append(f"row {i}")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert not errors


# ---- faults ----

def test_an_error_stays_in_its_row(
    poisoned: dsv4.Model, rows: list[Any], alone: list[Any]
) -> None:
    def broken(logits: Any, tokens: Any) -> None:
        raise ZeroDivisionError("mine")

    faulty: dict[int, tuple[Any, type[Exception], str]] = {
        2: ([0, NAN_ID], dsv4.NonFiniteLogitsError, "NaN"),
        5: ([], ValueError, "no tokens"),
        6: ([1, 2, 10**6], ValueError, "1000000"),
        9: (([0, 1], {"logits_processor": broken}), ZeroDivisionError, "mine"),
        12: ([*ids_of(90, 1), NAN_ID], dsv4.NonFiniteLogitsError, "NaN"),
        13: (([0, 1], {"top_q": 1}), TypeError, "top_p"),
        20: ("text", ValueError, "tokenizer"),
    }
    mixed, places = [], []
    for i in range(len(rows) + len(faulty)):
        if i in faulty:
            mixed.append(faulty[i][0])
        else:
            places.append(i)
            mixed.append(rows[len(places) - 1])
    answers = list(poisoned.batch(mixed, concurrency=16, max_new_tokens=9, seed=5))
    for i, (_, kind, says) in faulty.items():
        assert answers[i].finish_reason == "error" and answers[i].index == i
        assert type(answers[i].error) is kind and says in str(answers[i].error)
        assert answers[i].as_dict()["error"].startswith(kind.__name__)
    assert [told(answers[i]) for i in places] == alone


def test_a_failing_step_counts_no_token(poisoned: dsv4.Model) -> None:
    """Rows whose token was sampled before another row of the step turned out to be bad."""
    options: dict[str, Any] = dict(seed=3, max_new_tokens=5, frequency_penalty=1.0,
                                   ignore_eos=True, logit_bias={NAN_ID: -math.inf})
    good = [[i] for i in range(2, 40)]
    wanted = [told(one(poisoned.generate(ids, **options))) for ids in good]
    answers = list(poisoned.batch([*good, [3, NAN_ID]], concurrency=64, **options))
    assert [told(a) for a in answers[:-1]] == wanted
    assert isinstance(answers[-1].error, dsv4.NonFiniteLogitsError)


def test_too_little_memory_is_one_rows_error(
    small: dsv4.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = dsv4.Model.session, itertools.count()

    def scarce(self: dsv4.Model, **options: Any) -> dsv4.Session:
        if next(made) == 1:
            raise MemoryError("no memory for a session")
        return make(self, **options)

    monkeypatch.setattr(dsv4.Model, "session", scarce)
    answers = list(small.batch([[0, 1], [0, 2], [0, 3]], max_new_tokens=2))
    assert [type(a.error) for a in answers] == [type(None), MemoryError, type(None)]


def test_a_closed_model_ends_the_batch(nano: Callable[[str], Path]) -> None:
    with dsv4.load(nano("nano-flash"), threads=1) as loaded:
        answers = loaded.batch(([0, i] for i in range(50)), concurrency=2, max_new_tokens=3)
        next(answers)
        loaded.close()
        with pytest.raises(ValueError, match="closed"):
            list(answers)


def test_ctrl_c_ends_a_batch_and_nothing_else(small: dsv4.Model) -> None:
    wanted = [told(a) for a in small.batch([[0, i] for i in range(6)], max_new_tokens=40, seed=1)]
    for delay in (0.003, 0.011, 0.04):
        scheduler = dsv4.Scheduler(small, concurrency=4)
        handles = [scheduler.submit([0, i], max_new_tokens=40, seed=1) for i in range(6)]
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, delay)
        with pytest.raises(KeyboardInterrupt):
            while True:
                handles[0].result()
                time.sleep(0)
        signal.signal(signal.SIGALRM, before)
        # the step was undone: whoever drives next goes on from there
        assert [told(h.result()) for h in handles] == wanted
        scheduler.close()
    batch = small.batch([[0, i] for i in range(500)], max_new_tokens=40)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(KeyboardInterrupt):
        list(batch)
    signal.signal(signal.SIGALRM, before)
    assert [told(a) for a in small.batch([[0, i] for i in range(6)], max_new_tokens=40,
                                         seed=1)] == wanted


def test_leaving_the_loop_gives_everything_back(
    small: dsv4.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dsv4.Session] = []
    make, fork = dsv4.Model.session, dsv4.Session.fork

    def session(self: dsv4.Model, **options: Any) -> dsv4.Session:
        made.append(make(self, **options))
        return made[-1]

    def forked(self: dsv4.Session) -> dsv4.Session:
        made.append(fork(self))
        return made[-1]

    monkeypatch.setattr(dsv4.Model, "session", session)
    monkeypatch.setattr(dsv4.Session, "fork", forked)
    start = ids_of(60, 8)
    for answer in small.batch(([*start, i] for i in range(2, 60)), concurrency=4,
                              max_new_tokens=3):
        assert answer.tokens
        break
    assert made and all("closed" in repr(session) for session in made)


# ---- async ----

def test_async_for(small: dsv4.Model, rows: list[Any], alone: list[Any]) -> None:
    async def slowly() -> AsyncIterator[Any]:
        for row in rows:
            await asyncio.sleep(0.002)
            yield row

    async def run() -> tuple[list[Any], list[Any]]:
        options: dict[str, Any] = dict(concurrency=4, max_new_tokens=9, seed=5)
        a = [told(x) async for x in small.abatch(rows, **options)]
        b = {i: told(x) async for i, x in small.abatch(slowly(), ordered=False, **options)}
        return a, [b[i] for i in range(len(rows))]

    assert asyncio.run(run()) == (alone, alone)


def test_a_cancelled_task_gives_everything_back(small: dsv4.Model) -> None:
    closed: list[bool] = []

    async def run() -> None:
        async def work() -> None:
            async for _ in small.abatch(([0, i] for i in range(10**6)), max_new_tokens=50):
                pass

        task = asyncio.ensure_future(work())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    close = _Batch.close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Batch, "close", lambda self: (close(self), closed.append(True))[1])
        asyncio.run(run())
    assert closed == [True]


# ---- the bar and the arguments ----

def test_the_bar(small: dsv4.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bar:
        n, total, text = 0, None, ""

        def __init__(self, **options: Any) -> None:
            self.total = options["total"]
            bars.append(self)

        def update(self, n: int) -> None:
            self.n += n

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            self.text = text

        def close(self) -> None:
            self.total = self.total or self.n

    bars: list[Bar] = []
    monkeypatch.setattr(batch_module, "bar", Bar)
    list(small.batch([[0, i] for i in range(9)], max_new_tokens=2))
    list(small.batch(iter([[0, 1]]), max_new_tokens=2))
    assert [(b.n, b.total) for b in bars] == [(9, 9), (1, 1)] and "tokens/s" in bars[0].text
    list(small.batch([[0, 1]], max_new_tokens=2, progress=False))
    assert len(bars) == 2


@pytest.mark.parametrize(("arguments", "error", "says"), [
    (dict(concurrency=0), ValueError, "concurrency: got 0, wanted 1 to 256"),
    (dict(concurrency=True), TypeError, "concurrency: got bool"),
    (dict(concurrency="4"), TypeError, "concurrency: got str"),
    (dict(top_q=1), TypeError, "did you mean 'top_p'"),
    (dict(temperature=-1), ValueError, "temperature"),
    (dict(session=None), TypeError, "session"),
    (dict(prompts="text"), TypeError, "prompts: got str"),
    (dict(prompts=5), TypeError, "prompts: got int"),
])
def test_refused(
    small: dsv4.Model, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        small.batch(**{"prompts": [[0]], **arguments})
    with pytest.raises(error, match=says):
        small.abatch(**{"prompts": [[0]], **arguments})
