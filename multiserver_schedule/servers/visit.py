"""
How is a provider called, and when is it left alone? What one pass has with it there: its calls, its clock, its report.

A call is made in a thread, since it may hang: whoever waits for its answer does so for ``Visit.patience`` seconds. So
is a drain asked, in a thread of its own each time: it is a project's code, and what hangs there takes up no place of
another one, nor of a call. No thread keeps the process from its end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from django.db import connections

from multiserver_schedule.faults import point
from multiserver_schedule.logs import distance

from . import conf, ledger, providers, types
from .exceptions import FleetError, ProviderError
from .hiding import without
from .providers.base import BaseProvider
from .states import Status, backoff

if TYPE_CHECKING:
    from .models import Provider, Server

logger = logging.getLogger("multiserver_schedule.servers")

AT_ONCE: Final = 8
"""Calls to one provider that are under way at the same time, and as many to drains that are waited for."""
MOST_BACKOFF: Final = timedelta(minutes=10)
ANSWERS_WITHIN: Final = timedelta(minutes=1)
"""Nobody takes a step a second time before: a call that is under way has to have ended by then."""

Clock = Callable[[], datetime]


def clock(now: datetime | None = None) -> Clock:
    """Return a clock that starts at the database's time, or at the one that is given, and never goes back."""
    first, began = now or ledger.now(), time.monotonic()
    if now is not None:
        return lambda: first
    return lambda: first + timedelta(seconds=time.monotonic() - began)


@dataclass(slots=True)
class Report:
    """What one pass did at one provider."""

    provider: str
    steps: list[str] = field(default_factory=list)
    """A sentence for each change of a server's status."""
    trouble: str = ""
    """Why nothing could be done there; "" when it answered."""
    left: int = 0
    """Steps that were due and not taken, for want of time."""


_Job = tuple[Future[Any], Callable[[BaseProvider], Any]]


class Calls:
    """The provider, called in threads: an instance for each, since no driver promises to be safe for several."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads = 0

    def submit(self, do: Callable[[BaseProvider], Any]) -> Future[Any]:
        """Begin a call, and return what its answer or error will be in; it begins when less than AT_ONCE are made."""
        future: Future[Any] = Future()
        self._jobs.put((future, do))
        if not self._idle.acquire(blocking=False) and self._threads < AT_ONCE:
            self._threads += 1
            _start(self._work, f"provider-{self.name}-{self._threads}")
        return future

    def submit_drain(self, do: Callable[[], Any]) -> Future[Any]:
        """Begin to ask a drain, at once, and return what its answer or error will be in."""
        return begin(do, f"drain-{self.name}")

    def _work(self) -> None:
        own: list[BaseProvider] = []

        def call(do: Callable[[BaseProvider], Any]) -> Any:
            if not own:
                own.append(providers.make(self.name))
            return do(own[0])

        while (job := self._jobs.get()) is not None:
            future, do = job
            _fulfil(future, partial(call, do))
            self._idle.release()

    def close(self) -> None:
        """Begin no further call."""
        # What hangs is not waited for. What nobody has begun yet, nobody begins.
        with suppress(Empty):
            while (job := self._jobs.get_nowait()) is not None:
                job[0].cancel()
        for _ in range(self._threads):
            self._jobs.put(None)


def begin(do: Callable[[], Any], name: str) -> Future[Any]:
    """
    Begin what may hang, in a thread of its own, and return what its answer or error will be in.

    The thread is not waited for, nor by the process at its end.
    """
    future: Future[Any] = Future()
    _start(lambda: _fulfil(future, do), name)
    return future


def _start(do: Callable[[], None], name: str) -> None:
    threading.Thread(target=do, name=name, daemon=True).start()


def _fulfil(future: Future[Any], do: Callable[[], Any]) -> None:
    """Put an answer, or an error, where it is waited for."""
    try:
        try:
            answer = do()
        finally:
            # A drain or a load is a project's own code, and may ask the database: the connection is this thread's.
            connections.close_all()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(answer)


class Visit:
    """What a pass has with it at one provider: what it calls it with, and how it writes down what came of that."""

    def __init__(
        self,
        report: Report,
        settings: conf.Settings,
        limits: conf.ProviderSettings,
        sample: BaseProvider,
        calls: Calls,
        clock: Clock,
    ) -> None:
        self.report, self.settings, self.limits = report, settings, limits
        self.name, self.sample, self.calls, self.clock = report.provider, sample, calls, clock
        self.types = types.known()
        # A step makes two calls at most, each as slow as it may be.
        self.answers_within = max(ANSWERS_WITHIN, 3 * sample.timeout)

    @property
    def patience(self) -> float:
        """Return for how many seconds an answer is waited for."""
        return self.answers_within.total_seconds()

    def told(self, error: BaseException) -> str:
        """Return an error in one line, with its kind where the text alone would not do, and without a secret."""
        text = " ".join(str(error).split())
        if not (isinstance(error, ProviderError | FleetError) and text):
            text = f"{type(error).__name__}: {text}" if text else type(error).__name__
        return without(text, self.limits.options)

    # -- the provider's row -------------------------------------------------------------------------------------------

    def away(self, row: Provider, why: str) -> None:
        """Note that a provider does not answer, and leave it alone for a while; nothing is concluded from it."""
        now = self.clock()
        self.report.trouble = why
        again_at = self.again_at(row)
        if not row.trouble:
            logger.error("The provider %s does not answer: %s. Its servers stay as they are.", self.name, why)
        ledger.providers().filter(pk=row.pk).update(
            failures=row.failures + 1,
            trouble=why,
            trouble_since=row.trouble_since if row.trouble else now,
            next_look_at=again_at,
            not_before=again_at,
        )

    def silent(self, row: Provider) -> None:
        """Note that an answer has not come in the time that it may take."""
        self.away(row, f"no answer within {distance(self.sample.timeout)}")

    def setback(self) -> None:
        """A creation failed: no replacement at once, or each pass would make and lose another one."""
        row = ledger.provider(self.name)
        ledger.providers().filter(pk=row.pk).update(failures=row.failures + 1, not_before=self.again_at(row))

    def again_at(self, row: Provider) -> datetime:
        """Return until when a provider is left alone after one failure more."""
        return self.clock() + backoff(row.failures + 1, self.settings.poll, MOST_BACKOFF)

    # -- a type's row -------------------------------------------------------------------------------------------------

    def is_young(self, server: Server, at: datetime) -> bool:
        """Say whether a server that works had hardly begun to, at a time: then something is wrong with its type."""
        if server.status != Status.RUNNING or server.running_at is None:
            return False
        return at - server.running_at < self.settings.hanging_after

    def died_young(self, server: Server, to: Status, reason: str) -> None:
        """
        Note that a server was up, and soon down again, and let its type wait before another one is made.

        The type waits and not the provider: that does what it is asked for, and other types work there. What came up
        together dies together: as long as the type waits, that is one failure.
        """
        now = self.clock()
        reason = f"{reason}, {distance(now - (server.running_at or now))} after it was up"
        values = {"error": reason, "error_at": now, "failed_as": Status.ERRORED.value}
        row = ledger.target(server.type)
        if self.move(server, to, reason, **values) and not (row.not_before and row.not_before > now):
            # Whatever was made when the last wait was over would be seen to have died by then.
            is_next = row.not_before is not None and now - row.not_before < 3 * self.settings.hanging_after
            failures = row.failures + 1 if is_next else 1
            ledger.set_back(row, failures, now + backoff(failures, self.settings.poll, MOST_BACKOFF))

    # -- a server's row -----------------------------------------------------------------------------------------------

    def move(self, server: Server, to: Status, reason: str, **values: Any) -> bool:
        """Give a server another status, and report it; False when somebody else has changed it first."""
        previous = server.status
        if not ledger.move(server, to, reason, now=self.clock(), **values):
            return False
        self.report.steps.append(f"{server.name}: {previous} → {to} ({reason})")
        point(f"servers_{to}")
        return True

    def drained(self, server: Server, reason: str, **values: Any) -> None:
        """Send a server on that works no more: to its end, or to the reboot that it was drained for."""
        to = Status.STOPPING if server.reboot_requested_at is None else Status.REBOOTING
        self.move(server, to, reason, reboot_requested_at=None, **values)
