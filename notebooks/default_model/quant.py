# SPDX-License-Identifier: Apache-2.0
"""The number formats of the checkpoint in torch, with straight-through gradients.

Values only: every function returns float32 that a code of the format stands for, bit for bit what
the engine decodes.  Tensors on the CPU, last dimension a multiple of the group.  Source: SPEC
3.4 (activations and KV rows), 3.6 (FP4 rows and Hadamard), 6.3 and 6.5 (weights).
"""
from __future__ import annotations

import torch
from torch import Tensor

_fuse = False


def enable_fusion() -> None:
    """Compile the element-wise pieces (needs a C++ compiler); worth it for training only."""
    global _fuse
    torch._dynamo.config.cache_size_limit = 64
    _fuse = True


def fused(fn):  # type: ignore[no-untyped-def]
    """fn, or its compiled form once `enable_fusion` was called."""
    compiled = torch.compile(fn, dynamic=False)

    def call(*args):  # type: ignore[no-untyped-def]
        return compiled(*args) if _fuse else fn(*args)

    return call


def bf16(x: Tensor) -> Tensor:
    """Nearest bfloat16 value (ties to even) as float32."""
    return x.to(torch.bfloat16).to(torch.float32)


def pow2_ceil(x: Tensor) -> Tensor:
    """Smallest power of two >= x for normal positive float32 x, by its exponent bits."""
    bits = x.view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def _grid(x: Tensor, lowest: float, steps: float) -> Tensor:
    """Round to `steps` values per binade, uniform below `lowest`; ties to even."""
    binade = (x.abs().clamp_min(lowest).view(torch.int32) & 0x7F800000).view(torch.float32)
    magic = binade * (1.5 * 2.0**23 / steps)
    return (x + magic) - magic


def e4m3_round(x: Tensor) -> Tensor:
    """Nearest e4m3 value of x in [-448, 448], ties to even; the smallest step is 2**-9."""
    return _grid(x, 2.0**-6, 8.0)


def e2m1_round(x: Tensor) -> Tensor:
    """Nearest e2m1 value (0, .5, 1, 1.5, 2, 3, 4, 6) of x in [-6, 6], ties to the even code."""
    return _grid(x, 1.0, 2.0)


def act_values(x: Tensor, group: int = 128) -> Tensor:
    """FP8 activations: e4m3 with one power-of-two scale per `group` values (SPEC 3.4, 6.4)."""
    g = x.reshape(*x.shape[:-1], -1, group)
    amax = g.abs().amax(-1, keepdim=True).clamp_min(1e-4)
    s = pow2_ceil(amax * torch.tensor(1.0 / 448.0, dtype=torch.float32))
    return (e4m3_round((g / s).clamp(-448.0, 448.0)) * s).reshape(x.shape)


def fp4_scale(x: Tensor) -> Tensor:
    """Power-of-two scale of each 32 values of the last dimension (SPEC 3.6, 6.5)."""
    amax = x.reshape(*x.shape[:-1], -1, 32).abs().amax(-1).clamp_min(6 * 2.0**-126)
    return pow2_ceil((amax * torch.tensor(1.0 / 6.0, dtype=torch.float32)).clamp_min(2.0**-126))


def fp4_values(x: Tensor) -> Tensor:
    """FP4 rows: e2m1 with one power-of-two scale per 32 values (index rows and expert weights)."""
    g, s = x.reshape(*x.shape[:-1], -1, 32), fp4_scale(x)[..., None]
    return (e2m1_round((g / s).clamp(-6.0, 6.0)) * s).reshape(x.shape)


def fp8_weight_scale(w: Tensor) -> Tensor:
    """Power-of-two scale of each 128x128 block of w [o, k], float32 [ceil(o/128), k/128]."""
    o, k = w.shape
    padded = torch.nn.functional.pad(w, (0, -k % 128, 0, -o % 128))
    blocks = padded.reshape(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    amax = blocks.abs().amax((1, 3)).clamp_min(1e-6)
    return pow2_ceil(amax * torch.tensor(1.0 / 448.0, dtype=torch.float32))


def fp8_weight_values(w: Tensor) -> Tensor:
    """FP8 weights: e4m3 with one power-of-two scale per 128x128 block."""
    o, k = w.shape
    s = fp8_weight_scale(w).repeat_interleave(128, 0)[:o].repeat_interleave(128, 1)[:, :k]
    return e4m3_round((w / s).clamp(-448.0, 448.0)) * s


def hadamard(n: int) -> Tensor:
    """Sylvester matrix of order n times n**-0.5 (SPEC 3.6)."""
    h = torch.ones(1, 1)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h * n**-0.5


class _StraightThrough(torch.autograd.Function):
    """Rounds in the forward pass; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx, x, fn):  # type: ignore[no-untyped-def]
        return fn(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None


def through(fn, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """fn(x) with the gradient of the identity."""
    return _StraightThrough.apply(x, fn)
