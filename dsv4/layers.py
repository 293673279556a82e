# SPDX-License-Identifier: Apache-2.0
"""Layers of a model, callable on their own, with the code that runs inside a step."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsv4 import _core
from dsv4.arrays import Float32, Prompt, from_bf16, to_bf16

if TYPE_CHECKING:
    from dsv4.model import Model


class Layer:
    """One layer of a model, callable on its own.

    Attributes
    ----------
    index : int
    kind : "SWA", "CSA" or "HCA"
        Sliding window alone, or with compressed sparse or heavily compressed attention.
    compress_ratio : int
        Tokens per compressed entry; 0 for SWA.
    """

    def __init__(self, model: "Model", index: int) -> None:
        self._model = model
        self.index = index
        self.kind = model.config.layer_kind(index)
        self.compress_ratio = model.config.compress_ratios[index]

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
        values = np.asarray(streams)
        if values.dtype.kind != "f":
            raise TypeError(f"streams: got an array of {values.dtype}, wanted floats")
        wanted = (c.hc_mult, c.hidden_size)
        if values.ndim != 3 or values.shape[1:] != wanted or not len(values):
            raise ValueError(
                f"streams: got shape {values.shape}, wanted (n, {wanted[0]}, {wanted[1]}), n > 0")
        ids = _core.token_ids(token_ids, "token_ids", c.vocab_size)
        if len(ids) != len(values):
            raise ValueError(
                f"token_ids: got {len(ids)}, wanted one for each of the {len(values)} rows")
        out = self._model._core.layer(self.index, to_bf16(values), ids, None)
        return from_bf16(out)

    def __repr__(self) -> str:
        return f"<dsv4.Layer {self.index}, {self.kind}, compress ratio {self.compress_ratio}>"
