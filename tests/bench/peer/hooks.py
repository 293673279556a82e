# SPDX-License-Identifier: Apache-2.0
"""What the router of every layer chose for a prompt: `Model.trace` beside hooks in transformers.

The same weights, threads and prompt as in eager.py; hooks on transformers' routers keep what they
return.  Both sides give experts and weights as NumPy arrays; the faster dtype of transformers
counts.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from peer import common, eager, synthetic, whole
from peer.common import Array, Row

PROMPT, SHORT = 4096, 512  # SHORT shows which dtype is the faster
ROUNDS = 3  # a prompt of transformers takes a while


class Hooked:
    """transformers, with a hook on every router."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.engine = eager.Theirs(folder, dtype)
        self.seen: list[tuple[Any, ...]] = []
        for layer in self.engine.model.model.layers:
            layer.mlp.gate.register_forward_hook(
                lambda module, arguments, out: self.seen.append(out))

    def router(self, ids: Array) -> list[tuple[Array, Array]]:
        """Experts and weights of each layer, for every token."""
        self.seen.clear()
        self.engine.prefill(ids)
        return [(out[2].numpy(), out[1].float().numpy()) for out in self.seen]


class Traced:
    """dsv4, with a trace."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.model = whole.Ours(folder, threads).model

    def router(self, ids: Array) -> list[tuple[Array, Array]]:
        """Experts and weights of each layer, for every token."""
        with self.model.trace(ids, router=True) as t:
            return [(t.router[i].experts, t.router[i].weights) for i in t.layers]


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(threads: int, only: str | None, folder: Path) -> list[Row]:
    """One row; the files are kept in `folder`."""
    eager.check_installed()
    if only and only not in "trace_router_4k":
        return []
    import torch

    torch.set_num_threads(threads)
    config = eager.config_of("small")
    there = synthetic.write(folder / "small", config)
    ours, theirs = Traced(there, threads), {d: Hooked(there, d) for d in eager.DTYPES}
    prompt = np.random.default_rng(5).integers(0, config["vocab_size"], PROMPT)
    taken = {dtype: seconds(partial(each.router, prompt[:SHORT])) for dtype, each in theirs.items()}
    best = min(taken, key=lambda dtype: taken[dtype])
    mine, other = ours.router(prompt[:SHORT]), theirs[best].router(prompt[:SHORT])
    same = float(np.mean([
        len(set(a) & set(b)) / len(a)
        for (x, _), (y, _) in zip(mine, other, strict=True) for a, b in zip(x, y, strict=True)]))
    if same < 0.7:
        raise RuntimeError(f"experts both chose: got {same:.2f}, at least 0.7 was expected")
    pairs = [(seconds(partial(ours.router, prompt)), seconds(partial(theirs[best].router, prompt)))
             for _ in range(ROUNDS)]
    a, b = median(p[0] for p in pairs), median(p[1] for p in pairs)
    found = Row(
        "trace_router_4k_vs_transformers", PROMPT / a, "tokens/s", None, None, PROMPT / b,
        median(p[1] / p[0] for p in pairs),
        f"transformers {common.version('transformers')}, torch {torch.__version__}, {best}, hooks",
        threads, f"{config['num_hidden_layers']} layers of {config['hidden_size']}, prompt of "
        f"{PROMPT}; {same:.2f} of the experts are the same")
    print("  " + found.line(), file=sys.stderr)
    return [found]
