# SPDX-License-Identifier: Apache-2.0
"""Tokens chosen on the device are the CPU's, with their log-probabilities; logits stay there."""

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steps import same

import dsv4
from dsv4 import _core
from dsv4 import nano as nano_module
from dsv4.checkpoint import Checkpoint

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9, "logprobs": 0},
    {"temperature": 1.3, "top_k": 7, "min_p": 0.02, "logprobs": 5},
    {"temperature": 1.0, "top_k": 300, "top_p": 0.5, "repetition_penalty": 1.4,
     "frequency_penalty": 0.3, "presence_penalty": -0.2, "logprobs": 512},
    {"temperature": 0.0, "logit_bias": ((9, 3.0), (4, 50.0), (9, 3.0), (4, -float("inf"))),
     "stop_ids": (9,), "min_new_tokens": 2, "logprobs": 1},
    {"temperature": 1.0, "force_tokens": (17, 300), "logprobs": 2},
]


@pytest.fixture
def host(host_plugin: Path) -> ctypes.CDLL:
    """What the device counts."""
    library = ctypes.CDLL(str(host_plugin))
    library.host_downloaded.restype = ctypes.c_uint64
    return library


def sampler(model: dsv4.Model, choice: int = 0, **given: Any) -> _core.Sampler:
    """With the prompt 1, 2, 2."""
    plain = {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "repetition_penalty": 1.0, "seed": 5, "logprobs": -1,
        "min_new_tokens": 0, "max_new_tokens": -1, "stop_ids": (), "logit_bias": (),
        "force_tokens": (), "choice": choice}
    made = _core.Sampler(model.config.vocab_size, plain | given)
    made.seen([1, 2, 2], True)
    return made


def answers(model: dsv4.Model, logits: int = 0, steps: int = 3) -> list[Any]:
    """What every step gives for one session with each setting, all in one step."""
    sessions = [model.session() for _ in SETTINGS]
    samplers = [sampler(model, i, **setting) for i, setting in enumerate(SETTINGS)]
    last, found = [[3]] * len(SETTINGS), []
    for _ in range(steps):
        results = model._core.step(
            [(s._core, np.array(ids, np.int32), logits if i % 2 else 0, own)
             for i, (s, ids, own) in enumerate(zip(sessions, last, samplers, strict=True))], None)
        found.append(results)
        last = [[sample[0]] for _, sample in results]
    return found


def test_every_setting(cpu: dsv4.Model, gpu: dsv4.Model, host: ctypes.CDLL) -> None:
    chosen = host.host_calls(b"sample")
    assert answers(cpu, steps=2) == answers(gpu, steps=2)
    assert host.host_calls(b"sample") == chosen + 2


def test_logits_and_tokens_of_one_step(cpu: dsv4.Model, gpu: dsv4.Model) -> None:
    """Half of the rows also bring their logits."""
    (one,), (other,) = answers(cpu, logits=1, steps=1), answers(gpu, logits=1, steps=1)
    for (a, token), (b, other_token) in zip(one, other, strict=True):
        assert token == other_token and (a is b is None or same(a, b))


def test_what_comes_back(cpu: dsv4.Model, gpu: dsv4.Model, host: ctypes.CDLL) -> None:
    """Tokens alone; with every token seen by three rows, the logits of the one without room."""
    def came(samplers: list[_core.Sampler | None]) -> tuple[int, list[Any]]:
        before = host.host_downloaded()
        found = gpu._core.step(
            [(gpu.session()._core, np.array([i], np.int32), 0, own)
             for i, own in enumerate(samplers)], None)
        return host.host_downloaded() - before, found

    def seen(model: dsv4.Model) -> list[_core.Sampler]:
        made = [sampler(model, i, repetition_penalty=1.2) for i in range(3)]
        for i, own in enumerate(made):
            own.seen(list(range(i, model.config.vocab_size)), i % 2 == 0)
        return made

    state, _ = came([None] * 3)
    tokens, _ = came([sampler(gpu, i) for i in range(3)])
    logits, found = came([*seen(gpu)])
    assert tokens - state == 4 * 64
    assert logits - tokens == 4 * gpu.config.vocab_size + 4  # with lists the head runs alone
    assert found == cpu._core.step(
        [(cpu.session()._core, np.array([i], np.int32), 0, own)
         for i, own in enumerate(seen(cpu))], None)


def test_more_alternatives_than_the_device_keeps(
    host_device: None, host: ctypes.CDLL, tmp_path: Path,
) -> None:
    """A vocabulary of 1,100, of which all are asked for: on the host."""
    folder = nano_module.make("nano-flash", 1, tmp_path, vocab_size=1100)
    found = []
    for device in ("cpu", "cuda"):
        with dsv4.load(folder, device=device, threads=1) as model:
            chosen = host.host_calls(b"sample")
            own = [sampler(model, logprobs=k) for k in (1024, 1025)]
            found.append(model._core.step(
                [(model.session()._core, np.array([3], np.int32), 0, one) for one in own], None))
            assert host.host_calls(b"sample") - chosen == (device == "cuda")
    assert found[0] == found[1]


def test_generations(cpu: dsv4.Model, gpu: dsv4.Model, host: ctypes.CDLL) -> None:
    """Whole answers, several at a time; a processor of logits sees them on the host."""
    options: dict[str, Any] = {
        "max_new_tokens": 4, "temperature": 0.9, "top_p": 0.95, "seed": 3, "n": 2, "logprobs": 3}
    one, other = cpu.generate([1, 5, 9], **options), gpu.generate([1, 5, 9], **options)
    for a, b in zip(one, other, strict=True):
        assert a.tokens == b.tokens and a.logprobs == b.logprobs
    before = host.host_calls(b"sample")
    options = {"max_new_tokens": 2, "seed": 3, "logits_processor": lambda row, ids: -row}
    assert cpu.generate([4], **options).tokens == gpu.generate([4], **options).tokens
    assert host.host_calls(b"sample") == before


def test_a_failing_choice(gpu: dsv4.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session is as it was."""
    session, own = gpu.session(), sampler(gpu)
    monkeypatch.setenv("HOST_FAIL", "sample:1:700")
    with pytest.raises(dsv4.DeviceError, match="sample: .*error 700"):
        gpu._core.step([(session._core, np.array([3], np.int32), 0, own)], None)
    assert session.position == 0


def test_logits_that_are_not_finite(
    host_device: None, nano: Callable[[str], Path], tmp_path: Path,
) -> None:
    """A NaN in one embedding: the step fails, its layer is found, the sampler took nothing."""
    folder = tmp_path / "m"
    shutil.copytree(nano("nano-flash"), folder)
    with Checkpoint.open(folder) as checkpoint:
        info = checkpoint.tensors["embed.weight"]
        path = checkpoint.shards[info.shard].path
    data = np.memmap(path, np.uint8, "r+", info.offset, info.nbytes)
    data.view(np.uint16).reshape(info.shape)[7, 5] = 0x7FC0
    data.flush()
    with dsv4.load(folder, device="cuda", threads=1) as model:
        session, own = model.session(), sampler(model, force_tokens=(4, 5))
        with pytest.raises(dsv4.NonFiniteLogitsError) as caught:
            model._core.step([(session._core, np.array([7], np.int32), 0, own)], None)
        assert caught.value.layer == 0 and session.position == 0
        ((_, sample),) = model._core.step([(session._core, np.array([3], np.int32), 0, own)], None)
        assert sample is not None and sample[0] == 4
