# SPDX-License-Identifier: Apache-2.0
"""States of prompts that others begin with: forks kept under their tokens, within a budget.

A fork shares what it does not write with the session it came from, so a kept state costs little
more than its fixed part; it is counted in full here.  Least recently used ones go first.  What
continues from a fork has the same bits as what was computed from the beginning.
"""

import numpy as np

from dsv4.arrays import Int32
from dsv4.session import Session

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
    """A bounded cache from tokens to the state after them.

    Parameters
    ----------
    most_bytes : int
        Of all states together.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.nbytes = 0
        self._kept: list[tuple[Int32, Session, int]] = []  # least recently used first

    def __len__(self) -> int:
        return len(self._kept)

    def length(self, ids: Int32) -> int:
        """Tokens of the longest state that `ids` begins with, at least one token shorter."""
        lengths = [len(e[0]) for e in self._kept if len(e[0]) < len(ids)
                   and e[0][-1] == ids[len(e[0]) - 1] and common(e[0], ids) == len(e[0])]
        return max(lengths, default=0)

    def longest(self, ids: Int32) -> Session | None:
        """A fork of that state."""
        n = self.length(ids)
        for i, entry in enumerate(self._kept):
            if n and len(entry[0]) == n and common(entry[0], ids) == n:
                self._kept.append(self._kept.pop(i))
                return entry[1].fork()
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
        self._kept.append((ids.copy(), session.fork(), nbytes))
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
