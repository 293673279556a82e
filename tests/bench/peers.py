# SPDX-License-Identifier: Apache-2.0
"""dsv4 beside other engines: same run, same machine, same threads, in turns.

    python tests/bench/peers.py                          # every peer that is installed
    python tests/bench/peers.py ggml-decode --only fp4   # one of them, one class of weights
    python tests/bench/peers.py --threads 1 --json

Each figure is the median over the rounds of (the peer's time / our time); a round takes one sample
of each, one after the other.  A peer that is not installed is named with the pip line that brings
it, and the others run.  Needs gcc (peer/native.c is compiled with -march=native).

    ggml-decode   ggml's matrix products, one token: all matrices of one V4-Flash token
    ggml-prefill  the same matrices with many tokens (--tokens)
    kt            kt-kernel's FP4 and FP8 experts, one layer of V4-Flash, one token
    llamacpp      llama.cpp's deepseek4, end to end, layers of V4-Flash's shape
    transformers  transformers' DeepseekV4ForCausalLM, end to end, small models
    hooks         the same with hooks on its routers, for a prompt of 4,096 tokens; ours a trace
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peer import common  # noqa: E402


def ggml_decode(o: argparse.Namespace) -> list[common.Row]:
    from peer import ggml

    return ggml.measure(1, o.threads, o.rounds, o.only)


def ggml_prefill(o: argparse.Namespace) -> list[common.Row]:
    from peer import ggml

    return ggml.measure(o.tokens, o.threads, o.rounds, o.only)


def kt(o: argparse.Namespace) -> list[common.Row]:
    from peer import kt

    return kt.measure(o.threads, o.rounds, o.only)


def llamacpp(o: argparse.Namespace) -> list[common.Row]:
    from peer import llamacpp

    with tempfile.TemporaryDirectory() as folder:
        return llamacpp.measure(o.threads, o.rounds, o.only, o.folder or Path(folder))


def transformers(o: argparse.Namespace) -> list[common.Row]:
    from peer import eager

    with tempfile.TemporaryDirectory() as folder:
        return eager.measure(o.threads, o.rounds, o.only, o.folder or Path(folder))


def hooks(o: argparse.Namespace) -> list[common.Row]:
    from peer import hooks

    with tempfile.TemporaryDirectory() as folder:
        return hooks.measure(o.threads, o.only, o.folder or Path(folder))


PEERS: dict[str, Callable[[argparse.Namespace], list[common.Row]]] = {
    "ggml-decode": ggml_decode, "ggml-prefill": ggml_prefill, "kt": kt, "llamacpp": llamacpp,
    "transformers": transformers, "hooks": hooks,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", nargs="*", help=f"{', '.join(PEERS)}; default: all")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)),
        help="of both sides (default: every CPU this process may use)")
    parser.add_argument("--rounds", type=int, default=11, help="samples of each side, at least 7")
    parser.add_argument("--tokens", type=int, default=384, help="of ggml-prefill")
    parser.add_argument(
        "--only", help="ggml, kt: fp4, fp8 or bf16; end to end: a part of a row's name")
    parser.add_argument(
        "--folder", type=Path,
        help="where the end-to-end models are written and kept (default: not kept)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    if unknown := set(options.peer) - set(PEERS):
        parser.error(f"no peer {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    if (busy := common.others_busy()) > 0.15:
        print(f"warning: other processes keep {busy:.1f} CPUs busy", file=sys.stderr)
    rows, missing = [], []
    for name in options.peer or PEERS:
        print(name, file=sys.stderr)
        try:
            rows += PEERS[name](options)
        except common.Missing as error:
            missing.append({"peer": name, "reason": str(error)})
            print(f"{name}: left out: {error}", file=sys.stderr)
    if options.threads == 1 < len(os.sched_getaffinity(0)):
        for row in rows:
            row.name += "_1t"
    if options.json:
        head = {
            "machine": common.machine(), "commit": common.commit(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        print(json.dumps({**head, "rows": [asdict(r) for r in rows], "missing": missing}, indent=1))
    else:
        print(f"{common.machine()}, commit {common.commit()}")
        for row in rows:
            print(row.line())
    return 0


if __name__ == "__main__":
    sys.exit(main())
