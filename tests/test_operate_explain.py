"""A task, explained: its words, what is in force, and what the next clock change makes of it."""

from __future__ import annotations

import builtins
import importlib.util
from collections.abc import Iterator
from datetime import datetime, time, timedelta, timezone
from typing import Any

import pytest
from django.utils import timezone as clock

from multiserver_schedule import operate, schedule
from multiserver_schedule.cron import Cron, Every, Timetable, Window, clock_changes
from multiserver_schedule.declare import registry
from multiserver_schedule.models import ScheduledLock, ScheduledRun
from multiserver_schedule.operate import explanation, words

from .test_operate import AWAY

pytestmark = pytest.mark.django_db(transaction=True)

UTC = timezone.utc
WINTER = datetime(2027, 1, 15, tzinfo=UTC)
SUMMER = datetime(2027, 7, 15, tzinfo=UTC)
needs_words = pytest.mark.skipif(
    importlib.util.find_spec("cron_descriptor") is None, reason="no Python package cron_descriptor"
)


@pytest.fixture(autouse=True)
def _project(settings: Any) -> Iterator[None]:
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1"}
    with registry.set_aside():
        yield


# -- words ------------------------------------------------------------------------------------------------------------


@needs_words
@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("30 2 * * *", "At 02:30"),
        ("*/5 * * * *", "Every 5 minutes"),
        ("0 9 * * 1-5", "At 09:00, Monday through Friday"),
        ("30 2 * * 7", "At 02:30, only on Sunday"),
        ("0 0 L * *", "At 00:00, on the last day of the month"),
        ("0 3 * * 5#2", "At 03:00, on the second Friday of the month"),
        ("0 3 * * 5L", "At 03:00, on the last Friday of the month"),
        ("@hourly", "Every hour"),
    ],
)
def test_an_expression_in_words(expression: str, said: str) -> None:
    assert words.of_cron(Cron(expression).expression) == said


@needs_words
@pytest.mark.parametrize(
    ("expression", "said"),
    [
        # "and on Friday" in one version of the library, "or on Friday" in the next.
        ("0 3 13 * 5", "At 03:00, on day 13 of the month; and at 03:00, only on Friday"),
        # "on the  Monday and Wednesday of the month"
        (
            "5 4 * * 1#1,3#2",
            "At 04:05, on the first Monday of the month; and at 04:05, on the second Wednesday of the month",
        ),
        # "Between 08:00 and 18:59"
        ("0 8-18 * * *", "At 0 minutes past the hours 08 through 18"),
        # "At 22:00 through 23:59 and 00:00 through 05:59"
        ("1 0-5,22-23 * * 1", "At 1 minute past the hours 00 through 05, 22 and 23, only on Monday"),
    ],
)
def test_what_the_library_says_wrong_is_said_right(expression: str, said: str) -> None:
    assert words.of_cron(Cron(expression).expression) == said


@needs_words
def test_the_words_are_english_and_the_hours_twenty_four_whatever_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locale.getlocale", lambda *args: ("de_DE", "UTF-8"))
    assert words.of_cron("30 14 * * 1") == "At 14:30, only on Monday"
    monkeypatch.setattr("locale.getlocale", lambda *args: (None, None))
    assert words.of_cron("30 14 * * 1") == "At 14:30, only on Monday"


def test_without_the_library_there_is_the_expression_and_how_to_have_words(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "cron_descriptor":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    text, hint = words.of_schedule(Timetable(Cron("30 2 * * *", "UTC"), "UTC", frozenset({0, 1, 2, 3, 4})))
    assert text == "30 2 * * *, if it is Monday to Friday"
    assert hint == 'Words for cron expressions: pip install "multiserver-schedule[explain]"'
    schedule.call("time.sleep", 0).cron("*/5 * * * *").name("a.b")
    about = operate.explain("a.b")
    assert (about.in_words, about.hint) == ("*/5 * * * *", hint)


@pytest.mark.parametrize(
    ("timetable", "said"),
    [
        (Every(timedelta(seconds=10)), "Every 10 seconds"),
        (Every(timedelta(minutes=1)), "Every minute"),
        (Every(timedelta(hours=6)), "Every 6 hours"),
        (Every(timedelta(seconds=90)), "Every 90 seconds"),
        (
            Timetable(Every(timedelta(minutes=5)), "UTC", frozenset({0, 2, 5, 6}), (Window(time(8), time(18)),)),
            "Every 5 minutes, if it is Monday, Wednesday, Saturday or Sunday, only between 08:00 and 18:00, "
            "both included",
        ),
        (
            Timetable(Every(timedelta(hours=1)), "UTC", windows=(Window(time(22), time(6), inside=False),)),
            "Every hour, not between 22:00 and 06:00 of the next day, both included",
        ),
    ],
)
def test_intervals_days_and_hours_in_our_own_words(timetable: Any, said: str) -> None:
    assert words.of_schedule(timetable) == (said, "")


@pytest.mark.parametrize(
    ("span", "said"),
    [
        (timedelta(0), "0 s"),
        (timedelta(seconds=2.5), "2.5 s"),
        (timedelta(seconds=90), "1 min 30 s"),
        (timedelta(hours=30), "1 d 6 h"),
    ],
)
def test_a_span_says_all_of_it(span: timedelta, said: str) -> None:
    assert words.of_span(span) == said


# -- what is in force -------------------------------------------------------------------------------------------------


def facts(name: str) -> dict[str, str]:
    return dict(operate.explain(name).facts)


def test_what_is_run_and_where_it_stands() -> None:
    schedule.call("time.sleep", 0).hourly().name("a.b")
    about = operate.explain("a.b")
    assert (about.name, about.runs, about.kind) == ("a.b", "time.sleep(0)", "function")
    assert about.declared_in.startswith(__file__) and about.declared_in.endswith(f"({__name__})")
    assert (about.schedule, about.zone) == ("0 * * * * UTC", "UTC")


def test_everything_that_is_in_force_is_said() -> None:
    (
        schedule.call("time.sleep", 0)
        .daily_at("03:00")
        .name("a.b")
        .without_overlapping(min_break=timedelta(minutes=2), lease=timedelta(minutes=5))
        .overlap("queue_one")
        .catch_up(within=timedelta(hours=2))
        .ensure_finished(minutes=90)
        .retry(3, backoff=timedelta(minutes=1))
        .on_crash("rerun")
        .jitter(minutes=30)
        .when("time.time")
        .even_in_maintenance_mode()
    )
    found = facts("a.b")
    offset = words.of_span(registry.tasks["a.b"].offset("a.b"))
    assert found == {
        "lock": "'default', one run for all servers; lease 5 min, renewed while it runs",
        "overlap": "a due time that comes while it runs is run once that has ended",
        "break": "2 min after each run",
        "catch-up": "the latest due time is run up to 2 h late; what is older is recorded as missed",
        "limit": "ended after 1 h 30 min",
        "retries": "a failure is tried again 3 times, after about 1 min, 2 min and 4 min (a fifth more or less), "
        "but never across the next due time",
        "if its server dies": "the due time is run again by another server",
        "jitter": f"up to 30 min; this row starts {offset} after each due time",
        "servers": "all",
        "conditions": "one asked at each run",
        "maintenance": "runs in maintenance mode, too",
    }


def test_where_the_task_says_nothing_it_is_what_the_settings_and_the_period_say(settings: Any) -> None:
    schedule.call("time.sleep", 0).every_ten_minutes().name("a.b")
    found = facts("a.b")
    assert found["break"] == "10 s after each run"
    assert found["catch-up"].startswith("the latest due time is run up to 5 min late")
    settings.MULTISERVER_SCHEDULE = {"CATCH_UP": timedelta(hours=3), "MIN_BREAK": timedelta(0)}
    found = facts("a.b")
    assert found["break"] == "none"
    assert found["catch-up"].startswith("the latest due time is run up to 3 h late")


def test_what_is_in_force_does_not_depend_on_how_many_due_times_are_shown() -> None:
    schedule.call("time.sleep", 0).every_ten_seconds().name("a.b")
    one, five = operate.explain("a.b", count=1), operate.explain("a.b")
    assert (len(one.next), len(five.next)) == (1, 5)
    assert one.facts == five.facts
    assert dict(one.facts)["catch-up"].startswith("the latest due time is run up to 1 min late")


def test_no_catch_up_still_runs_what_a_slow_start_made_late() -> None:
    schedule.call("time.sleep", 0).hourly().no_catch_up().name("a.b")
    schedule.call("time.sleep", 0).hourly().catch_up(all=True).name("a.all")
    assert facts("a.b")["catch-up"].startswith("none, but the latest due time is run up to 1 min late")
    assert facts("a.all")["catch-up"] == "each due time that was missed is run, the oldest first"


def test_which_servers_run_it_and_whether_this_one_does(settings: Any) -> None:
    schedule.call("time.sleep", 0).hourly().environments("production", "staging").only_on("web2").name("a.b")
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "ENVIRONMENT": "staging"}
    assert facts("a.b")["servers"] == (
        "only in the environment production or staging and on web2; this is web1 in 'staging', which is NOT one of them"
    )
    assert not operate.explain("a.b").is_meant
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web2", "ENVIRONMENT": "staging"}
    assert facts("a.b")["servers"].endswith("this is web2 in 'staging', which is one of them")
    assert operate.explain("a.b").is_meant


def test_how_it_stands_and_why_it_was_last_skipped() -> None:
    schedule.call("time.sleep", 0).hourly().name("a.b")
    at = datetime(2030, 1, 1, 3, tzinfo=UTC)
    ScheduledRun.objects.create(task="a.b", due_at=at, status="skipped", reason="held by web9 since 02:58", count=3)
    ScheduledRun.objects.create(task="a.b", due_at=at + timedelta(hours=1), status="succeeded")
    now = clock.now()
    ScheduledLock.objects.create(
        task="a.b", last_due_at=now, schedule_since=now, not_before=now, next_due_at=now, paused_at=now
    )
    about = operate.explain("a.b")
    assert about.last_skipped == "2030-01-01 03:00:00Z: held by web9 since 02:58, 3 due times in a row"
    assert [line.state for line in about.lines] == ["paused"]
    assert about.lines[0].last_status == "succeeded"


def test_a_row_of_a_server_is_explained_by_its_own_name() -> None:
    schedule.call("time.sleep", 0).hourly().jitter(minutes=20).on_every_server().name("a.b")
    now = clock.now()
    ScheduledLock.objects.create(task="a.b@web2", last_due_at=now, schedule_since=now, not_before=now)
    assert operate.explain("a.b").name == "a.b@web1"
    assert operate.explain("a.b@web2").name == "a.b@web2"
    assert operate.explain("a.b@web2").offset != operate.explain("a.b").offset


@pytest.mark.parametrize(("server", "nearest"), [("wbe2", "web2"), ("WEB1", "web1"), ("mars", "")])
def test_a_row_of_a_server_that_no_lock_knows_is_not_explained(server: str, nearest: str) -> None:
    schedule.call("time.sleep", 0).hourly().on_every_server().name("a.b")
    now = clock.now()
    ScheduledLock.objects.create(task="a.b@web2", last_due_at=now, schedule_since=now, not_before=now)
    with pytest.raises(operate.Refused) as refused:
        operate.explain(f"a.b@{server}")
    meant = f"Did you mean a.b@{nearest}?" if nearest else "`manage.py schedule list` shows them all."
    assert str(refused.value) == f"No lock knows a server {server!r} of a.b. {meant}"


def test_a_row_of_a_server_is_explained_while_the_lock_that_may_know_it_is_away(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "LOCKS": {"default": AWAY}}
    schedule.call("time.sleep", 0).hourly().on_every_server().name("a.b")
    about = operate.explain("a.b@web2")
    assert (about.name, about.lines, len(about.troubles)) == ("a.b@web2", (), 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.bb", "No task is named 'a.bb'. Did you mean a.b?"),
        ("a.b@web2", "No task is named 'a.b@web2'. Did you mean a.b?"),
        ("gone.task", "gone.task is known to a lock, but not declared in this version of the project"),
    ],
)
def test_what_is_not_declared_is_not_explained(name: str, said: str) -> None:
    schedule.call("time.sleep", 0).hourly().name("a.b")
    now = clock.now()
    ScheduledLock.objects.create(task="gone.task", last_due_at=now, schedule_since=now, not_before=now)
    with pytest.raises(operate.Refused) as refused:
        operate.explain(name)
    assert str(refused.value).startswith(said)


# -- the next clock change --------------------------------------------------------------------------------------------


def change(now: datetime, zone: str = "Europe/Berlin", **say: Any) -> operate.ClockChange:
    """Return what is said of the next clock change, for a task of this expression or interval."""
    task = schedule.call("time.sleep", 0).timezone(zone).name("a.b")
    for word, given in say.items():
        getattr(task, word)(*given) if isinstance(given, tuple) else getattr(task, word)(given)
    found = explanation._next_change(registry.tasks["a.b"], zone, now)
    assert found is not None
    return found


def test_where_the_clocks_go_forward_it_runs_right_after_the_gap() -> None:
    found = change(WINTER, cron="30 2 * * *")
    assert found.at == datetime(2027, 3, 28, 1, tzinfo=UTC)
    assert (found.before, found.after) == (datetime(2027, 3, 28, 2), datetime(2027, 3, 28, 3))
    assert found.effect == "02:30 does not exist that day: it runs right after the gap, at 03:00"
    assert found.around == (
        *(datetime(2027, 3, day, 1, 30, tzinfo=UTC) for day in (25, 26, 27)),
        datetime(2027, 3, 28, 1, tzinfo=UTC),
        *(datetime(2027, 3, day, 0, 30, tzinfo=UTC) for day in (29, 30)),
    )


def test_where_the_clocks_go_back_it_runs_once_in_the_repeated_hour() -> None:
    found = change(SUMMER, cron="30 2 * * *")
    assert found.at == datetime(2027, 10, 31, 1, tzinfo=UTC)
    assert found.effect == "02:30 comes twice: it runs once in the repeated hour, the first time"
    assert datetime(2027, 10, 31, 0, 30, tzinfo=UTC) in found.around
    assert datetime(2027, 10, 31, 1, 30, tzinfo=UTC) not in found.around


def test_what_follows_the_clock_does_so() -> None:
    assert change(WINTER, cron="*/30 * * * *").effect == (
        "02:00 and 02:30 do not exist that day, and are left out: it follows the clock"
    )
    with registry.set_aside():
        found = change(SUMMER, cron="*/30 * * * *")
    assert found.effect == "02:00 and 02:30 come twice: it runs both times, as it follows the clock"
    assert {datetime(2027, 10, 31, hour, 30, tzinfo=UTC) for hour in (0, 1)} <= set(found.around)


def test_many_due_times_in_the_hour_are_counted() -> None:
    assert change(WINTER, cron="*/5 * * * *").effect.startswith("02:00 to 02:55 (12 due times) do not exist that day")


@pytest.mark.parametrize("now", [WINTER, SUMMER])
def test_a_task_that_is_not_due_in_that_hour_is_not_touched(now: datetime) -> None:
    assert change(now, cron="0 4 * * *").effect == "no due time is touched by it"


@pytest.mark.parametrize("now", [WINTER, SUMMER])
def test_a_task_that_is_not_due_on_that_day_is_not_touched(now: datetime) -> None:
    assert change(now, cron="30 2 * * *", weekdays=()).effect == "no due time is touched by it"


def test_what_a_gap_puts_off_is_judged_by_the_time_it_is_put_off_to() -> None:
    found = change(WINTER, cron="30 2 * * *", between=("02:00", "02:45"))
    assert found.effect == "02:30 does not exist that day, and is left out"
    assert not any(moment.date() == found.at.date() for moment in found.around)
    with registry.set_aside():
        found = change(WINTER, cron="30 2 * * *", between=("02:15", "03:00"))
        assert found.effect == "02:30 does not exist that day: it runs right after the gap, at 03:00"


def test_an_interval_with_hours_has_its_hours_by_the_clock() -> None:
    found = change(WINTER, every=timedelta(minutes=30), between=("08:00", "18:00"))
    assert found.effect == "it counts on in UTC; only its hours and days are those of the clock"


def test_a_zone_that_changes_by_half_an_hour() -> None:
    found = change(WINTER, "Australia/Lord_Howe", cron="45 1 * * *")
    assert (found.before.time(), found.after.time()) == (time(2), time(1, 30))
    assert found.effect == "01:45 comes twice: it runs once in the repeated hour, the first time"


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo"])
def test_a_zone_without_changes_has_none(zone: str) -> None:
    schedule.call("time.sleep", 0).daily().timezone(zone).name("a.b")
    assert operate.explain("a.b").change is None


def test_an_interval_has_to_do_with_no_clock() -> None:
    schedule.call("time.sleep", 0).every(minutes=7).timezone("Europe/Berlin").name("a.b")
    about = operate.explain("a.b")
    assert (about.zone, about.change) == ("", None)


def test_each_zone_that_changes_has_a_change_within_thirteen_months() -> None:
    for zone in ("Europe/Berlin", "America/New_York", "America/Santiago", "Africa/Casablanca", "Australia/Sydney"):
        assert clock_changes(zone, WINTER, WINTER + explanation.AHEAD), zone


def test_clock_changes_are_those_in_the_window_and_no_others() -> None:
    spring, autumn = datetime(2027, 3, 28, 1, tzinfo=UTC), datetime(2027, 10, 31, 1, tzinfo=UTC)
    hour = timedelta(hours=1)
    assert clock_changes("Europe/Berlin", WINTER, WINTER + timedelta(days=365)) == [
        (spring, hour, 2 * hour),
        (autumn, 2 * hour, hour),
    ]
    assert clock_changes("Europe/Berlin", spring, autumn - timedelta(seconds=1)) == []
    assert [at for at, _, _ in clock_changes("Europe/Berlin", spring - timedelta(seconds=1), autumn)] == [
        spring,
        autumn,
    ]
    assert clock_changes("UTC", WINTER, SUMMER) == []
