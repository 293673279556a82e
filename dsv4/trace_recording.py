# SPDX-License-Identifier: Apache-2.0
"""What steps write into a trace: a row for each token, and the room for them beforehand."""

import shutil
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4 import _core
from dsv4.arrays import WANT, Float32, Int32, Logits, wanted_rows
from dsv4.device_columns import DeviceColumn
from dsv4.device_columns import check_room as check_device
from dsv4.memory import available_memory, size
from dsv4.trace_columns import Column, Row
from dsv4.trace_parts import PARTS

if TYPE_CHECKING:
    from dsv4.model import Model
    from dsv4.session import Session

Tap = tuple[int, int, Any]
NAN, NONE = float("nan"), 0.0
# tokens whose logits come out at once: 66 MB with the published vocabulary
ROWS_AT_ONCE = 128


class Recording:
    """The rows of a trace while steps fill them; `dsv4.Trace` is what one looks at.

    `append` runs a step itself.  Others call `begin` before one, hand its taps over, and `take`
    after it; nothing counts without that.

    Parameters
    ----------
    model : Model
    parts : dict
        The layers of each part.
    logits : "all", "last" or "none"
    nll : bool
    folder : Path or None
        Where the files go; None: into memory.
    device : bool
        Layers stay on the GPU.
    """

    def __init__(
        self, model: "Model", parts: dict[str, list[int]], logits: Logits, nll: bool,
        folder: Path | None, device: bool,
    ) -> None:
        self.model, self.parts, self.device = model, parts, device
        self.position = 0
        self._keeps, self._scores, self._folder = logits, nll, folder
        self._make_columns()
        self._last: Float32 | None = None  # logits after the last token
        self._started = self._closed = False
        self._room_end = 0  # the position up to which there is room

    def _make_columns(self) -> None:
        ratios = self.model.config.compress_ratios
        self._columns: dict[tuple[str, int], Column] = {}
        for part, layers in self.parts.items():
            for name in PARTS[part]:
                for layer in layers:
                    shape = self.model._core.value(layer, _core.VALUES.index(name))
                    if shape is None or (name, layer) in self._columns:
                        continue
                    fill = NAN if name == "index_scores" else NONE
                    if self.device:
                        self._columns[name, layer] = DeviceColumn(
                            Row(*shape), ratios[layer], fill, self.model, layer)
                        continue
                    self._columns[name, layer] = Column(
                        Row(*shape), ratios[layer], fill, self._path(f"{name}.{layer}"))
        self._taps = {(layer, _core.VALUES.index(name)): column
                      for (name, layer), column in self._columns.items()}
        vocab = (self.model.config.vocab_size,)
        self._tokens = self._plain("tokens", True, ())
        self._logits = self._plain("logits", False, vocab) if self._keeps == "all" else None
        self._nll = self._plain("nll", False, ()) if self._scores else None

    def _path(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{name}.npy"

    def _plain(self, name: str, integer: bool, dims: tuple[int, ...]) -> Column:
        """A column that belongs to no layer; a number is a row of one."""
        row = Row(integer, dims or (1,), False, False)
        return Column(row, 0, NONE, self._path(name))

    @property
    def _all(self) -> list[Column]:
        others = (self._tokens, self._logits, self._nll)
        return [*self._columns.values(), *(column for column in others if column is not None)]

    def __len__(self) -> int:
        """Tokens traced."""
        return self._tokens.n

    @property
    def nbytes(self) -> int:
        """Bytes set aside, in memory, on the GPU or on disk."""
        return sum(column.held for column in self._all)

    @property
    def rows_wanted(self) -> bool:
        """Whether it needs the logits of all tokens."""
        return self._scores or self._keeps == "all"

    def want(self, want: int) -> int:
        """The logits a step must give: what the caller wants, and this."""
        if self.rows_wanted:
            return WANT["all"]
        return max(want, WANT["last"]) if self._keeps == "last" else want

    def begin(self, position: int, n: int) -> list[Tap]:
        """Make room for n tokens from `position` on, and tell a step where they go.

        Nothing counts until `take`; it may be called again.
        """
        if self._closed:
            raise ValueError("trace: it is closed; wanted an open one")
        if self._started and position != self.position + len(self):
            raise ValueError(
                f"trace: it ends at position {self.position + len(self)}, the session is at "
                f"{position}; wanted a trace of its own for each session")
        if not self._started:
            self.position = position
        end = position + n
        if not self._started or end > self._room_end:
            self._reserve(position, n)
        taps = []
        for (layer, value), column in self._taps.items():
            before, _ = column.needs(self.position, position)
            rows, _ = column.needs(self.position, end)
            taps.append((layer, value, column.part(before, rows - before)))
        return taps

    def _reserve(self, position: int, n: int) -> None:
        """Room for n tokens from `position` on; beyond the first time for twice as much, if it is
        there."""
        self.check_room(position, n)
        end = position + n
        if self._started:
            more = end + min(end - self.position, self.model.config.max_position_embeddings - end)
            with suppress(MemoryError, OSError):
                self.check_room(position, more - position)
                end = more
        for column in self._all:
            column.reserve(*column.needs(self.position, end))
        self._room_end = end

    def take(self, ids: Int32, logits: Float32 | None) -> None:
        """The step is done: its rows count.  `logits` are all rows where `want` said so."""
        first, n = self._tokens.n, len(ids)
        end = self.position + first + n
        self._started = True
        for column in self._columns.values():
            column.n, column.width = column.needs(self.position, end)
        if self._nll is not None and logits is not None:
            self._take_nll(ids, logits)
        if self._logits is not None and logits is not None:
            self._logits.part(first, n)[:] = logits
            self._logits.n = first + n
        if logits is not None:
            self._last = logits[-1].copy()
        self._tokens.part(first, n)[:, 0] = ids
        self._tokens.n = first + n

    def _take_nll(self, ids: Int32, logits: Float32) -> None:
        assert self._nll is not None
        known, following = logits[:-1], np.asarray(ids)[1:]
        if self._last is not None:
            known, following = np.concatenate([self._last[None], known]), np.asarray(ids)
        rows = _core.logprobs(np.ascontiguousarray(known), following, 0)
        at = self._nll.n
        self._nll.part(at, len(rows))[:, 0] = [-logprob for logprob, _ in rows]
        self._nll.n = at + len(rows)

    def forget(self) -> None:
        """Everything that was taken: it begins again."""
        for column in self._all:
            column.n = column.width = 0
        self._last, self._started = None, False

    def check_room(self, position: int, n: int) -> None:
        """MemoryError, or OSError with a folder, unless n tokens from `position` on have room."""
        begin = self.position if self._started else position
        need = {"logits": 0, "others": 0}
        check_device([c for c in self._all if isinstance(c, DeviceColumn)], begin, position + n)
        for column in self._all:
            if isinstance(column, DeviceColumn):
                continue
            name = "logits" if column is self._logits else "others"
            need[name] += max(0, column.nbytes(begin, position + n) - column.held)
        total = sum(need.values())
        if not total:
            return
        if self._folder is not None:
            free, where = shutil.disk_usage(self._folder).free, f"on the disk of {self._folder}"
        else:
            free, where = available_memory(), "in memory"
        if total <= free:
            return
        message = (f"trace: {n} tokens need {total:,} bytes ({size(total)}), {free:,} "
                   f"({size(free)}) are free {where}; wanted fewer layers, parts or tokens")
        if self._folder is not None:
            raise OSError(28, message)
        raise MemoryError(f"{message}, or out=, a folder")

    def append(self, session: "Session", ids: Int32, want: int) -> Float32 | None:
        """Append ids to a session; returns the logits that `want` says.

        Where the logits of all rows are needed and the caller wants fewer, they come out in pieces,
        on a fork that takes the session's place when all are done.
        """
        core = self.model._core
        if not self.rows_wanted or want == WANT["all"] or len(ids) <= ROWS_AT_ONCE:
            taps = self.begin(session.position, len(ids))
            ((rows, _),) = core.step([(session._core, ids, self.want(want), None, taps)], None)
            self.take(ids, rows)
            return wanted_rows(rows, want)
        self.check_room(session.position, len(ids))
        before = len(self), self._started, self._last, self._nll.n if self._nll else 0
        fork = session._core.fork(-1)
        rows = None
        try:
            cuts = [*range(0, len(ids), ROWS_AT_ONCE), len(ids)]
            for first, end in pairwise(cuts):
                taps = self.begin(fork.position, end - first)
                ((rows, _),) = core.step(
                    [(fork, ids[first:end], WANT["all"], None, taps, 1)], None)
                self.take(ids[first:end], rows)
        except BaseException:
            self._back_to(*before)
            raise
        session._core.swap(fork)
        return wanted_rows(rows, want)

    def _back_to(self, n: int, started: bool, last: Float32 | None, scored: int) -> None:
        """As it was after its first n tokens."""
        self._started, self._last = started, last
        for column in self._columns.values():
            column.n, column.width = column.needs(self.position, self.position + n)
        self._tokens.n = n
        if self._logits is not None:
            self._logits.n = n
        if self._nll is not None:
            self._nll.n = scored
