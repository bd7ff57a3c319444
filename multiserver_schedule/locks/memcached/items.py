"""How is an item read, and changed only if it is still as it was read; and which rows are there at all?"""

from __future__ import annotations

import hashlib
import json
import random
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Final

from django.core.cache import caches

from ...exceptions import ConfigurationError, ScheduleError
from .line import Line
from .rows import (
    STATE,
    Directory,
    Kept,
    Read,
    Step,
    directory_of,
    encoded,
    part_key,
    row_key,
    with_names,
    without_names,
)

ROUNDS: Final = 40
"""How often a change is tried anew, where others change the same row."""

_CLOCK: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)


class Items:
    """What one lock has in its server: the calls of a block of ``line.call()``."""

    def __init__(self, alias: str, cache: str, line: Line) -> None:
        self.alias = alias
        self._cache = cache
        self._line = line
        self._make_key: Callable[[str], Any] = caches[cache].make_key
        self._keys: dict[str, bytes] = {}
        self.key(STATE)  # A prefix that makes no key is said here, and not at three in the morning.
        self.names: dict[str, str] = {}
        """
        What the directory has ever named, and has not forgotten, each with the id of its part.

        A process that goes on knows what was there before all was lost.
        """
        self._parts = 1

    def key(self, key: str) -> bytes:
        """Return the key of an item as the server has it: made by the cache, of a hash where it would be refused."""
        found = self._keys.get(key)
        if found is not None:
            return found
        kind, _, name = key.partition(":")
        namespace = f"multiserver_schedule:{{{self.alias}}}:"
        made = str(self._make_key(namespace + key))
        if not _is_key(made):
            made = str(self._make_key(f"{namespace}{kind}:{hashlib.sha256(name.encode()).hexdigest()}"))
        if not _is_key(made):
            raise ConfigurationError(
                f"The cache {self._cache!r} makes keys that Memcached does not take, such as {made!r}. Its KEY_PREFIX, "
                f"its KEY_FUNCTION and the lock's alias {self.alias!r} should leave out spaces and control characters, "
                "and be shorter than 100 characters together."
            )
        self._keys[key] = made.encode()
        return self._keys[key]

    def read(self, items: Iterable[str], now: datetime | None, of: Read | None = None) -> Read:
        """Read the state and these items; with ``of``, an earlier read of the same call, add them to that."""
        at = boot_time()
        read = of
        if read is None:
            moment = self._line.moment(now)
            read = Read(moment, at, self._line.connection)
            items = [STATE, *items]
        by_key = {self.key(item): item for item in items}
        found = self._line.read(list(by_key))
        for key, item in by_key.items():
            read.found.pop(item, None)
            if key in found:
                value, token = found[key]
                read.found[item] = (self._decoded(key, value), token)
        return read

    def _decoded(self, key: bytes, value: bytes) -> Kept:
        try:
            kept: Kept = json.loads(value)
        except ValueError:
            raise ScheduleError(
                f"The item {key.decode()!r} in the Memcached server {self._line.name} was not written by this lock. "
                "Nothing else may use keys of its namespace: delete it."
            ) from None
        return kept

    def read_all(self, names: Iterable[str], now: datetime | None) -> Read:
        """Read the state, the directory, and every row that it or ``names`` names: the directory before the rows."""
        asked = dict.fromkeys([*names, *self.names])
        read = self.read([*self._part_keys(), *map(row_key, asked)], now)
        for is_last in (False, True):
            directory = self._read_directory(read, now)
            further = [name for name in directory.names if name not in asked]
            asked |= dict.fromkeys(further)
            if further:
                self.read(map(row_key, further), now, read)
            if is_last or all(row_key(name) in read.found for name in directory.names):
                break
            # A row is gone: lost, if it is named still. Whoever forgets one takes its name off first.
            self.read(self._part_keys(), now, read)
        known = self.names | directory.names
        if len(known) > len(directory.names):
            known = {name: part for name, part in known.items() if not directory.has_forgotten(name, part)}
        self.names = known
        return read

    def _part_keys(self) -> list[str]:
        return [part_key(index) for index in range(self._parts + 1)]

    def _read_directory(self, read: Read, now: datetime | None) -> Directory:
        """Return the directory, with the parts that it has beyond those that were read."""
        index = self._parts
        while read.get(part_key(index)) is not None:
            index += 1
            self.read([part_key(index)], now, read)
        self._parts = max(1, index)
        return directory_of(read)

    def add_names(self, read: Read, directory: Directory, names: Iterable[str]) -> bool:
        """Have the directory name these rows too, and again what it has lost; False where somebody else changed it."""
        return self._write_directory(read, with_names(directory, set(names), uuid.uuid4().hex[:12]))

    def drop_names(self, read: Read, directory: Directory, names: Iterable[str]) -> bool:
        """Have the directory, which must be whole, forget these rows; False where somebody else changed it."""
        return self._write_directory(read, without_names(directory, set(names)))

    def _write_directory(self, read: Read, parts: Mapping[str, Kept]) -> bool:
        if not all(self.write(read, parts).values()):
            return False
        for part in parts.values():
            self.names |= dict.fromkeys(part["names"], part["id"])
        return True

    def write(self, read: Read, new: Mapping[str, Kept | None]) -> dict[str, bool]:
        """Write these items (None: delete), each only if it is still as it was read; tell which were written."""
        items = []
        for key, kept in new.items():
            found = read.found.get(key)
            value = None if kept is None else encoded(kept)
            items.append((self.key(key), value, None if found is None else found[1]))
        return dict(zip(new, self._line.write(items, read.connection), strict=True))

    def change(self, steps: Mapping[str, Step], now: datetime | None) -> dict[str, Any]:
        """Take each item through its step, again where it changed meanwhile; return what each step had to say."""
        said: dict[str, Any] = {}
        left = list(steps)
        for attempt in range(ROUNDS):
            if not left:
                return said
            pause(attempt)
            read = self.read(left, now)
            new: dict[str, Kept] = {}
            for key in left:
                kept, said[key] = steps[key](read.get(key), read)
                if kept is not None:
                    new[key] = kept
            left = [key for key, written in self.write(read, new).items() if not written]
        if left:
            raise self.contended(left[0])
        return said

    def contended(self, what: str) -> ScheduleError:
        """Return the error of a change that was tried as often as there is sense in it."""
        return ScheduleError(
            f"The lock {self.alias!r} could not change {what}: others changed it each time, {ROUNDS} times in a row. "
            "Nothing was lost; the next pass tries again."
        )


def boot_time() -> float:
    """Return seconds that go on while this machine sleeps."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


def pause(attempt: int) -> None:
    """Wait a moment before another attempt, so that those who change the same item come apart."""
    if attempt:
        time.sleep(random.uniform(0.2, 1.0) * min(0.1, 0.001 * 2**attempt))  # noqa: S311 - jitter


def _is_key(made: str) -> bool:
    return len(made.encode()) <= 250 and not any(ord(letter) < 33 or ord(letter) == 127 for letter in made)
