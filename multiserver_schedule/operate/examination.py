"""Is everything as it should be here? Each lock's store, its clock and its rows, the declarations, the history."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal

from django.db import DEFAULT_DB_ALIAS, transaction

from .. import conf
from ..database import lacks_table
from ..declare import discovery, registry, verify
from ..due import is_meant_for
from ..entries import Row, ScheduledTask
from ..exceptions import ConfigurationError, ScheduleError
from ..locks.base import BaseLock
from ..models import ScheduledRun, ScheduleState
from .clocks import left_behind, measured
from .listing import Everything, everything_paused
from .overdue import is_unfreed, open_since, servers_seen, starters
from .stores import OUR_OWN, declarations, has_refused, is_out_of_use, opened, said, server_of, some, task_of

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    about: str
    """The server, the declarations, a lock, a history."""
    text: str


def examine() -> list[Finding]:
    """
    Look at everything that a server needs to do its part.

    Written is what any look writes, that this version was seen, and a row of each history, which is taken back.
    """
    try:
        settings = conf.load()
        found = discovery.discover(registry, collect=True)
    except ScheduleError as error:
        return [Finding("problem", "settings", str(error))]
    tasks = registry.completed
    findings = [*_server(settings, tasks), *_declarations(found, tasks)]
    maintenance, said_of_it = _maintenance(settings, tasks)
    findings += said_of_it
    # Who is not started on purpose is not overdue.
    startable = {name: task for name, task in tasks.items() if task.even_in_maintenance_mode or not maintenance}
    for alias in settings.locks:
        findings += _lock(alias, settings, tasks, startable, all_is_read=not found.broken)
    for using in dict.fromkeys(str(each.options.get("using", DEFAULT_DB_ALIAS)) for each in settings.locks.values()):
        findings.append(_history(using))
    return findings


def _server(settings: conf.Settings, tasks: Mapping[str, ScheduledTask]) -> Iterator[Finding]:
    where = f"environment {settings.environment!r}" if settings.environment else "no ENVIRONMENT"
    meant = sum(
        is_meant_for(task, server=settings.server_name, environment=settings.environment) for task in tasks.values()
    )
    yield Finding("ok", "server", f"this is {settings.server_name}, {where}: meant for {meant} of {len(tasks)} task(s)")


def in_maintenance() -> str:
    """Say that the project is in maintenance mode, and what is started all the same; "" where it is not."""
    _, findings = _maintenance(conf.load(), registry.completed)
    return findings[0].text if findings else ""


def _maintenance(settings: conf.Settings, tasks: Mapping[str, ScheduledTask]) -> tuple[bool, list[Finding]]:
    try:
        is_on = conf.is_in_maintenance(settings.maintenance_mode)
    except ConfigurationError as error:
        return False, [Finding("problem", "server", str(error))]
    except Exception as error:  # the project's own
        return False, [Finding("problem", "server", f"MAINTENANCE_MODE cannot be asked: {said(error)}")]
    if not is_on:
        return False, []
    left = sorted(task.name for task in tasks.values() if task.even_in_maintenance_mode)
    started = f"only {some(left)} {'is' if len(left) == 1 else 'are'} started" if left else "nothing is started"
    text = f"the project is in maintenance mode (MAINTENANCE_MODE): {started} by schedule"
    return True, [Finding("warning", "server", text)]


def _declarations(found: discovery.Discovered, tasks: Mapping[str, ScheduledTask]) -> Iterator[Finding]:
    for broken in found.broken:
        yield Finding("problem", "declarations", str(broken))
    problems = 0
    for task in tasks.values():
        for problem in verify(task):
            problems += 1
            yield Finding("problem", "declarations", f"{task.file}:{task.line}: {task.name}: {problem}")
    if not tasks and not found.broken:
        yield Finding("warning", "declarations", f"no task is declared; searched: {', '.join(found.searched)}")
    elif not problems and not found.broken:
        yield Finding("ok", "declarations", f"{len(tasks)} task(s) from {len(found.found)} module(s), all can be run")


def _lock(
    alias: str,
    settings: conf.Settings,
    tasks: Mapping[str, ScheduledTask],
    startable: Mapping[str, ScheduledTask],
    *,
    all_is_read: bool,
) -> Iterator[Finding]:
    about = f"lock {alias!r}"
    found: list[Finding] = []
    try:
        with opened(settings, alias) as lock:
            found += _clock(lock, about)
            rows, now = lock.rows(), lock.clock()
            found += _rows(lock, about, rows, now, tasks, settings, all_is_read=all_is_read)
            everything = everything_paused(lock)
            found += _left_undone(lock, about, rows, now, startable if everything is None else {}, settings)
            found += _paused(about, everything)
            if lock.transactional:
                _try_to_write(lock.using)
    except Exception as error:  # whatever a driver raises
        what = "answers, but refuses" if has_refused(error) else "does not answer"
        text = said(error) if lacks_table(error) else f"{what}: {said(error)}"
        # What is not there as a whole is not fine in parts.
        found = [*(each for each in found if each.level != "ok"), Finding("problem", about, text)]
    yield from found


def _try_to_write(using: str) -> None:
    """Write nothing, by a statement that a database that is read-only refuses all the same."""
    with transaction.atomic(using=using):
        ScheduleState.objects.using(using).filter(key="multiserver_schedule.check").update(row="")


def _paused(about: str, everything: Everything | None) -> Iterator[Finding]:
    if everything is not None:
        because = f" ({everything.reason})" if everything.reason else ""
        yield Finding("warning", about, f"everything is paused{because}")


def _clock(lock: BaseLock, about: str) -> Iterator[Finding]:
    clock = measured(lock)
    text = f"answers in {clock.trip.total_seconds() * 1000:.1f} ms; {clock.said}"
    if clock.is_off:
        yield Finding(
            "problem",
            about,
            f"{text}: due times follow the store's clock, cron starts by the server's. Synchronise both (NTP)",
        )
    else:
        yield Finding("ok", about, text)


def _rows(
    lock: BaseLock,
    about: str,
    rows: Sequence[Row],
    now: datetime,
    tasks: Mapping[str, ScheduledTask],
    settings: conf.Settings,
    *,
    all_is_read: bool,
) -> Iterator[Finding]:
    mine = {name: task for name, task in tasks.items() if task.lock == lock.alias}
    wanted = {task.row_name(settings.server_name): task for task in mine.values()}
    there = {row.task: row for row in rows if not row.moved_to}
    missing = sorted(set(wanted) - set(there))
    others = sorted(
        name for name, task in wanted.items() if name in there and there[name].fingerprint != task.fingerprint
    )
    retired = sorted(name for name, task in wanted.items() if name in there and is_out_of_use(there[name], task))
    unused = sorted(
        row.task for row in there.values() if row.next_due_at is not None and task_of(row.task, tasks) is None
    )
    if not settings.housekeeping:
        unused = [name for name in unused if name != OUR_OWN]
    look = lock.look(declarations(lock.alias, tasks, settings.server_name))
    text = f"{len(wanted) - len(missing)} of {len(wanted)} declared task(s) registered"
    if missing:
        yield Finding("warning", about, f"{text}; the next pass registers {some(missing)}")
    else:
        yield Finding("ok", about, text)
    if others:
        yield Finding(
            "warning",
            about,
            f"another version of the project holds the schedule of {some(others)}: this server leaves "
            f"{'it' if len(others) == 1 else 'them'} alone",
        )
    elif look.known and wanted:
        yield Finding("ok", about, "this version of the project is the newest")
    elif wanted and not missing and not retired:
        yield Finding("warning", about, "this version of the project is new to it: the next pass registers it")
    if retired:
        them = "it" if len(retired) == 1 else "them"
        yield Finding(
            "warning",
            about,
            f"taken out of use, though declared: {some(retired)}; the next pass takes {them} up again, unless a newer "
            f"version of the project is in use, which does not declare {them}",
        )
    if unused and all_is_read:
        yield Finding(
            "warning",
            about,
            f"not declared in this version: {some(unused)}; `schedule prune --undeclared` retires "
            f"{'it' if len(unused) == 1 else 'them'}",
        )
    elif unused:
        yield Finding("warning", about, f"not declared in what can be read: {some(unused)}")
    for level, said_of_it in left_behind(rows, look.interrupted_at, now, tasks, settings):
        yield Finding(level, about, said_of_it)


def _left_undone(
    lock: BaseLock,
    about: str,
    rows: Sequence[Row],
    now: datetime,
    startable: Mapping[str, ScheduledTask],
    settings: conf.Settings,
) -> Iterator[Finding]:
    """Tell of what a server that looks would have done by now."""
    unfreed = sum(is_unfreed(row, now) for row in rows)
    if unfreed:
        have, them = ("1 lease has", "it") if unfreed == 1 else (f"{unfreed} leases have", "them")
        text = f"{have} ended and nobody frees {them}: no pass or service looks at the {about}"
        yield Finding("warning", about, text)
    late: dict[str, datetime] = {}
    only: dict[str, tuple[str, ...]] = {}
    for row in rows:
        task = task_of(row.task, startable)
        due_at = open_since(row, task, now, settings.environment) if task is not None else None
        if task is not None and due_at is not None:
            late[row.task] = due_at
            only[row.task] = starters(row.task, task)
    shared = sorted(name for name in late if not only[name])
    if shared:
        since = min(late[name] for name in shared)
        one = len(shared) == 1
        are, meant = ("1 due time is", "this task is") if one else (f"{len(shared)} due times are", "these tasks are")
        yield Finding(
            "warning",
            about,
            f"{are} open since {_at(since)} ({some(shared)}): is runschedule running, on a server that {meant} meant "
            "for?",
        )
    seen = servers_seen(lock, rows, {server for servers in only.values() for server in servers})
    certain = sorted(name for name in late if only[name] and not server_of(name))
    if certain:
        since = min(late[name] for name in certain)
        are = "1 due time is" if len(certain) == 1 else f"{len(certain)} due times are"
        places = [
            _with_when(server, seen, lock) for server in sorted({each for name in certain for each in only[name]})
        ]
        yield Finding(
            "warning",
            about,
            f"{are} open since {_at(since)} ({some(certain)}), only on {some(places)}: is runschedule running there?",
        )
    own = {server_of(name) for name in late} - {""}
    if there := [_with_when(server, seen, lock) for server in sorted(seen) if server in own]:
        yield Finding(
            "warning",
            about,
            f"due times of tasks on every server are open on {some(there)}: is runschedule running there? Of a "
            "server that is gone for good, housekeeping takes the rows",
        )


def _with_when(server: str, seen: Mapping[str, datetime], lock: BaseLock) -> str:
    """Return the name of a server with when it was last seen; a cache does not know which servers there are."""
    if server in seen:
        return f"{server} (last seen {_at(seen[server])})"
    return f"{server} (never seen)" if lock.transactional else server


def _at(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%SZ}"


def _history(using: str) -> Finding:
    about = f"history in {using!r}"
    try:
        with transaction.atomic(using=using):
            now = datetime.now(timezone.utc)
            ScheduledRun.objects.using(using).create(task="multiserver_schedule.check", due_at=now, finished_at=now)
            transaction.set_rollback(True, using=using)
        count = ScheduledRun.objects.using(using).count()
    except Exception as error:  # whatever a driver raises
        return Finding("problem", about, f"cannot be written: {said(error)}")
    return Finding("ok", about, f"can be written; {count:,} run(s) on record")
