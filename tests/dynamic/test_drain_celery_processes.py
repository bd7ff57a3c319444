"""CeleryDrain with real workers on a real broker: what is run once, by whom, and what silence means."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from multiserver_schedule.servers import providers
from multiserver_schedule.servers.entries import ServerInfo
from multiserver_schedule.servers.exceptions import FleetError

from .. import servers
from ..servers import Server
from ..stores import ROOT
from .needs import REQUIRED, needs

needs("celery")

from multiserver_schedule.servers.drains.celery import CeleryDrain, _Control, _control  # noqa: E402

from .celery_app import app, note, rationed  # noqa: E402

WITHIN = 30.0
UNTIL_DRAINED = """
import sys, time
from datetime import timedelta
from multiserver_schedule.servers.drains.celery import CeleryDrain
from multiserver_schedule.servers.entries import ServerInfo
drain, left = CeleryDrain("tests.dynamic.celery_app", timeout=timedelta(seconds=10)), 1
while left:
    left = drain(ServerInfo(name=sys.argv[1], key="", type="default", provider=""))
    print(left)
    time.sleep(0.05)
"""
PATIENT = timedelta(seconds=10)
"""Of a machine that tests and workers share with others."""


def info(name: str, **more: Any) -> ServerInfo:
    return ServerInfo(name=name, key=f"key-of-{name}", type="default", provider="here", **more)


def wait_for(condition: Callable[[], object], fact: str) -> None:
    servers.wait_for(lambda: bool(condition()), fact, seconds=WITHIN)


class Workers:
    """Workers, each in a process group of its own, and what they have done."""

    def __init__(self, broker: Server, folder: Path) -> None:
        self.broker, self.folder = broker, folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.notes = folder / "notes"
        self.notes.touch()

    def environ(self, worker: str = "") -> dict[str, str]:
        return {
            **os.environ,
            "DYNAMIC_BROKER": self.broker.url,
            "DYNAMIC_NOTES": str(self.notes),
            "DYNAMIC_WORKER": worker,
            "PYTHONPATH": str(ROOT),
        }

    def command(self, name: str, *arguments: str) -> list[str]:
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "INFO")
        worker = [sys.executable, "-m", "celery", "-A", "tests.dynamic.celery_app", "worker", "-n", f"celery@{name}"]
        return [*worker, *quiet, "-Q", "jobs", *arguments]

    def start(self, *names: str, concurrency: int = 2) -> None:
        """Start workers, all at once, and wait until they listen."""
        for name in names:
            with (self.folder / f"{name}.log").open("wb") as log:
                self.processes[name] = subprocess.Popen(
                    self.command(name, "-c", str(concurrency)),
                    env=self.environ(name),
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        for name in names:
            is_over = self.processes[name].poll
            wait_for(lambda name=name, is_over=is_over: self.is_up(name) or is_over() is not None, f"{name} is up")
            assert self.is_up(name), self.log(name)

    def is_up(self, name: str) -> bool:
        return f"celery@{name} ready." in self.log(name)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def stop(self, name: str) -> None:
        """Do what a provider does: SIGTERM, and wait."""
        self.processes[name].terminate()
        assert self.processes[name].wait(WITHIN) == 0, self.log(name)

    def end(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    @property
    def done(self) -> list[tuple[str, str]]:
        """Return each job that was run, and on which worker."""
        return [(job, worker) for job, worker in map(str.split, self.notes.read_text().splitlines())]

    def done_by(self, name: str) -> int:
        return sum(worker == name for _, worker in self.done)

    @property
    def queued(self) -> int:
        if self.broker.name == "redis":
            return int(self.broker.call("LLEN", "jobs"))
        with app.connection_for_read() as connection:
            return int(connection.default_channel.queue_declare("jobs", passive=True).message_count)

    @property
    def unacknowledged(self) -> int:
        return int(self.broker.call("HLEN", "unacked"))

    def drain(self, name: str, **options: Any) -> None:
        """Ask until nothing is left."""
        drain = CeleryDrain(app, **{"timeout": PATIENT, **options})
        wait_for(lambda: drain(info(name)) == 0, f"{name} is drained")


@pytest.fixture(scope="module", params=["redis"])
def broker(request: pytest.FixtureRequest) -> Iterator[Server]:
    if not REQUIRED and (why := servers.missing(request.param)):
        pytest.skip(why)
    with servers.start(request.param) as server:
        yield server


on_each_broker = pytest.mark.parametrize("broker", ["redis", "rabbitmq"], indirect=True)


@pytest.fixture
def workers(broker: Server, tmp_path: Path) -> Iterator[Workers]:
    if broker.name == "redis":
        broker.reset()
    app.conf.broker_url = broker.url
    app.conf.task_default_queue = "jobs"
    workers = Workers(broker, tmp_path)
    yield workers
    workers.end()


def give(*jobs: str, seconds: float = 0.0, task: Any = note, **options: Any) -> None:
    # Not over the app's pool of connections, which would be the last broker's.
    with app.connection_for_write() as connection:
        for job in jobs:
            task.apply_async((job, seconds), queue="jobs", connection=connection, **options)


# -- no job is lost, or run twice --------------------------------------------------------------------------------------


def test_a_worker_is_drained_under_load_by_two_at_once_and_each_job_is_run_once(workers: Workers) -> None:
    workers.start("web1")
    give("later1", "later2", countdown=3600)
    wait_for(lambda: workers.unacknowledged == 2, "web1 has fetched what is due later")
    workers.start("web2")
    over, given = threading.Event(), list[str]()

    def keep_giving() -> None:
        while not over.wait(0.02):
            if workers.queued < 10:
                more = [f"job{len(given) + number}" for number in range(10)]
                given.extend(more)
                give(*more, seconds=0.1)

    publisher = threading.Thread(target=keep_giving)
    publisher.start()
    try:
        wait_for(lambda: workers.done_by("web1") and workers.done_by("web2"), "both work")
        both = [
            subprocess.Popen(
                [sys.executable, "-c", UNTIL_DRAINED, "web1"],
                env=workers.environ(),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        answers = [[int(left) for left in process.communicate(timeout=WITHIN)[0].split()] for process in both]
        assert [process.returncode for process in both] == [0, 0]
        assert max(answers)[0] > 0, "it was idle: nothing was tested"
        by_web1, by_web2 = workers.done_by("web1"), workers.done_by("web2")
        wait_for(lambda: workers.done_by("web2") > by_web2 + 5, "the other one takes over")
        workers.stop("web1")
    finally:
        over.set()
        publisher.join()
    wait_for(lambda: len(workers.done) >= len(given), "all jobs are done")
    assert Counter(job for job, _ in workers.done) == Counter(given)
    assert workers.done_by("web1") == by_web1, "a drained worker has worked"
    # What web1 had taken for later is web2's now.
    wait_for(lambda: (workers.queued, workers.unacknowledged) == (0, 2), "the other one has fetched what is due later")


@on_each_broker
def test_what_was_fetched_is_waited_for_and_what_was_not_is_left(workers: Workers) -> None:
    workers.start("web1", concurrency=1)
    give(*(f"job{number}" for number in range(10)), seconds=0.3)
    wait_for(lambda: workers.queued < 10, "web1 has fetched some")
    drain = CeleryDrain(app, timeout=PATIENT)
    fetched = drain(info("web1"))
    assert fetched > 1, "what is fetched and not begun was not counted"
    wait_for(lambda: drain(info("web1")) == 0, "web1 is drained")
    assert (len(workers.done), workers.queued) in [(fetched, 10 - fetched), (fetched + 1, 9 - fetched)]
    # Asked again, by whomever, it says the same.
    assert CeleryDrain("tests.dynamic.celery_app.app")(info("web1")) == 0


def test_a_drained_worker_stays_so_when_it_connects_anew(workers: Workers) -> None:
    workers.start("web1")
    workers.drain("web1")
    before = workers.log("web1").count("Connected to redis")
    for kind in ("normal", "pubsub"):
        workers.broker.call("CLIENT", "KILL", "TYPE", kind)
    wait_for(lambda: workers.log("web1").count("Connected to redis") > before, "web1 is back")
    give("job")
    drain = CeleryDrain(app, timeout=PATIENT)
    assert drain(info("web1")) == 0
    assert (workers.queued, workers.done) == (1, [])


def test_a_worker_that_is_shut_down_has_given_back_what_waits_for_its_time(workers: Workers) -> None:
    workers.start("web1")
    give("later", countdown=3600)
    give("rationed1", "rationed2", task=rationed)
    wait_for(lambda: workers.unacknowledged == 2 and workers.done, "one is rationed, and one is to be run later")
    workers.drain("web1", shutdown=True, timeout=timedelta(seconds=2))
    assert workers.processes["web1"].wait(WITHIN) == 0
    assert (workers.queued, workers.unacknowledged, len(workers.done)) == (2, 0, 1)


# -- silence is not an answer -----------------------------------------------------------------------------------------


def test_a_worker_that_does_not_answer_is_not_taken_for_idle(workers: Workers) -> None:
    workers.start("web1", "web2")
    give(*(f"job{number}" for number in range(4)), seconds=0.5)
    drain = CeleryDrain(app, timeout=timedelta(seconds=0.5))
    os.kill(workers.processes["web1"].pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"celery@web1 did not answer 'active_queues' within 0\.5 s"):
        drain(info("web1"))
    assert time.monotonic() - began < 5
    with pytest.raises(TimeoutError, match=r"^celery@web3 did not answer"):
        CeleryDrain(app, worker=lambda server: ["celery@web2", "celery@web3"], timeout=timedelta(seconds=0.5))(
            info("web3")
        )
    with _control(app, timedelta(seconds=0.5)) as control:
        assert control.answers(["celery@web1"], "ping") == {}
        os.kill(workers.processes["web1"].pid, signal.SIGCONT)
        # What it answers to the earlier questions comes first, and is not what is asked for here.
        patient = _Control(control._mailbox, WITHIN)
        assert patient.answers(["celery@web1"], "ping") == {"celery@web1": {"ok": "pong"}}
    both = CeleryDrain(app, worker=lambda server: [f"celery@{server.name}{n}" for n in (1, 2)], timeout=PATIENT)
    wait_for(lambda: both(info("web")) == 0, "all that run on one server are drained")
    assert len(workers.done) == 4
    give("job5")
    time.sleep(0.3)
    assert workers.queued == 1


@on_each_broker
def test_a_broker_that_is_away_is_an_error_and_within_seconds(workers: Workers) -> None:
    drain = CeleryDrain(app, timeout=timedelta(seconds=0.5))
    faults = [(workers.broker.freeze, workers.broker.thaw)]
    if workers.broker.name == "redis":
        # RabbitMQ takes its time to start again.
        faults.append((workers.broker.crash, workers.broker.restart))
    for fault, cure in faults:
        fault()
        try:
            began = time.monotonic()
            with pytest.raises(Exception, match=r"[Tt]ime|refused"):
                drain(info("web1"))
            assert time.monotonic() - began < 10
        finally:
            cure()


@pytest.mark.parametrize("say", [_Control.answers, _Control.tell])
def test_a_broker_that_dies_between_two_questions_is_no_reason_to_wait_for_it(
    say: Callable[..., object], workers: Workers
) -> None:
    back = threading.Timer(4, workers.broker.restart)
    with _control(app, timedelta(seconds=0.2)) as control:
        assert control.answers(["celery@web1"], "ping") == {}
        workers.broker.crash()
        back.start()
        try:
            with pytest.raises(Exception, match=r"refused|closed|reset"):
                say(control, ["celery@web1"], "shutdown")
            assert back.is_alive(), "it has waited until the broker was back"
        finally:
            back.cancel()
            back.join()
            if not workers.broker.is_running():
                workers.broker.restart()


def test_one_that_does_not_answer_is_drained_where_its_machine_is_down(workers: Workers, settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE_SERVERS = {
        "FLEET": "drains",
        "PROVIDERS": {
            "here": {
                "BACKEND": "multiserver_schedule.servers.providers.process.ProcessProvider",
                "OPTIONS": {"directory": str(workers.folder / "machines"), "command": ["sleep", "3600"]},
            }
        },
    }
    provider, drain = providers.make("here"), CeleryDrain(app, timeout=timedelta(seconds=0.2))
    machine = provider.create_server(info("web1"))
    server = info("web1", machine_id=machine.id)
    try:
        with pytest.raises(TimeoutError, match="celery@web1 did not answer"):
            drain(server)
    finally:
        provider.stop_server(machine.id)
        wait_for(lambda: provider.has_stopped(machine.id), "the machine is down")
    assert drain(server) == 0
    provider.delete_server(machine.id)


# -- what is declared wrong, fails there -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"app": "shop.nowhere.app"}, r"CeleryDrain\('shop.nowhere.app'\): No module named 'shop'"),
        ({"app": "tests.stores.NAMES"}, "takes a Celery app, or its name"),
        ({"worker": "celery@{host}"}, r"worker='celery@\{host\}' cannot be filled in.*\{name\}"),
        ({"worker": "celery@{"}, "cannot be filled in"),
        ({"worker": None}, "a text or a callable"),
        ({"timeout": 2}, "timeout should be a timedelta"),
        ({"timeout": timedelta(0)}, "longer than zero"),
    ],
)
def test_a_wrong_argument_is_refused_where_it_is_written(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FleetError, match=message):
        CeleryDrain(**arguments)


@pytest.mark.parametrize("names", [[], "celery@web1", None])
def test_a_callable_has_to_name_the_workers(names: Any) -> None:
    with pytest.raises((FleetError, TypeError)):
        CeleryDrain(app, worker=lambda server: names)(info("web1"))
