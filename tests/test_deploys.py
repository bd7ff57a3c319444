"""Rolling deploys, rollbacks and servers that come and go: no due time is lost, none is run twice."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from multiserver_schedule.cron import Cron, Every
from multiserver_schedule.entries import ScheduledTask
from multiserver_schedule.models import CleanupLog, ScheduledLock

from .simulation import World, accounted, expected, ran
from .stores import Store

UTC = timezone.utc
NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def task(name: str, text: str = "* * * * *", **more: Any) -> ScheduledTask:
    return ScheduledTask(name=name, kind="call", target="time.sleep", timetable=Cron(text, "UTC"), **more)


def version(*tasks: ScheduledTask) -> dict[str, ScheduledTask]:
    return {each.name: each for each in tasks}


V1 = version(task("same"), task("changed", "*/2 * * * *"), task("removed"), task("old_name"))
V2 = version(task("same"), task("changed", "*/5 * * * *"), task("added"), task("new_name"))


def world(store: Store, **more: Any) -> World:
    return World(alias=store.alias, now=NOON - timedelta(seconds=30), **more)


def assert_run_once(store: Store, row: str, due: list[datetime]) -> None:
    assert ran(store.alias, row) == due


def test_in_a_rolling_deploy_each_due_time_runs_once_by_one_of_the_two_schedules(store: Store) -> None:
    sim = world(store, versions={f"web{n}": V1 for n in range(4)}, seed=1)
    sim.advance(30 * MINUTE)
    took_over: datetime | None = None
    last_v1 = sim.now
    for server in ("web0", "web1", "web2", "web3"):
        # The two versions alternate, in random order, for ten minutes a step.
        last_v1 = sim.now
        sim.versions[server] = V2
        sim.advance(10 * MINUTE)
        if took_over is None:
            took_over = ScheduledLock.objects.using(store.alias).get(task="changed").schedule_since
    sim.finish()
    began, end = NOON, sim.now
    assert took_over is not None
    assert_run_once(store, "same", expected(V1["same"], [(began, end)]))
    # What the old schedule owed when the new one took over is still run, by the new version.
    by_the_old, by_the_new = expected(V1["changed"], [(began, took_over)]), expected(V2["changed"], [(took_over, end)])
    assert_run_once(store, "changed", by_the_old + by_the_new)
    assert_run_once(store, "added", expected(V2["added"], [(took_over, end)]))
    assert_run_once(store, "removed", expected(V1["removed"], [(began, last_v1)]))
    assert not sim.told["tripwire"]


def test_after_a_rollback_the_older_schedule_holds_from_when_the_newer_was_last_seen(store: Store) -> None:
    sim = world(store, versions={"web1": V1, "web2": V1}, seed=2)
    sim.advance(10 * MINUTE)
    sim.versions["web2"] = V2
    sim.advance(10 * MINUTE)
    took_over = ScheduledLock.objects.using(store.alias).get(task="changed").schedule_since
    sim.kill("web2")
    sim.advance(20 * MINUTE)
    sim.finish()
    rolled_back = ScheduledLock.objects.using(store.alias).get(task="changed").schedule_since
    assert NOON + 18 * MINUTE < rolled_back <= NOON + 20 * MINUTE
    owed = (
        expected(V1["changed"], [(NOON, took_over)])
        + expected(V2["changed"], [(took_over, rolled_back)])
        + expected(V1["changed"], [(rolled_back, sim.now)])
    )
    done = ran(store.alias, "changed")
    assert len(done) == len(set(done))
    assert set(done) <= set(owed)
    # In the five minutes that it takes to be sure, the latest due time waits; those before it are recorded as missed.
    assert len(done) + accounted(store.alias, "changed")["missed"] == len(set(owed))
    assert accounted(store.alias, "changed")["missed"] <= 2
    assert_run_once(store, "same", expected(V1["same"], [(NOON, sim.now)]))


def test_alternating_versions_starve_nobody(store: Store) -> None:
    """One digest that every version rewrote starved a changed task completely."""
    sim = world(store, versions={"web1": V1, "web2": V2}, seed=3)
    sim.advance(40 * MINUTE)
    sim.finish()
    since = ScheduledLock.objects.using(store.alias).get(task="changed").schedule_since
    assert len(ran(store.alias, "changed")) >= len(expected(V2["changed"], [(since, sim.now)])) >= 7
    assert_run_once(store, "same", expected(V1["same"], [(NOON, sim.now)]))


def test_a_servers_own_tasks_follow_it_as_servers_come_and_go(store: Store) -> None:
    own = version(task("sweep", "*/3 * * * *", on_every_server=True), task("shared"))
    sim = world(store, versions={"web1": own}, seed=4)
    sim.advance(12 * MINUTE)
    sim.versions["web2"] = own
    sim.advance(12 * MINUTE)
    sim.kill("web1")
    sim.advance(12 * MINUTE)
    sim.versions["web1"] = own
    sim.advance(12 * MINUTE)
    sim.finish()
    sweep = own["sweep"]
    web2_since = ScheduledLock.objects.using(store.alias).get(task="sweep@web2").schedule_since
    assert_run_once(store, "sweep@web2", expected(sweep, [(web2_since, sim.now)]))
    web1 = ran(store.alias, "sweep@web1")
    assert len(web1) == len(set(web1))
    # While web1 was away its own due times were nobody's: the latest is caught up, the others are recorded as missed.
    assert len(web1) + accounted(store.alias, "sweep@web1")["missed"] == len(expected(sweep, [(NOON, sim.now)]))
    assert_run_once(store, "shared", expected(own["shared"], [(NOON, sim.now)]))


def test_ten_half_minute_tasks_on_four_slots_all_get_their_turn(store: Store) -> None:
    """Claiming in the order of the rows starved two of ten tasks for ten hours in a simulation."""
    ten = version(*(task(f"t{n}") for n in range(10)))
    sim = world(store, versions={"web1": ten}, slots=4, duration=lambda row: timedelta(seconds=30), seed=5)
    sim.advance(30 * MINUTE)
    sim.finish()
    counts = {name: len(ran(store.alias, name)) for name in ten}
    # Four slots are 240 seconds of work a minute, ten tasks want 300: 24 runs each, if all were equal.
    assert min(counts.values()) >= 20, counts
    for name in ten:
        found = accounted(store.alias, name)
        last = ScheduledLock.objects.using(store.alias).get(task=name).last_due_at
        assert sum(found.values()) == len(expected(ten[name], [(NOON, last)])), (name, found)


def test_killed_servers_cost_no_daily_due_time(store: Store) -> None:
    daily = version(task("daily", "30 12 * * *"), task("often"))
    sim = world(
        store,
        versions={"web1": daily, "web2": daily},
        duration=lambda row: timedelta(seconds=45 if row == "often" else 5),
        seed=6,
    )
    sim.advance(29 * MINUTE + timedelta(seconds=50))
    for server in ("web1", "web2"):
        sim.kill(server)  # at 12:29:20, in the middle of the run of 12:29
    sim.versions["web3"] = daily
    sim.advance(10 * MINUTE)
    sim.finish()
    assert_run_once(store, "daily", [NOON + 30 * MINUTE])
    assert CleanupLog.objects.using(store.alias).count() == 1


@pytest.mark.parametrize("seed", range(2))
def test_random_deploys_for_hours_lose_and_double_nothing(store: Store, seed: int) -> None:
    third = version(task("same"), task("changed", "*/3 * * * *"), task("added"), task("sixth", "*/6 * * * *"))
    sim = world(store, versions={"web1": V1, "web2": V1, "web3": V1}, seed=seed)
    sim.advance(5 * MINUTE)
    for deployed in (V2, third):
        servers = ["web1", "web2", "web3"]
        sim.random.shuffle(servers)
        for server in servers:
            if sim.random.random() < 0.5:
                sim.kill(server)
                sim.advance(sim.random.randrange(1, 3) * MINUTE)
            sim.versions[server] = deployed
            sim.advance(sim.random.randrange(1, 6) * MINUTE)
        sim.advance(15 * MINUTE)
    sim.finish()
    assert_run_once(store, "same", expected(V1["same"], [(NOON, sim.now)]))
    for name in ("changed", "added", "removed", "old_name", "new_name", "sixth"):
        done = ran(store.alias, name)
        assert len(done) == len(set(done)), name
        last = ScheduledLock.objects.using(store.alias).get(task=name).last_due_at
        assert done[-1] <= last
    assert accounted(store.alias, "changed")["missed"] == 0
    assert not sim.told["tripwire"]


def test_an_interval_and_a_cron_of_the_same_times_are_two_schedules(store: Store) -> None:
    by_cron = version(task("both"))
    by_interval = {
        "both": ScheduledTask(name="both", kind="call", target="x.y", timetable=Every(MINUTE)),
    }
    sim = world(store, versions={"web1": by_cron}, seed=7)
    sim.advance(5 * MINUTE)
    sim.versions["web1"] = by_interval
    sim.advance(5 * MINUTE)
    sim.finish()
    assert_run_once(store, "both", expected(by_cron["both"], [(NOON, sim.now)]))
