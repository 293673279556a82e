# SPDX-License-Identifier: Apache-2.0
"""Edits and their operations in general: joined, compared, shown, as JSON, as the engine has them.

What operations there are is said in `dsv4.edit`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from dsv4 import _core
from dsv4.arrays import Float32, Int32
from dsv4.edit_values import (
    Ranges,
    array_from_json,
    array_to_json,
    check_most,
    from_json,
    layers_of,
    nearest,
    pairs,
    position_ranges,
    shown,
    shown_ranges,
    since,
)

if TYPE_CHECKING:
    from dsv4.config import Config
    from dsv4.model import Model

Positions: TypeAlias = int | range | slice | Sequence[int] | npt.NDArray[np.integer[Any]] | None
Layers: TypeAlias = int | str | Sequence[int]
Ids: TypeAlias = int | Sequence[int] | npt.NDArray[np.integer[Any]]

JSON_VERSION = 1
RANGES = ("positions", "entries")  # fields that hold ranges
# kind and site (enum dsv4_edit_kind, enum dsv4_edit_site), layer, rows, positions, ids, values
Native: TypeAlias = tuple[int, int, int, int, Any, Any, Any]


class Edit:
    """Operations on what a session computes, in their order.

    Parameters
    ----------
    *edits : Edit
        Joined; none give the edit that changes nothing, which is bit-equal to no edit.

    Examples
    --------
    >>> from dsv4.edit import AblateHeads, DisableExperts
    >>> edit = Edit(AblateHeads(1, [0, 2])) + DisableExperts(2, 5, positions=range(3, 7))
    >>> edit
    Edit(AblateHeads([1], [0, 2]), DisableExperts([2], [5], positions=range(3, 7)))
    >>> Edit.from_json(edit.to_json()) == edit, bool(Edit())
    (True, False)
    """

    _operations: "tuple[Operation, ...]"

    def __init__(self, *edits: "Edit") -> None:
        for i, edit in enumerate(edits):
            checked(edit, f"edits[{i}]")
        operations = tuple(operation for edit in edits for operation in edit.operations)
        object.__setattr__(self, "_operations", operations)

    @property
    def operations(self) -> "tuple[Operation, ...]":
        """The single operations, in their order."""
        return self._operations

    def __add__(self, other: "Edit") -> "Edit":
        return Edit(self, other) if isinstance(other, Edit) else NotImplemented

    def __bool__(self) -> bool:
        return bool(self.operations)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return tuple(operation._own_key() for operation in self.operations)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{name}: an edit is immutable; make another one")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{name}: an edit is immutable; make another one")

    def __repr__(self) -> str:
        return f"Edit({', '.join(map(repr, self.operations))})"

    def to_json(self) -> str:
        """Write the edit as JSON; `from_json` reads it.

        Arrays become ``{"shape": [...], "float32": base64 of the little-endian values}``, positions
        and entries ``[[first, end], ...]`` with the end not included, null for no end.

        Raises
        ------
        ValueError
            It holds a `Callback`: a function cannot be written.

        Examples
        --------
        >>> from dsv4.edit import AblateSinks
        >>> AblateSinks(1, positions=slice(8, None)).to_json()[30:]
        '{"operation": "AblateSinks", "layers": [1], "heads": null, "positions": [[8, null]]}]}'
        """
        return json.dumps({"version": JSON_VERSION,
                           "operations": [operation._to_dict() for operation in self.operations]})

    @staticmethod
    def from_json(text: str | bytes) -> "Edit":
        """Read what `to_json` wrote.

        Raises
        ------
        ValueError
            It is not that: says what is missing, unknown (with the nearest names) or out of range.

        Examples
        --------
        >>> from dsv4.edit import Steer
        >>> Edit.from_json(Steer(1, [0.5, 1.5]).to_json())
        Edit(Steer([1], <float32 [2]>))
        """
        return _from_json(text)

    def check(self, config: "Config") -> None:
        """ValueError, naming what was wanted, unless every operation fits a model of this config.

        Examples
        --------
        >>> import dsv4
        >>> from dsv4.edit import DisableExperts
        >>> with dsv4.load() as model:
        ...     DisableExperts(99, 0).check(model.config)
        Traceback (most recent call last):
        ...
        ValueError: DisableExperts: layers: got 99, wanted 0 to 5
        """
        for operation in self.operations:
            operation._check(config)
        for kind in {type(operation) for operation in self.operations}:
            most = kind._most(config)
            if most is None:
                continue
            found: dict[int, list[tuple[Ranges | None, Any]]] = {}
            for operation in self.operations:
                if isinstance(operation, kind):
                    for layer in operation.layers:
                        found.setdefault(layer, []).append(
                            (operation.positions, getattr(operation, kind._fields[0])))
            check_most(found, f"{kind.__name__}: {kind._fields[0]}", *most)

    def since(self, position: int) -> "Edit":
        """The same changes at positions from `position` on, and none before.

        Examples
        --------
        >>> from dsv4.edit import AblateHeads
        >>> AblateHeads(1, 0).since(5)
        Edit(AblateHeads([1], [0], positions=slice(5, None)))
        """
        later = (operation._since(position) for operation in self.operations)
        return Edit(*(operation for operation in later if operation is not None))

    def _native(self, model: "Model") -> _core.Edit | None:
        """As the engine has it; None where nothing is changed."""
        self.check(model.config)
        if not self:
            return None
        ops: list[Native] = []
        functions: list[Callable[..., Float32]] = []
        for operation in self.operations:
            for layer in operation.layers:
                ops.append(operation._compiled(layer, model.config))
                functions += operation._functions(layer)
        return _core.Edit(model._core, tuple(ops), tuple(functions))


class Operation(Edit):
    """One operation of an `Edit`, and an edit of its own; the classes below.

    Attributes
    ----------
    layers : tuple of int
        -1 is the embedding.
    positions : tuple of (first, end), or None
        Half-open and ascending; the last end may be None.  None: every position.
    """

    layers: tuple[int, ...]
    positions: Ranges | None
    _fields: ClassVar[tuple[str, ...]]  # those beside layers and positions, as the constructor's
    _defaults: ClassVar[dict[str, Any]] = {}
    _embed: ClassVar[bool] = False  # whether it can be applied to the embedding
    _by_name: "ClassVar[dict[str, type[Operation]]]" = {}  # those that JSON can hold

    def __init_subclass__(cls, *, json: bool = True) -> None:
        if json:
            Operation._by_name[cls.__name__] = cls

    def __init__(self, layers: Layers, positions: Positions, **values: Any) -> None:
        own = dict(values, layers=layers_of(layers, self._name, embed=self._embed),
                   positions=position_ranges(positions, self._name))
        for name, value in own.items():
            object.__setattr__(self, name, value)

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def operations(self) -> "tuple[Operation, ...]":
        return (self,)

    def _own_key(self) -> tuple[Any, ...]:
        values = (getattr(self, name) for name in self._fields)
        return (self._name, self.layers, self.positions, *(
            (v.shape, v.tobytes()) if isinstance(v, np.ndarray) else v for v in values))

    def __repr__(self) -> str:
        values = ["'embed'" if self.layers == (-1,) else shown(list(self.layers))]
        for name in (*self._fields, "positions"):
            value = getattr(self, name)
            text = shown_ranges(value) if name in RANGES and value else shown(value)
            if name not in self._defaults and name != "positions":
                values.append(text)
            elif value != self._defaults.get(name):
                values.append(f"{name}={text}")
        return f"{self._name}({', '.join(values)})"

    def _to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self._fields}
        return dict(
            operation=self._name, layers=list(self.layers),
            **{name: array_to_json(v) if isinstance(v, np.ndarray) else v
               for name, v in values.items()},
            positions=self.positions)

    def _check(self, config: "Config") -> None:
        low = -1 if -1 in self.layers else 0
        for layer in self.layers:
            if not low <= layer < config.num_hidden_layers:
                raise ValueError(f"{self._name}: layers: got {layer}, wanted 0 to "
                                 f"{config.num_hidden_layers - 1}")
        self._check_values(config)

    def _check_values(self, config: "Config") -> None:
        raise NotImplementedError

    def _below(self, name: str, values: Iterable[int], end: int) -> None:
        for value in values:
            if value >= end:
                raise ValueError(f"{self._name}: {name}: got {value}, wanted 0 to {end - 1}")

    @classmethod
    def _most(cls, config: "Config") -> tuple[int, str] | None:
        """How many ids of the first field operations of this kind may have together, and why."""
        return None

    def _functions(self, layer: int) -> list[Callable[[Float32, Int32], Float32]]:
        """What the engine calls."""
        return []

    def _rows(self) -> int:
        """Rows of its values, one for each position, or 1 for all."""
        return 1

    def _later_rows(self, dropped: int) -> dict[str, Any]:
        """What changes when the rows of that many positions go."""
        return {}

    def _since(self, position: int) -> "Operation | None":
        later, dropped = since(self.positions, position)
        if later == ():
            return None
        new = object.__new__(type(self))
        rows = self._later_rows(dropped) if self._rows() > 1 else {}
        new.__dict__.update(self.__dict__ | rows | {"positions": later})
        return new

    def _compiled(self, layer: int, config: "Config") -> Native:
        kind, site, ids, values = self._parts(config)
        return (kind, site, layer, self._rows(), pairs(self.positions),
                np.ascontiguousarray(ids, np.int32), np.ascontiguousarray(values, np.float32))

    def _parts(self, config: "Config") -> tuple[int, int, Any, Any]:
        """Kind, site, ids and values for the engine."""
        raise NotImplementedError


def checked(edit: object, name: str = "edit") -> Edit:
    """An edit as an argument: None is the empty one; TypeError unless it is one."""
    if edit is None:
        return Edit()
    if not isinstance(edit, Edit):
        raise TypeError(f"{name}: got {type(edit).__name__}, wanted an Edit or None")
    return edit


def _from_json(text: str | bytes) -> Edit:
    value = from_json(text)
    if not isinstance(value, Mapping) or value.get("version") != JSON_VERSION:
        raise ValueError(f"edit: got something else, wanted an object with version {JSON_VERSION} "
                         "and operations")
    operations = value.get("operations")
    if not isinstance(operations, list) or set(value) != {"version", "operations"}:
        raise ValueError(f"edit: got {sorted(value)}, wanted version and a list of operations")
    return Edit(*(_operation(one, f"operations[{i}]") for i, one in enumerate(operations)))


def _operation(value: object, name: str) -> Operation:
    if not isinstance(value, Mapping) or not isinstance(value.get("operation"), str):
        raise ValueError(f"{name}: got {value!r:.80}, wanted an object that names its operation")
    kind: Any = Operation._by_name.get(value["operation"])
    if kind is None:
        raise ValueError(f"{name}: operation: got {value['operation']!r}, wanted "
                         f"{nearest(value['operation'], Operation._by_name)}")
    known = ("layers", *kind._fields, "positions")
    fields = dict(_fields(value, known, f"{name}: {value['operation']}"))
    layers, positions = fields.pop("layers"), fields.pop("positions", None)
    if layers == [-1]:
        layers = "embed"
    try:
        if "entries" in fields:
            fields["entries"] = _as_ranges(fields["entries"])
        operation: Operation = kind(layers, **fields, positions=_as_ranges(positions))
        return operation
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _fields(
    value: Mapping[str, Any], known: Sequence[str], name: str
) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if key == "operation":
            continue
        if key not in known:
            raise ValueError(f"{name}: got {key!r}, wanted {nearest(key, known)}")
        yield key, array_from_json(item, f"{name}: {key}") if isinstance(item, Mapping) else item
    missing = [key for key in known if key not in value]
    if missing:
        raise ValueError(f"{name}: {', '.join(missing)}: missing")


def _as_ranges(value: object) -> Any:
    """Ranges as JSON has them, for constructors; other values are refused by those."""
    if isinstance(value, list) and value and all(isinstance(v, list) for v in value):
        return tuple(tuple(v) for v in value)
    if value is not None:
        raise ValueError(f"got {value!r:.80}, wanted [[first, end], ...] or null")
    return None
