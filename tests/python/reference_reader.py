# SPDX-License-Identifier: Apache-2.0
"""A second reader of safetensors headers, written from the rules alone: slow, byte by byte.

It shares no code and no technique (no json, no re) with the package; the tests demand the same
verdict and the same table from both.
"""

DTYPES = dict(
    BOOL=8, F4=4, F6_E2M3=6, F6_E3M2=6, U8=8, I8=8, F8_E5M2=8, F8_E4M3=8, F8_E8M0=8,
    F8_E4M3FNUZ=8, F8_E5M2FNUZ=8, I16=16, U16=16, F16=16, BF16=16, I32=32, U32=32, F32=32, C64=64,
    F64=64, I64=64, U64=64,
)
LIMIT = 2**64
ESCAPES = {34: '"', 92: "\\", 47: "/", 98: "\b", 102: "\f", 110: "\n", 114: "\r", 116: "\t"}
HEX = {ord(c): int(c, 16) for c in "0123456789abcdefABCDEF"}


class Refused(Exception):
    pass


class Text:
    """A cursor over the header."""

    def __init__(self, data):
        self.data = data
        self.at = 0

    def space(self):
        while self.at < len(self.data) and self.data[self.at] in b" \t\n\r":
            self.at += 1

    def peek(self):
        self.space()
        if self.at >= len(self.data):
            raise Refused("end of header")
        return self.data[self.at]

    def expect(self, char):
        if self.peek() != ord(char):
            raise Refused(f"expected {char} at {self.at}")
        self.at += 1

    def separator(self, close):
        """True if another item follows."""
        char = self.peek()
        self.at += 1
        if char == ord(","):
            return True
        if char == ord(close):
            return False
        raise Refused(f"expected , or {close}")

    def string(self):
        self.expect('"')
        units = []  # UTF-16 code units of escapes, or bytes
        out = bytearray()
        while True:
            if self.at >= len(self.data):
                raise Refused("open string")
            byte = self.data[self.at]
            self.at += 1
            if byte == 34:
                break
            if byte < 32:
                raise Refused("control character")
            if byte != 92:
                self.flush(units, out)
                out.append(byte)
                continue
            if self.at >= len(self.data):
                raise Refused("open escape")
            code = self.data[self.at]
            self.at += 1
            if code == 117:
                digits = self.data[self.at : self.at + 4]
                if len(digits) < 4 or any(d not in HEX for d in digits):
                    raise Refused("bad escape")
                self.at += 4
                units.append(sum(HEX[d] << (12 - 4 * i) for i, d in enumerate(digits)))
            elif code in ESCAPES:
                self.flush(units, out)
                out += ESCAPES[code].encode()
            else:
                raise Refused("bad escape")
        self.flush(units, out)
        try:
            return bytes(out).decode("utf-8")
        except UnicodeDecodeError:
            raise Refused("not UTF-8") from None

    def flush(self, units, out):
        """Escaped UTF-16 units to UTF-8; a surrogate without its partner is refused."""
        i = 0
        while i < len(units):
            unit = units[i]
            if 0xD800 <= unit < 0xDC00 and i + 1 < len(units) and 0xDC00 <= units[i + 1] < 0xE000:
                unit = 0x10000 + ((unit - 0xD800) << 10) + units[i + 1] - 0xDC00
                i += 1
            elif 0xD800 <= unit < 0xE000:
                raise Refused("lone surrogate")
            out += chr(unit).encode()
            i += 1
        units.clear()

    def integer(self):
        self.peek()
        start = self.at
        while self.at < len(self.data) and self.data[self.at] in b"0123456789":
            self.at += 1
        digits = self.data[start : self.at]
        if not digits or (len(digits) > 1 and digits[0] == 48) or len(digits) > 20:
            raise Refused("not a plain integer")
        value = 0
        for d in digits:
            value = 10 * value + d - 48
        if value >= LIMIT:
            raise Refused("beyond 64 bits")
        return value

    def integers(self):
        self.expect("[")
        if self.peek() == ord("]"):
            self.at += 1
            return []
        values = [self.integer()]
        while self.separator("]"):
            values.append(self.integer())
        return values

    def members(self, read):
        """An object; read(key) reads each value.  Keys must differ."""
        self.expect("{")
        result = {}
        if self.peek() == ord("}"):
            self.at += 1
            return result
        while True:
            key = self.string()
            self.expect(":")
            self.peek()
            if key in result:
                raise Refused("duplicate key")
            result[key] = read(key)
            if not self.separator("}"):
                return result


def read(data, cap=32 << 20):
    """The sorted list of (begin, end, name, dtype, shape), or Refused."""
    if len(data) < 8:
        raise Refused("too short")
    length = sum(byte << (8 * i) for i, byte in enumerate(data[:8]))
    if length > cap or 8 + length > len(data):
        raise Refused("header length")
    text = Text(data[8 : 8 + length])

    def tensor(_):
        readers = {
            "dtype": text.string, "shape": text.integers, "data_offsets": text.integers,
        }

        def field(key):
            if key not in readers:
                raise Refused("unknown field")
            return readers[key]()

        return text.members(field)

    def member(key):
        return text.members(lambda _: text.string()) if key == "__metadata__" else tensor(key)

    table = text.members(member)
    text.space()
    if text.at != len(text.data):
        raise Refused("text behind the object")
    table.pop("__metadata__", None)
    tensors = []
    for name, info in table.items():
        if "\0" in name or len(info) != 3 or info["dtype"] not in DTYPES:
            raise Refused("tensor description")
        if len(info["data_offsets"]) != 2:
            raise Refused("offsets")
        begin, end = info["data_offsets"]
        count = 1
        for n in info["shape"]:
            count *= n
            if count >= LIMIT:
                raise Refused("overflow")
        bits = count * DTYPES[info["dtype"]]
        if bits >= LIMIT or bits % 8 or end - begin != bits // 8:
            raise Refused("size")
        tensors.append((begin, end, name, info["dtype"], tuple(info["shape"])))
    tensors.sort()
    last = 0
    for begin, end, *_ in tensors:
        if begin != last:
            raise Refused("hole or overlap")
        last = end
    if 8 + length + last != len(data):
        raise Refused("file size")
    return tensors
