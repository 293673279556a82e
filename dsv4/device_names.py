# SPDX-License-Identifier: Apache-2.0
"""How devices are named: "auto", "cpu", "cuda", "cuda:1", "cuda:0,1"."""

import re

WANTED = "'auto', 'cpu', 'cuda', or GPUs by number as in 'cuda:1' and 'cuda:0,1'"


def numbers(device: object) -> tuple[int, ...]:
    """The GPUs that a device names, in the order of the layers; none for "cpu" and "auto".

    Parameters
    ----------
    device : str
        "auto", "cpu", "cuda" (GPU 0), "cuda:1" (that one) or "cuda:0,1" (the layers are split over
        these, in this order).  Numbers are CUDA's: CUDA_VISIBLE_DEVICES says which there are.

    Raises
    ------
    ValueError
        For anything else, and for a number that occurs twice.

    Examples
    --------
    >>> numbers("cuda:0,1"), numbers("cuda"), numbers("cpu")
    ((0, 1), (0,), ())
    """
    if device in ("auto", "cpu"):
        return ()
    if device == "cuda":
        return (0,)
    if not isinstance(device, str) or not re.fullmatch("cuda:[0-9]{1,4}(,[0-9]{1,4})*", device):
        raise ValueError(f"device: got {device!r}, wanted {WANTED}")
    found = tuple(int(number) for number in device[5:].split(","))
    for i, number in enumerate(found):
        if number in found[:i]:
            raise ValueError(f"device: got GPU {number} twice in {device!r}, wanted each once")
    return found


def named(gpus: tuple[int, ...]) -> str:
    """The device of these GPUs.

    Examples
    --------
    >>> named((0, 1)), named((0,)), named((2,))
    ('cuda:0,1', 'cuda', 'cuda:2')
    """
    return "cuda" if gpus == (0,) else f"cuda:{','.join(map(str, gpus))}"
