# SPDX-License-Identifier: Apache-2.0
"""Batch jobs whose input grows: the bytes of a job that had all lines at once, whenever and in
whatever pieces they came, and however often the job was killed."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_batch_jobs import partial, read, rows_of, start, wait_until_it_grows, write

import dsv4
from dsv4.batch_input import Growing
from dsv4.batch_jobs import work

END = b'{"end": true}\n'
# an invalid line, a second line with an id, a byte that is not UTF-8, no JSON, an empty line
BAD = [b'{"custom_id": "x", "body": {}}\n', b'{"custom_id": "row 3", "prompt": "a"}\n', b"\xff\n",
       b"{\n", b"\n"]


@pytest.fixture
def job(tmp_path: Path, model: dsv4.Model) -> tuple[Path, Path, bytes, list[bytes]]:
    """A file that is empty yet, the output, the lines to come, the result of all of them."""
    lines = write(tmp_path / "all.jsonl", rows_of(40)).read_bytes().splitlines(keepends=True)
    for i, bad in enumerate(BAD):
        lines.insert(7 * i + 5, bad)
    (tmp_path / "all.jsonl").write_bytes(b"".join(lines))
    work(model, tmp_path / "all.jsonl", tmp_path / "whole.jsonl", skip_invalid=True)
    source = tmp_path / "in.jsonl"
    source.touch()
    return source, tmp_path / "out.jsonl", b"".join(lines), lines


def append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


def grown(path: Path, data: bytes, seed: int) -> Callable[[], None]:
    """Appends the data in pieces that end anywhere, at random moments, then the end."""
    draw = random.Random(seed)

    def run() -> None:
        at = 0
        while at < len(data):
            piece = draw.choice([1, 30, 700, 4000])
            append(path, data[at : at + piece])
            at += piece
            time.sleep(draw.uniform(0, 0.02))
        append(path, END)

    return run


def same_as_whole(output: Path) -> None:
    for kind in ("", ".errors"):
        got, want = (output.with_name(f"{name}{kind}.jsonl").read_bytes()
                     for name in ("out", "whole"))
        assert got == want and got


def test_lines_in_any_pieces(
    job: tuple[Path, Path, bytes, list[bytes]], model: dsv4.Model
) -> None:
    source, output, data, _ = job
    writer = threading.Thread(target=grown(source, data, 1))
    writer.start()
    report = work(model, source, output, follow=True, concurrency=4)
    writer.join()
    assert (report.rows, report.skipped, report.failed) == (40, 5, 0)
    same_as_whole(output)
    append(source, b"what comes after the end is not read\n")
    again = work(model, source, output, follow=True, concurrency=1)
    assert (again.rows, again.skipped, again.resumed, again.failed) == (40, 5, 40, 0)
    with pytest.raises(ValueError, match="follow: the job there has True"):
        work(model, source, output, skip_invalid=True)


def test_killed_while_it_grows(
    job: tuple[Path, Path, bytes, list[bytes]], model: dsv4.Model
) -> None:
    source, output, _, lines = job
    draw = random.Random(3)
    for first in range(0, len(lines), 12):
        append(source, b"".join(lines[first : first + 12]))
        process = start(source, output, "--follow", "--concurrency", "3")
        wait_until_it_grows(process, partial(output), draw.randrange(1, 1500))
        process.kill()
        process.communicate()
    append(source, END)
    report = work(model, source, output, follow=True)
    assert report.rows == 40 and report.resumed > 0
    same_as_whole(output)


def until(seen: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_rows_are_answered_as_they_come_and_signals_end_it(
    job: tuple[Path, Path, bytes, list[bytes]], model: dsv4.Model
) -> None:
    source, output, data, lines = job
    log = partial(output)
    process = start(source, output, "--follow")
    append(source, lines[0] + lines[1][:20])
    until(lambda: log.exists() and b"row 0" in log.read_bytes())
    assert b"row 1" not in log.read_bytes()  # half a line is none
    append(source, lines[1][20:])
    until(lambda: b"row 1" in log.read_bytes())
    assert process.poll() is None and not output.exists()
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM and "SIGTERM" in told
    append(source, data[len(lines[0]) + len(lines[1]) :] + END)
    assert work(model, source, output, follow=True).resumed == 2
    same_as_whole(output)


def test_what_was_read_must_stay(
    job: tuple[Path, Path, bytes, list[bytes]], model: dsv4.Model
) -> None:
    source, output, data, lines = job
    append(source, lines[0] + lines[1])
    process = start(source, output, "--follow")
    until(lambda: partial(output).exists() and b"row 1" in partial(output).read_bytes())
    process.kill()
    process.communicate()
    for changed in (data.replace(b"ROMEO: 1", b"ROMEO: 7"), lines[0], b""):
        source.write_bytes(changed + END * (changed == data))
        with pytest.raises(ValueError, match="first [0-9,]+ bytes are not those that this job"):
            work(model, source, output, follow=True)
        assert not output.exists()
    source.write_bytes(data + END)
    assert work(model, source, output, follow=True).resumed == 2
    same_as_whole(output)


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", rows_of(3))
    with Growing(path) as growing:
        assert len(growing.read(2)) == 2 and len(growing.read(2)) == 1 and growing.read(2) == []
        os.truncate(path, 100)
        with pytest.raises(ValueError, match="fewer than the .* it may only grow"):
            growing.read(2)


def test_a_line_as_large_as_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsv4.batch_input, "MOST_LINE_BYTES", 2000)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"x" * 5000)
    with Growing(path) as growing:
        assert growing.read(9) == [] == growing.read(9)
        append(path, b"x\n" + json.dumps(rows_of(1)[0]).encode() + b"\n" + END)
        first, second = growing.read(9)
        assert "5,002 bytes" in (first.fault or "") and second.fault is None and growing.ended
        assert second.offset == 5002 and second.number == 2


def test_a_poisoned_row(poisoned: dsv4.Model, tmp_path: Path) -> None:
    rows = [{"custom_id": str(i), "prompt": [0, 77 if i == 2 else 5, i], "max_tokens": 2}
            for i in range(5)]
    source = write(tmp_path / "in.jsonl", [*rows, {"end": True}])
    report = work(poisoned, source, tmp_path / "out.jsonl", follow=True)
    assert (report.rows, report.failed) == (5, 1)
    assert [row["custom_id"] for row in read(tmp_path / "out.errors.jsonl")] == ["2"]


@pytest.fixture(autouse=True)
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.glob("*.tmp"))
