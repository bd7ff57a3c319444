"""
Services and a cron, and what happens to them in the course of time.

    with Fleet(store, tmp_path, "services", lease=6, heartbeat=2) as fleet:
        drill = Drill(fleet, LONG)
        drill.serve("web1"), drill.serve("web2"), drill.cron("web3")
        drill.after(10, lambda: drill.kill("web1"))
        drill.run(60)
        drill.close_down()

A service that has ended is started again, as a service manager would: ten seconds after it was killed, at once after it
was told to end. The cron starts a pass at each full minute, and one at the beginning.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from django.db import connections

from multiserver_schedule.locks.orm import ORMLock

from .harness import PATIENCE, Fleet, Started
from .journal import boot

RESTART = 10.0
BUSY = 2
"""So many of the long tasks a server is at when something is done to it."""
AFTERWARDS = 5.0
"""Seconds that a drill goes on after the last lease has ended."""
TURN = 0.1
IN_TRANSACTION = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
    "AND state = 'idle in transaction' AND clock_timestamp() - state_change > interval '100 ms'"
)


class Drill:
    """What goes on for a while; a server shall be at some of the ``long`` tasks when something is done to it."""

    def __init__(self, fleet: Fleet, long: Mapping[str, float], *, arguments: Sequence[str] = ()) -> None:
        self.fleet = fleet
        self.long = long
        """How many seconds they take."""
        self.arguments = ("--forever", *arguments)
        self.services: dict[str, Started] = {}
        self.passes: list[Started] = []
        self.since: datetime | None = None
        """From when on a service was up."""
        self.until: datetime | None = None
        """From when on all were told to end."""
        self._agenda: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._began = boot()
        self._open = 0
        """How many blows were ordered and are not over."""
        self._calm_at = 0.0
        """When what was promised for the last of them has to be done."""

    # -- who is there -------------------------------------------------------------------------------------------------

    def serve(self, name: str) -> None:
        """Start a service."""
        self.services[name] = self.fleet.server(name, args=self.arguments)

    def cron(self, name: str, minute: float = 60) -> None:
        """Have a cron start a pass at each full minute (of so many seconds), and one now."""
        self.passes.append(self.fleet.server(name))
        now = time.time()
        self.after(math.floor(now / minute + 1) * minute - now, lambda: self.cron(name, minute), from_now=True)

    def wait_until_up(self) -> None:
        """Wait for the services, and count what is on time from then on."""
        for name, service in self.services.items():
            self.fleet.wait_for(
                lambda name=name, it=service: f"service on {name}: " in it.output,  # type: ignore[misc]
                f"{name} to be up\n{{}}",
                also=lambda it=service: it.output,  # type: ignore[misc]
            )
        _, self.since = self.fleet.pair()
        self._began = boot()

    # -- what happens -------------------------------------------------------------------------------------------------

    def after(self, seconds: float, action: Callable[[], object], *, from_now: bool = False) -> None:
        """Do it so long after the beginning (or after now)."""
        at = (boot() if from_now else self._began) + seconds
        heapq.heappush(self._agenda, (at, next(self._numbers), action))

    def kill(self, name: str, which: str = "keeper") -> None:
        """KILL -9 a service when it is at something, and start its successor ten seconds later."""

        def go() -> None:
            service = self.services[name]
            service.kill(which)
            self.after(RESTART, lambda: self._is_over(lambda: self.serve(name)), from_now=True)

        self._strike(name, go)

    def terminate(self, name: str) -> None:
        """Tell a service to end, as its manager does, and start it again when it has."""

        def go() -> None:
            service = self.services[name]
            service.terminate()
            self._when(
                lambda: service.poll() is not None, lambda: self._is_over(lambda: self._has_ended(name, service))
            )

        self._strike(name, go)

    def _has_ended(self, name: str, service: Started) -> None:
        self.fleet.journal.write("ended", server=name, keeper=service.keeper_pid, status=service.poll())
        self.serve(name)

    def pause(self, name: str, seconds: float, which: str = "all", *, between: bool = False) -> None:
        """
        Stop a service for so long when it is at something: the whole of it, as a machine that is suspended.

        ``between``: not in the middle of a transaction, whose rows nobody else can have as long as it is open.
        """

        def go() -> None:
            service = self.services[name]
            service.stop(which)
            if between:
                time.sleep(0.25)
                with connections[self.fleet.store.alias].cursor() as cursor:
                    cursor.execute(IN_TRANSACTION)
                    if cursor.fetchone()[0]:
                        service.cont(which)
                        self.after(TURN, lambda: self._when_busy(name, go), from_now=True)
                        return
            self.after(seconds, lambda: self._is_over(lambda: service.cont(which)), from_now=True)

        self._strike(name, go)

    def _strike(self, name: str, blow: Callable[[], object]) -> None:
        self._open += 1
        self._when_busy(name, blow)

    def _is_over(self, last: Callable[[], object]) -> None:
        last()
        self._open -= 1
        self._calm_at = boot() + self.fleet.lease + AFTERWARDS

    def _when_busy(self, name: str, action: Callable[[], object]) -> None:
        """Do it when the service is at something long, and is at it still when it is hit."""

        def is_busy() -> bool:
            now = self.fleet.now()
            runs = self.fleet.runs(status="running", server=name, task__in=list(self.long))
            left = [self.long[run.task] - (now - (run.started_at or now)).total_seconds() for run in runs]
            return sum(seconds > 1 for seconds in left) >= BUSY

        self._when(is_busy, action)

    def _when(self, condition: Callable[[], bool], action: Callable[[], object]) -> None:
        if condition():
            action()
        else:
            self.after(TURN, lambda: self._when(condition, action), from_now=True)

    def run(self, seconds: float) -> None:
        """Let it go on for so long; and until what is done to the servers is over, and what is promised for it done."""
        until, paired = boot() + seconds, 0.0
        while (now := boot()) < max(until, self._calm_at) or (self._open and now < until + 2 * PATIENCE):
            if now > paired + 1:
                self.fleet.pair()
                paired = now
            while self._agenda and self._agenda[0][0] <= now:
                heapq.heappop(self._agenda)[2]()
            time.sleep(TURN)
        self.fleet.pair()

    # -- the end ------------------------------------------------------------------------------------------------------

    def close_down(self) -> list[str]:
        """Have all end when what they run has ended, as at a deploy; return what is wrong with how they did."""
        lock = ORMLock("default", {"using": self.fleet.store.alias})
        self.until = self.fleet.now()
        lock.interrupt()
        self.fleet.pair()
        wrong = []
        for name, service in self.services.items():
            if service.wait(60) != 0:
                wrong.append(f"P5: {name} ended with {service.poll()}\n{service.output[-3000:]}")
        for one in self.passes:
            # 1 where one of its runs failed, as some are told to.
            if one.wait(60) not in (0, 1):
                wrong.append(f"P5: a pass on {one.server} ended with {one.poll()}\n{one.output[-3000:]}")
        self.fleet.pair()
        until = boot() + 5
        while (left := self.fleet.mine()) and boot() < until:
            time.sleep(TURN)
        if left:
            wrong.append(f"P5: these processes are alive still: {left}")
        return wrong
