# SPDX-License-Identifier: Apache-2.0
"""Arrays in the memory of a GPU: traces and weights where they lie, for torch, CuPy and JAX.

`DeviceArray` is a door for data, not an array library: ``torch.from_dlpack(array)`` shares its
memory, `DeviceArray.numpy` copies it to the host.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dsv4 import _core
from dsv4.arrays import some_rows

CPU, CUDA = 1, 2  # DLPack's numbers of devices
DEFAULT_STREAM = 1  # DLPack's number of CUDA's legacy default stream
IS_COPIED = 2  # a flag of DLPack
Array = npt.NDArray[Any]


class Kind(NamedTuple):
    """How an element type appears: to NumPy, and as DLPack's (code, bits)."""

    numpy: str
    dlpack: tuple[int, int]


KINDS = {
    "int64": Kind("<i8", (0, 64)), "int32": Kind("<i4", (0, 32)), "float32": Kind("<f4", (2, 32)),
    "float16": Kind("<f2", (2, 16)), "bfloat16": Kind("<u2", (4, 16)),
    "float8_e4m3fn": Kind("u1", (10, 8)), "float8_e8m0fnu": Kind("u1", (14, 8)),
    "uint8": Kind("u1", (1, 8)),
}
NUMBERS = ("int64", "int32", "float32", "float16", "uint8")  # NumPy has them


class DeviceArray:
    """An array in the memory of a GPU, from `Tensor.on_device` or a trace with ``device=True``.

    It keeps its memory: valid after `Model.close`, like what was made of it through DLPack.  The
    memory of a trace is given back when the last of them is gone, that of weights with the model.

    Attributes
    ----------
    shape : tuple of int
    dtype : str
        "float32", "int32", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu", "uint8" (pairs of FP4
        codes), "float16" or "int64".
    strides : tuple of int
        In elements.
    read_only : bool
        It is a weight: writing to it changes what the model computes.

    Examples
    --------
    >>> import dsv4
    >>> with dsv4.load() as model:
    ...     if model.device != "cpu":  # torch.from_dlpack(t.streams[1]) copies nothing
    ...         with model.trace("To be, or not", streams=[1], device=True) as t:
    ...             streams = t.streams[1].numpy()  # copied to the host
    """

    __slots__ = ("_at", "_memory", "dtype", "shape", "strides")

    def __init__(
        self, memory: "_core.Memory", at: int, shape: tuple[int, ...], dtype: str,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        self._memory, self._at = memory, at  # its first byte there
        self.shape, self.dtype = shape, dtype
        self.strides = in_order(shape) if strides is None else strides

    @property
    def device(self) -> str:
        """As torch calls it: "cuda:0"."""
        return f"cuda:{self._memory.device}"

    @property
    def read_only(self) -> bool:
        """Whether it is a weight of the model."""
        return self._memory.read_only

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return KINDS[self.dtype].dlpack[1] // 8

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.size * self.itemsize

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without dimensions")
        return self.shape[0]

    def _span(self) -> int:
        """Elements from the first to the last, that included."""
        if not self.size:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))

    def __getitem__(self, rows: int | slice) -> "DeviceArray":
        """Some rows, without copying.

        Parameters
        ----------
        rows : int or slice
            An int gives one row without its dimension; slices have step 1.
        """
        first, n = some_rows(rows, len(self))
        shape = self.shape[1:] if n is None else (n, *self.shape[1:])
        strides = self.strides[1:] if n is None else self.strides
        at = self._at + first * self.strides[0] * self.itemsize
        return DeviceArray(self._memory, at, shape, self.dtype, strides)

    def numpy(self) -> Array:
        """Copy it to the host.

        Returns
        -------
        array [shape]
            What NumPy has no dtype for as codes: bfloat16 as uint16, FP8 as uint8.

        Raises
        ------
        DeviceError
            The device is lost.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     if model.device != "cpu":
        ...         codes = model.tensors["head.weight"].on_device().numpy()
        """
        data = self._memory.read(self._at, self._span() * self.itemsize)
        flat = data.view(KINDS[self.dtype].numpy)
        if self.strides == in_order(self.shape):
            return flat.reshape(self.shape)
        strides = [step * self.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides).copy()

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError(f"it lies on {self.device}: NumPy gets it only by copying")
        if self.dtype not in NUMBERS:
            raise TypeError(
                f"NumPy has no {self.dtype}: numpy() gives its codes, and Tensor.dequantize "
                "numbers")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self._memory.device

    def __dlpack__(
        self, *, stream: int | None = None, max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None, copy: bool | None = None,
    ) -> Any:
        """Export it without copying, or a copy on the same device or on the host if asked for.

        Parameters
        ----------
        stream : int, optional
            Where the consumer will read it: a cudaStream_t, 1 the legacy default stream (as None),
            2 the default stream of the thread, -1 nowhere yet.  What is exported is complete, so
            only a copy made here is something that stream waits for.
        max_version : tuple of int, optional
            DLPack versions from (1, 0) on tell that weights are read-only; older ones cannot, so
            they get none without `copy`.
        dl_device : tuple of int, optional
            Its own device, or (1, 0): copied to the host.
        copy : bool, optional

        Raises
        ------
        BufferError
            Another device, or a copy would be needed and is forbidden.
        ValueError, TypeError
            No such stream.
        """
        stream = checked_stream(stream)
        versioned = max_version is not None and max_version[0] >= 1
        own = self.__dlpack_device__()
        if dl_device not in (None, own, (CPU, 0)):
            raise BufferError(f"got device {dl_device}, wanted {own} or the host, {(CPU, 0)}")
        if dl_device == (CPU, 0):
            if copy is False:
                raise BufferError(f"it lies on {self.device}: the host gets it only by copying")
            host = self.numpy()
            code = KINDS[self.dtype].dlpack
            return _core.dlpack(host.reshape(-1).view(np.uint8), self.shape, *code, versioned)
        if self.read_only and not versioned and not copy:
            raise BufferError(
                "a weight is read-only, which only DLPack 1.0 and later can say; wanted "
                "max_version=(1, 0) or copy=True")
        code = KINDS[self.dtype].dlpack
        if not copy:
            return self._memory.dlpack(self._at, self.shape, self.strides, *code, versioned, 0)
        own_copy = self._memory.copy(self._at, self._span() * self.itemsize, max(stream, 0))
        return own_copy.dlpack(0, self.shape, self.strides, *code, versioned, IS_COPIED)

    def __repr__(self) -> str:
        return f"<dsv4.DeviceArray {self.dtype} {list(self.shape)} on {self.device}>"


def in_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of an array whose elements lie one after another."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * max(shape[i], 1)
    return tuple(strides)


def checked_stream(stream: object) -> int:
    """A stream of DLPack's protocol on CUDA, the default one for None."""
    if stream is None:
        return DEFAULT_STREAM
    if isinstance(stream, bool) or not isinstance(stream, int):
        raise TypeError(f"stream: got {stream!r}, wanted an int or None")
    if stream == 0 or stream < -1:
        raise ValueError(
            f"stream: got {stream}, wanted 1 (the legacy default stream), 2 (that of the thread), "
            "-1 (none) or a cudaStream_t")
    return stream
