# SPDX-License-Identifier: Apache-2.0
"""The clock of a step: its phases are what the layers contain, and add up to the step's time."""

import time

import numpy as np
import pytest
from harness import load, prompt

from dsv4 import _core


def timed(session, ids):
    seconds = np.zeros(len(_core.PHASES), np.float32)
    start = time.perf_counter()
    session.model._core.step([(session._core, ids, 1, None)], seconds)
    wall = time.perf_counter() - start
    return dict(zip(_core.PHASES, seconds.tolist(), strict=True)), wall


@pytest.mark.parametrize("threads", [1, 2])
def test_phases_add_up_to_the_step(nano, threads: int) -> None:
    with load(nano("nano-flash"), threads=threads) as model:
        session = model.session()
        parts, wall = timed(session, prompt(model, 300))
        assert min(parts.values()) >= 0
        assert 0.3 * wall < sum(parts.values()) < wall
        for name in ("fp8", "fp4", "bf16", "f32", "attention", "indexer", "other"):
            assert parts[name] > 0, name
        assert threads > 1 or parts["wait"] < 0.05 * wall


def test_no_clock_no_change(nano) -> None:
    with load(nano("nano-flash")) as model:
        ids = prompt(model, 20)
        a, b = model.session(), model.session()
        timed(a, ids[:19])
        b.append(ids[:19], logits="none")
        assert np.array_equal(a.append(ids[19:]), b.append(ids[19:]))
