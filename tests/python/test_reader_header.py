# SPDX-License-Identifier: Apache-2.0
"""Shard headers: every rule by example, every byte and every truncation against a second reader."""

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import reference_reader
from sparse import header as sparse_header

from dsv4.errors import FormatError
from dsv4.shard import DTYPE_BITS, Entry, parse_header, read_header


def tensor(dtype, shape, begin, end):
    return dict(dtype=dtype, shape=shape, data_offsets=[begin, end])


def packed(head, data=b""):
    """A file: header length, header (an object or raw text), tensor bytes."""
    text = head if isinstance(head, bytes) else json.dumps(head, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


SMALL = packed(
    {
        "__metadata__": {"format": "pt"},
        "layers.0.attn.wq_a.weight": tensor("F8_E4M3", [4, 3], 0, 12),
        "layers.0.attn.wq_a.scale": tensor("F8_E8M0", [1, 1], 12, 13),
    },
    bytes(13),
)


def large_file():
    """64 tensors of all 22 dtypes and ranks 0 to 3, about 8 KB of header, in an odd spelling."""
    head, offset = {"__metadata__": {"format": "pt", "note": "\u00fc"}}, 0
    shapes = [[], [8], [2, 4], [2, 2, 2], [0], [8, 0]]
    for i in range(64):
        dtype = list(DTYPE_BITS)[i % len(DTYPE_BITS)]
        shape = shapes[i % len(shapes)]
        count = 1
        for n in shape:
            count *= n
        bits = count * DTYPE_BITS[dtype]
        if bits % 8:
            shape, bits = [8], 8 * DTYPE_BITS[dtype]
        end = offset + bits // 8
        head[f"layers.{i}.ffn.experts.{i}.w{i % 3}.weight_\u00e9"[: 40 - i % 2]] = tensor(
            dtype, shape, offset, end
        )
        offset = end
    return packed(json.dumps(head, indent=1).encode() + b" \n\t", bytes(offset))


LARGE = large_file()


class Both:
    """A file in memory, judged by the package and by the reference reader."""

    def __init__(self, data):
        self.data = data
        self.fd = os.memfd_create("shard")
        os.pwrite(self.fd, data, 0)

    def close(self):
        os.close(self.fd)

    def package(self, size):
        try:
            return read_header(self.fd, size, "shard")[1]
        except FormatError as error:
            assert error.file == "shard" and error.rule and str(error).startswith("shard: ")
            return None

    def agree(self, data):
        """Both give the same table, or both refuse; returns whether they accept."""
        os.ftruncate(self.fd, len(data))
        os.pwrite(self.fd, data, 0)
        got = self.package(len(data))
        try:
            want = [Entry(*entry) for entry in reference_reader.read(data)]
        except reference_reader.Refused:
            want = None
        assert got == want, data
        return want is not None


@pytest.fixture
def both():
    files = []

    def make(data):
        files.append(Both(data))
        return files[-1]

    yield make
    for file in files:
        file.close()


def test_valid_files(both):
    for data in (SMALL, LARGE, packed({}), packed(b" {\n} \t"), packed({"__metadata__": {}})):
        assert both(data).agree(data)


ONE = '"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'

REFUSED = {
    "no bytes": b"",
    "seven bytes": bytes(7),
    "length beyond the file": struct.pack("<Q", 3) + b"{}",
    "length beyond the cap": struct.pack("<Q", 1 << 40) + b"{}",
    "length of 2^64 - 1": b"\xff" * 8 + b"{}",
    "no header": packed(b""),
    "a list": packed(b"[]"),
    "text after the object": packed(b"{}x"),
    "NUL after the object": packed(b"{}\0"),
    "another space before": packed("\u00a0{}".encode()),
    "byte order mark": packed("\ufeff{}".encode()),
    "vertical tab": packed(b"\x0b{}"),
    "trailing comma": packed(f"{{{ONE},}}".encode(), bytes(2)),
    "no comma": packed(f"{{{ONE}{ONE.replace('a', 'b')}}}".encode(), bytes(2)),
    "a name twice": packed(f"{{{ONE},{ONE}}}".encode(), bytes(2)),
    "a name twice, once escaped": packed(
        f"{{{ONE},{ONE.replace(chr(34) + 'a', chr(34) + chr(92) + 'u0061')}}}".encode(), bytes(2)
    ),
    "metadata twice": packed(b'{"__metadata__":{},"__metadata__":{}}'),
    "a metadata key twice": packed(b'{"__metadata__":{"a":"1","a":"1"}}'),
    "metadata of numbers": packed(b'{"__metadata__":{"a":1}}'),
    "metadata like a tensor": packed({"__metadata__": tensor("U8", [2], 0, 2)}, bytes(2)),
    "metadata null": packed(b'{"__metadata__":null}'),
    "metadata surrogate": packed(b'{"__metadata__":{"a":"\\ud800"}}'),
    "metadata not UTF-8": packed(b'{"__metadata__":{"a":"\xff"}}'),
    "metadata open": packed(b'{"__metadata__":{"a":"b"'),
    "metadata nested deeply": packed(b'{"__metadata__":' + b"[" * 100_000 + b"}"),
    "name with NUL": packed(f"{{{ONE.replace('a', chr(92) + 'u0000', 1)}}}".encode(), bytes(2)),
    "name with a lone surrogate": packed(
        f"{{{ONE.replace('a', chr(92) + 'udc00', 1)}}}".encode(), bytes(2)
    ),
    "name not UTF-8": packed(ONE.join("{}").encode().replace(b"a", b"\xff", 1), bytes(2)),
    "name with a raw newline": packed(ONE.join("{}").encode().replace(b"a", b"\n", 1), bytes(2)),
    "no offsets": packed({"a": dict(dtype="U8", shape=[2])}, bytes(2)),
    "a field too many": packed({"a": dict(tensor("U8", [2], 0, 2), x=1)}, bytes(2)),
    "a field twice": packed(ONE.replace("}", ',"shape":[2]}').join("{}").encode(), bytes(2)),
    "unknown dtype": packed({"a": tensor("F8", [2], 0, 2)}, bytes(2)),
    "dtype in lower case": packed({"a": tensor("u8", [2], 0, 2)}, bytes(2)),
    "dtype null": packed({"a": tensor(None, [2], 0, 2)}, bytes(2)),
    "shape a number": packed({"a": tensor("U8", 2, 0, 2)}, bytes(2)),
    "shape of floats": packed({"a": tensor("U8", [2.0], 0, 2)}, bytes(2)),
    "shape with an exponent": packed(ONE.replace("[2]", "[2e0]").join("{}").encode(), bytes(2)),
    "shape with a leading zero": packed(ONE.replace("[2]", "[02]").join("{}").encode(), bytes(2)),
    "shape negative": packed({"a": tensor("U8", [-2], 0, 2)}, bytes(2)),
    "shape of two negatives": packed({"a": tensor("U8", [-2, -1], 0, 2)}, bytes(2)),
    "shape minus zero": packed(ONE.replace("[2]", "[-0]").join("{}").encode(), b""),
    "shape true": packed({"a": tensor("U8", [True, 2], 0, 2)}, bytes(2)),
    "shape of lists": packed({"a": tensor("U8", [[2]], 0, 2)}, bytes(2)),
    "shape of 2^64": packed({"a": tensor("U8", [1 << 64], 0, 2)}, bytes(2)),
    "shape overflows": packed({"a": tensor("U8", [1 << 63, 1 << 2], 0, 0)}),
    "shape overflows, then zero": packed({"a": tensor("U8", [1 << 63, 1 << 2, 0], 0, 0)}),
    "bits overflow": packed({"a": tensor("F32", [1 << 60], 0, 1 << 62)}),
    "three offsets": packed({"a": dict(dtype="U8", shape=[2], data_offsets=[0, 2, 2])}, bytes(2)),
    "one offset": packed({"a": dict(dtype="U8", shape=[0], data_offsets=[0])}),
    "offsets reversed": packed({"a": tensor("U8", [2], 2, 0)}, bytes(2)),
    "offsets not those of the shape": packed({"a": tensor("U8", [2], 0, 3)}, bytes(3)),
    "half a byte": packed({"a": tensor("F4", [3], 0, 1)}, bytes(1)),
    "first tensor not at 0": packed({"a": tensor("U8", [2], 1, 3)}, bytes(3)),
    "hole": packed({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 3, 5)}, bytes(5)),
    "overlap": packed({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 1, 3)}, bytes(3)),
    "same bytes twice": packed({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 0, 2)}, b"ab"),
    "zero size inside another": packed(
        {"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [0], 1, 1)}, bytes(2)
    ),
    "file one byte short": packed({"a": tensor("U8", [2], 0, 2)}, bytes(1)),
    "file one byte long": packed({"a": tensor("U8", [2], 0, 2)}, bytes(3)),
    "bytes behind no tensors": packed({}, bytes(1)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(both, case):
    assert not both(REFUSED[case]).agree(REFUSED[case])


ACCEPTED = {
    "spaces everywhere": ONE.replace(":", " :\t").replace(",", "\n,\r").join(("{ ", " } ")),
    "other order of fields": '{"a":{"data_offsets":[0,2],"shape":[2],"dtype":"U8"}}',
    "escaped field names": '{"a":{"\\u0064type":"U\\u0038","shape":[2],"data_offsets":[0,2]}}',
    "escaped name": '{"\\u00e9\\ud83d\\ude42":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
    "brace in a name": '{"}{":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
    "brace in metadata": '{"__metadata__":{"}":"{"},' + ONE + "}",
    "metadata last": "{" + ONE + ',"__metadata__":{"a":"\\u0000"}}',
    "empty name": '{"":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
    "no dimensions": '{"a":{"dtype":"U16","shape":[],"data_offsets":[0,2]}}',
    "many dimensions": '{"a":{"dtype":"U8","shape":[1,1,2,1,1],"data_offsets":[0,2]}}',
    "four bits": '{"a":{"dtype":"F4","shape":[2,2],"data_offsets":[0,2]}}',
    "zero size beside": "{" + ONE + ',"b":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}}',
    "offsets in another order": '{"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]},'
    '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(both, case):
    data = packed(ACCEPTED[case].encode(), bytes(2))
    assert both(data).agree(data)


def test_limits_of_strings_and_members():
    long_name = "n" * 4096
    spelled = "{" + ONE.replace("a", long_name, 1) + "}"
    assert parse_header(spelled.encode(), "f")[0].name == long_name
    for text in (
        "{" + ONE.replace("a", long_name + "n", 1) + "}",
        "{" + ONE.replace("[2]", "[" + ",".join(["1"] * 3000) + "]") + "}",
        '{"__metadata__":{"a":"' + "x" * (1 << 20) + '"}}',
    ):
        with pytest.raises(FormatError):
            parse_header(text.encode(), "f")


@pytest.mark.parametrize(
    ("data", "cap", "words"),
    [
        (bytes(7), 100, "file size: got 7 bytes, wanted at least 8: download it again"),
        (packed(b"{" + bytes(100) + b"}"), 101, "header length: got 102 bytes, wanted at most 101"),
        (packed(b"{}")[:9], 100, "file size: got 9 bytes, wanted 10 for the header alone"),
        (packed({"a": tensor("U8", [2], 0, 2)}, b"x"), 100, "wanted 63: the file is cut"),
        (packed({"a": tensor("U8", [2], 0, 2)}, b"xyz"), 100, "63: bytes behind the tensors"),
    ],
)
def test_what_is_said_about_sizes(both, data, cap, words):
    with pytest.raises(FormatError) as caught:
        read_header(both(data).fd, len(data), "shard", cap)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("start", "kind"),
    [(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"), (b"<!DOCTYPE html>", "web page"),
     (b"GGUF" + bytes(20), "GGUF"), (b"PK\x03\x04" + bytes(9), "zip")],
)
def test_other_files_are_named(both, start, kind):
    with pytest.raises(FormatError, match=kind):
        read_header(both(start).fd, len(start), "shard")


def mutated(data, rng):
    """The file with one small change; the length word mostly stays true."""
    length = int.from_bytes(data[:8], "little")
    head, body = bytearray(data[8 : 8 + length]), data[8 + length :]
    kind = rng.randrange(8)
    at = rng.randrange(len(head))
    if kind == 0:
        raw = bytearray(data)
        raw[rng.randrange(8 + length)] = rng.randrange(256)
        return bytes(raw)
    if kind == 1:
        head[at] = rng.randrange(256)
    elif kind == 2:
        head[at] = rng.choice(b'{}[]",:0123456789\\ \n-.eu')
    elif kind == 3:
        del head[at : at + rng.randrange(1, 4)]
    elif kind == 4:
        head[at:at] = bytes(rng.choice(b'{}[]",:019\\ ntu') for _ in range(rng.randrange(1, 4)))
    elif kind == 5:
        head[at:at] = head[rng.randrange(len(head)) :][: rng.randrange(1, 120)]
    elif kind == 6:
        digits = [i for i, b in enumerate(head) if b in b"0123456789"]
        head[rng.choice(digits)] = rng.choice(b"0123456789")
    else:
        other = rng.randrange(len(head))
        head[at], head[other] = head[other], head[at]
    return packed(bytes(head), body)


def test_changed_headers_get_the_same_verdict(both):
    """The short form of the two long tests below."""
    rng = random.Random(1)
    small, large = both(SMALL), both(LARGE)
    accepted = sum(small.agree(mutated(SMALL, rng)) for _ in range(4000))
    accepted += sum(large.agree(mutated(LARGE, rng)) for _ in range(400))
    assert 100 < accepted < 3000


@pytest.mark.long
def test_every_byte_of_the_small_file(both):
    file = both(SMALL)
    length = len(SMALL) - 13
    cases = accepted = 0
    for at in range(length):
        for value in range(256):
            if value != SMALL[at]:
                data = SMALL[:at] + bytes([value]) + SMALL[at + 1 :]
                accepted += file.agree(data)
                cases += 1
    print(f"{cases} cases, {accepted} accepted by both")
    assert cases == 255 * length and accepted > 0


@pytest.mark.long
def test_fifty_thousand_changes_of_the_large_file(both):
    rng = random.Random(2)
    file = both(LARGE)
    accepted = sum(file.agree(mutated(LARGE, rng)) for _ in range(50_000))
    print(f"50000 cases, {accepted} accepted by both")
    assert accepted > 0


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_every_truncation(both, data):
    file = both(data)
    for length in range(len(data) - 1, -1, -1):
        os.ftruncate(file.fd, length)
        assert file.package(length) is None
    os.pwrite(file.fd, data, 0)
    assert file.package(len(data)) is not None
    os.pwrite(file.fd, b"x", len(data))
    assert file.package(len(data) + 1) is None


def test_truncations_of_a_real_size(both):
    """A header of the size of a published shard, cut around every page."""
    head, size = sparse_header(
        {f"layers.3.ffn.experts.{i}.w1.weight": (frozenset({"I8"}), (2048, 2048))
         for i in range(1500)}
    )
    assert len(head) > 150_000
    file = both(head)
    os.ftruncate(file.fd, len(head) + size)
    assert len(file.package(len(head) + size)) == 1500
    for page in range(0, len(head) + 2 * 4096, 4096):
        for length in (page - 1, page, page + 1):
            if length >= 0:
                os.ftruncate(file.fd, length)
                assert file.package(length) is None


BOMBS = {
    "100 MB of header": "head = b'{' + b' ' * 100_000_000",
    "10 million names": "head = b'{' + b'\"1234567\":{},' * 10_000_000",
    "nesting of a million": "head = b'{\"a\":' * 1_000_000",
    "nesting of a million lists": "head = b'{\"a\":' + b'[' * 1_000_000",
    "nesting in metadata": "head = b'{\"__metadata__\":' + b'{\"a\":' * 1_000_000",
    "lists": "head = b'{\"a\":[' + b'[],' * 10_000_000",
    "a string of 50 MB": "head = b'{\"' + b'a' * 50_000_000 + b'\":{}}'",
    "a string of 30 MB": "head = b'{\"' + b'a' * 30_000_000 + b'\":{}}'",
    "escapes": "head = b'{\"' + b'\\\\\\\\' * 15_000_000 + b'\":{}}'",
    "metadata of 30 MB": "head = b'{\"__metadata__\":{\"a\":\"' + b'a' * 30_000_000 + b'\"}}'",
    "metadata of many items": "head = b'{\"__metadata__\":{' + b'\"\":\"\",' * 4_000_000 + b'}}'",
    "an integer of a million digits":
        "head = b'{\"a\":{\"dtype\":\"U8\",\"shape\":[' + b'1' * 1_000_000 + b']}}'",
    "a shape of many numbers": "head = b'{\"a\":{\"shape\":[' + b'0,' * 15_000_000 + b'0]}}'",
}

BOMB_SCRIPT = """
import os, resource, struct, time
from dsv4.errors import FormatError
from dsv4.shard import read_header
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
def reset():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
fd = os.memfd_create("shard")
{bomb}
size = os.pwrite(fd, struct.pack("<Q", len(head)), 0)
for i in range(0, len(head), 1 << 26):
    size += os.pwrite(fd, head[i:i + (1 << 26)], 8 + i)
length = len(head)
del head
reset()
before, start = peak(), time.process_time()
try:
    read_header(fd, size, "shard")
except FormatError as error:
    print(length, time.process_time() - start, peak() - before, len(str(error)))
"""


@pytest.mark.parametrize("case", BOMBS)
def test_bombs(case):
    """Refused within a second of work, in less memory than twice the header."""
    script = BOMB_SCRIPT.replace("{bomb}", BOMBS[case])
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )
    length, seconds, extra, message = (float(x) for x in result.stdout.split())
    assert seconds < 1 and extra < 2 * length + (1 << 20) and message < 600
