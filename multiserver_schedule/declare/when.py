"""
The words for *when*: exactly one frequency, and restrictions of it in any order.

To add a frequency: a method with ``@word(frequency=True)`` that sets one of ``cron_text`` (five fields), ``day_fields``
(day, month and day of week, for what takes a time of day) or ``interval``. To add a restriction: ``@word()``, and one
of ``restricted_to``, ``windows`` and ``zone``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from datetime import time, timedelta
from typing import TYPE_CHECKING, Final, Literal
from zoneinfo import ZoneInfo, available_timezones

from ..cron import Window
from .draft import known_zone
from .words import Words, word

if TYPE_CHECKING:
    from typing_extensions import Self

Day = Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
Minutes = int | Iterable[int] | str
"""Minutes of the hour: one, several, or a step such as ``"*/10"``."""

DAYS: Final = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
A_DAY: Final = timedelta(days=1)
_TIME: Final = re.compile(r"([0-9]{1,2}):([0-9]{2})")
_STEP: Final = re.compile(r"\*/[0-9]{1,2}")


class Frequencies(Words):
    """How often: one of these for each task."""

    __slots__ = ()

    @word(frequency=True)
    def cron(self, text: str) -> Self:
        """
        Run as five cron fields say: minute, hour, day of month, month, day of week (``"*/5 * * * *"``, ``"@daily"``).

        Seconds are for ``every``. What cron programs disagree on is refused, saying what to write instead.
        """
        if not isinstance(text, str):
            self._fail(f".cron() takes five fields in one text, not {text!r}", 'Write .cron("*/5 * * * *").')
        self._draft.cron_text = text
        return self

    @word(frequency=True)
    def every(
        self,
        interval: timedelta | None = None,
        /,
        *,
        seconds: float = 0,
        minutes: float = 0,
        hours: float = 0,
    ) -> Self:
        """
        Run at this distance, counted from 1970-01-01 00:00 UTC: ``every(minutes=5)`` or a timedelta.

        Whole seconds, at most a day. It follows no clock on the wall; ``daily`` and the rest do.
        """
        given = self._duration("every", interval, seconds=seconds, minutes=minutes, hours=hours)
        if given > A_DAY:
            self._fail(f".every() of {given} is more than a day", "Write .daily(), .weekly() or .cron(…).")
        if given.microseconds:
            self._fail(f".every() of {given} is not a number of whole seconds", "Write .every(seconds=…).")
        return self._repeat(int(given.total_seconds()))

    def _repeat(self, seconds: int) -> Self:
        self._draft.interval = timedelta(seconds=seconds)
        return self

    @word(frequency=True)
    def every_second(self) -> Self:
        """Run every second."""
        return self._repeat(1)

    @word(frequency=True)
    def every_two_seconds(self) -> Self:
        """Run every 2 seconds."""
        return self._repeat(2)

    @word(frequency=True)
    def every_five_seconds(self) -> Self:
        """Run every 5 seconds."""
        return self._repeat(5)

    @word(frequency=True)
    def every_ten_seconds(self) -> Self:
        """Run every 10 seconds."""
        return self._repeat(10)

    @word(frequency=True)
    def every_fifteen_seconds(self) -> Self:
        """Run every 15 seconds."""
        return self._repeat(15)

    @word(frequency=True)
    def every_twenty_seconds(self) -> Self:
        """Run every 20 seconds."""
        return self._repeat(20)

    @word(frequency=True)
    def every_thirty_seconds(self) -> Self:
        """Run every 30 seconds."""
        return self._repeat(30)

    @word(frequency=True)
    def every_minute(self) -> Self:
        """Run every minute."""
        return self._at_minutes("*", "*")

    @word(frequency=True)
    def every_two_minutes(self) -> Self:
        """Run at every even minute."""
        return self._at_minutes("*/2", "*")

    @word(frequency=True)
    def every_three_minutes(self) -> Self:
        """Run every 3 minutes, from the full hour."""
        return self._at_minutes("*/3", "*")

    @word(frequency=True)
    def every_four_minutes(self) -> Self:
        """Run every 4 minutes, from the full hour."""
        return self._at_minutes("*/4", "*")

    @word(frequency=True)
    def every_five_minutes(self) -> Self:
        """Run every 5 minutes, from the full hour."""
        return self._at_minutes("*/5", "*")

    @word(frequency=True)
    def every_ten_minutes(self) -> Self:
        """Run every 10 minutes, from the full hour."""
        return self._at_minutes("*/10", "*")

    @word(frequency=True)
    def every_fifteen_minutes(self) -> Self:
        """Run every quarter of an hour."""
        return self._at_minutes("*/15", "*")

    @word(frequency=True)
    def every_thirty_minutes(self) -> Self:
        """Run at the full and the half hour."""
        return self._at_minutes("*/30", "*")

    @word(frequency=True)
    def hourly(self) -> Self:
        """Run at every full hour."""
        return self._at_minutes("0", "*")

    @word(frequency=True)
    def hourly_at(self, minute: Minutes) -> Self:
        """Run every hour at this minute (0 to 59), at several (``[15, 45]``), or at a step (``"*/10"``)."""
        return self._at_minutes(self._minutes("hourly_at", minute), "*")

    @word(frequency=True)
    def every_odd_hour(self, at: Minutes = 0) -> Self:
        """Run at 1, 3, 5 … 23 o'clock, ``at`` these minutes of the hour."""
        return self._at_minutes(self._minutes("every_odd_hour", at), "1-23/2")

    @word(frequency=True)
    def every_two_hours(self, at: Minutes = 0) -> Self:
        """Run at 0, 2, 4 … 22 o'clock, ``at`` these minutes of the hour."""
        return self._at_minutes(self._minutes("every_two_hours", at), "*/2")

    @word(frequency=True)
    def every_three_hours(self, at: Minutes = 0) -> Self:
        """Run at 0, 3, 6 … 21 o'clock, ``at`` these minutes of the hour."""
        return self._at_minutes(self._minutes("every_three_hours", at), "*/3")

    @word(frequency=True)
    def every_four_hours(self, at: Minutes = 0) -> Self:
        """Run at 0, 4, 8 … 20 o'clock, ``at`` these minutes of the hour."""
        return self._at_minutes(self._minutes("every_four_hours", at), "*/4")

    @word(frequency=True)
    def every_six_hours(self, at: Minutes = 0) -> Self:
        """Run at 0, 6, 12 and 18 o'clock, ``at`` these minutes of the hour."""
        return self._at_minutes(self._minutes("every_six_hours", at), "*/6")

    @word(frequency=True)
    def daily(self) -> Self:
        """Run every day at midnight; ``.at("13:00")`` sets another time."""
        return self._on_days("* * *")

    @word(frequency=True)
    def daily_at(self, time: str) -> Self:
        """Run every day at this time, ``"13:00"``."""
        return self._on_days("* * *", time)

    @word(frequency=True)
    def twice_daily(self, first: int = 1, second: int = 13) -> Self:
        """Run every day at these two hours (0 to 23)."""
        return self._twice_daily("twice_daily", first, second, 0)

    @word(frequency=True)
    def twice_daily_at(self, first: int = 1, second: int = 13, minute: int = 0) -> Self:
        """Run every day at these two hours (0 to 23), at this minute of both (0 to 59)."""
        return self._twice_daily("twice_daily_at", first, second, minute)

    @word(frequency=True)
    def weekly(self) -> Self:
        """Run on Sundays at midnight; ``.mondays()`` and the like name another day, ``.at("13:00")`` another time."""
        return self._on_days("* *")

    @word(frequency=True)
    def weekly_on(self, day: Day, time: str | None = None) -> Self:
        """Run once a week, on this day by its name, at midnight or at this time: ``weekly_on("monday", "8:00")``."""
        self._draft.week_day = self._day(day)
        return self._on_days("* *", time)

    @word(frequency=True)
    def monthly(self) -> Self:
        """Run on the first of each month at midnight; ``.at("13:00")`` sets another time."""
        return self._on_days("1 * *")

    @word(frequency=True)
    def monthly_on(self, day: int = 1, time: str | None = None) -> Self:
        """Run on this day of each month (1 to 31; a month that has none is left out), at midnight or at this time."""
        return self._on_days(f"{self._number('monthly_on', 'day', day, 1, 31)} * *", time)

    @word(frequency=True)
    def twice_monthly(self, first: int = 1, second: int = 16, time: str | None = None) -> Self:
        """Run on these two days of each month, at midnight or at this time."""
        return self._on_days(f"{self._days_of_month('twice_monthly', (first, second))} * *", time)

    @word(frequency=True)
    def last_day_of_month(self, time: str | None = None) -> Self:
        """Run on the last day of each month, at midnight or at this time."""
        return self._on_days("L * *", time)

    @word(frequency=True)
    def days_of_month(self, *days: int) -> Self:
        """Run on these days of each month at midnight; ``.at("13:00")`` sets another time."""
        if not days:
            self._fail(".days_of_month() names no day", "Write .days_of_month(1, 10, 20).")
        return self._on_days(f"{self._days_of_month('days_of_month', days)} * *")

    @word(frequency=True)
    def quarterly(self) -> Self:
        """Run on the first of January, April, July and October at midnight; ``.at("13:00")`` sets another time."""
        return self._on_days("1 1-12/3 *")

    @word(frequency=True)
    def quarterly_on(self, day: int = 1, time: str | None = None) -> Self:
        """Run on this day (1 to 31) of January, April, July and October, at midnight or at this time."""
        return self._on_days(f"{self._number('quarterly_on', 'day', day, 1, 31)} 1-12/3 *", time)

    @word(frequency=True)
    def yearly(self) -> Self:
        """Run on the first of January at midnight; ``.at("13:00")`` sets another time."""
        return self._on_days("1 1 *")

    @word(frequency=True)
    def yearly_on(self, month: int = 1, day: int = 1, time: str | None = None) -> Self:
        """Run once a year, in this month (1 to 12) on this day (1 to 31), at midnight or at this time."""
        month = self._number("yearly_on", "month", month, 1, 12)
        return self._on_days(f"{self._number('yearly_on', 'day', day, 1, 31)} {month} *", time)

    def _at_minutes(self, minutes: str, hours: str) -> Self:
        self._draft.cron_text = f"{minutes} {hours} * * *"
        return self

    def _on_days(self, fields: str, time: str | None = None) -> Self:
        self._draft.day_fields = fields
        if time is not None:
            self._set_time(time)
        return self

    def _twice_daily(self, name: str, first: int, second: int, minute: int) -> Self:
        hours = [self._number(name, "hour", hour, 0, 23) for hour in (first, second)]
        if first == second:
            self._fail(f".{name}() has the same hour twice, {first}", "Name two, or write .daily_at(…).")
        return self._at_minutes(str(self._number(name, "minute", minute, 0, 59)), ",".join(map(str, sorted(hours))))

    def _days_of_month(self, name: str, days: Iterable[int]) -> str:
        numbers = [self._number(name, "day", day, 1, 31) for day in days]
        if len(set(numbers)) < len(numbers):
            self._fail(f".{name}() names a day twice", "Name each day once.")
        return ",".join(map(str, sorted(numbers)))

    def _minutes(self, name: str, given: Minutes) -> str:
        if isinstance(given, str):
            if not _STEP.fullmatch(given) or not 1 <= int(given[2:]) <= 59:
                self._fail(
                    f".{name}(): {given!r} is no step of minutes",
                    f'Write .{name}(15), .{name}([15, 45]) or .{name}("*/10").',
                )
            return given
        several = [given] if isinstance(given, int) or not isinstance(given, Iterable) else list(given)
        if not several:
            self._fail(f".{name}() names no minute", f"Write .{name}(15) or .{name}([15, 45]).")
        return ",".join(str(minute) for minute in sorted({self._number(name, "minute", m, 0, 59) for m in several}))

    def _number(self, name: str, what: str, given: object, least: int, most: int) -> int:
        if not isinstance(given, int) or isinstance(given, bool) or not least <= given <= most:
            hint = " For the last day of the month write .last_day_of_month()." if (what, most) == ("day", 31) else ""
            self._fail(f".{name}(): {given!r} is no {what}", f"Write a whole number from {least} to {most}.{hint}")
        return given

    def _set_time(self, text: object) -> None:
        if self._draft.time is not None:
            self._fail("it has two times of day", "Give the time once.")
        self._draft.time = self._time_of_day(text)

    def _time_of_day(self, text: object) -> tuple[int, int]:
        match = _TIME.fullmatch(text) if isinstance(text, str) else None
        if match is None or int(match[1]) > 23 or int(match[2]) > 59:
            self._fail(f"{text!r} is no time of day", 'Write hours and minutes from "0:00" to "23:59".')
        return int(match[1]), int(match[2])

    def _day(self, name: object) -> int:
        if isinstance(name, str) and name.lower() in DAYS:
            return DAYS.index(name.lower())
        if isinstance(name, int):
            self._fail(
                f"{name!r} is no day of the week: numbers mean different days in cron and in Python", 'Write "monday".'
            )
        close = difflib.get_close_matches(str(name).lower(), DAYS, n=1)
        if not close:
            close = [day for day in DAYS if isinstance(name, str) and day[:2] == name.lower()[:2]]
        self._fail(
            f"{name!r} is no day of the week", f"Write {close[0]!r}." if close else f"Write one of {', '.join(DAYS)}."
        )


class Restrictions(Frequencies):
    """On which of those due times: each is an *and*, and they go in any order."""

    __slots__ = ()

    @word()
    def at(self, time: str) -> Self:
        """Set the time of day, ``"13:00"``, of a schedule of a day or longer that has one (daily, weekly …)."""
        self._set_time(time)
        return self

    @word()
    def weekdays(self) -> Self:
        """Only from Monday to Friday."""
        return self._only("weekdays", 0, 1, 2, 3, 4)

    @word()
    def weekends(self) -> Self:
        """Only on Saturdays and Sundays."""
        return self._only("weekends", 5, 6)

    @word()
    def mondays(self) -> Self:
        """Only on Mondays."""
        return self._only("mondays", 0)

    @word()
    def tuesdays(self) -> Self:
        """Only on Tuesdays."""
        return self._only("tuesdays", 1)

    @word()
    def wednesdays(self) -> Self:
        """Only on Wednesdays."""
        return self._only("wednesdays", 2)

    @word()
    def thursdays(self) -> Self:
        """Only on Thursdays."""
        return self._only("thursdays", 3)

    @word()
    def fridays(self) -> Self:
        """Only on Fridays."""
        return self._only("fridays", 4)

    @word()
    def saturdays(self) -> Self:
        """Only on Saturdays."""
        return self._only("saturdays", 5)

    @word()
    def sundays(self) -> Self:
        """Only on Sundays."""
        return self._only("sundays", 6)

    @word()
    def days(self, *names: Day) -> Self:
        """Only on these days of the week, by their names: ``days("monday", "thursday")``."""
        if not names:
            self._fail(".days() names no day", 'Write .days("monday", "thursday").')
        return self._only("days", *map(self._day, names))

    @word()
    def between(self, start: str, end: str) -> Self:
        """Only from ``start`` to ``end``, both included, by the task's clock; across midnight when ``end`` is less."""
        return self._window("between", start, end, inside=True)

    @word(repeats=True)
    def unless_between(self, start: str, end: str) -> Self:
        """Not from ``start`` to ``end``, both included; across midnight when ``end`` is less. May be repeated."""
        return self._window("unless_between", start, end, inside=False)

    @word()
    def timezone(self, zone: str | ZoneInfo) -> Self:
        """Follow the clock of this zone, ``"Europe/Berlin"``, instead of the project's TIME_ZONE."""
        key = zone.key if isinstance(zone, ZoneInfo) else zone
        if not isinstance(key, str) or not known_zone(key):
            close = difflib.get_close_matches(str(zone), available_timezones(), n=1)
            self._fail(
                f"{zone!r} is no time zone",
                f"Did you mean {close[0]!r}?"
                if close
                else 'Write a name of the zone database, such as "Europe/Berlin".',
            )
        self._draft.zone = key
        return self

    def _only(self, name: str, *days: int) -> Self:
        left = self._draft.restricted_to.intersection(days)
        if not left:
            self._fail(
                f".{name}() and the other days leave no day: restrictions are an and",
                'For several days write .days("monday", "thursday").',
            )
        self._draft.restricted_to = left
        return self

    def _window(self, name: str, start: str, end: str, *, inside: bool) -> Self:
        first, last = self._time_of_day(start), self._time_of_day(end)
        if first == last:
            self._fail(f".{name}({start!r}, {end!r}) starts where it ends", "Write two times of day.")
        self._draft.windows += (Window(time(*first), time(*last), inside),)
        return self
