# SPDX-License-Identifier: Apache-2.0
"""Sessions as files: one immutable file per state, written whole or not at all.

    bytes   what                                            (little-endian, version 1)
    8       b"\\x89dsv4kv\\n"
    4       version
    4       length of the header
    8       bytes of the head: a multiple of 4,096, at which the sections begin
    8       bytes of the file
    32      SHA-256 of the 32 bytes before it and of the head after it
    ...     the header: JSON, padded with spaces to a multiple of 64
    ...     the checksums: CRC-32C of every piece of every section, in order; then zeros
    ...     the sections, each at a multiple of 4,096, zeros between them

The sections are the tokens (int32), the fixed state (windows and raw compressor rows), for every
layer that has them the compressed rows and the index rows, exactly as many as the position says,
in the layout of kernels/types.h, and, where the session has one, its edit as JSON (`dsv4.edit`).
A piece is a block of 64 rows, or 1 MiB of the other sections.  The header holds the position, the
bytes of the edit if there is one, where each section begins after the head, what the model is (all
of it must be this model's), and who wrote it (which need not be equal).

Reading: everything but whole blocks of rows is compared with its checksum before it is used;
blocks stay where they are mapped and are compared when a step first reads them.

Writing: a temporary file beside the target, fsync, rename, fsync of the folder.  Rows that the file
of an earlier save holds are shared with it where the file system can (state_sharing.py).
Source: TRUST 2 (S1-S7, F9), SPEC 3.11.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap as mmap_module
import os
import platform
import re
import secrets
import stat
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

import dsv4
from dsv4 import _core, devices
from dsv4.errors import FormatError, combined
from dsv4.files import OPEN_FLAGS, check_regular, parse_json, read_exactly
from dsv4.loading import engine_config, engine_tensor
from dsv4.state_sharing import Earlier, earlier

MAGIC = b"\x89dsv4kv\n"
VERSION = 1
PRELUDE = struct.Struct("<8sIIQQ")
HEAD = PRELUDE.size + 32
PAGE = 4096
PIECE = 1 << 20
MAX_HEADER = 1 << 20
BLOCKS = 256  # handed over at a time: a Ctrl-C waits for one such write
SYNCED = 64 << 20  # bytes between two fdatasync, so that none takes long
KINDS = {1: "compressed", 2: "index"}  # enum dsv4_rows


class Section(NamedTuple):
    """`nbytes` at `offset` after the head, with a checksum for every `piece` bytes."""

    name: str
    layer: int
    offset: int
    nbytes: int
    piece: int

    @property
    def pieces(self) -> int:
        return -(-self.nbytes // self.piece)

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


class Layout(NamedTuple):
    """Where everything of a state lies; the sections of rows are those of `stores`."""

    sections: list[Section]
    stores: list[tuple[int, int, int, int]]  # layer, kind, rows, bytes of a row

    @property
    def rows(self) -> Iterator[tuple[Section, tuple[int, int, int, int]]]:
        return zip(self.sections[2 : 2 + len(self.stores)], self.stores, strict=True)

    @property
    def edit(self) -> Section | None:
        return self.sections[-1] if len(self.sections) > 2 + len(self.stores) else None

    @property
    def checksums(self) -> int:
        return sum(section.pieces for section in self.sections)


def layout(model: _core.Model, position: int, edit_bytes: int = 0) -> Layout:
    """The sections of a state of this model at this position, with an edit of so many bytes."""
    fixed_bytes, stores = _core.stores(model, position)
    parts = [("tokens", -1, 4 * position, PIECE), ("fixed", -1, fixed_bytes, PIECE)]
    parts += [(KINDS[kind], layer, rows * row, _core.BLOCK_ROWS * row)
              for layer, kind, rows, row in stores]
    if edit_bytes:
        parts.append(("edit", -1, edit_bytes, PIECE))
    sections: list[Section] = []
    at = 0
    for name, layer, nbytes, piece in parts:
        sections.append(Section(name, layer, at, nbytes, piece))
        at = _aligned(at + nbytes)
    return Layout(sections, stores)


# ---- what a state belongs to ----

def fingerprint(model: "dsv4.Model") -> dict[str, Any]:
    """What must be equal for a state to mean the same: compared field by field.

    `tensors` is a digest of names, dtypes and shapes, `weights` one of sampled bytes: small tensors
    whole, the middle 4 KB of large ones, of the routed experts one a layer.
    """
    tensors, weights = hashlib.sha256(), hashlib.sha256()
    experts = model.config.n_routed_experts
    table = model.tensors._table
    for name, dtype, shape, *_ in (engine_tensor(table[name]) for name in sorted(table)):
        tensors.update(f"{name} {dtype} {shape}\n".encode())
        parts = name.split(".")
        if "experts" in parts and int(parts[1]) % experts != int(parts[4]):
            continue
        data = model._core.tensor(name)
        if len(data) > 16 * PAGE:
            data = data[len(data) // 2 :][:PAGE]
        weights.update(data.data)
    words = None
    if model.tokenizer is not None:
        words = hashlib.sha256(repr(model.tokenizer._token_of).encode()).hexdigest()
    numerics = model.numerics
    if not model.exact:  # inside an instruction the order of a sum is the architecture's
        there = devices.find().devices
        where = " and ".join(sorted({there[s.device].architecture for s in model.stages}))
        numerics = f"{numerics}, prompts on tensor cores of architecture {where}"
    return dict(
        config=json.loads(json.dumps(engine_config(model.config))), tensors=tensors.hexdigest(),
        weights=weights.hexdigest(), tokenizer=words, numerics=numerics, **model._april,
        state_layout=_core.STATE_LAYOUT, numerics_version=_core.NUMERICS_VERSION,
    )


def _differences(file: str, got: Any, wanted: Any, name: str) -> list[FormatError]:
    if isinstance(wanted, Mapping) and isinstance(got, Mapping):
        return [
            error for key in sorted({*got, *wanted})
            for error in _differences(file, got.get(key), wanted.get(key), f"{name}.{key}")]
    if got == wanted and type(got) is type(wanted):
        return []
    return [FormatError(
        file=file, rule=f"{name} (the state of another model)", got=repr(got),
        wanted=repr(wanted))]


# ---- writing ----

def save(
    core: _core.Session, model: "dsv4.Model", path: str | os.PathLike[str],
    edit: "dsv4.Edit | None" = None, before: str | None = None,
) -> str:
    """Write the state of a session nobody else uses; see `dsv4.Session.save`.  `before` is the
    file of an earlier state of it, to share rows with.  Returns the file, links followed."""
    edit_json = edit.to_json().encode() if edit else b""
    where = os.path.realpath(os.fsdecode(path))
    folder, name = os.path.split(where)
    plan = layout(model._core, core.position, len(edit_json))
    header = _header(core.position, plan, model)
    head = _aligned(HEAD + len(header) + 4 * plan.checksums)
    size = head + plan.sections[-1].end
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mode = _mode_of(at, name)
        _remove_stale(at, name)
        temporary = f"{_prefix(name)}{os.getpid()}.{secrets.token_hex(4)}.tmp"
        with earlier(before) as shared:
            most = sum(shared.nbytes(section.name, section.layer) for section, _ in plan.rows)
            if size - most > _free(at):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _write(at, temporary, name, mode, core, plan, header, head, size, edit_json, shared)
        os.fsync(at)
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(
            error.errno, f"the session was not saved: {error.strerror}; it needs {size} bytes, "
            f"{_free(at)} are free", where) from error
    finally:
        os.close(at)
    return where


def _write(
    at: int, temporary: str, name: str, mode: int | None, core: _core.Session, plan: Layout,
    header: bytes, head: int, size: int, edit_json: bytes, shared: Earlier,
) -> None:
    """The file, complete and synced, under its name; no temporary file is left behind."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(temporary, flags, 0o666, dir_fd=at)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # says that its writer lives
            out = _Out(fd)
            table = b"".join(_sections(out, head, core, plan, edit_json, shared))
            out.write([_head(header, table, head, size)], 0)
            if mode is not None:
                os.fchmod(fd, mode)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, name, src_dir_fd=at, dst_dir_fd=at)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=at)
        raise


class _Out:
    """Writes that are complete or an OSError, synced now and then."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.unsynced = 0

    def write(self, parts: list[Any], offset: int, done: int = 0) -> None:
        """The parts one after the other from `offset` on, of which `done` bytes are there."""
        views = [memoryview(part) for part in parts]
        while True:
            offset += done
            while views and done >= len(views[0]):
                done -= len(views.pop(0))
            if not views:
                break
            views[0] = views[0][done:]
            done = os.pwritev(self.fd, views, offset)
            self.unsynced += done
        if self.unsynced >= SYNCED:
            os.fdatasync(self.fd)
            self.unsynced = 0


def _sections(
    out: _Out, head: int, core: _core.Session, plan: Layout, edit_json: bytes,
    shared: Earlier,
) -> Iterator[bytes]:
    """Writes every section; yields the checksums, in order."""
    tokens = core.tokens(0, core.position).astype("<i4", copy=False).view(np.uint8)
    for section, data in zip(plan.sections, (tokens.data, core.fixed().data), strict=False):
        yield from _pieces(out, head, section, data)
    for section, (layer, kind, _, _) in plan.rows:
        for first in range(0, section.pieces, BLOCKS):
            n = min(BLOCKS, section.pieces - first)
            views, checksums = core.blocks(layer, kind, first, n)
            begin = first * section.piece
            at = head + section.offset + begin
            done = shared.share(out.fd, section.name, layer, begin, at, views)
            out.write(views, at, done)
            yield checksums
    if plan.edit is not None:
        yield from _pieces(out, head, plan.edit, memoryview(edit_json))


def _pieces(out: _Out, head: int, section: Section, data: memoryview) -> Iterator[bytes]:
    for first in range(0, section.nbytes, PIECE):
        piece = data[first : first + PIECE]
        out.write([piece], head + section.offset + first)
        yield _core.crc32c(piece, 0).to_bytes(4, "little")


def _header(position: int, plan: Layout, model: "dsv4.Model") -> bytes:
    written_by = dict(dsv4=dsv4.__version__, machine=platform.machine(),
                      cpu=[name for name, there in _core.cpu_sets() if there])
    value = dict(position=position, sections=[list(section) for section in plan.sections],
                 model=model._fingerprint, written_by=written_by)
    if plan.edit is not None:
        value["edit_bytes"] = plan.edit.nbytes
    text = json.dumps(value, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 64)


def _head(header: bytes, table: bytes, head: int, size: int) -> bytes:
    begin = PRELUDE.pack(MAGIC, VERSION, len(header), head, size)
    rest = header + table
    rest += bytes(head - HEAD - len(rest))
    return begin + hashlib.sha256(begin + rest).digest() + rest


def _mode_of(at: int, name: str) -> int | None:
    """The permissions of the file that will be replaced, if there is one."""
    try:
        info = os.stat(name or ".", dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return None
    check_regular(name, info)
    return stat.S_IMODE(info.st_mode)


def _prefix(name: str) -> str:
    return os.fsdecode(b"." + os.fsencode(name)[:180] + b".")


def _remove_stale(at: int, name: str) -> None:
    """Temporary files of this name whose writers were killed."""
    pattern = re.compile(re.escape(_prefix(name)) + r"(\d{1,10})\.[0-9a-f]{8}\.tmp")
    for found in filter(None, map(pattern.fullmatch, os.listdir(at))):
        try:
            os.kill(int(found[1]), 0)
            continue  # it lives
        except ProcessLookupError:
            pass
        except (PermissionError, OverflowError):
            continue
        try:
            fd = os.open(found[0], OPEN_FLAGS, dir_fd=at)
        except OSError:
            continue
        try:
            # held by a writer that cannot be seen from here: another container's, say
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(found[0], dir_fd=at)
        except OSError:
            continue
        finally:
            os.close(fd)


def _free(at: int) -> int:
    found = os.statvfs(at)
    return found.f_bavail * found.f_frsize


# ---- reading ----

def load(
    model: "dsv4.Model", path: str | os.PathLike[str], checkpoints: int, verify: bool, mmap: bool
) -> "tuple[_core.Session, dsv4.Edit | None]":
    """The session of a file, and its edit, which it does not have yet; see
    `dsv4.Model.load_session`."""
    file = os.fsdecode(path)
    fd = os.open(file, (OPEN_FLAGS & ~os.O_NOFOLLOW))
    try:
        info = os.fstat(fd)
        check_regular(file, info)
        header, table, head = _read_head(fd, info.st_size, file)
        position, plan = _plan(model, header, file)
        _check_extent(plan, head, len(table), info.st_size, file)
        checksums = [table[a:b] for a, b in _spans(plan)]
        _check_gaps(fd, plan, head, file)
        data = _data(fd, head + plan.sections[1].end, file, mmap)
        tokens, fixed = (
            _checked(data, section, head, crcs, file)
            for section, crcs in zip(plan.sections[:2], checksums[:2], strict=True))
        rows = [(store, head + section.offset, crcs) for (section, store), crcs
                in zip(plan.rows, checksums[2:], strict=False)]
        edit = _edit(fd, plan.edit, head, checksums[-1], model, file)
        core = _core.load_session(
            model._core, checkpoints, (file, fd, info.st_size), mmap, tokens, fixed, rows)
    finally:
        os.close(fd)
    if verify or not mmap:
        for section, (layer, kind, _, _) in plan.rows:
            for first in range(0, section.pieces, BLOCKS):
                core.blocks(layer, kind, first, min(BLOCKS, section.pieces - first))
    return core, edit


def _read_head(fd: int, size: int, file: str) -> tuple[Any, bytes, int]:
    """The header, what follows it in the head, and the length of the head; all verified."""
    if size < HEAD:
        raise FormatError(file=file, rule="file size", got=f"{size} bytes",
                          wanted="a saved session, which has more")
    begin = read_exactly(fd, HEAD, 0, file)
    magic, version, length, head, whole = PRELUDE.unpack_from(begin)
    if magic != MAGIC:
        raise FormatError(file=file, rule="magic", got=magic.hex(" "),
                          wanted=f"{MAGIC.hex(' ')}: a saved session")
    if version != VERSION:
        raise FormatError(file=file, rule="version", got=version,
                          wanted=f"{VERSION}: {'a newer' if version > VERSION else 'another'} dsv4 "
                                 "wrote this file, or it is damaged")
    if size != whole:
        raise FormatError(file=file, rule="file size", got=f"{size} bytes",
                          wanted=f"{whole}, as its head says")
    if length > MAX_HEADER or head % PAGE or not HEAD + length <= head <= size:
        raise FormatError(file=file, rule="length of the header", got=f"{length} of {head} bytes",
                          wanted=f"at most {MAX_HEADER}, within the file")
    rest = read_exactly(fd, head - HEAD, HEAD, file)
    if hashlib.sha256(begin[: PRELUDE.size] + rest).digest() != begin[PRELUDE.size :]:
        raise FormatError(file=file, rule="SHA-256 of the head", got="another",
                          wanted="the one it names: the file is damaged")
    return parse_json(rest[:length], file), rest[length:], head


def sections_of(fd: int, file: str) -> dict[tuple[str, int], tuple[int, int]]:
    """Where the sections of a file lie, whatever model it belongs to: their first byte and their
    length, by name and layer.  FormatError if it is not a saved session."""
    header, _, head = _read_head(fd, os.fstat(fd).st_size, file)
    try:
        sections = [Section(*section) for section in header["sections"]]
        return {(s.name, s.layer): (head + s.offset, s.nbytes) for s in sections}
    except (TypeError, KeyError) as error:
        raise FormatError(file=file, rule="sections", got=repr(error), wanted="a list") from error


def _plan(model: "dsv4.Model", header: Any, file: str) -> tuple[int, Layout]:
    """Where everything lies: as this model has it at the header's position, or not at all."""
    if not isinstance(header, dict) or not isinstance(header.get("model"), dict):
        raise FormatError(file=file, rule="header", got="something else",
                          wanted="an object with model, position and sections")
    errors = _differences(file, header["model"], model._fingerprint, "model")
    if errors:
        raise combined(errors)
    position, most = header.get("position"), model.config.max_position_embeddings
    if type(position) is not int or not 0 <= position <= most:
        raise FormatError(file=file, rule="position", got=position, wanted=f"0 to {most}")
    edit_bytes = header.get("edit_bytes", 0)
    if type(edit_bytes) is not int or edit_bytes < 0:
        raise FormatError(file=file, rule="edit_bytes", got=edit_bytes, wanted="0 or more")
    plan = layout(model._core, position, edit_bytes)
    if header.get("sections") != [list(section) for section in plan.sections]:
        raise FormatError(file=file, rule="sections", got=header.get("sections"),
                          wanted=f"those of position {position}")
    return position, plan


def _check_extent(plan: Layout, head: int, table: int, size: int, file: str) -> None:
    if 4 * plan.checksums > table:
        raise FormatError(file=file, rule="checksums", got=f"room for {table // 4}",
                          wanted=f"{plan.checksums}")
    end = head + plan.sections[-1].end
    if end != size:
        raise FormatError(file=file, rule="file size", got=f"{size} bytes", wanted=f"{end}")


def _spans(plan: Layout) -> Iterator[tuple[int, int]]:
    """Where the checksums of each section lie in the table."""
    at = 0
    for section in plan.sections:
        yield at, (at := at + 4 * section.pieces)


def _check_gaps(fd: int, plan: Layout, head: int, file: str) -> None:
    """Bytes between sections are zero: no byte of the file is without a check."""
    for one, next_one in zip(plan.sections, plan.sections[1:], strict=False):
        n = next_one.offset - one.end
        if n and any(read_exactly(fd, n, head + one.end, file)):
            raise FormatError(file=file, rule=f"bytes after {one.name}", got="some that are not 0",
                              wanted="zeros: the file is damaged")


def _data(fd: int, size: int, file: str, mapped: bool) -> memoryview:
    """The first bytes of the file."""
    if mapped:
        return memoryview(mmap_module.mmap(fd, size, prot=mmap_module.PROT_READ))
    return memoryview(read_exactly(fd, size, 0, file))


def _checked(
    data: memoryview, section: Section, head: int, checksums: bytes, file: str
) -> memoryview:
    """The bytes of a section, equal to their checksums."""
    view = data[head + section.offset : head + section.end]
    _check(view, section, checksums, file)
    return view


def _check(view: memoryview, section: Section, checksums: bytes, file: str) -> None:
    for i in range(section.pieces):
        got = _core.crc32c(view[i * PIECE : (i + 1) * PIECE], 0)
        if got != int.from_bytes(checksums[4 * i : 4 * i + 4], "little"):
            raise FormatError(
                file=file, rule=f"{section.name}, from byte {i * PIECE}", got="another checksum",
                wanted="the one the file names: it is damaged")


def _edit(
    fd: int, section: Section | None, head: int, checksums: bytes, model: "dsv4.Model", file: str
) -> "dsv4.Edit | None":
    """The edit of a file, fit for this model, or None."""
    if section is None:
        return None
    from dsv4.edit import Edit

    data = read_exactly(fd, section.nbytes, head + section.offset, file)
    _check(memoryview(data), section, checksums, file)
    try:
        edit = Edit.from_json(data)
        edit.check(model.config)
    except ValueError as error:
        raise FormatError(f"{file}: edit: {error}") from error
    return edit


def _aligned(n: int) -> int:
    return -(-n // PAGE) * PAGE
