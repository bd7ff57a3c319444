"""``manage.py runschedule``: one pass, as each server's crontab starts it each minute; or, ``--forever``, a service."""

from __future__ import annotations

import logging
import os
import sys
import threading
from argparse import SUPPRESS
from typing import Any, Final

from django.core.management.base import BaseCommand, CommandError, CommandParser

from multiserver_schedule import service
from multiserver_schedule.exceptions import ConfigurationError, DeclarationError

STATUSES: Final = (
    "Exit status: 0 all ran well, or nothing was due. 1 a run failed, or nothing could be run. 2 usage. "
    "With --forever 0 after an orderly end, however its runs went."
)


class Command(BaseCommand):
    """
    Runs what is due, waits for it, and exits; or, ``--forever``, goes on until it is told to end.

    Exit status of a pass 0: all ran well, or nothing was due. 1: a run failed, or the lock's store is broken. That of a
    service is 0 after an orderly end, however its runs went, and 1 where it had to give up. Of wrong options: 2.
    """

    help = (
        "Runs the scheduled tasks that are due, each once whatever the number of servers, waits for them, and exits. "
        "Put it into every server's crontab: * * * * *  manage.py runschedule. Or have systemd, or a container, keep "
        "runschedule --forever up on every server."
    )
    # The declarations are verified by our own small grammar; the project's checks would cost more than the pass.
    requires_system_checks: list[str] = []
    requires_migrations_checks = False

    def add_arguments(self, parser: CommandParser) -> None:
        parser.epilog = STATUSES
        parser.add_argument(
            "--forever",
            action="store_true",
            help="Be a service: go on until SIGTERM, SIGINT, or `manage.py schedule interrupt`.",
        )
        parser.add_argument(
            "--grace",
            type=float,
            metavar="SECONDS",
            help="How long what runs may take after SIGTERM or SIGINT, before it is ended. "
            f"Default: {service.GRACE:g}. With --forever.",
        )
        parser.add_argument(
            "--inline",
            action="store_true",
            help="Run the tasks in this very process, one after the other: for debuggers. Nothing can end a run then.",
        )
        parser.add_argument("--child", action="store_true", help=SUPPRESS)

    def handle(self, *args: Any, **options: Any) -> None:
        if options["child"]:
            service.child(verbosity=options["verbosity"])
            return
        grace = options["grace"]
        if grace is not None and (grace < 0 or not options["forever"]):
            raise CommandError("--grace takes seconds from 0 up, and goes with --forever.", returncode=2)
        how: dict[str, Any] = {
            "verbosity": options["verbosity"],
            "inline": options["inline"],
            "stdout": getattr(self.stdout, "_out", None),
        }
        try:
            if options["forever"]:
                done = service.run_forever(grace=service.GRACE if grace is None else grace, **how)
            else:
                done = service.run_once(**how)
        except (ConfigurationError, DeclarationError) as error:
            # It says what to correct, and where: cron mails it each minute. What a schedule.py itself raises keeps its
            # traceback, without which nobody finds it.
            raise CommandError(str(error)) from error
        if done.status:
            sys.exit(done.status)

    def run_from_argv(self, argv: list[str]) -> None:
        """Leave at once when the pass is over: tearing an interpreter down costs more than the pass."""
        status: Any = 0
        try:
            super().run_from_argv(argv)
        except SystemExit as leaving:
            status = leaving.code
            if status is not None and not isinstance(status, int):
                raise
        # What else wants to be done at exit (coverage, a tracer's threads) is left to it.
        if any(name in sys.modules for name in ("coverage", "sentry_sdk")) or threading.active_count() > 2:
            sys.exit(status)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
