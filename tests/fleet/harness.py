"""Start servers, do things to them, look at what they left. See the package's docstring for a first example."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import glob
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import pytest
from django.db import OperationalError, connections

from multiserver_schedule.database import clock_of
from multiserver_schedule.entries import Row
from multiserver_schedule.exceptions import ScheduleError
from multiserver_schedule.locks.base import BaseLock
from multiserver_schedule.locks.cache import CacheLock
from multiserver_schedule.models import CleanupLog, ScheduledLock, ScheduledRun, ScheduleState

from .. import caches, stores
from ..caches import CacheStore
from ..stores import ROOT, Store
from .apps import SKEW
from .journal import VARIABLE, Journal, boot

CACHE_LOCK = {"BACKEND": "multiserver_schedule.locks.cache.CacheLock", "OPTIONS": {"cache": "lock"}}
COARSE = {"memcached": 1.0}
"""Seconds that a kind of cache's clock is behind at most: this one knows whole seconds only."""
AWAY: tuple[type[Exception], ...] = (OperationalError, OSError, ScheduleError)
"""What a store raises that is away: the clients of the caches are not asked for their errors where they are missing."""
with contextlib.suppress(ImportError):
    from redis.exceptions import RedisError

    AWAY += (RedisError,)
with contextlib.suppress(ImportError):
    from pymemcache.exceptions import MemcacheError

    AWAY += (MemcacheError,)
MARK = "FLEET_ID"
"""In the environment of everything that a fleet starts, and of what that starts."""
PATIENCE = 30.0

_T = TypeVar("_T")


def _only(fixture: str, missing: Callable[[str], str], *names: str) -> pytest.MarkDecorator:
    def marks(name: str) -> list[pytest.MarkDecorator]:
        found = [pytest.mark.skipif(bool(missing(name)), reason=f"{name}: {missing(name)}")]
        if name in stores.ALIASES:
            found.append(pytest.mark.django_db(databases=[stores.ALIASES[name]], transaction=True))
        return found

    return pytest.mark.parametrize(fixture, [pytest.param(name, marks=marks(name)) for name in names], indirect=True)


TWO_CACHES = _only("cache_store", caches.missing, "django-redis", "memcached")
"""Not on all five ways to a cache lock: processes do not care which client it is."""
REDIS = _only("cache_store", caches.missing, "django-redis")
HISTORY_IN_SQLITE = _only("store", stores.missing, "sqlite")
HISTORY_IN_POSTGRESQL = _only("store", stores.missing, "postgresql")


def libfaketime() -> str:
    """Return the path of the library that fakes clocks, "" where it is not installed."""
    places = ("/usr/lib/*/faketime", "/usr/lib/faketime", "/usr/lib64/faketime", "/usr/local/lib/faketime")
    found = [path for place in places for path in sorted(glob.glob(f"{place}/libfaketime.so.1"))]
    return found[0] if found else ""


# -- the process table ------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Return the living children of a process."""
    return [child for child, (parent, state) in _table().items() if parent == pid and state not in "ZX"]


def descendants(pid: int) -> list[int]:
    """Return what descends from a process, parents first."""
    table = _table()
    found = [pid]
    for parent in found:
        found += [child for child, (its, state) in table.items() if its == parent and state not in "ZX"]
    return found[1:]


def is_alive(pid: int) -> bool:
    """Is there such a process, and not only its corpse?"""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def is_stopped(pid: int) -> bool:
    """Is it there, and stopped by a signal?"""
    return _table().get(pid, (0, ""))[1] == "T"


def _table() -> dict[int, tuple[int, str]]:
    table = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{name}/stat", "rb") as stat:
                fields = stat.read().rpartition(b")")[2].split()
                table[int(name)] = int(fields[1]), fields[0].decode()
    return table


def _output_of(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/1")
    except OSError:
        return ""


def _signal(pids: Iterable[int], number: int) -> list[int]:
    reached = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            reached.append(pid)
    return reached


# -- one server -------------------------------------------------------------------------------------------------------


class Process:
    """One ``runschedule`` of a server: the keeper, and below it the runner, its runs, and theirs."""

    def __init__(self, fleet: Fleet, server: str, pid: int, output: Path) -> None:
        self.fleet = fleet
        self.server = server
        self.keeper_pid = pid
        self._output = output
        self._runner: int | None = None
        self._status: int | None = None

    def runner_pid(self) -> int | None:
        """Return the runner's pid, None while there is none. It is remembered: a dead keeper has no children."""
        found = [child for child in children(self.keeper_pid) if child != self.keeper_pid]
        if found:
            self._runner = found[0]
        return self._runner

    def run_pids(self) -> list[int]:
        """Return the processes of the runs under way: the runner's children with an output of their own."""
        runner = self.runner_pid()
        if runner is None:
            return []
        usual = _output_of(runner)
        return [pid for pid in children(runner) if (output := _output_of(pid)).startswith("pipe:") and output != usual]

    def pids(self, which: str = "keeper") -> list[int]:
        """Return the pids of ``keeper``, ``runner``, ``both``, ``runs``, or ``all`` (what descends from the keeper)."""
        runner = self.runner_pid()
        runners = [] if runner is None else [runner]
        if which == "keeper":
            return [self.keeper_pid]
        if which == "runner":
            return runners
        if which == "both":
            return [self.keeper_pid, *runners]
        if which == "runs":
            return self.run_pids()
        if which == "all":
            below = {pid: None for start in (self.keeper_pid, *runners) for pid in descendants(start)}
            return [self.keeper_pid, *runners, *(pid for pid in below if pid not in runners)]
        raise ValueError(f"which={which!r} is none of keeper, runner, both, runs, all.")

    def kill(self, which: str = "keeper") -> None:
        """KILL -9 it, and note it in the journal."""
        self._do("killed", which, signal.SIGKILL)

    def stop(self, which: str = "keeper") -> None:
        """SIGSTOP it, and note it."""
        self._do("stopped", which, signal.SIGSTOP)

    def cont(self, which: str = "keeper") -> None:
        """SIGCONT it, and note it. Before: what goes on at once shall find the line there."""
        self._do("continued", which, signal.SIGCONT)

    def terminate(self) -> None:
        """Ask it to end, as an init system does."""
        self._do("terminated", "keeper", signal.SIGTERM)

    def _do(self, event: str, which: str, number: int) -> None:
        # A number that is remembered may be another's by now.
        pids = [pid for pid in self.pids(which) if self.fleet.owns(pid)]
        if number == signal.SIGCONT:
            self.fleet.journal.write(event, server=self.server, keeper=self.keeper_pid, which=which, pids=pids)
        reached = _signal(pids, number)
        if number != signal.SIGCONT:
            self.fleet.journal.write(event, server=self.server, keeper=self.keeper_pid, which=which, pids=reached)

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        raise NotImplementedError

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for its end and return the exit status; fails the test with its output when it takes longer."""
        self.fleet.wait_for(
            lambda: self.poll() is not None, f"{self.server} to end\n{{}}", timeout, also=lambda: self.output
        )
        status = self.poll()
        assert status is not None
        return status

    @property
    def alive(self) -> bool:
        """Does it run still?"""
        return self.poll() is None

    @property
    def output(self) -> str:
        """What it has printed and logged so far."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def __repr__(self) -> str:
        return f"<{self.server}, keeper {self.keeper_pid}, status {self.poll()}>"


class Started(Process):
    """A server that was started afresh, as cron would."""

    def __init__(self, fleet: Fleet, server: str, started: subprocess.Popen[bytes], output: Path) -> None:
        super().__init__(fleet, server, started.pid, output)
        self.popen = started

    def poll(self) -> int | None:
        return self.popen.poll()


class Forked(Process):
    """A server that a post forked."""

    def __init__(self, post: Post, server: str, pid: int, output: Path) -> None:
        super().__init__(post.fleet, server, pid, output)
        self.post = post

    def poll(self) -> int | None:
        if self._status is None:
            self.post.read()
            self._status = self.post.ended.get(self.keeper_pid)
        return self._status


class Post:
    """A process with Django set up, which forks a ``runschedule`` for each order: that costs next to nothing."""

    def __init__(self, fleet: Fleet, server: str, started: subprocess.Popen[bytes]) -> None:
        self.fleet = fleet
        self.server = server
        self.popen = started
        self.ended: dict[int, int] = {}
        self._pids: dict[int, int] = {}
        self._orders = 0
        self._unread = b""

    def go(
        self, *, at_barrier: bool = False, faults: str = "", server: str | None = None, args: Sequence[str] = ()
    ) -> Forked:
        """Fork a pass, of the post's own server or of another that differs by its name alone."""
        server = server or self.server
        self._orders += 1
        output = self.fleet.output_of(server)
        order = {
            "order": self._orders,
            "barrier": str(self.fleet.barrier_path) if at_barrier else "",
            "faults": faults,
            "server": server,
            "args": list(args),
            "output": str(output),
        }
        assert self.popen.stdin is not None
        self.popen.stdin.write((json.dumps(order) + "\n").encode())
        self.popen.stdin.flush()
        number = self._orders
        self.fleet.wait_for(lambda: self.read() or number in self._pids, f"the post of {self.server} to fork")
        forked = Forked(self, server, self._pids[number], output)
        self.fleet.add(forked)
        return forked

    def read(self) -> None:
        """Take in what the post has said."""
        assert self.popen.stdout is not None
        if self.popen.stdout.closed:
            return
        file = self.popen.stdout.fileno()
        while select.select((file,), (), (), 0)[0]:
            chunk = os.read(file, 65536)
            if not chunk:
                return
            *lines, self._unread = (self._unread + chunk).split(b"\n")
            for line in lines:
                said = json.loads(line)
                if "status" in said:
                    self.ended[said["pid"]] = said["status"]
                else:
                    self._pids[said["order"]] = said["pid"]


# -- the fleet --------------------------------------------------------------------------------------------------------


class Fleet:
    """
    Several servers on one store: the database ``store``, or with ``cache`` that cache, the history in the database.

    ``lease`` and ``heartbeat`` are seconds; ``settings`` are further keys of MULTISERVER_SCHEDULE (durations in
    seconds), ``env`` further variables of all its processes. All that was started is ended when the block is left.
    """

    def __init__(
        self,
        store: Store,
        tmp_path: Path,
        project: str = "steady",
        *,
        cache: CacheStore | None = None,
        lease: float = 3.0,
        heartbeat: float = 1.0,
        settings: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.store = store
        self.folder = tmp_path
        self.project = project
        self.lease = lease
        self.heartbeat = heartbeat
        self.settings = {"LEASE": lease, "HEARTBEAT": heartbeat, **(settings or {})}
        self.env = dict(env or {})
        self.cache = cache
        self.cache_lock: BaseLock | None = None
        """The test's own line to the cache; None where the lock is in the database."""
        self.coarse = 0.0
        """Seconds that the clock of the store may be behind itself."""
        if cache is not None:
            self.settings.setdefault("LOCKS", {"default": CACHE_LOCK})
            self.env["FLEET_CACHES"] = cache.as_json()
            self.cache_lock = CacheLock("default", CACHE_LOCK["OPTIONS"])  # type: ignore[arg-type]
            self.coarse = COARSE.get(cache.kind, 0.0)
        self.id = uuid.uuid4().hex
        self.journal = Journal(tmp_path / "journal.jsonl")
        self.barrier_path = tmp_path / "barrier"
        self.processes: list[Process] = []
        self.posts: list[Post] = []
        self._outputs = 0
        self._barrier: int | None = None

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is not None:
            print(self.told())

    # -- starting ---------------------------------------------------------------------------------------------------

    def server(
        self,
        name: str,
        *,
        at_barrier: bool = False,
        faults: str = "",
        clock: str | None = None,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> Started:
        """
        Start ``runschedule`` on a server of this name, as its cron would: one pass.

        ``faults`` is MULTISERVER_SCHEDULE_FAULTS; ``clock`` an offset as libfaketime has it ("+1h", "-1h", "+90s").
        """
        output = self.output_of(name)
        environ = self.environ(name, clock=clock, env=env, settings=settings)
        if faults:
            environ["MULTISERVER_SCHEDULE_FAULTS"] = faults
        if at_barrier:
            environ["FLEET_BARRIER"] = str(self.barrier_path)
        with output.open("ab") as file:
            started = subprocess.Popen(
                [sys.executable, "-m", "tests.fleet.start", *args],
                env=environ,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process = Started(self, name, started, output)
        self.add(process)
        return process

    def post(
        self,
        name: str,
        *,
        clock: str | None = None,
        env: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Post:
        """Have a process of this server stay up and fork passes: for tests that start a great many."""
        # Any fault, so that the points are there to be armed in a fork.
        more = {"MULTISERVER_SCHEDULE_FAULTS": "nowhere=exit", **(env or {})}
        environ = self.environ(name, clock=clock, env=more, settings=settings)
        with self.output_of(f"{name}-post").open("ab") as file:
            started = subprocess.Popen(
                [sys.executable, "-m", "tests.fleet.start", "--post"],
                env=environ,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
            )
        post = Post(self, name, started)
        self.posts.append(post)
        return post

    def environ(
        self,
        name: str,
        *,
        clock: str | None = None,
        env: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> dict[str, str]:
        """Return the environment of a process of this server."""
        environ = self.store.environ(
            DJANGO_SETTINGS_MODULE="tests.fleet.settings",
            FLEET_PROJECT=self.project,
            FLEET_SETTINGS=json.dumps({"SERVER_NAME": name, **self.settings, **(settings or {})}),
            FLEET_SERVER=name,
            **{VARIABLE: str(self.journal.path), MARK: self.id},
        )
        environ.pop("MULTISERVER_SCHEDULE_FAULTS", None)
        if clock is not None:
            environ |= {
                "LD_PRELOAD": " ".join(filter(None, [libfaketime(), environ.get("LD_PRELOAD", "")])),
                "FAKETIME": clock,
                "DONT_FAKE_MONOTONIC": "1",
                # Else a child started later finds the semaphore of a dead parent.
                "FAKETIME_NO_CACHE": "1",
                SKEW: str(_seconds(clock)),
            }
        return {**environ, **self.env, **(env or {})}

    def add(self, process: Process, clock: str | None = None) -> None:
        """Take a started process in."""
        self.processes.append(process)
        self.journal.write("launched", server=process.server, keeper=process.keeper_pid)

    def output_of(self, name: str) -> Path:
        """Return a fresh file for what a process prints."""
        self._outputs += 1
        return self.folder / f"{self._outputs:04}-{name}.log"

    def register(self, server: str = "registrar", **more: Any) -> None:
        """
        Have the declarations seen by a first server, so that the rows exist. Nothing is run.

        Rows of tasks on every server are made for this server alone.
        """
        process = self.server(server, args=["--register"], **more)
        assert process.wait() == 0, process.output

    @contextlib.contextmanager
    def barrier(self, wanted: int) -> Iterator[None]:
        """
        Hold the barrier while the block starts ``wanted`` servers with ``at_barrier``; open it when all wait there.
        """
        already = len(self.journal.of("waiting"))
        file = os.open(self.barrier_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
            self.wait_for(
                lambda: len(self.journal.of("waiting")) >= already + wanted, f"{wanted} servers at the barrier"
            )
        finally:
            os.close(file)

    # -- the tables -------------------------------------------------------------------------------------------------

    def now(self) -> datetime:
        """Return the clock of the locks' store."""
        if self.cache_lock is not None:
            return self.cache_lock.clock()
        return clock_of(ScheduleState.objects.using(self.store.alias))

    def pair(self) -> tuple[float, datetime]:
        """Ask what the database's clock says, and note it with the boot clock: one can then be mapped on the other."""
        before = boot()
        now = self.now()
        after = boot()
        # Which is all that is known of when this was, and by how much a clock of whole seconds was behind.
        spread = after - before + 2 * self.coarse
        self.journal.write("clock", at=(before + after) / 2, now=now, spread=spread)
        return (before + after) / 2, now

    def make_due(self, names: Iterable[str] | None = None, due_at: datetime | None = None) -> datetime:
        """
        Put the rows back so that a due time is open now, and return the moment after which due times count.

        By default that is the last full minute less a second, so that tasks of a minute and up are due once (twice, if
        the next minute begins). With ``due_at``: a second before that. Only for tasks that nobody runs at the moment.
        """
        if due_at is None:
            due_at = self.now().replace(second=0, microsecond=0)
        since = due_at - timedelta(seconds=1)
        if self.cache_lock is not None:
            wanted = None if names is None else set(names)
            there = self.cache_lock.rows()
            assert there, "No such row."
            self.put(
                dataclasses.replace(row, last_due_at=since, schedule_since=since, next_due_at=due_at, not_before=since)
                if wanted is None or row.task in wanted
                else row
                for row in there
            )
            return since
        rows = ScheduledLock.objects.using(self.store.alias)
        if names is not None:
            rows = rows.filter(task__in=list(names))
        assert rows.update(last_due_at=since, schedule_since=since, next_due_at=due_at, not_before=since), (
            "No such row."
        )
        return since

    def put(self, rows: Iterable[Row]) -> None:
        """Empty the cache, and have its lock register its tasks with these rows. Only while nobody runs any of them."""
        assert self.cache is not None
        self.cache.server.kind.empty()
        text = json.dumps([dataclasses.asdict(row) for row in rows], default=datetime.isoformat)
        self.register(env={"FLEET_ROWS": text, "FLEET_NOW": (self.now() - timedelta(hours=1)).isoformat()})

    def runs(self, task: str | None = None, **having: Any) -> list[ScheduledRun]:
        """Return the runs and skips, in the order in which they were written."""
        if task is not None:
            having["task"] = task
        return list(ScheduledRun.objects.using(self.store.alias).filter(**having).order_by("pk"))

    def locks(self) -> list[ScheduledLock] | list[Row]:
        """Return the rows of the tasks."""
        if self.cache_lock is not None:
            return sorted(self.cache_lock.rows(), key=lambda row: row.task)
        return list(ScheduledLock.objects.using(self.store.alias).order_by("task"))

    def lock(self, task: str) -> ScheduledLock | Row:
        """Return the row of one task."""
        if self.cache_lock is not None:
            (row,) = self.cache_lock.rows([task])
            return row
        return ScheduledLock.objects.using(self.store.alias).get(task=task)

    def cleanups(self, task: str | None = None) -> list[CleanupLog]:
        """Return the clean-ups, oldest first."""
        having = {} if task is None else {"task": task}
        return list(CleanupLog.objects.using(self.store.alias).filter(**having).order_by("pk"))

    def forget(self) -> None:
        """Remove what was run and cleaned up so far; the rows of the tasks stay, with their fences."""
        ScheduledRun.objects.using(self.store.alias).all().delete()
        CleanupLog.objects.using(self.store.alias).all().delete()

    # -- waiting and ending -----------------------------------------------------------------------------------------

    def wait_for(
        self,
        condition: Callable[[], _T],
        what: str,
        timeout: float = PATIENCE,
        *,
        also: Callable[[], str] | None = None,
    ) -> _T:
        """Wait for the condition to be true and return its value; fail with all that is known when it never is."""
        until = boot() + timeout
        while True:
            answer = condition()
            if answer:
                return answer
            if boot() > until:
                more = also() if also else ""
                raise AssertionError(f"Waited {timeout:g} s for {what.replace('{}', more)}\n{self.told()}")
            time.sleep(0.01)

    def told(self) -> str:
        """Return what the processes printed, and the end of the journal, for a test that fails."""
        parts = [f"--- {process}\n{process.output[-3000:]}" for process in self.processes[-12:]]
        parts += [
            f"--- {path.name}\n{path.read_text()[-3000:]}"
            for path in self.folder.glob("*-post.log")
            if path.stat().st_size
        ]
        lines = [str(line) for line in self.journal if line["event"] != "tick"]
        return "\n".join([*parts, "--- journal", *lines[-60:]])

    def mine(self) -> list[int]:
        """Return the pids of everything that this fleet started, and that this started, and that is alive."""
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in pids if self.owns(pid) and is_alive(pid)]

    def owns(self, pid: int) -> bool:
        """Was this process started by this fleet, at any remove?"""
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as environ:
            return pid != os.getpid() and f"{MARK}={self.id}".encode() in environ.read().split(b"\0")
        return False

    def close(self) -> None:
        """End everything that was started."""
        until = boot() + 10
        while (left := self.mine()) and boot() < until:
            _signal(left, signal.SIGKILL)
            for started in (
                *(p.popen for p in self.processes if isinstance(p, Started)),
                *(p.popen for p in self.posts),
            ):
                started.poll()
            time.sleep(0.01)
        for process in self.processes:
            if isinstance(process, Started):
                process.popen.wait(10)
        for post in self.posts:
            for pipe in (post.popen.stdin, post.popen.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            post.popen.wait(10)
        connections[self.store.alias].close()
        if self.cache_lock is not None:
            self.cache_lock.close()
        assert not left, f"These processes could not be ended: {left}"


def _seconds(clock: str) -> float:
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(clock[-1])
    return float(clock[:-1]) * unit if unit else float(clock)


def utc(text: str) -> datetime:
    """Return the moment of a journal line."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
