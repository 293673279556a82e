# SPDX-License-Identifier: Apache-2.0
"""Attention over a window and compressed entries as an object: of a layer, or built from arrays.

Both run the engine's own code (SPEC 3).  A state holds what earlier rows left: the window's rows,
the compressed entries, the indexer's keys, and the rows whose entry has not closed yet.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dsv4 import _core
from dsv4.arrays import Float32, Int32, from_bf16
from dsv4.given import Weight, floats, linear, number, whole_number
from dsv4.given import model as made
from dsv4.parts import Kind, Part, rows

if TYPE_CHECKING:
    from dsv4.config import Config

WINDOW, COMPRESSED, INDEX = range(3)  # enum dsv4_rows
NOW = -1
YARN = (16.0, 65536, 32.0, 1.0)  # of V4


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

    From `Layer.attention`, or built from arrays, of any dimensions that fit each other: head_dim -
    rope_dim a multiple of 64 (KV rows keep their scales by 64), index_head_dim 32, 64, 128 or 256.

    Parameters
    ----------
    kind : "SWA", "CSA" or "HCA"
    wq_a, wq_b : weights [q_rank, hidden], [heads * head_dim, q_rank]
        The queries, in two steps; weights as for `dsv4.MoE`.
    wkv : weight [head_dim, hidden]
        Key and value, the same for all heads.
    wo_a, wo_b : weights [groups * o_rank, heads * head_dim / groups], [hidden, groups * o_rank]
        The output: each group of heads by its rows of wo_a, then all together.
    q_norm, kv_norm, sink : float arrays [q_rank], [head_dim], [heads]
    rope_dim : int
        Trailing dimensions of a head that are rotated, even.
    compressor : dict, for CSA and HCA
        "wkv" and "wgate", float arrays [width, hidden]; "ape" [ratio, width]; "norm" [head_dim].
        CSA: ratio 4 and width 2 * head_dim; HCA: any other ratio from 2, width head_dim.
    indexer : dict, for CSA
        "wq_b", weight [index_heads * index_head_dim, q_rank]; "weights_proj", float array
        [index_heads, hidden]; "compressor", as above with index_head_dim in place of head_dim.
    window : int
        Rows a token attends to as they are, its own included.
    top_k : int
        Compressed entries a token attends to at most (CSA).
    rope_theta : float, optional
        By default what V4 has: 10,000 for SWA, else 160,000.
    yarn : (factor, original positions, beta fast, beta slow) or None
        Of the rotation in CSA and HCA.
    eps : float
        Of the norms.
    context : int
        Most rows of a state.
    numerics, threads
        As for `dsv4.MoE`, like the errors.

    Examples
    --------
    >>> import numpy as np
    >>> import dsv4
    >>> draw = np.random.default_rng(0)
    >>> def weight(*shape):
    ...     return draw.standard_normal(shape, np.float32) / np.float32(shape[-1]) ** 0.5
    >>> ones = np.ones
    >>> attention = dsv4.Attention(
    ...     "HCA", wq_a=weight(48, 32), wq_b=weight(3 * 72, 48), wkv=weight(72, 32),
    ...     wo_a=weight(20, 3 * 72), wo_b=weight(32, 20), q_norm=ones(48, np.float32),
    ...     kv_norm=ones(72, np.float32), sink=np.zeros(3, np.float32), rope_dim=8, window=16,
    ...     compressor=dict(wkv=weight(72, 32), wgate=weight(72, 32), ape=weight(6, 72),
    ...                     norm=ones(72, np.float32)))
    >>> attention
    <dsv4.Attention HCA: 3 heads of 72, hidden size 32, window 16, compress ratio 6>
    >>> state = attention.state()
    >>> y = attention(draw.standard_normal((20, 32)), state)
    >>> y.shape, state.position, state.compressed.shape
    ((20, 32), 20, (3, 72))

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

    def __init__(
        self, kind: str, *, wq_a: Any, wq_b: Any, wkv: Any, wo_a: Any, wo_b: Any, q_norm: Any,
        kv_norm: Any, sink: Any, rope_dim: int, compressor: Mapping[str, Any] | None = None,
        indexer: Mapping[str, Any] | None = None, window: int = 128, top_k: int = 512,
        rope_theta: float | None = None, yarn: tuple[float, int, float, float] | None = YARN,
        eps: float = 1e-6, context: int = 1 << 20, numerics: str = "official",
        threads: int | None = None,
    ) -> None:
        if kind not in ("SWA", "CSA", "HCA"):
            raise ValueError(f"kind: got {kind!r}, wanted 'SWA', 'CSA' or 'HCA'")
        for name, part, of in (("compressor", compressor, ("CSA", "HCA")),
                               ("indexer", indexer, ("CSA",))):
            if (part is not None) != (kind in of):
                got = "none" if part is None else "one"
                raise ValueError(f"{name}: got {got}, wanted one for {' and '.join(of)} alone")
        weights, dims = _projections(wq_a, wq_b, wkv, wo_a, wo_b, q_norm, kv_norm, sink)
        rope = _rope_dim(rope_dim, dims["head_dim"])
        config: dict[str, Any] = dims | dict(
            qk_rope_head_dim=rope, sliding_window=whole_number("window", window, 1, 1 << 20),
            max_position_embeddings=whole_number("context", context, 1, 1 << 28),
            rms_norm_eps=number("eps", eps, 0, 1), **_rotation(kind, rope_theta, yarn))
        hidden, ratio = dims["hidden_size"], 0
        if compressor is not None:
            found, ratio = _compressor("compressor", compressor, kind, dims["head_dim"], hidden)
            weights |= {f"attn.compressor.{name}": w for name, w in found.items()}
        if indexer is not None:
            found, sizes = _indexer(indexer, dims, rope)
            weights |= {f"attn.indexer.{name}": w for name, w in found.items()}
            config |= sizes | dict(index_topk=whole_number("top_k", top_k, 1, 1 << 20))
        else:  # unused, but not less than rope_dim
            config |= dict(index_head_dim=_least_index(rope))
        config |= dict(compress_ratios=[ratio])
        core = made(config, weights, numerics, threads)
        self._bind(core, 0, kind, hidden, dims["num_attention_heads"], dims["head_dim"],
                   config["sliding_window"], ratio, config.get("index_topk", 1))

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


# ---- weights that are given ----

def _projections(
    wq_a: Any, wq_b: Any, wkv: Any, wo_a: Any, wo_b: Any, q_norm: Any, kv_norm: Any, sink: Any
) -> tuple[dict[str, Weight], dict[str, int]]:
    """The weights of every kind, and the dimensions they have."""
    down = linear("wq_a", wq_a).ranked(q_rank=None, hidden=None)
    q_rank, hidden = down.shape
    sinks = floats("sink", sink).ranked(heads=None)
    heads = sinks.shape[0]
    kv = linear("wkv", wkv).ranked(head_dim=None, hidden=None)
    head_dim = kv.shape[0]
    out = linear("wo_a", wo_a).ranked(low=None, part=None)
    groups = heads * head_dim // out.shape[1]
    if groups * out.shape[1] != heads * head_dim or out.shape[0] % groups or heads % groups:
        raise ValueError(
            f"wo_a: got shape {out.shape}, wanted (groups * o_rank, heads * head_dim / groups) for "
            f"{heads} heads of {head_dim}, groups a divisor of the heads")
    weights = {
        "wq_a.weight": down, "attn_sink": sinks, "wo_a.weight": out,
        "wkv.weight": kv.wanted(head_dim=head_dim, hidden=hidden),
        "wq_b.weight": linear("wq_b", wq_b).wanted(heads_head_dim=heads * head_dim, q_rank=q_rank),
        "wo_b.weight": linear("wo_b", wo_b).wanted(hidden=hidden, groups_o_rank=out.shape[0]),
        "q_norm.weight": floats("q_norm", q_norm).wanted(q_rank=q_rank),
        "kv_norm.weight": floats("kv_norm", kv_norm).wanted(head_dim=head_dim),
    }
    dims = dict(
        hidden_size=hidden, num_attention_heads=heads, head_dim=head_dim, q_lora_rank=q_rank,
        o_groups=groups, o_lora_rank=out.shape[0] // groups)
    return {f"attn.{name}": weight for name, weight in weights.items()}, dims


def _compressor(
    name: str, given: Mapping[str, Any], kind: str, head_dim: int, hidden: int
) -> tuple[dict[str, Weight], int]:
    """Its weights and its ratio."""
    _keys(name, given, ("wkv", "wgate", "ape", "norm"))
    ape = floats(f"{name}: ape", given["ape"]).ranked(ratio=None, width=None)
    ratio, width = ape.shape[0], head_dim * (2 if kind == "CSA" else 1)
    if ratio < 2 or (ratio == 4) != (kind == "CSA"):
        raise ValueError(f"{name}: ape: got {ratio} rows, the tokens of an entry, wanted "
                         f"{'4' if kind == 'CSA' else 'at least 2, not 4'} for {kind}")
    return {
        "ape": ape.wanted(ratio=ratio, width=width),
        "wkv.weight": floats(f"{name}: wkv", given["wkv"]).wanted(width=width, hidden=hidden),
        "wgate.weight": floats(f"{name}: wgate", given["wgate"]).wanted(width=width, hidden=hidden),
        "norm.weight": floats(f"{name}: norm", given["norm"]).wanted(head_dim=head_dim),
    }, ratio


def _indexer(
    given: Mapping[str, Any], dims: Mapping[str, int], rope: int
) -> tuple[dict[str, Weight], dict[str, int]]:
    """Its weights and its dimensions."""
    _keys("indexer", given, ("wq_b", "weights_proj", "compressor"))
    hidden, q_rank = dims["hidden_size"], dims["q_lora_rank"]
    proj = floats("indexer: weights_proj", given["weights_proj"])
    heads = proj.ranked(index_heads=None, hidden=None).shape[0]
    queries = linear("indexer: wq_b", given["wq_b"]).ranked(rows=None, q_rank=None)
    dim = queries.shape[0] // heads
    if dim not in (32, 64, 128, 256) or dim < rope or dim * heads != queries.shape[0]:
        raise ValueError(
            f"indexer: wq_b: got {queries.shape[0]} rows for {heads} heads, wanted 32, 64, 128 or "
            f"256 for each, not less than rope_dim = {rope}")
    found, _ = _compressor("indexer: compressor", given["compressor"], "CSA", dim, hidden)
    weights = {f"compressor.{name}": weight for name, weight in found.items()} | {
        "wq_b.weight": queries.wanted(rows=dim * heads, q_rank=q_rank),
        "weights_proj.weight": proj.wanted(index_heads=heads, hidden=hidden)}
    return weights, dict(index_n_heads=heads, index_head_dim=dim)


def _keys(name: str, given: object, wanted: tuple[str, ...]) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}: got {type(given).__name__}, wanted a dict of {', '.join(wanted)}")
    if set(given) != set(wanted):
        raise ValueError(f"{name}: got {', '.join(map(str, given))}, wanted {', '.join(wanted)}")


def _rope_dim(value: object, head_dim: int) -> int:
    rope = whole_number("rope_dim", value, 2, min(head_dim, 256))
    if rope % 2 or (head_dim - rope) % 64:
        raise ValueError(f"rope_dim: got {rope}, wanted an even number with head_dim - rope_dim a "
                         f"multiple of 64; head_dim is {head_dim}")
    return rope


def _rotation(kind: str, theta: object, yarn: object) -> dict[str, float]:
    if theta is None:
        theta = 10000.0 if kind == "SWA" else 160000.0
    base = number("rope_theta", theta, 2, 1e12)
    found = {"rope_theta": base, "compress_rope_theta": base}
    if yarn is None:
        return found
    if not isinstance(yarn, tuple) or len(yarn) != 4:
        raise TypeError("yarn: wanted (factor, original positions, beta fast, beta slow) or None")
    found["yarn_factor"] = number("yarn factor", yarn[0], 1e-3, 1e6)
    found["yarn_original_positions"] = whole_number("yarn original positions", yarn[1], 1, 1 << 28)
    found["yarn_beta_fast"] = number("yarn beta fast", yarn[2], 1e-3, 1e6)
    found["yarn_beta_slow"] = number("yarn beta slow", yarn[3], 1e-3, 1e6)
    return found


def _least_index(rope: int) -> int:
    dim = 32
    while dim < rope:
        dim *= 2
    return dim
