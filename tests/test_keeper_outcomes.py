"""Whatever a task does is recorded as what it is, the others run, and whoever should hear of it does."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from django.contrib.auth.models import Group

from .fleet.journal import A_MOMENT, boot
from .scenarios.scene import Deaths, Scene
from .stores import Store

RUNS_GRACE = 5.0
"""Seconds that a run is given to end after SIGTERM, before SIGKILL."""
WELL = ("well", "well-too", "exits-0", "prints")


def test_each_mishap_is_recorded_as_what_it_is_and_the_others_run(store: Store, tmp_path: Path) -> None:
    """One console line for each run, exit status 1, and an ERROR line that is not hidden in the run's own output."""
    with Scene(store, tmp_path, "mishaps", env={"SCENE_LOG": "errors"}) as scene:
        scene.register()
        scene.make_due()
        web1 = scene.server("web1")
        assert web1.wait() == 1, web1.output
        runs = {run.task: run for run in scene.runs()}
        assert len(runs) == len(scene.runs()) == 9
        assert {task: run.status for task, run in runs.items()} == {
            task: "succeeded" if task in WELL else "failed" for task in runs
        }
        assert "ValueError: no such rate" in runs["fails"].error
        assert "in fails" in runs["fails"].error
        assert runs["fails"].output == "printed before\n"
        assert "sys.exit(3)" in runs["exits-3"].error
        assert runs["dies"].error == "killed by SIGSEGV"
        assert "without a result" in runs["leaves"].error
        assert "a transaction was left open on 'default'" in runs["open"].error
        assert not Group.objects.using(store.alias).filter(name="uncommitted").exists()
        assert runs["prints"].output.endswith("the end\n")
        assert 60_000 < len(runs["prints"].output) <= 64 * 1024
        assert all(lock.owner is None for lock in scene.locks())
        assert scene.cleanups() == []

        console = re.findall(r"^[-0-9]+ [:0-9]+Z ([-\w]+) (\w+)(?: \(.*\))? in [\d.]+ s on web1$", web1.output, re.M)
        assert sorted(console) == sorted((task, run.status) for task, run in runs.items())
        for task in set(runs) - set(WELL):
            assert len(re.findall(rf"^failed.* task={task} due=", web1.output, re.M)) == 1, task
            assert len(scene.journal.of("failed", task=task, status="failed")) == 1, task
        # With its traceback, on the process's own standard error.
        logged = web1.output[web1.output.index("failed task=fails") :]
        assert logged.splitlines()[1] == "Traceback (most recent call last):"
        assert "ValueError: no such rate" in logged
        assert "printed before" not in web1.output


def test_a_pass_in_which_all_is_well_has_status_0_and_one_with_nothing_due_says_nothing(
    store: Store, tmp_path: Path
) -> None:
    if store.vendor != "sqlite":
        pytest.skip("no matter of the store")
    with Scene(store, tmp_path, "mishaps", env={"SCENE_LOG": "errors"}) as scene:
        scene.register()
        idle = scene.server("web1")
        assert (idle.wait(), idle.output) == (0, "")
        scene.make_due(["well"])
        assert (done := scene.server("web1")).wait() == 0
        assert re.fullmatch(r"[-0-9]+ [:0-9]+Z well succeeded in [\d.]+ s on web1\n", done.output)
        scene.forget()
        scene.make_due(["well-too"])
        silent = scene.server("web1", args=["-v", "0"])
        assert (silent.wait(), silent.output) == (0, "")
        assert [run.status for run in scene.runs("well-too")] == ["succeeded"]


@pytest.mark.parametrize("mode", ["fork", "spawn"])
def test_the_error_line_of_a_failure_is_on_the_real_standard_error_and_sentry_has_it_once(
    store: Store, tmp_path: Path, mode: str
) -> None:
    if store.vendor != "sqlite":
        pytest.skip("no matter of the store")
    pytest.importorskip("sentry_sdk")
    events = tmp_path / "sentry.jsonl"
    env = {"SCENE_LOG": "errors", "SCENE_SENTRY": str(events)}
    with Scene(store, tmp_path, "mishaps", env=env, settings={"RUNNER": mode}) as scene:
        scene.register()
        scene.make_due(["fails", "well", "exits-0"])
        web1 = scene.server("web1")
        assert web1.wait() == 1, web1.output
        assert len(re.findall(r"^ValueError: no such rate$", web1.output, re.M)) == 1, web1.output
        assert re.search(r"^failed task=fails .*\nTraceback", web1.output, re.M)
        [run] = scene.runs("fails")
        assert run.output == "printed before\n"
        [line] = [json.loads(text) for text in events.read_text().splitlines()]
        [exception] = line["event"]["exception"]["values"]
        assert (exception["type"], exception["value"]) == ("ValueError", "no such rate")
        assert line["pid"] not in (web1.keeper_pid, os.getpid())


# -- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_a_pass_that_is_stopped_ends_and_records_its_runs_and_leaves_nothing(
    store: Store, tmp_path: Path, number: signal.Signals
) -> None:
    env = {"SCENE_TASKS": "2", "SCENE_SECONDS": "60"}
    # A lease that would not be over by itself.
    with Scene(store, tmp_path, "plain", lease=30, heartbeat=10, env=env) as scene:
        scene.register()
        scene.make_due()
        web1 = scene.server("web1")
        scene.wait_for(lambda: len(scene.journal.of("grandchild")) == 2, "both runs")
        stopped_at = boot()
        os.kill(web1.keeper_pid, number)
        assert web1.wait() == 1, web1.output
        assert boot() - stopped_at < 2 * A_MOMENT, "and not after its 60 seconds"
        assert all(lock.owner is None for lock in scene.locks())
        assert [(run.status, "runschedule was stopped" in run.error) for run in scene.runs()] == [("failed", True)] * 2
        assert scene.cleanups() == []
        assert scene.nothing_is_left_of("web1")
        assert "Traceback" not in web1.output
        assert len(scene.journal.of("failed", status="failed")) == 2


def test_a_second_ctrl_c_does_not_wait_for_what_ignores_the_first(store: Store, tmp_path: Path) -> None:
    if store.vendor != "sqlite":
        pytest.skip("no matter of the store")
    env = {"SCENE_TASKS": "1", "SCENE_STUBBORN": "0", "SCENE_SECONDS": "60"}
    with Scene(store, tmp_path, "plain", lease=30, heartbeat=10, env=env) as scene, Deaths() as deaths:
        scene.register()
        scene.make_due()
        web1 = scene.server("web1")
        start = scene.wait_for_start("task0")
        beside = scene.journal.of("grandchild")[0]["child"]
        deaths.watch(start["pid"], beside)
        first_at = boot()
        os.kill(web1.keeper_pid, signal.SIGINT)
        scene.wait_for(lambda: boot() - first_at > 1, "the first to have been heeded")
        assert web1.alive, "it is given its grace"
        os.kill(web1.keeper_pid, signal.SIGINT)
        assert web1.wait() == 1, web1.output
        scene.wait_for(lambda: deaths.are_gone(start["pid"], beside), "the run to be gone")
        assert max(deaths.at.values()) - first_at < RUNS_GRACE
        assert scene.nothing_is_left_of("web1")
        assert [(run.status, lock.owner) for run, lock in zip(scene.runs(), scene.locks(), strict=True)] == [
            ("failed", None)
        ]


# -- no database ------------------------------------------------------------------------------------------------------


def test_a_database_that_is_away_at_the_start_is_an_error_and_status_1(store: Store, tmp_path: Path) -> None:
    away = {
        "sqlite": f"sqlite:///{tmp_path}/no/such/folder/db.sqlite3",
        "postgresql": "postgresql://nobody:secret@127.0.0.1:1/nothing",
        "mariadb": "mysql://nobody:secret@127.0.0.1:1/nothing",
    }
    with Scene(store, tmp_path, "plain", env={"SCENE_TASKS": "1", "SCENE_SECONDS": "1"}) as scene:
        web1 = scene.server("web1", env={"DATABASE_URL": away[store.name]})
        assert web1.wait() == 1
        assert len(re.findall("^looking for what is due: .*OperationalError", web1.output, re.M)) == 1, web1.output
        # The driver's and Django's, which is raised from it.
        assert web1.output.count("Traceback") <= 2, web1.output
        assert "secret" not in web1.output
        assert scene.nothing_is_left_of("web1")
