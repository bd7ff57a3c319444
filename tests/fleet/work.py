"""What a fleet's tasks do: note that they began, that they are still at it, and that they ended."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any

from multiserver_schedule import current_run

from . import journal
from .journal import boot

TICK = 0.05


def parent_of(pid: int) -> int:
    """Return the parent of a process, 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return int(stat.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def work(
    seconds: float = 0.1,
    grandchild: bool = False,
    fails: bool = False,
    on_term: str = "",
    tick: float = TICK,
    failures: int = 0,
) -> None:
    """
    Be busy for so long, with a ``sleep`` beside it if wanted; ``on_term="ignore"`` makes it ignore SIGTERM.

    It fails at the end if it ``fails``, or at that many first attempts at each due time.
    """
    log, run = journal.mine(), current_run()
    assert run is not None
    about: dict[str, Any] = {
        "task": run.key.partition("/")[0],
        "due_at": run.due_at,
        "fence": run.fence,
        "attempt": run.attempt,
        "server": run.server,
    }
    until = boot() + seconds
    runner = os.getppid()
    log.write("start", **about, trigger=run.trigger, key=run.key, runner=runner, keeper=parent_of(runner))
    if on_term == "ignore":
        import signal

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if grandchild:
        log.write("grandchild", **about, child=subprocess.Popen(["sleep", "600"]).pid)
    while (left := until - boot()) > 0:
        time.sleep(min(tick, left))
        log.write("tick", **about)
    log.write("end", **about)
    if fails or run.attempt <= failures:
        raise RuntimeError("This task fails, as it was told to.")
