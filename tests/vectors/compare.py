# SPDX-License-Identifier: Apache-2.0
"""Compare logits and internals with the stored expected values.  NumPy only.

    e = Expected("nano-flash")
    e.check_logits("prompt130", my_logits)           # rows = e["prompt130/positions"], or all

Limits come from the measured noise (noise.json): see README.md beside this file.
"""

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def folder_of(name):
    """Where the expected values of a checkpoint lie: nano-odd's are inside the package."""
    if name == "nano-odd":
        return HERE.parents[1] / "dsv4" / "nano_odd"
    return HERE / "model" / name


def bf16(u):
    """uint16 bit patterns of bfloat16 -> float32."""
    return (np.asarray(u).astype(np.uint32) << 16).view(np.float32)


def to_bf16(x):
    """float32 -> uint16 bit patterns of bfloat16, round to nearest even."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def logit_report(got, want):
    """Both [rows, vocab].  Per-row arrays and the summary numbers of the noise tables."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    d = np.abs(got - want)
    cos = (got * want).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(want, axis=-1)
    lp, lq = log_softmax(want), log_softmax(got)
    kl = (np.exp(lp) * (lp - lq)).sum(-1)
    agree = got.argmax(-1) == want.argmax(-1)
    top2 = np.sort(want, -1)[:, -2:]
    finite = bool(np.isfinite(got).all())
    keep = np.argsort(kl)[
        : max(1, int(np.ceil(len(kl) * 0.8)))
    ]  # without the worst fifth of the rows
    return dict(
        rows=len(want),
        finite=finite,
        max_abs=float(d.max()),
        mean_abs=float(d.mean()),
        median_row_max=float(np.median(d.max(-1))),
        cos_min=float(cos.min()),
        cos_mean=float(cos.mean()),
        cos_median=float(np.median(cos)),
        kl_max=float(kl.max()),
        kl_mean=float(kl.mean()),
        trim_mean_abs=float(d[keep].mean()),
        trim_kl=float(kl[keep].mean()),
        cos_trim=float(cos[keep].mean()),
        argmax_agree=float(agree.mean()),
        per_row=dict(
            max_abs=d.max(-1), cos=cos, kl=kl, agree=agree, margin=top2[:, 1] - top2[:, 0]
        ),
    )


def short(report):
    return {
        k: (round(v, 6) if isinstance(v, float) else v) for k, v in report.items() if k != "per_row"
    }


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


def stream_report(got_u16, want_u16):
    """Residual streams [positions, hc, d] of one layer run on the exact input.

    The share of bit-equal positions and the relative error of each position (compare with
    noise.json, single_layer).
    """
    g, w = (bf16(x).astype(np.float64).reshape(len(x), -1) for x in (got_u16, want_u16))
    rel = np.linalg.norm(g - w, axis=1) / np.linalg.norm(w, axis=1)
    return dict(
        positions_bit_equal=float((rel == 0).mean()),
        rel_median=float(np.median(rel)),
        rel_max=float(rel.max()),
        worst_positions=np.argsort(-rel)[:8].tolist(),
        rel=rel,
    )


class Expected:
    """The stored values of one checkpoint: `e[key]` is an array, `e.noise` the measured noise."""

    def __init__(self, name):
        self.folder = folder_of(name)
        with np.load(self.folder / "expected.npz") as z:
            self.a = {k: z[k] for k in z.files}
        self.noise = json.loads((self.folder / "noise.json").read_text())

    def __getitem__(self, key):
        return self.a[key]

    def __contains__(self, key):
        return key in self.a

    def keys(self):
        return sorted(self.a)

    def prompts(self):
        return sorted(
            (k.split("/")[0] for k in self.a if k.startswith("prompt") and k.endswith("/ids")),
            key=lambda s: int(s[6:]),
        )

    def report(self, what, got, numerics="official"):
        """Summary of `what` ('promptN', 'decode', 'mtp' or 'dspark_main_logits').

        got: logits at the stored rows, or at every position.
        """
        dspark = what.startswith("dspark_")
        key = what.replace("_", "/", 1) if dspark else f"{what}/logits"
        want = self.a[f"{numerics}/{key}"]
        got = np.asarray(got, np.float32)
        pos = self.a.get(f"{what}/positions")
        if pos is not None and got.shape[0] != want.shape[0]:
            got = got[pos]
        return logit_report(got, want)

    def pooled(self, numerics, key):
        """Row-weighted mean of a noise number over the runs of this checkpoint with >= 20 rows."""
        n = [
            v["worst"]
            for k, v in self.noise["logits"].items()
            if k.startswith(numerics + "/") and v["worst"]["rows"] >= 20 and "dspark" not in k
        ]
        return sum(w[key] * w["rows"] for w in n) / sum(w["rows"] for w in n)

    def limits(self, what, numerics="official", factor=1.5):
        """What an implementation can be held to: the larger of own and pooled noise, widened.

        Noise is heavy-tailed: one flipped expert or index entry moves a whole row.  So the sharp
        limits are on statistics that survive a few such rows (trim_mean_abs: without the worst
        fifth of the rows; the median), and the KLs and plain means are held loosely.  A short run
        can be free of noise by luck in the variants measured and not in another one, hence the
        pooled value.
        """
        own = self.noise["logits"][f"{numerics}/{what}"]["worst"]

        def widest(key):
            return max(own[key], self.pooled(numerics, key))

        up = {k: factor * widest(k) + 1e-4 for k in ("trim_mean_abs", "median_row_max")}
        up.update({k: 2.5 * factor * widest(k) + 1e-3 for k in ("trim_kl", "mean_abs", "kl_mean")})
        agree = 1 - factor * (1 - min(own["argmax_agree"], self.pooled(numerics, "argmax_agree")))
        return dict(up, argmax_agree=max(0.0, agree - 1.5 / own["rows"]))

    def check_logits(self, what, got, numerics="official", factor=1.5):
        """(passed, report, limits)."""
        r, limits = self.report(what, got, numerics), self.limits(what, numerics, factor)
        ok = r["finite"] and all(
            r[k] >= v if k == "argmax_agree" else r[k] <= v for k, v in limits.items()
        )
        return ok, short(r), limits


if __name__ == "__main__":
    import sys

    for name in sys.argv[1:]:
        e = Expected(name)
        print(name, len(e.a), "arrays; prompts", ", ".join(e.prompts()))
        for k in e.keys():
            print("  ", k, e[k].dtype, e[k].shape)
