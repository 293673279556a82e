# SPDX-License-Identifier: Apache-2.0
"""The mixture of experts as an object: of a model's layer, or built from arrays.

Both run the engine's own code (SPEC 4): router, experts in ascending order, the shared one last.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from dsv4 import _core
from dsv4.arrays import Float32, Int32, Prompt, from_bf16
from dsv4.given import Weight, floats, linear, number, stacked, whole_number
from dsv4.given import model as made
from dsv4.parts import Kind, Part, numbers, rows, same_rows

if TYPE_CHECKING:
    from dsv4.config import Config


class Route(NamedTuple):
    """What a router chose for n tokens.

    Attributes
    ----------
    experts : int32 [n, top_k]
        In the order of choice, best first; of hash layers in the order of their table.
    weights : float32 [n, top_k]
        Of these experts; they sum to the layer's scale.
    scores : float32 [n, experts]
        sqrt(softplus(logits)) of all, before the bias that helps to choose.
    """

    experts: Int32
    weights: Float32
    scores: Float32


class Expert(Part):
    """One expert of a layer, callable.  From `MoE.experts` and `MoE.shared`.

    Attributes
    ----------
    index : int or None
        None for the shared expert.
    """

    def __init__(self, core: _core.Model, layer: int, number: int, n: int, hidden: int) -> None:
        super().__init__(core, layer, "the shared expert" if number == n else f"expert {number}")
        self.index = None if number == n else number
        self._number, self._hidden = number, hidden

    def __call__(self, x: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> Float32:
        """w2(bf16(weight * silu(min(w1 x, limit)) * clip(w3 x, -limit, limit))).

        Parameters
        ----------
        x : float [n, hidden_size]
            Rounded to bf16.
        weights : float [n], optional
            The router's, applied where the model applies them, before w2; else 1.

        Returns
        -------
        float32 [n, hidden_size]
            Holds bf16 values.

        Examples
        --------
        >>> import numpy as np
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     x = np.ones((2, model.config.hidden_size), np.float32)
        ...     y = model.layers[3].moe.experts[1](x, np.array([0.0, 1.0]))
        ...     bool(y[0].any()), bool(y[1].any())
        (False, True)
        """
        codes = rows(x, "x", hidden_size=self._hidden)
        given = np.ones(len(codes), np.float32) if weights is None else numbers(weights, "weights")
        same_rows(given, "weights", len(codes), "x")
        return from_bf16(self._run(Kind.EXPERT, codes, given, number=self._number)[0])

    def __repr__(self) -> str:
        return f"<dsv4.Expert: {self._name} of layer {self._index}>"


class Experts(Sequence[Expert]):
    """The routed experts of a layer; an index outside is an IndexError that says the range."""

    def __init__(self, core: _core.Model, layer: int, n: int, hidden: int) -> None:
        self._part = (core, layer)
        self._n, self._hidden = n, hidden

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> Expert: ...
    @overload
    def __getitem__(self, index: slice) -> list[Expert]: ...
    def __getitem__(self, index: int | slice) -> Expert | list[Expert]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._n))]
        i = index + self._n if index < 0 else index
        if not 0 <= i < self._n:
            raise IndexError(f"experts: got {index}, wanted an index from 0 to {self._n - 1}")
        return Expert(*self._part, i, self._n, self._hidden)

    def __repr__(self) -> str:
        return f"<dsv4.Experts: {self._n} of layer {self._part[1]}>"


class MoE(Part):
    """The experts of one layer and their router.

    From `Layer.moe`, or built from arrays, of any dimensions.

    Parameters
    ----------
    gate : float array [experts, hidden]
        The router's rows.
    w1, w2, w3 : stacked weights [experts, width, hidden], w2 [experts, hidden, width]
        Gate, down and up projection of the experts: a float array, a pair (codes, scales) of
        arrays, or a list of one weight for each expert.
    top_k : int
        Experts a token.
    shared : (w1, w2, w3), optional
        Weights [width, hidden], w2 [hidden, width], of the expert that takes every token.
    bias : float array [experts], optional
        Added to the scores when experts are chosen, not when they are weighed.
    table : int array [vocabulary, top_k], optional
        The experts of every token id: then they are chosen by it, and there is no bias.
    scale : float
        What the weights of a token's experts sum to.
    limit : float
        Where the gate and the up projection are clamped; may be infinite.
    numerics : "official" or "weights"
        As for `dsv4.load`: whether inputs of FP8 and FP4 weights are rounded to FP8.
    threads : int, optional
        As for `dsv4.load`.

    A weight is an array of float32, float16, bfloat16 (also its codes as uint16), which is used as
    it is; or a pair (codes, scales): FP8 codes uint8 [rows, cols] with one scale for 128 x 128
    (uint8 E8M0, float32 or bfloat16), FP4 codes uint8 [rows, cols / 2] with one scale for 32
    numbers of a row (uint8 E8M0); or a `dsv4.Tensor`, with its scales.

    Raises
    ------
    ValueError, TypeError
        A weight of another shape or dtype: says which was wanted, with names of the dimensions.
    FormatError
        A scale, a bias or a table entry that is no usable number.
    MemoryError
        There is no room for a copy of the weights.

    Notes
    -----
    The weights are copied once; x, results and sums are rounded as inside a model: bf16 in and
    out, float32 between.

    Examples
    --------
    >>> import numpy as np
    >>> import dsv4
    >>> draw = np.random.default_rng(0)
    >>> w1, w2, w3 = (draw.standard_normal((4, *shape), np.float32) / 8
    ...               for shape in ((16, 64), (64, 16), (16, 64)))
    >>> moe = dsv4.MoE(draw.standard_normal((4, 64), np.float32), w1, w2, w3, top_k=2)
    >>> moe
    <dsv4.MoE: 2 of 4 experts by score, hidden size 64, width 16>
    >>> x = draw.standard_normal((3, 64))
    >>> moe(x).shape, moe.route(x).weights.sum(1)
    ((3, 64), array([1., 1., 1.], dtype=float32))

    Attributes
    ----------
    hidden_size, width, top_k : int
        Of a row, of an expert's middle, experts a token.
    hashed : bool
        Experts are chosen by token id, from a table, not by score.
    experts : sequence of Expert
        The routed ones.
    shared : Expert
        The one that takes every token.
    """

    hidden_size: int
    width: int
    top_k: int
    hashed: bool
    experts: Experts
    shared: Expert
    _vocab: int

    def __init__(
        self, gate: Any, w1: Any, w2: Any, w3: Any, *, top_k: int, shared: Any = None,
        bias: Any = None, table: Any = None, scale: float = 1.0, limit: float = 10.0,
        numerics: str = "official", threads: int | None = None,
    ) -> None:
        router = floats("gate", gate).ranked(experts=None, hidden=None)
        n, hidden = router.shape
        first = stacked("w1", w1, width=None, hidden=None)
        width = first[0].shape[0]
        weights = {"ffn.gate.weight": router}
        for name, found, dims in (
            ("w1", first, dict(width=width, hidden=hidden)),
            ("w2", stacked("w2", w2, hidden=None, width=None), dict(hidden=hidden, width=width)),
            ("w3", stacked("w3", w3, width=None, hidden=None), dict(width=width, hidden=hidden)),
        ):
            if len(found) != n:
                raise ValueError(f"{name}: got {len(found)} experts, wanted {n} as gate has rows")
            for i, weight in enumerate(found):
                weights[f"ffn.experts.{i}.{name}.weight"] = weight.wanted(**dims)
            if shared is not None:
                if not isinstance(shared, tuple | list) or len(shared) != 3:
                    raise TypeError("shared: wanted three weights (w1, w2, w3)")
                weights[f"ffn.shared_experts.{name}.weight"] = linear(
                    f"shared {name}", shared[("w1", "w2", "w3").index(name)]).wanted(**dims)
        chosen = whole_number("top_k", top_k, 1, n)
        vocab = 1
        if table is not None:
            if bias is not None:
                raise ValueError("bias: got one beside a table, which chooses without it")
            weights["ffn.gate.tid2eid"] = ids = _table(table, chosen, n)
            vocab = ids.shape[0]
        elif bias is not None:
            weights["ffn.gate.bias"] = floats("bias", bias).wanted(experts=n)
        config = dict(
            hidden_size=hidden, moe_intermediate_size=width, n_routed_experts=n, vocab_size=vocab,
            num_experts_per_tok=chosen, num_hash_layers=int(table is not None),
            routed_scaling_factor=number("scale", scale, 1e-30, 1e30),
            swiglu_limit=number("limit", limit, 1e-30, float("inf")),
        )
        core = made(config, weights, numerics, threads)
        self._bind(core, 0, hidden, width, n, chosen, table is not None,
                   vocab if table is not None else 2**31 - 1)

    @classmethod
    def _of_layer(cls, core: _core.Model, index: int, config: "Config") -> "MoE":
        self = cls.__new__(cls)
        c = config
        self._bind(core, index, c.hidden_size, c.moe_intermediate_size, c.n_routed_experts,
                   c.num_experts_per_tok, index < c.num_hash_layers, c.vocab_size)
        return self

    def _bind(
        self, core: _core.Model, index: int, hidden: int, width: int, n: int, top_k: int,
        hashed: bool, vocab: int,
    ) -> None:
        Part.__init__(self, core, index, "moe")
        self.hidden_size, self.width, self.top_k, self.hashed = hidden, width, top_k, hashed
        self.experts = Experts(core, index, n, hidden)
        self.shared = Expert(core, index, n, n, hidden)
        self._vocab = vocab

    def __call__(self, x: npt.ArrayLike, token_ids: Prompt | None = None) -> Float32:
        """The whole layer: each token's experts by weight, and the shared one.

        Parameters
        ----------
        x : float [n, hidden_size]
            Normed input of the sublayer (`Mix.x`); rounded to bf16.
        token_ids : sequence of int [n], optional
            Hash layers need them.

        Returns
        -------
        float32 [n, hidden_size]
            Holds bf16 values.

        Raises
        ------
        ValueError, TypeError
            Another shape, not floats, a hash layer without token_ids; the model is closed.

        Examples
        --------
        >>> import numpy as np
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     moe = model.layers[3].moe
        ...     moe(np.ones((2, moe.hidden_size), np.float32)).shape == (2, moe.hidden_size)
        True
        """
        codes, ids = self._inputs(x, token_ids)
        return from_bf16(self._run(Kind.MOE, codes, ids=ids)[0])

    def route(self, x: npt.ArrayLike, token_ids: Prompt | None = None) -> Route:
        """The router alone; arguments as for the whole layer.

        Returns
        -------
        Route
            experts int32 [n, top_k], weights float32 [n, top_k], scores float32 [n, experts].

        Examples
        --------
        >>> import numpy as np
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     moe = model.layers[3].moe
        ...     route = moe.route(np.ones((2, moe.hidden_size), np.float32))
        ...     route.experts.shape == (2, moe.top_k), route.scores.shape == (2, len(moe.experts))
        (True, True)
        """
        codes, ids = self._inputs(x, token_ids)
        return Route(*self._run(Kind.ROUTE, codes, ids=ids))

    def _inputs(self, x: npt.ArrayLike, token_ids: Prompt | None) -> tuple[Any, Int32 | None]:
        codes = rows(x, "x", hidden_size=self.hidden_size)
        if token_ids is None:
            if self.hashed:
                raise ValueError("token_ids: got none, wanted one for each row: this layer chooses "
                                 "experts by token id")
            return codes, None
        ids = _core.token_ids(token_ids, "token_ids", self._vocab)
        same_rows(ids, "token_ids", len(codes), "x")
        return codes, ids if self.hashed else None

    def __repr__(self) -> str:
        how = "by token id" if self.hashed else "by score"
        return (f"<dsv4.MoE: {self.top_k} of {len(self.experts)} experts {how}, hidden size "
                f"{self.hidden_size}, width {self.width}>")


def _table(table: Any, top_k: int, n: int) -> Weight:
    """The experts of every token id, each of them one of n."""
    array = np.asarray(table)
    if array.dtype.name not in ("int32", "int64"):
        raise TypeError(f"table: got an array of {array.dtype}, wanted int32 or int64")
    if array.ndim != 2 or array.shape[1] != top_k or not len(array):
        raise ValueError(f"table: got shape {array.shape}, wanted (vocabulary, top_k) = "
                         f"(vocabulary, {top_k})")
    if array.min() < 0 or array.max() >= n:
        bad = array[(array < 0) | (array >= n)][0]
        raise ValueError(f"table: got expert {bad}, wanted ids from 0 to {n - 1}")
    return Weight("table", {"int32": "I32", "int64": "I64"}[array.dtype.name], array.shape,
                  np.asarray(array, array.dtype.newbyteorder("=")))
