"""Where is the one server, what time is it there, and how is an item read and written over a single connection?"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Final

from django.core.cache import caches
from django.core.cache.backends.memcached import BaseMemcachedCache
from pymemcache.client.base import Client  # type: ignore[import-untyped]
from pymemcache.exceptions import (  # type: ignore[import-untyped]
    MemcacheError,
    MemcacheServerError,
    MemcacheUnexpectedCloseError,
    MemcacheUnknownError,
)

from ...exceptions import ConfigurationError, StoreTimeout
from .rows import Moment, micros

UNCERTAIN: Final = 2_000_000
"""Microseconds: the server's clock is at most so far ahead of what it tells (whole seconds, counted once a second)."""
SHIFT: Final = 2_000_000
"""Microseconds: the clock of a server that was restarted may be so far behind the old one's, by rounding alone."""
BATCH: Final = 100
"""Writes that are sent before their answers are read."""
KEYS_PER_READ: Final = 1_000

_ANSWERS: Final = (b"STORED", b"NOT_STORED", b"EXISTS", b"NOT_FOUND")


class _Sockets:
    """The socket module as pymemcache wants it; knows the last socket, so that one that still connects can be cut."""

    def __init__(self) -> None:
        self.made = 0
        self.last: socket.socket | None = None

    def socket(self, *args: Any) -> socket.socket:
        """Return a socket of this kind, and remember it."""
        self.last = socket.socket(*args)
        self.made += 1
        return self.last

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)


class Line:
    """
    One connection to one server, for one caller at a time.

    Whatever goes wrong ends the connection, and with it every token that was read over it: a server that is restarted
    counts them from 1 again, and would take an old one for its own.
    """

    def __init__(self, server: tuple[str, int] | str, name: str, timeout: float, tls: Any = None) -> None:
        self.name = name
        self._sockets = _Sockets()
        # Neither a pool nor a retry, and no exception is ignored: "away" must not look like "empty".
        self._client: Any = Client(
            server,
            connect_timeout=timeout,
            timeout=timeout,
            no_delay=True,
            allow_unicode_keys=True,
            socket_module=self._sockets,
            tls_context=tls,
        )
        self._mutex = threading.RLock()
        self._pid = os.getpid()
        self._was_cut = False
        self.is_calling = False

    @contextmanager
    def call(self) -> Iterator[None]:
        """Have the line for the calls of the block; raises StoreTimeout where another thread cut one."""
        with self._mutex:
            if self._pid != os.getpid():
                # The connection is the parent's: two who talk over it would read each other's answers.
                self._client.close()
                self._pid = os.getpid()
            self._was_cut = False
            self.is_calling = True
            try:
                yield
            except BaseException as error:
                # Half an answer may still be on its way, and would be taken for the next one.
                self._client.close()
                if self._was_cut and isinstance(error, (MemcacheError, OSError)):
                    raise StoreTimeout(f"A call to the Memcached server {self.name} hung, and was cut.") from error
                raise
            finally:
                self.is_calling = False

    def cut(self) -> bool:
        """Shut the socket of the call under way; False when there is none."""
        if not self.is_calling:
            return False
        for line in (self._client.sock, self._sockets.last):
            if line is not None:
                self._was_cut = True
                try:
                    line.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue
                return True
        self._was_cut = False
        return False

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        with self._mutex:
            self._client.close()

    def moment(self, now: datetime | None = None) -> Moment:
        """Ask what time it is, and which run of the server this is. ``now`` stands in for the time."""
        was_open = self._client.sock is not None
        try:
            stats = self._client.stats()
        except (MemcacheUnexpectedCloseError, ConnectionError):
            if not was_open or self._was_cut:
                raise
            # The server ends idle connections (-o idle_timeout), and nothing was read over this one that is still used.
            stats = self._client.stats()
        try:
            told, pid, uptime = (int(stats[key]) for key in (b"time", b"pid", b"uptime"))
        except (KeyError, ValueError, TypeError):
            raise MemcacheUnknownError(
                f"{self.name} does not tell its time, pid and uptime, as a Memcached server does ('stats'). "
                "A proxy cannot hold a lock: name the server itself."
            ) from None
        if now is not None:
            given = micros(now)
            return Moment(given, given, given, pid, told - uptime)
        lower = told * 1_000_000
        return Moment(lower, lower + UNCERTAIN, lower + UNCERTAIN + SHIFT, pid, told - uptime)

    @property
    def connection(self) -> int:
        """Tell one connection from the next; 0 where there is none."""
        return self._sockets.made if self._client.sock is not None else 0

    def read(self, items: Sequence[bytes]) -> dict[bytes, tuple[bytes, bytes]]:
        """Return what is there of these items, each with its token."""
        found: dict[bytes, tuple[bytes, bytes]] = {}
        for start in range(0, len(items), KEYS_PER_READ):
            found.update(self._client.gets_many(items[start : start + KEYS_PER_READ]))
        return found

    def write(self, items: Sequence[tuple[bytes, bytes | None, bytes | None]], connection: int) -> list[bool]:
        """
        Write each item (key, value, token; no token: there must be no item yet), tell which were written.

        Without a value it is deleted.

        None is written over another connection than ``connection``, which the tokens are of.
        """
        written: list[bool] = []
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            if self.connection != connection or not connection:
                return written + [False] * (len(items) - len(written))
            self._client.sock.sendall(b"".join(_command(*item) for item in batch))
            answers = self._answers(len(batch))
            refused = [answer for answer in answers if answer not in _ANSWERS]
            if refused:
                said = refused[0].decode(errors="replace")
                raise MemcacheServerError(
                    f"The Memcached server {self.name} refused to store a row: {said}. Nothing is locked without it: "
                    "give the server more memory (-m), or larger items (-I)."
                )
            written += [answer == b"STORED" for answer in answers]
        return written

    def _answers(self, wanted: int) -> list[bytes]:
        # Not by Client.raw_command: it loses what comes before the packet with the end token (pymemcache 4.0.0).
        received = b""
        while received.count(b"\r\n") < wanted:
            more = self._client.sock.recv(65536)
            if not more:
                raise MemcacheUnexpectedCloseError
            received += more
        *answers, rest = received.split(b"\r\n")
        if rest or len(answers) != wanted:
            raise MemcacheUnknownError(answers[0][:100])
        return answers


def _command(key: bytes, value: bytes | None, token: bytes | None) -> bytes:
    if value is None:
        # There is no "delete if it is still as it was": what is written so has ended before anybody reads it.
        return b"cas %b 0 -1 0 %b\r\n\r\n" % (key, token or b"0")
    if token is None:
        return b"add %b 0 0 %d\r\n%b\r\n" % (key, len(value), value)
    return b"cas %b 0 0 %d %b\r\n%b\r\n" % (key, len(value), token, value)


def server_of(cache: str, alias: str) -> tuple[tuple[str, int] | str, str]:
    """Return the one server of this cache, as pymemcache wants it, and as people read it."""
    if cache not in caches.settings:
        known = ", ".join(sorted(caches.settings))
        raise ConfigurationError(f"There is no cache {cache!r}, which the lock {alias!r} names. Known are: {known}.")
    if not isinstance(caches[cache], BaseMemcachedCache):
        raise ConfigurationError(
            f"The cache {cache!r} of the lock {alias!r} ({caches.settings[cache]['BACKEND']}) is no Memcached. "
            "This lock needs Django's PyMemcacheCache or PyLibMCCache; for others, see locks.cache.CacheLock."
        )
    location = caches.settings[cache].get("LOCATION") or ""
    servers = re.split("[;,]", location) if isinstance(location, str) else [*location]
    servers = [str(server).strip() for server in servers if str(server).strip()]
    if len(servers) != 1:
        raise ConfigurationError(
            f"The cache {cache!r} of the lock {alias!r} has {len(servers)} servers in LOCATION. A lock needs exactly "
            "one: with several, one that is away for one client would be two locks. Give the lock a cache of its own."
        )
    name = servers[0]
    if name.startswith(("unix:", "/")):
        return name.removeprefix("unix:"), name
    match = re.fullmatch(r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:/\[\]\s]+))(?::(?P<port>\d{1,5}))?", name)
    if match is None:
        raise ConfigurationError(
            f"The LOCATION {name!r} of the cache {cache!r} is no server that the lock {alias!r} can use. "
            "Write host:port, [v6 address]:port, unix:/path or /path."
        )
    return (match["v6"] or match["host"], int(match["port"] or 11211)), name
