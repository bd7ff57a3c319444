"""RUN: what is recorded of a run, however it ends; in a fork, and in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from pytest_django import DjangoDbBlocker

from multiserver_schedule.entries import Outcome
from multiserver_schedule.run.base import Ended

from . import run_support
from .run_support import Drive, is_running, running

EVERYWHERE = (
    "hello",
    "path",
    "itself",
    "fails",
    "os-exit-0",
    "segfault",
    "much",
    "unwanted",
    "exec",
    "exec-missing",
    "exec-wanted",
    "open",
)
FORK_ALONE = (
    "async",
    "command",
    "command-fails",
    "exit-0",
    "exit-none",
    "exit-3",
    "exit-text",
    "os-exit-4",
    "closed",
    "grandchild",
    "by-hand",
    "thread",
    "wanted",
    "skipped",
    "filter-fails",
    "exec-3",
    "exec-killed",
    "exec-directory",
    "exec-unwanted",
    "exec-filter-exits",
)


@dataclass
class Results:
    """What came of running all those tasks side by side in one runner."""

    mode: str
    place: Path
    ended: Mapping[str, Ended]

    def __getitem__(self, name: str) -> Outcome:
        if name not in self.ended:
            pytest.skip("one mode is enough")
        return self.ended[name].outcome


@pytest.fixture(scope="module", params=["fork", "spawn"])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, django_db_blocker: DjangoDbBlocker
) -> Iterator[Results]:
    names = EVERYWHERE + (FORK_ALONE if request.param == "fork" else ())
    # The processes of the runs use a database in memory, each its own; this one opens no connection.
    with pytest.MonkeyPatch.context() as patch, django_db_blocker.unblock():
        patch.setenv(run_support.PLACE, str(tmp_path_factory.mktemp("place")))
        for sent, receiver in run_support.RECEIVERS:
            sent.connect(receiver)
        try:
            with running(request.param, heartbeat=10.0) as runner:
                drive = Drive(runner)
                owners = {name: drive.run(name, lease=60.0) for name in names}
                drive.go(lambda: len(drive.ended) == len(names), within=90)
            yield Results(request.param, run_support.place(), {n: drive.ended[owner] for n, owner in owners.items()})
        finally:
            for sent, receiver in run_support.RECEIVERS:
                sent.disconnect(receiver)


@pytest.mark.parametrize("name", ["hello", "path", "async", "command", "exit-0", "exit-none", "wanted", "exec-wanted"])
def test_what_returns_or_exits_with_nothing_has_succeeded(results: Results, name: str) -> None:
    assert (results[name].status, results[name].error) == ("succeeded", "")
    assert results[name].started
    assert 0 < results[name].seconds < 90


def test_the_output_holds_both_streams_and_is_no_part_of_the_error(results: Results) -> None:
    assert results["hello"].output == "hello web1\nand an error\n"


def test_a_task_knows_which_run_it_is(results: Results) -> None:
    known = json.loads(results["itself"].output)
    assert known["name"] == "itself"
    assert known["fence"] == 7
    assert known["attempt"] == 1
    assert known["server"] == "web1"
    assert known["key"].startswith("itself/")
    assert known["threads"], "a thread of the task sees the same run"
    assert known["environ"]["MULTISERVER_SCHEDULE_KEY"] == known["key"]
    assert known["environ"]["MULTISERVER_SCHEDULE_DUE_AT"] == known["due_at"]
    assert not {"MULTISERVER_SCHEDULE_CHANNEL", "MULTISERVER_SCHEDULE_LIFELINE"} & set(known["environ"])


def test_a_run_has_a_group_of_its_own_and_no_input(results: Results) -> None:
    known = json.loads(results["itself"].output)
    assert known["group"]
    assert known["stdin"] == ""


def test_a_failure_is_recorded_with_its_traceback_in_characters_that_a_database_stores(results: Results) -> None:
    outcome = results["fails"]
    assert outcome.status == "failed"
    assert "in fails" in outcome.error
    assert "ValueError: no such rate: ?" in outcome.error
    assert "\0" not in outcome.error
    outcome.error.encode()


def test_a_command_that_fails_has_failed(results: Results) -> None:
    assert results["command-fails"].status == "failed"
    assert "CommandError: No installed app with label 'no_such_app'." in results["command-fails"].error


@pytest.mark.parametrize(("name", "error"), [("exit-3", "sys.exit(3)"), ("exit-text", "sys.exit('that was wrong')")])
def test_sys_exit_with_something_is_a_failure(results: Results, name: str, error: str) -> None:
    assert (results[name].status, results[name].error) == ("failed", error)


@pytest.mark.parametrize(("name", "error"), [("os-exit-0", "exit status 0"), ("os-exit-4", "exit status 4")])
def test_a_process_that_leaves_without_a_result_has_failed_whatever_its_status(
    results: Results, name: str, error: str
) -> None:
    assert results[name].status == "failed"
    assert results[name].error.startswith(f"{error}: the process ended without a result")
    assert results[name].output == "before\n"
    assert not results.ended[name].told


def test_a_process_that_dies_of_a_signal_has_failed(results: Results) -> None:
    assert (results["segfault"].status, results["segfault"].error) == ("failed", "killed by SIGSEGV")


def test_of_much_output_the_end_is_kept_and_no_character_is_cut(results: Results) -> None:
    outcome = results["much"]
    assert outcome.status == "succeeded"
    assert len(outcome.output.encode()) in range(64 * 1024 - 1, 64 * 1024 + 1)
    assert outcome.output[0] == "é"
    assert outcome.output.splitlines()[-1].startswith("   10239 é")
    assert "\N{REPLACEMENT CHARACTER}" not in outcome.output


def test_a_task_that_closes_every_descriptor_harms_only_itself(results: Results) -> None:
    outcome = results["closed"]
    assert outcome.status == "failed"
    assert "without a result" in outcome.error
    assert (results.place / "innocent").read_text() == ""


def test_what_a_run_leaves_in_its_group_is_ended_with_it(results: Results) -> None:
    assert results["grandchild"].status == "succeeded"
    if results.mode == "fork":
        assert not is_running(int((results.place / "grandchild").read_text()))
        assert results["grandchild"].seconds < 40, "it was ended, not waited for"


@pytest.mark.parametrize("name", ["open", "by-hand"])
def test_a_transaction_that_is_left_open_is_a_failure_that_says_so(results: Results, name: str) -> None:
    assert results[name].status == "failed"
    assert results[name].error.startswith("a transaction was left open on 'default' when the task returned")


def test_a_run_lasts_until_its_threads_are_done(results: Results) -> None:
    assert results["thread"].output == "the thread is done\n"
    assert results["thread"].seconds >= 0.3


@pytest.mark.parametrize("name", ["unwanted", "skipped", "exec-unwanted"])
def test_a_filter_that_says_no_is_a_skip_and_nothing_has_started(results: Results, name: str) -> None:
    outcome = results[name]
    assert (outcome.status, outcome.reason, outcome.started) == ("skipped", "filtered", False)
    assert outcome.output == ""
    assert not results.ended[name].told


def test_a_filter_that_raises_fails_that_run(results: Results) -> None:
    outcome = results["filter-fails"]
    assert outcome.status == "failed"
    assert "LookupError: the filter's own trouble" in outcome.error


def test_a_program_is_told_of_its_run_and_has_no_input(results: Results) -> None:
    key, fence = results["exec"].output.split()
    assert key.startswith("exec/")
    assert fence == "7"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("exec-3", "exit status 3"),
        ("exec-killed", "killed by SIGSEGV"),
        ("exec-missing", "program not found: no-such-program"),
        ("exec-directory", "/ could not be started: [Errno 13] Permission denied"),
    ],
)
def test_a_program_fails_by_its_status_by_a_signal_or_by_not_being_there(
    results: Results, name: str, error: str
) -> None:
    assert (results[name].status, results[name].error) == ("failed", error)


def test_a_filter_that_leaves_the_process_is_not_a_program_that_succeeded(results: Results) -> None:
    assert results["exec-filter-exits"].status == "failed"
    assert "went on" not in results["exec-filter-exits"].output


def test_the_runs_own_process_tells_of_its_start_and_end_and_says_that_it_has(results: Results) -> None:
    heard = (results.place / "heard").read_text().splitlines()
    for line in ("started hello  NoneType", "succeeded hello  NoneType", "failed fails failed ValueError"):
        assert heard.count(line) == 1, line
    assert results.ended["hello"].told
    assert results.ended["fails"].told
    assert not [line for line in heard if "unwanted" in line]


def test_of_a_program_somebody_else_has_to_tell(results: Results) -> None:
    assert not results.ended["exec"].told
    heard = (results.place / "heard").read_text().splitlines()
    assert [line for line in heard if line.split()[1] == "exec"] == []
    # The process that asked its filters is there to say that it starts; of its end it cannot tell.
    assert [line.split()[0] for line in heard if line.split()[1] == "exec-wanted"] == ["started"]


def test_a_task_that_the_process_does_not_declare_fails_saying_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(run_support.PLACE, str(tmp_path))
    with running(tasks={}) as runner:
        drive = Drive(runner)
        outcome = drive.outcome(drive.run("hello"))
    assert outcome.status == "failed"
    assert outcome.error.startswith("'hello' is not declared in the process of the run")


def test_ten_megabytes_of_output_neither_hold_a_run_up_nor_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(run_support.PLACE, str(tmp_path))
    with running() as runner:
        drive = Drive(runner)
        outcome = drive.outcome(drive.run("much"))
    assert outcome.status == "succeeded"
    assert 60_000 < len(outcome.output.encode()) <= 65_536
