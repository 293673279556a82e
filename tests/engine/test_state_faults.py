# SPDX-License-Identifier: Apache-2.0
"""Saved sessions when things go wrong: kills, full disks, damaged files, files of other models.

Source: TRUST 3, S1-S5 and F9.
"""

import errno
import os
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from harness import load, make_tiny, prompt, same, state
from state_files import make_small, parts, redigested, rewritten, write

import dsv4
from dsv4 import _core, state_file

NAME = "state"


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    return make_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def small(small_folder):
    with load(small_folder) as model:
        yield model


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    """A session of 700 tokens, its file, and what follows it."""
    session = small.session()
    session.append(prompt(small, 700), logits="none")
    path = tmp_path_factory.mktemp("saved") / NAME
    session.save(path)
    return session, path, session.fork().append(range(40), logits="all")


def written(path, data):
    path.write_bytes(data)
    return path


# ---- writing ----

class Faulty:
    """The module os in which call number `when` of `names` is not what it should be."""

    def __init__(self, names, when, act):
        self.names, self.when, self.act, self.calls = names, when, act, []

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.names:
            return real

        def call(*arguments, **keywords):
            self.calls.append(name)
            if len(self.calls) == self.when:
                return self.act(name, real, *arguments, **keywords)
            return real(*arguments, **keywords)

        return call


WRITING = ("open", "pwritev", "fchmod", "fdatasync", "fsync", "close", "replace")


def calls_of(session, path, monkeypatch, names=WRITING):
    """The calls that one save makes."""
    faulty = Faulty(names, 0, None)
    monkeypatch.setattr(state_file, "os", faulty)
    session.save(path)
    monkeypatch.undo()
    return faulty.calls


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EFBIG", "EIO"])
def test_every_failing_call(small, saved, tmp_path, monkeypatch, code) -> None:
    """The old file stays, no other is left, and the message says what is needed."""
    session, path, _ = saved
    target = written(tmp_path / NAME, b"old")
    number = getattr(errno, code)
    monkeypatch.setattr(state_file, "SYNCED", 4096)
    names = calls_of(session, target, monkeypatch)
    monkeypatch.setattr(state_file, "SYNCED", 4096)
    target.write_bytes(b"old")

    def fail(name, real, *arguments, **keywords):
        if name == "close":
            real(*arguments)
        raise OSError(number, os.strerror(number))

    for when, name in enumerate(names, 1):
        monkeypatch.setattr(state_file, "os", Faulty(WRITING, when, fail))
        with pytest.raises(OSError) as error:
            session.save(target)
        monkeypatch.setattr(state_file, "os", os)
        replaced = "replace" in names[: when - 1]
        assert os.listdir(tmp_path) == [NAME], f"{name}, call {when}"
        assert (target.read_bytes() == path.read_bytes()) if replaced else (
            target.read_bytes() == b"old"), f"{name}, call {when}"
        target.write_bytes(b"old")
        assert error.value.errno == number
        if when > 1 and when < len(names):
            assert f"needs {path.stat().st_size} bytes" in str(error.value)
            assert "are free" in str(error.value)


def test_short_writes(small, saved, tmp_path, monkeypatch) -> None:
    """A system that takes a few bytes at a time gets them all."""
    session, path, _ = saved

    class Short(Faulty):
        def __getattr__(self, name):
            if name != "pwritev":
                return getattr(os, name)
            return lambda fd, views, at: os.pwritev(fd, [views[0][: 1 + at % 1777]], at)

    monkeypatch.setattr(state_file, "os", Short((), 0, None))
    session.save(tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == path.read_bytes()


def test_a_full_disk_is_told_before_anything_is_written(small, saved, tmp_path, monkeypatch):
    session, path, _ = saved
    monkeypatch.setattr(state_file, "_free", lambda at: 1000)
    with pytest.raises(OSError, match=f"needs {path.stat().st_size} bytes, 1000 are free") as error:
        session.save(tmp_path / NAME)
    assert error.value.errno == errno.ENOSPC and not os.listdir(tmp_path)


def test_a_limit_of_the_system(small, saved, tmp_path) -> None:
    """RLIMIT_FSIZE: the kernel itself refuses to go on in the middle of the file."""
    session, path, _ = saved
    target = written(tmp_path / NAME, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="not saved") as error:
            session.save(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == [NAME] and target.read_bytes() == b"old"


def test_interrupted(small, saved, tmp_path, monkeypatch) -> None:
    session, _, want = saved
    names = calls_of(session, tmp_path / "other", monkeypatch)
    (tmp_path / "other").unlink()

    def interrupt(name, real, *arguments, **keywords):
        real(*arguments, **keywords)
        raise KeyboardInterrupt

    for when in range(3, names.index("replace") + 1):
        monkeypatch.setattr(state_file, "os", Faulty(WRITING, when, interrupt))
        with pytest.raises(KeyboardInterrupt):
            session.save(tmp_path / NAME)
        assert not os.listdir(tmp_path), (when, names[when - 1])
    monkeypatch.undo()
    same(session.fork().append(range(40), logits="all"), want)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import harness
from dsv4 import state_file
from test_state_faults import Faulty, WRITING
def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
with harness.load(sys.argv[2]) as model:
    session = model.session()
    session.append(range(90), logits="none")
    state_file.SYNCED = 16384
    faulty = state_file.os = Faulty(WRITING, int(sys.argv[4]), kill)
    session.save(sys.argv[3])
    print(len(faulty.calls))
"""


def test_killed_before_every_call(small, small_folder, saved, tmp_path) -> None:
    """The old file or the new one; what is left over goes with the next save."""
    _, path, _ = saved
    target = tmp_path / NAME
    seen = set()
    for when in range(1, 200):
        target.write_bytes(path.read_bytes())
        done = subprocess.run(
            [sys.executable, "-c", KILLED, os.path.dirname(__file__), str(small_folder),
             str(target), str(when)], capture_output=True, text=True)
        loaded = small.load_session(target, verify=True)
        seen.add(loaded.position)
        assert loaded.position in (90, 700)
        assert len(os.listdir(tmp_path)) <= 2
        if done.returncode == 0:
            assert int(done.stdout) < when and loaded.position == 90
            break
        assert done.returncode == -9, done.stderr
    assert when > 10 and seen == {90, 700} and os.listdir(tmp_path) == [NAME]


SAVING = """
import sys
import time
sys.path.insert(0, sys.argv[1])
import harness
with harness.load(sys.argv[2]) as model:
    sessions = [model.load_session(path) for path in sys.argv[4:]]
    print("ready", flush=True)
    while True:
        for session in sessions:
            session.save(sys.argv[3])
"""


@pytest.mark.parametrize("kills", [3, pytest.param(200, marks=pytest.mark.long)])
def test_killed_at_random_moments(small, small_folder, saved, tmp_path, kills) -> None:
    """One file, saved over and over: one state or the other, and one leftover at most."""
    session, path, _ = saved
    states = [path, tmp_path / "later"]
    with session.fork() as later:
        later.append([1] * 50, logits="none")
        later.save(states[1])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / NAME).write_bytes(path.read_bytes())
    draw = np.random.default_rng(kills)
    for kill in range(kills):
        with subprocess.Popen(
                [sys.executable, "-c", SAVING, os.path.dirname(__file__), str(small_folder),
                 str(folder / NAME), *map(str, states)], stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(draw.uniform(0, 0.05))
            process.kill()
        assert small.load_session(folder / NAME, verify=True).position in (700, 750), kill
        assert len(os.listdir(folder)) <= 2
    session.save(folder / NAME)
    assert os.listdir(folder) == [NAME]


def test_leftovers(small, saved, tmp_path) -> None:
    """Temporary files of dead processes go, those of living ones and other names stay."""
    session, _, _ = saved
    with subprocess.Popen([sys.executable, "-c", "pass"]) as dead:
        pass
    gone = f".{NAME}.{dead.pid}.01234567.tmp"
    stay = [f".{NAME}.{os.getpid()}.01234567.tmp", f".{NAME}.1.01234567.tmp",
            f".{NAME}x.{dead.pid}.01234567.tmp", f".{NAME}.{dead.pid}.tmp"]
    for name in (gone, *stay):
        (tmp_path / name).touch()
    session.save(tmp_path / NAME)
    assert sorted(os.listdir(tmp_path)) == sorted([NAME, *stay])


# ---- reading what is damaged ----

def refused(model, path) -> str:
    with pytest.raises(dsv4.FormatError) as error:
        model.load_session(path, verify=True)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("stride", [61, pytest.param(1, marks=pytest.mark.long)])
def test_every_byte(small, saved, tmp_path, stride) -> None:
    """The first 5,000 bytes are head and tokens: all of them; of the others every 61st."""
    _, path, _ = saved
    data = path.read_bytes()
    target = written(tmp_path / NAME, data)
    with target.open("r+b", buffering=0) as file:
        for at in [*range(5000), *range(5000, len(data), stride)]:
            for bit in (1, 0x80, 0xFF)[: 1 if stride > 1 else 3]:
                os.pwrite(file.fileno(), bytes([data[at] ^ bit]), at)
                refused(small, target)
            os.pwrite(file.fileno(), data[at : at + 1], at)
    small.load_session(target, verify=True)


@pytest.mark.parametrize("stride", [97, pytest.param(1, marks=pytest.mark.long)])
def test_every_length(small, saved, tmp_path, stride) -> None:
    _, path, _ = saved
    data = path.read_bytes()
    target = written(tmp_path / NAME, data)
    for n in [*range(len(data) - 1, 200, -stride), *range(200, -1, -1)]:
        os.truncate(target, n)
        assert "file size" in refused(small, target)
    refused(small, written(target, data + b"\0"))
    refused(small, written(target, data[:8] + data))


def test_every_page_zeroed(small, saved, tmp_path) -> None:
    _, path, _ = saved
    data = path.read_bytes()
    for at in range(0, len(data), 4096):
        assert any(data[at : at + 4096])
        torn = data[:at] + bytes(len(data[at : at + 4096])) + data[at + 4096 :]
        refused(small, written(tmp_path / NAME, torn))


def test_damaged_blocks_are_found_when_they_are_read(small, saved, tmp_path) -> None:
    """Without verify: no wrong bit comes out, and a step that meets one leaves no trace."""
    session, path, want = saved
    data = path.read_bytes()
    _, sections = parts(small, path)
    head = state_file.PRELUDE.unpack_from(data)[3]
    found = 0
    for section in state_file.layout(small._core, 700).sections[2:]:
        for first in range(0, section.nbytes // section.piece * section.piece, section.piece):
            torn = bytearray(data)
            torn[head + section.offset + first + section.piece // 3] ^= 4
            loaded = small.load_session(written(tmp_path / NAME, torn))
            beside = session.fork()
            row = 64 * first // section.piece
            where = f"{tmp_path / NAME}: layer {section.layer}: .* row {row} "
            with pytest.raises(dsv4.FormatError, match=where):
                state(loaded)
            with pytest.raises(dsv4.FormatError, match=where):
                loaded.save(tmp_path / "copy")
            try:
                out = small.step([(beside, range(40)), (loaded, range(40))], logits="all")
            except dsv4.FormatError as error:
                found += 1
                assert f"layer {section.layer}:" in str(error)
                assert (loaded.position, beside.position) == (700, 700)
                same(beside.append(range(40), logits="all"), want)
            else:
                same(out[1], want)
    assert found >= 5 and sorted(os.listdir(tmp_path)) == [NAME]


def test_damaged_steps_can_be_repeated(small, saved, tmp_path) -> None:
    """A step that failed is as if it had not been: mended, the same session goes on."""
    _, path, want = saved
    data = path.read_bytes()
    at = data.index(bytes(parts(small, path)[1]["compressed", 1]))
    target = written(tmp_path / NAME, data)
    with target.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), bytes([data[at] ^ 1]), at)
        loaded = small.load_session(target)
        for _ in range(3):
            with pytest.raises(dsv4.FormatError, match="layer 1: "):
                loaded.append(range(40), logits="all")
        os.pwrite(file.fileno(), data[at : at + 1], at)
        same(loaded.append(range(40), logits="all"), want)


# ---- reading what was never a state of this model ----

def test_wrong_heads(small, saved, tmp_path) -> None:
    _, path, _ = saved
    data = path.read_bytes()
    target = tmp_path / NAME

    def with_word(at, value, n=4):
        edited = bytearray(data)
        edited[at : at + n] = value.to_bytes(n, "little")
        return written(target, redigested(edited))

    assert "magic" in refused(small, written(target, b"PK\3\4" + data[4:]))
    assert "version: got 2, wanted 1: a newer dsv4" in refused(small, with_word(8, 2))
    assert "version: got 0" in refused(small, with_word(8, 0))
    for length in (0, 1, 63, 1 << 20, 1 << 30, (1 << 32) - 1):
        refused(small, with_word(12, length))
    head = state_file.PRELUDE.unpack_from(data)[3]
    for other in (0, 64, 4095, head + 1, head + 4096, 1 << 40, (1 << 64) - 1):
        edited = bytearray(data)
        edited[16:24] = other.to_bytes(8, "little")
        refused(small, written(target, edited))
    for other in (0, 1, len(data) - 1, len(data) + 1, (1 << 64) - 1):
        assert "file size" in refused(small, with_word(24, other, 8))


def test_wrong_headers(small, saved, tmp_path) -> None:
    """Right checksums over wrong numbers."""
    _, path, _ = saved
    header, sections = parts(small, path)
    target = tmp_path / NAME

    def with_header(match, **changes):
        write(small, target, header | changes, sections, 700)
        assert match in refused(small, target)

    for position in (-1, 699, 701, 2049, 1 << 31, 1 << 63, 700.0, "700", None, [700], True):
        with_header("sections" if position in (699, 701) else "position", position=position)
    for changed in ([], None, header["sections"][:-1], [*header["sections"], ["x", 0, 0, 0, 1]]):
        with_header("sections", sections=changed)
    for i in range(5):
        for other in (-1, 0, 1 << 40, "1"):
            wrong = [list(s) for s in header["sections"]]
            if wrong[3][i] != other:
                wrong[3][i] = other
                with_header("sections", sections=wrong)
    for model in (None, [], "x"):
        with_header("header", model=model)


def test_wrong_tokens(small, saved, tmp_path) -> None:
    _, path, _ = saved
    for token in (-1, 97, 1 << 30):
        def change(_, sections, token=token):
            sections["tokens", -1][400:404] = token.to_bytes(4, "little", signed=True)
        rewritten(small, path, tmp_path / NAME, change)
        assert f"token 100: got id {token}" in refused(small, tmp_path / NAME)


def test_other_models(small, small_folder, saved, tmp_path, tmp_path_factory) -> None:
    """The message names what differs, what the file says and what the model is."""
    _, path, _ = saved
    folder = tmp_path_factory.mktemp("others")
    others = [
        (make_small(folder / "a", rms_norm_eps=1e-5), {}, "config.rms_norm_eps", 1e-6, 1e-5),
        (make_small(folder / "b", index_topk=8), {}, "config.index_topk", 4, 8),
        (small_folder, {"numerics": "weights"}, "numerics", "official", "weights"),
        (small_folder, {"april_kv": True}, "april_kv", False, True),
        (small_folder, {"april_shared": True}, "april_shared", False, True),
    ]
    for other, options, field, got, wanted in others:
        with load(other, **options) as model:
            want = f"model.{field} (the state of another model): got {got!r}, wanted {wanted!r}"
            assert want in refused(model, path)
    with load(make_tiny(folder / "c")) as model:
        assert "config.compress_ratios" in refused(model, path)


def test_other_weights(small, small_folder, saved, tmp_path) -> None:
    """One changed byte in the middle of any matrix that is sampled."""
    from harness import changed

    _, path, _ = saved
    for i, name in enumerate(("layers.1.attn.wkv.weight", "norm.weight", "embed.weight")):
        def flip(data):
            data[len(data) // 2] ^= 1
        with load(changed(small_folder, tmp_path / str(i), name, flip)) as model:
            assert "model.weights" in refused(model, path)


@pytest.mark.parametrize("field", ["state_layout", "numerics_version", "tokenizer", "tensors"])
def test_other_versions(small, saved, tmp_path, field) -> None:
    _, path, _ = saved
    for other in (0, 2, "x", 1.0, None if field != "tokenizer" else True):
        def change(header, _, other=other):
            header["model"][field] = other
        rewritten(small, path, tmp_path / NAME, change)
        assert f"model.{field}" in refused(small, tmp_path / NAME)
    rewritten(small, path, tmp_path / NAME, lambda h, _: h["model"].update(more=1))
    assert "model.more" in refused(small, tmp_path / NAME)


def test_the_engine_checks_every_number_again(small, saved, tmp_path) -> None:
    """`_core.load_session` refuses what the reader of the format would not let through."""
    session, path, _ = saved
    data = path.read_bytes()
    head = state_file.PRELUDE.unpack_from(data)[3]
    plan = state_file.layout(small._core, 700)
    ids, fixed = session.tokens, bytes(parts(small, path)[1]["fixed", -1])
    table = data[state_file.HEAD + state_file.PRELUDE.unpack_from(data)[2] :]
    spans = list(state_file._spans(plan))[2:]
    good = [(store, head + section.offset, table[a:b])
            for (section, store), (a, b) in zip(plan.rows, spans, strict=True)]
    fd, whole = os.open(path, os.O_RDONLY), len(data)

    def attempt(rows=good, ids=ids, fixed=fixed, size=whole, kept=4):
        return _core.load_session(
            small._core, kept, (str(path), fd, size), True, ids, fixed, list(rows))

    try:
        assert attempt().position == 700
        store, offset, crcs = good[0]
        bad_rows = [[], good[1:], good[:-1], good[::-1], [*good, good[0]]]
        bad_rows += [[(store, at, crcs), *good[1:]] for at in (
            offset + 1, offset + 32, len(data) // 64 * 64, 1 << 40, (1 << 64) - 64)]
        bad_rows += [[(store, offset, c), *good[1:]] for c in (b"", crcs[:-4], crcs + b"1234")]
        for i in range(4):
            for value in (-1, 0, 5, 2**31 - 1):
                wrong = [*store[:i], value, *store[i + 1 :]]
                if tuple(wrong) != store:
                    bad_rows.append([(tuple(wrong), offset, crcs), *good[1:]])
        for rows in bad_rows:
            with pytest.raises(dsv4.FormatError):
                attempt(rows)
        for wrong in (dict(ids=ids[:-1]), dict(ids=ids[:0]), dict(ids=ids + np.int32(97)),
                      dict(fixed=fixed[:-1]), dict(fixed=b""), dict(size=len(data) - 1),
                      dict(size=1 << 62)):
            with pytest.raises(dsv4.FormatError):
                attempt(**wrong)
        for kept in (-1, 1025):
            with pytest.raises(ValueError, match="kept states"):
                attempt(kept=kept)
    finally:
        os.close(fd)


def test_bad_arguments(small, saved) -> None:
    _, path, _ = saved
    for keywords in (dict(verify=1), dict(mmap="yes"), dict(checkpoints=1.5), dict(verify=None)):
        with pytest.raises(TypeError, match=next(iter(keywords))):
            small.load_session(path, **keywords)
    with pytest.raises(ValueError, match="checkpoints: got 1025"):
        small.load_session(path, checkpoints=1025)


def test_checksum() -> None:
    """RFC 3720 B.4, and pieces."""
    for data, crc in ((b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA),
                      (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E), (b"", 0)):
        assert _core.crc32c(data, 0) == crc
        assert _core.crc32c(data[5:], _core.crc32c(data[:5], 0)) == crc
