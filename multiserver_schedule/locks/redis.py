"""
The lock in Redis or Valkey: a hash per task, and Lua steps that are each atomic and by the server's own clock.

Each step of a pass is one round trip, whatever the number of tasks, and a look reads only what is due. A loss of data,
whole or partial, and a restart of the server are noticed: claims are then held back for a lease, so that owners that
live can come back. What became of the due times that a flush, an eviction or a fail-over has lost, nobody can know.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from importlib import resources
from typing import Any, Final, TypeVar, cast
from urllib.parse import urlsplit

import redis
from django.core.cache import caches
from django.core.cache.backends.base import InvalidCacheBackendError
from django.core.cache.backends.redis import RedisCache
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS
from django.utils.module_loading import import_string
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    ClusterCrossSlotError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

try:
    from redis.maint_notifications import MaintNotificationsConfig
except ImportError:  # an older redis-py
    MaintNotificationsConfig = None  # type: ignore[assignment,misc]

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
from .versions import (
    FORGOTTEN_AFTER,
    SEEN_EVERY,
    TakeOver,
    is_known,
    keys,
    needs_step,
    registered,
    take_overs,
    taken_over,
)

OPTIONS: Final = ("cache", "timeout", "using")
TIMEOUT: Final = 3.0
"""Seconds that a connection, and each call, may take: with one repetition it stays well within a lease."""
BATCH: Final = 1000
"""Rows read or written in one step of a sync, and freed in one of a reap: Redis serves nobody else meanwhile."""
RETRIES: Final = 20
BY_HAND: Final = ("manual", "backfill")
"""Triggers that leave the due times alone."""
REMEMBERED: Final = 10_000

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND: Final = timedelta(microseconds=1)
_SCRIPT: Final = resources.files(__package__).joinpath("redis.lua").read_text(encoding="utf-8")
_SHA: Final = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()

_T = TypeVar("_T")


class StoreRefused(ScheduleError):
    """The Redis server answers, and does not do what the lock needs: a replica, full memory, missing permissions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """A row as the store has it."""

    row: Row
    """``not_before`` is the break's end alone."""
    hold: datetime
    """Until then nobody claims it, since an owner that was lost may come back."""
    lost: str = ""
    """A mark of who found it lost and has yet to report it; "renew" where its owner put it back before that."""
    lost_since: datetime | None = None
    guard: str = ""
    """What a write compares; "" where there is no row."""

    @property
    def shown(self) -> Row:
        """The row as the others see it: a hold makes plans wait, like a break."""
        return replace(self.row, not_before=max(self.row.not_before, self.hold))


@dataclass(frozen=True, slots=True)
class _Version:
    key: str
    scope: str
    first_seen_at: datetime | None
    seen_at: datetime | None


@dataclass(frozen=True)
class _Pending:
    """Claims that were sent and never answered: made, not made, or yet to be made by a server that is only slow."""

    occurrences: Mapping[str, Occurrence]
    """By owner."""
    server: str
    until: float


@dataclass(slots=True)
class _Survey:
    """All that the store knows, as a sync finds it."""

    at: datetime
    run_id: str
    state: Mapping[str, str]
    versions: list[_Version]
    newest: Mapping[str, str]
    """By scope: the key of the version that took over last."""
    resync: set[str]
    names: set[str]
    rows: Mapping[str, _Stored]
    is_whole: bool

    @property
    def was_restarted(self) -> bool:
        return self.state.get("run_id", "") not in ("", self.run_id)

    @property
    def was_emptied(self) -> bool:
        """Or it was never used: nobody can tell."""
        return not self.state.get("run_id")


@dataclass(slots=True)
class _Mended:
    """What a sync writes, and what it will tell."""

    changes: dict[str, _Stored] = field(default_factory=dict)
    registered: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    lost: dict[str, datetime | None] = field(default_factory=dict)
    missing: int = 0


class RedisLock(BaseLock):
    """
    Keeps leases and due times in the Redis or Valkey of the cache alias ``OPTIONS["cache"]``, always on its primary.

    The connection is its own, made from the alias's settings, with ``OPTIONS["timeout"]`` seconds for connecting and
    for each call. The history goes to the database ``OPTIONS["using"]``, which the lock itself never touches.
    """

    def __init__(self, alias: str, options: Mapping[str, Any]) -> None:
        super().__init__(alias, options)
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ImproperlyConfigured(
                f"The lock {alias!r} has no option {unknown[0]!r}. Its options are: {', '.join(OPTIONS)}."
            )
        self.using = options.get("using", DEFAULT_DB_ALIAS)
        self.cache = options.get("cache", "default")
        timeout = options.get("timeout", TIMEOUT)
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout <= 0:
            raise ImproperlyConfigured(
                f"The option 'timeout' of the lock {alias!r} should be a number of seconds above 0, not {timeout!r}."
            )
        self._line = _Line(alias, self.cache, float(timeout))
        self._stands: dict[str, int] = {}
        """Until when each claim of this process stands, by owner, by the store's clock."""
        self._told: dict[str, None] = {}
        """Owners whose release was recorded, the oldest first."""
        self._pending: list[_Pending] = []

    # -- what a pass asks ---------------------------------------------------------------------------------------------

    def look(self, declared: Declarations, *, ahead: timedelta = timedelta(0), now: datetime | None = None) -> Look:
        scopes = keys(declared)
        at, whole, paused, interrupted, expired, versions, due = self._line.call(
            "look",
            now=_us(now),
            server=declared.server,
            keys=list(scopes),
            scopes=list(scopes.values()),
            seen_every=int(_us(SEEN_EVERY)),
            ahead=int(_us(ahead)),
        )
        moment = _moment(at)
        seen = [_Version(key, scope, _time(first), _time(last)) for key, scope, first, last in versions]
        known, _ = is_known(declared, seen, moment)
        rows = [_stored(values).shown for values in due]
        rows.sort(key=lambda row: (row.next_due_at or moment, row.not_before, row.task))
        return Look(
            now=moment,
            known=known and whole == "1",
            paused=bool(paused),
            interrupted_at=_time(interrupted),
            due=tuple(rows),
            expired=expired == "1",
        )

    def clock(self) -> datetime:
        (at,) = self._line.call("clock")
        return _moment(at)

    def rows(self, names: Iterable[str] | None = None) -> list[Row]:
        wanted = self._line.call("names") if names is None else names
        return [stored.shown for stored in self._read(wanted)]

    def _read(self, names: Iterable[str]) -> list[_Stored]:
        found: list[_Stored] = []
        for batch in _batches(sorted(set(names))):
            found += map(_stored, self._line.call("rows", names=batch))
        return found

    # -- which version's schedule holds, and what was lost ------------------------------------------------------------

    def sync(
        self, declared: Declarations, *, elsewhere: Elsewhere = nowhere_else, now: datetime | None = None
    ) -> Synced:
        """
        Bring the rows in step with these declarations, and put right what the store has lost.

        1. Read everything. Is nothing lost, and another version the newest? Done.
        2. Lost rows are registered anew, as of now; after a restart no row is due for anything before now either, since
           what the server had forgotten may have run. Nobody claims them until the longest lease is over: by then an
           owner that lives has put itself back.
        3. Rows that another version would have to repair wait for it, and it is told so by its next look.
        4. Write, unless something of it has changed meanwhile: then all over again.
        """
        before: dict[str, Before] = {}
        asked: set[str] = set()
        for attempt in range(RETRIES):
            if attempt:
                time.sleep(random.uniform(0.2, 1.0) * min(0.5, 0.01 * 2**attempt))  # noqa: S311 - jitter
            survey = self._survey(declared, now)
            changes = take_overs(declared, survey.versions, survey.at)
            mends = self._needs_mending(declared, survey)
            if not changes and not mends:
                return Synced(now=survey.at)
            names = [name for name in self._to_ask_of(declared, survey, changes, mends) if name not in asked]
            if names:
                asked.update(names)
                before.update(elsewhere(names))
            mended = _mend(declared, survey, changes, before, mends, _longest_lease(declared))
            if self._write(declared, survey, changes, mended, mends):
                return Synced(
                    now=survey.at,
                    registered=tuple(mended.registered),
                    changed=tuple(mended.changed),
                    lost=mended.lost,
                    trouble=_trouble(survey, mended),
                )
        raise StoreRefused(
            f"The lock {self.alias!r} could not bring {self._line.place} in step: {RETRIES} times something changed "
            "meanwhile. Is its data being deleted all the time?"
        )

    def _survey(self, declared: Declarations, now: datetime | None) -> _Survey:
        at, run_id, state, notes, names, due, runs_are_whole = self._line.call("survey", now=_us(now))
        state, notes = _pairs(state), _pairs(notes)
        versions, newest, resync = [], {}, set()
        for note, value in notes.items():
            kind, _, key = note.partition(":")
            if kind == "version":
                first, _, scope = value.partition(":")
                versions.append(_Version(key, scope, _time(first), _time(notes.get(f"seen:{key}", ""))))
            elif kind == "newest":
                newest[key] = value
            elif kind == "resync":
                resync.add(key)
        there = set(names) | set(due)
        rows = {stored.row.task: stored for stored in self._read(there | set(_rows_of(declared)))}
        is_whole = (
            len(names) == len(due) == int(state.get("rows") or -1)
            and runs_are_whole == "1"
            and "broken" not in state
            and there <= set(rows)
        )
        return _Survey(_moment(at), run_id, state, versions, newest, resync, there, rows, is_whole)

    def _needs_mending(self, declared: Declarations, survey: _Survey) -> bool:
        flagged = bool(survey.resync & set(keys(declared)))
        return not survey.is_whole or survey.was_restarted or survey.was_emptied or flagged

    def _to_ask_of(
        self, declared: Declarations, survey: _Survey, changes: Sequence[TakeOver], mends: bool
    ) -> list[str]:
        """Return the rows of which more may be known elsewhere: only those that this version will have."""
        taken = [name for change in changes for name in change.tasks]
        names = [name for name in taken if name not in survey.rows or survey.rows[name].row.moved_to]
        if mends:
            held = _held_scopes(declared, survey, changes)
            names += [
                name
                for name, task in _rows_of(declared).items()
                if name not in survey.rows and _scope(task, declared) in held and name not in taken
            ]
        return names

    def _write(
        self,
        declared: Declarations,
        survey: _Survey,
        changes: Sequence[TakeOver],
        mended: _Mended,
        mends: bool,
    ) -> bool:
        """Write the changed rows, and adopt this state with the last of them; False when somebody was faster."""
        hold = int(survey.state.get("hold") or 0)
        if survey.was_restarted or survey.was_emptied:
            hold = int(_us(survey.at + _longest_lease(declared)))
        mine = keys(declared)
        forgotten = {
            version.key: version.scope
            for version in survey.versions
            if version.seen_at is not None and version.seen_at < survey.at - FORGOTTEN_AFTER and version.key not in mine
        }
        others = {version.key for version in survey.versions} - set(mine) - set(forgotten)
        # A version that was only flagged repairs its own rows; others need not repair anything again.
        is_first = not survey.is_whole or survey.was_restarted or survey.was_emptied
        adopt = {
            "stamp": str(uuid.uuid4()),
            "versions": [[change.key, change.scope, _us(change.first_seen_at), _us(survey.at)] for change in changes],
            "resync": sorted(others) if mends and is_first else [],
            "done": list(mine),
            "forget": [[key, scope] for key, scope in forgotten.items()],
            "hold": str(hold),
            "runs_end": _us(survey.at + _longest_lease(declared)),
        }
        items = [
            [name, survey.rows[name].guard if name in survey.rows else "", _synced(stored)]
            for name, stored in mended.changes.items()
        ]
        batches = list(_batches(items)) or [[]]
        for number, batch in enumerate(batches, 1):
            given: dict[str, Any] = {"rows": batch, "run_id": survey.run_id, "counter": survey.state.get("counter", "")}
            if number == len(batches):
                given["adopt"] = adopt
            (answer,) = self._line.call("write", now=_us(survey.at), **given)
            if answer != "ok":
                return False
        return True

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
        late = self._settle(record, now) if self._pending else []
        if late or not occurrences:
            # What was won is started first: it would be forgotten if claiming more were to fail now.
            return late
        owners = {str(uuid.uuid4()): occurrence for occurrence in occurrences}
        sent = _Pending(
            owners, server, time.monotonic() + max(o.lease for o in occurrences).total_seconds() + self._line.timeout
        )
        items = [
            [
                o.row,
                _us(o.due_at),
                _us(o.next_due_at),
                _us(o.lease),
                _us(o.task.limit),
                owner,
                o.task.fingerprint,
                _by_hand(o),
                _may_overlap(o),
            ]
            for owner, o in owners.items()
        ]
        given_slots = "" if slots is None else str(slots)
        try:
            at, won = self._line.call("claim", again=True, now=_us(now), server=server, slots=given_slots, items=items)
        except BaseException:
            if self._line.is_unanswered:
                self._pending.append(sent)
            raise
        claims = self._claims(won, sent)
        if self._line.is_unanswered:
            # The first sending may yet be carried out, and win what the second did not.
            rest = {owner: o for owner, o in owners.items() if owner not in {claim.owner for claim in claims}}
            if rest:
                self._pending.append(replace(sent, occurrences=rest))
        order = {id(occurrence): place for place, occurrence in enumerate(occurrences)}
        claims.sort(key=lambda claim: order[id(claim.occurrence)])
        if claims:
            record(claims, _moment(at))
        return claims

    def _claims(self, won: Sequence[Sequence[str]], sent: _Pending) -> list[Claim]:
        claims = []
        for owner, fence, acquired, expires, finish_by in won:
            self._stands[owner] = int(expires)
            claims.append(
                Claim(
                    occurrence=sent.occurrences[owner],
                    owner=owner,
                    fence=int(fence),
                    server=sent.server,
                    acquired_at=_moment(acquired),
                    expires_at=_moment(expires),
                    finish_by=_time(finish_by),
                )
            )
        return claims

    def _settle(self, record: ClaimRecorder, now: datetime | None) -> list[Claim]:
        """Return, and record, the claims that turned out to be ours although their answer was lost."""
        items = [[o.row, owner, _may_overlap(o)] for sent in self._pending for owner, o in sent.occurrences.items()]
        at, standing = self._line.call("settle", now=_us(now), items=items)
        found: list[Claim] = []
        left: list[_Pending] = []
        for sent in self._pending:
            claims = self._claims([values for values in standing if values[0] in sent.occurrences], sent)
            found += claims
            won = {claim.owner for claim in claims}
            rest = {owner: o for owner, o in sent.occurrences.items() if owner not in won}
            # A frozen server may carry it out when it wakes up, but a lease later the claim is the reaper's.
            if rest and time.monotonic() <= sent.until:
                left.append(replace(sent, occurrences=rest))
        if found:
            record(found, _moment(at))
        self._pending = left
        return found

    # -- skip ---------------------------------------------------------------------------------------------------------

    def skip(self, skips: Sequence[Skip], *, record: SkipRecorder, now: datetime | None = None) -> list[Skip]:
        if not skips:
            return []
        items = [
            [
                skip.occurrence.row,
                _us(skip.occurrence.due_at),
                _us(skip.occurrence.next_due_at),
                skip.occurrence.task.fingerprint,
                skip.reason == "held",
            ]
            for skip in skips
        ]
        at, given_up = self._line.call("skip", now=_us(now), stamp=str(uuid.uuid4()), items=items)
        done = []
        for place, holder, acquired in given_up:
            skip = skips[int(place) - 1]
            if skip.reason == "held":
                skip = replace(skip, holder=holder, held_since=_time(acquired))
            done.append(skip)
        if done:
            record(done, _moment(at))
        return done

    # -- renew and release --------------------------------------------------------------------------------------------

    def renew(self, claims: Sequence[Claim], *, now: datetime | None = None) -> set[str]:
        """
        Put off the end of these leases; return the owners whose lease stands. One round trip.

        A claim that the store has lost, or of which it shows an older state, is put back by a second one, as long as
        its lease stands: nobody can have taken over until then.
        """
        if not claims:
            return set()
        items = [[c.occurrence.row, c.owner, _us(c.occurrence.lease), _may_overlap(c.occurrence)] for c in claims]
        at, missed = self._line.call("renew", now=_us(now), items=items)
        gone = [claims[int(place) - 1] for place in missed]
        back = self._come_back(gone, int(at), now)
        lost = {claim.owner for claim in gone} - back
        stand = set()
        for claim in claims:
            if claim.owner in lost:
                self._stands.pop(claim.owner, None)
            else:
                self._stands[claim.owner] = int(at) + int(_us(claim.occurrence.lease))
                stand.add(claim.owner)
        return stand

    def _come_back(self, claims: Sequence[Claim], at: int, now: datetime | None) -> set[str]:
        """Put back those of these claims whose lease still stands; return the owners for which that was possible."""
        live = [(claim, until) for claim in claims if (until := self._until(claim)) > at]
        if not live:
            return set()
        items = [
            [
                claim.occurrence.row,
                claim.owner,
                str(claim.fence),
                _us(claim.occurrence.lease),
                str(until),
                _us(claim.occurrence.due_at),
                claim.server,
                _us(claim.acquired_at),
                _us(claim.finish_by),
                _may_overlap(claim.occurrence),
                _by_hand(claim.occurrence),
                claim.task.fingerprint,
                _us(claim.occurrence.next_due_at),
            ]
            for claim, until in live
        ]
        _, back = self._line.call("come_back", now=_us(now), items=items)
        return {live[int(place) - 1][0].owner for place in back}

    def _until(self, claim: Claim) -> int:
        return max(self._stands.get(claim.owner, 0), int(_us(claim.expires_at)))

    def release(
        self, released: Sequence[ReleasedClaim], *, record: ReleaseRecorder, now: datetime | None = None
    ) -> list[bool]:
        if not released:
            return []
        at, told = self._release(released, now)
        lost = [item for item, how in zip(released, told, strict=True) if how == "lost"]
        back = self._come_back([item.claim for item in lost], int(at), now)
        if back:
            # Its row was lost while it ran, and nobody else can have had it since.
            again = [item for item in lost if item.claim.owner in back]
            at, how_again = self._release(again, now)
            by_owner = {item.claim.owner: how for item, how in zip(again, how_again, strict=True)}
            told = [by_owner.get(item.claim.owner, how) for item, how in zip(released, told, strict=True)]
        stood = [how != "lost" for how in told]
        for item in released:
            self._stands.pop(item.claim.owner, None)
        to_tell = [
            (item, stands)
            for item, how, stands in zip(released, told, stood, strict=True)
            if how != "before" or item.claim.owner not in self._told
        ]
        if to_tell:
            record(to_tell, _moment(at))
            self._told.update(dict.fromkeys(item.claim.owner for item, stands in to_tell if stands))
            for owner in list(self._told)[: max(0, len(self._told) - REMEMBERED)]:
                del self._told[owner]
        return stood

    def _release(self, released: Sequence[ReleasedClaim], now: datetime | None) -> tuple[str, list[str]]:
        items = [
            [
                item.claim.occurrence.row,
                item.claim.owner,
                _us(item.min_break) if item.outcome.started else "",
                _may_overlap(item.claim.occurrence),
            ]
            for item in released
        ]
        at, told = self._line.call("release", now=_us(now), items=items)
        return at, told

    # -- reap ---------------------------------------------------------------------------------------------------------

    def reap(self, *, server: str, record: CleanupRecorder, now: datetime | None = None) -> list[Cleanup]:
        """
        Free every lease that has ended; return those that this call freed.

        What was freed stays in the store until it is recorded: where the history cannot be written, or this process is
        killed in between, the next reap of any server records it.
        """
        cleaned: list[Cleanup] = []
        while True:
            _, freed, notes = self._line.call("reap", now=_us(now), server=server, most=BATCH)
            ours = dict.fromkeys(freed)
            cleanups = [_cleanup(note) for note in notes]
            cleanups.sort(key=lambda cleanup: (cleanup.owner not in ours, cleanup.expired_at or _EPOCH, cleanup.task))
            recorded = self._record(cleanups, record)
            cleaned += [recorded.get(each.owner, each) for each in cleanups if each.owner in ours]
            if len(freed) < BATCH:
                return cleaned

    def _record(self, cleanups: Sequence[Cleanup], record: CleanupRecorder) -> dict[str, Cleanup]:
        recorded = {cleanup.owner: cleanup for cleanup in record(cleanups)} if cleanups else {}
        if recorded:
            self._line.call("recorded", owners=list(recorded))
        return recorded

    def free(
        self,
        name: str,
        *,
        owner: str | None = None,
        server: str,
        record: CleanupRecorder,
        now: datetime | None = None,
    ) -> Cleanup | None:
        _, note = self._line.call("free", now=_us(now), server=server, name=name, owner=owner or "")
        if not note:
            return None
        cleanup = _cleanup(note)
        return self._record([cleanup], record).get(cleanup.owner, cleanup)

    # -- from store to store ------------------------------------------------------------------------------------------

    def leave(self, names: Sequence[str], *, to: str, now: datetime | None = None) -> list[Row]:
        rows: list[Row] = []
        hold = int(_us(conf.load().lease))
        for batch in _batches(sorted(set(names))):
            _, left = self._line.call("leave", now=_us(now), names=batch, to=to, hold=hold)
            rows += [_stored(values).shown for values in left]
        return rows

    def arrive(self, names: Sequence[str], *, now: datetime | None = None) -> None:
        for batch in _batches(sorted(set(names))):
            self._line.call("arrive", now=_us(now), names=batch)

    # -- the connection -----------------------------------------------------------------------------------------------

    @property
    def is_calling(self) -> bool:
        return self._line.is_calling

    def cut(self) -> bool:
        return self._line.cut()

    def close(self) -> None:
        self._line.close()


class _Line:
    """
    One connection to the primary of a cache alias, by which the steps of the script are called.

    No pool, and no repetition but these two: a call on a connection that the server has closed meanwhile, and a claim
    whose answer was lost, are sent once again on a new one. Every step is idempotent.
    """

    def __init__(self, lock: str, cache: str, timeout: float) -> None:
        self.lock = lock
        self.cache = cache
        self.timeout = timeout
        try:
            backend = caches[cache]
        except InvalidCacheBackendError as error:
            raise ImproperlyConfigured(f"The lock {lock!r} cannot use the cache {cache!r}: {error}") from error
        if not isinstance(backend, RedisCache) and not hasattr(backend, "client"):
            raise ImproperlyConfigured(
                f"The lock {lock!r} needs Redis or Valkey, and CACHES[{cache!r}] is {type(backend).__module__}."
                f"{type(backend).__qualname__}. Give it the backend django_redis.cache.RedisCache, or "
                "django.core.cache.backends.redis.RedisCache."
            )
        # The braces keep all keys of one lock in one slot of a cluster. A KEY_FUNCTION makes the beginning of each key.
        self.base = str(backend.make_key(f"multiserver_schedule:{{{lock}}}:"))
        self.is_calling = False
        self.is_unanswered = False
        """Was something sent by the last call that got no answer?"""
        self._one_at_a_time = threading.Lock()
        self._connection: Any = None
        self._own_pool: Any = None
        self._opened_by = 0
        self._node: tuple[str, int] | None = None
        """Where a cluster has the keys, when that is not where LOCATION says."""
        self._was_cut = False

    @property
    def place(self) -> str:
        """The server, for people: no password in it."""
        location = caches.settings[self.cache].get("LOCATION", "")
        first = _first(location)
        url = urlsplit(first)
        if url.scheme and "@" in url.netloc:
            first = first.replace(url.netloc, url.netloc.rpartition("@")[2])
        return f"the Redis server of CACHES[{self.cache!r}] (LOCATION {first.partition('?')[0]!r})"

    def call(self, step: str, *, again: bool = False, **given: Any) -> Any:
        """Run one step; ``again``: send it once more when the answer does not come."""
        text = json.dumps(given, separators=(",", ":"))
        with self._one_at_a_time:
            self._was_cut = False
            self.is_unanswered = False
            self.is_calling = True
            try:
                return self._call(step, text, again)
            except (RedisError, OSError, ValueError) as error:
                # Another thread that shuts the socket makes a driver say many things.
                if self._was_cut:
                    raise StoreTimeout(
                        f"A call to {self.place} hung, and was cut. The next one opens a connection of its own."
                    ) from error
                raise
            finally:
                self.is_calling = False

    def _call(self, step: str, text: str, again: bool) -> Any:
        may_repeat, may_move = True, True
        while True:
            was_open = self._connection is not None and self._opened_by == os.getpid()
            is_sent = False
            try:
                connection = self._connected()
                is_sent = True
                return self._eval(connection, step, text)
            except RedisConnectionError as error:
                self.close()
                self._node = None
                self.is_unanswered |= is_sent
                if self._was_cut or not may_repeat or not ((was_open and is_sent) or (again and is_sent)):
                    self._explain(error)
                    raise
                may_repeat = False
            except RedisTimeoutError:
                self.close()
                self._node = None
                self.is_unanswered |= is_sent
                if self._was_cut or not may_repeat or not (again and is_sent):
                    raise
                may_repeat = False
            except ResponseError as error:
                moved = re.match(r"(?:MOVED )?\d+ (\S*):(\d+)$", str(error)) if _is(error, "MOVED") else None
                if moved is None or not may_move:
                    self._explain(error)
                    raise
                may_move = False
                # No name for the node: the one that was asked, by another port.
                host = getattr(self._connection, "host", "") if moved[1] in ("", "?") else moved[1]
                self.close()
                self._node = (host, int(moved[2]))
            except BaseException:
                # A signal handler's exception, too: half a call is on the line.
                self.close()
                self.is_unanswered |= is_sent
                raise

    def _eval(self, connection: Any, step: str, text: str) -> Any:
        connection.send_command("EVALSHA", _SHA, 1, self.base, step, text)
        try:
            return connection.read_response()
        except NoScriptError:
            # Not LOAD and then EVALSHA again: a SCRIPT FLUSH may fall in between.
            connection.send_command("EVAL", _SCRIPT, 1, self.base, step, text)
            return connection.read_response()

    def _connected(self) -> Any:
        if self._connection is not None and self._opened_by != os.getpid():
            # Inherited by a fork: the other process goes on using it.
            self._connection = None
        if self._connection is None:
            self._opened_by = os.getpid()
            self._connection = self._new_connection()
        if self._connection._sock is None:
            self._connection.connect()
        return self._connection

    def _new_connection(self) -> Any:
        pool = self._pool()
        kwargs = {key: value for key, value in pool.connection_kwargs.items() if key not in _OF_THE_POOL}
        kwargs.update(
            decode_responses=True,
            encoding="utf-8",
            encoding_errors="strict",
            socket_timeout=self.timeout,
            socket_connect_timeout=self.timeout,
            retry=Retry(cast(Any, NoBackoff)(), 0),
            retry_on_timeout=False,
            retry_on_error=[],
            health_check_interval=0,
            client_name="multiserver_schedule",
            max_connections=1,
        )
        if MaintNotificationsConfig is not None:
            # A server's notices would lengthen the time limits.
            kwargs["maint_notifications_config"] = MaintNotificationsConfig(enabled=False)
        kind: Any = pool.connection_class
        if self._node is not None:
            kwargs.pop("path", None)
            kwargs.update(host=self._node[0], port=self._node[1])
            if issubclass(kind, redis.UnixDomainSocketConnection):
                kind = redis.Connection
        elif isinstance(pool, SentinelConnectionPool):
            named: Any = SentinelConnectionPool
            self._own_pool = named(
                pool.service_name, self._sentinel(pool.sentinel_manager), connection_class=kind, **kwargs
            )
            return self._own_pool.make_connection()
        own: Any = redis.ConnectionPool
        self._own_pool = own(connection_class=kind, **kwargs)
        return self._own_pool.make_connection()

    def _pool(self) -> Any:
        """Return the pool that the alias itself uses for writing, or one like it: its settings are what is wanted."""
        backend: Any = caches[self.cache]
        if not isinstance(backend, RedisCache):
            try:
                return backend.client.get_client(True).connection_pool
            except (AttributeError, TypeError, NotImplementedError) as error:
                raise ImproperlyConfigured(
                    f"The lock {self.lock!r} finds no connection in CACHES[{self.cache!r}] "
                    f"({type(backend.client).__qualname__}): it needs a client of one primary, not of shards."
                ) from error
        settings = caches.settings[self.cache]
        options = {
            key: value for key, value in settings.get("OPTIONS", {}).items() if key not in ("serializer", "pool_class")
        }
        if isinstance(options.get("parser_class"), str):
            options["parser_class"] = import_string(options["parser_class"])
        pool: Any = redis.ConnectionPool
        return pool.from_url(_first(settings.get("LOCATION", "")), **options)

    def _sentinel(self, manager: Any) -> Any:
        """Return the same sentinels, asked within our time limits."""
        kwargs = {
            **manager.sentinel_kwargs,
            "socket_timeout": self.timeout,
            "socket_connect_timeout": self.timeout,
        }
        addresses = [client.connection_pool.connection_kwargs for client in manager.sentinels]
        sentinel: Any = Sentinel
        return sentinel(
            [(address["host"], address["port"]) for address in addresses],
            min_other_sentinels=manager.min_other_sentinels,
            sentinel_kwargs=kwargs,
        )

    def _explain(self, error: RedisError) -> None:
        """Raise an error that says what to do about it, where that is known."""
        said = str(error)
        if _is(error, "READONLY", "MASTERDOWN") or "lock-on-replica" in said or "previous master is now" in said:
            raise StoreRefused(
                f"The lock {self.lock!r} needs the primary, and {self.place} is a read-only replica, or the primary it "
                "follows is away. Name the primary first in LOCATION."
            ) from error
        if _is(error, "OOM"):
            raise StoreRefused(
                f"The memory of {self.place} is full (maxmemory): the lock {self.lock!r} can claim nothing. Runs under "
                "way keep their leases. Give it more memory, or an instance of its own."
            ) from error
        if _is(error, "NOPERM") or _FORBIDDEN.search(said):
            raise StoreRefused(
                f"The Redis user of CACHES[{self.cache!r}] may not do what the lock {self.lock!r} needs ({said}). It "
                f"needs +eval +evalsha +info +time +@hash +@sortedset +@set +del +client|setname, and ~{self.base}*."
            ) from error
        if "lock-on-old-server" in said:
            version = re.search(r"lock-on-old-server:([\d.?]+)", said)
            raise StoreRefused(
                f"The lock {self.lock!r} needs Redis 6 or newer, or Valkey, and {self.place} is "
                f"{version[1] if version else 'older'}."
            ) from error
        if _is(error, "MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "CROSSSLOT"):
            raise StoreRefused(
                f"The cluster of the lock {self.lock!r} is being changed, or is down ({type(error).__name__}: {said}): "
                f"{self.place} cannot serve its keys now. The next call tries again."
            ) from error

    def cut(self) -> bool:
        """Shut the socket of the call under way, from another thread; False when there is none."""
        connection = self._connection
        sock = getattr(connection, "_sock", None)
        if not self.is_calling or sock is None:
            return False
        try:
            # The copy is ours: closing it cannot close a descriptor that the driver has meanwhile given up.
            with socket.socket(fileno=os.dup(sock.fileno())) as line:
                self._was_cut = True
                line.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False
        return True

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and self._opened_by == os.getpid():
            connection.disconnect()


_FORBIDDEN: Final = re.compile("no permissions to|can't run this command|can't access at least one of the keys")
"""How servers say inside a script that the user may not do something: each in words of its own."""
_OF_THE_POOL: Final = (
    "cache",
    "cache_config",
    "connection_pool",
    "event_dispatcher",
    "himport_registry",
    "maint_notifications_config",
    "maint_notifications_pool_handler",
    "maintenance_notification_hash",
    "maintenance_state",
    "max_connections",
    "orig_host_address",
    "orig_socket_connect_timeout",
    "orig_socket_timeout",
    "oss_cluster_maint_notifications_handler",
)
"""What a pool puts into its connections' settings for itself."""


# -- sync, computed ---------------------------------------------------------------------------------------------------


def _rows_of(declared: Declarations) -> dict[str, ScheduledTask]:
    return {task.row_name(declared.server): task for task in declared.tasks.values()}


def _scope(task: ScheduledTask, declared: Declarations) -> str:
    return declared.server if task.on_every_server else ""


def _held_scopes(declared: Declarations, survey: _Survey, changes: Sequence[TakeOver]) -> set[str]:
    """Return the scopes in which this version is the newest, or becomes it now."""
    held = {scope for key, scope in keys(declared).items() if survey.newest.get(scope) == key}
    return held | {change.scope for change in changes}


def _longest_lease(declared: Declarations) -> timedelta:
    usual = conf.load().lease
    return max([usual, *(task.lease for task in declared.tasks.values() if task.lease is not None)])


def _believed(before: Before | None) -> Before | None:
    """
    Take the row from another store, for one that is missing here, only where the history has nothing newer.

    Else the task had moved here long ago, and what is known of it since is the history alone.
    """
    return replace(before, row=None) if before is not None and _is_older(before) else before


def _brought(before: Before | None) -> Before | None:
    """Take the row from another store, for one that was given away, with what the history knows beyond it."""
    if before is None or before.row is None or before.last_due_at is None or not _is_older(before):
        return before
    return replace(before, row=replace(before.row, last_due_at=before.last_due_at))


def _is_older(before: Before) -> bool:
    row, last = before.row, before.last_due_at
    return row is not None and last is not None and last > row.last_due_at


def _mend(
    declared: Declarations,
    survey: _Survey,
    changes: Sequence[TakeOver],
    before: Mapping[str, Before],
    mends: bool,
    lease: timedelta,
) -> _Mended:
    """Compute every row that is to be written; nothing here writes or asks."""
    mine = _rows_of(declared)
    held = _held_scopes(declared, survey, changes)
    taking = {name: change for change in changes for name in change.tasks}
    doubtful = survey.was_restarted or survey.was_emptied
    hold = survey.at + lease if doubtful else _moment(survey.state.get("hold") or "0")
    # Whoever adopts this state reports what bears its mark, also what another process wrote and could not adopt.
    mark = f"{survey.run_id}:{survey.state.get('counter', '')}"
    done = _Mended()
    for name in sorted(survey.names | set(mine)):
        task = mine.get(name)
        is_mine = task is not None and _scope(task, declared) in held
        stored = survey.rows.get(name)
        was_known = name in survey.names
        if stored is None:
            if not is_mine and not was_known:
                continue
            done.changes[name] = new = _anew(name, task if is_mine else None, survey, before, hold, lease, mark)
            if new.lost:
                done.lost[name] = new.lost_since
                done.missing += 1
            elif is_mine:
                done.registered.append(name)
            continue
        new = stored
        if stored.lost in ("renew", mark):
            done.lost[name] = stored.lost_since
            new = replace(new, lost=mark)
        if doubtful and not new.row.moved_to:
            new = _doubted(new, survey.at, hold, mark)
            done.lost[name] = new.lost_since
        change = taking.get(name)
        if task is not None and change is not None and needs_step(new.row, task):
            since = new.row.last_due_at if not new.row.fingerprint else change.since
            new = replace(new, row=taken_over(new.row, task, survey.at, since, _brought(before.get(name))))
            done.changed.append(name)
        elif task is not None and mends and not new.row.moved_to:
            new = _repaired(new, task, is_mine)
        if new is not stored or not survey.is_whole or doubtful:
            done.changes[name] = new
    return done


def _anew(
    name: str,
    task: ScheduledTask | None,
    survey: _Survey,
    before: Mapping[str, Before],
    hold: datetime,
    lease: timedelta,
    mark: str,
) -> _Stored:
    """Return the row of a task that has none: new, come from another store, or lost."""
    known = _believed(before.get(name))
    came = known is not None and known.row is not None
    last = known.last_due_at if known is not None else None
    is_lost = name in survey.names or (last is not None and not came)
    if task is None:
        # Nobody here knows its schedule, or a newer version's holds: that version takes it from here.
        row = Row(
            pk=0,
            task=name,
            fingerprint="",
            last_due_at=survey.at,
            schedule_since=survey.at,
            next_due_at=None,
            not_before=survey.at,
        )
    else:
        row = registered(name, task, survey.at, known)
    if is_lost:
        return _Stored(row=row, hold=max(hold, survey.at + lease), lost=mark, lost_since=last)
    # In an emptied store it may have been there before: until the hold is over, that cannot be told.
    return _Stored(row=row, hold=hold if hold > survey.at else _EPOCH)


def _doubted(stored: _Stored, at: datetime, hold: datetime, mark: str) -> _Stored:
    """Return a row of a server that may have forgotten its last seconds: nothing before now is due any more."""
    row = stored.row
    since = stored.lost_since if stored.lost == mark else row.last_due_at
    following = row.next_due_at if row.next_due_at is not None and row.next_due_at > at else None
    row = replace(row, last_due_at=max(row.last_due_at, at), next_due_at=following)
    return replace(stored, row=row, hold=max(stored.hold, hold), lost=mark, lost_since=since)


def _repaired(stored: _Stored, task: ScheduledTask, is_mine: bool) -> _Stored:
    row = stored.row
    if not row.fingerprint and is_mine:
        # Lost, and registered by a process that did not know its schedule.
        row = taken_over(row, task, row.last_due_at)
    if row.fingerprint == task.fingerprint and (row.next_due_at is None or row.next_due_at <= row.last_due_at):
        row = replace(row, next_due_at=task.next(row.since))
    return stored if row == stored.row else replace(stored, row=row)


def _trouble(survey: _Survey, mended: _Mended) -> str:
    if not mended.lost:
        return ""
    if survey.was_restarted:
        return "the Redis server was restarted, or another one took its place"
    if survey.was_emptied:
        return "the Redis server was emptied" if mended.missing else "the state of the lock was lost"
    rows = len(mended.lost)
    return f"{rows} row{'' if rows == 1 else 's'} of the lock {'was' if rows == 1 else 'were'} lost"


# -- as texts ---------------------------------------------------------------------------------------------------------


def _us(value: datetime | timedelta | None) -> str:
    """Return whole microseconds, since the epoch or of a duration; "" for None."""
    if value is None:
        return ""
    return str((value - _EPOCH if isinstance(value, datetime) else value) // _MICROSECOND)


def _moment(text: str) -> datetime:
    return _EPOCH + timedelta(microseconds=int(text))


def _time(text: str) -> datetime | None:
    return _moment(text) if text else None


_SYNCED: Final = (
    *("fingerprint", "last", "since", "next", "not_before", "hold", "fence", "moved_to", "moved_from"),
    *("lost", "lost_since"),
)
_ROW: Final = (
    *("task", "fingerprint", "last", "since", "next", "not_before", "hold", "owner", "server", "fence", "acquired"),
    *("renewed", "expires", "finish_by", "due", "paused_at", "moved_to", "moved_from", "lost", "lost_since"),
)
"""What the lists of these names in redis.lua hold, the latter after the row's name."""


def _stored(values: Sequence[str]) -> _Stored:
    read = dict(zip(_ROW, values, strict=True))
    return _Stored(
        row=Row(
            pk=0,
            task=read["task"],
            fingerprint=read["fingerprint"],
            last_due_at=_moment(read["last"]),
            schedule_since=_moment(read["since"]),
            next_due_at=_time(read["next"]),
            not_before=_moment(read["not_before"]),
            owner=read["owner"] or None,
            server=read["server"],
            fence=int(read["fence"]),
            acquired_at=_time(read["acquired"]),
            renewed_at=_time(read["renewed"]),
            expires_at=_time(read["expires"]),
            paused=bool(read["paused_at"]),
            moved_to=read["moved_to"],
            moved_from=read["moved_from"],
        ),
        hold=_moment(read["hold"] or "0"),
        lost=read["lost"],
        lost_since=_time(read["lost_since"]),
        guard="|".join(read[name] for name in _SYNCED),
    )


def _synced(stored: _Stored) -> list[str]:
    """Return what a sync writes. Owners and leases are not among it: it disturbs no claim."""
    row = stored.row
    return [
        row.fingerprint,
        _us(row.last_due_at),
        _us(row.schedule_since),
        _us(row.next_due_at),
        _us(row.not_before),
        _us(stored.hold),
        str(row.fence),
        row.moved_to,
        row.moved_from,
        stored.lost,
        _us(stored.lost_since),
    ]


def _cleanup(note: str) -> Cleanup:
    task, due, server, owner, fence, acquired, expired, cleaned, cleaned_by, reason = json.loads(note)
    return Cleanup(
        task=task,
        due_at=_time(due),
        server=server,
        owner=owner,
        fence=int(fence or 0),
        acquired_at=_time(acquired),
        expired_at=_time(expired),
        cleaned_at=_moment(cleaned),
        cleaned_by=cleaned_by,
        reason=reason,
    )


def _pairs(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _batches(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _by_hand(occurrence: Occurrence) -> bool:
    return occurrence.trigger in BY_HAND


def _may_overlap(occurrence: Occurrence) -> bool:
    return occurrence.task.overlap == "allow"


def _first(location: Any) -> str:
    """Return the primary of a LOCATION: the first of a list, or of a text with several."""
    if not isinstance(location, str):
        return str(next(iter(location), ""))
    return re.split("[;,]", location)[0]


def _is(error: Exception, *codes: str) -> bool:
    """Is this one of these errors of Redis, as a driver knows it, or as it comes out of a script?"""
    said = str(error)
    return any(isinstance(error, _ERRORS[code]) or said.startswith(f"{code} ") or f"-{code} " in said for code in codes)


_ERRORS: Final[Mapping[str, type[Exception]]] = {
    "READONLY": ReadOnlyError,
    "MASTERDOWN": MasterDownError,
    "OOM": OutOfMemoryError,
    "NOPERM": NoPermissionError,
    "MOVED": MovedError,
    "ASK": AskError,
    "TRYAGAIN": TryAgainError,
    "CLUSTERDOWN": ClusterDownError,
    "CROSSSLOT": ClusterCrossSlotError,
}
