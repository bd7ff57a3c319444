"""What a store's clock that was ahead has left behind: how ``schedule check`` tells of it, and how it is mended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from django.db import OperationalError, transaction

from multiserver_schedule import operate, schedule
from multiserver_schedule.declare import registry
from multiserver_schedule.entries import Claim
from multiserver_schedule.exceptions import UnsafeTransaction
from multiserver_schedule.history import Afterwards, History
from multiserver_schedule.locks.base import BaseLock
from multiserver_schedule.locks.cache import CacheLock
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.models import CleanupLog, ScheduledLock, ScheduledRun
from multiserver_schedule.testing.contract import Notes, Server

from .caches import CacheStore
from .test_operate import AWAY, IN_CACHE, cleanups_heard

pytestmark = pytest.mark.django_db(transaction=True)

SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
def _project(settings: Any) -> Iterator[None]:
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1"}
    with registry.set_aside():
        schedule.call("time.sleep", 0).hourly().name("a.b")
        schedule.call("time.sleep", 0).hourly().name("a.c")
        yield


def now() -> datetime:
    return datetime.now(timezone.utc)


def full_hour(after: datetime) -> datetime:
    """Return a due time of an hourly task."""
    return after.replace(minute=0, second=0, microsecond=0) + HOUR


AHEAD = full_hour(now() + 3 * DAY)
"""What the clock said while it was ahead."""


def site(lock: BaseLock | None = None, *names: str, name: str = "web1") -> Server:
    """Return a server whose tasks were registered an hour ago."""
    lock = lock or ORMLock("default", {})
    history = History("default") if lock.transactional else Afterwards("default")
    server = Server(lock, Notes(history), *(registry.tasks[each] for each in names or ("a.b", "a.c")), name=name)
    server.sync(now() - HOUR)
    return server


def hold(server: Server, name: str = "a.b", at: datetime = AHEAD, **more: Any) -> Claim:
    """Claim a due time of this task."""
    (claim,) = server.claim(server.occurrence(at, registry.tasks[name], **more), now=at)
    return claim


def run_ahead(server: Server, name: str = "a.b") -> None:
    server.release(hold(server, name), now=AHEAD)


def never(span: timedelta, names: Sequence[str]) -> None:
    raise AssertionError("there is nothing to wait for")


def at_once(span: timedelta, names: Sequence[str]) -> None:
    """Have nobody renew meanwhile."""


def found(level: str = "problem") -> list[str]:
    """Return what is told of times that are later than the clock."""
    return [each.text for each in operate.examine() if each.level == level and "is later than" in each.text]


@pytest.fixture
def cached(cache_store: CacheStore, settings: Any) -> Iterator[BaseLock]:
    """Have the tasks in a cache, in every kind of it."""
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "LOCKS": {"cache": IN_CACHE}}
    registry._clear()
    for name in ("a.b", "a.c"):
        schedule.call("time.sleep", 0).hourly().lock_with("cache").name(name)
    lock = CacheLock("cache", IN_CACHE["OPTIONS"])
    lock.sync(Server(lock, Notes()).declared, now=now() - 10 * DAY)
    yield lock
    lock.close()


# -- what is told -----------------------------------------------------------------------------------------------------


def test_what_runs_not_before_a_clocks_old_time_is_told_with_its_names_and_what_mends_it() -> None:
    run_ahead(site())
    assert found() == [
        "the last due time of a.b is later than the store's clock: was that set back? Nothing of it runs before "
        f"{AHEAD:%Y-%m-%d %H:%M:%SZ}; `manage.py schedule unlock --clock` mends it"
    ]
    (told,) = found("warning")
    assert told.startswith("the break of a.b is later than the store's clock")
    assert told.endswith("; `manage.py schedule unlock --clock` mends it")


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("schedule_since", "the take-over of the schedule of a.b is later"),
        ("wanted_at", "the run that is asked for of a.b is later"),
        ("not_before", "the break of a.b is later"),
        ("retry_at", "the next attempt of a.b is later"),
    ],
)
def test_each_time_that_is_later_than_the_clock_is_told(field: str, told: str) -> None:
    site()
    ScheduledLock.objects.filter(task="a.b").update(**{field: AHEAD})
    (line,) = [*found(), *found("warning")]
    assert line.startswith(told)
    assert f"{AHEAD:%Y-%m-%d %H:%M:%SZ}" in line


def test_a_lease_that_nobody_may_free_is_told_until_its_end() -> None:
    hold(site())
    lines = [line for line in found() if line.startswith("the lease of a.b is later than the store's clock")]
    assert len(lines) == 1
    assert f"If its holder is gone, nobody frees it before {AHEAD + 30 * SECOND:%Y-%m-%d %H:%M:%SZ}" in lines[0]


def test_an_interrupt_that_is_still_to_come_is_told() -> None:
    site().lock.interrupt(now=AHEAD)
    (line,) = found()
    assert line.startswith("an interrupt is later than the store's clock")
    assert "Services and passes end at once before" in line


def test_two_leases_are_no_jump_and_neither_is_a_break_or_a_back_off_that_may_be_so_long() -> None:
    registry._clear()
    long = schedule.call("time.sleep", 0).daily().without_overlapping(min_break=5 * HOUR)
    long.retry(3, backoff=HOUR).name("a.b")
    schedule.call("time.sleep", 0).hourly().without_overlapping(lease=10 * 60 * SECOND).name("a.c")
    site()
    rows = ScheduledLock.objects
    rows.filter(task="a.b").update(
        not_before=now() + 5 * HOUR, retry_at=now() + 4 * HOUR, last_due_at=now() + 50 * SECOND
    )
    rows.filter(task="a.c").update(last_due_at=now() + 19 * 60 * SECOND)
    assert found() == found("warning") == []
    assert operate.set_clock_right(wait=never) == operate.SetRight()
    rows.filter(task="a.b").update(not_before=now() + 6 * HOUR, retry_at=now() + 6 * HOUR)
    rows.filter(task="a.c").update(last_due_at=now() + 21 * 60 * SECOND)
    assert len(found()) == 1 and len(found("warning")) == 2


def test_the_break_of_a_task_that_nobody_here_declares_may_be_as_long_as_it_is() -> None:
    site()
    ScheduledLock.objects.filter(task="a.b").update(not_before=AHEAD, retry_at=AHEAD)
    registry._clear()
    assert found() == []
    assert operate.set_clock_right(wait=never).rows == ()
    assert ScheduledLock.objects.get(task="a.b").not_before == AHEAD


# -- what is mended ---------------------------------------------------------------------------------------------------


def mended(lock: BaseLock) -> None:
    """Mend what has run ahead, is held by the dead and by the living, and is interrupted; and all is as it was."""
    alias = lock.alias
    web1 = site(lock)
    run_ahead(web1)
    dead = hold(web1, "a.c")
    lock.interrupt(now=AHEAD)
    with cleanups_heard() as heard:
        done = operate.set_clock_right(wait=at_once)
    assert (done.interrupts, done.troubles) == ((alias,), ())
    first, second = done.rows
    assert (first.name, first.lock, first.released, first.ran_ahead) == ("a.b", alias, None, 1)
    assert [each.what for each in first.brought] == ["the last due time", "the break"]
    assert first.brought[0].was == AHEAD
    assert abs(first.brought[0].now - now()) < 30 * SECOND
    assert first.next_due_at == full_hour(first.brought[0].now)
    assert second.name == "a.c" and second.released is not None
    assert (second.released.holder.owner, second.released.cleanup.reason) == (dead.owner, "released_by_hand")
    assert [each["cleanup"].task for each in heard] == ["a.c"]
    log = CleanupLog.objects.get()
    assert (log.task, log.owner, log.cleaned_by) == ("a.c", dead.owner, "web1")
    assert lock.look(web1.declared).interrupted_at <= now() + 3 * SECOND
    assert found() == found("warning") == []
    assert operate.set_clock_right(wait=never) == operate.SetRight()
    assert CleanupLog.objects.count() == 1
    soon = full_hour(now())
    assert sorted(web1.due(soon)) == ["a.b", "a.c"]
    assert web1.claim(web1.occurrence(soon, registry.tasks["a.b"]), now=soon) != []


def test_what_a_clock_that_was_ahead_has_left_behind_is_mended() -> None:
    mended(ORMLock("default", {}))


def test_the_same_in_every_cache(cached: BaseLock) -> None:
    mended(cached)


def test_a_holder_that_renews_meanwhile_keeps_its_lease() -> None:
    web1 = site()
    claim = hold(web1)
    waited: list[tuple[timedelta, list[str]]] = []

    def renewing(span: timedelta, names: Sequence[str]) -> None:
        waited.append((span, list(names)))
        assert web1.lock.renew([claim]) == {claim.owner}

    (row,) = operate.set_clock_right(wait=renewing).rows
    assert row.released is None
    assert waited == [(30 * SECOND, ["a.b"])]
    assert web1.row("a.b").owner == claim.owner
    assert not CleanupLog.objects.exists()


def test_the_longest_lease_of_all_that_are_stuck_is_waited_for() -> None:
    web1 = site()
    hold(web1, "a.b", lease=30 * SECOND)
    hold(web1, "a.c", lease=180 * SECOND)
    waited: list[tuple[timedelta, list[str]]] = []
    operate.set_clock_right(wait=lambda span, names: waited.append((span, list(names))))
    assert waited == [(180 * SECOND, ["a.b", "a.c"])]


def test_who_has_taken_the_lock_meanwhile_keeps_it() -> None:
    web1 = site()
    claim = hold(web1)

    def taking(span: timedelta, names: Sequence[str]) -> None:
        web1.release(claim, now=now())
        taking.claim = hold(web1, at=AHEAD + HOUR)  # type: ignore[attr-defined]

    (row,) = operate.set_clock_right(wait=taking).rows
    assert row.released is None
    assert web1.row("a.b").owner == taking.claim.owner  # type: ignore[attr-defined]


def test_a_lease_of_now_is_not_waited_for() -> None:
    web1 = site()
    hold(web1, at=full_hour(now() - HOUR))
    run_ahead(web1, "a.c")
    assert [row.name for row in operate.set_clock_right(wait=never).rows] == ["a.c"]


def test_the_slot_and_the_runs_that_may_overlap_are_free_a_lease_later() -> None:
    registry._clear()
    schedule.call("time.sleep", 0).hourly().overlap("allow").name("a.b")
    web1 = site(None, "a.b")
    web1.lock.renew([hold(web1, at=full_hour(now() - HOUR))], now=AHEAD)
    (row,) = operate.set_clock_right(wait=never).rows
    assert (row.runs_end, row.brought) == (True, ())
    assert ScheduledRun.objects.get().expires_at < now() + HOUR


@pytest.mark.parametrize("off", [6, -6])
def test_a_clock_that_is_still_wrong_is_told_with_both_times_and_nothing_is_done_unless_by_force(
    off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ahead(site())
    before = list(ScheduledLock.objects.order_by("pk").values())
    clock = ORMLock.clock
    with monkeypatch.context() as patched:
        patched.setattr(ORMLock, "clock", lambda lock: clock(lock) + off * SECOND)
        done = operate.set_clock_right(wait=never)
        assert list(ScheduledLock.objects.order_by("pk").values()) == before
        assert (done.rows, len(done.troubles)) == ((), 1)
        assert "The clock of the lock 'default' is wrong, or this server's is: " in done.troubles[0]
        assert done.troubles[0].count("Z there") == done.troubles[0].count("Z here") == 1
        told = "changes nothing" if off > 0 else "would make what has run run again"
        assert told in done.troubles[0]
        assert [row.name for row in operate.set_clock_right(force=True, wait=never).rows] == ["a.b"]
    assert ScheduledLock.objects.get(task="a.b").last_due_at < now() + HOUR


def test_one_store_that_is_away_keeps_no_other_from_being_mended(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "LOCKS": {"cache": AWAY}}
    run_ahead(site())
    done = operate.set_clock_right(wait=never)
    assert [row.name for row in done.rows] == ["a.b"]
    assert len(done.troubles) == 1
    assert done.troubles[0].startswith("The lock 'cache' does not answer: ConnectionError: Connection refused.")
    assert operate.set_clock_right(lock="default", wait=never).troubles == ()
    with pytest.raises(operate.Misused, match="There is no lock 'cahce'"):
        operate.set_clock_right(lock="cahce")


def test_what_was_mended_before_a_store_went_away_is_told(cached: BaseLock, cache_store: CacheStore) -> None:
    web1 = site(cached)
    run_ahead(web1)
    hold(web1, "a.c")
    done = operate.set_clock_right(lock="cache", wait=lambda span, names: cache_store.server.crash())
    assert [(row.name, row.ran_ahead) for row in done.rows] == [("a.b", 1), ("a.c", 1)]
    assert [row.released for row in done.rows] == [None, None]
    assert "What is not mended in it yet, the same call mends when it is back." in done.troubles[0]


def test_it_is_refused_inside_a_transaction() -> None:
    run_ahead(site())
    with transaction.atomic(), pytest.raises(UnsafeTransaction):
        operate.set_clock_right(wait=never)


def test_a_row_of_another_versions_schedule_is_offered_early_and_not_late() -> None:
    run_ahead(site())
    ScheduledLock.objects.filter(task="a.b").update(fingerprint="another")
    (row,) = operate.set_clock_right(wait=never).rows
    assert row.next_due_at is not None and row.next_due_at < now() + SECOND


def test_a_history_that_does_not_answer_keeps_nothing_from_being_mended(
    cached: BaseLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OperationalError("the server is shutting down")

    run_ahead(site(cached))
    monkeypatch.setattr("multiserver_schedule.operate.clocks.Count", refuse)
    done = operate.set_clock_right(wait=never)
    assert [(row.name, row.ran_ahead) for row in done.rows] == [("a.b", 0)]
    assert "will run again, is not known" in done.troubles[0]


def test_each_row_that_is_mended_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    run_ahead(site())
    with caplog.at_level("WARNING", "multiserver_schedule"):
        operate.set_clock_right(wait=never)
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("set right by hand, since the store's clock was ahead: the last due time was ")
    assert "task=a.b" in said and "server=web1" in said
