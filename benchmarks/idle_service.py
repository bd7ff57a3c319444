"""
What does a service cost that has nothing to do? Statements a minute, as the servers count them, and CPU time.

    python benchmarks/idle_service.py [--seconds 120] [--tasks 1000] [--store postgresql --store redis] [--profile]

One service of each store, with so many declared tasks that are due once a year, all over the same minutes. PostgreSQL's
and MariaDB's statements are counted in the server's own log, SQLite's by its trace callback, and Redis' by MONITOR, as
round trips. The Redis service has its history in SQLite, whose statements are counted with it. CPU is that of keeper
and runner together, from the scheduler's nanoseconds. ``--profile`` says where it goes, and is no fair figure itself.
"""

from __future__ import annotations

import argparse
import contextlib
import pstats
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.stage import Project, Service, cpu_of, leave_cleanly, load, memory_of, wakeups_of
from tests import servers

SETTLES = 10.0
"""Seconds after its start that a service is let alone before anything is counted."""
STORES = ("postgresql", "mariadb", "sqlite", "redis")

TRACE = """
from django.db.backends.signals import connection_created

_log = os.open(os.path.join(os.path.dirname(__file__), "statements"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _trace(connection, **more):
    connection.connection.set_trace_callback(lambda text: os.write(_log, text.replace("\\n", " ").encode() + b"\\n"))


connection_created.connect(_trace, weak=False)
"""
PROFILE = """
import cProfile, os, time
from pathlib import Path
from multiserver_schedule.run.runner import Serve
from multiserver_schedule.keeper import Keeper


def profile(owner, begin, end, name):
    profiler = cProfile.Profile(time.process_time)
    begins, ends = getattr(owner, begin), getattr(owner, end)

    def begin_it(*args, **more):
        begins(*args, **more)
        profiler.enable()

    def end_it(*args, **more):
        try:
            return ends(*args, **more)
        finally:
            profiler.dump_stats(Path(__file__).parent.parent / name)

    setattr(owner, begin, begin_it)
    setattr(owner, end, end_it)


if "PROFILE" in os.environ:
    profile(Keeper, "_tell_that_it_is_up", "forever", "keeper.profile")
    profile(Serve, "_start_reporter", "forever", "runner.profile")
"""


@dataclass
class Counted:
    """A store, the project whose locks are in it, and its own account of what it has been asked."""

    database: str
    statements: Callable[[Project], list[str]]
    caches: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    more: str = ""


def counted(name: str, stack: contextlib.ExitStack) -> Counted:
    """Start a store of this kind."""
    if name == "postgresql":
        server = stack.enter_context(servers.start(name, log_statement="all", log_min_messages="log"))
        return Counted(server.url, reads(server.folder / "log", r"LOG:  (?:statement|execute [^:]*): (.*)"))
    if name == "mariadb":
        server = stack.enter_context(servers.start(name, general_log=1, general_log_file="queries"))
        return Counted(server.url, reads(server.data / "queries", r"\t *\d+ (?:Query|Execute)\t(.*)"))
    sqlite = Counted("sqlite:///{folder}/db.sqlite3", lambda project: lines(project.folder / "statements"), more=TRACE)
    if name == "redis":
        server = stack.enter_context(servers.start(name))
        monitor = Monitor(server)
        sqlite.statements = lambda project: monitor.said() + lines(project.folder / "statements")
        sqlite.caches = {"default": {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": server.url}}
        sqlite.settings = {"LOCKS": {"default": {"BACKEND": "multiserver_schedule.locks.cache.CacheLock"}}}
    return sqlite


def reads(path: Path, line: str) -> Callable[[Project], list[str]]:
    """Return what finds the statements in the log of a server."""
    pattern = re.compile(line)
    return lambda project: pattern.findall(path.read_text(errors="replace"))


def lines(path: Path) -> list[str]:
    """Return the lines of a file, if it is there."""
    return path.read_text(errors="replace").splitlines() if path.exists() else []


class Monitor:
    """Listens to what a Redis is asked by its clients; not to what a script calls."""

    def __init__(self, server: servers.Server) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port))
        self._socket.sendall(f"AUTH {server.password}\r\nMONITOR\r\n".encode())
        self._heard: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def said(self) -> list[str]:
        """Return every command since the start."""
        return list(self._heard)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            for line in self._socket.makefile(errors="replace"):
                if line.startswith("+1") and " lua] " not in line:
                    self._heard.append(line.partition("] ")[2].strip())


def schedule(tasks: int) -> str:
    """Return a schedule.py of so many tasks, all due once a year."""
    written = ["from multiserver_schedule import schedule"]
    for number in range(tasks):
        written.append(
            f'schedule.call("time.sleep", 0).cron("{number % 60} {number % 24} 1 1 *").timezone("Europe/Berlin")'
            f'.ensure_finished(minutes=5).name("work.task_{number}")'
        )
    return "\n".join(written) + "\n" + PROFILE


def shape(statement: str) -> str:
    """Return what one statement has in common with others of its kind."""
    return re.sub(r"'[^']*'|\b\d[\d.:+-]*", "?", statement)[:70]


def show(name: str, service: Service, asked: Counter[str], cpu: dict[str, float], woken: int, seconds: float) -> None:
    """Print the line of one store, and what it was asked."""
    rss = sum(memory_of(pid)[1] for pid in service.parts().values())
    share = sum(cpu.values()) / seconds * 100
    parts = ", ".join(f"{part} {used / seconds * 60_000:.0f}" for part, used in cpu.items())
    print(
        f"{name:11}{asked.total() / seconds * 60:8.1f}{share:12.3f} %{woken / seconds:10.1f}{rss:10.0f}"
        f"     {parts} ms of CPU a minute"
    )
    for kind, count in Counter(shape(text) for text in asked.elements()).most_common(6):
        print(f"{'':11}{count / seconds * 60:8.1f}  {kind}")


def show_profile(project: Project) -> None:
    """Print the dearest functions of the keeper and of the runner, once the service was up."""
    for name in ("keeper", "runner"):
        print(f"-- {name}: CPU seconds by function")
        stats = pstats.Stats(str(project.folder / f"{name}.profile")).strip_dirs()
        stats.sort_stats("cumulative").print_stats(40)
        stats.sort_stats("tottime").print_stats(15)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--store", action="append", choices=STORES)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    leave_cleanly()
    with contextlib.ExitStack() as stack:
        stores = {name: counted(name, stack) for name in given.store or ("postgresql", "sqlite", "redis")}
        projects: dict[str, Project] = {}
        for name, store in stores.items():
            project = Project(
                store.database,
                schedule(given.tasks),
                settings=store.settings,
                caches=store.caches,
                more=store.more,
            )
            projects[name] = stack.enter_context(project)
        with contextlib.ExitStack() as running:
            environ = {"PROFILE": "1"} if given.profile else {}
            services = {name: running.enter_context(project.service(**environ)) for name, project in projects.items()}
            time.sleep(SETTLES)
            before = {
                name: (
                    time.monotonic(),
                    Counter(stores[name].statements(projects[name])),
                    {part: (cpu_of(pid), wakeups_of(pid)) for part, pid in service.parts().items()},
                )
                for name, service in services.items()
            }
            time.sleep(given.seconds)
            print(f"{given.tasks} tasks, {given.seconds:.0f} s, {load()}")
            print(f"{'store':11}{'stmts/min':>9}{'of a core':>13}{'wakes/s':>10}{'own MiB':>10}")
            for name, service in services.items():
                began, asked, used = before[name]
                seconds = time.monotonic() - began
                parts = {part: pid for part, pid in service.parts().items() if part in used}
                cpu = {part: cpu_of(pid) - used[part][0] for part, pid in parts.items()}
                woken = sum(wakeups_of(pid) - used[part][1] for part, pid in parts.items())
                since = Counter(stores[name].statements(projects[name])) - asked
                show(name, service, since, cpu, woken, seconds)
        if given.profile:
            for project in projects.values():
                show_profile(project)


if __name__ == "__main__":
    main()
