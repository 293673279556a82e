# SPDX-License-Identifier: Apache-2.0
"""Layers of V4-Flash's dimensions: prompt and decode give the same bits; Ctrl-C within 250 ms."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from true_shape import make

import dsv4

LIMIT = 0.25


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dsv4.Model]:
    folder = make(tmp_path_factory.mktemp("true") / "flash", (4, 128), experts=8)
    with dsv4.load(folder) as loaded:
        yield loaded


def interrupt_after(seconds: float, run: threading.Event, sent: list[float]) -> threading.Thread:
    """Sends SIGINT to this process after `seconds`, unless `run` is set before."""

    def send() -> None:
        if not run.wait(seconds):
            sent.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_one_piece_equals_token_by_token(model: dsv4.Model) -> None:
    ids = np.random.default_rng(1).integers(0, 4096, 140)
    whole = model.session().append(ids, logits="all")
    session = model.session()
    session.append(ids[:130], logits="none")
    for i in range(130, 140):
        assert np.array_equal(session.append(ids[i : i + 1], logits="last")[0], whole[i])


@pytest.mark.parametrize("delay", [0.05, 0.4, 0.9])
def test_ctrl_c_in_a_long_prompt(model: dsv4.Model, delay: float) -> None:
    session = model.session()
    session.append([1, 2, 3], logits="none")
    ids = np.random.default_rng(2).integers(0, 4096, 2000)
    done, sent = threading.Event(), []
    thread = interrupt_after(delay, done, sent)
    with pytest.raises(KeyboardInterrupt):
        try:
            session.append(ids, logits="last")
        finally:
            stopped = time.perf_counter()
            done.set()
            thread.join()
    assert stopped - sent[0] <= LIMIT
    assert session.position == 3
    fresh = model.session()
    fresh.append([1, 2, 3], logits="none")
    assert np.array_equal(session.append([4]), fresh.append([4]))


def test_ctrl_c_while_decoding(model: dsv4.Model) -> None:
    done, sent = threading.Event(), []
    thread = interrupt_after(0.5, done, sent)
    session = model.session()
    with pytest.raises(KeyboardInterrupt):
        try:
            while True:
                session.append([5], logits="last")
        finally:
            stopped = time.perf_counter()
            done.set()
            thread.join()
    assert stopped - sent[0] <= LIMIT
    assert session.tokens.tolist() == [5] * session.position
