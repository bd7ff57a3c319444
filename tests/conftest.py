"""
One run of pytest covers every store that this machine has: SQLite in a file, PostgreSQL, MariaDB, and the caches that
can hold locks, Redis, Valkey, Memcached.

TEST_STORES=sqlite,postgresql,memcached limits them; with TEST_STORES_REQUIRED=1 a missing one is an error and not a
skip.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
from django.db import connections

from multiserver_schedule.declare import discovery

from . import caches, servers, stores
from .caches import CacheStore
from .stores import Store

ALL = (*stores.NAMES, *caches.NAMES)

_running: dict[str, servers.Server] = {}
_tested: set[str] = set()


def _missing(name: str) -> str:
    return caches.missing(name) if name in caches.NAMES else stores.missing(name)


def pytest_configure(config: pytest.Config) -> None:
    # A task of our own would be one more wherever tests count tasks; those that are about it say so.
    discovery.OURS = ()
    if unknown := [name for name in stores.asked() if name not in ALL]:
        raise pytest.UsageError(f"TEST_STORES names {unknown[0]!r}. Stores are: {', '.join(ALL)}.")
    if os.environ.get("TEST_STORES_REQUIRED", "0") not in ("", "0"):
        lost = [f"{name}: {_missing(name)}" for name in stores.chosen(ALL) if _missing(name)]
        if lost:
            raise pytest.UsageError(f"TEST_STORES_REQUIRED is set, and these stores are missing: {'; '.join(lost)}.")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.getoption("collectonly"):
        return
    lost = [f"{name} ({_missing(name)})" for name in ALL if _missing(name)]
    unused = [name for name in ALL if name not in _tested and not _missing(name)]
    terminalreporter.write_line(
        f"stores tested: {', '.join(name for name in ALL if name in _tested) or 'none'}"
        + (f"; not asked for by these tests: {', '.join(unused)}" if unused else "")
        + (f"; NOT TESTED: {', '.join(lost)}" if lost else "")
    )


def _aliases_needed(items: list[pytest.Item]) -> set[str]:
    needed: set[str] = set()
    for item in items:
        asked = [marker.kwargs.get("databases") for marker in item.iter_markers("django_db")]
        asked.append(getattr(getattr(item, "cls", None), "databases", None))
        for databases in asked:
            needed.update(connections if databases == "__all__" else databases or ())
    return needed


@pytest.fixture(scope="session")
def django_db_modify_db_settings(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Start the servers that the chosen tests need, just before Django makes its test databases on them."""
    # A file and not in memory: other processes shall see it.
    connections.settings["default"]["TEST"]["NAME"] = str(tmp_path_factory.mktemp("sqlite") / "default.sqlite3")
    for alias in connections:
        # Django makes every other database wait for "default", which a run on one server alone does not make.
        connections.settings[alias]["TEST"]["DEPENDENCIES"] = []
    needed = _aliases_needed(request.session.items)
    wanted = [
        name
        for name in stores.DRIVERS
        if stores.ALIASES[name] in needed and not stores.missing(name) and not stores.given_url(name)
    ]
    with servers.running(wanted) as started:
        for name, server in started.items():
            connections.settings[stores.ALIASES[name]].update(server.database_settings())
        _running.update(started)
        yield
        _running.clear()


@pytest.fixture(
    params=[
        pytest.param(
            name,
            marks=[
                pytest.mark.django_db(databases=[stores.ALIASES[name]], transaction=True),
                pytest.mark.skipif(bool(stores.missing(name)), reason=f"{name}: {stores.missing(name)}"),
            ],
        )
        for name in stores.NAMES
    ]
)
def store(request: pytest.FixtureRequest, django_db_setup: None) -> Store:
    """
    Run the test on every store, one after the other, each migrated and empty.

    The test has this database and no other, outside any transaction, and what it writes is removed after it.
    """
    alias = stores.ALIASES[request.param]
    connection = connections[alias]
    _tested.add(request.param)
    return Store(
        name=request.param,
        alias=alias,
        vendor=connection.vendor,
        url=stores.url_of(connection.settings_dict),
        server=_running.get(request.param),
    )


@pytest.fixture(scope="session")
def cache_server() -> Iterator[Callable[[str], servers.Server]]:
    """Return what starts a cache server of a kind when it is first asked for one, and gives the same one afterwards."""
    started: dict[str, servers.Server] = {}
    with contextlib.ExitStack() as stack:

        def of_kind(name: str) -> servers.Server:
            if name not in started:
                # With the append-only file, as a Redis that holds locks should be: a test may crash it, and restart it.
                options = {"appendonly": "yes", "appendfsync": "everysec"} if name != "memcached" else {}
                started[name] = stack.enter_context(servers.start(name, **options))
            return started[name]

        yield of_kind


@pytest.fixture(
    params=[
        pytest.param(
            name, marks=pytest.mark.skipif(bool(caches.missing(name)), reason=f"{name}: {caches.missing(name)}")
        )
        for name in caches.NAMES
    ]
)
def cache_store(request: pytest.FixtureRequest, cache_server: Callable[[str], servers.Server]) -> Iterator[CacheStore]:
    """
    Run the test on every cache that can hold locks, one after the other, each empty: the alias "lock" of ``CACHES``.

    The test may freeze, crash, restart and configure the server: the next one finds it as it was started. What it needs
    of databases, it asks for itself.
    """
    server = cache_server(caches.WAYS[request.param].server)
    server.reset()
    _tested.add(request.param)
    with caches.in_use(caches.of(request.param, server)) as store:
        yield store
