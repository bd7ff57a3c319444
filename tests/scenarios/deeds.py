"""What the tasks of the scenes do."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

from multiserver_schedule import current_run
from tests.fleet import journal
from tests.fleet.work import parent_of, work

NEW_YEAR = "0 0 1 1 *"
YEAR = timedelta(days=366)
"""Due on the first of January, and may be as late as that: one due time is open, and no other comes in between."""


def about() -> dict[str, Any]:
    """Return what identifies this run in the journal."""
    run = current_run()
    assert run is not None
    return {"task": run.name, "due_at": run.due_at, "fence": run.fence, "server": run.server}


def long_with_a_sleep() -> None:
    """Take longer than any test, heeding no TERM (nor does the ``sleep``), at the first run; later a moment."""
    if journal.mine().of("start", task=about()["task"]):
        work(0.05)
    else:
        work(float(os.environ.get("SCENE_SECONDS", "600")), grandchild=True, on_term="ignore")


def hold_the_gil(seconds: float) -> None:
    """Sleep in C without letting any other thread of this process run."""
    journal.mine().write("start", **about())
    ctypes.PyDLL(None).usleep(int(seconds * 1_000_000))
    journal.mine().write("end", **about())


def ignore_term_with_a_grandchild() -> None:
    """Never end, and have a program beside it that does not heed TERM either."""
    program = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    beside = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert beside.stdout is not None
    beside.stdout.readline()
    journal.mine().write("grandchild", **about(), child=beside.pid)
    work(600, on_term="ignore")


def until_the_moment() -> None:
    """Go on until SCENE_UNTIL, a boot time, when asked for by hand; else a moment."""
    work(max(0.05, float(os.environ.get("SCENE_UNTIL", "0")) - journal.boot()))


def hang(why: str) -> None:
    """Note it, and hang for SCENE_HANG seconds."""
    journal.mine().write("hangs", why=why)
    time.sleep(float(os.environ["SCENE_HANG"]))
    journal.mine().write("hung", why=why)


def asks_and_hangs() -> bool:
    """Be a condition that hangs, and then agrees."""
    hang("when")
    return True


class HangingHandler(logging.Handler):
    """A log handler that hangs at each ERROR."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            hang("handler")


# -- ends of all kinds


def exits(code: int) -> None:
    """Leave as a script does."""
    sys.exit(code)


def dies() -> None:
    """Crash in C."""
    os.kill(os.getpid(), 11)


def leaves_without_a_result() -> None:
    """Skip everything that a process does at its end."""
    os._exit(0)


def leaves_a_transaction_open() -> None:
    """Write inside a transaction that is never committed."""
    from django.contrib.auth.models import Group
    from django.db import transaction

    transaction.atomic().__enter__()
    Group.objects.create(name="uncommitted")


def prints_much() -> None:
    """Print 10 MB."""
    for _ in range(160):
        print("x" * 65535)
    print("the end")


def fails() -> None:
    """Raise."""
    print("printed before")
    raise ValueError("no such rate")


def note_environment() -> None:
    """Note what this process could tell a service manager by."""
    found = {name: value for name, value in os.environ.items() if name.startswith(("NOTIFY_", "WATCHDOG_"))}
    journal.mine().write("environment", **about(), found=found)


# -- sessions


def note_sessions() -> None:
    """Note which PostgreSQL session this process has, and which connections to the server each of its parents has."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (backend,) = cursor.fetchone()
        cursor.execute("SELECT pid, client_port FROM pg_stat_activity WHERE client_port > 0")
        ports = {port: pid for pid, port in cursor.fetchall()}
    run, runner = os.getpid(), os.getppid()
    keeper = parent_of(runner)
    found = {name: sessions_of(pid, ports) for name, pid in (("run", run), ("runner", runner), ("keeper", keeper))}
    journal.mine().write("sessions", **about(), backend=backend, **found)


def sessions_of(pid: int, ports: dict[int, int]) -> list[int]:
    """Return the server's sessions that a process has a socket to."""
    local = {}
    with open("/proc/net/tcp") as table:
        for line in list(table)[1:]:
            fields = line.split()
            local[fields[9]] = int(fields[1].rpartition(":")[2], 16)
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue
        port = local.get(target.removeprefix("socket:[").rstrip("]"))
        if port in ports:
            found.append(ports[port])
    return sorted(set(found))
