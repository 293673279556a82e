# SPDX-License-Identifier: Apache-2.0
"""Attention over a window and compressed entries as an object: of a layer, or built from arrays.

Both run the engine's own code (SPEC 3).  A state holds what earlier rows left: the window's rows,
the compressed entries, the indexer's keys, and the rows whose entry has not closed yet.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from dsv4 import _core
from dsv4.arrays import Float32, Int32, from_bf16
from dsv4.parts import Kind, Part, rows

if TYPE_CHECKING:
    from dsv4.config import Config

WINDOW, COMPRESSED, INDEX = range(3)  # enum dsv4_rows
NOW = -1


class Entries(NamedTuple):
    """The compressed entries that close with some rows; float32 holding the values as kept.

    Attributes
    ----------
    compressed : [m, head_dim]
        Entry e covers tokens [e * ratio, (e + 1) * ratio), of CSA layers also the `ratio` before.
    index_keys : [m, index_head_dim] or None
        Their keys for the indexer (CSA).
    """

    compressed: Float32
    index_keys: Float32 | None


class Selection(NamedTuple):
    """What the indexer chose for n tokens.

    Attributes
    ----------
    selected : int32 [n, top_k]
        Entries each token attends to, ascending, padded with -1; while it sees no more than
        top_k, all of them.
    scores : float32 [n, entries]
        Of every entry the last token sees; NaN where a token does not see it.
    """

    selected: Int32
    scores: Float32


class AttentionState:
    """What one layer's attention keeps of the rows so far.  From `Attention.state`.

    It belongs to its layer; safe to use from several threads, one call after the other.
    """

    def __init__(self, core: _core.Session, index: int, ratio: int, window: int) -> None:
        self._core, self._index, self._ratio, self._window = core, index, ratio, window

    @property
    def position(self) -> int:
        """Rows so far."""
        return self._core.position

    @property
    def window(self) -> Float32:
        """The last rows, oldest first: float32 [min(position, window), head_dim], as kept."""
        n = self.position
        return self._rows(WINDOW, max(0, n - self._window), min(n, self._window))

    @property
    def compressed(self) -> Float32:
        """All entries: float32 [position // ratio, head_dim], as kept; none for SWA."""
        return self._rows(COMPRESSED, 0, self.position // self._ratio if self._ratio else 0)

    @property
    def index_keys(self) -> Float32:
        """The indexer's keys of all entries: float32 [position // 4, index_head_dim]; CSA."""
        return self._rows(INDEX, 0, self.position // self._ratio if self._ratio == 4 else 0)

    def _rows(self, kind: int, first: int, n: int) -> Float32:
        return from_bf16(self._core.rows(self._index, kind, first, n))

    def fork(self) -> "AttentionState":
        """A second state with the same past and a future of its own.

        Examples
        --------
        >>> import numpy as np
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     attention = model.layers[2].attention
        ...     x = np.ones((5, attention.hidden_size), np.float32)
        ...     state = attention.state()
        ...     _ = attention(x, state)
        ...     other = state.fork()
        ...     y = attention(x, other)
        ...     state.position, other.position
        (5, 10)
        """
        return AttentionState(self._core.fork(NOW), self._index, self._ratio, self._window)

    def __repr__(self) -> str:
        return f"<dsv4.AttentionState of layer {self._index} at row {self.position}>"


class Attention(Part):
    """The attention of one layer.

    Attributes
    ----------
    kind : "SWA", "CSA" or "HCA"
    hidden_size, heads, head_dim, window : int
    ratio : int
        Tokens per compressed entry; 0 for SWA.
    top_k : int
        Entries a token attends to at most (CSA).
    """

    kind: str
    hidden_size: int
    heads: int
    head_dim: int
    window: int
    ratio: int
    top_k: int

    @classmethod
    def _of_layer(cls, core: _core.Model, index: int, config: "Config") -> "Attention":
        self = cls.__new__(cls)
        c = config
        self._bind(core, index, c.layer_kind(index), c.hidden_size, c.num_attention_heads,
                   c.head_dim, c.sliding_window, c.compress_ratios[index], c.index_topk)
        return self

    def _bind(
        self, core: _core.Model, index: int, kind: str, hidden: int, heads: int, head_dim: int,
        window: int, ratio: int, top_k: int,
    ) -> None:
        Part.__init__(self, core, index, "attention")
        self.kind, self.hidden_size, self.heads, self.head_dim = kind, hidden, heads, head_dim
        self.window, self.ratio, self.top_k = window, ratio, top_k

    def state(self) -> AttentionState:
        """A state without rows: of position 0.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     model.layers[2].attention.state()
        <dsv4.AttentionState of layer 2 at row 0>
        """
        return AttentionState(_core.layer_state(self._core, self._index), self._index, self.ratio,
                              self.window)

    def __call__(self, x: npt.ArrayLike, state: AttentionState | None = None) -> Float32:
        """The whole sublayer on n rows that follow those of the state, which grows by them.

        Parameters
        ----------
        x : float [n, hidden_size]
            Normed input of the sublayer (`Mix.x`); rounded to bf16.
        state : AttentionState, optional
            Of this layer; without it from position 0, and nothing is kept.

        Returns
        -------
        float32 [n, hidden_size]
            Holds bf16 values.  Row by row or all at once gives the same bits.

        Raises
        ------
        ValueError, TypeError
            Another shape, not floats, the state of another layer, more rows than the context
            holds; the model is closed.  The state stays as it was.

        Examples
        --------
        >>> import numpy as np
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     attention = model.layers[2].attention
        ...     x = np.random.default_rng(0).standard_normal((6, attention.hidden_size))
        ...     state = attention.state()
        ...     y = np.concatenate([attention(row, state) for row in x[:, None]])
        ...     state.position, bool((y == attention(x)).all())
        (6, True)
        """
        return from_bf16(self._run(Kind.ATTENTION, self._x(x), state=self._state(state))[0])

    def compress(self, x: npt.ArrayLike, state: AttentionState | None = None) -> Entries:
        """The compressed entries that close with n rows; the state does not change.

        Parameters
        ----------
        x, state
            As for the whole sublayer.

        Returns
        -------
        Entries

        Raises
        ------
        ValueError
            An SWA layer has no compressor; and as for the whole sublayer.

        Examples
        --------
        >>> import numpy as np
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     attention = model.layers[2].attention
        ...     entries = attention.compress(np.ones((9, attention.hidden_size), np.float32))
        ...     attention.kind, entries.compressed.shape == (2, attention.head_dim)
        ('CSA', True)
        """
        if not self.ratio:
            raise ValueError("compress: an SWA layer has no compressor, wanted a CSA or HCA layer")
        found, index = self._run(Kind.COMPRESS, self._x(x), state=self._state(state))
        return Entries(from_bf16(found), None if index is None else from_bf16(index))

    def index(self, x: npt.ArrayLike, state: AttentionState | None = None) -> Selection:
        """The entries that the indexer chooses for n rows, and its scores; the state stays.

        Parameters
        ----------
        x, state
            As for the whole sublayer.

        Returns
        -------
        Selection

        Raises
        ------
        ValueError
            Only CSA layers have an indexer; and as for the whole sublayer.
        NonFiniteLogitsError
            A score is NaN.

        Examples
        --------
        >>> import numpy as np
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     attention = model.layers[2].attention
        ...     chosen = attention.index(np.ones((9, attention.hidden_size), np.float32))
        ...     chosen.selected[8, :3].tolist(), chosen.scores.shape
        ([0, 1, -1], (9, 2))
        """
        if self.kind != "CSA":
            raise ValueError(f"index: an {self.kind} layer has no indexer, wanted a CSA layer")
        return Selection(*self._run(Kind.INDEX, self._x(x), state=self._state(state)))

    def attend(
        self, x: npt.ArrayLike, state: AttentionState | None = None,
        selected: npt.ArrayLike | None = None,
    ) -> Float32:
        """What the heads give for n rows, before the output projection; the state stays.

        Parameters
        ----------
        x, state
            As for the whole sublayer.
        selected : int [n, top_k], optional
            CSA: entries to attend to in place of the indexer's choice: of those a token sees,
            ascending, padded with -1 (none: the window alone).

        Returns
        -------
        float32 [n, heads, head_dim]
            Holds bf16 values.

        Examples
        --------
        >>> import numpy as np
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     attention = model.layers[2].attention
        ...     x = np.random.default_rng(0).standard_normal((9, attention.hidden_size))
        ...     same = attention.attend(x, selected=attention.index(x).selected)
        ...     window = attention.attend(x, selected=np.full((9, attention.top_k), -1))
        ...     bool((same == attention.attend(x)).all()), bool((same == window).all())
        (True, False)
        """
        codes, ids = self._x(x), None
        if selected is not None:
            ids = self._selected(selected, len(codes))
        return from_bf16(self._run(Kind.ATTEND, codes, ids, state=self._state(state))[0])

    def output(self, heads: npt.ArrayLike) -> Float32:
        """The output projection: `output(attend(x, state))` is the whole sublayer.

        Parameters
        ----------
        heads : float [n, heads, head_dim]
            Rounded to bf16.

        Returns
        -------
        float32 [n, hidden_size]
            Holds bf16 values.

        Examples
        --------
        >>> import numpy as np
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     attention = model.layers[2].attention
        ...     x = np.random.default_rng(0).standard_normal((9, attention.hidden_size))
        ...     bool((attention.output(attention.attend(x)) == attention(x)).all())
        True
        """
        codes = rows(heads, "heads", heads=self.heads, head_dim=self.head_dim)
        return from_bf16(self._run(Kind.OUTPUT, codes)[0])

    def _x(self, x: npt.ArrayLike) -> npt.NDArray[np.uint16]:
        return rows(x, "x", hidden_size=self.hidden_size)

    def _selected(self, selected: npt.ArrayLike, n: int) -> Int32:
        if self.kind != "CSA":
            raise ValueError(f"selected: an {self.kind} layer attends to all entries, wanted None")
        array = np.asarray(selected)
        if array.dtype.kind not in "iu":
            raise TypeError(f"selected: got an array of {array.dtype}, wanted integers")
        if array.shape != (n, self.top_k):
            raise ValueError(
                f"selected: got shape {array.shape}, wanted (n, top_k) = ({n}, {self.top_k})")
        return np.ascontiguousarray(np.clip(array, -2, 2**31 - 1), np.int32)

    def _state(self, state: AttentionState | None) -> _core.Session:
        if state is None:
            return _core.layer_state(self._core, self._index)
        if not isinstance(state, AttentionState):
            raise TypeError(f"state: got {type(state).__name__}, wanted an AttentionState")
        return state._core

    def __repr__(self) -> str:
        ratio = f", compress ratio {self.ratio}" if self.ratio else ""
        return (f"<dsv4.Attention {self.kind}: {self.heads} heads of {self.head_dim}, hidden size "
                f"{self.hidden_size}, window {self.window}{ratio}>")
