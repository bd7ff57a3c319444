"""Pause, resume, interrupt, and a run that is asked for: what a person does, and what every server then minds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from django.db import DatabaseError, InterfaceError
from django.utils import timezone
from django.utils.connection import ConnectionDoesNotExist

from .. import conf, logs
from ..declare import discovery, registry
from ..entries import Row, ScheduledTask
from ..exceptions import UnsafeTransaction
from ..history import History
from ..locks.base import BaseLock, Following
from .listing import everything_paused
from .stores import (
    Misused,
    Refused,
    again,
    all_unreadable,
    away,
    chosen_locks,
    declared,
    in_another,
    is_of,
    opened,
    reached,
    said,
    task_of,
    unknown,
)

REASON: Final = 255
_BROKEN: Final = (DatabaseError, InterfaceError, ConnectionDoesNotExist)


@dataclass(frozen=True, slots=True)
class Steered:
    """What a verb did, in all stores that it concerned."""

    rows: tuple[tuple[str, str], ...] = ()
    """The rows that it did it to, each with the alias of its lock."""
    locks: tuple[str, ...] = ()
    """The locks in which it did it to everything."""
    unchanged: tuple[str, ...] = ()
    """Rows, or locks, that were so already."""
    notes: tuple[str, ...] = ()
    """What else is to be known."""
    troubles: tuple[str, ...] = ()
    """What could not be done, and what that means."""


def pause(names: Sequence[str] | None, *, reason: str = "", lock: str = "") -> Steered:
    """
    Let no server start these tasks, or any (None), until ``resume``; what runs goes on. Kept by whichever store has it.

    A task on every server is paused on all of them by its name, on one by ``task@server``. A pause in a store that may
    lose data is kept in the database too, from which it is taken up again after a loss. Raises Refused, and does
    nothing, where a name is unknown or a store that may know it does not answer.
    """
    reason = " ".join(reason.split())
    if len(reason) > REASON:
        raise Misused(f"The reason has {len(reason)} characters; the most is {REASON}. Write a shorter one.")
    settings = conf.load()
    if names is None:
        return _each_lock(chosen_locks(settings, lock), settings, lambda store: _pause_all(store, reason))
    found = _rows_of(names, settings, lock)
    troubles: list[str] = []
    done: list[tuple[str, str]] = []
    for alias, rows in found.items():
        with reached(settings, alias) as store:
            done += [(name, alias) for name in store.pause([row.task for row in rows], reason=reason)]
            troubles += _note(store, [row.task for row in rows], reason)
    return Steered(rows=tuple(done), troubles=tuple(troubles))


def resume(names: Sequence[str] | None, *, lock: str = "") -> Steered:
    """
    Undo ``pause`` of these tasks, or that of everything (None), after which single tasks that are paused stay so.

    What was due meanwhile is not made up for: ``backfill`` does that. Where nothing was, what ran then, and what is
    owed, goes on as it would have; else an attempt that was owed is not made any more, which is noted and logged.
    Raises Refused as ``pause`` does.
    """
    settings = conf.load()
    tasks = declared()

    def following(row: str, after: datetime) -> datetime | None:
        task = task_of(row, tasks)
        return task.next(after) if task is not None else None

    if names is None:
        return _each_lock(chosen_locks(settings, lock), settings, lambda store: _resume_all(store, following, settings))
    found = _rows_of(names, settings, lock)
    troubles: list[str] = []
    done: list[tuple[str, str]] = []
    unchanged: list[str] = []
    notes: list[str] = []
    for alias, rows in found.items():
        wanted = [row.task for row in rows]
        with reached(settings, alias) as store:
            # First: a pass that comes in between would take the pause up again.
            noted, wrong = _forget(store, wanted)
            resumed = store.resume(wanted, following=following)
            notes += _tell_forgone(store, [row for row in rows if row.task in resumed], settings)
            if (everything := everything_paused(store)) is not None:
                because = f" ({everything.reason})" if everything.reason else ""
                notes.append(
                    f"Everything is paused in the lock {alias!r}{because}: nothing there runs before "
                    "`manage.py schedule resume --all`."
                )
        troubles += wrong
        was_paused = set(resumed) | set(noted)
        done += [(name, alias) for name in wanted if name in was_paused]
        unchanged += [name for name in wanted if name not in was_paused]
    return Steered(rows=tuple(done), unchanged=tuple(unchanged), notes=tuple(notes), troubles=tuple(troubles))


def interrupt(*, lock: str = "") -> Steered:
    """Ask every service and every pass that stays for a minute to end, once what it runs has ended."""
    settings = conf.load()

    def of(store: BaseLock) -> _Done:
        store.interrupt()
        return True, [], []

    return _each_lock(chosen_locks(settings, lock), settings, of)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A run that was asked for."""

    name: str
    """The row's."""
    lock: str
    at: datetime
    """Its due time: when it was asked for first."""


def want(name: str, *, lock: str = "") -> Wanted:
    """
    Ask for a run of this task by whichever server looks next: a service within five seconds, a crontab each minute.

    A task on every server is run on this one, or on the one that ``task@server`` names. Its schedule does not notice.
    Raises Refused where it is paused, has not been seen yet, or is unknown.
    """
    settings = conf.load()
    read = discovery.discover(registry, collect=True)
    tasks = registry.completed
    task = tasks.get(name)
    row_name = task.row_name(settings.server_name) if task is not None else name
    found = _rows_of([row_name], settings, lock, tasks)
    ((alias, rows),) = list(found.items())[:1]
    if task_of(rows[0].task, tasks) is None:
        if wrong := all_unreadable(read):
            raise Refused(f"{name} is not declared in what can be read: {wrong}")
        raise Refused(_not_declared(name))
    with reached(settings, alias) as store:
        everything = everything_paused(store)
        at = store.want(row_name) if everything is None else None
        if at is None:
            because = everything or next((row for row in store.rows([row_name]) if row.paused), None)
            raise Refused(_why_not(row_name, alias, because))
    return Wanted(row_name, alias, at)


def to_trigger(name: str) -> ScheduledTask:
    """
    Return the task of this name, or of this server's row, that a run by hand is of.

    Raises Refused where it is unknown, of another server, or where a schedule.py is broken.
    """
    or_else = ", or add --no-wait to have it run there"
    return task_here(name, registry.tasks, conf.load(), what="`schedule trigger`", or_else=or_else)


def task_here(
    name: str, tasks: Mapping[str, ScheduledTask], settings: conf.Settings, *, what: str, or_else: str = ""
) -> ScheduledTask:
    """
    Return the task that is named by its name, or by that of its row on this server: ``what`` runs it here.

    Raises Refused where nobody knows it, where this version does not declare it any more, and where the row is another
    server's: then it says ``or_else``, too.
    """
    task = task_of(name, tasks) or tasks.get(name)
    if task is None:
        _rows_of([name], settings, "", tasks)
        raise Refused(_not_declared(name))
    _, at, server = name.partition("@")
    if at and server != settings.server_name:
        where = f"{what} runs where it is called, and this is {settings.server_name}"
        raise Refused(f"{where}. Call it on {server}{or_else}.")
    return task


def _not_declared(name: str) -> str:
    return f"{name} is not declared in this version of the project: no server would know what to run."


def _why_not(name: str, alias: str, because: Any) -> str:
    if because is None:
        return f"{name} has just left the lock {alias!r}. Ask again."
    reason = getattr(because, "paused_reason", "") or getattr(because, "reason", "")
    said_why = f" ({reason})" if reason else ""
    if isinstance(because, Row):
        return f"{name} is paused{said_why}: no server would start it. Write `manage.py schedule resume {name}` before."
    return (
        f"Everything is paused in the lock {alias!r}{said_why}: no server would start {name}. "
        "Write `manage.py schedule resume --all` before."
    )


# -- everything -------------------------------------------------------------------------------------------------------


_Done = tuple[bool, list[str], list[str]]
"""Whether a lock was changed, what else is to be known, and what could not be done."""


def _each_lock(aliases: Iterable[str], settings: conf.Settings, deed: Callable[[BaseLock], _Done]) -> Steered:
    """Do it in each store; one that is away keeps nobody from doing it in the others, and is told of."""
    done: list[str] = []
    unchanged: list[str] = []
    notes: list[str] = []
    troubles: list[str] = []
    for alias in aliases:
        try:
            with opened(settings, alias) as store:
                changed, known, wrong = deed(store)
        except UnsafeTransaction:
            raise
        except Exception as error:  # whatever a driver raises
            troubles.append(f"{away(alias, error)}. Nothing was changed in it.")
            continue
        (done if changed else unchanged).append(alias)
        notes += known
        troubles += wrong
    return Steered(locks=tuple(done), unchanged=tuple(unchanged), notes=tuple(notes), troubles=tuple(troubles))


def _pause_all(store: BaseLock, reason: str) -> _Done:
    store.pause(None, reason=reason)
    return True, [], _note(store, [""], reason)


def _resume_all(store: BaseLock, following: Following, settings: conf.Settings) -> _Done:
    was_paused = everything_paused(store) is not None
    before = store.rows() if was_paused else []
    noted, wrong = _forget(store, [""])
    store.resume(None, following=following)
    return was_paused or bool(noted), _tell_forgone(store, before, settings), wrong


# -- what a due time during the pause has superseded ------------------------------------------------------------------


def _tell_forgone(store: BaseLock, before: Iterable[Row], settings: conf.Settings) -> list[str]:
    """Say, in the log too, which attempts that these rows owed are not made any more: the history promises them."""
    owed = {row.task: row for row in before if row.retry_at is not None and not row.moved_to}
    if not owed:
        return []
    try:
        now = {row.task: row for row in store.rows(sorted(owed))}
    except UnsafeTransaction:
        raise
    except Exception as error:  # whatever a driver raises
        return [f"{away(store.alias, error)}. It has resumed; whether attempts were given up, `schedule list` says."]
    notes = []
    for name, row in owed.items():
        if name in now and now[name].retry_at is None and now[name].last_due_at > row.last_due_at:
            text = "was to be tried again, and is not: a newer due time came during the pause"
            logs.log("none", logging.WARNING, text, task=name, due=row.last_due_at, server=settings.server_name)
            notes.append(f"{name}: its due time {logs.short(row.last_due_at)} {text}.")
    return notes


# -- what a store that may lose it has in the database, too -----------------------------------------------------------


def _note(store: BaseLock, names: Sequence[str], reason: str) -> list[str]:
    if store.transactional:
        return []
    try:
        History(store.using).note_pause(store.alias, names, reason, timezone.now())
    except _BROKEN as error:
        return [
            f"The pause in the lock {store.alias!r} holds, but the database did not take it ({said(error)}): it would "
            "be lost with the data of that lock. Pause again when the database is back."
        ]
    return []


def _forget(store: BaseLock, names: Sequence[str]) -> tuple[list[str], list[str]]:
    if store.transactional:
        return [], []
    try:
        return History(store.using).forget_pause(store.alias, names), []
    except _BROKEN as error:
        return [], [
            f"The lock {store.alias!r} has resumed, but the database still notes the pause ({said(error)}): it would "
            "come back if that lock lost its data. Resume again when the database is back."
        ]


# -- which rows are meant ---------------------------------------------------------------------------------------------


def _rows_of(
    names: Sequence[str], settings: conf.Settings, lock: str, tasks: Mapping[str, ScheduledTask] | None = None
) -> dict[str, list[Row]]:
    """Return the rows that these names mean, by the alias of the lock that has them now. Raises Refused."""
    tasks = declared() if tasks is None else tasks
    there: dict[str, list[Row]] = {}
    silent: dict[str, Exception] = {}
    for alias in chosen_locks(settings, lock):
        try:
            with opened(settings, alias) as store:
                there[alias] = [row for row in store.rows() if not row.moved_to]
        except Exception as error:  # whatever a driver raises
            silent[alias] = error
    found: dict[str, list[Row]] = {}
    for name in dict.fromkeys(names):
        meant = [(alias, row) for alias, rows in there.items() for row in rows if is_of(row.task, name)]
        task = tasks.get(name.partition("@")[0])
        if task is not None and task.lock in silent:
            why = silent[task.lock]
            raise Refused(f"{away(task.lock, why)}. Nothing was done{again(why)}.")
        if not meant:
            if lock and (where := in_another(name, lock, settings, tasks)):
                raise Refused(where)
            known = {*tasks, *(row.task for rows in there.values() for row in rows)}
            raise Refused(_no_row(name, task, known, silent))
        for alias, row in meant:
            if row not in found.setdefault(alias, []):
                found[alias].append(row)
    return found


def _no_row(name: str, task: ScheduledTask | None, known: Iterable[str], silent: Mapping[str, Exception]) -> str:
    if task is not None and (name == task.name or task.on_every_server):
        where = f"on {name.partition('@')[2]}" if "@" in name else "anywhere"
        return (
            f"{name} is declared, but no pass has seen it {where} yet, so there is nothing to do it to. "
            "Run `manage.py runschedule` once, and then try again."
        )
    if silent:
        troubles = " ".join(away(alias, error) for alias, error in silent.items())
        return f"{troubles}. Whether it has {name} is not known{again(*silent.values())}."
    return unknown(name, known)
