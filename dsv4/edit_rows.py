# SPDX-License-Identifier: Apache-2.0
"""Operations on rows: the residual streams, and what goes into and comes out of sublayers.

They are part of `dsv4.edit`, whose documentation says what all operations have in common.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np
import numpy.typing as npt

from dsv4.arrays import Float32, Int32
from dsv4.edit_base import Ids, Layers, Operation, Positions
from dsv4.edit_values import check_rows, finite, ids_of, nearest, numbers, position_ranges

if TYPE_CHECKING:
    from dsv4.config import Config

SITES = ("streams", "attention_in", "attention_out", "ffn_in", "ffn_out")  # enum dsv4_edit_site
ADD, SET, CLAMP, CALL = range(4)  # enum dsv4_edit_kind


class _AtSite(Operation, json=False):
    """Operations on rows: the streams after a layer, or the input or output of a sublayer."""

    site: str
    streams: tuple[int, ...] | None
    _embed = True
    _defaults: ClassVar[dict[str, Any]] = {
        "site": "streams", "streams": None, "scale": 1.0, "dims": None}

    def __init__(
        self, layers: Layers, positions: Positions, site: str, streams: Ids | None, **values: Any
    ) -> None:
        if site not in SITES:
            raise ValueError(f"{self._name}: site: got {site!r}, wanted {nearest(site, SITES)}")
        chosen = None if streams is None else ids_of(streams, f"{self._name}: streams")
        if chosen is not None and site != "streams":
            raise ValueError(f"{self._name}: streams: got {list(chosen)} at {site}, which has one "
                             "row; wanted None")
        super().__init__(layers, positions, site=site, streams=chosen, **values)
        if -1 in self.layers and site != "streams":
            raise ValueError(f"{self._name}: layers: got 'embed' at {site}, wanted a layer: the "
                             "embedding has streams only")

    def _check_values(self, config: "Config") -> None:
        self._below("streams", self.streams or (), config.hc_mult)

    def _mask(self, config: "Config") -> list[int]:
        chosen = range(config.hc_mult) if self.streams is None else self.streams
        return [sum(1 << s for s in chosen) if self.site == "streams" else 1]

    def _check_shape(self, name: str, got: tuple[int, ...], wanted: str, last: tuple[int, ...],
                     rows: bool) -> None:
        if got[rows:] != last:
            raise ValueError(f"{self._name}: {name}: got shape {list(got)}, wanted {wanted}")


class Steer(_AtSite):
    """A vector added to the streams, or to the input or output of a sublayer.

    bf16(x + scale vector), the product and the sum in float32.

    Parameters
    ----------
    layers : int, sequence of int, or "embed"
    vector : float [hidden_size], or [n, hidden_size] with n positions
    scale : float
    site : "streams", "attention_in", "attention_out", "ffn_in" or "ffn_out"
        "streams" are the residual streams after the layer; the inputs are normed and not yet
        rounded to FP8, the outputs not yet spread over the streams.
    streams : int or sequence of int, optional
        All hc_mult of them by default.
    positions : None, int, range, slice or ascending ints

    Examples
    --------
    >>> Steer(3, np.ones(8), scale=2.0, positions=slice(5, None))
    Steer([3], <float32 [8]>, scale=2.0, positions=slice(5, None))
    """

    vector: Float32
    scale: float
    _fields = ("vector", "scale", "site", "streams")

    def __init__(
        self, layers: Layers, vector: npt.ArrayLike, *, scale: float = 1.0, site: str = "streams",
        streams: Ids | None = None, positions: Positions = None,
    ) -> None:
        values = finite(vector, "Steer: vector", (1, 2))
        (factor,) = numbers(scale, 1, "Steer: scale", "vector")
        if values.ndim == 2:
            check_rows(position_ranges(positions, "Steer"), len(values), "Steer: vector")
        super().__init__(layers, positions, site, streams, vector=values, scale=factor)
        finite(self._scaled(), "Steer: scale * vector", (1, 2))

    def _check_values(self, config: "Config") -> None:
        super()._check_values(config)
        d = config.hidden_size
        self._check_shape("vector", self.vector.shape, f"[hidden_size] = [{d}] or [positions, {d}]",
                          (d,), self.vector.ndim == 2)

    def _rows(self) -> int:
        return len(self.vector) if self.vector.ndim == 2 else 1

    def _later_rows(self, dropped: int) -> dict[str, Any]:
        return {"vector": finite(self.vector[dropped:], "Steer: vector", (2,))}

    def _scaled(self) -> Float32:
        with np.errstate(over="ignore"):
            return np.float32(self.scale) * self.vector

    def _parts(self, config: "Config") -> tuple[int, int, Any, Any]:
        return ADD, SITES.index(self.site), self._mask(config), self._scaled()


class Patch(_AtSite):
    """Rows replaced: activation patching.

    Parameters
    ----------
    layers : int, sequence of int, or "embed"
    values : float [streams, hidden_size], or [n, streams, hidden_size] with n positions
        Rounded to bf16, which traced values are already.  At the other sites [hidden_size] or
        [n, hidden_size].
    site : "streams", "attention_in", "attention_out", "ffn_in" or "ffn_out"
    streams : int or sequence of int, optional
        Those that are replaced, in the order of the values; all hc_mult of them by default.
    positions : None, int, range, slice or ascending ints

    Examples
    --------
    Token 5 of one prompt as another prompt has it after layer 2:

    >>> import dsv4
    >>> with dsv4.load() as model:
    ...     with model.trace("To be, or not to be", streams=[2]) as t:
    ...         row = t.streams[2][5]
    ...     edit = Patch(2, row, positions=5)
    ...     with model.trace("To see, or not to be", streams=[2], edit=edit) as t:
    ...         bool((t.streams[2][5] == row).all())
    True
    """

    values: Float32
    _fields = ("values", "site", "streams")

    def __init__(
        self, layers: Layers, values: npt.ArrayLike, *, site: str = "streams",
        streams: Ids | None = None, positions: Positions = None,
    ) -> None:
        rank = 2 if site == "streams" else 1
        rows = finite(values, "Patch: values", (rank, rank + 1))
        if rows.ndim > rank:
            check_rows(position_ranges(positions, "Patch"), len(rows), "Patch: values")
        super().__init__(layers, positions, site, streams, values=rows)

    @property
    def _rank(self) -> int:
        return 2 if self.site == "streams" else 1

    def _check_values(self, config: "Config") -> None:
        super()._check_values(config)
        d = config.hidden_size
        one: tuple[int, ...] = (d,)
        names = "hidden_size"
        if self.site == "streams":
            one = (config.hc_mult if self.streams is None else len(self.streams), d)
            names = "streams, hidden_size"
        self._check_shape(
            "values", self.values.shape,
            f"[{names}] = {list(one)} or [positions, {', '.join(map(str, one))}]", one,
            self.values.ndim > self._rank)

    def _rows(self) -> int:
        return len(self.values) if self.values.ndim > self._rank else 1

    def _later_rows(self, dropped: int) -> dict[str, Any]:
        return {"values": finite(self.values[dropped:], "Patch: values", (self._rank + 1,))}

    def _parts(self, config: "Config") -> tuple[int, int, Any, Any]:
        values = self.values
        if self.streams is not None:  # the engine has them ascending
            values = values[..., np.argsort(self.streams), :]
        return SET, SITES.index(self.site), self._mask(config), values


class Clamp(_AtSite):
    """Values kept within limits: low where they are below it, high where they are above.

    With low = high = 0 a sublayer's output is taken out.

    Parameters
    ----------
    layers : int, sequence of int, or "embed"
    low, high : float
    dims : int or sequence of int, optional
        Of the hidden dimensions; all by default.
    site : "streams", "attention_in", "attention_out", "ffn_in" or "ffn_out"
    streams : int or sequence of int, optional
    positions : None, int, range, slice or ascending ints

    Examples
    --------
    >>> Clamp(2, -1, 1, dims=7, streams=0)
    Clamp([2], -1.0, 1.0, dims=[7], streams=[0])
    """

    low: float
    high: float
    dims: tuple[int, ...] | None
    _fields = ("low", "high", "dims", "site", "streams")

    def __init__(
        self, layers: Layers, low: float, high: float, *, dims: Ids | None = None,
        site: str = "streams", streams: Ids | None = None, positions: Positions = None,
    ) -> None:
        (least,), (most,) = (numbers(v, 1, f"Clamp: {name}", "limit")
                             for name, v in (("low", low), ("high", high)))
        if least > most:
            raise ValueError(f"Clamp: low: got {least}, wanted at most high = {most}")
        chosen = None if dims is None else ids_of(dims, "Clamp: dims")
        super().__init__(layers, positions, site, streams, low=least, high=most, dims=chosen)

    def _check_values(self, config: "Config") -> None:
        super()._check_values(config)
        self._below("dims", self.dims or (), config.hidden_size)

    def _parts(self, config: "Config") -> tuple[int, int, Any, Any]:
        limits = np.empty((2, config.hidden_size), np.float32)
        limits[0], limits[1] = -np.inf, np.inf
        at = slice(None) if self.dims is None else list(self.dims)
        limits[0, at], limits[1, at] = self.low, self.high
        return CLAMP, SITES.index(self.site), self._mask(config), limits


class Callback(Operation, json=False):
    """A function of yours that changes the streams after a layer.

    For what the other operations do not foresee.  It is called with ``streams``, float32
    [n, hc_mult, hidden_size], and ``positions``, int32 [n], of the tokens of a pass at its
    positions, after all other operations of that layer.  It changes the streams in place or
    returns others; they are rounded to bf16.  The rows of a prompt come in several calls where it
    is longer than a pass, so a function that treats every row by itself gives the same bits
    however the tokens are cut; a step that is tried again calls it again.

    Cost: the step stops at that layer until the function has returned, and the rows are copied
    twice; for one token about 0.1 ms beside the function's own time.  An exception in it
    ends the step: the session stays at its last token, and so do the others of the step.  It
    cannot run steps of this model.  Callbacks are not written to JSON or to saved sessions.

    Parameters
    ----------
    layers : int, sequence of int, or "embed"
    function : callable (streams, positions) -> array or None
    positions : None, int, range, slice or ascending ints

    Examples
    --------
    >>> import dsv4
    >>> def halve(streams, positions):
    ...     streams *= 0.5
    >>> with dsv4.load() as model:
    ...     session = model.session(edit=Callback(1, halve, positions=slice(3, None)))
    ...     session.append("To be").shape[0]
    1
    """

    function: Callable[[Float32, Int32], Any]
    _fields = ("function",)
    _embed = True

    def __init__(
        self, layers: Layers, function: Callable[[Float32, Int32], Any],
        positions: Positions = None,
    ) -> None:
        if not callable(function):
            raise TypeError(f"Callback: function: got {type(function).__name__}, wanted a callable")
        super().__init__(layers, positions, function=function)

    def _check_values(self, config: "Config") -> None:
        pass

    def _to_dict(self) -> NoReturn:
        raise ValueError(f"{self!r} cannot be written: a function is not data; leave the Callback "
                         "out of the edit, or use the other operations")

    def _functions(self, layer: int) -> list[Callable[[Float32, Int32], Float32]]:
        name = f"Callback at {'the embedding' if layer < 0 else f'layer {layer}'}"

        def call(streams: Float32, positions: Int32) -> Float32:
            shape = streams.shape
            result = self.function(streams, positions)
            got = np.asarray(streams if result is None else result)
            if got.dtype.kind != "f" or got.shape != shape:
                raise ValueError(
                    f"{name}: returned {got.dtype} {list(got.shape)}, wanted floats of shape "
                    f"{list(shape)} (rows, hc_mult, hidden_size), or None for changes in place")
            if not np.isfinite(got).all():
                raise ValueError(f"{name}: returned NaN or infinite values, wanted finite ones")
            return np.ascontiguousarray(got, np.float32)

        return [call]

    def _parts(self, config: "Config") -> tuple[int, int, Any, Any]:
        return CALL, 0, (), ()
