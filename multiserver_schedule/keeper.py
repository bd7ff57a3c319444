"""
The keeper: look → attend → wait, turn after turn. It owns the clock, and the patience with a store that is away.

It runs no user code but a callable MAINTENANCE_MODE, which has a second to answer. ``one_pass`` is what cron starts;
``forever`` is a service, which looks again and again until it is told to end; ``by_hand`` runs one task for somebody
who waits for it.
"""

from __future__ import annotations

import heapq
import random
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from django.core.cache import caches
from django.db import connections, reset_queries

from . import conf, logs
from .cycle import AHEAD, Cycle, NotStarted, Running, Step, Store
from .database import MIGRATE, lacks_table
from .due import is_meant_for
from .entries import Outcome, ScheduledTask
from .exceptions import StoreTimeout, UnsafeTransaction
from .faults import point
from .notify import Notifier
from .run.base import Runner, Vanished, boot_time
from .run.perform import TookTooLong, limited
from .watchdog import Hangs, Watchdog

PATIENCE: Final = timedelta(seconds=55)
"""How long a pass with nothing running waits for a free slot or the end of a break: then its successor is there."""
STOP_GRACE: Final = 8.0
"""Seconds that a stopped pass gives its runs: TERM at once, KILL after five, and time to record it."""
HURRY: Final = 1.5
"""Seconds for the same after a second signal: KILL at once, and time to record it."""
HISTORY_GRACE: Final = 5.0
"""Seconds that the end of a pass waits for a database to take what it has not recorded."""
LOOK_EVERY: Final = 4.5
"""Seconds between the looks of a service, at most: whatever somebody asks for is seen within five."""
BACK_OFF: Final = 5.0
"""Seconds between two tries of a service at a store that is away, at most."""
MAINTENANCE_LIMIT: Final = 1.0
"""Seconds in which the project has to say whether it is in maintenance mode."""
RUNNER_TRIES: Final = 4
"""How often a service tries to start another runner, a second apart and then twice as long each time."""
HAND_TRIES: Final = 4
"""How often a run by hand is tried to be started while nobody is seen to hold it, HAND_AGAIN seconds apart."""
HAND_AGAIN: Final = 0.25
LOOKING: Final = "looking for what is due"
KEEPING: Final = "renewing and recording"


class Upcoming:
    """The next due time among many tasks; each is computed anew only when it has passed."""

    def __init__(self, tasks: Iterable[ScheduledTask], now: datetime) -> None:
        self._heap: list[tuple[datetime, str, ScheduledTask]] = []
        for task in tasks:
            self._add(task, now)

    def first(self, now: datetime) -> tuple[datetime, str] | None:
        """Return the first due time after ``now``, and of which task."""
        while self._heap and self._heap[0][0] <= now:
            self._add(heapq.heappop(self._heap)[2], now)
        return self._heap[0][:2] if self._heap else None

    def _add(self, task: ScheduledTask, now: datetime) -> None:
        with suppress(Exception):  # one that cannot be computed: a look tells of it
            due_at = task.next(now)
            if due_at is not None:
                heapq.heappush(self._heap, (due_at, task.name, task))


@dataclass(slots=True)
class Pass:
    """How one pass went."""

    status: int = 0
    """0: all ran well or nothing was due. 1: a run failed or the store is broken."""
    claimed: int = 0
    why_not: str = ""
    """Why the one task that was asked for was not started."""
    ran: Ran | None = None
    """Its run, where it was started."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A run that somebody asked for."""

    row: str
    owner: str
    """Which run that was, whoever ran the task beside it."""
    outcome: Outcome | None
    """How it went; None where its end could not be recorded."""

    @property
    def was_filtered(self) -> bool:
        """Did the task's own conditions say no, so that there was nothing to run?"""
        return self.outcome is not None and self.outcome.status == "skipped"


@dataclass(slots=True)
class Outage:
    """A store that is away, and when it is tried again."""

    began: float
    failing: set[str] = field(default_factory=set)
    """What could not be done: LOOKING, KEEPING."""
    tries: int = 0
    hangs: bool = False
    """Was it silent, where other stores wait meanwhile? Then it is given little time, and they go first."""
    look_at: float = 0.0
    keep_at: float = 0.0


@dataclass(slots=True)
class Keeper:
    """One process that looks, claims, renews and releases, and leaves the running to its runner."""

    cycle: Cycle
    settings: conf.Settings
    watchdog: Watchdog = field(default_factory=Watchdog)
    stopping: int = 0
    """How many signals asked for the end: one is polite, two are not."""
    broken: bool = False
    """Was the store away at some time?"""
    interrupted: bool = False
    crippled: bool = False
    """Is there no runner, and can none be started? Then nothing more is claimed."""
    subminute: frozenset[str] = frozenset()
    """The locks, by alias, with a task that is meant for this server and due more than once a minute."""
    is_service: bool = False
    notifier: Notifier = field(default_factory=Notifier)
    hangups: int = 0
    """How often the process was told that its terminal is gone, and has none."""
    leave_by: float | None = None
    """Boot time by which a service that was told to stop shall have left."""
    _turn: int = -1
    _began: float = field(default_factory=boot_time)
    _away: dict[str, Outage] = field(default_factory=dict)
    """By the alias of the store."""
    _upcoming: Upcoming | None = None
    _store_time: tuple[float, datetime] | None = None
    """A boot time, and what a store's clock said then: for people, who do not mind what has drifted since."""
    _maintenance_at: float = 0.0
    _maintenance_told: bool = False
    _paused_told: bool = False

    @property
    def runner(self) -> Runner:
        """Whoever runs the claims."""
        return self.cycle.runner

    def one_pass(self) -> Pass:
        """Run what is due, wait for it, and say how it went."""
        done = Pass()
        look_at: float | None = self._began
        self.runner.check()
        while True:
            if self.stopping or self.interrupted or self.crippled:
                look_at = None
            if look_at is not None and boot_time() >= look_at:
                look_at = self._look_in_pass(done)
                self._tell_paused()
            self._attend()
            if self.stopping and self.cycle.running:
                self._end_all()
                break
            if not self.cycle.running and not self.cycle.unrecorded and look_at is None:
                break
            freed = self._wait(look_at)
            if freed and not self.stopping:
                look_at = boot_time()
        if self.broken or self.cycle.failures or self.cycle.running or self.cycle.unrecorded:
            done.status = 1
        return done

    def forever(self, grace: float) -> Pass:
        """
        Run what comes due until somebody ends it, and say how that went: 0 however the runs did, 1 when it gave up.

        After an interrupt what runs may take as long as it takes; after a signal, ``grace`` seconds.
        """
        done = Pass()
        look_at = boot_time()
        while not (self.stopping or self.interrupted or self.crippled):
            if boot_time() >= look_at:
                look_at = self._look_in_service(done)
            self._attend()
            self._tell_how_it_is()
            if self._wait(look_at):
                look_at = boot_time()
        self._let_end(grace)
        if self.crippled or self.cycle.running or self.cycle.unrecorded:
            done.status = 1
        return done

    def by_hand(self, task: ScheduledTask, *, due_at: datetime | None = None) -> Ran | NotStarted:
        """
        Run one task now under its lock, or one of its due times again, and wait for it.

        Return how that very run went, whatever became of others; why it was not started where it was not.
        """
        store = next(each for each in self.cycle.stores if task.name in each.declared.tasks)
        started = self._start_by_hand(store, task, due_at)
        if isinstance(started, NotStarted):
            return started
        while (self.cycle.running or self.cycle.unrecorded) and not self.stopping:
            self._attend()
            self._wait(None)
        if self.stopping:
            self._end_all()
        unrecorded = store.history.unwritten() and self._flush(store)
        return Ran(started.claim.occurrence.row, started.claim.owner, None if unrecorded else started.outcome)

    def _start_by_hand(self, store: Store, task: ScheduledTask, due_at: datetime | None) -> Running | NotStarted:
        """Start it, at a further try where a neighbour's claim had its row locked for a moment."""
        for number in range(HAND_TRIES):
            if number:
                time.sleep(HAND_AGAIN)
            with self._store_call(store):
                started = self.cycle.by_hand(store, task, due_at=due_at)
            if isinstance(started, Running) or not started.is_passing or self.stopping:
                break
        return started

    # -- one turn -----------------------------------------------------------------------------------------------------

    def _look(self, done: Pass) -> Step:
        step = Step()
        for store in self._in_turn():
            outage = self._away.get(store.lock.alias)
            if outage is not None and boot_time() < outage.look_at:
                step.no_later_than(outage.look_at)
                continue
            try:
                self._ask(store, LOOKING, lambda store=store: self.cycle.visit(store, step))  # type: ignore[misc]
            except Exception as error:  # whatever a driver raises: told, and answered with exit status 1
                self._store_is_away(store, LOOKING, error)
                self._look_after_trouble(step, self._away[store.lock.alias], error)
        self._tell_of_histories()
        done.claimed += step.claimed
        self.interrupted |= step.interrupted
        return step

    def _look_after_trouble(self, step: Step, outage: Outage, error: Exception) -> None:
        now = boot_time()
        silent = isinstance(error, StoreTimeout)
        # Each look at one that hangs costs the tasks of the other stores what it hangs.
        outage.hangs = silent and len(self.cycle.stores) > 1
        if self.is_service:
            outage.look_at = now + random.uniform(0.5, 1.0) * min(BACK_OFF, 0.5 * 2 ** min(outage.tries, 8))  # noqa: S311
            step.no_later_than(outage.look_at)
            return
        # Runs that are alive go on, and so does a pass whose call was cut: it may have claimed without being told. Else
        # the pass is over for this store, and cron starts the next.
        if self.cycle.running or (silent and now < self._began + self.settings.lease.total_seconds()):
            step.no_later_than(now + 1.0)
        if outage.hangs:
            outage.look_at = now + self.settings.heartbeat.total_seconds()

    def _look_in_pass(self, done: Pass) -> float | None:
        step = self._look(done)
        if self.interrupted:
            return None
        limit = self._began + PATIENCE.total_seconds()
        if self.cycle.hand_over is not None and self.subminute - step.paused:
            limit = self._began + self.cycle.hand_over.total_seconds()
            step.no_later_than(boot_time() + AHEAD.total_seconds() - 1.0)
        return step.within(limit)

    def _tell_paused(self) -> None:
        """Say to whoever asked a pass for more what is paused and due; it takes a question to each store, once."""
        stores = self.cycle.stores if self.cycle.explains and not self._paused_told else ()
        self._paused_told = True
        for store in stores:
            with suppress(Exception), self._store_call(store):  # what is wrong with a store, the look has told
                self.cycle.tell_paused(store)

    def _look_in_service(self, done: Pass) -> float:
        looked = boot_time()
        self.runner.check()
        self._ask_about_maintenance()
        step = self._look(done)
        step.no_later_than(looked + LOOK_EVERY)
        reset_queries()  # with DEBUG, a connection remembers each statement
        if self._store_time is None and self.cycle.first_look:
            self._store_time = (boot_time(), max(self.cycle.first_look.values()))
            self._tell_that_it_is_up()
        assert step.look_again_at is not None
        return step.look_again_at

    def _let_end(self, grace: float) -> None:
        """Claim nothing more, and keep what runs until it ends, or until the grace is over."""
        until: float | None = None
        told = False
        while self.cycle.running or self.cycle.unrecorded:
            if self.stopping and until is None:
                until = boot_time() + grace
                self.leave_by = until + STOP_GRACE + 1.0
                told = False
            if self.stopping > 1 or (until is not None and boot_time() >= until):
                self._end_all()
                break
            if not told and self.cycle.running:
                told = True
                within = "" if until is None else f" within {grace:g} s"
                self.cycle.tell("info", text=f"waiting for {self._what_runs()} to end{within}; nothing new is started")
            self._attend()
            self._tell_how_it_is()
            self._wait(until)
        self.notifier.say(stopping=1, status="stopped")

    def _in_turn(self) -> Sequence[Store]:
        """Return the stores, another one first each time: the first would have the slots before the others."""
        self._turn += 1
        first = self._turn % len(self.cycle.stores)
        return [*self.cycle.stores[first:], *self.cycle.stores[:first]]

    def _attend(self) -> None:
        """Renew what is due for renewal, record what has ended, and see that the runner is alive."""
        if self.cycle.running or not self.is_service:
            self.runner.check()
        if not self.cycle.running and not self.cycle.unrecorded:
            return
        for store in self.cycle.stores:
            mine = [running for running in self.cycle.running.values() if running.store is store]
            is_due = any(boot_time() >= self._renew_at(running) for running in mine)
            try:
                if is_due:
                    self._ask(store, KEEPING, lambda store=store: self._renew(store))  # type: ignore[misc]
                if boot_time() >= self._keep_at(store):
                    self._record_in(store)
            except Exception as error:  # the leases that cannot be renewed end at their deadline, in the runner
                self._store_is_away(store, KEEPING, error)
        self.cycle.forget_expired()
        self._tell_of_histories()

    def _renew(self, store: Store) -> None:
        point("before_renew")
        self.cycle.renew_in(store)
        point("after_renew")

    def _renew_at(self, running: Running) -> float:
        lease = running.claim.occurrence.lease.total_seconds()
        return max(running.until - lease + self._heartbeat(running), self._keep_at(running.store))

    def _keep_at(self, store: Store) -> float:
        """Return when the store may be asked to renew or record again: now, unless it is away."""
        outage = self._away.get(store.lock.alias)
        return 0.0 if outage is None else outage.keep_at

    def _heartbeat(self, running: Running) -> float:
        return min(self.settings.heartbeat.total_seconds(), running.claim.occurrence.lease.total_seconds() / 3)

    def _wait(self, look_at: float | None) -> bool:
        """Wait for the runner, at most until something else is due; tell whether a run has ended."""
        now = boot_time()
        until = min([now + 1.0, self.notifier.beat_at(now), *(map(self._renew_at, self.cycle.running.values()))])
        until = min([until, *(self._keep_at(finished.running.store) for finished in self.cycle.unrecorded)])
        if look_at is not None:
            until = min(until, look_at)
        messages = self.runner.poll(max(0.0, until - now))
        if not messages and not self.runner.can_end and (left := until - boot_time()) > 0:
            time.sleep(left)  # a runner that runs nothing of its own accord does not wait, either
        self.cycle.note(messages)
        if any(isinstance(message, Vanished) for message in messages):
            self._record()
            self._start_runner_anew()
            return True
        return bool(messages) and self._record()

    def _record(self) -> bool:
        """Record and release what has ended; tell whether anything had, and all of it was recorded."""
        had = bool(self.cycle.unrecorded)
        for store in self.cycle.stores:
            try:
                self._record_in(store)
            except Exception as error:  # kept in cycle.unrecorded, and tried again
                self._store_is_away(store, KEEPING, error)
        self._tell_of_histories()
        return had and not self.cycle.unrecorded

    def _record_in(self, store: Store) -> None:
        if any(finished.running.store is store for finished in self.cycle.unrecorded):
            self._ask(store, KEEPING, lambda: self.cycle.release_in(store))

    def _start_runner_anew(self) -> None:
        """Start the next runner after one that vanished with its runs: it tells of them, and takes what comes."""
        tries = RUNNER_TRIES if self.is_service else 1
        for number in range(1, tries + 1):
            try:
                self.watchdog.stop()
                for store in self.cycle.stores:
                    store.lock.close()
                close_connections()
                self.runner.start()
                return
            except Exception as error:  # a thread of the project's, which forbids a fork; no process to be had
                if number == tries or self.stopping:
                    self.crippled = True
                    trace = traceback.format_exc()
                    self.cycle.tell("trouble", doing="starting a runner", error=str(error), trace=trace)
                    return
            until = boot_time() + 2.0 ** (number - 1)
            while boot_time() < until and not self.stopping:
                self.notifier.beat(boot_time())
                time.sleep(0.1)

    def _end_all(self) -> None:
        """End every run, record it and free its lock; a second signal makes it short."""
        for owner in list(self.cycle.running):
            self.runner.end(owner, "stopping")
        deadline = boot_time() + STOP_GRACE
        hurried = False
        while (self.cycle.running or self.cycle.unrecorded) and boot_time() < deadline:
            if self.stopping > 1 and not hurried:
                hurried = True
                deadline = min(deadline, boot_time() + HURRY)
                for owner in list(self.cycle.running):
                    # KILL, and no grace; it was being stopped before, and that is how it is recorded.
                    self.runner.end(owner, "lost")
            self._attend()
            self._tell_how_it_is()
            self._wait(None)

    # -- what a service says of itself --------------------------------------------------------------------------------

    def _tell_that_it_is_up(self) -> None:
        tasks = [
            task
            for store in self.cycle.stores
            for task in store.declared.tasks.values()
            if is_meant_for(task, server=self.settings.server_name, environment=self.settings.environment)
        ]
        locks = sorted({task.lock for task in tasks})
        self._upcoming = Upcoming(tasks, self._now())
        of_locks = f", lock{'s' if len(locks) > 1 else ''} {', '.join(locks)}" if locks else ""
        tasks_ = f"{len(tasks)} task{'s' if len(tasks) != 1 else ''}"
        text = f"service on {self.settings.server_name}: {tasks_}{of_locks}"
        self.cycle.tell("note", text="; ".join([text, *self._what_is_next(ahead=True)]))
        self.notifier.say(ready=1)

    def _tell_how_it_is(self) -> None:
        """Give the service manager its sign of life, and say what the service is at."""
        while self.hangups:
            self.hangups -= 1
            self.cycle.tell(
                "info",
                text="SIGHUP changes nothing here: `manage.py schedule interrupt` has services end after their current "
                "runs, so that they are started with the new code",
            )
        if not self.notifier.address:
            return
        self.notifier.beat(boot_time())
        runs = f"running {self._what_runs()}" if self.cycle.running else "nothing runs"
        away = [f"the lock {alias!r} does not answer" for alias in self._away]
        if self.stopping or self.interrupted or self.crippled:
            if self.stopping:
                self.notifier.say(stopping=1)
            # Else the manager's own patience with a service that stops would end the runs.
            self.notifier.say(extend_timeout_usec=15_000_000)
            self.notifier.status("; ".join(["ending", runs, *away]))
        elif self._store_time is not None:
            self.notifier.status("; ".join([runs, *self._what_is_next(), *away]))

    def _what_runs(self) -> str:
        names = sorted(running.claim.occurrence.row for running in self.cycle.running.values())
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return ", ".join(names[:5]) + more

    def _what_is_next(self, *, ahead: bool = False) -> list[str]:
        """Say what is due next, and with ``ahead`` how soon, which is true for a second."""
        now = self._now()
        first = self._upcoming.first(now) if self._upcoming is not None else None
        if first is None:
            return []
        due_at, name = first
        return [f"next: {name} {logs.short(due_at)}" + (f" (in {logs.distance(due_at - now)})" if ahead else "")]

    def _now(self) -> datetime:
        assert self._store_time is not None
        at, said = self._store_time
        return said + timedelta(seconds=boot_time() - at)

    def _ask_about_maintenance(self) -> None:
        """Ask again whether the project is in maintenance mode; one that does not say so in time is as it was."""
        answer = conf.maintenance_mode()
        if not isinstance(answer, str) and not callable(answer):
            self.cycle.maintenance = bool(answer)
            return
        now = boot_time()
        if now < self._maintenance_at:
            return
        self._maintenance_at = now + LOOK_EVERY - 0.1
        for again in (False, True):
            try:
                with limited(MAINTENANCE_LIMIT):
                    self.cycle.maintenance = conf.is_in_maintenance(answer)
            except (Exception, SystemExit) as error:
                # What it used may be in any state. A connection that its server had closed is no trouble, though.
                for connection in connections.all(initialized_only=True):
                    if not connection.in_atomic_block:
                        connection.close()
                if isinstance(error, TookTooLong) or again:
                    self._tell_of_maintenance(error)
                    return
            else:
                self._maintenance_told = False
                return

    def _tell_of_maintenance(self, error: BaseException) -> None:
        """Say once that the project does not answer."""
        if not self._maintenance_told:
            self._maintenance_told = True
            taken = "on" if self.cycle.maintenance else "off"
            doing = f"asking whether the project is in maintenance mode, which is taken to be {taken}"
            self.cycle.tell("trouble", doing=doing, error=said(error), trace=traceback.format_exc())

    # -- the store ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _store_call(self, store: Store) -> Iterator[None]:
        """Watch the calls to a store: a hung one is cut early enough to reconnect and renew within the lease."""
        leases = [running.claim.occurrence.lease.total_seconds() for running in self.cycle.running.values()]
        lease = min(leases, default=self.settings.lease.total_seconds())
        limit = (lease * 5 / 6 - min(self.settings.heartbeat.total_seconds(), lease / 3)) / 3
        if not self.cycle.running and store.lock.transactional:
            limit = max(limit, 5.0)
        outage = self._away.get(store.lock.alias)
        if outage is not None and outage.hangs:
            limit = min(limit, 1.0)
        # A visit may hand tasks over from the other stores.
        calls: list[Hangs] = [store.history]
        calls += [each.lock for each in self.cycle.stores]
        self.notifier.beat(boot_time())
        with self.watchdog.watch(calls, limit):
            yield

    def _ask(self, store: Store, doing: str, ask: Callable[[], object]) -> None:
        """
        Call a store; once more, where that fails at first.

        A connection that its server has closed meanwhile is no outage: whatever is asked here may be asked again.
        """
        outage = self._away.get(store.lock.alias)
        for may_fail in (outage is None, False):
            try:
                with self._store_call(store):
                    ask()
                break
            except Exception as error:
                if isinstance(error, StoreTimeout) or not may_fail:
                    raise
                store.lock.close()
        if outage is None:
            return
        outage.failing.discard(doing)
        held = [*self.cycle.running.values(), *(finished.running for finished in self.cycle.unrecorded)]
        if not any(running.store is store for running in held):
            outage.failing.discard(KEEPING)
        if not outage.failing:
            del self._away[store.lock.alias]
            away = logs.distance(timedelta(seconds=boot_time() - outage.began))
            self.cycle.tell("info", text=f"the lock {store.lock.alias!r} answers again, after {away}")

    def _store_is_away(self, store: Store, doing: str, error: Exception) -> None:
        """Say it once, however often it is tried, and whatever else is said the next time."""
        self.broken = True
        store.lock.close()
        now = boot_time()
        outage = self._away.get(store.lock.alias)
        if outage is None:
            outage = self._away[store.lock.alias] = Outage(now)
            self.cycle.tell("trouble", doing=doing, error=said(error), trace=traceback.format_exc())
        outage.failing.add(doing)
        if doing == LOOKING:
            outage.tries += 1
        # A thirtieth of the lease leaves many tries before a run has to end.
        lease = self.settings.lease.total_seconds()
        outage.keep_at = now + random.uniform(0.5, 1.0) * min(1.0, max(0.2, lease / 30))  # noqa: S311 - jitter

    def _tell_of_histories(self) -> None:
        """Say once that a history cannot be written: the runs go on without it, and it is tried again."""
        for store in self.cycle.stores:
            if said := store.history.take_trouble():
                self.broken = True
                self.cycle.tell("trouble", doing="writing the history, which is tried again later", error=said)
            for line in store.history.take_dropped():
                self.cycle.tell("unrecorded", **line)

    def left(self, most: float, least: float) -> float:
        """Return how many seconds a step of the end may take: a service that was stopped has to be gone in time."""
        return most if self.leave_by is None else max(least, min(most, self.leave_by - boot_time()))

    def write_history(self) -> None:
        """Write what has not been written of any history, at the end; say what is not recorded then."""
        for store in self.cycle.stores:
            for line in self._flush(store):
                self.cycle.tell("unrecorded", **line)

    def _flush(self, store: Store) -> list[dict[str, Any]]:
        """Write what has not been written of one history; return what is not recorded then."""
        try:
            with self.watchdog.watch([store.history], self.left(HISTORY_GRACE, 1.0)):
                return store.history.flush()
        except Exception as error:  # never worth more than the pass itself
            self.cycle.tell("trouble", doing="writing the history", error=f"{type(error).__name__}: {error}")
            return store.history.unwritten()


def close_connections() -> None:
    """Let nothing that a schedule.py opened cross the fork; refuse to go on inside somebody's transaction."""
    for connection in connections.all(initialized_only=True):
        if connection.in_atomic_block:
            raise UnsafeTransaction(
                f"runschedule was called inside a transaction on the database {connection.alias!r}. Call it outside, "
                "or run what is due inline: multiserver_schedule.testing.run_due()."
            )
        connection.close()
        close_pool = getattr(connection, "close_pool", None)
        if close_pool is not None:
            close_pool()
    caches.close_all()


def said(error: BaseException) -> str:
    """Return an error as text, with what to do where our tables are missing."""
    text = f"{type(error).__name__}: {error}".strip()
    return f"{text} {MIGRATE}" if lacks_table(error) else text
