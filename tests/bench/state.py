# SPDX-License-Identifier: Apache-2.0
"""Sessions as large as V4-Flash's: their files, how long they take to load, what forks cost.

    python tests/bench/state.py [--tokens 1048568] [--folder FOLDER]

The model has V4-Flash's 43 layers as far as state goes (rows, windows, compressors of the published
size: 3.5 KB a token) and next to no weights; the state is `Session._fill`'s.  The file, 3.7 GB at a
million tokens, goes into FOLDER (a temporary one) and is loaded again in a process of its own,
where it is in the page cache, as it is after a save.  What is counted as loading is the whole call,
everything checked that is not checked on first use; `first step` says what that costs later.  Ends
with status 1 if a limit is missed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import dsv4
from dsv4 import nano
from dsv4.bench import synthetic

FORK_AT, FORKS, NEW = 100_000, 16, (4, 64, 200)
MAX_LOAD_S, MAX_RATIO, MAX_FORK_US, MAX_FORKS_RATIO, MAX_GROWN = 0.2, 1.05, 50, 1.1, 1.05


def make(folder: Path) -> Path:
    """A checkpoint with the state of V4-Flash and small everything else."""
    flash = synthetic.published("flash")
    layers = flash["num_hidden_layers"]
    same = ("head_dim", "qk_rope_head_dim", "index_head_dim", "index_topk", "sliding_window",
            "max_position_embeddings")
    return nano.make(
        "state", 1, folder, **{key: flash[key] for key in same}, num_hidden_layers=layers,
        compress_ratios=flash["compress_ratios"][:layers], mtp=0, num_nextn_predict_layers=0,
        num_hash_layers=1, hidden_size=128, num_attention_heads=1, o_groups=1, o_lora_rank=128,
        q_lora_rank=128, index_n_heads=1, moe_intermediate_size=128, n_routed_experts=2,
        num_experts_per_tok=1, hc_mult=2, hc_sinkhorn_iters=2, vocab_size=97)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def resident() -> int:
    """Bytes of this process in memory, its heap's and its mappings'."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forks(model: dsv4.Model) -> dict[str, Any]:
    """16 forks at 100K tokens: time of one, and memory right away and after some tokens each."""
    session = model.session()
    before = resident()
    session._fill(FORK_AT)
    alone = resident() - before
    times = [seconds(session.fork) for _ in range(2000)]
    before = resident()
    made = [session.fork() for _ in range(FORKS)]
    right_away = 1 + (resident() - before) / alone
    model.step([(fork, [1]) for fork in made], "none")  # what the model needs for such a step
    for fork in made:
        fork.close()
    made = [session.fork() for _ in range(FORKS)]
    before = resident()
    fixed, rows = session._core.bytes
    grown: dict[int, float] = {}
    for n in range(1, max(NEW) + 1):
        model.step([(fork, [1]) for fork in made], "none")
        if n in NEW:
            grown[n] = (resident() - before) / (FORKS * (fixed + n * rows / FORK_AT))
    return dict(median_us=1e6 * float(np.median(times)), forks_ratio=right_away, grown=grown)


CHILD = """
import json, sys, time
import dsv4
model = dsv4.load(sys.argv[1])
out = {}
def timed(name, work):
    began = time.perf_counter()
    value = work()
    out[name] = time.perf_counter() - began
    return value
session = timed("first_load", lambda: model.load_session(sys.argv[2]))
timed("step", lambda: session.append([5], logits="none"))
timed("second_step", lambda: session.append([5], logits="none"))
session.close()
out["load"] = min(
    (timed("again", lambda: model.load_session(sys.argv[2]).close()), out["again"])[1]
    for _ in range(5))
timed("verified", lambda: model.load_session(sys.argv[2], verify=True))
print(json.dumps(out))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=(1 << 20) - 8)  # room for steps
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = make(Path(name, "model"))
        file = Path(name, "session")
        with dsv4.load(folder) as model:
            found: dict[str, Any] = forks(model)
            session = model.session()
            session._fill(options.tokens)
            found["save"] = seconds(lambda: session.save(file))
            found["bytes"] = file.stat().st_size
            found["ratio"] = found["bytes"] / session.nbytes
            session.close()
        done = subprocess.run([sys.executable, "-c", CHILD, str(folder), str(file)], check=True,
                              stdout=subprocess.PIPE, text=True)
        found |= json.loads(done.stdout)
    gigabytes = found["bytes"] / 1e9
    print(f"file of {options.tokens:,} tokens: {gigabytes:.2f} GB, {found['ratio']:.4f} of the "
          f"state (limit {MAX_RATIO}), saved in {found['save']:.1f} s")
    print(f"load: {found['first_load']:.3f} s in a new process, {found['load']:.3f} s again "
          f"(limit {MAX_LOAD_S} s); with verify=True {found['verified']:.2f} s")
    print(f"first step: {found['step']:.3f} s, which checks what it reads; the next one "
          f"{found['second_step']:.3f} s")
    print(f"fork at {FORK_AT:,} tokens: {found['median_us']:.1f} us (limit {MAX_FORK_US}), {FORKS} "
          f"forks and the session {found['forks_ratio']:.3f} of its memory "
          f"(limit {MAX_FORKS_RATIO})")
    told = ", ".join(f"{ratio:.3f} after {n}" for n, ratio in found["grown"].items())
    print(f"so many tokens later, over {FORKS} fixed states and their new rows: {told} "
          f"(limit {MAX_GROWN})")
    missed = (found["first_load"] > MAX_LOAD_S, found["ratio"] > MAX_RATIO,
              found["median_us"] > MAX_FORK_US, found["forks_ratio"] > MAX_FORKS_RATIO,
              max(found["grown"].values()) > MAX_GROWN)
    return int(any(missed))


if __name__ == "__main__":
    sys.exit(main())
