"""The ORM lock: the contract on each database, and what is its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, OperationalError, connections, transaction

from multiserver_schedule.cron import Every
from multiserver_schedule.entries import Claim, ReleasedClaim, Skip
from multiserver_schedule.exceptions import StoreTimeout, UnsafeTransaction
from multiserver_schedule.history import History
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.models import CleanupLog, ScheduledLock, ScheduledRun, ScheduleState
from multiserver_schedule.testing.contract import (
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
    following,
)

from .servers import Server as Server_
from .stores import Store


class TestORMLock(LockContract):
    """The facts of every lock, on SQLite, PostgreSQL and MariaDB."""

    @pytest.fixture
    def lock(self, store: Store) -> ORMLock:
        return ORMLock("default", {"using": store.alias})

    @pytest.fixture
    def notes(self, store: Store) -> Notes:
        return Notes(History(store.alias))


class Unlocked(ORMLock):
    """The lock with neither row locks nor a look before the UPDATE, as on a database that has none."""

    def _startable(self, chunk: Any, clock: Any) -> Any:
        return list(chunk)

    def _lock_rows(self, rows: Any, *, skip_locked: bool) -> Any:
        return rows


class TestTheGuardsOfTheUpdateAlone(LockContract):
    """Safety does not rest on row locks: the UPDATE asks every condition itself."""

    # Which rows are free is what the look at the locked rows finds.
    test_slots_go_to_what_may_run = None
    test_a_server_claims_no_more_than_it_has_slots = None

    @pytest.fixture
    def lock(self, db: None) -> ORMLock:
        return Unlocked("default", {})

    @pytest.fixture
    def notes(self) -> Notes:
        return Notes(History("default"))


UTC = timezone.utc
HALF_PAST_TWO = THREE - HOUR / 2


@pytest.fixture
def lock(store: Store) -> ORMLock:
    return ORMLock("default", {"using": store.alias})


@pytest.fixture
def notes(store: Store) -> Notes:
    return Notes(History(store.alias))


@pytest.fixture
def web1(lock: ORMLock, notes: Notes) -> Server:
    server = Server(lock, notes, a_task())
    server.sync(HALF_PAST_TWO)
    return server


@pytest.fixture
def reconnected(store: Store) -> Iterator[Callable[..., None]]:
    """Return a function that opens the connection anew with other options; they are gone after the test."""
    connection = connections[store.alias]
    before = connection.settings_dict["OPTIONS"]

    def reconnect(**options: Any) -> None:
        connection.close()
        connection.settings_dict["OPTIONS"] = {**before, **options}

    yield reconnect
    connection.close()
    connection.settings_dict["OPTIONS"] = before


def live_through_a_day(lock: ORMLock, notes: Notes) -> None:
    """Do everything once by the database's own clock, and see that it agrees with ours."""
    web1, web2 = (Server(lock, notes, a_task(), a_task("shop.both", overlap="allow"), name=n) for n in ("web1", "web2"))
    began = datetime.now(UTC)
    due, later = began - MINUTE, began - 30 * SECOND
    web1.sync(began - HOUR)
    assert lock.look(web1.declared).known is True
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
    assert lock.claim([web1.occurrence(began)], server="web1", record=notes.started) == []
    manual = web1.occurrence(began, trigger="manual", lease=timedelta(0))
    assert len(lock.claim([manual], server="web1", record=notes.started)) == 1
    assert lock.look(web1.declared).expired is True
    assert [cleanup.cleaned_by for cleanup in lock.reap(server="web2", record=notes.cleaned)] == ["web2"]


def test_the_databases_clock_is_utc(store: Store, lock: ORMLock) -> None:
    before = datetime.now(UTC)
    assert before - SECOND < lock.clock() < datetime.now(UTC) + SECOND


def test_everything_goes_by_the_databases_clock(lock: ORMLock, notes: Notes) -> None:
    live_through_a_day(lock, notes)


@pytest.mark.parametrize("zone", ["+05:00", "-11:00"])
def test_the_sessions_time_zone_does_not_matter(
    store: Store, lock: ORMLock, notes: Notes, reconnected: Callable[..., None], zone: str
) -> None:
    """Django's own ``Now()`` is five hours off on MySQL then."""
    if store.vendor != "mysql":
        pytest.skip("Django sets the zone of the session elsewhere")
    reconnected(init_command=f"SET SESSION time_zone='{zone}'")
    live_through_a_day(lock, notes)
    with connections[store.alias].cursor() as cursor:
        cursor.execute("SELECT @@SESSION.time_zone")
        assert cursor.fetchone() == (zone,)


@pytest.mark.parametrize("level", ["REPEATABLE_READ", "SERIALIZABLE"])
def test_it_works_at_the_stricter_isolation_levels(
    store: Store, lock: ORMLock, notes: Notes, reconnected: Callable[..., None], level: str
) -> None:
    if store.vendor == "sqlite":
        pytest.skip("SQLite has one")
    if store.vendor == "postgresql":
        psycopg = pytest.importorskip("psycopg")
        reconnected(isolation_level=psycopg.IsolationLevel[level])
    else:
        reconnected(isolation_level=level.replace("_", " ").lower())
    live_through_a_day(lock, notes)


@pytest.mark.parametrize("mode", ["DEFERRED", "IMMEDIATE", "EXCLUSIVE"])
def test_it_works_in_every_transaction_mode_of_sqlite(
    store: Store, lock: ORMLock, notes: Notes, reconnected: Callable[..., None], mode: str
) -> None:
    if store.vendor != "sqlite":
        pytest.skip("SQLite's own option")
    reconnected(transaction_mode=mode)
    live_through_a_day(lock, notes)


# -- transactions of the caller, and broken stores ---------------------------------------------------------------------


def test_a_claim_inside_a_transaction_of_the_caller_is_refused(store: Store, web1: Server) -> None:
    """It would be undone with the transaction, while the run goes on."""
    occurrence = web1.occurrence(THREE)
    with transaction.atomic(using=store.alias), pytest.raises(UnsafeTransaction, match="inside a transaction"):
        web1.claim(occurrence, now=THREE)
    assert len(web1.claim(occurrence, now=THREE)) == 1


def test_to_set_right_inside_a_transaction_of_the_caller_is_refused(store: Store, web1: Server) -> None:
    with transaction.atomic(using=store.alias), pytest.raises(UnsafeTransaction):
        web1.set_right(THREE)


def test_what_is_set_right_goes_by_the_databases_clock(lock: ORMLock, notes: Notes) -> None:
    server = Server(lock, notes, a_task())
    server.sync(datetime.now(UTC) + DAY)
    lock.want("shop.refresh", now=datetime.now(UTC) + DAY)
    assert lock.set_right({"shop.refresh": REACH}, following=following) == ["shop.refresh"]
    row = server.row()
    assert abs(row.last_due_at - datetime.now(UTC)) < MINUTE
    assert row.next_due_at == following("", row.last_due_at)
    # What was asked for is to be had, by the very moment that it has now.
    assert row.wanted_at is not None
    asked = server.occurrence(row.wanted_at, trigger="manual", requested=True)
    assert len(lock.claim([asked], server="web1", record=notes.started)) == 1


def test_a_claim_without_autocommit_is_refused(store: Store, web1: Server) -> None:
    occurrence = web1.occurrence(THREE)
    transaction.set_autocommit(False, using=store.alias)
    try:
        with pytest.raises(UnsafeTransaction, match="autocommit"):
            web1.claim(occurrence, now=THREE)
    finally:
        transaction.rollback(using=store.alias)
        transaction.set_autocommit(True, using=store.alias)
    assert web1.row().owner is None


@pytest.mark.django_db
def test_it_works_inside_a_test_case() -> None:
    server = Server(ORMLock("default", {}), Notes(History("default")), a_task())
    server.sync(HALF_PAST_TWO)
    assert server.run(THREE) is not None
    assert server.run(THREE) is None


def test_a_broken_store_is_an_error_and_not_another_server(store: Store, web1: Server) -> None:
    """A missing table that counted as "somebody else has it" made jobs run nowhere, without a word."""
    occurrence = web1.occurrence(THREE)
    with connections[store.alias].schema_editor() as editor:
        editor.alter_db_table(ScheduledRun, "multiserver_schedule_scheduledrun", "gone")
    try:
        with pytest.raises(DatabaseError):
            web1.claim(occurrence, now=THREE)
    finally:
        with connections[store.alias].schema_editor() as editor:
            editor.alter_db_table(ScheduledRun, "gone", "multiserver_schedule_scheduledrun")
    assert web1.row().owner is None, "claim and record stand or fall together"
    assert len(web1.claim(occurrence, now=THREE)) == 1


def test_a_record_that_fails_undoes_the_claim(web1: Server) -> None:
    def fail(claims: Sequence[Claim], now: datetime) -> None:
        raise RuntimeError("no record")

    before = web1.row()
    with pytest.raises(RuntimeError, match="no record"):
        web1.lock.claim([web1.occurrence(THREE)], server="web1", record=fail, now=THREE)
    assert web1.row() == before


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ImproperlyConfigured, match="'usin'"):
        ORMLock("default", {"usin": "default"})


# -- pausing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ORMLock, Unlocked])
def test_nothing_is_claimed_or_skipped_while_a_task_is_paused(store: Store, notes: Notes, kind: type[ORMLock]) -> None:
    web1 = Server(kind("default", {"using": store.alias}), notes, a_task())
    web1.sync(HALF_PAST_TWO)
    claim = web1.must_run(THREE)
    ScheduledLock.objects.using(store.alias).update(paused_at=THREE)
    before = web1.row()
    later = THREE + HOUR
    assert web1.due(later) == []
    assert web1.skip(later, now=later, reason="missed") is None
    assert web1.row() == before
    assert web1.lock.look(web1.declared, now=later).expired is True, "a paused task's lock is freed all the same"
    assert [cleanup.owner for cleanup in web1.reap(later)] == [claim.owner]
    assert web1.run(later) is None
    assert web1.run(later, trigger="manual") is not None


@pytest.mark.parametrize("kind", [ORMLock, Unlocked])
def test_nothing_is_claimed_or_skipped_while_everything_is_paused(
    store: Store, notes: Notes, kind: type[ORMLock]
) -> None:
    web1 = Server(kind("default", {"using": store.alias}), notes, a_task())
    web1.sync(HALF_PAST_TWO)
    ScheduleState.objects.using(store.alias).filter(key=ScheduleState.PROJECT).update(
        paused_at=THREE, interrupted_at=THREE
    )
    look = web1.lock.look(web1.declared, now=THREE)
    assert (look.paused, look.due, look.interrupted_at) == (True, (), THREE)
    assert web1.run(THREE) is None
    assert web1.skip(THREE, now=THREE, reason="missed") is None
    assert web1.run(THREE, trigger="manual") is not None


# -- runs that may overlap ---------------------------------------------------------------------------------------------


@pytest.fixture
def both(lock: ORMLock, notes: Notes) -> Server:
    server = Server(lock, notes, a_task(overlap="allow", limit=2 * HOUR))
    server.sync(HALF_PAST_TWO)
    return server


def run_of(store: Store, claim: Claim) -> ScheduledRun:
    return ScheduledRun.objects.using(store.alias).get(owner=claim.owner)


def test_a_task_that_may_overlap_runs_once_per_due_time_and_beside_itself(store: Store, both: Server) -> None:
    first = both.must_run(THREE)
    assert both.run(THREE) is None
    second = both.must_run(THREE + HOUR)
    assert first.fence < second.fence
    assert both.row().owner is None
    assert second.finish_by == THREE + 3 * HOUR
    assert run_of(store, second).expires_at == THREE + HOUR + LEASE


def test_overlapping_runs_are_renewed_and_released_each_by_its_own(store: Store, both: Server) -> None:
    first = both.must_run(THREE, now=THREE + HOUR - 10 * SECOND)
    second = both.must_run(THREE + HOUR)
    at = THREE + HOUR + 5 * SECOND
    assert both.renew(first, second, now=at) == [True, True]
    assert run_of(store, first).expires_at == at + LEASE
    assert both.release(first, now=at) == [True]
    assert both.release(first, now=at) == [True]
    assert (run_of(store, first).status, run_of(store, first).expires_at) == ("succeeded", None)
    assert both.renew(first, second, now=at) == [False, True]
    assert run_of(store, second).status == "running"


def test_an_overlapping_run_of_a_dead_server_is_cleaned_up(store: Store, both: Server) -> None:
    claim = both.must_run(THREE)
    assert both.lock.look(both.declared, now=THREE + LEASE).expired is True
    (cleanup,) = both.reap(THREE + LEASE)
    assert (cleanup.owner, cleanup.fence, cleanup.due_at) == (claim.owner, claim.fence, THREE)
    assert CleanupLog.objects.using(store.alias).get().pk == cleanup.pk
    assert run_of(store, claim).status == "abandoned"
    assert both.reap(THREE + LEASE) == []
    assert both.renew(claim, now=THREE + LEASE) == [False]
    assert both.release(claim, now=THREE + LEASE) == [False]
    assert run_of(store, claim).status == "lost"


def test_overlapping_runs_take_slots(lock: ORMLock, notes: Notes, both: Server) -> None:
    both.claim(both.occurrence(THREE), now=THREE, slots=1)
    again = both.occurrence(THREE + SECOND)
    assert both.claim(again, now=THREE + LEASE - SECOND, slots=1) == []
    assert len(both.claim(again, now=THREE + LEASE, slots=1)) == 1


def test_a_lock_and_a_run_of_the_same_number_take_two_slots(store: Store, lock: ORMLock, notes: Notes) -> None:
    names = ("a", "b", "c")
    tasks = {name: a_task(name, overlap="allow" if name == "b" else "skip") for name in names}
    web1 = Server(lock, notes, *tasks.values())
    web1.sync(HALF_PAST_TWO)
    due = {name: web1.occurrence(THREE, task) for name, task in tasks.items()}
    first, beside = web1.claim(due["a"], due["b"], now=THREE, slots=2)
    run_of(store, first).delete()
    ScheduledRun.objects.using(store.alias).filter(owner=beside.owner).update(id=due["a"].pk)
    assert web1.claim(due["c"], now=THREE, slots=2) == []
    assert len(web1.claim(due["c"], now=THREE, slots=3)) == 1


# -- state -------------------------------------------------------------------------------------------------------------


def test_looking_refreshes_when_a_version_was_seen_once_a_minute(store: Store, web1: Server) -> None:
    state = ScheduleState.objects.using(store.alias).filter(key__startswith="declared:")
    web1.lock.look(web1.declared, now=HALF_PAST_TWO + 59 * SECOND)
    assert state.get().seen_at == HALF_PAST_TWO
    web1.lock.look(web1.declared, now=HALF_PAST_TWO + 61 * SECOND)
    assert state.get().seen_at == HALF_PAST_TWO + 61 * SECOND


def test_a_clock_that_was_set_back_does_not_leave_the_older_version_the_newest(
    store: Store, lock: ORMLock, notes: Notes, web1: Server
) -> None:
    newer = Server(lock, notes, a_task(timetable=Every(2 * HOUR)))
    assert newer.sync(HALF_PAST_TWO - HOUR) == ([], ["shop.refresh"])
    assert newer.sync(HALF_PAST_TWO - HOUR) == ([], [])
    assert web1.sync(HALF_PAST_TWO - HOUR) == ([], [])
    assert lock.look(newer.declared, now=HALF_PAST_TWO + 10 * MINUTE).known is True


def test_state_of_servers_and_versions_that_are_long_gone_is_dropped(
    store: Store, lock: ORMLock, notes: Notes, web1: Server
) -> None:
    web1.must_run(THREE)
    later = THREE + 31 * DAY
    Server(lock, notes, a_task("shop.new"), name="web2").sync(later)
    keys = set(ScheduleState.objects.using(store.alias).values_list("key", flat=True))
    assert len(keys) == 2
    assert ScheduleState.PROJECT in keys
    web1.reap(later)
    assert web1.run(later) is not None


def test_a_sync_that_breaks_off_leaves_no_half_set(
    store: Store, lock: ORMLock, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bring_in_step(*args: Any) -> Any:
        ORMLock._bring_in_step(lock, *args)
        raise DatabaseError("the disk is full")

    server = Server(lock, notes, a_task("a"), a_task("b"))
    monkeypatch.setattr(lock, "_bring_in_step", bring_in_step)
    with pytest.raises(DatabaseError, match="full"):
        server.sync(THREE)
    assert lock.rows() == []
    assert lock.look(server.declared, now=THREE).known is False


def test_a_task_whose_due_times_cannot_be_computed_keeps_no_other_from_being_registered(
    lock: ORMLock, notes: Notes
) -> None:
    class Broken:
        text = "broken"

        def next(self, after: datetime) -> datetime | None:
            raise KeyError("Europe/Nowhere")

    server = Server(lock, notes, a_task("broken", Broken()), a_task("sound"))
    assert server.sync(THREE - HOUR) == (["broken", "sound"], [])
    # Found by each look: whoever looks says what is wrong with it.
    assert server.due(THREE) == ["broken", "sound"]


def test_a_server_that_is_frozen_in_the_middle_of_a_claim_holds_up_the_others_no_longer_than_its_limit(
    store: Store,
) -> None:
    """Seen in a drill: its row locks were passed over by everybody else for as long as it was frozen."""
    if store.name == "sqlite":
        pytest.skip("SQLite has no such limit: its servers are processes of one machine")
    lock = ORMLock("default", {"using": store.alias})
    server = Server(lock, Notes(), a_task())
    server.sync(THREE - HOUR)
    due = server.occurrence(THREE)
    inside, thaw = threading.Event(), threading.Event()
    raised: list[BaseException] = []

    def freeze(claims: Sequence[Claim], now: datetime) -> None:
        inside.set()
        thaw.wait(30)

    def claim_and_freeze() -> None:
        frozen = ORMLock("default", {"using": store.alias})
        frozen.bound(timedelta(seconds=1))
        try:
            frozen.claim([due], server="web2", record=freeze, now=THREE)
        except BaseException as error:
            raised.append(error)
        finally:
            connections[store.alias].close()

    thread = threading.Thread(target=claim_and_freeze)
    thread.start()
    assert inside.wait(10)
    try:
        assert server.claim(due, now=THREE) == []
        until = time.monotonic() + 10
        claims: list[Claim] = []
        while not claims and time.monotonic() < until:
            time.sleep(0.1)
            claims = server.claim(due, now=THREE)
        assert [claim.server for claim in claims] == ["web1"]
    finally:
        thaw.set()
        thread.join()
    assert len(raised) == 1  # whoever wakes up has claimed nothing
    assert server.row().owner == claims[0].owner


# -- a server that hangs -----------------------------------------------------------------------------------------------


@pytest.fixture
def freezable(store: Store) -> Iterator[Server_]:
    if store.server is None:
        pytest.skip("no server of ours to freeze")
    yield store.server
    store.server.thaw()


@contextmanager
def cut_soon(lock: ORMLock) -> Iterator[None]:
    """Cut the call inside, which must then fail at once."""
    done: list[bool] = []
    timer = threading.Timer(0.3, lambda: done.append(lock.cut()))
    began = time.monotonic()
    timer.start()
    with pytest.raises(StoreTimeout):
        yield
    assert time.monotonic() - began < 10
    timer.join()
    assert done == [True]


@pytest.mark.parametrize("call", ["renew", "look", "reap", "claim"])
def test_a_call_that_hangs_is_cut_and_the_next_one_works(freezable: Server_, web1: Server, call: str) -> None:
    claim = web1.must_run(THREE)
    later = web1.occurrence(THREE + HOUR)
    freezable.freeze()
    with cut_soon(web1.lock):
        if call == "renew":
            web1.renew(claim, now=THREE + SECOND)
        elif call == "look":
            web1.lock.look(web1.declared, now=THREE + SECOND)
        elif call == "reap":
            web1.reap(now=THREE + SECOND)
        else:
            web1.claim(later, now=THREE + HOUR)
    freezable.thaw()
    assert web1.renew(claim, now=THREE + 2 * SECOND) == [True]


def test_connecting_to_a_server_that_hangs_is_cut_too(freezable: Server_, web1: Server) -> None:
    claim = web1.must_run(THREE)
    web1.lock.close()
    freezable.freeze()
    with cut_soon(web1.lock):
        web1.renew(claim, now=THREE + SECOND)
    freezable.thaw()
    assert web1.renew(claim, now=THREE + 2 * SECOND) == [True]


def test_a_claim_whose_commit_hung_is_ours_or_nobodys(freezable: Server_, web1: Server, notes: Notes) -> None:
    """The server may commit when it wakes up: nobody may then wait for a lease that nobody runs under."""

    def freeze(claims: Sequence[Claim], now: datetime) -> None:
        notes.started(claims, now)
        freezable.freeze()
        threading.Timer(0.3, web1.lock.cut).start()
        threading.Timer(0.8, freezable.thaw).start()

    try:
        claims = web1.lock.claim([web1.occurrence(THREE)], server="web1", record=freeze, now=THREE)
    except (StoreTimeout, DatabaseError):
        claims = []
    deadline = time.monotonic() + 3
    while not claims and time.monotonic() < deadline:
        time.sleep(0.05)
        claims = web1.lock.claim([], server="web1", record=notes.started, now=THREE)
        if web1.row().owner is None and time.monotonic() > deadline - 2:
            break
    assert [claim.owner for claim in claims] == ([web1.row().owner] if web1.row().owner else [])


def test_a_lost_answer_to_a_commit_is_settled_by_asking(
    store: Store, web1: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = connections[store.alias]
    commit = connection._commit

    def lose(*args: Any) -> None:
        monkeypatch.setattr(connection, "_commit", commit)
        commit()
        raise OperationalError("server has gone away")

    assert web1.run(THREE, now=THREE - SECOND) is None  # The first claim of a server has more than one commit.
    occurrence = web1.occurrence(THREE)
    monkeypatch.setattr(connection, "_commit", lose)
    (claim,) = web1.claim(occurrence, now=THREE)
    assert claim.owner == web1.row().owner
    assert claim.occurrence == occurrence
    assert (claim.acquired_at, claim.expires_at) == (THREE, THREE + LEASE)
    assert web1.release(claim, now=THREE + SECOND) == [True]


def test_a_claim_that_was_not_committed_is_an_error(
    store: Store, web1: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = connections[store.alias]
    commit = connection._commit

    def lose(*args: Any) -> None:
        monkeypatch.setattr(connection, "_commit", commit)
        connection._rollback()
        raise OperationalError("server has gone away")

    assert web1.run(THREE, now=THREE - SECOND) is None  # The first claim of a server has more than one commit.
    occurrence = web1.occurrence(THREE)
    monkeypatch.setattr(connection, "_commit", lose)
    with pytest.raises(OperationalError, match="gone away"):
        web1.claim(occurrence, now=THREE)
    assert len(web1.claim(occurrence, now=THREE)) == 1


def test_there_is_nothing_to_cut_between_calls(lock: ORMLock, web1: Server) -> None:
    assert lock.cut() is False
    assert web1.run(THREE) is not None
