"""How long does a lease last, and who ends it: its owner, a reaper, or somebody by hand?"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from django.db.models import Case, DateTimeField, F, PositiveIntegerField, Q, Value, When

from ...entries import Claim, Cleanup, ReleasedClaim
from ...models import ScheduledLock
from ..base import CleanupRecorder, ReleaseRecorder
from .rows import FREE, Clock, batches, each
from .session import PARAMS_PER_CLAIM, Raced, Session


class Releasing(Session):
    """Renews, releases, reaps and frees, each by the owner that it has seen."""

    def renew(self, claims: Sequence[Claim], *, now: datetime | None = None) -> set[str]:
        if not claims:
            return set()
        clock = Clock(now)
        return self._call(lambda: self._renew(claims, clock))

    def _renew(self, claims: Sequence[Claim], clock: Clock) -> set[str]:
        stand: set[str] = set()
        for batch in batches(claims, self._batch_size(PARAMS_PER_CLAIM)):
            plain = [claim for claim in batch if not claim.occurrence.may_overlap]
            if plain:
                owners = [claim.owner for claim in plain]
                rows = self._locks().filter(pk__in=[c.occurrence.pk for c in plain], owner__in=owners)
                rows = rows.filter(cancelled_at=None)
                expires_at = each({c.occurrence.pk: c.occurrence.lease for c in plain}, clock.after)
                hit = rows.update(renewed_at=clock.now, expires_at=expires_at)
                stand |= set(owners if hit == len(plain) else rows.values_list("owner", flat=True))
            overlapping = [claim for claim in batch if claim.occurrence.may_overlap]
            if overlapping:
                owners = [claim.owner for claim in overlapping]
                runs = self._of([c.occurrence for c in overlapping], owners).filter(
                    status="running", expires_at__isnull=False
                )
                expires_at = each({c.owner: c.occurrence.lease for c in overlapping}, clock.after, "owner")
                hit = runs.update(expires_at=expires_at)
                stand |= set(owners if hit == len(overlapping) else runs.values_list("owner", flat=True))
        return stand

    def release(
        self, released: Sequence[ReleasedClaim], *, record: ReleaseRecorder, now: datetime | None = None
    ) -> list[bool]:
        if not released:
            return []
        clock = Clock(now)
        return self._call(lambda: self._release(released, record, clock))

    def _release(self, released: Sequence[ReleasedClaim], record: ReleaseRecorder, clock: Clock) -> list[bool]:
        stood: set[str] = set()
        before: set[str] = set()
        with self._transaction(write_first=True):
            for batch in batches(released, self._batch_size(PARAMS_PER_CLAIM)):
                plain = [item for item in batch if not item.claim.occurrence.may_overlap]
                if plain:
                    ours, already = self._release_locks(plain, clock)
                    stood |= ours
                    before |= already
                overlapping = [item for item in batch if item.claim.occurrence.may_overlap]
                if overlapping:
                    ours, already = self._release_runs(overlapping, clock)
                    stood |= ours
                    before |= already
            told = [(item, item.claim.owner in stood) for item in released if item.claim.owner not in before]
            if told:
                record(told, self._now(clock))
        return [item.claim.owner in stood or item.claim.owner in before for item in released]

    def _release_locks(self, items: Sequence[ReleasedClaim], clock: Clock) -> tuple[set[str], set[str]]:
        """Return the owners whose lease this freed, and those whose lease an earlier call freed, unanswered."""
        stamp = str(uuid.uuid4())
        pks = [item.claim.occurrence.pk for item in items]
        breaks = {item.claim.occurrence.pk: item.min_break if item.outcome.started else None for item in items}
        owed = self._owed([item for item in items if item.retry_in is not None], clock)
        hit = (
            self._locks()
            .filter(
                pk__in=pks,
                owner__in=[item.claim.owner for item in items],
                fence__in=[item.claim.fence for item in items],
            )
            .update(
                stamp=stamp,
                not_before=each(breaks, lambda rest: F("not_before") if rest is None else clock.after(rest)),
                **owed,
                **FREE,
            )
        )
        if hit == len(items):
            return {item.claim.owner for item in items}, set()
        found = {
            pk: values for pk, *values in self._locks().filter(pk__in=pks).values_list("pk", "stamp", "owner", "fence")
        }
        ours, already = set(), set()
        for item in items:
            row_stamp, owner, fence = found.get(item.claim.occurrence.pk, ("", "", 0))
            if row_stamp == stamp:
                ours.add(item.claim.owner)
            elif owner is None and fence == item.claim.fence:
                # A clean-up raises the fence, so this was our own release, whose answer was lost.
                already.add(item.claim.owner)
        return ours, already

    def _release_runs(self, items: Sequence[ReleasedClaim], clock: Clock) -> tuple[set[str], set[str]]:
        owners = [item.claim.owner for item in items]
        runs = self._of([item.claim.occurrence for item in items], owners)
        found = dict(self._lock_rows(runs, skip_locked=False).values_list("owner", "status"))
        gone = ("abandoned", "lost")
        ours = {owner for owner, status in found.items() if status == "running"}
        already = {owner for owner, status in found.items() if owner not in ours and status not in gone}
        runs.filter(owner__in=list(ours)).update(expires_at=None)
        again = [item for item in items if item.retry_in is not None and item.claim.owner in ours]
        if again:
            pks = [item.claim.occurrence.pk for item in again]
            self._locks().filter(pk__in=pks).update(**self._owed(again, clock))
        return ours, already

    def _owed(self, items: Sequence[ReleasedClaim], clock: Clock) -> dict[str, Any]:
        """Return what makes these rows owe another attempt: not where a newer due time has come, or comes before."""
        retry_at, attempt = [], []
        for item in items:
            o, wait = item.claim.occurrence, item.retry_in or timedelta(0)
            is_last = Q(pk=o.pk, last_due_at=o.due_at) & (Q(next_due_at=None) | Q(next_due_at__gt=clock.after(wait)))
            retry_at.append(When(is_last, then=clock.after(wait)))
            attempt.append(When(is_last, then=Value(o.attempt + 1)))
        if not items:
            return {}
        return {
            # MySQL sets the columns in this order, and none of them is asked for by the next.
            "retry_at": Case(*retry_at, default=F("retry_at"), output_field=DateTimeField()),
            "attempt": Case(*attempt, default=F("attempt"), output_field=PositiveIntegerField()),
        }

    def reap(self, *, server: str, record: CleanupRecorder, now: datetime | None = None) -> list[Cleanup]:
        clock = Clock(now)
        cleaned: list[Cleanup] = []
        while True:
            found = self._call(lambda: self._reap(server, record, clock))
            cleaned += found
            if len(found) < self._batch_size(PARAMS_PER_CLAIM):
                return cleaned

    def _reap(self, server: str, record: CleanupRecorder, clock: Clock) -> list[Cleanup]:
        most = self._batch_size(PARAMS_PER_CLAIM)
        with self._transaction(write_first=True):
            ended = self._locks().filter(owner__isnull=False, expires_at__lte=clock.now).annotate(now=clock.now)
            locks = list(self._lock_rows(ended, skip_locked=True)[:most])
            ended_runs = self._runs().filter(status="running", expires_at__lte=clock.now).annotate(now=clock.now)
            runs = list(self._lock_rows(ended_runs, skip_locked=True)[: most - len(locks)]) if len(locks) < most else []
            if not locks and not runs:
                return []
            pks = [lock.pk for lock in locks]
            hit = (
                self._locks()
                .filter(pk__in=pks, owner__isnull=False, expires_at__lte=clock.now)
                .update(fence=F("fence") + 1, **self._rerun(clock), **FREE)
            )
            hit += (
                self._runs().filter(pk__in=[run.pk for run in runs], expires_at__lte=clock.now).update(expires_at=None)
            )
            if hit != len(locks) + len(runs):
                raise Raced
            due = self._due_of(locks)
            cleanups = [_cleanup(lock, due, server) for lock in locks]
            cleanups += [
                Cleanup(
                    task=run.task,
                    due_at=run.due_at,
                    server=run.server,
                    owner=run.owner,
                    fence=run.fence,
                    acquired_at=run.started_at,
                    expired_at=run.expires_at,
                    cleaned_at=run.now,
                    cleaned_by=server,
                    reason="lease_expired",
                )
                for run in runs
            ]
            return list(record(cleanups))

    def _rerun(self, clock: Clock) -> dict[str, Any]:
        """Return what makes a row whose server died owe the next attempt, where its claim said so."""
        again = Q(rerun_up_to__gt=F("attempt")) & (Q(next_due_at=None) | Q(next_due_at__gt=clock.now))
        return {
            # In this order: MySQL sets one column after the other, and the first asks for the second as it was.
            "retry_at": Case(When(again, then=clock.now), default=F("retry_at"), output_field=DateTimeField()),
            "attempt": Case(
                When(again, then=F("attempt") + 1), default=F("attempt"), output_field=PositiveIntegerField()
            ),
        }

    def _due_of(self, locks: Sequence[ScheduledLock]) -> dict[str, datetime]:
        """Map each owner to the due time that it runs."""
        owners = [lock.owner for lock in locks if lock.owner]
        return dict(
            self._runs()
            .filter(status="running", task__in=[lock.task for lock in locks], owner__in=owners)
            .values_list("owner", "due_at")
        )

    def free(
        self,
        name: str,
        *,
        owner: str | None = None,
        server: str,
        record: CleanupRecorder,
        now: datetime | None = None,
    ) -> Cleanup | None:
        clock = Clock(now)
        return self._call(lambda: self._free(name, owner, server, record, clock))

    def _free(self, name: str, owner: str | None, server: str, record: CleanupRecorder, clock: Clock) -> Cleanup | None:
        with self._transaction(write_first=True):
            held = self._locks().filter(task=name, owner__isnull=False).annotate(now=clock.now)
            if owner is not None:
                held = held.filter(owner=owner)
            locks = list(self._lock_rows(held, skip_locked=False))
            if not locks:
                return None
            lock = locks[0]
            if (
                not self._locks()
                .filter(pk=lock.pk, owner=lock.owner)
                .update(fence=F("fence") + 1, rerun_up_to=0, **FREE)
            ):
                raise Raced
            cleanup = replace(_cleanup(lock, self._due_of(locks), server), reason="released_by_hand")
            return next(iter(record([cleanup])), cleanup)


def _cleanup(lock: Any, due: Mapping[str, datetime], server: str) -> Cleanup:
    return Cleanup(
        task=lock.task,
        due_at=due.get(lock.owner or "", lock.last_due_at),
        server=lock.server,
        owner=lock.owner or "",
        fence=lock.fence,
        acquired_at=lock.acquired_at,
        expired_at=lock.expires_at,
        cleaned_at=lock.now,
        cleaned_by=server,
        reason="overran" if lock.finish_by is not None and lock.finish_by <= lock.now else "lease_expired",
    )
