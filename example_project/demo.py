"""
Three servers, one database, one of them killed: the real engine, in under a minute.

    python example_project/demo.py

Starts ``manage.py runschedule`` three times, as the crontabs of web1, web2 and web3 would, kills one of them with -9 in
the middle of a run, and prints what the database then says: who ran which due time, what was skipped and why, and the
clean-up of the killed server's lock. DATABASE_URL chooses another database than a fresh SQLite file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVERS = ("web1", "web2", "web3")
LEASE = 6.0
VICTIM_TASK = "shop.send_digests"
LONGEST = 55.0

sys.path.insert(0, str(HERE))
sys.path.insert(1, str(HERE.parent))


def manage(*arguments: str, **environ: str) -> subprocess.Popen[bytes]:
    """Start a command of the example project."""
    return subprocess.Popen(
        [sys.executable, str(HERE / "manage.py"), *arguments], cwd=HERE, env={**os.environ, **environ}
    )


@contextmanager
def servers() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Start one pass on each server, and end what is left of them."""
    started = {name: manage("runschedule", SERVER_NAME=name) for name in SERVERS}
    try:
        yield started
    finally:
        for process in started.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in started.values():
            process.wait(timeout=30)


def kill_a_holder(started: dict[str, subprocess.Popen[bytes]], until: float) -> str:
    """Wait until a server is in the middle of a long run, and kill it -9."""
    from multiserver_schedule.models import ScheduledLock

    while time.monotonic() < until:
        lock = ScheduledLock.objects.filter(task=VICTIM_TASK, owner__isnull=False).first()
        if lock is not None and lock.server in started:
            time.sleep(2)
            print(f"\n--- kill -9 {lock.server}, two seconds into {VICTIM_TASK} due {lock.last_due_at:%H:%M:%S} ---\n")
            started[lock.server].kill()
            return lock.server
        time.sleep(0.2)
    return ""


def wait_for_the_others(until: float) -> None:
    """Wait until the dead server's lock was freed, its task was run again, and something was skipped."""
    from multiserver_schedule.models import CleanupLog, ScheduledRun

    while time.monotonic() < until:
        cleanup = CleanupLog.objects.first()
        again = ScheduledRun.objects.filter(task=VICTIM_TASK, status="succeeded")
        skipped = ScheduledRun.objects.filter(status="skipped", reason__startswith="held")
        if cleanup and again.filter(started_at__gt=cleanup.cleaned_at).exists() and skipped.exists():
            return
        time.sleep(0.5)


def report(killed: str) -> int:
    """Print what the database says, and return the exit status: 0 when every promise was kept."""
    from django.db.models import Count

    from multiserver_schedule.models import CleanupLog, ScheduledRun

    runs = ScheduledRun.objects.exclude(status="skipped").order_by("due_at", "task")
    print("\nEach due time, and the one server that ran it\n")
    print(f"{'due (UTC)':9}  {'task':32}  {'server':6}  {'fence':>5}  result")
    for run in runs:
        print(f"{run.due_at:%H:%M:%S}   {run.task:32}  {run.server:6}  {run.fence:5}  {run.status}")
    print("\nWhat was skipped, and why\n")
    skipped = ScheduledRun.objects.filter(status="skipped").order_by("due_at", "task")
    for run in skipped:
        print(f"{run.due_at:%H:%M:%S}   {run.task:32}  {run.reason}{f' ({run.count} times)' if run.count > 1 else ''}")
    if not skipped:
        print("nothing")
    print("\nLocks of dead servers that were cleaned up\n")
    cleanups = CleanupLog.objects.order_by("cleaned_at")
    for cleanup in cleanups:
        print(
            f"{cleanup.task}: {cleanup.server} held it from {cleanup.acquired_at:%H:%M:%S}, its lease ended at "
            f"{cleanup.expired_at:%H:%M:%S}, {cleanup.cleaned_by} freed it at {cleanup.cleaned_at:%H:%M:%S} "
            f"({cleanup.reason})"
        )
    twice = runs.values("task", "due_at").annotate(times=Count("pk")).filter(times__gt=1)
    owed = 1 if killed else 0
    print(
        f"\n{runs.count()} due times run, {len(twice)} of them twice; 1 server killed in a run, "
        f"{cleanups.filter(server=killed).count()} lock(s) of it cleaned up."
    )
    return 0 if killed and not twice and cleanups.filter(server=killed).count() >= owed and runs else 1


def main() -> int:
    """Run the demo."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("DATABASE_URL", f"sqlite:///{folder}/demo.sqlite3")
        os.environ.setdefault("SCHEDULE_LEASE", str(LEASE))
        os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example.settings")
        import django

        django.setup()
        from django.core.management import call_command

        call_command("migrate", verbosity=0)
        print(
            f"Three servers on one database ({os.environ['DATABASE_URL'].split(':')[0]}), for under a minute. One of "
            "the tasks fails on purpose: its traceback is what a failure looks like.\n",
            flush=True,
        )
        with servers() as started:
            killed = kill_a_holder(started, began + 35)
            wait_for_the_others(began + LONGEST)
        return report(killed)


if __name__ == "__main__":
    sys.exit(main())
