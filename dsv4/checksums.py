# SPDX-License-Identifier: Apache-2.0
"""Bit rot: a manifest of checksums, and the comparison of a checkpoint with it.

`manifest` writes down the CRC-32 of every tensor, or the SHA-256 of every shard; `verify` computes
them again and names what differs.  SHA-256 digests are also known without a manifest for files
that huggingface_hub downloaded.  Nothing is written into the model folder unless the caller says
so.
Source: TRUST 2 (bit rot), L3.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dsv4.checkpoint import Checkpoint, Shard
from dsv4.errors import FormatError, combined
from dsv4.files import Folder, read_exactly

MANIFEST = "dsv4-manifest.json"
VERSION = 1
PIECE = 8 << 20
MAX_BYTES = 256 << 20
MODES = ("crc", "sha256")
DIGEST = re.compile(r"[0-9a-f]{64}")

Progress = Callable[[int], None]


class Verified(NamedTuple):
    """What `verify` compared, all of it equal: so many tensors (crc) or shards (sha256)."""

    mode: str
    checked: int
    nbytes: int


def manifest(
    folder: str | os.PathLike[str], mode: str = "crc", *,
    save: str | os.PathLike[str] | None = None,
    allow_symlinks: bool | None = None, progress: Progress | None = None,
) -> dict[str, Any]:
    """Compute the checksums of a checkpoint.

    Parameters
    ----------
    folder : path
    mode : "crc" or "sha256"
        CRC-32 of every tensor, or SHA-256 of every shard.
    save : path, optional
        A file, or a folder that gets dsv4-manifest.json.
    progress : function of int, optional
        Called with the number of bytes just read.

    Returns
    -------
    dict
        What was saved: version, mode, and a digest in hexadecimal by name.

    Examples
    --------
    >>> import tempfile
    >>> from dsv4 import nano
    >>> with tempfile.TemporaryDirectory() as there:
    ...     folder = nano.make_stored("nano-odd", there)
    ...     sums = manifest(folder, save=folder)
    ...     verify(folder).checked == len(sums["digests"])
    True
    """
    _check_mode(mode)
    with Checkpoint.open(folder, allow_symlinks=allow_symlinks) as checkpoint:
        result = dict(version=VERSION, mode=mode, digests=_digests(checkpoint, mode, progress))
    if save is not None:
        path = Path(save, MANIFEST) if os.path.isdir(save) else Path(save)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with open(temporary, "w") as file:
            json.dump(result, file, indent=0)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return result


def verify(
    folder: str | os.PathLike[str], mode: str = "crc", *,
    manifest: str | os.PathLike[str] | None = None, allow_symlinks: bool | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Compare a checkpoint with its checksums.

    Parameters
    ----------
    folder : path
    mode : "crc" or "sha256"
    manifest : path, optional
        A file written by `manifest`, or the folder it is in; by default the model folder, and for
        "sha256" without one, what huggingface_hub noted when it downloaded the files.

    Raises
    ------
    FormatError
        Naming every tensor (or shard) that differs, is missing in the manifest or not in it.
    FileNotFoundError
        There is nothing to compare with.

    Examples
    --------
    See `manifest`.
    """
    _check_mode(mode)
    with Checkpoint.open(folder, allow_symlinks=allow_symlinks) as checkpoint:
        file, wanted = _known(checkpoint, mode, manifest)
        names = set(checkpoint.tensors)
        if mode == "sha256":
            names = {shard.name for shard in checkpoint.shards}
        errors = []
        for name in sorted(names ^ wanted.keys()):
            got, other = ("no checksum", "one") if name in names else ("a checksum", "no such name")
            errors.append(FormatError(file=file, rule=name, got=got, wanted=other))
        if errors:
            raise combined(errors)
        for name, got in _digests(checkpoint, mode, progress).items():
            if got == wanted[name]:
                continue
            info = checkpoint.tensors.get(name)
            shard = checkpoint.shards[info.shard].name if info else name
            errors.append(
                FormatError(file=shard, tensor=name if info else None, rule=f"checksum ({mode})",
                            got=got, wanted=f"{wanted[name]}: download it again"))
        if errors:
            raise combined(errors)
        nbytes = checkpoint.nbytes if mode == "crc" else sum(s.size for s in checkpoint.shards)
        return Verified(mode, len(wanted), nbytes)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, wanted one of {', '.join(MODES)}")


def _digests(checkpoint: Checkpoint, mode: str, progress: Progress | None) -> dict[str, str]:
    if mode == "sha256":
        return {shard.name: _sha256(shard, progress) for shard in checkpoint.shards}
    digests = {}
    for info in checkpoint.tensors.values():
        shard, crc = checkpoint.shards[info.shard], 0
        for offset in range(info.offset, info.offset + info.nbytes, PIECE):
            n = min(PIECE, info.offset + info.nbytes - offset)
            crc = zlib.crc32(read_exactly(shard.fd, n, offset, shard.name), crc)
            if progress is not None:
                progress(n)
        digests[info.name] = f"{crc:08x}"
    return digests


def _sha256(shard: Shard, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    for offset in range(0, shard.size, PIECE):
        n = min(PIECE, shard.size - offset)
        digest.update(read_exactly(shard.fd, n, offset, shard.name))
        if progress is not None:
            progress(n)
    return digest.hexdigest()


def _known(
    checkpoint: Checkpoint, mode: str, manifest: str | os.PathLike[str] | None
) -> tuple[str, dict[str, str]]:
    """The digests to compare with, and the file they come from."""
    path = Path(checkpoint.folder if manifest is None else manifest)
    if path.is_dir():
        path = path / MANIFEST
    if not path.exists():
        noted = _noted_by_hub(checkpoint) if mode == "sha256" and manifest is None else {}
        if noted:
            return "the hub's digests", noted
        raise FileNotFoundError(
            f"{path}: got no such file, wanted a manifest of {mode} checksums "
            f"(written by dsv4.checksums.manifest)"
        )
    with Folder(path.parent) as folder:
        value = folder.read_json(path.name, MAX_BYTES)
    digests = value.get("digests") if isinstance(value, dict) else None
    if not isinstance(digests, dict) or value.get("version") != VERSION:
        raise FormatError(file=path.name, rule="manifest", got="something else",
                          wanted=f"an object with version {VERSION} and digests")
    if value.get("mode") != mode:
        raise FormatError(file=path.name, rule="mode", got=value.get("mode"), wanted=mode)
    return path.name, digests


def _noted_by_hub(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of the shards as huggingface_hub knows them: blob names, or its notes beside."""
    noted = {}
    for shard in checkpoint.shards:
        if shard.path.is_symlink():
            candidates = [os.path.basename(os.readlink(shard.path))]
        else:
            note = checkpoint.folder / ".cache/huggingface/download" / f"{shard.name}.metadata"
            candidates = note.read_text().split() if note.is_file() else []
        digest = next((c for c in candidates if DIGEST.fullmatch(c)), None)
        if digest is not None:
            noted[shard.name] = digest
    return noted
