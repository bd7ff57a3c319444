"""
Does a service grow with what it has run? Memory, descriptors and threads over 100,000 runs on PostgreSQL.

    python benchmarks/soak.py [--runs 100000] [--tasks 200] [--at-once 8]

More tasks are due every second than can run, each a call of one line in a process of its own, until so many have run.
Printed at the start and at every tenth: runs a second since the line before, and of keeper, runner and reporter the MiB
in memory (what a fork shares counts for each of them), open descriptors and threads. The runner's descriptors are three
for each run of the moment. Ends with status 1 where one of the processes has grown between the first tenth and the end.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.stage import (
    Project,
    Service,
    cpu_with_children,
    descriptors_of,
    leave_cleanly,
    load,
    memory_of,
    threads_of,
)
from tests import servers

MOST_GROWTH = 1.0
"""MiB that are no growth: an arena more or less of Python's, a cache that has filled."""
PER_RUN = 3
"""Descriptors of the runner for each run of the moment."""
GIVES_UP = 60.0
"""Seconds without any run after which the service is taken to be stuck."""
PARTS = ("keeper", "runner", "reporter")

SCHEDULE = """
from multiserver_schedule import schedule


def nothing():
    pass


for number in range({tasks}):
    schedule.call(nothing).every_second().name(f"work.task_{{number}}")
"""


@dataclass(frozen=True)
class Sample:
    """What was seen at one moment."""

    at: float
    ran: int
    rows: int
    parts: dict[str, tuple[float, int, int]]
    """Of each process: MiB in memory, descriptors, threads."""

    def line(self, before: Sample) -> str:
        """Return this as a line of the table."""
        rate = (self.ran - before.ran) / max(0.1, self.at - before.at)
        parts = "".join(
            "{:13.1f}{:4}{:4}".format(*self.parts[part]) if part in self.parts else f"{'-':>21}" for part in PARTS
        )
        return f"{self.ran:8}{rate:8.1f}{parts}{self.rows:9}"


def sample(service: Service, database: psycopg.Connection[tuple[int, int]]) -> Sample:
    """Look at the service, and count what it has run."""
    found = database.execute(
        "SELECT count(*) FILTER (WHERE status = 'succeeded'), count(*) FROM multiserver_schedule_scheduledrun"
    ).fetchone()
    assert found is not None
    parts = {
        part: (memory_of(pid)[0], descriptors_of(pid), threads_of(pid))
        for part, pid in service.parts().items()
        if part in PARTS
    }
    return Sample(at=time.monotonic(), ran=found[0], rows=found[1], parts=parts)


def grown(first: Sample, last: Sample, at_once: int) -> list[str]:
    """Say what of the service has grown."""
    said = []
    for part in first.parts.keys() & last.parts.keys():
        (memory, descriptors, threads), before = last.parts[part], first.parts[part]
        if memory - before[0] > MOST_GROWTH:
            said.append(f"the {part} has {memory - before[0]:.1f} MiB more in memory")
        if descriptors > before[1] + (PER_RUN * at_once if part == "runner" else 0):
            said.append(f"the {part} has {descriptors - before[1]} descriptors more")
        if threads > before[2]:
            said.append(f"the {part} has {threads - before[2]} threads more")
    return said


def main() -> None:
    """Run so many, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=8)
    given = parser.parse_args()
    leave_cleanly()
    with (
        servers.start("postgresql", fsync="on") as server,
        Project(server.url, SCHEDULE.format(tasks=given.tasks), settings={"MAX_CONCURRENCY": given.at_once}) as project,
        project.service() as service,
        psycopg.connect(server.url, autocommit=True) as database,
    ):
        print(f"{given.runs} runs, {given.at_once} at once, {given.tasks} tasks due every second; {load()}")
        print(f"{'runs':>8}{'per s':>8}" + "".join(f"{part + ' MiB':>13} fds thr" for part in PARTS) + f"{'rows':>9}")
        time.sleep(4)  # The reporter is known by its age.
        begun = first = last = sample(service, database)
        used = cpu_with_children(service.pid)
        print(begun.line(begun), flush=True)
        tenth, seen = 1, begun
        while last.ran < given.runs:
            time.sleep(min(5.0, given.runs / 1000))
            now = sample(service, database)
            if now.ran > seen.ran:
                seen = now
            elif now.at - seen.at > GIVES_UP:
                raise SystemExit(f"Nothing has run for a minute:\n{service.said[-3000:]}")
            if now.ran >= given.runs * tenth / 10:
                print(now.line(last), flush=True)
                first = now if tenth == 1 else first
                last = now
                tenth = int(now.ran * 10 / given.runs) + 1
        ran, took = last.ran - begun.ran, last.at - begun.at
        cpu = (cpu_with_children(service.pid) - used) / ran * 1000
        print(f"{ran} runs in {took:.0f} s: {ran / took:.1f} a second, {cpu:.1f} ms of CPU each; {load()}")
        complaints = [line for line in service.said.splitlines() if "ERROR" in line or "Traceback" in line]
    for said in (trouble := grown(first, last, given.at_once) + complaints[:5]):
        print(f"! {said}")
    sys.exit(1 if trouble else 0)


if __name__ == "__main__":
    main()
