"""What do people ask of a row: a pause, a run, an end, a clock put right?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from django.db.models import DateTimeField, Q, QuerySet, Value
from django.db.models.functions import Coalesce

from ...models import ScheduledLock, ScheduleState
from ..ahead import Reach, set_right
from ..base import Following, was_due_in_pause
from ..versions import ASIDE, newest_of
from .rows import NOTHING_OWED, ROW, Clock, as_row, batches, noted
from .session import Session

_RESUMED: Final = ("last_due_at", "next_due_at", "retry_at", "rerun_up_to", "paused_at", "paused_reason")
_MAY_LIE_AHEAD: Final = ("last_due_at", "schedule_since", "not_before", "retry_at", "wanted_at")
_SET_RIGHT: Final = (*_MAY_LIE_AHEAD, "next_due_at")


class Steering(Session):
    """Changes rows by hand."""

    def pause(self, names: Sequence[str] | None, *, reason: str = "", now: datetime | None = None) -> list[str]:
        clock = Clock(now)
        values = {"paused_at": Coalesce("paused_at", clock.now), "paused_reason": reason[:255]}
        if names is None:
            self._call(lambda: self._note(**values))
            return []
        return self._steer(names, lambda rows: rows.update(**values))

    def resume(self, names: Sequence[str] | None, *, following: Following, now: datetime | None = None) -> list[str]:
        clock = Clock(now)
        return self._call(lambda: self._resume(names, following, clock))

    def _resume(self, names: Sequence[str] | None, following: Following, clock: Clock) -> list[str]:
        resumed: list[str] = []
        with self._transaction(write_first=True):
            since: datetime | None = None
            if names is None:
                state = self._state().filter(key=ScheduleState.PROJECT, paused_at__isnull=False)
                since = self._lock_rows(state, skip_locked=False).values_list("paused_at", flat=True).first()
                if not state.update(paused_at=None, paused_reason=""):
                    return []
                # Of a row that another store has by now, that store says what has become of it.
                wanted = self._locks().filter(moved_to="")
                found = list(wanted.order_by("pk").values_list("pk", flat=True))
            else:
                wanted = self._locks().filter(paused_at__isnull=False)
                found = list(wanted.filter(task__in=names).order_by("pk").values_list("pk", flat=True))
            for pks in batches(found, min(500, self._batch_size())):
                locks = list(self._lock_rows(wanted.filter(pk__in=pks), skip_locked=False).annotate(now=clock.now))
                for lock in locks:
                    at, row = noted(lock), as_row({field: getattr(lock, field) for field in ROW})
                    if was_due_in_pause(row, since or lock.paused_at, at, following):
                        lock.last_due_at = max(lock.last_due_at, at)
                        lock.next_due_at = following(lock.task, lock.last_due_at) or lock.next_due_at
                        lock.retry_at, lock.rerun_up_to = None, 0
                    if names is not None:
                        lock.paused_at, lock.paused_reason = None, ""
                        resumed.append(lock.task)
                    elif lock.paused_at is None:
                        resumed.append(lock.task)
                self._locks().bulk_update(locks, _RESUMED, batch_size=self._batch_size())
        return resumed

    def interrupt(self, *, now: datetime | None = None) -> None:
        clock = Clock(now)
        self._call(lambda: self._note(interrupted_at=clock.now))

    def want(self, name: str, *, now: datetime | None = None) -> datetime | None:
        clock = Clock(now)

        def work() -> datetime | None:
            rows = self._unpaused(self._locks().filter(task=name))
            # As a parameter, as the claim will compare it: by its own clock SQLite writes the same moment otherwise.
            at = Value(self._now(clock), output_field=DateTimeField())
            rows.update(wanted_at=Coalesce("wanted_at", at))
            wanted: datetime | None = rows.values_list("wanted_at", flat=True).first()
            return wanted

        return self._call(work)

    def cancel(self, owners: Mapping[str, str], *, now: datetime | None = None) -> list[str]:
        clock = Clock(now)
        # Of a row and an owner that is not its own nothing hits: the owners are nobody else's.
        of_these = Q(owner__in=sorted(owners.values()))
        return self._steer(
            sorted(owners), lambda rows: rows.update(cancelled_at=Coalesce("cancelled_at", clock.now)), of_these
        )

    def retire(self, names: Sequence[str], *, now: datetime | None = None) -> list[str]:
        values = {"next_due_at": None, "wanted_at": None, **NOTHING_OWED}

        def take_out(rows: QuerySet[ScheduledLock]) -> None:
            scopes = {name.partition("@")[2] for name in rows.values_list("task", flat=True)}
            rows.update(**values)
            versions = list(self._state().filter(first_seen_at__isnull=False, scope__in=scopes))
            for scope in sorted(scopes):
                newest = newest_of(versions, scope)
                if newest is not None and not newest.key.startswith(ASIDE):
                    key = f"{ASIDE}{newest.key}"
                    self._state().filter(key=key).delete()
                    self._state().filter(pk=newest.pk).update(key=key)

        # Not while a sync is under way: it could make a version the newest that has seen these rows in use.
        return self._steer(names, take_out, Q(owner=None), between_syncs=True)

    def forget(self, names: Sequence[str], *, now: datetime | None = None) -> list[str]:
        def delete(rows: QuerySet[ScheduledLock]) -> None:
            servers = {name.partition("@")[2] for name in rows.values_list("task", flat=True)}
            rows.delete()
            # One that comes back with what it declared before is to register it again.
            self._state().filter(scope__in=servers).exclude(scope="").delete()

        return self._steer(names, delete, Q(owner=None, task__contains="@"))

    def _steer(
        self,
        names: Sequence[str],
        change: Callable[[QuerySet[ScheduledLock]], Any],
        only: Q | None = None,
        *,
        between_syncs: bool = False,
    ) -> list[str]:
        """Change these rows, and return the names of those that were there for it."""

        def work(batch: Sequence[str]) -> list[str]:
            with self._transaction(write_first=True):
                if between_syncs:
                    self._touch(ScheduleState.PROJECT)
                rows = self._locks().filter(only or Q(), task__in=batch)
                found = {lock.pk: lock.task for lock in self._lock_rows(rows, skip_locked=False)}
                change(self._locks().filter(only or Q(), pk__in=list(found)))
                return list(found.values())

        done: list[str] = []
        for batch in batches(sorted(set(names)), min(500, self._batch_size())):
            done += self._call(lambda batch=batch: work(batch))  # type: ignore[misc]
        return done

    def _note(self, **values: Any) -> None:
        """Write what holds for all tasks."""
        with self._transaction():
            self._touch(ScheduleState.PROJECT, **values)

    def set_right(
        self, reaches: Mapping[str, Reach], *, following: Following, now: datetime | None = None
    ) -> list[str]:
        clock = Clock(now)
        changed: list[str] = []
        for batch in batches(sorted(reaches), min(500, self._batch_size())):
            changed += self._call(lambda batch=batch: self._set_right(batch, reaches, following, clock))  # type: ignore[misc]
        if reaches:
            self._call(lambda: self._set_state_right(max(reach.far for reach in reaches.values()), clock))
        return changed

    def _set_right(
        self, names: Sequence[str], reaches: Mapping[str, Reach], following: Following, clock: Clock
    ) -> list[str]:
        far = [reaches[name].far for name in names]
        suspect = Q()
        for field in _MAY_LIE_AHEAD:
            suspect |= Q(**{f"{field}__gt": clock.after(min(far))})
        changed: list[ScheduledLock] = []
        with self._transaction(write_first=True):
            rows = self._lock_rows(self._locks().filter(suspect, task__in=names), skip_locked=False)
            for lock in rows.annotate(now=clock.now):
                row = as_row({field: getattr(lock, field) for field in ROW})
                right = set_right(row, reaches[row.task], noted(lock), following)
                if right is row:
                    continue
                if right.last_due_at != row.last_due_at:
                    # What runs is not of the last due time any more: should its server die, nothing is owed.
                    lock.rerun_up_to = 0
                for field in _SET_RIGHT:
                    setattr(lock, field, getattr(right, field))
                changed.append(lock)
            self._locks().bulk_update(changed, [*_SET_RIGHT, "rerun_up_to"], batch_size=self._batch_size())
            # These have no row of their own, and do not say when they were renewed: who lives does so within a lease.
            runs = self._runs().filter(task__in=names, status="running", expires_at__gt=clock.after(max(far)))
            found = dict(self._lock_rows(runs, skip_locked=False).values_list("pk", "task"))
            if found:
                lease = max(reaches[name].lease for name in names)
                self._runs().filter(pk__in=list(found)).update(expires_at=clock.after(lease))
        return sorted({lock.task for lock in changed} | set(found.values()))

    def _set_state_right(self, far: timedelta, clock: Clock) -> None:
        """Have versions that were seen then be gone in time, and no service end because of an interrupt to come."""
        for field in ("seen_at", "interrupted_at"):
            self._state().filter(**{f"{field}__gt": clock.after(far)}).update(**{field: clock.now})
