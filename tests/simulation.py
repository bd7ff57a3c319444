"""
Hours of many servers in seconds: real stores, real cycles, and a clock that is passed in.

Nothing runs here: a run is a span of simulated time. What is shown is what the store and the cycle decide.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from multiserver_schedule.conf import Settings
from multiserver_schedule.cycle import Cycle
from multiserver_schedule.cycle import Store as LockStore
from multiserver_schedule.declare import Registry
from multiserver_schedule.due import Policy
from multiserver_schedule.entries import Claim, Occurrence, Outcome, ScheduledTask
from multiserver_schedule.history import Afterwards, History
from multiserver_schedule.keeper import PATIENCE
from multiserver_schedule.locks.base import BaseLock, Declarations
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.models import ScheduledRun
from multiserver_schedule.run.base import Ended, Event, Message, Runner, boot_time
from multiserver_schedule.service import HAND_OVER

Version = Mapping[str, ScheduledTask]


class SimulatedRunner(Runner):
    """Has every claim run for as long as the world says."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.until: dict[str, datetime] = {}
        self.claims: dict[str, Claim] = {}
        self.cut: set[str] = set()

    def start(self) -> None:
        """Nothing to start."""

    def run(self, claim: Claim, *, until: float, finish_by: float | None) -> None:
        """Note when it will end."""
        self.until[claim.owner] = self.world.now + self.world.duration(claim.occurrence.row)
        self.claims[claim.owner] = claim
        self.world.started.append((claim.occurrence, claim.server, self.world.now))

    def renew(self, until: Mapping[str, float]) -> None:
        """Nothing ends by itself here."""

    def end(self, owner: str, why: str) -> None:
        """End it now."""
        self.until[owner] = self.world.now
        self.cut.add(owner)

    def report(self, event: Event) -> None:
        """Count it, and pass it on."""
        self.world.told[str(event["kind"])] += 1
        self.world.tell(event)

    def poll(self, timeout: float) -> list[Message]:
        """Return what has ended by now."""
        ended = [owner for owner, moment in self.until.items() if moment <= self.world.now]
        for owner in ended:
            del self.until[owner]
        return [Ended(owner, self._outcome(owner), told=True) for owner in ended]

    def _outcome(self, owner: str) -> Outcome:
        claim = self.claims.pop(owner)
        if owner in self.cut:
            return Outcome(status="failed", error="killed by SIGTERM")
        return self.world.outcome(claim)

    def check(self) -> None:
        """It is always alive."""

    def close(self, timeout: float) -> None:
        """Nothing to close."""


@dataclass
class Pass:
    """One ``runschedule`` of one server."""

    cycle: Cycle
    began: datetime
    look_at: datetime | None
    renew_at: datetime


@dataclass
class World:
    """Servers with a version of the code each, over the same stores; time goes on in seconds."""

    alias: str
    """The database of the history, and of the lock "default" where no locks are given."""
    now: datetime
    locks: Callable[[], Sequence[BaseLock]] | None = None
    """Makes the locks of one process, in which each task has that of its alias."""
    seed: int = 0
    duration: Callable[[str], timedelta] = field(default=lambda row: timedelta(seconds=1))
    outcome: Callable[[Claim], Outcome] = field(default=lambda claim: Outcome(status="succeeded"))
    services: frozenset[str] = frozenset()
    """Servers that run as a service: one cycle without an end, in place of a pass each minute."""
    slots: int = 1000
    versions: dict[str, Version] = field(default_factory=dict)
    """What each server runs now; a server that is not in here is down."""
    passes: list[Pass] = field(default_factory=list)
    told: Counter[str] = field(default_factory=Counter)
    started: list[tuple[Occurrence, str, datetime]] = field(default_factory=list)
    """What was run, by which server, and when it began."""
    tell: Callable[[Event], object] = field(default=lambda event: None)
    """Is given each event, as the reporter of a pass would be."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def advance(self, span: timedelta) -> None:
        """Let time go on; each server's cron starts a pass within the first three seconds of each minute."""
        end = self.now + span
        while self.now < end:
            minute = self.now.replace(second=0, microsecond=0) + timedelta(minutes=1)
            servers = list(self.versions)
            self.random.shuffle(servers)
            starts = sorted((minute + timedelta(milliseconds=self.random.randrange(200, 3000)), s) for s in servers)
            for moment, server in starts:
                self._work_until(moment)
                if server in self.versions and not (server in self.services and self._is_up(server)):
                    self._start(server)
            self._work_until(min(minute + timedelta(seconds=59), end))

    def kill(self, server: str) -> None:
        """Take a server away, with whatever it runs."""
        self.versions.pop(server, None)
        for each in [each for each in self.passes if each.cycle.settings.server_name == server]:
            self._remove(each)

    def finish(self) -> None:
        """Let what runs come to its end, with no server starting anything new."""
        for each in self.passes:
            if each.cycle.hand_over is None:
                each.cycle.hand_over, each.look_at = HAND_OVER, None
        for _ in range(600):
            if not self.passes:
                return
            self._work_until(self.now + timedelta(seconds=1))
        raise AssertionError("a pass does not end")

    def _start(self, server: str) -> None:
        settings = Settings(server_name=server, max_concurrency=self.slots)
        stores = []
        for lock in self.locks() if self.locks else [ORMLock("default", {"using": self.alias})]:
            tasks = {name: task for name, task in self.versions[server].items() if task.lock == lock.alias}
            shared, own = Registry().digests(server, tasks)
            declared = Declarations(tasks=tasks, server=server, digest=shared, server_digest=own)
            history = History(self.alias) if lock.transactional else Afterwards(self.alias)
            stores.append(LockStore(lock=lock, history=history, declared=declared))
        is_service = server in self.services
        policy = Policy(slow_start=timedelta(seconds=2)) if is_service else Policy()
        hand_over = None if is_service else HAND_OVER
        cycle = Cycle(
            stores=stores, runner=SimulatedRunner(self), settings=settings, policy=policy, hand_over=hand_over
        )
        self.passes.append(Pass(cycle, self.now, self.now, self.now + timedelta(seconds=10)))
        self._turn()

    def _is_up(self, server: str) -> bool:
        return any(each.cycle.settings.server_name == server for each in self.passes)

    def _work_until(self, moment: datetime) -> None:
        while self.now < moment:
            upcoming = [moment]
            for each in self.passes:
                upcoming += [each.renew_at] if each.cycle.running else []
                upcoming += [each.look_at] if each.look_at else []
                upcoming += list(each.cycle.runner.until.values())  # type: ignore[attr-defined]
            self.now = max(self.now + timedelta(milliseconds=50), min(upcoming))
            self.now = min(self.now, moment)
            self._turn()

    def _turn(self) -> None:
        self.random.shuffle(self.passes)
        for each in list(self.passes):
            if each.cycle.take(each.cycle.runner.poll(0), now=self.now):
                each.look_at = self.now
            if each.cycle.running and each.renew_at <= self.now:
                each.cycle.renew(now=self.now)
                each.renew_at = self.now + timedelta(seconds=10)
            if each.look_at is not None and each.look_at <= self.now:
                step = each.cycle.step(now=self.now)
                each.look_at = None
                is_service, patience = each.cycle.hand_over is None, each.began + PATIENCE - self.now
                again = step.look_again_at if is_service else step.within(boot_time() + patience.total_seconds())
                if again is not None:
                    each.look_at = self.now + timedelta(seconds=max(0.05, again - boot_time()))
                if is_service:
                    soon = self.now + timedelta(seconds=4.5)
                    each.look_at = min(soon, each.look_at or soon)
            if each.look_at is None and not each.cycle.running:
                self._remove(each)

    def _remove(self, one: Pass) -> None:
        self.passes.remove(one)
        for store in one.cycle.stores:
            if not store.lock.transactional:
                store.lock.close()


def accounted(alias: str, row: str) -> Counter[str]:
    """Return how many due times of a row ran, and how many were given up and why."""
    found: Counter[str] = Counter()
    for run in ScheduledRun.objects.using(alias).filter(task=row):
        kind = run.status if run.status != "skipped" else run.reason.partition(" ")[0]
        found[kind] += run.count
    return found


def ran(alias: str, row: str) -> list[datetime]:
    """Return the due times of a row that were run, in order, each as often as it was."""
    runs = ScheduledRun.objects.using(alias).filter(task=row).exclude(status="skipped")
    return sorted(runs.values_list("due_at", flat=True))


def expected(task: ScheduledTask, spans: Sequence[tuple[datetime, datetime]]) -> list[datetime]:
    """Return the due times of a task in these spans."""
    return sorted(due_at for after, until in spans for due_at in task.between(after, until))
