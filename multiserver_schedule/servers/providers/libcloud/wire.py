"""One call to a cloud ends in time, and sends nothing twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from libcloud.common.base import Connection
from libcloud.http import LibcloudConnection


class OutOfTime(Exception):
    """The call's time was over before this request was sent."""


class NotWhole(Exception):
    """The call's time was over before the answer was."""


class Clock:
    """How much time is left for the call that is being made, and what it asked for: it may take several requests."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.ends = 0.0
        self.is_blind = False
        """Are requests made that are not seen here?"""
        self.passed: list[tuple[str, str]] = []
        """Method and URL of each request that went before what happens now: what fails now was not that one."""
        self._under_way: tuple[str, str] | None = None
        self.begin()

    def begin(self) -> None:
        self.ends = time.monotonic() + self.seconds
        self.forget()

    def left(self) -> float:
        return self.ends - time.monotonic()

    def asks(self, method: str, url: str) -> None:
        """Note that a request is about to be sent."""
        self._pass()
        self._under_way = (method, url)

    def granted(self) -> None:
        """Note that it was answered, and with no error."""
        self._pass()

    def forget(self) -> None:
        """Begin to note anew."""
        self.passed, self._under_way = [], None

    def _pass(self) -> None:
        if self._under_way is not None:
            self.passed.append(self._under_way)
            self._under_way = None


class TimedConnection(LibcloudConnection):
    """
    Gives a request what is left of the call's time, and no more.

    libcloud's own limit is one for each wait on the socket: an answer that drips in would be waited for without end.
    Here the last wait may begin just before the end, so that a call takes twice its time at most.
    """

    session: Any
    response: Any

    def __init__(self, *args: Any, clock: Clock, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.clock = clock

    def request(
        self,
        method: str,
        url: str,
        body: Any = None,
        headers: Any = None,
        raw: bool = False,
        stream: bool = False,
        hooks: Any = None,
    ) -> None:
        self.clock.asks(method, url)
        left = self.clock.left()
        if left <= 0:
            raise OutOfTime(f"the {self.clock.seconds:g} s of this call are over")
        self.session.timeout = left
        super().request(method, url, body=body, headers=headers, raw=raw, stream=True, hooks=hooks)  # type: ignore[no-untyped-call]
        if not stream:
            self._read()
        if self.response.status_code < 400:
            self.clock.granted()

    def _read(self) -> None:
        """Read the answer as its pieces come: a fixed amount is waited for until it is whole, however slowly."""
        response = self.response
        body = bytearray()
        while piece := response.raw.read1(65536, decode_content=True):
            body += piece
            if self.clock.left() <= 0:
                response.close()
                raise NotWhole(f"the answer was not whole within {self.clock.seconds:g} s")
        response._content = bytes(body)


class NoRetry:
    """Stands for libcloud's retries, which an environment variable turns on: a machine created again is one more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, request: Callable[..., Any]) -> Callable[..., Any]:
        return request


def tame(driver: Any, clock: Clock, *, host: str | None, port: int | None, secure: bool | None) -> None:
    """Have a driver's requests end with the clock, never be repeated, and go where the options say."""
    connection = getattr(driver, "connection", None)
    if not isinstance(connection, Connection):
        clock.is_blind = True  # not over HTTP, such as vSphere's
        return
    untyped: Any = connection
    _set_up(untyped, clock, host, port, secure)


def _set_up(connection: Any, clock: Clock, host: str | None, port: int | None, secure: bool | None) -> None:
    connection.retryCls = NoRetry
    connection.conn_class = partial(TimedConnection, clock=clock)
    # Some drivers take these arguments, and forget them.
    if host is not None:
        connection.host = host
    if secure is not None:
        connection.secure = 1 if secure else 0
    if port is not None:
        connection.port = port
    connection.connect()
