# SPDX-License-Identifier: Apache-2.0
"""The rows: what is measured, in which unit, against which limit."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np

from dsv4 import _core
from dsv4.bench import count, linears, synthetic
from dsv4.bench.limits import Rates, last_level_cache
from dsv4.bench.measure import Bench, Row, row
from dsv4.checkpoint import Checkpoint
from dsv4.model import Model

LONG_CONTEXT = 1 << 17  # from here on operations count in the limit of a decoded token
PREFILL_LINEAR = 384
PREFILL_EXPERTS = 48  # tokens an expert of the whole model sees in a pass
LAYER_RUNS = 4
CONTEXTS = {"1k": 1 << 10, "4k": 1 << 12, "32k": 1 << 15, "128k": 1 << 17, "1m": 1 << 20}
PROMPTS = {"512": 512, "2k": 2048, "8k": 8192, "32k": 32768}
STEP_TOKENS = 4


class Case(NamedTuple):
    """A row and how it is measured; quick: it belongs to the quick run as well."""

    name: str
    what: str
    quick: bool
    run: Callable[[Bench, str], Row]


def _share(amount: float, rate: float) -> float | None:
    """Seconds of an amount at a rate; None where the machine has no such rate."""
    return amount / rate if rate else None if amount else 0.0


def _sum(*parts: float | None) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


# ---- linear kernels ----

def _linear_few(fmt: str, everyone: bool, disable: str) -> Callable[[Bench, str], Row]:
    def run(bench: Bench, name: str) -> Row:
        off = ",".join(filter(None, (bench.disable, disable)))
        which = linears.kernel(fmt, 1, off)
        threads = bench.threads if everyone else 1
        sweep = linears.Sweep(_pool(bench, fmt, 4 * last_level_cache()), 1)
        sweep.seconds(which, threads)
        pairs = bench.pairs(
            name, lambda: sweep.seconds(which, threads),
            lambda r: _share(sweep.nbytes, r.read), ("read",), threads)
        bench.note(name, operations=sweep.operations, bytes=sweep.nbytes,
                   amount=sweep.nbytes / 1e9, kernel=which.name)
        return row(name, sweep.nbytes / 1e9, "GB/s", pairs)

    return run


def _pool(bench: Bench, fmt: str, least: int) -> list[linears.Matrix]:
    """Weights of one format, of every layer in turn; the head among those of bf16."""
    code = linears.FORMATS[fmt]
    found = [m for m in linears.matrices(bench.tensors, bench.address) if m.format == code]
    vocab = bench.config.vocab_size
    if fmt == "bf16":  # the embedding has the head's shape and is no linear layer
        first = bench.address("embed.weight")
        found = [m for m in found if m.data != first]
        found.sort(key=lambda m: m.rows == vocab)
    return linears.pool(found, max(least, 256 << 20))


def _linear_many(formats: Sequence[str], n_tok: int) -> Callable[[Bench, str], Row]:
    """What a token meets in the last layer: all its weights, and as many experts as a token has."""

    def run(bench: Bench, name: str) -> Row:
        last = bench.layer_tensors(bench.config.num_hidden_layers - 1)
        matrices = linears.matrices(last, bench.address)
        experts = bench.config.num_experts_per_tok * 3
        found = {
            fmt: [m for m in matrices if m.format == linears.FORMATS[fmt]][
                : experts if fmt == "fp4" else None]
            for fmt in formats}
        sweeps = {f: linears.Sweep(ms, n_tok) for f, ms in found.items()}
        kernels = {f: linears.kernel(f, n_tok, bench.disable) for f in sweeps}
        operations = sum(sweep.operations for sweep in sweeps.values())

        def once() -> float:
            return sum(sweep.seconds(kernels[f], bench.threads) for f, sweep in sweeps.items())

        once()
        pairs = bench.pairs(name, once, lambda r: _share(operations, r.exact), ("exact",))
        nbytes = sum(sweep.nbytes for sweep in sweeps.values())
        names = ", ".join(sorted({which.name for which in kernels.values()}))
        bench.note(name, operations=operations, bytes=nbytes, amount=operations / 1e9,
                   kernel=names)
        return row(name, operations / 1e9, "GFLOP/s", pairs)

    return run


# ---- decode ----

def _position(bench: Bench, context: int) -> int:
    """So that the steps of one row end within the context."""
    return min(context, bench.config.max_position_embeddings) - 4 * bench.repeats - 8


def _ideal(bench: Bench, position: int, batch: int = 1) -> Callable[[Rates], float | None]:
    """Seconds of one decode step at the limits.

    Reading the bytes, or the operations of the linear layers where these take longer (large
    batches); at long contexts also the operations of attention and index scores.
    """
    total = sum(bench.decode_bytes(position, batch).values())
    linear, work = bench.decode_work(position, batch)
    if position < LONG_CONTEXT // 2:
        work = count.Work()

    def ideal(rates: Rates) -> float | None:
        read, multiply = _share(total, rates.read), _share(linear, rates.exact)
        return _sum(max(read or 0.0, multiply or 0.0), _share(work.dot, rates.exact),
                    _share(work.byte, rates.byte))

    return ideal


def _decode(context: int, batch: int = 1, threads: int | None = None) -> Callable[
        [Bench, str], Row]:
    def run(bench: Bench, name: str) -> Row:
        position = _position(bench, context)
        model = _with_threads(bench, threads)
        ideal = _ideal(bench, position, batch)
        with bench.sessions(batch, position, model) as sessions:
            bench.step(sessions, 1)
            pairs = bench.pairs(
                name, lambda: bench.step(sessions, 1), ideal, ("read", "exact", "byte"), threads)
        linear, work = bench.decode_work(position, batch)
        bench.note(name, operations=linear + work.dot + work.byte, amount=batch,
                   experts=bench.experts(batch),
                   bytes=sum(bench.decode_bytes(position, batch).values()))
        return row(name, batch, "tokens/s", pairs)

    return run


def _with_threads(bench: Bench, threads: int | None) -> Model:
    """The model, or the same weights with another team."""
    if threads is None or threads == bench.threads:
        return bench.model
    key = f"{threads} threads"
    if key not in bench.models:
        model = synthetic.load(bench.checkpoint, threads)
        bench.models[key] = bench.checkpoint, model
    return bench.models[key][1]


def _scaling(bench: Bench, name: str) -> Row:
    """One thread's time over all threads' time; the limit is that of reading."""
    position = _position(bench, CONTEXTS["4k"])
    alone = _with_threads(bench, 1)
    with bench.sessions(1, position) as many, bench.sessions(1, position, alone) as one:
        bench.step(many, 1)
        bench.step(one, 1)
        found = []
        for _ in range(bench.repeats):
            limits = bench.limits.read(bench.threads) / bench.limits.read(1)
            found.append((bench.step(one, 1) / bench.step(many, 1), limits))
    value, limit = (median(part) for part in zip(*found, strict=True))
    return Row(name, value, "x one thread", limit, median(v / most for v, most in found))


def _added(bench: Bench, name: str) -> Row:
    """What a long context adds to a step, over what its bytes and operations cost.

    The details have the seconds added to each phase of the first thread.
    """
    short, long = (_position(bench, CONTEXTS[key]) for key in ("4k", "1m"))
    work = count.attention_work(bench.config, long, 1)
    base = count.attention_work(bench.config, short, 1)
    extra = (sum(bench.decode_bytes(long).values()) - sum(bench.decode_bytes(short).values()),
             work.dot - base.dot, work.byte - base.byte)

    def ideal(rates: Rates) -> float | None:
        return _sum(*(_share(n, rate) for n, rate in zip(extra, rates, strict=True)))

    with bench.sessions(1, short) as near, bench.sessions(1, long) as far:
        bench.step(near, 1)
        bench.step(far, 1)
        pairs = bench.pairs(
            name, lambda: bench.step(far, 1) - bench.step(near, 1), ideal,
            ("read", "exact", "byte"))
        phases = [(bench.phases(far[0]), bench.phases(near[0])) for _ in range(bench.repeats)]
    bench.note(name, **{
        phase: median(late[phase] - early[phase] for late, early in phases)
        for phase in phases[0][0]})
    if not all(pair.ideal for pair in pairs):
        return Row(name, median(p.seconds for p in pairs) * 1e3, "ms", None, None)
    value = median(p.seconds / p.ideal for p in pairs if p.ideal)
    return Row(name, value, "x bytes and operations", 1.0, value)


def _step_4tok(bench: Bench, name: str) -> Row:
    """Four tokens in a step over one, time of the further experts' bytes taken off.

    Those bytes at the rate at which the one-token step read its own.
    """
    position = _position(bench, CONTEXTS["4k"])
    one = sum(bench.decode_bytes(position).values())
    further = bench.experts(STEP_TOKENS) - bench.experts(1)
    extra = further * count.expert_bytes(bench.tensors, bench.config)
    found = []
    with bench.sessions(1, position) as sessions:
        bench.step(sessions, 1)
        bench.step(sessions, STEP_TOKENS, 2)
        for _ in range(bench.repeats):
            alone = bench.step(sessions, 1)
            found.append((bench.step(sessions, STEP_TOKENS, 2) - extra / one * alone) / alone)
    bench.note(name, experts=bench.experts(STEP_TOKENS))
    value = median(found)
    return Row(name, value, "x one token", 1.0, value)


def _outside(bench: Bench, name: str) -> Row:
    """The share of a step in which its first thread does nothing that the limits count.

    All but linear layers, attention and index scores; waiting for other threads included.
    """
    found: list[dict[str, float]] = []
    with bench.sessions(1, _position(bench, CONTEXTS["4k"])) as (session,):
        bench.phases(session)
        for _ in range(bench.repeats):
            seconds = bench.phases(session)
            total = sum(seconds.values())
            found.append({phase: part / total for phase, part in seconds.items()})
    value = median(shares["other"] + shares["wait"] for shares in found)
    bench.note(name, **{phase: median(shares[phase] for shares in found) for phase in found[0]})
    return Row(name, value, "of a step", 1.0, value)


# ---- layers and prompts ----

def _layer(kind: str) -> Callable[[Bench, str], Row]:
    def run(bench: Bench, name: str) -> Row:
        c = bench.config
        same = [i for i in range(c.num_hidden_layers) if c.layer_kind(i) == kind]
        same = [same[i % len(same)] for i in range(LAYER_RUNS)]
        streams = np.full((1, c.hc_mult, c.hidden_size), 0x3F80, np.uint16)
        streams[..., ::2] |= 0x8000
        total = sum(sum(count.weight_bytes(bench.layer_tensors(i), c, 0).values()) for i in same)

        def once() -> float:
            began = time.perf_counter()
            for layer in same:
                bench.model._core.layer(layer, streams, bench.ids(1), None)
            return time.perf_counter() - began

        once()
        return row(name, total / 1e9, "GB/s", bench.pairs(
            name, once, lambda r: _share(total, r.read), ("read",)))

    return run


def _prefill(n: int) -> Callable[[Bench, str], Row]:
    def run(bench: Bench, name: str) -> Row:
        checkpoint, model = _one_of_each(bench)
        tensors = checkpoint.tensors.values()
        tokens = min(n, checkpoint.config.max_position_embeddings)
        work = count.prompt_work(tensors, checkpoint.config, tokens)

        def once() -> float:
            with bench.sessions(1, 0, model) as sessions:
                return bench.step(sessions, tokens)

        def ideal(rates: Rates) -> float | None:
            return _sum(_share(work.dot, rates.exact), _share(work.byte, rates.byte))

        pairs = bench.pairs(name, once, ideal, ("exact", "byte"))
        passes = -(-tokens // model._core.chunk)
        nbytes = sum(count.weight_bytes(
            tensors, checkpoint.config, tokens, checkpoint.config.n_routed_experts).values())
        operations = work.dot + work.byte
        bench.note(name, operations=operations, bytes=passes * nbytes, amount=operations / 1e9)
        return row(name, operations / 1e9, "GFLOP/s", pairs)

    return run


def _one_of_each(bench: Bench) -> tuple[Checkpoint, Model]:
    """The model itself if it is short, or four of its layers, one of each kind."""
    if bench.config.num_hidden_layers <= synthetic.QUICK_LAYERS:
        return bench.checkpoint, bench.model
    if "layers" not in bench.models:
        part = synthetic.part(bench.checkpoint, synthetic.QUICK_LAYERS)
        bench.models["layers"] = part, synthetic.load(part, bench.threads)
    return bench.models["layers"]


# ---- the list ----

def cases() -> list[Case]:
    """Every row, in the order of the report."""
    found = []
    sets = {name for name, here in _core.cpu_sets() if here}
    narrower = (("_avx2", "avx512"),) if "avx512" in sets else ()
    for fmt in ("fp8", "fp4", "bf16"):
        for where, who in (("1t", "one thread"), ("all", "all threads")):
            for suffix, disable in (("", ""), *narrower):
                found.append(Case(
                    f"linear_{fmt}_1tok_{where}{suffix}",
                    f"{fmt} weights times one token, {who}" + ", AVX2 kernels" * bool(suffix),
                    not suffix, _linear_few(fmt, where == "all", disable)))
    found += [
        Case(f"layer_{kind.lower()}", f"one {kind} layer alone, one token", True, _layer(kind))
        for kind in ("SWA", "CSA", "HCA")]
    found += [
        Case(f"decode_{name}", f"one token at a context of {n:,}", name in ("4k", "1m"), _decode(n))
        for name, n in CONTEXTS.items()]
    found.append(Case("decode_4k_1t", "one token at 4,096, one thread", False, _decode(
        CONTEXTS["4k"], threads=1)))
    found.append(Case("decode_scaling", "one token, all threads against one", False, _scaling))
    found.append(Case("decode_1m_added", "what 1M of context adds to a token", True, _added))
    found += [
        Case(f"decode_batch{n}", f"{n} sequences at 4,096 in one step", n == 16,
             _decode(CONTEXTS["4k"], n))
        for n in (4, 16, 64)]
    found.append(Case("step_4tok", "4 tokens of a sequence in one step", True, _step_4tok))
    found.append(Case("outside", "a token's time that no limit counts", True, _outside))
    found += [
        Case("prefill_linear_384", "linear layers times 384 tokens", True,
             _linear_many(tuple(linears.FORMATS), PREFILL_LINEAR)),
        Case("prefill_experts_48", "experts times 48 tokens", True,
             _linear_many(("fp4",), PREFILL_EXPERTS))]
    found += [
        Case(f"prefill_{name}", f"a prompt of {n:,} tokens, a layer of each kind", name == "2k",
             _prefill(n))
        for name, n in PROMPTS.items()]
    return found
