# SPDX-License-Identifier: Apache-2.0
"""A bar chart of the ratios and a roofline with the rows on it; needs matplotlib."""

import os
from typing import Any

from dsv4.bench.report import LOWER, Report

BAR_UNITS_LEFT_OUT = (*LOWER, "x one thread")


def check() -> None:
    """ImportError in one sentence where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            "--plot needs matplotlib, which is not installed: pip install 'dsv4[plot]'") from None


def draw(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the picture; its format is the suffix of the path."""
    check()
    from matplotlib.figure import Figure

    rows = [row for row in report.rows
            if row.ratio is not None and row.peer is None and row.unit not in BAR_UNITS_LEFT_OUT]
    figure = Figure(figsize=(13, 0.9 + max(4.0, 0.28 * len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    _bars(left, rows)
    _roofline(right, report)
    m = report.machine
    model = m["model"]
    figure.suptitle(
        f"{model['dimensions']}, {model['layers']} layers, {model['experts']} experts each: "
        f"{m['cpu']}, {m['threads']} threads, {m['date'][:10]}"
        f"{', ' + m['commit'] if m['commit'] else ''}", fontsize=10)
    figure.savefig(path, dpi=110)


def _bars(axes: Any, rows: Any) -> None:
    """One bar a row: how much of its limit."""
    names = [row.name for row in rows]
    ratios = [row.ratio for row in rows]
    colours = ["tab:orange" if "FLOP" in row.unit else "tab:blue" for row in rows]
    axes.barh(names, ratios, color=colours)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    for i, ratio in enumerate(ratios):
        axes.text(ratio, i, f" {ratio:.2f}", va="center", fontsize=8)
    axes.set_xlim(0, max([1.15, *(ratio + 0.1 for ratio in ratios)]))
    axes.set_xlabel("measured / limit of the same minute (blue: reading, orange: multiplying)")
    axes.tick_params(axis="y", labelsize=8)


def _roofline(axes: Any, report: Report) -> None:
    """Operations a second over operations a byte; the roof, and the rows under it."""
    limits = report.machine["limits"]
    read, peak = limits["read_gb_s"], limits["exact_gflop_s"]
    points = list(_points(report))
    if peak:
        corner = peak / read
        axes.plot([0.3, corner, 4000], [0.3 * read, peak, peak], color="black")
        axes.text(0.45, 0.3 * read, f"{read:.0f} GB/s", va="center", fontsize=8)
        axes.text(corner * 2, peak * 1.1, f"{peak:.0f} GFLOP/s", fontsize=8)
    for i, (name, intensity, speed) in enumerate(points):
        axes.plot(intensity, speed, "osD^v"[i // 10 % 5], color=f"C{i % 10}", label=name,
                  markersize=5, linestyle="")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte read")
    axes.set_ylabel("GFLOP/s")
    axes.grid(True, which="both", alpha=0.2)
    if points:
        axes.legend(fontsize=6, loc="lower right", ncols=1 + len(points) // 20)


def _points(report: Report) -> Any:
    """(name, operations a byte, GFLOP/s) of the rows whose bytes and operations are known."""
    for row in report.rows:
        facts = report.details.get(row.name, {})
        if "operations" in facts:
            speed = row.value / facts["amount"] * facts["operations"]
            yield row.name, facts["operations"] / facts["bytes"], speed / 1e9
