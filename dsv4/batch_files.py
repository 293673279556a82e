# SPDX-License-Identifier: Apache-2.0
"""What a batch job keeps on disk, so that a kill at any moment loses nothing.

For ``out.jsonl``:

- ``out.run.json`` says whose work it is; a job that differs in one field does not continue it;
- ``out.partial.jsonl`` has a line for each row that is done, in the order of their ends:
  ``{"crc": CRC-32 of the row's text, "row": ...}``, one write() each, synced once a second;
- ``out.jsonl`` and ``out.errors.jsonl`` are written at the end, in the order of the input, under
  another name, synced and renamed.

A line that was torn or damaged is dropped: its row is done again, to the same bytes.
"""

import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from dsv4.errors import shown

SYNC_SECONDS = 1.0
READ = "input_read"
HEAD = b'{"crc":"00000000","row":'


class Log:
    """The rows that are done: appended to by one process at a time.

    Attributes
    ----------
    done : dict
        custom_id to where its row lies, and whether it failed.
    dropped : int
        Lines that were not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, tuple[int, int, bool]] = {}
        self.dropped = 0
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.fd)
            raise BlockingIOError(f"{path}: another process works on this job") from None
        self.end = 0
        self.synced = time.monotonic()

    def read(self) -> None:
        """Find the rows that are done, and cut off a torn last line."""
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    self.dropped += 1
                    break
                row = line[len(HEAD) : -2]
                if line == _line(row):
                    found = json.loads(row)
                    self.done.setdefault(found["custom_id"], (
                        self.end + len(HEAD), len(row), found["error"] is not None))
                else:
                    self.dropped += 1
                self.end += len(line)
        os.ftruncate(self.fd, self.end)

    def append(self, custom_id: str, row: bytes, failed: bool) -> None:
        """Add a row, whole or not at all."""
        line = _line(row)
        try:
            n = os.write(self.fd, line)
            if n < len(line):  # the disk is full: says why, or goes on
                n += os.write(self.fd, line[n:])
            if n < len(line):
                raise OSError(f"wrote {n} of {len(line)} bytes")
        except OSError as error:
            os.ftruncate(self.fd, self.end)
            raise OSError(
                error.errno, f"{error.strerror or error}; {len(line):,} bytes for a row were to be "
                "written; what is done is kept, start again when there is room", str(self.path),
            ) from None
        self.done[custom_id] = (self.end + len(HEAD), len(row), failed)
        self.end += len(line)
        if time.monotonic() - self.synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """To the disk."""
        os.fdatasync(self.fd)
        self.synced = time.monotonic()

    def row(self, custom_id: str) -> bytes:
        """A row that is done."""
        offset, n, _ = self.done[custom_id]
        return os.pread(self.fd, n, offset)

    def clear(self) -> None:
        """Forget all."""
        os.ftruncate(self.fd, 0)
        self.done.clear()
        self.end = 0

    def close(self) -> None:
        """Sync and let go; twice is no error."""
        if self.fd >= 0:
            try:
                os.fdatasync(self.fd)
            finally:
                os.close(self.fd)
                self.fd = -1


def _line(row: bytes) -> bytes:
    return b'{"crc":"%08x","row":%b}\n' % (zlib.crc32(row), row)


class Job:
    """The files of one job.  Made, it owns them: no other process can.

    Parameters
    ----------
    output : path
    facts : dict
        What must be the same for the work to be continued.
    force_new : bool
        Begin again, whatever is there.

    Attributes
    ----------
    input_read : dict or None
        What `note_input` was told last.
    """

    def __init__(self, output: Path, facts: dict[str, Any], force_new: bool) -> None:
        stem = output.name.removesuffix(".jsonl")
        self.output = output
        self.facts = facts
        self.input_read: dict[str, Any] | None = None
        self.errors = output.with_name(f"{stem}.errors.jsonl")
        self.manifest = output.with_name(f"{stem}.run.json")
        partial = output.with_name(f"{stem}.partial.jsonl")
        found = partial.exists()
        self.log = Log(partial)
        try:
            self._take(facts, force_new)
        except BaseException:
            self.log.close()
            if not found and not self.log.end:
                partial.unlink()
            raise

    def _take(self, facts: dict[str, Any], force_new: bool) -> None:
        if force_new:
            for path in (self.manifest, self.output, self.errors):
                path.unlink(missing_ok=True)
            self.log.clear()
        self.log.read()
        if self.manifest.exists():
            self.input_read = _compare(self.manifest, facts)
        elif self.log.end:
            raise ValueError(
                f"{self.log.path}: there is work without {self.manifest.name}; move it away, or "
                "begin again with --force-new")
        elif self.output.exists():
            raise ValueError(f"{self.output}: is there already and not of this job; move it away, "
                             "or replace it with --force-new")
        else:
            self._write(facts)

    def _write(self, facts: dict[str, Any]) -> None:
        replace(self.manifest, [json.dumps(facts, indent=1, sort_keys=True).encode() + b"\n"])

    def note_input(self, nbytes: int, digest: str) -> None:
        """How much of an input that grows is to be worked on: known before the work begins, so that
        another start can tell whether these lines are still the same."""
        self.input_read = {"bytes": nbytes, "sha256": digest}
        self._write(self.facts | {READ: self.input_read})

    @property
    def finished(self) -> bool:
        """The job was done before: its manifest and output are there, and no log."""
        return not self.log.end and self.output.exists()

    def finish(self, good: Iterable[bytes], bad: Iterable[bytes]) -> None:
        """Write what succeeded and what did not, each in the order of the input."""
        failed = iter(bad)
        first = next(failed, None)
        if first is not None:
            replace(self.errors, (row + b"\n" for row in chain((first,), failed)))
        else:
            self.errors.unlink(missing_ok=True)
        replace(self.output, (row + b"\n" for row in good))

    def close(self, done: bool) -> None:
        """Let go; the log stays for another start unless the job is done."""
        if done:
            self.log.path.unlink(missing_ok=True)
        self.log.close()


def _compare(manifest: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """ValueError if the facts differ; what was noted of an input that grows."""
    try:
        before = json.loads(manifest.read_bytes())
        read: dict[str, Any] | None = before.pop(READ, None)
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{manifest}: is not what this program wrote; move it away, or begin "
                         "again with --force-new") from None
    old, new = _flat(before), _flat(json.loads(json.dumps(facts)))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise ValueError(
                f"{manifest}: {name}: the job there has {shown(old.get(name))}, this one "
                f"{shown(new.get(name))}; begin again with --force-new, or choose another output")
    return read


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items()
            for k, v in _flat(inner, f"{name}.{key}" if name else key).items()}


def replace(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file so that there is always the old one or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
