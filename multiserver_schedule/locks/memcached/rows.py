"""
What does an item hold, what may be done to it, and what is it then? Pure: what is to be written, others write.

Whoever judges by the clock takes its lower bound, and whoever writes a time that others are to wait for the upper one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from ...entries import Claim, Cleanup, Occurrence, ReleasedClaim, Row, ScheduledTask, Skip
from ..base import Before
from ..versions import registered, taken_over

PART_BYTES: Final = 400_000
"""Names that go into one item, which the server limits to 1 MB (less, with ``-I``)."""
MOST_REAPED: Final = 100
"""Clean-ups that a row keeps until they are recorded: further ones drop the oldest, which the log then names."""
RELEASED_KEPT: Final = 16
"""Released owners that the row of a task that may overlap remembers; others remember the last one."""
STATE: Final = "state"

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND: Final = timedelta(microseconds=1)
_ROW: Final = "row:"
_PART: Final = "names:"
_RUN: Final = ("owner", "owner_fence", "server", "due_at", "acquired_at", "renewed_at", "expires_at", "finish_by")
_SCHEDULE: Final = ("fingerprint", "schedule_since", "next_due_at", "not_before", "moved_to", "moved_from")
_ALWAYS: Final = ("fingerprint", "fence", "last_due_at", "schedule_since", "not_before")

Kept = dict[str, Any]
"""
What an item holds, as JSON; times are microseconds since 1970, and what is empty is left out.

A row: ``task``, ``fingerprint`` ("" until the version that holds the task has put a lost row right), ``last_due_at``,
``schedule_since``, ``next_due_at``, ``not_before``, ``hold_until``, ``fence``, ``paused_at``, ``moved_to``,
``moved_from``; of the run under way ``owner``, ``owner_fence``, ``server``, ``due_at``, ``acquired_at``,
``renewed_at``, ``expires_at``, ``finish_by``; ``runs`` that may overlap, by owner, with a fence each; ``released`` and
``freed`` (owners), ``stamp`` (of the last skip), ``blank`` (nobody knew the schedule when ``next_due_at`` was to be
computed), ``reaped`` (clean-ups).

The state: ``pid`` and ``started`` of the server that it was written to, ``since``, ``versions``, ``paused_at``,
``interrupted_at``. A part of the directory: ``names``, ``more``. A server: ``owners`` of its slots, and until when.
"""
Step = Callable[["Kept | None", "Read"], tuple["Kept | None", Any]]
"""What becomes of an item (None: nothing), and what to say of it when that is written."""


@dataclass(frozen=True, slots=True)
class Moment:
    """N, as far as it is known, and which run of the server said so."""

    lower: int
    upper: int
    past: int
    """No due time was ever claimed after this moment, not even by the clock of a server that was restarted since."""
    pid: int
    started: int


@dataclass(slots=True)
class Read:
    """Items as they were read, with the tokens that let them be changed over the same connection."""

    moment: Moment
    at: float
    """Boot time before the first of them was asked for."""
    connection: int
    found: dict[str, tuple[Kept, bytes]] = field(default_factory=dict)

    def get(self, key: str) -> Kept | None:
        """Return the item of this name, or None where there is none."""
        found = self.found.get(key)
        return None if found is None else found[0]

    def row(self, name: str) -> Kept | None:
        """Return the row of this name, or None where there is none."""
        return self.get(row_key(name))

    def rows(self) -> Iterator[tuple[str, Kept]]:
        """Yield the key and the row of each row that was found."""
        return ((key, kept) for key, (kept, _) in self.found.items() if is_row(key))

    @property
    def is_sound(self) -> bool:
        """Is there a state, written during this run of the server? Else nobody claims before ``sync``."""
        state = self.get(STATE)
        return state is not None and not was_restarted(state, self.moment)


# -- items by name ----------------------------------------------------------------------------------------------------


def row_key(name: str) -> str:
    """Name the item of this row."""
    return f"{_ROW}{name}"


def row_keys(names: Iterable[str]) -> list[str]:
    """Name the items of these rows, each once."""
    return [row_key(name) for name in dict.fromkeys(names)]


def is_row(key: str) -> bool:
    """Is this item a row?"""
    return key.startswith(_ROW)


def part_key(index: int) -> str:
    """Name the item of this part of the directory."""
    return f"{_PART}{index}"


def server_key(server: str) -> str:
    """Name the item that counts what runs on this server."""
    return f"server:{server}"


def scope_of(name: str) -> str:
    """Return the server whose own row this is; "" where all servers have it."""
    return name.partition("@")[2]


def encoded(kept: Kept) -> bytes:
    """Return an item as it is written."""
    # An item of a task that rests is small so, and a look reads them all.
    full = {key: value for key, value in kept.items() if value or key in _ALWAYS}
    return json.dumps(full, separators=(",", ":")).encode()


# -- times ------------------------------------------------------------------------------------------------------------


def micros(moment: datetime) -> int:
    """Return a time as an item has it."""
    return (moment - _EPOCH) // _MICROSECOND


def micros_or_none(moment: datetime | None) -> int | None:
    """Return a time as an item has it, if there is one."""
    return None if moment is None else micros(moment)


def length(distance: timedelta) -> int:
    """Return a length of time as an item has it."""
    return distance // _MICROSECOND


def time_of(kept: int) -> datetime:
    """Return the time that an item has so."""
    return _EPOCH + timedelta(microseconds=kept)


def time_or_none(kept: int | None) -> datetime | None:
    """Return the time that an item has so, if there is one."""
    return None if kept is None else time_of(kept)


# -- a row, as others see it ------------------------------------------------------------------------------------------


def as_row(kept: Kept) -> Row:
    """Return a row as plans and people see it: a hold makes them wait, like a break."""
    return Row(
        pk=0,
        task=kept["task"],
        fingerprint=kept["fingerprint"],
        last_due_at=time_of(kept["last_due_at"]),
        schedule_since=time_of(kept["schedule_since"]),
        next_due_at=time_or_none(kept.get("next_due_at")),
        not_before=time_of(max(kept["not_before"], kept.get("hold_until") or 0)),
        owner=kept.get("owner"),
        server=kept.get("server") or "",
        fence=kept["fence"],
        acquired_at=time_or_none(kept.get("acquired_at")),
        renewed_at=time_or_none(kept.get("renewed_at")),
        expires_at=time_or_none(kept.get("expires_at")),
        paused=bool(kept.get("paused_at")),
        moved_to=kept.get("moved_to") or "",
        moved_from=kept.get("moved_from") or "",
    )


def from_row(row: Row) -> Kept:
    """Return what is kept of a row that nobody holds."""
    return {
        "task": row.task,
        "fingerprint": row.fingerprint,
        "last_due_at": micros(row.last_due_at),
        "schedule_since": micros(row.schedule_since),
        "next_due_at": micros_or_none(row.next_due_at),
        "not_before": micros(row.not_before),
        "fence": row.fence,
        "moved_to": row.moved_to,
        "moved_from": row.moved_from,
    }


def _as_cleanup(task: str, values: Kept) -> Cleanup:
    return Cleanup(
        task=task,
        due_at=time_or_none(values.get("due_at")),
        server=values["server"],
        owner=values["owner"],
        fence=values["fence"],
        acquired_at=time_or_none(values.get("acquired_at")),
        expired_at=time_or_none(values.get("expired_at")),
        cleaned_at=time_of(values["cleaned_at"]),
        cleaned_by=values["cleaned_by"],
        reason=values["reason"],
    )


# -- the runs of a row ------------------------------------------------------------------------------------------------


def runs_of(kept: Kept) -> dict[str, Kept]:
    """Return what runs, by owner: who holds the row (then the run is the row itself), and those that may overlap."""
    holder = {kept["owner"]: kept} if kept.get("owner") else {}
    return holder | (kept.get("runs") or {})


def holds(kept: Kept, owner: str) -> bool:
    """Has this owner a run here?"""
    return owner in runs_of(kept)


def has_ended(kept: Kept, lower: int) -> bool:
    """Is there something to reap, or to record?"""
    return bool(kept.get("reaped")) or any(run["expires_at"] <= lower for run in runs_of(kept).values())


def claim_of(kept: Kept, owner: str, occurrence: Occurrence) -> Claim:
    """Return the claim of this owner, which has a run here."""
    run = runs_of(kept)[owner]
    return Claim(
        occurrence=occurrence,
        owner=owner,
        fence=_fence_of(kept, run),
        server=run["server"],
        acquired_at=time_of(run["acquired_at"]),
        expires_at=time_of(run["expires_at"]),
        finish_by=time_or_none(run.get("finish_by")),
    )


def _fence_of(kept: Kept, run: Kept) -> int:
    """Return the fence of a run: the row's own may have risen since, where the run came back to a row that was lost."""
    fence: int = kept["owner_fence"] if run is kept else run["fence"]
    return fence


def _with_run(kept: Kept, occurrence: Occurrence, owner: str, fence: int, run: Kept) -> Kept:
    if occurrence.may_overlap:
        return {**kept, "runs": {**(kept.get("runs") or {}), owner: {**run, "fence": fence}}}
    return {**kept, **run, "owner": owner, "owner_fence": fence}


def _without_run(kept: Kept, owner: str) -> Kept:
    if kept.get("owner") == owner:
        return {**kept, **dict.fromkeys(_RUN)}
    return {**kept, "runs": {each: run for each, run in kept["runs"].items() if each != owner}}


# -- claim and skip ---------------------------------------------------------------------------------------------------


def may_start(kept: Kept | None, occurrence: Occurrence, lower: int, state: Kept) -> bool:
    """May this be claimed, as far as its row says?"""
    if kept is None or _is_elsewhere(kept) or (kept.get("hold_until") or 0) > lower:
        return False
    if kept.get("owner") and not occurrence.may_overlap:
        return False
    if occurrence.is_by_hand:
        return True
    return bool(_is_open(kept, occurrence, lower, state) and kept["not_before"] <= lower)


def claimed(kept: Kept, occurrence: Occurrence, owner: str, server: str, moment: Moment) -> Kept:
    """Let this owner run it; unless by hand, its due time is done from here on."""
    limit = occurrence.task.limit
    fence = max(kept["fence"] + 1, moment.lower)
    run = {
        "server": server,
        "due_at": micros(occurrence.due_at),
        "acquired_at": moment.lower,
        "renewed_at": moment.lower,
        "expires_at": moment.upper + length(occurrence.lease),
        "finish_by": None if limit is None else moment.upper + length(limit),
    }
    kept = {**_with_run(kept, occurrence, owner, fence, run), "fence": fence}
    return kept if occurrence.is_by_hand else _moved_on(kept, occurrence)


def skipped(skip: Skip, stamp: str, kept: Kept | None, read: Read) -> tuple[Kept | None, tuple[Skip, int] | None]:
    """Give up a due time; the stamp tells who did that although the answer was lost."""
    occurrence, lower, state = skip.occurrence, read.moment.lower, read.get(STATE)
    if kept is None or state is None or not read.is_sound:
        return None, None
    told = skip
    if skip.reason == "held":
        told = replace(skip, holder=kept.get("server") or "", held_since=time_or_none(kept.get("acquired_at")))
    due_at = micros(occurrence.due_at)
    if kept.get("stamp") == stamp and kept["last_due_at"] == due_at:
        return None, (told, lower)
    if not _is_open(kept, occurrence, lower, state) or _is_elsewhere(kept):
        return None, None
    stands = kept.get("owner") and kept["expires_at"] > lower and kept["renewed_at"] >= due_at
    if skip.reason == "held" and not stands:
        # A holder that has not renewed since may be dead: then the due time is still wanted.
        return None, None
    return {**_moved_on(kept, occurrence), "stamp": stamp}, (told, lower)


def _is_open(kept: Kept, occurrence: Occurrence, lower: int, state: Kept) -> bool:
    """Is the due time still to be had, under this schedule, with nothing paused?"""
    due_at = micros(occurrence.due_at)
    return (
        kept["last_due_at"] < due_at <= lower
        and kept["fingerprint"] == occurrence.task.fingerprint
        and not kept.get("paused_at")
        and not state.get("paused_at")
    )


def _is_elsewhere(kept: Kept) -> bool:
    """Has another store the task, or still a run of it?"""
    return bool(kept.get("moved_to") or kept.get("moved_from"))


def _moved_on(kept: Kept, occurrence: Occurrence) -> Kept:
    following = micros_or_none(occurrence.next_due_at)
    return {**kept, "last_due_at": micros(occurrence.due_at), "next_due_at": following}


# -- renew and release ------------------------------------------------------------------------------------------------


def may_return(kept: Kept | None, claim: Claim, stands_until: int, lower: int) -> bool:
    """May an owner whose row was lost be put back? Its lease must stand, and nobody can have claimed since."""
    if stands_until <= lower:
        return False
    if kept is None:
        return True
    if (kept.get("hold_until") or 0) <= lower:
        return False
    if claim.owner == kept.get("freed") or was_released(kept, claim.owner):
        return False
    return claim.occurrence.may_overlap or not kept.get("owner") or _fence_of(kept, kept) < claim.fence


def returned(kept: Kept, claim: Claim) -> Kept:
    """Put back an owner whose run was lost with its row; whoever renews or releases it says until when."""
    occurrence = claim.occurrence
    run = {
        "server": claim.server,
        "due_at": micros(occurrence.due_at),
        "acquired_at": micros(claim.acquired_at),
        "finish_by": micros_or_none(claim.finish_by),
    }
    kept = _with_run(kept, occurrence, claim.owner, claim.fence, run)
    last = kept["last_due_at"]
    if not occurrence.is_by_hand:
        last = max(last, micros(occurrence.due_at))
    return {**kept, "last_due_at": last, "fence": max(kept["fence"], claim.fence)}


def renewed(kept: Kept, claim: Claim, moment: Moment) -> tuple[Kept, int]:
    """Put off the end of this claim's lease, and say until when it stands."""
    expires_at = moment.upper + length(claim.occurrence.lease)
    values = {"renewed_at": moment.lower, "expires_at": expires_at}
    if kept.get("owner") == claim.owner:
        return {**kept, **values}, expires_at
    runs = kept["runs"]
    return {**kept, "runs": {**runs, claim.owner: {**runs[claim.owner], **values}}}, expires_at


def was_released(kept: Kept | None, owner: str) -> bool:
    """Was this owner's release written before, and its answer lost?"""
    return owner in ((kept or {}).get("released") or ())


def freed(kept: Kept, item: ReleasedClaim, moment: Moment) -> Kept:
    """End a run that was released: its break begins, and its owner is remembered."""
    owner, may_overlap = item.claim.owner, item.claim.occurrence.may_overlap
    most = RELEASED_KEPT if may_overlap else 1
    kept = {**_without_run(kept, owner), "released": [*(kept.get("released") or ()), owner][-most:]}
    if item.outcome.started and item.min_break and not may_overlap:
        kept["not_before"] = moment.upper + length(item.min_break)
    return kept


# -- what runs on a server --------------------------------------------------------------------------------------------


def owners_of(kept: Kept | None) -> dict[str, int]:
    """Return who has a slot of this server, and until when."""
    return (kept or {}).get("owners") or {}


def slots_renewed(claims: Sequence[Claim], kept: Kept | None, read: Read) -> tuple[Kept, None]:
    """Put off the end of what these claims take of their server's slots; a row that was lost is made anew."""
    owners = {owner: until for owner, until in owners_of(kept).items() if until > read.moment.lower}
    owners |= {claim.owner: read.moment.upper + length(claim.occurrence.lease) for claim in claims}
    return {"owners": owners}, None


def slots_freed(gone: Collection[str], kept: Kept | None, read: Read) -> tuple[Kept | None, None]:
    """Give back the slots of these owners."""
    owners = owners_of(kept)
    left = {owner: until for owner, until in owners.items() if owner not in gone}
    return ({"owners": left} if len(left) < len(owners) else None), None


# -- reap and free ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reaped:
    """What a row has to say of runs that were ended from outside."""

    freed: Sequence[Cleanup] = ()
    """By this step."""
    unrecorded: Sequence[Cleanup] = ()
    """These, and those before that nobody has recorded."""
    dropped: Sequence[Cleanup] = ()
    """Of the unrecorded, those that the row has no room for."""


def reaped(server: str, kept: Kept | None, read: Read) -> tuple[Kept | None, Reaped]:
    """Free what has ended, and keep in the row what that was until it is recorded."""
    if kept is None:
        return None, Reaped()
    lower = read.moment.lower
    ended = {owner: run for owner, run in runs_of(kept).items() if run["expires_at"] <= lower}
    if not ended:
        return None, Reaped(unrecorded=[_as_cleanup(kept["task"], values) for values in kept.get("reaped") or ()])
    return _ended(kept, ended, server, lower)


def freed_by_hand(owner: str | None, server: str, kept: Kept | None, read: Read) -> tuple[Kept | None, Reaped]:
    """Free what is held (with ``owner``: by nobody else), whether its lease has ended or not. Its owner stays out."""
    holder = (kept or {}).get("owner")
    if kept is None or not holder or owner not in (None, holder):
        return None, Reaped()
    kept, said = _ended(kept, {holder: kept}, server, read.moment.lower, by_hand=True)
    return {**kept, "freed": holder}, said


def _ended(kept: Kept, runs: dict[str, Kept], server: str, lower: int, *, by_hand: bool = False) -> tuple[Kept, Reaped]:
    task = kept["task"]
    freed: list[Kept] = []
    for owner, run in runs.items():
        overran = bool(run.get("finish_by")) and run["finish_by"] <= lower
        freed.append(
            {
                "due_at": run.get("due_at"),
                "server": run["server"],
                "owner": owner,
                "fence": _fence_of(kept, run),
                "acquired_at": run["acquired_at"],
                "expired_at": run["expires_at"],
                "cleaned_at": lower,
                "cleaned_by": server,
                "reason": "released_by_hand" if by_hand else "overran" if overran else "lease_expired",
            }
        )
    listed = [*(kept.get("reaped") or ()), *freed]
    for owner in runs:
        kept = {**_without_run(kept, owner), "fence": kept["fence"] + 1}
    cleanups = [_as_cleanup(task, values) for values in listed]
    said = Reaped(freed=cleanups[-len(freed) :], unrecorded=cleanups, dropped=cleanups[:-MOST_REAPED])
    return {**kept, "reaped": listed[-MOST_REAPED:]}, said


def recorded(owners: Collection[str], kept: Kept | None, read: Read) -> tuple[Kept | None, None]:
    """Forget the clean-ups of these owners, which are recorded."""
    listed = (kept or {}).get("reaped") or []
    left = [values for values in listed if values["owner"] not in owners]
    return (None if kept is None or len(left) == len(listed) else {**kept, "reaped": left}), None


# -- from store to store ----------------------------------------------------------------------------------------------


def given_away(to: str, kept: Kept | None, read: Read) -> tuple[Kept | None, Row | None]:
    """Give a row to another store, unless a third one has it."""
    if kept is None or (kept.get("moved_to") or to) != to:
        return None, None
    if kept.get("moved_to"):
        return None, as_row(kept)
    kept = {**kept, "moved_to": to}
    return kept, as_row(kept)


def arrived(kept: Kept | None, read: Read) -> tuple[Kept | None, None]:
    """Let a row be claimed here: what ran in the store that it came from has ended."""
    return ({**kept, "moved_from": ""} if kept is not None and kept.get("moved_from") else None), None


def usable(before: Before | None, kept: Kept | None = None) -> Before | None:
    """
    Pass over a row elsewhere that this store has been ahead of.

    The history is, where the task was here since, and this store has lost it; or it runs here now.
    """
    if before is None or before.row is None:
        return before
    was_here = before.last_due_at is not None and before.last_due_at > before.row.last_due_at
    return replace(before, row=None) if was_here or (kept is not None and runs_of(kept)) else before


# -- another schedule, and what was lost ------------------------------------------------------------------------------


def rescheduled(kept: Kept, task: ScheduledTask, back: datetime | None, known: Before | None, moment: Moment) -> Kept:
    """Put a row under the schedule of this task: from now on, or since ``back``."""
    values = from_row(taken_over(as_row(kept), task, time_of(moment.lower), back, known))
    if kept.get("moved_to") and known is not None and known.last_due_at is not None:
        # Should the other store have lost its row: the history does not forget.
        values["last_due_at"] = max(values["last_due_at"], micros(known.last_due_at))
    return {**kept, **{each: values[each] for each in (*_SCHEDULE, "last_due_at", "fence")}, "blank": None}


def blank(name: str, moment: Moment, longest: timedelta) -> Kept:
    """Return a row in the place of a lost one whose schedule is unknown here: nobody claims it as it is."""
    return {
        "task": name,
        "fingerprint": "",
        "last_due_at": moment.past,
        "schedule_since": moment.past,
        "not_before": moment.lower,
        "hold_until": moment.upper + length(longest),
        "fence": moment.past,
    }


def filled(kept: Kept, task: ScheduledTask, known: Before | None, moment: Moment, longest: timedelta) -> Kept:
    """Put a blank row under the schedule of its task: what was due until now counts as done."""
    fresh = from_row(registered(kept["task"], task, time_of(moment.past), known))
    return {
        **kept,
        **{each: fresh[each] for each in _SCHEDULE},
        "last_due_at": max(kept["last_due_at"], fresh["last_due_at"]),
        "fence": max(kept["fence"], fresh["fence"]),
        "hold_until": max(kept["hold_until"], moment.upper + length(longest)),
    }


def held_back(kept: Kept, task: ScheduledTask | None, moment: Moment, longest: timedelta) -> Kept:
    """Hold a row that outlived a restart of the server: what was due until now counts as done."""
    last = max(kept["last_due_at"], moment.past)
    following, is_blank = kept.get("next_due_at"), kept.get("blank")
    if task is not None and task.fingerprint == kept["fingerprint"]:
        following = micros_or_none(task.next(time_of(max(last, kept["schedule_since"]))))
    elif following is not None and following <= last:
        following, is_blank = None, 1
    hold_until = max(kept.get("hold_until") or 0, moment.upper + length(longest))
    return {**kept, "last_due_at": last, "next_due_at": following, "blank": is_blank, "hold_until": hold_until}


# -- the state --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Version:
    """One set of declarations as the state has it (``versions.Version``)."""

    key: str
    scope: str
    first_seen_at: datetime | None
    seen_at: datetime | None


def state_of(moment: Moment, state: Kept | None = None) -> Kept:
    """Return the state (None: it was lost) as of this run of the server, which knows of nothing before now."""
    return {**(state or {}), "since": moment.upper, "pid": moment.pid, "started": moment.started}


def was_restarted(state: Kept, moment: Moment) -> bool:
    """Is this another run of the server than the one that the state was written to? In a container, all have pid 1."""
    return bool(state["pid"] != moment.pid or abs(state["started"] - moment.started) > 2)


def versions_of(state: Kept, server: str) -> list[_Version]:
    """Return the sets of declarations that are about all servers, or this one."""
    return [
        _Version(key, version["scope"], time_of(version["first_seen_at"]), time_of(version["seen_at"]))
        for key, version in (state.get("versions") or {}).items()
        if version["scope"] in ("", server)
    ]


def refreshed(state: Kept, stale: Sequence[str], lower: int) -> Kept:
    """Note that these sets of declarations are still in use."""
    fresh = {key: {**version, "seen_at": lower} for key, version in state["versions"].items() if key in stale}
    return {**state, "versions": {**state["versions"], **fresh}}


# -- the directory ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Directory:
    """The names of all rows, in as many items as it takes."""

    parts: dict[int, list[str]]
    is_whole: bool
    has_more: bool
    """Does the last part that is there say that there is another?"""
    names: set[str]


def directory_of(read: Read) -> Directory:
    """Return the directory, as far as it was found."""
    parts = {
        int(key.removeprefix(_PART)): list(kept.get("names") or ())
        for key, (kept, _) in read.found.items()
        if key.startswith(_PART)
    }
    last = max(parts, default=-1)
    has_more = bool((read.get(part_key(last)) or {}).get("more"))
    is_whole = last >= 0 and len(parts) == last + 1 and not has_more
    return Directory(parts, is_whole, has_more, {name for names in parts.values() for name in names})


def with_names(directory: Directory, names: Collection[str]) -> dict[str, Kept]:
    """Return the parts to write for the directory to have these names too, and again what it has lost, in order."""
    if directory.is_whole and not names:
        return {}
    parts = {index: list(found) for index, found in directory.parts.items()}
    last = max(parts, default=0) + directory.has_more
    touched = {index for index in range(last + 1) if index not in parts}
    for index in touched:
        parts[index] = []
    size = sum(len(name) + 3 for name in parts[last])
    for name in sorted(names):
        size += len(name) + 3
        if size > PART_BYTES and parts[last]:
            touched.add(last)  # which says from now on that there is another
            last, size = last + 1, len(name) + 3
            parts[last] = []
        parts[last].append(name)
        touched.add(last)
    # The further ones first: one that nobody points at yet is found all the same.
    return {part_key(index): {"names": parts[index], "more": index < last} for index in sorted(touched, reverse=True)}
