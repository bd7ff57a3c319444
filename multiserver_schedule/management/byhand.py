"""How a backfill runs: by a keeper, one due time after another."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TextIO

from multiserver_schedule import service
from multiserver_schedule.cycle import NotStarted
from multiserver_schedule.entries import ScheduledTask
from multiserver_schedule.keeper import Keeper
from multiserver_schedule.operate.backfill import Tried


@dataclass(slots=True)
class ByHand:
    """Runs due times by hand; an ``operate.backfill.Hand``."""

    keeper: Keeper

    def __call__(self, task: ScheduledTask, due_at: datetime) -> Tried:
        """Run it under the lock with the trigger "backfill", and wait for its end."""
        if self.keeper.stopping:
            return Tried(False, "it was told to stop", stopped=True)
        ran = self.keeper.by_hand(task, due_at=due_at)
        stopped = bool(self.keeper.stopping)
        if isinstance(ran, NotStarted):
            return Tried(False, ran.why, stopped=stopped)
        outcome = ran.outcome
        status = outcome.status if outcome is not None else "failed"
        said = f"cancelled, {outcome.reason}" if outcome is not None and status == "cancelled" else ""
        return Tried(status == "succeeded", filtered=status == "skipped", stopped=stopped, said=said)

    def wait(self, seconds: float) -> bool:
        """Sleep so long; tell whether it was told to stop."""
        until = time.monotonic() + seconds
        while not self.keeper.stopping and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        return bool(self.keeper.stopping)


@contextmanager
def by_hand(stdout: TextIO | None = None) -> Iterator[ByHand]:
    """Start a runner, lend what runs due times by hand, and leave nothing running."""
    with service.hand(stdout=stdout) as keeper:
        yield ByHand(keeper)
