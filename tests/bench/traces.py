# SPDX-License-Identifier: Apache-2.0
"""What traces cost: a model of true shape with and without one, and instructions when all is off.

    python tests/bench/traces.py          # router, indexer and two streams of layers of true shape
    python tests/bench/traces.py --off    # instructions of steps, against a build without sites

The first needs some 6 GB: four layers of V4-Flash's dimensions with 8 experts each and random
weights in memory.  Steps with and without a trace in turns; the median of the ratios.  A step of
one token behind 4,096, where the indexer scores; a prompt of 512 tokens, and of as many behind
4,096.

The second compiles the package with DSV4_WITHOUT_SITES beside the one that is installed, and counts
the instructions inside the engine's job with callgrind (valgrind, which has AVX2 and no more): a
prompt and some single tokens of the model inside the package, one thread.  More than 0.1 % is an
error.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

import dsv4
from dsv4.bench import synthetic

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"decode": 0.03, "prefill": 0.05, "off": 0.001}
STEPS = """
import dsv4
with dsv4.load(threads=1) as model:
    session = model.session()
    session.append(list(range(5, 25)))
    for token in range(5):
        session.append([token])
"""


def added(plain: Callable[[], object], traced: Callable[[], object], rounds: int) -> float:
    """What a trace adds, as a share: the median over pairs whose order alternates."""
    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    plain(), traced()
    ratios = []
    for i in range(rounds):
        if i % 2:
            b, a = seconds(traced), seconds(plain)
        else:
            a, b = seconds(plain), seconds(traced)
        ratios.append(b / a - 1)
    return median(ratios)


def overhead(threads: int, rounds: int) -> dict[str, float]:
    """The share that router, indexer and two streams add to steps of a model of true shape."""
    config = synthetic.configure(synthetic.published("flash"), layers=4, experts=8)
    rng = np.random.default_rng(1)
    found = {}
    with synthetic.build(config) as checkpoint, synthetic.load(checkpoint, threads) as model:
        vocab = model.config.vocab_size

        def ids(n: int) -> list[int]:
            return rng.integers(0, min(vocab, 1000), n).tolist()

        def trace() -> dsv4.Trace:
            return dsv4.Trace(model, router=True, indexer=True, streams=[1, 3])

        def prompt(n: int, at: int, traced: bool) -> None:
            with model.session(checkpoints=0) as session:
                session._fill(at)
                session.append(ids(n), logits="none", trace=trace() if traced else None)

        a, b, t = model.session(), model.session(), trace()
        a._fill(4096)
        b._fill(4096)
        found["decode behind 4,096 tokens"] = added(
            lambda: a.append(ids(1)), lambda: b.append(ids(1), trace=t), 10 * rounds)
        for at in (0, 4096):
            where = f"prefill of 512 tokens behind {at:,}"
            found[where] = added(
                lambda at=at: prompt(512, at, False), lambda at=at: prompt(512, at, True), rounds)
    return found


def instructions(package: Path) -> tuple[int, int]:
    """Instructions of the engine's job, of the package in this folder: all, and those outside
    kernels (which of them run is found out by measuring, so it may differ between two runs)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        environment = dict(os.environ, PYTHONPATH=str(package), PYTHONHASHSEED="0")
        subprocess.run(
            ["valgrind", "--tool=callgrind", "--toggle-collect=step_job",
             f"--callgrind-out-file={out}", sys.executable, "-c", STEPS],
            env=environment, check=True, capture_output=True, cwd=folder)
        return counted(out.read_text())


def counted(profile: str) -> tuple[int, int]:
    """Of a callgrind profile: instructions, and those that are not inside functions dsv4k_*."""
    names: dict[str, str] = {}
    total = kernels = 0
    function = called = ""
    calls = False
    for line in profile.splitlines():
        key, _, value = line.partition("=")
        if key in ("fn", "cfn"):
            number, _, name = value.partition(" ")
            name = names.setdefault(number, name)
            function, called = (name, called) if key == "fn" else (function, name)
        elif key == "calls":
            calls = True
        elif line[:1] in "0123456789+-*" and line:
            cost = int(line.split()[1])
            if not calls:
                total += cost
            elif called.startswith("dsv4k_") and not function.startswith("dsv4k_"):
                kernels += cost
            calls = False
    return total, total - kernels


def without_sites(folder: Path) -> Path:
    """A copy of this package whose engine is compiled without sites."""
    environment = dict(os.environ, CFLAGS="-DDSV4_WITHOUT_SITES")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder),
         "--build-temp", str(folder / "objects")], env=environment, check=True, cwd=ROOT)
    for path in Path(dsv4.__file__).parent.iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (folder / "dsv4" / path.name).symlink_to(path)
    return folder


def off() -> tuple[int, int, int]:
    """Instructions of all, and outside kernels, with sites that nobody asks and without sites."""
    with tempfile.TemporaryDirectory() as folder:
        all_of_it, without = instructions(without_sites(Path(folder)))
    return all_of_it, instructions(Path(dsv4.__file__).parents[1])[1], without


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--off", action="store_true", help="count instructions instead")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.off:
        all_of_it, with_sites, without = off()
        share = (with_sites - without) / all_of_it
        print(f"everything off: {with_sites:,} instructions outside kernels, {without:,} without "
              f"sites: {share:+.4%} of {all_of_it:,}, at most {LIMITS['off']:.1%}")
        return int(share > LIMITS["off"])
    failed = 0
    for name, share in overhead(options.threads, options.rounds).items():
        limit = LIMITS[name.split()[0]]
        print(f"router, indexer, 2 streams: {share:+.2%} of {name}, at most {limit:.0%}")
        failed |= share > limit
    return failed


if __name__ == "__main__":
    sys.exit(main())
