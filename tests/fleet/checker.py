"""
Says what went wrong, from the journal and the tables alone: I1 to I9 as far as they can be seen there.

It imports nothing of the engine and knows nothing of how it works: what was declared is told to it (``Told``), in words
simple enough to be checked by reading.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from typing import Any

from multiserver_schedule.history import FORGOTTEN

Due = Callable[[datetime, datetime], list[datetime]]
"""Return the due times in ``(after, until]``."""

SCHEDULED = ("schedule", "catch_up")
RELEASED = ("succeeded", "failed", "timed_out")
WORK = ("start", "tick", "end")
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def interval(seconds: int) -> Due:
    """Return the due times of ``every(seconds=…)``: counted from 1970."""

    def due(after: datetime, until: datetime) -> list[datetime]:
        first = int((after - EPOCH).total_seconds() // seconds) + 1
        last = int((until - EPOCH).total_seconds() // seconds)
        return [EPOCH + timedelta(seconds=number * seconds) for number in range(first, last + 1)]

    return due


@dataclass(frozen=True, kw_only=True)
class Told:
    """One declared task, as the checker is told of it."""

    due: Due
    min_break: timedelta = timedelta(0)
    window: timedelta = timedelta(minutes=1)
    """How old a due time may be and still be run."""
    overlap: bool = False
    servers: tuple[str, ...] = ()
    """Those that may run it; all, when none is named."""
    on_every_server: bool = False
    every_missed: bool = False
    waits: bool = False
    """Is it not skipped while another run has it, but waits for its end?"""
    later: float = 0.0
    """Seconds of jitter: each due time starts later by up to so much, always by the same."""
    retries: int = 0
    backoff: timedelta = timedelta(0)
    failures: int = 0
    """So many first attempts at each due time fail."""
    reruns: int = 0
    """How often a due time is run again because its server died."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that the checker looks at."""

    lines: Sequence[Mapping[str, Any]]
    runs: Sequence[Any]
    locks: Sequence[Any]
    cleanups: Sequence[Any]
    now: datetime
    """The database's clock when the tables were read."""
    afterwards: bool = False
    """Is the history written after the fact? Then a keeper that was killed may not have come to write all of it."""
    lossy: bool = False
    """Did the store lose data in the course of it? Then it has forgotten rows, fences, breaks, and whom to clean up."""
    since: datetime | None = None
    """From when on due times count, where the rows have forgotten it."""
    killed: Collection[int] = ()
    """Keepers that did not come to their own end."""


def check(
    evidence: Evidence,
    tasks: Mapping[str, Told],
    *,
    lease: float,
    look_every: float,
    slack: float = 0.25,
    at_rest: bool = True,
) -> list[str]:
    """
    Return what is wrong, in words, each beginning with the invariant; nothing when all is well.

    ``look_every``: seconds within which a healthy server looked, whatever was done to the others. ``slack``: seconds
    that two statements of one transaction may be apart. ``at_rest``: nothing ran any more when the tables were read.
    """
    return _Checker(evidence, tasks, lease, look_every, slack, at_rest).check()


def unaccounted(evidence: Evidence, tasks: Mapping[str, Told]) -> dict[str, int]:
    """
    Return how many due times of each row nothing tells of, where the store lost data; below 0: told of twice.

    They count from the first that ran: of a row that is lost before, nobody can know that there was one.
    """
    checker = _Checker(evidence, tasks, 0, 0, 0, True)
    checker.no_due_time_lost()
    return checker.unaccounted


class Clock:
    """Maps boot time on the database's, by the pairs that the test noted."""

    def __init__(self, lines: Iterable[Mapping[str, Any]]) -> None:
        self.pairs = sorted(
            (line["at"], moment_of(line["now"]), line["spread"]) for line in lines if line["event"] == "clock"
        )

    def earliest(self, boot: float) -> datetime:
        """Return the earliest that the database's clock can have said at ``boot``."""
        found = max(0, bisect_right(self.pairs, boot, key=lambda pair: pair[0]) - 1)
        at, now, spread = self.pairs[found]
        # A millisecond, since SQLite's clock has no more.
        return now + timedelta(seconds=boot - at - spread / 2 - 0.001)

    def at(self, boot: float) -> datetime:
        """Return what it most likely said."""
        earliest, latest = self.earliest(boot), self.latest(boot)
        return earliest + (latest - earliest) / 2

    def latest(self, boot: float) -> datetime:
        """Return the latest that it can have said."""
        found = max(0, bisect_right(self.pairs, boot, key=lambda pair: pair[0]) - 1)
        at, now, spread = self.pairs[found]
        return now + timedelta(seconds=boot - at + spread / 2 + 0.001)


class _Checker:
    def __init__(
        self,
        evidence: Evidence,
        tasks: Mapping[str, Told],
        lease: float,
        look_every: float,
        slack: float,
        at_rest: bool,
    ) -> None:
        self.evidence = evidence
        self.tasks = tasks
        self.lease = timedelta(seconds=lease)
        self.look_every = timedelta(seconds=look_every)
        self.slack = timedelta(seconds=slack)
        self.at_rest = at_rest
        self.wrong: list[str] = []
        self.clock = Clock(evidence.lines)
        self.starts = [line for line in evidence.lines if line["event"] == "start"]
        self.claims = [run for run in evidence.runs if run.status != "skipped"]
        self.skips = [run for run in evidence.runs if run.status == "skipped"]
        self.cleaned = {cleanup.owner: cleanup for cleanup in evidence.cleanups}
        self.unaccounted: dict[str, int] = {}
        """By row of a store that lost data: due times of which nothing tells, less those that are told of twice."""
        self.work: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
        """What the processes of a claim noted, by row and fence."""
        for line in evidence.lines:
            if line["event"] in WORK:
                self.work[line["task"], line["fence"]].append(line)

    def check(self) -> list[str]:
        self.once_per_due_time()
        self.no_overlap()
        self.fences_rise()
        self.nothing_stuck()
        self.breaks_kept()
        self.cleanups_recorded()
        self.nothing_after_the_lease()
        self.only_what_is_declared()
        self.no_due_time_lost()
        return self.wrong

    def told(self, row: str) -> Told | None:
        return self.tasks.get(row.partition("@")[0])

    def may_overlap(self, row: str) -> bool:
        told = self.told(row)
        return told is not None and told.overlap

    def say(self, invariant: str, text: str) -> None:
        self.wrong.append(f"{invariant}: {text}")

    def may_be_unwritten(self, keeper: int | None) -> bool:
        """May this keeper have been killed before the history was written of what it did?"""
        # Killed before the run noted whose it was, it is none of those that were launched: the run has another parent.
        launched = {line.get("keeper") for line in self.evidence.lines if line["event"] == "launched"}
        was_gone = bool(launched) and keeper is not None and keeper not in launched
        return self.evidence.afterwards and (keeper in self.evidence.killed or was_gone)

    def may_never_end(self, run: Any) -> bool:
        """
        May it be that nobody has recorded, and nobody will, how this run ended?

        Its keeper was killed after the release and before the record; or its row was lost, so that nobody reaps it, and
        its keeper could not free it, or was killed.
        """
        if self.may_be_unwritten(self.keeper_of(run)):
            return True
        return self.evidence.lossy and not self.work.get((run.task, run.fence))

    def keeper_of(self, run: Any) -> int | None:
        """Return who kept a run: as its process noted, or, where it never began, a keeper of its server's."""
        for line in self.starts:
            if (line["task"], line["fence"]) == (run.task, run.fence):
                keeper: int = line["keeper"]
                return keeper
        of_server = [line.get("keeper") for line in self.evidence.lines if line.get("server") == run.server]
        return next((keeper for keeper in of_server if keeper in self.evidence.killed), None)

    def several(self, invariant: str, found: Iterable[Any], what: str) -> None:
        for key, count in Counter(found).items():
            if count > 1:
                self.say(invariant, f"{count} {what} {' '.join(map(str, key))}")

    # -- I1 -----------------------------------------------------------------------------------------------------------

    def once_per_due_time(self) -> None:
        scheduled = [line for line in self.starts if line["trigger"] in SCHEDULED]
        started = [(line["task"], line["due_at"], line["attempt"]) for line in scheduled]
        self.several("I1", started, "processes began for")
        self.several(
            "I1", [(line["task"], f"fence {line['fence']}") for line in self.starts], "processes began for the claim"
        )
        claimed = [(run.task, run.due_at, run.attempt) for run in self.claims if run.trigger in SCHEDULED]
        self.several("I1", claimed, "claims were made for")
        self.several("I1", [(run.task, run.due_at) for run in self.skips], "skips were recorded for")
        both = {(run.task, run.due_at) for run in self.claims if run.trigger in SCHEDULED}
        # Whoever finds a row lost cannot know whether its last due time ran, while that is not recorded.
        doubted = {(run.task, run.due_at) for run in self.skips if self.evidence.lossy and run.reason == "missed"}
        for task, due_at in sorted(both & {(run.task, run.due_at) for run in self.skips} - doubted):
            self.say("I1", f"{task} {due_at} was claimed and skipped")
        for run in self.claims:
            told = self.told(run.task)
            most = 1 + told.retries + told.reruns if told is not None else 1
            if run.attempt > most and (run.task, run.due_at) not in doubted:
                retried = f"only {most - 1} are promised" if most > 1 else "nothing retries"
                self.say("I1", f"{run.task} {run.due_at} has an attempt {run.attempt}, and {retried}")
        known = {(run.task, run.fence, run.due_at) for run in self.claims}
        for line in self.starts:
            if self.may_be_unwritten(line["keeper"]):
                continue
            if (line["task"], line["fence"], moment_of(line["due_at"])) not in known:
                self.say(
                    "I1",
                    f"a process began for {line['task']} {line['due_at']} fence {line['fence']}, which nobody claimed",
                )

    # -- I2 -----------------------------------------------------------------------------------------------------------

    def no_overlap(self) -> None:
        spans: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
        for (task, fence), lines in self.work.items():
            if not self.may_overlap(task):
                for pid in {line["pid"] for line in lines}:
                    boots = [line["boot"] for line in lines if line["pid"] == pid]
                    spans[task].append((min(boots), max(boots), fence))
        for task, found in spans.items():
            latest = (0.0, 0)
            for begin, end, fence in sorted(found):
                if begin < latest[0]:
                    self.say(
                        "I2",
                        f"{task} was at work twice: {latest[1]} to {latest[0]:.3f}, fence {fence} from {begin:.3f}",
                    )
                latest = max(latest, (end, fence))
        leases: dict[str, list[tuple[datetime, datetime | None, int]]] = defaultdict(list)
        for run in self.claims:
            if not self.may_overlap(run.task) and run.started_at is not None:
                end = run.finished_at
                if end is None and self.may_never_end(run):
                    continue
                if self.evidence.lossy and run.status == "lost" and run.owner not in self.cleaned:
                    # Its row was lost, and it was ended; when it noticed is not how long it held anything.
                    continue
                if run.owner in self.cleaned:
                    freed = self.cleaned[run.owner].cleaned_at
                    end = freed if end is None else min(end, freed)
                leases[run.task].append((run.started_at, end, run.fence))
        for task, held in leases.items():
            held.sort(key=lambda span: span[0])
            for (_, end, fence), (begin, _, next_fence) in pairwise(held):
                if end is None or begin < end - self.slack:
                    self.say(
                        "I2",
                        f"{task} fence {next_fence} was claimed at {begin}, and fence {fence} lasted to {end or 'now'}",
                    )

    # -- I3 -----------------------------------------------------------------------------------------------------------

    def fences_rise(self) -> None:
        self.several("I3", [(run.task, f"fence {run.fence}") for run in self.claims], "claims share")
        by_task: dict[str, list[tuple[Any, int]]] = defaultdict(list)
        for run in self.claims:
            if run.started_at is not None and not self.may_overlap(run.task):
                by_task[run.task].append((run.started_at, run.fence))
        for line in self.starts:
            if not self.may_overlap(line["task"]):
                by_task[f"{line['task']} (as its processes began)"].append((line["boot"], line["fence"]))
        for task, found in by_task.items():
            fences = [fence for _, fence in sorted(found)]
            for before, after in pairwise(fences):
                # Equal ones are told of above, by whoever counts claims and processes.
                if after < before:
                    self.say("I3", f"{task}: fence {after} came after fence {before}")
        highest: dict[str, int] = defaultdict(int)
        for run in self.claims:
            highest[run.task] = max(highest[run.task], run.fence)
        for cleanup in self.evidence.cleanups:
            if not self.may_overlap(cleanup.task):
                highest[cleanup.task] = max(highest[cleanup.task], cleanup.fence + (cleanup.reason == "lease_expired"))
        for lock in self.evidence.locks:
            # A row that was lost is registered with none: the next claim gets a higher one all the same.
            if lock.fence < highest[lock.task] and not self.evidence.lossy:
                self.say("I3", f"the row of {lock.task} has fence {lock.fence}, and {highest[lock.task]} was given out")

    # -- I4 -----------------------------------------------------------------------------------------------------------

    def nothing_stuck(self) -> None:
        for cleanup in self.evidence.cleanups:
            if cleanup.reason != "lease_expired" or cleanup.expired_at is None:
                continue
            late = cleanup.cleaned_at - cleanup.expired_at
            if late > self.look_every:
                self.say(
                    "I4", f"{cleanup.task} fence {cleanup.fence} was freed {late.total_seconds():.1f} s after its lease"
                )
            if late < -timedelta(milliseconds=2):
                self.say(
                    "I4",
                    f"{cleanup.task} fence {cleanup.fence} was freed {-late.total_seconds():.1f} s before its end",
                )
        owners = {(run.task, run.fence): run for run in self.claims}
        for line in self.evidence.lines:
            if (
                line["event"] != "killed"
                or line.get("which", "keeper") not in ("keeper", "both", "all")
                or not self.clock.pairs
            ):
                continue
            freed_by = self.clock.latest(line["boot"]) + self.lease + self.look_every
            for start in self.starts:
                run = owners.get((start["task"], start["fence"]))
                if start.get("keeper") != line["keeper"] or run is None:
                    continue
                if self.evidence.afterwards and run.owner not in self.cleaned:
                    # It had been released when its keeper was killed, or the store has forgotten it.
                    continue
                cleanup = self.cleaned.get(run.owner)
                freed = cleanup.cleaned_at if cleanup is not None else run.finished_at
                if freed is None and self.evidence.now <= freed_by:
                    continue
                if freed is None or freed > freed_by:
                    self.say(
                        "I4",
                        f"{run.task} fence {run.fence}: its holder was killed; free at {freed}, not by {freed_by}",
                    )
        for held in (*self.evidence.locks, *(run for run in self.claims if run.status == "running")):
            if held.expires_at is not None and held.expires_at < self.evidence.now - self.look_every:
                self.say(
                    "I4", f"{held.task} fence {held.fence} is held still by a lease that ended at {held.expires_at}"
                )

    # -- I5 -----------------------------------------------------------------------------------------------------------

    def breaks_kept(self) -> None:
        by_task: dict[str, list[Any]] = defaultdict(list)
        for run in self.claims:
            if not self.may_overlap(run.task) and run.started_at is not None and run.trigger in SCHEDULED:
                by_task[run.task].append(run)
        for task, runs in by_task.items():
            told = self.told(task)
            if told is None:
                continue
            runs.sort(key=lambda run: run.started_at)
            for before, after in pairwise(runs):
                # Another attempt has its own wait.
                if before.status in RELEASED and before.finished_at is not None and after.attempt == 1:
                    rest = after.started_at - before.finished_at
                    if rest < told.min_break - self.slack:
                        self.say(
                            "I5",
                            f"{task} rested {rest.total_seconds():.2f} s before {after.due_at}, not {told.min_break}",
                        )

    # -- I6 -----------------------------------------------------------------------------------------------------------

    def cleanups_recorded(self) -> None:
        self.several(
            "I6", [(cleanup.task, cleanup.owner) for cleanup in self.evidence.cleanups], "clean-ups were recorded of"
        )
        by_owner = {run.owner: run for run in self.claims}
        for run in self.claims:
            # Whose row was lost with the store's data, nobody could clean up: the task's next run says that it ended.
            is_forgotten = self.evidence.lossy and getattr(run, "reason", "") == FORGOTTEN
            if run.status == "abandoned" and run.owner not in self.cleaned and not is_forgotten:
                self.say("I6", f"{run.task} {run.due_at} was abandoned, and no clean-up says so")
        for owner, cleanup in self.cleaned.items():
            if cleanup.reason != "lease_expired":
                continue
            run = by_owner.get(owner)
            if run is None:
                self.say(
                    "I6", f"the clean-up of {cleanup.task} fence {cleanup.fence} is of a claim that is not recorded"
                )
            elif run.status not in ("abandoned", "lost"):
                self.say("I6", f"{run.task} {run.due_at} is {run.status}, and its lock was cleaned up")
        signals = [line for line in self.evidence.lines if line["event"] == "cleanup"]
        self.several("I6", [(line["task"], line["owner"]) for line in signals], "signals were sent for the clean-up of")
        for line in signals:
            if line["owner"] not in self.cleaned:
                self.say("I6", f"a signal was sent for a clean-up of {line['task']} that is not recorded")
        holders = {lock.owner for lock in self.evidence.locks}
        for run in self.claims:
            if run.status != "running":
                continue
            if self.may_never_end(run):
                continue
            if self.at_rest:
                self.say("I6", f"{run.task} {run.due_at} is running still, says its row, and nothing runs")
            elif run.owner not in holders and not self.may_overlap(run.task):
                self.say("I6", f"{run.task} {run.due_at} is running still, says its row, and another has its lock")
        if self.at_rest:
            for lock in self.evidence.locks:
                if lock.owner is not None:
                    self.say("I6", f"{lock.task} is held by {lock.server}, and nothing runs")

    # -- I7 -----------------------------------------------------------------------------------------------------------

    def nothing_after_the_lease(self) -> None:
        if self.evidence.cleanups and not self.clock.pairs:
            self.say("I7", "cannot be checked: the journal has no pair of clocks")
            return
        for cleanup in self.evidence.cleanups:
            if cleanup.reason != "lease_expired" or cleanup.expired_at is None:
                continue
            lines = self.work.get((cleanup.task, cleanup.fence), [])
            late = [line for line in lines if self.clock.earliest(line["boot"]) > cleanup.expired_at]
            if late:
                over = self.clock.earliest(late[-1]["boot"]) - cleanup.expired_at
                self.say(
                    "I7",
                    f"{cleanup.task} fence {cleanup.fence} was at work {over.total_seconds():.3f} s after its lease",
                )

    # -- I8 -----------------------------------------------------------------------------------------------------------

    def only_what_is_declared(self) -> None:
        done = [("ran", line["task"], line["server"]) for line in self.starts]
        done += [("claimed", run.task, run.server) for run in self.claims]
        done += [
            ("skipped", line["task"], line["server"])
            for line in self.evidence.lines
            # Whoever finds out what was lost tells of it.
            if line["event"] == "skipped" and not (self.evidence.lossy and line.get("reason") == "missed")
        ]
        for verb, row, server in sorted({(verb, str(row), server) for verb, row, server in done}):
            told = self.told(row)
            if told is None:
                self.say("I8", f"{server} {verb} {row}, which nobody declared")
            elif told.servers and server not in told.servers:
                self.say("I8", f"{server} {verb} {row}, which is not meant for it")
            elif "@" in row and row.partition("@")[2] != server:
                self.say("I8", f"{server} {verb} {row}")

    # -- I9 -----------------------------------------------------------------------------------------------------------

    def no_due_time_lost(self) -> None:
        for lock in self.evidence.locks:
            told = self.told(lock.task)
            if told is None:
                continue
            due = told.due(self.evidence.since or lock.schedule_since, lock.last_due_at)
            ran = [run.due_at for run in self.claims if run.task == lock.task and run.trigger in SCHEDULED]
            skipped = [run for run in self.skips if run.task == lock.task]
            count = len(set(ran)) + sum(run.count for run in skipped)
            if self.evidence.lossy:
                first = min(ran, default=lock.last_due_at)
                count = len(set(ran)) + sum(run.count for run in skipped if run.due_at > first)
                self.unaccounted[lock.task] = sum(moment >= first for moment in due) - count
            elif count != len(due):
                told_of = f"{len(set(ran))} were run and {count - len(set(ran))} skipped"
                self.say("I9", f"{lock.task}: of {len(due)} due times up to {lock.last_due_at}, {told_of}")
            for moment in sorted({*ran, *(run.due_at for run in skipped)} - set(due)):
                self.say("I9", f"{lock.task} was not due at {moment}")
            still_open = told.due(lock.last_due_at, self.evidence.now)
            if still_open and not told.on_every_server and not told.every_missed:
                age = self.evidence.now - still_open[0]
                if age > max(told.window, self.lease) + self.look_every + told.min_break:
                    self.say(
                        "I9", f"{lock.task} {still_open[0]} was neither run nor skipped in {age.total_seconds():.0f} s"
                    )


def moment_of(text: str | datetime) -> datetime:
    moment = text if isinstance(text, datetime) else datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
