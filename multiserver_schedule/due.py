"""
DUE: from what is declared and what the store last saw to what may be claimed now. Pure: no store, no clock of its own.

The newest due time counts; older ones that nobody ran are counted as missed. How old a due time may be and still run is
its catch-up window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from .entries import EVERY_MISSED, WAITING, Occurrence, Row, ScheduledTask, Skip, Trigger

LONGEST_DEFAULT_CATCH_UP: Final = timedelta(hours=6)
SHORTEST_DEFAULT_CATCH_UP: Final = timedelta(minutes=1)
DEFAULT_BREAK: Final = timedelta(seconds=10)  # for anything from a minute up; below, a sixth of the period
SLOW_START: Final = timedelta(seconds=60)
"""A pass that cron starts this late still loses nothing, whatever the catch-up window says."""

_MOMENT: Final = timedelta(seconds=1)
_MICROSECOND: Final = timedelta(microseconds=1)
_NEVER_AGAIN: Final = timedelta(days=366)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the settings say where a task says nothing."""

    lease: timedelta = timedelta(seconds=30)
    min_break: timedelta | None = None
    catch_up: timedelta | None = None
    slow_start: timedelta = SLOW_START


@dataclass(slots=True)
class Plan:
    """What a pass has to do, each list in the order of the oldest open due time."""

    ready: list[Occurrence] = field(default_factory=list)
    """May be claimed now, as far as was seen."""
    held: list[tuple[Occurrence, Row]] = field(default_factory=list)
    """Due, but another run of the task has the lock."""
    resting: list[tuple[Occurrence, Row]] = field(default_factory=list)
    """Due, but inside the break after the last run."""
    moving: list[tuple[Occurrence, Row]] = field(default_factory=list)
    """Due, but the task has come from another store, where its last run may still be under way."""
    missed: list[Skip] = field(default_factory=list)
    """Too old to be run: to be given up."""
    broken: list[tuple[ScheduledTask, str]] = field(default_factory=list)
    """Tasks whose due times cannot be computed (a zone that this machine does not have), and why."""
    next_at: datetime | None = None
    """The first moment still to come at which one of the rows that were looked at may be started."""
    put_off_to: datetime | None = None
    """The first of these that is only later because of jitter: its due time has come."""

    @property
    def due(self) -> Iterator[Occurrence]:
        """Everything whose time has come, whatever becomes of it."""
        yield from self.ready
        yield from (occurrence for occurrence, _ in (*self.held, *self.resting))
        yield from (skip.occurrence for skip in self.missed)

    def no_later_than(self, moment: datetime | None) -> None:
        """Note that something may be started at ``moment``."""
        if moment is not None and (self.next_at is None or moment < self.next_at):
            self.next_at = moment


def plan(
    tasks: Mapping[str, ScheduledTask],
    rows: Iterable[Row],
    now: datetime,
    *,
    server: str,
    environment: str = "",
    maintenance: bool = False,
    policy: Policy,
) -> Plan:
    """
    Sort the rows that the store named into what to claim, to wait for and to give up.

    Rows of tasks that are not declared here, that another version's schedule holds, or that are not meant for this
    server are passed over: somebody else's business.
    """
    found = Plan()
    for row in rows:
        task = _task_of(row, tasks, server)
        if task is None or not is_meant_for(task, server=server, environment=environment):
            continue
        if maintenance and not task.even_in_maintenance_mode:
            continue
        # With jitter a task lives that much later than its due times.
        later = task.offset(row.task)
        try:
            due = _due(task, row, now - later, policy)
            first = None if due is not None else task.next(max(row.since, now - later))
        except Exception as error:  # this task's alone: the others are none the worse
            found.broken.append((task, str(error) if isinstance(error, ValueError) else repr(error)))
            continue
        is_free = task.overlap == "allow" or row.owner is None
        if isinstance(due, Occurrence) and row.retry_at is not None:
            due = dataclasses.replace(due, forgone_at=row.last_due_at)
        if due is None:
            if later and (put_off := task.next(row.since)) is not None and put_off <= now:
                found.put_off_to = min(put_off + later, found.put_off_to or put_off + later)
            found.no_later_than(first and first + later)
            due = _owed(task, row, policy) if row.retry_at is not None else None
            if due is not None and row.retry_at is not None and (row.retry_at > now or not is_free or row.moved_from):
                # Somebody's manual run may have the lock: it is asked again in a moment.
                found.no_later_than(max(row.retry_at, now + _MOMENT))
                due = None
        # A run by hand that began before it would be ended for it at once.
        goes_first = task.overlap == "cancel_other" and isinstance(due, Occurrence) and not due.is_retry
        if row.wanted_at is not None and is_free and not row.moved_from and not goes_first:
            # Whatever else is due for it is found by the next look.
            found.ready.append(dataclasses.replace(manual(task, row, row.wanted_at, policy), requested=True))
        elif due is None:
            continue
        elif isinstance(due, Skip):
            found.missed.append(due)
        elif row.moved_from:
            found.moving.append((due, row))
        elif not is_free:
            found.held.append((due, row))
        elif row.not_before > now and not due.is_retry:
            found.resting.append((due, row))
        else:
            found.ready.append(due)
    return found


def is_meant_for(task: ScheduledTask, *, server: str, environment: str) -> bool:
    """Is this server one that runs the task at all?"""
    if task.environments and environment not in task.environments:
        return False
    return not task.servers or server in task.servers


def default_break(period: timedelta | None, policy: Policy) -> timedelta:
    """Return the break after a run of a task that names none: ten seconds, or a sixth of a period under a minute."""
    if policy.min_break is not None:
        return policy.min_break
    return DEFAULT_BREAK if period is None else min(DEFAULT_BREAK, period / 6)


def catch_up_window(task: ScheduledTask, period: timedelta, policy: Policy) -> timedelta:
    """Return how old a due time of ``task`` may be and still run."""
    if task.catch_up == "none":
        chosen = timedelta(0)
    elif isinstance(task.catch_up, timedelta):
        chosen = task.catch_up
    elif policy.catch_up is not None:
        chosen = policy.catch_up
    else:
        chosen = min(max(period / 2, SHORTEST_DEFAULT_CATCH_UP), LONGEST_DEFAULT_CATCH_UP)
    return max(chosen, policy.slow_start)


def manual(task: ScheduledTask, row: Row, now: datetime, policy: Policy) -> Occurrence:
    """Return the occurrence of a run that somebody asked for; the schedule does not notice it."""
    following = task.next(now)
    period = None
    if following is not None and (after := task.next(following)) is not None:
        period = after - following
    return Occurrence(
        task=task,
        row=row.task,
        pk=row.pk,
        due_at=now,
        next_due_at=row.next_due_at,
        trigger="manual",
        lease=task.lease or policy.lease,
        min_break=task.min_break if task.min_break is not None else default_break(period, policy),
    )


def _owed(task: ScheduledTask, row: Row, policy: Policy) -> Occurrence | None:
    """Return the further attempt that the row owes, of the due time that it had last."""
    if row.attempt < 2:
        return None
    following = task.next(row.since)
    period = following - row.last_due_at if following else None
    return Occurrence(
        task=task,
        row=row.task,
        pk=row.pk,
        due_at=row.last_due_at,
        next_due_at=following,
        trigger=row.trigger,
        attempt=row.attempt,
        lease=task.lease or policy.lease,
        min_break=task.min_break if task.min_break is not None else default_break(period, policy),
    )


def _task_of(row: Row, tasks: Mapping[str, ScheduledTask], server: str) -> ScheduledTask | None:
    name, _, on = row.task.partition("@")
    task = tasks.get(name)
    if task is None or task.on_every_server != bool(on) or (on and on != server):
        return None
    return task if task.fingerprint == row.fingerprint else None


def _due(task: ScheduledTask, row: Row, now: datetime, policy: Policy) -> Occurrence | Skip | None:
    since = row.since
    # A due time of the schedule that this version replaced, due before the change and not claimed by then: still owed.
    inherited = row.next_due_at
    if inherited is not None and not row.last_due_at < inherited <= min(row.schedule_since, now):
        inherited = None
    if task.catch_up == EVERY_MISSED:
        first = inherited or task.next(since)
        if first is None or first > now:
            return None
        return _occurrence(task, row, first, task.next(max(first, since)), policy, now=now)
    latest = task.latest(now, after=since)
    due_at = latest or inherited
    if due_at is None:
        return None
    following = task.next(max(due_at, since))
    period = following - due_at if following else _NEVER_AGAIN
    count = (task.timetable.count(since, due_at) if latest else 0) + (inherited is not None)
    # One that waits for the end of another run is as old as that end, which began the break.
    waits = task.overlap in WAITING
    age = now - (max(due_at, row.not_before) if waits else due_at)
    if age > catch_up_window(task, period, policy) and not (waits and row.owner is not None):
        given_up = _occurrence(task, row, due_at, following, policy, now=now, missed=count - 1)
        return Skip(occurrence=given_up, reason="missed")
    missed_at = None
    if count > 1:
        missed_at = task.latest(due_at - _MICROSECOND, after=since) or inherited
    return _occurrence(task, row, due_at, following, policy, now=now, missed=count - 1, missed_at=missed_at)


def _occurrence(
    task: ScheduledTask,
    row: Row,
    due_at: datetime,
    following: datetime | None,
    policy: Policy,
    *,
    now: datetime,
    missed: int = 0,
    missed_at: datetime | None = None,
) -> Occurrence:
    late: Trigger = "catch_up" if now - due_at > policy.slow_start else "schedule"
    return Occurrence(
        task=task,
        row=row.task,
        pk=row.pk,
        due_at=due_at,
        next_due_at=following,
        missed=missed,
        missed_at=missed_at,
        trigger=late,
        lease=task.lease or policy.lease,
        min_break=task.min_break
        if task.min_break is not None
        else default_break(following - due_at if following else None, policy),
    )
