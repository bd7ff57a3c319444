"""``manage.py schedule <verb>``: for the people who use the schedule and are on call for it."""

from __future__ import annotations

import difflib
import json
import sys
from argparse import ArgumentParser
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any
from zoneinfo import ZoneInfo

from django.core.management.base import BaseCommand, CommandError, CommandParser

from multiserver_schedule import conf, operate, service
from multiserver_schedule.declare import discover, registry
from multiserver_schedule.logs import distance


class Command(BaseCommand):
    """Shows and steers the schedule. Each verb has its own ``--help``."""

    help = "Shows the scheduled tasks, and runs one now: manage.py schedule list | trigger NAME."
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

    def handle(self, *args: Any, **options: Any) -> None:
        getattr(self, f"_{options['verb']}")(**options)

    def _list(self, *, json: bool, timezone: str | None, **options: Any) -> None:
        settings = conf.load()
        found = discover()
        stores = service.stores(settings, registry.tasks)
        if not registry.tasks:
            self.stderr.write(service.nothing_declared(found))
        now = stores[0].lock.look(stores[0].declared).now
        locks = {store.lock.alias: store.lock for store in stores}
        lines = operate.overview(registry.tasks, locks, now, settings.server_name)
        if json:
            self.stdout.write(_json([asdict(line) for line in lines]))
            return
        zone = _zone(timezone or settings.time_zone)
        for line in lines:
            self.stdout.write(_row(line, now, zone))

    def _trigger(self, *, name: str, verbosity: int, **options: Any) -> None:
        found = discover()
        if name not in registry.tasks:
            close = difflib.get_close_matches(name, registry.tasks, n=1)
            hint = f" Did you mean {close[0]}?" if close else " `manage.py schedule list` shows them all."
            raise CommandError(f"No task is named {name!r}.{hint}")
        done = service.run_once(
            verbosity=verbosity, stdout=getattr(self.stdout, "_out", None), trigger=name, found=found
        )
        if done.status:
            sys.exit(done.status)


def _row(line: operate.Overview, now: datetime, zone: ZoneInfo) -> str:
    def at(moment: datetime | None) -> str:
        return "-" if moment is None else moment.astimezone(zone).strftime("%Y-%m-%d %H:%M:%S")

    when = f"{at(line.next_due_at)} (in {distance(line.next_due_at - now)})" if line.next_due_at else "-"
    state = line.state
    if line.holder:
        state += f" on {line.holder} since {at(line.since)}"
    last = f"{line.last_status}{f' ({line.last_reason})' if line.last_reason else ''} {at(line.last_due_at)}"
    text = f"{line.name}\n    next {when}; {state}"
    return text + (f"\n    last {last}" if line.last_status else "")


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise CommandError(f"--timezone {name!r} is not a known time zone; write one like Europe/Berlin.") from None


def _json(lines: list[dict[str, Any]]) -> str:
    def plain(value: Any) -> str:
        return value.astimezone(timezone.utc).isoformat() if isinstance(value, datetime) else str(value)

    return json.dumps(lines, default=plain, indent=2)
