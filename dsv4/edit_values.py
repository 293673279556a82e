# SPDX-License-Identifier: Apache-2.0
"""What the arguments of edits become: positions, ids and arrays, checked, immutable, as JSON."""

import base64
import binascii
import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from dsv4.arrays import Float32, Int32

if TYPE_CHECKING:
    from dsv4.config import Config

# half-open, ascending and apart; only the last end may be None: no end
Ranges: TypeAlias = tuple[tuple[int, int | None], ...]
NO_END = 2**31 - 1  # of positions and entries, for the engine
ALL: Ranges = ((0, None),)
SHOWN = 12  # numbers that a repr lists


def nearest(name: object, known: Iterable[str]) -> str:
    """The names most like this one, or all of them: for messages."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, 3, 0.5)
    return " or ".join(map(repr, close)) if close else f"one of {', '.join(map(repr, names))}"


# ---- integers ----

def _ints(value: object, name: str) -> list[int]:
    """Numbers from 0 on; one is a list of itself."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted an int or a sequence of ints")
    found = []
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int | np.integer):
            raise TypeError(f"{name}: got {item!r:.40}, wanted ints")
        if not 0 <= item < NO_END:
            raise ValueError(f"{name}: got {item}, wanted 0 or more")
        found.append(int(item))
    if not found:
        raise ValueError(f"{name}: got none, wanted at least one")
    return found


def ids_of(value: object, name: str) -> tuple[int, ...]:
    """Different numbers from 0 on, in their order."""
    found = _ints(value, name)
    for i, item in enumerate(found):
        if item in found[:i]:
            raise ValueError(f"{name}: got {item} twice, wanted each once")
    return tuple(found)


def layers_of(value: object, name: str, *, embed: bool) -> tuple[int, ...]:
    """Layers; -1 is the embedding, where that is allowed."""
    if isinstance(value, str):
        if not embed or value != "embed":
            wanted = "'embed' or layers by number" if embed else "layers by number"
            raise ValueError(f"{name}: layers: got {value!r}, wanted {wanted}")
        return (-1,)
    return ids_of(value, f"{name}: layers")


# ---- ranges ----

def position_ranges(value: object, name: str) -> Ranges | None:
    """Positions in whatever form they come; None: all."""
    return _ranges(value, f"{name}: positions")


def entry_ranges(value: object, name: str) -> Ranges | None:
    """Compressed entries likewise."""
    return _ranges(value, f"{name}: entries")


def _ranges(value: object, name: str) -> Ranges | None:
    if value is None:
        return None
    if isinstance(value, slice | range):
        return _one_range(value, name)
    if isinstance(value, tuple) and value and all(isinstance(v, tuple) for v in value):
        return _joined(list(value), name)
    found = _ints(value, name)
    return _joined([(i, i + 1) for i in found], name)


def _one_range(value: slice | range, name: str) -> Ranges:
    first, end = value.start, value.stop
    first = 0 if first is None else first
    if value.step not in (None, 1):
        raise ValueError(f"{name}: got a step of {value.step}, wanted 1")
    if isinstance(first, bool) or not isinstance(first, int | np.integer):
        raise TypeError(f"{name}: got {first!r}, wanted ints")
    return _joined([(int(first), end)], name)


def _joined(pairs: list[Any], name: str) -> Ranges:
    """Ranges one after another, those that touch made one."""
    found: list[tuple[int, int | None]] = []
    for pair in pairs:
        if len(pair) != 2 or type(pair[0]) is not int or not (
                pair[1] is None or isinstance(pair[1], int | np.integer)):
            raise ValueError(f"{name}: got {pair!r:.60}, wanted ints (first, end)")
        first, end = pair[0], None if pair[1] is None else int(pair[1])
        if first < 0 or first >= NO_END or (end is not None and not first < end <= NO_END):
            raise ValueError(f"{name}: got {first} to {end}, wanted 0 or more and an end after it")
        if found and (found[-1][1] is None or first < found[-1][1]):
            raise ValueError(f"{name}: got {first} after {_last(found)}, wanted ascending order")
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], end)
        else:
            found.append((first, end))
    return tuple(found)


def _last(found: list[tuple[int, int | None]]) -> str:
    end = found[-1][1]
    return "no end" if end is None else str(end - 1)


def since(ranges: Ranges | None, first: int) -> tuple[Ranges | None, int]:
    """The part from `first` on, and how many positions are before it."""
    if ranges is None:
        return (((first, None),) if first else None), 0
    left: list[tuple[int, int | None]] = []
    dropped = 0
    for a, b in ranges:
        if b is not None and b <= first:
            dropped += b - a
        else:
            dropped += max(0, first - a)
            left.append((max(a, first), b))
    return tuple(left), dropped


def pairs(ranges: Ranges | None) -> Int32:
    """For the engine: [n, 2]."""
    given = ranges or ()
    return np.array([(a, NO_END if b is None else b) for a, b in given], np.int32).reshape(-1, 2)


def check_rows(ranges: Ranges | None, n: int, name: str) -> None:
    """ValueError unless there are n positions, for n rows of values."""
    if ranges is None or ranges[-1][1] is None:
        raise ValueError(
            f"{name}: got {n} rows for positions without end, wanted as many positions")
    got = sum((b or 0) - a for a, b in ranges)
    if got != n:
        raise ValueError(f"{name}: got {n} rows for {got} positions, wanted one for each")


def check_most(
    found: "Mapping[int, list[tuple[Ranges | None, Any]]]", name: str, most: int, why: str
) -> None:
    """ValueError where, at some position of a layer, the ids of all operations are too many."""
    for layer, parts in found.items():
        for first in sorted({a for ranges, _ in parts for a, _ in ranges or ALL}):
            ids: set[int] = set()
            for ranges, own in parts:
                if any(a <= first and (b is None or first < b) for a, b in ranges or ALL):
                    ids.update(_members(own, most))
            if len(ids) > most:
                raise ValueError(f"{name}: got {len(ids)} of layer {layer} at position {first}, "
                                 f"wanted at most {most}: {why}")


def _members(ids: Sequence[Any], most: int) -> Iterable[int]:
    """Ids, or the first of those in ranges: as many as can matter."""
    if not ids or not isinstance(ids[0], tuple):
        return ids
    return [i for a, b in ids for i in range(a, min(b, a + most + 1))]


def check_kinds(config: "Config", layers: Sequence[int], name: str, kinds: Sequence[str]) -> None:
    """ValueError unless all layers are of these kinds."""
    for layer in layers:
        if config.layer_kind(layer) not in kinds:
            fit = [i for i in range(config.num_hidden_layers) if config.layer_kind(i) in kinds]
            raise ValueError(
                f"{name}: layers: got {layer}, which is {config.layer_kind(layer)}; wanted "
                f"{' or '.join(kinds)}: {shown(fit) if fit else 'this model has none'}")


# ---- floats ----

def numbers(value: object, n: int, name: str, what: str) -> tuple[float, ...]:
    """n finite numbers; one stands for all."""
    several = isinstance(value, Iterable) and not isinstance(value, str | bytes)
    items: list[Any] = list(value) if isinstance(value, Iterable) and several else [value]
    if several and len(items) != n:
        raise ValueError(f"{name}: got {len(items)}, wanted one or {n}: one for each {what}")
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int | float | np.integer | np.floating):
            raise TypeError(f"{name}: got {item!r:.40}, wanted a number")
        if not abs(float(item)) <= float(np.finfo(np.float32).max):
            raise ValueError(f"{name}: got {item}, wanted a finite float32")
    found = tuple(float(item) for item in items)
    return found if several else found * n


def finite(value: npt.ArrayLike, name: str, ranks: Sequence[int]) -> Float32:
    """A read-only float32 copy of finite numbers with one of these numbers of dimensions."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: got {array.dtype}, wanted numbers")
    if array.ndim not in ranks or not array.size:
        raise ValueError(f"{name}: got shape {list(array.shape)}, wanted "
                         f"{' or '.join(map(str, ranks))} dimensions")
    with np.errstate(over="ignore"):
        copy = np.array(array, np.float32, order="C")
    if not np.isfinite(copy).all():
        raise ValueError(f"{name}: got NaN or infinite values, wanted finite float32")
    copy.flags.writeable = False
    return copy


def forced_rows(value: object, ranges: Ranges | None) -> tuple[tuple[int, ...], ...]:
    """Experts of every position, or one row for all."""
    name = "ForceExperts: experts"
    rows: list[Any] = list(value) if isinstance(value, Iterable) else [value]
    if rows and all(isinstance(row, Iterable) and not isinstance(row, str) for row in rows):
        found = tuple(ids_of(row, f"{name}[{i}]") for i, row in enumerate(rows))
        if len(found) > 1:
            check_rows(ranges, len(found), name)
        return found
    return (ids_of(value, name),)


# ---- showing, JSON ----

def shown(value: object) -> str:
    """A value in a repr."""
    if isinstance(value, np.ndarray):
        return f"<{value.dtype} {list(value.shape)}>"
    if callable(value):
        return getattr(value, "__qualname__", repr(value))
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return shown([list(row) for row in value] if len(value) > 1 else value[0])
    if isinstance(value, list | tuple):
        text = ", ".join(map(repr, value[:SHOWN]))
        return f"[{text}]" if len(value) <= SHOWN else f"[{text}, ... {len(value)} in all]"
    return repr(value)


def shown_ranges(ranges: Ranges) -> str:
    """Positions or entries, as a constructor takes them where that is short."""
    first, end = ranges[0]
    if len(ranges) == 1 and end is None:
        return f"slice({first}, None)"
    if len(ranges) == 1 and end is not None and end - first > 1:
        return f"range({first}, {end})"
    if ranges[-1][1] is None or sum((b or 0) - a for a, b in ranges) > SHOWN:
        return shown([f"{a}:{'' if b is None else b}" for a, b in ranges])
    return shown([i for a, b in ranges for i in range(a, b or 0)])


def array_to_json(array: Float32) -> dict[str, Any]:
    """Shape and base64 of the values, little-endian."""
    data = base64.b64encode(array.astype("<f4", copy=False).tobytes()).decode()
    return {"shape": list(array.shape), "float32": data}


def array_from_json(value: Mapping[str, Any], name: str) -> Float32:
    """The array; ValueError unless it is one."""
    shape, data = value.get("shape"), value.get("float32")
    if set(value) != {"shape", "float32"} or not isinstance(data, str) or not (
            isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
        raise ValueError(f"{name}: got {sorted(value)}, wanted shape and float32 (base64)")
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name}: float32: {error}") from error
    if len(raw) != 4 * math.prod(shape):
        raise ValueError(f"{name}: float32: got {len(raw)} bytes, wanted {4 * math.prod(shape)} "
                         f"for shape {shape}")
    return np.frombuffer(raw, "<f4").astype(np.float32).reshape(shape)


def from_json(text: str | bytes) -> Any:
    """A JSON value without NaN and repeated keys."""
    def refuse(name: str) -> NoReturn:
        raise ValueError(f"edit: got {name}, wanted finite numbers")

    def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise ValueError("edit: got a key twice, wanted each once")
        return found

    if not isinstance(text, str | bytes):
        raise TypeError(f"edit: got {type(text).__name__}, wanted JSON as str or bytes")
    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"edit: not JSON: {error}") from error
