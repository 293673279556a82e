# SPDX-License-Identifier: Apache-2.0
"""The face of traces: what is refused and how, growth, files, answers, batches, names."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dsv4
from dsv4 import trace as trace_module
from dsv4 import trace_recording
from dsv4.trace import HOOKS, PARTS
from dsv4.trace_columns import Column, Row

EVERYTHING: dict[str, Any] = dict.fromkeys(PARTS, True) | {"logits": "all", "nll": True}
IDS = [0, *range(3, 150)]


def arrays(tree: Any) -> dict[str, Any]:
    """The arrays of `Trace.to_dict` by a path."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= {f"{key}/{path}": each for path, each in arrays(value).items()}
        else:
            found[str(key)] = value
    return found


def alike(got: dsv4.Trace, want: dsv4.Trace) -> None:
    a, b = arrays(got.to_dict()), arrays(want.to_dict())
    assert a.keys() == b.keys()
    for path, values in b.items():
        np.testing.assert_array_equal(a[path], values, path)


# ---- refusals, before any work ----

@pytest.mark.parametrize(("arguments", "error", "text"), [
    (dict(routr=True), ValueError, "no 'routr'; nearest are router"),
    (dict(zzz=True), ValueError, "no 'zzz'; there are router, indexer"),
    (dict(router=[4]), ValueError, "router: got layer 4, wanted 0 to 3"),
    (dict(router=[-1]), ValueError, "router: got layer -1, wanted 0 to 3"),
    (dict(indexer=[0]), ValueError, r"indexer: layer 0 is SWA and has none; nearest .* \[1, 3\]"),
    (dict(indexer=[2]), ValueError, r"layer 2 is HCA and has none; nearest that have are \[1, 3\]"),
    (dict(router=3), TypeError, "router: got 3, wanted True, False or a list of layers"),
    (dict(router="all"), TypeError, "router: got 'all'"),
    (dict(streams=[True]), TypeError, "streams: got True, wanted numbers of layers"),
    (dict(streams=[1.0]), TypeError, "streams: got 1.0"),
    (dict(logits="some"), ValueError, "logits: got 'some'"),
    (dict(nll=1), TypeError, "nll: got 1, wanted True or False"),
    (dict(out=Path(__file__)), ValueError, "is there and not empty"),
])
def test_what_is_refused(flash: dsv4.Model, arguments: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        flash.trace(IDS, **arguments)
    if "out" not in arguments:
        with pytest.raises(error, match=text):
            flash.generate(IDS, max_new_tokens=1, trace=arguments)


def test_layers_that_were_not_traced(flash: dsv4.Model) -> None:
    with flash.trace(IDS[:9], router=[1, 3]) as t:
        with pytest.raises(KeyError, match=r"layer 2 was not traced \(nearest are \[1, 3\]\)"):
            t.router[2]
        with pytest.raises(KeyError, match=r"none were.*streams=\[1\]"):
            t.streams[1]
        with pytest.raises(KeyError, match="streams: layer 1"):
            t.lens(1)
        with pytest.raises(KeyError, match="'x'"):
            t.router["x"]  # type: ignore[index]
        assert 2 not in t.router and 3 in t.router and len(t.router) == 2


def test_one_trace_is_of_one_timeline(flash: dsv4.Model) -> None:
    t = dsv4.Trace(flash, router=[0])
    a, b = flash.session(), flash.session()
    a.append(IDS[:5], trace=t)
    with pytest.raises(ValueError, match="ends at position 5, the session is at 0"):
        b.append(IDS[:5], trace=t)
    a.append(IDS[5:8])
    with pytest.raises(ValueError, match="ends at position 5, the session is at 8"):
        a.append(IDS[8:9], trace=t)
    a.rewind(5)
    a.append(IDS[5:9], trace=t)
    with pytest.raises(ValueError, match="one trace twice"):
        flash.step([(a, [1], t), (b, [1], t)])
    with dsv4.load() as other, pytest.raises(ValueError, match="another model"):
        other.session().append([1], trace=t)
    with pytest.raises(TypeError, match="got dict, wanted a dsv4.Trace"):
        a.append([1], trace={"router": True})  # type: ignore[call-overload]
    assert t.tokens.tolist() == IDS[:9]
    t.close()
    t.close()
    with pytest.raises(ValueError, match="closed"):
        a.append([1], trace=t)
    assert a.position == b.position + 9 and t.router[0].experts.shape[0] == 9


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_too_much_is_refused_beforehand(
    flash: dsv4.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str,
) -> None:
    c = flash.config
    need = len(IDS) * 4 * (c.hc_mult * c.hidden_size + 1)
    out = tmp_path / "t" if where == "disk" else None
    error = MemoryError if out is None else OSError
    for free in (need - 1, need):
        monkeypatch.setattr(trace_recording, "available_memory", lambda free=free: free)
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(trace_recording.shutil, "disk_usage", lambda path, usage=usage: usage)
        if free == need:
            flash.trace(IDS, streams=[1], out=out).close()
            continue
        with pytest.raises(error, match=f"148 tokens need {need:,} bytes .* {free:,} .* are free"):
            flash.trace(IDS, streams=[1], out=out)
        out = None if out is None else tmp_path / "u"
    if where == "memory":
        monkeypatch.setattr(trace_recording, "available_memory", lambda: need)
        with pytest.raises(MemoryError, match="168 tokens need"):
            flash.generate(IDS, max_new_tokens=20, trace={"streams": [1]})
        with flash.trace(IDS[:3], streams=[1]) as t:
            monkeypatch.setattr(trace_module, "available_memory", lambda: 100)
            with pytest.raises(MemoryError, match="lens: 3 rows of logits need"):
                t.lens(1)


# ---- growth and files ----

@pytest.mark.parametrize("widens", [False, True])
@pytest.mark.parametrize("on_disk", [False, True])
def test_columns_grow(tmp_path: Path, on_disk: bool, widens: bool) -> None:
    path = tmp_path / "c.npy" if on_disk else None
    column = Column(Row(False, (3, 2), False, widens), 4, -1.0, path)
    want = np.full((0, 3, 2), 0, np.float32)
    old = []
    for n in (1, 1, 5, 0, 30, 2):
        rows, width = column.needs(0, column.n + n)
        column.reserve(rows + 3, width)
        part = column.part(column.n, n)
        assert part.flags.c_contiguous and len(part) == n
        values = np.random.default_rng(rows).random((n, 3, 2 + width), np.float32)
        part[..., : 2 + width] = values
        grown = np.full((rows, 3, 2 + width), -1, np.float32)
        grown[: len(want), :, : want.shape[2]] = want
        grown[len(want) :] = values
        want, column.n, column.width = grown, rows, width
        np.testing.assert_array_equal(column.values, want)
        old.append((column.values, want))
    column.close()
    for values, then in [*old, (column.values, want)]:
        np.testing.assert_array_equal(values, then)
    if path is not None:
        np.testing.assert_array_equal(np.load(path), want)
        assert [p.name for p in tmp_path.iterdir()] == ["c.npy"]


def test_a_folder_holds_what_memory_would(flash: dsv4.Model, tmp_path: Path) -> None:
    """The prompt at once, then token by token; the files are those of what was read."""
    with flash.trace(IDS, **EVERYTHING) as want:
        with dsv4.Trace(flash, **EVERYTHING, out=tmp_path / "a" / "b") as t:
            session = flash.session()
            session.append(IDS[:100], trace=t)
            early = t.router[1].experts
            for one in IDS[100:]:
                session.append([one], logits="none", trace=t)
            alike(t, want)
            np.testing.assert_array_equal(early, want.router[1].experts[:100])
        alike(t, want)
    folder = tmp_path / "a" / "b"
    about = json.loads((folder / "trace.json").read_text())
    assert about["tokens"] == len(IDS) and about["parts"]["indexer"] == [1, 3]
    for name, values in (("experts.1", want.router[1].experts), ("streams.3", want.streams[3]),
                         ("index_scores.3", want.indexer[3].scores), ("nll", want.nll[:, None]),
                         ("kv_compressed.2", want.kv[2].compressed), ("logits", want.logits)):
        np.testing.assert_array_equal(np.load(folder / f"{name}.npy", mmap_mode="r"), values)
    assert not list(folder.glob("*.tmp"))
    with pytest.raises(ValueError, match="not empty"):
        dsv4.Trace(flash, router=True, out=folder)


def test_long_prompts_whose_logits_are_needed_go_in_pieces(flash: dsv4.Model) -> None:
    """A prompt of more than 128 tokens: the trace, the rows and the session are the same."""
    t, u = dsv4.Trace(flash, nll=True, router=[2]), dsv4.Trace(flash, nll=True, router=[2])
    a, b = flash.session(), flash.session()
    rows = a.append(IDS * 2, trace=t)
    np.testing.assert_array_equal(rows, b.append(IDS * 2, logits="all", trace=u)[-1:])
    alike(t, u)
    assert a.position == len(IDS) * 2 and t.logits is None
    np.testing.assert_array_equal(a.append([1]), b.append([1]))


def test_interrupted_between_pieces(flash: dsv4.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    t = dsv4.Trace(flash, nll=True, router=[2])
    session = flash.session()
    session.append(IDS[:20], trace=t)
    take, calls = dsv4.Trace.take, []

    def failing(self: dsv4.Trace, ids: Any, logits: Any) -> None:
        calls.append(len(ids))
        if len(calls) == 2:
            raise KeyboardInterrupt
        take(self, ids, logits)

    with monkeypatch.context() as patch:
        patch.setattr(dsv4.Trace, "take", failing)
        with pytest.raises(KeyboardInterrupt):
            session.append(IDS * 2, trace=t)
    assert len(calls) == 2 and session.position == len(t) == 20 and len(t.nll) == 19
    session.append(IDS[20:], trace=t)
    with flash.trace(IDS, nll=True, router=[2]) as want:
        alike(t, want)


# ---- answers ----

def test_answers_are_traced_token_by_token(flash: dsv4.Model) -> None:
    arguments: dict[str, Any] = dict(max_new_tokens=20, seed=3, ignore_eos=True)
    plain = flash.generate(IDS, **arguments)
    out = flash.generate(IDS, **arguments, trace=EVERYTHING)
    assert out.tokens == plain.tokens and plain.trace is None and "trace" not in out.as_dict()
    with flash.trace([*IDS, *out.tokens[:-1]], **EVERYTHING) as want:
        alike(out.trace, want)
    given = dsv4.Trace(flash, **EVERYTHING)
    with flash.stream(IDS, **arguments, trace=given) as events:
        seen = [len(given) for _ in events]
    assert seen == sorted(seen) and seen[0] < seen[-1]
    alike(given, want)
    session = flash.session()
    session.append(IDS[:50])
    later = flash.generate(IDS[50:], **arguments, session=session, trace={"router": [1]}).trace
    np.testing.assert_array_equal(later.router[1].experts, want.router[1].experts[50:])


def test_each_answer_of_a_batch_has_its_own(flash: dsv4.Model, tmp_path: Path) -> None:
    """Prompts that begin alike too; rows without a trace, or with other parts, beside them."""
    common: dict[str, Any] = dict(max_new_tokens=5, ignore_eos=True, temperature=0)
    mine = dsv4.Trace(flash, streams=[2], out=tmp_path / "mine")
    rows = [IDS[:120], (IDS[:121], {"trace": None}), (IDS[:122], {"trace": mine}),
            (IDS[:30], {"trace": {"router": [0], "out": tmp_path / "other"}})]
    found = list(flash.batch(rows, **common, trace={"router": [1]}, concurrency=4))
    for (prompt, part, layer), answer in zip(
            [(IDS[:120], "router", 1), (IDS[:121], None, 0), (IDS[:122], "streams", 2),
             (IDS[:30], "router", 0)], found, strict=True):
        alone = flash.generate(prompt, **common)
        assert alone.tokens == answer.tokens and answer.error is None
        if part is None:
            assert answer.trace is None
            continue
        with flash.trace([*prompt, *answer.tokens[:-1]], **{part: [layer]}) as want:
            alike(answer.trace, want)
    assert found[2].trace is mine and np.load(tmp_path / "other" / "experts.0.npy").shape[0] == 34
    two = flash.generate([IDS[:9], IDS[:7]], **common, n=2, seed=1, trace={"nll": True})
    assert [len(each.trace) for each in two] == [13, 13, 11, 11]
    assert all(len(each.trace.nll) == len(each.trace) - 1 for each in two)


def test_which_traces_answers_do_not_take(flash: dsv4.Model) -> None:
    t = dsv4.Trace(flash, router=[1])
    with pytest.raises(ValueError, match="one for 2 answers"):
        flash.generate(IDS, n=2, max_new_tokens=1, trace=t)
    with pytest.raises(ValueError, match="one for several prompts"):
        flash.generate([IDS, IDS], max_new_tokens=1, trace=t)
    with pytest.raises(TypeError, match="got int, wanted a dsv4.Trace, a dict"):
        flash.generate(IDS, max_new_tokens=1, trace=5)
    with pytest.raises(TypeError, match="one for all prompts"):
        flash.batch([IDS], max_new_tokens=1, trace=t)


def test_an_answer_that_begins_again_is_traced_once(
    flash: dsv4.Model, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The step was done, what came of it was not taken: the row of the batch starts over."""
    take, failed = dsv4.answer.Answer.take, []

    def failing(self: Any, logits: Any, sample: Any) -> Any:
        events = take(self, logits, sample)
        if len(self.tokens) == 3 and not failed:
            failed.append(True)
            raise KeyboardInterrupt
        return events

    monkeypatch.setattr(dsv4.answer.Answer, "take", failing)
    with dsv4.Scheduler(flash) as scheduler:
        handle = scheduler.submit(
            IDS, max_new_tokens=6, temperature=0, ignore_eos=True, trace={"router": True})
        with pytest.raises(KeyboardInterrupt):
            handle.result()
        out = handle.result()
    assert failed and len(out.tokens) == 6
    with flash.trace([*IDS, *out.tokens[:-1]], router=True) as want:
        alike(out.trace, want)


# ---- names, tables ----

def test_hook_names(flash: dsv4.Model) -> None:
    """Every expression of the table is a field; the table in the docstring is this one."""
    with flash.trace(IDS[:9], **EVERYTHING) as t:
        for hook, ours in HOOKS.items():
            values = eval(f"t.{ours}", {"t": t, "i": 1})
            assert isinstance(values, np.ndarray) and len(values) == 9, hook
            first = ours.split(",")[0]
            assert any(f"``{hook}``" in line and f"``{first}``" in line
                       for line in str(trace_module.__doc__).splitlines()), hook
    assert str(trace_module.__doc__).count("\n``") == len(HOOKS)


def test_texts_and_repr() -> None:
    with dsv4.load() as model, model.trace("To be, or not", router=True) as t:
        assert "".join(t.texts[1:]) == "To be, or not" and len(t.texts) == len(t)
        assert repr(t).startswith(f"<dsv4.Trace of {len(t)} tokens from position 0: router of ")
        assert repr(t.router).startswith("<dsv4 trace: router of layers [0")


def test_tables(flash: dsv4.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns that pandas is given."""
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=dict))
    with flash.trace(IDS, router=True, indexer=True, nll=True) as t:
        tokens, router, indexer = (t.to_pandas(what) for what in ("tokens", "router", "indexer"))
        assert tokens["token"].tolist() == IDS and np.isnan(tokens["nll"][0])
        assert tokens["nll"][1:].tolist() == t.nll.tolist()
        row = (router["layer"] == 2) & (router["position"] == 7) & (router["choice"] == 1)
        assert router["expert"][row].tolist() == [t.router[2].experts[7, 1]]
        assert router["weight"][row].tolist() == [t.router[2].weights[7, 1]]
        row = (indexer["layer"] == 3) & (indexer["position"] == 140)
        assert indexer["entry"][row].tolist() == [e for e in t.indexer[3].selected[140] if e >= 0]
        assert (indexer["end"] - 4 == indexer["entry"] * 4).all()
        assert np.isfinite(indexer["score"][row]).all()
        for table, n in ((tokens, 1), (router, 4 * flash.config.num_experts_per_tok)):
            assert {len(column) for column in table.values()} == {len(IDS) * n}
        with pytest.raises(ValueError, match="what: got 'x'"):
            t.to_pandas("x")  # type: ignore[arg-type]
    with flash.trace([0, 1]) as t:
        assert not len(t.to_pandas("router")["expert"]) and not len(t.to_pandas("indexer")["entry"])


def test_tables_without_pandas(flash: dsv4.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with flash.trace([0, 1]) as t, pytest.raises(ImportError, match="pip install pandas"):
        t.to_pandas()
