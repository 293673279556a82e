# SPDX-License-Identifier: Apache-2.0
"""Which routed experts a GPU has when it has no room for all: those that were chosen most.

While a model with experts in host memory runs on a GPU, it counts how often tokens choose each
expert.  The counts are kept in a small file of the user's, one for each model, and the next load
begins with the experts that were used most; without a file whole layers are filled, the first
ones first, since a layer that is whole needs no word with the host.  Only the speed depends on it:
results do not, whatever the file says, and one that cannot be used is ignored with a warning.
"""

import hashlib
import json
import os
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4 import _core
from dsv4.checkpoint import Checkpoint
from dsv4.errors import BackendUnavailable, DeviceError

FORMAT = "dsv4 uses of experts, 1"
MAX_BYTES = 1 << 26
SAMPLE = 4096  # bytes of each router that are looked at
FADE = 1 << 20  # tokens after which older ones count half

Uses = npt.NDArray[np.uint64]


def fingerprint(checkpoint: Checkpoint) -> str:
    """What the counts belong to: names, dtypes and shapes of all tensors, and some bytes of every
    router, as hex."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        if name.endswith(".ffn.gate.weight"):
            digest.update(os.pread(checkpoint.shards[info.shard].fd, min(SAMPLE, info.nbytes),
                                   info.offset))
    return digest.hexdigest()


def uses_file(key: str) -> Path:
    """Where the counts of this model are: in the user's state folder (XDG)."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        state = Path.home() / ".local" / "state"
    return state / "dsv4" / "experts" / f"{key[:32]}.json"


def read(key: str, shape: tuple[int, int]) -> Uses | None:
    """The counts [layers, experts], or None where there are none; warns where they are damaged."""
    try:
        path = uses_file(key)
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, RuntimeError):  # no counts, or no home
        return None
    except OSError as error:
        _warn(f"{error.filename}: {error.strerror}")
        return None
    try:
        return _parsed(text, key, shape)
    except ValueError as error:
        _warn(f"{path}: {error}")
        return None


def _parsed(text: bytes, key: str, shape: tuple[int, int]) -> Uses:
    try:
        found = json.loads(text)
        rows, got = found["uses"], (found["format"], found["model"], found["crc32"])
        uses = np.array(rows, np.int64)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"got {type(error).__name__}, wanted what dsv4 writes there") from error
    wanted = (FORMAT, key, _checksum(uses))
    if got != wanted or uses.shape != shape or (uses < 0).any():
        raise ValueError("got the counts of another model, or damaged ones")
    return uses.astype(np.uint64)


def _checksum(uses: npt.NDArray[Any]) -> int:
    return zlib.crc32(json.dumps(uses.tolist()).encode())


def _warn(what: str) -> None:
    warnings.warn(f"uses of experts are ignored: {what}", stacklevel=2)


def order(uses: Uses) -> npt.NDArray[np.int32]:
    """layer * experts + expert of those that were used, the most first; equals by layer.

    Examples
    --------
    >>> order(np.array([[0, 2, 1], [2, 0, 3]], np.uint64)).tolist()
    [5, 1, 3, 2]
    """
    flat = uses.ravel()
    ranked = np.argsort(-flat.astype(np.float64), kind="stable").astype(np.int32)
    return ranked[: int(np.count_nonzero(flat))]


def save(core: _core.Model, key: str, shape: tuple[int, int], chosen: int, process: int) -> None:
    """Add what this model has counted to the file; a failure costs the counts alone.

    `chosen` is how many experts a token takes in a layer, `process` the id of the one that loaded.
    """
    if os.getpid() != process:
        return
    uses = np.zeros(shape, np.uint64)
    try:
        core.uses(uses)
        if not uses.any():
            return
        before = read(key, shape)
        if before is not None:
            uses += before
        while uses.sum() > FADE * shape[0] * chosen:
            uses //= 2
        _write(uses_file(key), dict(format=FORMAT, model=key, crc32=_checksum(uses),
                                    uses=uses.tolist()))
    except (DeviceError, BackendUnavailable):
        return  # the GPU is lost, which its user has been told
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        _warn(f"they could not be kept: {error}")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
