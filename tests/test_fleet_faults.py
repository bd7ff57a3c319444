"""
Servers that are killed, stopped and set wrong, and a checker that reads what they left: I1 to I9.

``test_a_storm…``: random but seeded, for as long as FLEET_SECONDS, once for each of FLEET_SEEDS ("1,2,3").
``test_a_server_killed_at…``: each fault point that the engine has, once.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from django.db import connections

from .fleet.checker import Evidence, Told, check, interval
from .fleet.harness import AWAY, Fleet, Forked, Process, is_stopped, libfaketime
from .fleet.journal import boot
from .stores import ROOT, Store

SECONDS = float(os.environ.get("FLEET_SECONDS", "10"))
SEEDS = [int(seed) for seed in os.environ.get("FLEET_SEEDS", "1").split(",")]
LEASE, HEARTBEAT = 3.0, 1.0
LOOK_EVERY = 6.5
"""A pass with sub-minute tasks looks every four seconds; the rest is for a machine that has other things to do."""


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


# As tests/fleet/projects/storm/schedule.py declares them; a break that is not declared is a sixth of the period.
STORM = {
    "quick": Told(due=interval(2), min_break=seconds(2 / 6)),
    "long": Told(due=interval(3), min_break=seconds(3 / 6)),
    "family": Told(due=interval(5), min_break=seconds(5 / 6)),
    "side": Told(due=interval(2), overlap=True),
    "failing": Told(due=interval(5), min_break=seconds(5 / 6)),
    "all": Told(due=interval(4), min_break=seconds(4 / 6), every_missed=True),
    "own": Told(due=interval(6), min_break=seconds(1), on_every_server=True),
    "chosen": Told(due=interval(4), min_break=seconds(4 / 6), servers=("web2",)),
    "rested": Told(due=interval(4), min_break=seconds(3)),
}


def points() -> list[str]:
    """Return the fault points of a keeper; those of a runner are for test_run_faults, of servers for tests/dynamic."""
    found: set[str] = set()
    for path in (ROOT / "multiserver_schedule").rglob("*.py"):
        if path.name == "runner.py" or path.is_relative_to(ROOT / "multiserver_schedule" / "servers"):
            continue
        found.update(re.findall(r"""\bpoint\(["'](\w+)["']\)""", path.read_text()))
    return sorted(found)


def evidence(fleet: Fleet, **more: Any) -> Evidence:
    return Evidence(
        lines=fleet.journal.lines(),
        runs=fleet.runs(),
        locks=fleet.locks(),
        cleanups=fleet.cleanups(),
        now=fleet.now(),
        **more,
    )


# -- at random --------------------------------------------------------------------------------------------------------


class Storm:
    """
    Four servers whose cron starts a pass every two seconds or so; three of them are harassed, one has a wrong clock.

    What happens is drawn from a seed. When exactly it hits is the machine's, so a seed is a direction and not a replay.
    """

    VERBS = ("kill", "stop", "stop")
    WHICH = ("keeper", "runner", "both", "all", "runs")

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet = fleet
        self.random = random.Random(seed)
        self.posts = {
            name: fleet.post(name, clock="+1h" if name == "web3" and libfaketime() else None)
            for name in ("web1", "web2", "web3", "web4")
        }
        self.points = points()
        if fleet.store.vendor == "sqlite":
            # Whoever waits here cannot wake up the server that it is waiting for.
            connections[fleet.store.alias].cursor().execute("PRAGMA busy_timeout = 200")
        self.passes: dict[str, list[Forked]] = {name: [] for name in self.posts}
        self.started: dict[str, float] = {}
        self.asleep: list[tuple[float, Process, str]] = []
        self.count: Counter[str] = Counter()
        self.attacks: list[tuple[float, Callable[[], object]]] = []
        """What else is done, and after how many seconds."""

    def rage(self, length: float) -> None:
        until = boot() + length
        next_blow = boot() + 2
        next_pair = 0.0
        began = boot()
        attacks = sorted(self.attacks, key=lambda attack: attack[0])
        while (now := boot()) < until:
            while attacks and now - began >= attacks[0][0]:
                attacks.pop(0)[1]()
                self.count["attacks"] += 1
            if now >= next_pair:
                self.pair()
                next_pair = now + 1
            for name in self.posts:
                self.keep_going(name, now)
            self.wake(now)
            if now >= next_blow:
                self.blow(now)
                next_blow = now + self.random.uniform(0.2, 0.8)
            time.sleep(0.05)

    def pair(self) -> None:
        """Note the clocks; not now, if a server is stopped in the middle of a write to SQLite: that locks all out."""
        with contextlib.suppress(*AWAY):
            self.fleet.pair()

    def keep_going(self, name: str, now: float) -> None:
        alive = [one for one in self.passes[name] if one.alive]
        since = now - self.started.get(name, 0.0)
        if alive and (len(alive) > 1 or since < 2 or self.random.random() > 0.06):
            return
        if since < 0.5:
            return
        faults = ""
        if name != "web4" and self.random.random() < 0.5:
            # Stopped there, it goes on with what it knew before: an old look, a lease that is over.
            action = self.random.choice(("kill", "stop"))
            faults = f"{self.random.choice(self.points)}={action}:{self.random.randint(1, 4)}"
        self.passes[name].append(self.posts[name].go(faults=faults))
        self.started[name] = now
        self.count["passes"] += 1

    def blow(self, now: float) -> None:
        victims = [one for name in ("web1", "web2", "web3") for one in self.passes[name] if one.alive]
        if not victims:
            return
        victim = self.random.choice(victims)
        verb, which = self.random.choice(self.VERBS), self.random.choice(self.WHICH)
        if not self.count["kill"]:
            # Chance would leave it out now and then, on a machine with much else to do.
            verb, which = "kill", "keeper"
        if verb == "kill":
            victim.kill(which)
        else:
            victim.stop(which)
            self.asleep.append((now + self.nap(), victim, which))
        self.count[verb] += 1

    def nap(self) -> float:
        return LEASE * self.random.choice((0.2, 0.5, 1.2, 1.5, 2))

    def wake(self, now: float) -> None:
        for one in (one for passes in self.passes.values() for one in passes):
            if not any(victim is one for _, victim, _ in self.asleep) and is_stopped(one.keeper_pid):
                self.asleep.append((now + self.nap(), one, "keeper"))
                self.count["stopped at a point"] += 1
        for item in [item for item in self.asleep if item[0] <= now]:
            self.asleep.remove(item)
            item[1].cont(item[2])

    def calm_down(self) -> None:
        """Let the harassed servers end, give the last lease time to be cleaned up, then let the healthy one end."""
        self.pair()
        for name in ("web1", "web2", "web3"):
            self.end(name)
        quiet = boot() + LEASE + LOOK_EVERY
        # If it never comes to that, the checker says why.
        while boot() < quiet and self.theirs():
            self.keep_going("web4", boot())
            self.pair()
            time.sleep(0.3)
        self.end("web4")
        for name in self.posts:
            for one in self.passes[name]:
                self.count["killed"] += one.poll() == -9

    def theirs(self) -> bool:
        """Is anything left of the servers that have ended?"""
        with contextlib.suppress(*AWAY):
            return self._theirs()
        return True

    def _theirs(self) -> bool:
        locks = [lock for lock in self.fleet.locks() if lock.owner and lock.server != "web4"]
        if self.attacks:
            # The store may have forgotten what a dead server ran: nobody will say how that ended.
            return bool(locks)
        return bool(locks or [run for run in self.fleet.runs(status="running") if run.server != "web4"])

    def end(self, name: str) -> None:
        alive = [one for one in self.passes[name] if one.alive]
        for one in alive:
            one.terminate()
        for one in alive:
            # It may yet be stopped, by the test or at a point, and be waiting for the signal that ends it.
            self.fleet.wait_for(lambda one=one: self.wake(boot() + 60) or not one.alive, f"{one} to end")  # type: ignore[misc]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_storm_of_kills_stops_and_wrong_clocks_breaks_no_promise(store: Store, tmp_path: Path, seed: int) -> None:
    settings = {"MAX_CONCURRENCY": 8, "LOG_LEVEL": "verbose"}
    with Fleet(store, tmp_path, "storm", lease=LEASE, heartbeat=HEARTBEAT, settings=settings) as fleet:
        fleet.register()
        storm = Storm(fleet, seed)
        storm.rage(SECONDS)
        storm.calm_down()
        found = evidence(fleet)
        # A server that is stopped in the middle of a write to SQLite holds up the healthy one too, for as long.
        held_up = 2 * LEASE if store.vendor == "sqlite" else 0
        wrong = check(found, STORM, lease=LEASE, look_every=LOOK_EVERY + held_up)
        statuses = Counter(run.status for run in found.runs)
        print(f"\n{store.name}, seed {seed}: {dict(storm.count)}, {dict(statuses)}, {len(found.cleanups)} clean-ups")
        assert not wrong, "\n".join(wrong)
        assert statuses["succeeded"] >= 5
        assert storm.count["killed"] >= 1


# -- one by one -------------------------------------------------------------------------------------------------------

# What a due time comes to when its server is killed there, or stopped until somebody else runs the next one.
NOT_CLAIMED = {"before_claim", "in_claim", "before_claim_commit"}
HELD = {"after_claim", "after_run_sent", "before_renew", "after_renew", "before_release", "in_release"}
DONE = {"after_release"}
REAPING = {"before_reap", "in_reap", "after_reap"}


def test_a_server_killed_or_stopped_at_any_fault_point_costs_what_was_promised(store: Store, tmp_path: Path) -> None:
    """
    Each point has two tasks, whose servers are killed and stopped there at the first due time.

    A healthy server frees what they held, and runs the second due time of all. While it does, the stopped servers go on
    where they were: with a lease that is over, and with what they knew then.
    """
    mine = {f"{point}.{action}": point for point in points() if point not in REAPING for action in ("kill", "stop")}
    with Fleet(store, tmp_path, "points", lease=LEASE, heartbeat=HEARTBEAT, settings={"MAX_CONCURRENCY": 50}) as fleet:
        now = fleet.now().timestamp()
        # Of these periods the one whose next due time comes first, but not before all have started.
        times = [(int(now / period + 1) * period, period) for period in range(10, 17)]
        moment, period = min(time for time in times if time[0] > now + 4)
        first, second = (datetime.fromtimestamp(moment + period * number, timezone.utc) for number in range(2))
        fleet.env |= {"FLEET_PERIOD": str(period), "FLEET_TASKS": ",".join(mine)}
        fleet.register()
        assert {lock.next_due_at for lock in fleet.locks()} == {first}
        post = fleet.post("any")
        fleet.pair()
        hit = {
            name: post.go(server=f"web-{name}", faults=f"{point}={name.rpartition('.')[2]}")
            for name, point in mine.items()
        }
        stopped = [server for name, server in hit.items() if name.endswith(".stop")]
        for name, server in hit.items():
            fleet.wait_for(lambda it=server: not it.alive or is_stopped(it.keeper_pid), f"{name} to be reached", 30)
            assert server.poll() == (None if server in stopped else -9), server.output
        fleet.pair()

        for fault in [f"{point}=kill" for point in sorted(REAPING & {*points()}, reverse=True)] + ["before_reap=stop"]:
            # Whoever dies after the clean-up leaves no work to the next, who waits for the next lease to end.
            fleet.wait_for(lambda: stale(fleet), "a stale lock")
            reaper = post.go(server="reaper", faults=fault)
            fleet.wait_for(lambda it=reaper: not it.alive or is_stopped(it.keeper_pid), f"{fault} to be reached")
            if reaper.alive:
                stopped.append(reaper)
            if fault.startswith("after"):
                assert fleet.cleanups()

        healthy = post.go(server="healthy")
        fleet.wait_for(
            lambda: {line["task"] for line in fleet.journal.of("start", due_at=second.isoformat())} >= {*mine},
            "the second due time to be run",
            2.0 * period,
        )
        for server in stopped:
            server.cont()
        fleet.pair()
        fleet.wait_for(
            lambda: {run.task for run in fleet.runs(due_at=second, status="succeeded")} >= {*mine},
            "the runs to end",
            10,
        )
        for server in (*stopped, healthy):
            server.terminate()
        for server in (*stopped, healthy):
            server.wait()
        break_ = seconds(period / 6)
        told = {name: Told(due=interval(period), min_break=break_, servers=(f"web-{name}", "healthy")) for name in mine}
        wrong = check(evidence(fleet), told, lease=LEASE, look_every=LOOK_EVERY)
        assert not wrong, "\n".join(wrong)

        for name, point in mine.items():
            (run,) = fleet.runs(name, due_at=first)
            freed = [cleanup for cleanup in fleet.cleanups(name) if cleanup.owner == run.owner]
            print(f"{store.name} {name}: {run.status} {run.reason}, {len(freed)} clean-ups")
            if point in NOT_CLAIMED:
                assert (run.status, run.server, len(freed)) == ("succeeded", "healthy", 0), name
            elif point in DONE:
                assert (run.status, run.server, len(freed)) == ("succeeded", f"web-{name}", 0), name
            else:
                assert run.status in ("abandoned", "lost"), name
                assert len(freed) == 1, name
            (run,) = fleet.runs(name, due_at=second)
            assert (run.status, run.server) == ("succeeded", "healthy"), name


def stale(fleet: Fleet) -> bool:
    return any(lock.expires_at is not None and lock.expires_at <= fleet.now() for lock in fleet.locks())


def test_the_table_of_fault_points_is_complete() -> None:
    told = NOT_CLAIMED | HELD | DONE | REAPING
    assert set(points()) <= told, f"Say what a kill there costs: {sorted(set(points()) - told)}"
