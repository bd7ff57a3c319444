"""
What the benchmarks of the service mode share: a throw-away project, its services, and what their processes use.

    with servers.start("postgresql") as server, Project(server.url, SCHEDULE) as project:
        with project.service("web1") as service:
            service.cpu(), service.parts()

Only Linux tells all of it (``/proc``).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STARTS_WITHIN = 60.0
STOPS_WITHIN = 60.0

SETTINGS = """
import os
from datetime import timedelta

from tests.servers import database_settings

SECRET_KEY = "a benchmark's key, which protects nothing"
USE_TZ = True
ROOT_URLCONF = "work.urls"
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes", "multiserver_schedule"]
DATABASES = {{"default": database_settings({database!r})}}
CACHES = {{"default": {{"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}, **{caches!r}}}
MULTISERVER_SCHEDULE = {{"HOUSEKEEPING": False, **{settings!r}, "SERVER_NAME": os.environ.get("SERVER_NAME") or None}}
"""


class Project:
    """A Django project in a folder of its own, migrated; ``schedule`` is the text of its schedule.py."""

    def __init__(
        self,
        database: str,
        schedule: str,
        *,
        settings: Mapping[str, object] | None = None,
        caches: Mapping[str, object] | None = None,
        more: str = "",
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        self.folder = Path(self._folder.name)
        database = database.format(folder=self.folder)
        text = SETTINGS.format(database=database, caches=dict(caches or {}), settings=dict(settings or {}))
        (self.folder / "settings.py").write_text(text + more)
        (self.folder / "work").mkdir()
        (self.folder / "work" / "__init__.py").touch()
        (self.folder / "work" / "urls.py").write_text("urlpatterns = []\n")
        (self.folder / "work" / "schedule.py").write_text(schedule)

    def __enter__(self) -> Project:
        self.manage("migrate", "--verbosity=0", "--skip-checks")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def environ(self, server: str = "") -> dict[str, str]:
        """Return the environment of this project's processes."""
        path = os.pathsep.join([str(self.folder), str(ROOT)])
        return {**os.environ, "DJANGO_SETTINGS_MODULE": "settings", "PYTHONPATH": path, "SERVER_NAME": server}

    def manage(self, *arguments: str) -> None:
        """Run a command of the project to its end."""
        subprocess.run([sys.executable, "-m", "django", *arguments], cwd=self.folder, env=self.environ(), check=True)

    @contextlib.contextmanager
    def service(self, server: str = "web1", **environ: str) -> Iterator[Service]:
        """Have a service run, and end it by SIGTERM after the block."""
        output = self.folder / f"{server}.out"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "django", "runschedule", "--forever"],
                cwd=self.folder,
                env={**self.environ(server), **environ},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        service = Service(process.pid, output)
        try:
            until = time.monotonic() + STARTS_WITHIN
            while "service on " not in service.said:
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"The service did not come up:\n{service.said[-3000:]}")
                time.sleep(0.05)
            yield service
        finally:
            process.terminate()
            try:
                process.wait(STOPS_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class Service:
    """A service that runs: its keeper, the runner below it, and what the runner has started."""

    pid: int
    output: Path

    @property
    def said(self) -> str:
        """What it has printed and logged so far."""
        return self.output.read_text(errors="replace")

    def parts(self) -> dict[str, int]:
        """Return the processes that stay: the keeper, its runner, and the reporter once there is one."""
        table = parents()
        found = {"keeper": self.pid}
        runner = next((pid for pid, parent in table.items() if parent == self.pid), None)
        if runner is not None:
            found["runner"] = runner
            # The oldest child of the runner, if it is older than a run of a benchmark gets.
            ages = {pid: age for pid, parent in table.items() if parent == runner and (age := age_of(pid)) > 3}
            if ages:
                found["reporter"] = max(ages, key=ages.__getitem__)
        return found

    def cpu(self) -> dict[str, float]:
        """Return the CPU seconds that each of these has used."""
        return {name: cpu_of(pid) for name, pid in self.parts().items()}


# --- what the kernel says of processes ------------------------------------------------------------------------------


def parents() -> dict[int, int]:
    """Return the parent of each process that is alive."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()
                if fields[0] not in (b"Z", b"X"):
                    found[int(name)] = int(fields[1])
    return found


def age_of(pid: int) -> float:
    """Return for how many seconds a process has existed; 0 when it is gone."""
    with contextlib.suppress(OSError):
        began = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")
    return 0.0


def cpu_of(pid: int) -> float:
    """Return the CPU seconds of a process, all its threads together, to the nanosecond."""
    return sum(int(Path(each, "schedstat").read_text().split()[0]) for each in _threads(pid)) / 1e9


def cpu_with_children(pid: int) -> float:
    """Return the CPU seconds of a process and of everything below it, what has ended there included."""
    below: dict[int, list[int]] = {}
    for child, parent in parents().items():
        below.setdefault(parent, []).append(child)
    used, waiting = 0.0, [pid]
    while waiting:
        each = waiting.pop()
        waiting += below.get(each, [])
        with contextlib.suppress(OSError):
            ended = Path(f"/proc/{each}/stat").read_bytes().rpartition(b")")[2].split()[13:15]
            used += cpu_of(each) + sum(map(int, ended)) / os.sysconf("SC_CLK_TCK")
    return used


def wakeups_of(pid: int) -> int:
    """Return how often a process, any of its threads, has waited for something and been woken."""
    return sum(_field(Path(each, "status"), "voluntary_ctxt_switches") for each in _threads(pid))


def threads_of(pid: int) -> int:
    """Return how many threads a process has."""
    return len(_threads(pid))


def descriptors_of(pid: int) -> int:
    """Return how many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def memory_of(pid: int) -> tuple[float, float]:
    """Return what a process has in memory, and what of it no other process shares; in MiB."""
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    own = _field(rollup, "Private_Clean") + _field(rollup, "Private_Dirty")
    return _field(rollup, "Rss") / 1024, own / 1024


def _threads(pid: int) -> list[str]:
    return [f"/proc/{pid}/task/{thread}" for thread in os.listdir(f"/proc/{pid}/task")]


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    return 0


# --- words of the tables --------------------------------------------------------------------------------------------


def load() -> str:
    """Say how busy the machine is: figures of a busy one are only good beside each other."""
    return f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}"


def leave_cleanly() -> None:
    """Have SIGTERM end a benchmark as an exception does: what it started is ended with it."""

    def leave(number: int, frame: FrameType | None) -> Any:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
