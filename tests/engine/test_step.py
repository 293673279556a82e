# SPDX-License-Identifier: Apache-2.0
"""What a step promises when something goes wrong, and what odd weights and switches do."""

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import bf16
from harness import (
    COMPRESSED,
    TINY,
    WINDOW,
    changed,
    fed,
    layer_with,
    load,
    make_tiny,
    pieces,
    prompt,
    rows,
    same,
    state,
    step_with,
)

import dsv4
from dsv4 import kernel_calls as kc

KV_BLOCK, INDEX_BLOCK = 16, 64  # rows
NAN_ID = 13


def unchanged(sessions: list[dsv4.Session], before: list[list[Any]]) -> None:
    for session, old in zip(sessions, before, strict=True):
        for i, (a, b) in enumerate(zip(state(session), old, strict=True)):
            same(a, b, f"part {i}")


# ---- all or nothing ----

@pytest.fixture(scope="module")
def poisoned(tiny_folder, tmp_path_factory) -> Iterator[dsv4.Model]:
    """The tiny model, with NaN in the embedding of one id."""
    def put(data: Any) -> None:
        data.view(np.uint16).reshape(TINY["vocab_size"], -1)[NAN_ID, 5] = 0x7FC0

    folder = changed(tiny_folder, tmp_path_factory.mktemp("nan") / "m", "embed.weight", put)
    with load(folder, chunk=40) as model:
        yield model


def test_failing_steps_leave_no_trace(poisoned, tiny) -> None:
    """NaN in the last pass of a step, and every refusal, at many positions."""
    ids = [prompt(tiny, 290, seed=i) for i in range(3)]
    for each in ids:
        each[each == NAN_ID] = 1
    want = [fed(tiny, [each]) for each in ids]
    sessions = [poisoned.session() for _ in ids]
    foreign, shut = tiny.session(), poisoned.session()
    shut.close()
    bad_ids = np.append(prompt(tiny, 90, seed=5) % NAN_ID, NAN_ID)
    bad: list[tuple[type[Exception], list[Any]]] = [
        (dsv4.NonFiniteLogitsError, [(sessions[0], [1, 2]), (sessions[1], bad_ids)]),
        (dsv4.NonFiniteLogitsError, [(sessions[2], bad_ids), (sessions[0], [1] * 50)]),
        (ValueError, [(sessions[0], [1, 2]), (sessions[0], [3])]),
        (ValueError, [(sessions[0], [1, 2]), (foreign, [3])]),
        (ValueError, [(sessions[0], [1, 2]), (shut, [3])]),
        (ValueError, [(sessions[0], [1, 2]), (sessions[1], [])]),
        (ValueError, [(sessions[0], [1, 2]), (sessions[1], [0, poisoned.config.vocab_size])]),
        (ValueError, [(sessions[0], [1, 2]), (sessions[1], [-1])]),
        (ValueError, [(sessions[0], [1, 2]), (sessions[1], [1] * 5000)]),
        (ValueError, []),
    ]
    for cut in np.split(np.arange(290), [1, 3, 31, 33, 64, 127, 129, 250, 257]):
        before = [state(s) for s in sessions]
        for error, segments in bad:
            for logits in ("all", "none"):
                if error is dsv4.NonFiniteLogitsError and logits == "none":
                    continue  # nothing was computed from the NaN that anybody sees
                with pytest.raises(error):
                    poisoned.step(segments, logits)
                unchanged(sessions, before)
        out = poisoned.step([(s, each[cut]) for s, each in zip(sessions, ids, strict=True)], "all")
        for i, got in enumerate(out):
            same(got, want[i][cut], f"session {i}, tokens {cut[0]}...")


class Alarm(Exception):
    """Raised by the handler below."""


@contextmanager
def alarm_after(seconds: float) -> Iterator[None]:
    def raise_alarm(*_: object) -> None:
        raise Alarm

    old = signal.signal(signal.SIGALRM, raise_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_interrupted_steps_leave_no_trace(models, expected) -> None:
    model, ids = models("nano-flash"), expected("nano-flash")["prompt517/ids"]
    sessions = [model.session(), model.session()]
    firsts = [ids[:140], ids[:37]]
    model.step(list(zip(sessions, firsts, strict=True)), "none")
    before = [state(s) for s in sessions]
    long = np.resize(ids, 6000)
    interrupted = 0
    for i in range(8):
        try:
            with alarm_after(0.02 + 0.03 * i):
                model.step([(sessions[i % 2], long), (sessions[1 - i % 2], ids[:3])], "none")
        except Alarm:
            interrupted += 1
            unchanged(sessions, before)
    assert interrupted == 8
    for session, first in zip(sessions, firsts, strict=True):
        got = np.concatenate([session.append(p, "all") for p in pieces(ids[len(first):][:20], 7)])
        same(got, fed(model, [ids[: len(first) + 20]])[len(first):])


def test_state_grows_in_blocks(tiny) -> None:
    """Fixed state at once, compressed rows a block at a time; a refused step may not leave more."""
    c, ratios = tiny.config, tiny.config.compress_ratios[: tiny.config.num_hidden_layers]
    row = c.head_dim + c.qk_rope_head_dim + (c.head_dim - c.qk_rope_head_dim) // 64
    row = (row + 7) // 8 * 8
    index_row = c.index_head_dim // 2 + c.index_head_dim // 32
    with tiny.session() as session:
        fixed, grown = session._core.bytes
        assert grown == 0 and fixed == session.nbytes
        for n in (255, 1, 1, 254, 1, 1, 511, 1):
            session.append(prompt(tiny, n), logits="none")
            want = 0
            for ratio in ratios:
                rows = session.position // ratio if ratio else 0
                want += -(-rows // KV_BLOCK) * KV_BLOCK * row
                want += -(-rows // INDEX_BLOCK) * INDEX_BLOCK * index_row * (ratio == 4)
            assert session._core.bytes == (fixed, want), session.position
        with pytest.raises(ValueError):
            session.append([0] * 4096)
        assert session.nbytes == fixed + want


def test_the_last_position(tmp_path) -> None:
    """A session fills its context to the last token, and not one more."""
    with load(make_tiny(tmp_path, max_position_embeddings=70)) as model:
        ids = prompt(model, 70)
        want = fed(model, [ids])
        session = model.session()
        session.append(ids[:69], logits="none")
        for size in (2, 5, 1000):
            with pytest.raises(ValueError, match="context"):
                session.append([1] * size)
        same(session.append(ids[69:]), want[69:])
        with pytest.raises(ValueError, match="wanted at most 0"):
            session.append([1])
        assert session.position == 70


# ---- NaN in the weights ----

def put_bytes(at: int, *values: int) -> Any:
    def put(data: Any) -> None:
        data[at : at + len(values)] = values

    return put


NAN_WEIGHTS = [
    ("embed.weight", 0x7FC0, 0), ("embed.weight", 0xFF80, 0),
    ("layers.0.attn.wq_b.weight", 0x7F, 0), ("layers.1.attn.wkv.weight", 0xFF, 1),
    ("layers.2.attn.wo_a.weight", 0x7F, 2), ("layers.3.attn.wo_b.weight", 0xFF, 3),
    ("layers.0.attn.compressor.wkv.weight", 0x7FC0, 0),
    ("layers.1.attn.compressor.wgate.weight", 0x7F81, 1),
    ("layers.2.ffn.shared_experts.w1.weight", 0x7F, 2),
    ("layers.3.ffn.shared_experts.w2.weight", 0xFF, 3), ("layers.3.ffn.gate.weight", 0x7FC0, 3),
    ("layers.0.attn.indexer.weights_proj.weight", 0x7FC0, 0),
    ("layers.0.attn.indexer.wq_b.weight", 0x7F, 0),
    ("layers.0.attn.indexer.compressor.wkv.weight", 0x7FC0, 0),
    ("layers.0.attn.indexer.compressor.wgate.weight", 0xFFC0, 0),
    ("head.weight", 0x7FC0, None), ("head.weight", 0xFF80, None),
]


@pytest.mark.parametrize(("name", "code", "layer"), NAN_WEIGHTS)
def test_nan_weights_name_their_layer(tiny_folder, tmp_path, name, code, layer) -> None:
    """Every NaN code of every format, and infinity; found by the first step that reads it."""
    def put(data: Any) -> None:
        codes = data.view(np.uint16) if name.endswith(("embed.weight", "head.weight")) or (
            any(part in name for part in ("compressor", "gate", "weights_proj"))) else data
        codes[:: max(1, len(codes) // 50)] = code

    with load(changed(tiny_folder, tmp_path / "m", name, put)) as model:
        with model.session() as session, pytest.raises(dsv4.NonFiniteLogitsError) as caught:
            session.append(prompt(model, 140))
        assert caught.value.layer == layer
        assert ("the head" if layer is None else f"layer {layer}") in str(caught.value)
        assert session.model is model


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_in_one_expert_shows_when_it_is_used(tmp_path, tiny_folder, code: int) -> None:
    """FP8 experts: a step that routes no token to it is not disturbed."""
    folder = make_tiny(tmp_path, fp8_experts=True)
    with load(folder) as model:
        ids = prompt(model, 60)
        with model.session() as session:
            _, found = step_with(model, [(session, ids)], 2)
        want = fed(model, [ids])
    used = [set(row) for row in found["experts"]]
    expert = next(e for e in range(6) if any(e in u for u in used[5:]) and e not in used[0])
    first = next(i for i, u in enumerate(used) if expert in u)
    name = f"layers.2.ffn.experts.{expert}.w3.weight"
    with load(changed(folder, tmp_path / "m", name, put_bytes(100, code))) as model:
        session = model.session()
        same(session.append(ids[:first], "all"), want[:first])
        with pytest.raises(dsv4.NonFiniteLogitsError) as caught:
            session.append(ids[first : first + 1])
        assert caught.value.layer == 2 and session.position == first


BAD_AT_LOAD = [
    ("layers.0.attn.wq_a.scale", put_bytes(0, 255)),
    ("layers.3.ffn.experts.5.w2.scale", put_bytes(7, 255)),
    ("layers.2.ffn.shared_experts.w3.scale", put_bytes(0, 255)),
    ("layers.0.attn.indexer.wq_b.scale", put_bytes(0, 255)),
    ("norm.weight", put_bytes(2, 0xC0, 0x7F)), ("norm.weight", put_bytes(2, 0x80, 0xFF)),
    ("layers.1.attn_norm.weight", put_bytes(8, 0xC0, 0xFF)),
    ("layers.1.ffn_norm.weight", put_bytes(8, 0x81, 0x7F)),
    ("layers.2.attn.q_norm.weight", put_bytes(0, 0x80, 0x7F)),
    ("layers.3.attn.kv_norm.weight", put_bytes(0, 0xC0, 0x7F)),
    ("layers.0.attn.compressor.norm.weight", put_bytes(0, 0xC0, 0x7F)),
    ("layers.0.attn.indexer.compressor.norm.weight", put_bytes(0, 0xC0, 0x7F)),
    ("layers.0.attn.attn_sink", put_bytes(0, 0, 0, 0xC0, 0x7F)),
    ("layers.1.attn.compressor.ape", put_bytes(4, 0, 0, 0xC0, 0x7F)),
    ("layers.2.ffn.gate.bias", put_bytes(4, 0, 0, 0x80, 0x7F)),
    ("layers.0.hc_attn_base", put_bytes(0, 0, 0, 0xC0, 0x7F)),
    ("layers.3.hc_ffn_scale", put_bytes(0, 0, 0, 0x80, 0xFF)),
    ("hc_head_base", put_bytes(0, 0, 0, 0xC0, 0x7F)),
]


@pytest.mark.parametrize(("name", "put"), BAD_AT_LOAD)
def test_nan_in_scales_and_norms_is_found_at_load(tiny_folder, tmp_path, name, put) -> None:
    with pytest.raises(dsv4.FormatError, match=name.replace(".", r"\.")):
        load(changed(tiny_folder, tmp_path / "m", name, put))


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -0.0, -1.0])
def test_f32_scales_must_be_positive_numbers(nano, tmp_path, value: float) -> None:
    name = "layers.1.ffn.experts.3.w1.scale"

    def put(data: Any) -> None:
        data.view(np.float32)[1] = value

    with pytest.raises(dsv4.FormatError, match=name):
        load(changed(nano("nano-base"), tmp_path / "m", name, put))


# ---- extreme scales ----

@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
@pytest.mark.parametrize("few", [True, False])
def test_extreme_scales_against_float64(fmt: str, few: bool) -> None:
    """Every E8M0 scale from 2^-127 to 2^127 and outliers in the input, by the block rule."""
    draw = np.random.default_rng(8)
    n, k, block = 254, 256, 128 if fmt == "fp8" else 32
    if fmt == "fp8":
        data = draw.integers(0, 256, (n, k), np.uint8)
        data[(data & 0x7F) == 0x7F] = 0x7E
        values = np.array([c * 2.0**-9 if c < 8 else (8 + c % 8) * 2.0 ** (c // 8 - 10)
                           for c in range(128)])
        values = np.append(values, -values)[data]
        n_scale = -(-n // 128)
    else:
        data = draw.integers(0, 256, (n, k // 2), np.uint8)
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        codes = np.stack([data & 15, data >> 4], -1).reshape(n, k)
        values = np.append(table, -table)[codes]
        n_scale = n
    x = draw.standard_normal((3 if few else 12, k))
    x[:, ::37] *= 2.0**20
    x = kc.f32(x).view(np.uint32) >> 16  # cut to bf16
    x = x.astype(np.uint16)
    for shift in range(0, 254, 1 if fmt == "fp8" else 127):
        exponent = (np.arange(n_scale)[:, None] + shift + np.arange(k // block)) % 255
        scale = np.ascontiguousarray(exponent, np.uint8)
        weight = kc.Weight(
            kc.pointer(data), kc.pointer(scale), n, k, kc.W_FP8 if fmt == "fp8" else kc.W_FP4,
            kc.SCALE_E8M0, kc.SCALE_BLOCK)
        full = np.repeat(np.ldexp(1.0, exponent - 127), block, 1)
        full = np.repeat(full, 128, 0)[:n] if fmt == "fp8" else full
        terms = bf16(x).astype(np.float64)[:, None] * (values * full)
        want, size = terms.sum(-1), np.abs(terms).sum(-1)
        in_range = size < 1e38
        for v in kc.variants(f"linear_{'few' if few else 'many'}_{fmt}")[:: 1 if shift < 3 else 99]:
            got = kc.linear(v, x, weight)
            error = np.abs(got - want)[in_range]
            # f32 sums; results below the normal numbers may be a step of 2^-149 a term off
            assert (error <= 2e-6 * size[in_range] + k * 2.0**-149).all(), (v, shift)


@pytest.mark.parametrize("shift", [60, -60])
@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_extreme_scales_in_the_engine(tiny_folder, tmp_path, part: str, shift: int) -> None:
    """A site's last linear with scales 2^60 from the usual: its output moves by as much.

    The rule for such scales sums block by block, so a last bit may differ.
    """
    names = ["layers.2.attn.wo_b.scale"] if part == "attention" else [
        f"layers.2.ffn.{e}.w2.scale" for e in
        (*(f"experts.{i}" for i in range(6)), "shared_experts")]

    def put(data: Any) -> None:
        data[:] = data.astype(np.int32) + shift

    folder = tiny_folder
    for i, name in enumerate(names):
        folder = changed(folder, tmp_path / str(i), name, put)
    got = []
    for each in (tiny_folder, folder):
        with load(each) as model:
            c = model.config
            streams = np.random.default_rng(1).standard_normal((50, c.hc_mult, c.hidden_size))
            codes = (streams.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            got.append(bf16(layer_with(model, 2, codes, prompt(model, 50))[1][f"{part}_out"]))
    want = got[0] * np.float32(2.0**shift)
    size = np.abs(want).max(-1, keepdims=True)
    assert (want != 0).any() and (np.abs(got[1] - want) <= size * 2.0**-8).all()
    assert (got[1] == want).mean() > 0.95


# ---- the April switches ----

def fp8_rounded(x: Any) -> Any:
    """SPEC 3.4 in NumPy: groups of 64 of all but the last 64 values of each row."""
    out = x.copy()
    for at in range(0, x.shape[1] - 64, 64):
        g = x[:, at : at + 64].astype(np.float64)
        peak = np.maximum(np.abs(g).max(1, keepdims=True), 1e-4).astype(np.float32)
        scale = np.exp2(np.ceil(np.log2((peak * np.float32(1 / 448)).astype(np.float64))))
        q = g / scale
        step = np.exp2(np.maximum(np.frexp(np.abs(q))[1] - 1, -6) - 3)
        out[:, at : at + 64] = np.clip(np.rint(q / step) * step, -448, 448) * scale
    return out


@pytest.mark.parametrize("name", ["nano-flash", "nano-pro", "nano-odd"])
def test_april_kv(nano, models, expected, name: str) -> None:
    """Rows are kept as they are; rounded to FP8 they are those of the other mode."""
    ids = expected(name)["prompt130/ids"]
    now = models(name)
    with load(nano(name), april_kv=True) as april, april.session() as a, now.session() as b:
        logits = a.append(ids), b.append(ids)
        ratio = now.config.compress_ratios[0]
        entries = range(130 // ratio if ratio else 0)
        for kind, at in ((WINDOW, range(100, 130)), (COMPRESSED, entries)):
            if len(at):
                raw, rounded = bf16(rows(a, 0, kind, at)), bf16(rows(b, 0, kind, at))
                assert (raw != rounded).mean() > 0.3
                assert (fp8_rounded(raw) == rounded).all()
    assert (logits[0] != logits[1]).any()


def test_april_shared(tmp_path) -> None:
    """The shared expert alone loses its clamp: with silent routed experts that is the same as a
    config without a limit."""
    folder = make_tiny(tmp_path, swiglu_limit=0.5)
    for i in range(6):
        folder = changed(folder, tmp_path / str(i), f"layers.2.ffn.experts.{i}.w2.weight", silence)
    free = Path(shutil.copytree(folder, tmp_path / "free"))
    config = json.loads((free / "config.json").read_text())
    (free / "config.json").write_text(json.dumps(config | {"swiglu_limit": 1e30}))
    out = []
    for path, april in ((folder, False), (folder, True), (free, False), (free, True)):
        with load(path, april_shared=april) as model:
            out.append(ffn_of_layer_2(model))
    assert (out[0] != out[1]).mean() > 0.5
    same(out[1], out[2])
    same(out[2], out[3])


def test_april_shared_leaves_routed_experts_clamped(tmp_path) -> None:
    folder = make_tiny(tmp_path, swiglu_limit=0.5)
    folder = changed(folder, tmp_path / "m", "layers.2.ffn.shared_experts.w2.weight", silence)
    out = []
    for april in (False, True):
        with load(folder, april_shared=april) as model:
            out.append(ffn_of_layer_2(model))
    same(out[0], out[1])


def ffn_of_layer_2(model: dsv4.Model) -> Any:
    """Its output on inputs that reach the clamp."""
    c = model.config
    streams = np.full((20, c.hc_mult, c.hidden_size), 0x3F80, np.uint16)
    streams += np.random.default_rng(2).integers(0, 200, streams.shape, np.uint16)
    return layer_with(model, 2, streams, prompt(model, 20))[1]["ffn_out"]


def silence(data: Any) -> None:
    data[:] = 0
