"""The verbs of the people who use it and are on call for it: the commands and the admin call the same functions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import TextIO

from django.db import DEFAULT_DB_ALIAS, DatabaseError, InterfaceError
from django.db.models import Max
from django.utils import timezone
from django.utils.connection import ConnectionDoesNotExist
from django.utils.module_loading import import_string

from . import conf, logs
from .declare import Discovered, discovery, registry
from .entries import Cleanup, Row, ScheduledTask
from .exceptions import ScheduleError, UnsafeTransaction
from .history import Afterwards, History
from .locks.base import BaseLock
from .models import ScheduledRun


class UnlockRefused(ScheduleError):
    """This lock was not freed by hand; the message says who holds it, or why nobody does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """One line of ``schedule list``: what is declared or known, and how it stands."""

    name: str
    schedule: str
    lock: str
    """The alias of the lock that has it, or shall have it."""
    next_due_at: datetime | None
    state: str
    """ready, running, stale (its lease has ended, the next pass frees it), paused, not seen yet, not declared, what it
    waits for, or "unknown: <why its store does not answer>"."""
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
    text: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything that is declared here or known to a store, and what could not be found out."""

    lines: tuple[Overview, ...]
    """The soonest due first."""
    troubles: tuple[str, ...]
    """Stores and histories that did not answer, declarations that cannot be read."""
    found: Discovered


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds the lock of a row, as its store says."""

    name: str
    lock: str
    owner: str
    server: str
    since: datetime | None
    renewed_at: datetime | None
    until: datetime | None
    as_of: datetime
    looks_alive: bool
    """Has it renewed within two heartbeats? Its lease is not over then, either."""


@dataclass(frozen=True, slots=True)
class Released:
    """A lock that was freed by hand."""

    holder: Holder
    cleanup: Cleanup
    unrecorded: str = ""
    """Why the clean-up is not in the database, where the store keeps it until a pass records it; else ""."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A row, and the store that it is in."""

    alias: str
    row: Row
    now: datetime


# -- list -------------------------------------------------------------------------------------------------------------


def overview() -> Listing:
    """
    Return every task that is declared here or known to a store, as all stores of the settings have it.

    A store that does not answer makes its own tasks unknown, and hides none of the others.
    """
    settings = conf.load()
    found = discovery.discover(registry, collect=True)
    tasks = registry.completed
    troubles = [f"{broken.module} cannot be read: {broken.error}" for broken in found.broken]
    known: dict[str, list[_Known]] = {}
    away: dict[str, str] = {}
    for alias in settings.locks:
        try:
            with _opened(settings, alias) as lock:
                now, rows = lock.clock(), lock.rows()
        except Exception as error:  # whatever a driver raises; the other stores are shown
            away[alias] = _said(error)
            troubles.append(f"The lock {alias!r} does not answer: {away[alias]}")
            continue
        for row in rows:
            known.setdefault(row.task, []).append(_Known(alias, row, now))
    last = _last_runs(settings, away, troubles)
    declared = {task.row_name(settings.server_name): task for task in tasks.values()}
    lines = []
    for name in {**known, **declared}:
        rows_of_it = known.get(name, [])
        task = declared.get(name) or _task_of(name, tasks)
        here = [each for each in rows_of_it if not each.row.moved_to]
        left = next((each for each in rows_of_it if each.row.moved_to and each.row.owner is not None), None)
        shown = [_line(each, task, left) for each in here or ([] if name in declared else rows_of_it)]
        if not shown:
            shown = [_unseen(name, declared[name], settings, away, rows_of_it, left)]
        lines += [_with_last_run(line, last.get(name)) for line in shown]
    lines.sort(key=lambda line: (line.next_due_at is None, line.next_due_at or line.as_of, line.name, line.lock))
    return Listing(tuple(lines), tuple(troubles), found)


def _line(known: _Known, task: ScheduledTask | None, left: _Known | None) -> Overview:
    row = known.row
    held = "" if row.owner is None else "running" if _lease_stands(row, known.now) else "stale"
    if row.moved_from and not held:
        state = f"waits for the end of its last run in the lock {row.moved_from!r}"
    else:
        out_of_use = "not declared" if task is None else "paused" if row.paused else ""
        state = ", ".join(filter(None, [out_of_use, held])) or "ready"
    note = f"moved to the lock {row.moved_to!r}" if row.moved_to else ""
    if task is not None and task.lock != known.alias:
        note = f"declared for the lock {task.lock!r}"
    return _with_holder(
        Overview(
            name=row.task,
            schedule=task.timetable.text if task else "",
            lock=known.alias,
            next_due_at=task.next(max(known.now, row.since)) if task and row.next_due_at else None,
            state=state,
            note=note,
            as_of=known.now,
            text=task.text if task else "",
        ),
        known if row.owner is not None else left,
    )


def _unseen(
    name: str,
    task: ScheduledTask,
    settings: conf.Settings,
    away: Mapping[str, str],
    rows: Sequence[_Known],
    left: _Known | None,
) -> Overview:
    """Return the line of a task that the lock that it is declared for does not have, or does not tell of."""
    now = rows[0].now if rows else timezone.now()
    if task.lock in away:
        state = f"unknown: {away[task.lock]}"
    elif rows:
        state = f"moved to the lock {rows[0].row.moved_to!r}, which does not have it"
        if rows[0].row.moved_to in away:
            state = f"unknown: {away[rows[0].row.moved_to]}"
    else:
        state = "not seen yet"
    return _with_holder(
        Overview(
            name=name,
            schedule=task.timetable.text,
            lock=task.lock,
            next_due_at=task.next(now),
            state=state,
            as_of=now,
            text=task.text,
        ),
        left,
    )


def _with_holder(line: Overview, known: _Known | None) -> Overview:
    if known is None:
        return line
    row = known.row
    return replace(line, holder=row.server, since=row.acquired_at, until=row.expires_at, held_in=known.alias)


def _with_last_run(line: Overview, last: ScheduledRun | None) -> Overview:
    if last is None:
        return line
    return replace(line, last_status=last.status, last_due_at=last.due_at, last_reason=last.reason)


def _task_of(name: str, tasks: Mapping[str, ScheduledTask]) -> ScheduledTask | None:
    """Return the task that has a row of this name, on whichever server."""
    bare, at, _ = name.partition("@")
    task = tasks.get(bare)
    return task if task is not None and task.on_every_server == bool(at) else None


def _last_runs(settings: conf.Settings, away: Mapping[str, str], troubles: list[str]) -> dict[str, ScheduledRun]:
    found: dict[str, ScheduledRun] = {}
    asked = set()
    for alias, chosen in settings.locks.items():
        using = str(chosen.options.get("using", DEFAULT_DB_ALIAS))
        if using in asked or (alias in away and chosen.backend == conf.ORM_LOCK):
            continue
        asked.add(using)
        try:
            runs = ScheduledRun.objects.using(using).defer("output", "error")
            newest = runs.order_by().values("task").annotate(newest=Max("pk")).values("newest")
            found.update({run.task: run for run in runs.filter(pk__in=newest)})
        except (DatabaseError, InterfaceError, ConnectionDoesNotExist) as error:
            troubles.append(f"The history in the database {using!r} cannot be read: {_said(error)}")
    return found


# -- unlock -----------------------------------------------------------------------------------------------------------


def holder(name: str, *, lock: str = "") -> Holder:
    """
    Return who holds the lock of this row: the task's name, or ``task@server``.

    ``lock`` is the alias to ask, where more than one has it. Raises UnlockRefused where nobody holds it, where the name
    is not known, or where a store that may know does not answer.
    """
    settings = conf.load()
    return _holder(settings, _declared(), name, lock)


def unlock(
    name: str,
    *,
    lock: str = "",
    owner: str = "",
    force: bool = False,
    verbosity: int = 0,
    stdout: TextIO | None = None,
) -> Released:
    """
    Free a lock by hand, in whichever store it is, and leave the trace of a clean-up.

    Refused while the holder looks alive, unless by ``force``: its server learns at its next renewal that the lease is
    lost, and ends the run; another server may start the task before that. The due time that it ran is not run again.
    ``owner`` is the claim that whoever asks has seen: another one is not freed in its place.
    """
    settings = conf.load()
    tasks = _declared()
    held = _holder(settings, tasks, name, lock)
    if owner and held.owner != owner:
        raise UnlockRefused(
            f"{name} is not held by the run that you saw any more: {_who(held)}. Look again before you free it."
        )
    if held.looks_alive and not force:
        raise UnlockRefused(
            f"{name} is {_who(held)}, and that server looks alive: it renewed the lease at {_at(held.renewed_at)}, "
            f"which holds until {_at(held.until)}. Wait for the end of the run, or free the lock by force."
        )
    with _opened(settings, held.lock, name) as store:
        history = History(store.using) if store.transactional else Afterwards(store.using)
        cleanup = store.free(name, owner=held.owner, server=settings.server_name, record=history.cleaned)
        trouble = history.take_trouble()
    if cleanup is None:
        raise UnlockRefused(f"{name} is not {_who(held)} any more: it was freed meanwhile. Look again.")
    task = _task_of(cleanup.task, tasks)
    tell = logs.Teller(tasks=lambda: tasks, verbosity=verbosity, stdout=stdout)
    tell(
        {
            "kind": "cleaned",
            "cleanup": asdict(cleanup),
            "command": task.text if task else cleanup.task,
            "alias": history.using,
            "server": settings.server_name,
        }
    )
    return Released(held, cleanup, trouble if cleanup.pk is None else "")


def _holder(settings: conf.Settings, tasks: Mapping[str, ScheduledTask], name: str, lock: str) -> Holder:
    if lock and lock not in settings.locks:
        raise UnlockRefused(f"There is no lock {lock!r}. Locks are: {', '.join(sorted(settings.locks))}.")
    held: list[Holder] = []
    away: dict[str, str] = {}
    is_known = False
    for alias in [lock] if lock else settings.locks:
        try:
            with _opened(settings, alias, name) as store:
                rows = store.rows([name])
                now = store.clock() if rows else None
        except UnlockRefused as refused:
            away[alias] = str(refused)
            continue
        for row in rows:
            is_known = True
            if now is not None and row.owner is not None:
                held.append(_holder_of(row, alias, now, settings))
    if len(held) > 1:
        where = " and ".join(repr(each.lock) for each in held)
        raise UnlockRefused(f"{name} is held in the locks {where}. Say which one is meant.")
    if held:
        return held[0]
    if away:
        raise UnlockRefused(" ".join(away.values()))
    if is_known or name in {task.row_name(settings.server_name) for task in tasks.values()}:
        raise UnlockRefused(f"Nobody holds the lock of {name}: there is nothing to free.")
    raise UnlockRefused(_unknown(name, settings, tasks))


def _holder_of(row: Row, alias: str, now: datetime, settings: conf.Settings) -> Holder:
    alive = False
    if row.renewed_at is not None and row.expires_at is not None:
        # As the keeper has it: a short lease is renewed more often. Two of them are less than any lease.
        heartbeat = min(settings.heartbeat, (row.expires_at - row.renewed_at) / 3)
        alive = now - row.renewed_at <= 2 * heartbeat
    return Holder(
        name=row.task,
        lock=alias,
        owner=row.owner or "",
        server=row.server,
        since=row.acquired_at,
        renewed_at=row.renewed_at,
        until=row.expires_at,
        as_of=now,
        looks_alive=alive,
    )


def _unknown(name: str, settings: conf.Settings, tasks: Mapping[str, ScheduledTask]) -> str:
    """Say which name may be meant; rows that nobody declares any more are known, too."""
    known = {task.row_name(settings.server_name) for task in tasks.values()}
    for alias in settings.locks:
        with suppress(UnlockRefused), _opened(settings, alias, name) as store:
            known.update(row.task for row in store.rows())
    of_servers = sorted(each for each in known if each.startswith(f"{name}@"))
    if of_servers:
        return f"{name} has a lock for each server. Name one of them: {', '.join(of_servers[:5])}."
    return f"No task is named {name!r}.{nearest(name, known)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: what was probably meant, or where to look."""
    by_case = {each.casefold(): each for each in known}
    close = difflib.get_close_matches(name.casefold(), by_case, n=1)
    return f" Did you mean {by_case[close[0]]}?" if close else " `manage.py schedule list` shows them all."


# -- what both need ---------------------------------------------------------------------------------------------------


def _declared() -> Mapping[str, ScheduledTask]:
    """Discover, and return what is sound: a schedule.py that is broken stops nobody from freeing a lock."""
    discovery.discover(registry, collect=True)
    return registry.completed


@contextmanager
def _opened(settings: conf.Settings, alias: str, about: str = "") -> Iterator[BaseLock]:
    """Lend a lock. With ``about``, the name of a row, what its store raises becomes UnlockRefused."""
    chosen = settings.locks[alias]
    try:
        lock: BaseLock = import_string(chosen.backend)(alias, chosen.options)
        try:
            yield lock
        finally:
            if not lock.transactional:
                # The connection of a lock in the database is the caller's, too.
                lock.close()
    except (UnlockRefused, UnsafeTransaction):
        raise
    except Exception as error:
        if not about:
            raise
        raise UnlockRefused(
            f"The lock {alias!r} does not answer: {_said(error)}. Whether somebody holds {about} in it is not known; "
            "try again when it is back."
        ) from error


def _lease_stands(row: Row, now: datetime) -> bool:
    return row.expires_at is not None and row.expires_at > now


def _who(held: Holder) -> str:
    return f"held by {held.server} since {_at(held.since)}"


def _at(moment: datetime | None) -> str:
    return logs.short(moment)


def _said(error: Exception) -> str:
    """Return an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": .")
