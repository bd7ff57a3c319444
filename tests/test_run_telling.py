"""RUN: signals, reports and what is flushed; whoever listens can delay or change nothing but himself."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentry_sdk
from sentry_sdk.envelope import Envelope
from sentry_sdk.integrations.logging import LoggingIntegration
from sentry_sdk.transport import Transport

from multiserver_schedule.logs import log_failure
from multiserver_schedule.run import child
from multiserver_schedule.run.base import boot_time
from multiserver_schedule.run.handle import BARE, PACKAGE
from multiserver_schedule.run.inline import InlineRunner
from multiserver_schedule.signals import task_failed

from . import run_support
from .fleet.journal import A_MOMENT
from .run_support import Drive, claim, is_running, note, notes, running, task


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(run_support.PLACE, str(tmp_path))
    return tmp_path


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for sent, receiver in run_support.RECEIVERS:
        sent.connect(receiver)
    monkeypatch.setattr(child, "before_exit", [lambda: note("left", os.getpid())])
    yield
    for sent, receiver in run_support.RECEIVERS:
        sent.disconnect(receiver)


@pytest.fixture
def logged(place: Path) -> Iterator[Path]:
    """Return the file that our log is written to, by whichever process."""
    handler = logging.FileHandler(place / "log")
    logging.getLogger("multiserver_schedule").addHandler(handler)
    yield place / "log"
    logging.getLogger("multiserver_schedule").removeHandler(handler)
    handler.close()


# --- receivers in the run's own process


@pytest.mark.parametrize("hang", ["start", "end"])
def test_a_receiver_that_hangs_is_broken_off_and_the_others_still_hear(
    listening: None, monkeypatch: pytest.MonkeyPatch, hang: str, logged: Path
) -> None:
    monkeypatch.setenv("RUN_TESTS_HANG", hang)
    with running(report_limit=0.4) as runner:
        drive = Drive(runner)
        owner = drive.run("hello")
        outcome = drive.outcome(owner)
    assert outcome.status == "succeeded"
    assert drive.ended[owner].told
    assert 0.4 < outcome.seconds < 0.4 + A_MOMENT
    assert [line.split()[0] for line in notes("heard")] == ["started", "succeeded"]
    said = f"A receiver of a signal failed: hang_at_{hang}: TookTooLong('took longer than 0.4 s') task=hello"
    assert said in logged.read_text()


def test_a_receiver_that_hangs_in_c_cannot_change_the_result_and_is_killed(
    listening: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUN_TESTS_HANG", "gil")
    with running(report_limit=0.3) as runner:
        drive = Drive(runner)
        owner = drive.run("hello")
        outcome = drive.outcome(owner)
    assert (outcome.status, outcome.error) == ("succeeded", "")
    assert 0.6 < outcome.seconds < 0.6 + A_MOMENT
    assert "the process of hello had not left 1 s after its end" in capfd.readouterr().err


def test_a_receiver_that_leaves_the_process_cannot_change_the_result(
    listening: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUN_TESTS_HANG", "exit")
    with running() as runner:
        drive = Drive(runner)
        owner = drive.run("hello")
        assert drive.outcome(owner).status == "succeeded"
        assert drive.ended[owner].told


def test_hooks_are_called_before_a_run_leaves_and_what_was_logged_is_flushed(listening: None, place: Path) -> None:
    memory = logging.handlers.MemoryHandler(100, target=logging.FileHandler(place / "log"))
    log = logging.getLogger("run_tests")
    log.addHandler(memory)
    try:
        logged = task("logs", lambda: log.warning("kept back until the end"))
        with running(tasks={"logs": logged}) as runner:
            drive = Drive(runner)
            owner = drive.run(logged)
            drive.outcome(owner)
    finally:
        log.removeHandler(memory)
        memory.target.close()
        memory.target = None
    assert notes("left") == [str(drive.pids[owner])]
    assert "kept back until the end" in (place / "log").read_text()


def test_a_hook_that_raises_or_hangs_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = [lambda: 1 / 0, lambda: time.sleep(60), lambda: note("last")]
    monkeypatch.setattr(child, "before_exit", hooks)
    with running(report_limit=0.3) as runner:
        drive = Drive(runner)
        assert drive.outcome(drive.run("hello")).status == "succeeded"
    assert notes("last") == [""]


# --- the reporter


def test_reports_are_delivered_in_order_by_one_process_that_is_not_the_runner() -> None:
    pids: list[str] = []
    with running(deliver=lambda event: note("by", os.getpid())) as runner:
        for number in range(50):
            runner.report({"kind": str(number)})
        Drive(runner).go(lambda: len(notes("by")) == 50)
        pids = notes("by")
        assert len(set(pids)) == 1
        assert pids[0] not in (str(runner.pid), str(os.getpid()))
    assert not is_running(int(pids[0]))


@pytest.mark.parametrize("mode", ["fork", "spawn"])
def test_a_report_that_hangs_or_kills_costs_itself_alone(
    mode: str, capfd: pytest.CaptureFixture[str], logged: Path
) -> None:
    with running(mode, report_limit=0.5) as runner:
        drive = Drive(runner)
        for event in ({"kind": "a"}, {"kind": "b", "hang": 1}, {"kind": "c", "die": 1}, {"kind": "d", "raise": 1}):
            runner.report(event)
        runner.report({"kind": "e"})
        owner = drive.run("hello", lease=30.0)
        assert drive.outcome(owner).status == "succeeded"
        drive.go(lambda: notes("delivered") == ["a", "e"])
        assert not drive.vanished
    said = capfd.readouterr().err
    assert 'a report took longer than 0.5 s and was given up: {"kind": "b"' in said
    assert 'the reporter died of a report, which was given up: {"kind": "c"' in said
    assert "A report could not be delivered: {'kind': 'd'" in (logged.read_text() if mode == "fork" else said)


def test_a_report_that_hangs_holds_up_no_renewal() -> None:
    with running(report_limit=60.0) as runner:
        drive = Drive(runner)
        runner.report({"kind": "x", "hang": 1})
        owner = drive.run("short-ticks", lease=2.2)
        assert drive.outcome(owner).status == "succeeded"
        at = boot_time()
        runner.close(0.5)
        assert boot_time() - at < 10.0


def test_a_console_that_nobody_reads_blocks_the_reporter_and_nobody_else() -> None:
    read, write = os.pipe()
    with running(deliver=lambda event: os.write(write, b"x" * 300_000), report_limit=0.5) as runner:
        drive = Drive(runner)
        for _ in range(3):
            runner.report({"kind": "line"})
        assert drive.outcome(drive.run("hello"), within=A_MOMENT).status == "succeeded"
    os.close(read)
    os.close(write)


# --- Sentry


class KeptTransport(Transport):
    """Keeps what is captured, as the real one does, and writes it to a file when it is flushed."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.kept: list[str] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        event = envelope.get_event()
        if event is not None:
            values = event.get("exception", {}).get("values", [{}])
            self.kept.append(json.dumps([values[-1].get("type"), event.get("logger"), event.get("level")]) + "\n")

    def flush(self, timeout: float, callback: Any = None) -> None:
        with open(os.environ["RUN_TESTS_SENTRY"], "a") as file:
            file.writelines(self.kept)
        self.kept.clear()


@pytest.fixture
def sent(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("RUN_TESTS_SENTRY", str(place / "sentry"))
    connected = task_failed.connect(log_failure, dispatch_uid="multiserver_schedule.log_failure")
    assert connected is None
    yield place / "sentry"
    sentry_sdk.init()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"default_integrations": False},
        {"default_integrations": False, "integrations": [LoggingIntegration()]},
    ],
    ids=["usual", "no-integrations", "no-dedupe"],
)
def test_sentry_receives_the_exception_of_a_failed_run_once(sent: Path, options: dict[str, Any]) -> None:
    sentry_sdk.init(
        dsn="https://key@sentry.invalid/1", transport=KeptTransport, auto_enabling_integrations=False, **options
    )
    with running() as runner:
        drive = Drive(runner)
        assert drive.outcome(drive.run("fails")).status == "failed"
        assert drive.outcome(drive.run("hello")).status == "succeeded"
        assert drive.outcome(drive.run("exit-3")).status == "failed"
    received = [json.loads(line) for line in sent.read_text().splitlines()]
    assert [kind for kind, _, _ in received if kind == "ValueError"] == ["ValueError"]


# --- inline


def test_inline_runs_one_claim_a_poll_in_this_very_process(capsys: pytest.CaptureFixture[str], listening: None) -> None:
    runner = InlineRunner(run_support.TASKS, deliver=run_support.deliver)
    runner.start()
    assert not runner.can_end
    claims = [claim("path"), claim("hello")]
    for made in claims:
        runner.run(made, until=boot_time() + 5, finish_by=None)
    first = runner.poll(0)
    assert [type(message).__name__ for message in first] == ["Started", "Ended"]
    assert (first[0].owner, first[0].pid) == (claims[0].owner, os.getpid())  # type: ignore[union-attr]
    ended = runner.poll(0)[1]
    assert ended.outcome.status == "succeeded"  # type: ignore[union-attr]
    assert ended.outcome.output == "hello web1\nand an error\n"  # type: ignore[union-attr]
    assert ended.told  # type: ignore[union-attr]
    assert capsys.readouterr().out.endswith("hello web1\n"), "it is printed, too"
    assert [line.split()[:2] for line in notes("heard")] == [
        ["started", "path"],
        ["succeeded", "path"],
        ["started", "hello"],
        ["succeeded", "hello"],
    ]
    assert runner.poll(0) == []
    assert child.before_exit
    assert run_support.current_run() is None


@pytest.mark.parametrize(
    ("name", "status", "error"),
    [
        ("fails", "failed", "ValueError"),
        ("exit-3", "failed", "sys.exit(3)"),
        ("exit-0", "succeeded", ""),
        ("async", "succeeded", ""),
        ("unwanted", "skipped", ""),
        ("exec", "succeeded", ""),
        ("exec-3", "failed", "exit status 3"),
        ("exec-killed", "failed", "killed by SIGSEGV"),
        ("exec-missing", "failed", "program not found: no-such-program"),
    ],
)
def test_inline_outcomes_are_those_of_a_process(name: str, status: str, error: str) -> None:
    runner = InlineRunner(run_support.TASKS, deliver=run_support.deliver)
    runner.run(claim(name), until=boot_time() + 5, finish_by=None)
    outcome = runner.poll(0)[1].outcome  # type: ignore[union-attr]
    assert outcome.status == status
    assert error in outcome.error
    assert (outcome.error == "") is (error == "")


def test_inline_keeps_the_lease_by_a_thread_only_while_something_runs() -> None:
    calls: list[float] = []

    def keep_alive() -> None:
        calls.append(boot_time())
        runner.renew({made.owner: boot_time() + 1.0})

    runner = InlineRunner(run_support.TASKS, deliver=run_support.deliver, keep_alive=keep_alive, heartbeat=0.05)
    slow = task("slow", lambda: [time.sleep(0.02) or run_support.current_run().check() for _ in range(60)])  # type: ignore[union-attr, func-returns-value]
    made = claim(slow, lease=1.0)
    runner.run(made, until=boot_time() + 1.0, finish_by=None)
    assert runner.poll(0)[1].outcome.status == "succeeded"  # type: ignore[union-attr]
    assert len(calls) >= 5
    so_far = len(calls)
    time.sleep(0.15)
    assert len(calls) == so_far


def test_inline_a_run_learns_of_a_lost_lease_by_check() -> None:
    runner = InlineRunner(run_support.TASKS, deliver=run_support.deliver)
    made = claim(task("slow", lambda: runner.end(made.owner, "lost") or run_support.current_run().check()))  # type: ignore[union-attr, func-returns-value]
    runner.run(made, until=boot_time() + 60, finish_by=None)
    outcome = runner.poll(0)[1].outcome  # type: ignore[union-attr]
    assert outcome.status == "failed"
    assert "LeaseLost" in outcome.error


def test_inline_ctrl_c_stops_the_pass_and_the_run_is_recorded() -> None:
    runner = InlineRunner(run_support.TASKS, deliver=run_support.deliver)
    made = claim(task("interrupted", lambda: signal.raise_signal(signal.SIGINT)))
    runner.run(made, until=boot_time() + 5, finish_by=None)
    with pytest.raises(KeyboardInterrupt):
        runner.poll(0)
    assert runner.poll(0)[1].outcome.status == "failed"  # type: ignore[union-attr]


def test_inline_reports_are_delivered_at_once_and_their_faults_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    runner = InlineRunner({}, deliver=run_support.deliver)
    runner.report({"kind": "a", "raise": 1})
    runner.report({"kind": "b"})
    assert notes("delivered") == ["b"]
    assert "A report could not be delivered: {'kind': 'a'" in caplog.text


def test_a_spawned_runner_loads_no_django() -> None:
    code = "import multiserver_schedule.run.runner; assert not [name for name in sys.modules if 'django' in name]"
    subprocess.run([sys.executable, "-c", BARE + code, PACKAGE], cwd="/", check=True)
