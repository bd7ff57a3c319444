"""What is there to do, and what is in the rows?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final, cast

from django.db import connections
from django.db.models import CharField, F, Field, IntegerField, Q, QuerySet, Value
from django.db.models.functions import Cast

from ...entries import Row
from ...models import ScheduledLock, ScheduleState
from ..base import Declarations, Look
from ..versions import SEEN_EVERY, is_known
from .rows import ROW, Clock, as_row, batches
from .session import Session

_LOOK: Final = tuple(field for field in ROW if not field.startswith("paused_"))
_DUE, _ENDED, _STATE = range(3)
_OF_STATE: Final = {
    "task": "key",
    "fingerprint": "scope",
    "last_due_at": "paused_at",
    "schedule_since": "interrupted_at",
    "next_due_at": "first_seen_at",
    "not_before": "seen_at",
}
_OF_RUN: Final = {"fingerprint": "owner", "last_due_at": "due_at"} | {
    field: field for field in ("task", "owner", "server", "fence", "attempt", "trigger")
}


class _Prepared:
    """
    A query that is asked again and again, put into SQL once.

    Of a look at an idle store, two thirds were spent on building the same statement anew.
    """

    def __init__(self, query: QuerySet[Any, Any], using: str) -> None:
        self._compiler = query.query.get_compiler(using)
        self._using = using
        sql = self._compiler.as_sql()
        # All else of the compiler, the conversion of what comes back above all, stays Django's.
        self._compiler.as_sql = lambda *args, **options: sql

    @property
    def is_current(self) -> bool:
        """Is it for the connection that this thread has now?"""
        return self._compiler.connection is connections[self._using]

    def rows(self) -> Iterable[Any]:
        """Ask, and return the rows."""
        return cast("Iterable[Any]", self._compiler.results_iter(tuple_expected=True))


class Looking(Session):
    """Reads, and writes nothing but that this version was seen."""

    def __init__(self, alias: str, options: Mapping[str, Any]) -> None:
        super().__init__(alias, options)
        self._prepared: dict[tuple[timedelta, str], _Prepared] = {}

    def look(self, declared: Declarations, *, ahead: timedelta = timedelta(0), now: datetime | None = None) -> Look:
        clock = Clock(now)
        return self._call(lambda: self._look(declared, ahead, clock))

    def _look(self, declared: Declarations, ahead: timedelta, clock: Clock) -> Look:
        """Read everything in one statement: the state, the rows with something to do, and what there is to reap."""
        asked = (ahead, declared.server)
        if clock.given is not None:
            found = _Prepared(self._to_look_at(declared, ahead, clock), self.using)
        elif asked in self._prepared and self._prepared[asked].is_current:
            found = self._prepared[asked]
        else:
            found = self._prepared[asked] = _Prepared(self._to_look_at(declared, ahead, clock), self.using)
        rows: list[Row] = []
        states: list[ScheduleState] = []
        expired = False
        now: datetime | None = None
        for kind, at, *values in found.rows():
            now = at
            if kind == _ENDED:
                expired = True
            elif kind == _DUE:
                rows.append(as_row(dict(zip(_LOOK, values, strict=True)) | {"paused_at": None, "paused_reason": ""}))
            else:
                given = dict(zip(_LOOK, values, strict=True))
                states.append(ScheduleState(**{field: given[column] for column, field in _OF_STATE.items()}))
        if now is None:
            # Nothing answers nothing, not even the time.
            now = self._now(clock)
        project = next((state for state in states if state.key == ScheduleState.PROJECT), None)
        paused = project is not None and project.paused_at is not None
        known, stale = is_known(declared, states, now)
        if stale:
            self._state().filter(key__in=stale, seen_at__lte=clock.after(-SEEN_EVERY)).update(seen_at=clock.now)
        # Of equal due times the one that rested longest: by pk, the last of many tasks would hardly get a slot.
        rows.sort(key=lambda row: (row.wanted_from or now, row.not_before, row.pk))
        return Look(
            now=now,
            known=known,
            paused=paused,
            interrupted_at=project.interrupted_at if project else None,
            due=() if paused else tuple(rows),
            expired=expired,
        )

    def _to_look_at(self, declared: Declarations, ahead: timedelta, clock: Clock) -> QuerySet[Any, Any]:
        mine = ~Q(task__contains="@") | Q(task__endswith=f"@{declared.server}")
        soon = clock.after(ahead)
        wanted = Q(next_due_at__lte=soon) | Q(retry_at__lte=soon) | Q(wanted_at__lte=soon)
        due = self._locks().filter(mine, wanted, paused_at=None, moved_to="")
        # These have other columns; of what has ended any of the right kind do, since it only says that there is some.
        found: QuerySet[Any, Any] = (
            due.annotate(kind=Value(_DUE, IntegerField()), at=clock.now)
            .values_list("kind", "at", *_LOOK)
            .union(
                self._states(declared).values_list(Value(_STATE, IntegerField()), clock.now, *_as_look(_OF_STATE)),
                self._locks()
                .filter(expires_at__lte=clock.now)
                .values_list(Value(_ENDED, IntegerField()), clock.now, *_LOOK),
                self._runs()
                .filter(expires_at__lte=clock.now)
                .values_list(Value(_ENDED, IntegerField()), clock.now, *_as_look(_OF_RUN)),
                all=True,
            )
        )
        return found

    def clock(self) -> datetime:
        return self._call(lambda: self._now(Clock(None)))

    def rows(self, names: Iterable[str] | None = None) -> list[Row]:
        found = self._locks().order_by("task").values(*ROW)
        if names is None:
            return [as_row(values) for values in found]
        wanted = sorted(set(names))
        rows: list[Row] = []
        for batch in batches(wanted, self._batch_size(per_row=1)):
            rows += [as_row(values) for values in found.filter(task__in=batch)]
        return rows


def _as_look(columns: Mapping[str, str]) -> list[Any]:
    """Return the columns of another table, in the order and of the kinds of ``_LOOK``; empty where it has none."""
    return [F(columns[field]) if field in columns else _empty(field) for field in _LOOK]


def _empty(field: str) -> Any:
    kind = ScheduledLock._meta.pk if field == "pk" else ScheduledLock._meta.get_field(field)
    if isinstance(kind, CharField):
        return Value("")
    return Cast(Value(None), cast("Field[Any, Any]", kind))
