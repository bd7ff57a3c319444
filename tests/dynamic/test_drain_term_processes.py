"""TermDrain with real processes, which their provider has started: each is told to end once, and waited for."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest

from multiserver_schedule.models import ScheduledRun
from multiserver_schedule.servers import fleet, ledger, providers, reconcile
from multiserver_schedule.servers.drains.term import TermDrain
from multiserver_schedule.servers.entries import MachineState, ServerInfo
from multiserver_schedule.servers.providers.process import ProcessProvider
from multiserver_schedule.servers.types import ServerType

from .. import servers
from ..scenarios.scene import Scene
from ..stores import ROOT, Store
from .conftest import NOON, POLL
from .needs import needs

WITHIN = 20.0
SERVICE = """
import pathlib, signal, sys, time
notes, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
told = []
def tell(*_):
    told.append("TERM")
    notes.write_text("".join(told))
signal.signal(signal.SIGTERM, tell)
notes.write_text("up")
while not told:
    time.sleep(0.01)
time.sleep(seconds)
notes.write_text("".join(told) + " ended")
"""


class Blunt(ProcessProvider):
    """Does not remember what it was asked for."""

    asked: ClassVar[list[str]] = []

    def stop_server(self, machine_id: str) -> None:
        self.asked.append(machine_id)
        super().stop_server(machine_id)


def wait_for(condition: Callable[[], object], fact: str) -> None:
    servers.wait_for(lambda: bool(condition()), fact, seconds=WITHIN)


class Here:
    """The machine that processes are started on."""

    def __init__(self, settings: Any, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.options()

    def options(self, backend: type[ProcessProvider] = ProcessProvider, **options: Any) -> None:
        self.settings.MULTISERVER_SCHEDULE_SERVERS = {
            "FLEET": "drains",
            "PROVIDERS": {
                "here": {
                    "BACKEND": f"{backend.__module__}.{backend.__name__}",
                    "OPTIONS": {"directory": str(self.folder), **options},
                }
            },
        }

    @property
    def provider(self) -> providers.BaseProvider:
        return providers.make("here")

    def start(self, name: str, command: list[str], env: Mapping[str, str] | None = None) -> ServerInfo:
        configuration = {"command": command, "env": dict(env or {})}
        server = ServerInfo(name=name, key=f"key-{name}", type="default", provider="here", configuration=configuration)
        machine = self.provider.create_server(server)
        return ServerInfo(name=name, key=server.key, type="default", provider="here", machine_id=machine.id)

    def start_service(self, seconds: float) -> tuple[ServerInfo, Path]:
        """Start what takes so long to end when it is told to, and writes down what it was told."""
        notes = self.folder / "notes"
        server = self.start("web1", [sys.executable, "-c", SERVICE, str(notes), str(seconds)])
        wait_for(notes.exists, "it is up")
        return server, notes

    def end(self) -> None:
        for machine in self.provider.list_servers():
            self.provider.delete_server(machine.id)
        wait_for(lambda: not self.provider.list_servers(), "all processes are gone")


@pytest.fixture
def here(settings: Any, tmp_path: Path) -> Iterator[Here]:
    here = Here(settings, tmp_path / "machines")
    yield here
    here.end()


def test_a_server_is_told_once_however_many_ask_and_has_the_time_that_it_needs(here: Here) -> None:
    # The provider itself would kill it sooner, if it were asked to wait.
    here.options(stop_timeout=timedelta(milliseconds=100))
    server, notes = here.start_service(1.0)
    barrier = threading.Barrier(8)

    def ask(_: int) -> int:
        barrier.wait()
        return TermDrain()(server)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {1}
    for _ in range(5):
        time.sleep(0.1)
        assert TermDrain()(server) == 1
    wait_for(lambda: TermDrain()(server) == 0, "it has ended")
    assert notes.read_text() == "TERM ended"


def test_a_provider_is_asked_once_to_stop_it(here: Here) -> None:
    here.options(backend=Blunt)
    server, _ = here.start_service(0.3)
    drain = TermDrain()
    wait_for(lambda: drain(server) == 0, "it has ended")
    assert Blunt.asked == [server.machine_id]


def test_a_reboot_that_drains_brings_the_worker_up_again(rows: Store, here: Here) -> None:
    here.options(command=["sleep", "600"])
    fleet.register_server_type(ServerType("worker").between(1, 1).drain_with(TermDrain()))
    moments = itertools.count()
    boots: set[str] = set()

    def has_come_up() -> bool:
        reconcile.run("here", now=NOON + next(moments) * POLL)
        [booted] = [machine.booted for machine in here.provider.list_servers()] or [""]
        is_news = ledger.counts("worker").get("running") == 1 and booted not in boots
        boots.update([booted] if is_news else [])
        return is_news

    wait_for(has_come_up, "it is up")
    fleet.reboot("worker")
    wait_for(has_come_up, "it is up again")
    assert ledger.servers().count() == 1


def test_one_that_has_ended_and_one_that_is_gone_are_drained(here: Here) -> None:
    server, _ = here.start_service(0.0)
    here.provider.stop_server(server.machine_id)
    wait_for(lambda: here.provider.has_stopped(server.machine_id), "it has ended")
    assert TermDrain()(server) == 0
    here.provider.delete_server(server.machine_id)
    wait_for(lambda: not here.provider.list_servers(), "it is gone")
    assert TermDrain()(server) == 0


def test_one_that_ignores_the_order_is_never_taken_for_drained_and_ended_by_its_provider(here: Here) -> None:
    here.options(stop_timeout=timedelta(milliseconds=100))
    server, _ = here.start_service(3600.0)
    assert {TermDrain()(server) for _ in range(3)} == {1}
    time.sleep(0.2)
    assert TermDrain()(server) == 1
    # The limit is over: what the reconciler does then.
    here.provider.stop_server(server.machine_id)
    wait_for(lambda: here.provider.has_stopped(server.machine_id), "it has ended")


def test_what_the_provider_cannot_tell_is_an_error(here: Here) -> None:
    server, _ = here.start_service(0.0)
    elsewhere = ServerInfo(
        name="web2", key="key-web2", type="default", provider="here", machine_id="key-web2@another-host"
    )
    with pytest.raises(Exception, match="another-host"):
        TermDrain()(elsewhere)
    assert [machine.state for machine in here.provider.list_servers()] == [MachineState.RUNNING]
    assert server.machine_id


def test_a_service_of_ours_lets_its_run_end_and_claims_nothing_more(store: Store, here: Here, tmp_path: Path) -> None:
    if store.name != "sqlite":
        pytest.skip("no matter of the store")
    with Scene(store, tmp_path, "service", env={"SCENE_SECONDS": "1.5"}) as scene:
        scene.register()
        scene.make_due(["long"])
        environ = {name: value for name, value in scene.environ("web1").items() if os.environ.get(name) != value}
        command = [sys.executable, "-m", "tests.fleet.start", "--forever", "--grace", "20"]
        server = here.start("web1", command, environ)
        scene.wait_for_start("long")
        drain = TermDrain()
        assert drain(server) == 1
        scene.make_due(["short"])
        wait_for(lambda: drain(server) == 0, "the service has ended")
        runs = ScheduledRun.objects.using(store.alias).values_list("task", "status")
        assert list(runs) == [("long", "succeeded")]


def test_a_worker_of_django_tasks_ends_with_its_task(here: Here, tmp_path: Path) -> None:
    needs("django_tasks_db")
    environ = {
        "DJANGO_SETTINGS_MODULE": "tests.dynamic.tasks_project",
        "DATABASE_URL": f"sqlite:///{tmp_path / 'tasks.sqlite3'}",
        "PYTHONPATH": str(ROOT),
    }

    def manage(*arguments: str) -> str:
        command = [sys.executable, "-m", "django", *arguments, "-v0"]
        done = subprocess.run(command, env={**os.environ, **environ}, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout

    begun = tmp_path / "begun"
    manage("migrate")
    enqueue = f"from tests.dynamic.tasks_work import work\nfor _ in range(2): work.enqueue({str(begun)!r}, 1.0)"
    manage("shell", "-c", enqueue)
    server = here.start("web1", [sys.executable, "-m", "django", "db_worker", "--interval", "0.1"], environ)
    wait_for(begun.exists, "a task has begun")
    drain = TermDrain()
    assert [drain(server), drain(server)] == [1, 1]
    wait_for(lambda: drain(server) == 0, "the worker has ended")
    ask = "from django_tasks_db.models import DBTaskResult as Row\nprint(*(row.status for row in Row.objects.all()))"
    assert sorted(manage("shell", "-c", ask).split()) == ["READY", "SUCCESSFUL"]
