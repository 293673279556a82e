# SPDX-License-Identifier: Apache-2.0
"""Batch jobs: kills, signals, full disks, bad input; always the bytes of an undisturbed run."""

import errno
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsv4
from dsv4 import batch_files, batch_input, batch_jobs
from dsv4.batch_files import Job, Log
from dsv4.batch_jobs import row_seed, work
from dsv4.cli import main

COMMAND = [sys.executable, "-m", "dsv4", "batch"]
ENVIRONMENT = {"DSV4_NUM_THREADS": "1"}


def rows_of(n: int) -> list[dict[str, Any]]:
    """Requests of both kinds, some with a beginning in common, several choices, log-probabilities.
    """
    rows = []
    for i in range(n):
        body: dict[str, Any] = {"prompt": f"ROMEO: {i}", "temperature": 0.8}
        if i % 3 == 0:
            system = "Speak as Shakespeare would, all the time, to everybody who is here."
            body = {"logprobs": i % 2 == 0, "messages": [
                {"role": "system", "content": system}, {"role": "user", "content": f"Hello {i}"}]}
        body |= {"n": 2} if i % 25 == 0 else {}
        rows.append({"custom_id": f"row {i}", "body": body | {"max_tokens": 2 + i % 4}})
    return rows


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def partial(output: Path) -> Path:
    return output.with_name(output.name.replace(".jsonl", ".partial.jsonl"))


def start(*arguments: str | Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], env=os.environ | ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_until_it_grows(process: "subprocess.Popen[str]", path: Path, by: int) -> None:
    """Until the log has `by` more bytes, or the process has ended."""
    size = path.stat().st_size if path.exists() else 0
    while process.poll() is None:
        if path.exists() and path.stat().st_size >= size + by:
            return
        time.sleep(0.001)


@pytest.fixture
def job(tmp_path: Path, model: dsv4.Model) -> tuple[Path, Path, bytes]:
    """Input, output, and what the output of an undisturbed run is."""
    source = write(tmp_path / "in.jsonl", rows_of(40))
    work(model, source, tmp_path / "whole.jsonl", concurrency=4)
    return source, tmp_path / "out.jsonl", (tmp_path / "whole.jsonl").read_bytes()


# ---- kills and signals ----

@pytest.mark.parametrize("kills", [
    20, *(pytest.param(kills, marks=pytest.mark.long) for kills in (50, 200))])
def test_killed_at_random_moments(tmp_path: Path, model: dsv4.Model, kills: int) -> None:
    source, output = write(tmp_path / "in.jsonl", rows_of(500)), tmp_path / "out.jsonl"
    whole = tmp_path / "whole.jsonl"
    dsv4.run_batch(model, source, whole, concurrency=16)
    chance = random.Random(kills)
    step = 1.5 * whole.stat().st_size / kills
    killed = 0
    for i in itertools.count():
        process = start(source, output, "--concurrency", "8")
        if killed == kills:
            process.communicate()
            assert process.returncode == 0
            break
        if i % 5 == 4:  # anywhere: before the work, at the end
            time.sleep(chance.uniform(0, 0.7))
        else:
            wait_until_it_grows(process, partial(output), int(chance.uniform(0, step)))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if output.exists() and not partial(output).exists():  # it was done: once more
            assert output.read_bytes() == whole.read_bytes()
            for path in tmp_path.glob("out.*"):
                path.unlink()
    assert output.read_bytes() == whole.read_bytes()
    assert [row["custom_id"] for row in read(output)] == [f"row {i}" for i in range(500)]
    assert {p.name for p in tmp_path.iterdir()} == {
        "in.jsonl", "out.jsonl", "out.run.json", "whole.jsonl", "whole.run.json"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_end_it_and_lose_nothing(
    tmp_path: Path, model: dsv4.Model, number: signal.Signals
) -> None:
    rows = [row | {"body": row["body"] | {"max_tokens": 30}} for row in rows_of(120)]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    work(model, source, tmp_path / "whole.jsonl")
    process = start(source, output, "--concurrency", "2")
    wait_until_it_grows(process, partial(output), 3000)
    sent = time.monotonic()
    for _ in range(15):
        process.send_signal(number)
        time.sleep(0.001)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 128 + number and number.name in told
    assert time.monotonic() - sent < 5 and "Traceback" not in told
    assert partial(output).read_bytes().endswith(b"\n") and not output.exists()
    report = work(model, source, output)
    assert 0 < report.resumed < 120 and report.rows == 120
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_the_reader_of_the_report_goes_away(job: tuple[Path, Path, bytes]) -> None:
    source, output, whole = job
    process = start(source, output)
    assert process.stdout is not None
    process.stdout.close()
    process.wait(20)
    assert process.stderr is not None and process.stderr.read() == ""
    process.stderr.close()
    assert process.returncode == 141 and output.read_bytes() == whole


# ---- what is on disk ----

class Stop(Exception):
    pass


def stopped(
    model: dsv4.Model, source: Path, output: Path, patch: pytest.MonkeyPatch
) -> bytes:
    """The log of a job that was stopped when all rows were done."""
    def stop(*_: Any) -> None:
        raise Stop

    with patch.context() as inner:
        inner.setattr(Job, "finish", stop)
        with pytest.raises(Stop):
            work(model, source, output)
    return partial(output).read_bytes()


def test_any_damage_to_the_log_is_found(
    tmp_path: Path, model: dsv4.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write(tmp_path / "in.jsonl", rows_of(6)), tmp_path / "out.jsonl"
    work(model, source, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    log = stopped(model, source, output, monkeypatch)
    chance = random.Random(1)
    lines = log.splitlines(keepends=True)
    damaged = [log[:at] for at in (0, 1, len(lines[0]), len(lines[0]) + 1, len(log) - 1)]
    damaged += [lines[0] + b"\n" + b"".join(lines[1:]), log + lines[2], log + b'{"crc":"0']
    for _ in range(25):
        bytes_ = bytearray(log)
        bytes_[chance.randrange(len(log))] ^= 1 << chance.randrange(8)
        damaged.append(bytes(bytes_))
    for text in damaged:
        output.unlink(missing_ok=True)
        partial(output).write_bytes(text)
        assert work(model, source, output).resumed >= (4 if len(text) >= len(log) else 0)
        assert output.read_bytes() == whole
        assert not partial(output).exists()


def test_every_row_is_synced_within_a_second(
    job: tuple[Path, Path, bytes], model: dsv4.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output, whole = job
    synced, real = [], os.fdatasync
    monkeypatch.setattr(batch_files.os, "fdatasync", lambda fd: (synced.append(fd), real(fd)))
    clock = itertools.count(step=0.3)
    monkeypatch.setattr(batch_files.time, "monotonic", lambda: next(clock))
    work(model, source, output)
    assert 40 * 0.3 / 1.3 <= len(synced) <= 40 * 0.3 + 3 and output.read_bytes() == whole


def test_disk_faults(
    job: tuple[Path, Path, bytes], model: dsv4.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each kind of call, at several of its turns: an error, and the work goes on after it."""
    source, output, whole = job

    def failing(name: str, turn: int, short: int) -> Callable[..., Any]:
        real, turns = getattr(os, name), itertools.count()

        def call(*arguments: Any, **options: Any) -> Any:
            now = next(turns)
            if now == turn - 1 and short:
                return real(arguments[0], arguments[1][:short])
            if now == turn:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        return call

    faults = [("write", turn, short) for turn in (1, 7, 39) for short in (0, 11)]
    faults += [("fdatasync", 0, 0), ("fsync", 0, 0), ("fsync", 2, 0), ("replace", 0, 0),
               ("replace", 1, 0)]
    for name, turn, short in faults:
        with monkeypatch.context() as patch:
            patch.setattr(batch_files.os, name, failing(name, turn, short))
            with pytest.raises(OSError, match="No space left"):
                work(model, source, output, concurrency=4)
        assert not list(output.parent.glob("*.tmp"))
        assert work(model, source, output, concurrency=4).rows == 40
        assert output.read_bytes() == whole
        for path in output.parent.glob("out.*"):
            path.unlink()


def test_a_file_size_limit(job: tuple[Path, Path, bytes]) -> None:
    source, output, whole = job
    process = subprocess.Popen(
        [*COMMAND, str(source), str(output)], env=os.environ | ENVIRONMENT, text=True,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)))
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1 and "bytes for a row" in told and "start again" in told
    assert 0 < partial(output).stat().st_size <= 5000
    assert main(["batch", str(source), str(output)]) == 0
    assert output.read_bytes() == whole


def test_one_process_at_a_time(job: tuple[Path, Path, bytes], model: dsv4.Model) -> None:
    source, output, whole = job
    other = Log(partial(output))
    with pytest.raises(OSError, match="another process works on this job"):
        work(model, source, output)
    other.close()
    work(model, source, output)
    assert output.read_bytes() == whole


# ---- whose work it is ----

def test_another_job_does_not_continue_it(
    job: tuple[Path, Path, bytes], model: dsv4.Model, flash: dsv4.Model,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, output, whole = job
    log = stopped(model, source, output, monkeypatch)
    other = write(tmp_path / "other.jsonl", rows_of(39))
    ids = write(tmp_path / "ids.jsonl", [{"custom_id": "a", "body": {"prompt": [0, 1]}}])
    changes: list[tuple[str, dict[str, Any], Path, dsv4.Model]] = [
        ("sampling.temperature: the job there has None, this one 0.5",
         dict(temperature=0.5), source, model),
        ("seed: the job there has 0, this one 1", dict(seed=1), source, model),
        ("prompts.thinking_mode", dict(thinking_mode="thinking"), source, model),
        ("skip_invalid", dict(skip_invalid=True), source, model),
        ("input_sha256", {}, other, model),
        ("generation_config", {}, ids, flash),
    ]
    for says, arguments, path, loaded in changes:
        with pytest.raises(ValueError, match=says):
            work(loaded, path, output, **arguments)
        assert partial(output).read_bytes() == log
    monkeypatch.setattr(dsv4, "__version__", "9")
    with pytest.raises(ValueError, match="dsv4: the job there has"):
        work(model, source, output)
    monkeypatch.undo()
    report = work(model, other, output, force_new=True)
    assert report.resumed == 0 and len(read(output)) == 39
    with pytest.raises(ValueError, match="input_sha256"):
        work(model, source, output)
    work(model, source, output, force_new=True)
    assert output.read_bytes() == whole
    again = work(model, source, output)  # done: nothing to do
    assert again.resumed == again.rows == 40 and output.read_bytes() == whole


def test_files_that_are_not_of_this_job(
    job: tuple[Path, Path, bytes], model: dsv4.Model
) -> None:
    source, output, whole = job
    output.write_text("mine")
    with pytest.raises(ValueError, match="is there already and not of this job"):
        work(model, source, output)
    assert output.read_text() == "mine" and not partial(output).exists()
    with pytest.raises(ValueError, match="is the input"):
        work(model, source, source)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        work(model, source, output.parent / "no" / "out.jsonl")
    work(model, source, output, force_new=True)
    assert output.read_bytes() == whole
    output.with_name("out.run.json").write_text("{")
    with pytest.raises(ValueError, match="not what this program wrote"):
        work(model, source, output)


# ---- rows ----

def test_rows_are_what_generate_gives(
    job: tuple[Path, Path, bytes], model: dsv4.Model
) -> None:
    source, output, whole = job
    for row, request in zip(map(json.loads, whole.splitlines()), read(source), strict=True):
        name, asked = request["custom_id"], request["body"]
        assert row["custom_id"] == name and row["error"] is None
        body = row["response"]["body"]
        wanted = model.generate(
            asked.get("messages") or asked["prompt"], max_tokens=asked["max_tokens"],
            seed=row_seed(0, name), n=asked.get("n", 1), temperature=asked.get("temperature"),
            logprobs=0 if asked.get("logprobs") else None)
        answers = wanted if isinstance(wanted, list) else [wanted]
        assert len(body["choices"]) == len(answers)
        assert body["usage"]["completion_tokens"] == sum(len(a.tokens) for a in answers)
        for choice, answer in zip(body["choices"], answers, strict=True):
            chat = "messages" in asked
            assert (choice["message"]["content"] if chat else choice["text"]) == answer.text
            assert choice["finish_reason"] == answer.finish_reason
            if asked.get("logprobs"):
                assert [(t["token_id"], t["logprob"]) for t in choice["logprobs"]["content"]] == [
                    (t.token, t.logprob) for t in answer.logprobs or ()]


def test_seeds_of_rows() -> None:
    seeds = {row_seed(seed, name) for seed in (0, 1, 10) for name in ("a", "b", "0a", "é")}
    assert len(seeds) == 12 and all(0 <= seed < 1 << 64 for seed in seeds)
    assert row_seed(0, "a") == 15270482384145340437  # jobs of yesterday go on


def test_the_same_bytes_at_any_concurrency_and_order(
    job: tuple[Path, Path, bytes], model: dsv4.Model, tmp_path: Path
) -> None:
    source, output, whole = job
    for i, concurrency in enumerate((1, 7, 40)):
        path = tmp_path / f"{i}.jsonl"
        dsv4.run_batch(model, source, path, concurrency=concurrency)
        assert path.read_bytes() == whole
    backwards = write(tmp_path / "backwards.jsonl", rows_of(40)[::-1])
    with dsv4.load(threads=2) as loaded:
        dsv4.run_batch(loaded, backwards, output, limit_memory=1 << 30)
    assert output.read_bytes().splitlines() == whole.splitlines()[::-1]
    work(model, source, tmp_path / "seed.jsonl", seed=1)
    assert (tmp_path / "seed.jsonl").read_bytes() != whole


def test_forms_of_answers(tmp_path: Path, model: dsv4.Model) -> None:
    assert model.tokenizer is not None
    call = ("Adding.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"add\">\n"
            "<｜DSML｜parameter name=\"a\" string=\"false\">2</｜DSML｜parameter>\n"
            "</｜DSML｜invoke>\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>")
    think = "So.</think>Yes.<｜end▁of▁sentence｜>"
    messages = [{"role": "user", "content": "2+2"}]
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}

    def forced(text: str) -> list[int]:
        assert model.tokenizer is not None
        return model.tokenizer.encode(text, special=True)

    source = write(tmp_path / "in.jsonl", [
        {"custom_id": "tools", "method": "POST", "url": "/v1/chat/completions", "body": {
            "model": "any", "messages": messages, "tools": [tool], "force_tokens": forced(call)}},
        {"id": "short", "messages": messages, "thinking_mode": "thinking",
         "force_tokens": forced(think)},
        {"custom_id": "ids", "url": "/v1/completions", "body": {
            "prompt": [0, 70], "max_tokens": 2, "logprobs": 1, "logit_bias": {"70": 100}}},
    ])
    assert work(model, source, tmp_path / "out.jsonl", max_new_tokens=100).failed == 0
    tools, short, ids = (row["response"]["body"] for row in read(tmp_path / "out.jsonl"))
    assert tools["model"] == "any" and tools["object"] == "chat.completion"
    message = tools["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "add"
    assert message["tool_calls"][0]["id"].startswith("call_")
    assert tools["choices"][0]["finish_reason"] == "tool_calls"
    with_tools = model.ids(dsv4.encode_messages(
        [{"role": "system", "content": "", "tools": [tool]}, *messages]), bos=False, special=True)
    assert tools["usage"]["prompt_tokens"] == len(with_tools)
    assert short["choices"][0]["message"] == {
        "role": "assistant", "content": "Yes.", "reasoning_content": "So."}
    assert ids["object"] == "text_completion"
    logprobs = ids["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 2
    assert ids["choices"][0]["text"] == model.tokenizer.decode([70, 70])


def test_poison_rows_harm_nobody(
    tmp_path: Path, poisoned: dsv4.Model, model: dsv4.Model
) -> None:
    ban = {"logit_bias": {"77": -1e9}, "max_tokens": 5}
    good = [{"custom_id": f"g{i}", "body": {"prompt": [0, i], **ban}} for i in range(20)]
    bad = [{"custom_id": f"b{i}", "body": {"prompt": [0, i, 77], **ban}} for i in range(4)]
    work(poisoned, write(tmp_path / "good.jsonl", good), tmp_path / "whole.jsonl")
    mixed = write(tmp_path / "in.jsonl", [*bad[:2], *good[:9], *bad[2:], *good[9:]])
    report = work(poisoned, mixed, tmp_path / "out.jsonl")
    assert (report.rows, report.failed) == (24, 4) and "4 in " in str(report)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    errors = read(tmp_path / "out.errors.jsonl")
    assert [row["custom_id"] for row in errors] == ["b0", "b1", "b2", "b3"]
    assert all(row["error"]["code"] == "NonFiniteLogitsError" for row in errors)
    assert all(row["response"]["status_code"] == 500 for row in errors)
    again = work(poisoned, mixed, tmp_path / "out.jsonl")
    assert (again.rows, again.failed, again.resumed) == (24, 4, 24)
    # the context ends one row, and is too short for another
    source = write(tmp_path / "long.jsonl", [
        {"custom_id": "ends", "body": {"prompt": [70] * 2043, "ignore_eos": True}},
        {"custom_id": "never", "body": {"prompt": [70] * 2048}},
        {"custom_id": "fine", "body": {"prompt": "a", "max_tokens": 2}}])
    with pytest.raises(dsv4.FormatError, match="line 2: prompt: got 2048 tokens"):
        work(model, source, tmp_path / "long_out.jsonl")
    assert work(model, source, tmp_path / "long_out.jsonl", skip_invalid=True).skipped == 1
    ends, fine = read(tmp_path / "long_out.jsonl")
    choice = ends["response"]["body"]["choices"][0]
    assert choice["finish_reason"] == "length" and fine["custom_id"] == "fine"
    assert ends["response"]["body"]["usage"]["completion_tokens"] == 5


# ---- input ----

def line(**body: Any) -> bytes:
    return json.dumps({"custom_id": "x", "body": {"prompt": "a", **body}}).encode()


BAD: list[tuple[bytes, str]] = [
    (b"", "got an empty line"),
    (b"   ", "got an empty line"),
    (b'{"custom_id": "x", "body": {"prompt": "a"}', "is not JSON: .* at character"),
    (b"[1]", "got list, wanted a JSON object"),
    (b'{"custom_id": "x", "body": {"prompt": "a", "prompt": "b"}}', "prompt: occurs twice"),
    (b'{"custom_id": "x", "body": {"prompt": "a", "top_p": NaN}}', "got NaN, wanted a number"),
    (b'{"custom_id": "x", "body": {"prompt": "\xff"}}', "byte 40 is not UTF-8"),
    (b"[" * 100000, "nested too deeply|is not JSON"),
    (b'{"custom_id": "x", "n": ' + b"1" * 5000 + b"}", "digits|integer"),
    (b'{"body": {"prompt": "a"}}', "custom_id: got None"),
    (b'{"custom_id": 5, "body": {"prompt": "a"}}', "custom_id: got 5"),
    (b'{"custom_id": "", "body": {"prompt": "a"}}', "wanted a string of 1 to 512"),
    (b'{"custom_id": "\\ud800", "body": {"prompt": "a"}}', "lone surrogate"),
    (b'{"custom_id": "x", "body": []}', "body: got list"),
    (b'{"custom_id": "x", "bdy": 1, "body": {"prompt": "a"}}', "bdy: unknown"),
    (b'{"custom_id": "x", "method": "GET", "body": {"prompt": "a"}}', "method: got GET"),
    (b'{"custom_id": "x", "url": "/v1/chat/completions", "body": {"prompt": "a"}}',
     "url: got /v1/chat/completions, wanted '/v1/completions'"),
    (b'{"custom_id": "x", "url": 5, "body": {"prompt": "a"}}', "url: got 5"),
    (b'{"custom_id": "x", "body": {}}', "got neither of messages and prompt"),
    (line(messages=[]), "got both of messages and prompt"),
    (line(stream=True), "body.stream"),
    (line(prompt=""), "body.prompt: got"),
    (line(prompt=["a", "b"]), "body.prompt: got"),
    (line(prompt=[1, True]), "body.prompt: got"),
    (line(temperature=-1), "temperature: got -1"),
    (line(temperature="hot"), "temperature: got str"),
    (line(top_q=1), "body.top_q: unknown"),
    (line(max_tokens=5, max_completion_tokens=5), "two names for one thing"),
    (line(n=0), "n: got 0"),
    (line(seed=-1), "seed: got -1"),
    (line(logit_bias={"a": 1}), "body.logit_bias: got a"),
    (line(top_logprobs=1), "body.top_logprobs"),
    (line(logits_processor="x"), "body.logits_processor: not available"),
    (line(regex="x"), "body.regex: unknown or not available"),
    (line(response_format={"type": "json_object"}), "body.response_format"),
    (b'{"custom_id": "x", "body": {"messages": [{"role": "nobody"}]}}', "messages"),
    (b'{"custom_id": "x", "body": {"messages": "a"}}', "body.messages"),
    (b'{"custom_id": "x", "body": {"messages": [{"role": "user", "content": "a"}], "logprobs": 2}}',
     "body.logprobs: got 2, wanted true or false"),
    (b'{"custom_id": "first", "body": {"prompt": "a"}}',
     "custom_id: got 'first' again, it is that of line 1"),
]


@pytest.mark.parametrize(("bad", "says"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_lines_are_refused_before_anything(tmp_path: Path, bad: bytes, says: str) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = json.dumps({"custom_id": "first", "body": {"prompt": "a"}}).encode()
    others = b"".join(b'{"id": "%d", "prompt": "a"}\n' % i for i in range(5))
    source.write_bytes(good + b"\n" + others + bad + b"\n")

    def load() -> dsv4.Model:
        raise AssertionError("a model was loaded")

    with pytest.raises(dsv4.FormatError, match=f"in.jsonl: line 7: .*(?:{says})"):
        work(load, source, output)
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl"}


def test_skipped_lines_go_to_the_error_file(tmp_path: Path, model: dsv4.Model) -> None:
    good = [json.dumps({"custom_id": f"g{i}", "body": {"prompt": "a", "max_tokens": 1}}).encode()
            for i in range(3)]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(
        [line(), good[0], b"{", good[1], good[0], line(top_k=10**10), good[2]]))
    with pytest.raises(dsv4.FormatError, match="line 1: begins with a byte order mark.*; line 3"):
        work(model, source, output)
    report = work(model, source, output, skip_invalid=True)
    assert (report.rows, report.failed, report.skipped) == (3, 0, 4)
    assert [row["custom_id"] for row in read(output)] == ["g0", "g1", "g2"]
    errors = read(tmp_path / "out.errors.jsonl")
    assert [row["error"]["line"] for row in errors] == [1, 3, 5, 6]
    assert errors[2]["error"]["message"].startswith("line 5: custom_id: got 'g0' again")


def test_line_ends_and_the_last_line(tmp_path: Path, model: dsv4.Model) -> None:
    texts = [json.dumps({"id": str(i), "prompt": "a", "max_tokens": 1}) for i in range(3)]
    wanted = None
    for i, (end, last) in enumerate((("\n", "\n"), ("\r\n", "\r\n"), ("\n", ""), ("\r\n", ""))):
        source, output = tmp_path / f"in{i}.jsonl", tmp_path / f"out{i}.jsonl"
        source.write_bytes((end.join(texts) + last).encode())
        assert work(model, source, output).rows == 3
        wanted = wanted or output.read_bytes()
        assert output.read_bytes() == wanted
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert work(model, empty, tmp_path / "none.jsonl").rows == 0
    assert (tmp_path / "none.jsonl").read_bytes() == b""


def test_a_line_of_100_megabytes(tmp_path: Path, script: Callable[..., Any]) -> None:
    source = tmp_path / "in.jsonl"
    with source.open("wb") as file:
        file.write(b'{"id": "a", "prompt": "a"}\n{"id": "b", "prompt": "')
        for _ in range(100):
            file.write(b"x" * 10**6)
        file.write(b'"}\n{"id": "c", "prompt": "c"}\n')
    done = script("""
import resource, sys
from dsv4.batch_input import read_lines
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lines, _ = read_lines(sys.argv[1])
print([line.fault for line in lines])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
""", str(source))
    faults, grown = done.stdout.splitlines()
    assert faults == "[None, 'got 100,000,026 bytes, wanted at most 33,554,432', None]"
    assert int(grown) < 80, done.stderr
    assert batch_input.MOST_LINE_BYTES == 33554432


def test_an_input_that_changes_meanwhile(
    job: tuple[Path, Path, bytes], model: dsv4.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output, _ = job
    check = batch_jobs._Defaults.check

    def swap(self: Any, path: Path, one: Any) -> Any:
        checked = check(self, path, one)
        if one.number == 40:
            source.write_bytes(source.read_bytes().replace(b"row 0", b"row x"))
        return checked

    monkeypatch.setattr(batch_jobs._Defaults, "check", swap)
    with pytest.raises(ValueError, match="line 1 of the input is not what it was"):
        work(model, source, output)


@pytest.mark.parametrize(("arguments", "error", "says"), [
    (dict(seed=-1), ValueError, "seed: got -1"),
    (dict(concurrency=0), ValueError, "concurrency: got 0"),
    (dict(temperature=-1), ValueError, "temperature"),
    (dict(top_q=1), TypeError, "did you mean 'top_p'"),
    (dict(logits_processor=len), TypeError, "logits_processor: not available in a job"),
])
def test_refused_arguments(
    job: tuple[Path, Path, bytes], model: dsv4.Model, arguments: dict[str, Any],
    error: type[Exception], says: str
) -> None:
    source, output, _ = job
    with pytest.raises(error, match=says):
        dsv4.run_batch(model, source, output, **arguments)
    assert not output.exists() and not partial(output).exists()


def test_the_command(
    job: tuple[Path, Path, bytes], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output, whole = job
    monkeypatch.setenv("DSV4_NUM_THREADS", "1")
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert main(["batch", str(source), str(output), "--json", "--limit-memory", "2G"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["rows"] == 40 and told["failed"] == 0 and output.read_bytes() == whole
    assert before == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert main(["batch", str(source), str(output), "--seed", "3"]) == 1
    assert "seed: the job there has 0, this one 3" in capfd.readouterr().err
    assert main(["batch", str(source), str(output), "--seed", "3", "--force-new"]) == 0
    assert "40 of 40 rows answered" in capfd.readouterr().out and output.read_bytes() != whole
