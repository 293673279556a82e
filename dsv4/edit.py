# SPDX-License-Identifier: Apache-2.0
"""Edits: what a session changes inside its own passes.

An edit is an immutable object that says what to change, in which layers and at which positions:
experts, routing, heads, sinks, compressed entries, the residual streams and the inputs and outputs
of the sublayers.  Edits are added to each other (``a + b``: both, in this order), compare equal, go
to JSON and back, and belong to a session: ``model.session(edit=...)``.  The other sessions of a
step do not notice.

A position is that of a token in its session, counted from 0; an operation changes the rows of the
tokens at its positions and nothing else, so it gives the same bits for a prompt in one piece, in
pieces or token by token, alone or in a batch.  What later tokens see of these rows (through the
keys and compressed entries made of them) follows from the change.

`layers` is one number, a sequence of them, or, for the operations on streams, "embed": the
embedding, before layer 0.  `positions` is None (all), an int, a range, a slice such as
``slice(20, None)``, or ascending ints.  Source: DESIGN 3; the engine's part is csrc/model/edit.h.

Examples
--------
>>> import numpy as np
>>> import dsv4
>>> with dsv4.load() as model:
...     vector = np.ones(model.config.hidden_size, np.float32)
...     edit = DisableExperts(2, [0, 1]) + Steer(3, vector, scale=0.5, positions=slice(4, None))
...     session = model.session(edit=edit)
...     plain = model.session()
...     (session.append("To be, or not to be") == plain.append("To be, or not to be")).all()
np.False_
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from dsv4.edit_base import Edit, Ids, Layers, Operation, Positions
from dsv4.edit_rows import Callback, Clamp, Patch, Steer
from dsv4.edit_values import (
    ALL,
    Ranges,
    check_kinds,
    entry_ranges,
    forced_rows,
    ids_of,
    numbers,
    pairs,
    position_ranges,
)

if TYPE_CHECKING:
    from dsv4.config import Config

__all__ = [
    "AblateHeads", "AblateSinks", "Callback", "Clamp", "DisableExperts", "Edit", "ForceEntries",
    "ForceExperts", "MaskEntries", "Operation", "Patch", "ReweightExperts", "Steer",
]

# enum dsv4_edit_kind
EXPERTS_OFF, EXPERTS_WEIGH, EXPERTS_FORCE, HEADS_OFF, SINKS_OFF, ENTRIES_OFF, ENTRIES_ON = range(
    4, 11)


# ---- experts ----

class DisableExperts(Operation):
    """Experts that are never chosen.

    The next best take their places, and the weights are what the router makes of those:
    renormalised over the experts that are chosen.  In a layer that routes by token id (a hash
    layer) the best by score take the places of those the table names.

    Parameters
    ----------
    layers : int or sequence of int
    experts : int or sequence of int
        At least num_experts_per_tok experts of a layer must be left at every position.
    positions : None, int, range, slice or ascending ints

    Examples
    --------
    >>> DisableExperts([2, 3], 5)
    DisableExperts([2, 3], [5])
    """

    experts: tuple[int, ...]
    _fields = ("experts",)

    def __init__(self, layers: Layers, experts: Ids, positions: Positions = None) -> None:
        super().__init__(layers, positions, experts=ids_of(experts, f"{self._name}: experts"))

    def _check_values(self, config: "Config") -> None:
        self._below("experts", self.experts, config.n_routed_experts)

    @classmethod
    def _most(cls, config: "Config") -> tuple[int, str]:
        all_of, chosen = config.n_routed_experts, config.num_experts_per_tok
        return all_of - chosen, f"so that {chosen} of {all_of} are left"

    def _parts(self, config: "Config") -> tuple[int, int, Any, Any]:
        return EXPERTS_OFF, 0, self.experts, ()


class ReweightExperts(Operation):
    """Weights of experts multiplied, where these are chosen.

    After the router has chosen and renormalised: the other weights stay as they are.  With the
    factor 0 an expert is chosen and adds nothing.

    Parameters
    ----------
    layers : int or sequence of int
    experts : int or sequence of int
    factors : float, or one for each expert
    positions : None, int, range, slice or ascending ints

    Examples
    --------
    >>> ReweightExperts(2, [5, 6], 0.5)
    ReweightExperts([2], [5, 6], [0.5, 0.5])
    """

    experts: tuple[int, ...]
    factors: tuple[float, ...]
    _fields = ("experts", "factors")

    def __init__(
        self, layers: Layers, experts: Ids, factors: float | Sequence[float],
        positions: Positions = None,
    ) -> None:
        chosen = ids_of(experts, f"{self._name}: experts")
        super().__init__(layers, positions, experts=chosen, factors=numbers(
            factors, len(chosen), f"{self._name}: factors", "expert"))

    def _check_values(self, config: "Config") -> None:
        self._below("experts", self.experts, config.n_routed_experts)

    def _parts(self, config: "Config") -> tuple[int, int, Any, Any]:
        return EXPERTS_WEIGH, 0, self.experts, self.factors


class ForceExperts(Operation):
    """Experts that are chosen whatever the router says.

    Their weights come from the router's scores of these experts, renormalised as always.  They are
    chosen also where `DisableExperts` names them; of several that force at one position, the last
    one counts.

    Parameters
    ----------
    layers : int or sequence of int
    experts : int [num_experts_per_tok], or [n, num_experts_per_tok] with n positions
        Different ones; a row of a traced router (``t.router[i].experts``) will do.
    positions : None, int, range, slice or ascending ints

    Examples
    --------
    >>> ForceExperts(2, [[0, 1, 2], [3, 4, 5]], positions=[7, 9])
    ForceExperts([2], [[0, 1, 2], [3, 4, 5]], positions=[7, 9])
    """

    experts: tuple[tuple[int, ...], ...]
    _fields = ("experts",)

    def __init__(
        self, layers: Layers, experts: Any, positions: Positions = None,
    ) -> None:
        rows = forced_rows(experts, position_ranges(positions, self._name))
        super().__init__(layers, positions, experts=rows)

    def _check_values(self, config: "Config") -> None:
        for row in self.experts:
            self._below("experts", row, config.n_routed_experts)
            if len(row) != config.num_experts_per_tok:
                raise ValueError(f"ForceExperts: experts: got {len(row)}, wanted "
                                 f"{config.num_experts_per_tok}, as many as a token has")

    def _rows(self) -> int:
        return len(self.experts)

    def _later_rows(self, dropped: int) -> dict[str, Any]:
        return {"experts": self.experts[dropped:]}

    def _parts(self, config: "Config") -> tuple[int, int, Any, Any]:
        return EXPERTS_FORCE, 0, self.experts, ()


# ---- attention ----

class AblateHeads(Operation):
    """Heads whose output is 0, before the output projection.

    Parameters
    ----------
    layers : int or sequence of int
    heads : int or sequence of int
    positions : None, int, range, slice or ascending ints

    Examples
    --------
    >>> AblateHeads(1, [0, 3], positions=12)
    AblateHeads([1], [0, 3], positions=[12])
    """

    heads: tuple[int, ...]
    _fields = ("heads",)

    def __init__(self, layers: Layers, heads: Ids, positions: Positions = None) -> None:
        super().__init__(layers, positions, heads=ids_of(heads, f"{self._name}: heads"))

    def _check_values(self, config: "Config") -> None:
        self._below("heads", self.heads, config.num_attention_heads)

    def _parts(self, config: "Config") -> tuple[int, int, Any, Any]:
        return HEADS_OFF, 0, self.heads, ()


class AblateSinks(Operation):
    """Heads without a sink: their attention over keys adds up to 1.  The sink's logit is -infinity.

    Parameters
    ----------
    layers : int or sequence of int
    heads : int or sequence of int, optional
        All by default.
    positions : None, int, range, slice or ascending ints

    Examples
    --------
    >>> AblateSinks(range(3))
    AblateSinks([0, 1, 2])
    """

    heads: tuple[int, ...] | None
    _fields = ("heads",)
    _defaults: ClassVar[dict[str, Any]] = {"heads": None}

    def __init__(
        self, layers: Layers, heads: Ids | None = None, positions: Positions = None
    ) -> None:
        chosen = None if heads is None else ids_of(heads, f"{self._name}: heads")
        super().__init__(layers, positions, heads=chosen)

    def _check_values(self, config: "Config") -> None:
        self._below("heads", self.heads or (), config.num_attention_heads)

    def _parts(self, config: "Config") -> tuple[int, int, Any, Any]:
        heads = range(config.num_attention_heads) if self.heads is None else self.heads
        return SINKS_OFF, 0, heads, ()


class MaskEntries(Operation):
    """Compressed entries that tokens at these positions do not attend to.

    In CSA layers they cannot be selected, so the next best are; in HCA layers they are left out.
    The window of recent tokens stays.  A masked entry is masked also where `ForceEntries` names it.

    Parameters
    ----------
    layers : int or sequence of int
        CSA or HCA layers.
    entries : int, range, slice or ascending ints, optional
        Entry e covers tokens [e ratio, (e + 1) ratio).  All by default.
    positions : None, int, range, slice or ascending ints

    Examples
    --------
    >>> MaskEntries(1, range(4), positions=slice(40, None))
    MaskEntries([1], entries=range(0, 4), positions=slice(40, None))
    """

    entries: Ranges | None
    _fields = ("entries",)
    _defaults: ClassVar[dict[str, Any]] = {"entries": None}

    def __init__(
        self, layers: Layers, entries: Positions = None, positions: Positions = None
    ) -> None:
        super().__init__(layers, positions, entries=entry_ranges(entries, self._name))

    def _check_values(self, config: "Config") -> None:
        check_kinds(config, self.layers, self._name, ("CSA", "HCA"))

    def _parts(self, config: "Config") -> tuple[int, int, Any, Any]:
        return ENTRIES_OFF, 0, pairs(ALL if self.entries is None else self.entries), ()


class ForceEntries(Operation):
    """Compressed entries that tokens at these positions always select, once they exist.

    The best of the others fill the places that are left.  Where a token selects all entries there
    are, nothing changes.

    Parameters
    ----------
    layers : int or sequence of int
        CSA layers: there is no choice in the others.
    entries : int, range or ascending ints
        At most index_topk at every position.
    positions : None, int, range, slice or ascending ints

    Examples
    --------
    >>> ForceEntries(1, [0, 7])
    ForceEntries([1], [0, 7])
    """

    entries: Ranges
    _fields = ("entries",)

    def __init__(self, layers: Layers, entries: Positions, positions: Positions = None) -> None:
        ranges = entry_ranges(entries, self._name)
        if ranges is None or ranges[-1][1] is None:
            raise ValueError("ForceEntries: entries: got no end, wanted a range or ints")
        super().__init__(layers, positions, entries=ranges)

    def _check_values(self, config: "Config") -> None:
        check_kinds(config, self.layers, self._name, ("CSA",))

    @classmethod
    def _most(cls, config: "Config") -> tuple[int, str]:
        return config.index_topk, "as many as a token selects"

    def _parts(self, config: "Config") -> tuple[int, int, Any, Any]:
        return ENTRIES_ON, 0, pairs(self.entries), ()
