# SPDX-License-Identifier: Apache-2.0
"""Time and memory to open a checkpoint of 100,000 tensors in 64 shards, before any weight is read.

    python tests/bench/reader.py

The shards are sparse files.  Inside the timing window: everything `Checkpoint.open` does (config,
index, 64 headers, all comparisons).  Outside: writing the files, importing.  Memory is the peak of
the process.  Prints each figure with its limit and ends with status 1 if one is missed.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
LIMIT_SECONDS, LIMIT_MIB, ROUNDS = 1.5, 200, 3


def write(folder: Path) -> None:
    from sparse import write_checkpoint

    from dsv4 import nano

    layers = 62
    config = dict(
        nano.CONFIG, num_hidden_layers=layers, n_routed_experts=263, num_hash_layers=3,
        compress_ratios=[128, 128] + [4, 128] * 30 + [0])
    print(write_checkpoint(folder, config), "tensors,", layers + 2, "shards")


def measure(folder: Path) -> None:
    from dsv4.checkpoint import Checkpoint

    start, cpu_start = time.perf_counter(), time.process_time()
    with Checkpoint.open(folder):
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(seconds, cpu, peak)


def main() -> int:
    if len(sys.argv) == 3:
        {"write": write, "measure": measure}[sys.argv[1]](Path(sys.argv[2]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        def run(step: str) -> str:
            path = f"{REPO}:{REPO / 'tests' / 'python'}"
            return subprocess.run(
                [sys.executable, __file__, step, folder], env={"PYTHONPATH": path}, check=True,
                capture_output=True, text=True).stdout

        print(run("write"), end="")
        rounds = [[float(x) for x in run("measure").split()] for _ in range(ROUNDS)]
    seconds, cpu, peak = min(rounds)[0], min(rounds)[1], max(r[2] for r in rounds)
    print(f"open: {seconds:.2f} s, {cpu:.2f} s of it on the CPU (limit {LIMIT_SECONDS} s; "
          f"best of {ROUNDS})")
    print(f"peak memory of the process: {peak:.0f} MiB (limit {LIMIT_MIB} MiB)")
    return int(seconds > LIMIT_SECONDS or peak > LIMIT_MIB)


if __name__ == "__main__":
    sys.exit(main())
