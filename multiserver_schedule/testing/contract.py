"""
The facts that every lock store keeps. An author of another store inherits them, and is told where it breaks a promise:

    from multiserver_schedule.testing.contract import LockContract

    class TestMyLock(LockContract):
        @pytest.fixture
        def lock(self):
            return MyLock("default", {})    # on an empty store

Time is passed in: no test sleeps, and none depends on a clock.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, Protocol

import pytest

from ..cron import Cron, Every
from ..entries import Claim, Cleanup, DueTimes, Occurrence, Outcome, ReleasedClaim, Row, ScheduledTask, Skip, Trigger
from ..locks.ahead import Reach
from ..locks.base import BaseLock, Before, Declarations, Elsewhere, nowhere_else

THREE = datetime(2030, 1, 1, 3, tzinfo=timezone.utc)
SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
LEASE = timedelta(seconds=30)
BREAK = timedelta(seconds=10)
HOURLY = Every(HOUR)
SUCCEEDED = Outcome(status="succeeded")
AHEAD = THREE + 3 * DAY
"""What the store's clock said while it was ahead."""
REACH = Reach(far=2 * LEASE, rest=2 * LEASE + BREAK, retry=2 * LEASE, lease=LEASE)
FILTERED = Outcome(status="skipped", reason="filtered", started=False)
ONE_OR_ALL = pytest.mark.parametrize("names", [["shop.refresh"], None], ids=["one", "everything"])
"""What is paused and resumed: a task by its name, or everything."""


class Recorders(Protocol):
    """What a lock tells of what it did: ``multiserver_schedule.history.History``, or anything like it."""

    def started(self, claims: Sequence[Claim], now: datetime) -> None: ...
    def skipped(self, skips: Sequence[Skip], now: datetime) -> None: ...
    def finished(self, releases: Sequence[tuple[ReleasedClaim, bool]], now: datetime) -> None: ...
    def cleaned(self, cleanups: Sequence[Cleanup]) -> Sequence[Cleanup]: ...


class Notes:
    """Recorders that keep what they were told, and pass it on to a history where there is one."""

    def __init__(self, history: Recorders | None = None) -> None:
        self.history = history
        self.claims: list[Claim] = []
        self.skips: list[Skip] = []
        self.releases: list[tuple[ReleasedClaim, bool]] = []
        self.cleanups: list[Cleanup] = []

    def started(self, claims: Sequence[Claim], now: datetime) -> None:
        self.claims += claims
        if self.history is not None:
            self.history.started(claims, now)

    def skipped(self, skips: Sequence[Skip], now: datetime) -> None:
        self.skips += skips
        if self.history is not None:
            self.history.skipped(skips, now)

    def finished(self, releases: Sequence[tuple[ReleasedClaim, bool]], now: datetime) -> None:
        self.releases += releases
        if self.history is not None:
            self.history.finished(releases, now)

    def cleaned(self, cleanups: Sequence[Cleanup]) -> Sequence[Cleanup]:
        written = self.history.cleaned(cleanups) if self.history is not None else cleanups
        self.cleanups += written
        return written


def a_task(name: str = "shop.refresh", timetable: DueTimes = HOURLY, **options: Any) -> ScheduledTask:
    """Return a task that is due every hour."""
    return ScheduledTask(name=name, kind="call", target="shop.tasks.run", timetable=timetable, **options)


def declare(*tasks: ScheduledTask, server: str = "web1") -> Declarations:
    """Return these tasks as one version of the code declares them on ``server``."""

    def digest(own: bool) -> str:
        lines = sorted(f"{task.name} {task.fingerprint}" for task in tasks if task.on_every_server == own)
        return hashlib.sha256("\n".join([server if own else "", *lines]).encode()).hexdigest()

    own = any(task.on_every_server for task in tasks)
    return Declarations(
        tasks={task.name: task for task in tasks},
        server=server,
        digest=digest(False),
        server_digest=digest(True) if own else "",
    )


class Server:
    """One server as the lock sees it: the calls of its passes, at times that the test says."""

    def __init__(self, lock: BaseLock, notes: Notes, *tasks: ScheduledTask, name: str = "web1") -> None:
        self.lock = lock
        self.notes = notes
        self.name = name
        self.declared = declare(*tasks, server=name)

    def sync(self, now: datetime, elsewhere: Elsewhere = nowhere_else) -> tuple[list[str], list[str]]:
        """Return what was registered and what was taken over."""
        synced = self.lock.sync(self.declared, elsewhere=elsewhere, now=now)
        return sorted(synced.registered), sorted(synced.changed)

    def row(self, name: str = "shop.refresh") -> Row:
        (row,) = self.lock.rows([name])
        return row

    def occurrence(
        self,
        due_at: datetime,
        task: ScheduledTask | None = None,
        *,
        trigger: Trigger = "schedule",
        lease: timedelta = LEASE,
        min_break: timedelta = BREAK,
        **more: Any,
    ) -> Occurrence:
        task = task or next(iter(self.declared.tasks.values()))
        name = task.row_name(self.name)
        return Occurrence(
            task=task,
            row=name,
            pk=self.row(name).pk,
            due_at=due_at,
            next_due_at=task.next(due_at),
            trigger=trigger,
            lease=lease,
            min_break=min_break,
            **more,
        )

    def claim(self, *occurrences: Occurrence, now: datetime, slots: int | None = None) -> list[Claim]:
        return self.lock.claim(occurrences, server=self.name, slots=slots, record=self.notes.started, now=now)

    def run(self, due_at: datetime, *, now: datetime | None = None, **more: Any) -> Claim | None:
        """Claim the due time of the one task, or return None."""
        claims = self.claim(self.occurrence(due_at, **more), now=now or due_at)
        return claims[0] if claims else None

    def must_run(self, due_at: datetime, *, now: datetime | None = None, **more: Any) -> Claim:
        claim = self.run(due_at, now=now, **more)
        assert claim is not None
        return claim

    def retry(self, due_at: datetime, attempt: int, *, now: datetime) -> Claim | None:
        """Claim a further attempt at a due time, or return None."""
        return self.run(due_at, now=now, attempt=attempt, trigger=self.row(self._name).trigger)

    @property
    def _name(self) -> str:
        return next(iter(self.declared.rows))

    def skip(self, due_at: datetime, *, now: datetime, reason: Any = "held", **more: Any) -> Skip | None:
        skip = Skip(occurrence=self.occurrence(due_at, **more), reason=reason)
        skips = self.lock.skip([skip], record=self.notes.skipped, now=now)
        return skips[0] if skips else None

    def renew(self, *claims: Claim, now: datetime) -> list[bool]:
        stand = self.lock.renew(claims, now=now)
        return [claim.owner in stand for claim in claims]

    def release(self, *claims: Claim, now: datetime, outcome: Outcome = SUCCEEDED, **more: Any) -> list[bool]:
        released = [
            ReleasedClaim(claim=claim, outcome=outcome, min_break=claim.occurrence.min_break, **more)
            for claim in claims
        ]
        return self.lock.release(released, record=self.notes.finished, now=now)

    def reap(self, now: datetime) -> list[Cleanup]:
        return self.lock.reap(server=self.name, record=self.notes.cleaned, now=now)

    def set_right(self, now: datetime, **more: Any) -> list[str]:
        """Mend all rows, and one that is not there."""
        reach = dataclasses.replace(REACH, **more)
        names = [*(row.task for row in self.lock.rows()), "nobody"]
        return self.lock.set_right(dict.fromkeys(names, reach), following=following, now=now)

    def due(self, now: datetime, **more: Any) -> list[str]:
        return [row.task for row in self.lock.look(self.declared, now=now, **more).due]


class LockContract:
    """Inherit this and give a fixture ``lock``, and ``notes`` too where the lock needs a history."""

    @pytest.fixture
    def lock(self) -> BaseLock:
        """Return the lock under test, on an empty store."""
        raise NotImplementedError("Give your test class a fixture 'lock' that returns your lock on an empty store.")

    @pytest.fixture
    def notes(self) -> Notes:
        """Return what the lock tells of what it does."""
        return Notes()

    @pytest.fixture
    def web1(self, lock: BaseLock, notes: Notes) -> Server:
        """Return a server with one hourly task, registered at 02:30."""
        server = Server(lock, notes, a_task())
        server.sync(THREE - HOUR / 2)
        return server

    @pytest.fixture
    def web2(self, lock: BaseLock, notes: Notes, web1: Server) -> Server:
        """Return another server with the same code."""
        return Server(lock, notes, a_task(), name="web2")

    # -- I1: once per due time, for ever ------------------------------------------------------------------------------

    def test_one_server_claims_a_due_time(self, web1: Server, web2: Server) -> None:
        assert web1.run(THREE) is not None
        assert web2.run(THREE) is None

    def test_a_claim_says_what_its_holder_needs(self, web1: Server) -> None:
        now = THREE + SECOND
        claim = web1.must_run(THREE, now=now, lease=timedelta(seconds=12))
        assert claim.occurrence.due_at == THREE
        assert claim.server == "web1"
        assert (claim.acquired_at, claim.expires_at) == (now, now + timedelta(seconds=12))
        assert claim.finish_by is None
        row = web1.row()
        assert (row.owner, row.server, row.fence) == (claim.owner, "web1", claim.fence)
        assert (row.last_due_at, row.next_due_at) == (THREE, THREE + HOUR)
        assert (row.acquired_at, row.renewed_at, row.expires_at) == (now, now, claim.expires_at)

    def test_a_limit_gives_the_claim_a_time_to_finish_by(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task(limit=HOUR))
        server.sync(THREE - HOUR)
        assert server.must_run(THREE, now=THREE + SECOND).finish_by == THREE + SECOND + HOUR

    def test_a_slow_clock_cannot_run_a_finished_due_time_again(self, web1: Server, web2: Server) -> None:
        """Longer than the break after the end, as the first seed's ten seconds did not outlast a late server."""
        claim = web1.must_run(THREE)
        web1.release(claim, now=THREE + SECOND)
        for late in (SECOND, MINUTE, 50 * MINUTE, 30 * DAY):
            assert web2.run(THREE, now=THREE + late) is None

    def test_an_earlier_due_time_is_never_claimed_after_a_later_one(self, web1: Server, web2: Server) -> None:
        web1.release(web1.must_run(THREE + HOUR), now=THREE + HOUR + SECOND)
        assert web2.run(THREE, now=THREE + 2 * HOUR) is None

    def test_the_next_due_time_is_open_again(self, web1: Server, web2: Server) -> None:
        web1.release(web1.must_run(THREE), now=THREE + MINUTE)
        assert web2.run(THREE + HOUR) is not None

    def test_the_stores_clock_says_whether_a_task_is_due(self, web1: Server) -> None:
        assert web1.run(THREE, now=THREE - timedelta(milliseconds=5)) is None
        assert web1.run(THREE, now=THREE) is not None

    def test_a_row_that_is_named_twice_is_claimed_once(self, web1: Server) -> None:
        twice = [web1.occurrence(THREE - HOUR / 4), web1.occurrence(THREE)]
        claims = web1.claim(*twice, now=THREE)
        assert [claim.occurrence for claim in claims] == twice[:1]
        assert web1.row().last_due_at == THREE - HOUR / 4

    def test_a_claim_leaves_other_tasks_alone(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task("a"), a_task("b"))
        server.sync(THREE - HOUR)
        a, b = (server.occurrence(THREE, task) for task in server.declared.tasks.values())
        (first,) = server.claim(a, now=THREE)
        assert lock.rows(["b"])[0].owner is None
        (second,) = server.claim(a, b, now=THREE)
        assert second.occurrence == b
        assert first.owner != second.owner

    def test_each_of_many_claims_has_its_own_owner_and_values(self, lock: BaseLock, notes: Notes) -> None:
        tasks = [
            a_task(f"t{i}", Every(timedelta(minutes=(5, 10, 20)[i % 3])), limit=(None, HOUR)[i % 2]) for i in range(12)
        ]
        server = Server(lock, notes, *tasks)
        server.sync(THREE - HOUR)
        asked = [
            server.occurrence(THREE - i * MINUTE, task, lease=(10 + i % 3) * SECOND) for i, task in enumerate(tasks)
        ]
        claims = server.claim(*asked, now=THREE)
        assert [claim.occurrence for claim in claims] == asked
        assert len({claim.owner for claim in claims}) == 12
        for claim, row in zip(claims, (server.row(o.row) for o in asked), strict=True):
            o = claim.occurrence
            assert (row.owner, row.last_due_at, row.next_due_at) == (claim.owner, o.due_at, o.next_due_at)
            assert row.expires_at == claim.expires_at == THREE + o.lease
            assert claim.finish_by == (THREE + HOUR if o.task.limit else None)

    def test_a_claim_is_recorded_with_what_was_won_only(self, web1: Server, web2: Server, notes: Notes) -> None:
        claim = web1.must_run(THREE)
        web2.run(THREE)
        assert notes.claims == [claim]

    def test_looking_takes_nothing(self, web1: Server, web2: Server) -> None:
        """A probe that took and gave back the lock left runs that nobody made."""
        before = web1.row()
        for _ in range(3):
            assert web1.due(THREE) == web2.due(THREE) == ["shop.refresh"]
        assert web1.row() == before

    # -- manual runs --------------------------------------------------------------------------------------------------

    def test_a_manual_run_leaves_the_due_times_alone(self, web1: Server) -> None:
        before = web1.row()
        at = THREE - MINUTE
        claim = web1.must_run(at, trigger="manual")
        assert (web1.row().last_due_at, web1.row().next_due_at) == (before.last_due_at, before.next_due_at)
        web1.release(claim, now=at + SECOND)
        assert web1.run(THREE) is not None

    def test_a_manual_run_minds_neither_break_nor_schedule_but_never_overlaps(self, web1: Server, web2: Server) -> None:
        claim = web1.must_run(THREE)
        assert web2.run(THREE + SECOND, trigger="manual") is None
        web1.release(claim, now=THREE + SECOND)
        manual = web2.must_run(THREE + 2 * SECOND, trigger="manual")
        assert manual.fence > claim.fence
        assert web1.run(THREE + HOUR) is None

    # -- I2: no overlap -----------------------------------------------------------------------------------------------

    def test_a_task_does_not_start_while_it_runs(self, web1: Server, web2: Server) -> None:
        claim = web1.must_run(THREE)
        for minute in range(0, 60, 5):
            assert web1.renew(claim, now=THREE + minute * MINUTE) == [True]
        assert web2.run(THREE + HOUR) is None
        web1.release(claim, now=THREE + HOUR)
        assert web2.run(THREE + HOUR, now=THREE + HOUR + BREAK) is not None

    def test_a_slow_run_is_not_a_dead_run(self, web1: Server, web2: Server) -> None:
        claim = web1.must_run(THREE)
        for beat in range(1, 40):
            assert web1.renew(claim, now=THREE + beat * 10 * SECOND) == [True]
            assert web2.reap(THREE + beat * 10 * SECOND) == []

    def test_a_lease_that_has_ended_is_freed_by_a_clean_up_alone(self, web1: Server, web2: Server) -> None:
        web1.must_run(THREE)
        assert web2.run(THREE + HOUR) is None
        assert len(web2.reap(THREE + HOUR)) == 1
        assert web2.run(THREE + HOUR) is not None

    def test_a_late_renewal_keeps_a_lease_that_nobody_has_cleaned_up(self, web1: Server, web2: Server) -> None:
        claim = web1.must_run(THREE)
        late = THREE + 2 * LEASE
        assert web1.renew(claim, now=late) == [True]
        assert web2.reap(late + LEASE - SECOND) == []

    def test_a_server_that_wakes_up_cannot_renew_the_lease_that_another_has_by_now(
        self, web1: Server, web2: Server
    ) -> None:
        frozen = web1.must_run(THREE)
        web2.reap(THREE + LEASE)
        newer = web2.must_run(THREE + HOUR)
        assert web1.renew(frozen, now=THREE + HOUR + SECOND) == [False]
        row = web2.row()
        assert (row.owner, row.renewed_at, row.expires_at) == (newer.owner, newer.acquired_at, newer.expires_at)

    def test_a_renewal_tells_which_leases_were_lost(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task("a"), a_task("b"))
        server.sync(THREE - HOUR)
        a, b = server.claim(*(server.occurrence(THREE, t) for t in server.declared.tasks.values()), now=THREE)
        server.renew(b, now=THREE + LEASE - SECOND)
        assert [cleanup.task for cleanup in server.reap(THREE + LEASE)] == ["a"]
        assert server.renew(a, b, now=THREE + LEASE) == [False, True]

    def test_leases_of_different_lengths_are_renewed_each_by_its_own(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task("a"), a_task("b"))
        server.sync(THREE - HOUR)
        task_a, task_b = server.declared.tasks.values()
        claims = server.claim(
            server.occurrence(THREE, task_a, lease=9 * SECOND),
            server.occurrence(THREE, task_b, lease=60 * SECOND),
            now=THREE,
        )
        at = THREE + 5 * SECOND
        assert server.renew(*claims, now=at) == [True, True]
        assert [server.row(name).expires_at for name in "ab"] == [at + 9 * SECOND, at + 60 * SECOND]

    def test_the_old_owner_cannot_release_a_lock_it_lost(self, web1: Server, web2: Server, notes: Notes) -> None:
        late = web1.must_run(THREE)
        web2.reap(THREE + LEASE)
        newer = web2.must_run(THREE + HOUR)
        assert web1.release(late, now=THREE + HOUR) == [False]
        assert web2.row().owner == newer.owner
        assert [stood for _, stood in notes.releases] == [False]
        assert web2.renew(newer, now=THREE + HOUR + SECOND) == [True]

    def test_the_old_owner_learns_of_its_loss_when_nobody_has_taken_over_yet(self, web1: Server, web2: Server) -> None:
        late = web1.must_run(THREE)
        web2.reap(THREE + LEASE)
        assert web1.renew(late, now=THREE + LEASE) == [False]
        assert web1.release(late, now=THREE + LEASE) == [False]

    def test_a_release_that_is_sent_again_is_recorded_once(self, web1: Server, notes: Notes) -> None:
        """The answer to the first may have been lost."""
        claim = web1.must_run(THREE)
        assert web1.release(claim, now=THREE + SECOND) == [True]
        assert web1.release(claim, now=THREE + 2 * SECOND) == [True]
        assert len(notes.releases) == 1

    def test_several_runs_are_released_at_once(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, *(a_task(name) for name in "abc"))
        server.sync(THREE - HOUR)
        claims = server.claim(*(server.occurrence(THREE, t) for t in server.declared.tasks.values()), now=THREE)
        server.renew(claims[0], claims[2], now=THREE + LEASE - SECOND)
        server.reap(THREE + LEASE)
        assert server.release(*claims, now=THREE + LEASE) == [True, False, True]
        assert [server.row(name).owner for name in "abc"] == [None, None, None]

    # -- I3: fences rise ----------------------------------------------------------------------------------------------

    def test_the_fence_rises_with_each_claim_and_each_clean_up(self, web1: Server, web2: Server) -> None:
        fences = [web1.row().fence]
        for hour in range(4):
            at = THREE + hour * HOUR
            claim = web1.must_run(at)
            fences.append(claim.fence)
            if hour % 2:
                assert web2.reap(at + LEASE)[0].fence == claim.fence
                fences.append(web2.row().fence)
            else:
                web1.release(claim, now=at + SECOND)
        assert fences == sorted(set(fences))

    # -- I4 and I6: a dead server's locks are freed, and each clean-up is recorded once -------------------------------

    def test_a_dead_servers_lock_is_freed_when_its_lease_ends(self, web1: Server, web2: Server, lock: BaseLock) -> None:
        web1.must_run(THREE)
        assert lock.look(web2.declared, now=THREE + LEASE - SECOND).expired is False
        assert web2.reap(THREE + LEASE - SECOND) == []
        assert lock.look(web2.declared, now=THREE + LEASE).expired is True
        assert len(web2.reap(THREE + LEASE)) == 1
        assert lock.look(web2.declared, now=THREE + LEASE).expired is False

    def test_a_clean_up_says_whose_lock_it_was(self, web1: Server, web2: Server, notes: Notes) -> None:
        claim = web1.must_run(THREE, now=THREE + SECOND)
        now = THREE + MINUTE
        (cleanup,) = web2.reap(now)
        assert (cleanup.task, cleanup.due_at) == ("shop.refresh", THREE)
        assert (cleanup.server, cleanup.owner, cleanup.fence) == ("web1", claim.owner, claim.fence)
        assert (cleanup.acquired_at, cleanup.expired_at) == (claim.acquired_at, claim.expires_at)
        assert (cleanup.cleaned_at, cleanup.cleaned_by, cleanup.reason) == (now, "web2", "lease_expired")
        assert notes.cleanups == [cleanup]

    def test_a_stale_lock_is_cleaned_up_once(self, web1: Server, web2: Server, notes: Notes) -> None:
        web1.must_run(THREE)
        assert len(web2.reap(THREE + LEASE)) == 1
        assert web1.reap(THREE + LEASE) == []
        assert len(notes.cleanups) == 1

    def test_a_run_that_is_past_its_limit_is_said_to_have_overrun(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task(limit=timedelta(minutes=5)))
        server.sync(THREE - HOUR)
        server.must_run(THREE)
        assert server.reap(THREE + 6 * MINUTE)[0].reason == "overran"

    def test_a_lock_is_freed_by_a_server_that_does_not_declare_its_task(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        web1.must_run(THREE)
        other = Server(lock, notes, a_task("shop.something_else"), name="web3")
        assert [cleanup.task for cleanup in other.reap(THREE + MINUTE)] == ["shop.refresh"]

    def test_after_a_clean_up_there_is_no_break(self, web1: Server, web2: Server) -> None:
        web1.must_run(THREE, now=THREE + HOUR - LEASE)
        web2.reap(THREE + HOUR)
        assert web2.run(THREE + HOUR) is not None

    def test_the_due_time_of_a_dead_server_is_not_run_again(self, web1: Server, web2: Server) -> None:
        web1.must_run(THREE)
        web2.reap(THREE + MINUTE)
        assert web2.run(THREE, now=THREE + MINUTE) is None

    # -- freeing a lock by hand ---------------------------------------------------------------------------------------

    def test_a_lock_that_is_freed_by_hand_leaves_a_trace_and_its_holder_learns_of_it(
        self, web1: Server, web2: Server, lock: BaseLock, notes: Notes
    ) -> None:
        claim = web1.must_run(THREE)
        now = THREE + SECOND
        cleanup = lock.free("shop.refresh", server="web2", record=notes.cleaned, now=now)
        assert cleanup is not None
        assert (cleanup.task, cleanup.due_at, cleanup.owner, cleanup.fence) == (
            "shop.refresh",
            THREE,
            claim.owner,
            claim.fence,
        )
        assert (cleanup.server, cleanup.cleaned_by, cleanup.cleaned_at) == ("web1", "web2", now)
        assert cleanup.reason == "released_by_hand"
        assert notes.cleanups == [cleanup]
        assert web2.row().fence > claim.fence
        assert web1.renew(claim, now=now) == [False]
        assert web1.release(claim, now=now) == [False]
        assert web2.run(THREE, now=now) is None, "its due time was run once, and that is that"
        assert web2.run(THREE + HOUR) is not None

    def test_a_lock_that_somebody_else_has_by_now_is_not_freed_by_hand(
        self, web1: Server, web2: Server, lock: BaseLock, notes: Notes
    ) -> None:
        """Who looked at the list, and then confirmed, meant the holder that was seen."""
        seen = web1.must_run(THREE)
        web1.release(seen, now=THREE + SECOND)
        newer = web2.must_run(THREE + HOUR)
        now = THREE + HOUR + SECOND
        for owner, freed in ((seen.owner, False), (newer.owner, True)):
            cleanup = lock.free("shop.refresh", owner=owner, server="web1", record=notes.cleaned, now=now)
            assert (cleanup is not None) == freed
        assert web2.renew(newer, now=now) == [False]

    def test_there_is_nothing_to_free_where_nobody_holds_the_lock(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        before = web1.row()
        assert lock.free("shop.refresh", server="web2", record=notes.cleaned, now=THREE) is None
        assert lock.free("shop.unheard-of", server="web2", record=notes.cleaned, now=THREE) is None
        assert web1.row() == before
        assert notes.cleanups == []

    # -- from one store to another ------------------------------------------------------------------------------------

    def test_a_task_that_was_given_to_another_store_is_neither_claimed_nor_skipped_here(
        self, web1: Server, lock: BaseLock
    ) -> None:
        """An older version, which still declares it here, passes over it from that moment on."""
        before = web1.row()
        (row,) = lock.leave(["shop.refresh", "shop.unheard-of"], to="other", now=THREE - MINUTE)
        assert (row.task, row.moved_to) == ("shop.refresh", "other")
        assert (row.last_due_at, row.next_due_at, row.fence) == (before.last_due_at, before.next_due_at, before.fence)
        assert web1.due(THREE) == []
        assert web1.run(THREE) is None
        assert web1.run(THREE, trigger="manual") is None
        assert web1.skip(THREE, now=THREE + SECOND, reason="missed") is None

    def test_giving_a_task_away_twice_says_the_same(self, web1: Server, lock: BaseLock) -> None:
        """A server may be killed in between."""
        first = lock.leave(["shop.refresh"], to="other", now=THREE)
        assert lock.leave(["shop.refresh"], to="other", now=THREE + MINUTE) == first
        assert lock.leave(["shop.refresh"], to="a-third", now=THREE + MINUTE) == []

    def test_who_holds_the_lock_of_a_task_that_was_given_away_goes_on(
        self, web1: Server, web2: Server, lock: BaseLock
    ) -> None:
        claim = web1.must_run(THREE)
        (row,) = lock.leave(["shop.refresh"], to="other", now=THREE + SECOND)
        assert row.owner == claim.owner
        assert web1.renew(claim, now=THREE + SECOND) == [True]
        assert web1.release(claim, now=THREE + 2 * SECOND) == [True]
        assert web1.row().owner is None

    def test_a_dead_holders_lock_is_freed_although_the_task_was_given_away(
        self, web1: Server, web2: Server, lock: BaseLock
    ) -> None:
        web1.must_run(THREE)
        lock.leave(["shop.refresh"], to="other", now=THREE + SECOND)
        assert lock.look(web2.declared, now=THREE + LEASE).expired is True
        assert [cleanup.task for cleanup in web2.reap(THREE + LEASE)] == ["shop.refresh"]

    def test_a_task_that_comes_from_another_store_goes_on_where_it_was_there(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        """The due time that is open is run here, the one that was run there is not, and the fence goes on rising."""
        web1.release(web1.must_run(THREE), now=THREE + SECOND)
        theirs = dataclasses.replace(web1.row(), task="shop.more", fence=10**17)
        newer = Server(lock, notes, a_task(), a_task("shop.more"))

        def elsewhere(names: Sequence[str]) -> dict[str, Before]:
            assert list(names) == ["shop.more"]
            return {"shop.more": Before(row=theirs, store="other")}

        assert newer.sync(THREE + HOUR + SECOND, elsewhere)[0] == ["shop.more"]
        row = newer.row("shop.more")
        assert (row.last_due_at, row.next_due_at, row.owner) == (THREE, THREE + HOUR, None)
        assert (row.moved_from, row.moved_to) == ("", "")
        more = newer.declared.tasks["shop.more"]
        now = THREE + HOUR + SECOND
        assert newer.claim(newer.occurrence(THREE, more), now=now) == []
        (claim,) = newer.claim(newer.occurrence(THREE + HOUR, more), now=now)
        assert claim.fence > 10**17

    def test_a_task_whose_last_run_in_another_store_has_not_ended_waits_for_it(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        theirs = dataclasses.replace(web1.row(), task="shop.more", owner="somebody", server="web9")
        newer = Server(lock, notes, a_task(), a_task("shop.more"))
        newer.sync(THREE, lambda names: {"shop.more": Before(row=theirs, store="other")})
        (row,) = lock.rows(["shop.more"])
        assert (row.moved_from, row.owner) == ("other", None)
        assert "shop.more" in newer.due(THREE)
        more = newer.declared.tasks["shop.more"]
        assert newer.claim(newer.occurrence(THREE, more), now=THREE) == []
        assert newer.claim(newer.occurrence(THREE, more, trigger="manual"), now=THREE) == []
        assert newer.skip(THREE, task=more, now=THREE, reason="missed") is None
        lock.arrive(["shop.more"], now=THREE)
        assert len(newer.claim(newer.occurrence(THREE, more), now=THREE)) == 1

    def test_a_task_comes_back_to_the_store_that_it_was_given_away_by(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        lock.leave(["shop.refresh"], to="other", now=THREE)
        theirs = dataclasses.replace(web1.row(), moved_to="", last_due_at=THREE + HOUR, next_due_at=THREE + 2 * HOUR)
        newer = Server(lock, notes, a_task(), a_task("shop.new"), name="web2")
        registered, changed = newer.sync(
            THREE + HOUR + MINUTE,
            lambda names: {"shop.refresh": Before(row=theirs, store="other")} if "shop.refresh" in names else {},
        )
        assert (registered, changed) == (["shop.new"], ["shop.refresh"])
        row = newer.row()
        assert (row.moved_to, row.last_due_at, row.next_due_at) == ("", THREE + HOUR, THREE + 2 * HOUR)
        assert web1.run(THREE + HOUR, now=THREE + HOUR + MINUTE) is None
        assert newer.run(THREE + 2 * HOUR) is not None

    @pytest.mark.parametrize("back", [False, True], ids=["new", "back"])
    def test_what_was_due_while_a_task_was_paused_in_another_store_is_not_made_up_for_here(
        self, web1: Server, lock: BaseLock, notes: Notes, back: bool
    ) -> None:
        """The pause is made anew here, and its begin is a later one."""
        name = "shop.refresh" if back else "shop.more"
        if back:
            lock.leave([name], to="other", now=THREE - 2 * MINUTE)
        before = dataclasses.replace(web1.row(), task=name, moved_to="", paused=True, paused_at=THREE - MINUTE)
        newer = Server(lock, notes, a_task(), a_task("shop.more"))
        newer.sync(THREE + MINUTE, lambda names: {name: Before(row=before, store="other")} if name in names else {})
        lock.pause([name], now=THREE + MINUTE)
        resumed = THREE + 2 * MINUTE
        lock.resume([name], following=following, now=resumed)
        assert name not in newer.due(resumed)
        more = newer.declared.tasks[name]
        assert newer.claim(newer.occurrence(THREE, more), now=resumed) == []
        assert len(newer.claim(newer.occurrence(THREE + HOUR, more), now=THREE + HOUR)) == 1

    def test_a_rollback_that_cannot_ask_the_other_store_runs_nothing_a_second_time(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        """What was due until then may have run there."""
        newer = Server(lock, notes, a_task("shop.new"), name="web2")
        newer.sync(THREE - 10 * MINUTE)
        lock.leave(["shop.refresh"], to="other", now=THREE - 10 * MINUTE)
        back = THREE + 10 * MINUTE
        assert web1.sync(back) == ([], ["shop.refresh"])
        assert web1.run(THREE, now=back) is None
        assert web1.row().next_due_at == THREE + HOUR
        assert web1.run(THREE + HOUR) is not None

    # -- I5: the break ------------------------------------------------------------------------------------------------

    def test_the_break_is_kept_after_a_run(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task(timetable=Every(5 * SECOND)))
        server.sync(THREE)
        claim = server.must_run(THREE + 5 * SECOND)
        ended = THREE + 7 * SECOND
        server.release(claim, now=ended)
        for seconds in range(10):
            at = ended + seconds * SECOND
            assert server.run(THREE + 10 * SECOND, now=at) is None
        assert server.run(THREE + 15 * SECOND, now=ended + BREAK) is not None

    def test_breaks_of_different_lengths_are_kept_each_by_its_own(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task("a"), a_task("b"))
        server.sync(THREE - HOUR)
        task_a, task_b = server.declared.tasks.values()
        claims = server.claim(
            server.occurrence(THREE, task_a, min_break=MINUTE), server.occurrence(THREE, task_b), now=THREE
        )
        server.release(*claims, now=THREE)
        assert [server.row(name).not_before for name in "ab"] == [THREE + MINUTE, THREE + BREAK]

    def test_a_due_time_inside_the_break_stays_open(self, web1: Server) -> None:
        web1.release(web1.must_run(THREE, now=THREE + HOUR - SECOND), now=THREE + HOUR - SECOND)
        assert web1.run(THREE + HOUR) is None
        assert web1.due(THREE + HOUR) == ["shop.refresh"]
        assert web1.run(THREE + HOUR, now=THREE + HOUR - SECOND + BREAK) is not None

    def test_a_run_that_its_filters_refused_has_no_break(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task(timetable=Every(5 * SECOND)))
        server.sync(THREE)
        server.release(server.must_run(THREE + 5 * SECOND), now=THREE + 5 * SECOND, outcome=FILTERED)
        assert server.run(THREE + 10 * SECOND) is not None

    # -- I8: versions pass over what is not theirs --------------------------------------------------------------------

    def test_an_older_version_neither_claims_nor_skips_a_task_whose_schedule_was_changed(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        newer = Server(lock, notes, a_task(timetable=Cron("30 * * * *", "UTC")), name="web2")
        newer.sync(THREE - MINUTE)
        assert web1.run(THREE, now=THREE + SECOND) is None
        assert web1.skip(THREE, now=THREE + SECOND, reason="missed") is None
        assert newer.run(THREE + HOUR / 2) is not None

    # -- registering, roll-outs and rollbacks -------------------------------------------------------------------------

    def test_a_new_task_never_fires_for_the_past(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task())
        assert lock.look(server.declared, now=THREE).known is False
        assert server.sync(THREE + SECOND) == (["shop.refresh"], [])
        row = server.row()
        assert row.last_due_at == row.schedule_since == THREE + SECOND
        assert row.next_due_at == THREE + HOUR
        assert server.run(THREE, now=THREE + MINUTE) is None
        assert lock.look(server.declared, now=THREE + MINUTE).known is True

    def test_a_second_server_with_the_same_code_registers_nothing(self, web1: Server, web2: Server) -> None:
        before = web1.row()
        assert web2.lock.look(web2.declared, now=THREE).known is True
        assert web2.sync(THREE) == ([], [])
        assert web1.row() == before

    def test_a_new_task_leaves_the_others_rows_alone(self, web1: Server, lock: BaseLock, notes: Notes) -> None:
        before = web1.row()
        newer = Server(lock, notes, a_task(), a_task("shop.more"))
        assert lock.look(newer.declared, now=THREE).known is False
        assert newer.sync(THREE) == (["shop.more"], [])
        assert web1.row() == before

    def test_an_older_version_that_is_still_running_changes_nothing_back(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        """One set of declarations that every server rewrites starves a task whose schedule was changed."""
        newer = Server(lock, notes, a_task(timetable=Cron("30 * * * *", "UTC")), name="web2")
        assert newer.sync(THREE - MINUTE) == ([], ["shop.refresh"])
        for minute in range(0, 60, 4):
            at = THREE + minute * MINUTE
            assert lock.look(newer.declared, now=at).known is True
            assert lock.look(web1.declared, now=at).known is True
            assert web1.sync(at) == ([], [])
        assert newer.row().fingerprint == a_task(timetable=Cron("30 * * * *", "UTC")).fingerprint

    def test_a_changed_schedule_counts_from_its_take_over(self, web1: Server, lock: BaseLock, notes: Notes) -> None:
        newer = Server(lock, notes, a_task(timetable=Cron("*/5 * * * *", "UTC")), name="web2")
        at = THREE - 7 * MINUTE
        newer.sync(at)
        row = newer.row()
        assert (row.schedule_since, row.next_due_at) == (at, THREE - 5 * MINUTE)
        assert row.last_due_at == THREE - HOUR / 2

    def test_a_due_time_that_waits_is_not_lost_by_a_roll_out(self, web1: Server, lock: BaseLock, notes: Notes) -> None:
        newer = Server(lock, notes, a_task(timetable=Cron("30 * * * *", "UTC")), name="web2")
        at = THREE + 5 * MINUTE
        newer.sync(at)
        row = newer.row()
        assert row.next_due_at == THREE
        assert row.last_due_at < THREE <= row.schedule_since == at
        assert newer.due(at) == ["shop.refresh"]
        assert newer.run(THREE, now=at) is not None

    def test_a_due_time_that_was_claimed_is_not_doubled_by_a_roll_out(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        web1.release(web1.must_run(THREE), now=THREE + SECOND)
        newer = Server(lock, notes, a_task(timetable=Cron("0,30 * * * *", "UTC")), name="web2")
        newer.sync(THREE + MINUTE)
        assert newer.row().next_due_at == THREE + HOUR / 2
        assert newer.run(THREE, now=THREE + 2 * MINUTE) is None

    def test_a_rollback_takes_over_when_the_newest_version_was_not_seen_for_five_minutes(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        """The minutes in which nobody held the schedule are the older version's to catch up."""
        newer = Server(lock, notes, a_task(timetable=Cron("30 * * * *", "UTC")), name="web2")
        newer.sync(THREE - 3 * MINUTE)
        gone = THREE - MINUTE
        assert lock.look(newer.declared, now=gone).known is True
        assert lock.look(web1.declared, now=gone + 4 * MINUTE).known is True
        back = gone + 5 * MINUTE
        assert lock.look(web1.declared, now=back).known is False
        assert web1.sync(back) == ([], ["shop.refresh"])
        row = web1.row()
        assert (row.schedule_since, row.next_due_at) == (gone, THREE)
        assert web1.run(THREE, now=back) is not None
        assert lock.look(web1.declared, now=back).known is True
        assert lock.look(newer.declared, now=back).known is True, "and it is the older one now"

    def test_a_rollback_does_not_go_back_behind_what_was_claimed(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        newer = Server(lock, notes, a_task(timetable=Cron("*/2 * * * *", "UTC")), name="web2")
        newer.sync(THREE - 3 * MINUTE)
        lock.look(newer.declared, now=THREE - MINUTE)
        newer.release(newer.must_run(THREE), now=THREE + SECOND)
        web1.sync(THREE + 10 * MINUTE)
        assert web1.row().schedule_since == THREE
        assert web1.row().next_due_at == THREE + HOUR

    def test_a_version_that_comes_back_after_a_rollback_takes_over_again(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        newer = Server(lock, notes, a_task(timetable=Cron("30 * * * *", "UTC")), name="web2")
        newer.sync(THREE - 3 * MINUTE)
        web1.sync(THREE + 10 * MINUTE)
        assert lock.look(newer.declared, now=THREE + 11 * MINUTE).known is True
        assert lock.look(newer.declared, now=THREE + 15 * MINUTE).known is False
        assert newer.sync(THREE + 15 * MINUTE) == ([], ["shop.refresh"])

    def test_a_version_that_is_looked_at_stays_the_newest(self, web1: Server, lock: BaseLock, notes: Notes) -> None:
        older = Server(lock, notes, a_task(timetable=Cron("30 * * * *", "UTC")), name="web2")
        older.sync(THREE - 2 * HOUR)  # and web1's version, of 02:30 but synced before, is the older one now
        for minute in range(0, 60, 4):
            at = THREE - 2 * HOUR + minute * MINUTE
            assert lock.look(older.declared, now=at).known is True
            assert lock.look(web1.declared, now=at).known is True

    def test_a_task_on_every_server_has_a_row_for_each(self, lock: BaseLock, notes: Notes) -> None:
        task = a_task("shop.clear", on_every_server=True)
        web1, web2 = (Server(lock, notes, task, name=name) for name in ("web1", "web2"))
        assert web1.sync(THREE - MINUTE) == (["shop.clear@web1"], [])
        assert lock.look(web1.declared, now=THREE).known is True
        assert lock.look(web2.declared, now=THREE).known is False
        assert web2.sync(THREE - MINUTE) == (["shop.clear@web2"], [])
        assert web1.run(THREE) is not None
        assert web2.run(THREE) is not None
        assert web1.run(THREE) is None

    def test_a_server_does_not_see_the_rows_of_others(self, lock: BaseLock, notes: Notes) -> None:
        """Servers come and go: nobody looks at the rows of those that are gone."""
        tasks = a_task("shop.clear", on_every_server=True), a_task("shop.once")
        web1, web2 = (Server(lock, notes, *tasks, name=name) for name in ("web1", "web2"))
        web1.sync(THREE - MINUTE)
        web2.sync(THREE - MINUTE)
        assert sorted(web2.due(THREE)) == ["shop.clear@web2", "shop.once"]

    # -- I9: what is skipped, and what must not be --------------------------------------------------------------------

    def test_a_due_time_that_meets_a_running_task_is_skipped_once_for_all(
        self, web1: Server, web2: Server, notes: Notes
    ) -> None:
        claim = web1.must_run(THREE, now=THREE + SECOND)
        now = THREE + HOUR
        web1.renew(claim, now=now)
        skip = web2.skip(now, now=now + SECOND)
        assert skip is not None
        assert (skip.holder, skip.held_since) == ("web1", THREE + SECOND)
        assert web1.skip(now, now=now + SECOND) is None
        assert notes.skips == [skip]
        row = web1.row()
        assert (row.last_due_at, row.next_due_at, row.owner) == (now, now + HOUR, claim.owner)
        web1.release(claim, now=now + 2 * SECOND)
        assert web2.run(now, now=now + MINUTE) is None

    def test_a_holder_that_has_not_renewed_since_costs_no_due_time(self, web1: Server, web2: Server) -> None:
        """A server killed ten seconds before three o'clock must not cost the run of three o'clock."""
        web1.must_run(THREE, now=THREE + HOUR - 10 * SECOND)
        due = THREE + HOUR
        assert web2.skip(due, now=due + SECOND) is None
        web2.reap(due - 10 * SECOND + LEASE)
        assert web2.run(due, now=due - 10 * SECOND + LEASE) is not None

    def test_a_lease_that_has_ended_holds_up_nothing(self, web1: Server, web2: Server) -> None:
        claim = web1.must_run(THREE)
        web1.renew(claim, now=THREE + HOUR)
        assert web2.skip(THREE + HOUR, now=THREE + HOUR + LEASE) is None

    def test_nobody_is_skipped_over_when_nobody_holds_the_lock(self, web1: Server) -> None:
        assert web1.skip(THREE, now=THREE) is None
        assert web1.run(THREE) is not None

    def test_a_missed_due_time_is_given_up_once_and_only_when_it_is_still_open(
        self, web1: Server, web2: Server, notes: Notes
    ) -> None:
        assert web1.skip(THREE, now=THREE + 50 * MINUTE, reason="missed") is not None
        assert web2.skip(THREE, now=THREE + 50 * MINUTE, reason="missed") is None
        assert web2.run(THREE, now=THREE + 51 * MINUTE) is None
        web2.must_run(THREE + HOUR)
        assert web1.skip(THREE + HOUR, now=THREE + 2 * HOUR, reason="missed") is None
        assert len(notes.skips) == 1

    def test_nothing_is_skipped_before_it_is_due(self, web1: Server) -> None:
        assert web1.skip(THREE, now=THREE - SECOND, reason="missed") is None

    def test_several_due_times_are_skipped_each_for_its_reason(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, *(a_task(name) for name in "abc"))
        server.sync(THREE - HOUR)
        a, b, c = server.declared.tasks.values()
        (claim,) = server.claim(server.occurrence(THREE, a), now=THREE)
        due = THREE + HOUR
        server.renew(claim, now=due)
        skips = [
            Skip(occurrence=server.occurrence(due, a), reason="held"),
            Skip(occurrence=server.occurrence(due, b), reason="held"),
            Skip(occurrence=server.occurrence(THREE, c), reason="missed"),
        ]
        given_up = lock.skip(skips, record=notes.skipped, now=due)
        assert [(skip.occurrence.task.name, skip.reason, skip.holder) for skip in given_up] == [
            ("a", "held", "web1"),
            ("c", "missed", ""),
        ]
        assert [server.row(name).last_due_at for name in "abc"] == [due, THREE - HOUR, THREE]

    # -- looking ------------------------------------------------------------------------------------------------------

    def test_what_is_due_longest_comes_first(self, lock: BaseLock, notes: Notes) -> None:
        """In the order of the key, the first rows would be served and the last would starve."""
        tasks = [a_task(f"t{minute}", Cron(f"{minute} * * * *", "UTC")) for minute in (40, 5, 20)]
        server = Server(lock, notes, *tasks)
        server.sync(THREE)
        assert server.due(THREE + 39 * MINUTE) == ["t5", "t20"]
        assert server.due(THREE + 39 * MINUTE, ahead=MINUTE) == ["t5", "t20", "t40"]

    def test_the_time_is_the_stores(self, lock: BaseLock, web1: Server) -> None:
        assert lock.look(web1.declared, now=THREE).now == THREE
        store = lock.look(web1.declared).now
        assert store.utcoffset() == timedelta(0)
        assert store <= lock.look(web1.declared).now

    # -- slots --------------------------------------------------------------------------------------------------------

    def test_a_server_claims_no_more_than_it_has_slots(self, lock: BaseLock, notes: Notes) -> None:
        """Counted through the store: two passes of one server share its slots."""
        tasks = [a_task(f"t{i}") for i in range(10)]
        web1, again, web2 = (Server(lock, notes, *tasks, name=name) for name in ("web1", "web1", "web2"))
        web1.sync(THREE - HOUR)
        asked = [web1.occurrence(THREE, task) for task in tasks]
        first = web1.claim(*asked, now=THREE, slots=4)
        assert [claim.occurrence for claim in first] == asked[:4], "in the order given"
        assert again.claim(*asked, now=THREE, slots=4) == []
        assert [c.occurrence for c in web2.claim(*asked, now=THREE, slots=4)] == asked[4:8]
        web1.release(*first[:2], now=THREE + SECOND)
        assert [c.occurrence for c in again.claim(*asked, now=THREE + SECOND, slots=4)] == asked[8:]

    def test_slots_go_to_what_may_run(self, lock: BaseLock, notes: Notes) -> None:
        tasks = [a_task(f"t{i:02}") for i in range(40)]
        web1, web2 = (Server(lock, notes, *tasks, name=name) for name in ("web1", "web2"))
        web1.sync(THREE - HOUR)
        asked = [web1.occurrence(THREE, task) for task in tasks]
        assert len(web1.claim(*asked, now=THREE, slots=35)) == 35
        assert [c.occurrence for c in web2.claim(*asked, now=THREE, slots=4)] == asked[35:39]

    def test_a_lease_that_has_ended_takes_no_slot(self, lock: BaseLock, notes: Notes) -> None:
        web1 = Server(lock, notes, a_task("a"), a_task("b"))
        web1.sync(THREE - HOUR)
        a, b = (web1.occurrence(THREE, task) for task in web1.declared.tasks.values())
        web1.claim(a, now=THREE, slots=1)
        assert web1.claim(b, now=THREE + LEASE - SECOND, slots=1) == []
        assert len(web1.claim(b, now=THREE + LEASE, slots=1)) == 1

    # -- what a row owes: another attempt -----------------------------------------------------------------------------

    def test_a_failed_attempt_is_owed_and_made_by_whichever_server_comes(self, web1: Server, web2: Server) -> None:
        first = web1.must_run(THREE, trigger="catch_up")
        web1.release(first, now=THREE + SECOND, retry_in=MINUTE)
        row = web2.row()
        again_at = THREE + SECOND + MINUTE
        assert (row.owner, row.retry_at, row.attempt, row.trigger) == (None, again_at, 2, "catch_up")
        assert (row.last_due_at, row.next_due_at) == (THREE, THREE + HOUR)
        assert web2.retry(THREE, 2, now=again_at - timedelta(milliseconds=1)) is None
        second = web2.retry(THREE, 2, now=again_at)
        assert second is not None
        assert second.fence > first.fence
        row = web2.row()
        assert (row.owner, row.retry_at, row.attempt) == (second.owner, None, 2)
        assert (row.last_due_at, row.next_due_at) == (THREE, THREE + HOUR)

    def test_an_attempt_is_made_once(self, web1: Server, web2: Server) -> None:
        web1.release(web1.must_run(THREE), now=THREE, retry_in=MINUTE)
        again = web1.retry(THREE, 2, now=THREE + MINUTE)
        assert again is not None
        assert web2.retry(THREE, 2, now=THREE + MINUTE) is None
        web1.release(again, now=THREE + 2 * MINUTE)
        for attempt in (1, 2, 3):
            assert web2.retry(THREE, attempt, now=THREE + 3 * MINUTE) is None
        assert web2.run(THREE, now=THREE + 3 * MINUTE) is None

    def test_a_look_finds_what_is_owed(self, web1: Server) -> None:
        web1.release(web1.must_run(THREE), now=THREE, retry_in=MINUTE)
        assert web1.due(THREE + MINUTE - SECOND) == []
        assert web1.due(THREE + MINUTE - SECOND, ahead=5 * SECOND) == ["shop.refresh"]
        assert web1.due(THREE + MINUTE) == ["shop.refresh"]
        again = web1.retry(THREE, 2, now=THREE + MINUTE)
        assert again is not None
        assert web1.due(THREE + 2 * MINUTE) == []

    def test_a_back_off_takes_no_slot_and_a_dead_server_costs_it_nothing(self, lock: BaseLock, notes: Notes) -> None:
        server, other = (Server(lock, notes, a_task("a"), a_task("b"), name=name) for name in ("web1", "web2"))
        server.sync(THREE - HOUR)
        a, b = (server.occurrence(THREE, task) for task in server.declared.tasks.values())
        (claim,) = server.claim(a, now=THREE, slots=1)
        server.release(claim, now=THREE, retry_in=MINUTE)
        assert len(server.claim(b, now=THREE, slots=1)) == 1
        assert other.reap(THREE + 59 * SECOND) != []  # web1 was killed, and held the other task alone
        assert other.retry(THREE, 2, now=THREE + MINUTE) is not None

    def test_the_next_due_time_goes_before_an_attempt_that_is_owed(self, web1: Server, web2: Server) -> None:
        web1.release(web1.must_run(THREE), now=THREE, retry_in=50 * MINUTE)
        assert web2.run(THREE + HOUR) is not None
        assert (web2.row().retry_at, web2.row().attempt) == (None, 1)
        assert web1.retry(THREE, 2, now=THREE + HOUR) is None

    def test_a_slow_server_does_not_take_the_next_due_times_attempt_for_the_last_ones(
        self, web1: Server, web2: Server
    ) -> None:
        for due_at in (THREE, THREE + HOUR):
            web1.release(web1.must_run(due_at), now=due_at, retry_in=MINUTE)
        assert web2.retry(THREE, 2, now=THREE + HOUR + MINUTE) is None
        assert web2.retry(THREE + HOUR, 2, now=THREE + HOUR + MINUTE) is not None

    def test_an_attempt_never_comes_after_the_next_due_time(self, web1: Server) -> None:
        web1.release(web1.must_run(THREE), now=THREE + MINUTE, retry_in=59 * MINUTE)
        assert web1.row().retry_at is None

    def test_a_due_time_that_was_skipped_meanwhile_ends_the_attempts_before_it(
        self, web1: Server, web2: Server
    ) -> None:
        claim = web1.must_run(THREE)
        web1.renew(claim, now=THREE + HOUR)
        assert web2.skip(THREE + HOUR, now=THREE + HOUR) is not None
        web1.release(claim, now=THREE + HOUR + SECOND, retry_in=MINUTE)
        assert web1.row().retry_at is None
        web1.release(web1.must_run(THREE + 2 * HOUR), now=THREE + 2 * HOUR, retry_in=MINUTE)
        assert web2.skip(THREE + 3 * HOUR, now=THREE + 3 * HOUR, reason="missed") is not None
        assert web2.row().retry_at is None

    def test_an_attempt_minds_no_break_but_never_overlaps(self, web1: Server, web2: Server) -> None:
        web1.release(web1.must_run(THREE, min_break=10 * MINUTE), now=THREE, retry_in=MINUTE)
        manual = web2.must_run(THREE + SECOND, trigger="manual")
        web2.renew(manual, now=THREE + MINUTE)
        assert web1.retry(THREE, 2, now=THREE + MINUTE) is None
        web2.release(manual, now=THREE + 2 * MINUTE)
        assert web1.retry(THREE, 2, now=THREE + 2 * MINUTE) is not None

    def test_who_lost_its_lease_leaves_nothing_owed(self, web1: Server, web2: Server) -> None:
        claim = web1.must_run(THREE)
        web2.reap(THREE + MINUTE)
        assert web1.release(claim, now=THREE + MINUTE, retry_in=MINUTE) == [False]
        assert web1.row().retry_at is None

    def test_a_release_that_is_sent_again_owes_one_attempt(self, web1: Server) -> None:
        claim = web1.must_run(THREE)
        assert web1.release(claim, now=THREE, retry_in=MINUTE) == [True]
        assert web1.release(claim, now=THREE + SECOND, retry_in=MINUTE) == [True]
        assert (web1.row().retry_at, web1.row().attempt) == (THREE + MINUTE, 2)

    def test_runs_that_may_overlap_are_tried_again_too(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task(overlap="allow"))
        server.sync(THREE - HOUR)
        first = server.must_run(THREE)
        server.release(first, now=THREE + SECOND, retry_in=MINUTE)
        assert server.row().retry_at == THREE + MINUTE + SECOND
        second = server.retry(THREE, 2, now=THREE + 2 * MINUTE)
        assert second is not None
        assert server.renew(second, now=THREE + 2 * MINUTE + SECOND) == [True]
        assert server.release(second, now=THREE + 3 * MINUTE) == [True]
        assert server.retry(THREE, 2, now=THREE + 3 * MINUTE) is None

    def test_many_are_released_each_with_its_own_wait(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task("a"), a_task("b"), a_task("c"))
        server.sync(THREE - HOUR)
        claims = server.claim(*(server.occurrence(THREE, t) for t in server.declared.tasks.values()), now=THREE)
        waits = [None, MINUTE, 2 * MINUTE]
        released = [
            ReleasedClaim(claim=claim, outcome=SUCCEEDED, min_break=BREAK, retry_in=wait)
            for claim, wait in zip(claims, waits, strict=True)
        ]
        lock.release(released, record=notes.finished, now=THREE)
        assert [server.row(name).retry_at for name in "abc"] == [None, THREE + MINUTE, THREE + 2 * MINUTE]

    def test_an_older_version_makes_no_attempt_under_a_newer_schedule(self, web1: Server, lock: BaseLock) -> None:
        web1.release(web1.must_run(THREE), now=THREE, retry_in=MINUTE)
        newer = Server(lock, web1.notes, a_task(timetable=Cron("30 * * * *", "UTC")), name="web2")
        newer.sync(THREE + SECOND)
        assert web1.retry(THREE, 2, now=THREE + MINUTE) is None
        assert newer.retry(THREE, 2, now=THREE + MINUTE) is not None

    # -- what a row owes when its server has died ---------------------------------------------------------------------

    def test_the_due_time_of_a_dead_server_is_run_again_where_the_task_says_so(
        self, lock: BaseLock, notes: Notes
    ) -> None:
        web1, web2 = (Server(lock, notes, a_task(rerun=True), name=name) for name in ("web1", "web2"))
        web1.sync(THREE - HOUR)
        dead = web1.must_run(THREE)
        (cleanup,) = web2.reap(THREE + MINUTE)
        assert cleanup.owner == dead.owner
        assert (web2.row().retry_at, web2.row().attempt) == (THREE + MINUTE, 2)
        again = web2.retry(THREE, 2, now=THREE + MINUTE)
        assert again is not None
        assert again.fence > dead.fence + 1
        assert web1.renew(dead, now=THREE + MINUTE) == [False]

    def test_a_task_that_kills_its_servers_is_run_again_three_times_and_no_more(
        self, lock: BaseLock, notes: Notes
    ) -> None:
        server = Server(lock, notes, a_task(rerun=True))
        server.sync(THREE - HOUR)
        server.must_run(THREE)
        for attempt in (2, 3, 4):
            server.reap(THREE + attempt * MINUTE)
            assert server.retry(THREE, attempt, now=THREE + attempt * MINUTE) is not None
        server.reap(THREE + 10 * MINUTE)
        assert server.row().retry_at is None
        assert server.due(THREE + 30 * MINUTE) == []

    def test_nothing_is_run_again_after_a_newer_due_time(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task(rerun=True))
        server.sync(THREE - HOUR)
        server.must_run(THREE)
        server.reap(THREE + 2 * HOUR)
        assert server.row().retry_at is None
        claim = server.must_run(THREE + 2 * HOUR)
        server.renew(claim, now=THREE + 3 * HOUR)
        assert server.skip(THREE + 3 * HOUR, now=THREE + 3 * HOUR) is not None
        server.reap(THREE + 3 * HOUR + MINUTE)
        assert server.row().retry_at is None

    def test_neither_a_run_by_hand_nor_one_whose_lock_was_freed_by_hand_is_run_again(
        self, lock: BaseLock, notes: Notes
    ) -> None:
        server = Server(lock, notes, a_task(rerun=True))
        server.sync(THREE - HOUR)
        server.release(server.must_run(THREE), now=THREE)
        server.must_run(THREE + MINUTE, trigger="manual")
        server.reap(THREE + 2 * MINUTE)
        assert server.row().retry_at is None
        server.must_run(THREE + HOUR)
        lock.free("shop.refresh", server="web1", record=notes.cleaned, now=THREE + HOUR + SECOND)
        assert server.row().retry_at is None
        assert server.due(THREE + HOUR + MINUTE) == []

    # -- what people ask for ------------------------------------------------------------------------------------------

    def test_a_paused_task_is_neither_claimed_nor_skipped_nor_seen(self, web1: Server, lock: BaseLock) -> None:
        assert lock.pause(["shop.refresh", "nobody"], reason="the shop moves", now=THREE - MINUTE) == ["shop.refresh"]
        row = web1.row()
        assert (row.paused, row.paused_at, row.paused_reason) == (True, THREE - MINUTE, "the shop moves")
        assert web1.due(THREE) == []
        assert web1.run(THREE) is None
        assert web1.skip(THREE, now=THREE, reason="missed") is None
        lock.pause(["shop.refresh"], reason="still", now=THREE)
        assert (web1.row().paused_at, web1.row().paused_reason) == (THREE - MINUTE, "still")
        assert web1.run(THREE, trigger="manual") is not None

    def test_what_runs_goes_on_while_its_task_is_paused(self, web1: Server, lock: BaseLock) -> None:
        claim = web1.must_run(THREE)
        lock.pause(["shop.refresh"], now=THREE + SECOND)
        assert web1.renew(claim, now=THREE + 2 * SECOND) == [True]
        assert web1.release(claim, now=THREE + 3 * SECOND) == [True]

    def test_what_was_due_during_a_pause_counts_as_done(self, web1: Server, lock: BaseLock) -> None:
        lock.pause(["shop.refresh"], now=THREE - MINUTE)
        at = THREE + 2 * HOUR + MINUTE
        assert lock.resume(["shop.refresh", "nobody"], following=following, now=at) == ["shop.refresh"]
        row = web1.row()
        assert (row.paused, row.paused_at, row.paused_reason) == (False, None, "")
        assert (row.last_due_at, row.next_due_at) == (at, THREE + 3 * HOUR)
        assert web1.run(THREE + 2 * HOUR, now=at) is None
        assert web1.run(THREE + 3 * HOUR) is not None
        assert lock.resume(["shop.refresh"], following=following, now=at) == []

    def test_resuming_never_lowers_what_has_been_claimed(self, web1: Server, lock: BaseLock) -> None:
        web1.release(web1.must_run(THREE + HOUR), now=THREE + HOUR, retry_in=MINUTE)
        lock.pause(["shop.refresh"], now=THREE + HOUR)
        lock.resume(["shop.refresh"], following=following, now=THREE)  # a clock that was set back
        row = web1.row()
        assert (row.last_due_at, row.next_due_at) == (THREE + HOUR, THREE + 2 * HOUR)

    @ONE_OR_ALL
    def test_what_ran_during_a_pause_is_run_again_when_its_server_dies_after_it(
        self, lock: BaseLock, notes: Notes, names: list[str] | None
    ) -> None:
        """A deploy pauses everything for some seconds: what runs on a server that is killed later is still owed."""
        server = Server(lock, notes, a_task(rerun=True))
        server.sync(THREE - HOUR)
        server.must_run(THREE)
        lock.pause(names, now=THREE + SECOND)
        assert lock.resume(names, following=following, now=THREE + 4 * SECOND) == ["shop.refresh"]
        assert (server.row().last_due_at, server.row().next_due_at) == (THREE, THREE + HOUR)
        server.reap(THREE + MINUTE)
        assert (server.row().retry_at, server.row().attempt) == (THREE + MINUTE, 2)
        assert server.retry(THREE, 2, now=THREE + MINUTE) is not None

    @ONE_OR_ALL
    def test_what_ran_during_a_pause_and_fails_after_it_is_tried_again(
        self, web1: Server, web2: Server, lock: BaseLock, names: list[str] | None
    ) -> None:
        claim = web1.must_run(THREE)
        lock.pause(names, now=THREE + SECOND)
        lock.resume(names, following=following, now=THREE + 4 * SECOND)
        assert web1.release(claim, now=THREE + 10 * SECOND, retry_in=20 * SECOND) == [True]
        assert (web1.row().retry_at, web1.row().attempt) == (THREE + 30 * SECOND, 2)
        assert web2.retry(THREE, 2, now=THREE + 30 * SECOND) is not None

    @ONE_OR_ALL
    def test_an_attempt_that_is_owed_outlives_a_pause(
        self, web1: Server, web2: Server, lock: BaseLock, names: list[str] | None
    ) -> None:
        web1.release(web1.must_run(THREE), now=THREE, retry_in=MINUTE)
        before = web1.row()
        lock.pause(names, now=THREE + SECOND)
        lock.resume(names, following=following, now=THREE + 4 * SECOND)
        assert web1.row() == before
        assert web1.due(THREE + MINUTE) == ["shop.refresh"]
        assert web2.retry(THREE, 2, now=THREE + MINUTE) is not None
        assert web1.retry(THREE, 2, now=THREE + MINUTE) is None

    @ONE_OR_ALL
    def test_an_attempt_whose_time_came_during_a_pause_is_made_late(
        self, web1: Server, lock: BaseLock, names: list[str] | None
    ) -> None:
        web1.release(web1.must_run(THREE), now=THREE, retry_in=MINUTE)
        lock.pause(names, now=THREE + SECOND)
        resumed = THREE + HOUR - MINUTE
        lock.resume(names, following=following, now=resumed)
        assert web1.due(resumed) == ["shop.refresh"]
        assert web1.retry(THREE, 2, now=resumed) is not None

    @ONE_OR_ALL
    def test_a_due_time_during_a_pause_goes_before_an_attempt_that_is_owed_and_is_not_made_up_for(
        self, web1: Server, lock: BaseLock, names: list[str] | None
    ) -> None:
        web1.release(web1.must_run(THREE), now=THREE, retry_in=50 * MINUTE)
        lock.pause(names, now=THREE + 40 * MINUTE)
        resumed = THREE + HOUR + MINUTE
        lock.resume(names, following=following, now=resumed)
        row = web1.row()
        assert (row.last_due_at, row.next_due_at, row.retry_at) == (resumed, THREE + 2 * HOUR, None)
        for due_at in (THREE, THREE + HOUR):
            assert web1.run(due_at, now=resumed) is None
            assert web1.retry(due_at, 2, now=resumed) is None
        assert web1.due(resumed) == []
        assert web1.run(THREE + 2 * HOUR) is not None

    @ONE_OR_ALL
    def test_a_due_time_during_a_pause_ends_what_is_owed_of_the_run_that_is_under_way(
        self, lock: BaseLock, notes: Notes, names: list[str] | None
    ) -> None:
        server = Server(lock, notes, a_task(rerun=True))
        server.sync(THREE - HOUR)
        claim = server.must_run(THREE)
        lock.pause(names, now=THREE + HOUR - MINUTE)
        server.renew(claim, now=THREE + HOUR)
        resumed = THREE + HOUR + SECOND
        lock.resume(names, following=following, now=resumed)
        server.reap(resumed + MINUTE)
        assert server.row().retry_at is None
        assert server.due(resumed + MINUTE) == []
        claim = server.must_run(THREE + 2 * HOUR)
        lock.pause(names, now=THREE + 3 * HOUR - MINUTE)
        server.renew(claim, now=THREE + 3 * HOUR)
        lock.resume(names, following=following, now=THREE + 3 * HOUR + SECOND)
        server.release(claim, now=THREE + 3 * HOUR + 2 * SECOND, retry_in=SECOND)
        assert server.row().retry_at is None

    @ONE_OR_ALL
    def test_a_due_time_that_came_before_a_pause_is_still_to_be_had_after_it(
        self, web1: Server, lock: BaseLock, names: list[str] | None
    ) -> None:
        lock.pause(names, now=THREE + SECOND)
        resumed = THREE + 4 * SECOND
        lock.resume(names, following=following, now=resumed)
        assert web1.due(resumed) == ["shop.refresh"]
        assert web1.run(THREE, now=resumed) is not None

    @pytest.mark.parametrize("is_known", [True, False])
    def test_a_due_time_during_a_pause_goes_before_one_that_came_before_it(
        self, web1: Server, lock: BaseLock, is_known: bool
    ) -> None:
        """Also where who resumes does not know the task, and can only suppose that there was one."""
        lock.pause(None, now=THREE + SECOND)
        resumed = THREE + HOUR + SECOND
        lock.resume(None, following=following if is_known else lambda name, after: None, now=resumed)
        for due_at in (THREE, THREE + HOUR):
            assert web1.run(due_at, now=resumed) is None
        assert web1.run(THREE + 2 * HOUR) is not None

    @ONE_OR_ALL
    def test_a_run_by_hand_during_a_pause_is_not_run_again_and_costs_no_attempt_that_is_owed(
        self, lock: BaseLock, notes: Notes, names: list[str] | None
    ) -> None:
        server = Server(lock, notes, a_task(rerun=True))
        server.sync(THREE - HOUR)
        server.release(server.must_run(THREE), now=THREE, retry_in=10 * MINUTE)
        server.must_run(THREE + MINUTE, trigger="manual")
        lock.pause(names, now=THREE + MINUTE + SECOND)
        lock.resume(names, following=following, now=THREE + MINUTE + 4 * SECOND)
        server.reap(THREE + 2 * MINUTE)
        assert (server.row().retry_at, server.row().attempt) == (THREE + 10 * MINUTE, 2)
        again = server.retry(THREE, 2, now=THREE + 10 * MINUTE)
        assert again is not None
        server.release(again, now=THREE + 10 * MINUTE)
        server.must_run(THREE + 11 * MINUTE, trigger="manual")
        lock.pause(names, now=THREE + 11 * MINUTE + SECOND)
        lock.resume(names, following=following, now=THREE + 11 * MINUTE + 4 * SECOND)
        server.reap(THREE + 12 * MINUTE)
        assert server.row().retry_at is None

    def test_what_is_owed_outlives_a_pause_of_everything_and_one_of_its_own(self, web1: Server, lock: BaseLock) -> None:
        web1.release(web1.must_run(THREE), now=THREE, retry_in=MINUTE)
        lock.pause(["shop.refresh"], now=THREE + SECOND)
        lock.pause(None, now=THREE + 2 * SECOND)
        assert lock.resume(None, following=following, now=THREE + 3 * SECOND) == []
        assert lock.resume(["shop.refresh"], following=following, now=THREE + 4 * SECOND) == ["shop.refresh"]
        assert web1.retry(THREE, 2, now=THREE + MINUTE) is not None

    def test_each_of_two_pauses_passes_over_what_was_due_in_it(self, lock: BaseLock, notes: Notes) -> None:
        """One of a task that began before, or after, the due time that came in that of everything."""
        server = Server(lock, notes, a_task("a"), a_task("b"))
        server.sync(THREE - HOUR / 2)
        lock.pause(["a"], now=THREE - 2 * MINUTE)
        lock.pause(None, now=THREE - MINUTE)
        lock.pause(["b"], now=THREE + MINUTE)
        at = THREE + 2 * MINUTE
        lock.resume(["a"], following=following, now=at)
        lock.resume(None, following=following, now=at)
        lock.resume(["b"], following=following, now=at)
        assert server.due(at) == []

    def test_who_does_not_know_a_task_goes_by_its_hint_at_the_end_of_a_pause(
        self, web1: Server, lock: BaseLock
    ) -> None:
        """Another version resumes: it has no due times of it."""
        web1.release(web1.must_run(THREE), now=THREE, retry_in=MINUTE)
        lock.pause(None, now=THREE + SECOND)
        lock.resume(None, following=lambda name, after: None, now=THREE + 4 * SECOND)
        assert web1.row().retry_at == THREE + MINUTE
        lock.pause(None, now=THREE + 5 * SECOND)
        resumed = THREE + HOUR + MINUTE
        lock.resume(None, following=lambda name, after: None, now=resumed)
        assert web1.row().retry_at is None
        assert web1.run(THREE + HOUR, now=resumed) is None

    @ONE_OR_ALL
    def test_what_was_due_during_a_pause_is_not_made_up_for_under_the_schedule_that_a_deploy_brought(
        self, web1: Server, lock: BaseLock, notes: Notes, names: list[str] | None
    ) -> None:
        lock.pause(names, now=THREE - MINUTE)
        timetable = Cron("30 * * * *", "UTC")
        newer = Server(lock, notes, a_task(timetable=timetable), name="web2")
        newer.sync(THREE + MINUTE)
        resumed = THREE + 2 * MINUTE
        lock.resume(names, following=lambda name, after: timetable.next(after), now=resumed)
        assert newer.due(resumed) == []
        assert newer.run(THREE, now=resumed) is None
        assert newer.run(THREE + HOUR / 2) is not None

    @ONE_OR_ALL
    def test_a_pause_of_a_clock_that_was_ahead_makes_up_for_nothing(
        self, web1: Server, lock: BaseLock, names: list[str] | None
    ) -> None:
        lock.pause(names, now=AHEAD)
        resumed = THREE + MINUTE
        lock.resume(names, following=following, now=resumed)
        assert web1.due(resumed) == []

    def test_nothing_owed_or_wanted_starts_while_it_is_paused(self, web1: Server, lock: BaseLock) -> None:
        web1.release(web1.must_run(THREE), now=THREE, retry_in=MINUTE)
        assert lock.want("shop.refresh", now=THREE) == THREE
        for names in (["shop.refresh"], None):
            lock.pause(names, now=THREE)
            assert web1.retry(THREE, 2, now=THREE + MINUTE) is None
            assert web1.run(THREE, trigger="manual", requested=True, now=THREE + MINUTE) is None
            assert web1.due(THREE + MINUTE) == []
            assert lock.want("shop.refresh", now=THREE + MINUTE) is None
            assert lock.resume(names, following=following, now=THREE) != []

    def test_everything_can_be_paused_and_single_pauses_outlive_that(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task("a"), a_task("b"))
        server.sync(THREE - HOUR)
        lock.pause(["a"], now=THREE - MINUTE)
        lock.pause(None, reason="all hands", now=THREE - MINUTE)
        look = lock.look(server.declared, now=THREE)
        assert (look.paused, look.due) == (True, ())
        assert server.claim(server.occurrence(THREE, server.declared.tasks["b"]), now=THREE) == []
        at = THREE + MINUTE
        assert lock.resume(None, following=following, now=at) == ["b"]
        look = lock.look(server.declared, now=at)
        assert (look.paused, look.due) == (False, ())
        assert [row.paused for row in lock.rows(["a", "b"])] == [True, False]
        assert server.claim(server.occurrence(THREE, server.declared.tasks["b"]), now=at) == []
        assert server.due(THREE + HOUR) == ["b"]
        assert lock.resume(None, following=following, now=at) == []

    def test_a_task_that_another_store_has_is_left_alone_when_everything_is_resumed(
        self, web1: Server, lock: BaseLock
    ) -> None:
        lock.pause(None, now=THREE - MINUTE)
        lock.leave(["shop.refresh"], to="other")
        before = web1.row()
        lock.resume(None, following=following, now=THREE + HOUR)
        assert web1.row() == before

    def test_an_interruption_is_seen_by_every_look(self, web1: Server, lock: BaseLock) -> None:
        assert lock.look(web1.declared, now=THREE).interrupted_at is None
        lock.interrupt(now=THREE)
        lock.interrupt(now=THREE + SECOND)
        assert lock.look(web1.declared, now=THREE + MINUTE).interrupted_at == THREE + SECOND

    def test_a_run_that_is_asked_for_is_made_once_by_whichever_server_looks_next(
        self, web1: Server, web2: Server, lock: BaseLock
    ) -> None:
        at = THREE - 10 * MINUTE
        before = web1.row()
        assert lock.want("shop.refresh", now=at) == at
        assert lock.want("shop.refresh", now=at + SECOND) == at
        assert lock.want("nobody", now=at) is None
        assert web1.due(at) == web2.due(at) == ["shop.refresh"]
        assert web1.run(at + SECOND, trigger="manual", requested=True) is None
        claim = web2.run(at, trigger="manual", requested=True)
        assert claim is not None
        assert web1.run(at, trigger="manual", requested=True) is None
        row = web1.row()
        assert (row.wanted_at, row.owner) == (None, claim.owner)
        assert (row.last_due_at, row.next_due_at) == (before.last_due_at, before.next_due_at)
        web2.release(claim, now=at + SECOND)
        assert web1.due(at + MINUTE) == []

    def test_a_due_time_that_comes_first_leaves_what_was_asked_for(self, web1: Server, lock: BaseLock) -> None:
        lock.want("shop.refresh", now=THREE - SECOND)
        web1.release(web1.must_run(THREE), now=THREE)
        assert web1.due(THREE + SECOND) == ["shop.refresh"]
        assert web1.run(THREE - SECOND, trigger="manual", requested=True, now=THREE + SECOND) is not None

    def test_a_holder_that_is_cancelled_keeps_its_lease_until_it_has_ended(
        self, web1: Server, web2: Server, lock: BaseLock
    ) -> None:
        claim = web1.must_run(THREE)
        web1.renew(claim, now=THREE + 10 * SECOND)
        assert lock.cancel({"shop.refresh": "somebody else"}, now=THREE + 11 * SECOND) == []
        assert not web1.row().cancelled
        assert lock.cancel({"shop.refresh": claim.owner}, now=THREE + 12 * SECOND) == ["shop.refresh"]
        assert web1.renew(claim, now=THREE + 20 * SECOND) == [False]
        row = web1.row()
        assert (row.cancelled, row.owner, row.expires_at) == (True, claim.owner, THREE + 40 * SECOND)
        assert web2.run(THREE + HOUR, now=THREE + HOUR) is None
        assert web1.release(claim, now=THREE + 21 * SECOND) == [True]
        assert not web1.row().cancelled
        again = web2.must_run(THREE + HOUR)
        assert web2.renew(again, now=THREE + HOUR + SECOND) == [True]

    def test_a_cancelled_holder_that_is_dead_is_cleaned_up(self, web1: Server, web2: Server, lock: BaseLock) -> None:
        claim = web1.must_run(THREE)
        lock.cancel({"shop.refresh": claim.owner}, now=THREE + SECOND)
        assert len(web2.reap(THREE + MINUTE)) == 1
        assert not web2.row().cancelled

    def test_a_retired_row_is_looked_at_no_more_until_its_task_is_declared_again(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        other = Server(lock, notes, a_task("other"))
        other.sync(THREE - MINUTE)
        fence = web1.row().fence
        assert lock.retire(["shop.refresh", "nobody"], now=THREE) == ["shop.refresh"]
        assert web1.due(THREE + HOUR) == ["other"]
        back = Server(lock, notes, a_task(), a_task("third"))
        back.sync(THREE + MINUTE)
        assert sorted(back.due(THREE + HOUR)) == ["other", "shop.refresh", "third"]
        assert web1.row().fence >= fence

    @pytest.mark.parametrize("on_every_server", [False, True])
    def test_a_retired_row_is_taken_up_again_by_the_very_version_that_declared_it_all_the_time(
        self, lock: BaseLock, notes: Notes, on_every_server: bool
    ) -> None:
        """Somebody could not read where it is declared. What was due meanwhile is not made up for."""
        server = Server(lock, notes, a_task(on_every_server=on_every_server))
        server.sync(THREE - HOUR)
        [name] = server.declared.rows
        for at in (THREE - 10 * MINUTE, THREE + DAY):
            fence = server.row(name).fence
            assert lock.retire([name], now=at) == [name]
            later = at + 2 * HOUR
            assert not lock.look(server.declared, now=later).known
            assert server.sync(later) == ([], [name])
            assert lock.look(server.declared, now=later).known
            assert server.due(later) == []
            assert server.due(later + HOUR) == [name]
            assert server.row(name).fence >= fence

    def test_a_retired_row_waits_for_the_end_of_a_newer_version_that_does_not_declare_it(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        newer = Server(lock, notes, a_task("shop.else"), name="web2")
        newer.sync(THREE - MINUTE)
        lock.retire(["shop.refresh"], now=THREE - MINUTE)
        assert lock.look(web1.declared, now=THREE).known
        assert web1.sync(THREE) == ([], [])
        assert newer.sync(THREE) == ([], [])
        assert lock.look(newer.declared, now=THREE).known
        assert lock.look(web1.declared, now=THREE).known
        assert web1.due(THREE + HOUR) == ["shop.else"]
        rolled_back = THREE + 10 * MINUTE
        assert not lock.look(web1.declared, now=rolled_back).known
        assert web1.sync(rolled_back) == ([], ["shop.refresh"])
        assert web1.due(THREE + HOUR) == ["shop.else", "shop.refresh"]

    def test_a_version_of_which_a_row_was_retired_holds_until_it_has_been_gone_for_long(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        """An older one must not take over because the newer one has to be synced anew."""
        newer = Server(lock, notes, a_task(timetable=Every(HOUR / 2)), a_task("shop.else"), name="web2")
        newer.sync(THREE - MINUTE)
        for at in (THREE - MINUTE, THREE):
            lock.retire(["shop.else"], now=at)
        assert lock.look(web1.declared, now=THREE).known
        assert web1.sync(THREE) == ([], [])
        assert web1.row().fingerprint == newer.declared.tasks["shop.refresh"].fingerprint
        rolled_back = THREE + 10 * MINUTE
        assert not lock.look(web1.declared, now=rolled_back).known
        assert web1.sync(rolled_back) == ([], ["shop.refresh"])
        assert web1.row().fingerprint == web1.declared.tasks["shop.refresh"].fingerprint

    def test_a_row_that_is_retired_while_a_version_that_declares_it_is_synced_stays_in_use(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        newer = Server(lock, notes, a_task(), a_task("shop.more"))

        def elsewhere(names: Sequence[str]) -> Mapping[str, Before]:
            assert list(names) == ["shop.more"]
            assert lock.retire(["shop.refresh"], now=THREE - MINUTE) == ["shop.refresh"]
            return {}

        newer.sync(THREE - MINUTE, elsewhere)
        assert lock.look(newer.declared, now=THREE).known
        assert sorted(newer.due(THREE)) == ["shop.more", "shop.refresh"]

    def test_a_row_that_is_held_is_neither_retired_nor_forgotten(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task(on_every_server=True))
        server.sync(THREE - HOUR)
        claim = server.must_run(THREE)
        assert lock.retire([claim.occurrence.row], now=THREE) == []
        assert lock.forget([claim.occurrence.row], now=THREE) == []
        assert server.row("shop.refresh@web1").owner == claim.owner

    def test_the_row_of_a_server_that_is_gone_is_forgotten_and_its_fence_still_rises(
        self, lock: BaseLock, notes: Notes
    ) -> None:
        server = Server(lock, notes, a_task(on_every_server=True))
        server.sync(THREE - HOUR)
        claim = server.must_run(THREE)
        server.release(claim, now=THREE)
        assert lock.forget(["shop.refresh@web1", "shop.refresh@web9"], now=THREE + DAY) == ["shop.refresh@web1"]
        assert lock.rows(["shop.refresh@web1"]) == []
        # With the very declarations that it had before.
        assert not lock.look(server.declared, now=THREE + 40 * DAY).known
        assert server.sync(THREE + 40 * DAY) == (["shop.refresh@web1"], [])
        assert server.must_run(THREE + 40 * DAY + HOUR).fence > claim.fence

    def test_a_row_that_all_servers_share_is_never_forgotten(self, web1: Server, lock: BaseLock) -> None:
        assert lock.forget(["shop.refresh"], now=THREE + 365 * DAY) == []
        assert web1.row().task == "shop.refresh"

    # -- a clock that was ahead, and was put right --------------------------------------------------------------------

    def test_what_was_counted_as_done_by_a_clock_that_was_ahead_runs_at_its_next_due_time(self, web1: Server) -> None:
        web1.release(web1.must_run(AHEAD), now=AHEAD + SECOND)
        back = THREE - 10 * MINUTE
        fence = web1.row().fence
        assert web1.due(THREE) == []
        assert web1.run(THREE) is None
        assert web1.set_right(back) == ["shop.refresh"]
        row = web1.row()
        assert (row.last_due_at, row.next_due_at, row.not_before, row.fence) == (back, THREE, back, fence)
        assert web1.set_right(back + SECOND) == []
        assert web1.row() == row
        assert web1.due(back) == []
        for past in (back, back - SECOND, THREE - HOUR / 4):
            assert web1.run(past, now=back + SECOND) is None
        assert web1.due(THREE) == ["shop.refresh"]
        claim = web1.must_run(THREE)
        assert claim.fence > fence
        web1.release(claim, now=THREE + SECOND)
        assert web1.run(THREE, now=THREE + MINUTE) is None

    def test_a_due_time_that_ran_ahead_of_its_time_runs_again_when_that_comes(self, web1: Server) -> None:
        web1.release(web1.must_run(AHEAD), now=AHEAD)
        web1.set_right(THREE)
        assert web1.run(AHEAD) is not None

    def test_a_task_that_was_registered_by_a_clock_that_was_ahead_is_due_in_its_time(
        self, lock: BaseLock, notes: Notes
    ) -> None:
        server = Server(lock, notes, a_task())
        server.sync(AHEAD)
        assert server.set_right(THREE - MINUTE) == ["shop.refresh"]
        row = server.row()
        assert (row.last_due_at, row.schedule_since, row.next_due_at) == (THREE - MINUTE, THREE - MINUTE, THREE)
        assert server.run(THREE) is not None

    def test_a_schedule_that_was_taken_over_by_a_clock_that_was_ahead_counts_from_now(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        other = Server(lock, notes, a_task(timetable=Every(HOUR / 3)))
        other.sync(AHEAD)
        assert other.set_right(THREE - MINUTE) == ["shop.refresh"]
        row = other.row()
        assert (row.last_due_at, row.schedule_since) == (THREE - HOUR / 2, THREE - MINUTE)
        assert other.due(THREE) == ["shop.refresh"]
        assert other.run(THREE) is not None

    def test_a_due_time_of_the_old_schedule_that_is_open_stays_so_when_a_clock_is_set_right(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        other = Server(lock, notes, a_task(timetable=Every(3 * HOUR)))
        other.sync(AHEAD)
        other.set_right(THREE + MINUTE)
        assert (other.row().last_due_at, other.row().next_due_at) == (THREE - HOUR / 2, THREE)

    def test_a_hint_that_nobody_here_knows_is_early_and_one_of_a_retired_row_none(
        self, web1: Server, lock: BaseLock
    ) -> None:
        web1.release(web1.must_run(AHEAD), now=AHEAD)
        assert lock.set_right({"shop.refresh": REACH}, following=nobody_knows, now=THREE) == ["shop.refresh"]
        assert web1.row().next_due_at == THREE
        web1.release(web1.must_run(AHEAD), now=AHEAD)
        lock.retire(["shop.refresh"], now=AHEAD)
        lock.set_right({"shop.refresh": REACH}, following=nobody_knows, now=THREE)
        assert (web1.row().last_due_at, web1.row().next_due_at) == (THREE, None)

    def test_what_is_within_the_reach_of_the_clock_is_untouched(self, web1: Server, lock: BaseLock) -> None:
        web1.release(web1.must_run(AHEAD), now=AHEAD)
        before = web1.row()
        assert web1.set_right(AHEAD) == web1.set_right(AHEAD - 2 * LEASE) == []
        assert web1.row() == before
        assert web1.set_right(AHEAD - 2 * LEASE - SECOND, rest=3 * LEASE) == ["shop.refresh"]
        assert web1.row().not_before == AHEAD + BREAK

    def test_a_break_ends_when_a_clock_is_set_right_unless_it_may_be_so_long(
        self, lock: BaseLock, notes: Notes
    ) -> None:
        server = Server(lock, notes, a_task())
        server.sync(THREE - HOUR)
        server.release(server.must_run(THREE, min_break=DAY), now=AHEAD)
        for longest in (4 * DAY, None):
            assert server.set_right(THREE + MINUTE, rest=longest) == []
        assert server.run(THREE + HOUR) is None
        assert server.set_right(THREE + MINUTE) == ["shop.refresh"]
        row = server.row()
        assert (row.last_due_at, row.not_before, row.next_due_at) == (THREE, THREE + MINUTE, THREE + HOUR)
        assert server.run(THREE + HOUR) is not None

    def test_what_is_owed_and_asked_for_is_begun_when_a_clock_is_set_right(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task(timetable=Cron("0 3 1 1 *")))
        server.sync(THREE - HOUR)
        server.release(server.must_run(THREE), now=AHEAD, retry_in=MINUTE)
        lock.want("shop.refresh", now=AHEAD)
        back = THREE + 10 * MINUTE
        assert server.retry(THREE, 2, now=back) is None
        assert server.due(back) == []
        assert server.set_right(back, retry=4 * DAY) == ["shop.refresh"]
        assert (server.row().retry_at, server.row().wanted_at) == (AHEAD + MINUTE, back)
        server.set_right(back)
        assert server.due(back) == ["shop.refresh"]
        row = server.row()
        assert (row.last_due_at, row.retry_at, row.wanted_at) == (THREE, back, back)
        claim = server.retry(THREE, 2, now=back)
        assert claim is not None
        server.release(claim, now=back)
        assert server.run(back, trigger="manual", requested=True, now=back + SECOND) is not None

    def test_what_is_owed_of_a_due_time_that_comes_again_is_dropped(self, web1: Server) -> None:
        web1.release(web1.must_run(AHEAD), now=AHEAD, retry_in=MINUTE)
        assert web1.row().retry_at == AHEAD + MINUTE
        web1.set_right(THREE)
        assert web1.row().retry_at is None
        assert web1.due(THREE + MINUTE) == []

    def test_a_holder_that_lives_keeps_its_lease_when_a_clock_is_set_right(self, web1: Server, web2: Server) -> None:
        claim = web1.must_run(AHEAD)
        back = THREE - MINUTE
        assert web1.set_right(back) == ["shop.refresh"]
        row = web1.row()
        assert (row.owner, row.fence, row.expires_at) == (claim.owner, claim.fence, AHEAD + LEASE)
        assert web1.renew(claim, now=back + SECOND) == [True]
        row = web1.row()
        assert (row.renewed_at, row.expires_at) == (back + SECOND, back + SECOND + LEASE)
        assert web1.set_right(back + 2 * SECOND) == []
        assert web1.row() == row
        assert web2.run(THREE) is None
        assert web1.release(claim, now=THREE) == [True]
        assert web2.run(THREE, now=THREE + BREAK) is not None

    def test_a_lease_of_a_clock_that_was_ahead_ends_in_time_when_it_is_not_renewed_again(
        self, web1: Server, web2: Server
    ) -> None:
        claim = web1.must_run(AHEAD)
        web1.renew(claim, now=THREE)
        assert [cleanup.owner for cleanup in web2.reap(THREE + LEASE)] == [claim.owner]

    def test_a_dead_holders_lock_is_freed_once_after_a_clock_was_set_right(
        self, web1: Server, web2: Server, lock: BaseLock, notes: Notes
    ) -> None:
        claim = web1.must_run(AHEAD)
        back = THREE - MINUTE
        web1.set_right(back)
        assert web2.reap(back + LEASE) == []
        free: dict[str, Any] = {"owner": claim.owner, "server": "web2", "record": notes.cleaned, "now": back + LEASE}
        cleanup = lock.free("shop.refresh", **free)
        assert cleanup is not None
        assert (cleanup.owner, cleanup.fence, cleanup.reason) == (claim.owner, claim.fence, "released_by_hand")
        assert lock.free("shop.refresh", **free) is None
        assert web2.reap(back + LEASE) == []
        assert [each.owner for each in notes.cleanups] == [claim.owner]
        assert web1.renew(claim, now=back + LEASE) == [False]
        assert web2.must_run(THREE).fence > claim.fence

    def test_nothing_is_owed_for_a_server_that_dies_after_its_clock_was_set_right(
        self, lock: BaseLock, notes: Notes
    ) -> None:
        server = Server(lock, notes, a_task(rerun=True))
        server.sync(THREE - HOUR)
        claim = server.must_run(AHEAD)
        server.set_right(THREE - 10 * MINUTE)
        server.renew(claim, now=THREE - 10 * MINUTE)
        assert len(server.reap(THREE - MINUTE)) == 1
        assert server.row().retry_at is None
        assert server.due(THREE - MINUTE) == []

    def test_the_slot_of_a_dead_holder_is_free_a_lease_after_a_clock_was_set_right(
        self, lock: BaseLock, notes: Notes
    ) -> None:
        server = Server(lock, notes, a_task("a"), a_task("b"))
        server.sync(THREE - HOUR)
        a, b = server.declared.tasks.values()
        assert len(server.claim(server.occurrence(AHEAD, a), now=AHEAD, slots=1)) == 1
        assert server.claim(server.occurrence(THREE, b), now=THREE, slots=1) == []
        server.set_right(THREE)
        lock.free("a", server="web1", record=notes.cleaned, now=THREE + LEASE)
        assert len(server.claim(server.occurrence(THREE, b), now=THREE + LEASE, slots=1)) == 1

    def test_runs_that_may_overlap_end_a_lease_after_a_clock_was_set_right_unless_they_are_renewed(
        self, lock: BaseLock, notes: Notes
    ) -> None:
        server = Server(lock, notes, a_task(overlap="allow"))
        server.sync(THREE - HOUR)
        dead, alive = server.must_run(AHEAD), server.must_run(AHEAD + HOUR)
        server.set_right(THREE)
        assert server.set_right(THREE) == []
        assert server.renew(alive, now=THREE + SECOND) == [True]
        assert server.reap(THREE + LEASE - SECOND) == []
        assert [cleanup.owner for cleanup in server.reap(THREE + LEASE)] == [dead.owner]
        assert server.release(alive, now=THREE + LEASE) == [True]

    def test_runs_that_may_overlap_are_told_of_by_the_names_of_their_rows(self, lock: BaseLock, notes: Notes) -> None:
        server = Server(lock, notes, a_task(overlap="allow"))
        server.sync(THREE - HOUR)
        claim = server.must_run(THREE)
        server.renew(claim, now=AHEAD)
        assert server.row().last_due_at == THREE
        assert server.set_right(THREE) == ["shop.refresh"]
        assert server.set_right(THREE) == []

    def test_an_interrupt_by_a_clock_that_was_ahead_ends_nothing_that_begins_later(
        self, web1: Server, lock: BaseLock
    ) -> None:
        lock.interrupt(now=AHEAD)
        web1.set_right(THREE)
        assert lock.look(web1.declared, now=THREE).interrupted_at == THREE
        web1.set_right(THREE + SECOND)
        assert lock.look(web1.declared, now=THREE + MINUTE).interrupted_at == THREE

    def test_a_version_that_was_seen_by_a_clock_that_was_ahead_is_gone_in_time(
        self, web1: Server, lock: BaseLock, notes: Notes
    ) -> None:
        newer = Server(lock, notes, a_task(timetable=Every(HOUR / 3)))
        newer.sync(AHEAD)
        assert lock.look(web1.declared, now=THREE + 6 * MINUTE).known
        web1.set_right(THREE)
        assert lock.look(web1.declared, now=THREE + 4 * MINUTE).known
        assert not lock.look(web1.declared, now=THREE + 6 * MINUTE).known
        assert web1.sync(THREE + 6 * MINUTE) == ([], ["shop.refresh"])
        assert web1.row().schedule_since <= THREE + 6 * MINUTE

    def test_a_pause_outlives_that_a_clock_is_set_right(self, web1: Server, lock: BaseLock) -> None:
        web1.release(web1.must_run(AHEAD), now=AHEAD)
        lock.pause(["shop.refresh"], reason="the shop moves", now=AHEAD)
        assert web1.set_right(THREE - MINUTE) == ["shop.refresh"]
        assert (web1.row().paused, web1.row().paused_reason) == (True, "the shop moves")
        assert web1.run(THREE) is None

    def test_each_of_many_rows_is_set_right_by_its_own(self, lock: BaseLock, notes: Notes) -> None:
        tasks = [a_task(f"t{i:02}") for i in range(12)]
        server = Server(lock, notes, *tasks)
        server.sync(THREE - HOUR)
        for i, task in enumerate(tasks):
            server.claim(server.occurrence(AHEAD - i * HOUR, task), now=AHEAD)
        reaches = {task.name: dataclasses.replace(REACH, far=(3 - i % 2) * DAY) for i, task in enumerate(tasks)}
        done = lock.set_right(reaches, following=following, now=THREE + MINUTE)
        assert done == [f"t{i:02}" for i in range(1, 12, 2)]
        for i, row in enumerate(lock.rows([task.name for task in tasks])):
            assert row.last_due_at == (THREE + MINUTE if i % 2 else AHEAD - i * HOUR)


def nobody_knows(name: str, after: datetime) -> datetime | None:
    """Know nothing of any schedule."""
    return None


def following(name: str, after: datetime) -> datetime | None:
    """Return the next full hour, as ``HOURLY`` has it."""
    return HOURLY.next(after)
