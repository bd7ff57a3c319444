"""
Which times of a row can no clock that goes right have written, and what are they then? Pure: every store asks here.

A store's clock that was ahead, and was corrected, leaves times behind that are far off: a due time that counts as
done, a break that does not end, a lease that nobody renews any more and nobody may free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from ..entries import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How far beyond the store's clock the times of a row may lie while that clock goes right."""

    far: timedelta
    """For all that is told by the clock itself: the last due time, since when the schedule holds, when the lease was
    renewed, when a run was asked for."""
    rest: timedelta | None
    """For the end of a break, or of what holds a row back that was lost; None where nobody here knows how long."""
    retry: timedelta | None
    """For the next attempt; None likewise."""
    lease: timedelta
    """The longest lease in this lock: a row that was lost is held back for so long, to let its owner come back."""


def beyond(row: Row, reach: Reach, now: datetime) -> dict[str, datetime]:
    """Return those times of a row that cannot be, by the names of its fields; ``renewed_at`` stands for the lease."""
    found: dict[str, datetime] = {}
    for field, most in (
        ("last_due_at", reach.far),
        ("schedule_since", reach.far),
        ("renewed_at", reach.far),
        ("wanted_at", reach.far),
        ("retry_at", reach.retry),
        ("not_before", reach.rest),
    ):
        at: datetime | None = getattr(row, field)
        if at is not None and most is not None and at > now + most:
            found[field] = at
    return found


def set_right(row: Row, reach: Reach, now: datetime, following: Callable[[str, datetime], datetime | None]) -> Row:
    """
    Return the row with what lies beyond brought down to ``now``, and the same one where nothing does.

    Nothing is due for the past, since everything until now counts as done. The lease stays: who holds it may be alive.
    """
    wrong = beyond(row, reach, now)
    values: dict[str, Any] = {field: now for field in wrong if field != "renewed_at"}
    if "last_due_at" in wrong:
        # What was owed is of a due time that comes again.
        values["retry_at"] = None
    if "last_due_at" in wrong or "schedule_since" in wrong:
        last = values.get("last_due_at", row.last_due_at)
        since = max(last, values.get("schedule_since", row.schedule_since))
        hint = row.next_due_at
        # A due time of an older schedule that is open still is.
        if hint is None or not last < hint <= now:
            # Where nobody here knows: an early hint costs a look, a late one would cost due times.
            hint = following(row.task, since) or (None if hint is None else since)
        values["next_due_at"] = hint
    return replace(row, **values) if values else row


def held_back_until(hold: datetime, reach: Reach, now: datetime) -> datetime:
    """Return until when a row that was lost is held back, where that is kept apart from the break."""
    return now + reach.lease if hold > now + 2 * reach.lease and hold > now + reach.far else hold
