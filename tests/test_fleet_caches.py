"""
Real servers whose locks are in a cache, with their history in a database: at the barrier, killed, frozen, attacked.

FLEET_ROUNDS says how often the barrier is opened; FLEET_SECONDS and FLEET_SEEDS how long the attacks last, and which.
"""

from __future__ import annotations

import random
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from .caches import CacheStore
from .fleet.checker import Told, check, interval, unaccounted
from .fleet.harness import HISTORY_IN_POSTGRESQL, HISTORY_IN_SQLITE, TWO_CACHES, Fleet
from .servers import Server
from .stores import Store
from .test_fleet_barrier import ROUNDS, SERVERS, TASKS, new_year, one_round
from .test_fleet_faults import HEARTBEAT, LEASE, LOOK_EVERY, SEEDS, STORM, Storm, evidence
from .test_keeper_faults import (
    FAULTS,
    assert_that_a_frozen_store_ends_the_run_in_time,
    assert_that_each_fault_ends_its_run_in_time,
    scene_of,
)

# -- the barrier ------------------------------------------------------------------------------------------------------


@HISTORY_IN_SQLITE
@TWO_CACHES
def test_twenty_due_times_are_run_twenty_times_by_eight_servers_that_lock_in_a_cache(
    store: Store, cache_store: CacheStore, tmp_path: Path
) -> None:
    with Fleet(store, tmp_path, "twenty", cache=cache_store, lease=30, heartbeat=10) as fleet:
        fleet.register()
        for number in range(SERVERS):
            fleet.post(f"web{number + 1}")
        for _ in range(ROUNDS):
            began, passes = one_round(fleet)
            assert Counter(line["task"] for line in began) == {f"task{number:02}": 1 for number in range(TASKS)}
            assert [one.poll() for one in passes] == [0] * SERVERS, "".join(one.output for one in passes)
            assert {(run.task, run.status, run.count) for run in fleet.runs()} == {
                (f"task{number:02}", "succeeded", 1) for number in range(TASKS)
            }
            assert len(fleet.runs()) == TASKS
            assert not fleet.cleanups()
            assert {lock.last_due_at for lock in fleet.locks()} == {new_year(fleet)}
            assert {lock.owner for lock in fleet.locks()} == {None}
            assert {run.task: run.fence for run in fleet.runs()} == {lock.task: lock.fence for lock in fleet.locks()}


@HISTORY_IN_SQLITE
@TWO_CACHES
def test_a_lock_that_gets_and_then_sets_fails_at_the_same_barrier(
    store: Store, cache_store: CacheStore, tmp_path: Path
) -> None:
    lock = {"default": {"BACKEND": "tests.fleet.naive.GetThenSetLock"}}
    env = {"FLEET_CACHES": cache_store.as_json()}
    with Fleet(store, tmp_path, "twenty", lease=30, heartbeat=10, settings={"LOCKS": lock}, env=env) as fleet:
        fleet.register()
        for number in range(SERVERS):
            fleet.post(f"web{number + 1}")
        runs = []
        for _ in range(5):
            cache_store.server.kind.empty()
            began, _ = one_round(fleet)
            runs.append(len(began))
            if len(began) > TASKS:
                return
        pytest.fail(f"This machine shows no race: {runs} runs of {TASKS} due times. What passes here says nothing.")


# -- killed and frozen ------------------------------------------------------------------------------------------------


@HISTORY_IN_SQLITE
@TWO_CACHES
def test_whatever_is_killed_or_frozen_the_run_ends_before_its_lease_in_a_cache_too(
    store: Store, cache_store: CacheStore, tmp_path: Path
) -> None:
    with scene_of(store, tmp_path, *FAULTS, cache=cache_store) as scene:
        assert_that_each_fault_ends_its_run_in_time(scene)


@contextmanager
def frozen(cache_store: CacheStore) -> Iterator[None]:
    cache_store.server.freeze()
    try:
        yield
    finally:
        cache_store.server.thaw()


@HISTORY_IN_SQLITE
@TWO_CACHES
def test_a_cache_that_is_frozen_for_two_leases_ends_the_run_in_time_and_goes_on_when_it_is_back(
    store: Store, cache_store: CacheStore, tmp_path: Path
) -> None:
    with scene_of(store, tmp_path, "web1", cache=cache_store) as scene:
        assert_that_a_frozen_store_ends_the_run_in_time(scene, lambda: frozen(cache_store))


# -- attacked ---------------------------------------------------------------------------------------------------------


def attacks_on(cache_store: CacheStore, seed: int) -> list[tuple[float, Callable[[], object]]]:
    """
    Return what is done to the cache, and when: after each loss, everything waits for a lease.
    """
    server = cache_store.server
    if cache_store.kind == "redis":
        every = [(0.4 * number, lambda: server.call("SCRIPT", "FLUSH")) for number in range(48)]
        return [
            *every,
            (4.1, lambda: server.call("FLUSHALL")),
            (9.3, server.restart),
            (14.5, lambda: damage(server, seed)),
        ]
    return [(5.1, lambda: server.call("flush_all")), (11.9, server.restart), (18.7, lambda: crowd_out(server, seed))]


def damage(server: Server, seed: int) -> None:
    """Delete half of the keys of the lock, whichever they are."""
    keys = sorted(server.call("KEYS", "*"))
    chosen = random.Random(seed).sample(keys, len(keys) // 2)
    print(f"deleted: {chosen}")
    server.call("DEL", *chosen)


def crowd_out(server: Server, seed: int) -> None:
    """Store so much else that the server gives up what it had."""
    some = random.Random(seed)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as line:
        for number in range(20_000):
            length = some.randrange(200, 1500)
            line.sendall(b"set junk%d 0 0 %d noreply\r\n%b\r\n" % (number, length, b"x" * length))
        line.sendall(b"version\r\n")
        assert line.recv(100)
    found = re.search(r"STAT evictions (\d+)", "\n".join(server.call("stats")))
    assert found and int(found[1]) > 100, "nothing was evicted: this proves nothing"


@HISTORY_IN_POSTGRESQL
@TWO_CACHES
@pytest.mark.parametrize("seed", SEEDS)
def test_a_cache_that_loses_its_data_in_a_storm_of_kills_and_stops_lets_nothing_run_twice(
    store: Store, cache_store: CacheStore, tmp_path: Path, seed: int
) -> None:
    if cache_store.kind == "memcached":
        # Without small items it would refuse to start with so little memory.
        cache_store.server.restart(m=1, I="512k")
    settings = {"MAX_CONCURRENCY": 8, "LOG_LEVEL": "verbose"}
    with Fleet(
        store, tmp_path, "storm", cache=cache_store, lease=LEASE, heartbeat=HEARTBEAT, settings=settings
    ) as fleet:
        began = fleet.now()
        fleet.register()
        storm = Storm(fleet, seed)
        storm.attacks = attacks_on(cache_store, seed)
        # With a clock of whole seconds, a loss costs more time.
        storm.rage(25 if cache_store.kind == "memcached" else 20)
        storm.calm_down()
        killed = {one.keeper_pid for one in fleet.processes if one.poll() not in (0, 1)}
        found = evidence(fleet, afterwards=True, lossy=True, since=began, killed=killed)
        wrong = check(found, STORM, lease=LEASE, look_every=LOOK_EVERY + 2 * LEASE)
        statuses = Counter(run.status for run in found.runs)
        said = "".join(one.output for one in fleet.processes)
        losses = Counter(re.findall(r"has lost what it knew of \d+ tasks?: (.*); what was", said))
        print(
            f"\n{cache_store.name}, seed {seed}: {dict(storm.count)}, {dict(statuses)}, {len(found.cleanups)} clean-ups"
        )
        # Of a server's own row only that server can tell.
        untold = {row: count for row, count in unaccounted(found, STORM).items() if "@" not in row and count > 0}
        print(f"{dict(losses)}, told of nowhere: {untold}")
        assert not wrong, "\n".join(wrong)
        # A server that is killed while it tells of a loss leaves a gap of a due time or two in each row.
        most = 2 * storm.count["killed"]
        assert max(untold.values(), default=0) <= most, "what killed servers had not recorded, and no more"
        assert statuses["succeeded"] >= 3
        assert storm.count["killed"] >= 1
        assert losses


@HISTORY_IN_SQLITE
@TWO_CACHES
def test_a_lock_that_gives_a_lost_owner_no_time_to_come_back_is_caught(
    store: Store, cache_store: CacheStore, tmp_path: Path
) -> None:
    lock = {"BACKEND": "tests.fleet.careless.careless_lock", "OPTIONS": {"cache": "lock"}}
    told = {"long": Told(due=interval(1), min_break=timedelta(seconds=1 / 6))}
    settings = {"LOCKS": {"default": lock}}
    # It would come back at its next renewal.
    with Fleet(store, tmp_path, "losing", cache=cache_store, lease=9, heartbeat=3, settings=settings) as fleet:
        began = fleet.now()
        fleet.register()
        post = fleet.post("any")
        for number in range(4):
            post.go(server=f"web{number + 1}")
        fleet.wait_for(lambda: fleet.journal.of("start"), "a run")
        for _ in range(12):
            cache_store.server.kind.empty()
            time.sleep(1.3)
            found = evidence(fleet, afterwards=True, lossy=True, since=began)
            wrong = check(found, told, lease=LEASE, look_every=LOOK_EVERY, at_rest=False)
            if any(line.startswith("I2: long was at work twice") for line in wrong):
                return
        pytest.fail(f"Nothing was found, so what passes here says nothing: {wrong}")
