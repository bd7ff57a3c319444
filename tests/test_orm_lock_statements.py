"""What the ORM lock costs: counts of statements, which do not grow with the number of tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.db import connections
from django.test.utils import CaptureQueriesContext

from multiserver_schedule.entries import Occurrence, ReleasedClaim, Skip
from multiserver_schedule.history import History
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.models import CleanupLog, ScheduledLock, ScheduledRun, ScheduleState
from multiserver_schedule.testing.contract import (
    AHEAD,
    BREAK,
    HOUR,
    LEASE,
    MINUTE,
    REACH,
    SECOND,
    SUCCEEDED,
    THREE,
    Notes,
    Server,
    a_task,
    following,
)

from .stores import Store

SEEN = THREE - HOUR


def a_server(store: Store, number: int, **options: Any) -> Server:
    """Return a server with so many tasks, registered and used before."""
    history = History(store.alias)
    tasks = [a_task(f"shop.task{i}", **options) for i in range(number)]
    server = Server(ORMLock("default", {"using": store.alias}), Notes(history), *tasks)
    server.sync(SEEN)
    server.reap(SEEN)
    connections[store.alias].close()
    connections[store.alias].ensure_connection()
    ScheduleState.objects.using(store.alias).create(key=f"server:{server.name}")
    return server


def statements(store: Store, call: Callable[[], Any]) -> int:
    with CaptureQueriesContext(connections[store.alias]) as captured:
        call()
    return len([query for query in captured if query["sql"] not in ("BEGIN", "COMMIT")])


@pytest.mark.parametrize("number", [1, 100, 10_000])
def test_a_look_with_nothing_due_takes_one_statement(store: Store, number: int) -> None:
    history = History(store.alias)
    first = a_task("shop.task0")
    server = Server(ORMLock("default", {"using": store.alias}), Notes(history), first)
    server.sync(SEEN)
    row = ScheduledLock.objects.using(store.alias).values(
        "last_due_at", "next_due_at", "schedule_since", "not_before", "fingerprint"
    )[0]
    more = [ScheduledLock(task=f"shop.task{i}", **row) for i in range(1, number)]
    ScheduledLock.objects.using(store.alias).bulk_create(more, batch_size=2_000)
    assert statements(store, lambda: server.lock.look(server.declared, now=SEEN + 30 * SECOND)) == 1
    look = server.lock.look(server.declared, now=SEEN + 30 * SECOND)
    assert (look.known, look.due, look.expired) == (True, (), False)


def test_once_a_minute_a_look_takes_one_more(store: Store) -> None:
    server = a_server(store, 2)
    assert statements(store, lambda: server.lock.look(server.declared, now=SEEN + 2 * MINUTE)) == 2
    assert statements(store, lambda: server.lock.look(server.declared, now=SEEN + 2 * MINUTE)) == 1


def empty(store: Store) -> None:
    for model in (ScheduledLock, ScheduledRun, CleanupLog, ScheduleState):
        model.objects.using(store.alias).all().delete()


def a_life(store: Store, number: int, *, slots: int | None = None) -> dict[str, int]:
    """Count the statements of each step for so many tasks at once."""
    server = a_server(store, number)
    lock, history = server.lock, History(store.alias)
    rows = {row.task: row for row in lock.rows()}
    tasks = server.declared.tasks.values()
    one_each = [
        Occurrence(
            task=task,
            row=task.name,
            pk=rows[task.name].pk,
            due_at=THREE,
            next_due_at=THREE + HOUR,
            lease=LEASE,
            min_break=BREAK,
        )
        for task in tasks
    ]
    counts: dict[str, int] = {}
    claims: list[Any] = []

    def claim() -> None:
        claims.extend(lock.claim(one_each, server="web1", slots=slots, record=history.started, now=THREE))

    counts["claim"] = statements(store, claim)
    assert len(claims) == number
    counts["claim again"] = statements(store, claim)
    assert len(claims) == number
    counts["renew"] = statements(store, lambda: lock.renew(claims, now=THREE + SECOND))
    half = claims[: number // 2]
    released = [ReleasedClaim(claim=claim, outcome=SUCCEEDED, min_break=BREAK) for claim in half]
    counts["release"] = statements(store, lambda: lock.release(released, record=history.finished, now=THREE + SECOND))
    counts["reap"] = statements(store, lambda: lock.reap(server="web2", record=history.cleaned, now=THREE + MINUTE))
    skips = [
        Skip(
            occurrence=Occurrence(
                task=o.task, row=o.row, pk=o.pk, due_at=THREE + HOUR, next_due_at=None, lease=LEASE, min_break=BREAK
            ),
            reason="missed",
        )
        for o in one_each
    ]
    given_up: list[Skip] = []
    counts["skip"] = statements(
        store, lambda: given_up.extend(lock.skip(skips, record=history.skipped, now=THREE + HOUR))
    )
    assert len(given_up) == number
    return counts


def test_a_step_for_500_tasks_takes_as_many_statements_as_for_50(store: Store) -> None:
    fifty = a_life(store, 50)
    assert fifty["renew"] == 1
    assert fifty["claim"] <= 6
    empty(store)
    five_hundred = a_life(store, 500)
    if store.vendor == "sqlite":
        batches = -(-500 // ORMLock("default", {"using": store.alias})._batch_size())
        assert {step: count for step, count in five_hundred.items() if count > fifty[step] * batches} == {}
    else:
        assert five_hundred == fifty


def test_slots_are_counted_by_one_statement_more(store: Store) -> None:
    without = a_life(store, 20)
    empty(store)
    counted = a_life(store, 20, slots=20)["claim"]
    assert counted == without["claim"] + 1


def test_one_claim_is_a_handful_of_statements(store: Store) -> None:
    """Touch, lock, take, read back; insert the run, and see that it is there."""
    server = a_server(store, 1)
    occurrence = server.occurrence(THREE)
    assert statements(store, lambda: server.claim(occurrence, now=THREE)) == 6


def test_to_set_right_takes_as_many_statements_for_300_tasks_as_for_30(store: Store) -> None:
    counts = []
    for number in (30, 300):
        empty(store)
        server = a_server(store, number)
        ScheduledLock.objects.using(store.alias).update(last_due_at=AHEAD, next_due_at=AHEAD + HOUR)
        reaches = dict.fromkeys(server.declared.tasks, REACH)
        done: list[str] = []

        def mend(server: Server = server, reaches: Any = reaches, done: list[str] = done) -> None:
            done += server.lock.set_right(reaches, following=following, now=THREE)

        counts.append(statements(store, mend))
        assert len(done) == number
    assert counts[0] <= 10
    batches = -(-300 // ORMLock("default", {"using": store.alias})._batch_size())
    assert counts[1] <= counts[0] * batches
    if store.vendor != "sqlite":
        assert counts[1] == counts[0]


def test_to_set_right_where_nothing_is_wrong_writes_nothing(store: Store) -> None:
    server = a_server(store, 30)
    before = list(ScheduledLock.objects.using(store.alias).order_by("pk").values())
    states = list(ScheduleState.objects.using(store.alias).order_by("pk").values())
    assert server.set_right(THREE) == []
    assert list(ScheduledLock.objects.using(store.alias).order_by("pk").values()) == before
    assert list(ScheduleState.objects.using(store.alias).order_by("pk").values()) == states
