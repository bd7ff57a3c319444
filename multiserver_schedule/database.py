"""A database's clock, a connection to it whose call another thread can break off, and what its errors mean."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, Final

from django.db import NotSupportedError, OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import DateTimeField, Func, Max, QuerySet
from django.db.models.functions import Coalesce

MIGRATE: Final = "Has `manage.py migrate` been run?"
"""What is asked of whoever uses a database that lacks a table of ours."""
_NO_TABLE: Final = ("no such table", "does not exist", "doesn't exist")  # SQLite, PostgreSQL, MySQL
_READ_ONLY: Final = "readonly database"  # SQLite
_REFUSED: Final = ("25006", "42501", 1142, 1290, 1792, 1836)  # PostgreSQL, MySQL: read-only, or no permission
_PORTS: Final = {"postgresql": 5432, "mysql": 3306}


class UTCNow(Func):
    """
    The database's clock in UTC, the same throughout a statement.

    Django's ``Now()`` is local time on MySQL unless the session's zone is UTC.
    """

    output_field = DateTimeField()

    def as_sql(self, compiler: Any, connection: BaseDatabaseWrapper, *args: Any, **context: Any) -> Any:
        raise NotSupportedError(f"multiserver_schedule does not know how {connection.vendor} tells UTC time.")

    def as_postgresql(self, compiler: Any, connection: BaseDatabaseWrapper, **context: Any) -> Any:
        return super().as_sql(compiler, connection, template="STATEMENT_TIMESTAMP()", **context)

    def as_mysql(self, compiler: Any, connection: BaseDatabaseWrapper, **context: Any) -> Any:
        return super().as_sql(compiler, connection, template="UTC_TIMESTAMP(6)", **context)

    def as_sqlite(self, compiler: Any, connection: BaseDatabaseWrapper, **context: Any) -> Any:
        template = "STRFTIME('%%%%Y-%%%%m-%%%%d %%%%H:%%%%M:%%%%f', 'NOW')"
        return super().as_sql(compiler, connection, template=template, **context)


def clock_of(rows: QuerySet[Any]) -> datetime:
    """Return the time by the clock of the database of these rows, whether there is one or not."""
    # An aggregate answers even where there is no row.
    answer: datetime = rows.aggregate(now=Coalesce(Max(UTCNow()), UTCNow()))["now"]
    return answer


class Line:
    """The connection of this thread to the database ``using``, while a call to it is under way."""

    def __init__(self, using: str) -> None:
        self.using = using
        self.was_cut = False
        """Was the call that is under way, or the last one, cut?"""
        self._calling: BaseDatabaseWrapper | None = None
        self._socket: tuple[Any, int] | None = None

    @property
    def is_calling(self) -> bool:
        """Is a call under way?"""
        return self._calling is not None

    @contextmanager
    def call(self) -> Iterator[BaseDatabaseWrapper]:
        """Let the calls of the block be cut; call ``ready`` before each."""
        self.was_cut = False
        self._calling = connections[self.using]
        try:
            yield self._calling
        finally:
            self._calling = None

    def ready(self) -> None:
        """Connect, and note the socket before the call: mysqlclient does not tell another thread during a query."""
        connection = connections[self.using]
        connection.ensure_connection()
        raw = connection.connection
        try:
            self._socket = (raw, raw.fileno() if hasattr(raw, "fileno") else raw._sock.fileno())
        except Exception:
            # No socket (SQLite), or a driver that hides it.
            self._socket = None

    def cut(self) -> bool:
        """Break off the call that is under way, from another thread; False when there is nothing to break."""
        connection, noted = self._calling, self._socket
        if connection is None:
            return False
        if connection.connection is None:
            # It connects, and nobody can say by which socket: what this process has open to that port, then.
            cut = [self._shut(descriptor) for descriptor in _sockets_to(connection)]
            return True in cut
        return noted is not None and noted[0] is connection.connection and self._shut(noted[1])

    def close(self) -> None:
        """Close the connection; the next call opens its own."""
        connections[self.using].close()

    def _shut(self, descriptor: int) -> bool:
        try:
            # The copy is ours: closing it cannot close a descriptor that the driver has meanwhile given up.
            with socket.socket(fileno=os.dup(descriptor)) as line:
                self.was_cut = True
                line.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False
        return True


def is_conflict(error: BaseException) -> bool:
    """Was this lost against another transaction, so that the same thing may well succeed now?"""
    cause = error.__cause__
    if getattr(cause, "sqlstate", None) in ("40001", "40P01") or getattr(cause, "pgcode", None) in ("40001", "40P01"):
        return True
    if error.args and error.args[0] in (1020, 1205, 1213):
        return True
    return isinstance(error, OperationalError) and "is locked" in str(error)


def lacks_table(error: BaseException) -> bool:
    """Does the database answer, but without a table of ours, as before the first ``manage.py migrate``?"""
    text = str(error)
    return "multiserver_schedule_" in text and any(words in text for words in _NO_TABLE)


def refuses(error: BaseException) -> bool:
    """Does the database answer, but write nothing for this user: a replica, a read-only file, no permission?"""
    cause = error.__cause__
    codes = (getattr(cause, "sqlstate", None), getattr(cause, "pgcode", None), *error.args[:1])
    return any(code in _REFUSED for code in codes) or _READ_ONLY in str(error)


def _sockets_to(connection: BaseDatabaseWrapper) -> list[int]:
    """Return what this process, which runs nothing but the schedule, has open to the database's server."""
    port = int(connection.settings_dict.get("PORT") or _PORTS.get(connection.vendor, 0))
    folder = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    found = []
    for name in os.listdir(folder) if port else ():
        with suppress(OSError):
            descriptor = int(name)
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as line:
                peer = line.getpeername()
            is_ours = peer[1] == port if isinstance(peer, tuple) else "mysql" in str(peer) or ".PGSQL." in str(peer)
            if is_ours:
                found.append(descriptor)
    return found
