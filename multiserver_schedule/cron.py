"""
When something is due: five-field cron, intervals, and the days and hours they are restricted to.

Due times are those of Debian's cron(8). Its main loop is a walk over the minutes of the wall clock that remembers the
highest minute it has reached; here the same answer is computed for a whole stretch of constant offset at once:

1. A zone is cut into *pieces*, one for each stretch between two clock changes, and each piece knows which minutes of
   the wall clock its beginning left out, and up to which minute they had been reached before.
2. A job whose minute or hour starts with ``*`` follows the clock: it is due at each of its minutes that a piece shows.
3. Any other job is due once for each of its minutes: in a repeated hour the first time, and right at the end of a gap
   for what the gap left out.
4. A change of three hours or more (a country that crosses the date line) is a correction: nothing is caught up. A
   clock set back by exactly three hours is not yet one, in cron's source as here.

Two lines of a crontab that fall on one instant are one due time. Everything is computed in whole seconds since the
Unix epoch, and for the years 1970 to 2099. No Django here, and croniter is imported when a first expression is parsed.
"""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from functools import cache, lru_cache
from math import gcd
from typing import Final, NamedTuple, TypeAlias
from zoneinfo import ZoneInfo, available_timezones

__all__ = ["Cron", "CronError", "Every", "Timetable", "Window", "clock_changes"]

Seconds: TypeAlias = int
Minute: TypeAlias = int
"""A minute of the wall clock, counted from 1970-01-01 00:00 on that same clock."""
Bits: TypeAlias = int

UTC: Final = timezone.utc
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
EPOCH_DAY: Final = EPOCH.toordinal()
END: Final[Seconds] = 4_102_444_800  # 2100-01-01: croniter's last year is 2099, and the Gregorian exception comes then
SECOND: Final = timedelta(seconds=1)
DAY: Final[Seconds] = 86_400
WEEK: Final[Seconds] = 7 * DAY
MINUTES: Final[Minute] = 1_440
ALL_DAY: Final[Bits] = (1 << MINUTES) - 1
ALL_DAYS: Final = frozenset(range(7))
CORRECTION: Final[Minute] = 180
LONGEST: Final = 256

ALIASES: Final = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
MONTH_NAMES: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
DAY_NAMES: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
LAST: Final = 0
"""The number in ``5L``, which stands where ``5#2`` has its 2."""


class CronError(ValueError):
    """A schedule that is refused. The message says what is wrong, in which field, and what to write instead."""


# Reading the five fields: our own small grammar, so that a declaration costs microseconds and refuses what
# implementations of cron disagree on.


class _Place(NamedTuple):
    name: str
    low: int
    high: int
    names: dict[str, int]

    @property
    def all(self) -> Bits:
        return (1 << self.high + 1) - (1 << self.low)


PLACES: Final = (
    _Place("minute", 0, 59, {}),
    _Place("hour", 0, 23, {}),
    _Place("day of month", 1, 31, {}),
    _Place("month", 1, 12, {name: number for number, name in enumerate(MONTH_NAMES, 1)}),
    _Place("day of week", 0, 6, {name: (number + 1) % 7 for number, name in enumerate(DAY_NAMES)}),
)
MINUTE, HOUR, DAY_OF_MONTH, MONTH, DAY_OF_WEEK = range(5)


class _Field(NamedTuple):
    bits: Bits
    star: bool = False
    last: bool = False
    """Day of month: the last one."""
    nth: tuple[tuple[int, int], ...] = ()
    """Day of week: (weekday, which one in the month)."""


ITEM: Final = re.compile(r"(\*|[0-9a-z]+)(?:-([0-9a-z]+))?(?:/([0-9]+))?")
NTH: Final = re.compile(r"([0-9a-z]+)#([0-9]+)")
LAST_WEEKDAY: Final = re.compile(r"([0-7]|[a-z]{3})l")
LAST_WEEKDAY_AS_CRONITER: Final = re.compile(r"l([0-7]|[a-z]{3})")
RANDOM: Final = re.compile(r"[hr](?![a-z0-9])")


def _shown(text: str, most: int = 20) -> str:
    quoted = ascii(text[: most + 1])
    return quoted if len(quoted) <= most + 2 else f"{quoted[:most]}...{quoted[0]}"


@lru_cache(maxsize=4096)
def _read_field(position: int, text: str) -> _Field:
    place = PLACES[position]
    items = text.split(",")
    if position == DAY_OF_MONTH and text == "l":
        return _Field(0, last=True)
    bits: Bits = 0
    nth: set[tuple[int, int]] = set()
    plain = False
    for item in items:
        if item.startswith("*") and len(items) > 1:
            rest = f"{place.low}-{place.high}{item[1:]}" if re.fullmatch(r"\*/[0-9]{1,3}", item) else ""
            raise CronError(
                f"{place.name} {_shown(text)} has a * inside a list, which cron implementations read in different "
                f"ways. Write {rest + ' in its place' if rest else '* alone'}."
            )
        which = _read_nth(place, item) if position == DAY_OF_WEEK else None
        if which is not None:
            nth.add(which)
        else:
            plain = True
            bits |= _read_item(place, item)
    if nth and plain:
        raise CronError(
            f"day of week {_shown(text)} mixes plain days with # or L. "
            "Declare one task for the plain days and one for the others."
        )
    return _Field(bits, text.startswith("*"), nth=tuple(sorted(nth, key=lambda pair: (pair[0], pair[1] or 9))))


def _read_nth(place: _Place, item: str) -> tuple[int, int] | None:
    if found := NTH.fullmatch(item):
        number = int(found[2])
        if not 1 <= number <= 5:
            raise CronError(
                f"day of week {_shown(item)}: a month has a first to a fifth. Write #1 to #5, or 5L for the last."
            )
        return _number(place, found[1], item) % 7, number
    if found := LAST_WEEKDAY.fullmatch(item):
        return _number(place, found[1], item) % 7, LAST
    if found := LAST_WEEKDAY_AS_CRONITER.fullmatch(item):
        raise CronError(
            f"day of week {_shown(item)} is croniter's spelling. Write {found[1]}L for the last one of the month."
        )
    return None


def _read_item(place: _Place, item: str) -> Bits:
    found = ITEM.fullmatch(item)
    if found is None or (found[1] == "*" and found[2]):
        raise CronError(_misread(place, item))
    first, last, step = found.groups()
    top = 7 if place.low == 0 and place.high == 6 else place.high
    if step is not None:
        most = place.high - place.low
        if len(step) > 4 or not 1 <= int(step) <= most:
            only = place.low if first == "*" else first
            raise CronError(
                f"{place.name} {_shown(item)}: a step goes from 1 to {most} here. "
                f"Write {_shown(str(only))[1:-1]} for a single value, or a smaller step."
            )
    if first == "*":
        return place.all if step is None else _bits(range(place.low, place.high + 1, int(step)))
    start = _number(place, first, item)
    if last is None:
        if step is not None:
            instead = f"{start}-{place.high}/{int(step)}" if start + int(step) <= place.high else f"{start}"
            raise CronError(
                f"{place.name} {_shown(item)}: a step needs a range, and cron implementations disagree "
                f"about the end of this one. Write {instead} instead."
            )
        return 1 << (start % 7 if top == 7 else start)
    stop = _number(place, last, item)
    if start > stop:
        if start == 7:
            raise CronError(f"day of week {_shown(item)} runs backwards. Write 0-{stop} instead.")
        parts = (f"{a}-{b}" if a < b else f"{a}" for a, b in ((start, place.high), (place.low, stop)))
        raise CronError(f"{place.name} {_shown(item)} runs backwards. Write the two ranges {','.join(parts)} instead.")
    values = range(start, stop + 1, int(step or 1))
    return _bits(value % 7 for value in values) if top == 7 else _bits(values)


def _number(place: _Place, token: str, item: str) -> int:
    top = 7 if place.name == "day of week" else place.high
    if token.isdigit():
        if len(token) <= 8 and place.low <= int(token) <= top:
            return int(token)
        raise CronError(f"{place.name} {_shown(item)} is out of range. Write a number from {place.low} to {top}.")
    if token in place.names:
        return place.names[token]
    raise CronError(_misread(place, item))


def _misread(place: _Place, item: str) -> str:
    shown = f"{place.name} {_shown(item)}"
    if not item:
        return f"{place.name} has a comma with nothing on one side. Write the values with one comma between two."
    if "?" in item:
        return f"{shown}: ? is not cron. Write * instead."
    if RANDOM.match(item):
        return f"{shown}: H and R pick a time by chance. Write a fixed value, and .jitter() to spread the load."
    if place.name == "day of month" and "w" in item:
        return (
            f"{shown}: W (the nearest working day) is not supported. "
            "Write 1-5 as day of week, or fixed days of the month."
        )
    if "l" in item and place.name == "day of month":
        return f"{shown}: in the day of month L stands alone. Write L for the last day of the month."
    if item == "l" and place.name == "day of week":
        return f"{shown}: L needs a weekday. Write 5L for the last Friday of the month, or 6 for each Saturday."
    if "#" in item:
        return f"{shown} is not understood. Write for example 5#2 as day of week for the second Friday of the month."
    if place.names:
        for word in re.findall(r"[a-z]{4,}", item):
            if word[:3] in place.names:
                return f"{shown}: names have three letters. Write {word[:3]} instead."
        return (
            f"{shown} is not understood. Write *, */n, a, a-b, a-b/n or a list, "
            f"in numbers or names such as {next(iter(place.names))}."
        )
    if re.search(r"[a-z]", item):
        return f"{shown}: this field takes no names. Write a number from {place.low} to {place.high}."
    return f"{shown} is not understood. Write *, */n, a, a-b, a-b/n or a list of these."


def _read(expression: object) -> str:
    """Return the canonical spelling of an expression: equal for equal schedules, and an expression itself."""
    if not isinstance(expression, str):
        raise CronError(f"A cron expression is text, not {type(expression).__name__}. Write for example '*/5 * * * *'.")
    if len(expression) > LONGEST:
        raise CronError(
            f"The cron expression {_shown(expression, 36)} has {len(expression)} characters, and {LONGEST} is the "
            "most. Write ranges and steps, or declare several tasks."
        )
    text = expression.strip(" \t").lower()
    # Only then lower(): it would turn a Kelvin sign into a plain k.
    if not expression.isascii() or not text.replace("\t", " ").isprintable():
        raise CronError(
            f"The cron expression {_shown(expression, 36)} has a line break or a character that is not ASCII. "
            "Write five fields on one line, in plain digits and letters."
        )
    if text.startswith("@"):
        if text == "@reboot":
            raise CronError(
                "@reboot is about one server's start, and this schedule is for all servers. Write a time such as "
                "@daily, and start what belongs to a server's start from its service manager."
            )
        if text not in ALIASES:
            raise CronError(f"The alias {_shown(expression, 36)} is unknown. Write one of {', '.join(ALIASES)}.")
        text = ALIASES[text]
    parts = text.split()
    if len(parts) != 5:
        raise CronError(
            f"The cron expression {_shown(expression, 36)} has {len(parts)} field{'s' * (len(parts) != 1)}. "
            "Write five: minute, hour, day of month, month, day of week."
            + " Seconds go through every(seconds=...)."
            * (len(parts) > 5)
        )
    try:
        fields = [_read_field(position, part) for position, part in enumerate(parts)]
        _refuse_ambiguous_days(parts, fields)
    except CronError as error:
        raise CronError(f"In the cron expression {_shown(expression, 36)}: {error}") from None
    minute, hour, dom, month, dow = fields
    follows = minute.star or hour.star
    both = dom.star or dow.star
    return " ".join(
        (
            _write(MINUTE, minute.bits, follows, 2),
            _write(HOUR, hour.bits, follows, 2),
            "L" if dom.last else _write(DAY_OF_MONTH, dom.bits, both, 3),
            _write(MONTH, month.bits, True, 3),
            _write_nth(dow.nth) if dow.nth else _write(DAY_OF_WEEK, dow.bits, both, 7),
        )
    )


def _refuse_ambiguous_days(parts: list[str], fields: list[_Field]) -> None:
    dom, month, dow = fields[2:]
    if dow.nth and parts[2] != "*":
        raise CronError(f"day of week {_shown(parts[4])} needs * as day of month. Write * there, or declare two tasks.")
    if parts[2] != "*" and parts[4] != "*" and (dom.star or dow.star):
        position = DAY_OF_MONTH if dom.star else DAY_OF_WEEK
        place, text = PLACES[position], parts[position]
        other = PLACES[DAY_OF_MONTH + DAY_OF_WEEK - position]
        step = int(text[2:])
        instead = "*" if step == 1 else f"{place.low}-{place.high}/{step}"
        raise CronError(
            f"{place.name} {_shown(text)} beside a restricted {other.name} means 'and' to some cron implementations "
            f"and 'or' to others. Write {instead} for 'or', and a restriction such as .mondays() for 'and'."
        )
    if dow.star and dom.bits and not dom.star:
        first = _lowest(dom.bits)
        if first > 28 and not any(month.bits >> number & 1 and first <= _longest(number) for number in range(1, 13)):
            raise CronError(
                f"day of month {_shown(parts[2])} never comes in month {_shown(parts[3])}. "
                "Write L for the last day of the month, or another month."
            )


@lru_cache(maxsize=4096)
def _write(position: int, bits: Bits, starred: bool, fewest: int) -> str:
    """Spell a set of values; ``*/n`` only where a star changes nothing, and where at least ``fewest`` are meant."""
    place = PLACES[position]
    if starred and bits == place.all:
        return "*"
    values = list(_positions(bits))
    if len(values) > 1:
        step = values[1] - values[0]
        if starred and len(values) >= fewest and bits == _bits(range(place.low, place.high + 1, step)):
            return f"*/{step}"
        if step > 1 and len(values) > 2 and values == list(range(values[0], values[-1] + 1, step)):
            return f"{values[0]}-{values[-1]}/{step}"
    return ",".join(_runs(values, str))


def _write_nth(nth: tuple[tuple[int, int], ...]) -> str:
    return ",".join(f"{weekday}L" if number == LAST else f"{weekday}#{number}" for weekday, number in nth)


def _runs(values: list[int], word: Callable[[int], str]) -> Iterator[str]:
    """Spell ascending values, three or more neighbours as a range."""
    start = 0
    for index, value in enumerate(values):
        if index + 1 < len(values) and values[index + 1] == value + 1:
            continue
        if index - start > 1:
            yield f"{word(values[start])}-{word(value)}"
        else:
            yield from map(word, values[start : index + 1])
        start = index + 1


def _bits(values: Iterable[int]) -> Bits:
    bits = 0
    for value in values:
        bits |= 1 << value
    return bits


def _positions(bits: Bits) -> Iterator[int]:
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


def _lowest(bits: Bits) -> int:
    return (bits & -bits).bit_length() - 1


def _longest(month: int) -> int:
    return (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)[month - 1]


@lru_cache(maxsize=4096)
def _minutes_of_day(minutes: Bits, hours: Bits) -> Bits:
    return sum(minutes << 60 * hour for hour in _positions(hours))


class _Parsed(NamedTuple):
    minutes: Bits
    hours: Bits
    days: Bits
    months: Bits
    weekdays: Bits
    last: bool
    nth: tuple[tuple[int, int], ...]


def _parsed_here(expression: str) -> _Parsed:
    minute, hour, dom, month, dow = (_read_field(*pair) for pair in enumerate(expression.lower().split()))
    return _Parsed(minute.bits, hour.bits, dom.bits, month.bits, dow.bits, dom.last, dow.nth)


@lru_cache(maxsize=16_384)
def _parsed(expression: str) -> _Parsed:
    """Ask croniter for the values of a canonical expression. It is asked for nothing else, ever."""
    # Here and not above: a pass that finds nothing due must not pay for the import (80 ms).
    from croniter import croniter

    spelled = re.sub(r"\b([0-6])L", r"L\1", expression)
    try:
        fields, nth = croniter.expand(spelled)
    except ValueError as error:
        raise CronError(f"croniter cannot read {_shown(expression, 36)}. Install croniter>=7.0,<8.") from error
    last = fields[DAY_OF_MONTH] == ["l"]
    minutes, hours, days, months, weekdays = (
        place.all if values == ["*"] else _bits(value for value in values if isinstance(value, int))
        for place, values in zip(PLACES, fields, strict=True)
    )
    pairs = [(weekday, LAST if which == "l" else which) for weekday, all_of in nth.items() for which in all_of]
    return _Parsed(
        minutes,
        hours,
        days,
        months,
        0 if pairs else weekdays,
        last,
        tuple(sorted(pairs, key=lambda pair: (pair[0], pair[1] or 9))),
    )


# Zones and their clock changes.


class _Piece(NamedTuple):
    """A stretch of one offset, ``start <= t < end`` in UTC."""

    start: Seconds
    end: Seconds
    offset: Seconds
    first: Minute
    """The first minute that the wall clock shows here."""
    fixed_from: Minute
    """The first minute that had not been reached before: later than ``first`` where an hour repeats."""
    gap_from: Minute | None = None
    """The first minute that the change left out and that is made up for at ``start``, up to ``first - 1``."""


ALWAYS: Final = (_Piece(0, END, 0, 0, 0),)


def _zone_name(name: object) -> str:
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+)*", name)
        or len(name) > 64
    ):
        shown = _shown(name, 40) if isinstance(name, str) else type(name).__name__
        raise CronError(f"The time zone {shown} is not a name. Write one such as 'Europe/Berlin' or 'UTC'.")
    if name == "localtime" or name.startswith(("right/", "posix/")):
        raise CronError(
            f"The time zone {_shown(name, 40)} is not the same on every server. Write one such as 'Europe/Berlin'."
        )
    return name


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, LookupError) as error:  # a folder such as "Europe" is an OSError
        near = difflib.get_close_matches(name, available_timezones(), n=1, cutoff=0.0) or ["UTC"]
        raise CronError(
            f"The time zone {_shown(name, 40)} is unknown here. Write {near[0]!r}, or install tzdata."
        ) from error


def _offset(zone: ZoneInfo, moment: Seconds) -> Seconds:
    offset = (EPOCH + timedelta(seconds=moment)).astimezone(zone).utcoffset()
    return 0 if offset is None else offset // SECOND


def _changes(zone: ZoneInfo, start: Seconds, end: Seconds) -> Iterator[tuple[Seconds, Seconds]]:
    """Find the clock changes in ``(start, end]``, as (first second, new offset)."""
    # The two closest changes in the zone database since 1970 are seven days apart (Recife, 2000); a day is safe.
    before = _offset(zone, start)
    for known in range(start, end, DAY):
        unknown = min(known + DAY, end)
        after = _offset(zone, unknown)
        if after != before:
            while unknown - known > 1:
                middle = (known + unknown) // 2
                if _offset(zone, middle) == before:
                    known = middle
                else:
                    unknown = middle
            yield unknown, after
        before = after


def clock_changes(zone: str, after: datetime, until: datetime) -> list[tuple[datetime, timedelta, timedelta]]:
    """Return the clock changes of a zone in ``(after, until]``: when, and its offsets from UTC before and after."""
    first, last = _window(after, until)
    offset = _offset(_zone(zone), first - 1)
    found = []
    for at, changed in _changes(_zone(zone), first - 1, last):
        found.append((_moment(at), timedelta(seconds=offset), timedelta(seconds=changed)))
        offset = changed
    return found


@lru_cache(maxsize=4096)
def _pieces_of_year(name: str, year: int) -> tuple[_Piece, ...]:
    """Cut one year of a zone into pieces, as cron's main loop classifies the changes."""
    zone = _zone(name)
    begin = (date(year, 1, 1).toordinal() - EPOCH_DAY) * DAY
    end = (date(year + 1, 1, 1).toordinal() - EPOCH_DAY) * DAY
    # Two days earlier, because what New Year's Eve repeated or left out is still owed; any state heals within 3 hours.
    start = begin - 2 * DAY
    offset = _offset(zone, start)
    first = fixed_from = -(-(start + offset) // 60)
    gap_from: Minute | None = None
    pieces = []
    for until, next_offset in [*_changes(zone, start, end), (end, offset)]:
        if until > begin and start < begin:
            pieces.append(_Piece(begin, min(until, end), offset, -(-(begin + offset) // 60), fixed_from))
        elif begin <= start < end:
            pieces.append(_Piece(start, min(until, end), offset, first, fixed_from, gap_from))
        highest = max(fixed_from - 1, (until - 1 + offset) // 60)
        first = (until + next_offset) // 60
        leap = first - highest
        correction = not -CORRECTION < leap <= CORRECTION
        fixed_from = first if correction else max(first, highest + 1)
        gap_from = highest + 1 if not correction and leap > 1 else None
        start, offset = until, next_offset
    return tuple(pieces)


def _pieces(
    zone: str, first: Seconds, last: Seconds, *, backwards: bool = False
) -> Iterator[tuple[_Piece, Seconds, Seconds]]:
    """Go through the pieces that ``first <= t <= last`` touches, each with its part of that window."""
    if first > last:
        return
    order = -1 if backwards else 1
    years = range(_year(first), _year(last) + 1)
    for pieces in (ALWAYS,) if zone == "UTC" else (_pieces_of_year(zone, year) for year in years[::order]):
        for piece in pieces[::order]:
            if piece.start <= last and piece.end > first:
                yield piece, max(first, piece.start), min(last, piece.end - 1)


def _year(moment: Seconds) -> int:
    return (EPOCH + timedelta(seconds=moment)).year


# What is due within one piece.


class _Plan(ABC):
    """Due times within one piece, ``first <= t <= last`` in seconds. Both ends lie in the piece."""

    __slots__ = ()

    never = False
    """Is there no due time at all?"""

    @abstractmethod
    def first(self, piece: _Piece, first: Seconds, last: Seconds) -> Seconds | None: ...

    @abstractmethod
    def last(self, piece: _Piece, first: Seconds, last: Seconds) -> Seconds | None: ...

    @abstractmethod
    def count(self, piece: _Piece, first: Seconds, last: Seconds) -> int: ...

    @abstractmethod
    def each(self, piece: _Piece, first: Seconds, last: Seconds) -> Iterator[Seconds]: ...


class _Month(NamedTuple):
    before: int
    """The day before the first, counted from 1970-01-01."""
    weekday: int
    """Of the first; Sunday is 0, as in cron."""
    length: int


@cache  # 130 years of them
def _month(year: int, month: int) -> _Month:
    first = date(year, month, 1).toordinal()
    following = date(year + month // 12, month % 12 + 1, 1).toordinal()
    return _Month(first - EPOCH_DAY - 1, first % 7, following - first)


class _Calendar:
    """The days on which an expression is due, without any clock."""

    __slots__ = ("_either", "_parsed", "_shapes", "_weekdays")

    def __init__(self, parsed: _Parsed, either: bool, weekdays: Bits) -> None:
        self._parsed = parsed
        self._either = either
        self._weekdays = weekdays
        self._shapes: dict[tuple[int, int], Bits] = {}

    def of_month(self, year: int, month: int) -> Bits:
        """Return the days of a month, bit 1 for the first."""
        if not self._parsed.months >> month & 1:
            return 0
        shape = _month(year, month)[1:]
        bits = self._shapes.get(shape)
        if bits is None:  # there are 28 shapes of a month, so this is soon over
            bits = self._shapes[shape] = self._of_shape(*shape)
        return bits

    def _of_shape(self, weekday: int, length: int) -> Bits:
        def on(weekdays: Bits) -> Bits:
            return _bits(day for day in range(1, length + 1) if weekdays >> (weekday + day - 1) % 7 & 1)

        parsed = self._parsed
        by_date = parsed.days & (1 << length + 1) - 1 | (1 << length if parsed.last else 0)
        by_weekday = on(parsed.weekdays)
        for wanted, number in parsed.nth:
            days = list(_positions(on(1 << wanted)))
            if number <= len(days):
                by_weekday |= 1 << days[number - 1]  # LAST is 0, so that it reads the last one
        return (by_date | by_weekday if self._either else by_date & by_weekday) & on(self._weekdays)

    def has(self, day: int) -> bool:
        of = date.fromordinal(day + EPOCH_DAY)
        return bool(self.of_month(of.year, of.month) >> of.day & 1)

    def after(self, day: int, last: int) -> int | None:
        """Return the first day with ``day <= it <= last``."""
        if day > last:
            return None
        of = date.fromordinal(day + EPOCH_DAY)
        year, month, skipped = of.year, of.month, of.day
        while True:
            bits = self.of_month(year, month) >> skipped << skipped
            before = _month(year, month).before
            if bits:
                found = before + _lowest(bits)
                return found if found <= last else None
            if before >= last:
                return None
            year, month, skipped = year + month // 12, month % 12 + 1, 0

    def before(self, day: int, first: int) -> int | None:
        """Return the last day with ``first <= it <= day``."""
        if day < first:
            return None
        of = date.fromordinal(day + EPOCH_DAY)
        year, month, kept = of.year, of.month, (2 << of.day) - 1
        while True:
            bits = self.of_month(year, month) & kept
            before = _month(year, month).before
            if bits:
                found = before + bits.bit_length() - 1
                return found if found >= first else None
            if before < first:
                return None
            year, month, kept = year - (month == 1), (month - 2) % 12 + 1, -1

    def count(self, first: int, last: int) -> int:
        """Return how many days there are, both ends included."""
        if first > last:
            return 0
        start, stop = date.fromordinal(first + EPOCH_DAY), date.fromordinal(last + EPOCH_DAY)
        year, month, total = start.year, start.month, 0
        while (year, month) <= (stop.year, stop.month):
            bits = self.of_month(year, month)
            if (year, month) == (start.year, start.month):
                bits = bits >> start.day << start.day
            if (year, month) == (stop.year, stop.month):
                bits &= (2 << stop.day) - 1
            total += bits.bit_count()
            year, month = year + month // 12, month % 12 + 1
        return total


class _WallClock:
    """The minutes of the wall clock on which an expression is due: some days, and the same minutes on each."""

    __slots__ = ("calendar", "minutes")

    def __init__(self, calendar: _Calendar, minutes: Bits) -> None:
        self.calendar = calendar
        self.minutes = minutes

    def has(self, minute: Minute) -> bool:
        return bool(self.minutes >> minute % MINUTES & 1) and self.calendar.has(minute // MINUTES)

    def first(self, first: Minute, last: Minute) -> Minute | None:
        if first > last:
            return None
        today, passed = divmod(first, MINUTES)
        bits = self.minutes >> passed << passed
        day = self.calendar.after(today if bits else today + 1, last // MINUTES)
        if day is None:
            return None
        found = day * MINUTES + _lowest(bits if day == today else self.minutes)
        return found if found <= last else None

    def last(self, first: Minute, last: Minute) -> Minute | None:
        if first > last:
            return None
        today, now = divmod(last, MINUTES)
        bits = self.minutes & (2 << now) - 1
        day = self.calendar.before(today if bits else today - 1, first // MINUTES)
        if day is None:
            return None
        found = day * MINUTES + (bits if day == today else self.minutes).bit_length() - 1
        return found if found >= first else None

    def count(self, first: Minute, last: Minute) -> int:
        if first > last:
            return 0
        (first_day, passed), (last_day, now) = divmod(first, MINUTES), divmod(last, MINUTES)
        total = self.calendar.count(first_day, last_day) * self.minutes.bit_count()
        if self.calendar.has(first_day):
            total -= (self.minutes & (1 << passed) - 1).bit_count()
        if self.calendar.has(last_day):
            total -= (self.minutes >> now + 1).bit_count()
        return total

    def each(self, first: Minute, last: Minute) -> Iterator[Minute]:
        minutes = list(_positions(self.minutes))
        day = self.calendar.after(first // MINUTES, last // MINUTES)
        while day is not None:
            for minute in minutes:
                if first <= day * MINUTES + minute <= last:
                    yield day * MINUTES + minute
            day = self.calendar.after(day + 1, last // MINUTES)


def _means_either(expression: str) -> bool:
    """Do both day fields restrict? Then one is enough. Read from our text: croniter makes a full list a star."""
    text = expression.split()
    return not (text[DAY_OF_MONTH].startswith("*") or text[DAY_OF_WEEK].startswith("*"))


def _cron_weekdays(days: frozenset[int]) -> Bits:
    return _bits((day + 1) % 7 for day in days)


class _CronPlan(_Plan):
    __slots__ = ("_allowed_days", "_allowed_minutes", "_as_written", "_due", "_follows", "never")

    def __init__(self, expression: str, parsed: _Parsed, days: frozenset[int], windows: tuple[Window, ...]) -> None:
        text = expression.split()
        self._follows = text[MINUTE].startswith("*") or text[HOUR].startswith("*")
        either = _means_either(expression)
        minutes = _minutes_of_day(parsed.minutes, parsed.hours)
        self._allowed_days = days
        self._allowed_minutes = _open_minutes(windows)
        everyday = _Calendar(parsed, either, _bits(range(7)))
        restricted = everyday if days == ALL_DAYS else _Calendar(parsed, either, _cron_weekdays(days))
        self._as_written = _WallClock(everyday, minutes)
        self._due = _WallClock(restricted, minutes & self._allowed_minutes)
        self.never = not self._due.minutes

    def _span(self, piece: _Piece, first: Seconds, last: Seconds) -> tuple[Minute, Minute]:
        start = piece.first if first <= piece.start else -(-(first + piece.offset) // 60)
        return start if self._follows else max(start, piece.fixed_from), (last + piece.offset) // 60

    def _at(self, piece: _Piece, minute: Minute) -> Seconds:
        return max(piece.start, minute * 60 - piece.offset)

    def _makes_up(self, piece: _Piece, first: Seconds) -> bool:
        """Is the piece's start a due time for what the change left out, and for nothing else?"""
        if first > piece.start or piece.gap_from is None or self._follows:
            return False
        if self._as_written.first(piece.gap_from, piece.first - 1) is None or self._due.has(piece.first):
            return False
        return (piece.first // MINUTES + 3) % 7 in self._allowed_days and bool(
            self._allowed_minutes >> piece.first % MINUTES & 1
        )

    def first(self, piece: _Piece, first: Seconds, last: Seconds) -> Seconds | None:
        if self._makes_up(piece, first):
            return piece.start
        minute = self._due.first(*self._span(piece, first, last))
        return None if minute is None else self._at(piece, minute)

    def last(self, piece: _Piece, first: Seconds, last: Seconds) -> Seconds | None:
        minute = self._due.last(*self._span(piece, first, last))
        if minute is not None:
            return self._at(piece, minute)
        return piece.start if self._makes_up(piece, first) else None

    def count(self, piece: _Piece, first: Seconds, last: Seconds) -> int:
        return self._due.count(*self._span(piece, first, last)) + self._makes_up(piece, first)

    def each(self, piece: _Piece, first: Seconds, last: Seconds) -> Iterator[Seconds]:
        if self._makes_up(piece, first):
            yield piece.start
        for minute in self._due.each(*self._span(piece, first, last)):
            yield self._at(piece, minute)


class _EveryPlan(_Plan):
    __slots__ = ("_days", "_period", "_runs", "_step", "_whole")

    def __init__(self, step: Seconds, days: frozenset[int], windows: tuple[Window, ...]) -> None:
        minutes = _open_minutes(windows)
        self._step = step
        self._days = days
        self._whole = days == ALL_DAYS and minutes == ALL_DAY
        self._runs = _stretches(minutes)
        # Where the offset stays, step and week come round together, so that one such round tells of all.
        self._period = step // gcd(step, WEEK) * WEEK // DAY

    def _open(self, piece: _Piece, first: Seconds, last: Seconds, order: int = 1) -> Iterator[tuple[Seconds, Seconds]]:
        """Go through the stretches in which a due time may lie, as (first, last)."""
        if self._whole:
            yield first, last
            return
        days = range((first + piece.offset) // DAY, (last + piece.offset) // DAY + 1)
        for day in days[::order]:
            if (day + 3) % 7 in self._days:
                midnight = day * DAY - piece.offset
                for start, stop in self._runs[::order]:
                    if midnight + start <= last and midnight + stop >= first:
                        yield max(first, midnight + start), min(last, midnight + stop)

    def first(self, piece: _Piece, first: Seconds, last: Seconds) -> Seconds | None:
        last = min(last, first + (self._period + 1) * DAY)
        for start, stop in self._open(piece, first, last):
            found = -(-start // self._step) * self._step
            if found <= stop:
                return found
        return None

    def last(self, piece: _Piece, first: Seconds, last: Seconds) -> Seconds | None:
        first = max(first, last - (self._period + 1) * DAY)
        for start, stop in self._open(piece, first, last, -1):
            found = stop // self._step * self._step
            if found >= start:
                return found
        return None

    def count(self, piece: _Piece, first: Seconds, last: Seconds) -> int:
        return sum(stop // self._step - (start - 1) // self._step for start, stop in self._open(piece, first, last))

    def each(self, piece: _Piece, first: Seconds, last: Seconds) -> Iterator[Seconds]:
        for start, stop in self._open(piece, first, last):
            yield from range(-(-start // self._step) * self._step, stop + 1, self._step)


def _stretches(minutes: Bits) -> tuple[tuple[Seconds, Seconds], ...]:
    """Return the stretches of neighbouring minutes as seconds of the day, both ends included."""
    found = []
    minute = 0
    while minutes >> minute:
        minute += _lowest(minutes >> minute)
        length = _lowest(~(minutes >> minute))
        found.append((minute * 60, (minute + length) * 60 - 1))
        minute += length
    return tuple(found)


@lru_cache(maxsize=16_384)
def _cron_plan(expression: str, days: frozenset[int], windows: tuple[Window, ...]) -> _Plan:
    return _CronPlan(expression, _parsed(expression), days, windows)


@lru_cache(maxsize=16_384)
def _every_plan(step: Seconds, days: frozenset[int], windows: tuple[Window, ...]) -> _Plan:
    return _EveryPlan(step, days, windows)


@lru_cache(maxsize=16_384)
def _cron_gap(expression: str, days: frozenset[int], windows: tuple[Window, ...]) -> timedelta:
    # By our own reading: a pass may ask for the gaps of all its tasks, and must not import croniter for that.
    parsed = _parsed_here(expression)
    minutes = _minutes_of_day(parsed.minutes, parsed.hours) & _open_minutes(windows)
    count = minutes.bit_count()
    overnight = MINUTES + _lowest(minutes) - minutes.bit_length() + 1
    # Some two of n minutes are not further apart than the n-th part of the day.
    gaps = [gap for gap in range(1, MINUTES // (count - 1) + 1) if minutes & minutes >> gap][:1] if count > 1 else []
    if not gaps or overnight < gaps[0]:
        by_day = parsed._replace(minutes=0, hours=0)
        gaps.append((_days_apart(by_day, _means_either(expression), days) - 1) * MINUTES + overnight)
    return timedelta(minutes=min(gaps))


@lru_cache(maxsize=4096)
def _days_apart(parsed: _Parsed, either: bool, days: frozenset[int]) -> int:
    """Return the least distance of two days that are due."""
    calendar, least = _Calendar(parsed, either, _cron_weekdays(days)), END // DAY
    # The calendar comes round every 28 years, and a day of one round may be followed by itself in the next.
    day = calendar.after(0, END // DAY)
    while day is not None and least > 1:
        following = calendar.after(day + 1, END // DAY)
        if following is None:
            break
        least = min(least, following - day)
        day = following if following <= 2 * 28 * 366 else None
    return least


# What the other modules use.


class _DueTimes(ABC):
    """The questions that a schedule answers. All times are aware; what comes back is UTC with microsecond 0."""

    __slots__ = ()

    @abstractmethod
    def _how(self) -> tuple[_Plan, str]:
        """Return what is due, and in which zone."""

    @property
    @abstractmethod
    def text(self) -> str:
        """The schedule in one canonical line, equal wherever the schedule is equal. Computed without parsing."""

    @property
    def is_subminute(self) -> bool:
        """Can two due times be less than a minute apart?"""
        return False

    def between(self, after: datetime, until: datetime) -> list[datetime]:
        """Return the due times in ``(after, until]``, in order; cutting the window anywhere gives the same set."""
        first, last = _window(after, until)
        plan, zone = self._how()
        return [
            _moment(due) for piece, start, stop in _pieces(zone, first, last) for due in plan.each(piece, start, stop)
        ]

    def latest(self, until: datetime, *, after: datetime) -> datetime | None:
        """Return the last due time in ``(after, until]``, or None; the cost does not grow with the window."""
        first, last = _window(after, until)
        plan, zone = self._how()
        if not plan.never:
            for piece, start, stop in _pieces(zone, first, last, backwards=True):
                due = plan.last(piece, start, stop)
                if due is not None:
                    return _moment(due)
        return None

    def next(self, after: datetime) -> datetime | None:
        """Return the first due time after ``after``, or None where there is none before the year 2100."""
        first, last = _window(after, _LAST_MOMENT)
        plan, zone = self._how()
        if not plan.never:
            for piece, start, stop in _pieces(zone, first, last):
                due = plan.first(piece, start, stop)
                if due is not None:
                    return _moment(due)
        return None

    def count(self, after: datetime, until: datetime) -> int:
        """Return how many due times are in ``(after, until]``, by counting days and not due times."""
        first, last = _window(after, until)
        plan, zone = self._how()
        return sum(plan.count(piece, start, stop) for piece, start, stop in _pieces(zone, first, last))

    @abstractmethod
    def shortest_gap(self) -> timedelta:
        """
        Return the shortest distance of two due times, clock changes left aside. Computed without croniter.

        Of an interval with restrictions it is the interval: never more than the true distance, sometimes less.
        """

    def check(self) -> None:
        """Verify what declaring did not: croniter agrees, the zone exists, it is ever due. Raises ``CronError``."""
        _, zone = self._how()
        if zone != "UTC":
            _zone(zone)
        if self.next(EPOCH) is None:
            raise CronError(f"{_shown(self.text, 70)} is never due. Write days and hours that have a time in common.")


_LAST_MOMENT: Final = EPOCH + timedelta(seconds=END - 1)


def _window(after: datetime, until: datetime) -> tuple[Seconds, Seconds]:
    """Turn ``(after, until]`` into whole seconds, both ends included."""
    ends: dict[str, object] = {"after": after, "until": until}
    for name, moment in ends.items():
        if not isinstance(moment, datetime) or moment.utcoffset() is None:
            raise CronError(
                f"{name}={_shown(repr(moment), 60)} has no time zone. Pass an aware datetime, such as timezone.now()."
            )
    return max((after - EPOCH) // SECOND + 1, 0), min((until - EPOCH) // SECOND, END - 1)


def _moment(seconds: Seconds) -> datetime:
    return EPOCH + timedelta(seconds=seconds)


@dataclass(frozen=True, slots=True)
class Cron(_DueTimes):
    """
    Five fields of cron on the wall clock of a zone, such as ``Cron("30 2 * * *", "Europe/Berlin")``.

    ``expression`` is kept in its canonical spelling, so that two ways to write one schedule are equal. Making one costs
    microseconds and imports nothing: the zone is looked up, and croniter asked, at the first question or ``check()``.
    """

    expression: str
    zone: str = "UTC"

    def __post_init__(self) -> None:
        object.__setattr__(self, "expression", _read(self.expression))
        _zone_name(self.zone)

    def _how(self) -> tuple[_Plan, str]:
        return _cron_plan(self.expression, ALL_DAYS, ()), self.zone

    @property
    def text(self) -> str:
        return f"{self.expression} {self.zone}"

    def shortest_gap(self) -> timedelta:
        return _cron_gap(self.expression, ALL_DAYS, ())

    def check(self) -> None:
        # Two readings by two parsers: a croniter that changes its mind is noticed here, not at three in the morning.
        if _parsed(self.expression) != _parsed_here(self.expression):
            raise CronError(
                f"The installed croniter reads {_shown(self.expression, 36)} differently. Install croniter>=7.0,<8."
            )
        _DueTimes.check(self)


@dataclass(frozen=True, slots=True)
class Every(_DueTimes):
    """
    An interval such as ``Every(timedelta(minutes=5))``: whole seconds, from one second to one day.

    It is aligned to the Unix epoch, so that every server means the same moments. Clock changes do not touch it.
    """

    interval: timedelta

    def __post_init__(self) -> None:
        if not isinstance(self.interval, timedelta):
            raise CronError(
                f"An interval is a timedelta, not {type(self.interval).__name__}. "
                "Write for example timedelta(minutes=5)."
            )
        if self.interval % SECOND or not SECOND <= self.interval <= timedelta(days=1):
            raise CronError(
                f"The interval {self.interval} is not one of whole seconds from one second to one day. "
                "Write such an interval, or a cron expression for what is rarer."
            )

    def _how(self) -> tuple[_Plan, str]:
        return _every_plan(self.interval // SECOND, ALL_DAYS, ()), "UTC"

    @property
    def text(self) -> str:
        seconds = self.interval // SECOND
        for unit, name in ((DAY, "d"), (3600, "h"), (60, "m")):
            if seconds % unit == 0:
                return f"every {seconds // unit}{name}"
        return f"every {seconds}s"

    def shortest_gap(self) -> timedelta:
        return self.interval

    @property
    def is_subminute(self) -> bool:
        return self.interval < timedelta(minutes=1)


@dataclass(frozen=True, slots=True, order=True)
class Window:
    """
    Hours of the wall clock, both ends included: ``Window(time(8), time(18))``, or with ``inside=False`` all others.

    Minutes are compared, not seconds: 18:00:30 is still within 18:00. A start after the end crosses midnight.
    """

    start: time
    end: time
    inside: bool = True

    def __post_init__(self) -> None:
        ends: tuple[object, ...] = (self.start, self.end)
        for moment in ends:
            if not isinstance(moment, time) or moment.tzinfo is not None or moment.second or moment.microsecond:
                raise CronError(
                    f"{_shown(str(moment))} is not a time of day in hours and minutes. "
                    "Write time(8, 30), and name the zone with .timezone()."
                )

    @property
    def text(self) -> str:
        """Such as ``08:00-18:00`` or ``not 22:00-06:00``."""
        return f"{'' if self.inside else 'not '}{self.start:%H:%M}-{self.end:%H:%M}"

    @property
    def minutes(self) -> Bits:
        """The minutes of the day that it lets through, one bit each."""
        start, end = (moment.hour * 60 + moment.minute for moment in (self.start, self.end))
        within = (2 << end) - (1 << start) if start <= end else ALL_DAY ^ ((1 << start) - (2 << end))
        return within if self.inside else ALL_DAY ^ within


@lru_cache(maxsize=4096)
def _open_minutes(windows: tuple[Window, ...]) -> Bits:
    minutes = ALL_DAY
    for window in windows:
        minutes &= window.minutes
    return minutes


@dataclass(frozen=True, slots=True)
class Timetable(_DueTimes):
    """
    A schedule with its restrictions, all of which must hold, on the zone's wall clock at the moment that it is due.

    ``days`` are 0 for Monday to 6 for Sunday. A job that a clock change postponed is judged by the postponed time.
    A window across midnight belongs to no day: with ``days={0}``, 22:00-02:00 is Monday's first two and last two hours.
    """

    base: Cron | Every
    zone: str
    days: frozenset[int] = ALL_DAYS
    windows: tuple[Window, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.base, Cron | Every):
            raise CronError(f"A timetable restricts a Cron or an Every, not {type(self.base).__name__}.")
        _zone_name(self.zone)
        if isinstance(self.base, Cron) and self.base.zone != self.zone:
            raise CronError(
                f"The expression is in {_shown(self.base.zone, 24)} and its restrictions in {_shown(self.zone, 24)}. "
                "Write one zone for both."
            )
        object.__setattr__(self, "days", frozenset(self.days))
        object.__setattr__(self, "windows", tuple(sorted(set(self.windows))))
        if not self.days or not self.days <= ALL_DAYS:
            raise CronError(
                f"The days {_shown(str(sorted(self.days)), 36)} are not weekdays. "
                "Write one or more of 0 (Monday) to 6 (Sunday)."
            )
        if self._restricted:
            self._refuse_never()

    @property
    def _restricted(self) -> bool:
        return bool(self.windows) or self.days != ALL_DAYS

    def _refuse_never(self) -> None:
        minutes = _open_minutes(self.windows)
        if not minutes:
            raise CronError(
                f"The hours {_shown(self._windows_text, 36)} have no minute in common. Write hours that overlap."
            )
        if isinstance(self.base, Every):
            return
        parsed = _parsed_here(self.base.expression)
        if not minutes & _minutes_of_day(parsed.minutes, parsed.hours):
            raise CronError(
                f"{_shown(self.base.expression, 36)} is never due within the hours {_shown(self._windows_text, 36)}. "
                "Write hours that include its times, or other times."
            )
        weekdays = parsed.weekdays | _bits(weekday for weekday, _ in parsed.nth)
        by_weekday = self.base.expression.split()[DAY_OF_MONTH].startswith("*")
        if by_weekday and not any(weekdays >> (day + 1) % 7 & 1 for day in self.days):
            raise CronError(
                f"{_shown(self.base.expression, 36)} is never due on {self._days_text}. "
                "Write the weekdays once: in the expression, or as a restriction."
            )

    def _how(self) -> tuple[_Plan, str]:
        if isinstance(self.base, Cron):
            return _cron_plan(self.base.expression, self.days, self.windows), self.zone
        # An interval without restrictions is the same everywhere, and needs no zone to be looked up.
        return _every_plan(
            self.base.interval // SECOND, self.days, self.windows
        ), self.zone if self._restricted else "UTC"

    @property
    def _days_text(self) -> str:
        return ",".join(_runs(sorted(self.days), DAY_NAMES.__getitem__))

    @property
    def _windows_text(self) -> str:
        return " ".join(window.text for window in self.windows)

    @property
    def text(self) -> str:
        parts = [self.base.text]
        if self._restricted and isinstance(self.base, Every):
            parts.append(self.zone)
        if self.days != ALL_DAYS:
            parts.append(self._days_text)
        if self.windows:
            parts.append(self._windows_text)
        return " ".join(parts)

    @property
    def is_subminute(self) -> bool:
        return self.base.is_subminute

    def shortest_gap(self) -> timedelta:
        if isinstance(self.base, Cron):
            return _cron_gap(self.base.expression, self.days, self.windows)
        return self.base.interval

    def check(self) -> None:
        if self.zone != "UTC":
            _zone(self.zone)
        self.base.check()
        _DueTimes.check(self)
