"""
How a pass or a service is composed, started and left: ``run_once`` as cron starts it, ``run_forever`` as systemd does.

It forks the runner before it has a connection, takes over the signals of the process, and leaves nothing running.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, Final, TextIO

from django.utils.module_loading import import_string

from . import conf, logs
from .cycle import Cycle, NotStarted, Store
from .declare import Discovered, discover, registry, verify
from .due import Policy, is_meant_for
from .entries import ScheduledTask
from .exceptions import StoreTimeout
from .history import Afterwards, History
from .keeper import Keeper, Pass, close_connections
from .locks.base import BaseLock, Declarations
from .notify import Notifier
from .run.base import Runner
from .run.child import main_spawned
from .run.handle import ProcessRunner, usable_mode
from .run.inline import InlineRunner

HAND_OVER: Final = timedelta(seconds=62)
"""How long a pass with sub-minute tasks stays: until the next minute's pass has certainly looked."""
REPORTS_GRACE: Final = 12.0
"""Seconds that the end of a pass waits for receivers and log handlers that have not finished."""
GRACE: Final = 20.0
"""Seconds that a stopped service gives its runs: with STOP_GRACE that fits into the 30 that containers are given."""
SLOW_START: Final = timedelta(seconds=2)
"""How late a service may be with a task that does not catch up."""
_CHILD: Final = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from django.core.management import execute_from_command_line
execute_from_command_line(["manage.py", "runschedule", "--child", *sys.argv[2:]])
"""


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

    Discovers the declarations, forks the runner before the first connection is opened, and leaves nothing running. Why
    that task was not started is not said here, but returned; and which run of it was this one.
    """
    settings = conf.load()
    found = found or discover()
    tasks = registry.tasks
    teller = tell(verbosity, stdout, news=1 if trigger is None else 2)
    if trigger is None and all(task.is_housekeeping for task in tasks.values()):
        teller({"kind": "note", "text": nothing_declared(found)})
        return Pass()
    with _composed(settings, tasks, teller, inline=inline) as keeper:
        if trigger is None:
            done = keeper.one_pass()
        else:
            ran = keeper.by_hand(tasks[trigger])
            if isinstance(ran, NotStarted):
                done = Pass(status=1, why_not=f"{ran.why}; try again" if ran.is_passing else ran.why)
            else:
                # A run whose own conditions say no has done what it should.
                went_well = ran.outcome is not None and ran.outcome.status in ("succeeded", "skipped")
                done = Pass(status=0 if went_well else 1, claimed=1, ran=ran)
                if ran.was_filtered and verbosity == 1:
                    # Beyond that, the skip itself is told.
                    keeper.cycle.tell("note", text=f"{ran.row} was not run: its own conditions said no.")
        keeper.write_history()
    return done


@contextmanager
def hand(*, stdout: TextIO | None = None) -> Iterator[Keeper]:
    """Lend a keeper that runs tasks ``by_hand``, one after another, and says nothing of them; leave nothing running."""
    discover()
    with _composed(conf.load(), registry.tasks, tell(0, stdout), inline=False) as keeper:
        yield keeper
        keeper.write_history()


def run_forever(
    *,
    grace: float = GRACE,
    verbosity: int = 1,
    inline: bool = False,
    stdout: TextIO | None = None,
    found: Discovered | None = None,
) -> Pass:
    """
    Run what comes due until SIGTERM, SIGINT or an interrupt: a service, as systemd or a container starts it.

    On a signal nothing more is claimed, and what runs has ``grace`` seconds to come to its end; then it is ended, and
    recorded so. The status is 0 however the runs went, and 1 where the service had to give up.
    """
    notifier = Notifier.take(os.environ)
    settings = conf.load()
    found = found or discover()
    teller = tell(verbosity, stdout)
    if all(task.is_housekeeping for task in registry.tasks.values()):
        # It stays all the same: ending, it would only be started again.
        teller({"kind": "note", "text": nothing_declared(found)})
    with _composed(settings, registry.tasks, teller, inline=inline, notifier=notifier) as keeper:
        done = keeper.forever(grace)
        keeper.write_history()
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


def tell(verbosity: int, stdout: TextIO | None = None, *, news: int = 1) -> logs.Teller:
    """Return what delivers events in this process, and says what is registered from the verbosity ``news`` on."""
    return logs.Teller(tasks=lambda: registry.tasks, verify=verify, verbosity=verbosity, stdout=stdout, news=news)


def nothing_declared(found: Discovered) -> str:
    """Say which modules were searched in vain, and what to write."""
    where = ", ".join(found.searched) or "no module at all: no app is installed"
    return f"No task is declared. Searched: {where}. Declare one in a schedule.py, or see the README."


@contextmanager
def _composed(
    settings: conf.Settings,
    tasks: Mapping[str, ScheduledTask],
    teller: logs.Teller,
    *,
    inline: bool,
    notifier: Notifier | None = None,
) -> Iterator[Keeper]:
    """Compose a keeper, of a service where there is a notifier, start its runner, and leave nothing of them."""
    is_service = notifier is not None
    # The project's own, which may well ask a database: before anything is forked.
    maintenance = is_service or conf.is_in_maintenance(settings.maintenance_mode)
    composed = stores(settings, tasks)
    mode = "inline" if inline else usable_mode(settings.runner)
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
        close_connections()
        for store in composed:
            # Here the connections are the lock's alone: what runs has its own.
            store.lock.bound(settings.lease / 3)
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
        policy=dataclasses.replace(policy, slow_start=SLOW_START) if is_service else policy,
        maintenance=maintenance,
        explains=teller.verbosity > 1,
        hand_over=None if is_service else HAND_OVER,
    )
    subminute = frozenset(
        task.lock
        for task in tasks.values()
        if task.timetable.is_subminute
        and is_meant_for(task, server=settings.server_name, environment=settings.environment)
    )
    keeper = Keeper(
        cycle=cycle, settings=settings, subminute=subminute, is_service=is_service, notifier=notifier or Notifier()
    )
    before = _catch_signals(keeper)
    try:
        runner.start()
        yield keeper
    finally:
        runner.close(0.5 if keeper.stopping > 1 else keeper.left(REPORTS_GRACE, 1.0))
        keeper.watchdog.stop()
        _restore_signals(before)
        for store in composed:
            store.lock.close()


def _catch_signals(keeper: Keeper) -> Sequence[tuple[int, Any]]:
    """Let TERM and INT end the pass or service cleanly, and ALRM break a store call off."""
    if threading.current_thread() is not threading.main_thread():
        return []

    def stop(number: int, frame: FrameType | None) -> None:
        keeper.stopping += 1

    def cut(number: int, frame: FrameType | None) -> None:
        # Only inside a call to the store: raised in between, it could have a message to the runner sent twice.
        calling = any(store.lock.is_calling or store.history.is_calling for store in keeper.cycle.stores)
        if keeper.watchdog.watching and calling:
            raise StoreTimeout("The lock's store did not answer in time, and there was no connection to cut.")

    def hang_up(number: int, frame: FrameType | None) -> None:
        keeper.hangups += 1

    handlers = [(signal.SIGTERM, stop), (signal.SIGINT, stop)]
    # Under nohup it is ignored, and shall be.
    if keeper.is_service and hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        handlers.append((signal.SIGHUP, stop if _has_terminal() else hang_up))
    if hasattr(signal, "SIGALRM"):
        handlers.append((signal.SIGALRM, cut))
    return [(number, signal.signal(number, handler)) for number, handler in handlers]


def _has_terminal() -> bool:
    """Was this started in a terminal, which says by SIGHUP that it is gone?"""
    with suppress(Exception):
        return sys.stdin.isatty()
    return False


def _restore_signals(before: Sequence[tuple[int, Any]]) -> None:
    for number, handler in before:
        signal.signal(number, handler)
