"""Who has a due time: the server that runs it, or one that passes over it for all?"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from django.db import DatabaseError, InterfaceError, OperationalError, connections
from django.db.models import CharField, DateTimeField, Exists, F, PositiveIntegerField, Value
from django.db.models.functions import Cast, Concat, LPad

from ...database import is_conflict
from ...entries import Claim, Occurrence, Skip
from ...exceptions import StoreTimeout
from ...models import ScheduleState
from ..base import ClaimRecorder, SkipRecorder
from .rows import HERE, NEVER, NOTHING_OWED, Clock, batches, due_times, each
from .session import PARAMS_PER_CLAIM, Session


@dataclass(frozen=True)
class _Pending:
    """A claim whose commit was sent and never answered."""

    stamp: str
    occurrences: tuple[Occurrence, ...]
    server: str
    until: float


@dataclass(frozen=True)
class _Held:
    """A row as the locking SELECT of a claim or skip found it."""

    pk: int
    fingerprint: str
    last_due_at: datetime
    owner: str | None
    server: str
    acquired_at: datetime | None
    renewed_at: datetime | None
    expires_at: datetime | None
    not_before: datetime
    moved_to: str
    moved_from: str
    attempt: int
    retry_at: datetime | None
    wanted_at: datetime | None
    paused: bool
    now: datetime


def owner_of(stamp: str, pk: int) -> str:
    """
    Return the owner's UUID for a row claimed under ``stamp``: its random part is the stamp's, the rest is the row.

    So one UPDATE gives each row its own fresh owner without naming them all, and the claimer knows them beforehand.
    """
    return f"{stamp[:24]}{pk:012d}"


class Claiming(Session):
    """Claims and skips: both move ``last_due_at`` on, by a compare-and-set that asks all conditions again."""

    def __init__(self, alias: str, options: Mapping[str, Any]) -> None:
        super().__init__(alias, options)
        self._pending: list[_Pending] = []

    def claim(
        self,
        occurrences: Sequence[Occurrence],
        *,
        server: str,
        slots: int | None = None,
        record: ClaimRecorder,
        now: datetime | None = None,
    ) -> list[Claim]:
        late = self._call(self._settle) if self._pending else []
        if late or not occurrences:
            # What was won is started first: it would be forgotten if claiming more were to fail now.
            return late
        clock = Clock(now)
        sent: list[_Pending] = []

        def work() -> list[Claim]:
            until = time.monotonic() + max(occurrence.lease for occurrence in occurrences).total_seconds()
            sent[:] = [_Pending(str(uuid.uuid4()), tuple(occurrences), server, until)]
            return self._claim(sent[0], slots, record, clock)

        try:
            return self._call(work)
        except (OperationalError, InterfaceError, StoreTimeout) as error:
            if is_conflict(error) or connections[self.using].in_atomic_block:
                raise
            # The commit may have been made, or may yet be, by a server that was only slow: ask by the owners' names.
            self._pending += sent
            if isinstance(error, StoreTimeout):
                # The store hangs, and there are leases to renew: the next claim asks.
                raise
            try:
                settled = self._call(self._settle)
            except (DatabaseError, InterfaceError, StoreTimeout):
                raise error from None
            if not settled:
                raise
            return settled

    def _claim(self, sent: _Pending, slots: int | None, record: ClaimRecorder, clock: Clock) -> list[Claim]:
        """
        Claim in one short transaction.

        1. Touch the server's state row: its claims come one after the other, so that its slots are counted exactly. On
           SQLite this write comes first so that the busy timeout holds: a read that turns into a write does not wait.
        2. Count what the server holds.
        3. Lock rows, pass over those that another server has locked, and keep those that may run, in the given order,
           as many as there are slots.
        4. Take them by UPDATE, which asks all conditions again: nothing rests on the row locks.
        5. Read back what was won, and record it.
        """
        with self._transaction():
            self._touch(f"server:{sent.server}", seen_at=clock.now)
            free = len(sent.occurrences) if slots is None else slots - self._held(sent.server, clock)
            largest = self._batch_size(PARAMS_PER_CLAIM)
            # Only somewhat more than can run is locked at once: what is locked here is passed over by other servers.
            size = largest if slots is None else min(largest, max(8, 2 * free))
            first: dict[int, Occurrence] = {}
            for occurrence in sent.occurrences:
                first.setdefault(occurrence.pk, occurrence)
            queue = list(first.values())
            claims: list[Claim] = []
            while queue and free > 0:
                chunk, queue = queue[:size], queue[size:]
                taken = self._take(self._startable(chunk, clock)[:free], sent, clock)
                claims += taken
                free -= len(taken)
                size = min(largest, size * 2)
            if claims:
                record(claims, max(claim.acquired_at for claim in claims))
        return claims

    def _held(self, server: str, clock: Clock) -> int:
        locks = self._locks().filter(server=server, owner__isnull=False, expires_at__gt=clock.now)
        runs = self._runs().filter(server=server, status="running", expires_at__gt=clock.now)
        return len(locks.order_by().values_list("pk").union(runs.order_by().values_list("pk"), all=True).order_by())

    def _startable(self, chunk: Sequence[Occurrence], clock: Clock) -> list[Occurrence]:
        rows = self._locked(chunk, clock)
        startable = []
        for occurrence in chunk:
            row = rows.get(occurrence.pk)
            if row is None or row.moved_to or row.moved_from:
                continue
            if row.owner is not None and not occurrence.may_overlap:
                continue
            if _is_open(occurrence, row):
                startable.append(occurrence)
        return startable

    def _take(self, occurrences: Sequence[Occurrence], sent: _Pending, clock: Clock) -> list[Claim]:
        if not occurrences:
            return []
        groups: dict[tuple[bool, ...], list[Occurrence]] = {}
        for o in occurrences:
            groups.setdefault((o.is_by_hand, o.requested, o.is_retry, o.may_overlap), []).append(o)
        for group in groups.values():
            self._update_taken(group, sent, clock)
        fields = ("pk", "fence", "acquired_at", "expires_at", "finish_by", "now")
        won = self._locks().filter(pk__in=[o.pk for o in occurrences], stamp=sent.stamp).annotate(now=clock.now)
        found = {pk: values for pk, *values in won.values_list(*fields)}
        claims = []
        for occurrence in occurrences:
            if occurrence.pk not in found:
                continue
            fence, acquired_at, expires_at, finish_by, now = found[occurrence.pk]
            if occurrence.may_overlap:
                limit = occurrence.task.limit
                acquired_at, expires_at, finish_by = now, now + occurrence.lease, now + limit if limit else None
            claims.append(
                Claim(
                    occurrence=occurrence,
                    owner=owner_of(sent.stamp, occurrence.pk),
                    fence=fence,
                    server=sent.server,
                    acquired_at=acquired_at,
                    expires_at=expires_at,
                    finish_by=finish_by,
                )
            )
        return claims

    def _update_taken(self, group: Sequence[Occurrence], sent: _Pending, clock: Clock) -> None:
        """Take these rows, whose occurrences are all of one kind."""
        kind = group[0]
        rows = self._locks().filter(pk__in=[o.pk for o in group])
        values: dict[str, Any] = {
            "stamp": sent.stamp,
            "fence": F("fence") + 1,
            "rerun_up_to": each({o.pk: o.rerun_up_to for o in group}, Value, output=PositiveIntegerField()),
            "cancelled_at": None,
        }
        if kind.is_retry:
            rows = self._unpaused(rows, group).filter(
                last_due_at=due_times(group),
                retry_at__lte=clock.now,
                attempt=each({o.pk: o.attempt for o in group}, Value, output=PositiveIntegerField()),
            )
            values["retry_at"] = None
        elif kind.requested:
            rows = self._unpaused(rows).filter(wanted_at=due_times(group))
            values["wanted_at"] = None
        elif kind.is_by_hand:
            rows = rows.filter(**HERE)
        else:
            rows = self._open(rows, group, clock).filter(not_before__lte=clock.now)
            triggers = {o.pk: o.trigger for o in group}
            values |= _moved_on(group) | {
                "attempt": 1,
                "trigger": each(triggers, Value, output=CharField()),
                "retry_at": None,
            }
        if not kind.may_overlap:
            rows = rows.filter(owner=None)
            values |= {
                "owner": Concat(
                    Value(sent.stamp[:24]),
                    LPad(Cast("pk", CharField(max_length=12)), 12, Value("0")),
                    output_field=CharField(),
                ),
                "server": sent.server,
                "acquired_at": clock.now,
                "renewed_at": clock.now,
                "expires_at": each({o.pk: o.lease for o in group}, clock.after),
                "finish_by": each(
                    {o.pk: o.task.limit for o in group}, lambda limit: clock.after(limit) if limit else NEVER
                ),
            }
        rows.update(**values)

    def _settle(self) -> list[Claim]:
        """Return the claims that turned out to be ours although the answer to their commit was lost."""
        claims: list[Claim] = []
        for sent in list(self._pending):
            owners = {owner_of(sent.stamp, o.pk): o for o in sent.occurrences}
            fields = ("owner", "fence", "acquired_at", "expires_at", "finish_by")
            found: list[tuple[Any, ...]] = []
            for batch in batches(list(owners), self._batch_size(per_row=3)):
                pks = [owners[owner].pk for owner in batch]
                found += self._locks().filter(pk__in=pks, owner__in=batch).values_list(*fields)
                runs = self._of([owners[owner] for owner in batch], batch).filter(expires_at__isnull=False)
                for owner, fence, started_at, expires_at in runs.values_list(
                    "owner", "fence", "started_at", "expires_at"
                ):
                    limit = owners[owner].task.limit
                    found.append((owner, fence, started_at, expires_at, started_at + limit if limit else None))
            for owner, fence, acquired_at, expires_at, finish_by in found:
                claims.append(
                    Claim(
                        occurrence=owners[owner],
                        owner=owner,
                        fence=fence,
                        server=sent.server,
                        acquired_at=acquired_at,
                        expires_at=expires_at,
                        finish_by=finish_by,
                    )
                )
            # A frozen server may commit when it wakes up, but a lease later the claim is the reaper's.
            if found or time.monotonic() > sent.until:
                self._pending.remove(sent)
        return claims

    def skip(self, skips: Sequence[Skip], *, record: SkipRecorder, now: datetime | None = None) -> list[Skip]:
        if not skips:
            return []
        clock = Clock(now)
        return self._call(lambda: self._skip(skips, record, clock))

    def _skip(self, skips: Sequence[Skip], record: SkipRecorder, clock: Clock) -> list[Skip]:
        stamp = str(uuid.uuid4())
        given_up: list[Skip] = []
        at: datetime | None = None
        with self._transaction(write_first=True):
            for batch in batches(
                list({skip.occurrence.pk: skip for skip in skips}.values()), self._batch_size(PARAMS_PER_CLAIM)
            ):
                rows = self._locked([skip.occurrence for skip in batch], clock)
                for held in (True, False):
                    group = [
                        skip.occurrence
                        for skip in batch
                        if (skip.reason == "held") == held and skip.occurrence.pk in rows
                    ]
                    if not group:
                        continue
                    standing = self._open(self._locks().filter(pk__in=[o.pk for o in group]), group, clock)
                    if held:
                        # A holder that has not renewed since may be dead: then the due time is still wanted.
                        standing = standing.filter(
                            owner__isnull=False, expires_at__gt=clock.now, renewed_at__gte=due_times(group)
                        )
                    standing.update(stamp=stamp, **_moved_on(group), **NOTHING_OWED)
                moved = set(self._locks().filter(pk__in=list(rows), stamp=stamp).values_list("pk", flat=True))
                for skip in batch:
                    if skip.occurrence.pk in moved:
                        row = rows[skip.occurrence.pk]
                        at = row.now
                        if skip.reason == "held":
                            skip = replace(skip, holder=row.server, held_since=row.acquired_at)
                        given_up.append(skip)
            if given_up and at is not None:
                record(given_up, at)
        return given_up

    def _locked(self, occurrences: Sequence[Occurrence], clock: Clock) -> dict[int, _Held]:
        everything = self._state().filter(key=ScheduleState.PROJECT, paused_at__isnull=False)
        fields = [name for name in _Held.__dataclass_fields__ if name not in ("paused", "now")]
        rows = self._lock_rows(self._locks().filter(pk__in=[o.pk for o in occurrences]), skip_locked=True)
        found = rows.annotate(now=clock.now, all_paused=Exists(everything))
        return {
            row[0]: _Held(*row[:-3], row[-3] is not None or row[-2], row[-1])  # type: ignore[call-arg]
            for row in found.values_list(*fields, "paused_at", "all_paused", "now")
        }


def _is_open(occurrence: Occurrence, row: _Held) -> bool:
    """May this be claimed now, as far as the row tells, whoever holds it?"""
    if occurrence.is_by_hand:
        return not occurrence.requested or (row.wanted_at == occurrence.due_at and not row.paused)
    if row.paused or row.fingerprint != occurrence.task.fingerprint:
        return False
    if occurrence.is_retry:
        return (
            row.last_due_at == occurrence.due_at
            and row.attempt == occurrence.attempt
            and row.retry_at is not None
            and row.retry_at <= row.now
        )
    return row.last_due_at < occurrence.due_at <= row.now and row.not_before <= row.now


def _moved_on(group: Sequence[Occurrence]) -> dict[str, Any]:
    hints = {o.pk: o.next_due_at for o in group}
    return {
        "last_due_at": due_times(group),
        "next_due_at": each(hints, lambda hint: Value(hint, output_field=DateTimeField())),
    }
