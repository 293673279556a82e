# SPDX-License-Identifier: Apache-2.0
"""Pictures of traces, plans and bench results; needs matplotlib (the extra `plot`).

Each function takes what it shows and an optional `ax`, draws there or into a new figure, and
returns the Axes, so that titles, sizes and files stay the caller's.  Colours are Okabe and Ito's
or one hue from white to dark: told apart without colour vision and in print.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4.memory import Plan, size

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
MARKERS, DASHES = "os^Dv<>P", ("-", "--", "-.", ":")
MAP = "Blues"
MOST_LABELS = 48  # of tokens on an axis
MOST_NUMBERS = 16  # cells of a row that still get their number
SMALL = 0.01  # of the longest bar: what is less becomes "other"


def experts(trace: Any, ax: Any = None) -> Any:
    """Which experts the tokens of a trace chose: one row a layer, one column an expert.

    Parameters
    ----------
    trace : Trace
        With `router` of at least one layer.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        Each cell is the percentage of the tokens that chose the expert; rows sum to 100 times the
        experts a token has.

    Raises
    ------
    ValueError
        The trace has no router.
    ImportError
        matplotlib is not installed.

    Examples
    --------
    >>> import dsv4
    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> with dsv4.load() as model, model.trace("To be, or not to be", router=True) as t:
    ...     experts(t).get_ylabel()
    'layer'
    """
    layers = _asked(trace.router, "router")
    n = max(trace.router[i].scores.shape[1] for i in layers)
    share = np.stack([
        np.bincount(np.ravel(trace.router[i].experts), minlength=n) / len(trace.router[i].experts)
        for i in layers]) * 100
    ax = _axes(ax, (2.5 + 0.45 * min(n, 24), 1.4 + 0.3 * len(layers)))
    image = ax.imshow(share, aspect="auto", cmap=MAP, vmin=0, vmax=max(1.0, share.max()))
    ax.set_yticks(range(len(layers)), [str(i) for i in layers])
    ax.set_xlabel("expert")
    ax.set_ylabel("layer")
    ax.figure.colorbar(image, ax=ax, label="percent of tokens")
    if n <= MOST_NUMBERS:
        ax.set_xticks(range(n))
        for (row, column), value in np.ndenumerate(share):
            dark = value > 0.6 * share.max()
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8,
                    color="white" if dark else "black")
    return ax


def indexer(trace: Any, layer: int | None = None, ax: Any = None) -> Any:
    """Which compressed entries the indexer of a layer picked: one row a token that asks.

    Parameters
    ----------
    trace : Trace
        With `indexer`.
    layer : int, optional
        The first of the trace by default.
    ax : matplotlib Axes, optional

    Returns
    -------
    Axes
        Across, the tokens an entry closes with; dark was picked, light was there and not picked,
        white was not there yet.

    Raises
    ------
    ValueError
        The trace has no indexer, or not of this layer, or there was no entry yet.
    ImportError
        matplotlib is not installed.

    Examples
    --------
    >>> import dsv4
    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> with dsv4.load() as model, model.trace("To be, or not to be", indexer=True) as t:
    ...     indexer(t, layer=4).get_ylabel()
    'token that asks'
    """
    layer = _chosen(trace.indexer, layer, "indexer")
    found = trace.indexer[layer]
    selected = np.asarray(found.selected)
    n = int(selected.max()) + 1
    if n < 1:
        raise ValueError(f"trace: no entry was there yet in layer {layer}; wanted a longer text")
    ends = np.asarray(found.ranges(np.arange(n)))[:, 1]
    at = trace.position + np.arange(len(selected))
    shown = np.where(ends[None, :] <= at[:, None] + 1, 0.25, np.nan)
    rows, ranks = np.nonzero(selected >= 0)
    shown[rows, selected[rows, ranks]] = 1
    wide = int(ends[0]) if n == 1 else int(ends[1] - ends[0])
    ax = _axes(ax, (6, 4.5))
    ax.imshow(shown, aspect="auto", cmap=MAP, vmin=0, vmax=1, interpolation="nearest",
              extent=(ends[0] - wide, ends[-1], at[-1] + 0.5, at[0] - 0.5))
    ax.set_xlabel(f"tokens remembered ({wide} an entry)")
    ax.set_ylabel("token that asks")
    ax.set_title(f"layer {layer}: entries picked by the indexer")
    _name_tokens(ax.yaxis, trace)
    return ax


def attention(
    trace: Any, layer: int | None = None, head: int | None = None, ax: Any = None
) -> Any:
    """Where the attention of a layer goes: one row a token that asks, one column a token it sees.

    Parameters
    ----------
    trace : Trace
        With `attention`.
    layer : int, optional
        The first of the trace by default.
    head : int, optional
        The mean of all heads by default.
    ax : matplotlib Axes, optional

    Returns
    -------
    Axes
        Weights over the window, and those over compressed entries, each spread evenly over the
        tokens it stands for; what goes to the sink is missing.  The square root of the weights is
        shown, so that small ones are seen.

    Raises
    ------
    ValueError
        The trace has no attention, or not of this layer or head.
    ImportError
        matplotlib is not installed.

    Examples
    --------
    >>> import dsv4
    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> with dsv4.load() as model, model.trace("To be, or not to be", attention=[2]) as t:
    ...     attention(t, layer=2, head=0).get_title()
    'layer 2, head 0'
    """
    layer = _chosen(trace.attention, layer, "attention")
    found = trace.attention[layer]
    heads = found.window.shape[1]
    if head is not None and not 0 <= head < heads:
        raise ValueError(f"head: got {head}, wanted 0 to {heads - 1} or None for their mean")
    shown, first = _by_token(found, head), trace.position
    ax = _axes(ax, (6, 5))
    image = ax.imshow(
        np.sqrt(shown), cmap=MAP, vmin=0, interpolation="nearest", aspect="auto",
        extent=(-0.5, shown.shape[1] - 0.5, first + len(shown) - 0.5, first - 0.5))
    ax.figure.colorbar(image, ax=ax, label="square root of the weight")
    ax.set_xlabel("token it looks at")
    ax.set_ylabel("token that asks")
    ax.set_title(f"layer {layer}, {'mean of all heads' if head is None else f'head {head}'}")
    _name_tokens(ax.yaxis, trace)
    return ax


def streams(trace: Any, ax: Any = None) -> Any:
    """How large the residual streams are, layer by layer: one line a stream.

    Parameters
    ----------
    trace : Trace
        With `streams` of at least one layer.
    ax : matplotlib Axes, optional

    Returns
    -------
    Axes
        The root mean square over tokens and dimensions, after each layer.

    Raises
    ------
    ValueError
        The trace has no streams.
    ImportError
        matplotlib is not installed.

    Examples
    --------
    >>> import dsv4
    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> with dsv4.load() as model, model.trace("To be, or not to be", streams=True) as t:
    ...     len(streams(t).lines) == model.config.hc_mult
    True
    """
    layers = _asked(trace.streams, "streams")
    sizes = np.stack([np.sqrt(np.square(trace.streams[i], dtype=np.float64).mean((0, 2)))
                      for i in layers])
    ax = _axes(ax, (5.5, 3.5))
    for stream, line in enumerate(sizes.T):
        ax.plot(layers, line, marker=MARKERS[stream % 8], linestyle=DASHES[stream % 4],
                color=COLOURS[stream % 8], label=f"stream {stream}")
    ax.set_xlabel("after layer")
    ax.set_ylabel("root mean square")
    ax.set_ylim(bottom=0)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()
    return ax


def lens(
    trace: Any, layers: Iterable[int] | None = None, tokens: slice | None = None, ax: Any = None
) -> Any:
    """What the model would say after each layer: the logit lens.

    Parameters
    ----------
    trace : Trace
        With `streams` of these layers.
    layers : iterable of int, optional
        All of the trace by default.
    tokens : slice, optional
        Of the traced tokens; the last 12 by default.
    ax : matplotlib Axes, optional

    Returns
    -------
    Axes
        One row a layer, the last on top; in each cell the likeliest next token, and its probability
        as the colour.

    Raises
    ------
    ValueError
        The trace has no streams, or there is no token in the slice.
    ImportError
        matplotlib is not installed.

    Examples
    --------
    >>> import dsv4
    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> with dsv4.load() as model, model.trace("To be, or not to be", streams=[0, 5]) as t:
    ...     len(lens(t, tokens=slice(-3, None)).texts)
    6
    """
    shown = _asked(trace.streams, "streams")
    shown = shown if layers is None else [_chosen(trace.streams, i, "streams") for i in layers]
    at = range(len(trace.texts))[slice(-12, None) if tokens is None else tokens]
    if not len(at):
        raise ValueError(f"tokens: got none of the {len(trace.texts)} tokens of the trace")
    best, p = [], []
    for layer in reversed(shown):
        logits = trace.lens(layer, list(at)).astype(np.float64)
        best.append(logits.argmax(-1))
        p.append(1 / np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
    name = trace.model.text_tokenizer("trace").decode
    ax = _axes(ax, (1.6 + 0.75 * len(at), 1.2 + 0.4 * len(shown)))
    image = ax.imshow(np.array(p), aspect="auto", cmap=MAP, vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(np.array(p)):
        ax.text(column, row, _shown(name([int(best[row][column])])), ha="center", va="center",
                fontsize=8, color="white" if value > 0.6 else "black")
    ax.set_yticks(range(len(shown)), [str(i) for i in reversed(shown)])
    ax.set_xticks(range(len(at)), [_shown(trace.texts[i]) for i in at], rotation=60, ha="right")
    ax.set_ylabel("after layer")
    ax.set_xlabel("after the token")
    ax.figure.colorbar(image, ax=ax, label="probability")
    return ax


def memory(plans: Plan | Sequence[Plan] | Mapping[str, Plan], ax: Any = None) -> Any:
    """What a model needs in memory, part by part: one bar a plan.

    Parameters
    ----------
    plans : Plan, sequence or mapping of str to Plan
        From `dsv4.plan` or `Model.plan`; a mapping names the bars, else they are named by context.
    ax : matplotlib Axes, optional

    Returns
    -------
    Axes
        Parts smaller than a hundredth of the longest bar are together in "other".

    Raises
    ------
    ImportError
        matplotlib is not installed.

    Examples
    --------
    >>> import dsv4
    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> with dsv4.load() as model:
    ...     memory(model.plan).get_xlabel()
    'MiB'
    """
    if isinstance(plans, Plan):
        plans = [plans]
    if not isinstance(plans, Mapping):
        plans = {f"{plan.context:,} tokens x {plan.batch}": plan for plan in plans}
    bars = [{**plan.weights, **{name: n * plan.batch for name, n in plan.state.items()},
             "workspace": plan.workspace} for plan in plans.values()]
    longest = max(sum(bar.values()) for bar in bars)
    names = [name for name in bars[0] if max(bar[name] for bar in bars) >= SMALL * longest]
    unit, power = ("GiB", 30) if longest >= 1 << 30 else ("MiB", 20)
    ax = _axes(ax, (8, 1.8 + 0.5 * len(bars)))
    left = np.zeros(len(bars))
    for i, name in enumerate([*names, "other"]):
        if name == "other":
            parts = [sum(n for part, n in bar.items() if part not in names) for bar in bars]
        else:
            parts = [bar[name] for bar in bars]
        width = np.array(parts) / 2**power
        ax.barh(list(plans), width, left=left, label=name, color=COLOURS[i % len(COLOURS)],
                hatch="//" if i >= len(COLOURS) else None, edgecolor="white", linewidth=0.5)
        left += width
    for i, plan in enumerate(plans.values()):
        ax.text(left[i], i, f" {size(plan.total)}", va="center", fontsize=8)
    ax.margins(x=0.12)
    ax.set_xlim(left=0)
    ax.invert_yaxis()
    ax.set_xlabel(unit)
    ax.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return ax


def limits(result: Mapping[str, Any] | str | os.PathLike[str], ax: Any = None) -> Any:
    """How much of its limit each row of a bench result reached: one bar a row.

    Parameters
    ----------
    result : dict or path
        What `dsv4 bench --json` printed, or the file it is in.
    ax : matplotlib Axes, optional

    Returns
    -------
    Axes
        Rows whose ratio is not a share of a limit are left out.

    Raises
    ------
    ValueError
        It is no such result.
    ImportError
        matplotlib is not installed.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> row = {"name": "read", "unit": "GB/s", "ratio": 0.75, "peer": None}
    >>> limits({"machine": {}, "rows": [row], "details": {}}).get_yticklabels()[0].get_text()
    'read'
    """
    rows = shares(_result(result))
    ax = _axes(ax, (7, 0.9 + max(4.0, 0.28 * len(rows))))
    ratios = [row["ratio"] for row in rows]
    colours = [COLOURS[1] if "FLOP" in row["unit"] else COLOURS[0] for row in rows]
    ax.barh([row["name"] for row in rows], ratios, color=colours)
    ax.invert_yaxis()
    ax.axvline(1, color="black", linewidth=1)
    for i, ratio in enumerate(ratios):
        ax.text(ratio, i, f" {ratio:.2f}", va="center", fontsize=8)
    ax.set_xlim(0, max([1.15, *(ratio + 0.1 for ratio in ratios)]))
    ax.set_xlabel("measured / limit of the same minute (blue: reading, orange: multiplying)")
    ax.tick_params(axis="y", labelsize=8)
    return ax


def shares(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of a bench result whose ratio is the share of a limit."""
    from dsv4.bench.report import LOWER

    return [row for row in result["rows"] if row["ratio"] is not None and row["peer"] is None
            and row["unit"] not in (*LOWER, "x one thread")]


def roofline(result: Mapping[str, Any] | str | os.PathLike[str], ax: Any = None) -> Any:
    """The roof of the machine, and the rows of a bench result under it.

    Parameters
    ----------
    result : dict or path
        What `dsv4 bench --json` printed, or the file it is in.
    ax : matplotlib Axes, optional

    Returns
    -------
    Axes
        Operations a second over operations a byte, both logarithmic, of the rows whose bytes and
        operations are known.

    Raises
    ------
    ValueError
        It is no such result.
    ImportError
        matplotlib is not installed.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> machine = {"limits": {"read_gb_s": 40, "exact_gflop_s": 900}}
    >>> roofline({"machine": machine, "rows": [], "details": {}}).get_ylabel()
    'GFLOP/s'
    """
    told = _result(result)
    rates = told["machine"]["limits"]
    read, peak = rates["read_gb_s"], rates["exact_gflop_s"]
    ax = _axes(ax, (6.5, 5))
    if peak:
        corner = peak / read
        ax.plot([0.3, corner, 4000], [0.3 * read, peak, peak], color="black")
        ax.text(0.45, 0.3 * read, f"{read:.0f} GB/s", va="center", fontsize=8)
        ax.text(corner * 2, peak * 1.1, f"{peak:.0f} GFLOP/s", fontsize=8)
    points = 0
    for row in told["rows"]:
        facts = told["details"].get(row["name"], {})
        if "operations" in facts:
            speed = row["value"] / facts["amount"] * facts["operations"] / 1e9
            ax.plot(facts["operations"] / facts["bytes"], speed, "osD^v"[points // 8 % 5],
                    color=COLOURS[points % 8], label=row["name"], markersize=5, linestyle="")
            points += 1
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("operations a byte read")
    ax.set_ylabel("GFLOP/s")
    ax.grid(True, which="both", alpha=0.2)
    if points:
        ax.legend(fontsize=6, loc="lower right", ncols=1 + points // 20)
    return ax


# ---- what they have in common ----

def _by_token(found: Any, head: int | None) -> npt.NDArray[np.float64]:
    """Attention weights of one head, or their mean, by the token they go to: [n, position + n]."""
    def of(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        chosen = weights.mean(1) if head is None else weights[:, head]
        return np.asarray(chosen, np.float64)

    n = len(found.window)
    total = found.position + n
    # changes from token to token, then their sums: an entry begins somewhere and ends
    change = np.zeros((n, total + 1))
    ranges = found.ranges()
    first, end = ranges[..., 0], ranges[..., 1]
    each = of(found.compressed) / np.maximum(end - first, 1)
    rows = np.arange(n)[:, None]
    np.add.at(change, (rows, np.minimum(first, total)), each)
    np.add.at(change, (rows, np.minimum(end, total)), -each)
    shown = change.cumsum(1)[:, :total]
    at, weights = found.positions, of(found.window)
    np.add.at(shown, (rows, np.maximum(at, 0)), np.where(at < 0, 0, weights))
    return np.asarray(np.maximum(shown, 0))  # sums of differences may be a little below



def _axes(ax: Any, inches: tuple[float, float]) -> Any:
    """`ax`, or those of a new figure; ImportError where matplotlib is missing."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("dsv4.plot needs matplotlib, which is not installed: "
                          "pip install 'dsv4[plot]'") from None
    return pyplot.subplots(figsize=inches, layout="constrained")[1] if ax is None else ax


def _asked(part: Any, name: str) -> list[int]:
    """The layers a trace has of one of its parts."""
    if not part:
        raise ValueError(f"trace: has no {name}; wanted one made with {name}=True")
    return sorted(part)


def _chosen(part: Any, layer: int | None, name: str) -> int:
    layers = _asked(part, name)
    if layer is None:
        return layers[0]
    if layer not in layers:
        raise ValueError(f"layer: got {layer}, wanted one of those traced: {layers}")
    return layer


def _name_tokens(axis: Any, trace: Any) -> None:
    """The text of each token as the label of its row, where there are few."""
    if len(trace.texts) <= MOST_LABELS:
        axis.set_ticks(trace.position + np.arange(len(trace.texts)),
                       [_shown(text) for text in trace.texts], fontsize=7)


def _shown(text: str) -> str:
    """A token as a label: what cannot be seen is written."""
    return text.replace("\n", "\\n").replace("$", r"\$") or "''"


def _result(result: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    """A bench result from a file or as it is; ValueError for anything else."""
    source = "result"
    if isinstance(result, str | os.PathLike):
        source = f"result: {os.fspath(result)}"
        try:
            result = json.loads(Path(result).read_text())
        except ValueError:
            result = {}
    if not isinstance(result, Mapping) or not {"machine", "rows", "details"} <= set(result):
        raise ValueError(f"{source} is not what `dsv4 bench --json` prints")
    return result
