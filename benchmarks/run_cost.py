"""
What does a run cost besides its work? From the order to the first line of the task, and to its recorded end.

    python benchmarks/run_cost.py [--runs 200]

One keeper, its runner and one child a run, without a store; medians and 99th percentiles in milliseconds, and runs a
second when all are ordered at once. Beside them, in the same process, a bare fork and exit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import django
from django.conf import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def say_when() -> None:
    """Print the time at which the task's first line runs."""
    print(time.time())


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    settings.configure(USE_TZ=True, INSTALLED_APPS=["multiserver_schedule"], DATABASES={})
    django.setup()

    from multiserver_schedule.cron import Every
    from multiserver_schedule.entries import Claim, Occurrence, ScheduledTask
    from multiserver_schedule.run.base import Ended, boot_time
    from multiserver_schedule.run.handle import ProcessRunner

    now = datetime.now(timezone.utc)
    task = ScheduledTask(name="a.b", kind="call", target=say_when, timetable=Every(timedelta(minutes=1)))
    occurrence = Occurrence(
        task=task,
        row="a.b",
        pk=1,
        due_at=now,
        next_due_at=None,
        lease=timedelta(seconds=30),
        min_break=timedelta(0),
    )

    def claim(number: int) -> Claim:
        return Claim(
            occurrence=occurrence,
            owner=f"run-{number}",
            fence=number,
            server="here",
            acquired_at=now,
            expires_at=now + timedelta(seconds=30),
        )

    runner = ProcessRunner({"a.b": task}, deliver=lambda event: None, heartbeat=10.0)
    runner.start()
    begun, ended, forked = [], [], []
    for number in range(runs):
        at, wall = time.perf_counter(), time.time()
        runner.run(claim(number), until=boot_time() + 30, finish_by=None)
        outcome = None
        while outcome is None:
            outcome = next((m.outcome for m in runner.poll(1.0) if isinstance(m, Ended)), None)
        ended.append((time.perf_counter() - at) * 1000)
        begun.append((float(outcome.output) - wall) * 1000)
        at = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        forked.append((time.perf_counter() - at) * 1000)
    at, left = time.perf_counter(), runs
    for number in range(runs, 2 * runs):
        runner.run(claim(number), until=boot_time() + 60, finish_by=None)
    while left:
        left -= sum(isinstance(message, Ended) for message in runner.poll(1.0))
    rate = runs / (time.perf_counter() - at)
    runner.close(5.0)
    for name, values in (("order → first line", begun), ("order → end", ended), ("bare fork and exit", forked)):
        late = statistics.quantiles(values, n=100)[98]
        print(f"{name:20} median {statistics.median(values):6.1f} ms   p99 {late:6.1f} ms")
    print(f"{runs} ordered at once: {rate:.0f} runs/s")


if __name__ == "__main__":
    main()
