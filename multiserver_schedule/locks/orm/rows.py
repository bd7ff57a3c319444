"""How is a row read and written: its columns, the clock that goes with them, and a value for each of many? (Pure.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Case, DateTimeField, Field, Value, When

from ...database import UTCNow
from ...entries import Occurrence, Row

_T = TypeVar("_T")

NEVER: Final = Value(None, output_field=DateTimeField())
"""No moment, where a column of moments is written by an expression."""
FREE: Final[dict[str, Any]] = {
    "owner": None,
    "server": "",
    "acquired_at": None,
    "renewed_at": None,
    "expires_at": None,
    "finish_by": None,
    "cancelled_at": None,
}
"""What a row is set to that nobody holds any more."""
ROW: Final = (
    "pk",
    "task",
    "fingerprint",
    "last_due_at",
    "schedule_since",
    "next_due_at",
    "not_before",
    "owner",
    "server",
    "fence",
    "acquired_at",
    "renewed_at",
    "expires_at",
    "attempt",
    "trigger",
    "retry_at",
    "wanted_at",
    "cancelled_at",
    "paused_at",
    "paused_reason",
    "moved_to",
    "moved_from",
)
"""The columns that ``as_row`` makes a row of."""
HERE: Final = {"moved_to": "", "moved_from": ""}
"""What tells a row that no other store has, or still has to give."""
NOTHING_OWED: Final[dict[str, Any]] = {"retry_at": None, "rerun_up_to": 0}
"""What a row is set to that no further attempt is owed for."""


class _Given(Value):
    """A time that a test gave in the clock's place."""

    def as_mysql(self, compiler: Any, connection: BaseDatabaseWrapper, **context: Any) -> Any:
        # As a bare parameter it would come back as a text.
        sql, params = self.as_sql(compiler, connection)
        return f"CAST({sql} AS DATETIME(6))", params


@dataclass(frozen=True)
class Clock:
    """N, the store's time: the database's own inside each statement, or what a test gave."""

    given: datetime | None

    @property
    def now(self) -> Any:
        return UTCNow() if self.given is None else _Given(self.given, output_field=DateTimeField())

    def after(self, distance: timedelta) -> Any:
        """Return the expression of ``N + distance``."""
        if self.given is None:
            return UTCNow() + distance
        return _Given(self.given + distance, output_field=DateTimeField())


def as_row(values: dict[str, Any]) -> Row:
    """Return the row that these columns are of; takes some of them out of ``values``."""
    paused_at, cancelled_at = values.pop("paused_at"), values.pop("cancelled_at")
    return Row(**values, paused=paused_at is not None, paused_at=paused_at, cancelled=cancelled_at is not None)


def noted(row: Any) -> datetime:
    """Return the store's time that a row was annotated with."""
    now: datetime = row.now
    return now


def each(
    values: Mapping[Any, _T],
    expression: Callable[[_T], Any],
    field: str = "pk",
    output: Field[Any, Any] | None = None,
) -> Any:
    """Return one expression that has for each row its value: plain where all are equal, else by ``field``."""
    groups: dict[_T, list[Any]] = {}
    for key, value in values.items():
        groups.setdefault(value, []).append(key)
    if len(groups) == 1:
        return expression(next(iter(groups)))
    whens = [When(**{f"{field}__in": keys}, then=expression(value)) for value, keys in groups.items()]
    return Case(*whens, output_field=output or DateTimeField())


def due_times(group: Sequence[Occurrence]) -> Any:
    """Return one expression that has for each row the due time that is meant."""
    return each({o.pk: o.due_at for o in group}, lambda due: Value(due, output_field=DateTimeField()))


def batches(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    """Cut ``items`` into as many as one statement takes."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
