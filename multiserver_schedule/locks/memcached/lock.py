"""In which steps is each question of a pass answered by a server that may lose anything at any moment?"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final

from django.core.cache import caches
from pymemcache.exceptions import MemcacheError  # type: ignore[import-untyped]

from ...entries import Claim, Cleanup, Occurrence, ReleasedClaim, Row, Skip
from ...exceptions import StoreTimeout
from ..ahead import Reach
from ..base import (
    Before,
    ClaimRecorder,
    CleanupRecorder,
    Declarations,
    Elsewhere,
    Following,
    Look,
    ReleaseRecorder,
    SkipRecorder,
    Synced,
    nowhere_else,
)
from ..cached import CachedLock
from ..versions import is_known
from .items import ROUNDS, Items, boot_time, pause
from .line import Line, server_of
from .mend import Done, Mending
from .rows import (
    STATE,
    Kept,
    Moment,
    Read,
    Step,
    as_row,
    claim_of,
    directory_of,
    has_ended,
    holds,
    is_cancelled,
    is_row,
    length,
    micros,
    owners_of,
    refreshed,
    row_key,
    row_keys,
    runs_of,
    scope_of,
    server_key,
    time_of,
    time_or_none,
    versions_of,
    wanted_from,
)
from .steps import (
    Reaped,
    all_paused,
    all_resumed,
    arrived,
    blank,
    cancelled,
    caught_up,
    claimed,
    freed,
    freed_by_hand,
    given_away,
    interrupted,
    may_be_forgotten,
    may_return,
    may_start,
    paused,
    reaped,
    recorded,
    renewed,
    resumed,
    retired,
    returned,
    righted,
    skipped,
    slots_freed,
    slots_renewed,
    slots_righted,
    state_righted,
    wanted,
    was_released,
)

CLAIM_ROUNDS: Final = 8
"""How often a claim is tried anew, where others change the same rows; the next look offers what it has not won."""

logger: Final = logging.getLogger("multiserver_schedule")


@dataclass(frozen=True, slots=True)
class _Pending:
    """Claims that were sent and never answered."""

    owners: Mapping[str, Occurrence]
    server: str
    until: float


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
        self._items = Items(alias, self.cache, self._line)
        self._mending = Mending(self._items)
        self._pending: list[_Pending] = []
        self._stands: dict[str, int] = {}
        """Until when each lease of this process stands, by the server's clock."""
        self._untold: set[str] = set()
        """Owners whose release was sent and has not been recorded: its answer was lost."""

    # -- what a pass asks ---------------------------------------------------------------------------------------------

    def look(self, declared: Declarations, *, ahead: timedelta = timedelta(0), now: datetime | None = None) -> Look:
        with self._line.call():
            read = self._items.read_all(declared.rows, now)
            lower = read.moment.lower
            at = time_of(lower)
            state = read.get(STATE)
            if state is None:
                return Look(now=at, known=False)
            known, stale = is_known(declared, versions_of(state, declared.server), at)
            known = known and read.is_sound and self._mending.findings(declared, read, state).is_fine
            if stale and read.is_sound:
                # Whoever is first: the others find it refreshed.
                self._items.write(read, {STATE: refreshed(state, stale, lower)})
        until = lower + length(ahead)
        due: list[tuple[Any, Row]] = []
        expired = False
        for _, kept in read.rows():
            expired = expired or has_ended(kept, lower)
            first = wanted_from(kept)
            if first is None or first > until or kept.get("paused_at") or kept.get("moved_to"):
                continue
            scope = scope_of(kept["task"])
            if not scope or scope == declared.server:
                row = as_row(kept)
                due.append(((first, row.not_before, row.task), row))
        due.sort(key=lambda pair: pair[0])
        is_paused = bool(state.get("paused_at"))
        return Look(
            now=at,
            known=known,
            paused=is_paused,
            interrupted_at=time_or_none(state.get("interrupted_at")),
            due=() if is_paused else tuple(row for _, row in due),
            expired=expired,
        )

    def clock(self) -> datetime:
        with self._line.call():
            return time_of(self._line.moment().lower)

    def rows(self, names: Iterable[str] | None = None) -> list[Row]:
        with self._line.call():
            read = self._items.read_all((), None) if names is None else self._items.read(row_keys(names), None)
        rows = [as_row(kept) for _, kept in read.rows()]
        return sorted(rows, key=lambda row: row.task)

    # -- which version's schedule holds, and what was lost ------------------------------------------------------------

    def sync(
        self, declared: Declarations, *, elsewhere: Elsewhere = nowhere_else, now: datetime | None = None
    ) -> Synced:
        """
        Put the rows in step with these declarations, unless a newer version's hold, and put right what was lost.

        Read everything, ask elsewhere, once, of the rows that are missing or given away, and take the steps of
        ``Mending.put_right``. Each is a compare-and-set; where one fails, all begins anew.
        """
        done = Done()
        before: Mapping[str, Before] | None = None if elsewhere is not nowhere_else else {}
        for attempt in range(ROUNDS):
            pause(attempt)
            with self._line.call():
                read = self._items.read_all(declared.rows, now)
                asked = [] if before is not None else self._mending.to_ask_of(declared, read)
                if before is not None or not asked:
                    if self._mending.put_right(declared, before or {}, read, done):
                        break
                    continue
            # Outside the call: other stores are asked, and give rows away.
            before = elsewhere(asked)
        else:
            raise self._items.contended("the rows of these declarations")
        return Synced(
            now=time_of(max(read.moment.lower, done.until)),
            registered=tuple(done.registered),
            changed=tuple(dict.fromkeys(done.changed)),
            lost=done.lost,
            trouble="; ".join(done.trouble),
        )

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
        sent = _Pending(owners, server, boot_time() + longest)
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
            pause(attempt)
            read = self._items.read([here, *(row_key(o.row) for o in left.values())], now)
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
            chosen = dict(ready[:free])
            if not chosen:
                break
            standing = {owner: until for owner, until in occupied.items() if until > lower and owner not in left}
            standing |= {owner: read.moment.upper + length(o.lease) for owner, o in chosen.items()}
            if not self._items.write(read, {here: {"owners": standing}})[here]:
                continue
            taken |= set(chosen)
            new = {
                row_key(o.row): claimed(read.found[row_key(o.row)][0], o, owner, sent.server, read.moment)
                for owner, o in chosen.items()
            }
            if boot_time() - read.at > min(o.lease for o in chosen.values()).total_seconds() / 2:
                continue
            tried |= set(chosen)
            stored = self._items.write(read, new)
            for owner, occurrence in chosen.items():
                key = row_key(occurrence.row)
                if stored[key]:
                    won[owner] = self._won(new[key], owner, occurrence)
                    del left[owner]
            if all(stored.values()):
                break
        if taken - set(won):
            self._items.change({here: partial(slots_freed, taken - set(won))}, now)

    def _won(self, kept: Kept, owner: str, occurrence: Occurrence) -> Claim:
        claim = claim_of(kept, owner, occurrence)
        self._stands[owner] = micros(claim.expires_at)
        return claim

    def _settle(self, now: datetime | None) -> list[Claim]:
        """Return the claims that turned out to be ours although their answers were lost."""
        claims: list[Claim] = []
        with self._line.call():
            read = self._items.read(row_keys(o.row for sent in self._pending for o in sent.owners.values()), now)
        pending, self._pending = self._pending, []
        for sent in pending:
            left = dict(sent.owners)
            for owner, occurrence in sent.owners.items():
                kept = read.row(occurrence.row)
                if kept is not None and holds(kept, owner):
                    claims.append(self._won(kept, owner, occurrence))
                    del left[owner]
            # What a slow server writes later than this has ended when it is written, and is the reaper's.
            if left and boot_time() < sent.until:
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
                results = self._items.change(steps, now)
        except (MemcacheError, OSError):
            # Its stamp tells what was given up although the answer was lost.
            with self._line.call():
                results = self._items.change(steps, now)
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
        ending: set[str] = set()
        with self._line.call():
            for key, result in self._items.change(steps, now).items():
                if is_row(key):
                    standing.update(result[0])
                    ending |= result[1]
        for claim in claims:
            if claim.owner not in ending:
                self._stands.pop(claim.owner, None)
        self._stands.update(standing)
        return set(standing)

    def _renewed(
        self, claims: Sequence[Claim], kept: Kept | None, read: Read
    ) -> tuple[Kept | None, tuple[dict[str, int], set[str]]]:
        standing: dict[str, int] = {}
        ending: set[str] = set()
        for claim in claims:
            held = self._held(kept, claim, read.moment)
            if held is not None and is_cancelled(held, claim.owner):
                ending.add(claim.owner)
            elif held is not None:
                kept, standing[claim.owner] = renewed(held, claim, read.moment)
        return (kept if standing else None), (standing, ending)

    def _held(self, kept: Kept | None, claim: Claim, moment: Moment) -> Kept | None:
        """Return the row with the run of this claim, put back where it was lost; None where it may not be."""
        if kept is not None and holds(kept, claim.owner):
            return kept
        if not may_return(kept, claim, self._stands.get(claim.owner, 0), moment.lower):
            return None
        if kept is None:
            self._mending.longest = max(self._mending.longest, claim.occurrence.lease)
            kept = blank(claim.occurrence.row, moment, self._mending.longest)
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
            for key, result in self._items.change(steps, now).items():
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
            read = self._items.read_all((), now)
            lower = read.moment.lower
            step = _naming_dropped(partial(reaped, server))
            said = self._items.change({key: step for key, kept in read.rows() if has_ended(kept, lower)}, now)
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
            said: Reaped = self._items.change({key: _naming_dropped(partial(freed_by_hand, owner, server))}, now)[key]
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
                self._items.change(dict.fromkeys(rows, partial(recorded, set(written))), now)
        return written

    # -- what people ask for ------------------------------------------------------------------------------------------

    def pause(self, names: Sequence[str] | None, *, reason: str = "", now: datetime | None = None) -> list[str]:
        if names is not None:
            return self._steer(names, partial(paused, reason), now)
        with self._line.call():
            self._items.change({STATE: partial(all_paused, reason)}, now)
        return []

    def resume(self, names: Sequence[str] | None, *, following: Following, now: datetime | None = None) -> list[str]:
        if names is not None:
            return self._steer(names, partial(resumed, following), now)
        with self._line.call():
            read = self._items.read_all((), now)
            if not (read.get(STATE) or {}).get("paused_at"):
                return []
            # The rows first: with the pause over, everything that was due meanwhile would be to be had.
            step = partial(caught_up, following)
            goes_on = self._items.change({key: step for key, _ in read.rows()}, now)
            if not self._items.change({STATE: all_resumed}, now)[STATE]:
                return []
        return sorted(kept["task"] for key, kept in read.rows() if goes_on[key])

    def interrupt(self, *, now: datetime | None = None) -> None:
        with self._line.call():
            self._items.change({STATE: interrupted}, now)

    def want(self, name: str, *, now: datetime | None = None) -> datetime | None:
        key = row_key(name)
        with self._line.call():
            return time_or_none(self._items.change({key: wanted}, now)[key])

    def cancel(self, owners: Mapping[str, str], *, now: datetime | None = None) -> list[str]:
        with self._line.call():
            held = self._items.change({row_key(name): partial(cancelled, owner) for name, owner in owners.items()}, now)
        return sorted(name for name in owners if held[row_key(name)])

    def retire(self, names: Sequence[str], *, now: datetime | None = None) -> list[str]:
        return self._steer(names, retired, now)

    def set_right(
        self, reaches: Mapping[str, Reach], *, following: Following, now: datetime | None = None
    ) -> list[str]:
        if not reaches:
            return []
        far, lease = (max(getattr(reach, each) for reach in reaches.values()) for each in ("far", "lease"))
        steps: dict[str, Step] = {row_key(name): partial(righted, reach, following) for name, reach in reaches.items()}
        with self._line.call():
            read = self._items.read(row_keys(reaches), now)
            servers = {scope_of(name) for name in reaches}
            # A slot that nobody gives back is that of a run whose row is there: only its server's own row counts it.
            servers |= {run.get("server") or "" for _, kept in read.rows() for run in runs_of(kept).values()}
            beside: dict[str, Step] = {
                server_key(server): partial(slots_righted, far, lease) for server in servers - {""}
            }
            said = self._items.change(steps, now)
            self._items.change({**beside, STATE: partial(state_righted, far)}, now)
        return sorted(name for name in reaches if said[row_key(name)])

    def _steer(self, names: Sequence[str], step: Step, now: datetime | None) -> list[str]:
        """Take these rows through a step, and return the names of those that it says yes of."""
        with self._line.call():
            said = self._items.change(dict.fromkeys(row_keys(names), step), now)
        return sorted(name for name in set(names) if said[row_key(name)])

    def forget(self, names: Sequence[str], *, now: datetime | None = None) -> list[str]:
        """
        Delete these rows, as far as nobody holds them, and take their names out of the directory.

        1. Read everything. Name again what somebody has taken since its name was taken off.
        2. Take the names off: whoever looks from now on does not read these rows, and so misses none.
        3. Delete each row, if it is still as it was read; else begin anew. Whoever dies before leaves a row that nobody
           reads any more, unless its server comes back: then it is named again.
        """
        gone: list[str] = []
        for attempt in range(ROUNDS):
            pause(attempt)
            with self._line.call():
                read = self._items.read_all(names, now)
                there = {name: kept for name in set(names) if (kept := read.row(name)) is not None}
                free = [name for name, kept in there.items() if may_be_forgotten(kept)]
                directory = directory_of(read)
                taken = there.keys() - directory.names.keys() - set(free)
                if taken:
                    self._items.add_names(read, directory, taken)
                elif not free or not directory.is_whole or not read.is_sound:
                    return sorted(gone)
                elif self._items.drop_names(read, directory, free):
                    deleted = self._items.write(read, dict.fromkeys(map(row_key, free)))
                    gone += [name for name in free if deleted[row_key(name)]]
        raise self._items.contended("the rows that were to be forgotten")

    # -- from store to store ------------------------------------------------------------------------------------------

    def leave(self, names: Sequence[str], *, to: str, now: datetime | None = None) -> list[Row]:
        if not names:
            return []
        with self._line.call():
            results = self._items.change({key: partial(given_away, to) for key in row_keys(names)}, now)
        return sorted((row for row in results.values() if row is not None), key=lambda row: row.task)

    def arrive(self, names: Sequence[str], *, now: datetime | None = None) -> None:
        if names:
            with self._line.call():
                self._items.change(dict.fromkeys(row_keys(names), arrived), now)

    # -- the connection -----------------------------------------------------------------------------------------------

    @property
    def is_calling(self) -> bool:
        return self._line.is_calling

    def cut(self) -> bool:
        return self._line.cut()

    def close(self) -> None:
        self._line.close()


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


def _grouped(items: Iterable[Any], by: Callable[[Any], str]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(by(item), []).append(item)
    return groups
