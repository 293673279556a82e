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

PROMPT, DECODE = 384, 8  # tokens: of the prompt before decoding, of one sample
SHORT = 128  # tokens that show which setting of the peer is not worth timing
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


def screen(engines: Mapping[str, Engine], pieces: list[Array]) -> dict[str, Engine]:
    """The engines that may be the fastest: others take twice as long at least."""
    seconds = {key: timed(engine, pieces, 1) for key, engine in engines.items()}
    return {key: e for key, e in engines.items() if seconds[key] < 2 * min(seconds.values())}


def compare(
    ours: Engine, theirs: Mapping[str, Engine], vocab: int, rounds: int, threads: int,
    only: str | None, rows: Mapping[str, int], peer: str, note: str,
) -> list[Row]:
    """One row for each of `rows`: its name, with "decode" or "prefill" in it, and the tokens of
    the prompt (`only`: those whose name contains it).  The fastest of theirs counts.
    """
    prompt = np.random.default_rng(5).integers(0, vocab, max(PROMPT, *rows.values()))
    same = min(alike(ours, engine, prompt[:PROMPT]) for engine in theirs.values())
    found = []
    for name, length in rows.items():
        what = "decode" if "decode" in name else "prefill"
        if only and only not in name:
            continue
        if what == "decode":
            for engine in (ours, *theirs.values()):
                engine.prefill(prompt[:length])
            pieces = [prompt[i : i + DECODE] for i in range(0, PROMPT, DECODE)]
            chosen, times = screen(theirs, pieces), 3 * rounds  # short samples: more of them
        else:
            pieces = [prompt[:length]]
            chosen, times = screen(theirs, [prompt[:SHORT]]), rounds
        runs = {"ours": ours, **chosen}
        samples = common.alternate(
            {key: partial(timed, engine, pieces) for key, engine in runs.items()}, times, 0)
        best = common.fastest(samples)
        rate = {key: 1 / median(s) for key, s in samples.items()}
        behind = f"behind a prompt of {length}" if what == "decode" else f"prompt of {length}"
        found.append(Row(
            name, rate["ours"], "tokens/s", None, None, rate[best],
            common.times_faster(samples["ours"], samples[best]), f"{peer} {best}".strip(),
            threads, f"{note}, {behind}; cosine of logits {same:.3f}"))
        print("  " + found[-1].line(), file=sys.stderr)
    return found
