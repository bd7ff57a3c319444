"""A service by hand: days of it in seconds, on a clock that is passed in, with a runner that runs nothing."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import OperationalError, ProgrammingError, connection
from django.test.utils import override_settings

from multiserver_schedule import conf, cycle, keeper, logs, service
from multiserver_schedule.cron import Cron, Every
from multiserver_schedule.cycle import Cycle
from multiserver_schedule.cycle import Store as Locked
from multiserver_schedule.due import Policy
from multiserver_schedule.entries import Claim, Outcome, ScheduledTask
from multiserver_schedule.exceptions import StoreTimeout
from multiserver_schedule.history import History
from multiserver_schedule.keeper import Keeper, Pass, Upcoming
from multiserver_schedule.locks.base import Declarations
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.models import ScheduledLock, ScheduledRun, ScheduleState
from multiserver_schedule.notify import Notifier
from multiserver_schedule.run import runner as run_runner
from multiserver_schedule.run.base import Ended, Event, Message, Runner, Vanished
from multiserver_schedule.testing.contract import THREE, a_task, declare

from .run_support import running

pytestmark = pytest.mark.django_db(transaction=True)

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
MINUTELY = Cron("* * * * *", "UTC")
NEVER = Cron("0 0 1 1 *", "UTC")


class TimedLock(ORMLock):
    """The lock in the database, by the stage's clock; it can be taken away, and its clock can go wrong."""

    def __init__(self, stage: Stage, alias: str = "default") -> None:
        super().__init__(alias, {"using": "default"})
        self.stage = stage
        self.away: Callable[[], Exception] | None = None
        self.broken_once: Exception | None = None
        self.calls: list[tuple[float, str]] = []
        self.wrong_by = timedelta(0)

    def _timed(self, name: str, *args: Any, **more: Any) -> Any:
        self.calls.append((self.stage.boot, name))
        if self.broken_once is not None:
            error, self.broken_once = self.broken_once, None
            raise error
        if self.away is not None:
            raise self.away()
        return getattr(super(), name)(*args, **{**more, "now": self.stage.now + self.wrong_by})

    def look(self, *args: Any, **more: Any) -> Any:
        return self._timed("look", *args, **more)

    def sync(self, *args: Any, **more: Any) -> Any:
        return self._timed("sync", *args, **more)

    def claim(self, *args: Any, **more: Any) -> Any:
        return self._timed("claim", *args, **more)

    def skip(self, *args: Any, **more: Any) -> Any:
        return self._timed("skip", *args, **more)

    def renew(self, *args: Any, **more: Any) -> Any:
        return self._timed("renew", *args, **more)

    def release(self, *args: Any, **more: Any) -> Any:
        return self._timed("release", *args, **more)

    def reap(self, *args: Any, **more: Any) -> Any:
        return self._timed("reap", *args, **more)

    def times_of(self, name: str) -> list[float]:
        return [at for at, called in self.calls if called == name]


class Acted(Runner):
    """Runs take as long as the stage says; waiting for them is what lets its time go on."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.ends: dict[str, float] = {}
        self.claims: dict[str, Claim] = {}
        self.started: list[tuple[str, float]] = []
        self.ended: list[tuple[str, str, float]] = []
        self.starts = 0
        self.cannot_start = 0
        self.vanished = False

    def start(self) -> None:
        self.starts += 1
        if self.cannot_start:
            self.cannot_start -= 1
            raise OSError("no process to be had")

    def run(self, claim: Claim, *, until: float, finish_by: float | None) -> None:
        self.claims[claim.owner] = claim
        self.ends[claim.owner] = self.stage.boot + self.stage.duration(claim)
        self.started.append((claim.occurrence.row, (self.stage.now - claim.occurrence.due_at).total_seconds()))

    def renew(self, until: Mapping[str, float]) -> None: ...

    def end(self, owner: str, why: str) -> None:
        self.ended.append((self.claims[owner].occurrence.row, why, self.stage.boot))
        if why != "stopping" or not self.stage.stubborn:
            self.ends[owner] = self.stage.boot

    def report(self, event: Event) -> None:
        self.stage.told.append(dict(event))

    def poll(self, timeout: float) -> list[Message]:
        if self.vanished:
            self.vanished = False
            owners, self.ends = tuple(self.ends), {}
            return [Vanished(owners, "killed")]
        # Now and then a process wakes up late.
        until = self.stage.boot + min(timeout, 1.0) + (0.001 if timeout else 0.0005)
        self.stage.go_on(min([until, *(max(end, self.stage.boot) for end in self.ends.values())]))
        over = [owner for owner, end in self.ends.items() if end <= self.stage.boot]
        for owner in over:
            del self.ends[owner]
        return [Ended(owner, self.stage.outcome(self.claims.pop(owner)), told=True) for owner in over]

    def check(self) -> None: ...
    def close(self, timeout: float) -> None: ...


class Stage:
    """One service, its time and what happens when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.boot = 1000.0
        self.now = THREE - timedelta(seconds=30)
        self.told: list[dict[str, Any]] = []
        self.duration: Callable[[Claim], float] = lambda claim: 0.05
        self.outcome: Callable[[Claim], Outcome] = lambda claim: Outcome(status="succeeded")
        self.stubborn = False
        self.script: list[tuple[float, Callable[[], object]]] = []
        self.locks = [TimedLock(self)]
        self.runner = Acted(self)
        self.keeper: Keeper
        monkeypatch.setattr(keeper, "boot_time", lambda: self.boot)
        monkeypatch.setattr(cycle, "boot_time", lambda: self.boot)
        monkeypatch.setattr(keeper, "time", SimpleNamespace(sleep=lambda seconds: self.go_on(self.boot + seconds)))

    @property
    def lock(self) -> TimedLock:
        return self.locks[0]

    def go_on(self, until: float) -> None:
        """Let time go on, and what is to happen by then happen."""
        while self.script and self.script[0][0] <= until:
            at, act = self.script.pop(0)
            self._set(max(at, self.boot))
            act()
        self._set(max(until, self.boot))

    def _set(self, boot: float) -> None:
        self.now += timedelta(seconds=boot - self.boot)
        self.boot = boot

    def at(self, seconds: float, act: Callable[[], object]) -> None:
        """Have this happen so long after now, when the service begins."""
        self.script.append((self.boot + seconds, act))
        self.script.sort(key=lambda item: item[0])

    def serves(
        self,
        *tasks: ScheduledTask,
        seconds: float,
        grace: float = 20.0,
        settings: conf.Settings | None = None,
        notifier: Notifier | None = None,
    ) -> int:
        """Be a service for so long, then be told to stop; return the exit status."""
        settings = settings or conf.Settings(server_name="web1")

        def declared(alias: str) -> Declarations:
            return declare(*(task for task in tasks if task.lock == alias))

        stores = [Locked(lock=lock, history=History("default"), declared=declared(lock.alias)) for lock in self.locks]
        of_cycle = Cycle(
            stores=stores, runner=self.runner, settings=settings, policy=Policy(slow_start=service.SLOW_START)
        )
        self.keeper = Keeper(cycle=of_cycle, settings=settings, is_service=True, notifier=notifier or Notifier())
        self.at(seconds, self.stop)
        try:
            return self.keeper.forever(grace).status
        finally:
            self.keeper.watchdog.stop()

    def passes(self, *tasks: ScheduledTask) -> int:
        """Be the pass that cron starts now; return the exit status."""
        settings = conf.Settings(server_name="web1")
        stores = [
            Locked(
                lock=lock,
                history=History("default"),
                declared=declare(*(task for task in tasks if task.lock == lock.alias)),
            )
            for lock in self.locks
        ]
        of_cycle = Cycle(
            stores=stores, runner=self.runner, settings=settings, policy=Policy(), hand_over=service.HAND_OVER
        )
        subminute = frozenset(task.lock for task in tasks if task.timetable.is_subminute)
        self.keeper = Keeper(cycle=of_cycle, settings=settings, subminute=subminute, _began=self.boot)
        try:
            return self.keeper.one_pass().status
        finally:
            self.keeper.watchdog.stop()

    def stop(self) -> None:
        self.keeper.stopping += 1

    def said(self, kind: str) -> list[str]:
        """Return what was told of this kind, in words."""
        return [
            str(event.get("text") or f"{event.get('doing')}: {event.get('error')}")
            for event in self.told
            if event["kind"] == kind
        ]

    def state(self, **values: Any) -> None:
        """Write the project's state, as the verbs of people do."""
        ScheduleState.objects.update_or_create(key=ScheduleState.PROJECT, defaults=values)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def minutely(name: str = "shop.refresh", **more: Any) -> ScheduledTask:
    return a_task(name, MINUTELY, **more)


# -- looking ----------------------------------------------------------------------------------------------------------


def test_an_idle_service_makes_at_most_fifteen_statements_a_minute_whatever_is_declared(stage: Stage) -> None:
    tasks = [a_task(f"task{number}", NEVER) for number in range(1000)]
    stage.serves(*tasks, seconds=1)
    stage.lock.calls.clear()
    made: list[str] = []

    def count(execute: Any, sql: str, *args: Any) -> Any:
        made.append(sql)
        return execute(sql, *args)

    with connection.execute_wrapper(count):
        stage.serves(*tasks, seconds=600)
    assert 120 < len(made) <= 150, "ten minutes"
    looks = stage.lock.times_of("look")
    gaps = [later - earlier for earlier, later in itertools.pairwise(looks)]
    assert max(gaps) < 5.0, "what somebody asks for is seen within five seconds"


def test_every_due_time_is_started_at_its_moment_and_once(stage: Stage) -> None:
    tasks = [minutely("minutely"), *(a_task(f"every{n}", Every(timedelta(seconds=n))) for n in (1, 2, 7))]
    stage.serves(*tasks, seconds=75.5)
    assert all(0.0 <= by < 0.02 for _, by in stage.runner.started), stage.runner.started
    for task in tasks:
        ran = list(ScheduledRun.objects.filter(task=task.name).order_by("due_at").values_list("due_at", flat=True))
        assert ran == list(task.between(THREE - 30 * SECOND, THREE + 45 * SECOND)), task.name
    assert not ScheduledRun.objects.filter(status="skipped").exists()


def test_a_task_that_may_overlap_is_started_at_each_of_its_moments_while_its_runs_go_on(stage: Stage) -> None:
    """No run ends in time to have anybody look: what is due in a moment is known from what is due now."""
    stage.duration = lambda claim: 2.7
    stage.serves(a_task("often", Every(SECOND), overlap="allow"), seconds=20.5)
    assert len(stage.runner.started) == 20
    assert all(by < 0.02 for _, by in stage.runner.started)


def test_a_task_that_takes_longer_than_its_period_goes_on_at_once_and_no_due_time_is_unaccounted_for(
    stage: Stage,
) -> None:
    stage.duration = lambda claim: 2.5
    stage.serves(a_task("often", Every(SECOND), min_break=timedelta(0)), seconds=30.5)
    assert len(stage.runner.started) >= 12
    assert all(by < 1.0 for _, by in stage.runner.started)
    last = ScheduledLock.objects.get().last_due_at
    counted = sum(ScheduledRun.objects.values_list("count", flat=True))
    assert counted == len(list(a_task("often", Every(SECOND)).between(THREE - 30 * SECOND, last)))


def test_the_stores_clock_decides_when_also_when_it_is_put_right(stage: Stage) -> None:
    """Looked at every few seconds, it cannot go wrong for long."""
    stage.at(100, lambda: setattr(stage.lock, "wrong_by", timedelta(seconds=3)))
    stage.serves(minutely(), seconds=240)
    late = [by for _, by in stage.runner.started]
    assert late[0] == pytest.approx(0.0, abs=0.02)
    assert late[-1] == pytest.approx(-3.0, abs=0.02), "by this clock three seconds early: by the store's, exactly"


def test_the_time_that_a_machine_sleeps_counts(stage: Stage) -> None:
    stage.at(10, lambda: stage.go_on(stage.boot + 3600))
    stage.serves(minutely(catch_up=timedelta(minutes=2)), seconds=3700)
    assert stage.runner.started[0][1] < 60, "the newest due time of an hour is made up for, at once"
    [missed] = ScheduledRun.objects.filter(status="skipped")
    assert missed.count >= 58


def test_a_run_that_is_asked_for_starts_within_five_seconds(stage: Stage) -> None:
    for number in range(8):
        stage.at(20 + 7.3 * number, lambda: TimedLock.__base__.want(stage.lock, "rare", now=stage.now))  # type: ignore[union-attr]
    stage.serves(a_task("rare", NEVER), seconds=100)
    assert len(stage.runner.started) == 8
    assert all(by < 5.0 for _, by in stage.runner.started)


def test_a_pause_is_seen_within_five_seconds_and_so_is_its_end(stage: Stage) -> None:
    often = a_task("often", Every(SECOND), min_break=timedelta(0))
    stage.at(20, lambda: stage.state(paused_at=stage.now))
    stage.at(60, lambda: stage.state(paused_at=None))
    stage.serves(often, seconds=80)
    began = sorted(ScheduledRun.objects.filter(status="succeeded").values_list("started_at", flat=True))
    offsets = [(at - (stage.now - 80 * SECOND)).total_seconds() for at in began]
    assert not [at for at in offsets if 25 <= at < 60]
    assert [at for at in offsets if 60 <= at < 65]


# -- ending -----------------------------------------------------------------------------------------------------------


def test_a_service_that_is_stopped_claims_nothing_more_and_lets_its_runs_end(stage: Stage) -> None:
    stage.duration = lambda claim: 15
    status = stage.serves(minutely("a"), a_task("often", Every(2 * SECOND)), seconds=31)
    assert status == 0
    assert {run.status for run in ScheduledRun.objects.exclude(status="skipped")} == {"succeeded"}
    assert stage.runner.ended == []
    assert ScheduledLock.objects.filter(owner__isnull=False).count() == 0
    stopped_at = stage.script_end = 1031.0
    assert all(at <= stopped_at for at in stage.lock.times_of("claim")), "nothing is claimed after the signal"
    assert all(at <= stopped_at for at in stage.lock.times_of("look"))
    assert stage.said("info") == ["waiting for a, often to end within 20 s; nothing new is started"]


def test_what_has_not_ended_within_the_grace_is_ended_and_recorded(stage: Stage) -> None:
    stage.duration = lambda claim: 600
    assert stage.serves(minutely(), seconds=40, grace=12) == 0
    assert stage.runner.ended == [("shop.refresh", "stopping", pytest.approx(1052.0, abs=0.1))]
    assert stage.lock.times_of("renew"), "its lease was kept meanwhile"
    assert ScheduledLock.objects.filter(owner__isnull=False).count() == 0


def test_a_second_signal_makes_it_short(stage: Stage) -> None:
    stage.duration = lambda claim: 600
    stage.stubborn = True
    stage.at(42, stage.stop)
    assert stage.serves(minutely(), seconds=40, grace=300) == 0
    assert [(why, at < 1043.5) for _, why, at in stage.runner.ended] == [("stopping", True), ("lost", True)]


def test_runs_that_outlive_all_patience_make_it_status_1(stage: Stage) -> None:
    stage.duration = lambda claim: 600
    stage.stubborn = True
    assert stage.serves(minutely(), seconds=40, grace=5) == 1
    assert stage.boot < 1040 + 5 + keeper.STOP_GRACE + 1.5


def test_an_interrupt_ends_it_after_its_current_runs_however_long_they_take(stage: Stage) -> None:
    stage.duration = lambda claim: 1000 if claim.occurrence.row == "long" else 0.1
    stage.at(44.5, lambda: stage.state(interrupted_at=stage.now))
    assert stage.serves(minutely("long"), a_task("often", Every(SECOND)), seconds=5000) == 0
    assert stage.boot == pytest.approx(2030, abs=1.0)
    assert {run.status for run in ScheduledRun.objects.exclude(status="skipped")} == {"succeeded"}
    assert 1043 < max(stage.lock.times_of("claim")) < 1044.5, "and nothing is claimed by the look that sees it"
    assert max(stage.lock.times_of("look")) < 1050, "which is within five seconds"
    assert len(stage.lock.times_of("renew")) > 90, "and their leases are kept"
    assert stage.said("info") == ["waiting for long to end; nothing new is started"]


def test_a_signal_ends_the_patience_of_an_interrupt(stage: Stage) -> None:
    stage.duration = lambda claim: 1000
    stage.at(45, lambda: stage.state(interrupted_at=stage.now))
    assert stage.serves(minutely("long"), seconds=60, grace=10) == 0
    assert stage.boot < 1075


def test_an_interrupt_of_before_it_began_does_not_concern_a_service(stage: Stage) -> None:
    stage.serves(minutely(), seconds=1)
    stage.state(interrupted_at=stage.now)
    stage.go_on(stage.boot + 1)
    stage.serves(minutely(), seconds=100)
    assert len(stage.runner.started) == 2


def test_a_service_whose_runs_fail_ends_with_status_0(stage: Stage) -> None:
    stage.outcome = lambda claim: Outcome(status="failed", error="ValueError: no such rate")
    assert stage.serves(a_task("often", Every(SECOND)), seconds=10) == 0
    assert ScheduledRun.objects.filter(status="failed").count() >= 9


def test_a_runner_that_was_killed_is_replaced_and_its_runs_are_recorded_as_lost(stage: Stage) -> None:
    stage.duration = lambda claim: 5
    stage.runner.cannot_start = 2
    stage.at(32, lambda: setattr(stage.runner, "vanished", True))
    assert stage.serves(minutely(), seconds=100) == 0
    assert stage.runner.starts == 3, "a machine may have no process to spare for a moment"
    assert [run.status for run in ScheduledRun.objects.order_by("due_at")] == ["lost", "succeeded"]


def test_a_service_that_can_start_no_runner_gives_up_with_status_1(stage: Stage) -> None:
    stage.runner.cannot_start = 1000
    stage.at(10, lambda: setattr(stage.runner, "vanished", True))
    assert stage.serves(minutely(), seconds=1000) == 1
    assert stage.said("trouble") == ["starting a runner: no process to be had"]
    assert stage.boot < 1030


def test_sighup_without_a_terminal_changes_nothing_and_says_what_does(stage: Stage) -> None:
    stage.at(10, lambda: setattr(stage.keeper, "hangups", 1))
    assert stage.serves(minutely(), seconds=40) == 0
    [said] = stage.said("info")
    assert "schedule interrupt" in said
    assert len(stage.runner.started) == 1


@pytest.mark.parametrize(("terminal", "ignored"), [(True, False), (False, False), (True, True)])
def test_sighup_stops_only_a_service_whose_terminal_is_gone_and_nohup_holds(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, terminal: bool, ignored: bool
) -> None:
    stage.serves(seconds=0)
    stage.keeper.stopping = 0
    monkeypatch.setattr(service, "_has_terminal", lambda: terminal)
    was = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        before = service._catch_signals(stage.keeper)
        signal.raise_signal(signal.SIGHUP)
        service._restore_signals(before)
    finally:
        signal.signal(signal.SIGHUP, was)
    assert (stage.keeper.stopping, stage.keeper.hangups) == ((0, 0) if ignored else (1, 0) if terminal else (0, 1))


def test_the_end_of_a_stopped_service_takes_no_longer_than_its_grace_and_the_stop_of_its_runs(stage: Stage) -> None:
    stage.duration = lambda claim: 600
    stage.serves(minutely(), seconds=40, grace=20)
    assert stage.boot + stage.keeper.left(12.0, 1.0) <= 1040 + 30


# -- what goes wrong --------------------------------------------------------------------------------------------------


def down(stage: Stage, since: float, until: float) -> None:
    """Have the store be away for this time, with another text each time that it is asked."""
    numbers = iter(range(10_000))
    stage.at(since, lambda: setattr(stage.lock, "away", lambda: OperationalError(f"no route: try {next(numbers)}")))
    stage.at(until, lambda: setattr(stage.lock, "away", None))


def test_a_store_that_is_away_is_said_once_and_so_is_that_it_is_back(stage: Stage) -> None:
    down(stage, 40, 340)
    assert stage.serves(minutely(), seconds=400) == 0
    assert stage.said("trouble") == ["looking for what is due: OperationalError: no route: try 1"]
    [back] = stage.said("info")
    assert re.fullmatch(r"the lock 'default' answers again, after [45] min", back)


def test_a_store_that_is_away_is_asked_less_and_less_often_but_every_five_seconds(stage: Stage) -> None:
    down(stage, 40, 340)
    stage.serves(minutely(), seconds=400)
    tries = [at for at in stage.lock.times_of("look") if 1040 <= at <= 1346]
    gaps = [later - earlier for earlier, later in itertools.pairwise(tries)][2:]
    assert max(gaps) <= 5.01, "so it is found again within five seconds"
    assert sum(gaps[4:]) / len(gaps[4:]) > 2.5
    assert len({round(gap, 3) for gap in gaps}) > len(gaps) / 2, "and not all servers at the same moments"


def test_a_run_outlives_an_outage_that_is_shorter_than_its_lease(stage: Stage) -> None:
    stage.duration = lambda claim: 100
    down(stage, 39, 57)
    stage.serves(minutely(), seconds=200)
    assert ScheduledRun.objects.get(due_at=THREE).status == "succeeded"
    renewals = [at for at in stage.lock.times_of("renew") if 1040 < at < 1057]
    assert len(renewals) >= 15, "renewing is not held back as looking is"
    assert stage.said("trouble")[1:] == []
    assert len([said for said in stage.said("info") if "answers again, after" in said]) == 1


def test_a_store_that_takes_no_renewal_but_answers_looks_is_not_said_to_be_back(stage: Stage) -> None:
    """A replica that was failed over to reads, and refuses to write."""
    stage.duration = lambda claim: 100
    renew = ORMLock.renew
    refusing = {"on": False}

    def refuse(self: ORMLock, *args: Any, **more: Any) -> Any:
        if refusing["on"]:
            raise OperationalError("cannot execute UPDATE in a read-only transaction")
        return renew(self, *args, **more)

    stage.at(39, lambda: refusing.update(on=True))
    stage.at(57, lambda: refusing.update(on=False))
    ORMLock.renew = refuse  # type: ignore[method-assign]
    try:
        stage.serves(minutely(), seconds=60)
    finally:
        ORMLock.renew = renew  # type: ignore[method-assign]
    assert len(stage.said("trouble")) == 1
    # Renewals are tried again after half a second to a second, by chance.
    assert stage.said("info")[0] in {f"the lock 'default' answers again, after {seconds} s" for seconds in (17, 18)}


@pytest.mark.parametrize("call", ["look", "renew", "release", "claim"])
def test_a_connection_that_its_server_has_closed_is_no_outage(stage: Stage, call: str) -> None:
    """An idle timeout, a pooler, an administrator: whatever was asked is asked again on a new one."""
    stage.duration = lambda claim: 12
    calls = {"look": 5.0, "claim": 30.001, "renew": 39.0, "release": 41.99}
    stage.at(calls[call], lambda: setattr(stage.lock, "broken_once", OperationalError("server closed the connection")))
    assert stage.serves(minutely(), seconds=50) == 0
    assert stage.said("trouble") == stage.said("info") == []
    assert not stage.keeper.broken
    assert [run.status for run in ScheduledRun.objects.all()] == ["succeeded"]
    assert len(stage.runner.started) == 1


def test_a_store_that_is_away_or_silent_does_not_hold_up_the_others(stage: Stage) -> None:
    stage.locks.append(TimedLock(stage, "other"))

    def silent() -> Exception:
        stage.go_on(stage.boot + 0.4)  # what it takes until the call is cut
        return StoreTimeout("no answer")

    stage.at(20, lambda: setattr(stage.locks[1], "away", silent))
    often = a_task("often", Every(5 * SECOND), min_break=timedelta(0))
    stage.serves(often, replace(minutely("theirs"), lock="other"), seconds=120)
    late = [by for row, by in stage.runner.started if row == "often"]
    assert len(late) in (23, 24)
    assert max(late) < 0.5
    assert sum(late) / len(late) < 0.1
    assert 20 <= len([at for at in stage.locks[1].times_of("look") if at > 1020]) <= 50
    assert len(stage.said("trouble")) == 1


def test_a_service_whose_store_is_away_at_the_start_waits_for_it(stage: Stage) -> None:
    """No migration yet, a database that starts beside it: no reason to end, and be started again and again."""
    stage.lock.away = lambda: ProgrammingError("no such table")
    stage.at(60, lambda: setattr(stage.lock, "away", None))
    assert stage.serves(a_task("often", Every(SECOND)), seconds=80) == 0
    assert len(stage.said("trouble")) == 1
    assert len(stage.runner.started) >= 13


def test_a_declaration_that_cannot_be_computed_is_said_once_and_costs_the_others_nothing(stage: Stage) -> None:
    class Fading(Every):
        """The table of zones, or whatever it is computed with, is gone from this machine."""

        def latest(self, *args: Any, **more: Any) -> datetime | None:
            if stage.boot > 1020:
                raise KeyError("No time zone found with key Mars/Olympus")
            return super().latest(*args, **more)

        def next(self, after: datetime) -> datetime | None:
            if stage.boot > 1020:
                raise KeyError("No time zone found with key Mars/Olympus")
            return super().next(after)

    notifier = Notifier("/nowhere")
    assert stage.serves(a_task("broken", Fading(MINUTE)), minutely("well"), seconds=200, notifier=notifier) == 0
    assert [row for row, _ in stage.runner.started] == ["well"] * 3
    [said] = stage.said("trouble")
    assert said.startswith("computing when broken is due: KeyError")


def test_a_due_time_that_the_store_keeps_refusing_is_tried_as_long_as_it_is_open(stage: Stage) -> None:
    """A pass gives it to its successor. A service has none."""
    claim = TimedLock.claim

    def refuse(self: TimedLock, occurrences: Sequence[Any], **more: Any) -> Any:
        if self.stage.boot < 1090:
            occurrences = [o for o in occurrences if o.row != "refused"]
        return claim(self, occurrences, **more)

    patch = pytest.MonkeyPatch()
    patch.setattr(TimedLock, "claim", refuse)
    try:
        stage.serves(minutely("refused", catch_up=timedelta(minutes=5)), a_task("often", Every(SECOND)), seconds=120)
    finally:
        patch.undo()
    first = next(by for row, by in stage.runner.started if row == "refused")
    assert first < 5.0
    assert stage.keeper.cycle._tried == {}


# -- maintenance ------------------------------------------------------------------------------------------------------


def in_maintenance(answer: Any) -> Any:
    return override_settings(MULTISERVER_SCHEDULE={"MAINTENANCE_MODE": answer})


def test_maintenance_mode_is_asked_again_and_seen_within_five_seconds(stage: Stage) -> None:
    mode = {"on": False}
    asked: list[float] = []

    def ask() -> bool:
        asked.append(stage.boot)
        return mode["on"]

    stage.at(20, lambda: mode.update(on=True))
    stage.at(60, lambda: mode.update(on=False))
    tasks = [a_task("often", Every(SECOND)), a_task("always", Every(SECOND), even_in_maintenance_mode=True)]
    with in_maintenance(ask):
        stage.serves(*tasks, seconds=80)
    names = [row for row, _ in stage.runner.started]
    assert names.count("always") in (79, 80)
    assert 35 <= names.count("often") <= 45
    assert len(asked) <= 80 / 4.4 + 1, "however often it looks"


@pytest.mark.parametrize("fault", ["raises", "hangs", "exits"])
def test_a_maintenance_mode_that_does_not_answer_stays_as_it_was_and_is_said_once(stage: Stage, fault: str) -> None:
    def ask() -> bool:
        if stage.boot < 1010:
            return False
        if fault == "raises":
            raise OperationalError("the settings' table is away")
        if fault == "exits":
            raise SystemExit(1)
        time.sleep(3)
        return True

    patch = pytest.MonkeyPatch()
    patch.setattr(keeper, "MAINTENANCE_LIMIT", 0.05)
    try:
        with in_maintenance(ask):
            assert stage.serves(a_task("often", Every(SECOND)), seconds=30) == 0
    finally:
        patch.undo()
    assert len(stage.runner.started) >= 29
    [said] = stage.said("trouble")
    assert "maintenance mode, which is taken to be off" in said


def test_a_maintenance_mode_that_never_answered_lets_nothing_run_that_minds_it(stage: Stage) -> None:
    tasks = [a_task("often", Every(SECOND)), a_task("always", Every(SECOND), even_in_maintenance_mode=True)]
    with in_maintenance("no.such.module.asks"):
        runner = stage.runner
        original = Cycle.__init__

        def begin(self: Cycle, *args: Any, **more: Any) -> None:
            original(self, *args, **{**more, "maintenance": True})

        patch = pytest.MonkeyPatch()
        patch.setattr(Cycle, "__init__", begin)
        try:
            stage.serves(*tasks, seconds=10)
        finally:
            patch.undo()
    assert {row for row, _ in runner.started} == {"always"}


# -- nothing grows ----------------------------------------------------------------------------------------------------


def sizes(of: object, seen: set[int] | None = None) -> Iterator[tuple[str, int]]:
    """Yield how much is in every container that a keeper has, at any remove."""
    seen = set() if seen is None else seen
    if id(of) in seen or isinstance(of, str | bytes | int | float | type | datetime | timedelta | threading.Thread):
        return
    seen.add(id(of))
    if isinstance(of, Mapping | list | set | tuple) or type(of).__name__ == "deque":
        yield type(of).__name__, len(of)  # type: ignore[arg-type]
        for each in list(of.values() if isinstance(of, Mapping) else of):  # type: ignore[call-overload]
            yield from sizes(each, seen)
        return
    if not type(of).__module__.startswith(("multiserver_schedule", "tests")) or isinstance(
        of, Acted | Stage | ScheduledTask
    ):
        return
    names = [*getattr(of, "__dict__", {}), *(n for c in type(of).__mro__ for n in getattr(c, "__slots__", ()))]
    for name in set(names) - {"stage", "calls"}:
        for kind, size in sizes(getattr(of, name, None), seen):
            yield f"{type(of).__name__}.{name} {kind}", size


def test_nothing_of_a_service_grows_with_the_number_of_its_runs(stage: Stage) -> None:
    """Two servers' worth of trouble: tasks that are refused, held, made up for one by one, and a store that blinks."""
    rng = random.Random(4)
    stage.duration = lambda claim: rng.choice((0.01, 0.4, 3.0))
    stage.outcome = lambda claim: Outcome(status=rng.choice(("succeeded", "failed")))
    tasks = [a_task(f"task{n}", Every(timedelta(seconds=1 + n % 3)), min_break=timedelta(0)) for n in range(4)]
    tasks += [a_task("each", Every(SECOND), catch_up="all", min_break=timedelta(0))]
    tasks += [a_task("aside", Every(SECOND), overlap="allow")]

    def rival(seconds: float) -> None:
        ScheduledLock.objects.filter(task="task1", owner=None).update(last_due_at=stage.now)

    for second in range(5, 100, 7):
        stage.at(second, lambda: rival(0))
        stage.at(second + 3, lambda: setattr(stage.lock, "broken_once", OperationalError("closed")))
    found: list[dict[str, int]] = []

    def measure() -> None:
        largest: dict[str, int] = {}
        for name, size in sizes(stage.keeper):
            largest[name] = max(largest.get(name, 0), size)
        found.append(largest)

    for second in (40, 95):
        stage.at(second, measure)
    with override_settings(DEBUG=True):
        connection.force_debug_cursor = True
        try:
            stage.serves(*tasks, seconds=100, settings=conf.Settings(server_name="web1", max_concurrency=6))
        finally:
            connection.force_debug_cursor = False
    assert len(stage.runner.started) > 150
    assert len(found[1]) > 15
    for name, size in found[1].items():
        assert size <= max(12, found[0].get(name, 0) + 5), (name, found[0].get(name), size)
    assert len(connection.queries_log) < 200, "what DEBUG remembers is forgotten"


@pytest.mark.django_db(transaction=False, databases=[])
def test_reports_that_a_runner_drops_are_forgotten_by_the_keeper_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver that hangs for hours costs reports, and no memory."""
    monkeypatch.setattr(run_runner, "_MOST_REPORTS", 5)
    with running(deliver=lambda event: time.sleep(0.01)) as runner:
        for number in range(100):
            runner.report({"kind": "note", "text": str(number)})
        until = time.monotonic() + 10
        while (runner._reports or runner._telling) and time.monotonic() < until:
            runner.poll(0.05)
        assert not runner._reports
        assert not runner._telling


def test_what_is_next_is_computed_anew_only_for_what_has_passed() -> None:
    asked: list[str] = []

    class Counted(Every):
        def next(self, after: datetime) -> datetime | None:
            asked.append(self.text)
            return super().next(after)

    hourly, often = a_task("hourly", Counted(timedelta(hours=1))), a_task("often", Counted(timedelta(minutes=1)))
    upcoming = Upcoming([hourly, often], THREE)
    assert len(asked) == 2
    for minute in range(30):
        assert upcoming.first(THREE + minute * MINUTE + SECOND) == (THREE + (minute + 1) * MINUTE, "often")
    assert len(asked) == 2 + 29
    assert Upcoming([], THREE).first(THREE) is None


# -- the service manager, and the command -----------------------------------------------------------------------------


def test_where_there_is_no_service_manager_nothing_is_said(tmp_path: Path) -> None:
    for environ in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1234", "WATCHDOG_USEC": "1000000"}):
        notifier = Notifier.take(environ)
        assert environ == {}
        assert notifier.beat_at(5.0) == float("inf")
        notifier.say(ready=1)
        notifier.beat(5.0)
    gone = Notifier(str(tmp_path / "nobody-listens"))
    gone.say(ready=1)


@pytest.mark.parametrize(("pid", "every"), [("", 0.25), ("own", 0.25), ("1", None)])
def test_the_watchdog_of_another_process_is_not_ours(pid: str, every: float | None) -> None:
    environ = {
        "NOTIFY_SOCKET": "/s",
        "WATCHDOG_USEC": "500000",
        "WATCHDOG_PID": str(os.getpid()) if pid == "own" else pid,
    }
    assert Notifier.take(environ).every == every
    assert environ == {}


def test_a_service_manager_hears_of_a_start_only_when_a_store_has_answered(stage: Stage, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        heard: list[tuple[float, str]] = []

        def listen() -> None:
            with suppress(BlockingIOError):
                while True:
                    heard.extend((stage.boot - 1000, line) for line in manager.recv(4096).decode().splitlines())

        stage.lock.away = lambda: OperationalError("no route")
        stage.at(10, lambda: setattr(stage.lock, "away", None))
        for tenth in range(800):
            stage.at(tenth / 10, listen)
        stage.duration = lambda claim: 30
        stage.serves(minutely(), seconds=50, notifier=Notifier(str(tmp_path / "notify"), every=2.0))
        listen()
    [ready] = [at for at, line in heard if line == "READY=1"]
    assert 10 <= ready < 16
    beats = [at for at, line in heard if line == "WATCHDOG=1"]
    assert max(later - earlier for earlier, later in itertools.pairwise([0.0, *beats])) < 3.2
    assert beats[-1] > 55, "also while its runs end"
    said = [line for _, line in heard if line.startswith("STATUS=")]
    assert "STATUS=nothing runs; next: shop.refresh 2030-01-01 03:00:00Z" in said[0]
    assert any(line.startswith("STATUS=running shop.refresh; next: shop.refresh 2030-01-01 03:01:00Z") for line in said)
    assert said[-1] == "STATUS=stopped"
    assert any(line == "STATUS=ending; running shop.refresh" for line in said)
    assert next(at for at, line in heard if line.startswith("EXTEND_TIMEOUT_USEC=")) > 50
    assert 50 <= min(at for at, line in heard if line == "STOPPING=1") < 51.2
    assert len(said) < 20, "what is at has not changed is not said again"


def test_a_service_manager_hears_of_the_end_after_an_interrupt_only_when_the_runs_are_over(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From that word on, systemd gives a service no longer than its time to stop."""
    heard: list[tuple[float, dict[str, Any]]] = []
    monkeypatch.setattr(Notifier, "say", lambda self, **state: heard.append((stage.boot - 1000, state)))
    stage.duration = lambda claim: 300
    stage.at(40, lambda: stage.state(interrupted_at=stage.now))
    stage.serves(minutely(), seconds=5000, notifier=Notifier("/nowhere"))
    [at] = [at for at, state in heard if "stopping" in state]
    assert at == pytest.approx(330, abs=1.5)


@pytest.mark.parametrize("given", [["--grace", "5"], ["--forever", "--grace", "-1"]])
def test_a_grace_that_means_nothing_is_refused(given: list[str]) -> None:
    with pytest.raises(CommandError, match="--grace takes seconds"):
        call_command("runschedule", *given)


def test_the_command_hands_the_grace_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(service, "run_forever", lambda **how: asked.append(how) or Pass())
    call_command("runschedule", "--forever", "--grace", "2.5", "-v", "0")
    call_command("runschedule", "--forever")
    assert [(how["grace"], how["verbosity"]) for how in asked] == [(2.5, 0), (service.GRACE, 1)]


def test_a_service_without_a_task_says_so_and_stays(stage: Stage) -> None:
    assert stage.serves(seconds=100) == 0
    assert stage.said("note") == ["service on web1: 0 tasks"]
    assert len(stage.lock.times_of("look")) > 20


def test_the_line_at_the_start_says_what_is_served_and_what_is_next(stage: Stage) -> None:
    stage.locks.append(TimedLock(stage, "other"))
    theirs = replace(minutely("theirs"), lock="other")
    elsewhere = minutely("elsewhere", servers=frozenset({"web9"}))
    stage.serves(a_task("yearly", NEVER), theirs, elsewhere, seconds=3)
    assert stage.said("note") == [
        "service on web1: 2 tasks, locks default, other; next: theirs 2030-01-01 03:00:00Z (in 30 s)"
    ]


def test_a_pass_asks_for_maintenance_before_it_forks_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a callable asks a database for opens a connection, which must not cross the fork."""
    order: list[str] = []
    monkeypatch.setattr(service, "close_connections", lambda: order.append("close"))
    monkeypatch.setattr(service.ProcessRunner, "start", lambda self: order.append("start"))
    monkeypatch.setattr(service, "usable_mode", lambda wanted: "fork")
    with in_maintenance(lambda: order.append("asked") or False):
        settings = conf.load()
        with service._composed(settings, {}, logs.Teller(tasks=dict), inline=False) as keeper:
            assert keeper.cycle.maintenance is False
    assert order == ["asked", "close", "start"]


def test_a_pause_of_one_lock_ends_no_pass_that_has_tasks_of_every_few_seconds_in_another(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = TimedLock(stage, "other")
    stage.locks.append(other)
    look = other.look
    monkeypatch.setattr(other, "look", lambda *args, **more: replace(look(*args, **more), paused=True, due=()))
    often = a_task("often", Every(10 * SECOND), min_break=timedelta(0))
    began = stage.boot
    assert stage.passes(often, replace(minutely("theirs"), lock="other")) == 0
    assert [row for row, _ in stage.runner.started] == ["often"] * 6
    assert stage.boot - began > 60

    monkeypatch.setattr(stage.lock, "look", lambda *args, **more: replace(look(*args, **more), paused=True, due=()))
    began = stage.boot
    stage.passes(often, replace(minutely("theirs"), lock="other"))
    assert stage.boot - began < 1, "with all of them paused, there is nothing to stay for"


def test_a_pass_stays_for_an_attempt_that_no_later_one_would_see_in_time(stage: Stage) -> None:
    """By cron, a task of every minute was never tried again: each pass left before, and the next due time came."""
    failed = Outcome(status="failed", error="no such rate")
    stage.outcome = lambda claim: failed if claim.occurrence.attempt == 1 else Outcome(status="succeeded")
    tried = minutely(retries=1, backoff=15 * SECOND)
    stage.passes(tried)  # which registers it
    stage.go_on(stage.boot + 31)
    began = stage.boot
    stage.passes(tried)
    assert [row.status for row in ScheduledRun.objects.order_by("attempt")] == ["failed", "succeeded"]
    assert 12 <= stage.boot - began <= 20


def test_a_pass_has_not_failed_where_the_conditions_of_a_run_said_no(stage: Stage) -> None:
    stage.outcome = lambda claim: Outcome(status="skipped", reason="when() said no", started=False)
    stage.passes(minutely())  # which registers it
    stage.go_on(stage.boot + 31)
    assert stage.passes(minutely()) == 0
    assert len(stage.runner.started) == 1


def test_a_pass_asks_a_store_that_is_silent_for_one_lease_and_then_leaves_it_to_the_next_pass(stage: Stage) -> None:
    stage.lock.away = lambda: StoreTimeout("no answer")
    began = stage.boot
    assert stage.passes(minutely()) == 1
    assert 10 < stage.boot - began < conf.Settings().lease.total_seconds() + 2


@pytest.mark.parametrize(("verbosity", "explains"), [(0, False), (1, False), (2, True)])
def test_only_who_asks_for_more_is_told_what_keeps_everything_back(verbosity: int, explains: bool) -> None:
    """To tell anything begins a process, and what is paused takes a statement: an idle pass has neither."""
    with service._composed(conf.load(), {}, logs.Teller(tasks=dict, verbosity=verbosity), inline=True) as keeper:
        assert keeper.cycle.explains is explains


def test_cron_passes_are_as_patient_as_before_and_services_less(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = conf.load()
    teller = logs.Teller(tasks=dict)
    with service._composed(settings, {}, teller, inline=True) as one_pass:
        assert one_pass.cycle.policy.slow_start == MINUTE
        assert one_pass.cycle.hand_over == service.HAND_OVER
    with service._composed(settings, {}, teller, inline=True, notifier=Notifier()) as keeper:
        assert keeper.cycle.policy.slow_start == 2 * SECOND
        assert keeper.cycle.hand_over is None
        assert keeper.cycle.maintenance is True, "until it is asked, before the first look"
