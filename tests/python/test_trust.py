# SPDX-License-Identifier: Apache-2.0
"""What happens when things go wrong: signals, threads, forks, exits, misuse, leaks."""

import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsv4

Script = Callable[..., Any]
BOUNDED = settings(
    max_examples=300, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


# ---- A2: any arguments ----

numbers = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 1e300, float("nan"), float("inf"), np.int8(3),
                     np.float32(0.5), np.array([1, 2]), object(), b"x", [], {}, [1, "a"]]))
prompts = st.one_of(
    numbers, st.lists(st.integers(-2, 600), max_size=5), st.lists(numbers, max_size=3),
    st.lists(st.lists(st.integers(0, 511), max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=4), numbers, max_size=2),
    st.lists(st.dictionaries(st.sampled_from(["role", "content", "tools"]),
                             st.one_of(numbers, st.sampled_from(["user", "system"])), max_size=3),
             min_size=1, max_size=2))
names = st.sampled_from([
    "max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "seed",
    "n", "logprobs", "prompt_logprobs", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "stop_token_ids", "force_tokens", "ignore_eos",
    "do_sample", "thinking_mode", "reasoning_effort", "drop_thinking", "version", "special",
    "session", "sampling", "regex", "unheard_of"])
DOCUMENTED = (ValueError, TypeError, NotImplementedError, OverflowError)


@BOUNDED
@given(prompt=prompts, arguments=st.dictionaries(names, numbers, max_size=3))
def test_generate_takes_or_refuses_anything(
    flash: dsv4.Model, prompt: Any, arguments: dict[str, Any]
) -> None:
    try:
        with flash.stream(prompt, **arguments) as events:
            next(events, None)
    except DOCUMENTED as error:
        assert str(error)


@BOUNDED
@given(first=prompts, second=numbers, third=numbers)
def test_sessions_and_layers_take_or_refuse_anything(
    flash: dsv4.Model, first: Any, second: Any, third: Any
) -> None:
    session = flash.session()
    for call in (
        lambda: session.append(first, logits="none"), lambda: session.append([1], logits=second),
        lambda: flash.step(first), lambda: flash.step([(session, first), (second, third)]),
        lambda: flash.layers[0](first, second), lambda: flash._core.tensor(second),
        lambda: session._core.tokens(second, third),
        lambda: session._core.rows(0, second, third, 1),
    ):
        before = session.position
        try:
            call()
        except DOCUMENTED as error:
            assert str(error) and session.position == before


@BOUNDED
@given(arguments=st.dictionaries(
    st.sampled_from(["path", "device", "threads", "numerics", "mmap", "verify", "revision",
                     "local_files_only", "april_kv", "april_shared"]), numbers, min_size=1,
    max_size=3))
def test_load_takes_or_refuses_anything(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], nano: Callable[[str], Path]
) -> None:
    if isinstance(arguments.get("threads"), int) and arguments["threads"] > 8:
        arguments["threads"] = 8
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        dsv4.load(**{"path": nano("nano-odd"), **arguments}).close()
    except (*DOCUMENTED, OSError, dsv4.BackendUnavailable) as error:
        assert str(error)


# ---- I1: Ctrl-C ----

@pytest.fixture(scope="module")
def second(flash: dsv4.Model) -> list[int]:
    """A prompt that one step works on for about a second, here and now."""
    n = 256
    while True:
        started = time.monotonic()
        flash.session().append([1] * n, logits="none")
        took = time.monotonic() - started
        if took > 0.25 or n > 100_000:
            return [1] * int(n / took)
        n *= 2


def interrupted(work: Callable[[], object], delay: float) -> float | None:
    """Seconds from SIGINT to KeyboardInterrupt; None if the work was done before."""
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(delay, send)
    try:
        timer.start()  # the signal may come before it returns
        work()
        timer.cancel()
        timer.join()
        if sent:
            time.sleep(1)  # the signal is under way
        return None
    except KeyboardInterrupt:
        return time.monotonic() - sent[0]
    finally:
        timer.cancel()
        timer.join()


@pytest.mark.parametrize(("runs", "longest"), [
    (12, 0.4), (200, 0.04), pytest.param(200, 0.4, marks=pytest.mark.long)])
def test_ctrl_c_is_answered_and_leaves_the_session(
    flash: dsv4.Model, second: list[int], runs: int, longest: float
) -> None:
    rng = random.Random(5)
    start = [rng.randrange(512) for _ in range(37)]
    wanted = flash.session()
    wanted.append(start, logits="none")
    after = wanted.append([9, 8])
    latencies = []
    for i in range(runs):
        session = flash.session()
        session.append(start, logits="none")
        delay = rng.uniform(0.0, longest)
        if i % 3 == 2:
            tokens: list[int] = []

            def decode(session: dsv4.Session = session, tokens: list[int] = tokens) -> None:
                for event in flash.stream([5], session=session, ignore_eos=True):
                    tokens.extend(event.tokens)

            latency = interrupted(decode, delay)
            # the last committed token: all but the newest, which no step has read yet
            assert session.tokens.tolist()[:37] == start
            assert session.tokens.tolist()[38:] in (tokens[:-1], tokens, [])
        else:
            latency = interrupted(lambda: session.append(second), delay)  # noqa: B023
            if latency is not None:
                assert session.position == 37
                np.testing.assert_array_equal(session.append([9, 8]), after)
        if latency is not None:
            latencies.append(latency)
    latencies.sort()
    assert len(latencies) > runs // 2
    assert latencies[int(0.99 * len(latencies)) - 1] <= 0.25, latencies


def test_ctrl_c_ends_a_load(script: Script) -> None:
    """A load of some seconds: a slow progress callback stands for a slow disk."""
    code = """
import os, signal, threading, time
from dsv4 import loading
slow = lambda done, total: time.sleep(0.02)
loading._Progress.__enter__ = lambda self: slow
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
started = time.monotonic()
try:
    while True:
        loading.load(threads=1).close()
except KeyboardInterrupt:
    print(time.monotonic() - started < 0.3 + 0.25)
loading._Progress.__enter__ = lambda self: None
print(len(loading.load(threads=1).generate("a", max_new_tokens=2).tokens))
"""
    done = script(code)
    assert done.stdout.split() == ["True", "2"], done.stderr


def test_interrupt_storm_raises_once(script: Script) -> None:
    code = """
import os, signal, threading, time, dsv4
model = dsv4.load(threads=1)
def storm():
    for _ in range(5):
        os.kill(os.getpid(), signal.SIGINT); time.sleep(0.02)
caught = 0
threading.Timer(0.2, storm).start()
try:
    model.generate("a", ignore_eos=True)
except KeyboardInterrupt:
    caught += 1
    try:
        time.sleep(0.5)
    except KeyboardInterrupt:
        pass
while True:
    try:
        print(caught, len(model.generate("a", max_new_tokens=2).tokens)); break
    except KeyboardInterrupt:
        pass
"""
    done = script(code)
    assert done.stdout.split() == ["1", "2"], done.stderr


def test_ctrl_c_reaches_a_step_that_waits(flash: dsv4.Model, second: list[int]) -> None:
    busy, mine = flash.session(), flash.session()
    thread = threading.Thread(target=lambda: busy.append(second, logits="none"))
    thread.start()
    time.sleep(0.1)
    latency = interrupted(lambda: mine.append([1]), 0.1)
    assert latency is not None and latency <= 0.25 and thread.is_alive()
    assert mine.position == 0
    thread.join()
    assert busy.position == len(second)


def test_signal_handlers_cannot_start_a_step_inside_one(
    flash: dsv4.Model, second: list[int]
) -> None:
    told: list[str] = []

    def handler(*_: object) -> None:
        try:
            flash.session().append([1])
        except RuntimeError as error:
            told.append(str(error))

    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        flash.session().append(second, logits="none")
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert len(told) == 1 and "in this thread" in told[0]


def test_no_handler_is_taken(script: Script) -> None:
    code = """
import signal
def handlers(): return [signal.getsignal(s) for s in signal.valid_signals()]
before = handlers()
import dsv4
model = dsv4.load(threads=1); model.generate("a", max_new_tokens=2)
print(handlers() == before)
"""
    assert script(code).stdout.split() == ["True"]


# ---- C1, C2, C6: threads ----

def in_threads(count: int, work: Callable[[int], object]) -> list[BaseException]:
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return errors


def test_concurrent_sessions_equal_single_runs(flash: dsv4.Model) -> None:
    rounds = 200
    wanted = [flash.generate([0, i], max_new_tokens=2, seed=i) for i in range(8)]

    def work(i: int) -> None:
        for _ in range(rounds):
            got = flash.generate([0, i], max_new_tokens=2, seed=i)
            assert got.tokens == wanted[i].tokens  # type: ignore[union-attr]

    assert in_threads(8, work) == []


def test_one_session_in_many_threads(flash: dsv4.Model, second: list[int]) -> None:
    session = flash.session()

    def work(i: int) -> None:
        for _ in range(5):
            session.append([i], logits="none")
            assert session.position > 0 and len(session.tokens) > 0

    assert in_threads(8, work) == []
    assert sorted(session.tokens.tolist()) == sorted([*range(8)] * 5)
    thread = threading.Thread(target=lambda: session.append(second, logits="none"))
    thread.start()
    time.sleep(0.2)
    with pytest.raises(RuntimeError, match="in use by a running step"):
        session.close()
    assert session.position == 40 + len(second)  # waits for the step
    thread.join()


def test_a_sampler_serves_one_step_at_a_time(flash: dsv4.Model) -> None:
    from dsv4 import _core

    sampling = dsv4.Sampling(seed=1).native() | {"max_new_tokens": 5, "choice": 0}
    sampler = _core.Sampler(512, sampling)
    a, b = flash.session()._core, flash.session()._core
    with pytest.raises(ValueError, match="no step uses"):
        flash._core.step([(a, [1], 0, sampler), (b, [1], 0, sampler)], None)
    ((_, sample),) = flash._core.step([(a, [1], 0, sampler)], None)
    assert sample is not None


def test_the_interpreter_goes_on_during_a_step(script: Script) -> None:
    """C6: a counting thread keeps 80 % of its rate while another generates."""
    code = """
import threading, time, dsv4
model = dsv4.load(threads=1)
def rate(seconds):
    # CPU time of this thread, so that a busy machine does not count
    n, cpu, end = 0, time.thread_time(), time.monotonic() + seconds
    while time.monotonic() < end:
        n += 1
    return n / (time.thread_time() - cpu)
idle = rate(0.5)
stop = threading.Event()
def work():
    session = model.session()
    while not stop.is_set():
        session.append([5] * 100, logits="none") if session.position < 1500 else stop.wait(0.1)
worker = threading.Thread(target=work); worker.start(); time.sleep(0.1)
wall, cpu = time.monotonic(), time.process_time()
busy = rate(1.5)
stop.set(); worker.join()
print(busy / idle)
"""
    done = script(code)
    assert float(done.stdout) >= 0.8, done.stdout + done.stderr


# ---- P1 to P4: processes ----

def test_fork(script: Script) -> None:
    code = """
import gc, os, time, warnings, multiprocessing, numpy as np, dsv4
warnings.simplefilter("ignore")
def child(queue=None):
    told = 0
    for call in (lambda: session.append([1]), lambda: session.position, lambda: model.session(),
                 lambda: model.generate("a", max_new_tokens=1), lambda: model.kernel_info,
                 lambda: model.layers[0](np.zeros((1, c.hc_mult, c.hidden_size)), [0])):
        try:
            call()
        except dsv4.ForkedProcessError:
            told += 1
    return told
model = dsv4.load(threads=2)
c = model.config
session = model.session()
before = session.append("ROMEO:")
if (pid := os.fork()) == 0:
    started = time.monotonic()
    told = child()
    del session, model
    gc.collect()
    # a model loaded in the child works there
    own = dsv4.load(threads=2)
    ok = told == 6 and time.monotonic() - started < 60
    os._exit(0 if ok and (own.session().append("ROMEO:") == before).all() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(pool.apply(child))
print(len(model.generate("a", max_new_tokens=2).tokens))
"""
    done = script(code)
    assert done.stdout.split() == ["0", "6", "2"], done.stdout + done.stderr


def test_spawn_and_forkserver(tmp_path: Path, script: Script) -> None:
    program = tmp_path / "program.py"
    program.write_text("""
import multiprocessing, dsv4
def work(_):
    return dsv4.load(threads=1).generate("ROMEO:", max_new_tokens=3, seed=1).tokens
if __name__ == "__main__":
    model = dsv4.load(threads=1)
    wanted = model.generate("ROMEO:", max_new_tokens=3, seed=1).tokens
    for method in ("spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(pool.map(work, [0]) == [wanted])
""")
    done = script("import runpy, sys; sys.argv = sys.argv[1:]; "
                  "runpy.run_path(sys.argv[0], run_name='__main__')", str(program))
    assert done.stdout.split() == ["True", "True"], done.stderr


EXITS = {
    "sys.exit": ("import sys; sys.exit(3)", 3),
    "uncaught": ("raise SystemError('on purpose')", 1),
    "os._exit": ("import os; os._exit(4)", 4),
    "unfinished generator": ("g = model.stream('a'); next(g)", 0),
    "generator in a cycle": ("g = model.stream('a'); next(g); x = [g]; x.append(x); del g, x", 0),
    "daemon thread": (
        "import threading, time\n"
        "threading.Thread(target=lambda: model.generate('a', ignore_eos=True), daemon=True)"
        ".start(); time.sleep(0.3)", 0),
    "daemon thread in a long prompt": (
        "import threading, time\n"
        "threading.Thread(target=lambda: model.session().append([5] * 2000), daemon=True)"
        ".start(); time.sleep(0.3)", 0),
    "two daemon threads": (
        "import threading, time\n"
        "for _ in range(2): threading.Thread(target=lambda: model.session().append([5] * 2000), "
        "daemon=True).start()\ntime.sleep(0.3)", 0),
    "a step at exit": ("import atexit; atexit.register(lambda: model.generate('a', "
                       "max_new_tokens=1))", 0),
    "closed twice": ("model.close(); model.close()", 0),
}


@pytest.mark.parametrize("name", EXITS)
def test_exit_in_flight(name: str, script: Script) -> None:
    statement, code = EXITS[name]
    ready = "import time, dsv4; model = dsv4.load(threads=2); model.generate('a', max_new_tokens=1)"
    watch = "print(time.time(), flush=True)"
    done = script(f"{ready}\n{statement.replace('; import', chr(10) + 'import')}\n{watch}"
                  if code == 0 else f"{ready}\n{watch}\n{statement}")
    ended = time.time()
    assert done.returncode == code, done.stderr
    assert ended - float(done.stdout) <= 2
    if code != 1:
        assert done.stderr == ""


def test_import_and_reload(script: Script) -> None:
    code = """
import gc, sys
def once():
    import dsv4, dsv4._core
    dsv4.load
    for name in [n for n in sys.modules if n.startswith("dsv4")]:
        del sys.modules[name]
    gc.collect()
for _ in range(5): once()
before = sys.getallocatedblocks()
for _ in range(30): once()
print(sys.getallocatedblocks() - before < 3000)
"""
    done = script(code)
    assert done.stdout.split() == ["True"], done.stderr


def test_subinterpreters_are_refused(script: Script) -> None:
    code = """
try:
    import _xxsubinterpreters as interpreters
except ImportError:
    import _interpreters as interpreters
one = interpreters.create()
try:
    told = interpreters.run_string(one, '''
try:
    import dsv4._core
except ImportError as error:
    print("refused")
''')
finally:
    interpreters.destroy(one)
"""
    assert script(code).stdout.split() == ["refused"]


# ---- leaks ----

def test_nothing_leaks(nano: Callable[[str], Path]) -> None:
    """Blocks, threads and descriptors stay where they are over 100 rounds of use and misuse."""
    with dsv4.load(nano("nano-odd"), threads=2) as loaded:
        session = loaded.session()

        def once() -> None:
            with loaded.session() as other:
                loaded.step([(other, [1, 2])])
                for bad in ([-1], [True], [(session, [1])], "x", None):
                    with pytest.raises((ValueError, TypeError)):
                        other.append(bad)  # type: ignore[arg-type]
                with pytest.raises(ValueError):
                    loaded.step([(other, [1]), (other, [1])])
            with pytest.raises(ValueError):
                _ = other.position
            loaded.generate([0], max_new_tokens=2, logprobs=1, prompt_logprobs=1)
            next(loaded.stream([0]))
            loaded._core.tensor("norm.weight")
            loaded._core.kernels()

        def state() -> tuple[int, int, int]:
            gc.collect()
            return (sys.getallocatedblocks(), threading.active_count(),
                    len(os.listdir("/proc/self/fd")))

        for _ in range(20):
            once()
        before = state()
        for _ in range(100):
            once()
        after = state()
    # caches of the interpreter and of pytest may take a few blocks, a leak takes one a round
    assert after[0] - before[0] < 80 and after[1:] == before[1:]


def test_loads_leave_nothing(nano: Callable[[str], Path]) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def once() -> None:
        loaded = dsv4.load(nano("nano-odd"), threads=2)
        loaded.generate([0, 1], max_new_tokens=1)
        loaded.close()

    for _ in range(5):
        once()
    gc.collect()
    before = resident(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        once()
    gc.collect()
    assert len(os.listdir("/proc/self/task")) == before[1]
    assert len(os.listdir("/proc/self/fd")) == before[2]
    assert resident() - before[0] < 8 << 20  # one leaked load holds more than 1 MB
