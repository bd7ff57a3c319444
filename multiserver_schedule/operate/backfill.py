"""Due times of the past that nobody ran: each is run here, under the lock, oldest first; no schedule notices."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta, timezone
from typing import Final, Literal, Protocol
from zoneinfo import ZoneInfo

from django.db.models import Count, Min, Q, QuerySet

from .. import conf
from ..entries import SCHEDULED, ScheduledTask
from ..models import ScheduledRun
from .explanation import zone_of
from .steer import task_here
from .stores import Misused, Refused, declared, reached

MOST: Final = 10_000
"""Due times that are made up for at once, unless all are asked for."""
_DATE: Final = re.compile(r"\d{4}-\d\d-\d\d")
_TIME: Final = re.compile(_DATE.pattern + r"[T ]\d\d(:\d\d(:\d\d(\.\d+)?)?)?([+-]\d\d:\d\d(:\d\d)?)?")
_EARLIEST: Final = 1900
"""The first year of which due times are told; of much earlier ones not all zones have the time."""
_SECOND: Final = timedelta(seconds=1)
_COUNTS: Final = (*SCHEDULED, "backfill")
"""The triggers whose success means that a due time has run."""


class Hand(Protocol):
    """Runs one due time by hand, in this process or one that it starts, and waits for it."""

    def __call__(self, task: ScheduledTask, due_at: datetime) -> Tried:
        """Run it under the lock with the trigger "backfill"."""


@dataclass(frozen=True, slots=True)
class Tried:
    """How that went."""

    succeeded: bool
    why_not: str = ""
    """Why nothing was started: who holds the lock. Then it may be tried again."""
    stopped: bool = False
    """Did somebody ask for the end meanwhile?"""
    filtered: bool = False
    """Did the task's own conditions say no? Then there was nothing to run, and the due time is dealt with."""
    said: str = ""
    """What is to be said of a failure at once: that the run was cancelled, and for what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """What a backfill is to make up for."""

    task: ScheduledTask
    row: str
    zone: str
    """In which its times were read, and are shown."""
    using: str
    """The database that its history is in."""
    since: datetime
    until: datetime
    due: tuple[datetime, ...]
    """The due times to be run, oldest first."""
    have_run: int
    """How many of the range the history has as run already."""
    everything: bool


@dataclass(slots=True)
class Progress:
    """How far a backfill has come."""

    gap: Gap
    keep_going: bool = False
    """Does it go on after a failure?"""
    done: int = 0
    failed: list[datetime] = field(default_factory=list)
    """Also those whose runs were cancelled."""
    skipped: int = 0
    """Due times at which the task's own conditions said no."""
    elsewhere: int = 0
    """Due times that somebody else has made up for meanwhile."""
    next_due_at: datetime | None = None
    """Where it would go on; None when all is done."""
    stopped: bool = False

    @property
    def passed(self) -> int:
        """How many are behind it."""
        return self.done + len(self.failed) + self.skipped + self.elsewhere

    @property
    def again(self) -> str:
        """The command that goes on where this one stopped; "" when nothing is left."""
        if self.next_due_at is None:
            return ""
        zone = ZoneInfo(self.gap.zone)
        until, since = (each.astimezone(zone).isoformat() for each in (self.gap.until, self.next_due_at))
        more = " --all" * self.gap.everything + " --keep-going" * self.keep_going
        return f"manage.py schedule backfill {self.gap.task.name} --from {since} --to {until}{more}"


def read_time(text: str, zone: str, *, end: bool = False) -> datetime:
    """
    Return the moment that somebody wrote: a date, or a date and a time, in this zone unless it has an offset.

    A date alone is its first moment, or with ``end`` its last second. Raises ValueError where it is neither, and
    OverflowError where it is in no year that there is in UTC.
    """
    text = re.sub(r"[zZ]$", "+00:00", text.strip())
    if _DATE.fullmatch(text):
        moment = datetime.combine(date.fromisoformat(text), time(23, 59, 59) if end else time())
    elif _TIME.fullmatch(text):
        moment = datetime.fromisoformat(text)
    else:
        # Newer Pythons read more forms, among them dates such as 20261120, which would be midnight at the end, too.
        raise ValueError(text)
    if moment.tzinfo is None:
        # Of an hour that comes twice: all of it.
        moment = moment.replace(tzinfo=ZoneInfo(zone), fold=1 if end else 0)
    # Within one zone Python compares what the clocks show, and not when.
    return moment.astimezone(timezone.utc)


def find_gap(name: str, since: str, until: str = "", *, everything: bool = False) -> Gap:
    """
    Return the due times of a task in ``[since, until]`` (until now, where it is not said) that no run has succeeded at.

    With ``everything``: all of them. Raises Refused for what is unknown, upside down, in the future, too much, or older
    than what the history knows.
    """
    settings = conf.load()
    task = task_here(name, declared(), settings, what="A backfill")
    zone = zone_of(task) or settings.time_zone
    row = task.row_name(settings.server_name)
    with reached(settings, task.lock) as lock:
        now, using = lock.clock(), lock.using
    first = _moment("--from", since, zone)
    last = _moment("--to", until, zone, end=True) if until else now
    if first > last:
        raise Misused(f"--from {since} is after --to {until or 'now'}. Write the earlier one as --from.")
    for option, text, begins in (("--from", since, first), ("--to", until, _moment("--to", until or since, zone))):
        # A date that has begun is in order: what is left of it is left out.
        if begins > now:
            raise Misused(
                f"{option} {text} is in the future: it is {_local(now, zone)} now. "
                "A backfill is for what has been due; leave --to out to say: until now."
            )
    last = min(last, now).replace(microsecond=0)
    count = task.timetable.count(first - timedelta(microseconds=1), last)
    if count > MOST and not everything:
        fits = task.between(first - timedelta(microseconds=1), _after_so_many(task, first, last))[:MOST]
        raise Refused(
            f"{name} was due {count:,} times between --from and --to; {MOST:,} is the most for one backfill. Write "
            f"--to {_local(fits[-1], zone)} and go on from there, or --all to run every one of them, whatever has run."
        )
    due = task.between(first - timedelta(microseconds=1), last)
    ran: set[datetime] = set()
    if not everything:
        horizon = _horizon(row, using, settings, now)
        if due and due[0] < horizon:
            known = _local(horizon + timedelta(minutes=1), zone)[:16]
            raise Refused(
                f"The history of {name} does not reach back to {_local(due[0], zone)} (HISTORY_DAYS, HISTORY_RUNS): "
                f"which of its due times before {known} have run is not known. Write --from {known}, or --all to run "
                "every due time of the range, those that have run too."
            )
        ran = set(_succeeded(row, using).filter(due_at__gte=first, due_at__lte=last).values_list("due_at", flat=True))
    missing = tuple(moment for moment in due if moment not in ran)
    return Gap(
        task=task,
        row=row,
        zone=zone,
        using=using,
        since=first,
        until=last,
        due=missing,
        have_run=len(due) - len(missing),
        everything=everything,
    )


Phase = Literal["running", "waiting", "succeeded", "failed", "skipped", "elsewhere"]


def fill(
    gap: Gap, hand: Hand, *, keep_going: bool = False, wait: Callable[[float], bool], again_in: float = 2.0
) -> Iterator[tuple[Phase, datetime, str, Progress]]:
    """
    Run each due time of a gap, oldest first; yield what happens, with a text (who is waited for, why it is no success)
    and how far it is.

    While another run holds the lock, that is waited for: ``wait`` sleeps for so many seconds, and says whether it was
    told to stop. The first failure is the end, unless ``keep_going``; the task's own conditions saying no is none. What
    somebody else makes up for meanwhile is not run twice.
    """
    progress = Progress(gap, keep_going, next_due_at=gap.due[0] if gap.due else None)
    for number, due_at in enumerate(gap.due):
        progress.next_due_at = due_at
        said = ""
        while True:
            if not gap.everything and _succeeded(gap.row, gap.using).filter(due_at=due_at).exists():
                progress.elsewhere += 1
                yield "elsewhere", due_at, "", progress
                break
            yield "running", due_at, "", progress
            tried = hand(gap.task, due_at)
            if tried.why_not and not tried.stopped:
                if tried.why_not != said:
                    yield "waiting", due_at, tried.why_not, progress
                said = tried.why_not
                if wait(again_in):
                    progress.stopped = True
                    return
                continue
            if tried.why_not:
                progress.stopped = True
                return
            if tried.succeeded:
                progress.done += 1
            elif tried.filtered:
                progress.skipped += 1
            elif not tried.stopped:
                progress.failed.append(due_at)
            else:
                progress.stopped = True
                return
            following = gap.due[number + 1] if number + 1 < len(gap.due) else None
            goes_on = tried.succeeded or tried.filtered or keep_going
            if goes_on:
                progress.next_due_at = following
            phase: Phase = "succeeded" if tried.succeeded else "skipped" if tried.filtered else "failed"
            yield phase, due_at, tried.said, progress
            if tried.stopped or not goes_on:
                progress.stopped = progress.next_due_at is not None
                return
            break
    progress.next_due_at = None


def _horizon(row: str, using: str, settings: conf.Settings, now: datetime) -> datetime:
    """Return the moment after which the history has every success of this row; what was before may be pruned."""
    horizon = now - timedelta(days=settings.history_days)
    kept = ScheduledRun.objects.using(using).filter(task=row, status="succeeded").order_by()
    found = kept.aggregate(count=Count("pk"), first=Min("due_at", filter=Q(trigger__in=SCHEDULED)))
    # Successes beyond the last ones go before their time; they go oldest first.
    if found["count"] >= settings.history_runs:
        return max(horizon, found["first"] or now)
    return horizon


def _succeeded(row: str, using: str) -> QuerySet[ScheduledRun]:
    wanted = {"task": row, "status": "succeeded", "trigger__in": _COUNTS}
    runs: QuerySet[ScheduledRun] = ScheduledRun.objects.using(using).filter(**wanted).order_by()
    return runs


def _after_so_many(task: ScheduledTask, first: datetime, last: datetime) -> datetime:
    """Return a moment by which there have been MOST due times, found by halving, without listing them all."""
    low, high = first, last
    while high - low > _SECOND:
        middle = low + (high - low) / 2
        if task.timetable.count(first - timedelta(microseconds=1), middle) >= MOST:
            high = middle
        else:
            low = middle
    return high


def _moment(option: str, text: str, zone: str, *, end: bool = False) -> datetime:
    moment: datetime | None = None
    try:
        moment = read_time(text, zone, end=end)
    except OverflowError:
        pass
    except ValueError:
        raise Misused(
            f"{option} {text!r} is not a time. Write 2026-11-20, 2026-11-20T03:00 (in {zone}) or "
            "2026-11-20T03:00+01:00."
        ) from None
    if moment is None or moment.year < _EARLIEST:
        raise Misused(f"{option} {text} is out of reach. Write a time from {_EARLIEST} on, until now.")
    return moment


def _local(moment: datetime, zone: str) -> str:
    return f"{moment.astimezone(ZoneInfo(zone)).replace(microsecond=0, tzinfo=None).isoformat()}"
