"""What the harness has to catch: locks that look, and then write what they saw, as several of our peers do."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from django.core.cache import caches

from multiserver_schedule.entries import Claim, Occurrence, ReleasedClaim
from multiserver_schedule.locks.base import ClaimRecorder, ReleaseRecorder
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.locks.orm.rows import Clock
from multiserver_schedule.models import ScheduledLock


class LookThenWriteLock(ORMLock):
    """Reads whether the lock is free, and if so saves the row: two who read at the same time both have it."""

    def is_free(self, row: ScheduledLock, occurrence: Occurrence, at: datetime) -> bool:
        """Look."""
        return row.owner is None and row.last_due_at < occurrence.due_at <= at

    def claim(
        self,
        occurrences: Sequence[Occurrence],
        *,
        server: str,
        slots: int | None = None,
        record: ClaimRecorder,
        now: datetime | None = None,
    ) -> list[Claim]:
        claims = []
        for occurrence in occurrences[:slots]:
            at = self._call(lambda: self._now(Clock(now)))
            row = ScheduledLock.objects.using(self.using).get(pk=occurrence.pk)
            if not self.is_free(row, occurrence, at):
                continue
            row.owner = str(uuid.uuid4())
            row.last_due_at, row.next_due_at = occurrence.due_at, occurrence.next_due_at
            row.server, row.fence, row.acquired_at, row.renewed_at = server, row.fence + 1, at, at
            row.expires_at = at + occurrence.lease
            row.save(using=self.using)
            claims.append(
                Claim(
                    occurrence=occurrence,
                    owner=row.owner,
                    fence=row.fence,
                    server=server,
                    acquired_at=at,
                    expires_at=row.expires_at,
                )
            )
        if claims:
            record(claims, claims[0].acquired_at)
        return claims


class GetThenSetLock(LookThenWriteLock):
    """
    Reads a key of the cache "lock", and if it is not there sets it for an hour, as the old cache scheduler did.

    Like that one, it puts it back for the length of the break when the run has ended. Due times are in the database.
    """

    TTL = 3600

    def __init__(self, alias: str, options: Mapping[str, Any]) -> None:
        super().__init__(alias, {})
        self.cache = caches["lock"]

    def is_free(self, row: ScheduledLock, occurrence: Occurrence, at: datetime) -> bool:
        key = f"schedule-{occurrence.row}"
        if self.cache.get(key) is not None:
            return False
        self.cache.set(key, str(uuid.uuid4()), self.TTL)
        return True

    def release(
        self, released: Sequence[ReleasedClaim], *, record: ReleaseRecorder, now: datetime | None = None
    ) -> list[bool]:
        for item in released:
            key, rest = f"schedule-{item.claim.occurrence.row}", int(item.min_break.total_seconds())
            self.cache.delete(key)
            if rest:
                self.cache.set(key, "at rest", rest)
        return super().release(released, record=record, now=now)
