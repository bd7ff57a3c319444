"""What the verbs of every command of ours have in common: their help, their options, what they read and refuse."""

from __future__ import annotations

import difflib
import os
import select
import sys
from argparse import SUPPRESS, Action, ArgumentError, ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, Final
from zoneinfo import ZoneInfo

from django.core.management.base import BaseCommand, CommandError, CommandParser

from multiserver_schedule.exceptions import ConfigurationError, DeclarationError
from multiserver_schedule.management import tables
from multiserver_schedule.operate import Refused

STATUSES: Final = "exit status: 0 done. 1 not done, or not all of it, or something is wrong; why is on stderr. 2 usage."


class Verb(ArgumentParser):
    """The parser of one verb: its help says which exit statuses there are."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("epilog", STATUSES)
        options.setdefault("formatter_class", RawDescriptionHelpFormatter)
        super().__init__(*args, **options)
        self.add_argument(
            "-v",
            "--verbosity",
            type=int,
            choices=range(4),
            default=SUPPRESS,
            metavar="N",
            help="0 says nothing of what went well, 2 says more (default: 1)",
        )
        self.add_argument("--json", action="store_true", help="machine-readable: times in UTC, spans in seconds")
        # The command's parser understands these, and -v, before the verb alone. What is not given here is not set here.
        django = self.add_argument_group("Django's own")
        django.add_argument("--settings", default=SUPPRESS, metavar="MODULE", help="instead of DJANGO_SETTINGS_MODULE")
        django.add_argument(
            "--pythonpath", default=SUPPRESS, metavar="FOLDER", help="where modules are looked for, too"
        )
        for option, help in (
            ("--traceback", "of an error, show where it was raised"),
            ("--no-color", "no colours in what is printed"),
            ("--force-color", "colours, also where it is no terminal"),
        ):
            django.add_argument(option, action="store_true", default=SUPPRESS, help=help)


class VerbCommand(BaseCommand):
    """A command of verbs: ``manage.py schedule list``. The method ``_list`` does it, with the options of its parser."""

    requires_system_checks: list[str] = []
    wrong: tuple[type[Exception], ...] = (ConfigurationError, DeclarationError)
    """What is said without a traceback, since its message is for people."""

    def verbs(self, parser: CommandParser) -> Callable[[str, str], Verb]:
        """Return what adds a verb, given its name and what it does."""
        parser.epilog = STATUSES
        verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb", parser_class=Verb)
        check = parser._check_value

        def check_verb(action: Action, value: Any) -> None:
            if action is verbs and value not in verbs.choices:
                raise ArgumentError(None, f"Unknown verb {value!r}.{_nearest(value, verbs.choices)}")
            check(action, value)

        # argparse has no public place for words of one's own, and the parser's class is Django's to choose.
        parser._check_value = check_verb  # type: ignore[method-assign]

        def verb(name: str, help: str) -> Verb:
            added: Verb = verbs.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
            return added

        return verb

    def run_from_argv(self, argv: list[str]) -> None:
        """Do it on a terminal, whatever that can show, and end quietly where nobody reads on, as behind ``| head``."""
        _show_anything()
        try:
            try:
                super().run_from_argv(argv)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            if not _is_left():
                raise
            # What is still to be written at the end of the process goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    def handle(self, *args: Any, **options: Any) -> None:
        """Do what the verb says; its exit status is STATUSES'."""
        try:
            getattr(self, f"_{options['verb']}")(**options)
        except Refused as refused:
            raise CommandError(str(refused), returncode=2 if refused.is_usage else 1) from refused
        except self.wrong as error:
            raise CommandError(str(error)) from error

    def _json(self, value: Any) -> None:
        self.stdout.write(tables.as_json(value))

    def _end(self, troubles: Sequence[str]) -> None:
        for trouble in troubles:
            self.stderr.write(trouble)
        if troubles:
            sys.exit(1)


def _show_anything() -> None:
    """Have stdout write what its encoding does not have as an escape, as stderr does."""
    stdout: Any = sys.stdout
    if hasattr(stdout, "reconfigure") and (stdout.encoding or "").lower().replace("-", "") != "utf8":
        stdout.reconfigure(errors="backslashreplace")


def _is_left() -> bool:
    """Does nobody read stdout any more? It may have been another pipe that broke, such as a store's."""
    with suppress(AttributeError, OSError, ValueError):  # no poll here, or no descriptor
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f"{f' Did you mean {close[0]!r}?' if close else ''} Verbs are: {', '.join(known)}."


def at_least(least: int, *, most: int | None = None) -> Callable[[str], int]:
    """Return what reads a whole number from an argument, and refuses one that is too small, or too large."""

    def number(text: str) -> int:
        try:
            found = int(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not a whole number") from None
        if found < least:
            raise ArgumentTypeError(f"{found} is too small: write {least} or more")
        if most is not None and found > most:
            raise ArgumentTypeError(f"{found} is too large: write {most} or less")
        return found

    return number


def zone_named(name: str) -> ZoneInfo:
    """Return the time zone that --timezone names. Raises CommandError."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        wrong = f"--timezone {name!r} is not a known time zone; write one like Europe/Berlin."
        raise CommandError(wrong, returncode=2) from None
