from __future__ import annotations

from datetime import timedelta

from multiserver_schedule import schedule
from tests.fleet.work import work

from .mix import BACKOFF, MIX

for kind in MIX:
    for name in kind.names:
        task = schedule.call(work, seconds=kind.seconds, tick=0.2, failures=kind.failures).name(name)
        task.every(seconds=kind.period).overlap(kind.overlap)
        if kind.later:
            task.jitter(timedelta(seconds=kind.later))
        if kind.retries:
            task.retry(kind.retries, backoff=BACKOFF)
        if kind.reruns:
            task.on_crash("rerun")
