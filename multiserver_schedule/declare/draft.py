"""
One declaration while it is being said: what was said so far, and the frozen ``ScheduledTask`` that it becomes.

It knows no words: they are in ``when``, ``whether``, ``across`` and ``around``, and each puts what it was told in here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Final, NoReturn, cast
from zoneinfo import ZoneInfo

from ..conf import Settings
from ..cron import Cron, Every, Timetable, Window
from ..entries import Kind, ScheduledTask
from ..exceptions import DeclarationError
from .groups import groups_of, said_with_groups
from .sources import Source

NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,190}")
NAME_RULE: Final = "a name has 1 to 190 letters, digits and '_', '.', ':', '-'"

_EVERY_DAY: Final = frozenset(range(7))
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


class Draft:
    """What one declaration has said so far."""

    __slots__ = (
        "args",
        "complete",
        "cron_text",
        "day_fields",
        "fields",
        "frequency",
        "groups",
        "interval",
        "kind",
        "kwargs",
        "name",
        "restricted_to",
        "said",
        "source",
        "target",
        "time",
        "week_day",
        "windows",
        "zone",
    )

    def __init__(
        self,
        source: Source,
        kind: Kind,
        target: Callable[..., Any] | str | tuple[str, ...] | None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = _NOTHING,
    ) -> None:
        self.source = source
        self.kind: Kind = kind
        self.target = target
        self.args = args
        self.kwargs = kwargs
        self.name = ""
        self.groups = groups_of(source)
        self.complete = False
        """Its module has been imported: nothing more can be said."""
        self.said: list[str] = []
        """The words, in their order."""
        self.fields: dict[str, Any] = {}
        """Fields of ``ScheduledTask`` by their names: where a new word puts what it was told."""
        self.frequency = ""
        """The word that gave the frequency; one of the next three holds it."""
        self.cron_text = ""
        self.day_fields = ""
        """Day of month, month and day of week, of what has one time of day; the last is left out by a weekly one."""
        self.interval: timedelta | None = None
        self.time: tuple[int, int] | None = None
        """Hour and minute."""
        self.week_day: int | None = None
        """The day of a weekly one. Monday is 0, as everywhere in Python."""
        self.restricted_to: frozenset[int] = _EVERY_DAY
        """Days of the week."""
        self.windows: tuple[Window, ...] = ()
        self.zone = ""

    def __str__(self) -> str:
        if self.name:
            return f"task {self.name!r}"
        if self.kind == "command":
            return f"schedule.command({self.target!r})"
        if self.kind == "exec":
            return f"schedule.exec({list(cast('tuple[str, ...]', self.target))!r})"
        if self.target is None:
            return "schedule.task()"
        if isinstance(self.target, str):
            return f"schedule.call({self.target!r})"
        return f"the task {getattr(self.target, '__qualname__', None) or repr(self.target)}"

    def fail(self, wrong: str, instead: str, cause: BaseException | None = None) -> NoReturn:
        """Raise a DeclarationError: where it is, which task, what is wrong and what to write instead."""
        raise self.error(f"{wrong}. {instead}") from cause

    def error(self, text: str) -> DeclarationError:
        """Return the error that says this of this declaration."""
        return DeclarationError(f"{self.source}: {self}: {text}")

    def finish(self, label: str, settings: Settings) -> ScheduledTask:
        """
        Return the task; ``label`` starts its name where none was given.

        Raises DeclarationError for what only the whole declaration shows: no frequency, contradictions, a bad cron.
        """
        if not self.groups:
            return self._task(label, settings)
        try:
            return said_with_groups(self)._task(label, settings)
        except DeclarationError as error:
            where = " and ".join(str(group.source) for group in self.groups)
            raise DeclarationError(f"{error} (It is in the group of {where}.)") from error

    def _task(self, label: str, settings: Settings) -> ScheduledTask:
        if self.target is None:
            self.fail("it decorates no function", "Write @schedule.task() and its words in the line above a function.")
        if not self.frequency:
            self.fail(
                "it has no frequency",
                "Say when it is due, as in .hourly() or .daily_at('03:00'). Was a pair of parentheses forgotten, "
                "as in .hourly for .hourly()?",
            )
        name = self.name or self._default_name(label)
        timetable = self._timetable(settings)
        if self.fields:
            self._agree(timetable, settings)
        return ScheduledTask(
            name=name,
            kind=self.kind,
            target=self.target,
            args=self.args,
            kwargs=MappingProxyType(dict(self.kwargs)) if self.kwargs else _NOTHING,
            timetable=timetable,
            file=self.source.file,
            line=self.source.line,
            module=self.source.module,
            **self.fields,
        )

    def _default_name(self, label: str) -> str:
        target = self.target
        if self.kind == "exec":
            last = re.split(r"[\\/]", cast("tuple[str, ...]", target)[0])[-1]
        elif isinstance(target, str):
            last = target if self.kind == "command" else re.split(r"[.:]", target)[-1]
        else:
            qualified = getattr(target, "__qualname__", "")
            if not qualified or "<" in qualified:
                what = "a lambda" if "<lambda>" in qualified else "a nested function" if qualified else "an object"
                self.fail(f"{what} gives the task no name that it could keep", 'Give it one: .name("…").')
            last = qualified.rpartition(".")[2]
        name = f"{label}.{last}"
        if not NAME.fullmatch(name):
            self.fail(f"its name would be {name!r}", f'Give it another, .name("…"): {NAME_RULE}.')
        return name

    def _timetable(self, settings: Settings) -> Timetable:
        zone = self.zone or settings.time_zone
        if self.time is not None and not self.day_fields:
            self.fail(
                f".at() does not go with .{self.frequency}()",
                "It sets the time of a schedule of a day or longer with one time a day: .daily().at('13:00').",
            )
        days, text = self.restricted_to, self.cron_text
        if self.day_fields:
            text = self.day_fields
            if text.count(" ") == 1:
                text, days = f"{text} {(self._week_day() + 1) % 7}", _EVERY_DAY
            hour, minute = self.time or (0, 0)
            text = f"{minute} {hour} {text}"
        try:
            return _timetable(self.interval or text, zone, days, self.windows)
        except ValueError as error:
            raise self.error(f".{self.frequency}(): {error}") from error

    def _week_day(self) -> int:
        """Return the day of a weekly schedule: what it was given, or the one that it is restricted to, or Sunday."""
        allowed = self.restricted_to
        if self.week_day is not None:
            if self.week_day not in allowed:
                self.fail(".weekly_on() is on a day that a restriction leaves out: it would never run", "Keep one.")
            return self.week_day
        if allowed == _EVERY_DAY:
            return 6
        if len(allowed) > 1:
            self.fail(".weekly() is one day a week, and several are named", "Write .daily() with these days.")
        return next(iter(allowed))

    def _agree(self, timetable: Timetable, settings: Settings) -> None:
        """Refuse what does not go with the period or with the settings."""
        lock: str = self.fields.get("lock", "default")
        min_break: timedelta | None = self.fields.get("min_break")
        lease: timedelta | None = self.fields.get("lease")
        if lock not in settings.locks:
            known = ", ".join(map(repr, sorted(settings.locks)))
            self.fail(
                f".lock_with({lock!r}) names no lock", f"Write one of {known}, or add it to LOCKS in the settings."
            )
        if min_break is not None and min_break >= (gap := timetable.shortest_gap()):
            self.fail(
                f"min_break={min_break} is not under its period, {gap}: due times would be lost",
                "Make the break shorter, or leave it out.",
            )
        for word, field in (("jitter", "jitter"), ("retry", "backoff")):
            given: timedelta | None = self.fields.get(field)
            if given is not None and given >= (gap := timetable.shortest_gap()):
                self.fail(
                    f".{word}(): {given} is not under its period, {gap}: the next due time would be first",
                    f"Make the {field} shorter.",
                )
        if self.fields.get("overlap") == "allow" and self.fields.get("rerun"):
            self.fail(
                '.on_crash("rerun") contradicts .overlap("allow"): its due times do not wait for one another',
                "Keep one of them.",
            )
        if lease is not None and lease <= 2 * settings.heartbeat:
            self.fail(
                f"lease={lease} is not more than twice the HEARTBEAT of the settings, {settings.heartbeat}",
                "Make it longer; three heartbeats are a good value. It is renewed for as long as a run takes.",
            )


@functools.lru_cache(maxsize=4096)
def _timetable(when: str | timedelta, zone: str, days: frozenset[int], windows: tuple[Window, ...]) -> Timetable:
    """Return a timetable; equal ones are one, as most tasks of a large project share their schedule with others."""
    base = Every(when) if isinstance(when, timedelta) else Cron(when, zone)
    return Timetable(base, zone, days=days, windows=windows)


@functools.cache
def known_zone(key: str) -> bool:
    """Say whether the zone database has this name; each is opened once."""
    try:
        ZoneInfo(key)
    except (KeyError, ValueError, OSError):
        return False
    return True
