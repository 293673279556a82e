# SPDX-License-Identifier: Apache-2.0
"""`dsv4 bench`: what it prints and what it counts; that the synthetic model is a model like any
other.  Never how long anything took."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsv4
from dsv4 import _core, bench, nano
from dsv4 import kernel_calls as calls
from dsv4.bench import count, limits, linears, measure, plot, report, rows, synthetic
from dsv4.checkpoint import Checkpoint
from dsv4.cli import main
from dsv4.config import Config

PROMISED = {
    "linear_fp8_1tok_1t", "linear_fp4_1tok_1t", "linear_bf16_1tok_1t", "linear_fp8_1tok_all",
    "linear_fp4_1tok_all", "linear_bf16_1tok_all", "decode_4k", "decode_1m", "decode_batch16",
    "prefill_linear_384", "prefill_2k", "step_4tok", "outside",
}
# six layers, so that it is longer than the quick run's four
TINY = dict(
    nano.CONFIG, num_hidden_layers=6, compress_ratios=[0, 4, 128, 4, 128, 4], n_routed_experts=12,
    max_position_embeddings=4096, num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Checkpoint]:
    with synthetic.build(synthetic.configure(TINY, experts=8)) as checkpoint:
        yield checkpoint


def run_tiny(monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> report.Report:
    monkeypatch.setattr(bench, "REPEATS", 3)
    monkeypatch.setattr(limits, "PEAK_SECONDS", 1e-4)
    for name in rows.PROMPTS:
        monkeypatch.setitem(rows.PROMPTS, name, 300)
    return bench.run(config=TINY, **arguments)


# ---- the report ----

def test_every_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_tiny(monkeypatch, threads=2, experts=8)
    assert capsys.readouterr() == ("", "")
    told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert [row["name"] for row in told["rows"]] == [case.name for case in rows.cases()]
    for row in told["rows"]:
        assert list(row) == ["name", "value", "unit", "limit", "ratio", "peer", "peer_ratio"]
        assert row["peer"] is None and row["peer_ratio"] is None
        assert math.isfinite(row["value"])
        if row["name"] not in ("decode_1m_added", "step_4tok"):  # differences of short times
            assert row["value"] > 0
        if row["limit"] is not None:
            assert row["limit"] > 0 and math.isfinite(row["ratio"])
    machine = told["machine"]
    assert machine["threads"] == 2 and machine["limits"]["read_gb_s"] > 0
    assert machine["model"]["layers"] == 6 and machine["model"]["experts"] == 8
    assert machine["model"]["full_experts"] == 12
    names, text = {row["name"] for row in told["rows"]}, str(found)
    shares = told["details"].pop("outside")
    assert list(shares) == list(_core.PHASES) and sum(shares.values()) == pytest.approx(1, abs=0.1)
    assert "time of a token at 4k: fp8 " in text
    assert told["details"].pop("step_4tok").keys() == {"experts"}
    assert told["details"]["linear_fp8_1tok_1t"]["kernel"] in text
    assert set(told["details"]) == names - {"step_4tok", "outside", "decode_scaling"}
    assert all(kept["pairs"] == 3 >= kept["unsteady"] for kept in told["details"].values())
    for row in told["rows"]:
        assert f"\n{row['name']} " in text
    for kind in count.CLASSES:
        assert kind in text
    assert "projection, bytes x measured rate" in text


def test_quick_has_the_promised_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {case.name for case in rows.cases() if case.quick}
    assert PROMISED <= quick < {case.name for case in rows.cases()}
    found = run_tiny(monkeypatch, quick=True, threads=1, only=["outside", "decode_4k"])
    assert [row.name for row in found.rows] == ["decode_4k", "outside"]
    assert found.machine["model"]["layers"] == 4 and found.machine["model"]["experts"] == 8
    assert 0 < found.rows[1].value < 1


def test_medians_of_pairs() -> None:
    pairs = [measure.Pair(2.0, 1.0), measure.Pair(4.0, 1.0), measure.Pair(1.0, 0.9)]
    row = measure.row("name", 8.0, "GB/s", pairs)
    assert (row.value, row.limit, row.ratio) == (4.0, 8.0, 0.5)
    row = measure.row("name", 8.0, "GB/s", [*pairs, measure.Pair(1.0, None)])
    assert row.limit is None and row.ratio is None


def test_the_better_limit_counts(tiny: Checkpoint) -> None:
    told = iter([limits.Rates(1.0), limits.Rates(3.0)] * 3)
    with synthetic.load(tiny, 1) as model:
        one = measure.Bench(tiny, model, None, 3)
        one.limits.measure = lambda threads, needs: next(told)  # type: ignore[method-assign]
        pairs = one.pairs("a", lambda: 2.0, lambda rates: 6.0 / rates.read, ("read",))
    assert pairs == [measure.Pair(2.0, 2.0)] * 3
    assert one.details == {"a": {"pairs": 3, "unsteady": 3}}


def test_long_rows_stop_early(tiny: Checkpoint) -> None:
    with synthetic.load(tiny, 1) as model:
        for least in (1, 2):
            one = measure.Bench(tiny, model, None, 7, least)
            assert len(one.pairs("a", lambda: 30.0, lambda rates: 1.0, ())) == 7
            assert len(one.pairs("a", lambda: 50.0, lambda rates: 1.0, ())) == least
            assert len(one.pairs("a", lambda: 51.0, lambda rates: 1.0, ())) == 1
            assert len(one.pairs("b", lambda: 1e-3, lambda rates: 1.0, ())) == 7


# ---- the command ----

def test_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(synthetic, "published", lambda model: TINY)
    flags = ["bench", "--quick", "--threads", "1", "--only", "layer_csa"]
    assert main(flags) == 0
    out = capsys.readouterr()
    assert "layer_csa" in out.out and "limits: read" in out.out and out.err == ""
    peer = {"name": "ggml_fp4", "value": 20.0, "unit": "GB/s", "limit": 40.0, "ratio": 0.5,
            "peer": 11.7, "peer_ratio": 1.7}
    more = {"threads": 2, "engine": "ggml 1.0"}
    (tmp_path / "peers.json").write_text(json.dumps({"rows": [{**peer, **more}]}))
    flags += ["--peers", str(tmp_path / "peers.json")]
    assert main([*flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in told["rows"]] == ["layer_csa", "ggml_fp4"]
    assert told["rows"][1] == peer and told["details"]["ggml_fp4"] == {"engine": "ggml 1.0"}
    assert main(flags) == 0
    assert "11.7   1.70  GB/s  ggml 1.0\n" in capsys.readouterr().out
    (tmp_path / "peers.json").write_text('{"rows": [{}]}')
    assert main(flags) == 2
    assert "is not what tests/bench/peers.py --json prints" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "wanted"), [
    (["--only", "nonsense"], "only: got 'nonsense', wanted one of linear_fp8_1tok_1t, "),
    (["--experts", "5"], "experts: got 5, wanted 6 to 256"),
    (["--experts", "257"], "experts: got 257, wanted 6 to 256"),
    (["--threads", "0"], "threads: got 0, wanted 1 to 4096"),
])
def test_bad_arguments(
    flags: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *flags]) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.startswith(f"dsv4: error: {wanted}")


def test_too_little_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dsv4.memory, "available_memory", lambda: 12 << 30)
    assert main(["bench", "--experts", "100"]) == 1
    error = capsys.readouterr().err
    assert "memory: 43 layers of 100 experts need 6" in error and "free 12.00 GiB" in error
    assert "--quick needs less" in error
    monkeypatch.setattr(dsv4.memory, "available_memory", lambda: 24 << 30)
    assert main(["bench", "--experts", "100"]) == 1
    assert "would fit" in capsys.readouterr().err
    monkeypatch.setattr(dsv4.memory, "available_memory", lambda: 1 << 30)
    assert main(["bench", "--quick"]) == 1
    assert "nothing would fit" in capsys.readouterr().err


# ---- pictures ----

def some_report() -> report.Report:
    made = [measure.Row("linear_fp8_1tok_1t", 20.0, "GB/s", 25.0, 0.8),
            measure.Row("prefill_2k", 300.0, "GFLOP/s", None, None),
            measure.Row("step_4tok", 1.5, "x one token", 1.0, 1.5)]
    details = {
        "linear_fp8_1tok_1t": {
            "operations": 2e9, "bytes": 1e9, "amount": 1.0, "pairs": 3, "unsteady": 2},
        "prefill_2k": {"pairs": 3, "unsteady": 1}}
    machine = {
        "cpu": "a processor", "threads": 2, "date": "2026-01-01", "commit": None,
        "limits": {"read_gb_s": 25.0, "exact_gflop_s": 500.0},
        "model": {"dimensions": "V4-Flash", "layers": 4, "experts": 8},
    }
    return report.Report(machine, made, details)


def test_unsteady_limits_are_named() -> None:
    assert some_report()._warnings() == [
        "limits moved by more than 15 %: linear_fp8_1tok_1t (2 of 3 pairs)"]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    plot.draw(some_report(), tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "--plot", str(tmp_path / "out.png")]) == 1
    assert capsys.readouterr().err == (
        "dsv4: error: --plot needs matplotlib, which is not installed: "
        "pip install 'dsv4[plot]'\n")


# ---- the synthetic model ----

def test_configs_are_those_published() -> None:
    stored = Path(__file__).parents[1] / "vectors" / "configs"
    for model in synthetic.MODELS:
        assert synthetic.published(model) == json.loads((stored / f"{model}.json").read_text())
    with pytest.raises(ValueError, match="model: got 'base', wanted one of flash, pro"):
        synthetic.published("base")


@pytest.mark.parametrize("model", synthetic.MODELS)
def test_quick_has_one_layer_of_each_kind(model: str) -> None:
    full = synthetic.published(model)
    small = synthetic.configure(full, layers=synthetic.QUICK_LAYERS, experts=8)
    assert set(synthetic.kinds(small)) == set(synthetic.kinds(full))
    assert len(synthetic.kinds(small)) == 4
    Config.from_json(small)


def test_it_is_as_large_as_the_published_one() -> None:
    config, tensors = synthetic.table(synthetic.configure(synthetic.published("flash")))
    plan = dsv4.plan(config, context=1)
    assert sum(info.nbytes for info in tensors) == plan.weight_bytes
    read = count.weight_bytes(tensors, config, 4095)
    rows_read = plan.weights["embedding"] + 3 * config.vocab_size * 6 * 8
    dense = plan.weight_bytes - plan.weights["routed experts"] - rows_read
    assert read[count.DENSE_FP8] + read[count.TRUNK] == dense
    assert read[count.EXPERTS] == plan.weights["routed experts"] * 6 // 256
    weights = count.weights_per_token(tensors, config)
    assert sum(weights) == pytest.approx(13.27e9, rel=0.01)  # as advertised: 13 B active


def test_keys_and_scores() -> None:
    c = Config.from_json(synthetic.configure(synthetic.published("flash")))
    assert [count.keys(c, 0, p) for p in (0, 126, 127, 5000)] == [1, 127, 128, 128]
    assert [count.keys(c, 4, p) for p in (2, 3, 2047, 9999)] == [3, 5, 640, 640]
    assert [count.keys(c, 128, p) for p in (126, 127, (1 << 20) - 1)] == [127, 129, 8320]
    # at a million: 34.6 MB of index rows a layer if keys had 132 bytes; ours have 68
    assert count.state_bytes(c, (1 << 20) - 1)[count.INDEX] == 21 * 262144 * 68
    assert count.state_bytes(c, 2047)[count.INDEX] == 0
    assert count.attention_work(c, (1 << 20) - 1, 1).byte == 21 * 262144 * 2 * 64 * 128
    assert count.attention_work(c, 100, 3) == count.Work(*(
        sum(part) for part in zip(*(count.attention_work(c, p, 1) for p in (100, 101, 102)),
                                  strict=True)))


def test_the_same_seed_gives_the_same_bytes(tiny: Checkpoint) -> None:
    config = synthetic.configure(TINY, experts=8)
    with synthetic.build(config) as same, synthetic.build(config, seed=1) as other:
        with synthetic.load(tiny, 1) as a, synthetic.load(same, 1) as b:
            with synthetic.load(other, 1) as c:
                for name, info in tiny.tensors.items():
                    bytes_of = [model._core.tensor(name) for model in (a, b, c)]
                    assert np.array_equal(bytes_of[0], bytes_of[1])
                    if info.nbytes > 4096 and "tid2eid" not in name:
                        assert not np.array_equal(bytes_of[0], bytes_of[2])


def test_it_is_a_checkpoint_in_the_official_format(tiny: Checkpoint, tmp_path: Path) -> None:
    """Its files and its config, on disk, are accepted and give the same logits."""
    table = {name: tiny.shards[info.shard].name for name, info in tiny.tensors.items()}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    config = synthetic.configure(TINY, experts=8)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for shard in tiny.shards:
        path = Path(f"/proc/self/fd/{shard.fd}")
        (tmp_path / shard.name).write_bytes(path.read_bytes())
    with dsv4.load(tmp_path, threads=1) as stored, synthetic.load(tiny, 1) as model:
        ids = [3, 1, 4, 1, 5]
        assert np.array_equal(
            stored.session().append(ids, "all"), model.session().append(ids, "all"))


def logits(checkpoint: Checkpoint, threads: int) -> np.ndarray:
    """A prompt, then tokens one by one, two sessions in a step."""
    ids = np.random.default_rng(4).integers(0, 512, 150)
    with synthetic.load(checkpoint, threads) as model:
        a, b = model.session(), model.session()
        found = [a.append(ids, "all"), b.append(ids[:40], "all")]
        for i in range(3):
            found += [x for x in model.step([(a, [i]), (b, [i + 7])]) if x is not None]
    return np.concatenate(found)


def test_the_same_bits(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one thread, with two, and with every set of kernels of this processor."""
    wanted = logits(tiny, 1)
    assert np.isfinite(wanted).all() and wanted.std() > 0.1
    assert np.array_equal(logits(tiny, 2), wanted)
    for disable in calls.masks():
        monkeypatch.setenv("DSV4_CPU_DISABLE", disable)
        assert np.array_equal(logits(tiny, 1), wanted), disable


def test_a_part_is_some_of_the_layers(tiny: Checkpoint) -> None:
    part = synthetic.part(tiny, 4)
    assert synthetic.choose(TINY, 4) == [0, 1, 2, 3]
    ids = list(range(20))
    with synthetic.load(tiny, 1) as whole, synthetic.load(part, 1) as some:
        c = whole.config
        streams = np.random.default_rng(5).standard_normal(
            (20, c.hc_mult, c.hidden_size), np.float32)
        for i in range(4):
            assert np.array_equal(whole.layers[i](streams, ids), some.layers[i](streams, ids))


def test_layers_share_bytes() -> None:
    """Every layer is there: with the experts of layers 0 and 1 in turn, and all else of the first
    layer of its kind."""
    config = synthetic.configure(TINY, experts=8)
    kinds = synthetic.kinds(config)
    first = [kinds.index(kind) for kind in kinds]
    assert first == [0, 1, 2, 3, 2, 3]
    with synthetic.build(config, expert_sets=2) as shared:
        _, wanted = synthetic.table(config)
        assert {(t.name, t.dtype, t.shape) for t in wanted} == {
            (t.name, t.dtype, t.shape) for t in shared.tensors.values()}
        assert len(shared.shards) == 1 + 4
        for name, info in shared.tensors.items():
            words = name.split(".")
            if words[0] == "layers":
                layer = int(words[1])
                words[1] = str(layer % 2 if ".ffn.experts." in name else first[layer])
            assert info == shared.tensors[".".join(words)]._replace(name=name)
        stored = {(t.shard, t.offset): t.nbytes for t in shared.tensors.values()}
        assert sum(stored.values()) == sum(s.size - s.data_offset for s in shared.shards)
        assert synthetic.need(config, 2).expert * 3 == synthetic.need(config).expert
        with synthetic.load(shared, 1) as model:
            one = measure.Bench(shared, model, None, 1)
            assert len(one.limits.pieces) == 2
            assert 7 < one.experts(16) <= 8
        assert np.array_equal(logits(shared, 1), logits(shared, 2))
    with pytest.raises(ValueError, match="expert_sets: got 7, wanted 1 to 6"):
        synthetic.build(config, expert_sets=7)


def test_tokens_choose_experts_of_their_own(tiny: Checkpoint) -> None:
    with synthetic.load(tiny, 1) as model:
        one = measure.Bench(tiny, model, None, 1)
        assert one.experts(1) == 3
        assert 7 < one.experts(16) <= 8
        uniform = 8 * (1 - (1 - 3 / 8) ** 2)
        assert 3.5 < one.experts(2) < uniform + 1


def test_interrupted_while_building(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while it is filled leaves no file in memory behind."""
    made: list[int] = []
    create = synthetic.os.memfd_create

    def noted(name: str) -> int:
        made.append(create(name))
        return made[-1]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic.os, "memfd_create", noted)
    with pytest.raises(KeyboardInterrupt):
        synthetic.build(synthetic.configure(TINY, experts=8), progress=interrupt)
    assert len(made) == 7
    for fd in made:
        with pytest.raises(OSError):
            synthetic.os.fstat(fd)


# ---- the measuring door ----

def test_limits_of_this_processor() -> None:
    found = _core.limits(None)
    assert {kind for kind, *_ in found} <= {"read", "f32 fma", "bf16 dot", "byte dot"}
    portable = [limit for limit in found if limit[2] == "ref"]
    assert portable and {kind for kind, *_ in portable} == {"read"}
    for name, here in _core.cpu_sets():
        assert any(limit[2] == name for limit in found) == here or name == "avx512bf16"
    assert _core.limits("avx2") == portable
    with pytest.raises(ValueError, match="'nonsense' is not an instruction set"):
        _core.limits("nonsense")


@pytest.mark.parametrize("threads", [1, 3])
def test_times_are_positive(threads: int) -> None:
    data = np.ones(1 << 20, np.uint8)
    for kind, _, _, address in _core.limits(None):
        if kind == "read":
            times = _core.time_read(threads, address, data, 4)
        else:
            operations, times = _core.time_peak(threads, address, 100, 4)
            once, _ = _core.time_peak(1, address, 100, 1)
            assert operations == threads * once > 0
        assert len(times) == 4 and all(0 < seconds < 60 for seconds in times)


def test_a_timed_kernel_computes() -> None:
    """All threads together make the whole layer, for any kernel and any tile."""
    rng = np.random.default_rng(6)
    w = (rng.standard_normal((70, 96), np.float32).view(np.uint32) >> 16).astype(np.uint16)
    one = linears.Matrix(calls.W_BF16, w.ctypes.data, 0, 70, 96, w.nbytes)
    weight = calls.Weight(w.ctypes.data, None, 70, 96, calls.W_BF16, 0, calls.SCALE_NONE)
    for n_tok in (1, 20):
        sweep = linears.Sweep([one], n_tok)
        which = linears.kernel("bf16", n_tok, None)
        sweep.seconds(which, 3)
        variant = calls.Variant(which.op, which.name, which.address)
        x = sweep.x.reshape(n_tok, 96)
        wanted = calls.linear(variant, x, weight, out_f32=False)
        assert np.array_equal(sweep.out.reshape(n_tok, 70), wanted)


def test_the_door_refuses() -> None:
    data = np.ones(4096, np.uint8)
    walk = next(address for kind, *_, address in _core.limits(None) if kind == "read")
    for arguments in ((0, walk, data, 1), (1, walk, data, 0), (1, walk + 1, data, 1)):
        with pytest.raises(ValueError, match="wanted"):
            _core.time_read(*arguments)
    with pytest.raises(ValueError, match="wanted the address of a peak"):
        _core.time_peak(1, walk, 1, 1)
    with pytest.raises(ValueError, match="whole dsv4_linear_args"):
        _core.time_linear(1, walk, bytes(7), bytearray(64), 1, 1)


def test_usual_limits_are_medians() -> None:
    data = np.ones(1 << 20, np.uint8)
    one = limits.Limits([(data.ctypes.data, data.nbytes)])
    one.seen[1] = [limits.Rates(read=1.0), limits.Rates(read=1e30), limits.Rates(read=1e30)]
    one.read = lambda threads: 2.0  # type: ignore[method-assign]
    assert one.usual(1).read == pytest.approx(5e29)
    assert one.usual(3).read == 2.0


def test_caches_are_read_from_the_system(tmp_path: Path) -> None:
    assert limits.last_level_cache(tmp_path) == limits.USUAL_CACHE
    for i, text in enumerate(("32K", "266240K", "nonsense")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(f"{text}\n")
    assert limits.last_level_cache(tmp_path) == 260 << 20


def test_pools_have_a_limit() -> None:
    each = linears.Matrix(calls.W_FP8, 0, 0, 1, 1, 1 << 30)
    assert len(linears.pool([each] * 9, 1 << 20)) == 1
    assert len(linears.pool([each] * 9, 1 << 40)) == 2
