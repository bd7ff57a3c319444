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
from multiserver_schedule.entries import Claim, Cleanup, Occurrence, ReleasedClaim, Row, Skip
from multiserver_schedule.exceptions import ScheduleError, StoreTimeout
from multiserver_schedule.locks import memcached
from multiserver_schedule.locks.base import Before, Synced
from multiserver_schedule.locks.memcached import MemcachedLock
from multiserver_schedule.testing.contract import (
    AHEAD,
    BREAK,
    DAY,
    HOUR,
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
    following,
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
        return lock._items.read([key], None).get(key)


def put(lock: Any, key: str, **values: Any) -> None:
    """Change an item as somebody else would."""
    with lock._line.call():
        read = lock._items.read([key], None)
        assert lock._items.write(read, {key: {**(read.get(key) or {}), **values}})[key]


def delete(store: CacheStore, lock: Any, *keys: str) -> None:
    for key in keys:
        assert store.server.call("delete", lock._items.key(key).decode()) == ["DELETED"], key


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
        assert lock._items.key("state") == b"project:7:multiserver_schedule:{nightly}:state"

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
        read_now = lock._items.read

        def read(*args: Any) -> Any:
            reads.append(args)
            return read_now(*args)

        lock._items.read = read
        real = memcached.lock.boot_time
        # Before the first look of the claim; then, on the way to its write, this process is frozen for 16 seconds.
        clock = iter([0.1, 0.1, 16.1])
        for module in (memcached.lock, memcached.items):
            monkeypatch.setattr(module, "boot_time", lambda: next(clock, None) or real())
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
            lock._line._client.set(lock._items.key("row:shop.refresh"), b"no json", noreply=False)
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
        monkeypatch.setattr(memcached.steps, "MOST_REAPED", 3)
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


# -- what is owed: another attempt, and a run that was asked for ------------------------------------------------------


def requested(server: Server, at: Any, now: Any) -> Claim | None:
    return server.run(at, trigger="manual", requested=True, now=now)


class TestWhatIsOwed:
    @pytest.fixture
    def retry_at(self, web1: Server) -> Any:
        web1.release(web1.must_run(THREE), now=THREE + SECOND, retry_in=MINUTE)
        return THREE + SECOND + MINUTE

    def test_a_release_whose_answer_was_lost_owes_at_the_time_that_it_said_first(self, web1: Server) -> None:
        claim = web1.must_run(THREE)
        lose_answers(web1.lock, 1)
        with pytest.raises(ConnectionResetError):
            web1.release(claim, now=THREE, retry_in=MINUTE)
        assert web1.release(claim, now=THREE + 10 * SECOND, retry_in=MINUTE) == [True]
        assert (web1.row().retry_at, web1.row().attempt) == (THREE + MINUTE, 2)

    def test_nor_does_it_owe_again_what_was_tried_meanwhile(self, web1: Server, web2: Server) -> None:
        claim = web1.must_run(THREE)
        lose_answers(web1.lock, 1)
        with pytest.raises(ConnectionResetError):
            web1.release(claim, now=THREE, retry_in=SECOND)
        again = web2.retry(THREE, 2, now=THREE + SECOND)
        assert again is not None
        assert web1.release(claim, now=THREE + 2 * SECOND, retry_in=SECOND) == [True]
        row = web2.row()
        assert (row.owner, row.retry_at, row.attempt) == (again.owner, None, 2)

    def test_an_attempt_whose_answer_was_lost_is_made_once(self, web1: Server, web2: Server, retry_at: Any) -> None:
        lose_answers(web1.lock, 1)
        again = web1.retry(THREE, 2, now=retry_at)
        assert again is not None
        assert web2.row().owner == again.owner
        assert web2.retry(THREE, 2, now=retry_at) is None

    def test_an_attempt_that_stays_unanswered_is_settled_by_the_next_call(
        self, web1: Server, web2: Server, retry_at: Any
    ) -> None:
        lose_answers(web1.lock, 1, StoreTimeout("cut"))
        with pytest.raises(StoreTimeout):
            web1.retry(THREE, 2, now=retry_at)
        (claim,) = web1.claim(now=retry_at + SECOND)
        assert (claim.owner, claim.occurrence.attempt) == (web2.row().owner, 2)

    def test_of_two_servers_that_saw_what_is_owed_one_makes_it(self, web1: Server, web2: Server, retry_at: Any) -> None:
        theirs: list[Claim | None] = []

        def meanwhile() -> None:
            theirs.append(web2.retry(THREE, 2, now=retry_at))
            if theirs[0] is not None:
                web2.release(theirs[0], now=retry_at)

        before_a_row_is_written(web1.lock, meanwhile)
        assert web1.retry(THREE, 2, now=retry_at) is None
        assert theirs[0] is not None

    def test_who_was_slow_does_not_make_a_later_attempt_under_the_number_of_an_earlier_one(
        self, web1: Server, web2: Server, retry_at: Any
    ) -> None:
        again = web2.retry(THREE, 2, now=retry_at)
        assert again is not None
        web2.release(again, now=retry_at, retry_in=SECOND)
        assert web1.retry(THREE, 2, now=retry_at + MINUTE) is None
        assert web1.retry(THREE, 3, now=retry_at + MINUTE) is not None

    def test_a_dead_servers_due_time_that_was_reaped_unanswered_is_run_again_once(
        self, lock: MemcachedLock, other: MemcachedLock, notes: Notes
    ) -> None:
        web1, web2 = (Server(each, notes, a_task(rerun=True)) for each in (lock, other))
        web1.sync(THREE - HOUR)
        web1.must_run(THREE)
        lose_answers(lock, 1)
        with pytest.raises(ConnectionResetError):
            web1.reap(THREE + LEASE)
        assert web2.reap(THREE + LEASE + SECOND) == []
        assert (web2.row().retry_at, web2.row().attempt) == (THREE + LEASE, 2)
        assert web2.retry(THREE, 2, now=THREE + MINUTE) is not None
        assert web1.retry(THREE, 2, now=THREE + MINUTE) is None

    def test_a_holder_that_renews_while_it_is_reaped_is_not_run_again(
        self, lock: MemcachedLock, other: MemcachedLock, notes: Notes
    ) -> None:
        web1, web2 = (Server(each, notes, a_task(rerun=True)) for each in (lock, other))
        web1.sync(THREE - HOUR)
        claim = web1.must_run(THREE)
        before_a_row_is_written(other, lambda: web1.renew(claim, now=THREE + LEASE))
        assert web2.reap(THREE + LEASE) == []
        assert web2.row().retry_at is None

    def test_an_attempt_begins_no_sooner_than_it_should_by_any_clock(self, lock: MemcachedLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task())
        lock.sync(server.declared)
        at = lock.clock()
        put(lock, "row:shop.refresh", hold_until=0, not_before=0, last_due_at=0)
        (claim,) = lock.claim([server.occurrence(at)], server="web1", record=notes.started)
        put(lock, "row:shop.refresh", next_due_at=None)
        lock.release(
            [ReleasedClaim(claim=claim, outcome=SUCCEEDED, min_break=BREAK, retry_in=MINUTE)], record=notes.finished
        )
        retry_at = server.row().retry_at
        assert retry_at is not None
        assert at + MINUTE + 2 * SECOND <= retry_at <= lock.clock() + MINUTE + 2 * SECOND

    def test_a_flush_drops_what_was_owed_and_says_that_the_row_was_lost(
        self, web1: Server, web2: Server, cache_store: CacheStore, retry_at: Any
    ) -> None:
        web1.lock.want("shop.refresh", now=THREE + 2 * SECOND)
        cache_store.server.call("flush_all")
        synced = sync(web2, THREE + 3 * SECOND, shop__refresh=Before(last_due_at=THREE))
        assert synced.lost == {"shop.refresh": THREE}
        row = web2.row()
        assert (row.retry_at, row.wanted_at, row.attempt) == (None, None, 1)
        for server in (web1, web2):
            assert server.due(THREE + 50 * MINUTE) == []
            assert server.retry(THREE, 2, now=THREE + 50 * MINUTE) is None
            assert requested(server, THREE + 2 * SECOND, THREE + 50 * MINUTE) is None

    def test_a_flush_in_the_middle_of_an_attempt_leads_to_no_further_one(
        self, lock: MemcachedLock, other: MemcachedLock, notes: Notes
    ) -> None:
        """What is due counts as done since: the row would owe another attempt of nothing that was ever due."""
        task = a_task(rerun=True, retries=5)
        web1, web2 = (Server(each, notes, task, name=name) for each, name in ((lock, "web1"), (other, "web2")))
        web1.sync(THREE - HOUR)
        web1.release(web1.must_run(THREE), now=THREE, retry_in=SECOND)
        again = web1.retry(THREE, 2, now=THREE + SECOND)
        assert again is not None
        delete_all(lock)
        assert web1.renew(again, now=THREE + 2 * SECOND) == [True]
        web2.sync(THREE + 3 * SECOND)
        assert web2.row().owner == again.owner
        assert web1.renew(again, now=THREE + 4 * SECOND) == [True]
        assert web1.release(again, now=THREE + 5 * SECOND, retry_in=MINUTE) == [True]
        assert web2.row().retry_at is None
        delete_all(lock)
        web2.sync(THREE + HOUR / 2)
        web2.must_run(THREE + HOUR)
        delete_all(lock)
        web1.sync(THREE + HOUR + SECOND)
        web2.renew(notes.claims[-1], now=THREE + HOUR + 2 * SECOND)
        assert len(web1.reap(THREE + HOUR + 2 * MINUTE)) == 1
        assert web1.row().retry_at is None

    def test_a_restart_that_keeps_the_items_drops_what_was_owed(
        self, web1: Server, web2: Server, retry_at: Any
    ) -> None:
        """That it was begun may have been lost."""
        web1.lock.want("shop.refresh", now=THREE + 2 * SECOND)
        put(web1.lock, "state", pid=1)
        assert web2.retry(THREE, 2, now=retry_at) is None
        assert requested(web2, THREE + 2 * SECOND, retry_at) is None
        web2.sync(retry_at)
        row = web2.row()
        assert (row.retry_at, row.wanted_at) == (None, None)
        assert web2.retry(THREE, 2, now=retry_at + LEASE) is None

    def test_nor_is_a_run_that_outlives_it_run_again(self, lock: MemcachedLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task(rerun=True))
        server.sync(THREE - HOUR)
        claim = server.must_run(THREE)
        put(lock, "state", pid=1)
        server.sync(THREE + SECOND)
        assert server.row().owner == claim.owner
        assert len(server.reap(THREE + LEASE)) == 1
        assert server.row().retry_at is None

    def test_a_changed_schedule_keeps_what_is_owed(
        self, web1: Server, other: MemcachedLock, notes: Notes, retry_at: Any
    ) -> None:
        web1.lock.want("shop.refresh", now=THREE + 2 * SECOND)
        newer = Server(other, notes, a_task(timetable=HALF_PAST), name="web2")
        newer.sync(THREE + 3 * SECOND)
        row = newer.row()
        assert (row.retry_at, row.attempt, row.wanted_at) == (retry_at, 2, THREE + 2 * SECOND)
        assert newer.retry(THREE, 2, now=retry_at) is not None

    def test_a_row_that_comes_back_from_another_store_owes_nothing_and_is_not_paused(
        self, web1: Server, other: MemcachedLock, notes: Notes, retry_at: Any
    ) -> None:
        web1.lock.want("shop.refresh", now=THREE + 2 * SECOND)
        web1.lock.pause(["shop.refresh"], reason="here", now=THREE + 2 * SECOND)
        web1.lock.leave(["shop.refresh"], to="orm", now=THREE + 2 * SECOND)
        theirs = a_row(last_due_at=THREE, next_due_at=THREE + HOUR, retry_at=retry_at, attempt=2, paused=True)
        newer = Server(other, notes, a_task(), a_task("shop.more"), name="web2")
        sync(newer, THREE + 3 * SECOND, shop__refresh=Before(row=theirs, store="orm"))
        row = newer.row()
        assert (row.moved_to, row.retry_at, row.wanted_at, row.attempt) == ("", None, None, 1)
        assert (row.paused, row.paused_reason) == (False, "")
        assert newer.due(THREE + HOUR - SECOND) == []

    def test_a_row_that_was_written_before_there_were_retries_owes_nothing(self, web1: Server) -> None:
        new = {"retry_at", "wanted_at", "attempt", "trigger", "rerun_up_to", "cancelled_at", "paused_reason"}
        web1.release(web1.must_run(THREE), now=THREE)
        assert new.isdisjoint(kept(web1.lock, "row:shop.refresh")), "nor does a row at rest have any of them now"
        row = web1.row()
        assert (row.attempt, row.trigger, row.retry_at, row.wanted_at) == (1, "schedule", None, None)
        assert (row.cancelled, row.paused_at, row.paused_reason) == (False, None, "")


# -- what people ask for ----------------------------------------------------------------------------------------------


class TestWhatPeopleAskFor:
    def test_many_rows_are_paused_and_resumed_by_one_read_and_one_write(
        self, lock: MemcachedLock, notes: Notes
    ) -> None:
        tasks = [a_task(f"shop.task{i:02}") for i in range(60)]
        Server(lock, notes, *tasks).sync(THREE - HOUR)
        names = [task.name for task in tasks]
        with calls_of(lock) as calls:
            assert lock.pause(names, now=THREE) == names
        assert calls == ["read", "write"]
        with calls_of(lock) as calls:
            assert lock.resume(names, following=following, now=THREE) == names
        assert calls == ["read", "write"]
        with calls_of(lock) as calls:
            assert lock.want("shop.task07", now=THREE) == THREE
        assert calls == ["read", "write"]

    def test_a_pause_that_comes_between_keeps_a_run_from_starting(self, web1: Server, web2: Server) -> None:
        before_a_row_is_written(web1.lock, lambda: web2.lock.pause(["shop.refresh"], now=THREE))
        assert web1.run(THREE) is None
        assert web1.row().owner is None

    def test_a_pause_leaves_the_run_that_came_between_alone(self, web1: Server, web2: Server) -> None:
        before_a_row_is_written(web2.lock, lambda: web1.must_run(THREE))
        assert web2.lock.pause(["shop.refresh"], reason="now", now=THREE) == ["shop.refresh"]
        row = web1.row()
        assert (row.paused, row.server, row.last_due_at) == (True, "web1", THREE)

    def test_a_pause_whose_answer_was_lost_keeps_its_time(self, web1: Server) -> None:
        lose_answers(web1.lock, 1)
        with pytest.raises(ConnectionResetError):
            web1.lock.pause(["shop.refresh"], now=THREE)
        assert web1.lock.pause(["shop.refresh"], now=THREE + MINUTE) == ["shop.refresh"]
        assert web1.row().paused_at == THREE

    def test_resuming_does_not_lower_what_was_claimed_in_between(self, web1: Server, web2: Server) -> None:
        web1.lock.pause(["shop.refresh"], now=THREE - MINUTE)

        def meanwhile() -> None:
            web1.lock.resume(["shop.refresh"], following=following, now=THREE - SECOND)
            web1.must_run(THREE)

        before_a_row_is_written(web2.lock, meanwhile)
        assert web2.lock.resume(["shop.refresh"], following=following, now=THREE - SECOND) == []
        row = web2.row()
        assert (row.last_due_at, row.next_due_at, row.server) == (THREE, THREE + HOUR, "web1")

    def test_a_version_that_does_not_know_the_schedule_resumes_all_the_same(self, web1: Server) -> None:
        web1.lock.pause(["shop.refresh"], now=THREE - MINUTE)
        at = THREE + MINUTE
        assert web1.lock.resume(["shop.refresh"], following=lambda name, after: None, now=at) == ["shop.refresh"]
        assert web1.run(THREE, now=at) is None
        assert web1.due(THREE + HOUR) == ["shop.refresh"]

    def test_nothing_that_was_due_is_to_be_had_while_the_pause_of_everything_is_undone(
        self, web1: Server, web2: Server
    ) -> None:
        web1.lock.pause(None, now=THREE - MINUTE)
        at = THREE + MINUTE
        lock: Any = web2.lock
        write = lock._line.write
        runs: list[object] = []

        def before(items: Sequence[Any], connection: int) -> Any:
            runs.append(web1.run(THREE, now=at))
            answer = write(items, connection)
            runs.append(web1.run(THREE, now=at))
            return answer

        lock._line.write = before
        assert web2.lock.resume(None, following=following, now=at) == ["shop.refresh"]
        assert runs == [None] * 4, "before and after each of two writes"

    def test_a_task_that_another_store_has_is_not_caught_up_here(self, web1: Server) -> None:
        web1.lock.leave(["shop.refresh"], to="orm", now=THREE - 2 * MINUTE)
        before = web1.row()
        web1.lock.pause(None, now=THREE - MINUTE)
        web1.lock.resume(None, following=following, now=THREE + MINUTE)
        assert web1.row() == before

    def test_two_who_set_a_row_right_at_once_mend_it_once(self, web1: Server, web2: Server) -> None:
        web1.release(web1.must_run(AHEAD), now=AHEAD)
        done: list[Any] = []

        def meanwhile() -> None:
            done.append(web1.set_right(THREE - MINUTE))
            done.append(web1.must_run(THREE))

        before_a_row_is_written(web2.lock, meanwhile)
        assert web2.set_right(THREE - MINUTE) == []
        assert done[0] == ["shop.refresh"]
        assert (web1.row().last_due_at, web1.row().owner) == (THREE, done[1].owner)

    def test_to_set_right_what_was_set_right_changes_nothing_although_the_answer_was_lost(self, web1: Server) -> None:
        web1.release(web1.must_run(AHEAD), now=AHEAD)
        lose_answers(web1.lock, 1)
        with pytest.raises(ConnectionResetError):
            web1.set_right(THREE)
        row = web1.row()
        assert row.last_due_at == THREE
        assert web1.set_right(THREE + SECOND) == []
        assert web1.row() == row

    def test_a_hold_of_a_clock_that_was_ahead_lasts_a_lease_from_now(
        self, web1: Server, web2: Server, cache_store: CacheStore
    ) -> None:
        delete(cache_store, web1.lock, "row:shop.refresh")
        web1.sync(AHEAD)
        assert web1.row().not_before == AHEAD + LEASE
        back = THREE - 10 * MINUTE
        assert web1.set_right(back) == ["shop.refresh"]
        assert web1.row().not_before == back + LEASE
        assert web1.set_right(back) == []
        assert web2.run(THREE) is not None

    def test_many_rows_are_set_right_by_as_many_calls_as_few(self, lock: MemcachedLock, notes: Notes) -> None:
        server = Server(lock, notes, *(a_task(f"shop.task{i:02}") for i in range(60)))
        server.sync(AHEAD)
        reaches = dict.fromkeys(server.declared.tasks, REACH)
        with calls_of(lock) as calls:
            assert lock.set_right(reaches, following=following, now=THREE) == sorted(reaches)
        assert calls == ["read", "read", "write", "read", "write"]

    def test_a_row_that_was_retired_comes_up_in_no_look_after_its_clock_was_set_right(self, web1: Server) -> None:
        web1.release(web1.must_run(AHEAD), now=AHEAD)
        web1.lock.retire(["shop.refresh"], now=AHEAD)
        assert web1.set_right(THREE) == ["shop.refresh"]
        assert web1.row().next_due_at is None

    def test_everything_can_be_paused_in_a_store_that_lost_its_state_and_the_loss_is_told(
        self, web1: Server, web2: Server, cache_store: CacheStore
    ) -> None:
        delete(cache_store, web1.lock, "state")
        web1.lock.pause(None, reason="moving", now=THREE)
        assert is_known(web2, THREE) is False
        assert "paused" in web2.lock.sync(web2.declared, now=THREE).trouble
        look = web2.lock.look(web2.declared, now=THREE)
        assert (look.known, look.paused) == (True, True)
        assert kept(web1.lock, "state")["paused_reason"] == "moving"

    def test_everything_can_be_paused_in_a_store_that_was_never_used(
        self, cache_store: CacheStore, notes: Notes
    ) -> None:
        lock = a_lock()
        server = Server(lock, notes, a_task())
        assert lock.pause(None, now=THREE - HOUR) == []
        synced = sync(server, THREE - HOUR)
        assert (synced.registered, synced.trouble) == (("shop.refresh",), "")
        assert lock.look(server.declared, now=THREE).paused is True
        assert server.run(THREE) is None
        lock.close()

    def test_who_began_in_the_second_of_an_interruption_is_interrupted(self, web1: Server) -> None:
        """The clock tells whole seconds: a pass that began before it may have begun at the very moment it tells."""
        began = web1.lock.look(web1.declared).now
        web1.lock.interrupt()
        interrupted_at = web1.lock.look(web1.declared).interrupted_at
        assert interrupted_at is not None
        assert began < interrupted_at < began + 2 * SECOND

    def test_a_run_is_asked_for_once_although_the_answer_was_lost(self, web1: Server, web2: Server) -> None:
        lose_answers(web1.lock, 1)
        with pytest.raises(ConnectionResetError):
            web1.lock.want("shop.refresh", now=THREE)
        assert web1.lock.want("shop.refresh", now=THREE + SECOND) == THREE
        assert requested(web2, THREE, THREE + SECOND) is not None

    def test_what_was_asked_for_is_run_once_although_the_answer_was_lost(self, web1: Server, web2: Server) -> None:
        web1.lock.want("shop.refresh", now=THREE - MINUTE)
        lose_answers(web1.lock, 1)
        claim = requested(web1, THREE - MINUTE, THREE - MINUTE)
        assert claim is not None
        web1.release(claim, now=THREE - MINUTE)
        assert requested(web2, THREE - MINUTE, THREE - MINUTE) is None

    def test_what_is_asked_for_while_it_starts_is_another_run(self, web1: Server, web2: Server) -> None:
        web1.lock.want("shop.refresh", now=THREE - 2 * MINUTE)

        def meanwhile() -> None:
            claim = requested(web2, THREE - 2 * MINUTE, THREE - MINUTE)
            assert claim is not None
            web2.release(claim, now=THREE - MINUTE)
            assert web2.lock.want("shop.refresh", now=THREE - MINUTE) == THREE - MINUTE

        before_a_row_is_written(web1.lock, meanwhile)
        assert requested(web1, THREE - 2 * MINUTE, THREE - MINUTE) is None
        assert requested(web1, THREE - MINUTE, THREE - MINUTE) is not None

    def test_a_want_that_a_pause_came_before_is_refused(self, web1: Server, web2: Server) -> None:
        before_a_row_is_written(web1.lock, lambda: web2.lock.pause(["shop.refresh"], now=THREE))
        assert web1.lock.want("shop.refresh", now=THREE) is None
        assert web1.row().wanted_at is None

    def test_who_cancels_does_not_cancel_whoever_came_between(self, web1: Server, web2: Server) -> None:
        seen = web1.must_run(THREE)
        newer: list[Claim] = []

        def meanwhile() -> None:
            web1.release(seen, now=THREE + SECOND)
            newer.append(web1.must_run(THREE + HOUR))

        before_a_row_is_written(web2.lock, meanwhile)
        assert web2.lock.cancel({"shop.refresh": seen.owner}, now=THREE + HOUR) == []
        assert web1.renew(*newer, now=THREE + HOUR + SECOND) == [True]

    def test_a_renewal_that_a_cancellation_came_before_does_not_undo_it(self, web1: Server, web2: Server) -> None:
        claim = web1.must_run(THREE)
        before_a_row_is_written(web1.lock, lambda: web2.lock.cancel({"shop.refresh": claim.owner}, now=THREE))
        assert web1.renew(claim, now=THREE + 10 * SECOND) == [False]
        row = web2.row()
        assert (row.cancelled, row.expires_at) == (True, THREE + LEASE)

    def test_a_cancelled_holder_whose_row_is_lost_releases_it_all_the_same(self, web1: Server, web2: Server) -> None:
        claim = web1.must_run(THREE)
        web2.lock.cancel({"shop.refresh": claim.owner}, now=THREE + SECOND)
        assert web1.renew(claim, now=THREE + 2 * SECOND) == [False]
        delete_all(web1.lock)
        assert web1.release(claim, now=THREE + 3 * SECOND) == [True]

    def test_nothing_is_claimed_or_skipped_while_all_is_paused(self, web1: Server, web2: Server) -> None:
        web1.lock.pause(None, now=THREE)
        look = web2.lock.look(web2.declared, now=THREE)
        assert (look.paused, look.due, look.known) == (True, (), True)
        assert web2.run(THREE) is None
        assert web2.skip(THREE, now=THREE, reason="missed") is None
        assert web2.run(THREE, trigger="manual") is not None


@contextlib.contextmanager
def calls_of(lock: Any) -> Iterator[list[str]]:
    """Note what is sent to the server, beside what time it is."""
    calls: list[str] = []
    line = lock._line

    def noted(name: str) -> Callable[..., Any]:
        call = getattr(type(line), name)

        def noting(*args: Any) -> Any:
            if args[0]:
                calls.append(name)
            return call(line, *args)

        return noting

    for name in ("read", "write"):
        setattr(line, name, noted(name))
    try:
        yield calls
    finally:
        del line.read, line.write


# -- rows that nobody needs any more ----------------------------------------------------------------------------------


class TestRowsThatNobodyNeeds:
    OWN = "shop.own@web9"

    @pytest.fixture
    def tasks(self) -> Any:
        return a_task(), a_task("shop.own", on_every_server=True)

    @pytest.fixture
    def here(self, lock: MemcachedLock, notes: Notes, tasks: Any) -> Server:
        server = Server(lock, notes, *tasks)
        server.sync(THREE - HOUR / 2)
        return server

    @pytest.fixture
    def web9(self, other: MemcachedLock, notes: Notes, tasks: Any, here: Server) -> Server:
        server = Server(other, notes, *tasks, name="web9")
        server.sync(THREE - HOUR / 2)
        return server

    def test_what_was_forgotten_is_read_by_no_look_and_missed_by_none(self, here: Server, web9: Server) -> None:
        watcher = Server(a_lock(), here.notes, *here.declared.tasks.values(), name="web2")
        watcher.sync(THREE - MINUTE)
        assert here.lock.forget([self.OWN], now=THREE) == [self.OWN]
        for server in (here, watcher):
            assert is_known(server, THREE) is True
            assert server.lock.sync(server.declared, now=THREE).trouble == ""
            assert self.OWN not in {row.task for row in server.lock.rows()}
            lock: Any = server.lock
            read = lock._line.read
            asked: list[bytes] = []
            lock._line.read = lambda items, read=read, asked=asked: asked.extend(items) or read(items)
            server.lock.look(server.declared, now=THREE)
            assert lock._items.key("row:shop.refresh") in asked
            assert lock._items.key("row:" + self.OWN) not in asked
        watcher.lock.close()

    def test_a_server_that_was_taken_for_gone_registers_again_and_says_nothing_of_a_loss(
        self, here: Server, web9: Server
    ) -> None:
        own = web9.declared.tasks["shop.own"]
        at = THREE.replace(microsecond=0)
        (claim,) = web9.claim(web9.occurrence(at, own), now=at)
        web9.release(claim, now=at)
        assert here.lock.forget([self.OWN], now=at) == [self.OWN]
        assert is_known(web9, at) is False
        known = {self.OWN: Before(last_due_at=at)}
        synced = web9.lock.sync(
            web9.declared, elsewhere=lambda names: {n: known[n] for n in names if n in known}, now=at
        )
        assert (synced.registered, dict(synced.lost), synced.trouble) == ((self.OWN,), {}, "")
        assert is_known(web9, at) is True and is_known(here, at) is True
        assert web9.claim(web9.occurrence(at, own), now=at + LEASE) == []
        (again,) = web9.claim(web9.occurrence(THREE + HOUR, own), now=THREE + HOUR)
        assert again.fence > claim.fence

    def test_its_fence_rises_within_a_second_too(self, here: Server, web9: Server) -> None:
        own = web9.declared.tasks["shop.own"]
        (claim,) = web9.claim(web9.occurrence(THREE, own), now=THREE)
        web9.release(claim, now=THREE)
        here.lock.forget([self.OWN], now=THREE)
        web9.sync(THREE)
        (again,) = web9.claim(web9.occurrence(THREE, own, trigger="manual"), now=THREE)
        assert again.fence > claim.fence

    def test_a_server_whose_row_was_emptied_away_is_told_of_the_loss(self, here: Server, web9: Server) -> None:
        delete_all(here.lock)
        here.sync(THREE)
        fresh = Server(a_lock(), here.notes, *here.declared.tasks.values(), name="web9")
        known = {self.OWN: Before(last_due_at=THREE - MINUTE)}
        synced = fresh.lock.sync(
            fresh.declared, elsewhere=lambda names: {n: known[n] for n in names if n in known}, now=THREE + HOUR / 2
        )
        assert synced.lost == {self.OWN: THREE - MINUTE}
        fresh.lock.close()

    def test_a_list_of_names_that_was_lost_and_written_again_forgets_nothing(
        self, here: Server, web9: Server, cache_store: CacheStore
    ) -> None:
        """Only who takes a name off means it: a process that knows the name sees that it was not so."""
        here.lock.rows()
        assert self.OWN in {row.task for row in here.lock.rows()}
        delete(cache_store, here.lock, "names:0", "row:" + self.OWN)
        stranger = Server(a_lock(), here.notes, a_task(), name="web2")
        stranger.sync(THREE)
        assert self.OWN not in kept(here.lock, "names:0")["names"]
        assert is_known(here, THREE) is False
        assert here.lock.sync(here.declared, now=THREE).trouble == "rows were lost"
        assert self.OWN in {row.task for row in here.lock.rows()}
        stranger.lock.close()

    def test_a_row_that_was_claimed_meanwhile_stays_and_is_named_again(self, here: Server, web9: Server) -> None:
        own = web9.declared.tasks["shop.own"]
        claims: list[Claim] = []
        before_a_row_is_written(here.lock, lambda: claims.extend(web9.claim(web9.occurrence(THREE, own), now=THREE)))
        assert here.lock.forget([self.OWN], now=THREE) == []
        assert self.OWN in kept(here.lock, "names:0")["names"]
        assert web9.renew(*claims, now=THREE + SECOND) == [True]
        stranger = Server(a_lock(), here.notes, a_task(), name="web2")
        assert [cleanup.task for cleanup in stranger.reap(THREE + MINUTE)] == [self.OWN]
        stranger.lock.close()

    def test_nobody_takes_it_for_lost_while_it_is_forgotten(self, here: Server, web9: Server) -> None:
        watcher = Server(a_lock(), here.notes, *here.declared.tasks.values(), name="web2")
        watcher.sync(THREE - MINUTE)
        seen: list[object] = []

        def look() -> None:
            seen.append((is_known(watcher, THREE), watcher.lock.sync(watcher.declared, now=THREE).trouble))

        before_a_row_is_written(here.lock, look)
        assert here.lock.forget([self.OWN], now=THREE) == [self.OWN]
        look()
        assert seen == [(True, ""), (True, "")]
        watcher.lock.close()

    def test_nor_who_has_read_its_name_before(self, here: Server, web9: Server) -> None:
        watcher: Any = Server(a_lock(), here.notes, a_task(), name="web2")
        watcher.sync(THREE - MINUTE)
        watcher.lock._items.names.clear()
        read = watcher.lock._line.read
        left = [lambda: here.lock.forget([self.OWN], now=THREE)]

        def after_the_names(items: Sequence[bytes]) -> Any:
            found = read(items)
            if left and any(b":names:" in key for key in items):
                assert left.pop()() == [self.OWN]
            return found

        watcher.lock._line.read = after_the_names
        assert watcher.lock.sync(watcher.declared, now=THREE).trouble == ""
        assert not left
        assert is_known(watcher, THREE) is True
        assert here.lock.rows([self.OWN]) == []
        watcher.lock.close()

    def test_whoever_dies_before_the_row_is_deleted_leaves_it_to_its_server(self, here: Server, web9: Server) -> None:
        def dies() -> None:
            raise KeyboardInterrupt

        before_a_row_is_written(here.lock, dies)
        with pytest.raises(KeyboardInterrupt):
            here.lock.forget([self.OWN], now=THREE)
        assert is_known(here, THREE) is True
        assert self.OWN not in {row.task for row in here.lock.rows()}
        assert is_known(web9, THREE) is False
        assert web9.lock.sync(web9.declared, now=THREE).trouble == ""
        assert self.OWN in {row.task for row in here.lock.rows()}

    def test_a_row_whose_clean_up_is_not_recorded_is_not_forgotten(
        self, here: Server, web9: Server, notes: Notes
    ) -> None:
        own = web9.declared.tasks["shop.own"]
        web9.claim(web9.occurrence(THREE, own), now=THREE)
        here.lock.reap(server="web1", record=lambda cleanups: [], now=THREE + LEASE)
        assert here.lock.forget([self.OWN], now=THREE + LEASE) == []
        here.reap(THREE + LEASE)
        assert len(notes.cleanups) == 1
        assert here.lock.forget([self.OWN], now=THREE + LEASE) == [self.OWN]

    def test_what_is_forgotten_makes_room_in_the_list_of_names(
        self, lock: MemcachedLock, notes: Notes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Servers whose names are made up at each start would else lengthen it for ever."""
        monkeypatch.setattr(memcached.rows, "PART_BYTES", 60)
        own = a_task("own", on_every_server=True)
        for turn in range(30):
            server = Server(lock, notes, own, name=f"container-{turn:03}")
            server.sync(THREE + turn * MINUTE)
            if turn >= 5:
                gone = f"own@container-{turn - 5:03}"
                assert lock.forget([gone], now=THREE + turn * MINUTE) == [gone]
        assert sorted(row.task for row in lock.rows()) == [f"own@container-{turn:03}" for turn in range(25, 30)]
        assert kept(lock, "names:4") is None
        fresh = Server(a_lock(), notes, own, name="container-029")
        assert is_known(fresh, THREE + HOUR) is True
        fresh.lock.close()

    def test_a_deleted_row_is_deleted_only_as_it_was_read(self, here: Server, web9: Server) -> None:
        lock: Any = here.lock
        key = "row:" + self.OWN
        with lock._line.call():
            read = lock._items.read([key], THREE)
        put(web9.lock, key, stamp="somebody's")
        with lock._line.call():
            assert lock._items.write(read, {key: None}) == {key: False}
            read = lock._items.read([key], THREE)
            assert lock._items.write(read, {key: None}) == {key: True}
            assert lock._items.write(read, {key: {}}) == {key: False}, "and nobody who read it brings it back"
        assert kept(lock, key) is None

    def test_a_retired_row_is_brought_back_by_the_version_that_holds_its_schedule_alone(
        self, web1: Server, other: MemcachedLock, notes: Notes
    ) -> None:
        newer = Server(other, notes, a_task("shop.else"), name="web2")
        newer.sync(THREE - MINUTE)
        assert other.retire(["shop.refresh"], now=THREE - MINUTE) == ["shop.refresh"]
        assert is_known(web1, THREE) is True
        assert web1.lock.sync(web1.declared, now=THREE).changed == ()
        put(other, "state", pid=1)
        web1.sync(THREE)
        assert web1.row().next_due_at is None, "nor by a restart"
        assert web1.due(THREE + HOUR) == []
        gone = THREE + 10 * MINUTE
        assert is_known(web1, gone) is False
        assert web1.sync(gone) == ([], ["shop.refresh"])
        assert web1.row().next_due_at == THREE + HOUR
        assert is_known(web1, gone) is True

    def test_a_retired_row_of_a_schedule_that_is_over_comes_back_once(
        self, lock: MemcachedLock, other: MemcachedLock, notes: Notes
    ) -> None:
        over = Never()
        server = Server(lock, notes, a_task(timetable=over))
        server.sync(THREE)
        assert is_known(server, THREE) is True
        lock.retire(["shop.refresh"], now=THREE)
        assert is_known(server, THREE) is False
        assert server.sync(THREE) == ([], ["shop.refresh"])
        assert is_known(server, THREE) is True


class Never:
    """A schedule whose last due time was long ago."""

    text = "never"
    is_subminute = False

    def next(self, after: Any) -> None:
        """There is none."""


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
        "pause": lambda: lock.pause(["shop.refresh"], now=now),
        "pause of everything": lambda: lock.pause(None, now=now),
        "resume": lambda: lock.resume(["shop.refresh"], following=following, now=now),
        "resume of everything": lambda: lock.resume(None, following=following, now=now),
        "interrupt": lambda: lock.interrupt(now=now),
        "want": lambda: lock.want("shop.refresh", now=now),
        "cancel": lambda: lock.cancel({"shop.refresh": claim.owner}, now=now),
        "retire": lambda: lock.retire(["shop.refresh"], now=now),
        "forget": lambda: lock.forget(["shop.refresh@web9"], now=now),
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
                assert time.monotonic() - began < 5, name
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
        assert time.monotonic() - began < 4.5
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
        assert time.monotonic() - began < 15
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
                read = lock._items.read(["row:x"], THREE)
                key, (_, token) = lock._items.key("state"), read.found["state"]
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
        return int(lock._items.read([], None).found["state"][1])
