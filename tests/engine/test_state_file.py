# SPDX-License-Identifier: Apache-2.0
"""Saved sessions go on with the same bits: at any position, in any process, on any CPU.

`test_every_part_is_needed` shows what these tests see: a file that lacks any one part of the state
gives other logits.
"""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import fed, pieces, prompt, same, state
from state_files import parts, rewritten

import dsv4
from dsv4 import state_file

LENGTH, LONG = 300, 3000


@pytest.fixture(scope="module")
def straight(tiny):
    """LENGTH ids, and all their logits in one piece."""
    ids = prompt(tiny, LENGTH)
    return ids, fed(tiny, [ids])


@pytest.fixture(scope="module")
def far(tiny):
    """LONG ids, and all their logits."""
    ids = prompt(tiny, LONG, seed=3)
    return ids, fed(tiny, [ids])


def test_every_split(tiny, straight, tmp_path) -> None:
    ids, want = straight
    file = tmp_path / "state"
    with tiny.session() as trunk:
        for at in range(1, LENGTH):
            trunk.append(ids[at - 1 : at], logits="none")
            trunk.save(file)
            loaded = tiny.load_session(file)
            assert loaded.position == at
            same(loaded.append(ids[at:], logits="all"), want[at:], f"saved at {at}")
        for a, b in zip(state(trunk), state(tiny.load_session(file)), strict=True):
            same(a, b)
    assert os.listdir(tmp_path) == ["state"]


def test_an_empty_session(tiny, straight, tmp_path) -> None:
    ids, want = straight
    tiny.session().save(tmp_path / "state")
    loaded = tiny.load_session(tmp_path / "state", verify=True)
    assert loaded.position == 0
    same(loaded.append(ids, logits="all"), want)


@pytest.mark.parametrize("options", [{}, {"verify": True}, {"mmap": False}])
def test_random_points_of_a_long_prompt(tiny, far, tmp_path, options) -> None:
    """Saved, loaded, gone on and saved again over the file it came from."""
    ids, want = far
    file = tmp_path / "state"
    points = sorted(np.random.default_rng(8).choice(np.arange(300, LONG), 12, replace=False))
    session, at = tiny.session(), 0
    for point in points:
        same(session.append(ids[at:point], logits="all"), want[at:point], f"to {point}")
        session.save(file)
        session, at = tiny.load_session(file, **options), point
    same(session.append(ids[at:], logits="all"), want[at:])


def test_forks_and_rewinds_of_loaded_sessions(tiny, far, tmp_path) -> None:
    ids, want = far
    with tiny.session() as session:
        session.append(ids[:2048], logits="none")  # whole blocks alone
        session.save(tmp_path / "state")
    loaded = tiny.load_session(tmp_path / "state")
    forks = [loaded.fork() for _ in range(4)]
    other = prompt(tiny, 200, seed=9)
    for i, fork in enumerate(forks):
        fork.append(other[: 40 * i + 1], logits="none")
    same(loaded.append(ids[2048:2500], logits="all"), want[2048:2500])
    loaded.rewind(2048)
    forks[0].rewind(2048)
    loaded.close()
    same(forks[0].append(ids[2048:], logits="all"), want[2048:])
    forks[1].rewind(1000)  # nothing is kept from before: computed again
    same(forks[1].append(ids[1000:1300], logits="all"), want[1000:1300])


def test_later_saves_leave_loaded_sessions_alone(tiny, far, tmp_path) -> None:
    """Ten sessions of one growing file, each continued after all were written."""
    ids, want = far
    file, loaded = tmp_path / "state", []
    session = tiny.session()
    for i, piece in enumerate(pieces(ids[:2500], 250)):
        session.append(piece, logits="none")
        session.save(file)
        loaded.append((250 * (i + 1), tiny.load_session(file)))
    file.unlink()
    for at, each in loaded:
        same(each.append(ids[at : at + 100], logits="all"), want[at : at + 100], f"at {at}")


def test_a_session_goes_on_while_it_is_saved(tiny, far, tmp_path, monkeypatch) -> None:
    ids, want = far
    session = tiny.session()
    session.append(ids[:1500], logits="none")
    sections = state_file._sections

    def moved_on(*arguments):
        session.append(ids[1500:1700], logits="none")
        return sections(*arguments)

    monkeypatch.setattr(state_file, "_sections", moved_on)
    session.save(tmp_path / "state")
    assert session.position == 1700
    loaded = tiny.load_session(tmp_path / "state")
    same(loaded.append(ids[1500:1700], logits="all"), want[1500:1700])


def test_files_are_no_larger_than_the_state(tiny, far, tmp_path) -> None:
    with tiny.session() as session:
        session.append(far[0], logits="none")
        session.save(tmp_path / "state")
        plan = state_file.layout(tiny._core, session.position)
        held = sum(section.nbytes for section in plan.sections)
        assert held - plan.sections[0].nbytes <= session.nbytes
        assert (tmp_path / "state").stat().st_size <= held + 4096 * (len(plan.sections) + 1)


OTHER_PROCESS = """
import hashlib, json, sys
import numpy as np
import dsv4
model = dsv4.load(sys.argv[1], threads=2)
computed, step = [], model._core
class Counting:
    def __getattr__(self, name):
        return getattr(step, name)
    def step(self, segments, seconds):
        computed.append(sum(len(ids) for _, ids, _, _ in segments))
        return step.step(segments, seconds)
out = {}
for path in sys.argv[2:]:
    session = model.load_session(path)
    core, model._core = model._core, Counting()
    rows = session.append([1, 2, 3] * 22, logits="all")
    model._core = core
    out[path] = hashlib.sha256(rows.tobytes()).hexdigest()
sets = {v.partition("/")[0] for v in model.kernel_info.values()}
print(json.dumps([out, computed, sorted(sets)]))
"""


@pytest.mark.parametrize("disable", ["", "avx512", "avx512,avx2"])
def test_another_process_on_another_cpu(
    tiny, tiny_folder, far, tmp_path, disable, monkeypatch
) -> None:
    """It computes the new tokens, no other, and gets what this process gets."""
    want = {}
    session = tiny.session()
    for i, piece in enumerate(pieces(far[0], 700)):
        session.append(piece, logits="none")
        session.save(tmp_path / str(i))
        rows = session.fork().append([1, 2, 3] * 22, logits="all")
        want[str(tmp_path / str(i))] = hashlib.sha256(rows.tobytes()).hexdigest()
    monkeypatch.setenv("DSV4_CPU_DISABLE", disable)
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, str(tiny_folder), *want], check=True,
        capture_output=True, text=True)
    got, computed, sets = json.loads(done.stdout)
    assert got == want and computed == [66] * len(want)
    assert not set(sets) & set(disable.split(","))


def fixed_parts(model: dsv4.Model) -> list[tuple[str, int, int]]:
    """(name, begin, end) of the parts of the fixed state, as csrc/gen/kvcache.c lays them out."""
    config, at, found = model.config, 0, []
    (_, stores) = dsv4._core.stores(model._core, 4096)
    row = stores[0][3]

    def part(name: str, nbytes: int) -> None:
        nonlocal at
        found.append((name, at, at + nbytes))
        at += -(-nbytes // 64) * 64

    for layer, ratio in enumerate(config.compress_ratios[: config.num_hidden_layers]):
        part(f"window of layer {layer}", config.sliding_window * row)
        if ratio:
            wide = 2 if ratio == 4 else 1
            for name in ("k", "gate"):
                part(f"{name} of layer {layer}", ratio * wide * wide * config.head_dim * 4)
        if ratio == 4:
            for name in ("index k", "index gate"):
                part(f"{name} of layer {layer}", ratio * 4 * config.index_head_dim * 4)
    return found


def test_every_part_is_needed(tiny, far, tmp_path) -> None:
    """A file that lacks one part of the state gives other logits, whichever part it is."""
    ids, want = far
    at = 1030  # inside a window of every layer
    with tiny.session() as session:
        session.append(ids[:at], logits="none")
        session.save(tmp_path / "whole")
    header, sections = parts(tiny, tmp_path / "whole")
    named = fixed_parts(tiny)
    assert named[-1][2] <= len(sections["fixed", -1]) < named[-1][2] + 64
    cuts = [(f"{name} of layer {layer}", (name, layer), 0, len(data))
            for (name, layer), data in sections.items() if layer >= 0]
    cuts += [(name, ("fixed", -1), begin, end) for name, begin, end in named]

    def dropped(begin, end, key):
        def change(_, sections):
            sections[key][begin:end] = bytes(end - begin)
        return change

    for name, key, begin, end in cuts:
        rewritten(tiny, tmp_path / "whole", tmp_path / "part", dropped(begin, end, key))
        with tiny.load_session(tmp_path / "part") as loaded:
            got = loaded.append(ids[at : at + 150], logits="all")
        assert (got != want[at : at + 150]).any(), f"nobody misses {name}"
    rewritten(tiny, tmp_path / "whole", tmp_path / "part", lambda *_: None)
    same(tiny.load_session(tmp_path / "part").append(ids[at:], logits="all"), want[at:])


def test_text_models(nano, tmp_path) -> None:
    """All five tiny checkpoints: files, formats and tokenizers as published ones have them."""
    for name in ("nano-odd", "nano-flash"):
        with dsv4.load(nano(name), threads=1) as model:
            session = model.session()
            session.append(prompt(model, 140), logits="none")
            session.save(tmp_path / name)
            loaded = model.load_session(tmp_path / name)
            same(loaded.append([5, 6]), session.append([5, 6]), name)
    with dsv4.load() as model:
        session = model.session()
        session.append("ROMEO:\nBut soft", logits="none")
        session.save(tmp_path / "text")
        same(model.load_session(tmp_path / "text").append([5]), session.append([5]))


def test_pickle_says_what_to_do(tiny) -> None:
    with pytest.raises(TypeError, match=r"save\(\).*load_session"):
        pickle.dumps(tiny.session())


def test_paths(tiny, tmp_path, monkeypatch) -> None:
    session = tiny.session()
    session.append([1, 2, 3], logits="none")
    monkeypatch.chdir(tmp_path)
    names = ["a b ü 😀", "x" * 250, os.fsdecode(b"\xff\xfe"), Path("p"), b"bytes"]
    for name in names:
        session.save(name)
        assert tiny.load_session(name).position == 3
    session.append([4], logits="none")
    Path("link").symlink_to("p")
    session.save("link")
    assert Path("link").is_symlink() and tiny.load_session("p").position == 4
    Path("p").chmod(0o640)
    session.save("p")
    assert Path("p").stat().st_mode & 0o777 == 0o640
    assert len(os.listdir(".")) == len(names) + 1
    for name, error, match in (
        (tmp_path, dsv4.FormatError, "directory"), ("nowhere/a", FileNotFoundError, "nowhere"),
        ("p/a", NotADirectoryError, "p"), ("a\0b", ValueError, "null byte"),
        (7, TypeError, "PathLike"),
    ):
        with pytest.raises(error, match=match):
            session.save(name)
        with pytest.raises(error, match=match):
            tiny.load_session(name)
    os.mkfifo("fifo")
    for work in (session.save, tiny.load_session):
        with pytest.raises(dsv4.FormatError, match="FIFO"):
            work("fifo")
    with pytest.raises(dsv4.FormatError, match="device"):
        tiny.load_session("/dev/zero")
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.save("p")
