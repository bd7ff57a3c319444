"""A project with one cloud in a folder, on every database."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from django.db import connections

from multiserver_schedule.declare import registry
from multiserver_schedule.servers import fleet, ledger, monitor, reconcile, signals, types
from multiserver_schedule.servers.models import Server
from multiserver_schedule.servers.visit import Report

from ..stores import Store
from . import moto
from .cloud import Cloud
from .standin import Proxy

NOON = datetime(2030, 1, 1, 12, tzinfo=timezone.utc)
POLL = timedelta(seconds=20)
MINUTE = timedelta(minutes=1)


class To:
    """Sends the rows of the fleet to one database."""

    def __init__(self, alias: str) -> None:
        self.alias = alias

    def db_for_read(self, model: Any, **hints: Any) -> str | None:
        return self.alias if model._meta.app_label == "multiserver_schedule_servers" else None

    db_for_write = db_for_read


@dataclass
class Site:
    """The project: its cloud, its clock, and what its declared tasks do."""

    cloud: Cloud
    settings: Any
    alias: str = "default"
    now: datetime = NOON
    seen: list[str] = field(default_factory=list)
    """What became of servers, as the reports tell."""

    def options(self, **options: Any) -> None:
        """Change the provider's options, or its MAX_SERVERS."""
        given = {**self.settings.MULTISERVER_SCHEDULE_SERVERS}
        entry = {**given["PROVIDERS"]["folder"]}
        if "MAX_SERVERS" in options:
            entry["MAX_SERVERS"] = options.pop("MAX_SERVERS")
        entry["OPTIONS"] = {**entry["OPTIONS"], **options}
        given["PROVIDERS"] = {**given["PROVIDERS"], "folder": entry}
        self.settings.MULTISERVER_SCHEDULE_SERVERS = given

    def later(self, span: timedelta = POLL) -> None:
        self.now += span

    def reconcile(self, name: str = "folder") -> Report:
        self.cloud.tick(self.now)
        report = reconcile.run(name, now=self.now)
        self.seen += report.steps
        return report

    def monitor(self) -> list[monitor.Monitored]:
        return monitor.run(now=self.now)

    def passes(self, count: int = 1, every: timedelta = POLL) -> None:
        """Let the task run so often."""
        for _ in range(count):
            self.reconcile()
            self.later(every)

    def settle(self, most: int = 60) -> None:
        """Let passes run until no server has a next step, or is on its way."""
        for _ in range(most):
            self.reconcile()
            self.later()
            if not ledger.servers().filter(next_step_at__isnull=False).exists():
                self.reconcile()
                return
        raise AssertionError(f"It does not settle: {self.statuses()} {self.seen[-10:]}")

    def servers(self, *statuses: str) -> list[Server]:
        rows = ledger.servers().order_by("pk")
        return list(rows.filter(status__in=statuses) if statuses else rows)

    def statuses(self) -> dict[str, int]:
        """Return how many servers have each status; those that are deleted are left out."""
        return ledger.counts()


@pytest.fixture(autouse=True)
def no_types() -> Iterator[None]:
    """Have no type registered but the default, nobody who determines counts, and no task of ours left over."""
    types._registered.clear()
    fleet._determine.clear()
    fleet._read.clear()
    before = set(sys.modules)
    with registry.set_aside():
        yield
    # What they declare is gone with the test: who looks for it next has to import them again.
    for name in set(sys.modules) - before:
        if name.endswith(".schedule"):
            del sys.modules[name]
    types._registered.clear()
    fleet._determine.clear()


def quick(alias: str) -> None:
    """Spare SQLite its waits for the disk: who dies here is a process at most, and never the machine."""
    if connections[alias].vendor == "sqlite":
        with connections[alias].cursor() as cursor:
            cursor.execute("PRAGMA synchronous=OFF")


@pytest.fixture
def rows(store: Store, settings: Any) -> Store:
    """Keep the fleet's rows in this store."""
    settings.DATABASE_ROUTERS = [To(store.alias)]
    quick(store.alias)
    return store


@pytest.fixture
def site(rows: Store, settings: Any, tmp_path: Path) -> Site:
    """Have one provider of five machines, on every database."""
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "HOUSEKEEPING": False}
    settings.MULTISERVER_SCHEDULE_SERVERS = {
        "FLEET": "tests",
        "PROVIDERS": {
            "folder": {
                "BACKEND": "tests.dynamic.cloud.FolderProvider",
                "MAX_SERVERS": 5,
                "OPTIONS": {"folder": str(tmp_path / "cloud"), "password": "hunter2-hunter2"},
            }
        },
    }
    return Site(Cloud(tmp_path / "cloud"), settings, rows.alias)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Have moto's EC2 serve, and give its port."""
    with moto.serving() as port:
        yield port


@pytest.fixture
def proxy(port: int) -> Iterator[Proxy]:
    """Stand before an EC2 without machines, to spoil its answers."""
    moto.reset(port)
    proxy = Proxy(port)
    yield proxy
    proxy.close()


Heard = list[tuple[str, str]]


@pytest.fixture
def heard() -> Iterator[Callable[..., Heard]]:
    """Return what lists signals: pairs of the signal's name and the server's, or the reason."""
    connected: list[tuple[Any, Any]] = []

    def listen(*names: str) -> Heard:
        got: Heard = []
        for name in names:
            signal = getattr(signals, name)

            def receive(sender: Any, server: Any, reason: str, name: str = name, **more: Any) -> None:
                got.append((name, server.name if server else reason))

            signal.connect(receive, weak=False)
            connected.append((signal, receive))
        return got

    yield listen
    for signal, receive in connected:
        signal.disconnect(receive)
