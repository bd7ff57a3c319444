"""
kill -9 at every step of the making and the end of servers: the next pass finishes what was left.

Each seed is a story (servers are wanted, machines go wrong, none is wanted any more) whose passes run in processes that
are killed: at fault points of the reconciler, and in the middle of the provider's calls. SERVERS_KILLS says how many
seeds (34 by default, two for each point; 500 once before a release).
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from multiserver_schedule.servers import fleet, ledger, providers, types
from multiserver_schedule.servers.fleet import ServerType

from ..fleet.harness import HISTORY_IN_SQLITE
from ..stores import Store
from .cloud import Cloud
from .conftest import MINUTE, POLL, Site
from .lives import Fatal, Life, Lives, alive_in, begin, passes, points

SEEDS = int(os.environ.get("SERVERS_KILLS", "34"))
BATCH = 34
MOST = 4
IN_CALLS = [
    *("list_servers", "create_server", "create_server", "has_started", "stop_server", "has_stopped"),
    *("delete_server", "has_been_deleted", "reboot_server", "find_by_tag"),
]
STATUSES = ("new", "running", "rebooting", "stopping", "stopped", "deleting", "deleted", "errored", "hanging")
STEPS = (
    *("servers_looked", "servers_planned", "servers_adopted", "servers_before_create", "servers_after_create"),
    *("servers_before_call", "servers_after_call", "servers_after_delete"),
)
POINTS = [*STEPS, *(f"servers_{status}" for status in STATUSES)]


class Reaper:
    """Kills at the point that it was sent for, until it has got it; and at any other one, by chance."""

    def __init__(self, rng: random.Random, target: str, *, patient: bool = False) -> None:
        self.rng, self.target = rng, target
        self.is_patient = patient
        """Does it kill nowhere else before?"""

    @property
    def waits(self) -> bool:
        """Is it to kill at its point, and nowhere else, still?"""
        return self.is_patient and bool(self.target)

    def fatal(self) -> Fatal | None:
        """Return who decides in one life, if anybody is to die."""
        if not self.waits and self.rng.random() < 0.2:
            return None
        left = 0 if self.waits or self.rng.random() < 0.3 else self.rng.randint(1, 14)

        def decide(name: str) -> bool:
            nonlocal left
            left -= 1
            return name == self.target or left == 0

        return decide

    def learn(self, died_at: str) -> None:
        """Seek no more what was found."""
        if died_at == self.target:
            self.target = ""


class Story:
    """What happens to one site, by a seed."""

    def __init__(self, seed: int, lives: Lives) -> None:
        self.rng = random.Random(seed)
        self.lives, self.site = lives, lives.site
        # Every second one goes for its point alone, so that each point is hit.
        self.target = POINTS[seed // 2 % len(POINTS)]
        self.reaper = Reaper(self.rng, self.target, patient=seed % 2 == 0)

    def tell(self) -> None:
        """Let it happen, and see that nothing was leaked, made twice or left."""
        rng, site = self.rng, self.site
        settles, lag = rng.choice([(60, 0), (100, 50), (240, 150)])
        site.options(
            MAX_SERVERS=MOST, looks=rng.choice([0, 1, 2]), idempotent=rng.random() < 0.5, settles=settles, lag=lag
        )
        if rng.random() < 0.5:
            fleet.register_server_type(ServerType("default").drain_with(drained_at_once))
        if self.target == "servers_adopted" or rng.random() < 0.2:
            site.cloud.put("stranger", key="0123456789ab", name="default-0123456789ab")
        self.want(rng.randint(2, 4))
        for event in self.events():
            event()
            self.risk(rng.randint(1, 2))
        self.want(rng.randint(0, 5))
        self.settle()
        self.want(0)
        self.risk(rng.randint(0, 2))
        self.settle()
        assert site.cloud.machines == {}

    def want(self, count: int) -> None:
        fleet.ensure(count)
        self.risk(self.rng.randint(1, 3))

    def risk(self, times: int) -> None:
        """Let passes run in processes that may die."""
        for _ in range(times):
            if not self.reaper.waits:
                if self.rng.random() < 0.1:
                    self.lives.two_at_once()
                if self.rng.random() < 0.25:
                    self.site.cloud.fail(self.rng.choice(IN_CALLS), self.rng.choice(["die", "die-done"]))
            life = self.lives.live(self.rng.randint(1, 5), self.reaper.fatal())
            self.reaper.learn(life.died_at)

    def events(self) -> list[Callable[[], None]]:
        """Return what goes wrong, in order: what the target needs among it."""
        needed = {
            "servers_new": self.is_full,
            "servers_rebooting": self.reboots,
            "servers_errored": self.is_refused,
            "servers_hanging": self.hangs,
        }
        others = [self.is_full, self.reboots, self.is_refused, self.loses, self.vanishes, self.stops]
        chosen = self.rng.sample(others, 2)
        if self.target in needed:
            chosen.insert(0, needed[self.target])
        return chosen

    def is_full(self) -> None:
        self.site.cloud.fail("create_server", "full", times=2)
        fleet.ensure(0)
        self.lives.live(12, until_settled=True)
        fleet.ensure(2)

    def is_refused(self) -> None:
        self.site.cloud.fail("create_server", "refused")
        fleet.ensure(0)
        self.lives.live(12, until_settled=True)
        fleet.ensure(2)

    def reboots(self) -> None:
        self.lives.live(15, until_settled=True)
        fleet.reboot()

    def loses(self) -> None:
        for call in self.rng.sample(IN_CALLS, 3):
            self.site.cloud.fail(call, self.rng.choice(["lost", "done", "busy", "crash"]))

    def hangs(self) -> None:
        fleet.ensure(0)
        self.lives.live(40, until_settled=True)
        self.site.options(looks=10_000)
        fleet.ensure(1)
        until = self.site.now + 9 * MINUTE
        while self.site.now < until:
            self.risk(1)
        self.site.options(looks=1)

    def vanishes(self) -> None:
        if machines := self.site.cloud.machines:
            # By somebody else: another one may be made for its key, as long as nobody knew of it.
            self.site.cloud.put(self.rng.choice(sorted(machines)), state="gone", key="")

    def stops(self) -> None:
        if running := [id for id, each in self.site.cloud.machines.items() if each["state"] == "running"]:
            self.site.cloud.put(self.rng.choice(running), state="stopped")

    def settle(self) -> None:
        """Let passes run until nothing is left to do, with nobody killed, and look."""
        with self.site.cloud.state() as state:
            state["faults"] = [each for each in state["faults"] if not each["what"].startswith("die")]
        while self.reaper.waits:
            # What it was sent for may come now, and not before.
            life = self.lives.live(200, self.reaper.fatal(), until_settled=True)
            self.reaper.learn(life.died_at)
            if not life.died_at:
                break
        life = self.lives.live(200, until_settled=True)
        assert life.passes < 200, f"it does not settle: {self.site.statuses()}"
        assert life.spent < 2700, f"it settles too late: {self.site.seen}"
        wanted = min(fleet.wanted_count(), MOST)
        cloud = self.site.cloud
        rows = {server.machine_id: server for server in self.site.servers("running")}
        assert len(rows) == wanted, self.site.statuses()
        assert self.site.statuses() == ({"running": wanted} if wanted else {})
        assert set(cloud.machines) == set(rows), "each machine has its row, and each row its machine"
        assert cloud.most <= MOST
        twice = {key: count for key, count in Counter(cloud.ever).items() if key and count > 1}
        assert not twice, f"made twice: {twice}"
        assert not ledger.servers().filter(next_step_at__isnull=False).exists()


def drained_at_once(server: Any) -> int:
    return 0


@pytest.fixture
def lives(site: Site, rows: Store) -> Lives:
    site.settings.MULTISERVER_SCHEDULE_SERVERS["HANGING_AFTER"] = 7 * MINUTE
    return Lives(site, rows.alias)


def test_the_points_are_those_of_the_reconciler() -> None:
    assert {name for name in points() if "{" not in name} == set(STEPS)


@pytest.mark.parametrize("batch", range((SEEDS + BATCH - 1) // BATCH))
def test_whoever_is_killed_at_any_step_leaves_what_the_next_pass_finishes(
    lives: Lives, rows: Store, batch: int, tmp_path: Path
) -> None:
    everywhere = {"postgresql": 7, "mariadb": 3}
    seeds = list(range(batch * BATCH, min(SEEDS, (batch + 1) * BATCH)))
    if rows.name != "sqlite":
        # A tenth of them, each database its own.
        seeds = [seed for seed in seeds if seed % 10 == everywhere[rows.name]]
    began = time.monotonic()
    for seed in seeds:
        for kept in (ledger.servers(), ledger.targets(), ledger.providers()):
            kept.delete()
        types._registered.clear()
        lives.site.cloud = Cloud(tmp_path / f"cloud-{seed}")
        lives.site.options(folder=str(tmp_path / f"cloud-{seed}"))
        try:
            Story(seed, lives).tell()
        except AssertionError as error:
            raise AssertionError(f"seed {seed} on {rows.name}: {error}") from error
    # For whoever asks with -s.
    took = f"{time.monotonic() - began:.1f} s, {lives.count} processes, {lives.passes} passes"
    print(f"{rows.name}, {len(seeds)} seeds: {took}, killed: {dict(sorted(lives.deaths.items()))}")
    if len(seeds) >= 2 * len(POINTS):
        assert set(POINTS) | {"a call"} <= set(lives.deaths), "somebody was killed at each point"


# -- real processes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def workers(site: Site, rows: Store, tmp_path: Path) -> Iterator[Path]:
    """Have real processes as servers, and leave none."""
    folder = tmp_path / "machines"
    site.settings.MULTISERVER_SCHEDULE_SERVERS = {
        "FLEET": "kills",
        "HANGING_AFTER": timedelta(hours=5),
        "PROVIDERS": {
            "folder": {
                "BACKEND": "multiserver_schedule.servers.providers.process.ProcessProvider",
                "MAX_SERVERS": MOST,
                "OPTIONS": {
                    "directory": str(folder),
                    "command": [sys.executable, "-S", "-c", "import time; time.sleep(600)"],
                },
            }
        },
    }
    yield folder
    provider = providers.make("folder")
    for machine in provider.list_servers():
        provider.delete_server(machine.id)


@HISTORY_IN_SQLITE
@pytest.mark.parametrize("seed", range(max(2, SEEDS // 20)))
def test_no_worker_process_is_left_or_doubled_whatever_its_reconciler_was_killed_at(
    site: Site, rows: Store, workers: Path, seed: int
) -> None:
    rng = random.Random(seed)
    lives = Lives(site, rows.alias)

    def risk(times: int) -> None:
        for _ in range(times):
            lives.live(rng.randint(1, 4), Reaper(rng, rng.choice(POINTS)).fatal())

    def settle(wanted: int) -> None:
        assert lives.live(400, until_settled=True).passes < 400, f"{site.statuses()} {site.servers()}"
        running = site.servers("running")
        assert site.statuses() == ({"running": wanted} if wanted else {})
        alive = {server.key: alive_in(workers, server.key) for server in running}
        assert all(alive.values()), "each server is a process"
        assert sum(len(pids) for pids in alive.values()) == wanted, f"and no more than one: {alive}"
        assert len(alive_in(workers)) == wanted, "and no other process is there"

    for wanted in (rng.randint(1, 3), rng.randint(2, MOST), 0):
        fleet.ensure(wanted)
        risk(3)
        if rng.random() < 0.3:
            fleet.reboot()
            risk(2)
        settle(wanted)


# -- one that stands still ---------------------------------------------------------------------------------------------


@pytest.fixture
def frozen(site: Site, rows: Store) -> Iterator[Callable[[], Life]]:
    """Return what stops a process in the middle of its call that makes a machine, before that is done."""
    stopped: list[Life] = []

    def freeze() -> Life:
        site.cloud.fail("create_server", "stop")
        life = begin(partial(passes, site, rows.alias, 1))
        assert life.is_stopped(), "it stands still within the call"
        stopped.append(life)
        return life

    yield freeze
    for life in stopped:
        life.end()


@pytest.mark.parametrize("within", [POLL, 2 * MINUTE, 15 * MINUTE])
def test_one_that_is_frozen_within_its_call_makes_no_second_machine_where_keys_are_taken(
    site: Site, rows: Store, frozen: Callable[[], Life], within: timedelta
) -> None:
    """Where the provider takes keys. Before the others take over, after it, and after they have given it up."""
    site.options(idempotent=True)
    fleet.ensure(1)
    life = frozen()
    lives = Lives(site, rows.alias)
    until = site.now + within
    while site.now < until:
        lives.live(1)
    assert site.cloud.made == (0 if within == POLL else 1)
    life.go_on()
    life.wait()
    assert lives.live(60, until_settled=True).passes < 60
    assert (site.cloud.made, site.statuses()) == (1, {"running": 1})
    assert set(site.cloud.machines) == {server.machine_id for server in site.servers("running")}


def test_what_one_that_was_frozen_makes_too_late_is_found_and_ended(
    site: Site, rows: Store, frozen: Callable[[], Life]
) -> None:
    """Where the provider takes no keys, nobody can keep it from being made."""
    fleet.ensure(1)
    life = frozen()
    lives = Lives(site, rows.alias)
    assert lives.live(60, until_settled=True).passes < 60
    assert (site.cloud.made, site.statuses()) == (1, {"running": 1})
    first = site.servers("running")[0]
    life.go_on()
    life.wait()
    assert len(site.cloud.machines) == 2
    lives.live(10)
    assert set(site.cloud.machines) == {first.machine_id}
    first.refresh_from_db()
    assert (first.status, site.statuses()) == ("running", {"running": 1})


def test_a_machine_made_by_one_that_was_frozen_is_ended_where_none_is_wanted_any_more(
    site: Site, rows: Store, frozen: Callable[[], Life]
) -> None:
    site.options(idempotent=True)
    fleet.ensure(1)
    life = frozen()
    site.later(MINUTE)
    fleet.ensure(0)
    lives = Lives(site, rows.alias)
    assert lives.live(60, until_settled=True).passes < 60
    assert (site.cloud.machines, site.statuses()) == ({}, {})
    life.go_on()
    life.wait()
    assert len(site.cloud.machines) == 1
    site.later(MINUTE)
    lives.live(20)
    assert (site.cloud.machines, site.statuses()) == ({}, {})
