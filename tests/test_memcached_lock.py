"""The Memcached lock: the contract, what it does when data is lost, and how it talks to its server."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings
from pymemcache.exceptions import MemcacheError, MemcacheServerError

from multiserver_schedule.cron import Cron
from multiserver_schedule.entries import Claim, Cleanup, Occurrence, Row, Skip
from multiserver_schedule.exceptions import ScheduleError, StoreTimeout
from multiserver_schedule.locks import memcached
from multiserver_schedule.locks.base import Before, Synced
from multiserver_schedule.locks.memcached import MemcachedLock
from multiserver_schedule.testing.contract import (
    BREAK,
    DAY,
    HOUR,
    LEASE,
    MINUTE,
    SECOND,
    SUCCEEDED,
    THREE,
    LockContract,
    Notes,
    Server,
    a_task,
    declare,
)

from . import servers
from .caches import LOCMEM, PYMEMCACHE, CacheStore, in_use, of

pytestmark = pytest.mark.parametrize("cache_store", ["memcached"], indirect=True)

HALF_PAST = Cron("30 * * * *", "UTC")
AWAY = (MemcacheError, OSError)


def a_lock(alias: str = "default", **options: Any) -> MemcachedLock:
    return MemcachedLock(alias, {"cache": "lock", **options})


@pytest.fixture
def lock(cache_store: CacheStore) -> Iterator[MemcachedLock]:
    """Return a lock on a server that was used before: the hold after its first use is long over."""
    lock = a_lock()
    lock.sync(declare(), now=THREE - 10 * DAY)
    yield lock
    lock.close()


@pytest.fixture
def other(cache_store: CacheStore) -> Iterator[MemcachedLock]:
    """Return the same lock as another process has it."""
    other = a_lock()
    yield other
    other.close()


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def web1(lock: MemcachedLock, notes: Notes) -> Server:
    server = Server(lock, notes, a_task())
    server.sync(THREE - HOUR / 2)
    return server


@pytest.fixture
def web2(other: MemcachedLock, notes: Notes, web1: Server) -> Server:
    return Server(other, notes, a_task(), name="web2")


class TestMemcachedLock(LockContract):
    """The facts of every lock."""

    @pytest.fixture
    def lock(self, cache_store: CacheStore) -> Iterator[MemcachedLock]:
        lock = a_lock()
        lock.sync(declare(), now=THREE - 10 * DAY)
        yield lock
        lock.close()


# -- what the tests do to the server and to a lock --------------------------------------------------------------------


def kept(lock: Any, key: str) -> Any:
    with lock._line.call():
        return lock._read([key], None).get(key)


def put(lock: Any, key: str, **values: Any) -> None:
    """Change an item as somebody else would."""
    with lock._line.call():
        read = lock._read([key], None)
        assert lock._write(read, {key: {**(read.get(key) or {}), **values}})[key]


def delete(store: CacheStore, lock: Any, *keys: str) -> None:
    for key in keys:
        assert store.server.call("delete", lock._item(key).decode()) == ["DELETED"], key


def before_a_row_is_written(lock: Any, action: Callable[[], object]) -> None:
    """Have this happen once, between the next read of a row and its write."""
    write = lock._line.write
    left = [action]

    def after(items: Sequence[Any], connection: int) -> Any:
        if left and any(b":row:" in key for key, _, _ in items):
            left.pop()()
        return write(items, connection)

    lock._line.write = after


def lose_answers(lock: Any, times: int, error: Exception | None = None) -> None:
    """Have the next writes of rows done, and their answers lost."""
    write = lock._line.write
    left = [times]

    def lossy(items: Sequence[Any], connection: int) -> Any:
        answer = write(items, connection)
        if left[0] and any(b":row:" in key for key, _, _ in items):
            left[0] -= 1
            raise error or ConnectionResetError("the answer was lost, on purpose")
        return answer

    lock._line.write = lossy


def sync(server: Server, now: Any, **elsewhere: Before) -> Synced:
    """Sync, with what is known elsewhere: by row, "." written as "__"."""
    known = {name.replace("__", "."): before for name, before in elsewhere.items()}

    def ask(names: Sequence[str]) -> Mapping[str, Before]:
        return {name: known[name] for name in names if name in known}

    return server.lock.sync(server.declared, elsewhere=ask, now=now)


def is_known(server: Server, now: Any) -> bool:
    return server.lock.look(server.declared, now=now).known


# -- what is configured -----------------------------------------------------------------------------------------------


class TestConfiguration:
    def test_an_unknown_option_is_refused_by_name(self, cache_store: CacheStore) -> None:
        with pytest.raises(ImproperlyConfigured, match=r"'cahe'.*cache, timeout, using"):
            MemcachedLock("default", {"cahe": "lock"})

    def test_a_cache_that_is_not_there_is_refused_by_name(self, cache_store: CacheStore) -> None:
        with pytest.raises(ImproperlyConfigured, match=r"no cache 'nowhere'.*Known are: default, lock"):
            a_lock(cache="nowhere")

    def test_a_cache_that_is_no_memcached_is_refused(self, cache_store: CacheStore) -> None:
        with pytest.raises(ImproperlyConfigured, match="LocMemCache"):
            a_lock(cache="default")

    @pytest.mark.parametrize("value", [0, -1, "3", None, True])
    def test_a_time_limit_is_needed(self, cache_store: CacheStore, value: object) -> None:
        with pytest.raises(ImproperlyConfigured, match="'timeout'"):
            a_lock(timeout=value)

    @pytest.mark.parametrize(
        "location",
        [
            ["10.0.0.1:11211", "10.0.0.2:11211"],
            "10.0.0.1:11211,10.0.0.2:11211",
            "10.0.0.1:11211;10.0.0.2:11211",
            "",
            [],
        ],
    )
    def test_anything_but_one_server_is_refused(self, cache_store: CacheStore, location: Any) -> None:
        with (
            override_settings(CACHES={"lock": {"BACKEND": PYMEMCACHE, "LOCATION": location}}),
            pytest.raises(ImproperlyConfigured, match="exactly one"),
        ):
            a_lock()

    @pytest.mark.parametrize("location", ["udp:10.0.0.1:11211", "10.0.0.1:11211:7", "a b:1", "::1:9"])
    def test_a_location_that_is_no_server_is_refused(self, cache_store: CacheStore, location: str) -> None:
        with (
            override_settings(CACHES={"lock": {"BACKEND": PYMEMCACHE, "LOCATION": location}}),
            pytest.raises(ImproperlyConfigured, match="host:port"),
        ):
            a_lock()

    @pytest.mark.parametrize(
        ("location", "server"),
        [
            ("10.0.0.1:11299", ("10.0.0.1", 11299)),
            (["cache.example.com:11299"], ("cache.example.com", 11299)),
            ("cache.example.com", ("cache.example.com", 11211)),
            ("[::1]:11299", ("::1", 11299)),
            ("[::1]", ("::1", 11211)),
            ("unix:/run/memcached.sock", "/run/memcached.sock"),
            ("/run/memcached.sock", "/run/memcached.sock"),
        ],
    )
    def test_a_location_is_understood_as_django_does(self, cache_store: CacheStore, location: Any, server: Any) -> None:
        with override_settings(CACHES={"lock": {"BACKEND": PYMEMCACHE, "LOCATION": location}}):
            lock: Any = a_lock()
            assert lock._line._client.server == server

    def test_nothing_is_opened_before_the_first_call(self, cache_store: CacheStore) -> None:
        lock: Any = a_lock()
        assert lock._line._client.sock is None

    def test_the_history_is_in_the_database_that_was_named(self, cache_store: CacheStore) -> None:
        assert a_lock(using="reports").using == "reports"
        assert a_lock().using == "default"
        assert a_lock().transactional is False

    def test_a_prefix_that_makes_no_key_is_refused_at_once(self, cache_store: CacheStore) -> None:
        entry = {**cache_store.django_settings, "KEY_PREFIX": "two words"}
        with override_settings(CACHES={"lock": entry}), pytest.raises(ImproperlyConfigured, match="two words"):
            a_lock()

    def test_keys_are_the_caches_own(self, cache_store: CacheStore) -> None:
        lock: Any = a_lock("nightly")
        assert lock._item("state") == b"project:7:multiserver_schedule:{nightly}:state"

    def test_the_longest_names_make_keys_too(self, lock: MemcachedLock, notes: Notes) -> None:
        task = a_task("n" * 190, on_every_server=True)
        server = Server(lock, notes, task, name="a server of 64 characters ünd mehr, " + "s" * 28)
        server.sync(THREE - MINUTE)
        claim = server.must_run(THREE)
        assert server.renew(claim, now=THREE + SECOND) == [True]
        assert server.release(claim, now=THREE + SECOND) == [True]

    def test_two_locks_in_one_cache_never_meet(self, lock: MemcachedLock, notes: Notes) -> None:
        second = a_lock("nightly")
        second.sync(declare(), now=THREE - 10 * DAY)
        for each in (lock, second):
            server = Server(each, notes, a_task())
            assert server.sync(THREE - HOUR) == (["shop.refresh"], [])
            assert server.run(THREE) is not None
        second.close()

    def test_two_projects_in_one_server_never_meet(self, web1: Server, cache_store: CacheStore, notes: Notes) -> None:
        web1.must_run(THREE)
        entry = {**cache_store.django_settings, "KEY_PREFIX": "another"}
        with override_settings(CACHES={"default": LOCMEM, "lock": entry}):
            second = a_lock()
            second.sync(declare(), now=THREE - 10 * DAY)
            server = Server(second, notes, a_task())
            assert server.sync(THREE - HOUR) == (["shop.refresh"], [])
            second.close()


# -- the server's clock -----------------------------------------------------------------------------------------------


class TestTheServersClock:
    """It tells whole seconds, a little late: what is due is judged by a lower bound, a lease is written by an upper."""

    def test_a_lease_lasts_at_least_as_long_as_its_holder_counts(self, lock: MemcachedLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task())
        lock.sync(server.declared)
        put(lock, "row:shop.refresh", hold_until=0)
        at = lock.clock()
        claim = server.lock.claim([server.occurrence(at, trigger="manual")], server="web1", record=notes.started)[0]
        assert claim.expires_at - claim.acquired_at == LEASE + 2 * SECOND
        assert at <= claim.acquired_at <= at + 2 * SECOND
        assert server.lock.renew([claim]) == {claim.owner}
        row = server.row()
        assert row.expires_at is not None and row.renewed_at is not None
        assert row.expires_at - row.renewed_at == LEASE + 2 * SECOND

    def test_what_is_lost_counts_as_done_until_after_any_clock_of_that_server(
        self, web1: Server, cache_store: CacheStore
    ) -> None:
        """A server that is restarted starts its clock anew, up to two seconds behind."""
        delete(cache_store, web1.lock, "row:shop.refresh")
        at = web1.lock.clock()
        synced = web1.lock.sync(web1.declared)
        row = web1.row()
        assert at + 4 * SECOND <= row.last_due_at == synced.now <= at + 6 * SECOND
        assert row.not_before >= at + LEASE + 2 * SECOND
        assert row.fence >= at.timestamp() * 1_000_000

    def test_the_fence_is_a_time_that_rises_within_a_second_too(self, web1: Server) -> None:
        first = web1.must_run(THREE)
        assert first.fence == int(THREE.timestamp()) * 1_000_000
        web1.release(first, now=THREE)
        second = web1.must_run(THREE, trigger="manual")
        assert second.fence == first.fence + 1


# -- data that is lost ------------------------------------------------------------------------------------------------


class TestAFlushInMidRun:
    @pytest.fixture
    def claim(self, web1: Server, cache_store: CacheStore) -> Claim:
        claim = web1.must_run(THREE)
        cache_store.server.call("flush_all")
        return claim

    def test_it_is_noticed_by_the_next_look_and_nobody_claims_before_the_sync(
        self, claim: Claim, web2: Server, web1: Server
    ) -> None:
        now = THREE + SECOND
        assert is_known(web2, now) is False
        due = replace(claim.occurrence, due_at=THREE + HOUR)
        assert web2.claim(due, now=THREE + HOUR) == []
        assert web2.claim(replace(due, trigger="manual"), now=THREE + HOUR) == []

    def test_a_live_owner_comes_back_and_nobody_overlaps_it(self, claim: Claim, web1: Server, web2: Server) -> None:
        web2.sync(THREE + 5 * SECOND)
        assert is_known(web2, THREE + 5 * SECOND) is True
        assert web1.renew(claim, now=THREE + 10 * SECOND) == [True]
        row = web2.row()
        assert (row.owner, row.server, row.acquired_at) == (claim.owner, "web1", THREE)
        assert row.fence >= claim.fence
        for beat in range(2, 400):
            now = THREE + beat * 10 * SECOND
            assert web1.renew(claim, now=now) == [True]
            assert web2.reap(now) == []
            assert web2.run(THREE + HOUR, now=now) is None
        assert web1.release(claim, now=THREE + 2 * HOUR) == [True]
        after = THREE + 2 * HOUR + BREAK
        newer = web2.must_run(THREE + 2 * HOUR, now=after)
        assert newer.fence > claim.fence

    def test_a_live_owner_comes_back_before_anybody_has_noticed(self, claim: Claim, web1: Server, web2: Server) -> None:
        assert web1.renew(claim, now=THREE + 10 * SECOND) == [True]
        assert is_known(web2, THREE + 11 * SECOND) is False
        synced = sync(web2, THREE + 11 * SECOND, shop__refresh=Before(last_due_at=THREE))
        assert synced.lost == {"shop.refresh": THREE}
        assert is_known(web2, THREE + 11 * SECOND) is True
        assert web2.row().owner == claim.owner
        assert web2.row().next_due_at == THREE + HOUR
        assert web1.renew(claim, now=THREE + 20 * SECOND) == [True]
        assert web1.release(claim, now=THREE + 21 * SECOND) == [True]

    def test_what_another_store_says_of_a_task_that_runs_here_is_older(
        self, claim: Claim, web1: Server, web2: Server
    ) -> None:
        web1.renew(claim, now=THREE + 10 * SECOND)
        theirs = a_row(last_due_at=THREE - DAY, next_due_at=THREE - DAY + HOUR, owner="somebody")
        synced = sync(web2, THREE + 11 * SECOND, shop__refresh=Before(row=theirs, store="orm"))
        assert synced.lost == {"shop.refresh": None}
        row = web2.row()
        assert (row.moved_from, row.owner, row.next_due_at) == ("", claim.owner, THREE + HOUR)

    def test_a_run_that_ends_before_its_owner_is_back_is_released_all_the_same(
        self, claim: Claim, web1: Server, web2: Server, notes: Notes
    ) -> None:
        assert web1.release(claim, now=THREE + 10 * SECOND) == [True]
        assert [stood for _, stood in notes.releases] == [True]
        web2.sync(THREE + 11 * SECOND)
        assert web2.row().owner is None
        assert web1.release(claim, now=THREE + 12 * SECOND) == [True]
        assert len(notes.releases) == 1

    def test_nobody_claims_before_the_hold_is_over_not_even_by_hand(
        self, claim: Claim, web1: Server, web2: Server
    ) -> None:
        at = THREE + HOUR - SECOND
        web2.sync(at)
        assert web2.row().not_before == at + LEASE
        for seconds in (1, 10, 29):
            now = at + seconds * SECOND
            assert web2.run(THREE + HOUR, now=now) is None
            assert web2.run(now, now=now, trigger="manual") is None
        assert web2.run(THREE + HOUR, now=at + LEASE) is not None

    def test_the_hold_is_as_long_as_the_longest_lease(self, claim: Claim, lock: MemcachedLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task(), a_task("shop.slow", lease=10 * MINUTE))
        server.sync(THREE + MINUTE)
        assert {row.task: row.not_before for row in lock.rows()} == {
            "shop.refresh": THREE + 11 * MINUTE,
            "shop.slow": THREE + 11 * MINUTE,
        }

    def test_an_owner_whose_own_lease_is_over_does_not_come_back(
        self, claim: Claim, web1: Server, web2: Server
    ) -> None:
        web2.sync(THREE + 20 * SECOND)
        assert web1.renew(claim, now=THREE + LEASE) == [False]
        assert web2.row().owner is None

    def test_an_owner_that_comes_back_after_the_hold_is_lost(self, web1: Server, web2: Server, lock: Any) -> None:
        claim = web1.must_run(THREE)
        delete_all(lock)
        web2.sync(THREE)
        lock._stands[claim.owner] = 10**18  # Its own lease aside: the hold alone refuses it.
        assert web1.renew(claim, now=THREE + LEASE) == [False]
        assert web1.release(claim, now=THREE + LEASE) == [False]

    def test_an_owner_that_was_freed_by_hand_does_not_come_back(
        self, claim: Claim, web1: Server, web2: Server, notes: Notes
    ) -> None:
        web2.sync(THREE + SECOND)
        assert web1.renew(claim, now=THREE + 2 * SECOND) == [True]
        freed = web2.lock.free("shop.refresh", server="web2", record=notes.cleaned, now=THREE + 3 * SECOND)
        assert freed is not None and freed.owner == claim.owner
        assert web1.renew(claim, now=THREE + 4 * SECOND) == [False]

    @pytest.mark.parametrize("first", [0, 1])
    def test_of_two_that_believe_to_hold_it_the_later_one_comes_back(
        self, web1: Server, web2: Server, notes: Notes, first: int
    ) -> None:
        """One was freed by hand and has not heard of it; and that it was freed is lost, too."""
        older = web1.must_run(THREE)
        web2.lock.free("shop.refresh", server="web2", record=notes.cleaned, now=THREE + SECOND)
        newer = web2.must_run(THREE + 2 * SECOND, trigger="manual")
        delete_all(web1.lock)
        web2.sync(THREE + 3 * SECOND)
        for turn in (first, 1 - first, first, 1 - first):
            (web1, web2)[turn].renew((older, newer)[turn], now=THREE + 4 * SECOND)
        assert web2.row().owner == newer.owner
        assert web1.renew(older, now=THREE + 5 * SECOND) == [False]
        assert web2.renew(newer, now=THREE + 5 * SECOND) == [True]

    def test_a_due_time_that_was_claimed_before_is_never_claimed_again(
        self, claim: Claim, web1: Server, web2: Server
    ) -> None:
        web2.sync(THREE)
        for minute in (1, 5, 59):
            assert web2.run(THREE, now=THREE + minute * MINUTE) is None

    def test_what_is_known_of_the_loss_is_told(self, claim: Claim, web2: Server, notes: Notes) -> None:
        """The gap is for the history to fill in; a task that is simply new has none."""
        now = THREE + 5 * HOUR
        web2.declared = declare(a_task(), a_task("shop.new"), server="web2")
        synced = sync(web2, now, shop__refresh=Before(last_due_at=THREE))
        assert synced.lost == {"shop.refresh": THREE}
        assert synced.now == now
        assert synced.trouble == "the store was empty"
        assert sorted(synced.registered) == ["shop.new", "shop.refresh"]
        assert [row.last_due_at for row in web2.lock.rows()] == [now, now]

    def test_a_process_that_goes_on_tells_what_was_there(self, claim: Claim, web1: Server) -> None:
        synced = web1.lock.sync(web1.declared, now=THREE + SECOND)
        assert synced.lost == {"shop.refresh": None}

    def test_a_history_that_is_ahead_of_the_stores_clock_is_believed(self, claim: Claim, web2: Server) -> None:
        sync(web2, THREE + SECOND, shop__refresh=Before(last_due_at=THREE + 2 * HOUR))
        assert web2.row().last_due_at == THREE + 2 * HOUR
        assert web2.row().next_due_at == THREE + 3 * HOUR

    def test_the_first_use_loses_nothing_and_says_so(self, cache_store: CacheStore, notes: Notes) -> None:
        lock = a_lock()
        synced = sync(Server(lock, notes, a_task()), THREE)
        assert (synced.registered, dict(synced.lost), synced.trouble) == (("shop.refresh",), {}, "")
        lock.close()

    def test_what_another_version_registers_later_is_held_too(
        self, claim: Claim, lock: MemcachedLock, other: MemcachedLock, notes: Notes
    ) -> None:
        Server(other, notes, a_task("shop.first")).sync(THREE + SECOND)
        later = Server(lock, notes, a_task("shop.first"), a_task("shop.second"))
        later.sync(THREE + 10 * SECOND)
        assert later.row("shop.second").not_before == THREE + SECOND + LEASE
        assert later.row("shop.second").last_due_at == THREE + 10 * SECOND


def delete_all(lock: Any) -> None:
    with lock._line.call():
        lock._line._client.flush_all(noreply=False)


class TestPartsThatAreLost:
    def test_a_row_that_is_lost_is_noticed_and_put_right(
        self, web1: Server, web2: Server, cache_store: CacheStore
    ) -> None:
        delete(cache_store, web1.lock, "row:shop.refresh")
        assert is_known(web2, THREE) is False
        assert web2.lock.claim([an_occurrence(web1)], server="web2", record=lambda *args: None, now=THREE) == []
        synced = web2.lock.sync(web2.declared, now=THREE)
        assert (dict(synced.lost), synced.trouble) == ({"shop.refresh": None}, "rows were lost")
        assert is_known(web2, THREE) is True
        assert (web2.row().last_due_at, web2.row().not_before) == (THREE, THREE + LEASE)
        assert web2.lock.sync(web2.declared, now=THREE).lost == {}

    def test_a_row_of_a_task_that_nobody_here_declares_is_left_to_the_version_that_holds_it(
        self, web1: Server, lock: MemcachedLock, other: MemcachedLock, cache_store: CacheStore, notes: Notes
    ) -> None:
        stranger = Server(other, notes, a_task("shop.else"), name="web3")
        stranger.sync(THREE - 20 * MINUTE)
        web1 = Server(lock, notes, a_task(), a_task("shop.else"))
        web1.sync(THREE - 2 * MINUTE)
        claim = web1.claim(web1.occurrence(THREE), now=THREE)[0]
        delete(cache_store, lock, "row:shop.refresh")
        assert is_known(stranger, THREE + SECOND) is False
        assert stranger.lock.sync(stranger.declared, now=THREE + SECOND).lost == {}
        assert is_known(stranger, THREE + SECOND) is True
        assert web1.row().fingerprint == ""
        assert web1.row().next_due_at is None
        assert web1.renew(claim, now=THREE + 2 * SECOND) == [True]
        assert is_known(web1, THREE + 3 * SECOND) is False
        synced = sync(web1, THREE + 3 * SECOND, shop__refresh=Before(last_due_at=THREE))
        assert synced.lost == {"shop.refresh": THREE}
        row = web1.row()
        assert (row.fingerprint, row.next_due_at) == (a_task().fingerprint, THREE + HOUR)
        assert row.owner == claim.owner
        assert web1.renew(claim, now=THREE + 4 * SECOND) == [True]

    def test_an_older_version_does_not_give_a_lost_row_its_own_schedule(
        self, web1: Server, other: MemcachedLock, cache_store: CacheStore, notes: Notes
    ) -> None:
        newer = Server(other, notes, a_task(timetable=HALF_PAST), name="web2")
        newer.sync(THREE - MINUTE)
        delete(cache_store, other, "row:shop.refresh")
        web1.sync(THREE)
        assert is_known(web1, THREE) is True
        assert is_known(newer, THREE) is False
        newer.sync(THREE)
        assert newer.row().fingerprint == a_task(timetable=HALF_PAST).fingerprint

    def test_the_list_of_names_is_restored(self, web1: Server, web2: Server, cache_store: CacheStore) -> None:
        claim = web1.must_run(THREE)
        delete(cache_store, web1.lock, "names:0")
        assert is_known(web2, THREE + SECOND) is False
        assert web2.lock.sync(web2.declared, now=THREE + SECOND).lost == {}
        assert is_known(web2, THREE + SECOND) is True
        assert kept(web2.lock, "names:0")["names"] == ["shop.refresh"]
        assert web2.row().owner == claim.owner
        assert web1.renew(claim, now=THREE + 2 * SECOND) == [True]

    def test_the_state_is_restored_and_that_a_pause_was_lost_is_said(
        self, web1: Server, web2: Server, cache_store: CacheStore
    ) -> None:
        claim = web1.must_run(THREE)
        delete(cache_store, web1.lock, "state")
        assert is_known(web2, THREE + SECOND) is False
        assert web2.claim(replace(claim.occurrence, due_at=THREE + HOUR), now=THREE + HOUR) == []
        assert "paused" in web2.lock.sync(web2.declared, now=THREE + SECOND).trouble
        assert is_known(web2, THREE + SECOND) is True
        assert is_known(web1, THREE + SECOND) is True
        assert web2.row().owner == claim.owner

    def test_a_server_whose_count_of_slots_is_lost_counts_from_none(
        self, lock: MemcachedLock, cache_store: CacheStore, notes: Notes
    ) -> None:
        server = Server(lock, notes, a_task("a"), a_task("b"), a_task("c"))
        server.sync(THREE - HOUR)
        a, b, c = (server.occurrence(THREE, task) for task in server.declared.tasks.values())
        claims = server.claim(a, now=THREE, slots=1)
        delete(cache_store, lock, "server:web1")
        assert len(server.claim(b, now=THREE, slots=1)) == 1
        delete(cache_store, lock, "server:web1")
        server.renew(*claims, now=THREE + SECOND)
        assert server.claim(c, now=THREE + SECOND, slots=1) == [], "counted again once it is renewed"

    def test_a_long_list_of_names_is_split_and_each_part_is_missed(
        self, lock: MemcachedLock, cache_store: CacheStore, notes: Notes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(memcached.rows, "PART_BYTES", 60)
        tasks = [a_task(f"shop.task{i:02}") for i in range(20)]
        server = Server(lock, notes, *tasks[:12])
        server.sync(THREE - HOUR)
        server = Server(lock, notes, *tasks)
        server.sync(THREE - MINUTE)
        parts = [key for key in (f"names:{i}" for i in range(20)) if kept(lock, key) is not None]
        assert len(parts) > 4
        for gone in parts:
            delete(cache_store, lock, gone)
            fresh = Server(a_lock(), notes, *tasks, name="web2")
            assert is_known(fresh, THREE) is False, gone
            assert fresh.lock.sync(fresh.declared, now=THREE).lost == {}
            assert is_known(fresh, THREE) is True
            assert sorted(row.task for row in fresh.lock.rows()) == sorted(task.name for task in tasks)
            fresh.lock.close()
        assert len(server.due(THREE + HOUR)) == 20

    def test_a_part_of_the_list_is_missed_by_those_whose_names_are_not_in_it(
        self, lock: MemcachedLock, cache_store: CacheStore, notes: Notes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(memcached.rows, "PART_BYTES", 60)
        tasks = [a_task(f"shop.task{i:02}") for i in range(12)]
        Server(lock, notes, tasks[0]).sync(THREE - 2 * MINUTE)
        Server(lock, notes, *tasks).sync(THREE - MINUTE)
        delete(cache_store, lock, "names:2")
        older = Server(a_lock(), notes, tasks[0], name="web2")
        assert is_known(older, THREE) is False
        older.sync(THREE)
        assert is_known(older, THREE) is True
        newer = Server(a_lock(), notes, *tasks)
        assert is_known(newer, THREE) is False
        newer.sync(THREE)
        assert len(newer.lock.rows()) == 12
        older.lock.close()
        newer.lock.close()

    def test_a_row_that_is_in_no_list_is_listed(self, web1: Server, web2: Server) -> None:
        """Whoever registered it died before."""
        put(web1.lock, "names:0", names=[])
        assert is_known(web2, THREE) is False
        web2.sync(THREE)
        assert is_known(web2, THREE) is True
        assert kept(web1.lock, "names:0")["names"] == ["shop.refresh"]

    def test_the_row_of_a_task_that_is_not_declared_any_more_is_still_reaped(
        self, web1: Server, other: MemcachedLock, notes: Notes
    ) -> None:
        web1.must_run(THREE)
        stranger = Server(other, notes, a_task("shop.else"), name="web3")
        stranger.sync(THREE + SECOND)
        assert other.look(stranger.declared, now=THREE + LEASE).expired is True
        assert [cleanup.task for cleanup in stranger.reap(THREE + LEASE)] == ["shop.refresh"]


class TestARestartThatKeepsTheItems:
    """Memcached does so with ``-e`` alone: what was written just before is not to be relied on."""

    def test_all_rows_are_held_and_what_was_due_meanwhile_is_told(
        self, lock: MemcachedLock, other: MemcachedLock, notes: Notes
    ) -> None:
        web1 = Server(lock, notes, a_task(), a_task("shop.older"))
        web1.sync(THREE - HOUR)
        Server(other, notes, a_task()).sync(THREE - HOUR)
        claim = web1.claim(web1.occurrence(THREE), now=THREE)[0]
        put(lock, "state", pid=1)
        web2 = Server(other, notes, a_task(), name="web2")
        now = THREE + 10 * SECOND
        assert is_known(web2, now) is False
        assert web2.run(THREE + HOUR, now=THREE + HOUR) is None
        synced = web2.lock.sync(web2.declared, now=now)
        assert synced.trouble == "the Memcached server was restarted"
        assert synced.lost == {"shop.refresh": THREE, "shop.older": THREE - HOUR}
        assert is_known(web2, now) is True
        row, older = web1.row(), web1.row("shop.older")
        assert (row.last_due_at, row.next_due_at, row.not_before) == (now, THREE + HOUR, now + LEASE)
        assert row.owner == claim.owner
        assert (older.last_due_at, older.next_due_at, older.not_before) == (now, None, now + LEASE)
        assert web1.renew(claim, now=now + SECOND) == [True]

    def test_nothing_is_claimed_or_given_up_before_that(self, web1: Server, web2: Server, lock: MemcachedLock) -> None:
        put(lock, "state", pid=1)
        assert web2.run(THREE) is None
        assert web2.run(THREE, trigger="manual") is None
        assert web2.skip(THREE, now=THREE + 50 * MINUTE, reason="missed") is None
        web2.sync(THREE + 50 * MINUTE)
        assert web2.run(THREE + HOUR) is not None

    def test_a_hint_that_nobody_could_compute_is_computed_by_the_version_that_holds_the_task(
        self, web1: Server, web2: Server, other: MemcachedLock, notes: Notes
    ) -> None:
        stranger = Server(other, notes, a_task("shop.else"), name="web3")
        put(web1.lock, "state", pid=1)
        stranger.sync(THREE + SECOND)
        assert web1.row().next_due_at is None
        newest = Server(web1.lock, notes, a_task(), a_task("shop.else"))
        assert is_known(newest, THREE + SECOND) is False
        newest.sync(THREE + SECOND)
        assert web1.row().next_due_at == THREE + HOUR
        assert is_known(newest, THREE + SECOND) is True

    def test_a_server_in_a_container_always_has_the_same_pid(self, web1: Server, web2: Server) -> None:
        started = kept(web1.lock, "state")["started"]
        put(web1.lock, "state", started=started - 60)
        assert is_known(web2, THREE) is False


# -- from store to store ----------------------------------------------------------------------------------------------


class TestMoving:
    def test_a_row_that_was_given_away_is_not_claimed_here_and_keeps_its_owner(
        self, web1: Server, web2: Server
    ) -> None:
        claim = web1.must_run(THREE)
        (row,) = web2.lock.leave(["shop.refresh", "shop.unknown"], to="orm", now=THREE + SECOND)
        assert (row.moved_to, row.owner, row.last_due_at) == ("orm", claim.owner, THREE)
        assert web2.lock.leave(["shop.refresh"], to="orm", now=THREE + SECOND) == [row]
        assert web2.lock.leave(["shop.refresh"], to="third", now=THREE + SECOND) == []
        assert is_known(web1, THREE + SECOND) is True, "nobody takes it back by himself"
        assert web1.renew(claim, now=THREE + SECOND) == [True]
        assert web1.release(claim, now=THREE + 2 * SECOND) == [True]
        assert web1.due(THREE + HOUR) == []
        assert web2.run(THREE + HOUR) is None
        assert web2.run(THREE + HOUR, trigger="manual") is None

    def test_a_row_that_comes_from_another_store_goes_on_from_there(self, lock: MemcachedLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task())
        theirs = a_row(last_due_at=THREE, next_due_at=THREE + HOUR, fence=7, owner="somebody")
        synced = sync(server, THREE + SECOND, shop__refresh=Before(row=theirs, store="orm", last_due_at=THREE))
        assert synced.lost == {}
        row = server.row()
        assert (row.last_due_at, row.next_due_at, row.moved_from, row.owner) == (THREE, THREE + HOUR, "orm", None)
        assert server.run(THREE + HOUR) is None
        lock.arrive(["shop.refresh"], now=THREE + HOUR)
        assert server.must_run(THREE + HOUR).fence > 7

    def test_a_row_elsewhere_that_the_history_is_ahead_of_is_passed_over(
        self, lock: MemcachedLock, notes: Notes
    ) -> None:
        """The task had moved here long ago, and this store was flushed since."""
        server = Server(lock, notes, a_task())
        theirs = a_row(last_due_at=THREE - 5 * DAY, next_due_at=THREE - 5 * DAY + HOUR)
        synced = sync(server, THREE + SECOND, shop__refresh=Before(row=theirs, store="orm", last_due_at=THREE))
        assert synced.lost == {"shop.refresh": THREE}
        assert server.row().last_due_at == THREE + SECOND
        assert server.row().not_before == THREE + SECOND + LEASE

    def test_elsewhere_is_asked_once_and_only_of_what_is_missing_or_given_away(
        self, lock: MemcachedLock, other: MemcachedLock, notes: Notes
    ) -> None:
        Server(lock, notes, a_task("a"), a_task("b")).sync(THREE - HOUR)
        lock.leave(["b"], to="orm", now=THREE - HOUR)
        asked: list[list[str]] = []

        def ask(names: Sequence[str]) -> Mapping[str, Before]:
            asked.append(sorted(names))
            return {"b": Before(row=a_row("b", last_due_at=THREE, next_due_at=THREE + HOUR), store="orm")}

        newer = Server(other, notes, a_task("a"), a_task("b"), a_task("c"))
        synced = other.sync(newer.declared, elsewhere=ask, now=THREE + SECOND)
        assert asked == [["b", "c"]]
        assert (synced.registered, synced.changed) == (("c",), ("b",))
        assert (newer.row("b").moved_to, newer.row("b").last_due_at) == ("", THREE)
        other.sync(newer.declared, elsewhere=ask, now=THREE + 2 * SECOND)
        assert len(asked) == 1

    def test_a_store_that_is_away_keeps_anything_from_being_written(self, lock: MemcachedLock, notes: Notes) -> None:
        def away(names: Sequence[str]) -> Mapping[str, Before]:
            raise ConnectionRefusedError("the other store is away")

        server = Server(lock, notes, a_task())
        with pytest.raises(ConnectionRefusedError):
            lock.sync(server.declared, elsewhere=away, now=THREE)
        assert lock.rows() == []
        assert is_known(server, THREE) is False


def a_row(name: str = "shop.refresh", **values: Any) -> Row:
    given: dict[str, Any] = {
        "pk": 3,
        "task": name,
        "fingerprint": a_task(name).fingerprint,
        "schedule_since": THREE - DAY,
        "not_before": THREE - DAY,
        "moved_to": "default",
    }
    return Row(**{**given, **values})


def an_occurrence(server: Server, **values: Any) -> Any:
    """Return the occurrence of three o'clock without asking for its row, which may be lost."""
    task = next(iter(server.declared.tasks.values()))
    given = {"due_at": THREE, "next_due_at": THREE + HOUR, "lease": LEASE, "min_break": BREAK}
    return Occurrence(task=task, row=task.name, pk=0, **{**given, **values})


# -- answers that are lost, and what comes in between -----------------------------------------------------------------


class TestLostAnswers:
    def test_a_claim_whose_answer_was_lost_is_won_all_the_same(self, web1: Server, web2: Server, notes: Notes) -> None:
        lose_answers(web1.lock, 1)
        claim = web1.must_run(THREE)
        assert notes.claims == [claim]
        assert web2.row().owner == claim.owner
        assert web2.row().fence == claim.fence

    def test_a_claim_that_stays_unanswered_is_settled_by_the_next_call(
        self, web1: Server, web2: Server, notes: Notes
    ) -> None:
        lose_answers(web1.lock, 1, StoreTimeout("cut"))
        with pytest.raises(StoreTimeout):
            web1.run(THREE)
        assert notes.claims == []
        owner = web2.row().owner
        (claim,) = web1.claim(now=THREE + SECOND)
        assert (claim.owner, claim.acquired_at, claim.expires_at) == (owner, THREE, THREE + LEASE)
        assert notes.claims == [claim]
        assert web1.claim(now=THREE + SECOND) == []
        assert web1.renew(claim, now=THREE + 2 * SECOND) == [True]

    def test_what_was_won_late_is_started_before_more_is_claimed(
        self, lock: MemcachedLock, other: MemcachedLock, notes: Notes
    ) -> None:
        """It would be forgotten if claiming more failed in the same call."""
        server = Server(lock, notes, a_task("a"), a_task("b"))
        server.sync(THREE - HOUR)
        a, b = (server.occurrence(THREE, task) for task in server.declared.tasks.values())
        lose_answers(lock, 2, StoreTimeout("cut"))
        with pytest.raises(StoreTimeout):
            server.claim(a, now=THREE)
        (late,) = server.claim(b, now=THREE)
        assert late.task.name == "a"
        assert notes.claims == [late]
        assert Server(other, notes, *server.declared.tasks.values()).row("b").owner is None, "nobody tried"
        with pytest.raises(StoreTimeout):
            server.claim(b, now=THREE)
        assert [claim.task.name for claim in server.claim(now=THREE)] == ["b"]

    def test_the_same_claim_sent_twice_is_won_once(self, web1: Server, notes: Notes) -> None:
        lock: Any = web1.lock
        sent = memcached.lock._Pending({"0000-owner": web1.occurrence(THREE)}, "web1", 0.0)
        for _ in range(2):
            won: dict[str, Claim] = {}
            with lock._line.call():
                lock._claim(sent, 1, THREE, won, set())
            assert list(won) == ["0000-owner"]
        assert web1.row().fence == won["0000-owner"].fence
        assert kept(lock, "server:web1")["owners"].keys() == {"0000-owner"}

    def test_a_release_whose_answer_was_lost_is_recorded_by_the_second_call(self, web1: Server, notes: Notes) -> None:
        claim = web1.must_run(THREE)
        lose_answers(web1.lock, 1)
        with pytest.raises(ConnectionResetError):
            web1.release(claim, now=THREE + SECOND)
        assert notes.releases == []
        assert web1.release(claim, now=THREE + 2 * SECOND) == [True]
        assert [stood for _, stood in notes.releases] == [True]
        assert web1.release(claim, now=THREE + 3 * SECOND) == [True]
        assert len(notes.releases) == 1

    def test_a_skip_whose_answer_was_lost_is_recorded(self, web1: Server, web2: Server, notes: Notes) -> None:
        lose_answers(web1.lock, 1)
        skip = web1.skip(THREE, now=THREE + 50 * MINUTE, reason="missed")
        assert skip is not None
        assert notes.skips == [skip]
        assert web2.skip(THREE, now=THREE + 50 * MINUTE, reason="missed") is None

    def test_a_clean_up_whose_answer_was_lost_is_recorded_by_the_next_one(
        self, web1: Server, web2: Server, notes: Notes
    ) -> None:
        web1.must_run(THREE)
        lose_answers(web2.lock, 1)
        with pytest.raises(ConnectionResetError):
            web2.reap(THREE + LEASE)
        assert notes.cleanups == []
        assert web2.lock.look(web2.declared, now=THREE + LEASE).expired is True
        assert web2.reap(THREE + LEASE) == [], "recorded, and not signalled: nobody knows who freed it"
        assert len(notes.cleanups) == 1


class TestWhatComesBetweenReadAndWrite:
    def test_a_server_that_is_frozen_while_its_row_is_deleted_wins_nothing(
        self, web1: Server, web2: Server, cache_store: CacheStore
    ) -> None:
        """With keys that only add guards, it won the same due time and fence again."""

        def meanwhile() -> None:
            delete(cache_store, web2.lock, "row:shop.refresh")

        before_a_row_is_written(web1.lock, meanwhile)
        assert web1.run(THREE) is None
        assert web1.lock.rows(["shop.refresh"]) == []

    def test_nor_while_its_row_is_deleted_and_registered_again(
        self, web1: Server, web2: Server, cache_store: CacheStore
    ) -> None:
        def meanwhile() -> None:
            delete(cache_store, web2.lock, "row:shop.refresh")
            web2.sync(THREE)

        before_a_row_is_written(web1.lock, meanwhile)
        assert web1.run(THREE) is None
        assert web2.row().owner is None

    def test_nor_while_another_server_claims_runs_and_releases(self, web1: Server, web2: Server) -> None:
        def meanwhile() -> None:
            web2.release(web2.must_run(THREE), now=THREE)

        before_a_row_is_written(web1.lock, meanwhile)
        assert web1.run(THREE) is None

    def test_what_was_read_half_a_lease_ago_is_read_again(
        self, web1: Server, web2: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lock: Any = web1.lock
        reads: list[object] = []
        read_now = lock._read

        def read(*args: Any) -> Any:
            reads.append(args)
            return read_now(*args)

        lock._read = read
        real = memcached.lock._boot_time
        # Before the first look of the claim; then, on the way to its write, this process is frozen for 16 seconds.
        clock = iter([0.1, 0.1, 16.1])
        monkeypatch.setattr(memcached.lock, "_boot_time", lambda: next(clock, None) or real())
        occurrence = an_occurrence(web1)
        (claim,) = web1.claim(occurrence, now=THREE)
        assert web2.row().owner == claim.owner
        assert len(reads) == 2

    def test_a_renewal_does_not_undo_a_skip_that_came_between(self, web1: Server, web2: Server) -> None:
        claim = web1.must_run(THREE)
        web1.renew(claim, now=THREE + HOUR)

        def meanwhile() -> None:
            assert web2.skip(THREE + HOUR, now=THREE + HOUR + SECOND) is not None

        before_a_row_is_written(web1.lock, meanwhile)
        assert web1.renew(claim, now=THREE + HOUR + SECOND) == [True]
        assert web2.row().last_due_at == THREE + HOUR

    def test_a_reaper_that_is_slow_does_not_free_what_was_renewed(self, web1: Server, web2: Server) -> None:
        claim = web1.must_run(THREE)
        before_a_row_is_written(web2.lock, lambda: web1.renew(claim, now=THREE + LEASE))
        assert web2.reap(THREE + LEASE) == []
        assert web2.row().owner == claim.owner

    def test_who_frees_by_hand_does_not_free_whoever_came_between(
        self, web1: Server, web2: Server, notes: Notes
    ) -> None:
        seen = web1.must_run(THREE)
        newer: list[Claim] = []

        def meanwhile() -> None:
            web1.release(seen, now=THREE + SECOND)
            newer.append(web1.must_run(THREE + HOUR))

        before_a_row_is_written(web2.lock, meanwhile)
        now = THREE + HOUR
        freed = web2.lock.free("shop.refresh", owner=seen.owner, server="web2", record=notes.cleaned, now=now)
        assert freed is None
        assert notes.cleanups == []
        assert web2.row().owner == newer[0].owner

    def test_a_version_that_dies_while_it_takes_over_is_finished_by_the_next_of_it(
        self, web1: Server, other: MemcachedLock, notes: Notes
    ) -> None:
        newer = Server(other, notes, a_task(timetable=HALF_PAST), a_task("shop.more"), name="web2")

        def dies() -> None:
            raise KeyboardInterrupt

        before_a_row_is_written(other, dies)
        with pytest.raises(KeyboardInterrupt):
            newer.sync(THREE - MINUTE)
        assert is_known(newer, THREE) is False
        assert newer.sync(THREE) == (["shop.more"], ["shop.refresh"])
        assert is_known(newer, THREE) is True

    @pytest.mark.parametrize("writes", range(6))
    def test_a_take_over_that_dies_at_any_write_is_finished_by_the_next(
        self, web1: Server, other: MemcachedLock, notes: Notes, writes: int
    ) -> None:
        """A row that another store has given back would else be in none."""
        web1.lock.leave(["shop.refresh"], to="orm", now=THREE - 3 * MINUTE)
        theirs = Before(row=a_row(last_due_at=THREE - MINUTE, next_due_at=THREE), store="orm")
        newer = Server(other, notes, a_task(), a_task("shop.more"), a_task("shop.own", on_every_server=True))
        line: Any = other
        write = line._line.write
        left = [writes]

        def dies(items: Sequence[Any], connection: int) -> Any:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= bool(items)
            return write(items, connection)

        line._line.write = dies
        died = False
        try:
            sync(newer, THREE - MINUTE, shop__refresh=theirs)
        except KeyboardInterrupt:
            died = True
        line._line.write = write
        assert is_known(newer, THREE - MINUTE) is not died
        if died:
            sync(newer, THREE - MINUTE, shop__refresh=theirs)
        assert is_known(newer, THREE - MINUTE) is True
        assert [row.moved_to for row in other.rows()] == ["", "", ""]
        assert newer.due(THREE) == ["shop.refresh", "shop.more", "shop.own@web1"]
        assert newer.run(THREE) is not None

    def test_a_row_that_changes_each_time_is_an_error_that_says_so(self, web1: Server) -> None:
        lock: Any = web1.lock
        claim = web1.must_run(THREE)
        lock._line.write = lambda items, connection: [False] * len(items)
        with pytest.raises(ScheduleError, match=r"'default'.*others changed it"):
            web1.renew(claim, now=THREE + SECOND)
        del lock._line.write
        assert web1.renew(claim, now=THREE + SECOND) == [True]

    def test_an_item_that_somebody_else_wrote_is_named(self, web1: Server) -> None:
        lock: Any = web1.lock
        with lock._line.call():
            lock._line._client.set(lock._item("row:shop.refresh"), b"no json", noreply=False)
        with pytest.raises(ScheduleError, match=r"row:shop\.refresh"):
            web1.lock.look(web1.declared, now=THREE)


class TestManyAtOnce:
    def test_of_many_processes_one_starts_a_tasks_row(self, cache_store: CacheStore, notes: Notes) -> None:
        tasks = [a_task(f"shop.task{i}") for i in range(30)]
        locks = [a_lock() for _ in range(8)]
        barrier = threading.Barrier(8)
        registered: list[str] = []
        failed: list[BaseException] = []

        def start(lock: MemcachedLock) -> None:
            barrier.wait()
            try:
                registered.extend(lock.sync(declare(*tasks), now=THREE).registered)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=start, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert sorted(registered) == sorted(task.name for task in tasks)
        assert all(lock.look(declare(*tasks), now=THREE).known for lock in locks)
        for lock in locks:
            lock.close()

    def test_two_threads_of_one_process_share_the_line(self, web1: Server) -> None:
        """Inline runs are renewed from a thread while the pass goes on."""
        claim = web1.must_run(THREE)
        failed: list[BaseException] = []

        def renew() -> None:
            try:
                for _ in range(200):
                    assert web1.renew(claim, now=THREE + SECOND) == [True]
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=renew) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(100):
            assert is_known(web1, THREE + SECOND) is True
        for thread in threads:
            thread.join()
        assert failed == []

    def test_a_fork_does_not_talk_over_its_parents_line(self, web1: Server) -> None:
        claim = web1.must_run(THREE)
        pid = os.fork()
        if not pid:
            stands = [False]
            try:
                stands = web1.renew(claim, now=THREE + SECOND)
            finally:
                os._exit(0 if stands == [True] else 1)
        for _ in range(50):
            assert web1.renew(claim, now=THREE + SECOND) == [True]
        assert os.waitpid(pid, 0)[1] == 0


# -- runs that may overlap --------------------------------------------------------------------------------------------


class TestRunsThatMayOverlap:
    @pytest.fixture
    def server(self, lock: MemcachedLock, notes: Notes) -> Server:
        server = Server(lock, notes, a_task(overlap="allow"))
        server.sync(THREE - HOUR / 2)
        return server

    def test_they_run_side_by_side_each_due_time_once(self, server: Server) -> None:
        first, second = server.must_run(THREE), server.must_run(THREE + HOUR)
        assert second.fence > first.fence
        assert server.run(THREE + HOUR) is None
        assert server.row().owner is None
        assert server.renew(first, second, now=THREE + HOUR + SECOND) == [True, True]

    def test_each_has_a_lease_of_its_own(self, server: Server, notes: Notes) -> None:
        first = server.must_run(THREE)
        second = server.must_run(THREE + 20 * SECOND, trigger="manual")
        assert server.lock.look(server.declared, now=THREE + LEASE).expired is True
        (cleanup,) = server.reap(THREE + LEASE)
        assert (cleanup.owner, cleanup.due_at, cleanup.fence) == (first.owner, THREE, first.fence)
        assert server.renew(first, second, now=THREE + LEASE) == [False, True]
        assert server.release(first, second, now=THREE + LEASE) == [False, True]
        assert server.release(first, second, now=THREE + LEASE) == [False, True]
        assert [stood for _, stood in notes.releases] == [False, True, False]

    def test_they_take_slots(self, server: Server) -> None:
        first = server.claim(server.occurrence(THREE), now=THREE, slots=1)
        later = THREE + 10 * SECOND
        more = server.occurrence(later, trigger="manual")
        assert server.claim(more, now=later, slots=1) == []
        server.release(*first, now=later)
        assert len(server.claim(more, now=later, slots=1)) == 1

    def test_they_come_back_after_a_flush(self, server: Server) -> None:
        claims = [server.must_run(THREE), server.must_run(THREE + SECOND, trigger="manual")]
        delete_all(server.lock)
        assert server.renew(claims[0], now=THREE + 2 * SECOND) == [True]
        server.sync(THREE + 3 * SECOND)
        assert server.renew(*claims, now=THREE + 4 * SECOND) == [True, True]
        assert server.release(*claims, now=THREE + 5 * SECOND) == [True, True]

    def test_a_claim_whose_answer_was_lost_is_settled(self, server: Server) -> None:
        lose_answers(server.lock, 1, StoreTimeout("cut"))
        with pytest.raises(StoreTimeout):
            server.run(THREE)
        (claim,) = server.claim(now=THREE + SECOND)
        assert server.release(claim, now=THREE + SECOND) == [True]


# -- clean-ups that wait for the database -----------------------------------------------------------------------------


class TestCleanUpsThatWait:
    def test_one_that_is_not_recorded_is_offered_again(self, web1: Server, web2: Server, notes: Notes) -> None:
        claim = web1.must_run(THREE)
        now = THREE + LEASE
        freed = web2.lock.reap(server="web2", record=lambda cleanups: [], now=now)
        assert [cleanup.owner for cleanup in freed] == [claim.owner]
        assert web1.lock.look(web1.declared, now=now).expired is True
        assert web1.run(THREE + HOUR) is not None, "free it is"
        assert web2.reap(now) == []
        assert [cleanup.owner for cleanup in notes.cleanups] == [claim.owner]
        assert (notes.cleanups[0].cleaned_by, notes.cleanups[0].due_at) == ("web2", THREE)
        assert web1.lock.look(web1.declared, now=now).expired is False
        assert web2.reap(now) == [] and len(notes.cleanups) == 1

    def test_a_reader_that_dies_before_it_clears_the_list_leaves_it_to_the_next(
        self, web1: Server, web2: Server, notes: Notes
    ) -> None:
        web1.must_run(THREE)

        def dies(cleanups: Sequence[Cleanup]) -> Sequence[Cleanup]:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            web2.lock.reap(server="web2", record=dies, now=THREE + LEASE)
        assert web1.reap(THREE + LEASE) == []
        assert len(notes.cleanups) == 1

    def test_what_is_written_while_another_is_recorded_stays(self, web1: Server, web2: Server, notes: Notes) -> None:
        """Cleared by compare-and-set, and by owner: not by emptying the list."""
        web1.must_run(THREE)

        def meanwhile(cleanups: Sequence[Cleanup]) -> Sequence[Cleanup]:
            web1.must_run(THREE + HOUR)
            web1.lock.reap(server="web1", record=lambda cleanups: [], now=THREE + HOUR + LEASE)
            return notes.cleaned(cleanups)

        web2.lock.reap(server="web2", record=meanwhile, now=THREE + LEASE)
        web2.reap(THREE + HOUR + LEASE)
        assert [cleanup.due_at for cleanup in notes.cleanups] == [THREE, THREE + HOUR]

    def test_what_was_recorded_comes_back_as_it_was_written(self, web1: Server, web2: Server) -> None:
        web1.must_run(THREE)
        (cleanup,) = web2.lock.reap(
            server="web2", record=lambda cleanups: [replace(c, pk=42) for c in cleanups], now=THREE + LEASE
        )
        assert cleanup.pk == 42

    def test_of_too_many_the_oldest_is_dropped_and_named(
        self, web1: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(memcached.rows, "MOST_REAPED", 3)
        with caplog.at_level(logging.WARNING, logger="multiserver_schedule"):
            for hour in range(5):
                web1.must_run(THREE + hour * HOUR)
                web1.lock.reap(server="web1", record=lambda cleanups: [], now=THREE + hour * HOUR + LEASE)
        assert len(kept(web1.lock, "row:shop.refresh")["reaped"]) == 3
        assert len(caplog.messages) == 2
        assert "task=shop.refresh due=2030-01-01 03:00:00+00:00 server=web1" in caplog.messages[0]

    def test_a_lock_that_was_freed_by_hand_leaves_a_trace_too(self, web1: Server, web2: Server, notes: Notes) -> None:
        claim = web1.must_run(THREE)
        cleanup = web2.lock.free("shop.refresh", server="web2", record=lambda cleanups: [], now=THREE + SECOND)
        assert cleanup is not None
        assert (cleanup.owner, cleanup.reason, cleanup.due_at) == (claim.owner, "released_by_hand", THREE)
        assert web2.lock.free("shop.refresh", server="web2", record=notes.cleaned, now=THREE + SECOND) is None
        web2.reap(THREE + SECOND)
        assert [each.reason for each in notes.cleanups] == ["released_by_hand"]
        assert web1.renew(claim, now=THREE + SECOND) == [False]


# -- paused and interrupted -------------------------------------------------------------------------------------------


class TestPaused:
    def test_nothing_is_claimed_or_skipped_while_all_is_paused(self, web1: Server, web2: Server) -> None:
        put(web1.lock, "state", paused_at=1)
        look = web2.lock.look(web2.declared, now=THREE)
        assert (look.paused, look.due, look.known) == (True, (), True)
        assert web2.run(THREE) is None
        assert web2.skip(THREE, now=THREE, reason="missed") is None
        assert web2.run(THREE, trigger="manual") is not None

    def test_nor_of_a_task_that_is_paused(self, web1: Server, web2: Server) -> None:
        put(web1.lock, "row:shop.refresh", paused_at=1)
        assert web2.row().paused is True
        assert web2.due(THREE) == []
        assert web2.run(THREE) is None
        assert web2.skip(THREE, now=THREE, reason="missed") is None
        claim = web2.run(THREE, trigger="manual")
        assert claim is not None
        web2.release(claim, now=THREE)
        assert web2.row().paused is True

    def test_an_interruption_is_seen(self, web1: Server, web2: Server) -> None:
        put(web1.lock, "state", interrupted_at=int(THREE.timestamp()) * 1_000_000)
        assert web2.lock.look(web2.declared, now=THREE + SECOND).interrupted_at == THREE


# -- the line to the server -------------------------------------------------------------------------------------------


def every_call(server: Server, claim: Claim, notes: Notes) -> dict[str, Callable[[], object]]:
    lock, now = server.lock, THREE + SECOND
    occurrence = replace(claim.occurrence, due_at=THREE + HOUR)
    return {
        "look": lambda: lock.look(server.declared, now=now),
        "sync": lambda: lock.sync(server.declared, now=now),
        "clock": lock.clock,
        "rows": lock.rows,
        "claim": lambda: server.claim(occurrence, now=THREE + HOUR),
        "skip": lambda: lock.skip([Skip(occurrence=occurrence, reason="missed")], record=notes.skipped, now=now),
        "renew": lambda: server.renew(claim, now=now),
        "release": lambda: server.release(claim, now=now, outcome=SUCCEEDED),
        "reap": lambda: server.reap(now),
        "free": lambda: lock.free("shop.refresh", server="web1", record=notes.cleaned, now=now),
        "leave": lambda: lock.leave(["shop.refresh"], to="orm", now=now),
        "arrive": lambda: lock.arrive(["shop.refresh"], now=now),
    }


class TestTheLine:
    def test_every_call_raises_while_the_server_is_away_and_works_when_it_is_back(
        self, web1: Server, cache_store: CacheStore, notes: Notes
    ) -> None:
        """Django's own client answers None and False, and that looks like an empty store."""
        claim = web1.must_run(THREE)
        cache_store.server.crash()
        for name, call in every_call(web1, claim, notes).items():
            with pytest.raises(AWAY):
                raise AssertionError(f"{name} said {call()!r}")
        assert (notes.skips, notes.releases, notes.cleanups) == ([], [], [])
        cache_store.server.restart()
        assert is_known(web1, THREE + 2 * SECOND) is False
        web1.sync(THREE + 2 * SECOND)
        assert web1.renew(claim, now=THREE + 3 * SECOND) == [True]

    def test_every_call_has_a_time_limit(self, web1: Server, cache_store: CacheStore, notes: Notes) -> None:
        claim = web1.must_run(THREE)
        quick = Server(a_lock(timeout=0.2), notes, a_task())
        is_known(quick, THREE)
        cache_store.server.freeze()
        try:
            for name, call in every_call(quick, claim, notes).items():
                began = time.monotonic()
                with pytest.raises(AWAY):
                    raise AssertionError(f"{name} said {call()!r}")
                assert time.monotonic() - began < 1.5, name
        finally:
            cache_store.server.thaw()
        quick.lock.close()

    def test_an_answer_that_comes_too_late_is_not_taken_for_the_next(
        self, web1: Server, cache_store: CacheStore, notes: Notes
    ) -> None:
        quick = Server(a_lock(timeout=0.2), notes, a_task(), name="web2")
        occurrence = quick.occurrence(THREE)
        before_a_row_is_written(quick.lock, cache_store.server.freeze)
        try:
            with pytest.raises(AWAY):
                quick.claim(occurrence, now=THREE)
        finally:
            cache_store.server.thaw()
        claims = quick.claim(now=THREE)
        assert [claim.owner for claim in claims] == [web1.row().owner]
        before_a_row_is_written(quick.lock, cache_store.server.freeze)
        try:
            with pytest.raises(AWAY):
                quick.renew(*claims, now=THREE + SECOND)
        finally:
            cache_store.server.thaw()
        assert quick.renew(*claims, now=THREE + SECOND) == [True]
        quick.lock.close()

    def test_a_hung_call_is_cut_from_another_thread(self, web1: Server, cache_store: CacheStore) -> None:
        is_known(web1, THREE)
        assert web1.lock.is_calling is False
        assert web1.lock.cut() is False
        cache_store.server.freeze()
        cut: list[bool] = []

        def watchdog() -> None:
            while not web1.lock.is_calling:
                time.sleep(0.01)
            time.sleep(0.1)
            cut.append(web1.lock.cut())

        thread = threading.Thread(target=watchdog)
        thread.start()
        began = time.monotonic()
        try:
            with pytest.raises(StoreTimeout, match="hung"):
                is_known(web1, THREE)
        finally:
            cache_store.server.thaw()
            thread.join()
        assert cut == [True]
        assert time.monotonic() - began < 1.5
        assert web1.lock.is_calling is False
        assert is_known(web1, THREE) is True

    def test_a_connection_attempt_is_cut_too(self, cache_store: CacheStore) -> None:
        # An address that answers nothing (TEST-NET-1, RFC 5737), or that this machine has no way to.
        with override_settings(CACHES={"lock": {"BACKEND": PYMEMCACHE, "LOCATION": "192.0.2.1:11211"}}):
            lock = a_lock(timeout=20)
        stop = threading.Event()

        def watchdog() -> None:
            while not stop.wait(0.2) and not lock.cut():
                pass

        thread = threading.Thread(target=watchdog)
        thread.start()
        began = time.monotonic()
        try:
            with pytest.raises((StoreTimeout, OSError)):
                lock.clock()
        finally:
            stop.set()
            thread.join()
        assert time.monotonic() - began < 5
        lock.close()

    def test_a_connection_that_the_server_has_ended_meanwhile_is_opened_anew(
        self, web1: Server, cache_store: CacheStore
    ) -> None:
        """As with -o idle_timeout: a service that looks once a minute must not see an outage each time."""
        assert is_known(web1, THREE) is True
        cache_store.server.crash()
        cache_store.server.restart()
        assert is_known(web1, THREE) is False

    def test_a_token_of_the_server_that_was_before_is_worth_nothing(
        self, web1: Server, cache_store: CacheStore, notes: Notes
    ) -> None:
        """A server that is restarted counts from 1 again: the same token may be there, of something else."""
        lock: Any = web1.lock
        for way in ("same", "new"):
            if way == "new":
                lock.close()
            # An error ends the connection; closing it does, too. Neither is asked about the token any more.
            with pytest.raises(AWAY) if way == "same" else contextlib.nullcontext(), lock._line.call():
                read = lock._read(["row:x"], THREE)
                key, (_, token) = lock._item("state"), read.found["state"]
                cache_store.server.crash()
                cache_store.server.restart()
                stranger = a_lock()
                stranger.sync(declare(), now=THREE)
                while (now := stranger_token(stranger)) < int(token):
                    put(stranger, "state", seen=now)
                stranger.close()
                if way == "new":
                    lock._line.close()
                    lock._line.moment()
                assert lock._line.write([(key, b"{}", token)], read.connection) == [False]
            assert kept(web1.lock, "state")["pid"] == cache_store.server.pid

    def test_a_claim_that_was_read_before_a_restart_is_not_won_after_it(
        self, web1: Server, cache_store: CacheStore, notes: Notes
    ) -> None:
        second = Server(a_lock(), notes, a_task(), name="web2")

        def meanwhile() -> None:
            cache_store.server.crash()
            cache_store.server.restart()
            for _ in range(30):  # until the tokens are where they were
                second.sync(THREE)
                second.lock.look(second.declared, now=THREE)
                delete_all(second.lock)
            second.sync(THREE)

        before_a_row_is_written(web1.lock, meanwhile)
        with contextlib.suppress(*AWAY):
            assert web1.run(THREE) is None
        assert second.row().owner is None
        assert web1.claim(now=THREE) == []
        second.lock.close()

    def test_a_proxy_that_tells_no_time_is_refused(self, web1: Server) -> None:
        lock: Any = web1.lock
        lock._line._client.stats = lambda: {b"version": b"1.0-proxy"}
        with pytest.raises(MemcacheError, match="proxy"):
            web1.lock.look(web1.declared, now=THREE)

    def test_a_server_without_memory_is_a_clear_error(self, cache_store: CacheStore, notes: Notes) -> None:
        # -m 1 alone: memcached refuses to start, and the test proves nothing. -M: it refuses, and evicts nothing.
        with servers.start("memcached", m="1", I="512k", M=True) as full, in_use(of("memcached", full)):
            lock: Any = a_lock()
            tasks = [a_task(f"shop.task{i:05}") for i in range(20_000)]
            with pytest.raises(MemcacheServerError, match=r"refused to store a row: SERVER_ERROR.*-m"):
                lock.sync(declare(*tasks), now=THREE)
            lock.close()


def stranger_token(lock: Any) -> int:
    with lock._line.call():
        return int(lock._read([], None).found["state"][1])
