# SPDX-License-Identifier: Apache-2.0
"""What the bench shows: the machine, a table of rows, bytes by class, projections; or JSON."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dsv4
from dsv4 import _core, memory
from dsv4.bench import count, synthetic
from dsv4.bench.limits import EXACT, last_level_cache, page_mode
from dsv4.bench.measure import Bench, Row
from dsv4.bench.rows import CONTEXTS

LOWER = ("x one token", "x bytes and operations", "of a step")  # units of which less is better


@dataclass(frozen=True, slots=True)
class Report:
    """Everything measured in one run.  `str` is a table, `as_dict` the same for machines.

    details: of a row, how many pairs it is the median of, how many of them were unsteady, and for
    the roofline the operations and bytes of a run and its amount in the row's unit x seconds; its
    kernel, or distinct experts a layer; the shares of `outside`; the engine compared with.
    """

    machine: dict[str, Any]
    rows: Sequence[Row]
    details: dict[str, dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return {"machine": self.machine, "rows": [row.as_dict() for row in self.rows],
                "details": self.details}

    def __str__(self) -> str:
        return "\n".join([
            *_heading(self.machine), "",
            *_table(
                [row for row in self.rows if row.peer is None],
                {name: facts.get("kernel", "") for name, facts in self.details.items()}),
            *self._phases(), *self._warnings(), *self._peers(), "",
            *_bytes(self.machine), "", *_projections(self.machine, self.rows)])

    def _phases(self) -> list[str]:
        """Where the time of a token goes, from the row `outside`."""
        shares = self.details.get("outside", {})
        shown = [f"{phase} {100 * share:.1f} %" for phase, share in shares.items() if share]
        return ["time of a token at 4k: " + ", ".join(shown)] if shown else []

    def _peers(self) -> list[str]:
        found = [row for row in self.rows if row.peer is not None and row.peer_ratio is not None]
        if not found:
            return []
        width = max(len(row.name) for row in found)
        lines = ["", f"{'':{width}}  {'measured':>10}  {'other':>10}  times as fast"]
        for row in found:
            engine = self.details.get(row.name, {}).get("engine", "")
            lines.append(
                f"{row.name:{width}}  {number(row.value):>10}  {number(row.peer or 0):>10}  "
                f"{row.peer_ratio or 0:5.2f}  {row.unit}  {engine}")
        return lines

    def _warnings(self) -> list[str]:
        """Rows whose limits moved while they were measured."""
        found = [
            f"{name} ({n['unsteady']} of {n['pairs']} pairs)" for name, n in self.details.items()
            if 2 * n.get("unsteady", 0) > n.get("pairs", 0)]
        return ["limits moved by more than 15 %: " + ", ".join(found)] if found else []


def read_peers(path: str | os.PathLike[str]) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """The rows that `tests/bench/peers.py --json` printed into a file, and their engines.

    Raises
    ------
    ValueError
        It has no such rows.
    OSError
        It cannot be read.
    """
    names = [field.name for field in fields(Row)]
    try:
        told = json.loads(Path(path).read_text())["rows"]
        found = [Row(**{name: row[name] for name in names}) for row in told]
        engines = {row["name"]: {"engine": str(row["engine"])} for row in told}
    except (ValueError, LookupError, TypeError):
        raise ValueError(
            f"peers: {os.fspath(path)} is not what tests/bench/peers.py --json prints") from None
    return found, engines


def machine(
    bench: Bench, published: Mapping[str, Any], model: str, quick: bool
) -> dict[str, Any]:
    """What was measured on, with what: the part of the report that is not a row."""
    c, threads = bench.config, bench.threads
    rates, alone = bench.limits.usual(threads), bench.limits.usual(1)
    full = published
    return {
        "cpu": _cpu_name(), "sets": [name for name, here in _core.cpu_sets() if here],
        "disabled": bench.disable, "processors": len(os.sched_getaffinity(0)), "threads": threads,
        "last_level_cache_bytes": last_level_cache(), "memory_bytes": _memory_bytes(),
        "pages": page_mode(), "system": platform.platform(), "dsv4": dsv4.__version__,
        "commit": _commit(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "limits": {
            "read_gb_s": rates.read / 1e9, "read_gb_s_1t": alone.read / 1e9,
            "exact_gflop_s": rates.exact / 1e9, "exact_gflop_s_1t": alone.exact / 1e9,
            "byte_gop_s": rates.byte / 1e9, "names": bench.limits.names(threads),
        },
        "model": {
            "dimensions": f"V4-{model.capitalize()}", "quick": quick,
            "layers": c.num_hidden_layers, "full_layers": full["num_hidden_layers"],
            "experts": c.n_routed_experts, "full_experts": full["n_routed_experts"],
            "bytes": bench.checkpoint.nbytes,
            "kernels": {op: name for op, name in bench.model.kernel_info.items()
                        if op.startswith(("linear", "attention", "index"))},
        },
        "bytes_per_token": {name: bench.decode_bytes(n - 1) for name, n in CONTEXTS.items()
                            if n <= c.max_position_embeddings},
        "full_depth_bytes_per_token": _full_bytes(full),
    }


def _full_bytes(full: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of one decoded token at a context of 4,096 of the whole published model."""
    config = synthetic.configure(full)
    c, tensors = synthetic.table(config)
    return count.weight_bytes(tensors, c, CONTEXTS["4k"] - 1) | count.state_bytes(
        c, CONTEXTS["4k"] - 1)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    name = facts.get("model name", platform.processor() or platform.machine())
    family = ", ".join(f"{k} {facts[k]}" for k in ("cpu family", "model") if k in facts)
    return f"{name} ({family})" if family else name


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _commit() -> str | None:
    """Of the source tree this runs from, if it is one."""
    root = Path(dsv4.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"],
                              capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


# ---- text ----

def _heading(m: dict[str, Any]) -> list[str]:
    model, limits = m["model"], m["limits"]
    which = " or ".join(kind for kind in EXACT if kind in limits["names"])
    depth = f"{model['layers']} of {model['full_layers']} layers"
    experts = f"{model['experts']} of {model['full_experts']} experts"
    return [
        f"{model['dimensions']}, {depth}, {experts}, {memory.size(model['bytes'])}, random weights",
        f"{m['cpu']}, {m['threads']} of {m['processors']} processors, "
        f"{memory.size(m['last_level_cache_bytes'])} cache, {memory.size(m['memory_bytes'])}; "
        f"dsv4 {m['dsv4']}{' ' + m['commit'] if m['commit'] else ''}, {m['date'][:10]}",
        f"limits: read {limits['read_gb_s']:.1f} GB/s (one thread {limits['read_gb_s_1t']:.1f}), "
        f"{which or 'multiply-add'} {limits['exact_gflop_s']:.0f} GFLOP/s "
        f"(one thread {limits['exact_gflop_s_1t']:.0f}), bytes {limits['byte_gop_s']:.0f} GOP/s",
    ]


def number(value: float) -> str:
    """Three digits or more.

    Examples
    --------
    >>> [number(x) for x in (0.04567, 7.891, 45.67, 1234.5)]
    ['0.046', '7.89', '45.7', '1,234']
    """
    if abs(value) < 1:
        return f"{value:.3f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else (
        f"{value:,.0f}")


def bar(ratio: float, width: int = 20) -> str:
    """The ratio to 1 as a bar; what is beyond 1 is cut off."""
    filled = round(min(max(ratio, 0.0), 1.0) * width)
    return "#" * filled + "." * (width - filled)


def _table(rows: Sequence[Row], kernels: Mapping[str, str]) -> list[str]:
    width = max([len(row.name) for row in rows], default=4)
    lines = [f"{'':{width}}  {'measured':>10}  {'limit':>10}  ratio"]
    for row in rows:
        limit = "-" if row.limit is None else number(row.limit)
        ratio = "    -" if row.ratio is None else f"{row.ratio:5.2f}"
        shown = "" if row.ratio is None or row.unit in LOWER else f"  {bar(row.ratio)}"
        less = "  (less is better)" if row.unit in LOWER else ""
        lines.append(f"{row.name:{width}}  {number(row.value):>10}  {limit:>10}  {ratio}"
                     f"{shown}  {row.unit}{less}  {kernels.get(row.name, '')}".rstrip())
    return lines


def _bytes(m: dict[str, Any]) -> list[str]:
    table = m["bytes_per_token"]
    lines = ["bytes of a decoded token, MB " + "".join(f"{name:>10}" for name in table) +
             "   all layers, 4k"]
    for kind in count.CLASSES:
        cells = "".join(f"{found[kind] / 1e6:10,.1f}" for found in table.values())
        lines.append(f"  {kind:<27}{cells}{m['full_depth_bytes_per_token'][kind] / 1e6:17,.1f}")
    cells = "".join(f"{sum(found.values()) / 1e6:10,.1f}" for found in table.values())
    total = sum(m["full_depth_bytes_per_token"].values())
    return [*lines, f"  {'all':<27}{cells}{total / 1e6:17,.1f}"]


def _projections(m: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """What the measured rate would give for the whole model; said to be no measurement."""
    total = sum(m["full_depth_bytes_per_token"].values())
    for row in rows:
        if row.name == "decode_4k" and "4k" in m["bytes_per_token"]:
            rate = sum(m["bytes_per_token"]["4k"].values()) * row.value
            return [f"projection, bytes x measured rate: {total / 1e9:.2f} GB a token at "
                    f"{rate / 1e9:.1f} GB/s = {rate / total:.2f} tokens/s"]
    return []
