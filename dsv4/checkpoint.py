# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder as it is on disk: config, index, shard headers, tensor table; no weights.

Everything is checked before anything is used: names and kinds of files, the headers against the
sizes of the files (all shards, before any is parsed), the headers against the index both ways, and
the tensors against what the config asks for.  What is wrong is reported together, up to 20 faults.
Source: SPEC 6, TRUST 4.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from dsv4 import layout
from dsv4.config import Config, read_config
from dsv4.errors import FormatError, combined
from dsv4.files import Folder, check_name
from dsv4.names import official
from dsv4.shard import DTYPE_BITS, HEADER_CAP, MAX_TENSORS, Entry, header_bytes, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUFFIX = ".safetensors"
FUSED = (".ffn.experts.gate_up_proj", ".ffn.experts.down_proj")
MAX_SHARDS = 10_000
MAX_INDEX_BYTES = 128 << 20


class Shard(NamedTuple):
    """One open safetensors file; the tensors begin at `data_offset`."""

    name: str
    path: Path
    size: int
    fd: int
    data_offset: int


class TensorInfo(NamedTuple):
    """Where one tensor lies: `nbytes` from `offset` in the file `shards[shard]`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Checkpoint:
    """A validated checkpoint.  Its shards stay open until `close`, or the end of a `with` block.

    Attributes
    ----------
    folder : Path
    config : Config
    shards : tuple of Shard
    tensors : mapping of str to TensorInfo
        By official name, in the order of the files.  The fused experts of a transformers export
        appear as one tensor per expert and matrix.
    draft : "mtp", "dspark" or None
        Kind of the draft blocks, and `draft_blocks` their number.
    formats : layout.Formats
        Storage dtypes by class of tensor; `formats.expert_format` is "fp4", "fp8" or "plain".
    warnings : tuple of str
        What is odd but harmless.

    Examples
    --------
    >>> import tempfile
    >>> from dsv4 import nano
    >>> with tempfile.TemporaryDirectory() as there:
    ...     with Checkpoint.open(nano.make_stored("nano-odd", there)) as checkpoint:
    ...         print(checkpoint.tensors["embed.weight"].shape, checkpoint.draft)
    (331, 128) mtp
    """

    folder: Path
    config: Config
    shards: tuple[Shard, ...]
    tensors: MappingProxyType[str, TensorInfo]
    draft: str | None
    draft_blocks: int
    formats: layout.Formats
    warnings: tuple[str, ...]
    _files: "_Files" = field(repr=False)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, allow_symlinks: bool | None = None,
        header_cap: int = HEADER_CAP,
    ) -> "Checkpoint":
        """Read and check everything but the weights.

        Parameters
        ----------
        path : path
            The folder with config.json and the shards.
        allow_symlinks : bool, optional
            See `dsv4.files.Folder`.
        header_cap : int
            Longest shard header accepted, in bytes.

        Raises
        ------
        FormatError
            A file is not what it says; every fault of one kind is listed.
        OSError
            There is no such folder, or the system refuses to read it.
        """
        with Folder(path, allow_symlinks) as folder:
            config = read_config(folder)
            files = _Files()
            try:
                return _read(folder, config, files, header_cap)
            except BaseException:
                files.close()
                raise

    @property
    def expert_format(self) -> str:
        """"fp4", "fp8" or "plain": how the routed experts are stored."""
        return self.formats.expert_format

    @property
    def kind(self) -> str:
        """What this is, in one line."""
        c = self.config
        kinds = [c.layer_kind(i) for i in range(c.num_hidden_layers)]
        layers = ", ".join(f"{kinds.count(k)} {k}" for k in ("SWA", "CSA", "HCA") if k in kinds)
        stored = {"fp4": "FP4", "fp8": "FP8", "plain": "unquantised"}[self.expert_format]
        dense = "FP8" if self.formats.linear_scale else "unquantised"
        draft = ""
        if self.draft:
            names = {"mtp": "MTP block", "dspark": "DSpark stage"}
            draft = f", {self.draft_blocks} {names[self.draft]}{'s' * (self.draft_blocks > 1)}"
        return (
            f"DeepSeek V4, {c.num_hidden_layers} layers ({layers}), hidden {c.hidden_size}, "
            f"{c.n_routed_experts} {stored} experts top-{c.num_experts_per_tok}, "
            f"{dense} linears{draft}"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def close(self) -> None:
        """Close the shards.  Descriptors handed on must have been duplicated."""
        self._files.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Files:
    """The open descriptors of a checkpoint, closed at the latest with it."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())

    def __del__(self) -> None:
        self.close()


def _read(folder: Folder, config: Config, files: _Files, header_cap: int) -> Checkpoint:
    warnings: list[str] = []
    index, total_size = _read_index(folder)
    names = sorted(set(index.values())) if index is not None else [SINGLE]
    for name in folder.names():
        if name.endswith(SUFFIX) and name not in names:
            warnings.append(f"{name} is not in the index and was not opened")
    shards, contents = _open_shards(folder, names, files, header_cap)
    if index is not None:
        _compare_index(names, contents, index)
    tensors, renamed = _table(config, shards, contents)
    del contents
    nbytes = sum(shard.size - shard.data_offset for shard in shards)
    if total_size is not None and total_size != nbytes:
        warnings.append(f"{INDEX}: total_size is {total_size}, the tensors have {nbytes} bytes")
    found = layout.check(
        config, tensors, file_of=lambda name: shards[tensors[name].shard].name, renamed=renamed)
    return Checkpoint(
        folder=folder.path, config=config, shards=shards, tensors=MappingProxyType(tensors),
        draft=found.draft, draft_blocks=found.draft_blocks, formats=found.formats,
        warnings=tuple(warnings), _files=files,
    )


def _read_index(folder: Folder) -> tuple[dict[str, str] | None, object]:
    """The weight map (None: a single file without an index), and the total size it states."""
    if not folder.has(INDEX):
        if not folder.has(SINGLE):
            found = [name for name in folder.names() if name.endswith(SUFFIX)]
            got = f"{len(found)} other {SUFFIX} files" if found else f"no {SUFFIX} file"
            raise FormatError(
                file=str(folder.path), rule="index", got=got, wanted=f"{INDEX} or {SINGLE}"
            )
        return None, None
    value = folder.read_json(INDEX, MAX_INDEX_BYTES)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(
            file=INDEX, rule="weight_map", got=type(weight_map).__name__,
            wanted="an object of tensor names and shard names",
        )
    if len(weight_map) > MAX_TENSORS:
        raise FormatError(
            file=INDEX, rule="weight_map", got=f"{len(weight_map)} tensors",
            wanted=f"at most {MAX_TENSORS}",
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(SUFFIX):
            raise FormatError(
                file=INDEX, tensor=name, rule="weight_map", got=file, wanted=f"a {SUFFIX} file"
            )
    _check_shard_names(sorted(set(weight_map.values())))
    metadata = value.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _check_shard_names(names: list[str]) -> None:
    errors = []
    for name in names:
        try:
            check_name(name)
        except FormatError as error:
            errors.append(FormatError(file=INDEX, rule=f"{error.rule} {error.file}",
                                      got=error.got, wanted=error.wanted))
    if len(names) > MAX_SHARDS:
        errors.append(FormatError(file=INDEX, rule="weight_map", got=f"{len(names)} shards",
                                  wanted=f"at most {MAX_SHARDS}"))
    if errors:
        raise combined(errors)


def _open_shards(
    folder: Folder, names: list[str], files: _Files, header_cap: int
) -> tuple[tuple[Shard, ...], list[list[Entry]]]:
    """Open all shards, compare all header lengths with the file sizes, then read all headers."""
    errors: list[FormatError] = []
    opened: list[tuple[str, int, int]] = []
    for name in names:
        try:
            fd, size = folder.open(name)
            files.fds.append(fd)
            opened.append((name, fd, size))
            header_bytes(fd, size, name, header_cap)
        except FormatError as error:
            errors.append(error)
    if errors:
        raise combined(errors)
    shards, contents, total = [], [], 0
    for name, fd, size in opened:
        try:
            data_offset, entries = read_header(fd, size, name, header_cap)
        except FormatError as error:
            errors.append(error)
            continue
        total += len(entries)
        shards.append(Shard(name, folder.path / name, size, fd, data_offset))
        contents.append(entries)
        if total > MAX_TENSORS:
            errors.append(FormatError(file=name, rule="tensors", got=f"more than {MAX_TENSORS}",
                                      wanted=f"at most {MAX_TENSORS} in all shards"))
            break
    if errors:
        raise combined(errors)
    return tuple(shards), contents


def _compare_index(names: list[str], contents: list[list[Entry]], index: dict[str, str]) -> None:
    """Headers and index must say the same, both ways; so no tensor is in two shards."""
    errors = []
    matched = 0
    for file, entries in zip(names, contents, strict=True):
        for entry in entries:
            listed = index.get(entry.name)
            if listed == file:
                matched += 1
            else:
                wanted = f"it in {listed} alone" if listed else "an entry for it"
                errors.append(FormatError(file=INDEX, tensor=entry.name, rule="weight_map",
                                          got=f"it is in {file}", wanted=wanted))
    if matched < len(index):
        present = {(e.name, f) for f, entries in zip(names, contents, strict=True) for e in entries}
        for name, file in index.items():
            if (name, file) not in present:
                errors.append(FormatError(file=INDEX, tensor=name, rule="weight_map",
                                          got=f"{file} does not hold it", wanted=f"it in {file}"))
    if errors:
        raise combined(errors)


def _table(
    config: Config, shards: tuple[Shard, ...], contents: list[list[Entry]]
) -> tuple[dict[str, TensorInfo], bool]:
    """All tensors by official name, and whether any had another name in its file."""
    tensors: dict[str, TensorInfo] = {}
    renamed = False
    count = 0
    for i, entries in enumerate(contents):
        start = shards[i].data_offset
        for begin, end, name, dtype, shape in entries:
            known = official(name)
            renamed = renamed or known != name
            info = TensorInfo(known, dtype, shape, i, start + begin, end - begin)
            if known.endswith(FUSED):
                for part in _split(config, info, shards[i].name):
                    tensors[part.name] = part
                    count += 1
            else:
                tensors[known] = info
                count += 1
            if count != len(tensors):
                raise FormatError(file=shards[i].name, tensor=name, rule="name",
                                  got=f"another tensor that is {known}", wanted="one of them")
    return tensors, renamed


def _split(config: Config, fused: TensorInfo, file: str) -> Iterator[TensorInfo]:
    """The matrices of each expert in a fused tensor: gate_up_proj is w1 over w3, down_proj w2."""
    n, width, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    prefix, _, leaf = fused.name.rpartition(".")
    parts = ("w1", "w3") if leaf == "gate_up_proj" else ("w2",)
    rows, columns = (width, d) if leaf == "gate_up_proj" else (d, width)
    wanted = (n, len(parts) * rows, columns)
    if fused.shape != wanted or fused.dtype not in layout.PLAIN:
        raise FormatError(file=file, tensor=fused.name, rule="fused experts",
                          got=f"{fused.dtype} {list(fused.shape)}",
                          wanted=f"BF16, F16 or F32 {list(wanted)}")
    nbytes = rows * columns * DTYPE_BITS[fused.dtype] // 8
    offset = fused.offset
    for expert in range(n):
        for part in parts:
            name = f"{prefix}.{expert}.{part}.weight"
            yield TensorInfo(name, fused.dtype, (rows, columns), fused.shard, offset, nbytes)
            offset += nbytes
