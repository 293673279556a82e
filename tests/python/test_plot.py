# SPDX-License-Identifier: Apache-2.0
"""`dsv4.plot`: what is drawn is what the trace, plan or result holds; what it refuses."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dsv4
from dsv4 import plot

RESULT = next((Path(__file__).parents[1] / "bench" / "results").glob("*-quick.json"))
TEXTS = ["\n", "a", "$b", "c", "d", "e", "f", "g", "h"]


@pytest.fixture(autouse=True)
def figures() -> Iterator[None]:
    """Off the screen, and closed afterwards."""
    matplotlib = pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    matplotlib.use("agg")
    from matplotlib import pyplot

    yield
    pyplot.close("all")


def ranges_of(ratio: int) -> Callable[[Any], Any]:
    def ranges(entries: Any) -> Any:
        ids = np.asarray(entries)
        return np.stack([np.maximum(ids - 1, 0) * ratio, (ids + 1) * ratio], -1)

    return ranges


@pytest.fixture
def trace() -> Any:
    """Nine tokens from position 3 on; entries of two tokens, two of them selected; a window of 4;
    two heads; two streams."""
    n, position = 9, 3
    at = position + np.arange(n)
    visible = (at + 1) // 2
    selected = np.stack([visible - 1, np.where(visible > 3, 0, -1)], 1).astype(np.int32)
    positions = np.maximum(at[:, None] - 3, 0) + np.arange(4)
    entries = np.where(visible[:, None] > np.arange(6), np.arange(6), -1)
    compressed = np.where(entries[:, None] >= 0, 0.03125, 0) * np.array([1, 3])[:, None]
    logits = np.full((n, 20), -3.0)
    logits[np.arange(n), np.arange(n)] = 5
    return SimpleNamespace(
        position=position, texts=TEXTS,
        model=SimpleNamespace(text_tokenizer=lambda name: SimpleNamespace(
            decode=lambda ids: f"<{ids[0]}>")),
        router={i: SimpleNamespace(
            experts=np.array([[0, i], [1, i], [0, i]], np.int32), scores=np.zeros((3, 5)))
            for i in (2, 4)},
        indexer={2: SimpleNamespace(selected=selected, ranges=ranges_of(2))},
        attention={2: SimpleNamespace(
            window=np.full((n, 2, 4), 0.125), compressed=compressed, position=position,
            positions=np.where(positions > at[:, None], -1, positions),
            ranges=lambda: ranges_of(2)(entries) * (entries >= 0)[..., None])},
        streams={i: np.full((n, 2, 6), i + 1.0) * np.array([1, 2])[:, None] for i in (0, 3)},
        lens=lambda layer, rows: logits[rows] * (1 if layer else 0.5))


def image(ax: Any) -> Any:
    return np.ma.filled(ax.images[0].get_array(), np.nan)


def test_a_real_trace() -> None:
    """Attention by token: with the sink it is all there is; what is picked is what was traced."""
    ids = np.random.default_rng(0).integers(5, 1000, 300)
    with dsv4.load() as model, model.trace(ids, attention=True, indexer=True) as real:
        for layer in range(model.config.num_hidden_layers):
            shown = image(plot.attention(real, layer, 1)) ** 2
            np.testing.assert_allclose(
                shown.sum(1), 1 - real.attention[layer].sink[:, 1], atol=1e-5)
            assert not shown[np.triu_indices(300, 1)].any()  # nothing ahead
        shown = image(plot.indexer(real, 4))
        selected = real.indexer[4].selected
        assert np.array_equal((shown == 1).sum(1), (selected >= 0).sum(1))
        assert (selected[-1] >= 0).sum() == model.config.index_topk
        assert np.array_equal(np.flatnonzero(shown[-1] == 1), selected[-1])


def test_experts(trace: Any) -> None:
    ax = plot.experts(trace)
    want = np.array([[2, 1, 3, 0, 0], [2, 1, 0, 0, 3]]) / 3 * 100
    np.testing.assert_allclose(image(ax), want)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["2", "4"]
    assert [t.get_text() for t in ax.texts][:5] == ["67", "33", "100", "0", "0"]


def test_indexer(trace: Any) -> None:
    ax = plot.indexer(trace)
    shown = image(ax)
    assert shown.shape == (9, 6) and ax.images[0].get_extent() == [0, 12, 11.5, 2.5]
    for row, at in enumerate(range(3, 12)):
        there = (at + 1) // 2
        want = [0.25 if i < there else np.nan for i in range(6)]
        want[there - 1] = 1
        if there > 3:
            want[0] = 1
        np.testing.assert_array_equal(shown[row], want)
    assert [t.get_text() for t in ax.get_yticklabels()][:3] == ["\\n", "a", "\\$b"]


def test_attention(trace: Any) -> None:
    for head, factor in ((0, 1), (1, 3), (None, 2)):
        shown = image(plot.attention(trace, 2, head)) ** 2
        assert shown.shape == (9, 12)
        want = np.zeros((9, 12))
        for row, at in enumerate(range(3, 12)):
            want[row, at - 3 : at + 1] += 0.125
            for entry in range((at + 1) // 2):
                first, end = max(0, entry - 1) * 2, (entry + 1) * 2
                want[row, first:end] += 0.03125 * factor / (end - first)
        np.testing.assert_allclose(shown, want, atol=1e-12)


def test_streams(trace: Any) -> None:
    ax = plot.streams(trace)
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1, 4], [2, 8]]
    assert [line.get_xdata().tolist() for line in ax.lines] == [[0, 3]] * 2
    assert len({(line.get_marker(), line.get_linestyle()) for line in ax.lines}) == 2


def test_lens(trace: Any) -> None:
    ax = plot.lens(trace, tokens=slice(2, 8, 3))
    assert [t.get_text() for t in ax.texts] == ["<2>", "<5>"] * 2
    assert [t.get_text() for t in ax.get_yticklabels()] == ["3", "0"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["\\$b", "e"]
    high, low = (np.exp(5 * k) / (np.exp(5 * k) + 19 * np.exp(-3 * k)) for k in (1, 0.5))
    np.testing.assert_allclose(image(ax), [[high] * 2, [low] * 2])


def test_memory() -> None:
    with dsv4.load() as model:
        plans = {name: dsv4.plan(model.path, context=n, batch=3)
                 for name, n in (("short", 128), ("long", 2048))}
    ax = plot.memory(plans)
    for i, plan in enumerate(plans.values()):
        width = sum(group[i].get_width() for group in ax.containers)
        assert width == pytest.approx(plan.total / 2**20)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["short", "long"]
    assert ax.get_legend_handles_labels()[1][-1] == "other"
    assert plot.memory(plans["long"]).get_yticklabels()[0].get_text() == "2,048 tokens x 3"


def test_bench_results() -> None:
    told = json.loads(RESULT.read_text())
    ax = plot.limits(RESULT)
    shown = [bar.get_width() for bar in ax.containers[0]]
    assert shown == [row["ratio"] for row in plot.shares(told)] and len(shown) > 8
    assert "x one token" not in {row["unit"] for row in plot.shares(told)}
    ax = plot.roofline(told)
    names = ax.get_legend_handles_labels()[1]
    assert names == [row["name"] for row in told["rows"]
                     if "operations" in told["details"].get(row["name"], {})]


def calls(trace: Any) -> list[Callable[..., Any]]:
    def call(function: Callable[..., Any], shown: Any) -> Callable[..., Any]:
        return lambda **arguments: function(shown, **arguments)

    with dsv4.load() as model:
        plan = model.plan
    return [
        *(call(f, trace) for f in (plot.experts, plot.indexer, plot.attention, plot.streams,
                                   plot.lens)),
        call(plot.memory, plan), call(plot.limits, RESULT), call(plot.roofline, str(RESULT))]


def test_they_draw_into_given_axes(trace: Any) -> None:
    from matplotlib import pyplot

    for draw in calls(trace):
        figure, ax = pyplot.subplots(layout="constrained")
        assert draw(ax=ax) is ax and ax.has_data()
        assert ax.get_xlabel()
        figure.canvas.draw()  # no warning either
    assert len(pyplot.get_fignums()) == len(calls(trace))


def test_without_matplotlib(trace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    every = calls(trace)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in every:
        with pytest.raises(ImportError, match=r"pip install 'dsv4\[plot\]'"):
            draw()


def test_refusals(trace: Any, tmp_path: Path) -> None:
    empty = SimpleNamespace(router={}, indexer={}, attention={}, streams={}, texts=TEXTS)
    for draw, name in ((plot.experts, "router"), (plot.indexer, "indexer"),
                       (plot.attention, "attention"), (plot.streams, "streams"),
                       (plot.lens, "streams")):
        with pytest.raises(ValueError, match=f"has no {name}; wanted one made with {name}=True"):
            draw(empty)
    with pytest.raises(ValueError, match=r"layer: got 4, wanted one of those traced: \[2\]"):
        plot.indexer(trace, 4)
    with pytest.raises(ValueError, match="head: got 2, wanted 0 to 1 or None"):
        plot.attention(trace, head=2)
    with pytest.raises(ValueError, match="tokens: got none of the 9 tokens"):
        plot.lens(trace, tokens=slice(9, None))
    trace.indexer[2].selected = np.full((9, 2), -1)
    with pytest.raises(ValueError, match="no entry was there yet in layer 2"):
        plot.indexer(trace)
    (tmp_path / "x.json").write_text("{}")
    for wrong in ({}, tmp_path / "x.json", str(Path(__file__))):
        with pytest.raises(ValueError, match="is not what `dsv4 bench --json` prints"):
            plot.roofline(wrong)
