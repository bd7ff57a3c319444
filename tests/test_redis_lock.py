"""The Redis lock: the contract on each server and by each backend, and what is its own."""

from __future__ import annotations

import dataclasses
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import redis
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from multiserver_schedule.cron import Cron, Every
from multiserver_schedule.entries import Claim, Cleanup, Occurrence, Outcome, ReleasedClaim, ScheduledTask, Skip
from multiserver_schedule.exceptions import StoreRefused
from multiserver_schedule.locks.base import Before
from multiserver_schedule.locks.redis import RedisLock
from multiserver_schedule.testing.contract import (
    AHEAD,
    BREAK,
    DAY,
    HOUR,
    HOURLY,
    LEASE,
    MINUTE,
    REACH,
    SECOND,
    SUCCEEDED,
    THREE,
    LockContract,
    Notes,
    Server,
    a_task,
    declare,
)

from . import caches, servers
from .caches import CacheStore

WAYS = [name for name, way in caches.WAYS.items() if way.kind == "redis"]
HALF_PAST_TWO = THREE - HOUR / 2


def on(*names: str) -> pytest.MarkDecorator:
    """Run on these of the caches alone."""
    params = [
        pytest.param(
            name, marks=pytest.mark.skipif(bool(caches.missing(name)), reason=f"{name}: {caches.missing(name)}")
        )
        for name in names
    ]
    return pytest.mark.parametrize("cache_store", params, indirect=True)


everywhere = on(*WAYS)


@pytest.fixture
def lock(cache_store: CacheStore) -> Iterator[RedisLock]:
    """Return the lock on a store that was emptied long ago."""
    lock = RedisLock("default", {"cache": "lock"})
    lock.sync(declare(), now=THREE - 10 * DAY)
    yield lock
    lock.close()


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def web1(lock: RedisLock, notes: Notes) -> Server:
    server = Server(lock, notes, a_task())
    server.sync(HALF_PAST_TWO)
    return server


@pytest.fixture
def web2(web1: Server, notes: Notes) -> Iterator[Server]:
    """Return another server, with a connection of its own."""
    lock = RedisLock("default", {"cache": "lock"})
    yield Server(lock, notes, a_task(), name="web2")
    lock.close()


@everywhere
class TestRedisLock(LockContract):
    """The facts of every lock, on Redis 6 and 7 and Valkey, by django-redis and by Django's own backend."""

    @pytest.fixture
    def lock(self, cache_store: CacheStore) -> Iterator[RedisLock]:
        lock = RedisLock("default", {"cache": "lock"})
        lock.sync(declare(), now=THREE - 10 * DAY)
        yield lock
        lock.close()


def key(store: CacheStore, name: str, lock: str = "default") -> str:
    """Return the key as it must be in the server: by the alias's prefix and version."""
    return f"project:7:multiserver_schedule:{{{lock}}}:{name}"


def field(store: CacheStore, name: str, field: str) -> Any:
    return store.server.call("HGET", key(store, name), field)


def delete(store: CacheStore, *names: str) -> None:
    assert store.server.call("DEL", *(key(store, name) for name in names)) == len(names)


# -- by the server's own clock ----------------------------------------------------------------------------------------


@everywhere
def test_a_day_by_the_servers_own_clock(cache_store: CacheStore, notes: Notes) -> None:
    """Do everything once by the clock of Redis, and see that it agrees with ours."""
    lock = RedisLock("default", {"cache": "lock"})
    lock.sync(declare(), now=datetime.now(timezone.utc) - DAY)
    tasks = a_task(), a_task("shop.both", overlap="allow")
    web1, web2 = (Server(lock, notes, *tasks, name=name) for name in ("web1", "web2"))
    began = datetime.now(timezone.utc)
    due, later = began - MINUTE, began - 30 * SECOND
    web1.sync(began - HOUR)
    assert lock.look(web1.declared).known is True
    assert abs(lock.clock() - began) < 20 * SECOND
    once, both = (web1.occurrence(due, task) for task in web1.declared.tasks.values())
    claims = lock.claim([once, both], server="web1", record=notes.started, slots=4)
    assert [claim.occurrence for claim in claims] == [once, both]
    for claim in claims:
        assert abs(claim.acquired_at - began) < 20 * SECOND
        assert claim.expires_at - claim.acquired_at == LEASE
    assert lock.claim([once, both], server="web2", record=notes.started) == []
    assert lock.renew(claims) == {claim.owner for claim in claims}
    skip = Skip(occurrence=web2.occurrence(later), reason="held")
    assert [given.holder for given in lock.skip([skip], record=notes.skipped)] == ["web1"]
    assert lock.look(web1.declared).expired is False
    assert lock.reap(server="web2", record=notes.cleaned) == []
    released = [ReleasedClaim(claim=claim, outcome=SUCCEEDED, min_break=BREAK) for claim in claims]
    assert lock.release(released, record=notes.finished) == [True, True]
    row = web1.row()
    assert row.owner is None
    assert abs(row.not_before - began - BREAK) < 20 * SECOND
    lock.close()


@everywhere
def test_the_fence_is_the_time_so_that_it_rises_even_after_a_loss(web1: Server, cache_store: CacheStore) -> None:
    first = web1.must_run(THREE)
    assert first.fence >= int(THREE.timestamp()) * 1_000_000
    web1.release(first, now=THREE + SECOND)
    cache_store.server.call("FLUSHALL")
    web1.sync(THREE + MINUTE)
    assert web1.must_run(THREE + HOUR).fence > first.fence


# -- where its keys are -----------------------------------------------------------------------------------------------


@everywhere
def test_all_keys_have_the_aliases_prefix_and_version_and_one_hash_tag(web1: Server, cache_store: CacheStore) -> None:
    task = a_task("shop.both", overlap="allow")
    server = Server(web1.lock, web1.notes, a_task(), task)
    server.sync(HALF_PAST_TWO)
    claims = server.claim(*(server.occurrence(THREE, t) for t in server.declared.tasks.values()), now=THREE)
    server.reap(THREE + MINUTE)
    server.release(*claims, now=THREE + MINUTE)
    keys = cache_store.server.call("KEYS", "*")
    assert len(keys) > 5
    assert [k for k in keys if not k.startswith("project:7:multiserver_schedule:{default}:")] == []


@on("django-redis", "django-rediscache")
def test_two_locks_on_one_cache_never_meet(web1: Server, lock: RedisLock, notes: Notes) -> None:
    other = Server(RedisLock("other", {"cache": "lock"}), notes, a_task())
    other.sync(THREE - 2 * HOUR)
    claim = other.must_run(THREE)
    assert web1.row().owner is None
    assert web1.run(THREE) is not None
    assert other.row().owner == claim.owner
    other.lock.close()


def backwards(name: str, prefix: str, version: int) -> str:
    return f"{version}/{prefix}/{name}"


@on("django-redis", "django-rediscache")
def test_a_key_function_of_the_project_is_honoured(cache_store: CacheStore) -> None:
    entry = {**cache_store.django_settings, "KEY_FUNCTION": "tests.test_redis_lock.backwards"}
    with override_settings(CACHES={"default": caches.LOCMEM, "lock": entry}):
        lock = RedisLock("default", {"cache": "lock"})
        lock.sync(declare(a_task()), now=THREE)
        lock.close()
    assert "7/project/multiserver_schedule:{default}:state" in cache_store.server.call("KEYS", "*")


# -- options ----------------------------------------------------------------------------------------------------------


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ImproperlyConfigured, match=r"no option 'cahce'.*cache, timeout, using"):
        RedisLock("default", {"cahce": "lock"})


@pytest.mark.parametrize("timeout", [0, -1, "3", None, True])
def test_a_time_limit_that_is_none_is_refused(timeout: object) -> None:
    with pytest.raises(ImproperlyConfigured, match="'timeout' of the lock 'default'"):
        RedisLock("default", {"timeout": timeout})


def test_a_cache_that_is_no_redis_is_refused() -> None:
    with (
        override_settings(CACHES={"default": caches.LOCMEM}),
        pytest.raises(ImproperlyConfigured, match=r"'default' needs Redis or Valkey.*LocMemCache.*django_redis"),
    ):
        RedisLock("default", {})


def test_a_cache_that_is_not_there_is_refused() -> None:
    with pytest.raises(ImproperlyConfigured, match="'default' cannot use the cache 'nowhere'"):
        RedisLock("default", {"cache": "nowhere"})


@on("django-redis")
def test_the_history_is_in_the_database_that_is_named(cache_store: CacheStore) -> None:
    assert RedisLock("default", {"cache": "lock"}).using == "default"
    assert RedisLock("default", {"cache": "lock", "using": "other"}).using == "other"
    assert RedisLock.transactional is False


# -- the connection ---------------------------------------------------------------------------------------------------


def connected(store: CacheStore) -> redis.connection.Connection:
    lock = RedisLock("default", {"cache": "lock", "timeout": 1.5})
    lock.clock()
    connection = lock._line._connection
    lock.close()
    return connection


@on("django-redis", "django-rediscache")
@pytest.mark.parametrize("options", [{}, {"retry_on_timeout": True, "health_check_interval": 5, "socket_timeout": 60}])
def test_no_call_lasts_longer_than_it_was_given_and_nothing_is_sent_in_secret(
    cache_store: CacheStore, options: dict[str, Any]
) -> None:
    given = {"CONNECTION_POOL_KWARGS": options} if cache_store.name == "django-redis" else options
    with caches.in_use(caches.of(cache_store.name, cache_store.server, OPTIONS=given)) as store:
        connection = connected(store)
        assert (connection.socket_timeout, connection.socket_connect_timeout) == (1.5, 1.5)
        assert connection.retry_on_error == []
        assert connection.retry._retries == 0
        assert connection.health_check_interval == 0


@on("django-redis", "django-rediscache")
@pytest.mark.parametrize(
    "options", [{"decode_responses": True}, {"protocol": 3}, {"protocol": 2}, {"db": 3}, {"encoding": "latin-1"}]
)
def test_whatever_the_alias_says_of_its_connections_the_lock_works(
    cache_store: CacheStore, notes: Notes, options: dict[str, Any]
) -> None:
    given = {"CONNECTION_POOL_KWARGS": options} if cache_store.name == "django-redis" else options
    location = cache_store.server.url.removesuffix("/0") if "db" in options else cache_store.server.url
    with caches.in_use(caches.of(cache_store.name, cache_store.server, OPTIONS=given, LOCATION=location)):
        lock = RedisLock("default", {"cache": "lock"})
        lock.sync(declare(), now=THREE - DAY)
        server = Server(lock, notes, a_task("shop.zähler"), name="wëb")
        server.sync(HALF_PAST_TWO)
        claim = server.must_run(THREE)
        assert server.row("shop.zähler").server == "wëb"
        assert server.due(THREE + HOUR) == ["shop.zähler"]
        assert server.release(claim, now=THREE + SECOND) == [True]
        lock.close()


@on("django-redis", "django-rediscache")
def test_of_several_servers_the_first_is_the_primary(cache_store: CacheStore) -> None:
    for location in (
        f"{cache_store.server.url},redis://127.0.0.1:1/0",
        [cache_store.server.url, "redis://127.0.0.1:1"],
    ):
        with caches.in_use(caches.of(cache_store.name, cache_store.server, LOCATION=location)):
            assert RedisLock("default", {"cache": "lock"}).clock()


@on("django-redis", "django-rediscache")
def test_a_unix_socket_will_do(cache_store: CacheStore) -> None:
    path = str(cache_store.server.folder / "lock.sock")
    cache_store.server.restart(unixsocket=path, unixsocketperm="777")
    with caches.in_use(
        caches.of(cache_store.name, cache_store.server, LOCATION=f"unix://:{cache_store.server.password}@{path}?db=0")
    ):
        lock = RedisLock("default", {"cache": "lock"})
        assert lock.clock()
        assert type(lock._line._connection).__name__ == "UnixDomainSocketConnection"
        lock.close()


@on("django-redis", "django-rediscache")
def test_a_connection_that_the_server_has_closed_is_opened_again(web1: Server, cache_store: CacheStore) -> None:
    claim = web1.must_run(THREE)
    for _ in range(3):
        cache_store.server.call("CLIENT", "KILL", "TYPE", "normal")
        assert web1.renew(claim, now=THREE + SECOND) == [True]
        cache_store.server.call("CLIENT", "KILL", "TYPE", "normal")
        assert web1.due(THREE) == []


@on("django-redis")
def test_a_fork_opens_a_connection_of_its_own(web1: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    web1.due(THREE)
    mine = web1.lock._line._connection
    monkeypatch.setattr("multiserver_schedule.locks.redis.line.os.getpid", lambda: 1)
    web1.due(THREE)
    assert web1.lock._line._connection is not mine
    assert mine._sock is not None, "the other process goes on using it"
    mine.disconnect()


class Monitor:
    """What clients send to a server, each command one line; what a script does is left out."""

    def __init__(self, server: servers.Server) -> None:
        self.server = server
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        self.socket.sendall(f"AUTH {server.password}\r\nMONITOR\r\n".encode())
        self.lines = self.socket.makefile("r", errors="replace")
        assert [self.lines.readline().strip() for _ in range(2)] == ["+OK", "+OK"]
        self.marks = 0

    def commands(self) -> list[str]:
        """Return the commands since the last call."""
        self.marks += 1
        self.server.call("PING", f"mark-{self.marks}")
        found = []
        while True:
            line = self.lines.readline()
            if f"mark-{self.marks}" in line:
                break
            word = line.split('"')[1]
            if " lua] " not in line and word.upper() not in ("AUTH", "CLIENT", "SELECT", "HELLO"):
                found.append(word)
        return found

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


@pytest.fixture
def monitor(cache_store: CacheStore) -> Iterator[Monitor]:
    monitor = Monitor(cache_store.server)
    yield monitor
    monitor.close()


@everywhere
def test_each_step_is_one_round_trip_whatever_the_number_of_tasks(
    lock: RedisLock, notes: Notes, monitor: Monitor
) -> None:
    server = Server(lock, notes, *(a_task(f"t{i}") for i in range(1000)))
    server.sync(HALF_PAST_TWO)
    monitor.commands()
    assert len(lock.look(server.declared, now=HALF_PAST_TWO + 2 * MINUTE).due) == 0
    assert monitor.commands() == ["EVALSHA"], "an idle look, which also refreshes seen_at"
    look = lock.look(server.declared, now=THREE)
    assert len(look.due) == 1000
    occurrences = [server_occurrence(server, row.task) for row in look.due]
    monitor.commands()
    lock.look(server.declared, now=THREE)
    claims = lock.claim(occurrences, server="web1", slots=1000, record=notes.started, now=THREE)
    assert len(claims) == 1000
    assert monitor.commands() == ["EVALSHA", "EVALSHA"]
    assert len(lock.renew(claims, now=THREE + SECOND)) == 1000
    assert monitor.commands() == ["EVALSHA"]
    skips = [Skip(occurrence=dataclasses.replace(o, due_at=THREE + 2 * SECOND), reason="missed") for o in occurrences]
    assert len(lock.skip(skips, record=notes.skipped, now=THREE + 2 * SECOND)) == 1000
    assert monitor.commands() == ["EVALSHA"]
    server.release(*claims[:500], now=THREE + 2 * SECOND)
    assert monitor.commands() == ["EVALSHA"]
    assert len(server.reap(THREE + MINUTE)) == 500
    assert monitor.commands() == ["EVALSHA", "EVALSHA"], "one, and one to clear what is recorded"


def server_occurrence(server: Server, name: str) -> Occurrence:
    """Return the occurrence of three o'clock, without asking the store for the row."""
    task = server.declared.tasks[name]
    return Occurrence(task=task, row=name, pk=0, due_at=THREE, next_due_at=THREE + HOUR, lease=LEASE, min_break=BREAK)


@on("django-redis", "valkey")
def test_an_idle_look_costs_the_same_with_ten_thousand_tasks(lock: RedisLock, notes: Notes, monitor: Monitor) -> None:
    def took() -> float:
        times = []
        for _ in range(20):
            began = time.perf_counter()
            assert lock.look(server.declared, now=HALF_PAST_TWO + SECOND).known is True
            times.append(time.perf_counter() - began)
        return sorted(times)[10]

    server = Server(lock, notes, *(a_task(f"t{i}") for i in range(10)))
    server.sync(HALF_PAST_TWO)
    few = took()
    server = Server(lock, notes, *(a_task(f"t{i}") for i in range(10_000)))
    server.sync(HALF_PAST_TWO)
    monitor.commands()
    assert lock.look(server.declared, now=HALF_PAST_TWO).known is True
    assert monitor.commands() == ["EVALSHA"]
    assert took() < 5 * few + 0.002


# -- answers that are lost --------------------------------------------------------------------------------------------


@pytest.fixture
def deaf(web1: Server) -> Callable[..., None]:
    """Return what makes the next answers to a step get lost, after the server has done it."""

    def lose(step: str, times: int = 1, error: type[Exception] = redis.ConnectionError) -> None:
        line = web1.lock._line
        evaluate = line._eval
        left = [times]

        def lossy(connection: Any, asked: str, text: str) -> Any:
            answer = evaluate(connection, asked, text)
            if asked == step and left[0]:
                left[0] -= 1
                raise error("the answer was lost")
            return answer

        line._eval = lossy

    return lose


@everywhere
@pytest.mark.parametrize("error", [redis.ConnectionError, redis.TimeoutError])
def test_a_claim_whose_answer_was_lost_is_sent_again_and_won(
    web1: Server, web2: Server, notes: Notes, deaf: Callable[..., None], error: type[Exception]
) -> None:
    deaf("claim", 1, error)
    claim = web1.must_run(THREE)
    assert web1.row().owner == claim.owner
    assert web2.run(THREE) is None
    assert notes.claims == [claim]
    assert web1.claim(now=THREE) == []


@everywhere
def test_a_claim_that_is_sent_again_needs_no_second_slot(
    lock: RedisLock, notes: Notes, web1: Server, deaf: Callable[..., None]
) -> None:
    deaf("claim")
    occurrence = web1.occurrence(THREE)
    assert len(web1.claim(occurrence, now=THREE, slots=1)) == 1


@everywhere
@pytest.mark.parametrize("overlap", ["skip", "allow"])
def test_a_claim_whose_answer_never_came_is_settled_by_the_next(
    web1: Server, notes: Notes, deaf: Callable[..., None], overlap: Any
) -> None:
    server = Server(web1.lock, notes, a_task("shop.x", overlap=overlap))
    server.sync(HALF_PAST_TWO)
    deaf("claim", 2)
    with pytest.raises(redis.ConnectionError):
        server.run(THREE)
    assert notes.claims == []
    (claim,) = server.claim(now=THREE + SECOND)
    assert (claim.occurrence.due_at, claim.acquired_at, claim.expires_at) == (THREE, THREE, THREE + LEASE)
    assert notes.claims == [claim]
    assert server.renew(claim, now=THREE + 2 * SECOND) == [True]
    assert server.claim(now=THREE + SECOND) == []


@everywhere
def test_what_the_first_sending_of_a_claim_wins_after_the_second_is_settled_too(
    web1: Server, web2: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis may read what a broken connection brought after it has read what came by the new one."""
    line = web1.lock._line
    evaluate = line._eval
    delayed: list[str] = []

    def slow(connection: Any, step: str, text: str) -> Any:
        if step == "claim" and not delayed:
            delayed.append(text)
            raise redis.ConnectionError("the connection broke")
        return evaluate(connection, step, text)

    holder = web2.must_run(THREE - MINUTE, trigger="manual")
    monkeypatch.setattr(line, "_eval", slow)
    assert web1.run(THREE) is None
    web2.release(holder, now=THREE - 30 * SECOND)
    evaluate(line._connection, "claim", delayed[0])
    (claim,) = web1.claim(now=THREE + SECOND)
    assert web2.row().owner == claim.owner


@everywhere
def test_a_release_whose_answer_was_lost_is_recorded_when_it_is_sent_again(
    web1: Server, notes: Notes, deaf: Callable[..., None]
) -> None:
    claim = web1.must_run(THREE)
    deaf("release", 2)
    with pytest.raises(redis.ConnectionError):
        web1.release(claim, now=THREE + SECOND)
    assert notes.releases == []
    assert web1.release(claim, now=THREE + 2 * SECOND) == [True]
    assert [stood for _, stood in notes.releases] == [True]
    assert web1.release(claim, now=THREE + 2 * SECOND) == [True]
    assert len(notes.releases) == 1


@everywhere
def test_a_release_of_a_run_that_may_overlap_is_idempotent(web1: Server, notes: Notes) -> None:
    server = Server(web1.lock, notes, a_task("shop.x", overlap="allow"))
    server.sync(HALF_PAST_TWO)
    claim = server.must_run(THREE)
    assert server.release(claim, now=THREE + SECOND) == [True]
    assert server.release(claim, now=THREE + SECOND) == [True]
    assert len(notes.releases) == 1
    assert server.renew(claim, now=THREE + SECOND) == [False], "it does not come back after its release"


@everywhere
def test_a_skip_whose_answer_was_lost_is_recorded_once(web1: Server, notes: Notes, deaf: Callable[..., None]) -> None:
    deaf("skip")
    assert web1.skip(THREE, now=THREE + SECOND, reason="missed") is not None
    assert web1.skip(THREE, now=THREE + SECOND, reason="missed") is None
    assert len(notes.skips) == 1


@everywhere
def test_a_loss_is_reported_although_the_answer_to_the_sync_was_lost(
    web1: Server, cache_store: CacheStore, deaf: Callable[..., None]
) -> None:
    delete(cache_store, "row:shop.refresh")
    deaf("write")
    assert web1.lock.sync(web1.declared, now=THREE).lost == {"shop.refresh": None}


# -- runs that may overlap --------------------------------------------------------------------------------------------


@everywhere
def test_runs_that_may_overlap_have_leases_of_their_own(lock: RedisLock, notes: Notes) -> None:
    server = Server(lock, notes, a_task("shop.x", overlap="allow", limit=5 * MINUTE))
    server.sync(HALF_PAST_TWO)
    first = server.must_run(THREE)
    second = server.must_run(THREE + HOUR, now=THREE + 2 * HOUR)
    assert (first.finish_by, first.expires_at) == (THREE + 5 * MINUTE, THREE + LEASE)
    assert server.row("shop.x").owner is None
    now = THREE + 2 * HOUR
    assert server.renew(first, second, now=now + 20 * SECOND) == [True, True]
    assert server.claim(server.occurrence(now), now=now + 21 * SECOND, slots=2) == [], "both take a slot"
    assert lock.look(server.declared, now=now + 49 * SECOND).expired is False
    server.renew(second, now=now + 40 * SECOND)
    assert lock.look(server.declared, now=now + 51 * SECOND).expired is True
    (cleanup,) = server.reap(now + 51 * SECOND)
    assert (cleanup.owner, cleanup.task, cleanup.due_at, cleanup.fence) == (first.owner, "shop.x", THREE, first.fence)
    assert cleanup.expired_at == now + 50 * SECOND
    assert server.release(first, second, now=now + 52 * SECOND) == [False, True]


@everywhere
def test_a_row_that_is_named_twice_is_claimed_once_even_where_runs_may_overlap(lock: RedisLock, notes: Notes) -> None:
    server = Server(lock, notes, a_task(overlap="allow"))
    server.sync(HALF_PAST_TWO)
    twice = [server.occurrence(THREE - MINUTE), server.occurrence(THREE)]
    assert [claim.occurrence for claim in server.claim(*twice, now=THREE)] == twice[:1]


# -- clean-ups that are not recorded yet ------------------------------------------------------------------------------


@everywhere
def test_a_clean_up_that_could_not_be_recorded_is_offered_again_until_it_is(web1: Server, web2: Server) -> None:
    claim = web1.must_run(THREE)
    at = THREE + MINUTE
    (cleanup,) = web2.lock.reap(server="web2", record=lambda cleanups: [], now=at)
    assert (cleanup.owner, cleanup.pk) == (claim.owner, None)
    assert web1.row().owner is None
    assert web1.lock.look(web1.declared, now=at).expired is True

    def unable(cleanups: Sequence[Cleanup]) -> Sequence[Cleanup]:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        web2.lock.reap(server="web2", record=unable, now=at)
    offered: list[Cleanup] = []

    def written(cleanups: Sequence[Cleanup]) -> Sequence[Cleanup]:
        offered.extend(cleanups)
        return [dataclasses.replace(each, pk=9) for each in cleanups]

    assert web1.lock.reap(server="web1", record=written, now=at) == [], "another call freed it"
    assert offered == [cleanup]
    assert web1.lock.look(web1.declared, now=at).expired is False
    assert web1.lock.reap(server="web1", record=written, now=at) == []
    assert len(offered) == 1


@everywhere
def test_a_clean_up_is_returned_with_what_it_was_written_as(web1: Server) -> None:
    web1.must_run(THREE)
    cleanups = web1.lock.reap(
        server="web1", record=lambda given: [dataclasses.replace(each, pk=9) for each in given], now=THREE + MINUTE
    )
    assert [cleanup.pk for cleanup in cleanups] == [9]


@on("django-redis")
def test_more_dead_runs_than_one_step_takes_are_all_freed(
    lock: RedisLock, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiserver_schedule.locks.redis.lock.BATCH", 10)
    server = Server(lock, notes, *(a_task(f"t{i}") for i in range(25)))
    server.sync(HALF_PAST_TWO)
    server.claim(*(server.occurrence(THREE, task) for task in server.declared.tasks.values()), now=THREE)
    assert len(server.reap(THREE + MINUTE)) == 25
    assert len(notes.cleanups) == 25


# -- what is lost -----------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("gone", [("ends",), ("names",), ("due",), ("names", "due"), ("versions",)])
def test_an_index_that_is_lost_alone_costs_nothing(
    web1: Server, web2: Server, cache_store: CacheStore, gone: tuple[str, ...]
) -> None:
    claim = web1.must_run(THREE)
    at = THREE + SECOND
    delete(cache_store, *gone)
    if gone != ("ends",):
        assert web1.lock.look(web1.declared, now=at).known is False
    for server in (web1, web2):
        server.lock.sync(server.declared, now=at)
        assert server.lock.look(server.declared, now=at).known is True
    assert web1.row().owner == claim.owner
    assert web1.renew(claim, now=at) == [True]
    assert web2.run(THREE + HOUR, now=THREE + HOUR) is None
    assert [cleanup.owner for cleanup in web2.reap(THREE + HOUR)] == [claim.owner]
    assert web2.due(THREE + HOUR) == ["shop.refresh"]
    assert web2.run(THREE + HOUR) is not None


@everywhere
def test_a_dead_owner_is_found_by_its_due_row_when_the_set_of_ends_is_lost(
    web1: Server, web2: Server, cache_store: CacheStore
) -> None:
    claim = web1.must_run(THREE)
    delete(cache_store, "ends")
    assert web2.lock.look(web2.declared, now=THREE + HOUR).expired is True
    assert [cleanup.owner for cleanup in web2.reap(THREE + HOUR)] == [claim.owner]
    assert web2.lock.look(web2.declared, now=THREE + HOUR).expired is False


@everywhere
def test_a_renewal_puts_the_lost_end_of_its_lease_back(web1: Server, web2: Server, cache_store: CacheStore) -> None:
    claim = web1.must_run(THREE)
    delete(cache_store, "ends")
    web1.renew(claim, now=THREE + SECOND)
    assert web2.lock.look(web2.declared, now=THREE + SECOND + LEASE).expired is True


@everywhere
def test_a_run_that_may_overlap_survives_the_loss_of_its_end(
    lock: RedisLock, notes: Notes, cache_store: CacheStore
) -> None:
    server = Server(lock, notes, a_task("shop.x", overlap="allow"))
    server.sync(HALF_PAST_TWO)
    claim = server.must_run(THREE)
    delete(cache_store, "run_ends")
    assert lock.look(server.declared, now=THREE + SECOND).known is False
    assert lock.sync(server.declared, now=THREE + SECOND).lost == {}
    assert lock.look(server.declared, now=THREE + SECOND).known is True
    assert [cleanup.owner for cleanup in server.reap(THREE + MINUTE)] == [claim.owner]
    again = server.must_run(THREE + HOUR)
    delete(cache_store, "runs")
    assert server.renew(again, now=THREE + HOUR + SECOND) == [True]
    assert server.release(again, now=THREE + HOUR + SECOND) == [True]


@everywhere
def test_a_row_that_is_lost_is_noticed_reported_and_held_back_for_a_lease(
    lock: RedisLock, notes: Notes, cache_store: CacheStore
) -> None:
    server = Server(lock, notes, a_task("a"), a_task("b", lease=2 * MINUTE))
    server.sync(HALF_PAST_TWO)
    delete(cache_store, "row:a")
    assert server.claim(server_occurrence(server, "a"), now=THREE) == [], "a claim notices it, too"
    assert lock.look(server.declared, now=THREE - MINUTE).known is False
    at = THREE + MINUTE
    asked: list[list[str]] = []

    def elsewhere(names: Sequence[str]) -> Mapping[str, Before]:
        asked.append([*names])
        return {"a": Before(last_due_at=THREE - 5 * HOUR)}

    synced = lock.sync(server.declared, elsewhere=elsewhere, now=at)
    assert asked == [["a"]]
    assert synced.lost == {"a": THREE - 5 * HOUR}
    assert synced.trouble == "1 row of the lock was lost"
    assert (synced.registered, synced.changed) == ((), ())
    assert lock.look(server.declared, now=at).known is True
    row = server.row("a")
    assert (row.last_due_at, row.next_due_at, row.not_before) == (at, THREE + HOUR, at + 2 * MINUTE)
    assert server.run(at, trigger="manual", now=at + 2 * MINUTE - SECOND) is None
    assert server.run(at, trigger="manual", now=at + 2 * MINUTE) is not None
    assert server.row("b").not_before == HALF_PAST_TWO, "the others are not held up"


@everywhere
def test_what_is_due_without_a_row_is_noticed_by_the_look_alone(web1: Server, cache_store: CacheStore) -> None:
    delete(cache_store, "row:shop.refresh")
    assert web1.lock.look(web1.declared, now=THREE - MINUTE).known is True, "not before it is due, for the look's cost"
    assert web1.lock.look(web1.declared, now=THREE).known is False


@everywhere
def test_an_empty_store_is_no_loss_where_nobody_knows_of_any_row(web1: Server, cache_store: CacheStore) -> None:
    cache_store.server.call("FLUSHALL")
    at = THREE + SECOND
    assert web1.lock.look(web1.declared, now=at).known is False
    synced = web1.lock.sync(web1.declared, now=at)
    assert (synced.registered, synced.lost, synced.trouble) == (("shop.refresh",), {}, "")
    assert web1.row().not_before == at + LEASE, "yet it may be one"


@everywhere
def test_a_flush_is_noticed_and_the_live_owner_comes_back(
    web1: Server, web2: Server, notes: Notes, cache_store: CacheStore
) -> None:
    claim = web1.must_run(THREE)
    cache_store.server.call("FLUSHALL")
    at = THREE + 5 * SECOND
    assert web2.claim(server_occurrence(web2, "shop.refresh"), now=at) == []
    synced = web2.lock.sync(web2.declared, elsewhere=lambda names: {"shop.refresh": Before(last_due_at=THREE)}, now=at)
    assert synced.lost == {"shop.refresh": THREE}
    assert synced.trouble == "the Redis server was emptied"
    assert web2.run(at, trigger="manual", now=at + SECOND) is None
    assert web1.renew(claim, now=THREE + 10 * SECOND) == [True]
    row = web2.row()
    assert (row.owner, row.server, row.fence) == (claim.owner, "web1", claim.fence)
    assert (row.acquired_at, row.expires_at) == (THREE, THREE + 10 * SECOND + LEASE)
    assert row.last_due_at == at
    assert web2.run(at, trigger="manual", now=at + LEASE) is None, "it holds it, after the hold too"
    assert web1.release(claim, now=at + LEASE) == [True]
    assert [stood for _, stood in notes.releases] == [True]


@everywhere
def test_how_long_an_owner_may_come_back_counts_from_its_last_renewal(
    web1: Server, web2: Server, cache_store: CacheStore
) -> None:
    claim = web1.must_run(THREE)
    web1.renew(claim, now=THREE + 20 * SECOND)
    cache_store.server.call("FLUSHALL")
    web2.sync(THREE + 25 * SECOND)
    assert web1.renew(claim, now=THREE + 49 * SECOND) == [True]
    assert web2.row().owner == claim.owner


@everywhere
def test_a_live_owner_comes_back_before_anybody_has_noticed(
    web1: Server, web2: Server, cache_store: CacheStore
) -> None:
    claim = web1.must_run(THREE)
    cache_store.server.call("FLUSHALL")
    at = THREE + 10 * SECOND
    assert web1.renew(claim, now=at) == [True]
    assert web2.lock.look(web2.declared, now=at).known is False
    synced = web2.lock.sync(web2.declared, now=at)
    assert synced.lost == {"shop.refresh": THREE}
    assert web2.row().owner == claim.owner
    assert web2.run(THREE + HOUR, now=THREE + HOUR) is None
    assert web1.renew(claim, now=at + SECOND) == [True]
    assert web2.lock.look(web2.declared, now=at + SECOND).known is True


@everywhere
def test_a_run_that_ends_after_a_flush_is_released_as_its_owners(
    web1: Server, web2: Server, notes: Notes, cache_store: CacheStore
) -> None:
    claim = web1.must_run(THREE)
    cache_store.server.call("FLUSHALL")
    web2.sync(THREE + SECOND)
    assert web1.release(claim, now=THREE + 2 * SECOND) == [True]
    assert web2.row().owner is None
    assert [stood for _, stood in notes.releases] == [True]


@everywhere
@pytest.mark.parametrize("overlap", ["skip", "allow"])
def test_an_owner_whose_lease_is_over_does_not_come_back(
    lock: RedisLock, notes: Notes, cache_store: CacheStore, overlap: Any
) -> None:
    server = Server(lock, notes, a_task(overlap=overlap))
    server.sync(HALF_PAST_TWO)
    claim = server.must_run(THREE)
    cache_store.server.call("FLUSHALL")
    server.sync(THREE + LEASE - SECOND)
    assert server.renew(claim, now=THREE + LEASE) == [False]
    assert server.release(claim, now=THREE + LEASE) == [False]


@everywhere
def test_an_owner_that_comes_back_after_the_hold_is_too_late(
    web1: Server, web2: Server, cache_store: CacheStore
) -> None:
    """Its lease was put off by a renewal that it alone remembers: whoever claims after the hold is not overlapped."""
    claim = web1.must_run(THREE, lease=MINUTE)
    cache_store.server.call("FLUSHALL")
    web2.sync(THREE + SECOND)
    after = THREE + SECOND + LEASE
    assert web1.renew(claim, now=after) == [False]


@everywhere
@pytest.mark.parametrize("overlap", ["skip", "allow"])
def test_an_owner_that_was_stopped_before_it_could_come_back_does_not(
    lock: RedisLock, notes: Notes, cache_store: CacheStore, monkeypatch: pytest.MonkeyPatch, overlap: Any
) -> None:
    server = Server(lock, notes, a_task(overlap=overlap))
    server.sync(HALF_PAST_TWO)
    claim = server.must_run(THREE)
    cache_store.server.call("FLUSHALL")
    server.sync(THREE + SECOND)
    call = lock._line.call

    def stopped(step: str, **given: Any) -> Any:
        if step == "come_back":
            given["now"] = str(int((THREE + LEASE).timestamp()) * 1_000_000)
        return call(step, **given)

    monkeypatch.setattr(lock._line, "call", stopped)
    assert server.renew(claim, now=THREE + LEASE - SECOND) == [False]


@everywhere
def test_no_owner_comes_back_to_a_row_that_was_taken_from_it(
    web1: Server, web2: Server, cache_store: CacheStore
) -> None:
    claim = web1.must_run(THREE)
    web1.lock.free("shop.refresh", server="web2", record=lambda given: given, now=THREE + SECOND)
    cache_store.server.call("HSET", key(cache_store, "row:shop.refresh"), "hold", str(int(1e16)))
    assert web1.renew(claim, now=THREE + 2 * SECOND) == [False]


@everywhere
def test_a_store_that_was_flushed_long_after_a_task_had_moved_here_does_not_go_back(
    lock: RedisLock, notes: Notes
) -> None:
    server = Server(lock, notes, a_task())
    server.sync(HALF_PAST_TWO)
    theirs = dataclasses.replace(server.row(), task="shop.more", last_due_at=THREE - DAY)
    newer = Server(lock, notes, a_task(), a_task("shop.more"))
    known = Before(row=theirs, store="default", last_due_at=THREE - HOUR)
    synced = lock.sync(newer.declared, elsewhere=lambda names: {"shop.more": known}, now=THREE + SECOND)
    assert synced.lost == {"shop.more": THREE - HOUR}
    assert newer.row("shop.more").last_due_at == THREE + SECOND


@everywhere
def test_a_loss_is_repaired_by_the_version_whose_schedule_holds(
    lock: RedisLock, notes: Notes, cache_store: CacheStore
) -> None:
    """The older version notices it first, and knows neither the new schedule nor the new task."""
    older = Server(lock, notes, a_task("a"))
    older.sync(HALF_PAST_TWO)
    newer = Server(lock, notes, a_task("a", Cron("30 * * * *", "UTC")), a_task("b"), name="web2")
    newer.sync(HALF_PAST_TWO + MINUTE)
    delete(cache_store, "row:a", "row:b")
    delete(cache_store, "due")
    at = HALF_PAST_TWO + 2 * MINUTE
    assert older.lock.sync(older.declared, now=at).lost == {"a": None, "b": None}
    assert lock.look(older.declared, now=at).known is True
    assert older.claim(server_occurrence(older, "a"), now=THREE + MINUTE) == []
    assert lock.look(newer.declared, now=at).known is False
    synced = lock.sync(newer.declared, now=at + SECOND)
    assert (synced.lost, synced.registered) == ({}, ())
    assert lock.look(newer.declared, now=at + SECOND).known is True
    assert lock.look(older.declared, now=at + SECOND).known is True, "and nobody is told for ever"
    a, b = newer.row("a"), newer.row("b")
    assert (a.fingerprint, a.next_due_at) == (newer.declared.tasks["a"].fingerprint, THREE + HOUR / 2)
    assert (b.fingerprint, b.next_due_at) == (newer.declared.tasks["b"].fingerprint, THREE)
    assert newer.due(THREE) == ["b"]
    assert newer.claim(server_occurrence(newer, "b"), now=THREE) != []


@everywhere
def test_a_second_sync_after_a_loss_reports_nothing(web1: Server, web2: Server, cache_store: CacheStore) -> None:
    delete(cache_store, "row:shop.refresh")
    assert web1.lock.sync(web1.declared, now=THREE).lost == {"shop.refresh": None}
    assert web2.lock.sync(web2.declared, now=THREE).lost == {}
    delete(cache_store, "due")
    assert web2.lock.sync(web2.declared, now=THREE + SECOND).lost == {}


@everywhere
def test_a_sync_that_another_overtook_starts_again_and_only_one_reports_the_loss(
    web1: Server, web2: Server, cache_store: CacheStore
) -> None:
    delete(cache_store, "row:shop.refresh")
    other = []

    def elsewhere(names: Sequence[str]) -> Mapping[str, Before]:
        other.append(web2.lock.sync(web2.declared, now=THREE))
        return {}

    mine = web1.lock.sync(web1.declared, elsewhere=elsewhere, now=THREE + SECOND)
    assert [synced.lost for synced in other] == [{"shop.refresh": None}]
    assert mine.lost == {}
    assert web1.row().last_due_at == THREE


@everywhere
def test_of_two_versions_that_take_over_at_once_the_later_one_is_the_newest(
    lock: RedisLock, notes: Notes, web2: Server
) -> None:
    """With no row in common, nothing else tells them that they met."""
    mine, other = Server(lock, notes, a_task("a")), Server(web2.lock, notes, a_task("b"), name="web2")

    def elsewhere(names: Sequence[str]) -> Mapping[str, Before]:
        other.sync(THREE + SECOND)
        return {}

    lock.sync(mine.declared, elsewhere=elsewhere, now=THREE)
    for minute in range(1, 20, 4):
        assert lock.look(mine.declared, now=THREE + minute * MINUTE).known is True
    assert lock.look(other.declared, now=THREE + 19 * MINUTE).known is True


@everywhere
def test_a_sync_does_not_undo_what_was_claimed_while_it_computed(web1: Server, web2: Server, notes: Notes) -> None:
    newer = Server(web1.lock, notes, a_task(timetable=Every(5 * MINUTE)), a_task("shop.more"))
    claimed = []

    def elsewhere(names: Sequence[str]) -> Mapping[str, Before]:
        claimed.append(web2.run(THREE))
        return {}

    newer.lock.sync(newer.declared, elsewhere=elsewhere, now=THREE)
    (claim,) = claimed
    assert claim is not None
    row = newer.row()
    assert (row.last_due_at, row.owner, row.next_due_at) == (THREE, claim.owner, THREE + 5 * MINUTE)


@everywhere
def test_many_rows_are_read_and_written_in_steps(
    lock: RedisLock, notes: Notes, monkeypatch: pytest.MonkeyPatch, cache_store: CacheStore
) -> None:
    monkeypatch.setattr("multiserver_schedule.locks.redis.lock.BATCH", 7)
    server = Server(lock, notes, *(a_task(f"t{i:02}") for i in range(20)))
    assert len(server.sync(HALF_PAST_TWO)[0]) == 20
    assert len(lock.rows()) == 20
    delete(cache_store, "due")
    lock.sync(server.declared, now=HALF_PAST_TWO)
    assert len(server.due(THREE)) == 20


# -- paused and interrupted -------------------------------------------------------------------------------------------


@everywhere
def test_what_is_paused_is_neither_shown_nor_claimed_nor_skipped(
    web1: Server, notes: Notes, cache_store: CacheStore
) -> None:
    at = str(int(THREE.timestamp()) * 1_000_000)
    row = key(cache_store, "row:shop.refresh")
    cache_store.server.call("HSET", row, "paused_at", at)
    assert web1.due(THREE) == []
    assert web1.row().paused is True
    assert web1.run(THREE) is None
    assert web1.skip(THREE, now=THREE, reason="missed") is None
    manual = web1.must_run(THREE, trigger="manual")
    web1.release(manual, now=THREE)
    cache_store.server.call("HSET", row, "paused_at", "")
    state = key(cache_store, "state")
    cache_store.server.call("HSET", state, "paused_at", at, "interrupted_at", at)
    look = web1.lock.look(web1.declared, now=THREE)
    assert (look.paused, look.due, look.interrupted_at) == (True, (), THREE)
    assert web1.run(THREE, now=THREE + MINUTE) is None
    assert web1.skip(THREE, now=THREE, reason="missed") is None
    cache_store.server.call("HDEL", state, "paused_at")
    assert web1.run(THREE, now=THREE + MINUTE) is not None


# -- by hand, and from store to store ---------------------------------------------------------------------------------


@everywhere
def test_a_row_that_is_not_there_does_not_leave(web1: Server) -> None:
    assert [row.task for row in web1.lock.leave(["shop.refresh", "shop.nowhere"], to="other")] == ["shop.refresh"]
    web1.lock.arrive(["shop.nowhere"])
    assert web1.lock.rows(["shop.nowhere"]) == []


# -- servers that cannot do it ----------------------------------------------------------------------------------------


@on("django-redis", "valkey")
def test_a_user_who_may_not_do_what_the_lock_needs_is_named(cache_store: CacheStore) -> None:
    server = cache_store.server
    for missing in ("-eval -evalsha", "-info"):
        server.call("ACL", "SETUSER", "shop", "reset", "on", ">secret", "~*", "+@all", *missing.split())
        location = f"redis://shop:secret@127.0.0.1:{server.port}/0"
        with caches.in_use(caches.of(cache_store.name, server, LOCATION=location)):
            lock = RedisLock("default", {"cache": "lock"})
            with pytest.raises(StoreRefused, match=r"CACHES\['lock'\] may not do .*\+eval \+evalsha \+info"):
                lock.look(declare(), now=THREE)
            lock.close()
    server.call("ACL", "DELUSER", "shop")


@everywhere
def test_the_permissions_that_the_message_names_are_enough(cache_store: CacheStore, notes: Notes) -> None:
    server = cache_store.server
    rights = "+eval +evalsha +info +time +@hash +@sortedset +@set +del +client|setname".split()
    keys = "~project:7:multiserver_schedule:{default}:*"
    server.call("ACL", "SETUSER", "shop", "reset", "on", ">secret", keys, *rights)
    location = f"redis://shop:secret@127.0.0.1:{server.port}/0"
    with caches.in_use(caches.of(cache_store.name, server, LOCATION=location)):
        lock = RedisLock("default", {"cache": "lock"})
        lock.sync(declare(), now=THREE - DAY)
        own = a_task("shop.y", on_every_server=True)
        web1 = Server(lock, notes, a_task(), a_task("shop.x", overlap="allow"), own)
        web1.sync(HALF_PAST_TWO)
        claims = web1.claim(
            *(web1.occurrence(THREE, task) for task in (a_task(), web1.declared.tasks["shop.x"])), now=THREE
        )
        assert web1.renew(*claims, now=THREE) == [True, True]
        assert web1.release(claims[0], now=THREE) == [True]
        assert len(web1.reap(THREE + MINUTE)) == 1
        names = lock.pause([row.task for row in lock.rows()], now=THREE)
        assert lock.resume(names, following=hourly, now=THREE) == names
        assert lock.want(names[0], now=THREE) == THREE
        assert lock.set_right(dict.fromkeys(names, REACH), following=hourly, now=THREE - HOUR) == names
        assert lock.retire(names, now=THREE) == names
        assert lock.forget([name for name in names if "@" in name], now=THREE) == ["shop.y@web1"]
        lock.close()
    server.call("ACL", "DELUSER", "shop")


# -- versions that are gone, rows that are elsewhere ------------------------------------------------------------------


@everywhere
def test_versions_that_nobody_has_seen_for_a_month_are_forgotten(
    lock: RedisLock, notes: Notes, cache_store: CacheStore
) -> None:
    gone = Server(lock, notes, a_task(), a_task("shop.clear", on_every_server=True), name="gone")
    gone.sync(THREE - 40 * DAY)
    server = Server(lock, notes, a_task(timetable=Every(MINUTE)))
    server.sync(THREE)
    fields = cache_store.server.call("HKEYS", key(cache_store, "versions"))
    assert [each for each in fields if gone.declared.digest in each or "gone" in each] == []
    assert [each for each in fields if server.declared.digest in each] != []


@on("django-redis")
def test_a_restart_leaves_alone_what_another_store_has(web1: Server, cache_store: CacheStore) -> None:
    """What is due there is not to be lost when the task comes back."""
    web1.lock.leave(["shop.refresh"], to="other", now=THREE)
    cache_store.server.restart()
    assert web1.lock.sync(web1.declared, now=THREE + MINUTE).lost == {}
    assert (web1.row().last_due_at, web1.row().moved_to) == (HALF_PAST_TWO, "other")
    assert web1.lock.look(web1.declared, now=THREE + MINUTE).known is True


# -- what is owed, asked for and paused -------------------------------------------------------------------------------

FAILED = Outcome(status="failed", error="ValueError")
RERUN = a_task(rerun=True)


def hourly(name: str, after: datetime) -> datetime | None:
    return HOURLY.next(after)


def nobody_knows(name: str, after: datetime) -> datetime | None:
    return None


def fail(server: Server, claim: Claim, *, now: datetime, retry_in: timedelta = MINUTE) -> None:
    assert server.release(claim, now=now, outcome=FAILED, retry_in=retry_in) == [True]


def shop(lock: RedisLock, notes: Notes, *tasks: ScheduledTask) -> Server:
    server = Server(lock, notes, *tasks)
    server.sync(HALF_PAST_TWO)
    return server


def assert_indexed(store: CacheStore) -> None:
    """Compare each index with the rows themselves."""
    call = store.server.call
    rows = {}
    for found in call("KEYS", key(store, "row:*")):
        flat = call("HGETALL", found)
        rows[found.partition("row:")[2]] = dict(zip(flat[::2], flat[1::2], strict=True))

    def scores(name: str) -> dict[str, float]:
        flat = call("ZRANGE", key(store, name), "0", "-1", "WITHSCORES")
        return {each: float(score) for each, score in zip(flat[::2], flat[1::2], strict=True)}

    def first(row: dict[str, str]) -> float:
        times = [float(row[field]) for field in ("next", "retry", "wanted") if row.get(field)]
        return float("inf") if row.get("moved_to") else min(times, default=float("inf"))

    assert scores("due") == {name: first(row) for name, row in rows.items()}
    assert scores("ends") == {name: float(row["expires"]) for name, row in rows.items() if row.get("owner")}
    assert set(call("SMEMBERS", key(store, "names"))) == set(rows)
    assert int(field(store, "state", "rows")) == len(rows)


@everywhere
def test_each_index_agrees_with_the_rows_after_each_step(
    lock: RedisLock, notes: Notes, cache_store: CacheStore
) -> None:
    both = a_task("shop.both", overlap="allow")
    own = a_task("shop.clear", on_every_server=True)
    server = shop(lock, notes, a_task(rerun=True), both, own)
    refresh, shared, clear = (server.occurrence(THREE, task) for task in server.declared.tasks.values())
    names = [refresh.row, shared.row, clear.row]
    steps = iter(range(1000))

    def at() -> datetime:
        assert_indexed(cache_store)
        return THREE + next(steps) * SECOND

    claims = server.claim(refresh, shared, clear, now=at())
    assert len(claims) == 3
    for claim in claims:
        fail(server, claim, now=at())
    assert server.due(THREE + 2 * MINUTE) == names
    for name in names:
        assert lock.want(name, now=at()) is not None
    wanted = [
        dataclasses.replace(o, due_at=server.row(o.row).wanted_at, trigger="manual", requested=True)
        for o in (refresh, shared, clear)
    ]
    assert len(server.release(*server.claim(*wanted, now=at()), now=at())) == 3
    again = [dataclasses.replace(o, attempt=2) for o in (refresh, shared, clear)]
    assert len(server.claim(*again, now=THREE + 2 * MINUTE)) == 3
    assert len(server.reap(THREE + 3 * MINUTE)) == 3
    assert server.row().retry_at == THREE + 3 * MINUTE
    assert server.row("shop.both").retry_at is None, "what may overlap is not run again"
    assert lock.pause(names, now=at()) == sorted(names)
    assert lock.want(names[0], now=at()) is None
    assert lock.resume(names, following=hourly, now=at()) == sorted(names)
    assert lock.pause(None, now=at()) == []
    assert lock.resume(None, following=hourly, now=at()) == sorted(names)
    fourth = server.occurrence(THREE + HOUR)
    (held,) = server.claim(fourth, now=THREE + HOUR)
    assert lock.cancel({held.occurrence.row: held.owner}, now=at()) == [held.occurrence.row]
    assert server.skip(THREE + 2 * HOUR, now=THREE + 2 * HOUR, reason="missed") is not None
    assert lock.retire(names, now=at()) == [names[1], names[2]]
    assert lock.forget(names, now=at()) == [names[2]]
    lock.leave(names[:1], to="other", now=at())
    assert_indexed(cache_store)


@everywhere
def test_what_people_ask_for_is_one_round_trip_whatever_the_number_of_tasks(
    lock: RedisLock, notes: Notes, monitor: Monitor
) -> None:
    server = shop(lock, notes, *(a_task(f"t{i:03}", on_every_server=True) for i in range(1000)))
    occurrences = [
        dataclasses.replace(server_occurrence(server, name), row=f"{name}@web1") for name in server.declared.tasks
    ]
    names = [occurrence.row for occurrence in occurrences]
    claims = server.claim(*occurrences, now=THREE)
    monitor.commands()
    assert len(lock.cancel({claim.occurrence.row: claim.owner for claim in claims}, now=THREE)) == 1000
    assert monitor.commands() == ["EVALSHA"]
    assert lock.renew(claims, now=THREE + SECOND) == set()
    assert monitor.commands() == ["EVALSHA"], "and nobody asks whether they can come back"
    server.release(*claims, now=THREE + SECOND, outcome=FAILED, retry_in=SECOND)
    assert monitor.commands() == ["EVALSHA"]
    assert len(server.due(THREE + 2 * SECOND)) == 1000
    again = [dataclasses.replace(occurrence, attempt=2) for occurrence in occurrences]
    claims = server.claim(*again, now=THREE + 2 * SECOND)
    assert len(claims) == 1000
    assert monitor.commands() == ["EVALSHA", "EVALSHA"]
    server.release(*claims, now=THREE + 2 * SECOND)
    monitor.commands()
    assert lock.want(names[0], now=THREE + 3 * SECOND) == THREE + 3 * SECOND
    assert monitor.commands() == ["EVALSHA"]
    assert lock.pause(names, reason="audit", now=THREE + 4 * SECOND) == names
    assert monitor.commands() == ["EVALSHA"]
    assert lock.resume(names, following=hourly, now=THREE + 5 * SECOND) == names
    assert monitor.commands() == ["EVALSHA", "EVALSHA", "EVALSHA"], "the time, the rows, and what comes next for them"
    lock.pause(None, now=THREE + 4 * SECOND)
    assert monitor.commands() == ["EVALSHA"]
    assert lock.resume(None, following=hourly, now=THREE + 5 * SECOND) == names
    assert monitor.commands() == ["EVALSHA", "EVALSHA", "EVALSHA"]
    lock.interrupt(now=THREE + 6 * SECOND)
    assert lock.retire(names, now=THREE + 6 * SECOND) == names
    assert lock.forget(names, now=THREE + 6 * SECOND) == names
    assert monitor.commands() == ["EVALSHA", "EVALSHA", "EVALSHA"]


@everywhere
def test_a_row_of_an_older_release_is_read_and_goes_on(lock: RedisLock, notes: Notes, cache_store: CacheStore) -> None:
    server = shop(lock, notes, RERUN)
    new = "cancelled paused_reason attempt trigger rerun_up_to retry wanted asked".split()
    server.must_run(THREE)
    cache_store.server.call("HDEL", key(cache_store, "row:shop.refresh"), *new)
    row = server.row()
    assert (row.attempt, row.trigger, row.retry_at, row.wanted_at, row.cancelled) == (1, "schedule", None, None, False)
    assert lock.look(server.declared, now=THREE).known is True
    (cleanup,) = server.reap(THREE + MINUTE)
    assert cleanup.due_at == THREE
    assert server.row().retry_at is None, "it did not say that it is to be run again"
    cache_store.server.call("HDEL", key(cache_store, "row:shop.refresh"), *new)
    assert lock.want("shop.refresh", now=THREE + MINUTE) == THREE + MINUTE
    newer = Server(lock, notes, a_task(timetable=Every(5 * MINUTE)))
    cache_store.server.call("HDEL", key(cache_store, "row:shop.refresh"), *new)
    assert newer.sync(THREE + 2 * MINUTE)[1] == ["shop.refresh"]
    fail(newer, newer.must_run(THREE + 5 * MINUTE), now=THREE + 5 * MINUTE)
    assert newer.row().attempt == 2


@everywhere
def test_no_other_attempt_is_made_than_the_one_that_is_owed(web1: Server) -> None:
    """Whoever planned long ago may ask for one of an earlier due time, or of one that has been tried more often."""
    fail(web1, web1.must_run(THREE), now=THREE)
    at = THREE + 2 * MINUTE
    assert [web1.run(THREE, attempt=attempt, now=at) for attempt in (1, 3)] == [None, None]
    assert [web1.run(due_at, attempt=2, now=at) for due_at in (THREE - HOUR, THREE + SECOND)] == [None, None]
    assert web1.run(THREE, attempt=2, now=at) is not None


@everywhere
def test_a_run_by_hand_of_the_last_due_time_leaves_nothing_owed(web1: Server) -> None:
    web1.release(web1.must_run(THREE), now=THREE)
    fail(web1, web1.must_run(THREE, trigger="backfill", now=THREE + SECOND), now=THREE + 2 * SECOND)
    assert web1.row().retry_at is None


@everywhere
@pytest.mark.parametrize("overlap", ["skip", "allow"])
def test_a_retry_whose_answer_was_lost_is_won_once(
    lock: RedisLock, notes: Notes, web1: Server, deaf: Callable[..., None], overlap: Any
) -> None:
    server = shop(lock, notes, a_task("shop.x", overlap=overlap))
    fail(server, server.must_run(THREE), now=THREE)
    deaf("claim", 3)
    with pytest.raises(redis.ConnectionError):
        server.run(THREE, attempt=2, now=THREE + MINUTE)
    (claim,) = server.claim(now=THREE + MINUTE)
    assert (claim.occurrence.due_at, claim.occurrence.attempt) == (THREE, 2)
    assert server.run(THREE, attempt=2, now=THREE + MINUTE) is None
    row = server.row("shop.x")
    assert (row.retry_at, row.attempt, row.last_due_at, row.next_due_at) == (None, 2, THREE, THREE + HOUR)


@everywhere
def test_a_run_that_was_asked_for_and_whose_answer_was_lost_begins_once(
    web1: Server, web2: Server, notes: Notes, deaf: Callable[..., None]
) -> None:
    at = web1.lock.want("shop.refresh", now=HALF_PAST_TWO + SECOND)
    assert at is not None
    deaf("claim")
    claim = web1.must_run(at, trigger="manual", requested=True)
    assert web2.run(at, trigger="manual", requested=True) is None
    assert notes.claims == [claim]
    assert web1.row().wanted_at is None


@everywhere
def test_no_run_is_asked_for_where_a_task_is_not_or_not_yet(web1: Server, cache_store: CacheStore) -> None:
    cache_store.server.call("HSET", key(cache_store, "row:shop.refresh"), "moved_from", "other")
    assert web1.lock.want("shop.refresh", now=THREE) is None
    web1.lock.arrive(["shop.refresh"], now=THREE)
    assert web1.lock.want("shop.refresh", now=THREE) == THREE
    web1.lock.leave(["shop.refresh"], to="other", now=THREE)
    assert web1.lock.want("shop.refresh", now=THREE) is None


@everywhere
def test_a_request_that_is_sent_again_does_not_ask_for_a_second_run(
    web1: Server, web2: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server may have claimed the run before Redis reads the request for the second time."""
    line = web1.lock._line
    evaluate = line._eval
    claims = []

    def slow(connection: Any, step: str, text: str) -> Any:
        answer = evaluate(connection, step, text)
        if step == "want" and not claims:
            claims.append(web2.must_run(HALF_PAST_TWO + SECOND, trigger="manual", requested=True))
            raise redis.ConnectionError("the answer was lost")
        return answer

    web1.due(HALF_PAST_TWO)
    monkeypatch.setattr(line, "_eval", slow)
    at = web1.lock.want("shop.refresh", now=HALF_PAST_TWO + SECOND)
    assert at == claims[0].occurrence.due_at
    assert web1.row().wanted_at is None
    web2.release(claims[0], now=HALF_PAST_TWO + 2 * SECOND)
    assert web1.lock.want("shop.refresh", now=HALF_PAST_TWO + 3 * SECOND) == HALF_PAST_TWO + 3 * SECOND


@everywhere
@pytest.mark.parametrize("overlap", ["skip", "allow"])
def test_a_release_that_is_sent_again_owes_what_the_first_one_did(
    lock: RedisLock, notes: Notes, web1: Server, deaf: Callable[..., None], overlap: Any
) -> None:
    server = shop(lock, notes, a_task("shop.x", overlap=overlap))
    claim = server.must_run(THREE)
    deaf("release", 2)
    with pytest.raises(redis.ConnectionError):
        fail(server, claim, now=THREE + SECOND)
    fail(server, claim, now=THREE + 9 * SECOND)
    row = server.row("shop.x")
    assert (row.retry_at, row.attempt) == (THREE + SECOND + MINUTE, 2)
    again = server.must_run(THREE, attempt=2, now=THREE + 2 * MINUTE)
    fail(server, claim, now=THREE + 3 * MINUTE, retry_in=SECOND)
    assert server.row("shop.x").retry_at is None, "and nothing once the next attempt is under way"
    assert server.release(again, now=THREE + 3 * MINUTE) == [True]


@everywhere
@pytest.mark.parametrize("everything", [False, True])
def test_the_end_of_a_pause_is_told_although_its_answer_was_lost(
    web1: Server, deaf: Callable[..., None], everything: bool
) -> None:
    names = None if everything else ["shop.refresh"]
    web1.lock.pause(names, now=THREE - SECOND)
    deaf("resume")
    assert web1.lock.resume(names, following=hourly, now=THREE) == ["shop.refresh"]
    assert web1.lock.resume(names, following=hourly, now=THREE) == []
    assert web1.must_run(THREE + HOUR)


@everywhere
def test_nothing_is_claimed_until_the_pause_of_everything_has_ended_for_all(
    lock: RedisLock, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiserver_schedule.locks.redis.lock.BATCH", 2)
    server = shop(lock, notes, *(a_task(name) for name in "abcde"))
    lock.pause(["c"], now=HALF_PAST_TWO)
    lock.pause(None, now=HALF_PAST_TWO)
    at = THREE + MINUTE
    seen = []

    def following(name: str, after: datetime) -> datetime | None:
        seen.append((name, after, lock.look(server.declared, now=at).paused))
        return hourly(name, after)

    assert lock.resume(None, following=following, now=at) == ["a", "b", "d", "e"]
    assert seen == [(name, at, True) for name in "abcde"]
    assert server.due(THREE + HOUR) == ["a", "b", "d", "e"]
    assert (server.row("a").last_due_at, server.row("a").next_due_at) == (at, THREE + HOUR)
    assert lock.resume(["a", "c"], following=following, now=at) == ["c"]


@everywhere
def test_two_ends_of_a_pause_at_once_pass_over_no_due_time(web1: Server, web2: Server) -> None:
    """The slower one finds nothing to end, and moves nothing on."""
    web1.lock.pause(None, now=HALF_PAST_TWO)
    ran = []

    def slow(name: str, after: datetime) -> datetime | None:
        assert web2.lock.resume(None, following=hourly, now=THREE - MINUTE) == ["shop.refresh"]
        ran.append(web2.run(THREE))
        return hourly(name, after)

    assert web1.lock.resume(None, following=slow, now=THREE + MINUTE) == []
    assert ran[0] is not None
    assert web1.row().last_due_at == THREE


@everywhere
def test_who_does_not_know_a_task_leaves_its_hint_at_the_end_of_a_pause(web1: Server) -> None:
    web1.lock.pause(["shop.refresh"], now=HALF_PAST_TWO)
    web1.lock.resume(["shop.refresh"], following=nobody_knows, now=THREE + MINUTE)
    row = web1.row()
    assert (row.last_due_at, row.next_due_at, row.paused) == (THREE + MINUTE, THREE, False)
    assert web1.run(THREE, now=THREE + MINUTE) is None
    assert web1.due(THREE + HOUR) == ["shop.refresh"]


@everywhere
def test_a_schedule_that_is_taken_over_while_a_pause_ends_keeps_its_own_hint(web1: Server, notes: Notes) -> None:
    web1.lock.pause(["shop.refresh"], now=HALF_PAST_TWO)
    newer = Server(web1.lock, notes, a_task(timetable=Every(5 * MINUTE)))

    def following(name: str, after: datetime) -> datetime | None:
        newer.sync(THREE + MINUTE)
        return hourly(name, after)

    assert web1.lock.resume(["shop.refresh"], following=following, now=THREE + MINUTE) == ["shop.refresh"]
    assert newer.row().next_due_at <= THREE + 5 * MINUTE


@everywhere
def test_the_end_of_a_pause_leaves_the_due_times_of_what_another_store_has(web1: Server) -> None:
    web1.lock.pause(["shop.refresh"], now=HALF_PAST_TWO)
    web1.lock.pause(None, now=HALF_PAST_TWO)
    web1.lock.leave(["shop.refresh"], to="other", now=HALF_PAST_TWO)
    web1.lock.resume(None, following=hourly, now=THREE + MINUTE)
    web1.lock.resume(["shop.refresh"], following=hourly, now=THREE + MINUTE)
    row = web1.row()
    assert (row.last_due_at, row.next_due_at, row.paused) == (HALF_PAST_TWO, THREE, False)


@everywhere
def test_a_row_that_comes_back_from_another_store_owes_nothing(lock: RedisLock, notes: Notes) -> None:
    server = shop(lock, notes, RERUN)
    fail(server, server.must_run(THREE), now=THREE)
    lock.want("shop.refresh", now=THREE + SECOND)
    lock.pause(["shop.refresh"], reason="audit", now=THREE + SECOND)
    lock.leave(["shop.refresh"], to="other", now=THREE + SECOND)
    theirs = server.row()
    newer = Server(lock, notes, RERUN, a_task("shop.more"))
    newer.sync(THREE + MINUTE, lambda names: {"shop.refresh": Before(row=theirs, store="other")})
    row = newer.row()
    assert (row.retry_at, row.wanted_at, row.attempt, row.moved_to) == (None, None, 1, "")
    assert (row.paused, row.paused_at, row.paused_reason) == (False, None, "")
    newcomer = dataclasses.replace(theirs, task="shop.new", moved_to="")
    newest = Server(lock, notes, RERUN, a_task("shop.new"))
    newest.sync(THREE + 2 * MINUTE, lambda names: {"shop.new": Before(row=newcomer, store="other")})
    row = newest.row("shop.new")
    assert (row.retry_at, row.wanted_at, row.attempt, row.paused) == (None, None, 1, False)


# -- and what a loss leaves of it -------------------------------------------------------------------------------------


@everywhere
def test_a_flush_between_two_attempts_drops_the_second(web1: Server, web2: Server, cache_store: CacheStore) -> None:
    fail(web1, web1.must_run(THREE), now=THREE + SECOND)
    cache_store.server.call("FLUSHALL")
    again = dataclasses.replace(server_occurrence(web1, "shop.refresh"), attempt=2)
    assert web1.claim(again, now=THREE + 2 * MINUTE) == []
    known = {"shop.refresh": Before(last_due_at=THREE)}
    synced = web2.lock.sync(web2.declared, elsewhere=lambda names: known, now=THREE + 2 * MINUTE)
    assert synced.lost == {"shop.refresh": THREE}
    row = web2.row()
    assert (row.retry_at, row.attempt) == (None, 1)
    late = THREE + 2 * MINUTE + LEASE
    assert web2.claim(again, now=late) == []
    assert web2.run(THREE, now=late) is None


@everywhere
def test_a_flush_during_an_attempt_gives_its_owner_the_lock_back_and_no_further_attempt(
    lock: RedisLock, notes: Notes, web2: Server, cache_store: CacheStore
) -> None:
    server = shop(lock, notes, RERUN)
    fail(server, server.must_run(THREE), now=THREE)
    claim = server.must_run(THREE, attempt=2, now=THREE + MINUTE)
    cache_store.server.call("FLUSHALL")
    web2.sync(THREE + MINUTE + SECOND)
    assert server.renew(claim, now=THREE + MINUTE + 2 * SECOND) == [True]
    assert web2.row().owner == claim.owner
    fail(server, claim, now=THREE + MINUTE + 3 * SECOND)
    row = web2.row()
    assert (row.owner, row.retry_at) == (None, None)
    assert_indexed(cache_store)


@everywhere
def test_an_owner_that_came_back_and_died_is_not_run_again(
    lock: RedisLock, notes: Notes, cache_store: CacheStore
) -> None:
    """Its due time is not the last one any more: what was due until the loss counts as done."""
    server = shop(lock, notes, RERUN)
    server.must_run(THREE)
    seem_restarted(cache_store)
    server.sync(THREE + SECOND)
    row = key(cache_store, "row:shop.refresh")
    cache_store.server.call("HSET", row, "rerun_up_to", "4")
    assert len(server.reap(THREE + 2 * MINUTE)) == 1
    assert server.row().retry_at is None
    assert field(cache_store, "row:shop.refresh", "rerun_up_to") == "0"


def seem_restarted(store: CacheStore) -> None:
    """Have all of it written by another process of the server, as after a restart, which here forgot nothing."""
    (mine,) = re.findall(r"run_id:(\w+)", store.server.call("INFO", "server"))
    store.server.call("HSET", key(store, "state"), "run_id", "another")
    asked = field(store, "row:shop.refresh", "asked") or ""
    store.server.call("HSET", key(store, "row:shop.refresh"), "asked", asked.replace(mine, "another"))


@everywhere
def test_a_restart_drops_what_was_owed_and_asked_for_before_it(web1: Server, cache_store: CacheStore) -> None:
    """Whether it ran, and was forgotten, nobody can know; what is asked for afterwards has not run."""
    fail(web1, web1.must_run(THREE), now=THREE)
    web1.lock.want("shop.refresh", now=THREE + SECOND)
    web1.lock.pause(["shop.refresh"], reason="audit", now=THREE + SECOND)
    seem_restarted(cache_store)
    assert web1.lock.sync(web1.declared, now=THREE + 2 * SECOND).changed == ()
    row = web1.row()
    assert (row.retry_at, row.wanted_at) == (None, None)
    assert (row.paused_at, row.paused_reason) == (THREE + SECOND, "audit")
    assert_indexed(cache_store)
    web1.lock.resume(["shop.refresh"], following=hourly, now=THREE + 3 * SECOND)
    web1.lock.want("shop.refresh", now=THREE + 4 * SECOND)
    seem_restarted(cache_store)
    at = web1.lock.want("shop.refresh", now=THREE + MINUTE)
    assert at == THREE + MINUTE
    assert web1.lock.want("shop.refresh", now=THREE + MINUTE + SECOND) == at
    assert web1.run(at, trigger="manual", requested=True) is None
    web1.sync(THREE + MINUTE)
    assert web1.row().wanted_at == at
    assert web1.run(at, trigger="manual", requested=True, now=at + LEASE) is not None


@everywhere
def test_a_doubt_about_due_times_is_no_change_of_the_schedule(web1: Server, cache_store: CacheStore) -> None:
    seem_restarted(cache_store)
    delete(cache_store, "versions")
    synced = web1.lock.sync(web1.declared, now=THREE + MINUTE)
    assert (synced.changed, synced.lost) == ((), {"shop.refresh": HALF_PAST_TWO})
    assert web1.row().next_due_at == THREE + HOUR


@everywhere
def test_the_pause_of_everything_outlives_what_is_lost_beside_it(web1: Server, cache_store: CacheStore) -> None:
    web1.lock.pause(None, reason="audit", now=HALF_PAST_TWO)
    web1.lock.pause(None, reason="a longer audit", now=HALF_PAST_TWO + SECOND)
    delete(cache_store, "row:shop.refresh", "due")
    web1.sync(HALF_PAST_TWO + MINUTE)
    look = web1.lock.look(web1.declared, now=THREE)
    assert (look.known, look.paused, look.due) == (True, True, ())
    assert field(cache_store, "state", "paused_reason") == "a longer audit"
    assert int(field(cache_store, "state", "paused_at")) == HALF_PAST_TWO.timestamp() * 1_000_000
    assert web1.lock.want("shop.refresh", now=THREE) is None


@everywhere
def test_an_owner_that_was_told_to_end_does_not_come_back_but_may_release(
    web1: Server, web2: Server, notes: Notes, cache_store: CacheStore
) -> None:
    claim = web1.must_run(THREE)
    assert web2.lock.cancel({"shop.refresh": "somebody else"}, now=THREE) == []
    assert web2.lock.cancel({"shop.refresh": claim.owner, "shop.nowhere": "x"}, now=THREE) == ["shop.refresh"]
    cache_store.server.call("HSET", key(cache_store, "row:shop.refresh"), "hold", str(int(1e16)))
    assert web1.renew(claim, now=THREE + SECOND) == [False]
    row = web1.row()
    assert (row.owner, row.cancelled, row.expires_at) == (claim.owner, True, THREE + LEASE)
    assert web1.release(claim, now=THREE + 2 * SECOND) == [True]
    assert web1.row().cancelled is False
    assert [stood for _, stood in notes.releases] == [True]


@everywhere
def test_who_comes_back_to_an_older_state_is_not_told_to_end_in_anothers_place(
    web1: Server, web2: Server, cache_store: CacheStore
) -> None:
    earlier = web1.must_run(THREE, trigger="manual")
    web1.lock.cancel({"shop.refresh": earlier.owner}, now=THREE)
    row = key(cache_store, "row:shop.refresh")
    flat = cache_store.server.call("HGETALL", row)
    web1.release(earlier, now=THREE)
    claim = web2.must_run(THREE, trigger="manual")
    cache_store.server.call("HSET", row, *flat)
    seem_restarted(cache_store)
    assert web2.renew(claim, now=THREE + SECOND) == [True]
    assert (web1.row().owner, web1.row().cancelled) == (claim.owner, False)
    cache_store.server.call("HSET", row, "owner", "", "cancelled", str(int(1e15)))  # an older release left it so
    web2.sync(THREE + SECOND)
    again = web1.must_run(THREE + HOUR)
    assert web1.renew(again, now=THREE + HOUR) == [True]


# -- rows that are taken out ------------------------------------------------------------------------------------------


@everywhere
def test_a_server_that_comes_back_to_rows_that_were_deleted_registers_them_anew(
    lock: RedisLock, notes: Notes, cache_store: CacheStore
) -> None:
    """Its version is known still; and that its runs are in the history is no sign of a loss."""
    own = a_task("shop.clear", on_every_server=True)
    server, other = (Server(lock, notes, own, name=name) for name in ("web1", "web2"))
    for each in (server, other):
        each.sync(THREE - MINUTE)
    claim = server.must_run(THREE)
    assert lock.forget(["shop.clear@web1", "shop.clear@web2", "shop.nowhere@web2"], now=THREE) == ["shop.clear@web2"]
    assert lock.look(server.declared, now=THREE + SECOND).known is True
    assert lock.look(other.declared, now=THREE + SECOND).known is False
    known = {"shop.clear@web2": Before(last_due_at=THREE - HOUR)}
    synced = other.lock.sync(other.declared, elsewhere=lambda names: known, now=THREE + SECOND)
    assert (synced.registered, synced.lost, synced.trouble) == (("shop.clear@web2",), {}, "")
    assert lock.look(other.declared, now=THREE + SECOND).known is True
    assert other.row("shop.clear@web2").next_due_at == THREE + HOUR
    assert other.run(THREE + HOUR) is not None
    assert server.renew(claim, now=THREE + SECOND) == [True]
    assert_indexed(cache_store)
    cache_store.server.call("FLUSHALL")
    synced = other.lock.sync(other.declared, elsewhere=lambda names: known, now=THREE + HOUR)
    assert synced.lost == {"shop.clear@web2": THREE - HOUR}, "which is one here"


@everywhere
def test_a_loss_is_noticed_although_other_rows_are_deleted(
    lock: RedisLock, notes: Notes, cache_store: CacheStore
) -> None:
    shop(lock, notes, a_task("a"), a_task("b"), a_task("c", on_every_server=True))
    delete(cache_store, "row:a")
    for index, command in (("due", "ZREM"), ("names", "SREM")):
        cache_store.server.call(command, key(cache_store, index), "a")
    assert lock.forget(["c@web1"], now=THREE) == ["c@web1"]
    other = Server(lock, notes, a_task("a"), a_task("b"), name="web2")
    assert lock.look(other.declared, now=THREE).known is False
    known = {"a": Before(last_due_at=THREE - HOUR)}
    synced = lock.sync(other.declared, elsewhere=lambda names: known, now=THREE)
    assert synced.lost == {"a": THREE - HOUR}


@everywhere
def test_a_release_and_a_clean_up_put_no_piece_of_a_deleted_row_back(
    lock: RedisLock, notes: Notes, cache_store: CacheStore
) -> None:
    server = shop(lock, notes, a_task("shop.x", overlap="allow", on_every_server=True, rerun=True))
    first = server.must_run(THREE)
    server.must_run(THREE + HOUR)
    assert lock.forget(["shop.x@web1"], now=THREE + HOUR) == ["shop.x@web1"]
    server.release(first, now=THREE + HOUR, outcome=FAILED, retry_in=SECOND)
    server.reap(THREE + 2 * HOUR)
    assert lock.pause(["shop.x@web1"], now=THREE + 2 * HOUR) == []
    assert lock.resume(["shop.x@web1"], following=hourly, now=THREE + 2 * HOUR) == []
    assert lock.want("shop.x@web1", now=THREE + 2 * HOUR) is None
    assert lock.retire(["shop.x@web1"], now=THREE + 2 * HOUR) == []
    assert cache_store.server.call("KEYS", key(cache_store, "row:*")) == []


@everywhere
def test_a_retired_row_comes_back_with_the_next_version_that_declares_it(
    web1: Server, notes: Notes, cache_store: CacheStore
) -> None:
    web1.lock.want("shop.refresh", now=HALF_PAST_TWO)
    fence = web1.row().fence
    assert web1.lock.retire(["shop.refresh", "shop.nowhere"], now=HALF_PAST_TWO) == ["shop.refresh"]
    assert web1.due(THREE + DAY) == []
    newer = Server(web1.lock, notes, a_task(), a_task("shop.more"))
    assert newer.sync(THREE + MINUTE) == (["shop.more"], ["shop.refresh"])
    row = newer.row()
    assert (row.next_due_at, row.wanted_at, row.fence) == (THREE + HOUR, None, fence)


# -- a clock that was ahead, and was put right ------------------------------------------------------------------------


@everywhere
def test_two_who_set_a_row_right_at_once_mend_it_once(web1: Server, web2: Server) -> None:
    """The slower one finds it mended, and a due time claimed meanwhile stays claimed."""
    web1.release(web1.must_run(AHEAD), now=AHEAD)
    done = []

    def slow(name: str, after: datetime) -> datetime | None:
        if not done:
            done.append(web2.set_right(THREE - MINUTE))
            done.append(web2.must_run(THREE))
        return hourly(name, after)

    reaches = {"shop.refresh": REACH}
    assert web1.lock.set_right(reaches, following=slow, now=THREE - MINUTE) == []
    assert done[0] == ["shop.refresh"]
    assert (web1.row().last_due_at, web1.row().owner) == (THREE, done[1].owner)


@everywhere
def test_a_row_that_was_set_right_is_told_although_the_answer_was_lost(web1: Server, deaf: Callable[..., None]) -> None:
    web1.release(web1.must_run(AHEAD), now=AHEAD)
    deaf("set_right")
    assert web1.set_right(THREE) == ["shop.refresh"]
    assert web1.set_right(THREE) == []
    assert web1.run(THREE + HOUR) is not None


@everywhere
def test_a_hold_of_a_clock_that_was_ahead_lasts_a_lease_from_now(
    web1: Server, web2: Server, cache_store: CacheStore
) -> None:
    """As long as an owner that was lost may take to come back."""
    delete(cache_store, "row:shop.refresh")
    web1.sync(AHEAD)
    assert web1.row().not_before == AHEAD + LEASE
    back = THREE - 10 * MINUTE
    assert web1.set_right(back) == ["shop.refresh"]
    assert web1.row().not_before == back + LEASE
    assert web1.set_right(back) == []
    assert web2.run(THREE) is not None


@everywhere
def test_a_task_that_is_registered_after_a_restart_under_a_clock_that_was_ahead_is_not_held(
    lock: RedisLock, web1: Server, notes: Notes, cache_store: CacheStore
) -> None:
    cache_store.server.call("HSET", key(cache_store, "state"), "run_id", "an older process of the server")
    web1.sync(AHEAD)
    back = THREE - 10 * MINUTE
    web1.set_right(back)
    other = Server(lock, notes, a_task("shop.new"))
    other.sync(back + SECOND)
    assert other.row("shop.new").not_before == back + LEASE
    assert other.run(THREE) is not None


@everywhere
def test_to_set_right_takes_as_many_round_trips_for_many_tasks_as_for_few(
    lock: RedisLock, notes: Notes, monitor: Monitor
) -> None:
    server = Server(lock, notes, *(a_task(f"t{i:03}") for i in range(500)))
    server.sync(AHEAD)
    monitor.commands()
    assert len(server.lock.set_right(dict.fromkeys(server.declared.tasks, REACH), following=hourly, now=THREE)) == 500
    assert monitor.commands() == ["EVALSHA"] * 4, "the time, the rows, what is right for them, and what is beside them"


@on("django-redis")
def test_a_holder_whose_due_time_comes_again_is_not_run_again_for_its_death(
    lock: RedisLock, notes: Notes, cache_store: CacheStore
) -> None:
    """A second guard, beside that its due time is not the last one any more."""
    server = shop(lock, notes, RERUN)
    server.must_run(AHEAD)
    assert field(cache_store, "row:shop.refresh", "rerun_up_to") != "0"
    server.set_right(THREE)
    assert field(cache_store, "row:shop.refresh", "rerun_up_to") == "0"
