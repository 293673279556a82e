# SPDX-License-Identifier: Apache-2.0
"""A model larger than the memory it may use: experts from disk, against the plain mapping.

    python tests/bench/offload.py [--folder FOLDER] [--tokens N] [--rounds N] [--json]

Writes layers of V4-Flash's dimensions (two of them routed by token id) into FOLDER, unless they are
there, and runs the same prompt and decode in processes of their own inside a memory cgroup (version
1 or 2; needs the right to make one).  The limit leaves room for what each token reads and for the
given share of the routed experts.  Three ways: "plain", weights mapped and no more; "cache",
`dsv4.load` as it is; "all", plain without the limit.  The page cache is emptied of the files
before each.  Timed are: the load; a prompt; `--tokens` single tokens after it, with random ids.
The disk's own rate is measured by direct reads of 4 MiB.  Logits must be the same in every bit;
pages of the files in memory are counted with mincore.
"""

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests" / "engine")]

import dsv4  # noqa: E402
from dsv4 import loading  # noqa: E402

RATIOS, EXPERTS, HASHED, VOCAB = (0, 128, 4, 128, 4), 24, 2, 4096
PROMPT, CONTEXT = 64, 4096
INTERPRETER = 160 << 20  # Python, numpy and the kernel's own part of a group


# ---- one process ----

def child(folder: Path, way: str, tokens: int) -> dict[str, Any]:
    """Load, prompt, decode in this process."""
    if way != "cache":
        loading.fitting = lambda needs, *_: needs  # type: ignore[attr-defined]
    ids = np.random.default_rng(3).integers(0, VOCAB, PROMPT + tokens)
    began = time.perf_counter()
    model = dsv4.load(folder)
    loaded = time.perf_counter()
    digest = hashlib.sha256()
    session = model.session()
    digest.update(session.append(ids[:PROMPT], logits="all").tobytes())
    prompted, before, seconds = time.perf_counter(), read_bytes(), []
    for i in range(PROMPT, PROMPT + tokens):
        start = time.perf_counter()
        digest.update(session.append(ids[i : i + 1]).tobytes())
        seconds.append(time.perf_counter() - start)
    read = read_bytes() - before
    return dict(
        way=way, load=loaded - began, prompt=PROMPT / (prompted - loaded),
        decode=tokens / sum(seconds), median=1 / statistics.median(seconds),
        read_per_token=read / tokens, disk=read / sum(seconds), sha256=digest.hexdigest(),
        rss=field("/proc/self/status", "RssAnon:") * 1024, in_page_cache=resident(model),
        kept=model.plan.experts_in_memory, experts=model.plan.experts, counts=model._core.experts,
    )


def read_bytes() -> int:
    """Bytes this process has made the disk read."""
    return field("/proc/self/io", "read_bytes:")


def field(path: str, key: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def resident(model: dsv4.Model) -> dict[str, int]:
    """Bytes of the files in the page cache: routed experts, and all else."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    found = dict(experts=0, rest=0)
    with loading.Checkpoint.open(model.path) as checkpoint:
        for info in checkpoint.tensors.values():
            if info.nbytes < 1 << 16:
                continue
            view = model._core.tensor(info.name)
            start = -(-view.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
            pages = (view.ctypes.data + info.nbytes - start) // mmap.PAGESIZE
            there = (ctypes.c_ubyte * pages)()
            libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(pages * mmap.PAGESIZE), there)
            n = int(np.count_nonzero(np.frombuffer(there, np.uint8) & 1)) * mmap.PAGESIZE
            found["experts" if ".ffn.experts." in info.name else "rest"] += n
    return found


# ---- the group, the disk ----

@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A memory cgroup with this limit, of the version that is here."""
    root = Path("/sys/fs/cgroup")
    old = (root / "memory").is_dir()
    group = (root / "memory" if old else root) / f"dsv4-offload-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit))
    except OSError as error:
        sys.exit(f"offload.py: cannot make a memory cgroup: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def drop(folder: Path) -> None:
    """Give up the pages of the files that nobody maps."""
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def disk_rate(path: Path, pieces: int = 64) -> float:
    """Bytes a second of direct reads, one after the other."""
    size = 4 << 20
    buffer = mmap.mmap(-1, size)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    began = time.perf_counter()
    for i in range(pieces):
        os.preadv(fd, [buffer], i * size)
    seconds = time.perf_counter() - began
    os.close(fd)
    return pieces * size / seconds


def run(folder: Path, way: str, tokens: int, limit: int) -> dict[str, Any]:
    drop(folder)
    command = [sys.executable, __file__, "--child", way, "--folder", str(folder),
               "--tokens", str(tokens)]
    if way == "all":
        done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
        return json.loads(done.stdout)
    with memory_group(limit) as group:
        shell = 'echo $$ > "$0"/cgroup.procs && exec "$@"'
        done = subprocess.run(["sh", "-c", shell, str(group), *command], text=True,
                              stdout=subprocess.PIPE)
        peak = group / "memory.max_usage_in_bytes"
        peak = peak if peak.exists() else group / "memory.peak"
        found = {"peak": int(peak.read_text())} if peak.exists() else {}
        drop(folder)
    if done.returncode:
        sys.exit(f"offload.py: {way}: the process ended with status {done.returncode}")
    return json.loads(done.stdout) | found


# ---- all of it ----

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("offload-model"))
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.5, help="of the experts the limit holds")
    parser.add_argument("--make", action="store_true", help="write the model, measure nothing")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", choices=("plain", "cache", "all"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.folder, args.child, args.tokens)))
        return
    if not args.folder.exists():
        from true_shape import make

        make(args.folder, RATIOS, experts=EXPERTS, vocab=VOCAB, hash_layers=HASHED)
    if args.make:
        return
    needs = dsv4.plan(args.folder, context=CONTEXT)
    kept = round(args.share * needs.experts)
    limit = dsv4.plan(args.folder, context=CONTEXT, memory=1).resident + INTERPRETER
    limit += (kept - needs.config.num_experts_per_tok) * needs.expert_bytes
    rows = []
    for _ in range(args.rounds):
        rows += [run(args.folder, way, args.tokens, limit) for way in ("plain", "cache", "all")]
    drop(args.folder)
    disk = disk_rate(max(args.folder.glob("*.safetensors"), key=lambda p: p.stat().st_size))
    same = len({row["sha256"] for row in rows}) == 1
    if args.json:
        print(json.dumps(dict(model=needs.total, limit=limit, disk=disk, same=same, rows=rows)))
    else:
        show(needs, limit, disk, rows)
    if not same:
        sys.exit("offload.py: the logits differ")


def show(needs: dsv4.Plan, limit: int, disk: float, rows: list[dict[str, Any]]) -> None:
    print(f"model {needs.weight_bytes / 1e9:.2f} GB of weights, {needs.experts} routed experts of "
          f"{needs.expert_bytes / 1e6:.1f} MB; limit {limit / 1e9:.2f} GB; "
          f"disk, direct reads: {disk / 1e9:.2f} GB/s")
    print("       load s  prompt t/s  decode t/s  (median)  MB read/token  disk GB/s  "
          "in memory MB: anonymous, experts, other weights; peak")
    for r in rows:
        print(f"{r['way']:5}  {r['load']:6.1f}  {r['prompt']:10.1f}  {r['decode']:10.2f}  "
              f"({r['median']:6.2f})  {r['read_per_token'] / 1e6:13.0f}  {r['disk'] / 1e9:9.2f}  "
              f"{r['rss'] / 1e6:.0f}, {r['in_page_cache']['experts'] / 1e6:.0f}, "
              f"{r['in_page_cache']['rest'] / 1e6:.0f}; {r.get('peak', 0) / 1e6:.0f}")


if __name__ == "__main__":
    main()
