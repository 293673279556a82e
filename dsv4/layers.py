# SPDX-License-Identifier: Apache-2.0
"""Layers of a model, callable on their own, with the code that runs inside a step."""

from typing import TYPE_CHECKING, SupportsIndex, overload

import numpy.typing as npt

from dsv4 import _core
from dsv4.arrays import Float32, Prompt, from_bf16
from dsv4.attention import Attention
from dsv4.hyper import Hyper
from dsv4.moe import MoE
from dsv4.parts import rows, same_rows

if TYPE_CHECKING:
    from dsv4.model import Model


class Layer:
    """One layer of a model, callable on its own, whole or in parts.

    Attributes
    ----------
    index : int
    kind : "SWA", "CSA" or "HCA"
        Sliding window alone, or with compressed sparse or heavily compressed attention.
    compress_ratio : int
        Tokens per compressed entry; 0 for SWA.
    attention : Attention
    moe : MoE
    hyper : Hyper
        How the sublayers read and write the residual streams.

    Examples
    --------
    The parts, one after the other, are the layer, bit for bit:

    >>> import numpy as np
    >>> import dsv4
    >>> with dsv4.load() as model:
    ...     layer, c = model.layers[3], model.config
    ...     first = np.random.default_rng(0).standard_normal((9, c.hc_mult, c.hidden_size))
    ...     ids = list(range(9))
    ...     mix = layer.hyper.attention(first)
    ...     y = layer.attention(mix.x)
    ...     middle = layer.hyper.attention.spread(y, first, mix.post, mix.comb)
    ...     mix = layer.hyper.ffn(middle)
    ...     y = layer.moe(mix.x, ids)
    ...     last = layer.hyper.ffn.spread(y, middle, mix.post, mix.comb)
    ...     bool((last == layer(first, ids)).all())
    True
    """

    def __init__(self, model: "Model", index: int) -> None:
        c = model.config
        self._model = model
        self.index = index
        self.kind = c.layer_kind(index)
        self.compress_ratio = c.compress_ratios[index]
        self.attention = Attention._of_layer(model._core, index, c)
        self.moe = MoE._of_layer(model._core, index, c)
        self.hyper = Hyper(model._core, index, c.hc_mult, c.hidden_size)

    def __call__(self, streams: npt.ArrayLike, token_ids: Prompt) -> Float32:
        """Run the whole layer from position 0, with the code that runs inside a step.

        Parameters
        ----------
        streams : float [n, hc_mult, hidden_size]
            The residual streams; values are rounded to bf16, to nearest, ties to even.
        token_ids : sequence of int [n]
            Layers that route by token id use them.

        Returns
        -------
        float32 [n, hc_mult, hidden_size]
            Holds bf16 values.

        Examples
        --------
        >>> import numpy as np
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     c = model.config
        ...     x = np.ones((3, c.hc_mult, c.hidden_size), np.float32)
        ...     model.layers[0](x, [0, 5, 6]).shape == x.shape
        True
        """
        c = self._model.config
        codes = rows(streams, "streams", hc_mult=c.hc_mult, hidden_size=c.hidden_size)
        ids = _core.token_ids(token_ids, "token_ids", c.vocab_size)
        same_rows(ids, "token_ids", len(codes), "streams")
        out = self._model._core.layer(self.index, codes, ids, None)
        return from_bf16(out)

    def __repr__(self) -> str:
        return f"<dsv4.Layer {self.index}, {self.kind}, compress ratio {self.compress_ratio}>"


class Layers(tuple[Layer, ...]):
    """The layers of a model, a tuple; an index outside is an IndexError that says the range."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Layer, ...]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Layer | tuple[Layer, ...]:
        try:
            return super().__getitem__(index)
        except IndexError:
            raise IndexError(
                f"layers: got {index!r}, wanted an index from 0 to {len(self) - 1}") from None
