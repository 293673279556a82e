# SPDX-License-Identifier: Apache-2.0
"""End to end: a prompt, then single tokens behind it, through dsv4 and another engine in turns."""

import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Protocol

import numpy as np

import dsv4
from peer import common
from peer.common import Array, Row

PROMPT, DECODE = 384, 8  # tokens of one sample
LEAST_COSINE = 0.7


class Engine(Protocol):
    """One sequence of an engine: both calls give the logits of the last token."""

    def prefill(self, ids: Array) -> Array:
        """Forget everything; run a prompt."""

    def decode(self, token: int) -> Array:
        """Run one token behind it."""


class Ours:
    """dsv4."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.model = dsv4.load(folder, threads=threads)
        self.session = self.model.session()

    def prefill(self, ids: Array) -> Array:
        """Logits of the last token."""
        self.session = self.model.session()
        return np.asarray(self.session.append(ids, logits="last")[0])

    def decode(self, token: int) -> Array:
        """Logits of the token."""
        return np.asarray(self.session.append([token], logits="last")[0])


def alike(ours: Engine, theirs: Engine, prompt: Array) -> float:
    """The mean cosine of the logits after a prompt and some tokens; an error if it is low.

    The peers round neither activations nor KV rows as the official code does, and made-up weights
    route many tokens by a hair: about 0.9 to 0.99, where unrelated models give 0.
    """
    pairs = [(ours.prefill(prompt), theirs.prefill(prompt))]
    pairs += [(ours.decode(int(t)), theirs.decode(int(t))) for t in prompt[:DECODE]]
    mean = float(np.mean([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairs]))
    if not mean >= LEAST_COSINE:
        raise RuntimeError(
            f"cosine of both engines' logits: got {mean:.3f}, at least {LEAST_COSINE} was expected")
    return mean


def timed(engine: Engine, pieces: list[Array], i: int) -> float:
    """Seconds per token of piece i: token by token, or as a prompt if it is the only one."""
    time.sleep(0.02)  # the other side's threads go to sleep
    ids = pieces[i % len(pieces)]
    start = time.perf_counter()
    if len(pieces) == 1:
        engine.prefill(ids)
    else:
        for token in ids:
            engine.decode(int(token))
    return (time.perf_counter() - start) / len(ids)


def compare(
    ours: Engine, theirs: Mapping[str, Engine], vocab: int, rounds: int, threads: int,
    only: str | None, name: str, peer: str, note: str,
) -> list[Row]:
    """Rows `name` with {what} filled in by decode and prefill; the fastest of theirs counts."""
    prompt = np.random.default_rng(5).integers(0, vocab, PROMPT)
    same = min(alike(ours, engine, prompt) for engine in theirs.values())
    pieces = {
        "decode": [prompt[i : i + DECODE] for i in range(0, PROMPT, DECODE)], "prefill": [prompt],
    }
    rows = []
    for what, cut in pieces.items():
        if only and only != what:
            continue
        runs = {"ours": ours, **theirs}
        samples = common.alternate(
            {key: partial(timed, engine, cut) for key, engine in runs.items()}, rounds)
        best = common.fastest(samples)
        rate = {key: 1 / median(times) for key, times in samples.items()}
        rows.append(Row(
            name.format(what=what), rate["ours"], "tokens/s", None, None, f"{peer} {best}".strip(),
            common.times_faster(samples["ours"], samples[best]), threads,
            f"{rate[best]:.1f} tokens/s there; {note}; cosine of the logits {same:.3f}"))
        print("  " + rows[-1].line(), file=sys.stderr)
    return rows
