# SPDX-License-Identifier: Apache-2.0
"""The picture of a bench report: each row beside its limit, and the roofline; needs matplotlib."""

import os

from dsv4 import plot
from dsv4.bench.report import Report


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

    result = report.as_dict()
    figure = Figure(figsize=(13, 0.9 + max(4.0, 0.28 * len(plot.shares(result)))),
                    layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    plot.limits(result, left)
    plot.roofline(result, right)
    m = report.machine
    model = m["model"]
    figure.suptitle(
        f"{model['dimensions']}, {model['layers']} layers, {model['experts']} experts each: "
        f"{m['cpu']}, {m['threads']} threads, {m['date'][:10]}"
        f"{', ' + m['commit'] if m['commit'] else ''}", fontsize=10)
    figure.savefig(path, dpi=110)
