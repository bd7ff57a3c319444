"""A run keeps its lease for as long as it takes, and no longer than it may; what it holds up is not lost."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from django.db import transaction

from multiserver_schedule.conf import Settings
from multiserver_schedule.cron import Cron
from multiserver_schedule.cycle import Cycle
from multiserver_schedule.cycle import Store as Locked
from multiserver_schedule.due import Policy
from multiserver_schedule.entries import Claim, Outcome, ScheduledTask
from multiserver_schedule.history import History
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.models import CleanupLog, ScheduledLock, ScheduledRun
from multiserver_schedule.run.base import Ended, Event, Message, Runner
from multiserver_schedule.service import HAND_OVER
from multiserver_schedule.testing.contract import THREE, a_task, declare

from .fleet.harness import is_alive, utc
from .fleet.journal import A_MOMENT, boot
from .scenarios.scene import Deaths, Scene
from .stores import Store

LONG = os.environ.get("FLEET_LONG", "0") not in ("", "0")
"""FLEET_LONG=1: the literal 90 seconds under a lease of 30."""


def test_a_run_of_three_leases_keeps_its_lease_and_one_with_a_limit_is_ended_before_its_lock_is_free(
    store: Store, tmp_path: Path
) -> None:
    """Also one that holds the GIL in C. The one that is ended ignores TERM, as does the program beside it."""
    lease, heartbeat, seconds = (30.0, 10.0, 90.0) if LONG else (3.0, 1.0, 9.0)
    env = {"SCENE_SECONDS": str(seconds)}
    with Scene(store, tmp_path, "long", lease=lease, heartbeat=heartbeat, env=env) as scene, Deaths() as deaths:
        scene.register()
        scene.make_due()
        web1 = scene.server("web1")
        start = scene.wait_for_start("limited")
        beside = scene.journal.of("grandchild", task="limited")[0]["child"]
        family = (start["pid"], beside)
        deaths.watch(*family)
        for task in ("patient", "greedy"):
            scene.wait_for_start(task)
        rival = scene.server("web2")
        freed_with: list[bool] = []

        def all_is_done() -> bool:
            rows = {row.task: row for row in scene.locks()}
            now = scene.now()
            for task in ("patient", "greedy"):
                row = rows[task]
                assert row.owner is None or (row.server == "web1" and row.expires_at is not None)
                # Read after the row: a lease that stood then may have been renewed since, but not have ended.
                if row.owner is not None and row.expires_at <= now:
                    assert scene.lock(task).owner is None or scene.lock(task).expires_at > now, task
            if rows["limited"].owner is None and not freed_with:
                freed_with.extend(is_alive(pid) for pid in family)
            return not web1.alive

        scene.wait_for(all_is_done, "the end of the pass", seconds + 30)
        assert freed_with == [False, False], "its group was gone, and only then was the lock free"
        assert rival.wait() == 0, rival.output

        for task in ("patient", "greedy"):
            [run] = [run for run in scene.runs(task) if run.status != "skipped"]
            assert run.status == "succeeded"
            assert run.started_at is not None
            assert run.finished_at is not None
            assert run.finished_at - run.started_at >= timedelta(seconds=seconds - 0.1)
            assert len(scene.started(task)) == 1
            assert scene.cleanups(task) == []

        runs = [run for run in scene.runs("limited") if run.due_at == utc(start["due_at"])]
        assert [run.status for run in runs] == ["timed_out"]
        assert "not finished 2 s after it began" in runs[0].error
        cleanup = scene.cleanups("limited")[0]
        assert (cleanup.reason, cleanup.server, cleanup.cleaned_by) == ("overran", "web1", "web1")
        assert cleanup.owner == runs[0].owner
        [signal] = scene.journal.of("cleanup", owner=cleanup.owner)
        assert (signal["reason"], signal["server"]) == ("overran", "web1")
        [told] = scene.journal.of("failed", task="limited", due_at=start["due_at"])
        assert told["status"] == "timed_out"
        assert deaths.at[start["pid"]] - start["boot"] >= 1.9
        assert web1.wait() == 1


# -- what was held up -------------------------------------------------------------------------------------------------


def test_neither_a_server_killed_before_a_daily_due_time_nor_a_manual_run_that_ended_just_before_costs_it(
    store: Store, tmp_path: Path
) -> None:
    """
    Both happen two seconds before the due time: within the lease, and within the break of four seconds.

    On SQLite alone, whose clock can be put where the due time is near: days have only one.
    """
    if store.vendor != "sqlite":
        pytest.skip("a real day is too long; the lock's part is tested on all stores with time passed in")
    began = datetime.now(timezone.utc)
    wait = timedelta(seconds=9)
    due_at = (began + timedelta(days=1)).replace(hour=3, minute=0, second=0, microsecond=0)
    ahead = due_at - wait - began
    due_boot = boot() + wait.total_seconds()
    env = {
        "SCENE_AT": "03:00",
        "SCENE_UNTIL": str(due_boot - 2),
        # "A server's clock is ahead" is how the fleet says that SQLite's is not its process's.
        "FLEET_SKEW": str(-ahead.total_seconds()),
    }
    with Scene(store, tmp_path, "nightly", env=env) as scene, Deaths() as deaths:
        scene.register()
        scene.make_due(["killed"], due_at - timedelta(days=1))
        web1 = scene.server("web1")
        by_hand = scene.command("web3", "schedule", "trigger", "triggered")
        assert scene.wait_for_start("killed")["due_at"] == (due_at - timedelta(days=1)).isoformat()
        assert scene.wait_for_start("triggered")["trigger"] == "manual"
        deaths.watch(scene.started("killed")[0]["pid"])
        scene.wait_for(lambda: boot() >= due_boot - 2, "two seconds before")
        web1.kill()
        assert by_hand.wait() == 0, by_hand.output
        web2 = scene.server("web2")
        assert web2.wait(60) == 0, web2.output
        for task, latest in (("killed", scene.lease + 1), ("triggered", 3)):
            starts = scene.started(task, server="web2")
            assert [line["due_at"] for line in starts] == [due_at.isoformat()], task
            assert 0 <= starts[0]["boot"] - due_boot < latest + A_MOMENT, task
            assert starts[0]["trigger"] == "schedule"
        assert [run.status for run in scene.runs() if run.status == "skipped"] == []
        assert [row.task for row in scene.cleanups()] == ["killed"]


def test_a_run_by_hand_whose_row_a_neighbour_has_locked_says_so_and_to_try_again(store: Store, tmp_path: Path) -> None:
    """A claim passes over locked rows: without them there is nobody to name."""
    if store.vendor == "sqlite":
        pytest.skip("it locks no rows")
    with Scene(store, tmp_path, "mishaps") as scene:
        scene.register()
        rows = ScheduledLock.objects.using(store.alias).filter(task="well")
        with transaction.atomic(using=store.alias):
            assert rows.select_for_update().get().owner is None
            refused = scene.command("web1", "schedule", "trigger", "well")
            assert refused.wait() == 1, refused.output
        assert "well was not started: another server had its row locked just then; try again." in refused.output
        taken = scene.command("web1", "schedule", "trigger", "well")
        assert taken.wait() == 0, taken.output


# -- the same with time passed in -------------------------------------------------------------------------------------

SECOND = timedelta(seconds=1)


class Nowhere(Runner):
    """Runs nothing: a test says when a run has ended."""

    def __init__(self) -> None:
        self.claims: list[Claim] = []

    def start(self) -> None: ...
    def renew(self, until: Mapping[str, float]) -> None: ...
    def end(self, owner: str, why: str) -> None: ...
    def report(self, event: Event) -> None: ...
    def check(self) -> None: ...
    def close(self, timeout: float) -> None: ...

    def run(self, claim: Claim, *, until: float, finish_by: float | None) -> None:
        self.claims.append(claim)

    def poll(self, timeout: float) -> list[Message]:
        return []


@dataclass
class Pass:
    """One pass of a server, at the times that it is given."""

    store: Store
    tasks: Iterable[ScheduledTask]
    server: str
    runner: Nowhere = field(default_factory=Nowhere)

    def __post_init__(self) -> None:
        declared = declare(*self.tasks, server=self.server)
        lock = ORMLock("default", {"using": self.store.alias})
        self.cycle = Cycle(
            stores=[Locked(lock=lock, history=History(self.store.alias), declared=declared)],
            runner=self.runner,
            settings=Settings(server_name=self.server),
            policy=Policy(),
            hand_over=HAND_OVER,
        )

    def look(self, now: datetime) -> list[tuple[str, datetime]]:
        """Look, and return what was started."""
        before = len(self.runner.claims)
        self.cycle.step(now=now)
        return [(claim.task.name, claim.occurrence.due_at) for claim in self.runner.claims[before:]]

    def end(self, claim: Claim, now: datetime) -> None:
        """Have a run end well."""
        self.cycle.take([Ended(claim.owner, Outcome(status="succeeded"), True)], now=now)


DAILY = Cron("0 3 * * *", "UTC")


def test_a_server_killed_ten_seconds_before_a_daily_due_time_does_not_cost_it_by_the_stores_clock(store: Store) -> None:
    task = a_task("nightly", DAILY, catch_up=timedelta(days=2))
    yesterday = THREE - timedelta(days=1)
    web1 = Pass(store, [task], "web1")
    web1.look(yesterday - SECOND)
    assert web1.look(THREE - 40 * SECOND) == [("nightly", yesterday)]
    web1.cycle.renew(now=THREE - 12 * SECOND)  # The last that is heard of it: it is killed two seconds later.
    for late in (0.0, 1.0, 10.0, 17.9):
        assert Pass(store, [task], "web2").look(THREE + late * SECOND) == []
    assert ScheduledLock.objects.using(store.alias).get().last_due_at == yesterday, "it is open still"
    assert Pass(store, [task], "web2").look(THREE + 18 * SECOND) == [("nightly", THREE)]
    assert [row.cleaned_by for row in CleanupLog.objects.using(store.alias).all()] == ["web2"]
    assert not ScheduledRun.objects.using(store.alias).filter(status="skipped").exists()


def test_a_server_that_is_alive_at_a_due_time_and_busy_with_the_task_does_cost_it(store: Store) -> None:
    task = a_task("nightly", DAILY, catch_up=timedelta(days=2))
    web1, web2 = Pass(store, [task], "web1"), Pass(store, [task], "web2")
    web1.look(THREE - timedelta(days=1, seconds=1))
    assert len(web1.look(THREE - 40 * SECOND)) == 1
    web1.cycle.renew(now=THREE - 12 * SECOND)
    assert web2.look(THREE) == []
    web1.cycle.renew(now=THREE + SECOND)
    assert web2.look(THREE + 2 * SECOND) == []
    [skip] = ScheduledRun.objects.using(store.alias).filter(status="skipped")
    assert skip.due_at == THREE
    assert skip.reason.startswith("held by web1")


def test_a_server_that_wakes_up_cannot_renew_the_lease_that_another_has_by_now(store: Store) -> None:
    task = a_task("hourly", Cron("0 * * * *", "UTC"))
    web1, web2 = Pass(store, [task], "web1"), Pass(store, [task], "web2")
    web1.look(THREE - SECOND)
    assert len(web1.look(THREE)) == 1
    later = THREE + timedelta(hours=1)
    assert web2.look(later) == [("hourly", later)]
    before = ScheduledLock.objects.using(store.alias).get()
    web1.cycle.renew(now=later + 10 * SECOND)
    [running] = web1.cycle.running.values()
    assert running.lost
    after = ScheduledLock.objects.using(store.alias).get()
    assert (after.owner, after.server, after.expires_at) == (before.owner, "web2", before.expires_at)


def test_ten_tasks_of_thirty_seconds_every_minute_on_four_slots_all_get_their_turn(store: Store) -> None:
    """A pass each minute, as cron starts it, that goes on while it has something to do: ten minutes of them."""
    if store.vendor != "sqlite":
        pytest.skip("which of many is claimed first is the same code for all stores")
    tasks = [a_task(f"task{number}", Cron("* * * * *", "UTC")) for number in range(10)]
    passes: list[Pass] = []
    ends: list[tuple[datetime, Pass, Claim]] = []
    ran: dict[str, list[datetime]] = {task.name: [] for task in tasks}
    Pass(store, tasks, "web1").look(THREE - SECOND)
    minutes = 10
    for second in range(0, minutes * 60, 5):
        now = THREE + second * SECOND
        if second % 60 == 0:
            passes.append(Pass(store, tasks, "web1"))
        for one in passes:
            for end, of, claim in [item for item in ends if item[0] <= now and item[1] is one]:
                of.end(claim, now)
                ends.remove((end, of, claim))
            if one.cycle.running and second % 10 == 0:
                one.cycle.renew(now=now)
        for one in reversed(passes[:]):  # The newest first, which knows least of who has waited.
            known = len(one.runner.claims)
            one.look(now)
            for claim in one.runner.claims[known:]:
                ran[claim.task.name].append(now)
                ends.append((now + 30 * SECOND, one, claim))
            if not one.cycle.running and now - one.cycle.first_look.get("default", now) > 55 * SECOND:
                passes.remove(one)
        held = ScheduledLock.objects.using(store.alias).filter(owner__isnull=False, expires_at__gt=now)
        assert held.count() <= 4, "slots are counted over all passes of the server"
    assert sum(map(len, ran.values())) >= minutes * 8 * 0.9, "the slots are used"
    for name, times in ran.items():
        gaps = [later - earlier for earlier, later in zip([THREE, *times], [*times, now], strict=True)]
        assert max(gaps) <= timedelta(minutes=3), name


def test_max_concurrency_is_counted_over_all_passes_of_a_server_and_not_over_servers(store: Store) -> None:
    tasks = [a_task(f"task{number}", Cron("* * * * *", "UTC")) for number in range(10)]
    Pass(store, tasks, "web1").look(THREE - SECOND)
    first, second, other = Pass(store, tasks, "web1"), Pass(store, tasks, "web1"), Pass(store, tasks, "web2")
    assert len(first.look(THREE)) == 4
    assert second.look(THREE + SECOND) == []
    first.end(first.runner.claims[0], THREE + 2 * SECOND)
    assert len(second.look(THREE + 3 * SECOND)) == 1
    assert first.look(THREE + 4 * SECOND) == []
    assert len(other.look(THREE + 5 * SECOND)) == 4
