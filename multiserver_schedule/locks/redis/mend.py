"""
What is to be written, after a loss or a new version? Pure: from what was read, and what is known elsewhere.

A row that was lost is registered anew, as of now, and held back for the longest lease. After a restart every row may be
an older one: none is due for anything before now, and all of them are held back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from ...entries import Row, ScheduledTask
from ..ahead import Reach, held_back_until, set_right
from ..base import Before, Declarations, Following
from ..versions import FORGOTTEN_AFTER, TakeOver, keys, needs_step, registered, taken_over
from .rows import EPOCH, Stored, Version, micros, moment


@dataclass(slots=True)
class Survey:
    """All that the store knows, as a sync finds it."""

    at: datetime
    run_id: str
    state: Mapping[str, str]
    versions: list[Version]
    newest: Mapping[str, str]
    """By scope: the key of the version that took over last."""
    resync: set[str]
    names: set[str]
    rows: Mapping[str, Stored]
    is_whole: bool

    @property
    def was_restarted(self) -> bool:
        return self.state.get("run_id", "") not in ("", self.run_id)

    @property
    def was_emptied(self) -> bool:
        """Or it was never used: nobody can tell."""
        return not self.state.get("run_id")

    @property
    def is_doubtful(self) -> bool:
        """May any row be older than what its owner knows, and any missing one have been there?"""
        return self.was_restarted or self.was_emptied


@dataclass(slots=True)
class Mended:
    """What a sync writes, and what it will tell."""

    changes: dict[str, Stored] = field(default_factory=dict)
    registered: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    lost: dict[str, datetime | None] = field(default_factory=dict)
    missing: int = 0


def needs_mending(declared: Declarations, survey: Survey) -> bool:
    """Is something lost, or may it be, or has another version left some of it for this one to repair?"""
    return not survey.is_whole or survey.is_doubtful or not survey.resync.isdisjoint(keys(declared))


def to_ask_of(declared: Declarations, survey: Survey, changes: Sequence[TakeOver]) -> list[str]:
    """Return the rows of which more may be known elsewhere: only those that this version will have."""
    taken = {name: None for change in changes for name in change.tasks}
    names = [name for name in taken if name not in survey.rows or survey.rows[name].row.moved_to]
    if needs_mending(declared, survey):
        held = _held_scopes(declared, survey, changes)
        names += [
            name
            for name, task in declared.rows.items()
            if name not in survey.rows and _scope(task, declared) in held and name not in taken
        ]
    return names


def mend(
    declared: Declarations,
    survey: Survey,
    changes: Sequence[TakeOver],
    before: Mapping[str, Before],
    lease: timedelta,
) -> Mended:
    """Compute every row that is to be written, and what is to be told of it."""
    mine = declared.rows
    held = _held_scopes(declared, survey, changes)
    taking = {name: change for change in changes for name in change.tasks}
    mends = needs_mending(declared, survey)
    hold = _hold(survey, lease)
    # Whoever adopts this state reports what bears its mark, also what another process wrote and could not adopt.
    mark = f"{survey.run_id}:{survey.state.get('counter', '')}"
    done = Mended()
    for name in sorted(survey.names | set(mine)):
        task = mine.get(name)
        is_mine = task is not None and _scope(task, declared) in held
        stored = survey.rows.get(name)
        if stored is None:
            if not is_mine and name not in survey.names:
                continue
            done.changes[name] = new = _anew(name, task if is_mine else None, survey, before, hold, lease, mark)
            if new.lost:
                done.lost[name] = new.lost_since
                done.missing += 1
            elif is_mine:
                done.registered.append(name)
            continue
        new = stored
        if stored.lost in ("renew", mark):
            done.lost[name] = stored.lost_since
            new = replace(new, lost=mark)
        if survey.is_doubtful and not new.row.moved_to:
            new = _doubted(new, survey, hold, mark)
            done.lost[name] = new.lost_since
        change = taking.get(name)
        # As it was found: the hint that a doubt takes from a row is put back, and is no change of its schedule.
        if task is not None and change is not None and needs_step(stored.row, task):
            since = new.row.last_due_at if not new.row.fingerprint else change.since
            row = taken_over(new.row, task, survey.at, since, _brought(before.get(name)))
            new = replace(new, row=_afresh(row), rerun_up_to=0) if new.row.moved_to else replace(new, row=row)
            done.changed.append(name)
        elif task is not None and mends and not new.row.moved_to:
            new = _repaired(new, task, is_mine)
        if new is not stored or not survey.is_whole or survey.is_doubtful:
            done.changes[name] = new
    return done


def adopted(declared: Declarations, survey: Survey, changes: Sequence[TakeOver], lease: timedelta) -> dict[str, Any]:
    """Return the state of the lock once all rows are written, as ``steps.lua`` takes it."""
    mine = keys(declared)
    forgotten = {
        version.key: version.scope
        for version in survey.versions
        if version.seen_at is not None and version.seen_at < survey.at - FORGOTTEN_AFTER and version.key not in mine
    }
    others = {version.key for version in survey.versions} - set(mine) - set(forgotten)
    # A version that was only flagged repairs its own rows; others need not repair anything again.
    is_first = not survey.is_whole or survey.is_doubtful
    return {
        "newest": dict(survey.newest),
        "versions": [[change.key, change.scope, micros(change.first_seen_at), micros(survey.at)] for change in changes],
        "resync": sorted(others) if is_first else [],
        "done": list(mine),
        "forget": [[key, scope] for key, scope in forgotten.items()],
        "hold": micros(_hold(survey, lease)),
        "runs_end": micros(survey.at + lease),
    }


def trouble(survey: Survey, mended: Mended) -> str:
    """Return how the store came to lose what it lost, for people; "" where nothing was lost."""
    if not mended.lost:
        return ""
    if survey.was_restarted:
        return "the Redis server was restarted, or another one took its place"
    if survey.was_emptied:
        return "the Redis server was emptied" if mended.missing else "the state of the lock was lost"
    rows = len(mended.lost)
    return f"{rows} row{'' if rows == 1 else 's'} of the lock {'was' if rows == 1 else 'were'} lost"


def righted(stored: Stored, reach: Reach, at: datetime, following: Following) -> Stored:
    """Return a row without what a clock that was ahead has left in it; the same one where that is nothing."""
    row, hold = set_right(stored.row, reach, at, following), held_back_until(stored.hold, reach, at)
    if row is stored.row and hold == stored.hold:
        return stored
    is_moved = row.last_due_at != stored.row.last_due_at
    return replace(stored, row=row, hold=hold, rerun_up_to=0 if is_moved else stored.rerun_up_to)


def _anew(
    name: str,
    task: ScheduledTask | None,
    survey: Survey,
    before: Mapping[str, Before],
    hold: datetime,
    lease: timedelta,
    mark: str,
) -> Stored:
    """Return the row of a task that has none: new, come from another store, or lost."""
    known = _believed(before.get(name))
    came = known is not None and known.row is not None
    last = known.last_due_at if known is not None else None
    # A row of a single server that is not missed here has been deleted, although its runs are known.
    may_be_forgotten = "@" in name and survey.is_whole and not survey.is_doubtful
    is_lost = name in survey.names or (last is not None and not came and not may_be_forgotten)
    if task is None:
        # Nobody here knows its schedule, or a newer version's holds: that version takes it from here.
        row = Row(
            pk=0,
            task=name,
            fingerprint="",
            last_due_at=survey.at,
            schedule_since=survey.at,
            next_due_at=None,
            not_before=survey.at,
        )
    else:
        row = _afresh(registered(name, task, survey.at, known))
    if is_lost:
        return Stored(row=row, hold=max(hold, survey.at + lease), lost=mark, lost_since=last)
    # In an emptied store it may have been there before: until the hold is over, that cannot be told.
    return Stored(row=row, hold=hold if hold > survey.at else EPOCH)


def _doubted(stored: Stored, survey: Survey, hold: datetime, mark: str) -> Stored:
    """
    Return a row of a server that may have forgotten its last seconds: nothing before now is due or owed any more.

    A run that was asked for since it knows them again has not been claimed.
    """
    row, at = stored.row, survey.at
    wanted = row.wanted_at if stored.asked.endswith(f":{survey.run_id}") else None
    since = stored.lost_since if stored.lost == mark else row.last_due_at
    following = row.next_due_at if row.next_due_at is not None and row.next_due_at > at else None
    row = replace(row, last_due_at=max(row.last_due_at, at), next_due_at=following, retry_at=None, wanted_at=wanted)
    return replace(stored, row=row, hold=max(stored.hold, hold), rerun_up_to=0, lost=mark, lost_since=since)


def _afresh(row: Row) -> Row:
    """Return a row that is new here, or here again, with nothing owed, asked for or paused."""
    row = replace(row, attempt=1, trigger="schedule", retry_at=None, wanted_at=None)
    return replace(row, paused=False, paused_at=None, paused_reason="")


def _repaired(stored: Stored, task: ScheduledTask, is_mine: bool) -> Stored:
    """Return a row with what this version knows of its schedule, where whoever put the row back did not know it."""
    row = stored.row
    if not row.fingerprint and is_mine:
        row = taken_over(row, task, row.last_due_at)
    if row.fingerprint == task.fingerprint and (row.next_due_at is None or row.next_due_at <= row.last_due_at):
        row = replace(row, next_due_at=task.next(row.since))
    return stored if row == stored.row else replace(stored, row=row)


def _believed(before: Before | None) -> Before | None:
    """
    Take the row from another store, for one that is missing here, only where the history has nothing newer.

    Else the task had moved here long ago, and what is known of it since is the history alone.
    """
    return replace(before, row=None) if before is not None and _is_older(before) else before


def _brought(before: Before | None) -> Before | None:
    """Take the row from another store, for one that was given away, with what the history knows beyond it."""
    if before is None or before.row is None or before.last_due_at is None or not _is_older(before):
        return before
    return replace(before, row=replace(before.row, last_due_at=before.last_due_at))


def _is_older(before: Before) -> bool:
    row, last = before.row, before.last_due_at
    return row is not None and last is not None and last > row.last_due_at


def _hold(survey: Survey, lease: timedelta) -> datetime:
    """Return until when nothing at all may be claimed."""
    return survey.at + lease if survey.is_doubtful else moment(survey.state.get("hold") or "0")


def _held_scopes(declared: Declarations, survey: Survey, changes: Sequence[TakeOver]) -> set[str]:
    """Return the scopes in which this version is the newest, or becomes it now."""
    held = {scope for key, scope in keys(declared).items() if survey.newest.get(scope) == key}
    return held | {change.scope for change in changes}


def _scope(task: ScheduledTask, declared: Declarations) -> str:
    return declared.server if task.on_every_server else ""
