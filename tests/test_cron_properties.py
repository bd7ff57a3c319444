"""
What must hold for every schedule, against two naive references written from crontab(5) and cron(8).

``walk`` goes through the minutes of UTC and keeps the highest minute that the wall clock has reached, as cron's main
loop does; ``brute`` tries every multiple of an interval. Neither shares a line with the code.
"""

from __future__ import annotations

import calendar
from collections.abc import Iterator
from datetime import datetime, time, timedelta, timezone
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from multiserver_schedule import cron as module
from multiserver_schedule.cron import Cron, CronError, Every, Timetable, Window

UTC = timezone.utc
MINUTE = timedelta(minutes=1)
LOWS, HIGHS = (0, 0, 1, 1, 0), (59, 23, 31, 12, 6)
MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
DAYS = "sun mon tue wed thu fri sat".split()

# The moments of real clock changes: whole hours, half an hour, fifteen minutes, two and three hours, a day.
CHANGES = [
    ("America/New_York", "2024-03-10T07:00"),
    ("America/New_York", "2024-11-03T06:00"),
    ("Europe/Berlin", "2024-03-31T01:00"),
    ("Europe/Berlin", "2024-10-27T01:00"),
    ("Australia/Lord_Howe", "2024-10-05T15:30"),
    ("Australia/Lord_Howe", "2024-04-06T15:00"),
    ("America/Sao_Paulo", "2018-11-04T03:00"),
    ("America/Sao_Paulo", "2018-02-18T02:00"),
    ("Asia/Tehran", "2022-03-21T20:30"),
    ("Asia/Tehran", "2022-09-21T19:30"),
    ("Africa/Casablanca", "2024-03-10T02:00"),
    ("Africa/Casablanca", "2024-04-14T02:00"),
    ("Africa/Casablanca", "1985-12-31T23:00"),
    ("Europe/Dublin", "2024-10-27T01:00"),
    ("Pacific/Apia", "2011-12-30T10:00"),
    ("Pacific/Kiritimati", "1994-12-31T10:00"),
    ("Antarctica/Troll", "2024-03-31T01:00"),
    ("Antarctica/Casey", "2009-10-17T18:00"),
    ("Antarctica/Casey", "2010-03-04T15:00"),
    ("Asia/Kathmandu", "1985-12-31T18:30"),
    ("Africa/Sao_Tome", "2018-01-01T01:00"),
    ("UTC", "2024-02-29T00:00"),
]


# Expressions.


@st.composite
def numbers(draw: st.DrawFn, position: int) -> tuple[int, str]:
    value = draw(st.integers(LOWS[position], HIGHS[position]))
    names = {3: MONTHS, 4: DAYS}.get(position)
    if names and draw(st.booleans()):
        name = names[value - LOWS[position]]
        return value, draw(st.sampled_from([name, name.upper(), name.title()]))
    if position == 4 and value == 0 and draw(st.booleans()):
        return 7, "7"
    return value, draw(st.sampled_from([str(value), f"{value:02}"]))


@st.composite
def items(draw: st.DrawFn, position: int) -> str:
    value, text = draw(numbers(position))
    if draw(st.booleans()):
        return text
    other, other_text = draw(numbers(position))
    if other < value:
        (value, text), (other, other_text) = (other, other_text), (value, text)
    most = HIGHS[position] - LOWS[position]
    step = draw(st.one_of(st.just(""), st.integers(1, most).map(lambda number: f"/{number}")))
    return f"{text}-{other_text}{step}"


def fields(position: int) -> st.SearchStrategy[str]:
    most = HIGHS[position] - LOWS[position]
    return st.one_of(
        st.just("*"),
        st.integers(1, most).map(lambda step: f"*/{step}"),
        st.lists(items(position), min_size=1, max_size=4).map(",".join),
    )


NTH = st.builds(
    "{}{}".format, st.sampled_from([*DAYS, *"01234567"]), st.sampled_from(["#1", "#2", "#3", "#4", "#5", "L"])
)


@st.composite
def expressions(draw: st.DrawFn) -> str:
    """Draw what we accept: no star beside a restricted day field, and no date that never comes."""
    minute, hour, month = draw(fields(0)), draw(fields(1)), draw(st.one_of(st.just("*"), fields(3)))
    dom, dow = draw(
        st.one_of(
            st.tuples(st.just("*"), st.just("*")),
            st.tuples(st.one_of(fields(2), st.just("L")), st.just("*")),
            st.tuples(st.just("*"), fields(4)),
            st.tuples(st.just("*"), st.lists(NTH, min_size=1, max_size=2).map(",".join)),
            st.tuples(
                st.one_of(st.just("L"), st.lists(items(2), min_size=1, max_size=2).map(",".join)),
                st.lists(items(4), min_size=1, max_size=2).map(",".join),
            ),
        )
    )
    text = f"{minute} {hour} {dom} {month} {dow}"
    try:
        Cron(text)
    except CronError as error:
        assert "never comes" in str(error)  # noqa: PT017 - the only refusal that such a text may meet
        assume(False)
    return text


# The reference, from the manual pages.


def values_of(position: int, text: str) -> set[int]:
    found: set[int] = set()
    for item in text.lower().split(","):
        body, _, step = item.partition("/")
        first, _, last = (f"{LOWS[position]}-{HIGHS[position]}" if body == "*" else body).partition("-")
        names = {3: MONTHS, 4: DAYS}.get(position, [])
        start, stop = (
            names.index(word) + LOWS[position] if word in names else int(word) for word in (first, last or first)
        )
        found |= {value % 7 if position == 4 else value for value in range(start, stop + 1, int(step or 1))}
    return found


class Reference:
    """One crontab line: does a minute of the wall clock match, and is it a wildcard job?"""

    def __init__(self, text: str) -> None:
        self.minute, self.hour, self.dom, self.month, self.dow = text.split()
        self.wild = self.minute.startswith("*") or self.hour.startswith("*")
        self.sets = [
            set() if self.special(position, field) else values_of(position, field)
            for position, field in enumerate(text.split())
        ]
        self.days: dict[tuple[int, int, int], bool] = {}

    @staticmethod
    def special(position: int, field: str) -> bool:
        return (position == 2 and field == "L") or (position == 4 and ("#" in field or "L" in field))

    def matches(self, wall: datetime) -> bool:
        if wall.minute not in self.sets[0] or wall.hour not in self.sets[1] or wall.month not in self.sets[3]:
            return False
        key = (wall.year, wall.month, wall.day)
        if key not in self.days:
            self.days[key] = self.day_matches(wall)
        return self.days[key]

    def day_matches(self, wall: datetime) -> bool:
        length = calendar.monthrange(wall.year, wall.month)[1]
        by_date = wall.day == length if self.dom == "L" else wall.day in self.sets[2]
        today = wall.isoweekday() % 7
        by_weekday = today in self.sets[4]
        if self.special(4, self.dow):
            for item in self.dow.lower().split(","):
                name, number = item.split("#") if "#" in item else (item[:-1], "last")
                weekday = DAYS.index(name) if name in DAYS else int(name) % 7
                nth = wall.day + 7 > length if number == "last" else (wall.day + 6) // 7 == int(number)
                by_weekday = by_weekday or (weekday == today and nth)
        if self.dom.startswith("*") or self.dow.startswith("*"):
            return by_date and by_weekday
        return by_date or by_weekday


def walk(text: str, zone: str, after: datetime, until: datetime) -> list[datetime]:
    """Walk the minutes of UTC as cron's main loop does, from a day before so that the mark is right."""
    line, where, found = Reference(text), ZoneInfo(zone), []
    now = after.replace(second=0, microsecond=0) - timedelta(days=1)
    mark = now.astimezone(where).replace(tzinfo=None)
    while now < until:
        now += MINUTE
        wall = now.astimezone(where).replace(tzinfo=None)
        step = (wall - mark) // MINUTE
        if step == 1 or not -180 < step <= 180:  # the usual minute, or a correction
            due = line.matches(wall)
            mark = wall
        elif step <= 0:  # repeated: only what follows the clock
            due = line.wild and line.matches(wall)
        else:  # a gap: fixed jobs for each minute that was left out, jobs that follow the clock for this one
            left_out = [mark + MINUTE * number for number in range(1, step + 1)]
            due = line.matches(wall) if line.wild else any(line.matches(minute) for minute in left_out)
            mark = wall
        if due and now > after:
            found.append(now)
    return found


def ask_next(schedule: Cron | Every | Timetable, after: datetime, until: datetime) -> Iterator[datetime]:
    due = schedule.next(after)
    while due is not None and due <= until:
        yield due
        due = schedule.next(due)


# Properties.

CHANGE = st.sampled_from(CHANGES).map(lambda pair: (pair[0], datetime.fromisoformat(pair[1]).replace(tzinfo=UTC)))


@settings(max_examples=150, deadline=None)
@given(expressions(), CHANGE, st.integers(60, 1500), st.integers(60, 1500))
def test_due_times_are_those_of_a_walk_over_the_minutes(
    text: str, change: tuple[str, datetime], before: int, behind: int
) -> None:
    zone, moment = change
    after, until = moment - MINUTE * before, moment + MINUTE * behind
    assert Cron(text, zone).between(after, until) == walk(text, zone, after, until)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["*", "0", "30", "0,30", "*/20", "15-45/10"]),
    st.sampled_from(["*", "2", "1-3", "*/2", "0", "23", "1,2", "0-23"]),
    CHANGE,
    st.integers(1, 400),
    st.integers(1, 400),
)
def test_jobs_of_the_night_are_those_of_a_walk_over_the_minutes(
    minute: str, hour: str, change: tuple[str, datetime], before: int, behind: int
) -> None:
    """The same with expressions that meet the clock change more often than chance."""
    zone, moment = change
    after, until = moment - MINUTE * before, moment + MINUTE * behind
    text = f"{minute} {hour} * * *"
    assert Cron(text, zone).between(after, until) == walk(text, zone, after, until)


WINDOWS = st.builds(
    Window,
    st.builds(time, st.integers(0, 23), st.integers(0, 59)),
    st.builds(time, st.integers(0, 23), st.integers(0, 59)),
    st.booleans(),
)
RESTRICTIONS = st.tuples(
    st.one_of(st.just(frozenset(range(7))), st.frozensets(st.integers(0, 6), min_size=1)), st.lists(WINDOWS, max_size=2)
)
INTERVALS = st.one_of(
    st.sampled_from([1, 5, 7, 30, 60, 61, 300, 1800, 3600, 7200, 25200, 86399, 86400]), st.integers(1, 86400)
)


@st.composite
def schedules(draw: st.DrawFn) -> Cron | Every | Timetable:
    zone = draw(CHANGE)[0]
    base = draw(
        st.one_of(
            expressions().map(lambda text: Cron(text, zone)),
            INTERVALS.filter(lambda step: step > 20).map(lambda step: Every(timedelta(seconds=step))),
        )
    )
    if draw(st.booleans()):
        return base
    days, windows = draw(RESTRICTIONS)
    try:
        return Timetable(base, zone, days, tuple(windows))
    except CronError:
        assume(False)
        raise


SOME_MOMENT = CHANGE.flatmap(
    lambda change: st.integers(-200_000, 200_000).map(lambda seconds: change[1] + timedelta(seconds=seconds))
)


@settings(max_examples=150, deadline=None)
@given(schedules(), SOME_MOMENT, st.lists(st.integers(0, 150_000_000_000), min_size=2, max_size=6))
def test_any_cut_of_a_window_gives_the_same_due_times(
    schedule: Cron | Every | Timetable, start: datetime, cuts: list[int]
) -> None:
    ends = [start + timedelta(microseconds=cut) for cut in sorted(cuts)]
    pieces = [due for after, until in pairwise(ends) for due in schedule.between(after, until)]
    assert pieces == schedule.between(ends[0], ends[-1])
    assert pieces == sorted(set(pieces))


@settings(max_examples=150, deadline=None)
@given(schedules(), SOME_MOMENT, st.integers(0, 250_000))
def test_next_latest_and_count_agree_with_between(
    schedule: Cron | Every | Timetable, after: datetime, seconds: int
) -> None:
    until = after + timedelta(seconds=seconds)
    due = schedule.between(after, until)
    assert schedule.count(after, until) == len(due)
    assert schedule.latest(until, after=after) == (due[-1] if due else None)
    following = schedule.next(after)
    assert (following if following is not None and following <= until else None) == (due[0] if due else None)
    assert all(moment.microsecond == 0 and moment.tzinfo is UTC for moment in due)
    for number in {0, 1, len(due) // 2, len(due) - 1} & set(range(len(due))):
        assert schedule.latest(due[number], after=after) == due[number]
        if number:
            assert schedule.next(due[number - 1]) == due[number]
            assert schedule.latest(due[number] - timedelta(microseconds=1), after=after) == due[number - 1]


@settings(max_examples=100, deadline=None)
@given(INTERVALS, CHANGE, RESTRICTIONS, st.integers(0, 200_000), st.integers(0, 200_000))
def test_an_interval_is_due_where_brute_force_finds_it(
    step: int,
    change: tuple[str, datetime],
    restrictions: tuple[frozenset[int], list[Window]],
    before: int,
    behind: int,
) -> None:
    zone, moment = change
    days, windows = restrictions
    scale = 1 if step > 30 else 60
    after, until = moment - timedelta(seconds=before // scale), moment + timedelta(seconds=behind // scale)
    try:
        timetable = Timetable(Every(timedelta(seconds=step)), zone, days, tuple(windows))
    except CronError as error:
        assert "no minute in common" in str(error)  # noqa: PT017
        return
    where, expected = ZoneInfo(zone), []
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    due = epoch + timedelta(seconds=step) * ((after - epoch) // timedelta(seconds=step) + 1)
    while due <= until:
        wall = due.astimezone(where)
        now = wall.time().replace(second=0, microsecond=0)
        if wall.weekday() in days and all(within(window, now) == window.inside for window in windows):
            expected.append(due)
        due += timedelta(seconds=step)
    assert timetable.between(after, until) == expected
    assert timetable.count(after, until) == len(expected)
    assert timetable.latest(until, after=after) == (expected[-1] if expected else None)


def within(window: Window, now: time) -> bool:
    if window.start <= window.end:
        return window.start <= now <= window.end
    return now >= window.start or now <= window.end


@settings(max_examples=60, deadline=None)
@given(expressions(), CHANGE, RESTRICTIONS, st.integers(60, 3000))
def test_a_restricted_expression_is_due_where_both_hold(
    text: str, change: tuple[str, datetime], restrictions: tuple[frozenset[int], list[Window]], minutes: int
) -> None:
    zone, moment = change
    days, windows = restrictions
    after, until = moment - MINUTE * minutes, moment + MINUTE * minutes
    base = Cron(text, zone)
    try:
        timetable = Timetable(base, zone, days, tuple(windows))
    except CronError:
        return
    where = ZoneInfo(zone)
    expected = [
        due
        for due in base.between(after, until)
        if (wall := due.astimezone(where)).weekday() in days
        and all(within(window, wall.time()) == window.inside for window in windows)
    ]
    assert timetable.between(after, until) == expected


@settings(max_examples=300, deadline=None)
@given(expressions())
def test_our_grammar_and_croniter_read_the_same_values(text: str) -> None:
    parts = text.split()
    parsed = module._parsed(Cron(text).expression)
    for position, bits in enumerate(parsed[:5]):
        special = Reference.special(position, parts[position])
        expected = set() if special else values_of(position, parts[position])
        assert {value for value in range(64) if bits >> value & 1} == expected
    assert parsed.last == (parts[2] == "L")
    assert bool(parsed.nth) == Reference.special(4, parts[4])
    Cron(text).check()


@settings(max_examples=300, deadline=None)
@given(expressions())
def test_the_canonical_spelling_is_a_schedule_of_its_own_and_equal_to_the_first(text: str) -> None:
    first = Cron(text, "Europe/Berlin")
    again = Cron(first.expression, "Europe/Berlin")
    assert again == first
    assert again.text == first.text
    assert len(first.expression) <= 256 or len(text) > 200
    written, canonical = text.split(), first.expression.split()
    follows = [any(field.startswith("*") for field in parts[:2]) for parts in (written, canonical)]
    both = [any(field.startswith("*") for field in (parts[2], parts[4])) for parts in (written, canonical)]
    assert follows[0] == follows[1]
    assert both[0] == both[1]


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.text(max_size=30),
        st.text(alphabet="0123456789*/,-#LWHRlwhr?@ \t\nmonjandefri٣\u212a", max_size=30),
        expressions(),
    )
)
def test_any_text_is_either_a_schedule_or_refused_in_one_short_sentence(text: str) -> None:
    try:
        schedule = Cron(text)
    except CronError as error:
        message = str(error)
        assert "Write" in message
        assert len(message) < 420
        assert "\n" not in message
        assert message.isascii()
    else:
        schedule.check()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(list("0123456789*/,- #Lmonfri")), min_size=1, max_size=9).map("".join), st.integers(0, 4)
)
def test_any_field_that_is_accepted_is_read_alike_by_croniter(field: str, position: int) -> None:
    parts = ["0", "0", "*", "*", "*"]
    parts[position] = field
    try:
        schedule = Cron(" ".join(parts))
    except CronError:
        return
    schedule.check()


@settings(max_examples=60, deadline=None)
@given(expressions())
def test_two_due_times_are_never_closer_than_the_shortest_gap(text: str) -> None:
    schedule = Cron(text)
    start = datetime(2024, 1, 1, tzinfo=UTC)
    due = schedule.between(start, start + timedelta(days=70))[:3000]
    gap = schedule.shortest_gap()
    assert gap >= MINUTE
    for one, other in pairwise(due):
        assert other - one >= gap


@pytest.mark.parametrize("year", [1970, 1999, 2000, 2023, 2024, 2098, 2099])
def test_a_whole_year_is_counted_as_brute_force_counts_it(year: int) -> None:
    schedule = Cron("0 0,12 1,13 * *")
    start, end = datetime(year, 1, 1, tzinfo=UTC), datetime(year, 12, 31, 23, 59, tzinfo=UTC)
    assert schedule.count(start, end) == 2 * 24 - 1  # the very first is not after the start
    assert Cron("0 0 L * *").count(start, end) == 12
    days = (end - start).days + 1
    assert Cron("* * * * *").count(start, end) == days * 1440 - 1
