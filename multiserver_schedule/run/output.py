"""
The file that a run prints to: opened by the run's own process, and read at the end for what the history keeps.

The standard library is all that it needs, as the runner reads the file (in a process for that alone) of a run that did
not live to do so.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final, NamedTuple

TAIL: Final = 64 * 1024


class Opened(NamedTuple):
    """A file that a run prints to, as it goes from process to process."""

    path: str
    start: int
    """Where this run's own output begins."""
    device: int
    inode: int


def open_file(path: str, *, append: bool) -> tuple[int, Opened]:
    """
    Return the descriptor of the file, and what it will be read by.

    Everything is appended, also to a file that was emptied first: what two processes write lands side by side, and the
    file may be rotated by copying and emptying it.
    """
    path = os.path.abspath(path)  # the task may change the working directory
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0) | (0 if append else os.O_TRUNC)
    fd = os.open(path, flags, 0o666)
    stat = os.fstat(fd)
    return fd, Opened(path, stat.st_size, stat.st_dev, stat.st_ino)


def read_tail(opened: Opened) -> bytes:
    """Return the end of what was written since it was opened; nothing where the path is another file by now."""
    with suppress(OSError):
        fd = os.open(opened.path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
        try:
            stat = os.fstat(fd)
            if (stat.st_dev, stat.st_ino) != (opened.device, opened.inode):
                return b""
            own = opened.start if stat.st_size >= opened.start else 0  # it was emptied meanwhile
            begin = max(own, stat.st_size - TAIL)
            tail = os.pread(fd, stat.st_size - begin, begin)
            # Its beginning may be the middle of a character.
            return tail.lstrip(bytes(range(0x80, 0xC0))) if begin > own else tail
        finally:
            os.close(fd)
    return b""
