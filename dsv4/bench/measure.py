# SPDX-License-Identifier: Apache-2.0
"""Times beside their limits: each measurement stands between two of its limit, seconds apart.

The better of the two limits counts; a row gives the medians of value, limit and ratio over all
pairs.  A pair whose two limits differ by more than 15 % is unsteady: the report says how many are.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from dsv4 import _core
from dsv4.bench import count, synthetic
from dsv4.bench.limits import Limits, Rates
from dsv4.checkpoint import Checkpoint, TensorInfo
from dsv4.model import Model
from dsv4.session import Session

LONG_ROW_SECONDS = 50.0  # a row that would take longer stops at the least number of pairs, or at
# one that takes longer itself
# a run that takes longer outlasts the minute of its limits: those typical of the whole benchmark
# count too, where they are higher
LONG_RUN_SECONDS = 10.0
UNSTEADY = 0.15
PROBED_LAYERS = 8


@dataclass(frozen=True, slots=True)
class Row:
    """One result.  `limit` and `ratio` are None where this machine has no such limit.

    ratio is value / limit; `peer` is what another engine reached beside it, `peer_ratio` how many
    times as fast dsv4 was.
    """

    name: str
    value: float
    unit: str
    limit: float | None
    ratio: float | None
    peer: float | None = None
    peer_ratio: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Pair(NamedTuple):
    """Seconds measured, and seconds at the limits around them (None: there is no such limit)."""

    seconds: float
    ideal: float | None


def row(name: str, amount: float, unit: str, pairs: Sequence[Pair]) -> Row:
    """Medians of amount a second.

    Examples
    --------
    >>> row("read", 3.0, "GB/s", [Pair(1.0, 0.5), Pair(2.0, 0.5), Pair(1.0, 0.75)])
    Row(name='read', value=3.0, unit='GB/s', limit=6.0, ratio=0.5, peer=None, peer_ratio=None)
    """
    value = median(amount / p.seconds for p in pairs)
    ideals = [p.ideal for p in pairs if p.ideal is not None]
    if len(ideals) < len(pairs):
        return Row(name, value, unit, None, None)
    limit = median(amount / ideal for ideal in ideals)
    return Row(name, value, unit, limit, median(
        ideal / p.seconds for p, ideal in zip(pairs, ideals, strict=True)))


class Bench:
    """What the measurements share: the model, its limits, how often, and random ids.

    Parameters
    ----------
    checkpoint : Checkpoint
        Made by `synthetic.build`.
    model : Model
        Of it.
    disable : str or None
        Instruction sets it does not use.
    repeats, least : int
        Pairs of each row, and of rows that take long.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: Model, disable: str | None, repeats: int,
        least: int = 1,
    ) -> None:
        self.checkpoint, self.model = checkpoint, model
        self.disable, self.repeats, self.least = disable, repeats, min(least, repeats)
        self.config = checkpoint.config
        self.threads = model.threads
        self.tensors = list(checkpoint.tensors.values())
        self.rng = np.random.default_rng(11)
        self.kept: list[Any] = []  # arrays whose memory the limits read
        self.limits = Limits(self._pieces(), disable)
        self.models: dict[str, tuple[Checkpoint, Model]] = {}
        self.touched: dict[int, float] = {}
        self.details: dict[str, dict[str, Any]] = {}
        self.seen: dict[tuple[int, str], list[float]] = {}  # every limit measured, by threads
        for _ in self.limits.pieces:  # every page is mapped before anything is timed
            self.limits.read(self.threads)

    def close(self) -> None:
        for _, model in self.models.values():
            model.close()
        self.models.clear()

    def note(self, name: str, **facts: Any) -> None:
        """Keep facts about a row for the report.

        For the roofline: `operations` and `bytes` of one run, and its `amount` in the row's unit
        times seconds.
        """
        self.details.setdefault(name, {}).update(facts)

    # ---- memory ----

    def address(self, name: str) -> int:
        """Where a tensor lies in this process."""
        view = self.model._core.tensor(name)
        return int(view.ctypes.data)

    def _pieces(self) -> list[tuple[int, int]]:
        """The mapped files of layers, those with experts."""
        pieces = []
        for i, shard in enumerate(self.checkpoint.shards):
            first = next((info for info in self.tensors
                          if info.shard == i and count.class_of(info) == count.EXPERTS), None)
            if first is None:
                continue
            self.kept.append(self.model._core.tensor(first.name))
            pieces.append((self.address(first.name) - first.offset, shard.size))
        return pieces

    # ---- pairs ----

    def pairs(
        self, name: str, run: Callable[[], float], ideal: Callable[[Rates], float | None],
        needs: Sequence[str], threads: int | None = None,
    ) -> list[Pair]:
        """Measurements with limits before and after each.

        Parameters
        ----------
        name : str
            Of the row.
        run : function
            Does it once; seconds.
        ideal : function of Rates
            Seconds it would take at these rates.
        needs : sequence of str
            The rates that `ideal` uses.
        threads : int, optional
            With which the limits are measured; those of the model by default.
        """
        threads = self.threads if threads is None else threads
        found: list[Pair] = []
        unsteady = 0
        began = time.perf_counter()
        while len(found) < self.repeats:
            before = self._limits(threads, needs)
            seconds = run()
            after = self._limits(threads, needs)
            best = before.best(after)
            if seconds > LONG_RUN_SECONDS:
                best = best.best(self._typical(threads, needs))
            found.append(Pair(seconds, ideal(best)))
            unsteady += any(
                abs(a - b) > UNSTEADY * max(a, b) for a, b in zip(before, after, strict=True))
            long = time.perf_counter() - began + seconds > LONG_ROW_SECONDS
            if long and (len(found) >= self.least or seconds > LONG_ROW_SECONDS):
                break
        self.note(name, pairs=len(found), unsteady=unsteady)
        return found

    def _limits(self, threads: int, needs: Sequence[str]) -> Rates:
        rates = self.limits.measure(threads, needs)
        for need in needs:
            self.seen.setdefault((threads, need), []).append(getattr(rates, need))
        return rates

    def _typical(self, threads: int, needs: Sequence[str]) -> Rates:
        return Rates(**{need: median(self.seen[threads, need]) for need in needs})

    # ---- steps ----

    def ids(self, n: int) -> Any:
        """Random token ids that have embedding rows."""
        high = min(self.config.vocab_size, synthetic.USED_IDS)
        return self.rng.integers(0, high, n).astype(np.int32)

    @contextmanager
    def sessions(self, n: int, position: int, model: Model | None = None) -> Iterator[
            list[Session]]:
        """Sessions that stand at a position, closed at the end."""
        made = [(model or self.model).session() for _ in range(n)]
        try:
            for i, session in enumerate(made):
                session._fill(position, i)
            yield made
        finally:
            for session in made:
                session.close()

    def phases(self, session: Session) -> dict[str, float]:
        """Seconds of one step of one token, by what its first thread did."""
        seconds = np.zeros(len(_core.PHASES), np.float32)
        self.model._core.step([(session._core, self.ids(1), 1, None)], seconds)
        return dict(zip(_core.PHASES, seconds.tolist(), strict=True))

    def step(self, sessions: Sequence[Session], n: int, logits: int = 1) -> float:
        """Seconds of one step that appends n random ids to each session."""
        ids = [self.ids(n) for _ in sessions]
        segments = [(s._core, i, logits, None) for s, i in zip(sessions, ids, strict=True)]
        core = sessions[0].model._core
        began = time.perf_counter()
        core.step(segments, None)
        return time.perf_counter() - began

    def experts(self, n_tok: int) -> float:
        """Distinct experts a layer reads in a step of so many tokens, each of its own session.

        What the router chose, averaged over up to eight layers.
        """
        if n_tok == 1:
            return float(self.config.num_experts_per_tok)
        if n_tok not in self.touched:
            layers = range(self.config.num_hidden_layers)
            some = layers[:: -(-len(layers) // PROBED_LAYERS)]
            seen = []
            with self.sessions(n_tok, 0) as sessions:
                value, k = _core.VALUES.index("experts"), self.config.num_experts_per_tok
                chosen = np.empty((len(some), n_tok, 1, k), np.int32)
                self.model._core.step(
                    [(session._core, self.ids(1), 0, None,
                      [(layer, value, chosen[i, at]) for i, layer in enumerate(some)])
                     for at, session in enumerate(sessions)], None)
                seen += [len(np.unique(layer)) for layer in chosen]
            self.touched[n_tok] = sum(seen) / len(seen)
        return self.touched[n_tok]

    def decode_bytes(self, position: int, batch: int = 1) -> dict[str, int]:
        """Bytes that one step reads, by class."""
        found = count.weight_bytes(self.tensors, self.config, position, self.experts(batch))
        for kind, n in count.state_bytes(self.config, position).items():
            found[kind] = n * batch
        return found

    def decode_work(self, position: int, batch: int = 1) -> tuple[float, count.Work]:
        """Operations of one step, each sequence with logits: linear layers, and the rest."""
        weights = count.weights_per_token(self.tensors, self.config)
        index = weights.scores * count.scored(self.config, position)
        work = count.attention_work(self.config, position, 1)
        return (2.0 * batch * (weights.layers + index + weights.head),
                count.Work(batch * work.dot, batch * work.byte))

    def layer_tensors(self, layer: int) -> list[TensorInfo]:
        return count.layer_tensors(self.checkpoint.tensors, layer)
