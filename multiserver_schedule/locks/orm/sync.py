"""Which version's schedule holds, and what does a row become by it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

from django.db.models import Q

from ...entries import Row, ScheduledTask
from ...models import ScheduledLock, ScheduleState
from ..base import Before, Declarations, Elsewhere, Synced, nowhere_else
from ..versions import FORGOTTEN_AFTER, TakeOver, needs_step, registered, take_overs, taken_over
from .rows import ROW, Clock, as_row, batches, noted
from .session import Session

_IN_STEP: Final = (
    "last_due_at",
    "next_due_at",
    "schedule",
    "fingerprint",
    "schedule_since",
    "not_before",
    "fence",
    "moved_to",
    "moved_from",
)


class Syncing(Session):
    """Registers tasks, takes their rows over from an older version, and hands them from store to store."""

    def sync(
        self, declared: Declarations, *, elsewhere: Elsewhere = nowhere_else, now: datetime | None = None
    ) -> Synced:
        clock = Clock(now)
        before: Mapping[str, Before] = {}
        if elsewhere is not nowhere_else:
            # Before the transaction: other stores are asked, and give rows away.
            names = self._call(lambda: self._to_ask_of(declared, clock))
            before = elsewhere(names) if names else {}
        return self._call(lambda: self._sync(declared, before, clock))

    def _to_ask_of(self, declared: Declarations, clock: Clock) -> list[str]:
        """Return the names of the rows that this version would take over and that are missing or given away."""
        states = list(self._states(declared).annotate(now=clock.now))
        at = noted(states[0]) if states else self._now(clock)
        names = [name for change in take_overs(declared, states, at) for name in change.tasks]
        here: set[str] = set()
        for batch in batches(names, self._batch_size(per_row=1)):
            here.update(self._locks().filter(task__in=batch, moved_to="").values_list("task", flat=True))
        return [name for name in names if name not in here]

    def _sync(self, declared: Declarations, before: Mapping[str, Before], clock: Clock) -> Synced:
        """
        Put the rows in step with these declarations, unless a newer version's hold.

        1. Lock the project's state row: first syncs of many processes come one after the other.
        2. For all servers' tasks and for this server's own: is this set the newest, or is the newest still about? Done.
        3. Register what has no row. Take over the rows whose schedule is another.
        4. Become the newest.
        """
        with self._transaction():
            self._touch(ScheduleState.PROJECT)
            states = list(self._states(declared).annotate(now=clock.now))
            at = noted(states[0])
            new: list[str] = []
            changed: list[str] = []
            for change in take_overs(declared, states, at):
                here, other = self._bring_in_step(change, before, at)
                new += here
                changed += other
                values = {"scope": change.scope, "first_seen_at": change.first_seen_at, "seen_at": at}
                if not self._state().filter(key=change.key).update(**values):
                    self._state().create(key=change.key, **values)
            forgotten = ~Q(key=ScheduleState.PROJECT) & Q(seen_at__lt=at - FORGOTTEN_AFTER)
            self._state().filter(forgotten).delete()
        return Synced(now=at, registered=tuple(new), changed=tuple(changed))

    def _bring_in_step(
        self, change: TakeOver, before: Mapping[str, Before], at: datetime
    ) -> tuple[list[str], list[str]]:
        tasks = change.tasks
        there: dict[str, Row] = {}
        for batch in batches(list(tasks), self._batch_size(per_row=1)):
            there.update({row.task: row for row in map(as_row, self._locks().filter(task__in=batch).values(*ROW))})
        missing = [
            _as_model(registered(name, task, at, before.get(name)), task)
            for name, task in tasks.items()
            if name not in there
        ]
        self._locks().bulk_create(missing, ignore_conflicts=True, batch_size=500)
        names = {row.pk: name for name, row in there.items() if needs_step(row, tasks[name])}
        for pks in batches(sorted(names), min(500, self._batch_size())):
            locks = list(self._lock_rows(self._locks().filter(pk__in=pks), skip_locked=False))
            for lock in locks:
                task = tasks[names[lock.pk]]
                row = as_row({field: getattr(lock, field) for field in ROW})
                row = taken_over(row, task, at, change.since, before.get(row.task))
                for field in _IN_STEP:
                    setattr(lock, field, getattr(row, field, task.timetable.text))
            self._locks().bulk_update(locks, _IN_STEP, batch_size=self._batch_size())
        return [lock.task for lock in missing], list(names.values())

    def leave(self, names: Sequence[str], *, to: str, now: datetime | None = None) -> list[Row]:
        def work() -> list[Row]:
            rows: list[Row] = []
            for batch in batches(sorted(set(names)), self._batch_size(per_row=1)):
                ours = self._locks().filter(task__in=batch, moved_to__in=["", to])
                # First to write, and what it hit is then read: nobody claims one of these any more.
                ours.filter(moved_to="").update(moved_to=to)
                rows += [as_row(values) for values in ours.order_by("pk").values(*ROW)]
            return rows

        return self._call(work) if names else []

    def arrive(self, names: Sequence[str], *, now: datetime | None = None) -> None:
        for batch in batches(sorted(set(names)), self._batch_size(per_row=1)):
            self._call(lambda batch=batch: self._locks().filter(task__in=batch).update(moved_from=""))  # type: ignore[misc]


def _as_model(row: Row, task: ScheduledTask) -> ScheduledLock:
    return ScheduledLock(
        task=row.task,
        schedule=task.timetable.text,
        **{field: getattr(row, field) for field in _IN_STEP if field != "schedule"},
    )
