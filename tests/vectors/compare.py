# SPDX-License-Identifier: Apache-2.0
"""Compare logits and internals with the stored expected values.  NumPy only.

    e = Expected("nano-flash")
    e.check_logits("prompt130", my_logits)           # rows = e["prompt130/positions"], or all

Limits come from the measured noise (noise.json): see README.md beside this file.  What `dsv4
verify` needs of this is in `dsv4.expected`.
"""

from pathlib import Path

import numpy as np

from dsv4 import expected
from dsv4.expected import bf16, log_softmax, logit_report, short, stream_report

__all__ = [
    "Expected", "bf16", "folder_of", "log_softmax", "logit_report", "set_agreement", "short",
    "stream_report", "to_bf16", "topk_valid", "ulp_report",
]

HERE = Path(__file__).resolve().parent


def folder_of(name):
    """Where the expected values of a checkpoint lie: nano-odd's are inside the package."""
    if name == "nano-odd":
        return HERE.parents[1] / "dsv4" / "nano_odd"
    return HERE / "model" / name


def to_bf16(x):
    """float32 -> uint16 bit patterns of bfloat16, round to nearest even."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def set_agreement(got, want):
    """Rows of ids (any order, -1 = padding): (fraction of rows with equal sets, mean overlap)."""
    same, over = [], []
    for a, b in zip(np.asarray(got), np.asarray(want), strict=True):
        a, b = set(a[a >= 0].tolist()), set(b[b >= 0].tolist())
        same.append(a == b)
        over.append(len(a & b) / max(len(b), 1))
    return float(np.mean(same)), float(np.mean(over))


def topk_valid(selected, scores, k, slack=0.0):
    """Is `selected` (ids, -1 padding) a correct top-k of f32 `scores`, ties allowed either way?"""
    s = np.asarray(selected)
    s = s[s >= 0]
    ok = np.isfinite(scores)
    k = min(k, int(ok.sum()))
    if len(s) != k or len(set(s.tolist())) != k:
        return False
    if k == 0:
        return True
    rest = np.setdiff1d(np.nonzero(ok)[0], s)
    return bool(rest.size == 0 or scores[s].min() + slack >= scores[rest].max())


def ulp_report(got_u16, want_u16):
    """bf16 bit patterns: fraction equal, largest distance in bf16 steps, relative L2 error."""

    def key(u):
        u = np.asarray(u).astype(np.int32)
        return np.where(u & 0x8000, 0x8000 - u, u)

    d = np.abs(key(got_u16) - key(want_u16))
    g, w = bf16(got_u16).astype(np.float64), bf16(want_u16).astype(np.float64)
    return dict(
        equal=float((d == 0).mean()),
        max_ulp=int(d.max()),
        rel=float(np.linalg.norm(g - w) / max(np.linalg.norm(w), 1e-30)),
    )


class Expected(expected.Expected):
    """The stored values of the checkpoint of that name."""

    def __init__(self, name):
        super().__init__(folder_of(name))


if __name__ == "__main__":
    import sys

    for name in sys.argv[1:]:
        e = Expected(name)
        print(name, len(e.a), "arrays; prompts", ", ".join(e.prompts()))
        for k in e.keys():
            print("  ", k, e[k].dtype, e[k].shape)
