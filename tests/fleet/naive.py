"""What the harness has to catch: a lock that looks, and then writes what it saw, as several of our peers do."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime

from multiserver_schedule.entries import Claim, Occurrence
from multiserver_schedule.locks.base import ClaimRecorder
from multiserver_schedule.locks.orm import ORMLock, _Clock
from multiserver_schedule.models import ScheduledLock


class LookThenWriteLock(ORMLock):
    """Reads whether the lock is free, and if so saves the row: two who read at the same time both have it."""

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
            at = self._call(lambda: self._now(_Clock(None)))
            row = ScheduledLock.objects.using(self.using).get(pk=occurrence.pk)
            if row.owner is not None or row.last_due_at >= occurrence.due_at or occurrence.due_at > at:
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
