# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint as objects: where they lie, what they hold, as arrays.

Nothing is read or copied before it is asked for.  Formats: SPEC 6.  `Tensor.numpy` never copies;
`Tensor.dequantize` gives numbers.
"""

import difflib
import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4 import _core
from dsv4.arrays import some_rows
from dsv4.checkpoint import TensorInfo
from dsv4.device_array import CPU, KINDS, DeviceArray, Kind

Array = npt.NDArray[Any]
CHUNK_ROWS = 256  # dequantised at a time
FP8_BLOCK, FP4_BLOCK = 128, 32  # numbers that share a scale: a square, a part of a row
# as torch and JAX call them; F4 lies in bytes
NAMES = {
    "I64": "int64", "I32": "int32", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu", "F4": "uint8",
}
EXACT = ("I64", "I32", "F32", "F16")  # NumPy has the dtype


class Tensor:
    """One tensor of a checkpoint, or some of its rows.  From `Model.tensors`; immutable.

    It keeps the weights alive: valid after `Model.close`.

    Attributes
    ----------
    name : str
        Official name.
    shape : tuple of int
        Logical: an FP4 tensor [rows, cols] has cols numbers a row, in cols / 2 bytes.
    dtype : str
        As safetensors calls it: "BF16", "F32", "F8_E4M3", "F8_E8M0", "F4", "I64", "I32", "F16".
    scale : Tensor or None
        The scales of quantised weights: one per 128 x 128 numbers of F8_E4M3, one per row and 32
        numbers of F4.
    device : str
        "cpu".

    Examples
    --------
    >>> import dsv4
    >>> with dsv4.load() as model:
    ...     w = model.tensors["layers.0.ffn.experts.1.w1.weight"]
    ...     w.dtype, len(w.shape), w.numpy().dtype.name, w.dequantize().dtype.name
    ('F4', 2, 'uint8', 'float32')
    """

    device = "cpu"

    def __init__(
        self, name: str, dtype: str, shape: tuple[int, ...], data: npt.NDArray[np.uint8],
        scale: "Tensor | None" = None, first: int = 0, core: "_core.Model | None" = None,
        at: int = 0,
    ) -> None:
        self.name, self.dtype, self.shape, self.scale = name, dtype, shape, scale
        self._core, self._at = core, at  # its first byte inside the whole tensor
        self._data = data  # its bytes, flat
        self._first = first  # its first row inside the whole tensor: scales are those of the whole

    @property
    def _kind(self) -> Kind:
        return KINDS[NAMES[self.dtype]]

    @property
    def nbytes(self) -> int:
        """Bytes as stored, without scales."""
        return self._data.nbytes

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"{self.name}: a tensor without dimensions has no length")
        return self.shape[0]

    def numpy(self) -> Array:
        """Show the stored bytes as an array, without copying; read-only.

        Returns
        -------
        array
            F32, F16, I32 and I64 as such, [shape].  What NumPy has no dtype for as its codes:
            BF16 as uint16 and F8 as uint8, [shape]; F4 as uint8 [rows, cols / 2], the number of
            the lower column in the low half.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     model.tensors["norm.weight"].numpy().ndim
        1
        """
        shape = self.shape
        if self.dtype == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        return self._data.view(self._kind.numpy).reshape(shape)

    def on_device(self) -> DeviceArray:
        """Where a GPU has it: the same codes, without copying; read-only.

        Returns
        -------
        DeviceArray
            As `numpy` gives them; BF16 and F8 as torch and JAX know them, F4 as bytes.

        Raises
        ------
        ValueError
            No GPU has it as it is stored: the model runs on the CPU; a vector, of which the GPU
            has float32 values; experts that stay on the host; draft heads.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     if model.device != "cpu":
        ...         head = model.tensors["head.weight"].on_device()  # for torch.from_dlpack
        """
        if self._core is None:
            raise ValueError(f"{self.name}: belongs to no model")
        memory = _core.tensor_memory(self._core, self.name)
        return DeviceArray(memory, self._at, self.numpy().shape, NAMES[self.dtype])

    def dequantize(self, dtype: npt.DTypeLike = np.float32) -> Array:
        """The numbers it stands for, scales applied; a new array.

        Parameters
        ----------
        dtype : float32, float64 or float16
            float32 holds every weight exactly as far as scales are powers of two; float16 rounds.

        Returns
        -------
        array [shape]

        Examples
        --------
        >>> import numpy as np
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     rows = model.tensors["layers.0.attn.wq_b.weight"][5:7]
        ...     x = rows.dequantize(np.float64)
        ...     x.shape == rows.shape, bool(np.isfinite(x).all())
        (True, True)
        """
        wanted = np.dtype(dtype)
        if wanted.kind != "f":
            raise TypeError(f"dtype: got {wanted}, wanted float32, float64 or float16")
        out = np.empty(self.shape, wanted)
        if not out.size:
            return out
        rows = out.reshape(-1, out.shape[-1]) if self.ndim > 1 else out.reshape(1, -1)
        codes = self.numpy()
        codes = codes.reshape(len(rows), -1)
        for at in range(0, len(rows), CHUNK_ROWS):
            part = codes[at : at + CHUNK_ROWS]
            rows[at : at + len(part)] = self._values(part, at)
        return out

    def _values(self, codes: Array, at: int) -> npt.NDArray[np.float32]:
        """Rows of codes, the first of them row `at` of this tensor, as float32."""
        values: npt.NDArray[np.float32]
        if self.dtype == "BF16":
            values = (codes.astype(np.uint32) << 16).view(np.float32)
        elif self.dtype == "F8_E4M3":
            values = E4M3[codes]
        elif self.dtype == "F8_E8M0":
            values = E8M0[codes]
        elif self.dtype == "F4":
            values = np.empty((len(codes), 2 * codes.shape[1]), np.float32)
            values[:, 0::2], values[:, 1::2] = E2M1[codes & 15], E2M1[codes >> 4]
        else:
            values = codes.astype(np.float32)
        if self.scale is not None:
            values = values * self._scales(at, *values.shape)
        return values

    def _scales(self, at: int, n: int, cols: int) -> npt.NDArray[np.float32]:
        """The scale of every number of n rows from row `at` of this tensor on."""
        assert self.scale is not None
        tall = FP8_BLOCK if self.dtype == "F8_E4M3" else 1
        wide = FP8_BLOCK if self.dtype == "F8_E4M3" else FP4_BLOCK
        rows = np.arange(self._first + at, self._first + at + n) // tall
        low = int(rows[0])
        scales = self.scale[low : int(rows[-1]) + 1].dequantize()
        return np.repeat(scales[rows - low], wide, axis=1)[:, :cols]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        if self.dtype in EXACT and copy is not True:
            array = self.numpy()
            if dtype is None or np.dtype(dtype) == array.dtype:
                return array
        if copy is False:
            raise ValueError(
                f"{self.name}: {self.dtype} becomes numbers only by copying; numpy() shows its "
                "codes without")
        if self.dtype in ("I64", "I32"):
            return np.array(self.numpy(), dtype)
        numbers = self.dequantize()
        return numbers if dtype is None else numbers.astype(dtype, copy=False)

    def __getitem__(self, rows: int | slice) -> "Tensor":
        """Some rows, without reading the others.

        Parameters
        ----------
        rows : int or slice
            An int gives one row without its dimension; slices have step 1.
        """
        all_rows = len(self)
        first, n = some_rows(rows, all_rows, f"{self.name}: ")
        shape = self.shape[1:] if n is None else (n, *self.shape[1:])
        end = first + (1 if n is None else n)
        size = self.nbytes // all_rows if all_rows else 0
        return Tensor(self.name, self.dtype, shape, self._data[first * size : end * size],
                      self.scale, self._first + first, self._core, self._at + first * size)

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU, 0

    def __dlpack__(
        self, *, stream: None = None, max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None, copy: bool | None = None,
    ) -> Any:
        """Export the codes without copying: BF16 and F8 as torch and JAX know them, F4 as bytes.

        The weights are read-only: writing to the result ends the process.
        """
        if stream is not None or dl_device not in (None, (CPU, 0)):
            raise BufferError(f"{self.name}: lies in main memory; wanted no stream and device cpu")
        codes = self.numpy()
        data = self._data.copy() if copy else self._data
        versioned = max_version is not None and max_version[0] >= 1
        return _core.dlpack(data, codes.shape, *self._kind.dlpack, versioned)

    def __repr__(self) -> str:
        scaled = f", scale {self.scale.dtype} {list(self.scale.shape)}" if self.scale else ""
        return f"<dsv4.Tensor {self.name}: {self.dtype} {list(self.shape)}{scaled}>"


class Tensors(Mapping[str, Tensor]):
    """All tensors of a model by official name; `Model.tensors`.

    Examples
    --------
    >>> import dsv4
    >>> with dsv4.load() as model:
    ...     sorted(model.tensors.match("layers.3.ffn.gate.*"))
    ['layers.3.ffn.gate.bias', 'layers.3.ffn.gate.weight']
    """

    def __init__(self, core: "_core.Model", table: Mapping[str, TensorInfo]) -> None:
        self._core, self._table = core, table

    def __getitem__(self, name: str) -> Tensor:
        info = self._table.get(name) if isinstance(name, str) else None
        if info is None:
            near = difflib.get_close_matches(str(name), self._table, 3, 0.6)
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            raise KeyError(f"got {name!r}, wanted the name of a tensor of this model{hint}")
        dtype, shape = info.dtype, info.shape
        scale = None
        if name.endswith(".weight") and name.removesuffix("weight") + "scale" in self._table:
            scale = self[name.removesuffix("weight") + "scale"]
        if dtype in ("I8", "U8"):  # bytes: scales, or pairs of codes
            dtype = "F8_E8M0" if name.endswith(".scale") else "F4"
        if dtype == "F4" and info.dtype != "F4":
            shape = (*shape[:-1], 2 * shape[-1])
        return Tensor(name, dtype, shape, self._core.tensor(name), scale, 0, self._core)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def match(self, pattern: str) -> dict[str, Tensor]:
        """The tensors whose names match a pattern like "layers.*.ffn.gate.*".

        Parameters
        ----------
        pattern : str
            `*` any characters, `?` one, `[0-9]` one of these.

        Returns
        -------
        dict of str to Tensor
            Maybe empty.
        """
        names = fnmatch.filter(self._table, pattern)
        return {name: self[name] for name in names}

    def __repr__(self) -> str:
        return f"<dsv4.Tensors: {len(self)} of {self._summary()}>"

    def _summary(self) -> str:
        return ", ".join(sorted({info.dtype for info in self._table.values()}))


def _e4m3() -> npt.NDArray[np.float32]:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    values = np.where(exponent == 0, mantissa / 512, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[codes & 127 == 127] = np.nan
    return np.where(codes > 127, -values, values).astype(np.float32)


def _e8m0() -> npt.NDArray[np.float32]:
    values = np.ldexp(np.ones(256), np.arange(256) - 127)
    values[255] = np.nan
    return values.astype(np.float32)


E4M3, E8M0 = _e4m3(), _e8m0()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
