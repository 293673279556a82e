# SPDX-License-Identifier: Apache-2.0
"""Rows that a growing conversation's files have in common: on disk once, where the file system can.

A save clones (FICLONERANGE: btrfs, XFS, bcachefs, OCFS2, ...) what an earlier file of the same
conversation holds at the same place of the same section, instead of writing it again.  Nothing is
taken on trust: those bytes are read and compared with the ones in memory first.  Files stay whole
and independent: removing or replacing one changes no other.  Elsewhere everything is written.
"""

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Any

from dsv4.files import OPEN_FLAGS

FICLONERANGE = 0x4020940D
RANGE = struct.Struct("=qQQQ")  # struct file_clone_range: file, offset, length; offset there
ALIGNED = 4096  # of ranges; every section begins at a multiple
CANNOT = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM}


class Earlier:
    """An earlier file, and where its sections lie: `sections[name, layer]` = (offset, bytes); of
    no file, none."""

    def __init__(self, fd: int, sections: dict[tuple[str, int], tuple[int, int]]) -> None:
        self.fd = fd
        self.sections = sections

    def nbytes(self, name: str, layer: int) -> int:
        """Bytes of a section, 0 if it is not there."""
        return self.sections.get((name, layer), (0, 0))[1]

    def share(
        self, to: int, name: str, layer: int, first: int, at: int, views: list[Any]
    ) -> int:
        """Clone the beginning of a stretch.

        Parameters
        ----------
        to : int
            The new file.
        name, layer
            The section.
        first, at : int
            Where the stretch lies in the section, and in the new file: multiples of 4,096.
        views : list of buffers
            Its bytes, in memory.

        Returns
        -------
        int
            How many bytes, from the first on, are there now: a multiple of 4,096.

        Raises
        ------
        OSError
            No space, or another failure of the file being written.
        """
        offset, nbytes = self.sections.get((name, layer), (0, 0))
        same = 0
        for view in views:
            here = memoryview(view).cast("B")
            if first + same + len(here) > nbytes:
                break
            try:
                there = os.pread(self.fd, len(here), offset + first + same)
            except OSError:
                break  # it is the earlier file that cannot be read: written anew
            if there != here:
                break
            same += len(here)
        same -= same % ALIGNED
        if not same:
            return 0
        try:
            fcntl.ioctl(to, FICLONERANGE, RANGE.pack(self.fd, offset + first, same, at))
        except OSError as error:
            if error.errno not in CANNOT:
                raise
            self.sections = {}  # not with this file system: do not compare any more
            return 0
        return same


@contextlib.contextmanager
def earlier(file: str | None) -> Iterator[Earlier]:
    """The file a session was last saved to or loaded from, if it is still a saved session."""
    from dsv4.errors import FormatError
    from dsv4.state_file import sections_of

    fd, found = -1, {}
    if file is not None:
        with contextlib.suppress(OSError, FormatError):
            fd = os.open(file, OPEN_FLAGS)
            found = sections_of(fd, file)
    try:
        yield Earlier(fd, found)
    finally:
        if fd >= 0:
            os.close(fd)
