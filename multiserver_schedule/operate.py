"""The verbs of the people who use it and are on call for it: the commands and the admin call the same functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from django.db.models import Max

from .entries import Row, ScheduledTask
from .locks.base import BaseLock
from .models import ScheduledRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """One line of ``schedule list``: what is declared or known, and how it stands."""

    name: str
    schedule: str
    next_due_at: datetime | None
    state: str
    """ready, running, stale (its lease has ended, the next pass frees it), paused, not seen yet, or not declared."""
    holder: str = ""
    since: datetime | None = None
    last_status: str = ""
    last_due_at: datetime | None = None
    last_reason: str = ""
    text: str = ""


def overview(
    tasks: Mapping[str, ScheduledTask], locks: Mapping[str, BaseLock], now: datetime, server: str
) -> list[Overview]:
    """Return every task that is declared here or known to a store, the soonest due first."""
    lines = []
    declared = set()
    for alias, lock in locks.items():
        rows = {row.task: row for row in lock.rows()}
        last = _last_runs(getattr(lock, "using", "default"))
        for row in rows.values():
            task = tasks.get(row.task.partition("@")[0])
            declared.add(row.task)
            lines.append(_line(row, task, last.get(row.task), now))
        for task in tasks.values():
            if task.lock == alias and task.row_name(server) not in declared:
                lines.append(
                    Overview(
                        name=task.row_name(server),
                        schedule=task.timetable.text,
                        next_due_at=task.next(now),
                        state="not seen yet",
                        text=task.text,
                    )
                )
    far = datetime.max.replace(tzinfo=now.tzinfo)
    return sorted(lines, key=lambda line: (line.next_due_at or far, line.name))


def _line(row: Row, task: ScheduledTask | None, last: ScheduledRun | None, now: datetime) -> Overview:
    held = row.owner is not None
    if task is None:
        state = "not declared"
    elif row.paused:
        state = "paused"
    elif held:
        state = "running" if row.expires_at is not None and row.expires_at > now else "stale"
    else:
        state = "ready"
    return Overview(
        name=row.task,
        schedule=task.timetable.text if task else "",
        next_due_at=(task.next(max(now, row.since)) if task and row.next_due_at else None),
        state=state,
        holder=row.server if held else "",
        since=row.acquired_at if held else None,
        last_status=last.status if last else "",
        last_due_at=last.due_at if last else None,
        last_reason=last.reason if last else "",
        text=task.text if task else "",
    )


def _last_runs(using: str) -> dict[str, ScheduledRun]:
    runs = ScheduledRun.objects.using(using).defer("output", "error")
    newest = runs.order_by().values("task").annotate(newest=Max("pk")).values("newest")
    return {run.task: run for run in runs.filter(pk__in=newest)}
