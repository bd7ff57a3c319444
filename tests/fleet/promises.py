"""
Says whether what was promised of services was kept, beyond the invariants: on time, nothing lost, an orderly end.

Like ``checker``, it reads the journal and the tables alone. Its measure: from the moment on at which a due time was
open and its task free (not held, not at rest), somebody has to start it within a bound. Who holds it is no excuse any
more when it is freed; that a dead holder is freed in time, ``checker`` sees (I4). Each finding begins with the promise:

=== ==================================================================================================================
P1  on time: started within the bound of the first moment at which it could be; nothing that was open is left open
P2  nothing lost: what was not run is recorded as held while another run had it, or missed before one that came
P3  a run ends otherwise than its task does only on a server that was killed or stopped, and while it was
P4  what a killed server ran is abandoned, cleaned up once, and told of once
P5  a server that was told to end claims nothing more, and ends its runs within its grace as they end themselves
P6  a failure is tried again, after its back-off; so is a due time whose server died, where that was asked for
=== ==================================================================================================================
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

from .checker import RELEASED, SCHEDULED, Clock, Evidence, Told

MOMENT = timedelta(seconds=0.25)
"""That two statements, or a signal and a statement, may be apart."""
GONE = ("abandoned", "lost")
SPREAD = 1.2
"""A back-off is up to a fifth longer or shorter."""


@dataclass
class Findings:
    """What is wrong, in words, and what was measured."""

    wrong: list[str] = field(default_factory=list)
    late: list[tuple[float, str]] = field(default_factory=list)
    """Seconds from the moment at which it could start to its first line, and which due time."""
    recovered: list[tuple[float, str]] = field(default_factory=list)
    """Seconds from the death of a server to the clean-up of what it held."""
    at_end: Counter[str] = field(default_factory=Counter)

    def lateness(self, share: float) -> float:
        """Return within how many seconds this share of the due times was started."""
        late = sorted(late for late, _ in self.late)
        return late[min(len(late) - 1, int(share * len(late)))] if late else 0.0


@dataclass(frozen=True)
class Blow:
    """Something that was done to a server: killed, stopped, terminated."""

    event: str
    server: str
    keeper: int
    at: datetime
    until: datetime | None = None
    """When it went on again; of a terminated one: when it had ended."""


def kept(
    evidence: Evidence,
    tasks: Mapping[str, Told],
    *,
    bound: float,
    grace: float,
    since: datetime,
    until: datetime,
) -> Findings:
    """
    Return what was not kept.

    ``since``: from when on a server was up. ``until``: from when on nobody had to start anything any more. ``bound``:
    seconds in which everything has to be started. ``grace``: seconds that a server that is told to end gives its runs.
    """
    return _Promises(evidence, tasks, timedelta(seconds=bound), timedelta(seconds=grace), since, until).check()


class _Promises:
    def __init__(
        self,
        evidence: Evidence,
        tasks: Mapping[str, Told],
        bound: timedelta,
        grace: timedelta,
        since: datetime,
        until: datetime,
    ) -> None:
        self.evidence, self.tasks = evidence, tasks
        self.bound, self.grace = bound, grace
        self.since, self.until = since, until
        self.found = Findings()
        self.clock = Clock(evidence.lines)
        self.cleaned = {cleanup.owner: cleanup for cleanup in evidence.cleanups}
        self.claims: dict[str, list[Any]] = defaultdict(list)
        """Of each task, in the order in which they were made."""
        for run in sorted((run for run in evidence.runs if run.status != "skipped"), key=lambda run: run.started_at):
            self.claims[run.task].append(run)
        self.began: dict[tuple[str, int], datetime] = {}
        for line in evidence.lines:
            if line["event"] == "start":
                self.began.setdefault((line["task"], line["fence"]), self.clock.at(line["boot"]))
        self.blows = list(self._blows())

    def _blows(self) -> Iterable[Blow]:
        ends: dict[int, datetime] = {}
        for line in reversed(self.evidence.lines):
            if line["event"] in ("continued", "ended"):
                ends[line["keeper"]] = self.clock.at(line["boot"])
            elif line["event"] in ("killed", "stopped", "terminated"):
                keeper = line["keeper"]
                yield Blow(line["event"], line["server"], keeper, self.clock.at(line["boot"]), ends.get(keeper))

    def check(self) -> Findings:
        for task, told in self.tasks.items():
            given_up = self.skipped(task, told)
            self.on_time(task, told, given_up.get("missed", set()))
            self.nothing_lost(task, told, given_up)
            self.tried_again(task, told)
        for run in (run for runs in self.claims.values() for run in runs):
            self.ended_as_it_does(run)
        for blow in self.blows:
            if blow.event == "killed":
                self.cleaned_up_after(blow)
            elif blow.event == "terminated":
                self.ended_in_order(blow)
        return self.found

    def say(self, promise: str, text: str) -> None:
        self.found.wrong.append(f"{promise}: {text}")

    def freed(self, run: Any) -> datetime | None:
        """Return when the task was free again after this run."""
        cleanup = self.cleaned.get(run.owner)
        freed: datetime | None = cleanup.cleaned_at if cleanup is not None else run.finished_at
        return freed

    def rested(self, run: Any, told: Told) -> datetime | None:
        """Return when the break after this run was over; there is none after a clean-up."""
        freed = self.freed(run)
        return freed + told.min_break if freed is not None and run.status in RELEASED else freed

    # -- P1 -----------------------------------------------------------------------------------------------------------

    def on_time(self, task: str, told: Told, missed: set[datetime]) -> None:
        """Jitter is the earliest that any of them was after its due time: it is the same for all."""
        runs = self.claims[task]
        firsts = [run for run in runs if run.attempt == 1 and run.trigger in SCHEDULED]
        later = timedelta(0)
        if told.later and firsts:
            later = min(run.started_at - run.due_at for run in firsts)
            if later > timedelta(seconds=told.later) + self.bound:
                self.say("P1", f"{task} is {later.total_seconds():.2f} s after its due times, jitter is {told.later}")
        before: Any = None
        passed = None
        for run in runs:
            if run.attempt == 1 and run.trigger in SCHEDULED:
                due = told.due(passed or self.since - timedelta(seconds=1), run.due_at) or [run.due_at]
                open_since = run.due_at
                for moment in reversed(due[:-1]):
                    if moment not in missed:
                        break
                    open_since = moment
                ready = max(open_since + later, self.since, (before and self.rested(before, told)) or self.since)
                self.started(run, ready)
                passed = run.due_at
            before = run
        self.nothing_left_open(task, told, later, before)

    def started(self, run: Any, ready: datetime) -> None:
        began = self.began.get((run.task, run.fence))
        if run.started_at < run.due_at:
            self.say("P1", f"{run.task} {run.due_at} was started early, at {run.started_at}")
        if began is None:
            # Its server died before it came to that, which the other promises are about; the claim was in time all
            # the same.
            began = run.started_at
        late = max(0.0, (began - ready).total_seconds())
        self.found.late.append((late, f"{run.task} {run.due_at:%H:%M:%S} on {run.server}"))
        if began > ready + self.bound:
            self.say("P1", f"{run.task} {run.due_at} was started {late:.2f} s late, on {run.server}")

    def nothing_left_open(self, task: str, told: Told, later: timedelta, last: Any) -> None:
        lock = next((lock for lock in self.evidence.locks if lock.task == task), None)
        if lock is None:
            self.say("P1", f"{task} has no row")
            return
        still_open = told.due(max(lock.last_due_at, self.since), self.until)
        if not still_open:
            return
        freed = self.rested(last, told) if last is not None else self.since
        if freed is None:
            self.say("P1", f"{task} is held for ever since {last.started_at}")
            return
        if max(still_open[0] + later, freed) + self.bound < self.until:
            self.say("P1", f"{task} {still_open[0]} was open, and nobody started it by {self.until}")

    # -- P2 -----------------------------------------------------------------------------------------------------------

    def skipped(self, task: str, told: Told) -> dict[str, set[datetime]]:
        """Return the due times that were given up, by the reason; a row of several stands for the last ones."""
        given_up: dict[str, set[datetime]] = {"held": set(), "missed": set()}
        for run in self.evidence.runs:
            if run.task == task and run.status == "skipped":
                reason = run.reason.split()[0]
                due = told.due(run.due_at - timedelta(days=1), run.due_at)[-run.count :]
                given_up.setdefault(reason, set()).update(due)
        return given_up

    def nothing_lost(self, task: str, told: Told, given_up: Mapping[str, set[datetime]]) -> None:
        for reason in given_up.keys() - {"held", "missed"}:
            self.say("P2", f"{task}: {len(given_up[reason])} due times were skipped: {reason}")
        ran = {run.due_at for run in self.claims[task]}
        everything = sorted(ran | {moment for moments in given_up.values() for moment in moments})
        for moment in sorted(given_up["held"]):
            if told.waits:
                self.say("P2", f"{task} {moment} was skipped, and waits")
            elif not self.was_held(task, moment, timedelta(seconds=told.later)):
                self.say("P2", f"{task} {moment} was skipped as held, and nobody held it")
        for moment, following in pairwise([*everything, None]):
            if moment not in given_up["missed"] or moment in ran:
                continue
            # One that is missed before a run counts as the time at which that was open.
            if following is None:
                self.say("P2", f"{task} {moment} was given up, and nothing ran in its place")
            elif following in given_up["held"] and not self.was_held(task, moment, timedelta(seconds=told.later)):
                self.say("P2", f"{task} {moment} was missed, though nobody held it")

    def was_held(self, task: str, moment: datetime, later: timedelta) -> bool:
        for run in self.claims[task]:
            freed = self.freed(run)
            if run.started_at <= moment + later + MOMENT and (freed is None or freed >= moment - MOMENT):
                return True
        return False

    # -- P3, P4, P5 ---------------------------------------------------------------------------------------------------

    def ended_as_it_does(self, run: Any) -> None:
        told = self.tasks.get(run.task)
        own = "failed" if told is not None and run.attempt <= told.failures else "succeeded"
        self.found.at_end[run.status] += 1
        if run.status == own:
            return
        about = f"{run.task} {run.due_at} attempt {run.attempt} on {run.server}"
        if run.status not in GONE:
            self.say("P3", f"{about} {run.status}: {run.reason or run.error.strip()[-200:]}")
        elif not any(self.hit(blow, run) for blow in self.blows):
            self.say("P3", f"{about} was {run.status}, and nothing was done to its server: {run.reason}")
        elif run.owner not in self.cleaned:
            self.say("P3", f"{about} was {run.status}, and nobody had cleaned it up: {run.reason}")

    def hit(self, blow: Blow, run: Any) -> bool:
        """Was this run's server killed, or stopped, while it ran?"""
        if blow.event not in ("killed", "stopped") or blow.server != run.server:
            return False
        freed = self.freed(run)
        return run.started_at < blow.at + MOMENT and (freed is None or freed > blow.at - MOMENT)

    def cleaned_up_after(self, blow: Blow) -> None:
        told = Counter(line["owner"] for line in self.evidence.lines if line["event"] == "cleanup")
        held = 0
        for run in (run for runs in self.claims.values() for run in runs):
            if run.server != blow.server or run.started_at > blow.at:
                continue
            if run.finished_at is not None and run.finished_at < blow.at + MOMENT:
                continue
            held += 1
            cleanups = [cleanup for cleanup in self.evidence.cleanups if cleanup.owner == run.owner]
            about = f"{run.task} {run.due_at}, which {blow.server} ran when it was killed,"
            if run.status != "abandoned":
                self.say("P4", f"{about} is {run.status}")
            if len(cleanups) != 1 or told[run.owner] != 1:
                self.say("P4", f"{about} has {len(cleanups)} clean-ups, which were told of {told[run.owner]} times")
            for cleanup in cleanups:
                after = (cleanup.cleaned_at - blow.at).total_seconds()
                self.found.recovered.append((after, f"{run.task} on {blow.server}"))
        if not held:
            self.say("P4", f"{blow.server} ran nothing when it was killed: that proves nothing")

    def ended_in_order(self, blow: Blow) -> None:
        ended = next(
            (line for line in self.evidence.lines if line["event"] == "ended" and line["keeper"] == blow.keeper), None
        )
        if ended is None or ended["status"] != 0 or blow.until is None:
            self.say("P5", f"{blow.server} was told to end, and ended with {ended and ended['status']}")
            return
        held = 0
        for run in (run for runs in self.claims.values() for run in runs):
            if run.server != blow.server:
                continue
            if blow.at + MOMENT < run.started_at < blow.until - MOMENT:
                self.say("P5", f"{run.task} {run.due_at} was claimed by {blow.server}, which had been told to end")
            if not run.started_at < blow.at < (run.finished_at or blow.until):
                continue
            held += 1
            if run.finished_at is None or run.finished_at > blow.at + self.grace + MOMENT:
                self.say("P5", f"{run.task} {run.due_at}, which {blow.server} ran at its end, lasted beyond its grace")
            if run.status not in ("succeeded", "failed"):
                self.say("P5", f"{run.task} {run.due_at}, which {blow.server} ran at its end, is {run.status}")
        if not held:
            self.say("P5", f"{blow.server} ran nothing when it was told to end: that proves nothing")

    # -- P6 -----------------------------------------------------------------------------------------------------------

    def tried_again(self, task: str, told: Told) -> None:
        attempts = {(run.due_at, run.attempt): run for run in self.claims[task] if run.trigger in SCHEDULED}
        for (due_at, number), run in attempts.items():
            freed = self.freed(run)
            if freed is None:
                continue
            wait = timedelta(0)
            if run.status == "failed" and number <= told.retries:
                wait = told.backoff * 2 ** (number - 1)
            elif not (run.status in GONE and told.reruns):
                if (due_at, number + 1) in attempts:
                    self.say("P6", f"{task} {due_at} was {run.status} and tried again")
                continue
            following = attempts.get((due_at, number + 1))
            by = freed + wait * SPREAD + self.bound
            if following is None:
                if not told.due(due_at, by) and by < self.until:
                    self.say("P6", f"{task} {due_at} {run.status}, and was not tried again by {by}")
                continue
            if following.started_at < freed + wait * (2 - SPREAD) - MOMENT:
                self.say("P6", f"{task} {due_at} was tried again at {following.started_at}, before {freed} and {wait}")
            if following.started_at > by:
                self.say("P6", f"{task} {due_at} was tried again at {following.started_at}, not by {by}")


def spread(found: Sequence[tuple[float, str]]) -> str:
    """Return the least and the most of what was measured, in words."""
    if not found:
        return "none"
    return f"{min(found)[0]:.2f} to {max(found)[0]:.2f} s"
