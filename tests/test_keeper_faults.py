"""What is left of a run when its keeper, its runner, all of its server or the database is killed or frozen: nothing."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.db import connections

from .fleet.harness import Process, is_alive, utc
from .fleet.journal import A_MOMENT, Line, boot
from .scenarios.scene import HEALTHY, Deaths, Scene, Wire
from .stores import Store

AT_ONCE = 2.0
"""Seconds for what the kernel does when a process dies: less than is left of a lease."""


@dataclass
class Victim:
    """A server, the task that only it (and the healthy one) runs, and the processes of its run."""

    name: str
    process: Process
    start: Line
    child: int
    grandchild: int
    faulty_at: float = 0.0

    @property
    def due_at(self) -> str:
        due_at: str = self.start["due_at"]
        return due_at


@contextmanager
def victims(scene: Scene, *names: str) -> Iterator[dict[str, Victim]]:
    """Have each of these servers run its task."""
    scene.register()
    scene.make_due(names, scene.now().replace(second=0, microsecond=0) - timedelta(minutes=1))
    processes = {name: scene.server(name) for name in names}
    found = {}
    for name, process in processes.items():
        line = scene.wait_for(lambda name=name: scene.journal.of("grandchild", task=name), f"the family of {name}")[0]
        start = scene.started(name)[0]
        assert (start["server"], start["keeper"]) == (name, process.keeper_pid)
        assert process.runner_pid() == start["runner"]
        found[name] = Victim(name, process, start, start["pid"], line["child"])
    yield found


def scene_of(store: Store, tmp_path: Path, *names: str, **more: Any) -> Scene:
    env = {"SCENE_VICTIMS": ",".join(names), **more.pop("env", {})}
    return Scene(store, tmp_path, "family", env=env, **more)


def next_due_time_ran(scene: Scene, victim: Victim) -> bool:
    return any(line["due_at"] > victim.due_at for line in scene.journal.of("end", task=victim.name))


def assert_it_ran_once(scene: Scene, victim: Victim) -> None:
    assert len(scene.started(victim.name, due_at=victim.due_at)) == 1
    assert len([run for run in scene.runs(victim.name) if run.due_at == utc(victim.due_at)]) == 1


def assert_it_was_cleaned_up_once(scene: Scene, victim: Victim) -> None:
    [row] = scene.cleanups(victim.name)
    assert (row.server, row.reason) == (victim.name, "lease_expired")
    assert row.cleaned_by != victim.name
    assert row.due_at == utc(victim.due_at)
    assert row.fence == victim.start["fence"]
    [signal] = scene.wait_for(lambda: scene.journal.of("cleanup", task=victim.name), "the signal of the clean-up")
    assert (signal["owner"], signal["reason"], signal["server"]) == (row.owner, "lease_expired", row.cleaned_by)
    assert row.expired_at is not None
    assert timedelta(0) <= row.cleaned_at - row.expired_at < timedelta(seconds=A_MOMENT + scene.coarse)
    [run] = [run for run in scene.runs(victim.name) if run.due_at == utc(victim.due_at)]
    assert run.status in ("abandoned", "lost")


def assert_it_was_recorded_as_lost_by_its_own_server(scene: Scene, victim: Victim) -> None:
    """Its keeper is well and has freed the lock itself, at once: a clean-up that leaves its trace, and a failure."""
    [row] = scene.cleanups(victim.name)
    assert (row.reason, row.server, row.cleaned_by) == ("runner_lost", victim.name, victim.name)
    scene.wait_for(lambda: scene.journal.of("cleanup", task=victim.name), "the signal of the clean-up")
    [run] = [run for run in scene.runs(victim.name) if run.due_at == utc(victim.due_at)]
    assert (run.status, run.server) == ("lost", victim.name)
    [told] = scene.wait_for(lambda: scene.journal.of("failed", task=victim.name), "the signal of the loss")
    assert (told["status"], told["server"], told["due_at"]) == ("lost", victim.name, victim.due_at)
    dead, silent = "it ended, or was killed", "it had not answered"
    said: str | tuple[str, ...] = silent if victim.name == STOPPED_RUNNER else dead
    if victim.name == STOPPED_RUNNER and "StoreTimeout" in victim.process.output:
        said = (silent, dead)  # Its keeper waited for the store until the kernel had ended it.
    assert run.error.startswith(said)
    assert "its runner was lost" in victim.process.output


def end_of_lease(scene: Scene, victim: Victim) -> float:
    [row] = scene.cleanups(victim.name)
    assert row.expired_at is not None
    return scene.boot_of(row.expired_at)


KILLED_KEEPER, KILLED_RUNNER = "killed-keeper", "killed-runner"
STOPPED_KEEPER, STOPPED_RUNNER, STOPPED_BOTH, STOPPED_ALL = (
    "stopped-keeper",
    "stopped-runner",
    "stopped-both",
    "stopped-all",
)


def stop(process: Process, which: str) -> None:
    """Freeze it; on SQLite not in the middle of a write, which would hold up everybody for as long."""
    process.stop(which)
    while not can_be_written(process.fleet.store):
        process.cont(which)
        time.sleep(0.05)
        process.stop(which)


def can_be_written(store: Store) -> bool:
    if store.vendor != "sqlite":
        return True
    file = sqlite3.connect(connections[store.alias].settings_dict["NAME"], isolation_level=None, timeout=1)
    try:
        file.execute("BEGIN EXCLUSIVE")
        file.execute("ROLLBACK")
    except sqlite3.OperationalError:
        return False
    finally:
        file.close()
    return True


FAULTS: dict[str, tuple[Callable[[Process, str], None], str]] = {
    KILLED_KEEPER: (Process.kill, "keeper"),
    KILLED_RUNNER: (Process.kill, "runner"),
    STOPPED_KEEPER: (stop, "keeper"),
    STOPPED_RUNNER: (stop, "runner"),
    STOPPED_BOTH: (stop, "both"),
    STOPPED_ALL: (stop, "all"),
}


def test_whatever_is_killed_or_frozen_the_run_ends_before_its_lease_and_the_task_goes_on_elsewhere(
    store: Store, tmp_path: Path
) -> None:
    """
    Six servers, each with a run that has a ``sleep`` beside it, and a fault of its own; a seventh is well.
    """
    with scene_of(store, tmp_path, *FAULTS) as scene:
        assert_that_each_fault_ends_its_run_in_time(scene)


def assert_that_each_fault_ends_its_run_in_time(scene: Scene) -> None:
    faults = FAULTS
    with victims(scene, *faults) as hit, Deaths() as deaths:
        for victim in hit.values():
            deaths.watch(victim.child, victim.grandchild, victim.start["runner"])
        healthy = scene.server(HEALTHY)
        scene.wait_for(lambda: healthy.runner_pid(), "the healthy server to be up")
        for name, (do, which) in faults.items():
            hit[name].faulty_at = boot()
            do(hit[name].process, which)
        scene.wait_for(lambda: all(next_due_time_ran(scene, victim) for victim in hit.values()), "the next due times")

        # What was ended, and when.
        at = deaths.at
        for name in (KILLED_KEEPER, KILLED_RUNNER):
            for pid in (hit[name].child, hit[name].grandchild):
                assert at[pid] - hit[name].faulty_at < AT_ONCE, name
        stopped = hit[STOPPED_RUNNER]
        for pid in (stopped.child, stopped.grandchild, stopped.start["runner"]):
            # A heartbeat's patience with the runner, which is asked once in a heartbeat.
            assert at[pid] - stopped.faulty_at < 2 * scene.heartbeat + AT_ONCE
        assert at[hit[STOPPED_KEEPER].child] < end_of_lease(scene, hit[STOPPED_KEEPER])
        assert at[hit[STOPPED_KEEPER].grandchild] < end_of_lease(scene, hit[STOPPED_KEEPER])
        for name in (STOPPED_BOTH, STOPPED_ALL):
            assert at[hit[name].child] < end_of_lease(scene, hit[name]), name
            assert at[hit[name].start["runner"]] < end_of_lease(scene, hit[name]), name

        # What was written, and told.
        for victim in hit.values():
            assert_it_ran_once(scene, victim)
        for name in (KILLED_KEEPER, STOPPED_KEEPER, STOPPED_BOTH, STOPPED_ALL):
            assert_it_was_cleaned_up_once(scene, hit[name])
        for name in (KILLED_RUNNER, STOPPED_RUNNER):
            assert_it_was_recorded_as_lost_by_its_own_server(scene, hit[name])

        # What was stopped goes on too late: nothing of the run does, and the server says that something went wrong.
        for name in (STOPPED_KEEPER, STOPPED_BOTH, STOPPED_ALL):
            hit[name].faulty_at = boot()
            hit[name].process.cont("all")
        for name in (STOPPED_BOTH, STOPPED_ALL):
            scene.wait_for(lambda name=name: deaths.are_gone(hit[name].grandchild), f"the grandchild of {name} to go")
            assert at[hit[name].grandchild] - hit[name].faulty_at < AT_ONCE, name
        for name in faults:
            assert hit[name].process.wait() == (-9 if name == KILLED_KEEPER else 1), hit[name].process.output
        assert healthy.wait() == 0, healthy.output
        assert scene.nothing_is_left_of(*faults)
        for victim in hit.values():
            assert_it_ran_once(scene, victim)
            assert len(scene.cleanups(victim.name)) == len(scene.journal.of("cleanup", task=victim.name)) == 1
            assert not [
                line
                for line in scene.journal.of("tick", task=victim.name, fence=victim.start["fence"])
                if line["boot"] > at[victim.child]
            ]
            assert not is_alive(victim.child)


# -- the database -----------------------------------------------------------------------------------------------------


@contextmanager
def frozen(store: Store) -> Iterator[None]:
    """Have the database answer nobody: its server stopped where it is, or SQLite's file locked by somebody."""
    if store.vendor == "sqlite":
        somebody = sqlite3.connect(connections[store.alias].settings_dict["NAME"], isolation_level=None, timeout=5)
        somebody.execute("BEGIN EXCLUSIVE")
        try:
            yield
        finally:
            somebody.execute("ROLLBACK")
            somebody.close()
        return
    if store.server is None:
        pytest.skip(f"{store.name} was given by its URL: it cannot be frozen")
    store.server.freeze()
    try:
        yield
    finally:
        store.server.thaw()


def test_a_database_that_is_frozen_for_two_leases_ends_the_run_in_time_and_goes_on_when_it_is_back(
    store: Store, tmp_path: Path
) -> None:
    with scene_of(store, tmp_path, "web1") as scene:
        assert_that_a_frozen_store_ends_the_run_in_time(scene, lambda: frozen(store))


def assert_that_a_frozen_store_ends_the_run_in_time(
    scene: Scene, freeze: Callable[[], AbstractContextManager[None]]
) -> None:
    with victims(scene, "web1") as hit, Deaths() as deaths:
        web1 = hit["web1"]
        deaths.watch(web1.child, web1.grandchild)
        connections[scene.store.alias].close()
        with freeze():
            frozen_at = boot()
            scene.wait_for(lambda: deaths.are_gone(web1.child, web1.grandchild), "the run to be ended")
            time.sleep(max(0.0, frozen_at + 2 * scene.lease - boot()))
        thawed_at = boot()
        # Whatever was renewed was renewed before.
        for pid in (web1.child, web1.grandchild):
            assert deaths.at[pid] < frozen_at + scene.lease
        healthy = scene.server(HEALTHY)
        scene.wait_for(lambda: next_due_time_ran(scene, web1), "the next due time")
        first = min(line["boot"] for line in scene.started("web1") if line["due_at"] > web1.due_at)
        # A renewal that was under way is answered when the server is back, and holds for a lease.
        assert first - thawed_at < scene.lease + 2 * A_MOMENT
        assert web1.process.wait() == 1
        assert healthy.wait() == 0, healthy.output
        assert_it_ran_once(scene, web1)
        [run] = [run for run in scene.runs("web1") if run.due_at == utc(web1.due_at)]
        assert run.status in ("abandoned", "lost")
        # Stale or not, when the first who could looked at it: recorded once, and told once.
        assert len(scene.cleanups("web1")) + len(scene.journal.of("failed", status="lost")) >= 1
        assert len(scene.cleanups("web1")) == len(scene.journal.of("cleanup")) <= 1
        assert len(scene.journal.of("failed")) <= 1
        troubles = re.findall("^(looking for|renewing|recording).*: ", web1.process.output, re.MULTILINE)
        assert 1 <= len(troubles) <= 4, "it is said once for each kind of trouble, not at every attempt"


@contextmanager
def renewed_a_moment_ago(scene: Scene, task: str) -> Iterator[None]:
    before = scene.lock(task).renewed_at
    scene.wait_for(lambda: scene.lock(task).renewed_at != before, "a renewal")
    yield


def assert_the_run_survived(scene: Scene, web1: Victim) -> None:
    assert web1.process.wait() in (0, 1)
    assert_it_ran_once(scene, web1)
    [run] = [run for run in scene.runs("web1") if run.due_at == utc(web1.due_at)]
    assert run.status == "succeeded"
    assert scene.cleanups() == []
    assert scene.journal.of("end", task="web1", fence=web1.start["fence"])
    assert not is_alive(web1.grandchild), "what a run leaves in its group is ended with it"


@pytest.mark.parametrize("of", ["wire", "backend"])
def test_a_keeper_whose_own_connection_is_frozen_opens_another_and_its_run_survives(
    store: Store, tmp_path: Path, of: str
) -> None:
    if store.vendor == "sqlite" or (of == "backend" and store.vendor != "postgresql"):
        pytest.skip("there is no such thing")
    # Two leases and a half after the freeze.
    with Wire(store.url) as wire, scene_of(store, tmp_path, "web1", env={"SCENE_SECONDS": "9"}) as scene:
        scene.env["DATABASE_URL"] = wire.url
        with victims(scene, "web1") as hit:
            rival = scene.server(HEALTHY, env={"DATABASE_URL": store.url})
            with renewed_a_moment_ago(scene, "web1"):
                backends = wire.backends(store) if of == "backend" else []
                if of == "wire":
                    assert wire.freeze() == 1
                elif store.server is not None:
                    assert len(backends) == 1
                    store.server.freeze(*backends)
            try:
                assert_the_run_survived(scene, hit["web1"])
            finally:
                if store.server is not None and backends:
                    store.server.thaw(*backends)
            assert rival.wait() == 0, rival.output
