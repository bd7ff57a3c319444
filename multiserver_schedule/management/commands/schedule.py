"""``manage.py schedule <verb>``: for the people who use the schedule and are on call for it."""

from __future__ import annotations

import json
import sys
import textwrap
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any, Final
from zoneinfo import ZoneInfo

from django.core.management.base import BaseCommand, CommandError, CommandParser

from multiserver_schedule import conf, operate, service
from multiserver_schedule.declare import discover, registry
from multiserver_schedule.logs import distance

WIDTH: Final = 96
_SPACE: Final = "\N{NO-BREAK SPACE}"  # where no line is broken


class Command(BaseCommand):
    """Shows and steers the schedule. Each verb has its own ``--help``."""

    help = "Shows the scheduled tasks, runs one, frees a lock: manage.py schedule list | trigger NAME | unlock NAME."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb", parser_class=ArgumentParser)
        listing = verbs.add_parser("list", help="every task: when it is due next, who runs it, how it went last")
        listing.add_argument("--json", action="store_true", help="machine-readable, times in UTC")
        listing.add_argument("--timezone", metavar="ZONE", help="show times in this zone (default: TIME_ZONE)")
        trigger = verbs.add_parser(
            "trigger", help="run one task now, under the same lock; its schedule does not notice"
        )
        trigger.add_argument("name", help="as `schedule list` shows it")
        unlock = verbs.add_parser("unlock", help="free the lock of a task whose server is gone")
        unlock.add_argument("name", help="as `schedule list` shows it")
        unlock.add_argument("--force", action="store_true", help="also while its holder looks alive")
        unlock.add_argument("--lock", default="", metavar="ALIAS", help="where more than one lock has it: in this one")

    def handle(self, *args: Any, **options: Any) -> None:
        getattr(self, f"_{options['verb']}")(**options)

    def _list(self, *, json: bool, timezone: str | None, **options: Any) -> None:
        settings = conf.load()
        zone = _zone(timezone or settings.time_zone)
        listing = operate.overview()
        if not listing.lines and not listing.troubles:
            self.stderr.write(service.nothing_declared(listing.found))
        if json:
            self.stdout.write(_json([asdict(line) for line in listing.lines]))
        else:
            for line in listing.lines:
                self.stdout.write(_row(line, zone, several=len(settings.locks) > 1))
        for trouble in listing.troubles:
            self.stderr.write(trouble)
        if listing.troubles:
            sys.exit(1)

    def _trigger(self, *, name: str, verbosity: int, **options: Any) -> None:
        found = discover()
        if name not in registry.tasks:
            raise CommandError(f"No task is named {name!r}.{operate.nearest(name, registry.tasks)}")
        done = service.run_once(
            verbosity=verbosity, stdout=getattr(self.stdout, "_out", None), trigger=name, found=found
        )
        if done.status:
            sys.exit(done.status)

    def _unlock(self, *, name: str, force: bool, lock: str, verbosity: int, **options: Any) -> None:
        try:
            released = operate.unlock(
                name, lock=lock, force=force, verbosity=verbosity, stdout=getattr(self.stdout, "_out", None)
            )
        except operate.UnlockRefused as refused:
            raise CommandError(str(refused)) from refused
        if released.unrecorded:
            self.stderr.write(
                f"{name}: freed, but the clean-up is not recorded yet, since the database did not take it: "
                f"{released.unrecorded}"
            )


def _row(line: operate.Overview, zone: ZoneInfo, *, several: bool) -> str:
    def at(moment: datetime | None) -> str:
        return "-" if moment is None else moment.astimezone(zone).strftime(f"%Y-%m-%d{_SPACE}%H:%M:%S")

    when = f"{at(line.next_due_at)} (in {distance(line.next_due_at - line.as_of)})" if line.next_due_at else "-"
    state = line.state
    if line.holder:
        until = at(line.until)
        if until[:10] == at(line.since)[:10]:
            until = until[11:]
        state += f" on {line.holder} since{_SPACE}{at(line.since)} until{_SPACE}{until}"
    last = f"{line.last_status}{f' ({line.last_reason})' if line.last_reason else ''} {at(line.last_due_at)}"
    lines = [line.name + (f"  [lock {line.lock}]" if several else "")]
    lines += _wrapped([f"next {when}", state, *filter(None, [line.note])])
    if line.last_status:
        lines += _wrapped([f"last {last}"])
    return "\n".join(lines).replace(_SPACE, " ")


def _wrapped(parts: Sequence[str]) -> list[str]:
    """Return the parts on one line if they fit on it, else each on its own, or on as many as it takes."""
    whole = "    " + "; ".join(parts)
    if len(whole) <= WIDTH:
        return [whole]
    lines = []
    for part in parts:
        lines += textwrap.wrap(
            part,
            WIDTH,
            initial_indent="    ",
            subsequent_indent="        ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise CommandError(f"--timezone {name!r} is not a known time zone; write one like Europe/Berlin.") from None


def _json(lines: list[dict[str, Any]]) -> str:
    def plain(value: Any) -> str:
        return value.astimezone(timezone.utc).isoformat() if isinstance(value, datetime) else str(value)

    return json.dumps(lines, default=plain, indent=2)
