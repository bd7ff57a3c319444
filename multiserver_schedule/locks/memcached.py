"""
The lock in one Memcached server: a JSON row for each task, written by ``gets`` and ``cas`` and by nothing else.

A row carries what a ``ScheduledLock`` does, so that one compare-and-set takes the lock and moves ``last_due_at``. Keys
that only ``add`` guards are no lock: whoever is frozen while one is deleted wins the same due time again (measured).

N is the server's own clock. It tells whole seconds and counts them a little late, so a lower bound judges what is due
and what has ended, and an upper bound is written. A row, the list of names, or everything may be lost at any moment:
that is noticed, ``sync`` puts it right, and nobody claims until a live owner has had the time to come back.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any, Final

from django.core.cache import caches
from django.core.cache.backends.memcached import BaseMemcachedCache
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS
from pymemcache.client.base import Client  # type: ignore[import-untyped]
from pymemcache.exceptions import (  # type: ignore[import-untyped]
    MemcacheError,
    MemcacheServerError,
    MemcacheUnexpectedCloseError,
    MemcacheUnknownError,
)

from .. import conf
from ..entries import Claim, Cleanup, Occurrence, ReleasedClaim, Row, ScheduledTask, Skip
from ..exceptions import ScheduleError, StoreTimeout
from .base import (
    BaseLock,
    Before,
    ClaimRecorder,
    CleanupRecorder,
    Declarations,
    Elsewhere,
    Look,
    ReleaseRecorder,
    SkipRecorder,
    Synced,
    nowhere_else,
)
from .versions import FORGOTTEN_AFTER, is_known, keys, registered, take_overs, taken_over

OPTIONS: Final = ("cache", "timeout", "using")
TIMEOUT: Final = 3.0
"""Seconds that connecting, and each wait for the server, may take."""
UNCERTAIN: Final = 2_000_000
"""Microseconds: the server's clock is at most so far ahead of what it tells (whole seconds, counted once a second)."""
SHIFT: Final = 2_000_000
"""Microseconds: the clock of a server that was restarted may be so far behind the old one's, by rounding alone."""
ROUNDS: Final = 40
"""How often a change is tried anew, where others change the same row."""
CLAIM_ROUNDS: Final = 8
"""The same for a claim: what it has not won by then, the next look offers again."""
BATCH: Final = 100
"""Writes that are sent before their answers are read."""
KEYS_PER_READ: Final = 1_000
PART_BYTES: Final = 400_000
"""Names that go into one item, which the server limits to 1 MB (less, with ``-I``)."""
MOST_REAPED: Final = 100
"""Clean-ups that a row keeps until they are recorded: further ones drop the oldest, which the log then names."""
RELEASED_KEPT: Final = 16
"""Released owners that the row of a task that may overlap remembers; others remember the last one."""
BY_HAND: Final = ("manual", "backfill")
"""Triggers that leave ``last_due_at`` alone."""

logger: Final = logging.getLogger("multiserver_schedule")

_STATE: Final = "state"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND: Final = timedelta(microseconds=1)
_CLOCK: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)

_Kept = dict[str, Any]
"""
What an item holds, as JSON; times are microseconds since 1970, and what is empty is left out.

A row: ``task``, ``fingerprint`` ("" until the version that holds the task has put a lost row right), ``last_due_at``,
``schedule_since``, ``next_due_at``, ``not_before``, ``hold_until``, ``fence``, ``paused_at``, ``moved_to``,
``moved_from``; of the run under way ``owner``, ``owner_fence``, ``server``, ``due_at``, ``acquired_at``,
``renewed_at``, ``expires_at``, ``finish_by``; ``runs`` that may overlap, by owner, with a fence each; ``released`` and
``freed`` (owners), ``stamp`` (of the last skip), ``blank`` (nobody knew the schedule when ``next_due_at`` was to be
computed), ``reaped`` (clean-ups).
"""
_Step = Callable[["_Kept | None", "_Read"], tuple["_Kept | None", Any]]
"""What becomes of an item (None: nothing), and what to say of it when that is written."""


# -- the connection ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Moment:
    """N, as far as it is known, and which run of the server said so."""

    lower: int
    upper: int
    past: int
    """No due time was ever claimed after this moment, not even by the clock of a server that was restarted since."""
    pid: int
    started: int


@dataclass(slots=True)
class _Read:
    """Items as they were read, with the tokens that let them be changed over the same connection."""

    moment: _Moment
    at: float
    """Boot time before the first of them was asked for."""
    connection: int
    found: dict[str, tuple[_Kept, bytes]] = field(default_factory=dict)

    def get(self, key: str) -> _Kept | None:
        """Return the item of this name, or None where there is none."""
        found = self.found.get(key)
        return None if found is None else found[0]

    @property
    def is_sound(self) -> bool:
        """Is there a state, written during this run of the server? Else nobody claims before ``sync``."""
        state = self.get(_STATE)
        return state is not None and not _was_restarted(state, self.moment)


class _Sockets:
    """The socket module as pymemcache wants it; knows the last socket, so that one that still connects can be cut."""

    def __init__(self) -> None:
        self.made = 0
        self.last: socket.socket | None = None

    def socket(self, *args: Any) -> socket.socket:
        """Return a socket of this kind, and remember it."""
        self.last = socket.socket(*args)
        self.made += 1
        return self.last

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)


class _Line:
    """
    One connection to one server, for one caller at a time.

    Whatever goes wrong ends the connection, and with it every token that was read over it: a server that is restarted
    counts them from 1 again, and would take an old one for its own.
    """

    def __init__(self, server: tuple[str, int] | str, name: str, timeout: float, tls: Any = None) -> None:
        self.name = name
        self._sockets = _Sockets()
        # Neither a pool nor a retry, and no exception is ignored: "away" must not look like "empty".
        self._client: Any = Client(
            server,
            connect_timeout=timeout,
            timeout=timeout,
            no_delay=True,
            allow_unicode_keys=True,
            socket_module=self._sockets,
            tls_context=tls,
        )
        self._mutex = threading.RLock()
        self._pid = os.getpid()
        self._was_cut = False
        self.is_calling = False

    @contextmanager
    def call(self) -> Iterator[None]:
        """Have the line for the calls of the block; raises StoreTimeout where another thread cut one."""
        with self._mutex:
            if self._pid != os.getpid():
                # The connection is the parent's: two who talk over it would read each other's answers.
                self._client.close()
                self._pid = os.getpid()
            self._was_cut = False
            self.is_calling = True
            try:
                yield
            except BaseException as error:
                # Half an answer may still be on its way, and would be taken for the next one.
                self._client.close()
                if self._was_cut and isinstance(error, (MemcacheError, OSError)):
                    raise StoreTimeout(f"A call to the Memcached server {self.name} hung, and was cut.") from error
                raise
            finally:
                self.is_calling = False

    def cut(self) -> bool:
        """Shut the socket of the call under way; False when there is none."""
        if not self.is_calling:
            return False
        for line in (self._client.sock, self._sockets.last):
            if line is not None:
                self._was_cut = True
                try:
                    line.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue
                return True
        self._was_cut = False
        return False

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        with self._mutex:
            self._client.close()

    def moment(self, now: datetime | None = None) -> _Moment:
        """Ask what time it is, and which run of the server this is. ``now`` stands in for the time."""
        was_open = self._client.sock is not None
        try:
            stats = self._client.stats()
        except (MemcacheUnexpectedCloseError, ConnectionError):
            if not was_open or self._was_cut:
                raise
            # The server ends idle connections (-o idle_timeout), and nothing was read over this one that is still used.
            stats = self._client.stats()
        try:
            told, pid, uptime = (int(stats[key]) for key in (b"time", b"pid", b"uptime"))
        except (KeyError, ValueError, TypeError):
            raise MemcacheUnknownError(
                f"{self.name} does not tell its time, pid and uptime, as a Memcached server does ('stats'). "
                "A proxy cannot hold a lock: name the server itself."
            ) from None
        if now is not None:
            given = _micros(now)
            return _Moment(given, given, given, pid, told - uptime)
        lower = told * 1_000_000
        return _Moment(lower, lower + UNCERTAIN, lower + UNCERTAIN + SHIFT, pid, told - uptime)

    @property
    def connection(self) -> int:
        """Tell one connection from the next."""
        return self._sockets.made if self._client.sock is not None else 0

    def read(self, items: Sequence[bytes]) -> dict[bytes, tuple[bytes, bytes]]:
        """Return what is there of these items, each with its token."""
        found: dict[bytes, tuple[bytes, bytes]] = {}
        for start in range(0, len(items), KEYS_PER_READ):
            found.update(self._client.gets_many(items[start : start + KEYS_PER_READ]))
        return found

    def write(self, items: Sequence[tuple[bytes, bytes, bytes | None]], connection: int) -> list[bool]:
        """
        Write each item (key, value, token; no token: there must be no item yet), tell which were written.

        None is written over another connection than ``connection``, which the tokens are of.
        """
        written: list[bool] = []
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            if self.connection != connection or not connection:
                return written + [False] * (len(items) - len(written))
            self._client.sock.sendall(b"".join(_command(*item) for item in batch))
            answers = self._answers(len(batch))
            refused = [answer for answer in answers if answer not in _ANSWERS]
            if refused:
                said = refused[0].decode(errors="replace")
                raise MemcacheServerError(
                    f"The Memcached server {self.name} refused to store a row: {said}. Nothing is locked without it: "
                    "give the server more memory (-m), or larger items (-I)."
                )
            written += [answer == b"STORED" for answer in answers]
        return written

    def _answers(self, wanted: int) -> list[bytes]:
        # Not by Client.raw_command: it loses what comes before the packet with the end token (pymemcache 4.0.0).
        received = b""
        while received.count(b"\r\n") < wanted:
            more = self._client.sock.recv(65536)
            if not more:
                raise MemcacheUnexpectedCloseError
            received += more
        *answers, rest = received.split(b"\r\n")
        if rest or len(answers) != wanted:
            raise MemcacheUnknownError(answers[0][:100])
        return answers


_ANSWERS: Final = (b"STORED", b"NOT_STORED", b"EXISTS", b"NOT_FOUND")


def _command(key: bytes, value: bytes, token: bytes | None) -> bytes:
    if token is None:
        return b"add %b 0 0 %d\r\n%b\r\n" % (key, len(value), value)
    return b"cas %b 0 0 %d %b\r\n%b\r\n" % (key, len(value), token, value)


# -- what a call finds, and what it leaves for the next ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pending:
    """Claims that were sent and never answered."""

    owners: Mapping[str, Occurrence]
    server: str
    until: float


@dataclass(frozen=True, slots=True)
class _Version:
    """One set of declarations as the state has it (``versions.Version``)."""

    key: str
    scope: str
    first_seen_at: datetime | None
    seen_at: datetime | None


@dataclass(slots=True)
class _Directory:
    """The names of all rows, in as many items as it takes."""

    parts: dict[int, list[str]]
    is_whole: bool
    names: set[str]


@dataclass(slots=True)
class _Findings:
    """What is not as this version needs it; ``sync`` puts it right."""

    directory: _Directory
    held: dict[str, ScheduledTask]
    """By row: the tasks whose schedule this version's is."""
    lost: list[str]
    """Named in the directory, now or before, and without a row."""
    missing: list[str]
    """Held, neither named nor there: new, or lost with everything."""
    off: list[str]
    """Held, and there with another schedule, or with none."""
    unnamed: list[str]
    """There, and not named in the directory."""

    @property
    def is_fine(self) -> bool:
        """Is there nothing to be put right?"""
        return self.directory.is_whole and not (self.lost or self.missing or self.off or self.unnamed)


@dataclass(slots=True)
class _Done:
    """What ``sync`` has done so far."""

    registered: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    lost: dict[str, int | None] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)
    until: int = 0
    """What is lost counts as done until then."""
    began_empty: bool = False

    def note(self, trouble: str) -> None:
        """Remember how something was lost."""
        if trouble not in self.trouble:
            self.trouble.append(trouble)


class MemcachedLock(BaseLock):
    """
    Keeps leases and due times in one Memcached server: the one of the cache ``OPTIONS["cache"]``.

    An efficiency lock: it holds through lost rows, a flush and a restart, as long as the server's clock does not go
    back and no proxy hides a restart. What was due between a loss and its discovery is passed over, and the trace of a
    dead owner may be lost with its row. A look reads all rows, so its cost grows with the number of tasks.
    """

    transactional = False

    def __init__(self, alias: str, options: Mapping[str, Any]) -> None:
        super().__init__(alias, options)
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ImproperlyConfigured(
                f"The lock {alias!r} has no option {unknown[0]!r}. Options are: {', '.join(OPTIONS)}."
            )
        self.using = options.get("using", DEFAULT_DB_ALIAS)
        self.cache = options.get("cache", "default")
        timeout = options.get("timeout", TIMEOUT)
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout <= 0:
            raise ImproperlyConfigured(
                f"The option 'timeout' of the lock {alias!r} should be seconds, more than 0, not {timeout!r}."
            )
        server, name = _server_of(self.cache, alias)
        given = caches.settings[self.cache].get("OPTIONS") or {}
        self._line = _Line(server, name, float(timeout), given.get("tls_context"))
        self._make_key: Callable[[str], Any] = caches[self.cache].make_key
        self._items: dict[str, bytes] = {}
        self._item(_STATE)  # A prefix that makes no key is said here, and not at three in the morning.
        self._names: set[str] = set()
        """What the directory has ever named: a process that goes on knows what was there before all was lost."""
        self._parts = 1
        self._longest = conf.load().lease
        self._fingerprints: tuple[object, dict[str, str]] = (None, {})
        self._pending: list[_Pending] = []
        self._stands: dict[str, int] = {}
        """Until when each lease of this process stands, by the server's clock."""
        self._untold: set[str] = set()
        """Owners whose release was sent and has not been recorded: its answer was lost."""

    # -- what a pass asks ---------------------------------------------------------------------------------------------

    def look(self, declared: Declarations, *, ahead: timedelta = timedelta(0), now: datetime | None = None) -> Look:
        with self._line.call():
            read = self._read_all(self._rows_of(declared), now)
            lower = read.moment.lower
            at = _moment(lower)
            state = read.get(_STATE)
            if state is None:
                return Look(now=at, known=False)
            known, stale = is_known(declared, _versions(state, declared.server), at)
            known = known and read.is_sound and self._findings(declared, read, state).is_fine
            if stale and read.is_sound:
                # Whoever is first: the others find it refreshed.
                self._write(read, {_STATE: _seen(state, stale, lower)})
        until = lower + _length(ahead)
        due: list[tuple[Any, Row]] = []
        expired = False
        for key, (kept, _) in read.found.items():
            if not key.startswith("row:"):
                continue
            expired = expired or _has_ended(kept, lower)
            following = kept.get("next_due_at")
            if following is None or following > until or kept.get("paused_at") or kept.get("moved_to"):
                continue
            scope = _scope_of(kept["task"])
            if not scope or scope == declared.server:
                row = _row(kept)
                due.append(((following, row.not_before, row.task), row))
        due.sort(key=lambda pair: pair[0])
        paused = bool(state.get("paused_at"))
        return Look(
            now=at,
            known=known,
            paused=paused,
            interrupted_at=_moment_or_none(state.get("interrupted_at")),
            due=() if paused else tuple(row for _, row in due),
            expired=expired,
        )

    def clock(self) -> datetime:
        with self._line.call():
            return _moment(self._line.moment().lower)

    def rows(self, names: Iterable[str] | None = None) -> list[Row]:
        with self._line.call():
            read = self._read_all((), None) if names is None else self._read(_of_rows(names), None)
        rows = [_row(kept) for key, (kept, _) in read.found.items() if key.startswith("row:")]
        return sorted(rows, key=lambda row: row.task)

    # -- which version's schedule holds, and what was lost ------------------------------------------------------------

    def sync(
        self, declared: Declarations, *, elsewhere: Elsewhere = nowhere_else, now: datetime | None = None
    ) -> Synced:
        """
        Put the rows in step with these declarations, unless a newer version's hold, and put right what was lost.

        1. Read everything. Ask elsewhere, once, of the rows that are missing or given away.
        2. A restarted server: hold all rows, and count everything until now as done.
        3. Take back what was given away, if this version takes over. Not after the state: whoever died in between would
           leave it with no store at all, since nobody takes back what a newer version gave away.
        4. Write the state: from here on this version is the newest. Whoever dies now leaves rows that do not fit it,
           and the next look of any process of this version finds them.
        5. Register what is missing, take over what has another schedule. A lost row of a task that this version does
           not hold becomes a blank one, which the version that holds it fills.
        6. Add the names to the directory: after the rows, so that a name without a row has lost it.

        Each is a compare-and-set; where one fails, all begins anew.
        """
        done = _Done()
        before: Mapping[str, Before] | None = None if elsewhere is not nowhere_else else {}
        for attempt in range(ROUNDS):
            _pause(attempt)
            with self._line.call():
                read = self._read_all(self._rows_of(declared), now)
                asked = [] if before is not None else self._to_ask_of(declared, read)
                if before is not None or not asked:
                    if self._put_right(declared, before or {}, read, done):
                        break
                    continue
            # Outside the call: other stores are asked, and give rows away.
            before = elsewhere(asked)
        else:
            raise _contended(self.alias, "the rows of these declarations")
        return Synced(
            now=_moment(max(read.moment.lower, done.until)),
            registered=tuple(done.registered),
            changed=tuple(dict.fromkeys(done.changed)),
            lost={name: _moment_or_none(last) for name, last in done.lost.items()},
            trouble="; ".join(done.trouble),
        )

    def _to_ask_of(self, declared: Declarations, read: _Read) -> list[str]:
        state = read.get(_STATE) or {}
        changes = take_overs(declared, _versions(state, declared.server), _moment(read.moment.lower))
        asked = [name for change in changes for name in change.tasks if (read.get(_of(name)) or {}).get("moved_to")]
        found = self._findings(declared, read, state, [change.key for change in changes])
        blank = [name for name in found.off if not (read.get(_of(name)) or {}).get("fingerprint")]
        return [*asked, *found.missing, *(name for name in found.lost if name in found.held), *blank]

    def _put_right(self, declared: Declarations, before: Mapping[str, Before], read: _Read, done: _Done) -> bool:
        """Do one round of ``sync``; return False where it must begin anew."""
        moment = read.moment
        self._prints(declared)
        state = read.get(_STATE)
        if state is not None and _was_restarted(state, moment):
            self._hold_all(declared, read, state, done)
            return False
        changes = take_overs(declared, _versions(state or {}, declared.server), _moment(moment.lower))
        if state is None:
            done.began_empty = done.began_empty or not read.found
            if read.found and not done.began_empty:
                done.note("its state was lost, and with it what was paused")
            state = {"since": moment.upper, **_run_of(moment)}
        versions = dict(state.get("versions") or {})
        for change in changes:
            versions[change.key] = {
                "scope": change.scope,
                "first_seen_at": _micros(change.first_seen_at),
                "seen_at": moment.lower,
                "since": None if change.since is None else _micros(change.since),
            }
        since = {scope: (versions.get(key) or {}).get("since") for key, scope in keys(declared).items()}
        new: dict[str, _Kept] = {}
        notes: list[Callable[[set[str]], None]] = []
        tasks = {name: task for change in changes for name, task in change.tasks.items()}
        moved = {name: task for name, task in tasks.items() if (read.get(_of(name)) or {}).get("moved_to")}
        self._take_over(moved, since, before, read, new, notes, done)
        if not self._put(read, new, notes):
            return False
        old = moment.lower - _length(FORGOTTEN_AFTER)
        left = {key: version for key, version in versions.items() if version["seen_at"] >= old}
        fresh = {**state, "versions": left}
        if (changes or left != versions or read.get(_STATE) is None) and not self._write(read, {_STATE: fresh})[_STATE]:
            return False
        found = self._findings(declared, read, fresh)
        if not found.directory.is_whole and fresh["since"] + _length(self._longest) <= moment.lower:
            done.note("the list of its rows was lost")
        new, notes = {}, []
        self._register(found, before, read, fresh, new, notes, done)
        off = {name: found.held[name] for name in found.off}
        self._take_over(off, since, before, read, new, notes, done)
        if not self._put(read, new, notes):
            return False
        names = {key.removeprefix("row:") for key in new} | set(found.unnamed)
        return self._write_names(read, found.directory, names - found.directory.names)

    def _put(self, read: _Read, new: Mapping[str, _Kept], notes: Iterable[Callable[[set[str]], None]]) -> bool:
        """Write these rows, and note of those that were written what is to be said of them."""
        stored = self._write(read, new)
        for note in notes:
            note({key for key, written in stored.items() if written})
        return all(stored.values())

    def _register(
        self,
        found: _Findings,
        before: Mapping[str, Before],
        read: _Read,
        state: _Kept,
        new: dict[str, _Kept],
        notes: list[Callable[[set[str]], None]],
        done: _Done,
    ) -> None:
        moment = read.moment
        longest = _length(self._longest)
        # Not for longer than that, should the server's clock have been ahead at that time.
        emptied = min(state["since"], moment.upper) + longest
        lost: dict[str, int | None] = {}
        blank: list[str] = []
        for name in (*found.lost, *found.missing):
            was_named = name in found.directory.names or name in self._names
            task = found.held.get(name)
            if task is None:
                new[_of(name)] = self._blank(name, moment)
                blank.append(name)
                continue
            known = _usable(before.get(name))
            is_lost = (known is None or known.row is None) and (
                was_named or (known is not None and known.last_due_at is not None)
            )
            # The store may have been emptied while the task ran: what was due until now counts as done.
            at = moment.past if is_lost or emptied > moment.lower else moment.lower
            kept = _kept(registered(name, task, _moment(at), known))
            if is_lost or was_named:
                kept["hold_until"] = moment.upper + longest
            elif emptied > moment.lower:
                kept["hold_until"] = emptied
            if is_lost:
                last = known.last_due_at if known is not None else None
                lost[name] = None if last is None else _micros(last)
            if is_lost or emptied > moment.lower:
                kept["fence"] = max(kept["fence"], moment.past)
            new[_of(name)] = kept

        def note(stored: set[str]) -> None:
            done.registered += [n for n in (*found.missing, *found.lost) if n in found.held and _of(n) in stored]
            told = {name: last for name, last in lost.items() if _of(name) in stored}
            if told:
                done.lost.update(told)
                done.until = moment.past
            if [name for name in (*told, *blank) if _of(name) in stored]:
                done.note("the store was empty" if done.began_empty else "rows were lost")

        notes.append(note)

    def _take_over(
        self,
        tasks: Mapping[str, ScheduledTask],
        since: Mapping[str, int | None],
        before: Mapping[str, Before],
        read: _Read,
        new: dict[str, _Kept],
        notes: list[Callable[[set[str]], None]],
        done: _Done,
    ) -> None:
        moment = read.moment
        changed: list[str] = []
        lost: dict[str, int | None] = {}
        for name, task in tasks.items():
            kept = read.get(_of(name))
            assert kept is not None
            if not kept["fingerprint"]:
                known = _usable(before.get(name))
                last = known.last_due_at if known is not None else None
                if kept.get("owner") or kept.get("runs"):
                    # It runs here: whatever another store says of it is older.
                    known = None if known is None else replace(known, row=None)
                fresh = _kept(registered(name, task, _moment(moment.past), known))
                new[_of(name)] = {
                    **kept,
                    **{field: fresh.get(field) for field in _SCHEDULE},
                    "last_due_at": max(kept["last_due_at"], fresh["last_due_at"]),
                    "fence": max(kept["fence"], fresh["fence"]),
                    "hold_until": max(kept["hold_until"], moment.upper + _length(self._longest)),
                }
                if known is None or known.row is None:
                    lost[name] = None if last is None else _micros(last)
                continue
            back = _moment_or_none(since[_scope_of(name)])
            row = taken_over(_row(kept), task, _moment(moment.lower), back, before.get(name))
            values = _kept(row)
            known = before.get(name)
            if kept.get("moved_to") and known is not None and known.last_due_at is not None:
                # Should the other store have lost its row: the history does not forget.
                values["last_due_at"] = max(values["last_due_at"], _micros(known.last_due_at))
            new[_of(name)] = {
                **kept,
                **{field: values.get(field) for field in (*_SCHEDULE, "last_due_at", "fence")},
                "blank": None,
            }
            if not kept.get("blank"):
                changed.append(name)

        def note(stored: set[str]) -> None:
            done.changed += [name for name in changed if _of(name) in stored]
            told = {name: last for name, last in lost.items() if _of(name) in stored}
            if told:
                done.lost.update(told)
                done.until = moment.past
                done.note("rows were lost")

        notes.append(note)

    def _hold_all(self, declared: Declarations, read: _Read, state: _Kept, done: _Done) -> None:
        """Hold the rows of a server that was restarted and kept its items (``-e``), then note which run it is."""
        moment = read.moment
        new: dict[str, _Kept] = {}
        for key, (kept, _) in read.found.items():
            if not key.startswith("row:"):
                continue
            last = max(kept["last_due_at"], moment.past)
            task = declared.tasks.get(kept["task"].partition("@")[0])
            following, blank = kept.get("next_due_at"), kept.get("blank")
            if task is not None and task.fingerprint == kept["fingerprint"]:
                after = task.next(_moment(max(last, kept["schedule_since"])))
                following = None if after is None else _micros(after)
            elif following is not None and following <= last:
                following, blank = None, 1
            hold = max(kept.get("hold_until") or 0, moment.upper + _length(self._longest))
            new[key] = {**kept, "last_due_at": last, "next_due_at": following, "blank": blank, "hold_until": hold}
        stored = self._write(read, new)
        for key in new:
            if stored[key]:
                kept = read.found[key][0]
                done.lost.setdefault(kept["task"], kept["last_due_at"])
        done.note("the Memcached server was restarted")
        done.until = moment.past
        if all(stored.values()):
            self._write(read, {_STATE: {**state, "since": moment.upper, **_run_of(moment)}})

    def _findings(self, declared: Declarations, read: _Read, state: _Kept, taken: Sequence[str] = ()) -> _Findings:
        directory = _directory(read)
        versions = _versions(state, declared.server)
        names = self._rows_of(declared)
        scopes = set()
        for key, scope in keys(declared).items():
            seen = [each for each in versions if each.scope == scope and each.first_seen_at is not None]
            newest = max(seen, key=lambda each: (each.first_seen_at, each.key), default=None)
            if key in taken or (newest is not None and newest.key == key):
                scopes.add(scope)
        held = {name: task for name, task in names.items() if _scope_of(name) in scopes}
        prints = self._prints(declared)
        lost = [name for name in directory.names | self._names if _of(name) not in read.found]
        missing: list[str] = []
        off: list[str] = []
        for name in held:
            kept = read.get(_of(name))
            if kept is None:
                if name not in directory.names and name not in self._names:
                    missing.append(name)
            elif not kept.get("moved_to") and (kept["fingerprint"] != prints[name] or kept.get("blank")):
                off.append(name)
        known = {**names, **dict.fromkeys(self._names)}
        unnamed = [name for name in known if name not in directory.names and _of(name) in read.found]
        return _Findings(directory, held, lost, missing, off, unnamed)

    def _prints(self, declared: Declarations) -> dict[str, str]:
        # Ten thousand hashes at each look would be most of it.
        given = (declared.digest, declared.server_digest, declared.server)
        if self._fingerprints[0] != given:
            found = {name: task.fingerprint for name, task in self._rows_of(declared).items()}
            self._fingerprints = (given, found)
            self._longest = _longest_lease(declared)
        return self._fingerprints[1]

    def _rows_of(self, declared: Declarations) -> dict[str, ScheduledTask]:
        return {task.row_name(declared.server): task for task in declared.tasks.values()}

    def _write_names(self, read: _Read, directory: _Directory, names: set[str]) -> bool:
        """Add these names to the directory, and restore what it has lost; False where somebody else wrote it."""
        if directory.is_whole and not names:
            return True
        parts = {index: list(found) for index, found in directory.parts.items()}
        last = max(parts, default=0)
        if (read.get(_part(last)) or {}).get("more"):
            last += 1
        touched = {index for index in range(last + 1) if index not in parts}
        for index in touched:
            parts[index] = []
        size = sum(len(name) + 3 for name in parts[last])
        for name in sorted(names):
            size += len(name) + 3
            if size > PART_BYTES and parts[last]:
                touched.add(last)  # which says from now on that there is another
                last, size = last + 1, len(name) + 3
                parts[last] = []
            parts[last].append(name)
            touched.add(last)
        # The further ones first: one that nobody points at yet is found all the same.
        new = {_part(index): {"names": parts[index], "more": index < last} for index in sorted(touched, reverse=True)}
        if not all(self._write(read, new).values()):
            return False
        self._names |= names
        return True

    def _blank(self, name: str, moment: _Moment) -> _Kept:
        """Return a row in the place of a lost one whose schedule is unknown here: nobody claims it as it is."""
        return {
            "task": name,
            "fingerprint": "",
            "last_due_at": moment.past,
            "schedule_since": moment.past,
            "not_before": moment.lower,
            "hold_until": moment.upper + _length(self._longest),
            "fence": moment.past,
        }

    # -- claim --------------------------------------------------------------------------------------------------------

    def claim(
        self,
        occurrences: Sequence[Occurrence],
        *,
        server: str,
        slots: int | None = None,
        record: ClaimRecorder,
        now: datetime | None = None,
    ) -> list[Claim]:
        claims = self._settle(now) if self._pending else []
        if occurrences:
            try:
                claims += self._sent(occurrences, server, slots, now)
            except Exception:
                if not claims:
                    raise
                # These are ours, and would be forgotten: what is wrong is raised by the next call.
        if claims:
            record(claims, max(claim.acquired_at for claim in claims))
        return claims

    def _sent(
        self, occurrences: Sequence[Occurrence], server: str, slots: int | None, now: datetime | None
    ) -> list[Claim]:
        first: dict[str, Occurrence] = {}
        for occurrence in occurrences:
            first.setdefault(occurrence.row, occurrence)
        owners = {str(uuid.uuid4()): occurrence for occurrence in first.values()}
        longest = max(occurrence.lease for occurrence in owners.values()).total_seconds()
        sent = _Pending(owners, server, _boot_time() + longest)
        won: dict[str, Claim] = {}
        tried: set[str] = set()
        try:
            with self._line.call():
                self._claim(sent, slots, now, won, tried)
        except (MemcacheError, OSError, StoreTimeout) as error:
            unsure = tried - set(won)
            if unsure and not isinstance(error, StoreTimeout):
                # Once more over a new connection, with the same owners: what was won the first time is found so.
                try:
                    with self._line.call():
                        self._claim(sent, slots, now, won, tried)
                except (MemcacheError, OSError, StoreTimeout):
                    pass
                else:
                    unsure = set()
            if tried - set(won):
                # Even what was refused the second time: the first may still arrive, from a server that was only slow.
                self._pending.append(replace(sent, owners={owner: owners[owner] for owner in tried - set(won)}))
            if not won or unsure:
                if won:
                    self._pending.append(replace(sent, owners={owner: owners[owner] for owner in won}))
                raise
        return [won[owner] for owner in owners if owner in won]

    def _claim(
        self, sent: _Pending, slots: int | None, now: datetime | None, won: dict[str, Claim], tried: set[str]
    ) -> None:
        """
        Claim what may start, in the given order.

        1. Read the rows, the state and the server's own row, which counts what runs on it.
        2. Take a slot there for each that may start, as many as are free.
        3. Write the rows. What somebody else changed meanwhile is read again, and so is everything once half a lease
           has gone by since: this process may have been frozen.
        4. Give back the slots of what was not won.
        """
        here = f"server:{sent.server}"
        left = {owner: occurrence for owner, occurrence in sent.owners.items() if owner not in won}
        taken: set[str] = set()
        for attempt in range(CLAIM_ROUNDS):
            _pause(attempt)
            read = self._read([here, *(_of(o.row) for o in left.values())], now)
            lower = read.moment.lower
            state = read.get(_STATE)
            if state is None or not read.is_sound:
                break
            for owner, occurrence in list(left.items()):
                kept = read.get(_of(occurrence.row))
                if kept is not None and _run(kept, owner) is not None:
                    won[owner] = self._won(kept, owner, occurrence)
                    del left[owner]
            occupied = dict((read.get(here) or {}).get("owners") or {})
            others = sum(until > lower for owner, until in occupied.items() if owner not in sent.owners)
            free = len(left) if slots is None else max(0, slots - others - len(won))
            ready = [(owner, o) for owner, o in left.items() if _may_start(read.get(_of(o.row)), o, lower, state)]
            wanted = dict(ready[:free])
            if not wanted:
                break
            standing = {owner: until for owner, until in occupied.items() if until > lower and owner not in left}
            standing |= {owner: read.moment.upper + _length(o.lease) for owner, o in wanted.items()}
            if not self._write(read, {here: {"owners": standing}})[here]:
                continue
            taken |= set(wanted)
            new = {
                _of(o.row): _claimed(read.found[_of(o.row)][0], o, owner, sent.server, read.moment)
                for owner, o in wanted.items()
            }
            if _boot_time() - read.at > min(o.lease for o in wanted.values()).total_seconds() / 2:
                continue
            tried |= set(wanted)
            stored = self._write(read, new)
            for owner, occurrence in wanted.items():
                key = _of(occurrence.row)
                if stored[key]:
                    won[owner] = self._won(new[key], owner, occurrence)
                    del left[owner]
            if all(stored.values()):
                break
        if taken - set(won):
            self._change({here: partial(_without, taken - set(won))}, now)

    def _won(self, kept: _Kept, owner: str, occurrence: Occurrence) -> Claim:
        run = _run(kept, owner)
        assert run is not None
        self._stands[owner] = run["expires_at"]
        return Claim(
            occurrence=occurrence,
            owner=owner,
            fence=_fence_of(kept, run),
            server=run["server"],
            acquired_at=_moment(run["acquired_at"]),
            expires_at=_moment(run["expires_at"]),
            finish_by=_moment_or_none(run.get("finish_by")),
        )

    def _settle(self, now: datetime | None) -> list[Claim]:
        """Return the claims that turned out to be ours although their answers were lost."""
        claims: list[Claim] = []
        with self._line.call():
            read = self._read(_of_rows(o.row for sent in self._pending for o in sent.owners.values()), now)
        pending, self._pending = self._pending, []
        for sent in pending:
            left = dict(sent.owners)
            for owner, occurrence in sent.owners.items():
                kept = read.get(_of(occurrence.row))
                if kept is not None and _run(kept, owner) is not None:
                    claims.append(self._won(kept, owner, occurrence))
                    del left[owner]
            # What a slow server writes later than this has ended when it is written, and is the reaper's.
            if left and _boot_time() < sent.until:
                self._pending.append(replace(sent, owners=left))
        return claims

    # -- skip ---------------------------------------------------------------------------------------------------------

    def skip(self, skips: Sequence[Skip], *, record: SkipRecorder, now: datetime | None = None) -> list[Skip]:
        if not skips:
            return []
        stamp = str(uuid.uuid4())
        first: dict[str, Skip] = {}
        for skip in skips:
            first.setdefault(_of(skip.occurrence.row), skip)
        steps: dict[str, _Step] = {key: partial(_skipped, skip, stamp) for key, skip in first.items()}
        try:
            with self._line.call():
                results = self._change(steps, now)
        except (MemcacheError, OSError):
            # Its stamp tells what was given up although the answer was lost.
            with self._line.call():
                results = self._change(steps, now)
        given_up = [results[key][0] for key in first if results[key] is not None]
        if given_up:
            record(given_up, _moment(max(result[1] for result in results.values() if result is not None)))
        return given_up

    # -- renew and release --------------------------------------------------------------------------------------------

    def renew(self, claims: Sequence[Claim], *, now: datetime | None = None) -> set[str]:
        if not claims:
            return set()
        steps: dict[str, _Step] = {}
        for name, group in _grouped(claims, lambda claim: claim.occurrence.row).items():
            steps[_of(name)] = partial(self._renewed, group)
        for server, group in _grouped(claims, lambda claim: claim.server).items():
            steps[f"server:{server}"] = partial(_occupied, group)
        standing: dict[str, int] = {}
        with self._line.call():
            for key, result in self._change(steps, now).items():
                if key.startswith("row:"):
                    standing.update(result)
        for claim in claims:
            self._stands.pop(claim.owner, None)
        self._stands.update(standing)
        return set(standing)

    def _renewed(self, claims: Sequence[Claim], kept: _Kept | None, read: _Read) -> tuple[_Kept | None, dict[str, int]]:
        moment = read.moment
        standing: dict[str, int] = {}
        for claim in claims:
            if kept is None or _run(kept, claim.owner) is None:
                if not self._may_return(kept, claim, moment):
                    continue
                kept = self._returned(kept, claim, moment)
            expires_at = moment.upper + _length(claim.occurrence.lease)
            kept = _with_run(kept, claim.owner, {"renewed_at": moment.lower, "expires_at": expires_at})
            standing[claim.owner] = expires_at
        return (kept if standing else None), standing

    def _may_return(self, kept: _Kept | None, claim: Claim, moment: _Moment) -> bool:
        """May an owner whose row was lost be put back? Its lease must stand, and nobody can have claimed since."""
        if self._stands.get(claim.owner, 0) <= moment.lower:
            return False
        if kept is None:
            return True
        if (kept.get("hold_until") or 0) <= moment.lower:
            return False
        if claim.owner == kept.get("freed") or claim.owner in (kept.get("released") or ()):
            return False
        return _may_overlap(claim.occurrence) or not kept.get("owner") or _fence_of(kept, kept) < claim.fence

    def _returned(self, kept: _Kept | None, claim: Claim, moment: _Moment) -> _Kept:
        o = claim.occurrence
        if kept is None:
            self._longest = max(self._longest, o.lease)
            kept = self._blank(o.row, moment)
        run = {
            "server": claim.server,
            "due_at": _micros(o.due_at),
            "acquired_at": _micros(claim.acquired_at),
            "finish_by": None if claim.finish_by is None else _micros(claim.finish_by),
        }
        if _may_overlap(o):
            runs = {**(kept.get("runs") or {}), claim.owner: {**run, "fence": claim.fence}}
            kept = {**kept, "runs": runs}
        else:
            kept = {**kept, **run, "owner": claim.owner, "owner_fence": claim.fence}
        last = kept["last_due_at"] if o.trigger in BY_HAND else max(kept["last_due_at"], _micros(o.due_at))
        return {**kept, "last_due_at": last, "fence": max(kept["fence"], claim.fence)}

    def release(
        self, released: Sequence[ReleasedClaim], *, record: ReleaseRecorder, now: datetime | None = None
    ) -> list[bool]:
        if not released:
            return []
        steps: dict[str, _Step] = {}
        for name, group in _grouped(released, lambda item: item.claim.occurrence.row).items():
            steps[_of(name)] = partial(self._released, group)
        for server, group in _grouped(released, lambda item: item.claim.server).items():
            steps[f"server:{server}"] = partial(_without, {item.claim.owner for item in group})
        ended: dict[str, str] = {}
        unsaid = {item.claim.owner for item in released} & self._untold
        self._untold |= {item.claim.owner for item in released}
        at = 0
        with self._line.call():
            for key, result in self._change(steps, now).items():
                if key.startswith("row:"):
                    ended.update(result[0])
                    at = max(at, result[1])
        told = [
            (item, ended[item.claim.owner] != "lost")
            for item in released
            if ended[item.claim.owner] != "before" or item.claim.owner in unsaid
        ]
        for item in released:
            self._stands.pop(item.claim.owner, None)
        if told:
            record(told, _moment(at))
        self._untold -= {item.claim.owner for item in released}
        return [ended[item.claim.owner] != "lost" for item in released]

    def _released(
        self, items: Sequence[ReleasedClaim], kept: _Kept | None, read: _Read
    ) -> tuple[_Kept | None, tuple[dict[str, str], int]]:
        moment = read.moment
        ended: dict[str, str] = {}
        for item in items:
            claim = item.claim
            may_overlap = _may_overlap(claim.occurrence)
            before = list((kept or {}).get("released") or ())
            if claim.owner in before:
                ended[claim.owner] = "before"
                continue
            if kept is None or _run(kept, claim.owner) is None:
                if not self._may_return(kept, claim, moment):
                    ended[claim.owner] = "lost"
                    continue
                kept = self._returned(kept, claim, moment)
            kept = _without_run(kept, claim.owner)
            most = RELEASED_KEPT if may_overlap else 1
            kept = {**kept, "released": [*before, claim.owner][-most:]}
            if item.outcome.started and item.min_break and not may_overlap:
                kept["not_before"] = moment.upper + _length(item.min_break)
            ended[claim.owner] = "freed"
        return (kept if "freed" in ended.values() else None), (ended, moment.lower)

    # -- reap ---------------------------------------------------------------------------------------------------------

    def reap(self, *, server: str, record: CleanupRecorder, now: datetime | None = None) -> list[Cleanup]:
        """
        Free every lease that has ended.

        What was freed is kept in its row until it is recorded: whoever dies in between, or finds no database, leaves it
        to the next reap.
        """
        with self._line.call():
            read = self._read_all((), now)
            lower = read.moment.lower
            ended = [key for key, (kept, _) in read.found.items() if key.startswith("row:") and _has_ended(kept, lower)]
            results = self._change({key: partial(_reaped, server, False) for key in ended}, now)
        freed = [cleanup for mine, _ in results.values() for cleanup in mine]
        everything = [cleanup for _, kept in results.values() for cleanup in kept]
        recorded = self._record(everything, record, now)
        return [recorded.get(cleanup.owner, cleanup) for cleanup in freed]

    def free(self, name: str, *, server: str, record: CleanupRecorder, now: datetime | None = None) -> Cleanup | None:
        with self._line.call():
            freed, _ = self._change({_of(name): partial(_reaped, server, True)}, now)[_of(name)]
        if not freed:
            return None
        cleanup: Cleanup = freed[0]
        return self._record([cleanup], record, now).get(cleanup.owner, cleanup)

    def _record(self, cleanups: Sequence[Cleanup], record: CleanupRecorder, now: datetime | None) -> dict[str, Cleanup]:
        """Have these recorded; take off their rows' lists what was, and return it by owner."""
        if not cleanups:
            return {}
        recorded = {cleanup.owner: cleanup for cleanup in record(cleanups)}
        rows = {_of(cleanup.task) for cleanup in recorded.values()}
        if rows:
            with self._line.call():
                self._change({key: partial(_forgotten, set(recorded)) for key in rows}, now)
        return recorded

    # -- from store to store ------------------------------------------------------------------------------------------

    def leave(self, names: Sequence[str], *, to: str, now: datetime | None = None) -> list[Row]:
        if not names:
            return []
        with self._line.call():
            results = self._change({key: partial(_left, to) for key in _of_rows(names)}, now)
        return sorted((row for row in results.values() if row is not None), key=lambda row: row.task)

    def arrive(self, names: Sequence[str], *, now: datetime | None = None) -> None:
        if names:
            with self._line.call():
                self._change(dict.fromkeys(_of_rows(names), _arrived), now)

    # -- the connection -----------------------------------------------------------------------------------------------

    @property
    def is_calling(self) -> bool:
        return self._line.is_calling

    def cut(self) -> bool:
        return self._line.cut()

    def close(self) -> None:
        self._line.close()

    def _item(self, key: str) -> bytes:
        """Return the key of an item as the server has it: made by the cache, of a hash where it would be refused."""
        found = self._items.get(key)
        if found is not None:
            return found
        kind, _, name = key.partition(":")
        namespace = f"multiserver_schedule:{{{self.alias}}}:"
        made = str(self._make_key(namespace + key))
        if not _is_key(made):
            made = str(self._make_key(f"{namespace}{kind}:{hashlib.sha256(name.encode()).hexdigest()}"))
        if not _is_key(made):
            raise ImproperlyConfigured(
                f"The cache {self.cache!r} makes keys that Memcached does not take, such as {made!r}. Its KEY_PREFIX, "
                f"its KEY_FUNCTION and the lock's alias {self.alias!r} should leave out spaces and control characters, "
                "and be shorter than 100 characters together."
            )
        self._items[key] = made.encode()
        return self._items[key]

    def _read(self, items: Iterable[str], now: datetime | None, of: _Read | None = None) -> _Read:
        """Read the state and these items; with ``of``, an earlier read of the same call, add them to that."""
        at = _boot_time()
        read = of
        if read is None:
            moment = self._line.moment(now)
            read = _Read(moment, at, self._line.connection)
            items = [_STATE, *items]
        by_key = {self._item(item): item for item in items}
        for key, (value, token) in self._line.read(list(by_key)).items():
            read.found[by_key[key]] = (self._decoded(key, value), token)
        return read

    def _decoded(self, key: bytes, value: bytes) -> _Kept:
        try:
            kept: _Kept = json.loads(value)
        except ValueError:
            raise ScheduleError(
                f"The item {key.decode()!r} in the Memcached server {self._line.name} was not written by this lock. "
                "Nothing else may use keys of its namespace: delete it."
            ) from None
        return kept

    def _read_all(self, names: Iterable[str], now: datetime | None) -> _Read:
        """Read the state, the directory, and every row that it or ``names`` names: the directory before the rows."""
        wanted = dict.fromkeys([*names, *self._names])
        parts = [_part(index) for index in range(self._parts + 1)]
        read = self._read([*parts, *map(_of, wanted)], now)
        index = self._parts
        while read.get(_part(index)) is not None:
            index += 1
            self._read([_part(index)], now, read)
        self._parts = max(1, index)
        directory = _directory(read)
        further = [name for name in directory.names if name not in wanted]
        if further:
            self._read(map(_of, further), now, read)
        self._names |= directory.names
        return read

    def _write(self, read: _Read, new: Mapping[str, _Kept]) -> dict[str, bool]:
        """Write these items, each only if it is still as it was read; tell which were written."""
        items = []
        for key, kept in new.items():
            found = read.found.get(key)
            items.append((self._item(key), _encoded(kept), None if found is None else found[1]))
        return dict(zip(new, self._line.write(items, read.connection), strict=True))

    def _change(self, steps: Mapping[str, _Step], now: datetime | None) -> dict[str, Any]:
        """Take each item through its step, again where it changed meanwhile; return what each step had to say."""
        said: dict[str, Any] = {}
        left = list(steps)
        for attempt in range(ROUNDS):
            if not left:
                return said
            _pause(attempt)
            read = self._read(left, now)
            new: dict[str, _Kept] = {}
            for key in left:
                kept, said[key] = steps[key](read.get(key), read)
                if kept is not None:
                    new[key] = kept
            left = [key for key, written in self._write(read, new).items() if not written]
        if left:
            raise _contended(self.alias, left[0])
        return said


# -- where the server is ----------------------------------------------------------------------------------------------


def _server_of(cache: str, alias: str) -> tuple[tuple[str, int] | str, str]:
    """Return the one server of this cache, as pymemcache wants it, and as people read it."""
    if cache not in caches.settings:
        known = ", ".join(sorted(caches.settings))
        raise ImproperlyConfigured(f"There is no cache {cache!r}, which the lock {alias!r} names. Known are: {known}.")
    if not isinstance(caches[cache], BaseMemcachedCache):
        raise ImproperlyConfigured(
            f"The cache {cache!r} of the lock {alias!r} ({caches.settings[cache]['BACKEND']}) is no Memcached. "
            "This lock needs Django's PyMemcacheCache or PyLibMCCache; for others, see locks.cache.CacheLock."
        )
    location = caches.settings[cache].get("LOCATION") or ""
    servers = re.split("[;,]", location) if isinstance(location, str) else [*location]
    servers = [str(server).strip() for server in servers if str(server).strip()]
    if len(servers) != 1:
        raise ImproperlyConfigured(
            f"The cache {cache!r} of the lock {alias!r} has {len(servers)} servers in LOCATION. A lock needs exactly "
            "one: with several, one that is away for one client would be two locks. Give the lock a cache of its own."
        )
    name = servers[0]
    if name.startswith(("unix:", "/")):
        return name.removeprefix("unix:"), name
    match = re.fullmatch(r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:/\[\]\s]+))(?::(?P<port>\d{1,5}))?", name)
    if match is None:
        raise ImproperlyConfigured(
            f"The LOCATION {name!r} of the cache {cache!r} is no server that the lock {alias!r} can use. "
            "Write host:port, [v6 address]:port, unix:/path or /path."
        )
    return (match["v6"] or match["host"], int(match["port"] or 11211)), name


def _is_key(made: str) -> bool:
    return len(made.encode()) <= 250 and not any(ord(letter) < 33 or ord(letter) == 127 for letter in made)


# -- rows: what may be done to one, and what it is then. Pure. ---------------------------------------------------------

_RUN: Final = ("owner", "owner_fence", "server", "due_at", "acquired_at", "renewed_at", "expires_at", "finish_by")
_SCHEDULE: Final = ("fingerprint", "schedule_since", "next_due_at", "not_before", "moved_to", "moved_from")


def _may_start(kept: _Kept | None, occurrence: Occurrence, lower: int, state: _Kept) -> bool:
    if kept is None or kept.get("moved_to") or kept.get("moved_from") or (kept.get("hold_until") or 0) > lower:
        return False
    if kept.get("owner") and not _may_overlap(occurrence):
        return False
    if occurrence.trigger in BY_HAND:
        return True
    return bool(_is_open(kept, occurrence, lower, state) and kept["not_before"] <= lower)


def _is_open(kept: _Kept, occurrence: Occurrence, lower: int, state: _Kept) -> bool:
    """Is the due time still to be had, under this schedule, with nothing paused?"""
    due_at = _micros(occurrence.due_at)
    return (
        kept["last_due_at"] < due_at <= lower
        and kept["fingerprint"] == occurrence.task.fingerprint
        and not kept.get("paused_at")
        and not state.get("paused_at")
    )


def _claimed(kept: _Kept, occurrence: Occurrence, owner: str, server: str, moment: _Moment) -> _Kept:
    limit = occurrence.task.limit
    fence = max(kept["fence"] + 1, moment.lower)
    run = {
        "server": server,
        "due_at": _micros(occurrence.due_at),
        "acquired_at": moment.lower,
        "renewed_at": moment.lower,
        "expires_at": moment.upper + _length(occurrence.lease),
        "finish_by": None if limit is None else moment.upper + _length(limit),
    }
    if _may_overlap(occurrence):
        kept = {**kept, "runs": {**(kept.get("runs") or {}), owner: {**run, "fence": fence}}}
    else:
        kept = {**kept, **run, "owner": owner, "owner_fence": fence}
    kept["fence"] = fence
    if occurrence.trigger not in BY_HAND:
        following = occurrence.next_due_at
        kept["last_due_at"] = _micros(occurrence.due_at)
        kept["next_due_at"] = None if following is None else _micros(following)
    return kept


def _skipped(skip: Skip, stamp: str, kept: _Kept | None, read: _Read) -> tuple[_Kept | None, tuple[Skip, int] | None]:
    occurrence, lower, state = skip.occurrence, read.moment.lower, read.get(_STATE)
    if kept is None or state is None or not read.is_sound:
        return None, None
    told = skip
    if skip.reason == "held":
        told = replace(skip, holder=kept.get("server") or "", held_since=_moment_or_none(kept.get("acquired_at")))
    due_at = _micros(occurrence.due_at)
    if kept.get("stamp") == stamp and kept["last_due_at"] == due_at:
        return None, (told, lower)
    if not _is_open(kept, occurrence, lower, state) or kept.get("moved_to") or kept.get("moved_from"):
        return None, None
    stands = kept.get("owner") and kept["expires_at"] > lower and kept["renewed_at"] >= due_at
    if skip.reason == "held" and not stands:
        # A holder that has not renewed since may be dead: then the due time is still wanted.
        return None, None
    following = occurrence.next_due_at
    return {
        **kept,
        "last_due_at": due_at,
        "next_due_at": None if following is None else _micros(following),
        "stamp": stamp,
    }, (told, lower)


def _run(kept: _Kept, owner: str) -> _Kept | None:
    """Return the run of this owner, or None where it has none here."""
    if kept.get("owner") == owner:
        return kept
    found: _Kept | None = (kept.get("runs") or {}).get(owner)
    return found


def _fence_of(kept: _Kept, run: _Kept) -> int:
    """Return the fence of a run: the row's own may have risen since, where the run came back to a row that was lost."""
    fence: int = kept["owner_fence"] if run is kept else run["fence"]
    return fence


def _with_run(kept: _Kept, owner: str, values: _Kept) -> _Kept:
    if kept.get("owner") == owner:
        return {**kept, **values}
    runs = kept["runs"]
    return {**kept, "runs": {**runs, owner: {**runs[owner], **values}}}


def _without_run(kept: _Kept, owner: str) -> _Kept:
    if kept.get("owner") == owner:
        return {**kept, **dict.fromkeys(_RUN)}
    return {**kept, "runs": {each: run for each, run in kept["runs"].items() if each != owner}}


def _has_ended(kept: _Kept, lower: int) -> bool:
    if kept.get("reaped") or (kept.get("owner") and kept["expires_at"] <= lower):
        return True
    return any(run["expires_at"] <= lower for run in (kept.get("runs") or {}).values())


def _reaped(
    server: str, by_hand: bool, kept: _Kept | None, read: _Read
) -> tuple[_Kept | None, tuple[list[Cleanup], list[Cleanup]]]:
    """Free what has ended (or, by hand, what is held), and say what that was and what is still to be recorded."""
    if kept is None:
        return None, ([], [])
    lower = read.moment.lower
    ended: dict[str, _Kept] = {}
    if kept.get("owner") and (by_hand or kept["expires_at"] <= lower):
        ended[kept["owner"]] = kept
    if not by_hand:
        ended |= {owner: run for owner, run in (kept.get("runs") or {}).items() if run["expires_at"] <= lower}
    before = list(kept.get("reaped") or ())
    freed: list[_Kept] = []
    for owner, run in ended.items():
        overran = bool(run.get("finish_by")) and run["finish_by"] <= lower
        freed.append(
            {
                "due_at": run.get("due_at"),
                "server": run["server"],
                "owner": owner,
                "fence": _fence_of(kept, run),
                "acquired_at": run["acquired_at"],
                "expired_at": run["expires_at"],
                "cleaned_at": lower,
                "cleaned_by": server,
                "reason": "released_by_hand" if by_hand else "overran" if overran else "lease_expired",
            }
        )
    task = kept["task"]
    mine = [_cleanup(task, values) for values in freed]
    listed = [*before, *freed]
    dropped = listed[:-MOST_REAPED]
    if not ended:
        return None, ([], [_cleanup(task, values) for values in listed])
    for owner in ended:
        kept = {**_without_run(kept, owner), "fence": kept["fence"] + 1}
        if by_hand:
            kept["freed"] = owner
    for values in dropped:
        logger.warning(
            "task=%s due=%s server=%s: this clean-up is recorded now or never, since too many wait for the database",
            *(task, _moment_or_none(values["due_at"]), values["server"]),
        )
    kept["reaped"] = listed[-MOST_REAPED:]
    return kept, (mine, [_cleanup(task, values) for values in listed])


def _forgotten(owners: set[str], kept: _Kept | None, read: _Read) -> tuple[_Kept | None, None]:
    listed = (kept or {}).get("reaped") or []
    left = [values for values in listed if values["owner"] not in owners]
    return (None if kept is None or len(left) == len(listed) else {**kept, "reaped": left}), None


def _left(to: str, kept: _Kept | None, read: _Read) -> tuple[_Kept | None, Row | None]:
    if kept is None or (kept.get("moved_to") or to) != to:
        return None, None
    if kept.get("moved_to"):
        return None, _row(kept)
    kept = {**kept, "moved_to": to}
    return kept, _row(kept)


def _arrived(kept: _Kept | None, read: _Read) -> tuple[_Kept | None, None]:
    return ({**kept, "moved_from": ""} if kept is not None and kept.get("moved_from") else None), None


def _occupied(claims: Sequence[Claim], kept: _Kept | None, read: _Read) -> tuple[_Kept, None]:
    """Put off the end of what these claims take of their server's slots; a row that was lost is made anew."""
    owners = {owner: until for owner, until in _owners(kept).items() if until > read.moment.lower}
    owners |= {claim.owner: read.moment.upper + _length(claim.occurrence.lease) for claim in claims}
    return {"owners": owners}, None


def _without(gone: set[str], kept: _Kept | None, read: _Read) -> tuple[_Kept | None, None]:
    owners = _owners(kept)
    left = {owner: until for owner, until in owners.items() if owner not in gone}
    return ({"owners": left} if len(left) < len(owners) else None), None


def _owners(kept: _Kept | None) -> dict[str, int]:
    return (kept or {}).get("owners") or {}


def _row(kept: _Kept) -> Row:
    return Row(
        pk=0,
        task=kept["task"],
        fingerprint=kept["fingerprint"],
        last_due_at=_moment(kept["last_due_at"]),
        schedule_since=_moment(kept["schedule_since"]),
        next_due_at=_moment_or_none(kept.get("next_due_at")),
        not_before=_moment(max(kept["not_before"], kept.get("hold_until") or 0)),
        owner=kept.get("owner"),
        server=kept.get("server") or "",
        fence=kept["fence"],
        acquired_at=_moment_or_none(kept.get("acquired_at")),
        renewed_at=_moment_or_none(kept.get("renewed_at")),
        expires_at=_moment_or_none(kept.get("expires_at")),
        paused=bool(kept.get("paused_at")),
        moved_to=kept.get("moved_to") or "",
        moved_from=kept.get("moved_from") or "",
    )


def _kept(row: Row) -> _Kept:
    return {
        "task": row.task,
        "fingerprint": row.fingerprint,
        "last_due_at": _micros(row.last_due_at),
        "schedule_since": _micros(row.schedule_since),
        "next_due_at": None if row.next_due_at is None else _micros(row.next_due_at),
        "not_before": _micros(row.not_before),
        "fence": row.fence,
        "moved_to": row.moved_to,
        "moved_from": row.moved_from,
    }


def _cleanup(task: str, values: _Kept) -> Cleanup:
    return Cleanup(
        task=task,
        due_at=_moment_or_none(values.get("due_at")),
        server=values["server"],
        owner=values["owner"],
        fence=values["fence"],
        acquired_at=_moment_or_none(values.get("acquired_at")),
        expired_at=_moment_or_none(values.get("expired_at")),
        cleaned_at=_moment(values["cleaned_at"]),
        cleaned_by=values["cleaned_by"],
        reason=values["reason"],
    )


def _encoded(kept: _Kept) -> bytes:
    # An item of a task that rests is small so, and a look reads them all.
    full = {key: value for key, value in kept.items() if value or key in _ALWAYS}
    return json.dumps(full, separators=(",", ":")).encode()


_ALWAYS: Final = ("fingerprint", "fence", "last_due_at", "schedule_since", "not_before")


# -- the state and the directory --------------------------------------------------------------------------------------


def _run_of(moment: _Moment) -> _Kept:
    return {"pid": moment.pid, "started": moment.started}


def _was_restarted(state: _Kept, moment: _Moment) -> bool:
    """Is this another run of the server than the one that the state was written to? In a container, all have pid 1."""
    return bool(state["pid"] != moment.pid or abs(state["started"] - moment.started) > 2)


def _versions(state: _Kept, server: str) -> list[_Version]:
    return [
        _Version(key, version["scope"], _moment(version["first_seen_at"]), _moment(version["seen_at"]))
        for key, version in (state.get("versions") or {}).items()
        if version["scope"] in ("", server)
    ]


def _seen(state: _Kept, stale: Sequence[str], at: int) -> _Kept:
    seen = {key: {**version, "seen_at": at} for key, version in state["versions"].items() if key in stale}
    return {**state, "versions": {**state["versions"], **seen}}


def _directory(read: _Read) -> _Directory:
    parts = {}
    for key, (kept, _) in read.found.items():
        if key.startswith("names:"):
            parts[int(key.removeprefix("names:"))] = list(kept.get("names") or ())
    last = max(parts, default=-1)
    whole = last >= 0 and len(parts) == last + 1 and not (read.get(_part(last)) or {}).get("more")
    return _Directory(parts, whole, {name for names in parts.values() for name in names})


def _part(index: int) -> str:
    return f"names:{index}"


def _of(name: str) -> str:
    return f"row:{name}"


def _scope_of(name: str) -> str:
    return name.partition("@")[2]


def _of_rows(names: Iterable[str]) -> list[str]:
    return [_of(name) for name in dict.fromkeys(names)]


def _usable(before: Before | None) -> Before | None:
    """Pass over a row elsewhere that the history is ahead of: the task was here since, and this store has lost it."""
    if before is None or before.row is None or before.last_due_at is None:
        return before
    return replace(before, row=None) if before.last_due_at > before.row.last_due_at else before


def _longest_lease(declared: Declarations) -> timedelta:
    default = conf.load().lease
    return max((task.lease or default for task in declared.tasks.values()), default=default)


# -- small things -----------------------------------------------------------------------------------------------------


def _grouped(items: Iterable[Any], by: Callable[[Any], str]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(by(item), []).append(item)
    return groups


def _may_overlap(occurrence: Occurrence) -> bool:
    return occurrence.task.overlap == "allow"


def _micros(moment: datetime) -> int:
    return (moment - _EPOCH) // _MICROSECOND


def _length(length: timedelta) -> int:
    return length // _MICROSECOND


def _moment(micros: int) -> datetime:
    return _EPOCH + timedelta(microseconds=micros)


def _moment_or_none(micros: int | None) -> datetime | None:
    return None if micros is None else _moment(micros)


def _boot_time() -> float:
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


def _pause(attempt: int) -> None:
    if attempt:
        time.sleep(random.uniform(0.2, 1.0) * min(0.1, 0.001 * 2**attempt))  # noqa: S311 - jitter


def _contended(alias: str, what: str) -> ScheduleError:
    return ScheduleError(
        f"The lock {alias!r} could not change {what}: others changed it each time, {ROUNDS} times in a row. Nothing "
        "was lost; the next pass tries again."
    )
