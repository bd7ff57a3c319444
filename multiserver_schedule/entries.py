"""
The nouns of the flow, frozen: what was declared, which due time, who may run it until when, and how it went.

``ScheduledTask`` → ``Occurrence`` (that task at 03:00) → ``Claim`` (this server may run it until …) → ``Outcome``.
No Django here, and no behaviour beyond what a value knows of itself.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol

Kind = Literal["command", "call", "exec"]
Overlap = Literal["skip", "allow", "queue_one", "cancel_other"]
Trigger = Literal["schedule", "catch_up", "manual", "backfill"]
Status = Literal["succeeded", "failed", "timed_out", "cancelled", "skipped", "abandoned", "lost"]
SkipReason = Literal["held", "filtered", "missed"]
CleanupReason = Literal["lease_expired", "overran", "runner_lost", "released_by_hand"]
Moment = Literal["before", "after", "success", "failure"]

SCHEDULED: Final[tuple[Trigger, ...]] = ("schedule", "catch_up")
"""The triggers of the schedule itself: by their due times a lock learns which one was the last."""
EVERY_MISSED: Final = "all"
"""The catch-up that runs each missed due time, oldest first, instead of the latest alone."""
WAITING: Final = ("queue_one", "cancel_other")
"""The overlap policies under which a due time waits for the end of another run, and is not skipped."""
RERUNS: Final = 3
"""How often a due time is run again because the server that ran it died: a task that kills its server must end, too."""


class DueTimes(Protocol):
    """When something is due. All times are aware; what comes back is UTC with microsecond 0, equal on every server."""

    @property
    def text(self) -> str:
        """The schedule in one canonical line, equal wherever the schedule is equal. Computed without parsing."""

    @property
    def is_subminute(self) -> bool:
        """Can two due times be less than a minute apart?"""

    def between(self, after: datetime, until: datetime) -> list[datetime]:
        """Return the due times in ``(after, until]``; cutting the window anywhere gives the same set."""

    def latest(self, until: datetime, *, after: datetime) -> datetime | None:
        """Return the last due time in ``(after, until]``; the cost does not grow with the window."""

    def next(self, after: datetime) -> datetime | None:
        """Return the first due time after ``after``, or None where there is none."""

    def count(self, after: datetime, until: datetime) -> int:
        """Return how many due times are in ``(after, until]``."""

    def shortest_gap(self) -> timedelta:
        """Return the shortest distance of two due times, clock changes left aside."""

    def check(self) -> None:
        """Verify what declaring did not: that the zone exists, and that it is ever due. Raises ``CronError``."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A ``when(callable)`` (``runs_if`` True) or a ``skip(callable)`` (False), asked in the run's own process."""

    test: Callable[[], Any] | str
    runs_if: bool


@dataclass(frozen=True, slots=True)
class Hook:
    """A function of the project's that is called beside the run, in a process that renews no lease."""

    moment: Moment
    """"after" is after every run, however it went."""
    function: Callable[..., Any] | str

    @property
    def offered(self) -> tuple[str, ...]:
        """The arguments of which it is given those that its signature names."""
        return ("run",) if self.moment == "before" else ("run", "status", "output", "error", "seconds")


@dataclass(frozen=True, slots=True)
class Ping:
    """An address that is told by a GET, as a dead man's switch wants it."""

    moment: Moment
    url: str


@dataclass(frozen=True, slots=True)
class Mail:
    """Who gets the output by mail."""

    to: tuple[str, ...]
    only_on_failure: bool


@dataclass(frozen=True, slots=True)
class OutputFile:
    """Where what is printed goes, beside its end in the history."""

    path: str
    append: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledTask:
    """One declaration of a ``schedule.py``, complete and verified. ``name`` is its identity on all servers."""

    name: str
    kind: Kind
    target: Callable[..., Any] | str | tuple[str, ...]
    """The function or its dotted path (call), the command's name (command), or the program and its arguments (exec)."""
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    timetable: DueTimes
    file: str = ""
    line: int = 0
    module: str = ""
    filters: tuple[Filter, ...] = ()
    environments: tuple[str, ...] = ()
    servers: tuple[str, ...] = ()
    even_in_maintenance_mode: bool = False
    overlap: Overlap = "skip"
    on_every_server: bool = False
    lock: str = "default"
    min_break: timedelta | None = None
    lease: timedelta | None = None
    limit: timedelta | None = None
    """``ensure_finished``: how long a run may take before its processes are ended."""
    catch_up: timedelta | Literal["all", "none"] | None = None
    """How old a due time may be and still run; None: as the settings and the period say."""
    jitter: timedelta | None = None
    """Each due time starts later by a part of this, always the same for this name; ``due_at`` stays what it is."""
    retries: int = 0
    """How often a due time is tried again after a failure."""
    backoff: timedelta = timedelta(minutes=1)
    """Before the first of these; twice as long before each further one."""
    rerun: bool = False
    """Is a due time run again, by whichever server, when the one that ran it has died?"""
    hooks: tuple[Hook, ...] = ()
    pings: tuple[Ping, ...] = ()
    mails: tuple[Mail, ...] = ()
    output_file: OutputFile | None = None

    @property
    def text(self) -> str:
        """What is run, in one line for people: never parsed, never executed."""
        if isinstance(self.target, tuple):
            return shlex.join(self.target)
        if self.kind == "command":
            options = [f"--{key.replace('_', '-')}={value}" for key, value in self.kwargs.items()]
            return " ".join([f"manage.py {self.target}", *map(str, self.args), *options])
        target = self.target if isinstance(self.target, str) else dotted_path(self.target)
        given = [*map(repr, self.args), *(f"{key}={value!r}" for key, value in self.kwargs.items())]
        return f"{target}({', '.join(given)})"

    @property
    def fingerprint(self) -> str:
        """Tell one schedule of this task from another, in 64 hex digits. What is run is not part of it."""
        return hashlib.sha256(f"{self.name}\n{self.timetable.text}".encode()).hexdigest()

    def between(self, after: datetime, until: datetime) -> list[datetime]:
        """Return the due times in ``(after, until]``, UTC, in order."""
        return self.timetable.between(after, until)

    def latest(self, until: datetime, *, after: datetime) -> datetime | None:
        """Return the last due time in ``(after, until]``, or None."""
        return self.timetable.latest(until, after=after)

    def next(self, after: datetime) -> datetime | None:
        """Return the first due time after ``after``, or None."""
        return self.timetable.next(after)

    def offset(self, row: str) -> timedelta:
        """Return how much later than its due times this row starts: some of the jitter, the same on every server."""
        if self.jitter is None:
            return timedelta(0)
        return self.jitter * _fraction(row)

    @property
    def is_ours(self) -> bool:
        """Is it declared by this package itself, and not by the project?"""
        return self.module.startswith(f"{__package__}.")

    @property
    def is_housekeeping(self) -> bool:
        """Is it one of those that are there without anybody having asked for a task?"""
        return self.module == f"{__package__}.housekeeping"

    def row_name(self, server: str) -> str:
        """Return the name of this task's row: a task ``on_every_server`` has one for each."""
        return f"{self.name}@{server}" if self.on_every_server else self.name


def _fraction(text: str) -> float:
    """Return a number in [0, 1) that is this text's on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def dotted_path(function: Callable[..., Any]) -> str:
    """Return ``module.qualified_name`` of a callable, or of its class where it has no name itself."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the store knew of a task when it was looked at. Times are the store's own, UTC."""

    pk: int
    """0 where a store knows its rows by their names."""
    task: str
    """The row's name: the task's, or ``task@server``."""
    fingerprint: str
    last_due_at: datetime
    schedule_since: datetime
    next_due_at: datetime | None
    not_before: datetime
    owner: str | None = None
    server: str = ""
    fence: int = 0
    acquired_at: datetime | None = None
    renewed_at: datetime | None = None
    expires_at: datetime | None = None
    paused: bool = False
    paused_at: datetime | None = None
    paused_reason: str = ""
    attempt: int = 1
    """Of the last due time: the one that runs or ran last, or, with ``retry_at``, the one that is owed."""
    trigger: Trigger = "schedule"
    """Of the last due time."""
    retry_at: datetime | None = None
    """From when on the last due time is to be tried again, unless a newer one comes before."""
    wanted_at: datetime | None = None
    """When somebody asked for a run that no server has started yet."""
    cancelled: bool = False
    """Has its holder been told to end the run, since a newer due time goes before it?"""
    moved_to: str = ""
    """The alias of the store that has the task by now: nobody claims it here any more."""
    moved_from: str = ""
    """The alias of the store that had the task before, while its last run there may still be under way."""

    @property
    def since(self) -> datetime:
        """Due times are computed after this moment."""
        return max(self.last_due_at, self.schedule_since)

    @property
    def wanted_from(self) -> datetime | None:
        """The earliest moment at which there is something to do for it: its hint, a retry, a run that was asked for."""
        return min(filter(None, (self.next_due_at, self.retry_at, self.wanted_at)), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Occurrence:
    """A task at one due time, as this pass saw it; whether it may run is for the store to say."""

    task: ScheduledTask
    row: str
    """The name of the row: ``task.row_name(server)``."""
    pk: int
    due_at: datetime
    next_due_at: datetime | None
    """The hint that the claim writes: the first due time after ``due_at``."""
    missed: int = 0
    """Due times before this one that nobody ran and nobody will."""
    missed_at: datetime | None = None
    """The latest of them."""
    forgone_at: datetime | None = None
    """The due time before it that owes a further attempt, which is not made any more."""
    trigger: Trigger = "schedule"
    attempt: int = 1
    requested: bool = False
    """Is this the run that the row's ``wanted_at`` asks for? Then that is its ``due_at``, and the claim settles it."""
    lease: timedelta
    min_break: timedelta

    @property
    def is_by_hand(self) -> bool:
        """Did somebody ask for it? Then the schedule does not notice it."""
        return self.trigger in ("manual", "backfill")

    @property
    def is_retry(self) -> bool:
        """Is it a further attempt at a due time that was claimed before?"""
        return self.attempt > 1 and not self.is_by_hand

    @property
    def rerun_up_to(self) -> int:
        """Up to which attempt the death of its server leads to another one; 0: never."""
        return self.task.retries + 1 + RERUNS if self.task.rerun and not self.is_by_hand else 0

    @property
    def retry_after(self) -> timedelta | None:
        """
        How long after a failure the next attempt begins, or None after the last one.

        Twice as long each time, and up to a fifth more or less, so that tasks that failed together do not come back
        together (but the same on every server that computes it).
        """
        if self.is_by_hand or self.attempt > self.task.retries:
            return None
        spread: float = 2 ** (self.attempt - 1) * (0.8 + 0.4 * _fraction(f"{self.key}/{self.attempt}"))
        return self.task.backoff * spread

    def is_retried(self, ended_at: datetime) -> bool:
        """Does a failure at this moment lead to another attempt? Never across the next due time."""
        after = self.retry_after
        return after is not None and (self.next_due_at is None or ended_at + after < self.next_due_at)

    @property
    def may_overlap(self) -> bool:
        """May it run beside another run of its task?"""
        return self.task.overlap == "allow"

    @property
    def key(self) -> str:
        """A stable id of the occurrence, equal on every server and in every attempt."""
        return f"{self.row}/{self.due_at:%Y%m%dT%H%M%SZ}" + ("" if self.trigger != "manual" else "/manual")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The right of one process to run one occurrence, until its lease ends."""

    occurrence: Occurrence
    owner: str
    """A fresh UUID for each claim, never the name of a host."""
    fence: int
    """The fencing token: rises with each claim of the task, and with each clean-up."""
    server: str
    acquired_at: datetime
    expires_at: datetime
    finish_by: datetime | None = None

    @property
    def task(self) -> ScheduledTask:
        """The task that was claimed."""
        return self.occurrence.task


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """One run, as signals and the task itself are told of it."""

    name: str
    """The row's name: the task's, or ``task@server``."""
    due_at: datetime
    started_at: datetime
    attempt: int
    fence: int
    """The fencing token: pass it to whatever the task writes to, and have lower ones refused there."""
    key: str
    """A stable id of the occurrence: the same on every server and in every attempt."""
    server: str
    trigger: Trigger = "schedule"


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """A due time that is given up for all servers, and why."""

    occurrence: Occurrence
    reason: SkipReason
    holder: str = ""
    """The server that held the lock ("held")."""
    held_since: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run went."""

    status: Status
    reason: str = ""
    error: str = ""
    """A traceback, or a sentence where there is none ("exit status 3", "killed by SIGSEGV")."""
    output: str = ""
    """The tail of what it printed, at most 64 KiB."""
    started: bool = True
    """False when the run's own filters said no: the due time is recorded as skipped, and no break follows."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedClaim:
    """One claim that has ended, with how it went, for ``release``."""

    claim: Claim
    outcome: Outcome
    min_break: timedelta
    cleanup: CleanupReason | None = None
    """
    "overran" when the run was ended at its limit, "runner_lost" when the process that ran it died: the release is then
    a clean-up, and leaves its trace.
    """
    retry_in: timedelta | None = None
    """When the due time is to be tried again; the store minds it only while no newer one has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleanup:
    """A stale lock that was taken from a dead or overdue owner."""

    task: str
    """The row's name."""
    due_at: datetime | None
    server: str
    owner: str
    fence: int
    """The fence that the dead owner had."""
    acquired_at: datetime | None
    expired_at: datetime | None
    cleaned_at: datetime
    cleaned_by: str
    reason: CleanupReason
    pk: int | None = None
    """Of the CleanupLog row, once it is written."""
