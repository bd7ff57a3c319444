"""What is due next, who holds it and how it went: every task that is declared here or known to a store."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

from django.db import DEFAULT_DB_ALIAS, DatabaseError, InterfaceError
from django.db.models import Max
from django.utils import timezone
from django.utils.connection import ConnectionDoesNotExist

from .. import conf
from ..declare import Discovered, discovery, registry
from ..entries import Row, ScheduledTask
from ..history import pause_key
from ..locks.base import BaseLock, Declarations
from ..locks.orm import ORMLock
from ..models import ScheduledRun, ScheduleState
from . import words
from .overdue import not_meant, open_since, servers_seen, starters
from .stores import Known, Refused, away, is_out_of_use, opened, said, server_of, task_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """One line of ``schedule list``: what is declared or known, and how it stands."""

    name: str
    schedule: str
    lock: str
    """The alias of the lock that has it, or shall have it."""
    next_due_at: datetime | None
    state: str
    """ready, running, overdue (nobody has started it), stale (its lease has ended, the next pass frees it), paused, not
    seen yet, not declared, what it is "not meant for", what it waits for, or "unknown: <why its store does not
    answer>"."""
    note: str = ""
    """What else is out of the ordinary."""
    as_of: datetime
    """The store's time when it was looked at; this server's, where the store does not answer."""
    holder: str = ""
    since: datetime | None = None
    until: datetime | None = None
    """When the lease ends, unless it is renewed."""
    held_in: str = ""
    """The alias of the lock that the holder has: another one than ``lock`` while a task is on its way."""
    last_status: str = ""
    last_due_at: datetime | None = None
    last_reason: str = ""
    last_count: int = 1
    """How many due times in a row the last ones are, where they were given up for the same reason."""
    text: str = ""
    paused_at: datetime | None = None
    paused_reason: str = ""
    paused_with_everything: bool = False
    """Is everything in its lock paused? Then these are since when and why."""
    retry_at: datetime | None = None
    """When the last due time is tried again, unless a newer one comes before."""
    attempt: int = 1
    """The one that is owed, with ``retry_at``; else the last one."""
    attempts: int = 1
    """How many there may be."""
    wanted_at: datetime | None = None
    """When somebody asked for a run that has not begun."""
    offset: timedelta = timedelta(0)
    """How much later than its due times it starts (jitter)."""
    overdue_since: datetime | None = None
    """The due time that somebody should have started by now, and nobody has."""
    server_seen_at: datetime | None = None
    """When a server that could start it was last seen: of an overdue task on every server, or on certain ones alone."""
    server_seen: str = ""
    """Which one that was, where it is not the row's."""
    is_meant: bool = True
    """Does any server of this environment start it?"""


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything that is declared here or known to a store, and what could not be found out."""

    lines: tuple[Overview, ...]
    """The soonest due first."""
    troubles: tuple[str, ...]
    """Stores and histories that did not answer, declarations that cannot be read."""
    found: Discovered
    """Where declarations were looked for."""


@dataclass(frozen=True, slots=True)
class Everything:
    """That everything is paused in a lock: since when, as far as it is known, and why."""

    since: datetime | None
    reason: str


def overview() -> Listing:
    """
    Return every task that is declared here or known to a store, as all stores of the settings have it.

    A store that does not answer makes its own tasks unknown, and hides none of the others. No lock is taken, tried or
    waited for.
    """
    settings = conf.load()
    found = discovery.discover(registry, collect=True)
    tasks = registry.completed
    troubles = [str(broken) for broken in found.broken]
    known: dict[str, list[Known]] = {}
    silent: dict[str, str] = {}
    paused: dict[str, Everything] = {}
    seen: dict[str, datetime | None] = {}
    for alias in settings.locks:
        try:
            with opened(settings, alias) as lock:
                now, rows = lock.clock(), lock.rows()
                everything = everything_paused(lock)
                awaited = _awaited(rows, tasks, now, settings.environment)
                for server, at in servers_seen(lock, rows, awaited).items():
                    seen[server] = max(at, seen.get(server) or at)
                if lock.transactional:
                    # A cache does not know which servers there are.
                    seen = {**dict.fromkeys(awaited), **seen}
        except Exception as error:  # whatever a driver raises; the other stores are shown
            silent[alias] = said(error)
            troubles.append(away(alias, error))
            continue
        if everything is not None:
            paused[alias] = everything
        for row in rows:
            known.setdefault(row.task, []).append(Known(alias, row, now))
    last = _last_runs(settings, silent, troubles)
    declared = {task.row_name(settings.server_name): task for task in tasks.values()}
    lines = []
    for name in {**known, **declared}:
        rows_of_it = known.get(name, [])
        task = declared.get(name) or task_of(name, tasks)
        here = [each for each in rows_of_it if not each.row.moved_to]
        left = next((each for each in rows_of_it if each.row.moved_to and each.row.owner is not None), None)
        told = here or ([] if name in declared else rows_of_it)
        shown = [_line(each, task, left, paused, seen, settings) for each in told]
        if not shown:
            shown = [_unseen(name, declared[name], settings, silent, rows_of_it, left, paused)]
        lines += [_with_last_run(line, last.get(name)) for line in shown]
    lines.sort(key=lambda line: (line.next_due_at is None, line.next_due_at or line.as_of, line.name, line.lock))
    return Listing(tuple(lines), tuple(troubles), found)


def everything_paused(lock: BaseLock) -> Everything | None:
    """Tell whether everything is paused in a lock, since when and why; no lock is taken, and nothing is written."""
    in_database = isinstance(lock, ORMLock)
    if not in_database and not lock.look(Declarations(tasks={}, server="", digest="", server_digest="")).paused:
        return None
    key = ScheduleState.PROJECT if in_database else pause_key(lock.alias, "")
    try:
        state = ScheduleState.objects.using(lock.using).filter(key=key, paused_at__isnull=False).first()
    except (DatabaseError, InterfaceError, ConnectionDoesNotExist):
        if in_database:
            raise
        state = None  # that it is paused, the lock itself says
    if state is None:
        return None if in_database else Everything(None, "")
    return Everything(state.paused_at, state.paused_reason)


def _awaited(rows: Sequence[Row], tasks: Mapping[str, ScheduledTask], now: datetime, environment: str) -> set[str]:
    """Return the servers that alone start what is overdue."""
    found: set[str] = set()
    for row in rows:
        task = task_of(row.task, tasks)
        if task is not None and open_since(row, task, now, environment) is not None:
            found.update(starters(row.task, task))
    return found


def _line(
    known: Known,
    task: ScheduledTask | None,
    left: Known | None,
    paused: Mapping[str, Everything],
    seen: Mapping[str, datetime | None],
    settings: conf.Settings,
) -> Overview:
    row = known.row
    held = "" if row.owner is None else "running" if lease_stands(row, known.now) else "stale"
    everything = paused.get(known.alias)
    no_one = not_meant(row.task, task, settings.environment) if task is not None else ""
    overdue = None
    if task is not None and everything is None:
        overdue = open_since(row, task, known.now, settings.environment)
    if overdue is not None:
        state = "overdue"
    elif row.moved_from and not held:
        state = f"waits for the end of its last run in the lock {row.moved_from!r}"
    else:
        out_of_use = "not declared" if task is None else "paused" if row.paused or everything else ""
        state = ", ".join(filter(None, [out_of_use, held])) or no_one or "ready"
    note = f"moved to the lock {row.moved_to!r}" if row.moved_to else ""
    if task is not None and task.lock != known.alias:
        note = f"declared for the lock {task.lock!r}"
    elif task is not None and not row.moved_to and is_out_of_use(row, task):
        note = "taken out of use by `schedule prune --undeclared`"
    if row.cancelled and held:
        note = "; ".join(filter(None, [note, "being ended: its next due time goes first"]))
    last_server, seen_at = "", None
    if task is not None and overdue is not None:
        last_server, seen_at, unseen = _last_of(starters(row.task, task), seen)
        note = "; ".join(filter(None, [note, unseen]))
    line = Overview(
        name=row.task,
        schedule=task.timetable.text if task else "",
        lock=known.alias,
        next_due_at=_next(task, max(known.now, row.since)) if task and row.next_due_at else None,
        state=state,
        note=note,
        as_of=known.now,
        text=task.text if task else "",
        paused_at=row.paused_at,
        paused_reason=row.paused_reason,
        retry_at=row.retry_at,
        attempt=row.attempt,
        attempts=max(row.attempt, 1 + (task.retries if task else 0)),
        wanted_at=row.wanted_at,
        offset=task.offset(row.task) if task else timedelta(0),
        overdue_since=overdue,
        server_seen_at=seen_at,
        server_seen="" if server_of(row.task) else last_server,
        is_meant=not no_one,
    )
    if everything is not None and not row.paused:
        line = _with_everything(line, everything)
    return _with_holder(line, known if row.owner is not None else left)


def _last_of(servers: Sequence[str], seen: Mapping[str, datetime | None]) -> tuple[str, datetime | None, str]:
    """Return which of these servers was seen last, and when; or a note that none of them ever was."""
    told = [(at, server) for server in servers if (at := seen.get(server)) is not None]
    if told:
        at, server = max(told)
        return server, at, ""
    if not servers or not all(server in seen for server in servers):
        return "", None, ""
    return "", None, f"nothing was ever seen of its server{'s' * (len(servers) > 1)} {words.joined(servers)}"


def _unseen(
    name: str,
    task: ScheduledTask,
    settings: conf.Settings,
    silent: Mapping[str, str],
    rows: Sequence[Known],
    left: Known | None,
    paused: Mapping[str, Everything],
) -> Overview:
    """Return the line of a task that the lock that it is declared for does not have, or does not tell of."""
    now = rows[0].now if rows else timezone.now()
    no_one = not_meant(name, task, settings.environment)
    if task.lock in silent:
        state = f"unknown: {silent[task.lock]}"
    elif rows:
        state = f"moved to the lock {rows[0].row.moved_to!r}, which does not have it"
        if rows[0].row.moved_to in silent:
            state = f"unknown: {silent[rows[0].row.moved_to]}"
    else:
        state = no_one or "not seen yet"
    line = Overview(
        name=name,
        schedule=task.timetable.text,
        lock=task.lock,
        next_due_at=_next(task, now),
        state=state,
        as_of=now,
        text=task.text,
        attempts=1 + task.retries,
        offset=task.offset(name),
        is_meant=not no_one,
    )
    if state == "not seen yet" and task.lock in paused:
        line = _with_everything(line, paused[task.lock])
    return _with_holder(line, left)


def _with_everything(line: Overview, everything: Everything) -> Overview:
    return replace(line, paused_at=everything.since, paused_reason=everything.reason, paused_with_everything=True)


def _with_holder(line: Overview, known: Known | None) -> Overview:
    if known is None:
        return line
    row = known.row
    return replace(line, holder=row.server, since=row.acquired_at, until=row.expires_at, held_in=known.alias)


def _with_last_run(line: Overview, last: ScheduledRun | None) -> Overview:
    if last is None:
        return line
    return replace(
        line, last_status=last.status, last_due_at=last.due_at, last_reason=last.reason, last_count=last.count
    )


def _next(task: ScheduledTask, after: datetime) -> datetime | None:
    try:
        return task.next(after)
    except ValueError:  # a zone that this machine does not have: `schedule check` says it
        return None


def lease_stands(row: Row, now: datetime) -> bool:
    """Has the lease of this row's holder not ended?"""
    return row.expires_at is not None and row.expires_at > now


def _last_runs(settings: conf.Settings, silent: Mapping[str, str], troubles: list[str]) -> dict[str, ScheduledRun]:
    found: dict[str, ScheduledRun] = {}
    asked = set()
    for alias, chosen in settings.locks.items():
        using = str(chosen.options.get("using", DEFAULT_DB_ALIAS))
        if using in asked or (alias in silent and chosen.backend == conf.ORM_LOCK):
            continue
        asked.add(using)
        try:
            runs = ScheduledRun.objects.using(using).defer("output", "error")
            newest = runs.order_by().values("task").annotate(newest=Max("pk")).values("newest")
            found.update({run.task: run for run in runs.filter(pk__in=newest)})
        except (DatabaseError, InterfaceError, ConnectionDoesNotExist) as error:
            troubles.append(f"The history in the database {using!r} cannot be read: {said(error)}")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ByHand:
    """A run that was asked for, as the history has it."""

    name: str
    status: str
    reason: str
    error: str
    server: str
    started_at: datetime | None
    finished_at: datetime | None


def run_by_hand(name: str, owner: str) -> ByHand:
    """
    Return how a run of a declared task went that somebody asked for: the one that this owner had.

    Raises Refused where the history cannot be read, or does not have it.
    """
    settings = conf.load()
    task = registry.completed[name]
    using = str(settings.locks[task.lock].options.get("using", DEFAULT_DB_ALIAS))
    runs = ScheduledRun.objects.using(using).filter(task=task.row_name(settings.server_name), owner=owner)
    try:
        run = runs.order_by("-pk").first()
    except (DatabaseError, InterfaceError) as error:
        raise Refused(f"{name} has run, but how that went cannot be read: {said(error)}.") from error
    if run is None:
        raise Refused(f"{name} has run, but the history does not have that run. The log says how it went.")
    return ByHand(
        name=run.task,
        status=run.status,
        reason=run.reason,
        error=run.error,
        server=run.server,
        started_at=run.started_at,
        finished_at=run.finished_at,
    )


# -- the next due times of all tasks ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Coming:
    """Something that a server will start, as far as it is known now."""

    at: datetime
    """When: the due time with its jitter, or the moment from which a retry or a wanted run is started."""
    name: str
    kind: Literal["due", "retry", "wanted"]
    due_at: datetime
    paused: bool
    text: str
    """What is to be said of it: "attempt 2 of 4", "asked for by hand", "starts 7 s later"."""


def timeline(listing: Listing, count: int) -> list[Coming]:
    """Return the next ``count`` due times of all tasks of a listing, and what is owed, in one order of time."""
    tasks = registry.completed
    coming: list[Iterator[tuple[datetime, str, Coming]]] = [iter(sorted(_owed(listing)))]
    for line in listing.lines:
        task = task_of(line.name, tasks)
        if task is not None and line.next_due_at is not None and line.is_meant:
            coming.append(_due_times(line, task.next))
    merged = heapq.merge(*coming, key=lambda each: each[:2])
    return [each for _, (_, _, each) in zip(range(count), merged, strict=False)]


def _owed(listing: Listing) -> Iterator[tuple[datetime, str, Coming]]:
    for line in listing.lines:
        paused = "paused" in line.state
        if line.retry_at is not None:
            due_at = line.last_due_at or line.retry_at
            text = f"attempt {line.attempt} of {line.attempts}"
            at = max(line.retry_at, line.as_of)
            yield at, line.name, Coming(at=at, name=line.name, kind="retry", due_at=due_at, paused=paused, text=text)
        if line.wanted_at is not None:
            yield (
                line.as_of,
                line.name,
                Coming(
                    at=line.as_of,
                    name=line.name,
                    kind="wanted",
                    due_at=line.wanted_at,
                    paused=paused,
                    text="asked for by hand",
                ),
            )


def _due_times(
    line: Overview, following: Callable[[datetime], datetime | None]
) -> Iterator[tuple[datetime, str, Coming]]:
    due_at = line.next_due_at
    while due_at is not None:
        at = due_at + line.offset
        yield (
            at,
            line.name,
            Coming(at=at, name=line.name, kind="due", due_at=due_at, paused="paused" in line.state, text=""),
        )
        try:
            due_at = following(due_at)
        except ValueError:
            return
