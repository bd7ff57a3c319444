"""
What went wrong with those who came before, each as a claim that they could not have made. docs/defects.rst lists all.

Here are those that no other test states. Nothing is mocked: it is the real engine, on every store where that matters.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.core.cache import cache
from django.core.checks import run_checks
from django.core.management import call_command
from django.db import DatabaseError, InterfaceError, connections, models

from multiserver_schedule import schedule, signals
from multiserver_schedule.conf import Settings
from multiserver_schedule.cron import Cron, Every
from multiserver_schedule.cycle import Cycle
from multiserver_schedule.cycle import Store as Locked
from multiserver_schedule.declare import registry
from multiserver_schedule.due import Policy
from multiserver_schedule.entries import Claim, Occurrence, ScheduledTask
from multiserver_schedule.history import History
from multiserver_schedule.locks.orm import ORMLock, session
from multiserver_schedule.models import CleanupLog, ScheduledLock, ScheduledRun
from multiserver_schedule.run.base import Event
from multiserver_schedule.run.inline import InlineRunner
from multiserver_schedule.testing import run_due
from multiserver_schedule.testing.contract import (
    HOUR,
    LEASE,
    MINUTE,
    SECOND,
    THREE,
    Notes,
    Server,
    a_task,
    declare,
)

from .fleet.harness import Fleet
from .simulation import World, accounted, expected, ran
from .stores import ROOT, Store

UTC = timezone.utc
NINE = datetime(2030, 1, 1, 9, tzinfo=UTC)
DAY = timedelta(days=1)
BEFORE = THREE - 90 * SECOND
"""The first pass registers what is declared, a minute before three o'clock; nothing is due for the past."""
MINUTELY = Cron("* * * * *", "UTC")

# -- a project's schedule.py, on each store ----------------------------------------------------------------------------

noted: list[str] = []
answer = False
"""Is the shop open?"""


def note(text: str = "") -> None:
    """Be a task that does its work."""
    noted.append(text)


def fail() -> None:
    """Be one that does not."""
    raise ValueError("no such rate")


def is_open() -> bool:
    """Answer a ``when()``."""
    noted.append("asked")
    return answer


def is_closed() -> bool:
    """Answer a ``skip()``."""
    noted.append("asked")
    return not answer


def always() -> bool:
    """Agree."""
    return True


def never() -> bool:
    """Disagree."""
    return False


def raises() -> bool:
    """Be a filter with a mistake in it."""
    raise KeyError("a filter's mistake")


IMPORTS = """
import sys
from datetime import timedelta
from multiserver_schedule import schedule
from tests.test_defects import always, fail, is_closed, is_open, never, note, raises
NEW_YEAR = "0 0 1 1 *"
YEAR = timedelta(days=366)
"""

Project = Callable[[str], None]


@pytest.fixture
def project(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any) -> Iterator[Project]:
    """Return a function that makes a text the schedule.py of this project, whose lock is in this store."""
    global answer
    package = f"defects_of_{store.name}"
    lock = {"BACKEND": "multiserver_schedule.locks.orm.ORMLock", "OPTIONS": {"using": store.alias}}
    settings.ROOT_URLCONF = f"{package}.urls"
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "RUNNER": "inline", "LOCKS": {"default": lock}}
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    noted.clear()
    answer = False

    def write(text: str) -> None:
        folder = tmp_path / package
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / "schedule.py").write_text(IMPORTS + text)
        importlib.invalidate_caches()

    with registry.set_aside():
        yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


@pytest.fixture
def told() -> Iterator[list[tuple[str, str]]]:
    """Return the list of the signals that were sent, each with the name of its task."""
    sent: list[tuple[str, str]] = []
    receivers: dict[str, Callable[..., None]] = {}
    for name in ("task_started", "task_succeeded", "task_failed", "task_skipped", "lease_lost"):
        receivers[name] = lambda name=name, task=None, **more: sent.append((name, task.name))
        getattr(signals, name).connect(receivers[name])
    yield sent
    for name, receiver in receivers.items():
        getattr(signals, name).disconnect(receiver)


def rows(store: Store) -> dict[str, ScheduledLock]:
    return {row.task: row for row in ScheduledLock.objects.using(store.alias).all()}


def runs(store: Store) -> list[ScheduledRun]:
    return list(ScheduledRun.objects.using(store.alias).order_by("pk"))


def statuses(*, at: datetime) -> dict[str, str]:
    """Run what is due, and return how each went."""
    return {run.name: run.status for run in run_due(at=at, check=False)}


def call(*arguments: str) -> tuple[str, int]:
    """Return what a command printed, and its exit status."""
    out = StringIO()
    try:
        call_command(*arguments, stdout=out)
    except SystemExit as leaving:
        return out.getvalue(), int(leaving.code or 0)
    return out.getvalue(), 0


def open_new_year(store: Store) -> None:
    """Have the first of January be due that has passed, by the store's clock."""
    new_year = datetime(ORMLock("default", {"using": store.alias}).clock().year, 1, 1, tzinfo=UTC)
    before = new_year - SECOND
    ScheduledLock.objects.using(store.alias).update(
        last_due_at=before, schedule_since=before, not_before=before, next_due_at=new_year
    )


# Which task is which.


def test_two_tasks_with_the_same_command_and_schedule_are_two(
    store: Store, project: Project, told: list[tuple[str, str]]
) -> None:
    """MultiServerEvent: the lock was of command and cron, so one of the two never ran. Laravel: both got the hooks."""
    project(
        """
schedule.call(note, "same").daily_at("09:00").name("shop.one")
schedule.call(note, "same").daily_at("09:00").name("shop.other")
"""
    )
    assert statuses(at=NINE) == {"shop.one": "succeeded", "shop.other": "succeeded"}
    assert noted == ["same", "same"]
    both = [("task_started", "shop.one"), ("task_succeeded", "shop.one")]
    assert told == both + [(signal, "shop.other") for signal, _ in both]


def test_a_program_in_another_folder_on_another_server_is_the_same_task(store: Store) -> None:
    """MultiServerEvent: the path of the interpreter was in the key, and two servers excluded each other no more."""
    servers = []
    for folder in ("/usr/bin", "/opt/postgresql/bin"):
        with registry.set_aside():
            schedule.exec([f"{folder}/pg_dump", "shop"]).hourly()
            task = next(iter(registry.tasks.values()))
        servers.append(Server(ORMLock("default", {"using": store.alias}), Notes(History(store.alias)), task))
    one, other = servers
    other.name = "web2"
    name = next(iter(one.declared.tasks))
    assert one.sync(THREE - MINUTE) == ([name], [])
    assert other.sync(THREE - MINUTE) == ([], [])
    assert one.run(THREE) is not None
    assert other.run(THREE) is None


# Filters.


def test_filters_in_any_order_leave_no_lock_behind(store: Store, project: Project) -> None:
    """MultiServerEvent: the lock was taken by a filter, and a later one that refused left it taken for ever."""
    global answer
    project(
        """
schedule.call(note).daily_at("09:00").when(is_open).without_overlapping().skip(never).name("shop.first")
schedule.call(note).daily_at("09:00").without_overlapping().when(always).skip(is_closed).name("shop.last")
schedule.call(note).daily_at("09:00").skip(never).skip(is_closed).when(always).name("shop.between")
schedule.call(note).daily_at("09:00").when(always).when(is_open).ensure_finished(minutes=5).name("shop.limited")
"""
    )
    names = ("shop.first", "shop.last", "shop.between", "shop.limited")
    assert statuses(at=NINE) == dict.fromkeys(names, "skipped")
    assert set(noted) == {"asked"}, "none of them ran"
    for row in rows(store).values():
        assert (row.owner, row.expires_at) == (None, None)
        assert row.not_before < NINE, "and no break follows"
    answer = True
    assert statuses(at=NINE + DAY) == dict.fromkeys(names, "succeeded")


def test_a_filter_that_raises_costs_its_own_run_and_no_other(store: Store, project: Project) -> None:
    """Laravel and MultiServerEvent: what a filter threw ended the pass, and every later task of it was not run."""
    project(
        """
schedule.call(note, "before").daily_at("09:00").name("shop.before")
schedule.call(note).daily_at("09:00").when(raises).name("shop.broken")
schedule.call(note, "after").daily_at("09:00").name("shop.after")
"""
    )
    assert statuses(at=NINE) == {"shop.before": "succeeded", "shop.broken": "failed", "shop.after": "succeeded"}
    assert noted == ["before", "after"]
    assert "a filter's mistake" in ScheduledRun.objects.using(store.alias).get(task="shop.broken").error
    assert {row.owner for row in rows(store).values()} == {None}


def test_listing_the_schedule_asks_no_filter_and_takes_no_lock(store: Store, project: Project) -> None:
    """MultiServerEvent and Laravel: whoever looked whether a task would run had taken its lock."""
    project('schedule.call(note).cron(NEW_YEAR).catch_up(within=YEAR).when(is_open).name("shop.filtered")\n')
    call("runschedule")
    open_new_year(store)
    before = list(ScheduledLock.objects.using(store.alias).values())
    said, status = call("schedule", "list")
    assert (status, "shop.filtered" in said) == (0, True)
    assert noted == []
    assert list(ScheduledLock.objects.using(store.alias).values()) == before


# What is told.


def test_a_run_is_told_as_what_it_was_and_as_nothing_else(project: Project, told: list[tuple[str, str]]) -> None:
    """Laravel: a failed run had finished too, and one that was skipped had started and finished."""
    project(
        """
schedule.call(note).daily_at("09:00").name("shop.works")
schedule.call(fail).daily_at("09:00").name("shop.fails")
schedule.call(note).daily_at("09:00").when(is_open).name("shop.refused")
schedule.exec([sys.executable, "-c", "raise SystemExit(3)"]).daily_at("09:00").name("shop.program")
"""
    )
    statuses(at=NINE)
    found: dict[str, list[str]] = {}
    for signal, name in told:
        found.setdefault(name, []).append(signal)
    assert found == {
        "shop.works": ["task_started", "task_succeeded"],
        "shop.fails": ["task_started", "task_failed"],
        "shop.refused": ["task_skipped"],
        "shop.program": ["task_started", "task_failed"],
    }


def test_a_receiver_of_a_run_is_called_while_the_run_has_its_lock(store: Store, project: Project) -> None:
    """MultiServerEvent: the lock was freed first, so what a project did after a run was done beside the next one."""
    project('schedule.call(note).daily_at("09:00").name("shop.works")\n')
    owners: list[str | None] = []

    def listen(**more: Any) -> None:
        owners.append(rows(store)["shop.works"].owner)

    signals.task_succeeded.connect(listen)
    try:
        run_due(at=NINE)
    finally:
        signals.task_succeeded.disconnect(listen)
    assert [owner is not None for owner in owners] == [True]
    assert rows(store)["shop.works"].owner is None


class Overtaken(ORMLock):
    """The lock of a server that is always a moment too late."""

    rival: Callable[[Sequence[Occurrence]], object]

    def claim(self, occurrences: Sequence[Occurrence], **more: Any) -> list[Claim]:
        self.rival(occurrences)
        return super().claim(occurrences, **more)


def test_a_server_that_is_a_moment_too_late_says_so_and_nothing_else(store: Store) -> None:
    """Laravel: the loser fired the events of a run that never was. madlab: it said nothing at all."""
    events: list[Event] = []
    lock, task = Overtaken("default", {"using": store.alias}), a_task()
    web2 = Server(ORMLock("default", {"using": store.alias}), Notes(History(store.alias)), task, name="web2")
    web2.sync(THREE - MINUTE)
    lock.rival = lambda occurrences: web2.claim(*occurrences, now=THREE) if occurrences else None
    web1 = Cycle(
        stores=[Locked(lock=lock, history=History(store.alias), declared=declare(task))],
        runner=InlineRunner({task.name: task}, deliver=lambda event: events.append(dict(event))),
        settings=Settings(server_name="web1"),
        policy=Policy(),
    )
    web1.step(now=THREE)
    web1.take(web1.runner.poll(0), now=THREE)
    web1.step(now=THREE + SECOND)
    assert web1.running == {}
    assert web1.failures == 0
    assert [event["kind"] for event in events] == ["busy"]
    assert [(run.server, run.status) for run in runs(store)] == [("web2", "running")]


def test_the_exit_status_is_that_of_the_runs(store: Store, project: Project) -> None:
    """django-cron: it was always 0, so neither cron nor an orchestrator ever learnt of a failure."""
    project(
        """
schedule.call(fail).cron(NEW_YEAR).catch_up(within=YEAR).name("shop.fails")
schedule.call(note).cron(NEW_YEAR).catch_up(within=YEAR).name("shop.works")
"""
    )
    assert call("runschedule")[1] == 0
    open_new_year(store)
    said, status = call("runschedule")
    assert status == 1
    assert "shop.fails failed (ValueError: no such rate)" in said
    assert call("runschedule") == ("", 0), "and a pass with nothing to do is well"


# Once.


def test_the_command_run_twice_in_a_minute_runs_nothing_twice(store: Store, project: Project) -> None:
    """Laravel: without onOneServer() nothing remembered that the minute had been run."""
    project('schedule.call(note).cron(NEW_YEAR).catch_up(within=YEAR).name("shop.works")\n')
    call("runschedule")
    open_new_year(store)
    for _ in range(3):
        assert call("runschedule")[1] == 0
    assert len(noted) == len(runs(store)) == 1


def test_a_cleared_cache_runs_nothing_again(project: Project) -> None:
    """Laravel and madlab: the lock was in the cache, and a deploy that cleared it ran everything once more."""
    project('schedule.call(note).daily_at("09:00").name("shop.works")\n')
    assert len(run_due(at=NINE)) == 1
    cache.clear()
    assert run_due(at=NINE + SECOND) == []


def test_a_pass_that_the_minute_overtakes_claims_the_due_time_that_it_meant_or_none(store: Store) -> None:
    """MultiServerEvent and Laravel: the label was made when the lock was taken, and so was the next minute's."""
    lock, notes, task = ORMLock("default", {"using": store.alias}), Notes(History(store.alias)), a_task("m", MINUTELY)
    web1, web2 = (Server(lock, notes, task, name=name) for name in ("web1", "web2"))
    web1.sync(THREE - 10 * SECOND)
    meant, after = web1.occurrence(THREE), THREE + MINUTE + SECOND
    web2.release(*web2.claim(web2.occurrence(THREE), now=THREE), now=THREE + SECOND)
    assert web1.claim(meant, now=after) == []
    row = web1.row("m")
    assert (row.last_due_at, row.next_due_at) == (THREE, THREE + MINUTE), "the next minute is open"
    late = web1.occurrence(THREE + MINUTE)
    [claim] = web1.claim(late, now=THREE + 2 * MINUTE + SECOND)
    assert claim.occurrence.due_at == web1.row("m").last_due_at == THREE + MINUTE


def test_a_task_that_raises_or_cannot_even_start_is_run_at_its_next_due_time(store: Store, project: Project) -> None:
    """MultiServerEvent: an exception left the lock taken for ever. madlab: for an hour."""
    project(
        """
schedule.call(fail).every_minute().name("shop.fails")
schedule.call("tests.test_defects.there_is_no_such_function").every_minute().name("shop.missing")
schedule.exec(["/no/such/program"]).every_minute().name("shop.program")
"""
    )
    for minute in range(3):
        assert set(statuses(at=NINE + minute * MINUTE).values()) == {"failed"}
    assert Counter(run.task for run in runs(store)) == {"shop.fails": 3, "shop.missing": 3, "shop.program": 3}
    assert {row.owner for row in rows(store).values()} == {None}


# -- hours of servers, by a clock that is passed in --------------------------------------------------------------------


def version(*tasks: ScheduledTask) -> dict[str, ScheduledTask]:
    return {task.name: task for task in tasks}


@pytest.mark.parametrize(
    "began",
    [datetime(2030, 10, 26, 23, 50, tzinfo=UTC), datetime(2030, 3, 30, 23, 50, tzinfo=UTC)],
    ids=["autumn", "spring"],
)
def test_a_clock_change_stalls_and_doubles_nothing(store: Store, began: datetime) -> None:
    """MultiServerEvent: naive local times stalled it for an hour. celery beat, APScheduler: a job twice, or a crash."""
    tasks = version(
        *(
            a_task(name, Cron(text, "Europe/Berlin"))
            for name, text in (("often", "*/10 * * * *"), ("nightly", "30 2 * * *"), ("hourly", "5 * * * *"))
        )
    )
    world = World(alias=store.alias, now=began - 90 * SECOND, versions={"web1": tasks})
    world.advance(140 * MINUTE)
    world.finish()
    utc = [began + 10 * number * MINUTE for number in range(1 + 14)]
    assert ran(store.alias, "often") == [due_at for due_at in utc if due_at <= world.now]
    nightly = ran(store.alias, "nightly")
    assert len(nightly) == 1
    # In spring there is no half past two: the job follows right after the gap.
    assert nightly[0].time().isoformat() == ("00:30:00" if began.month == 10 else "01:00:00")
    assert ran(store.alias, "hourly") == [began + 15 * MINUTE + number * HOUR for number in range(3)]


def test_a_job_of_fifty_five_seconds_runs_in_most_minutes_and_without_a_break_in_each(store: Store) -> None:
    """MultiServerEvent and madlab: the ten seconds after a run made it run every second minute."""
    tasks = version(a_task("rests", MINUTELY), a_task("never-rests", MINUTELY, min_break=timedelta(0)))
    world = World(alias=store.alias, now=BEFORE, versions={"web1": tasks}, duration=lambda row: 55 * SECOND)
    world.advance(40 * MINUTE)
    world.finish()
    due = expected(tasks["rests"], [(THREE - SECOND, world.now)])
    assert ran(store.alias, "never-rests") == due
    assert len(ran(store.alias, "rests")) >= 0.7 * len(due)


def test_a_task_that_hangs_holds_up_neither_the_others_nor_the_passes(store: Store) -> None:
    """Chroniker: one stale job froze all, and crons piled up. huey: one that outlives its period filled the workers."""
    tasks = version(a_task("hangs", MINUTELY), *(a_task(f"well{number}", MINUTELY) for number in range(3)))
    world = World(
        alias=store.alias,
        now=BEFORE,
        versions={"web1": tasks, "web2": tasks},
        slots=2,
        duration=lambda row: 10 * HOUR if row == "hangs" else SECOND,
    )
    for _ in range(13):
        world.advance(MINUTE)
        assert len(world.passes) <= 3, "one waits for it, and those of this minute"
    for number in range(3):
        assert ran(store.alias, f"well{number}") == expected(tasks["well0"], [(THREE - SECOND, world.now)])
    assert len(ran(store.alias, "hangs")) == 1
    [skip] = ScheduledRun.objects.using(store.alias).filter(task="hangs", status="skipped")
    assert skip.count == 11
    assert skip.reason.startswith("held by web")


def test_a_deploy_between_every_two_due_times_loses_none(store: Store) -> None:
    """celery beat: what was due less often than it was deployed was never due. rq-scheduler: nor after a crash."""
    hourly = a_task("hourly", Every(HOUR))
    world = World(alias=store.alias, now=BEFORE, versions={})
    for deploy in range(9):
        world.kill("web1")
        world.advance(MINUTE)
        world.versions["web1"] = version(hourly, a_task(f"new{deploy}", Cron("0 0 1 1 *", "UTC")))
        world.advance(19 * MINUTE)
    world.finish()
    assert ran(store.alias, "hourly") == [THREE + HOUR, THREE + 2 * HOUR]


def test_after_an_outage_of_hours_a_task_runs_once_and_the_rest_is_told(store: Store) -> None:
    """django-q2: catch_up was the default, and a task ran once for each due time of the outage. huey: back to back."""
    tasks = version(a_task("m", MINUTELY))
    world = World(alias=store.alias, now=BEFORE, versions={"web1": tasks})
    world.advance(5 * MINUTE)
    world.finish()
    world.kill("web1")
    down = world.now
    world.now += 3 * HOUR
    up = world.now
    world.versions["web1"] = tasks
    world.advance(5 * MINUTE)
    world.finish()
    missed = tasks["m"].between(down, up)
    assert 178 <= len(missed) <= 181
    assert len([due_at for due_at in ran(store.alias, "m") if due_at in missed]) <= 1
    assert accounted(store.alias, "m")["missed"] in (len(missed), len(missed) - 1)
    assert ran(store.alias, "m")[-4:] == tasks["m"].between(up, world.now)[-4:], "and then it goes on as ever"


def test_a_server_that_crashed_starts_again_under_its_own_name(store: Store) -> None:
    """rq-scheduler: it found its own mark of birth and refused. Chroniker, django-cron: is_running was never reset."""
    tasks = version(a_task("long", Cron("*/5 * * * *", "UTC")), a_task("short", MINUTELY))
    world = World(
        alias=store.alias,
        now=BEFORE,
        versions={"web1": tasks},
        duration=lambda row: 40 * SECOND if row == "long" else SECOND,
    )
    world.advance(2 * MINUTE)  # until half a minute past three o'clock
    world.kill("web1")
    assert rows(store)["long"].owner is not None
    world.versions["web1"] = tasks
    world.advance(10 * MINUTE)
    world.finish()
    assert CleanupLog.objects.using(store.alias).get().server == "web1"
    assert ran(store.alias, "long") == expected(tasks["long"], [(THREE - SECOND, world.now)])
    assert ran(store.alias, "short") == expected(tasks["short"], [(THREE - SECOND, world.now)])


def test_a_task_that_was_paused_for_hours_does_not_run_for_the_past(store: Store) -> None:
    """celery beat: a task that was enabled again fired at once. Here: by what a resume does to the row."""
    tasks = version(a_task("m", MINUTELY), a_task("hourly", Every(HOUR)))
    world = World(alias=store.alias, now=BEFORE, versions={"web1": tasks})
    world.advance(2 * MINUTE)
    world.finish()
    locks = ScheduledLock.objects.using(store.alias)
    locks.update(paused_at=world.now)
    before = len(runs(store))
    world.advance(75 * MINUTE)
    assert len(runs(store)) == before, "and four o'clock would still be caught up"
    world.finish()
    resumed = world.now
    locks.update(paused_at=None, last_due_at=resumed)
    world.advance(2 * MINUTE)
    world.finish()
    since = runs(store)[before:]
    assert {run.task for run in since} == {"m"}
    assert min(run.due_at for run in since) > resumed
    assert accounted(store.alias, "hourly") == {"succeeded": 1}, "of three o'clock"


# -- the store ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(store: Store) -> Server:
    """Return a server with two hourly tasks, a and b."""
    server = Server(ORMLock("default", {"using": store.alias}), Notes(History(store.alias)), a_task("a"), a_task("b"))
    server.sync(THREE - MINUTE)
    return server


def both(server: Server) -> list[Claim]:
    occurrences = [server.occurrence(THREE, task) for task in server.declared.tasks.values()]
    return server.claim(*occurrences, now=THREE)


def test_when_a_run_began_is_not_rewritten_when_it_ends(store: Store, pair: Server) -> None:
    """MultiServerEvent: MySQL set the first TIMESTAMP of a row anew at every UPDATE."""
    claim, other = both(pair)
    pair.renew(claim, other, now=THREE + 10 * SECOND)
    assert (pair.row("a").acquired_at, pair.row("a").renewed_at) == (THREE, THREE + 10 * SECOND)
    pair.release(claim, other, now=THREE + 20 * SECOND)
    assert {(run.started_at, run.finished_at) for run in runs(store)} == {(THREE, THREE + 20 * SECOND)}


def test_an_older_deploy_deletes_nothing_of_a_newer_one(store: Store, pair: Server) -> None:
    """django-scheduled-tasks: at its start a server deleted what it did not know, so two versions undid each other."""
    newer = Server(pair.lock, pair.notes, a_task("a"), a_task("new"), name="web2")
    newer.sync(THREE - 30 * SECOND)
    [claim] = newer.claim(newer.occurrence(THREE, newer.declared.tasks["new"]), now=THREE)
    newer.release(claim, now=THREE + SECOND)
    for at in (THREE + 2 * SECOND, THREE + HOUR / 2):
        pair.sync(at)
        pair.reap(at)
        assert set(rows(store)) == {"a", "b", "new"}
        assert [run.task for run in runs(store)] == ["new"]


def test_a_row_that_vanishes_under_a_run_is_that_runs_loss_alone(store: Store, pair: Server) -> None:
    """django-cron: the row of a lock that was gone between two calls crashed the pass."""
    claims = both(pair)
    stale = pair.occurrence(THREE + HOUR, pair.declared.tasks["a"])
    ScheduledLock.objects.using(store.alias).filter(task="a").delete()
    assert pair.renew(*claims, now=THREE + SECOND) == [False, True]
    assert pair.release(*claims, now=THREE + 2 * SECOND) == [False, True]
    assert pair.due(THREE + HOUR) == ["b"]
    following = [stale, pair.occurrence(THREE + HOUR, pair.declared.tasks["b"])]
    assert [claim.task.name for claim in pair.claim(*following, now=THREE + HOUR)] == ["b"]
    assert {run.task: run.status for run in runs(store) if run.due_at == THREE} == {"a": "lost", "b": "succeeded"}


def test_a_connection_that_the_database_closed_costs_no_lease(store: Store, pair: Server) -> None:
    """celery beat: "connection already closed" was the end of the loop, or went on for ever."""
    if store.vendor == "sqlite":
        pytest.skip("it has no server that could close one")
    claims = both(pair)
    connection = connections[store.alias]
    end, ask = {
        "postgresql": ("SELECT pg_terminate_backend(%s)", "SELECT pg_backend_pid()"),
        "mysql": ("KILL CONNECTION %s", "SELECT CONNECTION_ID()"),
    }[store.vendor]
    with connection.cursor() as cursor:
        cursor.execute(ask)
        (number,) = cursor.fetchone()
    other = connection.copy()
    try:
        with other.cursor() as cursor:
            cursor.execute(end, [number])
    finally:
        other.close()
    with pytest.raises((DatabaseError, InterfaceError)):
        pair.renew(*claims, now=THREE + SECOND)
    # The very next call has a connection of its own, and nobody had to ask for it.
    assert pair.renew(*claims, now=THREE + 2 * SECOND) == [True, True]
    assert pair.release(*claims, now=THREE + 3 * SECOND) == [True, True]


def test_a_deadlock_is_tried_again_and_costs_no_lease(
    store: Store, pair: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MultiServerEvent: the victim of a deadlock threw out of a filter, and the rest of its pass was not run."""
    if store.vendor == "sqlite":
        pytest.skip("it locks the whole file, and so never in a circle")
    claims = both(pair)
    a, b = (claim.occurrence.pk for claim in claims)
    conflicts: list[bool] = []
    is_conflict = session.is_conflict

    def counted(error: BaseException) -> bool:
        conflicts.append(is_conflict(error))
        return conflicts[-1]

    monkeypatch.setattr(session, "is_conflict", counted)
    # So that the other transaction is the heavier one, and ours the victim.
    filler = {"last_due_at": THREE, "schedule_since": THREE, "not_before": THREE, "fingerprint": ""}
    ScheduledLock.objects.using(store.alias).bulk_create([ScheduledLock(task=f"x{n}", **filler) for n in range(200)])
    stood: list[bool] = []

    def renew() -> None:
        try:
            stood.extend(pair.renew(*claims, now=THREE + SECOND))
        finally:
            connections[store.alias].close()

    table = ScheduledLock._meta.db_table
    waiting = {
        "postgresql": "SELECT count(*) FROM pg_locks WHERE NOT granted",
        "mysql": "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'",
    }[store.vendor]
    other = connections[store.alias].copy()
    ours = threading.Thread(target=renew)
    try:
        other.set_autocommit(False)
        with other.cursor() as cursor:
            cursor.execute(f"UPDATE {table} SET paused_reason = 'x' WHERE task LIKE 'x%%' OR id = %s", [b])
            ours.start()
            until = time.monotonic() + 10
            with connections[store.alias].cursor() as observer:
                while time.monotonic() < until:
                    observer.execute(waiting)
                    if observer.fetchone() != (0,):
                        break
                    # MariaDB makes that table anew only when nobody has read it for a tenth of a second.
                    ours.join(0.15)
            cursor.execute(f"UPDATE {table} SET paused_reason = 'x' WHERE id = %s", [a])
        other.commit()
    finally:
        other.close()
        ours.join(20)
    assert conflicts == [True], "there was a deadlock, and ours was its victim"
    assert stood == [True, True]
    assert {row.expires_at for name, row in rows(store).items() if name in "ab"} == {THREE + SECOND + LEASE}


# -- what it takes to be installed -------------------------------------------------------------------------------------


def test_importing_every_module_and_setting_django_up_opens_nothing() -> None:
    """django-crontask: the Redis client was made at import. huey, django-q2: so were settings read."""
    watch = """
import contextlib, importlib, pkgutil, sys, threading
seen = []
OPTIONAL = "amqp", "celery", "django_tasks", "django_tasks_db", "kombu", "libcloud", "rq"
WATCHED = "socket.connect", "socket.bind", "sqlite3.connect", "subprocess.Popen", "os.fork", "os.posix_spawn"

# What some of our modules need for a cloud, and tries once whether there is IPv6.
with contextlib.suppress(ImportError):
    import urllib3

def hook(event, arguments):
    if event in WATCHED or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
        seen.append((event, str(arguments[0])))

sys.addaudithook(hook)
import django
django.setup()
import multiserver_schedule
names = [m.name for m in pkgutil.walk_packages(multiserver_schedule.__path__, "multiserver_schedule.")]
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Some need a library that only those who use them have.
        if error.name.partition(".")[0] not in OPTIONAL:
            raise
print(len(names) > 30, seen, threading.active_count())
"""
    environ = {"DJANGO_SETTINGS_MODULE": "tests.settings", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", watch], env=environ, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("True [] 1", "")


@pytest.mark.django_db
def test_a_project_gets_no_migration_of_ours_to_make_and_no_warning() -> None:
    """django-cron: index_together ended it on newer Djangos, and W042 greeted every project. MultiServerEvent: none."""
    out = StringIO()
    call_command("makemigrations", "multiserver_schedule", check_changes=True, dry_run=True, stdout=out)
    assert "No changes detected" in out.getvalue()
    app = apps.get_app_config("multiserver_schedule")
    assert app.default_auto_field == "django.db.models.BigAutoField", "whatever the project's is"
    assert {type(model._meta.pk) for model in app.get_models()} == {models.BigAutoField}
    assert run_checks(app_configs=[app], tags=["models"]) == []


def test_no_two_modules_need_each_other() -> None:
    """procrastinate: five modules imported each other in a circle, and worked in one order only."""
    package = ROOT / "multiserver_schedule"
    modules = {_module(path): path for path in package.rglob("*.py") if "migrations" not in path.parts}
    needs = {name: _imports(name, path, set(modules)) for name, path in modules.items()}
    while free := [name for name, needed in needs.items() if not needed & set(needs)]:
        for name in free:
            del needs[name]
    assert needs == {}


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imports(name: str, path: Path, modules: set[str]) -> set[str]:
    """Return the modules of ours that this one imports when it is imported."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            above = package.rsplit(".", statement.level - 1)[0] if statement.level else ""
            source = ".".join(filter(None, (above, statement.module)))
            inside = {f"{source}.{alias.name}" for alias in statement.names}
            found |= inside & modules
            # Where only submodules are taken from it, a package is not needed for anything of its own.
            found |= {source} if inside - modules else set()
    return (found & modules) - {name}


def test_every_two_hours_is_once_in_two_hours() -> None:
    """huey: hour="*/2" left the minute a star, and was due in each minute of every second hour."""
    with registry.set_aside():
        schedule.command("a").every_two_hours().name("t.two")
        schedule.command("a").monthly().name("t.monthly")
        schedule.command("a").weekly_on("monday").name("t.weekly")
        schedule.command("a").every_odd_hour().name("t.odd")
        counts = {name: len(task.between(THREE, THREE + 7 * DAY)) for name, task in registry.tasks.items()}
    assert counts == {"t.two": 84, "t.monthly": 0, "t.weekly": 1, "t.odd": 84}


# -- processes ---------------------------------------------------------------------------------------------------------


def test_a_long_task_delays_none_of_those_behind_it(store: Store, tmp_path: Path) -> None:
    """Laravel, django-cron: one after the other, so what came last was as late as all before it together."""
    if store.vendor != "sqlite":
        pytest.skip("no matter of the store")
    with Fleet(store, tmp_path, "steady", lease=30, heartbeat=10) as fleet:
        fleet.register()
        fleet.make_due()
        web1 = fleet.server("web1")
        fleet.wait_for(lambda: fleet.journal.of("end", task="failing"), "the last of the three to end")
        assert fleet.journal.of("start", task="slow")
        assert not fleet.journal.of("end", task="slow"), "it takes eight seconds"
        web1.kill("all")


# -- the page ----------------------------------------------------------------------------------------------------------


def test_every_test_that_the_page_of_defects_names_is_there() -> None:
    """A page that names a test which is gone promises what nobody keeps."""
    page = (ROOT / "docs" / "defects.rst").read_text()
    named = re.findall(r"([\w.]+)::(\w+)", page)
    found: dict[str, set[str]] = {}
    for module in {module for module, _ in named}:
        folder = ROOT / ("multiserver_schedule/testing" if module == "contract" else "tests")
        tree = ast.parse((folder / f"{module.replace('.', '/')}.py").read_text())
        found[module] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert len(named) > 120
    assert [f"{module}::{test}" for module, test in named if test not in found[module]] == []
    for module in ("test_defects", "dynamic.test_defects"):
        mine = {name for name in found[module] if name.startswith("test_")}
        mine.discard("test_every_test_that_the_page_of_defects_names_is_there")
        assert mine - {test for of, test in named if of == module} == set()
