"""``manage.py servers <verb>``: for the people who watch over the fleet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zoneinfo import ZoneInfo

from django.core.management.base import CommandError, CommandParser
from django.db import DatabaseError

from multiserver_schedule import conf as schedule_conf
from multiserver_schedule.declare import discover_errors
from multiserver_schedule.management import tables
from multiserver_schedule.management.verbs import VerbCommand, at_least, zone_named
from multiserver_schedule.operate import sound
from multiserver_schedule.operate.stores import said
from multiserver_schedule.servers import conf, fleet, ledger, monitor, operate, reconcile, types
from multiserver_schedule.servers.exceptions import FleetError
from multiserver_schedule.servers.management import lines
from multiserver_schedule.servers.visit import Report


class Command(VerbCommand):
    """Shows and steers the fleet. Each verb has its own ``--help``."""

    help = (
        "Shows and steers the servers that come and go with the load: manage.py servers "
        "list | plan | monitor | reconcile | ensure | reboot | drain | delete | retry | prune."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        verb = self.verbs(parser)
        listing = verb("list", "every server, type and provider: what is wanted, what there is, why, what went wrong")
        listing.add_argument("--all", action="store_true", help="those that are deleted, too")
        listing.add_argument("--type", metavar="TYPE", help="of this type alone")
        listing.add_argument("--timezone", metavar="ZONE", help="show times in this zone (default: TIME_ZONE)")

        verb("plan", "what would be decided and done now, and why; nothing is changed")
        verb("monitor", "decide now how many servers are wanted, as the task of each minute does, and say why")

        reconciling = verb("reconcile", "take now what steps are due at the providers, as their tasks do")
        reconciling.add_argument("--provider", metavar="NAME", help="at this one alone")

        ensure = verb("ensure", "want so many servers of a type, no more and no fewer")
        ensure.add_argument("count", type=at_least(0), metavar="COUNT", help="how many")
        ensure.add_argument("--type", default=types.DEFAULT, metavar="TYPE", help="of which type (default: default)")

        reboot = verb("reboot", "reboot servers: these, those of a type, or all; one that starts, once it is up")
        reboot.add_argument("names", nargs="*", metavar="NAME", help="as `servers list` shows it")
        reboot.add_argument("--type", metavar="TYPE", help="all of this type")

        for name, help in (
            ("drain", "let servers end their work, if their type has a drain, and delete them then"),
            ("delete", "have servers deleted at their provider now, whatever they still do"),
        ):
            verb(name, help).add_argument("names", nargs="+", metavar="NAME", help="as `servers list` shows it")

        retry = verb("retry", "do the next step of servers, of a provider or of a type now, as if nothing had failed")
        retry.add_argument("names", nargs="*", metavar="NAME", help="a server, as `servers list` shows it")
        retry.add_argument("--provider", metavar="NAME", help="call this provider at the next look")
        retry.add_argument("--type", metavar="TYPE", help="make servers of this type again, though the last ones died")

        prune = verb("prune", "forget servers that have been deleted for long, and old decisions")
        prune.add_argument(
            "--days",
            type=at_least(0, most=schedule_conf.MOST_DAYS),
            metavar="N",
            help="keep so many days (default: PRUNE_DAYS)",
        )
        prune.add_argument("--dry-run", action="store_true", help="only say what would go")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            conf.load()
            super().handle(*args, **options)
        except FleetError as error:
            raise CommandError(str(error)) from error
        except DatabaseError as error:
            raise CommandError(f"The database does not do what was asked: {said(error)}") from error

    # -- look ---------------------------------------------------------------------------------------------------------

    def _list(self, *, type: str | None, all: bool, timezone: str | None, json: bool, **options: Any) -> None:
        broken = [*map(str, discover_errors()), *types.troubles()]
        kinds = operate.type_lines(type)
        servers = operate.servers(type, all=all)
        providers = operate.provider_lines()
        if json:
            self._json({"types": kinds, "servers": servers, "providers": providers})
            self._end(broken)
            return
        zone = zone_named(timezone) if timezone else ZoneInfo(schedule_conf.load().time_zone)
        for kind in kinds:
            self._lines(lines.of_type(kind, zone))
        for number, server in enumerate(servers):
            self._lines([*([] if number else [""]), *lines.of_server(server, zone)])
        for number, provider in enumerate(providers):
            self._lines([*([] if number else [""]), *lines.of_provider(provider, zone)])
        if not providers:
            self.stderr.write(f"There is no provider: {conf.SETTING}['PROVIDERS'] is empty.")
        else:
            self.stdout.write(f"\nTimes are those of {zone.key}.")
        self._end(broken)

    def _plan(self, *, json: bool, **options: Any) -> None:
        sound()
        self._decided(monitor.preview(), json=json, verbosity=1)
        if not json:
            self.stdout.write("\nNothing was changed.")

    # -- decide, and bring about --------------------------------------------------------------------------------------

    def _monitor(self, *, json: bool, verbosity: int, **options: Any) -> None:
        sound()
        done = monitor.run()
        self._decided(done, json=json, verbosity=verbosity)
        self._end([f"{each.type}: {each.trouble}" for each in done if each.trouble])

    def _decided(self, done: Sequence[monitor.Monitored], *, json: bool, verbosity: int) -> None:
        if json:
            self._json(done)
        elif verbosity:
            for each in done:
                self._lines(lines.of_decision(each))

    def _reconcile(self, *, provider: str | None, json: bool, verbosity: int, **options: Any) -> None:
        sound()
        if provider is not None:
            conf.provider(provider)
        names = [provider] if provider is not None else list(conf.load().providers)
        reports = []
        for name in names:
            only_on = conf.provider(name).only_on
            if provider is None and only_on and ledger.who() not in only_on:
                self.stderr.write(f"{name}: left to {', '.join(only_on)}, since it is ONLY_ON there")
                continue
            try:
                report = reconcile.run(name)
            except FleetError as error:
                # One that cannot be made keeps nobody from the others, and what was done there was done.
                report = Report(name, trouble=str(error))
            reports.append(report)
            if verbosity and not json:
                self._reported(report)
        if json:
            self._json(reports)
        self._end([f"{report.provider}: {report.trouble}" for report in reports if report.trouble])

    def _reported(self, report: Report) -> None:
        for step in report.steps:
            self.stdout.write(f"{report.provider}: {step}")
        if report.left:
            self.stdout.write(f"{report.provider}: {report.left} step(s) are left for the next pass")
        if not (report.steps or report.left or report.trouble):
            self.stdout.write(f"{report.provider}: nothing to do")

    # -- steer --------------------------------------------------------------------------------------------------------

    def _ensure(self, *, count: int, type: str, json: bool, verbosity: int, **options: Any) -> None:
        sound()
        kind = types.get(type)
        wanted = fleet.ensure(count, type)
        if json:
            self._json({"type": type, "asked": count, "wanted": wanted})
        elif verbosity:
            self.stdout.write(f"{type}: {wanted} wanted, from the next pass on")
        if wanted != count:
            bounds = (
                f"{kind.policy.minimum} to {kind.policy.maximum if kind.policy.maximum is not None else 'any number'}"
            )
            self.stderr.write(f"{type}: not {count}, since the type allows {bounds}.")
        if kind.sources:
            self.stderr.write(f"{type}: its load is asked again soon, and changes this as its rules say.")

    def _reboot(self, *, names: list[str], type: str | None, json: bool, verbosity: int, **options: Any) -> None:
        sound()
        if names and type is not None:
            raise CommandError("`servers reboot` is given both names and --type. Write one of them.", returncode=2)
        if names:
            self._did(operate.reboot(names, by=self._by), json=json, verbosity=verbosity)
            return
        count = fleet.reboot(type)
        if json:
            self._json({"type": type, "asked": count})
        elif verbosity:
            self.stdout.write(f"a reboot is asked for of {count} server{'' if count == 1 else 's'}")

    def _drain(self, *, names: list[str], json: bool, verbosity: int, **options: Any) -> None:
        self._did(operate.drain(names, by=self._by), json=json, verbosity=verbosity)

    def _delete(self, *, names: list[str], json: bool, verbosity: int, **options: Any) -> None:
        self._did(operate.retire(names, by=self._by), json=json, verbosity=verbosity)

    def _retry(
        self, *, names: list[str], provider: str | None, type: str | None, json: bool, verbosity: int, **options: Any
    ) -> None:
        if [bool(names), provider is not None, type is not None].count(True) != 1:
            raise CommandError(
                "`servers retry` takes names of servers, --provider or --type: one of these.", returncode=2
            )
        if provider is not None:
            done = operate.retry_provider(provider, by=self._by)
        elif type is not None:
            done = operate.retry_type(type, by=self._by)
        else:
            done = operate.retry(names, by=self._by)
        self._did(done, json=json, verbosity=verbosity)

    def _did(self, done: Sequence[operate.Done], *, json: bool, verbosity: int) -> None:
        if json:
            self._json(done)
        elif verbosity:
            for each in done:
                if each.done:
                    self._lines([each.name, *tables.wrapped([each.said])])
        self._end([f"{each.name}: {each.said}" for each in done if not each.done])

    # -- tidy up ------------------------------------------------------------------------------------------------------

    def _prune(self, *, days: int | None, dry_run: bool, json: bool, verbosity: int, **options: Any) -> None:
        done = operate.prune(days=days, dry_run=dry_run)
        if json:
            self._json(done)
        elif verbosity:
            self.stdout.write(operate.summary(done, dry_run=dry_run))

    # -- what they share ----------------------------------------------------------------------------------------------

    @property
    def _by(self) -> str:
        return f"the command on {ledger.who()}"

    def _lines(self, texts: Any) -> None:
        for text in texts:
            self.stdout.write(text)
