# SPDX-License-Identifier: Apache-2.0
"""Stored values of the published code, and how close to them an implementation has to come.

Limits come from the measured noise: the same code with other, equally legitimate orders of
summation (noise.json beside the values).  For `dsv4.verify` and the tests.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def bf16(u: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """uint16 bit patterns of bfloat16 -> float32."""
    return (np.asarray(u).astype(np.uint32) << 16).view(np.float32)


def log_softmax(x: Array) -> Array:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    result: Array = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return result


def logit_report(got: npt.ArrayLike, want: npt.ArrayLike) -> dict[str, Any]:
    """Both [rows, vocab].  Per-row arrays and the summary numbers of the noise tables."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    d = np.abs(got - want)
    cos = (got * want).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(want, axis=-1)
    lp, lq = log_softmax(want), log_softmax(got)
    kl = (np.exp(lp) * (lp - lq)).sum(-1)
    agree = got.argmax(-1) == want.argmax(-1)
    top2 = np.sort(want, -1)[:, -2:]
    # without the worst fifth of the rows
    keep = np.argsort(kl)[: max(1, int(np.ceil(len(kl) * 0.8)))]
    return dict(
        rows=len(want),
        finite=bool(np.isfinite(got).all()),
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


def short(report: dict[str, Any]) -> dict[str, Any]:
    """A report without its rows, rounded."""
    return {
        k: (round(v, 6) if isinstance(v, float) else v) for k, v in report.items() if k != "per_row"
    }


def stream_report(got_u16: Array, want_u16: Array) -> dict[str, Any]:
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
    """The stored values of one checkpoint: `e[key]` is an array, `e.noise` the measured noise.

    Parameters
    ----------
    folder : path
        Holds expected.npz and noise.json.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        with np.load(self.folder / "expected.npz") as z:
            self.a: dict[str, Array] = {k: z[k] for k in z.files}
        self.noise = json.loads((self.folder / "noise.json").read_text())

    def __getitem__(self, key: str) -> Array:
        return self.a[key]

    def __contains__(self, key: str) -> bool:
        return key in self.a

    def keys(self) -> list[str]:
        return sorted(self.a)

    def prompts(self) -> list[str]:
        """The names of the prompts, shortest first."""
        return sorted(
            (k.split("/")[0] for k in self.a if k.startswith("prompt") and k.endswith("/ids")),
            key=lambda s: int(s[6:]),
        )

    def report(self, what: str, got: npt.ArrayLike, numerics: str = "official") -> dict[str, Any]:
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

    def pooled(self, numerics: str, key: str) -> float:
        """Row-weighted mean of a noise number over the runs of this checkpoint with >= 20 rows."""
        n = [
            v["worst"]
            for k, v in self.noise["logits"].items()
            if k.startswith(numerics + "/") and v["worst"]["rows"] >= 20 and "dspark" not in k
        ]
        return float(sum(w[key] * w["rows"] for w in n) / sum(w["rows"] for w in n))

    def limits(
        self, what: str, numerics: str = "official", factor: float = 1.5
    ) -> dict[str, float]:
        """What an implementation can be held to: the larger of own and pooled noise, widened.

        Noise is heavy-tailed: one flipped expert or index entry moves a whole row.  So the sharp
        limits are on statistics that survive a few such rows (trim_mean_abs: without the worst
        fifth of the rows; the median), and the KLs and plain means are held loosely.  A short run
        can be free of noise by luck in the variants measured and not in another one, hence the
        pooled value.
        """
        own = self.noise["logits"][f"{numerics}/{what}"]["worst"]

        def widest(key: str) -> float:
            return max(float(own[key]), self.pooled(numerics, key))

        up = {k: factor * widest(k) + 1e-4 for k in ("trim_mean_abs", "median_row_max")}
        up.update({k: 2.5 * factor * widest(k) + 1e-3 for k in ("trim_kl", "mean_abs", "kl_mean")})
        agree = 1 - factor * (1 - min(own["argmax_agree"], self.pooled(numerics, "argmax_agree")))
        return dict(up, argmax_agree=max(0.0, agree - 1.5 / own["rows"]))

    def check_logits(
        self, what: str, got: npt.ArrayLike, numerics: str = "official", factor: float = 1.5
    ) -> tuple[bool, dict[str, Any], dict[str, float]]:
        """(passed, report, limits)."""
        r, limits = self.report(what, got, numerics), self.limits(what, numerics, factor)
        ok = r["finite"] and all(
            r[k] >= v if k == "argmax_agree" else r[k] <= v for k, v in limits.items()
        )
        return ok, short(r), limits

    def layer_limits(self, layer: int, numerics: str = "official") -> tuple[float, float]:
        """For one layer alone on the stored input: the least share of positions that are equal in
        every bit, and the largest median of the relative error."""
        noise = self.noise["single_layer"][numerics][f"L{layer}"].values()
        share = min(n["positions_bit_equal"] for n in noise) - 0.05
        return share, 1.5 * max(n["rel_median"] for n in noise)
