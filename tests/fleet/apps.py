"""What a fleet's server does besides its schedule: note the signals, and keep SQLite's clock right."""

from __future__ import annotations

import os
from datetime import datetime, timedelta, timezone
from typing import Any

from django.apps import AppConfig
from django.db.backends.signals import connection_created

from . import journal

SKEW = "FLEET_SKEW"
"""How many seconds this server's clock is ahead."""


class FleetConfig(AppConfig):
    """The app of the harness in its servers' processes."""

    name = "tests.fleet"
    label = "fleet"

    def ready(self) -> None:
        if journal.VARIABLE not in os.environ:
            return
        from multiserver_schedule import signals

        signals.ensure_cleanup_executed.connect(note_cleanup)
        signals.task_skipped.connect(note_skipped)
        signals.task_failed.connect(note_failed)
        signals.lease_lost.connect(note_lost)
        if float(os.environ.get(SKEW) or 0):
            connection_created.connect(set_clock_right)


def note_cleanup(sender: Any, cleanup: Any, server: str, reason: str, **more: Any) -> None:
    journal.mine().write(
        "cleanup", task=cleanup.task, owner=cleanup.owner, fence=cleanup.fence, server=server, reason=reason
    )


def note_skipped(
    sender: Any, task: Any, due_at: Any, reason: str, holder: str, count: int, server: str, **more: Any
) -> None:
    name = getattr(task, "name", None)
    journal.mine().write("skipped", task=name, due_at=due_at, reason=reason, holder=holder, count=count, server=server)


def note_failed(sender: Any, task: Any, run: Any, server: str, status: str, **more: Any) -> None:
    journal.mine().write(
        "failed",
        task=getattr(task, "name", None),
        due_at=getattr(run, "due_at", None),
        fence=getattr(run, "fence", None),
        status=status,
        server=server,
    )


def note_lost(sender: Any, task: Any, due_at: Any, fence: int, server: str, **more: Any) -> None:
    journal.mine().write("lost", task=getattr(task, "name", None), due_at=due_at, fence=fence, server=server)


def set_clock_right(sender: Any, connection: Any, **more: Any) -> None:
    """
    Give SQLite the right time in a process whose clock is wrong.

    SQLite has no server, so its clock is that of the process; a server whose clock differs from its database's is what
    the test is about.
    """
    if connection.vendor != "sqlite":
        return
    skew = timedelta(seconds=float(os.environ[SKEW]))

    def strftime(format: str, moment: str | None) -> str | None:
        if moment is None:  # an empty column, cast to a time
            return None
        assert (format, moment) == ("%Y-%m-%d %H:%M:%f", "NOW")
        return (datetime.now(timezone.utc) - skew).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]

    connection.connection.create_function("strftime", 2, strftime)
