"""What the verbs of ``manage.py schedule`` print: lines of at most 80 columns that read well without colour."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Final
from zoneinfo import ZoneInfo

from multiserver_schedule.logs import distance, short
from multiserver_schedule.operate import Coming, Explanation, Finding, Overview, Righted, words

WIDTH: Final = 80
_SPACE: Final = "\N{NO-BREAK SPACE}"  # where no line is broken
_LABEL: Final = 21
_MOMENT: Final = re.compile(r"\b(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)Z")


def listed(line: Overview, zone: ZoneInfo, *, several: bool) -> str:
    """Return one task of ``schedule list``, with its lock where there are several."""
    later = f", starts {words.of_span(line.offset)} later" if line.offset else ""
    when = "-"
    if line.next_due_at:
        when = f"{_at(line.next_due_at, zone)} (in {distance(line.next_due_at - line.as_of)}{later})"
    # A name is never broken: people copy it.
    lines = _broken(line.name + (f"  [lock{_SPACE}{line.lock}]" if several else ""), indent=4)
    lines += wrapped([f"next {when}", *standing(line, zone)])
    if line.last_status:
        lines += wrapped([f"last {_last(line, zone)}"])
    return "\n".join(lines).replace(_SPACE, " ")


def standing(line: Overview, zone: ZoneInfo, *, alone: bool = False) -> list[str]:
    """
    Say how a task stands: its state with the holder, since when and why it is paused, what it owes.

    Of a task that stands alone it says so of a pause of everything, too: no line above it does.
    """
    state = line.state
    if line.holder:
        until = _at(line.until, zone)
        if until[:10] == _at(line.since, zone)[:10]:
            until = until[11:]
        state += f" on {line.holder} since{_SPACE}{_at(line.since, zone)} until{_SPACE}{until}"
    parts = [state]
    if line.paused_at or line.paused_with_everything:
        # Said with its reason, and so not in the state, too.
        parts = [state.removeprefix("paused").removeprefix(", ")]
        with_everything = " with everything" if line.paused_with_everything else ""
        parts.append(f"paused{with_everything}{_since(line, zone) if alone or not with_everything else ''}")
    if line.overdue_since:
        parts = [f"overdue since{_SPACE}{_at(line.overdue_since, zone)}"]
    if line.server_seen_at:
        which = f" {line.server_seen}" if line.server_seen else ""
        parts.append(f"its server{which} was last seen{_SPACE}{_at(line.server_seen_at, zone)}")
    if line.retry_at:
        parts.append(f"attempt {line.attempt} of {line.attempts} at{_SPACE}{_at(line.retry_at, zone)}")
    if line.wanted_at:
        parts.append(f"a run is asked for since{_SPACE}{_at(line.wanted_at, zone)}")
    return [*filter(None, [*parts, line.note])]


def _last(line: Overview, zone: ZoneInfo) -> str:
    """Say how the last due time went, and how many went so where equal ones are counted together."""
    times = f" x{line.last_count}" if line.last_count > 1 else ""
    because = f" ({_shown_in(zone, line.last_reason)})" if line.last_reason else ""
    return f"{line.last_status.replace('_', ' ')}{times}{because} {_at(line.last_due_at, zone)}"


def _shown_in(zone: ZoneInfo, text: str) -> str:
    """Return what the history says in words, with its times on the clock of a zone."""

    def local(found: re.Match[str]) -> str:
        return _at(datetime.fromisoformat(f"{found[1]}T{found[2]}+00:00"), zone)

    return _MOMENT.sub(local, text)


def everything(line: Overview, zone: ZoneInfo, *, several: bool) -> str:
    """Say that everything is paused, where this line says so of its own."""
    where = f" in the lock {line.lock!r}" if several else ""
    return "\n".join(_broken(f"Everything is paused{where}{_since(line, zone)}", indent=4)).replace(_SPACE, " ")


def _since(line: Overview, zone: ZoneInfo) -> str:
    since = f" since{_SPACE}{_at(line.paused_at, zone)}" if line.paused_at else ""
    return since + (f" ({line.paused_reason})" if line.paused_reason else "")


def coming(line: Coming, now: datetime, zone: ZoneInfo) -> str:
    """Return one line of ``schedule list --next``."""
    said = [line.text]
    if line.kind == "due" and line.at != line.due_at:
        said = [f"due {_at(line.due_at, zone)[11:]}"]
    if line.paused:
        said.append("paused")
    more = f"  ({', '.join(filter(None, said))})" if any(said) else ""
    text = f"{_at(line.at, zone)}  {'in ' + distance(line.at - now):<10}  {line.name}{more}"
    return "\n".join(_broken(text, indent=33)).replace(_SPACE, " ")


def explained(about: Explanation, zone: ZoneInfo | None) -> Iterator[str]:
    """Return the lines of ``schedule explain``: local times in ``zone``, by default the task's."""
    shown = zone or ZoneInfo(about.zone or "UTC")
    yield about.name
    yield from _fact("runs", f"{about.kind} {about.runs}")
    yield from _fact("declared in", about.declared_in)
    yield from _fact("schedule", about.schedule)
    yield from _fact("in words", about.in_words)
    if about.hint:
        yield from _fact("", f"({about.hint})")
    yield from _fact("clock", about.zone or "none: an interval, counted from 1970 in UTC")
    for label, text in about.facts:
        yield from _fact(label, text)
    for line in about.lines:
        where = f" (lock {line.lock!r})" if len(about.lines) > 1 else ""
        yield from _fact(f"now{where}", "; ".join(standing(line, shown, alone=True)))
        if line.last_status:
            yield from _fact("last", _last(line, shown))
    if about.last_skipped:
        yield from _fact("last skipped", _shown_in(zone=shown, text=about.last_skipped))
    if not about.is_meant:
        yield from _fact("", "This server is not one of those that run it.")
    yield ""
    yield "Next due times" + (f" (it starts {words.of_span(about.offset)} after each)" if about.offset else "")
    for moment in about.next:
        yield f"    {_both(moment, shown)}  in {distance(moment - about.as_of)}"
    if not about.next:
        yield "    none"
    change = about.change
    if change is None:
        if about.zone:
            yield ""
            yield f"The clocks of {about.zone} do not change within 13 months."
        return
    yield ""
    yield from _broken(
        f"Next clock change in {about.zone}: {change.before:%Y-%m-%d %H:%M} becomes {change.after:%H:%M}"
        f" ({change.at:%Y-%m-%d %H:%M}Z)",
        indent=4,
    )
    yield from _broken(f"    {change.effect}", indent=8)
    for moment in change.around:
        if moment < change.at:
            yield f"    {_both(moment, shown)}"
    yield "    - then the clocks change -"
    for moment in change.around:
        if moment >= change.at:
            yield f"    {_both(moment, shown)}"


def found(finding: Finding) -> str:
    """Return one line of ``schedule check``."""
    label = {"ok": "ok", "warning": "warning", "problem": "PROBLEM"}[finding.level]
    return "\n".join(_broken(f"{label:<8} {finding.about}: {finding.text}", indent=9))


def righted(row: Righted, *, several: bool) -> Iterator[str]:
    """Return the lines of ``schedule unlock --clock`` about one row: what it had, and what it has now."""
    had = [f"{each.what} was {short(each.was)}, is {short(each.now)}" for each in row.brought]
    if row.runs_end:
        had.append("its runs that may overlap end a lease from now, unless they are renewed")
    if row.released is not None:
        held = row.released.holder
        had.append(f"the lease of {held.server} was until {short(held.until)}, is freed")
    if row.ran_ahead:
        had.append(f"{row.ran_ahead} due time(s) ran ahead of their time, and run again")
    where = f" (lock {row.lock!r})" if several else ""
    text = f"{row.name}{where}: {'; '.join(had)}; next due {short(row.next_due_at)}"
    yield from _broken(text, indent=4)


def at(moment: datetime | None, zone: ZoneInfo) -> str:
    """Return a moment on the clock of a zone, to the second."""
    return _at(moment, zone).replace(_SPACE, " ")


def _at(moment: datetime | None, zone: ZoneInfo) -> str:
    return "-" if moment is None else moment.astimezone(zone).strftime(f"%Y-%m-%d{_SPACE}%H:%M:%S")


def bar(done: int, total: int, text: str) -> str:
    """Return a progress bar, to be printed over the last one."""
    filled = 24 * done // max(1, total)
    line = f"[{'#' * filled}{'.' * (24 - filled)}] {done}/{total} {text}"
    return f"\r{line[: WIDTH - 1]:<{WIDTH - 1}}"


def wrapped(parts: Sequence[str]) -> list[str]:
    """Return the parts on one line if they fit on it, else each on its own, or on as many as it takes."""
    whole = "    " + "; ".join(parts)
    if len(whole) <= WIDTH:
        return [whole]
    return [line for part in parts for line in _broken(f"    {part}", indent=8)]


def as_json(value: Any) -> str:
    """Return JSON: times in UTC, spans in seconds."""
    return json.dumps(_plain(value), indent=2)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, datetime):
        return value.astimezone(timezone.utc).isoformat() if value.tzinfo else value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _both(moment: datetime, zone: ZoneInfo) -> str:
    local = moment.astimezone(zone)
    return f"{local:%a %Y-%m-%d %H:%M:%S} {words.of_offset(local)}  {moment:%Y-%m-%d %H:%M:%S}Z"


def _fact(label: str, text: str) -> Iterable[str]:
    for line in _broken(f"    {label:<{_LABEL - 4}} {text}", indent=_LABEL + 1):
        yield line.replace(_SPACE, " ")


def _broken(text: str, *, indent: int) -> list[str]:
    margin = len(text) - len(text.lstrip())
    return textwrap.wrap(
        text.strip(),
        WIDTH,
        initial_indent=" " * margin,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
        replace_whitespace=False,
    )
