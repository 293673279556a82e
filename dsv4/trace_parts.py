# SPDX-License-Identifier: Apache-2.0
"""What can be asked of a trace: parts and their layers, and where they go."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from dsv4 import _core

if TYPE_CHECKING:
    from dsv4.model import Model

Select: TypeAlias = bool | Sequence[int] | None

# what can be asked for -> values of the engine (enum dsv4_value) that it copies
PARTS: dict[str, tuple[str, ...]] = {
    "router": ("experts", "expert_weights", "router_scores"),
    "indexer": ("index_selected", "index_scores"),
    "streams": ("streams",),
    "streams_in": ("streams_in",),
    "streams_mid": ("streams_mid",),
    "kv": ("kv", "kv_compressed", "kv_index"),
    "attention": ("attention_weights", "index_selected"),
    "heads": ("heads",),
    "hyper": tuple(f"{site}_{part}" for site in ("attention", "ffn")
                   for part in ("pre", "post", "comb")),
    "sublayers": ("attention_in", "attention_out", "ffn_in", "ffn_out"),
}
# a hook of TransformerLens -> the expression of a trace
HOOKS: dict[str, str] = {
    "hook_embed": "streams_in[0]",
    "blocks.i.hook_resid_pre": "streams_in[i]",
    "blocks.i.ln1.hook_normalized": "sublayers[i].attention_in",
    "blocks.i.attn.hook_k": "kv[i].window",
    "blocks.i.attn.hook_v": "kv[i].window",
    "blocks.i.attn.hook_pattern": "attention[i].window",
    "blocks.i.attn.hook_z": "heads[i]",
    "blocks.i.hook_attn_out": "sublayers[i].attention_out",
    "blocks.i.hook_resid_mid": "streams_mid[i]",
    "blocks.i.ln2.hook_normalized": "sublayers[i].ffn_in",
    "blocks.i.mlp.hook_expert_indices": "router[i].experts",
    "blocks.i.mlp.hook_expert_weights": "router[i].weights",
    "blocks.i.hook_mlp_out": "sublayers[i].ffn_out",
    "blocks.i.hook_resid_post": "streams[i]",
}


def nearest(name: str) -> str:
    """What somebody may have meant, for a message."""
    known = [*PARTS, "logits", "nll", "out", "device"]
    near = difflib.get_close_matches(name, known, 3, 0.6)
    return f"; nearest are {', '.join(near)}" if near else f"; there are {', '.join(known)}"


def chosen_layers(model: "Model", part: str, which: Select) -> list[int]:
    """The layers of a selection, ascending; all that have the part for True."""
    c = model.config
    values = [_core.VALUES.index(name) for name in PARTS[part]]
    first = values[0]
    having = [i for i in range(c.num_hidden_layers) if model._core.value(i, first) is not None]
    if which is True:
        return having
    if isinstance(which, int | str | bytes) or not isinstance(which, Sequence | np.ndarray | range):
        raise TypeError(f"{part}: got {which!r}, wanted True, False or a list of layers")
    for layer in which:
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer):
            raise TypeError(f"{part}: got {layer!r}, wanted numbers of layers")
        if not 0 <= layer < c.num_hidden_layers:
            raise ValueError(f"{part}: got layer {layer}, wanted 0 to {c.num_hidden_layers - 1}")
        if layer not in having:
            near = sorted(sorted(having, key=lambda i: abs(i - layer))[:3])
            raise ValueError(
                f"{part}: layer {layer} is {c.layer_kind(int(layer))} and has none; nearest that "
                f"have are {near}")
    return sorted({int(layer) for layer in which})


def on_device(model: "Model", device: object, attention: Select, out: object) -> bool:
    """Whether a trace stays on the GPU; ValueError where it cannot."""
    if not isinstance(device, bool):
        raise TypeError(f"device: got {device!r}, wanted True or False")
    if not device:
        return False
    if _core.memory_room(model._core, 0) is None:
        raise ValueError("device: got True, and this model runs on the CPU; wanted one loaded with "
                         "device='cuda'")
    if attention is not None and attention is not False:
        raise ValueError("attention: its weights are computed on the CPU; wanted none of them with "
                         "device=True")
    if out is not None:
        raise ValueError("out: got a folder with device=True, which keeps it on the GPU; wanted "
                         "one of them")
    return True


def new_folder(out: str | os.PathLike[str]) -> Path:
    """An empty folder for the files of a trace; ValueError where there is something."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out: {folder} is there and not empty; wanted an empty or a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
