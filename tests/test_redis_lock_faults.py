"""The Redis lock when its server dies, forgets, hangs, is full, is a replica, or has given the keys to another node."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import redis

from multiserver_schedule.entries import ReleasedClaim, Skip
from multiserver_schedule.exceptions import StoreRefused, StoreTimeout
from multiserver_schedule.locks.redis import RedisLock
from multiserver_schedule.testing.contract import (
    BREAK,
    DAY,
    HOUR,
    LEASE,
    MINUTE,
    SECOND,
    SUCCEEDED,
    THREE,
    Notes,
    Server,
    a_task,
    declare,
)

from . import caches, servers
from .caches import CacheStore
from .test_redis_lock import HALF_PAST_TWO, WAYS, delete, key, on, server_occurrence

everywhere = on(*WAYS)
each_server = on("django-redis", "redis6", "valkey")
each_backend = on("django-redis", "django-rediscache")


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def new_lock(cache_store: CacheStore) -> Iterator[Callable[..., RedisLock]]:
    """Return what makes a lock with a connection of its own, as each process has."""
    made: list[RedisLock] = []

    def make(**options: Any) -> RedisLock:
        made.append(RedisLock("default", {"cache": "lock", **options}))
        return made[-1]

    make().sync(declare(), now=THREE - 10 * DAY)
    yield make
    for lock in made:
        lock.close()


@pytest.fixture
def web1(new_lock: Callable[..., RedisLock], notes: Notes) -> Server:
    server = Server(new_lock(), notes, a_task())
    server.sync(HALF_PAST_TWO)
    return server


@pytest.fixture
def web2(new_lock: Callable[..., RedisLock], notes: Notes, web1: Server) -> Server:
    return Server(new_lock(), notes, a_task(), name="web2")


def every_call(server: Server) -> dict[str, Callable[[], object]]:
    """Return each call of the lock by its name."""
    lock = server.lock
    occurrence = server_occurrence(server, "shop.refresh")
    claim = server.must_run(THREE)
    released = ReleasedClaim(claim=claim, outcome=SUCCEEDED, min_break=BREAK)
    notes = server.notes
    return {
        "look": lambda: lock.look(server.declared, now=THREE),
        "sync": lambda: lock.sync(server.declared, now=THREE),
        "clock": lambda: lock.clock(),
        "rows": lambda: lock.rows(),
        "rows of": lambda: lock.rows(["shop.refresh"]),
        "claim": lambda: lock.claim([occurrence], server="web1", record=notes.started, now=THREE),
        "skip": lambda: lock.skip([Skip(occurrence=occurrence, reason="missed")], record=notes.skipped, now=THREE),
        "renew": lambda: lock.renew([claim], now=THREE),
        "release": lambda: lock.release([released], record=notes.finished, now=THREE),
        "reap": lambda: lock.reap(server="web1", record=notes.cleaned, now=THREE),
        "free": lambda: lock.free("shop.refresh", server="web1", record=notes.cleaned, now=THREE),
        "leave": lambda: lock.leave(["shop.refresh"], to="other", now=THREE),
        "arrive": lambda: lock.arrive(["shop.refresh"], now=THREE),
    }


# -- away, and frozen -------------------------------------------------------------------------------------------------


@everywhere
def test_every_call_raises_while_the_server_is_away(web1: Server, cache_store: CacheStore) -> None:
    calls = every_call(web1)
    cache_store.server.crash()
    for name, call in calls.items():
        with pytest.raises(redis.ConnectionError):
            print(name, call())
    assert web1.notes.releases == []
    cache_store.server.restart()
    assert web1.lock.look(web1.declared, now=THREE).known is False


@each_backend
def test_every_call_raises_in_its_time_while_the_server_is_frozen(
    web1: Server, new_lock: Callable[..., RedisLock], cache_store: CacheStore
) -> None:
    calls = every_call(web1)
    web1.lock._line.timeout = 0.15
    web1.lock.close()
    web1.lock.clock()
    cache_store.server.freeze()
    for call in calls.values():
        began = time.monotonic()
        with pytest.raises((redis.TimeoutError, redis.ConnectionError)):
            call()
        assert time.monotonic() - began < 5.0
    cache_store.server.thaw()
    assert web1.lock.clock()


@contextmanager
def frozen(server: servers.Server) -> Iterator[None]:
    server.freeze()
    try:
        yield
    finally:
        server.thaw()


def cut_when_it_hangs(lock: RedisLock) -> threading.Thread:
    def cut() -> None:
        deadline = time.monotonic() + 5
        while not lock.is_calling and time.monotonic() < deadline:
            time.sleep(0.005)
        # By now it is sent, and the answer is waited for.
        time.sleep(0.15)
        while not lock.cut() and time.monotonic() < deadline:
            time.sleep(0.01)

    thread = threading.Thread(target=cut)
    thread.start()
    return thread


@everywhere
def test_a_call_that_hangs_is_cut_from_another_thread(web1: Server, cache_store: CacheStore) -> None:
    assert web1.lock.cut() is False, "nothing is under way"
    assert web1.lock.is_calling is False
    for is_connected in (True, False):
        if not is_connected:
            web1.lock.close()
        began = time.monotonic()
        with frozen(cache_store.server):
            cutter = cut_when_it_hangs(web1.lock)
            with pytest.raises(StoreTimeout, match=r"CACHES\['lock'\].*hung, and was cut"):
                web1.lock.look(web1.declared, now=THREE)
            cutter.join()
        assert time.monotonic() - began < 10.0
        assert web1.lock.is_calling is False
        assert web1.due(THREE) == ["shop.refresh"], "the next call opens its own connection"


@everywhere
@pytest.mark.parametrize("overlap", ["skip", "allow"])
def test_a_claim_that_is_carried_out_after_its_caller_gave_up_is_settled_by_the_next(
    web1: Server, web2: Server, notes: Notes, cache_store: CacheStore, overlap: Any
) -> None:
    server = Server(web1.lock, notes, a_task("shop.x", overlap=overlap))
    server.sync(HALF_PAST_TWO)
    occurrence = server.occurrence(THREE)
    with frozen(cache_store.server):
        cutter = cut_when_it_hangs(server.lock)
        with pytest.raises(StoreTimeout):
            server.claim(occurrence, now=THREE)
        cutter.join()
    assert notes.claims == []
    deadline = time.monotonic() + 5
    while web2.row("shop.x").last_due_at != THREE and time.monotonic() < deadline:
        time.sleep(0.01)
    (claim,) = server.claim(now=THREE + SECOND)
    assert (claim.occurrence, claim.acquired_at) == (occurrence, THREE)
    assert notes.claims == [claim]
    assert server.renew(claim, now=THREE + SECOND) == [True]
    assert server.claim(now=THREE + SECOND) == []


@each_server
def test_a_claim_that_timed_out_twice_is_settled_by_the_next(
    web1: Server, web2: Server, notes: Notes, cache_store: CacheStore
) -> None:
    occurrence = web1.occurrence(THREE)
    web1.lock._line.timeout = 0.2
    web1.lock.close()
    web1.lock.clock()
    with frozen(cache_store.server), pytest.raises(redis.TimeoutError):
        web1.claim(occurrence, now=THREE)
    deadline = time.monotonic() + 5
    while web2.row().owner is None and time.monotonic() < deadline:
        time.sleep(0.01)
    (claim,) = web1.claim(now=THREE + SECOND)
    assert web2.row().owner == claim.owner
    assert notes.claims == [claim]


# -- several servers at once ------------------------------------------------------------------------------------------


@everywhere
def test_of_several_servers_that_start_the_row_of_one_task_one_wins_each_due_time(
    new_lock: Callable[..., RedisLock], notes: Notes
) -> None:
    many = 8
    barrier = threading.Barrier(many)
    servers_ = [Server(new_lock(), notes, a_task("a"), a_task("b"), name=f"web{i}") for i in range(many)]
    registered: list[list[str]] = []

    def run(server: Server) -> list[Any]:
        barrier.wait()
        registered.append(server.sync(HALF_PAST_TWO)[0])
        barrier.wait()
        return [
            claim.occurrence.row
            for claim in server.claim(server_occurrence(server, "a"), server_occurrence(server, "b"), now=THREE)
        ]

    with ThreadPoolExecutor(many) as pool:
        won = [row for rows in pool.map(run, servers_) for row in rows]
    assert sorted(won) == ["a", "b"]
    assert sorted(name for names in registered for name in names) == ["a", "b"]
    assert len({claim.owner for claim in notes.claims}) == 2


@each_server
def test_of_several_versions_that_come_at_once_one_holds(new_lock: Callable[..., RedisLock], notes: Notes) -> None:
    many = 6
    barrier = threading.Barrier(many)
    versions = [
        Server(new_lock(), notes, *(a_task(f"t{j}") for j in range(i + 2)), name=f"web{i}") for i in range(many)
    ]

    def run(server: Server) -> None:
        barrier.wait()
        server.sync(HALF_PAST_TWO)

    with ThreadPoolExecutor(many) as pool:
        list(pool.map(run, versions))
    assert len(versions[0].lock.rows()) == many + 1
    for server in versions:
        assert server.lock.look(server.declared, now=HALF_PAST_TWO).known is True


@each_server
def test_a_script_cache_that_is_flushed_all_the_time_stops_nobody(web1: Server, cache_store: CacheStore) -> None:
    stop = threading.Event()

    def flush() -> None:
        while not stop.is_set():
            cache_store.server.call("SCRIPT", "FLUSH")

    thread = threading.Thread(target=flush)
    thread.start()
    try:
        claim = web1.must_run(THREE)
        for _ in range(300):
            assert web1.renew(claim, now=THREE) == [True]
    finally:
        stop.set()
        thread.join()


# -- a restart, and what it forgot ------------------------------------------------------------------------------------


def aof(server: servers.Server) -> Path:
    """Return the file that the server appends its commands to."""
    found = [path for path in server.data.rglob("appendonly.aof*") if path.is_file()]
    (path,) = [path for path in found if ".incr." in path.name] or found
    return path


@contextmanager
def forgetting(server: servers.Server) -> Iterator[None]:
    """Lose what is done in the block, as at a power failure: the server comes back with what it was before."""
    # Else it keeps to itself what it would append, for up to two seconds, while the disk is busy.
    server.call("CONFIG", "SET", "appendfsync", "no")
    size = aof(server).stat().st_size
    yield
    server.crash()
    assert aof(server).stat().st_size > size
    os.truncate(aof(server), size)
    server.restart()


@everywhere
def test_what_ran_and_was_forgotten_does_not_run_again(
    web1: Server, web2: Server, notes: Notes, cache_store: CacheStore
) -> None:
    with forgetting(cache_store.server):
        first = web1.must_run(THREE)
        web1.release(first, now=THREE + SECOND)
    at = THREE + 2 * SECOND
    assert web2.row().last_due_at == HALF_PAST_TWO, "it was forgotten"
    assert web2.run(THREE, now=at) is None, "before anybody has looked"
    assert web2.skip(THREE, now=at, reason="missed") is None
    assert web2.lock.look(web2.declared, now=at).known is False
    synced = web2.lock.sync(web2.declared, now=at)
    assert synced.lost == {"shop.refresh": HALF_PAST_TWO}
    assert synced.trouble == "the Redis server was restarted, or another one took its place"
    row = web2.row()
    assert (row.last_due_at, row.next_due_at, row.not_before) == (at, THREE + HOUR, at + LEASE)
    for late in (SECOND, MINUTE, 50 * MINUTE):
        assert web2.run(THREE, now=at + late) is None
    second = web2.must_run(THREE + HOUR)
    assert second.fence > first.fence


@everywhere
def test_an_owner_that_was_forgotten_comes_back_and_nobody_overlaps_it(
    web1: Server, web2: Server, cache_store: CacheStore
) -> None:
    with forgetting(cache_store.server):
        claim = web1.must_run(THREE)
    at = THREE + 5 * SECOND
    web2.sync(at)
    assert web2.run(at, trigger="manual", now=at + SECOND) is None
    assert web2.reap(at + SECOND) == []
    assert web1.renew(claim, now=THREE + 10 * SECOND) == [True]
    assert web2.row().owner == claim.owner
    for beat in range(2, 10):
        assert web1.renew(claim, now=THREE + beat * 10 * SECOND) == [True]
    late = THREE + 90 * SECOND
    assert web2.run(late, trigger="manual", now=late) is None
    assert web1.release(claim, now=late) == [True]
    again = web2.must_run(late, trigger="manual", now=late)
    assert again.fence > claim.fence


@everywhere
def test_an_owner_that_comes_back_before_the_restart_is_noticed(
    web1: Server, web2: Server, cache_store: CacheStore
) -> None:
    with forgetting(cache_store.server):
        claim = web1.must_run(THREE)
    assert web1.renew(claim, now=THREE + 10 * SECOND) == [True]
    web2.sync(THREE + 11 * SECOND)
    assert web2.row().owner == claim.owner
    assert web2.row().last_due_at == THREE + 11 * SECOND


@everywhere
def test_an_owner_whose_renewals_were_forgotten_is_not_reaped_while_it_lives(
    web1: Server, web2: Server, cache_store: CacheStore
) -> None:
    claim = web1.must_run(THREE)
    with forgetting(cache_store.server):
        web1.renew(claim, now=THREE + 25 * SECOND)
    at = THREE + 31 * SECOND
    assert web2.reap(at) == [], "before anybody has looked"
    web2.sync(at)
    assert web2.lock.look(web2.declared, now=at).expired is False
    assert web2.reap(at) == []
    assert web1.renew(claim, now=THREE + 35 * SECOND) == [True]
    assert web2.reap(THREE + 64 * SECOND) == []
    assert [cleanup.owner for cleanup in web2.reap(THREE + 65 * SECOND)] == [claim.owner]


@everywhere
def test_a_release_that_was_forgotten_costs_a_hold_and_a_clean_up_and_no_more(
    web1: Server, web2: Server, cache_store: CacheStore
) -> None:
    claim = web1.must_run(THREE)
    with forgetting(cache_store.server):
        web1.release(claim, now=THREE + SECOND)
    at = THREE + 2 * SECOND
    web2.sync(at)
    assert [cleanup.owner for cleanup in web2.reap(at + LEASE)] == [claim.owner]
    assert web2.run(THREE + HOUR) is not None


@everywhere
def test_a_newer_owner_that_was_forgotten_takes_its_row_back_from_the_older(
    web1: Server, web2: Server, cache_store: CacheStore
) -> None:
    older = web1.must_run(THREE)
    with forgetting(cache_store.server):
        web1.release(older, now=THREE + SECOND)
        newer = web2.must_run(THREE + 2 * SECOND, trigger="manual")
    web1.sync(THREE + 3 * SECOND)
    assert web1.row().owner == older.owner
    assert web2.renew(newer, now=THREE + 4 * SECOND) == [True]
    assert web1.row().owner == newer.owner
    assert web1.renew(older, now=THREE + 5 * SECOND) == [False]


@each_server
def test_a_restart_that_forgot_nothing_still_costs_a_hold_and_is_noticed_once(
    web1: Server, web2: Server, cache_store: CacheStore
) -> None:
    claim = web1.must_run(THREE)
    cache_store.server.restart()
    at = THREE + SECOND
    assert web2.lock.sync(web2.declared, now=at).lost == {"shop.refresh": THREE}
    assert web1.lock.look(web1.declared, now=at).known is True
    assert web1.lock.sync(web1.declared, now=at).lost == {}
    assert web1.renew(claim, now=at) == [True]
    assert web1.release(claim, now=at) == [True]
    assert web2.run(at, trigger="manual", now=at + LEASE - SECOND) is None
    assert web2.run(at, trigger="manual", now=at + LEASE) is not None


@each_server
def test_a_sync_that_dies_half_way_is_finished_by_another_that_reports_all_of_the_loss(
    new_lock: Callable[..., RedisLock], notes: Notes, cache_store: CacheStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiserver_schedule.locks.redis.lock.BATCH", 1)
    web1, web2 = (Server(new_lock(), notes, a_task("a"), a_task("b"), name=name) for name in ("web1", "web2"))
    web1.sync(HALF_PAST_TWO)
    cache_store.server.restart()
    call = web1.lock._line.call

    def dying(step: str, **given: Any) -> Any:
        if step == "write" and given["rows"][0][0] == "b":
            raise redis.ConnectionError("killed")
        return call(step, **given)

    monkeypatch.setattr(web1.lock._line, "call", dying)
    with pytest.raises(redis.ConnectionError):
        web1.lock.sync(web1.declared, now=THREE)
    assert web2.row("a").last_due_at == THREE
    assert web2.lock.sync(web2.declared, now=THREE + SECOND).lost == {"a": HALF_PAST_TWO, "b": HALF_PAST_TWO}
    delete(cache_store, "row:a", "row:b")
    with pytest.raises(redis.ConnectionError):
        web1.lock.sync(web1.declared, now=THREE + MINUTE)
    assert web2.row("a").last_due_at == THREE + MINUTE
    assert web2.lock.sync(web2.declared, now=THREE + MINUTE + SECOND).lost == {"a": None, "b": None}


@each_server
def test_after_a_restart_the_task_of_another_version_is_repaired_by_that_version(
    web1: Server, new_lock: Callable[..., RedisLock], notes: Notes, cache_store: CacheStore
) -> None:
    newer = Server(new_lock(), notes, a_task(), a_task("shop.more"), name="web2")
    newer.sync(HALF_PAST_TWO + MINUTE)
    cache_store.server.restart()
    at = THREE + SECOND
    assert sorted(web1.lock.sync(web1.declared, now=at).lost) == ["shop.more", "shop.refresh"]
    assert web1.row("shop.more").next_due_at is None
    assert newer.lock.look(newer.declared, now=at).known is False
    newer.sync(at)
    assert web1.row("shop.more").next_due_at == THREE + HOUR
    assert newer.lock.look(newer.declared, now=at).known is True
    assert web1.lock.look(web1.declared, now=at).known is True


@each_server
def test_a_row_that_leaves_before_the_restart_is_noticed_is_held_too(web1: Server, cache_store: CacheStore) -> None:
    with forgetting(cache_store.server):
        web1.must_run(THREE)
    (row,) = web1.lock.leave(["shop.refresh"], to="other", now=THREE + SECOND)
    assert row.last_due_at == THREE + SECOND
    assert row.not_before == THREE + SECOND + LEASE


@each_server
def test_a_kill_between_the_reaping_and_the_recording_loses_no_clean_up(
    web1: Server, web2: Server, cache_store: CacheStore
) -> None:
    claim = web1.must_run(THREE)

    def killed(cleanups: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        web1.lock.reap(server="web1", record=killed, now=THREE + MINUTE)
    assert web2.lock.look(web2.declared, now=THREE + MINUTE).expired is True
    assert web2.reap(THREE + MINUTE) == []
    assert [cleanup.owner for cleanup in web2.notes.cleanups] == [claim.owner]
    assert web2.notes.cleanups[0].cleaned_by == "web1"
    assert web2.lock.look(web2.declared, now=THREE + MINUTE).expired is False


# -- full -------------------------------------------------------------------------------------------------------------


@everywhere
def test_a_full_memory_stops_claims_and_nothing_else(
    new_lock: Callable[..., RedisLock], notes: Notes, cache_store: CacheStore
) -> None:
    tasks = [a_task(name) for name in "abcd"] + [a_task("e", overlap="allow")]
    server = Server(new_lock(), notes, *tasks)
    server.sync(HALF_PAST_TWO)
    a, b, c, _, e = (server_occurrence(server, name) for name in "abcde")
    first, second, both = server.claim(a, b, e, now=THREE)
    cache_store.server.call("CONFIG", "SET", "maxmemory", "1")
    before = server.row("c")
    with pytest.raises(StoreRefused, match=r"memory of the Redis server of CACHES\['lock'\].*is full \(maxmemory\)"):
        server.claim(c, now=THREE)
    assert server.row("c") == before
    assert server.claim(now=THREE) == [], "and nothing is waited for"
    minute_later = THREE + 2 * MINUTE
    assert server.lock.look(server.declared, now=minute_later).known is True
    assert server.renew(first, both, now=minute_later) == [True, True]
    assert server.skip(THREE, task=tasks[3], now=minute_later, reason="missed") is not None
    assert server.release(first, both, now=minute_later) == [True, True]
    assert [cleanup.owner for cleanup in server.reap(minute_later)] == [second.owner]
    cache_store.server.call("CONFIG", "SET", "maxmemory", "0")
    assert len(server.claim(c, now=minute_later)) == 1


@everywhere
def test_an_owner_comes_back_although_the_memory_is_full(web1: Server, web2: Server, cache_store: CacheStore) -> None:
    claim = web1.must_run(THREE)
    with_it = cache_store.server
    with_it.call("HSET", key(cache_store, "row:shop.refresh"), "owner", "", "hold", str(int(1e16)))
    with_it.call("CONFIG", "SET", "maxmemory", "1")
    assert web1.renew(claim, now=THREE + SECOND) == [True]
    assert web2.row().owner == claim.owner


# -- replicas, clusters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["django-redis", "redis6", "valkey"])
def test_a_replica_is_refused_however_healthy_it_looks(kind: str, notes: Notes) -> None:
    if caches.missing(kind):
        pytest.skip(caches.missing(kind))
    name = caches.WAYS[kind].server
    with servers.start(name) as primary:
        with caches.in_use(caches.of(kind, primary)):
            lock = RedisLock("default", {"cache": "lock"})
            lock.sync(declare(), now=THREE - DAY)
            web1 = Server(lock, notes, a_task())
            web1.sync(HALF_PAST_TWO)
            claim = web1.must_run(THREE)
            lock.close()
        with servers.start(name, replica_of=primary) as replica, caches.in_use(caches.of(kind, replica)):
            lock = RedisLock("default", {"cache": "lock"})
            web1.lock = lock
            for read_only in ("yes", "no"):
                replica.call("CONFIG", "SET", "replica-read-only", read_only)
                assert web1.row().owner == claim.owner, "it has the data"
                for call in (
                    lambda: lock.look(web1.declared, now=THREE),
                    lambda: lock.sync(web1.declared, now=THREE),
                    lambda: web1.claim(server_occurrence(web1, "shop.refresh"), now=THREE + HOUR),
                    lambda: web1.reap(THREE + HOUR),
                ):
                    with pytest.raises(StoreRefused, match=r"needs the primary.*CACHES\['lock'\].*read-only") as it:
                        call()
                    assert replica.password not in str(it.value)
                    assert str(replica.port) in str(it.value)
            lock.close()


@pytest.mark.parametrize("kind", ["django-redis", "valkey"])
def test_in_a_cluster_the_lock_goes_where_its_keys_are(kind: str, notes: Notes) -> None:
    if caches.missing(kind):
        pytest.skip(caches.missing(kind))
    with servers.cluster(caches.WAYS[kind].server, nodes=2) as nodes:
        slot = nodes[0].call("CLUSTER", "KEYSLOT", "{default}")
        home, other = nodes if slot < 8192 else nodes[::-1]
        with caches.in_use(caches.of(kind, other)):
            lock = RedisLock("default", {"cache": "lock"})
            lock.sync(declare(), now=THREE - DAY)
            assert lock._line._connection.port == home.port
            asked = other.call("INFO", "commandstats")
            web1 = Server(lock, notes, a_task(), a_task("shop.x", overlap="allow"))
            web1.sync(HALF_PAST_TWO)
            claims = web1.claim(*(web1.occurrence(THREE, task) for task in web1.declared.tasks.values()), now=THREE)
            assert web1.renew(*claims, now=THREE + SECOND) == [True, True]
            assert web1.release(claims[0], now=THREE + SECOND) == [True]
            assert len(web1.reap(THREE + MINUTE)) == 1
            assert stat(other.call("INFO", "commandstats"), "evalsha") == stat(asked, "evalsha"), "asked once"
            assert len(home.call("CLUSTER", "GETKEYSINSLOT", slot, 100)) == home.call("DBSIZE") > 5
            home.call("CLUSTER", "SETSLOT", slot, "MIGRATING", other.call("CLUSTER", "MYID"))
            with pytest.raises(StoreRefused, match="cluster of the lock 'default' is being changed"):
                lock.look(web1.declared, now=THREE)
            home.call("CLUSTER", "SETSLOT", slot, "STABLE")
            assert lock.look(web1.declared, now=THREE).known is True
            for node in nodes:
                node.call("CLUSTER", "DELSLOTS", slot)
            with pytest.raises(StoreRefused, match="cluster of the lock 'default' is being changed, or is down"):
                lock.look(web1.declared, now=THREE)
            lock.close()


def stat(info: str, command: str) -> str:
    return next((line.partition(",")[0] for line in info.splitlines() if line.startswith(f"cmdstat_{command}:")), "")


@contextmanager
def sentinel(primary: servers.Server, folder: Path) -> Iterator[int]:
    """Watch over this primary as "shop"; return the port of the sentinel."""
    binary = servers.KINDS[primary.name].find("redis-server")
    assert binary is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = folder / "sentinel.conf"
    settings.write_text(
        f"bind 127.0.0.1\nport {port}\ndir {folder}\nlogfile {folder / 'log'}\n"
        f"sentinel monitor shop 127.0.0.1 {primary.port} 1\nsentinel auth-pass shop {primary.password}\n"
        "sentinel down-after-milliseconds shop 60000\nsentinel failover-timeout shop 3000\n"
    )
    process = subprocess.Popen([binary, str(settings), "--sentinel"])
    try:
        servers.wait_for(lambda: is_open(port), "the sentinel answers")
        # It looks every ten seconds, and lets a primary that was away keep its role for eight.
        assert ask(port, "SENTINEL DEBUG INFO-PERIOD 200 PUBLISH-PERIOD 200")
        yield port
    finally:
        process.kill()
        process.wait()


def is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(bool(caches.missing("django-redis")), reason=caches.missing("django-redis"))
def test_sentinels_name_the_primary_and_a_promoted_replica_is_noticed(notes: Notes, tmp_path: Path) -> None:
    with (
        servers.start("redis") as primary,
        servers.start("redis", password=primary.password, replica_of=primary) as replica,
        sentinel(primary, tmp_path) as port,
    ):
        options = {
            "CONNECTION_FACTORY": "django_redis.pool.SentinelConnectionFactory",
            "SENTINELS": [("127.0.0.1", port)],
            "PASSWORD": primary.password,
        }
        with caches.in_use(caches.of("django-redis", primary, LOCATION="redis://shop/0", OPTIONS=options)):
            lock = RedisLock("default", {"cache": "lock", "timeout": 1.5})
            lock.sync(declare(), now=THREE - DAY)
            web1 = Server(lock, notes, a_task())
            web1.sync(HALF_PAST_TWO)
            claim = web1.must_run(THREE)
            connection = lock._line._connection
            assert (connection.port, connection.socket_timeout) == (primary.port, 1.5)
            assert primary.call("WAIT", 1, 10_000) == 1, "the replica has all of it"
            servers.wait_for(lambda: promote(port), "the sentinel knows the replica")
            servers.wait_for(lambda: "role:slave" in primary.call("INFO", "replication"), "the old primary follows")
            assert lock.look(web1.declared, now=THREE + SECOND).known is False
            assert lock._line._connection.port == replica.port
            assert list(lock.sync(web1.declared, now=THREE + SECOND).lost) == ["shop.refresh"]
            assert web1.renew(claim, now=THREE + 2 * SECOND) == [True]
            lock.close()


def promote(port: int) -> bool:
    """Ask the sentinel to make the replica the primary; False while it cannot."""
    return ask(port, "SENTINEL FAILOVER shop")


def ask(port: int, command: str) -> bool:
    """Give the sentinel this command; False when it refuses."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(f"{command}\r\n".encode())
        return connection.recv(100).startswith(b"+OK")


# -- in the middle of runs --------------------------------------------------------------------------------------------


@on("django-redis")
def test_a_flush_in_the_middle_of_many_runs_starts_nothing_twice(
    new_lock: Callable[..., RedisLock], notes: Notes, cache_store: CacheStore
) -> None:
    """By the server's clock and at full speed: every owner comes back, and none of the tasks is claimed meanwhile."""
    lease = 2 * SECOND
    tasks = [a_task(f"t{i}", lease=lease) for i in range(20)]
    web1, web2 = (Server(new_lock(), notes, *tasks, name=name) for name in ("web1", "web2"))
    cache_store.server.call("FLUSHALL")
    web1.lock.sync(declare(), now=datetime.now(timezone.utc) - DAY)
    web1.sync(datetime.now(timezone.utc) - DAY)
    now = datetime.now(timezone.utc)
    asked = [web1.occurrence(now - MINUTE, task, lease=lease) for task in tasks]
    claims = web1.lock.claim(asked, server="web1", record=notes.started)
    assert len(claims) == 20
    cache_store.server.call("FLUSHALL")
    stop = threading.Event()
    stolen: list[Any] = []

    def take() -> None:
        while not stop.is_set():
            if not web2.lock.look(web2.declared).known:
                web2.lock.sync(web2.declared)
            manual = [web2.occurrence(datetime.now(timezone.utc), task, trigger="manual") for task in tasks]
            stolen.extend(web2.lock.claim(manual, server="web2", record=notes.started))
            stolen.extend(web2.lock.reap(server="web2", record=notes.cleaned))

    taker = threading.Thread(target=take)
    taker.start()
    try:
        for _ in range(8):
            time.sleep(0.4)
            assert web1.lock.renew(claims) == {claim.owner for claim in claims}
    finally:
        stop.set()
        taker.join()
    assert stolen == []
