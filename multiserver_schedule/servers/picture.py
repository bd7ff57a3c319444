"""
A small picture of what was wanted and what worked, over a day. Pure: from steps to the text of an SVG.

Without scripts and without styles, so that no policy of a page keeps it from being seen; in colours that hold on light
and dark pages, and for whoever does not tell red from green. Lines differ in their dashes, too, and bear their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from typing import Final

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

WIDTH: Final = 760
HEIGHT: Final = 200
LEFT: Final = 36
"""Left of it stand the counts."""
RIGHT: Final = WIDTH - 100
"""Right of it stand the names of the lines."""
TOP: Final = 14
BOTTOM: Final = HEIGHT - 26
WANTED: Final = "#D55E00"
RUNNING: Final = "#0072B2"
"""Both of the palette of Okabe and Ito, and both with a contrast of 3:1 and more on white and on the admin's dark."""
HOLDS: Final = timedelta(minutes=5)
"""A decision holds until the next one, but not for longer than this: nothing is known of the time after it."""
_APART: Final = 15
_QUARTER: Final = timedelta(minutes=15)


@dataclass(frozen=True, slots=True)
class Step:
    """What was wanted of a type, and worked, from ``at`` until ``until``."""

    at: datetime
    until: datetime
    wanted: int
    running: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps without a gap between them, each until the next one; the last one until ``until``."""

    steps: tuple[Step, ...]
    until: datetime


def stretches(steps: Iterable[Step], since: datetime, until: datetime, holds: timedelta = HOLDS) -> list[Stretch]:
    """Return what lies between two moments; a gap is where nothing was decided for longer than ``holds``."""
    found: list[Stretch] = []
    current: list[Step] = []
    for step in sorted(steps, key=lambda step: step.at):
        if step.until < since or step.at >= until:
            continue
        if current and step.at - current[-1].until > holds:
            found.append(Stretch(tuple(current), current[-1].until))
            current = []
        current.append(Step(max(step.at, since), min(max(step.until, since), until), step.wanted, step.running))
    if current:
        last = current[-1].until
        found.append(Stretch(tuple(current), until if until - last <= holds else last))
    return found


def draw(name: str, steps: Iterable[Step], *, since: datetime, until: datetime, zone: tzinfo, key: str) -> SafeString:
    """Return the picture of one type as SVG, in words as well. ``key`` keeps its ids apart from those of others."""
    shown = stretches(steps, since, until)
    most = max((max(step.wanted, step.running) for stretch in shown for step in stretch.steps), default=0)
    scale = _Scale(since, until, max(1, most))
    return format_html(
        '<svg xmlns="http://www.w3.org/2000/svg" width="100%" height="{height}" viewBox="0 0 {width} {height}" '
        'preserveAspectRatio="xMinYMin meet" role="img" aria-labelledby="{key}-title {key}-desc" '
        'font-size="12" fill="currentColor">'
        '<title id="{key}-title">{title}</title><desc id="{key}-desc">{desc}</desc>{parts}</svg>',
        width=WIDTH,
        height=HEIGHT,
        key=key,
        title=_("%(type)s: servers wanted and running") % {"type": name},
        desc=in_words(shown, since, until, zone),
        parts=_gaps(scale, shown)
        + _axes(scale, zone)
        + _area(scale, shown)
        + _line(scale, shown, "running")
        + _line(scale, shown, "wanted")
        + _names(scale, shown),
    )


def in_words(shown: Sequence[Stretch], since: datetime, until: datetime, zone: tzinfo) -> str:
    """Say what the picture shows."""
    steps = [step for stretch in shown for step in stretch.steps]
    if not steps:
        return _("Nothing was decided from %(since)s to %(until)s.") % {
            "since": _clock(since, zone),
            "until": _clock(until, zone),
        }
    wanted, running = [step.wanted for step in steps], [step.running for step in steps]
    said = [
        _("From %(since)s to %(until)s, %(wanted)s were wanted and %(running)s were running; at last %(now)s.")
        % {
            "since": _clock(since, zone),
            "until": _clock(until, zone),
            "wanted": _range(wanted),
            "running": _range(running),
            "now": _("%(wanted)d and %(running)d") % {"wanted": wanted[-1], "running": running[-1]},
        }
    ]
    said += [
        _("Nothing was decided from %(since)s to %(until)s.") % {"since": _clock(a, zone), "until": _clock(b, zone)}
        for a, b in gaps(shown, since, until)
    ]
    return " ".join(said)


def gaps(shown: Sequence[Stretch], since: datetime, until: datetime) -> Iterator[tuple[datetime, datetime]]:
    """Yield from when to when nothing was decided."""
    before = since
    for stretch in shown:
        if stretch.steps[0].at > before:
            yield before, stretch.steps[0].at
        before = stretch.until
    if before < until:
        yield before, until


@dataclass(frozen=True, slots=True)
class _Scale:
    since: datetime
    until: datetime
    most: int

    def x(self, moment: datetime) -> str:
        share = (moment - self.since) / (self.until - self.since)
        return f"{LEFT + share * (RIGHT - LEFT):.1f}"

    def y(self, count: float) -> str:
        return f"{BOTTOM - count / self.most * (BOTTOM - TOP):.1f}"

    def counts(self) -> range:
        """Return whole numbers for the axis, five at most above zero, at steps that are easy to read."""
        step = next(size * 10**power for power in range(12) for size in (1, 2, 5) if size * 10**power * 5 >= self.most)
        return range(0, self.most + 1, step)

    def hours(self, zone: tzinfo) -> Iterator[tuple[datetime, str]]:
        """Yield every fourth hour by the clock of a zone, some of which are half an hour off."""
        moment = self.since - timedelta(
            minutes=self.since.minute % 15, seconds=self.since.second, microseconds=self.since.microsecond
        )
        while (moment := moment + _QUARTER) <= self.until:
            local = moment.astimezone(zone)
            if local.minute == 0 and local.hour % 4 == 0:
                yield moment, f"{local:%H:%M}"


def _axes(scale: _Scale, zone: tzinfo) -> SafeString:
    counts = format_html_join(
        "",
        '<line x1="{}" x2="{}" y1="{}" y2="{}" stroke="currentColor" stroke-opacity="{}"/>'
        '<text x="{}" y="{}" text-anchor="end" dominant-baseline="middle">{}</text>',
        (
            (LEFT, RIGHT, scale.y(count), scale.y(count), "0.15" if count else "0.5", LEFT - 6, scale.y(count), count)
            for count in scale.counts()
        ),
    )
    hours = format_html_join(
        "",
        '<line x1="{}" x2="{}" y1="{}" y2="{}" stroke="currentColor" stroke-opacity="0.5"/>'
        '<text x="{}" y="{}" text-anchor="middle">{}</text>',
        (
            (scale.x(moment), scale.x(moment), BOTTOM, BOTTOM + 4, scale.x(moment), BOTTOM + 18, text)
            for moment, text in scale.hours(zone)
        ),
    )
    return counts + hours


def _gaps(scale: _Scale, shown: Sequence[Stretch]) -> SafeString:
    return format_html_join(
        "",
        '<rect class="gap" x="{}" y="{}" width="{}" height="{}" fill="currentColor" fill-opacity="0.07"/>',
        (
            (scale.x(a), TOP, f"{float(scale.x(b)) - float(scale.x(a)):.1f}", BOTTOM - TOP)
            for a, b in gaps(shown, scale.since, scale.until)
        ),
    )


def _area(scale: _Scale, shown: Sequence[Stretch]) -> SafeString:
    return format_html_join(
        "",
        '<path d="M{},{} L{} L{},{} Z" fill="{}" fill-opacity="0.2"/>',
        (
            (
                scale.x(stretch.steps[0].at),
                BOTTOM,
                _corners(scale, stretch, "running"),
                scale.x(stretch.until),
                BOTTOM,
                RUNNING,
            )
            for stretch in shown
        ),
    )


def _line(scale: _Scale, shown: Sequence[Stretch], what: str) -> SafeString:
    # A line that is dashed lets the one below it be seen where both are equal.
    look = (WANTED, "6 4") if what == "wanted" else (RUNNING, "none")
    return format_html_join(
        "",
        '<path class="{}" d="M{}" fill="none" stroke="{}" stroke-width="2" stroke-dasharray="{}"/>',
        ((what, _corners(scale, stretch, what), *look) for stretch in shown),
    )


def _corners(scale: _Scale, stretch: Stretch, what: str) -> str:
    """Return the corners of a line that leaps: each count from its step on, until the next one."""
    ends = [*(step.at for step in stretch.steps[1:]), stretch.until]
    corners: list[str] = []
    level = ""
    for step, end in zip(stretch.steps, ends, strict=True):
        now = scale.y(getattr(step, what))
        if now != level:
            # Equal ones in a row, of which only the other line's count changed, are one line.
            corners.append(f"{scale.x(step.at)},{now}")
        else:
            corners.pop()
        corners.append(f"{scale.x(end)},{now}")
        level = now
    return " ".join(corners)


def _names(scale: _Scale, shown: Sequence[Stretch]) -> SafeString:
    if not shown:
        middle = LEFT + (RIGHT - LEFT) // 2, TOP + (BOTTOM - TOP) // 2
        return format_html('<text x="{}" y="{}" text-anchor="middle">{}</text>', *middle, _("nothing decided"))
    last = shown[-1].steps[-1]
    wanted, running = float(scale.y(last.wanted)), float(scale.y(last.running))
    if abs(wanted - running) < _APART:
        # The names would be written over one another.
        upper = min(max((wanted + running - _APART) / 2, TOP), BOTTOM - _APART)
        wanted, running = (upper, upper + _APART) if wanted <= running else (upper + _APART, upper)
    return format_html_join(
        "",
        '<line x1="{}" x2="{}" y1="{}" y2="{}" stroke="{}" stroke-width="2" stroke-dasharray="{}"/>'
        '<text x="{}" y="{}" dominant-baseline="middle">{}</text>',
        (
            (RIGHT + 6, RIGHT + 22, f"{y:.1f}", f"{y:.1f}", colour, dashes, RIGHT + 27, f"{y:.1f}", text)
            for y, colour, dashes, text in (
                (wanted, WANTED, "6 4", _("wanted %d") % last.wanted),
                (running, RUNNING, "none", _("running %d") % last.running),
            )
        ),
    )


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else _("%(low)d to %(high)d") % {"low": low, "high": high}


def _clock(moment: datetime, zone: tzinfo) -> str:
    return f"{moment.astimezone(zone):%Y-%m-%d %H:%M}"
