# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with the published layer dimensions and random weights, on disk: for time, not
text.  In memory they are `dsv4.bench.synthetic`, which makes the bytes."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from dsv4.bench import synthetic


def make(
    folder: Path, ratios: Sequence[int], *, model: str = "flash", experts: int = 8,
    vocab: int = 4096, hash_layers: int = 0,
) -> Path:
    """Write one checkpoint; about 0.13 GB and 13 MB an expert for each layer of V4-Flash."""
    config = dict(
        synthetic.published(model), num_hidden_layers=len(ratios), compress_ratios=list(ratios),
        n_routed_experts=experts, vocab_size=vocab, num_hash_layers=hash_layers,
        num_nextn_predict_layers=0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with synthetic.build(config) as checkpoint:
        table = {
            name: checkpoint.shards[info.shard].name for name, info in checkpoint.tensors.items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
        for shard in checkpoint.shards:
            with open(shard.fd, "rb", closefd=False) as source:
                source.seek(0)
                with (folder / shard.name).open("wb") as target:
                    shutil.copyfileobj(source, target, 16 << 20)
    return folder
