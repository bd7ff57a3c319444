"""Which due time is open: pure facts, with the clock passed in."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from multiserver_schedule.cron import Cron, Every
from multiserver_schedule.due import Plan, Policy, catch_up_window, default_break, is_meant_for, manual, plan
from multiserver_schedule.entries import Row, ScheduledTask

UTC = timezone.utc
THREE = datetime(2030, 1, 1, 3, tzinfo=UTC)
POLICY = Policy()
SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)


def task(name: str = "shop.report", when: Any = None, **more: Any) -> ScheduledTask:
    return ScheduledTask(name=name, kind="call", target="x.y", timetable=when or Cron("0 * * * *", "UTC"), **more)


def row(of: ScheduledTask, last: datetime, **more: Any) -> Row:
    values: dict[str, Any] = {
        "pk": 1,
        "task": of.name,
        "fingerprint": of.fingerprint,
        "last_due_at": last,
        "schedule_since": last,
        "next_due_at": more["next_due_at"] if "next_due_at" in more else of.next(last),
        "not_before": last,
    }
    return Row(**(values | more))


def found(of: ScheduledTask, at: Row, now: datetime, **more: Any) -> Plan:
    return plan({of.name: of}, [at], now, server="web1", policy=POLICY, **more)


def test_a_task_is_given_its_due_time_and_not_the_time_of_the_pass() -> None:
    [ready] = found(task(), row(task(), THREE - timedelta(hours=1)), THREE + timedelta(seconds=7)).ready
    assert ready.due_at == THREE
    assert ready.next_due_at == THREE + timedelta(hours=1)
    assert (ready.missed, ready.trigger) == (0, "schedule")


def test_nothing_is_due_again_once_its_due_time_was_claimed() -> None:
    done = found(task(), row(task(), THREE), THREE + timedelta(minutes=59))
    assert done.ready == [] and done.next_at == THREE + timedelta(hours=1)


def test_after_an_outage_the_latest_due_time_runs_and_the_others_are_missed_with_their_number() -> None:
    [ready] = found(task(), row(task(), THREE - timedelta(hours=5)), THREE + timedelta(minutes=10)).ready
    assert ready.due_at == THREE
    assert (ready.missed, ready.missed_at) == (4, THREE - timedelta(hours=1))
    assert ready.trigger == "catch_up"


def test_a_due_time_older_than_half_its_period_is_given_up() -> None:
    late = found(task(), row(task(), THREE - timedelta(hours=2)), THREE + timedelta(minutes=31))
    assert late.ready == []
    [skip] = late.missed
    assert (skip.reason, skip.occurrence.due_at, skip.occurrence.missed) == ("missed", THREE, 1)


def test_an_outage_of_a_year_costs_as_little_as_one_of_an_hour() -> None:
    every = task(when=Every(timedelta(minutes=1)))
    year = found(every, row(every, THREE - timedelta(days=365)), THREE)
    assert year.ready[0].missed == 365 * 1440 - 1


@pytest.mark.parametrize(
    ("period", "window"),
    [
        (timedelta(seconds=10), timedelta(seconds=60)),
        (timedelta(minutes=5), timedelta(minutes=2, seconds=30)),
        (timedelta(days=1), timedelta(hours=6)),
    ],
)
def test_the_catch_up_window_is_half_the_period_between_a_minute_and_six_hours(
    period: timedelta, window: timedelta
) -> None:
    assert catch_up_window(task(), period, POLICY) == window


def test_no_catch_up_still_runs_what_a_slow_start_made_late() -> None:
    daily = task(when=Cron("0 3 * * *", "UTC"), catch_up="none")
    yesterday = row(daily, THREE - timedelta(days=1))
    assert found(daily, yesterday, THREE + timedelta(seconds=59)).ready
    assert found(daily, yesterday, THREE + timedelta(seconds=61)).missed


def test_catch_up_all_runs_each_missed_due_time_oldest_first() -> None:
    each = task(catch_up="all")
    [ready] = found(each, row(each, THREE - timedelta(hours=3)), THREE).ready
    assert (ready.due_at, ready.missed) == (THREE - timedelta(hours=2), 0)


def test_a_due_time_inside_the_break_waits_and_is_not_given_up() -> None:
    resting = found(task(), row(task(), THREE - timedelta(hours=1), not_before=THREE + timedelta(seconds=8)), THREE)
    assert [occurrence.due_at for occurrence, _ in resting.resting] == [THREE]
    assert resting.missed == resting.ready == []


def test_a_held_task_is_neither_ready_nor_missed() -> None:
    held = row(task(), THREE - timedelta(hours=1), owner="somebody", expires_at=THREE + timedelta(seconds=9))
    assert len(found(task(), held, THREE).held) == 1


def test_a_held_task_that_may_overlap_is_ready() -> None:
    free = task(overlap="allow")
    assert found(free, row(free, THREE - timedelta(hours=1), owner="somebody"), THREE).ready


def test_another_versions_row_is_passed_over() -> None:
    other = row(task(), THREE - timedelta(hours=1), fingerprint="of a newer deploy")
    assert found(task(), other, THREE) == Plan()


def test_a_task_that_is_not_declared_here_is_passed_over() -> None:
    assert plan({}, [row(task(), THREE - timedelta(hours=1))], THREE, server="web1", policy=POLICY) == Plan()


def test_a_server_passes_over_the_rows_of_other_servers() -> None:
    own = task(on_every_server=True)
    mine = row(own, THREE - timedelta(hours=1), task="shop.report@web1")
    theirs = row(own, THREE - timedelta(hours=1), task="shop.report@web2")
    assert found(own, mine, THREE).ready and found(own, theirs, THREE) == Plan()


def test_a_due_time_of_the_replaced_schedule_is_still_owed() -> None:
    # Due at 03:00 by the old schedule; the new one (06:00) took over at 03:00:01, before anybody had claimed it.
    new = task(when=Cron("0 6 * * *", "UTC"))
    taken = row(new, THREE - timedelta(hours=1), schedule_since=THREE + timedelta(seconds=1), next_due_at=THREE)
    [ready] = found(new, taken, THREE + timedelta(seconds=2)).ready
    assert (ready.due_at, ready.missed, ready.next_due_at) == (THREE, 0, THREE + timedelta(hours=3))


def test_a_due_time_of_the_replaced_schedule_that_was_claimed_is_not_owed_again() -> None:
    new = task(when=Cron("0 6 * * *", "UTC"))
    taken = row(new, THREE, schedule_since=THREE + timedelta(seconds=1), next_due_at=THREE)
    assert found(new, taken, THREE + timedelta(seconds=2)).ready == []


def test_in_maintenance_only_those_run_that_said_so() -> None:
    asleep, awake = task(), task(even_in_maintenance_mode=True)
    last = THREE - timedelta(hours=1)
    assert found(asleep, row(asleep, last), THREE, maintenance=True) == Plan()
    assert found(awake, row(awake, last), THREE, maintenance=True).ready


@pytest.mark.parametrize(
    ("more", "meant"),
    [
        ({}, True),
        ({"environments": ("production",)}, True),
        ({"environments": ("staging",)}, False),
        ({"servers": ("web1",)}, True),
        ({"servers": ("web2",)}, False),
        ({"servers": ("web1",), "environments": ("staging",)}, False),
    ],
)
def test_a_task_is_for_its_environments_and_servers_alone(more: dict[str, Any], meant: bool) -> None:
    assert is_meant_for(task(**more), server="web1", environment="production") is meant


@pytest.mark.parametrize(
    ("period", "rest"),
    [
        (timedelta(minutes=1), 10.0),
        (timedelta(days=1), 10.0),
        (timedelta(seconds=30), 5.0),
        (timedelta(seconds=1), 1 / 6),
    ],
)
def test_the_break_is_ten_seconds_or_a_sixth_of_a_short_period(period: timedelta, rest: float) -> None:
    assert default_break(period, POLICY).total_seconds() == pytest.approx(rest, abs=1e-6)


def test_a_task_whose_zone_is_not_on_this_machine_does_not_stop_the_others() -> None:
    lost, sound = task("a.lost", Cron("0 * * * *", "Mars/Olympus")), task("b.sound")
    rows = [
        row(lost, THREE, fingerprint=lost.fingerprint, next_due_at=THREE),
        row(sound, THREE - timedelta(hours=1)),
    ]
    both = plan({t.name: t for t in (lost, sound)}, rows, THREE, server="web1", policy=POLICY)
    assert [occurrence.task for occurrence in both.ready] == [sound]
    assert [(t, "Mars/Olympus" in why) for t, why in both.broken] == [(lost, True)]


def test_a_manual_run_shortly_before_the_next_due_time_has_the_whole_break() -> None:
    asked = manual(task(), row(task(), THREE - timedelta(hours=1)), THREE - timedelta(seconds=2), POLICY)
    assert (asked.trigger, asked.due_at, asked.min_break) == (
        "manual",
        THREE - timedelta(seconds=2),
        timedelta(seconds=10),
    )


def test_a_task_that_was_starved_keeps_its_place_in_the_queue() -> None:
    # Order is the store's, by the oldest open due time: plan keeps it.
    first, second = task("a.first"), task("b.second")
    rows = [row(second, THREE - timedelta(hours=3)), row(first, THREE - timedelta(hours=1))]
    ready = plan({t.name: t for t in (first, second)}, rows, THREE, server="web1", policy=POLICY).ready
    assert [occurrence.task.name for occurrence in ready] == ["b.second", "a.first"]


def test_an_attempt_that_is_owed_minds_no_break() -> None:
    owed = row(task(), THREE, retry_at=THREE + MINUTE, attempt=2, trigger="catch_up", not_before=THREE + 10 * MINUTE)
    assert found(task(), owed, THREE + MINUTE - SECOND).ready == []
    assert found(task(), owed, THREE + MINUTE - SECOND).next_at == THREE + MINUTE
    [ready] = found(task(), owed, THREE + MINUTE).ready
    assert (ready.due_at, ready.attempt, ready.trigger) == (THREE, 2, "catch_up")
    assert ready.next_due_at == THREE + HOUR


def test_a_newer_due_time_goes_before_what_is_owed() -> None:
    owed = row(task(), THREE, retry_at=THREE + 59 * MINUTE, attempt=2)
    [ready] = found(task(), owed, THREE + HOUR).ready
    assert (ready.due_at, ready.attempt) == (THREE + HOUR, 1)


def test_what_is_owed_waits_for_a_manual_run_and_is_looked_at_again() -> None:
    owed = row(task(), THREE, retry_at=THREE + MINUTE, attempt=2, owner="somebody", server="web2")
    waits = found(task(), owed, THREE + 2 * MINUTE)
    assert (waits.ready, waits.held, waits.missed) == ([], [], [])
    assert waits.next_at == THREE + 2 * MINUTE + SECOND


def test_a_run_that_was_asked_for_is_ready_whatever_the_schedule_says() -> None:
    asked = row(task(), THREE, wanted_at=THREE + MINUTE, not_before=THREE + HOUR)
    [ready] = found(task(), asked, THREE + 2 * MINUTE).ready
    assert (ready.trigger, ready.requested, ready.due_at) == ("manual", True, THREE + MINUTE)
    assert found(task(), dataclasses.replace(asked, owner="somebody"), THREE + 2 * MINUTE).ready == []


def test_a_run_that_was_asked_for_waits_for_a_due_time_that_would_cancel_it() -> None:
    """It is started when that has ended: asked for once, it runs once, and is not ended for what was due before it."""
    cancels = task(overlap="cancel_other")
    asked = row(cancels, THREE - HOUR, wanted_at=THREE + SECOND)
    [ready] = found(cancels, asked, THREE + 2 * SECOND).ready
    assert (ready.trigger, ready.due_at) == ("schedule", THREE)
    resting = found(cancels, dataclasses.replace(asked, not_before=THREE + MINUTE), THREE + 2 * SECOND)
    assert resting.ready == [] and [due.due_at for due, _ in resting.resting] == [THREE]
    under_way = dataclasses.replace(asked, last_due_at=THREE, next_due_at=THREE + HOUR, owner="somebody")
    waits = found(cancels, under_way, THREE + MINUTE)
    assert (waits.ready, waits.held) == ([], [])
    [ready] = found(cancels, dataclasses.replace(under_way, owner=None), THREE + MINUTE).ready
    assert (ready.trigger, ready.requested, ready.due_at) == ("manual", True, THREE + SECOND)


def test_a_run_that_was_asked_for_waits_for_nothing_that_would_not_cancel_it() -> None:
    for overlap in ("skip", "allow", "queue_one"):
        asked = row(task(overlap=overlap), THREE - HOUR, wanted_at=THREE + SECOND)
        assert found(task(overlap=overlap), asked, THREE + 2 * SECOND).ready[0].requested
    cancels = task(overlap="cancel_other", retries=1)
    owed = row(cancels, THREE, retry_at=THREE + MINUTE, attempt=2, wanted_at=THREE + MINUTE)
    assert found(cancels, owed, THREE + 2 * MINUTE).ready[0].requested, "nor for an attempt: that waits for it"
    too_late = row(cancels, THREE - 2 * HOUR, next_due_at=THREE - HOUR, wanted_at=THREE - MINUTE)
    assert found(cancels, too_late, THREE - MINUTE).ready[0].requested, "nor for what is given up"


def test_jitter_moves_the_start_and_not_the_due_time() -> None:
    late = task(jitter=timedelta(minutes=30))
    offset = late.offset(late.name)
    assert timedelta(0) < offset < timedelta(minutes=30)
    before = found(late, row(late, THREE - HOUR), THREE + offset - SECOND)
    assert (before.ready, before.put_off_to) == ([], THREE + offset)
    [ready] = found(late, row(late, THREE - HOUR), THREE + offset).ready
    assert (ready.due_at, ready.trigger) == (THREE, "schedule")
    assert late.offset("a") != late.offset("b")
    assert late.offset("a@web1") != late.offset("a@web2")
