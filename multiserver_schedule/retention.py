"""
How long the history is kept: what is old enough goes, in small batches, each a short statement of its own.

Two rules. Whatever has ended more than ``days`` ago goes; so do successes beyond the last ``runs`` of their task. Never
a run that is running; never the newest row of a task, onto which equal skips are counted; never its newest scheduled
row, from which a lock that has lost its data learns which due time was the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from django.db import DatabaseError
from django.db.models import Count, F, Max, Q, QuerySet, Window
from django.db.models.functions import RowNumber

from .database import is_conflict
from .entries import SCHEDULED
from .models import CleanupLog, ScheduledRun

BATCH: Final = 500
"""Rows that one statement deletes: few enough to keep nobody waiting, and for SQLite's limit of parameters."""
LARGEST: Final = 900
_PAGE: Final = 20_000
_TRIES: Final = 5


@dataclass(slots=True)
class Pruned:
    """What was deleted from one history, or would be."""

    using: str
    old_runs: int = 0
    """Runs that ended longer ago than the history is kept."""
    spare_runs: int = 0
    """Successes beyond the last ones of their task."""
    cleanups: int = 0
    complete: bool = True
    """Was everything deleted that could be, or was it told to stop before?"""

    @property
    def count(self) -> int:
        """All of it."""
        return self.old_runs + self.spare_runs + self.cleanups


@dataclass(slots=True)
class Retention:
    """Prunes the history in the database ``using``."""

    using: str
    days: int
    runs: int
    batch: int = BATCH
    dry_run: bool = False
    until: float | None = None
    """``time.monotonic()`` after which no further batch is begun."""
    _newest: dict[str, int] = field(default_factory=dict)
    _last_due: dict[str, datetime] = field(default_factory=dict)

    def prune(self, now: datetime) -> Pruned:
        """Delete what is old at ``now``, the time of that database."""
        done = Pruned(self.using)
        limit = now - timedelta(days=self.days)
        spare = self._take_stock()
        done.old_runs = sum(self._each(self._old(limit), self._ended))
        if spare:
            done.spare_runs = sum(self._each(self._spare(limit), self._ended))
        done.cleanups = sum(self._each(self._old_cleanups(limit), self._cleanups))
        done.complete = not self._is_over
        return done

    def _take_stock(self) -> bool:
        """Note which rows are kept whatever their age; tell whether a task has more successes than it may keep."""
        tasks = self._runs().values("task")
        counted = tasks.annotate(
            newest=Max("pk"),
            last_due=Max("due_at", filter=Q(trigger__in=SCHEDULED)),
            successes=Count("pk", filter=Q(status="succeeded")),
        )
        most = 0
        for task, newest, last_due, successes in counted.values_list("task", "newest", "last_due", "successes"):
            self._newest[task] = newest
            self._last_due[task] = last_due
            most = max(most, successes)
        return most > self.runs

    def _is_kept(self, pk: int, task: str, due_at: datetime, trigger: str) -> bool:
        # A task that came since has only new rows, the newest of which is not in what is old.
        return pk == self._newest.get(task) or (trigger in SCHEDULED and due_at == self._last_due.get(task))

    def _old(self, limit: datetime) -> Iterator[list[int]]:
        after = 0
        while True:
            found = self._ended().filter(finished_at__lt=limit, pk__gt=after).order_by("pk")
            page = list(found.values_list("pk", "task", "due_at", "trigger")[: self._size])
            if not page:
                return
            after = page[-1][0]
            yield [row[0] for row in page if not self._is_kept(*row)]

    def _spare(self, limit: datetime) -> Iterator[list[int]]:
        last = Window(RowNumber(), partition_by=F("task"), order_by=F("pk").desc())
        ranked = self._runs().filter(status="succeeded").annotate(rank=last).filter(rank__gt=self.runs)
        after = 0
        while True:
            # What is to be deleted by its age is counted there.
            found = ranked.filter(pk__gt=after, finished_at__gte=limit) if self.dry_run else ranked.filter(pk__gt=after)
            page = list(found.order_by("pk").values_list("pk", "task", "due_at", "trigger")[:_PAGE])
            pks = [row[0] for row in page if not self._is_kept(*row)]
            for start in range(0, len(pks), self._size):
                yield pks[start : start + self._size]
            if len(page) < _PAGE:
                return
            after = page[-1][0]

    def _old_cleanups(self, limit: datetime) -> Iterator[list[int]]:
        after = 0
        while True:
            found = self._cleanups().filter(cleaned_at__lt=limit, pk__gt=after).order_by("pk")
            page = list(found.values_list("pk", flat=True)[: self._size])
            if not page:
                return
            after = page[-1]
            yield page

    def _each(self, batches: Iterator[list[int]], rows: Callable[[], QuerySet[Any]]) -> Iterator[int]:
        for pks in batches:
            if self._is_over:
                return
            yield len(pks) if self.dry_run else self._delete(rows, pks)

    def _delete(self, rows: Callable[[], QuerySet[Any]], pks: Sequence[int]) -> int:
        for tried in range(1, _TRIES + 1):
            try:
                return rows().filter(pk__in=pks).delete()[0] if pks else 0
            except DatabaseError as error:
                if tried == _TRIES or not is_conflict(error):
                    raise
                time.sleep(0.05 * 2**tried)
        raise AssertionError("unreachable")

    @property
    def _is_over(self) -> bool:
        return self.until is not None and time.monotonic() > self.until

    @property
    def _size(self) -> int:
        return min(self.batch, LARGEST)

    def _ended(self) -> QuerySet[ScheduledRun]:
        runs: QuerySet[ScheduledRun] = self._runs().exclude(status="running")
        return runs

    def _runs(self) -> QuerySet[ScheduledRun]:
        runs: QuerySet[ScheduledRun] = ScheduledRun.objects.using(self.using).order_by()
        return runs

    def _cleanups(self) -> QuerySet[CleanupLog]:
        cleanups: QuerySet[CleanupLog] = CleanupLog.objects.using(self.using).order_by()
        return cleanups
