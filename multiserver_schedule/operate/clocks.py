"""Is a store's clock right, what has it left behind where it was ahead, and how is that mended by hand?"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from typing import Final, Literal

from django.db import DatabaseError, InterfaceError
from django.db.models import Count

from .. import conf, logs
from ..due import DEFAULT_BREAK
from ..entries import SCHEDULED, Row, ScheduledTask
from ..exceptions import UnsafeTransaction
from ..locks.ahead import Reach, beyond
from ..locks.base import BaseLock, Following
from ..models import ScheduledRun
from .holders import Released, holder_of, release
from .stores import away, chosen_locks, declarations, declared, opened, some, task_of

FAR_OFF: Final = timedelta(seconds=5)
"""By how much a server's clock may differ from a store's."""
MENDS: Final = "`manage.py schedule unlock --clock` mends it"
_ASKED: Final = 3
"""How often a store is asked for its time: the quickest answer says it best."""
_BACKOFF_MOST: Final = 1.2
"""What the spread of waits makes of one, at most (``entries.Occurrence.retry_after``)."""

Wait = Callable[[timedelta, Sequence[str]], None]
"""Let so much time go by, in which the holders of these rows renew their leases if they live."""


@dataclass(frozen=True, slots=True)
class Clock:
    """A store's clock beside this server's."""

    trip: timedelta
    """How long it took to ask."""
    offset: timedelta
    """By how much it is ahead; negative where it is behind."""
    theirs: datetime

    @property
    def is_off(self) -> bool:
        """Does it differ by more than two clocks that are synchronised?"""
        return abs(self.offset) > FAR_OFF

    @property
    def said(self) -> str:
        """How it differs, in words."""
        span = abs(self.offset)
        far = f"{span.total_seconds():.3f} s" if span < timedelta(minutes=1) else str(span).split(".")[0]
        return f"its clock is {far} {'ahead of' if self.offset > timedelta(0) else 'behind'} this server's"


@dataclass(frozen=True, slots=True)
class Brought:
    """A time that was beyond the clock's reach, and what it is now."""

    what: str
    was: datetime
    now: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Righted:
    """A row that was mended."""

    name: str
    lock: str
    brought: tuple[Brought, ...] = ()
    next_due_at: datetime | None = None
    released: Released | None = None
    """The lease that nobody renewed any more."""
    runs_end: bool = False
    """Had it runs that may overlap, which end a lease from now unless they are renewed?"""
    ran_ahead: int = 0
    """Due times that the history has as run and that are still to come: they run again."""


@dataclass(frozen=True, slots=True)
class SetRight:
    """What was mended, in all stores."""

    rows: tuple[Righted, ...] = ()
    interrupts: tuple[str, ...] = ()
    """The locks whose interrupt was still to come, and ended whatever began."""
    troubles: tuple[str, ...] = ()


# -- what is seen -----------------------------------------------------------------------------------------------------


def measured(lock: BaseLock) -> Clock:
    """Ask a store what time it is, and compare."""
    best: Clock | None = None
    for _ in range(_ASKED):
        before, sent = datetime.now(timezone.utc), time.perf_counter()
        theirs = lock.clock()
        trip = timedelta(seconds=time.perf_counter() - sent)
        # It answered somewhere on the way; taken in the middle, the error is half of the way at most.
        if best is None or trip < best.trip:
            best = Clock(trip, theirs - (before + trip / 2), theirs)
    assert best is not None
    return best


def reaches_of(rows: Sequence[Row], tasks: Mapping[str, ScheduledTask], settings: conf.Settings) -> dict[str, Reach]:
    """Say of each row how far beyond the clock its times may lie: two leases, and what its task waits on purpose."""
    own = {row.task: task_of(row.task, tasks) for row in rows}
    leases = {
        row.task: max(
            (task.lease if task is not None else None) or settings.lease,
            row.expires_at - row.renewed_at if row.expires_at and row.renewed_at else timedelta(0),
        )
        for row, task in zip(rows, own.values(), strict=True)
    }
    longest = max([settings.lease, *leases.values(), *(task.lease for task in tasks.values() if task.lease)])
    found = {}
    for name, task in own.items():
        far = max(FAR_OFF, 2 * leases[name])
        rest = retry = None
        if task is not None:
            usual = settings.min_break if settings.min_break is not None else DEFAULT_BREAK
            rest = max(far, 2 * longest) + (task.min_break if task.min_break is not None else usual)
            retry = far + (task.backoff * 2 ** (task.retries - 1) * _BACKOFF_MOST if task.retries else timedelta(0))
        found[name] = Reach(far=far, rest=rest, retry=retry, lease=longest)
    return found


_LEFT: Final[Mapping[str, tuple[Literal["warning", "problem"], str, str]]] = {
    "last_due_at": ("problem", "the last due time", "Nothing of it runs before"),
    "schedule_since": ("problem", "the take-over of the schedule", "Nothing of it runs before"),
    "renewed_at": ("problem", "the lease", "If its holder is gone, nobody frees it before"),
    "wanted_at": ("problem", "the run that is asked for", "It does not start before"),
    # These two may also be what a task waited on purpose, before it was declared otherwise.
    "not_before": ("warning", "the break", "Nothing of it runs before"),
    "retry_at": ("warning", "the next attempt", "It does not start before"),
}
"""How bad it is that a time lies beyond, what it is called, and what waits for it."""


def left_behind(
    rows: Sequence[Row],
    interrupted_at: datetime | None,
    now: datetime,
    tasks: Mapping[str, ScheduledTask],
    settings: conf.Settings,
) -> Iterator[tuple[Literal["warning", "problem"], str]]:
    """Tell what lies beyond the store's clock, of which rows, and until when that is in the way."""
    found: dict[str, dict[str, datetime]] = {field: {} for field in _LEFT}
    reaches = reaches_of(rows, tasks, settings)
    for row in rows:
        if row.moved_to and row.owner is None:
            continue
        for field, at in beyond(row, reaches[row.task], now).items():
            # A lease is in the way until it ends.
            found[field][row.task] = row.expires_at or at if field == "renewed_at" else at
    for field, (level, what, waits) in _LEFT.items():
        if names := sorted(found[field]):
            until = f"{max(found[field].values()):%Y-%m-%d %H:%M:%SZ}"
            text = f"{what} of {some(names)} is later than the store's clock: was that set back? {waits} {until}"
            yield level, f"{text}; {MENDS}"
    if _is_to_come(interrupted_at, now, reaches):
        text = "an interrupt is later than the store's clock: was that set back? Services and passes end at once before"
        yield "problem", f"{text} {interrupted_at:%Y-%m-%d %H:%M:%SZ}; {MENDS}"


def _is_to_come(interrupted_at: datetime | None, now: datetime, reaches: Mapping[str, Reach]) -> bool:
    """Is this an interrupt that no clock that goes right can have told?"""
    far = max((reach.far for reach in reaches.values()), default=None)
    return interrupted_at is not None and far is not None and interrupted_at > now + far


# -- what is mended ---------------------------------------------------------------------------------------------------


def set_clock_right(*, lock: str = "", force: bool = False, wait: Wait | None = None) -> SetRight:
    """
    Mend what a store's clock that was ahead, and has been corrected, has left behind (in ``lock``, or in all).

    1. Is the clock right by now? It must agree with this server's, unless by ``force``.
    2. Bring down what lies beyond it, as ``BaseLock.set_right`` says: nothing is due for the past, fences stay.
    3. ``wait`` for the leases that lie beyond it, as long as the longest of them lasts: a holder that lives has renewed
       it by then, and one that could not has ended its run by its own clock.
    4. Free those that were not, each with the trace of a clean-up.

    One store that is away, or whose clock is wrong, keeps no other from being mended, and is told of.
    """
    settings = conf.load()
    tasks = declared()
    rows: list[Righted] = []
    interrupts: list[str] = []
    troubles: list[str] = []
    for alias in chosen_locks(settings, lock):
        try:
            with opened(settings, alias) as store:
                clock = measured(store)
                if clock.is_off and not force:
                    troubles.append(_still_wrong(alias, clock))
                    continue
                mending = _Mending(store, settings, tasks)
                if mending.bring_down():
                    interrupts.append(alias)
                try:
                    mending.free(wait or _sleep)
                finally:
                    rows += mending.done(troubles)
        except UnsafeTransaction:
            raise
        except Exception as error:  # whatever a driver raises
            troubles.append(f"{away(alias, error)}. What is not mended in it yet, the same call mends when it is back.")
    return SetRight(tuple(rows), tuple(interrupts), tuple(troubles))


class _Mending:
    """What is mended in one store."""

    def __init__(self, store: BaseLock, settings: conf.Settings, tasks: Mapping[str, ScheduledTask]) -> None:
        self._store, self._settings, self._tasks = store, settings, tasks
        self._righted: dict[str, Righted] = {}
        self._reaches: dict[str, Reach] = {}
        self._at = datetime.now(timezone.utc)
        """The store's time when it was mended."""

    def bring_down(self) -> bool:
        """Bring down what lies beyond; tell whether an interrupt did."""
        store = self._store
        before = {row.task: row for row in store.rows()}
        now = self._at = store.clock()
        mine = declarations(store.alias, self._tasks, self._settings.server_name)
        self._reaches = reaches_of(list(before.values()), self._tasks, self._settings)
        was_interrupted = _is_to_come(store.look(mine).interrupted_at, now, self._reaches)
        changed = store.set_right(self._reaches, following=self._following(before))
        after = {row.task: row for row in store.rows(changed)} if changed else {}
        for name in sorted(changed):
            row = after.get(name)
            if row is None:
                continue
            brought = tuple(
                Brought(_LEFT[field][1], was, getattr(row, field))
                for field, was in beyond(before[name], self._reaches[name], now).items()
                if field != "renewed_at"
            )
            text = "; ".join(f"{each.what} was {logs.short(each.was)}" for each in brought)
            logs.log(
                "abandoned",
                logging.WARNING,
                "set right by hand, since the store's clock was ahead: %s",
                text or "its runs that may overlap",
                task=name,
                due=row.last_due_at,
                server=self._settings.server_name,
            )
            self._righted[name] = Righted(
                name=name, lock=store.alias, brought=brought, next_due_at=row.next_due_at, runs_end=not brought
            )
        return was_interrupted

    def _following(self, rows: Mapping[str, Row]) -> Following:
        def following(name: str, after: datetime) -> datetime | None:
            task = task_of(name, self._tasks)
            if task is None or task.fingerprint != rows[name].fingerprint:
                return None
            try:
                return task.next(after)
            except Exception:  # a zone that this machine does not have: others know
                return None

        return following

    def free(self, wait: Wait) -> None:
        """Free what nobody renews."""
        stuck = self._stuck()
        if not stuck:
            return
        # As long as that: a holder that is cancelled does not renew, and has a lease to end its run.
        wait(max(map(_lease_of, stuck.values())), sorted(stuck))
        now = self._store.clock()
        for name, row in self._stuck().items():
            was = stuck.get(name)
            if was is None or (row.owner, row.renewed_at) != (was.owner, was.renewed_at):
                continue
            held = holder_of(row, self._store.alias, now, self._settings)
            released = release(self._store, held, self._settings, self._tasks)
            if released is not None:
                known = self._righted.get(name) or Righted(
                    name=name, lock=self._store.alias, next_due_at=row.next_due_at
                )
                self._righted[name] = replace(known, released=released)

    def _stuck(self) -> dict[str, Row]:
        """Return the rows that are held by a lease that was renewed later than it can have been."""
        rows = [row for row in self._store.rows() if row.owner is not None and row.task in self._reaches]
        now = self._store.clock()
        return {row.task: row for row in rows if "renewed_at" in beyond(row, self._reaches[row.task], now)}

    def done(self, troubles: list[str]) -> list[Righted]:
        """Return what was mended, with what will run again."""
        names = [
            name
            for name, each in self._righted.items()
            if any(brought.what == _LEFT["last_due_at"][1] for brought in each.brought)
        ]
        ahead: dict[str, int] = {}
        if names:
            runs = ScheduledRun.objects.using(self._store.using).filter(
                task__in=names, trigger__in=SCHEDULED, due_at__gt=self._at
            )
            try:
                ahead = dict(
                    runs.exclude(status="skipped").values_list("task").annotate(Count("due_at", distinct=True))
                )
            except (DatabaseError, InterfaceError):
                troubles.append(
                    f"The history of what is locked in {self._store.alias!r} does not answer: which tasks have run "
                    "ahead of their time, and will run again, is not known."
                )
        return [replace(each, ran_ahead=ahead.get(name, 0)) for name, each in sorted(self._righted.items())]


def _lease_of(row: Row) -> timedelta:
    assert row.expires_at is not None and row.renewed_at is not None
    return row.expires_at - row.renewed_at


def _sleep(span: timedelta, names: Sequence[str]) -> None:
    time.sleep(span.total_seconds())


def _still_wrong(alias: str, clock: Clock) -> str:
    ours = clock.theirs - clock.offset
    changes = "changes nothing" if clock.offset > timedelta(0) else "would make what has run run again"
    return (
        f"The clock of the lock {alias!r} is wrong, or this server's is: {logs.short(clock.theirs)} there, "
        f"{logs.short(ours)} here ({clock.said}). To mend by a clock that is still off {changes}; nothing was done in "
        "it. Synchronise both (NTP), and then write it again; --force does it all the same."
    )
