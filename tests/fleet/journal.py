"""
The append-only log of a fleet: one JSON line per write, from any process, in the order of the writes.

Each line has ``event``, ``pid`` and ``boot``, seconds of the boot clock, which every process of the machine shares and
which libfaketime leaves alone. What else it has, by event:

=========== ======================================================== ==================================================
event       written by                                               further keys
=========== ======================================================== ==================================================
start       a task, first thing                                      task (the row's name), due_at, fence, attempt,
tick        it, every 50 ms; end when it returns                     server, trigger, key; start also runner and keeper
end
grandchild  a task that started one                                  child
cleanup     a receiver of ``ensure_cleanup_executed``                task, owner, fence, server, reason
skipped     a receiver of ``task_skipped``                           task, due_at, reason, holder, count, server
failed      a receiver of ``task_failed``                            task, due_at, fence, status, server
lost        a receiver of ``lease_lost``                             task, due_at, fence, server
waiting     a server at the barrier; off when it has passed          server; off also wall, its own clock's time
off
launched    the test, of each server that it starts                  server, keeper, clock
killed      the test; also stopped, continued, terminated            server, keeper, pids
ended       a drill, when it sees that a server has ended            server, keeper, status
clock       the test: what the database's clock said at ``boot``     now, spread (seconds that the question took)
=========== ======================================================== ==================================================
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

A_MOMENT = 5.0
"""Seconds that a busy machine may add to what is done at once."""

VARIABLE = "FLEET_JOURNAL"
LONGEST = 4096  # up to a page, no write of another process gets in between

Line = dict[str, Any]


def boot() -> float:
    """Return seconds of the boot clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Journal:
    """One file that everybody appends to."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, event: str, **more: Any) -> None:
        """Append one line. The file is opened anew: a runner closes the descriptors that its runs do not need."""
        line = {"event": event, "pid": os.getpid(), "boot": boot(), **more}
        data = (json.dumps(line, default=_plain) + "\n").encode()
        assert len(data) < LONGEST, f"A line of {len(data)} bytes may be torn."
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.write(file, data)
        finally:
            os.close(file)

    def __iter__(self) -> Iterator[Line]:
        """Yield the lines so far."""
        if not self.path.exists():
            return
        with self.path.open() as file:
            for text in file:
                if text.endswith("\n"):
                    yield json.loads(text)

    def lines(self) -> list[Line]:
        """Return the lines so far."""
        return list(self)

    def of(self, *events: str, **having: Any) -> list[Line]:
        """Return the lines of these events (of all, when none is named) with these values."""
        return [
            line
            for line in self
            if (not events or line["event"] in events) and all(line.get(key) == value for key, value in having.items())
        ]


def mine() -> Journal:
    """Return the journal of the fleet that this process belongs to."""
    return Journal(os.environ[VARIABLE])


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
