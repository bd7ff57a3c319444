"""
The order of things: look → reap → claim → run; when a run has ended, record and release. The one file that knows it.

Nobody waits in here: a step does what can be done now and says when to look again; ``service`` owns the clock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from .conf import Settings
from .due import Plan, Policy, is_meant_for, manual, plan
from .entries import (
    EVERY_MISSED,
    WAITING,
    Claim,
    Cleanup,
    CleanupReason,
    Occurrence,
    Outcome,
    ReleasedClaim,
    Row,
    ScheduledTask,
    Skip,
)
from .faults import point
from .history import History
from .locks.base import BaseLock, Before, Declarations, Look, Synced
from .logs import short
from .run.base import Ended, Margins, Message, Runner, Started, Vanished, boot_time, starts_untold
from .run.beside import events

AHEAD: Final = timedelta(seconds=5)
"""Cron fires by the server's clock; what is due so soon by the store's is waited for, not left for a minute."""

_MINUTE: Final = timedelta(minutes=1)  # how often cron starts a pass
_AGAIN: Final = 0.25
_TRIES: Final = 20  # of a claim that the store refused without saying why: a row locked by a neighbour's transaction


@dataclass(slots=True)
class Running:
    """A claim of ours that is being run."""

    claim: Claim
    store: Store
    until: float
    """Boot time at which the lease ends, as far as this process can be sure."""
    began_at: datetime
    began: float
    lost: bool = False
    cancelled: bool = False
    """Has it been told to end, for a newer due time?"""
    outcome: Outcome | None = None
    """How it went, once that is recorded and its lock is free, or nobody can do that any more."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A run of ours that has ended and is not yet recorded."""

    running: Running
    outcome: Outcome
    told: bool
    """Has its own process sent the signals of its end?"""
    cleanup: CleanupReason | None = None
    """Why freeing its lock is a clean-up, and leaves the trace of one; None where the run ended by itself."""
    retry_in: timedelta | None = None


@dataclass(frozen=True, slots=True)
class NotStarted:
    """A run that somebody asked for, and that was not started."""

    why: str
    is_passing: bool = False
    """Was nobody seen to hold it? Then it may well be started a moment later."""


@dataclass(slots=True)
class Store:
    """One lock store, and the tasks that are locked in it."""

    lock: BaseLock
    history: History
    declared: Declarations


@dataclass(slots=True)
class Step:
    """What a step found."""

    look_again_at: float | None = None
    """Boot time; None when nothing is left for this pass."""
    claimed: int = 0
    paused: set[str] = field(default_factory=set)
    """The locks, by alias, all of whose tasks are paused."""
    interrupted: bool = False
    """Did somebody ask services and passes to end, since this one began?"""
    attempt_at: float | None = None
    """Boot time of a further attempt that a pass stays for, however long it has been there."""

    def no_later_than(self, moment: float) -> None:
        """Look again at ``moment`` at the latest."""
        self.look_again_at = moment if self.look_again_at is None else min(self.look_again_at, moment)

    def within(self, limit: float) -> float | None:
        """Return when a pass that is patient until then looks again; what is later is the next pass's business."""
        again = self.look_again_at if self.look_again_at is not None and self.look_again_at <= limit else None
        return min(filter(None, (again, self.attempt_at)), default=None)


@dataclass(slots=True)
class Cycle:
    """Takes occurrences through claim, run, record and release, for one server."""

    stores: Sequence[Store]
    runner: Runner
    settings: Settings
    policy: Policy
    maintenance: bool = False
    running: dict[str, Running] = field(default_factory=dict)
    """By owner."""
    unrecorded: list[Finished] = field(default_factory=list)
    """Ended, but the store was away: to be recorded and released as soon as it is back."""
    failures: int = 0
    """Runs that did not succeed."""
    explains: bool = False
    """Is somebody told what keeps everything from being started? That begins a process, which an idle pass has not."""
    hand_over: timedelta | None = None
    """One pass takes up what was due when it began, and sub-minute tasks for so long; None: no end (a service)."""
    first_look: dict[str, datetime] = field(default_factory=dict)
    """The time of each store, by its alias, when this pass first looked at it."""
    _attempts: dict[tuple[str, str], datetime] = field(default_factory=dict)
    """By lock and row: the further attempts that this pass stays for, since none after it is sure to come in time."""
    _tried: dict[tuple[str, datetime], int] = field(default_factory=dict)
    _offered: dict[tuple[str, datetime], Occurrence] = field(default_factory=dict)
    """Due times that this pass wanted and has not won."""
    _broken: dict[str, str] = field(default_factory=dict)
    """By the name of a task whose due times cannot be computed: what was said of it."""
    _standstill: set[str] = field(default_factory=set)
    """What keeps everything from being started, as far as it was said."""

    # -- look, reap, claim, skip ------------------------------------------------------------------------------------

    def step(self, *, now: datetime | None = None) -> Step:
        """Look at each store, free what is stale, start what may start, give up what must be given up."""
        step = Step()
        for store in self.stores:
            self.visit(store, step, now=now)
        return step

    def visit(self, store: Store, step: Step, *, now: datetime | None = None) -> None:
        """Do a step's work with one store; what it raises is that store's trouble, and no other's."""
        looked = boot_time()
        look = self._look(store, now)
        if look.expired:
            self._reap(store, now)
            # What was held is free now, and due times that a dead server left open are claimed in this same pass.
            looked = boot_time()
            look = store.lock.look(store.declared, ahead=AHEAD, now=now)
        first = self.first_look.setdefault(store.lock.alias, look.now)
        step.interrupted |= look.interrupted_at is not None and look.interrupted_at > first
        if step.interrupted:
            return
        if self.explains:
            where = f" in the lock {store.lock.alias!r}" if len(self.stores) > 1 else ""
            since = f"everything{where} is paused; `manage.py schedule list` says since when, and why"
            self._tell_standstill(since, holds=look.paused)
            self._tell_standstill(self._of_maintenance(), holds=self.maintenance)
        if look.paused:
            step.paused.add(store.lock.alias)
            return

        found = self._plan(store, look)
        for task, why in found.broken:
            if self._broken.get(task.name) != why:
                self._broken[task.name] = why
                self.failures += 1
                self.tell("trouble", doing=f"computing when {task.name} is due", error=why)
        self._tell_who_was_slower(store, found)

        def when(moment: datetime) -> float:
            return looked + (moment - look.now).total_seconds()

        self._claim(store, found, step, when, now)
        self._skip(store, found, look, step, when, now)
        if found.moving:
            self._arrive(store, found.moving, step, now)
        for occurrence, row in found.resting:
            if self._is_still_tried(occurrence):
                step.no_later_than(when(row.not_before) + 0.01)
        self._wait_for_attempts(store, look, step, when)
        for moment in (found.next_at, found.put_off_to):
            if moment is not None and (moment is found.put_off_to or moment <= look.now + AHEAD):
                step.no_later_than(when(moment) + 0.002)
        for about in found.due:
            # One that is due again in a moment is not seen to be by a look that finds it due, held or resting.
            later = about.task.offset(about.row)
            if about.next_due_at is not None and look.now < about.next_due_at + later <= look.now + AHEAD:
                step.no_later_than(when(about.next_due_at + later) + 0.002)

    def _look(self, store: Store, now: datetime | None) -> Look:
        look = store.lock.look(store.declared, ahead=AHEAD, now=now)
        if not look.known:
            self.sync(store, now=now)
            look = store.lock.look(store.declared, ahead=AHEAD, now=now)
        return look

    def sync(self, store: Store, *, now: datetime | None = None) -> None:
        """Have the store know these declarations, and say what is new, what came from elsewhere, what was lost."""

        paused: dict[str, str] = {}

        def elsewhere(names: Sequence[str]) -> Mapping[str, Before]:
            found: dict[str, Before] = {}
            last = {} if store.lock.transactional else store.history.last_due(names)
            for other in self.stores:
                for row in other.lock.leave(names, to=store.lock.alias, now=now) if other is not store else ():
                    theirs = found.get(row.task)
                    if theirs is None or theirs.row is None or theirs.row.last_due_at < row.last_due_at:
                        found[row.task] = Before(row=row, store=other.lock.alias, last_due_at=last.get(row.task))
                    if row.paused:
                        paused[row.task] = row.paused_reason
            for name, due_at in last.items():
                found.setdefault(name, Before(last_due_at=due_at))
            return found

        synced = store.lock.sync(store.declared, elsewhere=elsewhere, now=now)
        if not store.lock.transactional:
            # What it may have forgotten, the database has noted.
            noted = store.history.paused(store.lock.alias)
            if noted is None:
                about = f"asking the database what is paused in the lock {store.lock.alias!r}"
                self.tell("trouble", doing=about, error="it does not answer, and what the lock has forgotten runs")
            paused |= noted or {}
        registered = [name for name in synced.registered if name not in synced.lost]
        paused |= self._paused_everywhere(store, registered)
        for name, reason in paused.items():
            # Whichever store has it now: somebody paused it.
            store.lock.pause([name] if name else None, reason=reason, now=now)
        if synced.lost:
            self._tell_loss(store, synced)
        if registered or synced.changed:
            self.tell("synced", registered=registered, changed=[*synced.changed], now=synced.now)

    def _paused_everywhere(self, store: Store, registered: Sequence[str]) -> dict[str, str]:
        """Return which of this server's new rows are of tasks that are paused on all others, and why."""
        tasks = {name.partition("@")[0]: name for name in registered if "@" in name}
        if not tasks:
            return {}
        others: dict[str, list[Row]] = {}
        for row in store.lock.rows():
            task, _, server = row.task.partition("@")
            if server and task in tasks and row.task != tasks[task]:
                others.setdefault(task, []).append(row)
        return {tasks[task]: rows[0].paused_reason for task, rows in others.items() if all(row.paused for row in rows)}

    def _tell_loss(self, store: Store, synced: Synced) -> None:
        """Record and say which due times are passed over because the store forgot what had become of them."""
        self.tell("lost_rows", lock=store.lock.alias, text=synced.trouble, count=len(synced.lost))
        skips = []
        for name, since in synced.lost.items():
            task = store.declared.task_of(name)
            due_at = task.latest(synced.now, after=since) if task is not None and since is not None else None
            if task is None or since is None or due_at is None:
                continue
            about = Occurrence(
                task=task,
                row=name,
                pk=0,
                due_at=due_at,
                next_due_at=None,
                missed=task.timetable.count(since, due_at) - 1,
                lease=self.policy.lease,
                min_break=timedelta(0),
            )
            skips.append(Skip(occurrence=about, reason="missed"))
            self.tell("skipped", about=about, reason="missed", count=about.missed + 1)
        if skips:
            store.history.skipped(skips, synced.now)

    def _arrive(self, store: Store, moving: Sequence[tuple[Occurrence, Row]], step: Step, now: datetime | None) -> None:
        """Let tasks that came from another store start here, once their last runs there have ended."""
        here = []
        for alias in {row.moved_from for _, row in moving}:
            names = [row.task for _, row in moving if row.moved_from == alias]
            other = next((each for each in self.stores if each.lock.alias == alias), None)
            if other is not None:
                # Also the break after that run, which began when it ended, and so after the task had left.
                then = now or other.lock.clock()
                rows = other.lock.rows(names)
                names = [name for name in names if name not in {row.task for row in rows if not _is_at_rest(row, then)}]
            here += names
        if here:
            store.lock.arrive(here, now=now)
        # Free or not, there is something to look at again: what has arrived, or whether it has.
        step.no_later_than(boot_time() + (0.0 if here else 1.0))

    def _plan(self, store: Store, look: Look) -> Plan:
        mine = [row for row in look.due if self._is_mine(row, store)]
        return plan(
            store.declared.tasks,
            mine,
            look.now,
            server=self.settings.server_name,
            environment=self.settings.environment,
            maintenance=self.maintenance,
            policy=self.policy,
        )

    def _is_mine(self, row: Row, store: Store) -> bool:
        """Is this due time one of this pass's, or already its successor's?"""
        first = self.first_look.get(store.lock.alias)
        if self.hand_over is None or first is None or row.next_due_at is None:
            return True
        if row.retry_at is not None or row.wanted_at is not None:
            return True
        if row.next_due_at <= first + AHEAD:
            return True
        task = store.declared.task_of(row.task)
        return task is not None and task.timetable.is_subminute and row.next_due_at <= first + self.hand_over

    def _is_still_tried(self, occurrence: Occurrence) -> bool:
        """Has it not been given up yet, after so many tries in vain?"""
        return self._tried.get(_key(occurrence), 0) < _TRIES

    def _reap(self, store: Store, now: datetime | None) -> None:
        point("before_reap")
        cleanups = store.lock.reap(server=self.settings.server_name, record=store.history.cleaned, now=now)
        point("after_reap")
        for cleanup in cleanups:
            self.tell_cleanup(store, cleanup)

    def _claim(
        self, store: Store, found: Plan, step: Step, when: Callable[[datetime], float], now: datetime | None
    ) -> None:
        # A service has no successor: what it has tried in vain, it tries at each of its looks.
        ready = [each for each in found.ready if self.hand_over is None or self._is_still_tried(each)]
        offered = ready if self.runner.at_once is None else ready[: max(0, self.runner.at_once - len(self.running))]
        claims = self._take_up(store, offered, when, now)
        step.claimed += len(claims)
        self._want_the_others(ready, claims, step)

    def by_hand(
        self, store: Store, task: ScheduledTask, *, due_at: datetime | None = None, now: datetime | None = None
    ) -> Running | NotStarted:
        """
        Start one run that somebody asked for: of this due time again (a backfill), or now.

        Return what runs, or why nothing was started.
        """
        server = self.settings.server_name
        looked = boot_time()
        look = self._look(store, now)
        if look.expired:
            self._reap(store, now)
        rows = store.lock.rows([task.row_name(server)])
        if not rows:
            return NotStarted("its row is gone from the lock's table; restore it from a backup, or rename the task")
        wanted = manual(task, rows[0], look.now, self.policy)
        if due_at is not None:
            wanted = dataclasses.replace(wanted, due_at=due_at, trigger="backfill")
        claims = self._take_up(store, [wanted], lambda at: looked + (at - look.now).total_seconds(), now)
        mine = next((claim.owner for claim in claims if claim.occurrence.due_at == wanted.due_at), None)
        if mine is not None:
            # One that came too late to be started has ended by now.
            held = [*self.running.values(), *(finished.running for finished in self.unrecorded)]
            return next(running for running in held if running.claim.owner == mine)
        rows = store.lock.rows([wanted.row])
        if not rows:
            return NotStarted("its lock's store has just lost it", is_passing=True)
        # In the database it is only a break, which those who ask by hand do not mind.
        put_off = not store.lock.transactional and rows[0].not_before > (now or store.lock.clock())
        return _why_not(rows[0], wanted, put_off=put_off)

    def _take_up(
        self, store: Store, offered: Sequence[Occurrence], when: Callable[[datetime], float], now: datetime | None
    ) -> list[Claim]:
        """Claim these, start what was won, and record it: in the claim's own transaction, or once it runs."""
        if offered:
            point("before_claim")
        late: list[tuple[Sequence[Claim], datetime]] = []
        sent = boot_time()
        # Each store counts what this server holds in it; what this process runs for other stores, only it knows.
        elsewhere = sum(running.store is not store for running in self.running.values())
        by_hand = bool(offered) and all(each.is_by_hand and not each.requested for each in offered)
        claims = store.lock.claim(
            offered,
            server=self.settings.server_name,
            # Somebody waits for it at a terminal: it takes no slot from anybody, and none has to be free.
            slots=None if by_hand else max(0, self.settings.max_concurrency - elsewhere),
            # What is recorded after the fact anyway is recorded once it runs: a database that hangs delays nothing.
            record=store.history.started if store.lock.transactional else lambda won, at: late.append((won, at)),
            now=now,
        )
        if offered:
            point("after_claim")
        for claim in claims:
            # By the store's clock too: a claim whose answer was lost was sent in an earlier step.
            self.start(store, claim, min(sent, when(claim.acquired_at)))
        if offered:
            point("after_run_sent")
        for won, at in late:
            store.history.started(won, at)
        for claim in store.history.violations if claims else ():
            self.failures += 1
            self.tell("tripwire", about=claim.occurrence, text="this due time had a run already: was a commit lost?")
        return claims

    def _want_the_others(self, ready: Sequence[Occurrence], claims: Sequence[Claim], step: Step) -> None:
        """Look again for what was not won: somebody was faster, no slot is free, or a row was locked for a moment."""
        won = {_key(claim.occurrence) for claim in claims}
        full = len(self.running) >= self.settings.max_concurrency or not claims
        for occurrence in ready:
            key = _key(occurrence)
            if key in won:
                self._offered.pop(key, None)
                if occurrence.task.catch_up != EVERY_MISSED:
                    continue
            elif len(self.running) < self.settings.max_concurrency:
                # With no slot free, nobody else need have been there.
                self._offered[key] = occurrence
            if not full:
                self._tried[key] = self._tried.get(key, 0) + 1
            if self._is_still_tried(occurrence):
                step.no_later_than(boot_time() + (1.0 if full else _AGAIN))

    def _tell_who_was_slower(self, store: Store, found: Plan) -> None:
        """
        Say of each due time that was offered, not won and is not open any more: another server has it.

        Not where a newer one of the same row is open, which may have passed it over.
        """
        still = {_key(occurrence) for occurrence in found.ready}
        still |= {_key(occurrence) for pairs in (found.held, found.resting) for occurrence, _ in pairs}
        of_this = [key for key, occurrence in self._offered.items() if occurrence.task.name in store.declared.tasks]
        open_rows = {row for row, _ in still}
        for key in of_this:
            if key not in still:
                occurrence = self._offered.pop(key)
                if occurrence.row not in open_rows and not self.maintenance:
                    self.tell("busy", about=occurrence)
        for key in [key for key in self._tried if key not in still and store.declared.task_of(key[0]) is not None]:
            del self._tried[key]

    def start(self, store: Store, claim: Claim, sent: float) -> None:
        """Run what was claimed; ``sent`` is the boot time before the claim was sent, from which its lease counts."""
        lease = claim.occurrence.lease.total_seconds()
        limit = claim.task.limit
        running = Running(claim=claim, store=store, until=sent + lease, began_at=claim.acquired_at, began=boot_time())
        self.running[claim.owner] = running
        if running.began >= sent + lease - Margins.of(lease).term:
            # This process was stopped, or the store took that long to answer: another server may be running it by now.
            self._ended(
                claim.owner, Outcome(status="lost", reason="its lease was over before it could start"), told=False
            )
            return
        self.runner.run(
            claim, until=sent + lease, finish_by=None if limit is None else boot_time() + limit.total_seconds()
        )
        about = claim.occurrence
        self.tell("claimed", about=about, fence=claim.fence, trigger=about.trigger, attempt=about.attempt)
        if about.missed:
            self.tell(
                "skipped", about=about, due_at=about.missed_at or about.due_at, reason="missed", count=about.missed
            )
        self._tell_forgone(about)

    def _skip(
        self,
        store: Store,
        found: Plan,
        look: Look,
        step: Step,
        when: Callable[[datetime], float],
        now: datetime | None,
    ) -> None:
        skips = list(found.missed)
        for occurrence, row in found.held:
            alive = row.renewed_at is not None and row.renewed_at >= occurrence.due_at
            if occurrence.task.overlap in WAITING:
                if occurrence.task.overlap == "cancel_other" and row.owner is not None and not row.cancelled:
                    store.lock.cancel({row.task: row.owner}, now=now)
                # A pass that only waits for its turn leaves the looking to the next one, in good part.
                patient = occurrence.task.overlap == "queue_one" and self.hand_over is not None
                step.no_later_than(boot_time() + (5.0 if patient else 1.0))
            elif alive and occurrence.task.catch_up != EVERY_MISSED:
                skips.append(Skip(occurrence=occurrence, reason="held", holder=row.server, held_since=row.acquired_at))
            elif self._is_still_tried(occurrence):
                # Alive or dead? Its next renewal tells, or the end of its lease: until then the due time stays open.
                renewal = (row.renewed_at or look.now) + self.settings.heartbeat + timedelta(seconds=0.5)
                moment = min(renewal, row.expires_at or renewal)
                step.no_later_than(max(when(moment) + 0.01, boot_time() + _AGAIN))
        if skips:
            for skip in store.lock.skip(skips, record=store.history.skipped, now=now):
                about = skip.occurrence
                self.tell(
                    "skipped",
                    about=about,
                    reason=skip.reason,
                    holder=skip.holder,
                    held_since=skip.held_since,
                    count=about.missed + 1,
                )
                self._tell_forgone(about)

    def _tell_forgone(self, about: Occurrence) -> None:
        """Say that the attempt which the history promises for the due time before was not made."""
        if about.forgone_at is not None:
            self.tell("forgone", about=about, due_at=about.forgone_at)

    # -- renew ------------------------------------------------------------------------------------------------------

    def renew(self, *, now: datetime | None = None) -> None:
        """Renew every lease, in one statement a store; a run whose lease is lost is ended."""
        for store in self.stores:
            self.renew_in(store, now=now)

    def renew_in(self, store: Store, *, now: datetime | None = None) -> None:
        """Renew every lease in one store."""
        mine = [each for each in self.running.values() if each.store is store and not each.lost and not each.cancelled]
        if not mine:
            return
        sent = boot_time()
        standing = store.lock.renew([running.claim for running in mine], now=now)
        moved = {}
        cancelled = self._cancelled(store, [running for running in mine if running.claim.owner not in standing])
        for running in mine:
            claim = running.claim
            if claim.owner in standing:
                running.until = moved[claim.owner] = sent + claim.occurrence.lease.total_seconds()
            elif claim.owner in cancelled:
                # Its lease is not renewed any more, and lasts until it is released, or as long as it would have.
                running.cancelled = True
                self.runner.end(claim.owner, "cancelled")
            else:
                running.lost = True
                self.runner.end(claim.owner, "lost")
                self.tell("lost", about=claim.occurrence, fence=claim.fence)
        self.runner.renew(moved)

    def _cancelled(self, store: Store, missing: Sequence[Running]) -> set[str]:
        """Return the owners among those whose lease was not renewed that have it still, and shall end."""
        if not missing:
            return set()
        rows = store.lock.rows([running.claim.occurrence.row for running in missing])
        return {row.owner for row in rows if row.cancelled and row.owner is not None}

    # -- record and release -----------------------------------------------------------------------------------------

    def take(self, messages: Iterable[Message], *, now: datetime | None = None) -> bool:
        """Record and release what has ended; tell whether anything had."""
        self.note(messages)
        return self.release(now=now)

    def note(self, messages: Iterable[Message]) -> None:
        """Take in what the runner says: what has ended is to be recorded and released."""
        for message in messages:
            if isinstance(message, Ended):
                self._ended(message.owner, message.outcome, message.told)
            elif isinstance(message, Vanished):
                # Whatever was running: also what was claimed and sent, but never seen to start.
                for owner in list(self.running):
                    seconds = boot_time() - self.running[owner].began
                    reason = "its runner was lost"
                    outcome = Outcome(status="lost", reason=reason, error=message.why, seconds=seconds)
                    self._ended(owner, outcome, told=False, cleanup="runner_lost")
            elif isinstance(message, Started):
                self._tell_start(message.owner)

    def _tell_start(self, owner: str) -> None:
        """Have ``task_started`` sent for a program, of which no process of ours is there to say it itself."""
        running = self.running.get(owner)
        if running is not None and starts_untold(running.claim.task):
            about = running.claim.occurrence
            self.tell(
                "started",
                about=about,
                fence=running.claim.fence,
                trigger=about.trigger,
                attempt=about.attempt,
                started_at=running.began_at,
                key=about.key,
            )

    def _ended(self, owner: str, outcome: Outcome, told: bool, cleanup: CleanupReason | None = None) -> None:
        running = self.running.pop(owner, None)
        if running is None:
            return
        if running.cancelled and outcome.status in ("failed", "lost"):
            outcome = dataclasses.replace(
                outcome, status="cancelled", reason="a newer due time went before it", error=""
            )
        elif outcome.started and outcome.status != "succeeded":
            self.failures += 1
        if outcome.status == "timed_out":
            cleanup = "overran"
        retry_in = _retry_in(running, outcome, cleanup)
        if retry_in is not None:
            again = f"tried again in {retry_in.total_seconds():.0f} s" if retry_in else "run again"
            outcome = dataclasses.replace(outcome, reason="; ".join(filter(None, [outcome.reason, again])))
        self.unrecorded.append(Finished(running, outcome, told, cleanup, retry_in))

    def release(self, *, now: datetime | None = None) -> bool:
        """Record and release everything that has ended; raises what a store raises, and forgets nothing then."""
        if not self.unrecorded:
            return False
        for store in self.stores:
            self.release_in(store, now=now)
        return True

    def release_in(self, store: Store, *, now: datetime | None = None) -> None:
        """Record and release what has ended and is locked in one store."""
        mine = [finished for finished in self.unrecorded if finished.running.store is store]
        if not mine:
            return
        point("before_release")
        released = [
            ReleasedClaim(
                claim=finished.running.claim,
                outcome=finished.outcome,
                # Who was cancelled makes way at once.
                min_break=timedelta(0) if finished.running.cancelled else finished.running.claim.occurrence.min_break,
                cleanup=finished.cleanup,
                retry_in=finished.retry_in,
            )
            for finished in mine
        ]
        stood = store.lock.release(released, record=store.history.finished, now=now)
        point("after_release")
        self.unrecorded = [finished for finished in self.unrecorded if finished.running.store is not store]
        for finished, kept in zip(mine, stood, strict=True):
            self._tell_end(finished, lost=not kept)
        for cleanup in store.history.cleanups:
            self.tell_cleanup(store, cleanup)
        if self.hand_over is not None:
            self._stay_for(store, [item for item, kept in zip(mine, stood, strict=True) if kept and item.retry_in])

    def _stay_for(self, store: Store, retried: Sequence[Finished]) -> None:
        """
        Have this pass be there for attempts that are due within a minute, or that the next due time follows within one.

        All others are seen by a later pass.
        """
        if not retried:
            return
        waits = {finished.running.claim.occurrence.row: finished.retry_in for finished in retried}
        for row in store.lock.rows(list(waits)):
            wait = waits[row.task]
            if row.retry_at is None or wait is None:
                continue
            left = timedelta.max if row.next_due_at is None else row.next_due_at - row.retry_at
            if wait < _MINUTE or left < _MINUTE + AHEAD:
                self._attempts[store.lock.alias, row.task] = row.retry_at

    def _wait_for_attempts(self, store: Store, look: Look, step: Step, when: Callable[[datetime], float]) -> None:
        """Have the step say when the first of the attempts is due that this pass stays for."""
        owed = {row.task for row in look.due if row.retry_at is not None}
        owed -= {running.claim.occurrence.row for running in self.running.values()}
        for (alias, row), moment in list(self._attempts.items()):
            if alias != store.lock.alias:
                continue
            if moment <= look.now and (row not in owed or moment + AHEAD < look.now):
                del self._attempts[alias, row]
                continue
            at = max(when(moment) + 0.01, boot_time() + _AGAIN)
            step.attempt_at = at if step.attempt_at is None else min(step.attempt_at, at)

    def forget_expired(self) -> None:
        """Give up recording runs whose lease is over too: whoever reaps them records that they were abandoned."""
        now = boot_time()
        for finished in [each for each in self.unrecorded if each.running.until + 1.0 <= now]:
            self.unrecorded.remove(finished)
            self._tell_end(finished, lost=True)

    def _tell_end(self, finished: Finished, *, lost: bool) -> None:
        running, outcome, told = finished.running, finished.outcome, finished.told
        claim, about = running.claim, running.claim.occurrence
        if lost and outcome.status != "lost":
            if outcome.status == "succeeded":
                self.failures += 1
            reason = f"it {outcome.status.replace('_', ' ')}, but its lease was lost"
            outcome, told = dataclasses.replace(outcome, status="lost", reason=reason), False
        running.outcome = outcome
        if not (lost or outcome.started):
            self.tell("skipped", about=about, reason="filtered")
            if about.attempt > 1:
                self._tell_that_it_stays_failed(claim)
            return
        self.tell(
            "ended",
            about=about,
            status=outcome.status,
            seconds=outcome.seconds,
            reason=outcome.reason,
            error=outcome.error,
            fence=claim.fence,
            trigger=about.trigger,
            attempt=about.attempt,
            told=told,
            started_at=running.began_at,
            key=about.key,
        )
        if not finished.told:
            # Nobody is left in the run's own process to take the steps that follow its end.
            for event in events(claim, outcome, final=lost or finished.retry_in is None):
                self.runner.report(event)

    def _tell_that_it_stays_failed(self, claim: Claim) -> None:
        """Tell of a failure that was to be tried again, now that the task's own conditions have refused that."""
        why = f"had failed, and its own conditions said no to attempt {claim.occurrence.attempt}"
        self.tell("forgone", about=claim.occurrence, why=why)
        failed = Outcome(status="failed", error=why)
        for event in events(claim, failed, final=True, late=True):
            self.runner.report(event)

    # -- tell -------------------------------------------------------------------------------------------------------

    def tell(self, kind: str, *, about: Occurrence | None = None, **more: Any) -> None:
        """Hand an event to the reporter: nothing that a receiver or a log handler does can hold a lease up."""
        event: dict[str, Any] = {"kind": kind, "server": self.settings.server_name}
        if about is not None:
            event.update(task=about.row, due_at=about.due_at)
        event.update(more)
        self.runner.report({key: _plain(value) for key, value in event.items()})

    def _tell_standstill(self, why: str, *, holds: bool) -> None:
        """Say what keeps everything from being started, once for as long as it does."""
        if not holds:
            self._standstill.discard(why)
        elif why not in self._standstill:
            self._standstill.add(why)
            self.tell("note", text=why, verbosity=2)

    def _of_maintenance(self) -> str:
        tasks = [task for store in self.stores for task in store.declared.tasks.values()]
        left = ", ".join(sorted(task.name for task in tasks if task.even_in_maintenance_mode))
        return f"maintenance mode (MAINTENANCE_MODE): nothing is started{f' but {left}' if left else ''}"

    def tell_paused(self, store: Store) -> None:
        """Say which due times of this server a pause of their task holds back: a look does not see them."""
        now, tasks = store.lock.clock(), store.declared.rows
        for row in store.lock.rows(tasks):
            task = tasks[row.task]
            is_due = row.paused and row.wanted_from is not None and row.wanted_from <= now
            if is_due and is_meant_for(task, server=self.settings.server_name, environment=self.settings.environment):
                since = f" since {short(row.paused_at)}" if row.paused_at else ""
                why = f" ({row.paused_reason})" if row.paused_reason else ""
                self.tell("note", text=f"{row.task} is due, and paused{since}{why}", verbosity=2)

    def tell_cleanup(self, store: Store, cleanup: Cleanup) -> None:
        """Have the signal of a clean-up sent, by the server that made it."""
        task = store.declared.task_of(cleanup.task)
        fields = {key: _plain(getattr(cleanup, key)) for key in _CLEANUP}
        self.tell("cleaned", cleanup=fields, command=task.text if task else cleanup.task, alias=store.history.using)


_CLEANUP: Final = [item.name for item in dataclasses.fields(Cleanup)]


def _retry_in(running: Running, outcome: Outcome, cleanup: CleanupReason | None) -> timedelta | None:
    """Return after how long the due time is to be tried again; None where this was the end of it."""
    about = running.claim.occurrence
    if outcome.status in ("failed", "timed_out"):
        ended_at = running.began_at + timedelta(seconds=boot_time() - running.began)
        return about.retry_after if about.is_retried(ended_at) else None
    if cleanup == "runner_lost" and about.attempt < about.rerun_up_to:
        return timedelta(0)
    return None


def _why_not(row: Row, wanted: Occurrence, *, put_off: bool) -> NotStarted:
    """Say why a run that somebody asked for was not started; ``put_off``: its store lets nobody start it yet."""
    if row.owner is not None and not wanted.may_overlap:
        return NotStarted(f"held by {row.server} since {row.acquired_at:%Y-%m-%d %H:%M:%SZ}")
    if row.moved_from:
        return NotStarted(f"its last run in the lock {row.moved_from!r} has not ended")
    if row.moved_to:
        return NotStarted(f"it is in the lock {row.moved_to!r} now")
    if put_off:
        until = f"{row.not_before:%Y-%m-%d %H:%M:%SZ}"
        why = f"its lock's store is new or has lost data, and lets nobody start before {until}"
        return NotStarted(why, is_passing=True)
    # It is free by now: its holder has let it go since, or a neighbour's claim had it locked and has not taken it.
    return NotStarted("another server had its row locked just then", is_passing=True)


def _is_at_rest(row: Row, now: datetime) -> bool:
    return row.owner is None and row.not_before <= now


def _key(occurrence: Occurrence) -> tuple[str, datetime]:
    return occurrence.row, occurrence.due_at


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value
