"""What a drill has to find: locks that leave out one thing each, and are sound otherwise."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from django.db.models import QuerySet
from django.db.models.lookups import LessThanOrEqual

from multiserver_schedule.entries import Claim, Cleanup, Occurrence
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.locks.orm.rows import Clock, due_times
from multiserver_schedule.models import ScheduledLock


class ClaimsTwice(ORMLock):
    """Does not ask whether a due time was claimed before; with a line so slow that others come in between."""

    def claim(self, occurrences: Sequence[Occurrence], **more: Any) -> list[Claim]:
        if occurrences:
            time.sleep(random.choice((0, 0.5)))
        return super().claim(occurrences, **more)

    def _startable(self, chunk: Sequence[Occurrence], clock: Clock) -> list[Occurrence]:
        rows = self._locked(chunk, clock)
        return [each for each in chunk if each.pk in rows and rows[each.pk].owner is None]

    def _open(
        self, rows: QuerySet[ScheduledLock], group: Sequence[Occurrence], clock: Clock
    ) -> QuerySet[ScheduledLock]:
        return self._unpaused(rows, group).filter(LessThanOrEqual(due_times(group), clock.now))


class NeverReaps(ORMLock):
    """Leaves the locks of the dead where they are."""

    def reap(self, **more: Any) -> list[Cleanup]:
        return []
