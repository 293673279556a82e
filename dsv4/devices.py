# SPDX-License-Identifier: Apache-2.0
"""The GPUs of this machine, and why there are none.

The CUDA half of dsv4 is a shared library beside the module, built where nvcc was found.  It is
loaded when a device is asked for, never by an import.  NCCL, which connects devices, is looked for
when a model uses several.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv4 import _core
from dsv4.device_names import numbers
from dsv4.errors import BackendUnavailable, DeviceError
from dsv4.memory import size

PLUGIN = Path(__file__).parent / "lib" / "libdsv4_cuda.so"
DRIVER = "libcuda.so.1"
NCCL = "libnccl.so.2"


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU.

    Attributes
    ----------
    name : str
    architecture : str
        As in "9.0".
    multiprocessors, total_bytes, free_bytes : int
    why : str or None
        Why it cannot be used; None where it can.
    """

    name: str
    architecture: str
    multiprocessors: int
    total_bytes: int
    free_bytes: int
    why: str | None

    def __str__(self) -> str:
        if self.why is not None:
            return f"{self.name or 'unknown'}: {self.why}"
        return (f"{self.name}, architecture {self.architecture}, {self.multiprocessors} "
                f"multiprocessors, {size(self.free_bytes)} of {size(self.total_bytes)} free")


@dataclass(frozen=True, slots=True)
class Devices:
    """What the CUDA plugin finds.

    Attributes
    ----------
    plugin : Path or None
        The plugin; None where this dsv4 was built without it.
    state : str
        "ready", or why no device can be used, in one sentence.
    built : str
        CUDA version and architectures of the plugin, once it is loaded.
    devices : tuple of Device
    """

    plugin: Path | None
    state: str
    built: str
    devices: tuple[Device, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for json."""
        return {
            "plugin": None if self.plugin is None else str(self.plugin), "state": self.state,
            "built": self.built,
            "devices": [asdict(d) | {"text": str(d)} for d in self.devices],
        }


def choose(device: object) -> tuple[str, str | None]:
    """Where a model is to run, and why not on a GPU if that was left open.

    Parameters
    ----------
    device : str
        As for `device_names.numbers`.

    Returns
    -------
    ("cpu" or "cuda", str or None)

    Raises
    ------
    BackendUnavailable
        For "cuda" and numbers, with the cause and what to do.
    ValueError
        For another device.

    Examples
    --------
    >>> choose("cpu")
    ('cpu', None)
    """
    wanted = numbers(device)
    if device == "cpu":
        return "cpu", None
    found = find()
    why = None if found.state == "ready" else found.state
    for number in wanted or (0,):
        if why is None and number >= len(found.devices):
            there = "1 GPU, 0" if len(found.devices) == 1 else (
                f"{len(found.devices)} GPUs, 0 to {len(found.devices) - 1}")
            why = (f"CUDA: device {number}: there is no such one among {there}; see whether "
                   "nvidia-smi lists it, and whether CUDA_VISIBLE_DEVICES hides it")
        why = why or found.devices[number].why
    if why is None:
        return "cuda", None
    if wanted:
        raise BackendUnavailable(why)
    return "cpu", why


def nccl() -> str:
    """NCCL's library: that of NVIDIA's Python package where it is installed, else a name for the
    system's loader.

    Examples
    --------
    >>> nccl().endswith("libnccl.so.2")
    True
    """
    for folder in sys.path:
        library = Path(folder, "nvidia", "nccl", "lib", NCCL)
        if library.is_file():
            return str(library)
    return NCCL


def find() -> Devices:
    """Load the plugin, if there is one, and ask it for devices.  Raises nothing.

    Examples
    --------
    >>> isinstance(find().state, str)
    True
    """
    plugin = PLUGIN if PLUGIN.exists() else None
    try:
        version, built_for, found = _core.devices(str(PLUGIN), DRIVER)
    except (BackendUnavailable, DeviceError, MemoryError) as error:
        return Devices(plugin, str(error), "", ())
    devices = tuple(
        Device(name, f"{major}.{minor}", cores, total, free, why)
        for name, major, minor, cores, total, free, why in found)
    built = f"CUDA {version // 1000}.{version % 1000 // 10}, {built_for}"
    usable = any(d.why is None for d in devices)
    return Devices(plugin, "ready" if usable else str(devices[0].why), built, devices)
