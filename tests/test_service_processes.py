"""What only processes show of a service: signals, a service manager, and a database that is killed under it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from django.db import connections

from multiserver_schedule.locks.orm import ORMLock

from .fleet.harness import Started, children, utc
from .fleet.journal import A_MOMENT, boot
from .scenarios.scene import Scene
from .stores import ROOT, Store

SEEN_WITHIN = 5.0


def scene_of(store: Store, tmp_path: Path, **more: Any) -> Scene:
    env = {"SCENE_SECONDS": "2", **more.pop("env", {})}
    return Scene(store, tmp_path, "service", env=env, **more)


def lock_of(store: Store) -> ORMLock:
    return ORMLock("default", {"using": store.alias})


def serve(scene: Scene, name: str = "web1", *arguments: str, **more: Any) -> Started:
    """Start a service, and wait until it is up."""
    process = scene.server(name, args=["--forever", *arguments], **more)
    scene.wait_for(lambda: f"service on {name}: " in process.output, f"{name} to be up\n{{}}")
    return process


def only(*names: str) -> Callable[[Store], None]:
    def skip(store: Store) -> None:
        if store.name not in names:
            pytest.skip("no matter of the store")

    return skip


on_sqlite, on_postgresql = only("sqlite"), only("postgresql")


# -- signals ----------------------------------------------------------------------------------------------------------


def test_a_service_that_is_told_to_stop_lets_its_run_end_and_starts_nothing_more(store: Store, tmp_path: Path) -> None:
    on_sqlite(store)
    with scene_of(store, tmp_path) as scene:
        scene.register()
        scene.make_due(["long"])
        web1 = serve(scene)
        scene.wait_for_start("long")
        web1.terminate()
        scene.make_due(["short"])
        assert web1.wait() == 0, web1.output
        assert [(run.task, run.status) for run in scene.runs()] == [("long", "succeeded")]
        assert all(lock.owner is None for lock in scene.locks())
        assert "waiting for long to end within 20 s" in web1.output
        assert scene.nothing_is_left_of("web1")


def test_what_is_not_over_within_the_grace_is_ended_and_recorded(store: Store, tmp_path: Path) -> None:
    on_sqlite(store)
    with scene_of(store, tmp_path, env={"SCENE_SECONDS": "60"}) as scene:
        scene.register()
        scene.make_due(["long"])
        web1 = serve(scene, "web1", "--grace", "1")
        scene.wait_for_start("long")
        at = boot()
        web1.terminate()
        assert web1.wait() == 0, web1.output
        assert 1 <= boot() - at < 1 + 2 * A_MOMENT
        [run] = scene.runs()
        assert (run.status, "runschedule was stopped" in run.error) == ("failed", True)
        assert scene.lock("long").owner is None
        assert scene.nothing_is_left_of("web1")


def test_a_second_signal_makes_it_short(store: Store, tmp_path: Path) -> None:
    on_sqlite(store)
    with scene_of(store, tmp_path, env={"SCENE_SECONDS": "60"}) as scene:
        scene.register()
        scene.make_due(["long"])
        web1 = serve(scene, "web1", "--grace", "100")
        scene.wait_for_start("long")
        at = boot()
        os.kill(web1.keeper_pid, signal.SIGINT)
        scene.wait_for(lambda: "waiting for long" in web1.output, "the first to be heeded")
        os.kill(web1.keeper_pid, signal.SIGINT)
        assert web1.wait() == 0, web1.output
        assert boot() - at < 3 * A_MOMENT
        assert scene.lock("long").owner is None


def test_sighup_ends_a_service_of_a_terminal_and_no_other(store: Store, tmp_path: Path) -> None:
    on_sqlite(store)
    with scene_of(store, tmp_path, env={"SCENE_OFTEN": "1"}) as scene:
        scene.register()
        web1 = serve(scene)
        os.kill(web1.keeper_pid, signal.SIGHUP)
        scene.wait_for(lambda: "SIGHUP changes nothing here" in web1.output, "a word of it")
        before = len(scene.journal.of("end", task="often"))
        scene.wait_for(lambda: len(scene.journal.of("end", task="often")) > before + 1, "it to go on")
        ours, theirs = pty.openpty()
        output = scene.output_of("web2")
        with output.open("ab") as file:
            started = subprocess.Popen(
                [sys.executable, "-m", "tests.fleet.start", "--forever"],
                env=scene.environ("web2"),
                cwd=ROOT,
                stdin=theirs,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        os.close(theirs)
        web2 = Started(scene, "web2", started, output)
        scene.add(web2)
        scene.wait_for(lambda: "service on web2: " in web2.output, "web2 to be up")
        os.kill(web2.keeper_pid, signal.SIGHUP)
        assert web2.wait() == 0, web2.output
        os.close(ours)
        web1.terminate()
        assert web1.wait() == 0, web1.output


# -- what people ask for ----------------------------------------------------------------------------------------------


def test_what_people_ask_for_is_seen_within_five_seconds_and_an_interrupt_ends_it_after_its_runs(
    store: Store, tmp_path: Path
) -> None:
    if store.name == "mariadb":
        pytest.skip("two stores show it")
    with scene_of(store, tmp_path, env={"SCENE_OFTEN": "1"}) as scene:
        scene.register()
        lock = lock_of(store)
        web1 = serve(scene)

        at = boot()
        assert lock.want("short") is not None
        assert scene.wait_for_start("short")["boot"] - at < SEEN_WITHIN + A_MOMENT

        scene.wait_for_start("often")
        lock.pause(None, reason="a test")
        at = boot()
        scene.wait_for(
            lambda: boot() - max(line["boot"] for line in scene.started("often")) > 1.7, "nothing more to start"
        )
        assert max(line["boot"] for line in scene.started("often")) - at < SEEN_WITHIN + A_MOMENT
        lock.resume(None, following=lambda row, after: None if row != "often" else after)
        at = boot()
        begun = len(scene.started("often"))
        scene.wait_for(lambda: len(scene.started("often")) > begun, "it to go on")
        assert boot() - at < SEEN_WITHIN + A_MOMENT

        scene.make_due(["long"])
        scene.wait_for_start("long")
        lock.interrupt()
        assert web1.wait() == 0, web1.output
        assert [run.status for run in scene.runs("long")] == ["succeeded"]
        assert {run.status for run in scene.runs() if run.status != "skipped"} == {"succeeded"}
        lock.close()


# -- the database -----------------------------------------------------------------------------------------------------


def test_a_database_that_is_killed_and_comes_back_costs_neither_the_service_nor_its_run(
    store: Store, tmp_path: Path
) -> None:
    on_postgresql(store)
    if store.server is None:
        pytest.skip("it was given by its URL: it cannot be killed")
    with scene_of(store, tmp_path, lease=15, heartbeat=1, env={"SCENE_SECONDS": "5", "SCENE_OFTEN": "1"}) as scene:
        scene.register()
        scene.make_due(["long"])
        web1 = serve(scene)
        scene.wait_for_start("long")
        connections[store.alias].close()
        store.server.crash()
        time.sleep(2)
        at = boot()
        store.server.restart()
        begun = len(scene.started("often"))
        scene.wait_for(lambda: len(scene.started("often")) > begun, "it to go on")
        assert boot() - at < SEEN_WITHIN + 2 * A_MOMENT, "the time that the database takes to be up is in it"
        scene.wait_for(lambda: scene.journal.of("end", task="long"), "the run to end")
        web1.terminate()
        assert web1.wait() == 0, web1.output
        [run] = scene.runs("long")
        assert run.status == "succeeded"
        assert scene.cleanups() == []
        troubles = re.findall(r"^(?:looking for|renewing).*: ", web1.output, re.MULTILINE)
        assert len(troubles) == 1, web1.output
        assert len(re.findall(r"^the lock 'default' answers again, after \d+ s$", web1.output, re.M)) == 1


def test_a_connection_that_the_database_ends_is_replaced_and_nothing_is_said(store: Store, tmp_path: Path) -> None:
    on_postgresql(store)
    with scene_of(store, tmp_path, env={"SCENE_OFTEN": "1"}) as scene:
        scene.register()
        web1 = serve(scene)
        with connections[store.alias].cursor() as cursor:
            for _ in range(3):
                begun = len(scene.started("often"))
                cursor.execute(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid() AND state = 'idle'"
                )
                assert cursor.fetchone()[0] >= 1
                scene.wait_for(lambda begun=begun: len(scene.started("often")) > begun + 1, "it to go on")
        web1.terminate()
        assert web1.wait() == 0, web1.output
        assert {run.status for run in scene.runs()} <= {"succeeded", "skipped"}
        assert not re.search("OperationalError|Traceback|answers again", web1.output), web1.output


# -- the service manager ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_a_service_manager_is_told_how_it_is_and_the_runs_know_nothing_of_it(
    store: Store, tmp_path: Path, kind: str
) -> None:
    on_sqlite(store)
    name = f"@schedule-{os.getpid()}" if kind == "abstract" else str(tmp_path / "notify")
    env = {"SCENE_SECONDS": "7"}
    with scene_of(store, tmp_path, env=env) as scene, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if kind == "abstract" else name)
        manager.settimeout(1)
        scene.register()
        scene.make_due(["environment", "long"])
        said: list[str] = []

        def hears(text: str, times: int = 1) -> bool:
            until = boot() + 20
            while sum(text in each for each in said) < times and boot() < until:
                with contextlib.suppress(TimeoutError):
                    said.append(manager.recv(4096).decode())
            return sum(text in each for each in said) >= times

        web1 = scene.server("web1", args=["--forever"], env={"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "2000000"})
        assert hears("READY=1")
        first = boot()
        assert hears("WATCHDOG=1", times=4)
        assert boot() - first < 4 * 2.0
        assert hears("STATUS=running long; next: ")
        web1.terminate()
        assert hears("STOPPING=1")
        assert hears("EXTEND_TIMEOUT_USEC=")
        assert hears("STATUS=ending; running long")
        assert web1.wait() == 0, web1.output
        [line] = scene.journal.of("environment")
        assert line["found"] == {}


# -- processes --------------------------------------------------------------------------------------------------------


def test_a_runner_that_is_killed_is_replaced_and_the_service_goes_on(store: Store, tmp_path: Path) -> None:
    on_sqlite(store)
    with scene_of(store, tmp_path, env={"SCENE_SECONDS": "30", "SCENE_OFTEN": "1"}) as scene:
        scene.register()
        scene.make_due(["long"])
        web1 = serve(scene)
        scene.wait_for_start("long")
        runner = web1.runner_pid()
        web1.kill("runner")
        scene.wait_for(lambda: [run for run in scene.runs("long") if run.status == "lost"], "the loss to be recorded")
        begun = len(scene.started("often"))
        scene.wait_for(lambda: len(scene.started("often")) > begun + 1, "it to go on")
        assert web1.runner_pid() != runner
        assert len(children(web1.keeper_pid)) == 1
        web1.terminate()
        assert web1.wait() == 0, web1.output


def accounted_for(scene: Scene) -> list[datetime]:
    """Return the due times of the task of every second that were started, and those that were recorded as missed."""
    missed = [
        utc(line["due_at"]) - timedelta(seconds=n)
        for line in scene.journal.of("skipped", task="often", reason="missed")
        for n in range(line["count"])
    ]
    return sorted(missed + [utc(line["due_at"]) for line in scene.started("often")])


def seconds_between(first: datetime, last: datetime) -> list[datetime]:
    return [first + timedelta(seconds=n) for n in range(int((last - first).total_seconds()) + 1)]


def test_two_services_share_what_is_due_every_second_and_run_none_of_it_twice(store: Store, tmp_path: Path) -> None:
    if store.name == "mariadb":
        pytest.skip("two stores show it")
    with scene_of(store, tmp_path, env={"SCENE_OFTEN": "1"}) as scene:
        scene.register()
        both = [serve(scene, name) for name in ("web1", "web2")]
        since = scene.now().replace(microsecond=0)
        scene.wait_for(lambda: scene.now() - since > timedelta(seconds=4), "four seconds of both")
        both[0].kill()
        survived = len(scene.started("often", server="web2"))
        scene.wait_for(lambda: len(scene.started("often", server="web2")) > survived, "web2 to go on")
        both[1].terminate()
        assert both[1].wait() == 0, both[1].output
        started = [utc(line["due_at"]) for line in scene.started("often")]
        assert len(started) == len(set(started))
        # What web1 had claimed and not begun when it was killed is in the history alone.
        ended = [run.due_at for run in scene.runs("often") if run.status in ("abandoned", "lost")]
        lost = [due_at for due_at in ended if due_at not in started]
        assert len(lost) <= 1
        accounted = [due_at for due_at in accounted_for(scene) + lost if since < due_at <= since + timedelta(seconds=4)]
        assert sorted(accounted) == seconds_between(since, since + timedelta(seconds=4))[1:]


def test_passes_with_tasks_of_every_second_hand_over_without_a_gap_or_a_double_and_end_at_an_interrupt(
    store: Store, tmp_path: Path
) -> None:
    on_sqlite(store)
    minute, much_longer = 4, 60
    with scene_of(store, tmp_path, env={"SCENE_OFTEN": "1"}) as scene:
        scene.register()
        passes = []
        for stays in (minute, minute, much_longer):
            passes.append(scene.server("web1", env={"SCENE_MINUTE": str(stays)}))
            time.sleep(minute)
        scene.wait_for(lambda: not passes[0].alive, "it stays until its successor has looked, and no longer", 10)
        scene.wait_for(lambda: not passes[1].alive, "the second to be over, too", 10)
        lock = lock_of(store)
        lock.interrupt()
        interrupted_at = boot()
        assert [one.wait() for one in passes] == [0, 0, 0], passes[-1].output
        assert boot() - interrupted_at < 2 * A_MOMENT, "an interrupt ends it early"
        lock.close()
        started = [utc(line["due_at"]) for line in scene.started("often")]
        # What was due before the first of them was up is not theirs.
        accounted = [due_at for due_at in accounted_for(scene) if due_at >= started[0]]
        assert accounted == seconds_between(started[0], started[-1])
        assert len(accounted) - len(started) <= 1, "a gap between two of them would be at least as long as a start"
        assert {line["keeper"] for line in scene.started("often")} == {one.keeper_pid for one in passes}
        assert {run.status for run in scene.runs()} <= {"succeeded", "skipped"}
