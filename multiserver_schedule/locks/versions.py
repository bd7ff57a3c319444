"""
Which version's schedule holds while several run side by side, and what a row becomes then. Pure: every store asks here.

The newest set of declarations holds; older ones pass over the rows that it has taken over. One that comes back after a
rollback takes over when the newest has not been seen for five minutes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, Protocol, TypeVar

from ..entries import Row, ScheduledTask
from .base import Before, Declarations, was_due_in_pause

SEEN_EVERY: Final = timedelta(minutes=1)
"""How often ``seen_at`` of the newest declarations is refreshed."""
GONE_AFTER: Final = timedelta(minutes=5)
"""Declarations that nobody has seen for so long have been rolled back: an older version may take over."""
FORGOTTEN_AFTER: Final = timedelta(days=30)
"""State of servers and versions that is dropped: both register again when they come back."""
ASIDE: Final = "aside:"
"""
What the key of the newest version begins with once a row was retired: whoever has these declarations does not find them
known, syncs, and so takes up again what is declared all the same. To all others it is the newest as before.
"""


class Version(Protocol):
    """One set of declarations as a store has seen it."""

    @property
    def key(self) -> str:
        """As ``keys`` names it."""

    @property
    def scope(self) -> str:
        """Empty, or the server whose own tasks it declares."""

    @property
    def first_seen_at(self) -> datetime | None:
        """When it was last taken over by."""

    @property
    def seen_at(self) -> datetime | None:
        """When a server last had it, to the minute."""


_V = TypeVar("_V", bound=Version)


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeOver:
    """A set of declarations that becomes the newest, and what it takes over."""

    key: str
    scope: str
    tasks: Mapping[str, ScheduledTask]
    """By the name of the row."""
    since: datetime | None
    """A version that comes back answers for the due times after this moment; a new one (None) for none of the past."""
    first_seen_at: datetime


def keys(declared: Declarations) -> dict[str, str]:
    """Return the keys of these declarations, each with its scope: all servers' tasks (""), and this server's own."""
    found = {f"declared:{declared.digest}": ""}
    if declared.server_digest:
        # Servers with the same tasks of their own have the same digest, and yet a version each.
        found[f"declared:{declared.server_digest[:20]}@{declared.server}"] = declared.server
    return found


def is_known(declared: Declarations, versions: Iterable[_V], now: datetime) -> tuple[bool, list[str]]:
    """Tell whether these declarations need no ``sync``, and the keys of those whose ``seen_at`` is to be refreshed."""
    versions = list(versions)
    stale = []
    known = True
    for key, scope in keys(declared).items():
        newest = newest_of(versions, scope)
        if newest is not None and newest.key == key:
            if newest.seen_at is None or newest.seen_at <= now - SEEN_EVERY:
                stale.append(key)
        elif key not in {version.key for version in versions} or _is_gone(newest, now):
            known = False
    return known, stale


def take_overs(declared: Declarations, versions: Iterable[_V], now: datetime) -> list[TakeOver]:
    """Return which of these declarations become the newest now; none where a newer version holds."""
    versions = list(versions)
    found = []
    for key, scope in keys(declared).items():
        newest = newest_of(versions, scope)
        is_back = key in {version.key for version in versions}
        if newest is not None and (newest.key == key or (is_back and not _is_gone(newest, now))):
            continue
        first_seen_at = now
        if newest is not None and newest.first_seen_at is not None:
            # A clock that was set back must not leave the older version the newest.
            first_seen_at = max(now, newest.first_seen_at + timedelta(microseconds=1))
        found.append(
            TakeOver(
                key=key,
                scope=scope,
                tasks={
                    task.row_name(declared.server): task
                    for task in declared.tasks.values()
                    if task.on_every_server == bool(scope)
                },
                since=newest.seen_at if is_back and newest is not None else None,
                first_seen_at=first_seen_at,
            )
        )
    return found


def needs_step(row: Row, task: ScheduledTask) -> bool:
    """Has this row another schedule than the task, or has it been given away to another store, or been retired?"""
    if row.next_due_at is None and _following(task, row.since) is not None:
        return True
    return row.fingerprint != task.fingerprint or bool(row.moved_to)


def registered(name: str, task: ScheduledTask, now: datetime, before: Before | None = None) -> Row:
    """
    Return the first row of a task in this store.

    A new task is never due for the past; one that comes from another store goes on where it was there.
    """
    if before is not None and before.row is not None:
        free = replace(
            before.row,
            owner=None,
            server="",
            acquired_at=None,
            renewed_at=None,
            expires_at=None,
            attempt=1,
            retry_at=None,
            wanted_at=None,
            cancelled=False,
        )
        return _moved_here(replace(free, pk=0, task=name), task, now, before)
    last = now if before is None or before.last_due_at is None else max(now, before.last_due_at)
    return Row(
        pk=0,
        task=name,
        fingerprint=task.fingerprint,
        last_due_at=last,
        schedule_since=last,
        next_due_at=_following(task, last),
        not_before=now,
        # The row of a single server may be deleted when that server is long gone, and its fence must rise all the same.
        fence=int(now.timestamp()) if "@" in name else 0,
    )


def taken_over(
    row: Row, task: ScheduledTask, now: datetime, since: datetime | None = None, before: Before | None = None
) -> Row:
    """
    Return what a row becomes under the schedule of ``task``: it counts from now, or from ``since`` (a rollback).

    A due time of the old schedule that is still open stays due.
    """
    if row.moved_to:
        if before is not None and before.row is not None:
            return _moved_here(row, task, now, before)
        # What the store that had it did meanwhile, nobody here knows: what was due until now counts as done.
        last = max(now, row.last_due_at)
        row = replace(row, moved_to="", fingerprint=task.fingerprint, last_due_at=last, schedule_since=last)
        return replace(row, next_due_at=_following(task, last))
    schedule_since = now if since is None else max(row.last_due_at, since)
    inherited = row.next_due_at is not None and row.last_due_at < row.next_due_at <= schedule_since
    return replace(
        row,
        fingerprint=task.fingerprint,
        schedule_since=schedule_since,
        next_due_at=row.next_due_at if inherited else _following(task, schedule_since),
    )


def _moved_here(mine: Row, task: ScheduledTask, now: datetime, before: Before) -> Row:
    theirs = before.row
    assert theirs is not None
    last = max(mine.last_due_at, theirs.last_due_at)
    if theirs.paused and was_due_in_pause(theirs, theirs.paused_at, now, lambda name, after: _following(task, after)):
        # The pause goes on here, but counts from now: what was due in it there is done.
        last = max(last, now)
    row = replace(
        mine,
        fingerprint=theirs.fingerprint,
        last_due_at=last,
        schedule_since=theirs.schedule_since,
        next_due_at=theirs.next_due_at,
        not_before=max(mine.not_before, theirs.not_before),
        fence=max(mine.fence, theirs.fence),
        moved_to="",
        moved_from=before.store if theirs.owner is not None else theirs.moved_from,
    )
    if row.fingerprint != task.fingerprint:
        return taken_over(row, task, now)
    if row.next_due_at is not None and row.next_due_at <= row.last_due_at:
        row = replace(row, next_due_at=_following(task, row.since))
    return row


def _following(task: ScheduledTask, after: datetime) -> datetime | None:
    """Return the first due time after a moment; where none can be computed, one that has each look find the task."""
    try:
        return task.next(after)
    except Exception:  # a zone that this machine does not have: it must not keep the others from being registered
        return after + timedelta(microseconds=1)


def newest_of(versions: Iterable[_V], scope: str) -> _V | None:
    """Return the version whose schedule holds in this scope: the one that took over last."""
    seen = [version for version in versions if version.scope == scope and version.first_seen_at is not None]
    return max(seen, key=lambda version: (version.first_seen_at, version.key), default=None)


def _is_gone(newest: Version | None, now: datetime) -> bool:
    return newest is None or newest.seen_at is None or newest.seen_at <= now - GONE_AFTER
