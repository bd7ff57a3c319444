"""
``manage.py check``: what would run a task twice or never is an Error, what may surprise is a Warning.

Each id is used once, and is listed in docs/checks.rst.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from django.apps import apps
from django.conf import settings as project
from django.core.checks import CheckMessage, Error, Tags, Warning
from django.core.checks import register as register_check
from django.db import DatabaseError, connections, router
from django.utils.module_loading import import_string

from . import conf
from .declare import discover_errors, registry, verify
from .exceptions import ScheduleError
from .locks.base import BaseLock

TAG = "multiserver_schedule"
MODELS = ("ScheduledLock", "ScheduledRun", "CleanupLog", "ScheduleState")


def register() -> None:
    """Register every check; called once, by the app."""
    register_check(check_settings, TAG)
    register_check(check_locks, TAG)
    register_check(check_declarations, TAG)
    register_check(check_clock, Tags.database)


def check_settings(app_configs: Any = None, **options: Any) -> list[CheckMessage]:
    """E001 a setting is wrong, E002 USE_TZ, E003 a runner that cannot end a run (see check_declarations)."""
    found: list[CheckMessage] = []
    try:
        conf.load()
    except ScheduleError as error:
        found.append(Error(str(error), hint="See the README's list of settings.", id="multiserver_schedule.E001"))
    if not project.USE_TZ:
        found.append(
            Error(
                "USE_TZ is False: due times could not be told apart when clocks change.",
                hint="Set USE_TZ = True.",
                id="multiserver_schedule.E002",
            )
        )
    return found


def check_locks(app_configs: Any = None, **options: Any) -> list[CheckMessage]:
    """E004 a backend that cannot be used, E005 a database with a TIME_ZONE, E006 models elsewhere, W001 SQLite."""
    try:
        settings = conf.load()
    except ScheduleError:
        return []
    found: list[CheckMessage] = []
    for alias, chosen in settings.locks.items():
        where = f"{conf.SETTING}['LOCKS'][{alias!r}]"
        try:
            backend = import_string(chosen.backend)
            if not (isinstance(backend, type) and issubclass(backend, BaseLock)):
                raise TypeError(f"{chosen.backend} is not a lock: it should be a subclass of BaseLock")
            lock = backend(alias, chosen.options)
        except Exception as error:
            found.append(
                Error(
                    f"{where}: {error}",
                    hint=f"The lock through the database is {conf.ORM_LOCK!r}.",
                    id="multiserver_schedule.E004",
                )
            )
            continue
        if not lock.shared:
            found.append(
                Error(
                    f"{where}: other servers do not see this lock, so that each would run every task.",
                    hint=f"Use a lock that all servers share, such as {conf.ORM_LOCK!r}.",
                    id="multiserver_schedule.E007",
                )
            )
        using = getattr(lock, "using", None)
        if using is not None:
            found.extend(_check_database(using, where))
    return found


def _check_database(using: str, where: str) -> list[CheckMessage]:
    if using not in connections.settings:
        return [
            Error(
                f"{where}: there is no database {using!r}.",
                hint=f"Known are: {', '.join(sorted(connections.settings))}.",
                id="multiserver_schedule.E008",
            )
        ]
    found: list[CheckMessage] = []
    if connections.settings[using].get("TIME_ZONE"):
        found.append(
            Error(
                f"{where}: the database {using!r} has a TIME_ZONE, so that its times and the lock's would differ.",
                hint=f"Remove TIME_ZONE from DATABASES[{using!r}], or use another alias for the lock.",
                id="multiserver_schedule.E005",
            )
        )
    for name in MODELS:
        model = apps.get_model("multiserver_schedule", name)
        if router.db_for_write(model) != using:
            found.append(
                Error(
                    f"{where}: {name} is routed to {router.db_for_write(model)!r}, but the lock is in {using!r}.",
                    hint="Route all models of multiserver_schedule to the lock's database: a claim and its record are "
                    "one transaction.",
                    id="multiserver_schedule.E006",
                )
            )
            break
    if connections[using].vendor == "sqlite" and not project.DEBUG and "test" not in sys.argv:
        found.append(
            Warning(
                f"{where}: SQLite is a database of one machine; servers on other machines would not see the lock.",
                hint="Use PostgreSQL, MariaDB or MySQL for several servers; silence this where there is one.",
                id="multiserver_schedule.W001",
            )
        )
    return found


def check_declarations(app_configs: Any = None, **options: Any) -> list[CheckMessage]:
    """E010 a broken schedule.py, E011 a task that cannot run, E003 a limit that nothing enforces, W002 sub-minute."""
    try:
        settings = conf.load()
    except ScheduleError:
        return []
    found: list[CheckMessage] = [
        Error(
            f"{broken.module} cannot be read: {broken.error}",
            hint=broken.traceback,
            id="multiserver_schedule.E010",
        )
        for broken in discover_errors()
    ]
    if found:
        return found
    try:
        tasks = registry.tasks
    except ScheduleError as error:  # declared outside a schedule.py: in a models.py, in ready()
        return [Error(str(error), hint="Correct the declaration.", id="multiserver_schedule.E009")]
    subminute = []
    for task in tasks.values():
        place = f"{task.file}, line {task.line}: {task.name}"
        found.extend(
            Error(f"{place}: {problem}", hint="Correct the declaration.", id="multiserver_schedule.E011")
            for problem in verify(task)
        )
        if task.limit is not None and settings.runner == "inline":
            found.append(
                Error(
                    f"{place}: ensure_finished cannot be kept, since the runner 'inline' cannot end a run.",
                    hint=f"Remove RUNNER from {conf.SETTING}, or ensure_finished from the task.",
                    id="multiserver_schedule.E003",
                )
            )
        gap = task.timetable.shortest_gap()
        if task.min_break is None and settings.min_break is not None and settings.min_break >= gap:
            found.append(
                Error(
                    f"{place}: MIN_BREAK ({settings.min_break}) is not under its period ({gap}): never on time.",
                    hint=f"Give the task its own: .without_overlapping(min_break={_suggest(gap)!r}).",
                    id="multiserver_schedule.E012",
                )
            )
        if task.timetable.is_subminute:
            subminute.append(task.name)
    if subminute:
        found.append(
            Warning(
                f"{len(subminute)} task(s) are due more than once a minute ({', '.join(subminute[:3])}): under cron "
                "every server keeps a pass resident for the whole minute.",
                hint="That is fine where it is meant; silence this then.",
                id="multiserver_schedule.W002",
            )
        )
    return found


def check_clock(app_configs: Any = None, databases: Sequence[str] | None = None, **options: Any) -> list[CheckMessage]:
    """W003: this server's clock and the database's differ by more than five seconds."""
    try:
        settings = conf.load()
    except ScheduleError:
        return []
    found: list[CheckMessage] = []
    for alias, chosen in settings.locks.items():
        lock = import_string(chosen.backend)(alias, chosen.options)
        using = getattr(lock, "using", None)
        if using is None or using not in (databases or []):
            continue
        try:
            offset = datetime.now(timezone.utc) - lock.clock()
        except DatabaseError:
            continue  # before the first migrate; a database that is away, Django says itself
        if abs(offset) > timedelta(seconds=5):
            found.append(
                Warning(
                    f"The clock of this server and that of the database {using!r} differ by {abs(offset)}.",
                    hint="Due times follow the database's clock; cron starts by the server's. Synchronise both (NTP).",
                    id="multiserver_schedule.W003",
                )
            )
    return found


def _suggest(gap: timedelta) -> timedelta:
    return gap / 6
