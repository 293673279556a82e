# SPDX-License-Identifier: Apache-2.0
"""The header of one safetensors file, read under every rule of the format.

Refused: a header that is too long, cut or not JSON; a name that occurs twice; fields and dtypes
that do not exist; integers that are not plain u64; shapes whose size overflows 64 bits; offsets
that leave a hole, overlap, or differ from shape x dtype; a file that is longer or shorter than its
tensors.  Work and memory stay proportional to the header, whatever it holds.

Members in the usual spelling are taken by one regular expression; all others go, one at a time,
through Python's json.  Source: TRUST 4.
"""

import re
from typing import Any, NamedTuple

from dsv4.errors import FormatError, printable
from dsv4.files import DECODER, read_exactly, reason

HEADER_CAP = 32 << 20
MAX_TENSORS = 1_000_000
MAX_NAME = 4096
MAX_MEMBER = 4096
MAX_METADATA = 1 << 20
U64 = (1 << 64) - 1
METADATA = "__metadata__"
FIELDS = {"dtype", "shape", "data_offsets"}

# bits per element, of every dtype of the format
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}

WS = rb"[ \t\n\r]*"
UINT = rb"(0|[1-9][0-9]{0,19})"
MEMBER = re.compile(
    WS.join((
        rb"", rb'"([ !#-\[\]-~]{1,1024})"', rb":",
        rb"\{", rb'"dtype"', rb":", rb'"([A-Z0-9_]{1,16})"', rb",", rb'"shape"', rb":",
        rb"\[", UINT + rb"(?:" + WS + rb"," + WS + UINT + rb")?", rb"\]", rb",",
        rb'"data_offsets"', rb":", rb"\[", UINT, rb",", UINT, rb"\]", rb"\}", rb"([,}])",
    ))
)
START = re.compile(WS + rb"\{" + WS + rb"(\}?)")
KEY = re.compile(WS + rb'("(?:[^"\\\x00-\x1f]|\\.){0,4096}+")' + WS + rb":" + WS)
OBJECT = re.compile(rb"\{[^{}]{0,4096}\}")
SEPARATOR = re.compile(WS + rb"([,}])")
END = re.compile(WS + rb"\Z")

OTHER_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was not downloaded"),
    (b"<!DOCTYPE", "a web page"), (b"<html", "a web page"), (b"GGUF", "a GGUF file"),
    (b"PK\x03\x04", "a zip archive or PyTorch pickle"),
)


class Entry(NamedTuple):
    """One tensor of a header; offsets count from the end of the header."""

    begin: int
    end: int
    name: str
    dtype: str
    shape: tuple[int, ...]


def header_bytes(fd: int, size: int, file: str, cap: int = HEADER_CAP) -> int:
    """Length of the header, checked against the size of the file before anything else is read."""
    if size < 8:
        raise FormatError(
            file=file, rule="file size", got=f"{size} bytes", wanted="at least 8: download it again"
        )
    start = read_exactly(fd, min(size, 24), 0, file)
    length = int.from_bytes(start[:8], "little")
    if length > cap or 8 + length > size:
        for magic, kind in OTHER_FILES:
            if start.startswith(magic):
                raise FormatError(
                    file=file, rule="file type", got=kind, wanted="a safetensors file"
                )
    if length > cap:
        raise FormatError(
            file=file, rule="header length", got=f"{length} bytes", wanted=f"at most {cap}"
        )
    if 8 + length > size:
        raise _size_error(file, size, 8 + length, " for the header alone")
    return length


def read_header(fd: int, size: int, file: str, cap: int = HEADER_CAP) -> tuple[int, list[Entry]]:
    """The tensors of an open file.

    Parameters
    ----------
    fd, size : int
        An open file and its size in bytes.
    file : str
        Its name, for messages.
    cap : int
        Longest header accepted, in bytes.

    Returns
    -------
    (int, list of Entry)
        Offset of the first tensor byte in the file, and the tensors by ascending offset.

    Raises
    ------
    FormatError
        Naming the first rule that is broken.
    """
    length = header_bytes(fd, size, file, cap)
    entries = parse_header(read_exactly(fd, length, 8, file), file)
    entries.sort()
    last = 0
    for entry in entries:
        if entry.begin != last:
            kind = "hole before" if entry.begin > last else "overlap with the tensor before"
            raise FormatError(
                file=file, tensor=entry.name, rule=f"offsets, {kind}", got=entry.begin, wanted=last
            )
        last = entry.end
    if 8 + length + last != size:
        raise _size_error(file, size, 8 + length + last)
    return 8 + length, entries


def parse_header(header: bytes, file: str) -> list[Entry]:
    """The tensors a header describes, in its order; each consistent in itself."""
    start = START.match(header)
    if start is None:
        raise _json_error(file, 0, header, "an object")
    seen: set[str] = set()
    entries: list[Entry] = []
    position, more = start.end(), not start[1]
    entry: Entry | None
    while more:
        match = MEMBER.match(header, position)
        if match is not None and match[1] != METADATA.encode():
            raw, code, rows, columns, begin, end, separator = match.groups()
            name, dtype = raw.decode("ascii"), code.decode("ascii")
            shape = (int(rows),) if columns is None else (int(rows), int(columns))
            entry = _checked(file, Entry(int(begin), int(end), name, dtype, shape))
            position, more = match.end(), separator == b","
        else:
            name, entry, position, more = _member(header, position, file)
        if name in seen:
            raise FormatError(file=file, tensor=name, rule="name", got="it twice", wanted="it once")
        seen.add(name)
        if entry is not None:
            entries.append(entry)
            if len(entries) > MAX_TENSORS:
                raise FormatError(
                    file=file, rule="tensors", got=f"more than {MAX_TENSORS}",
                    wanted=f"at most {MAX_TENSORS}",
                )
    if END.match(header, position) is None:
        raise _json_error(file, position, header, "the end of the header")
    return entries


def _member(header: bytes, position: int, file: str) -> tuple[str, Entry | None, int, bool]:
    """One member in any valid spelling: its name, tensor (None: metadata), next position, more."""
    key = KEY.match(header, position)
    if key is None:
        raise _json_error(file, position, header, f"a name of at most {MAX_NAME} bytes and a colon")
    name = _decoded(key[1], file, None)
    position = key.end()
    entry: Entry | None = None
    if name == METADATA:
        position = _skip_metadata(header, position, file)
    else:
        if "\0" in name:
            raise FormatError(file=file, tensor=name, rule="name", got="NUL in it", wanted="none")
        value = OBJECT.match(header, position)
        if value is None:
            wanted = f"an object of dtype, shape and data_offsets in {MAX_MEMBER} bytes"
            raise _json_error(file, position, header, wanted, name)
        entry = _checked(file, _described(name, _decoded(value[0], file, name), file))
        position = value.end()
    separator = SEPARATOR.match(header, position)
    if separator is None:
        raise _json_error(file, position, header, "a comma or the end of the object")
    return name, entry, separator.end(), separator[1] == b","


def _described(name: str, value: Any, file: str) -> Entry:
    """The entry of a decoded tensor description."""
    if set(value) != FIELDS:
        raise FormatError(
            file=file, tensor=name, rule="fields", got=", ".join(sorted(value)),
            wanted="dtype, shape, data_offsets",
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    for field, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            raise FormatError(
                file=file, tensor=name, rule=field, got=numbers, wanted="a list of u64 integers"
            )
    if len(offsets) != 2:
        raise FormatError(
            file=file, tensor=name, rule="data_offsets", got=offsets, wanted="begin and end"
        )
    if not isinstance(dtype, str):
        raise FormatError(file=file, tensor=name, rule="dtype", got=dtype, wanted="a string")
    return Entry(offsets[0], offsets[1], name, dtype, tuple(shape))


def _checked(file: str, entry: Entry) -> Entry:
    """The entry, if its dtype exists and its offsets are those of its shape."""
    begin, end, name, dtype, shape = entry
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise FormatError(
            file=file, tensor=name, rule="dtype", got=dtype,
            wanted=f"one of {', '.join(DTYPE_BITS)}",
        )
    count = 1
    for n in shape:
        count *= n
        if count > U64:
            break
    if count * bits > U64 or end > U64 or begin > U64:
        raise FormatError(
            file=file, tensor=name, rule="size", got=f"{list(shape)} {dtype}, {begin} to {end}",
            wanted="at most 2^64 - 1 bits",
        )
    if count * bits % 8:
        raise FormatError(
            file=file, tensor=name, rule="size", got=f"{count * bits} bits",
            wanted="a whole number of bytes",
        )
    if end - begin != count * bits // 8:
        raise FormatError(
            file=file, tensor=name, rule="data_offsets", got=f"{begin} to {end}",
            wanted=f"{count * bits // 8} bytes for {list(shape)} {dtype}",
        )
    return entry


def _skip_metadata(header: bytes, position: int, file: str) -> int:
    """The position after `__metadata__`, an object of strings."""
    text = header[position : position + MAX_METADATA]
    wanted = f"an object of strings in at most {MAX_METADATA} bytes"
    try:
        decoded = text.decode("utf-8", "surrogateescape")  # the cut may divide a character
        value, end = DECODER.raw_decode(decoded)
        length = len(decoded[:end].encode())
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise FormatError(file=file, rule=METADATA, got=value, wanted=wanted)
        "".join([*value, *value.values()]).encode()
    except FormatError:
        raise
    except (RecursionError, ValueError) as error:
        got = "invalid UTF-8" if isinstance(error, UnicodeError) else reason(error)
        raise FormatError(file=file, rule=METADATA, got=got, wanted=wanted) from None
    return position + length


def _decoded(text: bytes, file: str, tensor: str | None) -> Any:
    """The value of a piece of JSON."""
    try:
        value = DECODER.decode(text.decode())
        if isinstance(value, str):
            value.encode()
    except (RecursionError, ValueError) as error:
        what = "invalid UTF-8" if isinstance(error, UnicodeError) else reason(error)
        raise FormatError(
            file=file, tensor=tensor, rule="JSON", got=what, wanted="valid JSON in UTF-8"
        ) from None
    return value


def _json_error(
    file: str, position: int, header: bytes, wanted: str, tensor: str | None = None
) -> FormatError:
    near = header[position : position + 24].decode("utf-8", "replace")
    return FormatError(
        file=file, tensor=tensor, rule="JSON",
        got=f"{printable(near)!r} at byte {8 + position}" if near else "the end of the header",
        wanted=wanted,
    )


def _size_error(file: str, size: int, wanted: int, what: str = "") -> FormatError:
    hint = ": the file is cut, download it again" if size < wanted else ": bytes behind the tensors"
    return FormatError(
        file=file, rule="file size", got=f"{size} bytes", wanted=f"{wanted}{what}{hint}"
    )
