"""Where a declaration stands: its module, file and line, found cheaply enough for thousands of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import Final

NEVER_REGISTERED: Final = frozenset({"__main__", "__mp_main__"})
"""A module run as a script is somebody trying something out; the same file is imported under its own name as well."""


class Source:
    """
    The place of one declaration.

    The line is worked out when it is asked for: asking each frame for its line number costs a walk over the code before
    it, which made 10,000 declarations in one file two seconds.
    """

    __slots__ = ("_line", "code", "importing", "module", "offset")

    def __init__(self, frame: FrameType) -> None:
        place = frame if frame.f_code.co_name == "<module>" else _importing_frame(frame)
        self.module: str = place.f_globals.get("__name__") or "__main__"
        self.code: CodeType = place.f_code
        self.offset: int = place.f_lasti
        self.importing: bool = place.f_code.co_name == "<module>"
        """Was it made by the import of its module (also through a function), or later, as from ``ready()``?"""
        self._line = 0

    @property
    def file(self) -> str:
        """The file, as Python names it in a traceback."""
        return self.code.co_filename

    @property
    def line(self) -> int:
        """The line in that file."""
        if not self._line:
            find_lines([self])
        return self._line

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def find_lines(sources: Iterable[Source]) -> None:
    """Work out the lines of all these at once, walking over each code object a single time."""
    wanted: dict[int, list[Source]] = {}
    for source in sources:
        # By id: the hash of a code object walks over all of it.
        wanted.setdefault(id(source.code), []).append(source)
    for those in wanted.values():
        those.sort(key=lambda source: source.offset)
        code = those[0].code
        ranges = iter(code.co_lines())
        _, end, line = next(ranges)
        last = code.co_firstlineno
        for source in those:
            while source.offset >= end:
                _, end, line = next(ranges)
            last = line or last
            source._line = last


def _importing_frame(frame: FrameType) -> FrameType:
    """
    Return the frame of the module whose import led here through functions, or ``frame`` where no import did.

    The walk ends at Django's own frames: ``ready()`` is called by the app registry, and the module that happened to
    call ``django.setup()`` (a wsgi.py here, a manage.py there) has declared nothing.
    """
    outer: FrameType | None = frame
    while outer is not None:
        name = outer.f_globals.get("__name__") or ""
        if name == "django" or name.startswith("django."):
            return frame
        if outer.f_code.co_name == "<module>":
            return frame if name in NEVER_REGISTERED else outer
        outer = outer.f_back
    return frame


def caller(depth: int = 1) -> Source:
    """Return the source of the caller, ``depth`` frames above the function that asks."""
    return Source(sys._getframe(depth + 1))
