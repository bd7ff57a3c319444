"""Due times of the past that nobody ran: which they are, and how they are made up for."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import OperationalError
from django.utils import timezone as clock

from multiserver_schedule import current_run, operate, schedule
from multiserver_schedule.declare import registry
from multiserver_schedule.entries import ScheduledTask
from multiserver_schedule.history import History
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.models import ScheduledLock, ScheduledRun
from multiserver_schedule.operate import backfill
from multiserver_schedule.operate.backfill import Gap, Progress, Tried

from .caches import CacheStore
from .test_operate import IN_CACHE

pytestmark = pytest.mark.django_db(transaction=True)

UTC = timezone.utc
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
def _project(settings: Any) -> Iterator[None]:
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "RUNNER": "inline"}
    with registry.set_aside():
        schedule.call("time.sleep", 0).hourly().name("a.hourly")
        schedule.call("tests.shop.work.fail").hourly().name("a.broken")
        schedule.call("time.sleep", 0).hourly().on_every_server().name("a.here")
        yield


def hours_ago(count: int) -> datetime:
    return clock.now().replace(minute=0, second=0, microsecond=0) - count * HOUR


def text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S")


def ran(due_at: datetime, task: str = "a.hourly", **more: Any) -> ScheduledRun:
    values = {"status": "succeeded", "finished_at": due_at + timedelta(minutes=1), **more}
    return ScheduledRun.objects.create(task=task, due_at=due_at, **values)


def gap(name: str = "a.hourly", since: int = 5, until: int = 1, **more: Any) -> Gap:
    return operate.find_gap(name, text(hours_ago(since)), text(hours_ago(until)), **more)


class Hand:
    """Runs nothing, and notes what it is asked to run."""

    def __init__(self, *answers: Tried) -> None:
        self.answers = list(answers)
        self.asked: list[datetime] = []
        self.waited: list[float] = []

    def __call__(self, task: ScheduledTask, due_at: datetime) -> Tried:
        self.asked.append(due_at)
        answer = self.answers.pop(0) if self.answers else Tried(True)
        if answer.succeeded:
            ran(due_at, task.name, trigger="backfill")
        return answer

    def wait(self, seconds: float) -> bool:
        self.waited.append(seconds)
        return False


def fill(found: Gap, hand: Hand, **more: Any) -> tuple[list[str], Progress]:
    """Return what happened, one word for each step, and how far it came."""
    steps = []
    far = Progress(found, next_due_at=found.due[0] if found.due else None)
    for event, _, _, progress in operate.fill(found, hand, wait=hand.wait, **more):
        steps.append(event)
        far = progress
    return [step for step in steps if step != "running"], far


# -- which ------------------------------------------------------------------------------------------------------------


def test_the_due_times_without_a_success_in_the_range_both_ends_included() -> None:
    ran(hours_ago(4))
    ran(hours_ago(3), status="failed")
    ran(hours_ago(2), trigger="manual")
    ran(hours_ago(1), trigger="catch_up")
    found = gap()
    assert found.due == (hours_ago(5), hours_ago(3), hours_ago(2))
    assert found.have_run == 2


@pytest.mark.parametrize("status", ["failed", "timed_out", "cancelled", "skipped", "abandoned", "lost", "running"])
def test_only_a_success_counts_as_run(status: str) -> None:
    ran(hours_ago(3), status=status)
    assert hours_ago(3) in gap().due


def test_another_attempt_that_succeeded_counts() -> None:
    ran(hours_ago(3), status="failed")
    ran(hours_ago(3), attempt=2)
    assert hours_ago(3) not in gap().due


def test_all_of_them_are_those_that_have_run_too() -> None:
    ran(hours_ago(4))
    assert len(gap(everything=True).due) == 5


def test_times_are_those_of_the_tasks_zone_unless_they_have_an_offset() -> None:
    read = backfill.read_time
    assert read("2026-07-01", "Europe/Berlin") == datetime(2026, 6, 30, 22, tzinfo=UTC)
    assert read("2026-07-01", "Europe/Berlin", end=True) == datetime(2026, 7, 1, 21, 59, 59, tzinfo=UTC)
    assert read("2026-07-01T03:00", "Europe/Berlin") == datetime(2026, 7, 1, 1, tzinfo=UTC)
    assert read("2026-07-01 03:00:05", "Europe/Berlin") == datetime(2026, 7, 1, 1, 0, 5, tzinfo=UTC)
    assert read("2026-07-01T03:00Z", "Europe/Berlin") == datetime(2026, 7, 1, 3, tzinfo=UTC)
    assert read("2026-07-01T03z", "Europe/Berlin") == datetime(2026, 7, 1, 3, tzinfo=UTC)
    assert read("2026-07-01T03:00+05:30", "Europe/Berlin") == datetime(2026, 6, 30, 21, 30, tzinfo=UTC)
    # An hour that comes twice is meant whole.
    assert read("2026-10-25T02:30", "Europe/Berlin") == datetime(2026, 10, 25, 0, 30, tzinfo=UTC)
    assert read("2026-10-25T02:30", "Europe/Berlin", end=True) == datetime(2026, 10, 25, 1, 30, tzinfo=UTC)


def test_a_range_is_in_the_zone_of_the_task() -> None:
    schedule.call("time.sleep", 0).daily_at("02:30").timezone("Asia/Tokyo").name("a.tokyo")
    day = (clock.now() - 3 * DAY).strftime("%Y-%m-%d")
    found = operate.find_gap("a.tokyo", day, day)
    assert found.zone == "Asia/Tokyo"
    assert [f"{moment + 9 * HOUR:%Y-%m-%d %H:%M}" for moment in found.due] == [f"{day} 02:30"]


def test_until_is_now_where_it_is_not_said_and_a_day_that_has_begun_is_in_order() -> None:
    assert operate.find_gap("a.hourly", text(hours_ago(2))).due == (hours_ago(2), hours_ago(1), hours_ago(0))
    today = f"{clock.now():%Y-%m-%d}"
    assert max(operate.find_gap("a.hourly", text(hours_ago(2)), today).due) == hours_ago(0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("a.hourly", "2026-05-02", "2026-05-01"), "--from 2026-05-02 is after --to 2026-05-01. Write the earlier one"),
        (("a.hourly", "2020-01-01", "2999-01-01"), "--to 2999-01-01 is in the future: it is "),
        (("a.hourly", "2999-01-01"), "--from 2999-01-01 is "),
        (("a.hourly", "yesterday"), "--from 'yesterday' is not a time. Write 2026-11-20, 2026-11-20T03:00 (in UTC) or"),
        (("a.hourly", "2026-02-30"), "--from '2026-02-30' is not a time."),
        (("a.hourly", "2026-01-01", "12"), "--to '12' is not a time."),
        # Midnight to Python 3.11, and no date at all to an older one.
        (("a.hourly", "20260101", "2026-01-02"), "--from '20260101' is not a time. Write 2026-11-20, "),
        (("a.hourly", "2026-01-01", "20260102"), "--to '20260102' is not a time. Write 2026-11-20, "),
        (("a.hourly", "2026-01-01", "2026-W01-5"), "--to '2026-W01-5' is not a time."),
        (("a.hourly", "2026-01-01", "2026-01-02T0300"), "--to '2026-01-02T0300' is not a time."),
        # East of UTC, its year is not there at all.
        (("a.hourly", "0001-01-01"), "--from 0001-01-01 is out of reach. Write a time from 1900 on, until now."),
        (("a.hourly", "0001-01-01T00:00+01:00"), "--from 0001-01-01T00:00+01:00 is out of reach. Write a time from"),
        (("a.hourly", "1899-12-31"), "--from 1899-12-31 is out of reach."),
        (("a.hourly", "1900-01-01"), "a.hourly was due "),
        (("a.hourly", "2026-01-01", "9999-12-31T23:00-05:00"), "--to 9999-12-31T23:00-05:00 is out of reach."),
        (("a.hurly", "2026-01-01"), "No task is named 'a.hurly'. Did you mean a.hourly?"),
        (("a.hourly@web2", "2026-01-01"), "No task is named 'a.hourly@web2'. Did you mean a.hourly?"),
        (("a.here@web2", "2026-01-01"), "A backfill runs where it is called, and this is web1. Call it on web2."),
        (("a.here@", "2026-01-01"), "A backfill runs where it is called, and this is web1."),
    ],
)
def test_what_cannot_be_meant_is_refused(given: tuple[str, ...], said: str) -> None:
    with pytest.raises(operate.Refused) as refused:
        operate.find_gap(*given)
    assert str(refused.value).startswith(said)


def test_more_than_ten_thousand_due_times_are_refused_and_what_to_write_is_said() -> None:
    schedule.call("time.sleep", 0).every_second().name("a.often")
    since = clock.now().replace(microsecond=0) - DAY
    with pytest.raises(operate.Refused) as refused:
        operate.find_gap("a.often", text(since))
    assert "was due 86,401 times between" in str(refused.value) or "86,40" in str(refused.value)
    (until,) = re.findall(r"Write --to (\S+) and go on", str(refused.value))
    assert len(operate.find_gap("a.often", text(since), until).due) == 10_000
    assert len(operate.find_gap("a.often", text(since), everything=True).due) > 86_000


def test_what_the_history_does_not_know_any_more_is_not_run_a_second_time(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE["HISTORY_RUNS"] = 3
    for hours in (3, 2, 1):
        ran(hours_ago(hours))
    with pytest.raises(operate.Refused, match=r"does not reach back to .* which of its due times before .* have run"):
        gap(since=5)
    with pytest.raises(operate.Refused) as refused:
        gap(since=5)
    (known,) = set(re.findall(r"--from (\S+),", str(refused.value)))
    assert operate.find_gap("a.hourly", known).due == (hours_ago(0),)
    assert len(gap(since=5, everything=True).due) == 5
    with pytest.raises(operate.Refused, match=r"\(HISTORY_DAYS, HISTORY_RUNS\)"):
        operate.find_gap("a.here", text(clock.now() - 31 * DAY))
    assert operate.find_gap("a.here", text(clock.now() - 29 * DAY)).due


def test_what_pruning_leaves_is_known_to_be_complete(settings: Any) -> None:
    """Whatever is pruned: a due time that has run is never taken for one that has not."""
    settings.MULTISERVER_SCHEDULE["HISTORY_RUNS"] = 4
    for hours in range(30, 0, -1):
        ran(hours_ago(hours), status="failed" if hours % 3 == 0 else "succeeded")
    operate.prune()
    for since in range(30, 0, -1):
        try:
            due = gap(since=since).due
        except operate.Refused:
            continue
        assert due == tuple(hours_ago(hours) for hours in range(since, 0, -1) if hours % 3 == 0)


# -- how --------------------------------------------------------------------------------------------------------------


def test_each_is_run_oldest_first() -> None:
    hand = Hand()
    steps, progress = fill(gap(), hand)
    assert hand.asked == [hours_ago(hours) for hours in (5, 4, 3, 2, 1)]
    assert (steps, progress.done, progress.again) == (["succeeded"] * 5, 5, "")


def test_the_first_failure_is_the_end_and_the_same_command_goes_on_there() -> None:
    hand = Hand(Tried(True), Tried(False))
    steps, progress = fill(gap(), hand)
    assert steps == ["succeeded", "failed"]
    assert (progress.done, progress.failed, progress.next_due_at) == (1, [hours_ago(4)], hours_ago(4))
    assert progress.again == (
        f"manage.py schedule backfill a.hourly --from {text(hours_ago(4))}+00:00 --to {text(hours_ago(1))}+00:00"
    )
    again = Hand()
    steps, progress = fill(gap(), again)
    assert again.asked == [hours_ago(hours) for hours in (4, 3, 2, 1)]


def test_after_a_failure_it_goes_on_where_one_says_so() -> None:
    hand = Hand(Tried(True), Tried(False))
    steps, progress = fill(gap(), hand, keep_going=True)
    assert steps == ["succeeded", "failed", "succeeded", "succeeded", "succeeded"]
    assert (progress.done, progress.failed, progress.next_due_at) == (4, [hours_ago(4)], None)


@pytest.mark.parametrize(
    ("everything", "keep_going", "options"),
    [(False, False, ""), (True, False, " --all"), (False, True, " --keep-going"), (True, True, " --all --keep-going")],
)
def test_the_command_that_goes_on_has_the_options_of_the_first(
    everything: bool, keep_going: bool, options: str
) -> None:
    _, progress = fill(gap(everything=everything), Hand(Tried(True, stopped=True)), keep_going=keep_going)
    assert progress.again.partition(f" --to {text(hours_ago(1))}+00:00")[2] == options


def test_where_the_tasks_own_conditions_say_no_it_goes_on() -> None:
    steps, progress = fill(gap(), Hand(Tried(False, filtered=True, stopped=True)))
    assert (steps, progress.next_due_at, progress.stopped) == (["skipped"], hours_ago(4), True)
    steps, progress = fill(gap(), Hand(Tried(True), Tried(False, filtered=True)))
    assert steps == ["succeeded", "skipped", "succeeded", "succeeded", "succeeded"]
    assert (progress.done, progress.skipped, progress.failed, progress.again) == (4, 1, [], "")


def test_another_run_that_holds_the_lock_is_waited_for_and_said_once() -> None:
    held = Tried(False, "held by web9 since 03:00")
    hand = Hand(held, held, held)
    said = []
    for event, _, text, _ in operate.fill(gap(since=2), hand, wait=hand.wait, again_in=7.0):
        if event != "running":
            said.append((event, text))
    assert said == [("waiting", "held by web9 since 03:00"), ("succeeded", ""), ("succeeded", "")]
    assert hand.waited == [7.0, 7.0, 7.0]


def test_what_somebody_else_has_made_up_for_meanwhile_is_not_run_twice() -> None:
    found = gap()
    ran(hours_ago(4), trigger="backfill")
    hand = Hand()
    steps, progress = fill(found, hand)
    assert steps == ["succeeded", "elsewhere", "succeeded", "succeeded", "succeeded"]
    assert (hours_ago(4) in hand.asked, progress.done, progress.elsewhere) == (False, 4, 1)


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        (Tried(True, stopped=True), 4),  # it ended well, and then the end came
        (Tried(False, stopped=True), 5),
        (Tried(False, "it was told to stop", stopped=True), 5),
    ],
)
def test_whoever_stops_it_can_go_on_later(answer: Tried, left: int) -> None:
    steps, progress = fill(gap(), Hand(answer), keep_going=True)
    assert "failed" not in steps
    assert progress.stopped
    assert progress.next_due_at == hours_ago(left)
    assert progress.failed == []


def test_it_stops_while_it_waits_for_another_run() -> None:
    hand = Hand(Tried(False, "held by web9"))
    events = [event for event, *_ in operate.fill(gap(), hand, wait=lambda seconds: True)]
    assert events == ["running", "waiting"]


# -- the command ------------------------------------------------------------------------------------------------------


def call(*arguments: str) -> tuple[str, str, int]:
    out, err = StringIO(), StringIO()
    status = 0
    try:
        call_command("schedule", "backfill", *arguments, stdout=out, stderr=err)
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    return out.getvalue(), err.getvalue(), status


def test_it_runs_them_here_under_the_lock_and_the_schedule_does_not_notice() -> None:
    call_command("runschedule", "--inline", stdout=StringIO())
    before = ScheduledLock.objects.get(task="a.hourly")
    said, wrong, status = call("a.hourly", "--from", text(hours_ago(3)), "--to", text(hours_ago(1)))
    assert (status, wrong) == (0, "")
    assert said.splitlines()[0] == "a.hourly: 3 due time(s) to run"
    assert re.fullmatch(r"3/3 [\d-]+ [\d:]+ succeeded", said.splitlines()[3])
    assert said.splitlines()[4] == "3 succeeded, 0 left"
    runs = ScheduledRun.objects.order_by("pk").values_list("due_at", "trigger", "status", "attempt", "reason")
    assert list(runs) == [(hours_ago(hours), "backfill", "succeeded", 1, "") for hours in (3, 2, 1)]
    after = ScheduledLock.objects.get(task="a.hourly")
    assert (after.last_due_at, after.next_due_at) == (before.last_due_at, before.next_due_at)
    assert after.fence == before.fence + 3
    said, _, status = call("a.hourly", "--from", text(hours_ago(3)), "--to", text(hours_ago(1)))
    assert (said, status) == ("a.hourly: 0 due time(s) to run, 3 have run already\n", 0)


def test_a_due_time_that_is_run_again_is_a_further_attempt_and_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert call("a.hourly", "--from", text(hours_ago(1)), "--to", text(hours_ago(1)), "--all")[2] == 0
    runs = ScheduledRun.objects.order_by("pk").values_list("due_at", "trigger", "attempt", "reason")
    assert list(runs) == [(hours_ago(1), "backfill", 1, ""), (hours_ago(1), "backfill", 2, "")]
    assert "had a run already" not in caplog.text


def test_a_failure_ends_it_with_status_1_and_says_how_to_go_on() -> None:
    said, wrong, status = call("a.broken", "--from", text(hours_ago(3)), "--to", text(hours_ago(1)))
    assert status == 1
    assert re.search(r"^1/3 [\d-]+ [\d:]+ failed\n0 succeeded, 1 failed, 2 left$", said, re.M)
    assert wrong.startswith("To go on: manage.py schedule backfill a.broken --from ")
    said, _, status = call("a.broken", "--from", text(hours_ago(3)), "--to", text(hours_ago(1)), "--keep-going")
    assert (status, "0 succeeded, 3 failed, 0 left" in said) == (1, True)


def test_what_the_tasks_own_conditions_refuse_is_skipped_and_neither_a_success_nor_a_failure() -> None:
    schedule.call("time.sleep", 0).hourly().when("tests.shop.work.no").name("a.refused")
    when = ["a.refused", "--from", text(hours_ago(3)), "--to", text(hours_ago(1))]
    said, wrong, status = call(*when)
    assert (status, wrong) == (0, "")
    assert re.fullmatch(r"1/3 [\d-]+ [\d:]+ skipped: its own conditions said no", said.splitlines()[1])
    assert said.splitlines()[-1] == "0 succeeded, 3 skipped, 0 left"
    assert set(ScheduledRun.objects.values_list("task", "status")) == {("a.refused", "skipped")}
    told = json.loads(call(*when, "--json")[0])
    assert (told["succeeded"], told["skipped"], told["failed"], told["again"]) == (0, 3, 0, "")


def is_cancelled() -> None:
    """Have a newer due time go before this run, and wait for the end."""
    run = current_run()
    assert run is not None
    ScheduledLock.objects.filter(task=run.name).update(cancelled_at=clock.now())
    until = time.monotonic() + 20
    while time.monotonic() < until:
        run.check()
        time.sleep(0.05)


def test_a_run_that_is_cancelled_for_a_newer_due_time_is_no_success(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE |= {"LEASE": timedelta(seconds=3), "HEARTBEAT": timedelta(seconds=0.2)}
    schedule.call("tests.test_operate_backfill.is_cancelled").hourly().overlap("cancel_other").name("a.cancelled")
    said, wrong, status = call("a.cancelled", "--from", text(hours_ago(2)), "--to", text(hours_ago(1)))
    assert [run.status for run in ScheduledRun.objects.all()] == ["cancelled"]
    assert status == 1
    assert re.search(r"^1/2 [\d-]+ [\d:]+ failed: cancelled, a newer due time went before it$", said, re.M), said
    assert said.splitlines()[-1] == "0 succeeded, 1 failed, 1 left"
    assert f"--from {text(hours_ago(2))}" in wrong


def test_a_store_that_is_away_for_a_moment_costs_no_due_time_its_success(monkeypatch: pytest.MonkeyPatch) -> None:
    release = ORMLock.release
    calls: list[int] = []

    def away_at_first(lock: ORMLock, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) <= 3:
            raise OperationalError("the server closed the connection")
        return release(lock, *args, **kwargs)

    monkeypatch.setattr(ORMLock, "release", away_at_first)
    said, _, status = call("a.hourly", "--from", text(hours_ago(3)), "--to", text(hours_ago(1)))
    assert (status, said.splitlines()[-1]) == (0, "3 succeeded, 0 left")
    assert [run.status for run in ScheduledRun.objects.all()] == ["succeeded"] * 3


def test_a_run_whose_lease_was_over_before_its_end_could_be_recorded_is_no_success(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    def away(*args: Any, **kwargs: Any) -> Any:
        raise OperationalError("the server closed the connection")

    settings.MULTISERVER_SCHEDULE |= {"LEASE": timedelta(seconds=1), "HEARTBEAT": timedelta(seconds=0.3)}
    monkeypatch.setattr(ORMLock, "release", away)
    said, _, status = call("a.hourly", "--from", text(hours_ago(2)), "--to", text(hours_ago(1)))
    assert (status, said.splitlines()[-1]) == (1, "0 succeeded, 1 failed, 1 left")


@pytest.mark.parametrize(("times", "left"), [(2, "2 succeeded, 0 left"), (1000, "0 succeeded, 1 failed, 1 left")])
def test_with_a_lock_in_a_cache_a_run_is_a_success_once_the_database_has_taken_its_end(
    times: int, left: str, cache_store: CacheStore, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = History.finished
    calls: list[int] = []

    def away_at_first(history: History, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) <= times:
            raise OperationalError("the server closed the connection")
        finished(history, *args, **kwargs)

    # A cache that is new lets nobody start before a lease is over.
    settings.MULTISERVER_SCHEDULE |= {"LEASE": timedelta(seconds=3), "HEARTBEAT": timedelta(seconds=1)}
    settings.MULTISERVER_SCHEDULE |= {"LOCKS": {"cache": IN_CACHE}}
    schedule.call("time.sleep", 0).hourly().lock_with("cache").name("a.cached")
    monkeypatch.setattr(History, "finished", away_at_first)
    said, _, status = call("a.cached", "--from", text(hours_ago(2)), "--to", text(hours_ago(1)))
    assert said.splitlines()[-1] == left
    assert status == int("failed" in left)


def test_a_row_of_this_server_is_named_as_the_list_shows_it() -> None:
    said, _, status = call("a.here@web1", "--from", text(hours_ago(2)), "--to", text(hours_ago(1)))
    assert (status, said.splitlines()[-1]) == (0, "2 succeeded, 0 left")
    assert set(ScheduledRun.objects.values_list("task", flat=True)) == {"a.here@web1"}


def test_a_dry_run_runs_nothing() -> None:
    said, _, status = call("a.hourly", "--from", text(hours_ago(2)), "--to", text(hours_ago(1)), "--dry-run")
    assert status == 0
    assert [line.strip()[-9:] for line in said.splitlines()[1:]] == [f"{hours_ago(h):%H:%M:%S}Z" for h in (2, 1)]
    assert not ScheduledRun.objects.exists()


def test_as_json_it_says_how_it_went_in_one_shape_whatever_there_was_to_do() -> None:
    when = ["a.hourly", "--from", text(hours_ago(2)), "--to", text(hours_ago(1)), "--json"]
    again = f"manage.py schedule backfill a.hourly --from {text(hours_ago(2))}+00:00 --to {text(hours_ago(1))}+00:00"
    due_at = [hours_ago(hours).isoformat() for hours in (2, 1)]
    done: dict[str, Any] = {
        "name": "a.hourly",
        "due": 2,
        "due_at": due_at,
        "have_run": 0,
        "succeeded": 2,
        "failed": 0,
        "failed_at": [],
        "skipped": 0,
        "elsewhere": 0,
        "next_due_at": None,
        "again": "",
    }
    before = done | {"succeeded": 0, "next_due_at": due_at[0], "again": again}
    after = done | {"due": 0, "due_at": [], "have_run": 2, "succeeded": 0}
    for options, told in ((["--dry-run"], before), ([], done), ([], after), (["--dry-run"], after)):
        said, _, status = call(*when, *options)
        assert (json.loads(said), status) == (told, 0)


def test_as_json_it_says_which_due_times_failed() -> None:
    said, _, status = call("a.broken", "--from", text(hours_ago(2)), "--to", text(hours_ago(1)), "--json")
    told = json.loads(said)
    assert (told["failed"], told["failed_at"], status) == (1, [hours_ago(2).isoformat()], 1)


def test_on_a_terminal_there_is_a_progress_bar() -> None:
    out = StringIO()
    out.isatty = lambda: True  # type: ignore[method-assign]
    call_command(
        "schedule", "backfill", "a.hourly", "--from", text(hours_ago(2)), "--to", text(hours_ago(1)), stdout=out
    )
    bars = out.getvalue().split("\r")
    assert bars[1].startswith(f"[{'.' * 24}] 0/2 ") and bars[1].rstrip().endswith("running")
    assert f"[{'#' * 12}{'.' * 12}] 1/2 " in out.getvalue()
    assert f"[{'#' * 24}] 2/2 " in out.getvalue()
    assert max(len(bar.splitlines()[0]) for bar in bars[1:]) <= 79


def test_a_store_that_goes_away_ends_it_with_the_command_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = ORMLock.claim
    claims: list[int] = []

    def once(lock: ORMLock, *args: Any, **kwargs: Any) -> Any:
        claims.append(1)
        if len(claims) > 1:
            raise OperationalError("the server closed the connection")
        return claim(lock, *args, **kwargs)

    monkeypatch.setattr(ORMLock, "claim", once)
    with pytest.raises(CommandError) as refused:
        call("a.hourly", "--from", text(hours_ago(3)), "--to", text(hours_ago(1)))
    first, second = str(refused.value).splitlines()
    assert first == "It stopped after 1 due time(s): OperationalError: the server closed the connection"
    assert second.startswith(f"To go on: manage.py schedule backfill a.hourly --from {text(hours_ago(2))}+00:00 --to ")


def test_a_refusal_is_an_error_of_the_command() -> None:
    with pytest.raises(CommandError, match=r"No task is named 'a.hurly'. Did you mean a.hourly\?"):
        call("a.hurly", "--from", "2026-01-01")


# -- real processes ---------------------------------------------------------------------------------------------------

PROJECT = {
    "manage.py": """
import os, sys
from django.core.management import execute_from_command_line
os.environ["DJANGO_SETTINGS_MODULE"] = "shop.settings"
execute_from_command_line(sys.argv)
""",
    "shop/__init__.py": "",
    "shop/urls.py": "urlpatterns = []",
    "shop/settings.py": """
from pathlib import Path
SECRET_KEY = "x"
USE_TZ = True
TIME_ZONE = "UTC"
ROOT_URLCONF = "shop.urls"
INSTALLED_APPS = ["multiserver_schedule"]
PLACE = Path(__file__).parent
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": PLACE / "db.sqlite3"}}
MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "HOUSEKEEPING": False}
""",
    "shop/schedule.py": """
import time
from multiserver_schedule import current_run, schedule
@schedule.task().every_minute()
def work():
    from django.conf import settings
    with open(settings.PLACE / "done", "a") as file:
        file.write(f"{current_run().due_at.isoformat()}\\n")
    time.sleep(30 if (settings.PLACE / "slow").exists() else 0)
""",
}


def test_ctrl_c_ends_it_cleanly_and_the_same_command_goes_on(tmp_path: Path) -> None:
    for name, code in PROJECT.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    root = str(Path(__file__).resolve().parent.parent)
    environ = {**os.environ, "PYTHONPATH": root}
    environ.pop("DJANGO_SETTINGS_MODULE", None)
    manage = [sys.executable, str(tmp_path / "manage.py")]
    subprocess.run([*manage, "migrate", "-v0"], env=environ, check=True, timeout=60)
    since = clock.now().replace(second=0, microsecond=0) - timedelta(minutes=10)
    command = [*manage, "schedule", "backfill", "shop.work"]
    command += ["--from", text(since), "--to", text(since + timedelta(minutes=3))]
    (tmp_path / "shop" / "slow").touch()
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done = tmp_path / "shop" / "done"
    until = time.monotonic() + 30
    while not done.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, wrong = process.communicate(timeout=40)
    assert process.returncode == 1, wrong
    assert "Traceback" not in wrong.replace('Traceback (most recent call last):\n  File "<string>"', "")
    assert "0 succeeded, 4 left" in said, wrong
    assert f"To go on: manage.py schedule backfill shop.work --from {text(since)}+00:00" in wrong
    (tmp_path / "shop" / "slow").unlink()
    done.unlink()
    again = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True)
    assert "4 succeeded, 0 left" in again.stdout
    assert done.read_text().split() == [(since + timedelta(minutes=n)).isoformat() for n in range(4)]
