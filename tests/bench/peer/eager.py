# SPDX-License-Identifier: Apache-2.0
"""transformers' DeepseekV4ForCausalLM beside dsv4, end to end, on small models.

Both get the same official checkpoint; transformers its weights dequantised and renamed, as
tests/oracle does.  Its faster setting counts: bfloat16 or float32.  Decode is one token at a time
behind a prompt with the cache of each engine, prefill a whole prompt; torch and dsv4 run with the
same number of threads in one process, one after the other.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

from dsv4 import nano
from peer import common, synthetic, whole
from peer.common import Array, Row

INSTALL = "pip install torch==2.13.0 && pip install '.[oracle]'"
DTYPES = "bfloat16", "float32"
# name: config keys that differ from nano-flash; "nano" is that checkpoint itself
MODELS: dict[str, dict[str, Any]] = {
    "nano": {},
    "small": dict(
        hidden_size=1024, num_attention_heads=16, q_lora_rank=512, o_groups=4, o_lora_rank=256,
        moe_intermediate_size=512, n_routed_experts=16, num_experts_per_tok=6, index_n_heads=16,
        index_topk=64, vocab_size=8192, num_hidden_layers=6,
        compress_ratios=[0, 4, 128, 4, 128, 4]),
}
ROWS = {  # row, without the peer, and the tokens of the prompt
    "small": {"e2e_decode_{}": 384, "e2e_prefill_{}": 2048, "e2e_prefill_384_{}": 384},
    "nano": {
        "e2e_decode_nano_{}": 384, "e2e_prefill_nano_{}": 2048, "e2e_prefill_nano_384_{}": 384},
}


def config_of(name: str) -> dict[str, Any]:
    """The model's config.json: no hash layers, no draft blocks."""
    config = dict(nano.CONFIG, num_hash_layers=0, num_nextn_predict_layers=0)
    config["compress_ratios"] = config["compress_ratios"][: config["num_hidden_layers"]]
    return {**config, **MODELS[name]}


class Theirs:
    """transformers with the same weights."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        from test_transformers import dequantised, renamed
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

        config = json.loads((folder / "config.json").read_text())
        for key in ("quantization_config", "expert_dtype", "torch_dtype"):
            config.pop(key, None)  # the weights are not quantised any more
        self.torch = torch
        self.model = DeepseekV4ForCausalLM._from_config(
            DeepseekV4Config(**config), attn_implementation="eager")
        kept = self.model._keep_in_fp32_modules_strict
        state = renamed(dequantised(folder), config)
        for key, tensor in state.items():
            f32 = dtype == "float32" or any(part in key for part in kept)
            state[key] = tensor.to(torch.float32 if f32 else getattr(torch, dtype))
        self.model.load_state_dict(state, assign=True)
        self.model.eval()
        self.cache: Any = None

    def step(self, ids: Array) -> Array:
        """Logits of the last token."""
        with self.torch.inference_mode():
            out = self.model(
                self.torch.from_numpy(np.asarray(ids)[None].astype(np.int64)),
                past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        logits: Array = out.logits[0, -1].float().numpy()
        return logits

    def prefill(self, ids: Array) -> Array:
        """Logits of the last token."""
        self.cache = None
        return self.step(ids)

    def decode(self, token: int) -> Array:
        """Logits of the token."""
        return self.step(np.array([token]))


def check_installed() -> None:
    """Missing unless a transformers that knows the model is installed."""
    for package in ("torch", "transformers", "safetensors", "pytest"):
        if importlib.util.find_spec(package) is None:
            raise common.Missing(f"{package} is not installed: {INSTALL}")
    if importlib.util.find_spec("transformers.models.deepseek_v4") is None:
        raise common.Missing(f"this transformers does not know deepseek_v4: {INSTALL}")


def measure(threads: int, rounds: int, only: str | None, folder: Path) -> list[Row]:
    """Decode and prefill of each model; the files are kept in `folder`."""
    check_installed()
    import torch

    torch.set_num_threads(threads)
    peer = f"transformers {common.version('transformers')}, torch {torch.__version__},"
    found = []
    for name, rows in ROWS.items():
        config = config_of(name)
        there = synthetic.write(folder / name, config)
        found += whole.compare(
            whole.Ours(there, threads), {dtype: Theirs(there, dtype) for dtype in DTYPES},
            config["vocab_size"], rounds, threads, only,
            {row.format("vs_transformers"): n for row, n in rows.items()}, peer,
            f"{config['num_hidden_layers']} layers of {config['hidden_size']}")
    return found
