"""What the history says of runs, skips and clean-ups."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.db import DataError
from django.db.models import QuerySet

from multiserver_schedule import history as history_module
from multiserver_schedule.entries import Claim, Outcome, ReleasedClaim, Skip
from multiserver_schedule.history import History
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.models import CleanupLog, ScheduledRun
from multiserver_schedule.testing.contract import (
    FILTERED,
    HOUR,
    LEASE,
    MINUTE,
    SECOND,
    SUCCEEDED,
    THREE,
    Notes,
    Server,
    a_task,
)

from .stores import Store


@pytest.fixture
def history(store: Store) -> History:
    return History(store.alias)


@pytest.fixture
def web1(store: Store, history: History) -> Server:
    server = Server(ORMLock("default", {"using": store.alias}), Notes(history), a_task())
    server.sync(THREE - HOUR / 2)
    return server


@pytest.fixture
def web2(web1: Server) -> Server:
    return Server(web1.lock, web1.notes, a_task(), name="web2")


def told(store: Store, *fields: str) -> list[Any]:
    """Return these fields of all runs, oldest first."""
    runs = ScheduledRun.objects.using(store.alias).order_by("pk").values_list(*fields, flat=len(fields) == 1)
    return list(runs)


def test_a_run_is_told_from_its_claim_to_its_end(store: Store, web1: Server) -> None:
    claim = web1.must_run(THREE, now=THREE + SECOND)
    (run,) = ScheduledRun.objects.using(store.alias).all()
    assert (run.task, run.due_at, run.trigger, run.attempt, run.status) == (
        "shop.refresh",
        THREE,
        "schedule",
        1,
        "running",
    )
    assert (run.server, run.owner, run.fence, run.started_at) == ("web1", claim.owner, claim.fence, THREE + SECOND)
    assert (run.expires_at, run.finished_at) == (None, None)
    outcome = Outcome(status="failed", reason="exit status 3", error="Traceback", output="last words")
    web1.release(claim, now=THREE + MINUTE, outcome=outcome)
    run.refresh_from_db()
    assert (run.status, run.reason, run.error, run.output) == ("failed", "exit status 3", "Traceback", "last words")
    assert run.finished_at == THREE + MINUTE


def test_runs_that_end_at_once_each_keep_their_own_outcome(store: Store, history: History) -> None:
    server = Server(ORMLock("default", {"using": store.alias}), Notes(history), *(a_task(name) for name in "abc"))
    server.sync(THREE - HOUR)
    claims = server.claim(*(server.occurrence(THREE, task) for task in server.declared.tasks.values()), now=THREE)
    outcomes = [SUCCEEDED, Outcome(status="failed", error="b"), Outcome(status="timed_out", output="c")]
    released = [ReleasedClaim(claim=c, outcome=o, min_break=SECOND) for c, o in zip(claims, outcomes, strict=True)]
    server.lock.release(released, record=history.finished, now=THREE)
    assert told(store, "task", "status", "error", "output") == [
        ("a", "succeeded", "", ""),
        ("b", "failed", "b", ""),
        ("c", "timed_out", "", "c"),
    ]


@pytest.mark.parametrize("limit", [1, 10])
def test_long_outputs_are_written_in_several_statements(
    store: Store, history: History, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(history_module, "TEXT_PER_STATEMENT", limit)
    server = Server(ORMLock("default", {"using": store.alias}), Notes(history), *(a_task(name) for name in "abc"))
    server.sync(THREE - HOUR)
    claims = server.claim(*(server.occurrence(THREE, task) for task in server.declared.tasks.values()), now=THREE)
    server.release(*claims, now=THREE, outcome=Outcome(status="succeeded", output="123456"))
    assert told(store, "output") == ["123456"] * 3


@pytest.mark.parametrize("text", ["NUL \0 byte", "lone \udcff surrogate", "snow ☃ and 🎉", "x" * 70_000])
def test_whatever_a_program_prints_the_lock_is_released(store: Store, web1: Server, text: str) -> None:
    claim = web1.must_run(THREE)
    assert web1.release(claim, now=THREE, outcome=Outcome(status="failed", error=text, output=text, reason=text))
    (run,) = ScheduledRun.objects.using(store.alias).all()
    assert run.status == "failed"
    assert run.output[:4] == text[:4]
    assert len(run.reason) <= 255


def test_a_database_that_refuses_a_letter_gets_it_escaped(
    store: Store, web1: Server, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A MySQL database in another character set than UTF-8 does."""
    end = history._end
    refused: list[str] = []

    def refuse(ended: list[tuple[Claim, Outcome]], now: datetime) -> None:
        for _, outcome in ended:
            if not outcome.output.isascii():
                refused.append(outcome.output)
                raise DataError("Incorrect string value")
        end(ended, now)

    monkeypatch.setattr(history, "_end", refuse)
    claim = web1.must_run(THREE)
    assert web1.release(claim, now=THREE, outcome=Outcome(status="succeeded", output="☃")) == [True]
    assert refused == ["☃"]
    assert told(store, "status", "output") == [("succeeded", "\\u2603")]


# -- skips -------------------------------------------------------------------------------------------------------------


def hold(web1: Server, web2: Server, claim: Claim, due_at: datetime) -> None:
    web1.renew(claim, now=due_at)
    assert web2.skip(due_at, now=due_at) is not None


def test_a_skip_says_who_held_the_lock_and_since_when(store: Store, web1: Server, web2: Server) -> None:
    claim = web1.must_run(THREE, now=THREE + 2 * SECOND)
    hold(web1, web2, claim, THREE + HOUR)
    assert told(store, "status", "reason", "count")[1:] == [("skipped", "held by web1 since 2030-01-01T03:00:02Z", 1)]


def test_equal_skips_in_a_row_are_one_row_with_a_count(store: Store, web1: Server, web2: Server) -> None:
    claim = web1.must_run(THREE)
    for hour in (1, 2, 3):
        hold(web1, web2, claim, THREE + hour * HOUR)
    assert told(store, "status", "count", "due_at", "finished_at")[1:] == [
        ("skipped", 3, THREE + 3 * HOUR, THREE + 3 * HOUR)
    ]


def test_a_run_between_two_skips_keeps_them_apart(store: Store, web1: Server, web2: Server) -> None:
    claim = web1.must_run(THREE)
    hold(web1, web2, claim, THREE + HOUR)
    web1.release(claim, now=THREE + HOUR + SECOND)
    claim = web1.must_run(THREE + 2 * HOUR)
    hold(web1, web2, claim, THREE + 3 * HOUR)
    assert told(store, "status", "count") == [("succeeded", 1), ("skipped", 1), ("running", 1), ("skipped", 1)]


def test_skips_for_another_holder_are_another_row(store: Store, web1: Server, web2: Server, history: History) -> None:
    skip = Skip(occurrence=web1.occurrence(THREE), reason="held", holder="web1", held_since=THREE)
    history.skipped([skip], THREE)
    again = replace(skip, occurrence=web1.occurrence(THREE + HOUR), held_since=THREE + HOUR)
    history.skipped([again], THREE + HOUR)
    other = replace(skip, occurrence=web1.occurrence(THREE + 2 * HOUR), holder="web10")
    history.skipped([other], THREE + 2 * HOUR)
    assert told(store, "reason", "count") == [
        ("held by web1 since 2030-01-01T04:00:00Z", 2),
        ("held by web10 since 2030-01-01T03:00:00Z", 1),
    ]


def test_due_times_that_a_claim_passes_over_are_recorded_as_missed(store: Store, web1: Server) -> None:
    due = THREE + 5 * HOUR
    web1.must_run(due, missed=5, missed_at=due - HOUR, trigger="catch_up")
    assert told(store, "status", "reason", "count", "due_at", "trigger") == [
        ("skipped", "missed", 5, due - HOUR, "schedule"),
        ("running", "", 1, due, "catch_up"),
    ]


def test_a_due_time_that_came_too_late_is_missed_with_those_before_it(store: Store, web1: Server) -> None:
    due = THREE + 5 * HOUR
    assert web1.skip(due, now=due + HOUR / 2, reason="missed", missed=5, missed_at=due - HOUR) is not None
    assert told(store, "reason", "count", "due_at") == [("missed", 6, due)]


def test_missed_due_times_before_a_skip_are_a_row_of_their_own(store: Store, web1: Server, history: History) -> None:
    occurrence = web1.occurrence(THREE + 3 * HOUR, missed=2, missed_at=THREE + 2 * HOUR)
    skip = Skip(occurrence=occurrence, reason="held", holder="web2", held_since=THREE)
    history.skipped([skip], THREE + 3 * HOUR)
    assert told(store, "reason", "count") == [("missed", 2), ("held by web2 since 2030-01-01T03:00:00Z", 1)]


def test_runs_that_their_filters_refuse_are_one_row_with_a_count(store: Store, web1: Server) -> None:
    for hour in range(3):
        web1.release(web1.must_run(THREE + hour * HOUR), now=THREE + hour * HOUR, outcome=FILTERED)
    assert told(store, "status", "reason", "count", "due_at") == [("skipped", "filtered", 3, THREE + 2 * HOUR)]


def test_two_refused_runs_of_one_task_at_once_both_count(store: Store, history: History) -> None:
    task = a_task(overlap="allow")
    server = Server(ORMLock("default", {"using": store.alias}), Notes(history), task)
    server.sync(THREE - HOUR)
    claims = [server.must_run(THREE), server.must_run(THREE + SECOND)]
    server.release(*claims, now=THREE + 2 * SECOND, outcome=FILTERED)
    assert told(store, "status", "count", "due_at") == [("skipped", 2, THREE + SECOND)]


# -- lost, abandoned, overran ------------------------------------------------------------------------------------------


def test_a_run_whose_lease_was_cleaned_up_is_abandoned(store: Store, web1: Server, web2: Server) -> None:
    web1.must_run(THREE)
    (cleanup,) = web2.reap(THREE + LEASE)
    assert told(store, "status", "reason", "finished_at") == [
        ("abandoned", "its server stopped renewing the lease", THREE + LEASE)
    ]
    log = CleanupLog.objects.using(store.alias).get()
    assert log.pk == cleanup.pk
    assert (log.task, log.due_at, log.server, log.cleaned_by) == ("shop.refresh", THREE, "web1", "web2")
    assert (log.owner, log.fence, log.reason) == (cleanup.owner, cleanup.fence, "lease_expired")
    assert (log.acquired_at, log.expired_at, log.cleaned_at) == (THREE, THREE + LEASE, THREE + LEASE)


def test_a_run_that_ends_without_its_lease_is_lost_even_if_it_succeeded(
    store: Store, web1: Server, web2: Server
) -> None:
    claim = web1.must_run(THREE)
    web2.reap(THREE + LEASE)
    web1.release(claim, now=THREE + MINUTE, outcome=Outcome(status="succeeded", output="all done"))
    assert told(store, "status", "reason", "output") == [
        ("lost", "the lease was lost; the run had succeeded", "all done")
    ]


def test_an_end_at_the_limit_is_a_clean_up_and_leaves_its_trace(store: Store, history: History) -> None:
    server = Server(ORMLock("default", {"using": store.alias}), Notes(history), a_task(limit=MINUTE))
    server.sync(THREE - HOUR)
    claim = server.must_run(THREE)
    now = THREE + MINUTE + SECOND
    server.renew(claim, now=now)
    server.release(claim, now=now, outcome=Outcome(status="timed_out", reason="over"), cleanup="overran")
    log = CleanupLog.objects.using(store.alias).get()
    assert (log.reason, log.owner, log.fence, log.cleaned_by) == ("overran", claim.owner, claim.fence, "web1")
    assert [cleanup.pk for cleanup in history.cleanups] == [log.pk]
    assert told(store, "status", "reason") == [("timed_out", "over")]


def test_a_clean_up_that_is_logged_already_does_not_keep_others_from_being_freed(
    store: Store, web1: Server, history: History
) -> None:
    claim = web1.must_run(THREE)
    CleanupLog.objects.using(store.alias).create(
        task="x", owner=claim.owner, fence=1, cleaned_at=THREE, cleaned_by="web9", reason="lease_expired"
    )
    assert len(web1.reap(THREE + LEASE)) == 1
    assert web1.row().owner is None


# -- the tripwire ------------------------------------------------------------------------------------------------------


def tampered(store: Store, web1: Server) -> QuerySet[ScheduledRun]:
    """Make it look as if three o'clock had been run before."""
    runs = ScheduledRun.objects.using(store.alias)
    runs.create(task="shop.refresh", due_at=THREE, status="succeeded", owner="somebody")
    return runs.all()


def test_a_due_time_with_a_run_already_is_reported_and_stops_nobody(store: Store, history: History) -> None:
    server = Server(ORMLock("default", {"using": store.alias}), Notes(history), a_task(), a_task("shop.other"))
    server.sync(THREE - HOUR)
    runs = tampered(store, server)
    claims = server.claim(*(server.occurrence(THREE, t) for t in server.declared.tasks.values()), now=THREE)
    assert len(claims) == 2
    assert history.violations == [claims[0]]
    run = runs.get(owner=claims[0].owner)
    assert (run.attempt, run.status, run.reason) == (2, "running", "this due time had a run already")
    assert server.release(*claims, now=THREE + SECOND) == [True, True]
    assert set(told(store, "status")) == {"succeeded"}


def test_nothing_is_reported_when_all_is_well(web1: Server, history: History) -> None:
    claim = web1.must_run(THREE)
    assert history.violations == []
    web1.release(claim, now=THREE)
    assert history.cleanups == []


def test_a_skip_whose_due_time_has_a_row_is_counted_all_the_same(store: Store, web1: Server, history: History) -> None:
    first = Skip(occurrence=web1.occurrence(THREE - HOUR), reason="missed")
    tampered(store, web1)
    history.skipped([first], THREE - HOUR)
    history.skipped([Skip(occurrence=web1.occurrence(THREE), reason="missed")], THREE)
    assert told(store, "status", "count") == [("succeeded", 1), ("skipped", 2)]


def test_manual_runs_of_one_moment_are_told_apart(store: Store, web1: Server, history: History) -> None:
    for _ in range(2):
        claim = web1.must_run(THREE, trigger="manual", min_break=timedelta(0))
        web1.release(claim, now=THREE)
    assert history.violations == []
    assert told(store, "trigger", "attempt", "status") == [("manual", 1, "succeeded"), ("manual", 2, "succeeded")]
