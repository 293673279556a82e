# SPDX-License-Identifier: Apache-2.0
"""States of prompts that others begin with: forks kept under their tokens, within a budget.

A fork shares what it does not write with the session it came from, so a kept state costs little
more than its fixed part; it is counted in full here.  Least recently used ones go first.  What
continues from a fork has the same bits as what was computed from the beginning.

A batch has such states for as long as it runs, a model for the prefixes of its sessions.
"""

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from dsv4 import _core
from dsv4.arrays import Int32
from dsv4.session import NOW, Session

if TYPE_CHECKING:
    from dsv4.model import Model

# shorter beginnings are computed again: a step more costs about as much
LEAST = 32
MOST_STATES = 64


def common(a: Int32, b: Int32) -> int:
    """How many tokens two prompts begin with together."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n


class Prefixes:
    """A bounded cache from tokens to the state after them; for one thread at a time.

    Parameters
    ----------
    most_bytes : int
        Of all states together.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.nbytes = 0
        # least recently used first; without the Session, which would hold its model
        self._kept: list[tuple[Int32, _core.Session, int]] = []

    def __len__(self) -> int:
        return len(self._kept)

    def length(self, ids: Int32, rest: int = 1) -> int:
        """Tokens of the longest state that `ids` begins with, at least `rest` tokens shorter."""
        lengths = [len(e[0]) for e in self._kept if len(e[0]) <= len(ids) - rest
                   and e[0][-1] == ids[len(e[0]) - 1] and common(e[0], ids) == len(e[0])]
        return max(lengths, default=0)

    def longest(
        self, model: "Model", ids: Int32, rest: int = 1, checkpoints: int = 0
    ) -> Session | None:
        """A fork of that state, which keeps so many states itself."""
        n = self.length(ids, rest)
        for i, entry in enumerate(self._kept):
            if n and len(entry[0]) == n and common(entry[0], ids) == n:
                self._kept.append(self._kept.pop(i))
                return Session(model, entry[1].fork(NOW, checkpoints))
        return None

    def shared(self, ids: Int32) -> list[int]:
        """How far `ids` agrees with each state's tokens."""
        return [common(entry[0], ids) for entry in self._kept]

    def keep(self, ids: Int32, session: Session) -> None:
        """Keep the state of a session that has the tokens `ids`."""
        if len(ids) < LEAST or any(np.array_equal(entry[0], ids) for entry in self._kept):
            return
        nbytes = session.nbytes + ids.nbytes
        if nbytes > self.most_bytes:
            return
        self._kept.append((ids.copy(), session._core.fork(NOW, 0), nbytes))
        self.nbytes += nbytes
        while self.nbytes > self.most_bytes or len(self._kept) > MOST_STATES:
            _, old, n = self._kept.pop(0)
            old.close()
            self.nbytes -= n

    def close(self) -> None:
        """Give all states back."""
        for _, session, _ in self._kept:
            session.close()
        self._kept.clear()
        self.nbytes = 0


class SharedPrefixes:
    """The states after the prefixes of a model's sessions: what `Model.session` begins with.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prefixes: Prefixes | None = None

    def session(self, model: "Model", ids: Int32, checkpoints: int) -> Session:
        """A session that has these tokens: forked from the longest beginning that is kept, the rest
        computed, and kept in its turn where others may begin."""
        with self._lock:
            if self._prefixes is None:
                from dsv4.scheduler import KEPT_SHARE, room_for_states

                self._prefixes = Prefixes(room_for_states(model) // KEPT_SHARE)
            session = self._prefixes.longest(model, ids, 0, checkpoints)
            shared = self._prefixes.shared(ids)
        if session is None:
            session = Session(model, _core.Session(model._core, checkpoints))
        try:
            # also where it leaves what other prefixes go on with: the next one may leave there too
            for end in sorted({*(n for n in shared if LEAST <= n < len(ids)), len(ids)}):
                if end > session.position:
                    session.append(ids[session.position : end], logits="none")
                    with self._lock, suppress(MemoryError):
                        self._prefixes.keep(ids[:end], session)
        except BaseException:
            session.close()
            raise
        return session

    def close(self) -> None:
        """Give all states back."""
        with self._lock:
            if self._prefixes is not None:
                self._prefixes.close()
