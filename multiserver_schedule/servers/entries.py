"""The nouns that cross the steps, as frozen dataclasses: a machine, a server as others may see it, a load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from typing import Any


class MachineState(Enum):
    """What a provider says of a machine, in one of our words."""

    PENDING = "pending"
    RUNNING = "running"
    REBOOTING = "rebooting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    DELETING = "deleting"
    UNKNOWN = "unknown"
    """It used a word that is not known: nothing is concluded from it."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as its provider shows it. One that is gone is not shown."""

    id: str
    """The provider's own name of it."""
    key: str
    """Our key that it was created with: a server's ``key``; "" where it has our tag and no key."""
    state: MachineState
    word: str = ""
    """The provider's own word for the state."""
    name: str = ""
    address: str = ""
    booted: str = ""
    """Something that is another one after each boot, where the provider tells: how a reboot is seen to be over."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server, without its row: what providers, drains and configurations are given."""

    name: str
    """Unique, and a valid host name: the machine's, too."""
    key: str
    """Unique, and never used again: the idempotency key of its creation, and the tag by which it is found."""
    type: str
    provider: str
    configuration: Mapping[str, Any] = field(default_factory=dict)
    """As the type gave it, with each ``option("NAME")`` in it replaced by that setting."""
    machine_id: str = ""
    """"" until the provider has told it."""
    address: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """
    How much work waits for a type of servers. None: the source can't tell.

    Add two to have the load of two queues together. Raises ValueError, naming what is wrong and what to write.
    """

    waiting: int | None = None
    """Jobs that nobody has begun."""
    oldest: timedelta | None = None
    """For how long the oldest of them has waited; zero when none waits."""
    running: int | None = None
    """Jobs that are being worked on."""
    busy: Mapping[str, int] = field(default_factory=dict)
    """
    Jobs being worked on by each server, by its name, as far as it is known: who is idle is let go first. One that is
    not named is idle only if those that are have as many jobs as ``running`` says.
    """

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, where it is told: it would fail, or decide something, far from there."""
        for name in ("waiting", "running"):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                raise ValueError(f"Load: {name} should be a whole number from 0 up, or None; not {value!r}.")
        if self.oldest is not None and (not isinstance(self.oldest, timedelta) or self.oldest < timedelta(0)):
            raise ValueError(
                f"Load: oldest should be a timedelta from zero up, such as timedelta(minutes=5), or None; "
                f"not {self.oldest!r}."
            )
        if not isinstance(self.busy, Mapping):
            raise ValueError(f"Load: busy should be a dict of a server's name to its jobs, not {self.busy!r}.")
        for server, jobs in self.busy.items():
            if not isinstance(server, str) or not _is_count(jobs):
                raise ValueError(f"Load: busy has {server!r}: {jobs!r}; write the server's name and a whole number.")
        # A copy, so that nobody changes what was checked.
        object.__setattr__(self, "busy", dict(self.busy))

    def __add__(self, other: Load) -> Load:
        def both(one: Any, two: Any, how: Any) -> Any:
            return two if one is None else one if two is None else how(one, two)

        busy = dict(self.busy)
        for name, jobs in other.busy.items():
            busy[name] = busy.get(name, 0) + jobs
        return Load(
            waiting=both(self.waiting, other.waiting, int.__add__),
            oldest=both(self.oldest, other.oldest, max),
            running=both(self.running, other.running, int.__add__),
            busy=busy,
        )


def _is_count(value: object) -> bool:
    # A bool is an int to Python, and a slip of the pen to everybody else.
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
