# SPDX-License-Identifier: Apache-2.0
"""`dsv4 batch`: its arguments, and the signals that end it without losing a row."""

import argparse
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4.batch_jobs import BatchReport
    from dsv4.model import Model

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DESCRIPTION = """\
Answers a JSONL file of requests in OpenAI's batch form (custom_id, body with messages or prompt).
Each row that is done is on disk at once: after Ctrl-C, a kill or a full disk, the same command goes
on and gives the same bytes.  Rows that fail are in OUT.errors.jsonl."""


class Stopped(BaseException):
    """A signal asked to end; raised once."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def add_arguments(batch: argparse.ArgumentParser) -> None:
    """The arguments of `dsv4 batch` alone; those of models and sampling are shared."""
    batch.add_argument("input", metavar="IN.jsonl")
    batch.add_argument("output", metavar="OUT.jsonl")
    batch.add_argument("--concurrency", type=int, metavar="N",
                       help="sequences at the same time; by default what fits, at most 64")
    batch.add_argument("--skip-invalid", action="store_true",
                       help="lines that are not valid go to the error file")
    batch.add_argument("--follow", action="store_true",
                       help='read lines as they are appended, until the line {"end": true}; those '
                       "that are not valid go to the error file")
    batch.add_argument("--force-new", action="store_true",
                       help="begin again, replacing what is there")


def run(
    load: "Callable[[], Model]", arguments: dict[str, Any]
) -> "tuple[int, BatchReport | None]":
    """The job until its end or a signal; the exit code, and the report of a job that is done."""
    from dsv4.batch_jobs import work

    before = {number: signal.getsignal(number) for number in SIGNALS}
    stopped = False

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal stopped
        if not stopped:  # what is done is being written: later ones wait for that
            stopped = True
            raise Stopped(number)

    try:
        for number in SIGNALS:
            if before[number] is not signal.SIG_IGN or number == signal.SIGINT:
                signal.signal(number, stop)
        return 0, work(load, **arguments)
    except Stopped as end:
        name = signal.Signals(end.number).name
        print(f"dsv4: {name}: what is done is kept; the same command goes on", file=sys.stderr)
        return 128 + end.number, None
    finally:
        if stopped:  # the command is about to end, with its own code: later signals wait for ever
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for number, handler in before.items():  # Python's handlers are called up to here
            signal.signal(number, signal.SIG_IGN if stopped else handler)
