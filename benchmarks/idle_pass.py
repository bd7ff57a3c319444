"""
What does a pass cost when nothing is due? CPU time of ``runschedule`` against a command that does nothing, in pairs.

    python benchmarks/idle_pass.py [--pairs 40] [--tasks 500 --tasks 10000]

Both commands run in the same throw-away project (full default apps, SQLite, or DATABASE_URL), one right after the
other, so that whatever else the machine does meets both. Printed: the median of the ratios, its quartiles, and CPU
milliseconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SETTINGS = """
import os, sys
sys.path.insert(0, {root!r})
from example_project.example.settings import *  # the default apps
INSTALLED_APPS = [app for app in INSTALLED_APPS if app not in ("shop", "reports")] + ["many"]
ROOT_URLCONF = "many.urls"
DATABASES = {{"default": database(os.environ.get("DATABASE_URL", "sqlite:///{folder}/db.sqlite3"))}}
LOGGING = {{}}
"""
COMMAND = """
from django.core.management.base import BaseCommand
class Command(BaseCommand):
    requires_system_checks = []
    def handle(self, *args, **options):
        pass
"""


def project(folder: Path, tasks: int) -> None:
    """Write a project with so many declared tasks, all due once a year."""
    commands = folder / "many" / "management" / "commands"
    commands.mkdir(parents=True, exist_ok=True)
    for package in (folder / "many", commands.parent, commands):
        (package / "__init__.py").touch()
    (folder / "settings.py").write_text(SETTINGS.format(root=str(ROOT), folder=folder))
    (folder / "many" / "urls.py").write_text("urlpatterns = []\n")
    (commands / "nothing.py").write_text(COMMAND)
    lines = ["from multiserver_schedule import schedule"]
    for number in range(tasks):
        lines.append(
            f'schedule.call("time.sleep", 0).cron("{number % 60} {number % 24} 1 1 *").timezone("Europe/Berlin")'
            f'.ensure_finished(minutes=5).name("many.task_{number}")'
        )
    (folder / "many" / "schedule.py").write_text("\n".join(lines) + "\n")


def cpu(folder: Path, *arguments: str) -> float:
    """Run a command of the project; return its CPU seconds, with those of its children."""
    environ = {**os.environ, "DJANGO_SETTINGS_MODULE": "settings", "PYTHONPATH": str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-m", "django", *arguments], cwd=folder, env=environ, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime


def measure(tasks: int, pairs: int) -> None:
    """Measure one number of declared tasks, and print a line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        project(folder, tasks)
        cpu(folder, "migrate", "--verbosity=0")
        cpu(folder, "runschedule", "--verbosity=0")
        idle, nothing = [], []
        for _ in range(pairs):
            idle.append(cpu(folder, "runschedule"))
            nothing.append(cpu(folder, "nothing"))
    ratios = sorted(a / b for a, b in zip(idle, nothing, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"{tasks:6} tasks: ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f}), "
        f"{statistics.median(idle) * 1000:.0f} ms against {statistics.median(nothing) * 1000:.0f} ms of CPU, "
        f"{pairs} pairs"
    )


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--tasks", type=int, action="append")
    given = parser.parse_args()
    for tasks in given.tasks or [1, 500, 10_000]:
        measure(tasks, given.pairs)


if __name__ == "__main__":
    main()
