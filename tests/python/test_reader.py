# SPDX-License-Identifier: Apache-2.0
"""Opening checkpoints: the tensor table, shard cuts, transformers names, what is reported."""

import os

import numpy as np
import pytest

from dsv4 import nano as nano_module
from dsv4.checkpoint import Checkpoint

NAMES = sorted(nano_module.CHECKPOINTS)
NUMPY = {"BF16": np.uint16, "F32": np.float32, "I64": np.int64}


def stored(checkpoint, name):
    """The array of a tensor as the table describes it."""
    info = checkpoint.tensors[name]
    raw = os.pread(checkpoint.shards[info.shard].fd, info.nbytes, info.offset)
    return np.frombuffer(raw, NUMPY.get(info.dtype, np.uint8)).reshape(info.shape)


def drawn(name):
    """All arrays of one of the five checkpoints, straight from the generator."""
    seed, changes = nano_module.CHECKPOINTS[name]
    options = {k: changes[k] for k in ("mtp", "fp8_experts", "f32_scales") if k in changes}
    config = {**nano_module.CONFIG, **{k: v for k, v in changes.items() if k not in options}}
    options = {"mtp": 1, "fp8_experts": False, "f32_scales": False, **options}
    tensors = {}
    for shard in nano_module.Maker(seed, config, **options).shards():
        tensors.update(shard)
    return config, tensors


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_where_the_table_says(nano, name):
    _, tensors = drawn(name)
    with Checkpoint.open(nano(name)) as checkpoint:
        assert checkpoint.warnings == ()
        assert checkpoint.tensors.keys() == tensors.keys()
        for key, (dtype, array) in tensors.items():
            assert checkpoint.tensors[key].dtype == dtype
            assert stored(checkpoint, key).tobytes() == np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize(
    ("name", "kind", "draft", "experts"),
    [
        ("nano-flash", "4 layers (1 SWA, 2 CSA, 1 HCA)", "mtp", "fp4"),
        ("nano-pro", "2 layers (1 CSA, 1 HCA)", "mtp", "fp4"),
        ("nano-base", "3 layers (1 SWA, 1 CSA, 1 HCA)", None, "fp8"),
        ("nano-0731", "3 DSpark stages", "dspark", "fp4"),
        ("nano-odd", "1 MTP block", "mtp", "fp4"),
    ],
)
def test_what_it_is(nano, name, kind, draft, experts):
    with Checkpoint.open(nano(name)) as checkpoint:
        assert kind in checkpoint.kind
        assert (checkpoint.draft, checkpoint.expert_format) == (draft, experts)
