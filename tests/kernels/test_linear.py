# SPDX-License-Identifier: Apache-2.0
"""Linear layers, every variant: contract.npz bit for bit, ops.npz within one ulp.

The bits of contract.npz (and of `want` below) come from tests/vectors/contract.py, which is the
contract in NumPy; the official values of ops.npz are sums in another order, so a bf16 result may be
the neighbour (tests/vectors/README.md).
"""

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "vectors"))

import contract  # noqa: E402
import door  # noqa: E402
from stored import tensor  # noqa: E402

VECTORS = Path(__file__).parents[1] / "vectors"
FORMATS = {"fp8": door.W_FP8, "fp4": door.W_FP4, "bf16": door.W_BF16, "f32": door.W_F32}
SCALES = {np.uint8: door.SCALE_E8M0, np.float32: door.SCALE_F32, np.uint16: door.SCALE_BF16}


@pytest.fixture(scope="module")
def ops() -> Any:
    return np.load(VECTORS / "ops.npz")


@pytest.fixture(scope="module")
def bits() -> Any:
    return np.load(VECTORS / "contract.npz")


def linear_variants(fmt: str) -> list[Any]:
    return door.each_variant(f"linear_few_{fmt}", f"linear_many_{fmt}")


def make_weight(
    fmt: str, data: np.ndarray, scale: np.ndarray | None = None, rule: int = door.SCALE_NONE
) -> door.Weight:
    """A weight over NumPy memory; keeps the arrays alive."""
    data = np.ascontiguousarray(data)
    scale = None if scale is None else np.ascontiguousarray(scale)
    kind = 0 if scale is None else SCALES[scale.dtype.type]
    cols = data.shape[1] * (2 if fmt == "fp4" else 1)
    weight = door.Weight(
        door.pointer(data), door.pointer(scale), len(data), cols, FORMATS[fmt], kind, rule
    )
    weight.keep = (data, scale)
    return weight


def codes_of(values: np.ndarray) -> np.ndarray:
    """e4m3 values -> codes."""
    table = {v: c for c, v in enumerate(contract.e4m3_values().tolist()) if c not in (0x7F, 0xFF)}
    table[0.0] = 0
    return np.array([table[v] for v in values.ravel().tolist()], np.uint8).reshape(values.shape)


def within_one_ulp(got: np.ndarray, want: np.ndarray) -> bool:
    def order(u: np.ndarray) -> np.ndarray:
        i = u.astype(np.int32)
        return np.where(i & 0x8000, 0x8000 - i, i)

    return bool((np.abs(order(got) - order(want)) <= 1).all())


@pytest.mark.parametrize("kernel", linear_variants("fp8"))
def test_fp8(kernel: door.Variant, ops: Any, bits: Any) -> None:
    weight = make_weight("fp8", ops["fp8_linear/w"], ops["fp8_linear/w_scale"], door.SCALE_FOLD)
    x = contract.act_quant(door.bf16_values(ops["fp8_linear/x"]))
    quantised = door.bf16_bits(x)
    assert np.array_equal(door.linear(kernel, quantised, weight), bits["fp8_linear/f32_official"])
    official = door.linear(kernel, quantised, weight, out_f32=False)
    assert np.array_equal(official, bits["fp8_linear/y_official"])
    weights = door.linear(kernel, ops["fp8_linear/x"], weight, out_f32=False)
    assert np.array_equal(weights, bits["fp8_linear/y_weights"])
    assert within_one_ulp(official, ops["fp8_linear/y_official"])
    assert within_one_ulp(weights, ops["fp8_linear/y_weights"])


@pytest.mark.parametrize("kernel", linear_variants("fp8"))
def test_fp8_block_scales(kernel: door.Variant, ops: Any, bits: Any) -> None:
    codes, scale = codes_of(bits["f32scale/codes"]), bits["f32scale/scale"]
    want = bits["f32scale/f32"]
    for r in range(len(codes)):  # one row of scales holds for 128 rows of codes: take them singly
        weight = make_weight("fp8", codes[r : r + 1], scale[r : r + 1], door.SCALE_BLOCK)
        assert np.array_equal(door.linear(kernel, bits["bf16/x"], weight), want[:, r : r + 1])


@pytest.mark.parametrize("kernel", linear_variants("fp8"))
def test_fp8_f32_scales_official(kernel: door.Variant, ops: Any) -> None:
    name = "fp8_linear_f32scale"
    weight = make_weight("fp8", ops["fp8_linear/w"], ops[f"{name}/w_scale"], door.SCALE_BLOCK)
    x = ops[f"{name}/x"]
    quantised = door.bf16_bits(contract.act_quant(door.bf16_values(x)))
    official = door.linear(kernel, quantised, weight, out_f32=False)
    weights = door.linear(kernel, x, weight, out_f32=False)
    assert within_one_ulp(official, ops[f"{name}/y_official"])
    assert within_one_ulp(weights, ops[f"{name}/y_weights"])


@pytest.mark.parametrize("kernel", linear_variants("fp8"))
def test_fp8_rounded_weights(kernel: door.Variant, ops: Any) -> None:
    """wo_a of a checkpoint with f32 scales: the weight is bf16(f32(code * scale))."""
    codes, scale = ops["fp8_linear/w"], ops["fp8_linear_f32scale/w_scale"]
    full = np.repeat(np.repeat(scale, 128, 0)[: len(codes)], 128, 1)[:, : codes.shape[1]]
    rounded = contract.bf16_round(contract.e4m3_values()[codes] * full)
    want = contract.dot(door.bf16_values(ops["fp8_linear/x"]), rounded)
    weight = make_weight("fp8", codes, scale, door.SCALE_ROUND)
    assert np.array_equal(door.linear(kernel, ops["fp8_linear/x"], weight), want)


@pytest.mark.parametrize("kernel", linear_variants("fp4"))
def test_fp4(kernel: door.Variant, ops: Any, bits: Any) -> None:
    weight = make_weight("fp4", ops["fp4_linear/w"], ops["fp4_linear/w_scale"], door.SCALE_FOLD)
    x = door.bf16_bits(contract.act_quant(door.bf16_values(ops["fp4_linear/x"])))
    assert np.array_equal(door.linear(kernel, x, weight), bits["fp4_linear/f32_official"])
    official = door.linear(kernel, x, weight, out_f32=False)
    assert np.array_equal(official, bits["fp4_linear/y_official"])
    assert within_one_ulp(official, ops["fp4_linear/y_official"])
    weights = door.linear(kernel, ops["fp4_linear/x"], weight, out_f32=False)
    assert within_one_ulp(weights, ops["fp4_linear/y_weights"])


@pytest.mark.parametrize("kernel", linear_variants("bf16"))
def test_bf16(kernel: door.Variant, bits: Any) -> None:
    weight = make_weight("bf16", bits["bf16/w"])
    assert np.array_equal(door.linear(kernel, bits["bf16/x"], weight), bits["bf16/f32"])


@pytest.mark.parametrize("kernel", linear_variants("f32"))
def test_f32(kernel: door.Variant, bits: Any) -> None:
    weight = make_weight("f32", bits["f32w/w"])
    assert np.array_equal(door.linear(kernel, bits["bf16/x"], weight), bits["f32w/f32"])


@pytest.mark.parametrize("kernel", linear_variants("bf16"))
def test_gather_and_row_range(kernel: door.Variant, bits: Any) -> None:
    weight = make_weight("bf16", bits["bf16/w"])
    tok = np.array([6, 0, 6, 3], np.int32)
    got = door.linear(kernel, bits["bf16/x"], weight, tok=tok, rows=(1, 4))
    want = np.zeros_like(got)
    want[:, 1:4] = bits["bf16/f32"][tok, 1:4]
    assert np.array_equal(got, want)


@pytest.mark.parametrize("kernel", linear_variants("bf16"))
def test_head(kernel: door.Variant, ops: Any, nano: Any) -> None:
    """The logits of nano-flash.  256 columns are 16 additions a lane and 4 of the tree, so a sum is
    within 20 * 2^-24 of the sum of its terms' magnitudes; a logit near 0 has no smaller bound."""
    weight = make_weight("bf16", door.bf16_bits(tensor(nano("nano-flash"), "head.weight")))
    got = door.linear(kernel, ops["head/x"], weight)
    x, w = door.bf16_values(ops["head/x"]), door.bf16_values(weight.keep[0])
    assert np.array_equal(got, contract.dot(x, w))
    bound = 20 * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(w).T.astype(np.float64))
    assert (np.abs(got - ops["head/logits"]) <= bound).all()


def test_structures() -> None:
    """The mirrors have the size C gives them on LP64."""
    assert ctypes.sizeof(door.Weight) == 32
    assert ctypes.sizeof(door.LinearArgs) == 72
