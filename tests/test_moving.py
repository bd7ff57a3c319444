"""
A task moves from one lock to another while both versions of the code are live: nothing twice, nothing lost, no overlap.

The steps are those of the docs: both versions have both locks in LOCKS, the new one names the other lock for the task.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path

import pytest
from django.test import override_settings

from multiserver_schedule.conf import Settings
from multiserver_schedule.cron import Cron
from multiserver_schedule.cycle import Cycle
from multiserver_schedule.cycle import Store as LockStore
from multiserver_schedule.due import Policy
from multiserver_schedule.entries import Row, ScheduledTask
from multiserver_schedule.history import History
from multiserver_schedule.locks.base import BaseLock
from multiserver_schedule.locks.cache import CacheLock
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.models import CleanupLog, ScheduledRun
from multiserver_schedule.testing.contract import declare

from . import caches, servers
from .fleet.checker import Told, check, interval
from .fleet.harness import CACHE_LOCK, HISTORY_IN_SQLITE, REDIS, Fleet, Forked
from .simulation import SimulatedRunner, World, accounted, expected, ran
from .stores import Store
from .test_fleet_faults import LOOK_EVERY, SEEDS, evidence

UTC = timezone.utc
NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
WAYS = {"redis": "django-redis", "memcached": "memcached"}
MOVES = [("orm", "redis"), ("redis", "orm"), ("orm", "memcached"), ("redis", "memcached")]


def task(name: str, lock: str, text: str = "* * * * *") -> ScheduledTask:
    return ScheduledTask(name=name, kind="call", target="time.sleep", timetable=Cron(text, "UTC"), lock=lock)


def version(lock: str, other: str, *more: ScheduledTask) -> dict[str, ScheduledTask]:
    """Return a version whose tasks are locked in ``lock``, but for one that has always been in the other."""
    tasks = [task("often", lock), task("slow", lock, "*/5 * * * *"), task("settled", other), *more]
    return {each.name: each for each in tasks}


def duration(row: str) -> timedelta:
    """Let one task take longer than its period: every deploy finds it under way, and its next due time comes."""
    return timedelta(minutes=6, seconds=30) if row == "slow" else timedelta(seconds=1)


@pytest.fixture(
    params=[
        pytest.param(
            move,
            id="-to-".join(move),
            marks=[
                pytest.mark.skipif(bool(caches.missing(WAYS[name])), reason=f"{name}: {caches.missing(WAYS[name])}")
                for name in move
                if name in WAYS
            ],
        )
        for move in MOVES
    ]
)
def move(request: pytest.FixtureRequest, cache_server: Callable[[str], servers.Server]) -> Iterator[tuple[str, str]]:
    """Run the test for each of these moves: the alias of the lock before, and after."""
    entries = {"default": caches.LOCMEM}
    for name in request.param:
        if name in WAYS:
            server = cache_server(name)
            server.reset()
            entries[name] = caches.of(WAYS[name], server).django_settings
    with override_settings(CACHES=entries):
        yield request.param
        caches.disconnect()


def lock_of(store: Store, alias: str) -> BaseLock:
    if alias == "orm":
        return ORMLock(alias, {"using": store.alias})
    return CacheLock(alias, {"cache": alias, "using": store.alias})


def rows(store: Store, alias: str) -> list[Row]:
    """Return the rows of the two tasks that move, as this lock has them."""
    lock = lock_of(store, alias)
    found = lock.rows(["often", "slow"])
    lock.close()
    return found


def world(store: Store, move: Sequence[str], seed: int) -> World:
    return World(
        alias=store.alias,
        now=NOON - timedelta(seconds=30),
        locks=lambda: [lock_of(store, alias) for alias in move],
        seed=seed,
        duration=duration,
        versions={f"web{number}": version(*move) for number in range(3)},
    )


def deploy(sim: World, new: dict[str, ScheduledTask]) -> None:
    """Deploy on one server after the other, in random order, with both versions live for some minutes."""
    names = sorted(sim.versions)
    sim.random.shuffle(names)
    for name in names:
        sim.versions[name] = new
        sim.advance(timedelta(seconds=sim.random.randrange(30, 240)))


def end(sim: World) -> datetime:
    """Go on to the middle of the next minute, which is when the test ends, and let what runs come to its end."""
    sim.advance(sim.now.replace(second=0, microsecond=0) + timedelta(seconds=90) - sim.now)
    now = sim.now
    sim.finish()
    return now


def assert_each_ran_once(
    sim: World, store: Store, tasks: dict[str, ScheduledTask], until: datetime, missed: int = 0
) -> None:
    for name, each in tasks.items():
        done = ran(store.alias, name)
        assert len(done) == len(set(done)), f"{name} ran twice"
        due = expected(each, [(done[0] - MINUTE, until)])
        assert done[0] <= NOON + 5 * MINUTE
        assert set(done) <= set(due)
        found = accounted(store.alias, name)
        assert sum(found.values()) == len(due), (name, found, sorted(set(due) - set(done)))
        if name == "slow":
            assert set(found) <= {"succeeded", "held", "missed"}, found
        else:
            assert set(found) <= {"succeeded", "missed"}, found
            assert found["missed"] <= missed, (name, found)
    assert not sim.told["tripwire"]
    assert not CleanupLog.objects.using(store.alias).exists()


def assert_no_overlap(store: Store, row: str) -> None:
    runs = ScheduledRun.objects.using(store.alias).filter(task=row).exclude(status="skipped").order_by("started_at")
    for before, after in pairwise(runs):
        assert before.finished_at is not None
        assert after.started_at is not None
        assert before.finished_at <= after.started_at, f"{row} {after.due_at} began before {before.due_at} had ended"


@HISTORY_IN_SQLITE
@pytest.mark.parametrize("seed", SEEDS)
def test_a_task_that_moves_there_and_back_runs_once_at_each_due_time(
    store: Store, move: tuple[str, str], seed: int
) -> None:
    here, there = move
    sim = world(store, move, seed)
    # The run of a quarter past is under way, and will be at twenty past.
    sim.advance(17 * MINUTE)
    deploy(sim, version(there, there))
    sim.advance(12 * MINUTE)
    # Back again by a newer version, which no one has to wait for.
    deploy(sim, version(here, there, task("new", here)))
    sim.advance(12 * MINUTE)
    deploy(sim, version(there, there, task("new", there)))
    sim.advance(8 * MINUTE)
    until = end(sim)
    assert_each_ran_once(sim, store, version(here, there), until)
    for name in ("often", "slow"):
        assert_no_overlap(store, name)
    # A newer version was waited for: what the one before had under way ended first.
    assert {(row.moved_from, row.moved_to) for row in rows(store, here)} == {("", there)}
    assert {(row.moved_from, row.moved_to) for row in rows(store, there)} == {("", "")}


@HISTORY_IN_SQLITE
def test_a_rollback_takes_the_task_back_when_the_newer_version_is_gone(store: Store, move: tuple[str, str]) -> None:
    here, there = move
    old, new = version(here, there), version(there, there)
    sim = world(store, move, 5)
    sim.advance(12 * MINUTE)
    sim.versions["web1"] = new
    sim.advance(7 * MINUTE)
    sim.kill("web2")
    sim.versions["web1"] = old
    sim.advance(15 * MINUTE)
    until = end(sim)
    # For five minutes after its last pass nobody can be sure that the newer one is gone: what is due then waits, or is
    # recorded as missed.
    assert_each_ran_once(sim, store, old, until, missed=10)
    assert_no_overlap(store, "slow")
    assert accounted(store.alias, "settled")["missed"] == 0


@HISTORY_IN_SQLITE
def test_a_run_whose_server_was_killed_is_cleaned_up_where_it_was_before_the_task_goes_on_elsewhere(
    store: Store, move: tuple[str, str]
) -> None:
    here, there = move
    sim = world(store, move, 7)
    sim.advance(11 * MINUTE)
    (row,) = (row for row in rows(store, here) if row.task == "slow")
    assert row.owner is not None
    sim.kill(row.server)
    for server in [*sim.versions]:
        sim.versions[server] = version(there, there)
    sim.advance(8 * MINUTE)
    end(sim)
    (cleanup,) = CleanupLog.objects.using(store.alias).all()
    assert (cleanup.task, cleanup.owner, cleanup.reason) == ("slow", row.owner, "lease_expired")
    after = ScheduledRun.objects.using(store.alias).filter(task="slow", started_at__gt=cleanup.cleaned_at)
    assert [run.due_at for run in after] == [NOON + 15 * MINUTE]
    assert after[0].fence > cleanup.fence


@HISTORY_IN_SQLITE
def test_a_pause_moves_with_its_task(store: Store, move: tuple[str, str]) -> None:
    here, there = move
    sim = world(store, move, 3)
    sim.advance(3 * MINUTE)
    lock = lock_of(store, here)
    lock.pause(["often"], reason="the bank is down", now=sim.now)
    lock.close()
    before = ran(store.alias, "often")
    sim.versions = dict.fromkeys(sim.versions, version(there, there))
    sim.advance(3 * MINUTE)
    end(sim)
    paused = {row.task: row.paused_reason for row in rows(store, there) if row.paused}
    assert paused == {"often": "the bank is down"}
    assert ran(store.alias, "often") == before != []


@HISTORY_IN_SQLITE
def test_the_break_after_a_run_that_ends_where_the_task_was_before_is_kept_where_it_goes_on(
    store: Store, move: tuple[str, str]
) -> None:
    there = move[1]
    breaks = 2 * MINUTE
    old, new = (
        {"resting": dataclasses.replace(task("resting", lock), min_break=breaks), "settled": task("settled", there)}
        for lock in move
    )
    sim = world(store, move, 9)
    sim.versions = dict.fromkeys(sim.versions, old)
    sim.duration = lambda row: timedelta(seconds=90) if row == "resting" else timedelta(seconds=1)
    runs = ScheduledRun.objects.using(store.alias).filter(task="resting").exclude(status="skipped")
    while not runs.filter(status="running"):
        sim.advance(MINUTE)
    sim.versions = dict.fromkeys(sim.versions, new)
    moved_at = sim.now
    sim.advance(6 * MINUTE)
    end(sim)
    last = runs.filter(started_at__lte=moved_at).latest("started_at")
    following = runs.filter(started_at__gt=moved_at).earliest("started_at")
    assert last.finished_at is not None and following.started_at is not None
    assert last.finished_at > moved_at
    assert following.started_at - last.finished_at >= breaks


class Left(ORMLock):
    """A store that a task has left, and its row there."""

    def __init__(self, store: Store, alias: str, row: Row) -> None:
        super().__init__(alias, {"using": store.alias})
        self.row = row

    def leave(self, names: Sequence[str], *, to: str, now: datetime | None = None) -> list[Row]:
        return [self.row]


@pytest.mark.parametrize("ages", [(1, 5), (5, 1)])
def test_of_two_stores_that_had_a_task_the_one_that_ran_it_last_says_what_has_run(
    store: Store, ages: tuple[int, int]
) -> None:
    often = task("often", "orm")
    lasts = [NOON - age * MINUTE for age in ages]
    left = [
        Row(
            pk=0,
            task="often",
            fingerprint=often.fingerprint,
            last_due_at=last,
            schedule_since=NOON - 60 * MINUTE,
            next_due_at=last + MINUTE,
            not_before=last,
        )
        for last in lasts
    ]
    here = lock_of(store, "orm")
    locks = [here, *(Left(store, f"left{number}", row) for number, row in enumerate(left))]
    nothing, everything = declare(), declare(often)
    stores = [
        LockStore(lock=lock, history=History(store.alias), declared=everything if lock is here else nothing)
        for lock in locks
    ]
    runner = SimulatedRunner(World(alias=store.alias, now=NOON))
    Cycle(stores=stores, runner=runner, settings=Settings(server_name="web1"), policy=Policy()).sync(
        stores[0], now=NOON
    )
    (row,) = here.rows(["often"])
    assert row.last_due_at == max(lasts)


# -- with real processes ----------------------------------------------------------------------------------------------

SECONDS_LIVE = 3.6
LEASE = 3.0
TOLD = {
    "quick": Told(due=interval(2), min_break=timedelta(seconds=2 / 6)),
    "long": Told(due=interval(3), min_break=timedelta(seconds=3 / 6)),
    **{f"release{number}": Told(due=interval(3), min_break=timedelta(seconds=3 / 6)) for number in (1, 2, 3)},
}


@HISTORY_IN_SQLITE
@REDIS
def test_real_servers_move_a_task_to_a_cache_and_back_without_a_gap_or_a_second_run(
    store: Store, cache_store: caches.CacheStore, tmp_path: Path
) -> None:
    locks = {"default": {"BACKEND": "multiserver_schedule.locks.orm.ORMLock"}, "cache": CACHE_LOCK}
    settings = {"LOCKS": locks, "MAX_CONCURRENCY": 8, "LOG_LEVEL": "verbose"}
    releases = [("release1", "default"), ("release2", "cache"), ("release3", "default")]
    with Fleet(
        store, tmp_path, "moving", lease=LEASE, settings=settings, env={"FLEET_CACHES": cache_store.as_json()}
    ) as fleet:
        posts = {name: fleet.post(name, env={"FLEET_RELEASE": name, "FLEET_LOCK": lock}) for name, lock in releases}
        before: list[Forked] = []
        for number, (name, _) in enumerate(releases):
            fleet.pair()
            now = [posts[name].go(server=f"{name}-web{each}") for each in (1, 2)]
            if number:
                # Both are live, one of them is about to leave.
                time.sleep(SECONDS_LIVE)
                for one in before:
                    one.terminate()
            time.sleep(SECONDS_LIVE)
            before = now
        fleet.pair()
        for one in before:
            one.terminate()
        for one in fleet.processes:
            assert one.wait() in (0, 1), one.output
        # What a server was told to end is told of as lost: all else ran to its end.
        moved = {row.task: row for row in fleet.locks()}
        found = dataclasses.replace(evidence(fleet), locks=[moved["quick"], moved["long"]])
        wrong = check(found, TOLD, lease=LEASE, look_every=LOOK_EVERY)
        assert not wrong, "\n".join(wrong) + fleet.told()
        for name, lock in releases:
            by = {line["task"] for line in fleet.journal.of("start") if line["server"].startswith(name)}
            assert {"quick", "long"} <= by, f"{name} never ran what is locked in {lock}"
        theirs = CacheLock("cache", {"cache": "lock"})
        assert {row.moved_to for row in theirs.rows(["quick", "long"])} == {"default"}
        theirs.close()
