"""
The lock in the project's own database: two columns of one row carry the whole promise.

``last_due_at`` only rises, in the same statement that takes the lock: once per due time. ``owner`` must be empty for
that statement to hit, and only its owner, or a reaper after the lease, empties it: no overlap.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar, cast

from django.core.exceptions import ImproperlyConfigured
from django.db import (
    DEFAULT_DB_ALIAS,
    DatabaseError,
    InterfaceError,
    OperationalError,
    connections,
    transaction,
)
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import (
    Case,
    CharField,
    DateTimeField,
    Exists,
    F,
    Field,
    IntegerField,
    Model,
    PositiveIntegerField,
    Q,
    QuerySet,
    Value,
    When,
)
from django.db.models.functions import Cast, Coalesce, Concat, LPad
from django.db.models.lookups import LessThanOrEqual

from ..database import Line, UTCNow, clock_of, is_conflict
from ..entries import Claim, Cleanup, Occurrence, ReleasedClaim, Row, ScheduledTask, Skip
from ..exceptions import StoreTimeout, UnsafeTransaction
from ..models import ScheduledLock, ScheduledRun, ScheduleState
from .ahead import Reach, set_right
from .base import (
    BaseLock,
    Before,
    ClaimRecorder,
    CleanupRecorder,
    Declarations,
    Elsewhere,
    Following,
    Look,
    ReleaseRecorder,
    SkipRecorder,
    Synced,
    nowhere_else,
)
from .versions import FORGOTTEN_AFTER, SEEN_EVERY, TakeOver, is_known, needs_step, registered, take_overs, taken_over

RETRIES: Final = 8
RETRY_FOR: Final = 10.0
"""Seconds after which a conflict is raised and not tried a second time: a lease must outlive it."""
PARAMS_PER_CLAIM: Final = 14
"""The most parameters that one row takes in one statement, where the database counts them (SQLite)."""

_T = TypeVar("_T")
_M = TypeVar("_M", bound=Model)


class _Given(Value):
    """A time that a test gave in the clock's place."""

    def as_mysql(self, compiler: Any, connection: BaseDatabaseWrapper, **context: Any) -> Any:
        # As a bare parameter it would come back as a text.
        sql, params = self.as_sql(compiler, connection)
        return f"CAST({sql} AS DATETIME(6))", params


@dataclass(frozen=True)
class _Clock:
    """N, the store's time: the database's own inside each statement, or what a test gave."""

    given: datetime | None

    @property
    def now(self) -> Any:
        return UTCNow() if self.given is None else _Given(self.given, output_field=DateTimeField())

    def after(self, distance: timedelta) -> Any:
        """Return the expression of ``N + distance``."""
        if self.given is None:
            return UTCNow() + distance
        return _Given(self.given + distance, output_field=DateTimeField())


@dataclass(frozen=True)
class _Pending:
    """A claim whose commit was sent and never answered."""

    stamp: str
    occurrences: tuple[Occurrence, ...]
    server: str
    until: float


@dataclass(frozen=True)
class _Held:
    """A row as the locking SELECT of a claim or skip found it."""

    pk: int
    fingerprint: str
    last_due_at: datetime
    owner: str | None
    server: str
    acquired_at: datetime | None
    renewed_at: datetime | None
    expires_at: datetime | None
    not_before: datetime
    moved_to: str
    moved_from: str
    attempt: int
    retry_at: datetime | None
    wanted_at: datetime | None
    paused: bool
    now: datetime


class _NoSuchState(Exception):
    """The state row that serialises this transaction is not there yet."""


class _Raced(Exception):
    """A row changed although it was locked: the transaction starts anew."""


class _Prepared:
    """
    A query that is asked again and again, put into SQL once.

    Of a look at an idle store, two thirds were spent on building the same statement anew.
    """

    def __init__(self, query: QuerySet[Any, Any], using: str) -> None:
        self._compiler = query.query.get_compiler(using)
        self._using = using
        sql = self._compiler.as_sql()
        # All else of the compiler, the conversion of what comes back above all, stays Django's.
        self._compiler.as_sql = lambda *args, **options: sql

    @property
    def is_current(self) -> bool:
        """Is it for the connection that this thread has now?"""
        return self._compiler.connection is connections[self._using]

    def rows(self) -> Iterable[Any]:
        """Ask, and return the rows."""
        return cast("Iterable[Any]", self._compiler.results_iter(tuple_expected=True))


def owner_of(stamp: str, pk: int) -> str:
    """
    Return the owner's UUID for a row claimed under ``stamp``: its random part is the stamp's, the rest is the row.

    So one UPDATE gives each row its own fresh owner without naming them all, and the claimer knows them beforehand.
    """
    return f"{stamp[:24]}{pk:012d}"


class ORMLock(BaseLock):
    """Keeps leases and due times in ``ScheduledLock``, in the database ``OPTIONS["using"]``, never in a replica."""

    transactional = True

    def __init__(self, alias: str, options: Mapping[str, Any]) -> None:
        super().__init__(alias, options)
        unknown = sorted(set(options) - {"using"})
        if unknown:
            raise ImproperlyConfigured(f"The lock {alias!r} has no option {unknown[0]!r}. Its only option is 'using'.")
        self.using = options.get("using", DEFAULT_DB_ALIAS)
        self._line = Line(self.using)
        self._pending: list[_Pending] = []
        self._looks: dict[tuple[timedelta, str], _Prepared] = {}
        self._limit: timedelta | None = None
        self._bounded: Any = None

    # -- what a pass asks ---------------------------------------------------------------------------------------------

    def look(self, declared: Declarations, *, ahead: timedelta = timedelta(0), now: datetime | None = None) -> Look:
        clock = _Clock(now)
        return self._call(lambda: self._look(declared, ahead, clock))

    def _look(self, declared: Declarations, ahead: timedelta, clock: _Clock) -> Look:
        """Read everything in one statement: the state, the rows with something to do, and what there is to reap."""
        asked = (ahead, declared.server)
        if clock.given is not None:
            found = _Prepared(self._to_look_at(declared, ahead, clock), self.using)
        elif asked in self._looks and self._looks[asked].is_current:
            found = self._looks[asked]
        else:
            found = self._looks[asked] = _Prepared(self._to_look_at(declared, ahead, clock), self.using)
        rows: list[Row] = []
        states: list[ScheduleState] = []
        expired = False
        now: datetime | None = None
        for kind, at, *values in found.rows():
            now = at
            if kind == _ENDED:
                expired = True
            elif kind == _DUE:
                rows.append(_row(dict(zip(_LOOK, values, strict=True)) | {"paused_at": None, "paused_reason": ""}))
            else:
                given = dict(zip(_LOOK, values, strict=True))
                states.append(ScheduleState(**{field: given[column] for column, field in _OF_STATE.items()}))
        if now is None:
            # Nothing answers nothing, not even the time.
            now = self._now(clock)
        project = next((state for state in states if state.key == ScheduleState.PROJECT), None)
        paused = project is not None and project.paused_at is not None
        known, stale = is_known(declared, states, now)
        if stale:
            self._state().filter(key__in=stale, seen_at__lte=clock.after(-SEEN_EVERY)).update(seen_at=clock.now)
        # Of equal due times the one that rested longest: by pk, the last of many tasks would hardly get a slot.
        rows.sort(key=lambda row: (row.wanted_from or now, row.not_before, row.pk))
        return Look(
            now=now,
            known=known,
            paused=paused,
            interrupted_at=project.interrupted_at if project else None,
            due=() if paused else tuple(rows),
            expired=expired,
        )

    def _to_look_at(self, declared: Declarations, ahead: timedelta, clock: _Clock) -> QuerySet[Any, Any]:
        mine = ~Q(task__contains="@") | Q(task__endswith=f"@{declared.server}")
        soon = clock.after(ahead)
        wanted = Q(next_due_at__lte=soon) | Q(retry_at__lte=soon) | Q(wanted_at__lte=soon)
        due = self._locks().filter(mine, wanted, paused_at=None, moved_to="")
        # These have other columns; of what has ended any of the right kind do, since it only says that there is some.
        found: QuerySet[Any, Any] = (
            due.annotate(kind=Value(_DUE, IntegerField()), at=clock.now)
            .values_list("kind", "at", *_LOOK)
            .union(
                self._states(declared).values_list(Value(_STATE, IntegerField()), clock.now, *_as_look(_OF_STATE)),
                self._locks()
                .filter(expires_at__lte=clock.now)
                .values_list(Value(_ENDED, IntegerField()), clock.now, *_LOOK),
                self._runs()
                .filter(expires_at__lte=clock.now)
                .values_list(Value(_ENDED, IntegerField()), clock.now, *_as_look(_OF_RUN)),
                all=True,
            )
        )
        return found

    def clock(self) -> datetime:
        return self._call(lambda: self._now(_Clock(None)))

    def rows(self, names: Iterable[str] | None = None) -> list[Row]:
        found = self._locks().order_by("task").values(*_ROW)
        if names is None:
            return [_row(values) for values in found]
        wanted = sorted(set(names))
        rows: list[Row] = []
        for batch in _batches(wanted, self._batch_size(per_row=1)):
            rows += [_row(values) for values in found.filter(task__in=batch)]
        return rows

    # -- which version's schedule holds -------------------------------------------------------------------------------

    def sync(
        self, declared: Declarations, *, elsewhere: Elsewhere = nowhere_else, now: datetime | None = None
    ) -> Synced:
        clock = _Clock(now)
        before: Mapping[str, Before] = {}
        if elsewhere is not nowhere_else:
            # Before the transaction: other stores are asked, and give rows away.
            names = self._call(lambda: self._to_ask_of(declared, clock))
            before = elsewhere(names) if names else {}
        return self._call(lambda: self._sync(declared, before, clock))

    def _to_ask_of(self, declared: Declarations, clock: _Clock) -> list[str]:
        """Return the names of the rows that this version would take over and that are missing or given away."""
        states = list(self._states(declared).annotate(now=clock.now))
        at = _noted(states[0]) if states else self._now(clock)
        names = [name for change in take_overs(declared, states, at) for name in change.tasks]
        here: set[str] = set()
        for batch in _batches(names, self._batch_size(per_row=1)):
            here.update(self._locks().filter(task__in=batch, moved_to="").values_list("task", flat=True))
        return [name for name in names if name not in here]

    def _sync(self, declared: Declarations, before: Mapping[str, Before], clock: _Clock) -> Synced:
        """
        Put the rows in step with these declarations, unless a newer version's hold.

        1. Lock the project's state row: first syncs of many processes come one after the other.
        2. For all servers' tasks and for this server's own: is this set the newest, or is the newest still about? Done.
        3. Register what has no row. Take over the rows whose schedule is another.
        4. Become the newest.
        """
        with self._transaction():
            self._touch(ScheduleState.PROJECT)
            states = list(self._states(declared).annotate(now=clock.now))
            at = _noted(states[0])
            new: list[str] = []
            changed: list[str] = []
            for change in take_overs(declared, states, at):
                here, other = self._bring_in_step(change, before, at)
                new += here
                changed += other
                values = {"scope": change.scope, "first_seen_at": change.first_seen_at, "seen_at": at}
                if not self._state().filter(key=change.key).update(**values):
                    self._state().create(key=change.key, **values)
            forgotten = ~Q(key=ScheduleState.PROJECT) & Q(seen_at__lt=at - FORGOTTEN_AFTER)
            self._state().filter(forgotten).delete()
        return Synced(now=at, registered=tuple(new), changed=tuple(changed))

    def _bring_in_step(
        self, change: TakeOver, before: Mapping[str, Before], at: datetime
    ) -> tuple[list[str], list[str]]:
        tasks = change.tasks
        there: dict[str, Row] = {}
        for batch in _batches(list(tasks), self._batch_size(per_row=1)):
            there.update({row.task: row for row in map(_row, self._locks().filter(task__in=batch).values(*_ROW))})
        missing = [
            _as_model(registered(name, task, at, before.get(name)), task)
            for name, task in tasks.items()
            if name not in there
        ]
        self._locks().bulk_create(missing, ignore_conflicts=True, batch_size=500)
        names = {row.pk: name for name, row in there.items() if needs_step(row, tasks[name])}
        for pks in _batches(sorted(names), min(500, self._batch_size())):
            locks = list(self._lock_rows(self._locks().filter(pk__in=pks), skip_locked=False))
            for lock in locks:
                task = tasks[names[lock.pk]]
                row = _row({field: getattr(lock, field) for field in _ROW})
                row = taken_over(row, task, at, change.since, before.get(row.task))
                for field in _IN_STEP:
                    setattr(lock, field, getattr(row, field, task.timetable.text))
            self._locks().bulk_update(locks, _IN_STEP, batch_size=self._batch_size())
        return [lock.task for lock in missing], list(names.values())

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
        late = self._call(self._settle) if self._pending else []
        if late or not occurrences:
            # What was won is started first: it would be forgotten if claiming more were to fail now.
            return late
        clock = _Clock(now)
        sent: list[_Pending] = []

        def work() -> list[Claim]:
            until = time.monotonic() + max(occurrence.lease for occurrence in occurrences).total_seconds()
            sent[:] = [_Pending(str(uuid.uuid4()), tuple(occurrences), server, until)]
            return self._claim(sent[0], slots, record, clock)

        try:
            return self._call(work)
        except (OperationalError, InterfaceError, StoreTimeout) as error:
            if is_conflict(error) or connections[self.using].in_atomic_block:
                raise
            # The commit may have been made, or may yet be, by a server that was only slow: ask by the owners' names.
            self._pending += sent
            if isinstance(error, StoreTimeout):
                # The store hangs, and there are leases to renew: the next claim asks.
                raise
            try:
                settled = self._call(self._settle)
            except (DatabaseError, InterfaceError, StoreTimeout):
                raise error from None
            if not settled:
                raise
            return settled

    def _claim(self, sent: _Pending, slots: int | None, record: ClaimRecorder, clock: _Clock) -> list[Claim]:
        """
        Claim in one short transaction.

        1. Touch the server's state row: its claims come one after the other, so that its slots are counted exactly. On
           SQLite this write comes first so that the busy timeout holds: a read that turns into a write does not wait.
        2. Count what the server holds.
        3. Lock rows, pass over those that another server has locked, and keep those that may run, in the given order,
           as many as there are slots.
        4. Take them by UPDATE, which asks all conditions again: nothing rests on the row locks.
        5. Read back what was won, and record it.
        """
        with self._transaction():
            self._touch(f"server:{sent.server}", seen_at=clock.now)
            free = len(sent.occurrences) if slots is None else slots - self._held(sent.server, clock)
            largest = self._batch_size(PARAMS_PER_CLAIM)
            # Only somewhat more than can run is locked at once: what is locked here is passed over by other servers.
            size = largest if slots is None else min(largest, max(8, 2 * free))
            first: dict[int, Occurrence] = {}
            for occurrence in sent.occurrences:
                first.setdefault(occurrence.pk, occurrence)
            queue = list(first.values())
            claims: list[Claim] = []
            while queue and free > 0:
                chunk, queue = queue[:size], queue[size:]
                taken = self._take(self._startable(chunk, clock)[:free], sent, clock)
                claims += taken
                free -= len(taken)
                size = min(largest, size * 2)
            if claims:
                record(claims, max(claim.acquired_at for claim in claims))
        return claims

    def _held(self, server: str, clock: _Clock) -> int:
        locks = self._locks().filter(server=server, owner__isnull=False, expires_at__gt=clock.now)
        runs = self._runs().filter(server=server, status="running", expires_at__gt=clock.now)
        return len(locks.order_by().values_list("pk").union(runs.order_by().values_list("pk"), all=True).order_by())

    def _startable(self, chunk: Sequence[Occurrence], clock: _Clock) -> list[Occurrence]:
        rows = self._locked(chunk, clock)
        startable = []
        for occurrence in chunk:
            row = rows.get(occurrence.pk)
            if row is None or row.moved_to or row.moved_from:
                continue
            if row.owner is not None and not occurrence.may_overlap:
                continue
            if _is_open(occurrence, row):
                startable.append(occurrence)
        return startable

    def _take(self, occurrences: Sequence[Occurrence], sent: _Pending, clock: _Clock) -> list[Claim]:
        if not occurrences:
            return []
        groups: dict[tuple[bool, ...], list[Occurrence]] = {}
        for o in occurrences:
            groups.setdefault((o.is_by_hand, o.requested, o.is_retry, o.may_overlap), []).append(o)
        for group in groups.values():
            self._update_taken(group, sent, clock)
        fields = ("pk", "fence", "acquired_at", "expires_at", "finish_by", "now")
        won = self._locks().filter(pk__in=[o.pk for o in occurrences], stamp=sent.stamp).annotate(now=clock.now)
        found = {pk: values for pk, *values in won.values_list(*fields)}
        claims = []
        for occurrence in occurrences:
            if occurrence.pk not in found:
                continue
            fence, acquired_at, expires_at, finish_by, now = found[occurrence.pk]
            if occurrence.may_overlap:
                limit = occurrence.task.limit
                acquired_at, expires_at, finish_by = now, now + occurrence.lease, now + limit if limit else None
            claims.append(
                Claim(
                    occurrence=occurrence,
                    owner=owner_of(sent.stamp, occurrence.pk),
                    fence=fence,
                    server=sent.server,
                    acquired_at=acquired_at,
                    expires_at=expires_at,
                    finish_by=finish_by,
                )
            )
        return claims

    def _update_taken(self, group: Sequence[Occurrence], sent: _Pending, clock: _Clock) -> None:
        """Take these rows, whose occurrences are all of one kind."""
        kind = group[0]
        rows = self._locks().filter(pk__in=[o.pk for o in group])
        values: dict[str, Any] = {
            "stamp": sent.stamp,
            "fence": F("fence") + 1,
            "rerun_up_to": _each({o.pk: o.rerun_up_to for o in group}, Value, output=PositiveIntegerField()),
            "cancelled_at": None,
        }
        if kind.is_retry:
            rows = self._unpaused(rows, group).filter(
                last_due_at=_due(group),
                retry_at__lte=clock.now,
                attempt=_each({o.pk: o.attempt for o in group}, Value, output=PositiveIntegerField()),
            )
            values["retry_at"] = None
        elif kind.requested:
            rows = self._unpaused(rows).filter(wanted_at=_due(group))
            values["wanted_at"] = None
        elif kind.is_by_hand:
            rows = rows.filter(**_HERE)
        else:
            rows = self._open(rows, group, clock).filter(not_before__lte=clock.now)
            triggers = {o.pk: o.trigger for o in group}
            values |= _moved_on(group) | {
                "attempt": 1,
                "trigger": _each(triggers, Value, output=CharField()),
                "retry_at": None,
            }
        if not kind.may_overlap:
            rows = rows.filter(owner=None)
            values |= {
                "owner": Concat(
                    Value(sent.stamp[:24]),
                    LPad(Cast("pk", CharField(max_length=12)), 12, Value("0")),
                    output_field=CharField(),
                ),
                "server": sent.server,
                "acquired_at": clock.now,
                "renewed_at": clock.now,
                "expires_at": _each({o.pk: o.lease for o in group}, clock.after),
                "finish_by": _each(
                    {o.pk: o.task.limit for o in group}, lambda limit: clock.after(limit) if limit else _NEVER
                ),
            }
        rows.update(**values)

    def _settle(self) -> list[Claim]:
        """Return the claims that turned out to be ours although the answer to their commit was lost."""
        claims: list[Claim] = []
        for sent in list(self._pending):
            owners = {owner_of(sent.stamp, o.pk): o for o in sent.occurrences}
            fields = ("owner", "fence", "acquired_at", "expires_at", "finish_by")
            found: list[tuple[Any, ...]] = []
            for batch in _batches(list(owners), self._batch_size(per_row=3)):
                pks = [owners[owner].pk for owner in batch]
                found += self._locks().filter(pk__in=pks, owner__in=batch).values_list(*fields)
                runs = self._of([owners[owner] for owner in batch], batch).filter(expires_at__isnull=False)
                for owner, fence, started_at, expires_at in runs.values_list(
                    "owner", "fence", "started_at", "expires_at"
                ):
                    limit = owners[owner].task.limit
                    found.append((owner, fence, started_at, expires_at, started_at + limit if limit else None))
            for owner, fence, acquired_at, expires_at, finish_by in found:
                claims.append(
                    Claim(
                        occurrence=owners[owner],
                        owner=owner,
                        fence=fence,
                        server=sent.server,
                        acquired_at=acquired_at,
                        expires_at=expires_at,
                        finish_by=finish_by,
                    )
                )
            # A frozen server may commit when it wakes up, but a lease later the claim is the reaper's.
            if found or time.monotonic() > sent.until:
                self._pending.remove(sent)
        return claims

    # -- skip ---------------------------------------------------------------------------------------------------------

    def skip(self, skips: Sequence[Skip], *, record: SkipRecorder, now: datetime | None = None) -> list[Skip]:
        if not skips:
            return []
        clock = _Clock(now)
        return self._call(lambda: self._skip(skips, record, clock))

    def _skip(self, skips: Sequence[Skip], record: SkipRecorder, clock: _Clock) -> list[Skip]:
        stamp = str(uuid.uuid4())
        given_up: list[Skip] = []
        at: datetime | None = None
        with self._transaction(write_first=True):
            for batch in _batches(
                list({skip.occurrence.pk: skip for skip in skips}.values()), self._batch_size(PARAMS_PER_CLAIM)
            ):
                rows = self._locked([skip.occurrence for skip in batch], clock)
                for held in (True, False):
                    group = [
                        skip.occurrence
                        for skip in batch
                        if (skip.reason == "held") == held and skip.occurrence.pk in rows
                    ]
                    if not group:
                        continue
                    standing = self._open(self._locks().filter(pk__in=[o.pk for o in group]), group, clock)
                    if held:
                        # A holder that has not renewed since may be dead: then the due time is still wanted.
                        standing = standing.filter(
                            owner__isnull=False, expires_at__gt=clock.now, renewed_at__gte=_due(group)
                        )
                    standing.update(stamp=stamp, **_moved_on(group), **_NOTHING_OWED)
                moved = set(self._locks().filter(pk__in=list(rows), stamp=stamp).values_list("pk", flat=True))
                for skip in batch:
                    if skip.occurrence.pk in moved:
                        row = rows[skip.occurrence.pk]
                        at = row.now
                        if skip.reason == "held":
                            skip = replace(skip, holder=row.server, held_since=row.acquired_at)
                        given_up.append(skip)
            if given_up and at is not None:
                record(given_up, at)
        return given_up

    # -- renew and release --------------------------------------------------------------------------------------------

    def renew(self, claims: Sequence[Claim], *, now: datetime | None = None) -> set[str]:
        if not claims:
            return set()
        clock = _Clock(now)
        return self._call(lambda: self._renew(claims, clock))

    def _renew(self, claims: Sequence[Claim], clock: _Clock) -> set[str]:
        stand: set[str] = set()
        for batch in _batches(claims, self._batch_size(PARAMS_PER_CLAIM)):
            plain = [claim for claim in batch if not claim.occurrence.may_overlap]
            if plain:
                owners = [claim.owner for claim in plain]
                rows = self._locks().filter(pk__in=[c.occurrence.pk for c in plain], owner__in=owners)
                rows = rows.filter(cancelled_at=None)
                expires_at = _each({c.occurrence.pk: c.occurrence.lease for c in plain}, clock.after)
                hit = rows.update(renewed_at=clock.now, expires_at=expires_at)
                stand |= set(owners if hit == len(plain) else rows.values_list("owner", flat=True))
            overlapping = [claim for claim in batch if claim.occurrence.may_overlap]
            if overlapping:
                owners = [claim.owner for claim in overlapping]
                runs = self._of([c.occurrence for c in overlapping], owners).filter(
                    status="running", expires_at__isnull=False
                )
                expires_at = _each({c.owner: c.occurrence.lease for c in overlapping}, clock.after, "owner")
                hit = runs.update(expires_at=expires_at)
                stand |= set(owners if hit == len(overlapping) else runs.values_list("owner", flat=True))
        return stand

    def release(
        self, released: Sequence[ReleasedClaim], *, record: ReleaseRecorder, now: datetime | None = None
    ) -> list[bool]:
        if not released:
            return []
        clock = _Clock(now)
        return self._call(lambda: self._release(released, record, clock))

    def _release(self, released: Sequence[ReleasedClaim], record: ReleaseRecorder, clock: _Clock) -> list[bool]:
        stood: set[str] = set()
        before: set[str] = set()
        with self._transaction(write_first=True):
            for batch in _batches(released, self._batch_size(PARAMS_PER_CLAIM)):
                plain = [item for item in batch if not item.claim.occurrence.may_overlap]
                if plain:
                    ours, already = self._release_locks(plain, clock)
                    stood |= ours
                    before |= already
                overlapping = [item for item in batch if item.claim.occurrence.may_overlap]
                if overlapping:
                    ours, already = self._release_runs(overlapping, clock)
                    stood |= ours
                    before |= already
            told = [(item, item.claim.owner in stood) for item in released if item.claim.owner not in before]
            if told:
                record(told, self._now(clock))
        return [item.claim.owner in stood or item.claim.owner in before for item in released]

    def _release_locks(self, items: Sequence[ReleasedClaim], clock: _Clock) -> tuple[set[str], set[str]]:
        """Return the owners whose lease this freed, and those whose lease an earlier call freed, unanswered."""
        stamp = str(uuid.uuid4())
        pks = [item.claim.occurrence.pk for item in items]
        breaks = {item.claim.occurrence.pk: item.min_break if item.outcome.started else None for item in items}
        owed = self._owed([item for item in items if item.retry_in is not None], clock)
        hit = (
            self._locks()
            .filter(
                pk__in=pks,
                owner__in=[item.claim.owner for item in items],
                fence__in=[item.claim.fence for item in items],
            )
            .update(
                stamp=stamp,
                not_before=_each(breaks, lambda rest: F("not_before") if rest is None else clock.after(rest)),
                **owed,
                **_FREE,
            )
        )
        if hit == len(items):
            return {item.claim.owner for item in items}, set()
        found = {
            pk: values for pk, *values in self._locks().filter(pk__in=pks).values_list("pk", "stamp", "owner", "fence")
        }
        ours, already = set(), set()
        for item in items:
            row_stamp, owner, fence = found.get(item.claim.occurrence.pk, ("", "", 0))
            if row_stamp == stamp:
                ours.add(item.claim.owner)
            elif owner is None and fence == item.claim.fence:
                # A clean-up raises the fence, so this was our own release, whose answer was lost.
                already.add(item.claim.owner)
        return ours, already

    def _release_runs(self, items: Sequence[ReleasedClaim], clock: _Clock) -> tuple[set[str], set[str]]:
        owners = [item.claim.owner for item in items]
        runs = self._of([item.claim.occurrence for item in items], owners)
        found = dict(self._lock_rows(runs, skip_locked=False).values_list("owner", "status"))
        gone = ("abandoned", "lost")
        ours = {owner for owner, status in found.items() if status == "running"}
        already = {owner for owner, status in found.items() if owner not in ours and status not in gone}
        runs.filter(owner__in=list(ours)).update(expires_at=None)
        again = [item for item in items if item.retry_in is not None and item.claim.owner in ours]
        if again:
            pks = [item.claim.occurrence.pk for item in again]
            self._locks().filter(pk__in=pks).update(**self._owed(again, clock))
        return ours, already

    def _owed(self, items: Sequence[ReleasedClaim], clock: _Clock) -> dict[str, Any]:
        """Return what makes these rows owe another attempt: not where a newer due time has come, or comes before."""
        retry_at, attempt = [], []
        for item in items:
            o, wait = item.claim.occurrence, item.retry_in or timedelta(0)
            is_last = Q(pk=o.pk, last_due_at=o.due_at) & (Q(next_due_at=None) | Q(next_due_at__gt=clock.after(wait)))
            retry_at.append(When(is_last, then=clock.after(wait)))
            attempt.append(When(is_last, then=Value(o.attempt + 1)))
        if not items:
            return {}
        return {
            # MySQL sets the columns in this order, and none of them is asked for by the next.
            "retry_at": Case(*retry_at, default=F("retry_at"), output_field=DateTimeField()),
            "attempt": Case(*attempt, default=F("attempt"), output_field=PositiveIntegerField()),
        }

    # -- reap ---------------------------------------------------------------------------------------------------------

    def reap(self, *, server: str, record: CleanupRecorder, now: datetime | None = None) -> list[Cleanup]:
        clock = _Clock(now)
        cleaned: list[Cleanup] = []
        while True:
            found = self._call(lambda: self._reap(server, record, clock))
            cleaned += found
            if len(found) < self._batch_size(PARAMS_PER_CLAIM):
                return cleaned

    def _reap(self, server: str, record: CleanupRecorder, clock: _Clock) -> list[Cleanup]:
        most = self._batch_size(PARAMS_PER_CLAIM)
        with self._transaction(write_first=True):
            ended = self._locks().filter(owner__isnull=False, expires_at__lte=clock.now).annotate(now=clock.now)
            locks = list(self._lock_rows(ended, skip_locked=True)[:most])
            ended_runs = self._runs().filter(status="running", expires_at__lte=clock.now).annotate(now=clock.now)
            runs = list(self._lock_rows(ended_runs, skip_locked=True)[: most - len(locks)]) if len(locks) < most else []
            if not locks and not runs:
                return []
            pks = [lock.pk for lock in locks]
            hit = (
                self._locks()
                .filter(pk__in=pks, owner__isnull=False, expires_at__lte=clock.now)
                .update(fence=F("fence") + 1, **self._rerun(clock), **_FREE)
            )
            hit += (
                self._runs().filter(pk__in=[run.pk for run in runs], expires_at__lte=clock.now).update(expires_at=None)
            )
            if hit != len(locks) + len(runs):
                raise _Raced
            due = self._due_of(locks)
            cleanups = [_cleanup(lock, due, server) for lock in locks]
            cleanups += [
                Cleanup(
                    task=run.task,
                    due_at=run.due_at,
                    server=run.server,
                    owner=run.owner,
                    fence=run.fence,
                    acquired_at=run.started_at,
                    expired_at=run.expires_at,
                    cleaned_at=run.now,
                    cleaned_by=server,
                    reason="lease_expired",
                )
                for run in runs
            ]
            return list(record(cleanups))

    def _rerun(self, clock: _Clock) -> dict[str, Any]:
        """Return what makes a row whose server died owe the next attempt, where its claim said so."""
        again = Q(rerun_up_to__gt=F("attempt")) & (Q(next_due_at=None) | Q(next_due_at__gt=clock.now))
        return {
            # In this order: MySQL sets one column after the other, and the first asks for the second as it was.
            "retry_at": Case(When(again, then=clock.now), default=F("retry_at"), output_field=DateTimeField()),
            "attempt": Case(
                When(again, then=F("attempt") + 1), default=F("attempt"), output_field=PositiveIntegerField()
            ),
        }

    def _due_of(self, locks: Sequence[ScheduledLock]) -> dict[str, datetime]:
        """Map each owner to the due time that it runs."""
        owners = [lock.owner for lock in locks if lock.owner]
        return dict(
            self._runs()
            .filter(status="running", task__in=[lock.task for lock in locks], owner__in=owners)
            .values_list("owner", "due_at")
        )

    def free(
        self,
        name: str,
        *,
        owner: str | None = None,
        server: str,
        record: CleanupRecorder,
        now: datetime | None = None,
    ) -> Cleanup | None:
        clock = _Clock(now)
        return self._call(lambda: self._free(name, owner, server, record, clock))

    def _free(
        self, name: str, owner: str | None, server: str, record: CleanupRecorder, clock: _Clock
    ) -> Cleanup | None:
        with self._transaction(write_first=True):
            held = self._locks().filter(task=name, owner__isnull=False).annotate(now=clock.now)
            if owner is not None:
                held = held.filter(owner=owner)
            locks = list(self._lock_rows(held, skip_locked=False))
            if not locks:
                return None
            lock = locks[0]
            if (
                not self._locks()
                .filter(pk=lock.pk, owner=lock.owner)
                .update(fence=F("fence") + 1, rerun_up_to=0, **_FREE)
            ):
                raise _Raced
            cleanup = replace(_cleanup(lock, self._due_of(locks), server), reason="released_by_hand")
            return next(iter(record([cleanup])), cleanup)

    # -- what people ask for ------------------------------------------------------------------------------------------

    def pause(self, names: Sequence[str] | None, *, reason: str = "", now: datetime | None = None) -> list[str]:
        clock = _Clock(now)
        values = {"paused_at": Coalesce("paused_at", clock.now), "paused_reason": reason[:255]}
        if names is None:
            self._call(lambda: self._note(**values))
            return []
        return self._steer(names, lambda rows: rows.update(**values))

    def resume(self, names: Sequence[str] | None, *, following: Following, now: datetime | None = None) -> list[str]:
        clock = _Clock(now)
        return self._call(lambda: self._resume(names, following, clock))

    def _resume(self, names: Sequence[str] | None, following: Following, clock: _Clock) -> list[str]:
        resumed: list[str] = []
        with self._transaction(write_first=True):
            if names is None:
                if (
                    not self._state()
                    .filter(key=ScheduleState.PROJECT, paused_at__isnull=False)
                    .update(paused_at=None, paused_reason="")
                ):
                    return []
                # Of a row that another store has by now, that store says what has become of it.
                wanted = self._locks().filter(moved_to="")
                found = list(wanted.order_by("pk").values_list("pk", flat=True))
            else:
                wanted = self._locks().filter(paused_at__isnull=False)
                found = list(wanted.filter(task__in=names).order_by("pk").values_list("pk", flat=True))
            for pks in _batches(found, min(500, self._batch_size())):
                locks = list(self._lock_rows(wanted.filter(pk__in=pks), skip_locked=False).annotate(now=clock.now))
                for lock in locks:
                    at = _noted(lock)
                    lock.last_due_at = max(lock.last_due_at, at)
                    lock.next_due_at = following(lock.task, lock.last_due_at) or lock.next_due_at
                    lock.retry_at, lock.rerun_up_to = None, 0
                    if names is not None:
                        lock.paused_at, lock.paused_reason = None, ""
                        resumed.append(lock.task)
                    elif lock.paused_at is None:
                        resumed.append(lock.task)
                self._locks().bulk_update(locks, _RESUMED, batch_size=self._batch_size())
        return resumed

    def interrupt(self, *, now: datetime | None = None) -> None:
        clock = _Clock(now)
        self._call(lambda: self._note(interrupted_at=clock.now))

    def want(self, name: str, *, now: datetime | None = None) -> datetime | None:
        clock = _Clock(now)

        def work() -> datetime | None:
            rows = self._unpaused(self._locks().filter(task=name))
            # As a parameter, as the claim will compare it: by its own clock SQLite writes the same moment otherwise.
            at = Value(self._now(clock), output_field=DateTimeField())
            rows.update(wanted_at=Coalesce("wanted_at", at))
            wanted: datetime | None = rows.values_list("wanted_at", flat=True).first()
            return wanted

        return self._call(work)

    def cancel(self, owners: Mapping[str, str], *, now: datetime | None = None) -> list[str]:
        clock = _Clock(now)
        # Of a row and an owner that is not its own nothing hits: the owners are nobody else's.
        of_these = Q(owner__in=sorted(owners.values()))
        return self._steer(
            sorted(owners), lambda rows: rows.update(cancelled_at=Coalesce("cancelled_at", clock.now)), of_these
        )

    def retire(self, names: Sequence[str], *, now: datetime | None = None) -> list[str]:
        values = {"next_due_at": None, "wanted_at": None, **_NOTHING_OWED}
        return self._steer(names, lambda rows: rows.update(**values), Q(owner=None))

    def forget(self, names: Sequence[str], *, now: datetime | None = None) -> list[str]:
        def delete(rows: QuerySet[ScheduledLock]) -> None:
            servers = {name.partition("@")[2] for name in rows.values_list("task", flat=True)}
            rows.delete()
            # One that comes back with what it declared before is to register it again.
            self._state().filter(scope__in=servers).exclude(scope="").delete()

        return self._steer(names, delete, Q(owner=None, task__contains="@"))

    def _steer(
        self, names: Sequence[str], change: Callable[[QuerySet[ScheduledLock]], Any], only: Q | None = None
    ) -> list[str]:
        """Change these rows, and return the names of those that were there for it."""

        def work(batch: Sequence[str]) -> list[str]:
            with self._transaction(write_first=True):
                rows = self._locks().filter(only or Q(), task__in=batch)
                found = {lock.pk: lock.task for lock in self._lock_rows(rows, skip_locked=False)}
                change(self._locks().filter(only or Q(), pk__in=list(found)))
                return list(found.values())

        done: list[str] = []
        for batch in _batches(sorted(set(names)), min(500, self._batch_size())):
            done += self._call(lambda batch=batch: work(batch))  # type: ignore[misc]
        return done

    def _note(self, **values: Any) -> None:
        """Write what holds for all tasks."""
        with self._transaction():
            self._touch(ScheduleState.PROJECT, **values)

    def set_right(
        self, reaches: Mapping[str, Reach], *, following: Following, now: datetime | None = None
    ) -> list[str]:
        clock = _Clock(now)
        changed: list[str] = []
        for batch in _batches(sorted(reaches), min(500, self._batch_size())):
            changed += self._call(lambda batch=batch: self._set_right(batch, reaches, following, clock))  # type: ignore[misc]
        if reaches:
            self._call(lambda: self._set_state_right(max(reach.far for reach in reaches.values()), clock))
        return changed

    def _set_right(
        self, names: Sequence[str], reaches: Mapping[str, Reach], following: Following, clock: _Clock
    ) -> list[str]:
        far = [reaches[name].far for name in names]
        suspect = Q()
        for field in _MAY_LIE_AHEAD:
            suspect |= Q(**{f"{field}__gt": clock.after(min(far))})
        changed: list[ScheduledLock] = []
        with self._transaction(write_first=True):
            rows = self._lock_rows(self._locks().filter(suspect, task__in=names), skip_locked=False)
            for lock in rows.annotate(now=clock.now):
                row = _row({field: getattr(lock, field) for field in _ROW})
                right = set_right(row, reaches[row.task], _noted(lock), following)
                if right is row:
                    continue
                if right.last_due_at != row.last_due_at:
                    # What runs is not of the last due time any more: should its server die, nothing is owed.
                    lock.rerun_up_to = 0
                for field in _SET_RIGHT:
                    setattr(lock, field, getattr(right, field))
                changed.append(lock)
            self._locks().bulk_update(changed, [*_SET_RIGHT, "rerun_up_to"], batch_size=self._batch_size())
            # These have no row of their own, and do not say when they were renewed: who lives does so within a lease.
            runs = self._runs().filter(task__in=names, status="running", expires_at__gt=clock.after(max(far)))
            found = dict(self._lock_rows(runs, skip_locked=False).values_list("pk", "task"))
            if found:
                lease = max(reaches[name].lease for name in names)
                self._runs().filter(pk__in=list(found)).update(expires_at=clock.after(lease))
        return sorted({lock.task for lock in changed} | set(found.values()))

    def _set_state_right(self, far: timedelta, clock: _Clock) -> None:
        """Have versions that were seen then be gone in time, and no service end because of an interrupt to come."""
        for field in ("seen_at", "interrupted_at"):
            self._state().filter(**{f"{field}__gt": clock.after(far)}).update(**{field: clock.now})

    # -- from store to store ------------------------------------------------------------------------------------------

    def leave(self, names: Sequence[str], *, to: str, now: datetime | None = None) -> list[Row]:
        def work() -> list[Row]:
            rows: list[Row] = []
            for batch in _batches(sorted(set(names)), self._batch_size(per_row=1)):
                ours = self._locks().filter(task__in=batch, moved_to__in=["", to])
                # First to write, and what it hit is then read: nobody claims one of these any more.
                ours.filter(moved_to="").update(moved_to=to)
                rows += [_row(values) for values in ours.order_by("pk").values(*_ROW)]
            return rows

        return self._call(work) if names else []

    def arrive(self, names: Sequence[str], *, now: datetime | None = None) -> None:
        for batch in _batches(sorted(set(names)), self._batch_size(per_row=1)):
            self._call(lambda batch=batch: self._locks().filter(task__in=batch).update(moved_from=""))  # type: ignore[misc]

    # -- the connection -----------------------------------------------------------------------------------------------

    @property
    def is_calling(self) -> bool:
        return self._line.is_calling

    def cut(self) -> bool:
        return self._line.cut()

    def close(self) -> None:
        self._line.close()

    def _call(self, work: Callable[[], _T]) -> _T:
        """
        Do ``work`` with the write database, again where it lost a conflict with another server.

        A connection that broke is closed, so that the next call opens its own.
        """
        connection = connections[self.using]
        tested = _in_testcase(connection)
        if connection.in_atomic_block and not tested:
            raise UnsafeTransaction(
                f"The lock {self.alias!r} was used inside a transaction on {self.using!r}, whose end would undo it. "
                "Call it outside atomic(), or give the lock a database alias of its own."
            )
        started = time.monotonic()
        attempt = 0
        missing = ""
        with self._line.call():
            try:
                if not tested and not connection.get_autocommit():
                    raise UnsafeTransaction(
                        f"The lock {self.alias!r} needs autocommit on {self.using!r}: a claim counts when it is "
                        "committed."
                    )
                while True:
                    self._line.ready()
                    if self._limit is not None and connection.connection is not self._bounded:
                        self._bound(connection, self._limit)
                    try:
                        if missing:
                            # In a statement of its own: inside the transaction, two servers would deadlock on MySQL.
                            self._state().bulk_create([ScheduleState(key=missing)], ignore_conflicts=True)
                            missing = ""
                        return work()
                    except _NoSuchState as error:
                        missing = str(error)
                    except (_Raced, DatabaseError) as error:
                        attempt += 1
                        retry = isinstance(error, _Raced) or is_conflict(error)
                        if (
                            not retry
                            or tested
                            or self._line.was_cut
                            or attempt > RETRIES
                            or (attempt > 1 and time.monotonic() - started > RETRY_FOR)
                        ):
                            raise
                        time.sleep(random.uniform(0.2, 1.0) * min(0.5, 0.01 * 2**attempt))  # noqa: S311 - jitter
            except (OperationalError, InterfaceError) as error:
                if not tested and not is_conflict(error):
                    connection.close()
                if self._line.was_cut:
                    raise StoreTimeout(f"A call to the database {self.using!r} hung, and was cut.") from error
                raise

    def bound(self, limit: timedelta) -> None:
        """
        Have the database end our session where a transaction of it stands still for so long.

        What a server has locked when it is frozen in mid-claim is passed over by all others until then. SQLite and
        MySQL have no such limit.
        """
        self._limit = limit

    def _bound(self, connection: BaseDatabaseWrapper, limit: timedelta) -> None:
        """Set the limit, once for each session."""
        self._bounded = connection.connection
        seconds = max(1, round(limit.total_seconds()))
        said = None
        if connection.vendor == "postgresql":
            said = f"SET idle_in_transaction_session_timeout = '{seconds}s'"
        elif getattr(connection, "mysql_is_mariadb", False):
            said = f"SET SESSION idle_transaction_timeout = {seconds}"
        if said is not None:
            with connection.cursor() as cursor:
                cursor.execute(said)

    @contextmanager
    def _transaction(self, *, write_first: bool = False) -> Iterator[None]:
        connection = connections[self.using]
        tested = _in_testcase(connection)
        with transaction.atomic(using=self.using, durable=True):
            try:
                level = getattr(getattr(connection, "isolation_level", None), "name", "READ_COMMITTED")
                if connection.vendor == "postgresql" and level != "READ_COMMITTED" and not tested:
                    # Each statement here asks its conditions anew; under a snapshot it would fail instead of seeing.
                    with connection.cursor() as cursor:
                        cursor.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
                if write_first and not connection.features.has_select_for_update:
                    self._state().filter(key=ScheduleState.PROJECT).update(scope="")
                yield
                if not tested:
                    # Here and not at the end of the block, which leaves nothing to that end but to find it done.
                    connection._commit()  # type: ignore[attr-defined]
            except (OperationalError, InterfaceError) as error:
                if not tested and not is_conflict(error):
                    # The end of the block would open a new connection, and hang again where the server hangs.
                    connection.close()
                raise

    def _touch(self, key: str, **values: Any) -> None:
        if not self._state().filter(key=key).update(**(values or {"scope": ""})):
            raise _NoSuchState(key)

    def _batch_size(self, per_row: int = PARAMS_PER_CLAIM) -> int:
        most = connections[self.using].features.max_query_params
        return 10_000 if most is None else max(1, min(10_000, (most - 50) // per_row))

    def _locked(self, occurrences: Sequence[Occurrence], clock: _Clock) -> dict[int, _Held]:
        everything = self._state().filter(key=ScheduleState.PROJECT, paused_at__isnull=False)
        fields = [name for name in _Held.__dataclass_fields__ if name not in ("paused", "now")]
        rows = self._lock_rows(self._locks().filter(pk__in=[o.pk for o in occurrences]), skip_locked=True)
        found = rows.annotate(now=clock.now, all_paused=Exists(everything))
        return {
            row[0]: _Held(*row[:-3], row[-3] is not None or row[-2], row[-1])  # type: ignore[call-arg]
            for row in found.values_list(*fields, "paused_at", "all_paused", "now")
        }

    def _lock_rows(self, rows: QuerySet[_M], *, skip_locked: bool) -> QuerySet[_M]:
        features = connections[self.using].features
        # In the order of the key: transactions that lock the same rows in different orders end each other.
        rows = rows.order_by("pk")
        if features.has_select_for_update:
            rows = rows.select_for_update(skip_locked=skip_locked and features.has_select_for_update_skip_locked)
        return rows

    def _open(
        self, rows: QuerySet[ScheduledLock], group: Sequence[Occurrence], clock: _Clock
    ) -> QuerySet[ScheduledLock]:
        """Narrow ``rows`` down to those whose due time is still open, under this schedule, with nothing paused."""
        due = _due(group)
        rows = self._unpaused(rows, group).filter(LessThanOrEqual(due, clock.now), last_due_at__lt=due)
        return rows

    def _unpaused(
        self, rows: QuerySet[ScheduledLock], group: Sequence[Occurrence] | None = None
    ) -> QuerySet[ScheduledLock]:
        """Narrow ``rows`` down to those that are here and not paused, and whose schedule is that of ``group``."""
        everything = self._state().filter(key=ScheduleState.PROJECT, paused_at__isnull=False)
        rows = rows.filter(~Exists(everything), paused_at=None, **_HERE)
        if group is not None:
            # The fingerprint has the task's name in it: one of the group is the row's own or none.
            rows = rows.filter(fingerprint__in={o.task.fingerprint for o in group})
        return rows

    def _of(self, occurrences: Sequence[Occurrence], owners: Sequence[str]) -> QuerySet[ScheduledRun]:
        # Task and due time lead to the rows by an index; the owner says which.
        runs: QuerySet[ScheduledRun] = self._runs().filter(
            task__in={o.row for o in occurrences}, due_at__in={o.due_at for o in occurrences}, owner__in=owners
        )
        return runs

    def _now(self, clock: _Clock) -> datetime:
        if clock.given is not None:
            return clock.given
        return clock_of(self._state())

    def _states(self, declared: Declarations) -> QuerySet[ScheduleState]:
        wanted = Q(key=ScheduleState.PROJECT) | Q(first_seen_at__isnull=False, scope__in=["", declared.server])
        states: QuerySet[ScheduleState] = self._state().filter(wanted)
        return states

    def _locks(self) -> QuerySet[ScheduledLock]:
        rows: QuerySet[ScheduledLock] = ScheduledLock.objects.using(self.using).order_by()
        return rows

    def _runs(self) -> QuerySet[ScheduledRun]:
        rows: QuerySet[ScheduledRun] = ScheduledRun.objects.using(self.using).order_by()
        return rows

    def _state(self) -> QuerySet[ScheduleState]:
        rows: QuerySet[ScheduleState] = ScheduleState.objects.using(self.using).order_by()
        return rows


_NEVER: Final = Value(None, output_field=DateTimeField())
_FREE: Final[dict[str, Any]] = {
    "owner": None,
    "server": "",
    "acquired_at": None,
    "renewed_at": None,
    "expires_at": None,
    "finish_by": None,
    "cancelled_at": None,
}
_ROW: Final = (
    "pk",
    "task",
    "fingerprint",
    "last_due_at",
    "schedule_since",
    "next_due_at",
    "not_before",
    "owner",
    "server",
    "fence",
    "acquired_at",
    "renewed_at",
    "expires_at",
    "attempt",
    "trigger",
    "retry_at",
    "wanted_at",
    "cancelled_at",
    "paused_at",
    "paused_reason",
    "moved_to",
    "moved_from",
)
_LOOK: Final = tuple(field for field in _ROW if not field.startswith("paused_"))
_DUE, _ENDED, _STATE = range(3)
_OF_STATE: Final = {
    "task": "key",
    "fingerprint": "scope",
    "last_due_at": "paused_at",
    "schedule_since": "interrupted_at",
    "next_due_at": "first_seen_at",
    "not_before": "seen_at",
}
_OF_RUN: Final = {"fingerprint": "owner", "last_due_at": "due_at"} | {
    field: field for field in ("task", "owner", "server", "fence", "attempt", "trigger")
}
_RESUMED: Final = ("last_due_at", "next_due_at", "retry_at", "rerun_up_to", "paused_at", "paused_reason")
_MAY_LIE_AHEAD: Final = ("last_due_at", "schedule_since", "not_before", "retry_at", "wanted_at")
_SET_RIGHT: Final = (*_MAY_LIE_AHEAD, "next_due_at")
_IN_STEP: Final = (
    "last_due_at",
    "next_due_at",
    "schedule",
    "fingerprint",
    "schedule_since",
    "not_before",
    "fence",
    "moved_to",
    "moved_from",
)
_HERE: Final = {"moved_to": "", "moved_from": ""}
_NOTHING_OWED: Final[dict[str, Any]] = {"retry_at": None, "rerun_up_to": 0}


def _as_look(columns: Mapping[str, str]) -> list[Any]:
    """Return the columns of another table, in the order and of the kinds of ``_LOOK``; empty where it has none."""
    return [F(columns[field]) if field in columns else _empty(field) for field in _LOOK]


def _empty(field: str) -> Any:
    kind = ScheduledLock._meta.pk if field == "pk" else ScheduledLock._meta.get_field(field)
    if isinstance(kind, CharField):
        return Value("")
    return Cast(Value(None), cast("Field[Any, Any]", kind))


def _row(values: dict[str, Any]) -> Row:
    paused_at, cancelled_at = values.pop("paused_at"), values.pop("cancelled_at")
    return Row(**values, paused=paused_at is not None, paused_at=paused_at, cancelled=cancelled_at is not None)


def _as_model(row: Row, task: ScheduledTask) -> ScheduledLock:
    return ScheduledLock(
        task=row.task,
        schedule=task.timetable.text,
        **{field: getattr(row, field) for field in _IN_STEP if field != "schedule"},
    )


def _is_open(occurrence: Occurrence, row: _Held) -> bool:
    """May this be claimed now, as far as the row tells, whoever holds it?"""
    if occurrence.is_by_hand:
        return not occurrence.requested or (row.wanted_at == occurrence.due_at and not row.paused)
    if row.paused or row.fingerprint != occurrence.task.fingerprint:
        return False
    if occurrence.is_retry:
        return (
            row.last_due_at == occurrence.due_at
            and row.attempt == occurrence.attempt
            and row.retry_at is not None
            and row.retry_at <= row.now
        )
    return row.last_due_at < occurrence.due_at <= row.now and row.not_before <= row.now


def _noted(row: Any) -> datetime:
    """Return the store's time that a row was annotated with."""
    now: datetime = row.now
    return now


def _due(group: Sequence[Occurrence]) -> Any:
    return _each({o.pk: o.due_at for o in group}, lambda due: Value(due, output_field=DateTimeField()))


def _moved_on(group: Sequence[Occurrence]) -> dict[str, Any]:
    hints = {o.pk: o.next_due_at for o in group}
    return {
        "last_due_at": _due(group),
        "next_due_at": _each(hints, lambda hint: Value(hint, output_field=DateTimeField())),
    }


def _each(
    values: Mapping[Any, _T],
    expression: Callable[[_T], Any],
    field: str = "pk",
    output: Field[Any, Any] | None = None,
) -> Any:
    """Return one expression that has for each row its value: plain where all are equal, else by ``field``."""
    groups: dict[_T, list[Any]] = {}
    for key, value in values.items():
        groups.setdefault(value, []).append(key)
    if len(groups) == 1:
        return expression(next(iter(groups)))
    whens = [When(**{f"{field}__in": keys}, then=expression(value)) for value, keys in groups.items()]
    return Case(*whens, output_field=output or DateTimeField())


def _cleanup(lock: Any, due: Mapping[str, datetime], server: str) -> Cleanup:
    return Cleanup(
        task=lock.task,
        due_at=due.get(lock.owner or "", lock.last_due_at),
        server=lock.server,
        owner=lock.owner or "",
        fence=lock.fence,
        acquired_at=lock.acquired_at,
        expired_at=lock.expires_at,
        cleaned_at=lock.now,
        cleaned_by=server,
        reason="overran" if lock.finish_by is not None and lock.finish_by <= lock.now else "lease_expired",
    )


def _batches(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _in_testcase(connection: BaseDatabaseWrapper) -> bool:
    blocks = getattr(connection, "atomic_blocks", [])
    return connection.in_atomic_block and bool(blocks) and bool(blocks[-1]._from_testcase)
