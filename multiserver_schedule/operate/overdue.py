"""What nobody does although its time has come: due times that are open, leases that have ended, servers not seen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

from django.db.models import Q

from ..entries import Row, ScheduledTask
from ..locks.base import BaseLock
from ..models import ScheduleState
from . import words
from .stores import last_seen, server_of

LATE: Final = timedelta(minutes=2)
"""How long a due time may be open: cron looks each minute, and may take some time over it."""
UNFREED: Final = timedelta(seconds=90)
"""How long nobody may have freed a lease that has ended: whoever looks frees it."""


def not_meant(row: str, task: ScheduledTask, environment: str) -> str:
    """Say that nobody starts a row of this name, as the task is not for its server or environment; "" where it is."""
    server = server_of(row)
    if server and task.servers and server not in task.servers:
        return f"not meant for {server}: only on {words.joined(task.servers)}"
    if task.environments and environment not in task.environments:
        here = f"the environment {environment!r}" if environment else "a server without ENVIRONMENT"
        return f"not meant for {here}: only for {words.joined(task.environments)}"
    return ""


def open_since(row: Row, task: ScheduledTask, now: datetime, environment: str) -> datetime | None:
    """
    Return the due time of this row that somebody should have started by now; None where nobody should have.

    It may start late by its jitter and by the break after the last run. What is held, paused or on its way to another
    store waits for something else; what is not meant for the row's server, or this environment, for nothing.
    """
    due_at = row.next_due_at
    if due_at is None or row.owner is not None or row.paused or row.moved_to or row.moved_from:
        return None
    if not_meant(row.task, task, environment):
        return None
    starts_at = max(due_at + task.offset(row.task), row.not_before)
    return due_at if starts_at + LATE < now else None


def starters(row: str, task: ScheduledTask) -> tuple[str, ...]:
    """Return the servers that alone start a row of this name; none where any server does."""
    server = server_of(row)
    return (server,) if server else task.servers


def is_unfreed(row: Row, now: datetime) -> bool:
    """Has the lease of this row's holder ended for so long that whoever looks should have freed it?"""
    return row.owner is not None and row.expires_at is not None and row.expires_at + UNFREED < now


def servers_seen(lock: BaseLock, rows: Sequence[Row], servers: Collection[str]) -> Mapping[str, datetime]:
    """Return when each of these servers was last seen by this lock, as far as it can be told from what it has."""
    seen: dict[str, datetime] = {}
    if lock.transactional and servers:
        keys = [f"server:{server}" for server in servers]
        states = ScheduleState.objects.using(lock.using).filter(
            Q(key__in=keys) | Q(scope__in=servers), seen_at__isnull=False
        )
        for key, scope, seen_at in states.values_list("key", "scope", "seen_at"):
            server = scope or key.removeprefix("server:")
            seen[server] = max(seen_at, seen.get(server, seen_at))
    told = frozenset(seen)
    for row in rows:
        server = server_of(row.task)
        if server in servers and server not in told:
            seen[server] = max(last_seen(row), seen.get(server, last_seen(row)))
    return seen
