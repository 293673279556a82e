# SPDX-License-Identifier: Apache-2.0
"""Loading, sessions, steps, layers; what they refuse; documentation and signatures."""

import ast
import dataclasses
import doctest
import gc
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsv4
from dsv4 import _core, checksums, loading, memory
from dsv4 import nano as nano_module
from dsv4.arrays import from_bf16, to_bf16
from dsv4.loading import _thread_count

MODULES = [
    name for _, name, _ in pkgutil.walk_packages(dsv4.__path__, "dsv4.")
    if not name.endswith(("__main__", "_core"))
]


# ---- documentation ----

def documented(cls: type) -> list[tuple[str, Any]]:
    members = {**cls.__dict__}
    return [
        (f"{cls.__name__}.{name}", member.fget if isinstance(member, property) else member)
        for name, member in members.items()
        if not name.startswith("_") and (callable(member) or isinstance(member, property))
    ]


def test_every_public_name_has_a_docstring() -> None:
    missing = []
    for name in dsv4.__all__:
        value = getattr(dsv4, name)
        for path, member in [(name, value), *(documented(value) if inspect.isclass(value) else [])]:
            # fields of named tuples document themselves by their class
            if inspect.isroutine(member) or inspect.isclass(member):
                if not inspect.getdoc(member):
                    missing.append(path)
    assert not missing


def test_all_names_are_importable_and_listed() -> None:
    assert set(dsv4.__all__) <= set(dir(dsv4))
    assert set(dsv4.__all__) == set(dsv4._WHERE)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = dsv4.nonsense


@pytest.mark.parametrize("name", ["dsv4", *MODULES])
def test_examples_in_docstrings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_NUM_THREADS", "1")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def stub_signatures() -> dict[str, list[str]]:
    """Every function and method of _core.pyi with the names of its parameters."""
    tree = ast.parse(Path(_core.__file__).with_name("_core.pyi").read_text())
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = [a.arg for a in node.args.posonlyargs + node.args.args]
        elif isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    names = [a.arg for a in item.args.posonlyargs + item.args.args]
                    found[f"{node.name}.{item.name}"] = names[1:]
    return found


def core_signatures() -> dict[str, list[str]]:
    """The same from the compiled module."""
    found: dict[str, list[str]] = {}
    for name, value in vars(_core).items():
        if name.startswith("__"):
            continue
        if inspect.isclass(value):
            found[f"{name}.__new__"] = list(inspect.signature(value).parameters)
            for key, member in vars(value).items():
                if key.startswith("__"):
                    continue
                parameters = []
                if callable(member):
                    parameters = [p for p in inspect.signature(member).parameters if p != "self"]
                found[f"{name}.{key}"] = parameters
        elif callable(value):
            found[name] = list(inspect.signature(value).parameters)
    return found


def test_stub_file_matches_the_module() -> None:
    assert stub_signatures() == core_signatures()


def test_import_is_light(script: Callable[..., Any]) -> None:
    done = script("import sys, dsv4; print(*(m for m in ('numpy', 'tokenizers', 'dsv4._core') "
                  "if m in sys.modules)); dsv4.FormatError; print('numpy' in sys.modules)")
    assert done.stdout.split() == ["False"]


# ---- load ----

def test_repr_says_what_where_and_how_much(model: dsv4.Model) -> None:
    text = repr(model)
    assert model.kind in text and str(model.path) in text and "routed experts" in text
    assert "cpu, 1 thread, official numerics" in text
    assert "<table>" in model._repr_html_() and "routed experts" in model._repr_html_().replace(
        "&nbsp;", " ")
    assert model.kernel_info.keys() == dsv4.kernel_info().keys()
    assert repr(model.layers[2]).startswith("<dsv4.Layer 2")


@pytest.mark.parametrize(("arguments", "error", "says"), [
    (dict(device="gpu"), ValueError, "device: got 'gpu'"),
    (dict(threads=0), ValueError, "threads: got 0"),
    (dict(threads=True), TypeError, "threads: got bool"),
    (dict(threads=2.0), TypeError, "threads: got float"),
    (dict(numerics="fast"), ValueError, "numerics: got 'fast'"),
    (dict(numerics=[]), ValueError, "numerics"),
    (dict(mmap=1), TypeError, "mmap: got 1"),
    (dict(verify="md5"), ValueError, "verify: got 'md5'"),
    (dict(revision="main", path="."), ValueError, "revision"),
    (dict(path="/no/such/folder"), FileNotFoundError, "/no/such/folder"),
])
def test_load_refuses(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        dsv4.load(**arguments)


def test_threads_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    monkeypatch.delenv("DSV4_NUM_THREADS", raising=False)
    assert _thread_count(None) == 3
    monkeypatch.setenv("DSV4_NUM_THREADS", "2")
    assert _thread_count(None) == 2
    assert _thread_count(np.int64(5)) == 5
    monkeypatch.setenv("DSV4_NUM_THREADS", "many")
    with pytest.raises(ValueError, match="DSV4_NUM_THREADS: got 'many'"):
        dsv4.load()


def test_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_CPU_DISABLE", "avx9")
    with pytest.raises(ValueError, match="avx9"):
        dsv4.load()
    with pytest.raises(ValueError, match="avx9"):
        dsv4.kernel_info()


def test_disabled_sets_change_no_bit(
    model: dsv4.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = model.session().append("Now is the winter", logits="all")
    monkeypatch.setenv("DSV4_CPU_DISABLE", "avx2")
    with dsv4.load(threads=1) as portable:
        assert set(portable.kernel_info.values()) == {"ref"}
        got = portable.session().append("Now is the winter", logits="all")
    np.testing.assert_array_equal(got, wanted)


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 20)
    monkeypatch.setattr(loading._core, "Model", None)  # nothing may be loaded
    for mmap in (True, False):
        with pytest.raises(MemoryError, match=r"needed .* free 1.00 MiB"):
            dsv4.load(mmap=mmap)


def test_mapped_experts_need_not_fit(
    model: dsv4.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = dataclasses.replace(model.plan, memory=1).resident
    assert least < model.plan.total
    monkeypatch.setattr(memory, "available_memory", lambda: least)
    with dsv4.load(threads=1) as small:
        assert small.plan.resident == least
        assert small.plan.experts_in_memory == model.config.num_experts_per_tok
        assert "routed experts; the others are read from disk" in repr(small)
    with pytest.raises(MemoryError):
        dsv4.load(mmap=False, threads=1)
    monkeypatch.setattr(memory, "available_memory", lambda: least - 1)
    with pytest.raises(MemoryError):
        dsv4.load(threads=1)


def test_address_space_is_a_limit(script: Callable[..., Any]) -> None:
    done = script("""
import resource, dsv4, dsv4.loading
used = int(open("/proc/self/statm").read().split()[0]) * 4096
needed = dsv4.plan(dsv4.loading.DEFAULT_MODEL, context=2048).total
resource.setrlimit(resource.RLIMIT_AS, (used + needed // 2, resource.RLIM_INFINITY))
try:
    dsv4.load(threads=1)
except MemoryError as error:
    print(error)
""")
    assert done.stdout.startswith("memory: needed "), done.stderr


def test_owned_memory_gives_the_same(model: dsv4.Model) -> None:
    with dsv4.load(mmap=False, threads=1) as owned:
        assert "in memory" in repr(owned)
        np.testing.assert_array_equal(
            owned.session().append("To be"), model.session().append("To be"))


def test_verify_before_a_load(nano: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "nano"
    shutil.copytree(nano("nano-odd"), folder)
    with pytest.raises(FileNotFoundError, match="manifest"):
        dsv4.load(folder, verify="crc")
    checksums.manifest(folder, save=folder)
    dsv4.load(folder, verify="crc").close()
    shard = sorted(folder.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(dsv4.FormatError, match="checksum"):
        dsv4.load(folder, verify="crc")


def test_numerics_differ(flash: dsv4.Model) -> None:
    ids = [0, *range(7, 40)]
    with dsv4.load(flash.path, numerics="weights", threads=1) as weights:
        assert weights.numerics == "weights" and "weights numerics" in repr(weights)
        assert not np.array_equal(weights.session().append(ids), flash.session().append(ids))


def test_april_switches(flash: dsv4.Model) -> None:
    ids = [0, *range(7, 40)]
    with dsv4.load(flash.path, april_kv=True, threads=1) as april:
        assert not np.array_equal(april.session().append(ids), flash.session().append(ids))
    options = loading._options("cpu", 1, "official", True, False, True)
    assert options["april_shared"] == 1 and options["april_kv"] == 0


def test_no_tokenizer_means_ids(flash: dsv4.Model) -> None:
    assert flash.tokenizer is None
    with pytest.raises(ValueError, match="prompt: got text, but .* no tokenizer.json"):
        flash.session().append("text")


# ---- close ----

def test_closed_objects(nano: Callable[[str], Path]) -> None:
    loaded = dsv4.load(nano("nano-odd"), threads=1)
    session, view = loaded.session(), loaded._core.tensor("norm.weight")
    session.append([0, 1, 2])
    before = view.copy()
    loaded.close()
    loaded.close()
    assert loaded.closed and "closed" in repr(loaded)
    np.testing.assert_array_equal(view, before)
    assert session.position == 3 and session.tokens.tolist() == [0, 1, 2]
    streams = np.zeros((1, loaded.config.hc_mult, loaded.config.hidden_size), np.float32)
    for call in (lambda: session.append([3]), lambda: loaded.session(), lambda: loaded.step(
            [(session, [1])]), lambda: loaded.generate([0]), lambda: loaded.kernel_info,
            lambda: loaded.layers[0](streams, [0]), lambda: loaded._core.tensor("norm.weight")):
        with pytest.raises(ValueError, match="the model is closed"):
            call()
    session.close()
    session.close()
    assert repr(session) == "<dsv4.Session, closed>"
    with pytest.raises(ValueError, match="the session is closed"):
        _ = session.position


def test_weights_stay_as_long_as_somebody_uses_them(tmp_path: Path) -> None:
    folder = nano_module.make_stored("nano-odd", tmp_path)

    def mapped() -> bool:
        gc.collect()
        return str(folder) in Path("/proc/self/maps").read_text()

    loaded = dsv4.load(folder, threads=1)
    view = loaded._core.tensor("norm.weight")
    session = loaded.session()
    wanted = view.copy()
    loaded.close()
    assert mapped()
    del session
    assert mapped()
    np.testing.assert_array_equal(view, wanted)
    assert not view.flags.writeable
    with pytest.raises(ValueError):
        view.flags.writeable = True
    part = view[3:5]
    del view
    assert mapped()
    del part
    assert not mapped()
    loaded = dsv4.load(folder, threads=1)
    session = loaded.session()
    loaded.close()
    assert mapped() and session.position == 0
    del session
    assert not mapped()


# ---- sessions ----

def test_append_shapes_and_position(flash: dsv4.Model) -> None:
    session = flash.session()
    vocab = flash.config.vocab_size
    rows = session.append([0, 5, 6], logits="all")
    assert rows.shape == (3, vocab) and rows.dtype == np.float32
    assert session.append([7]).shape == (1, vocab)
    assert session.append([8, 9], logits="none") is None
    assert session.position == 6 and session.tokens.dtype == np.int32
    assert session.tokens.tolist() == [0, 5, 6, 7, 8, 9]
    assert session.nbytes > 0 and "position 6" in repr(session)
    with flash.session() as other:
        np.testing.assert_array_equal(other.append([0, 5, 6], logits="last"), rows[-1:])


def test_text_gets_bos_at_position_zero_only(model: dsv4.Model) -> None:
    assert model.tokenizer is not None
    session = model.session()
    session.append("Good night", logits="none")
    session.append(", sweet", logits="none")
    encode = model.tokenizer.encode
    wanted = [model.config.bos_token_id, *encode("Good night"), *encode(", sweet")]
    assert session.tokens.tolist() == wanted
    other = model.session()
    for text in ("Good night", ", sweet"):
        model.step([(other, text)], logits="none")
    assert other.tokens.tolist() == wanted


def test_markers_in_text_are_plain_unless_asked(model: dsv4.Model) -> None:
    marker = "<｜User｜>"
    assert model.tokenizer is not None
    token = model.tokenizer.token_to_id(marker)
    assert token is not None
    assert token not in model.ids(f"a {marker}")
    assert token in model.ids(f"a {marker}", special=True)


def test_step_is_the_same_alone_and_together(flash: dsv4.Model) -> None:
    prompts = [[0, 1, 2], [0], list(range(40)), [5, 6]]
    alone = [flash.session().append(ids, logits="all") for ids in prompts]
    together = flash.step([(flash.session(), ids) for ids in prompts], logits="all")
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)
    assert flash.step([(flash.session(), [1])], logits="none") == [None]


def test_step_is_atomic(flash: dsv4.Model) -> None:
    a, b = flash.session(), flash.session()
    a.append([0, 1])
    before = a.append([2]).copy()
    a, c = flash.session(), flash.session()
    a.append([0, 1])
    with pytest.raises(ValueError, match=r"segments\[1\]\[1\]: got 512"):
        flash.step([(a, [2]), (b, [1, 512])])
    with pytest.raises(ValueError, match="occurs twice"):
        flash.step([(a, [2]), (c, [1]), (a, [2])])
    assert (a.position, b.position, c.position) == (2, 0, 0)
    np.testing.assert_array_equal(a.append([2]), before)


def test_step_refuses(flash: dsv4.Model, model: dsv4.Model) -> None:
    session = flash.session()
    for segments, error, says in (
        ([], ValueError, "segments"), ([(session, [])], ValueError, r"segments\[0\]"),
        ([(None, [1])], TypeError, "wanted a Session"),
        ([(model.session(), [1])], ValueError, "another model"),
        ([(session, "text")], ValueError, r"segments\[0\]: got text"),
    ):
        with pytest.raises(error, match=says):
            flash.step(segments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logits: got 'first'"):
        session.append([1], logits="first")  # type: ignore[call-overload]
    assert session.position == 0


def test_context_ends(model: dsv4.Model) -> None:
    context = model.config.max_position_embeddings
    session = model.session()
    with pytest.raises(ValueError, match=f"prompt: got {context + 1} tokens at position 0"):
        session.append([5] * (context + 1))
    session.append([5] * 8, logits="none")
    with pytest.raises(ValueError, match="at position 8"):
        model.step([(session, [5] * (context - 7))])
    assert session.position == 8


# ---- ids: TRUST A1, A3 ----

@pytest.mark.parametrize(("ids", "error", "says"), [
    ([-1], ValueError, r"prompt\[0\]: got -1, wanted 0 <= id < 512"),
    ([0, 512], ValueError, r"prompt\[1\]: got 512"),
    ([2**31 - 1], ValueError, "2147483647"), ([2**31], ValueError, "2147483648"),
    ([2**63], ValueError, "9223372036854775808"), ([2**200], ValueError, "wanted 0 <= id < 512"),
    ([True], TypeError, r"prompt\[0\]: got bool"), ([1.0], TypeError, "got float"),
    (["1"], TypeError, "got str"), ([None], TypeError, "got NoneType"), (b"ab", TypeError, "bytes"),
    (None, TypeError, "NoneType"), (5, TypeError, "got int"), ({1: 2}, TypeError, "dict"),
    ({1, 2}, TypeError, "set"), ([], ValueError, "no tokens"), ("", ValueError, "empty string"),
    (np.array([1.0]), TypeError, "float64"), (np.array([[1]]), TypeError, "2 dimensions"),
    (np.array(3), TypeError, "0 dimensions"), (np.array([True]), TypeError, "bool"),
    (np.array([-1], np.int8), ValueError, "got -1"),
    (np.array([2**64 - 1], np.uint64), ValueError, "got 18446744073709551615"),
    (np.array([], np.int32), ValueError, "no tokens"), (np.array(["a"]), TypeError, "prompt"),
    (np.array([1], object), TypeError, "object"),
])
def test_ids_refused(flash: dsv4.Model, ids: Any, error: type[Exception], says: str) -> None:
    session = flash.session()
    with pytest.raises(error, match=says):
        session.append(ids)
    if isinstance(ids, list) and ids == ["1"]:
        error = ValueError  # a list of texts
    with pytest.raises(error):
        flash.generate(ids, max_new_tokens=1)
    assert session.position == 0


@pytest.mark.parametrize("ids", [
    [np.int64(3), np.uint8(6), 9], (3, 6, 9), range(3, 10, 3), np.arange(3, 10)[::3],
    np.array([9, 6, 3])[::-1], np.array([3, 6, 9], ">i2"), np.array([3, 6, 9], np.uint64),
    np.array([3, 6, 9], "<u4"),
], ids=lambda ids: type(ids).__name__ + str(getattr(ids, "dtype", "")))
def test_ids_taken(flash: dsv4.Model, ids: Any) -> None:
    session = flash.session()
    session.append(ids, logits="none")
    assert session.tokens.tolist() == [3, 6, 9]


def test_ids_last_and_read_only(flash: dsv4.Model) -> None:
    last = flash.config.vocab_size - 1
    ids = np.array([0, last])
    ids.flags.writeable = False
    session = flash.session()
    session.append(ids, logits="none")
    session.tokens[:] = 0  # a copy
    assert session.tokens.tolist() == [0, last]


def test_ids_that_change_while_they_are_read(flash: dsv4.Model) -> None:
    class Shrinks:
        def __index__(self) -> int:
            ids.clear()
            return 1

    ids: list[Any] = [Shrinks(), *range(100)]
    assert len(flash.ids(ids)) == 101  # type: ignore[arg-type]

    class Raises:
        def __index__(self) -> int:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        flash.ids([1, Raises()])  # type: ignore[list-item]


# ---- layers ----

def test_layer_alone_is_the_layer_of_a_step(flash: dsv4.Model) -> None:
    ids = [0, *range(3, 40)]
    streams: list[Any] = []
    for i in range(2):
        c = flash.config
        after = np.empty((len(ids), c.hc_mult, c.hidden_size), np.float32)
        tap = (i, _core.VALUES.index("streams"), after)
        flash._core.step([(flash.session()._core, ids, 0, None, [tap])], None)
        streams.append(after)
    got = flash.layers[1](streams[0], ids)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, streams[1])
    np.testing.assert_array_equal(flash.layers[1](streams[0].astype(np.float64), ids), streams[1])
    strided = np.repeat(streams[0], 2, axis=0)[::2]
    np.testing.assert_array_equal(flash.layers[1](strided, ids), streams[1])


def test_layer_refuses(flash: dsv4.Model) -> None:
    c = flash.config
    good = np.zeros((2, c.hc_mult, c.hidden_size), np.float32)
    layer = flash.layers[0]
    for streams, ids, error, says in (
        (good[:, :, 1:], [0, 1], ValueError, r"streams: got shape \(2, 4, 255\)"),
        (good[0], [0], ValueError, "streams"), (good[:0], [], ValueError, "streams"),
        (good.astype(np.int32), [0, 1], TypeError, "int32"), (good, [0], ValueError, "got 1"),
        (good, [0, 512], ValueError, r"token_ids\[1\]"), (good, "ab", TypeError, "token_ids"),
        ("text", [0], TypeError, "streams"),
    ):
        with pytest.raises(error, match=says):
            layer(streams, ids)  # type: ignore[arg-type]


def test_bf16_rounding() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -2.5, 3.3895e38, np.inf, np.nan, 1e-40, -0.0],
                      np.float32)
    # 1 + 2^-8 lies between two codes: to even; 1 + 3 * 2^-8 likewise, up
    assert to_bf16(values).tolist()[:4] == [0x3F80, 0x3F80, 0x3F82, 0xC020]
    back = from_bf16(to_bf16(values))
    assert np.isinf(back[5]) and np.isnan(back[6]) and np.signbit(back[8])
    codes = np.arange(1 << 16, dtype=np.uint16)
    exact = codes[~np.isnan(from_bf16(codes))]
    np.testing.assert_array_equal(to_bf16(from_bf16(exact)), exact)
