"""
A schedule in words: five-field expressions by the library cron-descriptor, everything else by us.

Where the library would say something that is not so (both day fields, several ``5#2``, a range of hours), it is asked
for parts that it says well. The one module that imports it, and only when somebody asks.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from itertools import groupby
from typing import Final

from ..cron import ALL_DAYS, Cron, Every, Timetable, Window
from ..entries import DueTimes

NO_WORDS: Final = 'Words for cron expressions: pip install "multiserver-schedule[explain]"'
_DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_UNITS: Final = ((86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second"))


def of_schedule(timetable: DueTimes) -> tuple[str, str]:
    """Return a schedule in words, with its restrictions, and how to have more words where some are missing ("")."""
    base = timetable.base if isinstance(timetable, Timetable) else timetable
    hint = ""
    if isinstance(base, Cron):
        words = of_cron(base.expression)
        hint = "" if words else NO_WORDS
        parts = [words or base.expression]
    elif isinstance(base, Every):
        parts = [f"Every {_count(base.interval)}"]
    else:
        parts = [timetable.text]
    if isinstance(timetable, Timetable):
        if timetable.days != ALL_DAYS:
            parts.append(f"if it is {of_days(sorted(timetable.days))}")
        parts += [of_window(window) for window in timetable.windows]
    return ", ".join(parts), hint


def of_cron(expression: str) -> str:
    """Return an expression in its canonical spelling in words; "" without the library, or where it fails."""
    minute, hour, dom, month, dow = expression.split()
    if dom != "*" and not dom.startswith("*/") and dow != "*" and not dow.startswith("*/"):
        # Either is enough, which the library calls "and" or "or" from version to version.
        days = [(dom, "*"), ("*", dow)]
    elif "," in dow and ("#" in dow or "L" in dow):
        days = [(dom, one) for one in dow.split(",")]
    else:
        days = [(dom, dow)]
    said = [_of_days_and_clock(minute, hour, dom, month, dow) for dom, dow in days]
    if not all(said):
        return ""
    return "; and ".join([said[0], *(text[0].lower() + text[1:] for text in said[1:])])


def _of_days_and_clock(minute: str, hour: str, dom: str, month: str, dow: str) -> str:
    if minute.isdigit() and "-" in hour and "/" not in hour:
        days = _described(f"0 0 {dom} {month} {dow}")
        if not days.startswith("At 00:00"):
            return ""
        minutes = "minute" if minute == "1" else "minutes"
        hours = joined(_through(part) for part in hour.split(","))
        return f"At {minute} {minutes} past the hours {hours}{days.removeprefix('At 00:00')}"
    return _described(f"{minute} {hour} {dom} {month} {dow}")


def _through(hours: str) -> str:
    return " through ".join(f"{int(hour):02}" for hour in hours.split("-"))


def _described(expression: str) -> str:
    try:
        from cron_descriptor import Options, get_description
    except ImportError:
        return ""
    try:
        with warnings.catch_warnings():
            # That no locale is set is no news: the language is given.
            warnings.simplefilter("ignore")
            options = Options()
            options.locale_code = "en_US"
            options.use_24hour_time_format = True
            return " ".join(str(get_description(expression, options)).split())
    except Exception:  # whatever it raises for what it does not know: the expression itself is shown
        return ""


def of_days(days: Sequence[int]) -> str:
    """Return weekdays (0 is Monday) in words: "Monday to Friday", "Monday, Wednesday or Friday"."""
    runs = []
    for _, group in groupby(enumerate(days), key=lambda pair: pair[1] - pair[0]):
        run = [day for _, day in group]
        runs += [f"{_DAYS[run[0]]} to {_DAYS[run[-1]]}"] if len(run) > 2 else [_DAYS[day] for day in run]
    return joined(runs, "or")


def of_window(window: Window) -> str:
    """Return hours of the day in words."""
    between = f"between {window.start:%H:%M} and {window.end:%H:%M}"
    if window.start > window.end:
        between += " of the next day"
    return f"{'only' if window.inside else 'not'} {between}, both included"


def joined(parts: Iterable[str], word: str = "and") -> str:
    """Return "a, b and c"."""
    *first, last = list(parts) or [""]
    return f"{', '.join(first)} {word} {last}" if first else last


def of_span(span: timedelta) -> str:
    """Return a span of time in words that say all of it: "1 h 30 min", "90 s" as "1 min 30 s"."""
    seconds = span.total_seconds()
    if seconds < 60 and seconds != int(seconds):
        return f"{seconds:.1f} s"
    left = round(seconds)
    parts = []
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts) or "0 s"


def of_offset(moment: datetime) -> str:
    """Return the offset of an aware moment from UTC: "+02:00"."""
    return re.sub(r"(\d\d)(\d\d)$", r"\1:\2", f"{moment:%z}")


def _count(interval: timedelta) -> str:
    seconds = round(interval.total_seconds())
    size, unit = next((size, unit) for size, unit in _UNITS if seconds % size == 0)
    count = seconds // size
    return unit if count == 1 else f"{count} {unit}s"
