"""What docs/operating.rst says to write and to call is there, and what it says that people read is what they read."""

from __future__ import annotations

import ast
import configparser
import inspect
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from argparse import ArgumentParser, _SubParsersAction
from datetime import datetime, timedelta, timezone
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.core.management import load_command_class
from django.test import override_settings

import multiserver_schedule
from multiserver_schedule import conf, keeper, logs, retention, service
from multiserver_schedule.declare import registry, verify
from multiserver_schedule.entries import RunInfo
from multiserver_schedule.locks.versions import GONE_AFTER
from multiserver_schedule.management import tables
from multiserver_schedule.models import CleanupLog, ScheduledLock, ScheduledRun
from multiserver_schedule.operate import Overview, listing, pruning
from multiserver_schedule.run import runner

from .test_readme import declare

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "operating.rst").read_text()
PROSE = " ".join(PAGE.split())
TABLE = PAGE[PAGE.index("At night\n") : PAGE.index("What it costs\n")]


def parser_of(command: str) -> ArgumentParser:
    """Return its parser, as for a command line."""
    loaded = load_command_class("multiserver_schedule", command)
    loaded._called_from_command_line = True  # type: ignore[attr-defined]
    return loaded.create_parser("manage.py", command)


SERVICE, SCHEDULE = parser_of("runschedule"), parser_of("schedule")
[VERBS] = [action.choices for action in SCHEDULE._actions if isinstance(action, _SubParsersAction)]
PARTS = keeper.STOP_GRACE + 2 * 1.0
"""Seconds beyond its grace that a service may take to end: ending the runs, the history, the reports."""


def blocks(language: str) -> list[str]:
    """Return what is in the code blocks of this language."""
    found = re.findall(rf"^\.\. code-block:: {language}\n\n((?:(?:    .*)?\n)+)", PAGE, re.MULTILINE)
    return [textwrap.dedent(each) for each in found]


def options_of(parser: ArgumentParser) -> set[str]:
    """Return how its options are written."""
    return {text for action in parser._actions for text in action.option_strings}


# -- what it says to call ---------------------------------------------------------------------------------------------

CALLS = sorted({line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")})


@pytest.mark.parametrize("call", CALLS)
def test_every_call_on_the_page_is_understood(call: str) -> None:
    program, command, *arguments = shlex.split(call)
    assert (program, command) == ("manage.py", "schedule")
    SCHEDULE.parse_args(arguments)


def test_every_verb_is_at_work_on_the_page() -> None:
    shown = {shlex.split(call)[2] for call in CALLS}
    assert shown == set(VERBS)
    for verb in VERBS:
        assert re.search(rf"^{verb}\b.*\n-+$|^pause and {verb}\n-+$", PAGE, re.MULTILINE), verb


def test_every_verb_and_option_that_the_text_names_exists() -> None:
    known = options_of(SERVICE).union(*(options_of(parser) for parser in VERBS.values()))
    known |= {"--database", "--undeclared"}  # of Django's own check
    inline = re.findall(r"``([^`]+)``", PAGE)
    for option in {option for text in inline for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)}:
        assert option in known, option
    for verb in {found for text in inline for found in re.findall(r"^(?:manage\.py )?schedule (\w+)", text)}:
        assert verb in VERBS, verb
    for text in inline:
        if words := re.findall(r"^(?:manage\.py )?schedule (\w+) (.*--.*)", text):
            verb, rest = words[0]
            assert set(re.findall(r"--[a-z-]+", rest)) <= options_of(VERBS[verb]), text


def test_the_options_of_which_it_depends_how_a_verb_works_are_named() -> None:
    for option in ("--next", "--no-wait", "--force", "--dry-run", "--keep-going", "--undeclared", "--reason", "--json"):
        assert option in PAGE


def test_the_exit_statuses_are_those_of_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        SCHEDULE.parse_args(["nonsense"])
    assert leaving.value.code == 2
    assert re.search(r"^\\ +2 +no such verb", PAGE, re.MULTILINE)


def test_a_signal_before_it_has_started_is_said_to_end_it_by_the_signals_own_status() -> None:
    assert f"without a word: with {128 + signal.SIGTERM}, as a shell says it" in PROSE


# -- what it says to write --------------------------------------------------------------------------------------------


def test_the_crontab_line_is_understood() -> None:
    [line] = [line for block in blocks("text") for line in block.splitlines() if line.startswith("* * * * *")]
    SERVICE.parse_args(shlex.split(line.rpartition("runschedule")[2]))


def unit() -> configparser.ConfigParser:
    """Return the systemd unit."""
    [text] = blocks("ini")
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


def test_the_unit_starts_a_service_and_gives_it_its_grace() -> None:
    section = unit()["Service"]
    arguments = SERVICE.parse_args(shlex.split(section["ExecStart"].rpartition("runschedule")[2]))
    assert arguments.forever and int(section["TimeoutStopSec"]) >= arguments.grace + PARTS
    assert (section["Type"], section["KillMode"], section["Restart"]) == ("notify", "mixed", "always")
    assert int(section["WatchdogSec"]) > conf.Settings().lease.total_seconds()


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    [text] = blocks("ini")
    path = tmp_path / "shop-schedule.service"
    path.write_text(text.replace("/srv/shop/.venv/bin/python", sys.executable))
    said = subprocess.run([analyze, "verify", str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert (said.returncode, "shop-schedule" in said.stdout + said.stderr) == (0, False), said.stderr


def test_the_deployment_starts_a_service_and_gives_it_its_grace() -> None:
    [text] = blocks("yaml")
    [command] = re.findall(r"command: (\[.*\])", text)
    program, manage, name, *rest = json.loads(command)
    arguments = SERVICE.parse_args(rest)
    assert (program, manage, name, arguments.forever) == ("python", "manage.py", "runschedule", True)
    [patience] = re.findall(r"terminationGracePeriodSeconds: (\d+)", text)
    assert int(patience) >= arguments.grace + PARTS
    assert int(patience) == int(unit()["Service"]["TimeoutStopSec"])


def test_kubernetes_knows_every_field_of_the_deployment(tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    [text] = blocks("yaml")
    path = tmp_path / "deployment.yaml"
    path.write_text(text)
    call = [kubectl, "set", "image", "--local", "-o", "json", "-f", str(path), "schedule=other"]
    said = subprocess.run(call, capture_output=True, text=True, timeout=60, check=True)
    kept = json.dumps(json.loads(said.stdout))  # a field that it does not know is gone
    for field in re.findall(r"(\w+):", re.sub(r": \S*registry\S*", ":", text)):
        assert f'"{field}"' in kept, field


def test_fifteen_seconds_beyond_the_grace_are_enough_and_the_defaults_fit() -> None:
    assert PARTS <= 15 and "fifteen seconds longer than ``--grace``" in PROSE
    assert service.GRACE == 20 and service.GRACE + PARTS <= 30 and "The defaults, 30 and 20" in PROSE


def test_the_settings_on_the_page_are_accepted() -> None:
    given = [block for block in blocks("python") if "MULTISERVER_SCHEDULE" in block]
    assert len(given) == 2
    for block in given:
        values: dict[str, Any] = {}
        exec(block, values)  # noqa: S102
        with override_settings(MULTISERVER_SCHEDULE=values["MULTISERVER_SCHEDULE"]):
            conf.load()


def test_every_setting_that_the_text_names_exists() -> None:
    known = {*conf.KEYS, conf.SETTING, "DJANGO_SETTINGS_MODULE", "MAILTO", "PATH", "NAME", "SERVER", "CMD", "UTC"}
    named = {word for text in re.findall(r"``([^`]+)``", PAGE) for word in re.findall(r"\b[A-Z][A-Z_]{2,}\b", text)}
    named -= {"SIGTERM", "SIGINT", "SIGHUP", "SIGKILL", "PROBLEM"}
    assert named <= known, named - known
    assert {"HISTORY_DAYS", "HISTORY_RUNS", "HOUSEKEEPING", "MAX_CONCURRENCY", "SERVER_NAME"} <= named


def test_the_schedule_that_calls_prune_declares_a_task_that_can_run() -> None:
    [block] = [block for block in blocks("python") if '"prune"' in block]
    [task] = declare(block, "shop.schedule").values()
    assert task.name == "shop.prune" and verify(task) == []
    assert task.target == "schedule"
    SCHEDULE.parse_args(list(task.args))


def test_housekeeping_is_as_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = conf.Settings()
    assert f"``HISTORY_DAYS`` ({defaults.history_days})" in PROSE
    assert f"``HISTORY_RUNS`` ({defaults.history_runs})" in PROSE
    assert f"batches of {retention.BATCH} rows" in PROSE
    assert f"After {pruning.AT_MOST / 60:.0f} minutes" in PROSE
    monkeypatch.delitem(sys.modules, "multiserver_schedule.housekeeping", raising=False)
    with registry.set_aside():
        import_module("multiserver_schedule.housekeeping")
        registry.complete_all()
        [ours] = registry.tasks.values()
    assert ours.is_ours
    assert ours.name in PROSE
    due_at = ours.next(datetime(2030, 1, 1, tzinfo=timezone.utc))
    assert due_at is not None and ours.jitter is not None
    assert f"between {due_at:%H:%M} and {due_at + ours.jitter:%H:%M}" in PROSE


def test_the_numbers_of_the_service_are_those_of_the_code() -> None:
    assert keeper.LOOK_EVERY < 5 and "within five seconds" in PROSE
    assert keeper.HURRY <= 2 and "gone within about two seconds" in PROSE
    assert GONE_AFTER.total_seconds() == 300 and "has not been seen for five minutes" in PROSE
    assert conf.Settings().lease == timedelta(seconds=30) and "one lease (30 seconds)" in PROSE
    assert conf.Settings().heartbeat == timedelta(seconds=10) and "next renewal, within ten seconds" in PROSE


def test_the_permissions_on_the_page_are_all_that_there_are() -> None:
    ours = {name for name, _ in ScheduledLock._meta.permissions}
    views = {f"view_{model._meta.model_name}" for model in (ScheduledLock, ScheduledRun, CleanupLog)}
    table = PAGE[PAGE.index("permission (``") : PAGE.index("Superusers have")]
    assert set(re.findall(r"^``(\w+)``", table, re.MULTILINE)) == ours | views


# -- what it says that people read ------------------------------------------------------------------------------------

THREE = datetime(2030, 1, 1, 3, tzinfo=timezone.utc)
WHERE: dict[str, Any] = {"task": "a.b", "due_at": THREE.isoformat(), "server": "web1"}
HELD: dict[str, Any] = {"kind": "skipped", "reason": "held", "holder": "web2", **WHERE}
CLEANUP: dict[str, Any] = {
    "task": "a.b",
    "due_at": WHERE["due_at"],
    "server": "web2",
    "owner": "x",
    "fence": 1,
    "acquired_at": WHERE["due_at"],
    "cleaned_at": WHERE["due_at"],
    "cleaned_by": "web1",
    "reason": "lease_expired",
}
EVENTS: list[dict[str, Any]] = [
    HELD | {"held_since": "2030-01-01T02:59:00+00:00"},
    HELD | {"held_since": "2030-01-01T02:00:00+00:00"},
    {"kind": "skipped", "reason": "missed", "count": 3, **WHERE},
    {"kind": "cleaned", "cleanup": CLEANUP, "command": "x", "server": "web1", "alias": "default"},
    {"kind": "trouble", "doing": keeper.LOOKING, "error": "OperationalError: gone", "server": "web1"},
    {"kind": "trouble", "doing": keeper.KEEPING, "error": "OperationalError: gone", "server": "web1"},
    {"kind": "lost_rows", "lock": "cache", "text": "its server was restarted", "count": 12, "server": "web1"},
]
ENDS = {
    "lost": "ended: this server could not renew the lease of the run in time, or had lost it",
    "timed_out": "ended: not finished 120 s after it began, its limit",
    "failed": "ended: runschedule was stopped, and the run was not finished within the grace",
}
"""How the runner ends a run, each as its source has it."""


def said_by_the_code() -> list[str]:
    """Return every text in the package, docstrings aside, with ``*`` where a value stands."""
    found = []
    for path in Path(multiserver_schedule.__file__).parent.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [str(each.value) if isinstance(each, ast.Constant) else "*" for each in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def said_by_events(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines of the log about events and about runs that ended badly."""
    caplog.set_level("DEBUG", "multiserver_schedule")
    tell = logs.Teller(tasks=dict, verbosity=0, stdout=StringIO())
    for event in EVENTS:
        tell(event)
    run = RunInfo(name="a.b", due_at=THREE, started_at=THREE, attempt=1, fence=1, key="x", server="web1")
    for status, error in [*ENDS.items(), ("failed", runner.ended_with(3)), ("failed", runner.ended_with(-9))]:
        logs.log_failure(None, task=None, run=run, server="web1", status=status, error=error)
    return [record.getMessage() for record in caplog.records]


def said_by_the_list() -> list[str]:
    """Return what ``schedule list`` prints of tasks in each of the states of which the table speaks."""
    times: dict[str, Any] = {"next_due_at": THREE, "as_of": THREE}
    held: dict[str, Any] = {"holder": "web2", "since": THREE, "until": THREE}
    last: dict[str, Any] = {"last_status": "skipped", "last_due_at": THREE}
    states: list[dict[str, Any]] = [
        last | {"state": "ready", "last_reason": "held by web2 since 2030-01-01T03:00:00Z"},
        held | {"state": "stale"},
        {"state": "paused", "paused_at": THREE, "paused_reason": "the bank is down"},
        {"state": "ready", "wanted_at": THREE},
        {"state": "overdue", "overdue_since": THREE, "server_seen_at": THREE},
        {"state": "overdue", "overdue_since": THREE, "server_seen_at": THREE, "server_seen": "web2"},
    ]
    lines = [Overview(name="a.b", schedule="", lock="default", **times, **state) for state in states]
    told = [tables.listed(line, ZoneInfo("UTC"), several=False) for line in lines]
    everything = Overview(
        name="a.b",
        schedule="",
        lock="default",
        state="paused",
        paused_at=THREE,
        paused_with_everything=True,
        **times,
    )
    return [*told, tables.everything(everything, ZoneInfo("UTC"), several=False)]


FIRST_COLUMN = [
    " ".join(found.split()) for found in re.findall(r"^   \* - ((?:.|\n(?!     - ))*)", TABLE, re.MULTILINE)
]
QUOTED = sorted({quote for cell in FIRST_COLUMN for quote in re.findall(r"``([^`]+)``", cell)})


def test_the_table_has_what_people_are_called_for() -> None:
    assert len(FIRST_COLUMN) > 25
    statuses = set(ScheduledRun.Status.values) - {"running", "succeeded"}
    assert {status for status in statuses if f"``{status}" in TABLE} == statuses


@override_settings(MULTISERVER_SCHEDULE={"LOG_LEVEL": "verbose"})
def test_every_line_that_the_table_quotes_is_one_that_is_written(caplog: pytest.LogCaptureFixture) -> None:
    written = [*said_by_events(caplog), *said_by_the_list(), *said_by_the_code(), *ScheduledRun.Status.values]
    for quote in QUOTED:
        parts = [re.escape(part) for part in re.split(r"…|'default'|'cache'|web2", quote.rstrip(": …"))]
        wanted = re.compile(".*".join(parts))
        assert any(wanted.search(text) for text in written), quote


def test_what_the_runner_says_of_a_run_that_it_ends_is_what_is_quoted() -> None:
    told = said_by_the_code()
    for text in ENDS.values():
        assert text.replace("120", "*") in told
        assert text.replace("120", "…") in " ".join(TABLE.split())


def test_what_a_service_says_of_its_end_and_of_its_store_is_quoted_word_for_word() -> None:
    told = said_by_the_code()
    assert "waiting for * to end*; nothing new is started" in told
    assert "``waiting for shop.rebuild_search_index to end within 20 s; nothing new is started``" in PROSE
    assert "the lock * answers again, after *" in told
    assert "``the lock 'default' answers again, after …``" in PROSE


@pytest.mark.parametrize("state", ["stale", "overdue", "not seen yet", "not declared", "paused"])
def test_the_states_of_which_the_table_speaks_are_those_of_the_list(state: str) -> None:
    assert re.search(rf"state = .*\"{state}\"|(held|out_of_use) = .*\"{state}\"", inspect.getsource(listing))
    assert any(quote.startswith(state) for quote in QUOTED)


def test_what_the_verbs_print_is_what_is_quoted() -> None:
    told = said_by_the_code()
    for text in (
        "*: asked for; the next service or pass that looks and is meant for it runs it",
        "told to end after their current runs",
        "* was not started: *.",
        "*: * due time(s) to run*",
        "To go on: *",
        "taken out of use",
        "since it is not declared",
        "*, and that server looks alive: it renewed the lease at *, ",
    ):
        assert any(each.startswith(text) or text in each for each in told), text
        assert all(part in PROSE for part in text.split("*")), text


def test_the_page_says_what_holds_a_run_by_hand_back_and_what_does_not() -> None:
    assert "nor do ``environments``, ``only_on`` or maintenance mode hold it back" in PROSE
    assert "What it prints is in the history, which the admin shows." in PROSE
    assert "the next service or pass that looks and is meant for it runs it, on whichever server" in PROSE


def test_no_line_is_longer_than_a_terminal_of_120() -> None:
    assert [line for line in PAGE.splitlines() if len(line) > 120] == []


def test_the_page_is_linked_to() -> None:
    assert "<docs/operating.rst>`_" in (ROOT / "README.rst").read_text()
