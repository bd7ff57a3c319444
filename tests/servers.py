"""
Real database servers for tests and benchmarks, started from the binaries that this machine has.

Each server has a free port on the loopback, a data folder of its own and a password of its own, and is gone, folder and
all, when the process that started it ends, however that ends: a supervisor between the two watches for it.

    with servers.start("postgresql") as server:
        server.url, server.freeze(), server.thaw(), server.backend_pids()

    python -m tests.servers postgresql mariadb -- python benchmarks/idle.py     # TEST_POSTGRESQL_URL, TEST_MARIADB_URL

Another kind of server is one more subclass of ``Kind``. Only the standard library is imported here: the supervisor runs
this file as a script.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import os
import pwd
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

DATABASE = "schedule"
USER = "schedule"
STARTS_WITHIN = 60.0
STOPS_WITHIN = 10.0


class ServerError(Exception):
    """A server is not installed, or did not start; the message holds the end of its log."""


# --- what there is to start -----------------------------------------------------------------------------------------


class Kind(ABC):
    """How one kind of server is laid out in an empty folder, started, and known to be ready."""

    name: ClassVar[str]
    scheme: ClassVar[str]
    binaries: ClassVar[tuple[str, ...]]
    places: ClassVar[tuple[str, ...]] = ("/usr/sbin", "/usr/local/sbin", "/usr/local/bin", "/opt/homebrew/bin")
    users: ClassVar[tuple[str, ...]] = ("nobody",)
    """Who it runs as when root starts it: the first that exists."""
    stop_signal: ClassVar[int] = signal.SIGKILL
    """The data is thrown away, so the quickest end that leaves nothing in the system (shared memory) is the best."""

    def __init__(self, folder: Path, port: int, password: str) -> None:
        self.folder, self.port, self.password = folder, port, password
        self.data = folder / "data"
        self.log = folder / "log"

    @classmethod
    def missing(cls) -> str:
        """Return why this kind cannot be started here, or "" when it can."""
        lost = [binary for binary in cls.binaries if cls.find(binary) is None]
        return f"no {' and no '.join(lost)} on this machine" if lost else ""

    @classmethod
    def find(cls, binary: str) -> str | None:
        folders = [found for place in cls.places for found in sorted(glob.glob(place), key=_version, reverse=True)]
        return shutil.which(binary) or shutil.which(binary, path=os.pathsep.join(folders))

    @property
    def url(self) -> str:
        return f"{self.scheme}://{USER}:{self.password}@127.0.0.1:{self.port}/{DATABASE}"

    @abstractmethod
    def prepare(self) -> None:
        """Lay out the data folder, as the user that the server will run as."""

    @abstractmethod
    def command(self) -> list[str]:
        """Return the command that runs the server in the foreground."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Does the server answer queries now?"""

    def finish(self) -> None:  # noqa: B027  Most have nothing to do.
        """Do what needs a running server (create the database)."""

    def run(self, command: Sequence[str], **environ: str) -> None:
        """Run one of the server's own programs to its end, as the server's user."""
        done = subprocess.run(
            list(command),
            cwd=self.folder,
            env={**os.environ, "HOME": str(self.folder), **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            **_as_user(type(self)),
        )
        if done.returncode:
            raise ServerError(f"{command[0]} failed with status {done.returncode}:\n{done.stdout[-2000:]}")

    def binary(self, name: str) -> str:
        found = self.find(name)
        if found is None:
            raise ServerError(f"{self.name} cannot be started: no {name} on this machine.")
        return found


class PostgreSQL(Kind):
    name = "postgresql"
    scheme = "postgresql"
    binaries = ("initdb", "postgres", "createdb")
    places = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql@*/bin", *Kind.places)
    users = ("postgres", "nobody")
    stop_signal = signal.SIGQUIT

    def prepare(self) -> None:
        secret = self.folder / "password"
        secret.write_text(self.password)
        # "password" and not SCRAM: its thousands of rounds for each connection would be most of a short test's time.
        self.run(
            [
                self.binary("initdb"),
                *("-D", str(self.data), "-U", USER, f"--pwfile={secret}", "-A", "password"),
                *("--no-sync", "--no-locale", "-E", "UTF8"),
            ]
        )

    def command(self) -> list[str]:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.folder),
            "fsync": "off",
            "max_connections": "200",
            "shared_buffers": "32MB",
            # POSIX shared memory would outlive a server that is killed.
            "dynamic_shared_memory_type": "mmap",
            "log_min_messages": "fatal",
        }
        settings = [f"--{key}={value}" for key, value in options.items()]
        return [self.binary("postgres"), "-D", str(self.data), *settings]

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError, IndexError):
            return (self.data / "postmaster.pid").read_text().splitlines()[7].strip() == "ready"
        return False

    def finish(self) -> None:
        where = ["-h", "127.0.0.1", "-p", str(self.port), "-U", USER]
        self.run([self.binary("createdb"), *where, DATABASE], PGPASSWORD=self.password)


class MariaDB(Kind):
    name = "mariadb"
    scheme = "mysql"
    binaries = ("mariadb-install-db", "mariadbd")
    users = ("mysql", "nobody")

    def prepare(self) -> None:
        self.run(
            [
                self.binary("mariadb-install-db"),
                *("--no-defaults", f"--datadir={self.data}", "--skip-test-db"),
                *("--auth-root-authentication-method=normal", "--innodb-log-file-size=16M"),
            ]
        )
        (self.folder / "init.sql").write_text(
            f"CREATE DATABASE IF NOT EXISTS {DATABASE};\n"
            f"CREATE USER IF NOT EXISTS '{USER}'@'127.0.0.1' IDENTIFIED BY '{self.password}';\n"
            f"GRANT ALL ON *.* TO '{USER}'@'127.0.0.1' WITH GRANT OPTION;\n"
            "DELETE FROM mysql.global_priv WHERE User = 'root';\n"
            "FLUSH PRIVILEGES;\n"
        )

    def command(self) -> list[str]:
        return [
            self.binary("mariadbd"),
            "--no-defaults",
            f"--datadir={self.data}",
            f"--socket={self.folder / 'socket'}",
            f"--pid-file={self.folder / 'pid'}",
            f"--init-file={self.folder / 'init.sql'}",
            f"--port={self.port}",
            "--skip-networking=0",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
            "--skip-log-bin",
            "--character-set-server=utf8mb4",
            "--max-connections=200",
            "--innodb-buffer-pool-size=32M",
            "--innodb-log-file-size=16M",
            "--innodb-flush-log-at-trx-commit=2",
        ]

    def is_ready(self) -> bool:
        # It speaks first, and only when its init file has been run.
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            return b"mysql_native_password" in connection.recv(1024)
        return False


KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in (PostgreSQL, MariaDB)}


def missing(name: str) -> str:
    """Return why a server of this kind cannot be started on this machine, or "" when it can."""
    return KINDS[name].missing()


# --- a server that runs ---------------------------------------------------------------------------------------------


class Server:
    """One running server. It ends with ``stop()``, with the ``with`` block, or with the process that started it."""

    def __init__(self, kind: Kind, supervisor: subprocess.Popen[str], pid: int) -> None:
        self.kind = kind
        self.name = kind.name
        self.url = kind.url
        self.port = kind.port
        self.folder = kind.folder
        self.pid = pid
        """The server's first process (PostgreSQL's postmaster)."""
        self._supervisor = supervisor
        self._started_by = os.getpid()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Server {self.name} on port {self.port}, pid {self.pid}>"

    def database_settings(self) -> dict[str, Any]:
        """Return an entry for Django's ``DATABASES``."""
        return database_settings(self.url)

    def pids(self) -> list[int]:
        """Return all processes of this server, the first one first."""
        return [self.pid, *_descendants(self.pid)]

    def backend_pids(self) -> list[int]:
        """Return the processes that each serve one client; none where one process serves all (MariaDB)."""
        return [pid for pid in _descendants(self.pid) if re.search(r"\(\d+\)|\[local\]", _command_line(pid))]

    def freeze(self, *pids: int) -> None:
        """Stop all processes of this server (or these of them) where they are: connections stay, nothing answers."""
        if pids:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            return
        os.kill(self.pid, signal.SIGSTOP)
        _signal_tree(self.pid, signal.SIGSTOP)

    def thaw(self, *pids: int) -> None:
        """Let them go on."""
        for pid in pids or self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def stop(self) -> None:
        """End the server, frozen or not, and remove its folder. May be called twice."""
        atexit.unregister(self.stop)
        if os.getpid() != self._started_by:
            return  # A fork of the process that owns it.
        if self._supervisor.poll() is None:
            self._supervisor.terminate()
        self._supervisor.wait(timeout=STOPS_WITHIN * 2)
        if self._supervisor.stdout is not None:
            self._supervisor.stdout.close()


def start(name: str) -> Server:
    """
    Start a server of this kind and return it when it answers.

    Raises ServerError, with the end of its log, where it is not installed or does not come up.
    """
    if name not in KINDS:
        raise ServerError(f"There is no server {name!r}. Those are: {', '.join(KINDS)}.")
    if reason := missing(name):
        raise ServerError(f"{name} cannot be started: {reason}.")
    for last in (False, False, True):
        try:
            return _start(KINDS[name])
        except ServerError as error:
            # Somebody may have taken the port between our look and the server's.
            if last or not re.search("address already in use|any TCP/IP sockets", str(error), re.IGNORECASE):
                raise
    raise AssertionError("unreachable")


def _start(chosen: type[Kind]) -> Server:
    folder = Path(tempfile.mkdtemp(prefix=f"{chosen.name}-"))
    kind = chosen(folder, _free_port(), secrets.token_hex(8))
    supervisor = None
    try:
        if user := _user(chosen):
            os.chown(folder, user.pw_uid, user.pw_gid)
        kind.prepare()
        supervisor = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", __file__, "--supervise", str(os.getpid())),
                *(chosen.name, str(folder), *kind.command()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C in a terminal is for the tests, which may still need the server to end well.
            start_new_session=True,
        )
        assert supervisor.stdout is not None
        pid = supervisor.stdout.readline().strip()
        if not pid:
            raise ServerError(f"{chosen.name} could not be started: {_tail(kind.log)}")
        server = Server(kind, supervisor, int(pid))
        deadline = time.monotonic() + STARTS_WITHIN
        while not kind.is_ready():
            if supervisor.poll() is not None:
                raise ServerError(f"{chosen.name} ended while starting:\n{_tail(kind.log)}")
            if time.monotonic() > deadline:
                raise ServerError(f"{chosen.name} did not answer within {STARTS_WITHIN:.0f} s:\n{_tail(kind.log)}")
            time.sleep(0.02)
        kind.finish()
    except BaseException:
        if supervisor is not None:
            supervisor.terminate()
            supervisor.communicate()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    atexit.register(server.stop)
    return server


@contextlib.contextmanager
def running(names: Iterable[str]) -> Iterator[dict[str, Server]]:
    """Start several servers and stop them at the end of the block."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(start(name)) for name in names}


def database_settings(url: str) -> dict[str, Any]:
    """Return Django's ``DATABASES`` entry for ``sqlite:////path``, ``postgresql://…`` or ``mysql://…``."""
    parts = urlsplit(url)
    if parts.scheme == "sqlite":
        return {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": unquote(parts.path[1:]) or ":memory:",
            "OPTIONS": {"timeout": 20},
        }
    engines = {"postgresql": "postgresql", "postgres": "postgresql", "mysql": "mysql", "mariadb": "mysql"}
    return {
        "ENGINE": f"django.db.backends.{engines[parts.scheme]}",
        "NAME": unquote(parts.path[1:]),
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": parts.hostname or "",
        "PORT": str(parts.port or ""),
    }


# --- processes ------------------------------------------------------------------------------------------------------


def _version(path: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _user(kind: type[Kind]) -> pwd.struct_passwd | None:
    """Return whom root becomes before it starts a server, which refuses to run as root; None for anybody else."""
    if os.geteuid() != 0:
        return None
    for name in kind.users:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise ServerError(f"{kind.name} does not run as root, and none of these users exists: {', '.join(kind.users)}.")


def _as_user(kind: type[Kind]) -> dict[str, Any]:
    user = _user(kind)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError):
        return log.read_text(errors="replace")[-2000:]
    return "(no log)"


def _parents() -> dict[int, int]:
    """Map each process of this machine to its parent."""
    found = {}
    if os.path.isdir("/proc/self"):
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                # The name of the program, in parentheses, may hold spaces and parentheses.
                found[int(entry)] = int(Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1])
    else:
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
        for line in listing.stdout.splitlines():
            pid, parent = line.split()
            found[int(pid)] = int(parent)
    return found


def _descendants(root: int) -> list[int]:
    """Return the processes under ``root``, parents before children."""
    parents = _parents()
    found, level = [], [root]
    while level:
        level = [pid for pid, parent in parents.items() if parent in level]
        found += level
    return found


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    listing = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return listing.stdout


def _signal_tree(root: int, number: int) -> None:
    """Signal everything under ``root``, until a look finds nobody new."""
    done: set[int] = set()
    while new := [pid for pid in _descendants(root) if pid not in done]:
        for pid in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        done.update(new)


def _supervise(parent: int, kind: type[Kind], folder: Path, command: list[str]) -> int:
    """
    Run a server and end it, with all its processes and its folder, when it is told to or ``parent`` is gone.

    A parent-death signal alone would do for a server of one process that is not frozen; this does for all.
    """
    # Backends whose postmaster is gone become our children, where we find them.
    if sys.platform == "linux":
        import ctypes  # Not on every Python, and only here.

        ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "HOME": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            **_as_user(kind),
        )
    print(server.pid, flush=True)
    while not stopping and server.poll() is None and os.getppid() == parent:
        if select.select([wake], [], [], 0.2)[0]:
            os.read(wake, 4096)
    ended_by_itself = server.poll() is not None
    if not ended_by_itself:
        _signal_tree(os.getpid(), signal.SIGCONT)
        server.send_signal(kind.stop_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOPS_WITHIN / 2)
    _signal_tree(os.getpid(), signal.SIGKILL)
    server.wait()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    if not ended_by_itself or os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)
    return server.returncode if ended_by_itself else 0


# --- from a shell ---------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """``python -m tests.servers postgresql mariadb -- command …``: run a command with these servers up."""
    names, separator, command = _split(arguments)
    if not names or not separator or not command:
        print(f"usage: python -m tests.servers {{{','.join(KINDS)}}} [...] -- command [...]", file=sys.stderr)
        return 2
    try:
        with running(names) as servers:
            urls = {f"TEST_{name.upper()}_URL": server.url for name, server in servers.items()}
            return subprocess.run(command, env={**os.environ, **urls}, check=False).returncode
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _split(arguments: list[str]) -> tuple[list[str], bool, list[str]]:
    if "--" not in arguments:
        return arguments, False, []
    at = arguments.index("--")
    return arguments[:at], True, arguments[at + 1 :]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--supervise"]:
        sys.exit(_supervise(int(sys.argv[2]), KINDS[sys.argv[3]], Path(sys.argv[4]), sys.argv[5:]))
    sys.exit(main(sys.argv[1:]))
