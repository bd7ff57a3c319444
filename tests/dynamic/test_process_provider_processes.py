"""What only processes show of ProcessProvider: who outlives whom, who is signalled, what a kill -9 leaves behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest

from multiserver_schedule.servers.entries import Machine, MachineState, ServerInfo
from multiserver_schedule.servers.exceptions import (
    ProviderBusy,
    ProviderError,
    ProviderFull,
    ProviderRefused,
    UnknownState,
)
from multiserver_schedule.servers.providers import launcher
from multiserver_schedule.servers.providers.process import MARK, ProcessProvider

from ..fleet.harness import HISTORY_IN_SQLITE, is_alive
from ..scenarios.scene import Scene
from ..stores import ROOT, Store

PATIENCE = 15.0
_T = TypeVar("_T")

ON_TERM = """
import os, signal, sys, time
def told(*_):
    os.write(1, b"told\\n")
signal.signal(signal.SIGTERM, told)
print("up", flush=True)
"""
SLOW = ON_TERM + "signal.pause(); time.sleep(0.4); print('done', flush=True)"
DEAF = ON_TERM + "\nwhile True: signal.pause()"


def python(text: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", text]


def until(condition: Callable[[], _T], what: str = "") -> _T:
    deadline = time.monotonic() + PATIENCE
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited in vain {what}"
        time.sleep(0.005)
    return answer


class Here:
    """A folder for machines; whatever is started with it is ended with it."""

    def __init__(self, folder: Path) -> None:
        self.place = folder
        self.state = folder / "state"
        self.made = 0

    def provider(self, **options: Any) -> ProcessProvider:
        """Return another instance each time, as another process would have."""
        given = {"command": ["sleep", "600"], "directory": self.state, **options}
        return ProcessProvider("processes", given, fleet="tests")

    def info(self, key: str = "one", **configuration: Any) -> ServerInfo:
        return ServerInfo(f"name-of-{key}", key, "default", "processes", configuration)

    def start(self, command: list[str] | None = None, key: str = "one", **options: Any) -> Machine:
        """Start a worker; one of ours is up when it has said so."""
        if command is not None:
            options["command"] = command
        machine = self.provider(**options).create_server(self.info(key))
        if any('"up"' in part or "'up'" in part for part in command or ()):
            until(lambda: "up" in self.said(key), "for the worker to be up")
        return machine

    def folder(self, key: str = "one") -> Path:
        return Path(self.provider()._folder(), key)

    def record(self, key: str = "one") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder(key) / "record.json").read_text())
        return found

    def pid(self, key: str = "one") -> int:
        return int(self.record(key)["pid"])

    def said(self, key: str = "one") -> list[str]:
        log = self.folder(key) / "output.log"
        return log.read_text().split("\n")[:-1] if log.exists() else []

    def state_of(self, key: str = "one") -> tuple[MachineState, str]:
        (machine,) = self.provider().find_by_tag(key)
        return machine.state, machine.word

    def processes(self) -> list[int]:
        """Return all that was started with this folder, at any remove, and lives."""
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                with contextlib.suppress(OSError):
                    command = Path(f"/proc/{name}/cmdline").read_bytes()
                    environ = Path(f"/proc/{name}/environ").read_bytes()
                    if str(self.place).encode() in environ + command and is_alive(int(name)):
                        found.append(int(name))
        return found

    def close(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while left := self.processes():
            assert time.monotonic() < deadline, f"these could not be ended: {left}"
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    # By which even what has left its group, its parents and its marks is found.
    monkeypatch.setenv("PROCESS_TESTS_PLACE", str(tmp_path))
    here = Here(tmp_path)
    yield here
    here.close()


# -- what a worker starts with ----------------------------------------------------------------------------------------


def test_a_worker_has_its_command_with_its_names_its_environment_folder_and_log(here: Here) -> None:
    (here.place / "work").mkdir()
    tell = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), os.environ['A'], sys.stdin.read()]))"
    here.start(
        [*python(tell), "{name} {key} {type}", '{"json": {}}'],
        env={"A": "of {name}"},
        cwd=here.place / "work",
        log=here.place / "{name}.log",
    )
    log = here.place / "name-of-one.log"
    until(lambda: log.exists() and log.read_text().endswith("\n"))
    arguments = ["name-of-one one default", '{"json": {}}']
    assert json.loads(log.read_text()) == [arguments, str(here.place / "work"), "of name-of-one", ""]


def test_the_configuration_of_a_type_replaces_the_command_and_adds_to_the_environment(here: Here) -> None:
    tell = "import os; print(os.environ['A'], os.environ['B'])"
    provider = here.provider(env={"A": "1", "B": "1"}, log=here.place)
    provider.create_server(here.info(command=python(tell), env={"B": "2"}))
    log = here.place / "name-of-one.log"
    until(lambda: log.exists() and log.read_text() == "1 2\n")


def test_a_worker_has_the_environment_of_who_starts_it_less_what_is_about_that_alone(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LC_ALL", "LC_CTYPE"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    run = {f"MULTISERVER_SCHEDULE_{name}": "1" for name in ("RUN", "NAME", "FENCE", "CHANNEL", "FAULTS")}
    for name, value in {**run, "NOTIFY_SOCKET": "/run/none", "LANG": "C", "ODD": "\udcff"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(launcher.FAULTS, "nowhere")
    monkeypatch.setenv(MARK, "that of the worker that starts another one")
    here.start(["sleep", "600"], env={"TOKEN": "hush"})
    environ = Path(f"/proc/{here.pid()}/environ").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
    expected = {**before, "LANG": "C", "ODD": "\udcff", "TOKEN": "hush", MARK: str(here.folder())}
    assert dict(line.split("=", 1) for line in environ) == expected


def test_a_worker_has_a_session_of_its_own_the_usual_signals_and_no_open_file_of_who_starts_it(here: Here) -> None:
    with (here.place / "of who starts it").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            here.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    pid = here.pid()
    assert (os.getsid(pid), os.getpgid(pid)) == (pid, pid)
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert {status[name].strip("0") for name in ("SigBlk", "SigIgn", "SigCgt")} == {""}
    expected = {"/dev/null", str(here.folder() / "output.log"), str(here.folder() / "lock")}
    # While it starts, it opens and closes what it is loaded from.
    until(lambda: files_of(pid) == expected, "for no other file to be open")


def files_of(pid: int) -> set[str]:
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


# -- who outlives whom ------------------------------------------------------------------------------------------------


def test_a_worker_outlives_who_started_it_and_is_nobodys_zombie(here: Here) -> None:
    code = (
        "import django, sys; from django.conf import settings; settings.configure(); django.setup()\n"
        "from tests.dynamic.starter.deeds import info, provider; provider(sys.argv[1]).create_server(info('one'))"
    )
    subprocess.run([sys.executable, "-c", code, str(here.state)], check=True, cwd=ROOT, start_new_session=True)
    assert here.state_of()[0] is MachineState.RUNNING
    (worker,) = here.processes()
    here.provider().stop_server(f"one@{here.provider().host}")
    until(lambda: not Path(f"/proc/{worker}").exists(), "for it to be buried")


def outcome(how: str, scene: Scene, folder: Path) -> None:
    """Have a task of the scheduler start a worker, and that come to its end in one of the ways it may."""
    scene.register()
    scene.make_due(["starts" if how == "done" else "goes-on"])
    web1 = scene.server("web1", args=["--forever", "--grace", "0.2"] if how == "stopped" else [])
    if how == "done":
        assert web1.wait() == 0, web1.output
        return
    scene.wait_for(lambda: (folder / "went-on").exists(), "the worker to be made")
    (run,) = web1.run_pids()
    if how == "stopped":
        web1.terminate()
    else:
        web1.kill({"keeper killed": "keeper", "runner killed": "runner"}[how])
    scene.wait_for(lambda: not web1.alive and not is_alive(run), "the run to be over")


@HISTORY_IN_SQLITE
@pytest.mark.parametrize("how", ["done", "stopped", "keeper killed", "runner killed"])
def test_a_worker_that_a_run_of_the_scheduler_started_outlives_it_however_that_ends(
    store: Store, tmp_path: Path, here: Here, how: str
) -> None:
    here.state.mkdir(mode=0o700)
    env = {"DJANGO_SETTINGS_MODULE": "tests.dynamic.starter.settings", "STARTER_FOLDER": str(here.state)}
    with Scene(store, tmp_path, "starter", env=env) as scene:
        outcome(how, scene, here.state)
        (machine,) = here.provider().list_servers()
        assert (machine.state, machine.name) == (MachineState.RUNNING, "from-a-run")
        time.sleep(0.2)
        assert here.provider().has_started(machine.id)
        here.provider().delete_server(machine.id)
        until(lambda: here.provider().has_been_deleted(machine.id))


# -- once -------------------------------------------------------------------------------------------------------------


def answers(here: Here, what: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.dynamic.starter.deeds", what, str(here.state), "8"],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        # Each that sees no record lingers before it leaves one, so that all others come meanwhile.
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings", launcher.FAULTS: "before_record=0.3"},
    )
    return done.stdout.split("\n")[:-1]


def test_eight_processes_that_make_the_same_machine_at_once_make_one_process(here: Here) -> None:
    told = answers(here, "race")
    assert len(told) == 8
    assert set(told) == {here.record("raced")["booted"]}
    assert here.processes() == [here.pid("raced")]


def test_eight_processes_that_bring_a_machine_up_again_at_once_start_one_process(here: Here) -> None:
    machine = here.start(key="raced")
    here.provider().reboot_server(machine.id)
    until(lambda: not is_alive(int(machine.booted.split()[0])))
    assert here.state_of("raced") == (MachineState.REBOOTING, "to be started again")
    # One that finds it being launched is told of the last boot.
    assert set(answers(here, "reboot")) - {machine.booted} == {here.record("raced")["booted"]}
    assert here.record("raced")["booted"] != machine.booted
    assert here.processes() == [here.pid("raced")]


def test_a_machine_whose_worker_has_ended_is_not_started_by_a_second_creation(here: Here) -> None:
    here.start(["true"])
    until(lambda: here.state_of() == (MachineState.STOPPED, "ended by itself"))
    before = here.record()
    (machine,) = here.provider().list_servers()
    assert here.provider(command=["sleep", "600"]).create_server(here.info()) == machine
    assert here.record() == before
    assert here.processes() == []


def test_a_deleted_machine_is_not_made_again_by_a_creation_that_comes_late_until_it_is_forgotten(here: Here) -> None:
    machine = here.start()
    here.provider().delete_server(machine.id)
    until(lambda: here.provider().has_been_deleted(machine.id))
    with pytest.raises(ProviderRefused, match="one was deleted before"):
        here.provider().create_server(here.info())
    assert here.processes() == []
    two_days_ago = time.time() - 2 * 86400
    os.utime(here.folder() / "deleted", (two_days_ago, two_days_ago))
    here.start(key="another")
    assert sorted(path.name for path in here.folder().parent.iterdir()) == ["another"]


# -- what cannot be started -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"command": ["no-such-program-anywhere", "x"]}, "no-such-program-anywhere could not be started: No such file"),
        ({"command": ["/dev/null"]}, "/dev/null could not be started: Permission denied"),
        ({"cwd": "/no/such/folder"}, "The folder 'cwd' could not be changed to: No such file"),
        ({"log": "/no/such/folder/log"}, "The log could not be opened: No such file"),
    ],
)
def test_what_cannot_be_started_is_refused_with_the_reason_and_leaves_nothing(
    here: Here, options: dict[str, Any], words: str
) -> None:
    provider = here.provider(**options)
    for _ in range(2):
        with pytest.raises(ProviderRefused) as raised:
            provider.create_server(here.info())
        assert words in str(raised.value)
        assert provider.list_servers() == []
        assert list(here.folder().parent.iterdir()) == []
    assert here.start().state is MachineState.RUNNING


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EAGAIN, ProviderFull), (errno.ENOMEM, ProviderFull), (errno.ENOSPC, ProviderBusy), (errno.ENOENT, None)],
)
def test_a_host_that_has_no_more_processes_is_full_and_makes_nothing(
    here: Here, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[ProviderError] | None
) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", refuse)
        with pytest.raises(kind or ProviderRefused, match="No launcher could be started") as raised:
            here.provider().create_server(here.info())
        assert type(raised.value) is (kind or ProviderRefused)
    assert here.provider().list_servers() == []


@pytest.mark.parametrize(("step", "made"), [("before_fork", 0), ("after_lock", 1), ("after_record", 1)])
def test_an_answer_that_takes_too_long_is_unknown_and_a_look_tells_what_came_of_it(
    here: Here, monkeypatch: pytest.MonkeyPatch, step: str, made: int
) -> None:
    monkeypatch.setattr(ProcessProvider, "timeout", timedelta(seconds=0.3))
    monkeypatch.setenv(launcher.FAULTS, f"{step}=0.6")
    with pytest.raises(ProviderError, match=r"one had not been launched after 0\.3 s") as raised:
        here.provider().create_server(here.info())
    assert type(raised.value) is ProviderError
    time.sleep(0.5)
    monkeypatch.undo()
    assert [m.state for m in here.provider().find_by_tag("one")] == [MachineState.RUNNING] * made
    assert here.start().state is MachineState.RUNNING
    assert here.processes() == [here.pid()]


# -- a kill -9 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["before_fork", "before_lock", "after_lock", "before_record"])
def test_a_launcher_that_is_killed_before_it_has_written_anything_has_made_nothing(
    here: Here, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setenv(launcher.FAULTS, step)
    # Not that it made nothing, of which nobody can be sure: the look tells.
    with contextlib.suppress(ProviderError):
        here.provider().create_server(here.info())
    until(lambda: here.provider().has_been_deleted(f"one@{here.provider().host}"))
    assert here.provider().list_servers() == []
    monkeypatch.delenv(launcher.FAULTS)
    assert here.start().state is MachineState.RUNNING
    assert here.processes() == [here.pid()]


def test_a_launcher_that_is_killed_when_it_has_left_its_record_leaves_a_machine_that_is_down(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launcher.FAULTS, "after_record")
    machine = here.provider().create_server(here.info())
    # A process that dies has closed its files a moment before it is dead.
    until(lambda: here.state_of() == (MachineState.STOPPED, "ended by itself"))
    here.provider().delete_server(machine.id)
    assert here.provider().has_been_deleted(machine.id)
    assert here.processes() == []


def test_who_is_killed_in_the_middle_of_its_order_has_made_nothing(here: Here) -> None:
    file = str(Path(launcher.__file__))
    for text in (b"", b'{"folder": "/no/such/fol'):
        done = subprocess.run([sys.executable, "-I", "-S", file], input=text, capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_who_is_killed_when_it_has_given_its_order_has_made_the_machine(here: Here) -> None:
    code = (
        "import django, os, sys; from django.conf import settings; settings.configure(); django.setup()\n"
        "import subprocess\n"
        "from tests.dynamic.starter.deeds import info, provider\n"
        "def ordered(self, text, timeout):\n"
        "    self.stdin.write(text); self.stdin.close(); os.kill(os.getpid(), 9)\n"
        "subprocess.Popen.communicate = ordered\n"
        "provider(sys.argv[1]).create_server(info('one'))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(here.state)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    until(lambda: here.provider().find_by_tag("one"))
    until(lambda: here.provider().has_started(f"one@{here.provider().host}"))
    until(lambda: here.processes() == [here.pid()], "for the launcher to be gone")


# -- starts and ends that meet ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def launching(here: Here, monkeypatch: pytest.MonkeyPatch, step: str, **options: Any) -> Iterator[None]:
    """Have somebody else make the machine meanwhile, whose launcher lingers at a step."""

    def make() -> None:
        with contextlib.suppress(ProviderError):
            here.provider(**options).create_server(here.info())

    monkeypatch.setenv(launcher.FAULTS, f"{step}=0.5")
    other = threading.Thread(target=make)
    other.start()
    try:
        until(lambda: (here.folder() / ("record.json" if step == "after_record" else "lock")).exists())
        monkeypatch.delenv(launcher.FAULTS)
        yield
    finally:
        other.join()


def test_a_machine_is_listed_and_counted_while_it_is_being_launched(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    with launching(here, monkeypatch, "after_lock"):
        assert here.state_of() == (MachineState.PENDING, "being launched")
        assert here.provider().current_server_count() == 1
        assert not here.provider().has_started(f"one@{here.provider().host}")
        assert here.provider().create_server(here.info()).state is MachineState.RUNNING
    assert here.processes() == [here.pid()]


@pytest.mark.parametrize("lingers", ["", "after_open=0.7"])
def test_a_creation_that_waits_for_one_that_fails_makes_the_machine(
    here: Here, monkeypatch: pytest.MonkeyPatch, lingers: str
) -> None:
    with launching(here, monkeypatch, "before_record", command=["no-such-program-anywhere"]):
        monkeypatch.setenv(launcher.FAULTS, lingers)
        machine = here.provider().create_server(here.info())
    assert here.provider().has_started(machine.id)
    assert here.provider().create_server(here.info()) == machine
    assert here.processes() == [here.pid()]


@pytest.mark.parametrize("step", ["after_lock", "after_record"])
@pytest.mark.parametrize("call", ["delete_server", "stop_server"])
def test_a_machine_that_is_deleted_or_stopped_while_it_is_being_launched_never_runs(
    here: Here, monkeypatch: pytest.MonkeyPatch, step: str, call: str
) -> None:
    with launching(here, monkeypatch, step):
        provider = here.provider()
        machine_id = f"one@{provider.host}"
        getattr(provider, call)(machine_id)
        if call == "delete_server":
            until(lambda: provider.has_been_deleted(machine_id))
            assert provider.list_servers() == []
        else:
            until(lambda: provider.has_stopped(machine_id))
            assert here.state_of() == (MachineState.STOPPED, "stopped")
    assert here.processes() == []


# -- to stop ----------------------------------------------------------------------------------------------------------


def test_a_worker_is_told_to_stop_once_however_often_that_is_asked_and_ends_what_it_does(here: Here) -> None:
    machine = here.start(python(SLOW))
    for _ in range(3):
        here.provider().stop_server(machine.id)
    assert here.state_of() == (MachineState.STOPPING, "told to end")
    assert not here.provider().has_stopped(machine.id)
    assert not here.provider().has_started(machine.id)
    until(lambda: here.provider().has_stopped(machine.id))
    assert here.said() == ["up", "told", "done"]
    assert here.state_of() == (MachineState.STOPPED, "stopped")


def test_only_the_worker_is_told_to_stop_and_what_its_children_do_is_done_before_it_is_down(here: Here) -> None:
    work = "import os, time\nif os.fork() == 0:\n    time.sleep(0.5); print('child done', flush=True); os._exit(0)\n"
    machine = here.start(python(f"{work}print('up', flush=True)\ntime.sleep(600)"))
    here.provider().stop_server(machine.id)
    until(lambda: not is_alive(here.pid()))
    assert not here.provider().has_stopped(machine.id)
    until(lambda: here.provider().has_stopped(machine.id))
    assert here.said() == ["up", "child done"]


def test_a_worker_that_does_not_heed_it_is_killed_with_all_its_children_when_its_time_is_over(here: Here) -> None:
    child = "import subprocess\nsubprocess.Popen(['sleep', '600'], start_new_session=True)\n"
    machine = here.start(python(child + DEAF))
    assert len(here.processes()) == 2
    patient = here.provider(stop_timeout=timedelta(minutes=1))
    patient.stop_server(machine.id)
    until(lambda: "told" in here.said())
    assert not patient.has_stopped(machine.id)
    assert len(here.processes()) == 2
    hasty = here.provider(stop_timeout=timedelta(milliseconds=1))
    until(lambda: hasty.has_stopped(machine.id))
    assert here.processes() == []


def test_a_stopped_machine_stays_down_whatever_it_was_told_before(here: Here) -> None:
    machine = here.start(python(SLOW))
    here.provider().reboot_server(machine.id)
    here.provider().stop_server(machine.id)
    until(lambda: here.provider().has_stopped(machine.id))
    assert not here.provider().has_started(machine.id)
    assert here.state_of() == (MachineState.STOPPED, "stopped")
    assert here.processes() == []


# -- to reboot --------------------------------------------------------------------------------------------------------


def test_a_worker_that_is_rebooted_ends_what_it_does_and_starts_with_what_it_was_started_with(here: Here) -> None:
    machine = here.start([*python(SLOW + "; os.environ['A']"), "{name}"], env={"A": "1"})
    for _ in range(2):
        here.provider().reboot_server(machine.id)
    assert here.state_of()[0] is MachineState.REBOOTING
    assert not here.provider().has_started(machine.id)
    assert not here.provider().has_stopped(machine.id)
    other = here.provider(command=["false"])
    until(lambda: other.has_started(machine.id))
    until(lambda: here.said() == ["up", "told", "done", "up"])
    (now,) = here.provider().list_servers()
    assert (now.id, now.name, now.state) == (machine.id, machine.name, MachineState.RUNNING)
    assert now.booted != machine.booted
    assert Path(f"/proc/{here.pid()}/cmdline").read_bytes().endswith(b"\0name-of-one\0")
    assert b"\0A=1\0" in Path(f"/proc/{here.pid()}/environ").read_bytes()
    here.provider().reboot_server(machine.id)
    until(lambda: here.provider().has_started(machine.id))
    assert len({machine.booted, now.booted, here.record()["booted"]}) == 3


def test_a_worker_that_its_drain_has_stopped_is_started_again_by_a_reboot(here: Here) -> None:
    machine = here.start(python(SLOW))
    here.provider().stop_server(machine.id)
    until(lambda: here.provider().has_stopped(machine.id))
    for _ in range(2):
        here.provider().reboot_server(machine.id)
    assert here.state_of() == (MachineState.REBOOTING, "to be started again")
    assert not here.provider().has_stopped(machine.id)
    until(lambda: here.provider().has_started(machine.id))
    until(lambda: here.said() == ["up", "told", "done", "up"])
    assert here.state_of() == (MachineState.RUNNING, "running")
    assert here.record()["booted"] != machine.booted
    here.provider().stop_server(machine.id)
    until(lambda: here.provider().has_stopped(machine.id))
    assert not here.provider().has_started(machine.id)


def test_a_worker_that_still_ends_for_its_drain_is_not_told_again_by_a_reboot_and_has_no_more_time(here: Here) -> None:
    machine = here.start(python(DEAF))
    here.provider().stop_server(machine.id)
    until(lambda: "told" in here.said())
    time.sleep(0.3)
    here.provider().reboot_server(machine.id)
    assert here.state_of() == (MachineState.REBOOTING, "told to end, and to be started again")
    assert not here.provider(stop_timeout=timedelta(seconds=30)).has_started(machine.id)
    assert here.pid() == int(machine.booted.split()[0])
    hasty = here.provider(stop_timeout=timedelta(seconds=0.3))
    assert not hasty.has_started(machine.id)
    until(lambda: not is_alive(int(machine.booted.split()[0])), "for it to be killed at once")
    until(lambda: hasty.has_started(machine.id))
    until(lambda: here.said() == ["up", "told", "up"])


def test_a_worker_that_does_not_heed_a_reboot_is_killed_when_its_time_is_over_and_started_again(here: Here) -> None:
    machine = here.start(python(DEAF))
    here.provider().reboot_server(machine.id)
    hasty = here.provider(stop_timeout=timedelta(milliseconds=1))
    until(lambda: hasty.has_started(machine.id))
    assert here.record()["booted"] != machine.booted
    assert here.processes() == [here.pid()]


def test_a_worker_that_has_ended_by_itself_is_told_of_and_a_reboot_starts_it_again(here: Here) -> None:
    machine = here.start()
    os.kill(here.pid(), signal.SIGKILL)
    until(lambda: here.state_of() == (MachineState.STOPPED, "ended by itself"))
    with pytest.raises(ProviderError, match=r"name-of-one has ended by itself\. What it printed: .*output\.log"):
        here.provider().has_started(machine.id)
    assert here.provider().has_stopped(machine.id)
    assert not here.provider().has_been_deleted(machine.id)
    here.provider().reboot_server(machine.id)
    assert here.provider().has_started(machine.id)


def test_a_worker_that_has_ended_and_left_children_is_down_unless_it_was_told_to_end(here: Here) -> None:
    machine = here.start(["sh", "-c", "setsid sleep 600 & exec sleep 600"])
    until(lambda: len(here.processes()) == 2)
    os.kill(here.pid(), signal.SIGKILL)
    until(lambda: here.state_of() == (MachineState.STOPPED, "ended by itself, but for some of its children"))
    assert here.provider().has_stopped(machine.id)
    with pytest.raises(ProviderError, match="name-of-one has ended by itself"):
        here.provider().has_started(machine.id)
    here.provider().stop_server(machine.id)
    assert here.state_of() == (MachineState.STOPPING, "told to end")
    assert not here.provider().has_stopped(machine.id)
    here.provider().delete_server(machine.id)
    until(lambda: here.provider().has_been_deleted(machine.id))
    assert here.processes() == []


def test_a_reboot_into_a_program_that_is_gone_is_told_and_leaves_a_machine_that_is_down(here: Here) -> None:
    program = here.place / "worker"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o700)
    machine = here.start([str(program)])
    program.unlink()
    here.provider().reboot_server(machine.id)
    until(lambda: here.state_of()[1] == "to be started again")
    with pytest.raises(ProviderRefused, match="could not be started: No such file"):
        here.provider().has_started(machine.id)
    until(lambda: here.state_of() == (MachineState.STOPPED, "ended by itself"))


# -- to delete --------------------------------------------------------------------------------------------------------

FORK = "import os, time\nif os.fork() == 0:\n    {}\n    time.sleep(600)\nprint('up', flush=True)\ntime.sleep(600)"


@pytest.mark.parametrize(
    "escape",
    [
        "pass",
        "os.setsid()",
        # Nor is the lock open in it.
        "os.setsid(); os.closerange(3, 100); os.execv('/bin/sleep', ['sleep', '600'])",
        "os.setsid(); os.execve('/bin/sleep', ['sleep', '600'], {'PROCESS_TESTS_PLACE': PLACE})",
    ],
    ids=["in its group", "in a session of its own", "another program", "without a mark"],
)
@pytest.mark.parametrize("leader", ["alive", "dead"])
def test_all_that_a_worker_has_started_is_ended_with_its_machine(here: Here, escape: str, leader: str) -> None:
    escape = escape.replace("PLACE})", f"{str(here.place)!r}}})")
    machine = here.start(python(FORK.replace("{}", escape)))
    until(lambda: len(here.processes()) == 2)
    if leader == "dead":
        os.kill(here.pid(), signal.SIGKILL)
        until(lambda: not is_alive(here.pid()))
        assert here.state_of() == (MachineState.STOPPED, "ended by itself, but for some of its children")
        here.provider().delete_server(machine.id)
        assert not here.provider().has_been_deleted(machine.id) or here.processes() == []
    here.provider().delete_server(machine.id)
    until(lambda: here.provider().has_been_deleted(machine.id))
    assert here.processes() == []


def test_a_worker_without_lock_and_mark_and_one_that_is_stopped_by_a_signal_are_there_all_the_same(here: Here) -> None:
    hides = f"os.closerange(0, 100); os.execve('/bin/sleep', ['sleep', '600'], {{'PLACE': {str(here.place)!r}}})"
    machine = here.start(python(f"import os\nprint('up', flush=True)\n{hides}"))
    until(lambda: Path(f"/proc/{here.pid()}/cmdline").read_bytes().startswith(b"sleep"))
    assert here.provider().has_started(machine.id)
    assert not here.provider().has_stopped(machine.id)
    os.kill(here.pid(), signal.SIGSTOP)
    assert here.provider().has_started(machine.id)
    here.provider().delete_server(machine.id)
    until(lambda: here.provider().has_been_deleted(machine.id))
    until(lambda: here.processes() == [])


def test_another_process_that_has_its_number_by_now_is_never_touched(here: Here) -> None:
    machine = here.start()
    os.kill(here.pid(), signal.SIGKILL)
    until(lambda: here.provider().has_stopped(machine.id))
    # No number comes back within the tick that tells when its process began; this one is about to, as it were.
    time.sleep(2 / os.sysconf("SC_CLK_TCK"))
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as other:
        try:
            (here.folder() / "record.json").write_text(json.dumps({**here.record(), "pid": other.pid}))
            assert here.provider().has_stopped(machine.id)
            here.provider().stop_server(machine.id)
            here.provider().delete_server(machine.id)
            assert here.provider().has_been_deleted(machine.id)
            time.sleep(0.05)
            assert other.poll() is None
        finally:
            other.kill()


def test_after_the_host_was_restarted_its_machines_are_down_and_not_gone(here: Here) -> None:
    machine = here.start()
    os.kill(here.pid(), signal.SIGKILL)
    until(lambda: not is_alive(here.pid()))
    # What it finds then: no process has the lock, and the number is another's, which began at another time.
    (here.folder() / "record.json").write_text(json.dumps({**here.record(), "pid": os.getpid()}))
    assert here.provider().has_stopped(machine.id)
    assert not here.provider().has_been_deleted(machine.id)
    assert here.provider().current_server_count() == 1


def test_who_is_killed_between_writing_down_a_deletion_and_a_kill_leaves_it_to_the_next_look(here: Here) -> None:
    machine = here.start()
    launcher.put(str(here.folder()), launcher.DELETED, {})
    assert here.state_of() == (MachineState.DELETING, "being killed")
    assert not here.provider().has_started(machine.id)
    with pytest.raises(ProviderRefused, match="cannot be rebooted"):
        here.provider().reboot_server(machine.id)
    until(lambda: here.provider().has_been_deleted(machine.id))
    assert here.processes() == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_no_worker_from_being_ended(here: Here, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(source: str, target: str) -> None:
        raise OSError(number, os.strerror(number))

    machine, other = here.start(python(SLOW)), here.start(key="two")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=os.strerror(number)):
            here.provider().reboot_server(other.id)
        assert here.provider().has_started(other.id)
        with pytest.raises(ProviderError, match=r"name-of-one is to be stopped cannot be written down.* Make room"):
            here.provider().stop_server(machine.id)
        until(lambda: here.said() == ["up", "told", "done"])
        with pytest.raises(ProviderError, match=r"name-of-two is to be deleted cannot be written down.* Make room"):
            here.provider().delete_server(other.id)
        until(lambda: here.processes() == [])
        assert here.provider().has_stopped(machine.id) and here.provider().has_stopped(other.id)
    assert sorted(path.name for path in here.folder("two").iterdir()) == ["lock", "output.log", "record.json"]
    for each in (machine, other):
        here.provider().delete_server(each.id)
        until(lambda each=each: here.provider().has_been_deleted(each.id))


# -- what is broken ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"pid": "x"}', '{"pid": 0}', '{"pid": 1}', '{"pid": 1, "began": "1"}'),
        '{"pid": 99999999999999999999, "began": "1", "booted": "1"}',
    ],
)
@pytest.mark.parametrize("alive", [True, False])
def test_a_record_that_cannot_be_read_hides_neither_its_machine_nor_the_others(
    here: Here, text: str, alive: bool
) -> None:
    machine, other = here.start(), here.start(key="two")
    pid = here.pid()
    if not alive:
        os.kill(pid, signal.SIGKILL)
        until(lambda: not is_alive(pid))
    (here.folder() / "record.json").write_text(text)
    assert [(m.id, m.key) for m in here.provider().list_servers()] == [(machine.id, "one"), (other.id, "two")]
    assert here.state_of()[0] is (MachineState.UNKNOWN if alive else MachineState.STOPPED)
    with pytest.raises(UnknownState, match="cannot be read"):
        here.provider().has_started(machine.id)
    assert here.provider().create_server(here.info()).id == machine.id
    here.provider().stop_server(machine.id)
    here.provider().delete_server(machine.id)
    until(lambda: here.provider().has_been_deleted(machine.id))
    assert [m.id for m in here.provider().list_servers()] == [other.id]
    assert here.processes() == [here.pid("two")]


def test_what_else_is_in_the_folder_is_no_machine(here: Here) -> None:
    machine = here.start()
    (here.folder().parent / "notes.txt").write_text("not a machine")
    (here.folder().parent / "empty").mkdir()
    (here.folder().parent / ".aside").mkdir()
    assert list(here.provider().list_servers()) == [machine]


def test_when_a_process_began_is_told_without_a_proc_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_PROC", False)
    with subprocess.Popen(["sleep", "600"]) as process:
        began = launcher.began(process.pid)
        assert began
        assert launcher.began(process.pid) == began
        process.kill()
        until(lambda: launcher.began(process.pid) == "", "a zombie to be dead")
    assert launcher.began(process.pid) == ""
