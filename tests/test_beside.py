"""BESIDE: hooks, pings, mail and output files; whatever becomes of them, the run is recorded as it went."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from django.db import connection, transaction

from multiserver_schedule.entries import Claim, Filter, Hook, Mail, Outcome, OutputFile, Ping, ScheduledTask
from multiserver_schedule.logs import Teller
from multiserver_schedule.run import beside
from multiserver_schedule.run.base import Ended, boot_time
from multiserver_schedule.run.current import current_run
from multiserver_schedule.run.inline import InlineRunner

from . import run_support
from .run_support import (
    Drive,
    claim,
    holds_the_gil,
    is_running,
    mail_by,
    note,
    notes,
    running,
    says_hello,
    task,
    wait_for,
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(run_support.PLACE, str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def logged(place: Path) -> Iterator[Path]:
    """Return the file that our log is written to, by whichever process."""
    handler = logging.FileHandler(place / "log", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.getLogger("multiserver_schedule").addHandler(handler)
    yield place / "log"
    logging.getLogger("multiserver_schedule").removeHandler(handler)
    handler.close()


@contextlib.contextmanager
def listening(kind: str, place: Path) -> Iterator[int]:
    command = [sys.executable, "-m", "tests.listeners", kind, str(place / kind)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=run_support.ROOT) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@pytest.fixture(scope="module")
def web_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    folder = tmp_path_factory.mktemp("web")
    with listening("http", folder) as port:
        yield port, folder / "http"


@pytest.fixture
def web(web_server: tuple[int, Path]) -> str:
    """Return the address of a web server, which has been asked for nothing yet."""
    web_server[1].write_text("")
    return f"127.0.0.1:{web_server[0]}"


@pytest.fixture
def asked(web_server: tuple[int, Path]) -> Any:
    return lambda: [json.loads(line) for line in web_server[1].read_text().splitlines()]


@pytest.fixture
def mails(place: Path, settings: Any) -> Any:
    mail_by(settings, "filebased", file_path=str(place / "mails"))

    def sent() -> list[str]:
        # One file may hold several: the backend names it by the second, and by the id of an object.
        texts = [file.read_text().split("-" * 79) for file in (place / "mails").glob("*")]
        return [mail for text in texts for mail in text if mail.strip()]

    return sent


def go(
    made: ScheduledTask | str, *, mode: str = "fork", report_limit: float = 5.0, within: float = 30.0, **more: Any
) -> Ended:
    """Run it in a process, and return its end."""
    tasks = run_support.TASKS if isinstance(made, str) else {made.name: made}
    with running(mode, tasks=tasks, report_limit=report_limit) as runner:
        drive = Drive(runner)
        owner = drive.run(made, **more)
        drive.outcome(owner, within=within)
        return drive.ended[owner]


def with_hooks(*hooks: tuple[str, Any], target: Any = says_hello, **more: Any) -> ScheduledTask:
    around = {"hooks": tuple(Hook(moment, function) for moment, function in hooks)}  # type: ignore[arg-type]
    return task("the-task", target, around=around, **more)


def with_pings(*pings: tuple[str, str], target: Any = says_hello) -> ScheduledTask:
    return task("the-task", target, around={"pings": tuple(Ping(moment, url) for moment, url in pings)})  # type: ignore[arg-type]


def told(name: str = "hooks") -> list[Any]:
    return [json.loads(line) for line in notes(name)]


# --- hooks


@pytest.mark.parametrize("mode", ["fork", "spawn"])
def test_hooks_are_told_of_the_run_and_of_how_it_went(mode: str) -> None:
    ended = go("hooked", mode=mode, lease=30.0)

    end = {"status": "succeeded", "output": "hello you\nand an error\n", "error": ""}
    assert told() == [["hooked", True, {}], ["hooked", True, end], ["hooked", True, end]]
    assert (ended.outcome.status, ended.outcome.reason, ended.told) == ("succeeded", "", True)


def test_the_hooks_of_an_end_come_before_those_of_every_end() -> None:
    named = [
        (moment, lambda moment=moment: note("order", moment)) for moment in ("after", "failure", "success", "before")
    ]
    go(with_hooks(*named, target=run_support.fails))
    go(with_hooks(*named))

    assert notes("order") == ["before", "failure", "after", "before", "success", "after"]


def test_a_hook_is_given_only_what_it_names() -> None:
    def of_two(seconds: float, *, status: str, other: int = 5) -> None:
        note("two", f"{status} {0 < seconds < 20} {other}")

    go(with_hooks(("after", of_two), ("after", lambda: note("none")), ("success", lambda run: note("run", run.key))))

    assert notes("two") == ["succeeded True 5"]
    assert notes("none") == [""]
    assert notes("run")[0].startswith("the-task/")


def raises() -> None:
    raise ValueError("boom\nand more \udc80")


def leaves() -> None:
    sys.exit(0)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_hook_that_raises_is_recorded_and_logged_and_harms_nothing_else(moment: str, logged: Path) -> None:
    ended = go(
        with_hooks((moment, raises), (moment, "tests.no_such.hook"), (moment, leaves), ("after", run_support.tells))
    )

    assert (ended.outcome.status, ended.outcome.error) == ("succeeded", "")
    assert ended.outcome.output == "hello you\nand an error\n"
    assert (
        ended.outcome.reason
        == (
            f"{moment} hook tests.test_beside.raises: ValueError: boom and more ?; "
            f"{moment} hook tests.no_such.hook: ModuleNotFoundError: No module named 'tests.no_such'; "
            f"{moment} hook tests.test_beside.leaves: SystemExit: 0"
        )[:255]
    )
    assert len(told()) == 1, "the next hook is called"
    said = logged.read_text()
    assert f"ERROR {moment} hook tests.test_beside.raises: ValueError: boom and more ? task=the-task due=" in said
    assert "in raises\n" in said, "with its traceback"
    assert "server=web1" in said


def test_no_hook_can_change_how_a_run_that_failed_is_recorded() -> None:
    ended = go(with_hooks(("after", raises), target=run_support.fails))

    assert ended.outcome.status == "failed"
    assert "no such rate" in ended.outcome.error
    assert "boom" not in ended.outcome.error


def hangs() -> None:
    time.sleep(60)


async def hangs_later() -> None:
    await asyncio.sleep(60)


@pytest.mark.parametrize("hook", [hangs, hangs_later])
@pytest.mark.parametrize("moment", ["before", "success"])
def test_a_hook_that_hangs_is_broken_off_and_recorded(
    hook: Any, moment: str, monkeypatch: pytest.MonkeyPatch, logged: Path
) -> None:
    monkeypatch.setattr(beside, "HOOK_LIMIT", 0.3)
    ended = go(with_hooks((moment, hook), ("after", run_support.tells)), within=10.0)

    word = {"before": "before", "success": "on_success"}[moment]
    assert ended.outcome.status == "succeeded"
    assert ended.outcome.reason == f"{word} hook tests.test_beside.{hook.__name__}: took longer than 0.3 s"
    assert ended.outcome.reason in logged.read_text()
    assert len(told()) == 1


def stuck() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    holds_the_gil(60)


def test_a_hook_that_hangs_in_c_is_killed_in_its_time_while_the_lease_is_held(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(beside, "HOOK_LIMIT", 0.5)
    began = boot_time()
    ended = go(with_hooks(("success", stuck), ("after", raises)), report_limit=0.3, lease=3.0)

    # Two hooks of 0.5 s, and 2 s for what is around each; twice the limit of a receiver.
    assert 4.0 < boot_time() - began < 30.0
    assert (ended.outcome.status, ended.told) == ("succeeded", True)
    assert ended.outcome.reason == "on_success hook tests.test_beside.stuck: did not end, and was killed"
    assert "the process of the-task had not left 6 s after its end" in capfd.readouterr().err


def test_a_hook_may_go_on_past_the_limit_of_the_run_and_keeps_the_runner_no_busier(place: Path) -> None:
    made = with_hooks(("after", lambda: time.sleep(1.0)))
    with running(tasks={made.name: made}) as runner:
        drive = Drive(runner)
        owner = drive.run(made, limit=0.3)
        outcome = drive.outcome(owner)
        used = Path(f"/proc/{runner.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    assert (outcome.status, outcome.reason) == ("succeeded", "")
    assert outcome.seconds > 1.0
    assert sum(map(int, used)) / os.sysconf("SC_CLK_TCK") < 0.3


def test_a_hook_ends_with_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_hooks(("after", hangs))
    with running(tasks={made.name: made}) as runner:
        drive = Drive(runner, renew=False)
        owner = drive.run(made, lease=1.5)
        outcome = drive.outcome(owner, within=5.0)
    assert drive.ended_at[owner] < drive.until[owner]
    assert (outcome.status, outcome.reason) == (
        "succeeded",
        "after hook tests.test_beside.hangs: did not end, and was killed",
    )


def test_a_hook_ends_with_a_service_that_is_stopped_and_the_result_stands(place: Path) -> None:
    def lingers() -> None:
        (place / "begun").touch()
        hangs()

    made = with_hooks(("after", lingers))
    with running(tasks={made.name: made}) as runner:
        drive = Drive(runner)
        owner = drive.run(made)
        drive.go(lambda: (place / "begun").exists())
        runner.end(owner, "cancelled")
        later = boot_time() + 0.5
        drive.go(lambda: boot_time() > later)
        assert owner not in drive.ended, "a newer due time waits for the hook"
        runner.end(owner, "stopping")
        outcome = drive.outcome(owner, within=10.0)
    assert outcome.status == "succeeded"
    assert outcome.reason.startswith("after hook tests.test_beside.")
    assert outcome.reason.endswith("lingers: ended the process")


def test_a_hook_that_leaves_the_process_is_recorded_and_the_result_stands() -> None:
    ended = go(with_hooks(("after", lambda: os._exit(0))))

    assert ended.outcome.status == "succeeded"
    assert ended.outcome.reason.startswith("after hook tests.test_beside.")
    assert ended.outcome.reason.endswith("<lambda>: ended the process")


def test_no_hook_is_called_of_a_run_that_its_filters_refuse() -> None:
    hooks = [(moment, run_support.tells) for moment in ("before", "after", "success", "failure")]
    ended = go(with_hooks(*hooks, filters=[Filter(run_support.no, True)]))

    assert (ended.outcome.status, ended.outcome.reason) == ("skipped", "filtered")
    assert told() == []


def opens() -> None:
    transaction.atomic().__enter__()


def uses_the_database() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        note("asked", f"{cursor.fetchone()} {connection.in_atomic_block}")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_transaction_that_a_hook_leaves_open_is_rolled_back_and_no_fault_of_the_task(
    moment: str, django_db_blocker: Any
) -> None:
    with django_db_blocker.unblock():
        ended = go(with_hooks((moment, opens), ("after", uses_the_database)))

    assert ended.outcome.status == "succeeded"
    assert ended.outcome.reason == (
        f"{moment} hook tests.test_beside.opens: left a transaction open on 'default'; it was rolled back"
    )
    assert notes("asked") == ["(1,) False"]


# --- pings


def test_pings_are_gets_at_their_moments(web: str, asked: Any) -> None:
    pings = [(moment, f"http://{web}/{moment}?key=1") for moment in ("after", "before", "success", "failure")]
    assert go(with_pings(*pings)).outcome.reason == ""
    assert go(with_pings(*pings, target=run_support.fails)).outcome.reason == ""

    paths = ["/before?key=1", "/after?key=1", "/success?key=1", "/before?key=1", "/after?key=1", "/failure?key=1"]
    assert [each["path"] for each in asked()] == paths
    assert {each["agent"] for each in asked()} == {"multiserver-schedule"}


def test_a_ping_that_fails_fails_no_task_and_is_recorded_without_its_secrets(
    web: str, asked: Any, logged: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{unused.getsockname()[1]}"
        ended = go(
            with_pings(
                ("after", f"http://me:secret@{web}/500?token=secret#secret"),
                ("success", f"http://me:secret@{closed}/?token=secret"),
                ("before", f"http://me:secret@{web}/to/ftp?token=secret"),
            )
        )

    assert ended.outcome.status == "succeeded"
    assert ended.outcome.reason == (
        f"ping_before http://{web}/to/ftp: could not be reached; "
        f"then_ping http://{web}/500: was answered with 500; "
        f"ping_on_success http://{closed}/: ConnectionRefusedError: [Errno 111] Connection refused"
    )
    said = logged.read_text()
    assert f"WARNING then_ping http://{web}/500: was answered with 500 task=the-task due=" in said
    assert "secret" not in said + "".join(capfd.readouterr())
    assert "Traceback" not in said


def test_a_ping_follows_redirects_and_logs_in_only_where_it_was_sent(web: str, asked: Any) -> None:
    assert go(with_pings(("after", f"http://me:p%40ss@{web}/to/landed"))).outcome.reason == ""

    assert [(each["path"], each["login"]) for each in asked()] == [
        ("/to/landed", "Basic bWU6cEBzcw=="),
        ("/landed?token=secret", None),
    ]


def test_a_ping_that_nobody_answers_is_given_up(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "PING_LIMIT", 0.4)
    ended = go(with_pings(("before", f"http://{web}/hang"), ("after", f"http://{web}/hang")), within=10.0)

    assert ended.outcome.status == "succeeded"
    assert ended.outcome.reason == (
        f"ping_before http://{web}/hang: took longer than 0.4 s; then_ping http://{web}/hang: took longer than 0.4 s"
    )


# --- mail


def silent() -> None:
    """Print nothing."""


MAILS = (Mail(("all@x", "too@x"), only_on_failure=False), Mail(("ops@x",), only_on_failure=True))


def test_output_is_mailed_where_there_is_any(mails: Any) -> None:
    assert go(task("the-task", says_hello, around={"mails": MAILS})).outcome.reason == ""
    assert go(task("the-task", silent, around={"mails": MAILS})).outcome.reason == ""

    (mail,) = mails()
    assert "Subject: the-task succeeded on web1\n" in mail
    assert "To: all@x, too@x\n" in mail
    assert "Output:\n\nhello you\nand an error\n" in mail


def test_a_failure_is_mailed_with_its_error_also_where_nothing_was_printed(mails: Any) -> None:
    go(task("the-task", run_support.fails, around={"mails": MAILS}))

    assert {mail.partition("To: ")[2].partition("\n")[0] for mail in mails()} == {"all@x, too@x", "ops@x"}
    for mail in mails():
        assert "Subject: the-task failed on web1\n" in mail
        assert "ValueError: no such rate" in mail
        assert "It printed nothing." in mail


def test_a_mail_server_that_hangs_costs_the_run_nothing_but_time(
    place: Path, settings: Any, monkeypatch: pytest.MonkeyPatch, logged: Path
) -> None:
    monkeypatch.setattr(beside, "MAIL_LIMIT", 0.5)
    with listening("smtp", place) as port:
        mail_by(settings, "smtp", host="127.0.0.1", port=port)
        ended = go(task("the-task", says_hello, around={"mails": MAILS[:1]}), within=10.0)
    assert (place / "smtp").exists(), "it was connected to"
    assert ended.outcome.status == "succeeded"
    assert ended.outcome.reason == "mail to all@x, too@x: took longer than 0.5 s"
    assert "WARNING mail to all@x, too@x: took longer than 0.5 s task=the-task" in logged.read_text()


# --- attempts


def failing_with_everything(web: str) -> ScheduledTask:
    made = task(
        "the-task",
        run_support.fails,
        around={
            "hooks": (
                Hook("failure", lambda: note("called", "failure")),
                Hook("after", lambda: note("called", "after")),
            ),
            "pings": (Ping("failure", f"http://{web}/failure"), Ping("after", f"http://{web}/after")),
            "mails": MAILS,
            "retries": 1,
        },
    )
    return dataclasses.replace(made, backoff=timedelta(seconds=30))


@pytest.mark.parametrize(
    ("attempt", "next_in", "is_final"), [(1, None, False), (1, 3600, False), (1, 20, True), (2, None, True)]
)
@pytest.mark.parametrize("inline", [False, True])
def test_of_a_failure_people_are_told_when_no_further_attempt_follows(
    web: str, asked: Any, mails: Any, attempt: int, next_in: int | None, is_final: bool, inline: bool
) -> None:
    made = failing_with_everything(web)
    then = None if next_in is None else datetime.now(timezone.utc) + timedelta(seconds=next_in)
    if inline:
        run_inline(claim(made, attempt=attempt, next_due_at=then))
    else:
        go(made, attempt=attempt, next_due_at=then)

    assert notes("called") == (["failure", "after"] if is_final else ["after"])
    assert [each["path"] for each in asked()] == (["/failure", "/after"] if is_final else ["/after"])
    assert len(mails()) == (2 if is_final else 0)


# --- programs


@pytest.mark.parametrize("mode", ["fork", "spawn"])
def test_the_hooks_of_a_program_are_told_how_it_ended(mode: str) -> None:
    ended = go("exec-hooked", mode=mode, lease=30.0)

    end = {"status": "failed", "output": "went on\n", "error": "exit status 3"}
    assert told() == [["exec-hooked", True, {}], ["exec-hooked", True, end], ["exec-hooked", True, end]]
    assert (ended.outcome.status, ended.outcome.error, ended.told) == ("failed", "exit status 3", True)
    assert ended.outcome.output == "went on\n"


def program(*words: str, **around: Any) -> ScheduledTask:
    return task("the-task", words, kind="exec", around=around)


AFTER = (Hook("after", run_support.tells),)


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        (("true",), "succeeded", ""),
        (("sh", "-c", "kill -SEGV $$"), "failed", "killed by SIGSEGV"),
        (("no-such-program",), "failed", "program not found: no-such-program"),
        (("/",), "failed", "/ could not be started: [Errno 13] Permission denied: '/'"),
    ],
)
def test_a_program_ends_the_same_with_and_without_hooks(words: tuple[str, ...], status: str, error: str) -> None:
    without, having = go(program(*words)).outcome, go(program(*words, hooks=AFTER)).outcome

    assert (without.status, having.status) == (status, status)
    assert without.error.startswith(error[:40])
    assert having.error == error
    assert told()[0][2]["error"] == error


def test_a_program_without_hooks_is_the_runs_process_and_one_with_hooks_its_child() -> None:
    with running(tasks={}) as runner:
        drive = Drive(runner)
        owner = drive.run(program("sh", "-c", "echo $$"))
        assert int(drive.outcome(owner).output) == drive.pids[owner]
    made = program("sh", "-c", "echo $$ $PPID; ps -o pgid= -p $$", hooks=AFTER)
    with running(tasks={made.name: made}) as runner:
        drive = Drive(runner)
        owner = drive.run(made)
        pid, parent, group = map(int, drive.outcome(owner).output.split())
    assert pid != drive.pids[owner]
    assert parent == group == drive.pids[owner]


def test_a_program_with_hooks_may_follow_a_sigterm_as_one_without(place: Path) -> None:
    script = "trap 'sleep 0.2; echo tidied > $0; exit 0' TERM; echo up > $0.up; sleep 60 & wait"
    for around in ({}, {"hooks": AFTER}):
        (place / "tidy").unlink(missing_ok=True)
        (place / "tidy.up").unlink(missing_ok=True)
        made = program("bash", "-c", script, str(place / "tidy"), **around)
        with running(tasks={made.name: made}) as runner:
            drive = Drive(runner)
            owner = drive.run(made, lease=10.0)
            drive.go((place / "tidy.up").exists)
            runner.end(owner, "limit")
            outcome = drive.outcome(owner)
        assert outcome.status == "timed_out"
        assert (place / "tidy").exists(), around
        assert not drive.ended[owner].told


def test_a_program_with_hooks_is_ended_with_what_it_started_at_its_limit(place: Path) -> None:
    made = program("sh", "-c", "sleep 61 & echo $! > $0; wait", str(place / "pid"), hooks=AFTER)
    ended = go(made, limit=0.5)

    assert ended.outcome.status == "timed_out"
    assert not is_running(int((place / "pid").read_text()))
    assert told() == [], "of this end somebody else has to tell"


# --- output files


def to_file(target: Any, file: Path | str, *, append: bool = True, **more: Any) -> ScheduledTask:
    more.setdefault("around", {})
    return task(
        "the-task", target, **{**more, "around": {"output_file": OutputFile(str(file), append), **more["around"]}}
    )


PRINTING = [
    pytest.param(says_hello, {}, "hello you\nand an error\n", id="python"),
    pytest.param(("sh", "-c", "echo one; echo two >&2"), {"kind": "exec"}, "one\ntwo\n", id="program"),
    pytest.param(
        ("sh", "-c", "echo one; echo two >&2"), {"kind": "exec", "around": {"hooks": AFTER}}, "one\ntwo\n", id="hooked"
    ),
]


@pytest.mark.parametrize(("target", "more", "printed"), PRINTING)
@pytest.mark.parametrize("inline", [False, True])
def test_output_goes_to_the_file_and_its_end_to_the_record(
    place: Path, target: Any, more: dict[str, Any], printed: str, inline: bool
) -> None:
    file = place / "out"
    file.write_text("before é\n")
    run = (lambda made: run_inline(claim(made))) if inline else (lambda made: go(made).outcome)

    assert run(to_file(target, file, **more)).output == printed
    assert file.read_text() == f"before é\n{printed}"
    assert run(to_file(target, file, append=False, **more)).output == printed
    assert file.read_text() == printed


def test_hooks_get_the_output_that_went_to_a_file(place: Path) -> None:
    go(to_file(says_hello, place / "out", around={"hooks": AFTER}))

    assert told()[0][2]["output"] == "hello you\nand an error\n"


@pytest.mark.parametrize(
    "made",
    [
        pytest.param((run_support.prints_much, {}), id="python"),
        pytest.param((("sh", "-c", "yes éé | head -n 40000"), {"kind": "exec"}), id="program"),
    ],
)
def test_of_a_long_file_the_end_is_recorded_and_no_character_is_cut(place: Path, made: tuple[Any, Any]) -> None:
    outcome = go(to_file(made[0], place / "out", **made[1])).outcome

    assert len(outcome.output.encode()) in range(64 * 1024 - 1, 64 * 1024 + 1)
    assert (place / "out").read_text().endswith(outcome.output)
    assert "\N{REPLACEMENT CHARACTER}" not in outcome.output


def prints_and_dies() -> None:
    print("so far", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_run_that_was_killed_had_printed_is_in_the_file_and_in_the_record(place: Path) -> None:
    outcome = go(to_file(prints_and_dies, place / "out")).outcome

    assert (outcome.status, outcome.error) == ("failed", "killed by SIGKILL")
    assert outcome.output == "so far\n"
    assert (place / "out").read_text() == "so far\n"


def prints_and_waits() -> None:
    print("live")
    wait_for((run_support.place() / "go-on").exists)
    print("done")


def test_a_file_is_written_while_the_run_goes_on(place: Path) -> None:
    made = to_file(prints_and_waits, place / "out")
    with running(tasks={made.name: made}) as runner:
        drive = Drive(runner)
        owner = drive.run(made)
        drive.go(lambda: (place / "out").exists() and (place / "out").read_text() == "live\n")
        (place / "go-on").touch()
        assert drive.outcome(owner).output == "live\ndone\n"


@pytest.mark.parametrize(("target", "more", "printed"), PRINTING)
@pytest.mark.parametrize("inline", [False, True])
def test_a_file_that_cannot_be_opened_is_recorded_and_the_run_goes_on(
    place: Path, target: Any, more: dict[str, Any], printed: str, inline: bool, logged: Path
) -> None:
    file = place / "no-such-folder" / "out"
    made = to_file(target, file, **more)
    outcome = run_inline(claim(made)) if inline else go(made).outcome

    assert (outcome.status, outcome.output) == ("succeeded", printed)
    assert outcome.reason.startswith(f"output file {file}: FileNotFoundError: ")
    assert f"WARNING output file {file}: FileNotFoundError" in logged.read_text()


def test_a_run_that_its_filters_refuse_leaves_the_file_alone(place: Path) -> None:
    (place / "out").write_text("yesterday\n")
    go(to_file(says_hello, place / "out", append=False, filters=[Filter(run_support.no, True)]))

    assert (place / "out").read_text() == "yesterday\n"


def test_a_device_is_a_file_to_print_to(place: Path) -> None:
    outcome = go(to_file(says_hello, "/dev/null")).outcome

    assert (outcome.status, outcome.output, outcome.reason) == ("succeeded", "", "")


def changes_the_folder() -> None:
    os.chdir("/")
    print("elsewhere")


def test_a_relative_path_is_one_of_the_folder_that_the_pass_started_in(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)

    assert go(to_file(changes_the_folder, "out")).outcome.output == "elsewhere\n"
    assert (place / "out").read_text() == "elsewhere\n"


def test_a_file_that_was_rotated_meanwhile_is_not_taken_for_the_runs_own(place: Path) -> None:
    def rotates() -> None:
        (place / "out").rename(place / "out.1")
        (place / "out").write_text("somebody else's")
        print("into the old one")

    assert go(to_file(rotates, place / "out")).outcome.output == ""
    assert (place / "out.1").read_text() == "into the old one\n"


# --- runs that could not tell of their end


def events_of(made: ScheduledTask, outcome: Outcome, *, final: bool = True) -> list[Mapping[str, Any]]:
    return list(beside.events(claim(made), outcome, final=final))


TIMED_OUT = Outcome(status="timed_out", error="ended: not finished", output="so far\n", seconds=2.0)


@pytest.mark.parametrize("mode", ["fork", "spawn"])
def test_of_a_run_that_could_not_tell_of_its_end_the_reporter_does(mode: str) -> None:
    (hooked, *_) = events = events_of(run_support.TASKS["hooked"], TIMED_OUT)
    assert hooked["kind"] == "beside"
    with running(mode) as runner:
        for event in events:
            runner.report(json.loads(json.dumps(event)))
        Drive(runner).go(lambda: len(notes("hooks")) == 2)

    end = {"status": "timed_out", "output": "so far\n", "error": "ended: not finished"}
    assert told() == [["hooked", True, end], ["hooked", True, end]], "the hooks of a failure, and of every end"
    assert run_support.current_run() is None


def test_each_step_of_such_a_run_is_an_event_of_its_own_and_one_that_hangs_costs_itself(
    web: str, asked: Any, mails: Any, monkeypatch: pytest.MonkeyPatch, logged: Path
) -> None:
    made = failing_with_everything(web)
    made = dataclasses.replace(made, hooks=(Hook("failure", stuck), Hook("after", hangs), *made.hooks))
    monkeypatch.setattr(beside, "REPORT_LIMIT", 0.3)
    events = events_of(made, TIMED_OUT)
    assert [event["name"].split()[0] for event in events] == [
        "on_failure", "on_failure", "after", "after", "ping_on_failure", "then_ping", "mail", "mail",
    ]  # fmt: skip
    with running(tasks={made.name: made}, report_limit=1.0) as runner:
        for event in events:
            runner.report(event)
        runner.report({"kind": "next"})
        Drive(runner).go(lambda: notes("delivered") == ["next"])

    assert notes("called") == ["failure", "after"]
    assert [each["path"] for each in asked()] == ["/failure", "/after"]
    assert len(mails()) == 2
    assert "after hook tests.test_beside.hangs: took longer than 0.3 s task=the-task" in logged.read_text()


def test_a_step_that_is_declared_otherwise_where_it_is_to_be_taken_is_left_out(logged: Path) -> None:
    (event,) = events_of(with_hooks(("failure", run_support.tells)), TIMED_OUT)
    with running(tasks={"the-task": with_hooks(("failure", raises))}) as runner:
        runner.report(event)
        runner.report({"kind": "next"})
        Drive(runner).go(lambda: notes("delivered") == ["next"])

    assert told() == []
    assert "on_failure hook tests.run_support.tells was left out" in logged.read_text()


def test_nobody_is_told_of_such_a_run_that_is_tried_again_but_who_wants_to_hear_of_every_end(web: str) -> None:
    names = [event["name"] for event in events_of(failing_with_everything(web), TIMED_OUT, final=False)]

    assert [name.split()[0] for name in names] == ["after", "then_ping"]


def test_an_event_holds_no_secret_of_an_address() -> None:
    made = with_pings(("failure", "https://me:secret@x/a?token=secret"))

    assert "secret" not in json.dumps(events_of(made, TIMED_OUT))


@pytest.mark.parametrize(
    ("told_by_run", "reason", "said"),
    [
        (True, "", "failed (ValueError: no) in"),
        (True, "after hook a.b: boom", "failed (ValueError: no; after hook a.b: boom) in"),
        (False, "its runner was lost", "failed (its runner was lost) in"),
    ],
)
def test_the_console_says_why_a_run_failed_and_what_went_wrong_beside_it(
    capsys: pytest.CaptureFixture[str], told_by_run: bool, reason: str, said: str
) -> None:
    about = claim("hello")
    Teller(tasks=lambda: {})(
        {
            "kind": "ended", "task": "hello", "due_at": about.occurrence.due_at, "server": "web1", "status": "failed",
            "seconds": 1.0, "reason": reason, "error": "Traceback\nValueError: no\n", "told": told_by_run, "fence": 7,
            "trigger": "schedule", "attempt": 1, "started_at": about.acquired_at.isoformat(), "key": "hello/1",
        }
    )  # fmt: skip

    assert said in capsys.readouterr().out


# --- inline


def run_inline(made: Claim) -> Outcome:
    runner = InlineRunner({made.task.name: made.task}, deliver=run_support.deliver)
    runner.run(made, until=boot_time() + 5, finish_by=None)
    messages = runner.poll(0)
    assert isinstance(messages[1], Ended)
    return messages[1].outcome


def test_inline_everything_happens_in_the_same_order(web: str, asked: Any, mails: Any) -> None:
    made = dataclasses.replace(
        with_hooks(("after", run_support.tells), ("before", lambda: note("hooks", "1")), ("success", raises)),
        pings=(Ping("after", f"http://{web}/after"),),
        mails=MAILS,
    )
    outcome = run_inline(claim(made))

    end = {"status": "succeeded", "output": "hello you\nand an error\n", "error": ""}
    assert told() == [1, ["the-task", True, end]]
    assert outcome.status == "succeeded"
    assert outcome.reason == "on_success hook tests.test_beside.raises: ValueError: boom and more ?"
    assert len(asked()) == len(mails()) == 1
    assert current_run() is None


@pytest.mark.parametrize(("script", "status", "told_end"), [("echo a", "succeeded", True), ("exit 3", "failed", True)])
def test_inline_a_program_with_hooks_is_told_of_here(script: str, status: str, told_end: bool) -> None:
    made = program("sh", "-c", script, hooks=AFTER)
    runner = InlineRunner({}, deliver=run_support.deliver)
    runner.run(claim(made), until=boot_time() + 5, finish_by=None)
    ended = runner.poll(0)[1]
    assert isinstance(ended, Ended)

    assert (ended.outcome.status, ended.told) == (status, told_end)
    assert told()[0][2]["status"] == status


def test_inline_events_are_taken_by_this_process() -> None:
    made = with_hooks(("failure", run_support.tells))
    runner = InlineRunner({made.name: made}, deliver=run_support.deliver)
    for event in events_of(made, TIMED_OUT):
        runner.report(event)

    assert told()[0][2]["status"] == "timed_out"


def test_inline_ctrl_c_in_a_hook_stops_the_pass_and_the_run_is_recorded() -> None:
    made = with_hooks(("after", lambda: signal.raise_signal(signal.SIGINT)))
    runner = InlineRunner({}, deliver=run_support.deliver)
    runner.run(claim(made), until=boot_time() + 5, finish_by=None)
    with pytest.raises(KeyboardInterrupt):
        runner.poll(0)
    ended = runner.poll(0)[1]
    assert isinstance(ended, Ended)
    assert ended.outcome.status == "succeeded"
    assert "KeyboardInterrupt" in ended.outcome.reason


def test_nobody_is_alarmed_by_a_run_that_made_way_for_a_newer_due_time(web: str) -> None:
    cancelled = Outcome(status="cancelled", reason="a newer due time went before it")
    names = [event["name"] for event in events_of(failing_with_everything(web), cancelled)]
    assert names
    assert [name for name in names if "failure" in name or "mail" in name] == []
