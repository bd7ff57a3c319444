"""In which steps is each question of a pass answered by a server that may lose anything at any moment?"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final

from django.core.cache import caches
from django.core.exceptions import ImproperlyConfigured
from pymemcache.exceptions import MemcacheError  # type: ignore[import-untyped]

from ... import conf
from ...entries import Claim, Cleanup, Occurrence, ReleasedClaim, Row, ScheduledTask, Skip
from ...exceptions import ScheduleError, StoreTimeout
from ..base import (
    Before,
    ClaimRecorder,
    CleanupRecorder,
    Declarations,
    Elsewhere,
    Look,
    ReleaseRecorder,
    SkipRecorder,
    Synced,
    nowhere_else,
)
from ..cached import CachedLock, longest_lease
from ..versions import FORGOTTEN_AFTER, is_known, keys, newest_of, registered, take_overs
from .line import Line, server_of
from .rows import (
    STATE,
    Directory,
    Kept,
    Moment,
    Read,
    Reaped,
    Step,
    arrived,
    as_row,
    blank,
    claim_of,
    claimed,
    directory_of,
    encoded,
    filled,
    freed,
    freed_by_hand,
    from_row,
    given_away,
    has_ended,
    held_back,
    holds,
    is_row,
    length,
    may_return,
    may_start,
    micros,
    micros_or_none,
    owners_of,
    part_key,
    reaped,
    recorded,
    refreshed,
    renewed,
    rescheduled,
    returned,
    row_key,
    row_keys,
    scope_of,
    server_key,
    skipped,
    slots_freed,
    slots_renewed,
    state_of,
    time_of,
    time_or_none,
    usable,
    versions_of,
    was_released,
    was_restarted,
    with_names,
)

ROUNDS: Final = 40
"""How often a change is tried anew, where others change the same row."""
CLAIM_ROUNDS: Final = 8
"""The same for a claim: what it has not won by then, the next look offers again."""

logger: Final = logging.getLogger("multiserver_schedule")

_CLOCK: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)


# -- what a call finds, and what it leaves for the next ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pending:
    """Claims that were sent and never answered."""

    owners: Mapping[str, Occurrence]
    server: str
    until: float


@dataclass(slots=True)
class _Findings:
    """What is not as this version needs it; ``sync`` puts it right."""

    directory: Directory
    held: dict[str, ScheduledTask]
    """By row: the tasks whose schedule this version's is."""
    lost: list[str]
    """Named in the directory, now or before, and without a row."""
    missing: list[str]
    """Held, neither named nor there: new, or lost with everything."""
    off: list[str]
    """Held, and there with another schedule, or with none."""
    unnamed: list[str]
    """There, and not named in the directory."""

    @property
    def is_fine(self) -> bool:
        """Is there nothing to be put right?"""
        return self.directory.is_whole and not (self.lost or self.missing or self.off or self.unnamed)


@dataclass(slots=True)
class _Writes:
    """Rows that ``sync`` is about to write, by name, and what is to be said of each that is written."""

    rows: dict[str, Kept] = field(default_factory=dict)
    registered: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    lost: dict[str, datetime | None] = field(default_factory=dict)
    trouble: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Done:
    """What ``sync`` has done so far."""

    registered: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    lost: dict[str, datetime | None] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)
    until: int = 0
    """What is lost counts as done until then."""
    began_empty: bool = False

    def note(self, trouble: str) -> None:
        """Remember how something was lost."""
        if trouble not in self.trouble:
            self.trouble.append(trouble)

    def add(self, writes: _Writes, written: set[str], moment: Moment) -> None:
        """Remember what is to be said of those rows that were written."""
        self.registered += [name for name in writes.registered if name in written]
        self.changed += [name for name in writes.changed if name in written]
        lost = {name: last for name, last in writes.lost.items() if name in written}
        if lost:
            self.lost.update(lost)
            self.until = moment.past
        for name, trouble in writes.trouble.items():
            if name in written:
                self.note(trouble)


class MemcachedLock(CachedLock):
    """
    Keeps leases and due times in one Memcached server: the one of the cache ``OPTIONS["cache"]``.

    An efficiency lock: it holds through lost rows, a flush and a restart, as long as the server's clock does not go
    back and no proxy hides a restart. What was due between a loss and its discovery is passed over, and the trace of a
    dead owner may be lost with its row. A look reads all rows, so its cost grows with the number of tasks.
    """

    def __init__(self, alias: str, options: Mapping[str, Any]) -> None:
        super().__init__(alias, options)
        server, name = server_of(self.cache, alias)
        given = caches.settings[self.cache].get("OPTIONS") or {}
        self._line = Line(server, name, self.timeout, given.get("tls_context"))
        self._make_key: Callable[[str], Any] = caches[self.cache].make_key
        self._items: dict[str, bytes] = {}
        self._item(STATE)  # A prefix that makes no key is said here, and not at three in the morning.
        self._names: set[str] = set()
        """What the directory has ever named: a process that goes on knows what was there before all was lost."""
        self._parts = 1
        self._longest = conf.load().lease
        self._fingerprints: tuple[object, dict[str, str]] = (None, {})
        self._pending: list[_Pending] = []
        self._stands: dict[str, int] = {}
        """Until when each lease of this process stands, by the server's clock."""
        self._untold: set[str] = set()
        """Owners whose release was sent and has not been recorded: its answer was lost."""

    # -- what a pass asks ---------------------------------------------------------------------------------------------

    def look(self, declared: Declarations, *, ahead: timedelta = timedelta(0), now: datetime | None = None) -> Look:
        with self._line.call():
            read = self._read_all(declared.rows, now)
            lower = read.moment.lower
            at = time_of(lower)
            state = read.get(STATE)
            if state is None:
                return Look(now=at, known=False)
            known, stale = is_known(declared, versions_of(state, declared.server), at)
            known = known and read.is_sound and self._findings(declared, read, state).is_fine
            if stale and read.is_sound:
                # Whoever is first: the others find it refreshed.
                self._write(read, {STATE: refreshed(state, stale, lower)})
        until = lower + length(ahead)
        due: list[tuple[Any, Row]] = []
        expired = False
        for _, kept in read.rows():
            expired = expired or has_ended(kept, lower)
            following = kept.get("next_due_at")
            if following is None or following > until or kept.get("paused_at") or kept.get("moved_to"):
                continue
            scope = scope_of(kept["task"])
            if not scope or scope == declared.server:
                row = as_row(kept)
                due.append(((following, row.not_before, row.task), row))
        due.sort(key=lambda pair: pair[0])
        paused = bool(state.get("paused_at"))
        return Look(
            now=at,
            known=known,
            paused=paused,
            interrupted_at=time_or_none(state.get("interrupted_at")),
            due=() if paused else tuple(row for _, row in due),
            expired=expired,
        )

    def clock(self) -> datetime:
        with self._line.call():
            return time_of(self._line.moment().lower)

    def rows(self, names: Iterable[str] | None = None) -> list[Row]:
        with self._line.call():
            read = self._read_all((), None) if names is None else self._read(row_keys(names), None)
        rows = [as_row(kept) for _, kept in read.rows()]
        return sorted(rows, key=lambda row: row.task)

    # -- which version's schedule holds, and what was lost ------------------------------------------------------------

    def sync(
        self, declared: Declarations, *, elsewhere: Elsewhere = nowhere_else, now: datetime | None = None
    ) -> Synced:
        """
        Put the rows in step with these declarations, unless a newer version's hold, and put right what was lost.

        1. Read everything. Ask elsewhere, once, of the rows that are missing or given away.
        2. A restarted server: hold all rows, and count everything until now as done.
        3. Take back what was given away, if this version takes over. Not after the state: whoever died in between would
           leave it with no store at all, since nobody takes back what a newer version gave away.
        4. Write the state: from here on this version is the newest. Whoever dies now leaves rows that do not fit it,
           and the next look of any process of this version finds them.
        5. Register what is missing, take over what has another schedule. A lost row of a task that this version does
           not hold becomes a blank one, which the version that holds it fills.
        6. Add the names to the directory: after the rows, so that a name without a row has lost it.

        Each is a compare-and-set; where one fails, all begins anew.
        """
        done = _Done()
        before: Mapping[str, Before] | None = None if elsewhere is not nowhere_else else {}
        for attempt in range(ROUNDS):
            _pause(attempt)
            with self._line.call():
                read = self._read_all(declared.rows, now)
                asked = [] if before is not None else self._to_ask_of(declared, read)
                if before is not None or not asked:
                    if self._put_right(declared, before or {}, read, done):
                        break
                    continue
            # Outside the call: other stores are asked, and give rows away.
            before = elsewhere(asked)
        else:
            raise _contended(self.alias, "the rows of these declarations")
        return Synced(
            now=time_of(max(read.moment.lower, done.until)),
            registered=tuple(done.registered),
            changed=tuple(dict.fromkeys(done.changed)),
            lost=done.lost,
            trouble="; ".join(done.trouble),
        )

    def _to_ask_of(self, declared: Declarations, read: Read) -> list[str]:
        state = read.get(STATE) or {}
        changes = take_overs(declared, versions_of(state, declared.server), time_of(read.moment.lower))
        asked = [name for change in changes for name in change.tasks if (read.row(name) or {}).get("moved_to")]
        found = self._findings(declared, read, state, [change.key for change in changes])
        empty = [name for name in found.off if not (read.row(name) or {}).get("fingerprint")]
        return [*asked, *found.missing, *(name for name in found.lost if name in found.held), *empty]

    def _put_right(self, declared: Declarations, before: Mapping[str, Before], read: Read, done: _Done) -> bool:
        """Do one round of ``sync``; return False where it must begin anew."""
        moment = read.moment
        self._prints(declared)
        state = read.get(STATE)
        if state is not None and was_restarted(state, moment):
            self._hold_all(declared, read, state, done)
            return False
        changes = take_overs(declared, versions_of(state or {}, declared.server), time_of(moment.lower))
        if state is None:
            done.began_empty = done.began_empty or not read.found
            if read.found and not done.began_empty:
                done.note("its state was lost, and with it what was paused")
            state = state_of(moment)
        versions = dict(state.get("versions") or {})
        for change in changes:
            versions[change.key] = {
                "scope": change.scope,
                "first_seen_at": micros(change.first_seen_at),
                "seen_at": moment.lower,
                "since": micros_or_none(change.since),
            }
        since = {scope: (versions.get(key) or {}).get("since") for key, scope in keys(declared).items()}
        tasks = {name: task for change in changes for name, task in change.tasks.items()}
        moved = {name: task for name, task in tasks.items() if (read.row(name) or {}).get("moved_to")}
        writes = _Writes()
        self._take_over(moved, since, before, read, writes)
        if not self._put(read, writes, done):
            return False
        old = moment.lower - length(FORGOTTEN_AFTER)
        left = {key: version for key, version in versions.items() if version["seen_at"] >= old}
        fresh = {**state, "versions": left}
        if (changes or left != versions or read.get(STATE) is None) and not self._write(read, {STATE: fresh})[STATE]:
            return False
        found = self._findings(declared, read, fresh)
        if not found.directory.is_whole and fresh["since"] + length(self._longest) <= moment.lower:
            done.note("the list of its rows was lost")
        writes = _Writes()
        self._register(found, before, read, fresh, writes, began_empty=done.began_empty)
        off = {name: found.held[name] for name in found.off}
        self._take_over(off, since, before, read, writes)
        if not self._put(read, writes, done):
            return False
        names = {*writes.rows, *found.unnamed} - found.directory.names
        if not all(self._write(read, with_names(found.directory, names)).values()):
            return False
        self._names |= names
        return True

    def _put(self, read: Read, writes: _Writes, done: _Done) -> bool:
        """Write these rows, and note what is to be said of them; False where somebody else changed one."""
        stored = self._write(read, {row_key(name): kept for name, kept in writes.rows.items()})
        done.add(writes, {name for name in writes.rows if stored[row_key(name)]}, read.moment)
        return all(stored.values())

    def _register(
        self,
        found: _Findings,
        before: Mapping[str, Before],
        read: Read,
        state: Kept,
        writes: _Writes,
        *,
        began_empty: bool,
    ) -> None:
        moment = read.moment
        longest = length(self._longest)
        # Not for longer than that, should the server's clock have been ahead at that time.
        emptied = min(state["since"], moment.upper) + longest
        trouble = "the store was empty" if began_empty else "rows were lost"
        for name in (*found.missing, *found.lost):
            task = found.held.get(name)
            if task is None:
                writes.rows[name] = blank(name, moment, self._longest)
                writes.trouble[name] = trouble
                continue
            was_named = name in found.directory.names or name in self._names
            known = usable(before.get(name))
            last = None if known is None else known.last_due_at
            is_lost = (known is None or known.row is None) and (was_named or last is not None)
            # The store may have been emptied while the task ran: what was due until now counts as done.
            is_done = is_lost or emptied > moment.lower
            kept = from_row(registered(name, task, time_of(moment.past if is_done else moment.lower), known))
            if is_lost or was_named:
                kept["hold_until"] = moment.upper + longest
            elif is_done:
                kept["hold_until"] = emptied
            if is_done:
                kept["fence"] = max(kept["fence"], moment.past)
            if is_lost:
                writes.lost[name] = last
                writes.trouble[name] = trouble
            writes.rows[name] = kept
            writes.registered.append(name)

    def _take_over(
        self,
        tasks: Mapping[str, ScheduledTask],
        since: Mapping[str, int | None],
        before: Mapping[str, Before],
        read: Read,
        writes: _Writes,
    ) -> None:
        for name, task in tasks.items():
            kept = read.row(name)
            assert kept is not None
            if kept["fingerprint"]:
                back = time_or_none(since[scope_of(name)])
                writes.rows[name] = rescheduled(kept, task, back, before.get(name), read.moment)
                if not kept.get("blank"):
                    writes.changed.append(name)
                continue
            known = usable(before.get(name), kept)
            writes.rows[name] = filled(kept, task, known, read.moment, self._longest)
            if known is None or known.row is None:
                writes.lost[name] = None if known is None else known.last_due_at
                writes.trouble[name] = "rows were lost"

    def _hold_all(self, declared: Declarations, read: Read, state: Kept, done: _Done) -> None:
        """Hold the rows of a server that was restarted and kept its items (``-e``), then note which run it is."""
        moment = read.moment
        new: dict[str, Kept] = {}
        for key, kept in read.rows():
            task = declared.task_of(kept["task"])
            new[key] = held_back(kept, task, moment, self._longest)
        stored = self._write(read, new)
        for key, kept in read.rows():
            if stored[key]:
                done.lost.setdefault(kept["task"], time_of(kept["last_due_at"]))
        done.note("the Memcached server was restarted")
        done.until = moment.past
        if all(stored.values()):
            self._write(read, {STATE: state_of(moment, state)})

    def _findings(self, declared: Declarations, read: Read, state: Kept, taken: Sequence[str] = ()) -> _Findings:
        directory = directory_of(read)
        versions = versions_of(state, declared.server)
        names = declared.rows
        scopes = set()
        for key, scope in keys(declared).items():
            newest = newest_of(versions, scope)
            if key in taken or (newest is not None and newest.key == key):
                scopes.add(scope)
        held = {name: task for name, task in names.items() if scope_of(name) in scopes}
        prints = self._prints(declared)
        lost = [name for name in directory.names | self._names if row_key(name) not in read.found]
        missing: list[str] = []
        off: list[str] = []
        for name in held:
            kept = read.row(name)
            if kept is None:
                if name not in directory.names and name not in self._names:
                    missing.append(name)
            elif not kept.get("moved_to") and (kept["fingerprint"] != prints[name] or kept.get("blank")):
                off.append(name)
        known = {**names, **dict.fromkeys(self._names)}
        unnamed = [name for name in known if name not in directory.names and row_key(name) in read.found]
        return _Findings(directory, held, lost, missing, off, unnamed)

    def _prints(self, declared: Declarations) -> dict[str, str]:
        # Ten thousand hashes at each look would be most of it.
        given = (declared.digest, declared.server_digest, declared.server)
        if self._fingerprints[0] != given:
            found = {name: task.fingerprint for name, task in declared.rows.items()}
            self._fingerprints = (given, found)
            self._longest = longest_lease(declared)
        return self._fingerprints[1]

    # -- claim --------------------------------------------------------------------------------------------------------

    def claim(
        self,
        occurrences: Sequence[Occurrence],
        *,
        server: str,
        slots: int | None = None,
        record: ClaimRecorder,
        now: datetime | None = None,
    ) -> list[Claim]:
        claims = self._settle(now) if self._pending else []
        if occurrences and not claims:
            # What was won late is started first: it would be forgotten if claiming more were to fail now.
            claims = self._sent(occurrences, server, slots, now)
        if claims:
            record(claims, max(claim.acquired_at for claim in claims))
        return claims

    def _sent(
        self, occurrences: Sequence[Occurrence], server: str, slots: int | None, now: datetime | None
    ) -> list[Claim]:
        first: dict[str, Occurrence] = {}
        for occurrence in occurrences:
            first.setdefault(occurrence.row, occurrence)
        owners = {str(uuid.uuid4()): occurrence for occurrence in first.values()}
        longest = max(occurrence.lease for occurrence in owners.values()).total_seconds()
        sent = _Pending(owners, server, _boot_time() + longest)
        won: dict[str, Claim] = {}
        tried: set[str] = set()
        try:
            with self._line.call():
                self._claim(sent, slots, now, won, tried)
        except (MemcacheError, OSError, StoreTimeout) as error:
            unsure = tried - set(won)
            if unsure and not isinstance(error, StoreTimeout):
                # Once more over a new connection, with the same owners: what was won the first time is found so.
                try:
                    with self._line.call():
                        self._claim(sent, slots, now, won, tried)
                except (MemcacheError, OSError, StoreTimeout):
                    pass
                else:
                    unsure = set()
            if tried - set(won):
                # Even what was refused the second time: the first may still arrive, from a server that was only slow.
                self._pending.append(replace(sent, owners={owner: owners[owner] for owner in tried - set(won)}))
            if not won or unsure:
                if won:
                    self._pending.append(replace(sent, owners={owner: owners[owner] for owner in won}))
                raise
        return [won[owner] for owner in owners if owner in won]

    def _claim(
        self, sent: _Pending, slots: int | None, now: datetime | None, won: dict[str, Claim], tried: set[str]
    ) -> None:
        """
        Claim what may start, in the given order.

        1. Read the rows, the state and the server's own row, which counts what runs on it.
        2. Take a slot there for each that may start, as many as are free.
        3. Write the rows. What somebody else changed meanwhile is read again, and so is everything once half a lease
           has gone by since: this process may have been frozen.
        4. Give back the slots of what was not won.
        """
        here = server_key(sent.server)
        left = {owner: occurrence for owner, occurrence in sent.owners.items() if owner not in won}
        taken: set[str] = set()
        for attempt in range(CLAIM_ROUNDS):
            _pause(attempt)
            read = self._read([here, *(row_key(o.row) for o in left.values())], now)
            lower = read.moment.lower
            state = read.get(STATE)
            if state is None or not read.is_sound:
                break
            for owner, occurrence in list(left.items()):
                kept = read.row(occurrence.row)
                if kept is not None and holds(kept, owner):
                    won[owner] = self._won(kept, owner, occurrence)
                    del left[owner]
            occupied = owners_of(read.get(here))
            others = sum(until > lower for owner, until in occupied.items() if owner not in sent.owners)
            free = len(left) if slots is None else max(0, slots - others - len(won))
            ready = [(owner, o) for owner, o in left.items() if may_start(read.row(o.row), o, lower, state)]
            wanted = dict(ready[:free])
            if not wanted:
                break
            standing = {owner: until for owner, until in occupied.items() if until > lower and owner not in left}
            standing |= {owner: read.moment.upper + length(o.lease) for owner, o in wanted.items()}
            if not self._write(read, {here: {"owners": standing}})[here]:
                continue
            taken |= set(wanted)
            new = {
                row_key(o.row): claimed(read.found[row_key(o.row)][0], o, owner, sent.server, read.moment)
                for owner, o in wanted.items()
            }
            if _boot_time() - read.at > min(o.lease for o in wanted.values()).total_seconds() / 2:
                continue
            tried |= set(wanted)
            stored = self._write(read, new)
            for owner, occurrence in wanted.items():
                key = row_key(occurrence.row)
                if stored[key]:
                    won[owner] = self._won(new[key], owner, occurrence)
                    del left[owner]
            if all(stored.values()):
                break
        if taken - set(won):
            self._change({here: partial(slots_freed, taken - set(won))}, now)

    def _won(self, kept: Kept, owner: str, occurrence: Occurrence) -> Claim:
        claim = claim_of(kept, owner, occurrence)
        self._stands[owner] = micros(claim.expires_at)
        return claim

    def _settle(self, now: datetime | None) -> list[Claim]:
        """Return the claims that turned out to be ours although their answers were lost."""
        claims: list[Claim] = []
        with self._line.call():
            read = self._read(row_keys(o.row for sent in self._pending for o in sent.owners.values()), now)
        pending, self._pending = self._pending, []
        for sent in pending:
            left = dict(sent.owners)
            for owner, occurrence in sent.owners.items():
                kept = read.row(occurrence.row)
                if kept is not None and holds(kept, owner):
                    claims.append(self._won(kept, owner, occurrence))
                    del left[owner]
            # What a slow server writes later than this has ended when it is written, and is the reaper's.
            if left and _boot_time() < sent.until:
                self._pending.append(replace(sent, owners=left))
        return claims

    # -- skip ---------------------------------------------------------------------------------------------------------

    def skip(self, skips: Sequence[Skip], *, record: SkipRecorder, now: datetime | None = None) -> list[Skip]:
        if not skips:
            return []
        stamp = str(uuid.uuid4())
        first: dict[str, Skip] = {}
        for skip in skips:
            first.setdefault(row_key(skip.occurrence.row), skip)
        steps: dict[str, Step] = {key: partial(skipped, skip, stamp) for key, skip in first.items()}
        try:
            with self._line.call():
                results = self._change(steps, now)
        except (MemcacheError, OSError):
            # Its stamp tells what was given up although the answer was lost.
            with self._line.call():
                results = self._change(steps, now)
        given_up = [results[key][0] for key in first if results[key] is not None]
        if given_up:
            record(given_up, time_of(max(result[1] for result in results.values() if result is not None)))
        return given_up

    # -- renew and release --------------------------------------------------------------------------------------------

    def renew(self, claims: Sequence[Claim], *, now: datetime | None = None) -> set[str]:
        if not claims:
            return set()
        steps: dict[str, Step] = {}
        for name, group in _grouped(claims, lambda claim: claim.occurrence.row).items():
            steps[row_key(name)] = partial(self._renewed, group)
        for server, group in _grouped(claims, lambda claim: claim.server).items():
            steps[server_key(server)] = partial(slots_renewed, group)
        standing: dict[str, int] = {}
        with self._line.call():
            for key, result in self._change(steps, now).items():
                if is_row(key):
                    standing.update(result)
        for claim in claims:
            self._stands.pop(claim.owner, None)
        self._stands.update(standing)
        return set(standing)

    def _renewed(self, claims: Sequence[Claim], kept: Kept | None, read: Read) -> tuple[Kept | None, dict[str, int]]:
        standing: dict[str, int] = {}
        for claim in claims:
            held = self._held(kept, claim, read.moment)
            if held is not None:
                kept, standing[claim.owner] = renewed(held, claim, read.moment)
        return (kept if standing else None), standing

    def _held(self, kept: Kept | None, claim: Claim, moment: Moment) -> Kept | None:
        """Return the row with the run of this claim, put back where it was lost; None where it may not be."""
        if kept is not None and holds(kept, claim.owner):
            return kept
        if not may_return(kept, claim, self._stands.get(claim.owner, 0), moment.lower):
            return None
        if kept is None:
            self._longest = max(self._longest, claim.occurrence.lease)
            kept = blank(claim.occurrence.row, moment, self._longest)
        return returned(kept, claim)

    def release(
        self, released: Sequence[ReleasedClaim], *, record: ReleaseRecorder, now: datetime | None = None
    ) -> list[bool]:
        if not released:
            return []
        steps: dict[str, Step] = {}
        for name, group in _grouped(released, lambda item: item.claim.occurrence.row).items():
            steps[row_key(name)] = partial(self._released, group)
        for server, group in _grouped(released, lambda item: item.claim.server).items():
            steps[server_key(server)] = partial(slots_freed, {item.claim.owner for item in group})
        ended: dict[str, str] = {}
        unsaid = {item.claim.owner for item in released} & self._untold
        self._untold |= {item.claim.owner for item in released}
        at = 0
        with self._line.call():
            for key, result in self._change(steps, now).items():
                if is_row(key):
                    ended.update(result[0])
                    at = max(at, result[1])
        told = [
            (item, ended[item.claim.owner] != "lost")
            for item in released
            if ended[item.claim.owner] != "before" or item.claim.owner in unsaid
        ]
        for item in released:
            self._stands.pop(item.claim.owner, None)
        if told:
            record(told, time_of(at))
        self._untold -= {item.claim.owner for item in released}
        return [ended[item.claim.owner] != "lost" for item in released]

    def _released(
        self, items: Sequence[ReleasedClaim], kept: Kept | None, read: Read
    ) -> tuple[Kept | None, tuple[dict[str, str], int]]:
        ended: dict[str, str] = {}
        for item in items:
            owner = item.claim.owner
            if was_released(kept, owner):
                ended[owner] = "before"
                continue
            held = self._held(kept, item.claim, read.moment)
            if held is not None:
                kept = freed(held, item, read.moment)
            ended[owner] = "lost" if held is None else "freed"
        return (kept if "freed" in ended.values() else None), (ended, read.moment.lower)

    # -- reap ---------------------------------------------------------------------------------------------------------

    def reap(self, *, server: str, record: CleanupRecorder, now: datetime | None = None) -> list[Cleanup]:
        """
        Free every lease that has ended.

        What was freed is kept in its row until it is recorded: whoever dies in between, or finds no database, leaves it
        to the next reap.
        """
        with self._line.call():
            read = self._read_all((), now)
            lower = read.moment.lower
            step = _naming_dropped(partial(reaped, server))
            said = self._change({key: step for key, kept in read.rows() if has_ended(kept, lower)}, now)
        written = self._record([cleanup for each in said.values() for cleanup in each.unrecorded], record, now)
        return [written.get(cleanup.owner, cleanup) for each in said.values() for cleanup in each.freed]

    def free(
        self,
        name: str,
        *,
        owner: str | None = None,
        server: str,
        record: CleanupRecorder,
        now: datetime | None = None,
    ) -> Cleanup | None:
        key = row_key(name)
        with self._line.call():
            said: Reaped = self._change({key: _naming_dropped(partial(freed_by_hand, owner, server))}, now)[key]
        if not said.freed:
            return None
        cleanup = said.freed[0]
        return self._record([cleanup], record, now).get(cleanup.owner, cleanup)

    def _record(self, cleanups: Sequence[Cleanup], record: CleanupRecorder, now: datetime | None) -> dict[str, Cleanup]:
        """Have these recorded; take off their rows' lists what was, and return it by owner."""
        if not cleanups:
            return {}
        written = {cleanup.owner: cleanup for cleanup in record(cleanups)}
        rows = row_keys(cleanup.task for cleanup in written.values())
        if rows:
            with self._line.call():
                self._change(dict.fromkeys(rows, partial(recorded, set(written))), now)
        return written

    # -- from store to store ------------------------------------------------------------------------------------------

    def leave(self, names: Sequence[str], *, to: str, now: datetime | None = None) -> list[Row]:
        if not names:
            return []
        with self._line.call():
            results = self._change({key: partial(given_away, to) for key in row_keys(names)}, now)
        return sorted((row for row in results.values() if row is not None), key=lambda row: row.task)

    def arrive(self, names: Sequence[str], *, now: datetime | None = None) -> None:
        if names:
            with self._line.call():
                self._change(dict.fromkeys(row_keys(names), arrived), now)

    # -- the connection -----------------------------------------------------------------------------------------------

    @property
    def is_calling(self) -> bool:
        return self._line.is_calling

    def cut(self) -> bool:
        return self._line.cut()

    def close(self) -> None:
        self._line.close()

    def _item(self, key: str) -> bytes:
        """Return the key of an item as the server has it: made by the cache, of a hash where it would be refused."""
        found = self._items.get(key)
        if found is not None:
            return found
        kind, _, name = key.partition(":")
        namespace = f"multiserver_schedule:{{{self.alias}}}:"
        made = str(self._make_key(namespace + key))
        if not _is_key(made):
            made = str(self._make_key(f"{namespace}{kind}:{hashlib.sha256(name.encode()).hexdigest()}"))
        if not _is_key(made):
            raise ImproperlyConfigured(
                f"The cache {self.cache!r} makes keys that Memcached does not take, such as {made!r}. Its KEY_PREFIX, "
                f"its KEY_FUNCTION and the lock's alias {self.alias!r} should leave out spaces and control characters, "
                "and be shorter than 100 characters together."
            )
        self._items[key] = made.encode()
        return self._items[key]

    def _read(self, items: Iterable[str], now: datetime | None, of: Read | None = None) -> Read:
        """Read the state and these items; with ``of``, an earlier read of the same call, add them to that."""
        at = _boot_time()
        read = of
        if read is None:
            moment = self._line.moment(now)
            read = Read(moment, at, self._line.connection)
            items = [STATE, *items]
        by_key = {self._item(item): item for item in items}
        for key, (value, token) in self._line.read(list(by_key)).items():
            read.found[by_key[key]] = (self._decoded(key, value), token)
        return read

    def _decoded(self, key: bytes, value: bytes) -> Kept:
        try:
            kept: Kept = json.loads(value)
        except ValueError:
            raise ScheduleError(
                f"The item {key.decode()!r} in the Memcached server {self._line.name} was not written by this lock. "
                "Nothing else may use keys of its namespace: delete it."
            ) from None
        return kept

    def _read_all(self, names: Iterable[str], now: datetime | None) -> Read:
        """Read the state, the directory, and every row that it or ``names`` names: the directory before the rows."""
        wanted = dict.fromkeys([*names, *self._names])
        parts = [part_key(index) for index in range(self._parts + 1)]
        read = self._read([*parts, *map(row_key, wanted)], now)
        index = self._parts
        while read.get(part_key(index)) is not None:
            index += 1
            self._read([part_key(index)], now, read)
        self._parts = max(1, index)
        directory = directory_of(read)
        further = [name for name in directory.names if name not in wanted]
        if further:
            self._read(map(row_key, further), now, read)
        self._names |= directory.names
        return read

    def _write(self, read: Read, new: Mapping[str, Kept]) -> dict[str, bool]:
        """Write these items, each only if it is still as it was read; tell which were written."""
        items = []
        for key, kept in new.items():
            found = read.found.get(key)
            items.append((self._item(key), encoded(kept), None if found is None else found[1]))
        return dict(zip(new, self._line.write(items, read.connection), strict=True))

    def _change(self, steps: Mapping[str, Step], now: datetime | None) -> dict[str, Any]:
        """Take each item through its step, again where it changed meanwhile; return what each step had to say."""
        said: dict[str, Any] = {}
        left = list(steps)
        for attempt in range(ROUNDS):
            if not left:
                return said
            _pause(attempt)
            read = self._read(left, now)
            new: dict[str, Kept] = {}
            for key in left:
                kept, said[key] = steps[key](read.get(key), read)
                if kept is not None:
                    new[key] = kept
            left = [key for key, written in self._write(read, new).items() if not written]
        if left:
            raise _contended(self.alias, left[0])
        return said


def _naming_dropped(step: Callable[[Kept | None, Read], tuple[Kept | None, Reaped]]) -> Step:
    """Have the log name what the row has no room for: before the write, whose answer may be lost."""

    def named(kept: Kept | None, read: Read) -> tuple[Kept | None, Reaped]:
        kept, said = step(kept, read)
        for cleanup in said.dropped:
            logger.warning(
                "task=%s due=%s server=%s: this clean-up is recorded now or never: too many wait for the database",
                *(cleanup.task, cleanup.due_at, cleanup.server),
            )
        return kept, said

    return named


# -- small things -----------------------------------------------------------------------------------------------------


def _is_key(made: str) -> bool:
    return len(made.encode()) <= 250 and not any(ord(letter) < 33 or ord(letter) == 127 for letter in made)


def _grouped(items: Iterable[Any], by: Callable[[Any], str]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(by(item), []).append(item)
    return groups


def _boot_time() -> float:
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


def _pause(attempt: int) -> None:
    if attempt:
        time.sleep(random.uniform(0.2, 1.0) * min(0.1, 0.001 * 2**attempt))  # noqa: S311 - jitter


def _contended(alias: str, what: str) -> ScheduleError:
    return ScheduleError(
        f"The lock {alias!r} could not change {what}: others changed it each time, {ROUNDS} times in a row. Nothing "
        "was lost; the next pass tries again."
    )
