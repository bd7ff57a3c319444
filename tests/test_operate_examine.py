"""What ``schedule check`` finds: stores, clocks, rows, declarations, history."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from importlib import import_module
from typing import Any

import pytest
from django.db import InternalError, OperationalError, connection
from django.utils import timezone

from multiserver_schedule import operate, schedule
from multiserver_schedule.declare import registry
from multiserver_schedule.history import History
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.models import ScheduledLock, ScheduledRun, ScheduleState
from multiserver_schedule.operate.stores import OUR_OWN, has_refused
from multiserver_schedule.testing.contract import Notes, Server

from .caches import CacheStore
from .test_operate import AWAY, IN_CACHE

pytestmark = pytest.mark.django_db(transaction=True)

HOUR = timedelta(hours=1)


@pytest.fixture(autouse=True)
def _project(settings: Any) -> Iterator[None]:
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1"}
    with registry.set_aside():
        schedule.call("time.sleep", 0).hourly().name("a.b")
        yield


def server() -> Server:
    return Server(ORMLock("default", {}), Notes(History("default")), *registry.tasks.values())


def found(level: str = "") -> list[str]:
    """Return what is found, of this level."""
    return [
        f"{each.level}: {each.about}: {each.text}" for each in operate.examine() if each.level == level or not level
    ]


def test_where_all_is_well_it_says_what_it_looked_at() -> None:
    server().sync(timezone.now())
    everything = found()
    assert all(line.startswith("ok: ") for line in everything), everything
    assert "ok: server: this is web1, no ENVIRONMENT: meant for 1 of 1 task(s)" in everything
    assert any("lock 'default': answers in " in line for line in everything)
    assert "ok: lock 'default': 1 of 1 declared task(s) registered" in everything
    assert "ok: lock 'default': this version of the project is the newest" in everything
    assert "ok: history in 'default': can be written; 0 run(s) on record" in everything


def test_to_look_changes_nothing() -> None:
    server().sync(timezone.now())
    before = list(ScheduledLock.objects.values()), list(ScheduleState.objects.values())
    found()
    assert (list(ScheduledLock.objects.values()), list(ScheduleState.objects.values())) == before
    assert not ScheduledRun.objects.exists()


@pytest.mark.parametrize(("off", "level"), [(4.5, "ok"), (-4.5, "ok"), (6, "problem"), (-6, "problem")])
def test_a_clock_that_is_over_five_seconds_off_is_a_problem(
    off: float, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server().sync(timezone.now())
    clock = ORMLock.clock
    monkeypatch.setattr(ORMLock, "clock", lambda lock: clock(lock) + timedelta(seconds=off))
    (line,) = [line for line in found() if "its clock is" in line]
    assert line.startswith(f"{level}: lock 'default'")
    assert f"{'ahead of' if off > 0 else 'behind'} this server's" in line


def test_half_of_the_way_to_the_store_is_not_the_clocks_error(monkeypatch: pytest.MonkeyPatch) -> None:
    at = [1000.0]

    class Far(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.fromtimestamp(at[0], tz)

    def clock(lock: Any) -> datetime:
        at[0] += 6.0  # there
        said = timezone.now().__class__.fromtimestamp(at[0], tz=timezone.get_default_timezone())
        at[0] += 6.0  # and back
        return said

    monkeypatch.setattr("multiserver_schedule.operate.clocks.datetime", Far)
    monkeypatch.setattr("multiserver_schedule.operate.clocks.time.perf_counter", lambda: at[0])
    monkeypatch.setattr(ORMLock, "clock", clock)
    (line,) = [line for line in found() if "its clock is" in line]
    assert line.startswith("ok: lock 'default': answers in 12000.0 ms; its clock is 0.000 s")


def test_a_store_that_does_not_answer_is_a_problem_and_hides_no_other(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": AWAY}}
    server().sync(timezone.now())
    assert found("problem") == ["problem: lock 'cache': does not answer: ConnectionError: Connection refused"]
    assert any("lock 'default': answers in" in line for line in found("ok"))


def test_a_store_that_answers_and_takes_nothing_is_a_problem_and_not_fine_in_parts() -> None:
    server().sync(timezone.now())
    if connection.vendor != "sqlite":
        pytest.skip("its way to be read-only")
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA query_only = ON")
        try:
            told = found()
        finally:
            cursor.execute("PRAGMA query_only = OFF")
    why = "OperationalError: attempt to write a readonly database"
    assert [line for line in told if "'default'" in line] == [
        f"problem: lock 'default': answers, but refuses: {why}",
        f"problem: history in 'default': cannot be written: {why}",
    ]


class Cause(Exception):
    """What a driver raises."""

    sqlstate = "25006"


@pytest.mark.parametrize(
    ("error", "no"),
    [
        (InternalError("cannot execute UPDATE in a read-only transaction"), True),
        (OperationalError(1290, "The MariaDB server is running with the --read-only option"), True),
        (OperationalError(2002, "Can't connect to server"), False),
        (OperationalError("unable to open database file"), False),
    ],
    ids=["postgresql", "mysql", "mysql away", "sqlite away"],
)
def test_a_database_that_is_read_only_is_told_from_one_that_is_away(error: Exception, no: bool) -> None:
    if isinstance(error, InternalError):
        error.__cause__ = Cause()
    assert has_refused(error) is no


def test_a_cache_is_examined_like_the_database(cache_store: CacheStore, settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "LOCKS": {"cache": IN_CACHE}}
    schedule.call("time.sleep", 0).hourly().lock_with("cache").name("a.cached")
    assert any("0 of 1 declared task(s) registered; the next pass registers a.cached" in line for line in found())
    assert any("lock 'cache': answers in" in line for line in found("ok"))
    cache_store.server.crash()
    assert any(line.startswith("problem: lock 'cache': does not answer") for line in found("problem"))


def test_a_task_that_no_pass_has_seen_is_said_to_be_missing() -> None:
    server().sync(timezone.now())
    schedule.call("time.sleep", 0).hourly().name("a.new")
    (line,) = found("warning")
    assert line == "warning: lock 'default': 1 of 2 declared task(s) registered; the next pass registers a.new"


def test_another_version_that_holds_a_schedule_is_seen() -> None:
    server().sync(timezone.now() - timedelta(seconds=1))
    with registry.set_aside():
        schedule.call("time.sleep", 0).daily().name("a.b")
        server().sync(timezone.now())
    (line,) = found("warning")
    assert "another version of the project holds the schedule of a.b: this server leaves it alone" in line


def test_what_is_not_declared_any_more_is_seen() -> None:
    with registry.set_aside():
        schedule.call("time.sleep", 0).hourly().name("gone.task")
        server().sync(timezone.now() - HOUR)
    server().sync(timezone.now())
    (line,) = found("warning")
    assert "not declared in this version: gone.task; `schedule prune --undeclared` retires it" in line


def test_what_a_broken_schedule_may_declare_is_not_said_to_be_undeclared(settings: Any) -> None:
    with registry.set_aside():
        schedule.call("time.sleep", 0).hourly().name("gone.task")
        server().sync(timezone.now() - HOUR)
    server().sync(timezone.now())
    settings.ROOT_URLCONF = "tests.broken_project.urls"
    assert found("warning") == ["warning: lock 'default': not declared in what can be read: gone.task"]


def test_what_was_taken_out_of_use_and_is_declared_is_worth_a_warning_until_a_pass_takes_it_up() -> None:
    for number in range(3):
        schedule.call("time.sleep", 0).hourly().name(f"a.c{number}")
    web1 = server()
    web1.sync(timezone.now())
    assert found("warning") == []
    retired = (
        "warning: lock 'default': taken out of use, though declared: {}; the next pass takes {} up again, unless a"
    )
    web1.lock.retire(["a.b"])
    (line,) = found("warning")
    assert line.startswith(retired.format("a.b", "it"))
    web1.lock.retire(["a.c0", "a.c1", "a.c2"])
    (line,) = found("warning")
    assert line.startswith(retired.format("a.b, a.c0, a.c1 and 1 more", "them"))
    web1.sync(timezone.now())
    assert found("warning") == []


def test_a_clock_that_was_set_back_is_seen_by_the_rows_that_are_ahead_of_it() -> None:
    server().sync(timezone.now())
    ScheduledLock.objects.update(last_due_at=timezone.now() + HOUR)
    (line,) = found("problem")
    assert "the last due time of a.b is later than the store's clock: was that set back?" in line


def test_a_task_that_cannot_be_run_is_a_problem() -> None:
    schedule.call("nowhere.at_all").hourly().name("a.lost")
    (line,) = found("problem")
    assert "a.lost: 'nowhere.at_all' cannot be imported" in line


def test_a_schedule_that_cannot_be_read_is_a_problem(settings: Any) -> None:
    settings.ROOT_URLCONF = "tests.broken_project.urls"
    assert any("tests.broken_project.schedule cannot be read" in line for line in found("problem"))


def test_wrong_settings_are_a_problem(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"LEASES": 1}
    (line,) = found()
    assert line.startswith("problem: settings: MULTISERVER_SCHEDULE has no option 'LEASES'")


def held(name: str, *, ended: timedelta) -> None:
    """Have a server hold this task's lock with a lease that ended so long ago."""
    at = timezone.now() - ended
    values = {"owner": "somebody", "server": "web9", "acquired_at": at - HOUR, "renewed_at": at, "expires_at": at}
    ScheduledLock.objects.filter(task=name).update(**values)


def test_leases_that_have_ended_and_that_nobody_frees_are_worth_a_warning() -> None:
    schedule.call("time.sleep", 0).hourly().name("a.c")
    server().sync(timezone.now())
    held("a.b", ended=timedelta(seconds=85))
    assert found("warning") == []
    held("a.b", ended=timedelta(seconds=91))
    nobody = "warning: lock 'default': {}: no pass or service looks at the lock 'default'"
    assert found("warning") == [nobody.format("1 lease has ended and nobody frees it")]
    held("a.c", ended=timedelta(seconds=91))
    assert found("warning") == [nobody.format("2 leases have ended and nobody frees them")]


def test_due_times_that_nobody_starts_are_worth_a_warning() -> None:
    for number in range(4):
        schedule.call("time.sleep", 0).hourly().name(f"b.{number}")
    server().sync(timezone.now())
    since = timezone.now() - HOUR
    open_since = f"open since {since:%Y-%m-%d %H:%M:%SZ}"
    ScheduledLock.objects.filter(task="b.1").update(next_due_at=since, not_before=since)
    (line,) = found("warning")
    assert line == (
        f"warning: lock 'default': 1 due time is {open_since} (b.1): is runschedule running, on a server that this "
        "task is meant for?"
    )
    ScheduledLock.objects.exclude(task="b.1").update(next_due_at=since + HOUR / 2, not_before=since)
    (line,) = found("warning")
    assert line == (
        f"warning: lock 'default': 5 due times are {open_since} (a.b, b.0, b.1 and 2 more): is runschedule running, "
        "on a server that these tasks are meant for?"
    )
    operate.pause(None)
    assert found("warning") == ["warning: lock 'default': everything is paused"]


def test_a_server_whose_own_due_times_are_open_is_named_with_when_it_was_seen() -> None:
    server().sync(timezone.now())
    schedule.call("time.sleep", 0).hourly().on_every_server().name("b.here")
    for name in ("web1", "web2"):
        Server(ORMLock("default", {}), Notes(History("default")), *registry.tasks.values(), name=name).sync(
            timezone.now()
        )
    seen_at, since = timezone.now() - HOUR, timezone.now() - HOUR / 2
    ScheduledLock.objects.filter(task="b.here@web2").update(next_due_at=since, not_before=since)
    ScheduleState.objects.filter(scope="web2").update(seen_at=seen_at)
    (line,) = found("warning")
    assert line.startswith(
        "warning: lock 'default': due times of tasks on every server are open on web2 "
        f"(last seen {seen_at:%Y-%m-%d %H:%M:%SZ}): is runschedule running there?"
    )


def test_a_server_and_an_environment_that_a_task_is_not_for_are_not_accused(settings: Any) -> None:
    schedule.call("time.sleep", 0).hourly().on_every_server().only_on("web2").name("b.here")
    schedule.call("time.sleep", 0).hourly().environments("staging").name("b.staged")
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "ENVIRONMENT": "production"}
    server().sync(timezone.now())
    since = timezone.now() - HOUR
    ScheduledLock.objects.exclude(task="a.b").update(next_due_at=since, not_before=since)
    assert found("warning") == []


def test_open_due_times_of_tasks_for_certain_servers_name_these_and_when_they_were_seen() -> None:
    schedule.call("time.sleep", 0).hourly().only_on("web2", "web9").name("b.certain")
    server().sync(timezone.now())
    since = timezone.now() - HOUR
    ScheduledLock.objects.filter(task="b.certain").update(next_due_at=since, not_before=since)
    ScheduleState.objects.create(key="server:web2", seen_at=since)
    assert found("warning") == [
        f"warning: lock 'default': 1 due time is open since {since:%Y-%m-%d %H:%M:%SZ} (b.certain), only on web2 "
        f"(last seen {since:%Y-%m-%d %H:%M:%SZ}), web9 (never seen): is runschedule running there?"
    ]


def test_maintenance_mode_is_worth_a_warning_and_what_waits_for_its_end_is_not_overdue(settings: Any) -> None:
    server().sync(timezone.now())
    ScheduledLock.objects.update(next_due_at=timezone.now() - HOUR, not_before=timezone.now() - HOUR)
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "MAINTENANCE_MODE": lambda: True}
    mode = "warning: server: the project is in maintenance mode (MAINTENANCE_MODE)"
    assert found("warning") == [f"{mode}: nothing is started by schedule"]
    schedule.call("time.sleep", 0).hourly().even_in_maintenance_mode().name("a.always")
    server().sync(timezone.now())
    assert found("warning") == [f"{mode}: only a.always is started by schedule"]
    ScheduledLock.objects.update(next_due_at=timezone.now() - HOUR, not_before=timezone.now() - HOUR)
    assert ["(a.always): is runschedule running" in line for line in found("warning")] == [False, True]


def test_a_project_that_cannot_say_whether_it_is_in_maintenance_mode_is_a_problem(settings: Any) -> None:
    server().sync(timezone.now())
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "MAINTENANCE_MODE": "tests.shop.work.fail"}
    assert found("problem") == ["problem: server: MAINTENANCE_MODE cannot be asked: ValueError: no such column"]
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "MAINTENANCE_MODE": "nowhere.at_all"}
    (line,) = found("problem")
    assert line.startswith("problem: server: MULTISERVER_SCHEDULE['MAINTENANCE_MODE'] 'nowhere.at_all' cannot be imp")


def test_with_housekeeping_off_our_own_task_is_not_said_to_be_undeclared(settings: Any) -> None:
    with registry.set_aside():
        for name in (OUR_OWN, "gone.one", "gone.two"):
            schedule.call("time.sleep", 0).hourly().name(name)
        server().sync(timezone.now() - HOUR)
    server().sync(timezone.now())
    (line,) = found("warning")
    assert "gone.one, gone.two, multiserver_schedule.prune; `schedule prune --undeclared` retires them" in line
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "HOUSEKEEPING": False}
    (line,) = found("warning")
    assert "not declared in this version: gone.one, gone.two; `schedule prune" in line


def test_our_own_task_has_the_name_by_which_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "multiserver_schedule.housekeeping", raising=False)
    with registry.set_aside():
        import_module("multiserver_schedule.housekeeping")
        registry.complete_all()
        assert list(registry.tasks) == [OUR_OWN]


def test_that_everything_is_paused_is_worth_a_warning() -> None:
    server().sync(timezone.now())
    operate.pause(None, reason="deploy")
    assert found("warning") == ["warning: lock 'default': everything is paused (deploy)"]


def test_a_history_that_cannot_be_written_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    server().sync(timezone.now())

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OperationalError("attempt to write a readonly database")

    monkeypatch.setattr("django.db.models.query.QuerySet.create", refuse)
    assert found("problem") == [
        "problem: history in 'default': cannot be written: OperationalError: attempt to write a readonly database"
    ]
