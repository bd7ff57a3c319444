"""What of the history goes and what stays, on every database."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from django.db import DatabaseError, OperationalError, connections
from django.test.utils import CaptureQueriesContext

from multiserver_schedule.history import History
from multiserver_schedule.models import CleanupLog, ScheduledRun
from multiserver_schedule.retention import Pruned, Retention

from .stores import Store

NOW = datetime(2030, 6, 1, tzinfo=timezone.utc)
DAY = timedelta(days=1)
MINUTE = timedelta(minutes=1)


class Diary:
    """A history on one database, written as a test wants it."""

    def __init__(self, using: str) -> None:
        self.using = using

    def run(self, task: str, due_at: datetime, status: str = "succeeded", **more: Any) -> ScheduledRun:
        values = {"finished_at": None if status == "running" else due_at + MINUTE, "server": "web1", **more}
        return ScheduledRun.objects.using(self.using).create(task=task, due_at=due_at, status=status, **values)

    def runs(self, task: str, count: int, since: datetime, status: str = "succeeded") -> None:
        ScheduledRun.objects.using(self.using).bulk_create(
            ScheduledRun(task=task, due_at=at, status=status, finished_at=at + MINUTE)
            for at in (since + number * MINUTE for number in range(count))
        )

    def left(self, task: str) -> list[datetime]:
        runs = ScheduledRun.objects.using(self.using).filter(task=task).order_by("pk")
        return list(runs.values_list("due_at", flat=True))

    def prune(self, days: int = 30, runs: int = 100, **more: Any) -> Pruned:
        return Retention(self.using, days=days, runs=runs, **more).prune(NOW)


@pytest.fixture
def diary(store: Store) -> Diary:
    return Diary(store.alias)


@pytest.mark.parametrize("status", ["succeeded", "failed", "timed_out", "cancelled", "skipped", "abandoned", "lost"])
def test_whatever_ended_longer_ago_than_it_is_kept_goes(diary: Diary, status: str) -> None:
    diary.run("a", NOW - 40 * DAY, status)
    kept = [diary.run("a", NOW - 29 * DAY, status).due_at, diary.run("a", NOW - DAY, status).due_at]
    done = diary.prune()
    assert (done.old_runs, done.spare_runs, done.complete) == (1, 0, True)
    assert diary.left("a") == kept


def test_successes_beyond_the_last_ones_of_their_task_go_sooner(diary: Diary) -> None:
    diary.runs("a", 12, NOW - DAY)
    diary.runs("b", 4, NOW - DAY)
    done = diary.prune(runs=5)
    assert (done.old_runs, done.spare_runs) == (0, 7)
    assert diary.left("a") == [NOW - DAY + number * MINUTE for number in range(7, 12)]
    assert len(diary.left("b")) == 4


def test_failures_are_kept_however_many_successes_come_after_them(diary: Diary) -> None:
    failed = diary.run("a", NOW - 2 * DAY, "failed")
    diary.runs("a", 12, NOW - DAY)
    diary.prune(runs=5)
    assert diary.left("a")[0] == failed.due_at


def test_a_run_that_is_running_is_never_deleted(diary: Diary) -> None:
    running = diary.run("a", NOW - 90 * DAY, "running")
    diary.run("a", NOW - DAY)
    diary.prune(days=0, runs=0)
    assert running.due_at in diary.left("a")


def test_the_newest_row_of_a_task_stays_and_equal_skips_are_counted_onto_it(diary: Diary) -> None:
    diary.run("a", NOW - 60 * DAY, "skipped", reason="missed")
    newest = diary.run("a", NOW - 50 * DAY, "skipped", reason="missed", count=7)
    diary.prune()
    assert diary.left("a") == [newest.due_at]
    History(diary.using)._give_up_one_each([_missed("a", NOW)], NOW)
    run = ScheduledRun.objects.using(diary.using).get()
    assert (run.pk, run.count, run.due_at) == (newest.pk, 8, NOW)


def _missed(task: str, due_at: datetime) -> Any:
    from multiserver_schedule.history import _GivenUp

    return _GivenUp(task, due_at, "schedule", "missed", 1)


def test_the_newest_scheduled_row_stays_for_a_lock_that_has_lost_its_data(diary: Diary) -> None:
    scheduled = diary.run("a", NOW - 60 * DAY)
    diary.run("a", NOW - 70 * DAY, trigger="catch_up")
    by_hand = diary.run("a", NOW - 50 * DAY, trigger="manual")
    diary.prune(runs=0)
    assert diary.left("a") == [scheduled.due_at, by_hand.due_at]
    assert History(diary.using).last_due(["a"]) == {"a": scheduled.due_at}


def test_the_newest_scheduled_row_stays_also_where_it_was_caught_up(diary: Diary) -> None:
    diary.run("a", NOW - 60 * DAY, trigger="schedule")
    caught_up = diary.run("a", NOW - 50 * DAY, trigger="catch_up")
    by_hand = diary.run("a", NOW - 40 * DAY, trigger="manual")
    diary.prune(runs=0)
    assert diary.left("a") == [caught_up.due_at, by_hand.due_at]
    assert History(diary.using).last_due(["a"]) == {"a": caught_up.due_at}


def test_what_was_not_pruned_by_age_is_not_counted_twice(diary: Diary) -> None:
    diary.runs("a", 10, NOW - 60 * DAY)
    diary.runs("a", 10, NOW - DAY)
    dry = diary.prune(runs=5, dry_run=True)
    assert len(diary.left("a")) == 20
    done = diary.prune(runs=5)
    assert (dry.old_runs, dry.spare_runs) == (done.old_runs, done.spare_runs) == (10, 5)


def test_old_clean_ups_go(diary: Diary) -> None:
    log = CleanupLog.objects.using(diary.using)
    for days in (1, 29, 31, 400):
        log.create(task="a", owner=f"{days}", fence=1, cleaned_at=NOW - days * DAY, cleaned_by="x", reason="overran")
    assert diary.prune().cleanups == 2
    assert sorted(log.values_list("owner", flat=True)) == ["1", "29"]


def test_it_takes_small_batches_each_a_statement_of_its_own(diary: Diary) -> None:
    diary.runs("a", 100, NOW - 60 * DAY)
    with CaptureQueriesContext(connections[diary.using]) as captured:
        done = diary.prune(batch=25)
    deletes = [each["sql"] for each in captured if each["sql"].startswith("DELETE")]
    assert (done.old_runs, len(deletes)) == (99, 4)
    assert sum("BEGIN" in each["sql"] for each in captured) in (0, len(deletes))


@pytest.mark.parametrize("tasks", [1, 200])
def test_the_statements_do_not_grow_with_the_tasks(diary: Diary, tasks: int) -> None:
    for number in range(tasks):
        diary.runs(f"task{number}", 400 // tasks, NOW - DAY)
    with CaptureQueriesContext(connections[diary.using]) as captured:
        diary.prune(runs=1)
    assert len(captured) <= 9


def test_nothing_is_done_where_there_is_nothing_to_do(diary: Diary) -> None:
    diary.runs("a", 50, NOW - DAY)
    with CaptureQueriesContext(connections[diary.using]) as captured:
        assert diary.prune().count == 0
    assert len(captured) <= 3


def test_it_stops_in_time_and_says_that_there_is_more(diary: Diary) -> None:
    diary.runs("a", 100, NOW - 60 * DAY)
    done = diary.prune(until=0.0)
    assert (done.count, done.complete) == (0, False)
    assert diary.prune().count == 99


def test_what_lost_against_another_transaction_is_tried_again(diary: Diary, monkeypatch: pytest.MonkeyPatch) -> None:
    diary.runs("a", 10, NOW - 60 * DAY)
    refused: list[DatabaseError] = []
    delete = type(ScheduledRun.objects.all()).delete

    def once(rows: Any) -> Any:
        if not refused:
            refused.append(OperationalError(1213, "Deadlock found when trying to get lock"))
            raise refused[0]
        return delete(rows)

    monkeypatch.setattr("multiserver_schedule.retention.time.sleep", lambda seconds: None)
    monkeypatch.setattr(type(ScheduledRun.objects.all()), "delete", once)
    assert diary.prune().count == 9
