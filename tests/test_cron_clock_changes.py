"""
Clock changes, one line for each case. The expectations are worked out by hand from cron(8), never from the code:

- a job at a fixed time runs once in a repeated hour, and right after a gap of less than three hours;
- a job whose minute or hour starts with ``*`` follows the clock;
- a change of three hours or more is a correction, and nothing is caught up.

All times are UTC. The comment says what the wall clock does.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, time, timedelta, timezone, tzinfo

import pytest

from multiserver_schedule import cron as module
from multiserver_schedule.cron import Cron, Every, Timetable, Window

NEW_YORK, BERLIN, LORD_HOWE = "America/New_York", "Europe/Berlin", "Australia/Lord_Howe"
SAO_PAULO, TEHRAN, CASABLANCA = "America/Sao_Paulo", "Asia/Tehran", "Africa/Casablanca"
DUBLIN, APIA, CASEY, TROLL = "Europe/Dublin", "Pacific/Apia", "Antarctica/Casey", "Antarctica/Troll"

CASES = [
    # New York, 10 March 2024: 02:00 becomes 03:00 at 07:00.
    (NEW_YORK, "30 2 * * *", "2024-03-10 00:00", "2024-03-11 12:00", "10T07:00 11T06:30"),
    (NEW_YORK, "0,30 2 * * *", "2024-03-10 00:00", "2024-03-11 12:00", "10T07:00 11T06:00 11T06:30"),
    (NEW_YORK, "0 3 * * *", "2024-03-10 00:00", "2024-03-11 12:00", "10T07:00 11T07:00"),
    (NEW_YORK, "0 2-3 * * *", "2024-03-10 00:00", "2024-03-11 12:00", "10T07:00 11T06:00 11T07:00"),
    (NEW_YORK, "30 2 10 3 *", "2024-03-01 00:00", "2024-03-31 00:00", "10T07:00"),
    (NEW_YORK, "30 2 * * 0", "2024-03-04 00:00", "2024-03-18 00:00", "10T07:00 17T06:30"),
    (NEW_YORK, "15 0-23 * * *", "2024-03-10 05:00", "2024-03-10 09:00", "10T05:15 10T06:15 10T07:00 10T07:15 10T08:15"),
    (NEW_YORK, "* 2 * * *", "2024-03-10 00:00", "2024-03-10 23:00", ""),
    (NEW_YORK, "*/30 2 * * *", "2024-03-10 00:00", "2024-03-11 06:15", "11T06:00"),
    (NEW_YORK, "30 */2 * * *", "2024-03-10 05:00", "2024-03-10 12:00", "10T05:30 10T08:30 10T10:30"),
    (NEW_YORK, "0 */3 * * *", "2024-03-10 04:00", "2024-03-10 12:00", "10T05:00 10T07:00 10T10:00"),
    (NEW_YORK, "0 * * * *", "2024-03-10 05:00", "2024-03-10 09:00", "10T06:00 10T07:00 10T08:00 10T09:00"),
    (NEW_YORK, "30 * * * *", "2024-03-10 05:00", "2024-03-10 09:00", "10T05:30 10T06:30 10T07:30 10T08:30"),
    # New York, 3 November 2024: 02:00 becomes 01:00 at 06:00.
    (NEW_YORK, "30 1 * * *", "2024-11-03 00:00", "2024-11-04 12:00", "03T05:30 04T06:30"),
    (NEW_YORK, "0 1-2 * * *", "2024-11-03 00:00", "2024-11-03 23:00", "03T05:00 03T07:00"),
    (NEW_YORK, "59 1 * * *", "2024-11-03 00:00", "2024-11-03 23:00", "03T05:59"),
    (NEW_YORK, "0 2 * * *", "2024-11-03 00:00", "2024-11-03 23:00", "03T07:00"),
    (NEW_YORK, "30 * * * *", "2024-11-03 04:00", "2024-11-03 08:00", "03T04:30 03T05:30 03T06:30 03T07:30"),
    (NEW_YORK, "*/30 1 * * *", "2024-11-03 00:00", "2024-11-03 23:00", "03T05:00 03T05:30 03T06:00 03T06:30"),
    (NEW_YORK, "15 0-23 * * *", "2024-11-03 04:00", "2024-11-03 08:00", "03T04:15 03T05:15 03T07:15"),
    # Berlin, 31 March 2024: 02:00 becomes 03:00 at 01:00; 27 October: 03:00 becomes 02:00 at 01:00.
    (BERLIN, "30 2 * * *", "2024-03-31 00:00", "2024-04-01 12:00", "03-31T01:00 04-01T00:30"),
    (BERLIN, "* 2 * * *", "2024-03-31 00:00", "2024-03-31 23:00", ""),
    (BERLIN, "*/20 * * * *", "2024-03-31 00:30", "2024-03-31 01:30", "31T00:40 31T01:00 31T01:20"),
    (BERLIN, "30 2 * * *", "2024-10-27 00:00", "2024-10-28 12:00", "27T00:30 28T01:30"),
    (BERLIN, "30 */2 * * *", "2024-10-26 23:00", "2024-10-27 04:00", "27T00:30 27T01:30 27T03:30"),
    (BERLIN, "0 3 * * *", "2024-10-27 00:00", "2024-10-27 23:00", "27T02:00"),
    # Lord Howe, 6 October 2024: 02:00 becomes 02:30 at 15:30; 7 April: 02:00 becomes 01:30 at 15:00.
    (LORD_HOWE, "15 2 * * *", "2024-10-05 00:00", "2024-10-07 00:00", "05T15:30 06T15:15"),
    (LORD_HOWE, "15 * * * *", "2024-10-05 14:00", "2024-10-05 17:00", "05T14:45 05T16:15"),
    (LORD_HOWE, "*/10 * * * *", "2024-10-05 15:10", "2024-10-05 15:50", "05T15:20 05T15:30 05T15:40 05T15:50"),
    (LORD_HOWE, "45 1 * * *", "2024-04-06 00:00", "2024-04-08 00:00", "06T14:45 07T15:15"),
    (LORD_HOWE, "45 * * * *", "2024-04-06 13:00", "2024-04-06 17:00", "06T13:45 06T14:45 06T15:15 06T16:15"),
    (LORD_HOWE, "30 * * * *", "2024-04-06 14:00", "2024-04-06 16:30", "06T14:30 06T15:00 06T16:00"),
    (
        LORD_HOWE,
        "*/20 0-3 * * *",
        "2024-04-06 14:00",
        "2024-04-06 16:00",
        "06T14:20 06T14:40 06T15:10 06T15:30 06T15:50",
    ),
    # São Paulo, 4 November 2018: 00:00 becomes 01:00 at 03:00; 18 February: 00:00 becomes 23:00 at 02:00.
    (SAO_PAULO, "0 0 * * *", "2018-11-03 00:00", "2018-11-05 12:00", "03T03:00 04T03:00 05T02:00"),
    (SAO_PAULO, "30 0 * * 0", "2018-11-01 00:00", "2018-11-08 00:00", "04T03:00"),
    (SAO_PAULO, "*/15 0 * * *", "2018-11-04 00:00", "2018-11-04 12:00", ""),
    (SAO_PAULO, "0 * * * *", "2018-11-04 01:00", "2018-11-04 05:00", "04T02:00 04T03:00 04T04:00 04T05:00"),
    (SAO_PAULO, "30 23 * * *", "2018-02-17 12:00", "2018-02-19 12:00", "18T01:30 19T02:30"),
    (SAO_PAULO, "0 0 18 * *", "2018-02-01 00:00", "2018-03-01 00:00", "18T03:00"),
    (SAO_PAULO, "30 * * * *", "2018-02-18 00:00", "2018-02-18 04:00", "18T00:30 18T01:30 18T02:30 18T03:30"),
    # Tehran, 22 March 2022: 00:00 becomes 01:00 at 20:30; 22 September: 00:00 becomes 23:00 at 19:30; not since.
    (TEHRAN, "30 0 * * *", "2022-03-21 00:00", "2022-03-23 00:00", "21T20:30 22T20:00"),
    (TEHRAN, "*/30 0 * * *", "2022-03-21 00:00", "2022-03-22 12:00", ""),
    (TEHRAN, "30 23 * * *", "2022-09-21 00:00", "2022-09-23 00:00", "21T19:00 22T20:00"),
    (TEHRAN, "30 * * * *", "2022-09-21 18:00", "2022-09-21 21:00", "21T19:00 21T20:00 21T21:00"),
    (TEHRAN, "30 0 * * *", "2023-03-21 00:00", "2023-03-23 00:00", "21T21:00 22T21:00"),
    # Casablanca, Ramadan 2024: 10 March, 03:00 becomes 02:00 at 02:00; 14 April, 02:00 becomes 03:00 at 02:00.
    (CASABLANCA, "30 2 * * *", "2024-03-10 00:00", "2024-03-11 12:00", "10T01:30 11T02:30"),
    (CASABLANCA, "*/30 2 * * *", "2024-03-10 00:00", "2024-03-10 12:00", "10T01:00 10T01:30 10T02:00 10T02:30"),
    (CASABLANCA, "30 2 * * *", "2024-04-14 00:00", "2024-04-15 12:00", "14T02:00 15T01:30"),
    (CASABLANCA, "30 */2 * * *", "2024-04-13 23:00", "2024-04-14 06:00", "14T00:30 14T03:30 14T05:30"),
    # Dublin, where winter is the exception by law: 31 March 2024, 01:00 becomes 02:00 at 01:00; 27 October back.
    (DUBLIN, "30 1 * * *", "2024-03-31 00:00", "2024-04-01 12:00", "03-31T01:00 04-01T00:30"),
    (DUBLIN, "* 1 * * *", "2024-03-31 00:00", "2024-03-31 12:00", ""),
    (DUBLIN, "30 1 * * *", "2024-10-27 00:00", "2024-10-28 12:00", "27T00:30 28T01:30"),
    (DUBLIN, "30 * * * *", "2024-10-26 23:00", "2024-10-27 02:00", "26T23:30 27T00:30 27T01:30"),
    # Apia, 30 December 2011, which was no day there: midnight of the 29th became that of the 31st at 10:00.
    (APIA, "0 12 * * *", "2011-12-29 12:00", "2011-12-31 12:00", "29T22:00 30T22:00"),
    (APIA, "0 0 30 12 *", "2011-12-01 00:00", "2012-02-01 00:00", ""),
    (APIA, "0 0 31 12 *", "2011-12-01 00:00", "2012-02-01 00:00", "12-30T10:00"),
    (APIA, "0 * * * *", "2011-12-30 08:00", "2011-12-30 11:00", "30T09:00 30T10:00 30T11:00"),
    (APIA, "0 */12 * * *", "2011-12-29 12:00", "2011-12-31 00:00", "29T22:00 30T10:00 30T22:00"),
    # Troll, 31 March 2024: 01:00 becomes 03:00 at 01:00, a gap of two hours; 27 October: 03:00 becomes 01:00 at 01:00.
    (TROLL, "30 1,2 * * *", "2024-03-31 00:00", "2024-03-31 23:00", "31T01:00"),
    (TROLL, "30 1 * * *", "2024-10-26 12:00", "2024-10-28 12:00", "26T23:30 28T01:30"),
    (TROLL, "30 * * * *", "2024-10-26 23:00", "2024-10-27 02:00", "26T23:30 27T00:30 27T01:30"),
    # Casey, 18 October 2009: 02:00 became 05:00 at 18:00, three hours and so a correction;
    # 5 March 2010: 02:00 became 23:00 at 15:00, which cron's source (not its manual) still takes for a small change.
    (CASEY, "30 3 * * *", "2009-10-17 12:00", "2009-10-19 00:00", "18T16:30"),
    (CASEY, "30 0 * * *", "2010-03-04 00:00", "2010-03-06 00:00", "04T13:30 05T16:30"),
    # Kathmandu, 1 January 1986: 00:00 became 00:15. Monrovia, 7 January 1972: 00:00:00 became 00:44:30.
    ("Asia/Kathmandu", "10 0 * * *", "1985-12-31 12:00", "1986-01-02 00:00", "1985-12-31T18:30 1986-01-01T18:25"),
    ("Africa/Monrovia", "0 0 * * *", "1972-01-06 12:00", "1972-01-08 12:00", "07T00:44:30 08T00:00"),
    # Recife had summer time for seven days: 8 October 2000, 00:00 became 01:00; the 15th, 00:00 became 23:00.
    (
        "America/Recife",
        "0 12 7,8,14,15 * *",
        "2000-10-01 00:00",
        "2000-10-31 00:00",
        "07T15:00 08T14:00 14T14:00 15T15:00",
    ),
    # New Year's Eve: Casablanca 1985, 00:00 became 23:00 at 23:00; São Tomé 2018, 01:00 became 02:00 at 01:00;
    # Kiritimati had no 31 December 1994: midnight of the 30th became that of 1 January at 10:00.
    (CASABLANCA, "30 23 * * *", "1985-12-31 00:00", "1986-01-02 00:00", "1985-12-31T22:30 1986-01-01T23:30"),
    (CASABLANCA, "30 * * * *", "1985-12-31 22:00", "1985-12-31 23:59", "31T22:30 31T23:30"),
    ("Africa/Sao_Tome", "30 1 * * *", "2018-01-01 00:00", "2018-01-02 12:00", "01T01:00 02T00:30"),
    ("Pacific/Kiritimati", "0 12 * * *", "1994-12-30 12:00", "1995-01-01 12:00", "1994-12-30T22:00 1994-12-31T22:00"),
    # Nothing happens where there are no clock changes.
    ("UTC", "30 2 * * *", "2024-03-30 00:00", "2024-04-01 00:00", "30T02:30 31T02:30"),
    ("Asia/Kolkata", "30 2 * * *", "2024-03-30 00:00", "2024-03-31 22:00", "30T21:00 31T21:00"),
]


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc)


def due_times(after: str, until: str, short: str) -> list[datetime]:
    """Complete ``30T01:00`` or ``03-30T01:00`` from the beginning of the window."""
    found = []
    for word in short.split():
        missing = 10 - word.index("T")
        found.append(utc(after[:missing] + word))
        assert utc(after) < found[-1] <= utc(until), "the case itself is wrong"
    return found


Case = tuple[Cron, datetime, datetime, list[datetime]]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].split('/')[-1]}, {case[1]}, {case[2][:10]}")
def case(request: pytest.FixtureRequest) -> Case:
    zone, expression, after, until, expected = request.param
    return Cron(expression, zone), utc(after), utc(until), due_times(after, until, expected)


def test_due_times_around_a_clock_change_are_those_of_cron(case: Case) -> None:
    cron, after, until, expected = case
    assert cron.between(after, until) == expected
    assert cron.count(after, until) == len(expected)


def test_the_next_due_time_walks_over_a_clock_change(case: Case) -> None:
    cron, after, until, expected = case
    walked = []
    moment = cron.next(after)
    while moment is not None and moment <= until:
        walked.append(moment)
        moment = cron.next(moment)
    assert walked == expected


def test_the_latest_due_time_is_right_at_each_second_around_a_due_time(case: Case) -> None:
    cron, after, until, expected = case
    assert cron.latest(until, after=after) == (expected[-1] if expected else None)
    for before, due in zip([None, *expected], expected, strict=False):
        assert cron.latest(due, after=after) == due
        assert cron.latest(due + timedelta(milliseconds=999), after=after) == due
        assert cron.latest(due - timedelta(microseconds=1), after=after) == before
        assert cron.latest(due, after=due) is None


def test_a_daily_job_in_the_repeated_hour_runs_once() -> None:
    cron = Cron("30 1 * * *", NEW_YORK)
    assert cron.between(utc("2024-11-03 00:00"), utc("2024-11-04 00:00")) == [utc("2024-11-03 05:30")]


def test_a_job_in_the_repeated_hour_is_not_due_to_a_server_that_asks_in_between() -> None:
    """A stateless question in the second 01:00-02:00 must not find 01:30 again."""
    cron = Cron("30 1 * * *", NEW_YORK)
    for minute in range(60):
        asked = utc("2024-11-03 06:00") + timedelta(minutes=minute)
        assert cron.latest(asked + timedelta(minutes=1), after=asked) is None
        assert cron.next(asked) == utc("2024-11-04 06:30")


class Changing(tzinfo):
    """A zone with one clock change, for what no real zone has done yet."""

    def __init__(self, change: datetime, before: int, behind: int) -> None:
        self.change, self.before, self.behind = change.replace(tzinfo=None), before, behind

    def fromutc(self, moment: datetime) -> datetime:
        naive = moment.replace(tzinfo=None)
        offset = timedelta(minutes=self.behind if naive >= self.change else self.before)
        return (naive + offset).replace(tzinfo=timezone(offset))


@pytest.fixture
def changing(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tzinfo]]:
    zones: dict[str, tzinfo] = {}
    monkeypatch.setattr(module, "_zone", zones.__getitem__)
    yield zones
    module._pieces_of_year.cache_clear()


def test_an_hour_repeated_across_the_turn_of_the_year_is_remembered(changing: dict[str, tzinfo]) -> None:
    """A zone is cut into pieces by the year of UTC; what the last evening had reached is still known then."""
    changing["Test/Eve"] = Changing(utc("2030-12-31 23:30"), 60, 0)  # 00:30 becomes 23:30
    window = utc("2030-12-31 22:00"), utc("2031-01-02 12:00")
    assert Cron("15 0 * * *", "Test/Eve").between(*window) == [utc("2030-12-31 23:15"), utc("2031-01-02 00:15")]
    assert Cron("15 * * * *", "Test/Eve").between(window[0], utc("2031-01-01 01:30")) == [
        utc(at) for at in ("2030-12-31 22:15", "2030-12-31 23:15", "2031-01-01 00:15", "2031-01-01 01:15")
    ]


@pytest.mark.parametrize("lost", [30, 60, 179, 180])
def test_a_gap_at_the_very_turn_of_the_year_is_caught_up_when_it_is_under_three_hours(
    changing: dict[str, tzinfo], lost: int
) -> None:
    changing[f"Test/Turn{lost}"] = Changing(utc("2031-01-01 00:00"), 0, lost)
    found = Cron("10 0 * * *", f"Test/Turn{lost}").between(utc("2030-12-31 12:00"), utc("2031-01-01 12:00"))
    assert found == ([utc("2031-01-01 00:00")] if lost < 180 else [])


@pytest.mark.parametrize("won", [30, 60, 180, 181])
def test_a_repetition_of_more_than_three_hours_is_a_correction(changing: dict[str, tzinfo], won: int) -> None:
    changing[f"Test/Back{won}"] = Changing(utc("2030-06-01 12:00"), won, 0)
    found = Cron("10 12 * * *", f"Test/Back{won}").between(utc("2030-06-01 00:00"), utc("2030-06-01 23:00"))
    first = utc("2030-06-01 12:10") - timedelta(minutes=won)
    assert found == ([first] if won <= 180 else [first, utc("2030-06-01 12:10")])


def test_a_leap_of_the_minute_in_which_two_lines_meet_is_one_due_time() -> None:
    cron = Cron("0,15,30,45 2,3 * * *", NEW_YORK)
    found = cron.between(utc("2024-03-10 06:30"), utc("2024-03-10 07:20"))
    assert found == [utc("2024-03-10 07:00"), utc("2024-03-10 07:15")]


def test_a_postponed_job_is_judged_by_the_hour_at_which_it_is_due() -> None:
    base = Cron("30 2 * * *", BERLIN)
    day = utc("2024-03-31 00:00"), utc("2024-04-01 00:00")
    narrow = Timetable(base, BERLIN, windows=(Window(time(2), time(2, 59)),))
    wide = Timetable(base, BERLIN, windows=(Window(time(2), time(3)),))
    assert narrow.between(*day) == []
    assert narrow.count(*day) == 0
    assert narrow.latest(day[1], after=day[0]) is None
    assert narrow.next(day[0]) == utc("2024-04-01 00:30")
    assert wide.between(*day) == [utc("2024-03-31 01:00")]


def test_a_postponed_job_is_judged_by_the_day_on_which_it_is_due() -> None:
    base = Cron("0 0 * * *", SAO_PAULO)
    sundays = Timetable(base, SAO_PAULO, frozenset({6}))
    mondays = Timetable(base, SAO_PAULO, frozenset({0}))
    window = utc("2018-11-04 00:00"), utc("2018-11-04 23:00")
    assert sundays.between(*window) == [utc("2018-11-04 03:00")]
    assert mondays.between(*window) == []


def test_an_interval_within_hours_uses_both_copies_of_the_repeated_hour() -> None:
    timetable = Timetable(Every(timedelta(minutes=30)), NEW_YORK, windows=(Window(time(1), time(1, 59)),))
    found = timetable.between(utc("2024-11-03 00:00"), utc("2024-11-03 12:00"))
    assert found == [utc(f"2024-11-03 {at}") for at in ("05:00", "05:30", "06:00", "06:30")]
    assert timetable.count(utc("2024-11-03 00:00"), utc("2024-11-03 12:00")) == 4


def test_an_interval_within_hours_that_a_gap_leaves_out_is_not_due_on_that_day() -> None:
    timetable = Timetable(Every(timedelta(minutes=30)), NEW_YORK, windows=(Window(time(2), time(2, 59)),))
    assert timetable.between(utc("2024-03-10 00:00"), utc("2024-03-10 23:00")) == []
    assert timetable.next(utc("2024-03-10 00:00")) == utc("2024-03-11 06:00")


def test_an_interval_without_restrictions_does_not_notice_clock_changes() -> None:
    every = Timetable(Every(timedelta(hours=1)), NEW_YORK)
    assert every.count(utc("2024-01-01 00:00"), utc("2025-01-01 00:00")) == 366 * 24
