"""
The keeper: tick → cycle → renew → stop. It owns the clock, the signals of the process, and the patience with the store.

It runs no user code and forks nothing once it has a connection. ``run_once`` is one pass, as cron starts it.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any, Final, Protocol, TextIO

from django.core.cache import caches
from django.db import connections
from django.utils.module_loading import import_string

from . import conf, logs
from .cycle import AHEAD, Cycle, Running, Step, Store
from .declare import Discovered, discover, registry, verify
from .due import Policy, is_meant_for, manual
from .entries import Row, ScheduledTask
from .exceptions import StoreTimeout, UnsafeTransaction
from .faults import point
from .history import Afterwards, History
from .locks.base import BaseLock, Declarations
from .run.base import Runner, Vanished, boot_time
from .run.child import main_spawned
from .run.handle import ProcessRunner, usable_mode
from .run.inline import InlineRunner

PATIENCE: Final = timedelta(seconds=55)
"""How long a pass with nothing running waits for a free slot or the end of a break: then its successor is there."""
HAND_OVER: Final = timedelta(seconds=62)
"""How long a pass with sub-minute tasks stays: until the next minute's pass has certainly looked."""
STOP_GRACE: Final = 8.0
"""Seconds that a stopped pass gives its runs: TERM at once, KILL after five, and time to record it."""
HURRY: Final = 1.5
"""Seconds for the same after a second signal: KILL at once, and time to record it."""
HISTORY_GRACE: Final = 5.0
"""Seconds that the end of a pass waits for a database to take what it has not recorded."""
REPORTS_GRACE: Final = 12.0
"""Seconds that the end of a pass waits for receivers and log handlers that have not finished."""

_CHILD: Final = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from django.core.management import execute_from_command_line
execute_from_command_line(["manage.py", "runschedule", "--child", *sys.argv[2:]])
"""


# -- composing --------------------------------------------------------------------------------------------------------


def stores(settings: conf.Settings, tasks: Mapping[str, ScheduledTask]) -> list[Store]:
    """
    Return the stores of the settings, each with the tasks that are locked in it.

    One that no task is locked in, or none any more, is there as well: what is stale in it is freed, and what is moved
    out of it is handed over.
    """
    server = settings.server_name
    found = []
    for alias, chosen in settings.locks.items():
        locked = {name: task for name, task in tasks.items() if task.lock == alias}
        lock: BaseLock = import_string(chosen.backend)(alias, chosen.options)
        digest, server_digest = registry.digests(server, locked)
        found.append(
            Store(
                lock=lock,
                history=History(lock.using) if lock.transactional else Afterwards(lock.using),
                declared=Declarations(tasks=locked, server=server, digest=digest, server_digest=server_digest),
            )
        )
    return found


def is_in_maintenance(settings: conf.Settings) -> bool:
    """Ask the project whether it is in maintenance mode: a bool, a callable, or the dotted path of one."""
    answer = settings.maintenance_mode
    if isinstance(answer, str):
        answer = import_string(answer)
    return bool(answer() if callable(answer) else answer)


@dataclass(slots=True)
class Pass:
    """How one pass went."""

    status: int = 0
    """0: all ran well or nothing was due. 1: a run failed or the store is broken."""
    claimed: int = 0


# -- the keeper -------------------------------------------------------------------------------------------------------


class Hangs(Protocol):
    """What the watchdog can break off."""

    @property
    def is_calling(self) -> bool:
        """Is a call under way?"""

    def cut(self) -> bool:
        """Break it off, from another thread; False when there is nothing to break."""


class Watchdog:
    """
    Cuts a store call that hangs, from a thread of its own: a driver waiting in C answers no signal.

    The thread exists only once there is a first call to watch, which is after the runner was forked.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._call: tuple[Sequence[Hangs], float, int] | None = None
        self._number = 0
        self._cut = False
        self._thread: threading.Thread | None = None
        self._over = False

    @property
    def watching(self) -> bool:
        """Is a call under way?"""
        return self._call is not None

    @contextmanager
    def watch(self, calls: Sequence[Hangs], limit: float) -> Iterator[None]:
        """Let the block take at most ``limit`` seconds; then the call to one of them is cut: StoreTimeout."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="schedule-watchdog", daemon=True)
            self._thread.start()
        with self._condition:
            self._number += 1
            self._cut = False
            self._call = (calls, boot_time() + limit, self._number)
            self._condition.notify()
        try:
            yield
        except Exception as error:
            if self._cut and not isinstance(error, StoreTimeout):
                raise StoreTimeout(
                    f"The lock's store did not answer within {limit:.1f} s; the call was cut."
                ) from error
            raise
        finally:
            with self._condition:
                self._call = None

    def stop(self) -> None:
        """End the thread, before a fork; the next call to watch starts another."""
        if self._thread is not None:
            with self._condition:
                self._over = True
                self._condition.notify()
            self._thread.join()
            self._thread, self._over = None, False

    def _run(self) -> None:
        with self._condition:
            while not self._over:
                call = self._call
                if call is None:
                    self._condition.wait()
                    continue
                calls, deadline, number = call
                left = deadline - boot_time()
                if left > 0:
                    self._condition.wait(min(left, 1.0))
                    continue
                self._cut = True
                if not any(each.cut() for each in calls):
                    # No socket yet, or none at all: interrupt whatever Python is in between.
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
                if self._call is not None and self._call[2] == number:
                    self._call = (calls, boot_time() + 0.5, number)


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
    subminute: bool = False
    """Is a task declared, and meant for this server, that is due more than once a minute?"""
    _turn: int = -1
    _trouble: dict[str, str] = field(default_factory=dict)
    """By the alias of a store that is away: what was said of it."""
    _hung: dict[str, float] = field(default_factory=dict)
    """By the alias of a store that was silent: until when the others go first."""

    @property
    def runner(self) -> Runner:
        """Whoever runs the claims."""
        return self.cycle.runner

    def one_pass(self) -> Pass:
        """Run what is due, wait for it, and say how it went."""
        done = Pass()
        began = boot_time()
        look_at: float | None = began
        self.runner.check()
        while True:
            if self.stopping or self.interrupted or self.crippled:
                look_at = None
            if look_at is not None and boot_time() >= look_at:
                look_at = self._look(done, began)
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

    def manual_run(self, name: str) -> tuple[Pass, str]:
        """Run one task now, under the same lock; return how it went, and who holds it when it could not start."""
        done = Pass()
        for store in self.cycle.stores:
            task = store.declared.tasks.get(name)
            if task is None:
                continue
            server = self.settings.server_name
            with self._store_call(store):
                look = store.lock.look(store.declared)
                if not look.known:
                    self.cycle.sync(store)
                if look.expired:
                    for cleanup in store.lock.reap(server=server, record=store.history.cleaned):
                        self.cycle.tell_cleanup(store, cleanup)
                rows = store.lock.rows([task.row_name(server)])
                if not rows:
                    return done, "its row is gone from the lock's table; restore it from a backup, or rename the task"
                row = rows[0]
                sent = boot_time()
                wanted = manual(task, row, look.now, self.cycle.policy)
                claims = store.lock.claim([wanted], server=server, record=store.history.started)
            if not claims:
                return done, _why_not(store.lock.rows([row.task])[0])
            self.cycle.start(store, claims[0], sent)
            done.claimed = 1
        while (self.cycle.running or self.cycle.unrecorded) and not self.stopping:
            self._attend()
            self._wait(None)
        if self.stopping:
            self._end_all()
        if self.broken or self.cycle.failures or self.cycle.running or self.cycle.unrecorded:
            done.status = 1
        return done, ""

    # -- one turn -----------------------------------------------------------------------------------------------------

    def _look(self, done: Pass, began: float) -> float | None:
        step = Step()
        for store in self._in_turn():
            not_before = self._hung.get(store.lock.alias, 0.0)
            if boot_time() < not_before:
                step.no_later_than(not_before)
                continue
            try:
                with self._store_call(store):
                    self.cycle.visit(store, step)
                self._trouble.pop(store.lock.alias, None)
                self._hung.pop(store.lock.alias, None)
            except Exception as error:  # whatever a driver raises: told, and answered with exit status 1
                self._store_is_away(store, "looking for what is due", error)
                # Runs that are alive go on, and so does a pass whose call was cut: it may have claimed without being
                # told. Else the pass is over for this store, and cron starts the next.
                is_cut = isinstance(error, StoreTimeout) and boot_time() < began + self.settings.lease.total_seconds()
                if self.cycle.running or is_cut:
                    step.no_later_than(boot_time() + 1.0)
                if isinstance(error, StoreTimeout) and len(self.cycle.stores) > 1:
                    # Each look at it costs the tasks of the other stores what it hangs.
                    self._hung[store.lock.alias] = boot_time() + self.settings.heartbeat.total_seconds()
        self._tell_of_histories()
        done.claimed += step.claimed
        if step.interrupted:
            self.interrupted = True
            return None
        limit = began + PATIENCE.total_seconds()
        if self.subminute and not step.paused:
            limit = began + HAND_OVER.total_seconds()
            step.no_later_than(boot_time() + AHEAD.total_seconds() - 1.0)
        if step.look_again_at is None or step.look_again_at > limit:
            # Later than this is the next pass's business; what runs is waited for.
            return None
        return step.look_again_at

    def _in_turn(self) -> Sequence[Store]:
        """Return the stores, another one first each time: the first would have the slots before the others."""
        self._turn += 1
        first = self._turn % len(self.cycle.stores)
        return [*self.cycle.stores[first:], *self.cycle.stores[:first]]

    def _attend(self) -> None:
        """Renew what is due for renewal, record what has ended, and see that the runner is alive."""
        self.runner.check()
        if not self.cycle.running and not self.cycle.unrecorded:
            return
        for store in self.cycle.stores:
            mine = [running for running in self.cycle.running.values() if running.store is store]
            is_ended = any(finished.running.store is store for finished in self.cycle.unrecorded)
            is_due = any(boot_time() >= self._renew_at(running) for running in mine)
            if not is_due and not is_ended:
                continue
            try:
                if is_due:
                    with self._store_call(store):
                        point("before_renew")
                        self.cycle.renew_in(store)
                        point("after_renew")
                if is_ended:
                    with self._store_call(store):
                        self.cycle.release_in(store)
                self._trouble.pop(store.lock.alias, None)
            except Exception as error:  # the leases that cannot be renewed end at their deadline, in the runner
                self._store_is_away(store, "renewing and recording", error)
        self.cycle.forget_expired()
        self._tell_of_histories()

    def _renew_at(self, running: Running) -> float:
        lease = running.claim.occurrence.lease.total_seconds()
        return running.until - lease + self._heartbeat(running)

    def _heartbeat(self, running: Running) -> float:
        return min(self.settings.heartbeat.total_seconds(), running.claim.occurrence.lease.total_seconds() / 3)

    def _wait(self, look_at: float | None) -> bool:
        """Wait for the runner, at most until something else is due; tell whether a run has ended."""
        now = boot_time()
        until = min([now + 1.0, *(self._renew_at(running) for running in self.cycle.running.values())])
        if look_at is not None:
            until = min(until, look_at)
        if self._trouble:
            until = max(until, now + 0.2)
        messages = self.runner.poll(max(0.0, until - now))
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
                with self._store_call(store):
                    self.cycle.release_in(store)
            except Exception as error:  # kept in cycle.unrecorded, and tried again
                self._store_is_away(store, "recording a run", error)
        self._tell_of_histories()
        return had and not self.cycle.unrecorded

    def _start_runner_anew(self) -> None:
        """Start the next runner after one that vanished with its runs: it tells of them, and takes what comes."""
        try:
            self.watchdog.stop()
            for store in self.cycle.stores:
                store.lock.close()
            _close_connections()
            self.runner.start()
        except Exception as error:  # a thread of the project's, which forbids a fork; no process to be had
            self.crippled = True
            self.cycle.tell("trouble", doing="starting a runner", error=str(error), trace=traceback.format_exc())

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
            self._wait(None)

    # -- the store ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _store_call(self, store: Store) -> Iterator[None]:
        """Watch the calls to a store: a hung one is cut early enough to reconnect and renew within the lease."""
        leases = [running.claim.occurrence.lease.total_seconds() for running in self.cycle.running.values()]
        lease = min(leases, default=self.settings.lease.total_seconds())
        limit = (lease * 5 / 6 - min(self.settings.heartbeat.total_seconds(), lease / 3)) / 3
        if not self.cycle.running and store.lock.transactional:
            limit = max(limit, 5.0)
        if store.lock.alias in self._hung:
            limit = min(limit, 1.0)
        # A visit may hand tasks over from the other stores.
        calls: list[Hangs] = [store.history]
        calls += [each.lock for each in self.cycle.stores]
        with self.watchdog.watch(calls, limit):
            yield

    def _store_is_away(self, store: Store, doing: str, error: Exception) -> None:
        self.broken = True
        store.lock.close()
        said = f"{type(error).__name__}: {error}".strip()
        if said != self._trouble.get(store.lock.alias):
            self._trouble[store.lock.alias] = said
            self.cycle.tell("trouble", doing=doing, error=said, trace=traceback.format_exc())

    def _tell_of_histories(self) -> None:
        """Say once that a history cannot be written: the runs go on without it, and it is tried again."""
        for store in self.cycle.stores:
            if said := store.history.take_trouble():
                self.broken = True
                self.cycle.tell("trouble", doing="writing the history, which is tried again later", error=said)
            for line in store.history.take_dropped():
                self.cycle.tell("unrecorded", **line)

    def write_history(self) -> None:
        """Write what has not been written of any history, at the end; say what is not recorded then."""
        for store in self.cycle.stores:
            try:
                with self.watchdog.watch([store.history], HISTORY_GRACE):
                    left = store.history.flush()
            except Exception as error:  # never worth more than the pass itself
                self.cycle.tell("trouble", doing="writing the history", error=f"{type(error).__name__}: {error}")
                left = store.history.unwritten()
            for line in left:
                self.cycle.tell("unrecorded", **line)


# -- what the command calls -------------------------------------------------------------------------------------------


def run_once(
    *,
    verbosity: int = 1,
    inline: bool = False,
    stdout: TextIO | None = None,
    trigger: str | None = None,
    found: Discovered | None = None,
) -> Pass:
    """
    Run what is due now, once, and wait for it; or, with ``trigger``, that one task, due or not.

    Discovers the declarations, forks the runner before the first connection is opened, and leaves nothing running.
    """
    settings = conf.load()
    found = found or discover()
    tasks = registry.tasks
    teller = tell(verbosity, stdout)
    if not tasks:
        teller({"kind": "note", "text": nothing_declared(found)})
        return Pass()
    mode = "inline" if inline else usable_mode(settings.runner)
    keeper = _compose(settings, tasks, teller, mode)
    before = _catch_signals(keeper)
    held = ""
    try:
        keeper.runner.start()
        if trigger is None:
            done = keeper.one_pass()
        else:
            done, held = keeper.manual_run(trigger)
        keeper.write_history()
    finally:
        keeper.runner.close(0.5 if keeper.stopping > 1 else REPORTS_GRACE)
        keeper.watchdog.stop()
        _restore_signals(before)
        for store in keeper.cycle.stores:
            store.lock.close()
    if held:
        teller({"kind": "note", "text": f"{trigger} was not started: {held}."})
        done.status = 1
    return done


def child(*, verbosity: int) -> None:
    """Be the process of one spawned run, or the reporter: what ``runschedule --child`` is for. Does not return."""

    def tasks() -> Mapping[str, ScheduledTask]:
        discover()
        return registry.tasks

    main_spawned(tasks, logs.Teller(tasks=tasks, verify=verify, verbosity=verbosity))


def child_command(verbosity: int) -> list[str]:
    """Return what starts a process of this project: with this one's search path, wherever manage.py and the cwd are."""
    return [sys.executable, "-c", _CHILD, json.dumps(sys.path), f"--verbosity={verbosity}"]


def tell(verbosity: int, stdout: TextIO | None = None) -> logs.Teller:
    """Return what delivers events in this process."""
    return logs.Teller(tasks=lambda: registry.tasks, verify=verify, verbosity=verbosity, stdout=stdout)


def nothing_declared(found: Discovered) -> str:
    """Say which modules were searched in vain, and what to write."""
    where = ", ".join(found.searched) or "no module at all: no app is installed"
    return f"No task is declared. Searched: {where}. Declare one in a schedule.py, or see the README."


def _compose(settings: conf.Settings, tasks: Mapping[str, ScheduledTask], teller: logs.Teller, mode: str) -> Keeper:
    composed = stores(settings, tasks)
    runner: Runner
    keeper: Keeper
    if mode == "inline":
        runner = InlineRunner(
            tasks,
            deliver=teller,
            server=settings.server_name,
            keep_alive=lambda: keeper.cycle.renew(),
            heartbeat=settings.heartbeat.total_seconds(),
        )
    else:
        _close_connections()
        runner = ProcessRunner(
            tasks,
            deliver=teller,
            mode="fork" if mode == "fork" else "spawn",
            server=settings.server_name,
            heartbeat=settings.heartbeat.total_seconds(),
            child_command=child_command(teller.verbosity),
        )
    policy = Policy(lease=settings.lease, min_break=settings.min_break, catch_up=settings.catch_up)
    cycle = Cycle(
        stores=composed,
        runner=runner,
        settings=settings,
        policy=policy,
        maintenance=is_in_maintenance(settings),
        hand_over=HAND_OVER,
    )
    subminute = any(
        task.timetable.is_subminute
        and is_meant_for(task, server=settings.server_name, environment=settings.environment)
        for task in tasks.values()
    )
    keeper = Keeper(cycle=cycle, settings=settings, subminute=subminute)
    return keeper


def _why_not(row: Row) -> str:
    """Say why a run that somebody asked for was not started."""
    if row.owner is not None:
        return f"held by {row.server} since {logs.short(row.acquired_at)}"
    if row.moved_from:
        return f"its last run in the lock {row.moved_from!r} has not ended"
    if row.moved_to:
        return f"it is in the lock {row.moved_to!r} now"
    return f"its lock's store is new or has lost data, and lets nobody start before {logs.short(row.not_before)}"


def _close_connections() -> None:
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


def _catch_signals(keeper: Keeper) -> Sequence[tuple[int, Any]]:
    """Let TERM and INT end the pass cleanly, and ALRM break a store call off."""
    if threading.current_thread() is not threading.main_thread():
        return []

    def stop(number: int, frame: FrameType | None) -> None:
        keeper.stopping += 1

    def cut(number: int, frame: FrameType | None) -> None:
        # Only inside a call to the store: raised in between, it could have a message to the runner sent twice.
        calling = any(store.lock.is_calling or store.history.is_calling for store in keeper.cycle.stores)
        if keeper.watchdog.watching and calling:
            raise StoreTimeout("The lock's store did not answer in time, and there was no connection to cut.")

    handlers = [(signal.SIGTERM, stop), (signal.SIGINT, stop)]
    if hasattr(signal, "SIGALRM"):
        handlers.append((signal.SIGALRM, cut))
    return [(number, signal.signal(number, handler)) for number, handler in handlers]


def _restore_signals(before: Sequence[tuple[int, Any]]) -> None:
    for number, handler in before:
        signal.signal(number, handler)
