"""What people type, and what they read then."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from io import StringIO
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command, load_command_class
from django.db import OperationalError, transaction
from django.utils import timezone

from multiserver_schedule import schedule
from multiserver_schedule.exceptions import StoreTimeout, UnsafeTransaction
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.models import CleanupLog, ScheduledLock, ScheduledRun, ScheduleState

from . import test_operate
from .shop import work


@pytest.fixture(autouse=True)
def _project(settings: Any) -> None:
    settings.ROOT_URLCONF = "tests.shop.urls"
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "RUNNER": "inline"}
    work.noted.clear()


pytestmark = pytest.mark.django_db(transaction=True)


def call(*arguments: str, **options: Any) -> tuple[str, int]:
    """Return what a command printed, and its exit status."""
    out = StringIO()
    try:
        call_command(*arguments, stdout=out, **options)
    except SystemExit as leaving:
        return out.getvalue(), int(leaving.code or 0)
    return out.getvalue(), 0


def hold(name: str, *, renewed: timedelta, server: str = "web9") -> None:
    """Have a server hold this task's lock, which it renewed so long ago."""
    at = timezone.now() - renewed
    ScheduledLock.objects.filter(task=name).update(
        owner="somebody", server=server, acquired_at=at, renewed_at=at, expires_at=at + timedelta(seconds=30)
    )


def make_due(*names: str) -> None:
    """Have these tasks be due since the last full minute, by the lights of the store."""
    yesterday = timezone.now() - timedelta(days=1)
    ScheduledLock.objects.filter(task__in=names).update(
        last_due_at=yesterday, schedule_since=yesterday, next_due_at=timezone.now() - timedelta(seconds=1)
    )


def test_the_first_pass_says_what_it_found_and_what_is_next() -> None:
    said, status = call("runschedule", "--inline")
    assert status == 0
    assert re.match(r"registered 7 tasks from tests\.shop\.schedule; next: shop\.\S+ \d{4}-", said)


def test_a_pass_with_nothing_due_says_nothing() -> None:
    call("runschedule", "--inline")
    assert call("runschedule", "--inline") == ("", 0)


def test_with_no_task_declared_it_says_where_it_looked(settings: Any) -> None:
    from multiserver_schedule.declare import registry

    settings.ROOT_URLCONF = "tests.urls"
    with registry.set_aside():
        said, status = call("runschedule", "--inline")
    assert status == 0
    assert "No task is declared. Searched: " in said
    assert "multiserver_schedule.schedule" in said or "tests.schedule" in said


def test_a_manual_run_is_one_line_and_leaves_the_schedule_alone() -> None:
    call("runschedule", "--inline")
    before = ScheduledLock.objects.get(task="shop.digest")
    said, status = call("schedule", "trigger", "shop.digest")
    assert status == 0
    assert re.fullmatch(r"[\d-]+ [\d:]+Z shop\.digest succeeded in \d+\.\d s on web1\n", said), said
    after = ScheduledLock.objects.get(task="shop.digest")
    assert (after.last_due_at, after.next_due_at) == (before.last_due_at, before.next_due_at)
    assert ScheduledRun.objects.get().trigger == "manual"


def test_a_manual_run_works_before_the_first_pass() -> None:
    said, status = call("schedule", "trigger", "shop.digest")
    assert (status, "succeeded" in said) == (0, True)


def test_a_manual_run_says_what_it_registers_only_to_who_wants_to_hear_it() -> None:
    said, _ = call("schedule", "trigger", "shop.digest")
    assert re.fullmatch(r"[\d-]+ [\d:]+Z shop\.digest succeeded in \d+\.\d s on web1\n", said), said
    ScheduledLock.objects.all().delete()
    ScheduleState.objects.all().delete()
    said, _ = call("schedule", "trigger", "shop.digest", "--verbosity=2")
    assert said.startswith("registered 7 tasks from tests.shop.schedule")


def test_a_manual_run_that_fails_ends_with_status_1() -> None:
    said, status = call("schedule", "trigger", "shop.broken")
    assert status == 1
    assert "shop.broken failed (ValueError: no such column)" in said


def test_a_manual_run_of_a_task_that_is_running_says_who_holds_it() -> None:
    call("runschedule", "--inline")
    now = timezone.now()
    ScheduledLock.objects.filter(task="shop.digest").update(
        owner="somebody", server="web9", acquired_at=now, renewed_at=now, expires_at=now + timedelta(minutes=1)
    )
    held = rf"held by web9 since {now:%Y-%m-%d %H:%M:%S}Z"
    for verbosity in (0, 1, 2):
        out = StringIO()
        with pytest.raises(CommandError, match=rf"^shop\.digest was not started: {held}\.$") as refused:
            call_command("schedule", "trigger", "shop.digest", stdout=out, verbosity=verbosity)
        assert (refused.value.returncode, out.getvalue()) == (1, "")
    said, status = call("schedule", "trigger", "shop.digest", "--json")
    assert (json.loads(said), status) == ({"name": "shop.digest", "status": "not started", "reason": held}, 1)


def test_a_manual_run_is_tried_again_where_a_neighbour_had_its_row_locked_for_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claim = ORMLock.claim
    calls: list[int] = []

    def locked_at_first(lock: ORMLock, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return claim(lock, *args, **kwargs) if len(calls) > 2 else []

    monkeypatch.setattr(ORMLock, "claim", locked_at_first)
    said, status = call("schedule", "trigger", "shop.digest")
    assert (status, "shop.digest succeeded" in said, len(calls)) == (0, True, 3)


@pytest.mark.parametrize("break_", [timedelta(0), timedelta(minutes=1)])
def test_a_manual_run_whose_row_stays_locked_says_to_try_again(
    break_: timedelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("runschedule", "--inline")
    ScheduledLock.objects.update(not_before=timezone.now() + break_)
    monkeypatch.setattr(ORMLock, "claim", lambda *args, **kwargs: [])
    with pytest.raises(CommandError) as refused:
        call("schedule", "trigger", "shop.digest")
    why = "another server had its row locked just then; try again"
    assert (str(refused.value), refused.value.returncode) == (f"shop.digest was not started: {why}.", 1)


AWAY = "connection to server at 127.0.0.1 failed: refused\n\tIs the server running?"


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OperationalError(AWAY), f"OperationalError: {' '.join(AWAY.split())}"),
        (
            OperationalError("no such table: multiserver_schedule_schedulestate"),
            "OperationalError: no such table: multiserver_schedule_schedulestate Has `manage.py migrate` been run?",
        ),
        (StoreTimeout("A call hung, and was cut."), "StoreTimeout: A call hung, and was cut."),
    ],
)
def test_a_manual_run_without_a_store_is_one_line_and_the_status_1(
    options: list[str], error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(ORMLock, "look", look)
    with pytest.raises(CommandError) as refused:
        call("schedule", "trigger", "shop.digest", *options)
    assert (str(refused.value), refused.value.returncode) == (f"shop.digest was not started: {told}", 1)


def test_a_manual_run_whose_history_cannot_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*args: Any, **kwargs: Any) -> Any:
        raise OperationalError(AWAY)

    call("runschedule", "--inline")
    monkeypatch.setattr("django.db.models.query.QuerySet.first", away)
    with pytest.raises(CommandError) as refused:
        call("schedule", "trigger", "shop.digest", "--json")
    told = f"shop.digest has run, but how that went cannot be read: OperationalError: {' '.join(AWAY.split())}."
    assert str(refused.value) == told


def test_a_row_of_this_server_is_named_as_the_list_shows_it_by_each_verb() -> None:
    call("runschedule", "--inline")
    assert "shop.here@web1\n" in call("schedule", "list")[0]
    said, status = call("schedule", "trigger", "shop.here@web1")
    assert (status, "shop.here@web1 succeeded" in said) == (0, True)
    told = json.loads(call("schedule", "trigger", "shop.here@web1", "--json")[0])
    assert (told["name"], told["status"]) == ("shop.here@web1", "succeeded")
    said, status = call("schedule", "trigger", "shop.here@web1", "--no-wait")
    assert (status, said.startswith("shop.here@web1: asked for")) == (0, True)
    assert call("schedule", "explain", "shop.here@web1")[0].startswith("shop.here@web1\n")
    assert call("schedule", "backfill", "shop.here@web1", f"--from={timezone.now():%Y-%m-%d}", "--dry-run")[1] == 0


def test_a_manual_run_of_another_servers_row_says_where_to_call_it() -> None:
    with pytest.raises(CommandError) as refused:
        call("schedule", "trigger", "shop.here@web2")
    assert str(refused.value) == (
        "`schedule trigger` runs where it is called, and this is web1. "
        "Call it on web2, or add --no-wait to have it run there."
    )
    with pytest.raises(CommandError, match=r"No task is named 'shop.digest@web1'. Did you mean shop.digest\?"):
        call("schedule", "trigger", "shop.digest@web1")


@pytest.mark.parametrize(
    "arguments", [["trigger"], ["trigger", "--no-wait"], ["backfill", "--from=2026-01-01"]], ids=" ".join
)
@pytest.mark.parametrize("name", ["gone.task", "gone.here", "gone.here@web1", "shop.digest@web1"])
def test_what_a_lock_has_and_nobody_declares_any_more_is_said_not_to_be_declared(
    arguments: list[str], name: str
) -> None:
    now = timezone.now()
    for row in ("gone.task", "gone.here@web1", "shop.digest@web1"):
        ScheduledLock.objects.create(task=row, last_due_at=now, schedule_since=now, not_before=now)
    with pytest.raises(CommandError) as refused:
        call("schedule", arguments[0], name, *arguments[1:])
    said = f"{name} is not declared in this version of the project: no server would know what to run."
    assert (str(refused.value), refused.value.returncode) == (said, 1)


def test_an_unknown_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(CommandError, match=r"No task is named 'shop.digset'. Did you mean shop.digest\?"):
        call_command("schedule", "trigger", "shop.digset")


def test_the_list_shows_when_who_and_how() -> None:
    call("schedule", "trigger", "shop.digest")
    now = timezone.now()
    ScheduledLock.objects.filter(task="shop.broken").update(
        owner="somebody", server="web9", acquired_at=now, renewed_at=now, expires_at=now + timedelta(minutes=1)
    )
    said, status = call("schedule", "list")
    assert status == 0
    digest = said[said.index("shop.digest") :].split("\nshop", 1)[0]
    assert re.search(r"next \d{4}-\d\d-\d\d 09:00:00 \(in .*\); ready", digest)
    assert "last succeeded" in digest
    assert re.search(r"shop\.broken\n    next .*\n    running on web9 since \d{4}", said)
    assert "shop.here@web1" in said
    assert max(map(len, said.splitlines())) <= 80


def test_the_list_as_json_has_times_in_utc() -> None:
    call("runschedule", "--inline")
    said, _ = call("schedule", "list", "--json")
    lines = {line["name"]: line for line in json.loads(said)}
    assert set(lines) >= {"shop.digest", "shop.here@web1"}
    assert lines["shop.digest"]["next_due_at"].endswith("09:00:00+00:00")


def test_the_list_shows_a_task_before_its_first_pass() -> None:
    said, _ = call("schedule", "list", "--json")
    assert {line["state"] for line in json.loads(said)} == {"not seen yet"}


def test_the_list_shows_a_lock_of_a_task_that_nobody_declares_any_more() -> None:
    now = timezone.now()
    ScheduledLock.objects.create(task="gone.task", last_due_at=now, schedule_since=now, not_before=now)
    said, _ = call("schedule", "list")
    assert "gone.task\n    next -; not declared" in said


def test_the_list_shows_until_when_a_lock_is_held_and_in_which() -> None:
    call("runschedule", "--inline")
    hold("shop.broken", renewed=timedelta(0))
    said, _ = call("schedule", "list")
    assert re.search(r"^shop\.broken\n    next .*\n    running on web9 since [\d-]+ [\d:]+ until [\d:-]+", said, re.M)
    line = next(line for line in json.loads(call("schedule", "list", "--json")[0]) if line["name"] == "shop.broken")
    assert (line["lock"], line["held_in"], line["holder"]) == ("default", "default", "web9")
    assert line["since"] < line["as_of"] < line["until"]


DOWN = {"BACKEND": "tests.test_operate.Away"}


def test_the_list_names_the_lock_of_each_task_where_there_is_more_than_one(settings: Any) -> None:
    call("runschedule", "--inline")
    assert "[lock" not in call("schedule", "list")[0]
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": {"BACKEND": "tests.test_operate.Board"}}}
    assert "shop.digest  [lock default]\n    next " in call("schedule", "list")[0]


def test_a_store_that_is_down_makes_its_tasks_unknown_and_the_status_1(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"default": DOWN}}
    errors = StringIO()
    said, status = call("schedule", "list", stderr=errors)
    assert status == 1
    assert errors.getvalue() == "The lock 'default' does not answer: ConnectionError: Connection refused\n"
    assert re.search(r"shop\.digest\n    next .*\n    unknown: ConnectionError: Connection refused", said)
    listed = json.loads(call("schedule", "list", "--json", stderr=errors)[0])
    assert {line["state"] for line in listed} == {"unknown: ConnectionError: Connection refused"}


def test_what_is_long_in_the_list_is_wrapped(settings: Any) -> None:
    call("runschedule", "--inline")
    hold("shop.broken", renewed=timedelta(hours=30), server="a-server-with-quite-a-long-name.example.org")
    why = "held by a-server-with-quite-a-long-name.example.org since 2030-01-01T03:00:00Z, and so on and so forth"
    ScheduledRun.objects.create(task="shop.broken", due_at=timezone.now(), status="skipped", reason=why)
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": {"BACKEND": "tests.test_operate.Board"}}}
    said, _ = call("schedule", "list")
    lines = said[said.index("shop.broken") :].split("\nshop")[0].splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:5]] == ["next", "stale", "since", "last"]
    assert [len(line) - len(line.lstrip()) for line in lines[1:6]] == [4, 4, 8, 4, 8]


def test_a_long_name_stays_in_one_piece_and_its_lock_moves_to_the_next_line(settings: Any) -> None:
    name = f"a.{'long' * 17}"
    now = timezone.now()
    ScheduledLock.objects.create(task=name, last_due_at=now, schedule_since=now, not_before=now)
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": {"BACKEND": "tests.test_operate.Board"}}}
    said, _ = call("schedule", "list")
    assert f"\n{name}\n    [lock default]\n    next" in said
    assert max(map(len, said.splitlines())) <= 80


def listed(name: str, *arguments: str) -> list[str]:
    """Return the lines of a task in the list."""
    lines = call("schedule", "list", *arguments)[0].splitlines()
    return [line.strip() for line in takewhile(lambda line: line.startswith("    "), lines[lines.index(name) + 1 :])]


def test_a_task_that_nobody_starts_is_listed_as_overdue() -> None:
    call("runschedule", "--inline")
    since = timezone.now().replace(microsecond=0) - timedelta(minutes=5)
    ScheduledLock.objects.filter(task__in=["shop.digest", "shop.here@web1"]).update(next_due_at=since, not_before=since)
    ScheduleState.objects.filter(scope="web1").update(seen_at=since)
    ScheduleState.objects.filter(key="server:web1").delete()
    overdue = f"overdue since {since:%Y-%m-%d %H:%M:%S}"
    assert overdue in " ".join(listed("shop.digest")) and "ready" not in " ".join(listed("shop.digest"))
    assert " ".join(listed("shop.digest")).count("overdue") == 1
    said = " ".join(listed("shop.here@web1"))
    assert overdue in said and f"its server was last seen {since:%Y-%m-%d %H:%M:%S}" in said


def test_why_a_due_time_was_skipped_is_shown_in_the_zone_of_the_list_and_how_often() -> None:
    call("runschedule", "--inline")
    ScheduledRun.objects.create(
        task="shop.digest",
        due_at="2030-01-01T03:05:00+00:00",
        status="skipped",
        reason="held by web2 since 2030-01-01T03:00:00Z",
        count=3,
    )
    tokyo = listed("shop.digest", "--timezone=Asia/Tokyo")
    assert "last skipped x3 (held by web2 since 2030-01-01 12:00:00) 2030-01-01 12:05:00" in tokyo
    said = " ".join(call("schedule", "explain", "shop.digest", "--timezone=Asia/Tokyo")[0].split())
    assert "last skipped 2030-01-01 12:05:00: held by web2 since 2030-01-01 12:00:00, 3 due times in a row" in said
    ScheduledRun.objects.update(count=1)
    assert "last skipped (held by web2 since 2030-01-01 03:00:00) 2030-01-01 03:05:00" in listed("shop.digest")


def test_a_run_that_timed_out_is_said_to_have_in_words_and_in_json_by_its_status() -> None:
    call("runschedule", "--inline")
    ScheduledRun.objects.create(task="shop.digest", due_at="2030-01-01T03:05:00+00:00", status="timed_out")
    assert "last timed out 2030-01-01 03:05:00" in listed("shop.digest")
    assert "timed out 2030-01-01 03:05:00" in call("schedule", "explain", "shop.digest")[0]
    assert json.loads(call("schedule", "explain", "shop.digest", "--json")[0])["lines"][0]["last_status"] == "timed_out"


def test_what_runs_while_it_is_paused_is_said_to_run_and_to_be_paused_once() -> None:
    call("runschedule", "--inline")
    hold("shop.digest", renewed=timedelta(0))
    call("schedule", "pause", "--all", "--reason=deploy")
    said = " ".join(listed("shop.digest"))
    assert "running on web9 since" in said and "paused with everything" in said
    assert said.count("paused") == 1
    assert "; ".join(listed("shop.broken")).endswith("; paused with everything")
    call("schedule", "resume", "--all")
    call("schedule", "pause", "shop.digest", "--reason=hangs")
    said = " ".join(listed("shop.digest"))
    assert re.search(r" running on web9 since .* paused since [\d-]+ [\d:]+ \(hangs\)", said)
    assert said.count("paused") == 1


def test_a_task_that_is_explained_says_since_when_and_why_everything_is_paused() -> None:
    call("runschedule", "--inline")
    call("schedule", "pause", "--all", "--reason=deploy of v7")
    said = " ".join(call("schedule", "explain", "shop.digest")[0].split())
    assert re.search(r" now paused with everything since [\d-]+ [\d:]+ \(deploy of v7\) Next due times ", said), said


def test_unlock_frees_a_lock_and_says_so() -> None:
    call("runschedule", "--inline")
    hold("shop.digest", renewed=timedelta(minutes=5))
    said, status = call("schedule", "unlock", "shop.digest")
    assert status == 0
    assert re.fullmatch(r"shop\.digest: freed the lock that web9 held since .*Z \(released_by_hand\)\n", said)
    assert ScheduledLock.objects.get(task="shop.digest").owner is None
    log = CleanupLog.objects.get()
    assert (log.reason, log.cleaned_by) == ("released_by_hand", "web1")


def test_unlock_refuses_while_the_holder_looks_alive_unless_forced() -> None:
    call("runschedule", "--inline")
    hold("shop.digest", renewed=timedelta(seconds=1))
    with pytest.raises(CommandError, match=r"shop\.digest is held by web9 since .*, and that server looks alive"):
        call_command("schedule", "unlock", "shop.digest")
    assert call("schedule", "unlock", "shop.digest", "--force")[1] == 0
    assert ScheduledLock.objects.get(task="shop.digest").owner is None


def test_unlock_of_what_nobody_holds_is_refused_with_status_1() -> None:
    call("runschedule", "--inline")
    with pytest.raises(CommandError, match=r"Nobody holds the lock of shop\.digest") as refused:
        call_command("schedule", "unlock", "shop.digest")
    assert refused.value.returncode == 1


def test_unlock_of_an_unknown_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(CommandError, match=r"No task is named 'shop.digset'. Did you mean shop.digest\?"):
        call_command("schedule", "unlock", "shop.digset")


def test_unlock_says_what_the_database_did_not_take(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OperationalError("the server is shutting down")

    monkeypatch.setattr("multiserver_schedule.history.History.cleaned", refuse)
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": {"BACKEND": "tests.test_operate.Board"}}}
    errors = StringIO()
    test_operate.Board.held.clear()
    test_operate.in_cache("shop.digest", renewed=timedelta(minutes=5))
    assert call("schedule", "unlock", "shop.digest", stderr=errors)[1] == 0
    assert "freed, but the clean-up is not recorded yet" in errors.getvalue()
    assert "the server is shutting down" in errors.getvalue()


def test_unlock_in_one_of_two_locks(settings: Any) -> None:
    with pytest.raises(CommandError, match="There is no lock 'cache'"):
        call_command("schedule", "unlock", "shop.digest", "--lock=cache")


def jump_ahead(*names: str) -> str:
    """Have these tasks' last due time be one of the day after tomorrow; return it as it is said."""
    at = timezone.now().replace(microsecond=0) + timedelta(days=2)
    ScheduledLock.objects.filter(task__in=names).update(last_due_at=at, next_due_at=at + timedelta(days=1))
    return f"{at:%Y-%m-%d %H:%M:%S}Z"


def test_unlock_needs_a_task_or_the_clock_and_says_what_to_write() -> None:
    with pytest.raises(
        CommandError, match=r"names no task. Write `schedule unlock NAME`, or `schedule unlock --clock`"
    ):
        call("schedule", "unlock")
    with pytest.raises(CommandError, match=r"names both a task and --clock. Write `schedule unlock NAME`, or"):
        call("schedule", "unlock", "shop.digest", "--clock")


def test_unlock_clock_says_of_each_row_what_it_had_and_has_and_what_runs_again() -> None:
    call("runschedule", "--inline")
    was = jump_ahead("shop.digest", "shop.broken")
    ahead = ScheduledLock.objects.get(task="shop.digest").last_due_at
    ScheduledRun.objects.create(task="shop.digest", due_at=ahead, status="succeeded")
    ScheduledRun.objects.create(task="shop.broken", due_at=ahead, status="skipped")
    errors = StringIO()
    said, status = call("schedule", "unlock", "--clock", stderr=errors)
    said = " ".join(said.split())
    time = r"[\d-]+ [\d:]+Z"
    assert status == 0
    assert re.search(rf"shop\.broken: the last due time was {was}, is {time}; next due {time}", said), said
    again = "1 due time.s. ran ahead of their time, and run again"
    assert re.search(rf"shop\.digest: the last due time was {was}, is {time}; {again}; next due {time}", said), said
    assert errors.getvalue().startswith(
        "These ran ahead of their time, and run again when it comes: shop.digest. The log says"
    )
    assert ScheduledLock.objects.get(task="shop.digest").last_due_at <= timezone.now()
    nothing = "nothing is later than the stores' clocks: there is nothing to mend\n"
    assert call("schedule", "unlock", "--clock") == (nothing, 0)


def test_unlock_clock_frees_what_nobody_renews_once_a_lease_has_gone_by() -> None:
    call("runschedule", "--inline")
    hold("shop.digest", renewed=-timedelta(days=2))
    until = ScheduledLock.objects.get(task="shop.digest").renewed_at + timedelta(milliseconds=20)
    ScheduledLock.objects.filter(task="shop.digest").update(expires_at=until)
    errors = StringIO()
    said, status = call("schedule", "unlock", "--clock", stderr=errors)
    assert (status, errors.getvalue()) == (0, "Waiting 0.0 s for renewals of the lease of shop.digest.\n")
    assert f"shop.digest: the lease of web9 was until {until:%Y-%m-%d %H:%M:%S}Z, is freed" in " ".join(said.split())
    assert ScheduledLock.objects.get(task="shop.digest").owner is None
    log = CleanupLog.objects.get()
    assert (log.reason, log.cleaned_by) == ("released_by_hand", "web1")


def test_unlock_clock_in_json_is_what_was_done() -> None:
    call("runschedule", "--inline")
    jump_ahead("shop.digest")
    (row,) = json.loads(call("schedule", "unlock", "--clock", "--json")[0])["rows"]
    assert (row["name"], row["lock"], row["released"]) == ("shop.digest", "default", None)
    assert [each["what"] for each in row["brought"]] == ["the last due time"]


def test_unlock_clock_by_a_clock_that_is_still_wrong_is_not_done_and_the_status_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call("runschedule", "--inline")
    jump_ahead("shop.digest")
    clock = ORMLock.clock
    monkeypatch.setattr(ORMLock, "clock", lambda lock: clock(lock) + timedelta(hours=1))
    errors = StringIO()
    assert call("schedule", "unlock", "--clock", stderr=errors) == ("", 1)
    assert "The clock of the lock 'default' is wrong, or this server's is" in errors.getvalue()
    assert ScheduledLock.objects.get(task="shop.digest").last_due_at > timezone.now()
    monkeypatch.undo()
    assert call("schedule", "unlock", "--clock", "--force")[1] == 0


def test_an_unknown_zone_is_refused() -> None:
    with pytest.raises(CommandError, match="Europe/Berlin"):
        call_command("schedule", "list", "--timezone=Mars/Olympus")


def test_a_pass_inside_a_transaction_is_refused(settings: Any) -> None:
    call("runschedule", "--inline")
    settings.MULTISERVER_SCHEDULE = {"RUNNER": "fork"}
    with transaction.atomic(), pytest.raises(UnsafeTransaction, match="run_due"):
        call_command("runschedule")


# -- steering ---------------------------------------------------------------------------------------------------------


def steer(*arguments: str) -> tuple[str, str, int]:
    """Return what a verb printed, what it said on stderr, and its exit status."""
    errors = StringIO()
    said, status = call("schedule", *arguments, stderr=errors)
    return said, errors.getvalue(), status


def test_pause_and_resume_say_what_they_did_and_the_list_says_why() -> None:
    call("runschedule", "--inline")
    assert steer("pause", "shop.digest", "shop.here", "--reason=the bank is down") == (
        "shop.digest: paused\nshop.here@web1: paused\n",
        "",
        0,
    )
    said, _ = call("schedule", "list")
    assert re.search(r"shop\.digest\n    next .*\n    paused since [\d-]+ [\d:]+ \(the bank is down\)\n", said)
    assert steer("resume", "shop.digest", "shop.broken") == (
        "shop.digest: resumed\nshop.broken: was not paused\n",
        "",
        0,
    )
    assert json.loads(steer("resume", "shop.here", "--json")[0])["rows"] == [["shop.here@web1", "default"]]


def test_everything_that_is_paused_stands_above_the_list() -> None:
    call("runschedule", "--inline")
    assert steer("pause", "--all", "--reason=deploy of v7") == ("everything: paused\n", "", 0)
    said, _ = call("schedule", "list")
    assert re.match(r"Everything is paused since [\d-]+ [\d:]+ \(deploy of v7\)\n", said)
    assert said.count("paused with everything") == 7
    make_due("shop.digest")
    assert call("runschedule", "--inline") == ("", 0)
    assert steer("resume", "--all") == ("everything: resumed\n", "", 0)
    assert steer("resume", "--all") == ("everything: was not paused\n", "", 0)


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_who_is_meant_has_to_be_said(verb: str) -> None:
    with pytest.raises(CommandError, match=f"`schedule {verb}` names no task. Write"):
        call("schedule", verb)
    with pytest.raises(CommandError, match=f"`schedule {verb}` names both tasks and --all"):
        call("schedule", verb, "shop.digest", "--all")


@pytest.mark.parametrize(
    "wrong",
    [
        ["schedule", "pause"],
        ["schedule", "resume", "shop.digest", "--all"],
        ["schedule", "pause", "shop.digest", "--lock=cahce"],
        ["schedule", "unlock", "shop.digest", "--lock=cahce"],
        ["schedule", "unlock"],
        ["schedule", "unlock", "shop.digest", "--clock"],
        ["schedule", "unlock", "--clock", "--lock=cahce"],
        ["schedule", "pause", "shop.digest", f"--reason={'x' * 256}"],
        ["schedule", "list", "--timezone=Mars/Olympus"],
        ["schedule", "backfill", "shop.digest", "--from=yesterday"],
        ["schedule", "backfill", "shop.digest", "--from=2026-01-02", "--to=2026-01-01"],
        ["schedule", "backfill", "shop.digest", "--from=2999-01-01"],
        ["runschedule", "--grace=5"],
        ["runschedule", "--forever", "--grace=-1"],
    ],
)
def test_options_that_make_no_sense_are_a_usage_error(wrong: list[str]) -> None:
    with pytest.raises(CommandError) as refused:
        call(*wrong)
    assert refused.value.returncode == 2


def test_a_pass_says_which_exit_statuses_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call_command("runschedule", "--help")
    assert "Exit status: 0 all ran well" in " ".join(capsys.readouterr().out.split())


BROKEN = {
    "import": ("import no_such_module_of_anybody\n", "1: ModuleNotFoundError: No module named 'no_such_mod"),
    "syntax": ("\n\ndef f(:\n", "3: SyntaxError: invalid syntax"),
    "call": ("from datetime import time\n\ntime(25)\n", "3: ValueError: hour must be in 0..23"),
    "library": ("import json\n\njson.loads('')\n", "3: JSONDecodeError: Expecting value"),
    "declaration": (
        "from multiserver_schedule import schedule\n\nschedule.call('time.sleep', 0).name('a.x')\n",
        "3",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize(
    "arguments",
    [
        ["trigger", "shop.digest"],
        ["trigger", "shop.broken", "--no-wait"],
        ["backfill", "shop.digest", "--from=2026-01-01"],
        ["explain", "a.x"],
    ],
)
def test_a_schedule_that_is_broken_is_one_line_and_the_status_1(
    how: str, arguments: list[str], settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("runschedule", "--inline")
    text, said = BROKEN[how]
    package = f"broken_{how}_{len(arguments)}_{arguments[0]}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / "schedule.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    settings.ROOT_URLCONF = f"{package}.urls"
    from multiserver_schedule.declare import registry

    with registry.set_aside():
        schedule.call("time.sleep", 0).daily().name("shop.digest")
        with pytest.raises(CommandError) as refused:
            call("schedule", *arguments)
    told = str(refused.value)
    assert f"{package}.schedule cannot be read: {tmp_path / package / 'schedule.py'}:{said}" in told
    assert (refused.value.returncode, "\n" in told) == (1, False)


@pytest.mark.parametrize("verb", ["pause", "resume", "explain", "unlock", "trigger"])
def test_an_unknown_name_gets_the_nearest_one_from_every_verb(verb: str) -> None:
    call("runschedule", "--inline")
    with pytest.raises(CommandError, match=r"No task is named 'shop.digset'. Did you mean shop.digest\?") as refused:
        call("schedule", verb, "shop.digset")
    assert refused.value.returncode == 1


def test_what_could_not_be_done_in_one_lock_is_said_and_the_status_1(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": DOWN}}
    said, errors, status = steer("pause", "--all")
    assert (said, status) == ("everything: paused (lock 'default')\n", 1)
    assert errors.startswith("The lock 'cache' does not answer: ConnectionError: Connection refused.")


def test_an_interrupt_is_seen_by_the_passes_that_have_begun() -> None:
    call("runschedule", "--inline")
    assert steer("interrupt") == ("services and passes: told to end after their current runs\n", "", 0)
    assert ScheduleState.objects.get(key=ScheduleState.PROJECT).interrupted_at is not None


def test_a_run_that_is_asked_for_is_run_by_the_next_pass() -> None:
    call("runschedule", "--inline")
    before = ScheduledLock.objects.get(task="shop.digest")
    said, _, status = steer("trigger", "shop.digest", "--no-wait")
    assert (said, status) == (
        "shop.digest: asked for; the next service or pass that looks and is meant for it runs it\n",
        0,
    )
    assert not work.noted
    assert "a run is asked for since" in call("schedule", "list")[0]
    said, status = call("runschedule", "--inline")
    assert (status, "shop.digest succeeded" in said) == (0, True)
    assert ScheduledRun.objects.get().trigger == "manual"
    after = ScheduledLock.objects.get(task="shop.digest")
    assert (after.last_due_at, after.next_due_at, after.wanted_at) == (before.last_due_at, before.next_due_at, None)
    assert call("runschedule", "--inline") == ("", 0)


def test_a_manual_run_as_json_says_how_it_went() -> None:
    said, _, status = steer("trigger", "shop.broken", "--json")
    told = json.loads(said)
    assert (told["name"], told["status"], status) == ("shop.broken", "failed", 1)
    assert "no such column" in told["error"]


def test_a_manual_run_whose_own_conditions_say_no_says_so() -> None:
    from multiserver_schedule.declare import registry

    with registry.set_aside():
        schedule.call("tests.shop.work.note", "never").daily().when(lambda: False).name("a.never")
        no = "a.never was not run: its own conditions said no.\n"
        assert (steer("trigger", "a.never"), steer("trigger", "a.never", "-v0")) == ((no, "", 0), ("", "", 0))
        said, _, status = steer("trigger", "a.never", "-v2")
        assert (status, said.count("its own conditions said no")) == (0, 1)
        said, _, status = steer("trigger", "a.never", "--json")
        assert (json.loads(said), status) == ({"name": "a.never", "status": "skipped", "reason": "filtered"}, 0)
    assert work.noted == []


def test_a_manual_run_as_json_is_this_one_and_not_a_later_one_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    release = ORMLock.release

    def while_another_begins(lock: ORMLock, *args: Any, **kwargs: Any) -> Any:
        now = timezone.now()
        ScheduledRun.objects.create(
            task="shop.digest", due_at=now, trigger="manual", status="running", server="web2", owner="another"
        )
        return release(lock, *args, **kwargs)

    monkeypatch.setattr(ORMLock, "release", while_another_begins)
    told = json.loads(steer("trigger", "shop.digest", "--json")[0])
    assert ScheduledRun.objects.count() == 2
    assert (told["status"], told["server"]) == ("succeeded", "web1")


def test_the_next_due_times_of_all_tasks_are_one_table() -> None:
    call("runschedule", "--inline")
    said, errors, status = steer("list", "--next", "20", "--timezone=Asia/Tokyo")
    lines = said.splitlines()
    assert (errors, status, len(lines)) == ("", 0, 22)
    assert lines[-1] == "Times are those of Asia/Tokyo."
    assert all(re.match(r"[\d-]{10} [\d:]{8}  in \d+ \w+ +shop\.\w+", line) for line in lines[:20])
    assert lines[:20] == sorted(lines[:20], key=lambda line: line[:19])
    assert max(map(len, lines)) <= 80
    (first, _) = json.loads(steer("list", "--next", "2", "--json")[0])
    assert set(first) == {"at", "name", "kind", "due_at", "paused", "text"}


def test_a_task_that_is_tried_again_says_when_and_which_attempt_it_is() -> None:
    call("runschedule", "--inline")
    at = timezone.now() + timedelta(minutes=1)
    ScheduledLock.objects.filter(task="shop.broken").update(retry_at=at, attempt=2)
    said, _ = call("schedule", "list")
    assert f"attempt 2 of 2 at {at:%Y-%m-%d %H:%M:%S}" in said
    assert re.search(r"shop\.broken +\(attempt 2 of 2\)", steer("list", "--next", "5")[0].replace("  (", " ("))


def test_a_task_is_explained_in_eighty_columns() -> None:
    call("runschedule", "--inline")
    said, errors, status = steer("explain", "shop.digest", "--next=3")
    assert (errors, status) == ("", 0)
    assert max(map(len, said.splitlines())) <= 80
    assert said.startswith("shop.digest\n    runs              function tests.shop.work.note('digest')\n")
    assert len(re.findall(r"09:00:00 \+00:00  [\d-]+ 09:00:00Z", said)) == 3
    assert "The clocks of UTC do not change within 13 months." in said
    assert "18:00:00 +09:00" in steer("explain", "shop.digest", "--timezone=Asia/Tokyo")[0]
    told = json.loads(steer("explain", "shop.digest", "--json")[0])
    assert (told["schedule"], told["offset"], told["change"]) == ("0 9 * * * UTC", 0.0, None)


def test_a_clock_change_is_shown_with_the_due_times_around_it(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE["TIME_ZONE"] = "Europe/Berlin"
    from multiserver_schedule import schedule
    from multiserver_schedule.declare import registry

    with registry.set_aside():
        schedule.call("time.sleep", 0).daily_at("02:30").name("a.nightly")
        said, _, _ = steer("explain", "a.nightly")
    assert re.search(r"^Next clock change in Europe/Berlin: [\d-]+ 0\d:00 becomes 0\d:00", said, re.M)
    assert "it runs right after the gap" in said or "it runs once in the repeated hour" in said
    before, after = said.split("    - then the clocks change -\n")
    assert len(before.splitlines()[-3:]) == len(after.splitlines()) == 3
    assert max(map(len, said.splitlines())) <= 80


def test_prune_says_what_it_did() -> None:
    old = timezone.now() - timedelta(days=40)
    for number in range(3):
        ScheduledRun.objects.create(task="a.b", due_at=old + timedelta(hours=number), status="failed", finished_at=old)
    said, _, status = steer("prune", "--dry-run")
    assert status == 0
    assert said == "history in 'default': would delete 2 runs by age, 0 successes by number, 0 clean-ups\n"
    assert ScheduledRun.objects.count() == 3
    told = json.loads(steer("prune", "--json")[0])
    assert told["histories"][0]["old_runs"] == 2
    assert ScheduledRun.objects.count() == 1


@pytest.mark.parametrize(
    "wrong", [["prune", "--days=-1"], ["prune", "--batch=0"], ["prune", "--runs=x"], ["list", "--next=0"]]
)
def test_a_number_that_makes_no_sense_is_a_usage_error(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("schedule", *wrong)[1] == 2
    assert "write 1 or more" in capsys.readouterr().err or wrong[1] in ("--days=-1", "--runs=x")


def test_check_says_what_is_wrong_with_status_1(settings: Any) -> None:
    call("runschedule", "--inline")
    said, _, status = steer("check")
    assert status == 0
    assert "ok       lock 'default': 7 of 7 declared task(s) registered" in said
    assert max(map(len, said.splitlines())) <= 80
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": DOWN}}
    said, _, status = steer("check", "--json")
    assert status == 1
    assert [each["about"] for each in json.loads(said) if each["level"] == "problem"] == ["lock 'cache'"]


VERBS = ("list", "explain", "trigger", "pause", "resume", "unlock", "interrupt", "backfill", "prune", "check")


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_json_and_says_which_exit_statuses_there_are(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call_command("schedule", verb, "--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "--json" in said
    assert "exit status: 0 done. 1 not done" in said


@pytest.mark.parametrize(
    ("verb", "nearest"),
    [("triger", " Did you mean 'trigger'?"), ("CHECK", " Did you mean 'check'?"), ("xyz", "")],
)
def test_an_unknown_verb_gets_the_nearest_one_and_all_of_them(verb: str, nearest: str) -> None:
    for arguments in [(verb,), (verb, "shop.digest", "--json"), ("--verbosity=2", verb)]:
        with pytest.raises(CommandError) as refused:
            call_command("schedule", *arguments)
        assert str(refused.value) == f"Error: Unknown verb {verb!r}.{nearest} Verbs are: {', '.join(VERBS)}."


@pytest.mark.parametrize("command", ["schedule", "servers"])
@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        ("--settings=shop.settings", "settings", "shop.settings"),
        ("--pythonpath=/srv/shop", "pythonpath", "/srv/shop"),
        ("--traceback", "traceback", True),
        ("--no-color", "no_color", True),
        ("--force-color", "force_color", True),
        ("--verbosity=2", "verbosity", 2),
    ],
)
def test_djangos_own_options_are_taken_after_the_verb_as_before_it(
    command: str, option: str, field: str, value: Any
) -> None:
    app = "multiserver_schedule" if command == "schedule" else "multiserver_schedule.servers"
    parser = load_command_class(app, command).create_parser("manage.py", command)
    before, after = parser.parse_args([option, "list", "--json"]), parser.parse_args(["list", option, "--json"])
    assert (vars(before), getattr(after, field)) == (vars(after), value)


def test_a_traceback_that_is_asked_for_after_the_verb_is_shown() -> None:
    command = load_command_class("multiserver_schedule", "schedule")
    with pytest.raises(CommandError, match="No task is named"):
        command.run_from_argv(["manage.py", "schedule", "explain", "a.nowhere", "--traceback"])


def test_no_verb_at_all_is_told_so() -> None:
    with pytest.raises(CommandError) as refused:
        call_command("schedule")
    assert str(refused.value) == "Error: the following arguments are required: verb"


def test_an_unknown_verb_that_is_typed_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        load_command_class("multiserver_schedule", "schedule").run_from_argv(
            ["manage.py", "schedule", "triger", "shop.digest"]
        )
    said = capsys.readouterr().err
    assert (left.value.code, said.startswith("usage: manage.py schedule ")) == (2, True)
    assert "\nmanage.py schedule: error: Unknown verb 'triger'. Did you mean 'trigger'? Verbs are: list, " in said


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
ROOT_URLCONF = "shop.urls"
INSTALLED_APPS = ["multiserver_schedule"]
PLACE = Path(__file__).parent
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": PLACE / "db.sqlite3"}}
MULTISERVER_SCHEDULE = {"RUNNER": "spawn", "SERVER_NAME": "web1"}
""",
    "shop/schedule.py": """
from multiserver_schedule import schedule
@schedule.task().daily()
def hello():
    from django.conf import settings
    (settings.PLACE / "hello").write_text("hello")
""",
}


class Project:
    """A project in a folder, and its ``manage.py`` called from outside of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in PROJECT.items():
            path = folder / "project" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        self.environ.pop("DJANGO_SETTINGS_MODULE", None)
        self.manage("migrate", "--verbosity=0")

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(self.folder / "project" / "manage.py"), *arguments]

    def manage(self, *arguments: str, check: bool = True, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environ | environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=check,
        )


def test_a_spawned_run_finds_the_project_wherever_cron_starts_it(tmp_path: Path) -> None:
    project = Project(tmp_path)
    assert " shop.hello succeeded in " in project.manage("schedule", "trigger", "shop.hello").stdout
    assert (tmp_path / "project" / "shop" / "hello").read_text() == "hello"


@pytest.mark.parametrize("unbuffered", ["1", ""], ids=["unbuffered", "buffered"])
def test_a_verb_ends_quietly_where_nobody_reads_on(unbuffered: str, tmp_path: Path) -> None:
    project = Project(tmp_path)
    for arguments in (["list"], ["check", "--json"]):
        with subprocess.Popen(
            project.command("schedule", *arguments),
            cwd=tmp_path,
            env=project.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert (process.stderr.read(), process.wait(60)) == ("", 1)


def test_a_pipe_of_another_kind_that_breaks_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*args: Any, **options: Any) -> Any:
        raise BrokenPipeError("the store is gone")

    monkeypatch.setattr("multiserver_schedule.operate.overview", breaks)
    with pytest.raises(BrokenPipeError, match="the store is gone"):
        load_command_class("multiserver_schedule", "schedule").run_from_argv(["manage.py", "schedule", "list"])


def test_what_a_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.manage("schedule", "trigger", "shop.hello")
    project.manage("schedule", "pause", "shop.hello", "--reason=die Bank hat \N{LATIN SMALL LETTER O WITH DIAERESIS}")
    listed = project.manage("schedule", "list", PYTHONIOENCODING="ascii").stdout
    assert "(die Bank hat \\xf6)" in listed


def test_nothing_runs_while_everything_is_paused() -> None:
    call("runschedule", "--inline")
    make_due("shop.digest")
    ScheduleState.objects.filter(key=ScheduleState.PROJECT).update(paused_at=timezone.now())
    assert call("runschedule", "--inline") == ("", 0)
    assert not ScheduledRun.objects.exists()


def test_a_database_without_our_tables_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def look(*args: Any, **options: Any) -> Any:
        raise OperationalError("no such table: multiserver_schedule_schedulestate")

    monkeypatch.setattr(ORMLock, "look", look)
    _, status = call("runschedule")
    assert status == 1
    assert "Has `manage.py migrate` been run?" in caplog.text


MISSING = {
    "sqlite": "no such table: multiserver_schedule_scheduledlock",
    "postgresql": 'relation "multiserver_schedule_scheduledlock" does not exist\nLINE 1: SELECT',
    "mysql": "(1146, \"Table 'shop.multiserver_schedule_scheduledlock' doesn't exist\")",
}


@pytest.mark.parametrize("text", MISSING.values(), ids=MISSING)
@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["check"],
        ["pause", "shop.digest"],
        ["pause", "shop.no_such_task"],
        ["pause", "--all"],
        ["unlock", "shop.digest"],
        ["trigger", "shop.digest", "--no-wait"],
        ["prune", "--undeclared"],
    ],
    ids=" ".join,
)
def test_a_forgotten_migrate_is_said_by_every_verb_and_not_waited_for(
    arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*args: Any, **options: Any) -> Any:
        raise OperationalError(text)

    for name in ("look", "rows", "clock", "pause"):
        monkeypatch.setattr(ORMLock, name, ask)
    errors = StringIO()
    try:
        out, status = call("schedule", *arguments, stderr=errors)
    except CommandError as refused:
        out, status = str(refused), refused.returncode
    told = " ".join((out + errors.getvalue()).split())
    assert status == 1
    assert "Has `manage.py migrate` been run?" in told
    assert [each for each in ("when it is back", "?.", "does not answer") if each in told] == []


WRONG_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"LEASES": 30}, "MULTISERVER_SCHEDULE has no option 'LEASES'. Did you mean 'LEASE'?"),
    "maintenance": (
        {"MAINTENANCE_MODE": "shop.nope"},
        "MULTISERVER_SCHEDULE['MAINTENANCE_MODE'] 'shop.nope' cannot be imported: ModuleNotFoundError",
    ),
    "a cache that is no lock": (
        {"LOCKS": {"default": {"BACKEND": "multiserver_schedule.locks.cache.CacheLock"}}},
        "The cache 'default' (django.core.cache.backends.locmem.LocMemCache) is no lock: ",
    ),
}


@pytest.mark.parametrize("how", WRONG_SETTINGS)
def test_a_wrong_setting_is_one_line_of_a_pass(how: str, settings: Any) -> None:
    given, said = WRONG_SETTINGS[how]
    settings.MULTISERVER_SCHEDULE = {"RUNNER": "inline", **given}
    with pytest.raises(CommandError) as refused:
        call("runschedule")
    assert str(refused.value).startswith(said)
    assert (refused.value.returncode, "\n" in str(refused.value)) == (1, False)


@pytest.mark.parametrize("forever", [[], ["--forever"]], ids=["pass", "service"])
@pytest.mark.parametrize("how", BROKEN)
def test_a_wrong_declaration_is_one_line_of_a_pass_and_whatever_else_breaks_a_schedule_keeps_its_traceback(
    how: str, forever: list[str], settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multiserver_schedule.declare import registry

    package = f"broken_pass_{how}_{len(forever)}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / "schedule.py").write_text(BROKEN[how][0])
    monkeypatch.syspath_prepend(tmp_path)
    settings.ROOT_URLCONF = f"{package}.urls"
    with registry.set_aside(), pytest.raises(Exception) as raised:
        call("runschedule", *forever)
    if how == "declaration":
        assert isinstance(raised.value, CommandError) and raised.value.returncode == 1
        assert str(raised.value).startswith(f"{tmp_path / package / 'schedule.py'}:3: ")
    else:
        assert not isinstance(raised.value, CommandError)


def test_a_pass_at_verbosity_2_says_that_everything_is_paused_and_an_ordinary_one_nothing() -> None:
    call("runschedule", "--inline")
    call("schedule", "pause", "--all", "--reason", "deploy of v7")
    make_due("shop.digest")
    assert call("runschedule", "--inline") == ("", 0)
    said, status = call("runschedule", "--inline", "-v", "2")
    assert said.splitlines() == ["everything is paused; `manage.py schedule list` says since when, and why"]
    assert status == 0


def test_a_pass_at_verbosity_2_says_which_due_task_is_paused_since_when_and_why() -> None:
    call("runschedule", "--inline")
    make_due("shop.digest")
    call("schedule", "pause", "shop.digest", "--reason", "the bank is down")
    call("schedule", "pause", "shop.program")
    ScheduledLock.objects.filter(task="shop.program").update(next_due_at=timezone.now() + timedelta(hours=1))
    assert call("runschedule", "--inline") == ("", 0)
    said, status = call("runschedule", "--inline", "-v", "2")
    [line] = said.splitlines()
    assert re.fullmatch(r"shop\.digest is due, and paused since [-0-9]+ [:0-9]+Z \(the bank is down\)", line)
    assert status == 0


@pytest.mark.parametrize(("awake", "but"), [([], ""), (["shop.digest"], " but shop.digest")], ids=["none", "one"])
def test_in_maintenance_mode_a_pass_at_verbosity_2_and_the_list_say_so(
    awake: list[str], but: str, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("runschedule", "--inline")
    from multiserver_schedule.declare import registry

    for name in awake:
        monkeypatch.setitem(registry._tasks, name, replace(registry._tasks[name], even_in_maintenance_mode=True))
    make_due("shop.command")
    errors = StringIO()
    call("schedule", "list", stderr=errors)
    assert "maintenance" not in errors.getvalue()
    settings.MULTISERVER_SCHEDULE = {**settings.MULTISERVER_SCHEDULE, "MAINTENANCE_MODE": lambda: True}
    assert call("runschedule", "--inline") == ("", 0)
    said, _ = call("runschedule", "--inline", "-v", "2")
    assert said.splitlines() == [f"maintenance mode (MAINTENANCE_MODE): nothing is started{but}"]
    for verb in (["list"], ["explain", "shop.command"]):
        errors = StringIO()
        call("schedule", *verb, stderr=errors)
        assert errors.getvalue().startswith("The project is in maintenance mode (MAINTENANCE_MODE): ")
    assert "shop.digest is started by schedule" in errors.getvalue() if awake else "nothing is" in errors.getvalue()


def test_a_run_by_hand_minds_no_environment_no_server_and_no_maintenance_mode_and_its_output_is_kept(
    settings: Any,
) -> None:
    from multiserver_schedule.declare import registry

    settings.MULTISERVER_SCHEDULE = {**settings.MULTISERVER_SCHEDULE, "MAINTENANCE_MODE": True}
    with registry.set_aside():
        task = schedule.call("tests.shop.work.note", "by hand").daily().name("a.far")
        task.environments("elsewhere").only_on("web9")
        said, status = call("schedule", "trigger", "a.far")
    assert ("a.far succeeded" in said, status) == (True, 0)
    assert [run.output for run in ScheduledRun.objects.filter(task="a.far")] == ["noted by hand\n"]
