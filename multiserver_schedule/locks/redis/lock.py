"""What does each call of a lock ask of the store, and what does it make of the answer?"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

from ... import conf
from ...entries import Claim, Cleanup, Occurrence, ReleasedClaim, Row, Skip
from ...exceptions import StoreRefused
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
    was_due_in_pause,
)
from ..cached import CachedLock, longest_lease
from ..versions import ASIDE, SEEN_EVERY, is_known, keys, take_overs
from .line import Line
from .mend import Mended, Survey, adopted, mend, needs_mending, righted, to_ask_of, trouble
from .rows import (
    EPOCH,
    Stored,
    cleanup_of,
    micros,
    moment,
    moment_or_none,
    pairs,
    stored_of,
    synced_values,
    version_of,
)

BATCH: Final = 1000
"""Rows read or written in one step of a sync, and freed in one of a reap: Redis serves nobody else meanwhile."""
RETRIES: Final = 20
REMEMBERED: Final = 10_000
"""Owners of which it is known that their release was recorded: one that is sent again is not recorded twice."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Pending:
    """Claims that were sent and never answered: made, not made, or yet to be made by a server that is only slow."""

    occurrences: Mapping[str, Occurrence]
    """By owner."""
    server: str
    until: float

    def without(self, won: Iterable[Claim]) -> list[_Pending]:
        """Return what these claims leave open of it; empty when that is nothing."""
        owners = {claim.owner for claim in won}
        rest = {owner: occurrence for owner, occurrence in self.occurrences.items() if owner not in owners}
        return [replace(self, occurrences=rest)] if rest else []


class RedisLock(CachedLock):
    """
    Keeps leases and due times in the Redis or Valkey of the cache alias ``OPTIONS["cache"]``, always on its primary.

    The connection is its own, made from the alias's settings, with ``OPTIONS["timeout"]`` seconds for connecting and
    for each call. The history goes to the database ``OPTIONS["using"]``, which the lock itself never touches.
    """

    def __init__(self, alias: str, options: Mapping[str, Any]) -> None:
        super().__init__(alias, options)
        self._line = Line(alias, self.cache, self.timeout)
        self._stands: dict[str, int] = {}
        """Until when each claim of this process stands, by owner, by the store's clock."""
        self._told: dict[str, None] = {}
        """Owners whose release was recorded, the oldest first."""
        self._pending: list[_Pending] = []

    # -- what a pass asks ---------------------------------------------------------------------------------------------

    def look(self, declared: Declarations, *, ahead: timedelta = timedelta(0), now: datetime | None = None) -> Look:
        scopes = keys(declared)
        told, whole, paused, interrupted, expired, versions, due = self._line.call(
            "look",
            now=micros(now),
            server=declared.server,
            keys=list(scopes),
            scopes=list(scopes.values()),
            seen_every=int(micros(SEEN_EVERY)),
            ahead=int(micros(ahead)),
        )
        at = moment(told)
        known, _ = is_known(declared, [version_of(*texts) for texts in versions], at)
        rows = [stored_of(values).shown for values in due]
        rows.sort(key=lambda row: (row.wanted_from or at, row.not_before, row.task))
        return Look(
            now=at,
            known=known and whole == "1",
            paused=bool(paused),
            interrupted_at=moment_or_none(interrupted),
            due=tuple(rows),
            expired=expired == "1",
        )

    def clock(self) -> datetime:
        (at,) = self._line.call("clock")
        return moment(at)

    def rows(self, names: Iterable[str] | None = None) -> list[Row]:
        wanted = self._line.call("names") if names is None else names
        return [stored.shown for stored in self._read(wanted)]

    def _read(self, names: Iterable[str]) -> list[Stored]:
        found: list[Stored] = []
        for batch in _batches(sorted(set(names))):
            found += map(stored_of, self._line.call("rows", names=batch))
        return found

    # -- which version's schedule holds, and what was lost ------------------------------------------------------------

    def sync(
        self, declared: Declarations, *, elsewhere: Elsewhere = nowhere_else, now: datetime | None = None
    ) -> Synced:
        """
        Bring the rows in step with these declarations, and put right what the store has lost.

        1. Read everything. Is nothing lost, and another version the newest? Done.
        2. Lost rows are registered anew, as of now; after a restart no row is due for anything before now either, since
           what the server had forgotten may have run. Nobody claims them until the longest lease is over: by then an
           owner that lives has put itself back.
        3. Rows that another version would have to repair wait for it, and it is told so by its next look.
        4. Write, unless something of it has changed meanwhile: then all over again.
        """
        lease = longest_lease(declared)
        before: dict[str, Before] = {}
        asked: set[str] = set()
        for attempt in range(RETRIES):
            if attempt:
                time.sleep(random.uniform(0.2, 1.0) * min(0.5, 0.01 * 2**attempt))  # noqa: S311 - jitter
            survey = self._survey(declared, now)
            changes = take_overs(declared, survey.versions, survey.at)
            if not changes and not needs_mending(declared, survey):
                return Synced(now=survey.at)
            names = [name for name in to_ask_of(declared, survey, changes) if name not in asked]
            if names:
                asked.update(names)
                before.update(elsewhere(names))
            mended = mend(declared, survey, changes, before, lease)
            if self._write(survey, mended, adopted(declared, survey, changes, lease)):
                return Synced(
                    now=survey.at,
                    registered=tuple(mended.registered),
                    changed=tuple(mended.changed),
                    lost=mended.lost,
                    trouble=trouble(survey, mended),
                )
        raise StoreRefused(
            f"The lock {self.alias!r} could not bring {self._line.place} in step: {RETRIES} times something changed "
            "meanwhile. Is its data being deleted all the time?"
        )

    def _survey(self, declared: Declarations, now: datetime | None) -> Survey:
        at, run_id, state, notes, names, due, runs_are_whole = self._line.call("survey", now=micros(now))
        state, notes = pairs(state), pairs(notes)
        versions, newest, resync = [], {}, set()
        for note, value in notes.items():
            kind, _, key = note.partition(":")
            if kind == "version":
                first, _, scope = value.partition(":")
                versions.append(version_of(key, scope, first, notes.get(f"seen:{key}", "")))
            elif kind == "newest":
                newest[key] = value
            elif kind == "resync":
                resync.add(key)
        there = set(names) | set(due)
        rows = {stored.row.task: stored for stored in self._read(there | set(declared.rows))}
        is_whole = (
            len(names) == len(due) == int(state.get("rows") or -1)
            and runs_are_whole == "1"
            and "broken" not in state
            and there <= set(rows)
        )
        return Survey(moment(at), run_id, state, versions, newest, resync, there, rows, is_whole)

    def _write(self, survey: Survey, mended: Mended, adopt: Mapping[str, Any]) -> bool:
        """Write the changed rows, and adopt this state with the last of them; False when somebody was faster."""
        items = [
            [name, survey.rows[name].guard if name in survey.rows else "", synced_values(stored)]
            for name, stored in mended.changes.items()
        ]
        batches = list(_batches(items)) or [[]]
        for number, batch in enumerate(batches, 1):
            given: dict[str, Any] = {"rows": batch, "run_id": survey.run_id, "counter": survey.state.get("counter", "")}
            if number == len(batches):
                # The stamp tells a step that is sent again, its answer lost, from somebody else's.
                given["adopt"] = {**adopt, "stamp": str(uuid.uuid4())}
            (answer,) = self._line.call("write", now=micros(survey.at), **given)
            if answer != "ok":
                return False
        return True

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
        late = self._settle(record, now) if self._pending else []
        if late or not occurrences:
            # What was won is started first: it would be forgotten if claiming more were to fail now.
            return late
        owners = {str(uuid.uuid4()): occurrence for occurrence in occurrences}
        sent = _Pending(
            owners, server, time.monotonic() + max(o.lease for o in occurrences).total_seconds() + self._line.timeout
        )
        items = [
            [
                o.row,
                micros(o.due_at),
                micros(o.next_due_at),
                micros(o.lease),
                micros(o.task.limit),
                owner,
                o.task.fingerprint,
                o.may_overlap,
                o.is_by_hand,
                o.requested,
                o.is_retry,
                str(o.attempt),
                o.trigger,
                str(o.rerun_up_to),
            ]
            for owner, o in owners.items()
        ]
        given_slots = "" if slots is None else str(slots)
        try:
            at, won = self._line.call(
                "claim", again=True, now=micros(now), server=server, slots=given_slots, items=items
            )
        except BaseException:
            if self._line.is_unanswered:
                self._pending.append(sent)
            raise
        claims = self._claims(won, sent)
        if self._line.is_unanswered:
            # The first sending may yet be carried out, and win what the second did not.
            self._pending += sent.without(claims)
        order = {id(occurrence): place for place, occurrence in enumerate(occurrences)}
        claims.sort(key=lambda claim: order[id(claim.occurrence)])
        if claims:
            record(claims, moment(at))
        return claims

    def _claims(self, won: Sequence[Sequence[str]], sent: _Pending) -> list[Claim]:
        claims = []
        for owner, fence, acquired, expires, finish_by in won:
            self._stands[owner] = int(expires)
            claims.append(
                Claim(
                    occurrence=sent.occurrences[owner],
                    owner=owner,
                    fence=int(fence),
                    server=sent.server,
                    acquired_at=moment(acquired),
                    expires_at=moment(expires),
                    finish_by=moment_or_none(finish_by),
                )
            )
        return claims

    def _settle(self, record: ClaimRecorder, now: datetime | None) -> list[Claim]:
        """Return, and record, the claims that turned out to be ours although their answer was lost."""
        items = [[o.row, owner, o.may_overlap] for sent in self._pending for owner, o in sent.occurrences.items()]
        at, standing = self._line.call("settle", now=micros(now), items=items)
        found: list[Claim] = []
        left: list[_Pending] = []
        for sent in self._pending:
            claims = self._claims([values for values in standing if values[0] in sent.occurrences], sent)
            found += claims
            # A frozen server may carry it out when it wakes up, but a lease later the claim is the reaper's.
            if time.monotonic() <= sent.until:
                left += sent.without(claims)
        if found:
            record(found, moment(at))
        self._pending = left
        return found

    # -- skip ---------------------------------------------------------------------------------------------------------

    def skip(self, skips: Sequence[Skip], *, record: SkipRecorder, now: datetime | None = None) -> list[Skip]:
        if not skips:
            return []
        items = [
            [
                skip.occurrence.row,
                micros(skip.occurrence.due_at),
                micros(skip.occurrence.next_due_at),
                skip.occurrence.task.fingerprint,
                skip.reason == "held",
            ]
            for skip in skips
        ]
        at, given_up = self._line.call("skip", now=micros(now), stamp=str(uuid.uuid4()), items=items)
        done = []
        for place, holder, acquired in given_up:
            skip = skips[int(place) - 1]
            if skip.reason == "held":
                skip = replace(skip, holder=holder, held_since=moment_or_none(acquired))
            done.append(skip)
        if done:
            record(done, moment(at))
        return done

    # -- renew and release --------------------------------------------------------------------------------------------

    def renew(self, claims: Sequence[Claim], *, now: datetime | None = None) -> set[str]:
        """
        Put off the end of these leases; return the owners whose lease stands. One round trip.

        A claim that the store has lost, or of which it shows an older state, is put back by a second one, as long as
        its lease stands: nobody can have taken over until then.
        """
        if not claims:
            return set()
        items = [[c.occurrence.row, c.owner, micros(c.occurrence.lease), c.occurrence.may_overlap] for c in claims]
        at, missed, cancelled = self._line.call("renew", now=micros(now), items=items)
        gone = [claims[int(place) - 1] for place in missed]
        back = self._come_back(gone, int(at), now)
        lost = {claim.owner for claim in gone} - back
        left_out = {claims[int(place) - 1].owner for place in cancelled}
        stand = set()
        for claim in claims:
            if claim.owner in lost:
                self._stands.pop(claim.owner, None)
            elif claim.owner not in left_out:
                self._stands[claim.owner] = int(at) + int(micros(claim.occurrence.lease))
                stand.add(claim.owner)
        return stand

    def _come_back(self, claims: Sequence[Claim], at: int, now: datetime | None) -> set[str]:
        """Put back those of these claims whose lease still stands; return the owners for which that was possible."""
        live = [(claim, until) for claim in claims if (until := self._until(claim)) > at]
        if not live:
            return set()
        items = [
            [
                claim.occurrence.row,
                claim.owner,
                str(claim.fence),
                micros(claim.occurrence.lease),
                str(until),
                micros(claim.occurrence.due_at),
                claim.server,
                micros(claim.acquired_at),
                micros(claim.finish_by),
                claim.occurrence.may_overlap,
                claim.occurrence.is_by_hand,
                claim.task.fingerprint,
                micros(claim.occurrence.next_due_at),
            ]
            for claim, until in live
        ]
        _, back = self._line.call("come_back", now=micros(now), items=items)
        return {live[int(place) - 1][0].owner for place in back}

    def _until(self, claim: Claim) -> int:
        return max(self._stands.get(claim.owner, 0), int(micros(claim.expires_at)))

    def release(
        self, released: Sequence[ReleasedClaim], *, record: ReleaseRecorder, now: datetime | None = None
    ) -> list[bool]:
        if not released:
            return []
        at, told = self._release(released, now)
        lost = [item for item, how in zip(released, told, strict=True) if how == "lost"]
        back = self._come_back([item.claim for item in lost], int(at), now)
        if back:
            # Its row was lost while it ran, and nobody else can have had it since.
            again = [item for item in lost if item.claim.owner in back]
            at, how_again = self._release(again, now)
            by_owner = {item.claim.owner: how for item, how in zip(again, how_again, strict=True)}
            told = [by_owner.get(item.claim.owner, how) for item, how in zip(released, told, strict=True)]
        stood = [how != "lost" for how in told]
        for item in released:
            self._stands.pop(item.claim.owner, None)
        to_tell = [
            (item, stands)
            for item, how, stands in zip(released, told, stood, strict=True)
            if how != "before" or item.claim.owner not in self._told
        ]
        if to_tell:
            record(to_tell, moment(at))
            self._told.update(dict.fromkeys(item.claim.owner for item, stands in to_tell if stands))
            for owner in list(self._told)[: max(0, len(self._told) - REMEMBERED)]:
                del self._told[owner]
        return stood

    def _release(self, released: Sequence[ReleasedClaim], now: datetime | None) -> tuple[str, list[str]]:
        items = [
            [
                item.claim.occurrence.row,
                item.claim.owner,
                micros(item.min_break) if item.outcome.started else "",
                item.claim.occurrence.may_overlap,
                micros(item.claim.occurrence.due_at),
                "" if item.claim.occurrence.is_by_hand else micros(item.retry_in),
                str(item.claim.occurrence.attempt),
            ]
            for item in released
        ]
        at, told = self._line.call("release", now=micros(now), items=items)
        return at, told

    # -- reap ---------------------------------------------------------------------------------------------------------

    def reap(self, *, server: str, record: CleanupRecorder, now: datetime | None = None) -> list[Cleanup]:
        """
        Free every lease that has ended; return those that this call freed.

        What was freed stays in the store until it is recorded: where the history cannot be written, or this process is
        killed in between, the next reap of any server records it.
        """
        cleaned: list[Cleanup] = []
        while True:
            _, freed, notes = self._line.call("reap", now=micros(now), server=server, most=BATCH)
            ours = dict.fromkeys(freed)
            cleanups = [cleanup_of(note) for note in notes]
            cleanups.sort(key=lambda cleanup: (cleanup.owner not in ours, cleanup.expired_at or EPOCH, cleanup.task))
            recorded = self._record(cleanups, record)
            cleaned += [recorded.get(each.owner, each) for each in cleanups if each.owner in ours]
            if len(freed) < BATCH:
                return cleaned

    def _record(self, cleanups: Sequence[Cleanup], record: CleanupRecorder) -> dict[str, Cleanup]:
        recorded = {cleanup.owner: cleanup for cleanup in record(cleanups)} if cleanups else {}
        if recorded:
            self._line.call("recorded", owners=list(recorded))
        return recorded

    def free(
        self,
        name: str,
        *,
        owner: str | None = None,
        server: str,
        record: CleanupRecorder,
        now: datetime | None = None,
    ) -> Cleanup | None:
        _, note = self._line.call("free", now=micros(now), server=server, name=name, owner=owner or "")
        if not note:
            return None
        cleanup = cleanup_of(note)
        return self._record([cleanup], record).get(cleanup.owner, cleanup)

    # -- what people ask for ------------------------------------------------------------------------------------------

    def pause(self, names: Sequence[str] | None, *, reason: str = "", now: datetime | None = None) -> list[str]:
        if names is None:
            self._line.call("pause", now=micros(now), reason=reason)
            return []
        return self._ask("pause", "names", names, now, reason=reason)

    def resume(self, names: Sequence[str] | None, *, following: Following, now: datetime | None = None) -> list[str]:
        """
        Undo ``pause``: ask what time it is, read the rows, compute what comes next for them, and write that.

        A pause of everything ends when all rows are written: until then nobody claims what was due meanwhile.
        """
        everything = names is None
        since: datetime | None = None
        if names is None:
            at, paused_at, names = self._line.call("paused", now=micros(now))
            since = moment_or_none(paused_at)
            if since is None:
                return []
        else:
            (at,) = self._line.call("clock", now=micros(now))
        stamp = str(uuid.uuid4())
        resumed: list[str] = []
        batches = list(_batches(sorted(set(names)))) or [[]]
        for number, batch in enumerate(batches, 1):
            items = []
            for row in (stored.row for stored in self._read(batch)):
                if not everything and not row.paused:
                    continue
                is_passed = was_due_in_pause(row, since or row.paused_at, moment(at), following)
                hint = following(row.task, max(row.last_due_at, moment(at))) if is_passed else None
                items.append([row.task, row.fingerprint, micros(hint), is_passed])
            _, done = self._line.call(
                "resume",
                now=micros(now),
                rows=items,
                at=at,
                everything=everything,
                is_last=everything and number == len(batches),
                stamp=stamp,
            )
            resumed += done
        return resumed

    def interrupt(self, *, now: datetime | None = None) -> None:
        self._line.call("interrupt", now=micros(now))

    def want(self, name: str, *, now: datetime | None = None) -> datetime | None:
        _, at = self._line.call("want", now=micros(now), name=name, stamp=str(uuid.uuid4()))
        return moment_or_none(at)

    def cancel(self, owners: Mapping[str, str], *, now: datetime | None = None) -> list[str]:
        return self._ask("cancel", "items", owners.items(), now)

    def retire(self, names: Sequence[str], *, now: datetime | None = None) -> list[str]:
        return self._ask("retire", "names", names, now, aside=ASIDE)

    def forget(self, names: Sequence[str], *, now: datetime | None = None) -> list[str]:
        return self._ask("forget", "names", names, now)

    def set_right(
        self, reaches: Mapping[str, Reach], *, following: Following, now: datetime | None = None
    ) -> list[str]:
        """Read the rows, compute what is right for them, and write that where they are still as they were read."""
        if not reaches:
            return []
        stamp = str(uuid.uuid4())
        changed: list[str] = []
        for batch in _batches(sorted(reaches)):
            changed += self._set_right(batch, reaches, following, stamp, now)
        _, runs = self._line.call(
            "set_state_right",
            now=micros(now),
            names=sorted(reaches),
            far=int(micros(max(reach.far for reach in reaches.values()))),
            lease=int(micros(max(reach.lease for reach in reaches.values()))),
        )
        return sorted({*changed, *runs})

    def _set_right(
        self,
        names: Sequence[str],
        reaches: Mapping[str, Reach],
        following: Following,
        stamp: str,
        now: datetime | None,
    ) -> list[str]:
        changed: list[str] = []
        left = list(names)
        for attempt in range(RETRIES):
            if attempt:
                time.sleep(random.uniform(0.2, 1.0) * min(0.5, 0.01 * 2**attempt))  # noqa: S311 - jitter
            (at,) = self._line.call("clock", now=micros(now))
            items = []
            for stored in self._read(left):
                right = righted(stored, reaches[stored.row.task], moment(at), following)
                if right is not stored:
                    items.append([stored.row.task, stored.guard, synced_values(right)])
            if not items:
                return changed
            _, done, left = self._line.call("set_right", now=micros(now), items=items, stamp=stamp)
            changed += done
            if not left:
                return changed
        raise StoreRefused(
            f"The lock {self.alias!r} could not set {left[0]} right: others changed it {RETRIES} times in a row. "
            "Nothing was lost; try again."
        )

    def _ask(self, step: str, of: str, items: Iterable[Any], now: datetime | None, **more: Any) -> list[str]:
        """Have a step done for all of these, and return the names for which it could be."""
        done: list[str] = []
        for batch in _batches(sorted(set(items))):
            given: dict[str, Any] = {of: batch, **more}
            _, names = self._line.call(step, now=micros(now), **given)
            done += names
        return done

    # -- from store to store ------------------------------------------------------------------------------------------

    def leave(self, names: Sequence[str], *, to: str, now: datetime | None = None) -> list[Row]:
        rows: list[Row] = []
        hold = int(micros(conf.load().lease))
        for batch in _batches(sorted(set(names))):
            _, left = self._line.call("leave", now=micros(now), names=batch, to=to, hold=hold)
            rows += [stored_of(values).shown for values in left]
        return rows

    def arrive(self, names: Sequence[str], *, now: datetime | None = None) -> None:
        for batch in _batches(sorted(set(names))):
            self._line.call("arrive", now=micros(now), names=batch)

    # -- the connection -----------------------------------------------------------------------------------------------

    @property
    def is_calling(self) -> bool:
        return self._line.is_calling

    def cut(self) -> bool:
        return self._line.cut()

    def close(self) -> None:
        self._line.close()


def _batches(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]
