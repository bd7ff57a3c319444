"""The harness itself: what the fault tests rest on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import servers, stores


def wait_until(condition: Callable[[], bool], *, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        # A zombie still has its number, and runs nothing.
        return state(pid) != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def connect(server: servers.Server) -> Any:
    """Connect with the driver itself: Django's connections are under pytest-django's watch."""
    settings = server.database_settings()
    where = {"host": settings["HOST"], "port": int(settings["PORT"]), "user": settings["USER"]}
    where["password"] = settings["PASSWORD"]
    if server.name == "postgresql":
        psycopg = pytest.importorskip("psycopg")
        return psycopg.connect(dbname=settings["NAME"], autocommit=True, **where)
    driver = pytest.importorskip("MySQLdb")
    return driver.connect(database=settings["NAME"], **where)


def ask(connection: Any, sql: str) -> Any:
    cursor = connection.cursor()
    cursor.execute(sql)
    (answer,) = cursor.fetchone()
    cursor.close()
    return answer


KINDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(stores.missing(name)), reason=f"{name}: {stores.missing(name)}"))
    for name in servers.KINDS
]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.fixture(params=KINDS, scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[servers.Server]:
    with servers.start(request.param) as started:
        yield started


@pytest.fixture
def connection(server: servers.Server) -> Iterator[Any]:
    opened = connect(server)
    yield opened
    opened.close()


def test_a_started_server_answers(connection: Any) -> None:
    assert ask(connection, "SELECT 6 * 7") == 42


def test_a_server_runs_as_nobody_important(server: servers.Server) -> None:
    users = set()
    for pid in server.pids():
        with contextlib.suppress(FileNotFoundError):  # One that served somebody may have ended by now.
            users.add(os.stat(f"/proc/{pid}").st_uid)
    assert users
    assert os.geteuid() != 0 or 0 not in users


def test_a_query_to_a_frozen_server_hangs_and_ends_when_it_is_thawed(server: servers.Server, connection: Any) -> None:
    ask(connection, "SELECT 1")
    answers: list[int] = []

    def query() -> None:
        answers.append(ask(connection, "SELECT 2"))

    server.freeze()
    thread = threading.Thread(target=query)
    try:
        thread.start()
        thread.join(timeout=0.5)
        assert thread.is_alive()
        assert answers == []
    finally:
        server.thaw()
        thread.join(timeout=10)
    assert answers == [2]


def test_a_frozen_server_lets_nobody_in(server: servers.Server) -> None:
    opened: list[Any] = []

    def enter() -> None:
        connection = connect(server)
        ask(connection, "SELECT 1")
        opened.append(connection)
        connection.close()

    server.freeze()
    thread = threading.Thread(target=enter)
    try:
        thread.start()
        thread.join(timeout=0.5)
        assert opened == []
    finally:
        server.thaw()
        thread.join(timeout=10)
    assert opened


@pytest.mark.parametrize("server", [pytest.param("postgresql", marks=KINDS[0].marks)], indirect=True)
def test_one_backend_of_postgresql_can_be_frozen_alone(server: servers.Server, connection: Any) -> None:
    backend = ask(connection, "SELECT pg_backend_pid()")
    assert backend in server.backend_pids()
    other = connect(server)
    server.freeze(backend)
    try:
        assert ask(other, "SELECT 1") == 1
        wait_until(lambda: state(backend) == "T")
    finally:
        server.thaw(backend)
        other.close()
    assert ask(connection, "SELECT 1") == 1


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("frozen", [False, True], ids=["running", "frozen"])
def test_a_stopped_server_leaves_no_process_and_no_folder(name: str, frozen: bool) -> None:
    server = servers.start(name)
    connection = connect(server)
    ask(connection, "SELECT 1")
    pids = server.pids()
    if frozen:
        server.freeze()
    server.stop()
    connection.close()
    assert [pid for pid in pids if is_running(pid)] == []
    assert not server.folder.exists()
    server.stop()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("frozen", [False, True], ids=["running", "frozen"])
def test_a_killed_parent_leaves_no_server_behind(name: str, frozen: bool) -> None:
    script = (
        "import sys, time\n"
        "from tests import servers\n"
        "server = servers.start(sys.argv[1])\n"
        "pids = server.pids()\n"
        "sys.argv[2] == 'True' and server.freeze()\n"
        "print(server.folder, *pids, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, name, str(frozen)], cwd=stores.ROOT, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        folder, *pids = parent.stdout.readline().split()
        started = is_running(int(pids[0]))
        parent.kill()
        parent.wait()
        assert started
        wait_until(lambda: not any(is_running(int(pid)) for pid in pids))
        wait_until(lambda: not Path(folder).exists())


def test_an_unknown_server_is_refused_by_name() -> None:
    with pytest.raises(servers.ServerError, match=r"no server 'oracle'\. Those are: postgresql, mariadb"):
        servers.start("oracle")


@pytest.mark.parametrize("name", KINDS)
def test_a_server_that_does_not_come_up_says_why(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = servers.KINDS[name]
    command = kind.command
    monkeypatch.setattr(kind, "command", lambda self: [*command(self), "--no-such-option=1"])
    with pytest.raises(servers.ServerError, match=r"ended while starting(.|\n)*no.such.option"):
        servers.start(name)


@pytest.mark.parametrize("name", KINDS)
def test_the_command_line_starts_servers_for_another_command(name: str) -> None:
    script = (
        f"import os; from django.conf import settings; from tests.servers import database_settings as at;"
        f"settings.configure(DATABASES={{'default': at(os.environ['TEST_{name.upper()}_URL'])}});"
        "from django.db import connection as c; k = c.cursor(); k.execute('SELECT 6 * 7'); print(k.fetchone()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.servers", name, "--", sys.executable, "-c", script],
        cwd=stores.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == ("42", 0), done.stderr


def test_the_command_line_hands_on_the_status(capfd: pytest.CaptureFixture[str]) -> None:
    assert servers.main(["postgresql"]) == 2
    assert "usage:" in capfd.readouterr().err


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////tmp/a%20folder/db.sqlite3",
        "postgresql://me:p%40ss%2Fword@127.0.0.1:5433/schedule",
        "mysql://me:secret@127.0.0.1:3307/schedule",
    ],
)
def test_a_url_and_the_settings_made_of_it_say_the_same(url: str) -> None:
    assert stores.url_of(servers.database_settings(url)) == url
