# SPDX-License-Identifier: Apache-2.0
"""How fast this machine runs V4, and how fast it could: `dsv4 bench`.

`synthetic` builds a model of the published dimensions in memory, `limits` measures what the machine
can do, `count` says how many bytes and operations a step needs, `measure` times between two
measurements of a limit, `rows` lists what is timed, `report` and `plot` show it.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dsv4.bench import rows, synthetic
from dsv4.bench.measure import Bench
from dsv4.bench.report import Report, machine
from dsv4.loading import _Progress, _thread_count

QUICK_REPEATS, REPEATS, LEAST = 3, 7, 3  # pairs of a row; the last, of long rows of a full run


def run(
    model: str = "flash", *, quick: bool = False, experts: int | None = None,
    threads: int | None = None, only: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Report:
    """Build a synthetic model and measure.

    Parameters
    ----------
    model : "flash" or "pro"
        Whose dimensions.
    quick : bool
        Four layers, one of each kind, of eight experts, and the median of three; else all layers
        and the median of seven.
    experts : int, optional
        Distinct experts of each layer; by default as many as fit into the free memory.
    threads : int, optional
        As for `dsv4.load`.
    only : sequence of str
        Rows to measure; those of the run by default.
    config : mapping, optional
        Of a model of other dimensions.

    Raises
    ------
    MemoryError
        It does not fit; says what is needed, what is free and what would fit.
    ValueError
        An argument out of range; an unknown row, with all names.

    Examples
    --------
    >>> from dsv4 import nano
    >>> config = dict(nano.CONFIG, num_experts_per_tok=2)
    >>> report = run(config=config, quick=True, threads=1, only=["layer_hca"])
    >>> report.rows[0].unit
    'GB/s'
    """
    published = synthetic.published(model) if config is None else config
    cases = _chosen(quick, only)
    small = _configure(published, quick, experts)
    with _Progress(f"{published['num_hidden_layers']} layers", "filling") as progress:
        checkpoint = synthetic.build(small, progress=progress)
    with checkpoint, synthetic.load(checkpoint, threads) as loaded:
        disable = os.environ.get("DSV4_CPU_DISABLE") or None
        bench = Bench(checkpoint, loaded, disable, QUICK_REPEATS if quick else REPEATS,
                      1 if quick else LEAST)
        try:
            found = []
            for i, case in enumerate(cases):
                _say(f"[{i + 1}/{len(cases)}] {case.name}: {case.what}")
                found.append(case.run(bench, case.name))
            _say("")
            return Report(machine(bench, published, model, quick), found, bench.details)
        finally:
            _say("")
            bench.close()


def check(
    model: str, quick: bool, experts: int | None, threads: int | None, only: Sequence[str]
) -> None:
    """ValueError for arguments of `run` that cannot be carried out anywhere."""
    _chosen(quick, only)
    _thread_count(threads)
    _configure(synthetic.published(model), quick, experts)


def _configure(
    published: Mapping[str, Any], quick: bool, experts: int | None
) -> dict[str, Any]:
    """Layers and experts of the run."""
    layers = synthetic.QUICK_LAYERS if quick else None
    layers = None if layers and layers >= published["num_hidden_layers"] else layers
    full = synthetic.configure(published, layers=layers)
    if experts is None:
        least = published["num_experts_per_tok"]
        most = published["n_routed_experts"]
        usual = synthetic.QUICK_EXPERTS if quick else synthetic.fitting(full)
        experts = min(max(usual, least), most)
    return synthetic.configure(full, experts=experts)


def _chosen(quick: bool, only: Sequence[str]) -> list[rows.Case]:
    known = rows.cases()
    names = [case.name for case in known]
    for name in only:
        if name not in names:
            raise ValueError(f"only: got {name!r}, wanted one of {', '.join(names)}")
    return [case for case in known if (case.name in only if only else case.quick or not quick)]


def _say(text: str) -> None:
    """One line on a terminal that the next one replaces; nothing elsewhere."""
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
