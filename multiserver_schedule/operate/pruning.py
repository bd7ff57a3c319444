"""What is old enough to be deleted: history, and the rows of servers that are long gone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from django.db import DEFAULT_DB_ALIAS
from django.db.models import Q

from .. import conf
from ..declare import discovery, registry
from ..entries import Row, ScheduledTask
from ..locks.base import BaseLock
from ..locks.orm import ORMLock
from ..models import ScheduleState
from ..retention import BATCH, Pruned, Retention
from .stores import Refused, all_unreadable, away, last_seen, opened, said, server_of, task_of

AT_MOST: Final = 20 * 60.0
"""Seconds that the daily task of our own goes on beginning new batches; the rest is tomorrow's."""

LEAST_SILENCE: Final = timedelta(days=1)
"""A server that was seen within this is not gone, however short the history is kept."""


@dataclass(frozen=True, slots=True)
class Pruning:
    """What was deleted, or would be."""

    histories: tuple[Pruned, ...] = ()
    """For each database that a history is in."""
    forgotten: tuple[tuple[str, str], ...] = ()
    """Rows of servers that are long gone, each with the alias of its lock."""
    retired: tuple[tuple[str, str], ...] = ()
    """Rows that this version does not declare, and that no look returns any more."""
    held: tuple[tuple[str, str], ...] = ()
    """Rows that were to go and stay, since somebody holds them."""
    troubles: tuple[str, ...] = ()


def prune(
    *,
    days: int | None = None,
    runs: int | None = None,
    batch: int = BATCH,
    undeclared: bool = False,
    dry_run: bool = False,
    at_most: float | None = None,
) -> Pruning:
    """
    Delete what the history keeps longer than HISTORY_DAYS and HISTORY_RUNS say, and rows of servers long gone.

    A server is gone when neither it nor a due time of its own tasks has been seen for so many days; when it comes back,
    its rows are registered anew. With ``undeclared``, rows that this version does not declare are taken out of use,
    until a version that declares them holds: their fences stay. Raises Refused, and does nothing, where not all that is
    declared can be read then. One store that is away keeps no other from being pruned. ``at_most`` is for how many
    seconds batches are begun.
    """
    settings = conf.load()
    days = settings.history_days if days is None else days
    runs = settings.history_runs if runs is None else runs
    tasks = _all_declared() if undeclared else {}
    until = None if at_most is None else time.monotonic() + at_most
    histories, troubles = _histories(settings, days, runs, batch, dry_run, until)
    forgotten: list[tuple[str, str]] = []
    retired: list[tuple[str, str]] = []
    held: list[tuple[str, str]] = []
    for alias in settings.locks:
        try:
            with opened(settings, alias) as lock:
                rows, now = lock.rows(), lock.clock()
                silent_since = now - max(timedelta(days=days), LEAST_SILENCE)
                gone, busy = _free(_of_gone_servers(lock, rows, silent_since, settings.server_name))
                forgotten += [(name, alias) for name in (gone if dry_run else lock.forget(gone))]
                held += [(name, alias) for name in busy]
                if undeclared:
                    unused, busy = _free(_undeclared(rows, tasks, without=gone))
                    retired += [(name, alias) for name in (unused if dry_run else lock.retire(unused))]
                    held += [(name, alias) for name in busy]
        except Exception as error:  # whatever a driver raises
            troubles.append(away(alias, error))
    return Pruning(tuple(histories), tuple(forgotten), tuple(retired), tuple(held), tuple(troubles))


def housekeep() -> None:
    """Prune as the settings say, and print what was done: what the task ``multiserver_schedule.prune`` runs."""
    done = prune(at_most=AT_MOST)
    for line in summary(done):
        print(line)
    if done.troubles:
        raise Refused(" ".join(done.troubles))


def summary(done: Pruning, *, dry_run: bool = False) -> list[str]:
    """Say in lines what was done, or would be; of rows also in which lock, where there is more than one."""
    several = len(conf.load().locks) > 1
    verb = "would delete" if dry_run else "deleted"
    lines = []
    for each in done.histories:
        parts = [
            _many(each.old_runs, "run") + " by age",
            _many(each.spare_runs, "success", "successes") + " by number",
            _many(each.cleanups, "clean-up"),
        ]
        more = "" if each.complete else "; there is more, for the next time"
        lines.append(f"history in {each.using!r}: {verb} {', '.join(parts)}{more}")
    for rows, did, would, why in (
        (done.forgotten, "forgotten", "would be forgotten", "since its server is long gone"),
        (done.retired, "taken out of use", "would be taken out of use", "since it is not declared"),
        (done.held, "left", "would be left", "since somebody holds it"),
    ):
        for name, alias in rows:
            where = f" (lock {alias!r})" if several else ""
            lines.append(f"{name}{where}: {would if dry_run else did}, {why}")
    return lines


def _histories(
    settings: conf.Settings, days: int, runs: int, batch: int, dry_run: bool, until: float | None
) -> tuple[list[Pruned], list[str]]:
    done: list[Pruned] = []
    troubles: list[str] = []
    for using in dict.fromkeys(str(each.options.get("using", DEFAULT_DB_ALIAS)) for each in settings.locks.values()):
        try:
            # By its own clock: a server whose clock is a year ahead would delete everything.
            now = ORMLock("", {"using": using}).clock()
            retention = Retention(using, days=days, runs=runs, batch=batch, dry_run=dry_run, until=until)
            done.append(retention.prune(now))
        except Exception as error:  # whatever a driver raises
            troubles.append(f"The history in the database {using!r} cannot be pruned: {said(error)}")
    return done, troubles


# -- rows -------------------------------------------------------------------------------------------------------------


def _of_gone_servers(lock: BaseLock, rows: Sequence[Row], limit: datetime, here: str) -> list[Row]:
    """Return the rows of servers that nothing has been seen of since ``limit``."""
    silent = [row for row in rows if "@" in row.task and not row.moved_to and last_seen(row) < limit]
    servers = {server_of(row.task) for row in silent} - {here}
    if lock.transactional:
        keys = [f"server:{server}" for server in servers]
        seen = ScheduleState.objects.using(lock.using).filter(
            Q(key__in=keys) | Q(scope__in=servers), seen_at__gte=limit
        )
        servers -= {key.removeprefix("server:") for key in seen.values_list("key", flat=True)}
        servers -= set(seen.values_list("scope", flat=True))
        return [row for row in silent if server_of(row.task) in servers]
    # A cache does not tell when a server was seen: but one that lives does not leave a due time open for so long.
    alive = {server_of(row.task) for row in rows if "@" in row.task and last_seen(row) >= limit}
    overdue = {server_of(row.task) for row in silent if row.next_due_at is not None and row.next_due_at < limit}
    return [row for row in silent if server_of(row.task) in (servers & overdue) - alive and not row.paused]


def _all_declared() -> Mapping[str, ScheduledTask]:
    """Return what this version declares. Raises Refused, or DeclarationError, where that is not known in full."""
    if wrong := all_unreadable(discovery.discover(registry, collect=True)):
        raise Refused(f"What is not declared is not known before all that is can be read; nothing was pruned. {wrong}")
    return registry.tasks


def _undeclared(rows: Sequence[Row], tasks: Mapping[str, ScheduledTask], *, without: Sequence[str]) -> list[Row]:
    unused = [row for row in rows if row.next_due_at is not None and not row.moved_to and row.task not in without]
    return [row for row in unused if task_of(row.task, tasks) is None]


def _free(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    return [row.task for row in rows if row.owner is None], [row.task for row in rows if row.owner is not None]


def _many(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or f'{one}s'}"
