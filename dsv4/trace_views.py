# SPDX-License-Identifier: Apache-2.0
"""What a trace shows of one layer: arrays with names.

n is the number of tokens traced; row i belongs to token i.  Arrays are views of what the trace
holds: they stay as they are when the trace goes on.  Of a trace with ``device=True`` they are
`dsv4.DeviceArray`, on the GPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from dsv4.arrays import Float32, Int32
from dsv4.device_array import DeviceArray

View = TypeVar("View")


class Layers(Mapping[int, View], Generic[View]):
    """What a trace has of its layers, by layer.

    Raises
    ------
    KeyError
        The layer was not traced; says which were, and how to ask.
    """

    def __init__(self, part: str, layers: Sequence[int], view: Callable[[int], View]) -> None:
        self._part, self._layers, self._view = part, layers, view

    def __getitem__(self, layer: int) -> View:
        if layer in self._layers:
            return self._view(layer)
        near = sorted(self._layers, key=lambda i: abs(i - layer) if isinstance(layer, int) else i)
        have = f"nearest are {sorted(near[:3])}" if near else "none were"
        raise KeyError(f"{self._part}: layer {layer!r} was not traced ({have}); "
                       f"ask for it with {self._part}=[{layer}]")

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"<dsv4 trace: {self._part} of layers {list(self._layers)}>"


def token_ranges(entries: npt.ArrayLike, ratio: int, overlap: bool) -> Int32:
    """The tokens that compressed entries are made of.

    Parameters
    ----------
    entries : int [...]
        Ids of entries; -1 is none.
    ratio : int
        Tokens per entry.
    overlap : bool
        An entry also reads the tokens of the one before (layers with an indexer).

    Returns
    -------
    int32 [..., 2]
        First token and the one after the last; 0, 0 for -1.

    Examples
    --------
    >>> token_ranges([0, 5, -1], 4, True).tolist()
    [[0, 4], [16, 24], [0, 0]]
    """
    ids = np.asarray(entries)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"entries: got an array of {ids.dtype}, wanted integers")
    ids = ids.astype(np.int32)
    first = np.maximum(ids - overlap, 0) * ratio
    ranges = np.stack([first, (ids + 1) * ratio], axis=-1)
    return np.where(ids[..., None] < 0, 0, ranges).astype(np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class RouterTrace:
    """What the router of one layer did.

    Attributes
    ----------
    experts : int32 [n, k]
        The routed experts in the order of choice: by descending score with bias; in layers that
        route by token id, in the order of their table.  (The engine adds their outputs by ascending
        id.)
    weights : float32 [n, k]
        What each is multiplied by, the model's routed scaling factor included.
    scores : float32 [n, n_routed_experts]
        sqrt(softplus(logit)) of every expert, before the bias that only the choice sees.
    """

    experts: Int32
    weights: Float32
    scores: Float32


@dataclass(frozen=True, slots=True, eq=False)
class IndexerTrace:
    """What the indexer of one CSA layer scored and selected.

    Attributes
    ----------
    selected : int32 [n, index_topk]
        Ids of the compressed entries each token attends to, ascending, padded with -1.
    scores : float32 [n, entries]
        Of all entries by id.  NaN where there is none yet; and in the whole row of a token that
        sees no more than index_topk entries: it attends to all of them, and none is scored.
    ratio : int
        Tokens per entry.
    """

    selected: Int32
    scores: Float32
    ratio: int

    def ranges(self, entries: npt.ArrayLike | None = None) -> Int32:
        """The tokens that entries are made of: int32 [..., 2], first and end; 0, 0 for -1.

        Parameters
        ----------
        entries : int [...], optional
            Ids; by default `selected`.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model, model.trace("To be, or not to be", indexer=True) as t:
        ...     layer = min(t.indexer)
        ...     t.indexer[layer].ranges([0, 1]).tolist()
        [[0, 4], [0, 8]]
        """
        return token_ranges(self.selected if entries is None else entries, self.ratio, True)


@dataclass(frozen=True, slots=True, eq=False)
class AttentionTrace:
    """How attention of one layer weighed its keys, computed for the trace alone.

    The kernel never holds these weights.  A score is computed again as the kernel computes it, to
    the same bits; its weight is exp(score - m) / l, where m is the largest score and l the sum of
    all exponentials, that of the sink included.  So window, compressed and sink add up to 1 for
    each head; weights times `Trace.kv` rows give what the head computes, to within the kernel's
    rounding of its weights to bf16.

    Attributes
    ----------
    window : float32 [n, heads, sliding_window]
        Of the last tokens, by rank: rank r is position max(0, p - sliding_window + 1) + r for a
        token at position p; 0 behind p.
    compressed : float32 [n, heads, ranks]
        Of compressed entries: of those selected (CSA), of all (HCA); ranks is 0 in SWA layers.
    sink : float32 [n, heads]
        What goes to no token.
    entries : int32 [n, ranks]
        Which entry each rank is, -1: none.
    position : int
        Of the first token.
    ratio : int
        Tokens per entry; 0 for SWA.
    """

    window: Float32
    compressed: Float32
    sink: Float32
    entries: Int32
    position: int
    ratio: int
    _overlap: bool

    @property
    def positions(self) -> Int32:
        """The position of each rank of the window: int32 [n, sliding_window], -1 behind the token.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model, model.trace([0, 5, 6], attention=[0]) as t:
        ...     t.attention[0].positions[:, :4].tolist()
        [[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1]]
        """
        n, _, window = self.window.shape
        at = np.arange(self.position, self.position + n)[:, None]
        found = np.maximum(at - window + 1, 0) + np.arange(window)
        return np.where(found > at, -1, found).astype(np.int32)

    def ranges(self) -> Int32:
        """The tokens that each compressed rank is made of: int32 [n, ranks, 2]; 0, 0 for none.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model, model.trace([0, 5, 6], attention=[0]) as t:
        ...     t.attention[0].ranges().shape[0]
        3
        """
        return token_ranges(self.entries, self.ratio, self._overlap)


@dataclass(frozen=True, slots=True, eq=False)
class MixTrace:
    """The hyper-connection around one sublayer.

    The sublayer reads the sum of ``pre[j] * stream[j]`` (then normed); afterwards stream k becomes
    ``post[k] * output`` plus the sum over j of ``comb[j, k] * stream[j]``.

    Attributes
    ----------
    pre : float32 [n, hc_mult]
    post : float32 [n, hc_mult]
    comb : float32 [n, hc_mult, hc_mult]
        Doubly stochastic to within the Sinkhorn iterations; columns add up to 1.
    """

    pre: Float32
    post: Float32
    comb: Float32


@dataclass(frozen=True, slots=True, eq=False)
class HyperTrace:
    """The hyper-connections of one layer.

    Attributes
    ----------
    attention : MixTrace
    ffn : MixTrace
    """

    attention: MixTrace
    ffn: MixTrace


@dataclass(frozen=True, slots=True, eq=False)
class SublayerTrace:
    """What the two sublayers of one layer read and give.

    Attributes
    ----------
    attention_in, ffn_in : float32 [n, hidden_size]
        Collapsed and normed; holds bf16 values.
    attention_out, ffn_out : float32 [n, hidden_size]
        Before they are spread over the streams; holds bf16 values.
    """

    attention_in: Float32
    attention_out: Float32
    ffn_in: Float32
    ffn_out: Float32


@dataclass(frozen=True, slots=True, eq=False)
class KVTrace:
    """The rows one layer keeps, decoded: each is key and value, the rotary part rotated.

    Attributes
    ----------
    window : float32 [n, head_dim]
        The row of each token, rounded as it is kept.
    compressed : float32 [entries, head_dim]
        The entries that closed while the trace went on; none in SWA layers.
    index : float32 [entries, index_head_dim]
        Their index rows (after Hadamard and FP4); none but in CSA layers.
    first : int
        The id of the first of these entries.
    ratio : int
        Tokens per entry; 0 for SWA.
    """

    window: Float32
    compressed: Float32
    index: Float32
    first: int
    ratio: int
    _overlap: bool

    def ranges(self) -> Int32:
        """The tokens that each entry is made of: int32 [entries, 2], first and end.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model, model.trace([0, *range(5, 13)], kv=True) as t:
        ...     layer = model.config.compress_ratios.index(4)
        ...     t.kv[layer].ranges().tolist()
        [[0, 4], [0, 8]]
        """
        ids = np.arange(self.first, self.first + len(self.compressed))
        return token_ranges(ids, self.ratio, self._overlap)


def plain(view: Any) -> Any:
    """A view as a dict of its arrays, without a copy."""
    if isinstance(view, np.ndarray | DeviceArray | int):
        return view
    names = [name for name in view.__slots__ if not name.startswith("_")]
    return {name: plain(getattr(view, name)) for name in names}


def router_table(router: Mapping[int, RouterTrace], n: int, position: int) -> dict[str, Any]:
    """Columns with a row for each layer, token and choice."""
    views = list(router.values())
    k = views[0].experts.shape[1] if views else 0
    return {
        "layer": np.repeat(np.array(list(router), int), n * k),
        "position": np.tile(np.repeat(np.arange(n) + position, k), len(views)),
        "choice": np.tile(np.arange(k), n * len(views)),
        "expert": np.concatenate([np.zeros(0, np.int32), *(np.ravel(v.experts) for v in views)]),
        "weight": np.concatenate([np.zeros(0, np.float32), *(np.ravel(v.weights) for v in views)]),
    }


def indexer_table(indexer: Mapping[int, IndexerTrace], position: int) -> dict[str, Any]:
    """Columns with a row for each layer, token and entry selected."""
    names = ("layer", "position", "entry", "score", "first", "end")
    table: dict[str, list[Any]] = {name: [np.zeros(0, int)] for name in names}
    for layer, view in indexer.items():
        selected, scores = np.asarray(view.selected), np.asarray(view.scores)
        row, rank = np.nonzero(selected >= 0)
        entry = selected[row, rank]
        ranges = view.ranges(entry)
        found = (np.full(len(row), layer), row + position, entry, scores[row, entry],
                 ranges[:, 0], ranges[:, 1])
        for name, values in zip(names, found, strict=True):
            table[name].append(values)
    return {name: np.concatenate(values) for name, values in table.items()}
