# SPDX-License-Identifier: Apache-2.0
"""DeepSeek V4 language models from their official safetensors, every internal an array away.

>>> import dsv4
>>> with dsv4.load() as model:  # the small model inside the package
...     print(len(model.generate("ROMEO:", max_new_tokens=16).tokens))
16
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4 import edit as edit
    from dsv4 import plot as plot
    from dsv4.answer import Completion, Event, TokenLogprob
    from dsv4.attention import Attention, AttentionState
    from dsv4.batch_jobs import BatchReport, run_batch
    from dsv4.completion import parse_completion
    from dsv4.config import Config
    from dsv4.device_array import DeviceArray
    from dsv4.edit_base import Edit
    from dsv4.encoding import encode_messages
    from dsv4.errors import (
        BackendUnavailable,
        DeviceError,
        EncodingError,
        ForkedProcessError,
        FormatError,
        NonFiniteLogitsError,
    )
    from dsv4.evaluation import Evaluation, evaluate
    from dsv4.generate import Stream
    from dsv4.layers import Layer
    from dsv4.loading import kernel_info, load
    from dsv4.memory import Plan, plan
    from dsv4.model import Model
    from dsv4.moe import MoE
    from dsv4.sampling import Sampling
    from dsv4.scheduler import Handle, Scheduler
    from dsv4.session import Session
    from dsv4.tensors import Tensor
    from dsv4.tokenizer import Tokenizer
    from dsv4.trace import Trace

__version__ = "0.1.0"

# name -> module: imported when first used, so that `import dsv4` alone costs nothing
_WHERE = {
    "BatchReport": "batch_jobs",
    "run_batch": "batch_jobs",
    "parse_completion": "completion",
    "Config": "config",
    "Edit": "edit_base",
    "encode_messages": "encoding",
    "BackendUnavailable": "errors",
    "DeviceError": "errors",
    "EncodingError": "errors",
    "ForkedProcessError": "errors",
    "FormatError": "errors",
    "NonFiniteLogitsError": "errors",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "Completion": "answer",
    "Event": "answer",
    "Stream": "generate",
    "TokenLogprob": "answer",
    "Attention": "attention",
    "AttentionState": "attention",
    "MoE": "moe",
    "Layer": "layers",
    "Model": "model",
    "Session": "session",
    "kernel_info": "loading",
    "load": "loading",
    "Plan": "memory",
    "plan": "memory",
    "Sampling": "sampling",
    "Handle": "scheduler",
    "Scheduler": "scheduler",
    "DeviceArray": "device_array",
    "Tensor": "tensors",
    "Tokenizer": "tokenizer",
    "Trace": "trace",
}

__all__ = [
    "Attention",
    "AttentionState",
    "BackendUnavailable",
    "BatchReport",
    "Completion",
    "Config",
    "DeviceArray",
    "DeviceError",
    "Edit",
    "EncodingError",
    "Evaluation",
    "Event",
    "ForkedProcessError",
    "FormatError",
    "Handle",
    "Layer",
    "MoE",
    "Model",
    "NonFiniteLogitsError",
    "Plan",
    "Sampling",
    "Scheduler",
    "Session",
    "Stream",
    "Tensor",
    "TokenLogprob",
    "Tokenizer",
    "Trace",
    "encode_messages",
    "evaluate",
    "kernel_info",
    "load",
    "parse_completion",
    "plan",
    "run_batch",
]

_MODULES = ("edit", "plot")  # there after `import dsv4` alone, imported when first used


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"dsv4.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'dsv4' has no attribute {name!r}")
    value = getattr(import_module(f"dsv4.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
