"""What is promised of retries, crashes, overlaps, jitter, pauses and runs by hand: by many servers, over hours."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from multiserver_schedule.cron import Cron, Every
from multiserver_schedule.entries import Claim, Hook, Outcome, ScheduledTask
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.models import CleanupLog, ScheduledRun

from . import stores
from .simulation import World, accounted, expected, ran
from .stores import Store

UTC = timezone.utc
NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
FAILED = Outcome(status="failed", error="boom")
SUCCEEDED = Outcome(status="succeeded")


ON_ONE = pytest.mark.parametrize(
    "store",
    [pytest.param("sqlite", marks=pytest.mark.django_db(databases=[stores.ALIASES["sqlite"]], transaction=True))],
    indirect=True,
)
"""What the store does for it is in the contract that every store is held to: this is about the cycle's part."""


def task(text: str = "0 * * * *", name: str = "shop.report", **more: Any) -> ScheduledTask:
    return ScheduledTask(name=name, kind="call", target="time.sleep", timetable=Cron(text, "UTC"), **more)


def world(store: Store, *tasks: ScheduledTask, servers: int = 3, services: int = 1, **more: Any) -> World:
    """Return servers with these tasks, of which some run as a service and the others by cron."""
    names = [f"web{n}" for n in range(servers)]
    version = {each.name: each for each in tasks}
    return World(
        alias=store.alias,
        now=NOON - 90 * SECOND,
        versions=dict.fromkeys(names, version),
        services=frozenset(names[:services]),
        **more,
    )


def attempts(store: Store, row: str = "shop.report") -> list[tuple[datetime, int, str]]:
    runs = ScheduledRun.objects.using(store.alias).filter(task=row).exclude(status="skipped")
    return list(runs.order_by("due_at", "attempt").values_list("due_at", "attempt", "status"))


def fails_up_to(attempt: int) -> Any:
    def outcome(claim: Claim) -> Outcome:
        return FAILED if claim.occurrence.attempt <= attempt else SUCCEEDED

    return outcome


def no_task_ran_twice_at_a_time(sim: World, span: timedelta) -> bool:
    """Did each run of the one task begin when the one before had ended?"""
    begins = [at for _, _, at in sim.started]
    return all(later - earlier >= span for earlier, later in itertools.pairwise(begins))


# -- retries ----------------------------------------------------------------------------------------------------------


def test_a_failed_due_time_is_tried_again_until_it_succeeds_each_attempt_once(store: Store) -> None:
    sim = world(store, task(retries=3, backoff=MINUTE), outcome=fails_up_to(2))
    sim.advance(10 * MINUTE)
    sim.finish()
    assert attempts(store) == [(NOON, 1, "failed"), (NOON, 2, "failed"), (NOON, 3, "succeeded")]


@ON_ONE
def test_each_wait_is_twice_as_long_as_the_last_give_or_take_a_fifth(store: Store) -> None:
    sim = world(store, task(retries=4, backoff=MINUTE), outcome=fails_up_to(9), servers=1)
    sim.advance(24 * MINUTE)
    begins = [at for occurrence, _, at in sim.started if occurrence.due_at == NOON]
    waits = [(later - earlier - SECOND) / MINUTE for earlier, later in itertools.pairwise(begins)]
    assert len(waits) == 4
    for wait, expected_wait in zip(waits, (1, 2, 4, 8), strict=True):
        assert 0.79 * expected_wait <= wait <= 1.21 * expected_wait + 0.05
    # Tasks that failed together shall not come back together.
    assert max(abs(wait / unit - 1) for wait, unit in zip(waits, (1, 2, 4, 8), strict=True)) > 0.05


@ON_ONE
def test_attempts_end_where_the_next_due_time_comes(store: Store) -> None:
    sim = world(store, task("*/10 * * * *", retries=20, backoff=MINUTE), servers=2, outcome=fails_up_to(99))
    sim.advance(33 * MINUTE)
    sim.finish()
    due = expected(task("*/10 * * * *"), [(NOON - SECOND, sim.now)])
    assert sorted({due_at for due_at, _, _ in attempts(store)}) == due
    for occurrence, _, at in sim.started:
        assert at < occurrence.due_at + 10 * MINUTE
    firsts = [at - o.due_at for o, _, at in sim.started if o.attempt == 1]
    assert max(firsts) < 5 * SECOND
    assert accounted(store.alias, "shop.report")["missed"] == 0


@ON_ONE
@pytest.mark.parametrize(
    ("cron", "wait", "runs_for", "number"),
    [
        ("* * * * *", 15 * SECOND, SECOND, 3),
        ("*/2 * * * *", 70 * SECOND, SECOND, 2),
        ("*/5 * * * *", MINUTE, 20 * SECOND, 3),
    ],
)
def test_under_cron_too_a_failed_due_time_is_tried_again_before_the_next_one_comes(
    store: Store, cron: str, wait: timedelta, runs_for: timedelta, number: int
) -> None:
    """However seldom cron looks, and however short the period is."""
    tried = task(cron, retries=2, backoff=wait)
    sim = world(store, tried, servers=2, services=0, duration=lambda row: runs_for, outcome=fails_up_to(99))
    sim.advance(21 * MINUTE)
    made = Counter(due_at for due_at, _, _ in attempts(store))
    ended = [due_at for due_at in made if due_at < sim.now - 5 * MINUTE]
    assert len(ended) >= 3
    assert {made[due_at] for due_at in ended} == {number}


@ON_ONE
def test_an_attempt_that_nobody_was_there_for_is_told_of(store: Store) -> None:
    """The history says "tried again in 62 s", and nobody has told the hooks that it was the last one."""
    told: list[Mapping[str, Any]] = []
    sim = world(store, task(retries=1, backoff=MINUTE), servers=1, outcome=fails_up_to(99), tell=told.append)
    sim.advance(2 * MINUTE)
    sim.kill("web0")
    sim.advance(59 * MINUTE)
    sim.versions["web1"] = {"shop.report": task(retries=1, backoff=MINUTE)}
    sim.advance(2 * MINUTE)
    assert [event["due_at"] for event in told if event["kind"] == "forgone"] == [NOON.isoformat()]
    assert [(due_at - NOON, attempt) for due_at, attempt, _ in attempts(store)][:2] == [(0 * HOUR, 1), (HOUR, 1)]


@ON_ONE
def test_a_server_that_is_killed_in_mid_back_off_costs_no_attempt(store: Store) -> None:
    sim = world(store, task(retries=2, backoff=10 * MINUTE), outcome=fails_up_to(1))
    sim.advance(3 * MINUTE)
    [(_, server, _)] = sim.started
    sim.kill(server)
    sim.advance(20 * MINUTE)
    assert attempts(store) == [(NOON, 1, "failed"), (NOON, 2, "succeeded")]
    assert sim.started[1][1] != server
    assert not CleanupLog.objects.using(store.alias).exists()


@ON_ONE
def test_a_back_off_leaves_its_slot_to_others(store: Store) -> None:
    other = task("1 * * * *", name="shop.other")
    sim = world(
        store, task(retries=1, backoff=20 * MINUTE), other, servers=1, services=0, slots=1, outcome=fails_up_to(1)
    )
    sim.advance(10 * MINUTE)
    assert [occurrence.row for occurrence, _, _ in sim.started] == ["shop.report", "shop.other"]


@ON_ONE
def test_the_history_says_which_attempt_failed_and_that_another_follows(store: Store) -> None:
    sim = world(store, task(retries=1, backoff=MINUTE), outcome=fails_up_to(9))
    sim.advance(10 * MINUTE)
    first, second = ScheduledRun.objects.using(store.alias).order_by("attempt")
    assert first.reason.startswith("tried again in ")
    assert second.reason == ""


@ON_ONE
def test_an_attempt_that_its_own_conditions_refuse_is_recorded_and_the_failure_is_told(store: Store) -> None:
    """Of a failure that is to be tried again nobody is told: here it was not, and the history promised it for ever."""
    told: list[Mapping[str, Any]] = []

    def outcome(claim: Claim) -> Outcome:
        refused = Outcome(status="skipped", reason="filtered", started=False)
        return FAILED if claim.occurrence.attempt == 1 else refused

    hooks = (Hook("failure", "tests.test_policies.task"), Hook("after", "tests.test_policies.task"))
    sim = world(store, task(retries=2, backoff=MINUTE, hooks=hooks), servers=1, outcome=outcome, tell=told.append)
    sim.advance(10 * MINUTE)
    rows = ScheduledRun.objects.using(store.alias).order_by("attempt")
    assert list(rows.values_list("due_at", "attempt", "status", "reason"))[1:] == [(NOON, 2, "skipped", "filtered")]
    assert rows[0].status == "failed"
    why = "had failed, and its own conditions said no to attempt 2"
    assert [event["why"] for event in told if event["kind"] == "forgone"] == [why]
    (step,) = [event for event in told if event["kind"] == "beside"]
    assert (step["name"], step["error"]) == ("on_failure hook tests.test_policies.task", why)
    # The next due time has a row of its own.
    sim.advance(HOUR)
    assert rows.filter(due_at=NOON, attempt=2).exists()


# -- crashes ----------------------------------------------------------------------------------------------------------


def test_a_due_time_whose_server_died_is_run_again_by_another(store: Store) -> None:
    sim = world(store, task(rerun=True), duration=lambda row: 10 * MINUTE)
    sim.advance(3 * MINUTE)
    [(_, server, _)] = sim.started
    sim.kill(server)
    died = sim.now
    sim.advance(20 * MINUTE)
    assert attempts(store) == [(NOON, 1, "abandoned"), (NOON, 2, "succeeded")]
    assert sim.started[1][2] - died < 100 * SECOND  # the lease, and one pass
    assert sim.started[1][0].key == sim.started[0][0].key
    assert CleanupLog.objects.using(store.alias).count() == 1


@ON_ONE
def test_without_it_the_due_time_of_a_dead_server_is_recorded_as_abandoned_and_not_run_again(store: Store) -> None:
    sim = world(store, task(retries=3), duration=lambda row: 10 * MINUTE)
    sim.advance(3 * MINUTE)
    sim.kill(sim.started[0][1])
    sim.advance(30 * MINUTE)
    assert attempts(store) == [(NOON, 1, "abandoned")]


# -- overlaps ---------------------------------------------------------------------------------------------------------


@ON_ONE
def test_a_due_time_is_skipped_while_the_task_runs_and_the_history_says_who_had_it(store: Store) -> None:
    sim = world(store, task("*/5 * * * *"), duration=lambda row: 12 * MINUTE)
    sim.advance(14 * MINUTE)
    (skip,) = ScheduledRun.objects.using(store.alias).filter(status="skipped")
    assert (skip.count, skip.due_at) == (2, NOON + 10 * MINUTE)
    assert skip.reason.startswith(f"held by {sim.started[0][1]} since ")


@ON_ONE
def test_one_run_is_queued_however_many_due_times_came_meanwhile(store: Store) -> None:
    sim = world(store, task("*/5 * * * *", overlap="queue_one"), servers=2, duration=lambda row: 12 * MINUTE)
    sim.advance(28 * MINUTE)
    due = [occurrence.due_at - NOON for occurrence, _, _ in sim.started]
    assert due == [timedelta(0), 10 * MINUTE, 20 * MINUTE]
    assert no_task_ran_twice_at_a_time(sim, 12 * MINUTE)
    # At once when the one before has ended: after its break, and for a pass the next minute.
    assert sim.started[1][2] - sim.started[0][2] < 12 * MINUTE + 75 * SECOND


@ON_ONE
def test_a_queued_due_time_outlives_its_catch_up_window_while_it_waits(store: Store) -> None:
    waits = task("*/10 * * * *", overlap="queue_one", catch_up=MINUTE)
    sim = world(store, waits, servers=2, duration=lambda row: 15 * MINUTE)
    sim.advance(18 * MINUTE)
    assert [occurrence.due_at for occurrence, _, _ in sim.started] == [NOON, NOON + 10 * MINUTE]


@pytest.mark.parametrize("services", [0, 1])
def test_the_running_one_is_ended_wherever_it_runs_and_then_the_new_one_starts(store: Store, services: int) -> None:
    cancels = task("*/5 * * * *", overlap="cancel_other", min_break=2 * MINUTE)
    sim = world(store, cancels, duration=lambda row: 12 * MINUTE, services=services)
    sim.advance(14 * MINUTE)
    begins = [(occurrence.due_at, at) for occurrence, _, at in sim.started]
    assert [due_at for due_at, _ in begins] == [NOON, NOON + 5 * MINUTE, NOON + 10 * MINUTE]
    # One heartbeat until the holder learns of it, and for a pass the next minute.
    assert max(at - due_at for due_at, at in begins) < (20 if services else 75) * SECOND
    assert [status for _, _, status in attempts(store)] == ["cancelled", "cancelled", "running"]


@ON_ONE
def test_the_dead_holder_of_a_task_that_cancels_others_is_waited_for_no_longer_than_its_lease(store: Store) -> None:
    sim = world(store, task("*/5 * * * *", overlap="cancel_other"), duration=lambda row: 12 * MINUTE)
    sim.advance(5 * MINUTE)
    sim.kill(sim.started[0][1])
    sim.advance(8 * MINUTE)
    assert [occurrence.due_at for occurrence, _, _ in sim.started] == [NOON, NOON + 5 * MINUTE, NOON + 10 * MINUTE]


@ON_ONE
def test_what_waits_for_a_slot_of_the_only_server_is_not_said_to_be_taken_by_another(store: Store) -> None:
    long = task("* * * * *", name="shop.long")
    often = ScheduledTask(name="shop.often", kind="call", target="time.sleep", timetable=Every(SECOND))
    sim = world(store, long, often, servers=1, slots=1, duration=lambda row: (20 if row == long.name else 0.4) * SECOND)
    sim.advance(5 * MINUTE)
    assert len(ran(store.alias, long.name)) > 1
    assert accounted(store.alias, often.name)["missed"] > 10
    assert sim.told["busy"] == 0


# -- jitter -----------------------------------------------------------------------------------------------------------


@ON_ONE
def test_a_hundred_tasks_of_noon_are_spread_and_keep_their_due_time(store: Store) -> None:
    tasks = [task(name=f"shop.t{n}", jitter=10 * MINUTE) for n in range(100)]
    sim = world(store, *tasks, services=3)
    sim.advance(15 * MINUTE)
    assert {occurrence.due_at for occurrence, _, _ in sim.started} == {NOON}
    offsets = sorted(at - NOON for _, _, at in sim.started)
    assert len(offsets) == 100
    assert offsets[0] < MINUTE and offsets[-1] > 9 * MINUTE
    assert {occurrence.trigger for occurrence, _, _ in sim.started} == {"schedule"}
    for occurrence, _, at in sim.started:
        assert timedelta(0) <= at - NOON - occurrence.task.offset(occurrence.row) < SECOND


@ON_ONE
def test_under_cron_too_a_task_with_jitter_starts_at_its_own_second(store: Store) -> None:
    late = [
        one for one in (task(name=f"shop.t{n}", jitter=MINUTE / 2) for n in range(50)) if _offset(one) > 20 * SECOND
    ]
    sim = world(store, late[0], services=0)
    sim.advance(5 * MINUTE)
    [(occurrence, _, at)] = sim.started
    assert occurrence.due_at == NOON
    assert timedelta(0) <= at - NOON - _offset(late[0]) < SECOND


def _offset(one: ScheduledTask) -> timedelta:
    return one.offset(one.name)


# -- an outage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outage", "runs"), [(7 * MINUTE, True), (50 * MINUTE, True), (5 * HOUR, True), (timedelta(days=365), True)]
)
@ON_ONE
def test_after_an_outage_the_latest_due_time_runs_and_the_rest_is_recorded_with_its_number(
    store: Store, outage: timedelta, runs: bool
) -> None:
    every_five = task("*/5 * * * *")
    sim = world(store, every_five)
    versions = dict(sim.versions)
    sim.advance(2 * MINUTE)
    for server in versions:
        sim.kill(server)
    sim.now += outage
    sim.versions.update(versions)
    sim.advance(2 * MINUTE)
    sim.finish()
    due = expected(every_five, [(NOON - SECOND, sim.now)])
    counted = accounted(store.alias, "shop.report")
    assert sum(counted.values()) == len(due)
    assert due[-1] in ran(store.alias, "shop.report") or due[-2] in ran(store.alias, "shop.report")


@ON_ONE
def test_every_missed_due_time_runs_where_the_task_says_so_oldest_first(store: Store) -> None:
    sim = world(store, task("*/5 * * * *", catch_up="all"))
    versions = dict(sim.versions)
    sim.advance(2 * MINUTE)
    for server in versions:
        sim.kill(server)
    sim.now += 50 * MINUTE
    sim.versions.update(versions)
    sim.advance(8 * MINUTE)
    due = expected(task("*/5 * * * *"), [(NOON - SECOND, sim.now)])
    assert [occurrence.due_at for occurrence, _, _ in sim.started] == due


@ON_ONE
def test_without_catch_up_a_due_time_that_a_slow_start_made_late_still_runs(store: Store) -> None:
    sim = world(store, task("*/5 * * * *", catch_up="none"), services=0)
    sim.advance(23 * MINUTE)
    assert len(sim.started) == 5
    versions = dict(sim.versions)
    for server in versions:
        sim.kill(server)
    sim.now += 8 * MINUTE
    sim.versions.update(versions)
    sim.advance(2 * MINUTE)
    assert accounted(store.alias, "shop.report")["missed"] >= 1


# -- by hand ----------------------------------------------------------------------------------------------------------


@ON_ONE
def test_a_run_that_is_asked_for_starts_within_five_seconds_where_a_service_runs(store: Store) -> None:
    sim = world(store, task())
    sim.advance(10 * MINUTE)
    sim.started.clear()
    lock = ORMLock("default", {"using": store.alias})
    asked = sim.now + 20 * SECOND
    sim._work_until(asked)
    lock.want("shop.report", now=sim.now)
    sim.advance(MINUTE)
    [(occurrence, _, at)] = sim.started
    assert (occurrence.trigger, occurrence.due_at) == ("manual", asked)
    assert at - asked < 5 * SECOND


@ON_ONE
def test_by_cron_it_starts_with_the_next_pass(store: Store) -> None:
    sim = world(store, task(), services=0)
    sim.advance(10 * MINUTE)
    sim.started.clear()
    ORMLock("default", {"using": store.alias}).want("shop.report", now=sim.now)
    sim.advance(2 * MINUTE)
    assert [occurrence.trigger for occurrence, _, _ in sim.started] == ["manual"]


@pytest.mark.parametrize("services", [0, 1])
@ON_ONE
def test_a_run_that_is_asked_for_as_its_task_is_due_is_made_once_and_whole(store: Store, services: int) -> None:
    """Each due time of the task cancels what runs: one that is open already does so at once."""
    cancels = task("*/5 * * * *", overlap="cancel_other")
    sim = world(store, cancels, services=services, duration=lambda row: MINUTE)
    sim.advance(6 * MINUTE)
    due_at = NOON + 5 * MINUTE
    sim._work_until(due_at - SECOND / 50)
    asked = ORMLock("default", {"using": store.alias}).want("shop.report", now=sim.now)
    sim.advance(4 * MINUTE)
    began = [(occurrence.trigger, occurrence.due_at) for occurrence, _, _ in sim.started]
    assert began == [("schedule", NOON), ("schedule", due_at), ("manual", asked)]
    sim.finish()
    assert [status for _, _, status in attempts(store)] == ["succeeded"] * 3


@ON_ONE
def test_nothing_starts_while_a_task_is_paused_and_nothing_piles_up(store: Store) -> None:
    paused, other = task("* * * * *"), task("* * * * *", name="shop.other")
    sim = world(store, paused, other)
    sim.advance(5 * MINUTE)
    lock = ORMLock("default", {"using": store.alias})
    lock.pause(["shop.report"], reason="the shop moves", now=sim.now)
    before = len([1 for occurrence, _, _ in sim.started if occurrence.row == "shop.report"])
    sim.advance(10 * MINUTE)
    lock.resume(["shop.report"], following=lambda name, after: paused.next(after), now=sim.now)
    resumed = sim.now
    sim.advance(3 * MINUTE)
    mine = [occurrence.due_at for occurrence, _, _ in sim.started if occurrence.row == "shop.report"][before:]
    assert mine == expected(paused, [(resumed, sim.now)])
    assert accounted(store.alias, "shop.report")["missed"] == 0
    others = [occurrence.due_at for occurrence, _, _ in sim.started if occurrence.row == "shop.other"]
    assert others == expected(other, [(NOON - MINUTE, sim.now)])


@ON_ONE
def test_a_server_that_comes_while_a_task_of_all_servers_is_paused_does_not_run_it(store: Store) -> None:
    """Servers come and go with the load: who paused it by its name meant those to come, too."""
    everywhere, alone = task("* * * * *", on_every_server=True), task("* * * * *", "shop.alone", on_every_server=True)
    sim = world(store, everywhere, alone, servers=2)
    sim.advance(2 * MINUTE)
    lock = ORMLock("default", {"using": store.alias})
    lock.pause(["shop.report@web0", "shop.report@web1", "shop.alone@web0"], reason="the shop moves", now=sim.now)
    paused = sim.now
    sim.versions["web2"] = sim.versions["web0"]
    sim.advance(5 * MINUTE)
    ran_by = {(occurrence.task.name, server) for occurrence, server, at in sim.started if at > paused}
    assert ran_by == {("shop.alone", "web1"), ("shop.alone", "web2")}
    assert {row.paused_reason for row in lock.rows(["shop.report@web2"])} == {"the shop moves"}
    lock.resume(["shop.report@web2"], following=lambda name, after: everywhere.next(after), now=sim.now)
    sim.advance(2 * MINUTE)
    assert [server for o, server, at in sim.started if o.task.name == "shop.report" and at > paused] == ["web2"] * 2


@ON_ONE
def test_a_sub_minute_task_runs_each_second_once_on_several_services(store: Store) -> None:
    each_second = ScheduledTask(name="shop.tick", kind="call", target="time.sleep", timetable=Every(SECOND))
    sim = world(store, each_second, services=2, duration=lambda row: timedelta(milliseconds=100))
    sim.advance(2 * MINUTE)
    began = sim.now
    sim.advance(MINUTE)
    due = [due_at for due_at in ran(store.alias, "shop.tick") if due_at > began]
    assert due == expected(each_second, [(began, sim.now)])
    assert {server for occurrence, server, _ in sim.started} == {"web0", "web1", "web2"}
