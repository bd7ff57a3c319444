"""The flood of the example project, as a newcomer starts it: it says whether each promise was kept; its rows agree."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from django.db import connections

from ..stores import ROOT, Store
from .needs import needs

WITHIN = 230.0
CALLS = {"sqlite": (), "postgresql": ("--at-once",), "mariadb": ()}
"""With the scheduler on one database; on another without its lock, so that three decide at once."""


@pytest.fixture
def url(store: Store, tmp_path: Path) -> Iterator[str]:
    """Return a new database, since that of the tests has the tables of another project."""
    if store.name == "sqlite":
        yield f"sqlite:///{tmp_path}/flood.sqlite3"
        return
    if store.name == "mariadb" and not os.environ.get("TEST_FLOODS"):
        pytest.skip("two databases are enough, for a minute each: TEST_FLOODS=1 has all three")
    name = f"flood_{uuid.uuid4().hex[:12]}"
    with connections[store.alias].cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name}")
        yield f"{store.url.rpartition('/')[0]}/{name}"
        cursor.execute(f"DROP DATABASE {name}")


def descended_from(folder: Path) -> list[int]:
    """Return the processes that have this folder in their environment."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdigit() and str(folder).encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def test_a_flood_is_worked_off_by_servers_that_come_and_go_while_a_scheduler_is_killed(
    store: Store, url: str, tmp_path: Path
) -> None:
    needs("django_tasks_db")
    environ = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "example_project" / "flood.py"), *CALLS[store.name]],
            env={**environ, "DATABASE_URL": url, "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=WITHIN,
            check=False,
        )
    finally:
        left = descended_from(tmp_path)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    said = done.stdout + done.stderr
    assert (done.returncode, "WRONG" in said) == (0, False), said
    assert "Each letter was written once." in said and "kill -9 web" in said
    assert left == []
    most = re.search(r"at most (\d) workers at once, 0 processes left", said)
    assert most is not None and most[1] in "34", said
    # One after the other, down to the minimum; the last one by hand, when no scheduler is left.
    down = re.findall(r"(\d) wanted, were (\d)", said)
    assert [pair for pair in down if pair[0] < pair[1]] == [("3", "4"), ("2", "3"), ("1", "2"), ("0", "1")], said
    if store.name == "sqlite":
        verify(tmp_path / "flood.sqlite3")


def verify(path: Path) -> None:
    """Ask the database itself."""
    rows = sqlite3.connect(path)
    try:
        letters, written, open_ = rows.execute(
            "SELECT COUNT(*), COUNT(DISTINCT number), SUM(ended_at IS NULL) FROM letters_letter"
        ).fetchone()
        tasks = dict(rows.execute("SELECT status, COUNT(*) FROM django_tasks_database_dbtaskresult GROUP BY status"))
        servers = dict(rows.execute("SELECT status, COUNT(*) FROM multiserver_schedule_servers_server GROUP BY status"))
        failed = rows.execute("SELECT name, failed_as FROM multiserver_schedule_servers_server WHERE failed_as != ''")
        assert letters >= 355 and (written, open_, tasks) == (letters, 0, {"SUCCESSFUL": letters})
        assert set(servers) == {"deleted"} and failed.fetchall() == []
    finally:
        rows.close()
