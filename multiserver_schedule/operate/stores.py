"""What all verbs need: the stores of the settings, what is declared, which row is of which task, and clear refusals."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from django.utils.module_loading import import_string

from .. import conf
from ..database import MIGRATE, lacks_table, refuses
from ..declare import Discovered, discovery, registry
from ..entries import Row, ScheduledTask
from ..exceptions import ScheduleError, StoreRefused, StoreTimeout
from ..history import Afterwards, History
from ..locks.base import BaseLock, Declarations
from ..locks.versions import needs_step

OUR_OWN: Final = "multiserver_schedule.prune"
"""The task of our own, which is not declared with HOUSEKEEPING off."""


class Refused(ScheduleError):
    """This was not done; the message says why, and what to write or to do instead."""

    is_usage: bool = False
    """Does it make no sense, however things stand? Then the exit status is that of wrong options."""


class Misused(Refused):
    """What was asked for makes no sense, however things stand."""

    is_usage = True


@dataclass(frozen=True, slots=True)
class Known:
    """A row, and the store that it is in."""

    alias: str
    row: Row
    now: datetime


def declared() -> Mapping[str, ScheduledTask]:
    """Discover, and return what is sound: a schedule.py that is broken stops nobody from steering the others."""
    discovery.discover(registry, collect=True)
    return registry.completed


def sound() -> Discovered:
    """Discover for what runs tasks here. Raises Refused where a schedule.py is broken, as no pass would start then."""
    found = discovery.discover(registry, collect=True)
    if wrong := all_unreadable(found):
        raise Refused(wrong)
    return found


def declarations(alias: str, tasks: Mapping[str, ScheduledTask], server: str) -> Declarations:
    """Return what this version declares for one lock, as that lock wants to hear it."""
    locked = {name: task for name, task in tasks.items() if task.lock == alias}
    digest, server_digest = registry.digests(server, locked)
    return Declarations(tasks=locked, server=server, digest=digest, server_digest=server_digest)


@contextmanager
def opened(settings: conf.Settings, alias: str) -> Iterator[BaseLock]:
    """Lend a lock, and close it where it is ours to close."""
    chosen = settings.locks[alias]
    lock: BaseLock = import_string(chosen.backend)(alias, chosen.options)
    try:
        yield lock
    finally:
        if not lock.transactional:
            # The connection of a lock in the database is the caller's, too.
            lock.close()


@contextmanager
def reached(settings: conf.Settings, alias: str) -> Iterator[BaseLock]:
    """Lend a lock; what its store raises becomes Refused."""
    try:
        with opened(settings, alias) as lock:
            yield lock
    except Exception as error:  # whatever a driver raises
        if isinstance(error, ScheduleError) and not isinstance(error, StoreTimeout | StoreRefused):
            raise
        raise Refused(f"{away(alias, error)}{again(error)}.") from error


def history_of(lock: BaseLock) -> History:
    """Return the history of what is locked there, which for a lock outside the database is written after the fact."""
    return History(lock.using) if lock.transactional else Afterwards(lock.using)


def task_of(row: str, tasks: Mapping[str, ScheduledTask]) -> ScheduledTask | None:
    """Return the task that has a row of this name, on whichever server."""
    bare, at, _ = row.partition("@")
    task = tasks.get(bare)
    return task if task is not None and task.on_every_server == bool(at) else None


def is_out_of_use(row: Row, task: ScheduledTask) -> bool:
    """Was this row retired, although its task is declared here and has due times to come?"""
    return row.next_due_at is None and row.fingerprint == task.fingerprint and needs_step(row, task)


def chosen_locks(settings: conf.Settings, lock: str) -> Sequence[str]:
    """Return the alias that was asked for, or all. Raises Refused where there is no such lock."""
    if lock and lock not in settings.locks:
        raise Misused(f"There is no lock {lock!r}. Locks are: {', '.join(sorted(settings.locks))}.")
    return [lock] if lock else list(settings.locks)


def in_another(name: str, lock: str, settings: conf.Settings, tasks: Mapping[str, ScheduledTask]) -> str:
    """Say which lock this task is in, or is declared for, other than the one that was asked for; "" where in none."""
    task = task_of(name, tasks) or tasks.get(name)
    found = "" if task is None or task.lock == lock else task.lock
    for alias in settings.locks if not found else ():
        if alias != lock:
            # One that is away is of no help here, and has nothing to do with what was asked.
            with suppress(Exception), opened(settings, alias) as store:
                if any(is_of(row.task, name) and not row.moved_to for row in store.rows()):
                    found = alias
    return f"{name} is in the lock {found!r}, not in {lock!r}. Name that one, or none." if found else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: what was probably meant, or where to look."""
    by_case = {each.casefold(): each for each in known}
    bare = name.casefold().partition("@")[0]
    close = [bare] if bare in by_case else difflib.get_close_matches(name.casefold(), by_case, n=1)
    return f" Did you mean {by_case[close[0]]}?" if close else " `manage.py schedule list` shows them all."


def unknown(name: str, known: Iterable[str]) -> str:
    """Say that there is no such task, and which one may be meant."""
    return f"No task is named {name!r}.{nearest(name, known)}"


def some(names: Sequence[str]) -> str:
    """Return the first three of these names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def server_of(row: str) -> str:
    """Return the server that a row of this name is of; "" where it is one for all."""
    return row.partition("@")[2]


def last_seen(row: Row) -> datetime:
    """Return the last moment at which somebody did something to this row."""
    moments = (row.last_due_at, row.schedule_since, row.acquired_at, row.renewed_at)
    return max(moment for moment in moments if moment is not None)


def is_of(row: str, name: str) -> bool:
    """Is this row the one that was named, or one of the rows of the task that was (one for each server)?"""
    return row == name or row.partition("@")[0] == name


def all_unreadable(found: Discovered) -> str:
    """Say which declarations cannot be read, in sentences; "" where all can."""
    return " ".join(f"{broken}." for broken in found.broken)


def said(error: BaseException) -> str:
    """Return an error in one line, with what is to be done where that is known."""
    return f"{_bare(error)}. {MIGRATE}" if lacks_table(error) else _bare(error)


def away(alias: str, error: BaseException) -> str:
    """Say that a store does not answer, that it refuses what it was asked, or that its tables are not there."""
    if lacks_table(error):
        return f"The lock {alias!r} lacks a table. {MIGRATE} ({_bare(error)})"
    if has_refused(error):
        return f"The lock {alias!r} answers, but refuses: {_bare(error)}"
    return f"The lock {alias!r} does not answer: {_bare(error)}"


def again(*errors: BaseException) -> str:
    """Return the end of a sentence about stores that are away: what does not come back by itself is not waited for."""
    is_there = all(lacks_table(error) or has_refused(error) for error in errors)
    return "" if is_there else "; try again when it is back"


def has_refused(error: BaseException) -> bool:
    """Did the store answer, and say no?"""
    return isinstance(error, StoreRefused) or refuses(error)


def _bare(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": .")
