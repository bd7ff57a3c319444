"""RUN: processes that are killed, stopped or stuck; whatever it is, the run is gone before its lease is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from multiserver_schedule import faults
from multiserver_schedule.run import kernel
from multiserver_schedule.run.base import Margins, boot_time
from multiserver_schedule.run.handle import ProcessRunner
from multiserver_schedule.run.runner import Serve

from . import run_support
from .fleet.journal import A_MOMENT
from .run_support import HEARTBEAT, LEASE, Drive, Keeper, claim, is_running, notes, running, wait_for

pytestmark = pytest.mark.skipif(not kernel.LINUX, reason="tells what Linux does")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(run_support.PLACE, str(tmp_path))
    return tmp_path


@pytest.fixture(params=["fork", "spawn"])
def keeper(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Keeper]]:
    started: list[Keeper] = []

    def start(name: str) -> Keeper:
        started.append(Keeper(name, mode=request.param))
        return started[-1]

    yield start
    for one in started:
        one.close()


def last_tick() -> float:
    """Return when the task was last seen to do something."""
    return float(notes("ticks")[-1])


def is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def gone(*pids: int) -> Callable[[], bool]:
    return lambda: not any(is_running(pid) for pid in pids)


# --- the keeper


def test_a_keeper_that_is_killed_leaves_no_run_behind(keeper: Callable[[str], Keeper]) -> None:
    it = keeper("ignores-term")
    grandchild = it.grandchild()
    os.kill(it.pid, signal.SIGKILL)
    killed_at = boot_time()
    at = wait_for(gone(it.child, grandchild, it.runner))
    assert at - killed_at < 1.0
    assert last_tick() < it.until


def test_a_keeper_that_is_stopped_has_its_run_ended_before_the_lease_is_over(keeper: Callable[[str], Keeper]) -> None:
    it = keeper("ignores-term")
    grandchild = it.grandchild()
    os.kill(it.pid, signal.SIGSTOP)
    it.wait(lambda: is_stopped(it.pid))
    it.read()
    at = wait_for(gone(it.child, grandchild))
    assert at < it.until
    assert it.until - at < Margins.of(LEASE).term + 0.1, "no earlier than it must"
    os.kill(it.pid, signal.SIGCONT)
    it.wait(lambda: it.ended or it.vanished)
    if it.ended:  # on a machine that is too busy the kernel's timer is first
        assert it.ended["status"] == "lost"


def test_a_stopped_run_is_ended_all_the_same(keeper: Callable[[str], Keeper]) -> None:
    it = keeper("ignores-term")
    grandchild = it.grandchild()
    os.kill(it.pid, signal.SIGSTOP)
    os.kill(it.child, signal.SIGSTOP)
    it.wait(lambda: is_stopped(it.pid))
    it.read()
    assert wait_for(gone(it.child, grandchild)) < it.until


# --- the runner


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP])
def test_a_runner_that_is_gone_or_silent_is_ended_with_its_runs(
    keeper: Callable[[str], Keeper], by: signal.Signals
) -> None:
    it = keeper("ignores-term")
    grandchild = it.grandchild()
    runner, child = it.runner, it.child
    os.kill(runner, by)
    hit_at = boot_time()
    it.wait(lambda: it.vanished)
    assert gone(runner, child, grandchild)(), "the keeper says so only when they are"
    assert it.vanished is not None
    assert it.vanished["owners"] == 1
    assert it.vanished["at"] - hit_at < (0.5 if by == signal.SIGKILL else 3 * HEARTBEAT)
    assert it.vanished["at"] < it.until, "the lease stands, so that it can be released"
    assert it.process.wait(10) == 0, "and the keeper goes on"


def test_keeper_and_runner_both_stopped_cannot_let_a_run_outlive_its_lease(keeper: Callable[[str], Keeper]) -> None:
    it = keeper("ignores-term")
    it.grandchild()
    os.kill(it.pid, signal.SIGSTOP)
    os.kill(it.runner, signal.SIGSTOP)
    it.wait(lambda: is_stopped(it.pid) and is_stopped(it.runner))
    it.read()
    assert wait_for(gone(it.child)) < it.until
    assert last_tick() < it.until


def test_a_runner_that_is_stopped_the_moment_it_has_forked_lets_no_run_outlive_its_lease(
    keeper: Callable[[str], Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the forks of a batch, too: seen in a drill, as runs at work long after their lease."""
    monkeypatch.setenv(faults.VARIABLE, "after_fork=stop")
    it = keeper("ignores-term")
    it.wait(lambda: it.runner and is_stopped(it.runner) and it.until)
    os.kill(it.pid, signal.SIGSTOP)
    it.wait(lambda: is_stopped(it.pid) and notes("ticks"))
    it.read()
    assert wait_for(gone(it.runner)) < it.until
    wait_for(lambda: boot_time() > it.until + 0.3)
    assert last_tick() < it.until


def test_all_stopped_for_longer_than_the_lease_never_resumes(keeper: Callable[[str], Keeper]) -> None:
    it = keeper("ignores-term")
    grandchild = it.grandchild()
    frozen = (it.pid, it.runner, it.child, grandchild)
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    it.wait(lambda: all(is_stopped(pid) for pid in frozen[:1]))
    it.read()
    ticks = len(notes("ticks"))
    wait_for(lambda: boot_time() > it.until + 0.2)
    for pid in frozen:
        kernel.kill(pid, signal.SIGCONT)
    woken_at = boot_time()
    it.wait(lambda: it.vanished or it.ended)
    assert wait_for(gone(it.child, grandchild)) - woken_at < 0.5
    assert len(notes("ticks")) - ticks <= 2


def test_a_runner_is_not_blamed_for_the_keepers_own_absence() -> None:
    with running(heartbeat=0.3) as runner:
        drive = Drive(runner)
        owner = drive.run("ticks", lease=20.0)
        drive.go(lambda: notes("child"))
        assert runner.pid is not None
        runner.check()
        os.kill(runner.pid, signal.SIGSTOP)
        time.sleep(0.5)  # the machine was frozen, and both with it
        os.kill(runner.pid, signal.SIGCONT)
        before = boot_time()
        while boot_time() < before + 0.6:
            drive.turn()
        assert not drive.vanished
        runner.end(owner, "stopping")
        drive.outcome(owner)


def test_after_a_lost_runner_another_one_is_started_and_the_reports_go_to_it() -> None:
    with running() as runner:
        drive = Drive(runner)
        drive.run("ticks")
        drive.go(lambda: notes("child"))
        first = runner.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        runner.report({"kind": "late"})
        drive.go(lambda: drive.vanished)
        assert drive.vanished[0].why == "it ended, or was killed"
        owner = drive.run("hello")
        drive.go(lambda: len(drive.vanished) == 2)
        assert drive.vanished[1].owners == (owner,), "without a runner nothing can be run, and that is said"
        drive.renews = False
        runner.start()
        assert runner.pid != first
        assert drive.outcome(drive.run("hello")).status == "succeeded"
        drive.go(lambda: notes("delivered") == ["late"])


def test_processes_that_are_not_the_runners_are_left_alone() -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        with running() as runner:
            drive = Drive(runner)
            drive.run("ticks")
            drive.go(lambda: notes("grandchild"))
            assert runner.pid is not None
            os.kill(runner.pid, signal.SIGKILL)
            drive.go(lambda: drive.vanished)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_who_has_got_the_pid_of_a_dead_process_is_not_killed_for_it() -> None:
    """Of a program that left its run's group, and was gone between TERM and KILL."""
    other, its = subprocess.Popen(["sleep", "60"]), subprocess.Popen(["sleep", "60"])
    leader = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        seen = [kernel.process(process.pid) for process in (other, its)]
        assert seen[0] is not None and seen[1] is not None
        strays = {other.pid: seen[0].began - 1, its.pid: seen[1].began}
        run: Any = SimpleNamespace(pid=leader.pid, id="none", strays=strays)
        runner: Any = SimpleNamespace(pid=os.getpid())
        Serve._signal(runner, run, signal.SIGKILL)
        assert (its.wait(A_MOMENT), leader.wait(A_MOMENT)) == (-signal.SIGKILL, -signal.SIGKILL)
        assert run.strays == {its.pid: seen[1].began}
        assert other.poll() is None
    finally:
        for process in (other, its, leader):
            process.kill()
            process.wait()


# --- limits, and orders to end


@pytest.mark.parametrize("name", ["ticks", "ignores-term", "exec-sleeps"])
def test_a_run_over_its_limit_is_ended_with_its_group_and_only_then_reported(name: str) -> None:
    with running() as runner:
        drive = Drive(runner)
        owner = drive.run(name, limit=0.5)
        outcome = drive.outcome(owner)
        assert (outcome.status, outcome.error) == ("timed_out", "ended: not finished 0.5 s after it began, its limit")
        assert not drive.ended[owner].told
        assert 0.5 <= outcome.seconds < 0.5 + LEASE / 10 + A_MOMENT
        assert gone(drive.pids[owner], *map(int, notes("grandchild")))()
        with pytest.raises(ProcessLookupError):
            os.killpg(drive.pids[owner], 0)


def test_a_task_that_returns_when_it_is_told_to_end_has_timed_out_all_the_same() -> None:
    with running() as runner:
        drive = Drive(runner)
        owner = drive.run("returns-at-term", limit=0.6)
        assert drive.outcome(owner).status == "timed_out"
        assert notes("ready")
        assert not drive.ended[owner].told, "and nobody has been told that it succeeded"


def test_a_stopped_pass_ends_its_runs_which_have_failed() -> None:
    with running() as runner:
        drive = Drive(runner)
        owners = [drive.run("ticks"), drive.run("ignores-term")]
        drive.go(lambda: len(notes("child")) == 2)
        for owner in owners:
            runner.end(owner, "stopping")
        for owner in owners:
            outcome = drive.outcome(owner)
            assert outcome.status == "failed"
            assert outcome.error == "ended: runschedule was stopped, and the run was not finished within the grace"


def test_a_run_whose_lease_was_lost_is_killed_at_once() -> None:
    with running() as runner:
        drive = Drive(runner)
        owner = drive.run("ignores-term", lease=30.0)
        drive.go(lambda: notes("grandchild"))
        asked_at = boot_time()
        runner.end(owner, "lost")
        assert drive.outcome(owner).status == "lost"
        assert drive.ended_at[owner] - asked_at < 30.0 / 10, "no grace"
        assert gone(*map(int, notes("grandchild")))()


def test_a_program_that_left_the_group_is_ended_with_its_run() -> None:
    with running() as runner:
        drive = Drive(runner)
        owner = drive.run("daemon", limit=0.7)
        drive.go(lambda: notes("daemon"))
        assert drive.outcome(owner).status == "timed_out"
        assert gone(*map(int, notes("daemon")))()


def test_a_run_keeps_going_while_it_is_renewed_even_if_it_holds_the_gil_in_c() -> None:
    with running() as runner:
        drive = Drive(runner)
        owner = drive.run("gil", lease=3.0)
        outcome = drive.outcome(owner)
        assert outcome.status == "succeeded"
        assert outcome.seconds > 2 * 2.0 - 0.1


def test_a_run_that_is_not_renewed_is_told_by_check_before_it_is_killed() -> None:
    with running() as runner:
        drive = Drive(runner)
        owner = drive.run("checks", lease=6.0)
        first = drive.until[owner]
        drive.go(lambda: notes("checked") and float(notes("checked")[-1]) > first + 0.2)
        assert not notes("lost"), "it sees the renewals"
        drive.renews = False
        outcome = drive.outcome(owner)
        assert outcome.status == "lost"
        assert drive.until[owner] - 6.0 / 5 < float(notes("lost")[0]) < drive.until[owner]
        assert drive.ended_at[owner] < drive.until[owner]


def test_a_run_that_stops_when_check_tells_it_to_was_lost_even_where_its_runner_was_slower() -> None:
    with running() as runner:
        drive = Drive(runner, renew=False)
        unrenewed = claim("checks", lease=30.0)
        drive.until[unrenewed.owner] = until = boot_time() + 30.0 / 6 + 1.0
        runner.run(unrenewed, until=until, finish_by=None)
        drive.go(lambda: notes("checked"))
        os.kill(runner.pid, signal.SIGSTOP)
        wait_for(lambda: notes("lost"))
        time.sleep(0.2)  # for it to say how it went
        os.kill(runner.pid, signal.SIGCONT)
        assert drive.outcome(unrenewed.owner).status == "lost"
        assert not drive.ended[unrenewed.owner].told


def test_a_filter_that_hangs_holds_up_no_other_run() -> None:
    with running() as runner:
        drive = Drive(runner)
        hanging = drive.run("filter-hangs")
        assert drive.outcome(drive.run("hello"), within=A_MOMENT).status == "succeeded"
        runner.end(hanging, "stopping")
        assert drive.outcome(hanging).status == "failed"


def test_a_run_has_no_descriptor_of_another_run() -> None:
    with running() as runner:
        drive = Drive(runner)
        alone = drive.outcome(drive.run("descriptors")).output
        others = [drive.run("ticks", lease=30.0) for _ in range(3)]
        drive.go(lambda: len(drive.pids) == 4)
        assert drive.outcome(drive.run("descriptors")).output == alone
        for owner in others:
            runner.end(owner, "lost")
        drive.go(lambda: len(drive.ended) == 5)


# --- the start


def test_the_runner_is_not_forked_in_a_process_with_threads() -> None:
    code = (
        "import threading, time, django; django.setup()\n"
        "from multiserver_schedule.run.handle import ProcessRunner, usable_mode\n"
        "from multiserver_schedule.exceptions import ScheduleError\n"
        "assert usable_mode('auto') == 'fork'\n"
        "threading.Thread(target=time.sleep, args=(60,), name='pool-1', daemon=True).start()\n"
        "assert usable_mode('auto') == 'spawn'\n"
        "assert usable_mode('inline') == 'inline'\n"
        "try:\n    ProcessRunner({}, deliver=print, heartbeat=1.0).start()\n"
        "except ScheduleError as error:\n    print(error)\n"
    )
    environ = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=run_support.ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout == 'A process with other threads (pool-1) cannot fork safely; set RUNNER to "spawn".\n'


def test_closing_ends_what_still_runs_and_leaves_no_process() -> None:
    run_support.alone()
    runner = ProcessRunner(run_support.TASKS, deliver=run_support.deliver, heartbeat=HEARTBEAT)
    runner.start()
    pid = runner.pid
    assert pid is not None
    drive = Drive(runner)
    owner = drive.run("ignores-term")
    drive.go(lambda: notes("grandchild"))
    runner.report({"kind": "one"})
    runner.report({"kind": "two"})
    at = boot_time()
    runner.close(60.0)
    assert boot_time() - at < A_MOMENT
    drive.go(lambda: owner in drive.ended)
    assert drive.ended[owner].outcome.status == "failed"
    assert notes("delivered") == ["one", "two"]
    assert gone(pid, drive.pids[owner], *map(int, notes("grandchild")))()
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
