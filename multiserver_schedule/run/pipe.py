"""JSON lines over a descriptor, where neither side ever waits for the other."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

Message = dict[str, Any]
_CHUNK: Final = 1 << 18


def descriptors() -> tuple[int, int]:
    """
    Return the two ends of a socket pair as plain numbers.

    Numbers, not socket objects: an object that a fork inherited would close, when it is collected, whatever has the
    number by then.
    """
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def _text(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


class Lines:
    """One end of a socket pair. Sending buffers what does not fit; receiving returns what is there."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.closed = False
        """Has the other side gone?"""
        self._unsent = bytearray()
        self._unread = bytearray()
        os.set_blocking(fd, False)

    @property
    def pending(self) -> bool:
        """Is there something that could not be sent yet?"""
        return bool(self._unsent) and not self.closed

    def send(self, message: Mapping[str, Any]) -> None:
        """Send now what fits, and the rest at the next ``flush``."""
        self._unsent += json.dumps(message, separators=(",", ":"), default=_text).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send as much as fits of what is pending."""
        while self._unsent and not self.closed:
            try:
                sent = os.write(self.fd, memoryview(self._unsent)[:_CHUNK])
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._unsent.clear()  # nobody will read it; what they sent before may still be read
                return
            del self._unsent[:sent]

    def receive(self) -> list[Message]:
        """Return the whole messages that have arrived; ``closed`` is set at the end of file."""
        while not self.closed:
            try:
                chunk = os.read(self.fd, _CHUNK)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                chunk = b""
            if not chunk:
                self.closed = True
            self._unread += chunk
        *lines, rest = self._unread.split(b"\n")
        self._unread = bytearray(rest)
        return [message for line in lines if isinstance(message := json.loads(line), dict)]

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            self.closed = True
            os.close(fd)
