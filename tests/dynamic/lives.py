"""Processes that let passes run, one after the other, and die or stop in the middle of one."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

from django.db import connections

from multiserver_schedule.servers import conf, ledger, monitor, observe, reconcile, visit
from multiserver_schedule.servers.providers.process import MARK

from .conftest import POLL, Site, quick

LOOKS = 2
"""As many looks at a provider as it takes to see that a machine is gone."""
RECONCILER = (reconcile, observe, visit)
"""The modules that have its fault points."""
Fatal = Callable[[str], bool]
"""Is told each fault point that is reached: True kills the process there."""


def points() -> set[str]:
    """Return the names of all fault points of the reconciler, as its source has them."""
    found = set()
    for module in RECONCILER:
        for line in Path(module.__file__).read_text().splitlines():
            _, called, rest = line.partition('point("')
            if called:
                found.add(rest.partition('"')[0])
    return found


@dataclass
class Life:
    """One process, with a clock of its own."""

    pid: int
    read: int
    passes: int = 0
    spent: float = 0.0
    """For how many seconds it let passes run, by that clock."""
    reached: list[str] = field(default_factory=list)
    died_at: str = ""
    """The fault point where it was killed; "a call" where the provider's call killed it; "" when it was not."""
    error: str = ""
    is_over: bool = False

    def wait(self) -> Life:
        """Wait for its end, and note what it told."""
        with os.fdopen(self.read, encoding="utf-8") as told:
            for line in told:
                word, _, rest = line.rstrip("\n").partition(" ")
                if word == "pass":
                    self.passes += 1
                    self.spent = float(rest)
                elif word == "point":
                    self.reached.append(rest)
                else:
                    self.error += rest + "\n"
        _, status = os.waitpid(self.pid, 0)
        self.is_over = True
        assert not self.error, self.error
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            self.died_at = self.reached.pop() if self.reached and self.reached[-1].startswith("!") else "a call"
            self.died_at = self.died_at.removeprefix("!")
        else:
            assert os.WEXITSTATUS(status) == 0, status
        return self

    def is_stopped(self, within: float = 20.0) -> bool:
        """Wait until it has stopped; False when it ended instead, or did neither."""
        until = time.monotonic() + within
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WUNTRACED | os.WNOHANG)
            if pid:
                return os.WIFSTOPPED(status)
            time.sleep(0.005)
        return False

    def go_on(self) -> None:
        """Continue it."""
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        """End it, however it stands, if nobody has waited for it."""
        if not self.is_over:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self.read)


def begin(work: Callable[[], object], *, fatal: Fatal | None = None) -> Life:
    """
    Fork a process that does this, and ends.

    What it does tells of each pass by ``tell``. Whoever forks has no thread but its own, and no connection.
    """
    until = time.monotonic() + 10
    while threading.active_count() > 1 and time.monotonic() < until:
        time.sleep(0.005)
    connections.close_all()
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return Life(pid, read)
    status = 1
    try:
        os.close(read)

        def tell(text: str) -> None:
            os.write(write, f"{text}\n".encode())

        def point(name: str) -> None:
            if fatal is not None and fatal(name):
                tell(f"point !{name}")
                os.kill(os.getpid(), signal.SIGKILL)
            tell(f"point {name}")

        for module in RECONCILER:
            module.point = point  # type: ignore[attr-defined]
        _tell[:] = [tell]
        work()
        status = 0
    except BaseException:
        for line in traceback.format_exc().splitlines():
            os.write(write, f"error {line}\n".encode())
    finally:
        # Threads that still call a provider end with it, as they do in a run of the scheduler.
        os._exit(status)


_tell: list[Callable[[str], None]] = []


def passes(site: Site, alias: str, most: int, *, until_settled: bool = False, name: str = "folder") -> None:
    """Let passes run, in the process that was begun for it; those that would find nothing to do are left out."""
    quick(alias)
    began, settled = site.now, 0
    for _ in range(most):
        site.cloud.tick(site.now)
        reconcile.run(name, now=site.now)
        site.now = max(site.now + POLL, _next_event(name, site.now))
        _tell[0](f"pass {(site.now - began).total_seconds()}")
        settled = settled + 1 if _is_settled(name) else 0
        if until_settled and settled > LOOKS:
            return


def _next_event(name: str, now: datetime) -> datetime:
    """Return when the next step or look is due there."""
    row = ledger.provider(name)
    times = [row.next_look_at, row.not_before, *ledger.servers().values_list("next_step_at", flat=True)]
    return min((moment for moment in times if moment and moment > now), default=now)


def _is_settled(name: str) -> bool:
    if ledger.servers().filter(next_step_at__isnull=False).exists():
        return False
    wanted = sum(each.wanted for each in ledger.targets())
    return min(wanted, conf.provider(name).max_servers) == ledger.provisioned(ledger.counts())


@dataclass
class Lives:
    """A site whose passes run in processes of their own, one after the other."""

    site: Site
    alias: str
    deaths: Counter[str] = field(default_factory=Counter)
    count: int = 0
    passes: int = 0

    def live(self, most: int, fatal: Fatal | None = None, *, until_settled: bool = False) -> Life:
        """Let passes run in a process that may die; the clock stands where it was when it died, and 20 s later."""
        work = lambda: passes(self.site, self.alias, most, until_settled=until_settled)  # noqa: E731
        life = begin(work, fatal=fatal).wait()
        self.count += 1
        if life.died_at:
            self.deaths[life.died_at] += 1
        self.passes += life.passes
        self.site.later(timedelta(seconds=life.spent) + (POLL if life.died_at else timedelta(0)))
        return life

    def two_at_once(self) -> None:
        """Have two processes make a pass at the same moment, which the scheduler's lock keeps them from."""
        at_once([partial(passes, self.site, self.alias, 1)] * 2)
        self.site.later()


def at_once(works: list[Callable[[], object]]) -> list[Life]:
    """Have each of these done by a process of its own, all at the same moment."""
    read, write = os.pipe()

    def waits(work: Callable[[], object]) -> Callable[[], object]:
        def go() -> None:
            os.close(write)
            # A connection of its own, before the start.
            ledger.now()
            os.read(read, 1)
            work()

        return go

    lives = [begin(waits(work)) for work in works]
    os.close(read)
    time.sleep(0.05)
    os.close(write)
    return [life.wait() for life in lives]


def decides(site: Site) -> None:
    """Decide and plan, as the declared task of each minute does."""
    monitor.run(now=site.now)


def alive_in(folder: Path, key: str = "") -> list[int]:
    """Return the processes that were started as machines of a folder, or as one of them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environ = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            marks = [each.decode() for each in environ if each.startswith(MARK.encode() + b"=")]
            if any(str(folder) in mark and key in mark for mark in marks):
                found.append(int(entry.name))
    return found
