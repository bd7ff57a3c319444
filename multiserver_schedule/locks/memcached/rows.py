"""What does an item hold? Pure: others read and write it, and ``steps.py`` knows what it becomes."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from ...entries import Claim, Cleanup, Occurrence, Row

PART_BYTES: Final = 400_000
"""Names that go into one item, which the server limits to 1 MB (less, with ``-I``)."""
STATE: Final = "state"

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND: Final = timedelta(microseconds=1)
_ROW: Final = "row:"
_PART: Final = "names:"
_ALWAYS: Final = ("fingerprint", "fence", "last_due_at", "schedule_since", "not_before")

Kept = dict[str, Any]
"""
What an item holds, as JSON; times are microseconds since 1970, and what is empty is left out.

A row: ``task``, ``fingerprint`` ("" until the version that holds the task has put a lost row right), ``last_due_at``,
``schedule_since``, ``next_due_at``, ``not_before``, ``hold_until``, ``fence``, ``paused_at``, ``paused_reason``,
``moved_to``, ``moved_from``; of the last due time ``attempt`` (unless 1) and ``trigger`` (unless "schedule"); what is
owed, ``retry_at`` and ``wanted_at``; of the run under way ``owner``, ``owner_fence``, ``server``, ``due_at``,
``acquired_at``, ``renewed_at``, ``expires_at``, ``finish_by``, ``rerun_up_to``, ``cancelled_at``; ``runs`` that may
overlap, by owner, with a fence each; ``released`` and ``freed`` (owners), ``stamp`` (of the last skip), ``blank``
(nobody knew the schedule when ``next_due_at`` was to be computed), ``retired``, ``reaped`` (clean-ups).

The state: ``pid`` and ``started`` of the server that it was written to, ``since``, ``versions``, ``paused_at``,
``paused_reason``, ``interrupted_at``. A part of the directory: ``names``, ``more``, ``id``. A server: ``owners`` of its
slots, and until when.
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
        paused_at=time_or_none(kept.get("paused_at")),
        paused_reason=kept.get("paused_reason") or "",
        attempt=kept.get("attempt") or 1,
        trigger=kept.get("trigger") or "schedule",
        retry_at=time_or_none(kept.get("retry_at")),
        wanted_at=time_or_none(kept.get("wanted_at")),
        cancelled=bool(kept.get("cancelled_at")),
        moved_to=kept.get("moved_to") or "",
        moved_from=kept.get("moved_from") or "",
    )


def from_row(row: Row) -> Kept:
    """Return what is kept of a row that is new here: nobody holds it, it owes nothing, and it is not paused."""
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


def as_cleanup(task: str, values: Kept) -> Cleanup:
    """Return a clean-up that a row has kept."""
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


def wanted_from(kept: Kept) -> int | None:
    """Return the earliest moment at which there is something to do for it: its hint, a retry, a run asked for."""
    return min(filter(None, (kept.get("next_due_at"), kept.get("retry_at"), kept.get("wanted_at"))), default=None)


def is_cancelled(kept: Kept, owner: str) -> bool:
    """Holds this owner the row, and has it been told to end?"""
    return bool(kept.get("owner") == owner and kept.get("cancelled_at"))


def claim_of(kept: Kept, owner: str, occurrence: Occurrence) -> Claim:
    """Return the claim of this owner, which has a run here."""
    run = runs_of(kept)[owner]
    return Claim(
        occurrence=occurrence,
        owner=owner,
        fence=fence_of(kept, run),
        server=run["server"],
        acquired_at=time_of(run["acquired_at"]),
        expires_at=time_of(run["expires_at"]),
        finish_by=time_or_none(run.get("finish_by")),
    )


def fence_of(kept: Kept, run: Kept) -> int:
    """Return the fence of a run: the row's own may have risen since, where the run came back to a row that was lost."""
    fence: int = kept["owner_fence"] if run is kept else run["fence"]
    return fence


# -- what runs on a server --------------------------------------------------------------------------------------------


def owners_of(kept: Kept | None) -> dict[str, int]:
    """Return who has a slot of this server, and until when."""
    return (kept or {}).get("owners") or {}


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
    ids: dict[int, str]
    """A part that was lost and is written again has another one."""
    is_whole: bool
    has_more: bool
    """Does the last part that is there say that there is another?"""
    names: dict[str, str]
    """Each with the id of the part that it is in."""

    def has_forgotten(self, name: str, part: str) -> bool:
        """Was this name, which was in the part of that id, taken off? Else it was lost."""
        return name not in self.names and self.is_whole and part in self.ids.values()


def directory_of(read: Read) -> Directory:
    """Return the directory, as far as it was found."""
    items = {int(key.removeprefix(_PART)): kept for key, (kept, _) in read.found.items() if key.startswith(_PART)}
    parts = {index: list(kept.get("names") or ()) for index, kept in items.items()}
    ids = {index: kept.get("id") or "" for index, kept in items.items()}
    last = max(parts, default=-1)
    has_more = bool((read.get(part_key(last)) or {}).get("more"))
    is_whole = last >= 0 and len(parts) == last + 1 and not has_more
    return Directory(parts, ids, is_whole, has_more, {name: ids[i] for i, names in parts.items() for name in names})


def with_names(directory: Directory, names: Collection[str], stamp: str) -> dict[str, Kept]:
    """
    Return the parts to write for the directory to have these names too, and again what it has lost, in order.

    ``stamp`` has never been given before: the ids of new parts are made of it.
    """
    if directory.is_whole and not names:
        return {}
    parts = {index: list(found) for index, found in directory.parts.items()}
    ids = dict(directory.ids)
    last = max(parts, default=0) + directory.has_more
    touched = {index for index in range(last + 1) if index not in parts}
    for index in touched:
        parts[index], ids[index] = [], f"{stamp}.{index}"
    into = 0
    size = _size(parts[0])
    for name in sorted(names):
        size += _size([name])
        while size > PART_BYTES and parts[into]:
            # The first part with room: one that many names were taken off is filled again.
            into += 1
            if into > last:
                touched.add(last)  # which says from now on that there is another
                last, parts[into], ids[into] = into, [], f"{stamp}.{into}"
            size = _size([*parts[into], name])
        parts[into].append(name)
        touched.add(into)
    return _as_items(parts, ids, touched, last)


def without_names(directory: Directory, names: Collection[str]) -> dict[str, Kept]:
    """Return the parts to write for the directory, which must be whole, to have none of these names."""
    parts = {index: [name for name in found if name not in names] for index, found in directory.parts.items()}
    touched = {index for index, found in parts.items() if len(found) < len(directory.parts[index])}
    return _as_items(parts, directory.ids, touched, max(parts, default=0))


def _size(names: Iterable[str]) -> int:
    return sum(len(name) + 3 for name in names)


def _as_items(parts: dict[int, list[str]], ids: dict[int, str], touched: Iterable[int], last: int) -> dict[str, Kept]:
    # The further ones first: one that nobody points at yet is found all the same.
    return {
        part_key(index): {"names": parts[index], "more": index < last, "id": ids[index]}
        for index in sorted(touched, reverse=True)
    }
