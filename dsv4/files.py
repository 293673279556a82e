# SPDX-License-Identifier: Apache-2.0
"""Opening the files of a model folder, and reading its JSON, without trusting either.

Only regular files that lie in the folder are opened: no path, no device, no FIFO, and no symbolic
link except those of the Hugging Face cache, whose target must stay inside the cache entry of the
same model.  JSON is read by Python's json, under limits that keep the work proportional to the
file: duplicate keys, NaN and infinities, integers beyond 64 bits, lone surrogates and nesting
beyond 16 are refused.  Source: TRUST 2, 4.
"""

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from dsv4.errors import FormatError, printable, shown

MAX_DEPTH = 16
MAX_BRACKETS = 20_000
MAX_COMMAS = 1_100_000
OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
KINDS = (
    (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISLNK, "a symbolic link"),
)


class Folder:
    """A model folder held open; names are looked up in it, never as paths.

    Parameters
    ----------
    path : path
        The folder.  It may itself be reached through symbolic links.
    allow_symlinks : bool, optional
        True follows symbolic links anywhere, False none.  None (default) follows those of the
        Hugging Face cache: `models--*/snapshots/*/file` whose target is in the same `models--*`.

    Raises
    ------
    FileNotFoundError, NotADirectoryError, PermissionError
        If there is no such folder.
    """

    def __init__(self, path: str | os.PathLike[str], allow_symlinks: bool | None = None) -> None:
        self.path = Path(path)
        self.allow_symlinks = allow_symlinks
        self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def names(self) -> list[str]:
        """Names of all entries, sorted; those that are not UTF-8 are left out."""
        return sorted(name for name in os.listdir(self.fd) if _encodable(name))

    def has(self, name: str) -> bool:
        """Whether there is an entry of this name, of any kind."""
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except OSError:
            return False
        return True

    def open(self, name: str) -> tuple[int, int]:
        """Open a regular file for reading.

        Returns
        -------
        (int, int)
            The file descriptor, owned by the caller, and the size in bytes.

        Raises
        ------
        FormatError
            If the name is not a plain file name, or the entry not a regular file.
        OSError
            If too many files are open.
        """
        check_name(name)
        path: str = name
        at: int | None = self.fd
        try:
            info = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
            if stat.S_ISLNK(info.st_mode):
                path, at = self._followed(name), None
                info = os.stat(path, follow_symlinks=False)
            check_regular(name, info)
            fd = os.open(path, OPEN_FLAGS, dir_fd=at)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise  # nothing is wrong with the file
            raise FormatError(
                file=name, rule="file", got=error.strerror, wanted=f"a readable file in {self.path}"
            ) from None
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):  # exchanged between the two calls
            os.close(fd)
            check_regular(name, info)
        return fd, info.st_size

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a file, which may hold at most `limit`."""
        fd, size = self.open(name)
        try:
            if size > limit:
                raise FormatError(
                    file=name, rule="file size", got=f"{size} bytes", wanted=f"at most {limit}"
                )
            return read_exactly(fd, size, 0, name)
        finally:
            os.close(fd)

    def read_json(self, name: str, limit: int) -> Any:
        """The value of a JSON file of at most `limit` bytes."""
        return parse_json(self.read(name, limit), name)

    def _followed(self, name: str) -> str:
        """Where an allowed symbolic link leads."""
        link = self.path / name
        target = os.path.realpath(link, strict=True)
        if self.allow_symlinks:
            return target
        root = None if self.allow_symlinks is False else cache_entry(self.path)
        if root is None:
            raise FormatError(
                file=name, rule="symbolic link", got=f"a link to {target}",
                wanted="a regular file (allow_symlinks=True follows links)",
            )
        if not Path(target).is_relative_to(root):
            raise FormatError(
                file=name, rule="symbolic link", got=f"a link to {target}",
                wanted=f"a target inside {root}",
            )
        return target


def cache_entry(folder: Path) -> Path | None:
    """The `models--*` folder of a Hugging Face cache that `folder` is a snapshot of, if it is."""
    real = folder.resolve()
    for parent in real.parents:
        if parent.name.startswith("models--") and real.relative_to(parent).parts[0] == "snapshots":
            return parent
    return None


def check_name(name: str) -> None:
    """Refuse a file name that is not one plain component."""
    reason = ""
    if not _encodable(name):
        reason = "not valid UTF-8"
    elif name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        reason = "a path"
    elif len(name.encode()) > 255:
        reason = f"{len(name.encode())} bytes"
    if reason:
        raise FormatError(
            file=ascii(name)[1:-1], rule="file name", got=reason,
            wanted="a plain file name of at most 255 bytes",
        )


def read_exactly(fd: int, size: int, offset: int, file: str) -> bytes:
    """`size` bytes from `offset`; a file that has become shorter is refused."""
    parts = []
    left = size
    while left:
        part = os.pread(fd, min(left, 1 << 24), offset + size - left)
        if not part:
            raise FormatError(
                file=file, rule="file size", got=f"{offset + size - left} bytes",
                wanted=f"{offset + size}: the file became shorter while it was read",
            )
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


# ---- JSON ----

class _Refused(ValueError):
    """What a hook of the JSON decoder found."""


def parse_json(data: bytes, file: str) -> Any:
    """The value of a JSON text.

    Raises
    ------
    FormatError
        If it is not valid UTF-8 or JSON, or breaks one of the limits in the head of this module.
    """
    brackets, commas = data.count(b"[") + data.count(b"{"), data.count(b",")
    if brackets > MAX_BRACKETS or commas > MAX_COMMAS:
        raise FormatError(
            file=file, rule="JSON size", got=f"{brackets} objects and lists, {commas + 1} items",
            wanted=f"at most {MAX_BRACKETS} and {MAX_COMMAS}",
        )
    try:
        value = DECODER.decode(data.decode())
        _check_value(value, 1, b"\\" in data)
    except UnicodeDecodeError as error:
        raise FormatError(
            file=file, rule="UTF-8", got=f"an invalid byte at offset {error.start}",
            wanted="valid UTF-8",
        ) from None
    except (RecursionError, ValueError) as error:
        raise FormatError(file=file, rule="JSON", got=reason(error), wanted="valid JSON") from None
    return value


def reason(error: Exception) -> str:
    """What the JSON decoder found, in a few words."""
    if isinstance(error, RecursionError):
        return f"nesting deeper than {MAX_DEPTH}"
    return printable(str(error))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"the key {shown(ascii(key))} twice")
            seen.add(key)
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= (value := int(text)) < 1 << 64 or text == "-0":
        raise _Refused(f"the integer {printable(text, 40)}, which is not one of 64 bits")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"the number {printable(text, 40)}, which is not finite")
    return value


def _constant(text: str) -> NoReturn:
    raise _Refused(f"{text}, which is not JSON")


DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_float=_number, parse_constant=_constant
)


def _check_value(value: Any, depth: int, escapes: bool) -> None:
    """Nesting, and text that cannot be written as UTF-8 (only an escape can bring it in)."""
    if isinstance(value, str):
        if escapes and not _encodable(value):
            raise _Refused("a lone surrogate")
    elif isinstance(value, (dict, list)):
        if depth > MAX_DEPTH:
            raise _Refused(f"nesting deeper than {MAX_DEPTH}")
        if isinstance(value, dict) and escapes and not all(map(_encodable, value)):
            raise _Refused("a lone surrogate")
        for item in value.values() if isinstance(value, dict) else value:
            _check_value(item, depth + 1, escapes)


def _encodable(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def check_regular(name: str, info: os.stat_result) -> None:
    """FormatError unless it is a regular file."""
    if not stat.S_ISREG(info.st_mode):
        kind = next((words for test, words in KINDS if test(info.st_mode)), "something else")
        raise FormatError(file=name, rule="file type", got=kind, wanted="a regular file")
