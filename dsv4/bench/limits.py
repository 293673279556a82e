# SPDX-License-Identifier: Apache-2.0
"""What the machine can do: reading memory, and its multiply-add instructions, on N threads at once.

The loops are those of kernels/cpu/<set>/limits*.c.  A read walk gives each thread a contiguous part
of some memory; several kinds of walk are tried, the best two are measured each time and the better
one counts.
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from dsv4 import _core

USUAL_CACHE = 32 << 20  # where the system does not say
PEAK_SECONDS = 0.004
EXACT = ("f32 fma", "bf16 dot")  # instructions whose sums are the contract's


class Rates(NamedTuple):
    """Bytes and operations a second; 0 where not measured.

    `exact` is the better of the f32 multiply-add and the bf16 dot, `byte` the dot of bytes.
    """

    read: float = 0.0
    exact: float = 0.0
    byte: float = 0.0

    def best(self, other: "Rates") -> "Rates":
        return Rates(*map(max, self, other))


def last_level_cache(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache of the first processor."""
    found = [0]
    for path in root.glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdecimal() and text[-1] in "KM":
            found.append(int(text[:-1]) << (10 if text[-1] == "K" else 20))
    return max(found) or USUAL_CACHE


def memory_at(address: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
    """Memory as a buffer; it must stay where it is."""
    return (ctypes.c_char * nbytes).from_address(address)


class Limits:
    """Measures limits with any number of threads.

    Parameters
    ----------
    pieces : sequence of (address, bytes)
        Memory to read, a piece at each measurement in turn; together many times the last cache.
    disable : str, optional
        Instruction sets not to use, as in DSV4_CPU_DISABLE (reading memory uses all).

    Examples
    --------
    >>> import numpy as np
    >>> memory = np.ones(1 << 20, np.uint8)
    >>> Limits([(memory.ctypes.data, memory.nbytes)]).read(1) > 0
    True
    """

    def __init__(
        self, pieces: Sequence[tuple[int, int]], disable: str | None = None
    ) -> None:
        self.pieces = list(pieces)
        self.turn = 0
        self.walks = {a: f"{name} ({set})" for kind, name, set, a in _core.limits(None)
                      if kind == "read"}
        self.peaks: dict[str, dict[int, str]] = {}
        for kind, name, _, address in _core.limits(disable or None):
            if kind != "read":
                self.peaks.setdefault(kind, {})[address] = name
        self.chosen: dict[int, list[int]] = {}
        self.rounds: dict[int, int] = {}
        self.seen: dict[int, list[Rates]] = {}  # what `measure` found, by threads

    def _walk(self, threads: int, walk: int) -> float:
        address, nbytes = self.pieces[self.turn % len(self.pieces)]
        self.turn += 1
        (seconds,) = _core.time_read(threads, walk, memory_at(address, nbytes), 1)
        return nbytes / max(seconds, 1e-9)

    def read(self, threads: int) -> float:
        """Bytes a second."""
        if threads not in self.chosen:
            speeds = {walk: median(self._walk(threads, walk) for _ in range(3))
                      for walk in self.walks}
            self.chosen[threads] = sorted(speeds, key=lambda w: -speeds[w])[:2]
        return max(self._walk(threads, walk) for walk in self.chosen[threads])

    def peak(self, kinds: Sequence[str], threads: int) -> float:
        """Operations a second of the best instruction of these kinds; 0 without one."""
        return max((self._peak(address, threads) for kind in kinds
                    for address in self.peaks.get(kind, {})), default=0.0)

    def _peak(self, address: int, threads: int) -> float:
        if address not in self.rounds:
            _, times = _core.time_peak(1, address, 2000, 5)
            self.rounds[address] = max(2000, int(2000 * PEAK_SECONDS / max(min(times), 1e-9)))
        operations, times = _core.time_peak(threads, address, self.rounds[address], 3)
        return operations / max(min(times), 1e-9)

    def measure(self, threads: int, needs: Sequence[str]) -> Rates:
        """The rates named: "read", "exact", "byte"."""
        found = Rates(
            read=self.read(threads) if "read" in needs else 0.0,
            exact=self.peak(EXACT, threads) if "exact" in needs else 0.0,
            byte=self.peak(("byte dot",), threads) if "byte" in needs else 0.0,
        )
        self.seen.setdefault(threads, []).append(found)
        return found

    def usual(self, threads: int) -> Rates:
        """The medians of all that was measured, of each rate at least once."""
        self.measure(threads, Rates._fields)
        return Rates(*(
            median([rate for rate in rates if rate] or [0.0])
            for rates in zip(*self.seen[threads], strict=True)))

    def names(self, threads: int) -> dict[str, str]:
        """Which walks and instructions the limits are, for the report."""
        names = {"read": ", ".join(self.walks[walk] for walk in self.chosen.get(threads, []))}
        for kind, found in self.peaks.items():
            names[kind] = ", ".join(found.values())
        return {kind: text for kind, text in names.items() if text}


def page_mode() -> str:
    """How large the pages of files in memory are."""
    path = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    try:
        text = path.read_text()
    except OSError:
        text = "[never]"
    small = "[never]" in text or "[deny]" in text or "[advise]" in text
    return f"{os.sysconf('SC_PAGE_SIZE') >> 10} KiB" if small else "huge where the system can"
