"""
What the keeper asks of whoever runs things: start this, renew that, end it, and tell me what happened.

The keeper (``keeper``, ``cycle``) talks to the store and to nothing else; a ``Runner`` runs users' code where it can
harm no lease. Times on this side are seconds of the boot clock, which counts suspend and never jumps.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..entries import Claim, Outcome, ScheduledTask

Event = Mapping[str, Any]
"""Something to be told to people: a JSON-able dict with "kind". What the kinds are is the business of ``logs``."""

Deliver = Callable[[Event], None]
"""Sends the signals and writes the log lines of one event; runs in the reporter process. May raise, may hang."""

_CLOCK: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))
# macOS has no CLOCK_BOOTTIME; its CLOCK_MONOTONIC counts sleep.


def boot_time() -> float:
    """Return seconds of a clock that goes on in suspend and cannot be set."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


@dataclass(frozen=True, slots=True)
class Margins:
    """How long before the end of its lease a run is ended: TERM, then KILL, then the kernel's timer (30 s: 5, 3, 2)."""

    term: float
    kill: float
    timer: float

    @classmethod
    def of(cls, lease: float) -> Margins:
        """Return the margins of a lease of that many seconds."""
        return cls(term=lease / 6, kill=lease / 10, timer=lease / 15)


@dataclass(frozen=True, slots=True)
class Started:
    """The run's process exists."""

    owner: str
    pid: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The run's process and its group are gone. Only now may the lock be freed."""

    owner: str
    outcome: Outcome
    told: bool
    """Did the run's own process send the signals of its end? If not, somebody else has to."""


@dataclass(frozen=True, slots=True)
class Vanished:
    """The runner is gone, and every run with it: what was known to be running is lost."""

    owners: tuple[str, ...]
    why: str


Message = Started | Ended | Vanished


class Runner(ABC):
    """Runs claims, each in a process of its own (but ``inline``), and ends them when it must."""

    can_end: bool = True
    """Can it end a run at a limit or at the end of its lease?"""
    at_once: int | None = None
    """How many it can run side by side; None is no limit of its own."""

    @abstractmethod
    def start(self) -> None:
        """Start the runner's process. Called before the first connection is opened, while there is one thread."""

    @abstractmethod
    def run(self, claim: Claim, *, until: float, finish_by: float | None) -> None:
        """Run it; its lease ends at ``until`` (boot time) unless renewed, its limit at ``finish_by``."""

    @abstractmethod
    def renew(self, until: Mapping[str, float]) -> None:
        """Move the deadlines of these owners on: only those whose renewal the store confirmed."""

    @abstractmethod
    def end(self, owner: str, why: str) -> None:
        """End this run's processes; ``Ended`` follows. ``why``: "lost", "stopping" or "cancelled"."""

    @abstractmethod
    def report(self, event: Event) -> None:
        """Have an event delivered by the reporter process, in order; never blocks, nor raises a fault of a receiver."""

    @abstractmethod
    def poll(self, timeout: float) -> list[Message]:
        """Return what happened; wait at most ``timeout`` seconds (never longer than 1) for the first."""

    @abstractmethod
    def check(self) -> None:
        """Ping the runner now and then; kill one that is silent for a heartbeat (``Vanished`` follows in poll)."""

    @abstractmethod
    def close(self, timeout: float) -> None:
        """Deliver the reports that wait (at most ``timeout`` seconds), end what still runs, and end the runner."""


Tasks = Mapping[str, ScheduledTask]


def is_accompanied(task: ScheduledTask) -> bool:
    """Is something to be done beside its runs, for which a process of ours stays with a program?"""
    return bool(task.hooks or task.pings or task.mails)


def starts_untold(task: ScheduledTask) -> bool:
    """Is it a program of whose start the keeper has to tell, as its process tells nothing?"""
    return task.kind == "exec" and not task.filters and not is_accompanied(task)
