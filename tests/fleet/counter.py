"""
``python -m tests.fleet.counter ORDER``: sixteen processes and a counter in a file that nothing but the lock guards.

Each claims the next due time of one task, reads the counter, pauses, writes it one higher, and releases. Two at once
lose a count. ORDER is JSON: {"folder": where the counter is, "claims": how many due times there are, "processes": n}.
The lock is the settings' "default"; time is passed in, a second for each due time. Each process
leaves the fences that it was given, with their due times, in the file given-<number> of the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

SECOND = timedelta(seconds=1)
FIRST = datetime(2030, 1, 1, tzinfo=timezone.utc)
LEASE = timedelta(hours=1)
"""Nobody is to lose the lock, however slow this machine is."""
PAUSE = 0.001
HEED = 0.97
MOST_PATIENCE = 0.1
"""So many that look all the time would leave no processor to the one that works."""


def main(order: dict[str, Any]) -> int:
    import django

    django.setup()
    folder = Path(order["folder"])
    (folder / "counter").write_text("0")
    # No connection may cross a fork: the one that registers is a process of its own.
    for processes in ([register], [work] * order["processes"]):
        started = []
        for number, do in enumerate(processes):
            pid = os.fork()
            if not pid:
                with leaving():
                    do(folder, number, order["claims"])
            started.append(pid)
        failed = [pid for pid in started if os.waitpid(pid, 0)[1]]
        if failed:
            return 1
    return 0


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """End this process after the block, with status 1 when it raised."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def the_lock() -> Any:
    from django.utils.module_loading import import_string

    from multiserver_schedule import conf

    chosen = conf.load().locks["default"]
    return import_string(chosen.backend)("default", chosen.options)


def the_task() -> Any:
    from multiserver_schedule.cron import Every
    from multiserver_schedule.entries import ScheduledTask

    return ScheduledTask(name="counter", kind="call", target="time.sleep", timetable=Every(SECOND))


def register(folder: Path, number: int, claims: int) -> None:
    from multiserver_schedule.locks.base import Declarations

    declared = Declarations(tasks={"counter": the_task()}, server="web0", digest="counter", server_digest="")
    the_lock().sync(declared, now=FIRST)


def work(folder: Path, number: int, claims: int) -> None:
    from multiserver_schedule.entries import Occurrence, Outcome, ReleasedClaim

    lock, task, counter = the_lock(), the_task(), folder / "counter"
    given = []
    last = FIRST + claims * SECOND
    while True:
        (row,) = lock.rows(["counter"])
        # Now and then somebody does not heed what it sees.
        if row.owner is not None and random.random() < HEED:
            time.sleep(random.uniform(0, MOST_PATIENCE))
            continue
        due_at = row.last_due_at + SECOND
        if due_at > last:
            break
        now = max(due_at, row.not_before)
        occurrence = Occurrence(
            task=task,
            row=row.task,
            pk=row.pk,
            due_at=due_at,
            next_due_at=due_at + SECOND,
            lease=LEASE,
            min_break=timedelta(0),
        )
        for claim in lock.claim([occurrence], server=f"web{number}", record=lambda claims, at: None, now=now):
            count = int(counter.read_text())
            time.sleep(PAUSE)
            # Not emptied in between: who reads at the same time shall read one number or the other.
            file = os.open(counter, os.O_WRONLY)
            os.write(file, b"%08d" % (count + 1))
            os.close(file)
            given.append((claim.fence, due_at.isoformat()))
            ended = ReleasedClaim(claim=claim, outcome=Outcome(status="succeeded"), min_break=timedelta(0))
            lock.release([ended], record=lambda releases, at: None, now=now)
    (folder / f"given-{number}").write_text(json.dumps(given))


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
