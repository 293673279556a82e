# SPDX-License-Identifier: Apache-2.0
"""Single tensors of a tiny checkpoint as NumPy values, without the package's own reader."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from compare import bf16
from numpy.typing import NDArray

DTYPES: dict[str, Any] = {
    "BF16": np.uint16,
    "F32": np.float32,
    "I64": np.int64,
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
    "I8": np.uint8,
}


def tensor(folder: Path, name: str) -> NDArray[Any]:
    """The tensor of that name; bf16 as float32 values, FP8, FP4 and E8M0 as uint8 codes."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    data = (folder / index["weight_map"][name]).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:header])[name]
    start, end = (header + at for at in entry["data_offsets"])
    values = np.frombuffer(data[start:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return bf16(values) if entry["dtype"] == "BF16" else values
