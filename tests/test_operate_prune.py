"""Pruning by hand and by itself: the rows of servers that are gone, of tasks that are, and our own daily task."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.management import call_command
from django.utils import timezone

from multiserver_schedule import operate, schedule
from multiserver_schedule.declare import discovery, registry
from multiserver_schedule.entries import ScheduledTask
from multiserver_schedule.exceptions import DeclarationError
from multiserver_schedule.history import Afterwards, History
from multiserver_schedule.locks.cache import CacheLock
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.logs import Teller
from multiserver_schedule.models import CleanupLog, ScheduledLock, ScheduledRun, ScheduleState
from multiserver_schedule.operate import pruning
from multiserver_schedule.testing import run_due
from multiserver_schedule.testing.contract import Notes, Server

from .caches import CacheStore
from .test_operate import AWAY, IN_CACHE

pytestmark = pytest.mark.django_db(transaction=True)

DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
def _project(settings: Any) -> Iterator[None]:
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1"}
    with registry.set_aside():
        schedule.call("time.sleep", 0).daily().name("a.shared")
        schedule.call("time.sleep", 0).daily().on_every_server().name("a.here")
        yield


def tasks() -> list[ScheduledTask]:
    return list(registry.tasks.values())


def seen(name: str, at: datetime, lock: Any = None) -> Server:
    """Have a server look at a moment, for the first time."""
    lock = lock or ORMLock("default", {})
    history = History("default") if lock.transactional else Afterwards("default")
    of_it = [task for task in tasks() if task.lock == lock.alias]
    server = Server(lock, Notes(history), *of_it, name=name)
    server.sync(at)
    return server


def names() -> list[str]:
    return list(ScheduledLock.objects.order_by("task").values_list("task", flat=True))


# -- rows of servers that are gone ------------------------------------------------------------------------------------


def test_rows_of_a_server_that_was_not_seen_for_so_long_are_forgotten() -> None:
    now = timezone.now()
    seen("web1", now)
    seen("web2", now - 10 * DAY)
    seen("old9", now - 40 * DAY)
    done = operate.prune()
    assert done.forgotten == (("a.here@old9", "default"),)
    assert names() == ["a.here@web1", "a.here@web2", "a.shared"]


def test_a_server_that_was_seen_keeps_rows_that_are_seldom_due() -> None:
    now = timezone.now()
    web2 = seen("web2", now - 40 * DAY)
    web2.lock.look(web2.declared, now=now - DAY)
    assert operate.prune().forgotten == ()
    ScheduleState.objects.filter(scope="web2").delete()
    ScheduleState.objects.create(key="server:web2", seen_at=now - DAY)
    assert operate.prune().forgotten == ()


def test_a_server_that_was_seen_today_is_not_gone_however_short_the_history_is_kept() -> None:
    seen("web2", timezone.now() - timedelta(hours=20))
    seen("old9", timezone.now() - timedelta(hours=30))
    assert operate.prune(days=0).forgotten == (("a.here@old9", "default"),)


def test_a_server_that_comes_back_has_its_rows_again_and_their_fences_have_risen() -> None:
    now = timezone.now()
    fence = seen("old9", now - 40 * DAY).must_run(now - 39 * DAY, task=registry.tasks["a.here"]).fence
    ScheduledLock.objects.filter(task="a.here@old9").update(owner=None, expires_at=None)
    operate.prune(days=20)
    assert "a.here@old9" not in names()
    back = Server(ORMLock("default", {}), Notes(History("default")), *tasks(), name="old9")
    assert not back.lock.look(back.declared, now=now).known
    back.sync(now)
    claim = back.must_run(now, task=registry.tasks["a.here"], trigger="manual")
    assert claim.fence > fence


def test_a_row_that_somebody_holds_is_left_and_said_to_be() -> None:
    now = timezone.now()
    seen("old9", now - 40 * DAY)
    ScheduledLock.objects.filter(task="a.here@old9").update(owner="x", expires_at=now + DAY)
    done = operate.prune()
    assert (done.forgotten, done.held) == ((), (("a.here@old9", "default"),))
    assert pruning.summary(done)[-1] == "a.here@old9: left, since somebody holds it"


def test_this_server_never_forgets_itself() -> None:
    seen("web1", timezone.now() - 90 * DAY)
    assert operate.prune().forgotten == ()


def test_rows_of_gone_servers_in_a_cache_are_forgotten(cache_store: CacheStore, settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "LOCKS": {"cache": IN_CACHE}}
    schedule.call("time.sleep", 0).daily().on_every_server().lock_with("cache").name("a.cached")
    now = timezone.now()
    lock = CacheLock("cache", IN_CACHE["OPTIONS"])
    for name, at in (("web1", now), ("web2", now - 10 * DAY), ("old9", now - 40 * DAY)):
        seen(name, at, lock)
    assert operate.prune().forgotten == (("a.cached@old9", "cache"),)
    assert [row.task for row in lock.rows()] == ["a.cached@web1", "a.cached@web2"]
    lock.close()


def test_a_pause_on_a_server_that_is_away_for_long_is_not_forgotten_in_a_cache(
    cache_store: CacheStore, settings: Any
) -> None:
    """What is paused is overdue all the time, which says nothing of its server."""
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "LOCKS": {"cache": IN_CACHE}}
    schedule.call("time.sleep", 0).daily().on_every_server().lock_with("cache").name("a.cached")
    lock = CacheLock("cache", IN_CACHE["OPTIONS"])
    seen("web1", timezone.now(), lock)
    seen("old9", timezone.now() - 40 * DAY, lock)
    lock.pause(["a.cached@old9"])
    assert operate.prune().forgotten == ()
    assert [row.task for row in lock.rows()] == ["a.cached@old9", "a.cached@web1"]
    lock.close()


# -- rows that are not declared ---------------------------------------------------------------------------------------


def test_what_is_not_declared_is_taken_out_of_use_by_hand_alone() -> None:
    now = timezone.now()
    with registry.set_aside():
        schedule.call("time.sleep", 0).daily().name("gone.task")
        seen("web1", now - 2 * DAY)
    seen("web1", now)
    assert operate.prune().retired == ()
    assert operate.prune(undeclared=True, dry_run=True).retired == (("gone.task", "default"),)
    assert operate.prune(undeclared=True).retired == (("gone.task", "default"),)
    row = ScheduledLock.objects.get(task="gone.task")
    assert row.next_due_at is None
    assert operate.prune(undeclared=True).retired == ()


def test_a_version_that_declares_it_still_has_it_back() -> None:
    now = timezone.now()
    with registry.set_aside():
        schedule.call("time.sleep", 0).daily().name("gone.task")
        older = tasks()
        seen("web1", now - 2 * DAY)
    seen("web1", now - DAY)
    operate.prune(undeclared=True)
    back = Server(ORMLock("default", {}), Notes(History("default")), *older, *tasks(), name="web1")
    back.sync(now)
    assert ScheduledLock.objects.get(task="gone.task").next_due_at is not None


def test_nothing_is_taken_out_of_use_where_not_all_that_is_declared_can_be_read(settings: Any) -> None:
    """A schedule.py with a missing import would otherwise stop its tasks on all servers."""
    with registry.set_aside():
        schedule.call("time.sleep", 0).daily().name("tests.important")
        seen("web1", timezone.now() - 2 * DAY)
    ScheduledRun.objects.create(
        task="a", due_at=timezone.now() - 90 * DAY, status="failed", finished_at=timezone.now() - 90 * DAY
    )
    settings.ROOT_URLCONF = "tests.broken_project.urls"
    for dry_run in (True, False):
        with pytest.raises(operate.Refused) as refused:
            operate.prune(undeclared=True, dry_run=dry_run)
        assert "nothing was pruned. tests.broken_project.schedule cannot be read: " in str(refused.value)
        assert not refused.value.is_usage
    assert ScheduledLock.objects.get(task="tests.important").next_due_at is not None
    assert ScheduledRun.objects.count() == 1
    assert operate.prune().histories[0].count == 0, "the newest of its task stays, and all else is pruned as ever"


def test_nor_where_something_outside_a_schedule_is_declared_wrongly() -> None:
    schedule.call("time.sleep", 0).name("tests.no_time")
    with pytest.raises(DeclarationError, match=r"tests\.no_time"):
        operate.prune(undeclared=True)
    operate.prune()


def test_a_task_that_is_declared_again_runs_again() -> None:
    """With the very declarations that were there before: nothing tells that version from the one that was pruned."""
    now = timezone.now()
    before = seen("web1", now - 2 * DAY)
    with registry.set_aside():
        schedule.call("time.sleep", 0).daily().on_every_server().name("a.here")
        assert operate.prune(undeclared=True).retired == (("a.shared", "default"),)
    [line] = [line for line in operate.overview().lines if line.name == "a.shared"]
    assert (line.next_due_at, line.note) == (None, "taken out of use by `schedule prune --undeclared`")
    assert not before.lock.look(before.declared).known
    before.sync(timezone.now())
    [line] = [line for line in operate.overview().lines if line.name == "a.shared"]
    assert (line.next_due_at is not None, line.note) == (True, "")


def test_it_is_said_why_a_row_goes_and_in_which_lock_where_there_are_several(settings: Any) -> None:
    done = pruning.Pruning(forgotten=(("a.here@old9", "default"),), retired=(("gone.task", "cache"),))
    assert pruning.summary(done) == [
        "a.here@old9: forgotten, since its server is long gone",
        "gone.task: taken out of use, since it is not declared",
    ]
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": IN_CACHE}}
    assert pruning.summary(done, dry_run=True) == [
        "a.here@old9 (lock 'default'): would be forgotten, since its server is long gone",
        "gone.task (lock 'cache'): would be taken out of use, since it is not declared",
    ]


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_deletes_nothing_and_says_the_same() -> None:
    now = timezone.now()
    seen("old9", now - 40 * DAY)
    for days in (50, 40, 1):
        ScheduledRun.objects.create(task="a", due_at=now - days * DAY, status="failed", finished_at=now - days * DAY)
    CleanupLog.objects.create(task="a", owner="x", fence=1, cleaned_at=now - 50 * DAY, cleaned_by="y", reason="overran")
    dry = operate.prune(dry_run=True)
    assert pruning.summary(dry, dry_run=True) == [
        "history in 'default': would delete 2 runs by age, 0 successes by number, 1 clean-up",
        "a.here@old9: would be forgotten, since its server is long gone",
    ]
    assert (ScheduledRun.objects.count(), CleanupLog.objects.count(), len(names())) == (3, 1, 2)
    done = operate.prune()
    assert (done.histories[0].count, done.forgotten) == (dry.histories[0].count, dry.forgotten)
    assert (ScheduledRun.objects.count(), CleanupLog.objects.count(), len(names())) == (1, 0, 1)


def test_the_settings_say_how_long_unless_the_command_does(settings: Any) -> None:
    now = timezone.now()
    for days in (9, 5, 1):
        ScheduledRun.objects.create(task="a", due_at=now - days * DAY, status="failed", finished_at=now - days * DAY)
    settings.MULTISERVER_SCHEDULE = {"HISTORY_DAYS": 7}
    assert operate.prune().histories[0].old_runs == 1
    assert operate.prune(days=3).histories[0].old_runs == 1


def test_history_can_be_kept_for_a_hundred_years_and_for_longer_is_refused(
    settings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a thousand years ago no date is known, and housekeeping would fail each day."""
    settings.MULTISERVER_SCHEDULE = {"HISTORY_DAYS": 36_500}
    pruning.housekeep()
    call_command("schedule", "prune", "--days", "36500", stdout=StringIO())
    with pytest.raises(SystemExit, match="2"):
        call_command("schedule", "prune", "--days", "1000000")
    assert "argument --days: 1000000 is too large: write 36500 or less" in capsys.readouterr().err


def test_a_store_that_is_away_keeps_no_other_from_being_pruned(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "LOCKS": {"cache": AWAY}}
    seen("old9", timezone.now() - 40 * DAY)
    done = operate.prune()
    assert done.forgotten == (("a.here@old9", "default"),)
    assert done.troubles == ("The lock 'cache' does not answer: ConnectionError: Connection refused",)


def test_the_clock_of_the_database_decides_what_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    now = timezone.now()
    for _ in range(2):
        ScheduledRun.objects.create(task=f"a{_}", due_at=now, status="failed", finished_at=now)
        ScheduledRun.objects.create(task=f"a{_}", due_at=now + DAY, status="failed", finished_at=now)
    monkeypatch.setattr("django.utils.timezone.now", lambda: now + 400 * DAY)
    assert operate.prune().histories[0].count == 0


# -- by itself --------------------------------------------------------------------------------------------------------


@pytest.fixture
def housekeeping(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScheduledTask]:
    """Have our own task declared, as it is where nothing turns it off."""
    monkeypatch.setattr(discovery, "OURS", ("multiserver_schedule.housekeeping",))
    monkeypatch.delitem(sys.modules, "multiserver_schedule.housekeeping", raising=False)
    with registry.set_aside():
        discovery.discover(registry)
        yield registry.tasks["multiserver_schedule.prune"]


def test_a_daily_task_of_our_own_prunes_unless_it_is_turned_off(
    housekeeping: ScheduledTask, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gap = housekeeping.timetable.shortest_gap()
    assert (gap, housekeeping.is_ours, housekeeping.limit is not None) == (DAY, True, True)
    assert housekeeping.offset("multiserver_schedule.prune") > timedelta(0)
    settings.MULTISERVER_SCHEDULE = {"HOUSEKEEPING": False}
    monkeypatch.delitem(sys.modules, "multiserver_schedule.housekeeping")
    with registry.set_aside():
        discovery.discover(registry)
        assert "multiserver_schedule.prune" not in registry.tasks


def test_it_has_no_limit_where_the_runner_can_end_nothing(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.MULTISERVER_SCHEDULE = {"RUNNER": "inline"}
    monkeypatch.setattr(discovery, "OURS", ("multiserver_schedule.housekeeping",))
    monkeypatch.delitem(sys.modules, "multiserver_schedule.housekeeping", raising=False)
    with registry.set_aside():
        discovery.discover(registry)
        assert registry.tasks["multiserver_schedule.prune"].limit is None


def test_a_project_that_declares_nothing_still_hears_so(housekeeping: ScheduledTask, settings: Any) -> None:
    settings.ROOT_URLCONF = "tests.urls"
    said = StringIO()
    call_command("runschedule", "--inline", stdout=said)
    assert "No task is declared. Searched: " in said.getvalue()
    errors = StringIO()
    call_command("schedule", "list", stdout=said, stderr=errors)
    assert "No task is declared. Searched: " in errors.getvalue()


def test_a_project_whose_only_tasks_are_those_of_its_worker_servers_has_tasks(housekeeping: ScheduledTask) -> None:
    """They are of this package, and there because the project has servers: not as its housekeeping is."""
    code = "from multiserver_schedule import schedule; schedule.call('time.sleep', 0).hourly().name('servers.monitor')"
    exec(code, {"__name__": "multiserver_schedule.servers.schedule"})  # noqa: S102 - the text above
    assert registry.tasks["servers.monitor"].is_ours, "of the package, though"
    said = StringIO()
    call_command("runschedule", "--inline", stdout=said)
    assert "No task is declared" not in said.getvalue()
    assert "servers.monitor" in said.getvalue()
    assert ScheduledLock.objects.filter(task="servers.monitor").exists()
    errors = StringIO()
    call_command("schedule", "list", stdout=StringIO(), stderr=errors)
    assert errors.getvalue() == ""


def test_it_runs_by_hand_where_a_project_declares_nothing(housekeeping: ScheduledTask, settings: Any) -> None:
    settings.ROOT_URLCONF = "tests.urls"
    settings.MULTISERVER_SCHEDULE = {"RUNNER": "inline"}
    said = StringIO()
    call_command("schedule", "trigger", housekeeping.name, stdout=said)
    assert f"{housekeeping.name} succeeded" in said.getvalue()
    assert "No task is declared" not in said.getvalue()
    assert [(run.task, run.trigger) for run in ScheduledRun.objects.all()] == [(housekeeping.name, "manual")]


def test_what_is_registered_does_not_count_ours(housekeeping: ScheduledTask) -> None:
    said = StringIO()
    teller = Teller(tasks=lambda: registry.tasks, stdout=said)
    now = timezone.now().isoformat()
    teller({"kind": "synced", "registered": ["multiserver_schedule.prune"], "changed": [], "now": now, "server": "x"})
    assert said.getvalue() == ""


def test_it_does_not_run_in_the_tests_of_a_project_unless_it_is_named(housekeeping: ScheduledTask) -> None:
    at = housekeeping.next(timezone.now())
    assert at is not None
    assert run_due(at) == []
    assert [ran.name for ran in run_due(at, only=[housekeeping.name])] == ["multiserver_schedule.prune"]


def test_its_run_says_what_it_did_and_fails_where_a_store_is_away(
    settings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pruning.housekeep()
    assert "history in 'default': deleted 0 runs by age" in capsys.readouterr().out
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": AWAY}}
    with pytest.raises(operate.Refused, match="The lock 'cache' does not answer"):
        pruning.housekeep()


def test_to_declare_it_loads_nothing_of_what_it_runs() -> None:
    code = """
import sys, django
from django.conf import settings
settings.configure(USE_TZ=True, INSTALLED_APPS=["multiserver_schedule"])
django.setup()
from multiserver_schedule.declare import discover, registry
discover()
assert list(registry.tasks) == ["multiserver_schedule.prune"], registry.tasks
assert "multiserver_schedule.operate" not in sys.modules
assert "croniter" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
