"""``manage.py nightly_report``: an ordinary management command, scheduled in reports/schedule.py."""

from typing import Any

from django.core.management.base import BaseCommand, CommandParser


class Command(BaseCommand):
    """Prints a report."""

    help = "Prints a report over the last days."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--days", type=int, default=1)

    def handle(self, *args: Any, **options: Any) -> None:
        self.stdout.write(f"Nothing was sold in the last {options['days']} day(s).")
