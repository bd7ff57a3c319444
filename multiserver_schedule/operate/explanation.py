"""One task, explained: its schedule in words, what is in force for it, how it stands, and the next clock change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Final

from django.db import DatabaseError, InterfaceError
from django.utils.connection import ConnectionDoesNotExist

from .. import conf
from ..cron import Cron, Timetable, clock_changes
from ..declare import registry
from ..due import Policy, catch_up_window, default_break, is_meant_for
from ..entries import ScheduledTask
from ..models import ScheduledRun
from . import words
from .listing import Overview, overview
from .stores import Refused, all_unreadable, is_of, nearest, opened, server_of, task_of, unknown

AHEAD: Final = timedelta(days=396)
"""How far away a clock change is looked for: thirteen months, so that each zone that changes has one."""
AROUND: Final = 3
"""How many due times are shown on each side of it."""
_SECOND: Final = timedelta(seconds=1)
_UTC: Final = timezone.utc


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockChange:
    """The next change of the clocks in a task's zone, and what it does to the task."""

    at: datetime
    before: datetime
    """What the clocks would have shown then, had they not been changed: local, without a zone."""
    after: datetime
    """What they show instead."""
    effect: str
    around: tuple[datetime, ...]
    """The last due times before it and the first after it, UTC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Everything about one task, as this version of the project declares it and as its stores have it."""

    name: str
    """The row's: ``task@server`` for a task on every server."""
    runs: str
    """What is run, in one line."""
    kind: str
    declared_in: str
    """``file:line``, and the module."""
    schedule: str
    """The canonical text."""
    in_words: str
    hint: str
    """How to have more words; "" where none are missing."""
    zone: str
    """"" for an interval, which clocks do not touch."""
    facts: tuple[tuple[str, str], ...]
    """What is in force, each with its heading."""
    is_meant: bool
    """Is this server one that runs it?"""
    lines: tuple[Overview, ...]
    """How it stands: a line for each lock that has it, as ``schedule list`` shows it."""
    last_skipped: str
    """When a due time was given up last, and why; "" where none is on record."""
    next: tuple[datetime, ...]
    """Its next due times, UTC; with jitter it starts that much later."""
    offset: timedelta
    change: ClockChange | None
    as_of: datetime
    troubles: tuple[str, ...]


def explain(name: str, *, count: int = 5) -> Explanation:
    """
    Explain a task of this name, or ``task@server``, with its next ``count`` due times.

    Raises Refused where it is not declared in this version, and where no lock knows that server.
    """
    settings = conf.load()
    listing = overview()
    task = task_of(name, registry.completed) or registry.completed.get(name)
    if task is None:
        if wrong := all_unreadable(listing.found):
            raise Refused(f"{name} is not declared in what can be read: {wrong}")
        known = {*registry.completed, *(line.name for line in listing.lines)}
        if name in known:
            raise Refused(
                f"{name} is known to a lock, but not declared in this version of the project: "
                "there is nothing to explain. `manage.py schedule list` shows how it stands."
            )
        raise Refused(unknown(name, known))
    row = name if "@" in name else task.row_name(settings.server_name)
    lines = tuple(line for line in listing.lines if line.name == row)
    if not lines and not listing.troubles:
        rows = [line.name for line in listing.lines if is_of(line.name, task.name)]
        raise Refused(f"No lock knows a server {server_of(row)!r} of {task.name}.{nearest(row, rows)}")
    now = next((line.as_of for line in lines), datetime.now(_UTC))
    policy = Policy(lease=settings.lease, min_break=settings.min_break, catch_up=settings.catch_up)
    in_words, hint = words.of_schedule(task.timetable)
    zone = zone_of(task)
    troubles = list(listing.troubles)
    due: list[datetime] = []
    change = None
    try:
        following = task.next(now)
        # What is in force by default depends on the time between two of them, however many are shown.
        while following is not None and len(due) < max(count, 2):
            due.append(following)
            following = task.next(following)
        change = _next_change(task, zone, now) if zone else None
    except ValueError as error:
        troubles.append(str(error))
    return Explanation(
        name=row,
        runs=task.text,
        kind={"command": "management command", "call": "function", "exec": "program"}[task.kind],
        declared_in=f"{task.file}:{task.line} ({task.module})",
        schedule=task.timetable.text,
        in_words=in_words,
        hint=hint,
        zone=zone,
        facts=tuple(_facts(task, row, due, settings, policy)),
        is_meant=is_meant_for(task, server=settings.server_name, environment=settings.environment),
        lines=lines,
        last_skipped=_last_skipped(row, task, settings, troubles),
        next=tuple(due[:count]),
        offset=task.offset(row),
        change=change,
        as_of=now,
        troubles=tuple(troubles),
    )


def zone_of(task: ScheduledTask) -> str:
    """Return the zone on whose clock a task is due; "" where clocks do not touch it."""
    timetable = task.timetable
    if isinstance(timetable, Timetable):
        # Only with restrictions has an interval to do with a clock.
        return timetable.zone if isinstance(timetable.base, Cron) or timetable.text != timetable.base.text else ""
    return timetable.zone if isinstance(timetable, Cron) else ""


# -- what is in force -------------------------------------------------------------------------------------------------


def _facts(
    task: ScheduledTask, row: str, due: list[datetime], settings: conf.Settings, policy: Policy
) -> Iterable[tuple[str, str]]:
    span = words.of_span
    period = due[1] - due[0] if len(due) > 1 else None
    where = "a lock on each server" if task.on_every_server else "one run for all servers"
    lease = task.lease or policy.lease
    yield "lock", f"{task.lock!r}, {where}; lease {span(lease)}, renewed while it runs"
    yield "overlap", _OVERLAP[task.overlap]
    rest = task.min_break if task.min_break is not None else default_break(period, policy)
    yield "break", f"{span(rest)} after each run" if rest else "none"
    yield "catch-up", _catch_up(task, period, policy)
    yield "limit", f"ended after {span(task.limit)}" if task.limit else "none: it may take as long as it takes"
    yield "retries", _retries(task)
    yield (
        "if its server dies",
        ("the due time is run again by another server" if task.rerun else "the due time is not run again"),
    )
    if task.jitter is not None:
        yield "jitter", f"up to {span(task.jitter)}; this row starts {span(task.offset(row))} after each due time"
    yield "servers", _servers(task, settings)
    if task.filters:
        count = len(task.filters)
        yield "conditions", f"{count} asked at each run (when, skip)" if count > 1 else "one asked at each run"
    if task.even_in_maintenance_mode:
        yield "maintenance", "runs in maintenance mode, too"


_OVERLAP: Final = {
    "skip": "a due time that comes while it runs is skipped",
    "allow": "may run beside itself",
    "queue_one": "a due time that comes while it runs is run once that has ended",
    "cancel_other": "a due time that comes while it runs ends that run and takes its place",
}


def _catch_up(task: ScheduledTask, period: timedelta | None, policy: Policy) -> str:
    if task.catch_up == "all":
        return "each due time that was missed is run, the oldest first"
    late = words.of_span(catch_up_window(task, period or AHEAD, policy))
    text = f"the latest due time is run up to {late} late; what is older is recorded as missed"
    return f"none, but {text}" if task.catch_up == "none" else text


def _retries(task: ScheduledTask) -> str:
    if not task.retries:
        return "none"
    # Without the spread, which is another one for each due time.
    waits = [words.of_span(task.backoff * 2**attempt) for attempt in range(task.retries)]
    times = "once" if task.retries == 1 else f"{task.retries} times"
    return (
        f"a failure is tried again {times}, after about {words.joined(waits)} (a fifth more or less), "
        "but never across the next due time"
    )


def _servers(task: ScheduledTask, settings: conf.Settings) -> str:
    limits = []
    if task.environments:
        limits.append(f"in the environment {words.joined(task.environments, 'or')}")
    if task.servers:
        limits.append(f"on {words.joined(task.servers, 'or')}")
    if not limits:
        return "all"
    here = f"this is {settings.server_name}"
    if task.environments:
        here += f" in {settings.environment!r}" if settings.environment else ", whose ENVIRONMENT is not set"
    meant = is_meant_for(task, server=settings.server_name, environment=settings.environment)
    return f"only {' and '.join(limits)}; {here}, which {'is' if meant else 'is NOT'} one of them"


def _last_skipped(row: str, task: ScheduledTask, settings: conf.Settings, troubles: list[str]) -> str:
    try:
        with opened(settings, task.lock) as lock:
            using = lock.using
        run = ScheduledRun.objects.using(using).filter(task=row, status="skipped").order_by("-pk").first()
    except (DatabaseError, InterfaceError, ConnectionDoesNotExist):
        return ""  # the listing has said that it cannot be read
    except Exception as error:  # a backend that cannot be imported, say
        troubles.append(f"{type(error).__name__}: {error}")
        return ""
    if run is None:
        return ""
    times = f", {run.count} due times in a row" if run.count > 1 else ""
    return f"{run.due_at:%Y-%m-%d %H:%M:%SZ}: {run.reason}{times}"


# -- the next clock change --------------------------------------------------------------------------------------------


def _next_change(task: ScheduledTask, zone: str, now: datetime) -> ClockChange | None:
    changes = clock_changes(zone, now, now + AHEAD)
    if not changes:
        return None
    at, before, after = changes[0]
    wall_before, wall_after = (at + before).replace(tzinfo=None), (at + after).replace(tzinfo=None)
    earlier: list[datetime] = []
    moment = at - timedelta(microseconds=1)
    while len(earlier) < AROUND and (due := task.latest(moment, after=at - AHEAD)) is not None:
        earlier.insert(0, due)
        moment = due - timedelta(microseconds=1)
    later: list[datetime] = []
    following: datetime | None = at - _SECOND
    while len(later) < AROUND and following is not None and (following := task.next(following)) is not None:
        later.append(following)
    return ClockChange(
        at=at,
        before=wall_before,
        after=wall_after,
        effect=_effect(task, at, wall_before, wall_after),
        around=(*earlier, *later),
    )


def _effect(task: ScheduledTask, at: datetime, before: datetime, after: datetime) -> str:
    """Say what Debian's rule makes of the due times that the change leaves out or shows twice."""
    timetable = task.timetable
    base = timetable.base if isinstance(timetable, Timetable) else timetable
    if not isinstance(base, Cron):
        return "it counts on in UTC; only its hours and days are those of the clock"
    minute, hour, *_ = base.expression.split()
    follows = minute.startswith("*") or hour.startswith("*")
    start, end = sorted((before, after))
    gap = after > before
    written = Cron(base.expression)
    allowed = (
        Timetable(written, "UTC", timetable.days, timetable.windows) if isinstance(timetable, Timetable) else written
    )

    def on_the_wall(due: Cron | Timetable) -> list[datetime]:
        # The wall clock's own minutes, as if they were UTC.
        return due.between(start.replace(tzinfo=_UTC) - _SECOND, end.replace(tzinfo=_UTC) - _SECOND)

    if gap and not follows and task.between(at - _SECOND, at) and (left_out := on_the_wall(written)):
        # What a gap leaves out is judged by the time that it is put off to.
        return f"{_times(left_out)} {_do(left_out)} not exist that day: it runs right after the gap, at {after:%H:%M}"
    touched = on_the_wall(allowed)
    if not touched:
        return "no due time is touched by it"
    times = _times(touched)
    if gap:
        why = ": it follows the clock" if follows else ""
        return f"{times} {_do(touched)} not exist that day, and {_is(touched)} left out{why}"
    if follows:
        return f"{times} {_come(touched)} twice: it runs both times, as it follows the clock"
    return f"{times} {_come(touched)} twice: it runs once in the repeated hour, the first time"


def _times(moments: list[datetime]) -> str:
    if len(moments) > 3:
        return f"{moments[0]:%H:%M} to {moments[-1]:%H:%M} ({len(moments)} due times)"
    return words.joined(f"{moment:%H:%M}" for moment in moments)


def _do(moments: list[datetime]) -> str:
    return "does" if len(moments) == 1 else "do"


def _is(moments: list[datetime]) -> str:
    return "is" if len(moments) == 1 else "are"


def _come(moments: list[datetime]) -> str:
    return "comes" if len(moments) == 1 else "come"
