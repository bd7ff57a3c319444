"""What is said to people, at which level, and that nothing they plug in can break it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from io import StringIO
from typing import Any

import pytest
from django.dispatch import Signal

from multiserver_schedule import signals
from multiserver_schedule.cron import Cron
from multiserver_schedule.entries import ScheduledTask
from multiserver_schedule.logs import Teller, distance, summary
from multiserver_schedule.models import CleanupLog

UTC = timezone.utc
THREE = datetime(2030, 1, 1, 3, tzinfo=UTC)
TASK = ScheduledTask(name="a.b", kind="call", target="x.y", timetable=Cron("0 3 * * *", "UTC"), module="a.schedule")
WHERE: dict[str, Any] = {"task": "a.b", "due_at": THREE.isoformat(), "server": "web1"}

HELD: dict[str, Any] = {"kind": "skipped", "reason": "held", "holder": "web2", "count": 1, **WHERE}
EVENTS: dict[str, dict[str, Any]] = {
    "missed": {"kind": "skipped", "reason": "missed", "count": 3, **WHERE},
    "abandoned": HELD | {"held_since": (THREE - timedelta(minutes=10)).isoformat()},
    "held": HELD | {"held_since": (THREE - timedelta(minutes=9)).isoformat()},
    "busy": {"kind": "busy", **WHERE},
    "forgone": {"kind": "forgone", **WHERE},
    "claimed": {"kind": "claimed", "fence": 1, "trigger": "schedule", "attempt": 1, **WHERE},
    "filtered": {"kind": "skipped", "reason": "filtered", "count": 1, **WHERE},
    "lost": {"kind": "lost", "fence": 1, **WHERE},
}


def teller(**more: Any) -> Teller:
    return Teller(tasks=lambda: {"a.b": TASK}, stdout=StringIO(), **more)


@contextmanager
def heard(signal: Signal) -> Iterator[list[dict[str, Any]]]:
    got: list[dict[str, Any]] = []

    def listen(**arguments: Any) -> None:
        got.append(arguments)

    signal.connect(listen)
    try:
        yield got
    finally:
        signal.disconnect(listen)


@pytest.mark.parametrize(
    ("level", "logged"),
    [
        ("none", {"missed", "forgone"}),
        ("abandoned", {"missed", "forgone", "abandoned"}),
        ("conflicts", {"missed", "forgone", "abandoned", "held", "busy"}),
        ("verbose", {"missed", "forgone", "abandoned", "held", "busy", "claimed", "filtered", "lost"}),
    ],
)
def test_each_level_logs_what_it_says_and_no_more(
    level: str, logged: set[str], settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings.MULTISERVER_SCHEDULE = {"LOG_LEVEL": level}
    found = set()
    for name, event in EVENTS.items():
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="multiserver_schedule"):
            teller()(event)
        found |= {name} if caplog.records else set()
    assert found == logged


def test_every_line_has_the_task_its_due_time_and_the_server(settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    settings.MULTISERVER_SCHEDULE = {"LOG_LEVEL": "verbose"}
    with caplog.at_level(logging.DEBUG, logger="multiserver_schedule"):
        for event in EVENTS.values():
            teller()(event)
    assert len(caplog.messages) == len(EVENTS)
    for message in caplog.messages:
        assert message.endswith("task=a.b due=2030-01-01T03:00:00+00:00 server=web1")


def test_that_another_server_has_it_is_no_warning(settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A peer logged the loser's side as an alert."""
    settings.MULTISERVER_SCHEDULE = {"LOG_LEVEL": "verbose"}
    with caplog.at_level(logging.DEBUG, logger="multiserver_schedule"):
        teller()(EVENTS["busy"])
        teller()(EVENTS["held"])
    assert {record.levelno for record in caplog.records} == {logging.INFO}


ENDED: dict[str, Any] = {
    "kind": "ended",
    "status": "failed",
    "seconds": 1.25,
    "reason": "",
    "error": "killed by SIGSEGV",
    "fence": 7,
    "trigger": "schedule",
    "attempt": 1,
    "told": False,
    "started_at": THREE.isoformat(),
    "key": "a.b/x",
    **WHERE,
}


@pytest.mark.parametrize("level", ["none", "verbose"])
def test_a_failure_is_an_error_at_every_level(level: str, settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    settings.MULTISERVER_SCHEDULE = {"LOG_LEVEL": level}
    teller()(ENDED)
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "failed: killed by SIGSEGV task=a.b due=2030-01-01T03:00:00+00:00 server=web1" in record.getMessage()


def test_the_end_of_a_run_that_could_not_say_it_itself_is_signalled_once() -> None:
    with heard(signals.task_failed) as got:
        teller()(ENDED)
        teller()(ENDED | {"told": True})
    assert len(got) == 1
    assert got[0]["task"] is TASK
    assert (got[0]["status"], got[0]["error"], got[0]["run"].fence) == ("failed", "killed by SIGSEGV", 7)


def test_the_start_of_a_program_is_signalled_by_whoever_started_it() -> None:
    with heard(signals.task_started) as got:
        teller()(
            {"kind": "started", "fence": 7, "attempt": 1, "started_at": THREE.isoformat(), "key": "a.b/x", **WHERE}
        )
    assert got[0]["task"] is TASK
    assert (got[0]["run"].fence, got[0]["server"]) == (7, "web1")


def test_one_line_on_the_console_for_a_run() -> None:
    tell = teller()
    tell(ENDED)
    tell(ENDED | {"status": "succeeded", "error": ""})
    tell(ENDED | {"status": "timed_out", "error": ""})
    assert isinstance(tell.stdout, StringIO)
    assert tell.stdout.getvalue().splitlines() == [
        "2030-01-01 03:00:00Z a.b failed (killed by SIGSEGV) in 1.2 s on web1",
        "2030-01-01 03:00:00Z a.b succeeded in 1.2 s on web1",
        "2030-01-01 03:00:00Z a.b timed out in 1.2 s on web1",
    ]


def test_verbosity_0_is_silent_and_2_says_what_was_skipped_and_who_holds_it() -> None:
    silent, more = teller(verbosity=0), teller(verbosity=2)
    for tell in (silent, more):
        tell(ENDED)
        tell(EVENTS["held"])
    assert isinstance(silent.stdout, StringIO)
    assert isinstance(more.stdout, StringIO)
    assert silent.stdout.getvalue() == ""
    assert more.stdout.getvalue().splitlines()[-1] == (
        "2030-01-01 03:00:00Z a.b skipped: held by web2 since 2030-01-01 02:51:00Z"
    )


def test_a_receiver_that_raises_is_logged_and_the_others_are_called(caplog: pytest.LogCaptureFixture) -> None:
    def broken(**arguments: Any) -> None:
        raise KeyError("somebody's mistake")

    signals.task_skipped.connect(broken)
    try:
        with heard(signals.task_skipped) as got:
            teller()(EVENTS["missed"])
    finally:
        signals.task_skipped.disconnect(broken)
    assert got[0]["count"] == 3
    assert "somebody's mistake" in caplog.text


@pytest.mark.django_db
def test_a_clean_up_is_signalled_with_its_row_and_the_text_of_what_was_run(caplog: pytest.LogCaptureFixture) -> None:
    row = CleanupLog.objects.create(
        task="a.b",
        due_at=THREE,
        server="web2",
        owner="x",
        fence=4,
        acquired_at=THREE,
        expired_at=THREE + timedelta(seconds=30),
        cleaned_at=THREE + timedelta(seconds=31),
        cleaned_by="web1",
        reason="lease_expired",
    )
    fields = {
        field.name: value.isoformat() if isinstance(value := getattr(row, field.attname), datetime) else value
        for field in CleanupLog._meta.fields
        if field.name != "id"
    }
    with heard(signals.ensure_cleanup_executed) as got:
        teller()(
            {
                "kind": "cleaned",
                "cleanup": fields | {"pk": row.pk},
                "command": "x.y()",
                "alias": "default",
                "server": "web1",
            }
        )
    assert got[0]["cleanup"] == row
    assert (got[0]["task"], got[0]["command"], got[0]["reason"]) == (TASK, "x.y()", "lease_expired")
    assert "cleaned up: lease expired, the lock of web2 since 2030-01-01 03:00:00Z" in caplog.text


def test_a_first_pass_names_its_modules_and_the_next_due_time() -> None:
    assert summary([TASK], THREE - timedelta(seconds=40)) == (
        "1 task from a.schedule; next: a.b 2030-01-01 03:00:00Z (in 40 s)"
    )


def test_what_is_wrong_with_a_new_task_is_logged_when_it_is_first_seen(caplog: pytest.LogCaptureFixture) -> None:
    tell = teller(verify=lambda task: ["the command 'x' is not there"])
    tell({"kind": "synced", "registered": ["a.b"], "changed": [], "now": THREE.isoformat(), "server": "web1"})
    assert "the command 'x' is not there task=a.b" in caplog.text


@pytest.mark.parametrize(
    ("span", "text"), [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172800, "2 days")]
)
def test_a_distance_is_said_in_its_largest_good_unit(span: int, text: str) -> None:
    assert distance(timedelta(seconds=span)) == text


@pytest.mark.parametrize(("level", "is_said"), [("abandoned", False), ("conflicts", True)])
def test_a_run_that_made_way_for_a_newer_due_time_is_no_error(
    settings: Any, caplog: pytest.LogCaptureFixture, level: str, is_said: bool
) -> None:
    settings.MULTISERVER_SCHEDULE = {"LOG_LEVEL": level}
    ended = {"status": "cancelled", "seconds": 1.0, "reason": "a newer due time went before it", "error": ""}
    more = {"fence": 1, "trigger": "schedule", "attempt": 1, "started_at": THREE.isoformat(), "key": "k"}
    with caplog.at_level(logging.DEBUG, "multiserver_schedule"):
        teller()({"kind": "ended", "told": False, **ended, **more, **WHERE})
    assert [record.levelname for record in caplog.records] == (["INFO"] if is_said else [])
