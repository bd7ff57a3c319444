"""Pause, resume, interrupt and a run that is asked for: what each store then does, and what survives its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import OperationalError, transaction
from django.utils import timezone as here

from multiserver_schedule import operate, schedule, service
from multiserver_schedule.declare import registry
from multiserver_schedule.entries import Claim, Row
from multiserver_schedule.exceptions import StoreRefused, StoreTimeout, UnsafeTransaction
from multiserver_schedule.history import Afterwards, History
from multiserver_schedule.locks.base import BaseLock
from multiserver_schedule.locks.cache import CacheLock
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.models import CleanupLog, ScheduledLock, ScheduledRun, ScheduleState
from multiserver_schedule.run.base import boot_time
from multiserver_schedule.run.inline import InlineRunner
from multiserver_schedule.testing.contract import Notes, Server

from .caches import CacheStore
from .test_operate import AWAY, IN_CACHE

pytestmark = pytest.mark.django_db(transaction=True)

HOUR = timedelta(hours=1)


@dataclass
class Site:
    """A project with one task in the database, one on every server and one in the other lock, as web1 has them."""

    lock: BaseLock
    alias: str
    cached: BaseLock | None

    def server(self, *names: str, name: str = "web1", lock: BaseLock | None = None) -> Server:
        lock = lock or self.lock
        history = History("default") if lock.transactional else Afterwards("default")
        return Server(lock, Notes(history), *(registry.tasks[each] for each in names), name=name)


@pytest.fixture(autouse=True)
def _project(settings: Any) -> Iterator[None]:
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1"}
    with registry.set_aside():
        schedule.call("time.sleep", 0).hourly().name("a.orm")
        schedule.call("time.sleep", 0).hourly().name("a.other")
        schedule.call("time.sleep", 0).hourly().on_every_server().name("a.here")
        yield


@pytest.fixture
def site() -> Site:
    """Have the three tasks registered since an hour, by web1 and web2."""
    site = Site(ORMLock("default", {}), "default", None)
    for name in ("web1", "web2"):
        site.server("a.orm", "a.other", "a.here", name=name).sync(here.now() - HOUR)
    return site


@pytest.fixture
def cached(cache_store: CacheStore, settings: Any) -> Iterator[Site]:
    """Have a fourth task, in a cache."""
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "LOCKS": {"cache": IN_CACHE}}
    schedule.call("time.sleep", 0).hourly().lock_with("cache").name("a.cached")
    lock = CacheLock("cache", IN_CACHE["OPTIONS"])
    site = Site(lock, "cache", lock)
    site.server("a.cached").sync(here.now() - HOUR)
    yield site
    lock.close()


def now() -> datetime:
    return datetime.now(timezone.utc)


def state(name: str) -> operate.Overview:
    return next(line for line in operate.overview().lines if line.name == name)


# -- pause ------------------------------------------------------------------------------------------------------------


def test_a_paused_task_is_not_due_and_says_since_when_and_why(site: Site) -> None:
    web1 = site.server("a.orm", "a.other")
    assert {"a.orm", "a.other"} <= set(web1.due(now() + HOUR))
    done = operate.pause(["a.orm"], reason="the bank  is\ndown")
    assert (done.rows, done.troubles) == ((("a.orm", "default"),), ())
    assert "a.orm" not in web1.due(now() + HOUR) and "a.other" in web1.due(now() + HOUR)
    line = state("a.orm")
    assert (line.state, line.paused_reason, line.paused_with_everything) == ("paused", "the bank is down", False)
    assert line.paused_at is not None and abs(line.paused_at - now()) < timedelta(seconds=30)


READ_ONLY = OperationalError("attempt to write a readonly database")


@pytest.mark.parametrize(
    ("error", "what", "then"),
    [
        (StoreTimeout("no answer"), "does not answer", "; try again when it is back."),
        (StoreRefused("a replica"), "answers, but refuses", "."),
        (READ_ONLY, "answers, but refuses", "."),
    ],
    ids=["hangs", "refuses", "read-only"],
)
def test_a_store_that_hangs_or_refuses_is_one_line_as_one_that_is_away_is(
    site: Site, monkeypatch: pytest.MonkeyPatch, error: Exception, what: str, then: str
) -> None:
    def ask(*args: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr(ORMLock, "pause", ask)
    with pytest.raises(CommandError) as refused:
        call_command("schedule", "pause", "a.orm")
    assert str(refused.value) == f"The lock 'default' {what}: {type(error).__name__}: {str(error).rstrip('.')}{then}"


def test_a_second_pause_keeps_its_time_and_takes_the_new_reason(site: Site) -> None:
    operate.pause(["a.orm"], reason="first")
    since = state("a.orm").paused_at
    operate.pause(["a.orm"], reason="second")
    assert (state("a.orm").paused_at, state("a.orm").paused_reason) == (since, "second")


def test_a_task_on_every_server_is_paused_on_all_by_its_name_and_on_one_by_its_row(site: Site) -> None:
    assert {name for name, _ in operate.pause(["a.here"]).rows} == {"a.here@web1", "a.here@web2"}
    operate.resume(["a.here@web2"])
    assert state("a.here@web1").state == "paused" != state("a.here@web2").state


def test_everything_is_paused_and_resumed_and_a_single_pause_stays(site: Site) -> None:
    """Laravel's pause is global, and a task cannot be paused alone."""
    operate.pause(["a.orm"], reason="alone")
    done = operate.pause(None, reason="deploy")
    assert done.locks == ("default",)
    assert site.server("a.orm", "a.other").due(now() + HOUR) == []
    assert (state("a.other").paused_with_everything, state("a.other").paused_reason) == (True, "deploy")
    assert (state("a.orm").paused_with_everything, state("a.orm").paused_reason) == (False, "alone")
    operate.resume(None)
    due = site.server("a.orm", "a.other").due(now() + 2 * HOUR)
    assert "a.other" in due and "a.orm" not in due


def test_what_was_due_while_it_was_paused_is_not_made_up_for(site: Site) -> None:
    ScheduledLock.objects.update(
        last_due_at=now() - 5 * HOUR, schedule_since=now() - 5 * HOUR, next_due_at=now() - HOUR
    )
    operate.pause(["a.orm"])
    ScheduledLock.objects.filter(task="a.orm").update(paused_at=now() - 2 * HOUR)
    operate.resume(["a.orm"])
    row = site.server("a.orm").row("a.orm")
    assert row.last_due_at >= now() - timedelta(seconds=30)
    assert row.next_due_at is not None and row.next_due_at > now()


def _owing(last_due_at: datetime) -> None:
    """Have the last due time be tried again in a moment."""
    ScheduledLock.objects.filter(task="a.orm").update(
        last_due_at=last_due_at,
        schedule_since=last_due_at,
        next_due_at=last_due_at + HOUR,
        retry_at=now() + timedelta(minutes=1),
        attempt=2,
    )


@pytest.mark.parametrize("names", [["a.orm"], None], ids=["one", "everything"])
def test_an_attempt_that_a_due_time_during_the_pause_has_superseded_is_told(
    site: Site, caplog: pytest.LogCaptureFixture, names: list[str] | None
) -> None:
    """The history says "tried again in …", and nobody would ever say that it was not."""
    full = now().replace(minute=0, second=0, microsecond=0)
    _owing(full - HOUR)
    operate.pause(names)
    ScheduledLock.objects.filter(paused_at__isnull=False).update(paused_at=full - HOUR / 2)
    ScheduleState.objects.filter(paused_at__isnull=False).update(paused_at=full - HOUR / 2)
    said = f"{full - HOUR:%Y-%m-%d %H:%M:%S}Z was to be tried again, and is not: a newer due time came during the pause"
    assert operate.resume(names).notes == (f"a.orm: its due time {said}.",)
    [line] = [record for record in caplog.records if record.name == "multiserver_schedule"]
    assert line.levelname == "WARNING"
    assert line.getMessage().endswith(f"task=a.orm due={(full - HOUR).isoformat()} server=web1")
    assert site.server("a.orm").row("a.orm").retry_at is None


@pytest.mark.parametrize("names", [["a.orm"], None], ids=["one", "everything"])
def test_an_attempt_that_is_made_after_the_pause_is_not_told_as_given_up(site: Site, names: list[str] | None) -> None:
    _owing(now())
    operate.pause(names)
    assert operate.resume(names).notes == ()
    assert site.server("a.orm").row("a.orm").retry_at is not None


def test_to_resume_a_task_while_everything_is_paused_says_so(site: Site) -> None:
    operate.pause(["a.orm"])
    operate.pause(None, reason="deploy")
    done = operate.resume(["a.orm"])
    assert done.rows == (("a.orm", "default"),)
    assert done.notes[0].startswith("Everything is paused in the lock 'default' (deploy): nothing there runs before")


def test_what_was_not_paused_is_told_apart_from_what_was(site: Site) -> None:
    operate.pause(["a.orm"])
    done = operate.resume(["a.orm", "a.other"])
    assert (done.rows, done.unchanged) == ((("a.orm", "default"),), ("a.other",))
    assert operate.resume(None).unchanged == ("default",)


@pytest.mark.parametrize("verb", [operate.pause, operate.resume])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.orn", "No task is named 'a.orn'. Did you mean a.orm?"),
        ("A.ORM", "No task is named 'A.ORM'. Did you mean a.orm?"),
        ("a.here@web9", "a.here@web9 is declared, but no pass has seen it on web9 yet"),
        ("a.new", "a.new is declared, but no pass has seen it anywhere yet"),
    ],
)
def test_where_a_name_is_not_known_nothing_is_done(site: Site, verb: Any, name: str, said: str) -> None:
    schedule.call("time.sleep", 0).hourly().name("a.new")
    operate.pause(["a.other"])
    before = list(ScheduledLock.objects.values("task", "paused_at"))
    with pytest.raises(operate.Refused) as refused:
        verb(["a.orm", name])
    assert str(refused.value).startswith(said)
    assert list(ScheduledLock.objects.values("task", "paused_at")) == before


def test_a_row_that_nobody_declares_any_more_can_be_paused(site: Site) -> None:
    with registry.set_aside():
        assert operate.pause(["a.orm"]).rows == (("a.orm", "default"),)


def test_a_reason_that_is_too_long_is_refused(site: Site) -> None:
    with pytest.raises(operate.Refused, match="The reason has 256 characters; the most is 255"):
        operate.pause(["a.orm"], reason="x" * 256)


def test_nothing_is_paused_inside_a_transaction_that_could_undo_it(site: Site) -> None:
    with transaction.atomic(), pytest.raises(UnsafeTransaction):
        operate.pause(["a.orm"])
    with transaction.atomic(), pytest.raises(UnsafeTransaction):
        operate.pause(None)


def test_a_lock_that_is_not_in_the_settings_is_refused(site: Site) -> None:
    with pytest.raises(operate.Refused, match=r"There is no lock 'cahce'. Locks are: default\."):
        operate.pause(None, lock="cahce")


@pytest.mark.parametrize("name", ["a.orm", "a.here", "a.here@web2", "a.new", "gone.task"])
def test_a_task_that_is_in_another_lock_than_the_one_named_is_said_to_be_there(
    site: Site, settings: Any, name: str
) -> None:
    """To run a pass, as is said of one that nobody has seen, would never help."""
    empty = {"BACKEND": "tests.test_operate_steer.Empty"}
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "LOCKS": {"away": AWAY, "two": empty}}
    schedule.call("time.sleep", 0).hourly().name("a.new")
    ScheduledLock.objects.filter(task="a.other").update(task="gone.task", owner="x")
    said = rf"^{name} is in the lock 'default', not in 'two'\. Name that one, or none\.$"
    verbs: list[Callable[[], object]] = [
        lambda: operate.pause([name], lock="two"),
        lambda: operate.resume([name], lock="two"),
        lambda: operate.unlock(name, lock="two", force=True),
    ]
    for verb in verbs:
        with pytest.raises(operate.Refused, match=said):
            verb()
    assert not ScheduledLock.objects.filter(paused_at__isnull=False).exists()
    with pytest.raises(operate.Refused, match=r"No task is named 'a\.nowhere'"):
        operate.pause(["a.nowhere"], lock="two")


class Empty(ORMLock):
    """A store that has no row."""

    def rows(self, names: Iterable[str] | None = None) -> list[Row]:
        return []


def test_a_store_that_is_down_keeps_nobody_from_pausing_everything_else(site: Site, settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": AWAY}}
    done = operate.pause(None)
    assert done.locks == ("default",)
    away = "The lock 'cache' does not answer: ConnectionError: Connection refused. Nothing was changed in it."
    assert done.troubles == (away,)
    assert site.server("a.orm").due(now() + HOUR) == []


def test_a_task_whose_store_is_down_is_not_said_to_be_unknown(site: Site, settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": AWAY}}
    schedule.call("time.sleep", 0).hourly().lock_with("cache").name("a.cached")
    with pytest.raises(operate.Refused, match="The lock 'cache' does not answer"):
        operate.pause(["a.cached"])
    with pytest.raises(operate.Refused, match=r"Whether it has a\.nowhere is not known"):
        operate.pause(["a.nowhere"])


# -- a store that may lose it -----------------------------------------------------------------------------------------


def test_a_pause_in_a_cache_survives_a_flush_in_the_database(cached: Site, cache_store: CacheStore) -> None:
    """Laravel's pause is a key in the cache: a flush, and everything runs again."""
    assert operate.pause(["a.cached"], reason="the bank is down").troubles == ()
    operate.pause(None, lock="cache", reason="deploy")
    assert (state("a.cached").state, state("a.cached").paused_reason) == ("paused", "the bank is down")
    assert cached.server("a.cached").due(now() + HOUR) == []
    cache_store.server.reset()
    assert History("default").paused("cache") == {"a.cached": "the bank is down", "": "deploy"}
    assert Afterwards("default").paused("cache") == {"a.cached": "the bank is down", "": "deploy"}
    assert History("default").paused("default") == {}
    for _ in range(2):
        call_command("runschedule", "--inline", stdout=StringIO())
        assert (state("a.cached").state, state("a.cached").paused_reason) == ("paused", "the bank is down")
        assert cached.lock.look(cached.server("a.cached").declared).paused
    assert operate.resume(None, lock="cache").locks == ("cache",)
    assert operate.resume(["a.cached"]).rows == (("a.cached", "cache"),)
    cache_store.server.reset()
    call_command("runschedule", "--inline", stdout=StringIO())
    assert state("a.cached").state == "ready"


def test_what_is_resumed_in_a_cache_is_not_paused_again_by_a_loss(cached: Site) -> None:
    operate.pause(["a.cached"])
    operate.pause(None)
    assert operate.resume(["a.cached"]).rows == (("a.cached", "cache"),)
    assert History("default").paused("cache") == {"": ""}
    operate.resume(None)
    assert History("default").paused("cache") == {}
    assert cached.server("a.cached").due(now() + 2 * HOUR) == ["a.cached"]


def test_a_task_is_resumed_in_a_cache_only_when_the_database_notes_no_pause_of_it_any_more(
    cached: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that registers it anew in between would take the pause up again."""
    operate.pause(["a.cached"])
    kind = type(cached.lock)
    resume = kind.resume
    noted: list[object] = []

    def seen(lock: BaseLock, *args: Any, **more: Any) -> Any:
        noted.append(History("default").paused("cache"))
        return resume(lock, *args, **more)

    monkeypatch.setattr(kind, "resume", seen)
    operate.resume(["a.cached"])
    assert noted == [{}]


def test_everything_that_is_paused_in_a_cache_is_seen_with_the_reason(cached: Site) -> None:
    operate.pause(None, lock="cache", reason="deploy")
    line = state("a.cached")
    assert (line.state, line.paused_with_everything, line.paused_reason) == ("paused", True, "deploy")


def test_a_pause_that_the_database_does_not_take_holds_and_says_so(
    cached: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OperationalError("the server is shutting down")

    with monkeypatch.context() as patch:
        patch.setattr(History, "note_pause", refuse)
        done = operate.pause(["a.cached"])
    assert done.rows == (("a.cached", "cache"),)
    assert "the database did not take it (OperationalError: the server is shutting down)" in done.troubles[0]
    assert state("a.cached").state == "paused"
    with monkeypatch.context() as patch:
        patch.setattr(History, "forget_pause", refuse)
        done = operate.resume(["a.cached"])
    assert "the database still notes the pause" in done.troubles[0]
    assert state("a.cached").state != "paused"


def test_a_pause_that_the_cache_has_lost_can_be_taken_back(cached: Site, cache_store: CacheStore) -> None:
    operate.pause(["a.cached"])
    cache_store.server.reset()
    web1 = cached.server("a.cached")
    web1.sync(now())
    done = operate.resume(["a.cached"])
    assert done.rows == (("a.cached", "cache"),)
    assert History("default").paused("cache") == {}


def test_pauses_are_noted_by_the_lock_and_kept_apart() -> None:
    history = History("default")
    history.note_pause("a", ["x", "y"], "one", now())
    history.note_pause("a_", ["x"], "a wildcard of LIKE", now())
    history.note_pause("a", ["x"], "two", now())
    assert history.paused("a") == {"x": "two", "y": "one"}
    assert history.forget_pause("a", ["x", "z"]) == ["x"]
    assert history.paused("a") == {"y": "one"}
    assert history.paused("a_") == {"x": "a wildcard of LIKE"}


def test_a_thousand_pauses_are_noted_in_a_few_statements(django_assert_max_num_queries: Any) -> None:
    names = [f"a.task{number:04}" for number in range(1000)]
    with django_assert_max_num_queries(100):  # SQLite takes so many parameters, and no more
        History("default").note_pause("cache", names, "", now())
        assert len(History("default").paused("cache") or ()) == 1000
        History("default").forget_pause("cache", names)


# -- interrupt --------------------------------------------------------------------------------------------------------


def test_services_and_passes_see_when_they_were_interrupted(site: Site) -> None:
    web1 = site.server("a.orm")
    assert web1.lock.look(web1.declared).interrupted_at is None
    assert operate.interrupt().locks == ("default",)
    interrupted_at = web1.lock.look(web1.declared).interrupted_at
    assert interrupted_at is not None and abs(interrupted_at - now()) < timedelta(seconds=30)


def test_an_interrupt_is_a_moment_which_nobody_takes_back(site: Site) -> None:
    """Laravel's is one flag for all servers, which the next one to start deletes before the others have seen it."""
    operate.interrupt()
    web1, web2 = site.server("a.orm"), site.server("a.orm", name="web2")
    first = web1.lock.look(web1.declared).interrupted_at
    for server in (web1, web2, site.server("a.orm", name="web3")):
        server.sync(now())
        assert server.lock.look(server.declared).interrupted_at == first


def test_every_lock_is_told_of_an_interrupt(cached: Site) -> None:
    assert set(operate.interrupt().locks) == {"default", "cache"}
    web1 = cached.server("a.cached")
    assert web1.lock.look(web1.declared).interrupted_at is not None


# -- a run that is asked for ------------------------------------------------------------------------------------------


def test_a_run_that_is_asked_for_is_due_at_once_and_seen_to_be(site: Site) -> None:
    wanted = operate.want("a.orm")
    assert (wanted.name, wanted.lock) == ("a.orm", "default")
    ScheduledLock.objects.update(next_due_at=now() + HOUR)
    assert site.server("a.orm").due(now()) == ["a.orm"]
    assert state("a.orm").wanted_at == wanted.at
    assert operate.want("a.orm").at == wanted.at


def test_a_run_in_a_cache_is_asked_for(cached: Site) -> None:
    wanted = operate.want("a.cached")
    assert state("a.cached").wanted_at == wanted.at


def test_a_task_on_every_server_is_asked_to_run_here_or_on_the_one_that_is_named(site: Site) -> None:
    assert operate.want("a.here").name == "a.here@web1"
    assert operate.want("a.here@web2").name == "a.here@web2"


def test_asking_runs_nothing_here(site: Site) -> None:
    """django-apscheduler runs it in the web request."""
    operate.want("a.orm")
    assert not ScheduledRun.objects.exists()
    assert ScheduledLock.objects.get(task="a.orm").owner is None


def test_what_is_paused_is_not_asked_to_run(site: Site) -> None:
    operate.pause(["a.orm"], reason="the bank is down")
    with pytest.raises(operate.Refused, match=r"a.orm is paused \(the bank is down\): no server would start it"):
        operate.want("a.orm")
    operate.resume(["a.orm"])
    operate.pause(None, reason="deploy")
    with pytest.raises(operate.Refused, match=r"Everything is paused in the lock 'default' \(deploy\)"):
        operate.want("a.orm")
    assert ScheduledLock.objects.get(task="a.orm").wanted_at is None


def test_what_is_not_declared_here_is_not_asked_to_run(site: Site) -> None:
    with registry.set_aside(), pytest.raises(operate.Refused, match=r"a\.orm is not declared in this version"):
        operate.want("a.orm")


def test_an_unknown_task_is_not_asked_to_run(site: Site) -> None:
    with pytest.raises(operate.Refused, match=r"No task is named 'a.orn'. Did you mean a.orm\?"):
        operate.want("a.orn")


# -- the list ---------------------------------------------------------------------------------------------------------


def test_the_list_takes_no_lock_and_writes_nothing(site: Site, django_assert_num_queries: Any) -> None:
    """Laravel's list tries the real locks: a task whose lock it just holds is not run by anybody."""
    ScheduledLock.objects.update(next_due_at=now() + HOUR)
    rows = list(ScheduledLock.objects.values())
    states = list(ScheduleState.objects.values())
    with django_assert_num_queries(4):  # its time, its rows, whether all is paused, the last runs
        operate.overview()
    assert list(ScheduledLock.objects.values()) == rows
    assert list(ScheduleState.objects.values()) == states


def test_whatever_is_overdue_costs_the_list_one_statement_more(site: Site, django_assert_num_queries: Any) -> None:
    ScheduledLock.objects.update(next_due_at=now() - HOUR)
    with django_assert_num_queries(5):  # when the servers were seen whose own tasks these are
        operate.overview()


def test_the_list_takes_no_lock_in_a_cache(cached: Site) -> None:
    before = cached.lock.rows()
    operate.overview()
    assert cached.lock.rows() == before
    assert cached.server("a.cached").run(before[0].last_due_at + timedelta(minutes=5), now=now()) is not None


def test_the_list_shows_what_a_task_owes(site: Site) -> None:
    at = now() + timedelta(minutes=1)
    ScheduledLock.objects.filter(task="a.orm").update(retry_at=at, attempt=2)
    line = state("a.orm")
    assert (line.retry_at, line.attempt, line.attempts) == (at, 2, 2)


# -- a run by hand, at once -------------------------------------------------------------------------------------------


def test_a_claim_whose_answer_came_late_counts_its_lease_from_when_it_was_made(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was sent in an earlier step: others may take the lock as soon as its lease is over by the store's clock."""
    claim, run = ORMLock.claim, InlineRunner.run
    left: list[float] = []

    def of_before(lock: ORMLock, *args: Any, **more: Any) -> list[Claim]:
        ago = timedelta(seconds=10)
        return [dataclasses.replace(each, acquired_at=each.acquired_at - ago) for each in claim(lock, *args, **more)]

    def noted(runner: InlineRunner, claim: Claim, *, until: float, finish_by: float | None) -> None:
        left.append(until - boot_time())
        run(runner, claim, until=until, finish_by=finish_by)

    monkeypatch.setattr(ORMLock, "claim", of_before)
    monkeypatch.setattr(InlineRunner, "run", noted)
    assert service.run_once(trigger="a.orm", inline=True, verbosity=0).status == 0
    assert len(left) == 1
    assert left[0] < 20.5


def test_what_a_dead_server_holds_is_freed_for_a_run_by_hand(site: Site) -> None:
    dead = site.server("a.orm", name="web2").must_run(now() - timedelta(minutes=2))
    assert service.run_once(trigger="a.orm", inline=True, verbosity=0).status == 0
    assert CleanupLog.objects.get().owner == dead.owner


# -- the timeline -----------------------------------------------------------------------------------------------------


def test_the_next_due_times_of_all_tasks_are_one_timeline(site: Site) -> None:
    schedule.call("time.sleep", 0).every_fifteen_minutes().name("a.often")
    coming = operate.timeline(operate.overview(), 12)
    assert len(coming) == 12
    assert [each.at for each in coming] == sorted(each.at for each in coming)
    assert {each.name for each in coming} == {"a.often", "a.orm", "a.other", "a.here@web1", "a.here@web2"}


def test_what_is_owed_is_in_the_timeline(site: Site) -> None:
    ScheduledLock.objects.filter(task="a.orm").update(retry_at=now() + timedelta(seconds=1), attempt=2)
    operate.want("a.other")
    operate.pause(["a.here"])
    coming = operate.timeline(operate.overview(), 6)
    assert [(each.name, each.kind, each.text) for each in coming[:2]] == [
        ("a.other", "wanted", "asked for by hand"),
        ("a.orm", "retry", "attempt 2 of 2"),
    ]
    assert {each.name for each in coming if each.paused} == {"a.here@web1", "a.here@web2"}


def test_jitter_is_in_the_timeline(site: Site) -> None:
    schedule.call("time.sleep", 0).daily().jitter(minutes=30).name("a.later")
    later = next(each for each in operate.timeline(operate.overview(), 500) if each.name == "a.later")
    assert later.at - later.due_at == registry.tasks["a.later"].offset("a.later") > timedelta(0)


def test_a_timeline_of_nothing_is_empty() -> None:
    with registry.set_aside():
        assert operate.timeline(operate.overview(), 5) == []
