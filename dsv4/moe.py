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
