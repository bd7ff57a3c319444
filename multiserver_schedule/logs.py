"""
Tell people: turn what happened into signals, log lines and lines on the console.

Nothing here runs where leases are renewed. The keeper hands over events (plain dicts, listed at ``Teller``), and a
process of its own delivers them; what a run's own process knows best (its start, its end, its exception) it says
itself.

Levels: failures (ERROR, with the traceback) and missed due times (WARNING) are logged at every level;
``LOG_LEVEL`` says what is added.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, TextIO

from django.apps import apps
from django.db import DatabaseError

from . import conf, signals
from .entries import WAITING, RunInfo, ScheduledTask

logger = logging.getLogger("multiserver_schedule")

_LEVELS: Final = {name: number for number, name in enumerate(conf.LOG_LEVELS)}
_TIMES: Final = ("acquired_at", "cleaned_at", "due_at", "expired_at", "held_since", "interrupted_at")


@dataclass(slots=True)
class Teller:
    """
    Delivers events, each a dict with ``kind`` and, where they apply, ``task`` (the row's name), ``due_at``, ``server``.

    ========== ============================================================== ================================
    kind       further keys                                                   becomes
    ========== ============================================================== ================================
    claimed    fence, trigger, attempt                                        a line at "verbose"
    started    fence, trigger, attempt, started_at, key                       ``task_started`` (of a program)
    ended      status, seconds, reason, error, fence, trigger, attempt, told  signal (unless told), console line
    skipped    reason, holder, held_since, count                              ``task_skipped``, log, console (-v 2)
    cleaned    cleanup (the fields of a CleanupLog row), command, alias       ``ensure_cleanup_executed``, log
    lost       fence                                                          ``lease_lost``, log
    busy       (none)                                                         a line at "conflicts"
    forgone    why                                                            WARNING
    synced     registered, changed (names of rows), now                       console line; problems as ERROR
    note       text, verbosity                                                console line
    info       text                                                           INFO, console line
    trouble    doing, error, trace                                            ERROR
    lost_rows  lock, text, count                                              ERROR, console
    unrecorded text, by                                                       ERROR
    tripwire   text                                                           CRITICAL
    ========== ============================================================== ================================

    Times are aware datetimes, or ISO texts where an event has crossed to another process.
    """

    tasks: Callable[[], Mapping[str, ScheduledTask]]
    verify: Callable[[ScheduledTask], list[str]] = lambda task: []
    """Says what is wrong with a declaration that importing it did not show; asked of tasks that are new."""
    verbosity: int = 1
    stdout: TextIO | None = None
    news: int = 1
    """From which verbosity on it is said what has been registered."""

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Deliver one event. What a receiver raises is logged; what a log handler raises is not stopped here."""
        told = {key: _time(value) if key in _TIMES else value for key, value in event.items()}
        getattr(self, f"_{told.pop('kind')}")(**told)

    def _task(self, row: str) -> ScheduledTask | None:
        return self.tasks().get(row.partition("@")[0])

    def _say(self, text: str, verbosity: int = 1) -> None:
        if self.verbosity >= verbosity:
            stream = self.stdout or sys.stdout
            stream.write(text + "\n")
            stream.flush()

    def _note(self, text: str, verbosity: int = 1, server: str = "") -> None:
        self._say(text, verbosity)

    def _info(self, text: str, server: str) -> None:
        logger.info("%s server=%s", text, server)
        self._say(text)

    def _synced(self, registered: list[str], changed: list[str], now: str, server: str) -> None:
        seen = [task for row in [*registered, *changed] if (task := self._task(row)) is not None]
        for task in seen:
            for problem in self.verify(task):
                logger.error("%s, line %s: %s task=%s", task.file, task.line, problem, task.name)
        for verb, rows in (("registered", registered), ("took over the new schedule of", changed)):
            tasks = [task for row in rows if (task := self._task(row)) is not None and not task.is_housekeeping]
            if tasks:
                self._say(f"{verb} {summary(tasks, datetime.fromisoformat(now))}", self.news)

    def _claimed(self, task: str, due_at: datetime, server: str, fence: int, trigger: str, attempt: int) -> None:
        log(
            "verbose", logging.DEBUG, "claimed (%s, attempt %s)", trigger, attempt, task=task, due=due_at, server=server
        )

    def _busy(self, task: str, due_at: datetime, server: str) -> None:
        log("conflicts", logging.INFO, "another server has it", task=task, due=due_at, server=server)
        self._say(f"{short(due_at)} {task} taken by another server", verbosity=2)

    def _forgone(self, task: str, due_at: datetime, server: str, why: str = "") -> None:
        text = why or "had failed, and no server was there for its next attempt before the next due time"
        log("none", logging.WARNING, text, task=task, due=due_at, server=server)

    def _started(self, task: str, due_at: datetime, server: str, **more: Any) -> None:
        run = _run(task, due_at, server, **more)
        send(signals.task_started, task=self._task(task), run=run, server=server)

    def _ended(
        self,
        task: str,
        due_at: datetime,
        server: str,
        status: str,
        seconds: float,
        reason: str,
        error: str,
        told: bool,
        **more: Any,
    ) -> None:
        if not told:
            run = _run(task, due_at, server, **more)
            ended = {"task": self._task(task), "run": run, "server": server}
            if status == "succeeded":
                send(signals.task_succeeded, seconds=seconds, **ended)
            else:
                send(signals.task_failed, status=status, error=error or reason, exception=None, **ended)
        if status != "succeeded" and error.strip() and (told or not reason):
            # What the run's own process gives as the reason is what went wrong beside it.
            reason = "; ".join(filter(None, (error.strip().splitlines()[-1][:200], reason)))
        why = f" ({reason})" if reason else ""
        self._say(f"{short(due_at)} {task} {status.replace('_', ' ')}{why} in {seconds:.1f} s on {server}")
        log("verbose", logging.DEBUG, "released, %s", status, task=task, due=due_at, server=server)

    def _skipped(
        self,
        task: str,
        due_at: datetime,
        server: str,
        reason: str,
        holder: str = "",
        held_since: datetime | None = None,
        count: int = 1,
    ) -> None:
        send(
            signals.task_skipped,
            task=self._task(task),
            due_at=due_at,
            reason=reason,
            holder=holder,
            held_since=held_since,
            count=count,
            server=server,
        )
        if reason == "held":
            why = f"held by {holder} since {short(held_since)}" if held_since else f"held by {holder}"
            long_since = held_since is not None and due_at - held_since >= conf.load().abandoned_after
            if long_since:
                log(
                    "abandoned",
                    logging.WARNING,
                    "appears abandoned: still %s",
                    why,
                    task=task,
                    due=due_at,
                    server=server,
                )
            else:
                log("conflicts", logging.INFO, "skipped: %s", why, task=task, due=due_at, server=server)
        elif reason == "missed":
            why = "missed" + (f", and {count - 1} before it" if count > 1 else "")
            declared = self._task(task)
            as_declared = declared is not None and declared.overlap in WAITING
            log(
                "conflicts" if as_declared else "none",
                logging.INFO if as_declared else logging.WARNING,
                "missed: nobody ran %s due time(s)",
                count,
                task=task,
                due=due_at,
                server=server,
            )
        else:
            why = "its own conditions said no"
            log("verbose", logging.DEBUG, "skipped: %s", why, task=task, due=due_at, server=server)
        self._say(f"{short(due_at)} {task} skipped: {why}", verbosity=2)

    def _cleaned(self, cleanup: Mapping[str, Any], command: str, server: str, alias: str) -> None:
        fields = {key: _time(value) if key in _TIMES else value for key, value in cleanup.items()}
        model = apps.get_model("multiserver_schedule", "CleanupLog")  # this module is imported before models can be
        row = model(**fields)
        if row.pk is not None:
            # Where the row cannot be had (the database is away again), the signal says what is known.
            with suppress(model.DoesNotExist, DatabaseError):
                row = model.objects.using(alias).get(pk=row.pk)
        send(
            signals.ensure_cleanup_executed,
            task=self._task(row.task),
            command=command,
            cleanup=row,
            server=server,
            reason=row.reason,
        )
        log(
            "abandoned",
            logging.WARNING,
            "cleaned up: %s, the lock of %s since %s",
            row.get_reason_display(),
            row.server,
            short(row.acquired_at),
            task=row.task,
            due=row.due_at,
            server=server,
        )
        self._say(f"{row.task}: freed the lock that {row.server} held since {short(row.acquired_at)} ({row.reason})")

    def _lost(self, task: str, due_at: datetime, server: str, fence: int) -> None:
        send(signals.lease_lost, task=self._task(task), due_at=due_at, fence=fence, server=server)
        log("verbose", logging.WARNING, "lost its lease; its run is being ended", task=task, due=due_at, server=server)

    def _trouble(self, doing: str, error: str, server: str, trace: str = "") -> None:
        logger.error("%s: %s server=%s%s", doing, error, server, f"\n{trace}" if trace else "")

    def _lost_rows(self, lock: str, text: str, count: int, server: str) -> None:
        said = f"the lock {lock!r} has lost what it knew of {count} task{'s' if count != 1 else ''}: {text}"
        logger.error("%s; what was due meanwhile is passed over server=%s", said, server)
        self._say(f"{said}; what was due meanwhile is passed over")

    def _unrecorded(self, task: str, due_at: datetime, text: str, by: str, server: str) -> None:
        logger.error("not recorded: %s task=%s due=%s server=%s", text, task, due_at.isoformat(), by or server)

    def _tripwire(self, task: str, due_at: datetime, text: str, server: str) -> None:
        logger.critical("%s task=%s due=%s server=%s", text, task, due_at.isoformat(), server)


def log(level: str, severity: int, text: str, *args: object, task: str, due: datetime | None, server: str) -> None:
    """Write one line if ``LOG_LEVEL`` is ``level`` or says more, always with the same three fields."""
    if _LEVELS[conf.load().log_level] >= _LEVELS[level]:
        stamp = due.isoformat() if due else "-"
        logger.log(severity, text + " task=%s due=%s server=%s", *args, task, stamp, server)


def send(signal: Any, **arguments: Any) -> None:
    """Send a signal of ours robustly; what a receiver raises is logged with its traceback."""
    for receiver, answer in signal.send_robust(sender=ScheduledTask, **arguments):
        if isinstance(answer, Exception):
            logger.error("the receiver %r of a signal failed", receiver, exc_info=answer)


def log_failure(
    sender: Any, *, task: ScheduledTask | None, run: RunInfo, server: str, status: str, error: str, **rest: Any
) -> None:
    """
    Log a failed run as ERROR with its traceback; connected to ``task_failed`` by the app.

    One that made way for a newer due time did what its declaration says: INFO, at "conflicts".
    """
    if status == "cancelled":
        log(
            "conflicts",
            logging.INFO,
            "cancelled: a newer due time went before it",
            task=run.name,
            due=run.due_at,
            server=server,
        )
        return
    exception = rest.get("exception")
    logger.error(
        "%s%s task=%s due=%s server=%s",
        status.replace("_", " "),
        "" if exception is not None or not error else f": {error}",
        run.name,
        run.due_at.isoformat(),
        server,
        exc_info=exception,
    )


def connect() -> None:
    """Connect our own receivers, once."""
    signals.task_failed.connect(log_failure, dispatch_uid="multiserver_schedule.log_failure")


def summary(tasks: list[ScheduledTask], now: datetime) -> str:
    """Return "3 tasks from shop.schedule; next: shop.send_digests 12:01 (in 40 s)"."""
    modules = sorted({task.module for task in tasks})
    text = f"{len(tasks)} task{'s' if len(tasks) > 1 else ''} from {', '.join(modules)}"
    upcoming = [(due_at, task.name) for task in tasks if (due_at := task.next(now)) is not None]
    if upcoming:
        due_at, name = min(upcoming)
        text += f"; next: {name} {short(due_at)} (in {distance(due_at - now)})"
    return text


def distance(span: timedelta) -> str:
    """Return a span of time in the largest unit that says it well: "40 s", "12 min", "3 h", "2 days"."""
    seconds = max(0, round(span.total_seconds()))
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def short(moment: datetime | None) -> str:
    """Return a moment for people, in UTC, to the second."""
    if moment is None:
        return "-"
    fraction = timedelta(microseconds=moment.microsecond)
    return f"{moment - fraction:%Y-%m-%d %H:%M:%S}Z"


def _run(task: str, due_at: datetime, server: str, *, started_at: str, **more: Any) -> RunInfo:
    return RunInfo(name=task, due_at=due_at, server=server, started_at=datetime.fromisoformat(started_at), **more)


def _time(value: Any) -> Any:
    return datetime.fromisoformat(value) if isinstance(value, str) else value
