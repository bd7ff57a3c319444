"""Each word of the vocabulary, and the due times that it gives: written by hand, not taken from the code's output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from multiserver_schedule import schedule
from multiserver_schedule.declare import Declaration, Registry, registry
from multiserver_schedule.entries import Filter, Hook, Mail, OutputFile, Ping, ScheduledTask
from multiserver_schedule.exceptions import DeclarationError

UTC = timezone.utc
Say = Callable[[Declaration], object]

NOW = datetime(2030, 1, 2, 10, 7, 30, tzinfo=UTC)
"""A Wednesday."""


@pytest.fixture(autouse=True)
def declared() -> Iterator[Registry]:
    with registry.set_aside() as empty:
        yield empty


def finished(say: Say) -> ScheduledTask:
    say(schedule.command("clearsessions").name("the.task"))
    return registry.tasks["the.task"]


def refused(say: Say) -> str:
    with pytest.raises(DeclarationError) as caught:
        finished(say)
    return str(caught.value)


def due_times(task: ScheduledTask, number: int) -> list[datetime]:
    times: list[datetime] = []
    after: datetime | None = NOW
    for _ in range(number):
        assert after is not None
        after = task.next(after)
        assert after is not None
        times.append(after)
    return times


# What is said on Wednesday 2030-01-02 at 10:07:30 UTC, and the due times that follow: month-day hour:minute(:second).
FREQUENCIES: list[tuple[str, Say, str]] = [
    ("cron", lambda s: s.cron("15 2 * * 1-5"), "01-03 02:15, 01-04 02:15, 01-07 02:15"),
    ("cron", lambda s: s.cron("@daily"), "01-03 00:00, 01-04 00:00"),
    ("every", lambda s: s.every(minutes=7), "01-02 10:14, 01-02 10:21"),  # midnight is 2 min after one of them
    ("every", lambda s: s.every(timedelta(hours=1)), "01-02 11:00, 01-02 12:00"),
    ("every", lambda s: s.every(seconds=90), "01-02 10:09, 01-02 10:10:30"),
    ("every", lambda s: s.every(hours=24), "01-03 00:00, 01-04 00:00"),
    ("every", lambda s: s.every(minutes=0.5), "01-02 10:08, 01-02 10:08:30"),
    ("every_second", lambda s: s.every_second(), "01-02 10:07:31, 01-02 10:07:32"),
    ("every_two_seconds", lambda s: s.every_two_seconds(), "01-02 10:07:32, 01-02 10:07:34"),
    ("every_five_seconds", lambda s: s.every_five_seconds(), "01-02 10:07:35, 01-02 10:07:40"),
    ("every_ten_seconds", lambda s: s.every_ten_seconds(), "01-02 10:07:40, 01-02 10:07:50"),
    ("every_fifteen_seconds", lambda s: s.every_fifteen_seconds(), "01-02 10:07:45, 01-02 10:08:00"),
    ("every_twenty_seconds", lambda s: s.every_twenty_seconds(), "01-02 10:07:40, 01-02 10:08:00"),
    ("every_thirty_seconds", lambda s: s.every_thirty_seconds(), "01-02 10:08:00, 01-02 10:08:30"),
    ("every_minute", lambda s: s.every_minute(), "01-02 10:08, 01-02 10:09"),
    ("every_two_minutes", lambda s: s.every_two_minutes(), "01-02 10:08, 01-02 10:10"),
    ("every_three_minutes", lambda s: s.every_three_minutes(), "01-02 10:09, 01-02 10:12"),
    ("every_four_minutes", lambda s: s.every_four_minutes(), "01-02 10:08, 01-02 10:12"),
    ("every_five_minutes", lambda s: s.every_five_minutes(), "01-02 10:10, 01-02 10:15"),
    ("every_ten_minutes", lambda s: s.every_ten_minutes(), "01-02 10:10, 01-02 10:20"),
    ("every_fifteen_minutes", lambda s: s.every_fifteen_minutes(), "01-02 10:15, 01-02 10:30"),
    ("every_thirty_minutes", lambda s: s.every_thirty_minutes(), "01-02 10:30, 01-02 11:00"),
    ("hourly", lambda s: s.hourly(), "01-02 11:00, 01-02 12:00"),
    ("hourly_at", lambda s: s.hourly_at(17), "01-02 10:17, 01-02 11:17"),
    ("hourly_at", lambda s: s.hourly_at([45, 15]), "01-02 10:15, 01-02 10:45, 01-02 11:15"),
    ("hourly_at", lambda s: s.hourly_at("*/10"), "01-02 10:10, 01-02 10:20"),
    ("every_odd_hour", lambda s: s.every_odd_hour(), "01-02 11:00, 01-02 13:00"),
    ("every_odd_hour", lambda s: s.every_odd_hour(at=20), "01-02 11:20, 01-02 13:20"),
    ("every_two_hours", lambda s: s.every_two_hours(), "01-02 12:00, 01-02 14:00"),
    ("every_two_hours", lambda s: s.every_two_hours(at=15), "01-02 10:15, 01-02 12:15"),
    ("every_three_hours", lambda s: s.every_three_hours(5), "01-02 12:05, 01-02 15:05"),
    ("every_four_hours", lambda s: s.every_four_hours(at=[10, 40]), "01-02 12:10, 01-02 12:40, 01-02 16:10"),
    ("every_six_hours", lambda s: s.every_six_hours(), "01-02 12:00, 01-02 18:00, 01-03 00:00"),
    ("daily", lambda s: s.daily(), "01-03 00:00, 01-04 00:00"),
    ("daily_at", lambda s: s.daily_at("13:05"), "01-02 13:05, 01-03 13:05"),
    ("daily_at", lambda s: s.daily_at("8:00"), "01-03 08:00, 01-04 08:00"),
    ("twice_daily", lambda s: s.twice_daily(), "01-02 13:00, 01-03 01:00, 01-03 13:00"),
    ("twice_daily", lambda s: s.twice_daily(20, 9), "01-02 20:00, 01-03 09:00"),
    ("twice_daily_at", lambda s: s.twice_daily_at(1, 13, 15), "01-02 13:15, 01-03 01:15"),
    ("weekly", lambda s: s.weekly(), "01-06 00:00, 01-13 00:00"),
    ("weekly_on", lambda s: s.weekly_on("monday", "8:00"), "01-07 08:00, 01-14 08:00"),
    ("weekly_on", lambda s: s.weekly_on("sunday"), "01-06 00:00, 01-13 00:00"),
    ("monthly", lambda s: s.monthly(), "02-01 00:00, 03-01 00:00"),
    ("monthly_on", lambda s: s.monthly_on(4, "15:00"), "01-04 15:00, 02-04 15:00"),
    ("monthly_on", lambda s: s.monthly_on(31), "01-31 00:00, 03-31 00:00"),
    ("twice_monthly", lambda s: s.twice_monthly(), "01-16 00:00, 02-01 00:00"),
    ("twice_monthly", lambda s: s.twice_monthly(16, 1, "13:00"), "01-16 13:00, 02-01 13:00"),
    ("last_day_of_month", lambda s: s.last_day_of_month("17:00"), "01-31 17:00, 02-28 17:00"),
    ("days_of_month", lambda s: s.days_of_month(20, 1, 10), "01-10 00:00, 01-20 00:00, 02-01 00:00"),
    ("quarterly", lambda s: s.quarterly(), "04-01 00:00, 07-01 00:00, 10-01 00:00"),
    ("quarterly_on", lambda s: s.quarterly_on(4, "14:00"), "01-04 14:00, 04-04 14:00"),
    ("yearly", lambda s: s.yearly(), "01-01 00:00 2031, 01-01 00:00 2032"),
    ("yearly_on", lambda s: s.yearly_on(6, 1, "17:00"), "06-01 17:00, 06-01 17:00 2031"),
]
RESTRICTED: list[tuple[str, Say, str]] = [
    ("at", lambda s: s.daily().at("13:00"), "01-02 13:00, 01-03 13:00"),
    ("at", lambda s: s.at("13:00").weekly_on("thursday"), "01-03 13:00, 01-10 13:00"),
    ("at", lambda s: s.monthly().at("6:30"), "02-01 06:30, 03-01 06:30"),
    ("weekdays", lambda s: s.weekdays().daily(), "01-03 00:00, 01-04 00:00, 01-07 00:00"),
    ("weekends", lambda s: s.daily().weekends(), "01-05 00:00, 01-06 00:00, 01-12 00:00"),
    ("mondays", lambda s: s.daily().mondays(), "01-07 00:00, 01-14 00:00"),
    ("tuesdays", lambda s: s.daily().tuesdays(), "01-08 00:00, 01-15 00:00"),
    ("wednesdays", lambda s: s.daily().wednesdays(), "01-09 00:00, 01-16 00:00"),
    ("thursdays", lambda s: s.daily().thursdays(), "01-03 00:00, 01-10 00:00"),
    ("fridays", lambda s: s.daily().fridays(), "01-04 00:00, 01-11 00:00"),
    ("saturdays", lambda s: s.daily().saturdays(), "01-05 00:00, 01-12 00:00"),
    ("sundays", lambda s: s.daily().sundays(), "01-06 00:00, 01-13 00:00"),
    ("days", lambda s: s.daily().days("monday", "thursday"), "01-03 00:00, 01-07 00:00, 01-10 00:00"),
    # A restriction is an and: also with the other restrictions, and with a cron text.
    ("days", lambda s: s.daily().weekdays().days("friday", "saturday"), "01-04 00:00, 01-11 00:00"),
    ("days", lambda s: s.monthly_on(13).days("friday"), "09-13 00:00, 12-13 00:00"),
    ("weekdays", lambda s: s.cron("0 12 5-8 * *").weekdays(), "01-07 12:00, 01-08 12:00, 02-05 12:00"),
    # Laravel's documented sentence: a weekly one takes its day from the restriction.
    ("mondays", lambda s: s.weekly().mondays().at("13:00"), "01-07 13:00, 01-14 13:00"),
    ("between", lambda s: s.hourly().between("9:00", "12:00"), "01-02 11:00, 01-02 12:00, 01-03 09:00"),
    ("between", lambda s: s.every_six_hours().between("23:00", "6:00"), "01-03 00:00, 01-03 06:00, 01-04 00:00"),
    ("unless_between", lambda s: s.hourly().unless_between("10:30", "22:00"), "01-02 23:00, 01-03 00:00"),
    ("unless_between", lambda s: s.hourly().unless_between("13:00", "11:00"), "01-02 12:00, 01-03 12:00"),
    (
        "unless_between",
        lambda s: s.hourly().unless_between("11:00", "13:00").unless_between("15:00", "23:00"),
        "01-02 14:00, 01-03 00:00",
    ),
    ("timezone", lambda s: s.daily_at("3:00").timezone("Asia/Tokyo"), "01-02 18:00, 01-03 18:00"),
    ("timezone", lambda s: s.timezone(ZoneInfo("Asia/Tokyo")).daily_at("3:00"), "01-02 18:00, 01-03 18:00"),
    # Days and windows are those of the zone: it is Thursday in Tokyo from 15:00 UTC on Wednesday.
    ("thursdays", lambda s: s.daily_at("3:00").timezone("Asia/Tokyo").thursdays(), "01-02 18:00, 01-09 18:00"),
    ("between", lambda s: s.hourly().between("3:00", "4:00").timezone("Asia/Tokyo"), "01-02 18:00, 01-02 19:00"),
]


def moment(text: str) -> datetime:
    day, clock, year, *_ = [*text.split(), "2030"]
    return datetime.fromisoformat(f"{year}-{day}T{clock}" + ("+00:00" if clock.count(":") == 2 else ":00+00:00"))


@pytest.mark.parametrize(
    ("word", "say", "due"), FREQUENCIES + RESTRICTED, ids=[row[0] for row in FREQUENCIES + RESTRICTED]
)
def test_each_word_gives_the_due_times_it_names(word: str, say: Say, due: str) -> None:
    expected = [moment(text) for text in due.split(", ")]

    assert due_times(finished(say), len(expected)) == expected


Gives = tuple[str, Say, dict[str, Any]]


def is_open() -> bool:
    return True


URL = "https://me:secret@hc.example/a1b2?key=secret"

FIELDS: list[Gives] = [
    ("name", lambda s: s, {"name": "the.task"}),
    ("when", lambda s: s.when(is_open), {"filters": (Filter(is_open, True),)}),
    (
        "when",
        lambda s: s.when("shop.is_open").when(is_open),
        {"filters": (Filter("shop.is_open", True), Filter(is_open, True))},
    ),
    ("skip", lambda s: s.skip(is_open), {"filters": (Filter(is_open, False),)}),
    ("environments", lambda s: s.environments("staging", "production"), {"environments": ("staging", "production")}),
    ("environments", lambda s: s.environments(["production"]), {"environments": ("production",)}),
    ("only_on", lambda s: s.only_on("web1", "web2"), {"servers": ("web1", "web2")}),
    ("even_in_maintenance_mode", lambda s: s.even_in_maintenance_mode(), {"even_in_maintenance_mode": True}),
    ("without_overlapping", lambda s: s.without_overlapping(), {"min_break": None, "lease": None, "overlap": "skip"}),
    (
        "without_overlapping",
        lambda s: s.without_overlapping(min_break=timedelta(minutes=5), lease=timedelta(minutes=1)),
        {"min_break": timedelta(minutes=5), "lease": timedelta(minutes=1)},
    ),
    ("without_overlapping", lambda s: s.without_overlapping(min_break=timedelta(0)), {"min_break": timedelta(0)}),
    ("overlap", lambda s: s.overlap("allow"), {"overlap": "allow"}),
    ("overlap", lambda s: s.without_overlapping().overlap("skip"), {"overlap": "skip"}),
    ("overlap", lambda s: s.overlap("queue_one").without_overlapping(), {"overlap": "queue_one"}),
    ("overlap", lambda s: s.overlap("cancel_other"), {"overlap": "cancel_other"}),
    ("jitter", lambda s: s.jitter(minutes=5), {"jitter": timedelta(minutes=5)}),
    ("jitter", lambda s: s.jitter(timedelta(seconds=90)), {"jitter": timedelta(seconds=90)}),
    ("retry", lambda s: s.retry(3), {"retries": 3, "backoff": timedelta(minutes=1)}),
    ("retry", lambda s: s.retry(1, backoff=timedelta(seconds=5)), {"retries": 1, "backoff": timedelta(seconds=5)}),
    ("on_crash", lambda s: s.on_crash("rerun"), {"rerun": True}),
    ("on_crash", lambda s: s.on_crash("skip"), {"rerun": False}),
    ("on_every_server", lambda s: s.on_every_server(), {"on_every_server": True}),
    ("lock_with", lambda s: s.lock_with("default"), {"lock": "default"}),
    ("ensure_finished", lambda s: s.ensure_finished(minutes=30), {"limit": timedelta(minutes=30)}),
    ("ensure_finished", lambda s: s.ensure_finished(seconds=2.5), {"limit": timedelta(seconds=2.5)}),
    ("ensure_finished", lambda s: s.ensure_finished(hours=1, minutes=30), {"limit": timedelta(minutes=90)}),
    ("ensure_finished", lambda s: s.ensure_finished(timedelta(hours=3)), {"limit": timedelta(hours=3)}),
    ("catch_up", lambda s: s.catch_up(within=timedelta(hours=2)), {"catch_up": timedelta(hours=2)}),
    ("catch_up", lambda s: s.catch_up(all=True), {"catch_up": "all"}),
    ("no_catch_up", lambda s: s.no_catch_up(), {"catch_up": "none"}),
    ("before", lambda s: s.before(is_open), {"hooks": (Hook("before", is_open),)}),
    ("after", lambda s: s.after("shop.tell"), {"hooks": (Hook("after", "shop.tell"),)}),
    ("on_success", lambda s: s.on_success(is_open), {"hooks": (Hook("success", is_open),)}),
    (
        "on_failure",
        lambda s: s.on_failure(is_open).before("shop.tell").on_failure("shop.tell"),
        {"hooks": (Hook("failure", is_open), Hook("before", "shop.tell"), Hook("failure", "shop.tell"))},
    ),
    ("ping_before", lambda s: s.ping_before(URL), {"pings": (Ping("before", URL),)}),
    (
        "then_ping",
        lambda s: s.then_ping(URL).then_ping("http://[::1]:8/"),
        {"pings": (Ping("after", URL), Ping("after", "http://[::1]:8/"))},
    ),
    ("ping_on_success", lambda s: s.ping_on_success(URL), {"pings": (Ping("success", URL),)}),
    ("ping_on_failure", lambda s: s.ping_on_failure(URL), {"pings": (Ping("failure", URL),)}),
    ("send_output_to", lambda s: s.send_output_to("a.log"), {"output_file": OutputFile("a.log", append=False)}),
    ("append_output_to", lambda s: s.append_output_to(Path("/a/b")), {"output_file": OutputFile("/a/b", append=True)}),
    ("email_output_to", lambda s: s.email_output_to("a@b", "c@d"), {"mails": (Mail(("a@b", "c@d"), False),)}),
    (
        "email_output_on_failure",
        lambda s: s.email_output_on_failure(["a@b"]).email_output_to("c@d"),
        {"mails": (Mail(("a@b",), True), Mail(("c@d",), False))},
    ),
]


@pytest.mark.parametrize(("word", "say", "fields"), FIELDS, ids=[row[0] for row in FIELDS])
def test_each_word_sets_the_field_it_names(word: str, say: Say, fields: dict[str, Any]) -> None:
    task = finished(lambda s: (s.hourly(), say(s)))

    assert {field: getattr(task, field) for field in fields} == fields


def test_no_word_of_the_vocabulary_is_missing_from_these_tables() -> None:
    words = {name for name, _ in inspect.getmembers(Declaration, inspect.isfunction) if not name.startswith("_")}

    assert words == {row[0] for row in [*FREQUENCIES, *RESTRICTED]} | {row[0] for row in FIELDS}


def test_every_word_tells_what_it_gives() -> None:
    words = {name: word for name, word in inspect.getmembers(Declaration, inspect.isfunction) if name[0] != "_"}

    assert [name for name, word in words.items() if not (word.__doc__ or "").strip()] == []


def test_what_is_not_said_is_left_to_the_settings() -> None:
    task = finished(lambda s: s.hourly())

    assert (task.overlap, task.lock, task.on_every_server) == ("skip", "default", False)
    assert (task.min_break, task.lease, task.limit, task.catch_up) == (None, None, None, None)
    assert (task.environments, task.servers, task.filters) == ((), (), ())


def test_the_order_of_the_words_changes_nothing() -> None:
    schedule.command("a").name("one").timezone("Asia/Tokyo").at("3:00").weekdays().daily().between("1:00", "4:00")
    schedule.command("a").name("two").between("1:00", "4:00").daily().weekdays().at("3:00").timezone("Asia/Tokyo")

    assert registry.tasks["one"].timetable.text == registry.tasks["two"].timetable.text


def test_a_task_without_a_zone_follows_the_zone_of_the_settings(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"TIME_ZONE": "Asia/Tokyo"}
    assert due_times(finished(lambda s: s.daily_at("3:00")), 1) == [datetime(2030, 1, 2, 18, tzinfo=UTC)]


def test_a_task_without_a_zone_follows_djangos_time_zone_where_ours_is_not_set(settings: Any) -> None:
    settings.TIME_ZONE = "Asia/Tokyo"
    assert due_times(finished(lambda s: s.daily_at("3:00")), 1) == [datetime(2030, 1, 2, 18, tzinfo=UTC)]


# What is wrong, and the parts of the message that tell of it: what is wrong, and what to write instead.
WRONG: list[tuple[Say, tuple[str, ...]]] = [
    (lambda s: s, ("no frequency", "parentheses forgotten", ".hourly()")),
    (lambda s: s.weekdays(), ("no frequency",)),
    (lambda s: s.hourly, ("no frequency", "parentheses forgotten")),
    (lambda s: s.hourly().daily(), ("two frequencies", ".hourly() and .daily()")),
    (lambda s: s.every_minute().cron("* * * * *"), ("two frequencies", ".every_minute() and .cron()")),
    (lambda s: s.hourly().hourly(), (".hourly() is said twice",)),
    (lambda s: s.hourly().weekdays().weekdays(), (".weekdays() is said twice",)),
    (lambda s: s.hourly().name("other").name("again"), (".name() is said twice",)),
    (lambda s: s.hourly().between("8:00", "9:00").between("10:00", "11:00"), (".between() is said twice",)),
    (lambda s: s.cron("61 * * * *"), (".cron()", "61")),
    (lambda s: s.cron("* * *"), (".cron()",)),
    (lambda s: s.cron("* * * * * *"), (".cron()",)),
    (lambda s: s.cron(5), (".cron()", "five fields")),  # type: ignore[arg-type]
    (lambda s: s.every(5), ("every(5)", "no unit", "every(minutes=5)")),  # type: ignore[arg-type]
    (lambda s: s.every("5m"), ("every('5m')", "timedelta")),  # type: ignore[arg-type]
    (lambda s: s.every(), ("every()", "no time")),
    (lambda s: s.every(minutes=-5), ("every()", "-1 day")),
    (lambda s: s.every(minutes="5"), ("minutes='5'", "not a number")),  # type: ignore[arg-type]
    (lambda s: s.every(timedelta(hours=1), minutes=5), ("a timedelta and units",)),
    (lambda s: s.every(hours=25), ("more than a day", ".weekly()")),
    (lambda s: s.every(seconds=1.5), ("whole seconds",)),
    (lambda s: s.every(seconds=float("nan")), (".every()",)),
    (lambda s: s.every(hours=1e300), (".every()",)),
    (lambda s: s.hourly_at(60), (".hourly_at()", "60", "0 to 59")),
    (lambda s: s.hourly_at("10"), (".hourly_at()", '"*/10"')),
    (lambda s: s.hourly_at([]), (".hourly_at()", "no minute")),
    (lambda s: s.hourly_at(True), (".hourly_at()", "True")),
    (lambda s: s.every_two_hours(at="*/0"), (".every_two_hours()", "*/0")),
    (lambda s: s.daily_at("25:00"), ("'25:00' is no time of day", '"23:59"')),
    (lambda s: s.daily_at("24:00"), ("'24:00' is no time of day",)),
    (lambda s: s.daily_at("8:60"), ("'8:60' is no time of day",)),
    (lambda s: s.daily_at("8"), ("'8' is no time of day",)),
    (lambda s: s.daily_at("8:00:00"), ("'8:00:00' is no time of day",)),
    (lambda s: s.daily_at("٨:٠٠"), ("is no time of day",)),
    (lambda s: s.daily_at(8), ("8 is no time of day",)),  # type: ignore[arg-type]
    (lambda s: s.daily_at("8:00").at("9:00"), ("two times of day",)),
    (lambda s: s.at("9:00").weekly_on("monday", "8:00"), ("two times of day",)),
    (lambda s: s.hourly().at("9:00"), (".at()", ".hourly()", ".daily().at(")),
    (lambda s: s.at("9:00").cron("* * * * *"), (".at()", ".cron()")),
    (lambda s: s.twice_daily().at("9:00"), (".at()", ".twice_daily()")),
    (lambda s: s.every(hours=1).at("9:00"), (".at()", ".every()")),
    (lambda s: s.twice_daily(1, 1), ("the same hour twice",)),
    (lambda s: s.twice_daily(1, 24), (".twice_daily()", "24", "0 to 23")),
    (lambda s: s.twice_daily_at(1, 13, 60), (".twice_daily_at()", "60")),
    (lambda s: s.weekly_on("moonday"), ("'moonday' is no day", "'monday'")),  # type: ignore[arg-type]
    (lambda s: s.weekly_on("mon"), ("'mon' is no day", "'monday'")),  # type: ignore[arg-type]
    (lambda s: s.weekly_on(1), ("1 is no day", "cron and in Python", '"monday"')),  # type: ignore[arg-type]
    (lambda s: s.hourly().days(1, 2), ("1 is no day", '"monday"')),  # type: ignore[arg-type]
    (lambda s: s.hourly().days(), ("names no day",)),
    (lambda s: s.daily().mondays().tuesdays(), (".tuesdays()", "an and", ".days(")),
    (lambda s: s.weekly().weekdays(), (".weekly()", "one day a week", ".daily()")),
    (lambda s: s.weekly_on("monday").tuesdays(), ("never run",)),
    (lambda s: s.monthly_on(32), (".monthly_on()", "32", "last_day_of_month")),
    (lambda s: s.monthly_on("4"), (".monthly_on()", "'4'")),  # type: ignore[arg-type]
    (lambda s: s.days_of_month(), ("no day",)),
    (lambda s: s.days_of_month(3, 3), ("a day twice",)),
    (lambda s: s.yearly_on(13, 1), (".yearly_on()", "13", "1 to 12")),
    (lambda s: s.hourly().between("8:00", "8:00"), ("starts where it ends",)),
    (lambda s: s.hourly().between("8:00", "24:00"), ("'24:00' is no time of day",)),
    (lambda s: s.hourly().between("8:00"), (".between()", "'end'", "(start, end)")),  # type: ignore[call-arg]
    (lambda s: s.every_five_minute(), ("no word .every_five_minute.", "Did you mean .every_five_minutes()?")),  # type: ignore[attr-defined]
    (lambda s: s.hourly().qqqqqqqqqqqq(), ("no word .qqqqqqqqqqqq.", "README")),  # type: ignore[attr-defined]
    (lambda s: s.hourly("9:00"), (".hourly()", "too many")),  # type: ignore[call-arg]
    (lambda s: s.daily_at(hour=3), (".daily_at()", "(time)")),  # type: ignore[call-arg]
    (lambda s: s.hourly().timezone("Europe/Berln"), ("'Europe/Berln' is no time zone", "'Europe/Berlin'")),
    (lambda s: s.hourly().timezone("+02:00"), ("no time zone", "Europe/Berlin")),
    (lambda s: s.hourly().timezone("../etc/passwd"), ("no time zone",)),
    (lambda s: s.hourly().timezone(None), ("None is no time zone",)),  # type: ignore[arg-type]
    (lambda s: s.hourly().when(is_open()), ("was decided when the module was imported", "without calling it")),  # type: ignore[arg-type]
    (lambda s: s.hourly().skip("is_open"), (".skip('is_open')", "dotted path")),
    (lambda s: s.hourly().environments(), (".environments() names none",)),
    (lambda s: s.hourly().environments("", "x"), (".environments()", "''")),
    (lambda s: s.hourly().only_on(None), (".only_on()", "None")),  # type: ignore[arg-type]
    (lambda s: s.hourly().overlap("alow"), ("'alow'", "'allow'")),  # type: ignore[arg-type]
    (lambda s: s.hourly().overlap("queue"), ("'queue'", "'queue_one'")),  # type: ignore[arg-type]
    (lambda s: s.hourly().overlap(True), ("True", "'skip', 'allow', 'queue_one', 'cancel_other'")),  # type: ignore[arg-type]
    (lambda s: s.hourly().jitter(60), ("jitter(60)", "no unit", "minutes=60")),  # type: ignore[arg-type]
    (lambda s: s.hourly().jitter(), (".jitter()", "no time")),
    (lambda s: s.hourly().jitter(minutes=60), (".jitter()", "1:00:00 is not under its period", "shorter")),
    (lambda s: s.hourly().retry(0), (".retry(0)", "1 to 20")),
    (lambda s: s.hourly().retry(21), (".retry(21)", "1 to 20")),
    (lambda s: s.hourly().retry(True), (".retry(True)", "1 to 20")),
    (lambda s: s.hourly().retry(3, backoff=60), ("backoff=60", "no unit", "timedelta")),  # type: ignore[arg-type]
    (lambda s: s.every_minute().retry(3), (".retry()", "0:01:00 is not under its period", "backoff shorter")),
    (lambda s: s.hourly().on_crash("retry"), (".on_crash('retry')", "'rerun'")),  # type: ignore[arg-type]
    (lambda s: s.hourly().on_crash("rerun").overlap("allow"), ('.on_crash("rerun") contradicts .overlap("allow")',)),
    (lambda s: s.hourly().without_overlapping().overlap("allow"), ("contradicts",)),
    (lambda s: s.hourly().overlap("allow").without_overlapping(), ("contradicts",)),
    (lambda s: s.hourly().without_overlapping(min_break=60), ("min_break=60", "no unit", "timedelta")),  # type: ignore[arg-type]
    (lambda s: s.hourly().without_overlapping(lease=60), ("lease=60", "no unit", "timedelta")),  # type: ignore[arg-type]
    (lambda s: s.hourly().without_overlapping(timedelta(1)), (".without_overlapping()", "positional")),  # type: ignore[call-arg]
    (lambda s: s.hourly().without_overlapping(min_break=timedelta(hours=1)), ("min_break=1:00:00", "period")),
    (lambda s: s.every_ten_seconds().without_overlapping(min_break=timedelta(seconds=10)), ("min_break", "period")),
    (lambda s: s.hourly().without_overlapping(lease=timedelta(seconds=20)), ("lease=0:00:20", "HEARTBEAT")),
    (lambda s: s.hourly().lock_with("cashe"), ("'cashe'", "LOCKS", "'default'")),
    (lambda s: s.hourly().ensure_finished(30), ("ensure_finished(30)", "no unit", "minutes=30")),  # type: ignore[arg-type]
    (lambda s: s.hourly().ensure_finished(), (".ensure_finished()", "no time")),
    (lambda s: s.hourly().ensure_finished(minutes=0), (".ensure_finished()", "no time")),
    (lambda s: s.hourly().catch_up(), (".catch_up()", "no answer", "within=timedelta")),
    (lambda s: s.hourly().catch_up(within=3600), ("within=3600", "no unit")),  # type: ignore[arg-type]
    (lambda s: s.hourly().catch_up(within=timedelta(1), all=True), ("two answers",)),
    (lambda s: s.hourly().catch_up(all=True).no_catch_up(), (".no_catch_up() contradicts .catch_up()",)),
    (lambda s: s.hourly().no_catch_up().catch_up(all=True), (".catch_up() contradicts .no_catch_up()",)),
    (lambda s: s.hourly().after(is_open()), (".after(True)", "without calling it", ".after(notify)")),  # type: ignore[arg-type]
    (lambda s: s.hourly().on_failure("notify"), (".on_failure('notify')", "dotted path")),
    (lambda s: s.hourly().before("shop tell.me"), (".before('shop tell.me')", "dotted path")),
    (lambda s: s.hourly().then_ping("ftp://a/b"), (".then_ping()", "'ftp'", "http or https")),
    (lambda s: s.hourly().then_ping("example.com/a"), (".then_ping()", "http or https", '"https://')),
    (lambda s: s.hourly().ping_before("https:///a"), (".ping_before()", "without a host")),
    (lambda s: s.hourly().ping_before("https://[::1/a"), (".ping_before()", "https://")),
    (lambda s: s.hourly().ping_before("https://a:port/"), (".ping_before()", "https://")),
    (lambda s: s.hourly().ping_on_success("https://a/b c"), (".ping_on_success()", "percent-encoded")),
    (lambda s: s.hourly().ping_on_success("https://a/\r\nb"), (".ping_on_success()", "percent-encoded")),
    (lambda s: s.hourly().ping_on_success("https://ä/"), (".ping_on_success()", "percent-encoded")),
    (lambda s: s.hourly().ping_on_failure(None), (".ping_on_failure()", "NoneType")),  # type: ignore[arg-type]
    (lambda s: s.hourly().send_output_to(""), (".send_output_to('') is not a path",)),
    (lambda s: s.hourly().send_output_to(b"a"), (".send_output_to(b'a') is not a path",)),  # type: ignore[arg-type]
    (lambda s: s.hourly().append_output_to("/var/log/"), ("is a folder", "/var/log/nightly.log")),
    (lambda s: s.hourly().send_output_to("a").append_output_to("a"), (".append_output_to() contradicts",)),
    (lambda s: s.hourly().append_output_to("a").send_output_to("a"), (".send_output_to() contradicts",)),
    (lambda s: s.hourly().email_output_to(), (".email_output_to() names none",)),
    (lambda s: s.hourly().email_output_to("ops"), (".email_output_to()", "'ops' is no address")),
    (lambda s: s.hourly().email_output_on_failure("a@b\nBcc: c@d"), (".email_output_on_failure()", "no address")),
]


@pytest.mark.parametrize(("say", "parts"), WRONG, ids=[" ".join(row[1]) for row in WRONG])
def test_a_wrong_word_is_told_where_it_is_what_is_wrong_and_what_to_write(say: Say, parts: tuple[str, ...]) -> None:
    message = refused(say)

    assert [part for part in (*parts, f"{Path(__file__)}:", "'the.task'") if part not in message] == []


def test_what_is_wrong_with_an_address_is_told_without_repeating_its_secrets() -> None:
    for url in (
        "ftp://me:secret@a/?key=secret",
        "https://me:secret@a/ ?key=secret",
        "https://me:secret@a:x/?key=secret",
    ):
        registry._clear()
        assert "secret" not in refused(lambda s, url=url: s.hourly().then_ping(url))  # type: ignore[misc]


def test_the_message_names_the_line_of_the_declaration() -> None:
    line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
    one = schedule.command("clearsessions").name("shop.clear")
    with pytest.raises(DeclarationError, match=rf"^{Path(__file__)}:{line}: task 'shop.clear': '25:00' is no time"):
        one.daily_at("25:00")


def test_a_lock_of_the_settings_may_be_named(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": {"BACKEND": "shop.locks.CacheLock"}}}

    assert finished(lambda s: s.hourly().lock_with("cache")).lock == "cache"


def test_nothing_can_be_said_of_a_task_that_is_complete() -> None:
    one = schedule.command("clearsessions").hourly()
    assert list(registry.tasks) == ["tests.clearsessions"]

    with pytest.raises(DeclarationError, match="comes after its module was imported"):
        one.weekdays()


def test_the_longest_break_under_the_period_is_taken() -> None:
    task = finished(lambda s: s.every_ten_seconds().without_overlapping(min_break=timedelta(seconds=9)))

    assert task.min_break == timedelta(seconds=9)
