"""Tell systemd, or whoever else gave a ``NOTIFY_SOCKET``, how the service is: sd_notify(3), without its library."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import dataclass

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


@dataclass(slots=True)
class Notifier:
    """One line to the service manager; says nothing where there is none."""

    address: str = ""
    every: float | None = None
    """Seconds after which it wants a sign of life; None: it wants none."""
    _beat_at: float = 0.0
    _status: str = ""

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Notifier:
        """Return what these variables ask for, and remove them: what is run is not the service."""
        address, usec, pid = (environ.pop(name, "") for name in VARIABLES)
        if not address.startswith(("/", "@")):
            return cls()
        if address[0] == "@":
            address = "\0" + address[1:]  # a name and no file
        watched = usec.isdigit() and int(usec) > 0 and pid in ("", str(os.getpid()))
        return cls(address, int(usec) / 2_000_000 if watched else None)

    def say(self, **state: str | int) -> None:
        """Send these, by their upper-case names; a manager that does not listen is no trouble of the service's."""
        if self.address:
            text = "\n".join(f"{name.upper()}={value}" for name, value in state.items())
            # A socket each time: one that is kept would have to be kept out of every fork.
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
                line.setblocking(False)
                line.sendto(text.encode(), self.address)

    def status(self, text: str) -> None:
        """Say what the service is at, if that is something else than before."""
        if text != self._status:
            self._status = text
            self.say(status=text)

    def beat_at(self, now: float) -> float:
        """Return when the next sign of life is wanted."""
        return max(now, self._beat_at) if self.every is not None and self.address else float("inf")

    def beat(self, now: float) -> None:
        """Give a sign of life, if it is time."""
        if now >= self.beat_at(now):
            self._beat_at = now + (self.every or 0.0)
            self.say(watchdog=1)
