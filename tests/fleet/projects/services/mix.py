"""Fifty tasks, from every second to every minute: what is declared, and what the checker is told of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from ...checker import Told, interval


@dataclass(frozen=True, kw_only=True)
class Kind:
    """So many tasks of a period, each at work for so many seconds; their names are the kind's with a number."""

    name: str
    period: int
    seconds: float
    tasks: int = 1
    overlap: Literal["skip", "queue_one"] = "skip"
    later: float = 0.0
    retries: int = 0
    failures: int = 0
    reruns: bool = False

    @property
    def names(self) -> list[str]:
        return [self.name] if self.tasks == 1 else [f"{self.name}-{number}" for number in range(1, self.tasks + 1)]

    @property
    def told(self) -> Told:
        return Told(
            due=interval(self.period),
            min_break=timedelta(seconds=min(10, self.period / 6)),
            waits=self.overlap == "queue_one",
            later=self.later,
            retries=self.retries,
            backoff=BACKOFF if self.retries else timedelta(0),
            failures=self.failures,
            reruns=3 if self.reruns else 0,
        )


BACKOFF = timedelta(seconds=1)
MIX = (
    Kind(name="1s", period=1, seconds=0.005, tasks=7),
    Kind(name="1s-longer", period=1, seconds=0.2),
    Kind(name="1s-too-long", period=1, seconds=2.5),
    Kind(name="2s", period=2, seconds=0.01, tasks=6),
    Kind(name="2s-longer", period=2, seconds=0.5, tasks=2),
    Kind(name="2s-too-long", period=2, seconds=3),
    Kind(name="5s", period=5, seconds=0.02, tasks=7),
    Kind(name="5s-longer", period=5, seconds=1),
    Kind(name="5s-long", period=5, seconds=4),
    Kind(name="5s-queued", period=5, seconds=7, overlap="queue_one"),
    Kind(name="10s", period=10, seconds=0.05, tasks=4),
    Kind(name="10s-longer", period=10, seconds=2, tasks=2),
    Kind(name="10s-too-long", period=10, seconds=12),
    Kind(name="10s-later", period=10, seconds=0.05, later=4),
    Kind(name="15s", period=15, seconds=0.1, tasks=3),
    Kind(name="15s-long", period=15, seconds=3),
    Kind(name="15s-retried", period=15, seconds=0.2, retries=2, failures=1),
    Kind(name="15s-again", period=15, seconds=8, reruns=True),
    Kind(name="30s", period=30, seconds=0.5, tasks=3),
    Kind(name="30s-long", period=30, seconds=6),
    Kind(name="60s", period=60, seconds=1, tasks=3),
    Kind(name="60s-long", period=60, seconds=8),
)
TOLD = {name: kind.told for kind in MIX for name in kind.names}
LONG = {name: kind.seconds for kind in MIX if kind.seconds >= 2.5 for name in kind.names}
