# SPDX-License-Identifier: Apache-2.0
"""Hyper-connections (mHC): how a layer reads its residual streams and writes to them.

Around each sublayer, attention and experts, the `hc_mult` streams of a token are collapsed into
the one vector the sublayer reads, and its output is spread over them again (SPEC 2.2, 2.3).
"""

from typing import NamedTuple

import numpy.typing as npt

from dsv4 import _core
from dsv4.arrays import Float32, from_bf16
from dsv4.parts import Kind, Part, numbers, rows, same_rows


class Mix(NamedTuple):
    """What a site makes of n tokens' streams; all float32.

    Attributes
    ----------
    pre : [n, hc_mult]
        Share of each stream in the collapsed one.
    post : [n, hc_mult]
        Share of the sublayer's output in each new stream, between 0 and 2.
    comb : [n, hc_mult, hc_mult]
        comb[t, j, k]: share of stream j in the new stream k.  Doubly stochastic: the columns sum
        to 1 within hc_eps, the rows as far as the Sinkhorn iterations came.
    collapsed : [n, hidden_size]
        sum of pre[j] * stream[j], holding bf16 values.
    x : [n, hidden_size]
        The same after the norm: what the sublayer reads, holding bf16 values.
    """

    pre: Float32
    post: Float32
    comb: Float32
    collapsed: Float32
    x: Float32


class HyperSite(Part):
    """The streams around one sublayer.  From `Layer.hyper`.

    Examples
    --------
    >>> import numpy as np
    >>> import dsv4
    >>> with dsv4.load() as model:
    ...     site, c = model.layers[3].hyper.ffn, model.config
    ...     mix = site(np.ones((2, c.hc_mult, c.hidden_size), np.float32))
    ...     bool(np.allclose(mix.comb.sum(1), 1, atol=1e-3))
    True
    """

    def __init__(
        self, core: _core.Model, index: int, number: int, streams: int, hidden: int
    ) -> None:
        super().__init__(core, index, ("attention", "ffn")[number])
        self._number, self._streams, self._hidden = number, streams, hidden

    def __call__(self, streams: npt.ArrayLike) -> Mix:
        """Collapse the streams of n tokens.

        Parameters
        ----------
        streams : float [n, hc_mult, hidden_size]
            Rounded to bf16.

        Returns
        -------
        Mix

        Raises
        ------
        ValueError, TypeError
            Another shape, or not floats; the model is closed.
        """
        codes = rows(streams, "streams", hc_mult=self._streams, hidden_size=self._hidden)
        pre, post, comb, collapsed, x = self._run(Kind.COLLAPSE, codes, number=self._number)
        return Mix(pre, post, comb, from_bf16(collapsed), from_bf16(x))

    def spread(
        self, y: npt.ArrayLike, streams: npt.ArrayLike, post: npt.ArrayLike, comb: npt.ArrayLike
    ) -> Float32:
        """Spread a sublayer's output over the streams it was made from.

        new[k] = post[k] * y + sum over j of comb[j, k] * streams[j]

        Parameters
        ----------
        y : float [n, hidden_size]
            Rounded to bf16, like streams.
        streams : float [n, hc_mult, hidden_size]
        post : float [n, hc_mult]
        comb : float [n, hc_mult, hc_mult]
            Of the `Mix` of these streams, or any others.

        Returns
        -------
        float32 [n, hc_mult, hidden_size]
            Holds bf16 values.

        Examples
        --------
        >>> import numpy as np
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     layer, c = model.layers[3], model.config
        ...     streams = np.ones((2, c.hc_mult, c.hidden_size), np.float32)
        ...     mix = layer.hyper.ffn(streams)
        ...     y = layer.moe(mix.x)
        ...     layer.hyper.ffn.spread(y, streams, mix.post, mix.comb).shape == streams.shape
        True
        """
        hc = self._streams
        codes = rows(streams, "streams", hc_mult=hc, hidden_size=self._hidden)
        output = rows(y, "y", hidden_size=self._hidden)
        same_rows(output, "y", len(codes), "streams")
        gates = numbers(post, "post", hc_mult=hc)
        same_rows(gates, "post", len(codes), "streams")
        shares = numbers(comb, "comb", hc_mult=hc, hc_mult_out=hc)
        same_rows(shares, "comb", len(codes), "streams")
        return from_bf16(self._run(Kind.SPREAD, output, codes, gates, shares)[0])

    def __repr__(self) -> str:
        return (f"<dsv4.HyperSite around {self._name} of layer {self._index}: "
                f"{self._streams} streams of {self._hidden}>")


class Hyper:
    """Both sites of a layer.  From `Layer.hyper`.

    Attributes
    ----------
    attention, ffn : HyperSite
        Around its attention, and around its experts.
    """

    def __init__(self, core: _core.Model, index: int, streams: int, hidden: int) -> None:
        self.attention = HyperSite(core, index, 0, streams, hidden)
        self.ffn = HyperSite(core, index, 1, streams, hidden)

    def __repr__(self) -> str:
        return f"<dsv4.Hyper: {self.attention!r}, {self.ffn!r}>"
