"""What a task may ask of its own run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ..entries import Claim, RunInfo
from ..exceptions import LeaseLost
from .base import boot_time


@dataclass(frozen=True, slots=True, kw_only=True)
class CurrentRun(RunInfo):
    """The run that this process is: what it was told of itself, and a way to ask whether it may go on."""

    _until: Callable[[], float] = field(repr=False, compare=False)

    def check(self) -> None:
        """
        Raise LeaseLost when this run may no longer be the only one.

        Costs a look at shared memory, so call it as often as you like: in a loop, and before a write that must not
        happen twice. It sees each renewal, and turns to LeaseLost when the run is about to be ended.
        """
        if boot_time() >= self._until():
            raise LeaseLost(
                f"{self.name}, due {self.due_at:%Y-%m-%d %H:%M:%S}: this server could not renew the lease; another one "
                "may have started the task. Stop, and write nothing more."
            )

    @classmethod
    def of(cls, claim: Claim, until: Callable[[], float]) -> CurrentRun:
        """Return the run of a claim; ``until`` tells the moment (boot time) at which it has to stop."""
        return cls(
            name=claim.occurrence.row,
            due_at=claim.occurrence.due_at,
            started_at=claim.acquired_at,
            attempt=claim.occurrence.attempt,
            fence=claim.fence,
            key=claim.occurrence.key,
            server=claim.server,
            trigger=claim.occurrence.trigger,
            _until=until,
        )

    @classmethod
    def told(cls, message: Mapping[str, Any], until: Callable[[], float]) -> CurrentRun:
        """Return the run that a message of another process tells of; moments in it are ISO texts."""
        return cls(
            name=message["name"],
            due_at=datetime.fromisoformat(message["due_at"]),
            started_at=datetime.fromisoformat(message["started_at"]),
            attempt=message["attempt"],
            fence=message["fence"],
            key=message["key"],
            server=message["server"],
            trigger=message["trigger"],
            _until=until,
        )


_current: CurrentRun | None = None
# A plain global: a process is one run (and ``inline`` runs one at a time), and threads that a task starts belong to it.


def current_run() -> CurrentRun | None:
    """
    Return the run that this code is called by, or None where it is called by something else (a view, a shell, a test).

    ::

        if run := current_run():
            run.check()
    """
    return _current


def set_current_run(run: CurrentRun | None) -> CurrentRun | None:
    """Set what ``current_run`` returns; return what it was. For runners, and for tests of tasks."""
    global _current
    before, _current = _current, run
    return before
