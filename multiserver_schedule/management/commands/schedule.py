"""``manage.py schedule <verb>``: for the people who use the schedule and are on call for it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final
from zoneinfo import ZoneInfo

from django.core.management.base import CommandError, CommandParser

from multiserver_schedule import conf, keeper, operate, service
from multiserver_schedule.declare import registry
from multiserver_schedule.exceptions import ConfigurationError, DeclarationError, UnsafeTransaction
from multiserver_schedule.management import tables
from multiserver_schedule.management.byhand import by_hand
from multiserver_schedule.management.verbs import VerbCommand, at_least, zone_named
from multiserver_schedule.operate import pruning, words

NAME: Final = "as `schedule list` shows it"
_NO_STORES_FAULT: Final = (ConfigurationError, DeclarationError, UnsafeTransaction)


class Command(VerbCommand):
    """Shows and steers the schedule. Each verb has its own ``--help``."""

    help = (
        "Shows and steers the scheduled tasks: manage.py schedule "
        "list | explain | trigger | pause | resume | unlock | interrupt | backfill | prune | check."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        verb = self.verbs(parser)
        listing = verb("list", "every task: when it is due next, who runs it, how it went last, what it waits for")
        listing.add_argument(
            "--next", type=at_least(1), metavar="N", help="instead, the next N due times of all tasks, in order"
        )
        listing.add_argument("--timezone", metavar="ZONE", help="show times in this zone (default: TIME_ZONE)")

        explain = verb("explain", "one task: its schedule in words, what is in force for it, its next clock change")
        explain.add_argument("name", help=NAME)
        explain.add_argument("--next", type=at_least(1), default=5, metavar="N", help="so many due times (default: 5)")
        explain.add_argument("--timezone", metavar="ZONE", help="show local times in this zone (default: the task's)")

        trigger = verb("trigger", "run one task now and here, under the same lock; its schedule does not notice")
        trigger.add_argument("name", help=NAME)
        trigger.add_argument(
            "--no-wait", action="store_true", help="have the next pass or service run it, on whichever server"
        )

        pause = verb("pause", "let no server start these tasks, until they are resumed; what runs goes on")
        resume = verb("resume", "undo pause; what was due meanwhile is not made up for (see backfill)")
        for each in (pause, resume):
            each.add_argument("names", nargs="*", metavar="NAME", help=f"{NAME}; a task's name means all its servers")
            each.add_argument("--all", action="store_true", help="everything; single tasks keep their own pause")
            each.add_argument("--lock", default="", metavar="ALIAS", help="only what is in this lock")
        pause.add_argument("--reason", default="", metavar="TEXT", help="shown wherever the pause is")

        unlock = verb("unlock", "free the lock of a task whose server is gone; or mend what a wrong clock left behind")
        unlock.add_argument("name", nargs="?", help=NAME)
        unlock.add_argument(
            "--clock", action="store_true", help="all tasks whose times a store's clock that was ahead has put off"
        )
        unlock.add_argument(
            "--force", action="store_true", help="also while its holder looks alive, or by a clock that is still off"
        )
        unlock.add_argument("--lock", default="", metavar="ALIAS", help="where more than one lock has it: in this one")

        interrupt = verb("interrupt", "have services, and passes that stay for a minute, end after their current runs")
        interrupt.add_argument("--lock", default="", metavar="ALIAS", help="only those that look into this lock")

        backfill = verb("backfill", "run the due times of the past that no run has succeeded at, here, oldest first")
        backfill.add_argument("name", help=NAME)
        backfill.add_argument(
            "--from",
            dest="since",
            required=True,
            metavar="T",
            help="2026-11-20 or 2026-11-20T03:00, in the task's zone",
        )
        backfill.add_argument("--to", dest="until", default="", metavar="T", help="the same (default: now)")
        backfill.add_argument("--all", action="store_true", help="every due time, also those that have run")
        backfill.add_argument("--keep-going", action="store_true", help="after a failure, too")
        backfill.add_argument("--dry-run", action="store_true", help="only say which due times that would be")

        prune = verb("prune", "delete history that is older than it is kept, and rows of servers long gone")
        prune.add_argument(
            "--days",
            type=at_least(0, most=conf.MOST_DAYS),
            metavar="N",
            help="keep so many days (default: HISTORY_DAYS)",
        )
        prune.add_argument(
            "--runs", type=at_least(0), metavar="N", help="keep so many successes of a task (default: HISTORY_RUNS)"
        )
        prune.add_argument("--batch", type=at_least(1), default=500, metavar="N", help="rows at a time (default: 500)")
        prune.add_argument("--undeclared", action="store_true", help="take rows that are not declared here out of use")
        prune.add_argument("--dry-run", action="store_true", help="only say what would go")

        verb("check", "is everything as it should be: stores, clocks, declarations, rows, history")

    # -- look ---------------------------------------------------------------------------------------------------------

    def _list(self, *, json: bool, timezone: str | None, next: int | None, **options: Any) -> None:
        settings = conf.load()
        zone = zone_named(timezone or settings.time_zone)
        listing = operate.overview()
        ours = {task.name for task in registry.completed.values() if task.is_housekeeping}
        if not any(line.name not in ours for line in listing.lines) and not listing.troubles:
            self.stderr.write(service.nothing_declared(listing.found))
        self._note_maintenance()
        coming = operate.timeline(listing, next) if next else []
        if json:
            self._json(coming if next else listing.lines)
        elif next:
            now = max((line.as_of for line in listing.lines), default=None)
            for each in coming:
                self.stdout.write(tables.coming(each, now or each.at, zone))
        else:
            several = len(settings.locks) > 1
            for line in {line.lock: line for line in listing.lines if line.paused_with_everything}.values():
                self.stdout.write(tables.everything(line, zone, several=several) + "\n")
            for line in listing.lines:
                self.stdout.write(tables.listed(line, zone, several=several))
        if listing.lines and not json:
            self.stdout.write(f"\nTimes are those of {zone.key}.")
        self._end(listing.troubles)

    def _explain(self, *, name: str, next: int, timezone: str | None, json: bool, **options: Any) -> None:
        zone = zone_named(timezone) if timezone else None
        about = operate.explain(name, count=next)
        self._note_maintenance()
        if json:
            self._json(about)
        else:
            for line in tables.explained(about, zone):
                self.stdout.write(line)
        self._end(about.troubles)

    def _note_maintenance(self) -> None:
        # No lock knows of it: what is not started shows as "ready".
        if said := operate.in_maintenance():
            self.stderr.write(f"{said[0].upper()}{said[1:].rstrip('.')}.")

    def _check(self, *, json: bool, **options: Any) -> None:
        findings = operate.examine()
        if json:
            self._json(findings)
        else:
            for finding in findings:
                self.stdout.write(tables.found(finding))
        if any(finding.level == "problem" for finding in findings):
            sys.exit(1)

    # -- steer --------------------------------------------------------------------------------------------------------

    def _trigger(self, *, name: str, no_wait: bool, json: bool, verbosity: int, **options: Any) -> None:
        if no_wait:
            wanted = operate.want(name)
            if json:
                self._json(wanted)
            elif verbosity:
                self.stdout.write(
                    f"{wanted.name}: asked for; the next service or pass that looks and is meant for it runs it"
                )
            return
        found = operate.sound()
        task = operate.to_trigger(name).name
        try:
            done = service.run_once(verbosity=0 if json else verbosity, stdout=self._out, trigger=task, found=found)
        except _NO_STORES_FAULT:
            raise
        except Exception as error:  # whatever a driver raises
            raise CommandError(f"{name} was not started: {_in_a_line(error)}") from error
        if json and done.ran is not None and done.ran.was_filtered:
            self._json({"name": done.ran.row, "status": "skipped", "reason": "filtered"})
        elif json and done.ran is not None:
            self._json(operate.run_by_hand(task, done.ran.owner))
        elif json:
            self._json({"name": name, "status": "not started", "reason": done.why_not})
        elif done.why_not:
            raise CommandError(f"{name} was not started: {done.why_not}.")
        if done.status:
            sys.exit(done.status)

    def _pause(self, *, names: list[str], all: bool, reason: str, lock: str, **options: Any) -> None:
        done = operate.pause(_which(names, all, "pause"), reason=reason, lock=lock)
        self._steered(done, "paused", "", everything=all, **options)

    def _resume(self, *, names: list[str], all: bool, lock: str, **options: Any) -> None:
        done = operate.resume(_which(names, all, "resume"), lock=lock)
        self._steered(done, "resumed", "was not paused", everything=all, **options)

    def _interrupt(self, *, lock: str, **options: Any) -> None:
        self._steered(operate.interrupt(lock=lock), "told to end after their current runs", "", **options)

    def _steered(
        self,
        done: operate.Steered,
        did: str,
        was_so: str,
        *,
        json: bool,
        verbosity: int,
        everything: bool = False,
        **options: Any,
    ) -> None:
        if json:
            self._json(done)
        elif verbosity:
            several = len(conf.load().locks) > 1
            what = "services and passes" if options["verb"] == "interrupt" else "everything"
            for name, alias in done.rows:
                self.stdout.write(f"{name}: {did}" + (f" (lock {alias!r})" if several else ""))
            for alias in done.locks:
                self.stdout.write(f"{what}: {did}" + (f" (lock {alias!r})" if several else ""))
            for name in done.unchanged:
                self.stdout.write(f"{what if everything else name}: {was_so}")
        for note in done.notes:
            self.stderr.write(note)
        self._end(done.troubles)

    def _unlock(
        self, *, name: str | None, clock: bool, force: bool, lock: str, json: bool, verbosity: int, **options: Any
    ) -> None:
        if (name is None) != clock:
            wrong = "names both a task and --clock" if name else "names no task"
            raise CommandError(
                f"`schedule unlock` {wrong}. Write `schedule unlock NAME`, or `schedule unlock --clock` to mend what "
                "a store's clock that was ahead has left behind.",
                returncode=2,
            )
        if name is None:
            self._clock(operate.set_clock_right(lock=lock, force=force, wait=self._wait), json, verbosity)
            return
        released = operate.unlock(
            name, lock=lock, force=force, verbosity=0 if json else verbosity, stdout=None if json else self._out
        )
        if json:
            self._json(released)
        self._unrecorded(released)

    def _unrecorded(self, released: operate.Released) -> None:
        if released.unrecorded:
            self.stderr.write(
                f"{released.holder.name}: freed, but the clean-up is not recorded yet, since the database did not take "
                f"it: {released.unrecorded}"
            )

    def _wait(self, span: timedelta, names: Sequence[str]) -> None:
        self.stderr.write(f"Waiting {words.of_span(span)} for renewals of the lease of {', '.join(names)}.")
        time.sleep(span.total_seconds())

    def _clock(self, done: operate.SetRight, json: bool, verbosity: int) -> None:
        if json:
            self._json(done)
        elif verbosity:
            several = len(conf.load().locks) > 1
            for row in done.rows:
                for line in tables.righted(row, several=several):
                    self.stdout.write(line)
            for alias in done.interrupts:
                self.stdout.write(f"services and passes: end no more at once (lock {alias!r})")
            if not done.rows and not done.interrupts and not done.troubles:
                self.stdout.write("nothing is later than the stores' clocks: there is nothing to mend")
        if again := [row.name for row in done.rows if row.ran_ahead]:
            self.stderr.write(
                f"These ran ahead of their time, and run again when it comes: {', '.join(again)}. The log says of each "
                'such run that "this due time had a run already". What must not run twice, pause until then.'
            )
        for row in done.rows:
            if row.released is not None:
                self._unrecorded(row.released)
        self._end(done.troubles)

    # -- make up for, and tidy up -------------------------------------------------------------------------------------

    def _backfill(
        self,
        *,
        name: str,
        since: str,
        until: str,
        all: bool,
        keep_going: bool,
        dry_run: bool,
        json: bool,
        verbosity: int,
        **options: Any,
    ) -> None:
        operate.sound()
        gap = operate.find_gap(name, since, until, everything=all)
        zone = ZoneInfo(gap.zone)
        shown = 0 if json else verbosity
        if shown:
            have_run = f", {gap.have_run} have run already" if gap.have_run else ""
            self.stdout.write(f"{gap.row}: {len(gap.due)} due time(s) to run{have_run}")
        progress = operate.Progress(gap, keep_going, next_due_at=gap.due[0] if gap.due else None)
        if dry_run or not gap.due:
            if json:
                self._json(_made_up_for(progress))
            elif dry_run:
                for due_at in gap.due:
                    self.stdout.write(f"    {tables.at(due_at, zone)}  {due_at:%Y-%m-%d %H:%M:%S}Z")
            return
        try:
            with by_hand() as hand:
                for event, due_at, said, progress in operate.fill(gap, hand, keep_going=keep_going, wait=hand.wait):
                    if shown:
                        self._step(event, tables.at(due_at, zone), said, progress)
        except _NO_STORES_FAULT:
            raise
        except Exception as error:  # whatever a driver raises
            why = f"It stopped after {progress.passed} due time(s): {_in_a_line(error)}"
            raise CommandError(f"{why}\n{_go_on(progress)}") from error
        if shown and self.stdout.isatty():
            self.stdout.write("")
        if json:
            self._json(_made_up_for(progress))
        elif shown:
            failed = f", {len(progress.failed)} failed" if progress.failed else ""
            skipped = f", {progress.skipped} skipped" if progress.skipped else ""
            self.stdout.write(f"{progress.done} succeeded{failed}{skipped}, {len(gap.due) - progress.passed} left")
        if progress.again and not json:
            self.stderr.write(_go_on(progress))
        if progress.failed or progress.next_due_at is not None:
            sys.exit(1)

    def _step(self, event: str, due_at: str, said: str, progress: operate.Progress) -> None:
        text = {
            "running": f"{due_at} running",
            "waiting": f"{due_at} waits: {said}",
            "skipped": f"{due_at} skipped: its own conditions said no",
            "elsewhere": f"{due_at} has run meanwhile",
        }.get(event, f"{due_at} {event}" + (f": {said}" if said else ""))
        total = len(progress.gap.due)
        if self.stdout.isatty():
            self.stdout.write(tables.bar(progress.passed, total, text), ending="")
            self.stdout.flush()
        elif event != "running":
            # Of a failure, the log and the history say more.
            self.stdout.write(f"{progress.passed}/{total} {text}")

    def _prune(
        self,
        *,
        days: int | None,
        runs: int | None,
        batch: int,
        undeclared: bool,
        dry_run: bool,
        json: bool,
        verbosity: int,
        **options: Any,
    ) -> None:
        done = operate.prune(days=days, runs=runs, batch=batch, undeclared=undeclared, dry_run=dry_run)
        if json:
            self._json(done)
        elif verbosity:
            for line in pruning.summary(done, dry_run=dry_run):
                self.stdout.write(line)
        self._end(done.troubles)

    # -- what they share ----------------------------------------------------------------------------------------------

    @property
    def _out(self) -> Any:
        return getattr(self.stdout, "_out", None)


def _in_a_line(error: Exception) -> str:
    return " ".join(keeper.said(error).split())


def _made_up_for(progress: operate.Progress) -> dict[str, Any]:
    """Return how far a backfill is, in the same shape whatever became of it: numbers, and under ``…_at`` moments."""
    return {
        "name": progress.gap.row,
        "due": len(progress.gap.due),
        "due_at": progress.gap.due,
        "have_run": progress.gap.have_run,
        "succeeded": progress.done,
        "failed": len(progress.failed),
        "failed_at": progress.failed,
        "skipped": progress.skipped,
        "elsewhere": progress.elsewhere,
        "next_due_at": progress.next_due_at,
        "again": progress.again,
    }


def _go_on(progress: operate.Progress) -> str:
    return f"To go on: {progress.again}"


def _which(names: list[str], all: bool, verb: str) -> list[str] | None:
    if bool(names) == all:
        wrong = "names both tasks and --all" if all else "names no task"
        raise CommandError(
            f"`schedule {verb}` {wrong}. Write `schedule {verb} NAME…`, or `schedule {verb} --all`.", returncode=2
        )
    return None if all else names
