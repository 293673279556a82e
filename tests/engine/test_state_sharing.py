# SPDX-License-Identifier: Apache-2.0
"""Saves of a growing conversation share their rows on disk, on file systems that clone.

Cloning itself is played by a copy that refuses what the kernel refuses; every file must be, byte
for byte, what it is without it.
"""

import errno
import fcntl
import os

import numpy as np
import pytest
from harness import prompt

import dsv4
from dsv4 import state_sharing

LONG = 4000


@pytest.fixture
def cloned(monkeypatch):
    """Ranges that were cloned: (offset in the earlier file, bytes, offset in the new one)."""
    ranges = []

    def ioctl(to, request, argument):
        assert request == state_sharing.FICLONERANGE
        source, offset, nbytes, at = state_sharing.RANGE.unpack(argument)
        assert fcntl.fcntl(to, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        end = os.fstat(source).st_size
        if offset % 4096 or at % 4096 or not nbytes or offset + nbytes > end or nbytes % 4096:
            raise OSError(errno.EINVAL, "the kernel would refuse")
        os.pwrite(to, os.pread(source, nbytes, offset), at)
        ranges.append((offset, nbytes, at))
        return 0

    monkeypatch.setattr(state_sharing.fcntl, "ioctl", ioctl)
    return ranges


@pytest.fixture(scope="module")
def grown(tiny):
    """A session of LONG tokens, and one half as long with the same beginning."""
    ids = prompt(tiny, LONG, seed=4)
    half = tiny.session()
    half.append(ids[: LONG // 2], logits="none")
    whole = half.fork()
    whole.append(ids[LONG // 2 :], logits="none")
    return half, whole


def alone(session: dsv4.Session, path) -> bytes:
    """The file of a session that knows of no earlier one."""
    fresh = dsv4.Session(session.model, session._core)
    fresh.save(path)
    return path.read_bytes()


def test_a_later_save_shares(grown, tmp_path, cloned) -> None:
    half, whole = (session.fork() for session in grown)
    half.save(tmp_path / "half")
    assert not cloned
    whole._file = half._file
    whole.save(tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == alone(whole, tmp_path / "plain")
    rows = (tmp_path / "half").stat().st_size - half._core.fixed().nbytes - 4 * LONG // 2
    shared = sum(nbytes for _, nbytes, _ in cloned)
    assert shared > 0.5 * rows  # whole pages of whole blocks, of every layer
    # a loaded session, its forks, and a file that replaces the earlier one
    del cloned[:]
    again = whole.model.load_session(tmp_path / "half").fork()
    again.append([1, 2, 3], logits="none")
    again.save(tmp_path / "half")
    assert sum(nbytes for _, nbytes, _ in cloned) >= shared
    assert (tmp_path / "half").read_bytes() == alone(again, tmp_path / "plain")
    loaded = whole.model.load_session(tmp_path / "half", verify=True)
    assert loaded.tokens.tolist() == again.tokens.tolist()


def test_only_equal_bytes_are_shared(grown, tmp_path, cloned) -> None:
    """Another past and a damaged earlier file are written: nothing is taken on trust."""
    half, whole = (session.fork() for session in grown)
    half.save(tmp_path / "half")
    other = whole.model.session()
    other.append(np.roll(whole.tokens, 1), logits="none")
    other._file = half._file
    other.save(tmp_path / "other")
    assert not cloned
    data = bytearray((tmp_path / "half").read_bytes())
    sections = [at for at, _ in _rows(tmp_path / "half")]
    for at in sections:
        data[at] ^= 1
    (tmp_path / "half").write_bytes(data)
    whole._file = half._file
    whole.save(tmp_path / "whole")
    assert not cloned
    assert (tmp_path / "whole").read_bytes() == alone(whole, tmp_path / "plain")


def _rows(path) -> list[tuple[int, int]]:
    from dsv4.state_file import sections_of

    with open(path, "rb") as file:
        found = sections_of(file.fileno(), str(path))
    return [place for (name, _), place in found.items() if name in ("compressed", "index")]


@pytest.mark.parametrize("earlier", ["gone", "empty", "other", "folder"])
def test_an_earlier_file_that_is_none(grown, tmp_path, cloned, earlier) -> None:
    half, whole = (session.fork() for session in grown)
    half.save(tmp_path / "half")
    (tmp_path / "half").unlink()
    match earlier:
        case "empty":
            (tmp_path / "half").write_bytes(b"")
        case "other":
            (tmp_path / "half").write_bytes(bytes(8192))
        case "folder":
            (tmp_path / "half").mkdir()
    whole._file = half._file
    whole.save(tmp_path / "whole")
    assert not cloned
    assert (tmp_path / "whole").read_bytes() == alone(whole, tmp_path / "plain")


def test_file_systems_that_cannot(grown, tmp_path, monkeypatch) -> None:
    """One attempt; then everything is written."""
    half, whole = (session.fork() for session in grown)
    half.save(tmp_path / "half")
    attempts = []

    def ioctl(*arguments):
        attempts.append(arguments)
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(state_sharing.fcntl, "ioctl", ioctl)
    whole._file = half._file
    whole.save(tmp_path / "whole")
    assert len(attempts) == 1
    assert (tmp_path / "whole").read_bytes() == alone(whole, tmp_path / "plain")


def test_a_clone_that_fails(grown, tmp_path, monkeypatch) -> None:
    """A full disk: the old file stays, no other is left, and the sentence has the numbers."""
    half, whole = (session.fork() for session in grown)
    half.save(tmp_path / "half")
    before = (tmp_path / "half").read_bytes()

    def ioctl(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state_sharing.fcntl, "ioctl", ioctl)
    whole._file = half._file
    with pytest.raises(OSError, match=r"it needs \d+ bytes, \d+ are free"):
        whole.save(tmp_path / "half")
    assert (tmp_path / "half").read_bytes() == before and os.listdir(tmp_path) == ["half"]
    monkeypatch.undo()
    whole.save(tmp_path / "half")
    assert (tmp_path / "half").read_bytes() == alone(whole, tmp_path / "plain")
