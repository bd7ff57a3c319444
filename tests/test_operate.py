"""What people see of all stores, and how they free a lock by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, ClassVar

import pytest
from django.db import OperationalError, connection, transaction
from django.utils import timezone

from multiserver_schedule import operate, schedule, signals
from multiserver_schedule.declare import registry
from multiserver_schedule.entries import Cleanup, Row
from multiserver_schedule.exceptions import UnsafeTransaction
from multiserver_schedule.history import Afterwards
from multiserver_schedule.locks.base import BaseLock, CleanupRecorder, Declarations, Look
from multiserver_schedule.locks.cache import CacheLock
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.models import CleanupLog, ScheduledLock, ScheduledRun, ScheduleState
from multiserver_schedule.testing.contract import Notes, Server

from .caches import CacheStore

pytestmark = pytest.mark.django_db(transaction=True)

SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)
BOARD: dict[str, Any] = {"BACKEND": "tests.test_operate.Board"}
AWAY: dict[str, Any] = {"BACKEND": "tests.test_operate.Away"}
IN_CACHE: dict[str, Any] = {"BACKEND": "multiserver_schedule.locks.cache.CacheLock", "OPTIONS": {"cache": "lock"}}
NO_DATABASE: dict[str, Any] = {"BACKEND": "multiserver_schedule.locks.orm.ORMLock", "OPTIONS": {"using": "nowhere"}}


class Board(BaseLock):
    """A store that is not in the database: rows in a dict, of which people see and free what a test puts there."""

    held: ClassVar[dict[str, Row]] = {}
    everything: ClassVar[dict[str, Any]] = {}
    closed: ClassVar[int] = 0

    def look(self, declared: Declarations, *, ahead: timedelta = timedelta(0), now: datetime | None = None) -> Look:
        return Look(now=timezone.now(), known=True, paused="paused_at" in self.everything)

    def clock(self) -> datetime:
        return timezone.now()

    def rows(self, names: Iterable[str] | None = None) -> list[Row]:
        return [row for name, row in self.held.items() if names is None or name in names]

    def free(
        self,
        name: str,
        *,
        owner: str | None = None,
        server: str,
        record: CleanupRecorder,
        now: datetime | None = None,
    ) -> Cleanup | None:
        row = self.held[name]
        if row.owner is None or owner not in (None, row.owner):
            return None
        self.held[name] = dataclasses.replace(row, owner=None, fence=row.fence + 1)
        cleanup = Cleanup(
            task=name,
            due_at=row.last_due_at,
            server=row.server,
            owner=row.owner,
            fence=row.fence,
            acquired_at=row.acquired_at,
            expired_at=row.expires_at,
            cleaned_at=timezone.now(),
            cleaned_by=server,
            reason="released_by_hand",
        )
        return next(iter(record([cleanup])), cleanup)

    def close(self) -> None:
        Board.closed += 1


Board.__abstractmethods__ = frozenset()  # the rest is for servers


class Away(Board):
    """A store whose server is down."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Connection refused.")

    clock = rows = look = pause = resume = interrupt = want = _refuse


@pytest.fixture(autouse=True)
def _project(settings: Any) -> Iterator[None]:
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "LOCKS": {"cache": BOARD}}
    Board.held.clear()
    Board.everything.clear()
    with registry.set_aside():
        schedule.call("time.sleep", 0).daily().name("a.orm")
        schedule.call("time.sleep", 0).daily().name("a.cached").lock_with("cache")
        yield


def a_row(name: str, *, renewed: timedelta | None = None, lease: timedelta = 30 * SECOND, **more: Any) -> Row:
    """Return a row; held by web9, who renewed so long ago, where ``renewed`` says so."""
    now = timezone.now()
    values: dict[str, Any] = {
        "pk": 0,
        "task": name,
        "fingerprint": "",
        "last_due_at": now - timedelta(hours=1),
        "schedule_since": now - timedelta(days=2),
        "next_due_at": now + timedelta(hours=23),
        "not_before": now - timedelta(hours=1),
    }
    if renewed is not None:
        values |= {
            "owner": "an-owner",
            "server": "web9",
            "fence": 7,
            "acquired_at": now - timedelta(hours=1),
            "renewed_at": now - renewed,
            "expires_at": now - renewed + lease,
        }
    return Row(**(values | more))


def in_cache(name: str = "a.cached", **more: Any) -> None:
    Board.held[name] = a_row(name, **more)


def in_database(name: str = "a.orm", **more: Any) -> None:
    values = dataclasses.asdict(a_row(name, **more))
    for field in ("pk", "paused", "cancelled"):
        del values[field]
    ScheduledLock.objects.create(**values)


def lines() -> dict[str, operate.Overview]:
    """Return what is listed, each name once."""
    listing = operate.overview()
    found = {line.name: line for line in listing.lines}
    assert len(found) == len(listing.lines)
    return found


@contextmanager
def cleanups_heard() -> Iterator[list[dict[str, Any]]]:
    got: list[dict[str, Any]] = []

    def listen(**arguments: Any) -> None:
        got.append(arguments)

    signals.ensure_cleanup_executed.connect(listen)
    try:
        yield got
    finally:
        signals.ensure_cleanup_executed.disconnect(listen)


# -- what is seen -----------------------------------------------------------------------------------------------------


def test_locks_of_every_store_are_seen_with_who_since_and_until() -> None:
    in_database(renewed=SECOND)
    in_cache(renewed=2 * SECOND)
    found = lines()
    for name, lock in (("a.orm", "default"), ("a.cached", "cache")):
        line = found[name]
        assert (line.state, line.holder, line.lock, line.held_in) == ("running", "web9", lock, lock)
        assert line.since is not None and line.until is not None
        assert line.since < line.as_of < line.until


def test_a_lease_that_is_over_is_stale() -> None:
    in_cache(renewed=31 * SECOND)
    assert lines()["a.cached"].state == "stale"


def test_a_cached_task_has_its_last_result_from_the_database() -> None:
    in_cache()
    ScheduledRun.objects.create(task="a.cached", due_at=timezone.now(), status="failed", reason="exit status 3")
    line = lines()["a.cached"]
    assert (line.last_status, line.last_reason) == ("failed", "exit status 3")


def test_a_store_that_is_down_hides_no_other_and_says_why(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": AWAY}}
    in_database(renewed=SECOND)
    listing = operate.overview()
    found = {line.name: line for line in listing.lines}
    assert found["a.orm"].holder == "web9"
    assert found["a.cached"].state == "unknown: ConnectionError: Connection refused"
    assert found["a.cached"].next_due_at is not None
    assert listing.troubles == ("The lock 'cache' does not answer: ConnectionError: Connection refused",)


def test_a_database_that_is_down_hides_no_lock_in_a_cache(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"default": NO_DATABASE, "cache": BOARD}}
    in_cache(renewed=SECOND)
    listing = operate.overview()
    found = {line.name: line for line in listing.lines}
    assert found["a.cached"].holder == "web9"
    assert found["a.orm"].state.startswith("unknown: ConnectionDoesNotExist")
    assert len(listing.troubles) == 1


def test_a_history_that_cannot_be_read_hides_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    in_cache(renewed=SECOND)
    with connection.schema_editor() as editor:
        editor.alter_db_table(ScheduledRun, ScheduledRun._meta.db_table, "away")
    try:
        listing = operate.overview()
    finally:
        with connection.schema_editor() as editor:
            editor.alter_db_table(ScheduledRun, "away", ScheduledRun._meta.db_table)
    assert {line.name: line.holder for line in listing.lines}["a.cached"] == "web9"
    assert listing.troubles[0].startswith("The history in the database 'default' cannot be read: OperationalError")


def test_a_task_that_moved_is_seen_once_where_it_is_now() -> None:
    in_database("a.cached", moved_to="cache")
    in_cache()
    line = lines()["a.cached"]
    assert (line.lock, line.state, line.holder) == ("cache", "ready", "")


def test_a_task_on_its_way_says_what_it_waits_for_and_who_holds_it_there() -> None:
    in_database("a.cached", renewed=SECOND, moved_to="cache")
    in_cache(moved_from="default")
    line = lines()["a.cached"]
    assert line.state == "waits for the end of its last run in the lock 'default'"
    assert (line.lock, line.holder, line.held_in) == ("cache", "web9", "default")


def test_a_moved_task_whose_new_store_is_down_is_unknown_and_not_forgotten(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": AWAY}}
    in_database("a.cached", renewed=SECOND, moved_to="cache")
    line = lines()["a.cached"]
    assert line.state == "unknown: ConnectionError: Connection refused"
    assert (line.holder, line.held_in) == ("web9", "default")


def test_a_task_that_is_not_yet_where_it_is_declared_says_so() -> None:
    in_database("a.cached")
    line = lines()["a.cached"]
    assert (line.lock, line.state, line.note) == ("default", "ready", "declared for the lock 'cache'")


def test_what_nobody_declares_is_seen_and_who_holds_it() -> None:
    in_cache("gone.task", renewed=SECOND)
    line = lines()["gone.task"]
    assert (line.state, line.holder) == ("not declared, running", "web9")


def test_a_paused_task_that_still_runs_is_both() -> None:
    in_cache(renewed=SECOND, paused=True)
    assert lines()["a.cached"].state == "paused, running"


MINUTE = 60 * SECOND


@pytest.mark.parametrize(
    ("values", "state"),
    [
        ({}, "overdue"),
        ({"next_due_at": -119 * SECOND}, "ready"),
        ({"not_before": -MINUTE}, "ready"),  # the break after its last run is hardly over
        ({"not_before": -121 * SECOND}, "overdue"),
        ({"paused": True}, "paused"),
        ({"moved_from": "default"}, "waits for the end of its last run in the lock 'default'"),
        ({"next_due_at": None}, "ready"),
        ({"renewed": 31 * SECOND}, "stale"),
        ({"renewed": SECOND}, "running"),
    ],
)
def test_a_task_that_nobody_starts_is_overdue(values: dict[str, Any], state: str) -> None:
    now = timezone.now()
    given = {"next_due_at": -121 * SECOND, "not_before": -HOUR} | values
    given |= {key: now + given[key] for key in ("next_due_at", "not_before") if given[key] is not None}
    in_cache(**given)
    line = lines()["a.cached"]
    assert (line.state, line.overdue_since) == (state, given["next_due_at"] if state == "overdue" else None)


def test_a_task_with_jitter_is_overdue_that_much_later() -> None:
    schedule.call("time.sleep", 0).daily().jitter(minutes=30).name("a.spread").lock_with("cache")
    later = registry.tasks["a.spread"].offset("a.spread")
    assert later > MINUTE
    for ago, state in ((121 * SECOND, "ready"), (later + 121 * SECOND, "overdue")):
        in_cache("a.spread", next_due_at=timezone.now() - ago, not_before=timezone.now() - HOUR)
        assert lines()["a.spread"].state == state


def test_while_everything_is_paused_nothing_is_overdue() -> None:
    in_cache(next_due_at=timezone.now() - HOUR)
    Board.everything["paused_at"] = timezone.now()
    assert (lines()["a.cached"].state, lines()["a.cached"].overdue_since) == ("paused", None)


def test_of_a_server_whose_own_tasks_are_overdue_it_is_said_when_it_was_seen() -> None:
    schedule.call("time.sleep", 0).daily().on_every_server().name("b.here")
    seen_at = timezone.now() - 5 * MINUTE
    for server in ("web2", "web3"):
        in_database(f"b.here@{server}", next_due_at=timezone.now() - HOUR, last_due_at=timezone.now() - 2 * HOUR)
    in_cache(next_due_at=timezone.now() - HOUR)
    ScheduleState.objects.create(key="server:web2", seen_at=seen_at)
    ScheduleState.objects.create(key="declared:x@web2", scope="web2", seen_at=seen_at - HOUR)
    found = lines()
    assert (found["b.here@web2"].state, found["b.here@web2"].server_seen_at) == ("overdue", seen_at)
    # Of one that has left no trace but its row, that is told by the row.
    assert found["b.here@web3"].server_seen_at == ScheduledLock.objects.get(task="b.here@web3").last_due_at
    assert (found["a.cached"].state, found["a.cached"].server_seen_at) == ("overdue", None)


@pytest.mark.parametrize("row", [{"next_due_at": -HOUR}, {"next_due_at": HOUR}, None], ids=["open", "to come", "none"])
def test_a_row_of_a_server_that_its_task_is_not_for_is_not_overdue_and_not_in_the_timeline(
    row: dict[str, Any] | None, settings: Any
) -> None:
    schedule.call("time.sleep", 0).daily().on_every_server().only_on("s1", "s2").name("b.here")
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "s3", "LOCKS": {"cache": BOARD}}
    for server in ("s1", "s3") if row else ():
        in_database(f"b.here@{server}", next_due_at=timezone.now() + row["next_due_at"] if row else None)
    line = lines()["b.here@s3"]
    assert (line.state, line.overdue_since, line.is_meant) == ("not meant for s3: only on s1 and s2", None, False)
    assert "b.here@s3" not in {each.name for each in operate.timeline(operate.overview(), 20)}
    if row is not None:
        assert lines()["b.here@s1"].state == ("overdue" if row["next_due_at"] < timedelta(0) else "ready")


@pytest.mark.parametrize(
    ("environment", "state"),
    [
        ("staging", "overdue"),
        ("production", "not meant for the environment 'production': only for staging"),
        (None, "not meant for a server without ENVIRONMENT: only for staging"),
    ],
)
def test_a_task_of_another_environment_is_not_overdue(environment: str | None, state: str, settings: Any) -> None:
    schedule.call("time.sleep", 0).daily().environments("staging").name("b.staged")
    settings.MULTISERVER_SCHEDULE = {"ENVIRONMENT": environment, "LOCKS": {"cache": BOARD}}
    in_database("b.staged", next_due_at=timezone.now() - HOUR)
    assert lines()["b.staged"].state == state


def test_of_an_overdue_task_for_certain_servers_it_is_said_when_one_of_them_was_seen_last_or_that_none_ever_was() -> (
    None
):
    schedule.call("time.sleep", 0).daily().only_on("web2", "web3").name("b.certain")
    schedule.call("time.sleep", 0).daily().only_on("web9").name("b.nowhere")
    for name in ("b.certain", "b.nowhere"):
        in_database(name, next_due_at=timezone.now() - HOUR)
    seen_at = timezone.now() - 5 * MINUTE
    for server, at in (("web2", seen_at - HOUR), ("web3", seen_at), ("web1", timezone.now())):
        ScheduleState.objects.create(key=f"server:{server}", seen_at=at)
    found = lines()
    certain, nowhere = found["b.certain"], found["b.nowhere"]
    assert (certain.state, certain.server_seen, certain.server_seen_at) == ("overdue", "web3", seen_at)
    assert (nowhere.state, nowhere.server_seen_at, nowhere.note) == (
        "overdue",
        None,
        "nothing was ever seen of its server web9",
    )


def test_a_schedule_that_cannot_be_read_hides_no_lock(settings: Any) -> None:
    settings.ROOT_URLCONF = "tests.broken_project.urls"
    in_cache(renewed=SECOND)
    listing = operate.overview()
    assert {line.name: line.holder for line in listing.lines}["a.cached"] == "web9"
    assert listing.troubles[0].startswith("tests.broken_project.schedule cannot be read: /")
    assert listing.troubles[0].endswith(
        "/tests/broken_project/schedule.py:1: ModuleNotFoundError: No module named 'no_such_module_of_somebody'"
    )


def test_a_cache_is_closed_again_and_the_connection_of_the_caller_is_not() -> None:
    connection.ensure_connection()
    mine, before = connection.connection, Board.closed
    operate.overview()
    assert Board.closed == before + 1
    assert connection.connection is mine


# -- what is freed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.orm", "a.cached"])
def test_a_stale_lock_is_freed_recorded_and_told(name: str) -> None:
    (in_database if name == "a.orm" else in_cache)(name, renewed=31 * SECOND)
    with cleanups_heard() as told:
        released = operate.unlock(name)
    assert lines()[name].holder == ""
    log = CleanupLog.objects.get()
    assert (log.task, log.reason, log.server, log.cleaned_by) == (name, "released_by_hand", "web9", "web1")
    assert [(each["cleanup"], each["reason"], each["command"]) for each in told] == [
        (log, "released_by_hand", "time.sleep(0)")
    ]
    assert told[0]["task"] is registry.tasks[name]
    assert (released.holder.server, released.unrecorded) == ("web9", "")


@pytest.mark.parametrize("name", ["a.orm", "a.cached"])
def test_a_holder_that_renews_is_not_robbed(name: str) -> None:
    (in_database if name == "a.orm" else in_cache)(name, renewed=5 * SECOND)
    with pytest.raises(operate.UnlockRefused) as refused:
        operate.unlock(name)
    assert f"{name} is held by web9 since " in str(refused.value)
    assert "it renewed the lease at " in str(refused.value)
    assert lines()[name].holder == "web9"
    assert not CleanupLog.objects.exists()


@pytest.mark.parametrize("name", ["a.orm", "a.cached"])
def test_by_force_it_is(name: str) -> None:
    (in_database if name == "a.orm" else in_cache)(name, renewed=5 * SECOND)
    operate.unlock(name, force=True)
    assert lines()[name].holder == ""


def test_a_holder_that_missed_two_heartbeats_may_be_robbed_although_its_lease_holds() -> None:
    in_cache(renewed=19 * SECOND)
    with pytest.raises(operate.UnlockRefused):
        operate.unlock("a.cached")
    in_cache(renewed=21 * SECOND)
    assert lines()["a.cached"].state == "running"
    operate.unlock("a.cached")


def test_the_heartbeat_of_a_short_lease_is_a_third_of_it() -> None:
    in_cache(renewed=5 * SECOND, lease=6 * SECOND)
    operate.unlock("a.cached")


def test_another_run_than_the_one_that_was_seen_is_not_freed_in_its_place() -> None:
    in_cache(renewed=31 * SECOND)
    with pytest.raises(operate.UnlockRefused, match="not held by the run that you saw any more: held by web9 since"):
        operate.unlock("a.cached", owner="another-owner", force=True)
    assert lines()["a.cached"].holder == "web9"


def test_a_run_that_has_just_taken_the_lock_over_is_not_freed_in_the_place_of_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_database(renewed=31 * SECOND)
    free = ORMLock.free

    def too_late(lock: ORMLock, *args: Any, **more: Any) -> Cleanup | None:
        ScheduledLock.objects.update(owner="the-next-owner", server="web2")
        return free(lock, *args, **more)

    monkeypatch.setattr(ORMLock, "free", too_late)
    with pytest.raises(operate.UnlockRefused, match=r"is not held by web9 .* any more: it was freed meanwhile"):
        operate.unlock("a.orm")
    assert ScheduledLock.objects.get().owner == "the-next-owner"
    assert not CleanupLog.objects.exists()


@pytest.mark.parametrize("name", ["a.orm", "a.cached"])
def test_what_nobody_holds_is_said_to_be_free(name: str) -> None:
    in_database()
    with pytest.raises(operate.UnlockRefused, match=f"Nobody holds the lock of {name}: there is nothing to free"):
        operate.unlock(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.cachde", "No task is named 'a.cachde'. Did you mean a.cached?"),
        ("A.Cached", "No task is named 'A.Cached'. Did you mean a.cached?"),
        ("gone.tsak", "No task is named 'gone.tsak'. Did you mean gone.task?"),
        ("b.here", "b.here has a lock for each server. Name one of them: b.here@web2, b.here@web3."),
        ("xyz", "No task is named 'xyz'. `manage.py schedule list` shows them all."),
    ],
)
def test_an_unknown_name_gets_the_nearest_one_of_every_store(name: str, said: str) -> None:
    in_database("gone.task")
    in_cache("b.here@web2")
    in_cache("b.here@web3")
    with pytest.raises(operate.UnlockRefused) as refused:
        operate.unlock(name)
    assert str(refused.value) == said


@pytest.mark.parametrize("name", ["gone.task", "b.here@web2"])
def test_a_lock_that_nobody_declares_any_more_can_be_freed(name: str) -> None:
    in_cache(name, renewed=31 * SECOND)
    with cleanups_heard() as told:
        operate.unlock(name)
    assert CleanupLog.objects.get().task == name
    assert (told[0]["task"], told[0]["command"]) == (None, name)


def test_the_last_run_of_a_moved_task_is_freed_in_the_lock_that_it_left() -> None:
    in_database("a.cached", renewed=31 * SECOND, moved_to="cache")
    in_cache(moved_from="default")
    assert operate.unlock("a.cached").holder.lock == "default"


def test_a_task_that_two_locks_hold_is_freed_where_one_says() -> None:
    in_database("a.cached", renewed=31 * SECOND)
    in_cache(renewed=31 * SECOND)
    with pytest.raises(operate.UnlockRefused, match="held in the locks 'default' and 'cache'"):
        operate.unlock("a.cached")
    assert operate.unlock("a.cached", lock="cache").holder.lock == "cache"
    assert ScheduledLock.objects.get().owner is not None


def test_a_lock_that_is_not_in_the_settings_is_refused() -> None:
    with pytest.raises(operate.UnlockRefused, match=r"There is no lock 'cahce'. Locks are: cache, default\."):
        operate.unlock("a.cached", lock="cahce")


def test_a_store_that_is_down_is_said_to_be(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": AWAY}}
    with pytest.raises(
        operate.UnlockRefused, match="The lock 'cache' does not answer: ConnectionError: Connection ref"
    ):
        operate.unlock("a.cached")


def test_a_store_that_is_down_keeps_nobody_from_freeing_a_lock_in_another(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": AWAY}}
    in_database(renewed=31 * SECOND)
    operate.unlock("a.orm")


def test_a_clean_up_that_the_database_does_not_take_is_said_not_to_be_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_cache(renewed=31 * SECOND)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OperationalError("the server is shutting down")

    monkeypatch.setattr("multiserver_schedule.history.History.cleaned", refuse)
    with cleanups_heard() as told:
        released = operate.unlock("a.cached")
    assert lines()["a.cached"].holder == ""
    assert released.unrecorded == "OperationalError: the server is shutting down"
    assert [(each["cleanup"].pk, each["cleanup"].server) for each in told] == [(None, "web9")]


def test_nothing_is_freed_inside_a_transaction_that_could_undo_it() -> None:
    in_database(renewed=31 * SECOND)
    with transaction.atomic(), pytest.raises(UnsafeTransaction):
        operate.unlock("a.orm")
    assert ScheduledLock.objects.get().owner is not None


def test_a_task_on_every_server_and_one_of_its_name_are_not_mixed_up() -> None:
    schedule.call("time.sleep", 0).daily().on_every_server().name("b.here")
    in_database("b.here")
    in_database("b.here@web2")
    found = lines()
    assert found["b.here"].state == "not declared"
    assert found["b.here@web2"].state == "ready"
    assert found["b.here@web1"].state == "not seen yet"


# -- on every cache ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(cache_store: CacheStore, settings: Any) -> Iterator[CacheLocked]:
    """Have the lock "cache" in a cache that is up."""
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "LOCKS": {"cache": IN_CACHE}}
    lock = CacheLock("cache", IN_CACHE["OPTIONS"])
    yield CacheLocked(lock)
    lock.close()


class CacheLocked:
    """web9's part in it."""

    def __init__(self, lock: BaseLock) -> None:
        self.lock = lock
        self.server = Server(lock, Notes(Afterwards("default")), registry.tasks["a.cached"], name="web9")

    def hold(self, ago: timedelta) -> None:
        """Claim the task so long ago, and renew nothing since."""
        now = timezone.now()
        self.server.sync(now - timedelta(minutes=10))
        (claim,) = self.server.claim(self.server.occurrence(now - ago, trigger="manual"), now=now - ago)
        assert claim.server == "web9"


def test_who_holds_a_lock_in_a_cache_is_seen(cached: CacheLocked) -> None:
    cached.hold(ago=2 * SECOND)
    line = lines()["a.cached"]
    assert (line.state, line.holder, line.lock) == ("running", "web9", "cache")
    assert line.since is not None and line.until is not None
    assert timedelta(0) < line.until - line.since < timedelta(seconds=40)


def test_a_lock_in_a_cache_is_freed_recorded_and_told(cached: CacheLocked) -> None:
    cached.hold(ago=40 * SECOND)
    assert lines()["a.cached"].state == "stale"
    with cleanups_heard() as told:
        operate.unlock("a.cached")
    log = CleanupLog.objects.get()
    assert (log.task, log.reason, log.server, log.cleaned_by) == ("a.cached", "released_by_hand", "web9", "web1")
    assert [each["cleanup"] for each in told] == [log]
    assert ScheduledRun.objects.get().status == "abandoned"
    assert lines()["a.cached"].holder == ""


def test_a_holder_in_a_cache_that_looks_alive_is_robbed_by_force_alone(cached: CacheLocked) -> None:
    cached.hold(ago=2 * SECOND)
    with pytest.raises(operate.UnlockRefused, match="looks alive"):
        operate.unlock("a.cached")
    operate.unlock("a.cached", force=True)
    assert lines()["a.cached"].holder == ""


def test_what_the_database_did_not_take_is_recorded_by_a_later_pass(
    cached: CacheLocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached.hold(ago=40 * SECOND)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OperationalError("the server is shutting down")

    with monkeypatch.context() as patch:
        patch.setattr("multiserver_schedule.history.History.cleaned", refuse)
        assert operate.unlock("a.cached").unrecorded == "OperationalError: the server is shutting down"
    assert cached.server.lock.look(cached.server.declared).expired
    with cleanups_heard() as told:
        assert cached.server.reap(timezone.now()) == []
    assert told == []  # for the second time
    assert CleanupLog.objects.get().reason == "released_by_hand"


def test_a_cache_that_is_down_hides_no_lock_in_the_database(cached: CacheLocked, cache_store: CacheStore) -> None:
    in_database(renewed=SECOND)
    cache_store.server.crash()
    listing = operate.overview()
    found = {line.name: line for line in listing.lines}
    assert found["a.orm"].holder == "web9"
    assert found["a.cached"].state.startswith("unknown: ")
    with pytest.raises(operate.UnlockRefused, match="The lock 'cache' does not answer"):
        operate.unlock("a.cached")
