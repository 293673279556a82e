# SPDX-License-Identifier: Apache-2.0
"""exact=False: prompts on tensor cores, which the host executes with two orders of a sum.

Within the noise floor of the stored values; the same bits for any cut of a prompt and in any
company; single tokens with the CPU's bits; states of the two kinds are not mixed.
"""

import ctypes
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from steps import same, same_state

import dsv4
from dsv4.expected import Expected

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
VECTORS = Path(__file__).resolve().parents[1] / "vectors" / "model"
IDS = np.random.default_rng(9).integers(0, 256, 80)


@pytest.fixture
def host(host_plugin: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(host_plugin))


@pytest.fixture(params=[0, 24], ids=["in order", "cut"])
def order(host: ctypes.CDLL, request: pytest.FixtureRequest) -> Iterator[None]:
    """How an mma adds: tests/cuda/host.h."""
    host.host_mma_bits(request.param)
    yield
    host.host_mma_bits(0)


@pytest.fixture
def quick(
    host_device: None, host: ctypes.CDLL, nano: Callable[[str], Path]
) -> Iterator[dsv4.Model]:
    """With sums so bad that one token computed in the other way shows."""
    host.host_mma_bits(12)
    with dsv4.load(nano("nano-flash"), device="cuda", threads=1, exact=False) as model:
        yield model
    host.host_mma_bits(0)


def within_the_noise_floor(
    host: ctypes.CDLL, folder: Path, name: str, what: str, numerics: str = "official",
) -> None:
    e = Expected(VECTORS / name)
    with dsv4.load(folder, device="cuda", threads=1, numerics=numerics, exact=False) as model:
        before = [host.host_calls(name) for name in (b"linear_mma", b"attention_mma")]
        got = model.session().append(e[f"{what}/ids"], logits="all")
        layers = model.config.num_hidden_layers
        # mixes twice, what reads the input, queries, two output projections, router
        assert host.host_calls(b"linear_mma") == before[0] + 7 * layers
        assert host.host_calls(b"attention_mma") == before[1] + layers
    ok, report, limits = e.check_logits(what, got, numerics)
    assert ok, (report, limits)


@pytest.mark.parametrize(("name", "numerics"), [
    ("nano-flash", "official"), ("nano-flash", "weights"), ("nano-pro", "official"),
    ("nano-base", "official"),
])
def test_short_prompts(
    host_device: None, host: ctypes.CDLL, order: None, nano: Callable[[str], Path], name: str,
    numerics: str,
) -> None:
    within_the_noise_floor(host, nano(name), name, "prompt5", numerics)


@pytest.mark.long
@pytest.mark.parametrize("name", ["nano-flash", "nano-pro", "nano-base", "nano-0731"])
def test_long_prompts(
    host_device: None, host: ctypes.CDLL, order: None, nano: Callable[[str], Path], name: str,
) -> None:
    within_the_noise_floor(host, nano(name), name, "prompt130")


def test_any_cut_in_any_company(cpu: dsv4.Model, quick: dsv4.Model) -> None:
    """Prompts that need two passes, beside another session's prompt and a token."""
    assert quick.exact is False and "prompts on tensor cores" in repr(quick)
    a, b, exact = quick.session(), quick.session(), cpu.session()
    whole = a.append(IDS[:21], logits="all")
    assert not same(whole, exact.append(IDS[:21], logits="all"))
    others = [quick.session(), quick.session()]
    others[0].append(IDS[40:42], logits="none")
    cut = []
    for ids in (IDS[:2], IDS[2:9], IDS[9:21]):
        step = [(others[0], IDS[50:51]), (b, ids), (others[1], IDS[60:63])]
        rows = quick.step(step, logits="all")
        cut.append(rows[1])
    assert same(whole, np.concatenate(cut)) and same_state(a, b)
    assert same(a.append(IDS[21:22]), b.append(IDS[21:22]))


def test_single_tokens_are_exact(cpu: dsv4.Model, quick: dsv4.Model) -> None:
    """With the CPU's bits beside a prompt that has others."""
    a, b, other = cpu.session(), quick.session(), quick.session()
    for session in (a, b):
        session._core.fill(60, 3)
    for i in range(3):
        rows = quick.step([(other, IDS[10 * i:10 * i + 5]), (b, IDS[i:i + 1])])
        assert same(a.append(IDS[i:i + 1]), rows[1])
    assert same_state(a, b)


@pytest.mark.long
def test_an_answer_alone_and_in_a_batch(quick: dsv4.Model) -> None:
    """Prompts that begin alike share that beginning, whatever is left of them."""
    how = dict(max_new_tokens=2, temperature=0, logprobs=1)
    alone = quick.generate(IDS[:34], **how)
    for other in quick.batch([IDS[:34], IDS[:34]], progress=False, **how):
        assert alone.tokens == other.tokens and alone.logprobs == other.logprobs


def test_states_are_not_mixed(
    cpu: dsv4.Model, gpu: dsv4.Model, quick: dsv4.Model, tmp_path: Path
) -> None:
    session = quick.session()
    session.append(IDS[:6])
    session.save(tmp_path / "quick")
    again = quick.load_session(tmp_path / "quick")
    assert same(session.append(IDS[6:9]), again.append(IDS[6:9]))
    for model in (cpu, gpu):
        with pytest.raises(dsv4.FormatError, match="model.numerics .*tensor cores of architecture"):
            model.load_session(tmp_path / "quick")
    exact = gpu.session()
    exact.append(IDS[:2])
    exact.save(tmp_path / "exact")
    cpu.load_session(tmp_path / "exact")
    with pytest.raises(dsv4.FormatError, match="model.numerics"):
        quick.load_session(tmp_path / "exact")


def test_on_the_cpu_nothing_changes(cpu: dsv4.Model, nano: Callable[[str], Path]) -> None:
    with dsv4.load(nano("nano-flash"), device="cpu", threads=1, exact=False) as model:
        assert model.exact and "tensor cores" not in repr(model)
        assert model._fingerprint == cpu._fingerprint
        assert same(model.session().append(IDS[:5]), cpu.session().append(IDS[:5]))
    with pytest.raises(TypeError, match="exact: got 1, wanted True or False"):
        dsv4.load(exact=1)  # type: ignore[arg-type]
