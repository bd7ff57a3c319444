"""What the sources of a load have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final

from ..entries import Load
from ..exceptions import FleetError

ANSWERS_WITHIN: Final = timedelta(seconds=2)
"""For how long one answer of a broker is waited for: whoever asks has other queues to ask."""


class Queue(ABC):
    """
    One queue or several, whose load is added. Any callable that returns a ``Load`` will do as well.

    Nothing is opened before it is asked, and nothing is left open: it is asked once a minute, mostly each time by
    another process. A queue that is not there yet is empty. What can't be reached raises, as its library does it.

    To know which servers are busy, give a worker the name of its server, or one that ends with ``@`` and that name:
    several workers on one server then have names of their own.
    """

    def __init__(self, *names: str) -> None:
        if not names or not all(isinstance(name, str) and name for name in names):
            raise FleetError(f'{type(self).__name__}() needs the names of queues: {type(self).__name__}("default").')
        # One that is named twice is counted once.
        self.names = tuple(dict.fromkeys(names))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.names))})"

    @abstractmethod
    def load(self) -> Load:
        """Ask for the load as it is now."""

    def __call__(self) -> Load:
        """Be a source."""
        return self.load()


def longest_wait(since: Iterable[datetime], now: datetime) -> timedelta:
    """Return for how long the first of these has waited; nothing where there is none, or where its clock is ahead."""
    return max(now - min(since, default=now), timedelta(0))


def by_server(workers: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return how many jobs each server works on, from how many each worker does, by the worker's name."""
    jobs: Counter[str] = Counter()
    for worker, count in workers:
        # Host names are whole in some names of workers, and never in those of servers.
        jobs[worker.rpartition("@")[2].partition(".")[0]] += count
    return dict(jobs)
