"""
Worker processes on this machine: the servers of a project that has one machine, of development, and of tests.

Each has a folder, of its key's name, in that of its fleet:

    lock         held by the worker for as long as it lives, from before its start on: see launcher.py
    record.json  what it was started with, and which process it is
    stop, reboot, deleted   what was asked of it
    output.log   what it prints, unless "log" says otherwise

What was asked for is written down before anything is done about it, and whoever starts a worker takes the lock before
it looks for that. So of a start and an end that meet, one sees the other, and nothing has to be waited for.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Final

from django.core import checks

from ...run.base import boot_time
from .. import conf
from ..entries import Machine, MachineState, ServerInfo
from ..exceptions import FleetError, ProviderBusy, ProviderError, ProviderFull, ProviderRefused, UnknownState
from . import launcher
from .base import BaseProvider

try:
    import pwd
except ImportError:  # Windows
    pwd = None  # type: ignore[assignment]

MARK: Final = "MULTISERVER_SCHEDULE_MACHINE"
"""The environment variable by which whatever a worker has started is still known as part of its machine."""
OPTIONS: Final = ("command", "env", "cwd", "directory", "host", "log", "stop_timeout")
CONFIGURATION: Final = ("command", "env")
PLACEHOLDERS: Final = ("name", "key", "type")

_SIGKILL: Final = 9  # Windows, where this can be imported, has no name for it
_LINUX: Final = sys.platform == "linux"
_KEY: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_FOR_CONFIGURATIONS: Final = re.compile(r"[A-Z][A-Z0-9_]*")
_KEPT: Final = 86400.0
"""For how many seconds it is remembered that a machine was deleted, for a creation of it that comes late."""
_NOT_FOR_WORKERS: Final = frozenset(
    {
        # What the scheduler tells a run of itself: an end of the run would be taken for that of the worker.
        *(f"MULTISERVER_SCHEDULE_{name}" for name in ("RUN", "NAME", "DUE_AT", "FENCE", "KEY", "ATTEMPT")),
        *(f"MULTISERVER_SCHEDULE_{name}" for name in ("CHANNEL", "LIFELINE", "FAULTS", "LAUNCHER_FAULT")),
        # What a service manager tells the scheduler.
        *("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"),
    }
)
_OF_CONTAINERS: Final = ("/.dockerenv", "/run/.containerenv")
_NO_ROOM: Final = (errno.EAGAIN, errno.ENOMEM, errno.ENFILE, errno.EMFILE)
_LATER: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ETXTBSY)


@dataclass(frozen=True, slots=True)
class _Seen:
    """One machine, as it is now."""

    key: str
    folder: str
    record: dict[str, Any] | None
    """None where it cannot be read, or is not written yet."""
    is_readable: bool
    is_led: bool
    """Does the process live that was started?"""
    is_alive: bool
    """Does that, or anything that it has started?"""
    is_deleted: bool
    is_stopped: bool
    """Was it told to stop?"""
    is_rebooted: bool
    """Was it told to reboot, and has not been started since?"""

    @property
    def is_down(self) -> bool:
        """
        Has it ended?

        What it has started counts while it ends because it was told to. Of one that has ended by itself it does no
        work of the machine's, and may live for ever: a deletion kills it.
        """
        has_ended = self.record is not None and self.is_readable and not self.is_led
        return not self.is_alive or (has_ended and not self.is_stopped and not self.is_rebooted)


class ProcessProvider(BaseProvider):
    """
    Servers that are processes of this machine, and outlive whoever started them.

    The OPTIONS: ``command``, the program and its arguments as a list, in which ``{name}``, ``{key}`` and ``{type}``
    stand for those of the server. ``env``: variables for it, besides those of the process that starts it. ``cwd``.
    ``log``: a file that it prints to (the three may stand in it, too), or a folder for files of the servers' names; by
    default it is with the provider's own. ``stop_timeout``: how long a worker that was told to stop, by a SIGTERM to it
    alone, may take to end what it does before all its processes are killed; a minute by default. ``directory``: where
    the provider keeps what it knows of them, on a disk of this machine, for this user alone, and where nothing else
    ever cleans up; by default ``.local/state/multiserver-schedule`` of the user's home. ``host``: this machine's name,
    where its host name changes, as it does with each new container. The configuration of a type may have a ``command``
    and an ``env`` of its own, of which the first replaces that of the OPTIONS, and the second is added. An option whose
    name is in capitals is for ``option("NAME")`` in these.

    A worker that ends by itself is a machine that is down, until it is deleted, whatever it has left behind: it has to
    stay in the foreground. One that was deleted is not made again by a creation of the same key that comes late.

    Under a service manager, see to it that the end of the scheduler's service leaves the workers alone
    (``KillMode=process`` of systemd); in a container, that there is an init which buries the dead (``docker run
    --init``).
    """

    idempotent = True
    local = True
    settles = timedelta(0)
    stop_timeout: timedelta = timedelta(minutes=1)
    _state: ClassVar[str] = ".local/state/multiserver-schedule"

    def __init__(self, name: str, options: Mapping[str, Any], *, fleet: str) -> None:
        super().__init__(name, options, fleet=fleet)
        where = f"{conf.SETTING}['PROVIDERS'][{name!r}]"
        if not launcher.POSIX:
            raise FleetError(f"{where}: {type(self).__name__} needs a POSIX system, such as Linux or macOS.")
        if not _KEY.fullmatch(name):
            raise FleetError(
                f"{where}: name it with letters, digits, dots, hyphens and underscores: its folder is called so."
            )
        for given in options:
            if given not in OPTIONS and not (
                isinstance(given, str) and _FOR_CONFIGURATIONS.fullmatch(given) and given.lower() not in OPTIONS
            ):
                known = conf.nearest(str(given).lower(), OPTIONS)
                raise FleetError(f"{where}['OPTIONS'] has no option {given!r}.{known}")
        try:
            self._command = _command(options["command"]) if "command" in options else None
            self._env = _env(options.get("env", {}))
            self._cwd = _path("cwd", options.get("cwd"))
            self._log = _path("log", options.get("log"))
            self._directory = _path("directory", options.get("directory"))
            if self._directory is not None and not os.path.isabs(str(options["directory"])):
                raise ValueError(f"'directory' should be an absolute path, not {options['directory']!r}.")
            self.host = str(options.get("host") or socket.gethostname())
            if "@" in self.host or "/" in self.host:
                raise ValueError(f"'host' should be the name of a machine, not {self.host!r}.")
            self.stop_timeout = options.get("stop_timeout", self.stop_timeout)
            if not isinstance(self.stop_timeout, timedelta) or self.stop_timeout < timedelta(0):
                raise ValueError(f"'stop_timeout' should be a timedelta, not {self.stop_timeout!r}.")
        except ValueError as error:
            raise FleetError(f"{where}['OPTIONS']: {error}") from None

    # -- the calls ----------------------------------------------------------------------------------------------------

    def create_server(self, server: ServerInfo) -> Machine:
        """
        Start its worker, unless one of the same key was started before.

        Raises ProviderRefused where there is no such program, or the configuration is wrong.
        """
        if not _KEY.fullmatch(server.key):
            raise ProviderRefused(f"The key {server.key!r} cannot be that of a process: it names a folder.")
        order = {"key": server.key, "name": server.name, "type": server.type, **self._settings_for(server)}
        self._prune()
        told = self._launch(server.key, {**order, "again": False})
        if told.get("deleted"):
            raise ProviderRefused(f"{server.key} was deleted before: a key is never used again.")
        seen = self._look(server.key)
        if seen is None:
            raise ProviderError(f"{server.name} was launched, and is gone already.")
        return self._machine(seen)

    def has_started(self, machine_id: str) -> bool:
        """
        Say whether its process lives; one that is to be rebooted, and has ended, is started again by this.

        Raises ProviderError where it has ended by itself.
        """
        seen = self._look(self._key(machine_id))
        if seen is None or seen.is_deleted or seen.is_stopped:
            return False
        if not seen.is_readable:
            raise UnknownState(f"The record of {machine_id} cannot be read: see {seen.folder}.")
        if seen.is_rebooted:
            if self._hasten(seen) or seen.is_alive:
                return False
            self._launch(seen.key, {"again": True})
            seen = self._look(seen.key)
            return seen is not None and seen.is_led and not seen.is_stopped
        if not seen.is_down:
            return seen.is_led
        raise ProviderError(f"{_name(seen)} has ended by itself. What it printed: {_log_of(seen)}")

    def stop_server(self, machine_id: str) -> None:
        """
        Send its process a SIGTERM, once: many programs take a second one for the order to hurry.

        Raises ProviderError when it was sent one and that cannot be written down, as on a full disk: it may be sent
        another.
        """
        seen = self._look(self._key(machine_id))
        if seen is not None and not seen.is_deleted:
            self._ask(seen, launcher.STOP)

    def has_stopped(self, machine_id: str) -> bool:
        """
        Say whether it is down: all its processes, if it was told to stop, and else the one that was started.

        They are killed when they have taken longer than they may.
        """
        seen = self._look(self._key(machine_id))
        if seen is None:
            return True
        return not self._hasten(seen) and seen.is_down and (seen.is_stopped or not seen.is_rebooted)

    def delete_server(self, machine_id: str) -> None:
        """Kill all its processes. Raises ProviderError when they are killed and that cannot be written down."""
        seen = self._look(self._key(machine_id))
        if seen is None:
            return
        try:
            if not seen.is_deleted:
                launcher.put(seen.folder, launcher.DELETED, {"at": time.time()})
        except OSError as error:
            raise _unwritten(seen, "deleted", "killed", error) from error
        finally:
            self._kill(seen.folder)

    def has_been_deleted(self, machine_id: str) -> bool:
        """Say whether nothing of it is left. What was started just when it was deleted is killed by this."""
        seen = self._look(self._key(machine_id))
        if seen is not None and seen.is_deleted:
            self._kill(seen.folder)
            seen = self._look(seen.key)
        return seen is None

    def reboot_server(self, machine_id: str) -> None:
        """
        Send its process a SIGTERM; when it has ended, ``has_started`` starts it again.

        One that was told to stop, as a drain may do before a reboot, is not told twice, and comes up again, too.
        """
        seen = self._look(self._key(machine_id))
        if seen is None or seen.is_deleted:
            raise ProviderRefused(f"{machine_id} cannot be rebooted: it is gone.")
        self._ask(seen, launcher.REBOOT)

    def current_server_count(self) -> int:
        """Return how many of this fleet there are, those that have ended and are not deleted among them."""
        return len(self.list_servers())

    def find_by_tag(self, key: str) -> Sequence[Machine]:
        """Return the one machine of this key, or none."""
        seen = self._look(key) if _KEY.fullmatch(key) else None
        return [] if seen is None else [self._machine(seen)]

    def list_servers(self) -> Sequence[Machine]:
        """Return all of this fleet that have not been deleted."""
        found = (self._look(key) for key in self._keys())
        return [self._machine(seen) for seen in found if seen is not None]

    def check(self) -> list[checks.CheckMessage]:
        """Tell where the folder cannot be used, and where the name of this host is another one tomorrow."""
        found: list[checks.CheckMessage] = []
        try:
            self._folder()
        except ProviderError as error:
            found.append(checks.Warning(str(error), hint=f"It is told by the provider {self.name!r}."))
        if not self.options.get("host") and _is_in_a_container():
            found.append(
                checks.Warning(
                    f"{conf.SETTING}['PROVIDERS'][{self.name!r}] takes the host name {self.host!r} for that of its "
                    "machine, and this seems to be a container: the next one has another, and would take the machines "
                    "of this one for another host's, and count them for ever.",
                    hint=f"Give it a name that stays the same: 'host': '{self.name}' in its OPTIONS.",
                    id="multiserver_schedule_servers.W006",
                )
            )
        return found

    # -- what there is ------------------------------------------------------------------------------------------------

    def _look(self, key: str) -> _Seen | None:
        """Return a machine as it is now, None where there is none."""
        folder = os.path.join(self._folder(), key)
        if not os.path.isdir(folder):
            return None
        record, is_readable = None, True
        try:
            record = launcher.read(folder)
        except ValueError:
            is_readable = False
        is_led = record is not None and launcher.began(record["pid"]) == record["began"]
        is_alive = is_led or not self._is_free(folder) or any(_marked(folder))
        is_deleted = launcher.has(folder, launcher.DELETED)
        if not is_alive and (is_deleted or (record is None and is_readable)):
            # Deleted, or never begun: a launcher that was killed before it could write a record has made nothing.
            return None
        return _Seen(
            key=key,
            folder=folder,
            record=record,
            is_readable=is_readable,
            is_led=is_led,
            is_alive=is_alive,
            is_deleted=is_deleted,
            is_stopped=launcher.has(folder, launcher.STOP),
            is_rebooted=record is not None and launcher.asked_to_reboot(folder, record),
        )

    def _machine(self, seen: _Seen) -> Machine:
        record = seen.record or {}
        if seen.is_deleted:
            state, word = MachineState.DELETING, "being killed"
        elif not seen.is_alive and seen.is_rebooted and not seen.is_stopped:
            state, word = MachineState.REBOOTING, "to be started again"
        elif seen.is_alive and seen.is_down:
            state, word = MachineState.STOPPED, "ended by itself, but for some of its children"
        elif not seen.is_alive:
            state, word = MachineState.STOPPED, "stopped" if seen.is_stopped else "ended by itself"
        elif seen.is_stopped:
            state, word = MachineState.STOPPING, "told to end"
        elif seen.is_rebooted:
            state, word = MachineState.REBOOTING, "told to end, and to be started again"
        elif not seen.is_readable:
            state, word = MachineState.UNKNOWN, "its record cannot be read"
        elif seen.is_led:
            state, word = MachineState.RUNNING, "running"
        else:
            state, word = MachineState.PENDING, "being launched"
        return Machine(
            id=f"{seen.key}@{self.host}",
            key=seen.key,
            state=state,
            word=word,
            name=str(record.get("name", "")),
            address=self.host,
            booted=str(record.get("booted", "")),
        )

    def _is_free(self, folder: str) -> bool:
        try:
            fd = os.open(os.path.join(folder, launcher.LOCK), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            return launcher.is_free(fd)
        finally:
            os.close(fd)

    def _keys(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self._folder()) if _KEY.fullmatch(name))
        except FileNotFoundError:
            return []

    def _key(self, machine_id: str) -> str:
        """Return the key of a machine of this host. Raises ProviderError where it is another's."""
        key, _, host = machine_id.rpartition("@")
        if not _KEY.fullmatch(key):
            raise ProviderError(f"{machine_id!r} is not the id of a process's machine.")
        if host != self.host:
            raise ProviderError(
                f"{machine_id} is on {host}, and this is {self.host}, which knows nothing of it. If {host} is another "
                f"machine, name in ONLY_ON of the provider {self.name!r} who may call it. If it is what this one was "
                f"called before, write 'host': {host!r} in the OPTIONS, and it keeps that name."
            )
        return key

    # -- its folder ---------------------------------------------------------------------------------------------------

    def _folder(self, *, make: bool = False) -> str:
        """
        Return the folder of this fleet's machines on this host, made where that is asked for.

        Raises ProviderRefused where others may write to it: what its files say is executed.
        """
        directory = self._directory or _home(self._state, self.name)
        folder = os.path.join(directory, f"{self.fleet}.{self.name}@{self.host}")
        try:
            if make:
                os.makedirs(directory, mode=0o700, exist_ok=True)
                with suppress(FileExistsError):
                    os.mkdir(folder, 0o700)
            for path, strictly in ((directory, False), (folder, True)):
                self._refuse_what_is_shared(path, strictly)
        except FileNotFoundError:
            if make:
                raise
        except OSError as error:
            raise ProviderRefused(
                f"{folder} cannot be used: {error.strerror}. Give the provider {self.name!r} a 'directory' in its "
                "OPTIONS that this user may write to."
            ) from error
        return folder

    def _refuse_what_is_shared(self, path: str, strictly: bool) -> None:
        status = os.lstat(path) if strictly else os.stat(path)
        owners = {os.geteuid()} if strictly else {os.geteuid(), 0}
        others = 0o022 if strictly else 0o002
        # In one like /tmp, nobody can replace what is another's.
        is_shared = status.st_mode & others and (strictly or not status.st_mode & 0o1000)
        if status.st_uid not in owners or is_shared or (strictly and os.path.islink(path)):
            raise ProviderRefused(
                f"{path} should belong to this user, and others should not be able to write to it: the commands of the "
                f"provider {self.name!r} are kept there."
            )

    def _prune(self) -> None:
        """Remove the folders of those that were deleted long ago, and of those that were never begun."""
        root = self._folder(make=True)
        for key in self._keys():
            folder = os.path.join(root, key)
            with suppress(OSError):
                if launcher.has(folder, launcher.DELETED):
                    since = os.stat(os.path.join(folder, launcher.DELETED)).st_mtime
                elif not launcher.has(folder, launcher.RECORD):
                    since = os.stat(folder).st_mtime
                else:
                    continue
                if time.time() - since > _KEPT and self._look(key) is None:
                    # Not piece by piece: a launcher that comes by just then finds all of it, or nothing.
                    aside = os.path.join(root, f".{uuid.uuid4().hex}")
                    os.rename(folder, aside)
                    shutil.rmtree(aside, ignore_errors=True)

    # -- starting -----------------------------------------------------------------------------------------------------

    def _settings_for(self, server: ServerInfo) -> dict[str, Any]:
        """Return what this server's worker is started with. Raises ProviderRefused."""
        given = server.configuration
        where = f"The configuration of {server.name}"
        for key in given:
            if key not in CONFIGURATION:
                raise ProviderRefused(f"{where} has no {key!r}.{conf.nearest(key, CONFIGURATION)}")
        try:
            command = _command(given["command"]) if "command" in given else self._command
            env = _env(given.get("env", {}))
        except ValueError as error:
            raise ProviderRefused(f"{where}: {error}") from None
        if command is None:
            raise ProviderRefused(f"{where} has no 'command', and nor have the OPTIONS of {self.name!r}.")
        folder = os.path.join(self._folder(), server.key)
        log = os.path.join(folder, launcher.OUTPUT)
        if self._log is not None:
            log = os.path.abspath(_filled(self._log, server))
            if os.path.isdir(log):
                log = os.path.join(log, f"{server.name}.log")
        return {
            "command": [_filled(part, server) for part in command],
            # Secrets may be among them: they are as safe in a file of this user as in the process's own environment.
            "env": {name: _filled(value, server) for name, value in {**self._env, **env}.items()},
            "cwd": self._cwd,
            "log": log,
        }

    def _launch(self, key: str, order: Mapping[str, Any]) -> dict[str, Any]:
        """Have a launcher carry out an order, and return what it tells. Raises what a creation may raise."""
        folder = os.path.join(self._folder(make=True), key)
        environ = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_WORKERS}
        environ[MARK] = folder
        faults = {launcher.FAULTS: os.environ[launcher.FAULTS]} if launcher.FAULTS in os.environ else {}
        try:
            process = subprocess.Popen(
                # Neither the site's packages nor the environment have a say in it: they would make it slow.
                [sys.executable, "-I", "-S", str(Path(launcher.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**environ, **faults},
                # Not in the group of a run that asks for it, which is killed when the run is over.
                start_new_session=True,
            )
        except OSError as error:
            raise _failure(f"No launcher could be started: {error}", error.errno) from error
        with process:
            try:
                text, _ = process.communicate(
                    json.dumps({**order, "folder": folder, "environ": environ}).encode(),
                    timeout=self.timeout.total_seconds(),
                )
            except subprocess.TimeoutExpired:
                process.kill()
                raise ProviderError(f"{key} had not been launched after {self.timeout.total_seconds():g} s.") from None
        if process.returncode:
            raise ProviderError(f"The launcher of {key} ended with {process.returncode}.")
        told: dict[str, Any] = json.loads(text) if text else {}
        if "error" in told:
            raise _failure(_in_words(told, order.get("command")), told.get("errno"), busy=told.get("busy", False))
        return told

    # -- ending -------------------------------------------------------------------------------------------------------

    def _ask(self, seen: _Seen, what: str) -> None:
        """Write down what is asked of a machine, then send its process a SIGTERM, unless it was sent one for that."""
        # One after the other: of two that ask at once, the second finds what the first has done.
        with _alone(seen.folder):
            booted = (seen.record or {}).get("booted", "")
            if what == launcher.REBOOT and (stopped := _asked(seen.folder, launcher.STOP)):
                # From when it was told to end on, whatever for.
                launcher.put(seen.folder, what, {**stopped, "booted": booted})
            if what == launcher.REBOOT:
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(seen.folder, launcher.STOP))
            before = _asked(seen.folder, what)
            is_same = before.get("booted") == booted
            if is_same and before.get("told"):
                return
            asked = {"booted": booted, "at": before["at"] if is_same else boot_time()}
            unwritten: OSError | None = None
            try:
                launcher.put(seen.folder, what, {**asked, "told": False})
            except OSError as error:
                if what != launcher.STOP:  # it would end, and nobody would know that it is to be started again
                    raise
                unwritten = error
            # As it is after that: a launcher that has not read it has written its record.
            with suppress(ValueError):
                record = launcher.read(seen.folder)
                if record is not None and (what == launcher.STOP or record["booted"] == booted):
                    asked["booted"] = record["booted"]
                    _signal_process(record["pid"], record["began"], signal.SIGTERM)
            if unwritten is not None:
                raise _unwritten(seen, "stopped", "told", unwritten) from unwritten
            launcher.put(seen.folder, what, {**asked, "told": True})

    def _hasten(self, seen: _Seen) -> bool:
        """Kill a machine that was told to end and has taken longer than it may; say whether it had to."""
        what = launcher.STOP if seen.is_stopped else launcher.REBOOT if seen.is_rebooted else None
        if what is None or not seen.is_alive:
            return False
        if boot_time() - _asked(seen.folder, what).get("at", 0.0) < self.stop_timeout.total_seconds():
            return False
        self._kill(seen.folder)
        return True

    def _kill(self, folder: str) -> None:
        """KILL all that belongs to a machine. What has been killed may take a moment to be gone."""
        record = None
        with suppress(ValueError):
            record = launcher.read(folder)
        if record is not None:
            _kill_group(record["pid"], record["began"])
        for _ in range(5):
            found = [pid for pid in _marked(folder) if _kill(pid, lambda pid: pid in _marked(folder, (pid,)))]
            if not found and self._is_free(folder):
                return
            # Forked by the worker, with another environment by now, in a session of its own: the lock is open in it.
            for pid in _holders(os.path.join(folder, launcher.LOCK)):
                _kill(pid, lambda pid: any(_holders(os.path.join(folder, launcher.LOCK), (pid,))))
            if record is not None and not _LINUX and not self._is_free(folder):
                with suppress(OSError):
                    os.killpg(record["pid"], _SIGKILL)
            time.sleep(0.002)


# -- processes --------------------------------------------------------------------------------------------------------


def _signal_process(pid: int, began: str, number: int) -> bool:
    """Signal this process, and never another that has its number by now; say whether it was there."""
    return _kill(pid, lambda pid: launcher.began(pid) == began, number)


def _kill(pid: int, is_it: Callable[[int], bool], number: int = _SIGKILL) -> bool:
    """Signal a process if it is the right one, looked at when its number cannot be another's any more."""
    handle = -1
    if _LINUX:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        except OSError:  # a kernel or a container that does not have it
            pass
    try:
        if not is_it(pid):
            return False
        if handle >= 0:
            signal.pidfd_send_signal(handle, number)
        else:
            os.kill(pid, number)
    except ProcessLookupError:
        return False
    finally:
        if handle >= 0:
            os.close(handle)
    return True


def _kill_group(pid: int, began: str) -> None:
    """KILL the process group of this process, if it lives: a group whose leader is dead may be another's by now."""
    if launcher.began(pid) == began:
        with suppress(ProcessLookupError):
            os.killpg(pid, _SIGKILL)


def _pids() -> list[int]:
    if not _LINUX:
        return []
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _marked(folder: str, among: Sequence[int] | None = None) -> Iterator[int]:
    """Find the processes that were started, at any remove, by the worker of this folder."""
    mark = f"{MARK}={folder}".encode()
    for pid in _pids() if among is None else among:
        with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as environ:
            if mark in environ.read().split(b"\0"):
                yield pid


def _holders(path: str, among: Sequence[int] | None = None) -> Iterator[int]:
    """Find the processes that hold the lock of this file, and not only look whether it is free."""
    try:
        wanted = os.stat(path)
    except OSError:
        return
    for pid in _pids() if among is None else among:
        with suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    status = os.stat(f"/proc/{pid}/fd/{fd}")
                    if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
                        with open(f"/proc/{pid}/fdinfo/{fd}") as info:
                            if re.search(r"^lock:.*\bFLOCK\b.*\bWRITE\b", info.read(), re.MULTILINE):
                                yield pid
                                break


# -- small ------------------------------------------------------------------------------------------------------------


@contextmanager
def _alone(folder: str) -> Iterator[None]:
    """Wait for whoever does the same, which takes milliseconds; not for ever, since it may be frozen."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for _ in range(40):
            if launcher.lock(fd):
                break
            time.sleep(0.05)
        yield
    finally:
        os.close(fd)


def _asked(folder: str, what: str) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, what), encoding="utf-8") as file:
            asked = json.load(file)
    except (OSError, ValueError):
        return {}
    return asked if isinstance(asked, dict) else {}


def _name(seen: _Seen) -> str:
    return str((seen.record or {}).get("name") or seen.key)


def _log_of(seen: _Seen) -> str:
    return str((seen.record or {}).get("log", seen.folder))


def _command(value: object) -> list[str]:
    if (
        not isinstance(value, Sequence)
        or isinstance(value, (str, bytes))
        or not value
        or not all(isinstance(part, str) and "\0" not in part for part in value)
        or not value[0]
    ):
        raise ValueError(
            "'command' should be a list of the program and its arguments, such as "
            "['/usr/bin/python3', 'manage.py', 'db_worker']; there is no shell."
        )
    return list(value)


def _env(value: object) -> dict[str, str]:
    # Not the values: they may be secrets.
    if not isinstance(value, Mapping) or not all(
        isinstance(name, str) and name and "=" not in name and isinstance(text, str) and "\0" not in name + text
        for name, text in value.items()
    ):
        raise ValueError("'env' should be a dict of the names of variables to texts.")
    return dict(value)


def _path(name: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or isinstance(os.fspath(value), bytes):
        raise ValueError(f"{name!r} should be a path, not {value!r}.")
    return os.path.abspath(value)


def _filled(text: str, server: ServerInfo) -> str:
    """Put in the three alone: braces are common in arguments."""
    return re.sub(r"\{(name|key|type)\}", lambda found: str(getattr(server, found[1])), text)


def _is_in_a_container() -> bool:
    return "KUBERNETES_SERVICE_HOST" in os.environ or any(map(os.path.exists, _OF_CONTAINERS))


def _home(state: str, name: str) -> str:
    # Not $HOME nor a folder for temporary files: all processes of this user have to find the same one, those that cron
    # starts and those of a service among them, and nobody else may ever clean up in it.
    try:
        home = pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        home = ""
    if not os.path.isabs(home):
        raise ProviderRefused(f"This user has no home: give the provider {name!r} a 'directory' in its OPTIONS.")
    return os.path.join(home, state)


def _in_words(told: Mapping[str, Any], command: Sequence[str] | None) -> str:
    what = {
        "command": f"{command[0] if command else 'The command'} could not be started",
        "cwd": "The folder 'cwd' could not be changed to",
        "log": "The log could not be opened",
        "fork": "No process could be started",
    }.get(str(told.get("step")), "It could not be launched")
    return f"{what}: {told['error']}."


def _unwritten(seen: _Seen, what: str, done: str, error: OSError) -> ProviderError:
    return ProviderError(
        f"That {_name(seen)} is to be {what} cannot be written down in {seen.folder}: {error.strerror}. It was {done} "
        "all the same. Make room there."
    )


def _failure(text: str, number: int | None, *, busy: bool = False) -> ProviderError:
    """Return the error to raise where certainly nothing was started."""
    if number in _NO_ROOM:
        return ProviderFull(text)
    return ProviderBusy(text) if busy or number in _LATER else ProviderRefused(text)
