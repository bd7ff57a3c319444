"""RECORD: one ``ScheduledRun`` row per run, equal skips in a row as one, and a ``CleanupLog`` row per clean-up."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, ClassVar, Final, TypeVar

from django.db import DatabaseError, DataError, IntegrityError, InterfaceError, connections, transaction
from django.db.models import Case, DateTimeField, F, Max, QuerySet, Value, When

from .database import Line
from .entries import SCHEDULED, Claim, Cleanup, Outcome, ReleasedClaim, Skip, Trigger
from .models import CleanupLog, ScheduledRun, ScheduleState

ABANDONED: Final[Mapping[str, str]] = {
    "lease_expired": "its server stopped renewing the lease",
    "overran": "its server did not end it at its limit",
    "runner_lost": "its runner was lost",
    "released_by_hand": "the lock was released by hand",
}
FORGOTTEN: Final = "the lock's store lost it, and nobody has said how it ended"
PARAMS_PER_ROW: Final = 18
TEXT_PER_STATEMENT: Final = 2_000_000

_T = TypeVar("_T")


@dataclass(frozen=True)
class _GivenUp:
    """Due times of one task that nobody runs, as one line of the history."""

    task: str
    due_at: datetime
    trigger: Trigger
    reason: str
    count: int

    @property
    def kind(self) -> str:
        """What makes two skips equal: the reason and the holder, not since when."""
        return _kind(self.reason)


class History:
    """
    The recorders that a lock calls, all on the database ``using``; each takes a constant number of statements.

    A transaction may be tried again, and they with it: ``violations`` and ``cleanups`` tell of the last call alone.
    """

    leases: ClassVar[bool] = True
    """Does the lock keep the leases of runs that may overlap in their rows here?"""

    def __init__(self, using: str) -> None:
        self.using = using
        self.violations: list[Claim] = []
        """Claims of the last ``started`` whose due time had a run already. They run all the same: report them."""
        self.cleanups: list[Cleanup] = []
        """Clean-ups that the last ``finished`` wrote (runs ended at their limit), with their pk."""

    def started(self, claims: Sequence[Claim], now: datetime) -> None:
        """Record runs that begin, and the due times that each passes over as missed."""
        missed = [
            _GivenUp(o.row, o.missed_at, "schedule", "missed", o.missed)
            for o in (claim.occurrence for claim in claims)
            if o.missed and o.missed_at is not None
        ]
        self._give_up(missed, now)
        self._insert([_running(claim, self.leases) for claim in claims])
        there = set(self._owned(claims).values_list("owner", flat=True))
        refused = [claim for claim in claims if claim.owner not in there]
        # Two manual runs may well be asked for at the same moment, and a due time be made up for more than once.
        self.violations = [claim for claim in refused if not claim.occurrence.is_by_hand]
        if refused:
            self._insert_as_further_attempts(refused)

    def skipped(self, skips: Sequence[Skip], now: datetime) -> None:
        """Record due times that were given up."""
        lines = []
        for skip in skips:
            o = skip.occurrence
            count = 1
            if skip.reason == "missed":
                count += o.missed
            elif o.missed and o.missed_at is not None:
                lines.append(_GivenUp(o.row, o.missed_at, "schedule", "missed", o.missed))
            lines.append(_GivenUp(o.row, o.due_at, o.trigger, _reason(skip), count))
        self._give_up(lines, now)

    def finished(self, releases: Sequence[tuple[ReleasedClaim, bool]], now: datetime) -> None:
        """Record how runs went. One whose lease was lost counts as lost, however it went."""
        ended = [
            (item.claim, _as_recorded(item.outcome, stood))
            for item, stood in releases
            if item.outcome.started or not stood
        ]
        filtered = [item.claim for item, stood in releases if stood and not item.outcome.started]
        for batch in _by_size(ended, self._batch_size(PARAMS_PER_ROW)):
            try:
                with transaction.atomic(using=self.using):
                    self._end(batch, now)
            except DataError:
                # A database that is not in UTF-8 refuses what a program printed: that must not keep its lock.
                self._end([(claim, _in_ascii(outcome)) for claim, outcome in batch], now)
        if filtered := self._without_further_attempts(filtered, now):
            self._owned(filtered).delete()
            self._give_up(
                [
                    _GivenUp(c.occurrence.row, c.occurrence.due_at, c.occurrence.trigger, "filtered", 1)
                    for c in filtered
                ],
                now,
            )
        freed = _cleanups_of(releases, now)
        self.cleanups = History.cleaned(self, freed) if freed else []

    def _without_further_attempts(self, filtered: Sequence[Claim], now: datetime) -> list[Claim]:
        """Record of each attempt after a due time's first that it was refused, on its own row; return the others."""
        further = [c for c in filtered if c.occurrence.attempt > 1 or c.occurrence.is_by_hand]
        rows = self._owned(further).filter(attempt__gt=1)
        owners = set(rows.values_list("owner", flat=True)) if further else set()
        if owners:
            rows.update(status="skipped", reason="filtered", finished_at=now, expires_at=None)
        return [claim for claim in filtered if claim.owner not in owners]

    def _end(self, ended: Sequence[tuple[Claim, Outcome]], now: datetime) -> None:
        values = {
            field: _each({claim.owner: getattr(outcome, field) for claim, outcome in ended})
            for field in ("status", "reason", "error", "output")
        }
        self._owned([claim for claim, _ in ended]).update(finished_at=now, expires_at=None, **values)

    def cleaned(self, cleanups: Sequence[Cleanup]) -> list[Cleanup]:
        """Record clean-ups, and that the runs were abandoned where nobody has said how they ended."""
        rows = [CleanupLog(**{field: getattr(cleanup, field) for field in _CLEANUP}) for cleanup in cleanups]
        log = CleanupLog.objects.using(self.using)
        # Never refused: a row that is there already must not keep every other lock from being freed.
        log.bulk_create(rows, ignore_conflicts=True, batch_size=self._batch_size(PARAMS_PER_ROW))
        pks: dict[str, int] = {}
        for batch in self._batches(cleanups):
            pks.update(log.filter(owner__in=[cleanup.owner for cleanup in batch]).values_list("owner", "pk"))
            running = self._runs().filter(
                status="running",
                task__in={cleanup.task for cleanup in batch},
                owner__in=[cleanup.owner for cleanup in batch],
            )
            running.update(
                status="abandoned",
                reason=_each({cleanup.owner: ABANDONED[cleanup.reason] for cleanup in batch}),
                finished_at=_each(
                    {cleanup.owner: cleanup.cleaned_at for cleanup in batch}, output_field=DateTimeField()
                ),
                expires_at=None,
            )
        return [replace(cleanup, pk=pks.get(cleanup.owner)) for cleanup in cleanups]

    # -- what only a history that is written after the fact needs -----------------------------------------------------

    is_calling = False

    def cut(self) -> bool:
        """Break nothing off: the lock's own call is what a watchdog cuts."""
        return False

    def take_trouble(self) -> str:
        """Return why writing has failed since this was last asked, or ""."""
        return ""

    def flush(self) -> list[dict[str, Any]]:
        """Write what could not be written so far; return what still is not, as ``unwritten`` does."""
        return []

    def unwritten(self) -> list[dict[str, Any]]:
        """Return what is not recorded: texts with the task, the due time and the server that they are about."""
        return []

    def take_dropped(self) -> list[dict[str, Any]]:
        """Return what was given up since this was last asked, as ``unwritten`` does."""
        return []

    def last_due(self, names: Sequence[str]) -> dict[str, datetime]:
        """Return the last due time of each row that was run or given up, as far as it is recorded."""
        found: dict[str, datetime] = {}
        for batch in self._batches(sorted(set(names))):
            known = self._runs().filter(task__in=batch, trigger__in=SCHEDULED)
            found.update(known.values_list("task").annotate(Max("due_at")))
        return found

    def _insert(self, runs: Sequence[ScheduledRun]) -> None:
        self._runs().bulk_create(runs, ignore_conflicts=True, batch_size=self._batch_size(PARAMS_PER_ROW))

    def _insert_as_further_attempts(self, claims: Sequence[Claim]) -> None:
        tasks = {claim.occurrence.row for claim in claims}
        due = {claim.occurrence.due_at for claim in claims}
        most = {
            (task, due_at, trigger): attempt
            for task, due_at, trigger, attempt in self._runs()
            .filter(task__in=tasks, due_at__in=due)
            .values_list("task", "due_at", "trigger")
            .annotate(Max("attempt"))
        }
        runs = []
        for claim in claims:
            o = claim.occurrence
            run = _running(claim, self.leases)
            run.attempt = most.get((o.row, o.due_at, o.trigger), o.attempt) + 1
            run.reason = "" if o.is_by_hand else "this due time had a run already"
            runs.append(run)
        self._insert(runs)

    def _give_up(self, lines: Sequence[_GivenUp], now: datetime) -> None:
        """Write each line, onto the task's newest row where that tells of an equal skip."""
        while lines:
            first: dict[str, _GivenUp] = {}
            for line in lines:
                first.setdefault(line.task, line)
            for batch in self._batches(list(first.values())):
                self._give_up_one_each(batch, now)
            lines = [line for line in lines if first[line.task] is not line]

    def _give_up_one_each(self, lines: Sequence[_GivenUp], now: datetime) -> None:
        newest = self._newest(lines)
        onto = {newest[line.task].pk: line for line in lines if _is_equal(newest.get(line.task), line)}
        if onto:
            values = {
                "count": F("count") + _each({pk: line.count for pk, line in onto.items()}, "pk"),
                "reason": _each({pk: line.reason for pk, line in onto.items()}, "pk"),
                "finished_at": now,
            }
            rows = self._runs().filter(pk__in=list(onto))
            try:
                with transaction.atomic(using=self.using):
                    rows.update(
                        due_at=_each({pk: line.due_at for pk, line in onto.items()}, "pk", DateTimeField()), **values
                    )
            except IntegrityError:
                # One of these due times has a row: counted all the same, and no reason to stop the others.
                rows.update(**values)
        done = {line.task for line in onto.values()}
        self._insert(
            [
                ScheduledRun(
                    task=line.task,
                    due_at=line.due_at,
                    trigger=line.trigger,
                    status="skipped",
                    reason=line.reason,
                    count=line.count,
                    finished_at=now,
                )
                for line in lines
                if line.task not in done
            ]
        )

    def _newest(self, lines: Sequence[_GivenUp]) -> dict[str, ScheduledRun]:
        if not lines:
            return {}
        of_these = self._runs().filter(task__in=[line.task for line in lines])
        newest = of_these.values("task").annotate(newest=Max("pk")).values("newest")
        return {run.task: run for run in self._runs().filter(pk__in=newest)}

    def _owned(self, claims: Sequence[Claim]) -> QuerySet[ScheduledRun]:
        # Task and due time lead to the rows by an index; the owner says which.
        runs: QuerySet[ScheduledRun] = self._runs().filter(
            task__in={claim.occurrence.row for claim in claims},
            due_at__in={claim.occurrence.due_at for claim in claims},
            owner__in=[claim.owner for claim in claims],
        )
        return runs

    def _runs(self) -> QuerySet[ScheduledRun]:
        runs: QuerySet[ScheduledRun] = ScheduledRun.objects.using(self.using).order_by()
        return runs

    def _batch_size(self, per_row: int) -> int:
        most = connections[self.using].features.max_query_params
        return 10_000 if most is None else max(1, min(10_000, (most - 50) // per_row))

    def _batches(self, items: Sequence[_T], per_row: int = PARAMS_PER_ROW) -> Iterator[Sequence[_T]]:
        size = self._batch_size(per_row)
        for start in range(0, len(items), size):
            yield items[start : start + size]

    # -- what is paused in a lock that may lose it --------------------------------------------------------------------

    def paused(self, alias: str) -> dict[str, str] | None:
        """
        Return what is paused in this lock, as ``note_pause`` has it: by the row's name ("": everything), and why.

        None where the database does not answer, so that it is not known: ask again.
        """
        start = pause_key(alias, "")
        noted = self._states().filter(key__startswith=start).values_list("key", "row", "paused_reason")
        # Databases differ on case in LIKE.
        return {row: reason for key, row, reason in noted if key.startswith(start)}

    def note_pause(self, alias: str, names: Sequence[str], reason: str, now: datetime) -> None:
        """Keep that these rows ("": everything) are paused in this lock, which takes it from here after a loss."""
        for batch in self._batches(sorted(set(names)), per_row=8):
            keys = {pause_key(alias, name): name for name in batch}
            self._states().filter(key__in=list(keys)).update(paused_reason=reason)
            there = set(self._states().filter(key__in=list(keys)).values_list("key", flat=True))
            new = [
                ScheduleState(key=key, row=name, paused_at=now, paused_reason=reason)
                for key, name in keys.items()
                if key not in there
            ]
            self._states().bulk_create(new, ignore_conflicts=True)

    def forget_pause(self, alias: str, names: Sequence[str]) -> list[str]:
        """Undo ``note_pause``; return the names of those that were noted."""
        noted: list[str] = []
        for batch in self._batches(sorted({pause_key(alias, name) for name in names}), per_row=8):
            noted += self._states().filter(key__in=batch).values_list("row", flat=True)
            self._states().filter(key__in=batch).delete()
        return noted

    def _states(self) -> QuerySet[ScheduleState]:
        states: QuerySet[ScheduleState] = ScheduleState.objects.using(self.using).order_by()
        return states


@dataclass(frozen=True)
class _Entry:
    """Something to be written, and what to say of it where it cannot be."""

    write: Callable[[], Any]
    about: Sequence[tuple[str, str, datetime, str]]
    """Text, row, due time and server of each."""

    def lines(self) -> list[dict[str, Any]]:
        return [{"text": text, "task": row, "due_at": due_at, "by": by} for text, row, due_at, by in self.about]


class Afterwards(History):
    """
    The history of a lock that is not in the database: written after the fact, and again later where that failed.

    A database that is away, broken or silent costs no run anything: nothing here raises for it, a call that hangs can
    be cut, and after a failure nothing is tried for ``TRY_AGAIN_AFTER``. What waits is kept in order, ``MOST`` entries
    of it, in this process: if that ends first, it is lost, and said to be. Clean-ups wait in the lock's own store.
    """

    leases = False
    TRY_AGAIN_AFTER: ClassVar[float] = 10.0
    MOST: ClassVar[int] = 10_000

    def __init__(self, using: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(using)
        self._line = Line(using)
        self._clock = clock
        self._waiting: deque[_Entry] = deque()
        self._dropped: list[dict[str, Any]] = []
        self._not_before: float | None = None
        self._trouble = ""
        self._told = ""

    def started(self, claims: Sequence[Claim], now: datetime) -> None:
        """Record runs that begin, as soon as the database takes it."""
        self.violations = []

        def write() -> None:
            owners = [claim.owner for claim in claims]
            rows = [claim.occurrence.row for claim in claims if not claim.occurrence.may_overlap]
            # Whoever ran these before holds the lock no more: a store that lost it had nobody to say so.
            before = self._runs().filter(status="running", task__in=rows).exclude(owner__in=owners)
            before.update(status="abandoned", reason=FORGOTTEN, finished_at=now)
            History.started(self, claims, now)
            self._pass_over_what_was_doubted()

        about = [("the start of a run", c.occurrence.row, c.occurrence.due_at, c.server) for c in claims]
        self._write(_Entry(write, about))

    def _pass_over_what_was_doubted(self) -> None:
        """Blame nobody for a due time that was recorded as missed when its store had lost it: it had been claimed."""
        if not self.violations:
            return
        of_these = self._runs().filter(
            status="skipped",
            task__in={claim.occurrence.row for claim in self.violations},
            due_at__in={claim.occurrence.due_at for claim in self.violations},
        )
        doubted = set(of_these.values_list("task", "due_at"))
        self.violations = [c for c in self.violations if (c.occurrence.row, c.occurrence.due_at) not in doubted]

    def skipped(self, skips: Sequence[Skip], now: datetime) -> None:
        """Record due times that were given up, as soon as the database takes it."""
        about = [(f"a due time given up ({_reason(s)})", s.occurrence.row, s.occurrence.due_at, "") for s in skips]
        self._write(_Entry(lambda: History.skipped(self, skips, now), about))

    def finished(self, releases: Sequence[tuple[ReleasedClaim, bool]], now: datetime) -> None:
        """Record how runs went, as soon as the database takes it."""
        done: list[Cleanup] = []

        def write() -> None:
            History.finished(self, releases, now)
            done[:] = self.cleanups

        about = [
            (
                f"the end of a run ({_as_recorded(item.outcome, stood).status})",
                item.claim.occurrence.row,
                item.claim.occurrence.due_at,
                item.claim.server,
            )
            for item, stood in releases
        ]
        self._write(_Entry(write, about))
        # Freed they are, recorded or not.
        self.cleanups = done or _cleanups_of(releases, now)

    def cleaned(self, cleanups: Sequence[Cleanup]) -> list[Cleanup]:
        """Record clean-ups now, or return none: the lock's store keeps them until somebody has."""
        if not cleanups or not self._may_try():
            return []
        written: list[Cleanup] = []

        def write() -> None:
            written[:] = History.cleaned(self, cleanups)
            there = set(
                self._runs().filter(owner__in=[each.owner for each in cleanups]).values_list("owner", flat=True)
            )
            # The server that was killed may not have come to record that it had begun.
            self._insert([_abandoned(each) for each in cleanups if each.owner not in there])

        return written if self._try(write) else []

    def last_due(self, names: Sequence[str]) -> dict[str, datetime]:
        """Return what is recorded; nothing where the database is away."""
        found: dict[str, datetime] = {}
        if self._may_try():
            self._try(lambda: found.update(History.last_due(self, names)))
        return found

    def paused(self, alias: str) -> dict[str, str] | None:
        """Return what is paused in this lock; None where the database is away."""
        found: list[dict[str, str] | None] = []
        if self._may_try():
            self._try(lambda: found.append(History.paused(self, alias)))
        return found[-1] if found else None

    # -- trying -------------------------------------------------------------------------------------------------------

    @property
    def is_calling(self) -> bool:  # type: ignore[override]
        """Is the database being asked?"""
        return self._line.is_calling

    def cut(self) -> bool:
        """Break off the call to the database, from another thread."""
        return self._line.cut()

    def take_trouble(self) -> str:
        """Return why writing has failed, once for each reason."""
        trouble = self._trouble if self._trouble != self._told else ""
        self._told = self._trouble
        return trouble

    def flush(self) -> list[dict[str, Any]]:
        """Try once more whatever the last try was; return what is not recorded now."""
        self._not_before = None
        self._work_off()
        return self.unwritten()

    def unwritten(self) -> list[dict[str, Any]]:
        """Return what is not recorded: a line for each."""
        return [line for entry in self._waiting for line in entry.lines()]

    def take_dropped(self) -> list[dict[str, Any]]:
        """Return what was given up, since too much waits, since this was last asked."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _write(self, entry: _Entry) -> None:
        self._waiting.append(entry)
        if len(self._waiting) > self.MOST:
            self._dropped += self._waiting.popleft().lines()
        if self._may_try():
            self._work_off()

    def _work_off(self) -> None:
        while self._waiting and self._try(self._waiting[0].write):
            self._waiting.popleft()

    def _may_try(self) -> bool:
        return self._not_before is None or self._clock() >= self._not_before

    def _try(self, write: Callable[[], Any]) -> bool:
        connection = connections[self.using]
        for again in (False, True):
            # One that was opened earlier may have been closed by the server since: that is not being away.
            was_open = connection.connection is not None and not connection.in_atomic_block
            try:
                with self._line.call():
                    self._line.ready()
                    with transaction.atomic(using=self.using):
                        write()
            except (DatabaseError, InterfaceError) as error:
                if not connection.in_atomic_block:
                    connection.close()
                if was_open and not again and not self._line.was_cut:
                    continue
                self._trouble = f"{type(error).__name__}: {error}".strip()
                self._not_before = self._clock() + self.TRY_AGAIN_AFTER
                return False
            else:
                self._trouble = self._told = ""
                self._not_before = None
                return True
        raise AssertionError("unreachable")


def pause_key(alias: str, name: str) -> str:
    """Return the key of the state that says that a row ("": everything) is paused in this lock."""
    # A digest, for a name may be as long as a key.
    return f"paused:{alias}:{hashlib.sha256(name.encode()).hexdigest()[:32] if name else ''}"


def _abandoned(cleanup: Cleanup) -> ScheduledRun:
    return ScheduledRun(
        task=cleanup.task,
        due_at=cleanup.due_at or cleanup.cleaned_at,
        status="abandoned",
        reason=ABANDONED[cleanup.reason],
        server=cleanup.server,
        owner=cleanup.owner,
        fence=cleanup.fence,
        started_at=cleanup.acquired_at,
        finished_at=cleanup.cleaned_at,
    )


_CLEANUP: Final = (
    "task",
    "due_at",
    "server",
    "owner",
    "fence",
    "acquired_at",
    "expired_at",
    "cleaned_at",
    "cleaned_by",
    "reason",
)


def _running(claim: Claim, leases: bool) -> ScheduledRun:
    o = claim.occurrence
    return ScheduledRun(
        task=o.row,
        due_at=o.due_at,
        trigger=o.trigger,
        attempt=o.attempt,
        server=claim.server,
        owner=claim.owner,
        fence=claim.fence,
        started_at=claim.acquired_at,
        expires_at=claim.expires_at if leases and o.may_overlap else None,
    )


def _as_recorded(outcome: Outcome, stood: bool) -> Outcome:
    outcome = replace(
        outcome, reason=_text(outcome.reason)[:255], error=_text(outcome.error), output=_text(outcome.output)
    )
    if stood:
        return outcome
    ended = "it did not start" if not outcome.started else f"the run {_ENDED.get(outcome.status, 'had ended')}"
    reason = f"the lease was lost; {ended}" + (f": {outcome.reason}" if outcome.reason else "")
    return replace(outcome, status="lost", reason=reason[:255])


_ENDED: Final[Mapping[str, str]] = {
    "succeeded": "had succeeded",
    "failed": "had failed",
    "timed_out": "was ended at its limit",
    "lost": "was ended",
}


def _text(given: str) -> str:
    """Return what every database in UTF-8 takes: no lone surrogates, and no NUL, which PostgreSQL refuses."""
    return given.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def _in_ascii(outcome: Outcome) -> Outcome:
    def escaped(given: str) -> str:
        return given.encode("ascii", "backslashreplace").decode()

    return replace(
        outcome, reason=escaped(outcome.reason)[:255], error=escaped(outcome.error), output=escaped(outcome.output)
    )


def _by_size(ended: Sequence[tuple[Claim, Outcome]], most: int) -> Iterator[list[tuple[Claim, Outcome]]]:
    """Cut into batches that one statement can carry: outputs are long, and MySQL limits the packet."""
    batch: list[tuple[Claim, Outcome]] = []
    size = 0
    for claim, outcome in ended:
        length = len(outcome.error) + len(outcome.output)
        if batch and (len(batch) >= most or size + length > TEXT_PER_STATEMENT):
            yield batch
            batch, size = [], 0
        batch.append((claim, outcome))
        size += length
    if batch:
        yield batch


def _cleanups_of(releases: Sequence[tuple[ReleasedClaim, bool]], now: datetime) -> list[Cleanup]:
    return [_cleanup_of(item, now) for item, stood in releases if stood and item.cleanup is not None]


def _cleanup_of(item: ReleasedClaim, now: datetime) -> Cleanup:
    claim = item.claim
    return Cleanup(
        task=claim.occurrence.row,
        due_at=claim.occurrence.due_at,
        server=claim.server,
        owner=claim.owner,
        fence=claim.fence,
        acquired_at=claim.acquired_at,
        expired_at=claim.finish_by,
        cleaned_at=now,
        cleaned_by=claim.server,
        reason=item.cleanup or "overran",
    )


def _reason(skip: Skip) -> str:
    if skip.reason != "held":
        return skip.reason
    since = f" since {skip.held_since:%Y-%m-%dT%H:%M:%SZ}" if skip.held_since else ""
    return f"held by {skip.holder or 'nobody knows whom'}{since}"


def _kind(reason: str) -> str:
    return reason.rpartition(" since ")[0] if reason.startswith("held by ") and " since " in reason else reason


def _is_equal(run: ScheduledRun | None, line: _GivenUp) -> bool:
    return (
        run is not None
        and run.status == "skipped"
        and run.attempt == 1
        and run.trigger == line.trigger
        and _kind(run.reason) == line.kind
    )


def _each(values: Mapping[Any, Any], field: str = "owner", output_field: Any = None) -> Any:
    """Return one expression that has for each row its value: plain where all are equal, else by ``field``."""
    groups: dict[Any, list[Any]] = {}
    for key, value in values.items():
        groups.setdefault(value, []).append(key)
    if len(groups) == 1:
        return Value(next(iter(groups)), output_field)
    whens = [When(**{f"{field}__in": keys}, then=Value(value, output_field)) for value, keys in groups.items()]
    return Case(*whens, output_field=output_field)
